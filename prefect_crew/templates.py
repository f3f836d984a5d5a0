"""Inputs written as templates over other values: a sandbox, strict about names. Pure.

Used by pipelines and batches; a template's text is the user's own, the values put into it may be anything that a crew
wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from types import BuiltinMethodType
from typing import Any, ClassVar, cast

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment
from jinja2.utils import Cycler, Joiner
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from prefect_crew.client.models import CrewResult, TaskResult, TokenUsage
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.states import CrewState


def _readable(value: Any) -> Any:
    """Put structured values into a text as JSON, not as Python writes them."""
    if isinstance(value, BaseModel | Mapping | list | tuple) or value is None or isinstance(value, bool):
        return to_json(value).decode()
    return value


class TaskView(BaseModel):
    """What a template sees of one task of a result."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    name: str | None
    agent: str | None
    output: str | None
    data: Any
    execution_time: float | None
    description: str | None


class ResultView(BaseModel):
    """What a template sees of a result, also where it prints or iterates the whole of it."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    output: str
    data: Any
    tasks: list[TaskView]
    usage: TokenUsage | None
    execution_time: float | None
    kickoff_id: str
    state: CrewState


RESULT_FIELDS = frozenset(ResultView.model_fields)
"""What a template sees of a step's result."""


def _viewed(value: Any) -> Any:
    """Return `value` with a view in the place of each result, and itself where it holds none."""
    if isinstance(value, CrewResult | TaskResult):
        view = ResultView if isinstance(value, CrewResult) else TaskView
        parts = {name: getattr(value, name) for name in view.model_fields}
        if "tasks" in parts:
            parts["tasks"] = _viewed(parts["tasks"])
        return view.model_construct(**parts)
    if isinstance(value, Mapping):
        given = cast("Mapping[Any, Any]", value)
        seen = {key: _viewed(item) for key, item in given.items()}
        return seen if any(seen[key] is not item for key, item in given.items()) else given
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        views = [_viewed(item) for item in items]
        return views if any(new is not old for new, old in zip(views, items, strict=True)) else items
    return value


_HARMLESS = (str, bytes, int, float, list, tuple, dict, set, frozenset, date, time, timedelta, Decimal)
"""Of these, Python's own methods may be called, as far as they change nothing."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which by itself lets a template call whatever public method a value has.

    Of a model a template sees its fields: pydantic's classmethods read files, and run what is pickled.
    """

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, BaseModel):
            seen: BaseModel = _viewed(obj)
            return attr in type(seen).model_fields
        return super().is_safe_attribute(obj, attr, value)

    def is_safe_callable(self, obj: Any) -> bool:
        if not super().is_safe_callable(obj):
            return False
        owner = getattr(obj, "__self__", None)
        if isinstance(obj, BuiltinMethodType) and isinstance(owner, _HARMLESS):
            return True
        brought = cast("dict[str, Any]", cast("Any", self).globals).values()  # `range`, `dict` and so on
        kinds = (Macro, LoopContext, Joiner)
        return isinstance(obj, kinds) or isinstance(owner, (LoopContext, Cycler)) or any(obj is one for one in brought)


def _environment() -> SandboxedEnvironment:
    return _Sandbox(undefined=StrictUndefined, finalize=_readable, keep_trailing_newline=True)


_METHODS = frozenset(dir(dict))
"""What a collection has in addition to its names: `steps.items()`."""
GLOBALS = frozenset(cast("dict[str, Any]", cast("Any", _environment()).globals))
"""Names that Jinja brings, such as `range`. `names_in` takes them for those, whatever values there are."""


def names_in(template: str, *, collections: frozenset[str] = frozenset()) -> set[str]:
    """Return the names that a template needs: its own, and those looked up in a collection such as `steps["a b"]`.

    Raises:
        ConfigurationError: It is not a template.
    """
    tree = _parsed(template)
    needed = find_undeclared_variables(tree)
    for lookup in tree.find_all((nodes.Getitem, nodes.Getattr)):
        inside = lookup.node
        if not isinstance(inside, nodes.Name) or inside.name not in collections:
            continue
        if isinstance(lookup, nodes.Getattr):
            needed |= {lookup.attr} - _METHODS
        elif isinstance(lookup.arg, nodes.Const):
            needed.add(str(lookup.arg.value))
    return needed - collections


def attributes_in(template: str, names: Collection[str], *, collection: str) -> set[tuple[str, str]]:
    """Return what a template reads of these names, as name and attribute: `a.output`, or `collection["a"].output`.

    Raises:
        ConfigurationError: It is not a template.
    """
    found: set[tuple[str, str]] = set()
    for lookup in _parsed(template).find_all(nodes.Getattr):
        inside = lookup.node
        if isinstance(inside, nodes.Name) and inside.name in names:
            found.add((inside.name, lookup.attr))
        elif isinstance(inside, nodes.Getitem | nodes.Getattr) and isinstance(inside.node, nodes.Name):
            key = inside.attr if isinstance(inside, nodes.Getattr) else getattr(inside.arg, "value", None)
            if inside.node.name == collection and key in names:
                found.add((str(key), lookup.attr))
    return found


def _parsed(template: str) -> nodes.Template:
    environment = _environment()
    try:
        tree = environment.parse(template)
    except TemplateError as error:
        raise ConfigurationError(f"{template!r} is not a template: {error}") from None
    for node in tree.find_all((nodes.Filter, nodes.Test, nodes.Getattr, *_OTHERS)):
        if problem := _problem(node, environment):
            raise ConfigurationError(f"{template!r} cannot be filled: {problem}.")
    return tree


_OTHERS = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


def _problem(node: nodes.Node, environment: Any) -> str | None:
    """Return what is wrong with a part of a template that Jinja would report only when it runs that part, if at all."""
    if isinstance(node, nodes.Filter) and node.name not in environment.filters:
        return f"there is no filter {node.name!r}"
    if isinstance(node, nodes.Test) and node.name not in environment.tests:
        return f"there is no test {node.name!r}"
    # What every object has, such as `__class__`, and a mapping's own `__typename` is not.
    if isinstance(node, nodes.Getattr) and hasattr(object, node.attr):
        return f"{node.attr!r} is not allowed in a template"
    if isinstance(node, _OTHERS):
        return "it asks for another template, and there is none"
    return None


def render(template: str, values: Mapping[str, Any]) -> str:
    """Fill a template.

    Raises:
        ConfigurationError: A name or an attribute is not there, or the template does what the sandbox forbids.
    """
    return compiled(template)(values)


def compiled(template: str) -> Callable[[Mapping[str, Any]], str]:
    """Return what fills a template, as `render` does: for one that is filled thousands of times.

    Raises:
        ConfigurationError: It is not a template.
    """
    try:
        ready = _environment().from_string(_parsed(template))
    except TemplateError as error:
        raise ConfigurationError(f"{template!r} is not a template: {error}") from None

    def fill(values: Mapping[str, Any]) -> str:
        try:
            return ready.render(_viewed(values))
        except TemplateError as error:
            raise ConfigurationError(f"The template {template!r} cannot be filled: {error}") from None
        except Exception as error:  # noqa: BLE001  a number added to a text, too long a range: whatever operators raise
            said = f"{type(error).__name__}: {error}"
            raise ConfigurationError(f"The template {template!r} cannot be filled: {said}") from None

    return fill
