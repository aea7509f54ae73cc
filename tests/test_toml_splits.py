"""Splits by the TOML of Arc's cell-load, against its rules written out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from annbatch_dask.errors import SelectionError, SourceError, SourceNotFoundError
from annbatch_dask.toml_splits import read_toml_splits

TOML = """
[datasets]
replogle = "/data/replogle"
other = "/data/other/*.h5ad"

[training]
replogle = "train"

[zeroshot]
"replogle.jurkat" = "test"
"other.hep.g2" = "val"

[fewshot."replogle.rpe1"]
val = ["AARS"]
test = ["AARS", "NUP107"]
"""


@pytest.fixture
def obs():
    rng = np.random.default_rng(0)
    paths = ["/data/replogle/jurkat.h5ad", "/data/replogle/more/rpe1.h5ad", "/data/other/a.h5ad", "/data/third/a.h5ad"]
    n = 800
    frame = pd.DataFrame(
        {
            "src_path": pd.Categorical(rng.choice(paths, n)),
            "cell_type": pd.Categorical(rng.choice(["jurkat", "rpe1", "k562", "hep.g2"], n)),
            "gene": pd.Categorical(rng.choice(["non-targeting", "AARS", "NUP107", "RPUSD4"], n)),
        }
    )
    frame["dataset"] = frame["src_path"].astype(str).str.split("/").str[2]
    return frame


@pytest.fixture
def write(tmp_path):
    def write(text=TOML):
        (tmp_path / "split.toml").write_text(text)
        return tmp_path / "split.toml"

    return write


@pytest.mark.parametrize("column", ["src_path", "dataset"])
def test_rows_are_where_the_file_says(obs, write, column):
    splits = read_toml_splits(write(), obs, dataset=column, seed=3)
    for k, (name, kind, gene) in enumerate(zip(obs["dataset"], obs["cell_type"], obs["gene"], strict=True)):
        parts = {part for part, mask in splits.items() if mask[k]}
        if (name, kind) == ("replogle", "jurkat"):
            assert parts == {"test"}
        elif (name, kind) == ("other", "hep.g2"):
            assert parts == {"val"}
        elif (name, kind) == ("replogle", "rpe1"):
            listed = {"AARS": {"val", "test"}, "NUP107": {"test"}, "RPUSD4": {"train"}}
            assert parts == listed[gene] if gene in listed else len(parts) == 1
        else:
            assert parts == ({"train"} if name == "replogle" else set())
    few = ((obs["dataset"] == "replogle") & (obs["cell_type"] == "rpe1")).to_numpy()
    is_control = (obs["gene"] == "non-targeting").to_numpy()
    n_each = {part: int((mask & few & ~is_control).sum()) for part, mask in splits.items()}
    n_controls = {part: int((mask & few & is_control).sum()) for part, mask in splits.items()}
    n_all = int((few & is_control).sum())
    assert sum(n_controls.values()) == n_all
    for part in ("val", "test"):
        assert n_controls[part] == n_all * n_each[part] // sum(n_each.values())
    assert splits.report.loc["train", "n_obs"] == splits["train"].sum()
    np.testing.assert_array_equal(splits.is_control, is_control)


def test_a_seed_fixes_the_controls(obs, write):
    first, second, third = (read_toml_splits(write(), obs, seed=seed)["val"] for seed in (0, 0, 1))
    assert (first == second).all()
    assert (first != third).any()


def test_one_dataset_needs_no_column(obs, write):
    splits = read_toml_splits(write('[datasets]\na = "x"\n[training]\na = "train"'), obs, dataset=None)
    assert splits["train"].all()
    assert len(splits) == 3


ONE = '[datasets]\nreplogle = "/data/replogle"\n[training]\nreplogle = "train"\n'
BAD = [
    ("[datasets", {}, SourceError, "is no TOML"),
    ("[dataset]\na = 1", {}, SourceError, r"has a section \[dataset\]; known are \[datasets\], \[training\]"),
    ('[datasets]\na = "x"', {}, SourceError, r"names no dataset; \[datasets\] has a"),
    (ONE.replace("[training]\nrep", "[training]\nRep"), {}, SourceError, "names the dataset 'Replogle', which"),
    (ONE.replace('"train"', '"test"'), {}, SourceError, "says 'test'; it may say 'train'"),
    (ONE + '[zeroshot]\n"replogle.jurkat" = "tset"', {}, SourceError, "says 'tset'; it may say 'train' or 'val'"),
    (ONE + '[zeroshot]\njurkat = "test"', {}, SourceError, "names 'jurkat', which must be a dataset, a dot, and"),
    (ONE + '[fewshot]\n"replogle.rpe1" = "test"', {}, SourceError, r"write a section \[fewshot.\"replogle.rpe1\"\]"),
    (ONE + '[fewshot."replogle.rpe1"]\ntest = "AARS"', {}, SourceError, "it must be a list of perturbations"),
    (
        ONE + '[zeroshot]\n"replogle.rpe1" = "test"\n[fewshot."replogle.rpe1"]\ntest = ["AARS"]',
        {},
        SourceError,
        r"has 'replogle.rpe1' in \[zeroshot\] and in \[fewshot\]",
    ),
    (
        ONE + '[zeroshot]\n"replogle.Jurkat" = "test"',
        {},
        SelectionError,
        "names a cell type 'Jurkat' of 'replogle', and",
    ),
    (
        ONE + '[fewshot."replogle.rpe1"]\ntest = ["AARS1"]',
        {},
        SelectionError,
        "names the perturbation 'AARS1' of 'replogle.rpe1', and the collection has none: there are .*missing='drop'",
    ),
    (ONE.replace("/data/rep", "/elsewhere/rep"), {}, SelectionError, "and no row is of it: 'src_path' says '/data"),
    (TOML, {"dataset": None}, SelectionError, "has 2 datasets; say which column of obs tells them apart"),
    (TOML, {"control": "ctrl"}, SelectionError, "no row of 'gene' is the control 'ctrl'; there are "),
    (TOML, {"cell_type": "kind"}, SelectionError, "obs has no column 'kind'; it has src_path, cell_type"),
    (TOML, {"missing": "ignore"}, ValueError, "missing must be 'error' or 'drop'"),
]


@pytest.mark.parametrize(("text", "options", "error", "message"), BAD)
def test_what_cannot_be_is_refused(obs, write, text, options, error, message):
    with pytest.raises(error, match=message):
        read_toml_splits(write(text), obs, **options)


def test_what_the_collection_lacks_may_be_dropped(obs, write):
    text = ONE + '[zeroshot]\n"replogle.Jurkat" = "test"\n[fewshot."replogle.rpe1"]\ntest = ["AARS1"]'
    splits = read_toml_splits(write(text), obs, missing="drop")
    assert splits["train"].sum() == (obs["dataset"] == "replogle").sum()
    assert not splits["test"].any()


def test_a_file_that_is_not_there(obs, tmp_path):
    with pytest.raises(SourceNotFoundError, match="gone.toml does not exist"):
        read_toml_splits(tmp_path / "gone.toml", obs)


def test_names_that_are_numbers_are_found_as_text(obs, write):
    numbers = {"jurkat": 0, "rpe1": 1, "k562": 2, "hep.g2": 3, "non-targeting": 0, "AARS": 1, "NUP107": 2, "RPUSD4": 3}
    as_text = write()
    expected = read_toml_splits(as_text, obs, seed=3)
    text = TOML.replace(".jurkat", ".0").replace(".rpe1", ".1").replace(".hep.g2", ".3")
    text = text.replace('val = ["AARS"]', 'val = ["1"]').replace('["AARS", "NUP107"]', "[1, 2]")
    numbered = obs.assign(**{name: obs[name].astype(object).map(numbers).astype(int) for name in ("cell_type", "gene")})
    found = read_toml_splits(write(text), numbered, control="0", seed=3)
    assert all((found[part] == expected[part]).all() and expected[part].any() for part in expected)
