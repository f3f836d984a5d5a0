"""JSON for anything."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prefect_crew.devserver._json import to_json

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
ODD = st.recursive(
    st.floats() | st.binary() | st.complex_numbers() | st.datetimes() | st.text(st.characters(categories=["Cs", "L"])),
    lambda inner: (
        st.lists(inner) | st.sets(st.integers()) | st.dictionaries(st.tuples(st.integers()) | st.text(), inner)
    ),
)


@given(PLAIN)
def test_what_json_can_hold_comes_back(value: Any) -> None:
    assert json.loads(to_json(value)) == value


@given(ODD)
def test_what_it_cannot_hold_is_still_json(value: Any) -> None:
    json.loads(to_json(value), parse_constant=refuse)


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_what_holds_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert b"<list>" in to_json(loop)
