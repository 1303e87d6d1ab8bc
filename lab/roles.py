"""Measurements that are too slow for the tests: `python measure.py roles` and `python measure.py full-size`."""

import argparse
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import data
import model
import pop
import rubric
from data import HUB_CORPORA, Document, UserError
from engine import fast
from lab import plan
from lab.plan import GIB, Batch, PeakMemory, Shapes
from rubric import Criterion, Episode, content_words

T = TypeVar("T")

# --------------------------------------------------------------------------------------------------- full-size

PROBLEM = "Why does bread dough rise before it is baked, and what becomes of the gas in the oven?"
RUBRIC = [
    Criterion("Source of the gas", "yeast ferments sugar", "Says that yeast turns sugar into carbon dioxide.", 3.0),
    Criterion("Heat", "the gas expands", "Says that the gas expands in the oven until the crumb sets.", 2.0),
]


def full_size(args: argparse.Namespace, _: Sequence[str] = ()) -> None:
    """A model's shapes with random weights, in 4 bits through solve, judge and update: predicted and measured."""
    if args.model not in plan.KNOWN:  # its own weights
        compare(args.model, plan.shapes_of(args.model), args)
        return
    shapes = plan.KNOWN[args.model]
    shapes = replace(shapes, layers=args.layers or shapes.layers)
    folder = Path(tempfile.mkdtemp(prefix="pop-full-size-", dir=args.folder))
    try:
        start = time.perf_counter()
        write_checkpoint(folder, shapes)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"wrote {shapes.params:,} random parameters to {folder}: {size / GIB:.1f} GiB, {since(start)}")
        compare(str(folder), shapes, args)
    finally:
        if not args.keep:
            shutil.rmtree(folder)


def compare(source: str, shapes: Shapes, args: argparse.Namespace) -> None:
    """One training step on a fixed problem and rubric, and the peak of each phase beside its prediction.

    Models below 1 B are taken through it as the demo does it, others as a GPU preset does.
    """
    small = shapes.params < 1e9
    cfg = replace(
        pop.Config(),
        judge="logits",
        documents=1,
        oversample=1.0,
        group_size=args.answers,
        max_new_tokens=args.new_tokens,
        steps=1,
        recompute=not small,
    )
    measured: dict[str, int] = {}

    def phase(name: str, run: Callable[[], T]) -> T:
        start = time.perf_counter()
        with PeakMemory() as memory:
            result = run()
        measured[name] = memory.peak
        print(f"{name}: peak {memory.peak / GIB:.2f} GiB, {since(start)}", flush=True)
        return result

    llm = phase(
        "load",
        lambda: model.load(source, lora_r=cfg.lora_r, dequantize=small, recompute=cfg.recompute),
    )
    optimizer, scheduler = pop.make_optimizer(llm, cfg)
    episode = Episode(Document("made up", ""), problem=PROBLEM, rubric=RUBRIC)
    phase("solve", lambda: rubric.solve(llm, [episode], cfg))
    phase("judge", lambda: rubric.judge(llm, [episode], cfg))
    pop.grade([episode], cfg)
    ratings = [[round(rating, 3) for rating in answer.ratings or []] for answer in episode.answers]
    print(f"ratings {ratings}, advantages {[round(answer.advantage, 4) for answer in episode.answers]}")
    if episode.drop:
        print(f"dropped as {episode.drop}, which random weights may be: the update gets advantages +1, -1, ...")
        episode.drop = None
        for i, answer in enumerate(episode.answers):
            answer.advantage = (-1.0) ** i
    phase("update", lambda: pop.update(llm, optimizer, scheduler, [episode], cfg))

    prompt, lengths = len(episode.prompt_ids), [len(answer.ids) for answer in episode.answers]
    judged = [llm.encode("", rubric.rate_prompt(PROBLEM, c, answer.text)) for answer in episode.answers for c in RUBRIC]
    shared = fast.shared_prefixes(judged)
    rest = max(len(judged[i]) - common for members, common in shared for i in members)
    work = {
        "solve": Batch(1, prompt, max(lengths), cfg.group_size),
        "judge": Batch(
            min(len(judged), max(1, llm.prefill_tokens // rest)), max(map(len, judged)), 0, 1, rest, len(shared)
        ),
        "update": Batch(1, prompt, round(statistics.fmean(lengths)), cfg.group_size),
    }
    device: plan.Device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = plan.predict(
        shapes,
        work,
        device=device,
        lora_r=cfg.lora_r,
        trained=False,
        dequantize=small,
        recompute=cfg.recompute,
    )
    print(f"\nlengths: {work}\n\nphase   predicted  measured GiB  measured / predicted")
    for name, peak in measured.items():
        ratio = peak / expected[name]
        print(f"{name:<8}{expected[name] / GIB:9.2f} {peak / GIB:9.2f}     {ratio:8.3f}", flush=True)
    off = {name for name, peak in measured.items() if abs(peak / expected[name] - 1) > 0.1}
    if off:
        raise UserError(f"more than 10% from the plan: {', '.join(sorted(off))}")


def write_checkpoint(folder: Path, shapes: Shapes) -> None:
    """A sharded bf16 checkpoint of a Qwen2 with random weights (std 0.02), one shard in memory at a time."""
    config = AutoConfig.for_model(
        "qwen2",
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        hidden_size=shapes.hidden,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        intermediate_size=shapes.intermediate,
        vocab_size=shapes.vocab,
        tie_word_embeddings=shapes.tied,
    )
    config.save_pretrained(folder)
    tokenizer = Path(loading.resolve("smollm2"))  # any will do: the ids past its vocabulary decode to nothing
    for file in [*tokenizer.glob("*token*"), *tokenizer.glob("*.jinja"), *tokenizer.glob("*merges*")]:
        shutil.copy(file, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "pad_token_id": 2}))
    generator = torch.Generator().manual_seed(0)
    shards = list(checkpoint_shards(shapes))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1 and "norm" in name
            else torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, size in names.items()
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(names, shard)
    total = 2 * shapes.params
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)


