"""The idempotency key of a call: a retry of the call gets the same key, and so finds the same run.

A user's key holds everywhere, without surrounding blanks and in Unicode's form NFC. Without a user's key, the key is
derived from facts that stay the same when Prefect retries: the root flow run, the path of subflows below it (a retried
parent creates a subflow again under another id, but with the same number), the crew (after a step's name a digest of
it), a digest of the inputs that are not secret, and the number of equal calls before. A slash separates these parts; a
slash within a part is written %2F.
"""

from __future__ import annotations

import hashlib
import re
import threading
import unicodedata
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from itertools import count
from typing import NamedTuple
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext, TaskRunContext

from prefect_crew._internal.clock import utcnow
from prefect_crew._internal.prefect_api import contexts_around, held_flow_run, is_entered, left_behind, run_logger
from prefect_crew._internal.prefect_errors import naming_prefect_away
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.runs.owners import this_process

MAX_KEY = 500
"""Characters of an idempotency key."""
_ESCAPED = str.maketrans({sign: f"%{ord(sign):X}" for sign in "%/{}"})
TEMPLATE = re.compile(r"\{(?P<inner>[^{}]*)\}")
LONGEST_NAME = 200
"""The most characters of a name or address within a derived key. A longer one is cut and gets a digest."""


def digest(text: str, length: int = 32) -> str:
    """Return the SHA-256 of a text, cut to a length."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


@dataclass
class Nonce:
    """A text that marks the attempt of one call as its own, in the column `owner`. It lives in this process only.

    A retry of the kickoff task keeps the nonce as long as no kickoff may have been sent under it. If the answer of the
    crew database was lost, the retry then recognizes its own attempt, and no person has to resolve the run.
    """

    text: str = field(default_factory=lambda: str(uuid4()))
    has_sent: bool = False
    """Whether a kickoff may have been sent."""


@dataclass(frozen=True)
class RunIdentity:
    """The key of a call's run, and the caller: its flow run and the number of that, and its process. `retried_since`:
    when the outermost flow run around the call began, None unless the call is in a retry of a flow or task run."""

    idempotency_key: str
    nonce: Nonce = field(default_factory=Nonce)
    flow_run_id: str | None = None
    flow_run_count: int = 0
    retried_since: float | None = None
    process: str | None = None


async def identify(
    label: str,
    inputs_digest: str,
    *,
    idempotency_key: str | None,
    name: str | None,
    force_new: bool = False,
    inside_own_task: bool = False,
) -> RunIdentity:
    """Return the identity of a call to a crew.

    Args:
        label, inputs_digest: The crew's name or address, and the digest of the inputs.
        idempotency_key: The user's key, which may be a template over the scheduled time; None derives a key.
        name: The step's name, which stands before the crew in a derived key.
        force_new: Whether the key belongs to this call and its retries alone.
        inside_own_task: Whether the caller is one of this package's tasks, within its own task run.

    Raises:
        ConfigurationError: The key is empty, too long, no valid Unicode or no valid template.
        asyncio.CancelledError: The call outlives its flow run on a crew worker. It must take no number, since the flow
            run's next start numbers its calls again.
    """
    if (held := held_flow_run.get()) is not None and held.is_left:
        raise left_behind(held)
    around, calling = _task_attempts(), _calling.get(_Calling())
    callers, nonce = around, Nonce()
    if inside_own_task:
        callers, task_run_id = (*calling.tasks, around[-1]), around[-1].task_run_id
        # Prefect runs the tries of a task run one after the other.
        before = calling.nonces.get(task_run_id, nonce)
        nonce = calling.nonces[task_run_id] = nonce if before.has_sent else before
    caller, start = RunIdentity("", nonce), utcnow()
    if (context := FlowRunContext.get()) is not None and (flow_run := context.flow_run) is not None:
        calls, root = await _calls_and_root(context, flow_run)
        top, start = root.path, root.scheduled_start or start
        flow_runs = [each.flow_run for each in contexts_around(FlowRunContext) if each.flow_run is not None]
        tries = [task.number for task in callers[: len(callers) - inside_own_task]]
        is_retry = max(*(run.run_count for run in flow_runs), *tries, 1) > 1
        began = flow_runs[-1].start_time if is_retry else None
        caller = RunIdentity(
            "",
            nonce,
            str(flow_run.id),
            flow_run.run_count,
            retried_since=None if began is None else began.timestamp(),
            # A task runner may run the task in another process than the flow run.
            process=None if context.detached else this_process(),
        )
    else:
        # A task without a flow is retried under its own id; any other call is new.
        top = f"task/{callers[0].task_run_id}" if callers else f"call/{uuid4()}"
        calls = _calls_of((top, 0), None)
    if idempotency_key is not None:
        key = _checked(render_key(idempotency_key, start))
        number = calls.take_number(key, callers)
    else:
        if calls.root is None or not calls.root.is_deployed:
            _announce_no_key()
        step = escape_name(label if name is None else name)
        if len(step) > LONGEST_NAME:
            step = f"{step[:LONGEST_NAME]}~{digest(step, 16)}"
        # The digest keeps two crews under one step name apart: their order changes if the calls are concurrent.
        about = f"{step}/{inputs_digest}" if name is None else f"{step}~{digest(label, 8)}/{inputs_digest}"
        base = f"{top}/{about}"
        if len(f"{base}/1000000") > MAX_KEY:  # a subflow many levels below the root
            base = f"{top[:LONGEST_NAME]}~{digest(top, 16)}/{about}"
        number = calls.take_number(base, callers)
        key = _checked(f"{base}/{number}")
    if force_new:
        key = _checked(f"{key[: MAX_KEY - 40]}/forced-{digest(f'{top}/{key}/{number}')}")
    return replace(caller, idempotency_key=key)


@cache
def _announce_no_key() -> None:
    """Log once in a process that a later process will not find its runs.

    This logs nothing for a deployed flow run, which a worker continues as the same flow run. The level is INFO, which
    Prefect shows in a script, since a call without a key is no mistake.
    """
    run_logger().info(
        "No idempotency_key is given, so only retries of this flow run find this run again. If the script is started "
        "again, it starts another run. To prevent that, give an idempotency_key."
    )


@naming_prefect_away("This call started nothing.")
async def scheduled_start() -> datetime:
    """Return the scheduled start of this flow run's root, UTC. Outside of a flow run: now."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return utcnow()
    return (await _calls_and_root(context, context.flow_run))[1].scheduled_start or utcnow()


