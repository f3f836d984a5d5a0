"""The crews of a pipeline, loaded and asked for their inputs before anything is started, and the plan of its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from prefect_crew.blocks import load_crew
from prefect_crew.client.inputs import encode_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import MASK, Redactor, holds_secret
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import AuthenticationError, ConfigurationError, CrewError, NotFoundError
from prefect_crew.pipelines.graph import CrewStep, PipelineGraph
from prefect_crew.records.store import PrefectRecords

SHOWN_PROBLEMS = 30
"""Problems that one error lists."""


@dataclass(frozen=True)
class PlannedStep:
    """A step as far as it is known before anything runs. `layer` counts from 0; `inputs` are for people."""

    name: str
    crew: str
    layer: int
    needs: Sequence[str]
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class PipelinePlan:
    """What a pipeline would do. Printing it shows it; nothing was started."""

    steps: Sequence[PlannedStep]
    problems: Sequence[str]

    def __str__(self) -> str:
        lines: list[str] = []
        for step in self.steps:
            after = ", ".join(other.name for other in self.steps if other.name in step.needs)
            lines += ["", f"{step.name}: crew {step.crew}{f', after {after}' if after else ''}"]
            lines += [f"  {key} = {value}" for key, value in step.inputs.items()]
        lines += ["", *(f"Problem: {problem}" for problem in self.problems)] if self.problems else []
        return "\n".join(lines).strip("\n")


@dataclass
class PipelineCrews:
    """The crews of a graph's steps, by the steps' names: loaded, and asked for their inputs by `check`.

    `unreachable` says which crews did not answer. That is a problem, but not for a pipeline that was started before:
    its runs are found without an answer.
    """

    graph: PipelineGraph
    crews: dict[str, Crew] = field(default_factory=dict[str, Crew])
    expected: dict[str, list[CrewInput]] = field(default_factory=dict[str, list[CrewInput]])
    unreachable: list[str] = field(default_factory=list[str])

    @cached_property
    def secret_inputs(self) -> set[str]:
        """The names of the pipeline's inputs that are secret: given as such, or going into a secret input of a crew.

        To be asked for once the crews are loaded.
        """
        graph = self.graph
        found = {name for name, value in graph.inputs.items() if holds_secret(value)}
        for step in graph.steps:
            if crew := self.crews.get(step.name):
                found |= graph.inputs_behind(step, crew.secret_inputs) | (set(graph.inputs) & set(crew.secret_inputs))
        return found

    @cached_property
    def redact(self) -> Redactor:
        """What masks the pipeline's secret inputs."""
        return Redactor(self.graph.inputs[name] for name in self.secret_inputs)

    def stored_inputs(self) -> dict[str, Any]:
        """Return the pipeline's inputs as Prefect may store them."""
        encoded, secret = encode_inputs(self.graph.inputs), self.secret_inputs
        steps = {step.name: step for step in self.graph.steps}
        if any(self.graph.has_function_for(steps[name], crew.secret_inputs) for name, crew in self.crews.items()):
            secret = set(encoded)  # any of them may be what the function gives
        return {name: MASK if name in secret else self.redact(text) for name, text in encoded.items()}

    async def load(self) -> None:
        """Load the crews, and note on the graph those that are not stored."""
        names = {step.crew for step in self.graph.steps if isinstance(step.crew, str)}
        stored = dict(zip(names, await asyncio.gather(*map(_load_or_reason, names)), strict=True))
        for step in self.graph.steps:
            crew = stored[step.crew] if isinstance(step.crew, str) else await load_crew(step.crew)
            if isinstance(crew, Crew):
                self.crews[step.name] = crew
            else:
                self.graph.problems.append(f"step {step.name!r}: {crew}")

    async def check(self) -> None:
        """Load the crews, ask each for its inputs, and note on the graph all that is wrong."""
        await self.load()
        await self.ask()
        self.check_inputs()

    async def ask(self) -> None:
        """Ask each crew that was loaded for its inputs."""
        # One question a crew, however many steps it has; with another token it is another question.
        asked = {_address_and_token(crew): crew for crew in self.crews.values()}
        answers = dict(zip(asked, await asyncio.gather(*map(self._ask, asked.values())), strict=True))
        for name, crew in self.crews.items():
            answer = answers[_address_and_token(crew)]
            if answer is not None:
                fresh, self.expected[name] = answer
                # Of two blocks for one crew each keeps what else it says.
                token = crew.token if fresh is None else fresh.token
                self.crews[name] = replace(crew, token=token, expected_inputs=tuple(self.expected[name]))

    def check_inputs(self) -> None:
        """Note on the graph what its steps lack of their crews' inputs, and which further ones they give."""
        self.graph.check_inputs(
            self.expected, extra=[name for name, crew in self.crews.items() if crew.allow_extra_inputs]
        )

    async def _ask(self, crew: Crew) -> tuple[Crew | None, list[CrewInput]] | None:
        """Return a crew's inputs, and the crew with its new token if that was rotated since it was loaded."""
        said = f"crew {crew.label} cannot be asked for its inputs"
        fresh: Crew | None = None
        try:
            async with CrewSession(crew) as session:
                inputs = await session.call(lambda client: client.inputs())
                fresh = None if session.crew is crew else session.crew
        except NotFoundError:
            return None, []
        except (AuthenticationError, ConfigurationError) as error:
            self.graph.problems.append(f"{said}: {error}")
        except CrewError as error:
            self.unreachable.append(f"{said}: {error}")
        else:
            return fresh, inputs
        return None

    async def refuse_problems(self, idempotency_key: str | None = None) -> None:
        """Raise one ConfigurationError with all that is wrong, before anything is started.

        With an idempotency key, a crew that does not answer is not a problem if a run was started under the key before.
        """
        problems = [*self.graph.problems, *self.unreachable]
        if (
            idempotency_key is not None
            and self.unreachable
            and not self.graph.problems
            and await self._has_earlier_runs(idempotency_key)
        ):
            return
        if problems and (idempotency_key is not None or self.graph.problems):
            rest = len(problems) - SHOWN_PROBLEMS
            more = [f"and {rest} more: plan_pipeline lists them"] if rest > 0 else []
            listed = "; ".join([*problems[:SHOWN_PROBLEMS], *more])
            raise ConfigurationError(f"The pipeline cannot run, nothing was started: {listed}.")

    async def _has_earlier_runs(self, idempotency_key: str) -> bool:
        if any(step.inputs is None and step.name not in self.expected for step in self.graph.steps):
            return False  # which of the pipeline's inputs it took is not known
        records = PrefectRecords()
        for step in self.graph.steps:
            if await records.attempts(step_key(idempotency_key, step)):
                return True
        return False

    def plan(self) -> PipelinePlan:
        """Return what the pipeline would do, once it was checked."""
        graph = self.graph
        problems = [*graph.problems, *self.unreachable]
        if not graph.sorts:
            return PipelinePlan([], problems)
        steps = {step.name: step for step in graph.steps}
        planned = [
            PlannedStep(
                name, self._label(steps[name]), number, sorted(graph.needs[name]), self._shown_inputs(steps[name])
            )
            for number, layer in enumerate(graph.layers())
            for name in layer
        ]
        return PipelinePlan(planned, problems)

    def _label(self, step: CrewStep) -> str:
        crew = self.crews.get(step.name)
        return str(step.crew) if crew is None else crew.label

    def _shown_inputs(self, step: CrewStep) -> dict[str, str]:
        crew = self.crews.get(step.name)
        secret = {*(crew.secret_inputs if crew else ()), *self.graph.inputs_made_of(step, self.secret_inputs)}
        known = self.graph.known_inputs_of(step)
        return {key: MASK if key in secret else self.redact(value) for key, value in known.items()}


def step_key(idempotency_key: str, step: CrewStep) -> str:
    """Return the idempotency key of a step: its pipeline's, a slash and its name."""
    return f"{idempotency_key}/{step.name}"


def _address_and_token(crew: Crew) -> tuple[str, str]:
    return crew.url, crew.token.get_secret_value()


async def _load_or_reason(name: str) -> Crew | str:
    """Return a stored crew, or why there is none."""
    try:
        return await load_crew(name)
    except ValueError as error:
        return str(error)
