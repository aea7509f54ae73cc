"""Templates, filled in. Everything that comes from files is escaped."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2

from annbatch_dask.formatting import format_bytes, format_count

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """Fill in a template of this folder."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("annbatch_dask.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=format_count, size=format_bytes, zip=zip)
    return environment
