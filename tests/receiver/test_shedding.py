from __future__ import annotations

import threading
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_crew.receiver.events import News, Rank
from prefect_crew.receiver.forward import SheddingQueue
from prefect_crew.webhooks import Hook

KINDS = {Rank.STEP: "step", Rank.STREAM: "stream", Rank.TASK: "task", Rank.CREW: "crew"}
NOW = datetime(2026, 5, 1, tzinfo=UTC)


def news(rank: Rank, name: str = "") -> News:
    hook = Hook(KINDS[rank], "key", NOW)  # pyright: ignore[reportArgumentType]
    return News(hook=hook, name=name, rank=rank, id=uuid4(), received=NOW, said={})


def names(queue: SheddingQueue) -> list[str]:
    return [one.name for one in queue.take(1000)]


def test_what_matters_most_comes_first_and_then_what_came_first():
    queue = SheddingQueue(10)
    for rank, name in [(Rank.STEP, "s1"), (Rank.CREW, "c1"), (Rank.TASK, "t1"), (Rank.CREW, "c2"), (Rank.STEP, "s2")]:
        queue.put(news(rank, name))
    assert names(queue) == ["c1", "c2", "t1", "s1", "s2"]
    assert len(queue) == 0


@pytest.mark.parametrize(
    ("held", "comes", "left"),
    [
        pytest.param([Rank.STEP, Rank.TASK, Rank.CREW], Rank.CREW, ["2", "new", "1"], id="the-lowest-goes"),
        pytest.param([Rank.STEP, Rank.STEP, Rank.CREW], Rank.STEP, ["2", "1", "new"], id="the-oldest-of-equals-goes"),
        pytest.param([Rank.CREW, Rank.TASK, Rank.CREW], Rank.STEP, ["0", "2", "1"], id="the-newcomer-goes"),
        pytest.param([Rank.CREW, Rank.CREW, Rank.CREW], Rank.CREW, ["1", "2", "new"], id="an-end-at-last"),
    ],
)
def test_what_is_given_up_when_there_is_no_room(held: list[Rank], comes: Rank, left: list[str]):
    queue = SheddingQueue(3)
    for number, rank in enumerate(held):
        queue.put(news(rank, str(number)))
    assert queue.full
    queue.put(news(comes, "new"))
    assert names(queue) == left
    assert sum(queue.shed.values()) == 1


def test_what_is_put_back_is_older_than_what_came_since():
    queue = SheddingQueue(3)
    for name in ("a", "b"):
        queue.put(news(Rank.TASK, name))
    batch = queue.take(2)
    for name in ("c", "d"):
        queue.put(news(Rank.TASK, name))
    queue.put_back(batch)
    assert names(queue) == ["b", "c", "d"]
    assert queue.shed == {"task": 1}


def test_what_is_put_back_makes_room_among_what_matters_less():
    queue = SheddingQueue(2)
    queue.put(news(Rank.CREW, "end"))
    batch = queue.take(1)
    for name in ("s1", "s2"):
        queue.put(news(Rank.STEP, name))
    queue.put_back(batch)
    assert names(queue) == ["end", "s2"]


@given(
    st.integers(1, 8),
    st.lists(st.one_of(st.sampled_from(list(Rank)), st.integers(1, 5), st.just("back")), max_size=60),
)
def test_never_more_than_its_limit_and_nothing_unaccounted_for(limit: int, script: list[object]):
    queue = SheddingQueue(limit)
    put = taken = 0
    batch: list[News] = []
    for step in script:
        if isinstance(step, Rank):
            queue.put(news(step))
            put += 1
        elif step == "back":
            queue.put_back(batch)
            taken -= len(batch)
            batch = []
        else:
            assert isinstance(step, int)
            batch = queue.take(step)
            taken += len(batch)
        assert len(queue) <= limit
        assert put == taken + len(queue) + sum(queue.shed.values())


def test_an_end_is_given_up_for_an_end_only():
    queue = SheddingQueue(50)
    for number in range(40):
        queue.put(news(Rank.CREW, f"end-{number}"))
    for _ in range(500):
        queue.put(news(Rank.STEP))
        queue.put(news(Rank.TASK))
    assert [name for name in names(queue) if name] == [f"end-{number}" for number in range(40)]


def test_from_many_threads():
    queue = SheddingQueue(100)
    taken: list[News] = []

    def put() -> None:
        for number in range(500):
            queue.put(news(Rank(number % 4)))

    def take() -> None:
        for _ in range(300):
            taken.extend(queue.take(3))

    threads = [threading.Thread(target=one) for one in (put, put, take)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) + len(queue) + sum(queue.shed.values()) == 1000
