"""The cells of `recovery.py`: which model is compressed and how, what is trained, and for how many steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS = ("mawps", "svamp")
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # those that the paper tunes
GROUP = 64
# name: (fraction of zeros, bits a weight). INT3 has the bytes of 50 % zeros and INT4 in a bitmask.
BASES: dict[str, tuple[float | None, int]] = {
    "dense": (None, 16),
    "sparse16": (0.5, 16),
    "sparse4": (0.5, 4),
    "int4": (None, 4),
    "int3": (None, 3),
}
_COMPRESSION = ("sparsify", "quantize")
DISTILL = {"hidden": {"hidden": 1, "logits": 0}, "logits": {"hidden": 0, "logits": 1}}


@dataclass(frozen=True)
class Scale:
    """How large a grid is.

    Attributes:
        steps: optimiser steps of a budget of 1.
        length: tokens a packed row.
        batch: packed rows a step.
        samples: calibration sequences of 256 tokens, or of `length` if that is less.
        rows: test rows a task; None is all.
        evaluated: sequences that are evaluated at a time.
        threads: CPU threads of a process.
    """

    steps: int = 120
    length: int = 256
    batch: int = 8
    samples: int = 128
    rows: int | None = None
    evaluated: int = 256
    threads: int = 2


@dataclass(frozen=True)
class Cell:
    """One model of the table, as a recipe of the product.

    Attributes:
        base: of BASES.
        budget: all its steps, the teacher's included, in units of `Scale.steps`; 0 is untuned.
        linears: five or seven of each block have adapters.
        rank: of the adapters; alpha is twice the rank.
        update: weights that stay make up for those that are pruned.
        teacher: half of the steps tune the dense model, which is then compressed; the other half recover it.
        distill: what the teacher teaches besides: hidden, logits or nothing.
        rate: learning rate of the adapters; the teacher's is 1e-3.
    """

    base: str
    budget: int = 1
    linears: str = "seven"
    rank: int = 32
    update: bool = False
    teacher: bool = False
    distill: str = ""
    rate: float = 1e-3

    @property
    def name(self) -> str:
        words = [self.base, *(["update"] if self.update else []), *(["teacher"] if self.teacher else [])]
        words += [self.distill] if self.distill else []
        trained = [self.linears, f"r{self.rank}"] if self.budget else []
        trained += [f"lr{self.rate:g}"] if self.rate != Cell.rate else []
        return "-".join([*words, *trained, f"x{self.budget}"])

    @property
    def row(self) -> str:
        """The model of the run that is evaluated."""
        if self.budget:
            return "tuned" if self.base == "dense" else "merged"
        return {"dense": "dense", "sparse16": "sparse"}.get(self.base, "quantized")

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of the linears: codes, a scale (16) and a zero point a group, and a bit for the mask."""
        zeros, bits = BASES[self.base]
        kept = bits if zeros is None else bits * (1 - zeros) + 1
        return kept if bits == 16 else kept + (16 + bits) / GROUP

    def steps(self, scale: Scale) -> tuple[int, int]:
        """Return the steps of the teacher's training, and of the training after it."""
        total = self.budget * scale.steps
        first = total // 2 if self.teacher else 0
        return first, total - first

    def recipe(self, model: Path, validation: Path, scale: Scale, seed: int) -> dict[str, Any]:
        """Return the cell as a recipe.

        Args:
            model: folder of the dense model.
            validation: file of validation rows, evaluated as a task beside the test rows.
            scale: of the grid.
            seed: of the run.
        """
        zeros, bits = BASES[self.base]
        kind = "dense" if self.base == "dense" else "sparse" if bits == 16 else "quantized"
        first, steps = self.steps(scale)
        text = {"samples": scale.samples, "length": min(256, scale.length)}
        training = {
            "learning_rate": 1e-3,
            "length": scale.length,
            "batch": scale.batch,
            "save_every": self.budget * scale.steps or 1,  # at its end
        }
        values: dict[str, Any] = {
            "name": self.name,
            "model": str(model),
            "data": {"task": TASKS[0]},
            "seed": seed,
            "threads": scale.threads,
            "search": {"strategy": "maximal"},
            "finetune": None,
            "merge": None if self.base == "dense" else {},
            "verify": None,
            "evaluate": {
                "tasks": [*TASKS, str(validation)],
                "limit": scale.rows,
                "batch": scale.evaluated,
                "rows": [self.row],
            },
        }
        if zeros is not None:
            # Spelt out only where it is on: what is off stands in no folder's key.
            values["sparsify"] = {"sparsity": zeros, "calibration": text, **({"update": True} if self.update else {})}
        if bits < 16:
            values["quantize"] = {"bits": bits, "group_size": GROUP} | ({"calibration": text} if zeros is None else {})
        if self.teacher:
            values["teacher"] = {**training, "ranks": [32], "max_steps": first}
        if steps:
            own = {"kind": kind, "ranks": [self.rank], "learning_rate": self.rate, "max_steps": steps}
            values["finetune"] = {**training, **own}
            if self.linears == "five":
                values["finetune"]["target_modules"] = FIVE
            if self.distill:
                values["finetune"]["distill"] = DISTILL[self.distill]
        return values


