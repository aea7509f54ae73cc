"""Commands that tell of a collection: status, info, versions, report, stats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from annbatch_dask.cli.given import open_collection
from annbatch_dask.cli.options import add_collection, add_command, add_json, add_of_version, positive
from annbatch_dask.cli.output import say, say_json, visible
from annbatch_dask.errors import AnnbatchDaskError
from annbatch_dask.formatting import format_bytes, plural
from annbatch_dask.storage.filesystems import check_parent, name_errors

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from annbatch_dask.collection import DatasetCollection

__all__ = ["add_info", "add_report", "add_stats", "add_status", "add_versions"]

_STATUS = """\
examples:
  annbatch-dask status atlas.zarr
  annbatch-dask status s3://bucket/atlas.zarr --json
  watch annbatch-dask status /shared/atlas.zarr

Reads what a build leaves in the folder of the collection and beside it, so it tells of builds on other machines too,
and of those that were interrupted. It writes and locks nothing.
"""


def add_status(commands: Any) -> None:
    """``status``: how far a build is."""
    parser = add_command(
        commands, "status", _status, "tell of builds: what runs, how far, what was interrupted", _STATUS
    )
    add_collection(parser)
    add_json(parser)


def _status(args: argparse.Namespace) -> None:
    from annbatch_dask import DatasetCollection

    found = DatasetCollection(args.collection).status()
    if args.json:
        say_json("status", found.to_json())
    else:
        say(str(found))


_INFO = """\
examples:
  annbatch-dask info atlas.zarr
  annbatch-dask info atlas.zarr --json
"""


def add_info(commands: Any) -> None:
    """``info``: what a collection holds."""
    parser = add_command(commands, "info", _info, "print the content of a collection", _INFO)
    add_collection(parser)
    add_of_version(parser)
    add_json(parser)


def _info(args: argparse.Namespace) -> None:
    if args.json:
        from annbatch_dask.documents import info_document

        say_json("info", info_document(open_collection(args), _bytes_on_disk(args.collection)))
        return
    for name, value in _facts(open_collection(args)):
        say(f"{name + ':':<13} {visible(str(value))}")


def _facts(collection: DatasetCollection) -> Iterator[tuple[str, object]]:
    from annbatch_dask.report import describe_element, element_names

    groups = list(collection)
    yield "collection", collection.path
    yield "datasets", len(groups)
    yield "cells", f"{collection.n_obs:,}"
    yield "genes", f"{collection.n_vars:,}"
    for name in element_names(groups[0]):
        yield name, describe_element(groups[0], name)
    yield "on disk", format_bytes(_bytes_on_disk(collection.path))
    manifest = collection.manifest
    if manifest is None:
        yield "shuffle", "not recorded (not written by annbatch-dask)"
        return
    yield "version", manifest.version
    for build in manifest.builds:
        order = "{name}, version {version}".format(**build.permutation)
        layout = "" if build.layout == "open" else f", layout {build.layout}"
        yield "build", f"{build.mode}, {plural(len(build.sources), 'source')}, {order}, seed {build.seed}{layout}"
        if build.naming is not None:
            yield "genes named", build.naming.rules
            yield from build.naming.effects
        if (found := build.duplicates) is not None:
            what = "dropped" if found.mode == "drop" else "kept"
            yield "duplicates", f"{plural(found.n_obs, 'cell')} with the X of an earlier cell, {what}"
    for source in manifest.sources:
        yield "source", f"{source.path} ({source.n_obs:,} cells)"


def _bytes_on_disk(path: str) -> int:
    from annbatch_dask.storage.folder import Folder

    return sum(Folder(path).sizes().values())


_VERSIONS = """\
examples:
  annbatch-dask versions atlas.zarr
  annbatch-dask shuffle new.h5ad -o atlas.zarr --keep 2    what it was before stays, as a version
  annbatch-dask verify atlas.zarr --of-version 1

