"""On a real GPU: batches are those of the host, whatever delivers them. Skipped where there is none."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from annbatch_dask.loader import Loader
from annbatch_dask.transforms import NormalizeLog1p
from tests.loader.data import dense, genes, quiet
from tests.loader.test_contents import CHOSEN, SMALL
from tests.loader.test_device import ASKED, STORED, datasets

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture(params=[None, "torch", "jax"])
def to(request):
    needed = {None: "cupy", "torch": "torch", "jax": "jax"}[request.param]
    for name in {needed, "cupy" if request.param != "torch" else needed}:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    return request.param


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
        loader = Loader(**SMALL | {"rng": 5, "shuffle": True} | kwargs)
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
    loader = Loader(batch_size=64, rng=5, shuffle=True, return_index=True, dense="gpu", to=to, preload_to_gpu=False)
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
