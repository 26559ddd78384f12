"""Run every method with every seed on shared bases, and record each row in its own file.

    OUT/shared/{dense,teacher,sparse,quantized}     bases, made once
    OUT/runs/METHOD-SEED/                   an ordinary run's folder; its bases are links into shared
    OUT/rows/METHOD-SEED.json               the row: scores, checks, storage, cost, or the reason of a failure
    OUT/compare.{json,md,html}              the table of all recorded rows

Recorded rows are not run again, except failed ones; a failure does not stop the other rows. Several processes may run
the same command on one folder: each takes rows that no other is working on. Bases use the recipe's seed. Training seeds
change initialisation, data order and rank sampling; an untuned row has one seed, and so has the recipe's teacher.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft import pipeline
from sqft.artifact import Artifact
from sqft.compare.methods import METHODS, base_recipe, check_methods, method_recipe
from sqft.compare.table import write_table
from sqft.context import Context
from sqft.digests import digest_text
from sqft.disk import read_json, write_json
from sqft.errors import InputError, Problems, SqftError
from sqft.locks import exclusive, run_lock
from sqft.model.sources import local_folder
from sqft.recipe import QuantizeConfig
from sqft.stages import evaluate
from sqft.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from sqft.compare.methods import Base, Choices
    from sqft.data.load import Data
    from sqft.recipe import Recipe

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 5.0
_TEACHER = ("teacher_adapter", "teacher")
_BASES: dict[Base, tuple[str, ...]] = {
    "dense": (),
    "teacher": _TEACHER,
    "sparse": (*_TEACHER, "sparse"),
    "int4": (*_TEACHER, "sparse", "quantized"),
}


def run(
    recipe: Recipe,
    out: Path,
    methods: Sequence[str],
    seeds: int = 1,
    announce: Callable[[str], None] = logger.info,
    command: str = "",
) -> Path:
    """Run the grid and return the path of its table, compare.html.

    Args:
        recipe: model, data, and the settings shared by all rows.
        out: the folder of the comparison.
        methods: keys of METHODS, in the table's order.
        seeds: training seeds, 0 to seeds - 1, of the rows that train.
        announce: called with each row as it starts.
        command: the user's command line, recorded in each row.

    Raises:
        InputError: an unknown method, or a recipe without evaluation; before any work.
    """
    with Problems("compare") as problems:
        check_methods(methods, problems)
        if recipe.teacher is None and "teacher" in methods:
            problems.add("the recipe has no section teacher, whose row is asked for; add it, or leave the method out")
        if recipe.evaluate is None:
            problems.add("the recipe has evaluate: null, so there would be nothing to compare")
        if recipe.sparsify is None and any(name in ("sparse", "lora", "shears") for name in methods):
            problems.add("the recipe has no sparsify, so methods sparse, lora and shears would be dense ones; add it")
    try:
        (out / "rows").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be used as output folder ({error.strerror}); choose another --out") from error
    wanted = [(name, seed) for seed in range(seeds) for name in methods if seed == 0 or METHODS[name].kind is not None]
    bases = _make_bases(recipe, out, {METHODS[name].base for name in methods}, announce)
    context = Context(recipe.seed, recipe.trust_remote_code, recipe.device)
    recipe = pipeline.fix_date(recipe, context, bases, out / "shared")
    failed: set[tuple[str, int]] = set()
    data, began = _data_digest(recipe, context.data(bases)), time.time()
    while True:
        left = [row for row in wanted if row not in failed and not _is_over(recipe, out, *row, data, began)]
        if not left:
            break
        begun = False
        for name, seed in left:
            with ExitStack() as held:
                try:
                    held.enter_context(run_lock(out / "rows" / f".{name}-{seed}"))
                except InputError:
                    continue  # another process is working on it
                begun = True
                if not _is_over(recipe, out, name, seed, data, began):
                    announce(f"{METHODS[name].label}, seed {seed}")
                    if not _run_row(recipe, out, name, seed, bases, data, command):
                        failed.add((name, seed))
            with exclusive(out / "compare"):
                write_table(recipe, out, methods, seeds)
            break
        if not begun:
            time.sleep(_WAIT_SECONDS)
    with exclusive(out / "compare"):
        return write_table(recipe, out, methods, seeds)


def _run_folder(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{name}-{seed}"


def row_file(out: Path, name: str, seed: int) -> Path:
    """Return the path of a row's result."""
    return out / "rows" / f"{name}-{seed}.json"


def _make_bases(recipe: Recipe, out: Path, bases: set[Base], announce: Callable[[str], None]) -> Path:
    """Make the bases that the methods need; return the folder of the dense model."""
    shared = out / "shared"
    with exclusive(shared):
        announce("the bases that rows share")
        furthest = max(bases, key=list(_BASES).index)  # it is made from the others
        pipeline.run(base_recipe(recipe, furthest), shared, announce)
        return local_folder(recipe.model, shared, recipe.revision)


