"""Flows to deploy as they are: a batch of a file or of a folder's new files, recovery from crashes, pruning.

Each is asynchronous and has plain values as parameters, so that any work pool can run it by its import path, such as
`prefect_crew.operations.batch_file`, where this package is installed.
"""

from __future__ import annotations

import hashlib
import os
import time
from asyncio import to_thread
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_client, get_run_logger
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.states import Scheduled

from prefect_crew._internal.prefect_api import flow_run_id
from prefect_crew.artifacts.run import MarkdownArtifact
from prefect_crew.batches.database import holds_password
from prefect_crew.batches.run import arun_batch
from prefect_crew.costs import costs_markdown, read_costs
from prefect_crew.exceptions import BatchBusyError, BatchCancelledError, ConfigurationError, CrewError, DatasetError
from prefect_crew.prices import Spending
from prefect_crew.records.model import utcnow
from prefect_crew.records.owners import count_attempts
from prefect_crew.records.prune import prune
from prefect_crew.records.store import PrefectRecords

LONGEST_NAME = 120
"""Bytes of a file's name that become a part of its batch's name, and so of the names of its output and its ledger."""


@flow(flow_run_name="{name}")
async def batch_file(
    crew: str, dataset: str, name: str, output: str, ledger: str | None = None, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run a crew once for each row of a file. Retried or scheduled again, it goes on where it stopped.

    Args:
        crew: The name of the crew's block, as under Blocks.
        dataset: The file: a path, a URL, or any fsspec address.
        name: The batch's name. On a schedule: leads-{scheduled_start:%Y-%m-%d}.
        output: Where its lines go. On a schedule with the same placeholder.
        ledger: A path, the URL of a PostgreSQL without a password, or secret://NAME; empty: a file next to a local
            output.
        options: More of run_batch's options, such as {"max_in_flight": 500, "key": "id", "wait": {"timeout": 600}}.
    """
    _check_ledger(ledger)
    report = await arun_batch(crew, dataset, name=name, output=output, ledger=ledger, **(options or {}))
    report.raise_for_failures()
    return report.as_dict()


@flow(flow_run_name="{folder}")
async def watch_folder(
    crew: str,
    folder: str,
    output: str,
    pattern: str = "*.csv",
    unchanged_seconds: float = 30.0,
    ledger: str | None = None,
    options: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run the crew over every new file of a folder, and move each file to its subfolder `done`.

    The name of a file's batch is made of its name and its content: a file that was not moved is continued, and one that
    comes in a second time starts no run twice. Runs of this flow may overlap. A file that cannot be read, or has a row
    that cannot be run, is moved to the subfolder `refused`. A file whose batch fails for another reason stays, also
    where it fails after its first kickoff: the others are run, and this flow fails in the end and names it.

    Args:
        crew: The name of the crew's block, as under Blocks.
        folder: Where new files come in.
        output: The folder for the lines: one file for each that came in, and its ledger unless one is given.
        pattern: Which files.
        unchanged_seconds: Seconds for which a file must not have changed: until then it may still be written.
        ledger: A path, the URL of a PostgreSQL without a password, or secret://NAME, for all of them.
        options: More of run_batch's options.

    Raises:
        CrewError: Files whose batches failed. All others were run.
    """
    _check_ledger(ledger)
    log, inbox = get_run_logger(), Path(folder)
    if not await to_thread(inbox.is_dir):
        log.warning("The folder %s does not exist here.", folder)
    found = await to_thread(_new_files, inbox, pattern, unchanged_seconds)
    reports, failed = list[dict[str, Any]](), list[str]()
    for path in found:
        name = path.name
        try:
            name = await to_thread(_batch_name, path)
            lines = str(Path(output) / f"{name}.jsonl")
            report = await arun_batch(crew, path, name=name, output=lines, ledger=ledger, **(options or {}))
        except BatchBusyError as error:
            log.info("%s", error)  # another run of this flow has the file
        except BatchCancelledError:
            raise  # it is this flow run that was cancelled
        except Exception as error:
            if isinstance(error, DatasetError | FileNotFoundError) and not getattr(error, "begun", False):
                # A file that is gone was moved by another run of this flow.
                if await to_thread(path.exists):
                    log.warning("%s It is moved to the folder refused.", error)
                    await to_thread(_move, path, "refused")
                continue
            reason = str(error).rstrip(".")
            why = f"{path.name} (batch {name!r}, {type(error).__name__}: {reason})"
            log.error("%s", why, exc_info=not isinstance(error, CrewError))  # noqa: TRY400  a traceback if not of ours
            failed.append(why)
        else:
            # Another call would do nothing for a file that is done: failed rows have lines, uncertain ones wait.
            if report.stopped is None and report.skipped == report.set_aside and not report.unfinished:
                await to_thread(_move, path, "done")
            else:
                log.warning("%s The next run of this flow continues with it.", report)
            reports.append(report.as_dict())
    if failed:
        raise CrewError(
            f"The batches of {len(failed)} of {len(found)} files in {folder} failed, the others were run: "
            f"{'; '.join(failed)}. The next run of this flow continues with them."
        )
    return reports


@flow(retries=2, retry_delay_seconds=60)
async def prune_records(older_than_days: int | None = None, dry_run: bool = False) -> str:
    """Remove old records of ended runs, and say how many. Crew workers do that by themselves.

    A record keeps a run from being started twice, and `get_result` reads it. Choose an age beyond the oldest
    idempotency key that may be used again, backfills included. Runs in flight and uncertain ones are never removed.

    Args:
        older_than_days: The age, in days since the end of a run and of its flow runs; empty: the setting, 30. A later
            call with a removed run's key starts a new run.
        dry_run: Only count.
    """
    older_than = None if older_than_days is None else timedelta(days=older_than_days)
    pruned = await prune(PrefectRecords(), older_than=older_than, dry_run=dry_run)
    said = f"{pruned.runs} records {'would go' if dry_run else 'removed'}, {pruned.kept} kept"
    get_run_logger().info("%s", said)
    return said


@flow
async def costs_page(days: int = 30) -> str:
    """Keep a page of what runs have used and cost: an artifact with a table by crew, and a chart and a table by day.

    Args:
        days: How far it goes back, in days (UTC).
    """
    since = utcnow().date() - timedelta(days=days - 1)
    rows, missed = await read_costs(["crew", "day"], since=since)
    for line in missed:
        get_run_logger().warning("%s", line)
    about = "What crews have used and cost"
    page = MarkdownArtifact("crew-costs", about, flow_run_id=flow_run_id(), is_new=True)
    if problem := await page.put(costs_markdown(rows, missed, since=since)):
        raise CrewError(f"The page of costs could not be written: {problem}. Run this flow again.")
    return str(Spending.sum(row.spending for row in rows))


@flow(flow_run_name="recover {flow_run_id}", retries=3, retry_delay_seconds=10)
async def recover(flow_run_id: UUID, max_attempts: int = 3) -> str:
    """Begin a crashed flow run again, if it has attempts left, and say what was done. An automation runs this.

    The flow run keeps its id, so it reattaches to its crews' runs. One that has failed is left alone: beginning again
    would start its crew again. Prefect alone can schedule a crashed flow run again, but without a limit: a flow that
    kills its worker would do so for ever.

    Args:
        flow_run_id: The flow run that crashed.
        max_attempts: How often it may be begun in all, the first time included.
    """
    async with get_client() as client:
        run = await client.read_flow_run(flow_run_id)
        # A run that dies before it begins is never counted by Prefect, so its crashes count as well.
        states = await client.read_flow_run_states(flow_run_id)
        attempts = max(count_attempts(states)[0], sum(state.type is StateType.CRASHED for state in states))
        if run.state is None or not run.state.is_crashed():
            done = f"left alone, it is {run.state.name if run.state else 'without a state'}"
        elif run.deployment_id is None:
            done = "left alone, no deployment can run it: its parent or its caller has to"
        elif attempts >= max_attempts:
            done = f"given up after {attempts} attempts; prefect flow-run retry {flow_run_id} makes another"
        else:
            done = f"scheduled again, attempt {attempts + 1} of {max_attempts}"
            again = Scheduled(message=f"Recovered from a crash: attempt {attempts + 1} of {max_attempts}")
            answer = await client.set_flow_run_state(flow_run_id, again)
            if answer.status is not SetStateStatus.ACCEPT:
                done = f"left alone, Prefect did not take it: {getattr(answer.details, 'reason', answer.status)}"
    get_run_logger().info("Flow run %s: %s", flow_run_id, done)
    return done


def _check_ledger(ledger: str | None) -> None:
    """Refuse a password in a parameter. Raises ConfigurationError."""
    if ledger and holds_password(ledger):
        raise ConfigurationError(
            "The ledger's URL holds a password, or may do so, and Prefect stores and shows the parameters of a flow "
            "run. Nothing was started. Change that password, save the new URL in a Prefect Secret block, and give "
            "ledger='secret://NAME'."
        )


def _new_files(folder: Path, pattern: str, unchanged_seconds: float) -> list[Path]:
    """Return the files that have not changed for so long, the oldest first; none of those that were moved."""
    found: list[tuple[float, Path]] = []
    for path in folder.glob(pattern):
        if not {"done", "refused"}.isdisjoint(path.relative_to(folder).parts[:-1]):
            continue
        with suppress(FileNotFoundError):  # another run of this flow has just moved it
            changed = path.stat().st_mtime
            if path.is_file() and time.time() - changed >= unchanged_seconds:
                found.append((changed, path))
    return [path for _, path in sorted(found)]


def _batch_name(path: Path) -> str:
    """Return the name of a file's batch: the file's name and the first digits of the SHA-256 of its content.

    Braces would make a template of it, and batches and files have names of limited length.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    name = "".join(sign if sign.isprintable() and sign not in "{}" else "_" for sign in path.name)
    if len(name.encode()) > LONGEST_NAME:
        name = name.encode()[:LONGEST_NAME].decode(errors="ignore")
        digest += f"-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:6]}"
    return f"{name}-{digest}"


def _move(path: Path, subfolder: str) -> None:
    """Move a file to a subfolder of its folder, under a name that is free there."""
    target = path.parent / subfolder / path.name
    target.parent.mkdir(exist_ok=True)
    while target.exists():
        target = target.with_name(f"{target.stem}-again{target.suffix}")
    with suppress(FileNotFoundError):  # another run of this flow has moved it
        path.rename(target)
