"""What scDataset's README and documentation show, with the import changed: the same calls on small data."""

from __future__ import annotations

from functools import partial

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from annbatch_dask.scdataset import (
    BlockShuffling,
    BlockWeightedSampling,
    ClassBalancedSampling,
    MultiIndexable,
    Streaming,
    adata_to_mindex,
    estimate_sample_size,
    hf_tahoe_to_tensor,
    scDataset,
    suggest_parameters,
)
from tests.loader.data import N_VAR, frame, matrix, quiet

torch = pytest.importorskip("torch", reason="scDataset's pages are about torch")
DataLoader = torch.utils.data.DataLoader

N = 1000
X = matrix(N)
OBS = frame(N)
TRAIN, VALIDATION = np.arange(0, 800), np.arange(800, N)

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*default_fork_context.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*experimental.*AnnCollection.*"),
]


def rows_of(batches):
    """Row numbers, as column 0 has them."""
    return (np.concatenate([np.asarray(batch)[:, 0] for batch in batches]) - 1).astype(int).tolist()


@pytest.fixture(scope="module")
def plates(tmp_path_factory):
    """Three files, as an atlas of plates has them."""
    folder = tmp_path_factory.mktemp("plates")
    for k in range(3):
        obs = frame(N // 4, first=k * (N // 4))
        obs["plate"] = f"plate_{k + 1}"
        with quiet():
            ad.AnnData(sp.csr_matrix(matrix(N // 4, first=k * (N // 4))), obs=obs).write_h5ad(folder / f"{k}.h5ad")
    return [folder / f"{k}.h5ad" for k in range(3)]


# --- README


def test_basic_usage():
    dataset = scDataset(X, Streaming(), batch_size=64)
    assert rows_of(DataLoader(dataset, batch_size=None)) == list(range(N))


def test_streaming():
    assert rows_of(scDataset(X, Streaming(), batch_size=64)) == list(range(N))
    mixed = rows_of(scDataset(X, Streaming(shuffle=True), batch_size=64, fetch_factor=8))
    assert sorted(mixed[:512]) == list(range(512))
    assert mixed[:512] != list(range(512))
    assert rows_of(scDataset(X, Streaming(indices=[0, 2, 4, 6, 8]), batch_size=64)) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("indices", [None, TRAIN])
def test_block_shuffling(indices):
    found = rows_of(scDataset(X, BlockShuffling(block_size=8, indices=indices), batch_size=64))
    assert sorted(found) == (np.arange(N) if indices is None else indices).tolist()


def test_weighted_sampling():
    found = rows_of(scDataset(X, BlockWeightedSampling(total_size=10_000, block_size=16), batch_size=64))
    assert len(found) == 10_000
    weights = np.where(np.arange(N) < 100, 1.0, 0.0)
    strategy = BlockWeightedSampling(weights=weights, total_size=5000, block_size=16)
    found = rows_of(scDataset(X, strategy, batch_size=64))
    assert len(found) == 5000
    assert max(found) < 100


def test_class_balancing():
    cell_types = ["T_cell"] * 900 + ["B_cell"] * 90 + ["NK_cell"] * 10
    found = rows_of(scDataset(X, ClassBalancedSampling(cell_types, total_size=8000), batch_size=64))
    shares = np.unique(np.asarray(cell_types)[found], return_counts=True)[1] / 8000
    np.testing.assert_allclose(shares, 1 / 3, atol=0.02)


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_multimodal(as_dictionary):
    parts = {"genes": X, "proteins": X[:, :3] * 2, "metadata": np.arange(N)}
    data = MultiIndexable(parts) if as_dictionary else MultiIndexable(**parts)
    found = []
    for batch in scDataset(data, Streaming(), batch_size=64):
        np.testing.assert_array_equal(batch["proteins"], batch["genes"][:, :3] * 2)
        assert batch[2] is batch["metadata"]
        found += batch["metadata"].tolist()
    assert found == list(range(N))
    part, train = data[100:200], data[TRAIN]
    assert (len(data), len(part), len(train), data.count) == (N, 100, 800, 3)
    assert part.names == ["genes", "proteins", "metadata"]
    assert MultiIndexable(X, OBS["row"].to_numpy(), names=["X", "y"]).names == ["X", "y"]


def test_workers():
    dataset = scDataset(X, BlockShuffling(block_size=16), batch_size=64, fetch_factor=8)
    loader = DataLoader(dataset, batch_size=None, num_workers=4, prefetch_factor=9)
    assert sorted(rows_of(loader)) == list(range(N))
    assert len(loader) == 16


def test_transforms():
    def fetch_transform(chunk):
        return chunk.toarray() if hasattr(chunk, "toarray") else chunk

    def batch_transform(batch):
        return torch.from_numpy(batch).float()

    dataset = scDataset(
        sp.csr_matrix(X), Streaming(), batch_size=64, fetch_transform=fetch_transform, batch_transform=batch_transform
    )
    batches = list(dataset)
    assert {batch.dtype for batch in batches} == {torch.float32}
    np.testing.assert_array_equal(torch.cat(batches).numpy(), X)


def test_the_complete_example():
    train = scDataset(X, BlockShuffling(block_size=32, indices=TRAIN), batch_size=64, fetch_factor=8)
    validation = scDataset(X, Streaming(indices=VALIDATION), batch_size=64, fetch_factor=8)
    options = {"batch_size": None, "num_workers": 2, "prefetch_factor": 9}
    loaders = DataLoader(train, **options), DataLoader(validation, **options)
    epochs = [[rows_of(loader) for loader in loaders] for _ in range(2)]
    for in_training, in_validation in epochs:
        assert sorted(in_training) == TRAIN.tolist()
        assert in_validation == VALIDATION.tolist()
    assert epochs[0][0] != epochs[1][0]


# --- its documentation


def fetch_anndata(adata, indices):
    data = adata[indices].X
    return (data.toarray() if hasattr(data, "toarray") else np.asarray(data)).astype(np.float32)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_anndata_by_a_fetch_callback(form):
    adata = ad.AnnData(form(X), obs=OBS)
    dataset = scDataset(adata, BlockShuffling(block_size=8), batch_size=64, fetch_callback=fetch_anndata)
    assert sorted(rows_of(DataLoader(dataset, batch_size=None, num_workers=2))) == list(range(N))
    strategy = ClassBalancedSampling(adata.obs["kind"].values, total_size=300, block_size=8)
    balanced = scDataset(adata, strategy, batch_size=32, fetch_callback=fetch_anndata)
    kinds = [row % 3 for row in rows_of(balanced)]
    np.testing.assert_allclose(np.bincount(kinds), 100, atol=40)


def test_obsm_beside_x_by_a_fetch_callback():
    adata = ad.AnnData(sp.csr_matrix(X), obs=OBS, obsm={"protein": sp.csr_matrix(X[:, :2] + 1)})

    def fetch_multimodal(adata, indices):
        taken = adata[indices]
        return MultiIndexable(genes=taken.X.toarray(), proteins=taken.obsm["protein"].toarray())

    dataset = scDataset(adata, BlockShuffling(block_size=8), batch_size=32, fetch_callback=fetch_multimodal)
    for batch in dataset:
        np.testing.assert_array_equal(batch["proteins"], batch["genes"][:, :2] + 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_an_anncollection_of_backed_files_in_any_worker(plates, context):
    from anndata.experimental import AnnCollection

    collection = AnnCollection([ad.read_h5ad(path, backed="r") for path in plates], join_vars="inner")
    assert estimate_sample_size(collection, n_samples=2) >= 12  # a value and its column
    data = MultiIndexable(cells=collection, number=np.arange(750))
    for source, transform in (
        (collection, partial(adata_to_mindex, columns=["plate", "row"])),
        (data, cells_of),
    ):
        dataset = scDataset(source, BlockShuffling(block_size=8), 64, fetch_transform=transform)
        loader = DataLoader(
            dataset, batch_size=None, num_workers=2, multiprocessing_context=context, batch_sampler=None
        )
        found = list(loader)
        assert sorted(row for batch in found for row in np.asarray(batch["row"]).tolist()) == list(range(750))
        for batch in found:
            plate = [f"plate_{row // 250 + 1}" for row in np.asarray(batch["row"]).tolist()]
            assert np.asarray(batch["plate"]).tolist() == plate


def cells_of(chunk):
    """For workers that are spawned: a function of the module."""
    return adata_to_mindex(chunk["cells"], columns=["plate", "row"])


def test_four_hooks_together():
    adata = ad.AnnData(sp.csr_matrix(X), obs=OBS)

    def to_tensors(batch):
        y = {"a": 0, "b": 1, "c": 2}
        return torch.log1p(torch.from_numpy(batch["X"]).float()), torch.tensor([y[kind] for kind in batch["kind"]])

    dataset = scDataset(
        adata,
        strategy=BlockShuffling(block_size=8),
        batch_size=64,
        fetch_factor=16,
        fetch_callback=lambda collection, indices: collection[indices],
        fetch_transform=partial(adata_to_mindex, columns=["kind"]),
        batch_callback=lambda chunk, positions: chunk[positions],
        batch_transform=to_tensors,
    )
    for x, y in DataLoader(dataset, batch_size=None):
        rows = torch.expm1(x[:, 0]).round().long() - 1
        assert torch.equal(y, rows % 3)


@pytest.mark.parametrize("collection", [None, "db", ["a.h5ad", "b.h5ad"], {"X": None}], ids=str)
def test_what_only_the_callback_can_read(collection):
    """A connection, or some files: their length, if they have one, is not that of rows."""
    asked = []

    def fetch_from_database(connection, indices):
        asked.append(",".join(map(str, indices)))
        return [(connection, int(i)) for i in indices]

    dataset = scDataset(collection, Streaming(indices=range(20)), 8, 1, fetch_callback=fetch_from_database)
    assert len(dataset) == 3
    assert [row for batch in dataset for _, row in batch] == list(range(20))
    assert asked[0] == "0,1,2,3,4,5,6,7"


class Cells(torch.utils.data.Dataset):
    """A torch Dataset as users write them: arrays of rows are passed on to what it holds."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.from_numpy(X[index])


def test_a_torch_dataset():
    assert sorted(rows_of(scDataset(Cells(), BlockShuffling(8), 64))) == list(range(N))
    pair = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.arange(N))
    dataset = scDataset(pair, BlockShuffling(8), 64, batch_callback=lambda chunk, i: tuple(part[i] for part in chunk))
    for x, y in dataset:
        assert torch.equal(x[:, 0], y + 1.0)
    assert estimate_sample_size(Cells()) == 4 * N_VAR
    # Two rows a fetch, and two parts: parts must not be taken for rows.
    with pytest.raises(TypeError, match="a fetch of 2 rows is a tuple of 2, whose rows cannot be told"):
        list(scDataset(pair, Streaming(), 2, 1))


def test_sizes_of_a_torch_dataset_that_takes_single_rows_only():
    class Single(Cells):
        def __getitem__(self, index):
            if not isinstance(index, int):
                msg = "one row at a time"
                raise TypeError(msg)
            return {"x": torch.from_numpy(X[index]), "y": torch.tensor(index)}

    assert estimate_sample_size(Single(), n_samples=4) >= 4 * N_VAR + 8
    assert suggest_parameters(Single(), batch_size=64, verbose=True)["fetch_factor"] >= 1


@pytest.mark.parametrize("kind", ["weights", "labels"])
def test_a_strategy_alone_with_weights_of_all_rows_and_some_indices(kind):
    """As scDataset's own tests call it: ``get_indices`` without a dataset."""
    given = np.where(np.arange(N) % 10 == 0, 9.0, 1.0)
    indices = np.concatenate([np.arange(0, 50), np.arange(900, 950)])
    strategy = (
        BlockWeightedSampling(indices=indices, weights=given, total_size=2000)
        if kind == "weights"
        else ClassBalancedSampling(given, indices=indices, total_size=2000)
    )
    found = strategy.get_indices(range(N), seed=42)
    assert set(found.tolist()) <= set(indices.tolist())
    assert strategy.get_len(range(N)) == len(found) == 2000
    rare = (found % 10 == 0).mean()  # a tenth of all rows, and of those that are drawn from
    assert rare == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="weights|labels"):
        strategy.get_indices(range(N + 1), seed=42)


def test_ranks_by_hand():
    found = [
        rows_of(scDataset(X, BlockShuffling(block_size=4), batch_size=20, rank=rank, world_size=4, seed=42))
        for rank in range(4)
    ]
    assert len({row for rows in found for row in rows}) == sum(map(len, found))
    assert {len(rows) for rows in found} == {240}


def test_a_module_of_lightning():
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is a test extra")

    class Module(lightning.LightningDataModule):
        def setup(self, stage=None):
            self.train = scDataset(X, BlockShuffling(block_size=8, indices=TRAIN), batch_size=64)

        def train_dataloader(self):
            return DataLoader(self.train, batch_size=None)

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(N_VAR, 1), []

        def training_step(self, batch, batch_index):
            self.seen += (batch[:, 0] - 1).int().tolist()
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    model = Model()
    quiet_run = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with quiet():
        lightning.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet_run).fit(model, Module())
    assert sorted(model.seen[:800]) == sorted(model.seen[800:]) == TRAIN.tolist()
    assert model.seen[:800] != model.seen[800:]


# --- HuggingFace


def extract_hf_batch(fetched, positions):
    return {key: [values[i] for i in positions] for key, values in fetched.items()}


@pytest.fixture
def cells_of_huggingface():
    datasets = pytest.importorskip("datasets", reason="HuggingFace's datasets is no dependency")
    rng = np.random.default_rng(0)
    genes = [[0, *sorted(rng.choice(np.arange(1, 50), 5, replace=False).tolist())] for _ in range(200)]
    expressions = [[float(row), *rng.random(5).tolist()] for row in range(200)]
    return datasets.Dataset.from_dict(
        {"genes": genes, "expressions": expressions, "cell_line_id": [f"c{row % 4}" for row in range(200)]}
    )


@pytest.mark.parametrize("layout", [None, "numpy", "torch"])
def test_huggingface(cells_of_huggingface, layout):
    hf = cells_of_huggingface.with_format(layout)
    batches = list(scDataset(hf, Streaming(), batch_size=64, batch_callback=extract_hf_batch))
    assert set(batches[0]) == {"genes", "expressions", "cell_line_id"}
    assert [line for batch in batches for line in batch["cell_line_id"]] == [f"c{row % 4}" for row in range(200)]
    dense = scDataset(
        hf, BlockShuffling(block_size=8), 64, fetch_transform=partial(hf_tahoe_to_tensor, num_genes=50), seed=0
    )
    found = torch.cat(list(dense))
    assert found.shape == (200, 50)
    assert sorted(found[:, 0].int().tolist()) == list(range(200))
    assert found[found[:, 0] == 7][0].count_nonzero() == 6
    assert estimate_sample_size(hf, fetch_transform=partial(hf_tahoe_to_tensor, num_genes=50)) == 200


def test_huggingface_in_workers_and_processed(cells_of_huggingface):
    def process(batch):
        return {"lines": np.array([int(line[1:]) for line in batch["cell_line_id"]])}

    dataset = scDataset(
        cells_of_huggingface,
        BlockShuffling(block_size=8),
        batch_size=64,
        batch_callback=extract_hf_batch,
        batch_transform=process,
    )
    lines = [line for batch in DataLoader(dataset, batch_size=None, num_workers=2) for line in batch["lines"].tolist()]
    assert np.bincount(lines).tolist() == [50, 50, 50, 50]
