"""`prefect-crew doctor`: look at Prefect, the crew database, and a crew."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from prefect_crew._text import version_numbers
from prefect_crew.cli import _errors, _output
from prefect_crew.cli._options import CrewName, is_url, open_client
from prefect_crew.cli._prefect import reach_prefect
from prefect_crew.exceptions import (
    AuthenticationError,
    CrewConnectionError,
    CrewError,
    PrefectAwayError,
    PrefectRefusedError,
)

if TYPE_CHECKING:
    from prefect_crew.client._client import CrewClient

Level = Literal["ok", "warning", "problem"]
MARKS: dict[Level, tuple[str, str]] = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@dataclass(frozen=True)
class Finding:
    """The subject of a check, its result, and a fix, if there is one. Only the level `problem` fails the command."""

    level: Level
    subject: str
    fact: str
    fix: str = ""


class Findings(list[Finding]):
    """The findings, each written at once."""

    def add(self, level: Level, subject: str, fact: str, fix: str = "") -> None:
        """Add a finding."""
        self.append(Finding(level, subject, fact, fix))
        mark, style = MARKS[level]
        _output.put(f"{mark} {subject}: {fact}{f'{chr(10)}  → {fix}' if fix else ''}", style)


def doctor(crew: CrewName | None = None, /) -> int:
    """Check the Prefect API and, optionally, a crew, and suggest fixes. Nothing is kicked off."""
    findings = Findings()
    try:
        url = reach_prefect()
    except (PrefectAwayError, PrefectRefusedError) as error:
        # The sentence that leads here is no help here.
        findings.add(
            "problem", "Prefect API", re.sub(r" (To see what is wrong, r|R)un: prefect-crew doctor\.$", "", str(error))
        )
    else:
        if url is None:
            fix = "For workers, schedules and other machines: prefect server start, and set PREFECT_API_URL."
            fact = "PREFECT_API_URL is not set: each command starts an embedded server."
            findings.add("ok", "Prefect API", fact, fix)
        asyncio.run(_look_at_prefect(url, findings))
    if crew is not None:
        asyncio.run(_look_at_crew(crew, findings))
    problems = sum(finding.level == "problem" for finding in findings)
    _output.put(f"\nProblems: {problems}.")
    return _errors.OTHER if problems else 0


async def _look_at_prefect(url: str | None, findings: Findings) -> None:
    from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, shown_url

    if url:
        findings.add("ok", "Prefect API", f"{shown_url(url)} answers")
    try:
        await check_prefect(findings)
    except (*PREFECT_ERRORS, ValueError) as error:  # a page is no JSON, a ValueError
        failed = f"{url or 'It'} was asked for more: {type(error).__name__}: {error}".splitlines()[0]
        fix = "Check PREFECT_API_URL, and PREFECT_API_KEY or PREFECT_API_AUTH_STRING."
        findings.add("problem", "Prefect API", failed, fix)


async def _look_at_crew(crew: str, findings: Findings) -> None:
    if not is_url(crew) and ("problem", "Prefect API") in {(finding.level, finding.subject) for finding in findings}:
        findings.add("problem", "crew", f"Without the Prefect API the block {crew!r} cannot be loaded.")
        return
    try:
        client = await open_client(crew)
    except CrewError as error:
        findings.add("problem", "crew", str(error))
        return
    async with client:
        await check_crew(client, findings)


async def check_crew(client: CrewClient, findings: Findings) -> None:
    """Look at a crew: its URL, TLS, token and `/inputs`. `client` is open."""
    url = urlsplit(client.url)
    if url.scheme == "https" or url.hostname in ("127.0.0.1", "::1", "localhost"):
        findings.add("ok", "URL", client.url)
    else:
        unsafe = f"{client.url} sends the token over the network without encryption."
        findings.add("warning", "URL", unsafe, "Use https, unless nobody else uses this network.")
    try:
        inputs = await client.inputs()
    except CrewConnectionError as error:
        fix = (
            "Check the URL, whether it begins with http or https, that the crew is online on its page, and that no "
            "firewall or proxy is in between. For a CA of your own set SSL_CERT_FILE."
        )
        findings.add("problem", "server", f"No answer: {error.reason}.", fix)
    except CrewError as error:
        subject = "token" if isinstance(error, AuthenticationError) else "inputs"
        findings.add("problem", subject, str(error))
    else:
        findings.add("ok", "token", "it is accepted")
        names = ", ".join(f"{item.name}{'' if item.required else ' (optional)'}" for item in inputs)
        findings.add("ok", "inputs", f"the crew takes {names or 'none that it names'}")
        version = await client.version() or "its server does not report it, so no run has it"
        findings.add("ok", "version", version)


async def check_prefect(findings: Findings) -> None:
    """Look at Prefect, whose API is known to answer: versions, block type, crew database.

    Raises:
        PREFECT_ERRORS, ValueError: The API does not answer as it should after all.
    """
    import prefect
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    own = prefect.__version__
    async with get_client() as client:
        server = await client.api_version()
        if version_numbers(server) < version_numbers(own):
            old = f"It is {server}, older than the {own} that is installed here."
            findings.add("warning", "Prefect server", old, "Upgrade it: a server has to be as new as its clients.")
        else:
            findings.add("ok", "Prefect server", f"version {server}; here: {own}")
        try:
            blocks = await client.read_block_documents_by_type("deployed-crew")
            names = ", ".join(sorted(str(block.name) for block in blocks)) or "none"
            findings.add("ok", "block type", f"it is registered; stored crews: {names}")
        except ObjectNotFound:
            fix = "prefect block register -m prefect_crew, or store a crew: prefect-crew crews save NAME --url URL."
            findings.add("warning", "block type", "deployed-crew is not registered.", fix)
    await _check_database(findings)


async def _check_database(findings: Findings) -> None:
    """Check that the crew database can be opened and written to, and that the Prefect server knows it."""
    from prefect_crew.runs.database import open_store
    from prefect_crew.store.workers import release

    try:
        store = await open_store()
        await store.run(release, "", "")  # a change of nothing
        own = await store.registration()
    except CrewError as error:
        findings.add("problem", "crew database", str(error))
        return
    if own.host is None:
        fact = f"{own.where}, id {own.id}. Another machine has to show the same id"
        findings.add("ok", "crew database", fact)
    else:
        fix = "For several machines or containers, set PREFECT_INTEGRATIONS_CREW_DATABASE_URL to the same PostgreSQL."
        findings.add("ok", "crew database", f"{own.where}, id {own.id}, on this machine only", fix)
