"""Imports point downwards (CONTRIBUTING.md, layers), and only the programs print."""

import ast
import re
from pathlib import Path

import pytest

import annbatch_dask.errors

PACKAGE = Path(annbatch_dask.errors.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in MODULES]

# From the ground up: a floor may import of ours what stands beside it, all of which stand above it in this list.
ALLOWED = {
    "errors": set(),
    "activities": set(),
    "events": set(),
    "formatting": set(),
    "warn": set(),
    "flags": set(),
    "seeds": {"errors", "warn"},
    "sizes": {"errors"},
    "types": {"errors"},
    "splits": {"errors", "warn"},
    "transforms": {"errors", "flags", "formatting", "seeds", "sizes"},
    "toml_splits": {"errors"},
    "where": {"errors"},
    "records": {"formatting"},
    "manifest": {"errors", "records"},
    "kernels": {"errors"},
    "html": {"formatting"},
    "progress": {"events", "formatting"},
    "storage": {"errors", "kernels", "manifest"},
    "plan": {"errors", "formatting", "html", "kernels", "manifest"},
    "planned": {"events", "plan"},
    "sources": {"activities", "errors", "kernels", "manifest", "plan", "storage", "warn"},
    "engines": {"activities", "errors", "events", "formatting", "plan", "sizes", "storage"},
    "chunks": {"errors", "kernels", "manifest", "storage"},
    "etl": {
        *(
            "activities",
            "errors",
            "events",
            "formatting",
            "kernels",
            "manifest",
            "plan",
            "storage",
            "sources",
            "engines",
        ),
        *("chunks", "seeds", "sizes", "warn", "where"),
    },
    "preload": {"etl", "kernels"},
    "lazy": {"errors", "etl", "plan", "sources"},
    "order": {"errors", "kernels", "types"},
    "samplers": {"errors", "flags", "formatting", "order", "seeds", "sizes", "types", "warn"},
    "abc": {"samplers"},
    "mixing": {"errors", "order", "samplers", "storage"},
    "loader": {
        *("errors", "kernels", "manifest", "storage", "chunks", "order", "samplers", "transforms", "types", "where"),
        *("flags", "formatting", "seeds", "sizes", "warn"),
    },
    "lightning": {"errors", "loader"},
    "scdataset": {
        "errors",
        "flags",
        "kernels",
        "loader",
        "order",
        "samplers",
        "seeds",
        "sizes",
        "storage",
        "types",
        "warn",
    },
    "utils": {"loader", "order", "sizes"},
    "testing": {"abc", "order", "samplers", "types"},
    "report": {"etl", "formatting", "html", "manifest", "mixing", "sources", "storage"},
    "statistics": {"errors", "etl", "formatting", "kernels", "lazy", "manifest", "storage", "warn"},
    "stored": {
        *("errors", "etl", "formatting", "html", "lazy", "manifest", "report", "seeds", "splits", "statistics"),
        "storage",
    },
    "maintained": {"engines", "errors", "etl", "events", "progress", "sizes", "sources", "storage", "stored"},
    "documents": {"etl", "plan", "report", "stored"},
}
FACADE = {"__init__", "as_annbatch", "cli", "collection", "io"}
OLD_PATHS = {"etl/preload.py"}
"""Names where they were documented: imports from their new home, wherever that is, and nothing else."""
MAY_IMPORT_DISTRIBUTED = {
    "collection.py",
    "maintained.py",
    "planned.py",
    *(f"engines/{name}.py" for name in ("attempt", "choose", "dask", "ends", "local_cluster", "needs", "workers")),
}
SLOW = ("bokeh", "matplotlib", "scipy.stats", "torch")
"""Each takes a second or more to import, in every process that opens a collection."""
PURE_FORBIDS = {
    *("anndata", "dask", "distributed", "fsspec", "h5py", "xarray", "zarr"),
    *("fcntl", "mmap", "tempfile"),
}
MAY_PRINT = {"cli/output.py"}
MAX_LINES = 450


