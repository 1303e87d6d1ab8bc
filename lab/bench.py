"""How fast and how large is a training step? Beside TRL's, on the same work.

    pip install trl
    python -m lab.bench           # a step of ours and of TRL's GRPOTrainer in alternation: table and JSON

Both sides solve, judge and update on the problems, rubrics and answers of docs/bench.jsonl. TRL's step is its own code,
phase by phase on a clock, but for the sampled tokens, which are given to both (see steps.py); what its trainer trained
on is compared with what was recorded.
"""

import contextlib
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import tyro
from datasets import Dataset
from peft import LoraConfig
from transformers import LogitsProcessorList

import rubric
from data import UserError
from engine import loading
from engine.fast import batches, padded, positions
from lab.steps import Meter, Ours, Replay, Work, alternate, figures, recorded
from model import LLM

try:
    import trl.trainer.utils
    from trl import GRPOConfig, GRPOTrainer
except ImportError:
    GRPOConfig, GRPOTrainer = None, object  # type: ignore[assignment, misc]

# pop.py's update in TRL's words. "dapo" is the sum over the tokens over the completion tokens of the whole update.
SETTINGS: dict[str, Any] = {
    **dict(loss_type="dapo", scale_rewards="none", epsilon=0.2, epsilon_high=0.28, num_iterations=1),
    **dict(lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0),
    **dict(top_p=1.0, top_k=0, shuffle_dataset=False, max_steps=10**9, gradient_checkpointing=True),
    **dict(report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False),
}


class Reader(LLM):
    """LLM's encoding of texts, and nothing of what LLM does to a model: the faster layers are not TRL's."""

    def __post_init__(self) -> None:
        self.eos_ids = loading.end_tokens(self.model.get_base_model(), self.tokenizer)
        self.pad_id = self.tokenizer.pad_token_id


class _Ready(Exception):
    """Everything is set up and no step is made yet."""


class ReplayTrainer(GRPOTrainer):
    """TRL's trainer with a clock on its phases and recorded answers; what it computes is left alone."""

    answers: list[list[int]]  # with prompt_rows, one for each row of the generation batch
    prompt_rows: list[list[int]]
    meter: Meter
    loop: dict[str, Any] | None = None

    def _run_epoch(self, **loop: Any) -> None:
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
        with self.meter("update"):
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


