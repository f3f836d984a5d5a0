"""flows/watch_folder.py: each new file of a folder is run once and moved, and what is not done stays."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from support.deployed import load_flow
from support.scripts import script
from support.waiting import until


class Folder:
    """A folder that the flow watches."""

    def __init__(self, place: Path) -> None:
        self.inbox, self.outbox = place / "inbox", place / "outbox"
        self.inbox.mkdir()

    def receive(self, name: str, text: str, *, age: float = 60.0) -> Path:
        path = self.inbox / name
        path.write_text(text)
        past = path.stat().st_mtime - age
        os.utime(path, (past, past))
        return path

    async def look(self, crew: str, **more: Any) -> list[dict[str, Any]]:
        return await load_flow("watch_folder.py:watch_folder")(crew, str(self.inbox), str(self.outbox), **more)

    @property
    def files(self) -> set[str]:
        return {str(path.relative_to(self.inbox)) for path in self.inbox.rglob("*") if path.is_file()}

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for path in self.outbox.glob("*.jsonl") for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


async def test_a_new_file_is_run_once_and_moved(echo: CrewServer, folder: Folder):
    assert await folder.look("batch-echo") == []
    folder.receive("a.csv", "topic\ntea\nmilk\n")
    folder.receive("b.csv", "topic\ncake\n")
    folder.receive("fresh.csv", "topic\nstill being writ", age=0)
    folder.receive("notes.txt", "no rows")
    reports = await folder.look("batch-echo")
    assert [report["completed"] for report in reports] == [2, 1]
    assert folder.files == {"done/a.csv", "done/b.csv", "fresh.csv", "notes.txt"}
    assert await folder.look("batch-echo") == []
    assert echo.kickoffs == 3
    # The same file again starts nothing new; another one of its name is.
    folder.receive("a.csv", "topic\ntea\nmilk\n")
    await folder.look("batch-echo")
    assert echo.kickoffs == 3
    folder.receive("a.csv", "topic\nwine\n")
    await folder.look("batch-echo")
    assert echo.kickoffs == 4
    assert folder.files >= {"done/a.csv", "done/a-again.csv", "done/a-again-again.csv"}
    assert sorted(line["output"] for line in folder.lines()) == ["on cake", "on milk", "on tea", "on wine"]


async def test_two_looks_at_once_start_nothing_twice(echo: CrewServer, folder: Folder):
    for number in range(3):
        folder.receive(f"{number}.csv", f"topic\ntea {number}\nmilk {number}\n")
    looks = await asyncio.gather(*(folder.look("batch-echo") for _ in range(3)))
    assert sum(report["kickoffs"] for look in looks for report in look) == echo.kickoffs == 6
    await folder.look("batch-echo")
    assert folder.files == {"done/0.csv", "done/1.csv", "done/2.csv"}
    assert echo.kickoffs == len(folder.lines()) == 6


async def test_a_file_whose_batch_dies_in_the_middle_stays_and_is_named(save_crew: Any, folder: Folder):
    slow = save_crew("batch-slow", script({"seconds": 0.1, "output": "on {{ topic }}"}, inputs=["topic"]))
    path = folder.receive("growing.csv", "topic\n" + "tea\n" * 900)
    looking = asyncio.ensure_future(folder.look("batch-slow", options={"max_in_flight": 5}))
    await until(lambda: slow.kickoffs >= 5)
    with path.open("a") as file:
        file.write("late\n" * 900)
    with pytest.raises(RuntimeError, match=r"^growing\.csv \(DatasetError\) failed"):
        await looking
    assert folder.files == {"growing.csv"}


async def test_a_file_of_which_rows_go_on_is_not_done(save_crew: Any, folder: Folder):
    server = save_crew("batch-late", script({"seconds": 600, "output": "on {{ topic }}"}, inputs=["topic"]))
    server.faults.add("kickoff:422@1")
    folder.receive("late.csv", "topic\ntea\nmilk\n")
    options: dict[str, Any] = {"wait": {"initial": 0.1, "timeout": 0.3}, "max_in_flight": 1}
    (report,) = await folder.look("batch-late", options=options)
    assert report["failed"] == 2
    assert report["unfinished"] == 2
    assert folder.files == {"late.csv"}
    (report,) = await folder.look("batch-late", options=options)
    assert report["unfinished"] == 2
    assert server.kickoffs == 2
    assert folder.files == {"late.csv"}, "it goes on with both rows"


async def test_a_file_may_have_any_name(echo: CrewServer, folder: Folder):
    names = ["{scheduled_start} {x}.csv", "x" * 200 + ".csv", "ü" * 124 + ".csv", "two\nlines.csv"]
    for name in names:
        folder.receive(name, "topic\ntea\n")
    assert [report["completed"] for report in await folder.look("batch-echo")] == [1] * 4
    assert folder.files == {f"done/{name}" for name in names}


async def test_a_file_that_cannot_be_run_keeps_no_other_from_being_run(echo: CrewServer, folder: Folder):
    folder.receive("bad.csv", "subject\ntea\n", age=180)
    folder.receive("empty.csv", "", age=150)
    folder.receive("a.csv", "topic\ntea\n", age=120)
    folder.receive("b.csv", "topic\nmilk\n", age=90)
    # The lines of a.csv cannot be written: something else is there.
    name = load_flow("watch_folder.py:watch_folder").fn.__globals__["batch_name"](folder.inbox / "a.csv")
    (taken := folder.outbox / f"{name}.jsonl").mkdir(parents=True)
    done = {"refused/bad.csv", "refused/empty.csv", "done/b.csv"}
    for looks in (1, 2):
        with pytest.raises(RuntimeError, match=r"^a\.csv \(CrewError\) failed, the other files were run"):
            await folder.look("batch-echo", pattern="**/*.csv")
        assert echo.kickoffs == 1, f"after {looks} looks"
        assert folder.files == {"a.csv", *done}
    taken.rmdir()
    (report,) = await folder.look("batch-echo", pattern="**/*.csv")
    assert report["completed"] == 1
    assert echo.kickoffs == 2
    assert folder.files == {"done/a.csv", *done}
