"""Where documents come from: the built-in samples, local files, or a data set of the hub, streamed.

Documents are untrusted text. Here they are cut, counted and otherwise passed on as they are.
"""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
from tqdm.auto import tqdm

if TYPE_CHECKING:
    import datasets

SAMPLES = Path(__file__).resolve().parent / "samples"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # "name" or "org/name"

# Task -> the hub corpus of the paper and the field of its text.
HUB_CORPORA = {
    "instructions": ("Skylion007/openwebtext", "text"),
    "health": ("m42-health/HC4", "text"),
    "writing": ("Skelebor/book_titles_and_descriptions", "description"),
}

# Suffix of a table -> the builder of `datasets` that reads it, and its options. A .jsonl is read as lines and
# parsed in read_row, because the json builder refuses a whole file for one broken line.
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("text", {"encoding_errors": "replace"}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {"encoding_errors": "replace", "keep_default_na": False}),
}
SUFFIXES = (".txt", ".md", *TABLES)

Row = Mapping[str, Any] | str  # its fields, or the reason why it has none


class UserError(Exception):
    """A mistake of the user's: shown as one line, without a stack trace."""


class Unreachable(UserError):
    """The hub does not answer, or no longer does."""


@dataclass(frozen=True)
class Document:
    """A text and its origin: "samples/health/burns.txt", "corpus.jsonl:17" or "org/name:17".

    Rows count from 1; those of a hub data set in the shuffled order in which the epoch brought them.
    """

    id: str
    text: str


class Corpus:
    """Documents in a seeded order: without end (`for document in corpus`) or one epoch at a time.

    name: "samples" (the built-in ones of the task), "heldout" (those for measuring), a local file or folder
    (.txt, .md: a document per file; .jsonl, .parquet, .csv: a document per row), or else a hub data set.
    text_field: the field of a table's text; by default "text", or what HUB_CORPORA says of the data set.
    min_words, max_words: shorter documents are skipped, longer ones cut; whitespace separates words.
    config, split, buffer_size (rows shuffled in memory): of a hub data set only.

    Tables are opened, and the hub is asked, only when the first document is due.
    skipped: rows left out, by reason; the most in any one epoch, so that repeated epochs do not add up.

    Raises UserError for bad values and for a local corpus that is missing or has no file of a known kind.
    """

    def __init__(
        self,
        name: str,
        *,
        task: str = "instructions",
        config: str | None = None,
        split: str = "train",
        text_field: str | None = None,
        min_words: int = 50,
        max_words: int = 1024,
        seed: int = 0,
        buffer_size: int = 10_000,
    ) -> None:
        if task not in HUB_CORPORA:
            raise UserError(f"unknown task {task!r}: choose from {', '.join(HUB_CORPORA)}")
        if not 1 <= min_words <= max_words:
            raise UserError(f"need 1 <= min words <= max words, not {min_words} and {max_words}")
        if seed < 0 or buffer_size < 1:
            raise UserError(f"need seed >= 0 and buffer size >= 1, not {seed} and {buffer_size}")
        self.name, self.config, self.split = name, config, split
        self.field = text_field or dict(HUB_CORPORA.values()).get(name, "text")
        self.min_words, self.max_words = min_words, max_words
        self.seed, self.buffer_size = seed, buffer_size
        self.skipped: Counter[str] = Counter()
        self._files = find_files(name, task)

    def __iter__(self) -> Iterator[Document]:
        """Epochs 0, 1, 2, ... one after the other. Raises as `epoch` does."""
        for number in count():
            yield from self.epoch(number)

    def epoch(self, number: int) -> Iterator[Document]:
        """One pass, in an order that the seed and the epoch number decide alone; no text comes twice.

        Raises UserError if the corpus cannot be read, lacks the field, or yields no document at all.
        """
        seen: set[bytes] = set()
        skipped: Counter[str] = Counter()
        for row_id, row in self._local_rows(number) if self._files else self._hub_rows(number):
            text, reason = usable_text(row, self.field, self.min_words, self.max_words)
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if not reason and digest not in seen:
                seen.add(digest)
                yield Document(row_id, text)
            else:
                skipped[reason or "duplicate"] += 1
                self.skipped |= skipped  # the larger count of each reason
        if not seen:
            reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "nothing: it has no rows"
            raise UserError(f"corpus {self.name!r}: no text of {self.min_words} or more words; skipped {reasons}")

    @cached_property
    def _tables(self) -> "list[datasets.Dataset | None]":
        """The table in each local file, memory-mapped; None for a plain or an empty file."""
        return [
            open_table(path, self.field) if path.suffix.lower() in TABLES and path.stat().st_size else None
            for _, path in self._files
        ]

    def _local_rows(self, number: int) -> Iterator[tuple[str, Row]]:
        """Permutes the rows of all files together, a plain file being one row, and reads each when due."""
        lengths = [1 if table is None else len(table) for table in self._tables]
        ends = np.cumsum(lengths)
        for position in np.random.default_rng([self.seed, number]).permutation(ends[-1]):
            file = int(np.searchsorted(ends, position, side="right"))
            row = int(position - ends[file]) + lengths[file]
            (file_id, path), table = self._files[file], self._tables[file]
            row_id = file_id if table is None else f"{file_id}:{row + 1}"
            yield row_id, read_row(path, table, row, self.field)

    def _hub_rows(self, number: int) -> Iterator[tuple[str, Row]]:
        import datasets  # takes a second, which runs on texts and reports need not wait for

        source = {"path": self.name, "name": self.config, "split": self.split, "streaming": True}
        try:
            # One request, tried once: without a connection load_dataset retries for 23 seconds.
            huggingface_hub.dataset_info(self.name, timeout=10)
            try:
                stream = datasets.load_dataset(**source)
            except RuntimeError:  # it is a script, which datasets refuses to run: read the hub's parquet copy
                stream = datasets.load_dataset(**source, revision="refs/convert/parquet")
            stream = stream.shuffle(seed=self.seed, buffer_size=self.buffer_size)
            stream.set_epoch(number)
            for position, row in enumerate(stream, start=1):
                if position == 1:
                    require_field(self.field, row, self.name)
                yield f"{self.name}:{position}", row
        except UserError:
            raise
        except Exception as error:  # from many libraries: no connection, no such data set, config or split
            advice = "check name and connection, or use --corpus samples or a file or folder of your own"
            raise Unreachable(f"cannot read {self.name!r} from the hub ({brief(error)}): {advice}") from error


