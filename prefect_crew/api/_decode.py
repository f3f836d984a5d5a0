"""From a body to plain values that no later step can choke on.

A server may answer anything: bytes that are no UTF-8, NaN, half a surrogate pair, a thousand brackets. Here all of it
becomes JSON values, or one ResponseFormatError. A run that was paid for is not thrown away for a bad byte in its
text: what can be mended is mended (bad bytes and lone surrogates become U+FFFD, NaN and infinities become None).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from prefect_crew.api._error import EXCERPT
from prefect_crew.api.errors import ResponseFormatError

__all__ = [
    "RUN_KEYS",
    "as_count",
    "as_id",
    "as_number",
    "as_object",
    "as_text",
    "clean",
    "decode",
    "first",
    "id_of",
    "is_object",
    "shown",
    "to_json",
    "try_json",
]

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
