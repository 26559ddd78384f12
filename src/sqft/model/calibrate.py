"""Run calibration text through a model one decoder block at a time, never holding more than a block.

The model's own forward drives: each block is replaced by a stand-in that, when called, reads the block's weights from
disk, runs the calibration sequences through it while it records what every target's input looks like, lets the visitor
change the weights, runs the sequences again so that later blocks see the change, and drops the block. Attention masks,
position tables and whatever else a model passes to its blocks are therefore the model's own.

Inputs are observed where they are used (:mod:`sqft.model.observe`).
On a card a block comes and goes; the hidden states stay there if they take at most half of its free memory.

Memory: a block, the hidden states of all sequences three times (a block's input and output, and the embeddings, which
the model's own forward holds to its end), the statistics, and the activations of `batch` sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sqft import processes
from sqft.core.bfloat16 import fast_products
from sqft.core.mask import finite
from sqft.device import free_bytes
from sqft.errors import NumericalError
from sqft.memory import release_memory
from sqft.model.load import embedding_rows
from sqft.model.names import DiskNames
from sqft.model.observe import AllSeen, Observer, add_up
from sqft.model.opening import check_complete
from sqft.model.targets import Target, decoder_blocks, skeleton
from sqft.model.uses import StandIn, text_model
from sqft.progress import progress
from sqft.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from sqft.core.statistics import Statistics
    from sqft.errors import Problems

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_SHARE = 0.5  # of a card's free memory, for the hidden states of all sequences


def check_tokens(tokens: torch.Tensor, network: Any, problems: Problems) -> None:
    """Add what calibration tokens would fail with in the middle of the work."""
    config = network.config.get_text_config(decoder=True)
    if tokens.numel() == 0:
        problems.add("there are no calibration tokens; give data with text in it")
    else:
        if len(tokens) < processes.count():
            problems.add(
                f"calibration has {len(tokens)} samples, which {processes.count()} processes cannot share; start "
                "fewer, or take more samples"
            )
        rows, largest = embedding_rows(network), int(tokens.max())
        if largest >= rows:
            problems.add(
                f"the calibration text has token {largest}, and the model's embedding {rows} rows: the tokenizer has "
                "tokens that the model never learned; resize the embedding (model.resize_token_embeddings) and save "
                "the model, or take the tokenizer that it came with"
            )
    if getattr(config, "num_kv_shared_layers", 0):
        problems.add(
            f"{type(network).__name__} hands keys and values from block to block, which calibration block by block "
            "does not follow; use sparsify.method magnitude and quantize.method rtn, which need no calibration"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and tokens.ndim == 2 and tokens.shape[1] > limit:
        problems.add(f"calibration.length is {tokens.shape[1]} tokens, more than the {limit} that the model allows")


def overflow_remedy(dtype: torch.dtype) -> str:
    """Return what to do about NaN or Inf in a checkpoint of this dtype."""
    if dtype == torch.float16:
        return (
            "the checkpoint is float16, and what it computes passes 65504, the largest number that float16 holds: "
            "store the model as bfloat16 or float32 (load it with dtype=torch.bfloat16 and save it)"
        )
    named = str(dtype).removeprefix("torch.")
    return f"the checkpoint is {named}, and what it computes passes what that holds: its weights are damaged"


def _rows_each(shape: torch.Size, sequences: int, heads: int) -> int:
    """Return how many rows of a tensor that a block is given belong to each sequence; 0: it is the same for all.

    ALiBi comes as [sequences * heads, 1, length] (BLOOM, Falcon) or as [heads, 1, length] for all (MPT).
    """
    if len(shape) < 2 or sequences == 1:
        return 0
    if len(shape) == 3 and shape[1] == 1 and shape[0] in (heads, sequences * heads):
        return shape[0] // sequences if shape[0] != heads else 0
    return int(shape[0] == sequences)


@dataclass(frozen=True)
class Block:
    """A decoder block in memory, as the visitor gets it.

    Attributes:
        index: position among the blocks.
        targets: its targets.
        statistics: what each target's input looked like, by target.
        names: for reading and writing on-disk tensors.
        prefix: the block's name.
    """

    index: int
    targets: list[Target]
    statistics: dict[Target, Statistics]
    names: DiskNames
    prefix: str

    @property
    def model(self) -> nn.Module:
        """The skeleton whose parameters of this block are loaded."""
        return self.names.model

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(iter(self.parameters().values())).device

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the block's parameters by name."""
        prefix = f"{self.prefix}."
        return {n: p.data for n, p in self.model.named_parameters() if n.startswith(prefix)}


Visitor = Callable[[Block], None]


