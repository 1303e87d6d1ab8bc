"""TRL's GRPOTrainer on the same work as one step of pop.py, for bench.py: solve (replayed answers), judge, update.

The step is TRL's own code, phase by phase on a clock. Only the sampled tokens are given: generation does all its work,
sampling included, and then has no choice. What the trainer trained on is compared with what was recorded.
"""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from transformers import GenerationConfig, LogitsProcessorList
from trl import GRPOConfig, GRPOTrainer

import rubric
from config import PRESETS, Config
from engine.fast import batches, positions
from engine.constrained import TemplateFiller, room
from lab.bench import Group, Meter, Replay, Work, groups_of
from model import LLM, resolve


class Reader(LLM):
    """LLM's encoding of texts, and nothing of what LLM does to a model: the faster layers are not TRL's."""

    def __post_init__(self) -> None:
        base: Any = self.model.get_base_model()
        eos = base.generation_config.eos_token_id
        self.eos_ids = [eos] if isinstance(eos, int) else list(eos)
        self.pad_id = self.tokenizer.pad_token_id


class Judge:
    """A reward function as TRL takes them: rubric grades by the same model with its adapters off."""

    __name__ = "judge"  # TRL names its metrics by it

    def __init__(self, groups: Sequence[Group], mode: str, token_budget: int) -> None:
        self.groups, self.mode, self.token_budget = groups, mode, token_budget
        self.llm: Reader  # set as soon as the trainer has wrapped the model

    @torch.no_grad()
    def __call__(self, completions: list[Any], group: list[int], **_: Any) -> list[float | None]:
        pairs = [(self.groups[g], message[0]["content"]) for g, message in zip(group, completions, strict=True)]
        model = self.llm.model
        model.eval()  # in training mode with checkpointing, some versions of generate() drop the cache
        try:
            with model.disable_adapter():
                ratings = self.by_logits(pairs) if self.mode == "logits" else self.by_text(pairs)
        finally:
            model.train()
        return [None if r is None else rubric.grade(r, g.rubric) for r, (g, _) in zip(ratings, pairs, strict=True)]

    def batches(self, lengths: list[int]) -> list[list[int]]:
        return batches([[i] for i in range(len(lengths))], lengths, self.token_budget)

    def by_logits(self, pairs: list[tuple[Group, str]]) -> list[list[float] | None]:
        """Expected ratings, as rubric.judge_by_logits: one row for each answer and criterion."""
        llm = self.llm
        rows = [llm.encode("", rubric.rate_prompt(g.problem, c, text)) for g, text in pairs for c in g.rubric]
        _, digits = llm.choice_ids("", "012")
        expected = torch.empty(len(rows))
        for indices in self.batches([len(row) for row in rows]):
            ids, mask = llm.pad([rows[i] for i in indices], side="left")
            at = positions(mask)
            output = llm.model(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False, logits_to_keep=1)
            probs = output.logits[:, -1, digits].float().softmax(-1).cpu()  # (B, 3)
            expected[indices] = probs @ torch.tensor([0.0, 1.0, 2.0])
        each = iter(expected.tolist())
        return [[next(each) for _ in g.rubric] for g, _ in pairs]

    def by_text(self, pairs: list[tuple[Group, str]]) -> list[list[float] | None]:
        """Ratings written into a form, as the greedy pass of rubric.judge_by_text; None if they cannot be read."""
        llm = self.llm
        rows = [llm.encode("", rubric.judge_prompt(g.problem, g.rubric, text)) for g, text in pairs]
        tokens = Config(**PRESETS["demo"]).rating_tokens
        filled = [rubric.judge_form(len(g.rubric), tokens) for g, _ in pairs]
        new = max(room(llm, form) for form in filled)
        config = GenerationConfig(
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=new,
            eos_token_id=llm.eos_ids,
            pad_token_id=llm.pad_id,
        )
        ratings: list[list[float] | None] = [None] * len(pairs)
        for indices in self.batches([len(row) + new for row in rows]):
            ids, mask = llm.pad([rows[i] for i in indices], side="left")
            forms = TemplateFiller(llm, [filled[i] for i in indices])
            output = llm.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([forms]),
            )
            for i, reply in zip(indices, output[:, ids.shape[1] :].tolist(), strict=True):
                end = next((at + 1 for at, token in enumerate(reply) if token in llm.eos_ids), len(reply))
                ratings[i] = rubric.written_ratings(llm.decode(reply[:end]), len(pairs[i][0].rubric))
        return ratings


