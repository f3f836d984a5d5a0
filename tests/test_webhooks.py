"""Signed webhook URLs: which ones a kickoff asks for, what they say, and whose they are."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_crew import DeployedCrew
from prefect_crew.blocks import crew_of
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.webhooks import (
    Hook,
    WebhookKind,
    hook_urls,
    read_token,
    token_of,
)
from prefect_crew.webhooks import webhooks_for as targets_for
from support.webhooks import SECRET, url_of

KINDS = get_args(WebhookKind)
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)

ids = st.text("0123456789abcdef", min_size=32, max_size=32)
kinds = st.sampled_from(KINDS)


def read(hook: Hook, token: str, *, kind: str | None = None, secret: str = SECRET, now: datetime = NOW) -> Hook | None:
    return read_token(kind or hook.kind, token, secret, now=now)


@given(ids, kinds, st.integers(0, 10_000), st.booleans())
def test_a_signed_token_is_read_and_fits_a_url(attempt: str, kind: WebhookKind, number: int, texts: bool):
    hook = Hook(kind, attempt, LATER, number, texts)
    token = token_of(hook, SECRET)
    assert read(hook, token) == hook
    assert set(token) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


@given(ids, kinds, st.data())
def test_a_changed_token_is_not_ours(attempt: str, kind: WebhookKind, data: st.DataObject):
    hook = Hook(kind, attempt, LATER)
    token = token_of(hook, SECRET)
    at = data.draw(st.integers(0, len(token) - 1))
    char = data.draw(st.sampled_from("AZaz09-_=+/. \n").filter(lambda one: one != token[at]))
    assert read(hook, token[:at] + char + token[at + 1 :]) is None


@given(st.text(max_size=200), st.text(max_size=3000))
def test_no_text_whatever_is_taken_for_a_token(kind: str, token: str):
    assert read_token(kind, token, SECRET, now=NOW) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_kind_secret_and_time(kind: WebhookKind):
    hook = Hook(kind, "key", LATER, 1)
    token = token_of(hook, SECRET)
    assert read(hook, token) == read(hook, token, now=LATER - timedelta(seconds=1)) == hook
    assert read(hook, token, now=LATER) is read(hook, token, secret=SECRET + "x") is None
    assert not any(read(hook, token, kind=other) for other in {*KINDS, "other"} - {kind})


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_secret_signs_and_each_is_accepted(kind: WebhookKind):
    hook, new = Hook(kind, "key", LATER), "n" * 40
    both = f"{new} {SECRET}"
    assert token_of(hook, both) == token_of(hook, new) != token_of(hook, SECRET)
    for signer in (new, SECRET):
        token = token_of(hook, signer)
        assert read(hook, token, secret=both) == hook
        assert read(hook, token, secret="o" * 40) is None


def test_urls_stand_in_no_repr_and_are_all_different():
    hooks = [hook_urls("https://h.example", SECRET, Hook("crew", key, LATER)) for key in "ab"]
    urls = {url_of(one, kind) for one in hooks for kind in KINDS}
    assert len(urls) == 2 * len(KINDS)
    assert not any(SECRET in url for url in urls)
    assert "hooks/" not in repr(hooks)


def test_equal_facts_give_equal_urls():
    facts: list[dict[str, Any]] = [{"attempt": "1"}, {"attempt": "1"}, {"attempt": "2"}, {"attempt": "1", "round": 1}]
    hooks = [Hook("crew", expires=LATER, **one) for one in facts]
    urls = [hook_urls(" https://h.example/a/b/ ", SECRET, hook).crew for hook in hooks]
    assert urls[0] == urls[1]
    assert len(set(urls)) == 3
    assert all(str(url).startswith("https://h.example/a/b/hooks/crew/") for url in urls)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_url": "ftp://h.example"}, "does not start with https"),
        ({"base_url": "https://u:p@h.example"}, "credentials"),
        ({"base_url": "https://h.example?a=b"}, "query"),
        ({"secret": "brief"}, "5 characters"),
        ({"secret": f"{SECRET} brief"}, "5 characters"),
    ],
    ids=str,
)
def test_what_cannot_be_signed_is_said(changes: dict[str, Any], says: str):
    facts: dict[str, Any] = {"base_url": "https://h.example", "secret": SECRET, **changes}
    with pytest.raises(ConfigurationError, match=says) as caught:
        hook_urls(**facts, run=Hook("crew", "key", LATER))
    assert SECRET not in str(caught.value)
    assert "brief" not in str(caught.value)


# Which webhooks a kickoff asks for


def webhooks_for(monkeypatch: pytest.MonkeyPatch, url: str | None, secret: str | None, **fields: Any) -> Any:
    """Return the webhooks of an attempt, with the settings given."""
    for name, value in {"URL": url, "SECRET": secret}.items():
        if value is not None:
            monkeypatch.setenv(f"PREFECT_INTEGRATIONS_CREW_WEBHOOK_{name}", value)
    crew = DeployedCrew.model_validate({"url": "https://crew.example.com", "token": "t-o-k-e-n", **fields})
    attempt: Any = SimpleNamespace(id="an-attempt")
    return targets_for(crew_of(crew), attempt, round=1)


def test_an_address_with_a_secret_switches_them_on(monkeypatch: pytest.MonkeyPatch):
    assert webhooks_for(monkeypatch, None, SECRET) is None
    hooks = webhooks_for(monkeypatch, "https://h.example/crews", SECRET)
    body = hooks.to_json()
    assert set(body) == {
        *("crewWebhookUrl", "humanInputWebhook", "humanInputWebhookUrl", "webhooks"),
    }
    # No plain webhook tells of a failure, or of the end of a Flow.
    events = ["crew_kickoff_completed", "crew_kickoff_failed", "flow_finished", "method_execution_failed"]
    assert body["webhooks"]["events"] == events
    assert body["webhooks"]["realtime"] is True
    token = url_of(hooks, "crew").removeprefix("https://h.example/crews/hooks/crew/")
    hook = read_token("crew", token, SECRET, now=datetime.now(UTC))
    assert hook is not None
    assert (hook.attempt, hook.round) == ("an-attempt", 1)


def test_an_address_needs_a_secret_or_the_cloud(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigurationError, match="WEBHOOK_SECRET"):
        webhooks_for(monkeypatch, "https://h.example", None)
    cloud = "https://api.prefect.cloud/hooks/AbCdEf"
    hooks = webhooks_for(monkeypatch, cloud, None)
    assert {url_of(hooks, kind) for kind in ("task", "step", "crew", "human_input")} == {cloud}


@pytest.mark.parametrize(
    "fields", [{}, {"show": "summary"}, {"show": "none"}, {"secret_inputs": ["customer"]}], ids=str
)
def test_texts_that_may_be_secret_are_not_stored(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    token = webhooks_for(monkeypatch, "https://h.example", SECRET, **fields).crew.rpartition("/")[2]
    hook = read_token("crew", token, SECRET, now=datetime.now(UTC))
    assert hook is not None
    assert hook.texts is (fields == {})


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        ({}, 3600 + 86400),
        ({"timeout": 60, "human_timeout": 1}, 61),
        ({"timeout": None, "human_timeout": 0.5}, 30 * 86400 + 0.5),
    ],
)
def test_urls_outlive_every_wait(limits: dict[str, Any], seconds: float, monkeypatch: pytest.MonkeyPatch):
    token = webhooks_for(monkeypatch, "https://h.example", SECRET, wait=limits).crew.rpartition("/")[2]
    hook, now = read_token("crew", token, SECRET, now=NOW), datetime.now(UTC)
    assert hook is not None
    assert (hook.expires - now).total_seconds() == pytest.approx(seconds + 86400, abs=60)
