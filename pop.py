"""POP: rubric-based self-play on pre-training text, trained with GRPO under QLoRA. One model plays every role.

    document -> problem + reference -> answers -> rubric -> grades -> advantages -> update

`python pop.py` picks a preset by hardware; `python pop.py --help` lists every setting (config.py).
Shape letters as in model.py: B rows, T tokens of a row, N completion tokens of a whole batch, G answers of a group.
"""

import contextlib
import itertools
import math
import random
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

import rubric
from config import Config, parse_args
from data import Answer, Corpus, Document, Episode, Unreachable, UserError, alive
from engine import audit, checkpoint, heldout, memory, parallel, runlog, sources
from engine.checkpoint import State
from engine.fast import segments_of
from engine.packing import Group, MicroBatch, answers_in, fitting
from engine.runlog import Clock
from engine.signals import RESUMABLE, Interrupted, Signals, survive_closed_output
from engine.sources import documents_from
from lab import plan, report
from model import LLM, load

# ------------------------------------------------------------------------------------------ the self-play step


def play(
    llm: LLM, documents: Sequence[Document], cfg: Config, rng: random.Random, clock: Clock | None = None
) -> list[Episode]:
    """One round of self-play: documents in, graded groups of answers out. Dropped episodes say why."""
    clock, documents = clock or Clock(), parallel.share(documents)
    if cfg.episodes:
        episodes = sources.replayed(documents, cfg)
    else:
        with clock("propose"):
            episodes = rubric.propose(llm, documents, cfg, rng)
    if cfg.replay == "problems":
        with clock("solve"):
            rubric.solve(llm, alive(episodes), cfg)
        with clock("rubric"):
            rubric.write_rubrics(llm, alive(episodes), cfg)
        with clock("judge"):
            rubric.judge(llm, alive(episodes), cfg)
            rubric.check_rubrics(llm, alive(episodes), cfg)
    grade(alive(episodes), cfg)
    episodes = parallel.together(episodes)
    keep_widest(episodes, cfg.documents)
    return episodes


def keep_widest(episodes: Sequence[Episode], n: int) -> None:
    """Drop all but the n groups whose rewards differ most; of equals the first are kept."""
    for e in sorted(alive(episodes), key=runlog.group_std, reverse=True)[n:]:
        e.drop = "group/oversampled"


ZERO_SPREAD = 1e-3


def grade(episodes: Sequence[Episode], cfg: Config) -> None:
    """Ratings -> grades, rewards and advantages. Answers without ratings are left out, never scored 0."""
    for e in episodes:
        e.answers = [a for a in e.answers if a.ratings is not None]
        if len(e.answers) < 2:
            e.drop = "judge/unreadable ratings"
            continue
        for i, a in enumerate(e.answers):
            rubric.reward(a, e, cfg)
            if cfg.reward == "random":  # of the answer's place: independent of what it says, the same on resume
                a.reward = random.Random(f"{cfg.seed} {e.problem} {i}").random()
        rewards = [a.reward or 0.0 for a in e.answers]
        for a, advantage in zip(e.answers, group_advantages(rewards, cfg.scale_by_std), strict=True):
            a.advantage = advantage
        if statistics.pstdev(rewards) < ZERO_SPREAD:
            e.drop = "group/zero spread"


def group_advantages(rewards: Sequence[float], scale_by_std: bool = False) -> list[float]:
    """Reward minus the group's mean (Dr. GRPO); over the group's standard deviation only if asked (GRPO)."""
    mean = statistics.fmean(rewards)
    std = statistics.stdev(rewards) + 1e-4 if scale_by_std else 1.0
    return [(r - mean) / std for r in rewards]


