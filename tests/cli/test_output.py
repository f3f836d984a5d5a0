"""What a command reads and writes: inputs, tokens, tables, and progress as lines and as it is drawn."""

import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefect_crew.batches.report import BatchReport
from prefect_crew.blocks import DeployedCrew, crew_of
from prefect_crew.cli import _output
from prefect_crew.cli._options import gather_inputs
from prefect_crew.cli._output import Progress
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewStatus
from prefect_crew.client.redaction import MASK
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.runs.request import RunOptions, RunRequest
from prefect_crew.runs.run import LiveRun
from prefect_crew.states import CrewState


@pytest.fixture(autouse=True)
def _own_invocation() -> Iterator[None]:
    _output.begin()
    yield
    _output.begin()


# Inputs and tokens


def test_pairs_are_laid_over_the_file_and_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"topic": "tea", "size": "big"}'))
    assert gather_inputs(["size=small"], "-") == {"topic": "tea", "size": "small"}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"who: J\xe9r\xf4me"), encoding="utf-8"))
    with pytest.raises(ConfigurationError, match="inputs in - cannot be read"):
        gather_inputs([], "-")


@pytest.mark.parametrize(
    ("content", "inputs"),
    [
        pytest.param('\ufeff{"topic": "tea", "n": 3}'.encode(), {"topic": "tea", "n": 3}, id="json-with-a-mark"),
        pytest.param(b"topic: tea\nday: 2026-05-01\n", {"topic": "tea", "day": date(2026, 5, 1)}, id="yaml"),
        pytest.param(b'{"topic":\t"tea"}', {"topic": "tea"}, id="json-called-yaml"),
    ],
)
def test_a_file_of_inputs(tmp_path: Path, content: bytes, inputs: dict[str, Any]):
    (tmp_path / "in.yaml").write_bytes(content)
    assert gather_inputs([], str(tmp_path / "in.yaml")) == inputs


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(b"[topic, tea]", "holds no inputs", id="no-object"),
        pytest.param(b"a: b: c: [", "neither JSON nor YAML", id="no-yaml"),
        pytest.param(b"", "holds no inputs", id="empty"),
        pytest.param(b"\xff\xfe\x00", "'utf-8' codec can't decode", id="binary"),
        pytest.param(None, "No such file", id="missing"),
    ],
)
def test_a_file_without_inputs_is_refused(tmp_path: Path, content: bytes | None, problem: str):
    if content is not None:
        (tmp_path / "in.yaml").write_bytes(content)
    with pytest.raises(ConfigurationError, match=problem):
        gather_inputs([], str(tmp_path / "in.yaml"))


# What is written


@pytest.mark.parametrize("token", ["token-1234", 'to"ken\\1234'], ids=["plain", "with-signs-that-json-escapes"])
def test_a_token_is_written_nowhere(capsys: pytest.CaptureFixture[str], token: str):
    _output.current.hide(token)
    _output.put(f"with {token}")
    _output.note(f"with {token}")
    _output.put_markdown(f"# with {token}")
    _output.put_rows(["A"], [[token]])
    _output.put_json({"text": f"with {token}"})
    out, err = capsys.readouterr()
    assert token not in out + err
    assert json.dumps(token)[1:-1] not in out + err
    assert out.count(MASK) == 4


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("value", [{"a": "grüße 🙂"}, {"a": "lone \ud800 surrogate"}], ids=["emoji", "surrogate"])
def test_json_is_json_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, value: dict[str, Any]):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace"))
    _output.put_json(value)
    sys.stdout.flush()
    assert json.loads(raw.getvalue().decode(encoding)) == value


def test_a_file_gets_text_as_it_is_and_tables_with_tabs(capsys: pytest.CaptureFixture[str]):
    _output.put_markdown("# raw \x1b[31m text")
    _output.put_rows(["Input", "Needed"], [["topic", "required\nlater"]])
    assert capsys.readouterr().out == "# raw \x1b[31m text\nInput\tNeeded\ntopic\trequired later\n"


@pytest.mark.parametrize(("typed", "code"), [("y\n", None), ("n\n", 1), ("\n", 1), ("", 1)])
def test_a_person_confirms_or_nothing_is_done(monkeypatch: pytest.MonkeyPatch, typed: str, code: int | None):
    monkeypatch.setattr("sys.stdin", terminal := io.StringIO(typed))
    with pytest.raises(ConfigurationError, match="needs --yes"):
        _output.confirm("Go on?", yes=False)
    _output.confirm("Go on?", yes=True)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with nullcontext() if code is None else pytest.raises(CrewError, match="Nothing was changed"):
        _output.confirm("Go on?", yes=False)


