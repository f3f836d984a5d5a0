"""From what a crew's server sends to one model, whatever response format it uses. Pure functions.

Bodies are bytes from a server: JSON that may be anything. Every parser is linear in their size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, cast

from prefect_crew._text import EXCERPT
from prefect_crew.client.models import (
    CrewInput,
    CrewStatus,
    ResumeAnswer,
    StopAnswer,
    StopOutcome,
    TaskResult,
    TokenUsage,
)
from prefect_crew.exceptions import ResponseFormatError
from prefect_crew.states import CrewState, known_state

# JSON

MAX_CONTAINERS = 2_000_000
"""Lists and objects of a body. Each takes up to 200 bytes of memory where its text takes two."""
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def decode(body: bytes | str, *, expected: str, kickoff_id: str | None = None) -> Any:
    """Return the JSON value of a body.

    Raises:
        ResponseFormatError: It is not JSON, nests too deeply, or has too many lists and objects.
    """
    try:
        return _loads(body if isinstance(body, str) else body.decode(json.detect_encoding(body), "replace"))
    except (ValueError, RecursionError):
        raise _unexpected(body, expected, kickoff_id) from None


def _loads(text: str) -> Any:
    # Brackets in texts count as well: a text may be JSON, and is then parsed by itself.
    if len(text) > MAX_CONTAINERS and text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise ValueError
    value = json.loads(text.removeprefix("\ufeff"), parse_constant=lambda _: None, parse_float=_finite)
    if _SURROGATE_ESCAPE.search(text):  # only an escape can smuggle half a pair into decoded text
        return json.loads(clean(json.dumps(value, ensure_ascii=False)))
    return value


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def clean(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates replaced, so that it can be encoded."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def shown(body: bytes | str) -> str:
    """Return the start of a body that an error may show."""
    return body[: 4 * EXCERPT].decode("utf-8", "replace") if isinstance(body, bytes) else clean(body[: 4 * EXCERPT])


def _unexpected(body: bytes | str, expected: str, kickoff_id: str | None = None) -> ResponseFormatError:
    return ResponseFormatError(expected=expected, body=shown(body), kickoff_id=kickoff_id)


# Values

RUN_KEYS = ("kickoff_id", "kickoffId", "execution_id", "executionId")
"""Keys that name a run everywhere."""
MAX_ID = 1000
"""Characters of a usable id. Longer ones fit neither a URL nor the record of a run."""
MAX_COUNT = 2**63 - 1


def as_object(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return `value` if it is a JSON list, else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def as_text(value: Any) -> str | None:
    """Return `value` if it is text with something in it, else None."""
    return value if isinstance(value, str) and value.strip() else None


def as_id(value: Any) -> str | None:
    """Return `value` as an id, or None where it can be none. A number is one, a truth value is not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) <= MAX_COUNT else None
    # An id in which a character had to be replaced is another id.
    return (
        value if isinstance(value, str) and value.strip() and len(value) <= MAX_ID and "\ufffd" not in value else None
    )


def as_number(value: Any) -> float | None:
    """Return `value` as a finite number, or None. Text that is a number is one."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | str)
        or (isinstance(value, str) and len(value) > 40)
    ):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_count(value: Any) -> int | None:
    """Return `value` as a whole number from 0 on, or None."""
    number = as_number(value)
    return int(number) if number is not None and 0 <= number <= MAX_COUNT and number == int(number) else None


def first(source: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the first value under one of `keys` that is not null, else None."""
    return next((source[key] for key in keys if source.get(key) is not None), None)


