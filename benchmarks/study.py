"""Put the rows of the study into the repository, its tables into docs/results.md and its figures into docs/figures.

    python benchmarks/study.py runs/math [--name math]

The folder is one that `sqft compare` or `sqft sweep` made; rows are kept as benchmarks/results/study/NAME/rows/*.json,
each with its command; the tables between the page's markers and the figures are made from them alone, but for that of
the search (benchmarks/results/strategies.json). With --name gsm8k the folder holds what
`sqft evaluate MODEL --task gsm8k_instruct --out METHOD.json` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from sqft.compare.methods import METHODS
from sqft.compare.summary import compare_pair, summarise
from sqft.compare.sweep import chart
from sqft.compare.table import page
from sqft.pages.charts import Dot, dot_plot
from sqft.pages.render import form
from sqft.recipe import load_recipe

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks" / "results" / "study"
# Ends of the names under which rows with other settings are kept.
REMEDIES = {"": "as above", "-lr2": "learning rate 2e-3", "-alpha": "alpha 96"}
LEVELS = {"math-0": "none", "math-30": "30 %", "math": "50 %", "math-2of4": "2:4", "math-60": "60 %"}
# Merged methods and the unmerged ones that they are held against.
TWINS = {"sparsepeft": "shears", "qa_sparsepeft": "sqft"}
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "figures"
STYLE = ROOT / "src" / "sqft" / "pages" / "templates" / "style.css"


def table(name: str) -> str:
    """Return the tables of the rows that are kept under a name."""
    rows = [json.loads(file.read_text()) for file in (STUDY / name / "rows").glob("*.json")]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    seeds = 1 + max(row["seed"] for row in rows)
    summary = summarise(load_recipe(ROOT / "recipes" / f"{name}.yaml"), STUDY / name, methods, seeds)
    summary["methods"] = [{**method, "pending": 0} for method in summary["methods"]]  # all that were asked for are done
    text = form("page.md.j2", page=page(summary))
    return re.sub(r"^## ", "### ", text.partition("\n")[2].strip(), flags=re.MULTILINE)


def remedies() -> str:
    """Return what was tried so that merged rows lose less, each against unmerged rows at the same level of sparsity."""
    lines = [
        "| zeros | method, seed 0 | settings | all rows | mawps | svamp | last loss "
        "| − unmerged twin, usual | − unmerged twin, the same | − LoRA, usual |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for level in ("math", "math-2of4"):
        for twin, merged in ((unmerged, merged) for merged, unmerged in TWINS.items()):
            if _row(f"{level}-alpha", merged) is None:
                continue
            for method in (twin, merged):
                for suffix, settings in REMEDIES.items():
                    found = _row(level + suffix, method)
                    if found is None:
                        continue
                    others = (_row(level, twin), _row(level + suffix, twin), _row(level, "lora"))
                    pairs = " | ".join(_difference(found, other) for other in others)
                    what = f"{LEVELS[level]} | {METHODS[method].label} | {settings}"
                    lines.append(f"| {what} | {_scores(found)} | {found['training']['final_loss']:.3f} | {pairs} |")
    return "\n".join(lines)


def levels() -> str:
    """Return the methods at each sparsity, against dense + LoRA and the merged ones against their unmerged twins."""
    dense = _row("math", "dense_lora")
    assert dense is not None
    lines = [
        "| zeros | method, seed 0 | all rows | mawps | svamp | − dense + LoRA | − unmerged twin |",
        "|---|---|---|---|---|---|---|",
    ]
    for folder, zeros in LEVELS.items():
        for method in ("shears", "sparsepeft", "gptq_lora", "sqft", "qa_sparsepeft"):
            if found := _row(folder, method):
                twin = _row(folder, TWINS[method]) if method in TWINS else None
                pairs = " | ".join(_difference(found, other) for other in (dense, twin))
                lines.append(f"| {zeros} | {METHODS[method].label} | {_scores(found)} | {pairs} |")
    return "\n".join(lines)


def gsm8k() -> str:
    """Return what models trained on MAWPS answer of GSM8K, which the study keeps for the record."""
    files = {method: STUDY / "gsm8k" / f"{method}.json" for method in METHODS}
    rows = {method: json.loads(file.read_text()) for method, file in files.items() if file.is_file()}
    lines = ["| method, seed 2 | gsm8k, n = 1,319 | − its base untuned | − unmerged twin |", "|---|---|---|---|"]
    for method, found in rows.items():
        (task,) = found["tasks"].values()
        base, twin = (_difference(found, rows.get(name)) for name in (METHODS[method].base, TWINS.get(method, "")))
        value = f"{100 * task['value']:.1f} ± {100 * task['stderr']:.1f}"
        lines.append(f"| {METHODS[method].label} | {value} | {base} | {twin} |")
    return "\n".join(lines)


def tuned() -> str:
    """Return task by task what tuning changed: each tuned model against the same base untuned, on the same rows."""
    rows = {name: found for name in METHODS if (found := _row("commonsense", name))}
    tasks = list(rows["dense"]["tasks"])
    lines = ["| tuned − untuned, points (95 % interval) | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    for method, found in rows.items():
        base = METHODS[method].base
        if method == base:
            continue
        alone = ([{**row, "tasks": {task: row["tasks"][task]}} for row in (found, rows[base])] for task in tasks)
        cells = " | ".join(_difference(*pair) for pair in alone)
        lines.append(f"| {METHODS[method].label} − {METHODS[base].label} | {cells} |")
    return "\n".join(lines)


def sparsity_figure() -> str:
    """Draw accuracy over sparsity (the paper's Figure 5), seed 0 dense + LoRA where nothing is pruned."""
    at = {"0": "math-0", "0.3": "math-30", "0.5": "math", "0.6": "math-60", "2:4": "math-2of4"}
    methods: dict[str, dict[str, Any]] = {"dense_lora": {"0": {"value": _share("math", "dense_lora")}}}
    for method in ("shears", "sparsepeft", "sqft", "qa_sparsepeft"):
        found = {level: _share(folder, method) for level, folder in at.items()}
        methods[method] = {level: {"value": value} for level, value in found.items() if value is not None}
    return chart({"levels": list(at), "methods": methods})


def pairs_figure() -> str:
    """Draw what merging costs at each level: merged minus unmerged twin, with 95 % intervals."""
    dots = []
    for merged, unmerged in TWINS.items():
        for folder, zeros in LEVELS.items():
            one, other = _row(folder, merged), _row(folder, unmerged)
            pair = compare_pair([one], [other]) if one and other else None
            if pair is not None:
                where = "without zeros" if folder == "math-0" else f"at {zeros}"
                kind, style = ("INT4", "tuned") if merged == "qa_sparsepeft" else ("16 bit", "sparse")
                ends = (100 * pair[key] for key in ("difference", "low", "high"))
                dots.append(_interval(f"{kind}, {where}", *ends, style))
    return dot_plot(dots, "Accuracy of the merged model minus that of its unmerged twin, points", lowest=-100)


def search_figure() -> str:
    """Draw what each way to choose ranks gives on the test rows, against the heuristic."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "strategies.json").read_text())["rows"]
    others = [row for row in rows if row["strategy"] != "heuristic"]
    styles = [(row, "tuned" if row["evaluated"] else "dense") for row in others]
    dots = [_interval(row["strategy"].replace("_", " "), *row["test_minus_heuristic"], style) for row, style in styles]
    return dot_plot(dots, "Test accuracy minus that of the heuristic's ranks, points", lowest=-100)


def _interval(label: str, value: float, low: float, high: float, style: str) -> Dot:
    text = f"{value:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
    return Dot(label, value, (high - low) / 2, text, style)


def save_figure(name: str, svg: str) -> None:
    """Write a chart of a report as a file of its own, in the light colours of style.css."""
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", STYLE.read_text().partition("@media")[0]))
    svg = re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]], svg)
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    space = 'xmlns="http://www.w3.org/2000/svg" style="background: #fff" font-family="system-ui, sans-serif"'
    box = f'viewBox="-10 -10 {width + 20:g} {height + 20:g}" width="{1.5 * width + 30:g}"'
    FIGURES.mkdir(exist_ok=True)
    text = re.sub(r'class="chart" viewBox="[^"]*"', lambda _: f"{space} {box}", svg).replace(' focusable="false"', "")
    (FIGURES / f"{name}.svg").write_text(text)


def keep(folder: Path, name: str) -> None:
    """Copy the finished results of a folder into the repository, their paths relative to it."""
    kept = "." if name == "gsm8k" else "rows"
    target = STUDY / name / kept
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted((folder / kept).glob("*.json")):
        row = json.loads(file.read_text().replace(f"{ROOT}/", ""))
        if row.get("status", "done") == "done":
            (target / file.name).write_text(json.dumps({**row, "command": _command(row)}, indent=2) + "\n")


def _command(row: dict[str, Any]) -> str:
    """Return what made a row: the comparison's command, which it has, or that of one evaluation."""
    if "command" in row:
        return str(row["command"])
    inputs, asked = row["made_from"]["inputs"], row["made_from"]["config"]
    parts = ["sqft evaluate", inputs["model"]["path"]]
    if "adapter" in inputs:
        parts += ["--adapter", inputs["adapter"]["path"]]
    batch = asked["evaluate"].get("batch")
    return " ".join([*parts, "--task", asked["data"]["task"], *([f"--batch {batch}"] if batch else [])])


def _row(folder: str, method: str) -> dict[str, Any] | None:
    file = STUDY / folder / "rows" / f"{method}-0.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _scores(row: dict[str, Any]) -> str:
    tasks = {name: 100 * task["value"] for name, task in row["tasks"].items()}
    return " | ".join(f"{value:.1f}" for value in (100 * _pooled(row), tasks["mawps"], tasks["svamp"]))


def _pooled(row: dict[str, Any]) -> float:
    right = sum(task["value"] * task["n"] for task in row["tasks"].values())
    return float(right / sum(task["n"] for task in row["tasks"].values()))


def _share(folder: str, method: str) -> float | None:
    row = _row(folder, method)
    return None if row is None else _pooled(row)


def _difference(one: dict[str, Any], other: dict[str, Any] | None) -> str:
    pair = compare_pair([one], [other]) if other is not None and one != other else None
    if pair is None:
        return "–"
    return f"{100 * pair['difference']:+.1f} ({100 * pair['low']:+.1f} to {100 * pair['high']:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a comparison's folder; none: the page is made anew")
    parser.add_argument("--name", default="math", help="its recipe's, or one in LEVELS with an end in REMEDIES")
    options = parser.parse_args()
    if options.folder is not None:
        keep(options.folder, options.name)
    text = PAGE.read_text()
    for name in re.findall(r"<!-- table: (\w+) -->", text):
        begin, end = f"<!-- table: {name} -->", f"<!-- /table: {name} -->"
        before, _, rest = text.partition(begin)
        own = {"remedies": remedies, "levels": levels, "gsm8k": gsm8k, "tuned": tuned}
        made = own.get(name, lambda name=name: table(name))()
        text = f"{before}{begin}\n\n{made}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)
    for name, draw in {"sparsity": sparsity_figure, "merging": pairs_figure, "search": search_figure}.items():
        save_figure(name, draw())


if __name__ == "__main__":
    main()
