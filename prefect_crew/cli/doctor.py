"""Look at Prefect, a crew, and what lies between."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Sized
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit
from uuid import uuid4

from prefect_crew.cli import _errors, _output
from prefect_crew.cli._options import CREW, JSON, CrewAccess, is_url
from prefect_crew.cli._prefect import Prefect, reach_prefect
from prefect_crew.cli._progress import progress
from prefect_crew.client.inputs import STATE_ID
from prefect_crew.exceptions import AuthenticationError, CrewConnectionError, CrewError, NotFoundError
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, WorkPool

    from prefect_crew.client._client import CrewClient


PREFECT_FLOOR = "3.8.0"
"""The oldest Prefect that this package works with."""


_NO_INPUTS = "GET /inputs is answered with 404."


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    """Good to know."""
    WARNING = "warning"
    """It works, and may not do what one expects."""
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it, if anything."""

    level: Level
    subject: str
    found: str
    mend: str = ""


def _ok(subject: str, found: str) -> Finding:
    return Finding(Level.OK, subject, found)


def older(version: str, than: str) -> bool:
    """Return whether a version such as 3.8.0 or 3.9.0.dev4 is older than another; by its numbers only."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3]]

    return numbers(version) < numbers(than)


# The crew


async def check_crew(client: CrewClient) -> AsyncIterator[Finding]:
    """Look at a crew: its URL, TLS, token, `/inputs`, and the status path. `client` is not open yet."""
    yield _of_url(client.url)
    async with client:
        reached = await _reach(client)
        yield reached
        if reached.level is Level.PROBLEM:
            return
        no_inputs = False
        async for finding in _inputs(client):
            yield finding
            if finding.subject == "token" and finding.level is Level.PROBLEM:
                return
            no_inputs = no_inputs or finding.found == _NO_INPUTS
        status = await _status(client)
        yield status
        if no_inputs and reached.level is Level.NOTE and status.level is Level.OK:
            yield Finding(
                Level.PROBLEM,
                "crew",
                "Whatever was asked was answered with 404: nothing there looks like a crew.",
                "Copy the URL again from the Status tab of the crew's page.",
            )


def _of_url(url: str) -> Finding:
    parts = urlsplit(url)
    if parts.scheme == "https":
        return _ok("URL", url)
    if parts.hostname in ("127.0.0.1", "::1", "localhost"):
        return _ok("URL", f"{url}, plain http within this machine")
    return Finding(
        Level.WARNING,
        "URL",
        f"{url} sends the token in plain text over the network.",
        "Use https, unless nobody else is on that network.",
    )


async def _reach(client: CrewClient) -> Finding:
    secure = client.url.startswith("https:")
    subject = "TLS" if secure else "server"
    try:
        healthy = await client.health()
    except AuthenticationError:
        healthy = True  # somebody answers; the token is looked at next
    except CrewConnectionError as error:
        return Finding(Level.PROBLEM, subject, f"No answer: {error.reason}.", _way_out(error.reason))
    except CrewError as error:
        return Finding(Level.PROBLEM, subject, str(error))
    met = "the certificate is accepted" if secure else "it answers"
    if not healthy:
        return Finding(
            Level.NOTE, subject, f"{met[0].upper()}{met[1:]}; GET / does not say Healthy, which some crews do not."
        )
    return _ok(subject, f"{met}, and the server says that it is healthy")


def _way_out(reason: str) -> str:
    said = reason.lower()
    if "wrong_version" in said or "wrong version" in said:
        return "What answers there speaks no TLS: is the URL to begin with http, or is the port another one?"
    if "certificate" in said or "ssl" in said:
        return "Check the host name in the URL; for a CA of your own set SSL_CERT_FILE to its certificates."
    if "name or service" in said or "nodename" in said or "name resolution" in said or "getaddrinfo" in said:
        return "Check the host name in the URL, and this machine's DNS."
    if "proxy" in said:
        return "Check HTTPS_PROXY, HTTP_PROXY and NO_PROXY."
    return "Check the URL, that the crew is online on its page, and that a firewall or proxy lets you through."


async def _inputs(client: CrewClient) -> AsyncIterator[Finding]:
    try:
        found = await client.inputs()
    except AuthenticationError as error:
        yield Finding(
            Level.PROBLEM,
            "token",
            f"It is refused with {error.status_code}.",
            "Copy it again from the Status tab of the crew's page; every crew has its own. Of the two kinds, a User "
            "Bearer Token may do less than the organisation's Bearer Token. "
            "Then: prefect-crew save NAME --url URL --overwrite.",
        )
        return
    except NotFoundError:
        yield Finding(
            Level.WARNING,
            "inputs",
            _NO_INPUTS,
            "If the URL is the crew's own, it has none: inputs are then not checked before a kickoff. "
            "If the URL has more than a host, leave the rest away.",
        )
        return
    except CrewError as error:
        yield Finding(Level.PROBLEM, "inputs", str(error), "Until this works, inputs are not checked before a kickoff.")
        return
    yield _ok("token", "it is accepted")
    if found:
        names = ", ".join(f"{item.name}{'' if item.required else ' (optional)'}" for item in found)
        yield _ok("inputs", f"the crew takes {names}")
        if any(item.name == STATE_ID for item in found):
            yield Finding(
                Level.WARNING,
                "inputs",
                f"One of them is called {STATE_ID}, which a Flow takes for the id of its state.",
                "In a Flow give it a UUID, and a new one for each run; a batch takes it from a column only where it is "
                "mapped.",
            )
    else:
        yield Finding(Level.NOTE, "inputs", "The crew names none.")


async def _status(client: CrewClient) -> Finding:
    made_up = f"prefect-crew-doctor-{uuid4()}"
    try:
        status = await client.status(made_up)
    except CrewError as error:
        return Finding(Level.PROBLEM, "status", str(error), "Without it no run can be waited for.")
    if status.state is CrewState.UNKNOWN:
        return _ok("status", "a run that does not exist is not known, as it should be")
    return Finding(
        Level.WARNING,
        "status",
        f"The server says {status.raw_state or status.state} of a run that does not exist.",
        "A lost run cannot be told from one that waits: set pending_timeout in the crew's wait policy.",
    )


# Prefect


async def check_prefect() -> AsyncIterator[Finding]:
    """Look at Prefect, whose API is known to answer: versions, the block type, results, records, pools of crew workers.

    Raises:
        httpx.HTTPError: The API does not answer after all.
    """
    import prefect

    if older(prefect.__version__, PREFECT_FLOOR):
        yield Finding(
            Level.PROBLEM,
            "Prefect",
            f"Version {prefect.__version__} is installed; this package needs {PREFECT_FLOOR} or later.",
            f'pip install "prefect>={PREFECT_FLOOR}"',
        )
    else:
        yield _ok("Prefect", f"version {prefect.__version__}")
    yield await _server_version(prefect.__version__)
    yield await _block_type()
    yield _result_storage()
    yield await _record_store()
    async for finding in _crew_pools():
        yield finding
    yield Finding(
        Level.NOTE,
        "horizon",
        "No run is bought twice under one key for as long as its record stands. Records stay until `prefect-crew runs "
        "prune` removes those of runs that ended more than 90 days ago (--older-than); those in flight or uncertain "
        "are never removed.",
    )


async def _server_version(ours: str) -> Finding:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        async with get_client() as client:
            theirs = await client.api_version()
    except PrefectHTTPStatusError as error:
        return Finding(Level.NOTE, "Prefect server", f"It does not tell its version ({error.response.status_code}).")
    if older(theirs, PREFECT_FLOOR):
        return Finding(
            Level.PROBLEM,
            "Prefect server",
            f"It is {theirs}; this package needs {PREFECT_FLOOR} or later.",
            "Upgrade the server.",
        )
    if older(theirs, ours):
        return Finding(
            Level.WARNING,
            "Prefect server",
            f"It is {theirs}, older than the {ours} that is installed here.",
            "Upgrade the server: Prefect wants it to be at least as new as its clients.",
        )
    return _ok("Prefect server", f"version {theirs}")


async def _block_type() -> Finding:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    async with get_client() as client:
        try:
            kind = await client.read_block_type_by_slug("deployed-crew")
        except ObjectNotFound:
            return Finding(
                Level.WARNING,
                "block type",
                "Prefect's pages do not know deployed crews yet.",
                "prefect block register -m prefect_crew, or store a crew: prefect-crew save NAME --url URL.",
            )
        blocks = await client.read_block_documents_by_type("deployed-crew")
    return _ok(
        "block type",
        f"{kind.name} is registered; {len(blocks)} stored: {', '.join(sorted(str(b.name) for b in blocks)) or 'none'}",
    )


def _result_storage() -> Finding:
    from prefect.settings import get_current_settings

    results = get_current_settings().results
    if results.default_storage_block:
        return _ok("result storage", f"the block {results.default_storage_block}")
    return Finding(
        Level.NOTE,
        "result storage",
        f"This machine's disk ({results.local_storage_path}): another machine does not see results that Prefect keeps. "
        "A crew's run does not need them: it is found again by its record.",
    )


async def _record_store() -> Finding:
    import httpx
    from prefect.exceptions import PrefectException

    from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
    from prefect_crew.records.store import PrefectRecords

    store, now = PrefectRecords(), utcnow()
    # Not started: were this program killed right here, what is left would bind nobody, and be pruned.
    record = RunRecord(
        idempotency_key=f"prefect-crew doctor {uuid4()}",
        attempt=1,
        phase=RecordPhase.NOT_STARTED,
        crew="doctor",
        crew_url="",
        inputs_digest="",
        owner=str(uuid4()),
        claimed_at=now,
        reason="prefect-crew doctor tried whether records can be written",
    )
    try:
        claimed = await store.claim(record)
        second = await store.claim(record.model_copy(update={"owner": str(uuid4())}))
        read = await store.attempts(record.idempotency_key)
        await store.delete(record)
    except (httpx.HTTPError, PrefectException) as error:
        return Finding(
            Level.PROBLEM,
            "record store",
            f"A Variable could not be written, read and removed: {type(error).__name__}: {error}".splitlines()[0],
            "Runs are recorded in Prefect Variables: the API key needs the right to write them.",
        )
    if claimed and not second and [found.owner for found in read] == [record.owner]:
        return _ok("record store", "a record was claimed once, read and removed")
    return Finding(
        Level.PROBLEM,
        "record store",
        "A record that was claimed could be claimed again, or was not read back.",
        "Do not run crews against this Prefect API: two calls with one key could buy twice.",
    )


# Pools of crew workers


async def _crew_pools() -> AsyncIterator[Finding]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterType

    async with get_client() as client:
        kind = WorkPoolFilter(type=WorkPoolFilterType(any_=["crew"]))
        pools = await client.read_work_pools(work_pool_filter=kind)
        if not pools:
            yield Finding(
                Level.NOTE,
                "crew pool",
                "There is no work pool of the type crew. On others a flow run that waits for a crew holds a process.",
                "prefect work-pool create crews --type crew",
            )
            return
        for pool in pools:
            async for finding in _crew_pool(client, pool):
                yield finding
    yield _worker_modules()


async def _crew_pool(client: PrefectClient, pool: WorkPool) -> AsyncIterator[Finding]:
    from prefect_crew.records.model import utcnow
    from prefect_crew.worker import UNOWNED_FOR, begun_flow_runs, is_orphan, owner_name, workers_of

    subject, start = f"crew pool {pool.name}", f"prefect worker start --pool {shlex.quote(pool.name)}"
    workers = await workers_of(client, pool.name)
    online = sorted(name for name, is_online in workers.items() if is_online)
    begun = await begun_flow_runs(client, pool.name)
    # One that a worker is just about to take has no owner for a moment.
    since = utcnow() - timedelta(seconds=UNOWNED_FOR)
    orphans = [
        flow_run
        for flow_run in begun
        if is_orphan(flow_run, workers)
        and (owner_name(flow_run) or (flow_run.state is not None and flow_run.state.timestamp < since))
    ]
    if pool.is_paused:
        resume = f"prefect work-pool resume {shlex.quote(pool.name)}"
        yield Finding(Level.WARNING, subject, "It is paused: its workers take no flow runs.", resume)
    if online:
        yield _ok(
            subject, f"{_counted(online, 'worker')} online ({', '.join(online)}), {_counted(begun, 'flow run')} begun"
        )
    else:
        yield Finding(Level.WARNING, subject, "No worker is online.", start)
    if orphans:
        yield _of_orphans(subject, orphans, start, anyone_online=bool(online))


def _of_orphans(subject: str, orphans: list[FlowRun], start: str, *, anyone_online: bool) -> Finding:
    from prefect_crew.worker import owner_name

    gone = sorted({name for flow_run in orphans if (name := owner_name(flow_run)) is not None})
    of = f" of {', '.join(gone)}" if gone else ""
    way_out = (
        f"A worker that is started under the name of the one that is gone takes its flow runs at once: {start} --name "
    )
    way_out += shlex.quote(gone[0]) if gone else "NAME"
    if anyone_online:
        way_out = f"Workers that are online take them within two heartbeats. {way_out}"
    return Finding(
        Level.WARNING,
        subject,
        f"{_counted(orphans, 'flow run')}{of} to be adopted: the worker is gone.",
        f"{way_out}.",
    )


def _counted(things: Sized, word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def _worker_modules() -> Finding:
    from prefect_crew.settings import CrewSettings

    modules = CrewSettings().worker_modules
    missing = [name for name in modules if find_spec(name.partition(".")[0]) is None]
    if missing:
        return Finding(
            Level.WARNING,
            "crew worker modules",
            f"PREFECT_INTEGRATIONS_CREW_WORKER_MODULES allows {', '.join(missing)}, which cannot be imported here.",
            "Install the package, or put its folder on PYTHONPATH, where the worker starts.",
        )
    return _ok(
        "crew worker modules", f"a worker that starts here imports flows from {', '.join(['prefect_crew', *modules])}"
    )


_MARKS = {
    Level.OK: ("✓", "green"),
    Level.NOTE: ("·", "dim"),
    Level.WARNING: ("!", "yellow"),
    Level.PROBLEM: ("✗", "red"),
}


def doctor(
    crew: Annotated[str | None, CREW] = None,
    /,
    *,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008 - never changed
) -> int:
    """Look at Prefect, at a crew if one is given, and at what is between; say how to mend what is wrong."""
    findings: list[Finding] = []

    def take(finding: Finding) -> None:
        findings.append(finding)
        if not json:
            _show(finding)

    try:
        with progress(quiet=True) as shown:
            prefect = reach_prefect(shown)
    except _errors.PrefectAwayError as error:
        take(Finding(Level.PROBLEM, "Prefect API", str(error)))
        prefect = None
    else:
        take(_of_api(prefect))
        asyncio.run(_take_all(check_prefect(), take))
    if crew is not None:
        _look_at_crew(crew, access, prefect, take)
    bad = sum(finding.level is Level.PROBLEM for finding in findings)
    if json:
        fields = ("subject", "found", "mend")
        lines = [{"level": str(one.level), **{field: getattr(one, field) for field in fields}} for one in findings]
        _output.put_json({"problems": bad, "findings": lines})
    else:
        _output.put("")
        _output.put("Nothing has to be mended." if not bad else f"To mend: {bad}.")
    return _errors.FOUND if bad else 0


async def _take_all(findings: AsyncIterator[Finding], take: Callable[[Finding], None]) -> None:
    async for finding in findings:
        take(finding)


def _of_api(prefect: Prefect) -> Finding:
    if prefect.url:
        return Finding(Level.OK, "Prefect API", f"{prefect.url} answers")
    return Finding(
        Level.NOTE,
        "Prefect API",
        "None is set: each command and script starts an embedded server of its own, on this machine's database. For "
        "workers, schedules and other machines start a server (prefect server start) and set PREFECT_API_URL.",
    )


def _look_at_crew(crew: str, access: CrewAccess, prefect: Prefect | None, take: Callable[[Finding], None]) -> None:
    if prefect is None and not is_url(crew):
        take(Finding(Level.PROBLEM, "crew", f"Without the Prefect API the block {crew!r} cannot be loaded."))
        return
    try:
        client = access.client(crew) if is_url(crew) else asyncio.run(_stored(crew, access))
    except CrewError as error:
        take(Finding(Level.PROBLEM, "crew", str(error)))
        return
    asyncio.run(_take_all(check_crew(client), take))


async def _stored(crew: str, access: CrewAccess) -> CrewClient:
    return (await access.load(crew)).client()


def _show(finding: Finding) -> None:
    mark, style = _MARKS[finding.level]
    text = f"{finding.subject}: {finding.found}"
    if not _output.is_terminal(sys.stdout):
        _output.put(f"{mark} {text}")
        if finding.mend:
            _output.put(f"  → {finding.mend}")
        return
    from rich.padding import Padding
    from rich.text import Text

    console = _output.results()
    line = Text.assemble(
        (f"{mark} ", style), (f"{finding.subject}: ", "bold"), _output.redact(_output.plain(finding.found))
    )
    console.print(line)
    if finding.mend:
        console.print(Padding(Text(f"→ {_output.redact(_output.plain(finding.mend))}", style=style), (0, 0, 0, 2)))
