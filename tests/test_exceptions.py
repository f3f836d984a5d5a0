"""The tree of errors is complete and true: what this package defines and what it raises, read from its source."""

from __future__ import annotations

import ast
import builtins
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefect_crew
from prefect_crew import exceptions
from prefect_crew import exceptions as exceptions_module
from prefect_crew.exceptions import CrewError

PACKAGE = Path(prefect_crew.__file__).parent
# The local crew server is a program of its own, whose errors are answers; pytest's fixtures have pytest's.
ELSEWHERE = ("prefect_crew.devserver", "prefect_crew.testing")
CAUGHT: dict[str, str] = {
    "prefect_crew.client.inputs._BadValueError": "named within encode_inputs, which names the input",
    "prefect_crew.client.inputs._UnsupportedError": "named within encode_inputs, which names the input",
    "prefect_crew.batches.dataset._TwiceError": "a hook of json, whose caller names the line",
    "prefect_crew.cli.TerminatedError": "of the command line alone: exit code 143",
    "prefect_crew.cli._errors.UsageError": "of the command line alone: exit code 2",
    "prefect_crew.runs.kickoff.ClaimLostError": "purchases decides again",
    "prefect_crew.runs.webhook_resolve._NotKnownError": "the receiver takes it for an answer",
    "prefect_crew.runs.reviews.reviewer.TooManyRoundsError": "waits raises ReviewLimitError in its place",
    "prefect_crew.runs.wait._CancelledOnServerError": "waits raises what became of the run",
}
"""Exceptions that never leave this package, and who catches them."""
BUILTIN: dict[tuple[str, str], str] = {
    ("prefect_crew.client._client", "ReadTimeout"): "the client makes a CrewConnectionError of it",
    ("prefect_crew.client.webhooks", "ValueError"): "a validator of pydantic",
    ("prefect_crew.batches.database", "OSError"): "the ledger is tried again, or the batch ends with a LedgerError",
    ("prefect_crew.batches.ownership", "OSError"): "the lock is taken anew, or the batch ends with a LedgerError",
    ("prefect_crew.batches.run", "TypeError"): "a keyword that a function does not have",
    ("prefect_crew._internal.flow_engine", "CancelledError"): "a flow run that another worker has goes on no further",
    ("prefect_crew.blocks", "ValueError"): "a validator of pydantic",
    ("prefect_crew.cli.run", "OSError"): "exit code 26",
    ("prefect_crew.cli.serve", "OSError"): "exit code 26",
    ("prefect_crew.deployments", "AttributeError"): "a module's __getattr__",
    ("prefect_crew._internal.files", "OSError"): "exit code 26",
    ("prefect_crew._internal.lazy", "AttributeError"): "a module's __getattr__",
    ("prefect_crew.crew", "ValueError"): "a validator of pydantic",
}
"""Exceptions of Python's own that are raised on purpose, by module, and why."""
ABSTRACT = "NotImplementedError"


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if not name.startswith(ELSEWHERE):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


MODULES = dict(modules())


def value_of(module: str, node: ast.expr) -> Any:
    """Return what a name, or a dotted one, means at the top of a module; None if that is only known when it runs."""
    if isinstance(node, ast.Name):
        return getattr(importlib.import_module(module), node.id, getattr(builtins, node.id, None))
    if isinstance(node, ast.Attribute):
        return getattr(value_of(module, node.value), node.attr, None)
    return None


def is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def imported_within(tree: ast.Module, name: str) -> Any:
    """Return what a name is that some function imports for itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
            return getattr(importlib.import_module(node.module), name, None)
    return None


def raised() -> Iterator[tuple[str, int, type[BaseException]]]:
    """Yield each class that a `raise` of this package names, with where."""
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            value = value_of(module, named)
            if value is None and isinstance(named, ast.Name):
                value = imported_within(tree, named.id)
            if is_error(value):
                yield module, node.lineno, value


def defined() -> Iterator[type[BaseException]]:
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and is_error(
                value := getattr(importlib.import_module(module), node.name)
            ):
                yield value


def path_of(kind: type[BaseException]) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def listed(kind: type[BaseException]) -> bool:
    return getattr(exceptions_module, kind.__name__, None) is kind and kind.__name__ in exceptions_module.__all__


def test_every_class_is_in_the_tree_or_is_known_to_be_caught():
    shared = {exceptions_module.CrewFailedError.__base__}  # what the errors about one run share
    unknown = {path_of(kind) for kind in defined() if not listed(kind)} - {path_of(kind) for kind in shared if kind}
    assert unknown == set(CAUGHT)


def test_everything_that_is_raised_is_in_the_tree():
    found = list(raised())
    assert len(found) > 100, "the walk sees them"
    strange = {
        (module, kind.__name__): line
        for module, line, kind in found
        if not (issubclass(kind, CrewError) and listed(kind))
        and path_of(kind) not in CAUGHT
        and kind.__name__ != ABSTRACT
        and not kind.__module__.startswith(("prefect.", "cyclopts."))
    }
    assert set(strange) == set(BUILTIN), strange


def test_what_is_raised_of_prefects_are_its_signals():
    theirs = {path_of(kind) for _, _, kind in raised() if kind.__module__.startswith("prefect.")}
    assert theirs <= {"prefect.exceptions.Pause", "prefect.exceptions.InfrastructureNotAvailable"}


@pytest.mark.parametrize("name", exceptions_module.__all__)
def test_each_has_one_public_home(name: str):
    assert getattr(exceptions, name) is getattr(exceptions_module, name) is getattr(prefect_crew, name)
    assert name in exceptions.__all__


def test_the_public_homes_name_nothing_else():
    assert exceptions.__all__ == exceptions_module.__all__
