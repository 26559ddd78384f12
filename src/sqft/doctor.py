"""What this machine has, what each stage would use of it, and a run of all stages on a tiny random model.

The first thing to run on a new machine, and what to paste into a report of a fault.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from sqft.core.bfloat16 import multiplies_bfloat16
from sqft.disk import read_json
from sqft.errors import SqftError
from sqft.kernels import adapt, decode, settle
from sqft.recipe import Recipe
from sqft.versions import versions

logger = logging.getLogger(__name__)

_LIBRARIES = ("compressed-tensors", "accelerate", "datasets", "trl", "optuna")
_OPTIONAL = {
    "triton": "the weights that adapters make, on a GPU",
    "flash-attn": "finetune.attention: flash_attention_2",
    "vllm": "serving; `make serving` makes an environment of its own for it",
    "tensorboard": "finetune.trackers",
}

_KERNELS = {
    "compressing": (settle, "the columns of GPTQ and SparseGPT"),
    "adapting": (adapt, "adapted weights"),
    "decoding": (decode, "packed weights"),
}
"""Of C++, by what they are for."""
_STAGES = ("sparsify", "quantize", "finetune", "search", "merge", "verify", "evaluate")


def examine() -> dict[str, Any]:
    """Return what is here, all of it JSON: versions, processor, memory, disk, gpus, optional libraries, stages."""
    here = shutil.disk_usage(Path.cwd())
    memory = psutil.virtual_memory()
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    device = "cuda:0" if gpus else "cpu"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions() | {name: _version(name) or "absent" for name in _LIBRARIES},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "multiplies_bfloat16": multiplies_bfloat16(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "disk_free_bytes": here.free,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        **{name: kernel.KERNEL.absence() for name, (kernel, _) in _KERNELS.items()},
        "compiler": shutil.which(os.environ.get("CXX", "c++")),
        "optional": {name: _version(name) for name in _OPTIONAL},
        "stages": dict.fromkeys(_STAGES, device),
    }


def self_test(announce: Callable[[str], None] = logger.info) -> dict[str, Any]:
    """Take a tiny random model through all stages, in a temporary folder, on the devices that the stages use.

    Returns:
        {passed, seconds, checks, error}: what verify found of the merged model, or why a stage ended.
    """
    from sqft import pipeline

    started = time.monotonic()
    checks: dict[str, bool] = {}
    error = None
    with tempfile.TemporaryDirectory(prefix="sqft-doctor-") as place:
        try:
            pipeline.run(_recipe(Path(place)), Path(place) / "run", announce)
            found = read_json(Path(place) / "run" / "verify.json")
            checks = {check["name"]: check["passed"] for check in found["checks"]}
            error = None if checks else "verify checked nothing"
        except SqftError as caught:
            error = str(caught)
        except Exception as caught:  # whatever it is: finding it is what this is for
            error = f"{type(caught).__name__}: {caught}"
            logger.warning("the self-test failed", exc_info=True)
    passed = error is None and all(checks.values())
    return {"passed": passed, "seconds": round(time.monotonic() - started, 1), "checks": checks, "error": error}


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what :func:`examine` found as (name, text) for a terminal."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    gpus = [
        (f"GPU {i}", f"{gpu['name']}, {_gigabytes(gpu['memory_bytes'])}, bfloat16 {'yes' if gpu['bfloat16'] else 'NO'}")
        for i, gpu in enumerate(found["gpus"])
    ]
    why = "torch sees none" if found["cuda"] else "this torch is a CPU build"
    bfloat16 = "by the processor" if found["multiplies_bfloat16"] else "in float32: no AMX and no AVX-512 BF16"
    optional = "; ".join(
        f"{name} {version or 'absent'} ({_OPTIONAL[name]})" for name, version in found["optional"].items()
    )
    users: dict[str, list[str]] = {}
    for stage, device in found["stages"].items():
        users.setdefault(device, []).append(stage)
    return [
        ("versions", libraries),
        ("system", found["system"]),
        ("processor", f"{found['processor']}, {found['cores']} cores, {found['threads']} threads of torch"),
        ("units", f"{found['vector_units']}; bfloat16 products {bfloat16}"),
        (
            "memory",
            f"{_gigabytes(found['memory_bytes'])}, of which {_gigabytes(found['memory_available_bytes'])} available",
        ),
        ("disk here", f"{_gigabytes(found['disk_free_bytes'])} free"),
        *(gpus or [("GPU", f"none: {why}")]),
        ("compiler", found["compiler"] or "none"),
        *(
            (name, f"by PyTorch: {found[name]}" if found[name] else f"by the kernel for {what}")
            for name, (_, what) in _KERNELS.items()
        ),
        ("optional", optional),
        ("stages", "; ".join(f"{device}: {', '.join(stages)}" for device, stages in users.items())),
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _processor() -> str:
    flags = _cpu_facts("model name")
    return flags or platform.processor() or platform.machine()


def _cpu_facts(name: str) -> str:
    """Return a line of Linux's /proc/cpuinfo, empty elsewhere."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(name)), "")


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        bfloat16 = torch.cuda.is_bf16_supported()
    return {"name": properties.name, "memory_bytes": properties.total_memory, "bfloat16": bfloat16}


def _recipe(place: Path) -> Recipe:
    """Write a tiny model and its data, and return the recipe of a run over them."""
    _write_model(place / "model")
    (place / "data").mkdir()
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(5) for b in range(5)]
    for split, part in {"train": rows[:16], "validation": rows[16:20], "test": rows[20:]}.items():
        (place / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    calibration = {"samples": 4, "length": 32}
    return Recipe.model_validate(
        {
            "name": "doctor",
            "model": str(place / "model"),
            "data": {"task": str(place / "data")},
            "sparsify": {"calibration": calibration},
            "quantize": {"group_size": 16, "calibration": calibration},
            "finetune": {"kind": "quantized", "ranks": [4, 2], "max_steps": 2, "length": 64, "batch": 2},
            "verify": {"prompts": 2, "accuracy_rows": 2},
            "evaluate": {"rows": ["merged"]},
        }
    )


def _write_model(folder: Path) -> None:
    """Write a random Llama of two blocks in bfloat16, with a tokenizer of one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")  # noqa: S106
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    wrapped.save_pretrained(folder)
