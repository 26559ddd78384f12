"""Put the rows of the study into the repository and its tables into docs/results.md.

    python benchmarks/study.py runs/math [--name math]

The folder is one that `sqft compare` or `sqft sweep` made; rows are kept as benchmarks/results/study/NAME/rows/*.json,
each with its command, and the tables between the page's markers are made from them alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from sqft.compare.methods import METHODS
from sqft.compare.table import markdown, summarise
from sqft.recipe import load_recipe

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks" / "results" / "study"
PAGE = ROOT / "docs" / "results.md"


def table(name: str) -> str:
    """Return the tables of the rows that are kept under a name."""
    rows = [json.loads(file.read_text()) for file in (STUDY / name / "rows").glob("*.json")]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    seeds = 1 + max(row["seed"] for row in rows)
    summary = summarise(load_recipe(ROOT / "recipes" / f"{name}.yaml"), STUDY / name, methods, seeds)
    return re.sub(r"^## ", "### ", markdown(summary).partition("\n")[2].strip(), flags=re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a comparison's folder; none: the page is made anew")
    parser.add_argument("--name", default="math", help="recipe that it ran: recipes/NAME.yaml")
    options = parser.parse_args()
    if options.folder is not None:
        target = STUDY / options.name / "rows"
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted((options.folder / "rows").glob("*.json")):
            if json.loads(file.read_text())["status"] == "done":
                shutil.copyfile(file, target / file.name)
    text = PAGE.read_text()
    for name in re.findall(r"<!-- table: (\w+) -->", text):
        begin, end = f"<!-- table: {name} -->", f"<!-- /table: {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{table(name)}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
