"""The export of the rows of a batch in their order, as JSON Lines or CSV, here or elsewhere."""

import asyncio
import csv
import json
import threading
import traceback
from datetime import date
from errno import ENOSPC
from os import strerror
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import BaseModel, ConfigDict, Field

from prefect_crew.batches.dataset import open_dataset
from prefect_crew.batches.output import COLUMNS, CONFLICT_REASON, Output
from prefect_crew.exceptions import BatchBusyError, ConfigurationError, CrewError
from support.batches import nothing, pages, row, write
from support.waiting import LIMIT


def written(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.split("\n")[:-1]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "lines.jsonl"


@pytest.fixture
def output(path: Path) -> Output:
    """Give the output of a new batch, at `path`."""
    output = Output(str(path), "b")
    output.check(is_new=True)
    return output


async def test_each_ended_row_has_a_line_in_its_order(output: Output, path: Path):
    ended = [row("failed", "failed"), row("stopped", "stopped"), row("completed", data={"x": 1})]
    refused, conflict = row("not-started", "not_started", error="unknown input"), row("conflict", is_conflict=True)
    others = [row("posting", "posting"), row("started", "started"), row("pending", None), row("b", "uncertain")]
    counts = await output.write(pages(others[0], *ended, *others[1:], refused, conflict), nothing)
    assert counts == {"failed": 1, "stopped": 1, "completed": 1, "not-started": 1, "conflict": 1}

    def line(key: str, **facts: Any) -> dict[str, Any]:
        known = {"key": key, "state": key, "inputs": {"topic": key}, "kickoff_id": f"run-{key}", "tasks": []}
        return {**dict.fromkeys(COLUMNS), **known, **facts}

    result = {"output": "text", "data": {"x": 1}, "tasks": [{"name": "t", "output": "x"}]}
    assert written(path) == [
        line("failed", seconds=2, error="the engine is down"),
        line("stopped", seconds=2, error="It was stopped."),
        line("completed", seconds=1.5, usage={"total_tokens": 7}, **result),
        line("not-started", seconds=2, error="unknown input"),
        line("conflict", error=CONFLICT_REASON),
    ]
    assert list(written(path)[2]) == list(COLUMNS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_a_result_that_is_not_kept_is_said_to_be_elsewhere(output: Output, path: Path):
    await write(output, row("a", result=None))
    [line] = written(path)
    assert (line["state"], line["output"]) == ("completed", None)
    assert line["error"].endswith("To read it, run: prefect-crew result run-a")


async def test_csv_has_the_columns_of_a_table_and_no_formula(tmp_path: Path):
    path = tmp_path / "out.csv"
    formula = "=HYPERLINK(1)"
    await write(Output(str(path), "b", output_type=Place), row("a", output=formula, data={"city": "-Ü", "People": 3}))
    assert path.read_bytes().startswith(b"\xef\xbb\xbfkey,inputs,state,")
    [line] = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
    assert (line["key"], line["state"], line["output"]) == ("a", "completed", f"'{formula}")
    assert (line["data_city"], line["data_people"], line["seconds"]) == ("'-Ü", "3", "1.5")
    assert (line["data_capital"], line["data_founded"], line["data_tags"]) == ("false", "", "[]")
    assert json.loads(line["data"])["city"] == "-Ü"


async def test_a_file_is_replaced_only_while_the_batch_is_held(output: Output, path: Path):
    path.write_text("before")

    def lost() -> None:
        raise BatchBusyError(name="b")

    with pytest.raises(BatchBusyError):
        await output.write(pages(row("a")), lost)
    assert path.read_text() == "before"


@pytest.mark.parametrize("text", ["", "\0 and \u2028", "ü 🙂 \u202e", "x" * 3_000_000], ids=len)
async def test_text_of_a_crew_is_one_line_of_json(output: Output, path: Path, text: str):
    await write(output, row("k", output=text, data={"text": text}))
    (line,) = written(path)
    assert line["output"] == line["data"]["text"] == text


def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"key": "a"}\n')
    with pytest.raises(CrewError, match=r"exists already.*Nothing was started"):
        Output(str(path), "b").check(is_new=True)
    assert path.read_text() == '{"key": "a"}\n'
    Output(str(path), "b").check(is_new=False)
    path.write_text("")
    Output(str(path), "b").check(is_new=True)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("folder", ["~/", "file://~/", "~no-user-"])
async def test_a_path_below_home_names_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    output = Output(folder + name, "b")
    output.check(is_new=True)
    assert await write(output, row("a")) == 1
    place = here / f"{folder}{name}" if folder == "~no-user-" else home / name
    files = {file for file in tmp_path.glob("h*/**/*") if file.is_file()}
    assert files == {place}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert [row.values["key"] for row in open_dataset(folder + name).rows()] == ["a"]


async def test_a_failed_write_leaves_the_file(output: Output, path: Path, monkeypatch: pytest.MonkeyPatch):
    path.write_text("before")
    with monkeypatch.context() as full:
        full.setattr(Output, "_write_page", Mock(side_effect=OSError(ENOSPC, strerror(ENOSPC))))
        with pytest.raises(CrewError, match=r"No space.*Make the same call again, which writes them"):
            await write(output, row("k"))
    assert path.read_text() == "before"
    # Two at a time: each is whole.
    assert await asyncio.gather(write(output, row("k")), write(output, row("k"))) == [1, 1]
    assert [line["key"] for line in written(path)] == ["k"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("place", ["out.jsonl.gz", "memory://cut-off/a.jsonl", "simplecache::memory://cut-off/b.jsonl"])
async def test_a_cut_off_write_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    rows = [row(key) for key in "abcd"]
    output = Output(place if "://" in place else str(tmp_path / place), "b")
    await write(output, *rows[:3])
    with fsspec.open(output.address, "rb") as file:
        before = file.read()
    second, go_on, write_page = threading.Event(), threading.Event(), Output._write_page

    def slowly(self: Output, page: Any, file: Any) -> Any:
        if page[0].row_key == "c":
            second.set()
            go_on.wait(LIMIT)
        return write_page(self, page, file)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "_write_page", slowly)
        writing = asyncio.ensure_future(write(output, *rows, size=2))
        assert await asyncio.to_thread(second.wait, 20)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        go_on.set()
    with fsspec.open(output.address, "rb") as file:
        assert file.read() == before
    assert await write(output, *rows) == 4
    assert "://" in place or [one.name for one in tmp_path.glob("*out*")] == [place]


async def test_no_error_of_a_library_shows_a_secret(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: object, local: str, address: str, *_: Any, **__: Any) -> Any:
        raise ValueError(address)

    output = Output("memory://user:hunter2@x/out.jsonl", "b")
    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with pytest.raises(CrewError, match="cannot be written: ValueError") as caught:
        await write(output)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


class Place(BaseModel):
    """A type with fields of several kinds. Its aliases name no columns."""

    model_config = ConfigDict(serialize_by_alias=True)

    city: str
    people: int = Field(alias="People")
    capital: bool = False
    founded: date | None = None
    tags: list[str] = []


ENDINGS = r"\.jsonl or \.ndjson\) or CSV, also compressed \(.*\.jsonl\.gz.*Nothing"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((name, ENDINGS) for name in ("out.tsv", "out", "out.jsonl.zst", "out.parquet", "s3://bucket/out.json")),
        *((address, "Nothing was started") for address in ("nonsense://x/out.jsonl", "https://example.com/out.jsonl")),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(name: str, problem: str):
    with pytest.raises(ConfigurationError, match=problem):
        Output(name, "b")


@pytest.mark.parametrize(
    "name", ["out.JSONL", "out.ndjson.gz", "out.jsonl.xz", "memory://b/out.jsonl.bz2?x=1", "o.csv.gz"]
)
def test_endings_that_are_known(name: str):
    Output(name, "b")
