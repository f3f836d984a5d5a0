"""What goes on beside the work: nobody waits for it before the end, and then for all of it."""

from __future__ import annotations

import asyncio

import pytest

from prefect_crew._internal import background
from prefect_crew._internal.background import beside_here, work_beside

pytestmark = pytest.mark.usefixtures("prefect_api")


class Job:
    """Something that is done once it is let."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.done = False

    async def run(self) -> None:
        await self.go.wait()
        self.done = True


async def test_nothing_is_waited_for_before_the_end_and_all_of_it_then():
    view, record = Job(), Job()
    async with work_beside():
        here = beside_here()
        assert here is not None
        here.show(view.run())
        here.write_down(record.run())
        await asyncio.sleep(0)
        assert not view.done
        assert not record.done
        view.go.set()
        asyncio.get_running_loop().call_later(0.05, record.go.set)
    assert view.done
    assert record.done
    assert beside_here() is None


async def test_within_another_one_its_end_is_the_end():
    job = Job()
    async with work_beside():
        async with work_beside():
            here = beside_here()
            assert here is not None
            here.write_down(job.run())
        assert not job.done
        job.go.set()
    assert job.done


async def test_what_people_look_at_is_given_up_at_last_and_a_record_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "PATIENCE", 0.01)
    view, record = Job(), Job()
    async with work_beside():
        here = beside_here()
        assert here is not None
        showing = here.show(view.run())
        here.write_down(record.run())
        asyncio.get_running_loop().call_later(0.1, record.go.set)
    assert record.done
    assert not view.done
    showing.cancel()


async def test_work_that_is_cut_off_waits_for_a_record_only_so_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "PATIENCE", 0.05)
    quick, hangs = Job(), Job()

    async def work() -> None:
        async with work_beside():
            here = beside_here()
            assert here is not None
            here.write_down(quick.run())
            here.write_down(hangs.run())
            asyncio.get_running_loop().call_later(0.01, quick.go.set)
            await asyncio.sleep(60)

    working = asyncio.ensure_future(work())
    await asyncio.sleep(0)
    working.cancel()
    await asyncio.wait({working}, timeout=10)
    assert working.cancelled()
    assert (quick.done, hangs.done) == (True, False)
    hangs.go.set()


async def test_a_failure_of_the_work_waits_for_the_record_and_is_what_is_raised():
    job = Job()

    async def work() -> None:
        async with work_beside():
            here = beside_here()
            assert here is not None
            here.write_down(job.run())
            asyncio.get_running_loop().call_later(0.02, job.go.set)
            raise ValueError("the work")

    with pytest.raises(ValueError, match="the work"):
        await work()
    assert job.done


async def test_what_goes_wrong_beside_it_is_not_lost():
    async def broken() -> None:
        raise LookupError("a bug")

    async def work() -> None:
        async with work_beside():
            here = beside_here()
            assert here is not None
            here.write_down(broken())

    with pytest.raises(LookupError, match="a bug"):
        await work()


@pytest.mark.parametrize("sign", ["over", "end"])
async def test_a_rest_ends_early_when_there_is_nothing_to_wait_for(sign: str):
    over, rested = asyncio.Event(), list[bool]()

    async def rest(here: background.Beside) -> None:
        await here.rest(60, over)
        rested.append(True)

    async with work_beside():
        here = beside_here()
        assert here is not None
        here.show(rest(here))
        await asyncio.sleep(0)
        if sign == "over":
            over.set()
            await asyncio.sleep(0.02)
            assert rested
    assert rested


async def test_another_event_loop_has_none_of_it():
    async def look() -> object:
        return beside_here()

    async with work_beside():
        assert await asyncio.to_thread(asyncio.run, look()) is None
