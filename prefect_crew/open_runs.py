"""A run that this process has opened: what its wait needs to know without asking for it, and how it is shown."""

from __future__ import annotations

import re
import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prefect_crew.advice import after_failure, attempt_of
from prefect_crew.api.models import CrewState, CrewStatus
from prefect_crew.api.redaction import Redactor, withholding
from prefect_crew.artifacts import RunArtifact
from prefect_crew.records import RunRecord, SentReview
from prefect_crew.rendering import RunView
from prefect_crew.stopping import flow_run_id

if TYPE_CHECKING:
    from prefect_crew.api.webhooks import Webhooks
    from prefect_crew.crew import Crew

__all__ = ["OpenRun", "recall", "remember", "reopened"]

_TEXTS = ("raw_state", "message", "current_task", "last_task", "last_step", "human_task_id")
_ID = re.compile(r"[\w.-]{1,80}", re.ASCII)
"""What an id looks like: nothing that somebody would write an input into."""
WITHHELD_WORD = "(withheld)"
_TASK_TEXTS = ("name", "agent", "output", "data", "description")
WITHHELD = "withheld: this crew has secret inputs, and their values, which may stand in it, are not known here"


@dataclass
class OpenRun:
    """A run with a kickoff id.

    `record` is None for a run that no record holds: one that was kicked off elsewhere and is only waited for. `inputs`
    are None where only the id is known. `owned`: this process bought it, so nobody else closes it.
    """

    crew: Crew
    kickoff_id: str
    record: RunRecord | None = None
    inputs: Mapping[str, Any] | None = field(default=None, repr=False)
    owned: bool = False
    artifact: RunArtifact | None = None
    advice: str | None = None
    """What to do about a failure, where that is not the usual."""
    task_seen: str | None = field(default=None, repr=False)
    """The task that the crew was last seen at, in the crew's own words: they may repeat a secret."""
    meta: Mapping[str, Any] | None = field(default=None, repr=False)
    """What the kickoff's caller gave for the crew's webhooks, where that is known here."""
    webhooks: Webhooks | None = field(default=None, repr=False)
    """The user's own targets, which a resume has to name again. They hold secrets, so no record does."""

    def __post_init__(self) -> None:
        """Take up which inputs are secret, where only the record says so: a caller may have given a `SecretStr`."""
        if self.inputs is None and self.record is not None:
            self.crew = self.crew.hiding(self.record.secret_inputs)

    @property
    def run_key(self) -> str | None:
        """Its run key, where a record holds it."""
        return None if self.record is None else self.record.run_key

    def renewed(self, crew: Crew) -> None:
        """Take up the crew with its new token; the old one stays a secret."""
        old = self.crew.token
        if crew.token != old:
            self.crew = crew.hiding(self.crew.secret_inputs, texts=[*self.crew.hidden, old])
            self.__dict__.pop("redact", None)

    @cached_property
    def redact(self) -> Redactor:
        """What masks the token and the secret inputs."""
        return self.crew.redactor(self.inputs)

    @property
    def blind(self) -> bool:
        """Whether the crew has secret inputs whose values are not known here, so that no text can be masked."""
        return self.inputs is None and bool(self.crew.secret_inputs)

    @property
    def show(self) -> str:
        """How much may be shown: no output where secret inputs are unknown and so cannot be masked in it."""
        return "summary" if self.blind and self.crew.show == "full" else self.crew.show

    def told(self, text: str | None) -> str | None:
        """Return a text that the crew wrote as logs, errors, events and records may hold it."""
        if text is None:
            return None
        return WITHHELD if self.blind else self.redact(text)

    def named(self, word: str) -> str:
        """Return a word that the crew gave, such as the name of a task, as logs, events and records may hold it."""
        if self.blind:
            return word if _ID.fullmatch(word) else WITHHELD_WORD
        return self.redact(word)

    @property
    def once_it_answers(self) -> str:
        """What to do about it when its server gave no usable answer for too long."""
        if self.run_key is None:
            return f"The run may go on there; see later: prefect-crew status CREW {shlex.quote(self.kickoff_id)}."
        return f"The run may go on there: run again with run key {self.run_key!r} to wait for it, and buy nothing."

    def withholding(self) -> AbstractContextManager[None]:
        """Let errors of the client that are made meanwhile tell of the server's answers what may be told."""
        return withholding(lambda text: self.told(text) or "")

    def masked(self, status: CrewStatus) -> CrewStatus:
        """Return a status without its raw body, with every secret masked, and without texts where none can be."""
        if self.blind:
            output = None if status.output is None else "*" * len(status.output)
            texts = dict.fromkeys((*_TEXTS, "data"), None)
            return status.model_copy(
                update={**texts, "output": output, "error": self.told(status.error), "tasks": [], "raw": None}
            )
        tree = self.redact.tree
        tasks = [
            task.model_copy(update={**{name: tree(getattr(task, name)) for name in _TASK_TEXTS}, "raw": None})
            for task in status.tasks
        ]
        texts = {name: tree(getattr(status, name)) for name in (*_TEXTS, "data", "output", "error")}
        return status.model_copy(update={**texts, "tasks": tasks, "raw": None})

    def view(
        self, status: CrewStatus | None, *, notes: Sequence[str] = (), reviews: Sequence[SentReview] = ()
    ) -> RunView:
        """Return what the artifact shows; `status` is None right after the kickoff."""
        record = self.record
        failed = None if status is None or self.blind else status.current_task or self.task_seen
        return RunView(
            crew=self.crew.label,
            kickoff_id=self.kickoff_id,
            run_key=self.run_key,
            state=CrewState.PENDING if status is None else status.state,
            started_at=None if record is None else record.kicked_off_at,
            ended_at=None if record is None else record.ended_at,
            inputs=None if self.inputs is None else self.redact.tree(self.inputs),
            status=None if status is None else self.masked(status),
            show=self.show,
            secret_inputs=self.crew.secret_inputs,
            price=self.crew.price,
            notes=notes,
            reviews=reviews,
            failed_task=None if failed is None else self.redact(failed),
            attempt=attempt_of(record, self.crew.max_kickoffs),
            advice=self.advice or after_failure(self.crew.label, record, self.crew.max_kickoffs),
        )

    def shown_by(self) -> RunArtifact:
        """Return its artifact, whether or not it has been made."""
        if self.artifact is None:
            owner = None if self.record is None else self.record.flow_run_id
            self.artifact = RunArtifact(self.crew.label, self.kickoff_id, flow_run_id=owner)
        return self.artifact


