"""Where a run computes: on the CPU, or on one CUDA device for each process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from sqft.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

DeviceName = Literal["auto", "cpu", "cuda"]
ModelT = TypeVar("ModelT", bound="nn.Module")


def resolve(name: str = "auto") -> torch.device:
    """Return the device that a name means here: `auto` is CUDA's current device where there is one, else the CPU.

    Which card is the current one, CUDA_VISIBLE_DEVICES says; of several processes each has its own.

    Raises:
        InputError: `cuda`, and there is none; says what PyTorch is built for.
    """
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}, and finds no card" if torch.version.cuda else "CPUs alone"
        raise InputError(
            f"device cuda: there is no CUDA device here; PyTorch {torch.__version__} is built for {built}. Use device: "
            "cpu, or install the build of PyTorch for your card (sqft doctor shows what is here)"
        )
    return torch.device("cuda", torch.cuda.current_device())


def device_key(device: torch.device) -> dict[str, str]:
    """Return what a stage's key says of its device: nothing of a CPU, so that results made before stay good.

    A GPU sums in another order, so what it makes of the same settings differs by rounding.
    """
    return {} if device.type == "cpu" else {"device": device.type}


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a CUDA device in bytes, None for a CPU."""
    import torch

    return None if device.type == "cpu" else int(torch.cuda.mem_get_info(device)[0])


def place(model: ModelT, device: torch.device, remedy: str) -> ModelT:
    """Move a model to a device.

    Raises:
        InputError: it does not fit; says what it takes, what is free, and `remedy`.
    """
    free = free_bytes(device)
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if free is not None and needed > free:
        raise InputError(
            f"the model takes {needed / 1e9:.3g} GB and {device} has {free / 1e9:.3g} GB free; {remedy}, or use "
            "device: cpu"
        )
    return cast("ModelT", cast("Any", model).to(device))
