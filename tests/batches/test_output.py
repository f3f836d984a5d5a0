"""The output: an export of the ledger in the order of the rows, as JSON Lines or Parquet, here or elsewhere."""

import asyncio
import io
import json
import threading
import traceback
from datetime import UTC, date, datetime, timedelta
from errno import ENOSPC
from os import strerror
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import BaseModel, ConfigDict, Field

from prefect_crew.batches.database import default_ledger, open_url
from prefect_crew.batches.dataset import open_dataset
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.output import COLUMNS, Output
from prefect_crew.client.models import TaskResult, TokenUsage
from prefect_crew.exceptions import ConfigurationError, ExportError
from prefect_crew.records.model import RecordPhase, StoredResult, utcnow
from prefect_crew.states import CrewState
from support.batches import enter, record_of


async def end(ledger: Ledger, key: str, state: str = "completed", *, output: str = "text", data: Any = None) -> None:
    """Have a row end in a ledger."""
    record = record_of(ledger, key)
    assert await ledger.claim(record)
    record.kickoff_id, record.kicked_off_at = f"run-{key}", utcnow()
    record.phase, record.state, record.ended_at = RecordPhase.ENDED, CrewState(state), utcnow() + timedelta(seconds=2)
    if state == "completed":
        tasks, usage = [TaskResult(name="t", output="x")], TokenUsage(total_tokens=7)
        record.result = StoredResult(output=output, data=data, tasks=tasks, execution_time=1.5, usage=usage)
    elif state == "failed":
        record.error = "the engine is down"
    await ledger.save(record)


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
    output = Output(str(path))
    output.check("b", is_new=True)
    return output


async def test_each_ended_row_has_a_line_in_its_order(ledger: Ledger, output: Output, path: Path):
    await enter(ledger, "claimed", "failed", "started", "stopped", "completed", "pending")
    await end(ledger, "completed", data={"x": 1})
    await end(ledger, "failed", "failed")
    await end(ledger, "stopped", "stopped")
    claimed, started = record_of(ledger, "claimed"), record_of(ledger, "started")
    assert await ledger.claim(claimed)
    assert await ledger.claim(started)
    started.phase, started.kickoff_id = RecordPhase.STARTED, "run-started"
    await ledger.save(started)
    assert await output.write(ledger) == 3
    claimed.phase = RecordPhase.UNCERTAIN
    await ledger.save(claimed)
    assert await output.write(ledger) == 3, "an uncertain row has no line"

    def line(key: str, **facts: Any) -> dict[str, Any]:
        known = {"key": key, "state": key, "inputs": {"topic": key}, "kickoff_id": f"run-{key}", "tasks": []}
        return {**dict.fromkeys(COLUMNS), **known, **facts}

    two = pytest.approx(2, abs=0.5)
    result = {"output": "text", "data": {"x": 1}, "tasks": [{"name": "t", "output": "x"}]}
    assert written(path) == [
        line("failed", seconds=two, error="the engine is down"),
        line("stopped", seconds=two, error="it was stopped"),
        line("completed", seconds=1.5, usage={"total_tokens": 7}, **result),
    ]
    assert list(written(path)[2]) == list(COLUMNS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["", "\0 and \u2028", "ü 🙂 \u202e", "x" * 3_000_000], ids=len)
async def test_text_of_a_crew_is_one_line_of_json(ledger: Ledger, output: Output, path: Path, text: str):
    await enter(ledger, "k")
    await end(ledger, "k", output=text, data={"text": text})
    await output.write(ledger)
    (line,) = written(path)
    assert line["output"] == line["data"]["text"] == text


def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"key": "a"}\n')
    with pytest.raises(ExportError, match=r"exists already.*Nothing was started"):
        Output(str(path)).check("b", is_new=True)
    assert path.read_text() == '{"key": "a"}\n'
    Output(str(path)).check("b", is_new=False)
    path.write_text("")
    Output(str(path)).check("b", is_new=True)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
