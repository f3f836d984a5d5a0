"""Ten thousand requests that nobody asked for, to a receiver in a process of its own."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.runs.database import find_store
from prefect_crew.store.news import Place, read_news
from support.processes import Process
from support.webhooks import BODIES, events_of, url_of
from support.wire import exchange, request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REQUESTS, AT_ONCE = 10_000, 32
MIB = 1024 * 1024
Statuses = set[int | None]


def hostile_requests(urls: Any, attempt: Any) -> dict[str, tuple[Callable[[random.Random], list[bytes]], Statuses]]:
    """Return how to make a request of each kind, in parts, and the statuses with which it may be answered."""
    base, body = "http://receiver", json.dumps(BODIES["crew-first"]).encode()
    good = httpx.URL(url_of(urls(attempt, base=base), "crew")).path
    stale = httpx.URL(url_of(urls(attempt, base=base, days=-1), "crew")).path
    another = httpx.URL(url_of(urls("another", base=base), "crew")).path

    def post(body: bytes, path: str = good, **headers: str) -> list[bytes]:
        return [request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})]

    def mangled(rng: random.Random) -> list[bytes]:
        at = rng.randrange(len("/hooks/crew/"), len(another))
        letter = rng.choice("ABCDEFGHabcdefgh0123456789-_~!.".replace(another[at], ""))
        return post(body, another[:at] + letter + another[at + 1 :])

    def deep(rng: random.Random) -> list[bytes]:
        opening = rng.choice([b"[", b'{"kickoff_id":', b'{"meta":[', b'{"events":[{"data":'])
        return post(opening * (rng.randrange(1000, 500_000) // len(opening)))

    def chunked(rng: random.Random) -> list[bytes]:
        chunk = b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n"
        return [*post(b"", Content_Length="", Transfer_Encoding="chunked"), *[chunk] * rng.randrange(17, 22)]

    (whole,) = post(body)
    no_body_of_ours = [b"", b"[]", b"null", b"{}", b"\xff", b'"x"', b"1e999"]
    return {
        "forged": (mangled, {404}),
        "stale": (lambda _: post(body, stale), {404}),
        "replayed": (lambda _: post(body), {200}),
        "oversize": (lambda rng: post(b" " * rng.randrange(MIB + 1, 3 * MIB)), {413, None}),
        "chunked": (chunked, {413, None}),
        "deep": (deep, {400}),
        "no body of ours": (lambda rng: post(rng.choice(no_body_of_ours)), {400}),
        "cut off": (lambda rng: [whole[: rng.randrange(10, len(whole) - 1)]], {None}),
        "garbage": (lambda rng: [rng.randbytes(rng.randrange(1, 4000)) + b"\r\n\r\n"], {400, None}),
        "head": (lambda rng: post(b"", "/hooks/crew/x", X_Long="y" * rng.randrange(100_000)), {400, 404, 431, None}),
    }


def resident(process: Process) -> float:
    """Return the MiB of memory that a process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def test_hostile_requests_do_nothing(
    receiver_process: tuple[Process, int], urls: Any, notes: list[str], new_attempt: Any, key: str
):
    process, port = receiver_process
    rng = random.Random(20260501)
    attempt = await new_attempt()
    kinds = hostile_requests(urls, attempt)
    answers: dict[str, Counter[int | None]] = {name: Counter() for name in kinds}
    gate = asyncio.Semaphore(AT_ONCE)

    async def attack(name: str, seed: int) -> None:
        async with gate:
            # Those that are cut off are left hanging for a moment: the receiver waits, nobody else does.
            within = 0.05 if name == "cut off" else 30.0
            answers[name][await exchange(port, *kinds[name][0](random.Random(seed)), within=within)] += 1

    async def attack_so_often(count: int) -> None:
        await asyncio.gather(*(attack(rng.choice(list(kinds)), rng.randrange(2**32)) for _ in range(count)))

    await attack("replayed", 0)  # what is replayed has to be genuine once
    await attack_so_often(2_000)
    before = resident(process)
    await attack_so_often(REQUESTS - 2_000)
    after = resident(process)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/health")).status_code == 200
    notes.append(f"receiver: {REQUESTS} hostile requests, {before:.0f} MiB before, {after:.0f} MiB after")
    assert process.running, process.tail()
    assert "Traceback" not in process.output, process.tail()
    events, _ = await find_store().run(read_news, [attempt.id], Place(0))
    assert len(events) == answers["replayed"].total(), "those that were genuine, and no other"
    assert after - before < 15, f"{before:.0f} MiB grew to {after:.0f}"
    for name, (_, allowed) in kinds.items():
        assert {*answers[name]} <= allowed, f"{name}: {answers[name]}"
    assert len(await events_of(key)) == 1
