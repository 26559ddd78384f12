"""A model folder's network of which one decoder block is in memory at a time, or the embeddings, or the output layer.

It computes what :func:`sqft.model.load.open_model` would: transformers' own classes, conversions and decompression, or
packed linears, sequence by sequence. A pass reads every block once for all sequences, whose hidden states wait
(:mod:`sqft.model.lockstep`). No keys and values are kept.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sqft.errors import SqftError
from sqft.memory import is_out_of_memory, release_memory
from sqft.model.load import embedding_rows
from sqft.model.lockstep import Forward, run_parts, stop_at
from sqft.model.names import DiskNames
from sqft.model.opening import check_complete, hide_bars_of_compressed_tensors
from sqft.model.packed import PackedLinear
from sqft.model.targets import decoder_blocks, skeleton
from sqft.model.uses import StandIn
from sqft.progress import progress
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.integers import quantization_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    Adapt = Callable[[PreTrainedModel, str], None]


class NotBlockwise(Exception):
    """A model cannot be run block by block; says why."""


class BlockwiseModel:
    """A folder's causal language model that answers sequences block by block.

    Attributes:
        network: its skeleton, with stand-ins for the blocks and the output layer.
        prefix: the name of the list of blocks.
        rows: how many tokens it has an embedding for.
        dtype: of its first parameter.
    """

    def __init__(
        self,
        folder: Path,
        *,
        packed: bool = False,
        adapt: Adapt | None = None,
        widened: torch.dtype | None = None,
        device: torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Read what there is, and no weights.

        Args:
            folder: the model folder.
            packed: keep quantised weights packed, as in :func:`sqft.model.load.open_model`.
            adapt: called with the network and a block's name when the block's weights have been read.
            widened: what floats are cast to when they have been read.
            device: where it computes.
            trust_remote_code: passed to transformers.

        Raises:
            InputError: the folder has no model.
            NotBlockwise: its blocks share weights, or its output layer cannot be told apart.
        """
        self.folder, self._adapt, self._widened = folder, adapt, widened
        self._device = device or torch.device("cpu")
        self.network = skeleton(folder, trust_remote_code=trust_remote_code)
        self.prefix, blocks = decoder_blocks(self.network)
        self._embedding, self._head, self._tied = _ends(self.network, blocks)
        self._decompress = _prepare(folder, self.network, packed=packed)
        checkpoint, quantizer = Checkpoint(folder), getattr(self.network, "hf_quantizer", None)
        dtypes = self.network._get_dtype_plan(checkpoint.dtype)
        self._names = DiskNames(self.network, checkpoint, quantizer=quantizer, dtypes=dtypes)
        self.rows, self.dtype = embedding_rows(self.network), next(self.network.parameters()).dtype
        names = [f"{self.prefix}.{index}" for index in range(len(blocks))]
        self._empty = {name: self.network.get_submodule(name) for name in (*names, self._head)}
        self._stand_ins = {name: StandIn(part, stop_at(name)) for name, part in self._empty.items()}
        for name, stand_in in self._stand_ins.items():
            self.network.set_submodule(name, stand_in)

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """Run the blocks; return an iterator that runs the output layer, sequence by sequence.

        Args:
            sequences: token ids.

        Returns:
            Logits [tokens, vocabulary] of each sequence, on the CPU.

        Raises:
            InputError: weights are missing or have other shapes.
            NotBlockwise: its forward does not run with stand-ins.
        """
        self._read("", exclude=tuple(f"{name}." for name in self._empty))
        self.network._apply(self._placed)
        forwards = [Forward(lambda ids=ids: self._forward(ids)) for ids in sequences]  # type: ignore[misc]
        try:
            for forward in forwards:
                forward.go_on()
            self.network.get_submodule(self._embedding).to("meta")
            with progress(len(self._empty) - 1, "verifying", "block") as self._advance:
                run_parts(forwards, self._opened, self._head)
        except BaseException as error:
            _drop(forwards)
            if isinstance(error, SqftError) or not isinstance(error, Exception) or is_out_of_memory(error):
                raise
            raise NotBlockwise(f"its forward does not run in parts ({type(error).__name__}: {error})") from error
        return self._answers(forwards)

    def _answers(self, forwards: list[Forward]) -> Iterator[torch.Tensor]:
        try:
            with self._opened(self._head) as head:
                for forward in forwards:
                    while forward.part is not None:
                        forward.through(head)
                    yield forward.result
                    forward.result = None
        finally:
            _drop(forwards)

    def _forward(self, ids: Sequence[int]) -> torch.Tensor:
        given = torch.tensor([ids], device=self._device)
        logits: torch.Tensor = cast("Any", self.network)(input_ids=given, use_cache=False).logits
        return logits[0].cpu()

    @contextmanager
    def _opened(self, name: str) -> Iterator[nn.Module]:
        """Give a block or the output layer with its weights."""
        part = copy.deepcopy(self._empty[name])
        self.network.set_submodule(name, part)
        try:
            self._read(name)
            if self._adapt is not None and name != self._head:
                self._adapt(self.network, name)
                part.eval()
        finally:
            self.network.set_submodule(name, self._stand_ins[name])
        part._apply(self._placed)
        yield part
        part.to("meta")  # a part that refers to itself, as decompressed ones do, would keep its weights for a while
        release_memory()
        if name != self._head:
            self._advance(1)

    def _read(self, name: str, *, exclude: tuple[str, ...] = ()) -> None:
        """Read the weights of a part; '' is what is no part."""
        part = self.network.get_submodule(name)
        shapes = {key: parameter.shape for key, parameter in part.named_parameters(name)}
        if name == self._head and self._tied:
            embedding = self.network.get_submodule(self._embedding)
            self._names.load(f"{self._embedding}.")
            part.weight, _ = embedding.weight, embedding.to("meta")
        self._names.load(f"{name}." if name else "", exclude=exclude)
        found = dict(part.named_parameters(name))
        # What is to be decompressed has shapes of its own, which whoever decompresses it checks.
        fits = {key: self._decompress is not None or found[key].shape == shape for key, shape in shapes.items()}
        wrong = [key for key, fit in fits.items() if found[key].is_meta or not fit]
        check_complete(self.folder, wrong)
        for module in part.modules():
            if isinstance(module, PackedLinear):
                module.folder = self.folder
        if self._decompress is not None:
            self._decompress(part)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        return tensor.to(self._device, self._widened if tensor.is_floating_point() else None)


