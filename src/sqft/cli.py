"""The command line: one command a stage, plus `run`. The only file that prints and exits.

Every setting of a stage is a flag of its command, made from the recipe's models, so flags, recipe keys and their
descriptions cannot drift apart. Exit codes: 0 done, 1 a verification failed, 2 the input cannot be used, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sqft.errors import SqftError
from sqft.flags import add_flags, read_config
from sqft.recipe import (
    CalibrationConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    MergeConfig,
    QuantizeConfig,
    SearchConfig,
    SparsifyConfig,
    VerifyConfig,
    load_recipe,
    parse_config,
)

Command = Callable[[argparse.Namespace], int]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    _set_up(options)
    try:
        return int(options.command(options))
    except SqftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno != 28:  # ENOSPC
            raise
        print(f"error: the disk is full ({error}); free some space and run the same command again", file=sys.stderr)
        return 2


def _set_up(options: argparse.Namespace) -> None:
    """Make the libraries quiet and our own log readable."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sqft").setLevel(logging.DEBUG if options.verbose else logging.INFO)
    if not options.verbose:
        warnings.filterwarnings("ignore")
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)


# --- commands -------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from sqft import pipeline

    recipe = load_recipe(options.recipe, options.set)
    if options.threads is not None:
        recipe = recipe.model_copy(update={"threads": options.threads})

    def announce(stage: str) -> None:
        print(f"▸ {stage}", file=sys.stderr, flush=True)

    result = pipeline.run(recipe, options.out, announce)
    _print_summary(result.out, recipe)
    print(f"report: {result.report}")
    return 0 if result.verified is not False else 1


def _sparsify(options: argparse.Namespace) -> int:
    from sqft.model.load import localize
    from sqft.stages import sparsify

    config = read_config(options, SparsifyConfig)
    model = localize(options.model, options.out.parent, trust_remote_code=options.trust_remote_code)
    tokens = source = None
    if config.mask is None and config.method != "magnitude":
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
    from sqft.model.load import load_tokenizer

    data = DataConfig(task=options.task) if options.task else None
    if data is None and config.data == "task":
        raise SqftError(
            "--task NAME or --calibration.data FILE is needed: this method looks at text to see which inputs each "
            "weight meets"
        )
    tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
    tokens = calibration_tokens(config, data, tokenizer, options.seed)
    return tokens, {"data": data.model_dump(mode="json") if data else None, **config.model_dump(mode="json")}


def _quantize(options: argparse.Namespace) -> int:
    from sqft.model.load import localize
    from sqft.stages import quantize

    config = read_config(options, QuantizeConfig)
    model = localize(options.model, options.out.parent, trust_remote_code=options.trust_remote_code)
    calibration = config.calibration or CalibrationConfig()
    sparsify = None
    if options.sparsity is not None:
        wanted = {"sparsity": options.sparsity, "method": options.pruner, "calibration": calibration}
        sparsify = parse_config(SparsifyConfig, wanted, "command line")
    tokens = source = None
    if config.method == "gptq" or (sparsify is not None and sparsify.method != "magnitude"):
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


