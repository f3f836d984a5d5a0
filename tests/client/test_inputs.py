"""The inputs of one run: opaque, with what tells runs apart, what is secret of them, and how they are sent."""

import dataclasses
import json
import pickle
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

from prefect_crew import DeployedCrew
from prefect_crew.blocks import crew_of
from prefect_crew.client.encoding import encode_inputs
from prefect_crew.client.inputs import Inputs, missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import MASK, Redactor
from prefect_crew.crew import Crew
from prefect_crew.exceptions import ConfigurationError
from support.frames import locals_of

VALUES = {"city": "Lisbon", "password": "hunter22", "login": {"pin": SecretStr("4711")}, "left out": None, "days": 3}


def crew(**fields: Any) -> Crew:
    block: dict[str, Any] = {"url": "https://crew.test", "token": SecretStr("the-token"), **fields}
    return crew_of(DeployedCrew(**block))


def kept(values: dict[str, Any] = VALUES, **fields: Any) -> Inputs:
    """Return inputs as a crew to which the password is secret takes them."""
    return crew(secret_inputs=["password", "not given"], **fields).take(Inputs.of(values))


def test_it_is_made_once_and_of_a_mapping_only():
    assert Inputs.of(inputs := Inputs.of(VALUES)) is inputs
    assert Inputs.of(None).encoded == {}
    with pytest.raises(ConfigurationError, match="by name, as a mapping, not as str"):
        Inputs.of("topic")  # type: ignore[arg-type]


def test_it_has_them_as_the_crew_takes_them():
    assert kept().encoded == {"city": "Lisbon", "password": "hunter22", "login": '{"pin":"4711"}', "days": "3"}
    assert kept(flow=True).encoded["login"] == {"pin": "4711"}


def test_crew_and_caller_name_the_secrets():
    assert kept().secret_names == ("password", "login")
    repeating = kept({"a": "with swordfish", "b": "x", "pin": "swordfish"}).keep_secret(["pin"])
    assert repeating.secret_names == ("pin",)
    assert repeating.shown(crew().redactor(repeating)) == {"a": f"with {MASK}", "b": "x", "pin": MASK}


def test_a_pipeline_hides_all():
    hidden = dataclasses.replace(kept(), is_hidden=True)
    assert hidden.secret_names == tuple(hidden.encoded)
    assert set(hidden.shown(crew().redactor(hidden)).values()) == {MASK}
    assert hidden.digest == kept().digest, "another topic is still another run"


def test_neither_repr_nor_frame_shows_a_value():
    inputs = kept()
    shown = f"{inputs!r} {inputs} {inputs.values!r} {inputs.encoded!r} {[inputs]}"
    assert "'city'" in shown
    assert not [word for word in ("Lisbon", "hunter22", "4711") if word in shown]
    with pytest.raises(ConfigurationError, match="Input 'last' holds") as caught:
        _ = Inputs.of({"password": "hunter22", "last": ["hunter22", object()]}).encoded
    assert "hunter22" not in locals_of(caught.value, but=__file__)


def test_other_processes_get_it():
    sent = pickle.loads(pickle.dumps(kept()))
    assert sent.encoded == kept().encoded
    assert sent.secret_names == kept().secret_names
    assert sent.digest == kept().digest


def test_a_crew_masks_tokens_and_secret_inputs():
    renewed = crew().with_token(SecretStr("the-new-token"))
    text = "Bearer the-token, the-new-token: hunter22 goes to Lisbon, swordfish, 4711"
    assert renewed.redactor(kept())(text) == f"Bearer {MASK}, {MASK}: {MASK} goes to Lisbon, swordfish, {MASK}"


def test_prefect_stores_inputs_that_are_not_secret():
    assert kept().shown(Redactor(["Lisbon"])) == {"city": MASK, "password": MASK, "login": MASK, "days": 3}


def test_the_digest_leaves_secrets_out():
    assert kept().digest == kept({**VALUES, "password": "swordfish"}).digest == kept(flow=True).digest
    assert kept().digest == Inputs.of({"city": "Lisbon", "days": 3}).digest
    assert kept().digest != kept({**VALUES, "city": "Porto"}).digest


def test_inputs_are_compared_by_exact_names():
    expected = [CrewInput(name="budget"), CrewInput(name="age", required=False), CrewInput(name="topic")]
    given_inputs = {"Budget": 1, "topic": None, "age": 3, "id": "x", "b": 0}
    assert missing_inputs(expected, given_inputs) == ["budget", "topic"]
    assert unknown_inputs(expected, given_inputs) == ["Budget", "b"]
    assert unknown_inputs([], given_inputs) == missing_inputs(expected, {"budget": 1, "topic": ""}) == []


def test_a_digest_never_changes():
    same = [{"a": {"z", "y"}, "b": 2}, {"b": "2", "a": {"y", "z"}, "c": None}]
    others = [{"a": ["z", "y"], "b": 2}, {"a": ["y", "z"]}, {"a": ["y", "z"], "c": 2}, {}, {"a": ""}]
    assert len({Inputs.of(inputs).digest for inputs in same}) == 1
    assert len({Inputs.of(inputs).digest for inputs in (same[0], *others)}) == 1 + len(others)
    # A digest stands in crew databases that outlive this version: the figures stay.
    three = Inputs.of({"topic": "Lisbon", "days": 3, "when": date(2025, 1, 2)})
    assert three.digest == "ac79fdfa3001cab39457346ccaaf7a5f"
    inputs, state = {"topic": "Lisbon"}, "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"
    assert Inputs(inputs, restore_from=state).digest == "b694c1a96265d09d329abf5976dba7df"
    assert Inputs.of({**inputs, "restoreFromStateId": state}).digest != Inputs(inputs, restore_from=state).digest


# How they are sent


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
    encoded = encode_inputs({"x": value}, as_json=True)["x"]
    assert encoded == as_json
    assert type(encoded) is type(as_json)


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
    values = {name: value for name, value in inputs.items() if value is not None}
    assert encode_inputs(inputs, as_json=True) == values
    text = encode_inputs(inputs)
    assert {name: text[name] if isinstance(values[name], str) else json.loads(text[name]) for name in text} == values
    names = list(inputs)
    random.shuffle(names)
    assert Inputs.of({name: inputs[name] for name in names}).digest == Inputs.of(inputs).digest
