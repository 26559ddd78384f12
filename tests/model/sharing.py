"""What two processes of test_quantizer.py run: a packed model shared by DDP, and by FSDP2, on the CPU.

torchrun --nproc-per-node 2 sharing.py FOLDER
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from sqft import packed_config

PROMPT = torch.arange(40).view(2, 20)


def opened(folder: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=packed_config(folder))
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


def results(model: Any) -> list[torch.Tensor]:
    """Return the logits and the gradient of the embeddings."""
    found = model(input_ids=PROMPT, labels=PROMPT)
    found.loss.backward()
    (grad,) = [p.grad for p in model.parameters() if p.requires_grad]
    return [found.logits.detach(), grad.full_tensor() if hasattr(grad, "full_tensor") else grad]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def main(folder: str) -> None:
    distributed.init_process_group("gloo")
    wanted = results(opened(folder))

    model = opened(folder)
    if distributed.get_rank() == 1:  # it gets what the first process has, codes and scales too
        for parameter in model.parameters():
            parameter.data.zero_()
    replicated = DistributedDataParallel(model)
    assert same(results(replicated), wanted)

    model = opened(folder)
    whole = {name: p.numel() for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    codes = {name: p for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert codes
    assert all(2 * p.to_local().numel() == whole[name] for name, p in codes.items())
    assert same(results(model), wanted)

    distributed.barrier()
    del replicated
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
