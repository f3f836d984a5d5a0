"""The options of a run, checked before anything is started, and `RunRequest`: a crew, its inputs and the options."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    PrivateAttr,
    ValidationError,
)

from prefect_crew.budgets import Budget
from prefect_crew.client._retry_safety import POST_DEADLINE
from prefect_crew.client.inputs import Inputs, Unshown
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.runs.budgets import allowances
from prefect_crew.runs.keys import RunIdentity, normalize_key
from prefect_crew.settings import CrewSettings
from prefect_crew.store.decision import Request

MAX_SESSION = 200
"""Characters of the name of a session."""


def _session(name: str) -> str:
    name = normalize_key(name)
    # Only steps of pipelines fill a template.
    if not 0 < len(name) <= MAX_SESSION or any(c in "{}" or unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise ValueError("no name")
    return name


def _whole(text: str) -> str:
    text.encode()  # raises UnicodeEncodeError, a ValueError, if the text contains a lone surrogate
    return text


_Text = Annotated[str, AfterValidator(_whole)]
_TEXT = "a text, without half a character (a lone surrogate)"


class RunOptions(BaseModel):
    """The options of `run_crew`; its docstring explains them. The description of a field says which values it takes.

    A public function makes this from its keyword arguments, before anything is started. No repr shows `meta`, which may
    contain secrets.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    name: _Text | None = Field(default=None, description=_TEXT)
    idempotency_key: _Text | None = Field(default=None, description=_TEXT)
    force_new: bool = Field(default=False, description="True or False")
    meta: Annotated[InstanceOf[Mapping[str, Any]], AfterValidator(Unshown)] | None = Field(
        default=None, description="a mapping: an object of JSON"
    )
    wait: InstanceOf[WaitPolicy] | None = Field(
        default=None, description="a WaitPolicy, such as WaitPolicy(timeout=600)"
    )
    output_type: type[BaseModel] | None = Field(
        default=None, description="a pydantic model: a class that inherits from pydantic.BaseModel"
    )
    review: Literal["form"] | Callable[..., Any] | None = Field(default=None, description="'form' or a function")
    webhooks: InstanceOf[Webhooks] | None = Field(default=None, repr=False, description="Webhooks(task=…, crew=…)")
    restore_from: str | None = Field(
        default=None, description="the kickoff id of the run whose state a Flow takes up, a text"
    )
    session: Annotated[str, AfterValidator(_session)] | None = Field(
        default=None, description=f"a name of 1 to {MAX_SESSION} characters, without braces or control characters"
    )
    budgets: Annotated[Sequence[InstanceOf[Budget]], AfterValidator(tuple)] = Field(
        default=(), description="Budgets, such as [Budget(max_cost=20, per='day')]"
    )
    kickoff_options: InstanceOf[Mapping[str, Any]] | None = Field(
        default=None, repr=False, description="a mapping of options of Prefect for a task, such as {'retries': 5}"
    )
    wait_options: InstanceOf[Mapping[str, Any]] | None = Field(
        default=None, repr=False, description="a mapping of options of Prefect for a task, such as {'retries': 5}"
    )
    _called_at: float = PrivateAttr(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """Seconds since the call of the public function."""
        return time.monotonic() - self._called_at

    @classmethod
    def of(cls, **options: Any) -> RunOptions:
        """Return the options from a user's keyword arguments.

        Raises:
            ConfigurationError: An option has a value of a wrong kind. The message says which kind it takes.
        """
        try:
            made = cls(**{name: value for name, value in options.items() if value is not None})
        except ValidationError as error:
            name = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
        else:
            if made.session is not None and made.restore_from is not None:
                raise ConfigurationError(
                    "A session chooses the state to restore itself. Nothing was started. Leave restore_from out, or "
                    "leave session out."
                )
            return made
        # Outside of the `except` block: the error of pydantic has the value, which may be secret.
        raise ConfigurationError(f"{name} has to be {cls.model_fields[name].description}. Nothing was started.")


@dataclass(frozen=True)
class BatchRow:
    """The row of a batch that a run is for. `owner` is the nonce of the process that holds the batch. `on_wait` is
    called when its kickoff waits for a turn, a limit or another call."""

    batch: str
    key: str
    owner: str
    on_wait: Callable[[], None] | None = None


@dataclass(frozen=True)
class RunRequest:
    """The request for one run. Its kickoff makes it, and it never changes, whatever happens to the attempts.

    A run for a `row` logs no decision, and its batch sends a refused kickoff again, at its pace. `settings` say whether
    there are webhooks; a read takes 3 ms.
    """

    crew: Crew
    inputs: Inputs
    options: RunOptions = field(default_factory=RunOptions)
    row: BatchRow | None = None
    settings: CrewSettings = field(default_factory=CrewSettings)

    @classmethod
    def of(cls, crew: Crew, inputs: Inputs, options: RunOptions) -> RunRequest:
        """Return the request for one run, with the inputs encoded and checked by the crew. Raises as `Crew.take`."""
        return cls(crew, crew.take(inputs, restore_from=options.restore_from, session=options.session), options)

    def for_store(self, identity: RunIdentity) -> Request:
        """Return the request as the crew database takes it. Raises ConfigurationError: a budget has no estimate."""
        crew, inputs, row = self.crew, self.inputs, self.row
        # What budgets per batch count together.
        batch = crew.batch or identity.flow_run_id or identity.idempotency_key
        return Request(
            key=identity.idempotency_key,
            crew_url=crew.url,
            inputs_digest=inputs.digest,
            owner=identity.nonce.text,
            input_digests=inputs.digests,
            flow_run_id=identity.flow_run_id,
            flow_run_count=identity.flow_run_count,
            retried_since=identity.retried_since,
            max_attempts=crew.max_attempts,
            crew=crew.label,
            process=identity.process,
            post_seconds=POST_DEADLINE * crew.request_timeout,
            limit=crew.concurrency_limit,
            allowances=allowances(crew, batch) if crew.budgets else (),
            session=inputs.session,
            step=self.options.name,
            batch=None if row is None else row.batch,
            row_key=None if row is None else row.key,
            batch_owner=None if row is None else row.owner,
            secret_names=inputs.secret_names,
            has_webhooks=self.options.webhooks is None and bool(self.settings.webhook_url),
            crew_version=crew.version,
        )
