"""From what a crew's server sends to one model, whatever response format it uses. Pure functions."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple, cast

from prefect_crew._text import EXCERPT
from prefect_crew.client.models import (
    CrewInput,
    CrewStatus,
    ResumeAnswer,
    StopAnswer,
    StopOutcome,
    StreamEvent,
    TaskResult,
    TokenUsage,
    WebhookBody,
)
from prefect_crew.exceptions import ResponseFormatError
from prefect_crew.states import CrewState, known_state

RUN_KEYS = ("kickoff_id", "kickoffId", "execution_id", "executionId")
"""Keys that name a run everywhere."""
MAX_ID = 1000
"""Characters of a usable id. Longer ones fit neither a URL nor the record of a run."""
MAX_COUNT = 2**63 - 1
MAX_CONTAINERS = 2_000_000
"""Lists and objects of a body. Each takes up to 200 bytes of memory where its text takes two."""
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_MISSING = object()


def decode(body: Any, *, expected: str, kickoff_id: str | None = None) -> Any:
    """Return the JSON value of `body`: bytes, text, or a value that is decoded already (returned as it is).

    Raises:
        ResponseFormatError: The body is no JSON, or nests too deeply to be handled.
    """
    if isinstance(body, (bytes, bytearray, memoryview)):
        raw = bytes(cast("bytes", body))
        body = raw.decode(json.detect_encoding(raw), "replace")
    if not isinstance(body, str):
        return body
    value = _loads(body)
    if value is _MISSING:
        raise ResponseFormatError(expected=expected, body=shown(body), kickoff_id=kickoff_id)
    return value


def try_json(text: str) -> Any:
    """Return the object or list that `text` is in JSON, or None: a bare number or word is text, not structure."""
    if text[:1] not in ("{", "["):
        return None
    value = _loads(text)
    return None if value is _MISSING else value


def _loads(text: str) -> Any:
    # Brackets in texts count as well: a text may be JSON, and is then parsed by itself.
    if len(text) > MAX_CONTAINERS and text.count("[") + text.count("{") > MAX_CONTAINERS:
        return _MISSING
    try:
        value = json.loads(
            text.removeprefix("\ufeff"), parse_constant=lambda _: None, parse_float=_float, parse_int=_int
        )
        # Only an escape can smuggle half a pair into decoded text, so that the walk is paid for by few.
        return _deep_clean(value) if _SURROGATE_ESCAPE.search(text) else value
    except (ValueError, RecursionError):
        return _MISSING


def _float(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _int(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # Python's limit on the digits of an int
        return digits


def _deep_clean(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_deep_clean(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {clean(key): _deep_clean(item) for key, item in cast("dict[str, Any]", value).items()}
    return value


def clean(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates replaced, so that it can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def to_json(value: Any) -> str | None:
    """Return `value` as compact JSON text, or None where it has none."""
    try:
        return clean(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    except (TypeError, ValueError, RecursionError):
        return None


def shown(value: Any) -> str:
    """Return what an error may show of a body: a start of it, as text."""
    if isinstance(value, str):
        return clean(value[: 4 * EXCERPT])
    text = to_json(value)
    return text[: 4 * EXCERPT] if text is not None else f"a {type(value).__name__}"


def is_object(value: Any) -> bool:
    """Whether `value` is a JSON object."""
    return isinstance(value, Mapping)


def as_object(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else an empty one."""
    if type(value) is not dict and not isinstance(value, Mapping):  # the first is what JSON gives, and cheap
        return {}
    return {key: item for key, item in cast("Mapping[Any, Any]", value).items() if isinstance(key, str)}


def first(source: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the first value under one of `keys` that is not null, else None."""
    return next((source[key] for key in keys if source.get(key) is not None), None)


def as_text(value: Any) -> str | None:
    """Return `value` if it is text with something in it, else None."""
    return clean(value) if isinstance(value, str) and value.strip() else None


def as_id(value: Any) -> str | None:
    """Return `value` as an id, or None where it can be none. A number is one, a truth value is not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) <= MAX_COUNT else None
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_ID:
        return None
    # An id that had to be mended is another id.
    return None if "\ufffd" in clean(value) else value


