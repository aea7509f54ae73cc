#!/usr/bin/env python3
"""Shuffle AnnData files into a collection, on the cluster that a YAML file describes.

preprocess.py CONFIG.yaml [--plan | --job-script]

The file names inputs (globs too), the output, options of DatasetCollection.add_adatas, and a cluster;
pipelines/clusters has one for each kind. Workers must see inputs, output and scratch under the same paths or URLs.

    files: [atlas/*.h5ad]
    output: atlas.zarr
    options: {seed: 0, dataset_size: 2GB}
    cluster:
      kind: local           # or scheduler, ssh, slurm, kubernetes
      workers: 8            # slurm, kubernetes: how many to ask for, and to keep; or [2, 8], as many as there are tasks
      options: {}           # of the class that starts it, or {address: ...} of a scheduler
"""

from __future__ import annotations

import argparse
import glob
import importlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from distributed import Client

from annbatch_dask import DatasetCollection

DEPLOYERS = {
    "ssh": ("distributed", "SSHCluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}
NEEDED = {"ssh": "asyncssh"}
"""Packages that a class imports only when it connects."""


def deployer(kind: str) -> Any:
    """Return the class that starts a cluster of this kind."""
    if kind not in DEPLOYERS:
        sys.exit(f"preprocess: cluster kind {kind!r} is none of local, scheduler, {', '.join(DEPLOYERS)}")
    module, name = DEPLOYERS[kind]
    try:
        if kind in NEEDED:
            importlib.import_module(NEEDED[kind])
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = NEEDED.get(kind, module.split(".")[0].replace("_", "-"))
        sys.exit(f"preprocess: a {kind} cluster needs {package} ({error}): pip install {package}")


def connect(cluster: dict[str, Any], stack: ExitStack) -> Client | None:
    """Start the cluster, or find it, and return a client; None for the one that add_adatas starts itself."""
    kind, options = cluster.get("kind", "local"), cluster.get("options") or {}
    if kind == "local":
        return None
    if kind == "scheduler":
        return stack.enter_context(Client(options["address"]))
    started = stack.enter_context(deployer(kind)(**options))
    client = stack.enter_context(Client(started))
    if kind != "ssh":  # whose workers are its hosts
        minimum, maximum = limits(cluster["workers"])
        started.adapt(minimum=minimum, maximum=maximum)  # which also replaces jobs that ended, as scale does not
    return client


def limits(workers: int | list[int]) -> tuple[int, int]:
    """Return how many workers there are at least, and at most."""
    match workers:
        case int(n) | [int(n)] if n > 0:
            return n, n
        case [int(low), int(high)] if 0 <= low <= high and high > 0:
            return low, high
    sys.exit(f"preprocess: workers is {workers!r}; it must be a number such as 8, or two, as in [2, 8]")


def expand(patterns: list[str]) -> list[str]:
    """Return the files of all patterns, sorted within each; URLs as they are."""
    found = [[p] if "://" in p else sorted(glob.glob(p)) for p in patterns]
    for pattern, paths in zip(patterns, found, strict=True):
        if not paths:
            sys.exit(f"preprocess: {pattern} matches no file")
    return [path for paths in found for path in paths]


def main() -> int:
    """Read the configuration, and plan or build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print tasks, bytes and peak memory; run nothing")
    what.add_argument("--job-script", action="store_true", help="print what a slurm worker is submitted with")
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text())
    cluster = config.get("cluster") or {}
    if args.job_script:
        with deployer("slurm")(**cluster.get("options") or {}) as started:
            print(started.job_script())
        return 0
    files, options = expand(config["files"]), config.get("options") or {}
    collection = DatasetCollection(config["output"])
    if args.plan:
        print(collection.plan_adatas(files, **options).summary())
        return 0
    means = {name: config.get(name) for name in ("scratch", "performance_report")}
    with ExitStack() as stack:
        client = connect(cluster, stack)
        collection.add_adatas(files, **options, client=client, **means)
    print(f"{collection.path}: {collection.n_obs:,} cells x {collection.n_vars:,} genes, datasets: {len(collection)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
