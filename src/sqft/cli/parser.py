"""The command line's parser: the commands of :mod:`sqft.cli.arguments`, each with its settings as flags."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from sqft.cli import commands
from sqft.cli.arguments import COMMANDS, THREADS, VERBOSE, Command
from sqft.cli.flags import add_flags


class _CommandParser(argparse.ArgumentParser):
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
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(
        prog="sqft",
        description="Fine-tune a compressed language model and get one compressed model out, with the proof that "
        "merging changed nothing.",
        epilog="Start with: sqft run recipes/quickstart.yaml",
    )
    subcommands = root.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    for command in COMMANDS:
        sub = subcommands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=_epilog(command),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for argument in (THREADS, VERBOSE):
            argument.add_to(sub)
        for config in command.settings:
            add_flags(sub, config, defaults=command.defaults)
        for argument in command.arguments:
            argument.add_to(sub)
        sub.set_defaults(command=getattr(commands, command.name), shared=command.shared)
    return root


def _epilog(command: Command) -> str:
    """Return an example; of a command that several processes may share, also how they are started."""
    example = f"{command.name} {command.example}"
    sharing = f"\nSeveral GPUs: torchrun --nproc-per-node 2 -m sqft {example}" if command.shared else ""
    return f"Example: sqft {example}{sharing}"
