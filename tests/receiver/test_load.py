"""A hundred webhooks a second for a minute."""

from __future__ import annotations

import asyncio
import itertools
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

Urls = Callable[..., Webhooks]
RUNS = 20


async def send(client: httpx.AsyncClient, urls: Urls, base: str, number: int, prefix: str) -> float:
    """Deliver a step, a task, an end or a question of one of the runs; return how long the answer took, in seconds."""
    kind = ("step", "step", "step", "step", "step", "task", "task", "task", "human_input", "crew")[number % 10]
    hooks = urls(f"{prefix}/{number % RUNS}", base=base)
    body = {"kickoff_id": f"k-{number % RUNS}", "task_id": str(number), "status": "completed", "output": "x" * 2000}
    started = time.perf_counter()
    answer = await client.post(url_of(hooks, kind), json=body, headers=headers_of(hooks, kind))
    assert answer.status_code == 200
    return time.perf_counter() - started


async def send_at(rate: float, seconds: float, one: Callable[[int], Any]) -> list[float]:
    """Deliver at a steady rate, however long the answers take; return how long each took."""
    tasks: list[asyncio.Task[float]] = []
    started = time.perf_counter()
    for number in itertools.count():
        due = started + number / rate
        if due > started + seconds:
            return await asyncio.gather(*tasks)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(number)))
    raise AssertionError


def summary(took: list[float]) -> str:
    cut = quantiles(took, n=100)
    return f"p50 {cut[49] * 1000:.1f} ms, p99 {cut[98] * 1000:.1f} ms, most {max(took) * 1000:.0f} ms"


async def test_a_hundred_webhooks_a_second_for_a_minute(
    receiver_process: tuple[Process, int], urls: Urls, notes: list[str]
):
    base = f"http://127.0.0.1:{receiver_process[1]}"
    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=50)) as client:
        took = await send_at(100, 60, lambda number: send(client, urls, base, number, "load"))

        async def report() -> dict[str, Any]:
            return (await client.get(f"{base}/ready")).json()

        deadline = time.monotonic() + 30
        while (state := await report())["waiting"] and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
    notes.append(f"receiver: {len(took)} webhooks at 100/s: {summary(took)}")
    assert state["received"] == state["forwarded"] == len(took)
    assert state["dropped"] == state["refused"] == 0
    assert sorted(took)[len(took) // 2] < 0.05
    ends = [event for event in await events_of("load/9", at_least=50) if event["event"] == "crew.webhook.crew"]
    assert ends
