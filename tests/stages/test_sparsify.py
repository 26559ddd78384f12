"""Sparsify on every architecture: against whole-model Wanda, counts per row, masks on disk, and what it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqft.adapters.attach import load_model
from sqft.context import Context
from sqft.core.mask import conforms
from sqft.errors import InputError, NumericalError
from sqft.model.targets import decoder_blocks, find_targets, skeleton
from sqft.recipe import SparsifyConfig
from sqft.stages import sparsify
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.masks import load_mask

ARCHITECTURES = [
    "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gpt2", "opt", "bloom", "mpt", "mixtral",
]  # fmt: skip
TOKENS = torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(0))


def config(**options: Any) -> SparsifyConfig:
    return SparsifyConfig.model_validate({"calibration": {"batch": 4}, **options})


def whole_model_wanda(folder: Path, sparsity: float) -> dict[str, torch.Tensor]:
    """Wanda with the whole model in memory, layer by layer through hooks: what streaming must reproduce."""
    model = load_model(folder)
    prefix, blocks = decoder_blocks(model)
    targets, _ = find_targets(model)
    for index in range(len(blocks)):
        here = [t for t in targets if t.module.startswith(f"{prefix}.{index}.")]
        norms: dict[str, torch.Tensor] = {}

        def hook(module: Any, args: Any, output: Any, name: str = "", norms: Any = norms) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            norms[name] = norms.get(name, torch.zeros(x.shape[1])) + x.square().sum(0)

        handles = [
            model.get_submodule(t.module).register_forward_hook(
                lambda m, a, o, name=t.module, norms=norms: hook(m, a, o, name, norms)
            )
            for t in here
        ]
        with torch.no_grad():
            model(input_ids=TOKENS, use_cache=False)
        for handle in handles:
            handle.remove()
        for target in here:
            weight = target.view(model)
            score = weight.float().abs() * norms[target.module].sqrt()
            order = torch.sort(score, dim=1, stable=True)[1][:, : int(score.shape[1] * sparsity)]
            weight.scatter_(1, order, 0)
    return {t.module: t.view(model).clone() for t in targets}


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "mixtral"])
def test_streamed_wanda_equals_whole_model_wanda(arch: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model(arch)
    sparsify.run(config(), folder, TOKENS, tmp_path / "out", Context())
    expected = whole_model_wanda(folder, 0.5)
    model = load_model(tmp_path / "out")
    found = {t.module: t.view(model) for t in find_targets(model)[0]}
    assert found.keys() == expected.keys()
    agree = [float(((found[n] == 0) == (expected[n] == 0)).float().mean()) for n in found]
    # Batches of another size move activations by rounding, and with them a rare tie.
    assert min(agree) > 0.995
    assert all(int((w == 0).sum(1).unique()) == w.shape[1] // 2 for w in found.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_keeps_its_kept_weights_and_everything_else(
    arch: str, dtype: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(arch, dtype)
    artifact = sparsify.run(config(), folder, TOKENS, tmp_path / "out", Context())
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "out")
    assert before.entries.keys() == after.entries.keys()
    pruned = 0
    for name in before.entries:
        old, new = before.read(name), after.read(name)
        mask = load_mask(tmp_path / "out", name)
        assert new.dtype == old.dtype
        if mask is None:
            assert torch.equal(old, new), name
            continue
        pruned += 1
        assert torch.equal(new, torch.where(mask, old, torch.zeros_like(old))), name
        assert abs(float((~mask).float().mean()) - 0.5) < 0.01
    stored = load_file(tmp_path / "out" / "sqft" / "mask.safetensors")
    assert pruned == len(stored) > 0
    assert artifact.manifest["result"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    model = load_model(tmp_path / "out")
    assert torch.isfinite(model(input_ids=TOKENS).logits).all()


def test_experts_lie_one_by_one_on_disk_and_each_is_pruned(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("mixtral")
    artifact = sparsify.run(config(), folder, TOKENS, tmp_path / "out", Context())
    after = Checkpoint(tmp_path / "out")
    experts = [name for name in after.entries if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        weight = after.read(name)
        assert ((weight == 0).sum(dim=1) == weight.shape[1] // 2).all()
    assert any(layer["name"].endswith("experts.gate_up_proj[3]") for layer in artifact.manifest["result"]["layers"])


def test_an_experts_inputs_are_the_tokens_routed_to_it(tiny_model: Callable[..., Path]) -> None:
    from sqft.model.calibrate import Block, visit_blocks

    folder = tiny_model("mixtral")
    targets, _ = find_targets(skeleton(folder))
    tokens_of: dict[str, int] = {}

    def visit(block: Block) -> None:
        tokens_of.update({t.name: block.statistics[t].tokens for t in block.targets})

    visit_blocks(folder, targets, TOKENS, visit, batch=4, hessian=False)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for part in ("gate_up_proj", "down_proj"):
            # Each token goes to two experts.
            assert sum(tokens_of[f"{prefix}.{part}[{e}]"] for e in range(4)) == 2 * TOKENS.numel()
        assert tokens_of[f"model.layers.{layer}.self_attn.q_proj"] == TOKENS.numel()


def test_an_expert_without_tokens_is_an_error_that_names_it(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("mixtral"), folder)
    checkpoint = Checkpoint(folder)
    for name in checkpoint.entries:
        if name.endswith("gate.weight"):  # a router that never chooses the last expert
            weight = checkpoint.read(name)
            weight[:] = 0
            weight[0, :], weight[1, :], weight[2, :] = 3.0, 2.0, 1.0
            weight[3, :] = 0.0
            checkpoint.write(name, weight)
    few = torch.full((1, 2), 5)
    with pytest.raises(InputError, match=r"experts\.gate_up_proj\[\d\]: no calibration token reached it"):
        sparsify.run(config(), folder, few, tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial*"))
    sparsify.run(config(unreached_experts="magnitude"), folder, few, tmp_path / "out", Context())
    weight = Checkpoint(tmp_path / "out").read("model.layers.0.block_sparse_moe.experts.3.w1.weight")
    assert ((weight == 0).sum(dim=1) == weight.shape[1] // 2).all()


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_structured_patterns(
    arch: str, method: str, pattern: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    sparsify.run(config(method=method, pattern=pattern), tiny_model(arch), TOKENS, tmp_path / "out", Context())
    model = load_model(tmp_path / "out")
    keep_n, group_m = (int(n) for n in pattern.split(":"))
    for target in find_targets(model)[0]:
        assert conforms(target.view(model) != 0, keep_n, group_m)


def test_later_blocks_see_the_pruned_ones(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    sparsify.run(config(sparsity=0.9), folder, TOKENS, tmp_path / "all", Context())
    sparsify.run(config(sparsity=0.9, targets=["layers.1.*"]), folder, TOKENS, tmp_path / "last", Context())
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(Checkpoint(tmp_path / "all").read(name), Checkpoint(tmp_path / "last").read(name))


def test_a_given_mask_is_applied_instead_of_a_score(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    mask = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) > 0.3
    save_file({name: mask}, tmp_path / "mask.safetensors")
    sparsify.run(config(mask=str(tmp_path / "mask.safetensors")), folder, None, tmp_path / "out", Context())
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "out")
    assert torch.equal(after.read(name), before.read(name) * mask)
    assert torch.equal(after.read(name.replace("q_proj", "k_proj")), before.read(name.replace("q_proj", "k_proj")))
    # The masks that sparsify itself writes are read back the same.
    again = sparsify.run(
        config(mask=str(tmp_path / "out" / "sqft" / "mask.safetensors")), folder, None, tmp_path / "again", Context()
    )
    assert torch.equal(Checkpoint(again.path).read(name), after.read(name))


def test_masks_of_experts_are_read_back_as_they_were_written(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("mixtral")
    sparsify.run(config(), folder, TOKENS, tmp_path / "out", Context())
    masks = str(tmp_path / "out" / "sqft" / "mask.safetensors")
    sparsify.run(config(mask=masks), folder, None, tmp_path / "again", Context())
    first, again = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "again")
    for name in first.entries:
        assert torch.equal(first.read(name), again.read(name)), name


def test_magnitude_needs_no_token_to_reach_an_expert(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    sparsify.run(config(method="magnitude"), tiny_model("mixtral"), None, tmp_path / "out", Context())
    weight = Checkpoint(tmp_path / "out").read("model.layers.0.block_sparse_moe.experts.3.w1.weight")
    assert ((weight == 0).sum(dim=1) == weight.shape[1] // 2).all()


def test_routers_and_convolutions_are_left_alone(tiny_model: Callable[..., Path]) -> None:
    targets, left = find_targets(skeleton(tiny_model("qwen2_moe")))
    assert any("shared_expert_gate" in name for name in left)
    assert not any("gate" in t.name and "gate_" not in t.name and "_gate" in t.name for t in targets)
    assert any("shared_expert.gate_proj" in t.name for t in targets)

    # A linear elsewhere with as many outputs as there are experts is none.
    wide = skeleton(tiny_model("qwen2_moe", num_experts=8, num_key_value_heads=1))
    assert cast(Any, wide).model.layers[0].self_attn.k_proj.out_features == wide.config.num_experts
    assert "model.layers.0.self_attn.k_proj" in [t.name for t in find_targets(wide)[0]]

    model = skeleton(tiny_model("llama"))
    cast(Any, model).model.layers[0].conv = torch.nn.Conv1d(4, 4, 3)
    assert not any("conv" in t.name for t in find_targets(model)[0])


@pytest.mark.parametrize(
    "again", [{"sparsity": 0.25}, {"method": "sparsegpt", "pattern": "2:4"}], ids=["wanda", "sparsegpt"]
)
def test_pruning_again_keeps_the_first_zeros_and_no_compensation_fills_them(
    again: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    sparsify.run(config(sparsity=0.5), tiny_model("llama"), TOKENS, tmp_path / "half", Context())
    sparsify.run(config(**again), tmp_path / "half", TOKENS, tmp_path / "again", Context())
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.0.{module}.weight"
        mask = load_mask(tmp_path / "again", name)
        assert mask is not None
        assert not mask[Checkpoint(tmp_path / "half").read(name) == 0].any()
        assert not Checkpoint(tmp_path / "again").read(name)[~mask].any()


def test_a_model_without_all_its_weights_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        sparsify.run(config(), tmp_path / "model", TOKENS, tmp_path / "out", Context())


def test_a_wrong_mask_is_refused_with_every_problem(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    masks = {"no.such": torch.ones(2, 2), "model.layers.0.self_attn.q_proj": torch.ones(3, 3)}
    save_file(masks, tmp_path / "mask.safetensors")
    with pytest.raises(InputError, match="2 problems") as error:
        sparsify.run(
            config(mask=str(tmp_path / "mask.safetensors")), tiny_model("llama"), None, tmp_path / "o", Context()
        )
    assert "no.such is no weight of the model" in str(error.value)
    assert "[3, 3], the weight [32, 32]" in str(error.value)


def test_it_is_skipped_when_done_and_refuses_another_recipe(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    first = sparsify.run(config(), folder, TOKENS, tmp_path / "out", Context())
    again = sparsify.run(config(), folder, TOKENS, tmp_path / "out", Context())
    assert again.manifest == first.manifest
    with pytest.raises(InputError, match=r"sparsity was 0\.5, is now 0\.6"):
        sparsify.run(config(sparsity=0.6), folder, TOKENS, tmp_path / "out", Context())


@pytest.mark.parametrize(
    ("options", "tokens", "message"),
    [
        ({"targets": ["nothing"]}, TOKENS, "pattern 'nothing' matches no linear; the model's are"),
        ({"pattern": "3:7"}, TOKENS, "pattern 3:7 does not divide model.layers.0.self_attn.q_proj, whose rows have 32"),
        ({}, torch.zeros(0, 8, dtype=torch.long), "no calibration tokens"),
        ({}, torch.zeros(1, 600, dtype=torch.long), "600 tokens, more than the 512 that the model allows"),
        ({}, None, "wanda needs calibration tokens"),
    ],
)
def test_bad_input_is_refused_before_work(
    options: dict[str, Any], tokens: Any, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        sparsify.run(config(**options), tiny_model("llama"), tokens, tmp_path / "out", Context())
    assert not list(tmp_path.iterdir())


def test_nan_in_a_weight_is_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    checkpoint = Checkpoint(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = checkpoint.read(name)
    weight[3, 4], weight[5, 6] = float("nan"), float("inf")
    checkpoint.write(name, weight)
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj\.weight has 2 NaN or Inf of 2048"):
        sparsify.run(config(), folder, TOKENS, tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


def test_no_space_is_refused_before_work(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"the sparse model needs .* GB of disk and 0\.00 GB are free"):
        sparsify.run(config(), tiny_model("llama"), TOKENS, tmp_path / "out", Context())


def test_blocks_that_hand_on_keys_and_values_are_not_calibrated(tiny_model: Callable[..., Path]) -> None:
    network = skeleton(tiny_model("llama"))
    sparsify.check(config(), network, find_targets(network)[0], TOKENS)
    cast(Any, network.config).num_kv_shared_layers = 1
    with pytest.raises(InputError, match="hands keys and values from block to block"):
        sparsify.check(config(), network, find_targets(network)[0], TOKENS)
    sparsify.check(config(method="magnitude"), network, find_targets(network)[0], None)


def test_patterns_that_leave_nothing_are_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="leave no linear"):
        find_targets(skeleton(tiny_model("llama")), ["q_proj"], ["*attn*"])


def test_a_mask_of_what_is_no_target_is_refused_by_name(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.{kind}_proj.weight" for i in range(2) for kind in ("up", "gate")]
    masks = {name: torch.rand(64, 32) > 0.5 for name in names}
    save_file(masks, tmp_path / "mask.safetensors")
    options = {"mask": str(tmp_path / "mask.safetensors"), "ignore": ["gate_proj"]}
    with pytest.raises(
        InputError,
        match=r"2 of its 4 masks are of weights that are no targets: \S+0\.mlp\.gate_proj\S+, \S+1\.mlp\.gate",
    ):
        sparsify.run(config(**options), tiny_model("llama"), None, tmp_path / "out", Context())
    embedding = {"model.embed_tokens.weight": torch.ones(264, 32, dtype=torch.bool)}
    save_file(embedding, tmp_path / "mask.safetensors")
    with pytest.raises(InputError, match=r"1 of its 1 masks .*model\.embed_tokens"):
        sparsify.run(config(mask=options["mask"]), tiny_model("llama"), None, tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


def test_a_mask_of_some_targets_says_how_many(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("up", "gate")]
    save_file({name: torch.rand(64, 32) > 0.5 for name in names}, tmp_path / "mask.safetensors")
    masked = config(mask=str(tmp_path / "mask.safetensors"))
    made = sparsify.run(masked, tiny_model("llama"), None, tmp_path / "out", Context())
    assert "masked 2 of 14 targeted linears; the other 12 stay dense" in made.manifest["result"]["coverage"]
    assert (
        "masked"
        not in sparsify.run(config(), tiny_model("llama"), TOKENS, tmp_path / "all", Context()).manifest["result"][
            "coverage"
        ]
    )


def test_a_token_beyond_the_embedding_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    tokens = TOKENS.clone()
    tokens[2, 3] = 264
    with pytest.raises(InputError, match=r"token 264, and the model's embedding 264 rows.*resize"):
        sparsify.run(config(), tiny_model("llama"), tokens, tmp_path / "out", Context())
    tokens[2, 3] = 263
    sparsify.run(config(), tiny_model("llama"), tokens, tmp_path / "out", Context())


def overflowing(folder: Path, out: Path, *names: str) -> Path:
    """Return a copy of a model whose named weights are so large that float16 cannot hold their outputs."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in names:
        tensors[f"model.layers.0.mlp.{name}.weight"][:] = 3000
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_overflow_names_the_linear_and_the_remedy(method: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = overflowing(tiny_model("llama", "float16"), tmp_path / "model", "up_proj", "gate_proj")
    with pytest.raises(
        NumericalError, match=r"^model\.layers\.0\.mlp\.down_proj: .*block model\.layers\.0\).*65504.*bfloat16"
    ):
        sparsify.run(config(method=method), folder, TOKENS, tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()
    # What needs no activations is not troubled by them.
    sparsify.run(config(method="magnitude"), folder, None, tmp_path / "out", Context())


def test_overflow_behind_the_last_linear_names_the_block(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama", "float16")
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 6000
    tensors["model.layers.1.mlp.up_proj.weight"] *= 50
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"^block model\.layers\.1: its output holds NaN or Inf.*65504"):
        sparsify.run(config(), tmp_path / "model", TOKENS, tmp_path / "out", Context())


def test_a_pruner_that_overflows_names_the_linear(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.core import pruners

    def far(weight_OI: torch.Tensor, statistics: Any, pattern: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return (weight_OI.float() * 1e6).to(weight_OI.dtype), torch.ones_like(weight_OI, dtype=torch.bool)

    def nowhere(weight_OI: torch.Tensor, statistics: Any) -> torch.Tensor:
        return weight_OI.float() * float("nan")

    monkeypatch.setitem(pruners._PRUNERS, "far", far)
    monkeypatch.setitem(pruners._SCORES, "nowhere", nowhere)
    folder = tiny_model("llama", "float16")
    for method, said in (("far", "65504"), ("nowhere", "score has NaN")):
        with pytest.raises(NumericalError, match=rf"^model\.layers\.0\.\S+_proj: .*{said}"):
            sparsify.run(config(method=method), folder, TOKENS, tmp_path / "out", Context())


@pytest.mark.parametrize("arch", ["llama4_text", "dbrx"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_experts_lose_as_much_in_every_row(
    arch: str, method: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    tokens = None if method == "magnitude" else TOKENS
    sparsify.run(config(method=method, sparsity=0.5), tiny_model(arch), tokens, tmp_path / "out", Context())
    model = load_model(tmp_path / "out")
    experts = [t.view(model) for t in find_targets(model)[0] if t.index is not None]
    assert experts
    for weight in experts:
        assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()


def test_vectors_stay_as_they_are(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    before = Checkpoint(tiny_model("rwkv"))
    sparsify.run(config(method="magnitude"), tiny_model("rwkv"), None, tmp_path / "out", Context())
    after = Checkpoint(tmp_path / "out")
    vectors = [name for name in before.entries if "time_" in name]
    assert len(vectors) > 8
    assert all(torch.equal(after.read(name), before.read(name)) for name in vectors)
    assert int((after.read("rwkv.blocks.0.attention.key.weight") == 0).sum()) == 16 * 32


def test_a_folder_that_contradicts_its_config_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].int()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"k_proj\.weight \(int32\)"):
        sparsify.run(config(), tmp_path / "model", TOKENS, tmp_path / "out", Context())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "dbrx"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_an_update_prunes_as_many_and_changes_what_stays(
    arch: str, pattern: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(arch)
    sparsify.run(config(pattern=pattern), folder, TOKENS, tmp_path / "plain", Context())
    done = sparsify.run(config(pattern=pattern, update=True), folder, TOKENS, tmp_path / "out", Context())
    assert done.manifest["result"]["sparsity"] == 0.5
    before, plain, after = load_model(folder), load_model(tmp_path / "plain"), load_model(tmp_path / "out")
    changed = 0
    for target in find_targets(after)[0]:
        weight, first = target.view(after), target.view(plain)
        assert ((weight == 0).sum(dim=1) == weight.shape[1] // 2).all()
        stays = first != 0
        assert torch.equal(first[stays], target.view(before)[stays])
        changed += int((weight != first)[stays & (weight != 0)].count_nonzero())
    assert changed


def test_a_given_mask_is_made_up_for_where_that_is_set(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, name = tiny_model("llama"), "model.layers.0.self_attn.q_proj.weight"
    mask = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) > 0.3
    save_file({name: mask}, tmp_path / "mask.safetensors")
    given = config(mask=str(tmp_path / "mask.safetensors"), update=True)
    with pytest.raises(InputError, match="update needs calibration tokens"):
        sparsify.run(given, folder, None, tmp_path / "out", Context())
    sparsify.run(given, folder, TOKENS, tmp_path / "out", Context())
    before, after = Checkpoint(folder).read(name), Checkpoint(tmp_path / "out").read(name)
    assert not after[~mask].any()
    assert not torch.equal(after[mask], before[mask])
    other = name.replace("q_proj", "k_proj")  # no mask, so nothing to make up for
    assert torch.equal(Checkpoint(tmp_path / "out").read(other), Checkpoint(folder).read(other))


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_not_updated(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    few = torch.full((1, 2), 5)
    settings = {"unreached_experts": "magnitude", "targets": ["*experts*"]}
    plain = sparsify.run(config(**settings), tiny_model("mixtral"), few, tmp_path / "plain", Context())
    updated = sparsify.run(config(**settings, update=True), tiny_model("mixtral"), few, tmp_path / "out", Context())
    first, second = Checkpoint(plain.path), Checkpoint(updated.path)
    same = [torch.equal(first.read(name), second.read(name)) for name in first.entries if ".experts." in name]
    assert any(same)
    assert not all(same)


def test_a_pruner_of_its_own_takes_no_update(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.core import pruners

    monkeypatch.setitem(pruners._PRUNERS, "own", lambda weight, statistics, pattern: (weight, weight != 0))
    with pytest.raises(InputError, match=r"own is a pruner, .*leave sparsify\.update out"):
        sparsify.run(config(method="own", update=True), tiny_model("llama"), TOKENS, tmp_path / "out", Context())


def test_the_key_of_a_folder_holds_an_update_only_where_there_is_one() -> None:
    assert "update" not in config().key
    assert config(update=False).key == config().key
    assert config(update=True).key == {**config().key, "update": True}
    assert config(method="sparsegpt", update=True).key == config(method="sparsegpt").key
    assert type(config())(**config(update=False).model_dump()).update is False
    with pytest.raises(ValueError, match="sparsegpt updates by itself; leave update out"):
        config(method="sparsegpt", update=False)
