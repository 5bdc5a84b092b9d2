"""bench_coldstart.py: what "cold" means is enforced, what is written is what was measured."""

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import BENCH, run_script

import bench_coldstart

IS_ROOT = os.geteuid() == 0
CONTROLLER = any(Path("/sys/fs/cgroup", name).exists() for name in ("blkio", "cgroup.controllers"))


def test_result_of_a_real_run(split_tiny, tmp_path):
    out = tmp_path / "results" / "cold.json"
    done = run_script(BENCH, "--mode", "progressive", "--checkpoint", split_tiny, "--trials", "1", "--json", out)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    (trial,) = result["trials"]
    assert trial["mode"] == "progressive" and trial["cold"] is True
    assert result["summary"]["progressive"]["ttft"] == trial["ttft"] > 0
    assert trial["stage_seconds"].keys() == {"1", "2", "3"}
    assert trial["answers"][-1]["stage"] == 3
    assert trial["answers"][0]["answer"] == trial["answer"] != ""
    assert {"start", "imported", "ready", "active"} <= {event["event"] for event in trial["timeline"]}
    assert trial["command"][:2] == ["python", "progressive_serve.py"]
    assert result["arguments"]["trials"] == 1 and result["arguments"]["checkpoint"] == str(split_tiny)
    assert {"python", "torch", "transformers"} <= result["versions"].keys()
    assert result["machine"]["cores"] >= 1 and result["commit"]
    assert f"{trial['ttft']:.2f}" in done.stdout and str(out) in done.stdout


def test_cache_is_dropped_and_counted(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(3 * mmap.PAGESIZE + 1))
    file.read_bytes()
    if Path(tmp_path).stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("the temporary folder is a tmpfs, whose files are always in memory")
    assert bench_coldstart.cached_bytes(file) == 4 * mmap.PAGESIZE
    bench_coldstart.drop_cache(tmp_path)
    assert bench_coldstart.cached_bytes(file) == 0


def test_checkpoint_that_stays_cached_is_refused(split_tiny, tmp_path):
    """A trial that would start warm must not be counted: here the checkpoint lies in memory altogether."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    folder = Path("/dev/shm") / f"test-bench-{os.getpid()}"
    try:
        subprocess.run(["cp", "-r", str(split_tiny), str(folder)], check=True)
        done = run_script(BENCH, "--checkpoint", folder, "--trials", "1", "--json", tmp_path / "cold.json")
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    assert done.returncode == 2
    assert "model-stage1.safetensors" in done.stderr and "page cache" in done.stderr
    assert not (tmp_path / "cold.json").exists()


@pytest.mark.skipif(not IS_ROOT, reason="control groups need root")
@pytest.mark.skipif(not CONTROLLER, reason="no control groups on this machine")
def test_read_limit_holds_the_server_process(tmp_path):
    try:
        with bench_coldstart.read_limit(tmp_path, 42.0) as procs:
            group = procs.parent
            limits = [group / "blkio.throttle.read_bps_device", group / "io.max"]
            (limit,) = [path.read_text() for path in limits if path.exists()]
            assert bench_coldstart.block_device(tmp_path) in limit and "42000000" in limit
            join = ["sh", "-c", 'echo $$ > "$0" && exec cat /proc/self/cgroup', str(procs)]
            inside = subprocess.run(join, capture_output=True, text=True, check=True).stdout
            assert group.name in inside
    except bench_coldstart.UsageError as error:
        pytest.skip(f"the block-I/O controller is not to be had here: {error}")
    assert not group.exists()


def test_killed_benchmark_takes_its_server_along(split_tiny, tmp_path):
    options = ["--mode", "progressive", "--checkpoint", split_tiny, "--json", tmp_path / "cold.json"]
    bench = subprocess.Popen([sys.executable, str(BENCH), *map(str, options)], stderr=subprocess.DEVNULL)
    try:
        while not (servers := psutil.Process(bench.pid).children(recursive=True)):
            assert bench.poll() is None
            time.sleep(0.05)
        bench.terminate()
        assert bench.wait(60) == 143
        assert psutil.wait_procs(servers, timeout=30)[1] == []
    finally:
        bench.kill()


def test_server_that_fails_is_reported_with_its_log(split_tiny, tmp_path):
    out = tmp_path / "cold.json"
    options = ["--mode", "progressive", "--trials", "1", "--server-args=--hold-stage 9", "--json", out]
    done = run_script(BENCH, "--checkpoint", split_tiny, *options)
    assert done.returncode == 1
    assert "exited with code 2 before its first token" in done.stderr
    assert "--hold-stage 9" in done.stderr  # the server's own last words
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--checkpoint", "/no/such/checkpoint"], "/no/such/checkpoint"),
        (["--checkpoint", "{checkpoint}", "--json", "/proc/no/such.json"], "/proc/no/such.json"),
        (["--trials", "0"], "--trials 0"),
        (["--mode", "fast"], "fast"),
    ],
)
def test_bad_arguments(arguments, named, split_tiny, tmp_path):
    arguments = [argument.format(checkpoint=split_tiny) for argument in arguments]
    done = run_script(BENCH, *arguments, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 2
    assert list((tmp_path / "tmp").iterdir()) == []
    assert named in done.stderr


def test_summary_is_made_of_medians():
    trials = [{"mode": "baseline", "ttft": ttft} for ttft in (9.0, 30.0, 10.0)]
    trials += [{"mode": "progressive", "ttft": ttft, "stage_seconds": {"1": ttft - 1}} for ttft in (4.0, 5.0, 90.0)]
    summary = bench_coldstart.summarise(trials)
    assert summary["baseline"] == {"trials": 3, "ttft": 10.0}
    assert summary["progressive"] == {"trials": 3, "ttft": 5.0, "stage1": 4.0}
    assert summary["ttft_ratio"] == 0.5


def test_help_is_readable_on_80_columns():
    done = run_script(BENCH, "--help", COLUMNS="80")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