def find_files(name: str, task: str) -> list[tuple[str, Path]]:
    """(id, path) of each file of a local corpus, sorted; none if the name can only be a hub data set's."""
    built_in = {"samples": SAMPLES / task, "heldout": SAMPLES / "heldout"}
    place = os.path.expanduser(built_in.get(name, name))
    if not os.path.exists(place):
        if name in built_in or not HUB_ID.fullmatch(name) or name.lower().endswith(SUFFIXES):
            raise UserError(f"corpus not found: {name!r} is no file or folder")
        return []
    root = Path(place).resolve()
    base = SAMPLES.parent if name in built_in else root.parent
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    files = [(path.relative_to(base).as_posix(), path) for path in paths if path.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"corpus {name!r}: nothing to read, no file ends in {' '.join(SUFFIXES)}")
    return files


def open_table(path: Path, field: str) -> "datasets.Dataset":
    """Raises UserError, naming the file, if it cannot be read or lacks the field."""
    import datasets  # as above

    builder, options = TABLES[path.suffix.lower()]
    datasets.disable_progress_bars()
    try:  # data_files is a pattern: the [ and * of a real name need escaping
        table = datasets.load_dataset(builder, data_files=glob.escape(str(path)), split="train", **options)
    except Exception as error:  # pyarrow's, pandas' or datasets' own, depending on the kind of file
        raise UserError(f"cannot read {path} as a table ({brief(error.__cause__ or error)})") from error
    fields = read_row(path, table, 0, field) if builder == "text" else table.column_names
    if not isinstance(fields, str):
        require_field(field, fields, str(path))
    return table if builder == "text" else table.select_columns([field])


def require_field(field: str, fields: Iterable[str], where: str) -> None:
    if field not in fields:
        raise UserError(f"{where} has no field {field!r}: choose with --text-field from {', '.join(fields)}")


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def read_row(path: Path, table: "datasets.Dataset | None", row: int, field: str) -> Row:
    """The fields of a row, or why it has none. A plain file is one row of one field, still bytes."""
    try:
        if table is None:
            return {field: path.read_bytes()}
        if path.suffix.lower() != ".jsonl":
            return table[row]
        line = table[row]["text"]
        fields = json.loads(line) if line.strip() else {field: ""}
        return fields if isinstance(fields, dict) else "malformed"
    except OSError:
        return "unreadable"
    except UnicodeDecodeError:  # parquet strings that are not the UTF-8 they should be
        return "undecodable"
    except (ValueError, RecursionError):
        return "malformed"


