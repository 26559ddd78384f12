"""Commands that make a folder or a file of weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft import processes
from sqft.cli.flags import given
from sqft.recipe import (
    DataConfig,
    FinetuneConfig,
    MergeConfig,
    QuantizeConfig,
    SearchConfig,
    SparsifyConfig,
)

if TYPE_CHECKING:
    from sqft.artifact import Artifact


from sqft.cli.commands.options import announce, drawn, fetched, recipe_of


def run(options: argparse.Namespace) -> int:
    from sqft import pipeline

    recipe = recipe_of(options)

    result = pipeline.run(recipe, options.out, announce)
    if not processes.first():
        return 0
    _print_summary(result.out, recipe)
    print(f"report: {result.report}")
    return 0 if result.verified is not False else 1


def sparsify(options: argparse.Namespace) -> int:
    from sqft import verbs

    made = verbs.sparsify(
        options.model,
        options.out,
        data=_calibration_data(options),
        **fetched(options),
        **given(options, SparsifyConfig),
    )
    _print_compressed(made)
    return 0


def quantize(options: argparse.Namespace) -> int:
    from sqft import verbs

    made = verbs.quantize(
        options.model,
        options.out,
        data=_calibration_data(options),
        sparsity=options.sparsity,
        pruner=options.pruner,
        update=options.update,
        **fetched(options),
        **given(options, QuantizeConfig),
    )
    _print_compressed(made)
    return 0


def finetune(options: argparse.Namespace) -> int:
    from sqft import verbs

    data = given(options, DataConfig)
    made = verbs.finetune(
        options.model,
        options.out,
        data=data,
        teacher=options.teacher,
        **fetched(options),
        **given(options, FinetuneConfig),
    )
    result = made.manifest["result"]
    print(f"{result['coverage']}; {result['steps']} steps, last loss {result['final_loss']:.4f}: {made.path}")
    return 0


def extract(options: argparse.Namespace) -> int:
    from sqft import verbs

    _print_ranks(verbs.extract(options.adapter, options.out, **given(options, SearchConfig)))
    return 0


def search(options: argparse.Namespace) -> int:
    from sqft import verbs

    data = given(options, DataConfig)
    made = verbs.search(
        options.adapter, options.out, base=options.base, data=data, **drawn(options), **given(options, SearchConfig)
    )
    result = made.manifest["result"]
    if "evaluated" in result:
        found, before = 100 * result["accuracy"], 100 * result["heuristic_accuracy"]
        print(f"{result['evaluated']} configurations: {found:.1f} % on validation rows, the heuristic {before:.1f} %")
    _print_ranks(made)
    return 0


def merge(options: argparse.Namespace) -> int:
    from sqft import verbs

    how = {"trust_remote_code": options.trust_remote_code, "device": options.device}
    made = verbs.merge(options.model, options.adapter, options.out, **how, **given(options, MergeConfig))
    result = made.manifest["result"]
    zeros = f"{result['filled_zeros']} pruned ones filled" if result["pruned"] else "the base has no pruned ones"
    print(f"{result['coverage']}, {result['changed']} weights changed, {zeros}: {made.path}")
    return 0


def pack(options: argparse.Namespace) -> int:
    from sqft import verbs

    made = verbs.pack(options.model, options.out)
    result = made.manifest["result"]
    before, after = result["bytes"], result["packed_bytes"]
    print(f"{before / 1e6:.1f} MB in {after / 1e6:.1f} MB, {before / after:.2f} times smaller: {made.path}")
    return 0


def unpack(options: argparse.Namespace) -> int:
    from sqft import verbs

    print(f"every file has its SHA-256: {verbs.unpack(options.archive, options.out)}")
    return 0


def export(options: argparse.Namespace) -> int:
    from sqft import verbs

    proof = verbs.export(
        options.model, options.out, format=options.format, converter=options.converter, proof=options.proof
    )
    if options.json:
        print(json.dumps(proof, indent=2))
        return 0
    print(f"{proof['linears']} linears, {proof['weights']:,} weights, read back and equal to the bit")
    print(f"{proof['type']}, {proof['bits']:g} bits a weight, {proof['bytes'] / 1e6:.1f} MB: {proof.path}")
    if "logits" in proof:
        print(
            f"logits of {proof['tokens']} tokens differ from transformers' in float32 by at most {proof['logits']:.2g}"
        )
    return 0


def _calibration_data(options: argparse.Namespace) -> dict[str, Any] | None:
    cut = {"validation_rows": options.validation_rows, "test_rows": options.test_rows}
    return {"task": options.task, **cut} if options.task else None


def _print_compressed(made: Artifact) -> None:
    result = made.manifest["result"]
    print(f"{result['coverage']}; sparsity {result['sparsity']:.4f}: {made.path}")


def _print_ranks(made: Artifact) -> None:
    strategy = made.manifest["config"]["strategy"]
    print(f"{strategy} ranks {made.manifest['result']['groups_per_rank']}: {made.path}")


def _print_summary(out: Path, recipe: Any) -> None:
    from sqft.cli.tables import show_rows
    from sqft.stages.report import summary_table

    show_rows(recipe.name, summary_table(out, recipe))
