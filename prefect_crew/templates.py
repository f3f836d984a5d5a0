"""Inputs as templates over other values, in a sandbox that refuses unknown names.

Pipelines and batches use it. The text of a template is the user's own; the values in it may be any text of a crew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from types import BuiltinMethodType
from typing import Any, cast

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.exceptions import TemplateRuntimeError
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel
from pydantic_core import to_json

from prefect_crew.client.models import CrewResult, TaskResult
from prefect_crew.exceptions import ConfigurationError

RESULT_FIELDS = ("output", "data", "tasks", "usage", "execution_time", "kickoff_id", "state")
"""The fields of a step's result that a template can read."""
_TASK_FIELDS = ("name", "agent", "output", "data", "execution_time", "description")


def _readable(value: Any) -> Any:
    """Return structured values as JSON for the text, not in Python's form. Raise TemplateRuntimeError for None."""
    if value is None:
        raise TemplateRuntimeError("a value in it is null; for a text in its place write {{ value or 'text' }}")
    if callable(value) and not isinstance(value, StrictUndefined):
        raise TemplateRuntimeError("this is a method, not a value; write a key with that name as data['items']")
    if isinstance(value, Mapping | list | tuple | bool):
        return to_json(value).decode()
    return value


def _needed(value: Any) -> Any:
    """Return a value for the text as `_readable` does. Raise TemplateRuntimeError for an empty text."""
    if value == "":
        raise TemplateRuntimeError("a value in it is empty")
    return _readable(value)


