"""What is said of a failed run is true where it is said: whether a retry follows, and what a person can do there."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from prefect import flow, task

from prefect_crew import CrewFailedError, CrewStep, PipelineFailedError, arun_crew, arun_pipeline
from prefect_crew.testing import CrewServerFactory
from support.prefect_server import PrefectServer
from support.scripts import FAILS
from support.seen import Seen

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

NOT_AGAIN = "It is not started again by itself"
AGAIN = "Prefect has retries left"


def around(run: Callable[[], Any], where: str, texts: list[str]) -> Callable[[], Any]:
    """Return a call of `run` from somewhere; what each failure says is appended to `texts`."""

    async def told() -> None:
        try:
            await run()
        except CrewFailedError as error:
            texts.append(str(error))
            raise

    flows = {
        "a flow": flow(told),
        "a flow with a retry": flow(retries=1)(told),
        "a task with a retry": flow(_calling(task(retries=1)(told))),
        "a subflow of a flow with a retry": flow(retries=1)(_calling(flow(told))),
        "a script": told,
    }
    return flows[where]


def _calling(inner: Callable[[], Any]) -> Callable[[], Any]:
    async def outer() -> None:
        await inner()

    return outer


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("a script", [NOT_AGAIN]),
        ("a flow", [NOT_AGAIN]),
        ("a flow with a retry", [AGAIN, NOT_AGAIN]),
        ("a task with a retry", [AGAIN, NOT_AGAIN]),
        ("a subflow of a flow with a retry", [AGAIN, NOT_AGAIN]),
    ],
)
async def test_that_it_is_not_started_again_is_said_where_no_retry_follows(
    crew_server: CrewServerFactory, where: str, says: list[str]
):
    server, texts = crew_server(FAILS), list[str]()
    crew, idempotency_key = server.crew(), str(uuid.uuid4())

    async def run() -> None:
        await arun_crew(crew, idempotency_key=idempotency_key)

    with pytest.raises(CrewFailedError):
        await around(run, where, texts)()
    assert [AGAIN if AGAIN in text else NOT_AGAIN if NOT_AGAIN in text else text for text in texts] == says
    assert server.kickoffs == len(says), "what was said came true"
    assert "attempt 1 of at most 3" in texts[0]


async def test_at_the_limit_it_names_what_can_be_done_in_each_place(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(FAILS), str(uuid.uuid4())
    crew = server.crew(max_kickoffs=1).crew.called("travel")
    last, none = [
        (await pytest_raises(lambda: arun_crew(crew, idempotency_key=idempotency_key))),
        (await pytest_raises(lambda: arun_crew(crew, idempotency_key=idempotency_key))),
    ]
    assert "This was attempt 1 of at most 1" in last
    assert "Nothing was started: crew travel allows 1 kickoffs under one idempotency key (max_kickoffs)" in none
    for text in (last, none):
        assert NOT_AGAIN not in text
        for place in ("block deployed-crew/travel", "parameter force_new", "force_new=True", "--force-new"):
            assert place in text
    assert server.kickoffs == 1


async def pytest_raises(call: Callable[[], Any]) -> str:
    with pytest.raises(CrewFailedError) as raised:
        await call()
    return str(raised.value)


@pytest.fixture
def seen(prefect_api: PrefectServer) -> Any:
    reader = Seen(prefect_api)
    yield reader
    reader.close()


async def test_artifacts_of_failures_say_first_why_and_what_to_do(crew_server: CrewServerFactory, seen: Seen):
    name = f"failing-{uuid.uuid4().hex[:8]}"
    crew = crew_server(FAILS).crew().crew.called(name)
    idempotency_key = str(uuid.uuid4())
    for _ in range(2):
        with pytest.raises(PipelineFailedError):
            await arun_pipeline(
                [CrewStep("write", crew), CrewStep("post", crew, after="write")],
                name=name,
                idempotency_key=idempotency_key,
            )
    text = seen.artifacts(f"pipeline-{name}")[-1]["data"]
    assert text.index("Step write failed (attempt 2 of at most 3)") < text.index("the search engine is down")
    assert (
        text.index("the search engine is down") < text.index("It is not started again by itself") < text.index("Graph")
    )
    own = seen.artifacts(f"crew-{name}")[-1]["data"]
    assert own.index("### Error") < own.index("the search engine is down") < own.index("not started again")
    assert own.index("not started again") < own.index("Kicked off")
    assert "2 of at most 3" in own
