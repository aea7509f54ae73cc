"""One rule for seeds, wherever one is taken.

``seed`` is a non-negative integer, or a generator from which one is drawn, or None for the default. ``rng`` is
annbatch's name: a generator or None; a number is taken with a FutureWarning, as annbatch's samplers do.
"""

from __future__ import annotations

import numpy as np

from annbatch_dask.errors import LayoutError
from annbatch_dask.warn import warn

__all__ = ["Seed", "check_number", "check_rng", "check_seed", "draw_seed", "only_one", "resolve_seed"]

Seed = int | np.random.Generator
"""What ``seed`` may be, beside None."""


def _is_number(value: object) -> bool:
    """True if a seed or generator was given as a number."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_seed(seed: Seed | None) -> Seed | None:
    """The seed, if it may be one."""
    if seed is None or isinstance(seed, np.random.Generator):
        return seed
    if not _is_number(seed):
        msg = f"seed must be a non-negative integer, a numpy.random.Generator or None, got {type(seed).__name__}"
        raise TypeError(msg)
    if seed < 0:
        msg = f"seed is {seed}; it must be 0 or more"
        raise LayoutError(msg)
    return int(seed)


def check_number(seed: int) -> int:
    """The seed, where it has to be a number."""
    if not _is_number(seed):
        msg = f"seed must be a non-negative integer, got {seed!r}"
        raise TypeError(msg)
    check_seed(seed)
    return int(seed)


def check_rng(rng: Seed | None) -> np.random.Generator | None:
    """The generator to use; a number is taken with a FutureWarning, anything else is a TypeError."""
    if rng is None or isinstance(rng, np.random.Generator):
        return rng
    if _is_number(rng):
        if rng < 0:
            msg = f"rng is {rng}; give a numpy.random.Generator, or seed=, a number of 0 or more"
            raise LayoutError(msg)
        msg = f"Passing a seed as rng is deprecated, pass numpy.random.default_rng({rng!r}), or seed={rng}"
        warn(msg, FutureWarning)
        return np.random.default_rng(rng)
    msg = f"rng must be a numpy.random.Generator, got {type(rng).__name__}"
    raise TypeError(msg)


def only_one(seed: Seed | None, rng: Seed | None) -> None:
    """Refuse both."""
    if seed is not None and rng is not None:
        msg = f"seed={seed} and rng are both given; give one"
        raise ValueError(msg)


def draw_seed(rng: np.random.Generator) -> int:
    """A seed from a generator, in [0, 2**63)."""
    return int.from_bytes(rng.bytes(8), "little") >> 1


def resolve_seed(seed: Seed | None, rng: Seed | None = None, *, default: int = 0) -> int:
    """The seed given, or drawn from the generator given, or the default: the same call again does the same."""
    only_one(seed, rng)
    found = check_seed(seed)
    if rng is not None:
        given = check_rng(rng)
        found = int(rng) if _is_number(rng) else given  # type: ignore[arg-type]
    if found is None:
        return default
    return draw_seed(found) if isinstance(found, np.random.Generator) else found