def checkpoint_shards(shapes: Shapes, layers_a_shard: int = 4) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes of the tensors of each shard, at most 2 GB for Qwen2.5-7B."""
    yield {"model.embed_tokens.weight": (shapes.vocab, shapes.hidden)}
    for first in range(0, shapes.layers, layers_a_shard):
        shard: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + layers_a_shard, shapes.layers)):
            names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
            for name, (inputs, outputs) in zip(names, shapes.linears, strict=True):
                shard[f"model.layers.{layer}.{name}.weight"] = (outputs, inputs)
                if name[-6] in "qkv" and shapes.qkv_bias:
                    shard[f"model.layers.{layer}.{name}.bias"] = (outputs,)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"model.layers.{layer}.{norm}.weight"] = (shapes.hidden,)
        yield shard
    yield {"model.norm.weight": (shapes.hidden,)} | (
        {} if shapes.tied else {"lm_head.weight": (shapes.vocab, shapes.hidden)}
    )


# ------------------------------------------------------------------------------------------------------- roles


def roles(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """What each role writes with a preset's settings, how much of it is usable, and every text of it in a file."""
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    base = pop.parse_args(["--preset", args.preset, "--model", args.model, *flags])
    # On a CPU, which has room, generating from 4 bits would take most of the time.
    held = plan.dequantizes(base) or (base.dequantize == "auto" and not torch.cuda.is_available())
    llm = model.load(base.model, load_in=base.load_in, token_budget=base.rollout_tokens, dequantize=held)
    for task in args.tasks:
        cfg = pop.parse_args(["--preset", args.preset, "--model", args.model, "--task", task, *flags])
        torch.manual_seed(cfg.seed)
        corpus = pop.open_corpus(replace(cfg, corpus=cfg.corpus or "samples"))
        start = time.perf_counter()
        path = out / f"{task}.jsonl"
        episodes, above = play(llm, list(islice(corpus.epoch(0), args.documents)), cfg, path)
        print(f"\n== {task}: {len(episodes)} documents, {since(start)}; all texts in {path}")
        for name, value in numbers(episodes, above).items():
            print(f"{name:48} {value}", flush=True)


def play(llm: model.LLM, documents: list[Document], cfg: pop.Config, path: Path) -> tuple[list[Episode], list[bool]]:
    """A step of the self-play; and for each problem, by its first rubric, whether its own reference is graded above the
    reference of another. The texts are written to `path` after each phase."""
    episodes = rubric.propose(llm, documents, cfg, random.Random(cfg.seed))
    path.write_text(data.json_lines(episodes), encoding="utf-8")
    for phase in (rubric.solve, rubric.write_rubrics, rubric.judge):
        phase(llm, pop.alive(episodes), cfg)
        path.write_text(data.json_lines(episodes), encoding="utf-8")
    graded = [[rubric.grade(a.ratings, e.rubric) for a in e.controls if a.ratings] for e in pop.alive(episodes)]
    rubric.check_rubrics(llm, pop.alive(episodes), cfg)
    for e in pop.alive(episodes):
        for a in e.answers:
            rubric.reward(a, e, cfg)
    path.write_text(data.json_lines(episodes), encoding="utf-8")
    return episodes, [both[0] > both[1] for both in graded if len(both) == 2]


