"""Secrets stay secret, after every kind of failure and after a success.

The crew's server says everything back, the token and the inputs, in every answer. Then the token is looked for in the
Prefect database and the crew database, in all logs at DEBUG, in artifacts and events, in errors with their causes,
reprs, pickles and tracebacks, in local variables of our frames, and in what the command line writes; and so are the
values of the secret inputs in everything of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import logging
import pickle
import secrets
import sqlite3
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from prefect import flow
from prefect.blocks.system import Secret
from prefect.settings import get_current_settings
from pydantic import BaseModel, SecretStr

from prefect_crew import (
    ConfigurationError,
    CrewError,
    CrewStep,
    CrewTimeoutError,
    DeployedCrew,
    OutputTypeError,
    PipelineFailedError,
    WaitPolicy,
    kickoff_crew,
    resume_crew,
    run_batch,
    run_crew,
    run_deployed_crew,
    run_pipeline,
    stop_crew,
    wait_for_crew,
)
from prefect_crew.devserver import CrewServer
from prefect_crew.receiver.app import create_receiver
from prefect_crew.runs.database import forget_stores
from prefect_crew.runs.reviews.questions import Review
from proof.echoing import Echo, echoing
from support.environment import program
from support.frames import locals_of
from support.links import QUICK, Chat, notifying, running, send
from support.prefect_server import PrefectServer, connected, drain, environment
from support.processes import Process
from support.scripts import ASKS
from support.webhooks import SECRET, served

pytestmark = [pytest.mark.timeout(600)]

FAST = {"initial": 0.05, "max_interval": 0.05, "timeout": 3.0, "human_timeout": 0.5, "error_timeout": 0.5, "grace": 0}
FAST["lost_after"] = 0.5  # by default a lost run is polled for five minutes


class Number(BaseModel):
    """What no echo fits."""

    number: int


@dataclass(frozen=True)
class Case:
    """One kind of ending: what the server does, and what is done."""

    echo: Callable[[], Echo]
    act: str = "run"
    options: dict[str, Any] = field(default_factory=dict[str, Any])


CASES = {
    "a success": Case(Echo),
    "a success with a large result": Case(lambda: Echo(more=20_000)),
    "a success after a while": Case(lambda: Echo(states=("PENDING", "STARTED", "REFLECTING", "COMPLETED"))),
    "a success with a summary": Case(Echo, options={"show": "summary"}),
    "a result that does not fit": Case(Echo, act="typed"),
    "a failed crew": Case(lambda: Echo(states=("STARTED", "FAILED"))),
    "a stopped run": Case(lambda: Echo(states=("STARTED", "REVOKED"))),
    "a lost run": Case(lambda: Echo(states=("STARTED", 404))),
    "a run that takes too long": Case(lambda: Echo(states=("STARTED",))),
    "a run that is stopped for taking too long": Case(
        lambda: Echo(states=("STARTED",)), options={"wait": {**FAST, "on_timeout": "stop"}}
    ),
    "a state of which nobody has heard": Case(lambda: Echo(states=("{said}", "COMPLETED"))),
    "a question about a task that holds a secret": Case(
        lambda: Echo(states=("PENDING_HUMAN_INPUT", "COMPLETED"), task="{said}"), act="review"
    ),
    "an answer about such a task that nobody gives": Case(
        lambda: Echo(states=("STARTED", "PENDING_HUMAN_INPUT"), task="{said}"),
        options={"wait": {**FAST, "on_human_timeout": "reject"}},
    ),
    "a run that waits for a person": Case(lambda: Echo(states=("STARTED", "PENDING_HUMAN_INPUT"))),
    "a function that answers": Case(lambda: Echo(states=("PENDING_HUMAN_INPUT", "COMPLETED")), act="review"),
    "an answer that fails": Case(lambda: Echo(states=("PENDING_HUMAN_INPUT",), resume=500), act="review"),
    # The other ways in and out, each with a crew that says everything back.
    "inputs of pydantic's secret type": Case(Echo, act="typed secrets", options={"secret_inputs": []}),
    "a question about inputs of that type": Case(
        lambda: Echo(states=("PENDING_HUMAN_INPUT", "COMPLETED"), task="{said}"),
        act="typed secrets",
        options={"secret_inputs": []},
    ),
    "a second wait": Case(lambda: Echo(states=("STARTED",)), act="second wait"),
    "a pipeline": Case(Echo, act="pipeline"),
    "a pipeline that fails": Case(lambda: Echo(states=("COMPLETED", "FAILED")), act="pipeline"),
    "a pipeline that asks": Case(
        lambda: Echo(states=("COMPLETED", "{said}", "PENDING_HUMAN_INPUT", "COMPLETED"), task="{said}"), act="pipeline"
    ),
    **{
        f"a pipeline whose second kickoff fails with {how}": Case(
            lambda how=how: Echo(kickoff=how, accepted=1), act="pipeline"
        )
        for how in (422, 500)
    },
    "a batch": Case(lambda: Echo(states=("COMPLETED", "FAILED")), act="batch"),
    "a batch that asks": Case(
        lambda: Echo(states=("{said}", "PENDING_HUMAN_INPUT", "COMPLETED"), task="{said}"), act="batch"
    ),
    "a batch whose kickoffs are answered with 500": Case(lambda: Echo(kickoff=500), act="batch"),
    "a batch whose statuses are answered with 500": Case(lambda: Echo(states=(500,)), act="batch"),
    "a deployment's form": Case(Echo, act="deployed"),
    "a deferred task": Case(Echo, act="deferred"),
    **{
        f"inputs answered with {how}": Case(lambda how=how: Echo(inputs=how))
        for how in (401, 403, 404, 422, 500, "html", "text")
    },
    **{
        f"a kickoff answered with {how}": Case(lambda how=how: Echo(kickoff=how))
        for how in (400, 401, 404, 408, 422, 500, 502, "html", "text", "empty", "drop")
    },
    **{
        f"statuses answered with {how}": Case(lambda how=how: Echo(states=(how,)))
        for how in (400, 401, 429, 500, 503, "html", "text", "empty")
    },
    **{
        f"{place} answered with {how}": Case(lambda place=place, how=how: _acted(place, how), act=place)
        for place in ("resume", "stop")
        for how in (400, 401, 404, 422, 500, "html", "text", None)
    },
}


def _acted(place: str, how: int | str | None) -> Echo:
    echo = Echo(states=("PENDING_HUMAN_INPUT",))
    setattr(echo, place, how)
    return echo


@dataclass(frozen=True)
class Given:
    """What must not be found: unlike anything else, and with all that has to be escaped somewhere."""

    token: str
    inputs: dict[str, Any]

    @classmethod
    def new(cls) -> Given:
        word = secrets.token_hex(8)
        tough = f'pass-{word} "ünï/cödé" <b>&\\'
        return cls(f"token-{secrets.token_hex(12)}", {"topic": "tea", "secret": tough, "nested": {"key": f"k-{word}"}})

    @property
    def secret_values(self) -> list[str]:
        return [self.inputs["secret"], self.inputs["nested"]["key"]]


def forms(text: str) -> set[str]:
    """Return the forms in which a text may stand somewhere."""
    quoted = {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return {text, html.escape(text), quote(text), quote(text, safe=""), repr(text)[1:-1], *quoted}


def found(texts: list[str], place: str) -> list[str]:
    """Return where a secret stands, with what is around it."""
    hits: list[str] = []
    for text in texts:
        for form in forms(text):
            at = place.find(form)
            if at >= 0:
                hits.append(f"{form!r} in …{place[max(0, at - 200) : at + 60]!r}…")
    return hits


class Everything(logging.Handler):
    """Keeps all that is logged anywhere, as text, with tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory, prefect_template: Path | None) -> Iterator[PrefectServer]:
    """A Prefect server whose database nobody else writes to."""
    with PrefectServer(tmp_path_factory.mktemp("secrets"), template=prefect_template) as server:
        yield server


