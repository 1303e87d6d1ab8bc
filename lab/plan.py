"""What a step takes, worked out before anything is downloaded or loaded: tokens by role, memory by phase.

Memory is arithmetic over the shapes of the model; `python -m lab.gpu` holds it against measurements on a card.
D hidden size, I the MLP's inner size, T tokens of a row; every size is in bytes unless it says otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from config import FACTS_TOKENS, Config, switched_on
from data import UserError
from engine.crutches import TRIES_AT_ONCE
from engine.loading import check_hub, first_line, pick_device, resolve
from engine.memory import LOGITS_CHUNK_BYTES, PREFILL_TOKENS, TOKENS_PER_WORD, Batch, Device, in_use, work_of

GIB = 2**30
# In memory beside the model. CUDA: its context and workspaces. CPU: imports 0.2, then tokenizer and threads.
CONTEXT = {"cuda": int(0.8 * GIB), "cpu": int(0.45 * GIB)}
# On a CPU glibc keeps a share of what is freed, most of it between the gradients as they grow. Measured at three sizes.
KEPT = {"cuda": (1.0, 1.0), "cpu": (1.05, 1.1)}  # beside the rollout, beside the update
CARDS = {16: 13, 24: 20, 32: 27, 48: 44, 80: 74}  # GB of a card -> GiB to use; the allocator fragments the rest


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
        d, i, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(d, q), (d, kv), (d, kv), (q, d), (d, i), (d, i), (i, d)]

    @property
    def linear_params(self) -> int:
        return self.layers * sum(n * m for n, m in self.linears)

    @property
    def other_params(self) -> int:
        """Embedding and output head, norms and biases: what is not quantized."""
        biases = sum(m for _, m in self.linears[:3]) if self.qkv_bias else 0
        norms = self.layers * (2 * self.hidden + biases) + self.hidden
        return self.vocab * self.hidden * (1 if self.tied else 2) + norms

    @property
    def params(self) -> int:
        return self.linear_params + self.other_params

    def lora_params(self, r: int) -> int:
        return self.layers * sum(r * (n + m) for n, m in self.linears)

    def kv_bytes(self, dtype_bytes: int) -> int:
        """Key-value cache of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes


# Sizes from the config.json of the hub, so that the plan needs no connection; -Instruct has the same.
KNOWN = {
    "smollm2": Shapes(576, 30, 9, 3, 64, 1536, 49_152, tied=True),
    "Qwen/Qwen2.5-0.5B": Shapes(896, 24, 14, 2, 64, 4864, 151_936, tied=True, qkv_bias=True),
    "Qwen/Qwen2.5-1.5B": Shapes(1536, 28, 12, 2, 128, 8960, 151_936, tied=True, qkv_bias=True),
    "Qwen/Qwen2.5-3B": Shapes(2048, 36, 16, 2, 128, 11_008, 151_936, tied=True, qkv_bias=True),
    "Qwen/Qwen2.5-7B": Shapes(3584, 28, 28, 4, 128, 18_944, 152_064, qkv_bias=True),
    "Qwen/Qwen2.5-14B": Shapes(5120, 48, 40, 8, 128, 13_824, 152_064, qkv_bias=True),
    "Qwen/Qwen2.5-32B": Shapes(5120, 64, 40, 8, 128, 27_648, 152_064, qkv_bias=True),
    "Qwen/Qwen2.5-72B": Shapes(8192, 80, 64, 8, 128, 29_568, 152_064, qkv_bias=True),
}


