"""What was given, as the library takes it: a collection, a cluster, the options of a build."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annbatch_dask.errors import AnnbatchDaskError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from annbatch_dask.collection import DatasetCollection

__all__ = ["client_of", "layout_of", "open_collection"]


def open_collection(args: argparse.Namespace) -> DatasetCollection:
    """The collection to read; AnnbatchDaskError where there is none."""
    from annbatch_dask import DatasetCollection

    collection = DatasetCollection(args.collection, mode="r", version=getattr(args, "of_version", None))
    if collection.is_empty:
        msg = f"{args.collection} is not a collection, or an empty one; write one with `annbatch-dask shuffle`"
        raise AnnbatchDaskError(msg)
    return collection


@contextlib.contextmanager
def client_of(args: argparse.Namespace) -> Iterator[Any]:
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

    from annbatch_dask.storage.machine import memory_nbytes

    memory = memory_nbytes() // n_workers if memory_limit is None else memory_limit
    return {
        "n_workers": n_workers,
        "threads_per_worker": max(CPU_COUNT // n_workers, 1),
        "memory_limit": memory,
    }


def layout_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a build that decide what it writes."""
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
        "counts": _by_pattern("--counts", args.counts) or "X",
        "allow_mixed_counts": args.allow_mixed_counts,
        "layout": args.layout,
        "gene_order": args.gene_order,
        "where": args.where,
        "qc": _qc(args),
        "var_key": _by_pattern("--var-key", args.var_key),
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
    found |= {"max_fraction": dict(args.max_fraction), "gene_sets": dict(args.gene_set)}
    found |= {"annotate": args.annotate_qc}
    return found if any(v not in (None, False, {}) for v in found.values()) else None


def _by_pattern(option: str, given: list[str] | None) -> str | dict[str, str] | None:
    """Read ``NAME``, or ``PATTERN=NAME`` several times."""
    if given is None:
        return None
    pairs = [text.rpartition("=") for text in given]
    if len(given) == 1 and not pairs[0][1]:
        return given[0]
    if wrong := [text for text, (_, sign, _) in zip(given, pairs, strict=True) if not sign]:
        msg = f"{option} {wrong[0]}: give one name for all files, or PATTERN=NAME for each kind of them"
        raise AnnbatchDaskError(msg)
    return {pattern: name for pattern, _, name in pairs}


def _read_names(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
