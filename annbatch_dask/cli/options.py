"""Commands, and the options that several of them have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annbatch_dask.errors import LayoutError
from annbatch_dask.sizes import parse_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "add_collection",
    "add_command",
    "add_json",
    "add_layout_options",
    "add_of_version",
    "add_order_options",
    "positive",
]


def add_command(
    commands: Any, name: str, run: Callable[..., None], text: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command, whose ``run`` gets what was parsed."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Let a command print JSON."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead, for scripts")


def add_collection(parser: argparse.ArgumentParser) -> None:
    """Let a command have a collection."""
    parser.add_argument("collection", metavar="OUT.zarr", help="path or URL of a collection")


def add_of_version(parser: argparse.ArgumentParser) -> None:
    """Let it read an older version."""
    parser.add_argument(
        "--of-version", type=positive, metavar="N", help="read this version, if it is kept (default: the current one)"
    )


def add_order_options(parser: argparse.ArgumentParser) -> None:
    """Let it read batches in an order."""
    add_collection(parser)
    add_of_version(parser)
    parser.add_argument(
        "--batch-size", type=positive, default=4096, metavar="N", help="cells per batch (default: 4096)"
    )
    parser.add_argument(
        "--chunk-size",
        type=positive,
        default=512,
        metavar="N",
        help="neighbouring cells read together (default: 512)",
    )
    parser.add_argument(
        "--preload-nchunks",
        type=positive,
        metavar="N",
        help="chunks mixed in memory (default: about 32, for whole batches)",
    )
    parser.add_argument(
        "--by",
        metavar="COLUMN",
        help="obs column to judge mixing by (default: cell_type, or the first categorical one)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of batches (default: 0)")


def add_layout_options(parser: argparse.ArgumentParser) -> None:
    """Let it have files, and say what a build of them writes."""
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
        type=positive,
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
        "--counts",
        action="append",
        metavar="[PATTERN=]NAME",
        help="the matrix that becomes X: X (default), raw/X, layers/<key>; for some files by a pattern of their paths",
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
        type=_share,
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
        type=positive,
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


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        msg = f"{text!r} is not NAME=VALUE"
        raise argparse.ArgumentTypeError(msg)
    return name, value


def _share(text: str) -> tuple[str, float]:
    name, value = _pair(text)
    try:
        return name, float(value)
    except ValueError:
        msg = f"{text!r} is not SET=SHARE, such as mito=0.2"
        raise argparse.ArgumentTypeError(msg) from None


def positive(text: str) -> int:
    """Read a number of 1 or more."""
    plain = text.replace("_", "")
    if not plain.isdecimal() or int(plain) < 1:
        msg = f"must be a whole number, 1 or more, not {text}"
        raise argparse.ArgumentTypeError(msg)
    return int(plain)
