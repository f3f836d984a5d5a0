"""A pipeline as plain values: in YAML, in JSON, or as a parameter of a deployed flow. Its steps need no Python code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from prefect_crew._text import excerpt, listed_names, problems_of, with_guesses
from prefect_crew.client.models import CrewInput
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.pipelines.graph import CrewStep

_NAME_ALONE = re.compile(r"""\s*\{\{[\s(]*[^\W\d]\w*(\.\w+|\[\s*("[^"]*"|'[^']*')\s*\])*[\s)]*\}\}\s*""")
"""A template with only the name of an input, or of a part of an input."""


class _Plain(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


class PipelineInput(_Plain):
    """One input of a pipeline. With a default, or with `required: false`, it may be left out."""

    type: Literal["string", "integer", "number", "boolean", "array", "object"] | None = Field(
        default=None, description="Its type in JSON. Empty: text."
    )
    description: str | None = Field(default=None, description="Description in the run form.")
    required: bool = Field(default=True, description="Whether each run must give the input if it has no default.")
    default: JsonValue = Field(
        default=None, description="Value if a run leaves it out. For a secret input: the name of a Secret block."
    )
    secret: bool = Field(
        default=False, description="Whether a run gives the name of the Prefect Secret block that holds the input."
    )

    @property
    def needed(self) -> bool:
        """Whether each run has to give this input."""
        return self.required and self.default is None


class StepDefinition(_Plain):
    """One step: the arguments of `CrewStep` that are plain values."""

    name: str = Field(description="Its name, unique in the pipeline.")
    crew: str = Field(description="The name of the crew's block, under Blocks.")
    inputs: dict[str, JsonValue] | None = Field(
        default=None,
        description="The crew's inputs by name; texts are templates over the pipeline's inputs and earlier steps. "
        "Empty: the pipeline's inputs with the names of the crew's inputs.",
    )
    after: str | tuple[str, ...] = Field(
        default=(), description="Steps to wait for, in addition to those that its templates use."
    )
    wait: WaitPolicy | None = Field(default=None, description="How to wait, in place of the block's policy.")
    review: Literal["form"] | None = Field(
        default=None, description="Place of questions to people: a form on the flow run's page."
    )
    session: str | None = Field(
        default=None, description="The session of a CrewAI Flow, a template like the texts of `inputs`."
    )


class PipelineDefinition(_Plain):
    """A pipeline: its name, its inputs and its steps."""

    name: str = Field(
        min_length=1, description="Its name: on its artifact, and in an idempotency key that is left out."
    )
    description: str | None = Field(default=None, description="Description for people.")
    inputs: dict[str, Annotated[PipelineInput, BeforeValidator(lambda value: {} if value is None else value)]] = Field(
        default_factory=dict[str, PipelineInput], description="Its inputs by name, for the templates of the steps."
    )
    steps: tuple[StepDefinition, ...] = Field(min_length=1, description="Its steps, in any order.")
    wait: WaitPolicy | None = Field(default=None, description="How to wait, for steps without a policy of their own.")
    review: Literal["form"] | None = Field(
        default=None, description="Place of questions to people, for steps without their own."
    )

    def crew_steps(self) -> list[CrewStep]:
        """Return the steps for `run_pipeline`."""
        return [CrewStep(**{name: getattr(step, name) for name in StepDefinition.model_fields}) for step in self.steps]

    def values(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of a run, and then defaults for missing ones.

        Raises:
            ConfigurationError: A required input is missing, or `inputs` has a name that the pipeline does not take.
        """
        values = {name: value for name, value in inputs.items() if value is not None}
        if unknown := [name for name in values if name not in self.inputs]:
            raise ConfigurationError(
                f"Pipeline {self.name!r} does not take the inputs {with_guesses(unknown, list(self.inputs))}; it takes "
                f"{listed_names(list(self.inputs)) or 'none'}. Nothing was started."
            )
        if missing := [name for name, item in self.inputs.items() if item.needed and name not in values]:
            raise ConfigurationError(
                f"Pipeline {self.name!r} lacks the inputs {', '.join(missing)}. Nothing was started. Give them as the "
                "parameter `inputs` of the run, or as defaults of the deployment."
            )
        defaults = {name: item.default for name, item in self.inputs.items() if item.default is not None}
        return {**values, **{name: default for name, default in defaults.items() if name not in values}}

    def stored_secrets(self, secret_inputs: Mapping[str, Sequence[str]]) -> list[str]:
        """Return a problem for each secret input of a crew whose value is in a step, where everybody can read it.

        Args:
            secret_inputs: The names of each step's secret inputs, by the step's name.
        """
        return [
            f"step {step.name!r}, input {name!r}: a deployment would store this secret in plain text; write "
            f"'{{{{ {re.sub(r'[^0-9a-zA-Z_]', '_', name)} }}}}', an input of the pipeline, and nothing else"
            for step in self.steps
            for name in secret_inputs.get(step.name, ())
            if (value := (step.inputs or {}).get(name)) is not None and not _NAME_ALONE.fullmatch(str(value))
        ]


def as_pipeline_input(item: CrewInput) -> PipelineInput:
    """Return a pipeline's input for an input of a crew."""
    kind: Any = _TYPES.get((item.type or "").lower())
    own = None if item.default is None else f"The crew's own default: {excerpt(str(item.default), 200)}."
    parts = [item.description, own]
    return PipelineInput(type=kind, description=" ".join(filter(None, parts)) or None, required=item.required)


_TYPES = {
    **dict.fromkeys(("integer", "int"), "integer"),
    **dict.fromkeys(("number", "float"), "number"),
    **dict.fromkeys(("boolean", "bool"), "boolean"),
    **dict.fromkeys(("array", "list"), "array"),
    **dict.fromkeys(("object", "dict"), "object"),
}


def read_pipeline(text: str, file: str) -> PipelineDefinition:
    """Return the pipeline in a file. If it has no name, it gets the file's name.

    Args:
        text: The file's content, YAML or JSON.
        file: Its path, for messages.

    Raises:
        ConfigurationError: The file holds no pipeline. The message names the step and the field.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{file} is neither YAML nor JSON: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file} holds no pipeline: expected a mapping with `steps`, and `inputs` and `name`.")
    raw = cast("dict[Any, Any]", content)
    raw.setdefault("name", re.split(r"[\\/]", file)[-1].rsplit(".", 1)[0])
    try:
        # Through JSON, since Prefect stores JSON. A date in YAML, for example, has no JSON form and is refused.
        return PipelineDefinition.model_validate(json.loads(json.dumps(raw, allow_nan=False)))
    except ValidationError as error:
        problems = "; ".join(problems_of(error))
        raise ConfigurationError(f"{file} is not a pipeline that can run: {problems}.") from None
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{file} has a value that JSON cannot hold: {error}. Quote the value.") from None
