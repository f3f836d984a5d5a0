"""Inputs and tokens given on the command line and in files."""

from __future__ import annotations

import io
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.cli import _options
from prefect_crew.cli._options import CrewAccess, gather_inputs
from prefect_crew.exceptions import ConfigurationError


def test_pairs_are_laid_over_the_file_and_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"topic": "tea", "size": "big"}'))
    assert gather_inputs(["size=small"], "-") == {"topic": "tea", "size": "small"}


def test_standard_input_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"who: J\xe9r\xf4me"), encoding="utf-8"))
    with pytest.raises(ConfigurationError, match="inputs in - cannot be read"):
        gather_inputs([], "-")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param('\ufeff{"topic": "tea", "n": 3}'.encode(), {"topic": "tea", "n": 3}, id="json-with-a-mark"),
        pytest.param(b"topic: tea\nday: 2026-05-01\n", {"topic": "tea", "day": date(2026, 5, 1)}, id="yaml"),
        pytest.param(b'{"topic":\t"tea"}', {"topic": "tea"}, id="json-called-yaml"),
        pytest.param(b"[topic, tea]", "holds no inputs", id="no-object"),
        pytest.param(b"a: b: c: [", "neither JSON nor YAML", id="no-yaml"),
        pytest.param(b"", "holds no inputs", id="empty"),
        pytest.param(b"\xff\xfe\x00", "'utf-8' codec can't decode", id="binary"),
        pytest.param(b"n: .nan", "'n'", id="not-a-number"),
        pytest.param(None, "No such file", id="missing"),
    ],
)
def test_file(tmp_path: Path, content: bytes | None, expected: str | dict[str, Any]):
    file = tmp_path / "in.yaml"
    if content is not None:
        file.write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(ConfigurationError, match=expected):
            gather_inputs([], str(file))
    else:
        assert gather_inputs([], str(file)) == expected


def test_where_a_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "token").write_text("from-the-file\n")
    monkeypatch.setenv("CREW_TOKEN", "from-the-env")
    url = "https://x.test"
    for access, token in (
        (CrewAccess(token="from-the-line", token_file=tmp_path / "token"), "from-the-line"),
        (CrewAccess(token="from-the-env", token_file=tmp_path / "token"), "from-the-file"),
        (CrewAccess(token="from-the-env"), "from-the-env"),
    ):
        assert access.read_token(url) == token
        assert ("Other users of this machine can see --token" in capsys.readouterr().err) is (token == "from-the-line")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(_options, "getpass", lambda _: "typed ")
    assert CrewAccess().read_token(url) == "typed"
    monkeypatch.setattr(_options, "getpass", lambda _: "")
    assert CrewAccess().read_token(url) == "typed", "nobody is asked twice"
    with pytest.raises(ConfigurationError, match="set CREW_TOKEN, or give --token-file"):
        CrewAccess().read_token("https://another.test")
