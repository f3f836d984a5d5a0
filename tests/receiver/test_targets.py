from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from prefect_crew import DeployedCrew, WaitPolicy
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.settings import CrewSettings
from prefect_crew.webhooks import hooks_expire, names_shown, read_token, webhooks_for
from support.webhooks import SECRET, url_of

NOW = datetime(2026, 5, 1, tzinfo=UTC)
CLOUD = "https://api.prefect.cloud/hooks/AbCdEf"


def crew(**fields: object) -> DeployedCrew:
    return DeployedCrew.model_validate({"url": "https://crew.example.com", "token": "t-o-k-e-n", **fields})


def settings(monkeypatch: pytest.MonkeyPatch, **values: str) -> CrewSettings:
    for name, value in values.items():
        monkeypatch.setenv(f"PREFECT_INTEGRATIONS_CREW_{name}", value)
    return CrewSettings()


def test_without_an_address_there_are_none(monkeypatch: pytest.MonkeyPatch):
    assert webhooks_for(crew().crew, "key", settings=settings(monkeypatch, WEBHOOK_SECRET=SECRET)) is None


def test_an_address_needs_a_secret(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigurationError, match="WEBHOOK_SECRET"):
        webhooks_for(crew().crew, "key", settings=settings(monkeypatch, WEBHOOK_URL="https://h.example"))


def test_address_and_secret_switch_them_on(monkeypatch: pytest.MonkeyPatch):
    settings(monkeypatch, WEBHOOK_URL="https://h.example/crews", WEBHOOK_SECRET=SECRET)
    hooks = webhooks_for(crew().crew, "key", attempt=2, round=1)
    assert hooks is not None
    body = hooks.for_kickoff()
    assert set(body) == {"taskWebhookUrl", "stepWebhookUrl", "crewWebhookUrl", "humanInputWebhook", "webhooks"}
    # No plain webhook tells of a failure, or of the end of a Flow.
    events = ["crew_kickoff_completed", "crew_kickoff_failed", "flow_finished", "method_execution_failed"]
    assert (body["webhooks"]["events"], body["webhooks"]["realtime"]) == (events, True)
    token = url_of(hooks, "crew").removeprefix("https://h.example/crews/hooks/crew/")
    hook = read_token("crew", token, SECRET, now=datetime.now(UTC))
    assert hook is not None
    assert (hook.idempotency_key, hook.attempt, hook.round, hook.names) == ("key", 2, 1, True)


def test_prefect_clouds_own_webhooks_take_all_kinds_and_need_no_secret(monkeypatch: pytest.MonkeyPatch):
    hooks = webhooks_for(crew().crew, "key", settings=settings(monkeypatch, WEBHOOK_URL=CLOUD))
    assert hooks is not None
    assert {url_of(hooks, kind) for kind in ("task", "step", "crew", "human_input")} == {CLOUD}


@pytest.mark.parametrize(
    ("wait", "seconds"),
    [
        pytest.param(WaitPolicy(), 3600 + 86400 + 86400, id="default"),
        pytest.param(WaitPolicy(timeout=60, human_timeout=1), 61 + 86400, id="short"),
        pytest.param(WaitPolicy(timeout=None, human_timeout=0.5), 30 * 86400 + 0.5 + 86400, id="no-limit"),
    ],
)
def test_they_live_as_long_as_anybody_may_wait_and_a_day_more(wait: WaitPolicy, seconds: float):
    assert hooks_expire(wait, NOW) - NOW == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        pytest.param({}, True, id="default"),
        pytest.param({"show": "summary"}, True, id="summary"),
        pytest.param({"show": "none"}, False, id="none"),
        pytest.param({"secret_inputs": ["customer"]}, False, id="secret-inputs"),
    ],
)
def test_names_are_shown_unless_they_may_hold_what_must_not_be(fields: dict[str, object], shown: bool):
    assert names_shown(crew(**fields).crew) is shown
