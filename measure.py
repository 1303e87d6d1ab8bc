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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import fast
import heldout
import model
import plan
import pop
import rubric
from data import Corpus, Document, UserError
from plan import GIB, Batch, PeakMemory, Shapes
from rubric import Criterion, Episode

T = TypeVar("T")

WRONG = 3  # other documents' references that a reference is held against

# --------------------------------------------------------------------------------------------------- full-size

PROBLEM = "Why does bread dough rise before it is baked, and what becomes of the gas in the oven?"
RUBRIC = [
    Criterion("Source of the gas", "yeast ferments sugar", "Says that yeast turns sugar into carbon dioxide.", 3.0),
    Criterion("Heat", "the gas expands", "Says that the gas expands in the oven until the crumb sets.", 2.0),
]


def full_size(args: argparse.Namespace) -> None:
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
    shared = fast.shared_beginnings(judged)
    rest = max(len(judged[i]) - common for members, common in shared for i in members)
    work = {
        "solve": Batch(1, prompt, max(lengths), cfg.group_size),
        "judge": Batch(
            min(len(judged), max(1, llm.read_tokens // rest)), max(map(len, judged)), 0, 1, rest, len(shared)
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
    tokenizer = Path(model.resolve("smollm2"))  # any will do: the ids past its vocabulary decode to nothing
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


def roles(args: argparse.Namespace) -> None:
    """How often each role's output is usable, and whether the judge tells a reference from a wrong one."""
    llm = model.load(args.model, token_budget=16_384, dequantize=True)
    done: list[Episode] = []
    preferred: list[float] = []
    counts: Counter[str] = Counter()
    for task in ("instructions", "health", "writing"):
        overrides: dict[str, Any] = {**pop.PRESETS["demo"], "task": task, "group_size": 2, "model": args.model}
        cfg = pop.Config(**overrides)
        torch.manual_seed(args.seed)
        corpus = Corpus("samples", task=task, max_words=cfg.max_words, seed=args.seed)
        documents = list(islice(corpus.epoch(0), args.documents))
        episodes = rubric.propose(llm, documents, cfg, random.Random(args.seed))
        rubric.solve(llm, pop.alive(episodes), cfg)
        asked = pop.alive(episodes)
        rubric.write_rubrics(llm, asked, cfg)
        kept = pop.alive(asked)
        counts.update(
            {f"{task} documents": len(documents), f"{task} proposed": len(asked), f"{task} rubrics": len(kept)}
        )
        for e in kept:
            e.answers = e.answers[:1]  # one is enough for the judge's yield
        for mode in ("generate", "logits"):
            for e in kept:
                e.answers[0].ratings = None
            rubric.judge(llm, kept, replace(cfg, judge=mode))
            counts[f"{task} {mode}"] = sum(e.answers[0].ratings is not None for e in kept)
        for e in kept:
            print(described(e), end="\n\n", flush=True)
        done += kept
        preferred += wrong_references(llm, kept)
        rejected = Counter(f"{f['role']}: {f['reason']}" for e in episodes for f in e.failures)
        print(f"== {task}, rejected attempts: {dict(rejected)}", flush=True)

    def total(what: str) -> int:
        return sum(counts[f"{task} {what}"] for task in ("instructions", "health", "writing"))

    def share(name: str, part: int, whole: int) -> None:
        low, high = wilson(part, whole)
        print(f"{name:34} {part:>4} of {whole:<4} {part / whole:7.1%}  (95%: {low:.0%} to {high:.0%})")

    share("proposer, after retries", total("proposed"), total("documents"))
    share("rubric writer", total("rubrics"), total("proposed"))
    share("judge generate, after the retry", total("generate"), total("rubrics"))
    share("judge logits", total("logits"), total("rubrics"))
    print(f"criteria of a rubric, median       {statistics.median(len(e.rubric) for e in done):g}")
    sense = heldout.interval(preferred)
    print(f"reference above {WRONG} others, of {len(preferred)} problems {sense['mean']:11.1%}", end="")
    print(f"  (95%: {sense['low']:.0%} to {sense['high']:.0%})")


def wrong_references(llm: model.LLM, episodes: list[Episode]) -> list[float]:
    """Grade each reference, and those of WRONG other documents, as answers to the same problem (judge: logits).

    Returns for each episode the share of the others that its own reference is graded above.
    """
    pairs = []
    for i, e in enumerate(episodes):
        others = [episodes[(i + k) % len(episodes)] for k in range(1, WRONG + 1)]
        pairs.append([(e, rubric.Answer(other.reference)) for other in [e, *others]])
    with llm.adapters_off():
        rubric.judge_by_logits(llm, [pair for group in pairs for pair in group], pop.Config())
    shares = []
    for group in pairs:
        right, *wrong = [rubric.grade(answer.ratings or [], e.rubric) for e, answer in group]
        shares.append(statistics.fmean(right > grade for grade in wrong))
    return shares


def described(episode: Episode) -> str:
    lines = [f"{episode.document.id}", f"problem    {episode.problem}", f"reference  {episode.reference}"]
    lines += [f"criterion  [{c.weight:g}] {c.name}: {c.description} (gold: {c.gold})" for c in episode.rubric]
    for a in episode.answers:
        lines.append(f"answer     {[round(r, 2) for r in a.ratings or []]} {' '.join(a.text.split())[:200]}")
    return "\n".join("    " + line for line in lines)


def wilson(part: int, whole: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    p, n = part / whole, whole
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


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
    command = commands.add_parser("roles", help=roles.__doc__)
    command.add_argument("--documents", type=int, default=20, help="of each task's samples")
    command.add_argument("--model", default="smollm2")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=roles)
    args = parser.parse_args()
    try:
        args.run(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
