"""The command ``annbatch-dask``: each module has some commands, with what they say of themselves."""

from annbatch_dask.cli.command_line import main, make_parser

__all__ = ["main", "make_parser"]
