"""One call of a batch: read the rows twice, keep the ledger, run the rows, write the output, report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from prefect_crew.api.errors import AuthenticationError, ConfigurationError, CrewConnectionError, CrewError, ServerError
from prefect_crew.api.models import CrewInput, CrewState
from prefect_crew.batches.artifacts import BatchArtifacts
from prefect_crew.batches.binding import Bound, bind, binding_name
from prefect_crew.batches.breaker import Breaker
from prefect_crew.batches.cancelling import watched
from prefect_crew.batches.database import open_url
from prefect_crew.batches.datasets import Dataset, shown_address
from prefect_crew.batches.ends import RowEnd
from prefect_crew.batches.engine import Engine, EngineOptions
from prefect_crew.batches.feed import feed
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.locks import BatchBusyError, BatchLock
from prefect_crew.batches.options import IN_FLIGHT, BatchOptions
from prefect_crew.batches.output import Output, line_of
from prefect_crew.batches.pacing import BatchSession, Pace
from prefect_crew.batches.places import LedgerPlace
from prefect_crew.batches.report import BatchReport
from prefect_crew.batches.retries import RetryRule
from prefect_crew.batches.row_waits import RowWaiter
from prefect_crew.batches.rows import BadRowsError, Checked, RowPlan
from prefect_crew.batches.standing import Failure, Standing
from prefect_crew.batches.watching import tell_batch
from prefect_crew.blocks import DeployedCrew
from prefect_crew.logs import run_logger
from prefect_crew.receiver.targets import webhooks_for
from prefect_crew.sessions import CrewSession

__all__ = ["BatchJob", "expected_inputs"]

INPUT_TRIES = 3


async def expected_inputs(session: CrewSession) -> list[CrewInput]:
    """Return what the crew names as its inputs; empty where it does not say.

    Raises:
        AuthenticationError: The token is refused.
        CrewConnectionError: The crew's server does not answer.
    """
    for left in reversed(range(INPUT_TRIES)):
        try:
            return await session.asked(lambda client: client.inputs())
        except AuthenticationError:
            raise
        except (CrewConnectionError, ServerError) as error:
            # What the inputs are decides what a row is, so a moment's trouble must not decide it.
            if left:
                await asyncio.sleep(1.0)
                continue
            if isinstance(error, CrewConnectionError):
                raise
            _not_known(error)
        except CrewError as error:
            _not_known(error)
        return []
    return []


def _not_known(error: CrewError) -> None:
    run_logger().warning("The crew's inputs are not known, so rows are not checked for them: %s", error)


class BatchJob:
    """A batch under way in this process."""

    def __init__(
        self,
        crew: DeployedCrew,
        dataset: Dataset,
        options: BatchOptions,
        *,
        name: str,
        output: str,
        place: LedgerPlace,
        call: Mapping[str, Any] | None = None,
    ) -> None:
        self.crew = crew
        self.dataset = dataset
        self.options = options
        self.name = name
        self.output = output
        self.place = place
        self.call = call

    @property
    def output_name(self) -> str:
        """The output for people."""
        return shown_address(self.output)

    @property
    def ledger_exists(self) -> bool:
        """Whether a ledger that is a file is there."""
        return self.place.local and Path(str(open_url(self.place.ledger).database)).exists()

    async def run(self) -> BatchReport:
        """Run it to its end and report.

        Raises:
            CrewError: It could not be begun, or the ledger or the output failed on the way.
        """
        options = self.options
        webhooks_for(self.crew, self.name)  # settings that make no sense are said before anything is bought
        pace = Pace(kickoffs_per_second=options.kickoffs_per_second, requests=options.requests_at_once)
        async with AsyncExitStack() as stack:
            session = BatchSession(self.crew, pace)
            await stack.enter_async_context(session)
            tell_batch(self.name, "checking")
            plan = self.plan(await expected_inputs(session))
            checked = await asyncio.to_thread(plan.check)
            if checked.bad and options.on_bad_row == "refuse":
                raise BadRowsError(checked.bad, checked.bad_count, source=self.dataset.name)
            ledger = await stack.enter_async_context(Ledger(self.place.ledger, self.name))
            lock = await stack.enter_async_context(BatchLock(ledger.database, self.name))
            if not await lock.take():
                raise BatchBusyError(name=self.name)
            ledger.sole = True
            return await self._run(stack, session, ledger, lock, plan, checked, pace)

    async def _run(
        self,
        stack: AsyncExitStack,
        session: BatchSession,
        ledger: Ledger,
        lock: BatchLock,
        plan: RowPlan,
        checked: Checked,
        pace: Pace,
    ) -> BatchReport:
        options = self.options
        beside = ledger.database.path or Path.cwd() / binding_name(self.name)
        output = Output(self.output, beside=beside, output_type=options.output_type)
        bound = await self.bind(ledger, checked)
        standing = Standing(total=checked.total, set_aside=checked.bad_count, duplicates=checked.duplicates)
        artifacts = BatchArtifacts(self.name, self.crew.label, show=self.crew.show)
        bought = 0 if bound.before is None else await ledger.bought()
        engine: Engine | None = None
        if self._is_done(bound, output):
            await self._recall(ledger, standing)
        else:
            most = await self._limited(stack)
            new = not await ledger.known()
            engine = self.engine(session, ledger, standing, output, pace, most=most, bought=bought)
            output.open(self._stays(bound), in_order=options.order == "input", fresh=new)
            try:
                rows = feed(engine, plan.jobs(), chunk_size=self._chunk, new=new)
                await watched(
                    rows,
                    engine,
                    name=self.name,
                    on_cancel=options.on_cancel,
                    tick=lambda: self._tick(engine, standing, output, artifacts, lock),
                )
            except BaseException:
                standing.in_flight = engine.in_flight
                await artifacts.end(standing, self._report(standing, output, engine, bought))
                raise
            finally:
                output.close()
            standing.in_flight = 0
            tell_batch(self.name, "finishing", standing)
            await asyncio.to_thread(output.finish)
            await ledger.note_standing({"done": standing.over, "lines": standing.total, **self._written})
        report = self._report(standing, output, engine, bought)
        tell_batch(self.name, "done", standing)
        await artifacts.end(standing, report)
        run_logger().info("%s", report)
        return report

    def plan(self, expected: Sequence[CrewInput]) -> RowPlan:
        """Return how the rows become runs.

        Raises:
            ConfigurationError: A key that is a secret input, or a template that is none.
        """
        if isinstance(self.options.key, str) and self.options.key in self.crew.secret_inputs:
            raise ConfigurationError(
                f"The key column {self.options.key!r} is a secret input: keys stand in logs, artifacts and the ledger. "
                "Take another column, or leave key out."
            )
        return RowPlan(
            self.dataset,
            inputs=self.options.inputs,
            key=self.options.key,
            expected=expected,
            as_json=self.crew.inputs_as_json,
            deduplicate=self.options.deduplicate,
        )

    async def bind(self, ledger: Ledger, checked: Checked) -> Bound:
        """Bind the batch's name to its ledger."""
        return await bind(
            ledger,
            crew_url=self.crew.url,
            fingerprint=checked.fingerprint,
            total=checked.total,
            go_on=self.options.on_change == "continue",
            place=self.place.told,
            call=self.call,
        )

    def engine(
        self,
        session: BatchSession,
        ledger: Ledger,
        standing: Standing,
        output: Output | None,
        pace: Pace,
        *,
        most: int,
        bought: int,
    ) -> Engine:
        """Return what runs the rows; each end goes to `standing` and to `output`, if there is one."""
        options = self.options
        context = FlowRunContext.get()
        flow_run = None if context is None else context.flow_run

        async def on_end(end: RowEnd) -> None:
            standing.take(end)
            if output is not None:
                output.put(end.job.number, end.job.key, line_of(end, self.crew.secret_inputs))

        return Engine(
            session,
            ledger,
            RowWaiter(session, ledger, options.wait or self.crew.wait, learn=options.wait is None),
            EngineOptions(
                max_in_flight=most,
                rule=RetryRule(options.retries, options.retry_failed),
                max_kickoffs=options.max_kickoffs,
                stop_when=options.stop_when,
                output_type=options.output_type,
                meta={**(options.meta or {}), "batch": self.name},
                webhooks=options.webhooks,
            ),
            pace=pace,
            breaker=Breaker(options.breaker, options.breaker_pause),
            on_end=on_end,
            flow_run=(None, 0) if flow_run is None else (str(flow_run.id), flow_run.run_count),
            bought=bought,
        )

    @property
    def _chunk(self) -> int:
        return 1 if self.options.task_per_row else self.options.chunk_size

    def _stays(self, bound: Bound) -> Callable[[str], bool]:
        """Return what says whether a line of an earlier call stays: that of a row neither run again nor judged anew."""
        before = None if bound.before is None else bound.before.standing
        noted: Mapping[str, Any] = before or {}
        same = all(noted.get(name, value) == value for name, value in self._written.items() if name != "order")
        states = {str(CrewState.COMPLETED)} if same else set[str]()
        if same and not self.options.retry_failed and not self.options.retries:
            states.add(str(CrewState.FAILED))
        return states.__contains__

    async def _tick(
        self, engine: Engine, standing: Standing, output: Output, artifacts: BatchArtifacts, lock: BatchLock
    ) -> None:
        """Show how the batch stands. About once a second."""
        standing.in_flight, standing.kickoffs = engine.in_flight, engine.kickoffs
        standing.tick()
        tell_batch(self.name, "running", standing)
        output.flush()
        await artifacts.progress(standing)
        if not await lock.still_held():
            engine.stop("its lock was lost, and another process has taken the batch over.", shut=True)

    # A batch that is done.

    @property
    def _written(self) -> dict[str, Any]:
        """What the lines depend on besides the rows."""
        kind = self.options.output_type
        return {
            "output": self.output,
            "order": self.options.order,
            "typed": None if kind is None else f"{kind.__module__}.{kind.__qualname__}",
            "masked": sorted(self.crew.secret_inputs),
        }

    def _is_done(self, bound: Bound, output: Output) -> bool:
        """Return whether there is nothing left to do, not even a line."""
        before = bound.before
        if before is None or before.standing is None or self.options.retry_failed or self.options.retries:
            return False
        if before.fingerprint != bound.entry.fingerprint or before.total != bound.entry.total:
            return False
        noted = {"done": True, "lines": before.total, **self._written}
        return dict(before.standing) == noted and output.count() == before.total

    async def _recall(self, ledger: Ledger, standing: Standing) -> None:
        """Take the standing of a batch that is done from its ledger, without a look at its rows."""
        counts = await ledger.counts()
        standing.completed = counts.get(str(CrewState.COMPLETED), 0)
        standing.failed = standing.total - standing.completed
        standing.add_durations(await ledger.durations())
        standing.add_usage(await ledger.usage())
        if standing.failed:
            async for key, record in ledger.standing_attempts():
                standing.failures.append(
                    Failure(key, record.kickoff_id, str(record.state), record.error or str(record.state), None)
                )
                if len(standing.failures) == 100:
                    break

    async def _limited(self, stack: AsyncExitStack) -> int:
        """Hold slots of the crew's shared limit for as many rows as are in flight at once; return how many that are."""
        chosen, limit = self.options.max_in_flight, self.crew.concurrency_limit
        if limit is None:
            return chosen or IN_FLIGHT
        from prefect.concurrency.asyncio import concurrency

        async with get_client() as client:
            try:
                found = await client.read_global_concurrency_limit_by_name(limit)
            except ObjectNotFound:
                raise ConfigurationError(
                    f"Crew {self.crew.label} names the concurrency limit {limit!r}, which does not exist: "
                    f"prefect gcl create {limit} --limit N."
                ) from None
        most = chosen or min(IN_FLIGHT, found.limit)
        if most > found.limit:
            raise ConfigurationError(
                f"max_in_flight is {most}, and crew {self.crew.label} allows {found.limit} runs in flight in all "
                f"(concurrency limit {limit!r}). Give max_in_flight={found.limit} or less."
            )
        run_logger().info("Waiting for %d slots of the concurrency limit %s.", most, limit)
        await stack.enter_async_context(concurrency(limit, occupy=most, strict=True))
        return most

    def _report(self, standing: Standing, output: Output, engine: Engine | None, bought: int) -> BatchReport:
        total = standing.total + standing.set_aside
        kickoffs = 0 if engine is None else engine.kickoffs
        return BatchReport(
            name=self.name,
            total=total,
            completed=standing.completed,
            failed=standing.failed,
            uncertain=standing.uncertain,
            skipped=total - standing.done,
            seconds=standing.seconds,
            output=output.name,
            stopped=None if engine is None else engine.stopped,
            kickoffs=kickoffs,
            set_aside=standing.set_aside,
            duplicates=standing.duplicates,
            uncertain_keys=tuple(standing.uncertain_keys),
            errors=dict(standing.errors),
            usage=standing.usage,
            cost=None if self.crew.price is None else self.crew.price * (bought + kickoffs),
        )
