"""Put the rows of the study into the repository and its tables into docs/results.md.

    python benchmarks/study.py runs/math [--name math]

The folder is one that `sqft compare` or `sqft sweep` made; rows are kept as benchmarks/results/study/NAME/rows/*.json,
each with its command, and the tables between the page's markers are made from them alone. With --name gsm8k it holds
what `sqft evaluate MODEL --task gsm8k_instruct --out METHOD.json` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from sqft.compare.methods import METHODS
from sqft.compare.table import compare_pair, markdown, summarise
from sqft.recipe import load_recipe

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks" / "results" / "study"
# Ends of the names under which rows with other settings are kept.
REMEDIES = {"": "as above", "-lr2": "learning rate 2e-3", "-alpha": "alpha 96"}
LEVELS = {"math-0": "none", "math-30": "30 %", "math": "50 %", "math-2of4": "2:4", "math-60": "60 %"}
# Merged methods and the unmerged ones that they are held against.
TWINS = {"sparsepeft": "shears", "qa_sparsepeft": "sqft"}
PAGE = ROOT / "docs" / "results.md"


def table(name: str) -> str:
    """Return the tables of the rows that are kept under a name."""
    rows = [json.loads(file.read_text()) for file in (STUDY / name / "rows").glob("*.json")]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    seeds = 1 + max(row["seed"] for row in rows)
    summary = summarise(load_recipe(ROOT / "recipes" / f"{name}.yaml"), STUDY / name, methods, seeds)
    return re.sub(r"^## ", "### ", markdown(summary).partition("\n")[2].strip(), flags=re.MULTILINE)


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
    lines = ["| method, seed 2 | gsm8k, n = 1,319 | − unmerged twin |", "|---|---|---|"]
    for method, found in rows.items():
        (task,) = found["tasks"].values()
        twin = _difference(found, rows.get(TWINS.get(method, "")))
        lines.append(f"| {METHODS[method].label} | {100 * task['value']:.1f} ± {100 * task['stderr']:.1f} | {twin} |")
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


def keep(folder: Path, name: str) -> None:
    """Copy the finished results of a folder into the repository, their paths relative to it."""
    kept = "." if name == "gsm8k" else "rows"
    target = STUDY / name / kept
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted((folder / kept).glob("*.json")):
        text = file.read_text()
        if json.loads(text).get("status", "done") == "done":
            (target / file.name).write_text(text.replace(f"{ROOT}/", ""))


def _row(folder: str, method: str) -> dict[str, Any] | None:
    file = STUDY / folder / "rows" / f"{method}-0.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _scores(row: dict[str, Any]) -> str:
    tasks = {name: 100 * task["value"] for name, task in row["tasks"].items()}
    pooled = sum(task["value"] * task["n"] for task in row["tasks"].values())
    pooled *= 100 / sum(task["n"] for task in row["tasks"].values())
    return " | ".join(f"{value:.1f}" for value in (pooled, tasks["mawps"], tasks["svamp"]))


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


if __name__ == "__main__":
    main()
