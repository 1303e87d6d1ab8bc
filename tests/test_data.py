"""What data.py promises about documents. No network: a function stands in for the hub."""

import gzip
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from config import Config, parse_args
from data import HUB_CORPORA, Corpus, Document, Unreachable, UserError
from engine import sources

ROOT = Path(__file__).resolve().parents[1]
HUB_NAME = "Skelebor/book_titles_and_descriptions"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def words(first: str, number: int) -> str:
    return " ".join([first, *(f"word{i}" for i in range(number - 1))])


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def corpus_of(path: Path, **options) -> Corpus:
    return Corpus(str(path), **({"min_words": 1} | options))


def texts(corpus: Corpus, epoch: int = 0) -> list[str]:
    return [document.text for document in corpus.epoch(epoch)]


def hub_of(monkeypatch: pytest.MonkeyPatch, rows: list[dict]) -> list[dict]:
    """Makes these rows every data set of the hub; returns the list that will record the calls."""
    calls: list[dict] = []

    def load_dataset(**options) -> datasets.IterableDataset:
        calls.append(options)
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


# --- kinds of files


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_a_plain_file_is_one_document(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_text("one\ntwo  three\n", encoding="utf-8")
    assert list(corpus_of(tmp_path / f"a{suffix}").epoch(0)) == [Document(f"a{suffix}", "one\ntwo  three")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_table_is_one_document_per_row(tmp_path, suffix):
    table = datasets.Dataset.from_dict({"n": [1, 2], "text": ["one,\ntwo", "drei \u2028 vier"]})
    path = tmp_path / f"t{suffix}"
    {".jsonl": table.to_json, ".parquet": table.to_parquet, ".csv": table.to_csv}[suffix](str(path))
    assert set(corpus_of(path).epoch(0)) == {
        Document(f"t{suffix}:1", "one,\ntwo"),
        Document(f"t{suffix}:2", "drei \u2028 vier"),
    }


def test_the_text_field_of_a_table_can_be_chosen(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "no", "body": "yes"}])
    assert texts(corpus_of(path, text_field="body")) == ["yes"]


def test_the_text_field_does_not_matter_to_plain_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert texts(corpus_of(tmp_path, text_field="body")) == ["one"]


def test_a_folder_is_read_recursively_and_ids_tell_where(tmp_path):
    (tmp_path / "docs/deep").mkdir(parents=True)
    (tmp_path / "docs/a.md").write_text("one")
    (tmp_path / "docs/deep/b.txt").write_text("two")
    (tmp_path / "docs/picture.png").write_text("three")
    write_jsonl(tmp_path / "docs/deep/c.jsonl", [{"text": "four"}, {"text": "five"}])
    found = {document.id: document.text for document in corpus_of(tmp_path / "docs").epoch(0)}
    assert found == {
        "docs/a.md": "one",
        "docs/deep/b.txt": "two",
        "docs/deep/c.jsonl:1": "four",
        "docs/deep/c.jsonl:2": "five",
    }


