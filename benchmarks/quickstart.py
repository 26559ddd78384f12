"""Run the quickstart from nothing, keep its result, and write the table of the README from it.

    python benchmarks/quickstart.py

Runs what `make quickstart` runs, in runs/quickstart, which must not exist yet.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import save
from sqft.core.bfloat16 import multiplies_bfloat16

ROOT = Path(__file__).parent.parent
RUN = ROOT / "runs" / "quickstart"
MARKS = ("<!-- quickstart-table -->", "<!-- /quickstart-table -->")


def measure() -> dict[str, Any]:
    """Run the recipe and return what it took and gave."""
    if RUN.exists():
        raise SystemExit(f"{RUN} exists; move it away, so that the whole run is measured")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sqft", "run", "recipes/quickstart.yaml"], cwd=ROOT, check=True)
    wall = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    stages = {}
    for name in ("teacher_adapter", "quantized", "adapter", "sub_adapter", "merged"):
        manifest = json.loads((RUN / name / "sqft" / "manifest.json").read_text())
        stages[name] = {key: manifest[key] for key in ("seconds", "peak_memory_bytes", "size_bytes")}
        stages[name]["coverage"] = manifest["result"].get("coverage")
    verify = json.loads((RUN / "verify.json").read_text())
    sizes = {
        name: sum(file.stat().st_size for file in (RUN / name).glob("*.safetensors"))
        for name in ("dense", "teacher", "quantized", "merged")
    }
    return {
        "bfloat16_instructions": multiplies_bfloat16(),
        "wall_seconds": round(wall, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "rows": json.loads((RUN / "eval.json").read_text())["rows"],
        "weights_bytes": sizes,
        "stages": stages,
        "verify": {"passed": verify["passed"], "checks": verify["checks"]},
    }


def readme(result: dict[str, Any]) -> str:
    """Return the README's part about the result."""
    rows, sizes = result["rows"], result["weights_bytes"]
    task = next(iter(rows["dense"]))

    def accuracy(tasks: dict[str, Any], mark: str = "") -> str:
        """Return the last two cells of a row."""
        entry = tasks[task]
        nll = entry[f"{task}_nll"]
        return (
            f"{mark}{100 * entry['value']:.1f} ± {100 * entry['stderr']:.1f} %{mark} | "
            f"{mark}{nll['value']:.2f} ± {nll['stderr']:.2f}{mark}"
        )

    def size(name: str) -> str:
        return f"{sizes[name] / 1e6:.0f} MB"

    stages = result["stages"]
    return "\n".join(
        [
            MARKS[0],
            f"Accuracy on {rows['dense'][task]['n']} held-out questions (12 possible answers, the likeliest counts; "
            "± is the standard error; one seed), and the negative log-likelihood of the right answers (nats a token, "
            "lower is better). Both trainings have the same steps and adapt the same linears:",
            "",
            "| model | zeros in the linears | their weights | weight files | accuracy | NLL |",
            "|---|---|---|---|---|---|",
            f"| dense, not tuned | 0 % | BF16 | {size('dense')} | {accuracy(rows['dense'])} |",
            f"| dense + LoRA, rank 32 | 0 % | BF16 | {size('teacher')} | {accuracy(rows['teacher'])} |",
            f"| sparse INT4 (Wanda + GPTQ), not tuned | 50 % | INT4 | {size('quantized')} | "
            f"{accuracy(rows['quantized'])} |",
            f"| **tuned and merged (QA-SparsePEFT, rank 32)** | **50 %** | **INT4** | **{size('merged')}** | "
            f"{accuracy(rows['merged'], '**')} |",
            "",
            f"Measured by `python benchmarks/quickstart.py` on 2 cores of a shared machine, "
            f"{'with' if result['bfloat16_instructions'] else 'without'} bfloat16 instructions: prune and quantise "
            f"{stages['quantized']['seconds']:.0f} s, train {stages['adapter']['seconds']:.0f} s and, "
            f"dense + LoRA, {stages['teacher_adapter']['seconds']:.0f} s, merge {stages['merged']['seconds']:.0f} s; "
            f"the whole command {result['wall_seconds'] / 60:.1f} minutes, with "
            "four evaluations ([result](benchmarks/results/quickstart.json)).",
            MARKS[1],
        ]
    )


def main() -> None:
    result = measure()
    save("quickstart", result)
    page = ROOT / "README.md"
    pattern = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    page.write_text(pattern.sub(lambda _: readme(result), page.read_text()))


if __name__ == "__main__":
    main()
