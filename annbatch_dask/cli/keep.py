"""Commands that look after a collection: verify, gc."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from annbatch_dask.cli.given import client_of, open_collection
from annbatch_dask.cli.options import add_collection, add_command, add_json, add_of_version, positive
from annbatch_dask.cli.output import say, say_json
from annbatch_dask.formatting import format_bytes, plural

if TYPE_CHECKING:
    import argparse

__all__ = ["add_gc", "add_verify"]

_VERIFY = """\
examples:
  annbatch-dask verify atlas.zarr
  annbatch-dask verify atlas.zarr --against a.h5ad b.h5ad

Compares sizes, checksums and row fingerprints with what the build recorded, and the rows of the files with those.
"""


def add_verify(commands: Any) -> None:
    """``verify``: compare a collection with its records, and with its files."""
    parser = add_command(
        commands, "verify", _verify, "read a whole collection and compare it with its records", _VERIFY
    )
    add_collection(parser)
    add_of_version(parser)
    parser.add_argument("--against", nargs="+", metavar="FILES", help="the files it was made of")
    add_json(parser)
    parser.add_argument("--scheduler", metavar="ADDRESS", help="run on this Dask cluster, e.g. tcp://head-node:8786")
    parser.set_defaults(n_workers=None)


def _verify(args: argparse.Namespace) -> None:
    with client_of(args) as client:
        found = open_collection(args).verify(args.against, client=client)
    if args.json:
        from annbatch_dask.documents import verify_document

        say_json("verify", verify_document(args.collection, found))
        found.raise_for_problems()
        return
    for problem in found.problems:
        say(str(problem))
    for name in found.leftovers:
        say(f"{name}: does not belong to the collection; `annbatch-dask gc` removes it")
    found.raise_for_problems()
    size = f"{found.n_obs:,} cells in {plural(found.n_datasets, 'dataset')}, {format_bytes(found.n_bytes)}"
    proof = f"; they are the cells of {plural(len(found.against), 'file')}" if found.against else ""
    say(f"{args.collection}: {size}: every file and every row is as it was written{proof}")


_GC = """\
example:
  annbatch-dask gc atlas.zarr --dry-run
  annbatch-dask gc atlas.zarr --keep-last 1        removes all versions but the current one

A build that was interrupted cannot be resumed afterwards. Scratch folders that builds were given are found.
"""


def add_gc(commands: Any) -> None:
    """``gc``: remove what nobody needs."""
    parser = add_command(commands, "gc", _gc, "remove what interrupted builds left behind", _GC)
    add_collection(parser)
    parser.add_argument(
        "--keep-last",
        type=positive,
        metavar="N",
        help="remove versions too, but for the last N with the current one (default: as the builds were told to keep)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be removed, and remove nothing")
    parser.add_argument("--scratch", metavar="DIR", help="search this scratch folder too")
    parser.add_argument(
        "--abandoned",
        action="store_true",
        help="also remove leftovers of a build on another machine, on an object store",
    )


def _gc(args: argparse.Namespace) -> None:
    from annbatch_dask import DatasetCollection

    removed = DatasetCollection(args.collection).gc(
        keep_last=args.keep_last, dry_run=args.dry_run, abandoned=args.abandoned, scratch=args.scratch
    )
    if not removed:
        open_collection(args)  # a path that was mistyped has nothing to remove either
    say(f"{args.collection}: {'would remove' if args.dry_run else 'removed'} {', '.join(removed) or 'nothing'}")
