"""README.md, docs/ and examples/README.md are true: every code block in them is run, as CONTRIBUTING.md says.

A page is done from top to bottom as a reader would do it: in one folder (a copy of the clone, so that its examples can
be named), one terminal and one Python, against a Prefect server of its own. A page `after` another one is done right
after it, with the same folder and Prefect server, a new terminal and a new Python, while all that was started runs on.
Links are checked too. One page, with those after it: pytest tests/test_docs.py -k batches
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

import prefect_crew.client
import prefect_crew.devserver
import prefect_crew.exceptions
import prefect_crew.testing
from support.docs import (
    SHOWN,
    Block,
    DocsError,
    Page,
    anchors_of,
    check_data,
    groups_of,
    matches,
    read_page,
    strip_code,
)
from support.prefect_server import PrefectServer, connected
from support.processes import Process

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _groups() -> list[object]:
    pages: list[Page] = []
    for path in PATHS:
        # A page that cannot be read fails as a test of its own, below, not as an error of collection.
        with contextlib.suppress(DocsError):
            pages.append(read_page(ROOT, path))
    return [
        pytest.param(group, id=" ".join(page.name for page in group), marks=[pytest.mark.slow] if group[0].slow else [])
        for group in groups_of(pages)
        if any(block.language not in SHOWN for page in group for block in page.blocks)
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pages", _groups())
def test_pages_are_true(pages: list[Page], tmp_path: Path, prefect_template: Path | None):
    for module in {module for page in pages for module in page.needs}:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs the extra `{module}`")
    assert len({page.slow for page in pages}) == 1, "of pages that are done together, all are slow, or none is"
    folder, home = tmp_path / "clone", tmp_path / "prefect-home"
    for made in (folder, home):
        made.mkdir()
    copy_clone(ROOT, folder)
    # Of the pages' own: their idempotency keys, blocks and deployments must not meet those of others.
    server = PrefectServer(tmp_path / "prefect", template=prefect_template)
    with contextlib.ExitStack() as running:

        def start_server() -> PrefectServer:
            if not server.running:  # only for a page that runs something
                running.enter_context(server)
            return server

        def start_crew(name: str, spec: str, speed: float) -> tuple[str, str]:
            from prefect_crew.devserver import CrewServer

            crew = running.enter_context(CrewServer(spec, speed=speed))
            with connected(start_server(), home):
                crew.crew().save(name, overwrite=True)
            return crew.url, crew.token

        for number, page in enumerate(pages):
            scratch = tmp_path / f"scratch-{number}"
            scratch.mkdir()
            run = PageRun(folder, scratch, environment=lambda: start_server().env(home=home), start_crew=start_crew)
            running.enter_context(run)
            for block in page.blocks:
                run.do(block)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_can_be_read_and_its_links_lead_somewhere(path: Path):
    read_page(ROOT, path)
    text = strip_code(path.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    missing = [target for target in targets if not re.match(r"[a-z]+:", target) and not _exists(path, target)]
    assert not missing


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_text_before_a_file_names_it(path: Path):
    # The site has the name as the block's title. Plain Markdown has not: a reader would not know where to save it.
    paragraphs = re.split(r"\n\n+", path.read_text(encoding="utf-8"))
    for before, paragraph in pairwise(paragraphs):
        if found := re.match(r"<!-- file: (\S+) -->", paragraph):
            assert f"`{found[1]}`" in before


def _exists(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    if not file.exists():
        return False
    return not anchor or anchor in anchors_of(file.read_text(encoding="utf-8"))


def test_tables_of_prefect_that_a_block_reads_are_wide_enough():
    """On 80 columns Prefect cuts names off, so that a loop which looks for one would never end."""
    lines = [line for path in PATHS for line in path.read_text(encoding="utf-8").splitlines()]
    read = [line for line in lines if re.search(r"prefect (\S+) ls .*\| grep", line)]
    assert read
    assert all("COLUMNS=" in line for line in read), read


def test_the_reference_has_all_public_names():
    reference = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^(?:::: |\[\]\(\)\{#)(prefect_crew[\w.]*)", reference, re.MULTILINE))
    for module in (prefect_crew, prefect_crew.client, prefect_crew.testing, prefect_crew.devserver):
        names = set(module.__all__) - set(prefect_crew.exceptions.__all__)
        assert not names - {path.rpartition(".")[2] for path in shown}, module.__name__
    pages = "".join(path.read_text(encoding="utf-8") for path in PATHS)
    linked = set(re.findall(r"\]\[(prefect_crew[\w.]*)\]", pages))
    assert not {name for name in linked if name not in shown and name.rpartition(".")[0] not in shown}


def test_troubleshooting_quotes_messages_of_the_package():
    said = " ".join(
        node.value
        for path in (ROOT / "prefect_crew").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    quoted = {quote for cell in cells for quote in re.findall(r'"([^"]+)"', cell)} - {"database is locked"}  # Prefect's
    assert len(quoted) > 25
    assert not {quote for quote in quoted if quote not in said}


def test_the_table_of_versions_is_that_of_the_pins():
    def pins(name: str) -> dict[str, str]:
        text = (ROOT / name).read_text(encoding="utf-8")
        return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))

    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    page = (ROOT / "docs" / "reference" / "versions.md").read_text(encoding="utf-8")
    rows = {row[0]: row for row in (line.strip("| ").split(" | ") for line in page.splitlines() if line[:2] == "| ")}
    assert rows["Prefect, client and server"][-1] == f"{oldest['prefect']}, {newest['prefect']}"
    (crewai,) = [row for name, row in rows.items() if name.startswith("CrewAI")]
    assert crewai[-1] == newest["crewai"]
    assert rows["polars, with `prefect-crew[data]`"][-1] == f"{oldest['polars']}, {newest['polars']}"


def test_links_of_the_readme_work_outside_of_the_repository():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    plain = hatch_build.readme_for_index(readme, "", "1.0")
    assert set(re.findall(r"\]\(([^)]+)\)", plain)) == {"https://www.prefect.io"}
    assert "<!--" not in plain
    linked = hatch_build.readme_for_index(readme, "https://example.com/me/it/", "1.0")
    targets = set(re.findall(r"\]\(([^)]+)\)", linked))
    assert "https://example.com/me/it/raw/v1.0/docs/images/artifact.png" in targets
    assert "https://example.com/me/it/blob/v1.0/docs/tutorial.md" in targets
    assert not {target for target in targets if not target.startswith("https://")}


def test_the_readme_names_a_prefect_server_before_its_first_script():
    # Else Prefect starts a temporary one for the script, into whose output that server's own errors go.
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "PREFECT_API_URL" in text.partition("```python")[0]


def test_blocks_that_are_not_run_are_listed(notes: list[str]):
    blocks = [block for path in PATHS for block in read_page(ROOT, path).blocks]
    skipped = [block for block in blocks if block.not_run is not None]
    notes.append(f"docs: {sum(block.runs for block in blocks)} code blocks run, {len(skipped)} marked `not run`")
    notes.extend(f"    {block.where}: {block.not_run}" for block in skipped)
    assert len(skipped) <= len(blocks) / 4, "so many that the documentation is no longer tested by running it"


# The reader of pages itself

EVERYTHING = """
# A page

