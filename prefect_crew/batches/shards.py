"""Batches beyond one machine: shards are flow runs of a deployment, and a parent watches them.

The rows are split by their keys; every shard reads the whole data set and keeps its own rows. All share one ledger in
PostgreSQL, where a lock tells which shards are alive: one whose flow run says Running while nobody holds its lock has
died with its machine, and the parent finishes what it left. There is no queue but Prefect's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from prefect import flow

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.api.models import CrewInput
from prefect_crew.batches.binding import BatchChangedError, LedgerMissingError, check_age
from prefect_crew.batches.calls import options_from, plain_options
from prefect_crew.batches.cancelling import watched
from prefect_crew.batches.datasets import open_dataset
from prefect_crew.batches.ends import RowEnd
from prefect_crew.batches.engine import Engine
from prefect_crew.batches.engines import engine_of, limited
from prefect_crew.batches.feed import feed
from prefect_crew.batches.job import BatchJob
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.locks import WHOLE, BatchBusyError, BatchLock
from prefect_crew.batches.opened import OpenBatch
from prefect_crew.batches.options import IN_FLIGHT, BatchOptions
from prefect_crew.batches.pacing import BatchSession, Pace
from prefect_crew.batches.places import ledger_place
from prefect_crew.batches.rows import RowJob, RowPlan, shard_of
from prefect_crew.batches.standing import Standing
from prefect_crew.blocks import load_crew
from prefect_crew.logs import run_logger

__all__ = ["batch_shard", "check_shards", "rows_of_shard", "shard_call", "shard_options", "shard_part"]

LOOK_EVERY = 3.0
"""Seconds between two looks of a shard at whether the batch is to stop."""


def shard_part(shard: int, shards: int) -> str:
    """Return the part of the batch's lock that a shard holds; shards count from 0."""
    return f"shard {shard} of {shards}"


def rows_of_shard(plan: RowPlan, shard: int, shards: int) -> Iterator[RowJob]:
    """Yield the rows of one shard."""
    return (job for job in plan.jobs() if shard_of(job.key, shards) == shard)


def shard_options(options: BatchOptions, shard: int, shards: int, *, bought: int) -> dict[str, Any]:
    """Return one shard's share of a batch's options, as plain values: what holds for the batch is split evenly.

    `bought` are the kickoffs of earlier calls.

    Raises:
        ConfigurationError: An option is no plain value, or there is less than one for each shard.
    """
    plain = plain_options(options, without=("on_change", "order"))
    left = None if options.max_kickoffs is None else options.max_kickoffs - bought
    for name, whole in (("max_in_flight", options.max_in_flight or IN_FLIGHT), ("max_kickoffs", left)):
        if whole is not None:
            plain[name] = whole // shards + (shard < whole % shards)
            if plain[name] < 1:
                raise ConfigurationError(f"{name} is {whole}, less than one for each of {shards} shards.")
    if options.kickoffs_per_second is not None:
        plain["kickoffs_per_second"] = options.kickoffs_per_second / shards
    if options.on_failure != "stop":
        plain["on_failure"] = "continue"  # the parent counts the failures of all shards
    return plain


def check_shards(job: BatchJob, shards: int) -> None:
    """Check that a batch can be worked on by other machines, before its name is bound to anything.

    Raises:
        ConfigurationError: Something of it is not to be had on another machine.
    """
    why_not = job.call.get("why_not")
    if why_not:
        raise ConfigurationError(f"Batch {job.name!r} cannot be sharded: {why_not}.")
    if job.place.local:
        raise ConfigurationError(
            "Shards need a ledger in PostgreSQL, which all machines can reach: ledger='postgresql://…'."
        )
    if not job.place.open_to_all:
        raise ConfigurationError(
            "The ledger's URL holds a password, and a shard's parameters are stored as they are. Store it as a Prefect "
            "Secret block, Secret(value='postgresql://…').save('batch-ledger'), and give ledger='secret://batch-ledger'."
        )
    shard_options(job.options, shards - 1, shards, bought=0)


