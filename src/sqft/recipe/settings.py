"""The settings of the data and of each stage, with the unit of each in its description."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from sqft.recipe.base import Config, PathText, PositiveInt, parse_pattern


class Template(Config):
    """How a row of your own data becomes a prompt and an answer.

    `{column}` is replaced by the row's value; `{{` and `}}` are braces.
    """

    prompt: str = Field(description="for example 'Question: {question}\\nAnswer:'")
    completion: str = Field(description="for example ' {answer}'")


def _iso_date(value: Any) -> Any:
    """Return a date as ISO text; YAML reads an unquoted one as a date.

    Raises:
        ValueError: it is a text of another form.
    """
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, str):
        try:
            datetime.datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"date is {value!r}; write it as 2026-01-31 or 2026-01-31T09:30:00") from error
    return value


class DataConfig(Config):
    """Which rows to train on and how they read."""

    task: str = Field(
        description="a built-in task (gsm8k, mawps, boolq, ...), a mix of them (math, commonsense, 'boolq+arc_easy'), "
        "'gym:NAME' for reasoning-gym problems, the YAML file of a task of your own, a Hub data set 'owner/name', or "
        "the path of a file (JSONL, JSON, CSV or parquet) or of a folder of them, with prompt/completion, messages, or "
        "columns that `template` names"
    )
    template: Template | None = Field(None, description="needed for a data set that is not built in")
    train_limit: PositiveInt | None = Field(None, description="rows of the training split at most")
    validation_rows: int = Field(
        0, ge=0, description="rows cut from the training split for validation, the same for every seed"
    )
    test_rows: int = Field(
        0,
        ge=0,
        description="rows cut from the training split for testing, the same for every seed; for data without a test "
        "split of its own",
    )
    chat_template: bool = Field(
        False, description="ask through the tokenizer's chat template, as chat models are asked"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of a generated task: {train_size, validation_size, test_size, seed, choices, config}",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hub data set; null: its newest")
    date: Annotated[str | None, BeforeValidator(_iso_date)] = Field(
        None,
        description="the date for a chat template that asks for one, such as 2026-01-31 or 2026-01-31T09:30:00; "
        "null: the moment the command begins",
    )

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what most data has none of: it would stand in the key of every folder that was made without it."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name not in ("revision", "date") or value is not None}


class CalibrationConfig(Config):
    """Text that is run through the model to see which inputs each weight meets."""

    data: str = Field(
        "task", description="'task' (training rows), 'wikitext2', or the path of a text or of a file of rows"
    )
    samples: PositiveInt = Field(128, description="sequences")
    length: PositiveInt = Field(256, description="tokens a sequence")
    batch: PositiveInt = Field(8, description="sequences run at a time; bounds the memory of a block's activations")


class SparsifyConfig(Config):
    """Which weights become zero (stage `sparsify`)."""

    method: str = Field(
        "wanda", description="wanda, magnitude, sparsegpt, a registered name, or 'package.module:function'"
    )
    sparsity: float = Field(0.5, description="fraction of each output row that becomes zero, strictly between 0 and 1")
    pattern: str = Field("unstructured", description="'unstructured' (per output row) or 'N:M': keep N of every M")
    mask: PathText | None = Field(
        None, description="a safetensors file of masks made elsewhere, used instead of a score"
    )
    update: bool | None = Field(
        None,
        description="whether the weights that stay make up for those that are pruned, on calibration text; sparsegpt "
        "always does, and null is false for the others",
    )
    targets: list[str] = Field(["*"], description="patterns over the names of the linears inside the decoder blocks")
    ignore: list[str] = Field([], description="patterns of linears to leave dense")
    unreached_experts: Literal["error", "magnitude"] = Field(
        "error", description="what to do with an expert that no calibration token reached"
    )
    calibration: CalibrationConfig = CalibrationConfig()

    @field_validator("sparsity")
    @classmethod
    def _inside(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(f"sparsity is {value}; choose a number strictly between 0 and 1, such as 0.5")
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        parse_pattern(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "sparsity" in self.model_fields_set and abs(self.sparsity - self.fraction) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern} has sparsity {self.fraction:g}, but sparsity is {self.sparsity:g}; "
                "leave sparsity out with an N:M pattern"
            )
        if self.update is False and self.mask is None and self.method == "sparsegpt":
            raise ValueError("method sparsegpt updates by itself; leave update out, or choose a score such as wanda")
        return self

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an update that was not set: it would stand in the key of every folder that was made without it."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "update" or value is not None}

    @property
    def key(self) -> dict[str, Any]:
        """What a folder's manifest records: `update` only where it changes what the method does by itself."""
        update = {"update": True} if self.updates and (self.mask or self.method != "sparsegpt") else {}
        return {**self.model_dump(mode="json", exclude={"update"}), **update}

    @property
    def updates(self) -> bool:
        """Whether the weights that stay make up for those that are pruned."""
        if self.update is not None:
            return self.update
        return self.mask is None and self.method == "sparsegpt"

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.updates or (self.mask is None and self.method != "magnitude")

    @property
    def fraction(self) -> float:
        """Fraction of the weights that become zero, by whichever of `pattern` and `sparsity` says it."""
        structure = parse_pattern(self.pattern)
        return self.sparsity if structure is None else 1 - structure[0] / structure[1]


