"""The rules of the house: what may import what, what is declared, what no file may name."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prefect_crew"
USERS = ("flows", "deployments", "examples", "benchmarks")
LONGEST = 700
LONGEST_TESTS = 900

ARROWS = (
    "api",
    "records waiting artifacts events",
    "tasks",
    "runs",
    "pipelines batches",
    "operations",
    "deploying",
    "cli",
)
"""Lowest first: a module imports its own line and those before it. What is not named here is free, but for cycles."""

EXCEPTIONS = {
    (
        "prefect_crew.server.local",
        "prefect_crew.blocks",
    ): "crew() gives a block of a test's server; in that call only",
}

PARTS = {"pydantic_core": "pydantic", "crewai_core": "crewai"}
"""What a declared package brings as a part of itself, pinned to its own version."""


@cache
def tracked() -> list[Path]:
    """All files of the repository, and those that are about to be added."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in python_files("prefect_crew")}


def _imports_in(nodes: list[ast.stmt], module: str, *, functions: bool, types: bool = False) -> Iterator[str]:
    """Yield what is imported when this code runs, with `types` also what is there for type checkers only."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = MODULES.get(module, Path()).name == "__init__.py"
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:
                # `from package import module` imports the module too.
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            chosen = [*node.body, *node.orelse] if types else node.orelse
            yield from _imports_in(chosen, module, functions=functions, types=types)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not functions:
            continue
        else:
            yield from _imports_in(list(_statements_in(node)), module, functions=functions, types=types)


def _statements_in(node: ast.stmt) -> Iterator[ast.stmt]:
    for name in ("body", "orelse", "finalbody"):
        yield from getattr(node, name, ())
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield from part.body


@cache
def imports(path: Path, *, functions: bool = True, types: bool = False) -> frozenset[str]:
    """Return the full names that a file imports, those within functions too unless told otherwise."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set(_imports_in(tree.body, module_of(path), functions=functions, types=types))
    return frozenset(found | _imported_by_name(tree) if functions else found)


