"""The settings of the adapters and their training (section `finetune`)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from sqft.recipe.base import MAX_SEED, Config, PositiveInt

Kind = Literal["dense", "sparse", "quantized"]


class DistillConfig(Config):
    """What the compressed model also learns from its teacher: the tuned dense model, or without one the dense model."""

    hidden: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the hidden states' squared error, each block's relative to the teacher's squared norm; "
        "over all tokens, prompts included",
    )
    logits: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the divergence from the teacher's distribution of the next token (KL, nats), over the "
        "tokens that are trained on",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.hidden == self.logits == 0:
            raise ValueError("hidden and logits are both 0, so nothing is learnt from the teacher; raise one, or null")
        return self


class FinetuneConfig(Config):
    """The adapters and their training (stage `finetune`)."""

    kind: Kind = Field("sparse", description="dense (plain LoRA), sparse (masked by the base's zeros), or quantized")
    start: Literal["compensated", "dequantized", "float"] = Field(
        "compensated",
        description="where kind quantized starts: the weight as GPTQ had it just before rounding, the quantised "
        "weight, or the float weight that was quantised (as in the paper)",
    )
    derive_mask: bool = Field(
        False,
        description="of a quantised base without a stored mask, keep weights whose code is the zero point at zero; in "
        "a model that was never pruned that is one weight in eight",
    )
    ranks: list[PositiveInt] = Field(
        [48, 32, 16], min_length=1, description="ranks an elastic adapter may take; one rank is plain LoRA"
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="the delta is scaled by lora_alpha / max(ranks); null: twice the largest rank"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="probability")
    target_modules: list[str] | None = Field(
        None,
        min_length=1,
        description="last parts of the names of linears; null: all linears of the decoder's blocks that can be "
        "adapted, of a quantised base all that are quantised",
    )
    rank_groups: list[list[str]] = Field(
        [["q_proj", "k_proj", "v_proj"]], description="target modules of one layer that share a rank"
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="of initialisation, data order and rank draws; null: the recipe's, as of all stages",
    )
    epochs: float = Field(3, gt=0, description="passes over the training rows; max_steps overrides it")
    max_steps: PositiveInt | None = Field(None, description="optimiser steps")
    learning_rate: float = Field(3e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1, description="fraction of the steps over which the rate rises")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    length: PositiveInt = Field(512, description="tokens a packed row; a longer example is an error")
    batch: PositiveInt = Field(8, description="packed rows a micro-batch")
    accumulation: PositiveInt = Field(1, description="micro-batches an optimiser step")
    packing: bool = Field(True, description="several examples a row, isolated from each other")
    completion_only: bool = Field(True, description="the loss is over answers only")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto",
        description="auto: on a CPU eager in rows of up to 256 tokens and sdpa example by example in longer ones; "
        "transformers' choice elsewhere",
    )
    save_every: PositiveInt = Field(50, description="optimiser steps between checkpoints")
    evaluate_every: PositiveInt | None = Field(None, description="optimiser steps between validation losses")
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field([], description="where metrics go besides JSON")
    distill: DistillConfig | None = Field(
        None, description="learn from the uncompressed model too, not from data alone"
    )

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a distillation that was not set: it would stand in the key of every adapter made without it."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "distill" or value is not None}

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or its default."""
        return 2 * max(self.ranks) if self.lora_alpha is None else self.lora_alpha
