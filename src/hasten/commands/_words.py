"""How every command reads the words behind its name; nothing is imported here that makes help wait."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from hasten.errors import HastenError


def parser(command: str, description: str, *, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of ``hasten COMMAND``, whose errors are one line, as hasten's own; give it to ``parsed``."""
    made = argparse.ArgumentParser(f"hasten {command}", description=description, epilog=epilog, add_help=False)

    def refuse(message: str) -> NoReturn:
        raise HastenError(f"{command}: {message}; see hasten {command} --help")

    made.error = refuse  # type: ignore[method-assign] # argparse prints its usage and exits with 2
    return made


def parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace | None:
    """What ``words`` say, in any order; None where they ask for help, which is printed."""
    parser.add_argument("-h", "--help", action="store_true", help="this")
    found = parser.parse_intermixed_args(words)
    if found.help:
        parser.print_help()
        return None
    return found