def shapes_of(name: str) -> Shapes:
    """A model name as `model.load` takes it -> its shapes; of a hub model at most config.json is fetched.

    Raises UserError if there is no such model, the hub is out of reach or the model is not Llama-like.
    """
    if (known := name.removesuffix("-Instruct")) in KNOWN:
        return KNOWN[known]
    path = Path(name).expanduser()
    gguf = path.name if path.suffix == ".gguf" and path.is_file() else None  # resolve() would convert it
    source = str(path.parent) if gguf else resolve(name)
    check_hub(source)
    try:
        config = AutoConfig.from_pretrained(source, gguf_file=gguf, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:  # a broken file
        raise UserError(f"cannot read the sizes of {name}: {first_line(error)}") from None
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


# ----------------------------------------------------------------------------------------------------- memory


def predict(
    shapes: Shapes, work: Mapping[str, Batch], device: Device, cfg: Config, dequantize: bool = False, bf16: bool = True
) -> dict[str, int]:
    """Peak bytes of "load" and of each role of `work`, from a run's second step on, when Adam's two moments exist.

    dequantize: all roles but "update" compute from a dequantized copy of the weights. bf16: a CUDA card has it, as all
    since Ampere do; others compute in fp32. Of cfg: how the model is loaded and trained, not the lengths.
    """
    nf4 = cfg.load_in == "4bit"
    dtype = {"4bit": 2 if device == "cuda" and bf16 else 4, "bf16": 2, "fp32": 4}[cfg.load_in]
    # NF4: half a byte a weight, a byte to scale each 64, an fp32 to scale each 256 of those.
    linear = 0.5 + 1 / 64 + 4 / (64 * 256) if nf4 else dtype
    lora = shapes.lora_params(cfg.lora_r)
    base = int(shapes.linear_params * linear) + shapes.other_params * dtype
    resident = base + 12 * lora  # fp32 adapters with their moments
    casts = 2 * lora if dtype == 2 else 0  # autocast keeps a bf16 copy of each adapter
    # One weight dequantized to be multiplied. While it is quantized at loading there are three in fp32 (as read,
    # scaled, rounded); on CUDA one kernel does it. The embedding, in the 16 bits it is read in, may be larger.
    weight = max(n * m for n, m in shapes.linears) * dtype if nf4 else 0
    embedding = 2 * shapes.vocab * shapes.hidden if dtype == 4 else 0
    result = {"load": base + 4 * lora + max(embedding, weight if device == "cuda" else 3 * weight)}
    # In fp32 the output head once more, in the layout that decoding wants.
    copy = dtype * (shapes.linear_params + (shapes.vocab * shapes.hidden if dtype == 4 else 0))
    for role, batch in work.items():
        if role == "update":  # with gradients
            activations = update_bytes(shapes, batch, dtype, cfg.lora_r, cfg.recompute, LOGITS_CHUNK_BYTES[device])
            result[role] = resident + 4 * lora + casts + weight + activations
        else:
            activations = rollout_bytes(shapes, batch, dtype, PREFILL_TOKENS[device])
            result[role] = resident + casts + (copy if dequantize else weight) + activations
    return {role: CONTEXT[device] + int(size * KEPT[device][role == "update"]) for role, size in result.items()}


def rollout_bytes(shapes: Shapes, batch: Batch, dtype: int, chunk: int) -> int:
    """Activations and KV cache of the prefill of a batch and of the decoding after it.

    chunk: how many tokens pass through the model at once, if each row has fewer.
    """
    d, i, q = shapes.hidden, shapes.intermediate, shapes.heads * shapes.head_dim
    kv = shapes.kv_bytes(dtype)
    # Of a token: the residual stream with two normed copies, queries, keys and values of every head and what attention
    # returns; or the activated gate beside the three stages of `up` with its LoRA. Its keys and values are apart until
    # they are put into the cache.
    token = (3 * d + max(4 * q, 4 * i)) * dtype
    prefill = min(batch.prompts * batch.prompt, max(chunk, batch.prompt)) * (token + kv)
    if batch.new:
        logits = 5 * 4 * batch.rows * shapes.vocab  # fp32: logits, scores, probabilities; in fp64 their sums
        return batch.rows * (batch.prompt + batch.new) * kv + max(prefill, logits)
    # The prefixes' cache; then rows with a copy of theirs, masked, which attention needs for every query head.
    shared = batch.prompt - batch.rest
    first = min(batch.prefixes * shared, max(chunk, shared)) * (token + kv)
    rest = batch.prompts * (batch.rest * token + batch.prompt * (kv + 2 * q * dtype + batch.rest * dtype))
    return batch.prefixes * shared * kv + max(first, rest)


def update_bytes(shapes: Shapes, batch: Batch, dtype: int, lora_r: int, recompute: bool, chunk: int) -> int:
    """Activations and gradients of one micro-batch of prompts, each in a row with n completions.

    chunk: the bytes of the logits that are computed at once.
    """
    d, i, q = shapes.hidden, shapes.intermediate, shapes.heads * shapes.head_dim
    row = batch.prompt + batch.n * batch.new
    tokens = batch.prompts * row
    mask = batch.prompts * row * row * dtype if batch.n > 1 else 0
    norms = tokens * 8 * d if dtype == 2 else 0  # they compute in fp32
    gradients = tokens * 3 * i * dtype  # of the MLP's product, of the activated gate and of up
    if recompute:  # each layer's input is kept, and the last output
        kept = (shapes.layers + 1) * tokens * d * dtype
        # Of the layer that is recomputed: two normed inputs and the residual; queries, keys and values of every head,
        # and what attention returns; gate, activated gate, up and their product; seven LoRA insides.
        layer = tokens * (3 * d + 4 * q + 4 * i + 7 * lora_r) * dtype + norms + gradients + mask
    else:  # what was listed, with each norm's input apart, and attention's output in a second order
        kept = shapes.layers * (tokens * (6 * d + 5 * q + 4 * i + 7 * lora_r) * dtype + 2 * norms)
        layer = gradients + mask
    states = 2 * batch.rows * batch.new * d * dtype  # those that are scored, and their gradient
    # In fp32: logits, log-probabilities, probabilities, and the terms of the entropy.
    logits = 4 * min(chunk, 4 * shapes.vocab * batch.rows * batch.new)
    return kept + states + max(layer, logits)


# ------------------------------------------------------------------------------------------------------- plan


def tokens_of(cfg: Config) -> dict[str, tuple[int, int]]:
    """(tokens of the prefill, tokens decoded) of a step by role, at most; of the update, (passed over, trained on).

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
    else:  # a row for each criterion, its prefix computed once for all answers of a batch
        pieces = math.ceil(cfg.group_size / max(1, cfg.rollout_tokens // judge.prompt))  # of a group too large for one
        prefixes = taken * cfg.max_criteria * pieces
        judged = (prefixes * (judge.prompt - judge.rest) + answers * cfg.max_criteria * judge.rest, 0)
    rows = cfg.documents * math.ceil(cfg.group_size / update.n)
    return {
        "propose": ((taken * rounds + attempts) * work["propose"].prompt, attempts * tried),
        "solve": (taken * work["solve"].prompt, answers * cfg.max_new_tokens),
        "rubric": (3 * taken * work["rubric"].prompt, 5 * taken * work["rubric"].new),
        "judge": judged,
        "update": (rows * update.prompt + trained * cfg.max_new_tokens, trained * cfg.max_new_tokens),
    }


def plan(cfg: Config) -> str:
    """What --dry-run prints: for the model of `cfg`, and for CUDA if there is one or the preset is made for one."""
    shapes, here = shapes_of(cfg.model), torch.cuda.is_available()
    device: Device = "cuda" if here or cfg.preset in ("16gb", "24gb", "48gb") else "cpu"
    copied = switched_on(cfg.dequantize, device == "cuda")
    bf16 = not here or pick_device()[1] == torch.bfloat16
    columns = [
        predict(shapes, work_of(cfg, device), device, cfg, dequantize, bf16)
        for dequantize in ([False, True] if copied and cfg.load_in == "4bit" else [False])
    ]
    roles = ["load", *in_use(cfg)]
    corpus = cfg.corpus or f"the hub corpus of {cfg.task}"
    length = f"up to {cfg.max_words:,} words (about {round(cfg.max_words * TOKENS_PER_WORD):,} tokens)"
    kept = f", {cfg.documents} of them trained on," if cfg.documents_taken > cfg.documents else ""
    lines = [
        f"model      {cfg.model}: {shapes.params / 1e9:.2f} B parameters in {cfg.load_in}, "
        f"LoRA r={cfg.lora_r} trains {shapes.lora_params(cfg.lora_r) / 1e6:.1f} M",
        f"documents  {cfg.documents_taken} a step{kept} from {corpus}, {length}; {cfg.steps} steps",
        "",
        "a step, at most   tokens: prefill    decoded   memory GiB" + "   dequantized" * (len(columns) - 1),
    ]
    tokens = tokens_of(cfg)
    for role in roles:
        counts = "{:18,}{:11,}".format(*tokens[role]) if role in tokens else " " * 29
        lines.append(f"  {role:<13}{counts}" + "".join(f"{column[role] / GIB:13.1f}" for column in columns))
    fits = []
    for column in columns:
        top = max(column[role] for role in roles) / GIB
        card = next((f"fits a {size} GB card" for size, limit in CARDS.items() if top <= limit), "fits no card listed")
        fits.append(f"{top:.1f} GiB, {card if device == 'cuda' else 'must be free'}.")
    lines += ["", f"Memory on {device} is arithmetic, not measured. Its peak, {fits[0]}"]
    if len(fits) > 1:
        lines.append(
            "With a dequantized copy of the weights, which makes the rollout faster and is dropped where it does not "
            f"fit (--dequantize off: none), {fits[1]}"
        )
    return "\n".join(lines)