def shard_call(batch: OpenBatch, shard: int, shards: int, generation: int) -> dict[str, Any]:
    """Return what a shard on another machine is given. It holds no secret.

    `generation` is that of the batch: a ledger that has not reached it is an older copy.

    Raises:
        ConfigurationError: There is less than one kickoff left for each shard.
    """
    job = batch.job
    return {
        "crew": job.call["crew"],
        "dataset": job.call["dataset"],
        "format": job.call["format"],
        "encoding": job.call["encoding"],
        "ledger": job.place.told,
        "ledger_id": batch.bound.entry.ledger_id,
        "generation": generation,
        "fingerprint": batch.checked.fingerprint,
        "expected": [item.model_dump(mode="json") for item in batch.expected],
        "options": shard_options(job.options, shard, shards, bought=batch.bought),
    }


@flow(name="batch-shard", flow_run_name="{batch} shard {shard} of {shards}")
async def batch_shard(
    batch: str,
    shard: int,
    shards: int,
    call: dict[str, Any],
) -> dict[str, Any]:
    """Run one shard of a batch. `run_batch(…, shards=N, deployment=…)` starts it; deploy this flow as it is.

    Args:
        batch: The batch's name.
        shard: Which shard this is, from 0.
        shards: How many there are.
        call: What its parent gives it.

    Returns:
        How many of its rows completed, failed and are uncertain, and why it stopped buying, if it did.
    """
    options = options_from(call["options"])
    place = await ledger_place(call["ledger"], "")
    job = BatchJob(
        await load_crew(call["crew"]),
        open_dataset(call["dataset"], format=call["format"], encoding=call["encoding"]),
        options,
        name=batch,
        output="",
        place=place,
        call=call,
    )
    async with Ledger(place.ledger, batch) as ledger, BatchLock(ledger.database, batch) as lock:
        # First of all: until it holds this, its parent takes it for dead.
        if not await lock.take(WHOLE, shared=True) or not await lock.take(shard_part(shard, shards)):
            raise BatchBusyError(name=batch, what=f"Shard {shard} of {shards} of batch {batch!r}")
        await _check_ledger(ledger, call)
        standing, engine = await _run_shard(job, ledger, lock, shard, shards)
        if engine.stopped is not None and not engine.exhausted:
            await ledger.halt(engine.stopped)
    run_logger().info(
        "Shard %d of %d of batch %s: %d rows completed, %d failed, %d uncertain.",
        *(shard, shards, batch, standing.completed, standing.failed, standing.uncertain),
    )
    return {
        "completed": standing.completed,
        "failed": standing.failed,
        "uncertain": standing.uncertain,
        "stopped": engine.stopped,
    }


async def _check_ledger(ledger: Ledger, call: Mapping[str, Any]) -> None:
    entry = await ledger.entry()
    if entry is None or entry.ledger_id != call["ledger_id"]:
        raise LedgerMissingError(name=ledger.batch, ledger="that of the parent")
    check_age(entry, call.get("generation"), ledger=ledger.address)


async def _run_shard(
    job: BatchJob, ledger: Ledger, lock: BatchLock, shard: int, shards: int
) -> tuple[Standing, Engine]:
    options = job.options
    plan = job.plan([CrewInput.model_validate(item) for item in job.call["expected"]])
    checked = await asyncio.to_thread(plan.check)
    if checked.fingerprint != job.call["fingerprint"]:
        raise BatchChangedError(name=job.name, difference="the data set that its parent has read is not the one here")
    standing = Standing(total=checked.total)
    pace = Pace(kickoffs_per_second=options.kickoffs_per_second, kickoffs_at_once=options.kickoffs_at_once)

    async def on_end(end: RowEnd) -> None:
        standing.take(end)

    async with AsyncExitStack() as stack:
        session = BatchSession(job.crew, pace)
        await stack.enter_async_context(session)
        most = await limited(session, options, stack)
        engine = engine_of(session, ledger, options, on_end=on_end, most=most, bought=0)
        looked = asyncio.get_running_loop().time()

        async def tick() -> None:
            nonlocal looked
            if not await lock.still_held():
                engine.stop("its lock was lost, and another process has taken the shard over.", shut=True)
            now = asyncio.get_running_loop().time()
            if now - looked >= LOOK_EVERY:
                looked = now
                if halt := await ledger.halted():
                    engine.stop(halt)

        rows = feed(
            engine,
            rows_of_shard(plan, shard, shards),
            chunk_size=1 if options.task_per_row else options.chunk_size,
            new=not await ledger.known(),
        )
        await watched(rows, engine, name=job.name, on_cancel=options.on_cancel, tick=tick)
    return standing, engine
