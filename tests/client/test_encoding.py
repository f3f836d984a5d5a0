from __future__ import annotations

import dataclasses
import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from prefect_crew.client.encoding import encode_inputs
from prefect_crew.client.inputs import Inputs
from prefect_crew.exceptions import ConfigurationError


class Pace(str, Enum):  # noqa: UP042  # its str() is not its value
    SLOW = "slow"


@dataclasses.dataclass
class Trip:
    city: str
    when: date
    notes: list[Any] = dataclasses.field(default_factory=list)


class Budget(BaseModel):
    amount: Decimal
    key: SecretStr
    trip: Trip | None = None


UUID_TEXT = "3f2c9f0e-6b1a-4f0e-9a51-0c3a8a1f2b3c"
TRIP = Trip("Rome", date(2025, 1, 2))
SENT_TRIP = {"city": "Rome", "when": "2025-01-02", "notes": []}
BUDGET = Budget(amount=Decimal("1.5"), key=SecretStr("k3y"), trip=TRIP)
ODD = {"город": [date(2025, 1, 2)], 1: Pace.SLOW}
AS_THEY_ARE = ["Lisbon\n ", "", "Лиссабон \u200fلشبونة 🧳", "007"]
CASES: dict[str, tuple[Any, str, Any]] = {
    # value, as text, as a JSON value
    **{f"text-{number}": (text, text, text) for number, text in enumerate(AS_THEY_ARE)},
    "number": (3, "3", 3),
    "whole-float": (2.0, "2.0", 2.0),
    "rational": (Fraction(1, 4), "0.25", 0.25),
    "large-number": (10**30, str(10**30), 10**30),
    "true": (True, "true", True),
    "false": (False, "false", False),
    "date": (date(2025, 1, 2), "2025-01-02", "2025-01-02"),
    "datetime": (datetime(2025, 1, 2, 3, tzinfo=UTC), *["2025-01-02T03:00:00+00:00"] * 2),
    "decimal": (Decimal("10.50"), "10.50", "10.50"),
    "large-decimal": (Decimal("1e400"), "1E+400", "1E+400"),
    "uuid": (UUID(UUID_TEXT), UUID_TEXT, UUID_TEXT),
    "path": (PurePosixPath("a/b"), "a/b", "a/b"),
    "enum": (Pace.SLOW, "slow", "slow"),
    "list": (["a", 1, None, True], '["a",1,null,true]', ["a", 1, None, True]),
    "tuple": ((1, (2,)), "[1,[2]]", [1, [2]]),
    "set": ({"b", "a"}, '["a","b"]', ["a", "b"]),
    "object": (ODD, '{"город":["2025-01-02"],"1":"slow"}', {"город": ["2025-01-02"], "1": "slow"}),
    "dataclass": (TRIP, '{"city":"Rome","when":"2025-01-02","notes":[]}', SENT_TRIP),
    "model": (
        BUDGET,
        '{"amount":"1.5","key":"k3y","trip":{"city":"Rome","when":"2025-01-02","notes":[]}}',
        {"amount": "1.5", "key": "k3y", "trip": SENT_TRIP},
    ),
    "secret": (SecretStr("k3y"), "k3y", "k3y"),
}


@pytest.mark.parametrize("case", CASES)
def test_value_as_text_and_as_json(case: str):
    value, text, as_json = CASES[case]
    assert encode_inputs({"x": value}) == {"x": text}
    found = encode_inputs({"x": value}, as_json=True)["x"]
    assert (found, type(found)) == (as_json, type(as_json))


class NotATime(datetime):
    """What pandas' NaT is: a datetime that is not equal to itself."""

    __hash__ = datetime.__hash__

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
SECRET = "sk-12345"
UNSENDABLE: dict[str, Any] = {
    "nan": float("nan"),
    "nested-infinity": [1, {"a": float("inf")}],
    "decimal-nan": Decimal("NaN"),
    "decimal-signaling-nan": Decimal("sNaN"),
    "too-many-digits": 10**5000,
    "lone-surrogate": f"{SECRET}\ud800",
    "cycle": CYCLE,
    "not-a-time": NotATime(2025, 1, 1),
    "bytes": SECRET.encode(),
    "timedelta": timedelta(1),
    "complex": 1j,
    "class": Trip,
    "tuple-as-a-key": {("a",): 1},
    "none-as-a-key": {None: 1},
    "function": lambda: SECRET,
}


@pytest.mark.parametrize("as_json", [False, True], ids=["as-text", "as-json"])
@pytest.mark.parametrize("case", UNSENDABLE)
def test_an_unsendable_value_is_not_shown(case: str, as_json: bool):
    with pytest.raises(ConfigurationError, match="Input 'budget'") as caught:
        encode_inputs({"topic": "x", "budget": UNSENDABLE[case]}, as_json=as_json)
    assert SECRET not in str(caught.value)


def test_names_must_be_text():
    with pytest.raises(ConfigurationError, match="name of an input"):
        encode_inputs({1: "x"})  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="surrogate"):
        encode_inputs({"\ud800": "x"})


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=10,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), PLAIN), st.randoms())
def test_plain_values_survive(inputs: dict[str, Any], random: Any):
    given_values = {name: value for name, value in inputs.items() if value is not None}
    assert encode_inputs(inputs, as_json=True) == given_values
    text = encode_inputs(inputs)
    assert {
        name: value if isinstance(value, str) else json.loads(text[name]) for name, value in given_values.items()
    } == given_values
    names = list(inputs)
    random.shuffle(names)
    assert Inputs.of({name: inputs[name] for name in names}).digest == Inputs.of(inputs).digest
