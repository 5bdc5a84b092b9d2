"""What the scripts have in common: small helpers, copied word for word, since none of them imports another.

No engine. A second: it reads the scripts' source.
"""

import ast
import functools
from collections import defaultdict

import pytest
from conftest import ROOT

SCRIPTS = ("prune_and_split", "train_adapters", "progressive_serve", "bench_coldstart", "eval_triviaqa", "serve_fleet")
COPIED = (
    "UsageError",
    "versions",
    "machine",
    "commit",
    "provenance",
    "positive_int",
    "free_port",
    "check_writable",
    "cached_bytes",
)


@functools.cache
def definitions() -> dict[str, dict[str, str]]:
    """name -> script -> source text of the functions and classes at the top level."""
    found = defaultdict(dict)
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name][script] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("name", COPIED)
def test_copies_are_equal(name):
    copies = definitions()[name]
    assert len(copies) > 1
    assert len(set(copies.values())) == 1, f"{name} differs between {', '.join(copies)}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & {*SCRIPTS} - {script}