def numbers(episodes: Sequence[Episode], above: Sequence[bool]) -> dict[str, str]:
    """The figures of one task, from what was written down. above: of each comparison, whether it came out right."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for e in episodes:
        for failure in e.failures:
            reasons[failure["role"]][failure["reason"]] += 1
    proposed = [e for e in episodes if e.reference]
    with_rubric = [e for e in proposed if not (e.drop or "").startswith("rubric/")]
    first = [e for e in proposed if not any(f["role"] == "proposer" for f in e.failures)]
    gated = sum(n for reason, n in reasons["proposer"].items() if reason.startswith("gate"))
    reached = gated + len(proposed) + sum(n for why, n in reasons["proposer"].items() if why.startswith("reference"))
    criteria = [(e, c) for e in with_rubric for c in e.rubric]
    golds = [(e, c) for e, c in criteria if c.gold != rubric.NO_GOLD]
    found = [known(content_words(c.gold), content_words(e.document.text)) for e, c in golds]
    named = [
        len(content_words(f"{c.name} {c.description} {c.gold}") & content_words(f"{e.problem} {e.document.text}")) > 1
        for e, c in criteria
    ]
    judged = [e for e in with_rubric if e.answers]
    grades = [[a.grade for a in e.answers if a.grade is not None] for e in judged]
    pairs = [abs(a - b) for each in grades for a, b in combinations(each, 2)]
    digits = [abs(a - b) for e in judged for a, b in combinations([rounded(a, e) for a in e.answers if a.ratings], 2)]
    read = [a.ratings is not None for e in judged for a in [*e.answers, *e.controls]]
    spread = [statistics.pstdev(each) for each in grades if len(each) > 1]
    return {
        "proposals accepted at the first try": share(len(first), len(episodes)),
        "proposals accepted after all tries": share(len(proposed), len(episodes)),
        "of the problems that came to the gate, passed": share(reached - gated, reached),
        "proposals rejected": str(dict(reasons["proposer"])),
        "rubrics accepted": share(len(with_rubric), len(proposed)),
        "rubrics rejected": str(dict(reasons["rubric"])),
        "criteria of a rubric, mean": f"{len(criteria) / max(1, len(with_rubric)):.1f}",
        "criteria that name things of problem or document": share(sum(named), len(named)),
        "criteria with a gold answer": share(len(golds), len(criteria)),
        "golds that are found in the document": share(sum(found), len(found)),
        "judge's replies that could be read": share(sum(read), len(read)),
        "pairs of answers with one grade": share(sum(gap < 1e-3 for gap in pairs), len(pairs)),
        "the same, were ratings whole numbers": share(sum(gap < 1e-3 for gap in digits), len(digits)),
        "groups with spread": share(sum(s > pop.ZERO_SPREAD for s in spread), len(judged)),
        "spread within a group, mean": f"{statistics.fmean(spread):.3f}" if spread else "-",
        "reference above another document's": share(sum(above), len(above)),
    }


def known(gold: set[str], document: set[str]) -> bool:
    """Whether most of a gold answer's words stand in the document."""
    return len(gold & document) >= 0.6 * len(gold)


def rounded(answer: rubric.Answer, episode: Episode) -> float:
    return rubric.grade([round(rating) for rating in answer.ratings or []], episode.rubric)


def share(part: int, whole: int) -> str:
    if not whole:
        return "-"
    low, high = wilson(part, whole)
    return f"{part} of {whole}, {part / whole:.0%} (95%: {low:.0%} to {high:.0%})"


def wilson(part: int, whole: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    p, n = part / whole, whole
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def since(start: float) -> str:
    return f"{time.perf_counter() - start:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("full-size", help=full_size.__doc__)
    command.add_argument(
        "--model", default="Qwen/Qwen2.5-7B", help="shapes the plan knows, or smollm2 with its weights"
    )
    command.add_argument("--layers", type=int, help="fewer, to try it out")
    command.add_argument("--answers", type=int, default=2, help="answers to the problem (G)")
    command.add_argument("--new-tokens", type=int, default=8, help="length of an answer")
    command.add_argument("--folder", help="where to write the checkpoint (15 GB); default: the temporary folder")
    command.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    command.set_defaults(run=full_size)
    command = commands.add_parser("roles", help=roles.__doc__, epilog="Further flags are those of pop.py.")
    command.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct")
    command.add_argument("--preset", default="24gb", help="whose settings to take")
    command.add_argument("--documents", type=int, default=12, help="of each task's samples, or of --corpus")
    command.add_argument("--tasks", nargs="+", default=list(HUB_CORPORA), choices=list(HUB_CORPORA))
    command.add_argument("--output", default="roles", help="folder for the texts")
    command.set_defaults(run=roles)
    args, flags = parser.parse_known_args()
    if flags and args.run is not roles:
        parser.error(f"unknown: {' '.join(flags)}")
    try:
        args.run(args, flags)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
