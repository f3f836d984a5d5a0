"""`DeployedCrew`, a deployed crew as a Prefect block, and `CrewRun`, a run of it: Prefect's JobBlock and JobRun."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import shlex
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from prefect.blocks.abstract import JobBlock, JobRun
from prefect.blocks.system import Secret
from prefect.exceptions import ObjectNotFound
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic import Secret as SealedValue

from prefect_crew._internal.asyncio_tasks import sync_version
from prefect_crew._internal.prefect_errors import naming_prefect_away
from prefect_crew._text import problems_of
from prefect_crew.budgets import Budget
from prefect_crew.client._transport import checked_url
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewResult, ResumeAnswer, StopAnswer
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.prices import Price
from prefect_crew.settings import CrewSettings, documentation_url

if TYPE_CHECKING:
    from prefect_crew.client._client import CrewClient
    from prefect_crew.client.webhooks import Webhooks
    from prefect_crew.runs.run import LiveRun
    from prefect_crew.store.decision import Attempt


# Prefect imports this module at each start. The modules that run a crew take half a second, so methods import them.
_BLOCK_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class DeployedCrew(JobBlock[CrewResult]):
    """A crew that is deployed behind the crew API, with the settings for every run of it.

    `prefect-crew docs` prints the documentation.

    Example:
        Load a stored crew and run it:
        ```python
        from prefect_crew import DeployedCrew, run_crew

        crew = DeployedCrew.load("BLOCK_NAME")
        result = run_crew(crew, {"topic": "Lisbon"})
        ```
    """

    # Without this, pydantic's error about one field shows all values, and so the token.
    model_config: ClassVar[ConfigDict] = ConfigDict(hide_input_in_errors=True)

    _block_type_name = "Deployed Crew"
    _block_type_slug = "deployed-crew"
    _logo_url = HttpUrl(
        "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9/assets/block-logos/webhook.png"
    )
    _documentation_url = HttpUrl(documentation_url())

    # The order of Prefect's form: first the fields that everybody fills in, then cost and `show`, then the rest.
    url: str = Field(
        title="URL",
        description="The crew's base URL, from the Status tab of its page, such as https://my-crew.crewai.com.",
        examples=["https://my-crew.crewai.com"],
    )
    token: SecretStr = Field(description="The crew's bearer token, from the same tab. Every crew has its own.")
    page_url: str | None = Field(
        default=None,
        title="Page URL",
        description="The crew's page for people. Artifacts and reviews link to it.",
        examples=["https://app.crewai.com/crewai_plus/deployments/12345"],
    )
    max_attempts: int = Field(
        default=3, ge=1, description="The most runs for one idempotency key, including failed runs."
    )
    concurrency_limit: int | None = Field(
        default=None,
        ge=1,
        examples=[10],
        description="The most runs of this crew's URL that may be in flight, however they start.",
    )
    price: Annotated[float, Field(ge=0)] | Price | None = Field(
        default=None, description="Price of a run, in your currency: a number, or a price of its tokens."
    )
    budgets: list[Budget] = Field(
        default_factory=list[Budget],
        description="Limits of what all runs of the crew together may use in a day, a month or a batch.",
    )
    show: Literal["full", "summary", "none"] = Field(
        default="full",
        description="How much of inputs and outputs artifacts, events, the crew database and names of runs show.",
    )
    secret_inputs: list[str] = Field(
        default_factory=list, description="Names of inputs whose values are masked wherever this package shows them."
    )
    flow: bool = Field(
        default=False,
        description="Whether this is a Flow: no input is required, numbers, lists and objects are sent as JSON values "
        "instead of as text, and its runs may belong to a session.",
    )
    allow_extra_inputs: bool = Field(
        default=False,
        description="Whether to send inputs that the crew does not name. If not, no run with such inputs starts.",
    )
    request_timeout: float = Field(default=30.0, gt=0, description="Seconds that one request to the crew may take.")
    allow_http: bool = Field(
        default=False,
        title="Allow http",
        description="Whether the token may be sent over http, without encryption, to another machine.",
    )
    wait: WaitPolicy = Field(default=WaitPolicy(), description="How to wait for this crew's runs.")

    if TYPE_CHECKING:
        # pydantic accepts a text for a secret, and type checkers do not know that.
        def __init__(self, *, url: str, token: SecretStr | str, **fields: Any) -> None: ...

        # By Prefect's types these may return a coroutine. For async code there are `aload` and `asave`.
        @classmethod
        def load(cls, name: str, validate: bool = True, client: Any = None) -> Self: ...  # noqa: D102
        def save(self, name: str | None = None, overwrite: bool = False, client: Any = None) -> UUID: ...  # noqa: D102

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        # Prefect's blocks accept any field, so a limit with a misspelt name would have no effect.
        if isinstance(values, dict):
            _known_fields(cast("dict[str, Any]", values), cls, "a deployed crew")
        return cast("Any", values)

    @field_validator("wait", "price", mode="before")
    @classmethod
    def _of_any_version(cls, value: Any, info: ValidationInfo) -> Any:
        # Another version may have stored the value: its further fields must not prevent loading.
        model = WaitPolicy if info.field_name == "wait" else Price
        subject = f"a crew's {info.field_name}"
        return _known_fields(cast("dict[str, Any]", value), model, subject) if isinstance(value, dict) else value

    @field_validator("secret_inputs", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple | set | frozenset) else value

    @field_validator("page_url")
    @classmethod
    def _is_page(cls, value: str | None) -> str | None:
        # Artifacts show it as a link, so it must be the address of a page.
        page = (value or "").strip()
        parts = urlsplit(page)
        if page and (parts.scheme not in ("http", "https") or not parts.hostname or parts.password is not None):
            raise ValueError("page_url starts with http:// or https://, names a host and holds no password")
        return page or None

    @model_validator(mode="after")
    def _check_url(self) -> DeployedCrew:
        self.url = checked_url(self.url, allow_http=self.allow_http)
        return self

    @classmethod
    def from_env(cls, prefix: str = "CREW", **fields: Any) -> Self:
        """Return a crew from environment variables, without a stored block.

        This reads `{prefix}_URL` and `{prefix}_TOKEN`, else the settings `PREFECT_INTEGRATIONS_CREW_URL` and `_TOKEN`.
        It never combines the URL of one pair with the token of the other, because a token must not go to another crew.
        `fields` are further fields of the block.

        Raises:
            ConfigurationError: No URL is set, or no token for it.
        """
        settings = CrewSettings()
        url, token = os.environ.get(f"{prefix}_URL"), os.environ.get(f"{prefix}_TOKEN")
        if not url:
            url, token = settings.url, None
        if not url:
            raise ConfigurationError(
                f"The environment has no crew. Set {prefix}_URL and {prefix}_TOKEN "
                "(the Status tab of the crew's page shows both), or PREFECT_INTEGRATIONS_CREW_URL and _TOKEN."
            )
        secret = SecretStr(token) if token else settings.token if url == settings.url else None
        if secret is None:
            raise ConfigurationError(f"The environment has no token for {url}. Set {prefix}_TOKEN.")
        return cls(url=url, token=secret, **fields)

    @property
    def label(self) -> str:
        """The crew's name for people: the block's name, else its address."""
        return self._block_document_name or _address(self.url)

    def client(self, *, transport: httpx.AsyncBaseTransport | None = None) -> CrewClient:
        """Return a client for the crew, to be used as an async context manager."""
        return crew_of(self).client(transport=transport)

    async def atrigger(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        force_new: bool = False,
        meta: Mapping[str, Any] | None = None,
        webhooks: Webhooks | None = None,
        restore_from: str | UUID | None = None,
        session: str | None = None,
    ) -> CrewRun:
        """Kick the crew off and return the run, without waiting for its end. `trigger` is for sync code.

        `run_crew` explains the options, and the errors before and at the kickoff.
        """
        from prefect_crew.runs.request import RunOptions, RunRequest
        from prefect_crew.runs.start import open_run

        own_inputs, inputs = Inputs.of(inputs), None  # no frame shows the values
        options = RunOptions.of(
            idempotency_key=idempotency_key,
            force_new=force_new,
            meta=meta,
            webhooks=webhooks,
            restore_from=restore_from,
            session=session,
        )
        run = await open_run(RunRequest.of(crew_of(self), own_inputs, options))
        return CrewRun(self, run.kickoff_id, idempotency_key=run.idempotency_key, live=run)

    def trigger(  # pyright: ignore[reportIncompatibleMethodOverride] - Prefect's method is async
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        force_new: bool = False,
        meta: Mapping[str, Any] | None = None,
        webhooks: Webhooks | None = None,
        restore_from: str | UUID | None = None,
        session: str | None = None,
    ) -> CrewRun:
        """Do the same from sync code."""
        own_inputs, inputs = Inputs.of(inputs), None  # no frame shows the values
        return sync_version(self.atrigger)(
            cast("Any", own_inputs),  # the async method accepts `Inputs` too
            idempotency_key=idempotency_key,
            force_new=force_new,
            meta=meta,
            webhooks=webhooks,
            restore_from=restore_from,
            session=session,
        )


def crew_of(block: DeployedCrew) -> Crew:
    """Return the crew of a block as plain values, for the modules that run it."""
    name = block._block_document_name  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  Prefect has no other name for it
    fields: dict[str, Any] = {field: getattr(block, field) for field in DeployedCrew.model_fields}
    fields |= {"label": block.label, "block": name, "secret_inputs": tuple(block.secret_inputs)}
    fields["budgets"] = tuple(block.budgets)
    if isinstance(block.price, int | float):
        fields["price"] = Price(per_run=block.price)
    # `type(block)`: Prefect's store returns this class for the slug, also if a user has subclassed it.
    return Crew(**fields, reload=None if name is None else partial(_load_block, type(block), name))


class CrewRun(JobRun[CrewResult]):
    """A run that `DeployedCrew.trigger` started or found.

    Each method has an async twin, whose name begins with an `a`: `stop` is for sync code, `astop` for async code.
    """

    def __init__(
        self,
        crew: DeployedCrew,
        kickoff_id: str,
        *,
        idempotency_key: str | None = None,
        live: LiveRun | None = None,
    ) -> None:
        self._crew = crew_of(crew) if live is None else live.crew
        self.kickoff_id = kickoff_id
        self.idempotency_key = idempotency_key
        self._live = live
        self._result: CrewResult | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Without the live run, which has the inputs: a stored result of a flow must not contain secrets.
        return {**self.__dict__, "_live": None}

    @property
    def _run(self) -> LiveRun:
        """The run for one method call, with a session of its own: each sync method runs in another event loop."""
        from prefect_crew.runs.run import LiveRun

        return LiveRun(self._crew, self.kickoff_id) if self._live is None else self._live.anew(self._crew)

    async def await_for_completion(self, wait: WaitPolicy | None = None) -> None:
        """Wait until the run has ended, by `wait` or by the block's policy.

        Raises:
            CrewFailedError, CrewStoppedError, CrewLostError, CrewTimeoutError: See `wait_for_crew`.
        """
        from prefect_crew.runs.request import RunOptions
        from prefect_crew.runs.wait import wait_for_run

        self._result = await wait_for_run(self._run, RunOptions.of(wait=wait))

    def wait_for_completion(self, wait: WaitPolicy | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do the same from sync code."""
        sync_version(self.await_for_completion)(wait)

    async def afetch_result(self) -> CrewResult:
        """Return the result of a completed run.

        Raises:
            CrewError: The run has not completed; the message has its state.
        """
        from prefect_crew.runs.run import read_attempt, read_result

        if self._result is None:
            run = self._run
            await read_attempt(run)
            async with run.session:
                self._result = await read_result(run)
        return self._result

    def fetch_result(self) -> CrewResult:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do the same from sync code."""
        return sync_version(self.afetch_result)()

    async def astop(self) -> StopAnswer:
        """Ask the crew's server to stop the run."""
        from prefect_crew.runs.stop import stop_run

        return await stop_run(self._run)

    stop = sync_version(astop)

    async def aresume(
        self, feedback: str, *, approve: bool, task_id: str | None = None, webhooks: Webhooks | None = None
    ) -> ResumeAnswer:
        """Approve the output of the run, or reject it with feedback."""
        from prefect_crew.runs.reviews.answer import resume_run

        return await resume_run(self._run, feedback=feedback, approve=approve, task_id=task_id, webhooks=webhooks)

    resume = sync_version(aresume)


