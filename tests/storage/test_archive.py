"""The bytes of an archive are a format: what was written once is written again, by the kernel and by PyTorch."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.kernels import build
from sqft.kernels import sparse as kernel
from sqft.stages.pack import pack, unpack
from sqft.storage.dtypes import DTYPE_NAMES, read_tensor

ROWS, COLUMNS, GROUP = 16, 128, 32
WRITTEN = {
    "16 bits": "37c8884798d97f1ee6c478a28941a9ebbed6e3d54ee41499eb96630ca7a0ac98",
    "16 bits, 2:4": "6bac60f5e49ff23006d49f51b61e0d99441c275df22a5c182c75dd2bc3b91aa2",
    "INT4": "eaac71b9cdbe256fc8056fa7b10b365c68c46c30ef177faaf45ede090ba5c239",
    "INT4, 2:4": "e572cd7cabe281cf5b95d2f663d1b8e0130b676df19be806b9d33b5d3cbd5dab",
    "INT4 symmetric": "e2116970f35c78abfe3a1222282a123d91b9193ca796188a108433653332929c",
    "INT4 GPTQ": "319ea6eae5376cc86a7e2f1b7c715185ce506a45af778c10962ec81275a8c7b8",
    "INT8": "15ea8aba9fbe6a87e56f154f4db96dc2be5e84c5713f01adccf2b64e07c60340",
}
"""SHA-256 of the archives of each form, `model.packed.safetensors` and then `sqft/mask.packed.safetensors`."""


def write(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes are no library's choice."""
    header: dict[str, Any] = {"__metadata__": metadata}
    place, content = 0, b""
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + len(data)],
        }
        place, content = place + len(data), content + data
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + content)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes [R, C] as int32 words [R, C · bits / 32], the lowest bits first, by Python's integers."""
    per = 32 // bits
    starts = range(0, codes.shape[1], per)
    rows = [[sum(int(row[k + i]) << bits * i for i in range(per)) for k in starts] for row in codes.tolist()]
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in rows], dtype=torch.int32)


def folder(form: str, place: Path) -> Path:
    """Write a model folder of one weight and a norm."""
    generator = torch.Generator().manual_seed(0)
    if "2:4" in form:
        kept = torch.tensor([True, False, False, True, False, True, True, False]).repeat(ROWS, COLUMNS // 8)
    else:
        kept = torch.rand((ROWS, COLUMNS), generator=generator) < 0.5
    config: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 1}
    tensors = {"norm.weight": torch.arange(COLUMNS, dtype=torch.float32).bfloat16()}
    if form.startswith("16"):
        bits16 = torch.randint(1, 2**14, (ROWS, COLUMNS), generator=generator).to(torch.int16) * kept
        bits16[0, 0] = -(2**15)  # -0.0
        tensors["a.weight"] = bits16.view(torch.bfloat16)
        kept[0, 0] = True
        name = "a.weight"
    else:
        bits, groups = (8 if "INT8" in form else 4), COLUMNS // GROUP
        zero = torch.randint(1, 2**bits, (ROWS, groups), generator=generator)
        if "symmetric" in form:
            zero[:] = 2 ** (bits - 1)
        codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator)
        codes = torch.where(kept, codes, zero.repeat_interleave(GROUP, dim=1))
        scale = torch.ones(ROWS, groups, dtype=torch.bfloat16)
        tensors |= stored(form, bits, codes, zero, scale)
        config["quantization_config"] = quantization(form, bits)
        name = "a.weight"
    write(place / "model.safetensors", tensors, {"format": "pt"})
    packed = (kept.view(ROWS, -1, 8) << torch.arange(8)).sum(dim=2).to(torch.uint8)
    write(place / "sqft" / "mask.safetensors", {name: packed}, {name: f"{ROWS},{COLUMNS}"})
    (place / "config.json").write_text(json.dumps(config))
    return place


def stored(
    form: str, bits: int, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the tensors of a quantised weight."""
    if "GPTQ" in form:
        return {
            "a.qweight": words(codes, bits).T.contiguous(),
            "a.qzeros": words(zero.T - 1, bits),
            "a.scales": scale.T.half().contiguous(),
            "a.g_idx": torch.arange(COLUMNS, dtype=torch.int32) // GROUP,
        }
    found = {
        "a.weight_packed": words(codes, bits),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    if "symmetric" not in form:
        found["a.weight_zero_point"] = words(zero.T, bits).T.contiguous()
    return found


def quantization(form: str, bits: int) -> dict[str, Any]:
    """Return what config.json says of it."""
    if "GPTQ" in form:
        return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False, "desc_act": False}
    weights = {"num_bits": bits, "group_size": GROUP, "strategy": "group", "type": "int"}
    weights["symmetric"] = "symmetric" in form
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }


@pytest.mark.parametrize("path", ["kernel", "PyTorch"])
@pytest.mark.parametrize("form", WRITTEN)
def test_the_bytes_are_what_they_were(form: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "PyTorch":
        monkeypatch.setattr(kernel, "KERNEL", build.Kernel(lambda: "switched off", "said"))
    elif kernel.KERNEL.absence() is not None:
        pytest.skip(str(kernel.KERNEL.absence()))
    model = folder(form, tmp_path / "model")
    archive = pack(model, tmp_path / "archive").path
    found = hashlib.sha256()
    for name in ("model.packed.safetensors", "sqft/mask.packed.safetensors"):
        found.update((archive / name).read_bytes())
    assert found.hexdigest() == WRITTEN[form]
    back = unpack(archive, tmp_path / "back")
    for name in ("model.safetensors", "sqft/mask.safetensors"):
        assert (back / name).read_bytes() == (model / name).read_bytes()


def test_a_tensor_that_a_file_does_not_hold_whole_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(struct.pack("<4h", 1, 2, 3, 4))
    assert read_tensor(file, torch.int16, (2,), 2, 6).tolist() == [2, 3]
    assert read_tensor(file, torch.int16, (0, 4), 8, 8).shape == (0, 4)
    with pytest.raises(OSError, match="ends 2 bytes before"):
        read_tensor(file, torch.int16, (2,), 6, 10)
