"""The inputs of one run: opaque, with what tells runs apart and what is secret of them."""

from __future__ import annotations

import pickle
from datetime import date
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_crew import DeployedCrew
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs, missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import MASK, Redactor
from prefect_crew.crew import Crew
from prefect_crew.exceptions import ConfigurationError
from support.frames import locals_of

GIVEN = {"city": "Lisbon", "password": "hunter22", "login": {"pin": SecretStr("4711")}, "left out": None, "days": 3}


def crew(**fields: Any) -> Crew:
    block: dict[str, Any] = {"url": "https://crew.test", "token": SecretStr("the-token"), **fields}
    return crew_of(DeployedCrew(**block))


def kept(given: dict[str, Any] = GIVEN, **fields: Any) -> Inputs:
    """Return inputs as a crew to which the password is secret takes them."""
    return crew(secret_inputs=["password", "not given"], **fields).take(Inputs.of(given))


def test_it_is_made_once_and_of_a_mapping_only():
    assert Inputs.of(inputs := Inputs.of(GIVEN)) is inputs
    assert Inputs.of(None).encoded == {}
    with pytest.raises(ConfigurationError, match="by name, as a mapping, not as str"):
        Inputs.of("topic")  # type: ignore[arg-type]


def test_it_has_them_as_the_crew_takes_them():
    assert kept().encoded == {"city": "Lisbon", "password": "hunter22", "login": '{"pin":"4711"}', "days": "3"}
    assert kept(inputs_as_json=True).encoded["login"] == {"pin": "4711"}


def test_crew_caller_or_pipeline_name_the_secrets():
    assert kept().secret_names == ("password", "login")
    repeating = kept({"a": "with swordfish", "b": "x", "pin": 1}).keep_secret(["pin"], [SecretStr("swordfish")])
    assert repeating.secret_names == ("a", "pin")
    assert repeating.shown(crew().redactor(repeating)) == {"a": MASK, "b": "x", "pin": MASK}


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
    assert (sent.encoded, sent.secret_names, sent.digest) == (kept().encoded, kept().secret_names, kept().digest)


def test_a_crew_masks_tokens_and_secret_inputs():
    renewed = crew().with_token(SecretStr("the-new-token"))
    text = "Bearer the-token, the-new-token: hunter22 goes to Lisbon, swordfish, 4711"
    assert renewed.redactor(kept())(text) == f"Bearer {MASK}, {MASK}: {MASK} goes to Lisbon, swordfish, {MASK}"
    more = kept().keep_secret([], [SecretStr("swordfish")])
    assert "swordfish" not in renewed.redactor(more)(text)


def test_prefect_stores_inputs_that_are_not_secret():
    assert kept().storable(Redactor(["Lisbon"])) == {"city": MASK, "password": MASK, "login": MASK, "days": 3}


def test_the_digest_leaves_secrets_out():
    assert kept().digest == kept({**GIVEN, "password": "swordfish"}).digest == kept(inputs_as_json=True).digest
    assert kept().digest == Inputs.of({"city": "Lisbon", "days": 3}).digest
    assert kept().digest != kept({**GIVEN, "city": "Porto"}).digest


def test_inputs_are_compared_by_exact_names():
    expected = [CrewInput(name="budget"), CrewInput(name="age", required=False), CrewInput(name="topic")]
    given_inputs = {"Budget": 1, "topic": None, "age": 3, "id": "x", "b": 0}
    assert missing_inputs(expected, given_inputs) == ["budget", "topic"]
    assert unknown_inputs(expected, given_inputs) == ["Budget", "b"]
    assert unknown_inputs([], given_inputs) == missing_inputs(expected, {"budget": 1, "topic": ""}) == []


def test_a_digest_never_changes():
    same = [{"a": {"z", "y"}, "b": 2}, {"b": "2", "a": {"y", "z"}, "c": None}]
    others = [{"a": ["z", "y"], "b": 2}, {"a": ["y", "z"]}, {"a": ["y", "z"], "c": 2}, {}, {"a": ""}]
    assert len({Inputs.of(one).digest for one in same}) == 1
    assert len({Inputs.of(one).digest for one in (same[0], *others)}) == 1 + len(others)
    # A digest stands in records that outlive this version: the figures stay.
    assert (
        Inputs.of({"topic": "Lisbon", "days": 3, "when": date(2025, 1, 2)}).digest == "ac79fdfa3001cab39457346ccaaf7a5f"
    )
    inputs, state = {"topic": "Lisbon"}, "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"
    assert Inputs(inputs, restore_from=state).digest == "b694c1a96265d09d329abf5976dba7df"
    assert Inputs.of({**inputs, "restoreFromStateId": state}).digest != Inputs(inputs, restore_from=state).digest