def parquet_of(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def parquet(**columns: pa.Array | list) -> bytes:
    return parquet_of(pa.table(columns))


PACK = {".gz": gzip.compress, ".zst": zstandard.compress, "": bytes}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.TSV", "t.parquet"])
def test_a_table_of_any_kind_is_read_packed_or_not(tmp_path, name, packed):
    contents = {
        ".jsonl": '{"n": 1, "text": "one"}\n{"n": 2, "text": "two"}\n',
        ".json": '[{"n": 1, "text": "one"}, {"n": 2, "text": "two"}]',
        ".csv": "n,text\n1,one\n2,two\n",
        ".tsv": "n\ttext\n1\tone\n2\ttwo\n",
        ".parquet": parquet(n=[1, 2], text=["one", "two"]),
    }
    content = contents[Path(name.lower()).suffix]
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](content if isinstance(content, bytes) else content.encode()))
    assert {(d.id, d.text) for d in corpus_of(path).epoch(0)} == {(f"{path.name}:1", "one"), (f"{path.name}:2", "two")}


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_packed_file_is_read_to_its_end_and_refused_if_that_is_missing(tmp_path, packed):
    """Parts that were packed one by one and put together, as `cat` does, are one file."""
    path, pack = tmp_path / f"t.jsonl{packed}", PACK[packed]
    path.write_bytes(pack(b'{"text": "one"}\n') + pack(b'{"text": "two"}\n'))
    assert sorted(texts(corpus_of(path))) == ["one", "two"]
    whole = pack("".join(f'{{"text": "{i} {i * i}"}}\n' for i in range(9_999)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"cannot read .*t\.jsonl\{packed} as a table \(OSError: Truncated"):
        texts(corpus_of(path))


def test_a_json_file_may_hold_lines_or_a_list_over_many_lines(tmp_path):
    for content in ('\ufeff{"text": "one"}\n{"text": "two"}', '\n [\n{\n"text":\n"one"}, {"text": "two"}\n]\n'):
        (tmp_path / "t.json").write_text(content, encoding="utf-8")
        assert sorted(texts(corpus_of(tmp_path / "t.json"))) == ["one", "two"]


def test_a_csv_is_read_by_the_names_of_its_columns_also_where_rows_end_in_a_comma(tmp_path):
    (tmp_path / "t.csv").write_text("text,source\nthe document,somewhere,\n")
    assert texts(corpus_of(tmp_path / "t.csv")) == ["the document"]


@pytest.mark.parametrize("text", ["1", "007", "NA", "null", "True", "1e5", "2026-01-01"])
def test_a_cell_is_text_as_it_stands_whatever_else_it_could_be_taken_for(tmp_path, text):
    (tmp_path / "t.csv").write_text(f"n,text\n1,{text}\n")
    assert texts(corpus_of(tmp_path / "t.csv")) == [text]


def test_a_cell_of_several_lines_is_one_text(tmp_path):
    (tmp_path / "t.csv").write_text('n,text\r\n1,"one\r\n\r\ntwo, ""three"""\r\n2,four\r\n', newline="")
    assert {(d.id, d.text) for d in corpus_of(tmp_path / "t.csv").epoch(0)} == {
        ("t.csv:1", 'one\r\n\r\ntwo, "three"'),
        ("t.csv:2", "four"),
    }


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_json_ends_with_a_line_feed_alone(tmp_path, separator):
    path, wanted = tmp_path / "t.jsonl", [f"one{separator}two", "three"]
    path.write_bytes(f'{{"text": "one{separator}two"}}\n{{"text": "three"}}\r\n'.encode())
    assert sorted(texts(corpus_of(path))) == wanted
    assert [record["text"] for record in data.read_lines(path)] == wanted


def test_nulls_and_lists_beside_and_nulls_in_a_column_of_parquet_are_no_trouble(tmp_path):
    columns = {
        "text": ["one", None, "two"],
        "tags": [["a"], [], None],
        "numbers": [None, None, None],
        "nested": [{"a": [1]}, None, {"a": None}],
    }
    (tmp_path / "t.parquet").write_bytes(parquet(**columns))
    corpus = corpus_of(tmp_path / "t.parquet")
    assert sorted(texts(corpus)) == ["one", "two"] and corpus.skipped == {"empty": 1}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())]
)
def test_strings_of_each_type_of_parquet_are_text(tmp_path, kind):
    (tmp_path / "t.parquet").write_bytes(parquet(text=pa.array(["one", None, "zwölf"]).cast(kind)))
    assert sorted(texts(corpus_of(tmp_path / "t.parquet"))) == ["one", "zwölf"]


def test_in_a_list_of_json_other_fields_may_be_of_any_type(tmp_path):
    (tmp_path / "t.json").write_text('[{"text": "one", "n": 1}, {"text": "two", "n": ["x"]}, {"n": {"text": 3}}, 7]')
    corpus = corpus_of(tmp_path / "t.json")
    assert sorted(texts(corpus)) == ["one", "two"] and corpus.skipped == {"empty": 1, "malformed": 1}


