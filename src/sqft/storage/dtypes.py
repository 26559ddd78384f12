"""The dtypes of a safetensors header, and one tensor read from its place in a file."""

from __future__ import annotations

from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_tensor(file: Path, dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """Return the tensor that lies in a file's bytes `start:stop`, in memory of its own.

    safetensors' own reader parses the whole header at each opening, which takes longer than a small tensor.

    Raises:
        OSError: the file cannot be read, or ends before.
    """
    data = torch.empty(stop - start, dtype=torch.uint8)
    with open(file, "rb") as stream:
        stream.seek(start)
        found = stream.readinto(data.numpy().data)
    if found != stop - start:
        raise OSError(f"{file} ends {stop - start - found} bytes before its tensor does")
    return data.view(dtype).view(shape)
