"""Masking: whatever is secret stands in nothing that is shown."""

import json
from collections import deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from prefect_crew.client.redaction import MASK, SHORTEST, Redactor, holds_secret

SECRETS = st.text(min_size=SHORTEST, max_size=12).filter(lambda secret: secret not in MASK and "*" not in secret)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@dataclass
class Answer:
    text: Any
    number: int


def of(**secret_inputs: Any) -> Redactor:
    return Redactor(secret_inputs.values(), tokens=["the-token"])


@pytest.mark.parametrize("token", ["wrong", "test"])
def test_a_token_like_a_word_masks_no_sentence(token: str):
    redact = Redactor(tokens=[token])
    assert redact("The bearer token is missing or wrong: test it.") == "The bearer token is missing or wrong: test it."
    assert redact(f"You sent 'Bearer {token}'.") == f"You sent '{MASK}'."


@given(st.lists(SECRETS, min_size=1, max_size=4), st.lists(st.text(), min_size=1, max_size=4))
def test_no_secret_is_left_in_any_text(secrets: list[str], between: list[str]):
    redact = Redactor(secrets)
    text = "".join(part for pair in zip(between, secrets * 4) for part in pair)  # noqa: B905  the shorter one counts
    masked = redact(text)
    assert not any(secret in masked.replace(MASK, "\x00") for secret in secrets)


@given(SECRETS, JSON)
def test_a_tree_is_masked_in_keys_and_values(secret: str, value: Any):
    redact = Redactor([secret])
    tree = {"deep": [value, {f"key {secret}": f"<{secret}>"}]}
    masked = redact.tree(tree)
    assert masked["deep"][1] == {f"key {MASK}": f"<{MASK}>"}
    assert redact.hides(tree)
    assert not redact.hides(masked)


def test_a_secret_number_is_masked_as_a_number():
    assert of(pin="4711").tree({"a": 4711, "b": None, "d": (1.5, 47112)}) == {"a": MASK, "b": None, "d": [1.5, 47112]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(123456, "pin 123456", id="number"),
        pytest.param('["first-one", {"pin": 123456}]', "pin 123456", id="item of a list as text"),
        pytest.param(["first-one", "second-one"], '["first-one","second-one"]', id="as it is sent"),
        pytest.param("größte", json.dumps("größte"), id="escaped in JSON"),
        pytest.param({"first-one", "second-one"}, "only second-one", id="item of a set"),
        pytest.param({"000111": "a"}, "pin 000111", id="key of an object"),
        pytest.param(Answer("hidden-one", 4), "hidden-one", id="field of a dataclass"),
        pytest.param("hidden-one\n", "it is hidden-one.", id="with a line feed at its end"),
        pytest.param("  hidden-one ", "it is hidden-one.", id="with blanks around it"),
        pytest.param("first-one\nsecond-one\n", "the line second-one alone", id="one of its lines"),
        pytest.param('<a&b>\'s "c"', "&lt;a&amp;b&gt;&#39;s &#34;c&#34;", id="on a page"),
        pytest.param('a"b\\c', json.dumps(json.dumps('a"b\\c')), id="quoted in JSON twice"),
        pytest.param("pa/ss&word+1", quote("pa/ss&word+1"), id="in an address"),
        pytest.param([SecretStr("hidden-one")], "hidden-one", id="pydantic's own in a list"),
    ],
)
def test_a_secret_is_masked_in_each_form(value: Any, text: str):
    masked = of(secret=value)(text)
    assert MASK in masked
    for part in ("123456", "first-one", "second-one", "000111", "hidden-one", 'a\\"b', "gr", "a&amp;b", "ss%26"):
        assert part not in masked


def test_short_secrets_and_field_names_stay():
    assert of(flag="no")("not now") == "not now"
    assert of(login={"password": "hunter22"})("the password is hunter22") == f"the password is {MASK}"
    assert "hunter22" not in f"{of(password='hunter22')!r}"


class Login(BaseModel):
    user: str
    password: SecretStr


def test_pydantic_secrets_are_found_anywhere():
    secret = SecretStr("x")
    held = [secret, [1, {"a": [secret]}], {secret}, Answer(secret, 1), deque([secret])]
    assert all(holds_secret(value) for value in (*held, Login(user="a", password=secret)))
    assert not any(holds_secret(value) for value in ("x", [1, {"a": ("b", None)}]))