def test_what_is_in_other_columns_is_no_reason_to_refuse_a_table(tmp_path):
    rows = [f"{i},text{i}" for i in range(12_000)]
    (tmp_path / "t.csv").write_text("n,text\n" + "\n".join(rows) + "\n,last\nword,of all\n")
    assert {"last", "of all", "text0"} < set(texts(corpus_of(tmp_path / "t.csv")))
    maps = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
    strange = {b"huggingface": json.dumps({"info": {"features": {"other": {"_type": "Hologram"}}}}).encode()}
    table = pa.table({"text": ["one"], "map": maps, "other": [b"x"]}).replace_schema_metadata(strange)
    pq.write_table(table, tmp_path / "t.parquet")
    assert texts(corpus_of(tmp_path / "t.parquet")) == ["one"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_written_anew_is_read_anew_whatever_its_time_says(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    for word in ("one", "two"):
        path.write_text(f"text\n{word}\n" if suffix == ".csv" else f'{{"text": "{word}"}}\n')
        os.utime(path, (1, 1))
        assert texts(corpus_of(path)) == [word]


def test_a_folder_says_what_it_reads_and_what_it_leaves_out(tmp_path):
    folder = tmp_path / "docs"
    (folder / ".git").mkdir(parents=True)
    for name in ("README.md", ".git/notes.txt", ".hidden.txt", "scan.pdf", "Makefile"):
        (folder / name).write_text("one")
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    corpus = corpus_of(folder)
    assert sorted(texts(corpus)) == ["one", "two"]
    assert corpus.listing == "reads 1 .jsonl, 1 .md; leaves out 1 .pdf, 2 hidden, 1 no suffix"


def test_links_are_followed_once_and_go_by_their_own_name(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0a1b").write_text('{"text": "one"}\n')
    (tmp_path / "docs/sub").mkdir(parents=True)
    (tmp_path / "docs/train.jsonl").symlink_to(tmp_path / "blobs/0a1b")
    (tmp_path / "docs/sub/round").symlink_to(tmp_path / "docs")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("two")
    (tmp_path / "docs/more").symlink_to(tmp_path / "elsewhere")
    assert sorted(texts(corpus_of(tmp_path / "docs"))) == ["one", "two"]
    assert texts(corpus_of(tmp_path / "docs/train.jsonl")) == ["one"]


def test_a_table_whose_name_looks_like_a_pattern_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a[1]*.jsonl", [{"text": "one"}])
    assert texts(corpus_of(path)) == ["one"]


def test_reading_a_table_shows_no_progress_bar(tmp_path, capfd):
    datasets.enable_progress_bars()
    texts(corpus_of(write_jsonl(tmp_path / "t.jsonl", [{"text": "one"}])))
    assert capfd.readouterr() == ("", "")


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone two")
    assert texts(corpus_of(tmp_path)) == ["one two"]


def test_chat_tokens_are_passed_on_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_text("<|im_start|>system obey<|im_end|>")
    assert texts(corpus_of(tmp_path)) == ["<|im_start|>system obey<|im_end|>"]


# --- length


def test_a_document_of_min_words_stays_and_a_shorter_one_is_skipped(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [{"text": words("long", 50)}, {"text": words("short", 49)}])
    corpus = Corpus(str(tmp_path))
    assert texts(corpus) == [words("long", 50)]
    assert corpus.skipped == {"short": 1}


def test_a_long_document_is_cut_after_max_words_with_its_whitespace_kept(tmp_path):
    (tmp_path / "a.txt").write_text("\n\tone  two\n\nthree\u00a0four five")
    assert texts(corpus_of(tmp_path, max_words=4)) == ["\n\tone  two\n\nthree\u00a0four"]


def test_the_default_cut_is_1024_words(tmp_path):
    (tmp_path / "a.txt").write_text(words("a", 2000))
    assert texts(Corpus(str(tmp_path))) == [words("a", 1024)]


# --- order


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"file {i}")
    write_jsonl(folder / "t.jsonl", [{"text": f"row {i}"} for i in range(10)])
    return folder


def test_the_order_is_reproducible(many):
    assert texts(corpus_of(many, seed=3), epoch=2) == texts(corpus_of(many, seed=3), epoch=2)


def test_the_order_does_not_depend_on_earlier_epochs(many):
    corpus = corpus_of(many)
    texts(corpus, epoch=0)
    assert texts(corpus, epoch=1) == texts(corpus_of(many), epoch=1)


def test_the_order_does_not_depend_on_the_file_system(many, monkeypatch):
    expected = texts(corpus_of(many))
    walk, seen = os.walk, []

    def backwards(*given, **named):
        for folder, folders, names in walk(*given, **named):
            seen.extend(names)
            yield folder, folders, names[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert texts(corpus_of(many)) == expected and len(seen) > 2


def test_the_order_does_not_depend_on_the_hash_seed(many):
    code = "import sys, data; print([d.id for d in data.Corpus(sys.argv[1], min_words=1).epoch(0)])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, many],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "HF_HOME": str(many.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert outputs == {f"{[document.id for document in corpus_of(many).epoch(0)]}\n"}


def test_seeds_and_epochs_differ_in_order_alone(many):
    orders = [texts(corpus_of(many, seed=s), epoch=e) for s, e in [(0, 0), (1, 0), (0, 1), (1, 1)]]
    assert len({tuple(order) for order in orders}) == 4
    assert len({frozenset(order) for order in orders}) == 1


def test_iteration_goes_through_the_epochs_without_end(many):
    corpus = corpus_of(many)
    assert [d.text for d in islice(corpus, 60)] == texts(corpus, 0) + texts(corpus, 1) + texts(corpus, 2)


def test_no_text_comes_twice_in_an_epoch(tmp_path):
    (tmp_path / "a.txt").write_text("same text")
    (tmp_path / "b.txt").write_text("same text\n")
    write_jsonl(tmp_path / "t.jsonl", [{"text": "same text"}, {"text": "same text but longer"}, {"text": "other"}])
    corpus = corpus_of(tmp_path, max_words=2)
    assert sorted(texts(corpus)) == ["other", "same text"]
    assert corpus.skipped == {"duplicate": 3}


# --- what is skipped


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"PNG\0\xff\xfe", "binary"),
        (b"caf\xe9 in latin 1", "undecodable"),
        ("lost \ufffd bytes".encode(), "undecodable"),
    ],
)
def test_an_unusable_plain_file_is_skipped_and_counted(tmp_path, content, reason):
    (tmp_path / "bad.txt").write_bytes(content)
    (tmp_path / "good.txt").write_bytes(b"good")
    corpus = corpus_of(tmp_path)
    assert texts(corpus) == ["good"]
    assert corpus.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": oops', "malformed"),
        (b'["text"]', "malformed"),
        (b"[" * 100_000, "malformed"),
        (b'{"text": 3}', "not text"),
        (b'{"text": ["a", "b"]}', "not text"),
        (b'{"text": null}', "empty"),
        (b'{"other": "a"}', "empty"),
        (b"", "empty"),
        (b'{"text": "a\\u0000b"}', "binary"),
        (b'{"text": "caf\xe9"}', "undecodable"),
        (b'{"text": "half a pair: \\ud800"}', "undecodable"),
    ],
)
def test_an_unusable_jsonl_line_is_skipped_and_counted(tmp_path, line, reason):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "fine"}\n')
    corpus = corpus_of(tmp_path)
    assert sorted(texts(corpus)) == ["fine", "good"]
    assert corpus.skipped == {reason: 1}


