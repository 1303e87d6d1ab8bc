"""POP: rubric-based self-play on pre-training text, trained with GRPO under QLoRA. One model plays every role.

    document -> problem + reference -> answers -> rubric -> grades -> advantages -> update

`python pop.py` picks a preset by hardware; `python pop.py --help` lists every field of Config.
Shape letters as in model.py: B rows, T tokens of a row, N completion tokens of a whole batch, G answers of a group.
"""

import contextlib
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

import rubric
from config import Config, parse_args
from data import HUB_CORPORA, Corpus, Document, Unreachable, UserError, documents_from
from engine import audit, checkpoint, heldout, memory, replay, runlog, signals
from engine.checkpoint import State
from engine.fast import batches, segments_of, share_prompts
from engine.memory import within_memory
from engine.signals import Interrupted, Signals
from lab import plan, report
from model import LLM, MASKED, load
from rubric import Answer, Episode, Phase, alive, plainly

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------- configuration


# ------------------------------------------------------------------------------------------ the self-play step


def play(
    llm: LLM, documents: Sequence[Document], cfg: Config, rng: random.Random, phase: Phase = plainly
) -> list[Episode]:
    """One round of self-play: documents in, graded groups of answers out. Dropped episodes say why."""
    if cfg.episodes:
        episodes = replay.replayed(documents, cfg)
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
            rubric.reward(a, e, cfg)
            if cfg.reward == "random":  # of the answer's place: independent of what it says, the same on resume
                a.reward = random.Random(f"{cfg.seed} {e.problem} {i}").random()
        rewards = [a.reward or 0.0 for a in e.answers]
        for a, advantage in zip(e.answers, group_advantages(rewards, cfg.scale_by_std), strict=True):
            a.advantage = advantage
        if statistics.pstdev(rewards) < ZERO_SPREAD:
            e.drop = "group/zero spread"


ZERO_SPREAD = 1e-3
SHOW_EVERY = 5  # steps between examples on the console


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
        return list(pair) if words_apart(pair) <= DPO_WORDS_APART else []
    if 0 < 2 * cfg.extremes < len(ranked):
        chosen = [id(a) for a in ranked[: cfg.extremes] + ranked[-cfg.extremes :]]
        return [a for a in episode.answers if id(a) in chosen]
    return episode.answers


DPO_WORDS_APART = 100  # pairs whose lengths differ by more words are left out


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
    optimizer = torch.optim.AdamW(trainable(llm), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)
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
        return memory.rollout(llm, name, work, rng, progress["budgets"], episodes)

    def phase(name: str, work: Callable[[], T], episodes: Sequence[Episode] = ()) -> T:
        with timed(name):
            return safely(name, work, episodes)

    track = runlog.tracker(cfg, run)
    with Signals() as signals:
        try:
            memory.try_longest(llm, cfg, progress["budgets"])
            watched = heldout.prepare(llm, corpus, cfg, run, safely)
            if cfg.audit:
                audit.audit_before_training(llm, watched, cfg, run, safely)
            source = replay.source(corpus, cfg, watched)
            if cfg.eval_every and not progress["step"] and "heldout" not in progress:
                with signals.held():
                    before = {"step": 0, **heldout.watch(llm, watched, cfg, run, 0, progress, safely)}
                    runlog.append(run / "metrics.jsonl", before)
                track(0, before)
                tqdm.write("held-out before training: " + heldout.one_line(before))
            documents = documents_from(source, progress["documents"], progress["document"], watched)
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
                    if progress["nonfinite"] >= runlog.NONFINITE_LIMIT:
                        checkpoint.write_json(run / "nonfinite.json", run, [asdict(e) for e in episodes])
                    trouble = runlog.trouble(episodes, cfg, progress)
                    evaluated: dict[str, float | None] = {}
                    if heldout.due(step, cfg):
                        with timed("heldout"):
                            evaluated = heldout.watch(llm, watched, cfg, run, step, progress, safely)
                    stalled = heldout.stalled(progress, cfg)
                    metrics = runlog.metrics(step, episodes, trained, seconds, corpus, evaluated)
                    metrics |= {"yields": runlog.yields(episodes), "token_budgets": progress["budgets"]}
                    runlog.append(run / "metrics.jsonl", metrics)
                    track(step, metrics)
                    for e in episodes:
                        runlog.append(run / "episodes.jsonl", {"step": step, **asdict(e)})
                    finished = checkpoint.rng_states(rng)
                    if step % cfg.save_every == 0 or step == cfg.steps or trouble or stalled:
                        checkpoint.save(run, state)
                    tqdm.write(runlog.one_line(metrics, cfg))
                    if step == 1 and trained and cfg.loss != "dpo":
                        tqdm.write(
                            "  (the loss stays near 0: on-policy, advantages cancel within a group. "
                            "Watch reward, length, kl.)"
                        )
                    if step % SHOW_EVERY == 0 or step in (1, cfg.steps):
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
            checkpoint.save(run, state)
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
        replay.recording(cfg)
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
        replay.check_tokens(llm, cfg)
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
        return signals.RESUMABLE
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
        return f"{steps} steps x {taken} recorded groups, of {len(replay.recording(cfg).episodes)} in the file"
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
