"""What a long past costs: the same work beside many ended attempts in the crew database, and beside none.

    python benchmarks/past.py make --records 150000     so many attempts with results, over the last 29 days
    python benchmarks/past.py work --times 20           each work so often

On the Prefect server of PREFECT_API_URL and the crew database of PREFECT_INTEGRATIONS_CREW_DATABASE_URL.
"""

from __future__ import annotations

import asyncio
import io
import time
import uuid
from collections.abc import Awaitable
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

from figures import options_of, report, used
from lean_server import lean_server
from prefect import flow

from prefect_crew import WaitPolicy, aget_result, arun_crew
from prefect_crew.blocks import load_crew
from prefect_crew.cli.runs import ls
from prefect_crew.costs import read_costs
from prefect_crew.runs.resolve import resolve_never_started
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.stop import stop_run
from prefect_crew.store.decision import Attempt, AttemptState
from support.past import aput_all, new_attempt

PAGE = 5000
RESULT = {"output": "Done. " * 200, "tasks": [{"name": "work", "output": "Done. " * 100, "agent": "Worker"}]}


def ended(number: int, share: float, url: str) -> Attempt:
    """Return an attempt that has completed; `share` of the past was after it."""
    begun = time.time() - 29 * 86_400 * share
    times = {"begun_at": begun, "started_at": begun + 0.1, "ended_at": begun + 60, "counts_until": begun + 3600}
    use = {"usage": {"total_tokens": 1000 + number % 500}, "tokens": 1000 + number % 500, "cost": 0.01}
    names = {"crew": f"crew {number % 20}", "crew_url": url, "kickoff_id": uuid.uuid4().hex}
    return new_attempt(state=AttemptState.COMPLETED, flow_run_id=str(uuid.uuid4()), **names, **times, **use)


async def make(records: int, url: str) -> None:
    for first in range(0, records, PAGE):
        numbers = range(first, min(records, first + PAGE))
        await aput_all([ended(number, 1 - number / records, url) for number in numbers], RESULT)
    report("the past", records=records)


async def work(times: int, crew: Any) -> None:
    """Do what people do with runs; report the median of each work, and the time within which 95 % were done."""
    walls: dict[str, list[float]] = {}
    plain = await load_crew(crew)
    facts = {"crew": plain.label, "crew_url": plain.url}
    week = (datetime.now(UTC) - timedelta(days=6)).date()

    async def timed(name: str, call: Awaitable[Any]) -> None:
        with used(walls.setdefault(name, [])):
            await call

    for _ in range(times + 1):  # the first loads and opens what the others use
        key, run_id = str(uuid.uuid4()), uuid.uuid4().hex
        await timed("start", arun_crew(crew, {"topic": "work"}, idempotency_key=key))
        await timed("second_call", arun_crew(crew, {"topic": "work"}, idempotency_key=key))
        await timed("get_result", aget_result(key))
        uncertain = new_attempt(state=AttemptState.UNCERTAIN, deadline=time.time() - 1, **facts)
        started = new_attempt(state=AttemptState.STARTED, kickoff_id=run_id, started_at=time.time(), **facts)
        await aput_all([uncertain, started])
        with redirect_stdout(io.StringIO()):
            await timed("list", ls())
        await timed("resolve", resolve_never_started(uncertain.key, "benchmark"))
        await timed("cancel", stop_run(LiveRun(plain, run_id, started)))
        await timed("costs", read_costs("crew", since=week))
    figures: dict[str, float] = {}
    for name, several in walls.items():
        ordered = sorted(several[1:])
        figures[f"{name}_seconds"], figures[f"{name}_p95"] = median(ordered), ordered[int(0.95 * len(ordered))]
    report("work", **figures)


@flow(name="past", validate_parameters=False)
async def main(what: str, records: int, times: int) -> None:
    with lean_server(0.0) as server:
        crew = server.crew(wait=WaitPolicy(initial=0.05, factor=1, max_interval=0.05, jitter=0))
        await (make(records, server.url) if what == "make" else work(times, crew))


if __name__ == "__main__":
    options = options_of(__doc__, "make", "work", records=150_000, times=20)
    asyncio.run(main(options.what, options.records, options.times))