def test_a_csv_field_that_does_not_decode_is_skipped_and_counted(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"n,text\n1,caf\xe9\n2,\n3,good\n")
    corpus = corpus_of(tmp_path)
    assert texts(corpus) == ["good"]
    assert corpus.skipped == {"undecodable": 1, "empty": 1}


def test_a_parquet_string_that_does_not_decode_is_skipped_and_counted(tmp_path):
    data = pa.array([b"good", b"caf\xe9"])
    strings = pa.Array.from_buffers(pa.string(), len(data), data.buffers())
    pq.write_table(pa.table({"text": strings}), tmp_path / "t.parquet")
    corpus = corpus_of(tmp_path)
    assert texts(corpus) == ["good"]
    assert corpus.skipped == {"undecodable": 1}


def test_a_file_that_cannot_be_read_is_skipped_and_counted(tmp_path, monkeypatch):
    def read_bytes(path: Path) -> bytes:
        if path.name == "locked.txt":
            raise PermissionError(path)
        return b"good"

    (tmp_path / "locked.txt").touch()
    (tmp_path / "open.txt").touch()
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    corpus = corpus_of(tmp_path)
    assert texts(corpus) == ["good"]
    assert corpus.skipped == {"unreadable": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_table_file_of_no_bytes_is_skipped_and_counted(tmp_path, suffix):
    (tmp_path / f"t{suffix}").touch()
    (tmp_path / "good.txt").write_text("good")
    corpus = corpus_of(tmp_path)
    assert texts(corpus) == ["good"]
    assert corpus.skipped == {"empty": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"a,text\n"),
        ("t.tsv", b"\n\n"),
        ("t.json", b"[]"),
        ("t.parquet", parquet(text=pa.array([], pa.string()))),
        ("t.jsonl.gz", gzip.compress(b"")),
        ("t.jsonl.gz", b""),
        ("t.csv.zst", zstandard.compress(b"")),
    ],
)
def test_a_table_of_no_rows_is_skipped_and_counted_and_alone_it_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^corpus '.*{name}': no text of 1 or more words; skipped 1 empty$"):
        texts(corpus_of(tmp_path / name))
    (tmp_path / "good.txt").write_text("good")
    corpus = corpus_of(tmp_path)
    assert texts(corpus) == ["good"] and corpus.skipped == {"empty": 1}


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_last_of_json_lines_need_not_end_and_a_broken_one_is_named(tmp_path, end, capsys):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}' + end)
    assert list(data.read_lines(path)) == [{"a": 1}, {"a": 2}] and capsys.readouterr().out == ""
    path.write_text('{"a": 1}\n[2]\n{}\n{"a": ' + end)
    assert list(data.read_lines(path)) == [{"a": 1}, {}]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{path}:{number} is no JSON object and is skipped" for number in (2, 4)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_no_bytes_make_the_reader_of_json_lines_fail(tmp_path, content):
    path = tmp_path / "any.jsonl"
    path.write_bytes(content)
    assert all(isinstance(record, dict) for record in data.read_lines(path))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.text(alphabet='ab,"\n\t\x00é', max_size=12), max_size=6), suffix=st.sampled_from([".csv", ".tsv"])
)
def test_any_text_as_a_table_is_read_or_refused_in_one_line(tmp_path, rows, suffix):
    path = tmp_path / f"any{suffix}"
    path.write_text("\n".join([("text,n" if suffix == ".csv" else "text\tn"), *rows]), encoding="utf-8")
    try:
        found = texts(corpus_of(path))
    except UserError as error:
        assert "\n" not in str(error) and "any" in str(error)
    else:
        assert all(text.strip() for text in found)


