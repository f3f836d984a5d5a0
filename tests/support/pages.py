"""One page of the documentation, done as a reader would: in one folder, one terminal and one Python."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

from support.docs import Block, DocsError, check_data, matches
from support.environment import BIN
from support.processes import Process

__all__ = ["CrewStarter", "PageRun", "copy_clone"]

INTERPRETER = Path(__file__).with_name("interpreter.py")

FORBIDDEN = ("apt", "apt-get", "brew", "docker", "npm", "pip", "pipx", "uv", "uvx")
"""Programs that a page's block must not run in a test: they fetch or install."""


class CrewStarter(Protocol):
    """Starts a crew server for a page and saves its block: (block name, spec, speed) to (url, token)."""

    def __call__(self, name: str, spec: str, speed: float, /) -> tuple[str, str]: ...


def copy_clone(root: Path, target: Path) -> None:
    """Copy what git knows, or would add, of the clone, but for its tests: pages name files by their paths in it."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, text=True
    )
    for name in filter(None, listed.split("\0")):
        source = root / name
        if source.is_file() and not name.startswith("tests/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


class PageRun:
    """Runs the blocks of one page in order; a context manager, at whose end all that was started is ended.

    Args:
        folder: A copy of the clone: the reader's current folder.
        scratch: Another folder, for logs and scripts.
        environment: Gives the whole environment of the reader's terminal; called when the first block runs.
        start_crew: Starts a crew server for `crew=`.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        *,
        environment: Callable[[], Mapping[str, str]],
        start_crew: CrewStarter,
    ) -> None:
        self.folder = folder
        self._scratch = scratch
        self._environment_of = environment
        self._start_crew = start_crew
        self._replace: dict[str, str] = {}
        self._processes: list[Process] = []
        self._python: Process | None = None
        self._count = 0
        self._output = ""

    def __enter__(self) -> PageRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.stop(grace=5.0)

    def do(self, block: Block) -> None:
        """Run one block, write its file, or check what it shows.

        Raises:
            DocsError: It is not true.
        """
        if block.not_run is not None:
            return
        self._set_up(block)
        code = self._translated(block.code)
        if block.output:
            self._check_output(block)
        elif block.file is not None:
            check_data(block)
            target = (self.folder / block.file).resolve()
            if not target.is_relative_to(self.folder.resolve()):
                raise DocsError(f"{block.where}: {block.file} is not within the page's folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(code, encoding="utf-8")
        elif block.language == "python":
            self._run_python(block, code)
        elif block.language == "bash":
            self._run_bash(block, code)
        elif block.language == "console":
            self._run_console(block)
        else:
            check_data(block)

    def _set_up(self, block: Block) -> None:
        if name := block.run.get("crew"):
            spec = block.run.get("spec", name)
            local = self.folder / spec
            speed = float(block.run.get("speed", "1"))
            url, token = self._start_crew(name, str(local) if local.exists() else spec, speed)
            for word, real in (("url", url), ("token", token)):
                if written := block.run.get(word):
                    if written not in block.code:
                        raise DocsError(f"{block.where}: {written!r}, which `run:` names, is not in this block")
                    self._replace[written] = real

    def _translated(self, code: str) -> str:
        for written, real in self._replace.items():
            code = code.replace(written, real)
        return code

    def _end_of(self, output: str) -> str:
        """Return the end of some output, as a page would have it, for a message."""
        return self._as_written(output)[-3000:]

    def _as_written(self, output: str) -> str:
        for written, real in self._replace.items():
            output = output.replace(real, written)
        return output

    def _environment(self) -> dict[str, str]:
        bin_folder = self._scratch / "bin"
        if not bin_folder.exists():
            _write_programs(bin_folder)
        given = dict(self._environment_of())
        return {
            **given,
            "PATH": f"{bin_folder}:{given['PATH']}",
            "COLUMNS": "120",
            "NO_COLOR": "1",
            "TERM": "dumb",
            "PYTHONUNBUFFERED": "1",
        }

    def _check_output(self, block: Block) -> None:
        if not matches(block.code, self._as_written(self._output)):
            raise DocsError(
                f"{block.where}: the block before it does not print this, but:\n{self._end_of(self._output)}"
            )

    # Python

    def _run_python(self, block: Block, code: str) -> None:
        if self._python is None or "fresh" in block.run:
            self._python = self._start([sys.executable, "-u", INTERPRETER], stdin=True)
        self._count += 1
        script = self._scratch / f"block_{self._count}.py"
        # Line numbers of a traceback are those of the page.
        script.write_text("\n" * _line(block) + code, encoding="utf-8")
        end = uuid.uuid4().hex
        before = len(self._python.output)
        assert self._python.popen.stdin is not None
        order = json.dumps({"file": str(script), "end": end})
        self._python.popen.stdin.write(f"{order}\n".encode())
        self._python.popen.stdin.flush()
        output = self._python.wait_for(f"{end} ", _timeout(block))[before:]
        shown, _, said = output.partition(f"\n{end} ")
        self._output = shown
        said = said.split("\n")[0]
        wanted = block.run.get("raises", "ok")
        if said != wanted:
            raise DocsError(f"{block.where}: expected {wanted}, but it was {said}:\n{self._end_of(shown)}")

    # The terminal

    def _run_bash(self, block: Block, code: str) -> None:
        self._count += 1
        state, cwd = self._scratch / "state.sh", self._scratch / "cwd"
        script = self._scratch / f"block_{self._count}.sh"
        script.write_text(
            # What a reader exports, and the folder that they go to, hold for the rest of the page.
            f"[ -f '{state}' ] && . '{state}'\n[ -f '{cwd}' ] && cd \"$(cat '{cwd}')\"\n"
            "set -eu -o pipefail\n"
            "trap 'echo \"failed here: $BASH_COMMAND\" >&2' ERR\n"
            f"{code}\n"
            f"export -p > '{state}'; pwd > '{cwd}'\n",
            encoding="utf-8",
        )
        process = self._start(["bash", script])
        if text := block.run.get("background"):
            self._output = process.wait_for(text, _timeout(block))
            return
        ended = process.wait(_timeout(block))
        self._output = process.output
        wanted = int(block.run.get("exit", "0"))
        if ended != wanted:
            raise DocsError(f"{block.where}: expected exit code {wanted}, got {ended}:\n{self._end_of(process.output)}")

    def _run_console(self, block: Block) -> None:
        commands = _commands(block)
        for position, (command, shown) in enumerate(commands):
            run = dict(block.run)
            if position < len(commands) - 1:
                run.pop("exit", None)  # it is that of the last command
            one = Block(block.where, "bash", command, run)
            self._run_bash(one, self._translated(command))
            if shown and not matches(shown, self._as_written(self._output)):
                raise DocsError(
                    f"{block.where}: `{command.strip()}` does not print what is shown, but:\n"
                    f"{self._end_of(self._output)}"
                )

    def _start(self, command: list[str | Path], *, stdin: bool = False) -> Process:
        log = self._scratch / f"{len(self._processes)}.log"
        process = Process(command, log=log, env=self._environment(), cwd=self.folder, stdin=stdin)
        self._processes.append(process)
        return process


def _line(block: Block) -> int:
    return int(block.where.rpartition(":")[2])


def _timeout(block: Block) -> float:
    return float(block.run.get("timeout", "60"))


def _commands(block: Block) -> list[tuple[str, str]]:
    """Cut a console block into commands, after `$ ` and continued after `> `, each with what is shown below it."""
    commands: list[tuple[str, str]] = []
    for line in block.code.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:] + "\n", ""))
        elif not commands:
            raise DocsError(f"{block.where}: a console block begins with `$ ` and a command")
        elif line.startswith("> ") and not commands[-1][1]:
            commands[-1] = (commands[-1][0] + line[2:] + "\n", "")
        else:
            commands[-1] = (commands[-1][0], commands[-1][1] + line + "\n")
    return [(command, shown if shown.strip() else "") for command, shown in commands]


def _write_programs(folder: Path) -> None:
    """Write what a reader's `make` and installers are in a test: this environment, and a refusal."""
    folder.mkdir()
    make = shutil.which("make") or "make"
    # -o: the environment is as it is, and is not built again for the copy of the clone.
    programs = {"make": f'exec {make} VENV={BIN.parent} -o {BIN.parent}/.core -o {BIN.parent}/.tests "$@"'}
    for name in FORBIDDEN:
        programs[name] = f'echo "{name} is not run by the tests: give this block the directive `not run`" >&2; exit 97'
    for name, body in programs.items():
        path = folder / name
        with contextlib.suppress(FileExistsError):
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
