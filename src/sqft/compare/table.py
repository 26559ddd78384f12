"""The table of a comparison, as JSON, Markdown and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.compare.methods import METHODS
from sqft.compare.summary import summarise
from sqft.disk import write_json
from sqft.pages.blocks import Block, Columns, Figure, Page, Row, Section, Table, Text
from sqft.pages.charts import Dot, dot_plot
from sqft.pages.render import write
from sqft.pages.text import ABSENT, bytes_text, model_name

if TYPE_CHECKING:
    from sqft.recipe import Recipe

_LEGEND = (
    "Blue: one merged model. Grey: a base, alone or with an adapter beside it. Bars: ± standard error over test rows."
)


def write_table(recipe: Recipe, out: Path, methods: Sequence[str], seeds: int) -> Path:
    """Write compare.json, compare.md and compare.html from the rows that are there; return the last's path."""
    summary = summarise(recipe, out, methods, seeds)
    write_json(out / "compare.json", summary)
    return write(page(summary), out / "compare")


def score_text(entry: Mapping[str, Any] | None) -> str:
    """Return a score with its errors over rows and over seeds: a share in per cent, an NLL in nats."""
    if entry is None:
        return ABSENT
    if entry["metric"] == "perplexity":
        return f"{entry['value']:.2f}"
    unit, digits = (1, 3) if entry["metric"] == "nll" else (100, 1)
    rows = f" ± {unit * entry['stderr_rows']:.{digits}f}" if entry["stderr_rows"] is not None else ""
    seeds = f" (seeds ± {unit * entry['stderr_seeds']:.{digits}f})" if entry["stderr_seeds"] is not None else ""
    return f"{unit * entry['value']:.{digits}f}{rows}{seeds}"


def page(summary: Mapping[str, Any]) -> Page:
    """Return the page of a comparison."""
    sections = [
        Section("methods", "Methods", _scores(summary)),
        Section("costs", "Models and costs", [_costs(summary)]),
    ]
    if summary["pairs"]:
        sections.append(Section("pairs", "Pair by pair", [_pairs(summary)]))
    return Page(f"{model_name(summary['model'])} on {summary['data']}", sections)


def _scores(summary: Mapping[str, Any]) -> list[Block]:
    tasks = _tasks(summary)
    charts, heads, likely = [], ["Method"], False
    for task, n in tasks.items():
        named = f"{task.removesuffix('_nll')} NLL" if task.endswith("_nll") else task
        likely = likely or named != task
        heads.append(f"{named}, n = {n:,}")
        charts.append(_dots(summary, task, heads[-1]))
    rows = []
    for method in summary["methods"]:
        cells = [score_text(_entry(method, task)) for task in tasks]
        if "tasks" not in method:
            reason = "; ".join(f"seed {f['seed']}: {f['reason'].splitlines()[0]}" for f in method["failed"])
            cells[:1] = [f"failed: {reason}" if reason else "not run yet"]
        rows.append(Row([method["label"], *cells]))
    return [
        Text(_LEGEND, "legend"),
        Columns(charts),
        Table(
            heads,
            rows,
            "Per cent ± standard error over test rows, in brackets over training seeds"
            + ("; NLL in nats a token of the right answers, lower is better." if likely else "."),
        ),
    ]


def _tasks(summary: Mapping[str, Any]) -> dict[str, int]:
    """Return {task: its rows}, `all rows` first where there is more than one."""
    for method in summary["methods"]:
        if "tasks" in method:
            pooled = {"all rows": method["all"]["n"]} if method["all"] else {}
            return pooled | {name: task["n"] for name, task in method["tasks"].items()}
    return {"": 0}


def _entry(method: Mapping[str, Any], task: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = method.get("all") if task == "all rows" else method.get("tasks", {}).get(task)
    return found


def _dots(summary: Mapping[str, Any], task: str, title: str) -> list[Block]:
    dots = []
    for method in summary["methods"]:
        entry = _entry(method, task)
        if entry is None or entry["metric"] in ("perplexity", "nll"):
            continue
        # The same error for all, those with one seed too; the table has the other.
        error = entry["stderr_rows"]
        style = "merged" if METHODS[method["method"]].merged else "dense"
        text = score_text({**entry, "stderr_seeds": None})
        dots.append(Dot(method["label"], 100 * entry["value"], None if error is None else 100 * error, text, style))
    return [Figure(dot_plot(dots, title, unit=" %"), title)] if dots else []


def _costs(summary: Mapping[str, Any]) -> Table:
    heads = ["Method", "one model", "precision", "stored", "s / step", "peak memory", "rows / s", "seeds"]
    rows = [[method["label"], *_cost(method)] for method in summary["methods"]]
    # Rows that an earlier version recorded may lack a figure.
    known = [i for i in range(len(heads)) if any(row[i] != ABSENT for row in rows)]
    caption = (
        "Seconds a step and peak memory are those of training as it ran, rows a second those of answering the test "
        "rows, other work on the machine included; stored is what the model's weight files take."
    )
    return Table([heads[i] for i in known], [Row([row[i] for i in known]) for row in rows], caption)


def _cost(method: Mapping[str, Any]) -> list[str]:
    counts = {"failed": len(method["failed"]), "pending": method["pending"]}
    missing = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    seeds = f"{len(method['seeds'])} ({missing})" if missing else str(len(method["seeds"]))
    if "tasks" not in method:
        return [ABSENT] * 6 + [seeds]
    trained = method["training"] or {}
    step, speed = trained.get("seconds_per_step"), method["rows_per_second"]
    return [
        method["one_model"],
        method["precision"],
        bytes_text(method["stored_bytes"]),
        ABSENT if step is None else f"{step:.2f}",
        bytes_text(trained.get("peak_memory_bytes")),
        ABSENT if speed is None else f"{speed:.1f}",
        seeds,
    ]


def _pairs(summary: Mapping[str, Any]) -> Table:
    rows = []
    likely = any("nll" in pair for pair in summary["pairs"])  # rows that an earlier version recorded have none
    for pair in summary["pairs"]:
        name = f"{METHODS[pair['method']].label} − {METHODS[pair['against']].label}"
        interval = f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"
        by_seed = ", ".join(f"{100 * value:+.1f}" for value in pair["by_seed"])
        nll = [] if "nll" not in pair else ["{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**pair["nll"])]
        cells = [name, f"{100 * pair['difference']:+.1f}", interval, f"{pair['n']:,}", by_seed]
        rows.append(Row([*cells, *(nll or [ABSENT])] if likely else cells, pair["question"]))
    heads = ["Pair", "difference, points", "95 % interval", "rows", "seed by seed"]
    heads += ["NLL, nats (95 % interval)"] if likely else []
    caption = "The same test rows on both sides, averaged over the seeds that both have."
    return Table(heads, rows, caption, notes="question")
