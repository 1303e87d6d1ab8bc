"""Did it get better, by someone else's measure? `python eval.py BENCHMARK --model M --adapter RUN ...`.

Benchmarks: ifeval, healthbench, writing, heldout, winrate. Besides: `audit` holds the reward against cheap tricks,
`compare` puts finished evaluations side by side, `chat` talks to the base and the trained model at once.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import config
import data
import model
import pop
import rubric
from benchmarks.judges import EndpointJudge, LocalJudge, Question, Value, Verdict
from benchmarks.sets import BENCHMARKS, Item, held_out_items
from data import HUB_CORPORA, UserError
from engine import audit as auditing
from engine import checkpoint, heldout, memory, runlog
from lab import plan, results
from model import LLM

AGAIN = "the same command"  # goes on where an evaluation ended
CHUNK = 64  # prompts that are answered before their answers are written down

# ----------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Adapter:
    """A trained adapter. `label` names its files and rows; with a part of its checksum, since a run may go on."""

    label: str
    folder: Path
    run: Path | None
    base: str


def find_adapter(name: str) -> Adapter:
    """A run's folder (its adapter/ is taken), or one with an adapter in it, such as RUN/best.

    Raises UserError if there is none.
    """
    given = Path(name).expanduser()
    folder = given if (given / "adapter_config.json").is_file() else given / "adapter"
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        checksum = checkpoint.sha256(folder / "adapter_model.safetensors")[:8]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--adapter {name}: no adapter there (give a run's folder, or one such as RUN/best)") from None
    run = next((f for f in (given, given.parent) if (f / "config.json").is_file()), None)
    named = folder.resolve().parent.name if folder.name == "adapter" else "-".join(folder.resolve().parts[-2:])
    return Adapter(f"{slug(named)}-{checksum}", folder, run, base)


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def settle(args: argparse.Namespace) -> list[Adapter]:
    """Fill in what was left open, from the first adapter's run or else by hardware, and return the adapters.

    Raises UserError if an adapter is missing or was trained on another model.
    """
    adapters = [find_adapter(name) for name in args.adapter]
    if len({a.label for a in adapters}) < len(adapters):
        raise UserError("--adapter: the same adapter twice")
    preset = args.preset or config.pick_preset()[0]
    stored = config.stored_config(adapters[0].run) if adapters and adapters[0].run else {}
    known = {field.name for field in fields(pop.Config)} - {"resume", "output", "dry_run"}
    given = {name: getattr(args, name, None) for name in ("model", "load_in", "task", "corpus", "seed")}
    settings = {**config.PRESETS[preset], **{name: value for name, value in stored.items() if name in known}}
    settings |= {name: value for name, value in given.items() if value is not None}
    args.config = pop.Config(**{**settings, "preset": preset})
    args.model, args.load_in = args.config.model, args.config.load_in
    for adapter in adapters:
        if Path(adapter.base).name != Path(loading.resolve(args.model)).name:
            raise UserError(f"adapter {adapter.folder} was trained on {adapter.base}, not on --model {args.model}")
    return adapters


# ---------------------------------------------------------------------------------------------------- answers


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file that grows line by line; what a killed process left of a line is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]


def answer(llm: LLM, items: Sequence[Item], label: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """item id -> {text, tokens, words, finished}; those that are on disk are read, the others written as they come.

    On disk the text is whole. What is returned is without a reasoning model's thoughts: nobody judges or counts them.
    """
    path = args.folder / f"answers-{label}.jsonl"
    asked = {item.id: digest(item.messages) for item in items}
    had = {r["id"]: r for r in read_records(path) if asked.get(r["id"]) == r["asked"]}
    todo = [item for item in items if item.id not in had]
    budgets = {"answer": args.token_budget}
    with tqdm(total=len(items), initial=len(items) - len(todo), desc=f"answers of {label}", unit="prompt") as bar:
        for start in range(0, len(todo), CHUNK):
            chunk = todo[start : start + CHUNK]

            def work(chunk: Sequence[Item] = chunk) -> list[Any]:
                llm.token_budget = budgets["answer"]
                torch.manual_seed(int(digest(args.seed, *(item.id for item in chunk)), 16) % 2**63)
                return llm.generate(
                    [llm.encode_messages(item.messages) for item in chunk],
                    max_new_tokens=args.max_new_tokens,
                    temperature=args.temperature,
                    desc="answer",
                )

            written = memory.within_memory(llm, "answer", work, lambda: None, budgets)
            new = [
                {
                    "id": item.id,
                    "asked": asked[item.id],
                    "text": completion.text,
                    "tokens": len(completion.ids),
                    "words": len(rubric.final_answer(completion.text).split()),
                    "finished": completion.finished,
                }
                for item, (completion,) in zip(chunk, written, strict=True)
            ]
            runlog.append(path, *new, again=AGAIN)
            had |= {record["id"]: record for record in new}
            bar.update(len(chunk))
    args.token_budget = budgets["answer"]  # halved for good where memory ran out
    return {item.id: {**had[item.id], "text": rubric.final_answer(had[item.id]["text"])} for item in items}


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def that_fit(llm: LLM, items: Sequence[Item], max_new_tokens: int) -> list[Item]:
    """The items whose prompt leaves room for an answer in the model's context; the others are named."""
    lengths = {item.id: len(llm.encode_messages(item.messages)) for item in items}
    fit = [item for item in items if lengths[item.id] + max_new_tokens <= llm.context]
    if left := [item.id for item in items if item not in fit]:
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        tqdm.write(f"{len(left)} prompts leave no room for {max_new_tokens} tokens in the context: left out ({shown})")
    if not fit:
        raise UserError(f"no prompt leaves room for an answer: lower --max-new-tokens {max_new_tokens}")
    return fit


