"""A run as Markdown that Prefect's page renders as meant, whatever the crew wrote. Pure.

Prefect's interfaces render Markdown with their own sanitiser; this module does not lean on it. Text from outside is
escaped where it would become markup, and shown capped: the whole of it is one command away.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from prefect_crew.client.inputs import encode_inputs
from prefect_crew.client.models import CrewStatus, TaskResult, TokenUsage
from prefect_crew.client.redaction import MASK
from prefect_crew.records.model import SentReview
from prefect_crew.states import CrewState

OUTPUT_CAP = 60_000
"""Characters of a result that an artifact shows; Prefect Cloud refuses bodies over 5 MiB."""
CELL_CAP = 300
TASKS_CAP = 200
"""Tasks of a run that an artifact lists."""
BAR = 12
# Signs that every font has: not every machine has one for emoji.
_STATES = {
    CrewState.PENDING: "○ pending",
    CrewState.RUNNING: "● running",
    CrewState.WAITING: "◆ waits for a person",
    CrewState.COMPLETED: "✓ completed",
    CrewState.FAILED: "✗ failed",
    CrewState.STOPPED: "■ stopped",
    CrewState.UNKNOWN: "? not known to the server",
}
# Characters that turn the direction of what follows them, beyond their own text.
_TURNS = {ord(char): f"[U+{ord(char):04X}]" for char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}
# Of these, what no honest text needs: they show letters in an order in which they do not stand.
_OVERRIDES = {ord(char): f"[U+{ord(char):04X}]" for char in "\u202d\u202e"}


@dataclass(frozen=True)
class RunView:
    """What an artifact shows of a run. Times are UTC; `inputs` are the caller's own values."""

    crew: str
    kickoff_id: str
    idempotency_key: str | None
    state: CrewState
    started_at: datetime | None = None
    ended_at: datetime | None = None
    inputs: Mapping[str, Any] | None = None
    status: CrewStatus | None = None
    show: str = "full"
    secret_inputs: Sequence[str] = ()
    price: float | None = None
    notes: Sequence[str] = field(default_factory=tuple)
    reviews: Sequence[SentReview] = ()
    failed_task: str | None = None
    attempt: str | None = None
    advice: str | None = None


def render_run(view: RunView) -> str:
    """Return the Markdown of a run. The result comes last, so that nothing in it can swallow what is ours."""
    parts = [f"## {_STATES[view.state]} · {prose(view.crew)}"]
    if view.state is CrewState.FAILED:
        parts += _failure(view)
    parts.append(_facts(view))
    parts += [f"> {prose(note)}" for note in view.notes]
    if view.inputs is not None and view.show == "full" and view.inputs:
        parts.append(_inputs(view))
    if view.reviews:
        parts.append(_reviews(view))
    status = view.status
    if status is not None and view.show != "none":
        if status.tasks:
            parts.append(_tasks(status.tasks))
        if status.usage is not None:
            parts.append(_usage(status.usage))
        if status.output is not None and view.state is CrewState.COMPLETED:
            parts.append(_result(view, status.output))
    return "\n\n".join(parts) + "\n"


def _failure(view: RunView) -> list[str]:
    """Return why a run failed, where, and what to do: that is what people come for."""
    shown = view.status is not None and view.show != "none"
    error = (view.status.error if shown and view.status else None) or "The crew gave no reason."
    parts = ["### Error", fenced(error)] if shown else []
    where = f"It failed in task **{cell(view.failed_task, 80)}**." if shown and view.failed_task else ""
    parts.append(" ".join(filter(None, (where, prose(view.advice or "")))))
    return [part for part in parts if part]


def cell(text: str, cap: int = CELL_CAP) -> str:
    """Return text as one table cell: on one line, capped, nothing in it markup."""
    flat = " ".join(text.split())
    flat = flat if len(flat) <= cap else f"{flat[:cap]}…"
    return _plain(flat).replace("|", "\\|")


def _plain(text: str) -> str:
    escaped = text.translate(_TURNS).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]~#!$])", r"\\\1", escaped)


def prose(text: str) -> str:
    """Return text as part of a line: nothing in it markup."""
    return _plain(" ".join(text.split()))


