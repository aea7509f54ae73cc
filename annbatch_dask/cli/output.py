"""What commands print: lines, in which names from anybody's files do nothing to a terminal."""

from __future__ import annotations

import json
import sys
from typing import IO, Any

import annbatch_dask
from annbatch_dask.errors import StorageError

__all__ = ["ReaderGoneError", "say", "say_aside", "say_json", "visible"]


class ReaderGoneError(Exception):
    """Who read the output has read enough, as ``| head`` does: no error of the command's."""


def say(text: str) -> None:
    """Print lines; names in them may come from anybody's files, and do nothing to a terminal."""
    _print(_lines(text), sys.stdout)


def say_aside(text: str) -> None:
    """The same for errors and warnings, which are no part of the output."""
    _print(_lines(text), sys.stderr)


def _lines(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))


def say_json(command: str, values: dict[str, Any]) -> None:
    """Print a document of JSON, whose escapes do nothing to a terminal; its first fields say what it is."""
    _print(json.dumps({"annbatch_dask": annbatch_dask.__version__, "command": command} | values, indent=1), sys.stdout)


def _print(text: str, file: IO[str] | None) -> None:
    if file is None:  # it was closed before this process began, and print would take another
        return
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        raise ReaderGoneError from None
    except OSError as e:
        if file is sys.stderr:  # nor could that be told
            return
        msg = f"the output cannot be written: {e.strerror}; make room, or send it elsewhere"
        raise StorageError(msg) from e


def visible(text: str) -> str:
    """A text with escapes in the place of control characters, and of those that turn the direction of writing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
