"""Run deployed CrewAI crews from Prefect: one crew, pipelines, batches; never twice, never lost."""

from __future__ import annotations

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
from prefect_crew.blocks import CrewRun, DeployedCrew
from prefect_crew.runs import arun_crew, get_result, run_crew, run_deployed_crew
from prefect_crew.tasks import discover_inputs, kickoff_crew, resume_crew, stop_crew, wait_for_crew
from prefect_crew.waiting import WaitPolicy

__all__ = [
    "AuthenticationError",
    "BasicAuth",
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
    "CrewStoppedError",
    "CrewTimeoutError",
    "DeployedCrew",
    "HumanInputWebhook",
    "InvalidInputsError",
    "KickoffUncertainError",
    "NotFoundError",
    "OutputTypeError",
    "PipelineFailedError",
    "RateLimitedError",
    "ResponseFormatError",
    "ResumeAnswer",
    "RunKeyConflictError",
    "ServerError",
    "StopAnswer",
    "StreamWebhook",
    "TaskResult",
    "TokenUsage",
    "WaitPolicy",
    "Webhooks",
    "arun_crew",
    "discover_inputs",
    "get_result",
    "kickoff_crew",
    "resume_crew",
    "run_crew",
    "run_deployed_crew",
    "stop_crew",
    "wait_for_crew",
]
