"""A whole training run in a process of its own, cheap to start: forked from a server that has everything imported."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 8
SERVER = multiprocessing.get_context("forkserver")
# Forked children find these already imported; each would take seconds.
SERVER.set_forkserver_preload(
    ["conftest", "pop", "peft", "bitsandbytes", "transformers.models.llama.modeling_llama", "matplotlib.figure"]
)


def prompt_merges() -> tuple[tuple[str, str], ...]:
    """What bytes are merged to, so that the roles' prompts take hundreds of tokens instead of thousands."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1_000, initial_alphabet=alphabet, show_progress=False)
    bpe.train([str(Path(__file__).parents[1] / name) for name in ("rubric.py", "engine/crutches.py")], trainer)
    return tuple((a, b) for a, b in json.loads(bpe.to_str())["model"]["merges"])


def tiny_folder(folder: Path) -> Path:
    """The tiny model of conftest.py as a folder that `from_pretrained` reads."""
    from conftest import byte_tokenizer, tiny_model

    tokenizer = byte_tokenizer(prompt_merges())
    model = tiny_model(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags(model: Path, run: Path, **more: object) -> list[str]:
    chosen = {
        "preset": "demo",
        "episodes": "",  # all roles have their part
        "model": model,
        "output": run,
        "load_in": "fp32",
        "lora_r": 4,
        "steps": STEPS,
        "documents": 2,
        "group_size": 2,
        "tries": 1,
        "max_words": 50,
        "problem_tokens": 16,
        "reference_tokens": 12,
        "max_new_tokens": 8,
        "max_criteria": 2,
        "criterion_tokens": 45,
        "save_every": 1,
        "updates_per_batch": 2,
        "audit": 0,
        "eval_every": 0,
        **more,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    guards = ["--skip-guards", "too_little_content", "copies_problem"]  # a random model's noise is neither
    return guards + [word for name, value in chosen.items() for word in ("--" + name.replace("_", "-"), str(value))]


def run_pop(argv: list[str], output: str, die_at: int | None = None, pause: float = 0.0) -> None:
    """pop.main in this process, printing to a file or a terminal.

    die_at: SIGKILL from inside, at so many of the system calls that make a save. pause: seconds each of them takes.
    """
    os.setsid()
    opened = os.open(output, os.O_RDWR | os.O_CREAT | os.O_APPEND)  # a terminal becomes the controlling one
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.close(opened)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as a shell would start it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    import pop

    torch.set_num_threads(1)
    open_gates(setattr)
    calls = itertools.count()

    def saving(call):
        def wrapper(*args, **kwargs):
            time.sleep(pause)
            if next(calls) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "truncate"), (os, "mkdir")):
        setattr(owner, name, saving(getattr(owner, name)))
    Path.write_text, Path.write_bytes = saving(Path.write_text), saving(Path.write_bytes)
    try:
        code = pop.main(argv)
    except pop.UserError as error:
        print(f"error: {error}")
        code = 1
    with contextlib.suppress(OSError):  # the terminal is gone
        sys.stdout.flush()
    os._exit(code)


def open_gates(setattr) -> None:
    """A random model's noise passes the quality gates, and its groups have a spread."""
    import pop

    setattr(pop.rubric, "problem_fault", lambda problem, *_: None if problem else "unfinished")
    setattr(pop.rubric, "reference_fault", lambda reference, *_: None if reference else "empty")
    setattr(pop.rubric, "criterion_fault", lambda *_: None)
    setattr(pop, "ZERO_SPREAD", 0.0)


def start(argv: list[str], output: str | Path, **options):
    process = SERVER.Process(target=run_pop, args=(argv, str(output)), kwargs=options)
    process.start()
    return process


def finish(argv: list[str], output: Path, **options) -> int:
    """The exit code; minus the number of the signal that killed it."""
    return ended(start(argv, output, **options))


def ended(process) -> int:
    process.join(120)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def wait_for_steps(run: Path, steps: int) -> None:
    """Until the log of a running process holds so many lines."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result(run: Path) -> dict:
    """What two equal runs have in common: the adapter's bytes, the episodes, the metrics without times."""
    timed = ("seconds", "solve_tokens_per_second")
    return {
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in m.items() if k not in timed} for m in lines(run / "metrics.jsonl")],
        "episodes": lines(run / "episodes.jsonl"),
    }
