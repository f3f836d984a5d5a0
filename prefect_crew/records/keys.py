"""The identity of one purchase: which idempotency key a call has, so that a retry of it finds the same run again.

A key that the user gives holds everywhere, without the blanks around it and in Unicode's form NFC. Left out, it is made
of what stays the same when Prefect retries: the root flow run, the path of subflows below it (a parent's retry makes a
subflow anew under another id, but with the same number), the step's name or the crew, a digest of the inputs, and how
many equal calls came before. A slash stands between these parts, and is written %2F within one.
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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext, TaskRunContext

from prefect_crew.exceptions import ConfigurationError
from prefect_crew.records.model import MAX_KEY, Caller, utcnow
from prefect_crew.records.owners import this_process

TEMPLATE = re.compile(r"\{\{(?P<inner>.*?)\}\}", re.DOTALL)
LONGEST_NAME = 200
"""Characters of a name or address within a key that is made; what is longer is cut and told apart by a digest."""


@dataclass(frozen=True)
class RunIdentity:
    """Which run a call is about, who calls, and from where (`place`: the same on every retry of this call)."""

    idempotency_key: str
    place: str
    caller: Caller


@dataclass(frozen=True)
class _Root:
    """Where a flow run stands: its root, the path below it, and when the root was scheduled to start."""

    flow_run_id: str
    path: str
    scheduled_start: datetime | None


@dataclass(frozen=True)
class _Attempt:
    """One attempt of one task run: Prefect retries a task under the same id with a higher count."""

    task_key: str
    task_run_id: str
    count: int
    flow_run_id: str | None = None


_Attempts = tuple[_Attempt, ...]
"""The attempts of tasks around a call, the outermost first."""


def _attempts() -> _Attempts:
    found: list[_Attempt] = []
    context: Any = TaskRunContext.get()
    while isinstance(context, TaskRunContext):
        run = context.task_run
        in_flow = None if run.flow_run_id is None else str(run.flow_run_id)
        found.append(_Attempt(context.task.task_key, str(run.id), run.run_count, in_flow))
        # Prefect shows the innermost task only; what it replaced stands in the token that will bring it back.
        token = context._token  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        context = None if token is None else token.old_value
    return tuple(reversed(found))


_calling_tasks: ContextVar[_Attempts] = ContextVar("prefect_crew_calling_tasks", default=())


@contextmanager
def calling_task() -> Generator[None]:
    """Note the tasks that the code calls one of ours from, as they are at this moment."""
    token = _calling_tasks.set(_attempts())
    try:
        yield
    finally:
        _calling_tasks.reset(token)


_Place = tuple[tuple[str, int], ...]
"""A task by what a retry of the tasks around it repeats: at each level its kind, and which of that kind it is."""


@dataclass
class _Occurrences:
    """Counts equal calls within one attempt of one flow run, so that a retried task is given its numbers again.

    A task that is retried keeps its id, but makes the tasks that it calls anew under other ids: those are told apart by
    the order in which they first come here with equal calls, whichever of them is quicker.
    """

    counts: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    of_own: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    given: defaultdict[tuple[str, _Place, str], list[int]] = field(default_factory=lambda: defaultdict(list))
    replayed: defaultdict[tuple[_Attempts, str], int] = field(default_factory=lambda: defaultdict(int))
    children: defaultdict[tuple[_Attempts, str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)
    context: weakref.ref[FlowRunContext] | None = None

    @property
    def needed(self) -> bool:
        """Whether the flow run is under way in this process, and may call once more."""
        context = None if self.context is None else self.context()
        # Prefect takes the token away when it leaves the context, which others may hold for long after that.
        return context is not None and context._token is not None  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]

    def take(self, base: str, own: str | None, callers: _Attempts) -> int:
        """Return the number of a call: `own` is the id of our own task run around it, `callers` those of the user's."""
        with self.lock:
            if own is not None and (own, base) in self.of_own:
                return self.of_own[own, base]
            number = self._of_callers(base, callers) if callers else self._next(base)
            if own is not None:
                self.of_own[own, base] = number
            return number

    def _of_callers(self, base: str, callers: _Attempts) -> int:
        given = self.given[callers[0].task_run_id, self._place(base, callers), base]
        at = self.replayed[callers, base]
        self.replayed[callers, base] += 1
        if at == len(given):
            given.append(self._next(base))
        return given[at]

    def _place(self, base: str, callers: _Attempts) -> _Place:
        place: list[tuple[str, int]] = []
        for level, task in enumerate(callers[1:], start=1):
            siblings = self.children[callers[:level], task.task_key, base]
            if task.task_run_id not in siblings:
                siblings.append(task.task_run_id)
            place.append((task.task_key, siblings.index(task.task_run_id)))
        return tuple(place)

    def _next(self, base: str) -> int:
        self.counts[base] += 1
        return self.counts[base]


