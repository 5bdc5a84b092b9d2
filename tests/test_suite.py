"""The rules of this suite, as far as the source of its files shows them. No engine. About a second.

Tests that broke one of these rules have failed on busy machines. An exception has its reason on its line, in a comment.
"""

import ast
import functools
import io
import tokenize
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("*.py"))
CLOCKS = {"time.monotonic", "time.perf_counter", "time.time"}
# Seconds are the first or the second argument of these, or are given by name.
WAITS = {"wait": 0, "result": 0, "join": 0, "wait_for": 1, "wait_procs": 1}


def name_of(node: ast.AST) -> str:
    """The last part of a name: sleep, of time.sleep(1)."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def calls(node: ast.AST) -> list[ast.Call]:
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]


def seconds_of(call: ast.Call) -> float | None:
    """The literal limit of a wait, where it has one. 0 is no wait."""
    name, given = name_of(call), {keyword.arg: keyword.value for keyword in call.keywords}
    place = WAITS[name]
    value = given.get("timeout", given.get("seconds", call.args[place] if len(call.args) > place else None))
    number = value.value if isinstance(value, ast.Constant) else None
    return number if isinstance(number, int | float) and not isinstance(number, bool) and number else None


def reads_clock(node: ast.AST) -> bool:
    return any(ast.unparse(call.func) in CLOCKS for call in calls(node))


@functools.cache
def checks() -> set[str]:
    """Functions that assert something or run into a timeout, in any file, and those that call one of them."""
    functions = [node for path in FILES for node in ast.walk(ast.parse(path.read_text())) if is_function(node)]
    called = {id(one): {name_of(call) for call in calls(one)} for one in functions}
    asserting = [one for one in functions if any(isinstance(node, ast.Assert) for node in ast.walk(one))]
    found = {one.name for one in [*asserting, *(one for one in functions if "timeout" in called[id(one)])]}
    return found | {one.name for one in functions if called[id(one)] & found}


def durations(function: ast.AST) -> set[str]:
    """Names of what a function measures: took, after took = time.monotonic() - begin."""
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and reads_clock(node.value)]
    measured = [node for node in assigned if any(isinstance(part, ast.Sub) for part in ast.walk(node.value))]
    return {name_of(target) for node in measured for target in node.targets} - {""}


def findings(text: str, is_test: bool) -> list[str]:
    """What a file does against the rules. Helpers may read clocks and start processes."""
    tree = ast.parse(text)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    explained = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    found = []

    def add(node: ast.AST, what: str) -> None:
        if not explained & set(range(node.lineno, node.end_lineno + 1)):
            found.append(f"line {node.lineno}: {what}")

    said = ast.get_docstring(tree) or ""
    if is_test and not ("second" in said or "minute" in said):
        found.append("line 1: the docstring does not say how long the file takes")
    if is_test and not any(word in said.lower() for word in ("engine", "server", "standby", "cluster")):
        found.append("line 1: the docstring does not say what starts an engine")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: imports {module}" for module in modules if module.startswith("test_")]
        if isinstance(node, ast.Call) and name_of(node) == "sleep" and not is_zero(node):
            add(node, "sleeps")
        if isinstance(node, ast.Call) and name_of(node) in WAITS and (seconds_of(node) or 60) < 60:
            add(node, f"{name_of(node)} gives up after {seconds_of(node):g} s")
    for function in (node for node in ast.walk(tree) if is_test and is_function(node, "test_")):
        measured = durations(function)
        asserts = [node for node in ast.walk(function) if isinstance(node, ast.Assert)]
        for node in asserts:
            if reads_clock(node) or any(name_of(inner) in measured for inner in ast.walk(node)):
                add(node, "asserts how long something took")
        if not asserts and not {name_of(call) for call in calls(function)} & {"raises", "fail", *checks()}:
            found.append(f"line {function.lineno}: {function.name} cannot fail")
        for call in calls(function):
            if name_of(call) == "Popen":
                add(call, "starts a process outside of a fixture")
    return found


def is_zero(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0


def is_function(node: ast.AST, begin: str = "") -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(begin)


def is_program(text: str) -> bool:
    """What tests run, rather than import: it may sleep."""
    return '__name__ == "__main__"' in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_rules_are_kept(path):
    text = path.read_text()
    found = findings(text, path.name.startswith("test_"))
    found = [one for one in found if not is_program(text) or "imports" in one]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("from test_other import Server", "imports test_other"),
        ("time.sleep(1)", "sleeps"),
        ("process.wait(30)", "wait gives up after 30 s"),
        ("wait_for(lambda: told, seconds=20)", "wait_for gives up after 20 s"),
        ("def test_x():\n    assert time.monotonic() - begin < 9", "asserts how long something took"),
        ("def test_x():\n    took = time.monotonic() - begin\n    assert took < 9", "asserts how long something took"),
        ("def test_x():\n    nothing_is_asked()", "test_x cannot fail"),
        ("def test_x():\n    check(subprocess.Popen(command))", "starts a process outside of a fixture"),
    ],
)
def test_what_is_against_a_rule_is_found(line, what):
    (found,) = findings(f'"""Starts an engine. A minute."""\n{line}\n', is_test=True)
    assert found.endswith(what)
    assert len(findings(f'"""Starts an engine."""\n{line}\n', is_test=True)) == 2


@pytest.mark.parametrize(
    "line",
    [
        "time.sleep(1)  # a reason",
        "await_none = asyncio.sleep(0)",
        "process.wait(60)",
        "wait_for(lambda: told, LIMIT)",
        "process.wait(timeout=0)",
        "', '.join(names)",
        "def started():\n    return subprocess.Popen(command)",
        "def test_x():\n    with pytest.raises(ValueError):\n        script.main()",
    ],
)
def test_what_is_within_the_rules_is_let_alone(line):
    assert findings(f'"""Starts an engine. A minute."""\n{line}\n', is_test=True) == []
