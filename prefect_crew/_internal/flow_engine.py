"""Prefect's flow engine for many flow runs in one process, as the crew worker needs it.

Private API of Prefect, for these reasons. To ask for upstream: an engine that takes "why was I cancelled" as an
argument, and that leaves signals, heartbeats and the watch for suspensions to whoever runs many of them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol

import prefect.flow_engine
import prefect.results
from anyio import CancelScope
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import AsyncFlowRunEngine
from prefect.flows import Flow
from prefect.states import AwaitingRetry, Cancelled, Cancelling
from prefect.utilities.engine import propose_state

__all__ = ["HANDED_OVER", "Ending", "Owner", "hand_over", "many_flow_runs", "run_flow_here"]

HANDED_OVER = "handed over"
"""What stands in `infrastructure_pid` of a flow run that went back to its pool: no worker's name."""
STORAGE_KNOWN_FOR = 60.0
"""Seconds for which the server's default result storage is taken as it was."""
Ending = Literal["cancelled", "handed over", "lost"]
"""Why a worker ends a flow run's coroutine: it is being cancelled, the worker shuts down, or another worker has it."""


class Owner(Protocol):
    """What the engine asks the worker about one flow run."""

    ending: Ending | None
    why: str

    async def confirm(self) -> None:
        """Return if the flow run is still this worker's.

        Raises:
            asyncio.CancelledError: It is not; `ending` is "lost".
        """
        ...


@contextmanager
def many_flow_runs() -> Generator[None]:
    """Have Prefect's engine run flow runs without what it starts and asks for each, while this is open.

    It also holds for subflows, whose engine is Prefect's own.
    - `capture_sigterm` would have a SIGTERM raise in the middle of the event loop; the worker has a handler of its own.
    - `_send_heartbeats` starts a thread a flow run. The worker's heartbeat stands for all its flow runs.
    - `observe_flow_run_suspension` (from 3.9) starts a thread with an event loop and a subscription a flow run, and
      blocks until it is ready and when it ends.
    - The server is asked for its default result storage three times a flow run (from 3.9), twice of that by a call that
      blocks the event loop. Once a minute is enough.
    """
    engine, results = prefect.flow_engine, prefect.results
    replaced: dict[tuple[Any, str], Any] = {
        (engine, "capture_sigterm"): _nothing,
        (engine, "_send_heartbeats"): _nothing,
        (engine, "observe_flow_run_suspension"): _nothing,
    }
    ask, ask_async = "_read_server_default_result_storage_block_id", "_aread_server_default_result_storage_block_id"
    if hasattr(results, ask):
        known = _Known()
        replaced[results, ask] = known.ask_by(getattr(results, ask))
        replaced[results, ask_async] = known.ask_async_by(getattr(results, ask_async))
    before = {place: getattr(*place) for place in replaced if hasattr(*place)}
    for module, name in before:
        setattr(module, name, replaced[module, name])
    try:
        yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


def _nothing(*_args: Any, **_options: Any) -> nullcontext[None]:
    return nullcontext()


class _Known:
    """What the server has said lately about its default result storage."""

    def __init__(self) -> None:
        self._value: Any = None
        self._at = float("-inf")

    def ask_by(self, ask: Callable[[], Any]) -> Callable[[], Any]:
        def known() -> Any:
            if time.monotonic() - self._at > STORAGE_KNOWN_FOR:
                self._value, self._at = ask(), time.monotonic()
            return self._value

        return known

    def ask_async_by(self, ask: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        async def known() -> Any:
            if time.monotonic() - self._at > STORAGE_KNOWN_FOR:
                self._value, self._at = await ask(), time.monotonic()
            return self._value

        return known


class _Engine(AsyncFlowRunEngine[Any, Any]):
    owner: Owner
    flow_run: FlowRun  # pyright: ignore[reportIncompatibleVariableOverride] - the worker always gives one

    async def set_state(self, state: State[Any], force: bool = False) -> State[Any]:
        if self.owner.ending != "lost":
            await self.owner.confirm()
        if self.owner.ending == "lost":
            return self.state
        if self.owner.ending == "handed over" and not state.is_completed():
            return await self._hand_over()  # whatever the flow has made of its cancellation
        return await super().set_state(state, force)

    async def handle_crash(self, exc: BaseException) -> None:
        if self.owner.ending is None:
            await super().handle_crash(exc)
            return
        self._raised = exc  # type: ignore[assignment]
        # Whoever ended the coroutine waits for it, and cancels no second time: but a task group around it may.
        with CancelScope(shield=True):
            if self.owner.ending == "cancelled":
                await self._cancel()
            elif self.owner.ending == "handed over":
                await self._hand_over()

    async def _cancel(self) -> None:
        self.flow_run.state = Cancelling(message=self.owner.why)
        await self.call_hooks(self.flow_run.state)
        # Forced, as in Prefect's own: no rule may keep a run that has ended in Cancelling.
        await super().set_state(Cancelled(message=self.owner.why), force=True)

    async def _hand_over(self) -> State[Any]:
        if not self.flow_run.state or not self.flow_run.state.is_scheduled():
            self.flow_run.state = await hand_over(self.client, self.flow_run, self.owner.why)
            self.short_circuit = True
        return self.flow_run.state


async def hand_over(client: PrefectClient, flow_run: FlowRun, why: str) -> State[Any]:
    """Give a flow run back to its pool, which hands it out again; return its new state.

    A flow run that waits for a retry "in process" is handed out by no pool: so its policy is changed first. Being
    handed over is no attempt that failed, but the server counts it as one: so there is one retry more.
    """
    policy = flow_run.empirical_policy.model_copy(update={"retry_type": "reschedule"})
    if policy.retries:
        policy.retries += 1
    await client.update_flow_run(flow_run.id, empirical_policy=policy, infrastructure_pid=HANDED_OVER)
    return await propose_state(client, AwaitingRetry(message=why), flow_run_id=flow_run.id)


async def run_flow_here(
    flow: Flow[Any, Any], flow_run: FlowRun, parameters: dict[str, Any], owner: Owner
) -> State[Any]:
    """Run a flow run's flow as `prefect.flow_engine.run_flow_async` does, and return its last state.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API could not be asked before the flow began.
        BaseException: What ended the flow besides an Exception, once its state is written.
    """
    engine = _Engine(flow=flow, flow_run=flow_run, parameters=parameters)
    engine.owner = owner
    async with engine.start():
        while engine.is_running():
            async with engine.run_context():
                await engine.call_flow_fn()
    return engine.state
