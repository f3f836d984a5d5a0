"""Every error this package raises.

    CrewError
    ├── ConfigurationError           a URL, token, id or input that cannot be sent; also a ValueError
    ├── CrewAPIError                 the crew's server answered with an error
    │   ├── AuthenticationError      401, 403
    │   ├── NotFoundError            404
    │   ├── InvalidInputsError       400, 422, and before any kickoff
    │   ├── RateLimitedError         429
    │   └── ServerError              5xx
    ├── CrewConnectionError          no answer: refused, reset, timed out, DNS, TLS
    ├── ResponseFormatError          an answer that is none of the known shapes
    ├── OutputTypeError              a completed run whose result does not fit the `output_type`
    ├── KickoffUncertainError        the kickoff may or may not have started a run
    ├── RunKeyConflictError          the run key belongs to another crew or other inputs
    ├── CrewFailedError              the crew ran and failed
    ├── CrewStoppedError             the run was stopped
    ├── CrewLostError                the server no longer knows the run
    ├── CrewTimeoutError             our patience ended; the crew may run on
    ├── ReviewLimitError             a task asked for a person's answer too often
    └── PipelineFailedError          at least one step of a pipeline failed

Each message says what happened, to which run, and what to do next. The facts are attributes too, so that code never
has to parse a message. All of them survive pickling, since Prefect stores exceptions that way.
"""

from __future__ import annotations

from prefect_crew.api._api_errors import (
    AuthenticationError,
    CrewAPIError,
    CrewConnectionError,
    InvalidInputsError,
    NotFoundError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
)
from prefect_crew.api._error import ConfigurationError, CrewError
from prefect_crew.api._run_errors import (
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
    KickoffUncertainError,
    OutputTypeError,
    PipelineFailedError,
    ReviewLimitError,
    RunKeyConflictError,
)

__all__ = [
    "AuthenticationError",
    "ConfigurationError",
    "CrewAPIError",
    "CrewConnectionError",
    "CrewError",
    "CrewFailedError",
    "CrewLostError",
    "CrewStoppedError",
    "CrewTimeoutError",
    "InvalidInputsError",
    "KickoffUncertainError",
    "NotFoundError",
    "OutputTypeError",
    "PipelineFailedError",
    "RateLimitedError",
    "ResponseFormatError",
    "ReviewLimitError",
    "RunKeyConflictError",
    "ServerError",
]
