"""The models of the results table: what each scores, and what its files say that it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqft.disk import read_json
from sqft.errors import InputError
from sqft.pages.blocks import Cell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqft.recipe import Recipe

ROWS = ("dense", "teacher", "sparse", "quantized", "tuned", "merged")


class Score(NamedTuple):
    """A mean over `n` rows with its standard error, in the same unit."""

    metric: str
    value: float
    stderr: float | None
    n: int | None

    @property
    def is_share(self) -> bool:
        """Whether it is a share of rows, written in percent."""
        return 0 <= self.value <= 1 and not re.search("perplexity|loss|bits|nll", self.metric)

    @property
    def cell(self) -> Cell:
        """The parts of its text: '52.1 %' or, of what is no share, '12.345'; '± 3.2' in that unit; 'n = 1,000'."""
        value = self._text(self.value) + (" %" if self.is_share else "")
        error = "" if self.stderr is None else f"± {self._text(self.stderr)}"
        return Cell(value, error, "" if self.n is None else f"n = {self.n:,}")

    @property
    def text(self) -> str:
        """Value and standard error."""
        return f"{self.cell.text} {self.cell.error}".strip()

    def change_from(self, before: Score) -> tuple[str, str]:
        """Return how far it moved, and the unit of that; '0' is exact equality."""
        change = self.value - before.value
        return self._text(change, "+") if change else "0", "points" if self.is_share else ""

    def _text(self, value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if self.is_share else f"{value:{sign}.3f}"


class Model(NamedTuple):
    """A row of the results table.

    It has a key (of ROWS, or baseline), the folders that hold it (artefact), the file that its scores were read from
    (source) and says where a baseline comes from (note). `scores` begins with the first task; `zeros` is the share of
    zeros in the targeted linears; seed and versions are those of the evaluation.
    """

    key: str
    label: str
    artefact: str
    source: str
    scores: dict[str, Score]
    precision: str | None
    size_bytes: int | None
    zeros: float | None
    seed: int | None
    versions: dict[str, str]
    note: str = ""


def read_models(out: Path, recipe: Recipe, manifests: Mapping[str, dict[str, Any]]) -> list[Model]:
    """Return the models that were evaluated, baselines of earlier runs after the dense one.

    Raises:
        InputError: an evaluation or a baseline cannot be used.
    """
    base = base_of(manifests)
    if base == "dense" and recipe.teacher is not None:
        base = "teacher"  # a tuned model that was given, and lies elsewhere
    adapter = "sub_adapter" if "sub_adapter" in manifests or "adapter" not in manifests else "adapter"
    parts = ["sparse"] if recipe.sparsify is not None else []
    parts += [f"INT{recipe.quantize.bits}"] if recipe.quantize is not None else []
    compressed = " ".join(parts) or "dense"
    compressed = compressed[0].upper() + compressed[1:]
    models = []
    for key, label, *folders in (
        ("dense", "Dense, untuned", "dense"),
        ("teacher", teacher_label(recipe), "teacher"),
        ("sparse", "Sparse, untuned", "sparse"),
        ("quantized", f"{compressed}, untuned", "quantized"),
        ("tuned", f"{compressed} + adapter, unmerged", base, adapter),
        ("merged", "Tuned and merged", "merged"),
    ):
        source = f"evaluations/{key}.json"
        if (value := read_optional(out / source)) is None:
            continue
        elsewhere = {"dense": recipe.model, "teacher": (recipe.teacher and recipe.teacher.model) or ""}
        names = [f"{name}/" if (out / name).is_dir() else elsewhere.get(name) or f"{name}/" for name in folders]
        model, *beside = (out / name for name in folders)
        if not model.is_dir():  # the evaluation says what it was made from
            model = Path(value.get("made_from", {}).get("inputs", {}).get("model", {}).get("path") or model)
        known = {
            "precision": stored_precision(read_optional(model / "config.json") or {}),
            "size_bytes": _size([model, *beside]),
            "sparsity": zeros_of(folders[0], manifests),
        }
        models.append(
            _model(key, value | known | {"label": label, "artefact": " + ".join(names)}, source, out / source)
        )
    after_dense = sum(model.key in ("dense", "teacher") for model in models)
    return [*models[:after_dense], *_baselines(recipe), *models[after_dense:]]


def teacher_label(recipe: Recipe) -> str:
    """Return what the tuned dense model is called: a LoRA merged into it, or a model that was given."""
    return "Dense, tuned" if recipe.teacher is not None and recipe.teacher.model is not None else "Dense + LoRA"


def check_baselines(recipe: Recipe) -> None:
    """Refuse, before anything is run, a recipe whose baseline files are missing or unlabelled.

    Raises:
        InputError: a file that evaluate.baselines names cannot be used.
    """
    _baselines(recipe)


def _baselines(recipe: Recipe) -> list[Model]:
    models = []
    for name in recipe.evaluate.baselines if recipe.evaluate else []:
        value = read_json(Path(name))
        if "label" not in value:
            raise InputError(f"baseline {name}: has no label; add 'label' and 'note' that say what was run")
        models.append(_model("baseline", value, Path(name).name if Path(name).is_absolute() else name, Path(name)))
    return models


def _model(key: str, value: dict[str, Any], source: str, path: Path) -> Model:
    """Return a model by its evaluation, which may say more about it."""
    return Model(
        key=key,
        label=str(value["label"]),
        artefact=str(value.get("artefact", "not kept")),
        source=source,
        scores=_scores(value, path),
        precision=value.get("precision"),
        size_bytes=value.get("size_bytes"),
        zeros=value.get("sparsity"),
        seed=value.get("seed"),
        versions=value.get("versions", {}),
        note=str(value.get("note", "")),
    )


def _scores(value: dict[str, Any], path: Path) -> dict[str, Score]:
    """Return {column: score}: each task, then what it reports beside (a part of its rows, a second metric)."""
    main: dict[str, Score] = {}
    further: dict[str, Score] = {}
    try:
        for task, entry in value["tasks"].items():
            main[task] = Score(str(entry["metric"]), float(entry["value"]), entry.get("stderr"), entry.get("n"))
            for name, part in entry.items():
                if isinstance(part, dict) and "value" in part:
                    metric = str(part.get("metric", entry["metric"]))
                    further[name] = Score(metric, float(part["value"]), part.get("stderr"), part.get("n"))
                elif name == "acc_norm":
                    further[f"{task} normalised"] = Score(name, float(part), None, entry.get("n"))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no evaluation: {error!r}; a task has metric, value, stderr and n") from error
    return {**main, **further}


def stored_precision(config: Mapping[str, Any]) -> str | None:
    """Return how a model's config says that its weights are stored: 'BF16', 'INT4'."""
    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups") or {}
    bits = {(group.get("weights") or {}).get("num_bits") for group in groups.values()} or {quantization.get("bits")}
    if known := sorted(b for b in bits if b):
        return "INT" + "/".join(map(str, known))
    names = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
    dtype: str | None = config.get("dtype") or config.get("torch_dtype")
    return names.get(dtype, dtype) if dtype else None


