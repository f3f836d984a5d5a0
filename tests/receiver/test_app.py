"""The receiver as an ASGI app: what it takes and refuses, and what it writes for the processes that wait."""

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from prefect_crew.exceptions import ConfigurationError
from prefect_crew.receiver.app import create_receiver
from prefect_crew.runs.database import find_store
from prefect_crew.store import attempts, questions
from prefect_crew.store.news import News, Place, read_news
from support.webhooks import BODIES, SECRET, events_of, url_of

BODY = json.dumps(BODIES["crew-first"]).encode()
MIB = 1024 * 1024


async def news_about(topic: str) -> list[News]:
    return (await find_store().run(read_news, [topic], Place(0)))[0]


@pytest.mark.parametrize("which", [name for name in BODIES if not name.startswith(("task", "step"))])
async def test_each_kind_of_both_generations_is_taken(which: str, client: Any, urls: Any, new_attempt: Any):
    kind, attempt = which.partition("-")[0], await new_attempt()
    hooks = urls(attempt)
    answer = await client.post(url_of(hooks, kind), json=BODIES[which])
    assert answer.status_code == 200
    assert answer.json() == {"status": "accepted"}
    kinds = {"crew": ["webhook.crew"], "human_input": ["webhook.human_input", "question"]}
    assert [event.kind for event in await news_about(attempt.id)] == kinds.get(kind, []), "others wake nobody"


async def test_whatever_is_not_ours_gets_the_same_404(client: httpx.AsyncClient, urls: Any, new_attempt: Any):
    attempt = await new_attempt()
    good, stale = urls(attempt), urls(attempt, days=-1)
    crew = url_of(good, "crew")
    posts = [
        *(crew[:-1] + ("A" if crew[-1] != "A" else "B"), crew + "/", url_of(stale, "crew")),
        *(crew.replace("/crew/", "/stream/"), crew.replace("/crew/", "/nonsense/")),
        *("/hooks/crew/" + "A" * 5000, "/hooks/crew/%00%ff", "/hooks/crew", "/", "/recent"),
    ]
    answers = [await client.post(url, json=BODIES["crew-first"]) for url in posts]
    answers += [await client.request(method, crew) for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS")]
    answers.append(await client.post("/hooks/crew/AAAA", content=unread()))
    kinds = {(answer.status_code, answer.text, tuple(sorted(answer.headers.items()))) for answer in answers}
    assert [kind[:2] for kind in kinds] == [(404, '{"error":"not found"}')]
    assert await news_about(attempt.id) == []


async def unread() -> AsyncIterator[bytes]:
    raise AssertionError("a byte was read before the token was known")
    yield b""


async def parts(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 65536):
        yield body[start : start + 65536]


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        pytest.param(BODY, JSON, 200, id="json"),
        pytest.param(BODY, {}, 200, id="no-type"),
        pytest.param(BODY, {"Content-Type": "text/plain"}, 200, id="text"),
        pytest.param(gzip.compress(BODY), {**JSON, "Content-Encoding": "gzip"}, 400, id="gzip"),
        pytest.param(b"nonsense", JSON, 400, id="no-json"),
        pytest.param(b"\xff\xfe\x00", JSON, 400, id="no-text"),
        pytest.param(b'{"kickoff_id":' * 60_000, JSON, 400, id="deep"),
        pytest.param(b'{"kickoff_id": ' + b"9" * 900_000 + b"}", JSON, 400, id="huge-number"),
        pytest.param(BODY.ljust(MIB), JSON, 200, id="as-large-as-may-be"),
        pytest.param(BODY.ljust(MIB + 1), JSON, 413, id="too-large"),
        *(
            pytest.param(b"{}", {"content-length": length}, 413, id=f"length-{length[:5]}")
            for length in ("-1", "1e3", "9" * 50, "x", "²")
        ),
    ],
)
async def test_bodies_that_are_taken_or_refused(
    content: bytes, headers: dict[str, str], status: int, client: httpx.AsyncClient, urls: Any, new_attempt: Any
):
    attempt = await new_attempt()
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    answer = await client.post(url_of(urls(attempt), "crew"), content=content, headers=sent)
    assert answer.status_code == status
    assert len(await news_about(attempt.id)) == int(status == 200)
    if "content-length" not in headers:  # in chunks, which do not tell their length before
        assert (
            await client.post(url_of(urls(attempt), "crew"), content=parts(content), headers=sent)
        ).status_code == status


