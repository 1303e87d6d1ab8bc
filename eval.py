"""How good is the reward, and what it trained? `python eval.py audit` holds the reward against cheap tricks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoint
import heldout
import model
import pop
from data import HUB_CORPORA, UserError


def audit(args: argparse.Namespace) -> None:
    """What the reward gives for a reference, a sampled answer, and answers that deserve nothing; guards off and on."""
    preset = args.preset or pop.pick_preset()[0]
    given: dict[str, Any] = {name: getattr(args, name) for name in ("model", "judge", "task", "corpus")}
    settings = {**pop.PRESETS[preset], **{name: value for name, value in given.items() if value is not None}}
    cfg = pop.Config(**{**settings, "preset": preset, "seed": args.seed})
    path = Path(args.output or f"runs/audit-{Path(cfg.model).name}-{cfg.task}-{cfg.judge}.json")
    documents = heldout.set_aside(pop.open_corpus(cfg), args.documents, cfg)
    llm = model.load(
        cfg.model, load_in=cfg.load_in, seed=cfg.seed, token_budget=cfg.rollout_tokens, dequantize=cfg.dequantize
    )
    episodes = heldout.make(llm, documents, cfg)
    kept = heldout.alive(episodes)
    print(f"{cfg.model}, {cfg.judge} judge: {len(kept)} problems with rubrics, from {len(episodes)} documents")
    if len(kept) < 2:
        reasons = ", ".join(e.drop for e in episodes if e.drop) or "the corpus has too few"
        raise UserError(f"--documents {args.documents}: need 2 usable ones ({reasons}); ask for more")
    result = heldout.audit(llm, kept, cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, path.parent, result)
    print(heldout.table(result), *heldout.warnings(result), f"all numbers in {path}", sep="\n")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("audit", help=audit.__doc__, description=audit.__doc__)
    command.add_argument("--preset", choices=list(pop.PRESETS), help="settings to start from; default: by hardware")
    command.add_argument("--model", help="as for pop.py; default: the preset's")
    command.add_argument("--judge", choices=["generate", "logits"], help="default: the preset's")
    command.add_argument("--task", choices=list(HUB_CORPORA), default="general")
    command.add_argument("--corpus", help="as for pop.py: its held-out documents are used; default: the preset's")
    command.add_argument("--documents", type=int, default=12)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", help="the JSON file; default: runs/audit-MODEL-TASK-JUDGE.json")
    command.set_defaults(run=audit)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
