"""No error shows what a request held. tests/proof/test_secrets.py looks at logs, records and everything else."""

from __future__ import annotations

import html
import json
import pickle
import traceback
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client.redaction import Redactor, withholding
from prefect_crew.client.webhooks import BearerAuth, HumanInputWebhook, Webhooks
from prefect_crew.exceptions import CrewError

TOKEN = 't0k"en<&>/\\+0123456789'
INPUT, IN_PATH, IN_HEADER = "1nput-secret", "p4th-secret", "h00k-secret"
HOOKS = Webhooks(
    crew=f"https://hooks.example.com/{IN_PATH}",
    human_input=HumanInputWebhook(
        url="https://hooks.example.com/", authentication=BearerAuth.model_validate({"token": IN_HEADER})
    ),
)
FORMS = (json.dumps(TOKEN)[1:-1], quote(TOKEN, safe=""), repr(TOKEN)[1:-1])
WRITERS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "application/json": lambda said, body: json.dumps(
        {"error": "Bad", "message": said, "detail": [{"msg": f"{said} {body}", "loc": ["x"], "input": body}]}
    ),
    "text/plain": lambda said, body: f"{said} {quote(said, safe='')} {body}" * 50,
    "text/html": lambda said, body: f"<html><title>{html.escape(said)} {said} {body}</title></html>",
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 422, 429, 500, 503])
async def test_a_server_that_repeats_requests(status: int, kind: str):
    def repeat(request: httpx.Request) -> httpx.Response:
        text = WRITERS[kind](request.headers["authorization"], json.loads(request.content or "{}"))
        return httpx.Response(status, text=text, headers={"content-type": kind})

    errors: list[CrewError] = []
    with withholding(Redactor([INPUT])):
        async with CrewClient("https://crew.test", TOKEN, transport=httpx.MockTransport(repeat)) as client:
            assert TOKEN not in f"{client!r} {client}"
            for call in (
                client.inputs(),
                client.kickoff({"key": INPUT}, webhooks=HOOKS),
                client.status("k1"),
                client.resume("k1", "t1", "f", True, webhooks=HOOKS),
                client.stop("k1"),
            ):
                try:
                    await call
                except CrewError as error:
                    errors.append(error)
    assert errors
    for error in errors:
        trace = "".join(traceback.format_exception(error))
        shown = f"{error!r} {error} {vars(error)} {pickle.dumps(error)!r} {trace}"
        for secret in (TOKEN, *FORMS, INPUT, IN_PATH, IN_HEADER):
            assert secret not in shown
