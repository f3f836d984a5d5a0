from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from prefect_crew.client._parsing import WebhookKind
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.webhooks import MAX_TOKEN, Hook, bearer_of, claim_of, hook_urls, read_token, token_of
from support.webhooks import SECRET, headers_of, url_of

KINDS = get_args(WebhookKind)
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)

any_key = st.text(st.characters(), min_size=1, max_size=500)  # halves of surrogate pairs, too
kinds = st.sampled_from(KINDS)


def read(hook: Hook, token: str, *, kind: str | None = None, secret: str = SECRET, now: datetime = NOW) -> Hook | None:
    bearer = f"Bearer {bearer_of(hook, SECRET)}"
    return read_token(kind or hook.kind, token, secret, now=now, authorization=bearer)


claims = st.none() | st.text(max_size=40).map(claim_of)


@given(any_key, kinds, st.none() | st.integers(1, 2**24 - 1), st.booleans(), st.integers(0, 255), claims)
def test_what_was_signed_is_read_again(
    idempotency_key: str, kind: WebhookKind, attempt: int | None, names: bool, number: int, claim: str | None
):
    hook = Hook(kind, idempotency_key, LATER, attempt, names, number, claim)
    token = token_of(hook, SECRET)
    assert read(hook, token) == hook
    assert len(token) < MAX_TOKEN
    assert set(token) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


@pytest.mark.parametrize(
    "char", [pytest.param("a", id="ascii"), pytest.param("語", id="chinese"), pytest.param("\U0010fffd", id="astral")]
)
def test_the_longest_idempotency_key_fits_into_a_url(char: str):
    hooks = hook_urls(
        "https://hooks.example.com/a/path/of/its/own", SECRET, char * 500, expires=LATER, claim=claim_of("o")
    )
    assert all(len(url_of(hooks, kind)) < 2000 for kind in ("task", "step", "crew", "human_input"))


@given(any_key, kinds, st.data())
def test_a_changed_token_is_not_ours(idempotency_key: str, kind: WebhookKind, data: st.DataObject):
    hook = Hook(kind, idempotency_key, LATER)
    token = token_of(hook, SECRET)
    at = data.draw(st.integers(0, len(token) - 1))
    char = data.draw(st.sampled_from("AZaz09-_=+/. \n").filter(lambda one: one != token[at]))
    assert read(hook, token[:at] + char + token[at + 1 :]) is None


@given(
    st.text(max_size=200), st.text(max_size=3000) | st.binary(max_size=500).map(lambda b: base64.b64encode(b).decode())
)
def test_no_text_whatever_is_taken_for_a_token(kind: str, token: str):
    assert read_token(kind, token, SECRET, now=NOW, authorization=token) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_good_for_its_kind_its_secret_and_its_time_only(kind: WebhookKind):
    hook = Hook(kind, "key", LATER, 1)
    token = token_of(hook, SECRET)
    assert read(hook, token) == hook
    assert read(hook, token, now=LATER - timedelta(seconds=1)) == hook
    assert read(hook, token, now=LATER) is None
    assert read(hook, token, secret=SECRET + "x") is None
    for other in {*KINDS, "other", ""} - {kind}:
        assert read(hook, token, kind=other or "x") is None


def test_a_token_of_a_version_that_is_yet_to_come_is_not_ours(monkeypatch: pytest.MonkeyPatch):
    hook = Hook("crew", "key", LATER)
    with monkeypatch.context() as later:
        later.setattr("prefect_crew.webhooks._VERSION", 2)
        token = token_of(hook, SECRET)
    assert read(hook, token) is None


