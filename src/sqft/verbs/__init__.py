"""The stages as Python functions, with the names and defaults of the command line, which calls them.

    import sqft

    sqft.sparsify("HuggingFaceTB/SmolLM2-135M", "sparse", data="gsm8k", sparsity=0.5)
    sqft.finetune("sparse", "adapter", data="gsm8k", ranks=[32, 24, 16])
    sqft.extract("adapter", "sub_adapter")
    sqft.merge("sparse", "sub_adapter", "merged")
    proof = sqft.verify("merged", base="sparse", adapter="sub_adapter", data="gsm8k")

Settings are keyword arguments with the names of the recipe (`docs/reference/recipe.md`); groups of them are mappings,
such as `calibration={"samples": 64}`. `data` is the name of a task, or a mapping with the recipe's keys of `data`, such
as {"task": "gsm8k", "validation_rows": 100}. What is already made with the same settings is not made again.
"""

from sqft.verbs.arguments import Result
from sqft.verbs.judging import evaluate, verify
from sqft.verbs.making import extract, finetune, merge, quantize, search, sparsify
from sqft.verbs.packing import export, pack, unpack

__all__ = [
    "Result",
    "evaluate",
    "export",
    "extract",
    "finetune",
    "merge",
    "pack",
    "quantize",
    "search",
    "sparsify",
    "unpack",
    "verify",
]