@pytest.fixture(scope="module")
def client(own_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of this process as a client of it, at DEBUG. What its tests have left there is looked at when they end.

    Not in a test of its own: those that run at once have a server and a database each.
    """
    home = tmp_path_factory.mktemp("home")
    with environment({"PREFECT_LOGGING_LEVEL": "DEBUG"}), connected(own_server, home):
        yield home
        assert LEFT
        assert_no_secret_is_left(own_server, home)


@pytest.fixture
def logged() -> Iterator[Everything]:
    handler = Everything()
    loggers = [logging.getLogger(name) for name in (None, "prefect", "prefect_crew", "httpx", "httpcore")]
    before = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.DEBUG)
    # Prefect's own loggers hand nothing on to the root.
    for log in loggers[:2]:
        log.addHandler(handler)
    yield handler
    for log, level in zip(loggers, before, strict=True):
        log.setLevel(level)
        log.removeHandler(handler)


def typed_secrets(name: str, given: Given) -> None:
    """Who gives one of pydantic's secrets has said that it is one, whatever the block says."""
    nested = {"key": SecretStr(given.inputs["nested"]["key"])}
    inputs = {**given.inputs, "secret": SecretStr(given.inputs["secret"]), "nested": nested}
    run_crew(name, inputs, review=lambda request: Review(approve=True))


def second_wait(name: str, given: Given) -> None:
    @flow
    def waits() -> None:
        kickoff_id = kickoff_crew(name, given.inputs)
        for _ in range(2):
            with pytest.raises(CrewTimeoutError):
                wait_for_crew(name, kickoff_id, wait=WaitPolicy(**{**FAST, "timeout": 0.2}))

    waits()


def pipeline(name: str, given: Given) -> None:
    """By a template, of a type, and in the output of a step that a crew without secret inputs is given."""
    block: Any = DeployedCrew.load(name)
    other = DeployedCrew(url=block.url, token=block.token, request_timeout=1.0, wait=WaitPolicy(**FAST))
    steps = [
        CrewStep("first", name, {"topic": "tea", "secret": "{{ login }}", "nested": "{{ inputs.nested }}"}),
        CrewStep("second", other, {"topic": "{{ first.output }}", "secret": "none", "nested": "none"}),
    ]
    run_pipeline(steps, {"login": SecretStr(given.inputs["secret"]), "nested": given.inputs["nested"]}, name=name)


def batch(name: str, given: Given) -> None:
    """Its files are in the home of this process, which is looked through like all else."""
    rows = [{"number": number, **given.inputs} for number in range(2)]
    inputs = {key: key for key in ("topic", "secret", "nested")}
    output = get_current_settings().home / f"{name}.jsonl"
    report = run_batch(name, rows, name=name, key="number", inputs=inputs, export=str(output), max_in_flight=1)
    assert report.total == 2


def deployed(name: str, given: Given) -> None:
    for key in ("secret", "nested"):
        block: Any = Secret(value=given.inputs[key])
        block.save(f"{name}-{key}")
    deployed: Any = run_deployed_crew
    inputs = {"topic": "tea", "secret": f"{name}-secret", "nested": f"{name}-nested"}
    asyncio.run(deployed(crew=name, inputs=inputs))


def deferred(name: str, given: Given) -> None:
    for crew in (DeployedCrew.load(name), name):
        with pytest.raises(ConfigurationError, match="Nothing was stored"):
            kickoff_crew.delay(crew, given.inputs)


OTHER_WAYS: dict[str, Callable[[str, Given], None]] = {
    "typed secrets": typed_secrets,
    "second wait": second_wait,
    "pipeline": pipeline,
    "batch": batch,
    "deployed": deployed,
    "deferred": deferred,
}


def act(case: Case, echo: Echo, given: Given, name: str) -> BaseException | None:
    """Do it; return what it raised."""
    fields = {"wait": FAST, "secret_inputs": ["secret", "nested"], **case.options}
    crew = DeployedCrew(url=echo.url, token=SecretStr(given.token), request_timeout=1.0, **fields)
    crew.save(name, overwrite=True)
    wait = WaitPolicy(**FAST)
    try:
        if case.act == "run":
            run_crew(name, given.inputs)
        elif case.act == "typed":
            run_crew(name, given.inputs, output_type=Number)
        elif case.act == "review":
            run_crew(name, given.inputs, review=lambda request: Review(approve=False, feedback=str(request.output)))
        elif case.act in OTHER_WAYS:
            OTHER_WAYS[case.act](name, given)
        else:
            kickoff_id = kickoff_crew(name, given.inputs, idempotency_key=f"key of {name}")
            if case.act == "resume":
                resume_crew(name, kickoff_id, approve=True, feedback="fine")
            else:
                stop_crew(name, kickoff_id)
            run_crew(name, given.inputs, idempotency_key=f"key of {name}", wait=wait)
    except Exception as error:
        return error
    return None


def of_error(error: BaseException) -> str:
    """Return everything that an error can show of itself and of those behind it."""
    parts: list[str] = ["".join(traceback.format_exception(error))]
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        facts = dict(one.__dict__)
        if isinstance(one, OutputTypeError):
            facts.pop("output")  # the whole result, which is its caller's
        if isinstance(one, PipelineFailedError):
            facts.pop("results")  # and so are these
        parts += [str(one), repr(one), repr(facts), repr(one.args)]
        if isinstance(one, CrewError):
            parts.append(str(pickle.loads(pickle.dumps(one))))
        chain += [one.__cause__, one.__context__]
    return "\n".join(parts)


LEFT: dict[str, Given] = {}
"""What was given in each case, for the look into the database when all are over."""


def _slow(name: str) -> bool:
    """Whether it is one more of a kind: `make proofs` has one or two of each."""
    return " answered with " in name and not name.endswith((" 401", " 500", " html", " drop", " None"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * _slow(name)) for name in CASES])
