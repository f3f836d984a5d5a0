"""What tests of webhooks need: a secret, bodies of both generations, and a receiver's other side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect_crew.api.webhooks import BearerAuth, HumanInputWebhook, StreamWebhook, Webhooks
from prefect_crew.receiver.news import News

__all__ = ["BODIES", "SECRET", "Kept", "headers_of", "url_of"]

SECRET = "a-secret-of-the-tests-that-is-long-enough"

BODIES: Mapping[str, Mapping[str, Any]] = {
    "task-first": {
        "kickoff_id": "k-1",
        "task_id": "research",
        "status": "completed",
        "output": "the output",
        "agent": "Researcher",
        "execution_time": 2.5,
    },
    "task-later": {
        "description": "the description",
        "name": "research",
        "expected_output": "a list",
        "summary": "the description...",
        "agent": "Researcher",
        "output": "the output",
        "output_json": None,
        "kickoff_id": "k-1",
        "meta": {"run_key": "city/lisbon", "token": "the token"},
    },
    "step-first": {
        "kickoff_id": "k-1",
        "task_id": "research",
        "agent": "Researcher",
        "step_type": "thought",
        "content": "the content",
    },
    "step-later": {
        "prompt": "the prompt",
        "thought": "the thought",
        "tool": "search",
        "tool_input": "the input",
        "result": "the result",
        "kickoff_id": "k-1",
        "meta": {"run_key": "city/lisbon"},
    },
    "crew-first": {
        "kickoff_id": "k-1",
        "status": "completed",
        "result": {"output": "the output", "tasks": [{"task_id": "research", "output": "the output"}]},
        "execution_time": 9.0,
        "meta": {"run_key": "city/lisbon"},
    },
    "crew-later": {
        "kickoff_id": "k-1",
        "result": "the output",
        "result_json": None,
        "token_usage": {"total_tokens": 12, "prompt_tokens": 8, "completion_tokens": 4},
        "meta": {"run_key": "city/lisbon"},
    },
    "human_input-first": {
        "execution_id": "k-1",
        "task_id": "plan",
        "task_output": "the output",
        "meta": {"run_key": "city/lisbon"},
    },
    "human_input-later": {
        "kickoff_id": "k-1",
        "task_id": "plan",
        "output": "the output",
        "meta": {"run_key": "city/lisbon"},
    },
    "stream": {
        "events": [
            {
                "id": "e-1",
                "execution_id": "k-1",
                "timestamp": "2026-01-01T00:00:00Z",
                "type": "crew_kickoff_started",
                "data": {"inputs": {"topic": "the input"}},
            },
            {
                "id": "e-2",
                "execution_id": "k-1",
                "timestamp": "2026-01-01T00:00:01Z",
                "type": "task_completed",
                "data": {"task_name": "research", "agent_role": "Researcher", "output": "the output"},
            },
        ]
    },
}
"""One body of each kind and generation, by `kind-generation`."""

SAID_BY_NOBODY = ("the output", "the content", "the thought", "the prompt", "the result", "the input", "the token")
"""What stands in these bodies and must not stand in an event."""


def url_of(hooks: Webhooks, kind: str) -> str:
    """Return the URL of one of a run's webhooks."""
    target = getattr(hooks, kind)
    return target if isinstance(target, str) else target.url


def headers_of(hooks: Webhooks, kind: str) -> dict[str, str]:
    """Return what a crew's server sends beside the body of one of a run's webhooks."""
    target = getattr(hooks, kind)
    if isinstance(target, HumanInputWebhook | StreamWebhook) and isinstance(target.authentication, BearerAuth):
        return {"Authorization": f"Bearer {target.authentication.token.get_secret_value()}"}
    return {}


class Kept:
    """Takes news as `Handover` does, and keeps them."""

    def __init__(self) -> None:
        self.news: list[News] = []
        self.ready = True

    def start(self) -> None:
        """Do nothing."""

    def put(self, news: News) -> None:
        """Keep it."""
        self.news.append(news)

    def report(self) -> dict[str, Any]:
        """Count it."""
        return {"taken": len(self.news)}

    async def aclose(self) -> None:
        """Do nothing."""