def test_counts_do_not_add_up_over_epochs(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [{"text": "good"}, {"text": ""}, {"text": 3}, {"text": 4}])
    corpus = corpus_of(tmp_path)
    list(islice(corpus, 5))
    assert corpus.skipped == {"empty": 1, "not text": 2}


# --- mistakes of the user's


@pytest.mark.parametrize(
    "name",
    [
        "",
        "./nowhere",
        "/no/where",
        "~/no-such-folder",
        "~nobody/x",
        "nowhere.txt",
        "a/nowhere.jsonl",
        "a/b/c",
    ],
)
def test_a_missing_path_is_a_user_error(name):
    with pytest.raises(UserError, match="corpus not found"):
        Corpus(name)


def test_a_folder_without_a_known_kind_of_file_is_a_user_error(tmp_path):
    (tmp_path / "a.pdf").touch()
    with pytest.raises(UserError, match=r"nothing to read.*\.txt \.md \.jsonl"):
        Corpus(str(tmp_path))


def test_a_corpus_that_yields_nothing_is_a_user_error_with_the_counts(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [{"text": "too few"}, {"text": "words"}, {"text": 3}])
    with pytest.raises(UserError, match="no text of 50 or more words") as error:
        texts(Corpus(str(tmp_path)))
    assert "2 short" in str(error.value)
    assert "1 not text" in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_an_absent_field_is_a_user_error_that_names_those_there_are(tmp_path, suffix):
    table = datasets.Dataset.from_dict({"title": ["a"], "body": ["b"]})
    path = tmp_path / f"t{suffix}"
    {".jsonl": table.to_json, ".parquet": table.to_parquet, ".csv": table.to_csv}[suffix](str(path))
    with pytest.raises(UserError, match=rf"t\{suffix} has no field 'text'.* title, body"):
        texts(corpus_of(path))


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("t.parquet", "no table", "magic bytes"),
        (
            "t.csv",
            "a,text\n1,2\n1,2,3,4\n",
            "line 3: 2 more fields than in the header; put texts with a ',' into quotes",
        ),
        ("t.tsv", 'a\ttext\n1\t"2\n3\n\n4\t5\n', "line 2: unexpected end of data; .*double the quotes inside"),
        ("t.csv", 'a,text\n1,"2"\n1,"two" or 3\n', "line 3: ',' expected after '\"'"),
        ("t.json", '[{"text": "one"},\n{"text": "two"', "line 2 column 15"),
        ("t.jsonl.gz", "no gzip", "header check"),
    ],
)
def test_a_broken_table_is_a_user_error_of_one_line_with_file_and_cause(tmp_path, name, content, cause):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} .*{cause}") as error:
        texts(corpus_of(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_words": 0}, "--min-words 0: must be at least 1"),
        ({"min_words": 10, "max_words": 9}, "--min-words 10: must be at most --max-words, 9"),
        ({"seed": -1}, "--seed -1: must be from 0 to"),
    ],
)
def test_a_bad_value_is_a_user_error(options, message):
    with pytest.raises(UserError, match=message):
        sources.open_corpus(Config(corpus="samples", **options))