@dataclass
class _Run:
    model: nn.Module
    names: DiskNames
    blocks: nn.ModuleList
    prefix: str
    real: list[nn.Module]
    targets: list[Target]
    visit: Visitor
    batch: int
    hessian: bool
    heads: int
    calibrated: bool
    device: torch.device
    advance: Callable[[int], Any]

    def process(self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefix = f"{self.prefix}.{index}"
        if index == 0:
            # Its work is done; in a model with a large vocabulary it is the largest tensor of all.
            cast("Any", self.model).get_input_embeddings().to("meta")
        stand_in, real = self.blocks[index], self.real[index]
        self.blocks[index] = real
        self.names.load(f"{prefix}.")
        real.to(self.device)
        missing = [n for n, p in real.named_parameters(prefix) if p.is_meta]
        check_complete(self.names.checkpoint.folder, missing)
        targets = [t for t in self.targets if t.module.startswith(f"{prefix}.")]
        observer = Observer({t: t.view(self.model) for t in targets}, hessian=self.hessian)
        self._forward(real, hidden, args, kwargs, observer)
        observer.forget()
        release_memory()
        if self.calibrated:
            add_up(observer.statistics)
            self._check_inputs(prefix, observer.statistics)
        self.visit(Block(index, targets, observer.statistics, self.names, prefix))
        release_memory()
        output = self._forward(real, hidden, args, kwargs)
        if self.calibrated and not finite(output[0] if isinstance(output, tuple) else output):
            raise NumericalError(
                f"block {prefix}: its output holds NaN or Inf on the calibration text, and the inputs of its linears "
                f"do not; {overflow_remedy(self.names.checkpoint.dtype)}"
            )
        real.to_empty(device="meta")
        self.blocks[index] = stand_in
        release_memory()
        self.advance(1)
        return output

    def _check_inputs(self, prefix: str, statistics: dict[Target, Statistics]) -> None:
        bad = [target.name for target, seen in statistics.items() if not finite(seen.squared_sum_I)]
        if bad:
            listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            remedy = overflow_remedy(self.names.checkpoint.dtype)
            raise NumericalError(
                f"{listed}: its inputs hold NaN or Inf on the calibration text (block {prefix}); {remedy}"
            )

    def _forward(
        self,
        block: nn.Module,
        hidden: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observer: Observer | None = None,
    ) -> Any:
        """Run all sequences through a block, `batch` at a time; return its output, in its own form.

        With an observer there is none: it ends a forward when it has seen enough.
        """
        total = hidden.shape[0]
        kept = torch.empty_like(hidden) if observer is None else None
        output: Any = None
        for start in range(0, total, self.batch):
            rows = slice(start, start + self.batch)

            def cut(value: Any, rows: slice = rows) -> Any:
                if isinstance(value, torch.Tensor):
                    each = _rows_each(value.shape, total, self.heads)
                    part = value[rows.start * each : rows.stop * each] if each else value
                    return part.to(self.device)
                if isinstance(value, tuple):
                    return tuple(cut(item) for item in value)
                if isinstance(value, dict):
                    return {name: cut(item) for name, item in value.items()}
                return value

            with suppress(AllSeen), observer or nullcontext(), fast_products(block):
                output = block(hidden[rows].to(self.device), *cut(args), **cut(kwargs))
            if kept is not None:
                kept[rows] = output[0] if isinstance(output, tuple) else output
        return (kept, *output[1:]) if isinstance(output, tuple) else kept


def _home(model: Any, tokens: int, device: torch.device) -> torch.device:
    """Return where the hidden states of all tokens lie: a block's input and output, and the embeddings."""
    free = free_bytes(device)
    if free is None:
        return _CPU
    width = model.config.get_text_config(decoder=True).hidden_size
    return _CPU if 3 * tokens * width * model.dtype.itemsize > _SHARE * free else device


def _move(model: nn.Module, prefix: str, device: torch.device) -> None:
    """Move what of a skeleton lies outside its blocks, and has data."""
    for name, module in model.named_modules():
        if f"{name}.".startswith(f"{prefix}."):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                module.register_parameter(key, nn.Parameter(parameter.to(device), requires_grad=False))
        for key, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module.register_buffer(key, buffer.to(device), key not in module._non_persistent_buffers_set)


@torch.no_grad()
def visit_blocks(
    folder: Path,
    targets: list[Target],
    tokens: torch.Tensor | None,
    visit: Visitor,
    *,
    batch: int,
    hessian: bool,
    device: torch.device = _CPU,
    trust_remote_code: bool = False,
) -> None:
    """Call `visit` on every decoder block, in order, with the statistics of its targets' inputs.

    What the visitor writes into the targets' views is what later blocks see. Several processes run samples of their
    own and visit with the statistics of all; they must leave the same weights.

    Args:
        folder: the model folder; tensors are read from it block by block.
        targets: from :func:`sqft.model.targets.find_targets`.
        tokens: calibration tokens, int64 [samples, length]; None where no statistics of inputs are needed.
        visit: called once a block.
        batch: sequences run at a time.
        hessian: whether the statistics hold second-order information.
        device: where a block runs and is visited, its weights and statistics with it.
        trust_remote_code: passed to transformers.

    Raises:
        NumericalError: NaN or Inf in the activations of calibration text; names the linears or the block.
    """
    model = skeleton(folder, experts_one_by_one=True, trust_remote_code=trust_remote_code)
    names = DiskNames(model, Checkpoint(folder))
    prefix, blocks = decoder_blocks(model)
    head = model.get_output_embeddings()
    names.load("", exclude=tuple([f"{prefix}."] + [f"{n}." for n, m in model.named_modules() if m is head]))
    model.tie_weights()
    bar = progress(len(blocks), "compressing", "block") if processes.first() else nullcontext(lambda _: None)
    with bar as advance:
        heads = getattr(model.config.get_text_config(decoder=True), "num_attention_heads", 0)
        real = list(blocks)
        calibrated = tokens is not None
        run = _Run(
            model, names, blocks, prefix, real, targets, visit, batch, hessian, heads, calibrated, device, advance
        )
        # The language-model head is not run: only the blocks matter, and its logits would be the largest tensor of all.
        body = text_model(model, blocks)
        for index, block in enumerate(real):
            blocks[index] = StandIn(block, partial(run.process, index))
        given = torch.zeros(1, 1, dtype=torch.long) if tokens is None else tokens[processes.share(len(tokens))]
        home = _home(model, given.numel(), device)
        _move(model, prefix, home)
        body(input_ids=given.to(home), use_cache=False)
