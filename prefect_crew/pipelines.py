"""Pipelines of crews: steps that feed each other, side by side where nothing stands between them.

Each step is a run of its own under the pipeline's key and its name, so that a second call with the key, or a retry of
the flow run, finds what was bought and starts with what failed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from prefect import flow
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import Pause
from pydantic import Field

from prefect_crew.api.errors import ConfigurationError, CrewError, NotFoundError, PipelineFailedError
from prefect_crew.api.inputs import encode_inputs, inputs_digest
from prefect_crew.api.models import CrewInput, CrewResult
from prefect_crew.blocks import DeployedCrew
from prefect_crew.dual import refuse_running_loop
from prefect_crew.logs import run_logger
from prefect_crew.pipeline_artifact import PipelineArtifact, StepTimes
from prefect_crew.pipeline_graph import CrewStep, PipelineContext, PipelineGraph
from prefect_crew.redaction import MASK
from prefect_crew.run_keys import identify
from prefect_crew.runs import arun_crew
from prefect_crew.sessions import CrewSession
from prefect_crew.suspension import checked_wait, standstill_here
from prefect_crew.tasks import loaded
from prefect_crew.waiting import WaitPolicy

__all__ = [
    "CrewStep",
    "PipelineContext",
    "PipelinePlan",
    "PipelineResult",
    "aplan_pipeline",
    "arun_pipeline",
    "plan_pipeline",
    "run_pipeline",
]


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline gave: `results["research"]` is that step's CrewResult. `seconds` is the wall time."""

    results: Mapping[str, CrewResult]
    run_key: str
    seconds: float

    def __getitem__(self, step: str) -> CrewResult:
        return self.results[step]


