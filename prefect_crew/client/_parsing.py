"""Parsers: they turn the answers of a crew's server, in any response format, into one set of models.

They are pure functions of any JSON value, and linear in its size. They return None for a value in no known format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar, cast

from prefect_crew.client.models import (
    CrewInput,
    CrewStatus,
    ResumeAnswer,
    StopAnswer,
    StopOutcome,
    TaskResult,
    TokenUsage,
)
from prefect_crew.states import CrewState, known_state

T = TypeVar("T")

# JSON

MAX_CONTAINERS = 2_000_000
"""The most lists and objects in a body. Each takes up to 200 bytes of memory, and only two bytes of text."""
MAX_DEPTH = 100
"""The most levels of a structured result: pydantic writes about 250, so a much deeper result could not be stored."""
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def decode(text: str) -> Any:
    """Return the JSON value of a text; None for a blank text, and the text itself if it is no JSON, nests too deeply or
    is too large."""
    # Brackets in texts count as well: a text may contain JSON, which is then parsed too.
    if len(text) > MAX_CONTAINERS and text.count("[") + text.count("{") > MAX_CONTAINERS:
        return text
    try:
        # Numbers that JSON does not have, and numbers that no float holds, become null.
        value = json.loads(
            text.removeprefix("\ufeff"),
            parse_constant=lambda _: None,
            parse_float=lambda digits: number if math.isfinite(number := float(digits)) else None,
        )
    except (ValueError, RecursionError):
        return text if text.strip() else None
    if not _SURROGATE_ESCAPE.search(text):  # decoded text can get a lone surrogate only from an escape
        return value
    whole = json.dumps(value, ensure_ascii=False).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return json.loads(whole)


def _structured(value: Any) -> Any:
    """Return a list or an object as it is, or decode it from text (with or without a code fence).

    Return None for text that is neither, and for a value of more than `MAX_DEPTH` levels.
    """
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("```"):  # no regular expression: models write endless blanks, which make it slow
            info, line_break, inside = text[3:].partition("\n")
            text = inside[:-3].strip() if line_break and "`" not in info and inside.endswith("```") else text
        if text[:1] not in ("{", "[") or isinstance(value := decode(text), str):  # a bare number or word is text
            return None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for part in level for item in (*as_object(part).values(), *as_list(part))]
    return None if level else value


# Values: each function returns a value of its type, or None or an empty one

RUN_KEYS = ("kickoff_id", "kickoffId", "execution_id", "executionId")
"""Keys that hold the id of a run in every answer and webhook."""
MAX_ID = 1000
"""The most characters of an id. A longer one fits neither a URL nor the crew database."""
MAX_COUNT = 10**12
"""A larger count counts as not reported, so that sums over millions of runs fit into the 64 bits of databases."""


def as_object(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return `value` if it is a JSON list, else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def as_text(value: Any) -> str | None:
    """Return `value` if it is text and not blank, else None."""
    return value if isinstance(value, str) and value.strip() else None


def as_id(value: Any) -> str | None:
    """Return `value` as an id, or None if it cannot be an id. A number can be an id, a boolean cannot."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 2**63 else None
    text = as_text(value)
    # If decoding has replaced a character, the id is not the server's id.
    return text if text and len(text) <= MAX_ID and "\ufffd" not in text else None


def as_number(value: Any) -> float | None:
    """Return a finite number of at least 0, also from text."""
    if isinstance(value, bool) or (isinstance(value, str) and len(value) > 40):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < math.inf else None


def _as_count(value: Any) -> int | None:
    number = as_number(value)
    return int(number) if number is not None and number.is_integer() and number <= MAX_COUNT else None


def text_of(value: Any) -> str | None:
    """Return text unchanged and other values as JSON; None for null, blank text and values that nest too deeply."""
    if value is None or isinstance(value, str):
        return as_text(value)
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        return None


def values_at(value: Any, *paths: str) -> Iterator[Any]:
    """Yield the values at some paths of an object, such as `result.output`, without missing ones and null."""
    for path in paths:
        place = value
        for key in path.split("."):
            place = cast("dict[str, Any]", place).get(key) if isinstance(place, dict) else None
        if place is not None:
            yield place


def pick(read: Callable[[Any], T | None], value: Any, *paths: str) -> T | None:
    """Return the first result of `read` for the values at these paths that is not None."""
    return next((result for raw in values_at(value, *paths) if (result := read(raw)) is not None), None)


