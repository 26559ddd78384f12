"""One run: a model, a task, and the settings of every stage, checked against each other."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from sqft.device import DeviceName
from sqft.recipe.base import MAX_SEED, Config, PathText, PositiveInt
from sqft.recipe.finetune import FinetuneConfig
from sqft.recipe.settings import (
    DataConfig,
    EvaluateConfig,
    MergeConfig,
    QuantizeConfig,
    SearchConfig,
    SparsifyConfig,
    VerifyConfig,
)
from sqft.recipe.teacher import TeacherConfig


class Recipe(Config):
    """One run: a model, a task, and the stages to take it through."""

    name: str = Field(description="names the run's folder, runs/NAME, unless --out is given")
    model: PathText = Field(
        description="a Hub id, a folder, a .gguf file, or 'package:NAME/FILE.gguf' for one inside a Python package"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hub model; null: its main branch")
    data: DataConfig
    seed: int = Field(0, ge=0, le=MAX_SEED)
    threads: PositiveInt | None = Field(None, description="CPU threads; None leaves PyTorch's choice")
    device: DeviceName = Field(
        "auto", description="auto: a CUDA card where there is one (which, CUDA_VISIBLE_DEVICES says); or cpu, or cuda"
    )
    trust_remote_code: bool = Field(False, description="run code that the model's repository brings; off unless said")
    note: str = Field("", description="what a reader of the report should know about this recipe")
    teacher: TeacherConfig | None = None
    sparsify: SparsifyConfig | None = None
    quantize: QuantizeConfig | None = None
    finetune: FinetuneConfig | None = FinetuneConfig()
    search: SearchConfig = SearchConfig()
    merge: MergeConfig | None = MergeConfig()
    verify: VerifyConfig | None = VerifyConfig()
    evaluate: EvaluateConfig | None = EvaluateConfig()

    @model_validator(mode="after")
    def _kinds(self) -> Self:
        if self.finetune is not None and self.quantize is not None and self.finetune.kind == "sparse":
            raise ValueError(
                "finetune.kind sparse needs a float base and this recipe quantises it; use kind quantized (merged into "
                "one quantised model) or dense (kept beside it)"
            )
        quantize, sparsify = self.quantize, self.sparsify
        if self.finetune is not None and self.merge is not None and self.finetune.kind == "dense":
            losses = [("sparsify", sparsify, "allow_sparsity_loss"), ("quantize", quantize, "allow_precision_loss")]
            for stage, config, allowed in losses:
                if config is not None and not getattr(self.merge, allowed):
                    raise ValueError(
                        f"a dense adapter cannot be merged into what {stage} makes without losing it; set merge: null "
                        f"to keep the adapter beside it, or allow the loss with merge.{allowed}"
                    )
        if (
            self.joint
            and sparsify is not None
            and sparsify.method == "sparsegpt"
            and self.finetune is not None
            and self.finetune.kind == "quantized"
            and self.finetune.start == "float"
        ):
            raise ValueError(
                "start: float needs the sparse float weights, which a joint pass with sparsegpt does not keep; set "
                "quantize.joint: false, or use another start"
            )
        if (
            self.joint
            and quantize is not None
            and sparsify is not None
            and quantize.calibration not in (None, sparsify.calibration)
        ):
            raise ValueError(
                "sparsify and quantize run jointly over one calibration text, but have different calibrations; leave "
                "quantize.calibration out, or set quantize.joint: false"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_another(self) -> Self:
        distills = self.finetune is not None and self.finetune.distill is not None
        if distills and self.sparsify is None and self.quantize is None:
            raise ValueError(
                "finetune.distill: nothing is compressed, so the teacher would be the very model that is tuned; add "
                "sparsify or quantize, or set finetune.distill: null"
            )
        return self

    @model_validator(mode="after")
    def _teacher_beside_what_is_compressed(self) -> Self:
        beside = self.teacher is not None and not self.teacher.compress
        if beside and self.sparsify is None and self.quantize is None:
            raise ValueError(
                "teacher.compress is false, so `model` itself would be compressed, and nothing is; add sparsify or "
                "quantize, or leave the teacher out"
            )
        return self

    @property
    def joint(self) -> bool:
        """Whether sparsifying and quantising are one pass."""
        return self.sparsify is not None and self.quantize is not None and self.quantize.joint
