"""A run on disk: checkpoints that are whole or absent, and resuming from them.

    runs/x/config.json  metrics.jsonl  episodes.jsonl  adapter/ (the latest)
    runs/x/checkpoints/step-000012/     everything that step 13 starts from
        adapter/                        what PeftModel.from_pretrained loads
        optimizer.safetensors           AdamW's tensors, "<number of the parameter>.<name>"
        rng.safetensors                 torch's generators: cpu, cuda.0, ...
        state.json                      progress, scheduler, Python's generator, lengths of the logs in bytes
        manifest.json                   sha256 of each file above

Nothing here is pickled: a checkpoint of somebody else's can hold wrong numbers, but no code.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import Config
from data import UserError

LOGS = ("metrics.jsonl", "episodes.jsonl")
FILES = {"adapter/adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}

RESUME = "python pop.py --resume {run}"


@dataclass
class State:
    """All that a step changes. `progress` is plain JSON: counters, token budgets, whatever must outlive a process."""

    llm: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    rng: random.Random
    progress: dict[str, Any]


def check_writable(file: Path) -> None:
    """Raises UserError if a file that will be written later cannot be. It and its folder may be missing yet."""
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"--output {file} cannot be written: {error.strerror}") from None
    for folder in made:  # the innermost first; a run that fails before it begins leaves nothing
        folder.rmdir()


def run_folder(cfg: Config) -> Path:
    """Where the run is to be. Raises UserError if --output holds a run or cannot be written."""
    run = Path(cfg.resume or cfg.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{cfg.preset}-{cfg.task}")
    if not cfg.resume and (run / "config.json").exists():
        name = shlex.quote(str(run))
        raise UserError(f"--output {run} already holds a run: go on with it by --resume {name}, or choose another")
    check_writable(run / "config.json")
    return run


def write_config(cfg: Config, run: Path) -> None:
    write_json(run / "config.json", run, {**asdict(cfg), "resume": ""})


# ------------------------------------------------------------------------------------------------------ random


def rng_states(rng: random.Random) -> dict[str, Any]:
    states = {"python": rng.getstate(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_states(rng: random.Random, states: dict[str, Any]) -> None:
    rng.setstate(states["python"])
    torch.set_rng_state(states["cpu"])
    cuda = [name for name in states if name.startswith("cuda.")]
    for i in range(min(len(cuda), torch.cuda.device_count())):
        torch.cuda.set_rng_state(states[f"cuda.{i}"], i)


# -------------------------------------------------------------------------------------------------------- save


def save(run: Path, state: State, keep: int = 2) -> None:
    """Write the state as a checkpoint, bring adapter/ up to date and remove all but the newest `keep` checkpoints.

    Raises UserError if the disk is full or the folder cannot be written; every earlier checkpoint is then still whole.
    """
    checkpoints = run / "checkpoints"
    folder = checkpoints / f"step-{state.progress['step']:06d}"
    with writing(folder, run):
        checkpoints.mkdir(exist_ok=True)
        for left in checkpoints.glob(".*.tmp"):  # by a process that was killed while it saved
            shutil.rmtree(left)
        if not folder.is_dir() or damage(folder, run):  # a whole one of the same step holds the same state
            shutil.rmtree(folder, ignore_errors=True)
            with written_whole(folder) as temporary:
                write(temporary, run, state)
        publish(folder / "adapter", run / "adapter")
        done = sorted(f for f in checkpoints.glob("step-*") if f.name <= folder.name)
        for other in set(checkpoints.glob("step-*")) - set(done[-keep:]):  # later ones too: they were found damaged
            shutil.rmtree(other)


@contextlib.contextmanager
def writing(path: Path, run: Path, again: str = RESUME) -> Iterator[None]:
    """Turns a full disk or a missing permission into a UserError. Checkpoints that were whole before still are."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        retry = again.format(run=shlex.quote(str(run)))
        raise UserError(f"cannot write {path}: {reason}. Make room or give write permission, then {retry}") from error


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when the block ends, on disk by then; removed if it fails."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync(folder.parent)
    fsync(folder.parent.parent)