@pytest.mark.parametrize("folder", ["~/", "file://~/", "~no-user-"])
async def test_a_path_below_home_names_one_file(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    await enter(ledger, "a")
    await end(ledger, "a")
    output = Output(folder + name)
    output.check("b", is_new=True)
    assert await output.write(ledger) == 1
    output.write_rejected(io.BytesIO(b"{}\n"), "b")
    assert output.exists()
    place = here / f"{folder}{name}" if folder == "~no-user-" else home / name
    files = {file for file in tmp_path.glob("h*/**/*") if file.is_file()}
    assert files == {place, Path(f"{place}.rejected.jsonl")}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert [row.values["key"] for row in open_dataset(folder + name).rows()] == ["a"]
    assert open_url(default_ledger(folder + name)).database == f"{place}.ledger.db"


async def test_a_failed_write_leaves_the_file(
    ledger: Ledger, output: Output, path: Path, monkeypatch: pytest.MonkeyPatch
):
    await enter(ledger, "k")
    await end(ledger, "k")
    path.write_text("before")
    with monkeypatch.context() as full:
        full.setattr(Output, "_write_page", Mock(side_effect=OSError(ENOSPC, strerror(ENOSPC))))
        with pytest.raises(ExportError, match=r"No space.*Make the same call again, which writes them"):
            await output.write(ledger)
    assert path.read_text() == "before"
    # Two at a time, of one ledger: each is whole.
    assert await asyncio.gather(output.write(ledger), output.write(ledger)) == [1, 1]
    assert [line["key"] for line in written(path)] == ["k"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("place", ["out.jsonl.gz", "memory://cut-off/a.jsonl", "simplecache::memory://cut-off/b.jsonl"])
async def test_a_cut_off_write_leaves_the_file(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    monkeypatch.setattr("prefect_crew.batches.ledger.PAGE", 2)
    await enter(ledger, "a", "b", "c", "d")
    for key in ("a", "b", "c"):
        await end(ledger, key)
    output = Output(place if "://" in place else str(tmp_path / place))
    await output.write(ledger)
    with fsspec.open(output.address, "rb") as file:
        before = file.read()
    await end(ledger, "d")
    second, go_on, write_page = threading.Event(), threading.Event(), Output._write_page

    def slowly(self: Output, page: Any, file: Any) -> int:
        if page[0][0] == "c":
            second.set()
            go_on.wait(20)
        return write_page(self, page, file)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "_write_page", slowly)
        writing = asyncio.ensure_future(output.write(ledger))
        assert await asyncio.to_thread(second.wait, 20)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        go_on.set()
    with fsspec.open(output.address, "rb") as file:
        assert file.read() == before
    assert await output.write(ledger) == 4
    assert "://" in place or [one.name for one in tmp_path.glob("*out*")] == [place]


async def test_no_error_of_a_library_shows_a_secret(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: object, local: str, address: str, *_: Any, **__: Any) -> Any:
        raise ValueError(address)

    output = Output("memory://user:hunter2@x/out.jsonl")
    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with pytest.raises(ExportError, match="cannot be written: ValueError") as caught:
        await output.write(ledger)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


class Place(BaseModel):
    """A type with a field for each kind of column. Its aliases name no columns."""

    model_config = ConfigDict(serialize_by_alias=True)

    city: str
    people: int = Field(alias="People")
    area: float | None = None
    capital: bool = False
    founded: date | None = None
    seen: datetime | None = Field(default=None, serialization_alias="Seen")
    kind: Literal["town", "village"] = "town"
    tags: list[str] = []


async def test_parquet_has_a_column_for_each_field_of_the_type(ledger: Ledger, tmp_path: Path):
    polars = pytest.importorskip("polars", reason="needs the extra `data`")
    path = tmp_path / "out.parquet"
    output = Output(str(path), output_type=Place)
    await output.write(ledger)
    assert polars.read_parquet(path)["key"].to_list() == []
    await enter(ledger, "a", "b", "c", "d", "e", "f")
    lisbon: dict[str, Any] = {"city": "Lisbon", "area": 100.05, "tags": ["sea"]}
    dates = {"founded": "1147-10-25", "seen": "2026-01-01T12:00:00Z"}
    await end(ledger, "a", data={**lisbon, **dates, "People": 545_000})
    await end(ledger, "b", "failed")
    await end(ledger, "c", data="text")
    await end(ledger, "d", output='{"city": "Sintra", "People": 7}')
    await end(ledger, "e", output='{"city": "Trantor", "People": 9223372036854775808}')
    await end(ledger, "f", data={"people": "many"})  # it was judged by another type
    await output.write(ledger)
    frame = polars.read_parquet(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert frame["key"].to_list() == ["a", "b", "c", "d", "e", "f"]
    assert json.loads(frame["inputs"][0]) == {"topic": "a"}
    assert frame["error"].to_list() == [None, "the engine is down", None, None, None, None]
    assert json.loads(frame["data"][2]) == "text"
    assert [json.loads(frame["data"][at])["people"] for at in (0, 4, 5)] == [545_000, 2**63, "many"]
    assert frame["data_people"].to_list() == [545_000, None, None, 7, None, None]
    first = {name: frame[f"data_{name}"][0] for name in Place.model_fields}
    dates = {"founded": date(1147, 10, 25), "seen": datetime(2026, 1, 1, 12, tzinfo=UTC)}
    own = {"people": 545_000, "tags": '["sea"]', "capital": False, "kind": "town"}
    assert first == {**lisbon, **dates, **own}
    assert frame["data_founded"].dtype == polars.Date
    assert frame["seconds"].dtype == polars.Float64


def test_parquet_without_its_extra_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    with pytest.raises(ConfigurationError, match=r"needs polars: pip install 'prefect-crew\[data\]'.*Nothing was"):
        Output(str(tmp_path / "out.parquet"))


ENDINGS = r"\.jsonl or \.ndjson, also compressed: .*\.jsonl\.gz.*\.parquet.*Nothing"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((name, ENDINGS) for name in ("out.csv", "out", "out.jsonl.zst", "out.parquet.gz", "s3://bucket/out.json")),
        *((address, "Nothing was started") for address in ("nonsense://x/out.jsonl", "https://example.com/out.jsonl")),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(name: str, problem: str):
    with pytest.raises(ConfigurationError, match=problem):
        Output(name)


@pytest.mark.parametrize("name", ["out.JSONL", "out.ndjson.gz", "out.jsonl.xz", "memory://b/out.jsonl.bz2?x=1", "o.pq"])
def test_endings_that_are_known(name: str):
    Output(name)
