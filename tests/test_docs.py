"""README.md, docs/ and examples/README.md are true: every code block in them is run.

A page is done from top to bottom as a reader would do it: in one folder (a copy of the clone, so that its examples can
be named), one terminal and one Python, against a Prefect server of its own. Every fenced block names its language:

- `python` runs as a script; the blocks of a page share one namespace, `__main__`, so imports stand in the first.
- `bash` runs in one shell; `export` and `cd` hold for later blocks, the first failing command ends it.
- `console` holds commands after `$ ` (continued after `> `) and what they print. It is compared, but for `…`: alone on
  a line it stands for any lines, within a line for any text. No output shown, none compared.
- `yaml`, `json`, `jsonl`, `toml` must be well-formed. `text`, `mermaid`, `diff`, `http`, `csv`, `ini` are only shown.

`prefect-crew`, `prefect`, `python`, `pytest` and `make` are those of the tests' environment; pip, uv, apt-get, docker
and the like refuse. HTML comments before a block, invisible on the page, change that:

    <!-- run: crew=travel -->
        Start a crew server and save it as the block `travel` before this block runs; both are there for the rest of the
        page. The crew is the package's script of that name, or spec=…: a YAML file of the page (written by `file:`) or
        of the clone, or module:factory. speed=4 divides the seconds of a script by four.
    <!-- run: crew=travel url=https://travel.example.com token=YOUR_TOKEN -->
        The same, and what this block calls its URL and token is replaced by the real ones, from here on.
    <!-- run: background="Listening" -->
        Leave the commands running until the page's end, and go on once they have written that.
    <!-- run: raises=CrewFailedError -->    The Python block must raise it.
    <!-- run: exit=4 -->                    The (last) command must end with this code.
    <!-- run: fresh -->                     A new Python for this block and the following ones.
    <!-- run: timeout=120 -->               Seconds that it may take, instead of 60.
    <!-- file: flows/mine.py -->
        Write the block to this file of the page's folder instead of running it.
    <!-- output -->
        The block is what the one before it printed, compared as in `console`.
    <!-- not run: why -->
        Neither run nor checked; counted and listed at the end of the test run.
    <!-- page: slow needs=crewai -->
        Anywhere on the page: it is a slow test; it is skipped without that module.

Words of `run:` can stand together. Relative links are checked too. One page: pytest tests/test_docs.py -k batches
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from pathlib import Path

import pytest

from support.docs import Block, DocsError, Page, matches, read_page, strip_code
from support.pages import PageRun, copy_clone
from support.prefect_server import PrefectServer, connected

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _parameters() -> list[object]:
    parameters: list[object] = []
    for path in PATHS:
        # A page that cannot be read fails as a test of its own, below, not as an error of collection.
        with contextlib.suppress(DocsError):
            page = read_page(ROOT, path)
            marks = [pytest.mark.slow] if page.slow else []
            parameters.append(pytest.param(page, id=page.name, marks=marks))
    return parameters


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", _parameters())
def test_page_is_true(page: Page, tmp_path: Path, prefect_template: Path | None):
    for module in page.needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs the extra `{module}`")
    folder, scratch, home = tmp_path / "clone", tmp_path / "scratch", tmp_path / "prefect-home"
    for made in (folder, scratch, home):
        made.mkdir()
    copy_clone(ROOT, folder)
    # Of the page's own: its idempotency keys, blocks and deployments must not meet those of other pages.
    server = PrefectServer(tmp_path / "prefect", template=prefect_template)
    with contextlib.ExitStack() as running:

        def start_server() -> PrefectServer:
            if not server.running:  # only a page that runs something pays for it
                running.enter_context(server)
            return server

        def start_crew(name: str, spec: str, speed: float) -> tuple[str, str]:
            from prefect_crew.devserver import CrewServer

            crew = running.enter_context(CrewServer(spec, speed=speed))
            with connected(start_server(), home):
                crew.crew().save(name, overwrite=True)
            return crew.url, crew.token

        run = PageRun(folder, scratch, environment=lambda: start_server().env(home=home), start_crew=start_crew)
        running.enter_context(run)
        for block in page.blocks:
            run.do(block)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_can_be_read_and_its_links_lead_somewhere(path: Path):
    read_page(ROOT, path)
    text = strip_code(path.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    files = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [file for file in files if file and not (path.parent / file).exists()]
    assert not missing


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
    import os

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


def test_url_and_token_of_a_crew_are_replaced_there_and_back(tmp_path: Path):
    _run(
        tmp_path,
        "<!-- run: crew=travel url=https://mine token=TOKEN -->\n```console\n$ echo https://mine TOKEN | tr a-z A-Z\n"
        "HTTP://TRAVEL/TRAVEL/1 SECRET\n$ echo https://mine TOKEN\nhttps://mine TOKEN\n```\n",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("```python\nprint(1 / 0)\n```\n", r"page\.md:1.*ZeroDivisionError", id="failing-python"),
        pytest.param("```python\n\n1 / 0\n```\n", r"line 3, in <module>", id="traceback-has-the-line-of-the-page"),
        pytest.param("```bash\nfalse\ntrue\n```\n", r"(?s)got 1.*failed here: false", id="failing-line"),
        pytest.param("```console\n$ echo one\ntwo\n```\n", r"(?s)does not print.*one", id="other-output"),
        pytest.param("```console\n$ false\n```\n", "got 1", id="failing-command"),
        pytest.param("```bash\npip install x\n```\n", r"(?s)got 97.*not run", id="installer"),
        pytest.param("<!-- run: raises=KeyError -->\n```python\n1\n```\n", "expected KeyError", id="raises-nothing"),
        pytest.param("```yaml\na: [\n```\n", "no yaml", id="broken-yaml"),
        pytest.param("```\nx\n```\n", "language", id="no-language"),
        pytest.param("<!-- not run: -->\n```python\n1\n```\n", "wants a reason", id="no-reason"),
        pytest.param("<!-- run: crw=travel -->\n```python\n1\n```\n", "crw is none of", id="unknown-word"),
        pytest.param("<!-- output -->\nText.\n\n```text\n1\n```\n", "has no code block", id="directive-before-text"),
        pytest.param("<!-- file: ../x.py -->\n```python\n1\n```\n", "not within", id="file-elsewhere"),
        pytest.param("```python\n1\n", "no end", id="open-block"),
    ],
)
def test_what_is_not_true_is_found(tmp_path: Path, text: str, message: str):
    with pytest.raises(DocsError) as caught:
        _run(tmp_path, text)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        pytest.param("a\nb", "a\nb\n", True, id="equal"),
        pytest.param("a\n…\nd", "a\nb\nc\nd\n", True, id="lines-left-out"),
        pytest.param("…\nd", "d\n", True, id="no-line-left-out"),
        pytest.param("in … s", "in 0.3 s  \n", True, id="text-left-out"),
        pytest.param("a", "\x1b[1ma\x1b[0m\n", True, id="colour"),
        pytest.param("a\nb", "a\nx\nb\n", False, id="a-line-more"),
        pytest.param("a.c", "abc\n", False, id="no-pattern"),
        pytest.param("a", "", False, id="nothing"),
    ],
)
def test_matches(expected: str, actual: str, same: bool):
    assert matches(expected, actual) is same
