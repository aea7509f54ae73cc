"""RankTokens and BinnedExpression, cell by cell against plain implementations written from the papers."""

from __future__ import annotations

import json
import pickle
from copy import copy

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import IntegrityError, SchemaError, SourceError, SourceNotFoundError
from annbatch_dask.loader import Loader
from annbatch_dask.transforms import BinnedExpression, NormalizeLog1p, RankTokens
from tests.loader.data import N_VAR, frame, genes, matrix
from tests.loader.loaders import SMALL, make
from tests.loader.plain_tokens import bin_tokens, bins_of, rank_tokens

NAMES = genes().index
SPECIAL = {"<pad>": 0, "<cls>": 1, "<eos>": 2}
QUIET = {**SMALL, "batch_size": 8, "layers": [], "obsm": []}


def vocabulary_of(names, seed=0):
    """Tokens in an order that is not that of the genes."""
    tokens = np.random.default_rng(seed).permutation(len(names)) + len(SPECIAL)
    return SPECIAL | dict(zip(names, tokens.tolist(), strict=True))


def medians_of(names, seed=0):
    """Few different ones, so that ranks are equal, and numbers of which quotients are rounded."""
    drawn = np.random.default_rng(seed).choice([1.0, 2.0, 3.0, 0.1, 0.7, 12.5], len(names))
    return dict(zip(names, drawn.tolist(), strict=True))


def adata_of(x):
    names = [f"g{k}" for k in range(x.shape[1])]
    return ad.AnnData(x, obs=frame(x.shape[0]), var=pd.DataFrame(index=names))


def check_ranks(loader, x, transform, chosen=None):
    names = NAMES[: x.shape[1]]
    kept = set(names if chosen is None else chosen)
    tokens = [transform.vocabulary.get(name, -1) if name in kept else -1 for name in names]
    scales = [1.0 if transform.medians is None else transform.medians.get(name, 1.0) for name in names]
    if transform.medians is not None:
        tokens = [t if n in transform.medians else -1 for t, n in zip(tokens, names, strict=True)]
    options = {"max_length": transform.max_length, "first": transform.vocabulary.get(transform.cls)}
    seen = []
    for batch in loader:
        assert list(batch["X"]) == ["input_ids", "attention_mask"]
        ids, mask = (np.asarray(part) for part in batch["X"].values())
        assert mask.dtype == bool
        for row, its, is_token in zip(batch["index"].tolist(), ids.tolist(), mask.tolist(), strict=True):
            expected = rank_tokens(x[row], tokens, scales, **options, last=transform.vocabulary.get(transform.eos))
            assert (its, is_token) == expected
            seen.append(row)
    assert len(set(seen)) == len(seen)
    return seen


def check_bins(loader, x, transform, epoch=0, chosen=None):
    names = NAMES[: x.shape[1]]
    kept = set(names if chosen is None else chosen)
    tokens = [transform.vocabulary.get(name, -1) if name in kept else -1 for name in names]
    options = {name: getattr(transform, name) for name in ("n_bins", "max_length", "ties", "sample", "seed")}
    seen = []
    for batch in loader:
        assert list(batch["X"]) == ["gene_ids", "values", "mask"]
        parts = [np.asarray(part).tolist() for part in batch["X"].values()]
        for row, *found in zip(batch["index"].tolist(), *parts, strict=True):
            first = transform.vocabulary.get(transform.cls)
            assert tuple(found) == bin_tokens(x[row], tokens, number=row, first=first, epoch=epoch, **options)
            seen.append(row)
    assert len(set(seen)) == len(seen)
    return seen


COUNTS = st.one_of(st.just(0), st.integers(1, 3), st.integers(1, 70_000))


@settings(max_examples=60, deadline=None)
@given(
    x=st.lists(st.lists(COUNTS, min_size=9, max_size=9), min_size=1, max_size=6),
    max_length=st.integers(3, 12),
    has_ends=st.booleans(),
    seed=st.integers(0, 5),
    dtype=st.sampled_from(["uint32", "int64", "float32", "float64", "float16"]),
    is_dense=st.booleans(),
)
def test_ranks_are_those_of_the_definition(x, max_length, has_ends, seed, dtype, is_dense):
    x = np.minimum(np.array(x), 2000 if dtype == "float16" else 70_000).astype(dtype)
    names = NAMES[:9]
    ends = {"cls": "<cls>", "eos": "<eos>"} if has_ends else {}
    transform = RankTokens(vocabulary_of(names, seed), medians_of(names, seed), max_length=max_length, **ends)
    data = x if is_dense or dtype == "float16" else sp.csr_matrix(x)
    loader = Loader(**QUIET, transform=transform).add_adata(adata_of(data))
    assert len(check_ranks(loader, x, transform)) == len(x)


