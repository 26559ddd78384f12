"""The command line: one command a stage, plus `run`, `compare`, `sweep` and `plan`. Nothing else prints or exits.

The settings of a stage are flags of its command, made from the recipe's models, so flags, recipe keys and their
descriptions cannot drift apart. Exit codes: 0 done; 1 a verification failed, a row of a table failed, or a plan does
not fit; 2 the input cannot be used, or memory or disk ran out; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from typing import NoReturn

from sqft import processes
from sqft.cli import commands
from sqft.cli.arguments import parser
from sqft.errors import InputError, SqftError

_OUT_OF_MEMORY = (
    "memory ran out; what is finished stays. Take less at a time: a lower finetune.batch with more accumulation, "
    "finetune.gradient_checkpointing, a lower calibration.batch, search.batch or evaluate.batch; "
    "`sqft plan RECIPE` says what each stage needs"
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parser().parse_args(arguments)
    _set_up(options)
    try:
        if processes.count() > 1 and options.command not in (commands.run, commands.finetune):
            raise InputError(
                f"{processes.count()} processes share `run` and `finetune` alone; start one of this command"
            )
        return int(options.command(options))
    except SqftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except MemoryError:
        print(f"error: {_OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # torch.OutOfMemoryError of a GPU; the CPU's allocator raises a plain RuntimeError.
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        print(f"error: {_OUT_OF_MEMORY}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except OSError as error:
        logging.getLogger(__name__).debug("the cause, in full:", exc_info=True)
        full = "the disk is full; free some space and run the same command again: "
        print(f"error: {full if error.errno == errno.ENOSPC else ''}{error}", file=sys.stderr)
        return 2


def _set_up(options: argparse.Namespace) -> None:
    """Make the libraries quiet and our own log readable."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sqft").setLevel(logging.DEBUG if options.verbose else logging.INFO)
    if not processes.first():
        # The first process speaks for all; errors of the others are shown.
        logging.getLogger("sqft").setLevel(logging.ERROR)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if not options.verbose:
        warnings.filterwarnings("ignore")
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
