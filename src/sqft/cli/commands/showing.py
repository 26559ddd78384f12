"""Commands that show, compare and judge."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sqft.cli.commands.options import announce, drawn, fetched, recipe_of
from sqft.cli.flags import given
from sqft.errors import InputError
from sqft.recipe import (
    DataConfig,
    EvaluateConfig,
    VerifyConfig,
)


def plan(options: argparse.Namespace) -> int:
    from sqft.plan import as_json
    from sqft.plan import plan as make_plan

    recipe = recipe_of(options)

    forecasts = make_plan(recipe, options.out or Path("runs") / recipe.name, announce)
    short = [row.stage for row in forecasts if not row.fits]
    on_card = any(row.gpu_bytes for row in forecasts)
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
                **({"on the card": f"{row.gpu_bytes / 1e9:.2f} GB"} if on_card else {}),
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


def compare(options: argparse.Namespace) -> int:
    from sqft.compare.methods import default_methods
    from sqft.compare.run import run as run_comparison

    recipe = recipe_of(options)

    out = options.out or Path("runs") / f"{recipe.name}-compare"
    typed = "sqft " + " ".join(sys.argv[1:])
    page = run_comparison(recipe, out, options.methods or default_methods(recipe), options.seeds, announce, typed)
    print((out / "compare.md").read_text())
    print(f"table: {page}")
    return int(_any_failed(out / "compare.json"))


def sweep(options: argparse.Namespace) -> int:
    from sqft.compare import sweep

    recipe = recipe_of(options)

    out = options.out or Path("runs") / f"{recipe.name}-sweep"
    typed = "sqft " + " ".join(sys.argv[1:])
    page = sweep.run(
        recipe, out, options.levels, options.methods or sweep.DEFAULT, options.seeds, announce, typed
    )  # fmt: skip
    print((out / "sweep.md").read_text())
    print(f"table and chart: {page}")
    return int(_any_failed(*out.glob("sparsity-*/compare.json")))


def verify(options: argparse.Namespace) -> int:
    from sqft import verbs

    result = verbs.verify(
        options.merged,
        base=options.base,
        adapter=options.adapter,
        data=given(options, DataConfig) or None,
        out=options.out,
        **drawn(options),
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
        **fetched(options),
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
            print(f"{name:<11} {text}", flush=True)
    test = examination.self_test(announce)
    if options.json:
        print(json.dumps(found | {"self_test": test}, indent=2))
    elif test["passed"]:
        print(f"self-test  passed in {test['seconds']} s: {', '.join(test['checks'])}")
    else:
        failed = [name for name, passed in test["checks"].items() if not passed]
        print(f"self-test  FAILED: {test['error'] or ', '.join(failed)}")
    return 0 if test["passed"] else 1


def chat(options: argparse.Namespace) -> int:
    from sqft.chat import Chat

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    talk = Chat(
        options.model,
        options.adapter,
        raw=options.raw,
        max_tokens=options.max_tokens,
        trust_remote_code=options.trust_remote_code,
        device=options.device,
    )
    if options.prompt is not None:
        talk.answer(options.prompt, show)
        print()
        return 0
    how = "as turns of a chat" if talk.templated else "each prompt alone, as it is"
    print(f"{options.model}, {how}; Control-C stops an answer, Control-D ends", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            return 0
        try:
            _, speed = talk.answer(prompt, show)
            print(f"\n({speed:.1f} tokens/s)" if sys.stdout.isatty() else "")
        except KeyboardInterrupt:
            print("\n(stopped)")
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def _any_failed(*tables: Path) -> bool:
    return any(method["failed"] for table in tables for method in json.loads(table.read_text())["methods"])
