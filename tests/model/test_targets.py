"""Targets are what a model multiplies by: experts however they lie, no vectors, and the text model's alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sqft.adapters.attach import load_model
from sqft.errors import InputError
from sqft.model.calibrate import Block, visit_blocks
from sqft.model.targets import Target, coverage_of, decoder_blocks, every_matrix, find_targets, skeleton

TOKENS = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0))


def kinds(targets: list[Target], model: Any) -> dict[str, tuple[list[int], bool]]:
    """Return {name without numbers: (shape [O, I], stored transposed)}."""
    return {re.sub(r"\d+", "#", t.name): (list(t.view(model).shape), t.transposed) for t in targets}


def test_experts_that_lie_as_in_out_have_rows_of_outputs(tiny_model: Callable[..., Path]) -> None:
    model = skeleton(tiny_model("llama4_text"))
    targets, left = find_targets(model)
    found = kinds(targets, model)
    assert found["model.layers.#.feed_forward.experts.gate_up_proj[#]"] == ([48, 32], True)
    assert found["model.layers.#.feed_forward.experts.down_proj[#]"] == ([32, 24], True)
    assert sum(t.index is not None for t in targets) == 2 * 4 * 2
    assert left == [f"model.layers.{i}.feed_forward.router" for i in range(2)]


def test_experts_in_one_parameter_of_two_axes_are_told_apart(tiny_model: Callable[..., Path]) -> None:
    model = skeleton(tiny_model("dbrx"))
    targets, left = find_targets(model)
    found = kinds(targets, model)
    assert found["transformer.blocks.#.ffn.experts.mlp.w#[#]"] == ([32, 24], True)  # the last is w2
    assert found["transformer.blocks.#.ffn.experts.mlp.v#[#]"] == ([24, 32], False)
    assert left == [f"transformer.blocks.{i}.ffn.router.layer" for i in range(2)]

    whole = load_model(tiny_model("dbrx"))
    mlp = whole.get_submodule("transformer.blocks.1.ffn.experts.mlp")
    by_name = {t.name: t for t in targets}
    third = by_name["transformer.blocks.1.ffn.experts.mlp.w1[2]"].view(whole)
    assert torch.equal(third, mlp.get_parameter("w1")[48:72])
    assert torch.equal(by_name["transformer.blocks.1.ffn.experts.mlp.w2[2]"].view(whole), mlp.w2[48:72].T)  # type: ignore[index, union-attr]


def test_vectors_are_no_experts(tiny_model: Callable[..., Path]) -> None:
    targets, left = find_targets(skeleton(tiny_model("rwkv")))
    assert len(targets) == 14
    assert left == []
    assert not any("time_mix" in t.name for t in every_matrix(skeleton(tiny_model("rwkv")))[0])


class Odd(nn.Module):
    """Beside a llama's MLP: parameters of one shape, used in different ways."""

    def __init__(self, mlp: nn.Module, how: str) -> None:
        super().__init__()
        self.mlp, self.how = mlp, how
        self.odd = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = {
            "behind": lambda: x @ self.odd,
            "in front": lambda: (self.odd @ x.mT).mT,
            "in halves": lambda: torch.cat([x @ self.odd[:16].T, x @ self.odd[16:].T], dim=-1),
            "element by element": lambda: x * self.odd.mean(0),
            "not": lambda: x,
            "copied": lambda: x @ self.odd.double().float(),
            "both ways": lambda: x @ self.odd @ self.odd.T,
            "inside": lambda: torch.tensordot(x, self.odd, dims=1),
        }[self.how]()
        return self.mlp(x) + added  # type: ignore[no-any-return]


def odd_model(folder: Path, how: str) -> Any:
    model: Any = skeleton(folder)
    for layer in model.model.layers:
        layer.mlp = Odd(layer.mlp, how).to("meta")
    return model


@pytest.mark.parametrize(
    ("how", "matrices", "transposed"), [("behind", 1, True), ("in front", 1, False), ("in halves", 2, False)]
)
def test_a_parameter_is_what_it_is_used_as(
    how: str, matrices: int, transposed: bool, tiny_model: Callable[..., Path]
) -> None:
    targets = [t for t in find_targets(odd_model(tiny_model("llama"), how))[0] if t.parameter == "odd"]
    assert len(targets) == 2 * matrices
    assert all(t.transposed is transposed for t in targets)


