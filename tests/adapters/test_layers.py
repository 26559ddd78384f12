"""Adapters under stock PEFT: attach, train, save, load, merge, unmerge, disable; on several architectures."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sqft.adapters.attach import load_model
from sqft.adapters.config import SqftConfig
from sqft.adapters.elastic import ElasticRanks, rank_space, set_ranks
from sqft.adapters.layers import sqft_layers
from sqft.context import Context
from sqft.errors import InputError
from sqft.recipe import MergeConfig
from sqft.stages import merge
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.masks import load_mask

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "up_proj"],
    "phi3": ["qkv_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "opt": ["q_proj", "fc1"],
    "gemma2": ["q_proj", "down_proj"],
    "mixtral": ["q_proj", "o_proj"],
}
IDS = torch.arange(4, 20).view(2, 8)


def sparse_model(folder: Path) -> Any:
    """A model whose block weights have half their entries at zero."""
    model = load_model(folder)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if (
            parameter.ndim == 2
            and "embed" not in name
            and "wte" not in name
            and "wpe" not in name
            and "lm_head" not in name
        ):
            parameter.data.mul_(torch.rand(parameter.shape, generator=generator) > 0.5)
    return model


def adapted(folder: Path, arch: str = "llama", kind: str = "sparse", **options: Any) -> Any:
    config = SqftConfig(task_type="CAUSAL_LM", kind=kind, r=4, lora_alpha=8, target_modules=TARGETS[arch], **options)
    model = get_peft_model(sparse_model(folder), config)
    generator = torch.Generator().manual_seed(1)
    for layer in sqft_layers(model).values():
        for part in (layer.lora_A, layer.lora_B):
            weight = part["default"].weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", list(TARGETS))
def test_sparse_merge_is_exact_keeps_zeros_and_unmerges(arch: str, dtype: str, tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model(arch, dtype), arch)
    base = {name: layer.get_base_layer().weight.data.clone() for name, layer in sqft_layers(model).items()}
    live = logits(model)
    model.merge_adapter()
    for name, layer in sqft_layers(model).items():
        merged = layer.get_base_layer().weight.data
        assert (merged[base[name] == 0] == 0).all()
        assert not torch.equal(merged, base[name])
    assert torch.equal(logits(model), live)
    model.unmerge_adapter()
    for name, layer in sqft_layers(model).items():
        assert torch.equal(layer.get_base_layer().weight.data, base[name])
    assert torch.equal(logits(model), live)
    plain = model.merge_and_unload()
    assert not sqft_layers(plain)
    assert torch.equal(logits(plain), live)


def test_disable_adapter_gives_the_base(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    model = adapted(folder)
    expected = logits(sparse_model(folder))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


def test_sparse_equals_the_papers_equation(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model("llama"))
    reference = sparse_model(tiny_model("llama"))
    for name, layer in sqft_layers(model).items():
        weight = reference.get_submodule(name).weight.data
        delta = layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data * 2.0
        weight += delta * (weight != 0)
    assert torch.allclose(logits(model), logits(reference), atol=1e-4)


def test_dense_loads_in_stock_peft_with_equal_logits(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    model = adapted(folder, kind="dense", ranks=[4, 2])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not {"kind", "ranks", "rank_groups"} & set(config)
    stock = PeftModel.from_pretrained(sparse_model(folder), tmp_path).eval()
    assert not sqft_layers(stock)
    assert torch.equal(logits(stock), logits(model))


def test_a_masked_adapter_does_not_load_as_plain_lora(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    model = adapted(folder)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(sparse_model(folder), tmp_path).eval()
    assert isinstance(again.peft_config["default"], SqftConfig)
    assert torch.equal(logits(again), logits(model))
    script = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    stock = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert stock.returncode != 0
    assert "SQFT" in stock.stderr


def test_adapters_of_two_kinds_do_not_share_a_model(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    adapted(folder).save_pretrained(tmp_path / "masked")
    stock = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS["llama"])
    plain = get_peft_model(sparse_model(folder), stock)
    for kind in ("sparse", "quantized"):
        masked = SqftConfig(task_type="CAUSAL_LM", kind=kind, r=4, target_modules=TARGETS["llama"])
        with pytest.raises(ValueError, match=r"unsupported variant combination: .'needs_sqft_layers'"):
            plain.add_adapter("second", masked)
    with pytest.raises(ValueError, match=r"unsupported variant combination: .'needs_sqft_layers'"):
        plain.load_adapter(tmp_path / "masked", "third")
    assert list(plain.peft_config) == ["default"]
    with pytest.raises(InputError, match="has kind 'dense', not 'sparse'"):
        adapted(folder).add_adapter("second", stock)
    # A dense one is a plain LoRA, and joins those of either layer.
    dense = SqftConfig(task_type="CAUSAL_LM", kind="dense", r=4, target_modules=TARGETS["llama"])
    plain.add_adapter("dense", dense)
    adapted(folder, kind="dense").add_adapter("second", stock)
    with pytest.raises(ValueError, match=r"unsupported variant combination: .'use_dora'"):
        adapted(folder, kind="dense").add_adapter("second", LoraConfig(use_dora=True, target_modules=["q_proj"]))


def test_a_masked_adapter_is_for_linears_alone(tiny_model: Callable[..., Path]) -> None:
    both = ["q_proj", "embed_tokens"]
    with pytest.raises(InputError, match=r"kind sparse, .* for model.embed_tokens, a Embedding, which is no linear"):
        get_peft_model(sparse_model(tiny_model("llama")), SqftConfig(kind="sparse", r=4, target_modules=both))
    dense = get_peft_model(sparse_model(tiny_model("llama")), SqftConfig(kind="dense", r=4, target_modules=both))
    assert len(sqft_layers(dense)) == 2  # the embedding has PEFT's own layer


def test_what_is_not_saved_of_a_configuration(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    adapted(tiny_model("llama")).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SQFT"
    assert "needs_sqft_layers" not in saved


def test_bias_and_fused_targets_train(tiny_model: Callable[..., Path]) -> None:
    for arch in ("qwen2", "phi3", "gpt2", "opt"):
        model = adapted(tiny_model(arch), arch).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for name, layer in sqft_layers(model).items():
            for part in (layer.lora_A, layer.lora_B):
                grad = part["default"].weight.grad
                assert grad is not None and grad.abs().sum() > 0, (arch, name)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradients_agree_with_and_without_checkpointing(kind: str, tiny_model: Callable[..., Path]) -> None:
    grads = []
    for checkpointing in (False, True):
        model = adapted(tiny_model("llama"), kind=kind, ranks=[4, 2], lora_dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        space = rank_space(model)
        for name, layer in sqft_layers(model).items():
            layer.drawn_rank = space.per_module(space.draw(0, 3))[name]
        torch.manual_seed(0)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert any(g.abs().sum() > 0 for g in grads[0])


def test_autocast_trains_float32_adapters_and_merges_exactly(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model("llama", "bfloat16")).train()
    layer = next(iter(sqft_layers(model).values()))
    assert layer.lora_A["default"].weight.dtype == torch.float32
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = logits(model)
        model.merge_adapter()
        assert torch.equal(logits(model), live)


def test_dropout_of_the_sparse_kind_drops_columns_of_a_only_in_training(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model("llama"), lora_dropout=0.5)
    live = logits(model)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(logits(model), live)
    for layer in sqft_layers(model).values():
        layer.lora_B["default"].weight.data.zero_()
    # With no delta there is nothing to drop: the frozen path is never touched.
    trained = logits(model)
    model.eval()
    assert torch.equal(trained, logits(model))


def test_elastic_layers_refuse_to_train_without_a_draw(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model("llama"), ranks=[4, 2]).train()
    with pytest.raises(RuntimeError, match="ElasticRanks"):
        model(input_ids=IDS)
    model.eval()
    logits(model)


def test_set_ranks_uses_the_leading_rows_and_the_same_scaling(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model("llama"), ranks=[4, 2])
    maximal = logits(model)
    set_ranks(model, rank_space(model).minimal())
    small = logits(model)
    assert not torch.equal(small, maximal)
    set_ranks(model, None)
    assert torch.equal(logits(model), maximal)
    for layer in sqft_layers(model).values():
        layer.lora_A["default"].weight.data[2:] = 0
    assert torch.allclose(logits(model), small, atol=1e-5)
    with pytest.raises(InputError, match="has rank 3"):
        set_ranks(model, dict.fromkeys(rank_space(model).groups, 3))


def test_q_k_and_v_share_a_rank_and_up_and_down_do_not(tiny_model: Callable[..., Path]) -> None:
    groups = rank_space(adapted(tiny_model("llama"), ranks=[4, 2])).groups
    first = "model.layers.0.self_attn"
    assert groups[f"{first}.q_proj+k_proj+v_proj"] == (f"{first}.q_proj", f"{first}.k_proj", f"{first}.v_proj")
    assert groups["model.layers.1.mlp.up_proj"] == ("model.layers.1.mlp.up_proj",)
    assert len(groups) == 2 * 3


def test_the_callback_sets_the_steps_draw(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model("llama"), ranks=[4, 2])
    callback = ElasticRanks(seed=3)

    class State:
        global_step = 11

    callback.on_step_begin(None, State(), None, model=model)
    space = rank_space(model)
    expected = space.per_module(space.draw(3, 11))
    assert {name: layer.drawn_rank for name, layer in sqft_layers(model).items()} == expected


def test_masks_come_from_the_bases_file_and_a_kept_zero_may_change(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import save_file

    from sqft.core.mask import pack_mask

    folder = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[0] = False
    Checkpoint(folder).write(name, Checkpoint(folder).read(name) * mask)
    (folder / "sqft").mkdir()
    save_file({name: pack_mask(mask)}, folder / "sqft" / "mask.safetensors", metadata={name: "32,32"})
    loaded = load_mask(folder, name)
    assert loaded is not None and torch.equal(loaded, mask)
    assert load_mask(folder, "no.such.weight") is None
    model = get_peft_model(load_model(folder), SqftConfig(kind="sparse", r=4, target_modules=["q_proj"]))
    layers = sqft_layers(model)
    assert torch.equal(layers["model.layers.0.self_attn.q_proj"].mask_packed, pack_mask(mask))
    # The other layer has no stored mask: its exact zeros, of which there are none.
    assert (layers["model.layers.1.self_attn.q_proj"].mask_packed == 255).all()
    # The adapter remembers its base: on the dense model it would be another.
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="keeps weights at zero that this model has otherwise"):
        PeftModel.from_pretrained(load_model(tiny_model("llama")), tmp_path / "adapter")
    with pytest.raises(InputError, match="was trained on another base"):
        merge.run(MergeConfig(), tiny_model("llama"), tmp_path / "adapter", tmp_path / "merged", Context())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fancy"}, "kind is 'fancy'"),
        ({"ranks": [0, 4]}, "each must be 1 or more"),
        ({"r": 4, "ranks": [16]}, "r is 4"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"use_dora": True}, "use_dora cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save cannot be merged"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa, which rewrites the base's weights"),
        ({"bias": "all"}, "bias: all cannot be merged"),
        ({"use_qalora": True}, "use_qalora cannot be merged"),
    ],
)
def test_what_cannot_be_merged_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SqftConfig(target_modules=["q_proj"], **options)


def test_a_weight_of_an_unknown_quantiser_is_refused(tiny_model: Callable[..., Path]) -> None:
    model = load_model(tiny_model("llama"))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=r"stored as torch\.float8_e4m3fn, by a quantiser that sqft does not know"):
        get_peft_model(model, SqftConfig(kind="sparse", r=4, target_modules=["q_proj"]))


def test_an_adapter_for_each_row_is_refused(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model("llama"))
    with pytest.raises(InputError, match="an adapter for each row is not supported"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


def test_a_second_adapter_of_other_ranks_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    adapted(folder).save_pretrained(tmp_path / "one_rank")
    elastic = SqftConfig(kind="sparse", ranks=[4, 2], target_modules=["q_proj"])
    model = get_peft_model(sparse_model(folder), elastic)
    with pytest.raises(InputError, match=r"has ranks None, not \[2, 4\]"):
        model.load_adapter(tmp_path / "one_rank", "second")


def test_a_plain_lora_config_is_left_alone(tiny_model: Callable[..., Path]) -> None:
    model = get_peft_model(load_model(tiny_model("llama")), LoraConfig(r=4, target_modules=["q_proj"]))
    assert not sqft_layers(model)
