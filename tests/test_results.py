"""What stands in results/, and what is kept out of it. Run: python -m pytest tests/test_results.py"""

import re
import subprocess

import pytest
from conftest import ROOT

TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "results/README.md")}

# ---- what leaves a clone clean ----------------------------------------------------------------------


def demo_commands() -> list[str]:
    """The commands of `make demo` that write results: two of the benchmark, one of the evaluation."""
    run = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    commands = [line for line in run.stdout.splitlines() if "--json" in line]
    assert len(commands) == 3
    return commands


def is_ignored(path: str) -> bool:
    """Whether git takes no notice of a file of this name; never so for a tracked one."""
    run = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr
    return run.returncode == 0


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_a_clone_stays_clean():
    files = [re.search(r"--json (\S+)", command)[1] for command in demo_commands()]
    files += [
        default
        for script in ROOT.glob("*.py")
        for default in re.findall(r'Path\("(results/.*?)"\)', script.read_text())
    ]
    assert len(files) == 5
    assert [file for file in files if not is_ignored(file)] == []
    assert [file for file in files if not is_ignored(file.replace(".json", ".png"))] == []


def test_make_clean_removes_what_make_demo_made():
    run = subprocess.run(["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True)
    folders = {re.search(r"--json (\S+)/", command)[1] for command in demo_commands()}
    assert folders <= set(run.stdout.split())


def test_commands_of_the_demo_are_those_of_its_results():
    for command in demo_commands():
        script = command.replace(".venv/bin/", "").replace("--json demo/results/", "--json results/")
        assert f"`{script}`" in TEXTS["results/README.md"]
