"""Dense batches made on a device are those made on the host. Here the device is a CPU; tests/gpu has a GPU."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annbatch_dask.errors import DeviceError, IntegrityError, MissingPackageError
from annbatch_dask.loader import Loader, contents
from annbatch_dask.loader.gpu.torch import TorchDevice
from annbatch_dask.transforms import NormalizeLog1p
from tests.loader.aligned import CHOSEN, EVERYTHING, PLAIN, SMALL, adatas, stored  # noqa: F401 - fixtures
from tests.loader.data import genes, matrix, quiet
from tests.loader.devices import ASKED, STORED, datasets

torch = pytest.importorskip("torch")

# Values as they are stored in each of three datasets, and what X is delivered in; the names are numpy's.


@pytest.fixture
def cpu_as_device(monkeypatch):
    """The torch path, as on a machine with a GPU and without cupy."""
    monkeypatch.setattr(contents, "check_device", lambda _to: None)
    monkeypatch.setattr(contents, "find_device", lambda _to: TorchDevice(torch.device("cpu")))


def batches(parts, **kwargs):
    with quiet():  # dtypes differ
        loader = Loader(**SMALL | {"seed": 5, "shuffle": True, "to": "torch"} | kwargs)
        return list(loader.add_datasets(parts, var=[genes()] * len(parts)))


def agree(found, expected, *, rtol=0.0):
    """The same batches, one after the other."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one["index"].tolist() == other["index"].tolist()
        assert (one["X"].dtype, one["X"].shape) == (other["X"].dtype, other["X"].shape)
        ours, theirs = (batch["X"].cpu() for batch in (one, other))
        if rtol:
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
        elif ours.numel():
            assert torch.equal(
                ours.view(torch.uint8), theirs.view(torch.uint8)
            )  # bits: uint16 has no equality of its own


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("names", [None, CHOSEN, []])
@pytest.mark.parametrize("kind", ["csr", "dense"])
@pytest.mark.parametrize("dtypes", [STORED[1], *(pytest.param(more, marks=pytest.mark.chaos) for more in STORED[::2])])
def test_a_device_makes_the_batches_the_host_makes(kind, dtypes, names):
    parts = datasets(kind, dtypes)
    for asked in ASKED:
        if (asked, dtypes[0]) == ("float16", "float64"):
            continue  # rounded by way of float32
        form = {"dtype": asked, "var_names": names}
        agree(batches(parts, dense="gpu", **form), batches(parts, dense="cpu", **form))


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("names", [None, CHOSEN])
@pytest.mark.parametrize("kind", ["csr", "dense"])
@pytest.mark.parametrize("asked", [None, "float16", "bfloat16"])
def test_a_device_normalises_as_the_host_does(kind, asked, names):
    form = {"dtype": asked, "var_names": names, "transform": NormalizeLog1p(50)}
    for dtypes in STORED:
        parts = datasets(kind, dtypes)
        rtol = {None: 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[asked]  # the last digit
        agree(batches(parts, dense="gpu", **form), batches(parts, dense="cpu", **form), rtol=rtol)


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_device_makes_what_lies_beside_x(adatas, stored, where):  # noqa: F811
    def loaded(dense):
        loader = Loader(**SMALL, **EVERYTHING, to="torch", dense=dense, obs_codes=["kind"])
        return list(loader.add_adatas(adatas) if where == "memory" else loader.use_collection(stored))

    found, expected = loaded("gpu"), loaded("cpu")
    agree(found, expected)
    for one, other in zip(found, expected, strict=True):
        for kind in EVERYTHING | {"obs_codes": ["kind"]}:
            assert list(one[kind]) == list(other[kind])
            for name, rows in one[kind].items():
                assert rows.dtype == other[kind][name].dtype
                assert torch.equal(rows, other[kind][name])


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "stored"])
@pytest.mark.parametrize("names", [None, ["a", "c"]])
def test_a_device_adds_up_entries_named_twice(dtype, names):
    x = sp.csr_matrix((np.array([1, 2, 4, 8], np.int16), np.array([1, 1, 0, 2]), np.array([0, 3, 4])), shape=(2, 3))
    var = pd.DataFrame(index=["c", "a", "b"])
    loader = Loader(batch_size=2, dense="gpu", preload_to_gpu=False, to="torch", dtype=dtype, var_names=names)
    (batch,) = loader.add_dataset(x, var=var)
    assert batch["X"].tolist() == ([[4, 3, 0], [0, 0, 8]] if names is None else [[3, 4], [0, 0]])


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("names", [None, ["a"]])
def test_a_device_notices_a_column_that_does_not_exist(names):
    x = sp.csr_matrix((np.ones(2), np.array([0, 1]), np.array([0, 1, 2])), shape=(2, 3))
    x.indices[1] = 7
    loader = Loader(batch_size=2, dense="gpu", preload_to_gpu=False, to="torch", var_names=names)
    with pytest.raises(IntegrityError, match="1 entries name a column beyond the 3"):
        list(loader.add_dataset(x, var=pd.DataFrame(index=["a", "b", "c"])))


@pytest.mark.usefixtures("cpu_as_device")
def test_a_device_adds_up_no_complex_numbers():
    loader = Loader(batch_size=2, dense="gpu", preload_to_gpu=False, to="torch")
    with pytest.raises(TypeError, match="no rows of complex64; pass dtype='float32'"):
        list(loader.add_dataset(sp.csr_matrix(np.eye(4, dtype=np.complex64))))


def test_true_makes_dense_rows_on_the_host_unless_batches_are_preloaded():
    def where(dense, *, preload):
        return contents._where_dense(dense, preload_to_gpu=preload)

    assert [where(dense, preload=False) for dense in (False, True, "cpu", "gpu")] == [None, "cpu", "cpu", "gpu"]
    assert [where(dense, preload=True) for dense in (False, True, "cpu", "gpu")] == [None, "gpu", "cpu", "gpu"]
    x = matrix(33)
    for one, other in zip(batches([x], dense=True), batches([x], dense="cpu"), strict=True):
        assert torch.equal(one["X"], other["X"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dense": "cuda"}, ValueError, "dense must be True, False, 'cpu' or 'gpu', got 'cuda'"),
        ({"dense": "gpu"}, MissingPackageError, "Could not find cupy, which dense='gpu' needs with to=None"),
        ({"dense": "gpu", "to": "torch"}, DeviceError, "needs a CUDA device, torch .* finds 0"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(arguments, error, message):
    if error is not ValueError and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(error, match=message):
        Loader(batch_size=4, preload_to_gpu=False, **arguments, **PLAIN)
