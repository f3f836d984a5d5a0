"""The errors of Prefect's client, whichever HTTP library it is built on."""

import ast
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings

import prefect_crew
from prefect_crew._internal.prefect_errors import (
    HTTP_ERRORS,
    PREFECT_ERRORS,
    STATUS_ERRORS,
    TRANSPORT_ERRORS,
    is_away,
    naming_prefect_away,
)
from prefect_crew.exceptions import PrefectAwayError

WITH_PASSWORD = "http://me:hunter22@prefect.example:4200/api"


def libraries() -> list[Any]:
    names = [name for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]
    return [pytest.param(importlib.import_module(name), id=name) for name in names]


async def raised_by(error: Exception, api_url: str | None = WITH_PASSWORD) -> Exception:
    """Return what a function that raises an error raises where the Prefect API's absence is named."""

    @naming_prefect_away("Run again.")
    async def fails() -> None:
        raise error

    with temporary_settings({PREFECT_API_URL: api_url}), pytest.raises(Exception) as caught:  # noqa: PT011
        await fails()
    return caught.value


@pytest.mark.parametrize("library", libraries())
async def test_errors_of_each_http_library_are_caught(library: Any):
    request = library.Request("GET", f"{WITH_PASSWORD}/flow_runs")
    refused = library.ConnectError("refused", request=request)
    response = library.Response(503, request=request)
    status = library.HTTPStatusError(f"Server error for url {request.url}", request=request, response=response)
    for kinds in (PREFECT_ERRORS, HTTP_ERRORS, TRANSPORT_ERRORS):
        assert isinstance(refused, kinds)
    for kinds in (PREFECT_ERRORS, STATUS_ERRORS):
        assert isinstance(status, kinds)
    assert not isinstance(status, TRANSPORT_ERRORS)
    assert is_away(refused)
    assert is_away(status)
    for error in (refused, status):
        away = await raised_by(error)
        assert isinstance(away, PrefectAwayError)
        assert "http://prefect.example:4200/api does not answer" in str(away)
        assert "hunter22" not in str(away)


def answered(status: int, url: str = "http://127.0.0.1") -> PrefectHTTPStatusError:
    request = httpx.Request("GET", url)
    return PrefectHTTPStatusError(f"For {url}", request=request, response=httpx.Response(status, request=request))


def test_errors_of_prefect_itself_are_caught():
    assert isinstance(ObjectNotFound(Exception()), PREFECT_ERRORS)
    assert isinstance(answered(404), PREFECT_ERRORS)
    assert not is_away(answered(404))


@pytest.mark.parametrize("library", libraries())
async def test_a_users_http_error_is_not_prefects(library: Any):
    users = [
        library.ConnectError("refused", request=library.Request("GET", "http://127.0.0.1:9/mine")),
        library.ReadTimeout("slow", request=library.Request("GET", "https://mine.example/api")),
        library.ConnectError("made by hand"),
    ]
    for error in users:
        assert await raised_by(error, "http://127.0.0.1:4200/api") is error
    for error in users[1:]:
        assert await raised_by(error, None) is error
    of_prefect = library.ConnectError("refused", request=library.Request("GET", "http://127.0.0.1:8123/api/x"))
    assert isinstance(await raised_by(of_prefect, None), PrefectAwayError)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_named(status: int):
    answer = answered(status, f"{WITH_PASSWORD}/flow_runs")
    of_check, of_user = RuntimeError("Failed to reach API at http://prefect.example:4200/api"), RuntimeError("mine")
    of_check.__cause__ = of_user.__cause__ = answer
    says = f"/prefect.example:4200/api refuses a request (HTTP {status}). Run again. Check PREFECT_API_KEY"
    for error in (answer, of_check):
        refused = await raised_by(error)
        assert isinstance(refused, PrefectAwayError)
        assert says in str(refused)
        assert "hunter22" not in str(refused)
    assert await raised_by(of_user) is of_user
    taken = answered(409, f"{WITH_PASSWORD}/flow_runs")
    assert await raised_by(taken) is taken, "what a caller may handle"


def test_no_other_module_names_errors_of_httpx():
    """Ruff forbids those of its list; a new name of httpx is found here."""
    errors = {
        name
        for name in httpx.__all__
        if inspect.isclass(kind := getattr(httpx, name)) and issubclass(kind, httpx.HTTPError)
    }
    package = Path(prefect_crew.__file__).parent
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "client") or path.name == "prefect_errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "httpx":
                assert node.attr not in errors, f"{path}:{node.lineno} names httpx.{node.attr}"
