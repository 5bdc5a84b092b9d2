"""tests/gpu_check.py: a step that fails, or does not end, keeps none of the others from running; files arrive whole.

No engine, but in the rehearsal, which `make test-all` runs. About 4 seconds.
"""

import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import psutil
import pytest
from conftest import ROOT, run_script
from gpu_check import Step, UsageError, receive, run, run_step
from servers import wait_for

import bench_coldstart
import prune_and_split


def test_a_step_that_does_not_end_is_stopped_with_its_processes(tmp_path, monkeypatch):
    class Began(subprocess.Popen):
        """The limit begins once the step has: a busy machine may start a shell later than that."""

        def wait(self, timeout=None):
            wait_for(lambda: "\nbegan\n" in (tmp_path / "long.log").read_text())
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Began)
    monkeypatch.setattr(gpu_check, "STOP_SECONDS", 0.1)
    sleep = ["sleep", f"{10**6 + os.getpid()}"]  # as nobody else sleeps here
    commands = ["{0} & trap '' TERM; echo began; {0}".format(" ".join(sleep))]
    found = run_step(Step("long", 60, commands), tmp_path, 0.1)
    assert found["status"] == "stopped" and found["end"][-1] == "began"
    wait_for(lambda: all(process.info["cmdline"] != sleep for process in psutil.process_iter(["cmdline"])))


def test_steps_go_on_after_a_failure(tmp_path, monkeypatch, capsys):
    table = [
        Step("first", 300, ["echo well", "exit 3", "echo not reached"]),
        Step("second", 300, ["true"], needs="first"),
        Step("third", 300, [f"echo result > {tmp_path / 'third.json'}"]),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda *_: table)
    assert run(tmp_path / "out", tmp_path / "work", True, None, 900.0) == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "summary.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == [3, "needs first", 0]
    assert "not reached" not in (tmp_path / "out" / "first.log").read_text().split("\n")
    assert (tmp_path / "third.json").read_text() == "result\n"
    assert run(tmp_path / "out", tmp_path / "work", True, ["third"], 1.0) == 1  # it would have too little time
    assert json.loads((tmp_path / "out" / "summary.jsonl").read_text().splitlines()[-1])["status"] == "no time left"
    with pytest.raises(UsageError, match="--steps fourth: the steps are first, second, third"):
        run(tmp_path / "out", tmp_path / "work", True, ["fourth"], 900.0)


def test_the_steps_of_a_gpu_and_of_the_rehearsal_are_the_same(tmp_path):
    full, small = (gpu_check.steps(tmp_path, tmp_path, small) for small in (False, True))
    assert [step.name for step in full] == [step.name for step in small]
    assert [step.name for step in full if not step.makes][:3] == ["machine", "answers", "defaults"]
    made = [None]
    for step in full:
        assert step.needs in made
        made += [step.name] if step.makes else []


@pytest.mark.parametrize("small", [False, True], ids=["gpu", "rehearsal"])
def test_commands_are_what_scripts_take(small, tmp_path, monkeypatch):
    """The scripts take the arguments of the steps, and every test that a step names is there."""
    scripts = {"bench_coldstart.py": bench_coldstart, "prune_and_split.py": prune_and_split}
    words = [shlex.split(command) for step in gpu_check.steps(tmp_path, tmp_path, small) for command in step.commands]
    for name, script in scripts.items():
        found = [command[command.index(name) :] for command in words if name in command]
        assert len(found) > 1
        for arguments in found:
            monkeypatch.setattr(sys, "argv", arguments)
            script.parse_args()  # exits where one is wrong
    tests = [command for command in words if "pytest" in command]
    assert len(tests) == 3
    for *_, file, _, names in tests:
        text = (ROOT / file).read_text()
        assert [name for name in names.split() if name not in ("and", "or") and name not in text] == []


@pytest.mark.slow
@pytest.mark.server
def test_rehearsal(tmp_path):
    """Real cold starts: the benchmark does what the steps ask of it, and results are where they belong."""
    options = ["run", "--small", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    done = run_script(ROOT / "tests" / "gpu_check.py", *options, "--steps", "machine,layers,planes,eager", timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "eager.json").read_text())
    assert {row["mode"] for row in result["summary"]} == {"baseline", "progressive", "progressive@planes"}


def test_what_another_run_makes_is_waited_for(tmp_path, monkeypatch):
    made = tmp_path / "made"
    table = [
        Step("maker", 300, ["false"], makes=made),
        Step("user", 300, [f"test -e {made}"], needs="maker"),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda *_: table)
    # It is made while it is waited for, whenever that is.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: made.touch())
    monkeypatch.setattr(gpu_check, "time", clock)
    archive = tmp_path / "out.tar.gz"
    assert run(tmp_path / "out", tmp_path / "work", True, ["user"], 900.0, archive) == 0
    with tarfile.open(archive) as tar:
        assert {"out/summary.jsonl", "out/user.log"} <= set(tar.getnames())
    made.unlink()
    assert run(tmp_path / "out", tmp_path / "work", True, ["maker"], 900.0) == 1
    assert run(tmp_path / "out", tmp_path / "work", True, ["user"], 900.0) == 1
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
