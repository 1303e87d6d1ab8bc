"""Did it get better, by someone else's measure? `python eval.py BENCHMARK --model M --adapter RUN ...`.

Benchmarks: ifeval, healthbench, writing, heldout, winrate. Besides: `audit` holds the reward against cheap tricks,
`compare` puts finished evaluations side by side, `chat` talks to the base and the trained model at once.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import data
import model
import rubric
from benchmarks import results
from benchmarks.baselines import PUBLISHED
from benchmarks.judges import EndpointJudge, LocalJudge, Question, Value, Verdict
from benchmarks.sets import BENCHMARKS, Item, Messages, heldout_items
from config import PRESETS, TASKS, Config, pick_preset, settings_of
from data import HUB_CORPORA, UserError, read_episodes, read_lines
from engine import audit, checkpoint, heldout, loading, runlog, sources
from engine.signals import survive_closed_output
from model import LLM, Completion

AGAIN = "the same command"  # goes on where an evaluation ended
TOKEN_BUDGET = 98_304  # rows x longest row of a batch, at first: generate halves it where memory runs out
CHUNK = 64  # prompts that are answered before their answers are written down
DOCUMENTS = 32  # documents whose problems are written side by side


@dataclass(frozen=True)
class Adapter:
    """A trained adapter. `label` names its files and rows; with a part of its checksum, since a run may go on."""

    label: str
    folder: Path
    run: Path | None
    base: str


def find_adapter(name: str) -> Adapter:
    """name: a run's folder, whose adapter/ is taken, or one with an adapter in it, such as RUN/best."""
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


def configure(args: argparse.Namespace, names: Sequence[str], run: Path | None = None) -> Config:
    """What the run was made with or, without one, what suits this machine and the task; --preset and the flags of these
    names win over both."""
    stored = settings_of(run) if run else {}
    preset = args.preset or stored.get("preset") or pick_preset()[0]
    settings = TASKS.get(args.task, {}) | PRESETS.get(preset, {}) | stored | PRESETS.get(args.preset, {})
    flags = {name: value for name in names if (value := getattr(args, name)) is not None}
    return Config(**settings | flags | {"preset": preset})


def settle(args: argparse.Namespace) -> list[Adapter]:
    """Fill in what was left open, and return the adapters. Raises UserError if one was trained on another model."""
    adapters = [find_adapter(name) for name in args.adapter]
    if len({a.label for a in adapters}) < len(adapters):
        raise UserError("--adapter: the same adapter twice")
    run = adapters[0].run if adapters else None
    args.config = configure(args, ("model", "load_in", "task", "corpus", "seed"), run)
    args.model, args.load_in = args.config.model, args.config.load_in
    for adapter in adapters:
        if Path(adapter.base).name != Path(loading.resolve(args.model)).name:
            raise UserError(f"adapter {adapter.folder} was trained on {adapter.base}, not on --model {args.model}")
    return adapters


def load_model(name: str, cfg: Config, token_budget: int = TOKEN_BUDGET) -> LLM:
    return model.load(name, **cfg.loading, token_budget=token_budget)


def written(path: Path) -> list[dict[str, Any]]:
    return list(read_lines(path)) if path.exists() else []


def replies(llm: LLM, conversations: Sequence[Messages], args: argparse.Namespace, desc: str) -> list[Completion]:
    prompts = [llm.encode_messages(messages) for messages in conversations]
    outputs = llm.generate(prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature, desc=desc)
    return [completion for (completion,) in outputs]


