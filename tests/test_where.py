"""Conditions on obs: always what pandas makes of them, and never anything else than a condition."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask.errors import SelectionError
from annbatch_dask.where import Condition

N = 12


def make_frame(seed: int, n: int = N) -> pd.DataFrame:
    """Columns of every kind that obs has; in half of them values are missing."""
    rng = np.random.default_rng(seed)
    words = np.array(["a", "b", "ab", "a b", "it's & | `so`"], object)
    gaps = partial(np.where, rng.random(n) < 0.3)
    whole = rng.integers(-3, 4, n)
    frame = pd.DataFrame(
        {
            "whole": whole,
            "small": whole.astype(np.int8),
            "real": gaps(np.nan, rng.integers(-3, 4, n) / 2),
            "single": (rng.integers(-3, 4, n) / 4).astype(np.float32),
            "flag": rng.random(n) < 0.5,
            "text": words[rng.integers(0, 5, n)],
            "holes": gaps(None, words[rng.integers(0, 5, n)]),
            "kind": pd.Categorical.from_codes(rng.integers(-1, 5, n), words),
            "stage": pd.Categorical.from_codes(rng.integers(-1, 3, n), list("abc"), ordered=True),
            "donor": pd.Categorical.from_codes(rng.integers(-1, 3, n), [3, 1, 2]),
            "count": pd.Series(whole, dtype="Int64").mask(rng.random(n) < 0.3),
            "passed": pd.Series(rng.random(n) < 0.5, dtype="boolean").mask(rng.random(n) < 0.3),
            "note": pd.Series(words[rng.integers(0, 5, n)], dtype=pd.StringDtype("python")).mask(rng.random(n) < 0.3),
            "n cells": whole * 2,
        }
    )
    return frame.set_axis([f"cell_{i}" for i in range(n)])


NUMBERS = st.sampled_from(["whole", "real", "single", "count", "`n cells`"])
CONSTANTS = st.one_of(st.integers(-4, 4).map(str), st.sampled_from(["0.5", "-1.5", "1e3"]))
TEXTS = st.sampled_from(["text", "holes", "kind", "note"])
WORDS = st.sampled_from(["'a'", '"b"', "'a b'", "'z'", '"it\'s & | `so`"'])
COMPARE = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
EQUAL = st.sampled_from(["==", "!="])
IS_IN = st.sampled_from(["in", "not in", "==", "!="])
ARITHMETIC = st.sampled_from(["+", "-", "*", "/"])


def joined(*parts):
    return st.tuples(*(st.just(p) if isinstance(p, str) else p for p in parts)).map(" ".join)


REAL = st.one_of(NUMBERS, joined("(", NUMBERS, ARITHMETIC, st.one_of(NUMBERS, CONSTANTS), ")"))
ATOMS = st.one_of(
    joined(REAL, COMPARE, st.one_of(REAL, CONSTANTS)),
    joined(CONSTANTS, COMPARE, NUMBERS),
    joined(CONSTANTS, COMPARE, NUMBERS, COMPARE, CONSTANTS),
    joined(NUMBERS, IS_IN, "[", CONSTANTS, ",", CONSTANTS, "]"),
    joined(TEXTS, EQUAL, WORDS),
    joined(TEXTS, IS_IN, "[", WORDS, ",", WORDS, "]"),
    joined("stage", COMPARE, st.sampled_from(["'a'", "'c'"])),
    joined("donor", EQUAL, st.integers(0, 3).map(str)),
    joined("donor", IS_IN, "[1, 2, 5]"),
    joined(EQUAL.map("flag {} True".format)),
    st.sampled_from(["flag", "passed", "flag == passed"]),
    st.tuples(st.one_of(TEXTS, st.sampled_from(["real", "count", "passed", "stage"])), st.sampled_from(["isna", "notna"]))
    .map("{0[0]}.{0[1]}()".format),
    st.tuples(TEXTS, st.sampled_from(["contains", "startswith", "endswith"]), WORDS).map(
        "{0[0]}.str.{0[1]}({0[2]}, na=False)".format
    ),
)  # fmt: skip
CONDITIONS = st.recursive(
    ATOMS,
    lambda part: st.one_of(
        joined("(", part, st.sampled_from(["and", "or", "&", "|"]), part, ")"),
        joined("not (", part, ")"),
        joined("~ (", part, ")"),
        joined(part, st.sampled_from(["and", "or", "&", "|"]), part),
    ),
    max_leaves=5,
)


def mask(text: str, obs: pd.DataFrame) -> np.ndarray:
    found = Condition.parse(text).mask(lambda name: obs[name], len(obs))
    assert found.dtype == bool
    assert found.shape == (len(obs),)
    return found


@settings(max_examples=200)
@given(condition=CONDITIONS, seed=st.integers(0, 50))
def test_the_rows_are_those_that_pandas_finds(condition, seed):
    obs = make_frame(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas warns of divisions by zero
        expected = obs.query(condition, engine="python")
    assert obs.index[mask(condition, obs)].tolist() == expected.index.tolist()


def test_small_integers_do_not_wrap_around():
    obs = pd.DataFrame({"n": np.array([0, 100, 200, 255], np.uint8)})
    assert mask("n + 100 > 250", obs).tolist() == [False, False, True, True]
    assert mask("n - 1 < 0", obs).tolist() == [True, False, False, False]
    assert mask("-n < 0", obs).tolist() == [False, True, True, True]
    obs = obs.astype("UInt8")
    assert mask("n * 2 > 255", obs).tolist() == [False, False, True, True]


def test_a_text_that_is_missing_contains_nothing_and_lacks_nothing():
    obs = make_frame(0)
    for name in ("holes", "kind", "note"):
        found = mask(f"{name}.str.contains('A', case=False)", obs) | mask(f"~{name}.str.contains('A', case=False)", obs)
        assert found.tolist() == obs[name].notna().tolist()
        assert mask(f"{name}.str.contains('A', case=False, na=True)", obs)[obs[name].isna()].all()
    assert mask("text.str.contains('a b', regex=False)", obs).tolist() == [t == "a b" for t in obs["text"]]


def test_only_columns_that_are_named_are_asked_for():
    condition = Condition.parse("`n cells` > 3 and (kind in ['a'] or not flag) and kind != 'b'")
    assert condition.columns == ("n cells", "kind", "flag")
    obs = make_frame(0)
    asked = []
    condition.mask(lambda name: asked.append(name) or obs[name], N)
    assert set(asked) == set(condition.columns)


REFUSED = [
    ("donor.to_csv('pwned.csv') == 1", r"donor.to_csv\('pwned.csv'\)\" is refused"),
    ("text.str.cat(others='a') == 'a'", "is refused"),
    ("text.map(print).isna()", "is refused"),
    ("text.str.lower().str.contains('a')", "is refused"),
    ("text.__class__ == 1", "'text.__class__' is refused"),
    ("whole.values > 1", "is refused"),
    ("@os.system('id')", "cannot be read"),
    ("__import__('os').system('id')", "is refused"),
    ("print(whole)", "is refused"),
    ("(lambda: True)()", "is refused"),
    ("[c for c in whole]", "is refused"),
    ("whole[0] == 1", r"'whole\[0\]' is refused"),
    ("f'{whole}' == text", "is refused"),
    ("whole > (1 if flag else 2)", "is refused"),
    ("(n := 3) > whole", "is refused"),
    ("whole ** 9 ** 9 > 3", "is refused"),
    ("whole << 3 > 1", "is refused"),
    ("whole == None", r"'None' is no value; missing ones are column.isna\(\)"),
    ("whole is None", r"missing values are column.isna\(\)"),
    ("whole in flag", "'flag' is no list"),
    ("'a' in text", "'text' is no list"),
    ("whole in [1, small]", "'small' must be a number"),
    ("text.isin('ab')", "is no list"),
    ("text.isin(values='a')", "is refused"),
    ("text.str.contains('a', flags=2)", "of options case, na, regex"),
    ("text.str.contains('a', **whole)", "of options case, na, regex"),
    ("text.str.contains(3)", "no text"),
    ("text.str.contains(whole)", "must be a number, a text"),
    ("text * 'a' == 'aa'", "is no number to reckon with"),
    ("whole + 1", "is neither true nor false"),
    ("True", "is neither true nor false"),
    ("1 < 2", "compares no column"),
    ("whole > 1 and 1 < 2", "compares no column"),
    ("", "cannot be read"),
    ("whole +", "cannot be read"),
    ("whole > 1; flag", "cannot be read"),
    ("percent.mt < 5", "'percent.mt' is refused"),
    ("whole > 1\x00", "cannot be read"),
    ("(" * 5000 + "flag" + ")" * 5000, "cannot be read"),
    ("~" * 60 + "flag", "nested more than 50 deep"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text[:30] for text, _ in REFUSED])
def test_what_is_no_condition_is_refused_before_a_column_is_read(text, message):
    with pytest.raises(SelectionError, match=message) as caught:
        Condition.parse(text)
    if "nested" not in message:
        assert "it may hold columns (`in backticks` where a name has spaces or dots)" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text > 3", "'text > 3' cannot be worked out"),
        ("kind + 1 > 3", "'kind [+] 1' cannot be worked out"),
        ("kind > 'a'", "cannot be worked out"),
        ("stage > 'z'", "cannot be worked out"),
        ("`n cells`.str.contains('a')", r"`n cells`.str.contains\(.*cannot be worked out"),
        ("text.str.contains('(')", "cannot be worked out"),
        ("whole", "'whole' must be true or false for each row, it is int64"),
        ("flag and not whole", "'whole' must be true or false for each row, it is int64"),
    ],
)
def test_what_cannot_be_worked_out_is_said_with_its_part(text, message):
    with pytest.raises(SelectionError, match=message):
        mask(text, make_frame(0))
