"""One crew as plain values, and its session: a client that changes to a rotated token."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew._text import one_line
from prefect_crew.budgets import Budget
from prefect_crew.client.inputs import STATE_ID, Inputs
from prefect_crew.client.redaction import Redactor
from prefect_crew.exceptions import AuthenticationError, ConfigurationError
from prefect_crew.prices import Price

if TYPE_CHECKING:
    from prefect_crew.client._client import CrewClient
    from prefect_crew.client.models import CrewInput, CrewStatus


T = TypeVar("T")

TITLE = 60
"""The most characters after the name of a crew or a pipeline in the title of a run."""


def titled(label: str, key: str | None, inputs: Mapping[str, Any]) -> str:
    """Return the title of a run on Prefect's pages: the label and the key, else the first input that is not empty.

    The title leaves out a key that is a template, since many runs share it. `inputs` are the inputs that may be shown.
    """
    plain = (value for value in inputs.values() if isinstance(value, str | int))
    title = key if key and "{" not in key else next(filter(str, plain), "")
    # A lone surrogate, which JSON may contain, is refused later, with an error of its own.
    text = one_line(str(title)[:1000].encode("utf-8", "replace").decode())
    return f"{label} · {text if len(text) <= TITLE else f'{text[:TITLE]}…'}" if text else label


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The settings for every run of one crew. The block `DeployedCrew` stores them, checks them and has the defaults.

    `label` is the name for people, `block` the name of the stored block, which `reload` reads again. `old_tokens` were
    replaced by a renewed token, and stay secret. `on_status` is called as `on_status(run, None)` when the run starts or
    is found and when its artifact exists, and as `on_status(run, status)` after each poll. It runs on the event loop of
    the wait, so it must be quick and must not raise. `expected_inputs` is the answer to `GET /inputs`, if a caller has
    just asked for many runs at once; a batch has also asked for its `version`. `batch` is the batch or pipeline of its
    runs, for `budgets` per batch.
    """

    label: str
    url: str
    token: SecretStr
    request_timeout: float
    allow_http: bool
    flow: bool
    allow_extra_inputs: bool
    wait: WaitPolicy
    max_attempts: int
    concurrency_limit: int | None
    show: Literal["full", "summary", "none"]
    secret_inputs: tuple[str, ...]
    price: Price | None
    page_url: str | None
    budgets: tuple[Budget, ...] = ()
    batch: str | None = None
    version: str | None = None
    block: str | None = None
    old_tokens: tuple[SecretStr, ...] = field(default=(), repr=False)
    reload: Callable[[], Awaitable[Crew]] | None = field(default=None, repr=False, compare=False)
    on_status: Callable[[Any, CrewStatus | None], None] | None = field(default=None, repr=False, compare=False)
    expected_inputs: tuple[CrewInput, ...] | None = field(default=None, repr=False, compare=False)

    def called(self, name: str) -> Crew:
        """Return a copy with the label `name` in place of its address. A stored crew keeps its own name."""
        return self if self.block is not None else replace(self, label=name)

    def take(self, inputs: Inputs, *, restore_from: str | None = None, session: str | None = None) -> Inputs:
        """Return inputs for this crew: with its secret inputs, its encoding, and the Flow state or session.

        Raises:
            ConfigurationError: A session of a crew that is no Flow, or with an `id` among the inputs.
        """
        if session is not None:
            self.check_has_sessions()
        if session is not None and STATE_ID in inputs.values:
            raise ConfigurationError(
                f"The input {STATE_ID!r} names the state of a Flow, and so does session {session!r}. Nothing was "
                f"started. Leave the input {STATE_ID!r} out, or leave session out."
            )
        own = (self.flow, restore_from, session)
        is_same = (inputs.as_json, inputs.restore_from, inputs.session) == own
        if is_same and inputs.secret.issuperset(self.secret_inputs):
            return inputs  # the same object, with its cached properties
        own_inputs = inputs.keep_secret(self.secret_inputs)
        return replace(own_inputs, as_json=self.flow, restore_from=restore_from, session=session)

    def check_has_sessions(self) -> None:
        """Raise ConfigurationError if this is no Flow: only a Flow keeps a state."""
        if not self.flow:
            raise ConfigurationError(
                f"Crew {self.label} is not saved as a Flow, and only a Flow keeps the state of a session. Nothing was "
                "started. Leave session out; or save the crew as a Flow, with --flow, or DeployedCrew(flow=True)."
            )

    def under(self, budgets: Iterable[Budget], *, name: str, batch: str | None = None) -> Crew:
        """Return a copy whose runs also count in these budgets; a budget without a name gets `name`."""
        with_names = (budget if budget.name else budget.model_copy(update={"name": name}) for budget in budgets)
        return replace(self, budgets=(*self.budgets, *with_names), batch=batch or self.batch)

    def client(self, *, transport: httpx.AsyncBaseTransport | None = None) -> CrewClient:
        """Return a client for the crew, to be used as an async context manager."""
        from prefect_crew.client._client import CrewClient  # here: Prefect imports this module at each start

        return CrewClient(
            self.url,
            self.token,
            request_timeout=self.request_timeout,
            allow_http=self.allow_http,
            flow=self.flow,
            transport=transport,
        )

    def redactor(self, inputs: Inputs | None = None) -> Redactor:
        """Return the redactor that masks the tokens and the secrets of these inputs."""
        tokens = [token.get_secret_value() for token in (self.token, *self.old_tokens)]
        return Redactor(() if inputs is None else inputs.secret_values.values(), tokens=tokens)

    def with_token(self, token: SecretStr) -> Crew:
        """Return a copy with a renewed token; the old token stays secret. Return this crew if the token is the same."""
        return self if token == self.token else replace(self, token=token, old_tokens=(*self.old_tokens, self.token))

    async def reloaded(self) -> Crew | None:
        """Return the crew with the current token of its block, None if that is the same token.

        This takes only the token from the block: an attempt has the crew's URL and the time limit of the POST, and the
        caller that made this crew has chosen `show`.
        """
        stored = None if self.reload is None else await self.reload()
        return None if stored is None or stored.token == self.token else self.with_token(stored.token)


