"""On a real GPU: batches are those of the host, whatever delivers them. Skipped where there is none."""

from __future__ import annotations

import importlib.util

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels import gpu
from annbatch_dask.loader import Loader
from annbatch_dask.loader.gpu import find as device
from annbatch_dask.transforms import NormalizeLog1p
from tests.loader.aligned import CHOSEN, SMALL
from tests.loader.data import dense, genes, quiet
from tests.loader.devices import ASKED, STORED, datasets

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


WAYS = [(None, "cupy"), ("torch", "cupy"), ("torch", "torch"), ("torch", None), ("jax", "cupy")]
"""What batches are delivered as, and what compiles the kernels; None makes them of torch's operations."""


@pytest.fixture(params=WAYS, ids=str)
def to(request, monkeypatch):
    framework, compiler = request.param
    needed = {None: "cupy", "torch": "torch", "jax": "jax"}[framework]
    for name in {needed, compiler or needed, "cupy" if framework != "torch" else needed}:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    monkeypatch.setattr(gpu, "find_compiler", lambda _library: compiler)
    device._torch_device.cache_clear()
    yield framework
    device._torch_device.cache_clear()


def host(x):
    """A batch's matrix in host memory, half precision as float32."""
    if hasattr(x, "get"):
        return dense(x.get())
    if hasattr(x, "cpu"):
        assert x.is_cuda
        return dense(x.cpu().float() if x.dtype == torch.bfloat16 else x.cpu())
    return np.asarray(x)


def batches(parts, **kwargs):
    with quiet():
        loader = Loader(**SMALL | {"seed": 5, "shuffle": True} | kwargs)
        return list(loader.add_datasets(parts, var=[genes()] * len(parts)))


@pytest.mark.parametrize("names", [None, CHOSEN, []])
@pytest.mark.parametrize("kind", ["csr", "dense"])
@pytest.mark.parametrize("dtypes", STORED)
def test_a_gpu_makes_the_batches_the_host_makes(to, kind, dtypes, names):
    parts = datasets(kind, dtypes)
    for asked in ASKED:
        if (asked, dtypes[0]) == ("float16", "float64") or (asked == "bfloat16" and to != "torch"):
            continue
        if to == "jax" and np.result_type(*dtypes).itemsize == 8:
            continue  # jax has no 64 bits unless told to
        form = {"dtype": asked, "var_names": names}
        expected = batches(parts, dense="cpu", to="torch" if asked == "bfloat16" else None, **form)
        for one, other in zip(batches(parts, dense="gpu", to=to, **form), expected, strict=True):
            wanted = other["X"].float().numpy() if asked == "bfloat16" else other["X"]
            np.testing.assert_array_equal(host(one["X"]), wanted)


@pytest.mark.parametrize("names", [None, CHOSEN])
@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_a_gpu_normalises_as_the_host_does(to, kind, names):
    for dtypes in STORED[:2]:
        form = {"var_names": names, "transform": NormalizeLog1p(50), "dtype": "float32"}
        parts = datasets(kind, dtypes)
        for one, other in zip(
            batches(parts, dense="gpu", to=to, **form), batches(parts, dense="cpu", **form), strict=True
        ):
            np.testing.assert_allclose(host(one["X"]), other["X"], rtol=1e-6)


def test_memory_that_kernels_still_read_is_not_written(to):
    """Sums are queued batch by batch, never waited for, and each batch is dropped at once."""
    parts = datasets("csr", ("uint16",) * 3) * 40
    loader = Loader(batch_size=64, seed=5, shuffle=True, return_index=True, dense="gpu", to=to, preload_to_gpu=False)
    sums = [(batch["index"], (batch["X"] * 1.0).sum(1)) for batch in loader.add_datasets(parts)]
    whole = np.concatenate([part.toarray() for part in parts])
    for rows, totals in sums:
        np.testing.assert_allclose(host(totals), whole[rows].sum(1, dtype=np.float64), rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="cupy is not installed")
