"""What a batch came to, and what it would take: for code, and as a line for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prefect_crew._text import by_reason
from prefect_crew.artifacts.markdown import duration
from prefect_crew.batches.rows import BadRow
from prefect_crew.client.models import TokenUsage
from prefect_crew.exceptions import BatchFailedError


@dataclass(frozen=True)
class BatchReport:
    """What a batch came to, earlier calls of the same name included.

    Attributes:
        name: The batch.
        total: Rows that can be run, plus those that were set aside.
        completed, failed, uncertain: How they stand. Uncertain ones wait to be resolved by a person.
        skipped: Rows that were not run: set aside, left in flight, or not reached because the batch stopped.
        seconds: The wall time of this call.
        output: Where the lines are.
        stopped: Why the batch kicked off nothing more, None if it did not stop.
        kickoffs: Runs that this call started.
        set_aside: Rows that cannot be run. `set_aside_rows`: the first 100 of them, their lines and why;
            `set_aside_output`: the file that all of them are in, None where there are none.
        duplicates: Rows that equal an earlier one, which are not in `total`.
        uncertain_keys: The keys of the uncertain rows, up to 1,000.
        errors: Failures of this call by the class of their error.
        usage: The sum of what the server reported, None where it reported nothing.
        cost: The price of one run times the kickoffs of all calls, None where the crew has no price.
    """

    name: str
    total: int
    completed: int
    failed: int
    uncertain: int
    skipped: int
    seconds: float
    output: str
    stopped: str | None = None
    kickoffs: int = 0
    set_aside: int = 0
    set_aside_rows: Sequence[BadRow] = ()
    set_aside_output: str | None = None
    duplicates: int = 0
    uncertain_keys: Sequence[str] = ()
    errors: Mapping[str, int] = field(default_factory=dict[str, int])
    usage: TokenUsage | None = None
    cost: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every row has completed."""
        return self.completed == self.total

    def raise_for_failures(self) -> None:
        """Do nothing if every row has completed.

        Raises:
            BatchFailedError: Some have not.
        """
        if not self.ok:
            raise BatchFailedError(self)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        usage = None if self.usage is None else self.usage.model_dump(exclude_none=True)
        return {
            **asdict(self),
            "uncertain_keys": list(self.uncertain_keys),
            "set_aside_rows": [asdict(row) for row in self.set_aside_rows],
            "errors": dict(self.errors),
            "usage": usage,
        }

    def __str__(self) -> str:
        parts = [f"{self.completed:,} of {self.total:,} rows completed"]
        rest = (
            ("failed", self.failed),
            ("uncertain", self.uncertain),
            ("not run", self.skipped - self.set_aside),
            ("set aside", self.set_aside),
        )
        parts += [f"{count:,} {word}" for word, count in rest if count]
        text = f"Batch {self.name}: {', '.join(parts)} in {duration(self.seconds)}. Output: {self.output}"
        if self.set_aside_output:
            text += f". Set aside: {self.set_aside_output}"
        return f"{text}. It stopped: {self.stopped}" if self.stopped else text


@dataclass(frozen=True)
class BatchPlan:
    """What a batch would do. Nothing was started.

    Attributes:
        name: The batch.
        rows: Rows that can be run. `done`: those of them that are, from earlier calls of the name.
        bad: Rows that cannot be run, up to 1,000. `bad_count`: all of them.
        duplicates: Rows that equal an earlier one.
        max_in_flight: How many would run at once.
        seconds: How long it would take, `price` how much it would cost; None where nothing tells.
        notes: What to know of all rows.
    """

    name: str
    rows: int
    done: int
    bad: Sequence[BadRow]
    bad_count: int
    duplicates: int
    max_in_flight: int
    seconds: float | None
    price: float | None
    notes: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "notes": list(self.notes), "bad": [asdict(row) for row in self.bad]}

    def __str__(self) -> str:
        left = self.rows - self.done
        done = f"{self.done:,} done, {left:,} to run" if self.done else f"{left:,} to run"
        lines = [f"Batch {self.name}: {self.rows:,} rows, {done}, {self.max_in_flight:,} at a time."]
        if self.duplicates:
            lines.append(f"{self.duplicates:,} rows equal an earlier one and are left out.")
        listed, more = by_reason(self.bad, self.bad_count)
        lines += [f"{where[:1].upper()}{where[1:]} cannot be run: {reason}." for where, reason in listed]
        if more:
            lines.append(f"And {more:,} more rows that cannot be run.")
        if self.seconds is not None:
            lines.append(f"It takes about {duration(self.seconds)}.")
        if self.price is not None:
            lines.append(f"It costs about {self.price:,.10g}.")
        lines += self.notes
        return "\n".join(lines)
