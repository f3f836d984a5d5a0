"""Every command of `prefect-crew` that a message or a page names exists, and can be pasted as it stands."""

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
import pytest
from pydantic import SecretStr

from prefect_crew.automations import PROBLEM
from prefect_crew.blocks import DeployedCrew, crew_of
from prefect_crew.cli.app import app
from prefect_crew.cli.runs import Word, todo
from prefect_crew.exceptions import CrewLostError
from prefect_crew.runs.reviews.questions import how_to_answer
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.start import uncertain
from prefect_crew.store.decision import AttemptState
from support.past import new_attempt

ROOT = Path(__file__).parents[2]
NAMED = re.compile(
    r"prefect-crew(?! (?:here|if|webhook|secret inputs|knows version|that made)\b)"
    r"((?: +[a-z][\w-]*)+)((?: +[^\s.,;:`)]+)*)"
)
"""A command and what follows it. The words left out follow the package's own name."""
FILES = [
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / name / "README.md" for name in (".", "examples", "deployments")),
    *(ROOT / "deployments").rglob("*.yaml"),
    *(path for name in ("prefect_crew", "flows", "deployments", "examples") for path in (ROOT / name).rglob("*.py")),
]


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a module, with X for what is filled in; of a page its commands."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        named = r"`(prefect-crew [^`\n]*)`|^\$? ?(prefect-crew .*)$"
        yield from (one or line for one, line in re.findall(named, text.replace("\\\n", " "), re.MULTILINE))
        return
    if path.suffix == ".yaml":
        yield from (line.replace(",", "") for line in re.findall(r"\[(prefect-crew, [^\]]*)\]", text))
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def wrong(text: str) -> list[str]:
    """Return what is not right about the commands that a text names."""
    found: list[str] = []
    for words, rest in NAMED.findall(text):
        command, left = app, words.split()
        while left and left[0] in set(command):
            command = command[left.pop(0)]
        is_group = set(command) - {*command.help_flags, *command.version_flags}
        if command is app or (is_group and command.default_command is None):
            found.append(f"no command: prefect-crew{words}")
            continue
        known = {name for argument in command.assemble_argument_collection() for name in argument.names}
        given = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest)) - {"--help", "--debug"}
        found += [f"no option: prefect-crew{words} {option}" for option in sorted(given - known)]
    return found


def test_every_command_that_is_named_exists():
    problems = [f"{path.relative_to(ROOT)}: {one}" for path in FILES for text in texts(path) for one in wrong(text)]
    assert problems == []


HOSTILE = "r1;touch 'pwned' $(touch x) `y` \"z\" \\"
ATTEMPT = new_attempt(HOSTILE, crew=HOSTILE, state=AttemptState.STARTED, kickoff_id=HOSTILE)
CREW = crew_of(DeployedCrew(url="https://x.test", token=SecretStr("a-token-of-tests")))
ALERT = {"payload": {"idempotency_key": HOSTILE, "reason": "x"}}
TEXTS: dict[str, Callable[[], str]] = {
    "uncertain": lambda: str(uncertain(ATTEMPT, "x")),  # emits an event
    "lost": lambda: str(CrewLostError(kickoff_id="k", idempotency_key=HOSTILE)),
    "answer": lambda: how_to_answer(LiveRun(crew=CREW, kickoff_id=HOSTILE)),
    "to do: uncertain": lambda: todo(ATTEMPT, Word.UNCERTAIN, 0.0),
    "to do: unattended": lambda: todo(ATTEMPT, Word.UNATTENDED, 0.0),
    "to do: waiting": lambda: todo(ATTEMPT, Word.WAITING, 0.0),
    "alert": lambda: jinja2.Template(PROBLEM).render(event={"event": "crew.uncertain", **ALERT}),
}


@pytest.mark.parametrize("which", TEXTS)
@pytest.mark.usefixtures("prefect_api")
def test_a_shell_takes_an_id_for_one_word(which: str):
    commands = TEXTS[which]().split("prefect-crew ")[1:]
    assert commands
    for command in commands:
        assert shlex.quote(HOSTILE) in command
        assert HOSTILE not in command.replace(shlex.quote(HOSTILE), "")