@pytest.mark.parametrize("made_dense", [False, True, "cpu"])
@pytest.mark.parametrize("to", [None, "torch"])
def test_preloaded_batches_are_those_of_the_host(to, made_dense):
    parts = datasets("csr", ("float32",) * 3)
    found = batches(parts, preload_to_gpu=True, dense=made_dense, to=to)
    for one, other in zip(found, batches(parts, dense=True), strict=True):
        np.testing.assert_array_equal(host(one["X"]), other["X"])


def many():
    """Some hundred windows of small batches, and all rows as they are."""
    parts = datasets("csr", ("uint16",) * 3) * 40
    return parts, np.concatenate([part.toarray() for part in parts])


def test_a_consumer_may_work_on_a_stream_of_its_own(to):
    if to != "torch":
        pytest.skip("batches of cupy and jax belong to the default stream")
    parts, whole = many()
    loader = Loader(
        batch_size=64,
        seed=5,
        shuffle=True,
        return_index=True,
        dense="gpu",
        to=to,
        preload_to_gpu=False,
        dtype="float32",
    )
    loader.add_datasets(parts)
    own = torch.cuda.Stream()
    found = []
    with torch.cuda.stream(own):
        for batch in loader:
            x = batch["X"]
            del batch["X"]
            torch.cuda._sleep(2_000_000)  # what comes after is late, and the batch is gone by then
            found.append((batch["index"], x.float().sum(1)))
            del x
    own.synchronize()
    for rows, totals in found:
        np.testing.assert_array_equal(totals.cpu().numpy(), whole[rows].sum(1, dtype=np.float32))


@pytest.mark.parametrize("form", [{"dense": "gpu"}, {"dense": False, "preload_to_gpu": True}, {"dense": "cpu"}])
def test_what_a_transform_makes_is_not_used_again_too_early(form):
    class Held:
        def __init__(self, x):
            self.parts = {"x": [x]}

    parts, whole = many()

    def transform(batch):
        return {"index": batch["index"], "held": Held(batch["X"].to_dense() * 2.0)}

    form = {"preload_to_gpu": True, "to": "torch", "dtype": "float32"} | form
    loader = Loader(batch_size=64, seed=5, shuffle=True, return_index=True, transform=transform, **form)
    loader.add_datasets(parts)
    own = torch.cuda.Stream()
    found = []
    with torch.cuda.stream(own):
        for batch in loader:
            torch.cuda._sleep(1_000_000)
            found.append((batch["index"], batch["held"].parts["x"][0].sum(1)))
            del batch
    own.synchronize()
    for rows, totals in found:
        np.testing.assert_array_equal(totals.cpu().numpy(), 2 * whole[rows].sum(1, dtype=np.float32))


def test_a_batch_outlives_its_iterator():
    parts, whole = many()
    for _ in range(30):
        loader = Loader(
            batch_size=512,
            shuffle=True,
            return_index=True,
            dense="gpu",
            to="torch",
            preload_to_gpu=False,
            dtype="float32",
        )
        batch = next(iter(loader.add_datasets(parts)))
        np.testing.assert_array_equal(batch["X"].cpu().numpy(), whole[batch["index"]])


def test_a_thousand_passes_take_no_more_memory_than_a_few():
    parts = datasets("csr", ("uint16",) * 3)
    loader = Loader(
        batch_size=16, shuffle=True, dense="gpu", to="torch", preload_to_gpu=False, dtype="float32"
    ).add_datasets(parts)
    reserved = []
    for number in range(1000):
        for batch in loader:
            batch["X"].sum()
        if number in (100, 999):
            torch.cuda.synchronize()
            reserved.append((torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]))
    assert reserved[1][0] == reserved[0][0]
    assert reserved[0][1] - reserved[1][1] <= 2**21  # other programs, of this card


