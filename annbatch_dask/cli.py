"""The command line: ``annbatch-dask shuffle | plan | status | info | versions | report | verify | gc | stream ...``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import uuid
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import psutil

import annbatch_dask
from annbatch_dask.errors import AnnbatchDaskError, LayoutError
from annbatch_dask.formatting import format_bytes, plural
from annbatch_dask.sizes import parse_nbytes
from annbatch_dask.storage.filesystems import check_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from annbatch_dask.collection import DatasetCollection
    from annbatch_dask.mixing import Mixing

__all__ = ["main"]

DESCRIPTION = "Shuffle AnnData files into one sharded zarr collection with Dask, and stream mini-batches from it."
EXAMPLES = {
    "": """\
examples:
  annbatch-dask plan a.h5ad b.h5ad                    tasks, bytes and peak memory; runs nothing
  annbatch-dask shuffle a.h5ad b.h5ad -o atlas.zarr   on all cores of this machine
  annbatch-dask status atlas.zarr                     how far a build is, from any machine
  annbatch-dask info atlas.zarr
  annbatch-dask report atlas.zarr -o report.html      a page for the browser, with figures
  annbatch-dask verify atlas.zarr --against *.h5ad    proof that no cell was lost or changed
  annbatch-dask stream atlas.zarr --by cell_type      speed, and how well batches are mixed
  annbatch-dask mixing atlas.zarr --plot mixing.png   how well batches are mixed, from obs alone
""",
    "shuffle": """\
examples:
  annbatch-dask shuffle *.h5ad -o atlas.zarr
  annbatch-dask shuffle *.h5ad -o atlas.zarr --dataset-size 100_000 --seed 1
  annbatch-dask shuffle *.h5ad -o atlas.zarr --var-subset genes.txt --scratch /fast/disk
  annbatch-dask shuffle *.h5ad -o /shared/atlas.zarr --scheduler tcp://head-node:8786
  annbatch-dask shuffle new.h5ad -o atlas.zarr --mode append       more cells for a collection that exists

An interrupted run resumes when the same command is given again.
""",
    "plan": """\
example:
  annbatch-dask plan *.h5ad --dataset-size 2GB
""",
    "status": """\
examples:
  annbatch-dask status atlas.zarr
  annbatch-dask status s3://bucket/atlas.zarr --json
  watch annbatch-dask status /shared/atlas.zarr

Reads what a build leaves in the folder of the collection and beside it, so it tells of builds on other machines too,
and of those that were interrupted. It writes and locks nothing.
""",
    "info": """\
examples:
  annbatch-dask info atlas.zarr
  annbatch-dask info atlas.zarr --json
""",
    "versions": """\
examples:
  annbatch-dask versions atlas.zarr
  annbatch-dask shuffle new.h5ad -o atlas.zarr --keep 2    what it was before stays, as a version
  annbatch-dask verify atlas.zarr --of-version 1

Commands that read a collection take --of-version. `annbatch-dask gc --keep-last N` removes versions.
""",
    "report": """\
example:
  annbatch-dask report atlas.zarr -o report.html

One file that a browser opens without a network: sources, shared genes, cells per category, values per cell, sizes,
mixing, and the builds with their timings.
""",
    "stats": """\
examples:
  annbatch-dask stats atlas.zarr -o genes.csv                    mean and variance of each gene
  annbatch-dask stats atlas.zarr -o genes.csv --by donor         the same of each donor
  annbatch-dask stats atlas.zarr -o genes.txt --highly-variable 2000 --batch-key donor

A collection that was built with --stats, and --stats-by of the column, has the sums; otherwise X is read once. The
list of genes is one that --var-subset reads.
""",
    "repack": """\
examples:
  annbatch-dask repack atlas.zarr -o atlas-packed.zarr --layout packed

Reads every dataset back and compares its rows before the new collection is published. An interrupted run resumes when
the same command is given again.
""",
    "verify": """\
examples:
  annbatch-dask verify atlas.zarr
  annbatch-dask verify atlas.zarr --against a.h5ad b.h5ad

Compares sizes, checksums and row fingerprints with what the build recorded, and the rows of the files with those.
""",
    "gc": """\
