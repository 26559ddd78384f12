"""sqft: fine-tune compressed language models so that one compressed model comes out.

`run` takes a recipe through all its stages; each stage is a function too, such as `sparsify` and `merge`. With this
package imported, before PEFT or after it, PEFT loads masked adapters (peft_type SQFT).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "ElasticRanks",
    "InputError",
    "Recipe",
    "SqftConfig",
    "SqftError",
    "__version__",
    "evaluate",
    "export",
    "extract",
    "finetune",
    "inspect_model",
    "load_model",
    "load_recipe",
    "merge",
    "pack",
    "packed_config",
    "quantize",
    "rank_space",
    "register_pruner",
    "register_score",
    "run",
    "search",
    "set_ranks",
    "sparsify",
    "unpack",
    "verify",
]

from sqft.errors import InputError, SqftError
from sqft.post_import import when_imported

if TYPE_CHECKING:
    from sqft.adapters.attach import load_model
    from sqft.adapters.config import SqftConfig
    from sqft.adapters.elastic import ElasticRanks, rank_space, set_ranks
    from sqft.core.pruners import register_pruner, register_score
    from sqft.model.inspect import inspect_model
    from sqft.model.quantizer import packed_config
    from sqft.pipeline import run
    from sqft.recipe import Recipe, load_recipe
    from sqft.verbs import (
        evaluate,
        export,
        extract,
        finetune,
        merge,
        pack,
        quantize,
        search,
        sparsify,
        unpack,
        verify,
    )

_HOME = {
    "ElasticRanks": "sqft.adapters.elastic",
    "Recipe": "sqft.recipe",
    "SqftConfig": "sqft.adapters.config",
    "evaluate": "sqft.verbs",
    "export": "sqft.verbs",
    "extract": "sqft.verbs",
    "finetune": "sqft.verbs",
    "inspect_model": "sqft.model.inspect",
    "load_model": "sqft.adapters.attach",
    "load_recipe": "sqft.recipe",
    "merge": "sqft.verbs",
    "pack": "sqft.verbs",
    "packed_config": "sqft.model.quantizer",
    "quantize": "sqft.verbs",
    "rank_space": "sqft.adapters.elastic",
    "register_pruner": "sqft.core.pruners",
    "register_score": "sqft.core.pruners",
    "run": "sqft.pipeline",
    "search": "sqft.verbs",
    "set_ranks": "sqft.adapters.elastic",
    "sparsify": "sqft.verbs",
    "unpack": "sqft.verbs",
    "verify": "sqft.verbs",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `sqft --help` must not wait for torch and transformers."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'sqft' has no attribute {name!r}")


# The room registers the peft_type SQFT. It needs PEFT, which takes seconds to import: it is loaded once PEFT is.
when_imported("peft", lambda: importlib.import_module("sqft.adapters"))
