"""What a run's folder says: read once into plain values, each with the file it came from.

Policy: an absent file is not an error (a run may leave stages out, or still be going); it is noted in `missing` when
the recipe asked for it, and the report says so. A file that is there and cannot be read is an error. Nothing is
guessed: a size, precision or sparsity that no file states stays None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.artifact import MANIFEST
from sqft.errors import InputError
from sqft.model.load import read_json

if TYPE_CHECKING:
    from sqft.recipe import Recipe

STAGES = ("dense", "sparse", "quantized", "adapter", "sub_adapter", "merged")
VERBS = {
    "dense": "unpack",
    "sparse": "sparsify",
    "quantized": "quantize",
    "adapter": "finetune",
    "sub_adapter": "search",
    "merged": "merge",
}
ROWS = ("dense", "sparse", "quantized", "tuned", "merged")


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        metric: name of the metric.
        value: the mean.
        stderr: its standard error, in the same unit.
        n: rows it was measured on.
    """

    metric: str
    value: float
    stderr: float | None
    n: int | None


@dataclass(frozen=True)
class Row:
    """One model of the results table.

    Attributes:
        key: dense, sparse, quantized, tuned, merged, or baseline.
        label: what a reader sees.
        artefact: the folders that hold the model.
        source: the file that holds the scores.
        note: for a baseline, where it comes from.
        precision: as stored, such as BF16 or INT4.
        size_bytes: of its weight files.
        zeros: fraction of the weights of the targeted linears that are zero.
        scores: {column: score}; the first column is the first task.
        seed: of the evaluation.
        versions: of the libraries that measured it.
    """

    key: str
    label: str
    artefact: str
    source: str
    note: str = ""
    precision: str | None = None
    size_bytes: int | None = None
    zeros: float | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows.

    Attributes:
        recipe: the recipe of the run.
        rows: the results table, top to bottom.
        manifests: {folder: manifest} of the finished stages, in the order of the flow.
        training: adapter/sqft/training_log.json.
        ranks: sub_adapter/sqft/ranks.json.
        search: sub_adapter/sqft/search.json.
        verify: verify.json.
        merged_config: merged/config.json.
        missing: what the recipe asks for and the folder lacks.
    """

    recipe: Recipe
    rows: list[Row]
    manifests: dict[str, dict[str, Any]]
    training: dict[str, Any] | None
    ranks: dict[str, Any] | None
    search: dict[str, Any] | None
    verify: dict[str, Any] | None
    merged_config: dict[str, Any] | None
    missing: list[str]

    @property
    def columns(self) -> list[str]:
        """The tasks, and parts of tasks, that any row has a score for."""
        return list(dict.fromkeys(column for row in self.rows for column in row.scores))

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The sparsity of each linear of the compressed model."""
        return list(self.compressed[1].get("layers", []))

    @property
    def compressed(self) -> tuple[str, dict[str, Any]]:
        """(folder, result) of the compressed base: `quantized`, else `sparse`, else ('', {})."""
        name = next((n for n in ("quantized", "sparse") if n in self.manifests), "")
        return name, self.manifests.get(name, {}).get("result", {})

    def row(self, key: str) -> Row | None:
        """Return the row of a model, None if it was not evaluated."""
        return next((row for row in self.rows if row.key == key and row.scores), None)


def gather(out: Path, recipe: Recipe) -> Facts:
    """Read a run's folder.

    Args:
        out: the run's folder.
        recipe: the recipe it was made from.

    Raises:
        InputError: a file is there but cannot be read, or a baseline file is not there.
    """
    manifests = {name: read_json(out / name / MANIFEST) for name in STAGES if (out / name / MANIFEST).is_file()}
    return Facts(
        recipe=recipe,
        rows=_rows(out, recipe, manifests),
        manifests=manifests,
        training=_optional(out / "adapter" / "sqft" / "training_log.json"),
        ranks=_optional(out / "sub_adapter" / "sqft" / "ranks.json"),
        search=_search(out / "sub_adapter" / "sqft" / "search.json"),
        verify=_optional(out / "verify.json"),
        merged_config=_optional(out / "merged" / "config.json"),
        missing=_missing(out, recipe, manifests),
    )


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _search(path: Path) -> dict[str, Any] | None:
    if (value := _optional(path)) is None:
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