def test_a_receiver_needs_a_secret_and_a_prefect_api(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigurationError, match="WEBHOOK_SECRET"):
        create_receiver()
    with pytest.raises(ConfigurationError, match="PREFECT_API_URL"):
        create_receiver(SECRET)


async def test_a_receiver_whose_secret_is_short_does_not_start(prefect_api: Any):
    with pytest.raises(ConfigurationError, match="5 characters"):
        create_receiver("short")


async def test_the_url_is_evidence_of_an_uncertain_kickoff(client: httpx.AsyncClient, urls: Any, new_attempt: Any):
    attempt = await new_attempt(None)
    await client.post(url_of(urls(attempt), "crew"), json=BODIES["crew-first"])
    now = await find_store().run(attempts.get, attempt.id)
    assert (str(now.state), now.first_id) == ("started", "k-1")


async def test_a_later_round_names_the_run_that_goes_on(client: httpx.AsyncClient, urls: Any, new_attempt: Any):
    attempt, store = await new_attempt("k-0"), find_store()
    question = await store.run(questions.ask, attempt, 1, marks={}, task="draft", text=None)
    await store.run(questions.answer, question.id, {"approve": True}, "Ada")
    assert await store.run(questions.send, question.id, "sender", 30.0)
    for number in (0, 1, 1):
        body = {**BODIES["human_input-first"], "kickoff_id": f"k-{number}", "execution_id": f"k-{number}"}
        await client.post(url_of(urls(attempt, round=number), "human_input"), json=body)
    assert await store.run(attempts.ids_of, attempt.id) == ["k-0", "k-1"]
    first, second = await store.run(questions.questions_of, attempt.id)
    assert first.sent_at is not None, "a later webhook says that the answer arrived"
    assert (second.number, second.task, second.text) == (2, "plan", "the output")
    assert [question.id for question in await store.run(questions.open_questions)] == [second.id]


@pytest.mark.parametrize("is_known_by", ["url", "attempt"])
async def test_a_question_of_a_secret_run_keeps_no_text(is_known_by: str, client: Any, urls: Any, new_attempt: Any):
    attempt = await new_attempt(secret_names=["topic"] if is_known_by == "attempt" else [])
    body = {**BODIES["human_input-first"], "task_id": "hunter2 is the task"}
    await client.post(url_of(urls(attempt, texts=is_known_by != "url"), "human_input"), json=body)
    (question,) = await find_store().run(questions.open_questions)
    assert (question.text, question.task) == (None, None)


async def test_an_end_is_one_event_about_its_run(client: httpx.AsyncClient, urls: Any, new_attempt: Any, key: str):
    own = "8c5d6f2e-0000-4000-8000-000000000001"
    attempt = await new_attempt(crew="travel", step="research", flow_run_id=own)
    for number in range(3):
        body = {**BODIES["crew-later"], "execution_time": number}
        assert (await client.post(url_of(urls(attempt), "crew"), json=body)).status_code == 200
    (stored,) = await events_of(key)
    assert stored["event"] == "crew.webhook.crew"
    assert stored["resource"] == {
        "prefect.resource.id": "prefect-crew.run.k-1",
        "prefect.resource.name": "travel run k-1",
        "prefect-crew.idempotency-key": key,
        "prefect-crew.crew": "travel",
    }
    assert {related["prefect.resource.role"]: related["prefect.resource.id"] for related in stored["related"]} == {
        "crew": "prefect-crew.crew.travel",
        "step": "prefect-crew.step.research",
        "flow-run": f"prefect.flow-run.{own}",
    }
    assert stored["payload"].items() >= {"idempotency_key": key, "attempt": 1, "round": 0}.items()
    usages = [event.body["usage"]["total_tokens"] for event in await news_about(attempt.id)]
    assert usages == [BODIES["crew-later"]["token_usage"]["total_tokens"]] * 3


async def test_a_webhook_that_cannot_be_written_is_to_be_sent_again(
    client: httpx.AsyncClient, urls: Any, new_attempt: Any, monkeypatch: pytest.MonkeyPatch
):
    hook = url_of(urls(await new_attempt()), "crew")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_DATABASE_URL", "sqlite:////proc/nowhere/crew.db")
    assert (await client.post(hook, json=BODIES["crew-first"])).status_code == 503
    assert (await client.get("/health")).json() == {"status": "ok"}