def test_a_graph_is_captured_while_a_loader_works():
    parts, _ = many()
    loader = Loader(
        batch_size=64, shuffle=True, dense="gpu", to="torch", preload_to_gpu=False, dtype="float32"
    ).add_datasets(parts)
    still = torch.ones(64, device="cuda")
    for batch in loader:  # memory of all sizes is there
        batch["X"].sum()
    for _ in range(5):
        batches_of = iter(loader)
        next(batches_of)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = still * 2
        graph.replay()
        for _ in batches_of:
            pass
    assert doubled.sum().item() == 128


def test_a_damaged_column_is_noticed(to):
    x = sp.csr_matrix(np.ones((300, 7)))
    x.indices[7 * 150] = 9
    loader = Loader(
        batch_size=100, chunk_size=100, preload_nchunks=1, dense="gpu", to=to, preload_to_gpu=False, dtype="float32"
    )
    loader.add_dataset(x)
    found = []
    with pytest.raises(IntegrityError, match="1 entries name a column beyond the 7"):
        found.extend(loader)
    assert len(found) <= 3


@pytest.mark.parametrize("dtypes", STORED)
@pytest.mark.parametrize("more", [{}, {"transform": NormalizeLog1p(50), "dtype": "float32"}], ids=["", "log1p"])
def test_sparse_batches_are_those_of_the_host(to, dtypes, more):
    if to != "torch":
        pytest.skip("for cupy and jax they are made on the host")
    parts = datasets("csr", dtypes)
    for asked in (None, "float32", "stored"):
        form = {"dtype": asked, "to": "torch"} | more
        expected = batches(parts, preload_to_gpu=False, **form)
        for one, other in zip(batches(parts, preload_to_gpu=True, **form), expected, strict=True):
            found, wanted = one["X"], other["X"]
            assert found.layout is torch.sparse_csr
            assert (found.is_cuda, found.dtype, found.shape) == (True, wanted.dtype, wanted.shape)
            assert torch.equal(found.crow_indices().cpu(), wanted.crow_indices())
            assert torch.equal(found.col_indices().cpu(), wanted.col_indices())
            torch.testing.assert_close(
                found.values().cpu().double(),
                wanted.values().double(),
                rtol=1e-6,
                atol=0,
            )


def test_csr_batches_are_copied_from_pinned_memory():
    parts, whole = many()
    loader = Loader(
        batch_size=64, seed=5, shuffle=True, return_index=True, to="torch", preload_to_gpu=True, dtype="float32"
    )
    for batch in loader.add_datasets(parts):
        assert batch["X"].layout is torch.sparse_csr
        np.testing.assert_array_equal(batch["X"].to_dense().cpu().numpy(), whole[batch["index"]])


def test_what_lies_beside_x_is_there_too():
    rng = np.random.default_rng(0)
    adatas = []
    for k in range(2):
        x = sp.random(90, 12, 0.4, "csr", dtype=np.float32, random_state=k)
        obs = pd.DataFrame({"kind": pd.Categorical(rng.choice(list("abc"), 90))}, index=[f"{k}{j}" for j in range(90)])
        layers, obsm = {"raw": x * 2, "flat": x.toarray()}, {"pca": rng.random((90, 5), np.float32)}
        adatas.append(ad.AnnData(X=x, obs=obs, layers=layers, obsm=obsm))
    wanted = {"layers": ["raw", "flat"], "obsm": ["pca"], "obs_codes": ["kind"], "seed": 3, "shuffle": True}
    made = {}
    for where in ("gpu", "cpu"):
        loader = Loader(batch_size=32, dense=where, to="torch", preload_to_gpu=False, **wanted)
        made[where] = list(loader.add_adatas(adatas))
    for one, other in zip(made["gpu"], made["cpu"], strict=True):
        for kind in ("layers", "obsm", "obs_codes"):
            for name, rows in one[kind].items():
                assert rows.is_cuda
                assert torch.equal(rows.cpu(), other[kind][name])
