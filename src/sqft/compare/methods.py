"""The rows of the paper's tables, each defined by base, kind of adapter, and one or elastic ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqft.errors import InputError, Problems
from sqft.recipe import (
    FinetuneConfig,
    MergeConfig,
    QuantizeConfig,
    SearchConfig,
    SparsifyConfig,
    VerifyConfig,
    parse_config,
)

if TYPE_CHECKING:
    from pathlib import Path

    from sqft.recipe import Kind, Recipe

Base = Literal["dense", "teacher", "sparse", "int4"]
Start = Literal["compensated", "dequantized", "float"]


@dataclass(frozen=True)
class Choices:
    """The choices that define a row of the table.

    Attributes:
        label: the paper's name.
        base: the frozen model; teacher is the tuned dense one of the recipe's section `teacher`.
        kind: of the adapter; None is the untuned base.
        elastic: several ranks (NLS), or only the median of them.
        merged: whether the result is one merged, verified model.
        start: of quantisation-aware training; None is the recipe's.
    """

    label: str
    base: Base
    kind: Kind | None = None
    elastic: bool = False
    merged: bool = False
    start: Start | None = None

    @property
    def evaluated(self) -> Literal["dense", "teacher", "sparse", "quantized", "tuned", "merged"]:
        """Which model of the run the row reports."""
        if self.kind is None:
            return "quantized" if self.base == "int4" else self.base
        return "merged" if self.merged else "tuned"


METHODS: dict[str, Choices] = {
    "dense": Choices("dense, untuned", "dense"),
    "dense_lora": Choices("dense + LoRA", "dense", "dense", merged=True),
    "sparse": Choices("sparse, untuned", "sparse"),
    "lora": Choices("LoRA", "sparse", "dense"),
    "shears": Choices("Shears", "sparse", "dense", elastic=True),
    "sparsepeft": Choices("SQFT + SparsePEFT", "sparse", "sparse", elastic=True, merged=True),
    "int4": Choices("sparse INT4, untuned", "int4"),
    "gptq_lora": Choices("GPTQ + LoRA", "int4", "dense"),
    "sqft": Choices("SQFT", "int4", "dense", elastic=True),
    "qa_sparsepeft": Choices("SQFT + QA-SparsePEFT", "int4", "quantized", elastic=True, merged=True),
    # Not of the paper: the tuned model that a recipe compresses, or compares with.
    "teacher": Choices("the teacher: dense, tuned", "teacher"),
    # The same with one rank (Tables 5, 9, 10), and from the other starting weights.
    "sparsepeft_lora": Choices("SparsePEFT, one rank", "sparse", "sparse", merged=True),
    "qa_lora": Choices("QA-SparsePEFT, one rank", "int4", "quantized", merged=True),
    "qa_dequantized": Choices(
        "QA-SparsePEFT from GPTQ's weight", "int4", "quantized", elastic=True, merged=True, start="dequantized"
    ),
    "qa_float": Choices(
        "QA-SparsePEFT from the float weight", "int4", "quantized", elastic=True, merged=True, start="float"
    ),
}
PAPER = tuple(METHODS)[:10]


def default_methods(recipe: Recipe) -> tuple[str, ...]:
    """Return the paper's ten rows, and the teacher after the dense ones where the recipe has one."""
    return PAPER if recipe.teacher is None else (*PAPER[:2], "teacher", *PAPER[2:])


def base_recipe(recipe: Recipe, base: Base, model: Path | None = None) -> Recipe:
    """Return the recipe that makes only a base."""
    # Two passes, so that the sparse model is kept on disk: it is a row itself and the source of the INT4 base.
    quantize = (recipe.quantize or QuantizeConfig()).model_copy(update={"joint": False})
    return recipe.model_copy(
        update={
            "model": recipe.model if model is None else str(model),
            "teacher": None if base == "dense" else recipe.teacher,
            "sparsify": recipe.sparsify if base in ("sparse", "int4") else None,
            "quantize": quantize if base == "int4" else None,
            "finetune": None,
            "merge": None,
            "verify": None,
            "evaluate": None,
        }
    )


def method_recipe(recipe: Recipe, method: Choices, seed: int, model: Path | None = None) -> Recipe:
    """Return the recipe of one row with one training seed, on the bases that `base_recipe` makes."""
    made = base_recipe(recipe, method.base, model)
    assert recipe.evaluate is not None
    values: dict[str, object] = {
        "evaluate": recipe.evaluate.model_copy(update={"rows": [method.evaluated], "baselines": []})
    }
    if method.kind is not None:
        tuned = recipe.finetune or FinetuneConfig()
        ranks = sorted(set(tuned.ranks))
        one = ranks[len(ranks) // 2]
        values["finetune"] = tuned.model_copy(
            update={
                "kind": method.kind,
                "ranks": list(tuned.ranks) if method.elastic else [one],
                "start": method.start or tuned.start,
                "seed": seed,
                # Where nothing is compressed the teacher would be the very model that is tuned.
                "distill": tuned.distill if made.sparsify or made.quantize else None,
            }
        )
        values["search"] = recipe.search if method.elastic else SearchConfig(strategy="maximal")
        if method.merged:
            values["merge"] = MergeConfig()
            values["verify"] = recipe.verify or VerifyConfig()
    return made.model_copy(update=values)


def check_methods(methods: Sequence[str], problems: Problems) -> None:
    """Add a problem for every unknown method."""
    for name in methods:
        if name not in METHODS:
            problems.add(f"there is no method {name!r}; the methods are {', '.join(METHODS)}")


def with_level(recipe: Recipe, level: str) -> Recipe:
    """Return a recipe at another level of sparsity: '0.3', '0' for none at all, or a pattern such as '2:4'.

    Raises:
        InputError: it is none of these.
    """
    settings = (recipe.sparsify or SparsifyConfig()).model_dump(exclude={"sparsity", "pattern"})
    if ":" in level:
        chosen = parse_config(SparsifyConfig, settings | {"pattern": level}, f"level {level}")
        return recipe.model_copy(update={"sparsify": chosen})
    try:
        sparsity = float(level)
    except ValueError as error:
        raise InputError(
            f"level {level!r}: give a sparsity such as 0.5, 0 for none, or a pattern such as 2:4"
        ) from error
    if sparsity == 0:
        return recipe.model_copy(update={"sparsify": None})
    chosen = parse_config(SparsifyConfig, settings | {"sparsity": sparsity}, f"level {level}")
    return recipe.model_copy(update={"sparsify": chosen})
