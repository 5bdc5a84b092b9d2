"""Plants the faults of tests/mutations.md, one at a time, in a copy of this tree, and runs the tests named there.

    python tests/mutate.py                      # all of them: an hour on 2 cores
    python tests/mutate.py 1 12                 # some
    python tests/mutate.py --unchanged 1 12     # the same tests without a fault: they have to pass
    python tests/mutate.py --by tests/test_planes.py 7 8    # who of these files notices? All of their tests run
    python tests/mutate.py --check              # does the list still fit the scripts and the tests?

Prints a row per fault; exits with 1 if one of them is not caught, with 2 if the list does not fit.
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
LIST = ROOT / "tests" / "mutations.md"
ENTRY = re.compile(
    r"^## (\d+)\. (.+)\nscript: (.+)\n```diff\n((?:[-+ ].*\n)+)```\ncaught by \((make test|make test-all)\):(.*)$", re.M
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
    suite: str
    tests: list[str]  # node ids

    def mutated(self, script: str) -> str:
        """The text of a script with the fault. Raises ValueError."""
        text = "\n" + (ROOT / script).read_text()
        if (count := text.count("\n" + self.old)) != 1:
            raise ValueError(f"{self.number}: its lines stand in {script} {count} times")
        return text.replace("\n" + self.old, "\n" + self.new)[1:]


def read_mutations() -> list[Mutation]:
    found = []
    for number, title, scripts, block, suite, tests in ENTRY.findall(LIST.read_text()):
        lines = block.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        found.append(Mutation(int(number), title, scripts.split(), old, new, suite, NODE_ID.findall(tests)))
    return found


def misfits(mutations: list[Mutation]) -> list[str]:
    """What in the list does not fit the scripts and the tests."""
    found = [] if [m.number for m in mutations] == list(range(1, 31)) else ["the list is not numbered from 1 to 30"]
    for mutation in mutations:
        try:
            for script in mutation.scripts:
                mutation.mutated(script)
        except ValueError as error:
            found.append(str(error))
        if not mutation.tests:
            found.append(f"{mutation.number}: no test is named")
        for test in mutation.tests:
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


def run_tests(folder: Path, tests: list[str], *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", *options, *tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("numbers", metavar="NUMBER", type=int, nargs="*", help="default: all")
    parser.add_argument("--by", metavar="FILE", action="append", help="run all fast tests of this file instead")
    parser.add_argument("--unchanged", action="store_true", help="plant nothing")
    parser.add_argument("--check", action="store_true", help="run nothing")
    args = parser.parse_args()
    mutations = read_mutations()
    if args.check:
        print("\n".join(found := misfits(mutations)), end="\n" if found else "")
        return 2 if found else 0
    escaped = 0
    for mutation in (mutation for mutation in mutations if mutation.number in (args.numbers or range(1, 31))):
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            copy_tree(Path(folder))
            for script in mutation.scripts if not args.unchanged else ():
                (Path(folder) / script).write_text(text := mutation.mutated(script))
                compile(text, script, "exec")  # a script that is none proves nothing
            options = ["-m", "not slow"] if args.by else ["-x"]
            began = time.monotonic()
            status, output = run_tests(Path(folder), args.by or mutation.tests, *options)
            seconds = time.monotonic() - began
        escaped += status != (PASSED if args.unchanged else FAILED)
        verdict = {PASSED: "NOT CAUGHT", FAILED: "caught"}.get(status, f"NO VERDICT (pytest ended with {status})")
        verdict = {PASSED: "passed", FAILED: "FAILED"}.get(status, verdict) if args.unchanged else verdict
        print(f"{mutation.number:>2}  {verdict:<10}  {seconds:>5.0f} s  {mutation.title}", flush=True)
        for line in re.findall(r"^(?:FAILED|ERROR|SKIPPED).*", output, re.M) or output.splitlines()[-5:]:
            print(f"    {line[:200]}", flush=True)
    return min(1, escaped)


if __name__ == "__main__":
    sys.exit(main())