# --------------------------------------------------------------------------------------------------- the losses


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
    the same gradient. Also returns sums over the tokens, for the metrics.

    The KL term is the k3 estimate. Its mean over tokens of the policy is KL(policy || ref), but the mean of its
    gradient is that of KL(ref || policy): the tokens drawn depend on the policy too. Multiplied by the ratio, whose
    gradient says so, it is right.
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    sums = {"clipped": (ratio * advantages > clipped * advantages).sum().item()}  # where clipping takes effect
    if ref_logps is not None:
        kl = k3(logps, ref_logps)
        loss = loss + cfg.kl_coef * (ratio * kl if cfg.kl_correction else kl)
        sums["kl"] = kl.sum().item()
    return (loss / total).sum(), sums


def k3(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(policy || ref) at each token that is never negative, (N,)."""
    difference = ref_logps - logps
    return difference.exp() - difference - 1


def normaliser(answer: Answer, answers: Sequence[Answer], cfg: Config) -> int:
    """What each token of an answer is divided by in an update on these answers."""
    if cfg.loss == "grpo":  # a mean over each answer, then over answers: tokens of short ones weigh more
        return len(answers) * len(answer.ids)
    if cfg.loss == "dr_grpo":  # a constant (arXiv 2503.20783)
        return len(answers) * cfg.max_new_tokens
    return sum(len(a.ids) for a in answers)  # a mean over all tokens (DAPO, arXiv 2503.14476)


def dpo_loss(logps: torch.Tensor, ref_logps: torch.Tensor, lengths: Sequence[int], beta: float) -> torch.Tensor:
    """The sum of -log sigmoid(beta x margin) over pairs (arXiv 2305.18290, eq. 7).

    logps, ref_logps: (N,) of the tokens of best, worst, best, worst ..., whose lengths are given. A pair's margin is
    how much further the policy is from the reference on the best answer's log-probability than on the worst's.
    """
    moved = torch.stack([part.sum() for part in (logps - ref_logps).split(list(lengths))]).view(-1, 2)  # (pairs, 2)
    return -logsigmoid(beta * (moved[:, 0] - moved[:, 1])).sum()


# --------------------------------------------------------------------------------------------------- the update


Logps = dict[int, torch.Tensor]  # id of an answer -> (C,), the log-probabilities of its tokens


def groups_of(episodes: Sequence[Episode], cfg: Config) -> list[Group]:
    """The answers that are trained on, with advantages around 0."""
    groups = []
    for e in episodes:
        if chosen := trained_on(e, cfg):
            mean = statistics.fmean(a.advantage for a in chosen)
            groups.append(Group(e.prompt_ids, chosen, [a.advantage - mean for a in chosen]))
    return groups


def trained_on(episode: Episode, cfg: Config) -> list[Answer]:
    """All answers of a group or, for extremes and DPO, the best and worst. For DPO the best is the first, and where
    several are tied it is the pair closest in length."""
    ranked = sorted(episode.answers, key=lambda a: a.reward or 0.0)
    if cfg.loss == "dpo":
        best, worst = ([a for a in ranked if a.reward == end.reward] for end in (ranked[-1], ranked[0]))
        pair = min(itertools.product(best, worst), key=words_apart)
        return list(pair) if words_apart(pair) <= DPO_WORDS_APART else []
    if 0 < 2 * cfg.extremes < len(ranked):
        chosen = [id(a) for a in ranked[: cfg.extremes] + ranked[-cfg.extremes :]]
        return [a for a in episode.answers if id(a) in chosen]
    return episode.answers


DPO_WORDS_APART = 100  # pairs whose lengths differ by more words are left out


def words_apart(pair: tuple[Answer, Answer]) -> int:
    one, other = (len(a.text.split()) for a in pair)
    return abs(one - other)


def batch_logps(llm: LLM, batch: MicroBatch, cfg: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the completion tokens, each (N,), in the order of answers_in(batch)."""
    ids, segments = segments_of([(row.prompt, [a.ids for a in row.answers]) for row in batch], llm.pad_id)
    temperature = 1.0 if cfg.loss == "dpo" else cfg.temperature  # DPO compares models, however answers were sampled
    return llm.logps(ids, segments, temperature)


@torch.no_grad()
def score(llm: LLM, parts: Sequence[MicroBatch], cfg: Config) -> Logps:
    """The log-probabilities of every answer under the model as it is."""
    scores: Logps = {}
    for part in parts:
        answers = answers_in(part)
        logps = batch_logps(llm, part, cfg)[0].split([len(a.ids) for a in answers])
        scores |= {id(a): values for a, values in zip(answers, logps, strict=True)}
    return scores


def gradient(
    llm: LLM, parts: Sequence[MicroBatch], everything: Sequence[Answer], old: Logps, ref: Logps, cfg: Config, bar: Any
) -> dict[str, float]:
    """Accumulate the gradient of the parts of an update on `everything`; returns what they add to the loss and to the
    means of other metrics over all tokens."""
    means: dict[str, float] = defaultdict(float)
    total = sum(len(a.ids) for a in everything)
    for part in parts:
        answers = answers_in(part)
        lengths = torch.tensor([len(a.ids) for a in answers])
        logps, entropy = batch_logps(llm, part, cfg)
        ref_logps = torch.cat([ref[id(a)] for a in answers]) if ref else None
        if cfg.loss == "dpo" and ref_logps is not None:
            loss = dpo_loss(logps, ref_logps, lengths.tolist(), cfg.dpo_beta) / (len(everything) // 2)
            sums = {"clipped": 0.0, "kl": k3(logps.detach(), ref_logps).sum().item()}
        else:
            old_logps = torch.cat([old[id(a)] for a in answers]) if old else logps.detach()  # on-policy: the same
            advantages = [advantage for row in part for advantage in row.advantages]
            weights = torch.tensor([advantages, [normaliser(a, everything, cfg) for a in answers]])
            of_tokens, totals = weights.repeat_interleave(lengths, 1).to(llm.device)  # (N,) each
            loss, sums = grpo_loss(logps, old_logps, ref_logps, of_tokens, totals, cfg)
        loss.backward()
        means["loss"] += loss.item()
        for name, value in {**sums, "entropy": entropy.sum().item()}.items():
            means[name] += value / total
        bar.update(len(answers))
    return means


def update(llm: LLM, state: State, episodes: Sequence[Episode], cfg: Config) -> dict[str, float | None]:
    """cfg.updates_per_batch optimizer steps on the answers of the episodes; metrics are means over their tokens.

    An update whose loss or gradient is not finite is skipped, by the scheduler too: it counts the updates made.
    """
    groups = groups_of(episodes, cfg)
    if not groups:  # DPO may find no pair
        return {}
    everything = [a for g in groups for a in g.answers]
    mine = parallel.share(groups)
    sums: dict[str, float] = defaultdict(float)
    old: Logps = {}
    ref: Logps = {}
    rows = sum(len(g.answers) for g in mine) * cfg.updates_per_batch
    with llm.training(), tqdm(total=rows, desc="update", unit="row", leave=False) as bar:
        if cfg.kl_coef > 0 or cfg.loss == "dpo":
            with llm.adapters_off():
                ref = fitting(llm, state, mine, cfg, lambda parts: score(llm, parts, cfg))
        if cfg.updates_per_batch > 1:
            old = fitting(llm, state, mine, cfg, lambda parts: score(llm, parts, cfg))
        for _ in range(cfg.updates_per_batch):
            means = fitting(llm, state, mine, cfg, lambda parts: gradient(llm, parts, everything, old, ref, cfg, bar))
            means = parallel.summed(means)
            parallel.sum_gradients(trainable(llm))
            for name, value in means.items():
                sums[name] += value / cfg.updates_per_batch
            sums["lr"] = state.optimizer.param_groups[0]["lr"]
            norm = torch.nn.utils.clip_grad_norm_(trainable(llm), cfg.max_grad_norm).item()
            if math.isfinite(norm) and math.isfinite(means["loss"]):
                state.optimizer.step()
                state.scheduler.step()
                state.progress["nonfinite"] = 0
            else:
                sums["skipped_updates"] += 1
                state.progress["nonfinite"] += 1
            state.optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(a.ids) for a in everything)
    counts = {"skipped_updates": 0, "groups_trained": len(groups), "trained_tokens": tokens}
    metrics = {**counts, **sums, "grad_norm": norm}
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------ the run


def trainable(llm: LLM) -> list[torch.nn.Parameter]:
    return [p for p in llm.model.parameters() if p.requires_grad]


def new_state(llm: LLM, cfg: Config) -> State:
    """Everything that training changes, at its beginning."""
    optimizer = torch.optim.AdamW(trainable(llm), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)
    updates = cfg.steps * cfg.updates_per_batch
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: lr_factor(u, cfg.warmup_steps, updates))
    torch.manual_seed(cfg.seed)
    progress = {
        "step": 0,  # the last one finished
        "documents": 0,  # consumed so far, and the id of the last
        "document": None,
        "budgets": {"rollout": cfg.rollout_tokens, "update": cfg.update_tokens},  # halved where memory runs out
        "nonfinite": 0,  # updates skipped in a row
        "low_yield": {},  # role -> steps in a row
    }
    return State(llm, optimizer, scheduler, random.Random(cfg.seed), progress)


