"""The one LLM: loading it in 4 bits with LoRA, prompts to ids, generation, choices and log-probabilities.

Shape letters: B rows, P prompt tokens, C completion tokens, T = P + C, G answers of a group, K choices,
N completion tokens of a whole batch, D hidden size, V vocabulary.
"""

import bisect
import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList

from data import UserError
from engine import fast, loading
from engine.constrained import Field, TemplateFiller, Watcher
from engine.memory import LOGITS_CHUNK_BYTES, PREFILL_TOKENS, Device, in_batches
from engine.prefill import last_states, prefill
from engine.text import chat

# What a tokenizer without a chat template (a base model) is given instead.
PLAIN_FORMAT = {
    "system": "{content}",
    "user": "\n\n### Request\n{content}\n\n### Response\n",
    "assistant": "{content}",
}
# A text must not spell out the headings of PLAIN_FORMAT.
PLAIN_HEADINGS = re.compile(r"###(?=\s*(?:request|response)\b)", re.IGNORECASE)

# Time of attention with a mask over that without, per pair of tokens. On CUDA a mask rules out FlashAttention: on an
# H200 it takes 3.9 times as long with 3,514 tokens, 1.2 with 704, where attention is a small part of the work.
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


def load(
    name: str, *, load_in: str = "4bit", lora_r: int = 32, lora_alpha: int = 64, seed: int = 0, **options: Any
) -> "LLM":
    """Load a causal LM with a fresh LoRA on every linear layer except the output head. options: fields of LLM.

    load_in: "4bit" (NF4, double quantization), "bf16" or "fp32". Adapter weights are fp32 in every case. The base
    weights are frozen and never merged: the base model is the same weights with the adapters disabled.
    Raises UserError if the model is missing or is not one this code can train exactly.
    """
    base, tokenizer, dtype = loading.pretrained(name, load_in)
    torch.manual_seed(seed)  # the adapter's initial weights
    return LLM(loading.with_lora(base, lora_r, lora_alpha), tokenizer, dtype=dtype, **options)