class CrewSession:
    """A session with a crew, an async context manager. `client` is the current client.

    It may be entered several times: the last exit closes it. `connect` makes a client for a crew, in place of
    `crew.client()`.
    """

    def __init__(self, crew: Crew, connect: Callable[[Crew], CrewClient] | None = None) -> None:
        self.crew: Crew = crew
        self._connect = connect or Crew.client
        self._stack = AsyncExitStack()
        self._client: CrewClient | None = None
        self._entered = 0

    async def __aenter__(self) -> CrewSession:
        if not self._entered:
            self._renewing = asyncio.Lock()  # a lock belongs to one event loop
        self._entered += 1  # before the client is made: of two callers that enter at once, the second uses it
        try:
            async with self._renewing:
                if self._client is None:
                    self._client = await self._stack.enter_async_context(self._connect(self.crew))
        except BaseException:  # also after a cancellation during the wait for the lock: the last exit closes the client
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._client = None
            await self._stack.aclose()

    @property
    def client(self) -> CrewClient:
        """The client with the newest token."""
        if self._client is None:
            raise ConfigurationError(
                "This CrewSession is not open. Use it in `async with CrewSession(crew) as session`."
            )
        return self._client

    async def renew(self, refused: CrewClient) -> bool:
        """Use the current token of the stored block, after the server has refused the token of a client.

        Return False if there is no other token. If the server refuses many calls at once, the first renews it for all.
        """
        async with self._renewing:
            if self._client is not refused:
                return True
            try:
                fresh = await self.crew.reloaded()
                if fresh is None:
                    return False
                client = await self._stack.enter_async_context(self._connect(fresh))
            except (*PREFECT_ERRORS, ValueError):
                return False
            self.crew, self._client = fresh, client
            run_logger().info("Crew %s: its stored block has a new token, which is used from now on.", fresh.label)
            return True

    async def call(self, request: Callable[[CrewClient], Awaitable[T]]) -> T:
        """Make a call. If the server refuses the token, make the call once more with the stored block's token.

        This is safe for every call, since a server that refuses the token has done nothing.
        """
        client = self.client
        try:
            return await request(client)
        except AuthenticationError:
            if not await self.renew(client):
                raise
        return await request(self.client)

    async def version(self) -> str | None:
        """Return the version of the deployed crew (`CrewClient.version`), None if it is unknown. No failure raises."""
        with suppress(Exception):  # no run depends on it
            return await self.client.version()
        return None


