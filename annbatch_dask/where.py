"""Conditions on columns of obs, in a small grammar. They are parsed as data and never run as code.

A condition is parsed as Python's expressions are, and refused unless every part of it is one of those below. Only then
is it worked out, column by column, by operations that stand in this file; no attribute of any object is looked up by a
name that stands in the text.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SelectionError

__all__ = ["GRAMMAR", "Condition"]

GRAMMAR = (
    "columns (`in backticks` where a name has spaces or dots), numbers, 'texts', True and False; "
    "== != < <= > >=, also chained; in and not in [...]; and & or | not ~ ( ); + - * / // %; "
    "column.isna() and .notna(), .isin([...]), .str.contains('...'), .str.startswith('...') and .str.endswith('...')"
)
"""What a condition may be made of."""

Column = Callable[[str], pd.Series]
_Run = Callable[[Column], Any]

_MAX_DEPTH = 50
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|`(?P<name>[^`]*)`|(?P<op>[&|])""", re.DOTALL)
_QUOTED = "_quoted_{}_"

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_MISSING: Mapping[str, Callable[[pd.Series], Any]] = {
    "isna": pd.isna,
    "isnull": pd.isna,
    "notna": pd.notna,
    "notnull": pd.notna,
}
_TEXTS: Mapping[str, Callable[..., Any]] = {
    "contains": lambda column, text, **options: column.str.contains(text, **options),
    "startswith": lambda column, text, **options: column.str.startswith(text, **options),
    "endswith": lambda column, text, **options: column.str.endswith(text, **options),
}
_OPTIONS = {"contains": ("case", "na", "regex"), "startswith": ("na",), "endswith": ("na",)}