class Theirs:
    """One GRPO step at a time by TRL, on recorded answers. Building it is not part of any step's time.

    loaded: what loading.pretrained returns, in place of the model that `work` names.
    """

    def __init__(self, work: Work, loaded: tuple[Any, Any, torch.dtype] | None = None) -> None:
        base, tokenizer, dtype = loaded or loading.pretrained(work.model, "4bit")
        tokenizer.padding_side = "left"
        on_cpu, bf16 = base.device.type == "cpu", dtype == torch.bfloat16
        if on_cpu:
            # As on a GPU, TRL is to compute logits of completions only; on a CPU it would of prompts as well.
            trl.trainer.utils._use_triton = lambda device: True  # decides which positions, not which kernel
        torch.backends.cuda.enable_cudnn_sdp(False)  # as LLM does, or attention would be slow at every new length
        cfg = work.config()
        self.episodes = episodes = recorded(work, tokenizer, loading.end_tokens(base, tokenizer)[0])
        prompts = [[{"role": "user", "content": e.problem}] for e in episodes]
        self.token_budget = cfg.rollout_tokens
        self.folder = tempfile.TemporaryDirectory()  # nothing is saved, but the trainer makes one
        self.trainer = trainer = ReplayTrainer(
            model=base,
            reward_funcs=self.judge,
            args=GRPOConfig(
                output_dir=self.folder.name,
                per_device_train_batch_size=work.micro_rows,
                gradient_accumulation_steps=work.rows // work.micro_rows,
                num_generations=work.group_size,
                max_completion_length=work.new_tokens,
                temperature=cfg.temperature,
                learning_rate=cfg.lr,
                beta=cfg.kl_coef,
                use_cpu=on_cpu,
                bf16=bf16,
                **SETTINGS,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts, "group": list(range(len(episodes)))}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        self.reader = reader = self.prepared(bf16)
        trainer.meter = Meter()
        trainer.answers = [a.ids for e in episodes for a in e.answers]
        trainer.prompt_rows = [reader.encode(e.problem) for e in episodes for _ in e.answers]

    def prepared(self, bf16: bool) -> Reader:
        """The trainer's model set to the same numbers as pop.py's, and its reader.

        TRL rounds the adapters of a 4-bit model to bf16; pop.py's are fp32, so these are too where all else is. In bf16
        they are left as TRL has them: it generates outside of autocast, where fp32 adapters would make it slower. And
        in eval mode, as in judging, bitsandbytes would repack NF4 weights on some CPUs, to a product that passes no
        gradient on.
        """
        model: Any = self.trainer.model
        for parameter in model.parameters():
            if parameter.requires_grad and not bf16:
                parameter.data = parameter.data.float()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        reader = Reader(model, self.trainer.processing_class)
        assert set(self.trainer.eos_token_ids) == set(reader.eos_ids)
        return reader

    @torch.no_grad()
    def judge(self, completions: list[Any], group: list[int], **rest: Any) -> list[float]:
        """A reward function as TRL takes them: rubric grades by the same model with its adapters off.

        From expected ratings, as rubric.judge_by_logits: one row for each answer and criterion.
        """
        llm, pairs = self.reader, [(self.episodes[g], c[0]["content"]) for g, c in zip(group, completions, strict=True)]
        rows = [llm.encode(rubric.rate_prompt(e.problem, c, text)) for e, text in pairs for c in e.rubric]
        digits = llm.choice_ids("012")
        expected = torch.empty(len(rows))
        llm.model.eval()
        with llm.model.disable_adapter():
            for indices in batches([[i] for i in range(len(rows))], [len(row) for row in rows], self.token_budget):
                ids = padded([rows[i] for i in indices], -1, "left").to(llm.device)
                ids, mask = ids.clamp(min=0), (ids >= 0).long()
                named: dict[str, Any] = dict(position_ids=positions(mask), use_cache=False, logits_to_keep=1)
                logits = llm.model(input_ids=ids, attention_mask=mask, **named).logits
                probs = logits[:, -1, digits].float().softmax(-1).cpu()  # (B, 3)
                expected[indices] = probs @ torch.tensor([0.0, 1.0, 2.0])
        llm.model.train()
        each = iter(expected.tolist())
        return [rubric.grade([next(each) for _ in e.rubric], e.rubric) for e, _ in pairs]

    def step(self) -> dict[str, Any]:
        """One optimizer step on all groups."""
        trainer = self.trainer
        trainer.one_step()
        assert sorted(trainer.trained) == sorted(trainer.answers), "TRL trained on other tokens than those recorded"
        return {
            **trainer.meter.result(),
            "tokens": {"rollout": sum(map(len, trainer.answers)), "update": sum(map(len, trainer.trained))},
            "reward": trainer.rewards.mean().item(),
            "loss": trainer.total_loss,
        }


def main(work: Work, rounds: int = 5, output: Path = Path("runs/bench.json")) -> None:
    if GRPOConfig is None:
        sys.exit("error: TRL is not installed: pip install 'trl>=1.16'")
    if work.rows % work.micro_rows:
        sys.exit(f"error: --micro-rows {work.micro_rows}: must divide the {work.rows} answers of a step")
    try:
        results = alternate({"ours": (Ours, work), "trl": (Theirs, work)}, rounds)
        found = figures(results)
    except UserError as error:
        sys.exit(f"error: {error}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"work": asdict(work), "figures": found, "rounds": results}, indent=1) + "\n")
    print(f"\n{work}\n\n| figure | value |\n|---|---|")
    print(*(f"| {name} | {value:,.4g} |" for name, value in found.items()), f"\nwritten to {output}", sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
