"""What is learnt from a teacher: both terms against naive float64 sums, however a step is shared out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.adapters.attach import load_model
from sqft.training.attention import attend_by_example
from sqft.training.batches import IGNORED, collate, pack_rows
from sqft.training.distill import Distillation, relative_error
from sqft.training.loss import answer_loss
from sqft.training.loss_scale import LossScale

LENGTHS = (5, 40, 17, 3, 29, 11, 23)


def packed_rows() -> list[dict[str, list[int]]]:
    """Rows of several examples, whose first half is a prompt; all of another length, so that a batch is padded."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in LENGTHS:
        ids = torch.randint(5, 200, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [IGNORED] * (length // 2) + ids[length // 2 :]})
    return pack_rows(examples, 64, packing=True)


def two_models(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "eager") -> tuple[Any, Any]:
    """A teacher, and a student that is the same model with other values."""
    teacher, student = (load_model(folder, attention=attention).to(dtype) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return teacher.requires_grad_(False), student


def naive(teacher: Any, student: Any, rows: list[dict[str, list[int]]]) -> list[float]:
    """Task, error and divergence, example by example and token by token in float64, each example alone in its row."""
    task = error = divergence = 0.0
    tokens = labelled = 0
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor([row["input_ids"][start : start + length]])
            labels = row["labels"][start : start + length]
            with torch.no_grad():
                out = [m(input_ids=ids, use_cache=False, output_hidden_states=True) for m in (student, teacher)]
            for position in range(length):
                tokens += 1
                for s, t in zip(out[0].hidden_states[1:], out[1].hidden_states[1:], strict=True):
                    state, wanted = s[0, position].double(), t[0, position].double()
                    error += float(((state - wanted) ** 2).sum() / (wanted**2).sum()) / (len(out[0].hidden_states) - 1)
                if position + 1 < length and labels[position + 1] != IGNORED:
                    labelled += 1
                    p, q = (o.logits[0, position].double().softmax(0) for o in (out[1], out[0]))
                    task -= float(q[labels[position + 1]].log())
                    divergence += float((p * (p.log() - q.log())).sum())
            start += length
    return [task / labelled, error / tokens, divergence / labelled]


ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt2", "mixtral"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_parts_are_those_of_naive_sums_over_single_examples(arch: str, tiny_model: Callable[..., Path]) -> None:
    teacher, student = two_models(tiny_model(arch))
    rows = packed_rows()
    inputs = collate(rows, 0)
    assert not inputs["real"].all()
    with torch.no_grad():
        found = Distillation(teacher, 1.0, 1.0).losses(student, inputs)
        assert found[0] == pytest.approx(float(answer_loss(student, inputs)), rel=1e-5)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(naive(teacher, student, rows), rel=1e-3)
    assert found.min() > 0.005


def test_weights_scale_their_parts_and_what_is_off_is_not_computed(tiny_model: Callable[..., Path]) -> None:
    teacher, student = two_models(tiny_model("llama"))
    inputs = collate(packed_rows(), 0)
    with torch.no_grad():
        whole = Distillation(teacher, 1.0, 1.0).losses(student, inputs)
    both = Distillation(teacher, 2.0, 0.5)
    assert float(both.weigh(whole)) == pytest.approx(float(whole[0] + 2 * whole[1] + 0.5 * whole[2]))
    heads: list[int] = []
    teacher.get_output_embeddings().register_forward_hook(lambda m, args, out: heads.append(out.shape[1]))
    states, logits = (Distillation(teacher, *weights).losses(student, inputs) for weights in ((1.0, 0.0), (0.0, 1.0)))
    assert states.tolist() == [*whole[:2].tolist(), 0.0]
    assert logits.tolist() == [whole[0].item(), 0.0, whole[2].item()]
    assert heads == [0, int((inputs["labels"] != IGNORED).sum())]


def gradients(student: Any) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    student.zero_grad()
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "gemma2"])
def test_shares_of_a_step_add_up_to_it_and_recomputing_changes_no_gradient(
    arch: str, tiny_model: Callable[..., Path]
) -> None:
    teacher, student = two_models(tiny_model(arch))
    for module in student.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    student.train()
    rows = packed_rows()
    distillation = Distillation(teacher, 1.5, 0.7)
    inputs = collate(rows, 0)
    whole = distillation.losses(student, inputs)
    distillation.weigh(whole).backward()
    wanted = gradients(student)
    assert not any(p.grad is not None for p in teacher.parameters())
    counts = int((inputs["labels"] != IGNORED).sum()), int(inputs["real"].sum())
    assert counts[1] == sum(LENGTHS)
    parts = torch.zeros(3)
    for share in (rows[:1], rows[1:]):  # of other widths, so padded otherwise
        found = distillation.losses(student, collate(share, 0), *counts)
        distillation.weigh(found).backward()
        parts += found.detach()
    torch.testing.assert_close(parts, whole.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-3, atol=1e-5)
    # The mean of the shares' own means is another loss: rows differ in tokens.
    means = [distillation.losses(student, collate(share, 0)).detach() for share in (rows[:1], rows[1:])]
    assert (sum(means) / 2 - whole.detach()).abs().max() > 1e-4
    student.gradient_checkpointing_enable({"use_reentrant": False})
    distillation.weigh(distillation.losses(student, inputs)).backward()
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-4, atol=1e-6)


