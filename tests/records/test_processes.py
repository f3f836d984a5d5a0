"""Whether a process that was named earlier is known to be gone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from prefect_crew.records.owners import process_is_gone, this_process

NAMES_ITSELF = "from prefect_crew.records.owners import this_process; print(this_process(), flush=True); input()"


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process, and its name."""
    process = subprocess.Popen(
        [sys.executable, "-c", NAMES_ITSELF], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        yield process, process.stdout.readline().strip()
        process.kill()


def test_this_process_is_there():
    name = this_process()
    assert name is not None
    assert name == this_process()
    assert not process_is_gone(name)


def test_a_killed_process_is_gone_also_before_its_parent_has_noticed(other: tuple[subprocess.Popen[str], str]):
    process, name = other
    assert name != this_process()
    assert not process_is_gone(name)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still listed
    assert process_is_gone(name)
    process.wait()
    assert process_is_gone(name)


def test_a_process_id_that_is_used_again_is_another_process():
    name = this_process()
    assert name is not None
    where, pid, *_ = name.split(" ")
    assert process_is_gone(f"{where} {pid} 1")


@pytest.mark.parametrize("name", ["", "elsewhere/boot/pid:[1] 999999999 1", "nonsense", "x y z"])
def test_of_another_machine_and_of_nonsense_nothing_is_known(name: str):
    assert not process_is_gone(name)