def _size(folders: list[Path]) -> int | None:
    """Return the bytes of the weight files of some folders, None where one has none."""
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders]
    return sum(sizes) if all(sizes) else None


def zeros_of(part: str, manifests: Mapping[str, dict[str, Any]]) -> float | None:
    """Return the share of zeros in the targeted linears of a model of the run, None where no file states it."""
    compressed = part if part in ("sparse", "quantized") else base_of(manifests)
    if part in ("dense", "teacher") or compressed in ("dense", "teacher"):
        return None
    result = manifests.get(compressed, {}).get("result", {})
    sparsity: float | None = result.get("sparsity")
    if part != "merged" or not sparsity:  # merging fills zeros of a pruned base alone
        return sparsity
    weights = sum(layer["weights"] for layer in result.get("layers", []))
    return sparsity - filled_zeros(manifests) / weights if weights else sparsity


def filled_zeros(manifests: Mapping[str, dict[str, Any]]) -> int:
    """Return how many zeros of the base merging filled."""
    return int(manifests.get("merged", {}).get("result", {}).get("filled_zeros", 0))


def base_of(manifests: Mapping[str, Any]) -> str:
    """Return the folder of the base that was tuned: the quantised one, else the sparse one, else a dense one."""
    return next((name for name in ("quantized", "sparse", "teacher") if name in manifests), "dense")


def read_optional(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, None where there is no file."""
    return read_json(path) if path.is_file() else None
