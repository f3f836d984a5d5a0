"""Find sentences and names that a reader has to read twice: `make lint` runs it, CONTRIBUTING.md says how to write.

    python .ci/words.py                    every file of README.md, CONTRIBUTING.md, docs/ and prefect_crew/
    python .ci/words.py prefect_crew/cli   the files of a folder
    python .ci/words.py --count            the number of words of each page of docs/

It prints each hit as file:line, and returns 1 if there is a hit, or if the pages have more than MOST words.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("README.md", "CONTRIBUTING.md", "docs", "prefect_crew")

MOST = 30_000
"""Words of all pages of the site, without the parts that are made from the code."""

NAMES = frozenset({"found", "given", "known", "one", "said", "told"})
"""Names of variables, parameters, attributes and functions: participles without a noun."""

_CLAUSE = re.compile(
    r"""(?<![\w"“\[])(?:
        (?:What|Whatever|Who|Whose|Which|Whichever)\b
      | One\ (?:that|who|which|whose|with|without|is|has|was)\b
      | Those\ (?:that|who|which|whose|of|with|without|in|on|for|it|not|are|were|have|had)\b
      | That\ (?:which|what|of)\b
      | (?<=[:;]\ )(?:what|whatever|who|whose|whoever|one\ (?:that|who|which|whose)|those\ (?:that|who|which|whose))\b
    )[^.!?]*(?P<end>\??)""",
    re.VERBOSE,
)
"""A sentence whose subject is a relative clause or a bare pronoun; a question is none."""

_WORDS = {
    "buy, purchase": (r"buys?|bought|buying|purchas\w+", "start, kick off"),
    "dear": (r"dear(?:er)?", "it costs"),
    "run key": (r"run key", "idempotency key"),
    "verdict": (r"verdicts?", "resolution"),
    "settle, mend": (r"settl(?:e|es|ed|ing)|mend(?:s|ed|ing)?", "resolve"),
    "found again": (r"found again", "reattach"),
    "round": (r"rounds?(?! trips?\b| number| up\b| down\b| robin\b)", "question"),
    "feedback request": (r"feedback requests?", "question"),
    "adopt": (r"adopt(?:s|ed|ing|ion)?", "take over"),
    "orphan": (r"orphan(?:s|ed)?", "take over, or: no flow run waits for it"),
    "set aside": (r"set(?:s|ting)? aside", "skip"),
    "reserve": (r"reserv(?:e|es|ed(?! names?)|ing|ation|ations)", "estimate"),
    "patience": (r"patien(?:ce|t)", "timeout"),
    "beside": (r"beside", "concurrent, at the same time"),
    "meanwhile": (r"(?<!in the )meanwhile", "in the background, since then"),
    "in turn": (r"(?:in|take|takes|by) turns?", "one after the other"),
    "dialect": (r"dialects?", "response format"),
    "whoever": (r"whoever|whomever", "name the actor"),
    "tells": (r"tells", "reports, returns, has"),
    "as of": (r"as of", "since, in, like"),
    "is away": (r"(?:is|was|are|were) away", "cannot be reached"),
    "all the same": (r"all the same", "anyway"),
    "anew": (r"anew", "again"),
    "at the most": (r"at the most", "at most"),
    "belongs into": (r"belongs? into", "belongs in"),
}
"""What to look for, by the word that is reported: a pattern, and the words to write in its place."""

_GROUPS = "|".join(f"(?P<w{number}>{pattern})" for number, (pattern, _) in enumerate(_WORDS.values()))
_WORD = re.compile(rf"(?<![\w-])(?:{_GROUPS})(?![\w-])", re.IGNORECASE)
_FENCE = re.compile(r"^( *)(`{3,})(\w*)[^\n]*\n(.*?)^ *\2 *$", re.DOTALL | re.MULTILINE)
_NOT_COUNTED = re.compile(r"<!-- generated:.*?<!-- end of generated -->|<!--.*?-->", re.DOTALL)
_UNREAD = re.compile(
    r"""\{\{.*?\}\} | ``[^\n]+?`` | `[^`\n]+` | \]\([^)\s]*\)
      | ^\#+[ ][^\n]*$ | ^\|[^\n]*\n(?=\|[ ]*-{3})""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
"""Parts of Markdown that are no sentences: templates, code, targets of links, headings, heads of tables."""


@dataclass(frozen=True, order=True)
class Hit:
    """A place to mend."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def hits_in(path: str, text: str) -> list[Hit]:
    """Return the hits of a file, in the order of its lines.

    Args:
        path: The file's name, for the hits; by its ending the text is Python or Markdown.
        text: The content of the file.
    """
    check = _hits_in_python if path.endswith(".py") else _hits_in_markdown
    return sorted({Hit(path, line, message) for line, message in check(text)})


def _hits_in_markdown(text: str) -> Iterator[tuple[int, str]]:
    for block in _FENCE.finditer(text):
        if block[3] == "python":
            yield from _hits_in_names(block[4], _line(text, block.start(4)) - 1, len(block[1]))
    yield from _hits_in_prose(_FENCE.sub(_blank, _NOT_COUNTED.sub(_blank, text)), 1)


def _hits_in_python(text: str) -> Iterator[tuple[int, str]]:
    yield from _hits_in_names(text, 0, 0)
    for line, prose in [*_comments(text), *_strings(ast.parse(text))]:
        yield from _hits_in_prose(prose, line)


def _hits_in_prose(text: str, first_line: int) -> Iterator[tuple[int, str]]:
    text = _UNREAD.sub(_blank, text)
    for match in _CLAUSE.finditer(text):
        if not match["end"]:
            words = " ".join(match[0].split()[:4])
            yield first_line + _line(text, match.start()) - 1, f'"{words} …": a sentence has a noun for its subject'
    reports = list(_WORDS.items())
    for match in _WORD.finditer(text):
        word, (_, better) = reports[int((match.lastgroup or "w0")[1:])]
        yield first_line + _line(text, match.start()) - 1, f'"{" ".join(match[0].split())}" ({word}): say {better}'


def _hits_in_names(code: str, lines_before: int, indent: int) -> Iterator[tuple[int, str]]:
    try:
        tree = ast.parse(re.sub(rf"^ {{{indent}}}", "", code, flags=re.MULTILINE))
    except SyntaxError:  # a part of a program, in a page
        return
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                pass
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                pass
            case ast.MatchAs(name=str(name)) | ast.ExceptHandler(name=str(name)):
                pass
            case _:
                continue
        if name.lstrip("_") in NAMES:
            yield lines_before + node.lineno, f"the name `{name}`: a variable is a noun, and a function a verb"


def _comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield each comment; those on lines that follow each other are read as one."""
    first, lines = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        alone = not token.line[: token.start[1]].strip()
        if lines and alone and token.start[0] == first + len(lines):
            lines.append(token.string.lstrip("# "))
            continue
        if lines:
            yield first, "\n".join(lines)
        first, lines = token.start[0], [token.string.lstrip("# ")]
    if lines:
        yield first, "\n".join(lines)


def _strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each string that may be a sentence, with `{}` for the values in it."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        else:
            continue
        if " " in text:
            yield node.lineno, text


def _blank(match: re.Match[str]) -> str:
    """Return the same number of lines and characters, without words."""
    return re.sub(r"[^\n]", "_", match[0])


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def words_of(text: str) -> int:
    """Return the number of words of a page, without generated parts and comments."""
    return len(_NOT_COUNTED.sub("", text).split())


def files_of(place: str) -> Iterator[Path]:
    """Yield the files of Python and Markdown of a folder, or the file itself."""
    path = ROOT / place
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    yield from (file for file in files if file.suffix in {".py", ".md"})


def main(arguments: list[str]) -> int:
    """Print the hits, and return 1 if there are any."""
    places = [argument for argument in arguments if argument != "--count"]
    hits, words, report = list[Hit](), 0, list[str]()
    for file in [file for place in places or PLACES for file in files_of(place)]:
        path = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else str(file)
        text = file.read_text(encoding="utf-8")
        hits += hits_in(path, text)
        if path.startswith("docs/") and path.endswith(".md"):
            words += words_of(text)
            if "--count" in arguments:
                report.append(f"{words_of(text):6,} {path}")
    report += [str(hit) for hit in hits]
    if words > MOST:
        report.append(f"docs/ has too many words, {words - MOST:,} of them: cut facts that another page has")
    report.append(f"{len(hits) or 'No'} hits of words; the pages of docs/ have {words:,} words, of {MOST:,}")
    sys.stdout.write("\n".join(report) + "\n")
    return 1 if hits or words > MOST else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