def code(text: str) -> str:
    """Return text as inline code, whatever backticks it holds."""
    flat = " ".join(text.split()).translate(_TURNS).replace("|", "¦")
    runs = [len(run) for run in re.findall(r"`+", flat)]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if runs else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


LINE = 90
"""Characters of a line in a block of code that fit Prefect's page."""


def fenced(text: str, cap: int = OUTPUT_CAP) -> str:
    """Return text as a block of code, capped, whatever backticks it holds. Long lines are broken: no page does so."""
    shown = text if len(text) <= cap else f"{text[:cap]}…"
    lines = (textwrap.wrap(line, LINE, break_long_words=False, replace_whitespace=False) for line in shown.split("\n"))
    shown = "\n".join("\n".join(parts) for parts in lines)
    fence = "`" * max(3, max((len(run) for run in re.findall(r"`+", shown)), default=0) + 1)
    return f"{fence}text\n{shown.translate(_TURNS)}\n{fence}"


def _facts(view: RunView) -> str:
    rows = [("Run", code(view.kickoff_id))]
    if view.idempotency_key:
        rows.append(("Idempotency key", code(view.idempotency_key)))
    if view.attempt and view.state is CrewState.FAILED:
        rows.append(("Attempt", view.attempt.removeprefix("attempt ")))
    if view.started_at:
        rows.append(("Kicked off", f"{view.started_at:%Y-%m-%d %H:%M:%S} UTC"))
    if view.ended_at:
        rows.append(("Ended", f"{view.ended_at:%Y-%m-%d %H:%M:%S} UTC"))
    status = view.status
    if status is not None and status.execution_time is not None:
        rows.append(("Execution time", duration(status.execution_time)))
    if status is not None and status.current_task and not view.state.ended and view.show != "none":
        rows.append(("Current task", cell(status.current_task)))
    if status is not None and status.message and view.state is not CrewState.FAILED and view.show == "full":
        rows.append(("Message", cell(status.message)))
    if view.price is not None:
        rows.append(("Price", f"{view.price:g}"))
    return table(("", ""), rows)


def _inputs(view: RunView) -> str:
    shown = {name: MASK if name in view.secret_inputs else value for name, value in (view.inputs or {}).items()}
    rows = [(f"**{cell(name)}**", cell(str(text))) for name, text in encode_inputs(shown).items()]
    return "### Inputs\n\n" + table(("Input", "Value"), rows)


def _tasks(tasks: Sequence[TaskResult]) -> str:
    times = [task.execution_time for task in tasks]
    total = sum(seconds for seconds in times if seconds)
    header = ["Task", "Agent"]
    timed = total > 0
    if timed:
        header += ["Time", "Share"]
    rows: list[Sequence[str]] = []
    for task, seconds in zip(tasks[:TASKS_CAP], times, strict=False):
        row = [cell(task.name or "–", 80), cell(task.agent or "–", 60)]
        if timed:
            row += ["–", ""] if seconds is None else [duration(seconds), _bar(seconds / total)]
        rows.append(row)
    more = f"\n\n_and {len(tasks) - TASKS_CAP:,} more_" if len(tasks) > TASKS_CAP else ""
    return "### Tasks\n\n" + table(header, rows) + more


def _reviews(view: RunView) -> str:
    header = ["Task", "Round", "Answer", "By", "When"] + (["Feedback"] if view.show == "full" else [])
    rows: list[Sequence[str]] = []
    for review in view.reviews:
        answer = "approved" if review.approve else "rejected"
        unsure = "" if review.outcome == "sent" else " (nobody knows whether it arrived)"
        row = [
            "–" if view.show == "none" else cell(review.task_id, 80),
            str(review.round),
            answer + unsure,
            cell(review.by, 60),
            f"{review.at:%Y-%m-%d %H:%M:%S} UTC",
        ]
        rows.append([*row, cell(review.feedback)] if view.show == "full" else row)
    return "### Answers\n\n" + table(header, rows)


def _usage(usage: TokenUsage) -> str:
    counts = [(name.replace("_", " "), count) for name, count in usage if count is not None]
    if not counts:
        return ""
    return "### Usage\n\n" + table([name for name, _ in counts], [[f"{count:,}" for _, count in counts]])


