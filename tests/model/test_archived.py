"""An archive runs as it is: its weights are the model's to the bit, and answers those of the plain folder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model

from sqft.adapters.attach import load_model
from sqft.adapters.cached import cached_weights
from sqft.adapters.config import SqftConfig
from sqft.chat import Chat
from sqft.context import Context
from sqft.data.tasks import Example
from sqft.errors import InputError
from sqft.evaluation.prepacked import stock_products
from sqft.kernels import build, decode
from sqft.model.archived import ArchivedLinear, unpacked
from sqft.model.load import decodes_packed
from sqft.model.lockstep import Forward
from sqft.model.packed import PackedLinear
from sqft.recipe import QuantizeConfig, SparsifyConfig, VerifyConfig
from sqft.stages import quantize, sparsify
from sqft.stages.pack import pack
from sqft.stages.verify import behaviour

if decode.KERNEL.absence() is not None:
    pytest.skip(str(decode.KERNEL.absence()), allow_module_level=True)

WIDE = {"hidden_size": 128, "intermediate_size": 256}
FORMS = ("float", "float 2:4", "compressed-tensors", "symmetric", "gptq", "codes 2:4")


def tokens(count: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (8, count), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Any:
    """Return a function that makes (sparse folder, its archive) of a form, once."""
    folders: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(form: str, arch: str = "llama") -> tuple[Path, Path]:
        if (form, arch) not in folders:
            place = tmp_path_factory.mktemp("archived")
            source = tiny_model(arch, "bfloat16", **WIDE)
            pruning = SparsifyConfig(pattern="2:4") if "2:4" in form else SparsifyConfig(sparsity=0.5)
            if form.startswith("float"):
                sparsify.run(pruning, source, tokens(), place / "plain", Context())
            else:
                settings = QuantizeConfig(
                    group_size=32,
                    symmetric=form in ("symmetric", "gptq"),
                    format="gptq" if form == "gptq" else "compressed-tensors",
                )
                quantize.run(settings, source, tokens(), place / "plain", Context(), sparsify=pruning)
            folders[form, arch] = place / "plain", pack(place / "plain", place / "archive").path
        return folders[form, arch]

    return make


def kinds(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the weights that the kernel has multiplied."""
    seen: list[Any] = []
    product = decode.Stored.product

    def counted(self: decode.Stored, *arguments: Any) -> torch.Tensor:
        seen.append(self)
        return product(self, *arguments)

    monkeypatch.setattr(decode.Stored, "product", counted)
    return seen


@torch.no_grad()
def logits(model: Any, count: int, rows: int = 1) -> torch.Tensor:
    return model(tokens(count)[:rows]).logits


@pytest.mark.parametrize(("form", "arch"), [*((form, "llama") for form in FORMS), ("compressed-tensors", "qwen2")])
def test_it_is_the_plain_folders_model(form: str, arch: str, made: Any, products: list[Any]) -> None:
    plain, archive = made(form, arch)
    float_, packed = load_model(plain), load_model(archive)
    assert kinds(packed) == {"ArchivedLinear", "Linear"}
    assert torch.equal(logits(packed, 32), logits(float_, 32))
    for name, module in packed.named_modules():
        if isinstance(module, ArchivedLinear):
            weight = float_.get_submodule(name).weight
            assert torch.equal(module.weight.view(torch.int16), weight.view(torch.int16))
            assert torch.equal(unpacked(module.stored).view(torch.int16), weight.view(torch.int16))
    with stock_products():
        exact = logits(float_, 4, 2).float()
    few = logits(packed, 4, 2).float()
    assert len(products) == sum(isinstance(module, ArchivedLinear) for module in packed.modules())
    assert (few - exact).abs().max() < 0.03 * exact.abs().max()
    products.clear()
    with stock_products():
        assert torch.equal(logits(packed, 4, 2), logits(load_model(plain), 4, 2))
    assert not products


@pytest.mark.parametrize("form", ["float", "compressed-tensors"])
def test_it_takes_the_archives_bytes_in_memory(form: str, made: Any) -> None:
    model = load_model(made(form)[1])
    held = sum(p.nbytes for m in model.modules() if isinstance(m, ArchivedLinear) for p in m.parameters())
    dense = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, ArchivedLinear)) * 2
    assert held < dense * (0.64 if form == "float" else 0.32)  # rows of 128 have offsets of an eighth of a bit each


