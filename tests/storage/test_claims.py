"""Dataset numbers on an object store: no two runs write the same, and what an interrupted one had is found again."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import fsspec
import pytest

from annbatch_dask.storage import claims
from annbatch_dask.storage.claims import Claim, Work, claim_numbers, end_claim, find_claims, release_claim
from annbatch_dask.storage.folder import Folder

WORK = Work("plan", "/scratch/work")


@pytest.fixture
def store():
    """A folder of a store without locks."""
    yield Folder("memory://claims/o.zarr")
    fsspec.filesystem("memory").store.clear()


def test_two_runs_of_one_build_have_different_numbers(store):
    first, second = (claim_numbers(store, "key", 2, 3, WORK) for _ in range(2))
    assert (first.numbers, second.numbers) == (range(2, 5), range(5, 8))
    assert find_claims(store) == [first, second]


def test_a_run_takes_over_from_one_that_has_ended(store):
    first = claim_numbers(store, "key", 0, 3, WORK)
    end_claim(store, first)
    assert claim_numbers(store, "other", 0, 3, WORK).numbers == range(3, 6)
    assert claim_numbers(store, "key", 0, 2, WORK).numbers == range(6, 8)
    second = claim_numbers(store, "key", 0, 3, Work("plan", "/elsewhere", is_new=True))
    assert second.numbers == first.numbers
    assert [w.scratch for w in second.works] == ["/scratch/work", "/elsewhere"]
    assert claim_numbers(store, "key", 0, 3, WORK).numbers == range(8, 11)  # the second one runs


def test_a_claim_that_was_taken_over_is_not_given_up_by_the_run_that_had_it(store):
    first = claim_numbers(store, "key", 0, 3, WORK)
    end_claim(store, first)
    second = claim_numbers(store, "key", 0, 3, WORK)
    release_claim(store, first)
    end_claim(store, first)
    assert find_claims(store) == [second]


def test_a_claim_of_a_process_that_was_killed_is_over(store):
    script = (
        "from annbatch_dask.storage.claims import _process; import json, os; print(json.dumps(_process(os.getpid())))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    claim = Claim(0, 1, "key", "nonce", json.loads(said))
    assert claim.is_over
    mine = claim_numbers(store, "key", 0, 3, WORK)
    assert not mine.is_over
    assert replace(mine, owner=mine.owner | {"started": "1"}).is_over  # a process of this number that was before
    parent = claims._process(os.getppid())
    assert not replace(mine, owner=parent).is_over


@pytest.mark.parametrize("other", [{"host": "node-7"}, {"boot": "b"}, {"namespace": "pid:[1]"}])
def test_a_process_that_cannot_be_asked_may_run(store, other):
    claim = claim_numbers(store, "key", 0, 3, WORK)
    end_claim(store, claim)
    claim = replace(find_claims(store)[0], has_ended=False, owner=claim.owner | other)
    assert not claim.is_over
    store.write(claim.name, claim.payload())
    assert claim_numbers(store, "key", 0, 3, WORK).numbers == range(3, 6)


def test_claims_that_overlap_are_given_up_for_others(store, monkeypatch):
    """Two builds that saw different claims may choose numbers that overlap: who sees both chooses again."""
    hidden = Claim(1, 5, "other", "nonce")
    store.write(hidden.name, hidden.payload())
    find, calls = claims.find_claims, []
    monkeypatch.setattr(claims, "find_claims", lambda f: find(f) if calls else calls.append(f) or [])
    assert claim_numbers(store, "key", 0, 3, WORK).numbers == range(6, 9)
    assert [c.first for c in find(store)] == [1, 6]


def test_a_claim_of_an_earlier_release_is_left_alone(store):
    store.write(".claim-0", b'{"key": "key", "n": 3}')
    assert claim_numbers(store, "key", 0, 3, WORK).numbers == range(3, 6)
    assert [c.is_over for c in find_claims(store)] == [False, False]


def test_what_is_no_claim_is_none(store):
    store.write(".claim-0", b"[1, 2]")
    store.write(".claim-1", b"precious")
    store.write(".claim-x", b'{"key": "key", "n": 3}')
    assert find_claims(store) == []


def test_on_a_local_disk_numbers_do_not_depend_on_what_was_interrupted(tmp_path):
    folder = Folder(str(tmp_path))
    claim_numbers(folder, "a", 2, 3, replace(WORK, scratch="/a", is_new=True))
    claim_numbers(folder, "b", 2, 9, replace(WORK, scratch="/b"))
    claim = claim_numbers(folder, "a", 2, 3, replace(WORK, scratch="/a"))
    assert claim.numbers == range(2, 5)
    assert {w.scratch: w.is_new for w in claim.works} == {"/a": True, "/b": False}
    assert find_claims(folder) == [claim]
