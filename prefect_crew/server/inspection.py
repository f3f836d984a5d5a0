"""`GET /_test/requests`: what the server was asked, for tests that run against it from outside.

Needs the token like everything else, and exists only when asked for.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from prefect_crew.server.runtime import Runtime
from prefect_crew.server.wire import JSONAnswer

__all__ = ["inspect_route"]


def inspect_route(runtime: Runtime) -> Route:
    """Return the route of the page.

    Its body: `requests` by place, `answers` by "PLACE STATUS", `unauthorized`, `kickoffs`, `kickoffs_by_run_key`,
    `faults` that came ("FAULT" and its occurrence), `webhooks` by "KIND STATUS", and `runs` (id, state, meta, inputs,
    restore_from).
    """

    async def requests(request: Request) -> Response:
        counters = runtime.counters
        return JSONAnswer(
            {
                "requests": dict(counters.requests),
                "answers": {f"{place} {status}": count for (place, status), count in counters.answers.items()},
                "unauthorized": counters.unauthorized,
                "kickoffs": counters.kickoffs,
                "kickoffs_by_run_key": dict(counters.kickoffs_by_run_key),
                "faults": [{"fault": str(it.fault), "occurrence": it.occurrence} for it in runtime.faults.fired],
                "webhooks": {f"{kind} {status}": count for (kind, status), count in runtime.sender.sent.items()},
                "runs": [
                    {
                        "id": run.id,
                        "state": str(run.state),
                        "meta": run.meta,
                        "inputs": dict(run.inputs),
                        "restore_from": run.restore_from,
                    }
                    for run in runtime.runs
                ],
            }
        )

    return Route("/_test/requests", requests, methods=["GET"])
