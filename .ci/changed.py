"""Print the tests of what changed since main: changed tests, and of a module its own test file, else its folder's."""

import subprocess
from pathlib import Path


def git(command: str) -> list[str]:
    """Return the lines that git prints; none where it fails."""
    return subprocess.run(["git", *command.split()], capture_output=True, text=True, check=False).stdout.splitlines()


def tests_of(path: Path) -> Path | None:
    """Return the tests of one file; None where `tests/` has none that is its own."""
    if path.parts[0] == "tests":
        return path if path.name.startswith("test_") else None
    if path.parts[0] != "prefect_crew":
        return None
    folder = Path("tests", *path.parts[1:-1])
    own = folder / f"test_{path.stem.strip('_')}.py"
    return own if own.exists() or len(folder.parts) == 1 else folder


base = next(iter(git("merge-base HEAD origin/main") or git("merge-base HEAD main")), "HEAD")
changed = [*git(f"diff --name-only {base}"), *git("ls-files --others --exclude-standard")]
found = {tests for name in changed if (tests := tests_of(Path(name))) and tests.exists()}
print(*sorted(tests for tests in found if not found & {*tests.parents}))
