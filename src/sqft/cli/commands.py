"""What each command does with its options; each returns its exit code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft import processes
from sqft.cli.flags import given
from sqft.recipe import (
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    MergeConfig,
    QuantizeConfig,
    Recipe,
    SearchConfig,
    SparsifyConfig,
    VerifyConfig,
    load_recipe,
)

if TYPE_CHECKING:
    from sqft.artifact import Artifact


def _recipe(options: argparse.Namespace) -> Recipe:
    recipe = load_recipe(options.recipe, options.set)
    return recipe if options.threads is None else recipe.model_copy(update={"threads": options.threads})


def _announce(stage: str) -> None:
    if processes.first():
        print(f"▸ {stage}", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> int:
    from sqft import pipeline

    recipe = _recipe(options)

    result = pipeline.run(recipe, options.out, _announce)
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
        **_fetched(options),
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
        **_fetched(options),
        **given(options, QuantizeConfig),
    )
    _print_compressed(made)
    return 0


def finetune(options: argparse.Namespace) -> int:
    from sqft import verbs

    data = given(options, DataConfig)
    made = verbs.finetune(options.model, options.out, data=data, **_fetched(options), **given(options, FinetuneConfig))
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
        options.adapter, options.out, base=options.base, data=data, **_drawn(options), **given(options, SearchConfig)
    )
    result = made.manifest["result"]
    if "evaluated" in result:
        found, before = 100 * result["accuracy"], 100 * result["heuristic_accuracy"]
        print(f"{result['evaluated']} configurations: {found:.1f} % on validation rows, the heuristic {before:.1f} %")
    _print_ranks(made)
    return 0


def compare(options: argparse.Namespace) -> int:
    from sqft.compare.methods import PAPER
    from sqft.compare.run import run as run_comparison

    recipe = _recipe(options)

    out = options.out or Path("runs") / f"{recipe.name}-compare"
    typed = "sqft " + " ".join(sys.argv[1:])
    page = run_comparison(recipe, out, options.methods or PAPER, options.seeds, _announce, typed)
    print((out / "compare.md").read_text())
    print(f"table: {page}")
    return int(_any_failed(out / "compare.json"))


def sweep(options: argparse.Namespace) -> int:
    from sqft.compare import sweep

    recipe = _recipe(options)

    out = options.out or Path("runs") / f"{recipe.name}-sweep"
    typed = "sqft " + " ".join(sys.argv[1:])
    page = sweep.run(
        recipe, out, options.levels, options.methods or sweep.DEFAULT, options.seeds, _announce, typed
    )  # fmt: skip
    print((out / "sweep.md").read_text())
    print(f"table and chart: {page}")
    return int(_any_failed(*out.glob("sparsity-*/compare.json")))


def _any_failed(*tables: Path) -> bool:
    return any(method["failed"] for table in tables for method in json.loads(table.read_text())["methods"])


def plan(options: argparse.Namespace) -> int:
    from sqft.plan import as_json
    from sqft.plan import plan as make_plan

    recipe = _recipe(options)

    forecasts = make_plan(recipe, options.out or Path("runs") / recipe.name, _announce)
    short = [row.stage for row in forecasts if not row.fits]
    if options.json:
        print(json.dumps(as_json(forecasts), indent=2))
        return 1 if short else 0
    from sqft.cli.tables import show_rows

    show_rows(
        f"{recipe.name}: forecast",
        [
            {
                "stage": row.stage,
                "disk": f"{row.disk_bytes / 1e6:,.0f} MB",
                "peak memory": f"{row.memory_bytes / 1e9:.2f} GB",
                "time": f"{row.seconds / 60:.1f} min",
                "fits": "yes" if row.fits else "NO",
            }
            for row in forecasts
        ],
    )
    total = as_json(forecasts)
    print(
        f"in all {total['disk_bytes'] / 1e6:,.0f} MB of disk, {total['peak_memory_bytes'] / 1e9:.2f} GB of memory at "
        f"the highest, {total['seconds'] / 60:.1f} min on this machine as it is now"
    )
    if short:
        print(f"will not fit: {', '.join(short)}")
    return 1 if short else 0


def merge(options: argparse.Namespace) -> int:
    from sqft import verbs

    trust = options.trust_remote_code
    made = verbs.merge(
        options.model, options.adapter, options.out, trust_remote_code=trust, **given(options, MergeConfig)
    )
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

    proof = verbs.export(options.model, options.out, converter=options.converter, proof=options.proof)
    if options.json:
        print(json.dumps(proof, indent=2))
        return 0
    computed = f", {proof['computed']} others computed by the converter" if proof["computed"] else ""
    print(
        f"read back and compared: {proof['linears']} linears, {proof['weights']:,} weights equal to the bit in "
        f"{proof['type']}, {proof['bits']:g} bits a weight; {proof['matrices']} float matrices and {proof['vectors']} "
        f"vectors equal{computed}"
    )
    print(f"{proof['bytes'] / 1e6:.1f} MB: {proof.path}")
    return 0


def verify(options: argparse.Namespace) -> int:
    from sqft import verbs

    result = verbs.verify(
        options.merged,
        base=options.base,
        adapter=options.adapter,
        data=given(options, DataConfig) or None,
        out=options.out,
        **_drawn(options),
        **given(options, VerifyConfig),
    )
    if options.json:
        print(json.dumps(result, indent=2))
        return 0 if result["passed"] else 1
    for name, made_from in result["made_from"]["inputs"].items():
        print(f"hashed {name}: {made_from['files']} files, {made_from['bytes'] / 1e6:.1f} MB in {made_from['path']}")
    for check in result["checks"]:
        verdict = "pass" if check["passed"] else "FAIL"
        print(f"{verdict}  {check['name']:<16} {check['value']:g} (bound {check['bound']:g})  {check['detail']}")
    print(f"{'verified' if result['passed'] else 'NOT verified'}: {result.path}")
    return 0 if result["passed"] else 1


def inspect(options: argparse.Namespace) -> int:
    from sqft.model.inspect import inspect_model

    facts = inspect_model(options.model, trust_remote_code=options.trust_remote_code)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    from sqft.cli.tables import show_rows

    show_rows(
        "",
        [
            {
                "layer": layer["name"],
                "shape": "×".join(map(str, layer["shape"])),
                "sparsity": f"{layer['sparsity']:.4f}",
                "N:M": " ".join(layer["patterns"]),
            }
            for layer in facts["layers"]
        ],
    )
    precision = ", ".join(f"{dtype} {100 * share:.1f} %" for dtype, share in facts["precision"].items())
    print(
        f"sparsity of the blocks' linears {facts['sparsity']:.4f}, of all tensors {facts['total_sparsity']:.4f}; "
        f"{precision}; {facts['size_bytes'] / 1e6:.1f} MB on disk"
    )
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from sqft import verbs

    result = verbs.evaluate(
        options.model,
        data=given(options, DataConfig),
        adapter=options.adapter,
        out=options.out,
        **_fetched(options),
        **given(options, EvaluateConfig),
    )
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, entry in result["tasks"].items():
        error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}"
        print(f"{name}: {entry['metric']} {entry['value']:.4f}{error} on {entry['n']} rows")
        for nll in (part for key, part in entry.items() if key.endswith("_nll")):
            print(f"{name}: NLL of the right answers {nll['value']:.4f} nats a token")
    print(f"written: {result.path}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    from sqft import doctor as examination

    found = examination.examine()
    if not options.json:
        for name, text in examination.lines(found):
            print(f"{name:<10} {text}", flush=True)
    test = examination.self_test(_announce)
    if options.json:
        print(json.dumps(found | {"self_test": test}, indent=2))
    elif test["passed"]:
        print(f"self-test  passed in {test['seconds']} s: {', '.join(test['checks'])}")
    else:
        failed = [name for name, passed in test["checks"].items() if not passed]
        print(f"self-test  FAILED: {test['error'] or ', '.join(failed)}")
    return 0 if test["passed"] else 1


def _drawn(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of commands that draw."""
    return {"seed": options.seed, "trust_remote_code": options.trust_remote_code}


def _fetched(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of commands that draw and may fetch a model."""
    return {**_drawn(options), "model_revision": options.model_revision}


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
