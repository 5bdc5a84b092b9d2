"""What the documents say is what the files in results/ hold: every figure, every machine, every command.

results/figures.toml says which figure is which value of which file. No engine. About 2 seconds.
"""

import functools
import json
import re
import subprocess
import tomllib
from collections import defaultdict

import numpy as np
import pytest
from conftest import ROOT

RESULTS = ROOT / "results"
FILES = sorted(path.name for path in RESULTS.glob("*.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
LIST = tomllib.loads((RESULTS / "figures.toml").read_text())

WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
BEGIN = r"(?<![\w.])(?<![A-Za-z]-)"  # of a number, and not of what follows in a name or a version
NUMBER = rf"{BEGIN}(?:\d+(?:\.\d+)?|{'|'.join(WORDS)})(?![a-z])"
UNITS = "s|ms|seconds?|min|minutes?|h|hours?|%|percent|[kMGT]i?B|models|times|x|tokens/s|questions/s|[GM]Hz"
ARXIV = r"(?!\d{4}\.\d{5}\b)"  # an identifier
RELEASE = r"(?<!vLLM\s)(?<!torch\s)(?<!Python\s)"  # what follows one of these is no measurement
# What must be in the list: decimals, numbers before a unit, a "twice", and cells of a table but the first of a row.
MEASUREMENT = re.compile(
    rf"{RELEASE}{BEGIN}{ARXIV}\d+\.\d+(?![\w.]*\w)|{NUMBER}\s?(?:{UNITS})(?!\w)|\btwice\b|(?<=[^\n]\|) +\d+ +(?=\|)"
)
NOT_SHOWN = re.compile(r"`[^`]*`|\]\([^)]*\)")  # commands, and where links lead
MACHINES = re.compile(r"^\| machine \| files \|\n\| --- \| --- \|\n((?:\|.*\n)+)", re.MULTILINE)  # has its own test
PLACE = re.compile(r"\{(?:up)?\}")
FUNCTIONS = {"median": np.median, "min": np.min, "max": np.max, "sum": np.sum, "abs": np.abs, "len": len, "str": str}


class Rows(list):
    """Rows of a result. rows(mode="warm") are those whose fields say so; rows.ttft is what they have there, joined."""

    def __call__(self, **fields) -> "Rows":
        return Rows(row for row in self if all(row[name] == value for name, value in fields.items()))

    def __getitem__(self, name: str) -> "Rows | np.ndarray":
        values = [row[name] for row in self]
        values = [value for item in values for value in (item if isinstance(item, Rows | np.ndarray) else [item])]
        return Rows(values) if values and isinstance(values[0], dict) else np.array(values)

    __getattr__ = __getitem__


def as_rows(value):
    """A file's content with Rows for its lists of objects, and arrays for its lists of numbers."""
    if isinstance(value, dict):
        return {key: as_rows(item) for key, item in value.items()}
    if isinstance(value, list):
        return Rows(map(as_rows, value)) if value and isinstance(value[0], dict) else np.array(value)
    return value


@functools.cache
def read_result(file: str) -> dict:
    return as_rows(json.loads((RESULTS / file).read_text()))


def read_value(expression: str, file: str, row=None) -> float:
    """The one number that an expression of the list means in a file."""
    return float(np.asarray(eval(expression, {"__builtins__": FUNCTIONS}, read_result(file) | {"row": row})).item())


def pattern(text: str) -> re.Pattern:
    """What finds a text of the list, with a group for each figure; any white space stands for any other."""
    parts = re.split(rf"({PLACE.pattern}|\s+)", text)
    return re.compile("".join(place_or_literal(part) for part in parts))


def place_or_literal(part: str) -> str:
    return f"({NUMBER})" if PLACE.fullmatch(part) else r"\s+" if part.isspace() else re.escape(part)


def entries(figures: list[dict]) -> list[tuple[str, list[tuple[str, str]], object]]:
    """(text, (file, expression) of each figure in it, row) of every entry; an entry with `each` is several."""
    found = []
    for entry in figures:
        files = [entry["file"]] * len(entry["values"]) if isinstance(entry["file"], str) else entry["file"]
        assert len(PLACE.findall(entry["text"])) == len(entry["values"]) == len(files) > 0, entry["text"]
        places = list(zip(files, entry["values"], strict=True))
        found += [(entry["text"].replace("{row}", str(row)), places, row) for row in entry.get("each", [None])]
    return found


def quotes(quoted: str, value: float, up: bool = False) -> bool:
    """Whether a figure is the value, rounded to as many decimals as it has; with `up`, rounded up."""
    number = float(WORDS.index(quoted) if quoted in WORDS else quoted)
    step = 10.0 ** -len(quoted.partition(".")[2])
    return -1e-9 <= number - value < step - 1e-9 if up else abs(number - value) <= step / 2 + 1e-9


def wrong_figures(text: str, places: list[tuple[str, str]], row, documents: dict[str, str]) -> list[str]:
    """What a text of the list gets wrong, wherever it stands in the documents."""
    found = [match.groups() for document in documents.values() for match in pattern(text).finditer(document)]
    if not found:
        return [f"stands in none of {', '.join(documents)}"]
    wrong = []
    for (file, expression), place, quoted in zip(places, PLACE.findall(text), zip(*found, strict=True), strict=True):
        value = read_value(expression, file, row)
        wrong += [
            f"{number}, but {expression} in {file} is {value:g}"
            for number in quoted
            if not quotes(number, value, place == "{up}")
        ]
    return wrong


def missing_figures(document: str) -> list[str]:
    """What looks like a measurement in a document and is covered by no entry of the list."""
    texts = [text for text, *_ in entries(LIST["figure"])] + [entry["text"] for entry in LIST["exempt"]]
    covered = [match.span() for text in texts for match in pattern(text).finditer(document)]
    covered += [match.span() for match in MACHINES.finditer(document)]
    shown = NOT_SHOWN.sub(lambda match: "_" * len(match[0]), document)
    return [
        f"line {document.count(chr(10), 0, match.start()) + 1}: {match[0].strip()}"
        for match in MEASUREMENT.finditer(shown)
        if not any(begin <= match.start() and match.end() <= end for begin, end in covered)
    ]


@pytest.mark.parametrize(
    "text, places, row", entries(LIST["figure"]), ids=lambda value: value if type(value) is str else ""
)
def test_figures_are_what_their_files_hold(text, places, row):
    assert wrong_figures(text, places, row, TEXTS) == []


@pytest.mark.parametrize("name", TEXTS)
def test_every_figure_has_its_file(name):
    missing = missing_figures(TEXTS[name])
    assert not missing, f"{name} has figures that are not in results/figures.toml:\n" + "\n".join(missing)


@pytest.mark.parametrize("entry", LIST["exempt"], ids=lambda entry: entry["text"])
def test_what_is_exempt_is_there_and_has_its_reason(entry):
    assert entry["reason"] and any(pattern(entry["text"]).search(document) for document in TEXTS.values())


@pytest.mark.parametrize(
    "line",
    [
        "The first token after 12 s.",
        "The first token after 12\nseconds.",
        "0.42 of stock's time",
        "reads 900 MB/s here",
        "99 % of it",
        "1 GiB more",
        "2-3 s later, 1.5x faster",
        "two models in memory",
        "twice the model",
        "| 7 | 12.5 | |",
        "| stage 7 | 12 | |",
        "      stage 7    47.46 s   'Drorn Peman'",
    ],
)
def test_a_new_figure_is_noticed(line):
    assert missing_figures(f"{TEXTS['README.md']}\n{line}\n")


@pytest.mark.parametrize(
    "line",
    [
        "vLLM 0.32.0 on torch 2.13, Python\n3.11, SQuAD v1.1, Apache-2.0, the 1.1B model, 8x256",
        "`--kv 1.5` and [there](https://arxiv.org/abs/2403.17887): layers 20 to 27",
        "| 1 | every stage, 1 -> 2 -> 3 | |",
    ],
)
def test_what_is_no_figure_is_let_alone(line):
    assert missing_figures(line) == []


@pytest.mark.parametrize(
    "quoted, value, up, right",
    [
        ("0.31", 0.314, False, True),
        ("0.31", 0.316, False, False),
        ("0.31", 0.304, False, False),
        ("0.31", 0.314, True, False),
        ("0.32", 0.314, True, True),
        ("0.33", 0.314, True, False),
        ("2", 2.49, False, True),
        ("2.0", 2.49, False, False),
        ("six", 6, False, True),
        ("7.0", float("nan"), False, False),
    ],
)
def test_precision_of_a_quotation(quoted, value, up, right):
    assert quotes(quoted, value, up) == right


def test_a_wrong_figure_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "result.json").write_text('{"summary": [{"mode": "warm", "ttft": 3.21}, {"mode": "cold", "ttft": 7}]}')
    monkeypatch.setattr("test_results.RESULTS", tmp_path)
    entry = {"text": "{row}: {} s", "each": ["warm", "cold"], "file": "result.json"}
    warm, cold = entries([entry | {"values": ["summary(mode=row).ttft"]}])
    documents = {"here": "warm: 3.2 s, cold: 7 s", "there": "warm:\n3.3 s"}
    assert wrong_figures(*warm, documents) == ["3.3, but summary(mode=row).ttft in result.json is 3.21"]
    assert wrong_figures(*cold, documents) == []
    assert wrong_figures(*cold, {"here": "7 s"}) == ["stands in none of here"]


# ---- what each result carries -----------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_results_say_how_they_were_made(file):
    result = json.loads((RESULTS / file).read_text())
    for name in ("arguments", "versions", "machine"):
        assert isinstance(result.get(name), dict) and result[name], f"{file} carries no {name}"
    commit = result.get("commit", "none")
    assert re.fullmatch("[0-9a-f]{40}", commit), f"{file} is of no commit that one could check out: {commit}"


def test_machine_of_each_result():
    machines = defaultdict(set)
    for file in FILES:
        machine = json.loads((RESULTS / file).read_text())["machine"]
        parts = [machine["cpu"], f"{machine['cores']} cores", f"{machine['memory_gib']} GiB"]
        machines[", ".join(parts + (machine.get("gpus") or ["no GPU"]))].add(file)
    table = MACHINES.search(TEXTS["results/README.md"])
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in table[1].splitlines()] if table else []
    right = "\n".join(f"| {name} | {', '.join(sorted(files))} |" for name, files in machines.items())
    said = {name: set(files.split(", ")) for name, files in rows}
    assert said == machines, f"the table of machines in results/README.md should have these rows:\n{right}"


