"""The Markdown of a run: what is ours is markup, what comes from outside is text."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from prefect_crew.artifacts.escape import OUTPUT_CAP, cell, code, commands, fenced, link, prose, table
from prefect_crew.artifacts.run import RunView, render_run
from prefect_crew.client.models import CrewStatus, TaskResult, TokenUsage
from prefect_crew.states import CrewState

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
# Renderers differ in which links they refuse: this one refuses none.
MARKDOWN.validateLink = lambda url: True  # type: ignore[method-assign]
DANGEROUS = ("html_block", "html_inline", "image")

# What changes where code, quotations, lists and HTML begin and end.
PIECES = [
    "`", "``", "```", "````", "~~~", "\n", "\n\n", "\r", "\u2028", "\u00a0", " ", "   ", "    ", "\t", "- ", "> ",
    "1. ", "* ", "\\", "|", "| - |\n", "&", "#", "---\n", "===\n", "text", "a b", "[a]", "(b)", "![a](b)", "!", "[",
    "]", "]: ", "](", "]:", ")", "javascript:x", "[a](javascript:x)", "[a](<javascript:x>)", "java&#x73;cript:x",
    "javascript\\:x", "JavaScript&colon;x", "[a]:\n", "[b](/c:d)", "https://x.test", "data:x", " 'title'",
    "<img src=x onerror=y>", "<script>", "</b>", "<!--", "-->", "<?x", "<![CDATA[", "<http://x.test>", "<a@b.test>",
    "<div>\n", "*", "_", "\u202e", "```\n", "~~~\n", "``` a`b\n",
]  # fmt: skip
MARKUP = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text()


def flat(tokens: list[Token]) -> list[Token]:
    return [each for token in tokens for each in (token, *flat(token.children or []))]


def parsed(markdown: str) -> list[Token]:
    return flat(MARKDOWN.parse(markdown))


def targets(tokens: list[Token]) -> list[str]:
    """Return where the links among some tokens lead."""
    return [str(token.attrs["href"]) for token in tokens if token.type == "link_open"]


def view(state: CrewState = CrewState.COMPLETED, *, show: str = "full", **fields: Any) -> RunView:
    status = CrewStatus(kickoff_id="r1", state=state, **fields)
    return RunView(crew="travel", kickoff_id="r1", idempotency_key="k", state=state, status=status, show=show)


def text_of(markdown: str) -> str:
    """Return what a reader sees of the words."""
    return "".join(token.content for token in parsed(markdown) if token.type in ("text", "text_special", "code_inline"))


# What comes from outside


@given(MARKUP)
@example("`a\n<img src=x>`")
@example("- ```\n  a\n  ```\n<img src=x>")
@example("``` a`b\n<img src=x>")
@example("| `a | <img src=x>` |\n| - | - |")
@example("a ` b\n`<img src=x>`")
@example("  ```\na\n```\n<img src=x>")
@example("```\na\n~~~\n<img src=x>\n```\n![a](b)")
@example("!![a](b)")
@example("[a](x`) <img src=x> `b")
@example("[a](x '`') <img src=x> `b")
@example("[a]: x`y\n`<img src=x>`")
@example("[a](javascript:x)")
@example("[a]( java&#x73;cript\\:x 'title')")
@example("[a]\n\n[a]: JavaScript:x")
@example("[a]\n\n[a]:\njavascript:x")
@example("[`a](javascript:x)")
@example("[a](<javascript:x>)")
@example("[a](<\u2060javascript:x>)")
@example("[a]: <javascript:x>\n\n[a]")
@example("| [a](javascript:x) | `b |\n| - | - |")
def test_a_result_is_harmless_and_stands_last(output: str):
    tasks = [TaskResult(name="plan", agent="Planner", execution_time=1.0)]
    markdown, ours = (render_run(view(output=text, tasks=tasks)) for text in (output, ""))
    assert markdown.startswith(ours.rstrip("\n"))
    tokens = parsed(markdown)
    assert not {token.type for token in tokens} & {*DANGEROUS}
    schemes = [re.match(r"([a-z][a-z0-9+.-]*):", target, re.IGNORECASE) for target in targets(tokens)]
    assert {scheme[1].lower() for scheme in schemes if scheme} <= {"http", "https", "mailto"}


def test_honest_links_stay():
    output = "[a](https://x.test/a_(b)) [b](/c:d) [c](#e) [f](mailto:g@x.test) [h][i]\n\n[i]: http://x.test\n"
    links = targets(parsed(render_run(view(output=output))))
    assert links == ["https://x.test/a_(b)", "/c:d", "#e", "mailto:g@x.test", "http://x.test"]
    for target in ("https://example.com/?" + "x" * 3000, "/" + "y" * 3000, "a%20" + "z" * 3000):
        assert f"]({target})" in render_run(view(output=f"[read this]({target})"))


@pytest.mark.parametrize(
    "target",
    [
        "&Tab;" * 70 + "javascript:alert(1)",
        "javascript" + "&NewLine;" * 40 + ":alert(1)",
        "a" * 1000 + ":alert(1)",
        "javascript" + "&Tab;" * 57 + "&colon;alert(1)" + "x" * 1000,
        "javascript&#" + "0" * 6 + "58;alert(1)" + "x" * 1000,
        "&#" + "9" * 5000 + ";",
        "\\" * 400 + "javascript:alert(1)",
    ],
    ids=lambda target: target[-30:],
)
def test_a_long_target_hides_no_scheme(target: str):
    assert targets(parsed(render_run(view(output=f"[read this]({target})")))) == []


@given(MARKUP)
def test_an_error_is_one_block_of_text(error: str):
    tokens = parsed(render_run(view(CrewState.FAILED, error=error)))
    (fence,) = [token for token in tokens if token.type == "fence"]
    assert "table_open" in [token.type for token in tokens[tokens.index(fence) :]], "the facts come after it, whole"
    assert not {token.type for token in tokens} & {*DANGEROUS}


@given(MARKUP, MARKUP)
def test_a_table_keeps_its_rows_and_cells(name: str, value: str):
    tokens = parsed(table(("Name", "Value"), [[cell(name), cell(value)], [code(name), code(value)]]))
    assert [token.type for token in tokens].count("tr_open") == 3
    assert [token.type for token in tokens].count("td_open") == 4
    assert not {token.type for token in tokens} & {*DANGEROUS, "em_open", "strong_open", "link_open"}


@given(MARKUP)
def test_prose_is_words_on_a_line(text: str):
    tokens = parsed(f"about {prose(text)}")
    assert {token.type for token in tokens} <= {"paragraph_open", "inline", "text", "text_special", "paragraph_close"}


@given(st.text(alphabet="aZ9 \\`*_[]()~#!$<>&|-+.:;'\"{}/@€語", min_size=1, max_size=60).filter(str.strip))
def test_a_reader_sees_the_words_that_were_given(text: str):
    assert text_of(f"about {prose(text)}") == f"about {' '.join(text.split())}"


@pytest.mark.parametrize("char", "\u202d\u202e")
def test_no_character_turns_the_direction(char: str):
    other = "שלום \u200fעולם, 世界, \u2067مرحبا\u2069 🎉"
    markdown = render_run(view(output=f"a {char} b {other}", message=f"{char}", tasks=[TaskResult(name=char)]))
    assert char not in markdown
    assert f"[U+{ord(char):04X}]" in markdown
    assert other in markdown


# A result that people read


def test_code_shows_its_angle_brackets():
    output = "Use `List<int>` here:\n\n```html\n<b>bold</b>\n```\n\nand not <b>there</b>."
    tokens = parsed(render_run(view(output=output)))
    assert "List<\u2060int>" in [token.content for token in tokens if token.type == "code_inline"], "as it is seen"
    assert "<b>bold</b>\n" in [token.content for token in tokens if token.type == "fence"]
    words = "".join(token.content for token in tokens if token.type == "text")
    assert "<b>there</b>" in words.replace("\u2060", "")


def test_open_fences_close_and_images_become_links():
    assert render_run(view(output="```python\nx = 1")).endswith("x = 1\n```\n")
    assert render_run(view(output="~~~~\nx = 1\n```")).endswith("x = 1\n```\n~~~~\n")
    tokens = parsed(render_run(view(output="![a tram](https://x.test/tram.png) and `![code]`")))
    assert targets(tokens) == ["https://x.test/tram.png"]
    assert "!\u2060[code]" in [token.content for token in tokens if token.type == "code_inline"]


def test_a_long_result_is_cut():
    cut = dataclasses.replace(view(output="x" * (OUTPUT_CAP + 1)), read_result="prefect-crew result k")
    markdown = render_run(cut)
    assert "The first 60,000 of 60,001 characters. The whole text:\n\n```bash\nprefect-crew result k\n```" in markdown
    assert len(markdown) < OUTPUT_CAP + 1000
    assert "The first" not in render_run(view(output="x" * OUTPUT_CAP))


@given(MARKUP)
def test_a_command_is_one_line_of_code(text: str):
    (token,) = parsed(commands(f"prefect-crew result {shlex.quote(text)}"))
    assert token.type == "fence"
    assert token.info == "bash"
    assert token.content.count("\n") == 1
    assert token.content.startswith("prefect-crew result ")


@given(MARKUP, MARKUP)
def test_a_link_keeps_its_target(text: str, rest: str):
    shown = link(f"x{text}", f"https://x.test/{rest}")
    (target,) = targets(parsed(f"| a |\n| --- |\n| {shown} |"))
    assert target.startswith("https://x.test/")


# What is shown, and how much


LISBON = "# Lisbon\n\n- **bold** `x < y` and a < b\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n> said\n"
TASKS = [
    TaskResult(name="research", agent="Researcher", execution_time=90.0),
    TaskResult(name="write", agent="Writer", execution_time=30.0),
    TaskResult(name="untimed"),
]
USAGE = TokenUsage(total_tokens=1234, prompt_tokens=0)


FAILED = view(CrewState.FAILED, error="no search engine")
WHY = {"failed_task": "write", "attempt": "attempt 2 of at most 3", "advice": "Retry the flow run."}
PAGES = {
    "completed": view(output=LISBON, current_task="plan", tasks=TASKS, usage=USAGE),
    "running": view(CrewState.RUNNING, current_task="plan", message="half way", execution_time=7300.0),
    "failed": dataclasses.replace(FAILED, **WHY),
    "failed, summary": dataclasses.replace(FAILED, show="summary", **WHY),
    "failed, none": dataclasses.replace(FAILED, show="none", **WHY),
}


def test_pages_are_golden():
    golden = (Path(__file__).parents[1] / "golden" / "run_pages.md").read_text(encoding="utf-8")
    assert "".join(f"<!-- {name} -->\n\n{render_run(page)}\n" for name, page in PAGES.items()) == golden


def test_long_lines_of_errors_break_at_words():
    text = "Run 1 failed: " + "a word and " * 30 + "https://example.com/" + "x" * 200 + "\n\n    indented line"
    block = fenced(text).splitlines()
    assert block[0] == "```text"
    assert block[-1] == "```"
    assert all(len(line) <= 90 or "x" * 200 in line for line in block)
    assert " ".join(" ".join(block[1:-1]).split()) == " ".join(text.split())
    assert block[-2] == "    indented line"
    assert block[-3] == ""