class _Ready(Exception):
    """Everything is set up and no step is made yet."""


class ReplayTrainer(GRPOTrainer):
    """TRL's trainer with a clock on its phases and recorded answers; what it computes is left alone."""

    answers: list[list[int]]  # with prompt_rows, one for each row of the generation batch
    prompt_rows: list[list[int]]
    meter: Meter
    loop: dict[str, Any] | None = None

    def _run_epoch(self, **loop: Any) -> None:  # type: ignore[override]
        """Stops train() where its loop would begin, with all that the loop is given."""
        self.loop = loop
        raise _Ready

    def one_step(self) -> None:
        """An epoch of train()'s loop. The dataset is one generation batch, so it is exactly one optimizer step."""
        if self.loop is None:
            with contextlib.suppress(_Ready):
                self.train()
        assert self.loop is not None
        self.meter.clear()
        self.trained: list[list[int]] = []
        self.total_loss = 0.0
        with self.meter("total"), self.meter("update"):
            super()._run_epoch(**self.loop)
        self.loop["epoch"] += 1

    def _generate(self, prompts: list[Any]) -> Any:
        with self.meter("rollout"):
            return super()._generate(prompts)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Generation in eval mode (TRL leaves the model in training mode), with the recorded answers."""
        assert [list(ids) for ids in prompt_ids] == self.prompt_rows, "not the solver's prompts, or in another order"
        model: Any = self.accelerator.unwrap_model(self.model_wrapped)
        generate, replay = model.generate, LogitsProcessorList([Replay(self.answers, self.eos_token_ids[0])])
        model.generate = lambda **inputs: generate(**inputs, logits_processor=replay)
        model.eval()
        try:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            del model.generate
            model.train()

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        with self.meter("judge"):
            self.rewards = super()._calculate_rewards(*args)  # (rows, 1)
        return self.rewards

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        masks = inputs["completion_mask"].bool()
        self.trained += [ids[mask].tolist() for ids, mask in zip(inputs["completion_ids"], masks, strict=True)]
        self.total_loss += loss.item()
        return loss


def load_base(source: str, load_in: str) -> Any:
    """The frozen weights as model.load has them on a CPU."""
    kind: dict[str, Any] = dict(
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, **kind) if load_in == "4bit" else None
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=nf4
    )


# pop.py's update in TRL's words. "dapo" is the sum over the tokens over the completion tokens of the whole update.
SETTINGS: dict[str, Any] = {
    **dict(loss_type="dapo", scale_rewards="none", epsilon=0.2, epsilon_high=0.28, num_iterations=1),
    **dict(lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0),
    **dict(top_p=1.0, top_k=0, shuffle_dataset=False, max_steps=10**9),
    **dict(report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False),
}
ADAPTER: dict[str, Any] = dict(
    r=32, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
)


ON_CPU: dict[str, Any] = dict(use_cpu=True, bf16=False)


class Theirs:
    """One GRPO step at a time by TRL, on recorded answers. Building it is not part of any step's time.

    base, tokenizer: trained instead of work.model. settings: where GRPOConfig is to compute, and in what.
    """

    def __init__(
        self, work: Work, base: Any = None, tokenizer: Any = None, settings: Mapping[str, Any] = ON_CPU
    ) -> None:
        if settings["use_cpu"]:
            # As on a GPU, TRL is to compute logits of completions only; on a CPU it would of prompts as well.
            trl.trainer.utils._use_triton = lambda device: True  # decides which positions, not which kernel
        demo = Config(**PRESETS["demo"])
        if base is None:
            source = resolve(work.model)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="left")
            base = load_base(source, work.load_in)
        eos = base.generation_config.eos_token_id
        groups = groups_of(work, tokenizer, eos if isinstance(eos, int) else eos[0])
        group_size, max_new_tokens, micro_rows = work.group_size, work.new_tokens, work.micro_rows
        rows = len(groups) * group_size
        if rows % micro_rows or any(len(g.answers) != group_size for g in groups):
            raise ValueError(f"{rows} rows do not make micro-batches of {micro_rows}, or a group is not whole")
        self.folder = tempfile.TemporaryDirectory()  # nothing is saved, but the trainer makes one
        self.judge = Judge(groups, work.judge, demo.rollout_tokens)
        texts = [g.problem for g in groups]
        self.trainer = ReplayTrainer(
            model=base,
            reward_funcs=self.judge,
            args=GRPOConfig(
                output_dir=self.folder.name,
                per_device_train_batch_size=micro_rows,
                gradient_accumulation_steps=rows // micro_rows,
                num_generations=group_size,
                max_completion_length=max_new_tokens,
                temperature=work.temperature,
                learning_rate=demo.lr,
                beta=work.kl_coef,
                gradient_checkpointing=True,
                **SETTINGS,
                **settings,
            ),
            train_dataset=Dataset.from_dict(
                {"prompt": [[{"role": "user", "content": text}] for text in texts], "group": list(range(len(groups)))}
            ),
            processing_class=tokenizer,
            peft_config=LoraConfig(**ADAPTER),
        )
        self.trainer.meter = Meter()
        self.judge.llm = self._prepared()
        self.trainer.answers = [ids for g in groups for ids in g.answers]
        self.trainer.prompt_rows = [self.judge.llm.encode("", text) for text in texts for _ in range(group_size)]
        self._check_answers(max_new_tokens)

    def _prepared(self) -> Reader:
        """The trainer's model set to the same numbers as pop.py's, and its reader.

        TRL rounds the adapters of a 4-bit model to bf16; pop.py's are fp32, so these are too where all else is. In bf16
        they are left as TRL has them: it generates outside of autocast, where fp32 adapters would make it slower. And
        in eval mode, as in judging, bitsandbytes would repack NF4 weights on some CPUs, to a product that passes no
        gradient on.
        """
        model: Any = self.trainer.model
        for parameter in model.parameters():
            if parameter.requires_grad and not self.trainer.args.bf16:
                parameter.data = parameter.data.float()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        reader = Reader(model, self.trainer.processing_class)
        assert set(self.trainer.eos_token_ids) == set(reader.eos_ids)
        return reader

    def _check_answers(self, limit: int) -> None:
        """Generation ends a row at its first end token or at the limit, and nowhere else."""
        for ids in self.trainer.answers:
            ends = [i for i, token in enumerate(ids) if token in self.judge.llm.eos_ids]
            if ends[:1] != [len(ids) - 1] and (ends or len(ids) != limit):
                raise ValueError(f"a recorded answer of {len(ids)} tokens cannot be replayed with a limit of {limit}")

    def step(self) -> dict[str, Any]:
        """One optimizer step on all groups. Rewards are in the order of groups and answers."""
        trainer = self.trainer
        trainer.one_step()
        assert sorted(trainer.trained) == sorted(trainer.answers), "TRL trained on other tokens than those recorded"
        seconds = dict(trainer.meter.seconds)
        seconds["update"] -= seconds["rollout"] + seconds["judge"]
        return {
            "seconds": seconds,
            "peak": dict(trainer.meter.peak),
            "tokens": {"rollout": sum(map(len, trainer.answers)), "update": sum(map(len, trainer.trained))},
            "loss": trainer.total_loss,
            "rewards": trainer.rewards[:, 0].tolist(),
        }
