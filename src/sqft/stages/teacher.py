"""Teacher: the tuned dense model that a run compresses, when the user has a LoRA or a tuned model already.

An adapter is merged by PEFT itself (:mod:`sqft.adapters.stock`) and written over a copy of the dense model, so names,
sharding, tokenizer and the rest stay the model's. A tuned model is used where it lies. Either is a row of the results:
the accuracy that the compressed model is to keep.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sqft.adapters.stock import check_mergeable, merge_by_peft
from sqft.core.mask import finite
from sqft.disk import check_space
from sqft.errors import NumericalError, Problems
from sqft.model.names import DiskNames
from sqft.model.opening import load_tokenizer
from sqft.model.sources import adapter_folder, local_folder
from sqft.model.targets import skeleton
from sqft.stage import Stage
from sqft.storage.checkpoint import Checkpoint, copy_model

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from sqft.artifact import Artifact, Draft
    from sqft.context import Context
    from sqft.recipe import TeacherConfig

logger = logging.getLogger(__name__)


def locate(config: TeacherConfig | None, workspace: Path) -> Path | None:
    """Return the folder of the adapter or the tuned model that a recipe gives; None where it gives none.

    Args:
        config: what the recipe says.
        workspace: where a GGUF file is unpacked (`workspace/teacher`).

    Raises:
        InputError: it is nowhere.
    """
    if config is None or config.given is None:
        return None
    if config.adapter is not None:
        return adapter_folder(config.adapter, config.revision)
    return local_folder(config.given, workspace, config.revision, name="teacher")


def tuned_folder(config: TeacherConfig | None, dense: Path, given: Path | None) -> Path:
    """Return the folder whose tokenizer and shapes the run has: the dense model's, or a given one's in its place."""
    compressed = config is not None and config.model is not None and config.compress
    return given if compressed and given is not None else dense


def check(config: TeacherConfig, dense: Path, given: Path, reference: str, *, trust_remote_code: bool = False) -> None:
    """Refuse a teacher that is no tuned form of the dense model.

    Args:
        config: what the recipe says.
        dense: the dense model's folder.
        given: the folder of the adapter or the tuned model.
        reference: what the recipe calls the dense model.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: an adapter that PEFT does not merge into it, or a model of another shape or vocabulary.
    """
    if config.adapter is not None:
        check_mergeable(dense, given, reference, trust_remote_code=trust_remote_code)
    else:
        _check_alike(dense, given, trust_remote_code)


def run(dense: Path, adapter: Path, reference: str, out: Path, context: Context) -> Artifact:
    """Merge an adapter of any kind that PEFT merges into the dense model.

    Args:
        dense: the dense model's folder.
        adapter: the adapter's folder.
        reference: what the recipe calls the dense model; an adapter may name its base.
        out: the folder to make: a standard model folder.
        context: its seed is recorded; nothing is drawn.

    Raises:
        InputError: PEFT does not merge the adapter into this model.
        NumericalError: NaN or Inf in the merged weights.
    """

    def ready() -> int:
        modules = check_mergeable(dense, adapter, reference, trust_remote_code=context.trust_remote_code)
        check_space(out, int(Checkpoint(dense).size_bytes * 1.05), "the tuned model")
        return modules

    def work(modules: int, draft: Draft) -> dict[str, Any]:
        network = merge_by_peft(dense, adapter, trust_remote_code=context.trust_remote_code)
        changed = _write_over(network, copy_model(dense, draft.path))
        logger.info("PEFT merged %d modules; %d tensors changed", modules, changed)
        return {"coverage": f"merged {modules} modules by PEFT", "tensors_changed": changed}

    return Stage.of("teacher", out, {}, {"base": dense, "adapter": adapter}, context.seed).make(ready, work)


def _write_over(network: PreTrainedModel, output: Checkpoint) -> int:
    """Write a model's tensors over a copy of the one it was made from; return how many differ."""
    changed = 0
    for name, tensor in DiskNames(network, output).to_disk(dict(network.state_dict())).items():
        if not finite(tensor):
            raise NumericalError(f"merging left NaN or Inf in {name}; the adapter's values are too large for its dtype")
        value = tensor.to(output.entries[name].dtype)
        if not value.equal(output.read(name)):
            output.write(name, value)
            changed += 1
    return changed


def _check_alike(dense: Path, tuned: Path, trust_remote_code: bool) -> None:
    """Refuse a tuned model that is not the dense one with other values."""
    networks = (skeleton(folder, trust_remote_code=trust_remote_code) for folder in (dense, tuned))
    ours, theirs = ({name: list(t.shape) for name, t in network.state_dict().items()} for network in networks)
    remedy = "give it as `model`, without teacher"
    with Problems(f"teacher {tuned}: is not a tuned form of {dense} ({remedy})") as problems:
        for name in sorted(ours.keys() ^ theirs.keys())[:3]:
            problems.add(f"{name} is in the {'dense model' if name in ours else 'teacher'} alone")
        for name in [name for name in ours if theirs.get(name, ours[name]) != ours[name]][:3]:
            problems.add(f"{name} is {theirs[name]}, in the dense model {ours[name]}")
        words, known = (load_tokenizer(f, trust_remote_code=trust_remote_code).get_vocab() for f in (dense, tuned))
        if words != known:
            others = [word for word in {**words, **known} if words.get(word) != known.get(word)]
            problems.add(f"its tokenizer differs in {len(others)} tokens, {others[0]!r} among them")
