"""Count the Python that the wheel ships, room by room, beside the figures of the layout: `make size` runs it.

A code line is one that is not blank, nor only a comment, nor part of a string that stands alone, such as a docstring.
"""

from __future__ import annotations

import ast
import io
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prefect_crew"
LAYOUT = {
    "__init__.py": 60,
    "flows.py": 250,
    "tasks.py": 220,
    "blocks.py": 280,
    "crew.py": 200,
    "deployments.py": 320,
    "worker.py": 530,
    "store": 1700,
    "runs": 2600,
    "batches": 2200,
    "pipelines": 600,
    "artifacts": 450,
    "client": 1700,
    "receiver": 650,
    "devserver": 1400,
    "cli": 1800,
    "_internal": 250,
    "exceptions.py": 260,
    "budgets.py costs.py": 230,
    "settings.py states.py templates.py testing.py webhooks.py": 500,
}
"""Lines that each room may have; some files are one room."""
MOST_LINES, MOST_CODE = 16_500, 11_000
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def size_of(path: Path) -> Counter[str]:
    """Return the lines and the code lines of a module."""
    text, code = path.read_text(encoding="utf-8"), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return Counter(lines=len(text.splitlines()), code=len(code))


def main() -> None:
    """Print a line for each room, the sums, and what the wheel ships in addition: the files that init copies."""
    room_of = {name: room for room in LAYOUT for name in room.split()}
    sizes: dict[str, Counter[str]] = {room: Counter() for room in LAYOUT}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0]
        sizes.setdefault(room_of.get(name, name), Counter()).update(size_of(path))
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = sum((size_of(ROOT / name) for name in wheel["force-include"] if name.endswith(".py")), Counter[str]())
    rows = [(room, size, LAYOUT.get(room)) for room, size in sizes.items()]
    rows += [(f"all, of at most {MOST_CODE:,} of code", sum(sizes.values(), Counter[str]()), MOST_LINES)]
    print(f"{'':57} {'code':>6} {'lines':>6} {'layout':>6}")
    for room, size, most in [*rows, ("the files that init copies", copied, None)]:
        print(f"{room:57} {size['code']:6,} {size['lines']:6,} {'' if most is None else f'{most:6,}'}".rstrip())


if __name__ == "__main__":
    main()
