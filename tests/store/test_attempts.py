"""The life of an attempt, transaction by transaction, on both databases."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from prefect_crew.store.attempts import (
    ask_to_stop,
    back_off,
    begin,
    continued,
    ended,
    get,
    go_on,
    ids_of,
    list_attempts,
    look,
    not_started,
    of_key,
    of_kickoff_id,
    resolve,
    result_of,
    started,
    uncertain,
    waited_for,
)
from prefect_crew.store.database import Store
from prefect_crew.store.decision import TIMEOUT, Allowance, AttemptState, Step
from prefect_crew.store.spending import Use, used
from support.crew_database import CREW, Clock, begun, in_flight, once_more, over, request, step_of

WINDOW = 25.0 + 30.0 + 5.0
"""Seconds in which the owner alone may touch an attempt that it has begun."""


# Start


async def test_the_first_call_of_a_key_starts_and_the_second_waits_for_it(store: Store):
    call = request()
    assert (await store.run(look, call)).step is Step.START
    attempt = await begun(store, call)
    assert (attempt.state, attempt.number, attempt.kickoff_id) == (AttemptState.POSTING, 1, None)
    other = await store.run(begin, once_more(call))
    assert (other.step, other.attempt) == (Step.BUSY, await store.run(get, attempt.id))


async def test_a_call_that_lost_the_answer_of_its_begin_gets_that_attempt_with_a_new_window(store: Store, clock: Clock):
    call = request()
    first = await begun(store, call)
    clock.now += WINDOW - 1
    again = await begun(store, call)
    assert (again.id, again.deadline) == (first.id, clock.now + WINDOW)
    assert len(await store.run(of_key, call.key)) == 1


async def test_after_its_time_an_own_attempt_is_given_up_for_another(store: Store, clock: Clock):
    call = request()
    first = await begun(store, call)
    clock.now += WINDOW
    second = await begun(store, call)
    states = [(attempt.id, attempt.state) for attempt in await store.run(of_key, call.key)]
    assert states == [(first.id, AttemptState.NOT_STARTED), (second.id, AttemptState.POSTING)]


async def test_a_caller_that_dies_before_its_kickoff_leaves_it_uncertain_after_the_deadline(store: Store, clock: Clock):
    call = request()
    attempt = await begun(store, call)
    clock.now += WINDOW - 0.001
    assert await step_of(store, once_more(call)) == "busy"
    clock.now += 0.001
    other = await store.run(begin, once_more(call))
    assert (other.step, other.attempt and other.attempt.id) == (Step.UNCERTAIN, attempt.id)


async def test_what_surely_did_not_start_neither_counts_nor_conflicts(store: Store):
    call = request(max_attempts=1)
    await begun(store, call)
    assert await store.run(not_started, call.key, call.owner)
    assert not await store.run(not_started, call.key, call.owner)
    assert await step_of(store, once_more(call, inputs_digest="of others", crew_url="https://other.test")) == "start"


async def test_only_its_owner_says_that_an_attempt_did_not_start(store: Store):
    call = request()
    await begun(store, call)
    assert not await store.run(not_started, call.key, "another")
    assert await step_of(store, once_more(call)) == "busy"


async def test_a_conflict_names_what_differs(store: Store):
    digests = {"topic": "1", "audience": "2"}
    await begun(store, request(input_digests=digests))
    others = request(inputs_digest="of others", input_digests={**digests, "topic": "3", "new": "4"})
    assert (await store.run(begin, others)).differences == ["new", "topic"]
    assert (await store.run(look, request(inputs_digest="of others", input_digests=digests))).differences == ["inputs"]
    decision = await store.run(begin, request(crew_url="https://other.test", input_digests=digests))
    assert (decision.step, decision.differences) == (Step.CONFLICT, ["crew"])


async def test_a_failed_run_is_started_again_up_to_max_attempts(store: Store):
    call = request(max_attempts=2)
    await over(store, call, AttemptState.FAILED)
    assert await step_of(store, once_more(call, max_attempts=1)) == "return"
    second = once_more(call)
    decision = await store.run(begin, second)
    assert (decision.step, decision.attempt and decision.attempt.number) == (Step.START_AGAIN, 2)
    await store.run(started, decision.attempt, "id", 60.0)
    await store.run(ended, decision.attempt, "id", AttemptState.FAILED)
    assert await step_of(store, once_more(call)) == "return"
    first, last = await store.run(of_key, call.key)
    assert (first.replaced, last.replaced) == (True, False)


async def test_an_earlier_try_of_the_own_flow_run_fails_for_itself(store: Store, clock: Clock):
    call = request(flow_run_id="flow", flow_run_count=1)
    asked_at = clock.now
    clock.now += 1
    await over(store, call, AttemptState.FAILED)
    retry = once_more(call, flow_run_count=2, asked_at=asked_at)
    assert await step_of(store, retry) == "start again"


async def test_a_completed_run_is_returned_and_a_run_in_flight_reattached_to(store: Store):
    call = request()
    attempt = await in_flight(store, call, "id")
    assert await step_of(store, once_more(call)) == "reattach"
    await store.run(ended, attempt, "id", AttemptState.COMPLETED, result={"output": "x"})
    decision = await store.run(begin, once_more(call))
    assert (decision.step, decision.attempt and decision.attempt.kickoff_id) == (Step.RETURN, "id")
    assert await store.run(result_of, attempt.id) == {"output": "x"}


@pytest.mark.parametrize(
    ("by", "since", "step"),
    [
        ("anna", -10.0, "stopped"),
        ("anna", None, "start again"),
        ("anna", 10.0, "start again"),
        (TIMEOUT, -10.0, "start again"),
    ],
    ids=["a retry of a flow run that waited", "a new call", "a flow run that began later", "after a timeout"],
)
async def test_what_a_person_stopped_no_retry_starts_again(
    store: Store, clock: Clock, by: str, since: float | None, step: str
):
    call = request()
    attempt = await in_flight(store, call, "id")
    assert await store.run(ask_to_stop, attempt, by)
    assert not await store.run(ask_to_stop, attempt, "bert")
    await store.run(ended, attempt, "id", AttemptState.STOPPED)
    retry = once_more(call, retried_since=None if since is None else clock.now + since)
    assert await step_of(store, retry) == step


# The window


async def test_the_window_is_extended_by_its_owner_only_while_it_is_open(store: Store, clock: Clock):
    attempt = await begun(store, request())
    clock.now += WINDOW - 1
    assert await store.run(go_on, attempt, 30.0)
    clock.now += WINDOW
    assert not await store.run(go_on, attempt, 30.0)


async def test_a_pause_after_an_answer_that_started_nothing_ends_with_a_window(store: Store, clock: Clock):
    call = request()
    attempt = await begun(store, call)
    assert await store.run(back_off, attempt, 100.0)
    clock.now += 101
    assert await step_of(store, once_more(call)) == "busy"
    assert await store.run(go_on, attempt, 30.0)
    clock.now += WINDOW - 1
    assert await step_of(store, once_more(call)) == "busy"
    clock.now += 1
    assert await step_of(store, once_more(call)) == "uncertain"


async def test_a_caller_that_dies_in_a_pause_leaves_the_key_free_afterwards(store: Store, clock: Clock):
    call = request()
    attempt = await begun(store, call)
    await store.run(back_off, attempt, 100.0)
    clock.now += 125
    assert not await store.run(go_on, attempt, 30.0)
    assert await step_of(store, once_more(call)) == "start"
    assert not await store.run(go_on, attempt, 30.0)
    first, second = await store.run(of_key, call.key)
    assert (first.state, second.state) == (AttemptState.NOT_STARTED, AttemptState.POSTING)


# Uncertain, and resolved


async def test_an_uncertain_kickoff_is_resolved_by_a_person_after_the_deadline_only(store: Store, clock: Clock):
    call = request()
    attempt = await begun(store, call)
    assert await store.run(uncertain, attempt, "no answer")
    assert await step_of(store, once_more(call)) == "uncertain"
    early = await store.run(resolve, attempt, AttemptState.NOT_STARTED, "anna")
    assert early.attempt is not None
    assert early.attempt.state is AttemptState.UNCERTAIN
    early = await store.run(resolve, attempt, AttemptState.STARTED, "anna", kickoff_id="id")
    assert early.attempt is not None
    assert early.attempt.state is AttemptState.UNCERTAIN
    clock.now += WINDOW
    resolved = (await store.run(resolve, attempt, AttemptState.NOT_STARTED, "anna")).attempt
    assert resolved is not None
    assert (resolved.state, resolved.resolved_by) == (AttemptState.NOT_STARTED, "anna")
    assert await step_of(store, once_more(call)) == "start"


async def test_a_person_names_the_id_of_an_uncertain_kickoff(store: Store, clock: Clock):
    call = request()
    attempt = await begun(store, call)
    clock.now += WINDOW
    result = await store.run(resolve, attempt, AttemptState.STARTED, "anna", kickoff_id="id", timeout=60.0)
    assert result.attempt is not None
    assert (result.attempt.state, result.attempt.kickoff_id) == (AttemptState.STARTED, "id")
    assert result.attempt.resolved_by == "anna"
    assert await step_of(store, once_more(call)) == "reattach"


async def test_a_person_says_that_a_run_is_lost(store: Store):
    call = request()
    attempt = await in_flight(store, call, "id")
    assert (await store.run(resolve, attempt, AttemptState.NOT_STARTED, "anna")).attempt == attempt
    result = await store.run(resolve, attempt, AttemptState.LOST, "anna")
    assert result.attempt is not None
    assert result.attempt.state is AttemptState.LOST
    assert not await store.run(ended, attempt, "id", AttemptState.COMPLETED)
    assert await step_of(store, once_more(call)) == "start again"


async def test_an_id_counts_at_once_and_more_than_a_word(store: Store, clock: Clock):
    call = request()
    attempt = await begun(store, call)
    await store.run(uncertain, attempt, "no answer")
    assert (await store.run(started, attempt, "id", 60.0)).attempt == await store.run(get, attempt.id)
    other = request("other")
    attempt = await begun(store, other)
    clock.now += WINDOW
    await store.run(resolve, attempt, AttemptState.NOT_STARTED, "anna")
    second = await begun(store, once_more(other))
    late = await store.run(started, attempt, "late", 60.0)
    assert late.attempt is not None
    assert (late.attempt.state, late.second) == (AttemptState.STARTED, "attempt 2")
    assert (await store.run(started, second, "second", 60.0)).second is None


async def test_an_id_belongs_to_one_attempt(store: Store):
    holder = await in_flight(store, request("first"), "same")
    attempt = await begun(store, request("second"))
    result = await store.run(started, attempt, "same", 60.0)
    assert (result.other_key, result.attempt and result.attempt.state) == ("first", AttemptState.UNCERTAIN)
    assert [one.id for one in await store.run(of_kickoff_id, "same")] == [holder.id]
    elsewhere = await in_flight(store, request("third", crew_url="https://other.test"), "same")
    assert elsewhere.state is AttemptState.STARTED


async def test_an_id_that_is_written_twice_is_one_and_another_one_changes_nothing(store: Store):
    attempt = await in_flight(store, request(), "id")
    for kickoff_id, second in (("id", None), ("another", "another")):
        result = await store.run(started, attempt, kickoff_id, 60.0)
        assert (result.attempt, result.second) == (attempt, second)
    assert await store.run(ids_of, attempt.id) == ["id"]


# In flight


async def test_a_run_that_goes_on_under_another_id_ends_under_that_one(store: Store):
    attempt = await in_flight(store, request(), "first")
    result = await store.run(continued, attempt, "second")
    assert result.attempt is not None
    assert result.attempt.kickoff_id == "second"
    assert not await store.run(ended, attempt, "first", AttemptState.FAILED)
    assert await store.run(ended, attempt, "second", AttemptState.COMPLETED)
    assert (await store.run(continued, attempt, "third")).attempt == await store.run(get, attempt.id)
    assert await store.run(ids_of, attempt.id) == ["first", "second"]


async def test_an_end_is_written_once(store: Store):
    attempt = await in_flight(store, request(), "id")
    assert await store.run(ended, attempt, "id", AttemptState.FAILED, error="It is\0 odd \ud800.")
    assert not await store.run(ended, attempt, "id", AttemptState.COMPLETED, result="x")
    again = await store.run(get, attempt.id)
    assert again is not None
    assert (again.state, again.error) == (AttemptState.FAILED, "It is odd .")
    assert await store.run(result_of, attempt.id) is None


async def test_a_result_comes_back_as_it_was(store: Store):
    result = {"output": "Zürich \0 \ud800 😀", "data": [1, 2.5, None, True]}
    attempt = await over(store, request(), result=result, usage={"total_tokens": 7}, tokens=7, cost=0.1)
    assert await store.run(result_of, attempt.id) == result
    again = await store.run(get, attempt.id)
    assert again is not None
    assert (again.usage, again.tokens, again.cost) == ({"total_tokens": 7}, 7, 0.1)


async def test_the_time_of_a_person_is_added_up(store: Store, clock: Clock):
    attempt = await in_flight(store, request(), timeout=10.0)
    for _ in range(2):
        waiting = await store.run(waited_for, attempt, 100.0, is_human=True)
        assert waiting is not None
        assert (waiting.human_since, waiting.counts_until) == (clock.now, clock.now + 100)
        clock.now += 30
        await store.run(waited_for, attempt, 10.0, is_human=True)
        clock.now += 10
        waiting = await store.run(waited_for, attempt, 10.0, is_human=False)
    assert waiting == await store.run(get, attempt.id)
    assert (waiting.human_since, waiting.human_seconds) == (None, 80.0)


# Limits, budgets, sessions


async def test_a_crew_has_as_many_runs_in_flight_as_its_limit(store: Store, clock: Clock):
    first = await in_flight(store, request("1", limit=2), "id", timeout=100.0)
    await begun(store, request("2", limit=2))
    assert await step_of(store, request("3", limit=2)) == "full"
    assert await step_of(store, request("3", limit=2, crew_url="https://other.test")) == "start"
    assert await step_of(store, request("4")) == "start"  # whoever has no limit is not held up
    clock.now += WINDOW  # the second and the fourth caller have died
    assert await step_of(store, request("5", limit=2)) == "start"
    assert await step_of(store, request("6", limit=2)) == "full"
    assert await store.run(ended, first, "id", AttemptState.COMPLETED)
    assert await step_of(store, request("6", limit=2)) == "start"


async def test_a_run_that_nobody_waits_for_gives_its_slot_back(store: Store, clock: Clock):
    attempt = await in_flight(store, request("1", limit=1), timeout=100.0)
    clock.now += 99
    await store.run(waited_for, attempt, 100.0)
    clock.now += 99
    assert await step_of(store, request("2", limit=1)) == "full"
    clock.now += 1
    assert await step_of(store, request("2", limit=1)) == "start"


def budget(**facts: Any) -> list[Allowance]:
    return [Allowance(**{"scope": "ours", "per": "day", **facts})]


async def test_a_budget_counts_estimates_until_the_use_is_known(store: Store, clock: Clock):
    allowances = budget(max_cost=0.3, estimate_cost=0.1)
    attempts_ = [await begun(store, request(str(number), allowances=allowances)) for number in range(3)]
    decision = await store.run(begin, request("4", allowances=allowances))
    assert decision.step is Step.OVER_BUDGET
    assert [(one.measure, one.used, one.limit) for one in decision.overruns] == [("cost", 0.3, 0.3)]
    assert await store.run(used, "ours") == Use(runs=3, cost=0.3)
    await store.run(not_started, "0", attempts_[0].owner)
    assert await store.run(used, "ours") == Use(runs=2, cost=0.2)
    await store.run(started, attempts_[0], "late", 60.0)  # an id beats a word, and books the estimate once more
    assert await store.run(used, "ours") == Use(runs=3, cost=0.3)
    await store.run(ended, attempts_[0], "late", AttemptState.FAILED, cost=0.05, tokens=9)
    assert await store.run(used, "ours") == Use(runs=3, tokens=9, cost=0.25)
    await store.run(started, attempts_[1], "unknown", 60.0)
    await store.run(ended, attempts_[1], "unknown", AttemptState.COMPLETED)
    assert await store.run(used, "ours") == Use(runs=3, tokens=9, cost=0.25)
    clock.now += 86_400
    assert await step_of(store, request("4", allowances=allowances)) == "start"
    assert await step_of(store, request("5", allowances=budget(per="all", max_runs=4))) == "over budget"


async def test_a_budget_that_only_warns_starts_the_run_and_tells(store: Store):
    allowances = [*budget(max_runs=1, is_warning=True), *budget(scope="theirs", max_tokens=10, estimate_tokens=4)]
    await begun(store, request("1", allowances=allowances))
    decision = await store.run(begin, request("2", allowances=allowances))
    assert decision.step is Step.START
    assert [(one.allowance.scope, one.measure, one.used) for one in decision.overruns] == [("ours", "runs", 1)]
    decision = await store.run(begin, request("3", allowances=allowances))
    assert decision.step is Step.OVER_BUDGET
    assert [one.allowance.scope for one in decision.overruns if not one.allowance.is_warning] == ["theirs"]
    assert await store.run(used, "ours") == Use(runs=2)


@pytest.mark.parametrize(
    ("refusal", "facts"),
    [
        ("full", {"limit": 1}),
        ("turn", {"session": "s"}),
        ("over budget", {"allowances": budget(max_cost=0.1, estimate_cost=0.1)}),
    ],
    ids=["limit", "session", "budget"],
)
async def test_a_caller_that_dies_in_a_pause_takes_no_room_from_others(
    store: Store, clock: Clock, refusal: str, facts: Any
):
    attempt = await begun(store, request("dead", **facts))
    await store.run(back_off, attempt, 100.0)
    clock.now += 125 - 0.001
    assert await step_of(store, request("other", **facts)) == refusal
    clock.now += 0.001
    assert await step_of(store, request("other", **facts)) == "start"
    assert [one.state for one in await store.run(of_key, "dead")] == [AttemptState.NOT_STARTED]
    assert await store.run(used, "ours") == (Use(runs=1, cost=0.1) if refusal == "over budget" else Use())


async def test_turns_of_a_session_come_one_after_the_other_from_the_last_completed_one(store: Store, clock: Clock):
    def turn(key: str) -> Any:
        return request(key, session="customer 42")

    first = await in_flight(store, turn("1"), "id 1")
    blocked = await store.run(begin, turn("2"))
    assert (blocked.step, blocked.attempt) == (Step.TURN, first)
    await store.run(continued, first, "id 1b")
    await store.run(ended, first, "id 1b", AttemptState.COMPLETED)
    second = await in_flight(store, turn("2"), "id 2")
    assert (first.turn, first.restored, second.turn, second.restored) == (1, None, 2, "id 1")
    await store.run(ended, second, "id 2", AttemptState.FAILED)
    third = await begun(store, turn("3"))
    assert (third.turn, third.restored) == (3, "id 1")
    await store.run(not_started, "3", third.owner)
    fourth = await begun(store, turn("4"))
    assert (fourth.turn, fourth.restored) == (4, "id 1")
    await store.run(back_off, fourth, 100.0)
    assert await step_of(store, turn("5")) == "turn"
    clock.now += 125
    assert (await begun(store, turn("5"))).restored == "id 1"
    clock.now += WINDOW
    blocked = await store.run(begin, turn("6"))  # the fifth turn is uncertain
    assert (blocked.step, blocked.attempt and blocked.attempt.turn) == (Step.TURN, 5)
    assert await step_of(store, request("7", session="customer 43")) == "start"


# Read


async def test_lists_have_pages_and_filters(store: Store, clock: Clock):
    for number in range(5):
        clock.now += 1
        facts: dict[str, Any] = {"flow_run_id": f"flow {number % 2}", "session": "s" if number == 4 else None}
        await (over if number < 2 else in_flight)(store, request(str(number), **facts))
    page = await store.run(list_attempts, limit=2)
    assert [attempt.key for attempt in page] == ["4", "3"]
    page = await store.run(list_attempts, before=(page[-1].begun_at, page[-1].id), limit=2)
    assert [attempt.key for attempt in page] == ["2", "1"]

    async def keys(**filters: Any) -> list[str]:
        return [attempt.key for attempt in await store.run(list_attempts, **filters)]

    assert await keys(is_in_flight=True, crew=CREW) == ["4", "3", "2"]
    assert await keys(states=[AttemptState.COMPLETED]) == ["1", "0"]
    assert await keys(flow_run_ids={"flow 1"}) == ["3", "1"]
    assert await keys(session="s") == ["4"]
    assert await keys(batch="b") == await keys(flow_run_ids=[]) == []


async def test_what_is_gone_is_changed_by_nobody(store: Store):
    attempt = await over(store, request())
    missing = dataclasses.replace(attempt, id="missing")
    assert await store.run(get, "missing") is None
    assert (await store.run(started, missing, "id", 1.0)).attempt is None
    assert (await store.run(continued, missing, "id")).attempt is None
    assert (await store.run(resolve, missing, AttemptState.LOST, "anna")).attempt is None
    assert await store.run(waited_for, missing, 1.0) is None
    assert not await store.run(ended, missing, "id", AttemptState.COMPLETED)