def _known_fields(values: Mapping[str, Any], model: type[BaseModel], subject: str) -> dict[str, Any]:
    """Return the values whose names are fields of a model.

    Raises:
        ValueError: Another name is similar to a field's name, and so misspelt.
    """
    fields = model.model_fields
    for name in values:
        near = [] if name in fields else get_close_matches(name, fields, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"{subject} has no field {name!r}. Do you mean {near[0]!r}?")
    return {name: value for name, value in values.items() if name in fields}


@lru_cache(maxsize=64)
def _address(url: str) -> str:
    """Return an address for people, without the scheme. Cached: a batch needs it for each of its rows."""
    parts = httpx.URL(url)
    return f"{parts.netloc.decode()}{parts.path.rstrip('/')}"


@naming_prefect_away("The crew's block could not be loaded, and nothing was started.")
async def load_crew(crew: DeployedCrew | Crew | str) -> Crew:
    """Return the `Crew` of a block; load a block that is given by its name.

    Raises:
        ConfigurationError: There is no such block, or it is not valid.
    """
    if isinstance(crew, Crew):
        return crew
    if isinstance(crew, DeployedCrew):
        return crew_of(crew)
    if inspect.iscoroutine(cast("Any", crew)):
        cast("Any", crew).close()
        raise ConfigurationError(
            "The crew is a coroutine: where an event loop runs, as in a notebook, DeployedCrew.load() and save() have "
            'to be awaited. Write await DeployedCrew.aload("NAME") and await crew.asave("NAME"). Nothing was started.'
        )
    try:
        return await _load_block(DeployedCrew, crew)
    except ValueError as error:
        if not isinstance(error.__cause__, ObjectNotFound):
            raise
        raise ConfigurationError(
            f"No crew is stored under the name {crew!r}. Store it: prefect-crew crews save {shlex.quote(crew)} --url "
            "URL, or DeployedCrew(url=…, token=…).save(NAME). Or give a DeployedCrew in place of the name; on the "
            "command line the crew's URL, with CREW_TOKEN."
        ) from None


