"""Templates, filled in. Everything that comes from files is escaped."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2

from annbatch_dask.progress import format_bytes

__all__ = ["format_count", "render"]


def format_count(n: float) -> str:
    """A number of things: ``1,234``; with a digit behind the point where it is not whole."""
    return f"{n:,.0f}" if float(n).is_integer() or n >= 1000 else f"{n:,.1f}"


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
    environment.filters.update(count=format_count, size=format_bytes)
    return environment
