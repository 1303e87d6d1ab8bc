"""What a run trains on: a corpus, or recorded episodes in its place."""

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from config import Config
from data import HUB_CORPORA, Corpus, Document, Episode, Unreachable, UserError, read_episodes, with_groups
from model import LLM


def read(name: str, answers: bool, flag: str = "--episodes ") -> list[Episode]:
    """The episodes of a file. Raises UserError, naming the flag that it was given by, if it cannot be read."""
    try:
        return read_episodes(Path(name), answers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag}{name} cannot be read: {error}; give a run's episodes.jsonl") from None


class Recording:
    """In place of a Corpus: the documents of recorded episodes, in their order, over and over. `replay` as in Config:
    of those that have a rubric or, for answers, of those whose answers can be trained on.

    Raises UserError if the file cannot be read or has no such episode.
    """

    def __init__(self, name: str, replay: str = "problems") -> None:
        self.name, answers = name, replay == "answers"
        episodes = read(name, answers)
        episodes = with_groups(episodes) if answers else [e for e in episodes if e.rubric]
        if not episodes:
            raise UserError(f"--episodes {name}: no episode there has {'two rated answers' if answers else 'a rubric'}")
        self.episodes = {id(e.document): e for e in episodes}  # not by its text: a document may recur, its problem not

    def __iter__(self) -> Iterator[Document]:
        return itertools.cycle([e.document for e in self.episodes.values()])


recorded = functools.cache(Recording)


def replayed(documents: Sequence[Document], cfg: Config) -> list[Episode]:
    """The recorded problems of these documents (the recording's own objects), and their rubrics where these were
    written in the way of `cfg`. If answers are replayed, all that was recorded, for pop.grade to grade anew."""
    found = [recording(cfg).episodes[id(document)] for document in documents]
    if cfg.replay == "answers":
        return [replace(e, answers=[replace(a) for a in e.answers], failures=[], drop=None) for e in found]
    written = cfg.rubric == "written" and cfg.rubric_document and cfg.rubric_answers > 0
    return [Episode(e.document, e.problem, e.reference, rubric=list(e.rubric) if written else []) for e in found]


def told(corpus: Corpus, cfg: Config) -> str:
    """What the run is made of, for its first line."""
    if not cfg.episodes:
        return f"documents from {corpus.name} {corpus.listing}".strip()
    return f"{'problems and rubrics' if cfg.replay == 'problems' else 'answers and ratings'} from {cfg.episodes}"


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
            f"--episodes {cfg.episodes}: this run sets all its documents aside to measure on; give the --audit, "
            "--eval-every and --eval-documents of the recording, or record more"
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


def without(corpus: Corpus | Recording, episodes: Sequence[Episode]) -> Iterator[Document]:
    """The corpus without the held-out documents, in every epoch; told by their text, as ids of a stream change."""
    held_out = {e.document.text for e in episodes}
    return (document for document in corpus if document.text not in held_out)


PAUSES = (5, 30, 120)  # seconds before a broken stream is opened again


def documents_from(
    corpus: Corpus | Recording, consumed: int, last: str | None = None, held_out: Sequence[Episode] = ()
) -> Iterator[Document]:
    """The corpus after its first `consumed` documents, read again from the start: exact for shuffled streams too.

    Documents of the episodes `held_out` are left out, and not counted.

    A stream whose connection breaks is opened again after each of PAUSES, then Unreachable is raised. Raises
    UserError if the last document passed over is not the one of the identity `last`: the corpus is not what it was.
    """
    failures = 0
    while True:
        try:
            for number, document in enumerate(without(corpus, held_out), start=1):
                if number == consumed and last not in (None, document.identity):
                    changed = f"document {consumed} was {last} and is now {document.identity}"
                    raise UserError(f"the corpus {corpus.name} has changed: {changed}")
                if number > consumed:
                    consumed, last, failures = number, document.identity, 0
                    yield document
        except Unreachable as error:
            if failures == len(PAUSES):
                raise
            tqdm.write(f"{error}; again in {PAUSES[failures]} s")
            time.sleep(PAUSES[failures])
            failures += 1
