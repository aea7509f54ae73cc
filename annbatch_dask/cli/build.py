"""Commands that write a collection: shuffle, the plan of it, repack."""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annbatch_dask.cli.given import client_of, layout_of, open_collection
from annbatch_dask.cli.options import (
    add_collection,
    add_command,
    add_json,
    add_layout_options,
    add_of_version,
    positive,
)
from annbatch_dask.cli.output import say, say_json
from annbatch_dask.formatting import format_bytes, plural

if TYPE_CHECKING:
    import argparse

__all__ = ["add_plan", "add_repack", "add_shuffle"]

_SHUFFLE = """\
examples:
  annbatch-dask shuffle *.h5ad -o atlas.zarr
  annbatch-dask shuffle *.h5ad -o atlas.zarr --dataset-size 100_000 --seed 1
  annbatch-dask shuffle *.h5ad -o atlas.zarr --var-subset genes.txt --scratch /fast/disk
  annbatch-dask shuffle *.h5ad -o /shared/atlas.zarr --scheduler tcp://head-node:8786
  annbatch-dask shuffle new.h5ad -o atlas.zarr --mode append       more cells for a collection that exists

An interrupted run resumes when the same command is given again.
"""


def add_shuffle(commands: Any) -> None:
    """``shuffle``: build a collection, or add to one."""
    parser = add_command(commands, "shuffle", _shuffle, "shuffle AnnData files into a collection", _SHUFFLE)
    add_layout_options(parser)
    parser.add_argument("-o", "--output", required=True, metavar="OUT.zarr", help="the collection to write")
    parser.add_argument("--scratch", metavar="DIR", help="folder for spill files (default: beside the output)")
    parser.add_argument(
        "--performance-report", metavar="FILE", help="write Dask's performance report of the build, a page of HTML"
    )
    parser.add_argument(
        "--no-progress", dest="progress", action="store_false", default=None, help="show no progress bars"
    )
    parser.add_argument(
        "--mode",
        choices=("extend", "append", "reshuffle"),
        default="extend",
        help="for an output that holds cells: distribute new ones over its datasets, add datasets, or reshuffle all",
    )
    parser.add_argument(
        "--on-duplicate-source",
        choices=("error", "warn"),
        default="error",
        help="for a file whose cells the output has: refuse it (default), or add them again with a warning",
    )
    parser.add_argument(
        "--genes",
        choices=("collection", "union"),
        default="collection",
        help="for an output that holds cells: keep its genes, or add those of the new files",
    )
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument("--scheduler", metavar="ADDRESS", help="run on this Dask cluster, e.g. tcp://head-node:8786")
    engine.add_argument("--n-workers", type=positive, metavar="N", help="worker processes on this machine")


def _shuffle(args: argparse.Namespace) -> None:
    from annbatch_dask import DatasetCollection

    start = time.perf_counter()
    with client_of(args) as client:
        collection = DatasetCollection(args.output).add_adatas(
            args.files,
            **layout_of(args),
            mode=args.mode,
            genes=args.genes,
            on_duplicate_source=args.on_duplicate_source,
            client=client,
            scratch=args.scratch,
            progress=args.progress,
            performance_report=args.performance_report,
        )
    shape = f"{collection.n_obs:,} cells x {collection.n_vars:,} genes"
    say(f"{args.output}: {shape} in {plural(len(collection), 'dataset')}, {time.perf_counter() - start:.1f} s")


_PLAN = """\
example:
  annbatch-dask plan *.h5ad --dataset-size 2GB
"""


def add_plan(commands: Any) -> None:
    """``plan``: what a build would do."""
    parser = add_command(commands, "plan", _plan, "print the plan of a shuffle, and run nothing", _PLAN)
    add_layout_options(parser)
    add_json(parser)


def _plan(args: argparse.Namespace) -> None:
    from annbatch_dask import DatasetCollection

    # A path where nothing is: a plan writes nothing, to it or elsewhere.
    target = Path(tempfile.gettempdir(), f"annbatch-dask-plan-{uuid.uuid4().hex}.zarr")
    plan = DatasetCollection(target).plan_adatas(args.files, **layout_of(args))
    if args.json:
        from annbatch_dask.documents import plan_document

        say_json("plan", plan_document(plan))
    else:
        say(plan.summary())


_REPACK = """\
examples:
  annbatch-dask repack atlas.zarr -o atlas-packed.zarr --layout packed

Reads every dataset back and compares its rows before the new collection is published. An interrupted run resumes when
the same command is given again.
"""


def add_repack(commands: Any) -> None:
    """``repack``: the same collection in the other layout."""
    parser = add_command(
        commands, "repack", _repack, "convert a collection to the other layout, in the same order", _REPACK
    )
    add_collection(parser)
    add_of_version(parser)
    parser.add_argument("-o", "--output", required=True, metavar="NEW.zarr", help="the collection to write")
    parser.add_argument("--layout", choices=("open", "packed"), required=True, help="layout of the new collection")


def _repack(args: argparse.Namespace) -> None:
    new = open_collection(args).repack(args.output, args.layout)
    manifest = new.manifest
    assert manifest is not None  # it was just written
    size = format_bytes(sum(d.n_bytes for d in manifest.datasets))
    say(f"{args.output}: {new.n_obs:,} cells in {plural(len(new), 'dataset')}, layout {args.layout}, {size}")
