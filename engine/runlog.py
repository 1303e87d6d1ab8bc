"""What a run writes down of a step: numbers, episodes, and what a person reads while it goes on."""

import contextlib
import importlib.util
import shlex
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from config import GUARDS, Config
from data import Corpus, Episode, UserError, alive, brief, json_lines
from engine import checkpoint
from engine.stats import mean

TRAINED = ("loss", "kl", "entropy", "clipped", "grad_norm", "lr", "trained_tokens", "skipped_updates")
# Of the policy on held-out problems, means: reward; tokens of an answer; likeness to the references (cosine); and their
# log-probability given the problem alone (nats a token). In the last two neither judge nor guards have a part.
HELDOUT = ("heldout_reward", "heldout_length", "heldout_similarity", "heldout_reference_logp")
SHOW_EVERY = 5  # steps between examples on the console


class Clock:
    """Seconds spent in each phase: `with clock("solve"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


class Log:
    """Writes metrics.jsonl and episodes.jsonl of a run, feeds its tracker and prints its lines."""

    def __init__(self, cfg: Config, run: Path, corpus: Corpus) -> None:
        self.cfg, self.run, self.corpus = cfg, run, corpus
        self.track = tracker(cfg, run)

    def before(self, measured: dict[str, float | None]) -> None:
        """Step 0: the policy on held-out problems before it is trained."""
        append(self.run / "metrics.jsonl", {"step": 0, **measured})
        self.track(0, measured)
        tqdm.write("held-out before training: " + heldout_line(measured))

    def step(
        self,
        step: int,
        episodes: Sequence[Episode],
        trained: dict[str, float | None],
        measured: dict[str, float | None],
        seconds: dict[str, float],
        budgets: dict[str, int],
    ) -> None:
        numbers = metrics(step, episodes, trained, seconds, self.corpus, measured)
        numbers |= {"yields": yields(episodes), "token_budgets": budgets}
        append(self.run / "metrics.jsonl", numbers)
        append(self.run / "episodes.jsonl", *({"step": step, **asdict(e)} for e in episodes))
        self.track(step, numbers)
        tqdm.write(one_line(numbers, self.cfg))
        if step == 1 and trained and self.cfg.loss != "dpo":
            tqdm.write(
                "  (the loss stays near 0: on-policy, advantages cancel within a group. Watch reward, length, kl.)"
            )
        if step % SHOW_EVERY == 0 or step in (1, self.cfg.steps):
            tqdm.write(example(episodes))


def append(path: Path, *records: dict[str, Any], again: str = checkpoint.RESUME) -> None:
    with checkpoint.writing(path, path.parent, again), path.open("a", encoding="utf-8") as file:
        file.write(json_lines(records))


def metrics(
    step: int,
    episodes: Sequence[Episode],
    trained: dict[str, float | None],
    seconds: dict[str, float],
    corpus: Corpus,
    measured: dict[str, float | None],
) -> dict[str, Any]:
    """One line of metrics.jsonl. Rewards are over graded answers; a value that does not exist is null.

    reward_spread, grade_spread: the standard deviation within a group, mean over groups, with the guards and without.
    Where the first is much larger, the guards decide what is learned.
    """
    graded = [e for e in episodes if e.answers and e.answers[0].reward is not None]
    answers = [a for e in graded for a in e.answers]
    rewards = [a.reward or 0.0 for a in answers]
    zero = sum(e.drop == "group/zero spread" for e in graded)
    sampled = [a for e in episodes for a in e.answers]
    return {
        "step": step,
        "reward_mean": mean(rewards),
        "reward_std": statistics.pstdev(rewards) if rewards else None,
        "reward_spread": mean([group_std(e) for e in graded]),
        "grade_mean": mean([a.grade or 0.0 for a in answers]),
        "grade_spread": mean([group_std(e, "grade") for e in graded]),
        "zero_spread_share": zero / len(graded) if graded else None,
        "groups_trained": trained.get("groups_trained", 0),
        "drops": Counter(e.drop for e in episodes if e.drop),
        "rejected": Counter(f"{f['role']}/{f['reason']}" for e in episodes for f in e.failures),
        "documents_skipped": corpus.skipped,
        "completion_length": mean([len(a.ids) for a in sampled]),
        "truncated_share": mean([not a.finished for a in sampled]),
        "criteria": mean([len(e.rubric) for e in graded]),
        "guards": {name: sum(name in a.guards for a in answers) for name in GUARDS},
        **{name: measured.get(name) for name in HELDOUT},
        **{name: trained.get(name) for name in TRAINED},
        "solve_tokens_per_second": sum(len(a.ids) for a in sampled) / seconds["solve"]
        if sampled and "solve" in seconds
        else None,
        "seconds": dict(seconds),
    }


def group_std(episode: Episode, of: str = "reward") -> float:
    return statistics.pstdev([getattr(a, of) or 0.0 for a in episode.answers])


# ------------------------------------------------------------------------------------------ what stops a run

NONFINITE_LIMIT = 3  # updates in a row
MIN_YIELD = 0.1  # share of its work that a role must get through
YIELD_STEPS = 3  # steps in a row


def yields(episodes: Sequence[Episode]) -> dict[str, float]:
    """Share of the episodes that got past each role, of those that came to it; no entry where none came."""
    left, result = list(episodes), {}
    for role in ("proposer", "rubric", "judge"):
        passed = [e for e in left if not (e.drop or "").startswith(role + "/")]
        if left:
            result[role] = len(passed) / len(left)
        left = passed
    return result


def trouble(episodes: Sequence[Episode], cfg: Config, progress: dict[str, Any]) -> str | None:
    """Count what may stop a run in `progress`; the reason to stop after this step, or None.

    A counter that stops the run starts again at 0: resumed, the run is given as long once more.
    """
    low = progress["low_yield"]
    for role, share in yields(episodes).items():
        low[role] = low.get(role, 0) + 1 if share < MIN_YIELD else 0
        if low[role] >= YIELD_STEPS:
            low[role] = 0
            raw = [f"{f['reason']}: {f['raw'][:300]!r}" for e in episodes for f in e.failures if f["role"] == role]
            return (
                f"the {role} failed on more than {1 - MIN_YIELD:.0%} of its work for {YIELD_STEPS} steps: a larger "
                "model may help. Three of its outputs:\n  " + "\n  ".join(raw[-3:])
            )
    if (count := progress["nonfinite"]) >= NONFINITE_LIMIT:
        progress["nonfinite"] = 0
        return (
            f"loss or gradient was not finite in {count} updates in a row, all of them skipped: "
            "a lower --lr may help (in a new run). The last episodes are in nonfinite.json of the run"
        )
    return None


# ------------------------------------------------------------------------------------------------- trackers


@contextlib.contextmanager
def refusing(tracker: str) -> Iterator[None]:
    """Turns whatever goes wrong inside, each library having errors of its own, into a UserError."""
    try:
        yield
    except Exception as error:
        remedy = "run `wandb login`, set WANDB_MODE=offline, or " if tracker == "wandb" else ""
        raise UserError(f"--tracker {tracker}: {brief(error)}; {remedy}choose another") from None


def check_tracker(cfg: Config) -> None:
    """Raises UserError if the tracker's package cannot be used, or wants a login that is not there or not valid."""
    if cfg.tracker != "none" and importlib.util.find_spec(cfg.tracker) is None:
        raise UserError(f"--tracker {cfg.tracker}: not installed; pip install {cfg.tracker}")
    with refusing(cfg.tracker):
        if cfg.tracker == "tensorboard":
            importlib.import_module("torch.utils.tensorboard")
        elif cfg.tracker != "none":
            service = importlib.import_module(cfg.tracker)
            if cfg.tracker == "wandb":  # trackio writes to this machine
                service.login(verify=True)  # at a terminal it asks for the key; where wandb is offline it does nothing


