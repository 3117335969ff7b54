"""`--import`, of the commands that take cases, libraries or runtimes of one's own."""

from __future__ import annotations

import argparse


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module, in the working directory too, or a .py file, that adds cases or subjects; may be repeated (default: none)",
    )
