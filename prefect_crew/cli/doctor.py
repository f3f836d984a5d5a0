"""`prefect-crew doctor`: look at Prefect, its pools of crew workers, and a crew."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import AsyncIterator, Sized
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

from prefect_crew.cli import _errors, _output
from prefect_crew.cli._options import CrewAccess, CrewName, Output, is_url
from prefect_crew.cli._prefect import reach_prefect
from prefect_crew.client.inputs import STATE_ID
from prefect_crew.exceptions import (
    AuthenticationError,
    CrewConnectionError,
    CrewError,
    NotFoundError,
    PrefectAwayError,
)
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from prefect_crew.client._client import CrewClient


PREFECT_FLOOR = "3.8.0"
"""The oldest Prefect that this package works with."""


class Finding(NamedTuple):
    """What was looked at, what was found, and how to fix it, if anything is wrong. A problem has to be fixed."""

    level: Literal["ok", "note", "warning", "problem"]
    subject: str
    found: str
    fix: str = ""


def doctor(crew: CrewName | None = None, /, *, output: Output = None, access: CrewAccess = CrewAccess()) -> int:
    """Check the Prefect API and, optionally, a crew, and suggest fixes. Nothing is kicked off."""
    findings: list[Finding] = []

    async def look() -> None:
        async for finding in _check(crew, access, about_api):
            findings.append(finding)
            if not output:
                _put(finding)

    try:
        url = reach_prefect()
    except PrefectAwayError as error:
        about_api = Finding("problem", "Prefect API", str(error))
    else:
        about_api = Finding("ok", "Prefect API", f"{url} answers") if url else EMBEDDED
    asyncio.run(look())
    problems = sum(finding.level == "problem" for finding in findings)
    if output:
        _output.put_json({"problems": problems, "findings": [finding._asdict() for finding in findings]})
    else:
        _output.put(f"\nProblems: {problems}.")
    return _errors.OTHER if problems else 0


EMBEDDED = Finding(
    "note",
    "Prefect API",
    "PREFECT_API_URL is not set: each command starts an embedded server. For workers, schedules and other machines "
    "start a server (prefect server start) and set PREFECT_API_URL.",
)


async def _check(crew: str | None, access: CrewAccess, about_api: Finding) -> AsyncIterator[Finding]:
    yield about_api
    is_away = about_api.level == "problem"
    if not is_away:
        async for finding in check_prefect():
            yield finding
    if crew is None:
        return
    if is_away and not is_url(crew):
        yield Finding("problem", "crew", f"Without the Prefect API the block {crew!r} cannot be loaded.")
        return
    try:
        client = await access.any_client(crew)
    except CrewError as error:
        yield Finding("problem", "crew", str(error))
        return
    async for finding in check_crew(client):
        yield finding


_MARKS = {"ok": ("✓", "green"), "note": ("·", "dim"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


def _put(finding: Finding) -> None:
    mark, style = _MARKS[finding.level]
    for line in (f"{mark} {finding.subject}: {finding.found}", *([f"  → {finding.fix}"] if finding.fix else [])):
        if _output.is_terminal(sys.stdout):
            _output.console().print(_output.redact(_output.plain(line)), style=style)
        else:
            _output.put(line)


# The crew


async def check_crew(client: CrewClient) -> AsyncIterator[Finding]:
    """Look at a crew: its URL, TLS, token, `/inputs`, and the status path. `client` is not open yet."""
    url = urlsplit(client.url)
    if url.scheme == "https" or url.hostname in ("127.0.0.1", "::1", "localhost"):
        yield Finding("ok", "URL", client.url)
    else:
        found = f"{client.url} sends the token over the network without encryption."
        yield Finding("warning", "URL", found, "Use https, unless nobody else uses this network.")
    async with client:
        reached = await _reach(client, "TLS" if url.scheme == "https" else "server")
        yield reached
        if reached.level == "problem":
            return
        inputs = await _inputs(client)
        for finding in inputs:
            yield finding
        if inputs[0].subject == "token" and inputs[0].level == "problem":
            return
        status = await _status(client)
        yield status
    if reached.level == "note" and inputs[0].level == "warning" and status.level == "ok":
        found = "All requests were answered with 404: there seems to be no crew at this URL."
        yield Finding("problem", "crew", found, "Copy the URL again from the Status tab of the crew's page.")


_FIXES = {
    ("wrong_version", "wrong version"): "This port does not use TLS. Check whether the URL has to begin with http.",
    ("certificate", "ssl"): "Check the host name in the URL. For a CA of your own set SSL_CERT_FILE.",
    ("name or service", "nodename", "name resolution", "getaddrinfo"): "Check the host name in the URL, and the DNS.",
    ("proxy",): "Check HTTPS_PROXY, HTTP_PROXY and NO_PROXY.",
    ("",): "Check the URL, that the crew is online on its page, and that no firewall or proxy is in between.",
}
"""What to do about a connection that fails, by words of the reason."""


async def _reach(client: CrewClient, subject: str) -> Finding:
    try:
        is_healthy = await client.health()
    except AuthenticationError:
        is_healthy = True  # it answers; the token is looked at next
    except CrewConnectionError as error:
        fix = next(fix for words, fix in _FIXES.items() if any(word in error.reason.lower() for word in words))
        return Finding("problem", subject, f"No answer: {error.reason}.", fix)
    except CrewError as error:
        return Finding("problem", subject, str(error))
    answers = "the certificate is accepted" if subject == "TLS" else "it answers"
    if not is_healthy:
        return Finding("note", subject, f"{answers}; GET / does not say Healthy, which some crews do not")
    return Finding("ok", subject, f"{answers}, and it says that it is healthy")


async def _inputs(client: CrewClient) -> list[Finding]:
    try:
        found = await client.inputs()
    except AuthenticationError as error:
        fix = (
            "Copy it again from the Status tab of the crew's page; every crew has its own, and a User Bearer Token may "
            "do less than a Bearer Token. Then: prefect-crew crews save NAME --url URL --overwrite."
        )
        return [Finding("problem", "token", f"It is refused with {error.status_code}.", fix)]
    except NotFoundError:
        fix = "Check that the URL is the crew's own, without a path. Without /inputs no kickoff's inputs are checked."
        return [Finding("warning", "inputs", "GET /inputs is answered with 404.", fix)]
    except CrewError as error:
        return [Finding("problem", "inputs", str(error), "Until this works, no kickoff's inputs are checked.")]
    names = ", ".join(f"{item.name}{'' if item.required else ' (optional)'}" for item in found)
    takes = Finding("ok", "inputs", f"the crew takes {names}") if found else Finding("note", "inputs", "it names none")
    findings = [Finding("ok", "token", "it is accepted"), takes]
    if any(item.name == STATE_ID for item in found):
        named = f"One is called {STATE_ID}, which a CrewAI Flow takes for the id of its state."
        findings.append(Finding("warning", "inputs", named, "Give it a new UUID for each run."))
    return findings


async def _status(client: CrewClient) -> Finding:
    try:
        status = await client.status(f"prefect-crew-doctor-{uuid4()}")
    except CrewError as error:
        return Finding("problem", "status", str(error), "Without it no run can be waited for.")
    if status.state is CrewState.UNKNOWN:
        return Finding("ok", "status", "it does not know a run that does not exist")
    found = f"The server says {status.raw_state or status.state} of a run that does not exist."
    return Finding("warning", "status", found, "So a lost run seems to wait: give the crew's wait a pending_timeout.")


# Prefect


def is_older(version: str, than: str) -> bool:
    """Return whether a version such as 3.8.0 or 3.9.0.dev4 is older than another; by its numbers only."""
    numbers = [[int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3]] for text in (version, than)]
    return numbers[0] < numbers[1]


async def check_prefect() -> AsyncIterator[Finding]:
    """Look at Prefect, whose API is known to answer: versions, the block type, records, pools of crew workers.

    Raises:
        httpx.HTTPError: The API does not answer after all.
    """
    import prefect
    from prefect.client.orchestration import get_client

    own = prefect.__version__
    async with get_client() as client:
        server = await client.api_version()
        for subject, version in (("Prefect", own), ("Prefect server", server)):
            if is_older(version, PREFECT_FLOOR):
                yield Finding("problem", subject, f"It is {version}.", f"Upgrade it to {PREFECT_FLOOR} or later.")
            elif is_older(version, own):
                found = f"It is {version}, older than the {own} that is installed here."
                yield Finding(
                    "warning", subject, found, "Upgrade it: the server has to be at least as new as its clients."
                )
            else:
                yield Finding("ok", subject, f"version {version}")
        yield await _block_type(client)
        yield await _records()
        async for finding in _crew_pools(client):
            yield finding


async def _block_type(client: PrefectClient) -> Finding:
    from prefect.exceptions import ObjectNotFound

    try:
        await client.read_block_type_by_slug("deployed-crew")
    except ObjectNotFound:
        fix = "prefect block register -m prefect_crew, or store a crew: prefect-crew crews save NAME --url URL."
        return Finding("warning", "block type", "deployed-crew is not registered.", fix)
    blocks = sorted(str(block.name) for block in await client.read_block_documents_by_type("deployed-crew"))
    return Finding("ok", "block type", f"it is registered; stored crews: {', '.join(blocks) or 'none'}")


async def _records() -> Finding:
    import httpx
    from prefect.exceptions import PrefectException

    from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
    from prefect_crew.records.store import PrefectRecords

    records = PrefectRecords()
    # Not started: were this program killed here, the record would hold no key, and be pruned.
    record = RunRecord(
        idempotency_key=f"prefect-crew doctor {uuid4()}",
        attempt=1,
        phase=RecordPhase.NOT_STARTED,
        crew="doctor",
        crew_url="",
        inputs_digest="",
        owner=str(uuid4()),
        claimed_at=utcnow(),
        reason="prefect-crew doctor tried whether records can be written",
    )
    try:
        is_claimed = await records.claim(record)
        is_claimed_twice = await records.claim(record.model_copy(update={"owner": str(uuid4())}))
        read = await records.attempts(record.idempotency_key)
        await records.delete(record)
    except (httpx.HTTPError, PrefectException) as error:
        found = f"A Variable could not be written, read and removed: {type(error).__name__}: {error}".splitlines()[0]
        fix = "Runs are recorded in Prefect Variables: the API key needs the permission to write them."
        return Finding("problem", "records", found, fix)
    if is_claimed and not is_claimed_twice and [one.owner for one in read] == [record.owner]:
        return Finding("ok", "records", "one was claimed once, read and removed")
    found = "A record that was claimed could be claimed again, or was not read back."
    fix = "Do not run crews with this Prefect API: two calls with one key could start two runs."
    return Finding("problem", "records", found, fix)


async def _crew_pools(client: PrefectClient) -> AsyncIterator[Finding]:
    from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterType

    from prefect_crew.records.model import utcnow
    from prefect_crew.worker import BEGUN, UNOWNED_FOR, is_orphan, owner_name, read_flow_runs, read_workers

    of_crews = WorkPoolFilter(type=WorkPoolFilterType(any_=["crew"]))
    pools = await client.read_work_pools(work_pool_filter=of_crews)
    if not pools:
        found = "There is no work pool of the type crew. On others a flow run that waits for a crew holds a process."
        yield Finding("note", "crew pool", found, "prefect work-pool create crews --type crew")
    for pool in pools:
        subject, name = f"crew pool {pool.name}", shlex.quote(pool.name)
        start = f"prefect worker start --pool {name}"
        workers = await read_workers(client, pool.name)
        online = sorted(worker for worker, is_online in workers.items() if is_online)
        begun = await read_flow_runs(client, pool.name, *BEGUN)
        since = utcnow() - timedelta(
            seconds=UNOWNED_FOR
        )  # one that a worker is about to take has no owner for a moment
        orphans = [
            run
            for run in begun
            if is_orphan(run, workers) and (owner_name(run) or (run.state is not None and run.state.timestamp < since))
        ]
        if pool.is_paused:
            fix = f"prefect work-pool resume {name}"
            yield Finding("warning", subject, "It is paused: its workers take no flow runs.", fix)
        if online:
            found = f"{_count(online, 'worker')} online ({', '.join(online)}), {_count(begun, 'flow run')} begun"
            yield Finding("ok", subject, found)
        else:
            yield Finding("warning", subject, "No worker is online.", start)
        if orphans:
            gone = sorted({worker for run in orphans if (worker := owner_name(run)) is not None}) or ["NAME"]
            found = f"Worker {', '.join(gone)} is gone and left {_count(orphans, 'flow run')}."
            others = "Workers that are online take them within two heartbeats. " if online else ""
            fix = f"{others}To take them at once: {start} --name {shlex.quote(gone[0])}."
            yield Finding("warning", subject, found, fix)


def _count(things: Sized, word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
