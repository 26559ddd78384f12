"""The commands and their options. Every setting of a stage is a flag of its command, made from the recipe's models."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sqft.cli import commands
from sqft.cli.flags import add_flags
from sqft.recipe import (
    MAX_SEED,
    Config,
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    MergeConfig,
    QuantizeConfig,
    SearchConfig,
    SparsifyConfig,
    VerifyConfig,
)

# Commands that take a recipe find both in there.
_DRAWING = ("sparsify", "quantize", "finetune", "search", "verify", "evaluate")
_FETCHING = ("sparsify", "quantize", "finetune", "evaluate")
_LOADING = (*_DRAWING, "merge", "inspect")


def _path(text: str) -> Path:
    """Return a path; a shell leaves a `~` in --out=~/x as it is."""
    return Path(text).expanduser()


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return what reads a flag's text as a whole number inside these bounds."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least or (most is not None and int(text) > most):
            bound = "or more" if most is None else f"to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} {bound}")
        return int(text)

    return read


class _Command(argparse.ArgumentParser):
    """Refuses arguments that it does not know with its own usage; argparse leaves that to the root, which has none."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options, unknown


def parser() -> argparse.ArgumentParser:
    """Return the parser; the name of a command is that of its function in :mod:`sqft.cli.commands`."""
    shared = _Command(add_help=False)
    shared.add_argument("--threads", type=_whole(1), help="CPU threads (default: PyTorch's choice)")
    shared.add_argument("-v", "--verbose", action="store_true", help="show the libraries' own messages too")
    root = argparse.ArgumentParser(
        prog="sqft",
        description="Fine-tune a compressed language model and get one compressed model out, with the proof that "
        "merging changed nothing.",
        epilog="Start with: sqft run recipes/quickstart.yaml",
    )
    subcommands = root.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)

    def add(
        name: str, help_: str, *configs: type[Config], example: str, defaults: dict[str, str] | None = None
    ) -> argparse.ArgumentParser:
        sub = subcommands.add_parser(
            name,
            parents=[shared],
            help=help_,
            description=f"{help_[0].upper()}{help_[1:]}.",
            epilog=f"Example: sqft {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for config in configs:
            add_flags(sub, config, defaults=defaults or {})
        if name in _DRAWING:
            sub.add_argument("--seed", type=_whole(0, MAX_SEED), default=0, help="of everything drawn (default 0)")
        if name in _FETCHING:
            sub.add_argument("--model-revision", help="branch, tag or commit of a Hub model (default: its main branch)")
        if name in _LOADING:
            sub.add_argument(
                "--trust-remote-code", action="store_true", help="run code that a model's repository brings"
            )
        sub.set_defaults(command=getattr(commands, name))
        return sub

    task_help = "a built-in task, gym:NAME, a Hub data set, or a file (JSONL, JSON, CSV or parquet) or folder of them"

    def calibrates(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--task", help=f"whose training rows calibrate: {task_help}")
        for rows, use in (("validation", "search selects on"), ("test", "are reported")):
            text = f"rows cut from them that {use}: as many as the other commands are given (default 0)"
            sub.add_argument(f"--{rows}-rows", type=_whole(0), default=0, help=text)

    sub = add(
        "run",
        "take a recipe through all its stages; run it again to continue",
        example="recipes/quickstart.yaml",
    )
    sub.add_argument("recipe", type=_path, help="YAML file")
    sub.add_argument("--out", type=_path, help="the run's folder (default runs/NAME)")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a setting, e.g. finetune.epochs=1")

    sub = add("plan", "say what a recipe will need before it runs: disk, memory and time of each stage",
              example="recipes/quickstart.yaml")  # fmt: skip
    sub.add_argument("recipe", type=_path, help="YAML file")
    sub.add_argument("--out", type=_path, help="where the run will stand (default runs/NAME)")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a setting, e.g. finetune.epochs=1")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add("sparsify", "set the least important weights of a model to zero", SparsifyConfig,
              example="HuggingFaceTB/SmolLM2-135M sparse --task gsm8k --sparsity 0.5")  # fmt: skip
    sub.add_argument("model", help="Hub id, folder, or .gguf file")
    sub.add_argument("out", type=_path, help="folder to make")
    calibrates(sub)

    sub = add("quantize", "round a model's weights to an integer grid, keeping its zeros", QuantizeConfig,
              example="sparse quantized --task gsm8k --bits 4 --group-size 64")  # fmt: skip
    sub.add_argument("model", help="Hub id, folder, or .gguf file: the float model, sparse or not")
    sub.add_argument("out", type=_path, help="folder to make")
    calibrates(sub)
    sub.add_argument("--sparsity", type=float, help="also prune this fraction of each row, in the same pass")
    sub.add_argument("--pruner", default="wanda", help="how --sparsity chooses weights (default wanda)")

    sub = add("finetune", "train elastic, masked adapters on a frozen model", FinetuneConfig, DataConfig,
              example="sparse adapter --task gsm8k --ranks 32 24 16")  # fmt: skip
    sub.add_argument("model", help="Hub id or folder")
    sub.add_argument("out", type=_path, help="folder to make")

    sub = add(
        "extract",
        "take a sub-adapter of given ranks out of a super-adapter; `search` looks for the best",
        example="adapter sub_adapter",
    )
    sub.add_argument("adapter", type=_path, help="the super-adapter's folder")
    sub.add_argument("out", type=_path, help="folder to make")
    sub.add_argument(
        "--strategy", choices=["heuristic", "maximal", "minimal", "file"], dest="set:strategy", default="heuristic",
        help="heuristic: the median rank of each group; file: the ranks in --ranks-file (default: heuristic)",
    )  # fmt: skip
    sub.add_argument(
        "--ranks-file",
        dest="set:ranks_file",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="JSON object {group: rank}",
    )

    sub = add(
        "search",
        "find the best sub-adapter of a super-adapter on validation rows",
        SearchConfig,
        DataConfig,
        example="adapter best --base sparse --task mawps",
        defaults={"strategy": "hill_climbing"},
    )
    sub.add_argument("adapter", type=_path, help="the super-adapter's folder")
    sub.add_argument("out", type=_path, help="folder to make; started twice with one OUT, two processes share the work")
    sub.add_argument("--base", type=_path, required=True, help="the base model's folder")

    sub = add("compare", "run the paper's methods on one model and task, and show one table",
              example="recipes/quickstart.yaml --seeds 3")  # fmt: skip
    sub.add_argument("recipe", type=_path, help="YAML file: model, data and the settings that all rows share")
    sub.add_argument(
        "--out", type=_path, help="folder (default runs/NAME-compare); processes that share it share the work"
    )
    sub.add_argument("--methods", nargs="+", metavar="METHOD", help="rows (default: the ten of the paper)")
    sub.add_argument("--seeds", type=_whole(1), default=1, help="training seeds a row (default 1)")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a setting, e.g. finetune.epochs=1")

    sub = add(
        "sweep",
        "compare methods over sparsity levels",
        example="recipes/math.yaml --levels 0 0.3 0.6 2:4",
    )
    sub.add_argument("recipe", type=_path, help="YAML file: model, data and the settings that all rows share")
    sub.add_argument("--levels", nargs="+", default=["0", "0.3", "0.5", "0.7"], metavar="LEVEL",
                     help="sparsities, 0 for none, and patterns such as 2:4 (default 0 0.3 0.5 0.7)")  # fmt: skip
    sub.add_argument("--out", type=_path, help="folder (default runs/NAME-sweep)")
    sub.add_argument("--methods", nargs="+", metavar="METHOD", help="rows (default: one rank and NLS of each)")
    sub.add_argument("--seeds", type=_whole(1), default=1, help="training seeds a row (default 1)")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a setting, e.g. finetune.epochs=1")

    sub = add("merge", "merge an adapter into its base", MergeConfig, example="sparse sub_adapter merged")
    sub.add_argument("model", type=_path, help="the base model's folder")
    sub.add_argument("adapter", type=_path, help="the adapter's folder")
    sub.add_argument("out", type=_path, help="folder to make")

    sub = add("verify", "prove that a merged model is its base with its adapter", VerifyConfig, DataConfig,
              example="merged --base sparse --adapter sub_adapter")  # fmt: skip
    sub.add_argument("merged", type=_path, help="the merged model's folder")
    sub.add_argument("--base", type=_path, required=True, help="the base model's folder")
    sub.add_argument("--adapter", type=_path, required=True, help="the adapter's folder")
    sub.add_argument(
        "--out", type=_path, help="JSON file to write (default: one under runs/verify for these very arguments)"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add("inspect", "show the zeros, patterns, precision and size of a model", example="merged --json")
    sub.add_argument("model", type=_path, help="model folder")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add("evaluate", "measure a model on tasks through lm-eval", EvaluateConfig, DataConfig,
              example="merged --task gsm8k --limit 100")  # fmt: skip
    sub.add_argument("model", help="Hub id, folder, or .gguf file")
    sub.add_argument("--adapter", type=_path, help="an adapter to attach, unmerged")
    sub.add_argument(
        "--out", type=_path, help="JSON file to write (default: one under runs/evaluate for these very arguments)"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    return root
