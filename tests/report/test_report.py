"""The report: its figures are those of the files and the collection, and its page needs nothing else."""

import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionError
from annbatch_dask.html import moment_grid, overlap_rows, pair_matrix
from annbatch_dask.mixing import measure_mixing
from annbatch_dask.plan.genes import GeneSpace, join_genes
from annbatch_dask.testing import make_adata

SOURCES = {"a.h5ad": (300, range(45)), "b.h5ad": (200, range(20, 60)), "c.h5ad": (120, range(30, 70))}
"""Cells and genes. The last one is added later, so its genes 60 to 69 are left out."""
ODD = '<script>alert("x")</script> & T'
VOID = {"circle", "line", "link", "meta", "rect", "br"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A collection of two sources, a third one added."""
    folder = tmp_path_factory.mktemp("report")
    files = {}
    for seed, (name, (n_obs, genes)) in enumerate(SOURCES.items()):
        files[name] = make_adata(n_obs, [f"gene_{g}" for g in genes], seed=seed)
        files[name].obs["donor"] = pd.Categorical.from_codes(np.arange(n_obs) % 4 - 1, ["D1", ODD, "D3"])
        files[name].layers["spliced"] = files[name].X.copy()
        files[name].write_h5ad(folder / name)
    paths = [folder / name for name in SOURCES]
    with dask.config.set(scheduler="threads"):
        collection = DatasetCollection(folder / "atlas.zarr")
        plan = collection.plan_adatas(paths[:2], seed=0, dataset_size=200)
        collection.add_adatas(paths[:2], seed=0, dataset_size=200).add_adatas(paths[2:], seed=1)
    return collection, plan, files


@pytest.fixture(scope="module")
def report(built):
    return built[0].report()


def test_head(built, report):
    collection, _, _ = built
    assert (report.n_obs, report.n_vars, report.n_datasets) == (620, 60, 3) == (*_shape(collection), len(collection))
    assert report.n_bytes_stored == sum(p.stat().st_size for p in Path(collection.path).rglob("*") if p.is_file())


def _shape(collection):
    rows = ad.concat([ad.io.read_zarr(group) for group in collection])
    return rows.shape


def test_sources_are_the_files(built, report):
    _, _, files = built
    kept = set(built[0].var.index)
    found = {Path(s.path).name: (s.n_obs, s.n_vars) for s in report.sources}
    assert found == {name: (f.n_obs, len(kept & set(f.var_names))) for name, f in files.items()}


def test_shared_genes_are_those_of_the_files(report):
    (_, first), (_, second) = report.gene_rows()
    assert [(r.label, r.dots, r.n_genes) for r in first] == [
        ("shared by all 2", (True, True), 25),
        ("only in 1", (True, False), 20),
        ("only in 2", (False, True), 15),
    ]
    assert [(r.label, r.n_genes) for r in second] == [("not in 3", 30), ("in 3", 30)]


def test_categories_are_those_of_obs(built, report):
    obs = built[0].obs()
    for found in report.categories:
        counts = obs[found.column].value_counts(dropna=False)
        want = {None if pd.isna(name) else name: n for name, n in counts.items() if n}
        assert dict(found.counts) == want
    assert [c.column for c in report.categories] == ["cell_type", "donor", "src_path"]


def test_values_are_those_of_the_rows(built, report):
    n = np.concatenate([ad.io.read_zarr(group).X.getnnz(axis=1) for group in built[0]])
    found = report.values
    assert (found.min, found.median, found.mean, found.max) == (n.min(), np.median(n), pytest.approx(n.mean()), n.max())
    assert found.bins == tuple(np.histogram(n, np.arange(n.min(), n.max() + 2))[0])


def test_values_spread_evenly_are_drawn_evenly(tmp_path):
    """Where some bins held three numbers and others two, they stood out as peaks."""
    x = np.tril(np.ones((111, 111), "f4"))[11:]  # one cell of each number of values from 12 to 111
    ad.AnnData(sp.csr_matrix(x)).write_h5ad(tmp_path / "a.h5ad")
    with dask.config.set(scheduler="synchronous"):
        found = DatasetCollection(tmp_path / "o.zarr").add_adatas([tmp_path / "a.h5ad"]).report().values
    assert (found.min, found.max) == (12, 111)
    assert found.bins == (3,) * 33 + (1,)


def test_sizes_are_those_of_the_arrays(built, report):
    groups = list(built[0])
    x = next(e for e in report.elements if e.name == "X")
    assert x.n_bytes == sum(g["X"][name].nbytes for g in groups for name in ("data", "indices", "indptr"))
    assert x.kind == "csr_matrix, uint8 data, uint8 indices (sources: float32)"
    folder = Path(built[0].path)
    for element in ("X", "layers/spliced", "obs"):
        files = [p for g in groups for p in (folder / g.basename / element).rglob("*") if p.is_file()]
        assert {e.name: e.n_bytes_stored for e in report.elements}[element] == sum(p.stat().st_size for p in files)


def test_mixing_is_that_of_neighbours_in_the_collection(built, report):
    codes = built[0].obs()["cell_type"].cat.codes.to_numpy()
    want = measure_mixing(codes[i : i + report.mixing_rows] for i in range(0, len(codes), report.mixing_rows))
    assert dict(report.mixing)["cell_type"] == want
    assert report.mixing_rows == 31
    assert 0.95 < want.share < 1.05


def test_builds_are_as_they_were_planned(built, report):
    _, plan, _ = built
    (build, log), (_, second) = report.builds
    assert build.plan == log.plan == plan.fingerprint
    assert log.planned_tasks == {"scatter": len(plan.blocks), "gather": plan.n_datasets}
    assert log.planned_bytes == log.n_bytes_read == plan.n_bytes_read
    assert [(s.name, s.n_tasks, s.n_reused, s.n_obs) for s in log.stages] == [
        ("scatter", 2, 0, 500),
        ("gather", 3, 0, 500),
        ("commit", 1, 0, 500),
    ]
    assert sum(s.seconds for s in log.stages) <= log.seconds
    assert second.stages[0].n_obs == 620


def test_a_collection_without_its_logs_says_so(built, tmp_path):
    shutil.copytree(built[0].path, tmp_path / "moved.zarr")
    report = DatasetCollection(tmp_path / "moved.zarr", mode="r").report()
    assert [log for _, log in report.builds] == [None, None]
    assert report.html.count("Its log is not beside the collection") == 2


def test_a_log_that_cannot_be_written_is_a_warning(h5ad_pair, tmp_path, caplog):
    (tmp_path / "atlas.zarr.log").write_text("in the way")
    with dask.config.set(scheduler="threads"):
        collection = DatasetCollection(tmp_path / "atlas.zarr").add_adatas(h5ad_pair, seed=0)
    assert "its log could not be written" in caplog.text
    assert collection.report().builds[0][1] is None


def test_an_empty_collection_is_refused(tmp_path):
    with pytest.raises(CollectionError, match="holds no zarr datasets"):
        DatasetCollection(tmp_path / "none.zarr").report()


# --- pages ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Text, addresses and tags of a page; fails where a tag is not closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.addresses = [], Counter(), "", []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.addresses += [value for name, value in attrs if name in {"src", "href", "action", "srcset"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += f" {data.strip()}" if data.strip() else ""


def test_the_page_shows_the_figures(report):
    text = Page(report.html).text
    for shown in ("620", "a.h5ad 300 45", "shared by all 2 25", "T", f"{ODD} 155 25.0%", "missing 155", "X csr_matrix"):
        assert shown in text
    for _, log in report.builds:
        assert log.engine in text
    stages = re.findall(r"(scatter|gather) (\d+) ([\d.]+ kB)", text)
    assert [s[:2] for s in stages] == [("scatter", "2"), ("gather", "3"), ("scatter", "4"), ("gather", "3")]


def test_the_page_needs_nothing_else(report):
    page = Page(report.html)
    assert page.addresses == ["data:,"]
    assert not page.tags["script"]
    assert not re.search(r"url\(|@import|https?://", report.html)


def test_notebooks_show_the_plan_the_collection_and_the_report(built, report):
    collection, plan, _ = built
    shown = Page(plan._repr_html_()).text
    assert plan.title in shown
    assert all(text in shown for _, text in plan.figures())
    assert "shared by all 2 25" in shown
    shown = Page(collection._repr_html_()).text
    assert "cells 620 genes 60 datasets 3" in shown
    assert all(f"{s.path} {s.n_obs}" in shown for s in report.sources)
    assert "empty" in Page(DatasetCollection(Path(collection.path).parent / "none.zarr")._repr_html_()).text
    assert report._repr_html_().startswith("<iframe srcdoc=")


def test_cells_that_were_dropped_stand_by_rule_and_file(tmp_path, report):
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    for seed, path in enumerate(paths):
        make_adata(150, [f"gene_{g}" for g in range(40)], seed=seed).write_h5ad(path)
    where = "cell_type != 'B' and passed"
    with dask.config.set(scheduler="threads"):
        built = DatasetCollection(tmp_path / "o.zarr").add_adatas(paths, where=where, qc={"min_genes": 12})
    found = built.report()
    rules, rows = found.dropped_rows()
    assert rules == ["where", "min_genes"]
    assert [(s.path, counts) for s, counts in rows] == [(s.path, list(s.dropped.values())) for s in found.sources]
    assert all(s.n_obs + sum(counts) == 150 for s, counts in rows)
    assert found.conditions() == [f"where {where}", "qc min_genes=12"]
    section = found.html.split("<h2>Cells dropped</h2>")[1].split("</section>")[0]
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="10"', section)]
    assert widths == pytest.approx([100 * n / 150 for s, counts in rows for n in (s.n_obs, *counts)], abs=0.01)
    assert "Cells dropped" not in report.html


def test_duplicates_stand_by_file(tmp_path):
    first = make_adata(60, [f"gene_{g}" for g in range(40)], seed=0)
    second = make_adata(50, [f"gene_{g}" for g in range(40)], seed=1)
    both = ad.concat([second, first[:20], second[:7]], index_unique="-")
    both.obs_names_make_unique()
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    first.write_h5ad(paths[0])
    both.write_h5ad(paths[1])
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(paths, duplicates="drop")
    [(title, found, matrix)] = collection.report().duplicates()
    assert (title, found.n_obs) == ("", 27)
    assert matrix.rows == ((2, str(paths[1])),)
    assert matrix.columns == ((1, str(paths[0])), (2, str(paths[1])))
    assert matrix.cells == (((20, 1.0), (7, 0.35)),)
    text = Page(collection.report().html).text
    assert "27 cells had the X of an earlier cell, gene by gene, and were dropped" in text
    assert "also in 1 also in 2 2 b.h5ad 20 7" in text


def test_a_build_that_did_not_look_for_duplicates_says_nothing_of_them(report):
    assert report.duplicates() == []
    assert "there twice" not in report.html


def test_many_sources_have_the_largest_twelve_in_the_matrix():
    paths = [f"{k}.h5ad" for k in range(20)]
    pairs = [(b, a, i + j + 1) for i, a in enumerate(paths) for j, b in enumerate(paths) if j > i]
    matrix = pair_matrix([*pairs, ("", "", 5)], paths)
    assert (len(matrix.rows), len(matrix.columns)) == (12, 12)
    assert sum(n for row in matrix.cells for n, _ in row) + matrix.n_other == sum(n for _, _, n in pairs) + 5
    assert max(share for row in matrix.cells for _, share in row) == 1


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_a_browser_shows_the_page_without_an_error(report, browser, tmp_path):
    report.save(tmp_path / "report.html")
    for width in (1200, 390):  # a desktop, a phone
        problems, requests = [], []
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("console", lambda message, to=problems: to.append(message.text))
        page.on("pageerror", lambda error, to=problems: to.append(str(error)))
        page.on("requestfailed", lambda request, to=problems: to.append(request.url))
        page.on("request", lambda request, to=requests: to.append(request.url))
        page.goto((tmp_path / "report.html").as_uri(), wait_until="networkidle")
        text = page.inner_text("body")
        assert not problems
        assert [Path(url).name for url in requests] == ["report.html"]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert "620" in text
        assert ODD in text


def test_names_of_files_are_not_squeezed_into_a_letter_a_line(browser, tmp_path):
    paths = [tmp_path / f"a_rather_long_name_of_a_file_of_a_study_{k}.h5ad" for k in range(2)]
    for seed, path in enumerate(paths):
        make_adata(20, [f"gene_{g}" for g in range(10)], seed=seed).write_h5ad(path)
    named = {"gene_map": {"gene_1": "gene_2"}, "on_duplicate_gene": "sum", "where": "cell_type != 'B'"}
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(paths, **named).report().save(tmp_path / "report.html")
    for width in (1200, 700, 520):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto((tmp_path / "report.html").as_uri())
        widths = page.evaluate("[...document.querySelectorAll('.long td.path')].map(cell => cell.clientWidth)")
        assert len(widths) == 6
        assert min(widths) > 130
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_it_prints_dark_on_white_and_keeps_sections_whole(report, browser, tmp_path):
    report.save(tmp_path / "report.html")
    page = browser.new_page(color_scheme="dark", viewport={"width": 680, "height": 960})  # A4 less its margins
    page.goto((tmp_path / "report.html").as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 680
    style = "getComputedStyle(document.querySelector('{}')).{}".format
    assert page.evaluate(style("body", "backgroundColor")) == "rgb(255, 255, 255)"
    assert page.evaluate(style("body", "color")) == "rgb(0, 0, 0)"
    assert page.evaluate(style("section.keep", "breakInside")) == "avoid"
    assert page.evaluate(style("h2", "breakAfter")) == "avoid"
    assert page.evaluate("Math.max(...[...document.querySelectorAll('section.keep')].map(s => s.offsetHeight))") < 960


# --- shared genes --------------------------------------------------------------------------------------------------


@given(st.lists(st.frozensets(st.sampled_from("abcdefghij"), min_size=1), min_size=1, max_size=6))
def test_overlaps_count_each_gene_once_and_as_sets_do(sources):
    names = [np.array(sorted(s), object) for s in sources]
    genes = join_genes(names, None)
    space = GeneSpace.of(genes, {(k, "var"): n for k, n in enumerate(names)})
    want = Counter(sum(1 << k for k, s in enumerate(sources) if gene in s) for gene in genes)
    assert space.overlaps([(k, "var") for k in range(len(sources))]) == want


def test_many_sources_are_counted_not_named():
    rows = overlap_rows({2**20 - 1: 500, 1: 7, 2: 5, 0b11: 3}, 20, n_other=9)
    assert [(r.label, r.n_genes, r.dots) for r in rows] == [
        ("shared by all 20", 500, ()),
        ("in 1 of 20", 12, ()),
        ("other sets of sources", 9, ()),
        ("in 2 of 20", 3, ()),
    ]


# --- genes -----------------------------------------------------------------------------------------------------------


def test_mean_and_variance_of_genes_are_drawn_where_they_are_stored(tmp_path, report):
    assert report.genes is None
    assert "Mean and variance of genes" not in report.html
    a = make_adata(90, [f"gene_{g}" for g in range(40)], seed=1)
    a.X = a.X.copy()
    a.write_h5ad(tmp_path / "a.h5ad")
    with dask.config.set(scheduler="threads"):
        collection = DatasetCollection(tmp_path / "c.zarr").add_adatas([tmp_path / "a.h5ad"], stats=True)
    found = collection.report()
    stats = collection.gene_stats()
    varies = (stats["mean"] > 0) & (stats["variance"] > 0)
    assert (found.genes.n_genes, found.genes.n_silent) == (len(stats), int((~varies).sum()))
    assert sum(n for _, _, n in found.genes.cells) == int(varies.sum())
    for axis, name in enumerate(("mean", "variance")):
        low, high = getattr(found.genes, name)
        logs = np.log10(stats.loc[varies, name])
        assert low <= logs.min() <= logs.max() <= high
        places = [low + cell[axis] * (high - low) for cell in found.genes.cells]
        assert min(places) - 0.07 <= logs.min() <= logs.max() <= max(places) + 0.07
    assert found.html.count("<circle") >= len(found.genes.cells)
    assert "Mean and variance of genes" in found.html


@pytest.mark.parametrize(
    ("mean", "variance", "n_silent", "line"),
    [
        ([0.0, np.nan, 1.0], [0.0, 1.0, 0.0], 3, (0.0, 0.0, 1.0, 1.0)),
        ([1e-5], [1e5], 0, None),
        ([0.5, 50.0], [5.0, 500.0], 0, (1 / 3, 0.0, 1.0, 2 / 3)),
    ],
)
def test_grids_of_few_genes(mean, variance, n_silent, line):
    grid = moment_grid(np.array(mean), np.array(variance))
    assert grid.n_silent == n_silent
    assert grid.poisson == (None if line is None else pytest.approx(line))
