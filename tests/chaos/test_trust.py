"""Any sequence of builds, crashes, rivals, readers, sweeps and strangers' files, on a disk and on a store without locks.

After each step every reader has right rows or a clear error, the collection holds what one of the builds published, and
no file of a stranger is gone or changed.
"""

import contextlib
import itertools
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import anndata as ad
import dask
import fsspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import AnnbatchDaskError, CollectionError
from annbatch_dask.events import Callback
from annbatch_dask.testing import make_adata

GENES = [f"g{i}" for i in range(10)]
SIZES = (7, 26, 1, 12, 20, 5)
MODES = st.sampled_from(["extend", "append", "reshuffle", "w"])
_counter = itertools.count()


class CrashError(BaseException):
    """What a kill looks like from inside: nothing in the library may catch it and tidy up."""


class AtEvent(Callback):
    """Does something once, at the n-th event of a build."""

    def __init__(self, n, action):
        self._left, self._action = n, action

    def _event(self, _):
        self._left -= 1
        if self._left < 0 and (action := self._action) is not None:
            self._action = None
            action()

    on_build_start = on_stage_start = on_task_end = on_stage_end = on_build_end = _event


def crash():
    raise CrashError


class Reader:
    """A loader in the middle of an epoch, and the rows it has still to see."""

    def __init__(self, collection, rows):
        self._loader = Loader(batch_size=4, chunk_size=2, preload_nchunks=2, shuffle=True, seed=0, preload_to_gpu=False)
        self._loader.use_collection(collection)
        self._batches, self._rows, self.left = iter(self._loader), rows, Counter(collection.obs().index)

    def step(self, *, may_fail):
        """Read a batch; False at the end of the epoch, or after an error that says so."""
        try:
            batch = next(self._batches)
        except StopIteration:
            assert not +self.left
            return False
        except AnnbatchDaskError:
            assert may_fail
            return False
        names = list(batch["obs"].index)
        self.left.subtract(names)
        assert min(self.left.values()) >= 0
        for name, row in zip(names, batch["X"].toarray(), strict=True):
            np.testing.assert_array_equal(row, self._rows(name, batch["var"].index))
        return True

    def close(self):
        self._batches.close()


