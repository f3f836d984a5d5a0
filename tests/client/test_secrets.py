"""The token, and whatever else a caller calls secret, is in no error, repr, traceback, pickle or log."""

from __future__ import annotations

import html
import json
import pickle
import traceback
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client.redaction import Redactor, withholding
from prefect_crew.client.webhooks import BearerAuth, HumanInputWebhook, Webhooks
from prefect_crew.exceptions import CrewError

URL = "https://crew.example.com"
TOKEN = 't0k"en<&>/\\+0123456789'


def said_of(error: BaseException) -> str:
    """Return all that somebody may print of an error and its chain."""
    return f"{error!r} {error} {vars(error)} {pickle.dumps(error)!r} {''.join(traceback.format_exception(error))}"


def forms(secret: str) -> set[str]:
    return {secret, json.dumps(secret)[1:-1], quote(secret, safe=""), repr(secret)[1:-1]}


async def failures(
    transport: httpx.AsyncBaseTransport, token: str, *, webhooks: Webhooks | None = None
) -> list[BaseException]:
    """Return the errors of one call of each kind."""
    errors: list[BaseException] = []
    async with CrewClient(URL, token, transport=transport) as client:
        assert token not in f"{client!r} {client}"
        for call in (
            client.inputs(),
            client.kickoff({"key": "1nput-secret"}, webhooks=webhooks),
            client.status("k1"),
            client.resume("k1", "t1", "f", True, webhooks=webhooks),
            client.stop("k1"),
        ):
            try:
                await call
            except CrewError as error:
                errors.append(error)
    return errors


def echo(status: int, write: Any, kind: str) -> httpx.MockTransport:
    """A server that repeats what it got, as debug pages do."""

    def answer(request: httpx.Request) -> httpx.Response:
        text = write({"headers": dict(request.headers), "body": request.content.decode()})
        return httpx.Response(status, text=text, headers={"content-type": kind})

    return httpx.MockTransport(answer)


def header(got: dict[str, Any]) -> str:
    return got["headers"]["authorization"]


JSON, TEXT = "application/json", "text/plain"
WRITERS = {
    "json": (lambda got: json.dumps({"error": "Bad", "message": header(got), "headers": got["headers"]}), JSON),
    "detail": (lambda got: json.dumps({"detail": [{"msg": header(got), "loc": ["x"]}]}), JSON),
    "text": (lambda got: header(got) * 50, TEXT),
    "html": (lambda got: f"<html><title>{header(got)}</title></html>", "text/html"),
    "html-escaped": (lambda got: f"<html><title>{html.escape(header(got))}</title></html>", "text/html"),
    "url": (lambda got: quote(header(got), safe=""), TEXT),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 422, 429, 500, 503])
async def test_a_server_that_repeats_the_token(status: int, writer: str):
    write, kind = WRITERS[writer]
    errors = await failures(echo(status, write, kind), TOKEN)
    assert errors or status == 404
    for error in errors:
        said = said_of(error)
        for form in forms(TOKEN):
            assert form not in said


HOOKS = Webhooks(
    crew="https://hooks.example.com/p4th-secret",
    human_input=HumanInputWebhook(
        url="https://hooks.example.com/", authentication=BearerAuth.model_validate({"token": "h00k-secret"})
    ),
)


@pytest.mark.parametrize("status", [200, 422, 500])
async def test_a_server_repeats_webhooks_and_inputs(status: int):
    def write(got: dict[str, Any]) -> str:
        return json.dumps({"detail": [{"msg": got["body"], "input": json.loads(got["body"] or "{}")}]})

    transport = echo(status, write, "application/json")
    with withholding(Redactor(["1nput-secret"])):
        errors = await failures(transport, TOKEN, webhooks=HOOKS)
    assert errors
    for error in errors:
        for secret in ("1nput-secret", "h00k-secret", "p4th-secret"):
            assert secret not in said_of(error)
