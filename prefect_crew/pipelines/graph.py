"""The steps of a pipeline: their order, the problems before the start, and the inputs of each step."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any, cast
from uuid import UUID

from pydantic import BaseModel, SecretStr

from prefect_crew._text import listed_names, with_guesses
from prefect_crew.blocks import DeployedCrew, load_crew
from prefect_crew.client.encoding import encode_inputs
from prefect_crew.client.inputs import missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput, CrewResult
from prefect_crew.client.redaction import MASK, Redactor, holds_secret
from prefect_crew.crew import Crew, CrewSession, WaitPolicy
from prefect_crew.exceptions import AuthenticationError, ConfigurationError, CrewError, NotFoundError
from prefect_crew.runs.database import in_store
from prefect_crew.runs.request import RunOptions
from prefect_crew.runs.reviews.questions import ReviewChoice
from prefect_crew.store import attempts
from prefect_crew.templates import GLOBALS, RESULT_FIELDS, compiled, uses_in

InputOfStep = Callable[["PipelineContext"], Any] | object
"""A text, which is a template; a function of the context; or any other value."""
PIPELINE = "pipeline"
"""The name of a pipeline without one."""
RESERVED = frozenset({"inputs", "steps"})
"""The names in templates of the mappings of all inputs and of all results."""


@dataclass(frozen=True)
class CrewStep:
    """One crew in a pipeline.

    Args:
        name: The step's name, unique in the pipeline.
        crew: A crew, or the name of a stored block.
        inputs: The crew's inputs by name. A text is a template over the pipeline's inputs and earlier steps:
            `"{{ topic }}"`, `"{{ research.output }}"`, `"{{ research.data.title }}"`,
            `"{{ research.tasks[0].output }}"`, `"{{ steps['a b'].output }}"`. Texts within lists and mappings are
            templates too. A function of the context returns the value: `lambda context: context["research"].output`.
            Default: the pipeline's inputs with the names of the crew's inputs.
        after: Names of steps to wait for, in addition to the steps that its templates use. A function sees only steps
            that this step waits for, directly or through other steps.
        wait: How to wait for the run, in place of the block's policy.
        output_type: A pydantic model; the `data` of the result is then an instance of the model.
        review: The source of answers when the crew waits for a person, as for `run_crew`, in place of the pipeline's.
        restore_from: The id of a Flow state from which the run starts, as for `run_crew`.
        session: The session of the run, as for `run_crew`; a template like the texts of `inputs`.
    """

    name: str
    crew: DeployedCrew | str
    inputs: Mapping[str, InputOfStep] | None = field(default=None, repr=False)
    after: Sequence[str] = ()
    wait: WaitPolicy | None = None
    output_type: type[BaseModel] | None = None
    review: ReviewChoice | None = None
    restore_from: str | UUID | None = None
    session: str | None = None

    def __post_init__(self) -> None:
        inputs: Any = self.inputs
        if not isinstance(inputs, Mapping | None):
            raise ConfigurationError(f"Step {self.name!r} needs its inputs by name, as a mapping. Nothing was started.")

    def options(self, **more: Any) -> RunOptions:
        """Return the options of the step's run. Raises ConfigurationError: one has a value of a wrong kind."""
        return RunOptions.of(
            wait=self.wait, output_type=self.output_type, review=self.review, restore_from=self.restore_from, **more
        )


@dataclass(frozen=True)
class PipelineContext:
    """The argument of a step's function: `context.inputs["topic"]`, `context["research"].output`."""

    inputs: Mapping[str, Any] = field(repr=False)
    results: Mapping[str, CrewResult[Any]]

    def __getitem__(self, step: str) -> CrewResult[Any]:
        try:
            return self.results[step]
        except KeyError:
            raise ConfigurationError(
                f"Step {step!r} is not known here. Name the step in `after`, so that it runs before."
            ) from None


@dataclass(frozen=True)
class PipelinePlan:
    """The plan of a pipeline: its steps in their order, and all problems. `print` shows it."""

    steps: Sequence[CrewStep]
    problems: Sequence[str]
    text: str = field(repr=False)

    def __str__(self) -> str:
        return self.text