def _finetune(options: argparse.Namespace) -> int:
    from sqft.data.load import load_examples
    from sqft.model.load import load_tokenizer, localize
    from sqft.stages import finetune

    config = read_config(options, FinetuneConfig)
    data = _data(options)
    model = localize(options.model, options.out.parent, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
    train = [(e.prompt, e.answer) for e in load_examples(data, "train", options.seed, tokenizer)]
    validation = []
    if config.evaluate_every is not None:
        validation = [(e.prompt, e.answer) for e in load_examples(data, "validation", options.seed, tokenizer)]
    source = {"data": data.model_dump(mode="json"), "train_examples": len(train)}
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


def _search(options: argparse.Namespace) -> int:
    from sqft.data.load import load_tasks
    from sqft.model.load import load_tokenizer
    from sqft.stages import search

    config = read_config(options, SearchConfig)
    rows = load_tasks(_data(options), "validation", load_tokenizer(options.base)) if config.searches else []
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


def _compare(options: argparse.Namespace) -> int:
    from sqft.compare.methods import PAPER
    from sqft.compare.run import run as run_comparison

    recipe = load_recipe(options.recipe, options.set)
    if options.threads is not None:
        recipe = recipe.model_copy(update={"threads": options.threads})

    def announce(stage: str) -> None:
        print(f"▸ {stage}", file=sys.stderr, flush=True)

    out = options.out or Path("runs") / f"{recipe.name}-compare"
    typed = "sqft " + " ".join(sys.argv[1:])
    page = run_comparison(recipe, out, options.methods or PAPER, options.seeds, announce, typed)
    print((out / "compare.md").read_text())
    print(f"table: {page}")
    failed = [m for m in json.loads((out / "compare.json").read_text())["methods"] if m["failed"]]
    return 1 if failed else 0


def _sweep(options: argparse.Namespace) -> int:
    from sqft.compare import sweep

    recipe = load_recipe(options.recipe, options.set)
    if options.threads is not None:
        recipe = recipe.model_copy(update={"threads": options.threads})

    def announce(stage: str) -> None:
        print(f"▸ {stage}", file=sys.stderr, flush=True)

    out = options.out or Path("runs") / f"{recipe.name}-sweep"
    typed = "sqft " + " ".join(sys.argv[1:])
    page = sweep.run(
        recipe, out, options.levels, options.methods or sweep.DEFAULT, options.seeds, announce, typed
    )  # fmt: skip
    print((out / "sweep.md").read_text())
    print(f"table and chart: {page}")
    return 0


def _extract(options: argparse.Namespace) -> int:
    from sqft.stages import search

    config = read_config(options, SearchConfig)
    artifact = search.run(config, options.adapter, options.out)
    print(f"{config.strategy} ranks {artifact.manifest['result']['groups_per_rank']}: {options.out}")
    return 0


def _merge(options: argparse.Namespace) -> int:
    from sqft.stages import merge

    artifact = merge.run(
        read_config(options, MergeConfig),
        options.model,
        options.adapter,
        options.out,
        trust_remote_code=options.trust_remote_code,
    )
    result = artifact.manifest["result"]
    changes = f"{result['changed']} weights changed, {result['filled_zeros']} zeros filled"
    print(f"{result['coverage']}, {changes}: {options.out}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from sqft.data.load import load_examples, resolve_task
    from sqft.model.load import load_tokenizer
    from sqft.stages import verify

    config = read_config(options, VerifyConfig)
    task, examples = None, []
    if "set:task" in vars(options):
        data = _data(options)
        task = resolve_task(data)
        examples = load_examples(data, "test", options.seed, load_tokenizer(options.base))
    out = options.out or options.merged.parent / "verify.json"
    result = verify.run(
        config, options.merged, options.base, options.adapter, out,
        task=task, examples=examples, seed=options.seed, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for check in result["checks"]:
            verdict = "pass" if check["passed"] else "FAIL"
            print(f"{verdict}  {check['name']:<16} {check['value']:g} (bound {check['bound']:g})  {check['detail']}")
        print(f"{'verified' if result['passed'] else 'NOT verified'}: {out}")
    return 0 if result["passed"] else 1


def _inspect(options: argparse.Namespace) -> int:
    from sqft.model.inspect import inspect_model

    facts = inspect_model(options.model, trust_remote_code=options.trust_remote_code)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "shape", "sparsity", "N:M")
    for layer in facts["layers"]:
        table.add_row(
            layer["name"], "×".join(map(str, layer["shape"])), f"{layer['sparsity']:.4f}", " ".join(layer["patterns"])
        )
    console = Console()
    console.print(table)
    precision = ", ".join(f"{dtype} {100 * share:.1f} %" for dtype, share in facts["precision"].items())
    console.print(
        f"sparsity of the blocks' linears {facts['sparsity']:.4f}, of all tensors {facts['total_sparsity']:.4f}; "
        f"{precision}; {facts['size_bytes'] / 1e6:.1f} MB on disk"
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from sqft.model.load import localize
    from sqft.stages import evaluate

    workspace = options.out.parent if options.out else Path("runs") / "evaluate"
    model = localize(options.model, workspace, trust_remote_code=options.trust_remote_code)
    out = options.out or workspace / "eval.json"
    result = evaluate.run(
        read_config(options, EvaluateConfig), _data(options), model, options.adapter, out,
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
    from rich.console import Console
    from rich.table import Table

    from sqft.stages.report import summary_table

    rows = summary_table(out, recipe)
    if not rows:
        return
    table = Table(*rows[0], title=recipe.name)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


# --- arguments ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--seed", type=int, default=0, help="of everything drawn (default 0)")
    shared.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    shared.add_argument("--trust-remote-code", action="store_true", help="run code that a model's repository brings")
    shared.add_argument("-v", "--verbose", action="store_true", help="show the libraries' own messages too")
    parser = argparse.ArgumentParser(
        prog="sqft",
        description="Fine-tune a compressed language model and get one compressed model out, with the proof that "
        "merging changed nothing.",
        epilog="Start with: sqft run recipes/quickstart.yaml",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, help_: str, *configs: type[Config], example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            parents=[shared],
            help=help_,
            description=f"{help_[0].upper()}{help_[1:]}.",
            epilog=f"Example: sqft {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for config in configs:
            add_flags(sub, config)
        sub.set_defaults(command=command)
        return sub

    task_help = "a built-in task, gym:NAME, a Hub data set, or a JSONL file or folder"
    sub = add(
        "run", _run, "take a recipe through all its stages; run it again to continue", example="recipes/quickstart.yaml"
    )
    sub.add_argument("recipe", type=Path, help="YAML file")
    sub.add_argument("--out", type=Path, help="the run's folder (default runs/NAME)")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a setting, e.g. finetune.epochs=1")

    sub = add("sparsify", _sparsify, "set the least important weights of a model to zero", SparsifyConfig,
              example="HuggingFaceTB/SmolLM2-135M sparse --task gsm8k --sparsity 0.5")  # fmt: skip
    sub.add_argument("model", help="Hub id, folder, or .gguf file")
    sub.add_argument("out", type=Path, help="folder to make")
    sub.add_argument("--task", help=f"whose training rows calibrate: {task_help}")

    sub = add("quantize", _quantize, "round a model's weights to an integer grid, keeping its zeros", QuantizeConfig,
              example="sparse quantized --task gsm8k --bits 4 --group-size 64")  # fmt: skip
    sub.add_argument("model", help="Hub id, folder, or .gguf file: the float model, sparse or not")
    sub.add_argument("out", type=Path, help="folder to make")
    sub.add_argument("--task", help=f"whose training rows calibrate: {task_help}")
    sub.add_argument("--sparsity", type=float, help="also prune this fraction of each row, in the same pass")
    sub.add_argument("--pruner", default="wanda", help="how --sparsity chooses weights (default wanda)")

    sub = add("finetune", _finetune, "train elastic, masked adapters on a frozen model", FinetuneConfig, DataConfig,
              example="sparse adapter --task gsm8k --ranks 32 24 16")  # fmt: skip
    sub.add_argument("model", help="Hub id or folder")
    sub.add_argument("out", type=Path, help="folder to make")

    sub = add(
        "extract", _extract, "take a sub-adapter out of a super-adapter", SearchConfig, example="adapter sub_adapter"
    )
    sub.add_argument("adapter", type=Path, help="the super-adapter's folder")
    sub.add_argument("out", type=Path, help="folder to make")

    sub = add("search", _search, "find the best sub-adapter of a super-adapter on validation rows", SearchConfig,
              DataConfig, example="adapter out --base sparse --task mawps --strategy hill_climbing")  # fmt: skip
    sub.add_argument("adapter", type=Path, help="the super-adapter's folder")
    sub.add_argument("out", type=Path, help="folder to make; started twice with one OUT, two processes share the work")
    sub.add_argument("--base", type=Path, required=True, help="the base model's folder")

    sub = add("compare", _compare, "run the paper's methods on one model and task, and show one table",
              example="recipes/quickstart.yaml --seeds 3")  # fmt: skip
    sub.add_argument("recipe", type=Path, help="YAML file: model, data and the settings that all rows share")
    sub.add_argument(
        "--out", type=Path, help="folder (default runs/NAME-compare); processes that share it share the work"
    )
    sub.add_argument("--methods", nargs="+", metavar="METHOD", help="rows (default: the ten of the paper)")
    sub.add_argument("--seeds", type=int, default=1, help="training seeds a row (default 1)")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a setting, e.g. finetune.epochs=1")

    sub = add(
        "sweep", _sweep, "compare methods over sparsity levels", example="recipes/math.yaml --levels 0 0.3 0.6 2:4"
    )
    sub.add_argument("recipe", type=Path, help="YAML file: model, data and the settings that all rows share")
    sub.add_argument("--levels", nargs="+", default=["0", "0.3", "0.5", "0.7"], metavar="LEVEL",
                     help="sparsities, 0 for none, and patterns such as 2:4 (default 0 0.3 0.5 0.7)")  # fmt: skip
    sub.add_argument("--out", type=Path, help="folder (default runs/NAME-sweep)")
    sub.add_argument("--methods", nargs="+", metavar="METHOD", help="rows (default: one rank and NLS of each)")
    sub.add_argument("--seeds", type=int, default=1, help="training seeds a row (default 1)")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a setting, e.g. finetune.epochs=1")

    sub = add("merge", _merge, "merge an adapter into its base", MergeConfig, example="sparse sub_adapter merged")
    sub.add_argument("model", type=Path, help="the base model's folder")
    sub.add_argument("adapter", type=Path, help="the adapter's folder")
    sub.add_argument("out", type=Path, help="folder to make")

    sub = add("verify", _verify, "prove that a merged model is its base with its adapter", VerifyConfig, DataConfig,
              example="merged --base sparse --adapter sub_adapter")  # fmt: skip
    sub.add_argument("merged", type=Path, help="the merged model's folder")
    sub.add_argument("--base", type=Path, required=True, help="the base model's folder")
    sub.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    sub.add_argument("--out", type=Path, help="JSON file to write (default: verify.json beside MERGED)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add("inspect", _inspect, "show the zeros, patterns, precision and size of a model", example="merged --json")
    sub.add_argument("model", type=Path, help="model folder")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add("evaluate", _evaluate, "measure a model on tasks through lm-eval", EvaluateConfig, DataConfig,
              example="merged --task gsm8k --limit 100")  # fmt: skip
    sub.add_argument("model", help="Hub id, folder, or .gguf file")
    sub.add_argument("--adapter", type=Path, help="an adapter to attach, unmerged")
    sub.add_argument("--out", type=Path, help="JSON file to write (default runs/evaluate/eval.json)")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _data(options: argparse.Namespace) -> DataConfig:
    return read_config(options, DataConfig)