def test_an_unknown_task_is_named_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--preset", "demo", "--task", "cooking"])
    assert "instructions" in (said := capsys.readouterr().err) and "health" in said and "writing" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"text,n,text\none,1,two\n"),
        ("t.tsv", b"text\ttext\none\ttwo\n"),
        ("t.parquet", parquet_of(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]))),
    ],
)
def test_two_columns_of_the_name_are_refused_as_either_could_be_meant(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} has more than one field 'text': choose with --text-field from text"):
        texts(corpus_of(tmp_path / name))


# --- the hub


def test_a_name_that_is_no_path_is_streamed_from_the_hub(monkeypatch):
    calls = hub_of(monkeypatch, [{"text": "one"}])
    corpus = Corpus("org/name", config="en", split="test", min_words=1)
    assert list(corpus.epoch(0)) == [Document("org/name:1", "one")]
    assert calls == [{"path": "org/name", "name": "en", "split": "test", "streaming": True}]


def test_making_a_hub_corpus_asks_nothing_of_the_hub(monkeypatch):
    calls = hub_of(monkeypatch, [{"text": "one"}])
    Corpus("org/name")
    assert calls == []


def test_a_hub_corpus_of_a_task_has_its_own_text_field(monkeypatch):
    hub_of(monkeypatch, [{"text": "no", "description": "yes"}])
    assert HUB_CORPORA["writing"] == (HUB_NAME, "description")
    assert texts(Corpus(HUB_NAME, task="writing", min_words=1)) == ["yes"]


def test_a_stream_is_shuffled_by_seed_and_epoch(monkeypatch):
    hub_of(monkeypatch, [{"text": str(i)} for i in range(40)])

    def order(seed: int, epoch: int) -> tuple[str, ...]:
        return tuple(texts(Corpus("org/name", seed=seed, min_words=1, buffer_size=20), epoch))

    assert order(0, 0) == order(0, 0)
    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3
    assert sorted(order(0, 0), key=int) == [str(i) for i in range(40)]


def test_an_absent_field_of_a_stream_is_a_user_error_that_names_those_there_are(monkeypatch):
    hub_of(monkeypatch, [{"title": "a", "body": "b"}])
    with pytest.raises(UserError, match=r"^org/name has no field 'text'.* title, body"):
        texts(Corpus("org/name"))


def test_a_stream_of_no_rows_is_a_user_error(monkeypatch):
    hub_of(monkeypatch, [])
    with pytest.raises(UserError, match="it has no rows"):
        texts(Corpus("org/name"))


def test_an_unreachable_hub_is_a_user_error_with_a_remedy_and_without_retries(monkeypatch):
    def out_of_reach(name: str, timeout: float) -> None:
        raise ConnectionError("Name or service not known\nand three lines more")

    calls = hub_of(monkeypatch, [{"text": "one"}])
    monkeypatch.setattr(huggingface_hub, "dataset_info", out_of_reach)
    with pytest.raises(UserError, match=r"'org/name' from the hub .*service not known\): .*--corpus samples"):
        texts(Corpus("org/name"))
    assert calls == []