def _missing(out: Path, recipe: Recipe, manifests: dict[str, dict[str, Any]]) -> list[str]:
    wanted = {
        "sparse": recipe.sparsify is not None and not recipe.joint,
        "quantized": recipe.quantize is not None,
        "adapter": recipe.finetune is not None,
        "sub_adapter": recipe.finetune is not None,
        "merged": recipe.finetune is not None and recipe.merge is not None,
    }
    missing = [
        f"{name}/ ({VERBS[name]} has not finished)" for name, on in wanted.items() if on and name not in manifests
    ]
    if recipe.verify is not None and wanted["merged"] and not (out / "verify.json").is_file():
        missing.append("verify.json (verify has not run, so the merge is unproven)")
    off = {
        "sparse": recipe.sparsify is None or recipe.joint,
        "quantized": recipe.quantize is None,
        "tuned": recipe.finetune is None,
        "merged": not wanted["merged"],
    }
    for row in recipe.evaluate.rows if recipe.evaluate else []:
        path = Path("evaluations") / f"{row}.json"
        if not off.get(row, False) and not (out / path).is_file():
            missing.append(f"{path} (this model was not evaluated)")
    return missing


def _rows(out: Path, recipe: Recipe, manifests: dict[str, dict[str, Any]]) -> list[Row]:
    base = "quantized" if "quantized" in manifests else "sparse" if "sparse" in manifests else "dense"
    adapter = "sub_adapter" if "sub_adapter" in manifests or "adapter" not in manifests else "adapter"
    folders = {"tuned": (base, adapter)}
    labels = {
        "dense": "Dense, untuned",
        "sparse": "Sparse, untuned",
        "quantized": f"{_compression(recipe)}, untuned",
        "tuned": f"{_compression(recipe)} + adapter, unmerged",
        "merged": "Tuned and merged",
    }
    rows = []
    for key in ROWS:
        path = out / "evaluations" / f"{key}.json"
        if not path.is_file():
            continue
        value = read_json(path)
        parts = folders.get(key, (key,))
        model = _model_folder(out, parts[0], value)
        rows.append(
            Row(
                key=key,
                label=labels[key],
                artefact=" + ".join(_name(out, part, recipe) for part in parts),
                source=f"evaluations/{key}.json",
                precision=_precision(model),
                size_bytes=_size([model, *(out / part for part in parts[1:])]),
                zeros=zeros_of(parts[0], base, manifests),
                scores=_scores(value, path),
                seed=value.get("seed"),
                versions=value.get("versions", {}),
            )
        )
    after_dense = 1 if rows and rows[0].key == "dense" else 0
    return [*rows[:after_dense], *_baselines(recipe), *rows[after_dense:]]


def _compression(recipe: Recipe) -> str:
    """Return what was done to the base, as a reader says it: 'Sparse INT4'."""
    parts = ["sparse"] if recipe.sparsify is not None else []
    parts += [f"INT{recipe.quantize.bits}"] if recipe.quantize is not None else []
    text = " ".join(parts) or "dense"
    return text[0].upper() + text[1:]


def check_baselines(recipe: Recipe) -> None:
    """Refuse, before anything is run, a recipe whose baseline files are missing or unlabelled.

    Raises:
        InputError: a file that evaluate.baselines names cannot be used.
    """
    _baselines(recipe)