_lock = threading.Lock()
_occurrences: OrderedDict[tuple[str, int], _Occurrences] = OrderedDict()
_roots: OrderedDict[str, _Root] = OrderedDict()
_KEPT = 1000
"""How many flow runs a process remembers that are not under way here: a long-lived one must not grow without end."""


async def identify(
    label: str, inputs_digest: str, *, idempotency_key: str | None, name: str | None, inside_own_task: bool = False
) -> RunIdentity:
    """Return the identity of a call.

    Args:
        label: The crew's name or address.
        inputs_digest: The digest of its inputs.
        idempotency_key: The user's key, which may be a template over the scheduled time; None makes one.
        name: The step's name, which takes the crew's place in a key that is made.
        inside_own_task: Whether one of this package's tasks asks, within its own task run.

    Raises:
        ConfigurationError: The key is empty, too long or no Unicode, or its template is none.
    """
    flow_run, own, callers = _whereabouts(inside_own_task)
    if flow_run is not None:
        root = await _root_of(flow_run)
        top, start = f"{root.flow_run_id}{root.path}", root.scheduled_start or utcnow()
        counted_in = (str(flow_run.id), flow_run.run_count)
        caller = Caller(
            owner=str(uuid4()),
            flow_run_id=str(flow_run.id),
            flow_run_count=flow_run.run_count,
            process=_process_of_flow_run(),
        )
    else:
        # A task without a flow is retried under its own id; any other call is new.
        task = callers[0].task_run_id if callers else own
        top, start = f"call/{uuid4()}" if task is None else f"task/{task}", utcnow()
        counted_in = (top, 0)
        caller = Caller(owner=str(uuid4()))
    base = (
        f"{top}/{_short(name or label)}/{inputs_digest}"
        if idempotency_key is None
        else render_key(idempotency_key, start)
    )
    number = _numbers_of(counted_in).take(base, own, callers)
    key = f"{base}/{number}" if idempotency_key is None else base
    return RunIdentity(idempotency_key=_checked(key), place=f"{top}/{number}", caller=caller)


async def scheduled_start() -> datetime:
    """Return when the root of this flow run was scheduled to start; outside of one, now. UTC."""
    flow_run, _, _ = _whereabouts(inside_own_task=False)
    if flow_run is None:
        return utcnow()
    return (await _root_of(flow_run)).scheduled_start or utcnow()