@pytest.mark.parametrize("kind", ["human_input", "stream"])
@pytest.mark.parametrize(
    "header",
    [
        pytest.param(lambda right: None, id="none"),
        pytest.param(lambda right: "", id="empty"),
        pytest.param(lambda right: right, id="without-a-scheme"),
        pytest.param(lambda right: f"Basic {right}", id="another-scheme"),
        pytest.param(lambda right: f"Bearer {right[:-1]}", id="cut-short"),
        pytest.param(lambda right: f"Bearer {right}é", id="no-ascii"),
        pytest.param(lambda right: "Bearer", id="no-token"),
    ],
)
def test_where_the_api_can_send_a_bearer_token_it_has_to(kind: WebhookKind, header: Callable[[str], str | None]):
    hook = Hook(kind, "key", LATER)
    right = bearer_of(hook, SECRET)
    token = token_of(hook, SECRET)
    assert read_token(kind, token, SECRET, now=NOW, authorization=header(right)) is None
    assert read_token(kind, token, SECRET, now=NOW, authorization=f"bearer {right}") == hook


def test_bearer_tokens_are_of_one_kind_and_one_run():
    def bearer(kind: WebhookKind, idempotency_key: str) -> str:
        return bearer_of(Hook(kind, idempotency_key, LATER), SECRET)

    assert len({bearer("human_input", "a"), bearer("human_input", "b"), bearer("stream", "a")}) == 3


def test_urls_do_not_hold_what_stands_beside_them():
    hooks = hook_urls("https://hooks.example.com", SecretStr(SECRET), "key", expires=LATER, stream_events=["x"])
    urls = [url_of(hooks, kind) for kind in KINDS]
    assert len(set(urls)) == len(KINDS)
    for kind in ("human_input", "stream"):
        bearer = headers_of(hooks, kind)["Authorization"].removeprefix("Bearer ")
        assert not any(bearer in url for url in urls)
    assert not any(SECRET in url for url in urls)
    assert "hooks/" not in repr(hooks)


def test_equal_facts_give_equal_urls_and_another_round_gives_others():
    def make(**facts: int) -> Webhooks:
        return hook_urls("https://hooks.example.com", SECRET, "key", expires=LATER, **facts)

    assert make(attempt=1, round=1) == make(attempt=1, round=1)
    assert len({make(attempt=1).crew, make(attempt=2).crew, make(attempt=1, round=1).crew}) == 3


def test_only_the_wanted_kinds_are_made():
    hooks = hook_urls("https://h.example", SECRET, "key", expires=LATER, kinds=["crew"], stream_events=())
    assert set(hooks.for_kickoff()) == {"crewWebhookUrl"}


@pytest.mark.parametrize(
    ("base", "url"),
    [
        pytest.param("https://h.example", "https://h.example/hooks/crew/", id="bare"),
        pytest.param("https://h.example/", "https://h.example/hooks/crew/", id="slash"),
        pytest.param(" http://127.0.0.1:8001/a/b/ ", "http://127.0.0.1:8001/a/b/hooks/crew/", id="path"),
    ],
)
def test_the_base_may_have_a_path(base: str, url: str):
    assert str(hook_urls(base, SECRET, "key", expires=LATER).crew).startswith(url)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"base_url": "ftp://h.example"}, "no address", id="scheme"),
        pytest.param({"base_url": "h.example"}, "no address", id="no-scheme"),
        pytest.param({"base_url": "https://["}, "no address", id="broken"),
        pytest.param({"base_url": "https://u:p@h.example"}, "credentials", id="credentials"),
        pytest.param({"base_url": "https://h.example?a=b"}, "query", id="query"),
        pytest.param({"secret": "short"}, "5 characters", id="short-secret"),
        pytest.param({"expires": datetime(2026, 1, 1)}, "time zone", id="naive"),  # noqa: DTZ001
        pytest.param({"expires": datetime(1960, 1, 1, tzinfo=UTC)}, "range", id="before-the-epoch"),
        pytest.param({"attempt": -1}, "range", id="negative-attempt"),
        pytest.param({"idempotency_key": ""}, "empty", id="no-run-key"),
    ],
)
def test_what_cannot_be_signed_is_said(changes: dict[str, object], says: str):
    facts: dict[str, object] = {
        "base_url": "https://h.example",
        "secret": SECRET,
        "idempotency_key": "key",
        "expires": LATER,
    }
    with pytest.raises(ConfigurationError, match=says) as caught:
        hook_urls(**facts | changes)  # pyright: ignore[reportArgumentType]
    assert SECRET not in str(caught.value)
    assert "short" not in str(caught.value).replace("shortest", "")
