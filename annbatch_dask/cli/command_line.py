"""The command line: ``annbatch-dask shuffle | plan | status | info | versions | report | verify | gc | stream ...``."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING, Any

import annbatch_dask
from annbatch_dask.cli.build import add_plan, add_repack, add_shuffle
from annbatch_dask.cli.keep import add_gc, add_verify
from annbatch_dask.cli.look import add_info, add_report, add_stats, add_status, add_versions
from annbatch_dask.cli.output import ReaderGoneError, say_aside
from annbatch_dask.cli.stream import add_mixing, add_stream
from annbatch_dask.errors import AnnbatchDaskError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "make_parser"]

_DESCRIPTION = "Shuffle AnnData files into one sharded zarr collection with Dask, and stream mini-batches from it."
_EXAMPLES = """\
examples:
  annbatch-dask plan a.h5ad b.h5ad                    tasks, bytes and peak memory; runs nothing
  annbatch-dask shuffle a.h5ad b.h5ad -o atlas.zarr   on all cores of this machine
  annbatch-dask status atlas.zarr                     how far a build is, from any machine
  annbatch-dask info atlas.zarr
  annbatch-dask report atlas.zarr -o report.html      a page for the browser, with figures
  annbatch-dask verify atlas.zarr --against *.h5ad    proof that no cell was lost or changed
  annbatch-dask stream atlas.zarr --by cell_type      speed, and how well batches are mixed
  annbatch-dask mixing atlas.zarr --plot mixing.png   how well batches are mixed, from obs alone
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv
        Arguments; those of the process if None.

    Returns
    -------
    0 on success, 1 on an error (one line on standard error), 130 after Ctrl-C. Wrong usage exits with 2.
    """
    args = make_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal cannot show end no command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    except ReaderGoneError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:  # noqa: BLE001 - any error becomes one line
        if args.debug:
            raise
        return _fail(_one_line(error), code=1)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what is parsed has the command's function as ``run``."""
    parser = argparse.ArgumentParser(
        prog="annbatch-dask",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"annbatch-dask {annbatch_dask.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_shuffle(commands)
    add_plan(commands)
    add_status(commands)
    add_info(commands)
    add_versions(commands)
    add_report(commands)
    add_stats(commands)
    add_verify(commands)
    add_repack(commands)
    add_gc(commands)
    add_stream(commands)
    add_mixing(commands)
    return parser


def _one_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if not isinstance(error, AnnbatchDaskError | OSError):  # may say little by itself: KeyError('obs')
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    parts = [text, *getattr(error, "__notes__", [])]
    return "; ".join(" ".join(part.split()) for part in parts)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say_aside(f"annbatch-dask: warning: {message}")


def _fail(message: str, *, code: int) -> int:
    say_aside(f"annbatch-dask: error: {message}")
    return code
