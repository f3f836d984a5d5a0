"""Flows of a user that a crew worker imports."""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

from prefect import flow, get_run_logger, pause_flow_run, task
from prefect.runtime import flow_run

from prefect_crew import CrewError, arun_crew, kickoff_crew, run_crew


@flow
async def greet(name: str) -> str:
    get_run_logger().info("greeting %s", name)
    await asyncio.sleep(0.2)
    return f"Hello {name}"


@flow
def synchronous() -> None:
    """Refused: it would hold up the event loop."""


@flow
async def yields() -> AsyncGenerator[int]:
    """Refused: a flow run of it would have no end of its own."""
    yield 1


@flow
async def exits() -> None:
    sys.exit(3)


@task
async def exit_in_task() -> None:
    sys.exit(4)


@flow
async def exits_in_tasks() -> None:
    await asyncio.gather(exit_in_task(), asyncio.sleep(5))


@flow
async def blocks(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


@flow(retries=1, retry_delay_seconds=1)
async def fails_once() -> int:
    if flow_run.run_count == 1:
        raise ValueError("the first attempt fails")
    return flow_run.run_count


fails_once_and_waits = fails_once.with_options(name="fails-once-and-waits", retry_delay_seconds=30)


@flow(timeout_seconds=1)
async def too_slow() -> None:
    await asyncio.sleep(60)


@flow
async def sleeps(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "slept"


@flow
async def asks() -> str:
    """Ask a person in Prefect's own form."""
    paused: Any = pause_flow_run(wait_for_input=str, timeout=600)  # awaitable in an async flow
    return await paused


@flow
async def starts_and_sleeps(seconds: float) -> None:
    """Start a crew, and do something else before the wait for it."""
    await kickoff_crew("on-command", {"topic": "tea"})
    await asyncio.sleep(seconds)


async def clean_up(flow: Any, flow_run: Any, state: Any) -> None:
    await arun_crew("quick", {"topic": "cleaning"})


@flow(on_cancellation=[clean_up])
async def cleans_up() -> None:
    await arun_crew("on-command", {"topic": "the city"})


@flow
async def spawns(how: str) -> None:
    """Start three crews one after the other, whatever ends the wait for each, in a task or a thread of their own."""
    log, cities = get_run_logger(), [{"topic": f"city {number}"} for number in range(3)]
    log.info("three crews")

    async def in_a_task() -> None:
        for city in cities:
            try:
                await arun_crew("on-command", city)
            except CrewError as error:
                log.info("%s", type(error).__name__)

    def in_a_thread() -> None:
        for city in cities:
            try:
                run_crew("on-command", city)
            except CrewError as error:
                log.info("%s", type(error).__name__)

    async def start() -> None:
        # None of them ends with the coroutine that waits for it.
        match how:
            case "task":
                await asyncio.wait([asyncio.create_task(in_a_task())])
            case "thread":
                await asyncio.to_thread(in_a_thread)
            case "task without a wait":
                task(in_a_thread).submit()
            case _:
                await asyncio.to_thread(task(in_a_thread).submit().result)

    # The end of a subflow would wait for its submitted tasks, and block the event loop.
    await (flow(start) if how in ("task", "thread") else start)()


spawns_in_time = spawns.with_options(name="spawns-in-time", timeout_seconds=5)


@task
def takes_its_time(seconds: float) -> None:
    time.sleep(seconds)
    get_run_logger().info("the task of attempt 1 ends")


@flow(retries=1)
async def retries_beside_a_task(seconds: float) -> None:
    """Fail once, and leave a submitted task."""
    get_run_logger().info("attempt %d begins", flow_run.run_count)
    if flow_run.run_count == 1:
        takes_its_time.submit(seconds)
        raise ValueError("the first attempt fails")


@flow(persist_result=True)
async def persists() -> str:
    return "kept"


@flow
async def swallows(times: int) -> None:
    """End with the cancellation after so many that are swallowed."""
    while True:
        try:
            await asyncio.sleep(120)
        except asyncio.CancelledError:
            get_run_logger().warning("swallowed")
            times -= 1
            if times < 0:
                raise


@task(persist_result=True)
async def step(name: str) -> str:
    get_run_logger().info("step %s begins", name)
    return name


@flow(retries=1)
async def four_steps() -> list[str]:
    """Run a task, two crews and a task, in the second attempt: the first fails."""
    if flow_run.run_count == 1:
        raise ValueError("the first attempt fails")
    one = await step("one")
    two = await arun_crew("quick", {"topic": "tea"})
    three = await arun_crew("on-command", {"topic": "tea"})
    return [one, two.output, three.output, await step("four")]
