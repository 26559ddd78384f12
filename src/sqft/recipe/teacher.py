"""The settings of the tuned dense model that a run compresses (section `teacher`)."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from sqft.recipe.base import Config, PathText


class TeacherConfig(Config):
    """The tuned dense model that is compressed in place of `model` (stage `teacher`): one of its keys says which."""

    adapter: PathText | None = Field(
        None, description="a LoRA of `model`, a folder or a Hub id: PEFT merges it, and the result is compressed"
    )
    model: PathText | None = Field(
        None,
        description="`model` as you have tuned it, in full or with an adapter merged: a folder, a file or a Hub id",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of an adapter or a model of the Hub; null: its main branch"
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.adapter is not None and self.model is not None:
            raise ValueError(
                f"has an adapter ({self.adapter}) and a model ({self.model}); give the one that tunes the dense model"
            )
        if self.adapter is None and self.model is None:
            raise ValueError("has neither adapter nor model; give one, or set teacher: null to compress `model` itself")
        return self