def answers_of(llm: LLM, items: Sequence[Item], label: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """item id -> text, tokens, words, finished; those on disk are read, the others generated and appended. Thoughts
    stay there: nobody judges or counts them."""
    path = args.folder / f"answers-{label}.jsonl"
    asked = {item.id: digest(item.messages) for item in items}
    had = {r["id"]: r for r in written(path) if asked.get(r["id"]) == r["asked"]}
    todo = [item for item in items if item.id not in had]
    for start in tqdm(range(0, len(todo), CHUNK), desc=f"answers of {label}", unit="prompt", unit_scale=CHUNK):
        chunk = todo[start : start + CHUNK]
        torch.manual_seed(int(digest(args.seed, *(item.id for item in chunk)), 16) % 2**63)
        outputs = replies(llm, [i.messages for i in chunk], args, "answer")
        measured = BENCHMARKS[args.bench].measured(llm, chunk)
        for item, c, more in zip(chunk, outputs, measured, strict=True):
            counts = {"tokens": len(c.ids), "words": len(rubric.final_answer(c.text).split()), "finished": c.finished}
            had[item.id] = {"id": item.id, "asked": asked[item.id], "text": c.text, **counts, **more}
        runlog.append(path, *(had[item.id] for item in chunk), again=AGAIN)
    return {item.id: {**had[item.id], "text": rubric.final_answer(had[item.id]["text"])} for item in items}


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def fitting(llm: LLM, items: Sequence[Item], max_new_tokens: int) -> list[Item]:
    """The items whose prompt leaves room for an answer in the model's context; the others are named."""
    fit = [item for item in items if len(llm.encode_messages(item.messages)) + max_new_tokens <= llm.context]
    if left := [item.id for item in items if item not in fit]:
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        tqdm.write(f"{len(left)} prompts leave no room for {max_new_tokens} tokens in the context: left out ({shown})")
    if not fit:
        raise UserError(f"no prompt leaves room for an answer: lower --max-new-tokens {max_new_tokens}")
    return fit


def texts_seen(adapter: Adapter, run: Path) -> set[str]:
    """The documents that an adapter of a run was trained on or, such as RUN/best, chosen by."""
    chosen_by = [] if adapter.folder.name == "adapter" else written(run / "heldout.jsonl")
    try:
        return {e["document"]["text"] for e in chain(read_lines(run / "episodes.jsonl"), chosen_by)}
    except FileNotFoundError:
        raise UserError(f"--adapter {run}: it has no episodes.jsonl, which tells what documents it has seen") from None


def unseen_problems(llm: LLM, adapters: Sequence[Adapter], args: argparse.Namespace) -> list[Item]:
    """The items of `heldout`: written by the base model once for this folder, from documents no adapter has seen."""
    cfg, path = args.config, args.folder / "heldout.jsonl"
    seen = {text for a in adapters if a.run for text in texts_seen(a, a.run)}
    for adapter in (a for a in adapters if not a.run):
        tqdm.write(f"{adapter.label} is no run's: that it has not seen these documents is for you to know")
    unseen = (  # adapters may have seen more or less of a document than is used here
        d
        for d in heldout.candidates(sources.open_corpus(cfg), cfg)
        if not any(d.text.startswith(text) or text.startswith(d.text) for text in seen)
    )
    documents = list(islice(unseen, args.limit or 64))
    had = read_episodes(path) if path.exists() else []
    todo = [d for d in documents if d not in [e.document for e in had]]
    for start in tqdm(range(0, len(todo), DOCUMENTS), desc="problems", unit="document", unit_scale=DOCUMENTS):
        new = heldout.make(llm, todo[start : start + DOCUMENTS], cfg)
        runlog.append(path, *map(asdict, new), again=AGAIN)
        had += new
    kept = [e for e in data.alive(had) if e.document in documents]
    print(f"{len(kept)} problems with rubrics from {len(documents)} documents, none of them trained on")
    return heldout_items(kept, heldout.yardstick(cfg), compared=args.judge not in (None, args.model))


def verdicts_of(
    judge: LocalJudge | EndpointJudge, questions: Sequence[Question], label: str, args: argparse.Namespace
) -> dict[str, Value | None]:
    """question id -> verdict, None if unjudged; those on disk are read, the others written down as they come."""
    path = args.folder / f"verdicts-{slug(judge.label)}-{label}.jsonl"
    asked = {q.id: digest(q.messages) for q in questions}
    valid = (r for r in written(path) if r["value"] is not None and asked.get(r["question"]) == r["asked"])
    values = {r["question"]: r["value"] for r in valid}
    if todo := [q for q in questions if q.id not in values]:
        print(f"{label}: {len(values)} of {len(questions)} verdicts are there, {len(todo)} to ask for")
        missing: Counter[str] = Counter()
        with tqdm(total=len(todo), desc="judge", unit="verdict", leave=False) as bar:

            def keep(verdicts: Sequence[Verdict]) -> None:
                runlog.append(path, *({**asdict(v), "asked": asked[v.question]} for v in verdicts), again=AGAIN)
                values.update({v.question: v.value for v in verdicts})
                missing.update(v.reason for v in verdicts if v.value is None)
                bar.update(len(verdicts))

            judge.ask(todo, keep)
        if missing:
            reasons = "; ".join(f"{n}x {reason}" for reason, n in missing.most_common(3))
            tqdm.write(f"{label}: {missing.total()} verdicts are missing ({reasons})")
    return values


def run_benchmark(args: argparse.Namespace) -> None:
    """Answers, verdicts and results of a benchmark; all is on disk as it comes, so that a killed one goes on."""
    bench, adapters = BENCHMARKS[args.bench], settle(args)
    check(args, adapters)
    judge: LocalJudge | EndpointJudge | None = EndpointJudge(args.judge_url, args.judge) if args.judge_url else None
    items = PUBLISHED[args.against]() if args.against else bench.items(args)
    args.data = args.against or args.data
    if args.limit and args.limit < len(items):
        random.Random(args.config.seed).shuffle(items)  # a higher limit adds to a lower one's
        items = items[: args.limit]
    for item in items[:1]:
        bench.questions(item, "an answer", "another")  # whether the judge's prompts are at hand
    args.max_new_tokens = args.max_new_tokens or bench.max_new_tokens or args.config.max_new_tokens
    args.folder = make_folder(args)
    with checkpoint.locked(args.folder):
        for file in args.folder.glob("*.jsonl"):
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # half a last line, which a killed process left
        about = f"against {args.against}" if args.against else bench.about
        print(f"{args.bench}: {about}\n{args.model} in {args.load_in}, {sampling(args)}; all in {args.folder}/")
        llm = load_model(args.model, args.config)
        items = unseen_problems(llm, adapters, args) if args.bench == "heldout" else items
        items = fitting(llm, items, args.max_new_tokens)
        with llm.adapters_off():
            answers = {"base": answers_of(llm, items, "base", args)}
        for adapter in adapters:
            llm.take_adapter(adapter.folder)
            answers[adapter.label] = answers_of(llm, items, adapter.label, args)
        if bench.judged and judge is None and args.judge in (None, args.model):
            print("the judge is the base model, which flatters what it trained (another: --judge, --judge-url)")
            judge = LocalJudge(llm, "base")
        elif bench.judged and judge is None:
            del llm  # it makes room for the judge
            gc.collect()
            torch.cuda.empty_cache()
            judge = LocalJudge(load_model(args.judge, args.config), args.judge)
        scores = {}
        for label, own in answers.items():
            asked = {i.id: bench.questions(i, own[i.id]["text"], answers["base"][i.id]["text"]) for i in items}
            values = verdicts_of(judge, [q for each in asked.values() for q in each], label, args) if judge else {}
            scores[label] = {i.id: bench.score(i, own[i.id], [values[q.id] for q in asked[i.id]]) for i in items}
        result = results.summary(bench, answers, scores, against_base=not args.against)
        result |= {"benchmark": args.bench, "model": args.model, "load_in": args.load_in, "sampling": sampling(args)}
        result |= {"data": args.data or "packaged", "judge": judge.label if judge else None}
        path = args.folder / (f"results-{slug(judge.label)}.json" if judge else "results.json")
        checkpoint.write_json(path, args.folder, result)
    print(results.as_markdown([result]), f"all numbers in {path}", sep="\n")


def check(args: argparse.Namespace, adapters: Sequence[Adapter]) -> None:
    """What can be known to fail before anything is loaded. Raises UserError."""
    if args.bench == "winrate" and not adapters and not args.against:
        raise UserError("winrate compares an adapter with the base model: give --adapter RUN, or --against")
    if args.against and args.data:
        raise UserError(f"--data {args.data}: --against {args.against} has prompts of its own")
    if getattr(args, "judge_url", None) and not args.judge:
        raise UserError("--judge-url needs --judge NAME, the model that the endpoint is to use")
    for flag, value in (("limit", getattr(args, "limit", None)), ("max-new-tokens", args.max_new_tokens)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: must be 1 or more")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature}: must be 0 (greedy) or more")


def make_folder(args: argparse.Namespace) -> Path:
    """The evaluation's folder. Raises UserError if it holds answers that were made in another way."""
    bench = "-".join(filter(None, (args.bench, args.against)))
    path = Path(args.output or f"runs/eval-{bench}-{slug(Path(args.model).name)}-{args.load_in}")
    names = ["bench", "model", "load_in", "max_new_tokens", "temperature"]
    settings = {name: getattr(args, name) for name in names} | {"seed": args.config.seed, "data": args.data}
    if args.bench == "heldout":
        settings |= {name: getattr(args.config, name) for name in ("task", "corpus", "min_words", "max_words")}
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


def run_chat(args: argparse.Namespace) -> None:
    """Talk to the base model and to an adapter side by side."""
    check(args, adapters := settle(args))
    (adapter,) = adapters
    args.max_new_tokens = args.max_new_tokens or 512
    llm = load_model(args.model, args.config)
    llm.take_adapter(adapter.folder)
    histories: dict[str, Messages] = {"base": [], adapter.label: []}
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
                    (reply,) = replies(llm, [history], args, label)
            except UserError as error:  # the conversation has outgrown the context
                print(f"{error}\n(an empty line starts anew)")
                history.pop()
                continue
            history.append({"role": "assistant", "content": reply.text})
            print(f"\n{label}: {reply.text}" + ("" if reply.finished else " ..."))


def run_audit(args: argparse.Namespace) -> None:
    """What the reward gives for a reference, a sampled answer, and answers that deserve nothing; guards off and on."""
    cfg = configure(args, ("model", "judge", "task", "corpus", "seed"))
    path = Path(args.output or f"runs/audit-{Path(cfg.model).name}-{cfg.task}-{cfg.judge}.json")
    if args.documents < 2:
        raise UserError(f"--documents {args.documents}: must be 2 or more: one gives no interval")
    checkpoint.check_writable(path)
    documents = heldout.set_aside(sources.open_corpus(cfg), args.documents, cfg)
    llm = load_model(cfg.model, cfg, cfg.rollout_tokens)
    episodes = heldout.make(llm, documents, cfg)
    kept = data.alive(episodes)
    print(f"{cfg.model}, {cfg.judge} judge: {len(kept)} problems with rubrics, from {len(episodes)} documents")
    if len(kept) < 2:
        reasons = ", ".join(e.drop for e in episodes if e.drop) or "the corpus has too few"
        raise UserError(f"--documents {args.documents}: need 2 usable ones ({reasons}); ask for more")
    result = audit.audit(llm, kept, cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, path.parent, result)
    print(audit.table(result), *audit.warnings(result), f"all numbers in {path}", sep="\n")


def parser() -> argparse.ArgumentParser:
    models = argparse.ArgumentParser(add_help=False)
    models.add_argument(
        "--preset", choices=list(PRESETS), help="whose settings to take; default: the adapter's, or by hardware"
    )
    models.add_argument("--model", help="as for pop.py; default: the adapter's, or the preset's")
    models.add_argument("--seed", type=int, default=0)
    answering = argparse.ArgumentParser(add_help=False, parents=[models])
    answering.add_argument("--load-in", choices=["4bit", "bf16", "fp32"], help="default: the adapter's or the preset's")
    answering.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    answering.add_argument("--max-new-tokens", type=int, help="longest answer, in tokens; default: the benchmark's")
    judging = argparse.ArgumentParser(add_help=False, parents=[answering])
    judging.add_argument("--adapter", nargs="+", default=[], metavar="RUN", help="runs, or folders such as RUN/best")
    judging.add_argument("--limit", type=int, help="at most so many prompts (heldout: documents, default 64)")
    judging.add_argument("--judge", metavar="MODEL", help="default: the base model. With --judge-url its name there")
    judging.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint; key: JUDGE_API_KEY")
    judging.add_argument("--output", metavar="FOLDER", help="default: runs/eval-BENCHMARK-MODEL-PRECISION")

    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str | None, *parents: Any) -> Any:
        command = commands.add_parser(name, help=about, description=about, parents=parents)
        command.set_defaults(run=run, bench=name, data=None, task=None, corpus=None, against=None)
        return command.add_argument

    for name, bench in BENCHMARKS.items():
        flag = add(name, run_benchmark, bench.about, judging)
        if name == "heldout":
            flag("--task", choices=list(HUB_CORPORA), help="default: the adapter's")
            flag("--corpus", help="as for pop.py; default: the adapter's")
        else:
            flag("--data", metavar="FILE", help="a file of your own, or hub; default: the packaged set")
        if name == "winrate":
            flag("--against", choices=list(PUBLISHED), help="published answers instead of the base model's")
        if name == "writing":
            flag("--lang", choices=["en", "zh"], help="only prompts in this language")
    together = "Finished evaluations side by side."
    flag = add("compare", lambda args: print(results.side_by_side(args.folders)), together)
    flag("folders", nargs="+", type=Path, metavar="FOLDER", help="of an evaluation")
    flag = add("chat", run_chat, run_chat.__doc__, answering)
    flag("--adapter", nargs=1, required=True, metavar="RUN", help="a run, or a folder such as RUN/best")
    flag = add("audit", run_audit, run_audit.__doc__, models)
    flag("--judge", choices=["generate", "logits"], help="default: the preset's")
    flag("--task", choices=list(HUB_CORPORA), default="instructions")
    flag("--corpus", help="as for pop.py: its held-out documents are used; default: the preset's")
    flag("--documents", type=int, default=12)
    flag("--output", help="the JSON file; default: runs/audit-MODEL-TASK-JUDGE.json")
    return main


def main(argv: Sequence[str]) -> None:
    survive_closed_output()
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: what was answered and judged is on disk, the same command goes on")
