"""tests/gpu_check.py: a step that fails, or does not end, keeps none of the others from running; files arrive whole."""

import json
import tarfile
import threading
import time
from pathlib import Path

import gpu_check
import psutil
import pytest
from conftest import ROOT, run_script
from gpu_check import Step, UsageError, receive, run, run_step


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
    assert [step.name for step in full if not step.makes][:3] == ["machine", "answers", "defaults"]
    made = [None]
    for step in full:
        assert step.needs in made
        made += [step.name] if step.makes else []


def test_rehearsal(tmp_path):
    """Real cold starts: the arguments are what the benchmark takes, and results are where they belong."""
    options = ["run", "--small", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    done = run_script(ROOT / "tests" / "gpu_check.py", *options, "--steps", "machine,layers,planes,eager", timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "eager.json").read_text())
    assert {row["mode"] for row in result["summary"]} == {"baseline", "progressive", "progressive@planes"}


def test_what_another_run_makes_is_waited_for(tmp_path, monkeypatch):
    made = tmp_path / "made"
    table = [
        Step("maker", 9, ["false"], makes=made),
        Step("user", 9, [f"test -e {made}"], needs="maker"),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda *_: table)
    threading.Timer(1.0, made.touch).start()
    archive = tmp_path / "out.tar.gz"
    assert run(tmp_path / "out", tmp_path / "work", True, ["user"], 100.0, archive) == 0
    with tarfile.open(archive) as tar:
        assert {"out/summary.jsonl", "out/user.log"} <= set(tar.getnames())
    made.unlink()
    assert run(tmp_path / "out", tmp_path / "work", True, ["maker"], 100.0) == 1
    assert run(tmp_path / "out", tmp_path / "work", True, ["user"], 100.0) == 1
    last = (tmp_path / "out" / "summary.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["status"] == "needs maker"


def test_what_is_needed_and_not_there():
    """Of two requirements of one package, one asks for an extra; what the machine has brings what it needs itself."""
    chosen = [
        {"name": "vllm", "version": "0.26.0", "requires_dist": ["Torch==2", "web[std]>=1", "tidy; python_version<'3'"]},
        {"name": "blake3", "version": "1", "requires_dist": ["web", "numpy"]},
        {"name": "zstandard", "version": "2"},
        {"name": "web", "version": "3", "requires_dist": ["extra-of-web; extra == 'std'", "none; extra == 'other'"]},
        {"name": "Extra_of.web", "version": "4"},
        {"name": "numpy", "version": "5", "requires_dist": ["of-numpy"]},
    ]
    needed = gpu_check.needed(chosen, {"numpy"})
    assert needed == ["blake3==1", "extra-of-web==4", "vllm==0.26.0", "web==3", "zstandard==2"]


def packed(tmp_path, monkeypatch, room):
    """Both files, of a pip that chooses and installs nothing but vLLM; `room` bytes are left for one."""

    def pip(*options):
        if "--report" in options:
            rows = [{"metadata": {"name": name.partition("==")[0], "version": "1"}} for name in gpu_check.CARRIED]
            Path(options[options.index("--report") + 1]).write_text(json.dumps({"install": rows}))
            return
        site = Path(options[options.index("--target") + 1])
        for name in (gpu_check.KERNELS, "vllm/__init__.py", "vllm/third_party/deep_gemm/large.so", "vllm/_moe_C.so"):
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(name)

    monkeypatch.setattr(gpu_check, "pip", pip)
    monkeypatch.setattr(gpu_check, "tracked_bytes", lambda: 100)
    monkeypatch.setattr(gpu_check, "CALL_BYTES", (1 << 20) + 100 + room)
    (tmp_path / "have").write_text("torch, numpy\n")
    gpu_check.pack(tmp_path / "have", tmp_path / "packed")
    return tmp_path / "packed"


def test_two_files_carry_what_is_used(tmp_path, monkeypatch, capsys):
    out = packed(tmp_path, monkeypatch, 10_000)
    assert sorted(path.name for path in out.iterdir()) == ["kernels.tar.xz", "packages.tar.xz"]
    assert f"receive {out}/kernels.tar.xz" in capsys.readouterr().out
    for name in ("kernels", "packages"):
        receive(out / f"{name}.tar.xz", tmp_path / "site")
    found = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*") if path.is_file()}
    assert {name for name in found if not name.endswith(".pyc")} == {gpu_check.KERNELS, "vllm/__init__.py"}


def test_a_file_fits_beside_the_tree(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"packages.tar.xz has \d+ bytes, and beside the tree a call carries 50"):
        packed(tmp_path, monkeypatch, 50)


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    file = packed(tmp_path, monkeypatch, 10_000) / "packages.tar.xz"
    whole = file.read_bytes()
    for damaged in (whole[:-20], whole[:60] + bytes(8) + whole[68:], b""):
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match="is damaged .*: carry it again"):
            receive(file, tmp_path / "site")
