"""Run deployed CrewAI crews from Prefect: one crew, pipelines, batches. No run is started twice, and none is lost.

All names except the errors are loaded at their first use: Prefect imports this package at each start, and the parts
that need no Prefect (the client, the dev server, `prefect-crew --help`) must not wait for its import.
"""
# ruff: noqa: F403, F405

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_crew._internal.lazy import lazy_names
from prefect_crew.exceptions import *  # all errors, and nothing else

if TYPE_CHECKING:
    from prefect_crew.batches.report import BatchPlan, BatchReport
    from prefect_crew.batches.run import aplan_batch, arun_batch, plan_batch, run_batch
    from prefect_crew.blocks import CrewRun, DeployedCrew
    from prefect_crew.budgets import Budget
    from prefect_crew.client import (
        BasicAuth,
        BearerAuth,
        CrewClient,
        CrewInput,
        CrewResult,
        CrewStatus,
        HumanInputWebhook,
        ResumeAnswer,
        Review,
        ReviewRequest,
        StopAnswer,
        StreamWebhook,
        TaskResult,
        TokenUsage,
        Webhooks,
    )
    from prefect_crew.crew import WaitPolicy
    from prefect_crew.deployments import crew_flow, pipeline_flow
    from prefect_crew.flows import aget_result, arun_crew, get_result, run_crew, run_deployed_crew
    from prefect_crew.pipelines.graph import CrewStep, PipelineContext, PipelinePlan
    from prefect_crew.pipelines.run import (
        PipelineResult,
        aplan_pipeline,
        arun_pipeline,
        plan_pipeline,
        run_deployed_pipeline,
        run_pipeline,
    )
    from prefect_crew.prices import Price, Spending
    from prefect_crew.states import CrewState
    from prefect_crew.tasks import discover_inputs, kickoff_crew, resume_crew, stop_crew, wait_for_crew

__all__ = [
    "AnswerUncertainError", "AuthenticationError", "BasicAuth", "BatchBusyError", "BatchFailedError", "BatchPlan",
    "BatchReport", "BearerAuth", "Budget", "BudgetExceededError", "ConfigurationError", "CrewAPIError", "CrewClient",
    "CrewConnectionError", "CrewError", "CrewFailedError", "CrewInput", "CrewLostError", "CrewResult", "CrewRun",
    "CrewState", "CrewStatus", "CrewStep", "CrewStoppedError", "CrewTimeoutError", "DatasetError", "DeployedCrew",
    "FlowRunCancelledError", "HumanInputWebhook", "IdempotencyConflictError", "InvalidInputsError",
    "KickoffUncertainError", "NoResultError", "NotStartedError", "NotWaitingError", "OutputTypeError",
    "PipelineContext", "PipelineFailedError", "PipelinePlan", "PipelineResult", "PrefectAwayError", "Price",
    "ResponseFormatError", "ResumeAnswer", "Review", "ReviewRequest", "SessionBlockedError", "Spending", "StopAnswer",
    "StoreError", "StreamWebhook", "TaskResult", "TokenUsage", "WaitPolicy", "Webhooks", "aget_result", "aplan_batch",
    "aplan_pipeline", "arun_batch", "arun_crew", "arun_pipeline", "crew_flow", "discover_inputs", "get_result",
    "kickoff_crew", "pipeline_flow", "plan_batch", "plan_pipeline", "resume_crew", "run_batch", "run_crew",
    "run_deployed_crew", "run_deployed_pipeline", "run_pipeline", "stop_crew", "wait_for_crew",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "batches.report": "BatchPlan BatchReport",
        "batches.run": "aplan_batch arun_batch plan_batch run_batch",
        "blocks": "CrewRun DeployedCrew",
        "budgets": "Budget",
        "client": "BasicAuth BearerAuth CrewClient CrewInput CrewResult CrewStatus HumanInputWebhook ResumeAnswer "
        "Review ReviewRequest StopAnswer StreamWebhook TaskResult TokenUsage Webhooks",
        "crew": "WaitPolicy",
        "deployments": "crew_flow pipeline_flow",
        "flows": "aget_result arun_crew get_result run_crew run_deployed_crew",
        "pipelines.graph": "CrewStep PipelineContext PipelinePlan",
        "pipelines.run": "PipelineResult aplan_pipeline arun_pipeline plan_pipeline run_deployed_pipeline run_pipeline",
        "prices": "Price Spending",
        "states": "CrewState",
        "tasks": "discover_inputs kickoff_crew resume_crew stop_crew wait_for_crew",
    },
)
