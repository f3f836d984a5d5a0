"""Finding a factory, and what is said when there is none, or it does not build what it should."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from prefect_crew.devserver.crewai_runner import _lock_in_process, prepare_crewai
from prefect_crew.devserver.programs import load_program
from prefect_crew.devserver.runs import ProgramNotFoundError
from support.environment import isolated

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]

CREWS = str(Path(__file__).with_name("real_crews.py"))
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("spec", "name", "inputs"),
    [
        (f"{EXAMPLES}/travel_crew.py:build", "travel_crew", ["audience", "topic"]),
        (f"{EXAMPLES}/report_flow.py:ReportFlow", "ReportFlow", ["topic", "sections"]),
        (f"{CREWS}:Classic", "Classic", ["topic"]),
        (f"{CREWS}:with_json_in_prompt", "real_crews", ["topic"]),
        (f"{CREWS}:Wide", "Wide", []),
    ],
    ids=["crew", "flow", "crew-base-class", "braces-that-are-no-input", "state-is-a-dictionary"],
)
def test_a_program_knows_its_name_and_inputs(spec: str, name: str, inputs: list[str]) -> None:
    program = load_program(spec)
    assert program.name == name
    assert [item.name for item in program.inputs()] == inputs
    assert name in repr(program)


def test_a_module_is_found_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_travel_crew.py").write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\nfrom travel_crew import build\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_program("my_travel_crew:build").name == "my_travel_crew"


def test_a_file_may_be_called_like_a_module_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\nfrom travel_crew import build\n"
    (tmp_path / "json.py").write_text(text)
    assert load_program(f"{tmp_path}/json.py:build").name == "json"
    import json

    assert json.loads("1") == 1


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("no_such_module:build", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("no/such/file.py:build", "There is no file .*file.py"),
        (f"{CREWS}:no_such_function", "'no_such_function' of .* does not exist. Name a function without arguments"),
        (f"{CREWS}:CREWS_OF_NOBODY", "does not exist"),
        (f"{CREWS}:_SAME", "is not a function"),
        (f"{CREWS}:same", "returned the same object twice"),
        (f"{CREWS}:asynchronous", "is async"),
        (f"{CREWS}:nothing", "returned NoneType: return a crewai Crew or Flow"),
        (f"{CREWS}:broken", "failed to build its crew: RuntimeError: the recipe is lost"),
        (f"{CREWS}:job", "failed to build its crew: TypeError"),
    ],
    ids=[
        "no-module",
        "no-file",
        "no-function",
        "no-constant",
        "a-crew-itself",
        "not-fresh",
        "async",
        "nothing",
        "raises",
        "wants-arguments",
    ],
)
def test_what_cannot_be_served_is_said(spec: str, text: str) -> None:
    with pytest.raises(ProgramNotFoundError, match=text):
        load_program(spec)


@pytest.mark.parametrize("spec", ["crew", ":build", "crew:"], ids=["no-colon", "no-module", "no-name"])
def test_a_spec_names_a_module_and_a_function(spec: str) -> None:
    from prefect_crew.devserver.crewai_runner import load_real

    with pytest.raises(ProgramNotFoundError, match="is not a module:factory"):
        load_real(spec)


def test_a_module_that_does_not_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "typo.py").write_text("import crewai\ncrewai.Crw()\n")
    with pytest.raises(ProgramNotFoundError, match=r"typo.py cannot be imported: AttributeError: .*Crw"):
        load_program(f"{tmp_path}/typo.py:build")
    assert "typo" not in sys.modules


def test_without_crewai_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crewai", None)
    with pytest.raises(ProgramNotFoundError, match=r"pip install 'prefect-crew\[crewai\]', with Python below 3.14"):
        load_program(f"{EXAMPLES}/travel_crew.py:build")


def test_a_model_object_for_all_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="prefect_crew"):
        load_program(f"{CREWS}:failing")
        assert not caplog.records
        load_program(f"{CREWS}:sharing_a_model")
    assert "token counts add up wrongly" in caplog.text


def test_a_storage_of_the_user_s_own_keeps_crewai_s_own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_crewai()
    from crewai_core import lock_store

    ours = lock_store._backend
    monkeypatch.setattr(lock_store, "_backend", None)
    monkeypatch.setenv("CREWAI_STORAGE_DIR", str(tmp_path))
    prepare_crewai()
    assert lock_store._backend is None, "other processes may share that storage"
    monkeypatch.delenv("CREWAI_STORAGE_DIR")
    prepare_crewai()
    assert lock_store._backend is (ours or _lock_in_process)


def test_a_lock_keeps_others_out_by_its_name() -> None:
    said: list[str] = []

    def other(name: str) -> None:
        try:
            with _lock_in_process(name, timeout=0.05):
                said.append("in")
        except TimeoutError as error:
            said.append(str(error))

    with _lock_in_process("one"):
        for name in ("one", "two"):
            thread = threading.Thread(target=other, args=(name,))
            thread.start()
            thread.join()
    other("one")
    assert said == ["CrewAI's lock 'one' was not free within 0.05 s.", "in", "in"]


def test_crewai_s_surroundings_are_set_unless_the_user_has(tmp_path: Path) -> None:
    code = """
        import os, sys
        import prefect_crew.devserver.crewai_runner as real
        assert "crewai" not in sys.modules, "imported before anyone asked for a crew"
        real.load_real(sys.argv[1])
        from crewai_core import lock_store
        assert lock_store._backend is not None
        from crewai_core.paths import db_storage_path
        print(db_storage_path())
        print(os.environ["CREWAI_TRACING_ENABLED"], os.environ["CREWAI_DISABLE_TELEMETRY"])
    """
    environment = isolated(tmp_path, {"CREWAI_DISABLE_TELEMETRY": "yes, please"})
    del environment["CREWAI_TRACING_ENABLED"]
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), f"{EXAMPLES}/travel_crew.py:build"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    storage, said = ran.stdout.splitlines()
    assert said == "false yes, please"
    assert Path(storage).name.startswith("prefect-crew-")
    assert not Path(storage).exists(), "it goes with the process"


def test_a_factory_may_be_a_method_of_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "crews_of_mine.py").write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import travel_crew\n"
        "class Crews:\n"
        "    class Travel:\n"
        "        @staticmethod\n"
        "        def build():\n"
        "            return travel_crew.build()\n"
    )
    assert load_program(f"{tmp_path}/crews_of_mine.py:Crews.Travel.build").name == "crews_of_mine"
    with pytest.raises(ProgramNotFoundError, match=r"'Crews\.Tavel\.build' of .* does not exist"):
        load_program(f"{tmp_path}/crews_of_mine.py:Crews.Tavel.build")
