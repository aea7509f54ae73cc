"""One rule for arguments that are True or False."""

from __future__ import annotations

from numbers import Integral

import numpy as np

__all__ = ["check_flag"]


def check_flag(name: str, value: object) -> bool:
    """The value as one of Python's; TypeError for anything else, most of which Python takes for True: ``"False"``."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, Integral) and value in {0, 1}):
        return bool(value)
    msg = f"{name} is {value!r}; it must be True or False"
    raise TypeError(msg)