@dataclass(frozen=True)
class Condition:
    """A condition on the columns of obs, checked.

    It means what :meth:`pandas.DataFrame.query` makes of it. So a missing value (NaN, or no category) is unequal to
    everything and neither less nor greater. In pandas' nullable integers and booleans how it compares is unknown, as is
    whether a text that is missing contains another. Rows for which the whole is unknown take no part.
    Integers are added and multiplied as int64, whatever they are stored in.

    Attributes
    ----------
    text
        As it was given.
    columns
        The columns it names, in the order in which it does.

    Examples
    --------
    >>> condition = where.Condition.parse("n > 1 and kind in ['a', 'b']")
    >>> condition.columns
    ('n', 'kind')
    >>> obs = pd.DataFrame({"n": [1, 2, 3], "kind": list("abc")})
    >>> condition.mask(obs.get, 3).tolist()
    [False, True, False]
    """

    text: str
    columns: tuple[str, ...]
    _run: _Run = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse a condition.

        Raises
        ------
        SelectionError
            If it is made of anything but what the grammar has. Nothing has been worked out then.
        """
        names: list[str] = []

        def plain(token: re.Match[str]) -> str:
            if token["op"]:
                return " and " if token["op"] == "&" else " or "
            if token["name"] is None:
                return token[0]
            names.append(token["name"])
            return _QUOTED.format(len(names) - 1)

        try:
            tree = ast.parse(_TOKEN.sub(plain, text).strip(), mode="eval").body
            reader = _Reader(text, names)
            run = reader.truth(tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, SelectionError):
                raise
            msg = f"where={text!r} cannot be read ({error}); it may hold {GRAMMAR}"
            raise SelectionError(msg) from error
        if not reader.columns:
            msg = f"where={text!r} names no column of obs; it may hold {GRAMMAR}"
            raise SelectionError(msg)
        return cls(text, tuple(reader.columns), run)

    def mask(self, column: Column, n_rows: int) -> NDArray[np.bool_]:
        """Return the rows that meet the condition: (n_rows,) bool. ``column`` returns the (n_rows,) values of a column.

        Raises
        ------
        SelectionError
            If values cannot be compared, added or searched as it says.
        """
        found = self._run(lambda name: _series(column(name)))
        return np.broadcast_to(_plain(found), n_rows).copy()


class _Reader:
    """Turns checked parts of a condition into functions of the columns."""

    def __init__(self, text: str, quoted: Sequence[str]) -> None:
        self._text, self._depth = text, 0
        self._quoted = {_QUOTED.format(k): name for k, name in enumerate(quoted)}
        self.columns: dict[str, None] = {}

    # --- what is true or false

    def truth(self, node: ast.expr) -> _Run:
        """A part that is true or false for each row."""
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self._below(self.truth, value) for value in values]
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                return lambda column: _joined(join, [part(column) for part in parts])
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
                part = self._below(self.truth, operand)
                return lambda column: ~part(column)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                sides = [left, *comparators]
                pairs = [self._comparison(node, *pair) for pair in zip(sides, ops, sides[1:], strict=False)]
                return lambda column: _joined(operator.and_, [pair(column) for pair in pairs])
            case ast.Call():
                return self._call(node)
            case ast.Name():
                return self._checked(node, self._column(node), must_be_true_or_false=True)
        self._refuse(node, "is neither true nor false for a row" if isinstance(node, ast.Constant | ast.BinOp) else "")

    def _comparison(self, whole: ast.Compare, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Run:
        is_list = isinstance(right, ast.List | ast.Tuple | ast.Set)
        if not any(isinstance(part, ast.Name) for side in (left, right) for part in ast.walk(side)):
            self._refuse(whole, "compares no column")
        if isinstance(op, ast.In | ast.NotIn) or (is_list and isinstance(op, ast.Eq | ast.NotEq)):
            if not is_list:
                self._refuse(right, "is no list; `in` needs one, such as ['a', 'b']")
            found = self._is_in(whole, left, right)
            return (lambda column: ~found(column)) if isinstance(op, ast.NotIn | ast.NotEq) else found
        if type(op) not in _COMPARISONS:
            self._refuse(whole, "compares in another way; missing values are column.isna()")
        compare, a, b = _COMPARISONS[type(op)], self._side(left), self._side(right)
        return self._checked(whole, lambda column: compare(a(column), b(column)), must_be_true_or_false=True)

    def _side(self, node: ast.expr) -> _Run:
        """Evaluate one side of a comparison: values, or a condition (``(n > 3) == passed``)."""
        is_truth = isinstance(node, ast.BoolOp | ast.Compare | ast.Call) or (
            isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert)
        )
        return self._below(self.truth if is_truth else self._value, node)

    def _is_in(self, whole: ast.expr, left: ast.expr, right: ast.expr) -> _Run:
        values, part = self._constants(right), self._below(self._value, left)
        return self._checked(whole, lambda column: part(column).isin(values), must_be_true_or_false=True)

    def _call(self, node: ast.Call) -> _Run:
        """A method of a column, out of a handful."""
        options = {k.arg: self._constant(k.value) for k in node.keywords if k.arg is not None}
        match node.func:
            case ast.Attribute(value=ast.Attribute(value=ast.Name() as of, attr="str"), attr=name) if name in _TEXTS:
                unknown = len(options) < len(node.keywords) or not set(options) <= set(_OPTIONS[name])
                if unknown or len(node.args) != 1:
                    self._refuse(node, f"takes one text, and of options {', '.join(_OPTIONS[name])}")
                text, part, find = self._constant(node.args[0]), self._below(self._value, of), _TEXTS[name]
                if not isinstance(text, str):
                    self._refuse(node, "looks for what is no text")
                return self._checked(node, lambda column: _found(find, part(column), text, options))
            case ast.Attribute(value=ast.Name() as of, attr=name) if (
                name in _MISSING and not node.args and not node.keywords
            ):
                part, test = self._below(self._value, of), _MISSING[name]
                return self._checked(node, lambda column: test(part(column)))
            case ast.Attribute(value=ast.Name() as of, attr="isin") if len(node.args) == 1 and not node.keywords:
                if not isinstance(node.args[0], ast.List | ast.Tuple | ast.Set):
                    self._refuse(node.args[0], "is no list")
                return self._is_in(node, of, node.args[0])
        self._refuse(node)

    # --- values

    def _value(self, node: ast.expr) -> _Run:
        """A part that has a value for each row, or for all."""
        match node:
            case ast.Name():
                return self._column(node)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                do = _ARITHMETIC[type(op)]
                a, b = self._number(left), self._number(right)
                return self._checked(node, lambda column: do(a(column), b(column)))
            case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
                part = self._number(operand)
                return self._checked(node, lambda column: -part(column))
            case ast.Constant() | ast.UnaryOp():
                constant = self._constant(node)
                return lambda column: constant  # noqa: ARG005
        self._refuse(node)

    def _number(self, node: ast.expr) -> _Run:
        """A value that is added or multiplied."""
        if isinstance(node, ast.Constant) and not isinstance(node.value, int | float):
            self._refuse(node, "is no number to reckon with")
        part = self._below(self._value, node)
        return lambda column: _widened(part(column))

    def _column(self, node: ast.Name) -> _Run:
        name = self._quoted.get(node.id, node.id)
        self.columns[name] = None
        return lambda column: column(name)

    def _constants(self, node: ast.expr) -> list[Any]:
        assert isinstance(node, ast.List | ast.Tuple | ast.Set)  # noqa: S101
        return [self._constant(element) for element in node.elts]

    def _constant(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str()):
                return node.value
            case ast.Constant(value=None):
                self._refuse(node, "is no value; missing ones are column.isna()")
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
        self._refuse(node, "must be a number, a text, True or False")

    # --- errors

    def _below(self, read: Callable[[ast.expr], _Run], node: ast.expr) -> _Run:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            msg = f"where={self._text[:80]!r}... is nested more than {_MAX_DEPTH} deep; write it flatter"
            raise SelectionError(msg)
        run = read(node)
        self._depth -= 1
        return run

    def _checked(self, node: ast.expr, run: _Run, *, must_be_true_or_false: bool = False) -> _Run:
        """Evaluate with errors that name the part of the condition."""
        shown = self._shown(node)

        def checked(column: Column) -> Any:
            try:
                found = run(column)
            except SelectionError:
                raise
            except (TypeError, ValueError, ArithmeticError, AttributeError, re.error) as error:
                msg = f"where={self._text!r}: {shown} cannot be worked out: {error}"
                raise SelectionError(msg) from error
            if must_be_true_or_false and not pd.api.types.is_bool_dtype(getattr(found, "dtype", type(found))):
                msg = (
                    f"where={self._text!r}: {shown} must be true or false for each row, it is "
                    f"{getattr(found, 'dtype', type(found).__name__)}; compare it with a value"
                )
                raise SelectionError(msg)
            return found

        return checked

    def _shown(self, node: ast.AST) -> str:
        shown = ast.unparse(node)
        for placeholder, name in self._quoted.items():
            shown = shown.replace(placeholder, f"`{name}`")
        return repr(shown)

    def _refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        msg = f"where={self._text!r}: {self._shown(node)} {why or 'is refused'}; it may hold {GRAMMAR}"
        raise SelectionError(msg)


def _series(values: pd.Series) -> pd.Series:
    """Without its index; text as objects, whose missing values are unequal to others, as pandas' queries have it."""
    values = values.reset_index(drop=True)
    return values.astype(object) if isinstance(values.dtype, pd.StringDtype) else values


