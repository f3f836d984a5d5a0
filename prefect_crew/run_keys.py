"""The identity of one purchase: which run key a call has, so that a retry of it finds the same run again.

A key that the user gives holds everywhere. Left out, it is made of what stays the same when Prefect retries: the root
flow run, the path of subflows below it (a parent's retry makes a subflow anew under another id, but with the same
number), the step's name or the crew, a digest of the inputs, and how many equal calls came before.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext, TaskRunContext

from prefect_crew.records import MAX_RUN_KEY, Caller, utcnow

__all__ = ["RunIdentity", "calling_task", "identify", "render_run_key", "scheduled_start"]

TEMPLATE = re.compile(r"\{\{\s*(?P<name>[^}:\s]*)\s*(?::(?P<format>[^}]*?))?\s*\}\}")


@dataclass(frozen=True)
class RunIdentity:
    """Which run a call is about, who calls, and from where (`place`: the same on every retry of this call)."""

    run_key: str
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

    task_run_id: str
    count: int

    @classmethod
    def current(cls) -> _Attempt | None:
        context = TaskRunContext.get()
        return None if context is None else cls(str(context.task_run.id), context.task_run.run_count)


_calling_task: ContextVar[_Attempt | None] = ContextVar("prefect_crew_calling_task", default=None)


@contextmanager
def calling_task() -> Generator[None]:
    """Note the task that the code calls one of ours from, since inside ours only ours is seen."""
    token = _calling_task.set(_Attempt.current())
    try:
        yield
    finally:
        _calling_task.reset(token)


@dataclass
class _Occurrences:
    """Counts equal calls within one attempt of one flow run, so that a retried task is given its numbers again."""

    counts: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    of_own: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    of_caller: defaultdict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))
    replayed: defaultdict[tuple[_Attempt, str], int] = field(default_factory=lambda: defaultdict(int))

    def take(self, base: str, own: _Attempt | None, caller: _Attempt | None) -> int:
        if own is not None and (own.task_run_id, base) in self.of_own:
            return self.of_own[own.task_run_id, base]
        number = self._of_caller(base, caller) if caller is not None else self._next(base)
        if own is not None:
            self.of_own[own.task_run_id, base] = number
        return number

    def _of_caller(self, base: str, caller: _Attempt) -> int:
        given = self.of_caller[caller.task_run_id, base]
        at = self.replayed[caller, base]
        self.replayed[caller, base] += 1
        if at == len(given):
            given.append(self._next(base))
        return given[at]

    def _next(self, base: str) -> int:
        self.counts[base] += 1
        return self.counts[base]


_lock = threading.Lock()
_occurrences: OrderedDict[tuple[str, int], _Occurrences] = OrderedDict()
_roots: OrderedDict[str, _Root] = OrderedDict()
_KEPT = 1000
"""Flow runs of which a process remembers the numbers: a long-lived one must not grow without end."""


async def identify(
    label: str, inputs_digest: str, *, run_key: str | None, name: str | None, inside_own_task: bool = False
) -> RunIdentity:
    """Return the identity of a call.

    Args:
        label: The crew's name or address.
        inputs_digest: The digest of its inputs.
        run_key: The user's key, which may be a template over the scheduled time; None makes one.
        name: The step's name, which takes the crew's place in a key that is made.
        inside_own_task: Whether one of this package's tasks asks, within its own task run.

    Raises:
        ValueError: The key is empty or too long, or its template names something unknown.
    """
    flow_run, own, caller_task = _whereabouts(inside_own_task)
    if flow_run is None:
        call = f"task/{own.task_run_id}" if own is not None else f"call/{uuid4()}"
        key = f"{call}/{name or label}/{inputs_digest}" if run_key is None else render_run_key(run_key, utcnow())
        return RunIdentity(run_key=_checked(key), place=call, caller=Caller(owner=str(uuid4())))
    root = await _root_of(flow_run)
    if run_key is None:
        base = f"{root.flow_run_id}{root.path}/{name or label}/{inputs_digest}"
    else:
        base = render_run_key(run_key, root.scheduled_start or utcnow())
    number = _numbers_of(flow_run).take(base, own, caller_task)
    return RunIdentity(
        run_key=_checked(f"{base}/{number}" if run_key is None else base),
        place=f"{root.flow_run_id}{root.path}/{number}",
        caller=Caller(owner=str(uuid4()), flow_run_id=str(flow_run.id), flow_run_count=flow_run.run_count),
    )


async def scheduled_start() -> datetime:
    """Return when the root of this flow run was scheduled to start; outside of one, now. UTC."""
    flow_run, _, _ = _whereabouts(inside_own_task=False)
    if flow_run is None:
        return utcnow()
    return (await _root_of(flow_run)).scheduled_start or utcnow()


def render_run_key(template: str, scheduled_start: datetime) -> str:
    """Fill a run key's `{{ scheduled_start }}` or `{{ scheduled_start:FORMAT }}`, FORMAT as in strftime, in UTC.

    Raises:
        ValueError: A placeholder names something else.
    """

    def fill(match: re.Match[str]) -> str:
        if match["name"] != "scheduled_start":
            raise ValueError(
                f"run_key {template!r}: {match[0]!r} is not known. Use {{{{ scheduled_start:%Y-%m-%d }}}}, "
                "the time that the flow run was scheduled for, in UTC."
            )
        return format(scheduled_start, match["format"] or "%Y-%m-%dT%H:%M:%S")

    return TEMPLATE.sub(fill, template)


def _checked(key: str) -> str:
    if not key.strip():
        raise ValueError("run_key must not be empty: give it the name of one purchase, or leave it out.")
    if len(key) > MAX_RUN_KEY:
        raise ValueError(f"run_key has {len(key)} characters, the limit is {MAX_RUN_KEY}: {key[:60]!r}…")
    return key


def _whereabouts(inside_own_task: bool) -> tuple[FlowRun | None, _Attempt | None, _Attempt | None]:
    """Return the flow run around this call, our own task's attempt, and that of the user's task around it."""
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    current = _Attempt.current()
    return (flow_run, current, _calling_task.get()) if inside_own_task else (flow_run, None, current)


def _numbers_of(flow_run: FlowRun) -> _Occurrences:
    with _lock:
        numbers = _occurrences.setdefault((str(flow_run.id), flow_run.run_count), _Occurrences())
        _occurrences.move_to_end((str(flow_run.id), flow_run.run_count))
        while len(_occurrences) > _KEPT:
            _occurrences.popitem(last=False)
        return numbers


async def _root_of(flow_run: FlowRun) -> _Root:
    known = _roots.get(str(flow_run.id))
    if known is not None:
        return known
    path: list[str] = []
    at = flow_run
    while at.parent_task_run_id is not None:
        async with get_client() as client:
            tracker = await client.read_task_run(at.parent_task_run_id)
            # A subflow that was called from a task has a random key instead of a number: only its name holds.
            path.insert(0, tracker.name if tracker.dynamic_key.isdigit() else tracker.task_key.rpartition("-")[0])
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
