"""pipelines/inspect_atlas.py: its figures are those of the files read into memory."""

import sys
import threading
from http.server import ThreadingHTTPServer

import anndata as ad
import inspect_atlas
import numpy as np
import pytest

from tests.tools import RangeHandler


def in_memory(atlas):
    """The outer join of the files."""
    return ad.concat([ad.read_h5ad(path) for path in sorted((atlas / "files").glob("*.h5ad"))], join="outer")


def looked_at(paths, by="cell_type", n_blocks=None):
    view = inspect_atlas.open_view([str(path) for path in paths])
    return inspect_atlas.look(view, inspect_atlas.category(view, by), n_blocks)


@pytest.mark.parametrize("kind", ["files", "collection"])
def test_figures_are_those_of_the_files_in_memory(atlas, kind):
    paths = (atlas / "files").glob("*.h5ad") if kind == "files" else [atlas / "shuffled.zarr"]
    found, adata = looked_at(paths), in_memory(atlas)
    X = adata.X.toarray()
    assert found.cells["cells"].to_dict() == adata.obs["cell_type"].value_counts().to_dict()
    medians = adata.obs.assign(n=(X != 0).sum(1)).groupby("cell_type", observed=True)["n"].median()
    assert found.cells["values a cell"].to_dict() == medians.to_dict()
    genes = found.genes.loc[adata.var_names]
    np.testing.assert_allclose(genes["mean"], X.mean(0, dtype=float), atol=1e-9)
    np.testing.assert_allclose(genes["variance"], X.var(0, dtype=float), atol=1e-9)
    assert found.genes["variance"].is_monotonic_decreasing


def test_of_some_row_blocks_only_their_cells_are_read(atlas):
    view = inspect_atlas.open_view([str(atlas / "in_order.zarr")])
    n_first, n_last = view.X.chunks[0][0], view.X.chunks[0][-1]
    found = looked_at([atlas / "in_order.zarr"], n_blocks=2)
    X = in_memory(atlas).X.toarray()
    X = np.concatenate([X[:n_first], X[-n_last:]])
    np.testing.assert_array_equal(found.n_values, (X != 0).sum(1))
    assert found.cells["cells"].sum() == 3500  # of obs all rows


def test_a_file_on_a_web_server_is_printed_and_drawn(atlas, call, capsys, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler)
    server.folder = atlas / "files"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a.h5ad?token=s3cr3t"
        assert call(inspect_atlas, url, "--by", "donor", "--plot", tmp_path / "a.png") == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    shown = capsys.readouterr().out
    assert "2,000 cells x 1,000 genes" in shown
    assert "donor_5" in shown
    assert "genes that vary most, in 2,000 cells" in shown
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_tables_are_printed_all_the_same(atlas, call, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert call(inspect_atlas, atlas / "files" / "b.h5ad", "--plot", tmp_path / "a.png") == 0
    shown = capsys.readouterr().out
    assert "genes that vary most, in 1,500 cells" in shown
    assert "pip install matplotlib" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--by", "colour"], "no column 'colour'; give --by one of: cell_type"),
        (["and.h5ad"], "and.h5ad does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(atlas, call, options, words):
    with pytest.raises(SystemExit, match=words):
        call(inspect_atlas, atlas / "files" / "a.h5ad", *options)
