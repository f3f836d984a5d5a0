"""Secrets of a pipeline: they reach the crews that need them, and are stored and shown nowhere."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_crew import ConfigurationError, CrewStep, PipelineContext, PipelineFailedError, plan_pipeline, run_pipeline
from prefect_crew.client.redaction import MASK
from prefect_crew.testing import CrewServerFactory
from support.prefect_server import PrefectServer, drain
from support.scripts import script

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

LOGIN = script(
    {"name": "log in", "output": "logged in as {{ user }} with {{ password }}"}, inputs=["user", "password"], name="in"
)
REPEATS = script({"name": "say", "output": "{{ text }}"}, inputs=["text"])
FAILS = script({"name": "say", "fail": "refused: {{ text }}"}, inputs=["text"])

Steps = Callable[[Any, Any], list[CrewStep]]


def new() -> str:
    return f"hunter-{uuid.uuid4().hex}"


async def stored(server: PrefectServer, secret: str) -> list[str]:
    """Return what the Prefect database has with the secret in it."""
    await asyncio.to_thread(drain)
    assert server.database is not None
    with closing(sqlite3.connect(server.database)) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [(name, str(row)) for name in names for row in database.execute(f'SELECT * FROM "{name}"')]
    assert any("run-pipeline" in row for _, row in rows)
    return [f"{name}: {row}" for name, row in rows if secret in row]


WAYS: dict[str, tuple[Steps, Callable[[str], dict[str, Any]], list[str]]] = {
    "a SecretStr of the crew's name": (
        lambda first, _: [CrewStep("a", first)],
        lambda secret: {"user": "me", "password": SecretStr(secret)},
        [],
    ),
    "a SecretStr in a template": (
        lambda first, _: [CrewStep("a", first, {"user": "me", "password": "{{ login }}"})],
        lambda secret: {"login": SecretStr(secret)},
        [],
    ),
    "a text that a function puts into a secret input": (
        lambda first, _: [CrewStep("a", first, {"user": "me", "password": lambda context: context.inputs["code"]})],
        lambda secret: {"code": secret},
        ["password"],
    ),
    "a secret of the step itself": (
        lambda first, _: [CrewStep("a", first, {"user": "me", "password": SecretStr("{secret}")})],
        lambda secret: {},
        [],
    ),
    "a text that goes to another crew as well": (
        lambda first, second: [
            CrewStep("a", first, {"user": "me", "password": "{{ login }}"}),
            CrewStep("b", second, {"text": "as {{ login }}"}, after=["a"]),
        ],
        lambda secret: {"login": secret},
        ["password"],
    ),
    "an output that repeats it": (
        lambda first, second: [
            CrewStep("a", first, {"user": "me", "password": "{{ login }}"}),
            CrewStep("b", second, {"text": "{{ a.output }}"}),
        ],
        lambda secret: {"login": SecretStr(secret)},
        [],
    ),
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_secret_reaches_the_crew_and_nothing_else(
    way: str, crew_server: CrewServerFactory, prefect_api: PrefectServer, caplog: pytest.LogCaptureFixture
) -> None:
    make, inputs, secret_inputs = WAYS[way]
    secret = new()
    first, second = crew_server(LOGIN), crew_server(REPEATS)
    steps = make(first.crew(secret_inputs=secret_inputs), second.crew())
    if way == "a secret of the step itself":
        steps = [CrewStep("a", first.crew(), {"user": "me", "password": SecretStr(secret)})]
    with caplog.at_level(logging.DEBUG):
        result = await asyncio.to_thread(run_pipeline, steps, inputs(secret), name=f"secret {way}")
    assert result["a"].output == f"logged in as me with {secret}"
    if len(steps) > 1:
        assert secret in second.runs[0].inputs["text"]
    assert secret not in caplog.text
    assert not await stored(prefect_api, secret)


async def test_a_template_that_changes_a_secret_makes_another_one(
    crew_server: CrewServerFactory, prefect_api: PrefectServer
) -> None:
    secret = new()
    server = crew_server(REPEATS)
    steps = [CrewStep("a", server.crew(), {"text": "{{ login | upper }}"})]
    await asyncio.to_thread(run_pipeline, steps, {"login": SecretStr(secret)})
    assert server.runs[0].inputs["text"] == secret.upper()
    assert not await stored(prefect_api, secret.upper())


async def test_no_error_of_a_step_tells_a_secret(
    crew_server: CrewServerFactory, prefect_api: PrefectServer, caplog: pytest.LogCaptureFixture
) -> None:
    secret = new()

    def breaks(context: PipelineContext) -> Any:
        raise ValueError(f"no {context.inputs['login'].get_secret_value()}")

    steps = [
        CrewStep("a", crew_server(FAILS).crew(), {"text": "as {{ login }}"}),
        CrewStep("b", crew_server(REPEATS).crew(), {"text": "{{ (login ~ 'x') + 1 }}"}),
        CrewStep("c", crew_server(REPEATS).crew(), {"text": breaks}),
    ]
    with pytest.raises(PipelineFailedError) as raised:
        await asyncio.to_thread(run_pipeline, steps, {"login": SecretStr(secret)})
    assert sorted(raised.value.errors) == ["a", "b", "c"]
    assert f"refused: {MASK}" in str(raised.value.errors["a"])
    assert isinstance(raised.value.errors["c"], ConfigurationError)
    assert f"no {MASK}" in str(raised.value.errors["c"])
    assert secret not in f"{raised.value} {raised.value.errors}" + caplog.text
    assert not await stored(prefect_api, secret)


def test_a_plan_shows_no_secret(crew_server: CrewServerFactory) -> None:
    secret = new()
    steps = [
        CrewStep("a", crew_server(LOGIN).crew(secret_inputs=["password"]), {"user": "me", "password": "{{ login }}"}),
        CrewStep("b", crew_server(REPEATS).crew(), {"text": "as {{ login }}, {{ code }}: " + secret}),
    ]
    plan = str(plan_pipeline(steps, {"login": secret, "code": SecretStr(secret)}))
    assert secret not in plan
    assert f"password = {MASK}" in plan