@settings(max_examples=60, deadline=None)
@given(
    x=st.lists(st.lists(COUNTS, min_size=9, max_size=9), min_size=1, max_size=6),
    scale=st.sampled_from([1, 0.37]),
    options=st.fixed_dictionaries(
        {
            "n_bins": st.integers(3, 12),
            "max_length": st.integers(2, 12),
            "ties": st.sampled_from(["draw", "upper"]),
            "sample": st.booleans(),
            "seed": st.integers(0, 3),
            "cls": st.sampled_from(["<cls>", None]),
        }
    ),
    is_dense=st.booleans(),
)
def test_bins_are_those_of_the_definition(x, scale, options, is_dense):
    x = np.array(x) * scale
    transform = BinnedExpression(vocabulary_of(NAMES[:9], options["seed"]), **options)
    loader = Loader(**QUIET, transform=transform).add_adata(adata_of(x if is_dense else sp.csr_matrix(x)))
    assert len(check_bins(loader, x, transform)) == len(x)
    assert len(check_bins(loader, x, transform, epoch=1)) == len(x)


def test_bins_of_long_rows_are_those_of_numpy():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.poisson(1.5, (4, 3000)), rng.poisson(900, (4, 3000)), rng.lognormal(size=(4, 3000))])
    names = [f"g{k}" for k in range(3000)]
    transform = BinnedExpression(vocabulary_of(names), max_length=3001, ties="upper")
    (batch,) = Loader(**{**QUIET, "batch_size": 20}, transform=transform).add_adata(adata_of(sp.csr_matrix(x)))
    for row, values, mask in zip(batch["index"], batch["X"]["values"], batch["X"]["mask"], strict=True):
        own = x[row][x[row] != 0]
        np.testing.assert_array_equal(values[mask][1:], bins_of(own, 51)[1])


def test_draws_of_ties_are_even_and_differ_between_cells_and_epochs():
    x = np.ones((60, 500))  # every value is every edge, so each bin is as likely
    names = [f"g{k}" for k in range(500)]
    transform = BinnedExpression(vocabulary_of(names), max_length=501)
    loader = Loader(**{**QUIET, "batch_size": 60, "chunk_size": 60}, transform=transform).add_adata(adata_of(x))
    first, second = (next(iter(loader))["X"]["values"][:, 1:] for _ in range(2))
    counts = np.bincount(first.ravel(), minlength=51)
    assert counts[0] == 0
    expected = first.size / 50
    assert (np.abs(counts[1:] - expected) < 5 * np.sqrt(expected)).all()
    assert (first != second).mean() == pytest.approx(49 / 50, abs=0.01)
    assert (first[0] != first[1]).mean() > 0.9


def test_draws_of_genes_are_even():
    x = np.ones((400, 50))
    transform = BinnedExpression(vocabulary_of([f"g{k}" for k in range(50)]), max_length=11)
    batch = next(
        iter(Loader(**{**QUIET, "batch_size": 400, "chunk_size": 400}, transform=transform).add_adata(adata_of(x)))
    )
    counts = np.bincount(batch["X"]["gene_ids"][:, 1:].ravel(), minlength=53)[3:]
    assert counts.sum() == 4000
    assert (np.abs(counts - 80) < 5 * np.sqrt(80)).all()


@pytest.mark.parametrize("kind", [RankTokens, BinnedExpression])
def test_genes_that_are_dropped_are_as_if_they_were_not_there(collection, kind):
    vocabulary = {name: token for name, token in vocabulary_of(NAMES).items() if name not in NAMES[2:9]}
    transform = kind(vocabulary, max_length=9, missing="drop")
    check = check_ranks if kind is RankTokens else check_bins
    assert len(check(make(collection, transform=transform), collection.x, transform)) == len(collection.x)


