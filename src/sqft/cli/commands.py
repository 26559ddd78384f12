"""What each command does with its options; each returns its exit code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sqft import processes
from sqft.cli.flags import read_config
from sqft.cli.places import dated, localize, result_file
from sqft.errors import SqftError
from sqft.recipe import (
    CalibrationConfig,
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
    parse_config,
)


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
    from sqft.stages import sparsify

    config = read_config(options, SparsifyConfig)
    model = localize(options.model, options.out.parent, options.model_revision)
    tokens = source = None
    if config.needs_text:
        tokens, source = _calibrate(options, config.calibration, model)
    artifact = sparsify.run(
        config,
        model,
        tokens,
        options.out,
        seed=options.seed,
        calibration=source,
        trust_remote_code=options.trust_remote_code,
    )
    result = artifact.manifest["result"]
    print(f"{result['coverage']}; sparsity {result['sparsity']:.4f}: {options.out}")
    return 0


def _calibrate(options: argparse.Namespace, config: CalibrationConfig, model: Path) -> tuple[Any, dict[str, Any]]:
    """Return (calibration tokens, what they were drawn from)."""
    from sqft.data.calibration import calibration_tokens
    from sqft.model.opening import load_tokenizer

    cut = {"validation_rows": options.validation_rows, "test_rows": options.test_rows}
    data = DataConfig(task=options.task, **cut) if options.task else None
    if data is None and config.data == "task":
        raise SqftError(
            "--task NAME or --calibration.data FILE is needed: this method looks at text to see which inputs each "
            "weight meets"
        )
    tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
    data = data and dated(data, tokenizer, options.out)
    tokens = calibration_tokens(config, data, tokenizer, options.seed)
    return tokens, {
        "data": data.model_dump(mode="json") if data else None,
        "calibration": config.model_dump(mode="json"),
    }


def quantize(options: argparse.Namespace) -> int:
    from sqft.stages import quantize

    config = read_config(options, QuantizeConfig)
    model = localize(options.model, options.out.parent, options.model_revision)
    calibration = config.calibration or CalibrationConfig()
    sparsify = None
    if options.sparsity is not None:
        wanted = {"sparsity": options.sparsity, "method": options.pruner, "calibration": calibration}
        sparsify = parse_config(SparsifyConfig, wanted, "command line")
    tokens = source = None
    if config.method == "gptq" or (sparsify is not None and sparsify.needs_text):
        tokens, source = _calibrate(options, calibration, model)
    artifact = quantize.run(
        config,
        model,
        tokens,
        options.out,
        seed=options.seed,
        sparsify=sparsify,
        calibration=source,
        trust_remote_code=options.trust_remote_code,
    )
    result = artifact.manifest["result"]
    print(f"{result['coverage']}; sparsity {result['sparsity']:.4f}: {options.out}")
    return 0


def finetune(options: argparse.Namespace) -> int:
    from sqft.data.load import load_examples
    from sqft.model.opening import load_tokenizer
    from sqft.stages import finetune

    config = read_config(options, FinetuneConfig)
    data = _data(options)
    model = localize(options.model, options.out.parent, options.model_revision)
    tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
    data = dated(data, tokenizer, options.out)
    train = [(e.prompt, e.answer) for e in load_examples(data, "train", options.seed, tokenizer)]
    validation = []
    if config.evaluate_every is not None:
        validation = [(e.prompt, e.answer) for e in load_examples(data, "validation", options.seed, tokenizer)]
    source = {"data": data.model_dump(mode="json")}
    artifact = finetune.run(
        config,
        model,
        train,
        validation,
        options.out,
        seed=options.seed,
        data=source,
        trust_remote_code=options.trust_remote_code,
    )
    result = artifact.manifest["result"]
    print(f"{result['coverage']}; {result['steps']} steps, last loss {result['final_loss']:.4f}: {options.out}")
    return 0


def search(options: argparse.Namespace) -> int:
    from sqft.data.load import load_tasks
    from sqft.model.opening import load_tokenizer
    from sqft.stages import search

    config = read_config(options, SearchConfig)
    rows = []
    if config.searches:
        tokenizer = load_tokenizer(options.base, trust_remote_code=options.trust_remote_code)
        rows = load_tasks(_data(options), "validation", tokenizer)
        _refuse_trained_on(options.adapter, rows, tokenizer)
    artifact = search.run(
        config, options.adapter, options.out, seed=options.seed, base=options.base, rows=rows,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    result = artifact.manifest["result"]
    if config.searches:
        found, before = 100 * result["accuracy"], 100 * result["heuristic_accuracy"]
        print(f"{result['evaluated']} configurations: {found:.1f} % on validation rows, the heuristic {before:.1f} %")
    print(f"{config.strategy} ranks {result['groups_per_rank']}: {options.out}")
    return 0


def _refuse_trained_on(adapter: Path, rows: list[tuple[Any, list[Any]]], tokenizer: Any) -> None:
    """Refuse to select on questions that an adapter of ours was trained on."""
    from sqft.artifact import MANIFEST, Artifact
    from sqft.data.load import folds_punctuation, load_examples
    from sqft.data.tasks import question_key

    if not (adapter / MANIFEST).is_file():
        return
    manifest = Artifact.open(adapter).manifest
    source = manifest["config"].get("data", {}).get("data")
    if source is None:
        return
    data = parse_config(DataConfig, source, str(adapter))
    fold = folds_punctuation(data)
    trained = load_examples(data, "train", manifest["seed"], tokenizer)
    asked = {question_key(example, punctuation=fold) for example in trained}
    if shared := sum(question_key(example, punctuation=fold) in asked for _, part in rows for example in part):
        raise SqftError(
            f"{adapter} was trained on {shared} of the {sum(len(part) for _, part in rows)} rows that the search would "
            f"select on; it trained with --validation-rows {data.validation_rows} and --test-rows {data.test_rows}: "
            "train with as many as the search is given"
        )


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


def extract(options: argparse.Namespace) -> int:
    from sqft.stages import search

    config = read_config(options, SearchConfig)
    artifact = search.run(config, options.adapter, options.out)
    print(f"{config.strategy} ranks {artifact.manifest['result']['groups_per_rank']}: {options.out}")
    return 0


def merge(options: argparse.Namespace) -> int:
    from sqft.stages import merge, report

    artifact = merge.run(
        read_config(options, MergeConfig),
        options.model,
        options.adapter,
        options.out,
        trust_remote_code=options.trust_remote_code,
    )
    report.write_card(artifact)
    result = artifact.manifest["result"]
    zeros = f"{result['filled_zeros']} pruned ones filled" if result["pruned"] else "the base has no pruned ones"
    changes = f"{result['changed']} weights changed, {zeros}"
    print(f"{result['coverage']}, {changes}: {options.out}")
    return 0


def verify(options: argparse.Namespace) -> int:
    from sqft.data.load import load_examples, resolve_task
    from sqft.model.opening import load_tokenizer
    from sqft.stages import verify

    config = read_config(options, VerifyConfig)
    out = result_file(options, "verify", options.merged, options.base, options.adapter)
    task, examples = None, []
    if "set:task" in vars(options):
        data = _data(options)
        task = resolve_task(data)
        tokenizer = load_tokenizer(options.base, trust_remote_code=options.trust_remote_code)
        examples = load_examples(data, "test", options.seed, tokenizer)
    result = verify.run(
        config, options.merged, options.base, options.adapter, out,
        task=task, examples=examples, seed=options.seed, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, made_from in result["made_from"]["inputs"].items():
            print(
                f"hashed {name}: {made_from['files']} files, {made_from['bytes'] / 1e6:.1f} MB in {made_from['path']}"
            )
        for check in result["checks"]:
            verdict = "pass" if check["passed"] else "FAIL"
            print(f"{verdict}  {check['name']:<16} {check['value']:g} (bound {check['bound']:g})  {check['detail']}")
        print(f"{'verified' if result['passed'] else 'NOT verified'}: {out}")
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
    from sqft.model.opening import load_tokenizer
    from sqft.stages import evaluate

    out = result_file(options, "evaluate", Path(options.model), *([options.adapter] if options.adapter else []))
    model = localize(options.model, out.parent, options.model_revision)
    tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
    result = evaluate.run(
        read_config(options, EvaluateConfig), dated(_data(options), tokenizer, out), model, options.adapter, out,
        seed=options.seed, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, entry in result["tasks"].items():
        error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}"
        print(f"{name}: {entry['metric']} {entry['value']:.4f}{error} on {entry['n']} rows")
    print(f"written: {out}")
    return 0


def _print_summary(out: Path, recipe: Any) -> None:
    from sqft.cli.tables import show_rows
    from sqft.stages.report import summary_table

    show_rows(recipe.name, summary_table(out, recipe))


def _data(options: argparse.Namespace) -> DataConfig:
    return read_config(options, DataConfig)