def _drop(forwards: list[Forward]) -> None:
    for forward in forwards:
        forward.drop()


def _ends(network: PreTrainedModel, blocks: nn.ModuleList) -> tuple[str, str, bool]:
    """Return the names of the embedding and of the output layer, and whether they are tied.

    Raises:
        NotBlockwise: there is no output layer, or weights are shared that are read apart.
    """
    embedding, head = cast("Any", network).get_input_embeddings(), network.get_output_embeddings()
    names = {module: name for name, module in network.named_modules()}
    if head is None or embedding is None or head not in names:
        raise NotBlockwise("it has no output layer of its own")
    tied = head.weight is embedding.weight
    count: dict[int, int] = {}
    for part in (*blocks, head, embedding):
        for parameter in part.parameters():
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    shared = [key for key, uses in count.items() if uses > 1 and not (tied and key == id(head.weight))]
    if shared or any(module is head for module in blocks.modules()):
        raise NotBlockwise("its blocks share weights")
    return names[embedding], names[head], tied


def _prepare(folder: Path, network: PreTrainedModel, *, packed: bool) -> Callable[[nn.Module], None] | None:
    """Let a quantised folder's quantiser change the skeleton; return what decompresses a part that was read."""
    stored = quantization_config(folder)
    if stored is None:
        return None
    checkpoint_files = [str(folder / "model.safetensors")]
    if packed or stored.get("quant_method") == "gptq":
        from sqft.model.quantizer import PackedConfig, PackedQuantizer

        quantizer: Any = PackedQuantizer(PackedConfig(), pre_quantized=True)
    else:
        from transformers.quantizers.auto import AutoHfQuantizer

        hide_bars_of_compressed_tensors()
        quantizer = AutoHfQuantizer.from_config(stored, pre_quantized=True)
        quantizer.validate_environment()
    with torch.device("meta"):
        quantizer.preprocess_model(network, checkpoint_files=checkpoint_files)
    cast("Any", network).hf_quantizer = quantizer
    compressor = getattr(quantizer, "compressor", None)
    if compressor is None:
        return None
    compressor.remove_decompression_hook(network)  # it would decompress all that it finds on the first forward
    return _decompress


def _decompress(part: nn.Module) -> None:
    """Decompress as compressed-tensors does on a model's first forward, without its offloading."""
    from compressed_tensors.compressors.base import decompress_module

    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            decompress_module(module)