@pytest.mark.parametrize("kind", [RankTokens, BinnedExpression])
@pytest.mark.parametrize("n_chosen", [4, 17])
def test_chosen_genes_alone_are_ranked_and_binned(collection, kind, n_chosen):
    chosen = NAMES[np.random.default_rng(1).permutation(N_VAR)[:n_chosen]].tolist()
    transform = kind(vocabulary_of(NAMES), max_length=9)
    loader = make(collection, transform=transform, var_names=chosen, shuffle=True)
    check = check_ranks if kind is RankTokens else check_bins
    assert len(check(loader, collection.x, transform, chosen=chosen)) == len(collection.x)
    assert loader.var.index.tolist() == chosen


def test_a_gene_without_a_median_is_dropped_or_refused(collection):
    medians = {name: value for name, value in medians_of(NAMES).items() if name != "g5"}
    with pytest.raises(SchemaError, match=r"1 of 23 genes are not in the vocabulary, or no median: 'g5'; leave them"):
        make(collection, transform=RankTokens(vocabulary_of(NAMES), medians))
    transform = RankTokens(vocabulary_of(NAMES), medians, missing="drop", max_length=30)
    assert len(check_ranks(make(collection, transform=transform), collection.x, transform)) == len(collection.x)


@pytest.mark.parametrize("kind", [RankTokens, BinnedExpression])
def test_order_of_genes_on_disk_ranks_and_workers_change_no_token(kind):
    """A cell's tokens are a function of the cell: other batches, other threads and other gene orders give the same."""
    x = matrix(40)
    turned = np.random.default_rng(3).permutation(N_VAR)
    transform = kind(vocabulary_of(NAMES), max_length=30)
    found = []
    for order in (np.arange(N_VAR), turned):
        for rank in ((0, 1), (1, 2), (0, 2)):
            adata = ad.AnnData(sp.csr_matrix(x[:, order]), obs=frame(40), var=genes().iloc[order])
            loader = Loader(**QUIET, seed=1, shuffle=True, dist_info=rank, transform=transform).add_adata(adata)
            tokens = {}
            for batch in loader:
                names = list(batch["X"])
                for row, *parts in zip(batch["index"].tolist(), *batch["X"].values(), strict=True):
                    pairs = [tuple(values) for values in zip(*(p[parts[-1]].tolist() for p in parts), strict=True)]
                    tokens[row] = pairs if "input_ids" in names else sorted(pairs)
            found.append(tokens)
    assert len(found[0]) == 40
    for tokens in found[1:]:
        assert tokens == {row: found[0][row] for row in tokens}


def test_resumed_epochs_draw_what_the_whole_ones_do(collection):
    transform = BinnedExpression(vocabulary_of(NAMES), max_length=5)

    def batches(loader):
        return [{name: part.tolist() for name, part in batch["X"].items()} for batch in loader]

    loader = make(collection, transform=transform, shuffle=True, seed=3)
    whole = [batches(loader) for _ in range(2)]
    assert whole[0] != whole[1]
    loader = make(collection, transform=transform, shuffle=True, seed=3)
    loader.set_epoch(1)
    iterator = iter(loader)
    before = [{name: part.tolist() for name, part in next(iterator)["X"].items()} for _ in range(3)]
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make(collection, transform=transform, shuffle=True, seed=3)
    resumed.load_state_dict(state)
    assert before + batches(resumed) == whole[1]


def test_rows_out_of_order_and_with_repeated_entries_are_summed_up():
    x = matrix(30)
    plain = sp.csr_matrix(x)
    rng = np.random.default_rng(0)
    data, indices, indptr = [], [], [0]
    for row in range(30):
        part = slice(plain.indptr[row], plain.indptr[row + 1])
        columns, values = plain.indices[part], plain.data[part]
        if row % 3 == 0:  # each value as two entries, in no order
            columns, values = np.tile(columns, 2), np.concatenate([values - 1, np.ones_like(values)])
        order = rng.permutation(len(columns)) if row % 3 < 2 else np.arange(len(columns))
        data += values[order].tolist()
        indices += columns[order].tolist()
        indptr.append(len(data))
    odd = sp.csr_matrix((np.array(data, np.float32), np.array(indices, np.int32), np.array(indptr)), shape=x.shape)
    for transform, check in (
        (RankTokens(vocabulary_of(NAMES), medians_of(NAMES), max_length=30), check_ranks),
        (BinnedExpression(vocabulary_of(NAMES), max_length=30), check_bins),
    ):
        loader = Loader(**QUIET, transform=transform).add_dataset(odd, obs=frame(30), var=genes())
        assert len(check(loader, x, transform)) == 30