async def scheduled_key(template: str, *, starts_anew: bool = False) -> str:
    """Return the idempotency key of a deployed flow run: a template, filled with the flow run's scheduled start.

    Args:
        template: The key of the deployment.
        starts_anew: Whether each flow run starts a run, whatever attempts the key has.

    Raises:
        ConfigurationError: As `render_key` does. Or a schedule has made this flow run, and all its times share the key.
    """
    key, context = render_key(template, await scheduled_start()), FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    if key == template and not starts_anew and flow_run is not None and flow_run.auto_scheduled:
        raise ConfigurationError(
            f"The idempotency key {key!r} is the same for every time of the schedule, so all its runs would get the "
            "first run's result. Put the time into the key, such as daily-{scheduled_start:%Y-%m-%d}."
        )
    return key


# The user's key


def render_key(template: str, scheduled_start: datetime) -> str:
    """Fill an idempotency key's `{scheduled_start}` or `{scheduled_start:FORMAT}`, FORMAT as in strftime, in UTC.

    Raises:
        ConfigurationError: Another name is in braces, a brace has no partner or is doubled, or a format has no
            directive: without one, each scheduled flow run would get the same key, and so the same run.
    """
    moment = scheduled_start.astimezone(UTC)
    usage = "Use {scheduled_start:%Y-%m-%d}, the time that the flow run was scheduled for, in UTC."

    def fill(match: re.Match[str]) -> str:
        name, colon, form = match["inner"].partition(":")
        if name.strip() != "scheduled_start":
            raise ConfigurationError(f"idempotency_key {template!r}: {match[0]!r} is not known. {usage}")
        if colon and "%" not in form:
            raise ConfigurationError(
                f"idempotency_key {template!r}: {form.strip()!r} is not a format of strftime. {usage}"
            )
        return moment.strftime(form.strip() or "%Y-%m-%dT%H:%M:%S")

    if {"{", "}"} & {*TEMPLATE.sub("", template)}:
        raise ConfigurationError(f"idempotency_key {template!r}: a brace has no partner, or is doubled. {usage}")
    return TEMPLATE.sub(fill, template)


def normalize_key(idempotency_key: str) -> str:
    """Return a key in its stored form: without surrounding blanks, and with composed letters (NFC)."""
    return unicodedata.normalize("NFC", idempotency_key.strip())


def _checked(key: str) -> str:
    key = normalize_key(key)
    if not key:
        raise ConfigurationError("idempotency_key must not be empty. Set it to the name of one run, or leave it out.")
    if len(key) > MAX_KEY:
        raise ConfigurationError(f"idempotency_key has {len(key)} characters, the limit is {MAX_KEY}: {key[:60]!r}…")
    return key


# A derived key


def escape_name(name: str) -> str:
    """Escape slash, braces and percent sign of a name for a derived key. Braces would make the key a template.
    Different names stay different."""
    return name.translate(_ESCAPED)


class _Root(NamedTuple):
    """The root of a flow run: `path` has the root's id and the subflows below it."""

    path: str
    scheduled_start: datetime | None
    is_deployed: bool


class _TaskAttempt(NamedTuple):
    """One attempt of one task run: Prefect retries a task under the same id with a higher number."""

    task_key: str
    task_run_id: str
    number: int
    flow_run_id: str | None = None


_Attempts = tuple[_TaskAttempt, ...]


def _task_attempts() -> _Attempts:
    """Return the task attempts that enclose this call, the outermost first."""
    runs = [(context.task.task_key, context.task_run) for context in reversed(contexts_around(TaskRunContext))]
    return tuple(
        _TaskAttempt(key, str(run.id), run.run_count, None if run.flow_run_id is None else str(run.flow_run_id))
        for key, run in runs
    )