def _joined(join: Callable[[Any, Any], Any], parts: Sequence[Any]) -> Any:
    found = parts[0]
    for part in parts[1:]:
        found = join(found, part)
    return found


def _widened(values: Any) -> Any:
    """Small integers as int64, so that no sum wraps around."""
    dtype = getattr(values, "dtype", None)
    if dtype is None or not pd.api.types.is_integer_dtype(dtype) or dtype.itemsize == 8:  # noqa: PLR2004
        return values
    return values.astype("int64" if isinstance(dtype, np.dtype) else "Int64")


def _found(find: Callable[..., Any], column: pd.Series, text: str, options: Mapping[str, Any]) -> Any:
    """Find the texts that contain another; unknown if one is missing. Each category of a categorical is tested once."""
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return find(column, text, **options).astype("boolean")
    of_each = find(pd.Series(column.cat.categories), text, **options).astype("boolean")
    missing = pd.Series([options.get("na", pd.NA)], dtype="boolean")
    return pd.concat([of_each, missing], ignore_index=True).take(column.cat.codes).reset_index(drop=True)


def _plain(found: Any) -> NDArray[np.bool_]:
    """Unknown is not true."""
    if isinstance(found, pd.Series) and not isinstance(found.dtype, np.dtype):
        return found.to_numpy(bool, na_value=False)
    return np.asarray(found, bool)
