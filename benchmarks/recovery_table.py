"""What the result of `recovery.py` says: scores over all rows, differences from dense + LoRA, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recovery_cells import TASKS
from sqft.compare.summary import compare_pair
from sqft.evaluation.likelihood import ratio_error

_HEAD = (
    *("cell", "steps", "bits a weight", "validation NLL", "test NLL", "− dense + LoRA of equal steps", "right"),
    *("of dense + LoRA", "train loss", "s a step"),
)


def _reference(rows: Mapping[str, dict[str, Any]], row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return dense + LoRA of as many steps and the same seed; None where it is not done."""
    found = rows.get(f"dense-seven-r32-x{row['budget']}-s{row['seed']}")
    return found if found is not None and found["status"] == "done" else None


def pooled(row: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Return accuracy and NLL of a cell over the rows of some tasks together, each with its standard error."""
    n = sum(row["tasks"][task]["n"] for task in tasks)
    accuracy = sum(row["tasks"][task]["value"] * row["tasks"][task]["n"] for task in tasks) / n
    likelihoods = [row["tasks"][task][f"{task}_nll"] for task in tasks]
    nats = [value for part in likelihoods for value in part["rows"]]
    tokens = [count for part in likelihoods for count in part["tokens"]]
    nll = sum(nats) / sum(tokens)
    residuals = [value - nll * count for value, count in zip(nats, tokens, strict=True)]
    return {
        "n": n,
        "accuracy": accuracy,
        "accuracy_stderr": (accuracy * (1 - accuracy) / max(1, n - 1)) ** 0.5,
        "nll": nll,
        "nll_stderr": ratio_error(residuals, sum(tokens)) or 0.0,
    }


def against(row: Mapping[str, Any], other: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any] | None:
    """Return the paired differences of a cell and another one over the rows of some tasks."""
    pair = [{"seed": 0, "tasks": {task: found["tasks"][task] for task in tasks}} for found in (row, other)]
    return compare_pair(pair[:1], pair[1:])


def relate(rows: Mapping[str, dict[str, Any]]) -> None:
    """Put beside each cell that is done its differences from dense + LoRA, `against_lora`."""
    for row in rows.values():
        reference = _reference(rows, row) if row["status"] == "done" else None
        if reference is not None and reference is not row:
            parts = {"validation": ["validation"], "test": TASKS}
            row["against_lora"] = {name: against(row, reference, tasks) for name, tasks in parts.items()}


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """Return what is done as Markdown, in the order of the grid, and what is not below it."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for name, row in rows.items():
        if row["status"] == "done":
            lines.append("| " + " | ".join([name, *_line(row, _reference(rows, row))]) + " |")
    left = [
        f"{name}: {row['status']} {row.get('reason', '')[:200]}"
        for name, row in rows.items()
        if row["status"] != "done"
    ]
    return "\n\n".join(["\n".join(lines), *left])


def _line(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> list[str]:
    """Return a cell's numbers as text, in the order of the table's head."""
    test, validation, trained = row["test"], row["validation"], row["training"].get("adapter")
    right = reference["test"]["accuracy"] if reference is not None else 0
    nll = ((row.get("against_lora") or {}).get("validation") or {}).get("nll")
    return [
        " + ".join(str(steps) for steps in row["steps"] if steps) or "0",
        f"{row['bits_per_weight']:g}",
        f"{validation['nll']:.3f} ± {validation['nll_stderr']:.3f}",
        f"{test['nll']:.3f} ± {test['nll_stderr']:.3f}",
        "–" if nll is None else f"{nll['difference']:+.3f} ({nll['low']:+.3f} to {nll['high']:+.3f})",
        f"{test['accuracy']:.1%} ± {test['accuracy_stderr']:.1%}",
        f"{test['accuracy'] / right:.0%}" if right else "–",
        *([f"{trained['loss']:.3f}", f"{trained['seconds_per_step']:.2f}"] if trained else ["–", "–"]),
    ]