@pytest.mark.parametrize("form", ["float", "compressed-tensors"])
def test_it_generates_and_is_cast(form: str, made: Any) -> None:
    plain, archive = made(form)
    model = load_model(archive)
    with cached_weights(model):
        found = model.generate(tokens(8)[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert found.shape == (1, 14)
    assert model.generation_config.to_dict() == load_model(plain).generation_config.to_dict()
    wide, reference = (logits(opened.float(), 4) for opened in (model, load_model(plain, packed=True)))
    assert torch.allclose(wide, reference, rtol=1e-4, atol=1e-4)


def test_gradients_of_its_inputs_flow(made: Any) -> None:
    model = load_model(made("float")[1])
    linear = next(module for module in model.modules() if isinstance(module, ArchivedLinear))
    x = torch.randn(2, linear.in_features).bfloat16().requires_grad_()
    linear(x).sum().backward()
    assert torch.equal(x.grad, (torch.ones(2, linear.out_features).bfloat16() @ linear.weight))


@pytest.mark.parametrize("form", ["float", "codes 2:4"])
def test_evaluation_writes_the_weights_out_once(
    form: str, made: Any, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    weight = decode.Stored.weight
    monkeypatch.setattr(decode.Stored, "weight", lambda self: (written.append(self), weight(self))[1])
    plain, archive = made(form)
    model, reference = load_model(archive), logits(load_model(plain), 32)
    count = sum(isinstance(module, ArchivedLinear) for module in model.modules())
    with cached_weights(model):
        for _ in range(3):
            assert torch.equal(logits(model, 32), reference)
        assert len(written) == count
        assert not products
        few = logits(model, 4)
        assert len(products) == count  # a few rows are still multiplied with what is stored
    assert torch.equal(logits(model, 4), few)
    assert torch.equal(logits(model, 32), reference)
    assert len(written) == 2 * count  # nothing is kept outside
    with cached_weights(model, but_decoded=True):
        logits(model, 32)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with cached_weights(model):
        logits(model, 32)
        assert all(m.cached is None for m in model.modules() if isinstance(m, ArchivedLinear))
    assert len(written) == 4 * count


def test_without_the_kernel_the_model_is_unpacked(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, archive = made("float")
    monkeypatch.setattr(decode, "KERNEL", build.Kernel(lambda: "switched off", "said"))
    model = load_model(archive)
    assert kinds(model) == {"Linear"}
    assert torch.equal(logits(model, 4), logits(load_model(plain), 4))
    assert not decodes_packed(made("compressed-tensors")[0])


def test_a_card_and_training_get_what_they_always_did(made: Any) -> None:
    assert kinds(load_model(made("float")[1], device=torch.device("cuda"))) == {"Linear"}
    assert kinds(load_model(made("float")[1], packed=True)) == {"Linear"}
    assert kinds(load_model(made("compressed-tensors")[1], packed=True)) == {"PackedLinear", "Linear"}


def test_it_cannot_be_adapted_and_says_how(made: Any) -> None:
    with pytest.raises(InputError, match="packed=True"):
        get_peft_model(load_model(made("float")[1]), SqftConfig(kind="sparse", r=4, target_modules=["q_proj"]))
    model = load_model(made("float")[1])
    with pytest.raises(InputError, match="not saved from memory"):
        model.save_pretrained(made("float")[1].parent / "saved")


def test_models_of_other_dtypes_and_sizes_of_groups_are_unpacked(made: Any, tiny_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    sparsify.run(SparsifyConfig(sparsity=0.5), tiny_model("llama", "float16", **WIDE), tokens(), folder, Context())
    assert kinds(load_model(pack(folder, tmp_path / "archive").path)) == {"Linear"}
    folder = tmp_path / "grouped"
    settings, pruning = QuantizeConfig(group_size=8), SparsifyConfig(sparsity=0.5)
    quantize.run(settings, tiny_model("llama", "bfloat16", **WIDE), tokens(), folder, Context(), sparsify=pruning)
    assert "ArchivedLinear" not in kinds(load_model(pack(folder, tmp_path / "archive8").path))


def test_verify_runs_pytorchs_own_products(made: Any, products: list[Any], tiny_tokenizer: Any) -> None:
    plain, archive = made("compressed-tensors")
    for folder in (plain, archive):
        tiny_tokenizer.save_pretrained(folder)
    sides, rows = (behaviour.Side(plain), behaviour.Side(archive)), [Example("1 +", " 1")]
    checks = behaviour.compare(VerifyConfig(), sides, None, rows, Context(), rounded=False, not_finite=[])
    assert {check["name"]: check["value"] for check in checks}["logits_equal"] == 0
    assert not products


def test_packed_linears_decode_with_their_codes(made: Any, products: list[Any]) -> None:
    plain, _ = made("compressed-tensors")
    model, reference = load_model(plain, packed=True), load_model(plain)
    few = logits(model, 4)
    count = sum(isinstance(module, PackedLinear) for module in model.modules())
    assert len(products) == count
    assert torch.equal(logits(model, 32), logits(reference, 32))
    with stock_products():
        assert torch.equal(logits(model, 4), logits(reference, 4))
    with cached_weights(model):
        assert torch.equal(logits(model, 4), few)
        assert next(m for m in model.modules() if isinstance(m, PackedLinear)).cached is not None
    with cached_weights(model, but_decoded=True):
        assert torch.equal(logits(model, 4), few)
        assert next(m for m in model.modules() if isinstance(m, PackedLinear)).cached is None
    training = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, training.in_features).bfloat16().requires_grad_()
    assert torch.equal(training(x), torch.nn.functional.linear(x, training.weight))
    assert len(products) == 3 * count  # of the stock products and of the training none


def test_a_chat_keeps_a_quantised_folder_packed(
    made: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, archive = made("compressed-tensors")
    for folder in (plain, archive):
        tiny_tokenizer.save_pretrained(folder)
    chats = [Chat(folder, raw=True, max_tokens=4) for folder in (plain, archive)]
    assert kinds(chats[0].model) == {"PackedLinear", "Linear"}
    assert kinds(chats[1].model) == {"ArchivedLinear", "Linear"}
    said = [chat.answer("say", lambda _: None)[0] for chat in chats]
    assert said[0] == said[1]
    monkeypatch.setattr(decode, "KERNEL", build.Kernel(lambda: "switched off", "said"))
    assert "PackedLinear" not in kinds(Chat(plain, raw=True).model)


@pytest.mark.parametrize("stock", [True, False])
def test_a_forward_in_a_thread_of_its_own_keeps_to_stock_products(stock: bool) -> None:
    with stock_products() if stock else nullcontext():
        forward = Forward(decode.available)
        forward.go_on()
        forward.join()
    assert forward.result is not stock
