"""The charts of a report: what a log, a mask, a search and a rank choice look like, and the numbers behind each."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import accumulate
from statistics import mean
from typing import Any

from sqft.pages.charts import GridCell, Point, grid_chart, line_chart
from sqft.pages.text import percent_text

Series = list[tuple[str, str, list[Point]]]


def loss(train: list[Point], held_out: list[Point]) -> str:
    """Draw the losses of training, with their moving mean, and of validation."""
    series: Series = []
    window = max(1, len(train) // 20)
    if window > 1:
        series.append(("training, each step", "raw", thin(train, 1000)))
        series.append((f"training, mean of {window // 2 * 2 + 1} steps", "main", thin(smooth(train, window), 1000)))
    elif train:
        series.append(("training", "main", train))
    if held_out:
        series.append(("validation", "held-out", held_out))
    ends = [(name, points) for name, points in (("training", train), ("validation", held_out)) if points]
    said = ", ".join(f"{name} from {points[0][1]:.3f} to {points[-1][1]:.3f}" for name, points in ends)
    return line_chart(series, f"Loss over optimiser steps: {said}", "optimiser step", "loss (nats a token)")


def thin(points: list[Point], count: int) -> list[Point]:
    """Return at most `count` evenly chosen points, the first and last among them."""
    if len(points) <= count:
        return points
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def smooth(points: list[Point], window: int) -> list[Point]:
    """Return the centred moving mean of a series, over up to `window` points."""
    half = window // 2
    return [(x, mean(y for _, y in points[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def place(names: list[str]) -> dict[str, tuple[str, int]]:
    """Return {module name: (row, layer)} for a grid.

    The layer is the first number in a name. The row is its last part, or more of it where that alone is ambiguous;
    further numbers (experts) fall together as `*`.
    """
    split: dict[str, tuple[str, int]] = {}
    for name in names:
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        rest = name[match.end() :] if match else name
        split[name] = (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", rest), int(match[1]) if match else 0)
    lasts = Counter(long.rpartition(".")[2] for long in {long for long, _ in split.values()})
    return {
        name: (_fold(last if lasts[last := long.rpartition(".")[2]] == 1 else long), layer)
        for name, (long, layer) in split.items()
    }


def _fold(name: str) -> str:
    """Shorten the name of a group: 'q_proj+k_proj+v_proj' to 'q+k+v_proj'."""
    parts = [part.rpartition("_") for part in name.split("+")]
    ends = {(dash, end) for _, dash, end in parts}
    if len(parts) == 1 or ends != {("_", parts[0][2])}:
        return name
    return "+".join(begin for begin, _, _ in parts) + f"_{parts[0][2]}"


def sparsity(layers: list[dict[str, Any]]) -> tuple[str, list[tuple[str, list[float], int]]]:
    """Return the sparsity grid, and (kind, [lowest, mean, highest], weights) for each kind of linear.

    Experts of a layer share a cell, which shows their mean.
    """
    places = place([layer["name"] for layer in layers])
    members: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    kinds: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for layer in layers:
        share = float(layer["sparsity"]), int(layer["weights"])
        members[places[layer["name"]]].append(share)
        kinds[places[layer["name"]][0]].append(share)
    cells: dict[tuple[str, int], GridCell] = {}
    for (name, index), shares in members.items():
        several = f", mean of {len(shares)}" if len(shares) > 1 else ""
        zeros = _mean(shares)
        cells[name, index] = GridCell(zeros, "", f"layer {index} {name}: {percent_text(zeros)} zero{several}")
    ends = [percent_text(end(float(layer["sparsity"]) for layer in layers)) for end in (min, max)]
    label = f"Sparsity of {len(layers)} linears by layer, from {ends[0]} to {ends[1]}"
    chart = grid_chart(cells, label, [(f"{percent} %", percent / 100) for percent in (0, 25, 50, 75, 100)])
    return chart, [
        (name, [min(shares)[0], _mean(shares), max(shares)[0]], sum(weights for _, weights in shares))
        for name, shares in kinds.items()
    ]


def _mean(shares: list[tuple[float, int]]) -> float:
    return sum(share * weights for share, weights in shares) / sum(weights for _, weights in shares)


def ranks(value: dict[str, Any]) -> tuple[str, list[tuple[str, Counter[int]]]]:
    """Return the rank grid, and how often each kind of group has which rank."""
    chosen: dict[str, int] = value["ranks"]
    shown = sorted({*value.get("choices", []), *chosen.values()}, reverse=True)
    places = place(list(chosen))
    cells: dict[tuple[str, int], GridCell] = {}
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for group, rank in chosen.items():
        members = ", ".join(value.get("groups", {}).get(group, []))
        title = f"{group}: rank {rank}" + (f" ({members})" if members else "")
        cells[places[group]] = GridCell(rank / shown[0], str(rank), title)
        counts[places[group][0]][rank] += 1
    stops = [(f"rank {rank}", rank / shown[0]) for rank in shown]
    return grid_chart(cells, f"Ranks of {len(chosen)} groups by layer", stops), list(counts.items())


def counts_text(found: Counter[int]) -> str:
    """Return '48 in 10 layers, 32 in 20 layers'."""
    return ", ".join(f"{rank} in {n} layer{'' if n == 1 else 's'}" for rank, n in sorted(found.items(), reverse=True))


def best_so_far(trials: list[dict[str, Any]]) -> list[float]:
    """Return, for each configuration in order of evaluation, the highest accuracy up to it."""
    return list(accumulate((float(trial["accuracy"]) for trial in trials), max))


def search_path(record: dict[str, Any]) -> str:
    """Draw the accuracy of each configuration in order of evaluation, and the best so far as steps."""
    trials = record["trials"]
    best = best_so_far(trials)
    steps: list[Point] = []
    for number, value in enumerate(best, 1):
        steps += [(number, steps[-1][1])] if steps else []
        steps.append((number, 100 * value))
    points = [(float(number), 100 * float(trial["accuracy"])) for number, trial in enumerate(trials, 1)]
    label = (
        f"Accuracy on the validation rows of {len(trials)} configurations in order of evaluation: "
        f"the first {percent_text(trials[0]['accuracy'])}, the best {percent_text(best[-1])}"
    )
    return _search_chart(record, points, ("best so far", "main", steps), label, "order of evaluation")


def search_front(record: dict[str, Any]) -> str:
    """Draw each configuration's accuracy over its size, and the front that no other beats in both."""
    trials, front = record["trials"], sorted(record["front"], key=lambda trial: int(trial["parameters"]))
    largest = max(int(trial["parameters"]) for trial in [*trials, *front])
    units = ((1e6, " (millions)"), (1e3, " (thousands)"), (1, ""))
    unit, name = next((size, name) for size, name in units if largest >= size or size == 1)
    points, line = (
        [(int(trial["parameters"]) / unit, 100 * float(trial["accuracy"])) for trial in found]
        for found in (trials, front)
    )
    ends = [f"{trial['parameters']:,} with {percent_text(trial['accuracy'])}" for trial in (front or trials)]
    label = (
        f"Accuracy over adapter parameters of {len(trials)} configurations; {len(front)} on the Pareto front, "
        f"from {ends[0]} to {ends[-1]}"
    )
    return _search_chart(record, points, ("Pareto front", "front", line), label, f"adapter parameters{name}")


def _search_chart(
    record: dict[str, Any], points: list[Point], line: tuple[str, str, list[Point]], label: str, x_title: str
) -> str:
    """Draw all configurations, a line, and the heuristic's and the chosen one again as series of one point each."""
    series: Series = [("configuration", "trial", points), line]
    for name in ("heuristic", "chosen"):
        places = [
            p for trial, p in zip(record["trials"], points, strict=True) if trial["ranks"] == record[name]["ranks"]
        ]
        series.append((name, name, places[:1]))
    return line_chart(series, label, x_title, "accuracy on the validation rows (%)")