# Errors

DOCUMENTED_FIELDS = frozenset({"execution_id", "task_id", "human_feedback", "is_approve", "humanInputWebhook"})
LIVE_FIELDS = frozenset({"executionId", "taskId", "humanFeedback", "isApprove", "humanInputWebhookUrl"})
"""The fields of `/resume` in the two spellings: of the documentation, and of hosted crews."""
_MISSING = "Missing inputs: "
"""The beginning of a hosted crew's refusal, before the names."""


def parse_error(text: str) -> tuple[str | None, list[str]]:
    """Return the message and the missing inputs in the body of an error. Never raises."""
    if (body := decode(text)) is text:  # no JSON: nobody reads a web page in a message
        return None, []
    parts = (pick(error_text, body, key) for key in ("error", "message", "detail"))
    message = ": ".join(dict.fromkeys(filter(None, parts))) or error_text(body)
    places = (f"{place}missing_inputs" for place in ("details.", "", "detail.", "detail.details."))
    listed = as_list(next(values_at(body, *places), None))
    if not listed and (sentence := pick(as_text, body, "detail") or "").startswith(_MISSING):
        listed = [name.strip() for name in sentence.removeprefix(_MISSING).split(",")]
    return message, list(dict.fromkeys(filter(None, map(as_text, listed))))


def error_text(value: Any, depth: int = 5) -> str | None:
    """Return the text of an error. It may be a text, an object with a message, or a list of these."""
    if isinstance(value, str):
        return as_text(value)
    if not value or value is True:
        return None
    if isinstance(value, list) and depth:
        return "; ".join(filter(None, (error_text(item, depth - 1) for item in as_list(value)))) or text_of(value)
    source = as_object(value) if depth else {}
    for key in ("message", "msg", "error", "detail", "title"):
        if text := error_text(source.get(key), depth - 1):
            # The location in a validation error of FastAPI, such as `body.inputs.budget`.
            where = ".".join(map(str, as_list(source.get("loc")))) if key == "msg" else ""
            return f"{where}: {text}" if where else text
    return text_of(value)


def other_spelling(text: str) -> frozenset[str]:
    """Return the fields of `/resume` in the spelling that a server's validation refuses.

    The source is FastAPI, which answers with a list of `{"loc": ["body", NAME], …}` before it does anything. Any other
    answer gives no names.
    """
    unwanted = set[frozenset[str]]()
    for problem in map(as_object, as_list(as_object(decode(text)).get("detail"))):
        match problem.get("loc"):
            case ["body", str(name)] if name in DOCUMENTED_FIELDS | LIVE_FIELDS:
                is_asked_for = "missing" in f"{problem.get('type')}" or "required" in f"{problem.get('msg')}"
                unwanted.add(DOCUMENTED_FIELDS if (name in LIVE_FIELDS) == is_asked_for else LIVE_FIELDS)
            case _:
                return frozenset()
    return unwanted.pop() if len(unwanted) == 1 else frozenset()


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header: 0.0 for a time in the past, None for no usable value."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = (parsedate_to_datetime((value or "")[:100]) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError, IndexError):  # TypeError: a date without a zone
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


# Parts of a status and of webhooks

_IN_RESULT = ("result.output", "result.raw", "result.result")
_OUTPUT = ("result", *_IN_RESULT, "output", "raw", "last_executed_task.output")
_DATA = ("result_json", "result.json_dict", "result.pydantic", "output_json")
_TASK_LISTS = ("tasks", "tasks_output", "task_outputs")
_TASKS = (*(f"result.{key}" for key in _TASK_LISTS), *_TASK_LISTS)
AGENT = ("agent", "agent.role", "agent.name", "agent.id")
SECONDS = "execution_time"
USAGE = ("token_usage", "usage_metrics", "result.token_usage")
_RESULT_KEYS = {"output", "raw", "result", *_TASK_LISTS, "json_dict", "pydantic", "token_usage"}
"""With one of these keys, the object under `result` is an envelope of the result and not the result itself."""
_ERROR_KEYS = {"error", "error_message", "message", "detail", "details", "type", "code", "status", "state", "traceback"}


class StateWord(NamedTuple):
    """The server's word for the state of a run; `state` is None for an unknown word.

    `sentence` is the `status`, if there is a `state` too and `status` is a sentence for people.
    """

    word: str
    state: CrewState | None
    sentence: str | None


