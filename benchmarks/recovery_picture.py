"""Draw what `recovery.py` found: the likelihood of the right answers over the bits that a weight takes.

python benchmarks/recovery_picture.py [benchmarks/results/recovery_h200.json] [docs/figures/recovery.svg]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from common import RESULTS

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "recovery.svg"
# (cell without its budget, label, marker, where the label stands)
POINTS = (
    ("dense-seven-r32", "16 bits, LoRA", "s", (-6, -4)),
    ("sparse16-seven-r32", "50 % zeros, 16 bits", "D", (8, -3)),
    ("int4-seven-r32", "INT4", "o", (8, -3)),
    ("int3-seven-r32", "INT3", "o", (-8, -3)),
    ("sparse4-five-r32", "50 % zeros, INT4: five linears", "^", (8, -3)),
    ("sparse4-seven-r32", "all linears", "^", (8, -3)),
    ("sparse4-update-seven-r32", "all linears, update", "^", (8, -3)),
    ("sparse4-update-seven-r128", "all linears, update, rank 128", "^", (8, -3)),
)


def draw(cells: dict[str, Any], scale: dict[str, Any], figure: Path) -> None:
    """Write the picture, one panel a budget."""
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "recovery", "font.size": 9})
    picture, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, budget in zip(panels, (1, 2), strict=True):
        for cell, label, marker, place in POINTS:
            row = cells.get(f"{cell}-x{budget}-s0")
            if row is None or row["status"] != "done":
                continue
            x, y = row["bits_per_weight"], row["validation"]["nll"]
            panel.plot(x, y, marker, color="#1d5fa8" if marker in "so" else "#b4532a", ms=6)
            side = "right" if place[0] < 0 else "left"
            panel.annotate(label, (x, y), xytext=place, textcoords="offset points", ha=side, fontsize=8)
        panel.set_xscale("log", base=2)
        panel.set_xlim(2.4, 20)
        panel.set_xticks([3, 4, 6, 9, 16], ["3", "4", "6", "9", "16"])
        panel.minorticks_off()
        panel.set_title(f"{budget * scale['steps']} steps", fontsize=9)
        panel.set_xlabel("bits a weight of the linears")
        panel.grid(alpha=0.25)
        for edge in ("top", "right"):
            panel.spines[edge].set_visible(False)
    panels[0].set_ylabel("NLL of the right answers, nats a token\n(230 validation rows; lower is better)")
    picture.tight_layout()
    picture.savefig(figure, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=RESULTS / "recovery_h200.json")
    parser.add_argument("figure", nargs="?", type=Path, default=FIGURE)
    options = parser.parse_args()
    found = json.loads(options.result.read_text())
    draw(found["cells"], found["scale"], options.figure)
    print(f"written: {options.figure}")


if __name__ == "__main__":
    main()
