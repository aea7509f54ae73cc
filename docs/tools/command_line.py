"""A hook of mkdocs that writes the page of the command line from its parser."""

from __future__ import annotations

import argparse
import html
import re
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

from annbatch_dask import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

PAGE = "reference/command-line.md"
HEAD = """# Command line

An error is one line on standard error and exit code 1. `--debug` shows its traceback. Wrong usage exits with 2,
and Ctrl-C with 130. This page is generated from the parser, so it says what `annbatch-dask COMMAND --help` says.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those of docs/."""
    files.append(File.generated(config, PAGE, content="\n".join(page())))
    return files


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    parser = cli.make_parser()
    yield HEAD
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        yield f"## {name}\n\n{command.description}\n"
        yield f"```text\n{usage(command)}\n```\n"
        yield "| argument | meaning |\n|---|---|"
        yield from map(row, sorted(shown(command), key=lambda a: (not a.required, a.dest == "debug")))
        yield f"\n{epilog(command.epilog or '')}\n"


def usage(command: argparse.ArgumentParser) -> str:
    """Return how to call a command: what it must be given, and that it has options."""
    needed = [spelled(a) for a in command._actions if a.required]
    return " ".join([command.prog, *needed, "[options]"])


def shown(command: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of a command in their order."""
    return [a for a in command._actions if a.help != argparse.SUPPRESS and a.dest != "help"]


def spelled(action: argparse.Action) -> str:
    """Return an argument as it is typed."""
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    value = action.metavar or (choices if action.choices else action.dest.upper())
    value = f"{value} ..." if action.nargs == "+" else str(value)
    if not action.option_strings:
        return value
    return action.option_strings[-1] + ("" if action.nargs == 0 else f" {value}")


def row(action: argparse.Action) -> str:
    """Return the line of the table for an argument."""
    text = html.escape(action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    names = ", ".join([*action.option_strings[:-1], spelled(action)]) if action.option_strings else spelled(action)
    return f"| `{names}` | {text.replace('|', '&#124;')} |"


def epilog(text: str) -> str:
    """Return the examples as a block of shell, and what follows them as prose."""
    _, _, rest = text.partition(":\n")
    lines = rest.splitlines()
    commands = [re.sub(r"\s{2,}(?=\S)", "  # ", line.strip()) for line in lines if line.startswith("  ")]
    prose = [line.strip() for line in lines if line and not line.startswith("  ")]
    return "```sh\n" + "\n".join(commands) + "\n```\n\n" + " ".join(prose)
