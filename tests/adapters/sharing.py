"""What two processes of test_frozen.py run: masked and quantised adapters shared by DDP, and by FSDP2, on the CPU.

torchrun --nproc-per-node 2 sharing.py KIND FOLDER
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sqft import SqftConfig, load_model
from sqft.adapters.layers import sqft_layers

PROMPT = torch.arange(40).view(2, 20)
FROZEN = ("mask_packed", "start_bytes")


def adapted(kind: str, folder: str, *, checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    config = SqftConfig(task_type="CAUSAL_LM", kind=kind, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(load_model(folder, packed=kind == "quantized"), config).train()
    for layer in sqft_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def results(model: Any) -> list[torch.Tensor]:
    """Return the logits and the adapters' gradients."""
    found = model(input_ids=PROMPT, labels=PROMPT)
    found.loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [found.logits.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def frozen(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if name.endswith(FROZEN)}


def main(kind: str, folder: str) -> None:
    distributed.init_process_group("gloo")
    wanted = results(adapted(kind, folder))
    assert len(wanted) == 1 + 2 * 4

    model = adapted(kind, folder)
    if distributed.get_rank() == 1:  # it gets what the first process has, masks and starts too
        for parameter in frozen(model).values():
            parameter.data.zero_()
    replicated = DistributedDataParallel(model)
    assert same(results(replicated), wanted)

    for checkpointing in (False, True):
        model = adapted(kind, folder, checkpointing=checkpointing)
        whole = {name: p.numel() for name, p in frozen(model).items()}
        assert len(whole) == (8 if kind == "quantized" else 4)
        mesh = init_device_mesh("cpu", (2,))
        for module in (*model.base_model.model.model.layers, model):
            fully_shard(module, mesh=mesh)
        assert all(2 * p.to_local().numel() == whole[name] for name, p in frozen(model).items())
        assert same(results(model), wanted)

    distributed.barrier()
    del replicated
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
