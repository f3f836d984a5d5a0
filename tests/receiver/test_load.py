"""A hundred webhooks a second for a minute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import httpx
import pytest

from prefect_crew.client.webhooks import Webhooks
from support.processes import Process
from support.webhooks import events_of, headers_of, url_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KINDS = ("step", "step", "step", "step", "step", "task", "task", "task", "human_input", "crew")
RATE, SECONDS, RUNS = 100, 60, 20


async def test_a_hundred_webhooks_a_second(
    receiver_process: tuple[Process, int], urls: Callable[..., Webhooks], notes: list[str]
):
    base, took, state = f"http://127.0.0.1:{receiver_process[1]}", list[float](), dict[str, Any]()

    async def deliver(number: int) -> None:
        hooks, kind = urls(f"load/{number % RUNS}", base=base), KINDS[number % 10]
        body = {"kickoff_id": f"k-{number % RUNS}", "task_id": str(number), "status": "completed", "output": "x" * 2000}
        started = time.perf_counter()
        answer = await client.post(url_of(hooks, kind), json=body, headers=headers_of(hooks, kind))
        assert answer.status_code == 200
        took.append(time.perf_counter() - started)

    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=50)) as client:
        async with asyncio.TaskGroup() as deliveries:
            started = time.perf_counter()
            for number in range(RATE * SECONDS):  # at a steady rate, however long the answers take
                await asyncio.sleep(max(0.0, started + number / RATE - time.perf_counter()))
                deliveries.create_task(deliver(number))
        deadline = time.monotonic() + 30
        while (state := (await client.get(f"{base}/ready")).json())["waiting"] and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
    cut = [f"{seconds * 1000:.1f} ms" for seconds in quantiles(took, n=100)]
    notes.append(f"receiver: {len(took)} webhooks at {RATE}/s: p50 {cut[49]}, p99 {cut[98]}")
    assert state["received"] == len(took)
    assert state["dropped"] == 0
    assert sorted(took)[len(took) // 2] < 0.05
    events = await events_of("load/19", at_least=1)
    assert [event["event"] for event in events] == ["crew.webhook.crew"]