def test_a_parameter_that_multiplies_nothing_is_left(tiny_model: Callable[..., Path]) -> None:
    model = odd_model(tiny_model("llama"), "element by element")
    targets, left = find_targets(model)
    assert len(targets) == 14
    assert left == []
    # What is no linear counts in the share all the same.
    plain = skeleton(tiny_model("llama"))
    shares = [re.search(r"([\d.]+) %", coverage_of(m, *find_targets(m))) for m in (model, plain)]
    assert [share and float(share[1]) for share in shares] == [89.4, 99.3]  # 9216 weights of 10304, and of 9280


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("not", "not seen used"),
        ("copied", "multiplied as a copy"),
        ("both ways", "more than one way"),
        ("inside", "goes through tensordot"),
    ],
)
def test_what_is_unclear_is_refused_by_name_and_can_be_left_out(
    how: str, reason: str, tiny_model: Callable[..., Path]
) -> None:
    model = odd_model(tiny_model("llama"), how)
    with pytest.raises(
        InputError, match=rf"layers\.0\.mlp\.odd \[32, 32\] and 1 more: .*{reason}.*ignore: \['\*\.odd'\]"
    ):
        find_targets(model)
    targets, left = find_targets(odd_model(tiny_model("llama"), how), ignore=["*.odd"])
    assert len(targets) == 14
    assert left == ["model.layers.0.mlp.odd", "model.layers.1.mlp.odd"]
    assert len(find_targets(odd_model(tiny_model("llama"), how), include=["q_proj"])[0]) == 2


def test_a_block_that_cannot_be_run_makes_its_experts_unclear(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = skeleton(tiny_model("mixtral"))

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ImportError("no such kernel")

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "forward", broken)
    with pytest.raises(InputError, match=r"experts\.gate_up_proj(?s:.*)cannot be run here \(ImportError: no such"):
        find_targets(model)
    assert all(layer.__class__.__name__ == "MixtralDecoderLayer" for layer in model.model.layers)  # put back


def by_hand(folder: Path) -> dict[str, torch.Tensor]:
    """Return Σ x xᵀ of every expert's inputs, from the whole model: each expert multiplied in a loop, from hooks."""
    model: Any = load_model(folder)
    model.set_experts_implementation("eager")
    found: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        found[name] = found.get(name, torch.zeros(x.shape[-1], x.shape[-1])) + x.T @ x

    def llama4(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            for e, x in enumerate(args[0].view(module.num_experts, -1, module.hidden_size)):
                gate, up = (x @ module.gate_up_proj[e]).chunk(2, dim=-1)
                add(f"{name}.gate_up_proj[{e}]", x)
                add(f"{name}.down_proj[{e}]", up * module.act_fn(gate))

        return hook

    def dbrx(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            x, w1, v1, _ = args
            (e,) = (e for e in range(module.moe_num_experts) if torch.equal(w1, module.w1[24 * e : 24 * e + 24]))
            add(f"{name}.w1[{e}]", x)
            add(f"{name}.v1[{e}]", x)
            add(f"{name}.w2[{e}]", module.activation_fn(x @ w1.T) * (x @ v1.T))

        return hook

    for name, module in model.named_modules():
        make = {"Llama4TextExperts": llama4, "DbrxExpertGLU": dbrx}.get(type(module).__name__)
        if make is not None:
            module.register_forward_pre_hook(make(name))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    return found


@pytest.mark.parametrize("arch", ["llama4_text", "dbrx"])
def test_calibration_sees_what_each_expert_sees(arch: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(arch)
    expected = by_hand(folder)
    targets = [t for t in find_targets(skeleton(folder))[0] if t.index is not None]
    found: dict[str, torch.Tensor] = {}

    def visit(block: Block) -> None:
        for target, seen in block.statistics.items():
            assert seen.hessian_II is not None
            found[target.name] = seen.hessian_II

    visit_blocks(folder, targets, TOKENS, visit, batch=2, hessian=True)
    assert found.keys() == {t.name for t in targets}
    assert expected.keys() == found.keys()
    for name, hessian in found.items():
        assert hessian.any(), name
        assert torch.allclose(hessian, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max())), name


def test_calibration_reaches_a_weight_that_stands_first(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("mamba")
    tokens: dict[str, int] = {}

    def visit(block: Block) -> None:
        tokens.update({target.name: seen.tokens for target, seen in block.statistics.items()})

    visit_blocks(folder, find_targets(skeleton(folder))[0], TOKENS, visit, batch=2, hessian=False)
    assert tokens["backbone.layers.0.mixer.dt_proj"] == TOKENS.numel()


def test_the_text_model_is_taken_though_the_vision_tower_is_larger(tiny_model: Callable[..., Path]) -> None:
    model: Any = skeleton(tiny_model("gemma3"))
    prefix, blocks = decoder_blocks(model)
    assert prefix == "model.language_model.layers"
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model.model.vision_tower.encoder.layers, blocks)]
    assert sizes[0] > sizes[1]
    targets, _ = find_targets(model, ["q_proj"])
    assert [t.name for t in targets] == [f"{prefix}.{i}.self_attn.q_proj" for i in range(2)]
