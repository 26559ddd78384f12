"""Finetune: train elastic, masked adapters on a frozen base; resumable to the bit.

The data order, the ranks drawn and the optimiser state are functions of (seed, step), so a resumed run ends with the
same adapter to the bit, given equal threads, library versions and processor. Several processes share the rows of each
step and train the same adapter, to rounding; the first alone writes.
"""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import get_peft_model
from transformers import PreTrainedModel, set_seed

from sqft import processes
from sqft.adapters.adaptable import all_linears, block_linears, excluded, reached, refused
from sqft.adapters.attach import load_model
from sqft.adapters.config import RANK_SPACE, SqftConfig
from sqft.adapters.elastic import rank_space
from sqft.adapters.float32 import compute_in_float32
from sqft.adapters.layers import sqft_layers
from sqft.core import ordered
from sqft.core.bfloat16 import multiplies_bfloat16
from sqft.data.encode import check_vocabulary, encode
from sqft.device import device_key, place
from sqft.digests import digest_text
from sqft.disk import check_space, write_json
from sqft.errors import InputError, NumericalError, Problems, SqftError
from sqft.memory import is_out_of_memory
from sqft.model.load import embedding_rows
from sqft.stage import Stage
from sqft.stages.finetune import loop, taught
from sqft.storage.archive import stored
from sqft.storage.identity import identity
from sqft.storage.integers import quantization_config
from sqft.storage.masks import START_FILE, float_source
from sqft.training.attention import attend_by_example
from sqft.training.batches import label_examples, pack_rows
from sqft.training.distill import Distillation
from sqft.training.isolation import check_isolation

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from sqft.artifact import Artifact, Draft
    from sqft.context import Context
    from sqft.core.ranks import RankSpace
    from sqft.recipe import FinetuneConfig

Pair = tuple[str, str]
_SHORT_ROW = 256  # tokens


@dataclass(frozen=True)
class _Ready:
    """The model with its adapters, what it computes in, its token rows, and what it learns from a teacher."""

    adapted: Any
    computes_in: str
    rows: list[dict[str, list[int]]]
    held_out: list[dict[str, list[int]]]
    trainable: int
    distillation: Distillation | None


def run(
    config: FinetuneConfig,
    model: Path,
    train: list[Pair],
    validation: list[Pair],
    out: Path,
    context: Context,
    *,
    data: dict[str, Any],
    teacher: Path | None = None,
) -> Artifact:
    """Train adapters on a base and save them as a PEFT adapter.

    Args:
        config: adapters and training.
        model: the base model's folder.
        train: (prompt, answer) pairs.
        validation: pairs for the validation loss; may be empty.
        out: the folder to make.
        context: its seed is that of initialisation, data order and rank draws.
        data: what the pairs were drawn from; part of the key.
        teacher: the folder of the uncompressed model, where `config.distill` is set; an input of the stage.

    Raises:
        InputError: targets that match nothing, examples that do not fit, a model that cannot be packed, or a teacher
            that is missing or of another shape.
    """
    taught.check_given(config, teacher)
    settings = {
        **config.model_dump(mode="json", exclude={"trackers"}),
        "data": data,
        "data_digest": digest_text(json.dumps([train, validation])),
        **device_key(context.device),
    }
    inputs = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    stage = Stage.of("finetune", out, settings, inputs, context.seed)
    return stage.make(
        lambda: _open(config, model, teacher, train, validation, out, context),
        lambda ready, draft: _train(config, model, context, ready, draft) | {"examples": len(train)},
        shared=True,
    )


def _train(config: FinetuneConfig, model: Path, context: Context, ready: _Ready, draft: Draft) -> dict[str, Any]:
    """Train, save the adapter, and return what the manifest says was done."""
    started = time.monotonic()
    padding = context.tokenizer(model).pad_token_id
    arguments = (ready.adapted, ready.rows, ready.held_out, draft.checkpoints, context.seed, padding)
    on_cpu = context.device.type == "cpu"
    trainer = loop.make_trainer(config, *arguments, on_cpu=on_cpu, distillation=ready.distillation)
    resumed_at = loop.train(trainer, draft.checkpoints)
    check_trained(ready.adapted)
    if not processes.first():
        return {}
    space, log = rank_space(ready.adapted), trainer.state.log_history
    _save(ready.adapted, space, log, draft.path)
    start = config.start if config.kind == "quantized" else None
    return {
        "coverage": f"adapted {len(sqft_layers(ready.adapted))} linears in {len(space.groups)} rank groups",
        "kind": config.kind,
        "base_identity": identity(model, start),
        "start": start,
        "device": context.device.type,
        "computes_in": ready.computes_in,
        "trainable_parameters": ready.trainable,
        "steps": trainer.state.global_step,
        "resumed_at_step": resumed_at,
        "packed_rows": len(ready.rows),
        "tokens_per_epoch": sum(len(row["input_ids"]) for row in ready.rows),
        "train_seconds": round(time.monotonic() - started, 2),
        "final_loss": next((e["loss"] for e in reversed(log) if "loss" in e), None),
    }