example:
  annbatch-dask gc atlas.zarr --dry-run
  annbatch-dask gc atlas.zarr --keep-last 1        removes all versions but the current one

A build that was interrupted cannot be resumed afterwards. Scratch folders that builds were given are found.
""",
    "stream": """\
examples:
  annbatch-dask stream atlas.zarr
  annbatch-dask stream atlas.zarr --by donor --dense --batch-size 1024

The share of the ideal entropy is 1 where batches are mixed like uniformly random ones, and near 0 where each
batch holds one class.
""",
    "mixing": """\
examples:
  annbatch-dask mixing atlas.zarr
  annbatch-dask mixing atlas.zarr --by donor --batch-size 1024 --chunk-size 64 --plot mixing.png

Works out the batches of an epoch with these settings; only obs is read. The ideal is the mean entropy of batches
that are drawn uniformly at random. If the collection
was not shuffled, more and smaller chunks bring batches closer to the ideal.
""",
}


class _ReaderGoneError(Exception):
    """Who read the output has read enough, as ``| head`` does: no error of the command's."""


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
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal cannot show end no command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    except _ReaderGoneError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:  # noqa: BLE001 - any error becomes one line
        if args.debug:
            raise
        return _fail(_one_line(error), code=1)
    return 0


def _shuffle(args: argparse.Namespace) -> None:
    from annbatch_dask import DatasetCollection

    start = time.perf_counter()
    with _client(args) as client:
        collection = DatasetCollection(args.output).add_adatas(
            args.files,
            **_layout(args),
            mode=args.mode,
            genes=args.genes,
            on_duplicate_source=args.on_duplicate_source,
            client=client,
            scratch=args.scratch,
            progress=args.progress,
            performance_report=args.performance_report,
        )
    shape = f"{collection.n_obs:,} cells x {collection.n_vars:,} genes"
    _say(f"{args.output}: {shape} in {plural(len(collection), 'dataset')}, {time.perf_counter() - start:.1f} s")


def _plan(args: argparse.Namespace) -> None:
    from annbatch_dask import DatasetCollection

    # A path where nothing is: a plan writes nothing, to it or elsewhere.
    target = Path(tempfile.gettempdir(), f"annbatch-dask-plan-{uuid.uuid4().hex}.zarr")
    plan = DatasetCollection(target).plan_adatas(args.files, **_layout(args))
    if args.json:
        from annbatch_dask.documents import plan_document

        _say_json("plan", plan_document(plan))
    else:
        _say(plan.summary())


def _status(args: argparse.Namespace) -> None:
    from annbatch_dask import DatasetCollection

    found = DatasetCollection(args.collection).status()
    if args.json:
        _say_json("status", found.to_json())
    else:
        _say(str(found))


def _info(args: argparse.Namespace) -> None:
    if args.json:
        from annbatch_dask.documents import info_document

        _say_json("info", info_document(_open(args), _bytes_on_disk(args.collection)))
        return
    for name, value in _facts(_open(args)):
        _say(f"{name + ':':<13} {_visible(str(value))}")


def _versions(args: argparse.Namespace) -> None:
    found = _open(args).versions
    if args.json:
        _say_json("versions", {"collection": args.collection, "versions": [v.to_json() for v in found]})
        return
    for version in found:
        _say(str(version))
    if not found:
        _say(f"{args.collection}: no versions are recorded (not written by annbatch-dask)")


def _verify(args: argparse.Namespace) -> None:
    with _client(args) as client:
        found = _open(args).verify(args.against, client=client)
    if args.json:
        from annbatch_dask.documents import verify_document

        _say_json("verify", verify_document(args.collection, found))
        found.raise_for_problems()
        return
    for problem in found.problems:
        _say(str(problem))
    for name in found.leftovers:
        _say(f"{name}: does not belong to the collection; `annbatch-dask gc` removes it")
    found.raise_for_problems()
    size = f"{found.n_obs:,} cells in {plural(found.n_datasets, 'dataset')}, {format_bytes(found.n_bytes)}"
    proof = f"; they are the cells of {len(found.against)} files" if found.against else ""
    _say(f"{args.collection}: {size}: every file and every row is as it was written{proof}")


