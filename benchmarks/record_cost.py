"""What the record adds to a kickoff: milliseconds, and requests to the Prefect API.

Runs one crew that is done at once, again and again inside one async flow against the Prefect server of PREFECT_API_URL:
with the record on that server, and with a record that lives in this process, alternating. The median of the difference
is the record's cost for the whole of a run: the claim before the kickoff, the id after it, the end when it is seen. The
requests are counted by what they are for.

Goal: at most 3 requests a run, without the artifact's. "In vain" are those that a locked SQLite database refused, and
that were made again; PostgreSQL has none.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import httpx
from prefect import flow
from prefect.settings import PREFECT_API_URL

from prefect_crew import DeployedCrew, arun_crew
from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import RunRecord
from prefect_crew.runs import kickoff, wait


class Here:
    """A store of records in this process: what is left of the cost is everything else's."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, int], RunRecord] = {}

    async def claim(self, record: RunRecord) -> bool:
        return self.records.setdefault((record.idempotency_key, record.attempt), record) is record

    async def save(self, record: RunRecord) -> None:
        self.records[record.idempotency_key, record.attempt] = record

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        return [record for (key, _), record in sorted(self.records.items()) if key == idempotency_key]

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        return next((one for one in self.records.values() if one.kickoff_id == kickoff_id), None)

    async def owner_ended(self, record: RunRecord) -> bool:
        return False


def purpose(url: httpx.URL) -> str | None:
    """What a request to the Prefect API is for; None for one to somebody else."""
    api = urlsplit(PREFECT_API_URL.value() or "")
    if url.port != api.port or url.host != api.hostname:
        return None
    part = url.path.removeprefix(api.path).strip("/").split("/")[0]
    return {"variables": "record", "artifacts": "artifact"}.get(part, part)


async def one(crew: DeployedCrew, name: str) -> float:
    started = time.perf_counter()
    await arun_crew(crew, {"text": name}, name=name)
    return (time.perf_counter() - started) * 1000


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="runs of each kind")
    runs = parser.parse_args().runs
    counts: Counter[str] = Counter()
    send = httpx.AsyncClient.send

    async def counted(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        response = await send(self, request, **options)
        if what := purpose(request.url):
            locked = response.status_code == httpx.codes.SERVICE_UNAVAILABLE
            counts[f"{what}, in vain" if locked else what] += 1
        return response

    recorded: list[float] = []
    bare: list[float] = []
    with CrewServer("echo") as server:
        crew = server.crew(wait={"initial": 0.001, "max_interval": 0.01})

        @flow(log_prints=False)
        async def measure() -> None:
            logging.disable(logging.INFO)
            await one(crew, "warm")
            for number in range(runs):
                with mock.patch.object(httpx.AsyncClient, "send", counted):
                    recorded.append(await one(crew, f"recorded-{number}"))
                here = Here()
                with (
                    mock.patch.object(kickoff, "PrefectRecords", lambda here=here: here),
                    mock.patch.object(wait, "PrefectRecords", lambda here=here: here),
                ):
                    bare.append(await one(crew, f"bare-{number}"))

        await measure()

    print(f"{runs} runs of each kind, alternating, in one async flow; milliseconds a run:")
    for name, times in {"with the record": recorded, "without": bare}.items():
        print(f"  {name:16} median {median(times):6.1f}   p90 {quantiles(times, n=10)[-1]:6.1f}")
    print(f"  the record adds  median {median(a - b for a, b in zip(recorded, bare, strict=True)):6.1f}")
    print("requests to the Prefect API a run:")
    for what, count in counts.most_common():
        print(f"  {what:20} {count / runs:.2f}")


if __name__ == "__main__":
    asyncio.run(main())
