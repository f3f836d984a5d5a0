"""Batches: a data set in, one crew run a row, a ledger that forgets nothing, a report.

Names are loaded when they are first used: data sets and ledgers bring more than a single run needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_crew._internal.lazy import lazy_names

if TYPE_CHECKING:
    from prefect_crew.batches.dataset import Dataset, open_dataset
    from prefect_crew.batches.report import BatchPlan, BatchReport
    from prefect_crew.batches.rows import BadRow
    from prefect_crew.batches.run import aplan_batch, arun_batch, plan_batch, run_batch

__all__ = [
    "BadRow",
    "BatchPlan",
    "BatchReport",
    "Dataset",
    "aplan_batch",
    "arun_batch",
    "open_dataset",
    "plan_batch",
    "run_batch",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "dataset": "Dataset open_dataset",
        "report": "BatchPlan BatchReport",
        "rows": "BadRow",
        "run": "aplan_batch arun_batch plan_batch run_batch",
    },
)
