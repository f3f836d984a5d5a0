"""From what a crew's server answered to one model, whatever dialect it speaks. Pure functions.

A body is bytes, text, or JSON that is decoded already. Unknown keys are ignored and the raw body is kept. No body
whatsoever makes these functions raise anything but ResponseFormatError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from prefect_crew.api import _shapes as shapes
from prefect_crew.api._decode import (
    RUN_KEYS,
    as_count,
    as_id,
    as_number,
    as_object,
    as_text,
    decode,
    first,
    id_of,
    is_object,
    shown,
)
from prefect_crew.api._hooks import WebhookKind, parse_webhook
from prefect_crew.api._refusals import ErrorFacts, parse_error
from prefect_crew.api._states import known_state
from prefect_crew.api.errors import ResponseFormatError
from prefect_crew.api.models import (
    CrewInput,
    CrewState,
    CrewStatus,
    ResumeAnswer,
    StopAnswer,
    StopOutcome,
)

__all__ = [
    "ErrorFacts",
    "WebhookKind",
    "parse_error",
    "parse_inputs",
    "parse_kickoff",
    "parse_resume",
    "parse_status",
    "parse_stop",
    "parse_webhook",
    "waiting_output",
]

_KICKOFF_KEYS = (*RUN_KEYS, "id", "task_id")
"""`task_id` names the run in the answer to a kickoff only; everywhere else it names a task."""
_HUMAN_TASK_KEYS = ("human_task_id", "task_id", "taskId")
_HUMAN_PARTS = ("human_input", "human_feedback", "human_input_request", "pending_human_input", "current_task")


def parse_inputs(body: Any) -> list[CrewInput]:
    """Return the inputs that `GET /inputs` names, in its order, each once.

    Accepted under `inputs`: a list of names, a list of `{name, type, required, description, default}`, an object of
    name to description (or to such an object), null; and a bare list. `required_inputs` beside it takes the same forms:
    an input that it does not name is optional.

    Raises:
        ResponseFormatError: The body is none of these.
    """
    expected = "the crew's inputs"
    value = decode(body, expected=expected)
    source = as_object(value)
    items = _items(source["inputs"]) if "inputs" in source else _items(value) if isinstance(value, list) else None
    needed = _items(source.get("required_inputs"))
    if items is None or needed is None:
        raise ResponseFormatError(expected=expected, body=shown(value))
    names = None if source.get("required_inputs") is None else {as_text(item.get("name")) for item in needed}
    found: dict[str, CrewInput] = {}
    for item in [*items, *needed]:
        crew_input = _input(item, names)
        if crew_input is None:
            raise ResponseFormatError(expected=expected, body=shown(value))
        found.setdefault(crew_input.name, crew_input)
    return list(found.values())


def _items(value: Any) -> list[dict[str, Any]] | None:
    """Return a list of inputs in any of its forms as objects, None where it is no such list."""
    if value is None:
        return []
    if is_object(value):
        return [_described(name, about) for name, about in as_object(value).items()]
    if not isinstance(value, list):
        return None
    return [{"name": item} if isinstance(item, str) else as_object(item) for item in cast("list[Any]", value)]


def _described(name: str, about: Any) -> dict[str, Any]:
    return {**as_object(about), "name": name} if is_object(about) else {"name": name, "description": about}


def _input(source: dict[str, Any], required: set[str | None] | None) -> CrewInput | None:
    name = as_text(source.get("name"))
    if name is None:
        return None
    return CrewInput(
        name=name,
        type=as_text(source.get("type")),
        description=as_text(source.get("description")),
        required=_is_required(source, listed=None if required is None else name in required),
        default=source.get("default"),
    )


def _is_required(source: dict[str, Any], *, listed: bool | None) -> bool:
    """Anything but a clear no is a yes: to ask for one input too many is the cheaper mistake."""
    said = source.get("required")
    if listed:
        return True
    if said is None:
        return listed is None and source.get("default") is None
    return not (said is False or (isinstance(said, str) and said.strip().casefold() == "false"))


def parse_kickoff(body: Any) -> str:
    """Return the id of the run that a kickoff started.

    Raises:
        ResponseFormatError: There is no usable id in the body, or it has control characters. The run may have
            started all the same.
    """
    expected = "the id of the run that was started"
    value = decode(body, expected=expected)
    kickoff_id = id_of(as_object(value), _KICKOFF_KEYS)
    # It goes into logs, commands and records, where a line break or an escape of a terminal is more than an id.
    if kickoff_id is None or not kickoff_id.isprintable():
        raise ResponseFormatError(expected=expected, body=shown(value))
    return kickoff_id


def parse_status(body: Any, kickoff_id: str) -> CrewStatus:
    """Return where run `kickoff_id` stands.

    Output and data are set only on a completed run, an error only on a failed or stopped one, whatever else the body
    holds. A run that is said to be completed and failed at once counts as failed. A body without a state says nothing
    of the run, even beside a result: every known server gives one, and unknown is not success.

    Raises:
        ResponseFormatError: The body is no object, has no state, or names another run.
    """
    expected = "the status of a run"
    value = decode(body, expected=expected, kickoff_id=kickoff_id)
    source = as_object(value)
    found = shapes.state_of(source)
    if found is None:
        raise ResponseFormatError(expected=expected, body=shown(value), kickoff_id=kickoff_id)
    named = {own for key in RUN_KEYS if (own := as_id(source.get(key)))}
    if named and kickoff_id.casefold() not in {own.casefold() for own in named}:
        expected = "the status of this run, not that of another one"
        raise ResponseFormatError(expected=expected, body=shown(value), kickoff_id=kickoff_id)
    state = shapes.agreed_state(source, found)
    completed, total, progress = _progress(source)
    data = shapes.data_of(source) if state is CrewState.COMPLETED else None
    return CrewStatus(
        kickoff_id=kickoff_id,
        state=state,
        raw_state=found.word,
        known_state=found.known,
        message=shapes.message_of(source),
        current_task=shapes.named(source.get("current_task"), ("name", "task_name", "task_id", "id", "description")),
        last_task=shapes.named(source.get("last_executed_task"), ("name", "task_name", "task_id", "id", "description")),
        last_step=_step(source.get("last_step")),
        completed_tasks=completed,
        total_tasks=total,
        progress=progress,
        human_task_id=_human_task(source) if state is CrewState.WAITING else None,
        tasks=shapes.tasks_of(source),
        output=shapes.output_of(source, data) if state is CrewState.COMPLETED else None,
        data=data,
        error=shapes.error_of(source, state) if state in (CrewState.FAILED, CrewState.STOPPED) else None,
        execution_time=shapes.seconds_of(source),
        usage=shapes.usage_of(source),
        raw=value,
    )


def _progress(source: Mapping[str, Any]) -> tuple[int | None, int | None, float | None]:
    """Return tasks completed, tasks in all, and the fraction 0..1."""
    progress = source.get("progress")
    if not is_object(progress):
        return None, None, _fraction(progress)
    inner = as_object(progress)
    completed, total = as_count(inner.get("completed_tasks")), as_count(inner.get("total_tasks"))
    if completed is None or not total:
        return completed, total, _fraction(first(inner, ("progress", "percentage", "percent")))
    return completed, total, min(completed / total, 1.0)


def _fraction(value: Any) -> float | None:
    number = as_number(value)
    if number is None or not 0 <= number <= 100:
        return None
    return number if number <= 1 else number / 100


def _step(value: Any) -> str | None:
    if not is_object(value):
        return shapes.text_of(value)
    keys = ("description", "thought", "content", "text", "output", "result", "prompt", "name", "tool")
    return next(shapes.filled_texts(as_object(value).get(key) for key in keys), None) or shapes.text_of(value)


def _human_task(source: Mapping[str, Any]) -> str | None:
    parts = (source, *(as_object(source.get(key)) for key in _HUMAN_PARTS))
    return next((found for part in parts if (found := id_of(part, _HUMAN_TASK_KEYS))), None)


def waiting_output(body: Any) -> str | None:
    """Return what the status of a run that waits for a person shows to be judged, None where it shows nothing."""
    source = as_object(body)
    parts = (*(as_object(source.get(key)) for key in _HUMAN_PARTS), source)
    found = [shapes.text_of(part.get(key)) for part in parts for key in ("task_output", "output", "prompt")]
    last = as_object(source.get("last_executed_task"))
    waits = _human_task(source) or as_text(source.get("current_task"))
    if waits is None or waits in (id_of(last, _HUMAN_TASK_KEYS), last.get("name")):
        found.append(shapes.text_of(last.get("output")))  # what it says of another task is not what is to be judged
    return next(shapes.filled_texts(found), None)


def parse_resume(body: Any) -> ResumeAnswer:
    """Return what the server said to a resume that it accepted (2xx): `{status, message}`, an id, or nothing at all.

    Raises:
        ResponseFormatError: The body is neither empty nor an object, or holds nothing but an error.
    """
    if _empty(body):
        return ResumeAnswer()
    expected = "the answer to a resume"
    value = decode(body, expected=expected)
    source = as_object(value)
    status = as_text(source.get("status"))
    if not is_object(value) or (status is None and shapes.error_text(source.get("error"))):
        raise ResponseFormatError(expected=expected, body=shown(value))
    return ResumeAnswer(
        kickoff_id=id_of(source, RUN_KEYS), status=status, message=as_text(source.get("message")), raw=value
    )


def _empty(body: Any) -> bool:
    if isinstance(body, (bytes, bytearray, memoryview)):
        body = bytes(cast("bytes", body)).decode("utf-8", "replace")
    return body is None or (isinstance(body, str) and body.strip() in ("", "null"))


_CURRENT_STATE = re.compile(r"current state:?\s*['\"]?([A-Za-z][A-Za-z _-]*)", re.IGNORECASE)
_NO_ROUTE = re.compile(r"\b(route|path|url|uri|endpoint|page|resource|method)\b|\bcannot post\b", re.IGNORECASE)
_NO_RUN = re.compile(r"\b(execution|kickoff|run|task|job|crew|id)\b", re.IGNORECASE)


def parse_stop(body: Any, kickoff_id: str, status_code: int = 200) -> StopAnswer | None:
    """Return what became of a `/stop`, from the body and the HTTP status; None where that is an error of another kind.

    A 404 is a missing route unless its body is JSON that speaks of a run: frameworks say "Not Found" and no more.

    Raises:
        ResponseFormatError: A 2xx whose body is neither empty nor an object.
    """
    if 200 <= status_code < 300:
        return _stopped(body, kickoff_id)
    facts = parse_error(status_code, {}, _as_str(body))
    said = ": ".join(part for part in (facts.title, facts.message) if part)
    if status_code in (400, 409) and (found := _CURRENT_STATE.search(said)):
        word = found.group(1).strip()
        outcome = StopOutcome.NOT_STOPPABLE
        return StopAnswer(
            kickoff_id=kickoff_id, outcome=outcome, state=known_state(word), raw_state=word, message=said, raw=facts.raw
        )
    if status_code in (404, 405, 410, 501):
        known_route = status_code == 410 or (
            status_code == 404 and is_object(facts.raw) and _of_a_run(said, kickoff_id)
        )
        outcome = StopOutcome.UNKNOWN_RUN if known_route else StopOutcome.UNSUPPORTED
        return StopAnswer(kickoff_id=kickoff_id, outcome=outcome, message=said or None, raw=facts.raw)
    return None


def _of_a_run(said: str, kickoff_id: str) -> bool:
    names_it = re.search(rf"(?<!\w){re.escape(kickoff_id)}(?!\w)", said) or _NO_RUN.search(said)
    return bool(names_it) and not _NO_ROUTE.search(said)


def _stopped(body: Any, kickoff_id: str) -> StopAnswer:
    if _empty(body):
        return StopAnswer(kickoff_id=kickoff_id, outcome=StopOutcome.REQUESTED)
    expected = "the answer to a stop"
    value = decode(body, expected=expected, kickoff_id=kickoff_id)
    if not is_object(value):
        raise ResponseFormatError(expected=expected, body=shown(value), kickoff_id=kickoff_id)
    source = as_object(value)
    found = shapes.state_of(source)
    state = found.state if found and found.known else None
    outcome = StopOutcome.REQUESTED
    if state is CrewState.STOPPED:
        outcome = StopOutcome.STOPPED
    elif state in (CrewState.COMPLETED, CrewState.FAILED):
        outcome = StopOutcome.NOT_STOPPABLE
    elif state is CrewState.UNKNOWN:
        outcome = StopOutcome.UNKNOWN_RUN
    return StopAnswer(
        kickoff_id=kickoff_id,
        outcome=outcome,
        state=state,
        raw_state=found.word if found else None,
        message=shapes.message_of(source),
        raw=value,
    )


def _as_str(body: Any) -> str:
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(cast("bytes", body)).decode("utf-8", "replace")
    return body if isinstance(body, str) else shapes.text_of(body) or ""
