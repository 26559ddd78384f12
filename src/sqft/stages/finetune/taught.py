"""The teacher of a distillation, refused before any work where it does not fit the model that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqft.errors import InputError, Problems
from sqft.model.opening import load_config, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from sqft.recipe import FinetuneConfig

_SIZES = {"num_hidden_layers": "blocks", "hidden_size": "hidden units", "vocab_size": "tokens in its vocabulary"}


def check_given(config: FinetuneConfig, teacher: str | Path | None) -> None:
    """Refuse a distillation without a teacher, and a teacher that nothing is learnt from.

    Raises:
        InputError: says which of the two to give.
    """
    if config.distill is not None and teacher is None:
        raise InputError(
            "finetune: distill needs a teacher; give the uncompressed model's folder, --teacher FOLDER (in Python "
            "teacher=FOLDER)"
        )
    if config.distill is None and teacher is not None:
        raise InputError(
            f"finetune: teacher {teacher} would do nothing without distill; add --distill.hidden 1 (in Python "
            "distill={'hidden': 1}), or leave it out"
        )


def check(teacher: Path, model: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a teacher whose states or logits are not comparable with the model's.

    Args:
        teacher: its folder.
        model: the folder of the model that is trained.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: another number of blocks, hidden size or vocabulary, with both numbers; or other tokens.
    """
    configs = [load_config(folder, trust_remote_code=trust_remote_code) for folder in (teacher, model)]
    theirs, ours = (config.get_text_config(decoder=True) for config in configs)
    remedy = "give the model that this one was compressed from, or it tuned"
    with Problems(f"teacher {teacher}: does not fit {model} ({remedy})") as problems:
        for name, what in _SIZES.items():
            if getattr(theirs, name) != getattr(ours, name):
                problems.add(f"has {getattr(theirs, name)} {what}, the model {getattr(ours, name)}")
        words, known = (load_tokenizer(f, trust_remote_code=trust_remote_code).get_vocab() for f in (model, teacher))
        if words != known:
            others = [word for word in {**words, **known} if words.get(word) != known.get(word)]
            problems.add(f"its tokenizer differs in {len(others)} tokens, {others[0]!r} among them")