def _baselines(recipe: Recipe) -> list[Row]:
    rows = []
    for name in recipe.evaluate.baselines if recipe.evaluate else []:
        value = read_json(Path(name))
        if "label" not in value:
            raise InputError(f"baseline {name}: has no label; add 'label' and 'note' that say what was run")
        shown = name if not Path(name).is_absolute() else Path(name).name
        rows.append(
            Row(
                key="baseline",
                label=str(value["label"]),
                artefact=str(value.get("artefact", "not kept")),
                source=shown,
                note=str(value.get("note", "")),
                precision=value.get("precision"),
                size_bytes=value.get("size_bytes"),
                zeros=value.get("sparsity"),
                scores=_scores(value, Path(name)),
                seed=value.get("seed"),
                versions=value.get("versions", {}),
            )
        )
    return rows


def _scores(value: dict[str, Any], path: Path) -> dict[str, Score]:
    """Return {column: score}: each task, then what it reports beside (a part of its rows, a second metric)."""
    main: dict[str, Score] = {}
    further: dict[str, Score] = {}
    try:
        for task, entry in value["tasks"].items():
            main[task] = Score(str(entry["metric"]), float(entry["value"]), entry.get("stderr"), entry.get("n"))
            for name, part in entry.items():
                if isinstance(part, dict) and "value" in part:
                    further[name] = Score(str(entry["metric"]), float(part["value"]), part.get("stderr"), part.get("n"))
                elif name == "acc_norm":
                    further[f"{task} normalised"] = Score(name, float(part), None, entry.get("n"))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no evaluation: {error!r}; a task has metric, value, stderr and n") from error
    return {**main, **further}


def _model_folder(out: Path, part: str, evaluation: dict[str, Any]) -> Path | None:
    """Return where a row's model lies: its stage folder, else what the evaluation says that it was made from."""
    if (out / part).is_dir():
        return out / part
    made_from = evaluation.get("made_from", {}).get("inputs", {}).get("model", {}).get("path")
    return Path(made_from) if made_from and Path(made_from).is_dir() else None


def _name(out: Path, part: str, recipe: Recipe) -> str:
    return recipe.model if part == "dense" and not (out / "dense").is_dir() else f"{part}/"


def _precision(folder: Path | None) -> str | None:
    if folder is None or not (folder / "config.json").is_file():
        return None
    return stored_precision(read_json(folder / "config.json"))


def stored_precision(config: dict[str, Any]) -> str | None:
    """Return how a model's config says that its weights are stored: 'BF16', 'INT4'."""
    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups") or {}
    bits = {(group.get("weights") or {}).get("num_bits") for group in groups.values()} or {quantization.get("bits")}
    if known := sorted(b for b in bits if b):
        return "INT" + "/".join(map(str, known))
    names = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
    dtype: str | None = config.get("dtype") or config.get("torch_dtype")
    return names.get(dtype, dtype) if dtype else None


def _size(folders: list[Path | None]) -> int | None:
    """Return the bytes of the weight files of some folders, None where one has none."""
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder else 0 for folder in folders]
    return sum(sizes) if all(sizes) else None


def zeros_of(part: str, base: str, manifests: dict[str, dict[str, Any]]) -> float | None:
    """Return the share of zeros in the targeted linears of a model of the run, None where no file states it."""
    compressed = part if part in ("sparse", "quantized") else base
    if part == "dense" or compressed not in ("sparse", "quantized"):
        return None
    result = manifests[compressed].get("result", {})
    sparsity: float | None = result.get("sparsity")
    if part != "merged" or sparsity is None or base == "dense":
        return sparsity
    filled = manifests.get("merged", {}).get("result", {}).get("filled_zeros", 0)
    weights = sum(layer["weights"] for layer in result.get("layers", []))
    return sparsity - filled / weights if filled and weights else sparsity


def finite(points: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the (step, value) pairs of a training log whose value is a finite number."""
    pairs = [(float(point["step"]), float(point[key])) for point in points if point.get(key) is not None]
    return [(step, value) for step, value in pairs if math.isfinite(value)]
