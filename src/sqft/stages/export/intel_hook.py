"""Run by the exporter's Python, not by ours: optimum-intel writes an OpenVINO folder, and OpenVINO reads it back.

    python intel_hook.py JOB.json

optimum-intel decompresses a packed model before it traces it. Two of transformers' and compressed-tensors' functions
are emptied, so that the packed integers reach OpenVINO, whose frontend makes them 4-bit constants. These are internals
of theirs, which are therefore pinned. Only what they have is imported here.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

_FOUR_BITS = ("u4", "i4")
_FLOATS = ("f32", "f16", "bf16", "f64")
# Nothing is rounded: neither activations to 8 bits, nor products or the cache to 16.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def convert(model: str, out: str) -> None:
    """Write the folder, its 4-bit weights as they are and all else in float32."""
    from compressed_tensors.compressors import ModelCompressor
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    quantizer: Any = CompressedTensorsHfQuantizer
    quantizer._process_model_after_weight_loading = lambda _self, model, **_more: model
    if hasattr(ModelCompressor, "add_decompress_hook"):
        ModelCompressor.add_decompress_hook = lambda *_arguments, **_more: None
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    task, config = "text-generation-with-past", OVConfig(dtype="fp32")
    main_export(model, output=out, task=task, ov_config=config, convert_tokenizer=False)


def read(file: str) -> dict[str, Any]:
    """Return what a file holds: its linears' parts by name, other integer constants' names, and float constants."""
    import openvino

    model = openvino.Core().read_model(file)  # kept: without it its nodes lose their neighbours
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    linears, used = {}, set()
    for node in constants:
        name = node.get_friendly_name()
        if _kind(node) in _FOUR_BITS and name.endswith(".weight_packed"):
            parts = {"codes": node, **_grid(node)}
            used |= {part.get_friendly_name() for part in parts.values()}
            digests = {part: _digest(value) for part, value in parts.items()}
            linears[name.removeprefix("self.").replace(".weight_packed", ".weight")] = {
                **digests,
                "type": _kind(node),
                "shape": [int(n) for n in node.shape],
            }
    whole = {node.get_friendly_name() for node in constants if _kind(node) in ("u8", "i8", *_FOUR_BITS)}
    floats = {_digest(node) for node in constants if _kind(node) in _FLOATS and node.get_friendly_name() not in used}
    return {"linears": linears, "other": sorted(whole - used), "floats": sorted(floats)}


def _kind(node: Any) -> str:
    return str(node.get_element_type().get_type_name())


def _grid(codes: Any) -> dict[str, Any]:
    """Return the constants of scales and zero points with which the graph makes weights of these codes."""
    found: dict[str, Any] = {}
    node = codes
    while True:
        (target,) = node.output(0).get_target_inputs()
        previous, node = node, target.get_node()
        kind = node.get_type_name()
        if kind == "MatMul" and not node.get_attributes()["transpose_b"]:
            return found
        part = {"Subtract": "zeros", "Multiply": "scales"}.get(kind)
        if part and part not in found and "scales" not in found:
            found[part] = _constant(node, previous)
        elif kind not in ("Convert", "Reshape"):
            raise ValueError(
                f"{codes.get_friendly_name()}: the graph has {kind} where s * (q - z) is made of its codes"
            )


def _constant(node: Any, first: Any) -> Any:
    """Return the constant that is a node's second input."""
    left, right = (value.get_source_output().get_node() for value in node.inputs())
    if left.get_friendly_name() != first.get_friendly_name():
        raise ValueError(f"{node.get_friendly_name()}: the codes are not its first input")
    while right.get_type_name() == "Convert":
        right = right.inputs()[0].get_source_output().get_node()
    if right.get_type_name() != "Constant":
        raise ValueError(f"{node.get_friendly_name()}: its second input is no constant")
    return right


def _digest(node: Any) -> str:
    """Return the SHA-256 of a constant: uint8 counted from the grid's lowest value, or float32."""
    data, kind = node.data, _kind(node)
    if kind in _FOUR_BITS:
        packed = data.reshape(-1).view(np.uint8)
        values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(list(node.shape)))]
        data = values if kind == "u4" else values ^ 8  # two's complement of -8 to 7
    elif kind in _FLOATS:
        data = data.astype(np.float32)
    return sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


def logits(folder: str, sequences: list[list[int]]) -> np.ndarray:
    """Return logits, float32 [tokens, V]; those of the last sequence token by token, through the cache."""
    import torch
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(folder, device="CPU", ov_config=_EXACT)
    found, past = [], None
    for tokens in sequences[:-1]:
        ids = torch.tensor([tokens])
        found.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0])
    for length, token in enumerate(sequences[-1], start=1):
        mask = torch.ones(1, length, dtype=torch.long)
        answer = model(input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=past)
        past = answer.past_key_values
        found.append(answer.logits[0])
    values: np.ndarray = torch.cat(found).float().numpy()
    return values


def main(job: dict[str, Any]) -> None:
    """Convert a folder, or read one back."""
    if "model" in job:
        convert(job["model"], job["out"])
        return
    found = read(str(Path(job["folder"], "openvino_model.xml")))
    Path(job["found"]).write_text(json.dumps(found))
    np.save(job["logits"], logits(job["folder"], job["sequences"]))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