def _open(
    config: FinetuneConfig,
    model: Path,
    teacher: Path | None,
    train: list[Pair],
    validation: list[Pair],
    out: Path,
    context: Context,
) -> _Ready:
    """Open the base and its teacher, check the rows on it, and attach the adapters."""
    check_precision(config, model, quantised_first=False)
    if teacher is not None:
        taught.check(teacher, model, trust_remote_code=context.trust_remote_code)
    tokenizer = context.tokenizer(model)
    network = _load(config, model, context, "train a quantised base (quantize)")
    rows = pack_rows(label(config, tokenizer, train, network.config), config.length, packing=config.packing)
    held_out = label(config, tokenizer, validation, network.config) if validation else []
    distillation = None
    if config.distill is not None and teacher is not None:
        uncompressed = _load(config, teacher, context, "leave finetune.distill out").requires_grad_(False)
        distillation = Distillation(uncompressed, config.distill.hidden, config.distill.logits)
    networks = [network] if distillation is None else [network, distillation.teacher]
    for each in networks if config.packing else []:
        check_isolation(each, min(len(tokenizer), embedding_rows(each)))
    set_seed(context.seed)
    adapted = attach(network, config)
    wide, *_ = [compute_in_float32(each) for each in networks]
    computes_in = "float32" if wide else str(network.dtype).removeprefix("torch.")
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    # Adapter, two checkpoints of it with two moments each, all in float32.
    check_space(out, trainable * 4 * 8, "training")
    return _Ready(adapted, computes_in, rows, held_out, trainable, distillation)


def _load(config: FinetuneConfig, folder: Path, context: Context, remedy: str) -> PreTrainedModel:
    """Open a model for training on packed rows, on the device that trains; `remedy` is for one that is too large."""
    attention, trust = _attention(config, context.device), context.trust_remote_code
    network = load_model(folder, packed=True, attention=attention, trust_remote_code=trust)
    # Flash attention has no kernel for a CPU, and packing is checked before the trainer moves the model.
    place(network, context.device, f"{remedy}, or train on a card with more memory")
    if config.attention == "auto":
        attend_by_example(network)
    return network


def _save(adapted: Any, space: RankSpace, log: list[dict[str, Any]], folder: Path) -> None:
    """Write the adapter, its rank space and the log of its training."""
    adapted.save_pretrained(str(folder))
    groups = {group: list(members) for group, members in space.groups.items()}
    write_json(folder / RANK_SPACE, {"choices": list(space.choices), "groups": groups})
    write_json(folder / "sqft" / "training_log.json", loop.split_log(log))


def check_trained(adapted: nn.Module) -> None:
    """Refuse an adapter that training has driven out of the numbers.

    Raises:
        NumericalError: which parameters, and the remedy.
    """
    broken = [name for name, p in adapted.named_parameters() if p.requires_grad and not bool(p.isfinite().all())]
    if broken:
        raise NumericalError(
            f"training diverged: {len(broken)} of the adapter's parameters hold NaN or Inf, {broken[0]} among them; "
            f"{loop.REMEDY}"
        )


