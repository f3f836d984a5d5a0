"""The answers of the crew API as one set of models, whatever response format the server uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from prefect_crew.exceptions import ConfigurationError
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from typing_extensions import TypeVar as _TypeVar

    # The type of `result.data`: the `output_type`, else a plain JSON value.
    Data = _TypeVar("Data", bound="BaseModel | JsonValue", default=JsonValue, covariant=True)
else:
    Data = TypeVar("Data")  # without a bound and a default pydantic takes any value as it is


class _Model(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class CrewInput(_Model):
    """One input of a crew, from `GET /inputs`. If a caller leaves out an optional input, the crew uses its own default.

    `default` is that default if the server reports it, else None.
    """

    name: str
    type: str | None = None
    description: str | None = None
    required: bool = True
    default: Any = None


class TokenUsage(_Model):
    """Tokens that a run used. A count that the server did not report is None, never 0."""

    total_tokens: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    successful_requests: int | None = None

    @classmethod
    def sum(cls, usages: Iterable[TokenUsage]) -> TokenUsage | None:
        """Add up several usages: each count is the sum of its reported values. None if none reports any count."""
        sums: dict[str, int] = {}
        for usage in usages:
            for name, count in usage:
                if count is not None:
                    sums[name] = sums.get(name, 0) + count
        return cls(**sums) if sums else None


class TaskResult(_Model):
    """One task of a run. `execution_time` is in seconds; `name` is the server's name of the task."""

    name: str | None = None
    agent: str | None = None
    output: str | None = None
    data: Any = None
    execution_time: float | None = None
    description: str | None = None
    raw: Any = Field(default=None, repr=False)


class CrewResult(_Model, Generic[Data]):
    """The result of a completed run.

    `output` is the text. `data` is the structured result, or None; with an `output_type` it is an instance of that
    model, and type checkers know it: `CrewResult[Trip]`. `execution_time` is in seconds, as the server measured it.
    `usage` has the reported tokens, `cost` is the cost by the crew's price; each is None if unknown. `raw` is the whole
    body of the last status answer, None if the result comes from the crew database. `idempotency_key` is the key of
    the run, given or derived; None from a `CrewClient`.
    """

    output: str
    data: Data = cast("Any", None)
    tasks: list[TaskResult] = Field(default_factory=list[TaskResult])
    kickoff_id: str
    idempotency_key: str | None = None
    state: CrewState = CrewState.COMPLETED
    execution_time: float | None = None
    usage: TokenUsage | None = None
    cost: float | None = None
    raw: Any = Field(default=None, repr=False)


class CrewStatus(_Model):
    """One answer of the status call.

    `raw_state` is the server's own word for the state; if no documentation has it, `known_state` is False and the run
    counts as running. `last_task` is the task that ended last, if the server names it. `progress` is 0..1.
    `human_task_id` is the task that waits for a person, if the server names it. `output` and `data` are None until
    there is a result; an output that the server left empty is "". `idempotency_key` is the key in the run's `meta`.
    The repr shows no text of the crew.
    """

    kickoff_id: str
    state: CrewState
    raw_state: str | None = Field(default=None, repr=False)
    known_state: bool = True
    message: str | None = Field(default=None, repr=False)
    current_task: str | None = Field(default=None, repr=False)
    last_task: str | None = Field(default=None, repr=False)
    last_step: str | None = Field(default=None, repr=False)
    completed_tasks: int | None = None
    total_tasks: int | None = None
    progress: float | None = None
    human_task_id: str | None = Field(default=None, repr=False)
    tasks: list[TaskResult] = Field(default_factory=list[TaskResult], repr=False)
    output: str | None = Field(default=None, repr=False)
    data: Any = Field(default=None, repr=False)
    error: str | None = Field(default=None, repr=False)
    execution_time: float | None = None
    usage: TokenUsage | None = None
    idempotency_key: str | None = Field(default=None, repr=False)
    raw: Any = Field(default=None, repr=False)

    def result(self) -> CrewResult:
        """Return the result of a completed run.

        Raises:
            ConfigurationError: The run has another state, and so no result.
        """
        if self.state is not CrewState.COMPLETED:
            raise ConfigurationError(f"Run {self.kickoff_id} is {self.state}, not completed: it has no result.")
        values: dict[str, Any] = {name: getattr(self, name, None) for name in CrewResult.model_fields}
        values["output"] = self.output or ""
        return CrewResult(**values)


class ResumeAnswer(_Model):
    """The server's answer to `/resume`. Any 2xx means that it accepted, even with an empty body.

    `status` is the server's word, documented as "resumed", "retrying" or "completed"; None without such a word.
    """

    kickoff_id: str | None = None
    status: str | None = None
    message: str | None = None


class StopOutcome(StrEnum):
    """The outcome of a `/stop`."""

    STOPPED = "stopped"
    """The server says that the run is stopped."""
    REQUESTED = "requested"
    """The server accepted the request, and did not say that the run is stopped. The status call shows the end."""
    NOT_STOPPABLE = "not stoppable"
    """The run is in a state that cannot be stopped, mostly because it has ended."""
    UNKNOWN_RUN = "unknown run"
    """The server has `/stop`, and does not know the run."""
    UNSUPPORTED = "unsupported"
    """The server has no `/stop`: the run goes on."""


class StopAnswer(_Model):
    """The server's answer to `/stop`. `state` is the state of the run, None if the answer does not have it."""

    kickoff_id: str
    outcome: StopOutcome
    state: CrewState | None = None
    raw_state: str | None = None
    message: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether the server has stopped the run, or accepted the request to stop it."""
        return self.outcome in (StopOutcome.STOPPED, StopOutcome.REQUESTED)


class Review(BaseModel):
    """An answer: approve the task's output, or reject it and have the task done again with the feedback.

    `option` is one of the question's options. Default: the option with the meaning of `approve`, if there is one. It is
    sent alone. With feedback, a model of the Flow reads the outcome from the text, and may read another one. `by` is
    the name of the giver. Default: the name of the function, `the form` or the user of this machine.

    An answer on record has the other fields as well. `round` counts the questions about the task, from 1. `outcome`
    says whether the answer arrived: `intended` is on record and not sent yet.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    approve: bool
    feedback: str = Field(default="", repr=False)
    option: str | None = None
    by: str = ""
    at: datetime | None = None
    task_id: str = ""
    round: int = 0
    outcome: Literal["intended", "sent", "uncertain"] = "intended"


class ReviewRequest(BaseModel):
    """A question that a crew asks a person.

    `output` is the text to judge, of a Flow with its state; None if unknown: `withheld` may say why. `round` counts the
    questions about the task, from 1. `answers` are the earlier answers to the run's questions. `meta` is the `meta` of
    the kickoff. A Flow also sends `options`, the outcomes that it can continue with, and `message`, its own words. `id`
    is random, and part of the link that answers: whoever has it may answer.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    kickoff_id: str
    task_id: str = Field(repr=False)
    output: str | None = Field(default=None, repr=False)
    round: int = 1
    answers: tuple[Review, ...] = Field(default=(), repr=False)
    meta: Mapping[str, Any] | None = Field(default=None, repr=False)
    options: tuple[str, ...] = ()
    message: str | None = Field(default=None, repr=False)
    id: str = Field(default="", repr=False)
    withheld: str | None = Field(default=None, repr=False)
