"""Real ranks: processes of torch.distributed that train one model, stop, and go on as fewer."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from annbatch_dask import Loader

pytest.importorskip("torch")

pytestmark = pytest.mark.timeout(900)  # starts interpreters, twice

# The imports take longer than all the rest: one process makes them, the ranks are forked from it.
SCRIPT = """
import json, multiprocessing, os, socket, sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from annbatch_dask import Loader
from annbatch_dask.errors import RankError


def compare(rank, world_size, seed, dist_info):
    # What making a loader with this seed says.
    rng, few = np.random.default_rng(seed), {"batch_size": 4, "chunk_size": 4, "preload_nchunks": 2}
    try:
        Loader(**few, shuffle=True, rng=rng, dist_info=dist_info)
    except RankError as error:
        return str(error)
    return ""


def train(rank, world_size, port, folder, state):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    asked = [(100, "torch"), (100 + rank, "torch"), (100, "env"), (100 + rank, (rank, world_size)), (7, "torch")]
    said = [compare(rank, world_size, seed, dist_info) for seed, dist_info in asked]
    (folder / f"said_{rank}_of_{world_size}.json").write_text(json.dumps(said))
    x = np.random.default_rng(0).random((203, 5)).astype(np.float32)
    loader = Loader(
        global_batch_size=12, chunk_size=4, preload_nchunks=6, shuffle=True, seed=7, dist_info="torch", to="torch",
        return_index=True, preload_to_gpu=False,
    ).add_dataset(x)
    if state is not None:
        loader.load_state_dict(json.loads(state.read_text()))
    model = DistributedDataParallel(torch.nn.Linear(5, 1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

    def learn(batch):
        optimiser.zero_grad()
        loss = model(batch["X"]).square().mean()
        loss.backward()  # waits for every other rank
        optimiser.step()
        return loss.item()

    seen = []
    for n, batch in enumerate(loader, 1):
        learn(batch)
        seen.append(batch["index"].tolist())
        if state is None and n == 5:
            break
    (folder / f"seen_{rank}_of_{world_size}.json").write_text(json.dumps(seen))
    (folder / f"state_{rank}_of_{world_size}.json").write_text(json.dumps(loader.state_dict()))
    losses = [learn(batch) for batch in loader]  # a whole epoch
    learnt = {"losses": losses, "weights": [p.tolist() for p in model.parameters()]}
    (folder / f"learnt_{rank}_of_{world_size}.json").write_text(json.dumps(learnt))
    dist.destroy_process_group()


def run(world_size, state):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = multiprocessing.get_context("fork").Process
    ranks = [start(target=train, args=(r, world_size, port, folder, state)) for r in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * world_size


folder = Path(sys.argv[1])
run(3, None)
run(2, folder / "state_2_of_3.json")
"""


def test_three_ranks_train_and_stop_and_two_go_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    def written(name, world_size):
        return [
            json.loads((tmp_path / f"{name}_{rank}_of_{world_size}.json").read_text()) for rank in range(world_size)
        ]

    for said in zip(*written("said", 3), strict=True):
        wrong = [text for text in said if text]
        assert len(wrong) in (0, 2)  # the rank that asks first cannot know
        assert all(re.search(r"rank \d of 3 has seed \d+, another one \d+: some rows would", text) for text in wrong)
    assert [bool(any(said)) for said in zip(*written("said", 3), strict=True)] == [False, True, False, True, False]
    three, two = written("seen", 3), written("seen", 2)
    assert [len(seen) for seen in three] == [5] * 3
    assert [len(seen) for seen in two] == [11] * 2  # 203 rows: 16 batches of 12, and 11 rows that are left out
    assert {len(batch) for seen in three for batch in seen} == {4}
    assert {len(batch) for seen in two for batch in seen} == {6}
    drawn = np.concatenate([np.ravel(three), np.ravel(two)])
    assert len(set(drawn.tolist())) == len(drawn) == 192
    for world_size in (3, 2):
        learnt = written("learnt", world_size)
        assert [len(one["losses"]) for one in learnt] == [16] * world_size
        assert all(one["weights"] == learnt[0]["weights"] for one in learnt)


@pytest.mark.parametrize("options", [{}, {"global_batch_size": 48}])
def test_ranks_that_read_in_order_have_every_row_once(options):
    """Validation and inference count on it; passes that are shuffled, or drop their last batch, stay even."""
    sizes = options or {"batch_size": 16}

    def rows_of(rank, **more):
        loader = Loader(
            **sizes,
            **more,
            chunk_size=8,
            preload_nchunks=12,
            dist_info=(rank, 3),
            return_index=True,
            preload_to_gpu=False,
        ).add_dataset(np.zeros((200, 3)))
        found = [batch["index"].tolist() for batch in loader]
        assert len(found) == len(loader)
        return found

    ranks = [rows_of(rank) for rank in range(3)]
    assert sorted(row for rank in ranks for batch in rank for row in batch) == list(range(200))
    for more in ({"shuffle": True, "seed": 0}, {"drop_last": True}, {"even": "drop"}):
        ranks = [rows_of(rank, **more) for rank in range(3)]
        assert {len(rank) for rank in ranks} == {4}
