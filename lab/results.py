"""What an evaluation comes to: metrics with intervals, paired differences to the base model, and a table to read."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sets import Scores
from data import UserError
from engine import stats


def summary(
    metrics: Mapping[str, stats.Clip],
    answers: Mapping[str, Mapping[str, Mapping[str, Any]]],
    scores: Mapping[str, Mapping[str, Scores]],
) -> dict[str, Any]:
    """Every metric of every model, and its paired difference to that of the model `base`.

    metrics: the main one first, with its clip. answers, scores: model -> item -> answer, score; the same items for all.
    """
    main = next(iter(metrics))
    arrays = {
        model: {name: np.array([score[name] for score in each.values()]) for name in metrics}  # (items, columns, 2)
        for model, each in scores.items()
    }
    models: dict[str, Any] = {}
    for model, own in answers.items():
        differences = (
            {}
            if model == "base"
            else {
                name: stats.difference(arrays["base"][name], arrays[model][name], clip)
                for name, clip in metrics.items()
            }
        )
        models[model] = {
            "metrics": {name: asdict(stats.interval(arrays[model][name], clip)) for name, clip in metrics.items()},
            "difference": {name: {**asdict(d), "said": stats.sentence(d)} for name, d in differences.items()},
            "unjudged": int(np.isnan(arrays[model][main]).any((1, 2)).sum()),
            "mean_words": statistics.fmean(answer["words"] for answer in own.values()),
            "mean_tokens": statistics.fmean(answer["tokens"] for answer in own.values()),
            "cut_off": statistics.fmean(not answer["finished"] for answer in own.values()),
        }
        if main == "win_rate" and model != "base":
            lengths, base = (np.array([a["tokens"] for a in answers[m].values()], float) for m in (model, "base"))
            controlled = stats.length_controlled(arrays[model][main][:, 0, 0], lengths, base)
            models[model]["metrics"]["length_controlled"] = asdict(controlled)
    return without_nan({"items": len(scores["base"]), "models": models, "scores": scores})


def without_nan(record: Any) -> Any:
    """None instead of NaN, which JSON does not have."""
    if isinstance(record, Mapping):
        return {name: without_nan(value) for name, value in record.items()}
    if isinstance(record, list | tuple):
        return [without_nan(value) for value in record]
    return None if isinstance(record, float) and math.isnan(record) else record


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results of one benchmark in Markdown: a row for each model, metrics with [95% intervals]."""
    names = list(dict.fromkeys(name for r in results for m in r["models"].values() for name in m["metrics"]))
    head = ["model", "judge", "items", *names, f"{names[0]} - base", "p", "words", "tokens", "cut off", "unjudged"]
    rows = [
        {
            "model": f"{r['model']} ({r['load_in']})" if model == "base" else model,
            "judge": r["judge"] or "",
            "items": str(r["items"]),
            **{name: estimate(m["metrics"].get(name)) for name in names},
            f"{names[0]} - base": estimate(m["difference"].get(names[0]), "+"),
            "p": f"{d['p']:.2g}" if (d := m["difference"].get(names[0])) and d["p"] is not None else "",
            "words": f"{m['mean_words']:.0f}",
            "tokens": f"{m['mean_tokens']:.0f}",
            "cut off": f"{m['cut_off']:.0%}",
            "unjudged": str(m["unjudged"]) if r["judge"] else "",
        }
        for r in results
        for model, m in r["models"].items()
    ]
    filled = [name for name in head if any(row[name] for row in rows)]
    return stats.aligned([filled, *([row[name] for name in filled] for row in rows)])


def estimate(e: Mapping[str, Any] | None, sign: str = "") -> str:
    if e is None or e["value"] is None:
        return ""
    interval = "" if e["low"] is None else f" [{e['low']:{sign}.3f}, {e['high']:{sign}.3f}]"
    return f"{e['value']:{sign}.3f}{interval}"


def sentences(result: dict[str, Any]) -> list[str]:
    """What the differences say, and what was left unjudged."""
    said = [
        f"{model}, {name} against base: {d['said']}"
        for model, m in result["models"].items()
        for name, d in m["difference"].items()
    ]
    if unjudged := sum(m["unjudged"] for m in result["models"].values()):
        said.append(f"{unjudged} answers are unjudged and left out; the same command asks for them again")
    return said


def side_by_side(folders: Sequence[Path]) -> str:
    """Finished evaluations, a table for each benchmark. Raises UserError if a folder has none."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        paths = sorted(folder.glob("results*.json"))
        if not paths:
            raise UserError(f"{folder}: no finished evaluation there (no results*.json)")
        for path in paths:
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                groups.setdefault(result["benchmark"], []).append(result)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{path} cannot be read ({error}): run that evaluation again") from None
    return "\n\n".join(
        "\n".join(
            [
                f"{benchmark} ({'; '.join(dict.fromkeys(r['sampling'] for r in group))})",
                table(group),
                *(line for result in group for line in sentences(result)),
            ]
        )
        for benchmark, group in groups.items()
    )
