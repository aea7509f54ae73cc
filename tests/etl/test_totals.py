"""What scatter tasks report of each dataset is added up as it comes, and not kept."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.etl.receipts import ScatterReceipt
from annbatch_dask.etl.totals import Totals, packed

RECEIPTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=3),
        st.lists(st.integers(0, 2**40), min_size=3, max_size=3),
    ),
    max_size=4,
)


@given(RECEIPTS)
def test_sums_are_exact_and_nothing_is_kept(found):
    totals, whole = Totals(3), 0
    for fingerprints, nnz in found:
        parts = packed(np.array(fingerprints, np.uint64), {"X": np.array(nnz, np.int64)})
        stored = json.dumps({"n_rows": 7, "n_bytes": 8, "spilled": 9, "ranges": {}} | parts)
        receipt = ScatterReceipt.from_json(json.loads(stored))
        assert json.loads(json.dumps(receipt.to_json())) == json.loads(stored)
        totals.take(receipt)
        assert not receipt.datasets
        assert receipt.nnz == {"X": sum(nnz)}
        whole += int(receipt.fingerprint, 16)
    want = [sum(f[k] for f, _ in found) % 2**64 for k in range(3)]
    assert totals.fingerprint.tolist() == want
    assert whole % 2**64 == sum(want) % 2**64
    assert [int(n) for n in totals.nnz.get("X", np.zeros(3))] == [sum(n[k] for _, n in found) for k in range(3)]


def test_a_pair_of_block_and_dataset_takes_few_bytes():
    rng, n = np.random.default_rng(0), 1000
    receipt = packed(rng.integers(0, 2**64, n, np.uint64), {"X": rng.integers(0, 40_000, n)})
    assert len(json.dumps(receipt)) < 17 * n
