"""What the commands say, as JSON for scripts: sizes in bytes, times in seconds, nothing rounded.

Every document begins with the release and the command; fields are added by later releases, and none changes its
meaning. ``docs/how-to/watch-a-build.md`` lists them.
"""

from __future__ import annotations

from typing import Any

from annbatch_dask.etl.verify import Verification
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.summary import figures
from annbatch_dask.report import describe_element, element_names
from annbatch_dask.stored import StoredCollection

__all__ = ["info_document", "plan_document", "verify_document"]


def plan_document(plan: Plan) -> dict[str, Any]:
    """A plan: tasks, bytes, peak memory, inputs; and the lines of its summary by name, for people."""
    scatter, gather = plan.peak_nbytes
    return {
        "plan": plan.fingerprint,
        "seed": plan.seed,
        "n_obs": plan.n_obs,
        "n_vars": plan.n_vars,
        "n_datasets": plan.n_datasets,
        "max_dataset_n_obs": int(max(plan.layout.sizes)),
        "n_tasks": {"scatter": len(plan.blocks), "gather": plan.n_datasets},
        "n_bytes_read": int(plan.n_bytes_read),
        "peak_nbytes": {"scatter": int(scatter), "gather": int(gather)},
        "task_nbytes": int(plan.budget.task_nbytes),
        "elements": [m.name for m in plan.matrices] + [f"{c.frame}/{c.name}" for c in plan.columns],
        "left_out": {name: list(paths) for name, paths in plan.left_out.items()},
        "sources": [
            {"path": s.path, "n_obs": s.n_obs, "n_vars": plan.n_genes_of(k)}
            for k, s in enumerate(plan.sources)
            if not s.is_dataset
        ],
        "words": _words(plan),
    }


def _words(plan: Plan) -> dict[str, list[str]]:
    words: dict[str, list[str]] = {}
    for name, text in figures(plan):
        words.setdefault(name, []).append(text)
    return words


def info_document(collection: StoredCollection, n_bytes: int) -> dict[str, Any]:
    """A collection: sizes, elements, and what its manifest says of datasets, builds and inputs."""
    groups, manifest = list(collection), collection.manifest
    return {
        "collection": collection.path,
        "version": collection.version,
        "n_obs": collection.n_obs,
        "n_vars": collection.n_vars,
        "n_datasets": len(groups),
        "n_bytes": n_bytes,
        "elements": {name: describe_element(groups[0], name) for name in element_names(groups[0])},
        "datasets": [] if manifest is None else [_without(d.to_json(), "files") for d in manifest.datasets],
        "builds": [] if manifest is None else [_without(b.to_json(), "genes") for b in manifest.builds],
        "sources": [] if manifest is None else [s.to_json() for s in manifest.sources],
    }


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != name}


def verify_document(path: str, found: Verification) -> dict[str, Any]:
    """What verify found."""
    return {
        "collection": path,
        "ok": found.ok,
        "n_datasets": found.n_datasets,
        "n_obs": found.n_obs,
        "n_bytes": found.n_bytes,
        "problems": [vars(p) for p in found.problems],
        "leftovers": list(found.leftovers),
        "against": list(found.against),
    }