def state_of(body: Mapping[str, Any]) -> StateWord | None:
    """Return the state from `state`, else `status`; None if neither is a word."""
    word, status = as_text(body.get("state")), as_text(body.get("status"))
    sentence = status if word and status and known_state(status) is None else None
    word = word or status
    return StateWord(word, known_state(word), sentence) if word else None


def _agreed_state(body: Mapping[str, Any], state: CrewState) -> CrewState:
    """Return the state that fits all parts of a status, since a run with an error in its status has not completed."""
    if state is not CrewState.COMPLETED:
        return state
    status, inner = as_text(body.get("status")) or "", as_object(body.get("result"))
    word, colon, _ = status.partition(":")  # "error: task 2 failed" next to a `state`
    if (other := known_state(word if colon else status)) in (CrewState.FAILED, CrewState.STOPPED):
        return other or state
    # An error next to a result contradicts the result. The `result` itself may also be only an error.
    has_error = inner.keys() <= _ERROR_KEYS | _RESULT_KEYS and pick(error_text, inner, "error")
    return CrewState.FAILED if has_error or pick(error_text, body, "error", "error_message") else state


def _result_of(body: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the text of a completed run, "" if the server left it empty, and its structured result, or None.

    Fields for structured results come first, then texts that contain JSON.
    """
    result = body.get("result")
    is_envelope = bool(as_object(result).keys() & _RESULT_KEYS)
    places = [value for value in values_at(body, *_OUTPUT) if not (is_envelope and value is result)]
    structures = [data for data in map(_structured, [*values_at(body, *_DATA), *places]) if data is not None]
    # A full object in a later place is better than an empty one in an earlier place.
    data = next((value for value in structures if value not in ({}, [])), structures[0] if structures else None)
    texts = [value for value in places if isinstance(value, str)]
    others = (text_of(value) for value in (*places, data) if not isinstance(value, str))
    return next(filter(None, (*map(as_text, texts), *others)), None) or next(iter(texts), ""), data


def _tasks_of(body: Mapping[str, Any]) -> list[TaskResult]:
    """Return the ended tasks, in the server's order. An item is an object, or the text of its output."""
    tasks: list[TaskResult] = []
    for item in pick(lambda value: as_list(value) or None, body, *_TASKS) or []:
        if not isinstance(item, str | dict):
            continue
        task = {"output": item} if isinstance(item, str) else as_object(item)
        output = next(values_at(task, "output", "raw", "result", "summary"), None)
        fields: dict[str, Any] = {
            "name": pick(as_id, task, "task_id", "name", "task_name"),
            "agent": pick(as_id, task, *AGENT),
            "output": text_of(output),
            "data": _structured(next(values_at(task, "output_json", "json_dict", "pydantic"), output)),
            "execution_time": pick(as_number, task, SECONDS),
            "description": pick(as_text, task, "description"),
        }
        tasks.append(TaskResult(**fields, raw=item))
    return tasks


def tokens_of(value: Any) -> TokenUsage | None:
    """Return the token counts in an object, None if it has none."""
    counts = {name: pick(_as_count, value, name) for name in TokenUsage.model_fields}
    prompt, completion = counts["prompt_tokens"], counts["completion_tokens"]
    if counts["total_tokens"] is None and prompt is not None and completion is not None:
        counts["total_tokens"] = prompt + completion
    return TokenUsage(**counts) if any(count is not None for count in counts.values()) else None


def _error_of(body: Mapping[str, Any], state: CrewState, sentence: str | None) -> str | None:
    """Return the reason why a run failed or was stopped. If a failed run has only a result, that is its error."""
    error = pick(error_text, body, "error", "error_message", "detail")
    if error or state is not CrewState.FAILED:
        return error
    error = pick(error_text, body, "result.error", "message") or sentence
    return error or pick(error_text, body, *_IN_RESULT, "result", "output")


def _progress(source: Mapping[str, Any]) -> tuple[int | None, int | None, float | None]:
    """Return the number of completed tasks, the number of all tasks, and the fraction 0..1."""
    completed = pick(_as_count, source, "progress.completed_tasks", "progress.completed")
    total = pick(_as_count, source, "progress.total_tasks", "progress.total")
    if completed is not None and total:
        return completed, total, min(completed / total, 1.0)
    number = pick(as_number, source, "progress.progress", "progress.percentage", "progress.percent", "progress")
    if number is None or number > 100:
        return completed, total, None
    return completed, total, number if number <= 1 else number / 100


# Answers

_TASK_KEYS = ("name", "task_name", "task_id", "id", "description")
_CURRENT_TASK = ("current_task", *(f"current_task.{key}" for key in _TASK_KEYS), "progress.current")
_LAST_TASK = ("last_executed_task", *(f"last_executed_task.{key}" for key in _TASK_KEYS))
_STEP_KEYS = ("description", "thought", "content", "text", "output", "result", "prompt", "name", "tool")
_LAST_STEP = (*(f"last_step.{key}" for key in _STEP_KEYS), "last_step")
_TASK_IDS = ("human_task_id", "task_id", "taskId")
_HUMAN_TASK = tuple(f"{part}{key}" for part in ("", "human_input.", "current_task.") for key in _TASK_IDS)
_HUMAN_OUTPUT = tuple(
    f"{part}{key}" for part in ("human_input.", "current_task.", "") for key in ("task_output", "output", "prompt")
)
_KEY = ("meta.idempotency_key", "last_executed_task.meta.idempotency_key")


def parse_inputs(value: Any) -> list[CrewInput] | None:
    """Return the inputs in an answer of `GET /inputs`, in its order, each once; None for an answer in any other form.

    Accepted under `inputs`: a list of names, a list of `{name, type, required, description, default}`, an object of
    name to description (or to such an object), null for no inputs; and a bare list. `required_inputs` has the same
    forms: with it, an input that it does not name is optional.
    """
    source = as_object(value)
    listed = source.get("required_inputs")
    items, needed = _items(value if isinstance(value, list) else source.get("inputs", "")), _items(listed)
    if items is None or needed is None or not all(as_text(item.get("name")) for item in (*items, *needed)):
        return None
    required = {item["name"] for item in needed}
    inputs: dict[str, CrewInput] = {}
    for item in (*items, *needed):
        name, default, word = item["name"], item.get("default"), item.get("required")
        # Any value but a clear "no" means required: to ask for one input too many is the smaller mistake.
        is_required = listed is None and default is None if word is None else f"{word}".strip().casefold() != "false"
        facts = {"type": as_text(item.get("type")), "description": as_text(item.get("description"))}
        is_required = is_required or name in required
        inputs.setdefault(name, CrewInput(name=name, required=is_required, default=default, **facts))
    return list(inputs.values())


def _items(value: Any) -> list[dict[str, Any]] | None:
    """Return a list of inputs, in any of its forms, as objects; None if the value is no such list."""
    if isinstance(value, dict):
        pairs = as_object(value).items()
        return [{**(about if isinstance(about, dict) else {"description": about}), "name": key} for key, about in pairs]
    if value is not None and not isinstance(value, list):
        return None
    return [{"name": item} if isinstance(item, str) else as_object(item) for item in as_list(value)]


def parse_kickoff(value: Any) -> str | None:
    """Return the id of the run that a kickoff started."""
    # Only here `task_id` is the id of the run; everywhere else it names a task.
    kickoff_id = pick(as_id, value, *RUN_KEYS, "id", "task_id")
    # The id goes into logs, commands and the crew database, where a line break or an escape sequence would do harm.
    return kickoff_id if kickoff_id is not None and kickoff_id.isprintable() else None


def parse_status(value: Any, kickoff_id: str) -> CrewStatus | None:
    """Return the status of run `kickoff_id`, None if the body has no state or is the status of another run.

    Only a completed run gets output and data, and only a failed or stopped one an error, even if the body has more. A
    body without a state says nothing about the run, even with a result, because every known server sends a state.
    """
    source = as_object(value)
    state_word = state_of(source)
    ids = {own.casefold() for key in RUN_KEYS if (own := as_id(source.get(key)))}
    if state_word is None or (ids and kickoff_id.casefold() not in ids):
        return None
    state = _agreed_state(source, state_word.state or CrewState.RUNNING)
    completed, total, progress = _progress(source)
    output, data = _result_of(source) if state is CrewState.COMPLETED else (None, None)
    has_failed = state in (CrewState.FAILED, CrewState.STOPPED)
    fields: dict[str, Any] = {
        "kickoff_id": kickoff_id,
        "state": state,
        "raw_state": state_word.word,
        "known_state": state_word.state is not None,
        "message": state_word.sentence or as_text(source.get("message")),
        "current_task": pick(as_text, source, *_CURRENT_TASK),
        "last_task": pick(as_text, source, *_LAST_TASK),
        "last_step": pick(text_of, source, *_LAST_STEP),
        "completed_tasks": completed,
        "total_tasks": total,
        "progress": progress,
        "human_task_id": pick(as_id, source, *_HUMAN_TASK) if state is CrewState.WAITING else None,
        "tasks": _tasks_of(source),
        "output": output,
        "data": data,
        "error": _error_of(source, state, state_word.sentence) if has_failed else None,
        "execution_time": pick(as_number, source, SECONDS),
        "usage": pick(tokens_of, source, *USAGE),
        "idempotency_key": pick(as_text, source, *_KEY),
        "raw": value,
    }
    # Without missing fields, to save memory: each wait keeps its last status, and pydantic keeps the names of set
    # fields.
    return CrewStatus(**{name: value for name, value in fields.items() if value is not None})


def waiting_output(raw: Any) -> str | None:
    """Return the output for review in the status of a run that waits for a person, or None."""
    last = as_object(as_object(raw).get("last_executed_task"))
    waits = pick(as_id, raw, *_HUMAN_TASK, "current_task")
    # The output of another task is not for review.
    is_last = waits in (None, pick(as_id, last, *_TASK_IDS), last.get("name"))
    return pick(text_of, raw, *_HUMAN_OUTPUT) or (text_of(last.get("output")) if is_last else None)


def parse_resume(value: Any) -> ResumeAnswer | None:
    """Return the server's answer to an accepted resume (2xx): `{status, message}`, an id, or an empty body."""
    status, message = pick(as_text, value, "status"), pick(as_text, value, "message")
    kickoff_id = pick(as_id, value, *RUN_KEYS)
    is_error = status is None and bool(pick(error_text, value, "error"))
    if not isinstance(value, dict | None) or is_error or not (kickoff_id or "").isprintable():
        return None
    return ResumeAnswer(kickoff_id=kickoff_id, status=status, message=message)


_CURRENT_STATE = re.compile(r"current state:?\s*['\"]?([A-Za-z][A-Za-z _-]*)", re.IGNORECASE)
_NO_RUN = re.compile(r"\b(execution|kickoff|run|id)\b", re.IGNORECASE)
_STOP_OUTCOMES = {
    CrewState.STOPPED: StopOutcome.STOPPED,
    CrewState.COMPLETED: StopOutcome.NOT_STOPPABLE,
    CrewState.FAILED: StopOutcome.NOT_STOPPABLE,
    CrewState.UNKNOWN: StopOutcome.UNKNOWN_RUN,
}


def parse_stop(value: Any, kickoff_id: str) -> StopAnswer | None:
    """Return the server's answer to an accepted `/stop` (2xx)."""
    if not isinstance(value, dict | None):
        return None
    word, state, sentence = state_of(as_object(value)) or (None, None, None)
    outcome = _STOP_OUTCOMES.get(state, StopOutcome.REQUESTED) if state else StopOutcome.REQUESTED
    message = sentence or pick(as_text, value, "message")
    return StopAnswer(kickoff_id=kickoff_id, outcome=outcome, state=state, raw_state=word, message=message)


def parse_refused_stop(text: str, kickoff_id: str, status_code: int) -> StopAnswer | None:
    """Return the answer to a `/stop` that the server refused, None for an error of another kind.

    A 404 means that the server has no `/stop`, unless its `error` or `detail` mentions a run: web frameworks only say
    "Not Found".
    """
    message = parse_error(text)[0]
    if status_code in (400, 409) and (match := _CURRENT_STATE.search(message or text)):
        word, outcome = match.group(1).strip(), StopOutcome.NOT_STOPPABLE
        state = known_state(word)
        return StopAnswer(kickoff_id=kickoff_id, outcome=outcome, state=state, raw_state=word, message=message)
    if status_code not in (404, 405, 410, 501):
        return None
    words = " ".join(part for part in values_at(decode(text), "error", "detail") if isinstance(part, str))
    is_unknown = status_code == 410 or (status_code == 404 and (_NO_RUN.search(words) or kickoff_id in words))
    outcome = StopOutcome.UNKNOWN_RUN if is_unknown else StopOutcome.UNSUPPORTED
    return StopAnswer(kickoff_id=kickoff_id, outcome=outcome, message=message)
