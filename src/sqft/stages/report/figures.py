"""The figures of a report: what a log, a mask, a search and a rank choice look like, with the numbers behind each."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import accumulate
from typing import Any

from sqft.stages.report.charts import Cell, Point, grid_chart, line_chart
from sqft.stages.report.facts import finite
from sqft.stages.report.words import percent_text


def loss(log: dict[str, Any]) -> tuple[str, list[Point], list[Point]]:
    """Return the loss chart, and the points of training and validation."""
    train, held_out = finite(log.get("train", []), "loss"), finite(log.get("eval", []), "eval_loss")
    series: list[tuple[str, str, list[Point]]] = []
    window = max(1, len(train) // 20)
    if window > 1:
        series.append(("training, each step", "raw", thin(train, 1000)))
        series.append((f"training, mean of {window // 2 * 2 + 1} steps", "main", thin(smooth(train, window), 1000)))
    elif train:
        series.append(("training", "main", train))
    if held_out:
        series.append(("validation", "held-out", held_out))
    label = "Loss over optimiser steps"
    if train:
        label += f": training from {train[0][1]:.3f} to {train[-1][1]:.3f}"
    if held_out:
        label += f", validation from {held_out[0][1]:.3f} to {held_out[-1][1]:.3f}"
    return line_chart(series, label, "optimiser step", "loss (nats a token)"), train, held_out


def thin(points: list[Point], count: int) -> list[Point]:
    """Return at most `count` evenly chosen points, the first and last among them."""
    if len(points) <= count:
        return points
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def smooth(points: list[Point], window: int) -> list[Point]:
    """Return the centred moving mean of a series, over up to `window` points."""
    half = window // 2
    values = [y for _, y in points]
    means = []
    for index, (x, _) in enumerate(points):
        around = values[max(0, index - half) : index + half + 1]
        means.append((x, sum(around) / len(around)))
    return means


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
    longs = {long for long, _ in split.values()}
    lasts = [long.rpartition(".")[2] for long in longs]
    return {
        name: (_fold(last if lasts.count(last := long.rpartition(".")[2]) == 1 else long), layer)
        for name, (long, layer) in split.items()
    }


def _fold(name: str) -> str:
    """Shorten the name of a group: 'q_proj+k_proj+v_proj' to 'q+k+v_proj'."""
    parts = name.split("+")
    ends = {part.rpartition("_")[2] for part in parts}
    if len(parts) == 1 or len(ends) > 1 or not all("_" in part for part in parts):
        return name
    return "+".join(part.rpartition("_")[0] for part in parts) + f"_{ends.pop()}"


def sparsity(layers: list[dict[str, Any]]) -> tuple[str, list[tuple[str, list[float], int]]]:
    """Return the sparsity grid, and (kind, [lowest, mean, highest], weights) for each kind of linear.

    Experts of a layer share a cell, which shows their mean.
    """
    places = place([layer["name"] for layer in layers])
    merged: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    for layer in layers:
        merged[places[layer["name"]]].append((float(layer["sparsity"]), int(layer["weights"])))
    cells: dict[tuple[str, int], Cell] = {}
    kinds: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for (name, index), members in merged.items():
        weights = sum(w for _, w in members)
        mean = sum(s * w for s, w in members) / weights
        several = f", mean of {len(members)}" if len(members) > 1 else ""
        cells[name, index] = Cell(mean, "", f"layer {index} {name}: {percent_text(mean)} zero{several}")
        kinds[name] += members
    values = [s for members in merged.values() for s, _ in members]
    label = (
        f"Sparsity of {len(layers)} linears by layer, from {percent_text(min(values))} to {percent_text(max(values))}"
    )
    stops = [(f"{round(100 * v)} %", v) for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
    summary = []
    for name, members in kinds.items():
        shares, weights = [s for s, _ in members], sum(w for _, w in members)
        summary.append((name, [min(shares), sum(s * w for s, w in members) / weights, max(shares)], weights))
    return grid_chart(cells, label, stops), summary


def ranks(value: dict[str, Any]) -> tuple[str, list[tuple[str, Counter[int]]]]:
    """Return the rank grid, and how often each kind of group has which rank."""
    chosen: dict[str, int] = value["ranks"]
    largest = max([*value.get("choices", []), *chosen.values()])
    places = place(list(chosen))
    cells: dict[tuple[str, int], Cell] = {}
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for group, rank in chosen.items():
        name, layer = places[group]
        members = ", ".join(value.get("groups", {}).get(group, []))
        cells[name, layer] = Cell(
            rank / largest, str(rank), f"{group}: rank {rank}" + (f" ({members})" if members else "")
        )
        counts[name][rank] += 1
    shown = sorted({*value.get("choices", []), *chosen.values()}, reverse=True)
    stops = [(f"rank {rank}", rank / largest) for rank in shown]
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
    points = {number: (float(number), 100 * float(trial["accuracy"])) for number, trial in enumerate(trials, 1)}
    series = [("configuration", "trial", list(points.values())), ("best so far", "main", steps)]
    series += _singled_out(record, [(trial, points[number]) for number, trial in enumerate(trials, 1)])
    label = (
        f"Accuracy on the validation rows of {len(trials)} configurations in order of evaluation: "
        f"the first {percent_text(trials[0]['accuracy'])}, the best {percent_text(best[-1])}"
    )
    return line_chart(series, label, "order of evaluation", "accuracy on the validation rows (%)")


def search_front(record: dict[str, Any]) -> str:
    """Draw each configuration's accuracy over its size, and the front that no other beats in both."""
    trials, front = record["trials"], sorted(record["front"], key=lambda trial: int(trial["parameters"]))
    largest = max(int(trial["parameters"]) for trial in [*trials, *front])
    unit, name = next(
        ((size, f" ({word})") for size, word in ((1e6, "millions"), (1e3, "thousands")) if largest >= size), (1, "")
    )

    def place_of(trial: dict[str, Any]) -> Point:
        return int(trial["parameters"]) / unit, 100 * float(trial["accuracy"])

    series = [
        ("configuration", "trial", [place_of(trial) for trial in trials]),
        ("Pareto front", "front", [place_of(trial) for trial in front]),
        *_singled_out(record, [(trial, place_of(trial)) for trial in trials]),
    ]
    ends = [f"{trial['parameters']:,} with {percent_text(trial['accuracy'])}" for trial in (front or trials)]
    label = (
        f"Accuracy over adapter parameters of {len(trials)} configurations; {len(front)} on the Pareto front, "
        f"from {ends[0]} to {ends[-1]}"
    )
    return line_chart(series, label, f"adapter parameters{name}", "accuracy on the validation rows (%)")


def _singled_out(
    record: dict[str, Any], placed: list[tuple[dict[str, Any], Point]]
) -> list[tuple[str, str, list[Point]]]:
    """Return the heuristic and the chosen configuration as series of one point each."""
    return [
        (name, name, [point for trial, point in placed if trial["ranks"] == record[name]["ranks"]][:1])
        for name in ("heuristic", "chosen")
    ]
