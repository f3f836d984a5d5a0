"""The rules of a test run, as conftest.py says them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import alive

TESTS = Path(__file__).parent
LEAVES_A_PROCESS = """
import os, signal, sys
from support.processes import Process

def test_it(tmp_path):
    process = Process([sys.executable, "-c", "import time; time.sleep(300)"], log=tmp_path / "log")
    print("child", process.pid, file=sys.stderr, flush=True)
    os.kill(os.getpid(), {signal})
"""
FAIL_ONCE = """
import pytest
from support.waiting import TooLateError

tried = set()

def is_first(name):
    is_first = name not in tried
    tried.add(name)
    return is_first

def test_assertion():
    assert not is_first("assertion")

def test_late():
    if is_first("late"):
        raise TooLateError("it comes: not within the limit")

def test_assertion_before_a_late_end():
    try:
        assert not is_first("both")
    finally:
        if is_first("end"):
            raise TooLateError("it ends: not within the limit")
"""


def run_of_its_own(folder: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    conftest = (TESTS / "conftest.py").read_text().replace("ENDING = 10.0", "ENDING = 0.5")
    (folder / "conftest.py").write_text(conftest)
    for path in (folder / "test_it.py", folder / "proof" / "test_promise.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    own = ["-p", "no:cacheprovider", "--rootdir", str(folder), "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", *own, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.programs
@pytest.mark.parametrize(
    ("signal_number", "exit_code"),
    [(signal.SIGTERM, pytest.ExitCode.INTERRUPTED), (0, pytest.ExitCode.TESTS_FAILED)],
    ids=["terminated", "forgotten-by-a-test"],
)
def test_a_run_leaves_no_process_behind(tmp_path: Path, signal_number: int, exit_code: int):
    code = LEAVES_A_PROCESS.format(signal=signal_number)
    run = run_of_its_own(tmp_path, code, "-s", str(tmp_path / "test_it.py"))
    assert run.returncode == exit_code, run.stdout + run.stderr
    assert "PROCESSES LEFT BEHIND" in run.stdout
    assert not alive(int(run.stderr.partition("child ")[2].split()[0]))


def test_a_promise_is_tried_again_only_where_something_came_too_late(tmp_path: Path):
    run = run_of_its_own(tmp_path, FAIL_ONCE, "--reruns=1", "--import-mode=importlib", str(tmp_path))
    assert run.stdout.count(" failed first: ") == 4, run.stdout + run.stderr
    assert "proof/test_promise.py::test_late failed first: support.waiting.TooLateError: it comes" in run.stdout
    for name in ("test_assertion", "test_assertion_before_a_late_end"):
        assert f"proof/test_promise.py::{name}" in run.stdout.partition("short test summary")[2]
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
