"""`prefect-crew doctor`: look at Prefect, the crew database, and a crew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from prefect_crew._text import version_numbers
from prefect_crew.cli import _errors, _output
from prefect_crew.cli._options import CrewName, is_url, open_client
from prefect_crew.cli._prefect import reach_prefect
from prefect_crew.exceptions import ConfigurationError

EMBEDDED = (
    "PREFECT_API_URL is not set: each command starts an embedded server. For workers, schedules and other machines: "
    "prefect server start, and set PREFECT_API_URL."
)


def doctor(crew: CrewName | None = None, /) -> int:
    """Check the Prefect API and, optionally, a crew, and suggest fixes. Nothing is kicked off."""
    checks: dict[str, Callable[[], Coroutine[Any, Any, str]]] = {}
    problems = 0
    try:
        url = reach_prefect()
    except Exception as error:  # noqa: BLE001  whatever it is, it is written as a problem
        problems += _put_problem("Prefect API", error)
    else:
        from prefect_crew._internal.prefect_errors import shown_url

        _output.put(f"✓ Prefect API: {f'{shown_url(url)} answers' if url else EMBEDDED}", "green")
        checks = {"Prefect server": _look_at_prefect, "crew database": _look_at_database}
    if crew is not None and (checks or is_url(crew)):
        checks["crew"] = lambda: _look_at_crew(crew)
    for subject, look in checks.items():
        try:
            _output.put(f"✓ {subject}: {asyncio.run(look())}", "green")
        except Exception as error:  # noqa: BLE001  whatever it is, it is written as a problem
            problems += _put_problem(subject, error)
    _output.put(f"\nProblems: {problems}.")
    return _errors.OTHER if problems else 0


def _put_problem(subject: str, error: Exception) -> int:
    text = _errors.message(_errors.own_error(error)).removesuffix(" To see what is wrong, run: prefect-crew doctor.")
    _output.put(f"✗ {subject}: {text.replace(' Run: prefect-crew doctor.', '')}", "red")
    return 1


async def _look_at_crew(crew: str) -> str:
    """Return a crew's inputs and version, as its server tells them: so its URL, TLS and token are right."""
    async with await open_client(crew) as client:
        inputs = ", ".join(f"{item.name}{'' if item.required else ' (optional)'}" for item in await client.inputs())
        version = await client.version() or "which its server does not report"
        return f"{client.url} takes {inputs or 'no inputs that it names'}; version {version}"


async def _look_at_prefect() -> str:
    """Return the versions and the stored crews."""
    import prefect
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    own = prefect.__version__
    async with get_client() as client:
        server = await client.api_version()
        if version_numbers(server) < version_numbers(own):
            raise ConfigurationError(
                f"It is {server}, older than the {own} that is installed here. Upgrade it: a server has to be as new "
                "as its clients."
            )
        try:
            blocks = await client.read_block_documents_by_type("deployed-crew")
        except ObjectNotFound:  # the first crew that is stored registers the type
            blocks = []
    crews = ", ".join(sorted(str(block.name) for block in blocks)) or "none"
    return f"version {server}; here: {own}; stored crews: {crews}"


async def _look_at_database() -> str:
    """Return where the crew database is, after a change of nothing. The Prefect server has to know it."""
    from prefect_crew.runs.database import open_store
    from prefect_crew.store.workers import release

    store = await open_store()
    await store.run(release, "", "")
    own = await store.registration()
    if own.host is None:
        return f"{own.where}, id {own.id}. Another machine has to show the same id"
    return (
        f"{own.where}, id {own.id}, on this machine only. For several machines or containers, set "
        "PREFECT_INTEGRATIONS_CREW_DATABASE_URL to the same PostgreSQL"
    )