def test_no_secret_is_shown_by(name: str, client: Path, logged: Everything, crew_database: Path) -> None:
    case, given = CASES[name], Given.new()
    LEFT[name] = given
    block = "echo-" + "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    with echoing(case.echo()) as echo:
        error = act(case, echo, given, block)
    drain()
    every = [given.token, *given.secret_values]
    assert not found(every, "\n".join(logged.lines))
    assert logged.lines
    forget_stores()  # what was written is in its file then
    stored = contents(crew_database.parent.glob("crew.db*"))
    assert not [form for text in every for form in forms(text) for content in stored if form.encode() in content]
    assert name != "a success" or block.encode() in stored[0]
    if error is not None:
        assert isinstance(error, CrewError), error
        assert not found(every, of_error(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if not _slow(name)])
def test_no_secret_is_in_a_local_variable_after(name: str, client: Path) -> None:
    """Error reporters show them. A caller's own frames hold its inputs, but none of ours and none of Prefect's."""
    case, given = CASES[name], Given.new()
    LEFT[f"{name}, for local variables"] = given
    with echoing(case.echo()) as echo:
        error = act(case, echo, given, "locals")
    assert error is None or not found([given.token, *given.secret_values], locals_of(error, but=__file__))


@pytest.mark.parametrize("chat_answers", [200, 500])
def test_an_answer_link_is_in_nothing_but_its_message(
    chat_answers: int, own_server: PrefectServer, client: Path, logged: Everything, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the link can answer. The block that sends it logs the whole message at DEBUG."""
    name, tokens = f"linked-{chat_answers}", list[str]()

    async def ask_and_answer() -> None:
        with Chat(answer=chat_answers) as chat, CrewServer(ASKS) as crew:
            async with served(create_receiver(SECRET)) as url, notifying(chat, by_apprise=True):
                monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_ANSWER_URL", url)
                monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
                async with running(crew.crew(wait=QUICK), name) as flow_run:
                    link = await chat.link()
                    tokens.append(link.rpartition("/")[2])
                    assert (await send(link, decision="approve", name="Ada")).status == 200
                    await flow_run

    for name_of_library in ("apprise", "urllib3"):
        monkeypatch.setattr(logging.getLogger(name_of_library), "level", logging.DEBUG)
    asyncio.run(ask_and_answer())
    drain()
    assert "apprise" in "\n".join(logged.lines)
    # The test's own client of the pages logs their URLs.
    lines = [line for line in logged.lines if not line.startswith(("httpx", "httpcore"))]
    assert not [line for line in lines if tokens[0] in line]
    time.sleep(3)  # the server writes events and logs late
    assert own_server.database is not None
    for content in contents(own_server.database.parent.glob("prefect.db*")):
        assert tokens[0].encode() not in content
    LEFT[name] = Given(tokens[0], {"secret": tokens[0], "nested": {"key": tokens[0]}})


ON_THE_COMMAND_LINE = {
    "a success": (lambda: Echo(), ["-o", "json"]),
    "a failed crew": (lambda: Echo(states=("STARTED", "FAILED")), []),
    "a refused token": (lambda: Echo(inputs=401), ["--debug"]),
    "a kickoff answered with 422": (lambda: Echo(kickoff=422), []),
    "a kickoff answered with 500": (lambda: Echo(kickoff=500), ["--debug"]),
    "statuses answered with 500": (lambda: Echo(states=(500,)), ["--debug"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_THE_COMMAND_LINE)
def test_no_secret_is_written_by_the_command_line(
    name: str, own_server: PrefectServer, client: Path, tmp_path: Path
) -> None:
    make, options = ON_THE_COMMAND_LINE[name]
    given, block = Given.new(), f"cli-{name.replace(' ', '-')}"
    LEFT[f"{name}, on the command line"] = given
    with echoing(make()) as echo:
        fields = {"url": echo.url, "token": given.token, "secret_inputs": ["secret", "nested"], "wait": FAST}
        DeployedCrew(**fields).save(block, overwrite=True)
        (tmp_path / "inputs.json").write_text(json.dumps(given.inputs))
        command = [program("prefect-crew"), "run", block, "--input-file", tmp_path / "inputs.json", *options]
        log = tmp_path / "log"
        with Process(command, log=log, env=own_server.env(home=client, PREFECT_LOGGING_LEVEL="DEBUG")) as process:
            process.wait()
    written = log.read_text(errors="replace")
    assert written
    every = [given.token, *given.secret_values]
    if name == "a success":
        every = [given.token]  # the result is the caller's own, and says what the crew said
    assert not found(every, written)


def assert_no_secret_is_left(own_server: PrefectServer, client: Path) -> None:
    drain()
    time.sleep(3)  # the server writes events and logs late
    assert own_server.database is not None
    with contextlib.closing(sqlite3.connect(own_server.database)) as database:
        dump = "\n".join(
            str(row) for table in _tables(database) for row in database.execute(f'SELECT * FROM "{table}"')
        )
    raw = contents(own_server.database.parent.glob("*.db*"))
    files = contents(client.rglob("*"))
    assert raw
    assert "deployed-crew" in dump
    for name, given in LEFT.items():
        every = [given.token, *given.secret_values]
        assert not found(every, dump), name
        for content in (*raw, *files):
            assert not [form for text in every for form in forms(text) if form.encode() in content], name
    # They are where they belong: the blocks give them back.
    if "a success" in LEFT:
        block: Any = DeployedCrew.load("echo-a-success")
        assert block.token.get_secret_value() == LEFT["a success"].token


def contents(paths: Iterable[Path]) -> list[bytes]:
    """Return what the files among them hold. Prefect's server and SQLite may remove one while this reads."""
    held: list[bytes] = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                held.append(path.read_bytes())
    return held


def _tables(database: sqlite3.Connection) -> list[str]:
    return [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
