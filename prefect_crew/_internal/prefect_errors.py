"""The errors of Prefect's client, under each of the HTTP libraries that it may be built on.

Prefect is about to move its client from httpx to httpx2 (PrefectHQ/prefect#23118), whose errors are no subclasses of
httpx's. This module alone knows both. Import the tuples and catch them: `except PREFECT_ERRORS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import httpx
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL

from prefect_crew.exceptions import PrefectAwayError

P = ParamSpec("P")
T = TypeVar("T")


def _libraries() -> list[Any]:
    """Return httpx, and httpx2 where it is installed."""
    try:
        return [httpx, importlib.import_module("httpx2")]
    except ImportError:
        return [httpx]


_LIBRARIES = _libraries()

HTTP_ERRORS: tuple[type[Exception], ...] = tuple(library.HTTPError for library in _LIBRARIES)
"""Every error of a request."""
PREFECT_ERRORS: tuple[type[Exception], ...] = (*HTTP_ERRORS, PrefectException)
"""Every error of Prefect's client: the Prefect API is away, or refuses."""

if TYPE_CHECKING:  # pyright reads the attributes of what `isinstance` and `except` let through
    STATUS_ERRORS = (httpx.HTTPStatusError,)
    TRANSPORT_ERRORS = (httpx.TransportError,)
else:
    STATUS_ERRORS = tuple(library.HTTPStatusError for library in _LIBRARIES)
    """An answer with a status of 400 or more; `response` is that answer. Prefect's PrefectHTTPStatusError is one."""
    TRANSPORT_ERRORS = tuple(library.TransportError for library in _LIBRARIES)
    """No answer came: refused, reset, timed out."""


def is_away(error: BaseException) -> bool:
    """Return whether an error says that the Prefect API is away, and not what it thinks of a request."""
    if isinstance(error, RuntimeError) and "Failed to reach API" in str(error):  # of Prefect's own check of the version
        return True
    return isinstance(error, TRANSPORT_ERRORS) or (isinstance(error, STATUS_ERRORS) and error.response.is_server_error)


def naming_prefect_away(
    what_next: str,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Have a coroutine function raise PrefectAwayError where the Prefect API is away. `what_next` ends its message."""

    def decorate(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            coroutine = function(*args, **kwargs)
            args, kwargs = (), {}  # pyright: ignore[reportAssignmentType]  error reporters show the variables of frames
            try:
                return await coroutine
            except (*PREFECT_ERRORS, RuntimeError) as error:
                if not is_away(error):
                    raise
                where = PREFECT_API_URL.value() or "of Prefect's own temporary server"
                raise PrefectAwayError(
                    f"The Prefect API {where} does not answer ({type(error).__name__}: {error}). {what_next} To see "
                    "what is wrong: prefect-crew doctor."
                ) from error

        return call

    return decorate