def beginnings(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what comes before a recipe's training as recipes: up to its teacher, and up to its compressed model.

    Cells whose beginnings are equal share the folders: a beginning is run once.
    """
    compressed = {**recipe, "name": "beginning", "finetune": None, "merge": None, "evaluate": None}
    tuned = {name: value for name, value in compressed.items() if name not in _COMPRESSION}
    found = [tuned] if "teacher" in recipe else []
    return [*found, compressed] if tuned != compressed else found


# The most telling first: a run that is short of time ends anywhere.
GRID = (
    Cell("dense", 0),
    Cell("dense"),
    Cell("sparse4", linears="five"),  # the paper's order, as in docs/results.md
    Cell("sparse4", update=True, teacher=True),
    Cell("sparse4", update=True, teacher=True, distill="hidden"),
    Cell("sparse4"),
    Cell("sparse4", update=True),
    Cell("int4"),
    Cell("int3"),
    Cell("sparse4", update=True, rank=128),
    Cell("sparse4", update=True, teacher=True, distill="hidden", rank=128),
    Cell("dense", 2),
    Cell("sparse4", 2, update=True, teacher=True, distill="hidden"),
    Cell("sparse4", 2, update=True, rank=128),
    Cell("int4", 2),
    Cell("int3", 2),
    Cell("int3", 2, rank=128),
    Cell("int4", 2, rank=128),
    Cell("sparse4", 2, linears="five"),
    Cell("sparse4", 2),
    Cell("sparse4", update=True, teacher=True, distill="logits"),
    Cell("sparse4", 2, update=True, teacher=True, distill="hidden", rank=128),
    Cell("sparse16"),
    Cell("dense", rank=128),
    Cell("sparse4", rank=128),
    Cell("sparse4", update=True, teacher=True, rank=128),
    Cell("sparse4", update=True, linears="five"),
    Cell("sparse4", teacher=True),
    Cell("int4", teacher=True),
    Cell("int3", teacher=True),
    Cell("sparse16", update=True),
    Cell("dense", linears="five"),
    Cell("sparse4", 0),
    Cell("sparse4", 0, update=True),
    Cell("int4", 0),
    Cell("int3", 0),
    Cell("dense", rate=2e-3),
    Cell("sparse4", update=True, rate=2e-3),
    Cell("int4", rate=2e-3),
    Cell("dense", 2, rate=2e-3),
    Cell("sparse4", 2, update=True, rate=2e-3),
    Cell("int4", 2, rate=2e-3),
    Cell("dense", 4),
    Cell("sparse4", 4, update=True, rank=128),
    Cell("sparse4", 4, update=True, teacher=True, distill="hidden", rank=128),
)
