"""A batch in several processes: its shards, and the parent that watches them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Cancelling, Crashed

from prefect_crew._internal.interrupts import cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.batches.batch import BatchJob, OpenBatch
from prefect_crew.batches.cancel import watched
from prefect_crew.batches.database import ledger_place
from prefect_crew.batches.dataset import open_dataset
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import IN_FLIGHT, BatchOptions, options_from, plain_options
from prefect_crew.batches.outcomes import FAILED, UNCERTAIN, RowEnd
from prefect_crew.batches.ownership import WHOLE, BatchLock, binding_name, check_age
from prefect_crew.batches.progress import Standing, tell_batch
from prefect_crew.batches.rows import RowJob, RowPlan, shard_of
from prefect_crew.batches.runner import Engine, engine_of, feed, limited
from prefect_crew.batches.throttle import BatchSession, Pace
from prefect_crew.blocks import load_crew
from prefect_crew.client.models import CrewInput
from prefect_crew.exceptions import (
    BatchBusyError,
    BatchCancelledError,
    BatchChangedError,
    ConfigurationError,
    LedgerError,
    LedgerMissingError,
)
from prefect_crew.records.model import RecordPhase
from prefect_crew.runs.stop import cancellation_asked, end_as_cancelled, is_cancelled
from prefect_crew.states import CrewState

PAGE = 200
"""Flow runs that the server gives at a time."""
PARENT_LOOKS_EVERY = 2.0
"""Seconds between two looks at the shards."""
RUNNING_WITHIN = 60.0
"""Seconds within which a shard whose flow run is running must hold its lock: it has Prefect to import."""
LEFT_LOOKS = 10
"""Looks in a row at which nobody holds the lock of a running shard before it counts as dead: one that is done has given
its lock back, and Prefect takes a moment to end its flow run."""
BEGUN_WITHIN = 120.0
"""Seconds after which a shard that no worker has begun is done here, once no other shard runs."""
AWAY = (httpx.HTTPError, PrefectException)


@dataclass
class Shard:
    """A shard as its parent sees it.

    `locked`: it has been seen with its lock; `left`: at how many looks in a row without it since. `over`: its flow run
    is done with.
    """

    number: int
    flow_run_id: UUID
    name: str
    since: float
    running_since: float | None = None
    locked: bool = False
    left: int = 0
    over: bool = False
    told: bool = False


async def check_parent(job: BatchJob, *, shards: int, deployment: str) -> None:
    """Check that a batch can be split over runs of a deployment, before its name is bound to anything.

    Raises:
        ConfigurationError: It cannot, or there is no such deployment.
    """
    check_shards(job, shards)
    async with get_client() as client:
        try:
            await client.read_deployment_by_name(deployment)
        except (ObjectNotFound, ValueError):
            raise ConfigurationError(
                f"There is no deployment {deployment!r}. Deploy the flow batch_shard of flows/batch.py, as "
                "deployments/prefect.yaml does, and name it as flow/deployment: batch-shard/shards."
            ) from None


class Parent:
    """Watches the shards of one batch.

    Args:
        batch: The batch, opened to be shared.
        shards: How many there are.
        deployment: The name of a deployment of `batch_shard`, as `flow/deployment`.
    """

    def __init__(self, batch: OpenBatch, *, shards: int, deployment: str) -> None:
        self._batch = batch
        self._count = shards
        self._deployment = deployment
        self._tag = binding_name(batch.job.name)
        self._shards: list[Shard] = []
        self._dead: list[Shard] = []
        self._finishing: asyncio.Task[None] | None = None
        self._before: dict[str, int] = {}
        self._failed: dict[str, int] = {}

    async def run(self) -> None:
        """Start the shards, and return when all of their rows have ended or been left. The batch is then ours alone.

        Raises:
            ConfigurationError: There is less than one kickoff left for each shard. Nothing was started.
            BatchCancelledError: This flow run was cancelled, and its shards with it.
        """
        own = flow_run_id()
        generation = await self._batch.begin()
        calls = [shard_call(self._batch, number, self._count, generation) for number in range(self._count)]
        self._before = await self._batch.ledger.counts()
        self._failed = await self._to_be_retried()
        try:
            await self._begin(calls)
            await self._watch(own)
        except asyncio.CancelledError:
            if await self._asked(own):
                await self._cancel()
            raise
        finally:
            if self._finishing is not None:
                await cancel_and_wait(self._finishing)
        self._batch.stopped = await self._batch.ledger.halted()
        self._batch.options = await self._options_left()
        self._batch.standing = Standing(
            total=self._batch.standing.total,
            set_aside=self._batch.standing.set_aside,
            duplicates=self._batch.standing.duplicates,
            started=self._batch.standing.started,
        )
        await self._become_sole()

    async def _begin(self, calls: list[dict[str, Any]]) -> None:
        """Start the shards that do not run already, left by an earlier parent."""
        name, there = self._batch.job.name, await self._there()
        for number, call in enumerate(calls):
            run = there.get(number)
            if run is None:
                run = await self._start(number, call)
            self._shards.append(Shard(number, run.id, run.name, since=time.monotonic()))
        run_logger().info(
            "Batch %s runs in %d shards of deployment %s, %d of which were there already.",
            *(name, self._count, self._deployment, len(there)),
        )

    async def _there(self) -> dict[int, FlowRun]:
        runs = await open_shard_runs(self._tag)
        if any(run.parameters.get("shards") != self._count for run in runs):
            raise BatchBusyError(
                name=self._batch.job.name, what=f"Batch {self._batch.job.name!r}, split into another number of shards,"
            )
        return {int(run.parameters["shard"]): run for run in runs}

    async def _start(self, number: int, call: dict[str, Any]) -> FlowRun:
        name, own = self._batch.job.name, flow_run_id() or f"{time.time()}"
        # Awaited here, it is the async one, whatever Prefect's types say of it.
        return await cast("Any", run_deployment)(
            name=self._deployment,
            parameters={"batch": name, "shard": number, "shards": self._count, "call": call},
            flow_run_name=f"{name} shard {number} of {self._count}",
            timeout=0,
            tags=[self._tag],
            idempotency_key=f"{self._tag} {own} {time.time()} {number}",
        )

    async def _watch(self, own: str | None) -> None:
        while any(not shard.over for shard in self._shards) or self._dead or self._finishing is not None:
            await asyncio.sleep(PARENT_LOOKS_EVERY)
            await self._look()
            await self._count_rows()
            self._finish_dead()
            if await is_cancelled(own):
                await self._cancel()
                if own is not None:
                    await end_as_cancelled(own)
                raise BatchCancelledError(name=self._batch.job.name)

    # The shards.

    async def _look(self) -> None:
        """Look at the shards' flow runs, and, where those tell too little, at their locks."""
        ids = FlowRunFilter(id=FlowRunFilterId(any_=[shard.flow_run_id for shard in self._shards]))
        try:
            runs = await flow_runs(ids)
        except AWAY as error:
            run_logger().warning("The shards' flow runs cannot be looked at now: %s", error)
            return
        states = {run.id: run.state for run in runs}
        for shard in self._shards:
            if not shard.over:
                await self._look_at(shard, states.get(shard.flow_run_id))
        waiting = [shard for shard in self._shards if not shard.over and shard.running_since is None]
        if not any(shard.running_since for shard in self._shards if not shard.over):
            for shard in waiting:
                await self._late(shard)

    async def _look_at(self, shard: Shard, state: State | None) -> None:
        if state is None or _is_final(state):
            shard.over = True
            if state is None or not state.is_completed():
                told = "is gone" if state is None else f"ended as {state.name}"
                await self._died(shard, told)
        elif state.is_running():
            if shard.running_since is None:
                shard.running_since = time.monotonic()
            try:
                held = await self._batch.lock.is_held(shard_part(shard.number, self._count))
            except LedgerError as error:  # it says nothing about the shard, which is looked at again
                run_logger().warning("Whether %s is alive cannot be seen now: %s", shard.name, error)
                return
            if held:
                shard.locked, shard.left = True, 0
                return
            shard.left += 1
            slow = time.monotonic() - shard.running_since > RUNNING_WITHIN
            if (shard.left >= LEFT_LOOKS if shard.locked else slow) and await self._takes(shard):
                shard.over = True
                await self._died(shard, "says that it runs, and nobody holds its lock")
                await self._set_state(shard, Crashed(message="Its process has died. The parent finishes its rows."))

    async def _late(self, shard: Shard) -> None:
        """Do a shard here that no worker has begun, when no other runs."""
        waited = time.monotonic() - shard.since
        if waited > BEGUN_WITHIN / 2 and not shard.told:
            shard.told = True
            run_logger().warning(
                "No worker has begun %s for %.0f s. Is there one for its work pool?", shard.name, waited
            )
        if waited > BEGUN_WITHIN and self._finishing is None and not self._dead and await self._takes(shard):
            shard.over = True
            await self._died(shard, f"was begun by no worker for {waited:.0f} s")
            await self._set_state(shard, Cancelled(message="The parent does its rows."))

    async def _takes(self, shard: Shard) -> bool:
        return await self._batch.lock.take(shard_part(shard.number, self._count))

    async def _died(self, shard: Shard, told: str) -> None:
        run_logger().warning("%s %s: its rows are finished here.", shard.name, told)
        self._dead.append(shard)

    async def _set_state(self, shard: Shard, state: State) -> None:
        try:
            async with get_client() as client:
                await client.set_flow_run_state(shard.flow_run_id, state, force=True)
        except AWAY as error:
            run_logger().warning("The state of %s stays as it is: %s", shard.name, error)

    # Its rows.

    def _finish_dead(self) -> None:
        """Finish the rows of dead shards, one shard after another, while the others go on."""
        if self._finishing is not None and self._finishing.done():
            done, self._finishing = self._finishing, None
            done.result()
        if self._finishing is None and self._dead:
            self._finishing = asyncio.ensure_future(self._finish(self._dead.pop(0)))

    async def _finish(self, shard: Shard) -> None:
        options = self._batch.job.options
        if options.max_kickoffs is not None:
            return  # how many are left is known once all shards have ended: the batch is then gone on with here
        if not await self._takes(shard):
            run_logger().warning("%s still runs, whatever its state says; it is left alone.", shard.name)
            return

        async def on_end(end: RowEnd) -> None:
            del end  # its line is written at the end, from the ledger

        most = max(1, (options.max_in_flight or IN_FLIGHT) // self._count)
        session, ledger = self._batch.session, self._batch.ledger
        left = await self._options_left()
        engine = engine_of(session, ledger, left, on_end=on_end, most=most, bought=0)
        rows = rows_of_shard(self._batch.plan, shard.number, self._count)
        await feed(engine, rows, chunk_size=options.chunk_size, new=False)
        if engine.stopped is not None:
            await ledger.halt(engine.stopped)

    async def _to_be_retried(self) -> dict[str, int]:
        """Return the rows that `retry_failed` is about, by their key the number of their last attempt."""
        chosen = self._batch.job.options.retry_failed
        if not chosen:
            return {}
        found: dict[str, int] = {}
        async for key, record in self._batch.ledger.standing_attempts():
            # All of them is all but lost ones, which have no end.
            if record.phase is RecordPhase.ENDED if isinstance(chosen, bool) else key in chosen:
                found[key] = record.attempt
        return found

    async def _options_left(self) -> BatchOptions:
        """Return the options for what shards have left: `retry_failed` is once a call, whichever process does it."""
        options = self._batch.job.options
        if not self._failed:
            return options
        left = [
            key
            async for key, record in self._batch.ledger.standing_attempts()
            if self._failed.get(key) == record.attempt
        ]
        return dataclasses.replace(options, retry_failed=left)

    async def _count_rows(self) -> None:
        """Count the rows of all shards, show them, and stop all where the policy says so."""
        batch, standing = self._batch, self._batch.standing
        counts = await batch.ledger.counts()
        standing.completed = counts.get(str(CrewState.COMPLETED), 0)
        standing.failed = sum(counts.get(word, 0) for word in FAILED)
        standing.uncertain = counts.get(UNCERTAIN, 0)
        standing.in_flight = counts.get(str(RecordPhase.STARTED), 0)
        before = self._before
        failed = standing.failed - sum(before.get(word, 0) for word in FAILED)
        ended = failed + standing.completed - before.get(str(CrewState.COMPLETED), 0)
        standing.ended_here = max(ended, 0)
        standing.tick()
        tell_batch(batch.job.name, "running", standing)
        await batch.artifacts.progress(standing)
        await batch.begin_again(sum(counts.values()))
        if (reason := batch.job.options.stop_when(failed, ended)) and await batch.ledger.halted() is None:
            run_logger().warning("No shard kicks anything off any more: %s", reason)
            await batch.ledger.halt(reason)

    async def _become_sole(self) -> None:
        """Take the whole batch, now that no shard works on it."""
        lock = self._batch.lock
        await lock.give_back(WHOLE)
        if await lock.take(WHOLE):
            self._batch.ledger.sole = True
        elif not await lock.take(WHOLE, shared=True):
            raise BatchBusyError(name=self._batch.job.name)

    # Cancelling.

    async def _asked(self, own: str | None) -> bool:
        try:
            return await asyncio.wait_for(cancellation_asked(own), 5.0)
        except (*AWAY, TimeoutError):
            return False

    async def _cancel(self) -> None:
        """Cancel the shards' flow runs: each does with its runs what `on_cancel` says."""
        for shard in self._shards:
            if not shard.over:
                waiting = shard.running_since is None
                await self._set_state(shard, Cancelled() if waiting else Cancelling())


async def open_shard_runs(tag: str) -> list[FlowRun]:
    """Return the flow runs with a tag that have not ended."""
    over = FlowRunFilterState(type=FlowRunFilterStateType(not_any_=sorted(TERMINAL_STATES)))
    return await flow_runs(FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]), state=over))


async def flow_runs(chosen: FlowRunFilter) -> list[FlowRun]:
    """Return all flow runs that a filter chooses: the server gives 200 at a time."""
    found: dict[UUID, FlowRun] = {}
    async with get_client() as client:
        offset = 0
        while True:
            page = await client.read_flow_runs(
                flow_run_filter=chosen, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=offset
            )
            found |= {run.id: run for run in page}
            if len(page) < PAGE:
                return list(found.values())
            offset += PAGE


def _is_final(state: State | None) -> bool:
    return state is not None and state.is_final()


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
