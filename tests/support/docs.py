"""Pages of Markdown, cut into code blocks with the directives before them; tests/test_docs.py says what those mean."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

RUNS = frozenset({"python", "bash", "console"})
DATA = frozenset({"yaml", "json", "jsonl", "toml"})
SHOWN = frozenset({"text", "mermaid", "diff", "http", "csv", "ini"})
ALIASES = {"py": "python", "sh": "bash", "shell": "bash", "yml": "yaml"}
WORDS = frozenset({"crew", "spec", "url", "token", "background", "exit", "raises", "timeout", "speed"})
"""What `run:` understands."""

_FENCED = re.compile(r"^( *)(`{3,}|~{3,}) *([^\s`]*)[^\n]*\n(.*?)^ *\2`*\s*$", re.DOTALL | re.MULTILINE)
_DIRECTIVE = re.compile(r"^ *<!--\s*(page|run|file|output|not run)\b\s*(?::(.*?))?\s*-->", re.DOTALL | re.MULTILINE)
_PART = re.compile(f"{_FENCED.pattern}|{_DIRECTIVE.pattern}", re.DOTALL | re.MULTILINE)


class DocsError(Exception):
    """A page that the tests cannot read, or that is not true; the text says where, and what is wrong."""


@dataclass(frozen=True)
class Block:
    """One fenced code block."""

    where: str
    language: str
    code: str
    run: dict[str, str] = field(default_factory=dict[str, str])
    file: str | None = None
    output: bool = False
    not_run: str | None = None

    @property
    def runs(self) -> bool:
        return self.language in RUNS and self.file is None and self.not_run is None and not self.output


@dataclass(frozen=True)
class Page:
    """One page."""

    name: str
    blocks: list[Block]
    slow: bool = False
    needs: tuple[str, ...] = ()
    after: str | None = None


def read_page(root: Path, path: Path) -> Page:
    """Read one page."""
    name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    blocks: list[Block] = []
    pending: list[tuple[str, str]] = []
    page_words: dict[str, str] = {}
    end = 0
    for part in _PART.finditer(text):
        where = f"{name}:{text.count(chr(10), 0, part.start()) + 1}"
        if pending and text[end : part.start()].strip():
            raise DocsError(f"{where}: the directive {pending[-1][0]!r} has no code block right after it")
        end = part.end()
        _, fence, language, code, directive, words = part.groups()
        if fence:
            blocks.append(_block(where, language.lower(), textwrap.dedent(code), pending))
            pending = []
        elif directive == "page":
            page_words.update(_words(where, words, frozenset({"slow", "needs", "after"})))
        else:
            pending.append((directive, " ".join((words or "").split())))
    if re.search(r"^ *(```|~~~)", _PART.sub("", text), re.MULTILINE):
        raise DocsError(f"{name}: a code block has no end")
    if pending:
        raise DocsError(f"{name}: the directive {pending[-1][0]!r} at its end has no code block after it")
    needs = tuple(filter(None, page_words.get("needs", "").split(",")))
    return Page(name, blocks, slow="slow" in page_words, needs=needs, after=page_words.get("after"))


def groups_of(pages: Iterable[Page]) -> list[list[Page]]:
    """Return pages that one reader does one after the other, in that order: each right after the one it is `after`."""
    known = {page.name: page for page in pages}
    followers: dict[str, list[Page]] = {name: [] for name in known}
    for page in known.values():
        if page.after is not None:
            if f"docs/{page.after}" not in known:
                raise DocsError(f"{page.name}: it is after {page.after}, which does not exist")
            followers[f"docs/{page.after}"].append(page)

    def group(page: Page) -> Iterator[Page]:
        yield page
        for follower in followers[page.name]:
            yield from group(follower)

    return [list(group(page)) for page in known.values() if page.after is None]


def _words(where: str, text: str, known: frozenset[str]) -> dict[str, str]:
    words = {word.partition("=")[0]: word.partition("=")[2] for word in shlex.split(text)}
    if unknown := set(words) - known:
        raise DocsError(f"{where}: {', '.join(sorted(unknown))} is none of {', '.join(sorted(known))}")
    return words


def _block(where: str, language: str, code: str, directives: list[tuple[str, str]]) -> Block:
    language = ALIASES.get(language, language)
    if language not in RUNS | DATA | SHOWN:
        known = ", ".join(sorted(RUNS | DATA | SHOWN))
        raise DocsError(f"{where}: the language {language!r} is none of {known}; plain text is `text`")
    run: dict[str, str] = {}
    facts: dict[str, str] = {}
    for kind, text in directives:
        if kind == "run":
            run.update(_words(where, text, WORDS))
        else:
            facts[kind] = text
    for kind, what in (("not run", "a reason"), ("file", "a name")):
        if kind in facts and not facts[kind]:
            raise DocsError(f"{where}: `{kind}` wants {what}")
    if len(facts) > 1 or (facts and run and "file" not in facts):
        raise DocsError(f"{where}: {' and '.join([*facts, *(['run'] if run else [])])} cannot stand together")
    return Block(where, language, code, run, facts.get("file"), "output" in facts, facts.get("not run"))


def check_data(block: Block) -> None:
    """Check that a block is what its language says, without running it."""
    try:
        if block.language == "yaml":
            list(yaml.safe_load_all(block.code))
        elif block.language == "json":
            json.loads(block.code)
        elif block.language == "jsonl":
            for line in filter(str.strip, block.code.splitlines()):
                json.loads(line)
        elif block.language == "toml":
            tomllib.loads(block.code)
        elif block.language == "python":
            compile(block.code, block.where, "exec")
    except (ValueError, SyntaxError, yaml.YAMLError) as error:
        raise DocsError(f"{block.where}: this is no {block.language}: {error}") from error


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them of plain headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(_FENCED, "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def strip_code(text: str) -> str:
    """Return a page's text without its code blocks and inline code, for looking at its links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(_FENCED, "", text))


def matches(expected: str, actual: str) -> bool:
    """Whether a program's output is what a page shows: the same lines, but for `…`.

    A line that is only `…` stands for any number of lines, `…` within a line for any text. Trailing blanks, empty
    lines at both ends, and colours do not count.
    """
    parts: list[str] = []
    for line in textwrap.dedent(expected).strip("\n").splitlines():
        if line.strip() == "…":
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(".*?".join(re.escape(part) for part in line.rstrip().split("…")) + r" *\n")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", actual).replace("\r", "").strip("\n")
    lines = "".join(f"{line.rstrip()}\n" for line in plain.splitlines())
    return re.fullmatch("".join(parts), lines) is not None
