"""What a run's folder says: read once into plain values, each with the file it came from.

Policy: an absent file is not an error (a run may leave stages out, or still be going); it is noted in `missing` when
the recipe asks for it, and the report says so. A file that is there and cannot be read is an error. Nothing is
guessed: a size, precision or sparsity that no file states stays None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.artifact import MANIFEST
from sqft.disk import read_json
from sqft.errors import InputError
from sqft.stages.report.models import ROWS, Model, base_of, read_models, read_optional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqft.recipe import Recipe

VERBS = {
    "dense": "unpack",
    "teacher_adapter": "finetune the teacher",
    "teacher": "teacher",
    "sparse": "sparsify",
    "quantized": "quantize",
    "adapter": "finetune",
    "sub_adapter": "search",
    "merged": "merge",
}


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows.

    Attributes:
        recipe: the recipe of the run.
        models: the results table, top to bottom.
        manifests: {folder: manifest} of the finished stages, in the order of the flow.
        training: adapter/sqft/training_log.json; with the next ones, None where there is no such file.
        ranks: sub_adapter/sqft/ranks.json.
        search: sub_adapter/sqft/search.json.
        verify: verify.json.
        merged_config: merged/config.json, empty where there is none.
        missing: what the recipe asks for and the folder lacks.
    """

    recipe: Recipe
    models: list[Model]
    manifests: dict[str, dict[str, Any]]
    training: dict[str, Any] | None
    ranks: dict[str, Any] | None
    search: dict[str, Any] | None
    verify: dict[str, Any] | None
    merged_config: dict[str, Any]
    missing: list[str]

    @property
    def columns(self) -> dict[str, str]:
        """The tasks, and parts of tasks, that any model has a score for: {column: its title, with the metric}."""
        titles: dict[str, str] = {}
        for model in self.models:
            for column, score in model.scores.items():
                named = f"{column.removesuffix('_nll')} NLL, nats a token" if score.metric == "nll" else ""
                titles.setdefault(column, named or f"{column} {score.metric}".strip())
        return titles

    @property
    def compressed(self) -> tuple[str, dict[str, Any]]:
        """(folder, result) of the compressed base: `quantized`, else `sparse`, else a dense one and {}."""
        name = base_of(self.manifests)
        return name, self.manifests.get(name, {}).get("result", {}) if name in ("sparse", "quantized") else {}

    @property
    def final(self) -> Model | None:
        """The furthest model of the run that was evaluated."""
        return next(filter(None, map(self.model, reversed(ROWS))), None)

    def model(self, key: str) -> Model | None:
        """Return a model by its key, None if it was not evaluated."""
        return next((model for model in self.models if model.key == key and model.scores), None)


def gather(out: Path, recipe: Recipe) -> Facts:
    """Read a run's folder.

    Args:
        out: the run's folder.
        recipe: the recipe it was made from.

    Raises:
        InputError: a file is there but cannot be read, or a baseline file is not there.
    """
    manifests = {name: read_json(out / name / MANIFEST) for name in VERBS if (out / name / MANIFEST).is_file()}
    return Facts(
        recipe=recipe,
        models=read_models(out, recipe, manifests),
        manifests=manifests,
        training=read_optional(out / "adapter" / "sqft" / "training_log.json"),
        ranks=read_optional(out / "sub_adapter" / "sqft" / "ranks.json"),
        search=_search(out / "sub_adapter" / "sqft" / "search.json"),
        verify=read_optional(out / "verify.json"),
        merged_config=read_optional(out / "merged" / "config.json") or {},
        missing=_missing(out, recipe, manifests),
    )


def _search(path: Path) -> dict[str, Any] | None:
    if (value := read_optional(path)) is None:
        return None
    try:
        for trial in [value["chosen"], value["heuristic"], *value["front"], *value["trials"]]:
            if not (math.isfinite(trial["accuracy"]) and trial["parameters"] >= 0 and trial["ranks"]):
                raise ValueError(trial)
        if not (sum(value["rows"].values()) and value["trials"]):
            raise ValueError("no rows or no trials")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        wanted = "a trial has ranks, accuracy and parameters"
        raise InputError(f"{path}: is no record of a search: {error!r}; {wanted}") from error
    return value


def _missing(out: Path, recipe: Recipe, manifests: Mapping[str, Any]) -> list[str]:
    merges = recipe.finetune is not None and recipe.merge is not None
    wanted = {
        "teacher_adapter": recipe.teacher is not None and recipe.teacher.training is not None,
        "teacher": recipe.teacher is not None and recipe.teacher.model is None,
        "sparse": recipe.sparsify is not None and not recipe.joint,
        "quantized": recipe.quantize is not None,
        "adapter": recipe.finetune is not None,
        "sub_adapter": recipe.finetune is not None,
        "merged": merges,
    }
    missing = [
        f"{name}/ ({VERBS[name]} has not finished)" for name, on in wanted.items() if on and name not in manifests
    ]
    if recipe.verify is not None and merges and not (out / "verify.json").is_file():
        missing.append("verify.json (verify has not run, so the merge is unproven)")
    wanted["teacher"] = recipe.teacher is not None  # a model that was given is evaluated too
    for key in recipe.evaluate.rows if recipe.evaluate else []:
        source = f"evaluations/{key}.json"
        if wanted.get("adapter" if key == "tuned" else key, True) and not (out / source).is_file():
            missing.append(f"{source} (this model was not evaluated)")
    return missing


def finite(points: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the (step, value) pairs of a training log whose value is a finite number."""
    pairs = [(float(point["step"]), float(point[key])) for point in points if point.get(key) is not None]
    return [(step, value) for step, value in pairs if math.isfinite(value)]