def lr_factor(update: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at update 0, 1, ...: a linear rise, then a cosine towards 0; never 0 itself."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup))) / 2


def train(llm: LLM, corpus: Corpus, cfg: Config, run: Path) -> None:
    """The loop: play, update, write down. Files in `run`: see checkpoint.py. Of several processes the first writes.

    Raises Interrupted, Unreachable or Parted when the run can go on later: what was done in unfinished steps is undone
    and the rest is saved.
    """
    state = new_state(llm, cfg)
    first = parallel.is_first()
    checkpoint.resume(run, state, tidy=first)
    progress = state.progress
    if progress["step"] == cfg.steps:
        return
    finished, updates = checkpoint.rng_states(state.rng), state.scheduler.last_epoch  # as of the last finished step
    progress["budgets"]["update"] = memory.rehearse(llm, cfg, progress["budgets"]["update"])
    if first:
        checkpoint.write_config(cfg, run)  # from here on there is a run to resume
        log = runlog.Log(cfg, run, corpus)
    with Signals() as signals:
        try:
            watched = parallel.by_first(lambda: before_training(llm, corpus, cfg, run, state, log, signals))
            source = sources.source(corpus, cfg, watched)
            documents = documents_from(source, progress["documents"], progress["document"], watched)
            while progress["step"] < cfg.steps:
                clock = Clock()
                left = cfg.documents_total - progress["documents"] if cfg.synthesize else cfg.documents_taken
                batch = list(itertools.islice(documents, min(left, cfg.documents_taken)))
                parallel.own_randomness(state.rng, cfg.seed, progress["step"])
                episodes = play(llm, batch, cfg, state.rng, clock)
                with signals.deferred():
                    trained: dict[str, float | None] = {}
                    if alive(episodes) and not cfg.synthesize:
                        with clock("update"):
                            trained = update(llm, state, alive(episodes), cfg)
                    consumed = progress["documents"] + len(batch)
                    progress.update(step=progress["step"] + 1, documents=consumed, document=batch[-1].identity)
                    if first:
                        finish_step(llm, state, episodes, trained, watched, clock, cfg, run, log)
                    finished, updates = checkpoint.rng_states(state.rng), state.scheduler.last_epoch
        except (Interrupted, Unreachable, parallel.Parted):
            if progress["step"] == cfg.steps:  # in the last moments of the last step, which is saved
                return
            checkpoint.set_rng_states(state.rng, finished)
            if first and state.scheduler.last_epoch == updates:  # else a process ended between two updates of this step
                checkpoint.save(run, state)
            raise
        finally:  # while signals are still ours: a closing terminal often sends two
            if first:
                report.refresh(run)


def before_training(
    llm: LLM, corpus: Corpus, cfg: Config, run: Path, state: State, log: runlog.Log, signals: Signals
) -> list[Episode]:
    """The held-out problems, made once; with them the audit of the reward and, as step 0, the base model's figures."""
    watched = heldout.prepare(llm, corpus, cfg, run)
    if cfg.audit:
        audit.audit_before_training(llm, watched, cfg, run)
    if cfg.eval_every and not state.progress["step"] and "best" not in state.progress:
        with signals.deferred():
            log.before(heldout.watch(llm, watched, cfg, run, state.progress))
    return watched


def finish_step(
    llm: LLM,
    state: State,
    episodes: Sequence[Episode],
    trained: dict[str, float | None],
    watched: Sequence[Episode],
    clock: Clock,
    cfg: Config,
    run: Path,
    log: runlog.Log,
) -> None:
    """Measure if it is due, write the step down, save. Raises UserError, after saving, if going on makes no sense."""
    progress, step = state.progress, state.progress["step"]
    if progress["nonfinite"] >= runlog.NONFINITE_LIMIT:
        checkpoint.write_json(run / "nonfinite.json", run, [asdict(e) for e in episodes])
    trouble = runlog.trouble(episodes, cfg, progress)
    measured: dict[str, float | None] = {}
    if heldout.due(step, cfg):
        with clock("heldout"):
            measured = heldout.watch(llm, watched, cfg, run, progress)
    progress["budgets"]["rollout"] = llm.token_budget
    log.step(step, episodes, trained, measured, clock.seconds, progress["budgets"])
    if step % cfg.save_every == 0 or step == cfg.steps or trouble:
        checkpoint.save(run, state)
    if measured and step < cfg.steps:
        report.refresh(run)
    if trouble:
        raise UserError(f"stopped after step {step}, which is saved in {run}: {trouble}")


def main(argv: Sequence[str]) -> int:
    survive_closed_output()
    parallel.start()
    if argv[:1] == ["synthesize"]:
        argv = ["--synthesize", *argv[1:]]
    cfg = parse_args(argv)
    if cfg.dry_run:
        print(plan.plan(cfg))
        return 0
    parallel.check(cfg.documents_taken)
    parallel.by_first(lambda: runlog.check_tracker(cfg))
    corpus = sources.open_corpus(cfg)
    if not cfg.episodes or cfg.audit or cfg.eval_every:
        next(iter(corpus))  # a missing or empty corpus is found before the model is loaded
    if cfg.episodes:
        sources.recording(cfg)
    run = parallel.by_first(lambda: checkpoint.run_folder(cfg))
    trained: dict[str, Any] = {"lora_r": cfg.lora_r, "lora_alpha": 2 * cfg.lora_r, "recompute": cfg.recompute}
    llm = load(cfg.model, token_budget=cfg.rollout_tokens, **cfg.loading, **trained)
    if cfg.replay == "answers":
        sources.check_tokens(llm, cfg)
    memory.check_fits(llm, cfg)
    print(f"{cfg.model} in {cfg.load_in} on {llm.device}; {sources.told(corpus, cfg)}; results in {run}/")
    print(runlog.amount(cfg, len(sources.recording(cfg).episodes) if cfg.episodes else 0))
    try:
        with checkpoint.locked(run) if parallel.is_first() else contextlib.nullcontext():
            train(llm, corpus, cfg, run)
    except (Interrupted, Unreachable, parallel.Parted) as why:
        print(f"\n{why}: the run is saved and resumable with: python pop.py --resume {shlex.quote(str(run))}")
        return RESUMABLE
    print(runlog.where_to_look(cfg, run))
    parallel.stop()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before training began; afterwards the run is saved
        print("\nstopped before training began: nothing is lost")
        sys.exit(130)