def tracker(cfg: Config, run: Path) -> Callable[[int, dict[str, Any]], None]:
    """(step, metrics) -> nothing: sends the numbers among the metrics to cfg.tracker, nested ones as outer/inner."""
    if cfg.tracker == "none":
        return lambda step, metrics: None
    if cfg.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with refusing(cfg.tracker):
            writer = SummaryWriter(str(run / "tensorboard"))

        def write(step: int, metrics: dict[str, Any]) -> None:
            for name, value in flat(metrics):
                writer.add_scalar(name, value, step)
            writer.flush()

        return write
    service = importlib.import_module(cfg.tracker)  # wandb or trackio, which has the same functions
    with refusing(cfg.tracker):
        service.init(project="pop", name=run.name, config=asdict(cfg))
    return lambda step, metrics: service.log(dict(flat(metrics)), step=step)


def flat(metrics: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, float]]:
    """The numbers among the metrics.

    >>> dict(flat({"loss": 1.5, "kl": None, "seconds": {"solve": 2}}))
    {'loss': 1.5, 'seconds/solve': 2}
    """
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{outer}{name}/")
        elif isinstance(value, int | float):
            yield outer + name, value


# ------------------------------------------------------------------------------------------------- the console


def one_line(m: dict[str, Any], cfg: Config) -> str:
    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    seconds = " ".join(f"{phase} {s:.0f}s" for phase, s in m["seconds"].items())
    if to_do := cfg.steps - m["step"]:
        seconds += f", {tqdm.format_interval(to_do * sum(m['seconds'].values()))} left"  # if all take as long as this
    drops = ", ".join(f"{count}x {drop}" for drop, count in m["drops"].items())
    return (
        f"step {m['step']}/{cfg.steps}  reward {show(m['reward_mean'], '.3f')} ±{show(m['reward_spread'], '.3f')}  "
        f"groups {m['groups_trained']}/{cfg.documents}  length {show(m['completion_length'], '.0f')}  "
        f"truncated {show(m['truncated_share'], '.0%')}  entropy {show(m['entropy'], '.2f')}  "
        f"kl {show(m['kl'], '.1e')}  grad {show(m['grad_norm'], '.2g')}  | {seconds}"
        + (f"  | held-out: {heldout_line(m)}" if m["heldout_reward"] is not None else "")
        + (f"  | dropped: {drops}" if drops else "")
    )