class Trust(RuleBasedStateMachine):
    """A collection, what it should hold, its readers, and files of other people."""

    def make_place(self):
        raise NotImplementedError

    readers_may_fail = False
    is_local = True

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.out = self.make_place()
        self.paths, self.adatas = [], {}
        for i, n in enumerate(SIZES):
            adata = make_adata(n, GENES[i % 3 : 7 + i % 4], seed=i)
            self.paths.append(str(self.folder / f"{i}.h5ad"))
            adata.write_h5ad(self.paths[-1])
            for k, name in enumerate(adata.obs_names):
                self.adatas[name] = dict(zip(adata.var_names, adata.X[k].toarray()[0], strict=True))
        self.held, self.readers, self.strangers, self.last = (), [], {}, None

    # --- what others see

    def rows(self, name, genes):
        return [self.adatas[name].get(gene, 0.0) for gene in genes]

    def names_of(self, files):
        return Counter(name for k in files for name in (f"s{k}_{i}" for i in range(SIZES[k])))

    def found(self):
        """Names in the collection as it is; None where there is none."""
        try:
            return Counter(DatasetCollection(self.out, mode="r").obs().index)
        except CollectionError:
            return None

    def settle(self, *outcomes):
        """The collection is as one of these would leave it; remember which."""
        found = self.found()
        for held in outcomes:
            if found == (self.names_of(held) if held else None):
                self.held = held
                return
        pytest.fail(f"the collection holds {found}, none of {outcomes}")

    # --- steps

    def build(self, files, mode, seed, callbacks=()):
        options = {"seed": seed, "dataset_size": 11, "n_obs_per_chunk": 4, "progress": False}
        with dask.config.set(scheduler="synchronous"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*already", UserWarning)
            collection = DatasetCollection(self.out, mode="w" if mode == "w" else "a")
            collection.add_adatas(
                [self.paths[k] for k in files],
                mode="extend" if mode == "w" else mode,
                callbacks=callbacks,
                scratch=self.scratch,
                **options,
            )

    def after(self, files, mode):
        return tuple(sorted(files if mode == "w" else (*self.held, *files)))

    def free(self, n, mode):
        free = [k for k in range(len(SIZES)) if mode == "w" or k not in self.held]
        return tuple(free[:n])

    @rule(n=st.integers(1, 3), mode=MODES, seed=st.integers(0, 2))
    def add(self, n, mode, seed):
        if not (files := self.free(n, mode)):
            return
        refused = None
        try:
            self.build(files, mode, seed)
        except CollectionError as e:
            refused = str(e)
        if refused is None:
            self.settle(self.after(files, mode))
            self.last = files, mode, seed
        else:
            assert any(part in refused for name in self.strangers for part in name.split("/")[-2:]), refused
            self.settle(self.held)

    @rule(n=st.integers(1, 3), mode=MODES, seed=st.integers(0, 2), at=st.integers(0, 30))
    def crash(self, n, mode, seed, at):
        if not (files := self.free(n, mode)):
            return
        with contextlib.suppress(CrashError, CollectionError):
            self.build(files, mode, seed, [AtEvent(at, crash)])
        self.settle(self.held, self.after(files, mode))

    @rule(mode=MODES, rival=MODES, seed=st.integers(0, 2), at=st.integers(0, 30), is_same=st.booleans())
    def two_at_once(self, mode, rival, seed, at, is_same):
        """A second build, from its start to its end, within a first one."""
        files = self.free(2, mode)
        theirs = files if is_same else self.free(4, rival)[-1:]
        rival = mode if is_same else rival
        if not files or not theirs:
            return
        before, outcomes = self.held, []

        def second():
            with contextlib.suppress(CollectionError):  # busy, or strangers
                self.build(theirs, rival, seed)
            outcomes.append(self.found())

        error = None
        try:
            self.build(files, mode, seed, [AtEvent(at, second)])
        except CollectionError as e:
            error = e
        both = tuple(sorted({*before, *files, *theirs}))
        if self.is_local and not self.strangers:
            assert error is None  # it held the lock
        if error is not None and outcomes and outcomes[-1] != (self.names_of(before) if before else None):
            assert self.found() == outcomes[-1]  # the winner's, whole
        one, other = self.after(files, mode), self.after(theirs, rival)
        self.settle(before, one, other, both, tuple(sorted((*other, *files))), tuple(sorted((*one, *theirs))))

    @precondition(lambda self: self.last is not None)
    @rule()
    def repeat(self):
        """The very same call again is done already, unless something else came between."""
        files, mode, seed = self.last
        if self.after(files, mode) and set(files) <= set(self.held) and mode == "extend":
            before = self.found()
            if len(DatasetCollection(self.out, mode="r").manifest.builds[-1].sources) != len(files):
                return
            if self.last_build_is(files, seed):
                with contextlib.suppress(CollectionError) if self.strangers else contextlib.nullcontext():
                    self.build(files, mode, seed)
                assert self.found() == before

    def last_build_is(self, files, seed):
        build = DatasetCollection(self.out, mode="r").manifest.builds[-1]
        return build.sources == tuple(self.paths[k] for k in files) and build.seed == seed and build.mode == "extend"

    @precondition(lambda self: self.held)
    @rule()
    def open_reader(self):
        self.readers.append(Reader(DatasetCollection(self.out, mode="r"), self.rows))

    @precondition(lambda self: len(self.readers) > 1)
    @rule()
    def close_reader(self):
        self.readers.pop(0).close()

    @rule()
    def sweep(self):
        with contextlib.suppress(CollectionError):
            collection = DatasetCollection(self.out)
            before = self.listing()
            would = collection.gc(dry_run=True)
            assert self.listing() == before
            assert sorted(collection.gc()) == sorted(would)
            assert collection.gc() == []
        self.settle(self.held)

    @rule(where=st.sampled_from(["notes.txt", "dataset_77/raw_counts.mtx", "dataset_1/mine.csv"]))
    def leave_a_file(self, where):
        self.put(f"{self.out}/{where}")

    @rule(where=st.sampled_from([".scratch/keep.txt", ".log.txt", ".lock.d/x", "-copy/dataset_0/x"]))
    def leave_a_file_beside(self, where):
        self.put(f"{self.out}{where}")

    @rule()
    def leave_a_file_in_scratch(self):
        self.put(f"{self.scratch}/mine/dataset_0/keep.txt")

    @precondition(lambda self: self.strangers)
    @rule()
    def take_files_away(self):
        """Their owner does: builds go on."""
        for path in self.strangers:
            fs, _ = fsspec.core.url_to_fs(path)
            fs.rm_file(fs._strip_protocol(path))
            parent = fs._parent(path)
            while self.is_local and Path(parent).name not in ("", self.folder.name) and not any(Path(parent).iterdir()):
                Path(parent).rmdir()
                parent = fs._parent(parent)
        self.strangers = {}

    def put(self, path):
        if path in self.strangers:
            return
        content = f"{next(_counter)}".encode()
        fs, inner = fsspec.core.url_to_fs(path)
        fs.makedirs(fs._parent(inner), exist_ok=True)
        fs.pipe_file(inner, content)
        self.strangers[path] = content

    def listing(self):
        fs, inner = fsspec.core.url_to_fs(self.root)
        return sorted(fs.find(inner))

    # --- what must hold after each of them

    @invariant()
    def strangers_are_safe(self):
        for path, content in getattr(self, "strangers", {}).items():
            fs, inner = fsspec.core.url_to_fs(path)
            assert fs.cat_file(inner) == content, path

    @invariant()
    def readers_are_right(self):
        for reader in list(getattr(self, "readers", ())):
            if not reader.step(may_fail=self.readers_may_fail):
                self.readers.remove(reader)

    @invariant()
    def the_collection_is_whole(self):
        if getattr(self, "held", ()):
            collection = DatasetCollection(self.out, mode="r")
            with dask.config.set(scheduler="synchronous"):
                found = collection.verify(against=[self.paths[k] for k in self.held])
            assert found.n_obs == sum(SIZES[k] for k in self.held)
            assert not [p for p in found.problems if "was not written by the build" not in str(p)], found.problems
            for group in collection:
                assert isinstance(ad.io.read_elem(group), ad.AnnData)

    def teardown(self):
        for reader in getattr(self, "readers", ()):
            reader.close()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)
        self.clear()

    def clear(self):
        """What is not in the folder."""


