"""A process that a test leaves behind makes the run fail."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import alive

RUN_OF_ITS_OWN = """
import os, signal, sys
from support.processes import Process

def test_it(tmp_path):
    process = Process([sys.executable, "-c", "import time; time.sleep(300)"], log=tmp_path / "log")
    print("child", process.pid, file=sys.stderr, flush=True)
    os.kill(os.getpid(), {signal})
"""


@pytest.mark.programs
@pytest.mark.parametrize(
    ("signal_number", "exit_code"),
    [(signal.SIGTERM, pytest.ExitCode.INTERRUPTED), (0, pytest.ExitCode.TESTS_FAILED)],
    ids=["terminated", "forgotten-by-a-test"],
)
def test_a_run_leaves_no_process_behind(tmp_path: Path, signal_number: int, exit_code: int):
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(RUN_OF_ITS_OWN.format(signal=signal_number))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    options = ["-s", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", *options, tmp_path]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == exit_code, run.stdout + run.stderr
    assert "PROCESSES LEFT BEHIND" in run.stdout
    assert not alive(int(run.stderr.partition("child ")[2].split()[0]))
