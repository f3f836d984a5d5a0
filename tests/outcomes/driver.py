"""The language of scenarios, and the one driver that plays them: a crew's server, what callers do, what comes of it.

It looks from outside only: at the requests that the crew's server got, and at what each call returns or raises. Only
`Command` with `waits` reaches inside: it lets an hour pass in the crew database.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import flow, task

from prefect_crew import (
    Budget,
    CrewError,
    CrewInput,
    CrewStoppedError,
    DeployedCrew,
    Review,
    WaitPolicy,
    aget_result,
    arun_batch,
    arun_crew,
)
from prefect_crew.devserver import CrewServer, ProgramError, Run
from prefect_crew.devserver import Outcome as Output
from support.batches import let_an_hour_pass
from support.commands import Finished, outside
from support.waiting import LIMIT, soon, until

QUICKLY = {"initial": 0.05, "max_interval": 0.2, "timeout": LIMIT}
Outcome = str | type[CrewError]
"""What a call gives: the output of its crew, or the class of the error that it raises."""


def crew(*tasks: Mapping[str, Any], inputs: tuple[str, ...] = ("text",), **more: Any) -> str:
    """Return a scripted crew of these tasks as YAML."""
    named = [{"name": f"task_{number}", **task} for number, task in enumerate(tasks, start=1)]
    return yaml.safe_dump({"name": "crew", "inputs": list(inputs), "tasks": named, **more})


ECHO = crew({"output": "{{ text }}"})
SLOW = crew({"output": "{{ text }}", "seconds": 0.6})
LONG = crew({"output": "{{ text }}", "seconds": 1.5})
LONGER = crew({"output": "{{ text }}", "seconds": 5})
ENDLESS = crew({"output": "{{ text }}", "seconds": 600})
FAILS = crew({"fail": "the search engine is down"})
PICKY = crew({"output": "{{ text }}", "fail": "{{ 'no ' + text if 'bad' in text }}"})
ASKS = crew({"name": "draft", "output": "{{ text }}{{ feedback }}", "human": True})
FLOW = crew(
    {"output": "{{ state.turn }}{% if state.output %} after {{ state.output }}{% endif %}"},
    {"output": "{{ previous }}", "fail": "{{ 'no ' + text if 'bad' in text }}"},
    flow=True,
)


class Fickle:
    """A crew whose first run fails, and whose later ones return the input."""

    name = "fickle"

    def __init__(self) -> None:
        self.runs = 0

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(name="text")]

    async def execute(self, run: Run) -> Output:
        self.runs += 1
        if self.runs == 1:
            raise ProgramError("the search engine is down")
        return Output(output=str(run.inputs["text"]))


class Held(Fickle):
    """A crew whose runs go on until `released` is set."""

    released = False

    async def execute(self, run: Run) -> Output:
        while not self.released:
            await asyncio.sleep(0.02)
        return Output(output=str(run.inputs["text"]))


class World:
    """One crew's server and those who use it. `name` makes keys, blocks and batches of this world its own."""

    def __init__(self, server: CrewServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.name = f"outcome-{uuid.uuid4().hex[:12]}"

    def key(self, suffix: str | None) -> str | None:
        """Return the idempotency key that a step of the table means."""
        return suffix if suffix is None else f"{self.name}-{suffix}"

    def run_id(self, number: int) -> str:
        """Return the first id of the run that was started as the n-th, counted from 1."""
        return list(self.server.accepted)[number - 1]

    def crew(self, **fields: Any) -> DeployedCrew:
        """Return a block of the crew."""
        fields["wait"] = QUICKLY | fields.get("wait", {})
        return self.server.crew(**fields)

    def words(self, words: tuple[str, ...], **names: object) -> list[str]:
        """Fill `{key}` and `{run1}`, `{run2}` … in the words that a message has to have."""
        runs = {f"run{number}": id_ for number, id_ in enumerate(self.server.accepted, start=1)}
        return [word.format(**runs, **names) for word in words]


class Step:
    """Something that happens in a scenario."""

    async def play(self, world: World) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Call(Step):
    """A call of `run_crew`, and what comes of it: its output or its error, and the number of the run that it tells of.

    `says` are words of the error's message; `options` are those of `run_crew`, `crew` fields of the block.
    """

    gives: Outcome = "tea"
    run: int | None = 1
    key: str | None = "k"
    text: str = "tea"
    says: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    crew: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stored: bool = False
    cancel_when: int | None = None
    """The call is cancelled as a task of asyncio once so many kickoffs were accepted, and raises nothing else then."""

    async def play(self, world: World) -> None:
        block: Any = world.crew(**self.crew)
        if self.stored:
            await block.save(world.name, overwrite=True)
            load: Any = DeployedCrew.load
            block = await load(world.name)
        call = arun_crew(block, {"text": self.text}, idempotency_key=world.key(self.key), **self._options(world))
        if self.cancel_when is not None:
            await self._cancel(world, asyncio.create_task(call))
            return
        await check(world, call, self.gives, self.run, (world.key(self.key) or "", self.says))

    def _options(self, world: World) -> dict[str, Any]:
        options = dict(self.options)
        if "session" in options:
            options["session"] = f"{world.name}-{options['session']}"
        if "max_kickoffs" in options:
            options["budgets"] = [Budget(name=world.name, per="day", max_kickoffs=options.pop("max_kickoffs"))]
        if "wait" in options:
            options["wait"] = WaitPolicy(**QUICKLY | options["wait"])
        return options

    async def _cancel(self, world: World, task: asyncio.Task[Any]) -> None:
        await until(lambda: world.server.kickoffs >= (self.cancel_when or 0) and world.server.requests["status"])
        task.cancel()
        await soon(asyncio.wait([task]), "the end of a cancelled call")
        assert task.cancelled() or isinstance(task.exception(), CrewError), "a cancelled call returned"


async def check(world: World, call: Any, gives: Outcome, run: int | None, words: tuple[str, tuple[str, ...]]) -> None:
    """Await a call and compare what comes of it."""
    key, says = words
    result, error = None, None
    try:
        result = await call
    except CrewError as raised:
        error = raised
    if isinstance(gives, str) or error is None:
        assert result is not None, f"expected {gives!r}, got {type(error).__name__}: {error}"
        assert result.output == gives, f"expected {gives!r}, got {result.output!r}"
        ids = {result.kickoff_id}
    else:
        assert isinstance(error, gives), f"expected {gives.__name__}, got {type(error).__name__}: {error}"
        missing = [word for word in world.words(says, key=key) if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        ids = {getattr(error, "kickoff_id", None)} - {None}
    if run is not None and ids:
        known = world.server.run(world.run_id(run))
        assert ids <= {known.id, *known.former_ids}, "it tells of another run"


@dataclass(frozen=True)
class Together(Step):
    """Steps that are made at the same time."""

    steps: tuple[Step, ...]

    async def play(self, world: World) -> None:
        outcomes = await asyncio.gather(*(step.play(world) for step in self.steps), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome


@dataclass(frozen=True)
class After(Step):
    """A step that is made once the crew's server has accepted so many kickoffs, and was polled so often."""

    kickoffs: int
    step: Step
    polls: int = 1

    async def play(self, world: World) -> None:
        server = world.server
        await until(lambda: server.kickoffs >= self.kickoffs and server.requests["status"] >= self.polls)
        await self.step.play(world)


@dataclass(frozen=True)
class Server(Step):
    """A change of the crew's server: its faults and its token. `save`: the stored block gets the new token, too."""

    faults: tuple[str, ...] = ()
    token: str | None = None
    save: bool = False

    async def play(self, world: World) -> None:
        world.server.faults.clear()
        world.server.faults.add(*self.faults)
        if self.save:
            block: Any = world.crew(token=self.token)
            await block.save(world.name, overwrite=True)
        if self.token is not None:
            world.server.token = self.token


@dataclass(frozen=True)
class Pause(Step):
    """So many seconds in which nobody does anything."""

    seconds: float

    async def play(self, world: World) -> None:
        await asyncio.sleep(self.seconds)


@dataclass(frozen=True)
class Result(Step):
    """A call of `get_result` without the crew."""

    gives: Outcome = "tea"
    run: int | None = 1
    key: str = "k"
    says: tuple[str, ...] = ()

    async def play(self, world: World) -> None:
        key = str(world.key(self.key))
        await check(world, aget_result(key), self.gives, self.run, (key, self.says))


@dataclass(frozen=True)
class Command(Step):
    """A command of `prefect-crew` in a process of its own, its exit code, and words that it writes.

    `{key}` and `{run1}` … may stand in its arguments; a last `--crew` gets the crew's URL. `waits`: until what is
    uncertain may be resolved.
    """

    arguments: str
    code: int = 0
    says: tuple[str, ...] = ()
    key: str = "k"
    waits: bool = False

    async def play(self, world: World) -> None:
        key = str(world.key(self.key))
        arguments = [word for part in self.arguments.split() for word in world.words((part,), key=key)]
        if arguments[-1] == "--crew":
            arguments.append(world.server.url)
        if self.waits:
            await let_an_hour_pass()
        ended = await asyncio.to_thread(command, world, *arguments)
        written = ended.out + ended.err
        assert ended.code == self.code, f"{arguments} ended with {ended.code}: {written}"
        missing = [word for word in world.words(self.says, key=key) if word not in written]
        assert not missing, f"{missing} not in: {written}"


def command(world: World, *arguments: str) -> Finished:
    """Run a command as somebody else on this machine does, with the settings of this process."""
    own = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}
    own["CREW_TOKEN"] = world.server.token
    return outside(Path(os.environ["PREFECT_HOME"]), *arguments, env=own, timeout=LIMIT)


@dataclass(frozen=True)
class Batch(Step):
    """A call of `run_batch` with a row for each text, and the counts that its report has."""

    texts: tuple[str, ...]
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    gives: type[CrewError] | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lines: int | None = None
    """How many lines its export has."""

    async def play(self, world: World) -> None:
        rows = [{"name": f"row {number}", "text": text} for number, text in enumerate(self.texts)]
        export = world.folder / f"{world.name}.jsonl"
        options: dict[str, Any] = {"key": "name", "inputs": {"text": "text"}, **self.options}
        call = arun_batch(world.crew(), rows, name=world.name, export=str(export), **options)
        if self.gives is not None:
            await check(world, call, self.gives, None, ("", (world.name,)))
            return
        report = await call
        assert {name: getattr(report, name) for name in self.counts} == dict(self.counts), str(report)
        if self.lines is not None:
            assert len(export.read_text().splitlines()) == self.lines


@dataclass(frozen=True)
class Retried(Step):
    """A flow that makes one call several times, fails after that and is retried: it finds its runs."""

    calls: int
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    async def play(self, world: World) -> None:
        tries: list[list[str]] = []

        @flow(retries=1)
        async def looping() -> None:
            results = [await arun_crew(world.crew(), {"text": "tea"}, **self.options) for _ in range(self.calls)]
            tries.append([result.kickoff_id for result in results])
            assert len(tries) > 1, "the first try fails"

        await looping()
        assert tries == [list(world.server.accepted)] * 2


@dataclass(frozen=True)
class StoppedByCommand(Step):
    """A call in a flow whose run a person stops, and what then is retried once: the "flow", the "task" around the call,
    or the flow "above". No retry starts another run."""

    retried: str

    async def play(self, world: World) -> None:
        key, retries = str(world.key("k")), {self.retried: 1}

        @task(retries=retries.get("task", 0))
        async def around() -> None:
            await arun_crew(world.crew(), {"text": "tea"}, idempotency_key=key)

        @flow(retries=retries.get("flow", 0))
        async def waiting() -> None:
            await around()

        @flow(retries=retries.get("above", 0))
        async def above() -> None:
            await waiting()

        flow_run = asyncio.create_task(above())
        await After(1, Command("runs cancel {key} --crew")).play(world)
        with pytest.raises(CrewStoppedError, match=r"does not start it again\. A new call with the key starts"):
            await flow_run


@dataclass(frozen=True)
class Row:
    """A scenario: the crew's server, what is done one after the other, and what the server has got at the end.

    `kickoffs` are runs that it started, `posts` are requests `POST /kickoff`, also those that failed.
    """

    name: str
    steps: tuple[Step, ...]
    kickoffs: int
    posts: int | None = None
    crew: Any = ECHO
    """A script, or a class of programs."""
    faults: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("documented",)
    resumes: int = 0
    stops: int = 0
    serve: Mapping[str, Any] = field(default_factory=dict[str, Any])


def approve(request: Any) -> Review:
    """Answer a question: yes."""
    del request
    return Review(approve=True, feedback="good")


def play(row: Row, response_format: str, folder: Path) -> None:
    """Play a scenario and compare all that it says. The one driver of all rows."""
    options: dict[str, Any] = {"response_format": response_format, "faults": row.faults, **row.serve}
    with CrewServer(row.crew() if isinstance(row.crew, type) else row.crew, **options) as server:
        world = World(server, folder)

        async def all_steps() -> None:
            for step in row.steps:
                await step.play(world)

        asyncio.run(all_steps())
        requests = server.requests
        assert server.kickoffs == row.kickoffs, f"{server.kickoffs} kickoffs started a run"
        assert requests["kickoff"] == (row.kickoffs if row.posts is None else row.posts), "requests POST /kickoff"
        assert (requests["resume"], requests["stop"]) == (row.resumes, row.stops), "requests POST /resume, POST /stop"
