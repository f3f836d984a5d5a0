"""Batches, questions, news, workers, costs and pruning, transaction by transaction, on both databases."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from prefect_crew.store.attempts import ended, get, not_started, of_key, result_of, started
from prefect_crew.store.batches import (
    NewRow,
    cancel_batch,
    change_batch,
    count_rows,
    get_batch,
    hold_batch,
    let_go,
    list_batches,
    open_batch,
    put_rows,
    read_rows,
    renew_hold,
    use_of_batch,
)
from prefect_crew.store.database import Store
from prefect_crew.store.decision import Allowance, AttemptState, Request
from prefect_crew.store.news import Place, read_news
from prefect_crew.store.prune import counts, keys_to_prune, prune_batch, prune_keys, prune_rest
from prefect_crew.store.questions import (
    answer,
    ask,
    get_question,
    not_sent,
    open_questions,
    questions_of,
    send,
    sent,
)
from prefect_crew.store.spending import CostLine, Use, costs, used
from prefect_crew.store.workers import beat, held_by, hold, holder, release, retire, take_over
from support.crew_database import BEGINNING, CREW, Clock, add_news, begun, in_flight, once_more, over, request, step_of

DAY = 86_400.0


# Batches


async def held_batch(store: Store, *keys: str, owner: str = "one") -> None:
    """Open and hold the batch `leads`, whose rows have these keys."""
    await store.run(open_batch, "leads", crew_url=CREW, total=len(keys))
    assert await store.run(hold_batch, "leads", owner)
    assert await store.run(put_rows, "leads", owner, [row_of(key, position) for position, key in enumerate(keys)])


def row_of(key: str, position: int, topic: str = "x") -> NewRow:
    return NewRow(row_key=key, position=position, inputs={"topic": topic}, inputs_digest=topic)


def run_of(key: str, owner: str = "one", topic: str = "x") -> Request:
    return request(f"leads/{key}", batch="leads", row_key=key, batch_owner=owner, inputs_digest=topic)


async def test_a_batch_is_written_once(store: Store):
    first = await store.run(open_batch, "leads", crew_url=CREW, total=3)
    again = await store.run(open_batch, "leads", crew_url="other", total=4)
    assert (again, again.total, again.owner) == (first, 3, None)
    assert await store.run(get_batch, "leads") == first
    assert await store.run(get_batch, "others") is None


async def test_a_batch_is_held_by_one_process_until_it_is_silent_or_gone(store: Store, clock: Clock):
    await held_batch(store)
    assert await store.run(hold_batch, "leads", "two") is None
    assert await store.run(renew_hold, "leads", "two") is None
    clock.now += 29
    assert await store.run(renew_hold, "leads", "one")
    clock.now += 29
    assert await store.run(hold_batch, "leads", "two") is None
    clock.now += 2
    taken = await store.run(hold_batch, "leads", "two", process="host 7", flow_run_id="flow")
    assert taken is not None
    assert (taken.owner, taken.passes, taken.flow_run_id) == ("two", 2, "flow")
    assert await store.run(renew_hold, "leads", "one") is None
    assert not await store.run(put_rows, "leads", "one", [row_of("a", 0)])
    assert not await store.run(change_batch, "leads", "one", exported=["x"])
    assert not await store.run(let_go, "leads", "one")
    assert await store.run(hold_batch, "leads", "three", dead_process="host 8") is None
    assert await store.run(hold_batch, "leads", "three", dead_process="host 7")


async def test_a_batch_that_is_let_go_tells_why_and_goes_on(store: Store):
    await held_batch(store)
    assert await store.run(change_batch, "leads", "one", exported=["out.csv"], total=5)
    assert await store.run(cancel_batch, "leads")
    cancelled = await store.run(renew_hold, "leads", "one")
    assert cancelled is not None
    assert (cancelled.cancelled_at, cancelled.exported, cancelled.total) == (BEGINNING, ["out.csv"], 5)
    news, _ = await store.run(read_news, ["leads"], None)
    assert [one.kind for one in news] == ["cancel"]
    assert await store.run(let_go, "leads", "one", "too many failures")
    assert not await store.run(cancel_batch, "leads")
    [batch] = await store.run(list_batches)
    assert (batch.owner, batch.stopped_because) == (None, "too many failures")
    again = await store.run(hold_batch, "leads", "two")
    assert again is not None
    assert (again.stopped_because, again.cancelled_at) == (None, None)


async def test_a_row_starts_only_while_its_batch_is_held_by_the_caller(store: Store):
    await held_batch(store, "a", "b")
    assert await step_of(store, run_of("a")) == "start"
    assert await step_of(store, run_of("b", owner="two")) == "not held"
    await store.run(let_go, "leads", "one")
    assert await step_of(store, run_of("b")) == "not held"


async def test_the_state_of_a_row_is_that_of_its_last_attempt(store: Store):
    await held_batch(store, "a", "b", "c", "d")
    await over(store, run_of("a"), result={"output": "of a"}, tokens=3, cost=0.5)
    await over(store, run_of("b"), AttemptState.FAILED, error="odd")
    await in_flight(store, run_of("b"), "again")
    attempt = await in_flight(store, run_of("c"), "of c")
    rows = await store.run(read_rows, "leads", with_results=True)
    assert [(row.row_key, row.state, row.number) for row in rows] == [
        ("a", AttemptState.COMPLETED, 1),
        ("b", AttemptState.STARTED, 2),
        ("c", AttemptState.STARTED, 1),
        ("d", None, None),
    ]
    assert rows[0].result == {"output": "of a"}
    use = await store.run(use_of_batch, "leads")
    assert (use.tokens, use.cost) == (3, 0.5)
    assert (rows[1].kickoff_id, rows[2].attempt_id, rows[3].inputs) == ("again", attempt.id, {"topic": "x"})
    assert await store.run(count_rows, "leads") == {AttemptState.COMPLETED: 1, AttemptState.STARTED: 2, None: 1}


async def test_rows_have_pages_and_filters(store: Store):
    await held_batch(store, *"abcde")
    await over(store, run_of("b"), AttemptState.FAILED)
    page = await store.run(read_rows, "leads", limit=2)
    assert [row.row_key for row in page] == ["a", "b"]
    page = await store.run(read_rows, "leads", after=(page[-1].position, page[-1].row_key))
    assert [row.row_key for row in page] == ["c", "d", "e"]
    failed = await store.run(read_rows, "leads", states=[AttemptState.FAILED])
    assert [row.row_key for row in failed] == ["b"]
    todo = await store.run(read_rows, "leads", states=[AttemptState.FAILED, None], limit=3)
    assert [row.row_key for row in todo] == ["a", "b", "c"]


async def test_a_data_set_that_has_changed_keeps_what_has_completed(store: Store):
    await held_batch(store, "a", "b", "c")
    await over(store, run_of("a"))
    await over(store, run_of("b"), AttemptState.FAILED)
    await store.run(hold_batch, "leads", "one")
    changed = [row_of("new", 0), row_of("a", 1, "y"), row_of("b", 2, "y")]
    assert await store.run(put_rows, "leads", "one", changed)
    rows = {row.row_key: row for row in await store.run(read_rows, "leads")}
    assert [*rows] == ["new", "a", "b", "c"]
    assert (rows["a"].inputs, rows["a"].is_conflict) == ({"topic": "x"}, True)
    assert (rows["b"].inputs, rows["b"].is_conflict) == ({"topic": "y"}, False)
    assert [row.passes for row in rows.values()] == [2, 2, 2, 1]  # `c` has left the data set
    await store.run(put_rows, "leads", "one", [row_of("a", 1)])
    assert not (await store.run(read_rows, "leads", limit=2))[1].is_conflict


# Questions


async def test_a_question_is_asked_once_and_answered_once(store: Store, clock: Clock):
    attempt = await in_flight(store, request())
    question = await store.run(ask, attempt, 1, marks={"webhook": "a"}, task="review", text="Good?")
    assert await store.run(ask, attempt, 1, marks={"webhook": "a"}, task="other", text="Bad?") == question
    assert await store.run(open_questions) == [question]
    assert not await store.run(send, question.id, "me", 30.0)  # nobody has answered
    clock.now += 1
    assert await store.run(answer, question.id, {"approve": True}, "anna")
    assert not await store.run(answer, question.id, {"approve": False}, "bert")
    now, stored = await store.run(get_question, question.id)
    assert stored is not None
    assert now == clock.now
    assert (stored.answer, stored.answered_by, stored.answered_at) == ({"approve": True}, "anna", clock.now)
    news, _ = await store.run(read_news, [attempt.id], None)
    assert [(one.kind, one.number) for one in news] == [("question", 1), ("answer", 1)]
    assert await store.run(open_questions) == []
    assert (await store.run(get_question, "guess"))[1] is None


async def test_an_answer_is_sent_by_one_and_known_as_sent_or_not(store: Store, clock: Clock):
    attempt = await in_flight(store, request())
    question = await store.run(ask, attempt, 1, marks={}, task=None, text=None)
    await store.run(answer, question.id, "yes", "anna")
    assert await store.run(send, question.id, "me", 30.0)
    assert not await store.run(send, question.id, "you", 30.0)
    assert not await store.run(not_sent, question.id, "you")
    assert await store.run(not_sent, question.id, "me")  # the server refused the answer
    assert await store.run(answer, question.id, "no", "bert")
    assert await store.run(send, question.id, "me", 30.0)
    clock.now += 60
    assert not await store.run(send, question.id, "you", 30.0)  # it may have been sent
    assert await store.run(sent, question.id)
    assert not await store.run(sent, question.id)
    assert not await store.run(not_sent, question.id, "me")


async def test_a_question_is_known_by_its_marks(store: Store):
    attempt = await in_flight(store, request())

    async def number(first: int, **marks: str) -> int:
        return (await store.run(ask, attempt, first, marks=marks)).number

    assert await number(1, webhook="a") == 1
    assert await number(1, output="x") == 1, "a status shows more of it"
    assert await number(1, webhook="a", output="x") == 1
    assert await number(1, output="y") == 2, "somebody answered on the crew's page"
    assert await number(1, webhook="a") == 1, "that webhook came twice"
    assert await number(2, webhook="b") == 2
    assert await number(3, webhook="c") == 3
    assert await number(3, output="y") == 3, "that status is late"
    marks = [question.marks for question in await store.run(questions_of, attempt.id)]
    assert marks == [{"webhook": "a", "output": "x"}, {"output": "y", "webhook": "b"}, {"webhook": "c"}]


async def test_a_next_question_says_that_the_answer_before_arrived(store: Store):
    attempt = await in_flight(store, request())
    question = await store.run(ask, attempt, 1, marks={"webhook": "a"})
    await store.run(answer, question.id, {"approve": True}, "anna")
    assert await store.run(send, question.id, "me", 30.0)
    await store.run(ask, attempt, 2, marks={"webhook": "b"})
    assert not await store.run(not_sent, question.id, "me")
    assert (await store.run(questions_of, attempt.id))[0].sent_at is not None


async def test_only_the_last_question_of_a_run_in_flight_is_open(store: Store):
    attempt = await in_flight(store, request(), "id")
    first = await store.run(ask, attempt, 1, marks={}, task=None, text=None)
    await store.run(answer, first.id, "yes", "anna")
    second = await store.run(ask, attempt, 2, marks={}, task=None, text=None)
    assert not await store.run(send, first.id, "me", 30.0)
    assert await store.run(questions_of, attempt.id) == [(await store.run(get_question, first.id))[1], second]
    await store.run(ended, attempt, "id", AttemptState.FAILED)
    assert not await store.run(answer, second.id, "yes", "anna")
    assert await store.run(open_questions) == []


# News


async def test_news_are_read_once_each_for_the_topics_of_a_wait(store: Store, clock: Clock):
    await store.run(add_news, "a", "early")
    clock.now += 11
    await store.run(add_news, "a", "webhook", number=1, kickoff_id="id", body={"text": "\0 ü"})
    await store.run(add_news, "b", "other")
    place: Place | None = None
    news, place = await store.run(read_news, ["a"], place)
    assert [(one.kind, one.number, one.kickoff_id, one.body) for one in news] == [
        ("webhook", 1, "id", {"text": "\0 ü"})
    ]
    clock.now += 5
    news, place = await store.run(read_news, ["a", "b"], place)  # a new wait hears of the last seconds
    assert [one.kind for one in news] == ["other"]
    for _ in range(3):
        clock.now += 4
        news, place = await store.run(read_news, ["a", "b"], place)
        assert news == []
    assert place.read == {}
    assert (await store.run(read_news, [], place))[0] == []


# Workers


async def live(store: Store, boot: str, host: str = "host", name: str = "w", pool: str = "pool") -> bool:
    """Send a heartbeat; each lasts 10 s."""
    return await store.run(beat, boot, pool, name, host, 10.0)


async def test_a_flow_run_is_held_by_one_worker(store: Store):
    assert not await store.run(hold, "flow", "boot 1"), "nobody would take it over"
    for number in (1, 2):
        await live(store, f"boot {number}", name=f"w{number}")
    assert await store.run(hold, "flow", "boot 1")
    assert await store.run(hold, "flow", "boot 1")
    assert not await store.run(hold, "flow", "boot 2")
    assert not await store.run(release, "flow", "boot 2")
    assert await store.run(held_by, "boot 1") == ["flow"]
    assert await store.run(holder, "flow") == "boot 1"
    assert await store.run(release, "flow", "boot 1")
    assert await store.run(holder, "flow") is None
    assert await store.run(hold, "flow", "boot 2")
    await store.run(retire, "boot 1")
    assert not await store.run(hold, "another flow", "boot 1")


@pytest.mark.parametrize("how", ["it is silent", "it has begun anew", "it has ended"])
async def test_the_flow_runs_of_a_dead_worker_are_taken_over_once(store: Store, clock: Clock, how: str):
    await live(store, "boot 1")
    await store.run(hold, "flow", "boot 1")
    clock.now += 19
    await live(store, "boot 2", "another host")
    await live(store, "boot 3", pool="another pool")
    clock.now += 10
    assert await store.run(take_over, "boot 2", 10.0) == 0
    if how == "it is silent":
        clock.now += 1
    elif how == "it has begun anew":
        assert not await live(store, "boot 4")
    else:
        await store.run(retire, "boot 1")
    assert await store.run(take_over, "boot 3", 10.0) == 0, "it is of another pool"
    assert await store.run(take_over, "boot 2", 10.0) == 1
    assert await store.run(held_by, "boot 2") == ["flow"]
    assert await store.run(take_over, "boot 4", 10.0) == 0
    assert await store.run(held_by, "boot 1") == []
    assert await live(store, "boot 1") is (how == "it has begun anew"), "it was frozen"
    assert await store.run(hold, "flow", "boot 1") is False


async def test_a_worker_that_was_silent_itself_waits_for_the_signs_of_others(store: Store, clock: Clock):
    for number in (1, 2):
        await live(store, f"boot {number}", name=f"w{number}")
        await store.run(hold, f"flow {number}", f"boot {number}")
    clock.now += 600  # the database was away, or the machine asleep
    await live(store, "boot 1", name="w1")
    assert await store.run(take_over, "boot 1", 10.0) == 0
    clock.now += 5
    await live(store, "boot 2", name="w2")
    for _ in range(2):
        clock.now += 5
        for number in (1, 2):
            await live(store, f"boot {number}", name=f"w{number}")
            assert await store.run(take_over, f"boot {number}", 10.0) == 0
    clock.now += 25
    await live(store, "boot 1", name="w1")
    clock.now += 5
    assert await store.run(take_over, "boot 1", 10.0) == 1


async def test_of_two_living_workers_of_one_name_the_first_takes_another(store: Store, clock: Clock):
    await live(store, "boot 1")
    clock.now += 1
    assert not await live(store, "boot 2")
    assert await live(store, "boot 1")
    assert not await live(store, "boot 1", name="w-1")
    for boot in ("boot 1", "boot 2"):
        await store.run(hold, f"flow of {boot}", boot)
    for boot in ("boot 1", "boot 2"):
        assert await store.run(take_over, boot, 10.0) == 0
        assert await store.run(held_by, boot) == [f"flow of {boot}"]


# Costs


async def test_costs_are_added_up_by_crew_day_batch_and_flow_run(store: Store, clock: Clock):
    first = datetime.fromtimestamp(BEGINNING, UTC).date()
    clock.now = datetime(first.year, first.month, first.day, tzinfo=UTC).timestamp()
    await over(store, request("1", flow_run_id="f"), tokens=10, cost=0.1)
    await over(
        store, request("2", crew="other", crew_url="https://other.test"), AttemptState.FAILED, tokens=5, cost=0.2
    )
    await in_flight(store, request("3"))
    call = request("4")
    await begun(store, call)
    await store.run(not_started, "4", call.owner)
    clock.now += DAY
    await held_batch(store, "a")
    await over(store, run_of("a"))

    async def lines(by: Any, days: int = 7, **filters: Any) -> list[tuple[Any, ...]]:
        found = await store.run(costs, first, first + timedelta(days=days), by, **filters)
        return sorted((line.group or "", line.runs, line.tokens, line.cost) for line in found)

    assert await lines("crew") == [("other", 1, 5, 0.2), ("travel", 2, 10, 0.1)]
    assert await lines("crew", days=1) == [("other", 1, 5, 0.2), ("travel", 1, 10, 0.1)]
    assert await lines("day") == [(f"{first}", 2, 15, 0.3), (f"{first + timedelta(days=1)}", 1, 0, 0.0)]
    assert await lines("batch") == [("", 2, 15, 0.3), ("leads", 1, 0, 0.0)]
    assert await lines("flow_run") == [("", 2, 5, 0.2), ("f", 1, 10, 0.1)]
    assert await lines("crew", crew_url=CREW) == [("travel", 2, 10, 0.1)]
    assert await lines("crew", days=0) == []
    [line] = await store.run(costs, first, first + timedelta(days=7), "batch", crew_url="https://other.test")
    assert line == CostLine(group=None, runs=1, runs_with_tokens=1, runs_with_cost=1, tokens=5, cost=0.2)


# Pruning


async def prune(store: Store, before: float) -> list[str]:
    keys = await store.run(keys_to_prune, before)
    await store.run(prune_keys, keys, before)
    return sorted(keys)


async def test_what_has_ended_long_ago_is_deleted_with_all_that_belongs_to_it(store: Store, clock: Clock):
    attempt = await in_flight(store, request("old"), "id")
    await store.run(ask, attempt, 1, marks={}, task=None, text=None)
    await store.run(ended, attempt, "id", AttemptState.COMPLETED, result="x")
    failed = request("again")
    await over(store, failed, AttemptState.FAILED)
    await begun(store, request("uncertain"))
    clock.now += DAY
    await in_flight(store, once_more(failed))
    await over(store, request("new"))
    assert await prune(store, clock.now) == ["old"]
    assert await store.run(of_key, "old") == []
    assert await store.run(result_of, attempt.id) is None
    assert await store.run(questions_of, attempt.id) == []
    assert len(await store.run(of_key, "again")) == 2
    reused = await in_flight(store, request("other"), "id")  # the id is free again
    assert reused.kickoff_id == "id"


async def test_a_key_that_was_used_again_since_it_was_chosen_is_not_deleted(store: Store, clock: Clock):
    call = request()
    await over(store, call, AttemptState.FAILED)
    clock.now += DAY
    keys = await store.run(keys_to_prune, clock.now)
    second = await begun(store, once_more(call))
    assert (keys, await store.run(prune_keys, keys, clock.now)) == (["daily"], 0)
    assert await store.run(get, second.id) == second


async def test_the_last_completed_turn_of_a_session_is_kept(store: Store, clock: Clock):
    for key, state in (("1", AttemptState.COMPLETED), ("2", AttemptState.COMPLETED), ("3", AttemptState.FAILED)):
        await over(store, request(key, session="s"), state)
    [kept] = await store.run(of_key, "2")
    clock.now += DAY
    assert await prune(store, clock.now) == ["1", "3"]
    assert (await begun(store, request("4", session="s"))).restored == kept.kickoff_id


async def test_a_batch_is_deleted_as_a_whole_or_not_at_all(store: Store, clock: Clock):
    await held_batch(store, "a", "b")
    await over(store, run_of("a"))
    attempt = await begun(store, run_of("b"))
    clock.now += DAY
    assert await store.run(prune_batch, clock.now) is None  # it is held
    await store.run(let_go, "leads", "one")
    clock.now += DAY
    assert await prune(store, clock.now) == []
    assert await store.run(prune_batch, clock.now) is None  # a run is open
    await store.run(started, attempt, "id", 1.0)
    await store.run(ended, attempt, "id", AttemptState.FAILED)
    assert await store.run(prune_batch, clock.now - DAY - 1) is None  # its last pass is not so old
    assert await store.run(prune_batch, clock.now) == "leads"
    assert await store.run(hold_batch, "leads", "two") is None
    while await store.run(prune_batch, clock.now) is not None:
        assert await store.run(list_batches) == []
    found = await store.run(counts)
    assert (found["batches"], found["rows"], found["attempts"]) == (0, 0, 0)


async def test_the_sums_of_a_budget_per_batch_are_kept_as_long_as_the_batch(store: Store, clock: Clock):
    await held_batch(store, "a", "b")
    mine, others = (
        Allowance(scope=f"budget low of {batch}", per="all", max_runs=1) for batch in ("leads", "other leads, by hand")
    )
    await over(store, dataclasses.replace(run_of("a"), allowances=[mine, others]))
    clock.now += 100 * DAY
    await store.run(prune_rest, clock.now - 30 * DAY)
    assert await step_of(store, dataclasses.replace(run_of("b"), allowances=[mine])) == "over budget"
    assert await store.run(used, others.scope) == Use()
    await store.run(let_go, "leads", "one")
    while await store.run(prune_batch, clock.now + 1) is not None:
        pass
    await store.run(prune_rest, clock.now)
    assert (await store.run(counts))["spending"] == 0


async def test_news_and_workers_of_yesterday_go(store: Store, clock: Clock):
    await store.run(add_news, "a", "old")
    await live(store, "boot 1")
    await live(store, "boot 2")
    await store.run(hold, "flow", "boot 1")
    clock.now += DAY + 31
    await store.run(add_news, "a", "new")
    await store.run(prune_rest, clock.now)
    found = await store.run(counts)
    assert (found["news"], found["workers"], found["held"]) == (1, 1, 1)
