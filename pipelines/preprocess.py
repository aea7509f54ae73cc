#!/usr/bin/env python3
"""Shuffle AnnData files into a collection, on the cluster that a YAML file describes.

preprocess.py CONFIG.yaml [--plan | --job-script] [--debug]

The file names inputs (globs too, ** for folders at any depth), the output, options of DatasetCollection.add_adatas, and
a cluster; pipelines/clusters has one for each kind. Paths are relative to where this runs, and may hold ~ and variables
of the environment ($DATA). Workers must see inputs, output and scratch under the same paths or URLs.

    files: [atlas/*.h5ad]
    output: atlas.zarr
    options: {seed: 0, dataset_size: 2GB}
    cluster:
      kind: slurm           # or local (all of this machine, or so many workers), scheduler, ssh, kubernetes
      workers: 8            # how many to ask for, and to keep; or [2, 8], as many as there are tasks
      options: {}           # of the class that starts it, or {address: ...} of a scheduler
"""

from __future__ import annotations

import argparse
import difflib
import glob
import importlib
import inspect
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from distributed import Client, LocalCluster

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import AnnbatchDaskError

ENTRIES = ("files", "output", "scratch", "performance_report", "options", "cluster")
"""What a file may hold."""
DEPLOYERS = {
    "ssh": ("distributed", "SSHCluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}
NEEDED = {"ssh": "asyncssh"}
"""Packages that a class imports only when it connects."""


def deployer(kind: str) -> Any:
    """Return the class that starts a cluster of this kind."""
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
        if "workers" in cluster:
            options = {"n_workers": limits(cluster["workers"])[1]} | options
        if not options:
            return None
        options = {"preload": ["annbatch_dask.preload"]} | options
        return stack.enter_context(Client(start(kind, LocalCluster, options, stack)))
    if kind == "scheduler":
        try:
            return stack.enter_context(Client(options["address"]))
        except OSError as error:
            sys.exit(f"preprocess: no scheduler answers at {options['address']} ({error}); check the address")
    started = start(kind, deployer(kind), options, stack)
    client = stack.enter_context(Client(started))
    if kind != "ssh":  # whose workers are its hosts
        minimum, maximum = limits(cluster["workers"])
        started.adapt(minimum=minimum, maximum=maximum)  # which also replaces jobs that ended, as scale does not
    return client


def start(kind: str, of: Any, options: dict[str, Any], stack: ExitStack) -> Any:
    """Start a cluster; end with what its class says of options that it does not take."""
    try:
        return stack.enter_context(of(**options))
    except (RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        sys.exit(f"preprocess: a {kind} cluster does not start with these options: {said}")


def read(path: Path) -> dict[str, Any]:
    """Return what a file holds, once all names in it are known: what stands below another one would have no effect."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        sys.exit(f"preprocess: {path} cannot be read: {error}")
    known = [
        name
        for name in inspect.signature(DatasetCollection.add_adatas).parameters
        if name not in ("self", "adata_paths", "client", *ENTRIES)
    ]
    check(str(path), config, ENTRIES, ("files", "output"))
    for name in ("files", "output", "scratch", "performance_report"):
        if name in ("files", "output") or config.get(name) is not None:
            config[name] = expand_names(name, config[name])
    check("options", config.get("options"), known)
    cluster = config.get("cluster")
    check("cluster", cluster, ("kind", "workers", "options"))
    kind = (cluster or {}).get("kind", "local")
    if kind not in ("local", "scheduler", *DEPLOYERS):
        sys.exit(f"preprocess: cluster kind {kind!r} is none of local, scheduler, {', '.join(DEPLOYERS)}")
    if kind == "scheduler":
        check("options of a scheduler", cluster.get("options"), ("address",), ("address",))
    if kind in ("scheduler", "ssh"):  # whose workers are there, or one a host
        check(f"cluster of kind {kind}", cluster, ("kind", "options"))
    elif kind != "local":
        check(f"cluster of kind {kind}", cluster, ("kind", "workers", "options"), ("workers",))
    return config


def check(what: str, given: Any, known: Sequence[str], needed: Sequence[str] = ()) -> None:
    """End where a part of the file is no mapping, or has a name that is not known, or lacks one."""
    if not isinstance(given or {}, dict):
        sys.exit(f"preprocess: {what}: {given!r} is no mapping; give names and values, such as {known[0]}: ...")
    if unknown := [str(name) for name in given or {} if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"did you mean {near[0]!r}?" if near else f"there may be {', '.join(known)}"
        meant = "it stands beside them" if unknown[0] in ENTRIES else meant
        sys.exit(f"preprocess: {what}: {unknown[0]!r} is not known; {meant}")
    if missing := [name for name in needed if name not in (given or {})]:
        sys.exit(f"preprocess: {what}: there is no {missing[0]!r}; add it")


def expand_names(what: str, given: Any) -> Any:
    """Return a path, or the paths of the files, with variables of the environment and ~ in it replaced."""
    if what == "files" and isinstance(given, list) and given:
        return [expand_names("files", path) for path in given]
    if not isinstance(given, str) or not given:
        example = "[data/*.h5ad]" if what == "files" else "a path"
        sys.exit(f"preprocess: {what} is {given!r}; it must be text, such as {example}")
    found = os.path.expanduser(os.path.expandvars(given))
    if lacking := re.search(r"\$(\w+|\{\w+\})", found):
        sys.exit(f"preprocess: {what} is {given!r}, and {lacking[0]} is not set in the environment; export it")
    return found


def limits(workers: int | list[int]) -> tuple[int, int]:
    """Return how many workers there are at least, and at most."""
    match workers:
        case bool():  # of YAML's yes and no, which are whole numbers too
            pass
        case int(n) | [int(n)] if n > 0:
            return n, n
        case [int(low), int(high)] if 0 <= low <= high and high > 0:
            return low, high
    sys.exit(f"preprocess: workers is {workers!r}; it must be a number such as 8, or two, as in [2, 8]")


def expand(patterns: str | list[str]) -> list[str]:
    """Return the files of all patterns, sorted within each; URLs as they are; ``**`` is folders at any depth."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [[p] if "://" in p else sorted(glob.glob(p, recursive=True)) for p in patterns]
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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    config = read(args.config)
    cluster = config.get("cluster") or {}
    if args.job_script:
        with deployer("slurm")(**cluster.get("options") or {}) as started:
            print(started.job_script())
        return 0
    try:
        build(config, cluster, plan_only=args.plan)
    except (AnnbatchDaskError, TypeError, ValueError) as error:  # the latter two of options that make no sense
        if args.debug:
            raise
        sys.exit("preprocess: " + "; ".join([str(error), *getattr(error, "__notes__", [])]))
    return 0


def build(config: dict[str, Any], cluster: dict[str, Any], *, plan_only: bool) -> None:
    """Print the plan, or run it and say what is there."""
    files, options = expand(config["files"]), config.get("options") or {}
    collection = DatasetCollection(config["output"])
    if plan_only:
        taken = inspect.signature(collection.plan_adatas).parameters
        options = {name: options[name] for name in options if name in taken}
        with ExitStack() as stack:  # no jobs are submitted to look at the memory that their workers would have
            client = connect(cluster, stack) if cluster.get("kind", "local") in ("local", "scheduler") else None
            print(collection.plan_adatas(files, **options, client=client).summary())
        return
    means = {name: config.get(name) for name in ("scratch", "performance_report")}
    with ExitStack() as stack:
        client = connect(cluster, stack)
        collection.add_adatas(files, **options, client=client, **means)
    print(f"{collection.path}: {collection.n_obs:,} cells x {collection.n_vars:,} genes, datasets: {len(collection)}")


if __name__ == "__main__":
    sys.exit(main())
