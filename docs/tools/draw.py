#!/usr/bin/env python3
"""Draws the pictures of README.md and the site into docs/images, each for light and for dark pages.

The shares of classes per batch are those of `make demo`: the same two files, the same builds, the same epoch. They are
computed anew in a temporary folder. Run it from the root of the repository::

    .venv/bin/python docs/tools/draw.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "annbatch-dask"  # the same picture is the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs/images"
INK = {"light": "#24292f", "dark": "#e6edf3"}
CLASSES = ["#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb", "#997700"]
"""Paul Tol's bright colours: they are told apart by people who see red and green alike, on white and on black."""


def main() -> int:
    """Draw all pictures."""
    IMAGES.mkdir(exist_ok=True)
    orders = demo_orders()
    for scheme, ink in INK.items():
        with mpl.rc_context(style_of(ink)):
            save(draw_mixing(orders), f"mixing-{scheme}.svg")
            save(draw_shuffle(ink), f"shuffle-{scheme}.svg")
    return 0


def style_of(ink: str) -> dict[str, Any]:
    """Return matplotlib's settings for text and lines of one colour on a transparent ground."""
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return dict.fromkeys(names, ink) | {"font.size": 10, "svg.fonttype": "path"}


def save(figure: Any, name: str) -> None:
    """Write a figure as SVG, without a date."""
    figure.savefig(IMAGES / name, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)


# --- mixing ----------------------------------------------------------------------------------------------------------


def demo_orders() -> dict[str, NDArray[np.float64]]:
    """Return the share of each class in each batch, (n_batches, n_classes): of files in order, and of the loader."""
    sys.path.insert(0, str(ROOT / "pipelines"))
    import demo

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        files = demo.make_files(demo.FOLDER)
        collection = demo.shuffle(files, demo.FOLDER / "collection.zarr")
        column = demo.class_column(collection)
        batches = {
            "Files read in order": demo.sequential_batches(files, column),
            "Shuffled collection": demo.stream(collection, column),
        }
        os.chdir(ROOT)
    classes = np.unique(np.concatenate(batches["Files read in order"]))
    return {name: demo.class_shares(found, classes) for name, found in batches.items()}


def draw_mixing(orders: dict[str, NDArray[np.float64]]) -> Any:
    """Draw each batch as a column of class shares."""
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 2.5), layout="constrained", sharey=True)
    for axis, (title, shares) in zip(axes, orders.items(), strict=True):
        axis.stackplot(np.arange(len(shares)), shares.T, step="mid", colors=CLASSES)
        axis.set(title=title, xlabel="mini-batch of an epoch", xlim=(0, len(shares) - 1), ylim=(0, 1))
    axes[0].set_ylabel("share of each cell type")
    return figure


# --- the shuffle -----------------------------------------------------------------------------------------------------


def draw_shuffle(ink: str) -> Any:
    """Draw two files on their way into three datasets."""
    figure, axis = plt.subplots(figsize=(8.2, 3.3), layout="constrained")
    axis.set(xlim=(0, 100), ylim=(0, 42))
    axis.axis("off")
    rng = np.random.default_rng(0)
    blocks = [(kind, slot) for kind in range(2) for slot in range(2)]
    for kind, slot in blocks:
        top = 37 - 18 * kind - 8 * slot
        box(axis, (2, top - 6), (15, 5.5), ink)
        bands(axis, (3, top - 5.2), [kind * 2 + slot] * 12)
        box(axis, (42, top - 6), (15, 5.5), ink)
        bands(axis, (43, top - 5.2), [kind * 2 + slot] * 12, gaps=(4, 8))
        arrow(axis, (17.5, top - 3.2), (41.5, top - 3.2), ink)
    for k, top in enumerate((37, 25, 13)):
        box(axis, (82, top - 8), (15, 5.5), ink)
        bands(axis, (83, top - 7.2), rng.permutation(np.repeat(np.arange(4), 3)))
        axis.text(89.5, top - 10.4, f"dataset_{k}", ha="center", fontsize=8)
        for kind, slot in blocks:
            arrow(axis, (57.5, 33.8 - 18 * kind - 8 * slot), (81.5, top - 5.2), ink)
    for at, text in ((9.5, "row blocks of\nthe input files"), (49.5, "spill files"), (89.5, "the collection")):
        axis.text(at, 38, text, ha="center", va="bottom", fontsize=10, fontweight="bold")
    axis.text(29.5, 38, "scatter\n1 task per row block", ha="center", va="bottom", fontsize=9)
    axis.text(69.5, 38, "gather\n1 task per dataset", ha="center", va="bottom", fontsize=9)
    return figure


def box(axis: Axes, corner: tuple[float, float], size: tuple[float, float], ink: str) -> None:
    """Draw an empty box."""
    axis.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.8", fill=False, edgecolor=ink))


def bands(axis: Axes, corner: tuple[float, float], kinds: Any, gaps: tuple[int, ...] = ()) -> None:
    """Draw rows as bands, coloured by the block they came from, with gaps between the parts of a spill file."""
    x, y = corner
    width = 13 / len(kinds)
    for k, kind in enumerate(kinds):
        left = x + k * width + (0.35 if k in gaps else 0)
        axis.add_patch(plt.Rectangle((left, y), width - (0.35 if k in gaps else 0) - 0.1, 3.9, color=CLASSES[kind]))


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], ink: str) -> None:
    """Draw an arrow."""
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, linewidth=0.8, color=ink, alpha=0.75)
    )


if __name__ == "__main__":
    sys.exit(main())
