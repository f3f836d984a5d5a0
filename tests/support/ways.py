"""Every way to start a run, and to wait for it."""

import uuid
from collections.abc import Awaitable, Callable
from tempfile import TemporaryDirectory

import prefect_crew as pc


async def by_run_crew(crew: pc.DeployedCrew, text: str) -> None:
    await pc.arun_crew(crew, {"text": text})


async def by_tasks(crew: pc.DeployedCrew, text: str) -> None:
    await pc.wait_for_crew(crew, await pc.kickoff_crew(crew, {"text": text}))


async def by_trigger(crew: pc.DeployedCrew, text: str) -> None:
    await (await crew.atrigger({"text": text})).await_for_completion()


async def by_pipeline(crew: pc.DeployedCrew, text: str) -> None:
    await pc.arun_pipeline([pc.CrewStep("only", crew, {"text": text})])


async def by_batch(crew: pc.DeployedCrew, text: str) -> None:
    with TemporaryDirectory() as folder:
        rows = [{"text": f"{text}{number}"} for number in range(2)]
        await pc.arun_batch(crew, rows, name=f"ways {uuid.uuid4().hex}", export=f"{folder}/out.jsonl")


WAYS: dict[str, Callable[[pc.DeployedCrew, str], Awaitable[None]]] = {
    "run_crew": by_run_crew,
    "tasks": by_tasks,
    "trigger": by_trigger,
    "pipeline": by_pipeline,
    "batch": by_batch,
}
