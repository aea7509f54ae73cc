"""Any sequence of builds, crashes, resumes, checks and sweeps, against a model that is a list of files."""

import shutil
import tempfile
from pathlib import Path

import dask
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from annbatch_dask import DatasetCollection
from annbatch_dask.events import Callback
from annbatch_dask.testing import make_adata
from tests.tools import tree_digest

N_FILES = 6
GENES = [f"g{i}" for i in range(12)]
STAGES = ("scatter", "gather", "commit")
SIZES = (7, 30, 1, 12, 20, 5)


class CrashError(BaseException):
    """What a kill looks like from inside: nothing in the library may catch it and tidy up."""


class Crash(Callback):
    """Raises at the start of a stage, after its first task, or at its end."""

    def __init__(self, stage, when):
        self.at = stage, when

    def on_stage_start(self, event):
        self._check(event.stage, "start")

    def on_task_end(self, event):
        self._check(event.stage, "task")

    def on_stage_end(self, event):
        self._check(event.stage, "end")

    def _check(self, *now):
        if now == self.at:
            raise CrashError


class Builds(RuleBasedStateMachine):
    """A collection, the files it should hold, and a build that crashed."""

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.paths = [self.folder / f"{i}.h5ad" for i in range(N_FILES)]
        for i, path in enumerate(self.paths):
            make_adata(SIZES[i], GENES[i % 3 : 9 + i % 4], seed=i).write_h5ad(path)
        self.done, self.crashed = [], None

    @property
    def held(self):
        return [path for paths, _ in self.done for path in paths]

    def add(self, build, *, out="o.zarr", callbacks=()):
        paths, options = build
        with dask.config.set(scheduler="synchronous"):
            DatasetCollection(self.folder / out).add_adatas(paths, callbacks=callbacks, progress=False, **options)

    @precondition(lambda self: len(self.held) < N_FILES)
    @rule(
        n=st.integers(1, 3),
        mode=st.sampled_from(["extend", "append", "reshuffle"]),
        genes=st.sampled_from(["collection", "union"]),
        seed=st.integers(0, 3),
        crash=st.none() | st.tuples(st.sampled_from(STAGES), st.sampled_from(["start", "task", "end"])),
    )
    def build(self, n, mode, genes, seed, crash):
        free = [p for p in self.paths if p not in self.held]
        options = {"mode": mode, "seed": seed, "dataset_size": 15, "n_obs_per_chunk": 4}
        options |= {"genes": genes} if mode != "append" else {}
        build = free[:n], options
        try:
            self.add(build, callbacks=[] if crash is None else [Crash(*crash)])
        except CrashError:
            self.crashed = build
            if crash[0] == "commit" and crash[1] != "start":  # it was published
                self.done.append(build)
        else:
            self.done.append(build)
            self.crashed = None

    @precondition(lambda self: self.crashed is not None)
    @rule()
    def resume(self):
        build, self.crashed = self.crashed, None
        self.add(build)
        if build not in self.done:
            self.done.append(build)
        names = {d.name for d in DatasetCollection(self.folder / "o.zarr").manifest.datasets}
        assert {p.name for p in (self.folder / "o.zarr").iterdir()} == names | {"zarr.json"}
        assert not (self.folder / "o.zarr.scratch").exists()

    @rule()
    def sweep(self):
        collection = DatasetCollection(self.folder / "o.zarr")
        collection.gc()
        assert collection.gc() == []

    @invariant()
    def holds_what_was_committed(self):
        if getattr(self, "done", None):
            collection = DatasetCollection(self.folder / "o.zarr", mode="r")
            found = collection.verify(against=self.held)
            assert found.ok, found.problems
            assert found.n_obs == sum(SIZES[self.paths.index(p)] for p in self.held)

    def teardown(self):
        try:
            if getattr(self, "done", None):  # the same builds, undisturbed, give the same bytes
                for build in self.done:
                    self.add(build, out="p.zarr")
                collection = DatasetCollection(self.folder / "o.zarr")
                collection.gc()
                assert tree_digest(self.folder / "o.zarr") == tree_digest(self.folder / "p.zarr")
        finally:
            if hasattr(self, "folder"):
                shutil.rmtree(self.folder)


TestBuilds = Builds.TestCase
TestBuilds.settings = settings(max_examples=2, stateful_step_count=7, deadline=None)
TestBuilds.pytestmark = pytest.mark.timeout(900)  # what failed is made smaller first, run by run
