"""tests/gpu_check.py: steps that fail, or do not end, keep none of the others from running; pieces come in order."""

import json
import sys
import tarfile
import time

import gpu_check
import psutil
import pytest
from conftest import ROOT, run_script
from gpu_check import Step, UsageError, receive, run, run_step, sha256


def test_a_step_that_does_not_end_is_stopped_with_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "STOP_SECONDS", 1.0)
    begin = time.monotonic()
    found = run_step(Step("long", 60, ["sleep 987 & trap '' TERM; echo began; sleep 987"]), tmp_path, 2.0)
    assert found["status"] == "stopped" and found["end"][-1] == "began" and time.monotonic() - begin < 30
    left = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "987"]]
    assert left == []


def test_steps_go_on_after_a_failure(tmp_path, monkeypatch, capsys):
    table = [
        Step("first", 9, ["echo well", "exit 3", "echo not reached"]),
        Step("second", 9, ["true"], needs="first"),
        Step("third", 9, [f"echo result > {tmp_path / 'third.json'}"]),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda *_: table)
    assert run(tmp_path / "out", tmp_path / "work", True, None, 100.0) == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "summary.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == [3, "needs first", 0]
    assert "not reached" not in (tmp_path / "out" / "first.log").read_text().split("\n")
    assert (tmp_path / "third.json").read_text() == "result\n"
    assert run(tmp_path / "out", tmp_path / "work", True, ["third"], 1.0) == 1  # it would have too little time
    with pytest.raises(UsageError, match="--steps fourth: the steps are first, second, third"):
        run(tmp_path / "out", tmp_path / "work", True, ["fourth"], 100.0)


def test_the_steps_of_a_gpu_and_of_the_rehearsal_are_the_same(tmp_path):
    full, small = (gpu_check.steps(tmp_path, tmp_path, small) for small in (False, True))
    assert [step.name for step in full] == [step.name for step in small]
    assert [step.name for step in full][:2] == ["machine", "answers"]
    made = {step.name for step in full}
    assert all(step.needs is None or step.needs in made for step in full)


def test_rehearsal(tmp_path):
    """Real cold starts: the arguments are what the benchmark takes, and results are where they belong."""
    options = ["run", "--small", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    done = run_script(ROOT / "tests" / "gpu_check.py", *options, "--steps", "machine,layers,planes,eager", timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "eager.json").read_text())
    assert {row["mode"] for row in result["summary"]} == {"baseline", "progressive", "progressive@planes"}


def pieces_of(folder, number=3):
    """A tar cut into pieces, as offline_wheels.py does it."""
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "none.txt").write_text("x" * 1000)
    with tarfile.open(folder / "whole", "w") as tar:
        tar.add(folder / "wheels", "wheels")
    data = (folder / "whole").read_bytes()
    size = -(-len(data) // number)
    pieces = [folder / f"piece{index}" for index in range(number)]
    for index, piece in enumerate(pieces):
        piece.write_bytes(data[index * size : (index + 1) * size])
    rows = [{"name": piece.name, "bytes": piece.stat().st_size, "sha256": sha256(piece)} for piece in pieces]
    (folder / "order.json").write_text(json.dumps(rows))
    return pieces


def test_pieces_fit_beside_the_tree(tmp_path, monkeypatch):
    wheels, out = tmp_path / "offline_wheels.py", tmp_path / "pieces"
    wheels.write_text("import sys; from pathlib import Path; Path(sys.argv[4], 'piece0').write_bytes(b'x' * 60)")
    out.mkdir()
    monkeypatch.setattr(gpu_check, "WHEELS", wheels)
    monkeypatch.setattr(gpu_check, "tracked_bytes", lambda: 100)
    monkeypatch.setattr(gpu_check, "CALL_BYTES", (1 << 20) + 159)
    with pytest.raises(UsageError, match="--piece-mib 58: a call carries 64 MiB"):
        gpu_check.pack(tmp_path / "have", out, 58)
    monkeypatch.setattr(gpu_check, "CALL_BYTES", (1 << 20) + 160)
    gpu_check.pack(tmp_path / "have", out, 58)
    assert json.loads((out / "order.json").read_text()) == [
        {"name": "piece0", "bytes": 60, "sha256": sha256(out / "piece0")}
    ]


def test_pieces_come_in_order_and_whole(tmp_path, monkeypatch):
    installed = []
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda command, **_: installed.append(command))
    pieces, tar, site = pieces_of(tmp_path / "pieces"), tmp_path / "got.tar", tmp_path / "site"
    with pytest.raises(UsageError, match="piece1 comes after"):
        receive(pieces[1], tar, site)
    receive(pieces[0], tar, site)
    with pytest.raises(UsageError, match="begin again with piece0"):
        receive(pieces[0], tar, site)
    whole = pieces[1].read_bytes()
    pieces[1].write_bytes(whole[:-1] + b"?")
    with pytest.raises(UsageError, match="is damaged"):
        receive(pieces[1], tar, site)
    pieces[1].write_bytes(whole)
    receive(pieces[1], tar, site)
    assert installed == []
    receive(pieces[2], tar, site)
    assert (tmp_path / "got" / "wheels" / "none.txt").read_text() == "x" * 1000
    assert installed[0][:3] == [sys.executable, "-m", "pip"] and str(site) in installed[0]