def id_of(source: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """Return the first usable id under one of `keys`, else None."""
    return next((found for key in keys if (found := as_id(source.get(key)))), None)


def as_number(value: Any) -> float | None:
    """Return `value` as a finite number, or None. Text that is a number is one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and len(value) > 40:
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


class ErrorFacts(NamedTuple):
    """What an error answer says.

    Attributes:
        status_code: The HTTP status.
        title: The short error, if the body had one: `error` of a JSON body, the title of a page.
        message: The long one, if the body had one.
        missing_inputs: Names of required inputs that were not given, as far as the server names them.
        retry_after: Seconds that the server asks to wait, from either form of `Retry-After`, or None.
        body: The body's text.
        raw: The body as JSON, None where it is none.
    """

    status_code: int
    title: str | None = None
    message: str | None = None
    missing_inputs: tuple[str, ...] = ()
    retry_after: float | None = None
    body: str = ""
    raw: Any = None


_HTML = re.compile(r"\A\s*<(?:!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
# Bounded repeats: each place where it may begin costs so much and no more.
_HEADING = re.compile(r"<(title|h1)[^<>]{0,200}>(.{1,500}?)</\1\s{0,20}>", re.IGNORECASE | re.DOTALL)
_LONG = 2000
"""Characters of a title or message, at most: a plain text body is all message, and may be anything."""
_TAG = re.compile(r"<[^>]*>")


def parse_error(
    status_code: int, headers: Mapping[str, str], text: str | bytes, *, now: datetime | None = None
) -> ErrorFacts:
    """Return the facts of an error answer. Never raises.

    `now` is the clock against which a `Retry-After` that is a date counts.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    text = clean(text)
    retry_after = parse_retry_after(headers, now=now)
    if _HTML.match(text):
        heading = _HEADING.search(text)
        title = as_text(" ".join(html.unescape(_TAG.sub(" ", heading.group(2))).split())) if heading else None
        return ErrorFacts(status_code, title=title, retry_after=retry_after, body=text)
    try:
        raw = decode(text, expected="an error")
    except ResponseFormatError:
        return ErrorFacts(status_code, message=_short(text), retry_after=retry_after, body=text)
    title, message = _said(raw)
    return ErrorFacts(status_code, _short(title), _short(message), tuple(_missing(raw)), retry_after, text, raw)


def _short(text: str | None) -> str | None:
    return as_text(text[:_LONG]) if text else None


def _said(raw: Any) -> tuple[str | None, str | None]:
    source = as_object(raw)
    if not source:
        return None, error_text(raw)
    detail = source.get("detail")
    if isinstance(detail, Mapping) and not source.keys() & {"error", "message"}:
        return _said(dict(as_object(detail), detail=None))
    title, message = error_text(source.get("error")), error_text(source.get("message"))
    return title, message or error_text(detail) or (None if title else error_text(source))


def _missing(raw: Any) -> Iterable[str]:
    """Yield the missing inputs: `missing_inputs` wherever it is known to stand, or FastAPI's list of missing fields."""
    source = as_object(raw)
    places = (as_object(source.get("details")), source, as_object(source.get("detail")))
    inner = as_object(places[2].get("details"))
    for place in (*places, inner):
        names = place.get("missing_inputs")
        if isinstance(names, list):
            yield from dict.fromkeys(name for name in map(as_text, cast("list[Any]", names)) if name)
            return
    details = source.get("detail")
    for item in cast("list[Any]", details) if isinstance(details, list) else []:
        loc = as_object(item).get("loc")
        path = cast("list[Any]", loc) if isinstance(loc, list) else []
        if as_object(item).get("type") == "missing" and "inputs" in path[:-1] and (name := as_text(path[-1])):
            yield name


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
    found = state_of(source)
    if found is None:
        raise ResponseFormatError(expected=expected, body=shown(value), kickoff_id=kickoff_id)
    ids = {own for key in RUN_KEYS if (own := as_id(source.get(key)))}
    if ids and kickoff_id.casefold() not in {own.casefold() for own in ids}:
        expected = "the status of this run, not that of another one"
        raise ResponseFormatError(expected=expected, body=shown(value), kickoff_id=kickoff_id)
    state = agreed_state(source, found)
    completed, total, progress = _progress(source)
    data = data_of(source) if state is CrewState.COMPLETED else None
    return CrewStatus(
        kickoff_id=kickoff_id,
        state=state,
        raw_state=found.word,
        known_state=found.known,
        message=message_of(source),
        current_task=named(source.get("current_task"), ("name", "task_name", "task_id", "id", "description")),
        last_task=named(source.get("last_executed_task"), ("name", "task_name", "task_id", "id", "description")),
        last_step=_step(source.get("last_step")),
        completed_tasks=completed,
        total_tasks=total,
        progress=progress,
        human_task_id=_human_task(source) if state is CrewState.WAITING else None,
        tasks=tasks_of(source),
        output=output_of(source, data) if state is CrewState.COMPLETED else None,
        data=data,
        error=error_of(source, state) if state in (CrewState.FAILED, CrewState.STOPPED) else None,
        execution_time=seconds_of(source),
        usage=usage_of(source),
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
        return text_of(value)
    keys = ("description", "thought", "content", "text", "output", "result", "prompt", "name", "tool")
    return next(filled_texts(as_object(value).get(key) for key in keys), None) or text_of(value)


def _human_task(source: Mapping[str, Any]) -> str | None:
    parts = (source, *(as_object(source.get(key)) for key in _HUMAN_PARTS))
    return next((found for part in parts if (found := id_of(part, _HUMAN_TASK_KEYS))), None)


def waiting_output(body: Any) -> str | None:
    """Return what the status of a run that waits for a person shows to be judged, None where it shows nothing."""
    source = as_object(body)
    parts = (*(as_object(source.get(key)) for key in _HUMAN_PARTS), source)
    found = [text_of(part.get(key)) for part in parts for key in ("task_output", "output", "prompt")]
    last = as_object(source.get("last_executed_task"))
    waits = _human_task(source) or as_text(source.get("current_task"))
    if waits is None or waits in (id_of(last, _HUMAN_TASK_KEYS), last.get("name")):
        found.append(text_of(last.get("output")))  # what it says of another task is not what is to be judged
    return next(filled_texts(found), None)


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
    if not is_object(value) or (status is None and error_text(source.get("error"))):
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
    found = state_of(source)
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
        message=message_of(source),
        raw=value,
    )


def _as_str(body: Any) -> str:
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(cast("bytes", body)).decode("utf-8", "replace")
    return body if isinstance(body, str) else text_of(body) or ""


WebhookKind = Literal["task", "step", "crew", "human_input", "stream"]

_OUTPUTS = {
    "task": ("output", "raw", "result", "summary"),
    "step": ("content", "result", "output", "thought"),
    "human_input": ("task_output", "output", "prompt"),
}


def parse_webhook(kind: WebhookKind, body: Any) -> WebhookBody:
    """Return what a delivery to a hook of `kind` says.

    Raises:
        ResponseFormatError: The body is no object, or names no run; for a stream: there is no list of events in it.
    """
    expected = f"a {kind} webhook's body"
    value = decode(body, expected=expected)
    if kind == "stream":
        return _stream(value, expected)
    source = as_object(value)
    kickoff_id = id_of(source, RUN_KEYS)
    if kickoff_id is None or not kickoff_id.isprintable():  # no run of ours has such an id
        raise ResponseFormatError(expected=f"{expected} that names its run", body=shown(value))
    found = state_of(source)
    facts: dict[str, Any] = {
        "kind": kind,
        "kickoff_id": kickoff_id,
        "task_id": as_id(source.get("task_id")),
        "name": named(source, ("name", "task_name")),
        "description": as_text(source.get("description")),
        "agent": agent_of(source),
        "state": found.state if found and found.known else None,
        "raw_state": found.word if found else None,
        "step_type": as_text(source.get("step_type")),
        "tool": as_text(source.get("tool")),
        "execution_time": seconds_of(source),
        "usage": usage_of(source),
        "meta": source.get("meta"),
        "raw": value,
    }
    if found and found.state in (CrewState.FAILED, CrewState.STOPPED):
        facts["error"] = error_of(source, found.state)
    elif kind == "crew":
        facts["data"] = data_of(source)
        facts["output"] = output_of(source, facts["data"]) or None
    else:
        facts["output"] = _output(source, _OUTPUTS[kind])
        facts["data"] = structured(first(source, ("output_json", "result_json")))
    return WebhookBody(**facts, tasks=tasks_of(source) if kind == "crew" else [])


def _output(source: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return the first text under `keys`; an object there speaks through its own text."""
    for key in keys:
        value = source.get(key)
        inner = as_object(value)
        if text := next(filled_texts(inner.get(name) for name in ("raw", "output")), text_of(value)):
            return text
    return None


def _stream(value: Any, expected: str) -> WebhookBody:
    items = as_object(value).get("events", value)
    if is_object(items):
        items = [items]
    if not isinstance(items, list) or not all(is_object(item) for item in cast("list[Any]", items)):
        raise ResponseFormatError(expected=expected, body=shown(value))
    events = [_event(as_object(item)) for item in cast("list[Any]", items)]
    if not any(event.execution_id or event.type for event in events) and events:
        raise ResponseFormatError(expected=expected, body=shown(value))
    runs = {event.execution_id for event in events}
    return WebhookBody(kind="stream", kickoff_id=runs.pop() if len(runs) == 1 else None, events=events, raw=value)


def _event(item: Mapping[str, Any]) -> StreamEvent:
    return StreamEvent(
        id=as_id(item.get("id")),
        execution_id=id_of(item, ("execution_id", "executionId", "kickoff_id", "kickoffId")),
        timestamp=text_of(item.get("timestamp")),
        type=as_text(item.get("type")),
        data=item.get("data"),
    )
