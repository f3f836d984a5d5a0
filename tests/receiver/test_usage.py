"""Which tokens the receiver counts for a run."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import pytest

from prefect_crew.receiver import usage as module
from prefect_crew.receiver.events import WebhookEvent
from prefect_crew.receiver.usage import ReportedUsage
from prefect_crew.records.model import utcnow
from prefect_crew.webhooks import Hook, run_name

COMPLETED, CALLED = "stream.crew_kickoff_completed", "stream.llm_call_completed"
RUN = run_name("key", 1, "claim")


def event(name: str, tokens: int | None, *, key: str = "key", attempt: int = 1, **facts: Any) -> WebhookEvent:
    hook = Hook("crew", key, utcnow() + timedelta(days=1), attempt, claim="claim")
    return WebhookEvent(hook, name, uuid.uuid4(), facts if tokens is None else {"total_tokens": tokens, **facts})


@pytest.mark.parametrize(
    ("events", "total"),
    [
        pytest.param([event(COMPLETED, 7), event(COMPLETED, 5)], 12, id="crews-of-a-flow"),
        pytest.param([event(COMPLETED, 7), event("crew", 9), event(COMPLETED, 5)], 9, id="the-crew-webhook-has-all"),
        pytest.param([event(COMPLETED, 7), event(COMPLETED, 5, attempt=2)], 7, id="another-attempt"),
        pytest.param([event(COMPLETED, 7, key="other")], None, id="another-run"),
        pytest.param([event(COMPLETED, None), event("crew", None)], None, id="none-is-not-0"),
        pytest.param([event("task", 7), event("human_input", 7)], None, id="tasks-are-parts"),
        pytest.param([event(CALLED, 7, model="a"), event(CALLED, 2, model="b")], 9, id="calls"),
        pytest.param([event(CALLED, 7, model="a"), event(COMPLETED, 9)], 9, id="a-call-is-missing"),
    ],
)
def test_tokens_are_counted_once_for_each_event(events: list[WebhookEvent], total: int | None):
    reported = ReportedUsage()
    for one in [*events, *events]:
        reported.add(one)
    assert reported.of(RUN)["usage"] == (None if total is None else {"total_tokens": total})


def test_calls_that_add_up_to_the_total_tell_more():
    reported = ReportedUsage()
    reported.add(event(CALLED, 9, model="small", prompt_tokens=6, completion_tokens=3))
    reported.add(event(COMPLETED, 9))
    counts = {"total_tokens": 9, "prompt_tokens": 6, "completion_tokens": 3}
    assert reported.of(RUN) == {"usage": counts, "models": {"small": counts}}


def test_memory_is_bounded_by_runs_webhooks_and_models(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_RUNS", 2)
    monkeypatch.setattr(module, "MOST_MODELS", 2)
    monkeypatch.setattr(module, "REMEMBERED", 2)
    reported = ReportedUsage()
    for key in ("key", "other", "key", "third"):
        reported.add(event("crew", 7, key=key))
    for model in ("a", "b", "c"):
        reported.add(event(CALLED, 1, model=model))
    totals = [reported.of(run_name(key, 1, "claim"))["usage"] for key in ("key", "other", "third")]
    assert totals == [{"total_tokens": 7}, None, {"total_tokens": 7}]
    assert [*reported.of(RUN)["models"]] == ["a", "b"]
    assert len(reported._counted) <= 2