def test_scaled_counts_that_differ_in_the_last_bits_come_in_their_order():
    n = 40
    rng = np.random.default_rng(0)
    x = np.ones((3, n))
    x[1] = 1 + rng.permutation(n) * 2.0**-52  # alike in all but the last bits
    x[2] = 1e-300 * (1 + rng.permutation(n) * 2.0**-50)
    x[2, 0] = 1e300
    names = [f"g{k}" for k in range(n)]
    transform = RankTokens(vocabulary_of(names), max_length=n)
    (batch,) = Loader(**QUIET, transform=transform).add_adata(adata_of(x))
    tokens = [transform.vocabulary[name] for name in names]
    for row, ids in zip(batch["index"].tolist(), batch["X"]["input_ids"].tolist(), strict=True):
        assert ids == [token for _, token in sorted((-value, t) for value, t in zip(x[row], tokens, strict=True))]


@pytest.mark.parametrize("to", ["torch", "jax"])
@pytest.mark.parametrize("kind", [RankTokens, BinnedExpression])
def test_tokens_come_as_tensors(collection, kind, to):
    framework = pytest.importorskip(to)
    transform = kind(vocabulary_of(NAMES), max_length=8, dtype="int32")
    loader, plain = make(collection, transform=transform, to=to), make(collection, transform=transform)
    for batch, expected in zip(loader, plain, strict=True):
        for name, part in batch["X"].items():
            assert type(part).__module__.split(".")[0] in (framework.__name__, "jaxlib")
            np.testing.assert_array_equal(np.asarray(part), expected["X"][name])
            assert str(part.dtype).removeprefix("torch.") == ("bool" if "mask" in name else "int32")


def test_functions_follow_the_tokens(collection):
    transform = RankTokens(vocabulary_of(NAMES), max_length=8)
    loader = make(collection, transform=[transform, lambda batch: batch["X"]["input_ids"]])
    assert next(iter(loader)).shape == (8, 8)


@pytest.mark.parametrize("kind", [RankTokens, BinnedExpression])
def test_workers_of_a_dataloader_give_the_same_tokens(collection, kind):
    torch = pytest.importorskip("torch")
    transform = kind(vocabulary_of(NAMES), max_length=8)
    found = []
    for n_workers in (0, 2):
        loader = make(collection, transform=transform, to="torch", shuffle=True, seed=2)
        data = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=n_workers)
        rows = {}
        for batch in data:
            for k, row in enumerate(batch["index"].tolist()):
                rows[row] = {name: part[k].tolist() for name, part in batch["X"].items()}
        found.append(rows)
    assert found[0] == found[1]
    assert len(found[0]) == len(collection.x)


def test_a_transform_is_a_value():
    """It pickles, copies and compares; files are read once."""
    transform = BinnedExpression(vocabulary_of(NAMES))
    assert pickle.loads(pickle.dumps(transform)) == transform == copy(transform)
    assert "g5" not in repr(transform)


# ---------------------------------------------------------------------------------------------- what is refused


def new(adata, **kwargs):
    return Loader(**{**QUIET, **kwargs}).add_adata(adata)


