"""One rule for seeds: what ``seed=`` and ``rng=`` may be, everywhere."""

from __future__ import annotations

import numpy as np

__all__ = ["resolve_seed"]


def resolve_seed(seed: int | None, rng: np.random.Generator | int | None) -> int:
    """The seed given, or drawn from the generator given, or 0: the same call again is the same build."""
    if seed is not None and rng is not None:
        msg = f"seed={seed} and rng are both given; give one"
        raise ValueError(msg)
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        return int(rng)
    if rng is not None and not isinstance(rng, np.random.Generator):
        msg = f"rng must be a numpy.random.Generator, not {type(rng).__name__}"
        raise TypeError(msg)
    if rng is not None:
        return int(rng.integers(2**63))
    return 0 if seed is None else int(seed)
