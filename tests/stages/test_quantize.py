"""From a float model to one merged INT4 model: grid, zeros, live codes, and what stock transformers reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from sqft.adapters.attach import load_model
from sqft.adapters.config import SqftConfig
from sqft.adapters.layers import sqft_layers
from sqft.context import Context
from sqft.core.delta import effective_codes
from sqft.core.grid import QuantizedWeight
from sqft.core.mask import conforms
from sqft.errors import InputError, NumericalError
from sqft.model.calibrate import visit_blocks
from sqft.model.inspect import inspect_model
from sqft.model.packed import PackedLinear
from sqft.model.targets import find_targets, skeleton
from sqft.recipe import MergeConfig, QuantizeConfig, SparsifyConfig, VerifyConfig
from sqft.stages import merge, quantize, verify
from sqft.stages import sparsify as stage_sparsify
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.integers import PackedCheckpoint
from sqft.storage.masks import load_mask

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "opt"]
PROMPT = torch.arange(40).view(2, 20)


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


def quantized(base: Path, out: Path, *, sparsity: float | None = 0.5, **settings: Any) -> Path:
    config = QuantizeConfig(**{"group_size": 16, **settings})
    sparsify = None if sparsity is None else SparsifyConfig(sparsity=sparsity)
    quantize.run(config, base, tokens(), out, Context(), sparsify=sparsify)
    return out


def random_adapter(base: Path, out: Path, *, kind: str = "quantized", scale: float = 0.05, **settings: Any) -> Any:
    """Attach and save an adapter with B ≠ 0, as large as trained ones get."""
    torch.manual_seed(1)
    model = load_model(base, packed=True)
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m).__name__ == "PackedLinear"}
    adapted = get_peft_model(
        model, SqftConfig(kind=kind, r=4, lora_alpha=8, target_modules=sorted(names), task_type="CAUSAL_LM", **settings)
    )
    for layer in sqft_layers(adapted).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=scale)
    adapted.save_pretrained(str(out))
    return adapted.eval()


def tampered(folder: Path) -> Path:
    """Return a folder that says nothing of its bytes any more: its manifest would tell that they have changed."""
    (folder / "sqft" / "manifest.json").unlink()
    return folder


def live_codes(adapted: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in sqft_layers(adapted).items():
        weight = layer.weight_OI
        assert isinstance(weight, QuantizedWeight)
        lora_A, lora_B = layer.factors("default")
        found[name] = effective_codes(weight, lora_A, lora_B, layer.scaling["default"], layer.mask_packed)
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_merged_model_on_every_architecture(arch: str, tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model(arch), tmp_path / "base")
    live = random_adapter(base, tmp_path / "adapter")
    with torch.no_grad():
        expected = live(input_ids=PROMPT).logits
    merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())
    packed, before = PackedCheckpoint(tmp_path / "merged"), PackedCheckpoint(base)
    codes = live_codes(live)
    assert len(codes) == len(packed.shapes)
    changed = 0
    for weight in packed.shapes:
        merged, grid = packed.read(weight)
        module = next(m for m in codes if weight.endswith(f"{m.removeprefix('model.')}.weight"))
        assert torch.equal(merged, codes[module])
        mask = load_mask(base, weight)
        assert mask is not None
        assert 0.49 < 1 - mask.float().mean() < 0.51
        assert torch.equal(merged[~mask], grid.zero_codes()[~mask])
        changed += int((merged != before.read(weight)[0]).sum())
    assert changed > 0
    # What a user without sqft gets: stock transformers, to the bit.
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "merged")(input_ids=PROMPT).logits, expected)
    result = verify.run(
        VerifyConfig(prompts=2), tmp_path / "merged", base, tmp_path / "adapter", tmp_path / "v.json", Context()
    )
    assert result["passed"], [c for c in result["checks"] if not c["passed"]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "dtype"), [(16, torch.bfloat16), (None, torch.float32), (32, torch.float16)])
def test_merged_codes_are_the_live_ones(
    bits: int, symmetric: bool, group_size: int | None, dtype: torch.dtype, tiny_model: Any, tmp_path: Path
) -> None:
    base = quantized(
        tiny_model("llama", dtype=dtype), tmp_path / "base", bits=bits, symmetric=symmetric, group_size=group_size
    )
    live = random_adapter(base, tmp_path / "adapter")
    with torch.no_grad():
        expected = live(input_ids=PROMPT).logits
        with torch.autocast("cpu", torch.bfloat16):
            live(input_ids=PROMPT)
            inside = live_codes(live)
    merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())
    packed = PackedCheckpoint(tmp_path / "merged")
    for name, codes in inside.items():
        assert torch.equal(packed.read(f"{name}.weight")[0], codes)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "merged")(input_ids=PROMPT).logits, expected)
        assert torch.equal(load_model(tmp_path / "merged", packed=True)(input_ids=PROMPT).logits, expected)


@pytest.mark.parametrize("start", ["compensated", "dequantized", "float"])
def test_every_start_merges_exactly_and_the_first_two_start_at_the_base(
    start: str, tiny_model: Any, tmp_path: Path
) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    adapted = random_adapter(base, tmp_path / "adapter", start=start)
    merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())
    packed = PackedCheckpoint(tmp_path / "merged")
    for name, codes in live_codes(adapted).items():
        assert torch.equal(packed.read(f"{name}.weight")[0], codes)
    for layer in sqft_layers(adapted).values():
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    at_zero = live_codes(adapted)
    same = all(torch.equal(PackedCheckpoint(base).read(f"{n}.weight")[0], c) for n, c in at_zero.items())
    assert same == (start != "float")
    reloaded = PeftModel.from_pretrained(load_model(base, packed=True), str(tmp_path / "adapter"))
    assert next(iter(sqft_layers(reloaded).values())).kind == "quantized"


def test_merge_and_unmerge_in_memory(tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    adapted = random_adapter(base, tmp_path / "adapter")
    with torch.no_grad():
        live = adapted(input_ids=PROMPT).logits
        with adapted.disable_adapter():
            plain = adapted(input_ids=PROMPT).logits
        assert torch.equal(plain, load_model(base)(input_ids=PROMPT).logits)
        assert not torch.equal(plain, live)
        adapted.merge_adapter()
        assert torch.equal(adapted(input_ids=PROMPT).logits, live)
        adapted.unmerge_adapter()
        assert torch.equal(adapted(input_ids=PROMPT).logits, live)
        assert torch.equal(adapted.merge_and_unload()(input_ids=PROMPT).logits, live)


def test_an_int4_model_without_zeros_works_as_well(tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base", sparsity=None)
    assert not (base / "sqft" / "mask.safetensors").exists()
    adapted = random_adapter(base, tmp_path / "adapter")
    assert all(layer.mask_packed is None for layer in sqft_layers(adapted).values())
    merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())
    result = verify.run(
        VerifyConfig(prompts=2), tmp_path / "merged", base, tmp_path / "adapter", tmp_path / "v.json", Context()
    )
    assert result["passed"], result["checks"]
    derived = random_adapter(base, tmp_path / "derived", derive_mask=True)
    packed = PackedCheckpoint(base)
    for name, codes in live_codes(derived).items():
        old, grid = packed.read(f"{name}.weight")
        zero = old == grid.zero_codes()
        assert zero.any()
        assert torch.equal(codes[zero], old[zero])


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_every_zero_is_kept_and_inspect_counts_them(method: str, tiny_model: Any, tmp_path: Path) -> None:
    folder = quantized(tiny_model("llama"), tmp_path / "base", method=method)
    assert json.loads((folder / "sqft" / "manifest.json").read_text())["result"]["sparsity"] == 0.5
    packed = PackedCheckpoint(folder)
    for weight in packed.shapes:
        codes, grid = packed.read(weight)
        mask = load_mask(folder, weight)
        assert mask is not None
        assert torch.equal(codes[~mask], grid.zero_codes()[~mask])
    facts = inspect_model(folder)
    assert facts["sparsity"] >= 0.5
    assert facts["precision"]["int4"] > 0.5


def test_verify_sees_a_pruned_weight_that_came_back(tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    random_adapter(base, tmp_path / "adapter")
    merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())
    packed, name = PackedCheckpoint(tmp_path / "merged"), "model.layers.0.mlp.up_proj.weight"
    codes, grid = packed.read(name)
    mask = load_mask(base, name)
    assert mask is not None
    row, column = (~mask).nonzero()[0].tolist()
    codes[row, column] = (int(grid.zero_codes()[row, column]) + 1) % 16
    packed.checkpoint.write(packed.codes_name(name), packed.scheme.encode_codes(codes))
    result = verify.run(
        VerifyConfig(prompts=2),
        tampered(tmp_path / "merged"),
        base,
        tmp_path / "adapter",
        tmp_path / "v.json",
        Context(),
    )
    failed = {check["name"]: check for check in result["checks"] if not check["passed"]}
    assert failed["zeros_kept"]["value"] == 1
    assert name in failed["zeros_kept"]["detail"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gptq_format_is_read_back(symmetric: bool, tiny_model: Any, tmp_path: Path) -> None:
    # Weights in these groups have both signs, so no zero point is 0.
    ours = quantized(tiny_model("llama"), tmp_path / "ct", symmetric=symmetric, sparsity=None)
    theirs = quantized(tiny_model("llama"), tmp_path / "gptq", symmetric=symmetric, sparsity=None, format="gptq")
    a, b = PackedCheckpoint(ours), PackedCheckpoint(theirs)
    assert a.shapes == b.shapes
    agree = [float((a.read(n)[0] == b.read(n)[0]).float().mean()) for n in a.shapes]
    assert min(agree) > 0.9  # scales are rounded to another dtype
    qweight = b.checkpoint.read("model.layers.0.mlp.up_proj.qweight")
    qzeros = b.checkpoint.read("model.layers.0.mlp.up_proj.qzeros")
    codes, grid = b.read("model.layers.0.mlp.up_proj.weight")
    # By hand, as AutoGPTQ lays it out: eight codes a word along the inputs, zero points minus one along the outputs.
    assert torch.equal((qweight[0] >> 8) & 15, codes[:, 2].int())
    assert torch.equal(((qzeros[:, 0] >> 4) & 15) + 1, grid.zero_OG[1].int())
    random_adapter(theirs, tmp_path / "adapter")
    merge.run(MergeConfig(), theirs, tmp_path / "adapter", tmp_path / "merged", Context())
    result = verify.run(
        VerifyConfig(prompts=2), tmp_path / "merged", theirs, tmp_path / "adapter", tmp_path / "v.json", Context()
    )
    assert result["passed"], result["checks"]


def test_a_dense_adapter_is_merged_only_knowingly(tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    random_adapter(base, tmp_path / "adapter", kind="dense")
    with pytest.raises(
        InputError, match=r"4-bit weights.*allow_precision_loss(?s:.*)zeros? would be|allow_sparsity_loss"
    ):
        merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())
    assert not (tmp_path / "merged").exists()
    config = MergeConfig(allow_precision_loss=True, allow_sparsity_loss=True)
    merge.run(config, base, tmp_path / "adapter", tmp_path / "merged", Context())
    result = verify.run(
        VerifyConfig(prompts=2), tmp_path / "merged", base, tmp_path / "adapter", tmp_path / "v.json", Context()
    )
    lost = {check["name"]: check for check in result["checks"]}
    assert lost["logits_equal"]["value"] > 0


@pytest.mark.parametrize(
    ("part", "spoil"),
    [
        ("codes", lambda t: t.bitwise_xor(16)),
        ("weight_scale", lambda t: t * 1.5),
        ("weight_zero_point", lambda t: t.bitwise_xor(1)),
    ],
)
def test_verify_sees_a_changed_grid_or_code(part: str, spoil: Any, tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    random_adapter(base, tmp_path / "adapter")
    merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())
    checkpoint = Checkpoint(tmp_path / "merged")
    name = "model.layers.1.mlp.down_proj." + ("weight_packed" if part == "codes" else part)
    tensor = checkpoint.read(name)
    tensor[0, 0] = spoil(tensor[0, 0])
    checkpoint.write(name, tensor)
    result = verify.run(
        VerifyConfig(prompts=2),
        tampered(tmp_path / "merged"),
        base,
        tmp_path / "adapter",
        tmp_path / "v.json",
        Context(),
    )
    failed = [check["name"] for check in result["checks"] if not check["passed"]]
    assert ("codes_equal" if part == "codes" else "grid_untouched") in failed


def test_what_cannot_be_quantised_is_refused_by_name_before_work(tiny_model: Any, tmp_path: Path) -> None:
    llama = tiny_model("llama")
    with pytest.raises(InputError, match=r"group_size 48 does not divide.*q_proj \(32\)"):
        quantized(llama, tmp_path / "a", group_size=48)
    with pytest.raises(InputError, match=r"attn.c_attn is a Conv1D"):
        quantized(tiny_model("gpt2"), tmp_path / "a")
    with pytest.raises(InputError, match=r"experts\.gate_up_proj lies on disk expert by expert"):
        quantized(tiny_model("mixtral"), tmp_path / "a")
    with pytest.raises(InputError, match="no calibration tokens"):
        quantize.run(QuantizeConfig(group_size=16), llama, torch.zeros(0, 8).long(), tmp_path / "a", Context())
    base = quantized(llama, tmp_path / "base")
    with pytest.raises(InputError, match="quantised already"):
        quantized(base, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_hessian_with_nan_names_the_linear_and_leaves_nothing(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.core.statistics import Statistics

    add = Statistics.add

    def poisoned(self: Statistics, x: torch.Tensor) -> None:
        add(self, x)
        if self.upper_II is not None and x.shape[1] == 64:
            self.upper_II[0, 0] = float("nan")

    monkeypatch.setattr(Statistics, "add", poisoned)
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.down_proj.*NaN"):
        quantized(tiny_model("llama"), tmp_path / "a", sparsity=None)
    assert not list(tmp_path.iterdir())


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(quant_method="awq"), "'awq', which sqft does not read"),
        (lambda q: q.update(format="nvfp4-pack-quantized"), "nvfp4"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=8), r"needs \[32, 8\]"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=32), "needs"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=5), "5-bit"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused(change: Any, message: str, tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    edit_config(base, change)
    with pytest.raises(InputError, match=message):
        load_model(base, packed=True)


def test_a_missing_zero_point_is_named(tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_zero_point"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj has no weight_zero_point"):
        load_model(base, packed=True)


def test_another_base_is_refused_and_says_what_differs(tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    other = quantized(tiny_model("llama"), tmp_path / "other", sparsity=0.4)
    random_adapter(base, tmp_path / "adapter")
    wrong = "trained on another base.*what differs: codes, mask, scales and zero points, start"
    with pytest.raises(InputError, match=wrong):
        merge.run(MergeConfig(), other, tmp_path / "adapter", tmp_path / "merged", Context())
    with pytest.raises(InputError, match=wrong):  # stock PEFT's own loading too
        PeftModel.from_pretrained(load_model(other, packed=True), str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_identity"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not say of which base"):
        merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())
    with pytest.raises(InputError, match="kind sparse needs a float base"):
        random_adapter(base, tmp_path / "adapter", kind="sparse")
    with pytest.raises(InputError, match="needs a quantised base"):
        get_peft_model(load_model(tiny_model("llama")), SqftConfig(kind="quantized", target_modules=["q_proj"]))


def test_a_run_that_was_moved_keeps_its_mask_and_start(tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    live = random_adapter(base, tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    moved = load_model(tmp_path / "moved", tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(moved(input_ids=PROMPT).logits, live(input_ids=PROMPT).logits)
    assert all(layer.mask_packed is not None for layer in sqft_layers(moved).values())


def test_what_quantising_does_not_touch_is_copied_bit_for_bit(tiny_model: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama", dtype=torch.bfloat16), source)
    tensors = load_file(source / "model.safetensors")
    # Two things that no parameter of the model in memory holds as they are: a norm in float32, and a buffer.
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = tensors[norm].float() + 1e-4
    tensors["model.layers.0.mlp.some_buffer"] = torch.arange(5.0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    base = quantized(source, tmp_path / "base", ignore=["down_proj"])
    before, after = Checkpoint(source), Checkpoint(base)
    for name in set(before.entries) & set(after.entries):
        if "down_proj" not in name:  # pruned, not quantised
            assert torch.equal(before.read(name), after.read(name)), name
    assert load_mask(base, "model.layers.0.mlp.down_proj.weight") is not None
    assert "model.layers.0.mlp.some_buffer" in after.entries


def test_other_calibration_text_is_another_result(tiny_model: Any, tmp_path: Path) -> None:
    quantized(tiny_model("llama"), tmp_path / "base")
    with pytest.raises(InputError, match="calibration_digest"):
        quantize.run(
            QuantizeConfig(group_size=16), tiny_model("llama"), tokens() + 1, tmp_path / "base", Context(),
            sparsify=SparsifyConfig(sparsity=0.5),
        )  # fmt: skip


def test_stock_peft_cannot_merge_or_save_packed_weights_silently(tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    random_adapter(base, tmp_path / "adapter", kind="dense")
    model = load_model(base, tmp_path / "adapter")
    with pytest.raises(InputError, match="cannot be merged into a quantised base without loss"):
        model.merge_and_unload()
    with pytest.raises(InputError, match="not saved from memory"):
        load_model(base, packed=True).save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_opening_an_int4_folder_shows_no_bars_of_its_library(
    tiny_model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = quantized(tiny_model("llama"), tmp_path / "base")
    capfd.readouterr()
    model = load_model(base)
    model(input_ids=PROMPT)
    assert type(model.model.layers[0].mlp.up_proj).__name__ != "PackedLinear"
    shown = capfd.readouterr().err
    assert "Applying" not in shown
    assert "Dispatching" not in shown


def test_masked_adapters_merge_one_at_a_time(tiny_model: Any, tmp_path: Path) -> None:
    adapted = random_adapter(quantized(tiny_model("llama"), tmp_path / "base"), tmp_path / "adapter")
    adapted.load_adapter(str(tmp_path / "adapter"), "second")
    with pytest.raises(InputError, match="merge one at a time, and default, second"):
        adapted.merge_adapter(["default", "second"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_changing_the_models_dtype_leaves_the_grid_alone(dtype: torch.dtype, tiny_model: Any, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "base")
    model = load_model(base, packed=True)

    def scales() -> list[torch.Tensor]:
        return [m.quantized.grid.scale_OG for m in model.modules() if isinstance(m, PackedLinear)]

    before = [scale.clone() for scale in scales()]
    model.to(dtype)
    after = scales()
    assert before
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("options", [{}, {"method": "rtn"}, {"act_order": False}])
def test_gptq_has_no_zero_point_0_so_the_range_is_widened(
    options: dict[str, Any], tiny_model: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].abs()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantized(source, tmp_path / "base", sparsity=None, format="gptq", **options)
    codes, grid = PackedCheckpoint(tmp_path / "base").read(name)
    assert int(grid.zero_OG.min()) == 1
    if options.get("method") == "rtn":  # nothing is cut off at the top
        far = (grid.dequantize(codes) - tensors[name].float()).abs()
        assert (far <= 0.51 * grid.scale_OG.float().repeat_interleave(grid.group_size, dim=1)).all()


@pytest.mark.parametrize("arch", ["falcon", "rwkv", "mamba"])
def test_what_transformers_cannot_open_is_refused_before_the_work(arch: str, tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"cannot open a \w+ForCausalLM in compressed-tensors format \(AttributeError.*format: gptq"
    ):
        quantized(tiny_model(arch), tmp_path / "out", sparsity=None, group_size=None)
    assert not (tmp_path / "out").exists()


def test_the_other_format_of_what_transformers_cannot_open_is_opened_here(tiny_model: Any, tmp_path: Path) -> None:
    made = quantized(tiny_model("falcon"), tmp_path / "out", sparsity=None, format="gptq", group_size=32)
    with torch.no_grad():
        assert load_model(made)(input_ids=PROMPT).logits.isfinite().all()


def test_names_that_transformers_does_not_find_are_refused(tiny_model: Any) -> None:
    from sqft.model.expressible import layouts, opening_error
    from sqft.model.names import DiskNames
    from sqft.model.targets import find_targets, skeleton
    from sqft.storage.scheme import Scheme

    network, source = skeleton(tiny_model("llama")), Checkpoint(tiny_model("llama"))
    scheme = Scheme("compressed-tensors", 4, 16, symmetric=False)
    layout, _ = layouts(scheme, source, DiskNames(network, source), find_targets(network)[0])
    assert opening_error(network, scheme.to_config(["lm_head"]), layout) is None
    del layout["model.layers.0.mlp.up_proj.weight_scale"]
    reason = opening_error(network, scheme.to_config(["lm_head"]), layout)
    assert reason is not None
    assert "up_proj.weight_scale" in reason


def test_experts_in_one_tensor_are_refused_with_a_pattern_that_leaves_them_out(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mlp\.w1 holds all experts in one tensor.*\['\*\.mlp\.\*'\]"):
        quantized(tiny_model("dbrx"), tmp_path / "out", sparsity=None)
    made = quantized(tiny_model("dbrx"), tmp_path / "out", sparsity=None, ignore=["*.mlp.*"])
    with torch.no_grad():
        assert load_model(made)(input_ids=PROMPT).logits.isfinite().all()
    with pytest.raises(InputError, match=r"gate_up_proj holds all experts in one tensor.*\['\*\.experts\.\*'\]"):
        quantized(tiny_model("llama4_text"), tmp_path / "other", sparsity=None, group_size=8)
    # Here compressed-tensors looks for the experts one by one, quantised or not.
    with pytest.raises(InputError, match=r"cannot open a Llama4.*it finds no \S+experts\.0"):
        quantized(tiny_model("llama4_text"), tmp_path / "other", sparsity=None, group_size=8, ignore=["*.experts.*"])


def test_a_quantised_folder_and_a_token_beyond_the_embedding_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    made = quantized(tiny_model("llama"), tmp_path / "once")
    with pytest.raises(InputError, match="is quantised already"):
        quantized(made, tmp_path / "twice")
    far = tokens()
    far[0, 0] = 300
    with pytest.raises(InputError, match="token 300, and the model's embedding 264 rows"):
        quantize.run(QuantizeConfig(group_size=16), tiny_model("llama"), far, tmp_path / "out", Context())


def test_overflow_in_gptq_names_the_linear_and_the_remedy(tiny_model: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama", "float16"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"][:] = 3000
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"^model\.layers\.0\.mlp\.down_proj: .*65504.*bfloat16"):
        quantized(tmp_path / "model", tmp_path / "out", sparsity=None)


def test_a_mask_in_the_joint_pass_says_how_many_it_prunes(tiny_model: Any, tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight": torch.rand(64, 32) > 0.5}, tmp_path / "mask.safetensors")
    given = SparsifyConfig(mask=str(tmp_path / "mask.safetensors"))
    config = QuantizeConfig(group_size=16)
    made = quantize.run(config, tiny_model("llama"), tokens(), tmp_path / "out", Context(), sparsify=given)
    assert "masked 1 of 14 targeted linears; the other 13 stay dense" in made.manifest["result"]["coverage"]


def joint(base: Path, out: Path, sparsify: dict[str, Any], **settings: Any) -> Path:
    config = QuantizeConfig(**{"group_size": 16, **settings})
    quantize.run(config, base, tokens(), out, Context(), sparsify=SparsifyConfig(**sparsify))
    return out


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize(
    "sparsify",
    [{"update": True}, {"method": "magnitude", "update": True}, {"method": "sparsegpt"},
     {"method": "sparsegpt", "pattern": "2:4"}, {"pattern": "2:4", "update": True}],
    ids=["wanda", "magnitude", "sparsegpt", "sparsegpt 2:4", "wanda 2:4"],
)  # fmt: skip
def test_an_updated_joint_pass_keeps_every_zero(
    sparsify: dict[str, Any], method: str, tiny_model: Any, tmp_path: Path
) -> None:
    folder = joint(tiny_model("llama"), tmp_path / "out", sparsify, method=method)
    assert json.loads((folder / "sqft" / "manifest.json").read_text())["result"]["sparsity"] == 0.5
    packed = PackedCheckpoint(folder)
    for name in packed.shapes:
        codes, grid = packed.read(name)
        mask = load_mask(folder, name)
        assert mask is not None
        assert ((~mask).sum(dim=1) == mask.shape[1] // 2).all()
        assert torch.equal(codes[~mask], grid.zero_codes()[~mask])
        assert "pattern" not in sparsify or conforms(mask, 2, 4)


def test_the_update_prunes_the_same_weights_and_loses_less(tiny_model: Any, tmp_path: Path) -> None:
    base = tiny_model("llama")
    sources = Checkpoint(base)
    plain, updated = joint(base, tmp_path / "plain", {}), joint(base, tmp_path / "updated", {"update": True})
    hessian = {}

    def see(block: Any) -> None:
        hessian.update({t.name: block.statistics[t].hessian_II.clone() for t in block.targets if block.index == 0})

    visit_blocks(base, find_targets(skeleton(base))[0], tokens(), see, batch=8, hessian=True)
    for module, matrix in hessian.items():
        name = f"{module}.weight"
        same = [load_mask(folder, name) for folder in (plain, updated)]
        assert same[0] is not None
        assert same[1] is not None
        assert (same[0] == same[1]).float().mean() > 0.99  # a hessian's diagonal is summed in another order
        lost = []
        for folder in (plain, updated):
            codes, grid = PackedCheckpoint(folder).read(name)
            difference = grid.dequantize(codes) - sources.read(name).float()
            lost.append(float((difference @ matrix * difference).sum()))
        assert lost[1] < lost[0], name


def test_what_is_not_pruned_is_quantised_as_without_pruning(tiny_model: Any, tmp_path: Path) -> None:
    base, left = tiny_model("llama"), "model.layers.0.self_attn.k_proj.weight"
    dense = quantized(base, tmp_path / "dense", sparsity=None)
    for sparsify in ({"update": True}, {"method": "sparsegpt"}):
        some = joint(base, tmp_path / sparsify.get("method", "wanda"), {**sparsify, "ignore": ["*k_proj"]})
        assert load_mask(some, left) is None
        codes, grid = PackedCheckpoint(some).read(left)
        expected, fitted = PackedCheckpoint(dense).read(left)
        assert torch.equal(codes, expected)
        assert torch.equal(grid.scale_OG, fitted.scale_OG)


@pytest.mark.parametrize("sparsify", [{"update": True}, {"method": "sparsegpt"}], ids=["wanda", "sparsegpt"])
def test_zeros_that_were_there_before_an_updated_joint_pass_stay(
    sparsify: dict[str, Any], tiny_model: Any, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    stage_sparsify.run(SparsifyConfig(sparsity=0.4), tiny_model("llama"), tokens(), half, Context())
    folder = joint(half, tmp_path / "out", {"sparsity": 0.5, **sparsify})
    for name in PackedCheckpoint(folder).shapes:
        mask = load_mask(folder, name)
        assert mask is not None
        assert not mask[Checkpoint(half).read(name) == 0].any()


def test_a_given_mask_is_made_up_for_in_the_joint_pass(tiny_model: Any, tmp_path: Path) -> None:
    base, name = tiny_model("llama"), "model.layers.0.mlp.up_proj.weight"
    mask = torch.rand(64, 32, generator=torch.Generator().manual_seed(1)) > 0.5
    save_file({name: mask}, tmp_path / "mask.safetensors")
    given = {"mask": str(tmp_path / "mask.safetensors")}
    found = [joint(base, tmp_path / str(update), {**given, "update": update}) for update in (False, True)]
    codes = []
    for folder in found:
        stored = load_mask(folder, name)
        assert stored is not None
        assert torch.equal(stored, mask)
        codes.append(PackedCheckpoint(folder).read(name)[0])
    assert not torch.equal(codes[0], codes[1])


def test_an_update_without_text_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sparsify\.update needs calibration tokens"):
        quantize.run(
            QuantizeConfig(group_size=16, method="rtn"), tiny_model("llama"), None, tmp_path / "out", Context(),
            sparsify=SparsifyConfig(method="magnitude", update=True),
        )  # fmt: skip
