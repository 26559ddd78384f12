"""Targets that no adapter can be put on are refused with the reason, and bare names reach the text model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.adapters.attach import load_model
from sqft.adapters.layers import sqft_layers
from sqft.errors import InputError
from sqft.model.targets import skeleton
from sqft.recipe import FinetuneConfig
from sqft.stages import finetune


def config(*targets: str, **options: Any) -> FinetuneConfig:
    return FinetuneConfig(kind="sparse", ranks=[4, 2], target_modules=list(targets), **options)


@pytest.mark.parametrize("targets", [("up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj"), ("down_proj",)])
def test_names_of_fused_experts_are_refused_with_the_reason(
    targets: tuple[str, ...], tiny_model: Callable[..., Path]
) -> None:
    for network in (skeleton(tiny_model("deepseek_v3")), load_model(tiny_model("deepseek_v3"))):
        with pytest.raises(
            InputError,
            match=r"'down_proj' is the name of routed experts too, which deepseek_v3.*others are .*kv_b_proj",
        ) as said:
            finetune.check(config(*targets), network)
        assert "plain LoRA" not in str(said.value)


def test_linears_beside_fused_experts_are_adapted(tiny_model: Callable[..., Path]) -> None:
    adapted = finetune.attach(load_model(tiny_model("deepseek_v3")), config("kv_b_proj", "o_proj"))
    assert len(sqft_layers(adapted)) == 4
    # Where there are no routed experts the same names are linears like any.
    assert len(sqft_layers(finetune.attach(load_model(tiny_model("llama")), config("up_proj", "down_proj")))) == 4


def test_what_peft_does_not_adapt_is_refused_before_it_raises(tiny_model: Callable[..., Path]) -> None:
    network = load_model(tiny_model("mamba"))
    with pytest.raises(InputError, match=r"'out_proj' is not adapted in a mamba, says PEFT: .*others are .*in_proj"):
        finetune.attach(network, config("in_proj", "out_proj"))
    assert len(sqft_layers(finetune.attach(network, config("in_proj")))) == 2


def test_whatever_peft_raises_ends_in_a_message(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("not for this layer")

    monkeypatch.setattr("sqft.stages.finetune.get_peft_model", broken)
    with pytest.raises(InputError, match=r"PEFT does not adapt q_proj of a llama: not for this layer; take"):
        finetune.attach(load_model(tiny_model("llama")), config("q_proj"))


def test_a_parameter_that_peft_takes_for_a_target_is_refused(tiny_model: Callable[..., Path]) -> None:
    from peft import get_peft_model

    from sqft.adapters.config import SqftConfig

    settings = SqftConfig(kind="sparse", r=4, lora_alpha=8, target_modules=["down_proj"])
    with pytest.raises(InputError, match=r"the parameter down_proj of [\w.]+, a DeepseekV3\w+, which is no linear"):
        get_peft_model(load_model(tiny_model("deepseek_v3")), settings)


def test_bare_names_reach_the_text_model_alone(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    network = load_model(tiny_model("gemma3"))
    assert any("vision_tower" in name and name.endswith("q_proj") for name, _ in network.named_modules())
    adapted = finetune.attach(network, config("q_proj"))
    assert sorted(sqft_layers(adapted)) == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    # Put on again from its folder, it is on the same linears.
    from peft import PeftModel

    adapted.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(load_model(tiny_model("gemma3")), str(tmp_path))
    assert sqft_layers(again).keys() == sqft_layers(adapted).keys()


def test_a_name_outside_the_blocks_alone_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"'fc1' names model\.vision_tower\S+, outside the decoder's blocks"):
        finetune.check(config("fc1"), skeleton(tiny_model("gemma3")))
    with pytest.raises(InputError, match=r"'w1' matches no linear of the model; it has down_proj, gate_proj"):
        finetune.check(config("w1"), skeleton(tiny_model("llama")))
