"""Where documents come from: the built-in samples, local files, or a data set of the hub, streamed.

Documents are untrusted text. Here they are cut, counted and otherwise passed on as they are.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import RepositoryNotFoundError
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

TABLES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
PACKED = {".gz": "gzip", ".zst": "zstd"}  # suffix -> its name in pyarrow
SUFFIXES = (".txt", ".md", *(table + packed for packed in ("", *PACKED) for table in TABLES))

Row = bytes | str  # its text, not yet decoded, or the reason why it has none


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

    @property
    def identity(self) -> str:
        """Its id and a digest of its text: the same id may come to mean another text."""
        return f"{self.id} {hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()}"


class Corpus:
    """Documents in a seeded order: without end (`for document in corpus`) or one epoch at a time.

    name: "samples" (the built-in ones of the task), "heldout" (those for measuring), a local file or folder
    (.txt, .md: a document per file; .jsonl, .json, .parquet, .csv, .tsv, packed as .gz or .zst or not: a document per
    row), or else a hub data set.
    text_field: the field of a table's text; by default "text", or what HUB_CORPORA says of the data set.
    min_words, max_words: shorter documents are skipped, longer ones cut; whitespace separates words.
    config, split, buffer_size (rows shuffled in memory): of a hub data set only.

    Tables are opened, and the hub is asked, only when the first document is due.
    skipped: rows left out, by reason; the most in any one epoch, so that repeated epochs do not add up.
    listing: which files are read and which left out, in words; "" for the samples and the hub.

    Raises UserError for a local corpus that is missing or has no file of a known kind. Numbers are checked in Config.
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
        self.name, self.config, self.split = name, config, split
        self.field = text_field or dict(HUB_CORPORA.values()).get(name, "text")
        self.min_words, self.max_words = min_words, max_words
        self.seed, self.buffer_size = seed, buffer_size
        self.skipped: Counter[str] = Counter()
        self._files, self.listing = find_files(name, task)

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
            text, reason = usable_text(row, self.min_words, self.max_words)
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
        """The table in each local file, memory-mapped; None for a plain file."""
        return [open_table(path, self.field) if kind_of(path) in TABLES else None for _, path in self._files]

    def _local_rows(self, number: int) -> Iterator[tuple[str, Row]]:
        """Permutes the rows of all files together, a plain file being one row, and reads each when due."""
        lengths = [1 if table is None else len(table) for table in self._tables]
        ends = np.cumsum(lengths)
        for position in np.random.default_rng([self.seed, number]).permutation(ends[-1]):
            file = int(np.searchsorted(ends, position, side="right"))
            row = int(position - ends[file]) + lengths[file]
            (file_id, path), table = self._files[file], self._tables[file]
            if table is None:
                yield file_id, read_plain(path)
            else:
                yield f"{file_id}:{row + 1}", (cells := table[row])["reason"] or cells["text"]

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
                yield f"{self.name}:{position}", cell(row.get(self.field))
        except UserError:
            raise
        except Exception as error:  # from many libraries
            refuse_cache(error)
            absent = isinstance(error, RepositoryNotFoundError | datasets.exceptions.DatasetsError)
            absent = absent or type(error) is ValueError  # config or split; subclasses come of replies broken off
            advice = "check name and connection, or use --corpus samples or a file or folder of your own"
            told = f"cannot read {self.name!r} from the hub ({brief(error)}): {advice}"
            raise (UserError if absent else Unreachable)(told) from error


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, "" for one that is not: ".jsonl" of "a.jsonl" and of "a.JSONL.gz"."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix if name.endswith(SUFFIXES) else ""


def find_files(name: str, task: str) -> tuple[list[tuple[str, Path]], str]:
    """(id, path) of each file of a local corpus, sorted, and what was taken and left out, in words. No file if the name
    can only be a hub data set's."""
    built_in = {"samples": SAMPLES / task, "heldout": SAMPLES / "heldout"}
    place = os.path.expanduser(built_in.get(name, name))
    if not os.path.exists(place):
        if name in built_in or not HUB_ID.fullmatch(name) or name.lower().endswith(SUFFIXES):
            raise UserError(f"corpus not found: {name!r} is no file or folder")
        return [], ""
    root = Path(os.path.abspath(place))  # not resolved: the name of a link says what its target is
    base = SAMPLES.parent if name in built_in else root.parent
    paths, hidden = ([root], 0) if root.is_file() else files_below(root)
    files = [(path.relative_to(base).as_posix(), path) for path in paths if kind_of(path)]
    if not files:
        raise UserError(f"corpus {name!r}: nothing to read, no file ends in {' '.join(SUFFIXES)}")
    taken = Counter(kind_of(path) for _, path in files)
    left = Counter(path.suffix.lower() or "no suffix" for path in paths if not kind_of(path))
    left["hidden"] = hidden
    told = [", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) for counts in (taken, +left) if counts]
    return files, "" if name in built_in else "reads " + "; leaves out ".join(told)


def files_below(root: Path) -> tuple[list[Path], int]:
    """All files of a folder, of linked folders too, sorted; and how many hidden files and folders were passed over."""
    paths, hidden, seen = [], 0, set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(real)
        hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.is_file()), hidden


