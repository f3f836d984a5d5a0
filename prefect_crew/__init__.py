"""Run deployed CrewAI crews from Prefect: one crew, pipelines, batches; never twice, never lost.

Every name is loaded when it is first used: Prefect imports `prefect_crew.blocks`, which it has to see, whenever it
starts, and what needs no Prefect (the client, the local server, `prefect-crew --help`) does not wait for its import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_crew.lazy import lazy_names

if TYPE_CHECKING:
    from prefect_crew.api.client import CrewClient
    from prefect_crew.api.errors import (
        AuthenticationError,
        ConfigurationError,
        CrewAPIError,
        CrewConnectionError,
        CrewError,
        CrewFailedError,
        CrewLostError,
        CrewStoppedError,
        CrewTimeoutError,
        InvalidInputsError,
        KickoffUncertainError,
        NotFoundError,
        OutputTypeError,
        PipelineFailedError,
        RateLimitedError,
        ResponseFormatError,
        ReviewLimitError,
        RunKeyConflictError,
        ServerError,
    )
    from prefect_crew.api.models import (
        CrewInput,
        CrewResult,
        CrewState,
        CrewStatus,
        ResumeAnswer,
        StopAnswer,
        TaskResult,
        TokenUsage,
    )
    from prefect_crew.api.webhooks import BasicAuth, BearerAuth, HumanInputWebhook, StreamWebhook, Webhooks
    from prefect_crew.batches.binding import BatchChangedError, LedgerMissingError
    from prefect_crew.batches.cancelling import BatchCancelledError
    from prefect_crew.batches.database import LedgerError
    from prefect_crew.batches.datasets import DatasetError
    from prefect_crew.batches.locks import BatchBusyError
    from prefect_crew.batches.output import OutputError
    from prefect_crew.batches.report import BatchFailedError, BatchPlan, BatchReport
    from prefect_crew.batches.rows import BadRowsError
    from prefect_crew.batches.run import aplan_batch, arun_batch, plan_batch, run_batch
    from prefect_crew.blocks import CrewRun, DeployedCrew
    from prefect_crew.pipelines import (
        CrewStep,
        PipelineContext,
        PipelinePlan,
        PipelineResult,
        aplan_pipeline,
        arun_pipeline,
        plan_pipeline,
        run_pipeline,
    )
    from prefect_crew.reviews import Review, ReviewRequest
    from prefect_crew.runs import arun_crew, get_result, run_crew, run_deployed_crew
    from prefect_crew.tasks import discover_inputs, kickoff_crew, resume_crew, stop_crew, wait_for_crew
    from prefect_crew.waiting import WaitPolicy

__all__ = [
    "AuthenticationError",
    "BadRowsError",
    "BasicAuth",
    "BatchBusyError",
    "BatchCancelledError",
    "BatchChangedError",
    "BatchFailedError",
    "BatchPlan",
    "BatchReport",
    "BearerAuth",
    "ConfigurationError",
    "CrewAPIError",
    "CrewClient",
    "CrewConnectionError",
    "CrewError",
    "CrewFailedError",
    "CrewInput",
    "CrewLostError",
    "CrewResult",
    "CrewRun",
    "CrewState",
    "CrewStatus",
    "CrewStep",
    "CrewStoppedError",
    "CrewTimeoutError",
    "DatasetError",
    "DeployedCrew",
    "HumanInputWebhook",
    "InvalidInputsError",
    "KickoffUncertainError",
    "LedgerError",
    "LedgerMissingError",
    "NotFoundError",
    "OutputError",
    "OutputTypeError",
    "PipelineContext",
    "PipelineFailedError",
    "PipelinePlan",
    "PipelineResult",
    "RateLimitedError",
    "ResponseFormatError",
    "ResumeAnswer",
    "Review",
    "ReviewLimitError",
    "ReviewRequest",
    "RunKeyConflictError",
    "ServerError",
    "StopAnswer",
    "StreamWebhook",
    "TaskResult",
    "TokenUsage",
    "WaitPolicy",
    "Webhooks",
    "aplan_batch",
    "aplan_pipeline",
    "arun_batch",
    "arun_crew",
    "arun_pipeline",
    "discover_inputs",
    "get_result",
    "kickoff_crew",
    "plan_batch",
    "plan_pipeline",
    "resume_crew",
    "run_batch",
    "run_crew",
    "run_deployed_crew",
    "run_pipeline",
    "stop_crew",
    "wait_for_crew",
]

_HOMES = {
    "AuthenticationError": "api.errors",
    "BadRowsError": "batches.rows",
    "BasicAuth": "api.webhooks",
    "BatchBusyError": "batches.locks",
    "BatchCancelledError": "batches.cancelling",
    "BatchChangedError": "batches.binding",
    "BatchFailedError": "batches.report",
    "BatchPlan": "batches.report",
    "BatchReport": "batches.report",
    "BearerAuth": "api.webhooks",
    "ConfigurationError": "api.errors",
    "CrewAPIError": "api.errors",
    "CrewClient": "api.client",
    "CrewConnectionError": "api.errors",
    "CrewError": "api.errors",
    "CrewFailedError": "api.errors",
    "CrewInput": "api.models",
    "CrewLostError": "api.errors",
    "CrewResult": "api.models",
    "CrewRun": "blocks",
    "CrewState": "api.models",
    "CrewStatus": "api.models",
    "CrewStep": "pipelines",
    "CrewStoppedError": "api.errors",
    "CrewTimeoutError": "api.errors",
    "DatasetError": "batches.datasets",
    "DeployedCrew": "blocks",
    "HumanInputWebhook": "api.webhooks",
    "InvalidInputsError": "api.errors",
    "KickoffUncertainError": "api.errors",
    "LedgerError": "batches.database",
    "LedgerMissingError": "batches.binding",
    "NotFoundError": "api.errors",
    "OutputError": "batches.output",
    "OutputTypeError": "api.errors",
    "PipelineContext": "pipelines",
    "PipelineFailedError": "api.errors",
    "PipelinePlan": "pipelines",
    "PipelineResult": "pipelines",
    "RateLimitedError": "api.errors",
    "ResponseFormatError": "api.errors",
    "ResumeAnswer": "api.models",
    "Review": "reviews",
    "ReviewLimitError": "api.errors",
    "ReviewRequest": "reviews",
    "RunKeyConflictError": "api.errors",
    "ServerError": "api.errors",
    "StopAnswer": "api.models",
    "StreamWebhook": "api.webhooks",
    "TaskResult": "api.models",
    "TokenUsage": "api.models",
    "WaitPolicy": "waiting",
    "Webhooks": "api.webhooks",
    "aplan_batch": "batches.run",
    "aplan_pipeline": "pipelines",
    "arun_batch": "batches.run",
    "arun_crew": "runs",
    "arun_pipeline": "pipelines",
    "discover_inputs": "tasks",
    "get_result": "runs",
    "kickoff_crew": "tasks",
    "plan_batch": "batches.run",
    "plan_pipeline": "pipelines",
    "resume_crew": "tasks",
    "run_batch": "batches.run",
    "run_crew": "runs",
    "run_deployed_crew": "runs",
    "run_pipeline": "pipelines",
    "stop_crew": "tasks",
    "wait_for_crew": "tasks",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