NAMED = vocabulary_of(NAMES)
BAD = [
    (lambda a: RankTokens({}), SchemaError, "vocabulary: there are no genes in it"),
    (lambda a: RankTokens({"a": 1.5}), SchemaError, "the token of 'a' is 1.5; tokens are whole numbers from 0"),
    (lambda a: RankTokens({"a": -1}), SchemaError, "the token of 'a' is -1"),
    (lambda a: RankTokens({"a": 2**31}), SchemaError, "whole numbers from 0 to 2,147,483,647"),
    (lambda a: RankTokens({"a": "x"}), SchemaError, "'a' has 'x', which is no number"),
    (lambda a: RankTokens({"a": float("inf")}), SchemaError, "the token of 'a' is inf"),
    (lambda a: RankTokens({"a": 10**400}), SchemaError, "the token of 'a' is 10{400}; tokens"),
    (lambda a: RankTokens(NAMED, {"a": 10**400}), SchemaError, "1 of 1 medians are not"),
    (lambda a: RankTokens(NAMED, max_length=8.5), TypeError, "max_length is 8.5; it must be a whole number"),
    (lambda a: BinnedExpression(NAMED, n_bins=5.5), TypeError, "n_bins is 5.5; it must be a whole number"),
    (lambda a: BinnedExpression(NAMED, seed=2.5), TypeError, "seed must be a non-negative integer, got 2.5"),
    (lambda a: BinnedExpression(NAMED, seed=-1), ValueError, "seed is -1; it must be 0 or more"),
    (lambda a: NormalizeLog1p(float("inf")), ValueError, "target_sum is inf; it must be greater than 0, and finite"),
    (lambda a: RankTokens({"a": True}), SchemaError, "'a' has True, which is no number"),
    (lambda a: RankTokens({"a": float("nan")}), SchemaError, "'a' has nan, which is no number"),
    (lambda a: RankTokens({"a": 3, "b": 3}), SchemaError, "'a' and 'b' both have the token 3; give each its own"),
    (lambda a: RankTokens({"a": 3}), SchemaError, "the vocabulary has no token '<pad>', which RankTokens is to write"),
    (lambda a: RankTokens(NAMED, cls="<CLS>"), SchemaError, "has no token '<CLS>'"),
    (lambda a: RankTokens(NAMED, {"a": 0.0}), SchemaError, "1 of 1 medians are not greater than 0"),
    (
        lambda a: RankTokens(NAMED, max_length=2, cls="<cls>", eos="<eos>"),
        ValueError,
        "max_length is 2, and 2 are taken",
    ),
    (lambda a: RankTokens(NAMED, missing="ignore"), ValueError, "missing must be 'error' or 'drop', got 'ignore'"),
    (lambda a: RankTokens(NAMED, dtype="int8"), ValueError, "dtype must be 'int64' or 'int32', got 'int8'"),
    (lambda a: BinnedExpression(NAMED, n_bins=2), ValueError, "n_bins is 2; there must be 3 or more"),
    (lambda a: BinnedExpression(NAMED, ties="both"), ValueError, "ties must be 'draw' or 'upper', got 'both'"),
    (lambda a: new(a, transform=RankTokens(NAMED), dense=True), ValueError, "leave out dense='cpu'"),
    (lambda a: new(a, transform=RankTokens(NAMED), dtype="float32"), ValueError, "dtype='float32'"),
    (lambda a: new(a, transform=[NormalizeLog1p(), RankTokens(NAMED)]), TypeError, "RankTokens is done while"),
    (
        lambda a: new(a, transform=RankTokens({k: v for k, v in NAMED.items() if k not in ("g3", "g4")})),
        SchemaError,
        r"2 of 23 genes are not in the vocabulary: 'g3', 'g4'; leave them out with missing='drop', choose others with "
        r"Loader\(var_names=...\), or add them to it",
    ),
    (
        lambda a: new(a, transform=RankTokens(SPECIAL | {"ENSG1": 5, "ENSG2": 6}, missing="drop")),
        SchemaError,
        r"23 of 23 genes are not in the vocabulary: 'g0', .* it names 'ENSG1', 'ENSG2'. Join the files by what it names",
    ),
    (
        lambda a: new(adata_of(-a.X), transform=RankTokens(NAMED)),
        SchemaError,
        "RankTokens needs counts, which are 0 or more, and",
    ),
    (
        lambda a: Loader(**QUIET, transform=RankTokens(NAMED)).add_dataset(sp.csr_matrix(matrix(3))),
        ValueError,
        "RankTokens looks genes up by their names, but the datasets have no var",
    ),
    (
        lambda a: Loader(**QUIET, transform=RankTokens(NAMED)).add_dataset(np.zeros((3, 2, 2))),
        ValueError,
        "RankTokens needs rows of one dimension",
    ),
]


