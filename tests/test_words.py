"""The check of words of `make lint`: sentences and names that a reader has to read twice."""

import subprocess
import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "words.py"


@pytest.fixture(scope="module")
def words() -> SimpleNamespace:
    return SimpleNamespace(**run_path(str(SCRIPT)))


@pytest.mark.parametrize(
    ("file", "text", "lines"),
    [
        ("a.md", "# What a heading says\n\nWhat it costs is\nunknown.\n", [3]),
        ("a.md", "Who pays? What a run costs: see below.", [1]),
        ("a.md", "The run ends. Whoever waits gets it.", [1]),
        ("a.md", "- One that failed is started again.\n- Those of a row are kept.\n- That of a run is not.", [1, 2, 3]),
        ("a.md", "One run is kept. Those runs end. That ends it.", []),
        ("a.md", "| What it is | who |\n| --- | --- |\n| What a run costs | you |\n", [3]),
        ("a.md", "```text\nWhat it is.\n```\n[What it is](adopt.md) `What`\n<!-- What\nit is -->\nadopts", [7]),
        ("a.md", "A worker adopts a run that is\nset aside, as of\nnow.", [1, 2, 2]),
        ("a.md", "A round-trip, a round trip, `rounds`; the round of a review.", [1]),
        ("a.md", "1.\n\n   ```python\n   found = 1\n   ```\n", [4]),
        ("a.py", '"""A module."""\n\n# What\n# it is.\nx = 1  # Those of it.\n', [3, 5]),
        ("a.py", 'def f(given: int) -> str:\n    """Whose it is.\n\n    Which run.\n    """\n', [1, 2, 4]),
        ("a.py", "for one, (said, x) in y:\n    _known = [found for found in (told := x)]\n", [1, 1, 2, 2, 2]),
        ("a.py", 'x = f"What {run} is" + "what is it" + "Which run?" + "Whose"\n', [1]),
        ("a.py", "x.found = given\nstarted = f(known=1)\ndef _told(): pass\n", [1, 3]),
        ("a.py", "match x:\n  case A(b=said): pass\ntry: f()\nexcept E as one: pass\n", [2, 4]),
        ("a.md", "The end: what is left is kept. Two ends; who waits sees both. Ask: who pays?", [1, 1]),
    ],
)  # fmt: skip
def test_hits_of_a_file(words: SimpleNamespace, file: str, text: str, lines: list[int]):
    assert [hit.line for hit in words.hits_in(file, text)] == lines


def test_generated_parts_are_not_read(words: SimpleNamespace):
    text = "One two.\n<!-- generated: x -->\nWhat it is.\n<!-- end of generated -->\n<!-- What -->\nThree."
    assert words.hits_in("docs/a.md", text) == []
    assert words.words_of(text) == 3


def test_hit_names_place_and_better_words(tmp_path: Path):
    (tmp_path / "page.md").write_text("Text.\nA worker adopts it.\n")
    checked = subprocess.run([sys.executable, SCRIPT, tmp_path / "page.md"], capture_output=True, text=True)
    assert checked.returncode == 1
    assert 'page.md:2: "adopts" (adopt): say take over' in checked.stdout