Commands that read a collection take --of-version. `annbatch-dask gc --keep-last N` removes versions.
"""


def add_versions(commands: Any) -> None:
    """``versions``: which there are."""
    parser = add_command(commands, "versions", _versions, "list a collection's versions, and which are kept", _VERSIONS)
    add_collection(parser)
    add_json(parser)


def _versions(args: argparse.Namespace) -> None:
    found = open_collection(args).versions
    if args.json:
        say_json("versions", {"collection": args.collection, "versions": [v.to_json() for v in found]})
        return
    for version in found:
        say(str(version))
    if not found:
        say(f"{args.collection}: no versions are recorded (not written by annbatch-dask)")


_REPORT = """\
example:
  annbatch-dask report atlas.zarr -o report.html

One file that a browser opens without a network: sources, shared genes, cells per category, values per cell, sizes,
mixing, and the builds with their timings.
"""


def add_report(commands: Any) -> None:
    """``report``: a page for the browser."""
    parser = add_command(commands, "report", _report, "write a page on a collection's content and builds", _REPORT)
    add_collection(parser)
    add_of_version(parser)
    parser.add_argument(
        "-o", "--output", default="report.html", metavar="FILE", help="the page to write (default: report.html)"
    )


def _report(args: argparse.Namespace) -> None:
    check_parent(args.output)
    report = open_collection(args).report()
    report.save(args.output)
    say(f"{args.output}: {report.n_obs:,} cells, {format_bytes(report.n_bytes_stored)}")


_STATS = """\
examples:
  annbatch-dask stats atlas.zarr -o genes.csv                    mean and variance of each gene
  annbatch-dask stats atlas.zarr -o genes.csv --by donor         the same of each donor
  annbatch-dask stats atlas.zarr -o genes.txt --highly-variable 2000 --batch-key donor

A collection that was built with --stats, and --stats-by of the column, has the sums; otherwise X is read once. The
list of genes is one that --var-subset reads.
"""


def add_stats(commands: Any) -> None:
    """``stats``: a table of genes, or a list of variable ones."""
    parser = add_command(
        commands, "stats", _stats, "write statistics of genes, or a list of those that vary most", _STATS
    )
    add_collection(parser)
    add_of_version(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the table (CSV) or list to write")
    parser.add_argument("--by", metavar="COLUMN", help="by the categories of this column of obs")
    parser.add_argument(
        "--highly-variable", type=positive, metavar="N", help="write the names of the N most variable genes instead"
    )
    parser.add_argument(
        "--flavor",
        choices=("seurat", "cell_ranger", "seurat_v3"),
        help="how they are found, as in scanpy (default: seurat)",
    )
    parser.add_argument("--batch-key", metavar="COLUMN", help="find them within each batch, and then those of most")


def _check_fit(args: argparse.Namespace) -> None:
    """Refuse options of a table for a list, and of a list for a table: they would have no effect."""
    if args.highly_variable is not None and args.by is not None:
        msg = f"--by {args.by} is of the table; for variable genes within each {args.by}, give --batch-key {args.by}"
        raise AnnbatchDaskError(msg)
    if args.highly_variable is None and (args.batch_key, args.flavor) != (None, None):
        msg = "--flavor and --batch-key are of variable genes; give --highly-variable N too, or --by for a table"
        raise AnnbatchDaskError(msg)


def _stats(args: argparse.Namespace) -> None:
    check_parent(args.output)
    _check_fit(args)
    collection = open_collection(args)
    if args.highly_variable is None:
        table = collection.gene_stats(args.by)
        with name_errors(args.output):
            table.to_csv(args.output)
        what = plural(collection.n_vars, "gene") + ("" if args.by is None else f" by {args.by}")
    else:
        flavor: Any = args.flavor or "seurat"
        found = collection.highly_variable(args.highly_variable, flavor=flavor, batch_key=args.batch_key)
        with name_errors(args.output):
            Path(args.output).write_text("".join(f"{name}\n" for name in found), encoding="utf-8")
        what = f"{plural(len(found), 'highly variable gene')}, {flavor}"
    say(f"{args.output}: {what}, of {collection.n_obs:,} cells")