def test_no_example_sees_another_through_the_teacher(tiny_model: Callable[..., Path]) -> None:
    rows = packed_rows()
    for attention in ("eager", "sdpa"):
        models = two_models(tiny_model("llama"), attention=attention)
        for model in models:
            attend_by_example(model)
        with torch.no_grad():
            found = Distillation(models[0], 1.0, 1.0).losses(models[1], collate(rows, 0))
            # Without their boundaries examples run into each other, in both models alike.
            joined = [{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows]
            mixed = Distillation(models[0], 1.0, 1.0).losses(models[1], collate(joined, 0))
        assert found.tolist() == pytest.approx(naive(*models, rows), rel=1e-3)
        assert abs(float(mixed[1] / found[1]) - 1) > 0.01


def test_the_error_of_states_has_the_gradient_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    real = torch.tensor([[True] * 5, [True, True, True, False, False]])
    exact = student.clone().requires_grad_()
    ratios = (exact - teacher).square().sum(-1) / teacher.square().sum(-1)
    (3 * ratios[real].sum()).backward()
    found = student.float().requires_grad_()
    total = relative_error(found, teacher.float(), real)
    (3 * total).backward()
    assert float(total) == pytest.approx(float(ratios[real].sum()), rel=1e-5)
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert not found.grad[1, 3:].any()  # padding
    teacher[0, 0] = 0  # a state of zeros divides nothing by zero
    assert relative_error(student.float(), teacher.float(), real).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_compared_in_float32(dtype: torch.dtype, tiny_model: Callable[..., Path]) -> None:
    teacher, student = two_models(tiny_model("llama"), dtype)
    inputs = collate(packed_rows(), 0)
    found = Distillation(teacher, 1.0, 1.0).losses(student, inputs)
    assert found.dtype == torch.float32
    exact = Distillation(teacher.float(), 1.0, 1.0).losses(student.float(), inputs)
    assert found.tolist() == pytest.approx(exact.tolist(), rel=0.1)
    states = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    near = (states.float() * (1 + 2.0**-7)).to(dtype)
    ratio = float(relative_error(near, states, torch.ones(1, 4, dtype=torch.bool))) / 4
    assert ratio == pytest.approx(2.0**-14, rel=0.2)  # a sum in the states' own precision would drown it


def test_both_terms_are_scaled_up_on_the_way_through_a_float16_model(tiny_model: Callable[..., Path]) -> None:
    """As many tokens as a real step has: the gradients of their mean are below what float16 holds."""
    found = []
    inputs = collate(packed_rows(), 0)
    for dtype, scaled in ((torch.float32, False), (torch.float16, True), (torch.float16, False)):
        teacher, student = two_models(tiny_model("llama"), dtype)
        # The parameter that is looked at is float32 in both, as an adapter's is.
        student.requires_grad_(False)
        probe = torch.nn.Parameter(torch.zeros(32))
        student.model.embed_tokens.register_forward_hook(lambda m, a, out, probe=probe: out + probe.to(out.dtype))
        student.probe = probe
        scale = LossScale(student, float16=scaled)
        distillation = Distillation(teacher, 1.0, 1.0)
        losses = distillation.losses(student, inputs, 8_000_000, 8_000_000, scale.amplify)
        (losses[1] + losses[2]).backward()
        found.append(probe.grad)
    wanted, scaled_up, unscaled = found
    assert wanted.abs().max() < 6e-5  # float16's smallest normal number
    assert (scaled_up - wanted).norm() < 0.05 * wanted.norm()
    assert (unscaled - wanted).norm() > 0.05 * wanted.norm()