def usable_text(row: Row, field: str, min_words: int, max_words: int) -> tuple[str, str]:
    """(text up to its last allowed word, whitespace untouched, "") or ("", the reason to skip the row)."""
    if isinstance(row, str):
        return "", row
    value = "" if row.get(field) is None else row[field]
    if not isinstance(value, str | bytes):
        return "", "not text"
    # A string can hold half a surrogate pair, which no tokenizer takes; as bytes it fails to decode.
    data = value.encode(errors="surrogatepass") if isinstance(value, str) else value
    if b"\0" in data:
        return "", "binary"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "undecodable"
    word_ends = [word.end() for word in islice(re.finditer(r"\S+", text), max_words)]
    if len(word_ends) < min_words:
        return "", "short" if word_ends else "empty"
    text = text[: word_ends[-1]]
    if "\ufffd" in text:  # stands for bytes that somebody before us could not decode
        return "", "undecodable"
    return text, ""


@dataclass
class Criterion:
    """One line of a rubric. `gold` is the short fact that a full answer states, or NO_GOLD."""

    name: str
    gold: str
    description: str
    weight: float


@dataclass
class Answer:
    """One solver answer and what became of it."""

    text: str
    ids: list[int] = field(default_factory=list)  # completion tokens, the first end token included
    finished: bool = True
    thoughts: list[str] = field(default_factory=list)
    ratings: list[float] | None = None  # one in [0, 2] per criterion; None: the judge could not be read
    grade: float | None = None  # weighted mean rating in [0, 1]
    reward: float | None = None  # grade after the guards
    guards: list[str] = field(default_factory=list)  # the guards that fired
    advantage: float = 0.0


@dataclass
class Episode:
    """All that was said about one document. `drop` is why it is not trained on, as "role/reason"."""

    document: Document
    problem: str = ""
    reference: str = ""
    answers: list[Answer] = field(default_factory=list)
    rubric: list[Criterion] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)  # what the solver was given
    controls: list[Answer] = field(default_factory=list)  # the reference and an unrelated answer, to try the rubric on
    failures: list[dict[str, str]] = field(default_factory=list)  # every output that was rejected, and why
    drop: str | None = None

    def reject(self, role: str, reason: str, raw: str) -> None:
        self.failures.append({"role": role, "reason": reason, "raw": raw})


def alive(episodes: Sequence[Episode]) -> list[Episode]:
    return [e for e in episodes if e.drop is None]


def json_lines(records: Iterable[Any]) -> str:
    """Dictionaries or records of a dataclass -> the text of a JSON Lines file."""
    plain = (record if isinstance(record, dict) else asdict(record) for record in records)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in plain)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file. A last line without its end, as a process that is killed while it writes leaves
    it, is left out; any other line that holds no object is named and skipped. Raises OSError."""
    *lines, _ = path.read_bytes().split(b"\n")  # no str.splitlines, for which U+2028 ends a line too
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield record
        elif line.strip():
            tqdm.write(f"{path}:{number} is no JSON object and is skipped")


def read_episodes(path: Path, answers: bool = False) -> list[Episode]:
    """The episodes of heldout.jsonl or episodes.jsonl, with their answers if asked for. Raises OSError, KeyError and
    TypeError."""
    episodes = []
    for record in read_lines(path):
        e = {**record, "controls": []}
        e.pop("step", None)
        e["document"], e["rubric"] = Document(**e["document"]), [Criterion(**c) for c in e["rubric"]]
        e["answers"] = [Answer(**a) for a in e["answers"]] if answers else []
        episodes.append(Episode(**e))
    return episodes


def with_groups(episodes: Sequence[Episode]) -> list[Episode]:
    """Those that came as far as grades, with the answers that have a rating for each criterion: two or more."""
    graded = [e for e in episodes if e.drop in (None, "group/zero spread", "group/oversampled")]
    rated = [[a for a in e.answers if a.ids and a.ratings and len(a.ratings) == len(e.rubric)] for e in graded]
    return [replace(e, answers=group) for e, group in zip(graded, rated, strict=True) if len(group) > 1]
