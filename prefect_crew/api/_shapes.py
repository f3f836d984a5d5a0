"""The parts that answers and webhooks share: state, text, structure, tasks, usage, error.

Each function takes a decoded JSON object and returns one part of the model, or None. Where a part may stand in
several places the order of the places is the order of preference. None of them raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

from prefect_crew.api._decode import as_count, as_number, as_object, as_text, first, to_json, try_json
from prefect_crew.api._states import known_state
from prefect_crew.api.models import CrewState, TaskResult, TokenUsage

__all__ = [
    "State",
    "agreed_state",
    "data_of",
    "error_of",
    "error_text",
    "filled_texts",
    "message_of",
    "named",
    "output_of",
    "state_of",
    "structured",
    "tasks_of",
    "text_of",
    "usage_of",
]

_TEXT_KEYS = ("output", "raw", "result")
_TASK_LISTS = ("tasks", "tasks_output", "task_outputs")
_RESULT_KEYS = {*_TEXT_KEYS, *_TASK_LISTS, "json_dict", "pydantic", "token_usage"}
"""Keys that make an object under `result` a wrapping of the result rather than the result itself."""
_ERROR_KEYS = {"error", "error_message", "message", "detail", "details", "type", "code", "status", "state", "traceback"}
_DEPTH = 5
_COUNTS = tuple(TokenUsage.model_fields)


class State(NamedTuple):
    """A state, the server's word for it, and whether that word is a known one."""

    state: CrewState
    word: str
    known: bool


def state_of(body: Mapping[str, Any]) -> State | None:
    """Return the state: `state` before `status`. None where neither is a word; an unheard-of word counts as running."""
    word = as_text(body.get("state")) or as_text(body.get("status"))
    if word is None:
        return None
    state = known_state(word)
    return State(state or CrewState.RUNNING, word, state is not None)


def agreed_state(body: Mapping[str, Any], found: State) -> CrewState:
    """Return the state of a run on which all of its status agrees: what is said to have failed has not completed.

    Completed contradicts a `status` beside `state` that means failed or stopped, an error where there is no result, and
    a result that is an error and nothing else.
    """
    if found.state is not CrewState.COMPLETED:
        return found.state
    other = known_state(as_text(body.get("status")) or "")
    if other is CrewState.FAILED or other is CrewState.STOPPED:
        return other
    inner = as_object(body.get("result"))
    if error_text(inner.get("error")) and inner.keys() <= _ERROR_KEYS:
        return CrewState.FAILED
    if error_text(body.get("error")) or error_text(body.get("error_message")):
        # What the last task wrote is no result of a run that names its error.
        own = {key: value for key, value in body.items() if key != "last_executed_task"}
        data = data_of(own)
        if data is None and not output_of(own, data):
            return CrewState.FAILED
    return CrewState.COMPLETED


def message_of(body: Mapping[str, Any]) -> str | None:
    """Return the text for people: a `status` that is a sentence beside a `state`, else `message`."""
    return _status_sentence(body) or as_text(body.get("message"))


def _status_sentence(body: Mapping[str, Any]) -> str | None:
    status = as_text(body.get("status"))
    return status if status and as_text(body.get("state")) and known_state(status) is None else None


def filled_texts(values: Iterable[Any]) -> Iterator[str]:
    """Yield those of `values` that are text with something in it."""
    return (text for text in map(as_text, values) if text is not None)


def text_of(value: Any) -> str | None:
    """Return `value` as text: text as it is, structure and numbers as JSON, null as None."""
    if value is None or isinstance(value, str):
        return as_text(value)
    return to_json(value)


def _output_places(body: Mapping[str, Any]) -> list[Any]:
    result = body.get("result")
    inner = as_object(result)
    return [
        None if inner else result,
        *(inner.get(key) for key in _TEXT_KEYS),
        body.get("output"),
        body.get("raw"),
        as_object(body.get("last_executed_task")).get("output"),
    ]


def output_of(body: Mapping[str, Any], data: Any) -> str:
    """Return the text of a completed run, "" where the server left it empty. `data` is its structured result."""
    places = _output_places(body)
    for text in filled_texts(places):
        return text
    for value in (*places, data):
        if value is not None and not isinstance(value, str) and (text := to_json(value)):
            return text
    return next((value for value in places if isinstance(value, str)), "")


def data_of(body: Mapping[str, Any]) -> Any:
    """Return the structured result of a completed run, or None."""
    result = body.get("result")
    inner = as_object(result)
    places = [body.get("result_json"), inner.get("json_dict"), inner.get("pydantic"), body.get("output_json")]
    values = [structured(value) for value in places]
    values += [value for value in (inner.get("output"), body.get("output")) if isinstance(value, (dict, list))]
    if not isinstance(result, str) and not (inner.keys() & _RESULT_KEYS):
        values.append(result)
    values += [structured(text) for text in filled_texts(_output_places(body))]
    given = [value for value in values if value is not None]
    # An empty object in a preferred place says less than a full one in a later place.
    return next((value for value in given if value not in ({}, [])), given[0] if given else None)