async def find_crew(attempt: Attempt) -> Crew | None:
    """Return the stored crew of an attempt, None if there is no block with its name or the block has another URL."""
    if not _BLOCK_NAME.fullmatch(attempt.crew):
        return None
    try:
        crew = await _load_block(DeployedCrew, attempt.crew)
    except ValueError:
        return None
    return crew if crew.url == attempt.crew_url else None


async def _load_block(kind: type[DeployedCrew], name: str) -> Crew:
    try:
        return crew_of(await kind.aload(name))
    except RuntimeError as error:  # Prefect's own message does not name the wrong field
        if not isinstance(error.__cause__, ValidationError):
            raise
        raise ConfigurationError(
            f"The block deployed-crew/{name} is not valid: {'; '.join(problems_of(error.__cause__))}. Correct it on "
            f"Prefect's page, or give the field: prefect-crew crews save {name} --overwrite."
        ) from None


@naming_prefect_away("A Secret block could not be loaded. This call started nothing.")
async def values_of_blocks(inputs: Mapping[str, Any], secret_inputs: Collection[str]) -> dict[str, Any]:
    """Replace the secret inputs, which are names of Prefect Secret blocks, by the values of these blocks.

    Prefect stores the parameters of a flow, so a secret input is the name of a block. The values are of pydantic's
    secret type: error reporters show the local variables of all frames.

    Raises:
        ConfigurationError: There is no such block. The message does not show the name, which may be the secret itself.
    """
    names = [name for name in inputs if name in secret_inputs and inputs[name] is not None]
    values = await asyncio.gather(*(_secret_value(name, inputs[name]) for name in names))
    return {**inputs, **dict(zip(names, values, strict=True))}


async def _secret_value(name: str, block: Any) -> Any:
    try:
        return SealedValue((await cast("Any", Secret).aload(str(block))).get())
    except ValueError:
        raise ConfigurationError(
            f"The input {name!r} is secret, so it is given as the name of a Prefect Secret block, and no block has the "
            "name that was given. Nothing was started. Make one, and give its name: Secret(value=…).save('NAME')."
        ) from None
