"""Prefect's flow engine for many flow runs in one process, as the crew worker needs it.

Private API of Prefect, for these reasons. To ask for upstream: an engine that takes "why was I cancelled" as an
argument, and that leaves signals, heartbeats and the watch for suspensions to whoever runs many of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any, Literal, Protocol
from uuid import UUID

import httpx
import prefect.flow_engine
import prefect.results
from anyio import CancelScope
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import AsyncClientContext
from prefect.flow_engine import AsyncFlowRunEngine
from prefect.flows import Flow
from prefect.logging import get_run_logger
from prefect.states import Cancelling

STORAGE_KNOWN_FOR = 60.0
"""Seconds for which the server's default result storage is taken as it was."""
RENEW_AGAIN = 10.0
"""Seconds between two tries where the Prefect server is away."""
RENEW_AFTER = 0.75
"""The share of a lease's duration after which it is renewed, as in Prefect's own."""
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
    - `amaintain_concurrency_lease` starts a thread with a client a flow run of a deployment with a limit, and crashes
      the flow run once a lease cannot be renewed: so where the server is away, and where the flow run is paused, which
      gives its slot back.
    """
    engine, results = prefect.flow_engine, prefect.results
    replaced: dict[tuple[Any, str], Any] = {
        (engine, "capture_sigterm"): _nothing,
        (engine, "_send_heartbeats"): _nothing,
        (engine, "observe_flow_run_suspension"): _nothing,
        (engine, "amaintain_concurrency_lease"): _maintained_lease,
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


@asynccontextmanager
async def _maintained_lease(lease_id: UUID, lease_duration: float, **_options: Any) -> AsyncGenerator[None]:
    """Renew a flow run's slot of its deployment's limit. Without the slot it goes on: its crew runs anyway."""
    renewing = asyncio.create_task(_renew(lease_id, lease_duration), name=f"lease {lease_id}")
    try:
        yield
    finally:
        renewing.cancel()


async def _renew(lease_id: UUID, duration: float) -> None:
    async with AsyncClientContext.get_or_create() as shared:
        pause = duration * RENEW_AFTER
        while True:
            await asyncio.sleep(pause)
            try:
                await shared.client.renew_concurrency_lease(lease_id=lease_id, lease_duration=duration)
                pause = duration * RENEW_AFTER
            except httpx.HTTPError as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.is_client_error:
                    get_run_logger().info("The flow run holds its slot of the deployment's limit no more: %s", error)
                    return
                pause = RENEW_AGAIN


class _Engine(AsyncFlowRunEngine[Any, Any]):
    owner: Owner
    flow_run: FlowRun  # pyright: ignore[reportIncompatibleVariableOverride] - the worker always gives one

    async def set_state(self, state: State[Any], force: bool = False) -> State[Any]:
        if self.owner.ending is None:
            await self.owner.confirm()
        if self.owner.ending == "lost" or (self.owner.ending == "handed over" and not state.is_completed()):
            raise asyncio.CancelledError  # whatever the flow has made of the first one
        return await super().set_state(state, force)

    async def handle_crash(self, exc: BaseException) -> None:
        if self.owner.ending is None:
            await super().handle_crash(exc)
            return
        # What the server is to hear of it, the worker says.
        self._raised = exc  # type: ignore[assignment]
        if self.owner.ending == "cancelled":
            self.flow_run.state = Cancelling(message=self.owner.why)
            # Whoever ended the coroutine waits for it, and cancels no second time: but a task group around it may.
            with CancelScope(shield=True):
                await self.call_hooks(self.flow_run.state)


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