def _repack(args: argparse.Namespace) -> None:
    new = _open(args).repack(args.output, args.layout)
    manifest = new.manifest
    assert manifest is not None  # it was just written
    size = format_bytes(sum(d.n_bytes for d in manifest.datasets))
    _say(f"{args.output}: {new.n_obs:,} cells in {plural(len(new), 'dataset')}, layout {args.layout}, {size}")


def _report(args: argparse.Namespace) -> None:
    check_parent(args.output)
    report = _open(args).report()
    report.save(args.output)
    _say(f"{args.output}: {report.n_obs:,} cells, {format_bytes(report.n_bytes_stored)}")


def _stats(args: argparse.Namespace) -> None:
    check_parent(args.output)
    collection = _open(args)
    if args.highly_variable is None:
        collection.gene_stats(args.by).to_csv(args.output)
        what = plural(collection.n_vars, "gene") + ("" if args.by is None else f" by {args.by}")
    else:
        found = collection.highly_variable(args.highly_variable, flavor=args.flavor, batch_key=args.batch_key)
        Path(args.output).write_text("".join(f"{name}\n" for name in found), encoding="utf-8")
        what = f"{plural(len(found), 'highly variable gene')}, {args.flavor}"
    _say(f"{args.output}: {what}, of {collection.n_obs:,} cells")


def _gc(args: argparse.Namespace) -> None:
    from annbatch_dask import DatasetCollection

    removed = DatasetCollection(args.collection).gc(
        keep_last=args.keep_last, dry_run=args.dry_run, abandoned=args.abandoned, scratch=args.scratch
    )
    _say(f"{args.collection}: {'would remove' if args.dry_run else 'removed'} {', '.join(removed) or 'nothing'}")


def _stream(args: argparse.Namespace) -> None:
    from annbatch_dask.mixing import measure_mixing

    collection = _open(args)
    column, codes = _classes(collection, args.by)
    loader = _loader(args).use_collection(collection)
    for epoch in range(args.epochs):
        start = time.perf_counter()
        rows = [batch["index"] for batch in loader]
        seconds = time.perf_counter() - start
        mixing = measure_mixing(codes[r] for r in rows)
        _say(f"epoch {epoch}: {_epoch_line(sum(map(len, rows)), seconds, column, mixing)}")


def _mixing(args: argparse.Namespace) -> None:
    from annbatch_dask.mixing import measure_mixing, plot_mixing, sampled_batches

    if args.plot is not None:
        check_parent(args.plot)
    column, codes = _classes(_open(args), args.by)
    mixing = measure_mixing(sampled_batches(_loader(args).batch_sampler, codes))
    line = _mixing_line(column, mixing)
    _say(f"{args.collection}: {line}: {mixing.mean_entropy:.3f} of {mixing.ideal_entropy:.3f} bits")
    if args.plot is None:
        return
    try:
        plot_mixing(mixing, args.plot, title=f"mixing of {column} in batches of {args.batch_size:,}")
    except ImportError as error:
        msg = f"--plot needs matplotlib ({error}): pip install matplotlib"
        raise AnnbatchDaskError(msg) from error
    except ValueError as error:  # a suffix that is no format of a picture
        msg = f"{args.plot}: {error}"
        raise AnnbatchDaskError(msg) from error
    _say(f"picture: {args.plot}")


def _loader(args: argparse.Namespace) -> Any:
    from annbatch_dask import Loader

    try:
        return Loader(
            batch_size=args.batch_size,
            chunk_size=args.chunk_size,
            preload_nchunks=args.preload_nchunks,
            shuffle=True,
            return_index=True,
            preload_to_gpu=False,
            rng=np.random.default_rng(args.seed),
            dense=args.dense,
            dtype=np.float32 if args.dense else None,
            layers=(),
            obsm=(),
        )
    except ValueError as error:  # sizes that do not fit together
        raise AnnbatchDaskError(str(error)) from error


