"""What an evaluation comes to: metrics with intervals, paired differences to the base model, and a table to read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.sets import Benchmark, Scores
from data import UserError
from engine import stats


def summary(
    bench: Benchmark,
    answers: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Scores]],
    against_base: bool = True,
) -> dict[str, Any]:
    """Every metric of every model, and its paired difference to that of the model `base`. As in JSON, NaN is None.

    answers, scores: model -> item -> answer, score; the same items for all models. against_base: it is over the base's
    answers that wins are counted, so that they are known at equal lengths too.
    """

    def array(model: str, name: str) -> np.ndarray:  # (items, columns, 2)
        return np.array([score[name] for score in scores[model].values()])

    models = {}
    for model, own in answers.items():
        found = {name: asdict(stats.interval(array(model, name), bench.clip)) for name in bench.metrics}
        differences = {}
        for name in bench.metrics if model != "base" else ():
            d = stats.difference(array("base", name), array(model, name), bench.clip)
            differences[name] = asdict(d) | {"said": stats.sentence(d)}
        if "win_rate" in differences and against_base:
            lengths, base = (np.array([a["tokens"] for a in answers[m].values()], float) for m in (model, "base"))
            won, games = array(model, "win_rate")[:, 0].T
            wins = won / games
            found["length_controlled"] = asdict(stats.length_controlled(wins, lengths, base))
        first, *others = (array(model, name) for name in bench.metrics)
        judged = [first, *(scored for scored in others if not np.isnan(scored).all())]  # others were not asked about
        models[model] = {
            "metrics": found,
            "difference": differences,
            "unjudged": int(np.any([np.isnan(scored).any((1, 2)) for scored in judged], axis=0).sum()),
            "mean_words": fmean(a["words"] for a in own.values()),
            "mean_tokens": fmean(a["tokens"] for a in own.values()),
            "cut_off": fmean(not a["finished"] for a in own.values()),
        }
    result = {"items": len(scores["base"]), "models": models, "scores": scores}
    return json.loads(json.dumps(result), parse_constant=lambda _: None)


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Results of one benchmark: a table with a row for each model, then what the differences say."""
    names = list(dict.fromkeys(name for r in results for m in r["models"].values() for name in m["metrics"]))
    rows, said = [], []
    for r in results:
        for model, m in r["models"].items():
            d, name = m["difference"].get(names[0]), f"{r['model']} ({r['load_in']})" if model == "base" else model
            row = {"model": name, "judge": r["judge"] or "", "items": str(r["items"])}
            row |= {name: estimate(m["metrics"].get(name)) for name in names}
            row |= {f"{names[0]} - base": estimate(d, "+"), "p": f"{d['p']:.2g}" if d and d["p"] is not None else ""}
            row |= {"words": f"{m['mean_words']:.0f}", "tokens": f"{m['mean_tokens']:.0f}"}
            rows.append(row | {"cut off": f"{m['cut_off']:.0%}", "unjudged": str(m["unjudged"]) if r["judge"] else ""})
            said += [f"{model}, {name} against base: {d['said']}" for name, d in m["difference"].items() if d["n"]]
        if unjudged := sum(m["unjudged"] for m in r["models"].values()):
            said.append(f"{unjudged} answers are unjudged and left out; the same command asks for them again")
    head = [name for name in rows[0] if any(row[name] for row in rows)]
    return "\n".join([stats.aligned([head, *([row[name] for name in head] for row in rows)]), *said])


def estimate(e: Mapping[str, Any] | None, sign: str = "") -> str:
    if e is None or e["value"] is None:
        return ""
    return f"{e['value']:{sign}.3f}" + ("" if e["low"] is None else f" [{e['low']:{sign}.3f}, {e['high']:{sign}.3f}]")


def finished(folder: Path) -> list[dict[str, Any]]:
    """The results in an evaluation's folder. Raises UserError if there are none, or one cannot be read."""
    if not (paths := sorted(folder.glob("results*.json"))):
        raise UserError(f"{folder}: no finished evaluation there (no results*.json)")
    found = []
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            found.append({name: result[name] for name in ("benchmark", "data")} | result)  # these all have
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}): run that evaluation again") from None
    return found


def side_by_side(folders: Sequence[Path]) -> str:
    """Finished evaluations, a table for each benchmark. Raises UserError if a folder has none."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        for result in finished(folder):
            data = "" if result["data"] == "packaged" else f" {result['data']}"
            groups.setdefault(result["benchmark"] + data, []).append(result)
    return "\n\n".join(
        f"{benchmark} ({'; '.join(dict.fromkeys(r['sampling'] for r in group))})\n{as_markdown(group)}"
        for benchmark, group in groups.items()
    )