@dataclass(frozen=True)
class _Calling:
    """A call of one of our tasks, or of its `map`, which makes several task runs.

    `tasks` are the task attempts that enclose the call. `nonces` has the nonce of each of its task runs, by their ids.
    """

    tasks: _Attempts = ()
    nonces: dict[str, Nonce] = field(default_factory=dict[str, Nonce])


# Not an argument: Prefect's engine runs between the call of one of our tasks and its body, and retries the body. In a
# task runner's other process this variable is not set: then each try has a nonce of its own.
_calling: ContextVar[_Calling] = ContextVar("prefect_crew_calling")


@contextmanager
def calling_task() -> Generator[None]:
    """Note the task attempts that enclose the call of one of our tasks, at the moment of the call."""
    token = _calling.set(_Calling(_task_attempts()))
    try:
        yield
    finally:
        _calling.reset(token)


@dataclass
class _Calls:
    """Numbers equal calls within one attempt of one flow run, so that a retried task gets the same numbers again.

    A retried task keeps its id, but the tasks that it calls get new ids. The order of their first equal calls
    distinguishes these tasks.
    """

    root: _Root | None = None
    counts: defaultdict[str, count[int]] = field(default_factory=lambda: defaultdict(lambda: count(1)))
    numbers: defaultdict[tuple[object, ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    repeated: defaultdict[tuple[_Attempts, str], int] = field(default_factory=lambda: defaultdict(int))
    children: defaultdict[tuple[_Attempts, str, str], dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    lock: threading.Lock = field(default_factory=threading.Lock)
    context: weakref.ref[FlowRunContext] | None = None

    def take_number(self, base: str, callers: _Attempts) -> int:
        """Return the number of a call. `callers` are the enclosing task attempts.

        The n-th equal call of a later attempt of these tasks gets the number that the n-th call of their first attempt
        got.
        """
        with self.lock:
            if not callers:
                return next(self.counts[base])
            place: list[tuple[str, int]] = []  # for each inner task: its key, and its number among tasks of that key
            for level, task in enumerate(callers[1:], start=1):
                siblings = self.children[callers[:level], task.task_key, base]
                place.append((task.task_key, siblings.setdefault(task.task_run_id, len(siblings))))
            numbers = self.numbers[callers[0].task_run_id, tuple(place), base]
            at = self.repeated[callers, base]
            self.repeated[callers, base] += 1
            if at == len(numbers):
                numbers.append(next(self.counts[base]))
            return numbers[at]

    @property
    def is_needed(self) -> bool:
        """Whether the flow run still runs in this process, and may call again."""
        context = None if self.context is None else self.context()
        return context is not None and is_entered(context)


_KEPT = 1000
"""The number of flow runs that a process remembers after they ended here: its memory must not grow without end."""
_lock = threading.Lock()
# By flow run and attempt. Not an argument: the calls of a flow share nothing but Prefect's context of the flow run.
_flow_runs: OrderedDict[tuple[str, int], _Calls] = OrderedDict()


def _calls_of(flow_run: tuple[str, int], context: FlowRunContext | None) -> _Calls:
    with _lock:
        calls = _flow_runs.setdefault(flow_run, _Calls())
        _flow_runs.move_to_end(flow_run)
        calls.context = None if context is None else weakref.ref(context)
        if (more := len(_flow_runs) - _KEPT) > 0:
            over = [key for key, other in _flow_runs.items() if not other.is_needed and other is not calls]
            for key in over[:more]:
                del _flow_runs[key]
        return calls


def forget_calls(flow_run_id: str) -> None:
    """Number the calls of a flow run from one again, since it begins again in this process.

    A flow run that is resumed after a suspension keeps its `run_count`, so the numbers would go on.
    """
    with _lock:
        for key in [key for key in _flow_runs if key[0] == flow_run_id]:
            del _flow_runs[key]


async def _calls_and_root(context: FlowRunContext, flow_run: FlowRun) -> tuple[_Calls, _Root]:
    calls = _calls_of((str(flow_run.id), flow_run.run_count), context)
    if calls.root is not None:
        return calls, calls.root
    path: list[str] = []
    called_from_tasks_of = {task.flow_run_id for task in _task_attempts()}
    at = flow_run
    while at.parent_task_run_id is not None:
        async with get_client() as client:
            tracker = await client.read_task_run(at.parent_task_run_id)
            # A retried task creates its subflows again, under a random key or, before Prefect 3.9, under the next
            # number: only the name of such a subflow stays the same.
            numbered = tracker.dynamic_key.isdigit() and str(tracker.flow_run_id) not in called_from_tasks_of
            path.insert(0, escape_name(tracker.name if numbered else tracker.task_key.rpartition("-")[0]))
            if tracker.flow_run_id is None:
                break
            at = await client.read_flow_run(UUID(str(tracker.flow_run_id)))
    calls.root = _Root("/".join([str(at.id), *path]), at.expected_start_time, is_deployed=at.deployment_id is not None)
    return calls, calls.root