def _data_digest(recipe: Recipe, data: Data) -> str:
    """Return a digest of the training and evaluation rows, which all methods share."""
    assert recipe.evaluate is not None
    parts = [data.examples(recipe.data, "train", recipe.seed)]
    for name in evaluate.task_names(recipe.evaluate, recipe.data):
        parts.append(evaluate.read_task(name, recipe.data, data))
    return digest_text(json.dumps([[(e.prompt, e.answer, e.choices) for e in part] for part in parts]))


def _key(recipe: Recipe, method: Choices, seed: int, data: str) -> str:
    unset = set() if recipe.revision else {"revision"}
    text = method_recipe(recipe, method, seed).model_dump_json(exclude={"note", "threads", "name"} | unset)
    return digest_text(text + data)


def _is_over(recipe: Recipe, out: Path, name: str, seed: int, data: str, began: float) -> bool:
    """Return whether a row is done, or has failed in another process since this one started."""
    file = row_file(out, name, seed)
    if not file.is_file():
        return False
    row = read_json(file)
    if row["status"] == "failed":  # retried, whatever the reason
        return file.stat().st_mtime > began
    if row.get("key") != _key(recipe, METHODS[name], seed, data):
        raise InputError(f"{file}: was made with other settings or data; delete it, or choose another --out")
    return True


def _run_row(recipe: Recipe, out: Path, name: str, seed: int, dense: Path, data: str, command: str) -> bool:
    """Run one row and record it; return whether it succeeded."""
    method = METHODS[name]
    folder = _run_folder(out, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    # Only the bases that the row uses: a report shows every model in its folder.
    for base in _BASES[method.base]:
        link, target = folder / base, out / "shared" / base
        if link.is_symlink() and not link.exists():
            link.unlink()  # the comparison was moved
        if target.is_dir() and not link.exists():
            link.symlink_to(os.path.relpath(target, folder))
    made = method_recipe(recipe, method, seed, dense)
    row: dict[str, Any] = {
        "method": name,
        "label": method.label,
        "seed": seed,
        "key": _key(recipe, method, seed, data),
        "command": command,
    }
    try:
        result = pipeline.run(made, folder, logger.info)
    except Exception as error:  # no error stops the other rows
        expected = isinstance(error, SqftError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        logger.warning("%s, seed %d failed: %s", method.label, seed, reason, exc_info=not expected)
        write_json(row_file(out, name, seed), {**row, "status": "failed", "reason": reason})
        return False
    values = read_json(folder / "evaluations" / f"{method.evaluated}.json")
    write_json(
        row_file(out, name, seed),
        {
            **row,
            "status": "done",
            "tasks": values["tasks"],
            "verified": result.verified,
            "checks": _checks(folder) if method.merged else None,
            "stored_bytes": _stored(method, folder, dense),
            "precision": _precision(method, recipe, dense),
            "training": _training(folder) if method.kind is not None else None,
            "evaluation": values["cost"],
            "versions": values["versions"],
        },
    )
    return True


def _checks(folder: Path) -> dict[str, bool]:
    return {check["name"]: check["passed"] for check in read_json(folder / "verify.json")["checks"]}


def _stored(method: Choices, folder: Path, dense: Path) -> int:
    """Return the bytes of the weight files that the row's model needs."""
    made = {"teacher": folder / "teacher", "sparse": folder / "sparse", "int4": folder / "quantized"}
    base = dense if method.base == "dense" else made[method.base]
    parts = [folder / "merged"] if method.merged else [base, *([folder / "sub_adapter"] if method.kind else [])]
    return sum(file.stat().st_size for part in parts for file in part.glob("*.safetensors"))


def _precision(method: Choices, recipe: Recipe, dense: Path) -> str:
    """Return the storage precision of the row's weights: '16 bit', 'INT4', 'INT4 + adapter'."""
    bits = (recipe.quantize or QuantizeConfig()).bits
    base = f"INT{bits}" if method.base == "int4" else f"{8 * Checkpoint(dense).dtype.itemsize} bit"
    return base if method.kind is None or method.merged else f"{base} + adapter"


def _training(folder: Path) -> dict[str, Any]:
    manifest = Artifact.open(folder / "adapter").manifest
    result = manifest["result"]
    return {
        "steps": result["steps"],
        "seconds": result["train_seconds"],
        "resumed_at_step": result["resumed_at_step"],
        "peak_memory_bytes": manifest["peak_memory_bytes"],
        "trainable_parameters": result["trainable_parameters"],
        "final_loss": result["final_loss"],
    }