@dataclass
class Pipeline:
    """The steps of one pipeline and its inputs. `check` loads the crews and asks each for its inputs.

    `problems` has all problems found so far. `unreachable` has the crews that did not answer, a problem too, but not
    for a pipeline that was started before. `order` has the steps' names, each after the steps that it needs; it is
    empty if they depend on each other in a circle. `before` has the steps that a step needs, directly or through
    others. `uses` has the names in the templates of a step, by its inputs, and under None in that of its session.
    `crews` are by the steps' names.
    """

    steps: Sequence[CrewStep]
    inputs: Mapping[str, Any] = field(repr=False)
    crews: dict[str, Crew] = field(default_factory=dict[str, Crew])
    needs: dict[str, set[str]] = field(default_factory=dict[str, set[str]], init=False)
    order: list[str] = field(default_factory=list[str], init=False)
    before: dict[str, set[str]] = field(default_factory=dict[str, set[str]], init=False)
    problems: list[str] = field(default_factory=list[str], init=False)
    uses: dict[str, dict[str | None, set[str]]] = field(
        default_factory=dict[str, "dict[str | None, set[str]]"], init=False
    )
    unreachable: list[str] = field(default_factory=list[str], init=False)

    def __post_init__(self) -> None:
        names = Counter(step.name for step in self.steps)
        if not names:
            self.problems.append("the pipeline has no steps")
        for name, count in names.items():
            if count > 1:
                self.problems.append(f"two steps are named {name!r}")
            if name in RESERVED or name in GLOBALS:
                self.problems.append(f"step {name!r} has a reserved name: call it something else")
            elif name in self.inputs:
                self.problems.append(f"step {name!r} has the name of an input: call it something else")
            if not name.strip() or {*"/{}"} & {*name}:
                self.problems.append(f"a step cannot be named {name!r}: give it a word without slashes and braces")
        sorter = TopologicalSorter[str](dict.fromkeys(names, ()))
        for step in self.steps:
            self.needs[step.name] = self._needed_by(step, set(names))
            sorter.add(step.name, *self.needs[step.name])
            try:
                step.options(session="of a template" if re.search("{[{%]", f"{step.session}") else step.session)
            except ConfigurationError as error:
                self.problems.append(f"step {step.name!r}: {str(error).removesuffix(' Nothing was started.')}")
        try:
            self.order = list(sorter.static_order())
        except CycleError as error:
            self.problems.append(f"the steps depend on each other in a circle: {' -> '.join(map(str, error.args[1]))}")
        for name in self.order:
            self.before[name] = self.needs[name].union(*(self.before[other] for other in self.needs[name]))

    def _needed_by(self, step: CrewStep, step_names: set[str]) -> set[str]:
        """Return the steps that a step needs. Note a problem for each unknown name in it."""
        after = {step.after} if isinstance(step.after, str) else set(step.after)
        for name in sorted(after - step_names):
            self.problems.append(f"step {step.name!r} comes after {name!r}, which is not a step")
        needed = after & step_names
        names = self.uses.setdefault(step.name, {})
        session = [] if step.session is None else [(None, f"{step.session}")]
        for key, text in (*_templates_of(step), *session):
            where = f"step {step.name!r}, {'session' if key is None else f'input {key!r}'}"
            try:
                used = uses_in(text, collections=RESERVED)
            except ConfigurationError as error:
                self.problems.append(f"{where}: {error}")
                continue
            names.setdefault(key, set()).update(used)
            for name in sorted(used.keys() - step_names - self.inputs.keys() - RESERVED):
                self.problems.append(f"{where}: {name!r} is no step, and no input that has a value")
            for name in sorted(used.keys() & step_names):
                needed.add(name)
                for attribute in sorted(used[name].difference(RESULT_FIELDS)):
                    # The sandbox refuses attributes that begin with an underscore.
                    if not attribute.startswith("_"):
                        has = f"a step has no {attribute!r}; it has output, data, tasks and more ({name})"
                        self.problems.append(f"{where}: {has}")
        return needed

    # The crews

    async def check(self) -> None:
        """Load the crews, ask each for its inputs, and note all problems."""
        await self.load()
        # One request for each crew and token, however many steps use it.
        crews = {_address_and_token(crew): crew for crew in self.crews.values()}
        answers = dict(zip(crews, await asyncio.gather(*map(self._ask, crews.values())), strict=True))
        for name, crew in self.crews.items():
            if answer := answers[_address_and_token(crew)]:
                token, expected = answer
                # Two blocks may be for one crew: each keeps its other settings.
                self.crews[name] = replace(crew.with_token(token), expected_inputs=tuple(expected))
        self.check_inputs()
        self._check_sessions()

    async def load(self) -> None:
        """Load the crews, and note a problem for each block that is not stored."""
        names = {step.crew for step in self.steps if isinstance(step.crew, str)}
        stored = dict(zip(names, await asyncio.gather(*map(_load_or_reason, names)), strict=True))
        for step in self.steps:
            crew = stored[step.crew] if isinstance(step.crew, str) else await load_crew(step.crew)
            if isinstance(crew, Crew):
                self.crews[step.name] = crew
            else:
                self.problems.append(f"step {step.name!r}: {crew}")

    async def _ask(self, crew: Crew) -> tuple[SecretStr, list[CrewInput]] | None:
        """Return a crew's token, which may have been rotated since it was loaded, and its inputs."""
        failed = f"crew {crew.label} cannot be asked for its inputs"
        try:
            async with CrewSession(crew) as session:
                inputs = await session.call(lambda client: client.inputs())
                return session.crew.token, inputs
        except NotFoundError:
            return crew.token, []
        except (AuthenticationError, ConfigurationError) as error:
            self.problems.append(f"{failed}: {error}")
        except CrewError as error:
            self.unreachable.append(f"{failed}: {error}")
        return None

    def _expected_by(self, step: CrewStep) -> Sequence[CrewInput] | None:
        """Return the inputs of a step's crew, None if the crew did not answer."""
        crew = self.crews.get(step.name)
        return None if crew is None else crew.expected_inputs

    def check_inputs(self) -> None:
        """Note a problem for missing inputs of each step, and for inputs that its crew does not name."""
        for step in {step.name: step for step in self.steps}.values():
            values = self.inputs if step.inputs is None else step.inputs
            expected, crew = self._expected_by(step) or (), self.crews.get(step.name)
            if missing := missing_inputs(expected, values):
                self.problems.append(f"step {step.name!r} lacks the inputs {', '.join(missing)} of its crew")
            if step.inputs is None or (crew is not None and crew.allow_extra_inputs):
                continue
            if unknown := unknown_inputs(expected, values):
                names = [item.name for item in expected]
                guessed = f"{with_guesses(unknown, names)}; its crew takes {listed_names(names)}"
                self.problems.append(f"step {step.name!r} gives the unknown inputs {guessed}")

    def _check_sessions(self) -> None:
        """Note a problem for each session that may hold a secret, or of a crew that is no Flow."""
        risky = {*RESERVED, *self.needs, *self.secret_inputs} if self.is_secret else set[str]()
        for step in self.steps:
            crew = self.crews.get(step.name)
            if step.session is not None and crew is not None and not crew.flow:
                self.problems.append(f"step {step.name!r} has a session, but crew {crew.label} is not saved as a Flow")
            if used := risky & self.uses[step.name].get(None, set()):
                where = f"step {step.name!r}, session"
                self.problems.append(f"{where}: {min(used)!r} may hold a secret input, and sessions are shown")

    async def refuse_problems(self, idempotency_key: str | None = None) -> None:
        """Raise one ConfigurationError with all problems, if there are any.

        With a key, crews that do not answer are a problem too, unless a run was started under the key before.
        """
        is_away = idempotency_key and self.unreachable and not await self._has_earlier_runs(idempotency_key)
        if self.problems or is_away:
            listed = "; ".join([*self.problems, *self.unreachable])
            raise ConfigurationError(f"The pipeline cannot run, and nothing was started: {listed}.")

    async def _has_earlier_runs(self, idempotency_key: str) -> bool:
        if any(step.inputs is None and self._expected_by(step) is None for step in self.steps):
            return False  # it is unknown which of the pipeline's inputs the step takes
        keys = [step_key(idempotency_key, step) for step in self.steps]
        return any([await in_store(attempts.of_key, key) for key in keys])

    # Secrets

    @property
    def is_secret(self) -> bool:
        """Whether an input of the pipeline, of a step or of a crew is secret. Then it shows no texts: any crew may
        repeat a secret that another crew got."""
        values = [*self.inputs.values(), *(value for step in self.steps for value in (step.inputs or {}).values())]
        return any(crew.secret_inputs for crew in self.crews.values()) or any(map(holds_secret, values))

    @cached_property
    def secret_inputs(self) -> set[str]:
        """The names of the pipeline's secret inputs: of a secret type, or used in a secret input of a crew.

        Read it only after the crews are loaded.
        """
        names = {name for name, value in self.inputs.items() if holds_secret(value)}
        for step in self.steps:
            if crew := self.crews.get(step.name):
                sources = self._sources_of(step)
                names |= set[str]().union(*(sources.get(name, ()) for name in crew.secret_inputs))
                names |= self.inputs.keys() & crew.secret_inputs
        return names

    def stored_inputs(self) -> dict[str, Any]:
        """Return the pipeline's inputs for storage in Prefect, masked if the pipeline is secret."""
        encoded = encode_inputs(self.inputs)
        return dict.fromkeys(encoded, MASK) if self.is_secret else encoded

    def secret_inputs_of(self, step: CrewStep) -> set[str]:
        """Return the inputs of a step that are made of secret inputs of the pipeline, by name or by a template."""
        return {name for name, sources in self._sources_of(step).items() if not sources.isdisjoint(self.secret_inputs)}

    def _sources_of(self, step: CrewStep) -> dict[str, set[str]]:
        """Return, for each input of a step, the pipeline's inputs that feed it, by the same name or by templates."""
        if step.inputs is None:
            return {name: {name} for name in self.inputs}
        names = self.inputs.keys()
        # `inputs[name]` may be any of the pipeline's inputs.
        uses = self.uses[step.name].items()
        return {key: {*names} if "inputs" in used else names & used for key, used in uses if key is not None}

    # The inputs of steps

    def inputs_of(self, step: CrewStep, results: Mapping[str, CrewResult[Any]]) -> Mapping[str, Any]:
        """Return a step's inputs, after the steps that it needs have run.

        Raises:
            ConfigurationError: A template or a function uses a name that does not exist.
        """
        if step.inputs is None:
            names = {item.name for item in self._expected_by(step) or ()}
            return {key: value for key, value in self.inputs.items() if not names or key in names}
        values = self._values_for(step, results)
        context = PipelineContext(self.inputs, values["steps"])
        return {
            key: _call_function(value, context) if callable(value) else _render_texts(value, values)
            for key, value in step.inputs.items()
        }

    def session_of(self, step: CrewStep, results: Mapping[str, CrewResult[Any]]) -> str | None:
        """Return the session of a step's run, None without one. Raises as `inputs_of`."""
        if step.session is None:
            return None
        # Runs of two customers without a name must not share the session "customer-null".
        return compiled(step.session, is_complete=True)(self._values_for(step, results))

    def _values_for(self, step: CrewStep, results: Mapping[str, CrewResult[Any]]) -> dict[str, Any]:
        """Return the values of a step's templates by name."""
        before = {name: results[name] for name in self.before[step.name]}
        # For templates, in plain text. A value without secrets is left as it is.
        plain = {
            name: encode_inputs({"": value}, as_json=True).get("") if holds_secret(value) else value
            for name, value in self.inputs.items()
        }
        return {**plain, **before, "inputs": plain, "steps": before}

    def plan(self) -> PipelinePlan:
        """Return the plan of the pipeline, after `check`. It shows templates unchanged."""
        steps = {step.name: step for step in self.steps}
        blocks: list[str] = []
        for name in self.order:
            step, crew = steps[name], self.crews.get(name)
            after = ", ".join(other for other in self.order if other in self.needs[name])
            lines = [f"{name}: crew {crew.label if crew else step.crew}" + (f", after {after}" if after else "")]
            hidden = crew.secret_inputs if crew else ()
            inputs = {key: MASK if key in hidden else value for key, value in (step.inputs or {}).items()}
            lines += [f"  {k} = {f'from {_name_of(v)}' if callable(v) else v}" for k, v in inputs.items()]
            lines += [] if step.session is None else [f"  session {step.session}"]
            blocks.append("\n".join(lines))
        problems = [*self.problems, *self.unreachable]
        if problems:
            blocks.append("\n".join(f"Problem: {problem}" for problem in problems))
        redact = Redactor(self.inputs[name] for name in self.secret_inputs)
        return PipelinePlan([steps[name] for name in self.order], problems, redact("\n\n".join(blocks)))