def _viewed(value: Any) -> Any:
    """Return `value` with each model replaced by a mapping of its fields; unchanged if it contains no model.

    Templates must not call pydantic's classmethods, which read files and load pickles. Other parts of a result are not
    for templates.
    """
    if isinstance(value, BaseModel):
        kind = type(value)
        names: Collection[str] = kind.model_fields
        if issubclass(kind, CrewResult | TaskResult):
            names = RESULT_FIELDS if issubclass(kind, CrewResult) else _TASK_FIELDS
        return {name: _viewed(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        view = {key: _viewed(item) for key, item in mapping.items()}
        return view if any(view[key] is not item for key, item in mapping.items()) else mapping
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        views = [_viewed(item) for item in items]
        return views if any(new is not old for new, old in zip(views, items, strict=True)) else items
    return value


_HARMLESS = (str, bytes, int, float, list, tuple, dict, set, frozenset, date, time, timedelta, Decimal)
"""The types whose own methods a template may call, unless they change the value."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with stricter rules, since Jinja's own lets a template call every public method of a value."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # `_viewed` does not replace models within other objects, so no attribute of a model is safe.
        return not isinstance(obj, BaseModel) and super().is_safe_attribute(obj, attr, value)

    def is_safe_callable(self, obj: Any) -> bool:
        if not super().is_safe_callable(obj):
            return False
        owner = getattr(obj, "__self__", None)
        if isinstance(obj, BuiltinMethodType) and isinstance(owner, _HARMLESS):
            return True
        helpers = cast("dict[str, Any]", cast("Any", self).globals).values()  # `range`, `dict` and so on
        return isinstance(obj, Macro | LoopContext) or isinstance(owner, LoopContext) or any(obj is x for x in helpers)


_ENVIRONMENT: Any = _Sandbox(undefined=StrictUndefined, finalize=_readable, keep_trailing_newline=True)
_COMPLETE: Any = _ENVIRONMENT.overlay(finalize=_needed)
GLOBALS = frozenset(_ENVIRONMENT.globals)
"""Names that Jinja itself has, such as `range`. `names_in` never returns them, even if a value has the same name."""
_METHODS = frozenset(dir(dict))
"""The attributes of a collection that are not names in it, such as in `steps.items()`."""


def names_in(template: str, *, collections: Collection[str] = ()) -> set[str]:
    """Return the names that a template needs: direct names, and names in a collection such as `steps["a b"]`.

    Raises:
        ConfigurationError: It is not a template.
    """
    return set(uses_in(template, collections=collections)) - set(collections)


def uses_in(template: str, *, collections: Collection[str] = ()) -> dict[str, set[str]]:
    """Return the names of `names_in`, each with the attributes that the template reads from the value of that name.

    The names include a collection itself if the template uses that collection as a whole, or by an expression, such as
    `steps[name]`.

    Raises:
        ConfigurationError: The text is not a template.
    """
    tree = _parsed(template)
    uses = {name: set[str]() for name in find_undeclared_variables(tree) - set(collections)}
    lookups = list(tree.find_all((nodes.Getitem, nodes.Getattr)))
    keys = {id(lookup): _key_of(lookup, collections) for lookup in lookups}
    uses |= {key: set[str]() for key in keys.values() if key is not None}
    for lookup in lookups:
        inside = lookup.node
        name = inside.name if isinstance(inside, nodes.Name) else keys.get(id(inside))
        if isinstance(lookup, nodes.Getattr) and name in uses:
            uses[name].add(lookup.attr)
    by_key = {id(lookup.node) for lookup in lookups if keys[id(lookup)] is not None}
    whole = (node.name for node in tree.find_all(nodes.Name) if id(node) not in by_key)
    return uses | {name: set[str]() for name in whole if name in collections}


def _key_of(lookup: nodes.Getitem | nodes.Getattr, collections: Collection[str]) -> str | None:
    """Return the name that a template looks up in a collection, None if it is not a constant name."""
    if not isinstance(lookup.node, nodes.Name) or lookup.node.name not in collections:
        return None
    if isinstance(lookup, nodes.Getattr):
        return None if lookup.attr in _METHODS else lookup.attr
    return str(lookup.arg.value) if isinstance(lookup.arg, nodes.Const) else None


def _parsed(template: str) -> nodes.Template:
    try:
        tree: nodes.Template = _ENVIRONMENT.parse(template)
    except TemplateError as error:
        raise ConfigurationError(f"{template!r} is not a template: {error}") from None
    for node in tree.find_all((nodes.Filter, nodes.Test, nodes.Getattr, *_OTHERS)):
        if problem := _problem(node):
            raise ConfigurationError(f"{template!r} cannot be filled: {problem}.")
    return tree


_OTHERS = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


def _problem(node: nodes.Node) -> str | None:
    """Return the problem of a part of a template, or None. Jinja reports it only when it runs that part, if at all."""
    if isinstance(node, nodes.Filter) and node.name not in _ENVIRONMENT.filters:
        return f"there is no filter {node.name!r}"
    if isinstance(node, nodes.Test) and node.name not in _ENVIRONMENT.tests:
        return f"there is no test {node.name!r}"
    # Attributes that every object has, such as `__class__`; but not a key of a mapping such as `__typename`.
    if isinstance(node, nodes.Getattr) and hasattr(object, node.attr):
        return f"{node.attr!r} is not allowed in a template"
    return "it includes another template, which is not possible" if isinstance(node, _OTHERS) else None


def compiled(template: str, *, is_complete: bool = False) -> Callable[[Mapping[str, Any]], str]:
    """Return a function that fills a template with values. With `is_complete`, it refuses empty texts.

    Raises:
        ConfigurationError: The text is not a template. The returned function raises it if a name or an attribute is
            missing, or if the sandbox forbids an operation.
    """
    try:
        jinja_template = (_COMPLETE if is_complete else _ENVIRONMENT).from_string(_parsed(template))
    except TemplateError as error:
        raise ConfigurationError(f"{template!r} is not a template: {error}") from None

    def fill(values: Mapping[str, Any]) -> str:
        try:
            return jinja_template.render(_viewed(values))
        except TemplateError as error:
            raise ConfigurationError(f"The template {template!r} cannot be filled: {error}") from None
        except Exception as error:  # noqa: BLE001  operators may raise anything: a number plus a text, a too long range
            problem = f"{type(error).__name__}: {error}"
            raise ConfigurationError(f"The template {template!r} cannot be filled: {problem}") from None

    return fill
