"""The errors of Prefect's client, for each HTTP library that it may use.

Prefect is about to move its client from httpx to httpx2 (PrefectHQ/prefect#23118), whose errors are no subclasses of
httpx's. Only this module knows both. Import the tuples and catch them: `except PREFECT_ERRORS`.
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
    """Return httpx, and httpx2 if it is installed."""
    try:
        return [httpx, importlib.import_module("httpx2")]
    except ImportError:
        return [httpx]


_LIBRARIES = _libraries()

HTTP_ERRORS: tuple[type[Exception], ...] = tuple(library.HTTPError for library in _LIBRARIES)
"""Every error of a request."""
PREFECT_ERRORS: tuple[type[Exception], ...] = (*HTTP_ERRORS, PrefectException)
"""Every error of Prefect's client: the Prefect API cannot be reached, or refuses."""

if TYPE_CHECKING:  # so that pyright knows the attributes of a caught error
    STATUS_ERRORS = (httpx.HTTPStatusError,)
    TRANSPORT_ERRORS = (httpx.TransportError,)
else:
    STATUS_ERRORS = tuple(library.HTTPStatusError for library in _LIBRARIES)
    """An answer with a status of 400 or more; `response` is that answer. Prefect's PrefectHTTPStatusError is one."""
    TRANSPORT_ERRORS = tuple(library.TransportError for library in _LIBRARIES)
    """No answer came: refused, reset, timed out."""


def _is_version_check(error: BaseException) -> bool:
    """Return whether Prefect's own check of the version failed, by a RuntimeError that a request's error caused."""
    return isinstance(error, RuntimeError) and "Failed to reach API" in str(error)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error's answer, None if no answer came."""
    error = error.__cause__ or error if _is_version_check(error) else error
    return error.response.status_code if isinstance(error, STATUS_ERRORS) else None


def is_away(error: BaseException) -> bool:
    """Return whether an error means that the Prefect API cannot be reached, and not that it refuses a request."""
    status = _status(error)
    if status is not None:
        return status >= 500
    return isinstance(error, TRANSPORT_ERRORS) or _is_version_check(error)


def shown_url(url: str) -> str:
    """Return the Prefect API's URL for people: without a user and a password."""
    return str(httpx.URL(url).copy_with(userinfo=b""))


def _is_of_user(error: BaseException) -> bool:
    """Return whether an error of httpx comes from a user's function, because its request did not go to the Prefect API.

    Prefect's temporary server is at 127.0.0.1; no setting has its port.
    """
    if not isinstance(error, HTTP_ERRORS):
        return False
    try:
        url: httpx.URL = cast("Any", error).request.url
    except RuntimeError:  # raised by httpx if the error has no request, since no client raised it
        return True
    api_url = PREFECT_API_URL.value()
    if api_url is None:
        return url.host != "127.0.0.1"
    api = httpx.URL(api_url)
    return (url.host, url.port) != (api.host, api.port)


def prefect_error(error: BaseException, what_next: str) -> CrewError:
    """Return a CrewError for an error of Prefect's client. `what_next` says what was not done, and what to do next."""
    url, status = PREFECT_API_URL.value(), _status(error)
    api = f"The Prefect API {shown_url(url)}" if url else "Prefect's own temporary server"
    # The text of an error with a status contains the whole URL, perhaps with a password.
    reason = f"HTTP {status}" if status is not None else f"{type(error).__name__}: {error}"
    doctor = "To see what is wrong, run: prefect-crew doctor."
    if is_away(error):
        return PrefectAwayError(f"{api} does not answer ({reason}). {what_next} {doctor}")
    if status in (401, 403):
        doctor = (
            "Check PREFECT_API_KEY, or PREFECT_API_AUTH_STRING for a server of your own, and what that key may do. "
            "Run: prefect-crew doctor."
        )
    return PrefectAwayError(f"{api} refuses a request ({reason}). {what_next} {doctor}")


@contextmanager
def naming_prefect_errors(what_next: str) -> Generator[None]:
    """Raise a CrewError in place of an error which says that the Prefect API cannot be reached, or refuses the API key.

    `what_next` says what was not done, and what to do next. Other errors pass unchanged: of the API, which a caller may
    handle, and those of httpx from a user's function, such as a review function.

    Raises:
        PrefectAwayError: The Prefect API does not answer, or refuses the API key: 401 or 403.
    """
    try:
        yield
    except (*HTTP_ERRORS, RuntimeError) as error:
        if not (is_away(error) or _status(error) in (401, 403)) or _is_of_user(error):
            raise
        raise prefect_error(error, what_next) from error


def naming_prefect_away(
    what_next: str,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Run a coroutine function in `naming_prefect_errors`."""

    def decorate(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            coroutine = function(*args, **kwargs)
            args, kwargs = (), {}  # pyright: ignore[reportAssignmentType]  error reporters show the variables of frames
            with naming_prefect_errors(what_next):
                return await coroutine

        return call

    return decorate