def _epoch_line(n_obs: int, seconds: float, column: str, mixing: Mixing) -> str:
    return f"{n_obs:,} cells in {seconds:.1f} s, {n_obs / seconds:,.0f} cells/s; {_mixing_line(column, mixing)}"


def _mixing_line(column: str, mixing: Mixing) -> str:
    return (
        f"{mixing.n_batches} batches with {mixing.mean_classes:.1f} distinct {column} on average, "
        f"{mixing.share:.3f} of the ideal batch entropy"
    )


def _classes(collection: DatasetCollection, column: str | None) -> tuple[str, NDArray[np.int64]]:
    """Return the column to judge mixing by, and each row's class in it, missing values being one class."""
    import pandas as pd

    obs = collection.obs(None if column is None else [column], names=False)
    if column is None:
        found = [c for c in obs.columns if isinstance(obs[c].dtype, pd.CategoricalDtype)]
        column = next((c for c in ("cell_type", *found) if c in obs.columns and c != "src_path"), "src_path")
    if column not in obs.columns:
        names = ", ".join(collection.obs(names=False).columns)
        msg = f"{collection.path}: obs has no column {column!r}; give --by one of: {names}"
        raise AnnbatchDaskError(msg)
    return column, pd.factorize(obs[column], use_na_sentinel=False)[0].astype(np.int64)


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
        yield "build", f"{build.mode}, {len(build.sources)} sources, {order}, seed {build.seed}{layout}"
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


def _open(args: argparse.Namespace) -> DatasetCollection:
    from annbatch_dask import DatasetCollection

    collection = DatasetCollection(args.collection, mode="r", version=getattr(args, "of_version", None))
    if collection.is_empty:
        msg = f"{args.collection} is not a collection, or an empty one; write one with `annbatch-dask shuffle`"
        raise AnnbatchDaskError(msg)
    return collection


@contextlib.contextmanager
def _client(args: argparse.Namespace) -> Iterator[Any]:
    """The cluster the options ask for; None leaves the choice to the library."""
    from annbatch_dask.engines.local_cluster import connect, local_client

    if args.scheduler is not None:
        with connect(args.scheduler) as client:
            yield client
    elif args.n_workers is not None:
        with local_client(**_worker_options(args.n_workers, args.memory_limit)) as client:
            yield client
    else:
        yield None