def step_key(idempotency_key: str, step: CrewStep) -> str:
    """Return the idempotency key of a step: its pipeline's, a slash and its name."""
    return f"{idempotency_key}/{step.name}"


def _address_and_token(crew: Crew) -> tuple[str, SecretStr]:
    return crew.url, crew.token


async def _load_or_reason(name: str) -> Crew | str:
    """Return a stored crew, or the reason why there is none."""
    try:
        return await load_crew(name)
    except ValueError as error:
        return str(error)


def leaves_in(value: Any) -> Iterator[Any]:
    """Yield the values within lists and mappings, at any depth. Each text among them is a template."""
    if isinstance(value, Mapping):
        value = list(cast("Mapping[Any, Any]", value).values())
    if isinstance(value, list | tuple):
        for item in cast("Sequence[Any]", value):
            yield from leaves_in(item)
    else:
        yield value


def _templates_of(step: CrewStep) -> Iterator[tuple[str, str]]:
    """Yield each template of a step, with the name of its input."""
    for key, value in (step.inputs or {}).items():
        yield from ((key, leaf) for leaf in leaves_in(value) if isinstance(leaf, str))


def _render_texts(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return compiled(value)(values)
    if isinstance(value, Mapping):
        return {key: _render_texts(item, values) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_render_texts(item, values) for item in cast("Sequence[Any]", value)]
    return value


def _call_function(function: Callable[[PipelineContext], Any], context: PipelineContext) -> Any:
    try:
        return function(context)
    except ConfigurationError:
        raise
    except Exception as error:
        problem = f"{_name_of(function)} gave no input: {type(error).__name__}: {error}"
        raise ConfigurationError(f"{problem}. Nothing was started.") from error


def _name_of(function: Any) -> str:
    name = getattr(function, "__name__", "a function")
    return "a function" if name == "<lambda>" else f"{name}()"