def heldout_line(measured: Mapping[str, Any]) -> str:
    names = (name for name in HELDOUT if measured[name] is not None)
    return "  ".join(f"{name.removeprefix('heldout_')} {measured[name]:.3g}" for name in names)


def example(episodes: Sequence[Episode]) -> str:
    """One group as a person would want to read it: document, problem, rubric, best and worst answer."""
    episode = next(iter(sorted(alive(episodes), key=group_std, reverse=True)), None)
    if episode is None:
        return "  (no group to show)"

    def short(text: str, limit: int = 300) -> str:
        text = " ".join(text.split())
        return text if len(text) <= limit else text[:limit] + " ..."

    lines = [f"document   {episode.document.id}: {short(episode.document.text)}"]
    lines += [f"problem    {short(episode.problem)}", f"reference  {short(episode.reference)}"]
    for c in episode.rubric:
        lines.append(f"criterion  [{c.weight:g}] {c.name}: {short(c.description)} (gold: {short(c.gold)})")
    ordered = sorted(episode.answers, key=lambda a: a.reward or 0.0)
    for label, a in (("best", ordered[-1]), ("worst", ordered[0])):
        ratings = " ".join(f"{r:.2f}" for r in a.ratings or [])
        lines.append(f"{label:10} reward {a.reward:.3f}, ratings {ratings}: {short(a.text)}")
    return "\n".join("    " + line for line in lines)


def amount(cfg: Config, recorded: int) -> str:
    """What the run is about to do, in one line. recorded: how many groups of answers its --episodes holds."""
    steps, taken, answers = cfg.steps, cfg.documents_taken, cfg.group_size
    if cfg.synthesize:
        return f"{cfg.documents_total} documents x {answers} answers in {steps} steps, and nothing is trained"
    if cfg.replay == "answers":
        return f"{steps} steps x {taken} recorded groups, of {recorded} in the file"
    kept = f", of which each step trains on {cfg.documents} groups" if taken > cfg.documents else ""
    return f"{steps} steps x {taken} documents x {answers} answers = {steps * taken * answers:,} answers{kept}"


def where_to_look(cfg: Config, run: Path) -> str:
    """What a finished run prints last."""
    if not cfg.synthesize:
        return f"done: adapter in {run}/adapter, what was said in {run}/episodes.jsonl, numbers in {run}/metrics.jsonl"
    same = shlex.join(["--preset", cfg.preset, "--task", cfg.task, "--model", cfg.model])
    return (
        f"done: {run}/episodes.jsonl; to train on it, with the flags of this run:\n  python pop.py {same} "
        f"--episodes {shlex.quote(str(run))}/episodes.jsonl --replay answers --loss dpo"
    )
