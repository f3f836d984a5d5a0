"""`prefect-crew doctor`: look at Prefect, its pools of crew workers, and a crew."""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from prefect_crew._text import version_numbers
from prefect_crew.cli import _errors, _output
from prefect_crew.cli._options import CrewAccess, CrewName, Output, is_url
from prefect_crew.cli._prefect import reach_prefect
from prefect_crew.exceptions import (
    AuthenticationError,
    CrewConnectionError,
    CrewError,
    NotFoundError,
    PrefectAwayError,
    PrefectRefusedError,
)

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from prefect_crew.client._client import CrewClient

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@dataclass(frozen=True)
class Finding:
    """The subject of a check, its result, and a fix, if there is one. Only the level `problem` fails the command."""

    level: Literal["ok", "warning", "problem"]
    subject: str
    fact: str
    fix: str = ""


class Findings(list[Finding]):
    """The findings, each written at once."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__()
        self._is_quiet = quiet

    def add(self, level: Literal["ok", "warning", "problem"], subject: str, fact: str, fix: str = "") -> None:
        """Add a finding."""
        self.append(Finding(level, subject, fact, fix))
        if not self._is_quiet:
            mark, style = MARKS[level]
            _output.put(f"{mark} {subject}: {fact}{f'{chr(10)}  → {fix}' if fix else ''}", style)


def doctor(crew: CrewName | None = None, /, *, output: Output = None, access: CrewAccess = CrewAccess()) -> int:
    """Check the Prefect API and, optionally, a crew, and suggest fixes. Nothing is kicked off."""
    findings = Findings(quiet=output is not None)
    is_away, url = False, None
    try:
        url = reach_prefect()
    except (PrefectAwayError, PrefectRefusedError) as error:
        is_away = True
        findings.add("problem", "Prefect API", str(error))
    else:
        from prefect_crew._internal.prefect_errors import shown_url

        fix = "For workers, schedules and other machines: prefect server start, and set PREFECT_API_URL."
        embedded = "PREFECT_API_URL is not set: each command starts an embedded server."
        findings.add("ok", "Prefect API", f"{shown_url(url)} answers" if url else embedded, "" if url else fix)

    async def look() -> None:
        nonlocal is_away
        from prefect_crew._internal.prefect_errors import PREFECT_ERRORS

        if not is_away:
            try:
                await check_prefect(findings)
            except (*PREFECT_ERRORS, ValueError) as error:  # a page is no JSON, a ValueError
                is_away = True
                failed = f"{url or 'It'} was asked for more: {type(error).__name__}: {error}".splitlines()[0]
                fix = "Check PREFECT_API_URL, and PREFECT_API_KEY or PREFECT_API_AUTH_STRING."
                findings.add("problem", "Prefect API", failed, fix)
        if crew is None:
            return
        if is_away and not is_url(crew):
            findings.add("problem", "crew", f"Without the Prefect API the block {crew!r} cannot be loaded.")
            return
        try:
            client = await access.client(crew)
        except CrewError as error:
            findings.add("problem", "crew", str(error))
            return
        async with client:
            await check_crew(client, findings)

    asyncio.run(look())
    problems = sum(finding.level == "problem" for finding in findings)
    as_json = output and {"problems": problems, "findings": [asdict(finding) for finding in findings]}
    _output.put(f"\nProblems: {problems}.", json=as_json)
    return _errors.OTHER if problems else 0


async def check_crew(client: CrewClient, findings: Findings) -> None:
    """Look at a crew: its URL, TLS, token and `/inputs`. `client` is open."""
    url = urlsplit(client.url)
    subject = "TLS" if url.scheme == "https" else "server"
    if url.scheme == "https" or url.hostname in ("127.0.0.1", "::1", "localhost"):
        findings.add("ok", "URL", client.url)
    else:
        unsafe = f"{client.url} sends the token over the network without encryption."
        findings.add("warning", "URL", unsafe, "Use https, unless nobody else uses this network.")
    inputs, problem = [], None
    try:
        inputs = await client.inputs()
    except CrewConnectionError as error:
        fix = (
            "Check the URL, whether it begins with http or https, that the crew is online on its page, and that no "
            "firewall or proxy is in between. For a CA of your own set SSL_CERT_FILE."
        )
        findings.add("problem", subject, f"No answer: {error.reason}.", fix)
        return
    except CrewError as error:
        problem = error
    findings.add("ok", subject, "the certificate is accepted" if subject == "TLS" else "it answers")
    if isinstance(problem, AuthenticationError):
        fix = (
            "Copy the token again from the Status tab of the crew's page; every crew has its own, and a User Bearer "
            "Token may do less than a Bearer Token. Then: prefect-crew crews save NAME --overwrite."
        )
        findings.add("problem", "token", f"It is refused with {problem.status_code}.", fix)
    elif isinstance(problem, NotFoundError):
        fix = "Copy the URL again from the Status tab of the crew's page, without a path."
        findings.add("problem", "crew", "GET /inputs returns 404, so there seems to be no crew at this URL.", fix)
    elif problem is not None:
        findings.add("problem", "inputs", str(problem), "Until this works, no kickoff's inputs are checked.")
    else:
        findings.add("ok", "token", "it is accepted")
        names = ", ".join(f"{item.name}{'' if item.required else ' (optional)'}" for item in inputs)
        findings.add("ok", "inputs", f"the crew takes {names or 'none that it names'}")
        version = await client.version() or "its server does not report it, so no run has it"
        findings.add("ok", "version", version)


async def check_prefect(findings: Findings) -> None:
    """Look at Prefect, whose API is known to answer: versions, block type, crew database, pools of crew workers.

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
        if await _is_database_usable(findings):
            await _check_pools(client, findings)
        await _check_forms(client, findings)