@pytest.mark.parametrize(
    ("key", "widest"),
    [
        pytest.param("8f0e5c1d-9d47-4a6b-8f0e-5c1d2a7b9e64", 80, id="fits"),
        pytest.param("8f0e5c1d-9d47-4a6b-8f0e-5c1d2a7b9e64/127.0.0.1:8123/a66405200addd68f388066a/1", 130, id="long"),
    ],
)
def test_a_table_keeps_its_keys_whole(capsys: Any, monkeypatch: pytest.MonkeyPatch, key: str, widest: int):
    monkeypatch.setattr(_output, "is_terminal", lambda _: True)
    monkeypatch.setenv("COLUMNS", "80")
    _output.put_rows(["State", "Key", "Error"], [["in-flight", key, "a long text of many words " * 9]])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= widest
    assert key in out, "to be copied"
    assert "words" in out
    assert not {"\x1b", "…"} & set(out), "nothing is cut off"


# Progress


def status(state: CrewState = CrewState.RUNNING, task: str | None = None, **facts: Any) -> CrewStatus:
    return CrewStatus(kickoff_id="k1", state=state, current_task=task, **facts)


def run(kickoff_id: str = "k1", *, owned: bool = True, **fields: Any) -> LiveRun:
    block: Any = DeployedCrew.model_validate({"url": "https://travel.example.com", "token": "token-1", **fields})
    crew = crew_of(block).called("travel")
    request = RunRequest.of(crew, Inputs.of({"who": "Ada Lovelace"}), RunOptions())
    return LiveRun(crew, kickoff_id, request=request, owned=owned)


def batch(phase: Any, completed: int = 0, failed: int = 0) -> BatchReport:
    return BatchReport(name="[red]leads[/red]\x1b[2J", phase=phase, total=1_200, completed=completed, failed=failed)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120, highlight=False, markup=False, emoji=False)
    monkeypatch.setattr(_output, "console", lambda **_: console)
    monkeypatch.setattr(_output, "is_terminal", lambda _: True)
    return written


def test_only_what_changes_is_a_line(capsys: pytest.CaptureFixture[str]):
    progress = Progress()
    for reported in (
        None,
        status(task="look", total_tasks=3, completed_tasks=0),
        status(task="look", total_tasks=3, completed_tasks=0),
        status(task="write", total_tasks=3, completed_tasks=1),
        status(CrewState.WAITING, task="write", total_tasks=3),
        status(CrewState.WAITING, task="write", total_tasks=3),
        status(CrewState.COMPLETED),
    ):
        progress.watch(run(), reported)
    progress.watch(run("k2", owned=False), status(task="a", progress=0.25))
    progress.watch(run("k2", owned=False), status(CrewState.FAILED))
    assert re.sub(r"\d+\.\d s", "0.0 s", capsys.readouterr().err) == (
        "Crew travel: kicked off run k1\n"
        "Crew travel: look (0 of 3 tasks done)\n"
        "Crew travel: write (1 of 3 tasks done)\n"
        "Crew travel: waits for a person\n"
        "Crew travel: completed after 0.0 s\n"
        "Crew travel: found run k2\n"
        "Crew travel: a (25%)\n"
        "Crew travel: failed after 0.0 s\n"
    )


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        pytest.param({"secret_inputs": ["who"]}, "ask ********", id="secret-input"),
        pytest.param({"show": "none"}, "kicked off", id="show-none"),
    ],
)
def test_what_may_not_be_shown_is_not(capsys: pytest.CaptureFixture[str], fields: dict[str, Any], shown: str):
    Progress().watch(run(**fields), status(task="ask Ada Lovelace"))
    err = capsys.readouterr().err
    assert "Ada" not in err
    assert shown in err


def test_a_crews_text_neither_styles_nor_steers(screen: io.StringIO):
    progress = Progress()
    progress.watch(run(), status(task="[bold]x[/bold]\x1b[2J", total_tasks=2))
    progress.watch_batch(batch("running", completed=600))
    progress.watch_batch(batch("running", completed=601))
    progress.watch_batch(batch("done", completed=1_193, failed=7))
    drawn = screen.getvalue()
    assert "[bold]x[/bold]" in drawn
    assert "[red]leads[/red]" in drawn
    assert "\x1b[2J" not in drawn
    assert "600 of 1,200 rows" in drawn
    assert "601 of 1,200 rows" not in drawn, "a line each 10 s"
    assert "1,200 of 1,200 rows · 7 failed" in drawn.splitlines()[-1]
