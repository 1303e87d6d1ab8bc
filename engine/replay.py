"""Recorded episodes in the place of a corpus: their problems and rubrics, or their answers and ratings too."""

from collections.abc import Sequence
from dataclasses import replace

from config import Config
from data import HUB_CORPORA, Corpus, Document, Episode, Recording, UserError, recorded
from model import LLM


def replayed(documents: Sequence[Document], cfg: Config) -> list[Episode]:
    """The recorded problems of these documents (the recording's own objects), and their rubrics where these were
    written in the way of `cfg`. If answers are replayed, all that was recorded, for pop.grade to grade anew."""
    found = [recording(cfg).episodes[id(document)] for document in documents]
    if cfg.replay == "answers":
        return [replace(e, answers=[replace(a) for a in e.answers], failures=[], drop=None) for e in found]
    written = cfg.rubric == "written" and cfg.rubric_document and cfg.rubric_answers > 0
    return [Episode(e.document, e.problem, e.reference, rubric=list(e.rubric) if written else []) for e in found]


def check_tokens(llm: LLM, cfg: Config) -> None:
    """Raises UserError unless the recorded answers are tokens of this model, and fit its context."""
    episodes = list(recording(cfg).episodes.values())
    size = llm.model.get_input_embeddings().num_embeddings
    known = all(0 <= i < size for e in episodes for ids in (e.prompt_ids, *(a.ids for a in e.answers)) for i in ids)
    first = episodes[0].answers[0]
    if not known or llm.decode(first.ids).strip() != first.text:
        raise UserError(
            f"--episodes {cfg.episodes} was written with another model's tokenizer: train the model that wrote it, or "
            "take only its problems (--replay problems)"
        )
    llm.check_length(max(len(e.prompt_ids) + len(a.ids) for e in episodes for a in e.answers))


def recording(cfg: Config) -> Recording:
    return recorded(cfg.episodes, cfg.replay)


def source(corpus: Corpus, cfg: Config, watched: Sequence[Episode]) -> "Corpus | Recording":
    """What is trained on. Raises UserError if of recorded episodes all are of documents that are held out here."""
    if not cfg.episodes:
        return corpus
    held_out = {e.document.text for e in watched}
    if all(e.document.text in held_out for e in recording(cfg).episodes.values()):
        raise UserError(
            f"--episodes {cfg.episodes}: all its documents are held out in this run; record with the same --audit, "
            "--eval-every and --eval-documents"
        )
    return recording(cfg)


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
