"""The errors of Prefect's client, under each of the HTTP libraries that it may be built on.

Prefect is about to move its client from httpx to httpx2 (PrefectHQ/prefect#23118), whose errors are no subclasses of
httpx's. This module alone knows both. Import the tuples and catch them: `except PREFECT_ERRORS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import httpx
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL

from prefect_crew.exceptions import CrewError, PrefectAwayError

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


def shown_url(url: str) -> str:
    """Return the Prefect API's URL as people may see it: without a user and a password."""
    return str(httpx.URL(url).copy_with(userinfo=b""))


def _is_of_user(error: BaseException) -> bool:
    """Return whether an error of httpx comes from a user's function: no request of it went to the Prefect API.

    Prefect's temporary server, whose port no setting has, is at 127.0.0.1.
    """
    if not isinstance(error, HTTP_ERRORS):
        return False
    try:
        asked: httpx.URL = cast("Any", error).request.url
    except RuntimeError:  # of httpx: the error has no request, since no client raised it
        return True
    api_url = PREFECT_API_URL.value()
    if api_url is None:
        return asked.host != "127.0.0.1"
    api = httpx.URL(api_url)
    return (asked.host, asked.port) != (api.host, api.port)


def naming_prefect_away(
    what_next: str,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Have a coroutine function raise PrefectAwayError where the Prefect API is away. `what_next` ends its message.

    An error of httpx that a user's function raises, such as a review function, is raised as it is.
    """

    def decorate(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            coroutine = function(*args, **kwargs)
            args, kwargs = (), {}  # pyright: ignore[reportAssignmentType]  error reporters show the variables of frames
            try:
                return await coroutine
            except (*PREFECT_ERRORS, RuntimeError) as error:
                if not is_away(error) or _is_of_user(error):
                    raise
                url = PREFECT_API_URL.value()
                where = shown_url(url) if url else "of Prefect's own temporary server"
                # The text about a status has the whole URL in it, with the password that may be there.
                reason = "" if isinstance(error, STATUS_ERRORS) else f": {error}"
                raise PrefectAwayError(
                    f"The Prefect API {where} does not answer ({type(error).__name__}{reason}). {what_next} To see "
                    "what is wrong: prefect-crew doctor."
                ) from error

        return call

    return decorate


@contextmanager
def naming_prefect_errors(what: str) -> Generator[None]:
    """Raise an error of ours in place of an error of Prefect's client.

    `what` says what was not done, to which run, and what to do next.

    Raises:
        PrefectAwayError: The Prefect API does not answer.
        CrewError: It refuses, as with 403.
    """
    try:
        yield
    except PREFECT_ERRORS as error:
        status = f"HTTP {error.response.status_code}" if isinstance(error, STATUS_ERRORS) else type(error).__name__
        if is_away(error):
            raise PrefectAwayError(f"The Prefect API does not answer ({status}). {what}") from error
        raise CrewError(
            f"The Prefect API refuses a request ({status}). {what} To see which request is refused: prefect-crew "
            "doctor."
        ) from error
