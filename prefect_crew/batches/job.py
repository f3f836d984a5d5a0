"""What a call of a batch is about, before anything is opened or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.api.models import CrewInput
from prefect_crew.batches.datasets import Dataset, shown_address, whole_address
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.places import LedgerPlace
from prefect_crew.batches.rows import RowPlan
from prefect_crew.crew import Crew

__all__ = ["BatchJob"]


@dataclass(frozen=True)
class BatchJob:
    """A call of a batch.

    Attributes:
        crew, dataset, options: As they were given.
        name: The batch, its template filled.
        output: Where the lines go. `output_name` is the same for people.
        place: Where the ledger is.
        call: The call as plain values, or why it has none.
    """

    crew: Crew
    dataset: Dataset
    options: BatchOptions
    name: str
    output: str
    place: LedgerPlace
    call: Mapping[str, Any]

    @property
    def output_name(self) -> str:
        """The output for people."""
        return shown_address(self.output)

    def plan(self, expected: Sequence[CrewInput]) -> RowPlan:
        """Return how the rows become runs.

        Raises:
            ConfigurationError: A key that is a secret input, or a template that is none.
        """
        if isinstance(self.options.key, str) and self.options.key in self.crew.secret_inputs:
            raise ConfigurationError(
                f"The key column {self.options.key!r} is a secret input: keys stand in logs, artifacts and the ledger. "
                "Take another column, or leave key out."
            )
        return RowPlan(
            self.dataset,
            inputs=self.options.inputs,
            key=self.options.key,
            expected=expected,
            as_json=self.crew.inputs_as_json,
            deduplicate=self.options.deduplicate,
            secret=self.crew.secret_inputs,
            allow_extra=self.crew.allow_extra_inputs,
        )

    @property
    def written(self) -> dict[str, Any]:
        """What the lines depend on besides the rows."""
        kind = self.options.output_type
        return {
            "output": shown_address(whole_address(self.output)),
            "order": self.options.order,
            "typed": None if kind is None else f"{kind.__module__}.{kind.__qualname__}",
            "masked": sorted(self.crew.secret_inputs),
        }
