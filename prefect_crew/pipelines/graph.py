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
from prefect_crew.client.redaction import MASK, holds_secret
from prefect_crew.crew import Crew, CrewSession, WaitPolicy
from prefect_crew.exceptions import AuthenticationError, ConfigurationError, CrewAPIError, CrewError
from prefect_crew.runs.request import RunOptions
from prefect_crew.runs.reviews.questions import ReviewChoice
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

    Attributes:
        crews: The crews by the names of their steps.
        problems: All problems found so far.
        unreachable: The crews that did not answer. Their steps start without a check of their inputs.
        needs: The steps that each step needs by its templates or `after`.
        order: The names of the steps, each after those that it needs; empty if they need each other in a circle.
        before: The steps that each step needs directly or through others.
        uses: The names in the templates of each step, by its inputs, and under None in that of its session.
    """

    steps: Sequence[CrewStep]
    inputs: Mapping[str, Any] = field(repr=False)
    crews: dict[str, Crew] = field(default_factory=dict[str, Crew])
    problems: list[str] = field(default_factory=list[str], init=False)
    unreachable: list[str] = field(default_factory=list[str], init=False)
    needs: dict[str, set[str]] = field(default_factory=dict[str, set[str]], init=False)
    order: list[str] = field(default_factory=list[str], init=False)
    before: dict[str, set[str]] = field(default_factory=dict[str, set[str]], init=False)
    uses: dict[str, dict[str | None, set[str]]] = field(
        default_factory=dict[str, "dict[str | None, set[str]]"], init=False
    )

    def __post_init__(self) -> None:
        names = Counter(step.name for step in self.steps)
        if not names:
            self.problems.append("the pipeline has no steps")
        for name, count in names.items():
            if count > 1:
                self.problems.append(f"two steps are named {name!r}")
            if name in self.inputs or name in RESERVED or name in GLOBALS:
                self.problems.append(f"step {name!r} has the name of an input, or a reserved one: rename the step")
            if not name.strip() or {*"/{}"} & {*name}:
                self.problems.append(f"a step cannot be named {name!r}: give it a word without slashes and braces")
        for step in self.steps:
            self._read_step(step, set(names))
        try:
            self.order = list(TopologicalSorter(self.needs).static_order())
        except CycleError as error:
            self.problems.append(f"the steps depend on each other in a circle: {' -> '.join(map(str, error.args[1]))}")
        for name in self.order:
            self.before[name] = self.needs[name].union(*(self.before[other] for other in self.needs[name]))

    def _read_step(self, step: CrewStep, names: set[str]) -> None:
        """Note what a step needs and uses, and a problem for each unknown name in it and each wrong option."""
        after = {step.after} if isinstance(step.after, str) else set(step.after)
        for name in sorted(after - names):
            self.problems.append(f"step {step.name!r} comes after {name!r}, which is not a step")
        needed, uses = self.needs.setdefault(step.name, after & names), self.uses.setdefault(step.name, {})
        for key, text in _templates_of(step):
            where = f"step {step.name!r}, {'session' if key is None else f'input {key!r}'}"
            try:
                used = uses_in(text, collections=RESERVED)
            except ConfigurationError as error:
                self.problems.append(f"{where}: {error}")
                continue
            uses.setdefault(key, set()).update(used)
            needed |= used.keys() & names
            for name in sorted(used):
                if name not in names and name not in self.inputs and name not in RESERVED:
                    self.problems.append(f"{where}: {name!r} is no step, and no input that has a value")
                for attribute in sorted(used[name].difference(RESULT_FIELDS) if name in names else ()):
                    has = f"a step has no {attribute!r}; it has output, data, tasks and more ({name})"
                    self.problems.append(f"{where}: {has}")
        try:
            step.options(session=None if re.search("{[{%]", f"{step.session}") else step.session)
        except ConfigurationError as error:
            self.problems.append(f"step {step.name!r}: {str(error).removesuffix(' Nothing was started.')}")

    # The crews

    async def check(self) -> None:
        """Load the crews, ask each for its inputs, and note all problems."""
        await self.load()
        # One request for each crew and token, however many steps use it.
        crews = {(crew.url, crew.token): crew for crew in self.crews.values()}
        answers = dict(zip(crews, await asyncio.gather(*map(self._ask, crews.values())), strict=True))
        for name, crew in self.crews.items():
            if answer := answers[crew.url, crew.token]:
                token, expected = answer
                # Two blocks may be for one crew: each keeps its other settings.
                self.crews[name] = replace(crew.with_token(token), expected_inputs=tuple(expected))
        self.check_inputs()

    async def load(self) -> None:
        """Load the crews, and note a problem for each block that is not stored."""
        names = {step.crew for step in self.steps if isinstance(step.crew, str)}
        loaded = await asyncio.gather(*map(load_crew, names), return_exceptions=True)
        stored = dict(zip(names, loaded, strict=True))
        for step in self.steps:
            crew = stored[step.crew] if isinstance(step.crew, str) else await load_crew(step.crew)
            if isinstance(crew, Crew):
                self.crews[step.name] = crew
            elif isinstance(crew, ValueError):  # no such block, or one that cannot be a crew
                self.problems.append(f"step {step.name!r}: {crew}")
            else:
                raise crew

    async def _ask(self, crew: Crew) -> tuple[SecretStr, list[CrewInput]] | None:
        """Return a crew's token, which may have been rotated since it was loaded, and its inputs."""
        failed = f"crew {crew.label} cannot be asked for its inputs"
        try:
            async with CrewSession(crew) as session:
                return session.crew.token, await session.call(lambda client: client.inputs())
        except CrewError as error:
            if isinstance(error, CrewAPIError) and error.status_code == 404:  # it has no `/inputs`
                return crew.token, []
            is_problem = isinstance(error, AuthenticationError | ConfigurationError)
            (self.problems if is_problem else self.unreachable).append(f"{failed}: {error}")
        return None

    def check_inputs(self) -> None:
        """Note a problem for inputs that a step lacks or its crew does not name, and for a session that may tell a
        secret.
        """
        for step in self.steps:
            crew = self.crews.get(step.name)
            expected = (crew and crew.expected_inputs) or ()
            values = self.inputs if step.inputs is None else step.inputs
            if missing := missing_inputs(expected, values):
                self.problems.append(f"step {step.name!r} lacks the inputs {', '.join(missing)} of its crew")
            if step.inputs is None and self.unreachable and crew and crew.expected_inputs is None:
                self.problems.append(f"step {step.name!r} gives no inputs, and its crew cannot say which it takes")
            takes_any = step.inputs is None or (crew and crew.allow_extra_inputs)
            if not takes_any and (unknown := unknown_inputs(expected, values)):
                names = [item.name for item in expected]
                guessed = f"{with_guesses(unknown, names)}; its crew takes {listed_names(names)}"
                self.problems.append(f"step {step.name!r} gives the unknown inputs {guessed}")
            if self.is_secret and self.uses[step.name].get(None):
                self.problems.append(f"step {step.name!r}: its session may tell a secret input, so it is no template")

    def refuse_problems(self) -> None:
        """Raise one ConfigurationError with all problems, if there are any."""
        if self.problems:
            listed = "; ".join([*self.problems, *self.unreachable])
            raise ConfigurationError(f"The pipeline cannot run, and nothing was started: {listed}.")

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
            crew = self.crews.get(step.name)
            for name in crew.secret_inputs if crew else ():
                names |= self._sources_of(step, name) | (self.inputs.keys() & {name})
        return names

    def secret_inputs_of(self, step: CrewStep) -> set[str]:
        """Return the inputs of a step that are made of secret inputs of the pipeline, by name or by a template."""
        names = self.inputs if step.inputs is None else step.inputs
        return {name for name in names if self._sources_of(step, name) & self.secret_inputs}

    def _sources_of(self, step: CrewStep, name: str) -> set[str]:
        """Return the pipeline's inputs that feed an input of a step, by the same name or by templates."""
        if step.inputs is None:
            return self.inputs.keys() & {name}
        used = self.uses[step.name].get(name, set())
        return {*self.inputs} if "inputs" in used else self.inputs.keys() & used  # `inputs[name]` may be any

    # The inputs of steps

    def inputs_of(self, step: CrewStep, results: Mapping[str, CrewResult[Any]]) -> Mapping[str, Any]:
        """Return a step's inputs, after the steps that it needs have run.

        Raises:
            ConfigurationError: A template or a function uses a name that does not exist.
        """
        if step.inputs is None:
            crew = self.crews.get(step.name)
            names = {item.name for item in (crew and crew.expected_inputs) or ()}
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
        """Return the plan of the pipeline, after `check`. It shows templates unchanged, and no input where one is
        secret.
        """
        steps = {step.name: step for step in self.steps}
        blocks: list[str] = []
        for name in self.order:
            step, crew = steps[name], self.crews.get(name)
            after = ", ".join(other for other in self.order if other in self.needs[name])
            lines = [f"{name}: crew {crew.label if crew else step.crew}" + (f", after {after}" if after else "")]
            for key, value in (step.inputs or {}).items():
                shown = f"from {_name_of(value)}" if callable(value) else value
                lines.append(f"  {key} = {MASK if self.is_secret else shown}")
            lines += [] if step.session is None else [f"  session {step.session}"]
            blocks.append("\n".join(lines))
        problems = [*self.problems, *self.unreachable]
        if problems:
            blocks.append("\n".join(f"Problem: {problem}" for problem in problems))
        return PipelinePlan([steps[name] for name in self.order], problems, "\n\n".join(blocks))


def leaves_in(value: Any) -> Iterator[Any]:
    """Yield the values within lists and mappings, at any depth. Each text among them is a template."""
    if isinstance(value, Mapping):
        value = list(cast("Mapping[Any, Any]", value).values())
    if isinstance(value, list | tuple):
        for item in cast("Sequence[Any]", value):
            yield from leaves_in(item)
    else:
        yield value


def _templates_of(step: CrewStep) -> Iterator[tuple[str | None, str]]:
    """Yield each template of a step with the name of its input, and its session with None."""
    for key, value in (step.inputs or {}).items():
        yield from ((key, leaf) for leaf in leaves_in(value) if isinstance(leaf, str))
    if step.session is not None:
        yield None, str(step.session)


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
