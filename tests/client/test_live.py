"""What CrewAI saw on its hosted platform in October 2026, row by row; the bodies of answers are in the corpus."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import respx

import prefect_crew as pc
from prefect_crew.client import CrewClient

URL = "https://crew.example.com"
TOKEN = "t0ken-0123456789"
FORBIDDEN = {"kind": "extra_forbidden", "says": "Extra inputs are not permitted"}
DOCUMENTED = {"execution_id": "k1", "task_id": "t1", "human_feedback": "ok", "is_approve": True}
LIVE = {"executionId": "k1", "taskId": "t1", "humanFeedback": "ok", "isApprove": True}


@pytest.fixture
def router() -> Any:
    with respx.mock(base_url=URL, assert_all_called=False) as routes:
        yield routes


@pytest.fixture
async def client(router: respx.MockRouter) -> AsyncIterator[CrewClient]:
    async with CrewClient(URL, TOKEN) as opened:
        yield opened


def bodies(router: respx.MockRouter) -> list[dict[str, Any]]:
    return [json.loads(call.request.content) for call in router.calls if call.request.method == "POST"]


def refusal(*names: str, kind: str = "missing", says: str = "Field required") -> httpx.Response:
    problems = [{"loc": ["body", name], "msg": says, "type": kind} for name in names]
    return httpx.Response(422, json={"detail": problems})


@pytest.mark.parametrize(
    ("refused", "taken"),
    [
        (refusal("executionId", "taskId"), LIVE),
        (refusal("execution_id", **FORBIDDEN), LIVE),
        (
            refusal("executionId", "isApprove", **FORBIDDEN),
            DOCUMENTED,
        ),
        (refusal("humanInputWebhookUrl", kind="value_error.extra", says="extra fields not permitted"), DOCUMENTED),
    ],
    ids=["asks-for-camel", "forbids-snake", "forbids-camel", "forbids-a-webhook"],
)
async def test_a_refused_spelling_is_left_out_once_and_for_the_session(
    router: respx.MockRouter, client: CrewClient, refused: httpx.Response, taken: dict[str, Any]
):
    route = router.post("/resume").mock(side_effect=[refused, *[httpx.Response(200, json={"kickoff_id": "k2"})] * 2])
    await client.resume("k1", "t1", "ok", True)
    await client.resume("k1", "t1", "ok", True)
    assert bodies(router)[1:] == [taken, taken]
    assert route.call_count == 3


@pytest.mark.parametrize(
    "final",
    [
        httpx.Response(422, json={"detail": "Not pending"}),
        httpx.Response(422, json={"detail": [{"loc": ["body", "note"], "msg": "Field required"}]}),
        httpx.Response(422, json={"detail": [{"loc": ["query", "executionId"], "msg": "Field required"}]}),
        httpx.Response(422, text="<html>"),
        httpx.Response(400, json={"detail": [{"loc": ["body", "executionId"], "msg": "Field required"}]}),
        httpx.Response(500, text="Internal Server Error"),
    ],
    ids=["sentence", "other-field", "other-place", "page", "other-status", "failure"],
)
async def test_any_other_refusal_of_an_answer_is_final(
    router: respx.MockRouter, client: CrewClient, final: httpx.Response
):
    route = router.post("/resume").mock(return_value=final)
    with pytest.raises(pc.CrewAPIError):
        await client.resume("k1", "t1", "ok", True)
    assert route.call_count == 1


async def test_a_second_refusal_is_final(router: respx.MockRouter, client: CrewClient):
    route = router.post("/resume").mock(return_value=refusal("executionId"))
    with pytest.raises(pc.CrewAPIError, match="executionId"):
        await client.resume("k1", "t1", "ok", True)
    assert route.call_count == 2


async def test_an_id_that_harms_logs_is_no_answer(router: respx.MockRouter, client: CrewClient):
    router.post("/resume").respond(json={"kickoff_id": "k2\n\x1b[2J"})
    with pytest.raises(pc.ResponseFormatError):
        await client.resume("k1", "t1", "ok", True)


async def test_another_refusal_does_not_add_to_the_first(router: respx.MockRouter, client: CrewClient):
    answers = [refusal("isApprove"), refusal("is_approve")]
    router.post("/resume").mock(side_effect=[answers[0], httpx.Response(200), answers[1], httpx.Response(200)])
    for _ in answers:
        await client.resume("k1", "t1", "ok", True)
    assert [body.keys() & (DOCUMENTED | LIVE).keys() for body in bodies(router)][-1] in (DOCUMENTED.keys(), LIVE.keys())


async def test_a_flow_needs_no_input_and_gets_values_with_their_types(router: respx.MockRouter):
    router.get("/inputs").respond(json={"inputs": ["count", "id", "history"]})
    router.post("/kickoff").respond(json={"kickoff_id": "k1"})
    async with CrewClient(URL, TOKEN, flow=True) as client:
        assert [item.required for item in await client.inputs()] == [False] * 3
        await client.kickoff({"history": ["a"], "count": 3})
    assert bodies(router)[0] == {"inputs": {"history": ["a"], "count": 3}}
