"""How fast and how large is a training step? Beside TRL's, on the same work.

    pip install trl
    python -m lab.bench           # a step of ours and of TRL's GRPOTrainer in alternation: table and JSON

Both sides solve, judge and update on the problems, rubrics and answers of docs/bench.jsonl. Answers are replayed:
generation does all its work, sampling included, but the tokens are given, so both judge and train on the same ones.
"""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data import UserError
from lab.steps import Ours, Work, alternate, figures

Theirs: Any
try:
    from lab.trl_bench import Theirs
except ImportError:
    Theirs = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    for field in fields(Work):
        flag, kind = "--" + field.name.replace("_", "-"), type(field.default)
        parser.add_argument(flag, type=kind, default=field.default)  # type: ignore[arg-type]
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    args = parser.parse_args()
    work = Work(**{field.name: getattr(args, field.name) for field in fields(Work)})
    if Theirs is None:
        sys.exit("error: TRL is not installed: pip install 'trl>=1.16'")
    try:
        results = alternate({"ours": (Ours, work), "trl": (Theirs, work)}, args.rounds)
        found = figures(results)
    except UserError as error:
        sys.exit(f"error: {error}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"work": asdict(work), "figures": found, "rounds": results}, indent=1) + "\n")
    print(f"\n{work}\n\n| figure | value |\n|---|---|")
    print(*(f"| {name} | {value:,.4g} |" for name, value in found.items()), f"\nwritten to {args.output}", sep="\n")


if __name__ == "__main__":
    main()
