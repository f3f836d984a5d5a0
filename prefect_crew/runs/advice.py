"""What follows a run that failed: a retry of Prefect's, or what a person can do, where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.context import FlowRunContext, TaskRunContext

if TYPE_CHECKING:
    from prefect_crew.records.model import RunRecord


def retry_may_follow() -> bool:
    """Return whether Prefect has retries left of a flow or a task around this call."""
    return any(
        _retries(context) >= _count(context) > 0
        for kind in (TaskRunContext, FlowRunContext)
        for context in _around(kind)
    )


def _around(kind: type[TaskRunContext] | type[FlowRunContext]) -> list[Any]:
    """Return the contexts of a kind around this call, the innermost first, without those of this package's tasks."""
    found: list[Any] = []
    context: Any = kind.get()
    while isinstance(context, kind):
        if not (isinstance(context, TaskRunContext) and type(context.task).__module__.startswith("prefect_crew")):
            found.append(context)
        # Prefect shows the innermost only; what it replaced stands in the token that will bring it back.
        token = context._token  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        context = None if token is None else token.old_value
    return found


def _retries(context: Any) -> int:
    owner = context.task if isinstance(context, TaskRunContext) else context.flow
    return int(getattr(owner, "retries", 0) or 0)


def _count(context: Any) -> int:
    run = context.task_run if isinstance(context, TaskRunContext) else context.flow_run
    return 0 if run is None else int(run.run_count)


def attempt_of(record: RunRecord | None, max_kickoffs: int) -> str | None:
    """Return which attempt at its key a run is, as text, None for a run without a record."""
    return None if record is None else f"attempt {record.attempt} of at most {max_kickoffs}"


def after_failure(crew: str, record: RunRecord | None, max_kickoffs: int) -> str:
    """Return what follows a failure, and what to do about it."""
    if record is None:
        return "Correct the crew, then start another run."
    which = f"This was {attempt_of(record, max_kickoffs)} under its key."
    if record.attempt >= max_kickoffs:
        return f"{which} {_raise_it(crew)}"
    if retry_may_follow():
        return f"{which} Prefect has retries left for what called it, and a retry starts the crew again."
    return f"{which} It is not started again by itself: retry the flow run, or run again with the same key."


def all_used(crew: str, max_kickoffs: int) -> str:
    """Return what to do where a key has no kickoff left."""
    return (
        f"Nothing was started: crew {crew} allows {max_kickoffs} kickoffs under one idempotency key (max_kickoffs). "
        f"{_raise_it(crew)}"
    )


def _raise_it(crew: str) -> str:
    return (
        f"For another: in Prefect's UI raise max_kickoffs on the block deployed-crew/{crew} and retry the flow run; "
        "for a deployment of run_deployed_crew set its parameter force_new; in Python force_new=True; on the command "
        "line --force-new."
    )