@dataclass(frozen=True)
class PlannedStep:
    """A step as far as it is known before anything runs. `layer` counts from 0; `inputs` are for people."""

    name: str
    crew: str
    layer: int
    needs: Sequence[str]
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class PipelinePlan:
    """What a pipeline would do. Printing it shows it; nothing was started."""

    steps: Sequence[PlannedStep]
    problems: Sequence[str]

    def __str__(self) -> str:
        lines: list[str] = []
        for step in self.steps:
            needs = f" after {', '.join(step.needs)}" if step.needs else ""
            lines.append(f"{step.layer + 1}. {step.name} ({step.crew}){needs}")
            lines += [f"     {key} = {value}" for key, value in step.inputs.items()]
        lines += [f"Problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


@dataclass
class _Pipeline:
    """One call: its graph, with the crews loaded and asked for their inputs."""

    graph: PipelineGraph
    wait: WaitPolicy | None
    crews: dict[str, DeployedCrew] = field(default_factory=dict[str, DeployedCrew])
    expected: dict[str, list[CrewInput]] = field(default_factory=dict[str, list[CrewInput]])

    @property
    def secret_inputs(self) -> set[str]:
        return {name for crew in self.crews.values() for name in crew.secret_inputs}

    async def check(self) -> None:
        """Load the crews, ask each for its inputs, and note all that is wrong."""
        if self.graph.problems:
            return
        for step in self.graph.steps:
            try:
                self.crews[step.name] = await loaded(step.crew)
            except ValueError as error:
                self.graph.problems.append(f"step {step.name!r}: {error}")
        asked = {crew.url: crew for crew in self.crews.values()}
        answers = dict(zip(asked, await asyncio.gather(*map(self._ask, asked.values())), strict=True))
        self.expected = {name: answers[crew.url] for name, crew in self.crews.items()}
        self.graph.check_inputs(self.expected)

    def check_waits(self) -> None:
        """Raise ConfigurationError if a step is to suspend the flow run around this call, which cannot be."""
        for step in self.graph.steps:
            checked_wait(step.wait or self.wait or self.crews[step.name].wait, f"Step {step.name!r}")

    async def _ask(self, crew: DeployedCrew) -> list[CrewInput]:
        async with CrewSession(crew) as session:
            try:
                return await session.client.inputs()
            except NotFoundError:
                return []
            except CrewError as error:
                self.graph.problems.append(f"crew {crew.label} cannot be asked for its inputs: {error}")
                return []


_live: ContextVar[_Pipeline | None] = ContextVar("prefect_crew_pipeline", default=None)


async def aplan_pipeline(steps: Sequence[CrewStep], inputs: Mapping[str, Any] | None = None) -> PipelinePlan:
    """Return what a pipeline would do, with all that is wrong with it. Nothing is started."""
    pipeline = _Pipeline(PipelineGraph(steps, inputs or {}), None)
    await pipeline.check()
    graph = pipeline.graph
    if any(name not in pipeline.crews for name in graph.needs) or not graph.steps:
        return PipelinePlan([], graph.problems)
    layer_of = {name: number for number, layer in enumerate(graph.layers()) for name in layer}
    planned = [
        PlannedStep(
            name=step.name,
            crew=pipeline.crews[step.name].label,
            layer=layer_of[step.name],
            needs=sorted(graph.needs[step.name]),
            inputs={
                key: MASK if key in pipeline.crews[step.name].secret_inputs else value
                for key, value in graph.known_inputs_of(step).items()
            },
        )
        for step in graph.steps
    ]
    return PipelinePlan(sorted(planned, key=lambda step: step.layer), graph.problems)


def plan_pipeline(steps: Sequence[CrewStep], inputs: Mapping[str, Any] | None = None) -> PipelinePlan:
    """`aplan_pipeline` for sync code."""
    refuse_running_loop("plan_pipeline", "aplan_pipeline")
    return asyncio.run(aplan_pipeline(steps, inputs))


async def arun_pipeline(
    steps: Sequence[CrewStep],
    inputs: Mapping[str, Any] | None = None,
    *,
    name: str = "pipeline",
    run_key: str | None = None,
    wait: WaitPolicy | None = None,
) -> PipelineResult:
    """Run crews that feed each other and return all their results.

    Steps without a path between them run side by side. The graph and the inputs of every crew are checked before the
    first kickoff. Inside a flow (or a task) it runs tasks of that flow; outside of one it runs a flow of its own.

    Args:
        steps: The steps, in any order.
        inputs: The pipeline's inputs, for the templates.
        name: The pipeline's name: on its artifact, and part of a run key that is left out.
        run_key: The identity of the whole purchase; each step's key is this one, a slash and its name. May be a
            template over the scheduled time. Left out, the retries of this flow run find it again.
        wait: How to wait, in place of the blocks' policies, for steps without one of their own.

    Raises:
        ConfigurationError: The pipeline cannot run; the message has all that is wrong. Nothing was started.
        PipelineFailedError: A step failed. The independent ones were finished; a second call with the key, or a retry
            of the flow run, starts with what failed and pays for nothing again.
    """
    pipeline = _Pipeline(PipelineGraph(steps, dict(inputs or {})), wait)
    with standstill_here().work():
        await pipeline.check()
        pipeline.graph.refuse_problems()
        pipeline.check_waits()
    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        return await _run(pipeline, name=name, run_key=run_key)
    token = _live.set(pipeline)
    shown = {key: MASK if key in pipeline.secret_inputs else value for key, value in pipeline.graph.inputs.items()}
    try:
        return await cast("Any", run_steps)(
            pipeline=name, steps=[step.name for step in steps], inputs=encode_inputs(shown), run_key=run_key
        )
    finally:
        _live.reset(token)


def run_pipeline(
    steps: Sequence[CrewStep],
    inputs: Mapping[str, Any] | None = None,
    *,
    name: str = "pipeline",
    run_key: str | None = None,
    wait: WaitPolicy | None = None,
) -> PipelineResult:
    """Run crews that feed each other: `arun_pipeline` for sync code.

    Raises:
        RuntimeError: An event loop runs in this thread, which this call would block: await `arun_pipeline` there.
        CrewError: As `arun_pipeline`.
    """
    refuse_running_loop("run_pipeline", "arun_pipeline")
    return asyncio.run(arun_pipeline(steps, inputs, name=name, run_key=run_key, wait=wait))


@flow(name="run-pipeline", flow_run_name="{pipeline}")
async def run_steps(
    pipeline: Annotated[str, Field(description="The pipeline's name.")],
    steps: Annotated[list[str], Field(description="The names of its steps.")],
    inputs: Annotated[dict[str, Any] | None, Field(description="Its inputs, the secret ones masked.")] = None,
    run_key: Annotated[str | None, Field(description="The identity of the whole purchase.")] = None,
) -> PipelineResult:
    """Run a pipeline that `run_pipeline` was called with outside of a flow."""
    del steps, inputs
    live = _live.get()
    if live is None:
        raise ConfigurationError(
            "This run's steps were given by code and cannot be made from its parameters. Call run_pipeline again with "
            "the same steps and run key, which finds again what was bought, or write a flow around it and retry that."
        )
    return await _run(live, name=pipeline, run_key=run_key)


async def _run(pipeline: _Pipeline, *, name: str, run_key: str | None) -> PipelineResult:
    digest = inputs_digest(encode_inputs(pipeline.graph.inputs))
    identity = await identify(name, digest, run_key=run_key, name=name)
    started = time.perf_counter()
    work = _Work(pipeline, identity.run_key, PipelineArtifact(name, identity.run_key, pipeline.graph))
    await work.run()
    if work.errors:
        raise PipelineFailedError(
            failed=[step.name for step in pipeline.graph.steps if step.name in work.errors],
            skipped=[step.name for step in pipeline.graph.steps if step.name in work.skipped],
            results=work.results,
            errors=work.errors,
            run_key=identity.run_key,
        )
    return PipelineResult(results=work.results, run_key=identity.run_key, seconds=time.perf_counter() - started)


class _Work:
    """The steps under way: each waits for those that it needs, then runs its crew."""

    def __init__(self, pipeline: _Pipeline, run_key: str, artifact: PipelineArtifact) -> None:
        self.pipeline = pipeline
        self.run_key = run_key
        self.artifact = artifact
        self.results: dict[str, CrewResult] = {}
        self.errors: dict[str, CrewError] = {}
        self.skipped: set[str] = set()
        self._done = {step.name: asyncio.Event() for step in pipeline.graph.steps}
        self._times = {step.name: StepTimes() for step in pipeline.graph.steps}

    async def run(self) -> None:
        """Run all steps that can run. A cancellation, or an error that is none of a crew's, ends them all."""
        await self.artifact.show(self._times)
        jobs = [asyncio.ensure_future(self._step(step)) for step in self.pipeline.graph.steps]
        try:
            await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            await self.artifact.show(self._times, last=True)

    async def _step(self, step: CrewStep) -> None:
        needs = self.pipeline.graph.needs[step.name]
        for name in sorted(needs):
            await self._done[name].wait()
        times = self._times[step.name]
        try:
            if needs - set(self.results):
                self.skipped.add(step.name)
                times.state = "skipped"
                return
            times.start()
            await self.artifact.show(self._times)
            self.results[step.name] = await self._crew(step)
            times.end("completed", kickoff_id=self.results[step.name].kickoff_id)
        except CrewError as error:
            run_logger().error("Step %s failed: %s", step.name, error)
            self.errors[step.name] = error
            times.end("failed", kickoff_id=getattr(error, "kickoff_id", None))
        except Pause:
            times.state = "suspended"
            raise
        finally:
            if times.state != "suspended":  # the steps after it are for when the flow run goes on
                self._done[step.name].set()
        await self.artifact.show(self._times)

    async def _crew(self, step: CrewStep) -> CrewResult:
        pipeline = self.pipeline
        inputs = pipeline.graph.inputs_of(step, self.results, pipeline.expected[step.name])
        return await arun_crew(
            pipeline.crews[step.name],
            inputs,
            name=step.name,
            run_key=f"{self.run_key}/{step.name}",
            wait=step.wait or pipeline.wait,
            output_type=step.output_type,
        )