def structured(value: Any) -> Any:
    """Return a structure as it is, and one that is written as text (in a code fence or not) decoded."""
    if not isinstance(value, str):
        return value
    return try_json(_without_fence(value.strip()))


def _without_fence(text: str) -> str:
    """Return what stands in a code fence if a text is one, else the text. No pattern: models write endless blanks."""
    if not text.startswith("```"):
        return text
    info, line_break, inside = text[3:].partition("\n")
    return inside[:-3].strip() if line_break and "`" not in info and inside.endswith("```") else text


def tasks_of(body: Mapping[str, Any]) -> list[TaskResult]:
    """Return the tasks that ended, in the server's order."""
    inner = as_object(body.get("result"))
    for items in (*(inner.get(key) for key in _TASK_LISTS), *(body.get(key) for key in _TASK_LISTS)):
        if isinstance(items, list) and items:
            return [task for task in map(_task, cast("list[Any]", items)) if task]
    return []


def _task(item: Any) -> TaskResult | None:
    if isinstance(item, str):
        return TaskResult(output=text_of(item), raw=item)
    if not isinstance(item, Mapping):
        return None
    task = as_object(item)
    output = first(task, ("output", "raw", "result", "summary"))
    data = first(task, ("output_json", "json_dict", "pydantic"))
    return TaskResult(
        name=named(task),
        agent=agent_of(task),
        output=text_of(output),
        data=structured(data) if data is not None else structured(output),
        execution_time=seconds_of(task),
        description=as_text(task.get("description")),
        raw=item,
    )


def named(value: Any, keys: Iterable[str] = ("task_id", "name", "task_name")) -> str | None:
    """Return the name in `value`: itself if it is text, else the first of `keys` that holds one."""
    if isinstance(value, str):
        return as_text(value)
    source = as_object(value)
    for key in keys:
        name = source.get(key)
        if isinstance(name, (str, int)) and not isinstance(name, bool) and (text := text_of(name)):
            return text
    return None


def agent_of(body: Mapping[str, Any]) -> str | None:
    """Return the agent's name, given as text or as an object with a role or a name."""
    return named(body.get("agent"), ("role", "name", "id"))


def seconds_of(body: Mapping[str, Any]) -> float | None:
    """Return `execution_time` in seconds, or None."""
    number = as_number(body.get("execution_time"))
    return number if number is not None and number >= 0 else None


def usage_of(body: Mapping[str, Any]) -> TokenUsage | None:
    """Return the tokens used, or None where nothing was reported."""
    inner = as_object(body.get("result"))
    for source in (as_object(body.get("token_usage")), as_object(inner.get("token_usage"))):
        counts = {key: count for key in _COUNTS if source and (count := as_count(source.get(key))) is not None}
        if counts:
            return TokenUsage(**counts)
    return None


def error_of(body: Mapping[str, Any], state: CrewState) -> str | None:
    """Return why a run failed or was stopped. What a failed run has as its result is its error, and never a result."""
    for key in ("error", "error_message", "detail"):
        if text := error_text(body.get(key)):
            return text
    if state is not CrewState.FAILED:
        return None
    inner = as_object(body.get("result"))
    if text := error_text(inner.get("error")):
        return text
    if text := error_text(body.get("message")):
        return text
    if text := _status_sentence(body):
        return text
    for value in (*(inner.get(key) for key in _TEXT_KEYS), body.get("result"), body.get("output")):
        if text := error_text(value):
            return text
    return None


def error_text(value: Any, depth: int = _DEPTH) -> str | None:
    """Return the text of an error that is text, an object with a message, or a list of either."""
    if isinstance(value, str):
        return as_text(value)
    if value is None or isinstance(value, bool) or not value:
        return None
    if isinstance(value, list) and depth:
        texts = filled_texts(error_text(item, depth - 1) for item in cast("list[Any]", value))
        return "; ".join(texts) or to_json(value)
    if isinstance(value, Mapping) and depth:
        source = as_object(value)
        for key in ("message", "msg", "error", "detail", "reason", "description", "title"):
            if text := error_text(source.get(key), depth - 1):
                return f"{where}: {text}" if key == "msg" and (where := _location(source)) else text
    return to_json(value)


def _location(source: Mapping[str, Any]) -> str:
    """Return where a FastAPI validation error stands, as `body.inputs.budget`."""
    loc = source.get("loc")
    return ".".join(filled_texts(str(part) for part in cast("list[Any]", loc))) if isinstance(loc, list) else ""
