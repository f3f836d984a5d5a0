"""Ten thousand requests that nobody asked for, to a receiver in a process of its own."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from prefect_crew.client.webhooks import Webhooks
from support.processes import Process
from support.webhooks import BODIES, events_of, headers_of, url_of
from support.wire import exchange, request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REQUESTS = 10_000
AT_ONCE = 32
MIB = 1024 * 1024
KINDS = ("task", "step", "crew", "human_input", "stream")
Hostile, Urls = Callable[[random.Random], tuple[bytes, ...]], Callable[..., Webhooks]


def hostile_requests(urls: Urls) -> dict[str, Hostile]:
    """Return what makes each kind of them; none may become an event."""
    good, stale, forged = urls(), urls(days=-1), urls("another/run")
    bodies = {kind: json.dumps(next(BODIES[one] for one in BODIES if one.startswith(kind))).encode() for kind in KINDS}

    def path(hooks: Webhooks, kind: str) -> str:
        return httpx.URL(url_of(hooks, kind)).path

    def post(body: bytes, *, hooks: Webhooks = good, kind: str = "crew", **headers: str) -> tuple[bytes, ...]:
        return (request("POST", path(hooks, kind), body, {key.replace("_", "-"): one for key, one in headers.items()}),)

    def mangled(rng: random.Random) -> tuple[bytes, ...]:
        kind = rng.choice(KINDS)
        token = list(path(forged, kind))
        at = rng.randrange(len(f"/hooks/{kind}/"), len(token))
        token[at] = rng.choice("ABCDEFGHabcdefgh0123456789-_~!.".replace(token[at], ""))
        return (request("POST", "".join(token), bodies[kind], headers_of(forged, kind)),)

    def deep(rng: random.Random) -> tuple[bytes, ...]:
        opening = rng.choice([b"[", b'{"kickoff_id":', b'{"meta":[', b'{"events":[{"data":'])
        return post(opening * (rng.randrange(1000, 500_000) // len(opening)))

    def chunked(rng: random.Random) -> tuple[bytes, ...]:
        chunk = b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n"
        return (*post(b"", Content_Length="", Transfer_Encoding="chunked"), *[chunk] * rng.randrange(17, 22))

    def cut_off(rng: random.Random) -> tuple[bytes, ...]:
        (whole,) = post(bodies["task"] + b" ", kind="task")
        return (whole[: rng.randrange(10, len(whole) - 1)],)

    return {
        "forged": mangled,
        "stale": lambda _: post(bodies["crew"], hooks=stale),
        "replayed": lambda _: post(bodies["crew"]),
        "oversize": lambda rng: post(b" " * rng.randrange(MIB + 1, 3 * MIB)),
        "chunked": chunked,
        "deep": deep,
        "no-body-of-ours": lambda rng: post(rng.choice([b"", b"[]", b"null", b"{}", b"\xff", b'"x"', b"1e999"])),
        "cut-off": cut_off,
        "garbage": lambda rng: (rng.randbytes(rng.randrange(1, 4000)) + b"\r\n\r\n",),
        "head": lambda rng: (request("POST", "/hooks/crew/x", b"", {"X-Long": "y" * rng.randrange(100_000)}),),
    }


def resident(process: Process) -> float:
    """Return the MiB of memory that a process holds."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("the process has ended")


async def test_hostile_requests_do_nothing(receiver_process: tuple[Process, int], urls: Urls, notes: list[str]):
    process, port = receiver_process
    rng = random.Random(20260501)
    kinds = hostile_requests(lambda *key, **facts: urls(*(key or ("hostile/run",)), **facts))
    answers: dict[str, Counter[int | None]] = {name: Counter() for name in kinds}
    gate = asyncio.Semaphore(AT_ONCE)

    async def attack(name: str, seed: int) -> None:
        async with gate:
            # Those that are cut off are left hanging for a moment: the receiver waits, nobody else does.
            within = 0.05 if name == "cut-off" else 30.0
            answers[name][await exchange(port, *kinds[name](random.Random(seed)), within=within)] += 1

    async def attack_so_often(count: int) -> None:
        await asyncio.gather(*(attack(rng.choice(list(kinds)), rng.randrange(2**32)) for _ in range(count)))

    # What is replayed has to be genuine once.
    first = await exchange(port, *kinds["replayed"](rng))
    assert first == 200
    await attack_so_often(2_000)
    before = resident(process)
    slow = [asyncio.create_task(exchange(port, b"POST /hooks/crew/x HTTP/1.1\r\n", within=30)) for _ in range(50)]
    await attack_so_often(REQUESTS - 2_000)
    after = resident(process)
    assert await asyncio.gather(*slow) == [None] * 50, "heads that never come are not waited for"

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        ready = (await client.get("/ready")).json()
    notes.append(f"receiver: {REQUESTS} hostile requests, {before:.0f} MiB before, {after:.0f} MiB after")
    assert process.running, process.tail()
    assert "Traceback" not in process.output, process.tail()
    assert ready["received"] == answers["replayed"].total() + 1, "those that were genuine, and no other"
    assert after - before < 15, f"{before:.0f} MiB grew to {after:.0f}"
    allowed = {"replayed": {200}, "oversize": {413, None}, "chunked": {413, None}, "deep": {400}, "cut-off": {None}}
    allowed |= {"no-body-of-ours": {400}, "garbage": {400, None}, "head": {400, 404, 431, None}}
    for name, seen in answers.items():
        assert set(seen) <= allowed.get(name, {404}), f"{name}: {seen}"
    assert len(await events_of("hostile/run")) == 1
    assert await exchange(port, request("GET", "/health")) == 200
