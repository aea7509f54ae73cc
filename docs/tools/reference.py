"""An extension of griffe: Sphinx roles become links, private defaults values, long lists of parameters groups.

mkdocs.yml names this file among the extensions of mkdocstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc|data|obj):`(~?)([^`]+)`")

RESULT = re.compile(r"(?m)^(?P<title>(?:Returns|Yields)\n-+\n)(?P<text>(?:\S.*\n?)++)(?! )")
"""A section of prose alone, which numpydoc would take for types."""

SPECIAL = {"__call__", "__getitem__", "__iter__", "__len__", "__version__"}
"""Special methods that a user calls, if by another spelling. What the others do goes without saying."""

GROUPS: dict[str, dict[str, list[str]]] = {
    "annbatch_dask.Loader": {
        "order": [
            *("batch_size", "shuffle", "seed", "drop_last"),
            *("chunk_size", "preload_nchunks", "batch_sampler", "rng"),
        ],
        "choice of rows": ["where", "return_index"],
        "form of X": ["dense", "to", "dtype", "casting", "var_names", "transform"],
        "other contents": ["layers", "obsm", "obs_columns", "obs_codes"],
        "several processes": ["dist_info", "even", "global_batch_size"],
        "GPU, memory and cache": ["preload_to_gpu", "prefetch_bytes", "max_requests", "cache_dir", "cache_bytes"],
    },
    "annbatch_dask.DatasetCollection.add_adatas": {
        "inputs": ["adata_paths", "load_adata", "storage_options", "on_duplicate_source"],
        "what is carried": ["elements", "counts", "allow_mixed_counts", "var_subset", "merge", "duplicates"],
        "names of genes": ["var_key", "gene_map", "strip_versions", "on_duplicate_gene"],
        "order": ["shuffle", "seed", "rng", "groupby", "mode", "genes"],
        "form on disk": [
            *("dataset_size", "shard_size", "n_obs_per_chunk", "layout", "gene_order", "zarr_compressor"),
            *("stats", "stats_by", "keep"),
        ],
        "how it runs": ["client", "memory_limit", "scratch", "scratch_options", "callbacks", "progress"],
    },
}
"""Keywords by topic, of the signatures that are too long to be read from the first to the last. Others follow."""


class Reference(griffe.Extension):
    """Prepares all objects once the package is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Prepare the package."""
        found = loader.modules_collection
        self._groups = {found.get_member(path).canonical_path: groups for path, groups in GROUPS.items()}
        self._prepare(pkg, loader, set())

    def _prepare(self, obj: Any, loader: griffe.GriffeLoader, seen: set[str]) -> None:
        if obj.path in seen:
            return
        seen.add(obj.path)
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda m: link(m, obj, loader), obj.docstring.value)
        if obj.is_class:
            obj.bases = [b for b in obj.bases if not str(b).split(".")[-1].startswith(("_", "Generic"))]
            drop_private_fields(obj)
        if obj.is_attribute and obj.value is not None:
            obj.value = public_default(obj.value, obj)
        if obj.is_function:
            if obj.docstring:
                obj.docstring.value = RESULT.sub(lambda m: typed_result(m, obj), obj.docstring.value)
            for parameter in obj.parameters:
                parameter.default = public_default(parameter.default, obj)
        for name, member in obj.members.items():
            if name.startswith("__") and name not in SPECIAL and not member.is_alias:
                member.public = False
            if not member.is_alias:
                self._prepare(member, loader, seen)
        if groups := self._groups.get(obj.path):
            group_parameters(obj, groups)


def typed_result(match: re.Match[str], obj: Any) -> str:
    """Put the type of a signature's result before a section of prose."""
    text = "".join(f"    {line}\n" for line in match["text"].splitlines())
    return f"{match['title']}{obj.returns}\n{text}"


def link(match: re.Match[str], obj: Any, loader: griffe.GriffeLoader) -> str:
    """Turn a Sphinx role into a link to the object's entry, or into code where the reference has none."""
    short, name = match.groups()
    text = name.rpartition(".")[2] if short or name.startswith("annbatch_dask.") else name
    if (path := find(name, obj, loader)) is None:
        return f"`{text}`"
    return f'<autoref optional identifier="{path}"><code>{text}</code></autoref>'


def find(name: str, obj: Any, loader: griffe.GriffeLoader) -> str | None:
    """Return the canonical path of what a role names, as seen from an object; None for what is not of this package."""
    while obj is not None:
        if not name.startswith("annbatch_dask.") and name in obj.members:
            return str(obj.members[name].canonical_path)
        obj = obj.parent
    try:
        return str(loader.modules_collection.get_member(name).canonical_path)
    except (KeyError, griffe.GriffeError):
        return None


def public_default(default: Any, obj: Any) -> Any:
    """Return the value of a default that is the name of a private constant."""
    named = re.fullmatch(r"(?:field\(default=)?(_\w+)\)?", str(default))
    member = None if named is None else obj.module.members.get(named[1])
    return member.value if member is not None and member.is_attribute else default


def drop_private_fields(cls: Any) -> None:
    """Leave private fields out of a dataclass and its signature."""
    if "dataclass" not in cls.labels:
        return
    private = [n for n, m in cls.members.items() if m.is_attribute and n.startswith("_")]
    for name in private:
        del cls.members[name]
    if (init := cls.members.get("__init__")) is not None:
        for name in [p.name for p in init.parameters if p.name in private]:
            del init.parameters[name]


def group_parameters(obj: Any, groups: dict[str, list[str]]) -> None:
    """Cut the one list of parameters into several, each under its topic."""
    sections = []
    for section in obj.docstring.parse("numpy"):
        if section.kind is griffe.DocstringSectionKind.parameters:
            sections += grouped(section, groups)
        else:
            sections.append(section)
    obj.docstring.__dict__["parsed"] = sections


def grouped(section: Any, groups: dict[str, list[str]]) -> list[Any]:
    """Return the sections that one list of parameters becomes."""
    left = {p.name: p for p in section.value}
    found = []
    for title, names in groups.items():
        if some := [left.pop(n) for n in names if n in left]:
            found.append(griffe.DocstringSectionParameters(some, title=f"Parameters: {title}"))
    if left:
        found.append(griffe.DocstringSectionParameters(list(left.values()), title="Parameters: annbatch's other names"))
    return found
