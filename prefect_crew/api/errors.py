"""Every error that this package raises on purpose.

    CrewError
    ├── ConfigurationError           a URL, token, id, input or option that cannot be used; also a ValueError
    ├── InvalidCallError             called where or when it cannot be; also a RuntimeError
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
    ├── CrewTimeoutError             a time budget is over; the crew may run on
    ├── AnsweredError                a person's question has its answer already
    ├── ReviewLimitError             a task asked for a person's answer too often
    ├── PipelineFailedError          at least one step of a pipeline failed
    ├── BatchFailedError             not every row of a batch completed
    ├── BatchCancelledError          the flow run of a batch was cancelled
    ├── BatchBusyError               another process works on the batch
    ├── BatchChangedError            other rows or another crew than the batch was begun with
    ├── DatasetError                 a data set cannot be read
    │   └── BadRowsError             rows of it cannot be run
    ├── LedgerError                  the ledger of a batch cannot be read or written
    ├── LedgerMissingError           the batch is kept in another ledger
    ├── OutputError                  the output of a batch cannot be written
    └── PrefectAwayError             the Prefect API does not answer (command line)

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
    PrefectAwayError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
)
from prefect_crew.api._batch_errors import (
    BadRowsError,
    BatchBusyError,
    BatchCancelledError,
    BatchChangedError,
    BatchFailedError,
    DatasetError,
    LedgerError,
    LedgerMissingError,
    OutputError,
)
from prefect_crew.api._error import (
    ConfigurationError,
    CrewError,
    InvalidCallError,
)
from prefect_crew.api._run_errors import (
    AnsweredError,
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
    "AnsweredError",
    "AuthenticationError",
    "BadRowsError",
    "BatchBusyError",
    "BatchCancelledError",
    "BatchChangedError",
    "BatchFailedError",
    "ConfigurationError",
    "CrewAPIError",
    "CrewConnectionError",
    "CrewError",
    "CrewFailedError",
    "CrewLostError",
    "CrewStoppedError",
    "CrewTimeoutError",
    "DatasetError",
    "InvalidCallError",
    "InvalidInputsError",
    "KickoffUncertainError",
    "LedgerError",
    "LedgerMissingError",
    "NotFoundError",
    "OutputError",
    "OutputTypeError",
    "PipelineFailedError",
    "PrefectAwayError",
    "RateLimitedError",
    "ResponseFormatError",
    "ReviewLimitError",
    "RunKeyConflictError",
    "ServerError",
]
