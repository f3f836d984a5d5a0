"""Masking: whatever is secret stands in nothing that is shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from prefect_crew.redaction import MASK, SHORTEST, Redactor, holds_secret

SECRETS = st.text(min_size=SHORTEST, max_size=12).filter(lambda secret: secret not in MASK and "*" not in secret)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def of(**secret_inputs: Any) -> Redactor:
    return Redactor.of("the-token", secret_inputs, [*secret_inputs])


def test_the_token_is_always_a_secret():
    assert Redactor.of("the-token", {}, [])("Bearer the-token!") == f"Bearer {MASK}!"


def test_only_inputs_that_are_named_are_secret():
    redact = Redactor.of("the-token", {"password": "hunter22", "city": "Lisbon"}, ["password", "not given"])
    assert redact("hunter22 goes to Lisbon") == f"{MASK} goes to Lisbon"


@given(st.lists(SECRETS, min_size=1, max_size=4), st.lists(st.text(), min_size=1, max_size=4))
def test_no_secret_is_left_in_any_text(secrets: list[str], between: list[str]):
    redact = Redactor(secrets)
    text = "".join(part for pair in zip(between, secrets * 4) for part in pair)  # noqa: B905  the shorter one counts
    masked = redact(text)
    assert not any(secret in masked.replace(MASK, "\x00") for secret in secrets)


def test_a_secret_within_a_longer_one_leaves_no_piece_of_it():
    assert Redactor(["word", "password"])("password, word") == f"{MASK}, {MASK}"


@given(SECRETS, JSON)
def test_a_tree_is_masked_in_keys_and_values_and_stays_a_tree(secret: str, value: Any):
    redact = Redactor([secret])
    tree = {"deep": [value, {f"key {secret}": f"<{secret}>"}]}
    masked = redact.tree(tree)
    assert masked["deep"][1] == {f"key {MASK}": f"<{MASK}>"}
    assert redact.hides(tree)
    assert not redact.hides(masked)


def test_what_is_no_text_stays_as_it_is():
    assert of(pin="4711").tree({"a": 4711, "b": None, "c": True, "d": (1.5, "4711")}) == {
        "a": 4711,
        "b": None,
        "c": True,
        "d": [1.5, MASK],
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(123456, "pin 123456", id="number"),
        pytest.param(["first-one", "second-one"], "only second-one", id="item of a list"),
        pytest.param('["first-one", {"pin": 123456}]', "pin 123456", id="item of a list as text"),
        pytest.param({"user": "somebody", "pin": "000111"}, "pin 000111", id="value of an object"),
        pytest.param(["first-one", "second-one"], '["first-one","second-one"]', id="as it is sent"),
        pytest.param('a"b\\c', json.dumps('a"b\\c'), id="quoted in JSON"),
        pytest.param("größte", json.dumps("größte"), id="escaped in JSON"),
        pytest.param(SecretStr("hidden-one"), "hidden-one", id="pydantic's own"),
        pytest.param([SecretStr("hidden-one")], "hidden-one", id="pydantic's own in a list"),
    ],
)
def test_a_secret_is_found_in_whatever_form_a_crew_repeats_it(value: Any, text: str):
    masked = of(secret=value)(text)
    assert MASK in masked
    for part in ("123456", "first-one", "second-one", "000111", "hidden-one", 'a\\"b', "gr"):
        assert part not in masked


def test_a_short_secret_is_not_hunted_for_where_it_would_hit_at_random():
    assert of(flag="no")("not now") == "not now"
    assert of(flag="no").secrets == ("the-token",)


class Login(BaseModel):
    user: str
    password: SecretStr


@pytest.mark.parametrize(
    ("value", "holds"),
    [
        (SecretStr("x"), True),
        ([1, {"a": [SecretStr("x")]}], True),
        ({SecretStr("x")}, True),
        (Login(user="a", password=SecretStr("x")), True),
        ("x", False),
        ([1, {"a": ("b", None)}], False),
    ],
    ids=["itself", "deep", "set", "model", "text", "deep without"],
)
def test_pydantics_secrets_are_known_wherever_they_are(value: Any, holds: bool):
    assert holds_secret(value) is holds