def _result(view: RunView, output: str) -> str:
    if view.show == "summary":
        return f"### Result\n\n{len(output):,} characters. Read it with `prefect-crew result` and the idempotency key."
    cut = len(output) > OUTPUT_CAP
    text = reading(output[:OUTPUT_CAP] if cut else output)
    whole = "The whole text: `prefect-crew result` and the idempotency key."
    note = f"_The first {OUTPUT_CAP:,} of {len(output):,} characters. {whole}_\n\n" if cut else ""
    return f"### Result\n\n{note}{text}"


_MAY_OPEN = re.compile(r"[ \t>*+\-0-9.)]*(`{3,}|~{3,})")
_FENCE = re.compile(r"(`{3,}+)[^`|]*|(~{3,}+)[^|]*")
"""What opens code at the margin. With a bar in the line, some take it for the head of a table."""
# Every pattern here begins anew at places that it cannot pass twice, or is bounded: a text may repeat anything.
_TAG_OR_IMAGE = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)")
_LOOK = 300
"""Characters of a link's target in which its scheme must stand."""
# A link's target, or that of a reference; it may stand on the next line, which is then not looked at.
_TARGET = re.compile(rf"\](?P<mark>[(:])(?=\s{{0,20}}(?P<target>[^\s)]{{0,{_LOOK + 1}}}))")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(:?)")


def reading(text: str) -> str:
    """Return a crew's Markdown for reading: its own formatting stays, its HTML shows as text, its images as links.

    Nothing is loaded from elsewhere when somebody opens the page, and nothing runs when somebody clicks: a link to
    anything but a page or a mail address shows as text. Only code in fences at the margin stays as it is, up to the
    first fence within a list or a quotation, after which it is not sure what is code.
    """
    shown: list[str] = []
    fence, is_sure = "", True
    for line in text.translate(_OVERRIDES).splitlines():
        if fence:
            shown.append(line)
            if re.fullmatch(rf" {{0,3}}{fence[0]}{{{len(fence)},}}[ \t]*", line):
                fence = ""
        elif is_sure and (opening := _FENCE.fullmatch(line)):
            shown.append(line)
            fence = opening[1] or opening[2]
        else:
            is_sure = is_sure and not _MAY_OPEN.match(line)
            shown.append(_tame(line))
    return "\n".join([*shown, fence] if fence else shown)


def _tame(text: str) -> str:
    """Return Markdown whose HTML is text, whose images are links, and whose links lead to pages and nowhere else.

    An invisible word joiner behind a `<` or `!` makes it text, in inline code as well, where an entity would be seen.
    """
    return _TARGET.sub(_led_to, _TAG_OR_IMAGE.sub("\\g<0>\u2060", text))


def _led_to(link: re.Match[str]) -> str:
    return link[0] if _is_harmless(link["target"]) else f"]\\{link['mark']}"


def _is_harmless(target: str) -> bool:
    """Return whether a link leads to a page or a mail address. Where its start does not tell, it counts as harmful."""
    is_cut = len(target) > _LOOK
    if is_cut:
        entity = target.rfind("&")
        if entity >= 0 and ";" not in target[entity:]:
            target = target[:entity]  # half an entity is another character
    # As a renderer reads it: without escapes, entities, and what stands before the scheme.
    target = re.sub(r"[\x00-\x20\\<\u2060]", "", html.unescape(target))
    scheme = _SCHEME.match(target)
    if scheme is None:
        return bool(target)
    if scheme[2]:
        return scheme[1].lower() in ("http", "https", "mailto")
    return not is_cut or scheme.end() < len(target)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are Markdown already."""
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _bar(share: float) -> str:
    full = round(share * BAR)
    return f"{'█' * full}{'░' * (BAR - full)} {share:.0%}"


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def progress(status: CrewStatus) -> str:
    """Return how far a run is, as far as its status tells, for the end of a line."""
    if status.total_tasks:
        return f" ({status.completed_tasks or 0} of {status.total_tasks} tasks done)"
    return f" ({status.progress:.0%})" if status.progress is not None else ""
