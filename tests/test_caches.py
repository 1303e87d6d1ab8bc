"""Places that cannot be written, and no network: what is there is used, and what is not is one line with its remedy."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import transformers

import model
from data import Corpus, UserError

ROOT = Path(__file__).resolve().parents[1]
REMEDY = r"set HF_HOME \(or HF_DATASETS_CACHE, if that is set\) to a folder that can be written"


def in_a_process(code: str, *args: object, **variables: object) -> subprocess.CompletedProcess:
    """Python with these environment variables, and none of the caller's that name a cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "HOME", "TQDM_"))}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", **{name: str(value) for name, value in variables.items()}}
    command = [sys.executable, "-W", "ignore", *(["-c", code] if code else []), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def no_home(tmp_path: Path) -> Path:
    """A home that nobody can write to, root neither: a file is in its way."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "home"


def test_without_a_home_to_write_to_a_table_is_refused_in_one_line_that_names_the_variable(tmp_path, no_home):
    (tmp_path / "t.csv").write_text("text\n" + "word " * 60)
    done = in_a_process("", "pop.py", "--preset", "demo", "--corpus", tmp_path / "t.csv", HOME=no_home)
    *_, said = done.stderr.splitlines()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said.startswith(f"error: cannot write the cache (NotADirectoryError: [Errno 20] Not a directory: '{no_home}")
    assert said.endswith(REMEDY.replace("\\", ""))


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_DATASETS_CACHE"])
def test_with_a_cache_that_can_be_written_it_is_read(tmp_path, no_home, variable):
    (tmp_path / "t.csv").write_text("text\nsome words\n")
    code = "import sys, data; print([d.text for d in data.Corpus(sys.argv[1], min_words=1).epoch(0)])"
    done = in_a_process(code, tmp_path / "t.csv", **{"HOME": no_home, variable: tmp_path / "cache"})
    assert (done.stdout, done.stderr) == ("['some words']\n", "")


def test_plain_files_need_neither_a_home_nor_a_cache(tmp_path, no_home):
    code = "import data; print(sum(1 for _ in data.Corpus('samples').epoch(0)))"
    done = in_a_process(code, HOME=no_home)
    assert int(done.stdout) >= 20 and done.stderr == ""


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/home/cache"),
        OSError(errno.EROFS, "Read-only file system", "/home/cache"),
        OSError(errno.ENOSPC, "No space left on device"),
        FileExistsError(errno.EEXIST, "File exists", "/home/cache"),
    ],
)
def test_a_cache_that_cannot_be_written_is_one_line_with_cause_and_remedy(tmp_path, monkeypatch, error):
    def refused(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n')
    monkeypatch.setattr(datasets.Dataset, "from_generator", refused)
    monkeypatch.setattr(datasets, "load_dataset", refused)
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refused)
    shutil.copytree(ROOT / "samples" / "heldout", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    for work in (
        lambda: next(iter(Corpus(str(tmp_path / "t.jsonl"), min_words=1))),
        lambda: next(iter(Corpus("org/name"))),
        lambda: model.load(str(tmp_path / "model"), load_in="fp32"),
    ):
        with pytest.raises(UserError, match=rf"cannot write the cache \(.*{error.strerror}.*\): {REMEDY}$"):
            work()


def test_a_model_s_own_file_that_may_not_be_read_is_not_blamed_on_the_cache(tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "model.safetensors"))

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refused)
    with pytest.raises(UserError, match=r"cannot load model .*Permission denied.*model\.safetensors"):
        model.load(str(tmp_path), load_in="fp32")


def test_a_table_that_may_not_be_read_is_not_blamed_on_the_cache(tmp_path, monkeypatch):
    path, real = tmp_path / "t.jsonl", Path.open
    path.write_text('{"text": "one"}\n')

    def locked(self: Path, *args: str) -> object:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(self, *args)

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(UserError, match=r"^cannot read \S+t\.jsonl as a table \(PermissionError: .*Permission denied"):
        next(iter(Corpus(str(path), min_words=1)))


def test_a_cached_model_is_loaded_offline_from_a_cache_that_is_not_written(tmp_path, folder, no_home):
    cached = tmp_path / "hf" / "hub" / "models--org--tiny"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for path in before:
        path.chmod(path.stat().st_mode & ~0o222)
    code = "import model; print(model.load('org/tiny', load_in='fp32', lora_r=2, lora_alpha=4).context)"
    try:
        done = in_a_process(code, HOME=no_home, HF_HOME=tmp_path / "hf", HF_HUB_OFFLINE=1)
    finally:
        for path in before:
            path.chmod(path.stat().st_mode | 0o200)
    assert (done.stdout, done.returncode) == ("8192\n", 0), done.stderr
    assert "Loading weights" not in done.stderr  # a line for each, where nobody sees them move
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_model_that_is_not_cached_is_one_line_offline(tmp_path, no_home):
    code = "import model; model.load('org/tiny', load_in='fp32')"
    done = in_a_process(code, HOME=no_home, HF_HOME=tmp_path / "hf", HF_HUB_OFFLINE=1)
    assert "data.UserError: cannot get model org/tiny from the hub: " in done.stderr.splitlines()[-1]
    assert done.stderr.endswith("(offline? give a local folder, or --model smollm2)\n")