def _worker_options(n_workers: int, memory_limit: int | None) -> dict[str, Any]:
    """Return equal shares of this machine's cores and memory."""
    from dask.system import CPU_COUNT

    memory = psutil.virtual_memory().total // n_workers if memory_limit is None else memory_limit
    return {
        "n_workers": n_workers,
        "threads_per_worker": max(CPU_COUNT // n_workers, 1),
        "memory_limit": memory,
    }


def _layout(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dataset_size": args.dataset_size,
        "n_obs_per_chunk": args.n_obs_per_chunk,
        "shard_size": args.shard_size,
        "seed": args.seed,
        "shuffle": args.shuffle,
        "var_subset": None if args.var_subset is None else _read_names(args.var_subset),
        "merge": args.merge,
        "groupby": args.groupby,
        "elements": args.elements,
        "counts": args.counts,
        "allow_mixed_counts": args.allow_mixed_counts,
        "layout": args.layout,
        "gene_order": args.gene_order,
        "where": args.where,
        "qc": _qc(args),
        "var_key": _keys(args.var_key),
        "gene_map": args.gene_map,
        "strip_versions": args.strip_versions,
        "on_duplicate_gene": args.on_duplicate_gene,
        "duplicates": args.duplicates,
        "stats": args.stats,
        "stats_by": args.stats_by,
        "keep": args.keep,
        "memory_limit": args.memory_limit,
    }


def _qc(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the rules on counts that the options make; None for none."""
    found = {name: getattr(args, name) for name in ("min_counts", "max_counts", "min_genes", "max_genes")}
    found |= {"max_fraction": {k: float(v) for k, v in args.max_fraction}, "gene_sets": dict(args.gene_set)}
    found |= {"annotate": args.annotate_qc}
    return found if any(v not in (None, False, {}) for v in found.values()) else None


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        msg = f"{text!r} is not NAME=VALUE"
        raise argparse.ArgumentTypeError(msg)
    return name, value


def _keys(given: list[str] | None) -> str | dict[str, str] | None:
    """Read ``COLUMN``, or ``PATTERN=COLUMN`` several times."""
    if given is None:
        return None
    pairs = [text.rpartition("=") for text in given]
    if len(given) == 1 and not pairs[0][1]:
        return given[0]
    if wrong := [text for text, (_, sign, _) in zip(given, pairs, strict=True) if not sign]:
        msg = f"--var-key {wrong[0]}: give one column for all files, or PATTERN=COLUMN for each kind of them"
        raise AnnbatchDaskError(msg)
    return {pattern: column for pattern, _, column in pairs}


def _read_names(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="annbatch-dask",
        description=DESCRIPTION,
        epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"annbatch-dask {annbatch_dask.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_shuffle(commands)
    _add_plan(commands)
    _add_status(commands)
    _add_info(commands)
    _add_versions(commands)
    _add_report(commands)
    _add_stats(commands)
    _add_verify(commands)
    _add_repack(commands)
    _add_gc(commands)
    _add_stream(commands)
    _add_mixing(commands)
    return parser


def _add_command(commands: Any, name: str, run: Callable[..., None], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _add_shuffle(commands: Any) -> None:
    parser = _add_command(commands, "shuffle", _shuffle, "shuffle AnnData files into a collection")
    _add_layout_options(parser)
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
    engine.add_argument("--n-workers", type=_positive, metavar="N", help="worker processes on this machine")


def _add_plan(commands: Any) -> None:
    parser = _add_command(commands, "plan", _plan, "print the plan of a shuffle, and run nothing")
    _add_layout_options(parser)
    _add_json(parser)


def _add_status(commands: Any) -> None:
    parser = _add_command(commands, "status", _status, "tell of builds: what runs, how far, what was interrupted")
    _add_collection(parser)
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead, for scripts")


def _add_info(commands: Any) -> None:
    parser = _add_command(commands, "info", _info, "print the content of a collection")
    _add_collection(parser)
    _add_of_version(parser)
    _add_json(parser)


def _add_versions(commands: Any) -> None:
    parser = _add_command(commands, "versions", _versions, "list a collection's versions, and which are kept")
    _add_collection(parser)
    _add_json(parser)


def _add_report(commands: Any) -> None:
    parser = _add_command(commands, "report", _report, "write a page on a collection's content and builds")
    _add_collection(parser)
    _add_of_version(parser)
    parser.add_argument(
        "-o", "--output", default="report.html", metavar="FILE", help="the page to write (default: report.html)"
    )


def _add_stats(commands: Any) -> None:
    parser = _add_command(commands, "stats", _stats, "write statistics of genes, or a list of those that vary most")
    _add_collection(parser)
    _add_of_version(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the table (CSV) or list to write")
    parser.add_argument("--by", metavar="COLUMN", help="by the categories of this column of obs")
    parser.add_argument(
        "--highly-variable", type=_positive, metavar="N", help="write the names of the N most variable genes instead"
    )
    parser.add_argument(
        "--flavor",
        choices=("seurat", "cell_ranger", "seurat_v3"),
        default="seurat",
        help="how they are found, as in scanpy (default: seurat)",
    )
    parser.add_argument("--batch-key", metavar="COLUMN", help="find them within each batch, and then those of most")


def _add_verify(commands: Any) -> None:
    parser = _add_command(commands, "verify", _verify, "read a whole collection and compare it with its records")
    _add_collection(parser)
    _add_of_version(parser)
    parser.add_argument("--against", nargs="+", metavar="FILES", help="the files it was made of")
    _add_json(parser)
    parser.add_argument("--scheduler", metavar="ADDRESS", help="run on this Dask cluster, e.g. tcp://head-node:8786")
    parser.set_defaults(n_workers=None)


def _add_repack(commands: Any) -> None:
    parser = _add_command(commands, "repack", _repack, "convert a collection to the other layout, in the same order")
    _add_collection(parser)
    _add_of_version(parser)
    parser.add_argument("-o", "--output", required=True, metavar="NEW.zarr", help="the collection to write")
    parser.add_argument("--layout", choices=("open", "packed"), required=True, help="layout of the new collection")


def _add_gc(commands: Any) -> None:
    parser = _add_command(commands, "gc", _gc, "remove what interrupted builds left behind")
    _add_collection(parser)
    parser.add_argument(
        "--keep-last",
        type=_positive,
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


def _add_stream(commands: Any) -> None:
    parser = _add_command(commands, "stream", _stream, "stream epochs and print cells per second and mixing")
    _add_order_options(parser)
    parser.add_argument("--dense", action="store_true", help="dense float32 batches instead of sparse ones")
    parser.add_argument("--epochs", type=_positive, default=1, metavar="N", help="passes over the cells (default: 1)")


def _add_mixing(commands: Any) -> None:
    parser = _add_command(commands, "mixing", _mixing, "measure how well batches are mixed, without reading data")
    _add_order_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw the entropy of each batch; needs matplotlib")
    parser.set_defaults(dense=False)


def _add_collection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collection", metavar="OUT.zarr", help="path or URL of a collection")


def _add_of_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--of-version", type=_positive, metavar="N", help="read this version, if it is kept (default: the current one)"
    )


def _add_order_options(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser)
    _add_of_version(parser)
    parser.add_argument(
        "--batch-size", type=_positive, default=4096, metavar="N", help="cells per batch (default: 4096)"
    )
    parser.add_argument(
        "--chunk-size",
        type=_positive,
        default=512,
        metavar="N",
        help="neighbouring cells read together (default: 512)",
    )
    parser.add_argument(
        "--preload-nchunks",
        type=_positive,
        metavar="N",
        help="chunks mixed in memory (default: about 32, for whole batches)",
    )
    parser.add_argument(
        "--by",
        metavar="COLUMN",
        help="obs column to judge mixing by (default: cell_type, or the first categorical one)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of batches (default: 0)")


def _add_layout_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILES", help=".h5ad or .zarr AnnData files, paths or URLs")
    parser.add_argument(
        "--dataset-size",
        type=_size,
        default="2GiB",
        metavar="SIZE",
        help="rows or bytes of a dataset (default: 2GiB)",
    )
    parser.add_argument(
        "--n-obs-per-chunk",
        type=_positive,
        default=64,
        metavar="N",
        help="rows of a zarr chunk (default: 64)",
    )
    parser.add_argument(
        "--shard-size",
        type=_size,
        default="1GiB",
        metavar="SIZE",
        help="rows or bytes of a shard (default: 1GiB)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed (default: 0); equal seeds give byte-identical output"
    )
    parser.add_argument("--no-shuffle", dest="shuffle", action="store_false", help="keep the order of the inputs")
    parser.add_argument(
        "--var-subset", type=Path, metavar="FILE", help="keep only these genes: a text file with one name per line"
    )
    parser.add_argument(
        "--merge",
        choices=("same", "unique", "first", "only"),
        help="var columns, varm, varp and uns of several files to keep, as in anndata.concat (default: none)",
    )
    parser.add_argument(
        "--groupby", type=_names, metavar="COLUMNS", help="sort the rows of each dataset by these columns of obs"
    )
    parser.add_argument(
        "--elements",
        type=_names,
        metavar="NAMES",
        help="carry only these: layers/counts,obsm,obs; or all except these: --elements=-raw,-obsm/X_umap",
    )
    parser.add_argument(
        "--counts", default="X", metavar="NAME", help="the matrix that becomes X: X, raw/X or layers/<key> (default: X)"
    )
    parser.add_argument(
        "--allow-mixed-counts",
        action="store_true",
        help="build even if X holds whole numbers in some files and fractions in others",
    )
    parser.add_argument(
        "--layout",
        choices=("open", "packed"),
        help="storage of sparse matrices: open (for any software) or packed (a third smaller, for this package)",
    )
    parser.add_argument(
        "--gene-order",
        choices=("names", "abundance"),
        help="gene order of a new output: by name, or most expressed first, which takes less space",
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="keep the cells whose obs meets it: \"is_primary_data and tissue == 'lung'\"",
    )
    for kind, what in (("counts", "a sum of counts"), ("genes", "a number of genes")):
        for end, word in (("min", "least"), ("max", "most")):
            parser.add_argument(f"--{end}-{kind}", type=float, metavar="N", help=f"keep cells of {what} of at {word} N")
    parser.add_argument(
        "--max-fraction",
        type=_pair,
        action="append",
        default=[],
        metavar="SET=SHARE",
        help="keep cells of which at most this share of counts is of a gene set: mito=0.2",
    )
    parser.add_argument(
        "--gene-set",
        type=_pair,
        action="append",
        default=[],
        metavar="SET=GENES",
        help="genes by a prefix, or a boolean column of var: mito=MT-",
    )
    parser.add_argument("--annotate-qc", action="store_true", help="add n_counts, n_genes and fraction_SET to obs")
    parser.add_argument(
        "--var-key",
        action="append",
        metavar="[PATTERN=]COLUMN",
        help="name genes by this column of var instead of its index; for some files by a pattern of their paths",
    )
    parser.add_argument(
        "--gene-map", metavar="FILE", help="other names for genes: a .csv, .tsv or .parquet table of aliases and ids"
    )
    parser.add_argument(
        "--strip-versions", action="store_true", default=None, help="take the versions from Ensembl ids"
    )
    parser.add_argument(
        "--on-duplicate-gene",
        choices=("error", "sum", "first"),
        help="several genes of a file with one name: refuse them (default), add them up, or keep the first",
    )
    parser.add_argument(
        "--duplicates",
        choices=("keep", "report", "drop", "error"),
        default="keep",
        help="cells with the X of an earlier cell: do not look for them (default), count, leave out, or refuse them",
    )
    parser.add_argument(
        "--stats",
        action="store_true",
        default=None,
        help="store means and variances of genes (default for an output that holds cells: as it has them)",
    )
    parser.add_argument("--stats-by", metavar="COLUMN", help="the same, by the categories of this column of obs too")
    parser.add_argument(
        "--keep",
        type=_positive,
        metavar="N",
        help="versions of the output that stay, with the new one (default: as many as before, or 1)",
    )
    parser.add_argument("--memory-limit", type=_bytes, metavar="SIZE", help="memory of one worker process, e.g. 4GB")


def _size(text: str) -> int | str:
    """Read ``100_000`` as rows; leave ``2GB`` to the library, which knows the units."""
    plain = text.replace("_", "").replace(",", "")
    return int(plain) if plain.isdigit() else text


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _bytes(text: str) -> int:
    try:
        return parse_nbytes("a size", text)
    except LayoutError as error:
        msg = f"{text!r} is not a size such as 4GB"
        raise argparse.ArgumentTypeError(msg) from error


def _positive(text: str) -> int:
    value = int(text.replace("_", ""))
    if value < 1:
        msg = f"must be 1 or more, not {value}"
        raise argparse.ArgumentTypeError(msg)
    return value


def _say(text: str, file: IO[str] | None = None) -> None:
    """Print lines; names in them may come from anybody's files, and do nothing to a terminal."""
    _print("\n".join(map(_visible, text.split("\n"))), file)


def _say_json(command: str, values: dict[str, Any]) -> None:
    """Print a document of JSON, whose escapes do nothing to a terminal; its first fields say what it is."""
    _print(json.dumps({"annbatch_dask": annbatch_dask.__version__, "command": command} | values, indent=1))


def _print(text: str, file: IO[str] | None = None) -> None:
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        raise _ReaderGoneError from None


def _visible(text: str) -> str:
    """A text with escapes in the place of control characters, and of those that turn the direction of writing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _one_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if not isinstance(error, AnnbatchDaskError | OSError):  # may say little by itself: KeyError('obs')
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    parts = [text, *getattr(error, "__notes__", [])]
    return "; ".join(" ".join(part.split()) for part in parts)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"annbatch-dask: warning: {message}", sys.stderr)


def _fail(message: str, *, code: int) -> int:
    _say(f"annbatch-dask: error: {message}", sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
