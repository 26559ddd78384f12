"""Targets that no adapter can be put on are refused with the reason, and bare names reach the text model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

import sqft
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
    with pytest.raises(InputError, match="'dt_proj' is a linear whose weight a mamba reads without calling it"):
        finetune.attach(network, config("dt_proj"))
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
    adapted.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(load_model(tiny_model("gemma3")), str(tmp_path))
    assert sqft_layers(again).keys() == sqft_layers(adapted).keys()


def test_a_name_outside_the_blocks_alone_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"'fc1' names model\.vision_tower\S+, outside the decoder's blocks"):
        finetune.check(config("fc1"), skeleton(tiny_model("gemma3")))
    with pytest.raises(InputError, match=r"'w1' matches no linear of the model; it has down_proj, gate_proj"):
        finetune.check(config("w1"), skeleton(tiny_model("llama")))


# ---- no targets named: every linear that can be adapted ----


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("llama", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
         "mlp.gate_proj mlp.up_proj mlp.down_proj"),
        ("gpt2", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
        ("phi3", "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
        ("mixtral", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"),  # no experts, no router
        ("mamba", "mixer.in_proj mixer.x_proj"),  # PEFT refuses out_proj; dt_proj is never called
        ("gemma3", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
         "mlp.gate_proj mlp.up_proj mlp.down_proj"),  # and none of the vision tower
    ],
)  # fmt: skip
def test_no_targets_mean_all_that_can_be_adapted(arch: str, names: str, tiny_model: Callable[..., Path]) -> None:
    adapted = finetune.attach(load_model(tiny_model(arch)), FinetuneConfig(kind="sparse", ranks=[4, 2]))
    found = {name.split(".", next(i for i, part in enumerate(name.split(".")) if part.isdigit()) + 1)[-1]
             for name in sqft_layers(adapted)}  # fmt: skip
    assert found == set(names.split())
    assert len(sqft_layers(adapted)) == 2 * len(names.split())
    config = adapted.peft_config["default"]
    assert config.lora_alpha == 8  # twice the largest rank


def test_of_a_quantised_base_all_that_is_quantised_is_adapted(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    left = "model.layers.0.self_attn.q_proj"
    base = tmp_path / "int4"
    sqft.quantize(tiny_model("llama"), base, method="rtn", group_size=16, ignore=[left, "o_proj"])
    settings = FinetuneConfig(kind="quantized", ranks=[4, 2], start="dequantized")
    adapted = finetune.attach(load_model(base, packed=True), settings)
    layers = sqft_layers(adapted)
    assert len(layers) == 11
    assert left not in layers
    assert not any("o_proj" in name for name in layers)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load_model(base, packed=True), str(tmp_path / "adapter"))
    assert sqft_layers(again).keys() == layers.keys()
    with pytest.raises(InputError, match="q_proj"):  # named, it reaches the float one too
        finetune.attach(load_model(base, packed=True), settings.model_copy(update={"target_modules": ["q_proj"]}))
