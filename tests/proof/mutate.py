"""Mistakes, one at a time, in the modules that decide and post: each has to be seen. `make mutate` makes some.

The own tests of the module look first, then the scenarios of tests/outcomes. Nothing is changed here, only in a
copy of the tree. A mistake with which a run can be started twice must never be seen by nobody: who reads the list
decides that. The exit code is 1 where fewer are seen than LEAST.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STORE = ["tests/store/test_machine.py", "tests/store/test_attempts.py", "tests/store/test_races.py"]
OUTCOMES = ["tests/outcomes/test_scenarios.py"]
MODULES = {
    "store/attempts.py": STORE,
    "store/decision.py": STORE,
    "store/spending.py": STORE,
    "store/batches.py": ["tests/store/test_rooms.py", "tests/batches/test_run.py"],
    "store/questions.py": ["tests/store/test_rooms.py", "tests/runs/reviews"],
    "store/workers.py": ["tests/store/test_rooms.py", "tests/store/test_machine.py"],
    "store/prune.py": ["tests/store/test_rooms.py", "tests/store/test_machine.py"],
    "store/database.py": ["tests/store/test_bad_luck.py", "tests/store/test_races.py"],
    "client/_retry_safety.py": ["tests/client/test_client.py"],
    "runs/start.py": ["tests/runs/test_start.py"],
    "runs/resolve.py": ["tests/cli/test_runs.py"],
    "runs/wait.py": ["tests/runs/test_wait.py"],
    "runs/polling.py": ["tests/runs/test_polling.py", "tests/runs/test_wait.py"],
}
"""The modules that decide and post, and their own tests, which look first. Then the scenarios do."""
LONGEST = 300.0
"""Seconds, or three times those of the scenarios without a mistake: whoever takes longer was held up by the mistake,
which counts as seen."""
LEAST = 0.8
"""The share of mistakes that has to be seen. Some change nothing that anybody could see: a log level, a pause."""
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    one: other
    for pair in ((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn))
    for one, other in (pair, reversed(pair))
}


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what could stand in a node's place by mistake."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=comparators) if type(op) in COMPARISONS:
            yield ast.Compare(left, [COMPARISONS[type(op)]()], comparators)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            yield from values  # all but one are forgotten
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.If(test=test, body=body, orelse=orelse):
            yield ast.If(ast.Constant(value=False), body, orelse)
            if not isinstance(test, ast.Compare | ast.UnaryOp):
                yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            yield ast.BinOp(left, ast.Sub() if isinstance(op, ast.Add) else ast.Add(), right)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(value=None))
        case ast.Return(value=None):
            yield ast.Pass()
        case ast.Constant(value=bool() as value):
            yield ast.Constant(value=not value)
        case ast.Constant(value=(int() | float()) as value):
            yield ast.Constant(value=value * 2 + 1)
        case _:
            return


Site = tuple[int, int]
"""The number of a node in a module, and that of a mistake among those that could stand in its place."""


def _nodes(tree: ast.Module) -> list[ast.expr | ast.stmt]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.expr, ast.stmt))]


def sites(source: str) -> Iterator[Site]:
    """Yield every place of a module at which a mistake can be made."""
    for number, node in enumerate(_nodes(ast.parse(source))):
        for choice, _ in enumerate(changed(node)):
            yield number, choice


def mutant(source: str, site: Site) -> tuple[int, str, str]:
    """Return a module that differs from a source by one mistake: its line, what was changed, and its text."""
    tree = ast.parse(source)
    old = _nodes(tree)[site[0]]
    new = list(changed(old))[site[1]]
    line, change = old.lineno, f"{_short(old)}  ->  {_short(new)}"
    _Replace(old, new).visit(tree)
    return line, change, ast.unparse(ast.fix_missing_locations(tree))


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self._new if node is self._old else self.generic_visit(node)


def _short(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines()
    return lines[0] if len(lines) < 2 or not isinstance(node, ast.If) else f"{lines[0]} …"


def passes(tree: Path, tests: list[str], limit: float) -> bool:
    """Whether some tests pass in a copy of the tree, in time."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as running:
        try:
            return running.wait(limit) == 0
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, 9)
            return False


def main() -> int:
    """Make mistakes, print who saw them, and return the exit code: 1 where too few were seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--module", choices=MODULES, help="only this one")
    options = parser.parse_args()
    modules = [options.module] if options.module else list(MODULES)
    sources = {module: (ROOT / "prefect_crew" / module).read_text("utf-8") for module in modules}
    places = [(module, site) for module, source in sources.items() for site in sites(source)]
    sample = random.Random(options.seed).sample(places, min(options.mutants, len(places)))
    chosen = sorted((module, *mutant(sources[module], site)) for module, site in sample)
    print(f"{len(chosen)} of {len(places)} mutants, SEED={options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        skipped = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
        shutil.copytree(ROOT, tree, ignore=skipped)
        began = time.monotonic()
        if not passes(tree, OUTCOMES, 12 * LONGEST):
            sys.exit("The scenarios fail without any mistake: repair that first.")
        limit = max(LONGEST, 3 * (time.monotonic() - began))  # on a busy machine nobody is held up by the mistake
        survivors = 0
        for module, line, change, text in chosen:
            began = time.monotonic()
            (tree / "prefect_crew" / module).write_text(text, "utf-8")
            who = next((name for name, tests in _killers(tree, module) if not passes(tree, tests, limit)), "NOBODY")
            (tree / "prefect_crew" / module).write_text(sources[module], "utf-8")
            survivors += who == "NOBODY"
            print(f"{who:10} {time.monotonic() - began:4.0f} s  {module}:{line}  {change}", flush=True)
    seen = len(chosen) - survivors
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    share = f"{seen} of {len(chosen)} mistakes were seen ({seen / len(chosen):.0%}; at least {LEAST:.0%} must be)"
    print(f"{share}: SEED={options.seed} at {commit.stdout.strip() or 'an unknown commit'}.")
    return 0 if seen >= LEAST * len(chosen) else 1


def _killers(tree: Path, module: str) -> list[tuple[str, list[str]]]:
    own = [test for test in MODULES[module] if (tree / test).exists()]
    return [*([("own tests", own)] if own else []), ("scenarios", OUTCOMES)]


if __name__ == "__main__":
    sys.exit(main())