@dataclass
class LLM:
    """A PeftModel and its tokenizer.

    `token_budget` caps rows x (prompt + completion) tokens of a batch; it is halved where memory runs out.
    """

    model: Any
    tokenizer: Any
    dtype: torch.dtype = torch.float32
    token_budget: int = 32_768
    dequantize: bool = False  # generate and judge by a dequantized copy of the weights: faster, at 2 or 4 bytes each
    cuda_graph: bool = False  # decode by CUDA graphs; on a CPU the same steps without the graph
    recompute: bool = True  # activation checkpointing in the update
    eos_ids: list[int] = field(init=False)
    pad_id: int = field(init=False)
    _forwards: tuple[Any, dict[Any, Any]] | None = field(init=False, default=None)  # see inference()

    def __post_init__(self) -> None:
        """Raises UserError if the model names no end token or is not one this code can train exactly."""
        self.eos_ids = loading.end_tokens(self.model.get_base_model(), self.tokenizer)
        pad, known = self.tokenizer.pad_token_id, self.model.get_input_embeddings().num_embeddings
        self.pad_id = self.eos_ids[0] if pad is None or pad >= known else pad  # some name one that the model lacks
        loading.prepare(self.model, self.recompute)
        # generate() fills what a call leaves open from here: repositories ship top_p, top_k, repetition_penalty.
        ends = GenerationConfig(eos_token_id=self.eos_ids, pad_token_id=self.pad_id)
        self.model.get_base_model().generation_config = ends
        self.model.eval()
        loading.check_exact(self)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def kind(self) -> Device:
        return "cpu" if self.device.type == "cpu" else "cuda"

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
    def prefill_tokens(self) -> int:
        return min(self.token_budget, PREFILL_TOKENS[self.kind])

    # ---- adapters, training and inference

    def adapters_off(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model is the untouched base model."""
        return self.model.disable_adapter()

    def take_adapter(self, folder: Path) -> None:
        """Put a saved adapter, such as a run's `adapter/`, in the place of the present one; it is not to be trained on.

        Raises UserError if it cannot be read, belongs to another model, or is no plain LoRA on every linear layer.
        """
        self._forwards = None
        try:
            loading.check_plain(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
            self.model.delete_adapter("default")
            missing = self.model.load_adapter(str(folder), "default").missing_keys
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"adapter {folder} cannot be used with this model: {loading.first_line(error)}") from None
        if missing or any("default" not in layer.lora_A for layer in fast.lora_layers(self.model)):
            raise UserError(f"adapter {folder} is not of this model: it lacks weights for some of its linear layers")
        self.model.eval()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside, with `recompute`, activations are computed again in the backward pass; nothing else differs."""
        self._forwards = None  # the memory is needed, and the adapters are about to change
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    @contextlib.contextmanager
    def inference(self, dequantize: bool | None = None) -> Iterator[None]:
        """Inside, without gradients, layers compute from what is made of weights and adapters once and then kept.

        That is the adapters in 16 bits where the model computes in them, and with `dequantize` (by default the LLM's
        own) the weights dequantized. They are made anew when adapters are switched on or off, or have been trained.
        """
        self.model.eval()  # in training mode the KV cache is silently dropped
        dequantize = self.dequantize if dequantize is None else dequantize
        adapted = not fast.lora_layers(self.model)[0].disable_adapters
        if not dequantize and (self.dtype == torch.float32 or not adapted):
            self._forwards = None
            yield
            return
        versions = [p._version for p in self.model.parameters() if p.requires_grad] if adapted else []
        made_for = (adapted, dequantize, versions)
        if self._forwards is None or self._forwards[0] != made_for:
            self._forwards = None  # never two copies
            self._forwards = made_for, fast.prepared_forwards(self.model, self.dtype, adapted, dequantize)
        with fast.replaced(self._forwards[1]):
            yield

    def autocast(self) -> torch.autocast:
        """fp32 adapters compute in bf16 beside a bf16 base; nothing changes when the base computes in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    # ---- text to ids and back

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """All tokens with a meaning of their own. Added tokens that are plain words are ordinary text."""
        added = (token for token in self.tokenizer.get_added_vocab() if not re.fullmatch(r"[\w\s'-]+", token))
        tokens = {str(t).strip() for t in (*added, *self.tokenizer.all_special_tokens)}
        escaped = (re.escape(t) for t in sorted(tokens, key=len, reverse=True) if len(t) > 1)
        return re.compile("|".join(escaped) or r"\Z\A")

    def neutralise(self, text: str) -> str:
        """Break every special token spelled out in a text: `<|im_end|>` -> `< |im_end|>`."""
        while self.special_tokens.search(text):
            text = self.special_tokens.sub(lambda match: match[0][0] + " " + match[0][1:], text)
        return text

    def encode(self, user: str) -> list[int]:
        """What the user says -> prompt ids, at whose end the assistant's text begins."""
        return self.encode_messages(chat(user))

    def encode_messages(self, messages: Sequence[Mapping[str, str]], prefill: str = "") -> list[int]:
        """A conversation (role and content of each turn, the last the user's) -> prompt ids, at whose end the
        assistant's text goes on after `prefill`.

        Only the chat template can produce special tokens: whatever the texts spell out stays ordinary text.
        """
        messages = [{"role": m["role"], "content": self.neutralise(m["content"])} for m in messages]
        prefill = self.neutralise(prefill)
        if self.tokenizer.chat_template is None:
            turns = ((m["role"], PLAIN_HEADINGS.sub("## #", m["content"])) for m in messages)
            plain = "".join(PLAIN_FORMAT[role].format(content=content) for role, content in turns)
            ids = self.tokenizer(plain + prefill, add_special_tokens=False).input_ids
            bos = self.tokenizer.bos_token_id  # of what a tokenizer adds, only the start: some add an end token too
            begins = bos is not None and self.tokenizer(plain).input_ids[:1] == [bos] != ids[:1]
            return [bos, *ids] if begins else ids
        return self.tokenizer(self._rendered(messages) + prefill, add_special_tokens=False).input_ids

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The chat template's text. Where a template takes no system message, it begins the user's."""
        render = functools.partial(self.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        try:
            return render(messages)
        except jinja2.TemplateError:
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise
            system, user, *rest = messages
            return render([{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest])

    @cached_property
    def _thought_end(self) -> list[int]:
        """What ends the thought that some chat templates begin in the prompt: without it, a reply that is read off or
        constrained would be read inside the thought."""
        if self.tokenizer.chat_template is None:
            return []
        opened = self._rendered([{"role": "user", "content": "?"}]).rstrip().endswith("<think>")
        return self.tokenizer("\n</think>\n\n", add_special_tokens=False).input_ids if opened else []

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer(self.neutralise(text), add_special_tokens=False).input_ids

    def continuations(self, label: str, choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Ids of the label, and those by which each choice, if there are any, goes on after it, one or more.

        The label's ids are what the tokenizations of label + choice share, so that no merge across the boundary is
        missed.
        """
        if not choices:
            return self.text_ids(label), []
        full = [self.text_ids(label + choice) for choice in choices]
        shared = fast.common_prefix(full)
        return full[0][:shared], [ids[shared:] for ids in full]

    def choice_ids(self, choices: Sequence[str]) -> list[int]:
        """The id of the first token of each choice, for `choice_probs`.

        Raises ValueError if two choices begin with the same token.
        """
        _, rest = self.continuations("", choices)
        first = [ids[0] for ids in rest]
        if len(set(first)) < len(choices):
            raise ValueError(f"choices {choices} do not differ in their first token")
        return first

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

        Prefixes are decoded, as tokens by themselves may be parts of a character, or decode without their space. To
        halve the range each time keeps it cheap: about ten of them for a thousand tokens.
        """
        text = self.decode(completion.ids)
        wanted = text[: len(text) - len(text.lstrip()) + character + 1]  # completion.text is stripped
        counts = range(1, len(completion.ids) + 1)
        return bisect.bisect_left(counts, True, key=lambda n: self.decode(completion.ids[:n]).startswith(wanted))

    def check_length(self, tokens: int) -> None:
        if tokens > self.context:
            window = getattr(self.model.config.get_text_config(), "sliding_window", None) == self.context
            limit = "attention window, beyond which it would not be computed exactly here," if window else "context"
            raise UserError(
                f"a prompt with its completion takes {tokens} tokens, the model's {limit} is {self.context}: "
                "lower --max-words, --max-new-tokens or --rubric-answers"
            )

    # ---- generation

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        templates: Sequence[Sequence[Field]] | None = None,
        watch: Sequence[str] = (),
        desc: str = "generate",
    ) -> list[list[Completion]]:
        """`n` completions of each prompt, sampled from softmax(logits / temperature); temperature 0 is greedy.

        What prompts begin with alike is prefilled once. With `templates`, one for each completion in order, they fill
        them in. With `watch`, replies of one token each, completions tell how likely these were in the place of each
        token: from the model's own logits, whatever the temperature or templates make of them. Raises UserError if a
        prompt and max_new_tokens exceed the model's context, or one of them memory.
        """
        prompts = [prompt + self._thought_end for prompt in prompts] if templates else prompts
        rows = [prompt for prompt in prompts for _ in range(n)]
        done: dict[int, Completion] = {}

        @torch.no_grad()
        def work(batch: list[int]) -> None:
            bar.update(len(done) * max_new_tokens - bar.n)
            watcher = [Watcher(self, watch, len(batch))] if watch else []
            filler = [TemplateFiller(self, [templates[i] for i in batch])] if templates else []
            with self.inference():
                ids, mask, cache = prefill(self, [rows[i] for i in batch], max_new_tokens)

                def loop(model: Any, input_ids: torch.Tensor, logits_processor: Any, **_: Any) -> torch.Tensor:
                    processors = [*watcher, *logits_processor]  # the watcher first: it sees the model's own logits
                    how = dict(sample=temperature > 0, processors=processors, progress=bar.update)
                    return fast.decode(self, input_ids, mask, cache, max_new_tokens, self.eos_ids, **how)

                output = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=self._generation_config(max_new_tokens, temperature),
                    logits_processor=LogitsProcessorList(filler),
                    custom_generate=loop,
                )
            watched = watcher[0].probs() if watcher else [[]] * len(batch)
            done.update(zip(batch, map(self._cut, output.tolist(), watched), strict=True))

        with tqdm(total=len(rows) * max_new_tokens, desc=desc, unit="tok", leave=False) as bar:
            in_batches(self, desc, rows, max_new_tokens, work)
        return [[done[i * n + k] for k in range(n)] for i in range(len(prompts))]

    def _generation_config(self, max_new_tokens: int, temperature: float) -> GenerationConfig:
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:  # every setting that bends the distribution is named, or a default could leak in
            sampling = dict(do_sample=True, temperature=temperature, top_p=1.0, top_k=0, repetition_penalty=1.0)
        return GenerationConfig(
            **sampling, max_new_tokens=max_new_tokens, eos_token_id=self.eos_ids, pad_token_id=self.pad_id
        )

    def _cut(self, ids: list[int], watched: Sequence[list[float]] = ()) -> Completion:
        """Cut after the first end token, found by its position: the pad id is often the end id too."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        kept = ids if end is None else ids[: end + 1]
        text = self.decode(kept).strip()
        return Completion(kept, text, finished=end is not None, watched=list(watched[: len(kept)]))

    def choice_probs(self, rows: Sequence[list[int]], choices: Sequence[int], desc: str = "rate") -> torch.Tensor:
        """Probabilities of the K `choices` ids, renormalised among themselves, as the token that follows each row.

        Returns (len(rows), K) in float32, on the CPU. What rows begin with alike is prefilled once. Raises UserError if
        a row exceeds the model's context or memory.
        """
        rows = [row + self._thought_end for row in rows]
        results = torch.empty(len(rows), len(choices))
        wanted = torch.tensor(choices, device=self.device)

        @torch.no_grad()
        def work(batch: list[int]) -> None:
            with self.inference():
                for part, states in last_states(self, [rows[i] for i in batch]):
                    logits = self.model.get_output_embeddings()(states)[:, wanted]  # (B, K)
                    results[[batch[i] for i in part]] = logits.float().softmax(-1).cpu()
            bar.update(len(batch))

        with tqdm(total=len(rows), desc=desc, unit="row", leave=False) as bar:
            in_batches(self, desc, rows, 0, work)
        return results

    # ---- log-probabilities

    def hidden(
        self, ids: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """Last hidden states (B, T, D): everything but the output head.

        ids, position_ids: (B, T). mask: (B, 1, T, cached + T), additive, or None for plain causal attention.
        """
        if mask is None and self.dtype == torch.float32 and self.device.type != "cpu":
            # Without a mask transformers leaves heads that share keys to the kernel, and in fp32 the only one on a GPU
            # that can do it holds all scores in memory.
            mask = fast.additive(fast.visible(torch.ones_like(ids[:1]), 0), self.dtype)
        named = dict(position_ids=position_ids, past_key_values=cache, use_cache=cache is not None)
        decoder = self.model.get_base_model().get_decoder()
        return decoder(input_ids=ids, attention_mask=mask, **named).last_hidden_state

    def logps(
        self, ids: torch.Tensor, segments: torch.Tensor, temperature: float, chunk_bytes: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the completion tokens under the distribution they were sampled from.

        ids, segments: (B, T) as fast.segments_of makes them, padding on either side. Returns (logps, entropy), each
        (N,) float32 in row order, N = (segments > 0).sum(); entropy (nats) carries no gradient. The logits of N tokens
        are computed in chunks and recomputed in the backward pass: (B, T, V) never exists.
        """
        see = fast.segment_mask(segments)
        targets = ids[segments > 0].to(self.device)  # (N,)
        rows, columns = (index.to(self.device) for index in fast.predictors(segments))
        position_ids = fast.segment_positions(segments).to(self.device)
        mask = None if see is None else fast.additive(see.to(self.device), self.dtype)
        chunk_bytes = chunk_bytes or LOGITS_CHUNK_BYTES[self.kind]
        with self.autocast():
            states = self.hidden(ids.to(self.device), mask, position_ids)[rows, columns]  # (N, D)
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
        return 2 * weights / (4 * config.num_hidden_layers * config.num_attention_heads * head)