NO_REPLY = types.SimpleNamespace(headers={}, request=None, status_code=404)
ABSENT = [
    ValueError("BuilderConfig 'de' not found. Available: ['en']"),
    ValueError("Bad split: dev. Available splits: ['train']"),
    datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub or cannot be accessed."),
    datasets.exceptions.DataFilesNotFoundError("No supported data files found in org/name"),
    huggingface_hub.errors.RepositoryNotFoundError("404 Client Error", response=NO_REPLY),
    huggingface_hub.errors.GatedRepoError("403 Client Error", response=NO_REPLY),
]
BROKEN = [
    ConnectionError("Couldn't reach 'org/name' on the Hub"),
    TimeoutError("The read operation timed out"),
    OSError(113, "No route to host"),
    json.JSONDecodeError("Expecting value", "<html>", 0),
    pa.ArrowInvalid("Parquet magic bytes not found in footer"),
    huggingface_hub.errors.HfHubHTTPError("502 Server Error", response=NO_REPLY),
]


@pytest.mark.parametrize("error", [*ABSENT, *BROKEN], ids=repr)
@pytest.mark.parametrize("place", ["dataset_info", "load_dataset"])
def test_what_the_hub_does_not_have_is_told_once_and_a_broken_connection_is_tried_again(monkeypatch, error, place):
    def fail(*_: object, **__: object) -> None:
        raise error

    pauses: list[float] = []
    hub_of(monkeypatch, [{"text": "one"}])
    monkeypatch.setattr(huggingface_hub if place == "dataset_info" else datasets, place, fail)
    monkeypatch.setattr(sources.time, "sleep", pauses.append)
    with pytest.raises(UserError, match=r"^cannot read 'org/name' from the hub .*: check name and connection") as told:
        next(sources.documents_from(Corpus("org/name"), 0))
    assert type(told.value) is (UserError if error in ABSENT else Unreachable)
    assert pauses == ([] if error in ABSENT else list(sources.PAUSES))
    assert str(error).partition("\n")[0] in str(told.value) and "\n" not in str(told.value)


def test_an_offline_hub_is_a_user_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot read 'org/name' from the hub .*offline"):
        texts(Corpus("org/name"))


def test_a_stream_that_breaks_off_is_a_user_error(monkeypatch):
    def rows() -> Iterator[dict]:
        yield {"text": "one"}
        raise ConnectionError("Server Disconnected")

    hub_of(monkeypatch, [])
    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda **options: stream)
    with pytest.raises(UserError, match="Server Disconnected"):
        texts(Corpus("org/name", min_words=1, buffer_size=1))


def test_a_data_set_that_is_a_script_is_read_from_its_parquet_copy(monkeypatch):
    calls = hub_of(monkeypatch, [{"text": "one"}])
    stand_in = datasets.load_dataset

    def load_dataset(revision: str | None = None, **options) -> datasets.IterableDataset:
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found name.py")
        return stand_in(revision=revision, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(Corpus("org/name", min_words=1)) == ["one"]
    assert calls[0]["revision"] == "refs/convert/parquet"


# --- the samples in this repository


@pytest.mark.parametrize("task", HUB_CORPORA)
def test_each_task_has_at_least_20_samples(task):
    documents = list(Corpus("samples", task=task).epoch(0))
    assert len(documents) >= 20
    assert all(document.id.startswith(f"samples/{task}/") for document in documents)


def test_12_samples_are_held_out():
    assert len(texts(Corpus("heldout"))) == 12


def test_every_sample_has_120_to_300_words():
    paths = sorted((ROOT / "samples").rglob("*.txt"))
    lengths = {path.name: len(path.read_text(encoding="utf-8").split()) for path in paths}
    assert len(lengths) >= 72
    assert {name: n for name, n in lengths.items() if not 120 <= n <= 300} == {}


def test_no_held_out_text_is_among_the_samples():
    held_out = set(texts(Corpus("heldout")))
    assert not any(held_out & set(texts(Corpus("samples", task=task))) for task in HUB_CORPORA)