@pytest.mark.parametrize("file", FILES)
def test_each_result_has_the_command_that_writes_it(file):
    assert re.search(rf"(--json|cp \S+) results/{re.escape(file)}", TEXTS["results/README.md"])


# ---- what leaves a clone clean ----------------------------------------------------------------------


def demo_commands() -> list[str]:
    """The commands of both demos that write results: four of the benchmark, one of the evaluation."""
    targets = ["demo-smollm2", "demo-adapters", "CAN_LIMIT=yes"]
    run = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.replace("\\\n", " ").splitlines()
    commands = [" ".join(line.split()) for line in lines if "--json" in line]
    assert len(commands) == 5
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
    assert len(files) == 7
    assert [file for file in files if not is_ignored(file)] == []
    assert [file for file in files if not is_ignored(file.replace(".json", ".png"))] == []


def test_make_clean_removes_what_make_demo_made():
    run = subprocess.run(["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True)
    folders = {re.search(r"--json (\S+)/", command)[1] for command in demo_commands()}
    assert folders <= set(run.stdout.split())


def test_commands_of_the_demo_are_those_of_its_results():
    """Of those that are kept here."""
    scripts = [
        command.replace(".venv/bin/", "").replace("--json demo/results/", "--json results/")
        for command in demo_commands()
    ]
    kept = [script for script in scripts if (ROOT / re.search(r"--json (\S+)", script)[1]).is_file()]
    assert len(kept) == 3
    assert [script for script in kept if f"`{script}`" not in TEXTS["results/README.md"]] == []