def _imported_by_name(tree: ast.Module) -> set[str]:
    """Return what `import_module("…")` loads, as optional packages are."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    named = [call.args[0] for call in calls if ast.unparse(call.func).endswith("import_module")]
    return {one.value for one in named if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def rank(module: str) -> int | None:
    words = module.split(".")
    if len(words) < 2:
        return None
    return next((number for number, line in enumerate(ARROWS) if words[1] in line.split()), None)


def test_no_module_is_longer_than_a_person_reads():
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in tracked() if path.suffix == ".py"}
    longest = {name: LONGEST_TESTS if name.startswith("tests/") else LONGEST for name in lines}
    assert {name: count for name, count in lines.items() if count > longest[name]} == {}


@pytest.mark.parametrize(
    "module", [name for name in MODULES if is_in(name, "prefect_crew.api") or is_in(name, "prefect_crew.server")]
)
def test_api_and_server_know_nothing_of_prefect(module: str):
    own = ["prefect_crew.api"] + ["prefect_crew.server"] * is_in(module, "prefect_crew.server")
    strangers = {
        name
        for name in imports(MODULES[module])
        if is_in(name, "prefect") or (is_in(name, "prefect_crew") and not any(is_in(name, one) for one in own))
    }
    strangers -= {"prefect_crew"}  # its __init__ is lazy; a test below holds it to that
    assert {name for name in strangers if (module, name) not in EXCEPTIONS} == set()


def test_exceptions_are_still_needed():
    assert {pair for pair in EXCEPTIONS if pair[1] not in imports(MODULES[pair[0]])} == set()


def test_nothing_imports_the_command_line():
    files = [path for path in python_files("prefect_crew", *USERS) if rank(module_of(path)) != len(ARROWS) - 1]
    guilty = {module_of(path) for path in files for name in imports(path) if is_in(name, "prefect_crew.cli")}
    assert guilty == set()


@pytest.mark.parametrize("module", [name for name in MODULES if rank(name) is not None])
def test_arrows_point_one_way(module: str):
    # What it imports itself, at any time, and all that the import of that brings.
    reached: set[str] = set()
    waiting = [name for name in imports(MODULES[module]) if name in MODULES]
    while waiting:
        name = waiting.pop()
        if name not in reached and name != "prefect_crew":
            reached.add(name)
            waiting += [more for more in imports(MODULES[name], functions=False) if more in MODULES]
    own = rank(module)
    assert own is not None
    assert {name for name in reached if (other := rank(name)) is not None and other > own} == set()


def test_modules_do_not_import_each_other_in_a_circle():
    # Every import counts: also one in a function, and one that only type checkers see.
    graph = {name: imports(path, types=True) & set(MODULES) for name, path in MODULES.items() if name != "prefect_crew"}
    while free := {name for name, needs in graph.items() if not needs - {name}}:
        graph = {name: needs - free - {"prefect_crew"} for name, needs in graph.items() if name not in free}
    assert graph == {}


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def _declared() -> tuple[set[str], set[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {_name(one) for name, extra in project["optional-dependencies"].items() if name != "all" for one in extra}
    return {_name(one) for one in project["dependencies"]}, extras


@cache
def _distributions() -> dict[str, set[str]]:
    """Map top-level modules to the packages that install them."""
    found: dict[str, set[str]] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            if file.suffix == ".py":
                found.setdefault(file.parts[0].removesuffix(".py"), set()).add(_name(distribution.name))
    return found


def _third_party(*folders: str) -> dict[str, str]:
    """Map the top-level names that are imported from outside to a file that does."""
    local = {path.stem for path in python_files(*USERS)} | {"prefect_crew", *USERS}
    return {
        top: str(path.relative_to(ROOT))
        for path in python_files(*folders)
        for name in imports(path)
        if (top := name.split(".")[0]) not in sys.stdlib_module_names and top not in local
    }


def test_every_import_is_declared():
    core, extras = _declared()
    undeclared = {
        top: file
        for top, file in _third_party("prefect_crew", "flows", "deployments", "examples").items()
        if top != "pytest"  # pytest brings itself: prefect_crew.testing is its plugin
        and not _distributions().get(top, {_name(top)}) & (core | extras)
        and PARTS.get(top) not in core | extras
    }
    assert undeclared == {}


def test_every_declared_dependency_is_imported():
    core, extras = _declared()
    imported = {PARTS.get(top, top) for top in _third_party("prefect_crew")}
    used = {one for top in imported for one in _distributions().get(top, {_name(top)})}
    assert (core | extras) - used == set()


def test_pytest_is_imported_by_its_plugin_only():
    files = python_files("prefect_crew", "flows", "deployments", "examples")
    assert [module_of(path) for path in files if "pytest" in imports(path)] == ["prefect_crew.testing"]


# Put together here, so that this file does not name them either.
HOSTS = ("pypi" + ".org", "pythonhosted" + ".org", "npmjs" + ".org", "deb.debian" + ".org")
FOLDERS = ("work", "tmp", "root", "home", "Users")
PLACES = re.compile(
    "|".join([*map(re.escape, HOSTS), rf"(?<![\w.~/$}}-])/(?:{'|'.join(FOLDERS)})/", r"--(?:extra-)?index-url\b"])
)


def test_no_file_names_a_registry_or_a_place_on_a_machine():
    found: list[str] = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), 1):
            if match := PLACES.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        pytest.param("cd " + "/work" + "/main", True, id="a-folder"),
        pytest.param("open('" + "/tmp" + "/x')", True, id="quoted"),
        pytest.param("https://pypi" + ".org/simple", True, id="a-registry"),
        pytest.param("GET https://example.com/work/1", False, id="the-path-of-a-url"),
        pytest.param("docs/work/index.md", False, id="a-relative-path"),
    ],
)
def test_places_are_told_from_paths(line: str, found: bool):
    assert bool(PLACES.search(line)) is found


def _all_of(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if _all_of(path)])
def test_all_is_true(module: str):
    names = _all_of(MODULES[module])
    assert names
    assert len(names) == len(set(names))
    if "crewai" in {name.split(".")[0] for name in imports(MODULES[module], functions=False)}:
        pytest.importorskip("crewai", reason="needs the extra `crewai`")
    loaded = importlib.import_module(module)
    assert [name for name in names if not hasattr(loaded, name)] == []


def test_the_public_door_is_sorted_and_typed_and_shows_all():
    import prefect_crew

    names = prefect_crew.__all__
    assert names == sorted(names)
    assert set(names) <= set(dir(prefect_crew))
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == {name for name in names if not name.startswith("__")}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = prefect_crew.nonsense


@pytest.mark.parametrize(
    "modules", ["prefect_crew", "prefect_crew.testing", "prefect_crew.api.client", "prefect_crew.server"]
)
def test_import_brings_no_prefect(modules: str):
    script = f"import sys, {modules}; sys.exit('prefect' in sys.modules or 'crewai' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_wheel_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
