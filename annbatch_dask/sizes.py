"""Sizes as people write them: ``"2GB"`` is 2,000,000,000 bytes and ``"2GiB"`` is 2,147,483,648, as in dask."""

from __future__ import annotations

from numbers import Integral, Real

from annbatch_dask.errors import LayoutError

__all__ = ["check_positive", "check_whole", "parse_nbytes", "parse_rows_or_nbytes"]

_MOST = 2**48
"""No collection has so many rows."""


def check_positive(name: str, value: object) -> None:
    """ValueError for a number below 1, in which are annbatch's words, or too large; TypeError for no whole number."""
    if value is None:
        return
    number = check_whole(name, value)
    if number > _MOST:
        msg = f"{name} must be {_MOST} or less, got {value}"
        raise ValueError(msg)
    if number < 1:
        msg = f"{name} must be 1 or more (as annbatch says it: {name} must be greater than 1, got {value})"
        raise ValueError(msg)


def check_whole(name: str, value: object, least: int | None = None) -> int:
    """A whole number, as one of Python's; TypeError for anything else, ValueError for one that is too small."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        msg = f"{name} is {value!r}; it must be a whole number"
        raise TypeError(msg)
    if least is not None and value < least:
        msg = f"{name} must be {least} or more, got {value}"
        raise ValueError(msg)
    return int(value)


def parse_nbytes(name: str, value: float | str) -> int:
    """Bytes, from a number or a text.

    Parameters
    ----------
    name
        The option's, for the error.

    Raises
    ------
    LayoutError
        If it is no size, or less than a byte.
    """
    from dask.utils import parse_bytes  # not needed by those who only count

    try:
        if isinstance(value, bool) or (isinstance(value, str) and not any(map(str.isdigit, value))):
            raise ValueError(value)  # noqa: TRY301 - dask takes True and "" for one byte
        n_bytes = int(parse_bytes(value))
    except (ValueError, TypeError, AttributeError, OverflowError) as e:  # dask's, of what is neither number nor text
        msg = f"{name} is {value!r}; give a number of bytes, or a size such as '2GB' or '2GiB'"
        raise LayoutError(msg) from e
    if n_bytes < 1:
        msg = f"{name} is {value!r}; it must be 1 byte or more"
        raise LayoutError(msg)
    return n_bytes


def parse_rows_or_nbytes(name: str, value: int | str) -> tuple[int | None, int | None]:
    """Rows of a number, or bytes of a text: exactly one of the two.

    Raises
    ------
    LayoutError
        If it is no size, or less than one.
    """
    if isinstance(value, str):
        try:
            return None, parse_nbytes(name, value)
        except LayoutError as e:
            msg = f"{name} is {value!r}; give a number of cells, or a size such as '2GB' or '2GiB'"
            raise LayoutError(msg) from e
    if not isinstance(value, Real):
        msg = f"{name} is {value!r}; give a number of cells, or a size such as '2GB' or '2GiB'"
        raise LayoutError(msg)
    if value < 1 or value != int(value):
        msg = f"{name} is {value}; it must be a whole number, 1 or more"
        raise LayoutError(msg)
    return int(value), None
