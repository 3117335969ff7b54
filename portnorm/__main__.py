"""The command line, `portnorm demo | train | import | export | verify | …`: each a call of the library and a table."""

from __future__ import annotations

import argparse
import importlib
import json
import keyword
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

import portnorm
from portnorm.commands import COMMANDS
from portnorm.errors import ConformanceError, PortnormError
from portnorm.interrupts import came, end, undo_all, watch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what was asked, 1 if a graph differs from its model, 2 for an error that the caller can mend.

    An interrupt ends it within two seconds, with 130: files that are not whole and processes that were started are gone then. So does a
    reader of standard output that has gone, such as `head`, with 141.
    """
    try:
        try:
            return _interruptible(arguments)
        finally:
            _flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        undo_all()
        return 141


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _reader_has_gone() -> bool:
    """Whether standard output is the pipe that broke; what is left for it goes nowhere from now on."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if not pipe.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _interruptible(arguments: Sequence[str] | None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    left = [f"portnorm {' '.join(given[:1])}: interrupted; files that were not complete are not there"]

    def say() -> None:
        while left:
            print(left.pop(), file=sys.stderr)

    if arguments is None:
        watch(say)
    try:
        return _run(_parser(given).parse_args(given))
    except (Exception, KeyboardInterrupt) as error:
        if not (isinstance(error, KeyboardInterrupt) or came()):
            raise
        say()
        if arguments is None:
            end()
        undo_all()
        return 130


def _run(options: argparse.Namespace) -> int:
    try:
        result: dict[str, Any] = options.run(options)
    except PortnormError as error:
        if options.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"portnorm {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, ConformanceError) else 2
    if options.json:
        print(json.dumps(result, default=str))
    return int(getattr(options, "failed", False))


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """All commands, and the options of the one that is named."""
    parser = argparse.ArgumentParser(prog="portnorm", description=portnorm.__doc__)
    parser.add_argument("--version", action="version", version=f"portnorm {portnorm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name in given:
            module = importlib.import_module(f"portnorm.commands.{name}_" if keyword.iskeyword(name) else f"portnorm.commands.{name}")
            sub.add_argument("--json", action="store_true", help="print the result as JSON, for machines")
            module.add_options(sub)
            sub.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
