"""What test_compressing.py compares: models compressed by one process and by several.

As a script it is one of the processes: OUT LLAMA GPT2 MIXTRAL makes all cases, with CASE... behind these alone, and
writes what it held and saw to OUT/RANK.json. With --fail or --kill before a command of sqft, the last process ends so
at its second block.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sqft import cli, processes
from sqft.context import Context
from sqft.core.columns import Pattern
from sqft.core.statistics import Statistics
from sqft.errors import NumericalError
from sqft.model import calibrate
from sqft.recipe import QuantizeConfig, SparsifyConfig
from sqft.stages import quantize, sparsify
from sqft.stages.quantize.blocks import Quantizing

TOKENS = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0))
FEW = TOKENS[:3, 1:2]  # of the four experts some see tokens of one process alone, some none


def whole_threshold(
    weight_OI: torch.Tensor, statistics: Statistics, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pruner whose rows depend on each other."""
    mask = weight_OI.abs() >= weight_OI.abs().median()
    return torch.where(mask, weight_OI, 0.0), mask


PRUNED: dict[str, dict[str, Any]] = {
    "wanda": {},
    "wanda24": {"pattern": "2:4"},
    "update": {"update": True},
    "sparsegpt": {"method": "sparsegpt"},
    "own": {"method": "compressing:whole_threshold"},
}
QUANTISED: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "gptq": ({}, None),
    "rtn": ({"method": "rtn"}, None),
    "symmetric": ({"format": "gptq", "bits": 8, "symmetric": True, "act_order": False}, None),
    "joint": ({}, {}),
    "joint-update": ({}, {"update": True}),
    "joint-sparsegpt": ({}, {"method": "sparsegpt"}),
}


CASES = [
    *(f"{model}-{case}" for model in ("llama", "gpt2") for case in PRUNED),
    *(f"llama-{case}" for case in QUANTISED),
]
CASES.append("mixtral-few")


def compress(case: str, model: Path, out: Path) -> None:
    """Make one case's folder, OUT/MODEL-CASE."""

    def pruning(values: dict[str, Any]) -> SparsifyConfig:
        return SparsifyConfig.model_validate({"calibration": {"batch": 2}, **values})

    place, name = out / case, case.partition("-")[2]
    if name in PRUNED:
        sparsify.run(pruning(PRUNED[name]), model, TOKENS, place, Context())
    elif name in QUANTISED:
        grid, pruned = QUANTISED[name]
        config = QuantizeConfig.model_validate({"group_size": 16, **grid})
        joint = None if pruned is None else pruning(pruned)
        quantize.run(config, model, TOKENS, place, Context(), sparsify=joint)
    else:
        sparsify.run(pruning({"unreached_experts": "magnitude"}), model, FEW, place, Context())


def watch(found: dict[str, Any]) -> None:
    """Note which blocks are in memory at a visit, how many tokens targets had here, and what is rounded here."""
    add_up, make_block, quantise = calibrate.add_up, calibrate.Block, Quantizing._quantize
    found.update(held=[], seen=[], summed=[], rounded=[])

    def adding(statistics: dict[Any, Statistics]) -> None:
        found["seen"].append([one.tokens for one in statistics.values()])
        add_up(statistics)
        found["summed"].append([one.tokens for one in statistics.values()])

    def block(index: int, targets: Any, statistics: Any, names: Any, prefix: str) -> calibrate.Block:
        made = make_block(index, targets, statistics, names, prefix)
        list_of_blocks = prefix.rpartition(".")[0]
        real = [n for n, p in made.model.named_parameters() if n.startswith(f"{list_of_blocks}.") and not p.is_meta]
        found["held"].append(sorted({n.removeprefix(f"{list_of_blocks}.").partition(".")[0] for n in real}))
        return make_block(index, targets, statistics, names, prefix)

    def quantising(self: Quantizing, block: calibrate.Block, group: list[Any], *rest: Any) -> tuple[torch.Tensor, ...]:
        found["rounded"].append(group[0].name)
        return quantise(self, block, group, *rest)

    calibrate.add_up, calibrate.Block = adding, block  # type: ignore[assignment,misc]
    Quantizing._quantize = quantising  # type: ignore[method-assign]


def break_down(how: str) -> None:
    """Let the last process end at its second block."""
    make_block: Callable[..., calibrate.Block] = calibrate.Block

    def block(index: int, *rest: Any) -> calibrate.Block:
        if index == 1 and processes.rank() == processes.count() - 1:
            if how == "--kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise NumericalError("made to fail")
        return make_block(index, *rest)

    calibrate.Block = block  # type: ignore[assignment,misc]


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    if arguments[0].startswith("--"):
        break_down(arguments[0])
        return cli.run(arguments[1:])
    out, found = Path(arguments[0]), {}
    models = dict(zip(("llama", "gpt2", "mixtral"), map(Path, arguments[1:4]), strict=True))
    watch(found)
    for case in arguments[4:] or CASES:
        compress(case, models[case.partition("-")[0]], out)
    (out / f"{processes.rank()}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
