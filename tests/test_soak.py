"""The short form of `make soak`."""

import json

import pytest
from conftest import ROOT, run_script


def test_short_soak(tmp_path):
    if not (ROOT / "demo" / "checkpoint" / "progressive.json").is_file():
        pytest.skip("demo/checkpoint is not there: make demo/checkpoint/progressive.json")
    out = tmp_path / "soak.json"
    options = ["--starts", "2", "--streams", "16", "--transitions", "30", "--kills", "3", "--json", out]
    done = run_script(ROOT / "tests" / "soak.py", *options, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert not any(found["counts"].values())
    assert [row["kind"] for row in found["starts"]] == ["layers", "planes"]
    assert all(row["transitions"] == 2 and row["checked"] == 16 for row in found["starts"])
    assert found["transitions"]["growth"] < 0.02  # of few transitions; what `make soak` finds is below 1 %