def write(folder: Path, run: Path, state: State) -> None:
    # Without save_embedding_layers=False, peft asks the hub about the base model at every save.
    state.llm.model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    optimizer = state.optimizer.state_dict()
    moments = {f"{i}.{name}": t for i, values in optimizer["state"].items() for name, t in values.items()}
    save_file(moments, folder / "optimizer.safetensors")
    rng = rng_states(state.rng)
    python = rng.pop("python")
    save_file(rng, folder / "rng.safetensors")
    for name in LOGS:
        (run / name).touch()
        fsync(run / name)  # a checkpoint must not outlive the lines it counts
    record = {
        "progress": state.progress,
        "optimizer": optimizer["param_groups"],
        "scheduler": state.scheduler.state_dict(),
        "python_rng": python,
        "log_bytes": {name: (run / name).stat().st_size for name in LOGS},
    }
    (folder / "state.json").write_text(json.dumps(record), encoding="utf-8")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def publish(adapter: Path, folder: Path) -> None:
    """Copy an adapter over the one in `folder`. The weights are one file, replaced at once, so that what is there can
    be loaded at any moment."""
    folder.mkdir(exist_ok=True)
    for path in sorted(adapter.iterdir()):  # the weights after their configuration
        replace_file(folder / path.name, path.read_bytes())


def replace_file(path: Path, content: bytes) -> None:
    """The file is the old one or the new one at any moment, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_json(path: Path, run: Path, record: Any) -> None:
    with writing(path, run):
        replace_file(path, (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode())


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------ resume


def damage(folder: Path, run: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if missing := FILES - set(manifest):
            return f"manifest.json does not list {', '.join(sorted(missing))}"
        for name, digest in manifest.items():
            if sha256(folder / name) != digest:
                return f"{name} is not as it was written"
        for name, size in json.loads((folder / "state.json").read_text(encoding="utf-8"))["log_bytes"].items():
            if (run / name).stat().st_size < size:
                return f"{name} is shorter than it was then"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, TypeError, AttributeError):  # JSON of another shape
        return "manifest.json is not as it was written"
    return None


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint; None if the run never came to its first. A line for each one that is skipped.

    Raises UserError if there are checkpoints and none is whole: to begin again would overwrite the logs.
    """
    folders = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    for folder in folders:
        reason = damage(folder, run)
        if reason is None:
            return folder
        print(f"checkpoint {folder} is skipped: {reason}")
    if folders:
        raise UserError(f"no whole checkpoint in {run}: restore one of them, or start a new run")
    return None


def resume(run: Path, state: State, tidy: bool = True) -> None:
    """Put the newest whole checkpoint of a run, if it has one, into `state`. tidy: cut the logs back to where they were
    then, or begin them anew, and bring adapter/ up to date."""
    saved = newest(run)
    log_bytes = load(saved, state) if saved else {}
    if tidy:
        for name in LOGS:
            if (run / name).exists():
                os.truncate(run / name, log_bytes.get(name, 0))
        if saved:
            publish(saved / "adapter", run / "adapter")


def load(folder: Path, state: State) -> dict[str, int]:
    """Put a whole checkpoint into `state`; returns the lengths of the logs then."""
    from peft import set_peft_model_state_dict

    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    set_peft_model_state_dict(state.llm.model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        number, name = key.split(".")
        moments.setdefault(int(number), {})[name] = tensor
    state.optimizer.load_state_dict({"state": moments, "param_groups": record["optimizer"]})
    state.scheduler.load_state_dict(record["scheduler"])
    version, numbers, gauss = record["python_rng"]
    python = (version, tuple(numbers), gauss)
    set_rng_states(state.rng, {"python": python, **load_file(folder / "rng.safetensors")})
    state.progress.update(record["progress"])
    state.llm.token_budget = state.progress["budgets"]["rollout"]
    return record["log_bytes"]


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Inside, no other process works in this folder; the system lifts the lock however the process ends."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {run}: stop it first, or wait for its end") from None
        yield