def label(config: FinetuneConfig, tokenizer: Any, pairs: list[Pair], model_config: Any) -> list[dict[str, list[int]]]:
    """Return the token rows of (prompt, answer) pairs.

    Raises:
        InputError: none, or too long; see :func:`label_examples`; or the tokenizer has no end token, or tokens that the
            model has no embedding for.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer names no end token (eos_token), so no answer could end; set it and save it")
    encoded = [encode(tokenizer, prompt, answer) for prompt, answer in pairs]
    embedded = int(model_config.get_text_config(decoder=True).vocab_size)
    check_vocabulary([t for pair in encoded for part in pair for t in part], embedded, "training rows", tokenizer)
    return label_examples(
        encoded,
        tokenizer.eos_token_id,
        length=config.length,
        model_length=getattr(model_config, "max_position_embeddings", None),
        completion_only=config.completion_only,
    )


def check(config: FinetuneConfig, network: PreTrainedModel) -> None:
    """Refuse adapters that the model cannot take.

    Raises:
        InputError: a target module is not in the model, or a tracker is not installed.
    """
    with Problems("finetune") as problems:
        for tracker in config.trackers:
            if importlib.util.find_spec(tracker) is None:
                problems.add(f"trackers has {tracker}, which is not installed; pip install {tracker}, or take it out")
        if config.attention == "flash_attention_2" and config.packing and config.batch > 1:
            problems.add(
                "attention flash_attention_2 keeps packed examples apart in batches of one row, and batch is "
                f"{config.batch}; set batch: 1 and accumulation: {config.batch * config.accumulation}, or sdpa"
            )
        if config.batch * config.accumulation % processes.count():
            problems.add(
                f"a step has {config.batch * config.accumulation} rows (batch times accumulation), which "
                f"{processes.count()} processes cannot share evenly; start another number of processes, or change them"
            )
        for target in config.target_modules or ():
            inside, elsewhere = reached(network, target)
            if elsewhere and not inside:
                problems.add(
                    f"target module {target!r} names {elsewhere[0]}, outside the decoder's blocks; take it out"
                )
            elif not inside:
                known = ", ".join(block_linears(network))
                problems.add(f"target module {target!r} matches no linear of the model; it has {known}")
            elif reason := refused(network, target):
                known = ", ".join(name for name in block_linears(network) if refused(network, name) is None)
                problems.add(f"target module {target!r} {reason}; take it out (the others are {known})")


def check_precision(config: FinetuneConfig, base: Path, *, quantised_first: bool) -> None:
    """Refuse a kind of adapter that the base's precision does not take, or a start that the base does not have.

    Args:
        config: the adapters.
        base: the base's folder, or the float model's that is quantised before.
        quantised_first: whether the base is yet to be quantised.

    Raises:
        InputError: says which, and what to use.
    """
    quantised = quantised_first or quantization_config(base) is not None
    with Problems("finetune") as problems:
        if config.kind == "quantized" and not quantised:
            problems.add("kind quantized needs a quantised base, and the model is float: add quantize, or use sparse")
        if config.kind == "sparse" and quantised:
            problems.add("kind sparse needs a float base, and this one is quantised; use kind quantized, or dense")
        if config.kind == "quantized" and quantised and not quantised_first:
            if config.start == "compensated" and stored(base / START_FILE) is None:
                problems.add(
                    f"base {base} has no {START_FILE}, the weights before rounding; use start: dequantized, or "
                    "quantise the float model with sqft quantize"
                )
            if config.start == "float":
                float_source(base)
        if config.start == "float" and config.derive_mask:
            problems.add(
                "start: float and derive_mask do not go together: a float weight may lie where the derived mask is 0"
            )


def attach(network: PreTrainedModel, config: FinetuneConfig) -> Any:
    """Put the recipe's adapters on a model.

    Raises:
        InputError: adapters that the model cannot take, also where PEFT says so.
    """
    check(config, network)
    targets, beside = _targets(config, network)
    settings = SqftConfig(
        task_type="CAUSAL_LM",
        kind=config.kind,
        ranks=list(config.ranks),
        rank_groups=[list(group) for group in config.rank_groups],
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes floats, and documents int
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=beside or None,
        start=config.start,
        derive_mask=config.derive_mask,
        arithmetic="ordered" if ordered.suits(network.device, network.dtype) else "blas",
    )
    try:
        return get_peft_model(network, settings)
    except SqftError:
        raise
    except Exception as error:  # PEFT's checks raise errors of many classes
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"finetune: PEFT does not adapt {', '.join(targets)} of a {network.config.model_type}: "
            f"{error}; take what it names out of target_modules"
        ) from error


def _targets(config: FinetuneConfig, network: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return PEFT's target_modules, and its exclude_modules: what the targets' names match besides."""
    if config.target_modules is not None:
        return list(config.target_modules), excluded(network, config.target_modules)
    chosen = all_linears(network)
    if not chosen:
        raise InputError("finetune: no linear of the model can be adapted; see target_modules")
    targets = sorted({name.rpartition(".")[2] for name in chosen})
    matched = {name for target in targets for name in reached(network, target)[0]}
    return targets, [*excluded(network, targets), *sorted(matched - set(chosen))]


def _attention(config: FinetuneConfig, device: torch.device) -> str | None:
    if config.attention != "auto":
        return config.attention
    # Measured (benchmarks/attention.py): in short rows the plain product is a little faster on a CPU, in long ones its
    # score matrices cost more than all the rest.
    short = config.length <= _SHORT_ROW and multiplies_bfloat16()
    return "eager" if device.type == "cpu" and short else None