def open_table(path: Path, field: str) -> "datasets.Dataset":
    """The `table_rows`, kept in the cache of `datasets` and memory-mapped. Raises UserError, naming the file and where
    possible the row, if the table cannot be read, and if the cache cannot be written."""
    import datasets  # here, since it takes a second

    datasets.disable_progress_bars()
    features = datasets.Features(text=datasets.Value("large_binary"), reason=datasets.Value("string"))
    try:
        with path.open("rb") as file:  # known by its content: written anew, a file may keep its time and size
            digest = hashlib.file_digest(file, "sha256")
        digest.update(f"{kind_of(path)} {field}".encode() + Path(__file__).read_bytes())  # and by how it is read
        source = {"gen_kwargs": {"path": path, "field": field}, "fingerprint": f"pop-{digest.hexdigest()[:16]}"}
        return datasets.Dataset.from_generator(table_rows, features, **source)
    except Exception as error:  # of csv, json, pyarrow or datasets
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        if getattr(cause, "filename", "") != str(path):
            refuse_cache(cause)
        raise UserError(f"cannot read {path} as a table ({brief(cause)})") from error


def table_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    """The column `field` of a table and nothing else of it: what others hold must be no reason to refuse it."""
    kind, empty = kind_of(path), True
    reader = parquet_rows if kind == ".parquet" else json_rows if "json" in kind else csv_rows
    for row in reader(path, field) if path.stat().st_size else ():
        empty = False
        yield {"text": None, "reason": row} if isinstance(row, str) else {"text": row, "reason": None}
    if empty:
        yield {"text": None, "reason": "empty"}


def unpacked(path: Path) -> io.BufferedReader:
    """The bytes of a file, decompressed if its name says so. Reading raises OSError if the end is missing."""
    import pyarrow  # comes with datasets

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=PACKED.get(path.suffix.lower())))


def json_rows(path: Path, field: str) -> Iterator[Row]:
    """An object in each line, so that a broken one is the only one lost; a .json may be one list instead."""
    with unpacked(path) as file:
        a_list = kind_of(path) == ".json" and file.peek(99).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        whole = str(file.read(), "utf-8-sig", "replace") if a_list else ""
        rows = json.loads(whole) if a_list else (json_line(line, "replace") for line in file)
        for number, row in enumerate(rows):
            if number == 0 and row and isinstance(row, dict):
                require_field(field, row, str(path))
            yield cell(row.get(field)) if isinstance(row, dict) else "malformed"


def json_line(line: bytes, errors: str = "strict") -> Any:
    """What a line of JSON Lines holds: None if it is broken, {} if it is blank. errors: as for bytes.decode."""
    try:
        return json.loads(line.decode("utf-8-sig", errors).strip() or "{}")
    except (ValueError, RecursionError):
        return None


def csv_rows(path: Path, field: str) -> Iterator[Row]:
    """Raises UserError for a row with more fields than the header, but for empty ones at its end, and for quotes that
    do not match: columns or rows would be mixed up."""
    csv.field_size_limit(2**31 - 1)
    separator = "\t" if kind_of(path) == ".tsv" else ","
    with io.TextIOWrapper(unpacked(path), "utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file, delimiter=separator, strict=True)
        require_field(field, rows.fieldnames or [field], str(path))
        line = rows.line_num
        try:
            for row in rows:
                if any(more := row.pop(None, ())):
                    raise csv.Error(f"{len(more)} more fields than in the header")
                yield cell(row[field])
                line = rows.line_num
        except csv.Error as error:
            remedy = f"put texts with a {separator!r} into quotes, and double the quotes inside"
            raise UserError(f"cannot read {path} as a table: line {line + 1}: {error}; {remedy}") from None


def parquet_rows(path: Path, field: str) -> Iterator[Row]:
    import pyarrow.parquet

    source = io.BytesIO(unpacked(path).read()) if path.suffix.lower() in PACKED else path
    with pyarrow.parquet.ParquetFile(source) as file:
        require_field(field, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(batch_size=1_000, columns=[field]):
            column = batch.column(field)
            with contextlib.suppress(pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):  # it is no text
                column = column.cast(pyarrow.large_binary())  # as strings, those that are not UTF-8 fail all together
            yield from map(cell, column.to_pylist())


def require_field(field: str, fields: Iterable[str], where: str) -> None:
    if (found := list(fields).count(field)) != 1:
        number = "more than one" if found else "no"
        raise UserError(f"{where} has {number} field {field!r}: choose with --text-field from {', '.join(fields)}")


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def refuse_cache(error: BaseException) -> None:
    """Raises UserError, with the remedy, if the error is that a folder cannot be written."""
    denied = isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
    if denied or getattr(error, "errno", 0) in (errno.EROFS, errno.ENOSPC):
        remedy = "set HF_HOME (or HF_DATASETS_CACHE, if that is set) to a folder that can be written"
        raise UserError(f"cannot write the cache ({brief(error)}): {remedy}") from None


def read_plain(path: Path) -> Row:
    try:
        return path.read_bytes()
    except OSError:
        return "unreadable"


def cell(value: Any) -> Row:
    """The value of a field as a row's text. Half a surrogate pair, which no tokenizer takes, will fail to decode."""
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    return b"" if value is None else value if isinstance(value, bytes) else "not text"


def usable_text(row: Row, min_words: int, max_words: int) -> tuple[str, str]:
    """(text up to its last allowed word, whitespace untouched, "") or ("", the reason to skip the row)."""
    if isinstance(row, str):
        return "", row
    if b"\0" in row:
        return "", "binary"
    try:
        text = row.decode("utf-8-sig")
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
    """The objects of a JSON Lines file. A line that holds none is named and skipped, such as the half of one that a
    process leaves that is killed while it writes; the last need not end. Raises OSError."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # to str.splitlines U+2028 is an end too
        record = json_line(line)
        if not isinstance(record, dict):
            tqdm.write(f"{path}:{number} is no JSON object and is skipped")
        elif line.strip():
            yield record


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
