"""The facts in an error answer: what the server said, which inputs it misses, how long it asks to wait. Pure."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, cast

from prefect_crew.api._decode import as_object, as_text, clean, decode
from prefect_crew.api._shapes import error_text
from prefect_crew.api.errors import ResponseFormatError

__all__ = ["ErrorFacts", "parse_error", "parse_retry_after"]


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
