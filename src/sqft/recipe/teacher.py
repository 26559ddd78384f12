"""The settings of the tuned dense model that a run compresses, or compares with (section `teacher`)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from sqft.recipe.base import PathText, PositiveInt
from sqft.recipe.finetune import FinetuneConfig

_GIVEN = ("adapter", "model", "revision")
_ALWAYS = ("compress",)


class TeacherConfig(FinetuneConfig):
    """The tuned dense model: an adapter, a model, or one that the run tunes. It is compressed in place of `model`."""

    kind: Literal["dense"] = Field("dense", description="plain LoRA, merged into the dense model after its training")
    ranks: list[PositiveInt] = Field([32], min_length=1, max_length=1, description="the rank of the LoRA")
    distill: None = Field(None, description="not here: a teacher has no teacher")
    compress: bool = Field(
        True,
        description="the tuned model is what is pruned and quantised; false: `model` itself is, and the tuned one is "
        "the row “dense + LoRA” beside it and what finetune.distill learns from",
    )
    adapter: PathText | None = Field(
        None, description="a LoRA of `model`, a folder or a Hub id: PEFT merges it, and the result is compressed"
    )
    model: PathText | None = Field(
        None,
        description="`model` as you have tuned it, in full or by a merged adapter: a folder, a file or a Hub id",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of an adapter or a model of the Hub; null: its main branch"
    )

    @field_validator("distill", mode="before")
    @classmethod
    def _untaught(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("a teacher has no teacher; leave it out, or write it under finetune")
        return value

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.adapter is not None and self.model is not None:
            raise ValueError(
                f"has an adapter ({self.adapter}) and a model ({self.model}); give the one that tunes the dense model"
            )
        if self.given is None:
            if self.revision is not None:
                raise ValueError(f"revision is {self.revision}, which only an adapter or a model has; leave it out")
            return self
        if settings := sorted(self.model_fields_set.difference(_GIVEN, _ALWAYS)):
            raise ValueError(
                f"{self.given} is there already and is not trained, so {', '.join(settings)} would do nothing; leave "
                "them out, or leave out what is given to have the dense model tuned"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the settings of a training that does not happen, and else what is not given."""
        values: dict[str, Any] = serialize(self)
        used = {name for name in values if (name in _GIVEN) == (self.given is not None)} - {"distill"} | set(_ALWAYS)
        return {name: value for name, value in values.items() if name in used}

    @property
    def given(self) -> str | None:
        """The adapter or the model that is there already; None where the run tunes the dense model itself."""
        return self.adapter or self.model

    @property
    def training(self) -> FinetuneConfig | None:
        """How the run tunes the dense model; None where an adapter or a model is given."""
        if self.given is not None:
            return None
        return FinetuneConfig(**{name: getattr(self, name) for name in FinetuneConfig.model_fields})
