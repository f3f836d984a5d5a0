"""Pages of Markdown, cut into code blocks with the directives before them; CONTRIBUTING.md says what those mean."""

import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

RUNS = frozenset({"python", "bash", "console"})
SHOWN = frozenset({"text", "mermaid", "diff", "http", "csv", "ini"})
PAGE_WORDS = frozenset({"needs", "after"})
RUN_WORDS = frozenset({"crew", "spec", "url", "token", "background", "exit", "raises", "speed"})

_FENCED = re.compile(r"^( *)(`{3,}) *([^\s`]*)[^\n]*\n(.*?)^ *\2`*\s*$", re.DOTALL | re.MULTILINE)
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
    """One page; `words` are those of its own directive."""

    name: str
    blocks: list[Block]
    words: dict[str, str]


def read_page(root: Path, path: Path) -> Page:
    """Read one page."""
    name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    page, directives = Page(name, [], {}), dict[str, str]()
    end = 0
    for part in _PART.finditer(text):
        where = f"{name}:{text.count(chr(10), 0, part.start()) + 1}"
        if directives and text[end : part.start()].strip():
            raise DocsError(f"{where}: the directive {[*directives][-1]!r} has no code block right after it")
        end = part.end()
        _, fence, language, code, directive, words = part.groups()
        if fence:
            page.blocks.append(_block(where, language, textwrap.dedent(code), directives))
            directives = {}
        elif directive == "page":
            page.words.update(_words(where, words, PAGE_WORDS))
        else:
            directives[directive] = " ".join((words or "").split())
    if directives or re.search(r"^ *```", _PART.sub("", text), re.MULTILINE):
        raise DocsError(f"{name}: a directive has no code block after it, or a code block has no end")
    return page


def groups_of(pages: Iterable[Page]) -> list[list[Page]]:
    """Return pages that one reader does one after the other, in that order: each right after the one it is `after`."""
    known = {page.name: page for page in pages}

    def group(page: Page) -> Iterator[Page]:
        yield page
        for follower in known.values():
            if f"docs/{follower.words.get('after')}" == page.name:
                yield from group(follower)

    groups = [list(group(page)) for page in known.values() if "after" not in page.words]
    lost = set(known) - {page.name for group in groups for page in group}
    assert not lost, f"{lost} are after pages that do not exist"
    return groups


def _words(where: str, text: str, known: frozenset[str]) -> dict[str, str]:
    words = {name: value for name, _, value in (word.partition("=") for word in shlex.split(text))}
    if unknown := set(words) - known:
        raise DocsError(f"{where}: {', '.join(sorted(unknown))} is none of {', '.join(sorted(known))}")
    return words


def _block(where: str, language: str, code: str, directives: dict[str, str]) -> Block:
    if language not in RUNS | SHOWN | {"yaml"}:
        raise DocsError(f"{where}: the language {language!r} is none of {sorted(RUNS | SHOWN)}; plain text is `text`")
    run = _words(where, directives.pop("run", ""), RUN_WORDS)
    if len(directives) > 1 or (directives and run and "file" not in directives):
        raise DocsError(f"{where}: {' and '.join([*directives, *(['run'] if run else [])])} cannot stand together")
    if "" in (directives.get("file"), directives.get("not run")):
        raise DocsError(f"{where}: `file` wants a name, and `not run` a reason")
    if language == "yaml":
        try:
            list(yaml.safe_load_all(code))
        except yaml.YAMLError as error:
            raise DocsError(f"{where}: this is no yaml: {error}") from error
    return Block(where, language, code, run, directives.get("file"), "output" in directives, directives.get("not run"))


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them of plain headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(_FENCED, "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links_of(text: str) -> list[str]:
    """Return where the links and pictures of a page's text lead."""
    plain = re.sub(r"`[^`\n]*`", "", re.sub(_FENCED, "", text))
    return re.findall(r"\]\(([^)\s]+)\)", plain) + re.findall(r"(?:src|href)=\"([^\"]+)\"", plain)


def matches(expected: str, actual: str) -> bool:
    """Whether a program's output is what a page shows: the same lines, but for `…`.

    A line that is only `…` stands for any number of lines, `…` within a line for any text. Trailing blanks, empty
    lines at both ends, and colours do not count.
    """
    parts: list[str] = []
    for line in textwrap.dedent(expected).strip("\n").splitlines():
        text = ".*?".join(map(re.escape, line.rstrip().split("…"))) + r" *\n"
        parts.append(r"(?:.*\n)*?" if line.strip() == "…" else text)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", actual).replace("\r", "").strip("\n")
    return re.fullmatch("".join(parts), "".join(f"{line.rstrip()}\n" for line in plain.splitlines())) is not None
