"""The command line: one command a stage, plus `run`, `compare`, `sweep` and `plan`. Nothing else prints or exits.

The settings of a stage are flags of its command, made from the recipe's models, so flags, recipe keys and their
descriptions cannot drift apart. Exit codes: 0 done; 1 a verification failed, a row of a table failed, a plan does not
fit, or something unexpected; 2 the input cannot be used, or memory or disk ran out; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from sqft import __version__, processes
from sqft.cli.arguments import COMMANDS
from sqft.cli.parser import parser
from sqft.errors import InputError, SqftError
from sqft.memory import is_out_of_memory

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
        if processes.count() > 1:
            _join(options)
        code = int(options.command(options))
        processes.leave_group()
        return code
    except SqftError as error:
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted; the same command continues where it stopped")
        return 130
    except OSError as error:
        logging.getLogger(__name__).debug("the cause, in full:", exc_info=True)
        full = "the disk is full; free some space and run the same command again: "
        _say(f"error: {full if error.errno == errno.ENOSPC else ''}{error}")
        return 2
    except Exception as error:
        if is_out_of_memory(error):
            detail = f": {str(error).splitlines()[0]}" if str(error) else ""
            _say(f"error: {_OUT_OF_MEMORY}{detail}")
            return 2
        _tell_unexpected(error, verbose=options.verbose)
        return 1


def _tell_unexpected(error: Exception, *, verbose: bool) -> None:
    """Say that something failed that should not have, and what a report of it needs."""
    if verbose:
        traceback.print_exc()
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}sqft{os.sep}" in frame.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "unknown"
    _say(
        f"error: unexpected {type(error).__name__} at {place}: {str(error) or 'no message'}\n"
        f"This is a fault of sqft {__version__}. What was finished before stays; the same command goes on from it. "
        "Please report it as CONTRIBUTING.md says, with the recipe or command"
        f"{'' if verbose else ' and what it prints with --verbose'}."
    )


def _say(text: str) -> None:
    """Print why the command ends; of several processes that do, the first to end says it for all."""
    if processes.speaks():
        print(f"process {processes.rank()}: {text}" if processes.rank() else text, file=sys.stderr)


def _join(options: argparse.Namespace) -> None:
    """Meet the other processes of this command."""
    if not options.shared:
        named = ", ".join(f"`{command.name}`" for command in COMMANDS if command.shared)
        raise InputError(f"{processes.count()} processes can share {named} alone; start one of this command")
    processes.barrier()


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
