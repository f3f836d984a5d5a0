"""README.md, docs/ and examples/README.md are true: their code is run, as CONTRIBUTING.md says.

A page is done from top to bottom as a reader would do it: in one folder (a copy of the clone, so that its examples can
be named), one terminal and one Python, against a Prefect server that holds nothing yet. A page `after` another one is
done right after it, with the same folder and what that server holds by then, a new terminal and a new Python, while all
that was started runs on.
Links are checked too. One page, with those after it: pytest tests/test_docs.py -k batches
A page that nobody has touched for ten commits is marked `slow`, but for README and tutorial: `make prove` runs it.
"""

import ast
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from runpy import run_path
from typing import Self

import pytest

import prefect_crew.client
import prefect_crew.devserver
import prefect_crew.exceptions
import prefect_crew.testing
from support.docs import SHOWN, Block, DocsError, Page, anchors_of, groups_of, links_of, matches, read_page
from support.prefect_server import PrefectServer, connected
from support.processes import Process

ROOT = Path(__file__).parents[1]
BLOCK_LIMIT = 300.0  # seconds: a block may start a dozen programs, one after the other
PATHS = [
    *(ROOT / folder / "README.md" for folder in (".", "examples")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _groups() -> list[object]:
    pages: list[Page] = []
    for path in PATHS:
        # A page that cannot be read fails as a test of its own, below, not as an error of collection.
        with contextlib.suppress(DocsError):
            pages.append(read_page(ROOT, path))
    changed = _recently_changed()
    return [
        pytest.param(group, id=" ".join(page.name for page in group), marks=[pytest.mark.slow] * is_slow)
        for group in groups_of(pages)
        if any(block.language not in SHOWN for page in group for block in page.blocks)
        for is_slow in [not any(_is_due(page, changed) for page in group)]
    ]


def _recently_changed() -> set[str]:
    """Return the files of the last ten commits and those not committed, as paths in the clone; none without git."""
    names: set[str] = set()
    for command in ("log -10 --name-only --format=", "ls-files --modified --others --exclude-standard"):
        listed = subprocess.run(["git", *command.split()], cwd=ROOT, capture_output=True, text=True)
        names.update(listed.stdout.splitlines())
    return names


def _is_due(page: Page, changed: set[str]) -> bool:
    """Whether the gate runs a page: a first one, or one that has changed, as a file that it names has."""
    if page.name in {"README.md", "docs/tutorial.md", *changed}:
        return True
    text = text_of(page.name)
    return any(name in text for name in changed if name.startswith(("flows/", "examples/", "deployments/")))


@pytest.fixture(scope="session")
def server_of_pages(tmp_path_factory: pytest.TempPathFactory, prefect_template: Path | None) -> Iterator[PrefectServer]:
    """The pages' own server, not started yet: their blocks, keys and deployments must not meet those of other tests."""
    server = PrefectServer(tmp_path_factory.mktemp("pages"), template=prefect_template)
    yield server
    server.stop()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pages", _groups())
def test_pages_are_true(pages: list[Page], tmp_path: Path, server_of_pages: PrefectServer):
    if any(page.words.get("needs") == "crewai" for page in pages) and importlib.util.find_spec("crewai") is None:
        pytest.skip("needs the extra `crewai`")
    folder, home = tmp_path / "clone", tmp_path / "prefect-home"
    home.mkdir()
    copy_clone(folder)
    if server_of_pages.running:
        server_of_pages.begin_anew()
    with contextlib.ExitStack() as running:

        def environment() -> Mapping[str, str]:
            return server_of_pages.start().env(home=home)  # only for a page that runs something

        def start_crew(name: str, spec: str, speed: float) -> tuple[str, str]:
            environment()
            crew = running.enter_context(prefect_crew.devserver.CrewServer(spec, speed=speed))
            with connected(server_of_pages, home):
                crew.crew().save(name, overwrite=True)
            return crew.url, crew.token

        for number, page in enumerate(pages):
            run = running.enter_context(PageRun(folder, tmp_path / f"scratch-{number}", environment, start_crew))
            for block in page.blocks:
                run.do(block)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_can_be_read_and_its_links_lead_somewhere(path: Path):
    page, text = read_page(ROOT, path), path.read_text(encoding="utf-8")

    def exists(target: str) -> bool:
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        return file.exists() and (not anchor or anchor in anchors_of(file.read_text(encoding="utf-8")))

    assert not [target for target in links_of(text) if not re.match(r"[a-z]+:", target) and not exists(target)]
    # The site has the name as the block's title. Plain Markdown has not: a reader would not know where to save it.
    for block in page.blocks:
        assert not block.file or re.search(rf"`{block.file}`[^\n]*\n(?:.+\n)*\n<!-- file: {block.file} -->", text)
    # On 80 columns Prefect cuts names off, so that a loop which looks for one would never end.
    assert not re.search(r"^(?!.*COLUMNS=).*prefect \S+ ls .*\| grep", text, re.MULTILINE)


def test_the_reference_has_all_public_names():
    reference = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^(?:::: |###? .*\{ #)(prefect_crew[\w.]*)", reference, re.MULTILINE))
    for module in (prefect_crew, prefect_crew.client, prefect_crew.testing, prefect_crew.devserver):
        names = set(module.__all__) - set(prefect_crew.exceptions.__all__)
        assert not names - {path.rpartition(".")[2] for path in shown}, module.__name__
    pages = "".join(path.read_text(encoding="utf-8") for path in PATHS)
    linked = set(re.findall(r"\]\[(prefect_crew[\w.]*)\]", pages))
    assert not {name for name in linked if name not in shown and name.rpartition(".")[0] not in shown}


def test_generated_parts_are_current():
    checked = subprocess.run([sys.executable, ROOT / "docs" / "tables.py", "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_troubleshooting_quotes_messages_of_the_package():
    said = " ".join(
        node.value
        for path in (ROOT / "prefect_crew").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    cells = re.findall(r"^\| (.*?) \|", text_of("docs/troubleshooting.md"), re.MULTILINE)
    quoted = {quote for cell in cells for quote in re.findall(r'"([^"]+)"', cell)}
    of_prefect = {"database is locked", "Timed out while attempting to connect to ephemeral Prefect API server"}
    quoted -= of_prefect
    assert len(quoted) > 25
    assert not {quote for quote in quoted if quote not in said}


def test_the_table_of_versions_is_that_of_the_pins():
    newest, oldest = (
        dict(re.findall(r"^([\w-]+)==([\w.]+)", text_of(f"constraints{name}.txt"), re.MULTILINE))
        for name in ("", "-oldest")
    )
    page = text_of("docs/reference/versions.md")
    rows = {row[0]: row for row in (line.strip("| ").split(" | ") for line in page.splitlines() if line[:2] == "| ")}
    assert rows["Prefect, client and server"][-1] == f"{oldest['prefect']}, {newest['prefect']}"
    (crewai,) = [row for name, row in rows.items() if name.startswith("CrewAI")]
    assert crewai[-1] == newest["crewai"]
    for name, extra in {"polars": "data", "prefect-sqlalchemy": "sql"}.items():
        assert rows[f"{name}, with `prefect-crew[{extra}]`"][-1] == f"{oldest[name]}, {newest[name]}"


def test_links_of_the_readme_work_outside_of_the_repository():
    readme_for_index = run_path(str(ROOT / "hatch_build.py"))["readme_for_index"]
    readme = text_of("README.md")
    plain = readme_for_index(readme, "", "1.0")
    assert set(re.findall(r"\]\(([^)]+)\)", plain)) == {"https://www.prefect.io"}
    assert "<!--" not in plain
    commands = re.findall(r"`prefect-crew docs ([^`]+)`", plain)
    assert {"tutorial", "guides/recover", "changelog"} <= set(commands)
    assert not [page for page in commands if not (ROOT / "docs" / f"{page}.md").exists()]
    linked = readme_for_index(readme, "https://example.com/me/it/", "1.0")
    targets = set(re.findall(r"\]\(([^)]+)\)", linked))
    assert "https://example.com/me/it/raw/v1.0/docs/images/artifact.png" in targets
    assert "https://example.com/me/it/blob/v1.0/docs/tutorial.md" in targets
    assert not {target for target in targets if not target.startswith("https://")}


def test_one_version_is_named_everywhere():
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert re.findall(r"^## (\S+)", text_of("CHANGELOG.md"), re.MULTILINE) == [version]
    assert re.findall(r"^\| ([\d.]+) \|", text_of("SECURITY.md"), re.MULTILINE) == [version.rpartition(".")[0]]
    assert re.findall(r"Version ([\d.]+) works with", text_of("docs/reference/versions.md")) == [version]
    assert re.findall(r"git tag -s v([\d.]+)", text_of("CONTRIBUTING.md")) == [version]


def test_blocks_that_are_not_run_are_listed(notes: list[str]):
    blocks = [block for path in PATHS for block in read_page(ROOT, path).blocks]
    skipped = [block for block in blocks if block.not_run is not None]
    notes.append(f"docs: {sum(block.runs for block in blocks)} code blocks run, {len(skipped)} marked `not run`")
    notes.extend(f"    {block.where}: {block.not_run}" for block in skipped)
    assert len(skipped) <= len(blocks) / 4, "so many that the documentation is no longer tested by running it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint(1 / 0)\n```\n", r"page\.md:1.*ZeroDivisionError"),
        ("```bash\nfalse\ntrue\n```\n", r"(?s)got 1.*failed here: false"),
        ("```console\n$ echo one\ntwo\n```\n", r"(?s)does not print.*one"),
        ("```bash\necho one\n```\n\n<!-- output -->\n```text\ntwo\n```\n", r"(?s)does not print this.*one"),
        ("```bash\npip install x\n```\n", "pip is not run"),
        ("<!-- run: raises=KeyError -->\n```python\n1\n```\n", "expected KeyError"),
        ("<!-- run: crew=a url=x -->\n```bash\necho x\necho y\n```\n\n```bash\n[ $PWD = x ]\n```\n", r"\[ \$PWD = x"),
        ("```yaml\na: [\n```\n", "no yaml"),
        ("```\nx\n```\n", "language"),
        ("<!-- output -->\nText.\n\n```text\n1\n```\n", "has no code block"),
    ],
)
def test_what_is_not_true_is_found(tmp_path: Path, text: str, message: str):
    path = tmp_path / "page.md"
    path.write_text(text)
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    folder.mkdir()

    def read() -> None:
        with PageRun(folder, scratch, lambda: os.environ, lambda *_: ("http://c", "t")) as run:
            for block in read_page(tmp_path, path).blocks:
                run.do(block)

    with pytest.raises(DocsError) as caught:
        read()
    assert re.search(message, str(caught.value))


# A page, done as a reader would

INTERPRETER = Path(__file__).with_name("support") / "interpreter.py"
FORBIDDEN = re.compile(r"^(apt|apt-get|brew|docker|npm|pip|pipx|uv|uvx|make) ", re.MULTILINE)
"""Programs that a page's block must not run in a test: they fetch, install or build."""
TERMINAL = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


def copy_clone(target: Path) -> None:
    """Copy what git knows, or would add, of the clone, but for its tests: pages name files by their paths in it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("tests/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


Environment = Callable[[], Mapping[str, str]]
StartCrew = Callable[[str, str, float], tuple[str, str]]


class PageRun:
    """Runs the blocks of one page in order; a context manager, at whose end all that was started is ended.

    `folder`, a copy of the clone, is the reader's current folder; `scratch` is for logs and scripts. `environment`
    returns the environment of the reader's terminal, once a block runs. `start_crew` starts a crew server for `crew=`
    and saves its block: (block name, spec, speed) to (url, token).
    """

    def __init__(self, folder: Path, scratch: Path, environment: Environment, start_crew: StartCrew) -> None:
        self.folder = folder.resolve()
        self._scratch = scratch
        self._environment = environment
        self._start_crew = start_crew
        self._replace: dict[str, str] = {}
        self._processes: list[Process] = []
        self._python: Process | None = None
        self._output = ""

    def __enter__(self) -> Self:
        self._scratch.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.stop(grace=5.0)

    def do(self, block: Block) -> None:
        """Run one block, write its file, or check what it shows; a `DocsError` if it is not true."""
        if block.not_run is not None:
            return
        if name := block.run.get("crew"):
            spec = block.run.get("spec", name)
            local = self.folder / spec
            served = self._start_crew(name, str(local) if local.exists() else spec, float(block.run.get("speed", 1)))
            words = ("url", "token")
            self._replace |= {block.run[w]: real for w, real in zip(words, served, strict=True) if w in block.run}
        if block.output:
            self._compare(block, "the block before it", block.code)
        elif block.file is not None:
            target = self.folder / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(self._translated(block.code), encoding="utf-8")
        elif block.language == "python":
            self._run_python(block)
        elif block.language == "bash":
            self._run_bash(block, block.code)
        elif block.language == "console":
            commands = _commands(block)
            for number, (command, shown) in enumerate(commands, 1):
                self._run_bash(block, command, is_last=number == len(commands))
                if shown.strip():
                    self._compare(block, f"`{command.strip()}`", shown)

    def _translated(self, code: str) -> str:
        for written, real in self._replace.items():
            code = code.replace(written, real)
        return code

    def _as_written(self, output: str) -> str:
        for written, real in self._replace.items():
            output = output.replace(real, written)
        return output

    def _compare(self, block: Block, what: str, shown: str) -> None:
        output = self._as_written(self._output)
        if not matches(shown, output):
            raise DocsError(f"{block.where}: {what} does not print this, but:\n{output[-3000:]}")

    def _expect(self, block: Block, wanted: str, got: str) -> None:
        if wanted != got:
            output = self._as_written(self._output)[-3000:]
            raise DocsError(f"{block.where}: expected {wanted}, got {got}:\n{output}")

    def _run_python(self, block: Block) -> None:
        if self._python is None:
            self._python = self._start([sys.executable, "-u", INTERPRETER], stdin=True)
        end = uuid.uuid4().hex
        script = self._scratch / f"{end}.py"
        # Line numbers of a traceback are those of the page.
        script.write_text("\n" * int(block.where.rpartition(":")[2]) + self._translated(block.code), encoding="utf-8")
        before = len(self._python.output)
        assert self._python.popen.stdin is not None
        self._python.popen.stdin.write(f"{script} {end}\n".encode())
        self._python.popen.stdin.flush()
        output = self._python.wait_for(f"{end} ", BLOCK_LIMIT)[before:]
        self._output, _, said = output.partition(f"\n{end} ")
        self._expect(block, block.run.get("raises", "ok"), said.split("\n")[0])

    def _run_bash(self, block: Block, code: str, *, is_last: bool = True) -> None:
        if found := FORBIDDEN.search(code):
            raise DocsError(f"{block.where}: {found[1]} is not run by the tests: mark this block `not run`")
        state, cwd, script = (self._scratch / name for name in ("state.sh", "cwd", f"{uuid.uuid4().hex}.sh"))
        script.write_text(
            # What a reader exports, and the folder that they go to, hold for the rest of the page.
            f"[ -f '{state}' ] && . '{state}'\n[ -f '{cwd}' ] && cd \"$(cat '{cwd}')\"\n"
            "set -eu -o pipefail\n"
            "trap 'echo \"failed here: $BASH_COMMAND\" >&2' ERR\n"
            f"{self._translated(code)}\n"
            f"export -p > '{state}'; pwd > '{cwd}'\n",
            encoding="utf-8",
        )
        process = self._start(["bash", script])
        if text := block.run.get("background"):
            self._output = process.wait_for(text)
            return
        ended = process.wait(BLOCK_LIMIT)
        self._output = process.output
        self._expect(block, block.run.get("exit", "0") if is_last else "0", str(ended))

    def _start(self, command: list[str | Path], *, stdin: bool = False) -> Process:
        log = self._scratch / f"{len(self._processes)}.log"
        process = Process(command, log=log, env={**self._environment(), **TERMINAL}, cwd=self.folder, stdin=stdin)
        self._processes.append(process)
        return process


def _commands(block: Block) -> list[tuple[str, str]]:
    """Cut a console block into commands, after `$ ` and continued after `> `, each with what is shown below it."""
    commands: list[tuple[str, str]] = []
    for line in block.code.splitlines():
        command, shown = commands.pop() if commands and not line.startswith("$ ") else ("", "")
        is_command = line.startswith("$ ") or (line.startswith("> ") and not shown)
        commands.append((f"{command}{line[2:]}\n", shown) if is_command else (command, f"{shown}{line}\n"))
    return commands