def render_key(template: str, scheduled_start: datetime) -> str:
    """Fill an idempotency key's `{{ scheduled_start }}` or `{{ scheduled_start:FORMAT }}`, FORMAT as in strftime, in
    UTC.

    Raises:
        ConfigurationError: A placeholder names something else, is not closed, or has a format without a directive:
            left as it stands, it would make the same key for every schedule, and so the same run.
    """
    moment = scheduled_start.astimezone(UTC)
    usage = "Use {{ scheduled_start:%Y-%m-%d }}, the time that the flow run was scheduled for, in UTC."

    def fill(match: re.Match[str]) -> str:
        name, colon, form = match["inner"].partition(":")
        if name.strip() != "scheduled_start":
            raise ConfigurationError(f"idempotency_key {template!r}: {match[0]!r} is not known. {usage}")
        if colon and "%" not in form:
            raise ConfigurationError(
                f"idempotency_key {template!r}: {form.strip()!r} is no format of strftime. {usage}"
            )
        return moment.strftime(form.strip() or "%Y-%m-%dT%H:%M:%S")

    if "{{" in TEMPLATE.sub("", template):
        raise ConfigurationError(f"idempotency_key {template!r}: a placeholder is not closed. {usage}")
    return TEMPLATE.sub(fill, template)


def escaped(name: str) -> str:
    """Return a name as a part of a key that is made: without the separator, and each name in a way of its own."""
    return name.replace("%", "%25").replace("/", "%2F")


def normalize_key(idempotency_key: str) -> str:
    """Return a key as it is stored and looked for: two that look the same in print are one.

    Blanks around it are left out, and letters with accents are composed (NFC).
    """
    return unicodedata.normalize("NFC", idempotency_key.strip())


def _short(name: str) -> str:
    name = escaped(name)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _checked(key: str) -> str:
    key = normalize_key(key)
    if not key:
        raise ConfigurationError(
            "idempotency_key must not be empty: give it the name of one purchase, or leave it out."
        )
    if len(key) > MAX_KEY:
        raise ConfigurationError(f"idempotency_key has {len(key)} characters, the limit is {MAX_KEY}: {key[:60]!r}…")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"idempotency_key {key!r} holds half a character (a lone surrogate), which cannot be stored."
        ) from None
    return key


def _whereabouts(inside_own_task: bool) -> tuple[FlowRun | None, str | None, _Attempts]:
    """Return the flow run around this call, the id of our own task run, and the attempts of the user's tasks."""
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    around = _attempts()
    return (flow_run, around[-1].task_run_id, _calling_tasks.get()) if inside_own_task else (flow_run, None, around)


def _process_of_flow_run() -> str | None:
    """Return the process of the flow run around this call; a task runner may have brought its task to another one."""
    context = FlowRunContext.get()
    return None if context is None or context.detached else this_process()


def _numbers_of(counted_in: tuple[str, int]) -> _Occurrences:
    with _lock:
        numbers = _occurrences.setdefault(counted_in, _Occurrences())
        _occurrences.move_to_end(counted_in)
        context = FlowRunContext.get()
        numbers.context = None if context is None else weakref.ref(context)
        if (more := len(_occurrences) - _KEPT) > 0:
            over = [key for key, one in _occurrences.items() if not one.needed and one is not numbers]
            for key in over[:more]:
                del _occurrences[key]
        return numbers


async def _root_of(flow_run: FlowRun) -> _Root:
    known = _roots.get(str(flow_run.id))
    if known is not None:
        return known
    path: list[str] = []
    called_from_tasks_of = {task.flow_run_id for task in _attempts()}
    at = flow_run
    while at.parent_task_run_id is not None:
        async with get_client() as client:
            tracker = await client.read_task_run(at.parent_task_run_id)
            # A retried task makes its subflows anew, under a random key or, before Prefect 3.9, the next number: only
            # the name of such a subflow holds.
            numbered = tracker.dynamic_key.isdigit() and str(tracker.flow_run_id) not in called_from_tasks_of
            path.insert(0, escaped(tracker.name if numbered else tracker.task_key.rpartition("-")[0]))
            if tracker.flow_run_id is None:
                break
            at = await client.read_flow_run(UUID(str(tracker.flow_run_id)))
    root = _Root(
        flow_run_id=str(at.id), path="".join(f"/{step}" for step in path), scheduled_start=at.expected_start_time
    )
    with _lock:
        _roots[str(flow_run.id)] = root
        while len(_roots) > _KEPT:
            _roots.popitem(last=False)
    return root
