"""SqftConfig under unpatched trainers, and what our own training step promises about packing and the head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from sqft.adapters.attach import load_model
from sqft.adapters.config import SqftConfig
from sqft.adapters.elastic import ElasticRanks
from sqft.adapters.layers import sqft_layers
from sqft.errors import InputError
from sqft.model.opening import load_tokenizer
from sqft.training.batches import collate, label_examples, pack_rows
from sqft.training.isolation import check_isolation
from sqft.training.loss import answer_loss

ROWS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(4) for b in range(4)]


def config(kind: str = "sparse") -> SqftConfig:
    return SqftConfig(
        task_type="CAUSAL_LM", kind=kind, ranks=[4, 2], lora_alpha=8, target_modules=["q_proj", "up_proj"]
    )


def sparse(folder: Path) -> Any:
    model = load_model(folder)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data[:, ::2] = 0
    return model


def arguments(folder: Path, cls: Any = TrainingArguments, **options: Any) -> Any:
    return cls(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=0.05, report_to="none",
        save_strategy="no", bf16=True, use_cpu=True, **options,
    )  # fmt: skip


def check_trained(model: Any) -> None:
    layers = sqft_layers(model)
    assert all(layer.lora_B["default"].weight.abs().sum() > 0 for layer in layers.values())
    merged = model.merge_and_unload()
    for name in layers:
        weight = merged.get_submodule(name).weight
        assert (weight[:, ::2] == 0).all()
        assert (weight[:, 1::2] != 0).any()


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_transformers_trainer_unpatched(kind: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama", "bfloat16")
    model = get_peft_model(sparse(folder), config(kind))
    ids = [{"input_ids": list(range(4, 14)), "labels": list(range(4, 14))}] * 8
    callback = ElasticRanks(seed=0)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=ids, callbacks=[callback]).train()
    if kind == "sparse":
        check_trained(model)


def test_trl_sft_trainer_unpatched(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    folder = tiny_model("llama", "bfloat16")
    trainer = SFTTrainer(
        model=sparse(folder),
        args=arguments(tmp_path, SFTConfig, max_length=64),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=load_tokenizer(folder),
        peft_config=config(),
        callbacks=[ElasticRanks(seed=0)],
    )
    trainer.train()
    check_trained(trainer.model)


def labelled(folder: Path) -> list[dict[str, list[int]]]:
    tokenizer = load_tokenizer(folder)
    pairs = [(tokenizer(r["prompt"]).input_ids, tokenizer(r["completion"]).input_ids) for r in ROWS]
    return label_examples(pairs, tokenizer.eos_token_id, length=32, model_length=64, completion_only=True)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "gemma2", "gpt2", "mixtral"])
def test_packed_loss_equals_the_loss_one_by_one(arch: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(arch)
    model = load_model(folder, attention="eager")
    rows = labelled(folder)
    packed = pack_rows(rows, 32, packing=True)
    assert len(packed) < len(rows)
    total = torch.tensor(0.0)
    count = 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
            labels = torch.tensor(row["labels"][1:])
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
            count += int((labels != -100).sum())
        found = answer_loss(model, collate(packed, 0))
    assert found == pytest.approx(float(total / count), rel=2e-4)
    check_isolation(model, 200)


def test_a_model_that_leaks_between_packed_examples_is_refused(tiny_model: Callable[..., Path]) -> None:
    model = load_model(tiny_model("llama"), attention="eager")
    inner = model.model.forward

    def leaking(*args: Any, **kwargs: Any) -> Any:
        kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1]).unsqueeze(0)
        return inner(*args, **kwargs)

    model.model.forward = leaking
    with pytest.raises(InputError, match=r"does not keep packed examples apart.*finetune\.packing: false"):
        check_isolation(model, 200)


def test_prompts_padding_and_first_tokens_carry_no_loss(tiny_model: Callable[..., Path]) -> None:
    rows = pack_rows(labelled(tiny_model("llama")), 32, packing=True)
    batch = collate(rows, 0)
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == -100).all()
    trained = int((batch["labels"] != -100).sum())
    assert trained == sum(len(row["completion"]) + 1 for row in ROWS)
