"""The training loop: transformers' Trainer, and checkpoints that count only when they are whole.

Checkpoints lie in the stage's partial folder. One counts once its DONE file is there, which is written after everything
else of it is on disk, so a kill at any moment loses at most the steps since the last one.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sqft import processes
from sqft.adapters.elastic import ElasticRanks
from sqft.adapters.layers import sqft_layers
from sqft.errors import NumericalError
from sqft.training.batches import collate
from sqft.training.loss import PARTS, PackedTrainer
from sqft.training.loss_scale import LossScale

if TYPE_CHECKING:
    from sqft.recipe import FinetuneConfig
    from sqft.training.distill import Distillation

logger = logging.getLogger(__name__)

REMEDY = "lower finetune.learning_rate or raise finetune.warmup, and delete the unfinished folder"


def make_trainer(
    config: FinetuneConfig,
    model: Any,
    rows: list[dict[str, list[int]]],
    held_out: list[dict[str, list[int]]],
    checkpoints: Path,
    seed: int,
    pad_token_id: int,
    *,
    on_cpu: bool = False,
    distillation: Distillation | None = None,
) -> PackedTrainer:
    """Return the trainer of a model with adapters.

    Args:
        config: of the training.
        model: with adapters.
        rows: packed training rows.
        held_out: rows for the validation loss.
        checkpoints: folder of the checkpoints.
        seed: of the data order and the rank draws.
        pad_token_id: what rows are filled up with.
        on_cpu: train on the CPU, whatever else is here.
        distillation: what is learnt from a teacher besides.
    """
    evaluate = config.evaluate_every is not None and bool(held_out)
    arguments = _arguments(config, len(rows), checkpoints, seed, evaluate=evaluate, on_cpu=on_cpu)
    loss_scale = LossScale(
        model, float16=any(layer.base_dtype == torch.float16 for layer in sqft_layers(model).values())
    )
    trainer = PackedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=[{**row, "seq_lengths": [len(row["input_ids"])]} for row in held_out] or None,
        data_collator=lambda batch: collate(batch, pad_token_id),
        callbacks=[ElasticRanks(seed), loss_scale, _Done(), _Log()],
        loss_scale=loss_scale,
        distillation=distillation,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(
    config: FinetuneConfig, rows: int, checkpoints: Path, seed: int, *, evaluate: bool, on_cpu: bool
) -> TrainingArguments:
    """Return transformers' settings for a training on so many packed rows."""
    batch, accumulation = _share(config)
    steps = config.max_steps or max(1, round(config.epochs * _steps_per_epoch(config, rows)))
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=round(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss of NaN would be logged as 0
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=config.evaluate_every,
        report_to=list(config.trackers) or "none",
        remove_unused_columns=False,
        disable_tqdm=not os.isatty(2),
        seed=seed,
        data_seed=seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are the frozen base's integers, equal in every process
        accelerator_config={"use_configured_state": processes.count() > 1},
    )
    if arguments.n_gpu > 1:
        # One process trains on one device; transformers would wrap the model in DataParallel, which packing cannot.
        arguments._n_gpu = 1
    return arguments


def _share(config: FinetuneConfig) -> tuple[int, int]:
    """Return (batch, accumulation) of each process: together a step has the recipe's rows, however many share it."""
    rows = config.batch * config.accumulation // processes.count()
    batch = next(size for size in range(min(config.batch, rows), 0, -1) if rows % size == 0)
    return batch, rows // batch


def _steps_per_epoch(config: FinetuneConfig, rows: int) -> float:
    return rows / (config.batch * config.accumulation)


def train(trainer: PackedTrainer, checkpoints: Path) -> int:
    """Train from the last whole checkpoint, if there is one; return the step it was at."""
    if processes.first():
        for folder in checkpoints.glob("checkpoint-*"):
            if not (folder / "DONE").is_file():
                shutil.rmtree(folder)
    processes.barrier()
    whole = list(checkpoints.glob("checkpoint-*"))
    processes.barrier()  # before one of them makes the next
    latest = max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    at = 0 if latest is None else int(latest.name.rpartition("-")[2])
    if latest is not None:
        logger.info("resuming from step %d", at)
        trainer.loss_scale.restore(latest)
    if latest is not None and at >= trainer.args.max_steps:
        # The trainer would take one step more, if the last epoch is not at its end.
        set_peft_model_state_dict(trainer.model, load_file(latest / "adapter_model.safetensors"))
        trainer.state = TrainerState.load_from_json(str(latest / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
    return at


class _Done(TrainerCallback):
    """Marks a checkpoint as whole, after its files are on disk."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes.barrier()  # each has written its own part
        if not processes.first():
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb") as stream:
                    os.fsync(stream.fileno())
        (folder / "DONE").touch()


class _Log(TrainerCallback):
    """Reports the loss where there is no progress bar, and ends a training that has diverged."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and not math.isfinite(float(logs.get("loss", 0))):
            raise NumericalError(f"the loss of step {state.global_step} is {logs['loss']}: training diverged; {REMEDY}")
        every = max(1, state.max_steps // 20)
        if logs and "loss" in logs and state.global_step % every == 0:
            logger.info("step %d/%d  loss %.4f", state.global_step, state.max_steps, float(logs["loss"]))


def split_log(history: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return what training_log.json has of a trainer's log; of a distilled training the parts of its loss too."""
    return {
        "train": [
            {"step": e["step"], **{name: float(e[name]) for name in ("loss", *PARTS, "learning_rate") if name in e}}
            for e in history
            if "loss" in e
        ],
        "eval": [{"step": e["step"], "eval_loss": float(e["eval_loss"])} for e in history if "eval_loss" in e],
    }
