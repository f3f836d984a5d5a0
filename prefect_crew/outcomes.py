"""From a run's last status to what its caller gets: a result, or the error that says how it ended. Pure."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from prefect_crew.advice import after_failure
from prefect_crew.api.errors import CrewError, CrewFailedError, CrewLostError, CrewStoppedError, OutputTypeError
from prefect_crew.api.models import CrewResult, CrewState, CrewStatus
from prefect_crew.open_runs import OpenRun

__all__ = ["failure", "result_of", "typed"]

M = TypeVar("M", bound=BaseModel)


def result_of(run: OpenRun, status: CrewStatus) -> CrewResult:
    """Return the result of a completed run; whatever else a status says is raised, never returned.

    Raises:
        CrewFailedError, CrewStoppedError, CrewLostError: How the run ended.
        CrewError: It has not ended.
    """
    if status.state is CrewState.COMPLETED:
        return status.result()
    raise failure(run, status.state, run.told(status.error))


def failure(run: OpenRun, state: CrewState | None, error: str | None) -> CrewError:
    """Return the error for a run that has no result; `error` is the crew's own as it may be told."""
    label, run_key, kickoff_id = run.crew.label, run.run_key, run.kickoff_id
    advice = run.advice or after_failure(label, run.record, run.crew.max_kickoffs)
    if state is CrewState.FAILED:
        return CrewFailedError(kickoff_id=kickoff_id, error=error or "", crew=label, run_key=run_key, advice=advice)
    if state is CrewState.STOPPED:
        return CrewStoppedError(kickoff_id=kickoff_id, crew=label, run_key=run_key, advice=advice)
    if state is CrewState.UNKNOWN:
        return CrewLostError(kickoff_id=kickoff_id, crew=label, run_key=run_key)
    return CrewError(
        f"Run {kickoff_id} of crew {label} has no result yet: it is {state}. Wait for it with wait_for_crew."
    )


def typed(result: CrewResult, output_type: type[M], *, run: OpenRun | None = None) -> CrewResult:
    """Return the result with its `data` as an instance of a pydantic model.

    Raises:
        OutputTypeError: Neither the structured result nor the text fits. Its message shows as much of the text as
            `run` may show; all of it is in its `output`.
    """
    source = result.data
    try:
        text = source is None
        data = output_type.model_validate_json(result.output) if text else output_type.model_validate(source)
    except ValidationError as error:
        # A validator's message may quote what it refused; its type does not.
        reason = "msg" if run is None or run.show == "full" else "type"
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'the text'}: {problem[reason]}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
    else:
        return result.model_copy(update={"data": data})
    shown = None
    if run is not None:
        problems = [run.redact(problem) for problem in problems]
        shown = run.redact(result.output) if run.show == "full" else "not shown"
    # Out here, since the validator's own error quotes the whole result and would come along as its context.
    refusal = OutputTypeError(
        kickoff_id=result.kickoff_id,
        output_type=output_type.__name__,
        output=result.output,
        problems=problems,
        shown=shown,
    )
    del result, source  # error reporters show the local variables of all frames
    raise refusal