def _whole_number(value: Any) -> Any:
    """Let a number that comes as a flag's text be one of a Literal's."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


class QuantizeConfig(Config):
    """The integer grid that weights are rounded to (stage `quantize`)."""

    method: Literal["gptq", "rtn"] = Field(
        "gptq", description="gptq: rounding errors are made up for on calibration data; rtn: round to nearest"
    )
    bits: Annotated[Literal[2, 3, 4, 8], BeforeValidator(_whole_number)] = Field(4, description="bits a weight")
    group_size: PositiveInt | None = Field(64, description="weights of a row that share a scale; null is the whole row")
    symmetric: bool = Field(False, description="the code for zero is the middle one and is not stored")
    act_order: bool = Field(
        True,
        description="gptq takes columns by falling activity; groups stay contiguous; not where the same loop prunes",
    )
    damping: float = Field(0.01, gt=0, description="added to the hessian's diagonal, as a fraction of its mean")
    format: Literal["compressed-tensors", "gptq"] = Field(
        "compressed-tensors", description="how the model is stored; vLLM opens both, transformers alone the first"
    )
    targets: list[str] = Field(["*"], description="patterns over the names of the linears inside the decoder blocks")
    ignore: list[str] = Field([], description="patterns of linears to leave in floating point")
    joint: bool = Field(
        True, description="sparsify in the same pass over the calibration text; false writes the sparse model too"
    )
    calibration: CalibrationConfig | None = Field(None, description="null: as sparsify's")


class SearchConfig(Config):
    """Which sub-adapter is taken out of the super-adapter."""

    strategy: Literal["heuristic", "maximal", "minimal", "file", "hill_climbing", "nsga2", "random"] = Field(
        "heuristic",
        description="heuristic: the median rank of each group; file: the ranks in `ranks_file`; hill_climbing (the "
        "paper's Algorithm 1), nsga2 (accuracy against size) and random evaluate 1 + turns x neighbours "
        "configurations on validation rows, the heuristic first",
    )
    ranks_file: PathText | None = Field(None, description="JSON object {group: rank}")
    turns: PositiveInt = Field(5, description="T of Algorithm 1; generations of nsga2")
    neighbours: PositiveInt = Field(8, description="N, configurations sampled a turn; population of nsga2")
    steps: PositiveInt = Field(8, description="S, how many single steps of rank a neighbour may be from the anchor")
    samples: PositiveInt = Field(100, description="M, validation rows of each task that a configuration is judged on")
    batch: PositiveInt = Field(32, description="sequences at a time")

    @model_validator(mode="after")
    def _population(self) -> Self:
        if self.strategy == "nsga2" and self.neighbours < 2:
            raise ValueError("strategy nsga2 needs neighbours of 2 or more: they are its population")
        return self

    @property
    def searches(self) -> bool:
        """Whether configurations are evaluated, which takes the base and validation rows."""
        return self.strategy in ("hill_climbing", "nsga2", "random")

    @property
    def budget(self) -> int:
        """Configurations evaluated at most."""
        return 1 + self.turns * self.neighbours


class MergeConfig(Config):
    """How the adapter goes into the base."""

    allow_sparsity_loss: bool = Field(
        False, description="merge a dense adapter into a sparse base although its zeros are lost; the report says so"
    )
    allow_precision_loss: bool = Field(
        False, description="merge a dense adapter into a quantised base by rounding the sum; verify says what was lost"
    )


class VerifyConfig(Config):
    """The proof that merging changed nothing."""

    prompts: PositiveInt = Field(16, description="held-out prompts whose logits are compared")
    accuracy_rows: int = Field(
        32,
        ge=0,
        description="held-out rows on which accuracy is compared, by models that are in memory whole; 0: none, and "
        "models are read block by block",
    )
    logit_bound: float | None = Field(
        None,
        ge=0,
        description="largest absolute difference of a logit that passes; null: 0 where merging is exact, and for a "
        "dense adapter on a float base what computing in the model's own precision costs anyway",
    )


class EvaluateConfig(Config):
    """What the table reports (stage `evaluate`)."""

    tasks: list[str] = Field([], description="tasks to report; empty is the one of the data, `task`")
    limit: PositiveInt | None = Field(None, description="rows a task")
    batch: PositiveInt = Field(32, description="sequences at a time")
    fewshot: int = Field(
        0,
        ge=0,
        description="worked examples before each question, drawn for each from the training rows as lm-eval does",
    )
    rows: list[Literal["dense", "teacher", "sparse", "quantized", "tuned", "merged"]] = Field(
        ["dense", "teacher", "sparse", "quantized", "tuned", "merged"],
        description="which models of the run are evaluated; those that the recipe does not make are left out",
    )
    baselines: list[PathText] = Field(
        [], description="eval.json files of earlier, labelled runs that the table shows beside (dense + LoRA, say)"
    )