RETRY_AFTER_CAP = 300.0
"""The longest `Retry-After` in seconds that is obeyed."""
LONGEST = 10_000_000_000
"""The longest time limit in seconds, 300 years: it is added to a date, and dates end with the year 9999."""


class WaitPolicy(BaseModel):
    """How to wait for a run. All times are seconds.

    The first status call comes after `initial` seconds, the next ones after pauses that grow by `factor` up to
    `max_interval`. Each pause varies at random by up to the share `jitter`, so that many waits do not poll at once. By
    default, the wait notices the end of a run of up to five minutes within 1 s and a tenth of the run's time.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    initial: float = Field(
        default=1.0, gt=0, title="First poll after", description="Seconds from the kickoff to the first poll."
    )
    factor: float = Field(
        default=1.1, ge=1, title="Growth", description="How many times longer each pause is than the pause before."
    )
    max_interval: float = Field(
        default=30.0,
        gt=0,
        title="Longest pause",
        description="Seconds, at most and but for the jitter, between two later polls.",
    )
    jitter: float = Field(default=0.1, ge=0, lt=1, description="The share of a pause by which it varies at random.")
    timeout: float | None = Field(
        default=3600.0,
        gt=0,
        le=LONGEST,
        description="Seconds for pending and running together, counted from the recorded kickoff. Empty: no limit.",
    )
    pending_timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that a run may be pending before it starts. Empty: no limit of its own.",
    )
    human_timeout: float | None = Field(
        default=86400.0,
        gt=0,
        le=LONGEST,
        description="Seconds for people's answers, which the timeout does not include. Empty: no limit.",
    )
    error_timeout: float = Field(
        default=600.0, gt=0, description="Seconds without one good answer to the status call before the wait gives up."
    )
    grace: float = Field(
        default=30.0,
        ge=0,
        title="Grace period",
        description="Seconds after the kickoff in which the server may not know the run yet.",
    )
    lost_after: float = Field(
        default=300.0,
        ge=0,
        description=(
            "Seconds for which a run that the server no longer knows is polled before the wait gives up. A hosted crew "
            "that waits for a person looks the same, until a webhook brings its question: so meanwhile no other time "
            "limit counts."
        ),
    )
    on_timeout: Literal["leave", "stop"] = Field(
        default="leave", description="On timeout: leave the crew running, or stop it."
    )
    on_human_timeout: Literal["leave", "reject", "stop"] | None = Field(
        default=None,
        description=(
            "When people's time is over: let the crew wait on, reject its output once with the human message and "
            "begin the time again, or stop it. Empty: the same as on timeout."
        ),
    )
    human_message: str = Field(
        default="Nobody answered in time.", description="The feedback of an automatic rejection."
    )
    max_rounds: int | None = Field(
        default=None,
        ge=1,
        description=(
            "How often one task may ask. When it asks again, the wait ends, and the crew waits on, or stops if human "
            "timeout says so. Empty: no limit."
        ),
    )
    next_round_after: float | None = Field(
        default=300.0,
        ge=0,
        description="Seconds after an accepted answer after which the same question counts as the next one, if "
        "nothing else distinguishes them. The command line and a task may answer it then; after a rejection the form "
        "and a function are asked again. Empty: never.",
    )

    def stops(self, phase: str) -> bool:
        """Return whether to stop the crew after the time limit of a phase ("pending", "running" or "human")."""
        human = self.on_human_timeout if phase == "human" else None
        return (human or self.on_timeout) == "stop"


# Process-wide: a context variable would not reach the threads of a sync flow's task runner.
fast_intervals: list[float] = []


@contextmanager
def fast_polling(interval: float = 0.01) -> Generator[None]:
    """Make every wait in this process poll every `interval` seconds, whatever its policy says. For tests."""
    fast_intervals.append(interval)
    try:
        yield
    finally:
        fast_intervals.remove(interval)