async def _is_database_usable(findings: Findings) -> bool:
    """Check that the crew database can be opened and written to, and that the Prefect server knows it."""
    from prefect_crew.runs.database import open_store
    from prefect_crew.store.workers import release

    try:
        store = await open_store()
        await store.run(release, "", "")  # a change of nothing
        own = await store.registration()
    except CrewError as error:
        findings.add("problem", "crew database", str(error))
        return False
    if own.host is None:
        fact = f"{own.where}, id {own.id}. Another machine has to show the same id"
        findings.add("ok", "crew database", fact)
    else:
        fix = "For several machines or containers, set PREFECT_INTEGRATIONS_CREW_DATABASE_URL to the same PostgreSQL."
        findings.add("ok", "crew database", f"{own.where}, id {own.id}, on this machine only", fix)
    return True


async def _check_pools(client: PrefectClient, findings: Findings) -> None:
    """Check each pool of crew workers: the workers that live, and the flow runs that dead ones have left."""
    from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterType

    from prefect_crew.runs.database import in_store
    from prefect_crew.store.workers import workers_of

    of_crews = WorkPoolFilter(type=WorkPoolFilterType(any_=["crew"]))
    for pool in await client.read_work_pools(work_pool_filter=of_crews):
        workers = await in_store(workers_of, str(pool.id))
        online = ", ".join(worker.name for worker in workers if not worker.is_dead)
        gone = [worker for worker in workers if worker.is_dead]
        summary = f"workers online: {online or 'none'}; flow runs begun: {sum(worker.flow_runs for worker in workers)}"
        fix = "" if online else f"prefect worker start --pool {shlex.quote(pool.name)}"
        if gone:
            names = ", ".join(sorted({worker.name for worker in gone}))
            left = sum(worker.flow_runs for worker in gone)
            summary += f", {left} of them left by workers that are gone ({names})"
            fix = fix or "Workers that are online take them within two heartbeats."
        findings.add("warning" if fix else "ok", f"crew pool {pool.name}", summary, fix)


async def _check_forms(client: PrefectClient, findings: Findings) -> None:
    """Compare the run form of each deployment of a crew or pipeline with the inputs of today."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags, FlowFilter, FlowFilterName

    from prefect_crew.automations import TAG
    from prefect_crew.deployments import outdated_form
    from prefect_crew.flows import run_deployed_crew
    from prefect_crew.pipelines.run import run_deployed_pipeline

    flows = FlowFilter(name=FlowFilterName(any_=[run_deployed_crew.name, run_deployed_pipeline.name]))
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    deployments = [
        *await client.read_deployments(flow_filter=flows),
        *await client.read_deployments(deployment_filter=tagged),
    ]
    current = 0
    for deployment in {deployment.id: deployment for deployment in deployments}.values():
        try:
            outdated = await outdated_form(deployment)
        except (CrewError, ValueError) as error:
            findings.add(
                "warning",
                f"deployment {deployment.name}",
                f"Its form was not compared with the inputs of today: {error}",
            )
            continue
        if outdated is None:
            current += 1
            continue
        difference, command = outdated
        fix = f"Deploy it again as it was, with its defaults and its key: {command}"
        findings.add("warning", f"deployment {deployment.name}", f"Its form is out of date: {difference}.", fix)
    if current:
        findings.add("ok", "deployments", f"up to date: {current}")