@pytest.mark.parametrize(("make_it", "error", "message"), BAD)
def test_what_cannot_be_is_refused_before_any_work(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it(adata_of(sp.csr_matrix(matrix(12))))


@pytest.mark.parametrize("kind", [RankTokens, BinnedExpression])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_found_not_to_be_counts_end_the_iteration(collection, kind, value):
    """Of a collection without a record of its values only the batch shows what they are."""
    x = matrix(12)
    x[5, 3] = value
    loader = Loader(**QUIET, transform=kind(NAMED)).add_adata(adata_of(sp.csr_matrix(x)))
    with pytest.raises(
        SchemaError, match="needs counts, which are 0 or more, and 1 values of a batch are negative, infinite or no"
    ):
        list(loader)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_logarithms_of_negative_values_are_warned_of(tmp_path):
    adata_of(matrix(12) - 2).write_h5ad(tmp_path / "a.h5ad")
    with dask.config.set(scheduler="synchronous"):
        scaled = DatasetCollection(tmp_path / "c.zarr").add_adatas([tmp_path / "a.h5ad"], seed=0)
    with pytest.warns(UserWarning, match=r"NormalizeLog1p is for counts, and the least value of X is -2: log"):
        Loader(**QUIET, transform=NormalizeLog1p()).use_collection(scaled)
    assert next(iter(Loader(**QUIET).use_collection(scaled)))["X"].min() == -2


def test_a_column_that_does_not_exist_is_damage():
    data = sp.csr_matrix(matrix(12))
    loader = Loader(**QUIET, transform=RankTokens(NAMED)).add_adata(adata_of(data))
    data.indices[7] = 99
    with pytest.raises(IntegrityError, match="99|column"):
        list(loader)


# ------------------------------------------------------------------------------------------------------- files


def test_tables_come_from_files(tmp_path):
    tokens, medians = vocabulary_of(NAMES), medians_of(NAMES)
    frame_ = pd.Series(tokens).rename_axis("gene")
    (tmp_path / "v.json").write_text(json.dumps(tokens))
    frame_.to_csv(tmp_path / "v.csv", header=["token"])
    frame_.to_csv(tmp_path / "bare.csv", header=False)
    frame_.to_csv(tmp_path / "v.tsv", sep="\t", header=["token"])
    pd.Series(medians).to_csv(tmp_path / "m.tsv", sep="\t", header=False)
    expected = RankTokens(tokens, medians)
    for name in ("v.json", "v.csv", "bare.csv", "v.tsv"):
        assert RankTokens(tmp_path / name, str(tmp_path / "m.tsv")) == expected
    assert RankTokens(frame_, pd.Series(medians)) == expected


def test_tables_come_from_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    tokens = pd.Series(vocabulary_of(NAMES), name="token").rename_axis("gene")
    tokens.to_frame().to_parquet(tmp_path / "indexed.parquet")
    tokens.reset_index().to_parquet(tmp_path / "plain.parquet")
    assert RankTokens(tmp_path / "indexed.parquet") == RankTokens(tmp_path / "plain.parquet") == RankTokens(tokens)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_files_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(Bomb()))
    for name, text in {
        "no.json": "{",
        "list.json": "[1, 2]",
        "twice.json": '{"a": 1, "a": 2}',
        "three.csv": "a,1,2\n",
        "text.csv": "gene,token\na,1\nb,x\n",
        "v.txt": "a 1",
        "empty.csv": "",
    }.items():
        (tmp_path / name).write_text(text)
    for name, error, message in [
        ("v.pkl", SourceError, r"is a pickle, which may run any code .*json.dumps\(\{str\(k\): int\(v\) for k, v in"),
        ("gone.json", SourceNotFoundError, "does not exist; it was given as the file of the vocabulary"),
        ("no.json", SourceError, "no.json is no JSON: "),
        ("list.json", SourceError, "must hold one JSON object"),
        ("twice.json", SchemaError, "'a' is named twice, with 1 and 2"),
        ("three.csv", SourceError, "has 3 columns, and must have 2"),
        ("text.csv", SchemaError, "'b' has 'x', which is no number"),
        ("v.txt", SourceError, "must be one of .json, .csv, .tsv, .parquet, by its ending"),
        ("empty.csv", SourceError, "is no table"),
    ]:
        with pytest.raises(error, match=message):
            RankTokens(tmp_path / name)
    with pytest.raises(SourceError, match=r"float\(v\)"):
        RankTokens(NAMED, tmp_path / "v.pkl")


def test_how_to_convert_a_pickle_is_what_the_error_says(tmp_path, monkeypatch):
    (tmp_path / "v.pkl").write_bytes(pickle.dumps({"a": np.int64(4), "<pad>": 0}))
    with pytest.raises(SourceError) as raised:
        RankTokens(tmp_path / "v.pkl")
    exec(str(raised.value).partition("once: ")[2])  # noqa: S102
    assert RankTokens(tmp_path / "v.json").vocabulary == {"a": 4, "<pad>": 0}