def id_of(source: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """Return the first usable id under one of `keys`, else None."""
    return next((found for key in keys if (found := as_id(source.get(key)))), None)


def _texts(values: Iterable[Any]) -> Iterator[str]:
    return (text for text in map(as_text, values) if text is not None)


def _to_json(value: Any) -> str | None:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        return None


def text_of(value: Any) -> str | None:
    """Return text as it is, structure and numbers as JSON, null as None."""
    return as_text(value) if value is None or isinstance(value, str) else _to_json(value)


def _structured(value: Any) -> Any:
    """Return a structure as it is, and one that is written as text (in a code fence or not) decoded."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("```"):  # no pattern: models write endless blanks
        info, line_break, inside = text[3:].partition("\n")
        text = inside[:-3].strip() if line_break and "`" not in info and inside.endswith("```") else text
    if text[:1] not in ("{", "["):  # a bare number or word is text
        return None
    try:
        return _loads(text)
    except (ValueError, RecursionError):
        return None


_NAME_KEYS = ("task_id", "name", "task_name")


def name_of(value: Any, keys: Iterable[str] = _NAME_KEYS) -> str | None:
    """Return text as it is, and of an object the first of `keys` that holds a name."""
    if isinstance(value, str):
        return as_text(value)
    names = (as_object(value).get(key) for key in keys)
    return next(_texts(str(name) for name in names if isinstance(name, str | int) and not isinstance(name, bool)), None)


# Errors


class ErrorFacts(NamedTuple):
    """What an error answer says.

    `title` is the short error and `message` the long one, as far as there are any; `retry_after` the seconds that the
    server asks to wait; `raw` the body as JSON, None where it is none.
    """

    title: str | None = None
    message: str | None = None
    missing_inputs: tuple[str, ...] = ()
    retry_after: float | None = None
    body: str = ""
    raw: Any = None


_HTML = re.compile(r"\A\s*<(?:!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
_LONG = 2000
"""Characters of a title or message, at most: a plain text body is all message, and may be anything."""


def parse_error(text: str, headers: Mapping[str, str] | None = None, *, now: datetime | None = None) -> ErrorFacts:
    """Return the facts of an error answer, of its body and its headers. Never raises.

    `now` is the clock against which a `Retry-After` that is a date counts.
    """
    text = clean(text)
    retry_after = parse_retry_after(headers or {}, now=now)
    try:
        raw = _loads(text)
    except (ValueError, RecursionError):
        message = None if _HTML.match(text) else as_text(text[:_LONG])
        return ErrorFacts(None, message, (), retry_after, text)
    title, message = (part and as_text(part[:_LONG]) for part in _title_and_message(raw))
    return ErrorFacts(title, message, tuple(_missing_inputs(raw)), retry_after, text, raw)


def _title_and_message(raw: Any) -> tuple[str | None, str | None]:
    source = as_object(raw)
    if not source:
        return None, error_text(raw)
    detail = source.get("detail")
    if isinstance(detail, dict) and not source.keys() & {"error", "message"}:
        return _title_and_message({**as_object(detail), "detail": None})
    title, message = error_text(source.get("error")), error_text(source.get("message"))
    return title, message or error_text(detail) or (None if title else error_text(source))


def _missing_inputs(raw: Any) -> Iterable[str]:
    """Return `missing_inputs` from wherever servers put it, or FastAPI's list of missing fields."""
    source = as_object(raw)
    detail = as_object(source.get("detail"))
    for place in (as_object(source.get("details")), source, detail, as_object(detail.get("details"))):
        if isinstance(place.get("missing_inputs"), list):
            return dict.fromkeys(_texts(as_list(place["missing_inputs"])))
    fields = [as_object(item) for item in as_list(source.get("detail"))]
    paths = [as_list(field.get("loc")) for field in fields if field.get("type") == "missing"]
    return _texts(path[-1] for path in paths if "inputs" in path[:-1])


def parse_retry_after(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """Return the seconds that `Retry-After` asks for, 0.0 for a time that has passed, None where it says nothing."""
    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    try:
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max((when - (now or datetime.now(UTC))).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def error_text(value: Any, depth: int = 5) -> str | None:
    """Return the text of an error that is text, an object with a message, or a list of either."""
    if isinstance(value, str):
        return as_text(value)
    if value is None or isinstance(value, bool) or not value:
        return None
    if isinstance(value, list) and depth:
        return "; ".join(_texts(error_text(item, depth - 1) for item in as_list(value))) or _to_json(value)
    if isinstance(value, dict) and depth:
        source = as_object(value)
        for key in ("message", "msg", "error", "detail", "reason", "description", "title"):
            if text := error_text(source.get(key), depth - 1):
                # Where a validation error of FastAPI stands: `body.inputs.budget`.
                where = ".".join(_texts(map(str, as_list(source.get("loc"))))) if key == "msg" else ""
                return f"{where}: {text}" if where else text
    return _to_json(value)


# Parts of a status and of webhooks

_TEXT_KEYS = ("output", "raw", "result")
_TASK_LISTS = ("tasks", "tasks_output", "task_outputs")
_RESULT_KEYS = {*_TEXT_KEYS, *_TASK_LISTS, "json_dict", "pydantic", "token_usage"}
"""Keys that make an object under `result` a wrapping of the result rather than the result itself."""
_ERROR_KEYS = {"error", "error_message", "message", "detail", "details", "type", "code", "status", "state", "traceback"}


class _State(NamedTuple):
    state: CrewState
    word: str
    is_known: bool


def state_of(body: Mapping[str, Any]) -> _State | None:
    """Return the state: `state` before `status`. None where neither is a word; an unknown word counts as running."""
    word = as_text(body.get("state")) or as_text(body.get("status"))
    if word is None:
        return None
    state = known_state(word)
    return _State(state or CrewState.RUNNING, word, state is not None)


def _agreed_state(body: Mapping[str, Any], state: CrewState) -> CrewState:
    """Return the state on which all of a status agrees: what is said to have failed has not completed.

    Completed contradicts a `status` next to `state` that means failed or stopped, an error where there is no result,
    and
    a result that is an error and nothing else.
    """
    if state is not CrewState.COMPLETED:
        return state
    other = known_state(as_text(body.get("status")) or "")
    if other is CrewState.FAILED or other is CrewState.STOPPED:
        return other
    inner = as_object(body.get("result"))
    if error_text(inner.get("error")) and inner.keys() <= _ERROR_KEYS:
        return CrewState.FAILED
    if error_text(body.get("error")) or error_text(body.get("error_message")):
        # What the last task wrote is not a result of a run that names its error.
        own = {key: value for key, value in body.items() if key != "last_executed_task"}
        data = _data_of(own)
        if data is None and not _output_of(own, data):
            return CrewState.FAILED
    return CrewState.COMPLETED


def _sentence(body: Mapping[str, Any]) -> str | None:
    """Return a `status` that is a sentence for people next to a `state`."""
    status = as_text(body.get("status"))
    return status if status and as_text(body.get("state")) and known_state(status) is None else None


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


def _output_of(body: Mapping[str, Any], data: Any) -> str:
    """Return the text of a completed run, "" where the server left it empty. `data` is its structured result."""
    places = _output_places(body)
    values = (value for value in (*places, data) if value is not None and not isinstance(value, str))
    found = next(_texts(places), None) or next(filter(None, map(_to_json, values)), None)
    return found or next((value for value in places if isinstance(value, str)), "")


def _data_of(body: Mapping[str, Any]) -> Any:
    """Return the structured result of a completed run, or None."""
    result = body.get("result")
    inner = as_object(result)
    places = (body.get("result_json"), inner.get("json_dict"), inner.get("pydantic"), body.get("output_json"))
    values = [_structured(value) for value in places]
    values += [value for value in (inner.get("output"), body.get("output")) if isinstance(value, dict | list)]
    if not isinstance(result, str) and not (inner.keys() & _RESULT_KEYS):
        values.append(result)
    values += [_structured(text) for text in _texts(_output_places(body))]
    given = [value for value in values if value is not None]
    # An empty object in a preferred place says less than a full one in a later place.
    return next((value for value in given if value not in ({}, [])), given[0] if given else None)


def _tasks_of(body: Mapping[str, Any]) -> list[TaskResult]:
    """Return the tasks that ended, in the server's order."""
    sources = (as_object(body.get("result")), body)
    lists = (as_list(source.get(key)) for source in sources for key in _TASK_LISTS)
    return [task for task in map(_task, next(filter(None, lists), list[Any]())) if task]


def _task(item: Any) -> TaskResult | None:
    if isinstance(item, str):
        return TaskResult(output=as_text(item), raw=item)
    if not isinstance(item, dict):
        return None
    task = as_object(item)
    output, data = (
        first(task, ("output", "raw", "result", "summary")),
        first(task, ("output_json", "json_dict", "pydantic")),
    )
    return TaskResult(
        name=name_of(task),
        agent=agent_of(task),
        output=text_of(output),
        data=_structured(data if data is not None else output),
        execution_time=seconds_of(task),
        description=as_text(task.get("description")),
        raw=item,
    )


def agent_of(body: Mapping[str, Any]) -> str | None:
    return name_of(body.get("agent"), ("role", "name", "id"))


def seconds_of(body: Mapping[str, Any]) -> float | None:
    number = as_number(body.get("execution_time"))
    return number if number is not None and number >= 0 else None


_OTHER_COUNTS = {
    "prompt_tokens": "input_tokens",
    "completion_tokens": "output_tokens",
    "cached_prompt_tokens": "cache_read_input_tokens",
}
"""What providers of models call the counts, in events of single calls."""


MOST_TOKENS = 10**12
"""More are taken for not reported: sums over millions of runs stay within the 64 bits that databases have."""


def usage_of(body: Mapping[str, Any]) -> TokenUsage | None:
    """Return the tokens used, None where nothing was reported."""
    return tokens_of(body.get("token_usage")) or tokens_of(as_object(body.get("result")).get("token_usage"))


def tokens_of(value: Any) -> TokenUsage | None:
    """Return the counts that an object holds, None where it holds none."""
    counts: dict[str, int] = {}
    for name in TokenUsage.model_fields:
        found = first(as_object(value), (name, _OTHER_COUNTS.get(name, name)))
        if (count := as_count(found)) is not None and count <= MOST_TOKENS:
            counts[name] = count
    if {"prompt_tokens", "completion_tokens"} <= counts.keys():
        counts.setdefault("total_tokens", counts["prompt_tokens"] + counts["completion_tokens"])
    return TokenUsage(**counts) if counts else None


def _error_of(body: Mapping[str, Any], state: CrewState) -> str | None:
    """Return why a run failed or was stopped. What a failed run has as its result is its error, and never a result."""
    inner = as_object(body.get("result"))
    places = [body.get(key) for key in ("error", "error_message", "detail")]
    if state is CrewState.FAILED:
        places += [inner.get("error"), body.get("message"), _sentence(body)]
        places += [*(inner.get(key) for key in _TEXT_KEYS), body.get("result"), body.get("output")]
    return next(filter(None, map(error_text, places)), None)


# Answers

_KICKOFF_KEYS = (*RUN_KEYS, "id", "task_id")
"""`task_id` names the run in the answer to a kickoff only; everywhere else it names a task."""
_TASK_KEYS = ("name", "task_name", "task_id", "id", "description")
_STEP_KEYS = ("description", "thought", "content", "text", "output", "result", "prompt", "name", "tool")
_HUMAN_TASK_KEYS = ("human_task_id", "task_id", "taskId")
_HUMAN_PARTS = ("human_input", "human_feedback", "human_input_request", "pending_human_input", "current_task")


def parse_inputs(body: bytes) -> list[CrewInput]:
    """Return the inputs that `GET /inputs` names, in its order, each once.

    Accepted under `inputs`: a list of names, a list of `{name, type, required, description, default}`, an object of
    name to description (or to such an object), null; and a bare list. `required_inputs` next to it takes the same
    forms:
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
        raise _unexpected(body, expected)
    required = None if source.get("required_inputs") is None else {as_text(item.get("name")) for item in needed}
    found: dict[str, CrewInput] = {}
    for item in [*items, *needed]:
        name = as_text(item.get("name"))
        if name is None:
            raise _unexpected(body, expected)
        facts = {"type": as_text(item.get("type")), "description": as_text(item.get("description"))}
        is_required = _is_required(item, is_listed=None if required is None else name in required)
        found.setdefault(name, CrewInput(name=name, required=is_required, default=item.get("default"), **facts))
    return list(found.values())


def _items(value: Any) -> list[dict[str, Any]] | None:
    """Return a list of inputs in any of its forms as objects, None where it is no such list."""
    if isinstance(value, dict):
        pairs = as_object(value).items()
        return [{**(about if isinstance(about, dict) else {"description": about}), "name": key} for key, about in pairs]
    if value is not None and not isinstance(value, list):
        return None
    return [{"name": item} if isinstance(item, str) else as_object(item) for item in as_list(value)]


def _is_required(item: Mapping[str, Any], *, is_listed: bool | None) -> bool:
    """Anything but a clear no is a yes: to ask for one input too many is the smaller mistake."""
    said = item.get("required")
    if is_listed:
        return True
    if said is None:
        return is_listed is None and item.get("default") is None
    return not (said is False or (isinstance(said, str) and said.strip().casefold() == "false"))


def parse_kickoff(body: bytes) -> str:
    """Return the id of the run that a kickoff started.

    Raises:
        ResponseFormatError: There is no usable id in the body, or it has control characters. The run may have
            started all the same.
    """
    expected = "the id of the run that was started"
    kickoff_id = id_of(as_object(decode(body, expected=expected)), _KICKOFF_KEYS)
    # It goes into logs, commands and records, where a line break or an escape of a terminal is more than an id.
    if kickoff_id is None or not kickoff_id.isprintable():
        raise _unexpected(body, expected)
    return kickoff_id


def parse_status(body: bytes, kickoff_id: str) -> CrewStatus:
    """Return the status of run `kickoff_id`.

    Output and data are set only on a completed run, an error only on a failed or stopped one, whatever else the body
    holds. A run that is said to be completed and failed at once counts as failed. A body without a state says nothing
    of the run, even with a result: every known server gives one, and unknown is not success.

    Raises:
        ResponseFormatError: The body is not an object, has no state, or names another run.
    """
    expected = "the status of a run"
    value = decode(body, expected=expected, kickoff_id=kickoff_id)
    source = as_object(value)
    found = state_of(source)
    if found is None:
        raise _unexpected(body, expected, kickoff_id)
    ids = {own.casefold() for key in RUN_KEYS if (own := as_id(source.get(key)))}
    if ids and kickoff_id.casefold() not in ids:
        raise _unexpected(body, "the status of this run, not that of another one", kickoff_id)
    state = _agreed_state(source, found.state)
    completed, total, progress = _progress(source.get("progress"))
    data = _data_of(source) if state is CrewState.COMPLETED else None
    return CrewStatus(
        kickoff_id=kickoff_id,
        state=state,
        raw_state=found.word,
        known_state=found.is_known,
        message=_sentence(source) or as_text(source.get("message")),
        current_task=name_of(source.get("current_task"), _TASK_KEYS),
        last_task=name_of(source.get("last_executed_task"), _TASK_KEYS),
        last_step=name_of(source.get("last_step"), _STEP_KEYS) or text_of(source.get("last_step")),
        completed_tasks=completed,
        total_tasks=total,
        progress=progress,
        human_task_id=_human_task(source) if state is CrewState.WAITING else None,
        tasks=_tasks_of(source),
        output=_output_of(source, data) if state is CrewState.COMPLETED else None,
        data=data,
        error=_error_of(source, state) if state in (CrewState.FAILED, CrewState.STOPPED) else None,
        execution_time=seconds_of(source),
        usage=usage_of(source),
        raw=value,
    )


def _progress(value: Any) -> tuple[int | None, int | None, float | None]:
    """Return tasks completed, tasks in all, and the fraction 0..1."""
    inner = as_object(value)
    completed, total = as_count(inner.get("completed_tasks")), as_count(inner.get("total_tasks"))
    if completed is not None and total:
        return completed, total, min(completed / total, 1.0)
    number = as_number(first(inner, ("progress", "percentage", "percent")) if isinstance(value, dict) else value)
    if number is None or not 0 <= number <= 100:
        return completed, total, None
    return completed, total, number if number <= 1 else number / 100


def _human_task(source: Mapping[str, Any]) -> str | None:
    parts = (source, *(as_object(source.get(key)) for key in _HUMAN_PARTS))
    return next((found for part in parts if (found := id_of(part, _HUMAN_TASK_KEYS))), None)


def waiting_output(raw: Any) -> str | None:
    """Return what the status of a run that waits for a person shows for review, None where it shows nothing.

    `raw` is the JSON value of the status.
    """
    source = as_object(raw)
    parts = (*(as_object(source.get(key)) for key in _HUMAN_PARTS), source)
    found = [text_of(part.get(key)) for part in parts for key in ("task_output", "output", "prompt")]
    last = as_object(source.get("last_executed_task"))
    waits = _human_task(source) or as_text(source.get("current_task"))
    if waits is None or waits in (id_of(last, _HUMAN_TASK_KEYS), last.get("name")):
        found.append(text_of(last.get("output")))  # what it says of another task is not for review
    return next(_texts(found), None)


def parse_resume(body: bytes) -> ResumeAnswer:
    """Return what the server said to a resume that it accepted (2xx): `{status, message}`, an id, or nothing at all.

    Raises:
        ResponseFormatError: The body is neither empty nor an object, or holds nothing but an error.
    """
    if body.strip() in (b"", b"null"):
        return ResumeAnswer()
    expected = "the answer to a resume"
    value = decode(body, expected=expected)
    source = as_object(value)
    status = as_text(source.get("status"))
    if not isinstance(value, dict) or (status is None and error_text(source.get("error"))):
        raise _unexpected(body, expected)
    message = as_text(source.get("message"))
    return ResumeAnswer(kickoff_id=id_of(source, RUN_KEYS), status=status, message=message, raw=value)


_CURRENT_STATE = re.compile(r"current state:?\s*['\"]?([A-Za-z][A-Za-z _-]*)", re.IGNORECASE)
_NO_ROUTE = re.compile(r"\b(route|path|url|uri|endpoint|page|resource|method)\b|\bcannot post\b", re.IGNORECASE)
_NO_RUN = re.compile(r"\b(execution|kickoff|run|task|job|crew|id)\b", re.IGNORECASE)


def parse_stop(text: str, kickoff_id: str, status_code: int = 200) -> StopAnswer | None:
    """Return what became of a `/stop`, from the body and the HTTP status; None where that is an error of another kind.

    A 404 is a missing route unless its body is JSON that mentions a run: frameworks say "Not Found" and no more.

    Raises:
        ResponseFormatError: A 2xx whose body is neither empty nor an object.
    """
    if 200 <= status_code < 300:
        return _stopped(text, kickoff_id)
    facts = parse_error(text)
    said = ": ".join(part for part in (facts.title, facts.message) if part)
    answer = StopAnswer(kickoff_id=kickoff_id, outcome=StopOutcome.UNSUPPORTED, message=said or None, raw=facts.raw)
    if status_code in (400, 409) and (found := _CURRENT_STATE.search(said)):
        word = found.group(1).strip()
        state = {"outcome": StopOutcome.NOT_STOPPABLE, "state": known_state(word), "raw_state": word}
        return answer.model_copy(update=state)
    if status_code not in (404, 405, 410, 501):
        return None
    names_it = re.search(rf"(?<!\w){re.escape(kickoff_id)}(?!\w)", said) or _NO_RUN.search(said)
    of_a_run = isinstance(facts.raw, dict) and names_it and not _NO_ROUTE.search(said)
    if status_code == 410 or (status_code == 404 and of_a_run):
        return answer.model_copy(update={"outcome": StopOutcome.UNKNOWN_RUN})
    return answer


_STOP_OUTCOMES = {
    CrewState.STOPPED: StopOutcome.STOPPED,
    CrewState.COMPLETED: StopOutcome.NOT_STOPPABLE,
    CrewState.FAILED: StopOutcome.NOT_STOPPABLE,
    CrewState.UNKNOWN: StopOutcome.UNKNOWN_RUN,
}


def _stopped(text: str, kickoff_id: str) -> StopAnswer:
    if text.strip() in ("", "null"):
        return StopAnswer(kickoff_id=kickoff_id, outcome=StopOutcome.REQUESTED)
    expected = "the answer to a stop"
    value = decode(text, expected=expected, kickoff_id=kickoff_id)
    if not isinstance(value, dict):
        raise _unexpected(text, expected, kickoff_id)
    source = as_object(value)
    found = state_of(source)
    state = found.state if found and found.is_known else None
    return StopAnswer(
        kickoff_id=kickoff_id,
        outcome=StopOutcome.REQUESTED if state is None else _STOP_OUTCOMES.get(state, StopOutcome.REQUESTED),
        state=state,
        raw_state=found.word if found else None,
        message=_sentence(source) or as_text(source.get("message")),
        raw=value,
    )
