"""What is written, and how: no token, nothing that steers a terminal, one JSON document whatever the encoding."""

from __future__ import annotations

import html
import io
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from urllib.parse import quote

import pytest

from prefect_crew.cli import _output
from prefect_crew.client.redaction import MASK
from prefect_crew.exceptions import ConfigurationError, CrewError


@pytest.fixture(autouse=True)
def _own_invocation() -> Iterator[None]:
    _output.begin()
    yield
    _output.begin()


@pytest.mark.parametrize("token", ["token-1234", 'to"ken\\1234'], ids=["plain", "with-signs-that-json-escapes"])
def test_a_token_is_written_nowhere(capsys: pytest.CaptureFixture[str], token: str):
    _output.current.hide(token)
    _output.put(f"with {token}")
    _output.note(f"with {token}")
    _output.put_markdown(f"# with {token}")
    _output.put_rows(["A"], [[token]])
    _output.put_json({"said": f"with {token}"})
    out, err = capsys.readouterr()
    assert token not in out + err
    assert json.dumps(token)[1:-1] not in out + err
    assert out.count(MASK) == 4


def test_a_token_is_found_as_it_stands_in_an_address_or_on_a_page():
    _output.current.hide("pa/ss&word+1")
    for text in (quote("pa/ss&word+1"), quote("pa/ss&word+1", safe=""), html.escape("pa/ss&word+1")):
        assert _output.redact(f"?token={text}") == f"?token={MASK}"


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
