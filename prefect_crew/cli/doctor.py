"""`prefect-crew doctor`: what is wrong, and how to mend it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Annotated

from prefect_crew.api.errors import CrewError
from prefect_crew.cli import exits, terminal
from prefect_crew.cli.crews import CREW, JSON, CrewAccess, is_url
from prefect_crew.cli.prefect_side import Prefect, reach_prefect
from prefect_crew.cli.progress import progress
from prefect_crew.doctor import Finding, Level, check_crew, check_prefect

if TYPE_CHECKING:
    from prefect_crew.api.client import CrewClient

__all__ = ["doctor"]

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
    except exits.PrefectAwayError as error:
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
        terminal.put_json({"problems": bad, "findings": lines})
    else:
        terminal.put("")
        terminal.put("Nothing has to be mended." if not bad else f"To mend: {bad}.")
    return exits.FOUND if bad else 0


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
    if not terminal.is_terminal(sys.stdout):
        terminal.put(f"{mark} {text}")
        if finding.mend:
            terminal.put(f"  → {finding.mend}")
        return
    from rich.padding import Padding
    from rich.text import Text

    console = terminal.results()
    line = Text.assemble(
        (f"{mark} ", style), (f"{finding.subject}: ", "bold"), terminal.redact(terminal.plain(finding.found))
    )
    console.print(line)
    if finding.mend:
        console.print(Padding(Text(f"→ {terminal.redact(terminal.plain(finding.mend))}", style=style), (0, 0, 0, 2)))