_KEPT = 10_000
_WAITED_KEPT = 500
_waited: OrderedDict[tuple[str, str | None], OpenRun] = OrderedDict()
_recent: OrderedDict[tuple[str, str | None], OpenRun] = OrderedDict()
# By the flow run as well: who only waits for another flow run's run must not be taken for its owner.


def remember(run: OpenRun) -> None:
    """Keep an opened run at hand in this process, so that the wait after a kickoff need not ask for its record."""
    _recent[run.kickoff_id, flow_run_id()] = run
    _recent.move_to_end((run.kickoff_id, flow_run_id()))
    while len(_recent) > _KEPT:
        _recent.popitem(last=False)


def recall(crew: Crew, kickoff_id: str, *, take: bool = True) -> OpenRun | None:
    """Return what `remember` kept. The wait takes it: whoever comes later has to read what stands on the server."""
    key = kickoff_id, flow_run_id()
    run = _recent.get(key)
    if run is None or run.crew.url != crew.url:
        return None
    if take:
        _waited[key] = _recent.pop(key)
        while len(_waited) > _WAITED_KEPT:
            _waited.popitem(last=False)
    return run


def reopened(crew: Crew, kickoff_id: str, record: RunRecord | None) -> OpenRun:
    """Return a run with the record that was read of it, and with what no record has, where this process waited for it.

    That is its inputs, without which secrets could not be masked, and the user's own webhooks.
    """
    run = _waited.get((kickoff_id, flow_run_id()))
    if run is None or run.crew.url != crew.url:
        return OpenRun(crew, kickoff_id, record)
    hiding = crew.hiding(run.crew.secret_inputs, texts=run.crew.hidden)
    return OpenRun(hiding, kickoff_id, record, run.inputs, meta=run.meta, webhooks=run.webhooks)
