"""What test_crashes.py kills: run by a process of its own, which forks for every kill.

Arguments: WORK ROOT [STRIDE]; prints {"kills": how many}. `stage`, `resumed_stage` and `result` are the mechanism
alone; the others are the real stages on a tiny model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from crashes import Work, kill_everywhere
from sqft.artifact import describe, reuse, writing
from sqft.context import Context
from sqft.stage import reuse_result, write_result


def _source(folder: Path) -> dict[str, Path]:
    return {"model": folder.parent.parent / "source"}


def stage(folder: Path) -> None:
    """A stage that begins anew after a kill."""
    description = describe("stage", {"a": 1}, _source(folder), 0)
    if reuse(folder / "made", description):
        return
    with writing(folder / "made", description) as draft:
        for name in ("one.safetensors", "two.safetensors"):
            (draft.path / name).write_bytes(name.encode())
        draft.result = {"found": 2}


def resumed_stage(folder: Path) -> None:
    """A stage that goes on from its checkpoints."""
    description = describe("stage", {"a": 1}, _source(folder), 0)
    if reuse(folder / "made", description):
        return
    with writing(folder / "made", description) as draft:
        draft.checkpoints.mkdir(exist_ok=True)
        for step in range(3):
            done = draft.checkpoints / f"{step}.done"
            if not done.exists():
                (draft.checkpoints / f"{step}.part").write_bytes(b"step")
                os.rename(draft.checkpoints / f"{step}.part", done)
        (draft.path / "one.safetensors").write_bytes(b"".join(p.read_bytes() for p in draft.checkpoints.glob("*.done")))
        (draft.path / "sqft" / "log.txt").write_text("log")


def result(folder: Path) -> None:
    """A JSON result beside an earlier one."""
    description = describe("verify", {}, _source(folder), 0)
    for name in ("one.json", "two.json"):
        if reuse_result(folder / name, description) is None:
            write_result(folder / name, description, {"passed": True})
        assert json.loads((folder / name).read_text())["passed"]


def damaged_order(folder: Path) -> None:
    """Work that takes a file for whole because it is there: what kill_everywhere must find."""
    if not (folder / "made.bin").exists():
        (folder / "made.bin").write_bytes(b"content")


def _model(folder: Path) -> Path:
    return folder.parent.parent / "model"


def _pairs() -> list[tuple[str, str]]:
    return [(f"{a} + {b} =", f" {a + b}") for a in range(4) for b in range(4)]


def _base(folder: Path) -> Path:
    """Return a quantised sparse base, made once."""
    from sqft.recipe import QuantizeConfig, SparsifyConfig
    from sqft.stages import quantize

    config = QuantizeConfig(method="rtn", group_size=16)
    base = folder.parent.parent / "base"
    quantize.run(config, _model(folder), None, base, Context(), sparsify=SparsifyConfig(method="magnitude"))
    return base


def _finetuned(folder: Path, out: Path) -> Path:
    from sqft.recipe import FinetuneConfig
    from sqft.stages import finetune

    config = FinetuneConfig(
        kind="quantized", ranks=[4, 2], lora_alpha=8, max_steps=3, length=64, batch=2, save_every=1,
        learning_rate=0.02, target_modules=["q_proj", "up_proj"],
    )  # fmt: skip
    finetune.run(config, _base(folder), _pairs(), [], out, Context(), data={})
    return out


def teacher(folder: Path) -> None:
    """PEFT's merge of an adapter, written in place of a copy."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from sqft.stages import teacher as stage_

    adapter = folder.parent.parent / "lora"
    if not adapter.exists():
        network = AutoModelForCausalLM.from_pretrained(_model(folder), dtype="auto")
        settings = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(network, settings).save_pretrained(adapter)
    made = stage_.run(_model(folder), adapter, "model", folder / "teacher", Context())
    assert made.manifest["result"]["tensors_changed"] == 4


def sparsify(folder: Path) -> None:
    """Pruning, written in place of a copy."""
    from sqft.recipe import SparsifyConfig
    from sqft.stages import sparsify as stage_

    stage_.run(SparsifyConfig(method="magnitude"), _model(folder), None, folder / "sparse", Context())


def quantize(folder: Path) -> None:
    """Quantising, written into files laid out before."""
    from sqft.recipe import QuantizeConfig, SparsifyConfig
    from sqft.stages import quantize as stage_

    config = QuantizeConfig(method="rtn", group_size=16)
    stage_.run(config, _model(folder), None, folder / "int4", Context(), sparsify=SparsifyConfig(method="magnitude"))


def finetune(folder: Path) -> None:
    """Training with a checkpoint at every step."""
    _finetuned(folder, folder / "adapter")


def search(folder: Path) -> None:
    """A search whose study is a file that grows."""
    from sqft.data.tasks import Example, Task
    from sqft.recipe import SearchConfig
    from sqft.stages import extract as stage_

    adapter = _finetuned(folder, folder.parent.parent / "adapter")
    rows = [(Task("sums", "exact"), [Example(*pair) for pair in _pairs()[:3]])]
    config = SearchConfig(strategy="hill_climbing", turns=1, neighbours=2, samples=3)
    stage_.run(config, adapter, folder / "sub", Context(), base=_base(folder), rows=rows)


def merge(folder: Path) -> None:
    """Extracting, merging, and the proof."""
    from sqft.recipe import MergeConfig, SearchConfig, VerifyConfig
    from sqft.stages import extract as extracting
    from sqft.stages import merge as merging
    from sqft.stages import verify

    adapter, base = _finetuned(folder, folder.parent.parent / "adapter"), _base(folder)
    extracting.run(SearchConfig(), adapter, folder / "sub", Context())
    merging.run(MergeConfig(), base, folder / "sub", folder / "merged", Context())
    proof = verify.run(
        VerifyConfig(prompts=1), folder / "merged", base, folder / "sub", folder / "verify.json", Context()
    )
    assert proof["passed"]


def _prepare_model(places: Path) -> None:
    import torch

    import conftest

    torch.set_num_threads(1)
    tokenizer = conftest.build_tokenizer()
    conftest.build_model("llama", torch.bfloat16, tokenizer).save_pretrained(places / "model")
    tokenizer.save_pretrained(places / "model")


REAL = (teacher, sparsify, quantize, finetune, search, merge)
WORKS: dict[str, Work] = {work.__name__: work for work in (stage, resumed_stage, result, damaged_order, *REAL)}


def main(arguments: list[str]) -> None:
    """Kill one work everywhere."""
    name, root, *more = arguments
    places = Path(root)
    (places / "source").mkdir()
    (places / "source" / "weights").write_bytes(b"12345")
    (places / "kills").mkdir()
    if WORKS[name] in REAL:
        _prepare_model(places)
    print(json.dumps({"kills": kill_everywhere(WORKS[name], places / "kills", every=int(more[0]) if more else 1)}))


if __name__ == "__main__":
    main(sys.argv[1:])
