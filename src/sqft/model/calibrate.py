"""Run calibration text through a model one decoder block at a time, never holding more than a block.

The model's own forward drives: each block is replaced by a stand-in that, when called, reads the block's weights from
disk, runs the calibration sequences through it while it records what every target's input looks like, lets the visitor
change the weights, runs the sequences again so that later blocks see the change, and drops the block. Attention masks,
position tables and whatever else a model passes to its blocks are therefore the model's own.

Inputs are observed where they are used: a torch-function mode watches every matrix product and recognises a target by
the storage of its weight. That covers nn.Linear, Conv1D and the slices of fused experts with one mechanism.

Memory: a block, the hidden states of all sequences three times (a block's input and output, and the embeddings, which
the model's own forward holds to its end), the statistics, and the activations of `batch` sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sqft.core.statistics import Statistics
from sqft.memory import release_memory
from sqft.model.checkpoint import Checkpoint
from sqft.model.load import check_complete
from sqft.model.targets import DiskNames, Target, decoder_blocks, skeleton
from sqft.progress import progress

if TYPE_CHECKING:
    from pathlib import Path

    from sqft.errors import Problems

logger = logging.getLogger(__name__)

_PRODUCTS = {
    nn.functional.linear: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.addmm: (1, 2),
    torch.Tensor.addmm: (1, 2),
}
"""Matrix products: positions of the input and of the weight among the arguments."""


class _Observer(TorchFunctionMode):
    """Adds the inputs of every product with a target's weight to that target's statistics.

    Targets that are given the very same tensor (q, k and v; gate and up) share one set of statistics: the first of
    them collects, the others point to it.
    """

    def __init__(self, weights: dict[Target, torch.Tensor], *, hessian: bool) -> None:
        super().__init__()
        self.statistics = {t: Statistics.empty(w.shape[1], hessian=hessian) for t, w in weights.items()}
        self._targets = {_identity(w): t for t, w in weights.items()}
        self._last: tuple[torch.Tensor, Statistics] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        positions = _PRODUCTS.get(func)
        if positions is not None and len(args) > positions[1] and isinstance(args[positions[1]], torch.Tensor):
            target = self._targets.get(_identity(args[positions[1]]))
            if target is not None:
                self._see(target, args[positions[0]])
        return func(*args, **(kwargs or {}))

    def forget(self) -> None:
        """Let go of the last input, which is as large as any activation."""
        self._last = None

    def _see(self, target: Target, x: torch.Tensor) -> None:
        if self._last is not None and self._last[0] is x:
            shared, own = self._last[1], self.statistics[target]
            if own is shared:
                return
            if own.tokens == 0:
                self.statistics[target] = shared
                return
        with torch._C.DisableTorchFunction():
            self.statistics[target].add(x.detach().reshape(-1, x.shape[-1]))
        self._last = (x, self.statistics[target])


def check_tokens(tokens: torch.Tensor, network: Any, problems: Problems) -> None:
    """Add what calibration tokens would fail with in the middle of the work."""
    if tokens.numel() == 0:
        problems.add("there are no calibration tokens; give data with text in it")
    if getattr(network.config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        problems.add(
            f"{type(network).__name__} hands keys and values from block to block, which calibration block by block "
            "does not follow; use sparsify.method magnitude and quantize.method rtn, which need no calibration"
        )
    limit = getattr(network.config, "max_position_embeddings", None)
    if limit is not None and tokens.ndim == 2 and tokens.shape[1] > limit:
        problems.add(f"calibration.length is {tokens.shape[1]} tokens, more than the {limit} that the model allows")


def _rows_each(shape: torch.Size, sequences: int, heads: int) -> int:
    """Return how many rows of a tensor that a block is given belong to each sequence; 0: it is the same for all.

    ALiBi comes as [sequences * heads, 1, length] (BLOOM, Falcon) or as [heads, 1, length] for all (MPT).
    """
    if len(shape) < 2 or sequences == 1:
        return 0
    if len(shape) == 3 and shape[1] == 1 and shape[0] in (heads, sequences * heads):
        return shape[0] // sequences if shape[0] != heads else 0
    return int(shape[0] == sequences)


def _identity(weight: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return weight.data_ptr(), tuple(sorted(weight.shape))


@dataclass(frozen=True)
class Block:
    """A decoder block in memory, as the visitor meets it.

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

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the block's parameters by name."""
        prefix = f"{self.prefix}."
        return {n: p.data for n, p in self.model.named_parameters() if n.startswith(prefix)}


Visitor = Callable[[Block], None]


