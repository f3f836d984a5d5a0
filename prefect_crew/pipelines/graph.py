"""The steps of a pipeline as a graph: what needs what, what is wrong with it, what each step's inputs become. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any, cast
from uuid import UUID

from prefect_crew._text import listed_names, with_guesses
from prefect_crew.blocks import DeployedCrew
from prefect_crew.client.inputs import missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput, CrewResult
from prefect_crew.client.redaction import revealed
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.runs.options import check_choices
from prefect_crew.runs.reviews.questions import ReviewChoice
from prefect_crew.templates import GLOBALS, RESULT_FIELDS, attributes_in, names_in, render

RESERVED = frozenset({"inputs", "steps"})
"""What templates call the mappings of all inputs and of all results."""
_LOOKUP = re.compile(r"""\binputs\s*(\.\s*\w+|\[\s*("[^"]*"|'[^']*')\s*\])""")

StepInputs = Mapping[str, Any] | Callable[["PipelineContext"], Mapping[str, Any]]
"""Inputs by name, each a plain value, a template, or a function of the context; or one function that gives them all."""


@dataclass(frozen=True)
class CrewStep:
    """One crew in a pipeline.

    Args:
        name: Its name, unique in the pipeline.
        crew: A crew, or the name of a stored block.
        inputs: Its inputs by name. A text is a template over the pipeline's inputs and earlier steps:
            `"{{ topic }}"`, `"{{ research.output }}"`, `"{{ research.data.title }}"`,
            `"{{ research.tasks[0].output }}"`, `"{{ steps['a b'].output }}"`. Texts within lists and mappings are
            templates too. A function is called with the context.
            Left out, the pipeline's inputs of the crew's names.
        after: Names of steps to wait for, in addition to those that its templates use. A function sees these steps
            only.
        wait: How to wait for it, in place of the block's policy.
        output_type: A pydantic model that its `data` is to be an instance of.
        review: What answers when it waits for a person, as for `run_crew`, in place of the pipeline's.
        restore_from: The id of a state of a Flow that it starts from, as for `run_crew`.
    """

    name: str
    crew: DeployedCrew | Crew | str
    inputs: StepInputs | None = field(default=None, repr=False)
    after: Sequence[str] = ()
    wait: WaitPolicy | None = None
    output_type: Any = None
    review: ReviewChoice | None = None
    restore_from: str | UUID | None = None


@dataclass(frozen=True)
class PipelineContext:
    """What a step's function sees: `context.inputs["topic"]`, `context["research"].output`."""

    inputs: Mapping[str, Any] = field(repr=False)
    results: Mapping[str, CrewResult]

    def __getitem__(self, step: str) -> CrewResult:
        try:
            return self.results[step]
        except KeyError:
            raise ConfigurationError(
                f"Step {step!r} is not known here: name it in `after`, so that it has run before."
            ) from None


@dataclass
class PipelineGraph:
    """The steps of one pipeline, checked as far as that needs no request. `problems` has all that is wrong."""

    steps: Sequence[CrewStep]
    inputs: Mapping[str, Any] = field(repr=False)
    needs: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    problems: list[str] = field(default_factory=list[str])
    sorts: bool = True
    """Whether the steps have an order; else there are no `layers`."""

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        if not names:
            self.problems.append("the pipeline has no steps")
        self.problems += [f"two steps are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
        for name in names:
            reserved = name in RESERVED or name in GLOBALS
            if reserved or name in self.inputs:
                what = "a reserved name" if reserved else "the name of an input"
                self.problems.append(f"step {name!r} has {what}: call it something else")
            if not name.strip() or "/" in name:
                self.problems.append(f"a step cannot be named {name!r}: give it a word without slashes")
        for step in self.steps:
            self.needs[step.name] = self._needed_by(step)
            try:
                check_choices(
                    wait=step.wait,
                    output_type=step.output_type,
                    review=step.review,
                    restore_from=step.restore_from,
                )
            except ConfigurationError as error:
                self.problems.append(f"step {step.name!r}: {str(error).removesuffix(' Nothing was started.')}")
        self._check_cycles()

    def _needed_by(self, step: CrewStep) -> set[str]:
        known = {other.name for other in self.steps}
        needed: set[str] = set()
        for name in (step.after,) if isinstance(step.after, str) else step.after:
            if name in known:
                needed.add(name)
            else:
                self.problems.append(f"step {step.name!r} comes after {name!r}, which is not a step")
        if step.inputs is None or callable(step.inputs):
            return needed
        for key, value in step.inputs.items():
            for text in texts_in(value):
                needed |= self._steps_read_by(text, f"step {step.name!r}, input {key!r}", known)
        return needed

    def _steps_read_by(self, text: str, where: str, steps: set[str]) -> set[str]:
        """Return the steps that a template reads, and note what it names that is not there."""
        try:
            used = names_in(text, collections=RESERVED)
            read = attributes_in(text, steps, collection="steps")
        except ConfigurationError as error:
            self.problems.append(f"{where}: {error}")
            return set()
        for name in sorted(used - steps - set(self.inputs)):
            self.problems.append(f"{where}: {name!r} is neither an input of the pipeline nor a step")
        for name, attribute in sorted(read):
            # What the sandbox forbids anyway is for it to say.
            if attribute not in RESULT_FIELDS and not attribute.startswith("_"):
                self.problems.append(
                    f"{where}: a step has no {attribute!r}; it has output, data, tasks and more ({name})"
                )
        return used & steps

    def _check_cycles(self) -> None:
        try:
            TopologicalSorter(self.needs).prepare()
        except CycleError as error:
            self.sorts = False
            self.problems.append(f"the steps depend on each other in a circle: {' -> '.join(map(str, error.args[1]))}")

    def check_inputs(self, expected: Mapping[str, Sequence[CrewInput]], extra: Collection[str] = ()) -> None:
        """Note the inputs that each step lacks, and those that its crew does not name, but for the steps in `extra`.

        Functions tell theirs later.
        """
        for step in {step.name: step for step in self.steps}.values():
            if callable(step.inputs):
                continue
            given = self.inputs if step.inputs is None else step.inputs
            known = expected.get(step.name, ())
            missing = missing_inputs(known, given)
            if missing:
                self.problems.append(f"step {step.name!r} lacks the inputs {', '.join(missing)} of its crew")
            if step.inputs is not None and step.name not in extra and (unknown := unknown_inputs(known, given)):
                names = [item.name for item in known]
                guessed = f"{with_guesses(unknown, names)}; its crew takes {listed_names(names)}"
                self.problems.append(f"step {step.name!r} gives the unknown inputs {guessed}")

    def layers(self) -> list[list[str]]:
        """Return the steps in layers: each needs only steps of the layers before it."""
        sorter = TopologicalSorter(self.needs)
        sorter.prepare()
        layers: list[list[str]] = []
        while sorter.is_active():
            ready = sorted(sorter.get_ready(), key=[step.name for step in self.steps].index)
            layers.append(ready)
            sorter.done(*ready)
        return layers

    def before(self, name: str) -> set[str]:
        """Return all the steps that a step needs, also by way of others."""
        found: set[str] = set()
        open_names = list(self.needs[name])
        while open_names:
            other = open_names.pop()
            if other not in found:
                found.add(other)
                open_names += self.needs[other]
        return found

    def inputs_behind(self, step: CrewStep, names: Collection[str]) -> set[str]:
        """Return the pipeline's inputs that go into some inputs of a step by their names or by templates."""
        if step.inputs is None:
            return {name for name in names if name in self.inputs}
        if callable(step.inputs):
            return set()
        return {read for name in names for read in self._inputs_read_in(step.inputs.get(name))}

    def has_function_for(self, step: CrewStep, names: Collection[str]) -> bool:
        """Return whether a function gives one of these inputs of a step, or may: nobody knows what it reads."""
        if step.inputs is None:
            return False
        return bool(names) if callable(step.inputs) else any(callable(step.inputs.get(name)) for name in names)

    def inputs_made_of(self, step: CrewStep, names: Collection[str]) -> set[str]:
        """Return the inputs of a step that some of the pipeline's inputs go into by their names or by templates."""
        if step.inputs is None:
            return {name for name in names if name in self.inputs}
        if callable(step.inputs):
            return set()
        return {name for name, value in step.inputs.items() if not self._inputs_read_in(value).isdisjoint(names)}

    def _inputs_read_in(self, value: Any) -> set[str]:
        """Return the pipeline's inputs that the templates in a value read."""
        found: set[str] = set()
        for text in texts_in(value):
            try:
                found |= names_in(text, collections=RESERVED)
                by_expression = "inputs" in names_in(_LOOKUP.sub("0", text))
            except ConfigurationError:  # it is among the problems
                continue
            if by_expression:  # such as `inputs[name]`
                return set(self.inputs)
        return found & set(self.inputs)

    def inputs_of(
        self, step: CrewStep, results: Mapping[str, CrewResult], expected: Sequence[CrewInput]
    ) -> Mapping[str, Any]:
        """Return a step's inputs, once all that it needs has run.

        Raises:
            ConfigurationError: A template or a function uses what is not there.
        """
        seen = {name: results[name] for name in self.before(step.name)}
        context = PipelineContext(self.inputs, seen)
        if step.inputs is None:
            names = {known.name for known in expected}
            return {key: value for key, value in self.inputs.items() if not names or key in names}
        given = {name: revealed(value) for name, value in self.inputs.items()}
        values = {**given, **seen, "inputs": given, "steps": seen}
        if callable(step.inputs):
            return _as_inputs(_call_function(step.inputs, context), step.inputs)
        return {
            key: _call_function(value, context) if callable(value) else _render_texts(value, values)
            for key, value in step.inputs.items()
        }

    def known_inputs_of(self, step: CrewStep) -> dict[str, str]:
        """Return what is known of a step's inputs before anything has run, for people."""
        if step.inputs is None:
            return {key: str(value) for key, value in self.inputs.items()}
        if callable(step.inputs):
            return {"…": f"from {_function_name(step.inputs)}"}
        known: dict[str, str] = {}
        for key, value in step.inputs.items():
            if callable(value):
                known[key] = f"from {_function_name(value)}"
                continue
            try:
                later = any(names_in(text, collections=RESERVED) & set(self.needs) for text in texts_in(value))
                known[key] = str(value if later else _render_texts(value, {**self.inputs, "inputs": self.inputs}))
            except ConfigurationError:  # it is among the problems
                known[key] = str(value)
        return known


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts in a value, each a template."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in cast("Mapping[Any, Any]", value).values():
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[Any]", value):
            yield from texts_in(item)


def _render_texts(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return render(value, values)
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
        said = f"{type(error).__name__}: {error}"
        raise ConfigurationError(f"{_function_name(function)} gave no inputs: {said}. Nothing was started.") from error


def _as_inputs(given: Any, function: Any) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return cast("Mapping[str, Any]", given)
    kind = type(given).__name__
    raise ConfigurationError(
        f"{_function_name(function)} gave a {kind} instead of inputs by name. Nothing was started."
    )


def _function_name(function: Any) -> str:
    name = getattr(function, "__name__", "a function")
    return "a function" if name == "<lambda>" else f"{name}()"