def imports_of(path):
    """Yield every dotted name a module imports, wherever it does so, also for types only."""
    yield from names_in(ast.walk(ast.parse(path.read_text())), path)


def names_in(nodes, path):
    """Yield the dotted names that statements of a module import."""
    package = ("annbatch_dask", *path.relative_to(PACKAGE).parent.parts)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(name):
    return name.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_downwards(part):
    names = [name for name in NAMES if layer(name) == part and name not in OLD_PATHS]
    assert names
    for name in names:
        parts = {i.split(".")[1] for i in imports_of(PACKAGE / name) if i.startswith("annbatch_dask.")}
        assert parts <= ALLOWED[part] | {part}, name


def test_floors_stand_on_those_above_them_in_the_list():
    floors = list(ALLOWED)
    for number, (part, below) in enumerate(ALLOWED.items()):
        assert below <= set(floors[:number]), part


def test_no_module_comes_round_to_itself():
    """Not for types either: what two modules tell each other belongs into one, or into a third."""
    modules = {".".join(("annbatch_dask", *Path(name).with_suffix("").parts)): PACKAGE / name for name in NAMES}
    left = {
        module: {known for i in imports_of(path) for known in (i, i.rpartition(".")[0]) if known in modules} - {module}
        for module, path in modules.items()
        if path.name != "__init__.py"
    }
    while grounded := {module for module, found in left.items() if not found & left.keys()}:
        left = {module: found for module, found in left.items() if module not in grounded}
    assert not left


def test_a_loader_shares_the_disk_alone_with_what_writes_it():
    reached, new = set(), {"loader"}
    while new:
        reached |= new
        new = set().union(*(ALLOWED[part] for part in new)) - reached
    assert not reached & {"plan", "sources", "engines", "etl"}


@pytest.mark.parametrize("name", sorted(OLD_PATHS))
def test_old_paths_are_empty_rooms(name):
    doc, *rest = ast.parse((PACKAGE / name).read_text()).body
    assert all(isinstance(node, ast.ImportFrom | ast.Assign) for node in rest), name


def test_few_modules_import_distributed():
    found = {name for name in NAMES for i in imports_of(PACKAGE / name) if i.split(".")[0] == "distributed"}
    assert found == MAY_IMPORT_DISTRIBUTED


@pytest.mark.parametrize("part", ["plan", "kernels", "where", "order"])
def test_pure_layers_open_nothing(part):
    for name in [n for n in NAMES if layer(n) == part]:
        assert not {i.split(".")[0] for i in imports_of(PACKAGE / name)} & PURE_FORBIDS, name


def test_the_library_does_not_print():
    for name in [n for n in NAMES if n not in MAY_PRINT]:
        calls = [n for n in ast.walk(ast.parse((PACKAGE / name).read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], name


def test_slow_packages_are_imported_where_they_are_used():
    for name in NAMES:
        whole = ast.parse((PACKAGE / name).read_text())
        at_once = [node for node in whole.body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = set(names_in(at_once, PACKAGE / name))
        assert not [i for i in found if i.startswith(SLOW)], name


def test_every_layer_is_listed():
    top = {layer(n) for n in NAMES}
    assert top == set(ALLOWED) | FACADE


def test_a_class_has_a_name_of_its_own():
    named = [
        (node.name.lstrip("_"), name)
        for name in NAMES
        for node in ast.parse((PACKAGE / name).read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    names = [name for name, _ in named]
    assert not [pair for pair in named if names.count(pair[0]) > 1]


def test_no_module_is_long():
    lengths = {name: len((PACKAGE / name).read_text().splitlines()) for name in NAMES}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}


def test_tests_share_helpers_not_each_other():
    """What two test modules need stands in a module of helpers, so that either can be read or moved alone."""
    line = re.compile(r"^\s*(?:from|import) (tests\.(?:\w+\.)*test_\w+)\b", re.MULTILINE)
    found = {p.name: line.findall(p.read_text()) for p in Path(__file__).parents[1].rglob("*.py")}
    assert not {name: modules for name, modules in found.items() if modules}
