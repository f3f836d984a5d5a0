"""Pipelines of crews: a step can use the results of earlier steps; independent steps run at the same time.

Each step is a run of its own. Its idempotency key is the pipeline's key and the step's name, so a second call with the
key, or a retry of the flow run, reattaches to the runs that were started, and starts failed runs again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Annotated, Any, cast

from prefect import flow
from prefect.context import AsyncClientContext, FlowRunContext, TaskRunContext
from pydantic import Field

from prefect_crew._internal.asyncio_tasks import cancel_and_wait, cancelled_once, sync_version
from prefect_crew._internal.prefect_api import label_flow_run, run_logger
from prefect_crew._internal.prefect_errors import naming_prefect_away
from prefect_crew._text import excerpt
from prefect_crew.blocks import values_of_blocks
from prefect_crew.budgets import Budget
from prefect_crew.client.encoding import encode_inputs
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewResult, CrewStatus
from prefect_crew.client.redaction import MASK, holds_secret
from prefect_crew.crew import WaitPolicy, titled
from prefect_crew.exceptions import ConfigurationError, PipelineFailedError
from prefect_crew.flows import run_tasks
from prefect_crew.pipelines.artifact import PipelineArtifact
from prefect_crew.pipelines.definition import PipelineDefinition
from prefect_crew.pipelines.graph import PIPELINE, CrewStep, Pipeline, PipelinePlan
from prefect_crew.runs.keys import identify, scheduled_key
from prefect_crew.runs.request import RunOptions, RunRequest
from prefect_crew.runs.reviews.questions import ReviewChoice
from prefect_crew.runs.run import LiveRun


@dataclass(frozen=True)
class PipelineResult:
    """The results of a pipeline: `results["research"]` is the CrewResult of that step. `seconds` is the wall time."""

    results: Mapping[str, CrewResult[Any]]
    idempotency_key: str
    seconds: float

    def __getitem__(self, step: str) -> CrewResult[Any]:
        return self.results[step]


@naming_prefect_away("Nothing was started.")
async def aplan_pipeline(steps: Sequence[CrewStep], inputs: Mapping[str, Any] | None = None) -> PipelinePlan:
    """Return the plan of a pipeline, with all its problems. Nothing is started."""
    taken_inputs, inputs = Inputs.of(inputs), None
    pipeline = Pipeline(steps, taken_inputs.values)
    await pipeline.check()
    return pipeline.plan()


plan_pipeline = sync_version(aplan_pipeline)


@naming_prefect_away("Run again with the same key, which reattaches to the runs that were started.")
async def arun_pipeline(
    steps: Sequence[CrewStep],
    inputs: Mapping[str, Any] | None = None,
    *,
    name: str = PIPELINE,
    idempotency_key: str | None = None,
    wait: WaitPolicy | None = None,
    review: ReviewChoice | None = None,
    budgets: Sequence[Budget] = (),
) -> PipelineResult:
    """Run a pipeline of crews and return all their results. A step can use the results of earlier steps.

    Independent steps run at the same time. The call checks the graph and the inputs of every crew before the first
    kickoff. Inside a flow (or a task) the call runs tasks of that flow; outside of a flow, it runs a flow of its own.

    Args:
        steps: The steps, in any order.
        inputs: The pipeline's inputs, for the templates.
        name: The pipeline's name: on its artifact, and part of a derived idempotency key.
        idempotency_key: The identity of the whole pipeline; each step's key is this key, a slash and the step's name.
            The key may be a template over the scheduled time. Default: inside a flow, a key is derived, so that retries
            of this flow run reattach to its runs.
        wait: How to wait, in place of the blocks' policies, for steps without a policy of their own.
        review: The source of answers when a crew waits for a person, as for `run_crew`, for steps without their own.
        budgets: Limits for the total use of all steps, in addition to the blocks' budgets. A budget without a name gets
            the pipeline's name. A "batch" budget covers one run of the pipeline and its retries.

    Returns:
        The results by the names of their steps: `result["write"].output`.

    Raises:
        ConfigurationError: The pipeline cannot run; the message lists all problems. Nothing was started.
        PipelineFailedError: A step failed. Independent steps were finished; a second call with the key, or a retry of
            the flow run, starts only the failed steps again, and the steps after them.
    """
    taken_inputs, inputs = Inputs.of(inputs), None  # no frame shows the values
    options = RunOptions.of(idempotency_key=idempotency_key, name=name, wait=wait, review=review, budgets=budgets)
    steps = [replace(step, wait=step.wait or wait, review=step.review or review) for step in steps]
    pipeline = Pipeline(steps, taken_inputs.values)
    await pipeline.check()
    pipeline.refuse_problems()
    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        return await _run(pipeline, name, idempotency_key, options.budgets)

    # This closure passes the steps to the flow: Prefect must not or cannot store them as parameters.
    @wraps(run_steps.fn)
    async def run_in_flow(*_: Any, **__: Any) -> PipelineResult:
        await _name_flow_run(pipeline, name, idempotency_key)
        return await _run(pipeline, name, idempotency_key, options.budgets)

    own_flow = copy(run_steps)
    own_flow.fn = run_in_flow
    return await cast("Any", own_flow)(
        pipeline=name,
        steps=[step.name for step in steps],
        inputs=dict.fromkeys(taken_inputs.values, MASK) if pipeline.is_secret else encode_inputs(taken_inputs.values),
        idempotency_key=idempotency_key,
    )


run_pipeline = sync_version(arun_pipeline)


@flow(name="run-pipeline", flow_run_name="{pipeline}")
async def run_steps(
    pipeline: str, steps: list[str], inputs: dict[str, Any] | None = None, idempotency_key: str | None = None
) -> PipelineResult:
    """Run the pipeline of a `run_pipeline` call outside of a flow."""
    raise ConfigurationError(
        "This run's steps were defined in Python and cannot be retried from its parameters. Call run_pipeline again "
        "with the same steps and idempotency key, which reattaches to the runs that were started, or write a flow "
        "around the call and retry that flow."
    )


@flow(name="deployed-pipeline", flow_run_name="{pipeline.name}", validate_parameters=True)
async def run_deployed_pipeline(
    pipeline: Annotated[PipelineDefinition, Field(description="The pipeline: its name, its inputs and its steps.")],
    inputs: Annotated[
        dict[str, Any] | None,
        Field(description="Its inputs by name; of a secret one the name of the Secret block that holds it."),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Field(description="The identity of the whole pipeline, such as report-{scheduled_start:%Y-%m-%d}."),
    ] = None,
) -> PipelineResult:
    """Run a pipeline whose definition is a parameter, without Python code. You can deploy this flow as it is.

    Raises:
        ConfigurationError: The pipeline cannot run; the message lists all problems. Nothing was started.
        PipelineFailedError: A step failed, as for `run_pipeline`.
    """
    values = pipeline.values(inputs or {})
    bare = Pipeline(pipeline.crew_steps(), values)
    await bare.load()
    blocks = {name: list(crew.secret_inputs) for name, crew in bare.crews.items()}
    if stored := pipeline.stored_secrets(blocks):
        raise ConfigurationError(f"The pipeline cannot run, and nothing was started: {'; '.join(stored)}.")
    secret = bare.secret_inputs | {name for name, item in pipeline.inputs.items() if item.secret}
    bare.inputs = await values_of_blocks(values, secret)
    # With the loaded crews, so that each is loaded once. A missing block is reported later, with all other problems.
    steps = [replace(step, crew=bare.crews.get(step.name, step.crew)) for step in bare.steps]
    await _name_flow_run(bare, pipeline.name, idempotency_key)
    return await arun_pipeline(
        steps,
        bare.inputs,
        name=pipeline.name,
        idempotency_key=idempotency_key,
        wait=pipeline.wait,
        review=pipeline.review,
    )


async def _name_flow_run(pipeline: Pipeline, name: str, idempotency_key: str | None) -> None:
    """Name the flow run around this call by its key, else by the first input if that may be shown."""
    key = idempotency_key and await scheduled_key(idempotency_key)
    may_show = not pipeline.is_secret and all(crew.show == "full" for crew in pipeline.crews.values())
    await label_flow_run(name=titled(name, key, pipeline.inputs if may_show else {}))


@cancelled_once
async def _run(pipeline: Pipeline, name: str, idempotency_key: str | None, budgets: Sequence[Budget]) -> PipelineResult:
    # Left out before they are encoded: a function of a step may turn a secret of any type into what its crew takes.
    shown = {key: value for key, value in pipeline.inputs.items() if key not in pipeline.secret_inputs}
    identity = await identify(name, Inputs.of(shown).digest, idempotency_key=idempotency_key, name=None)
    key = identity.idempotency_key
    pipeline.crews = {step: crew.under(budgets, name=name, batch=key) for step, crew in pipeline.crews.items()}
    started = time.perf_counter()
    work = _Run(pipeline, key, PipelineArtifact(name, key, pipeline))
    await work.run()
    if work.errors:
        names = [step.name for step in pipeline.steps]
        failed = [name for name in names if name in work.errors]
        skipped = [name for name in names if name not in work.results and name not in work.errors]
        why = "; ".join(f"{name}: {excerpt(str(work.errors[name])).rstrip('.')}" for name in failed)
        not_run = f" Not run because of this: {', '.join(skipped)}." if skipped else ""
        raise PipelineFailedError(
            f"{'A step' if len(failed) == 1 else f'{len(failed)} steps'} failed: {why}.{not_run} Results that are "
            f"kept: {len(work.results)}. Retry the flow run, or run again with idempotency key {key!r}, to start the "
            "rest.",
            failed=failed,
            skipped=skipped,
            results=work.results,
            errors=work.errors,
            idempotency_key=key,
        )
    return PipelineResult(results=work.results, idempotency_key=key, seconds=time.perf_counter() - started)


@dataclass(repr=False)  # results may repeat secrets
class _Run:
    """One run of a pipeline: each step waits for the steps that it needs, then runs its crew."""

    pipeline: Pipeline
    idempotency_key: str
    artifact: PipelineArtifact
    results: dict[str, CrewResult[Any]] = field(default_factory=dict[str, "CrewResult[Any]"])
    errors: dict[str, Exception] = field(default_factory=dict[str, Exception])

    def __post_init__(self) -> None:
        self._ended = {step.name: asyncio.Event() for step in self.pipeline.steps}
        self.is_secret = self.pipeline.is_secret

    async def run(self) -> None:
        """Run each step whose needed steps completed. A cancellation cancels all steps."""
        async with self.artifact.kept(), AsyncClientContext.get_or_create():
            jobs = [asyncio.ensure_future(self._step(step)) for step in self.pipeline.steps]
            try:
                await asyncio.gather(*jobs)
            finally:
                await cancel_and_wait(*jobs)

    async def _step(self, step: CrewStep) -> None:
        needs = self.pipeline.needs[step.name]
        for name in needs:
            await self._ended[name].wait()
        if needs <= self.results.keys():
            self.artifact.note(step.name, "running")
            try:
                self.results[step.name] = await self._crew(step)
                self.artifact.note(step.name, "completed")
            except Exception as error:  # noqa: BLE001  any error fails only this step: independent steps go on
                run_logger().error("Step %s failed: %s", step.name, error)
                self.errors[step.name] = error
                is_shown = not self.is_secret and self.pipeline.crews[step.name].show != "none"
                self.artifact.note(step.name, "failed", str(error) if is_shown else type(error).__name__)
            except BaseException:  # cancelled, or suspended by Prefect: later steps wait for the next attempt
                self.artifact.note(step.name, "interrupted")
                raise
        self._ended[step.name].set()

    def _on_run(self, step: str, run: LiveRun, status: CrewStatus | None) -> None:
        if status is None:  # the run of the step is known now
            self.artifact.opened(step, run)

    def _inputs_of(self, step: CrewStep) -> tuple[Inputs, str | None]:
        """Return the inputs of a step and its session. In a secret pipeline an error about them has no text."""
        try:
            return Inputs.of(self.pipeline.inputs_of(step, self.results)), self.pipeline.session_of(step, self.results)
        except ConfigurationError as error:
            if not self.is_secret:
                raise
            problem = type(error.__cause__ or error).__name__
        raise ConfigurationError(  # outside: the text of `error` would be its context
            f"The step's inputs cannot be made ({problem}, whose text may hold a secret input). Nothing was started."
        )

    async def _crew(self, step: CrewStep) -> CrewResult[Any]:
        inputs, session = self._inputs_of(step)
        # A function may have made a secret, which the crews of later steps may repeat.
        self.is_secret = self.is_secret or any(map(holds_secret, inputs.values.values()))
        crew = replace(self.pipeline.crews[step.name], on_status=partial(self._on_run, step.name))
        if self.is_secret:
            crew = replace(crew, show="none")
            inputs = replace(inputs.keep_secret(self.pipeline.secret_inputs_of(step)), is_hidden=True)
        key = f"{self.idempotency_key}/{step.name}"
        options = step.options(name=step.name, idempotency_key=key, session=session)
        return await run_tasks(
            LiveRun(crew, request=RunRequest.of(crew, inputs, options)),
            # So Prefect draws an arrow from each earlier step; by itself it notices only results that are unchanged.
            wait_for=[self.results[name] for name in sorted(self.pipeline.needs[step.name])],
        )
