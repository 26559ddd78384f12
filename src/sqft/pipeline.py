"""The whole flow on one screen: dense → sparse → INT4 → super-adapter → sub-adapter → merged → verified → evaluated.

A teacher, where the recipe has one, is the dense model tuned; it takes its place from then on, or stands beside.

Each stage writes a folder (or a JSON file) under the run's folder and is skipped when it is already there with the same
settings and inputs, so a run that was interrupted continues by the same command. Everything that can be checked without
work is checked before the first stage (:mod:`sqft.preparation`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sqft import processes
from sqft.context import Context
from sqft.data.chat import uses_clock, with_date
from sqft.disk import read_json, write_json
from sqft.errors import InputError
from sqft.locks import run_lock
from sqft.model.sources import local_folder
from sqft.preparation import Inputs, prepare
from sqft.recipe import MergeConfig
from sqft.stages import evaluate, extract, finetune, merge, quantize, report, sparsify, teacher, verify

if TYPE_CHECKING:
    from sqft.recipe import FinetuneConfig, Recipe

logger = logging.getLogger(__name__)

BEGAN = ".began"


@dataclass(frozen=True)
class RunResult:
    """Where a run left its results.

    Attributes:
        out: the run's folder.
        report: report.html.
        verified: whether the merged model passed; None when nothing was merged.
    """

    out: Path
    report: Path
    verified: bool | None


def run(recipe: Recipe, out: Path | None = None, announce: Callable[[str], None] = logger.info) -> RunResult:
    """Take a recipe through all its stages.

    Several processes (`torchrun`) share compressing and training. The first does all else: the others wait for it, and
    are done when what they share is.

    Args:
        recipe: what to do.
        out: the run's folder; None is runs/NAME.
        announce: called with the name of each stage as it begins.

    Returns:
        Where the results are, and whether the merged model passed its checks.

    Raises:
        InputError: something of the recipe, model or data cannot be used; before any work, and all at once where it can
            be.
    """
    if processes.count() > 1 and not _shared(recipe):
        raise InputError(
            f"recipe {recipe.name} compresses and trains nothing that {processes.count()} processes could share; "
            "start one"
        )
    out = Path("runs") / recipe.name if out is None else out
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with run_lock(out) if processes.first() else nullcontext():
        if not processes.first():
            processes.barrier()
        announce("reading model and data")
        dense = local_folder(recipe.model, out, recipe.revision)
        given = teacher.locate(recipe.teacher, out)
        context = Context(recipe.seed, recipe.trust_remote_code, recipe.device)
        recipe = fix_date(recipe, context, teacher.tuned_folder(recipe.teacher, dense, given), out)
        flow = _Flow(recipe, out, context, prepare(recipe, context, dense, given), announce, dense)
        if processes.first():
            processes.barrier()
        for stage in (partial(flow.teach, given), flow.sparsify, flow.quantize, flow.finetune):
            if not flow.dismissed:
                stage()
        if flow.dismissed:
            return RunResult(out, out / "report.html", None)
        flow.extract()
        flow.merge()
        verified = flow.verify()
        flow.evaluate()
        announce("report")
        return RunResult(out, report.run(out, recipe), verified)


@dataclass
class _Flow:
    """A run on its way: each method is a stage, and does nothing where the recipe has none.

    Attributes:
        base: the model that the next stage works on.
        models: what can be evaluated, as (model, adapter).
        shared: how many stages are done that processes share.
    """

    recipe: Recipe
    out: Path
    context: Context
    inputs: Inputs
    announce: Callable[[str], None]
    base: Path
    models: dict[str, tuple[Path, Path | None]] = field(default_factory=dict)
    shared: int = 0

    @property
    def dismissed(self) -> bool:
        """Whether this process has nothing more to do: it is not the first, and all that is shared is done."""
        return not processes.first() and self.shared == _shared(self.recipe)

    def __post_init__(self) -> None:
        self.models["dense"] = (self.base, None)

    def _made(self, name: str) -> None:
        self.base = self.out / name
        self.models[name] = (self.base, None)

    def teach(self, given: Path | None) -> None:
        """Make the tuned dense model; `given` is the adapter or the model that the recipe names."""
        config, out = self.recipe.teacher, self.out / "teacher"
        if config is None:
            return
        if config.training is not None:
            self.announce("tune the dense model")
            adapter = self.out / "teacher_adapter"
            self._train(config.training, adapter)
            if self.dismissed:
                return
            # Whatever zeros the dense model has are no promise: what is pruned is chosen afterwards.
            merging = MergeConfig(allow_sparsity_loss=True)
            processes.once(lambda: merge.run(merging, self.base, adapter, out, self.context))
        elif config.adapter is not None and given is not None:
            self.announce("merge the adapter into the dense model")
            processes.once(lambda: teacher.run(self.base, given, self.recipe.model, out, self.context))
        tuned = out if config.model is None or given is None else given
        self.models["teacher"] = (tuned, None)
        if config.compress:
            self.base = tuned

    def _train(self, config: FinetuneConfig, out: Path, teacher: Path | None = None) -> None:
        """Train adapters on what is there."""
        inputs, context = self.inputs, self.context if config.seed is None else self.context.seeded(config.seed)
        train, validation = ([(e.prompt, e.answer) for e in rows] for rows in (inputs.train, inputs.validation))
        held_out = validation if config.evaluate_every is not None else []
        finetune.run(config, self.base, train, held_out, out, context, data=inputs.source, teacher=teacher)
        self._share_next()

    def _share_next(self) -> None:
        """Take in that a shared stage is done; after the last one the first process goes on alone."""
        self.shared += 1
        if processes.first() and self.shared == _shared(self.recipe):
            processes.leave_group()

    def sparsify(self) -> None:
        config, tokens = self.recipe.sparsify, self.inputs.tokens
        if config is None or self.recipe.joint:
            return
        self.announce("sparsify")
        drawn = None if tokens is None else self.inputs.source
        sparsify.run(config, self.base, tokens, self.out / "sparse", self.context, calibration=drawn)
        self._made("sparse")
        self._share_next()

    def quantize(self) -> None:
        config, tokens, joint = self.recipe.quantize, self.inputs.quantize_tokens, self.recipe.joint
        if config is None:
            return
        self.announce("sparsify and quantize" if joint else "quantize")
        drawn = None if tokens is None else self.inputs.source
        pruning = self.recipe.sparsify if joint else None
        out = self.out / "quantized"
        quantize.run(config, self.base, tokens, out, self.context, sparsify=pruning, calibration=drawn)
        self._made("quantized")
        self._share_next()

    def finetune(self) -> None:
        config = self.recipe.finetune
        if config is None:
            return
        self.announce("finetune")
        uncompressed = self.models.get("teacher", self.models["dense"])[0]
        self._train(config, self.out / "adapter", None if config.distill is None else uncompressed)

    def extract(self) -> None:
        config, out = self.recipe.search, self.out / "sub_adapter"
        if self.recipe.finetune is None:
            return
        self.announce("search for a sub-adapter" if config.searches else "extract the sub-adapter")
        extract.run(config, self.out / "adapter", out, self.context, base=self.base, rows=self.inputs.selection)
        self.models["tuned"] = (self.base, out)

    def merge(self) -> None:
        if self.recipe.merge is None or "tuned" not in self.models:
            return
        self.announce("merge")
        base, adapter = self.models["tuned"]
        assert adapter is not None
        merge.run(self.recipe.merge, base, adapter, self.out / "merged", self.context)
        self._made("merged")

    def verify(self) -> bool | None:
        config, inputs = self.recipe.verify, self.inputs
        if config is None or "merged" not in self.models:
            return None
        self.announce("verify")
        base, adapter = self.models["tuned"]
        assert adapter is not None
        rows = inputs.test[: max(config.prompts, config.accuracy_rows)]
        out = self.out / "verify.json"
        proof = verify.run(config, self.base, base, adapter, out, self.context, task=inputs.task, examples=rows)
        _log_checks(proof["checks"])
        return bool(proof["passed"])

    def evaluate(self) -> None:
        config, data = self.recipe.evaluate, self.recipe.data
        if config is None:
            return
        results: dict[str, dict[str, Any]] = {}
        for row in config.rows:
            if row in self.models:
                self.announce(f"evaluate {row}")
                file = self.out / "evaluations" / f"{row}.json"
                results[row] = evaluate.run(config, data, *self.models[row], file, self.context)
        _write_summary(self.out, results, self.recipe.seed)


def _shared(recipe: Recipe) -> int:
    """Return how many stages of a run its processes share."""
    pruning = None if recipe.joint else recipe.sparsify
    training = None if recipe.teacher is None else recipe.teacher.training
    return sum(config is not None for config in (training, pruning, recipe.quantize, recipe.finetune))


def fix_date(recipe: Recipe, context: Context, dense: Path, out: Path) -> Recipe:
    """Return the recipe with the date for its chats: the moment at which the run in `out` first began.

    A chat template that asks for the date would else ask other questions tomorrow, and in two stages of one run.

    Args:
        recipe: the recipe.
        context: of the run.
        dense: the model's folder, whose tokenizer has the template.
        out: the run's folder; the moment is kept there, in `.began`.
    """
    tokenizer = context.tokenizer(dense)
    if not uses_clock(tokenizer):
        return recipe
    file = out / BEGAN
    if not file.is_file():
        write_json(file, {"moment": datetime.now().isoformat(timespec="seconds")})
    moment = datetime.fromisoformat(read_json(file)["moment"])
    return recipe.model_copy(update={"data": with_date(recipe.data, tokenizer, moment)})


def _log_checks(checks: list[dict[str, Any]]) -> None:
    """Log what the proof found."""
    failed = [check for check in checks if not check["passed"]]
    for check in failed:
        logger.error("%s: %g, bound %g; %s", check["name"], check["value"], check["bound"], check["detail"])
    if not failed:
        logger.info("all %d checks hold: %s", len(checks), ", ".join(check["name"] for check in checks))


def _write_summary(out: Path, results: dict[str, dict[str, Any]], seed: int) -> None:
    """Write eval.json: the result of the model furthest along the flow in the stable form, with all rows beside it."""
    if not results:
        return
    final = next(row for row in ("merged", "tuned", "quantized", "sparse", "teacher", "dense") if row in results)
    rows = {row: result["tasks"] for row, result in results.items()}
    write_json(
        out / "eval.json",
        {"model": final, "tasks": rows[final], "seed": seed, "versions": results[final]["versions"], "rows": rows},
    )
