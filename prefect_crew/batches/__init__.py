"""Batches: a data set in, one crew run a row, a ledger that forgets nothing, a report.

Names are loaded when they are first used: data sets and ledgers bring more than a single run needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_crew.lazy import lazy_names

if TYPE_CHECKING:
    from prefect_crew.batches.binding import BatchChangedError, LedgerMissingError
    from prefect_crew.batches.cancelling import BatchCancelledError
    from prefect_crew.batches.database import LedgerError
    from prefect_crew.batches.datasets import Dataset, DatasetError, open_dataset
    from prefect_crew.batches.locks import BatchBusyError
    from prefect_crew.batches.output import OutputError
    from prefect_crew.batches.report import BatchFailedError, BatchPlan, BatchReport
    from prefect_crew.batches.rows import BadRow, BadRowsError
    from prefect_crew.batches.run import aplan_batch, arun_batch, plan_batch, run_batch

__all__ = [
    "BadRow",
    "BadRowsError",
    "BatchBusyError",
    "BatchCancelledError",
    "BatchChangedError",
    "BatchFailedError",
    "BatchPlan",
    "BatchReport",
    "Dataset",
    "DatasetError",
    "LedgerError",
    "LedgerMissingError",
    "OutputError",
    "aplan_batch",
    "arun_batch",
    "open_dataset",
    "plan_batch",
    "run_batch",
]

_HOMES = {
    "BadRow": "rows",
    "BadRowsError": "rows",
    "BatchBusyError": "locks",
    "BatchCancelledError": "cancelling",
    "BatchChangedError": "binding",
    "BatchFailedError": "report",
    "BatchPlan": "report",
    "BatchReport": "report",
    "Dataset": "datasets",
    "DatasetError": "datasets",
    "LedgerError": "database",
    "LedgerMissingError": "binding",
    "OutputError": "output",
    "aplan_batch": "run",
    "arun_batch": "run",
    "open_dataset": "datasets",
    "plan_batch": "run",
    "run_batch": "run",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