<!-- file: greet.py -->
```python
WORD = "hello"
```

```python
from greet import WORD
print(WORD, "world")
print("in 0.25 s")
```

<!-- output -->
```text
hello world
in … s
```

<!-- run: raises=ZeroDivisionError -->
```python
1 / 0
```

```bash
export PLACE=Lisbon
mkdir there && cd there
```

```console
$ echo "$PLACE" \\
> again
Lisbon again
$ basename "$PWD"
there
```

<!-- run: crew=travel url=https://mine token=TOKEN -->
```console
$ echo https://mine TOKEN | tr a-z A-Z
HTTP://TRAVEL/TRAVEL/1 SECRET
$ echo https://mine TOKEN
https://mine TOKEN
```

<!-- run: exit=3 -->
```bash
exit 3
```

<!-- run: background=ready -->
```bash
echo ready
sleep 300
```

<!-- not run: because -->
```bash
exit 1
```
"""


def _run(tmp_path: Path, text: str) -> list[Block]:
    path = tmp_path / "page.md"
    path.write_text(text)
    page = read_page(tmp_path, path)
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()

    def start(name: str, spec: str, speed: float) -> tuple[str, str]:
        return f"http://{name}/{spec}/{speed:g}", "secret"

    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with PageRun(folder, scratch, environment=lambda: environment, start_crew=start) as run:
        for block in page.blocks:
            run.do(block)
    return page.blocks


def test_every_directive_does_what_it_says(tmp_path: Path):
    blocks = _run(tmp_path, EVERYTHING)
    assert [block.not_run for block in blocks if block.not_run] == ["because"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("```python\nprint(1 / 0)\n```\n", r"page\.md:1.*ZeroDivisionError", id="failing-python"),
        pytest.param("```bash\nfalse\ntrue\n```\n", r"(?s)got 1.*failed here: false", id="failing-line"),
        pytest.param("```console\n$ echo one\ntwo\n```\n", r"(?s)does not print.*one", id="other-output"),
        pytest.param("```bash\npip install x\n```\n", "pip is not run", id="installer"),
        pytest.param("<!-- run: raises=KeyError -->\n```python\n1\n```\n", "expected KeyError", id="raises-nothing"),
        pytest.param("```yaml\na: [\n```\n", "no yaml", id="broken-yaml"),
        pytest.param("```\nx\n```\n", "language", id="no-language"),
        pytest.param("<!-- output -->\nText.\n\n```text\n1\n```\n", "has no code block", id="directive-before-text"),
    ],
)
def test_what_is_not_true_is_found(tmp_path: Path, text: str, message: str):
    with pytest.raises(DocsError) as caught:
        _run(tmp_path, text)
    assert re.search(message, str(caught.value))


# A page, done as a reader would

INTERPRETER = Path(__file__).with_name("support") / "interpreter.py"

FORBIDDEN = re.compile(r"^(apt|apt-get|brew|docker|npm|pip|pipx|uv|uvx|make) ", re.MULTILINE)
"""Programs that a page's block must not run in a test: they fetch, install or build."""

CrewStarter = Callable[[str, str, float], tuple[str, str]]
"""Starts a crew server for a page and saves its block: (block name, spec, speed) to (url, token)."""


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

    def __exit__(self, *_: object) -> None:
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
        return {
            **self._environment_of(),
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
        if self._python is None:
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
        if found := FORBIDDEN.search(code):
            raise DocsError(
                f"{block.where}: {found[1]} is not run by the tests: give this block the directive `not run`"
            )
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
