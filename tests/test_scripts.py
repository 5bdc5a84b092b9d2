"""What the scripts have in common: small helpers, copied word for word, since none of them imports another.

No engine. A second: it reads the scripts' source.
"""

import argparse
import ast
import functools
import json
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

import train_adapters

SCRIPTS = ("prune_and_split", "train_adapters", "progressive_serve", "bench_coldstart", "eval_triviaqa", "serve_fleet")
COPIED = (
    "UsageError",
    "versions",
    "machine",
    "commit",
    "SETTINGS",
    "MASK",
    "SECRET",
    "SECRET_TEXT",
    "masked",
    "masked_words",
    "provenance",
    "positive_int",
    "api_key",
    "free_port",
    "check_writable",
    "WEIGHT_SUFFIXES",
    "INDEX",
    "is_side_file",
    "ROTARY_TABLE",
    "LAST",
    "MAX_LOSS",
    "MAX_WEIGHT_ERROR",
    "first_to_answer",
    "EXACT",
    "cached_bytes",
)


@functools.cache
def definitions() -> dict[str, dict[str, str]]:
    """name -> script -> source text of the functions, classes and constants at the top level."""
    found = defaultdict(dict)
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id][script] = ast.get_source_segment(text, node)
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


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("--api-key KEY --dtype float32", "--api-key '***' --dtype float32"),
        ("--api-key=KEY --dtype float32", "'--api-key=***' --dtype float32"),
        ("--api_key 'a KEY' KEY --dtype float32", "--api_key '***' '***' --dtype float32"),
        ("--hf-token=a\\ KEY --dtype float32", "'--hf-token=***' --dtype float32"),
        ("--ssl-keyfile-password KEY", "--ssl-keyfile-password '***'"),
        ("""--config '{"api_key": "KEY", "size": 1}'""", """--config '{"api_key": ***, "size": 1}'"""),
        ("--watermark-config.key KEY", "--watermark-config.key '***'"),
        ("VLLM_API_KEY=KEY", "VLLM_API_KEY=***"),
        ("http://me:KEY@host/v1", "http://***@host/v1"),
        ("https://host/v1?a=1&token=KEY&b=2", "https://host/v1?a=1&token=***&b=2"),
        ("Authorization: Bearer KEY", "Authorization: Bearer ***"),
        (["--api-key", "KEY", "KEY", "--seed", 1], ["--api-key", "***", "***", "--seed", 1]),
        ({"more": {"password": "KEY"}, "hf_token": None}, {"more": {"password": "***"}, "hf_token": None}),
    ],
)
def test_secrets_are_masked(given, written):
    assert train_adapters.masked(given) == written


@pytest.mark.parametrize(
    "text",
    [
        "--max-num-batched-tokens 8 --tokenizer t --skip-tokenizer-init --ssl-keyfile f --allow-credentials --seed 1",
        """--hf-overrides '{"eos_token_id": 2}'""",
        "Where is the key? It's here: at http://host:80/a@b",
        "",
    ],
)
def test_what_is_no_secret_is_written_as_it_is(text):
    assert train_adapters.masked(text) == text


def test_settings_are_named_and_none_is_a_secret(monkeypatch):
    """What begins like one of them is not written down."""
    for name in ("VLLM_API_KEY", "VLLM_OTHER", "OMP_OTHER", "HF_TOKEN", "S3_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "KEY")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    found = train_adapters.provenance(argparse.Namespace(server_args="--api-key KEY", checkpoint=Path("CKPT")))
    assert found["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert found["arguments"]["checkpoint"] == "CKPT"
    assert "KEY" not in json.dumps(found)
