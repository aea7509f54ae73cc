"""Commands that load batches, or work out which they would be: stream, mixing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from annbatch_dask.cli.given import open_collection
from annbatch_dask.cli.options import add_command, add_order_options, positive
from annbatch_dask.cli.output import say
from annbatch_dask.errors import AnnbatchDaskError
from annbatch_dask.seeds import check_seed

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray

    from annbatch_dask.collection import DatasetCollection
    from annbatch_dask.mixing import Mixing

__all__ = ["add_mixing", "add_stream"]

_STREAM = """\
examples:
  annbatch-dask stream atlas.zarr
  annbatch-dask stream atlas.zarr --by donor --dense --batch-size 1024

The share of the ideal entropy is 1 where batches are mixed like uniformly random ones, and near 0 where each
batch holds one class.
"""


def add_stream(commands: Any) -> None:
    """``stream``: load epochs."""
    parser = add_command(commands, "stream", _stream, "stream epochs and print cells per second and mixing", _STREAM)
    add_order_options(parser)
    parser.add_argument("--dense", action="store_true", help="dense float32 batches instead of sparse ones")
    parser.add_argument("--epochs", type=positive, default=1, metavar="N", help="passes over the cells (default: 1)")


def _stream(args: argparse.Namespace) -> None:
    from annbatch_dask.mixing import measure_mixing

    collection = open_collection(args)
    column, codes = _classes(collection, args.by)
    loader = _loader(args).use_collection(collection)
    for epoch in range(args.epochs):
        start = time.perf_counter()
        rows = [batch["index"] for batch in loader]
        seconds = time.perf_counter() - start
        mixing = measure_mixing(codes[r] for r in rows)
        say(f"epoch {epoch}: {_epoch_line(sum(map(len, rows)), seconds, column, mixing)}")


_MIXING = """\
examples:
  annbatch-dask mixing atlas.zarr
  annbatch-dask mixing atlas.zarr --by donor --batch-size 1024 --chunk-size 64 --plot mixing.png

Works out the batches of an epoch with these settings; only obs is read. The ideal is the mean entropy of batches
that are drawn uniformly at random. If the collection
was not shuffled, more and smaller chunks bring batches closer to the ideal.
"""


def add_mixing(commands: Any) -> None:
    """``mixing``: how well batches are mixed."""
    parser = add_command(
        commands, "mixing", _mixing, "measure how well batches are mixed, without reading data", _MIXING
    )
    add_order_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw the entropy of each batch; needs matplotlib")
    parser.set_defaults(dense=False)


def _mixing(args: argparse.Namespace) -> None:
    from annbatch_dask.mixing import check_picture, measure_mixing, plot_mixing, sampled_batches

    if args.plot is not None:
        check_picture(args.plot)
    column, codes = _classes(open_collection(args), args.by)
    mixing = measure_mixing(sampled_batches(_loader(args).batch_sampler, codes))
    line = _mixing_line(column, mixing)
    say(f"{args.collection}: {line}: {mixing.mean_entropy:.3f} of {mixing.ideal_entropy:.3f} bits")
    if args.plot is None:
        return
    plot_mixing(mixing, args.plot, title=f"mixing of {column} in batches of {args.batch_size:,}")
    say(f"picture: {args.plot}")


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
            rng=np.random.default_rng(check_seed(args.seed)),
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
        f"{mixing.n_batches} {'batch' if mixing.n_batches == 1 else 'batches'} with {mixing.mean_classes:.1f} distinct "
        f"{column} on average, {mixing.share:.3f} of the ideal batch entropy"
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