def problems(llm: LLM, adapters: Sequence[Adapter], args: argparse.Namespace) -> list[Item]:
    """The items of `heldout`: written by the base model once for this folder, from documents no adapter has seen."""
    cfg, path = args.config, args.folder / "heldout.jsonl"
    seen = {
        json.loads(line)["document"]["text"]
        for adapter in adapters
        if adapter.run and (adapter.run / "episodes.jsonl").is_file()
        for line in (adapter.run / "episodes.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    }
    for adapter in adapters:
        if not adapter.run:
            tqdm.write(f"{adapter.label} is no run's: that it has not seen these documents is for you to know")
    unseen = (  # adapters may have seen more or less of a document than is used here
        d
        for d in heldout.candidates(pop.open_corpus(cfg), cfg)
        if not any(d.text.startswith(text) or text.startswith(d.text) for text in seen)
    )
    documents = list(islice(unseen, args.limit or 64))
    read_records(path)  # cuts off half a line
    had = data.read(path) if path.exists() else []
    todo = [d for d in documents if d not in [e.document for e in had]]
    with tqdm(total=len(documents), initial=len(documents) - len(todo), desc="problems", unit="document") as bar:
        for start in range(0, len(todo), 8):
            new = heldout.make(llm, todo[start : start + 8], cfg)
            runlog.append(path, *map(asdict, new), again=AGAIN)
            had += new
            bar.update(len(new))
    kept = [e for e in rubric.alive(had) if e.document in documents]
    print(f"{len(kept)} problems with rubrics from {len(documents)} documents, none of them trained on")
    return held_out_items(kept, heldout.yardstick(cfg))


# --------------------------------------------------------------------------------------------------- verdicts


def judged(
    judge: LocalJudge | EndpointJudge, items: Iterable[Iterable[Question]], label: str, args: argparse.Namespace
) -> dict[str, Value | None]:
    """question id -> verdict, None if unjudged; those on disk are read, the others written down as they come."""
    questions = [question for item in items for question in item]
    path = args.folder / f"verdicts-{slug(judge.label)}-{label}.jsonl"
    asked = {q.id: digest(q.messages) for q in questions}
    values = {
        record["question"]: record["value"]
        for record in read_records(path)
        if record["value"] is not None and asked.get(record["question"]) == record["asked"]
    }

    def keep(verdicts: Sequence[Verdict]) -> None:
        runlog.append(path, *({**asdict(v), "asked": asked[v.question]} for v in verdicts), again=AGAIN)
        values.update({v.question: v.value for v in verdicts})

    def ask() -> None:
        if isinstance(judge, LocalJudge):
            judge.llm.token_budget = budgets["judge"]
        judge.ask([q for q in questions if q.id not in values], keep)

    budgets = {"judge": args.token_budget}
    if todo := len(questions) - len(values):
        print(f"{label}: {len(values)} of {len(questions)} verdicts are there, {todo} to ask for")
        if isinstance(judge, LocalJudge):
            memory.within_memory(judge.llm, "judge", ask, lambda: None, budgets)
            args.token_budget = budgets["judge"]
        else:
            ask()
    return values


def local_judge(llm: LLM | None, args: argparse.Namespace) -> LocalJudge:
    """The base model that has just answered or, where llm is None, the one that is named, loaded in its place."""
    if llm is None:
        gc.collect()
        torch.cuda.empty_cache()
        return LocalJudge(load(args.judge, args), args.judge)
    print(
        "the judge is the base model: where it also gave the rewards of the training, it flatters what it trained "
        "(another judge: --judge, --judge-url)"
    )
    return LocalJudge(llm, "base")


def load(name: str, args: argparse.Namespace) -> LLM:
    cfg = replace(args.config, model=name, rollout_tokens=args.token_budget)
    return model.load(
        name,
        load_in=cfg.load_in,
        seed=cfg.seed,
        token_budget=cfg.rollout_tokens,
        dequantize=plan.dequantizes(cfg),
        cuda_graph=cfg.cuda_graph,
    )


# --------------------------------------------------------------------------------------------- an evaluation


def evaluate(args: argparse.Namespace) -> None:
    """Answers, verdicts and results of a benchmark; all is on disk as it comes, so that a killed one goes on."""
    bench, adapters = BENCHMARKS[args.bench], settle(args)
    check(args, adapters)
    endpoint = EndpointJudge(args.judge_url, args.judge) if args.judge_url else None
    items = chosen(bench.read(args), args)
    for item in items[:1]:
        bench.questions(item, "an answer", "another")  # whether the judge's prompts are at hand
    args.max_new_tokens = args.max_new_tokens or bench.max_new_tokens or args.config.max_new_tokens
    args.folder = folder(args)
    with checkpoint.locked(args.folder):
        print(f"{args.bench}: {bench.about}\n{args.model} in {args.load_in}, {sampling(args)}; all in {args.folder}/")
        llm = load(args.model, args)
        items, answers = answer_all(llm, items, adapters, args)
        asked = {
            label: [bench.questions(i, own[i.id]["text"], answers["base"][i.id]["text"]) for i in items]
            for label, own in answers.items()
        }
        judge: LocalJudge | EndpointJudge | None = endpoint
        if any(questions for each in asked.values() for questions in each) and judge is None:
            if args.judge not in (None, args.model):
                llm = None  # type: ignore[assignment]  # it makes room for the judge
            judge = local_judge(llm, args)
        values = {label: judged(judge, each, label, args) for label, each in asked.items()} if judge else {}
        scores = {
            label: {
                item.id: bench.score(item, answers[label][item.id], [values[label][q.id] for q in questions])
                for item, questions in zip(items, each, strict=True)
            }
            for label, each in asked.items()
        }
        result = results.summary(bench.metrics, answers, scores) | {
            "benchmark": args.bench,
            "model": args.model,
            "load_in": args.load_in,
            "sampling": sampling(args),
            "data": args.data or "packaged",
            "judge": judge.label if judge else None,
        }
        path = args.folder / (f"results-{slug(judge.label)}.json" if judge else "results.json")
        checkpoint.write_json(path, args.folder, result)
    print(results.table([result]), *results.sentences(result), f"all numbers in {path}", sep="\n")


def check(args: argparse.Namespace, adapters: Sequence[Adapter]) -> None:
    """What can be known to fail before anything is loaded. Raises UserError."""
    if args.bench == "winrate" and not adapters:
        raise UserError("winrate compares an adapter with the base model: give --adapter RUN")
    if args.judge_url and not args.judge:
        raise UserError("--judge-url needs --judge NAME, the model that the endpoint is to use")
    for name in ("limit", "max_new_tokens", "token_budget"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: must be 0 (greedy) or more")


def chosen(items: list[Item], args: argparse.Namespace) -> list[Item]:
    """--limit of the items, at random but so that a higher limit adds to a lower one's."""
    if args.limit and args.limit < len(items):
        random.Random(args.config.seed).shuffle(items)
        return items[: args.limit]
    return items


def folder(args: argparse.Namespace) -> Path:
    """The evaluation's folder. Raises UserError if it holds answers that were made in another way."""
    path = Path(args.output or f"runs/eval-{args.bench}-{slug(Path(args.model).name)}-{args.load_in}")
    names = ["bench", "model", "load_in", "max_new_tokens", "temperature"]
    settings = {name: getattr(args, name) for name in names} | {"seed": args.config.seed, "data": args.data}
    if args.bench == "heldout":
        cfg = args.config
        settings |= {"task": cfg.task, "corpus": cfg.corpus, "min_words": cfg.min_words, "max_words": cfg.max_words}
    try:
        path.mkdir(parents=True, exist_ok=True)
        stored = json.loads(file.read_text()) if (file := path / "settings.json").exists() else settings
    except (OSError, ValueError) as error:
        raise UserError(f"--output {path} cannot be used: {error}") from None
    if changed := [name for name in settings if stored.get(name) != settings[name]]:
        differences = ", ".join(f"{name} {stored.get(name)}, not {settings[name]}" for name in changed)
        raise UserError(f"{path} holds answers of {differences}: give --output another folder, or remove this one")
    checkpoint.write_json(file, path, settings)
    return path


def sampling(args: argparse.Namespace) -> str:
    how = "greedy" if args.temperature == 0 else f"temperature {args.temperature}"
    return f"{how}, up to {args.max_new_tokens} tokens, seed {args.config.seed}"


def answer_all(
    llm: LLM, items: list[Item], adapters: Sequence[Adapter], args: argparse.Namespace
) -> tuple[list[Item], dict[str, dict[str, dict[str, Any]]]]:
    """The items that could be put to the model, and label -> item id -> answer: the base model's first."""
    if args.bench == "heldout":
        items = problems(llm, adapters, args)
    items = that_fit(llm, items, args.max_new_tokens)
    with llm.adapters_off():
        answers = {"base": answer(llm, items, "base", args)}
    for adapter in adapters:
        llm.take_adapter(adapter.folder)
        answers[adapter.label] = answer(llm, items, adapter.label, args)
    return items, answers


def compare(args: argparse.Namespace) -> None:
    """Finished evaluations side by side."""
    print(results.side_by_side(list(map(Path, args.folders))))


# -------------------------------------------------------------------------------------------------------- chat


def chat(args: argparse.Namespace) -> None:
    """Talk to the base model and to an adapter side by side."""
    (adapter,) = settle(args)
    args.max_new_tokens = args.max_new_tokens or 512
    llm = load(args.model, args)
    llm.take_adapter(adapter.folder)
    histories: dict[str, list[dict[str, str]]] = {"base": [], adapter.label: []}
    print(f"{args.model} and {adapter.label}, {sampling(args)}. An empty line starts anew, Ctrl-D ends.")
    torch.manual_seed(args.config.seed)
    while True:
        try:
            said = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        for label, history in histories.items():
            if not said:
                history.clear()
                continue
            history.append({"role": "user", "content": said})
            try:
                with llm.adapters_off() if label == "base" else contextlib.nullcontext():
                    ((reply,),) = llm.generate(
                        [llm.encode_messages(history)],
                        max_new_tokens=args.max_new_tokens,
                        temperature=args.temperature,
                        desc=label,
                    )
            except UserError as error:  # the conversation has outgrown the context
                print(f"{error}\n(an empty line starts anew)")
                history.pop()
                continue
            history.append({"role": "assistant", "content": reply.text})
            print(f"\n{label}: {reply.text}" + ("" if reply.finished else " ..."))


# ------------------------------------------------------------------------------------------------------- audit


def audit(args: argparse.Namespace) -> None:
    """What the reward gives for a reference, a sampled answer, and answers that deserve nothing; guards off and on."""
    preset = args.preset or config.pick_preset()[0]
    given: dict[str, Any] = {name: getattr(args, name) for name in ("model", "judge", "task", "corpus")}
    settings = {**config.PRESETS[preset], **{name: value for name, value in given.items() if value is not None}}
    cfg = pop.Config(**{**settings, "preset": preset, "seed": args.seed})
    path = Path(args.output or f"runs/audit-{Path(cfg.model).name}-{cfg.task}-{cfg.judge}.json")
    documents = heldout.set_aside(pop.open_corpus(cfg), args.documents, cfg)
    llm = model.load(
        cfg.model, load_in=cfg.load_in, seed=cfg.seed, token_budget=cfg.rollout_tokens, dequantize=plan.dequantizes(cfg)
    )
    episodes = heldout.make(llm, documents, cfg)
    kept = heldout.alive(episodes)
    print(f"{cfg.model}, {cfg.judge} judge: {len(kept)} problems with rubrics, from {len(episodes)} documents")
    if len(kept) < 2:
        reasons = ", ".join(e.drop for e in episodes if e.drop) or "the corpus has too few"
        raise UserError(f"--documents {args.documents}: need 2 usable ones ({reasons}); ask for more")
    result = auditing.audit(llm, kept, cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, path.parent, result)
    print(auditing.table(result), *auditing.warnings(result), f"all numbers in {path}", sep="\n")


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    models = argparse.ArgumentParser(add_help=False)
    models.add_argument("--preset", choices=list(config.PRESETS), help="settings to start from; default: by hardware")
    models.add_argument("--model", help="as for pop.py; default: the adapter's, or the preset's")
    models.add_argument("--load-in", choices=["4bit", "bf16", "fp32"], help="default: the adapter's, or the preset's")
    models.add_argument("--seed", type=int, default=0)
    models.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    models.add_argument("--max-new-tokens", type=int, help="longest answer, in tokens; default: the benchmark's")
    models.add_argument("--token-budget", type=int, default=98_304, help="rows x longest row of a batch")
    shared = argparse.ArgumentParser(add_help=False, parents=[models])
    shared.add_argument("--adapter", nargs="+", default=[], metavar="RUN", help="runs, or folders such as RUN/best")
    shared.add_argument("--limit", type=int, help="at most so many prompts (heldout: documents, default 64)")
    shared.add_argument(
        "--judge", metavar="MODEL", help="any model; default: the base model. With --judge-url its name"
    )
    shared.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint; key: JUDGE_API_KEY")
    shared.add_argument("--output", metavar="FOLDER", help="default: runs/eval-BENCHMARK-MODEL-PRECISION")

    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(required=True, metavar="COMMAND")
    for name, bench in BENCHMARKS.items():
        command = commands.add_parser(name, help=bench.about, description=bench.about, parents=[shared])
        command.set_defaults(run=evaluate, bench=name, data=None, task=None, corpus=None)
        if name == "heldout":
            command.add_argument("--task", choices=list(HUB_CORPORA), help="default: the adapter's")
            command.add_argument("--corpus", help="as for pop.py; default: the adapter's")
        else:
            command.add_argument("--data", metavar="FILE", help="a file of your own, or hub; default: the packaged set")
        if name == "writing":
            command.add_argument("--lang", choices=["en", "zh"], help="only prompts in this language")
    command = commands.add_parser("compare", help=compare.__doc__, description=compare.__doc__)
    command.add_argument("folders", nargs="+", metavar="FOLDER", help="of an evaluation")
    command.set_defaults(run=compare)
    command = commands.add_parser("chat", help=chat.__doc__, description=chat.__doc__, parents=[models])
    command.add_argument("--adapter", nargs=1, required=True, metavar="RUN", help="a run, or a folder such as RUN/best")
    command.set_defaults(run=chat)

    command = commands.add_parser("audit", help=audit.__doc__, description=audit.__doc__)
    command.add_argument("--preset", choices=list(config.PRESETS), help="settings to start from; default: by hardware")
    command.add_argument("--model", help="as for pop.py; default: the preset's")
    command.add_argument("--judge", choices=["generate", "logits"], help="default: the preset's")
    command.add_argument("--task", choices=list(HUB_CORPORA), default="instructions")
    command.add_argument("--corpus", help="as for pop.py: its held-out documents are used; default: the preset's")
    command.add_argument("--documents", type=int, default=12)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", help="the JSON file; default: runs/audit-MODEL-TASK-JUDGE.json")
    command.set_defaults(run=audit)
    return main


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: what was answered and judged is on disk, the same command goes on")
