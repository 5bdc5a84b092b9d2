"""Plants the faults of tests/mutations.md, one at a time, in a copy of this tree, and runs the tests named there.

    python tests/mutate.py                                # all of them: half an hour on 2 cores
    python tests/mutate.py 1 12                           # some
    python tests/mutate.py --unchanged 1 12               # the same tests without a fault: they have to pass
    python tests/mutate.py --by tests/test_planes.py 7 8  # who of these files notices? All of their fast tests run
    python tests/mutate.py --check                        # does the list still fit the scripts and the tests?

Prints a row for each; exits with 1 if a fault is not caught (--unchanged: if a test fails), with 2 if the list does not
fit.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(
    r"^## (\d+)\. (.+)\nscript: (.+)\n```diff\n((?:[-+ ].*\n)+)```\ncaught by \(make test(?:-all)?\):(.*)$", re.M
)
NODE_ID = re.compile(r"tests/\w+\.py::\w+(?:\[[^]]*\])?")  # parameters may hold spaces
PASSED, FAILED = 0, 1  # pytest's exit status; anything else is no verdict


@dataclass
class Mutation:
    number: int
    title: str
    scripts: list[str]
    old: str  # whole lines
    new: str
    tests: list[str]  # node ids

    def mutated(self, script: str) -> str:
        """The text of a script with the fault. Raises ValueError."""
        text = "\n" + (ROOT / script).read_text()
        if (count := text.count("\n" + self.old)) != 1:
            raise ValueError(f"{self.number}: its lines stand in {script} {count} times")
        return text.replace("\n" + self.old, "\n" + self.new)[1:]


def read_mutations() -> list[Mutation]:
    found = []
    for number, title, scripts, block, tests in ENTRY.findall((ROOT / "tests" / "mutations.md").read_text()):
        lines = block.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        found.append(Mutation(int(number), title, scripts.split(), old, new, NODE_ID.findall(tests)))
    return found


def misfits(mutations: list[Mutation]) -> list[str]:
    """What in the list does not fit the scripts and the tests."""
    found = [] if [one.number for one in mutations] == list(range(1, 31)) else ["the list is not numbered from 1 to 30"]
    for mutation in mutations:
        try:
            for script in mutation.scripts:
                mutation.mutated(script)
        except ValueError as error:
            found.append(str(error))
        for test in mutation.tests or ["any test"]:
            path, _, name = test.partition("::")
            definition = f"def {name.partition('[')[0]}("
            if not (ROOT / path).is_file() or definition not in (ROOT / path).read_text():
                found.append(f"{mutation.number}: there is no {test}")
    return found


def copy_tree(folder: Path) -> None:
    """The tracked files as they are here, the demo's models, and .venv as a link."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / "demo", folder / "demo", dirs_exist_ok=True)
    (folder / ".venv").symlink_to((ROOT / ".venv").resolve())


def run(mutation: Mutation, is_planted: bool, files: list[str] | None) -> tuple[int, str]:
    """pytest's exit status and output, of the tests that are named, or of all fast ones of files."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_tree(Path(folder))
        for script in mutation.scripts if is_planted else ():
            (Path(folder) / script).write_text(text := mutation.mutated(script))
            compile(text, script, "exec")  # a script that is none proves nothing
        chosen = ["-m", "not slow", *files] if files else ["-x", *mutation.tests]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("numbers", metavar="NUMBER", type=int, nargs="*", help="default: all")
    parser.add_argument("--by", metavar="FILE", action="append", help="run all fast tests of this file instead")
    parser.add_argument("--unchanged", action="store_true", help="plant nothing")
    parser.add_argument("--check", action="store_true", help="run nothing")
    args = parser.parse_args()
    if found := misfits(mutations := read_mutations()):
        print("\n".join(found), file=sys.stderr)
        return 2
    as_hoped, verdicts = (PASSED, ["passed", "FAILED"]) if args.unchanged else (FAILED, ["NOT CAUGHT", "caught"])
    statuses = []
    for mutation in (one for one in mutations if not args.check and one.number in (args.numbers or range(1, 31))):
        began = time.monotonic()
        status, output = run(mutation, not args.unchanged, args.by)
        statuses.append(status)
        verdict = verdicts[status] if status in (PASSED, FAILED) else f"no verdict: pytest ended with {status}"
        print(f"{mutation.number:>2}  {verdict:<10}  {time.monotonic() - began:>4.0f} s  {mutation.title}", flush=True)
        for line in re.findall(r"^(?:FAILED|ERROR).*", output, re.M) if status else ():
            print(f"    {line[:160]}", flush=True)
    return int(any(status != as_hoped for status in statuses))


if __name__ == "__main__":
    sys.exit(main())