class OnADisk(Trust):
    def make_place(self):
        self.root = str(self.folder)
        self.scratch = str(self.folder / "scratch")
        return str(self.folder / "o.zarr")


class WithoutLocks(Trust):
    """fsspec's memory file system: no locks, no leases, nothing that compares and writes in one step."""

    readers_may_fail = True
    is_local = False

    def make_place(self):
        self.root = f"memory://trust{next(_counter)}"
        self.scratch = f"{self.root}/scratch"
        return f"{self.root}/o.zarr"

    def clear(self):
        fs = fsspec.filesystem("memory")
        if hasattr(self, "root") and fs.exists(self.root):
            fs.rm(self.root, recursive=True)


def case(machine, *, examples, steps, **marks):
    test = type(f"Test{machine.__name__}", (machine.TestCase,), {})
    test.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    test.pytestmark = [pytest.mark.timeout(1800), *marks.get("also", ())]
    return test


TestOnADisk = case(OnADisk, examples=2, steps=8)
TestWithoutLocks = case(WithoutLocks, examples=2, steps=8)
TestOnADiskLong = case(OnADisk, examples=25, steps=14, also=[pytest.mark.chaos])
TestWithoutLocksLong = case(WithoutLocks, examples=25, steps=14, also=[pytest.mark.chaos])