class _StandIn(nn.Module):
    """Takes a block's place; see the module."""

    def __init__(self, block: nn.Module, index: int, run: _Run) -> None:
        super().__init__()
        # Hidden from nn.Module, so that the model does not see the block twice.
        object.__setattr__(self, "block", block)
        self.index = index
        object.__setattr__(self, "run", run)

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes of their blocks (attention_type, layer_type).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "run").process(self.index, hidden, args, kwargs)


@dataclass
class _Run:
    model: nn.Module
    names: DiskNames
    blocks: nn.ModuleList
    prefix: str
    targets: list[Target]
    visit: Visitor
    batch: int
    hessian: bool
    heads: int
    advance: Callable[[int], Any]

    def process(self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefix = f"{self.prefix}.{index}"
        if index == 0:
            # Its work is done; in a model with a large vocabulary it is the largest tensor of all.
            cast("Any", self.model).get_input_embeddings().to("meta")
        stand_in, real = self.blocks[index], object.__getattribute__(self.blocks[index], "block")
        self.blocks[index] = real
        self.names.load(f"{prefix}.")
        missing = [n for n, p in real.named_parameters(prefix) if p.is_meta]
        check_complete(self.names.checkpoint.folder, missing)
        targets = [t for t in self.targets if t.module.startswith(f"{prefix}.")]
        observer = _Observer({t: t.view(self.model) for t in targets}, hessian=self.hessian)
        self._forward(real, hidden, args, kwargs, observer, keep=False)
        observer.forget()
        release_memory()
        self.visit(Block(index, targets, observer.statistics, self.names, prefix))
        release_memory()
        output = self._forward(real, hidden, args, kwargs, None, keep=True)
        real.to_empty(device="meta")
        self.blocks[index] = stand_in
        release_memory()
        self.advance(1)
        return output

    def _forward(
        self,
        block: nn.Module,
        hidden: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observer: _Observer | None,
        *,
        keep: bool,
    ) -> Any:
        """Run all sequences through a block, `batch` at a time; with `keep`, return its output, in its own form."""
        total = hidden.shape[0]
        kept = torch.empty_like(hidden) if keep else None
        output: Any = None
        for start in range(0, total, self.batch):
            rows = slice(start, start + self.batch)

            def cut(value: Any, rows: slice = rows) -> Any:
                if isinstance(value, torch.Tensor):
                    each = _rows_each(value.shape, total, self.heads)
                    return value[rows.start * each : rows.stop * each] if each else value
                if isinstance(value, tuple):
                    return tuple(cut(item) for item in value)
                if isinstance(value, dict):
                    return {name: cut(item) for name, item in value.items()}
                return value

            if observer is None:
                output = block(hidden[rows], *cut(args), **cut(kwargs))
            else:
                with observer:
                    output = block(hidden[rows], *cut(args), **cut(kwargs))
            if kept is not None:
                kept[rows] = output[0] if isinstance(output, tuple) else output
        return (kept, *output[1:]) if isinstance(output, tuple) else kept


@torch.no_grad()
def visit_blocks(
    folder: Path,
    targets: list[Target],
    tokens: torch.Tensor,
    visit: Visitor,
    *,
    batch: int,
    hessian: bool,
    trust_remote_code: bool = False,
) -> None:
    """Call `visit` on every decoder block, in order, with the statistics of its targets' inputs.

    What the visitor writes into the targets' views is what later blocks see.

    Args:
        folder: the model folder; tensors are read from it block by block.
        targets: from :func:`sqft.model.targets.find_targets`.
        tokens: calibration tokens, int64 [samples, length].
        visit: called once a block.
        batch: sequences run at a time.
        hessian: whether the statistics hold second-order information.
        trust_remote_code: passed to transformers.
    """
    model = skeleton(folder, experts_one_by_one=True, trust_remote_code=trust_remote_code)
    names = DiskNames(model, Checkpoint(folder))
    prefix, blocks = decoder_blocks(model)
    head = model.get_output_embeddings()
    names.load("", exclude=tuple([f"{prefix}."] + [f"{n}." for n, m in model.named_modules() if m is head]))
    model.tie_weights()
    # The language-model head is not run: only the blocks matter, and its logits would be the largest tensor of all.
    with progress(len(blocks), "compressing", "block") as advance:
        heads = getattr(model.config, "num_attention_heads", 0)
        run = _Run(model, names, blocks, prefix, targets, visit, batch, hessian, heads, advance)
        for index, block in enumerate(list(blocks)):
            blocks[index] = _StandIn(block, index, run)
        model.base_model(input_ids=tokens, use_cache=False)
