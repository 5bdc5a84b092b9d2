#!/usr/bin/env python3
"""Serve progressive checkpoints from many machines, from zero: engines start, grow, move and end with the load.

One OpenAI endpoint for one or more checkpoints of prune_and_split.py. No engine runs until a request comes; the request
waits while one starts where it will answer first, and is answered by the first stage that may. What runs is
progressive_serve.py, which lies beside this file; who starts, counts, checks and ends its processes on all machines is
Ray Serve.

    client --HTTP--> ingress ------------------ HTTP, tokens ------------------> engine (progressive_serve.py)
                       |  lease: "I use one of your places"                        ^ starts, ends, dies with
                       '------------------ Ray Serve: routes, counts, scales ---> replica        node agent: standby,
                                                                                                 what lies where

- A replica is a Serve deployment that owns one engine. A request leases a place of it: an async generator that says
  where the engine listens, and stays open until the answer has ended. So Serve counts requests and scales by them, and
  no token passes through Ray.
- From zero a replica takes Serve seconds. The ingress asks the agent of the node for the engine at once, and uses it as
  soon as it listens; the replica owns it when it comes, and so does its successor, should it die. (Where a node has
  several GPUs the engine waits for the replica, to which Ray says which is its own.)
- Placement is routing. Each model on each node is a Serve application of its own, bound to the node by a label. For
  every request the ingress estimates for each node the seconds until an answer can begin (an engine that runs, one that
  is starting, or a new one: launch, and then initialisation beside reading, from the page cache or the disk), and
  leases from the application of the best. The estimate is corrected by what starts have taken.
- Where a node is drained, or an engine or its node dies, a stream goes on elsewhere, at no lower stage than its request
  may have: the ingress keeps its token ids, and the next engine computes prompt and tokens so far, and continues. In a
  planned move it does so beforehand. What cannot be continued exactly (structured output, n > 1, penalties, seeds,
  tools, reasoning) waits for its end where the move is planned, and gets a clear error where an engine has died. An
  answer of which nothing has been sent yet is asked for again.
- An engine that Serve has no more use for takes no new requests, and ends after those that it answers.

Commands:
    python serve_fleet.py demo/smollm2-planes demo/checkpoint       # this machine; a model is named by its folder
    python serve_fleet.py CKPT --address auto --max-replicas 2      # a Ray cluster; CKPT lies on each node that shall
    ray drain-node --node-id ID --reason DRAIN_NODE_REASON_PREEMPTION --deadline-remaining-seconds 60
    python serve_fleet.py CKPT --write-config fleet.yaml && PYTHONPATH=. serve deploy fleet.yaml
    curl localhost:8000/v1/models; curl localhost:8000/fleet        # models; nodes, engines, stages, queues

Every option that is not listed by --help goes to progressive_serve.py, and from there to vLLM.
    GET /fleet, GET /fleet.html     nodes, engines, stages, requests, as JSON and as a page
    GET /metrics                    fleet_*, for Prometheus
    429 with Retry-After            more requests are held than --hold-limit
    X-Progressive-Min-Stage, "min_stage"    as in progressive_serve.py: this request waits for that stage, a number or
                                            "last"

Engines of the ingress' own machine listen at 127.0.0.1. Each wants a random key, which lies in the environment of its
process and which only the ingress knows; what clients need is --api-key.

1,000 nodes and 100 models: the ingress would choose in 8 ms, 130 requests a second on one core, and ask 1,000 agents
twice a second for 15 MB; it would have to choose among some nodes only, and hear of changes alone. But an application
of each model on each node would be 100,000, all of which Serve's controller looks at in each of its rounds, and adding
one takes 1 to 3 s: a fleet of that size is several of these, of some dozen nodes each, behind a load balancer. (Rate
and bytes: tests/fleet_bench.py, part `choice`.)
"""

import argparse
import asyncio
import contextlib
import ctypes
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import mmap
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

try:
    import ray
    from ray import cloudpickle, serve
except ImportError as missing:
    print(f"error: Ray Serve is not installed ({missing}): pip install 'ray[serve]==2.60.0'", file=sys.stderr)
    sys.exit(2)
import aiohttp
from aiohttp import web

logger = logging.getLogger("ray.serve")

# ---- constants (every process) ----------------------------------------------------------------------

NAMESPACE = "progressive-fleet"  # of the agents' names
INGRESS = "fleet"  # name of the ingress' application
SERVER = "progressive_serve.py"
FORMAT_VERSIONS = (1, 2)  # of progressive.json: layers, planes
URI_SCHEMES = ("s3://", "gs://")
OWN_OPTIONS = ("--host", "--port", "--served-model-name", "--from-standby", "--standby", "--uds")  # the fleet's
ANSWERS = ("/v1/completions", "/v1/chat/completions")
STAGE_HEADER, MIN_STAGE_HEADER, MIN_STAGE = "X-Progressive-Stage", "X-Progressive-Min-Stage", "min_stage"
LAST = "last"  # a stage: the full model's, however many there are
EXACT = "progressive_exact"  # of an answer: whether all of its tokens are the full model's
KEY_VARIABLE = "VLLM_API_KEY"
LOOPBACK = "127.0.0.1"
PR_SET_PDEATHSIG = 1  # of prctl(2)
ATTEMPTS = 3  # nodes on which a request is tried
RETRY_SECONDS = 10.0  # after which a client is told to try again, where nobody knows better
STARTS_KEPT = 200  # of which GET /fleet tells
POLL_SECONDS = 0.5  # how often the ingress asks the agents, and these their engines
ANSWER_SECONDS = 2.0  # that an agent has for that
GONE_SECONDS = 5.0  # for which nothing listens where Ray's control store was, after which it has ended
ALONE_SECONDS = 300.0  # without a question of the ingress, after which an agent ends, with all that it runs
LOST_SECONDS = 8.0  # without an answer of its agent, after which a node's streams go on elsewhere
REQUEST_BYTES = 64 << 20
EVENT_BYTES = 4 << 20  # of a stream; the first has the ids of the prompt
FEW_TOKENS = 16  # that may be missing at the end of a planned move: less than what one step computes
MOVE_ROUNDS = 4  # of computing beforehand
RETIRE_SECONDS = 300.0  # that an engine which is not needed any more has for those whom it answers
STOP_SECONDS = 30  # that an engine has for what is left of that, and then to end
KILL_SECONDS = 5.0  # after which it is killed
LONG_POLL_SECONDS = 20.0
SCALE_SECONDS = 0.5  # how often Serve's handles and replicas tell its controller what there is to do
SCALE_SOONER = {
    f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(SCALE_SECONDS) for who in ("HANDLE", "REPLICA")
}
MINCORE_SECONDS = 5.0  # how often an agent looks what is in the page cache
PROBE_BYTES = 64 << 20  # that an agent reads to see how fast a disk is
# Where nothing has been measured yet: bytes per second, and seconds.
CACHE_SPEED, DISK_SPEED, REMOTE_SPEED = 4e9, 3e8, 1e8
LAUNCH, LISTENING_FROM_STANDBY, LISTENING, FIRST_TOKEN = 4.0, 2.5, 8.0, 0.3
FAILED_SECONDS = 60.0  # after which a node is tried again like others on which an engine has not started
RECLAIM_SECONDS = 2.0  # until an idle engine of another model has made room
SERVICE_SECONDS = 10.0  # of a request
COMPLETION_TOKENS = 16  # of a completion that does not say how many: vLLM's default
BROKEN_CHARACTER = "\ufffd"  # as which the first bytes of one are decoded
# What a request may say and still be continued by another engine as this one would have: everything else is refused to.
CONTINUABLE = {
    *("model", "prompt", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "min_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "user"),
    *("include_stop_str_in_output", "spaces_between_special_tokens", "logprobs", "top_logprobs", "logit_bias"),
    *("return_token_ids", "add_generation_prompt", "chat_template_kwargs", "add_special_tokens", "priority"),
}
USUAL = {"n": 1, "best_of": 1, "seed": None, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
USUAL |= {"echo": False, "suffix": None, "tools": None, "tool_choice": None, "response_format": {"type": "text"}}


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


class UnreachableError(Exception):
    """What was there has gone."""


class Refused(Exception):
    """What a client gets instead of an answer."""

    def __init__(self, status: int, text: str, retry_after: float | None = None):
        super().__init__(text)
        self.status, self.retry_after = status, retry_after

    def body(self) -> dict:
        kind = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}
        kind |= {500: "InternalServerError"}
        error = {"message": str(self), "type": kind.get(self.status, "ServiceUnavailableError")}
        return {"error": {**error, "param": None, "code": self.status}}


@dataclass(frozen=True)
class Settings:
    """What a fleet was asked for. Travels to every process, and is the argument of `serve deploy`."""

    models: dict[str, str]  # name -> checkpoint
    server: str = SERVER  # the script of the engines, on each node
    options: tuple[str, ...] = ()  # of each engine
    host: str = LOOPBACK
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)  # of clients
    api_key_variable: str | None = None  # of the head's environment, where the key is in that, and not here
    max_replicas: int = 8  # of a model on one node
    room: int = 32  # requests that an engine answers at a time
    idle: float = 60.0  # seconds after its last request that an engine goes on
    hold_limit: int = 256  # requests of a model that wait for an engine
    start_timeout: float = 600.0  # seconds that an engine may take to listen
    min_stage: int | str | None = None
    standby: bool = True
    num_cpus: float = 1.0  # of one engine, by Ray's accounts
    num_gpus: float = 0.0

    def version(self) -> str:
        """Agents and replicas are replaced where this changes, and only there: what concerns an engine."""
        concerns = [self.models, self.server, self.options, self.start_timeout, self.min_stage]
        concerns += [self.standby, self.num_cpus, self.num_gpus]
        return hashlib.sha256(json.dumps(concerns).encode()).hexdigest()[:16]


def stage_number(stage: int | str | None, last: int) -> int:
    """Of a stage as a request or an option names it; None: the first that answers."""
    return last if stage == LAST else stage or 1


def application(model: str, node: str) -> str:
    return f"{INGRESS}-{model}-{node}"


def agent_name(settings: Settings, node: str) -> str:
    return f"agent-{node}-{settings.version()}"


def end_with_this_process() -> None:
    """In a child, before it begins: the kernel ends it with the thread that has forked it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


# ---- checkpoint: bytes of each stage, and what of them is at hand (agent) ---------------------------


def is_uri(checkpoint: str | Path) -> bool:
    return str(checkpoint).startswith(URI_SCHEMES)


def read_text(checkpoint: str, name: str) -> str:
    """A small file of a checkpoint; from an object store by runai-model-streamer, as vLLM does. Raises UsageError."""
    try:
        if not is_uri(checkpoint):
            return (Path(checkpoint) / name).read_text(encoding="utf-8-sig")
        from runai_model_streamer import pull_files

        with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
            pull_files(checkpoint, folder, allow_pattern=[f"*{name}"])
            return (Path(folder) / name).read_text(encoding="utf-8-sig")
    except ImportError as error:
        raise UsageError(f"{checkpoint} needs: pip install runai-model-streamer[s3,gcs] ({error})") from error
    except Exception as error:  # of whatever client library the store has
        raise UsageError(f"{checkpoint} is no progressive checkpoint here ({type(error).__name__})") from error


def read_stages(checkpoint: str) -> tuple[list[list[str]], list[int]]:
    """(files, bytes) that each stage adds. Raises UsageError."""
    try:
        manifest = json.loads(read_text(checkpoint, "progressive.json"))
        if manifest["format_version"] not in FORMAT_VERSIONS:
            raise UsageError(
                f"{checkpoint}: format_version {manifest['format_version']!r}, known are {FORMAT_VERSIONS}"
            )
        stages = manifest["stages"]
        files = [[file["name"] for file in stage["files"]] for stage in stages]
        return files, [sum(file["bytes"] for file in stage["files"]) for stage in stages]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{checkpoint} is no progressive checkpoint here ({type(error).__name__})") from error


def read_max_tokens(checkpoint: str, options: Collection[str]) -> int | None:
    """Of a chat that does not say how many: what vLLM reads from the checkpoint, where no option says otherwise."""
    if any(option.startswith(("--generation-config", "--override-generation-config")) for option in options):
        return None
    with contextlib.suppress(UsageError, ValueError):  # it has none
        return json.loads(read_text(checkpoint, "generation_config.json")).get("max_new_tokens")
    return None


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


def disk_speed(path: Path) -> float | None:
    """Bytes per second at which the end of a file is read past the page cache; None where that cannot be done."""
    length = min(PROBE_BYTES, path.stat().st_size) & -mmap.PAGESIZE
    with contextlib.suppress(OSError), mmap.mmap(-1, max(length, mmap.PAGESIZE)) as place:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            begin, offset = time.perf_counter(), (path.stat().st_size - length) & -mmap.PAGESIZE
            if length and (read := os.preadv(file, [place], offset)):
                return read / (time.perf_counter() - begin)
        finally:
            os.close(file)
    return None


# ---- estimate: which node answers first (ingress; pure) ---------------------------------------------


@dataclass
class Engine:
    """An engine that runs, or is starting, as its node's agent sees it."""

    id: str
    model: str
    url: str
    pid: int
    owned: bool = False  # by a replica of Serve
    ending: bool = False  # it answers whom it has begun to answer, and nobody else
    age: float = 0.0  # seconds since its spawn
    stage: int = 0  # that answers
    num_stages: int = 0
    seconds: dict[int, float] = field(default_factory=dict)  # stage -> until it is likely to answer
    key: str = field(default="", repr=False)  # that it wants
    assumed: bool = False  # whether the ingress has taken the stage for reached, because it listens

    def seconds_until(self, stage: int, start: float) -> float:
        """`start`: what a start takes, for one of which no more is known than its age."""
        if stage <= self.stage:
            return 0.0
        begun = max(0.0, start - self.age)
        return self.seconds.get(stage, begun) if self.stage else begun  # before stage 1 no rate is known


@dataclass
class ModelOnNode:
    """A model as one node sees it: what a start would read there, and whether it can be served there at all."""

    sizes: list[int] = field(default_factory=list)  # bytes that each stage adds
    cached: list[int] = field(default_factory=list)  # of these, what is in the page cache
    min_stage: int = 1  # that answers, where a request does not say more
    remote: bool = False  # whether the rest lies in an object store, not on a disk of the node
    speed: float = DISK_SPEED  # bytes per second from there
    max_tokens: int | None = None  # of a chat that does not say how many
    problem: str | None = None  # why it cannot be served here
    failures: int = 0  # starts that have failed here, since the last one that has not
    failed_ago: float = 0.0  # seconds since the last of them
    reason: str | None = None  # why it has failed


@dataclass
class Node:
    """A node as its agent has described it."""

    id: str
    address: str
    slots: int  # engines for which it has resources
    listening: float  # seconds that an engine takes from its spawn until it listens
    standby: bool = False
    ahead: bool = False  # whether engines start before the replicas that are to own them
    launch: float = 0.0  # seconds from a request until the spawn of an engine
    models: dict[str, ModelOnNode] = field(default_factory=dict)
    engines: list[Engine] = field(default_factory=list)

    def of(self, model: str) -> list[Engine]:
        """The engines of a model that a request may come to."""
        return [engine for engine in self.engines if engine.model == model and not engine.ending]


@dataclass
class Demand:
    """What the ingress has asked of one application."""

    leases: int = 0  # that it holds or waits for
    waiting_since: float | None = None  # when the first of those that have no engine yet asked for one


def seconds_to_start(node: Node, model: str, stage: int) -> float:
    """From a request until an engine that is started for it answers at `stage`: it initialises while bytes arrive."""
    where = node.models[model]
    cached = sum(where.cached[:stage])
    reading = cached / CACHE_SPEED + max(0, sum(where.sizes[:stage]) - cached) / where.speed
    return node.launch + max(node.listening, reading) + FIRST_TOKEN


def seconds_to_answer(
    node: Node, model: str, stage: int, demands: dict[str, Demand], settings: Settings, now: float, service: float
) -> float:
    """From a request of now until an answer of `model` at `stage` can begin on this node; infinite: never."""
    where, running, demand = node.models.get(model), node.of(model), demands[model]
    if where is None or where.problem or stage > len(where.sizes):
        return math.inf
    start = seconds_to_start(node, model, stage)
    if demand.leases < settings.room * len(running):
        return min(engine.seconds_until(stage, start) for engine in running)
    needed = math.ceil((demand.leases + 1) / settings.room)
    if demand.waiting_since is not None and needed <= math.ceil(demand.leases / settings.room):
        return max(0.0, start - (now - demand.waiting_since))  # together with those who wait for that one already
    served = service * (demand.leases + 1 - settings.room * len(running)) / settings.room
    place = served / len(running) if running else math.inf  # when one of those who are answered has ended
    if needed <= settings.max_replicas:
        others = [engine for engine in node.engines if engine.model != model or engine.ending]
        # Of each model what runs, or has been asked for and will.
        models = {*node.models, *(engine.model for engine in others)}
        expected = (max(len(node.of(name)), math.ceil(demands[name].leases / settings.room)) for name in models)
        if sum(expected) < node.slots - sum(engine.ending for engine in node.engines):
            place = min(place, start)
        elif any(engine.ending or demands[engine.model].leases == 0 for engine in others):
            place = min(place, start + RECLAIM_SECONDS)
        elif others:
            place = min(place, start + service)
    return place


def choose(
    nodes: list[Node],
    model: str,
    stage: int | str | None,
    demands: dict[str, dict[str, Demand]],
    settings: Settings,
    now: float,
    service: float = SERVICE_SECONDS,
) -> tuple[Node, float] | None:
    """The node where an answer begins first, and after how many seconds; None where it cannot be had.

    Of nodes that begin at about the same time it is the one that has the full model first. `demands` are by node and
    model; `stage` None: the first that may answer.
    """
    found = []
    for node in nodes:
        where = node.models.get(model)
        if where is None or where.problem:
            continue
        first = max(stage_number(stage, len(where.sizes)), where.min_stage)
        begin, full = (
            seconds_to_answer(node, model, of, demands[node.id], settings, now, service)
            for of in (first, len(where.sizes))
        )
        if begin < math.inf:
            failing = FAILED_SECONDS * where.failures if where.failed_ago < FAILED_SECONDS else 0.0
            found.append((begin + 0.05 * full + failing, demands[node.id][model].leases, node.id, node, begin))
    if not found:
        return None
    *_, node, begin = min(found)
    return node, begin


# ---- continuation: a stream that goes on elsewhere (ingress; pure) ----------------------------------


def why_not_continued(body: dict) -> str | None:
    """What keeps another engine from continuing this request as the first one would have; None: nothing."""
    for name, value in body.items():
        if name in USUAL:
            if value not in (USUAL[name], None):
                return name
        elif name not in CONTINUABLE:
            return name
    if not isinstance(body.get("prompt", ""), str) and not all(isinstance(token, int) for token in body["prompt"]):
        return "several prompts"
    if body.get("stop") and shows_tokens(body):
        return "stop with logprobs or token ids"  # their text is held back, and they are not
    if body.get("stop") and body.get("include_stop_str_in_output"):
        return "stop with include_stop_str_in_output"  # nothing is held back
    return None


def shows_tokens(body: dict) -> bool:
    """Whether the client sees where tokens begin; logprobs of 0 are some too."""
    logprobs = body.get("logprobs")
    return bool(body.get("return_token_ids")) or (logprobs is not None and logprobs is not False)


def count_of_choices(body: dict) -> int:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return (body.get("n") or 1) * (len(prompt) if several else 1)


def shorter(body: dict, tokens: int) -> dict:
    """A request of which so many tokens have been made already."""
    counts = ("max_tokens", "max_completion_tokens", "min_tokens")
    return {name: max(0, value - tokens) if name in counts and value else value for name, value in body.items()}


class Stream:
    """One streamed answer, by whatever engines: what the client has got of it, and how another engine goes on.

    Of what an engine sends everything is kept by token ids (return_token_ids). The token of an event without text may
    be a part of a character, which is lost with its engine; so all tokens up to `sure` have reached the client as text,
    and what follows them is made again. Where the client sees tokens, an event without text is held until text follows.
    Where strings end the answer, vLLM holds text back, and tokens are ahead of it: `behind` is that text, with what the
    next engine sends after it, until it is known that no such string begins in it.
    """

    def __init__(self, body: dict, chat: bool):
        if not chat and body.get("max_tokens") is None:
            body = {**body, "max_tokens": COMPLETION_TOKENS}
        self.body, self.chat = body, chat
        self.not_continued = why_not_continued(body)
        self.wants_ids, self.shows_tokens = bool(body.get("return_token_ids")), shows_tokens(body)
        stop = body.get("stop") or []
        self.stops: list[str] = [stop] if isinstance(stop, str) else stop
        self.prompt: list[int] = []
        self.ids: list[int] = []  # of what has been made
        self.sure = 0  # so many of them have reached the client
        self.before = 0  # so many of them are in the prompt of the engine that answers now
        self.sent = ""  # text that has reached the client
        self.behind, self.joint = "", 0  # so many characters of it are of engines before
        self.offset = 0  # of the text of the engine that answers now
        self.first: dict = {}  # id, created: of all events
        self.held: list[dict] = []
        self.delivered = False  # whether the client has got any event
        self.again = False  # whether it had before the engine that answers now
        self.exact = True  # whether all that engines before have made is the full model's
        self.is_full = False  # whether the engine that answers now has begun with the full model
        self.choices, self.ended = count_of_choices(body), set()
        self.cut = False  # whether a string has ended it that began with an engine before

    def request(self) -> dict:
        """The body for an engine: from the beginning, or from where the last one was lost."""
        if not self.continues:
            return {**self.body, **({} if self.not_continued else {"return_token_ids": True})}
        body = shorter({**self.body, "return_token_ids": True}, len(self.ids))
        tokens = [*self.prompt, *self.ids]
        if self.chat:
            return {**body, "kv_transfer_params": {"prompt_token_ids": tokens}}
        return {**body, "prompt": tokens, "add_special_tokens": False}

    @property
    def continues(self) -> bool:
        return bool(self.before)

    @property
    def finished(self) -> bool:
        return len(self.ended) >= self.choices

    @property
    def can_continue(self) -> bool:
        return not self.not_continued and not self.finished and bool(self.prompt)

    @property
    def spent(self) -> bool:
        """Whether all tokens that were asked for have been made, and only the end is missing."""
        most = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        return bool(most) and len(self.ids) >= most

    def break_off(self) -> None:
        """Its engine is lost: what the client has not got is forgotten, and made again."""
        del self.ids[self.sure :]
        self.exact &= self.is_full or len(self.ids) <= self.before  # what it would have said at its end is not known
        self.is_full = False
        self.held.clear()
        self.ended.clear()
        self.behind, self.joint, self.offset = "", 0, len(self.sent)
        self.before, self.again = len(self.ids), self.delivered

    def align(self, ids: list[int], text: str) -> None:
        """After break_off(): which ids are kept, and their text, of which the client may have less. Raises Refused."""
        self.ids, self.sure, self.before = ids, len(ids), len(ids)
        if self.stops:
            if not text.startswith(self.sent):
                raise Refused(503, "its engine was lost, and its tokens do not give its text again")
            self.behind = text[len(self.sent) :]
            self.joint = len(self.behind)

    def take(self, event: dict) -> list[dict]:
        """What the client gets of an event of the engine."""
        events = self.passed(event)
        self.delivered |= bool(events)
        return events

    def passed(self, event: dict) -> list[dict]:
        if "error" in event:
            return [event]
        for name in ("id", "created"):
            if name in event:
                event[name] = self.first.setdefault(name, event[name])
        if EXACT in event:
            event[EXACT] = event[EXACT] and self.exact
        if event.get("usage"):
            self.count(event["usage"])
        if not event.get("choices"):
            return [event]
        choice = event["choices"][0]
        self.keep(event, choice)
        says, name = (choice["delta"], "content") if self.chat else (choice, "text")
        text = says.get(name) or ""
        if says.get("reasoning") or says.get("reasoning_content"):
            self.not_continued = self.not_continued or "reasoning"
        if self.chat and "role" in says:
            return [] if self.again else [self.without_ids(event)]  # else it has begun once
        if choice.get("finish_reason"):
            self.ended.add(choice["index"])
        elif not text and choice.get("token_ids") != []:
            if self.shows_tokens and not self.not_continued:
                self.held.append(event)
                return []
            return [self.without_ids(event)]
        if self.behind:
            says[name] = text = self.joined(choice, text)
        self.sent += text
        self.sure = len(self.ids)
        events, self.held = [*self.held, event], []
        return [self.without_ids(event) for event in events] + (self.usage() if self.cut else [])

    def joined(self, choice: dict, text: str) -> str:
        """What can be sent of `behind` and `text`; a string that begins in what engines before have made ends it."""
        before, self.behind = len(self.behind), self.behind + text
        ends = [stop for stop in self.stops if len(self.ids) > (self.body.get("min_tokens") or 0)]
        places = [(self.behind.find(stop, max(0, before - len(stop) + 1)), stop) for stop in ends]  # that end in `text`
        found = [(at, stop) for at, stop in places if 0 <= at < self.joint]
        known = choice.get("finish_reason") or len(self.behind) - self.joint >= max(map(len, self.stops)) - 1
        if not found and not known:
            return ""
        text, self.behind = self.behind, ""
        if found:
            at, stop = min(found)
            choice |= {"finish_reason": "stop", "stop_reason": stop}
            self.ended.add(choice["index"])
            self.cut = True
            return text[:at]
        return text

    def keep(self, event: dict, choice: dict) -> None:
        """Ids of the prompt (of a chat they are beside the choices) and of the tokens."""
        prompt = choice.get("prompt_token_ids") or event.get("prompt_token_ids")
        if prompt and not self.prompt:
            self.prompt = prompt
        if self.again:  # it may be another prompt
            choice.pop("prompt_token_ids", None)
            event.pop("prompt_token_ids", None)
        self.ids += choice.get("token_ids") or []
        offsets = (choice.get("logprobs") or {}).get("text_offset")
        if offsets and self.continues:
            choice["logprobs"]["text_offset"] = [offset + self.offset for offset in offsets]

    def without_ids(self, event: dict) -> dict:
        if not self.wants_ids:
            event.pop("prompt_token_ids", None)
            for choice in event["choices"]:
                choice.pop("prompt_token_ids", None)
                choice.pop("token_ids", None)
        return event

    def count(self, usage: dict) -> None:
        """Tokens that an earlier engine has made are no prompt."""
        usage["prompt_tokens"] -= self.before
        usage["completion_tokens"] += self.before

    def ending(self) -> list[dict]:
        """The last events, where all tokens were made and their engine was lost before it said so."""
        choice = {"index": 0, "finish_reason": "length", **({"delta": {}} if self.chat else {"text": ""})}
        return [self.event([choice]), *self.usage()]

    def usage(self) -> list[dict]:
        """The event that counts tokens, where the client wants one."""
        if not (self.body.get("stream_options") or {}).get("include_usage"):
            return []
        counts = {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.ids)}
        return [self.event([]) | {"usage": counts | {"total_tokens": sum(counts.values())}}]

    def event(self, choices: list[dict]) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.first, "object": kind, "model": self.body.get("model"), "choices": choices}


def events_of(data: bytes) -> dict | None:
    """What an event of a stream says; None: it is the last one, or a comment."""
    if not data.startswith(b"data: ") or data.startswith(b"data: [DONE]"):
        return None
    return json.loads(data[6:])


def why_broken_off(event: dict) -> str | None:
    """What an event, or an answer in one piece, says of an engine that ends before its answer does."""
    if error := event.get("error"):
        refused = isinstance(error.get("code"), int) and error["code"] < 500
        return None if refused else f"its engine has failed ({error.get('message')})"
    aborted = any(choice.get("finish_reason") == "abort" for choice in event.get("choices") or ())
    return "its engine ends" if aborted else None


# ---- node agent: one actor per node; its standby, its files, its engines (agent) --------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def until_ended(pid: int) -> None:
    """Of any process of this machine; a child of ours need not have been waited for."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


class Process:
    """An engine of this node, from its spawn on."""

    def __init__(self, command: list[str], environ: dict[str, str], engine: Engine, missing: int):
        self.engine, self.missing = engine, missing  # bytes of its checkpoint that are not in the page cache
        self.listening = False
        self.spawned = time.monotonic()
        self.last_lines: deque[str] = deque(maxlen=10)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        self.popen = subprocess.Popen(command, env=environ, preexec_fn=end_with_this_process, **options)
        engine.pid = self.popen.pid
        threading.Thread(target=self.pass_output, daemon=True).start()

    @property
    def age(self) -> float:
        return time.monotonic() - self.spawned

    def pass_output(self) -> None:
        """To this process' output, which Ray keeps; the last lines tell why an engine has not started."""
        for line in self.popen.stdout:
            print(line, end="", flush=True)
            self.last_lines.append(line.rstrip())

    async def until_listening(self, address: str, port: int, timeout: float) -> str | None:
        """Returns why it does not, where it has ended before, or `timeout` seconds after its spawn."""
        ended = asyncio.create_task(until_ended(self.popen.pid))
        try:
            while not ended.done():
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(address, port)
                    return writer.close()
                if self.age > timeout:
                    return f"does not listen after {timeout:g} s (--start-timeout)"
                await asyncio.wait({ended}, timeout=0.02)
        finally:
            ended.cancel()
        await asyncio.sleep(0.1)  # for its last words
        lines = list(self.last_lines)
        said = next((line for line in reversed(lines) if "error" in line.lower()), "".join(lines[-1:]))
        return f"has ended with status {self.popen.wait()}: {said}"

    async def stop(self, seconds: float = STOP_SECONDS) -> None:
        """It answers whom it has begun to answer, and nobody else."""
        self.engine.ending = True
        self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.popen.wait, seconds + KILL_SECONDS)
        self.popen.kill()
        self.popen.wait()


class Agent:
    """What one node knows of itself. A Ray actor, which Ray starts again where it has ended."""

    def __init__(self, settings: Settings, node: str, address: str, slots: int):
        self.settings, self.id, self.address, self.slots = settings, node, address, slots
        # Ray sets the number of threads by what an actor has reserved, and the standby's is not its servers'.
        self.environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        # Of its engines, whatever key clients need: nobody but the ingress, which hears of it from here, asks them.
        self.environ[KEY_VARIABLE] = self.key = secrets.token_urlsafe()
        self.server = str(Path.cwd() / settings.server)
        self.models = {name: ModelOnNode() for name in settings.models}
        self.files: dict[str, list[list[Path]]] = {}
        self.running: dict[str, Process] = {}  # by the engine's id
        self.failures: dict[str, str] = {}  # of engines that have not started
        self.failed: dict[str, float] = {}  # model -> when the last of them has
        self.used: dict[str, int] = {}  # by engine: requests of the ingress that are there
        # Of several GPUs Ray says to a replica which is its own, and no engine starts before it.
        self.ahead = not settings.num_gpus or slots == 1
        self.listening = LISTENING_FROM_STANDBY if settings.standby else LISTENING
        self.asked: dict[str, float] = defaultdict(float)  # model -> when a request has last used or waited for it
        self.wanted: dict[str, float] = {}  # model -> when somebody has last asked for room for it
        self.questions, self.last_question = 0, time.monotonic()
        self.alone = False  # the ingress has gone
        self.folder = tempfile.mkdtemp(prefix="fleet-")
        self.standby: subprocess.Popen | None = None
        self.watching: list[asyncio.Task] = []
        self.tasks: list[asyncio.Task] = []
        for name, checkpoint in settings.models.items():
            self.look_at(name, checkpoint)

    def look_at(self, name: str, checkpoint: str) -> None:
        """The files of a checkpoint, and how fast the storage is on which they lie."""
        where = self.models[name]
        if not Path(self.server).is_file():
            where.problem = f"{self.settings.server} is not there"
        elif Path(self.server).name == SERVER and not importlib.util.find_spec("vllm"):
            where.problem = "vLLM is not installed"
        try:
            files, where.sizes = read_stages(checkpoint)
        except UsageError as error:
            where.problem = str(error)
            return
        where.min_stage = stage_number(self.settings.min_stage, len(files))  # its engines may say more
        where.max_tokens = read_max_tokens(checkpoint, self.settings.options)
        where.cached = [0] * len(files)
        if is_uri(checkpoint):
            where.remote, where.speed = True, REMOTE_SPEED
            return
        self.files[name] = [[Path(checkpoint) / file for file in stage] for stage in files]
        with contextlib.suppress(OSError):  # it is still on its way
            where.speed = disk_speed(self.files[name][-1][-1]) or where.speed

    async def state(self, leases: dict[str, int], used: dict[str, int]) -> dict:
        """A Node, as a dict; `leases` by model are what the ingress has asked of it, `used` by engine what it has."""
        now = self.last_question = time.monotonic()
        self.questions, self.used = self.questions + 1, used
        self.asked.update({model: now for model, count in leases.items() if count})
        if not self.watching:
            watches = (self.watch_stages(), self.watch_files(), self.watch_ingress())
            self.watching = [asyncio.create_task(watch) for watch in watches]
        for task in self.watching:
            if task.done():
                task.result()  # raises what has ended it
        self.keep_standby()
        described = {"id": self.id, "address": self.address, "slots": self.slots}
        described |= {"listening": self.listening, "standby": self.standby is not None, "ahead": self.ahead}
        return described | {
            "models": {
                name: asdict(where) | {"failed_ago": now - self.failed.get(name, now)}
                for name, where in self.models.items()
            },
            "engines": [asdict(process.engine) | {"age": process.age} for process in self.running.values()],
        }

    def socket(self) -> str:
        return f"{self.folder}/standby"

    def keep_standby(self) -> None:
        if self.settings.standby and (self.standby is None or self.standby.poll() is not None):
            command = [sys.executable, self.server, "--standby", self.socket()]
            self.standby = subprocess.Popen(command, env=self.environ, preexec_fn=end_with_this_process)

    def spawn(self, model: str, devices: str | None = None) -> Process:
        port = free_port()
        command = [sys.executable, self.server, self.settings.models[model], "--served-model-name", model]
        command += ["--host", self.address, "--port", str(port), "--shutdown-timeout", f"{STOP_SECONDS:g}"]
        if self.standby and self.standby.poll() is None:
            command += ["--from-standby", self.socket()]
        if self.settings.min_stage is not None:
            command += ["--min-stage", str(self.settings.min_stage)]
        environ = self.environ if devices is None else {**self.environ, "CUDA_VISIBLE_DEVICES": devices}
        engine = Engine(os.urandom(4).hex(), model, f"http://{self.address}:{port}", 0, key=self.key)
        missing = sum(self.models[model].sizes) - sum(self.models[model].cached)
        process = self.running[engine.id] = Process([*command, *self.settings.options], environ, engine, missing)
        self.keep_task(self.watch(process, port))
        return process

    def usable(self, model: str) -> list[Process]:
        engines = self.running.values()
        return [process for process in engines if process.engine.model == model and not process.engine.ending]

    def keep_task(self, work) -> None:
        task = asyncio.create_task(work)
        self.tasks.append(task)
        task.add_done_callback(self.tasks.remove)

    async def watch(self, process: Process, port: int) -> None:
        failed = await process.until_listening(self.address, port, self.settings.start_timeout)
        where = self.models[process.engine.model]
        if failed is None:
            self.listening += (process.age - self.listening) / 2
            await self.look_at_stage(process)
            process.listening = True
            await until_ended(process.popen.pid)
        elif not process.engine.ending:  # else it has been stopped while it started
            where.failures, where.reason = where.failures + 1, failed
            self.failed[process.engine.model] = time.monotonic()
            self.failures[process.engine.id] = failed
        await process.stop()
        self.running.pop(process.engine.id, None)

    async def ensure(self, model: str, count: int) -> None:
        """So many engines of a model, where there is room; Serve's replicas, which come later, will own them."""
        while self.ahead and len(self.usable(model)) < count and len(self.running) < self.slots:
            self.keep_task(self.end_unless_owned(self.spawn(model)))

    async def end_unless_owned(self, process: Process) -> None:
        """The answer may end before Serve has made a replica for it, and then no replica is made."""
        while not process.engine.owned and not process.engine.ending:
            if time.monotonic() - max(process.spawned, self.asked[process.engine.model]) > self.settings.idle:
                return await self.retire(process)
            await asyncio.sleep(POLL_SECONDS)

    async def first_listening(self, model: str) -> dict | None:
        """The first engine of a model that listens; None: there is none after a while."""
        end = time.monotonic() + LONG_POLL_SECONDS
        while time.monotonic() < end:
            for process in self.usable(model):
                if process.listening:
                    return self.place(process)
            await asyncio.sleep(0.02)
        return None

    def place(self, process: Process) -> dict:
        return {"url": process.engine.url, "engine": process.engine.id, "age": process.age, "key": self.key}

    async def adopt(self, model: str, pid: int, devices: str | None) -> dict:
        """An engine that nobody owns, or a new one, for a replica with this process."""
        alone = [process for process in self.usable(model) if not process.engine.owned]
        process = alone[0] if alone else self.spawn(model, devices)
        process.engine.owned = True
        self.keep_task(self.disown(process, pid))
        return self.place(process) | {"pid": process.popen.pid}

    async def disown(self, process: Process, pid: int) -> None:
        """A replica that has died is replaced by Serve, and the next one owns its engine."""
        await until_ended(pid)
        process.engine.owned = False
        if not self.ahead:
            await process.stop()
        await self.end_unless_owned(process)

    async def started(self, engine: str) -> str | None:
        """Waits until an engine listens; returns why it has not."""
        while (process := self.running.get(engine)) and not process.listening:
            await asyncio.sleep(0.02)
        return None if process else self.failures.get(engine, "has ended")

    async def stop(self, engine: str) -> None:
        """For a replica that is to end: Serve has sent some of its requests to others, so it may still be used."""
        if process := self.running.get(engine):
            await self.retire(process)

    async def retire(self, process: Process) -> None:
        """Ends an engine after those whom it answers, of which the ingress tells once it has heard of this."""
        process.engine.ending = True
        heard, end = self.questions + 2, time.monotonic() + RETIRE_SECONDS
        while self.questions < heard or self.used.get(process.engine.id):
            if self.alone or time.monotonic() > min(end, self.last_question + LOST_SECONDS):
                break
            await asyncio.sleep(POLL_SECONDS / 4)
        await process.stop()

    async def leave(self) -> None:
        """The ingress has gone, and what it has asked of engines with it."""
        self.alone = True

    async def end(self) -> None:
        """Of everything on this node."""
        await asyncio.gather(*(process.stop(0.0) for process in list(self.running.values())))
        if self.standby:
            self.settings = replace(self.settings, standby=False)
            self.standby.terminate()
            await asyncio.to_thread(self.standby.wait)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def want(self, model: str) -> None:
        """Somebody waits for room for this model: engines of others that are idle make it."""
        self.wanted[model] = time.monotonic()

    async def is_wanted_by_others(self, model: str) -> bool:
        since = time.monotonic() - 4 * POLL_SECONDS
        return any(at > since for other, at in self.wanted.items() if other != model)

    async def watch_stages(self) -> None:
        while True:
            for process in list(self.running.values()):
                if process.listening and process.engine.stage < max(1, process.engine.num_stages):
                    await self.look_at_stage(process)
            await asyncio.sleep(POLL_SECONDS)

    async def look_at_stage(self, process: Process) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0)) as session:
                async with session.get(process.engine.url + "/progress") as response:
                    self.learn(process, await response.json())

    def learn(self, process: Process, progress: dict) -> None:
        """Where an engine is, and what its start says of the next one's."""
        engine = process.engine
        where, before = self.models[engine.model], engine.stage
        engine.stage, engine.num_stages = progress["stage"], progress["num_stages"]
        where.min_stage = max(where.min_stage, stage_number(progress["min_stage"], progress["num_stages"]))
        events = {(event["event"], event.get("stage")): event["seconds"] for event in progress["timeline"]}
        elapsed = max((event["seconds"] for event in progress["timeline"]), default=0.0)
        loaded, read = 0, max(1, sum(stage["bytes_loaded"] for stage in progress["stages"]))
        for stage in progress["stages"]:
            loaded += stage["bytes"] - stage["bytes_loaded"]
            engine.seconds[stage["stage"]] = max(1.0, loaded * elapsed / read)
        if before == 0 and engine.stage > 0:
            where.failures = 0
            resident = events.get(("resident", engine.stage))
            if resident and process.missing > sum(where.sizes) / 2:  # else the page cache is what has been measured
                reading = resident - events.get(("reading", None), 0.0)
                speed = sum(where.sizes[: engine.stage]) / max(reading, 1e-3)
                where.speed += (speed - where.speed) / 2

    async def watch_ingress(self) -> None:
        """Serve has been shut down without us (`serve shutdown`), or the ingress does not come back."""
        while time.monotonic() - self.last_question < ALONE_SECONDS:
            await asyncio.sleep(POLL_SECONDS)
        await self.end()
        ray.kill(ray.get_runtime_context().current_actor)

    async def watch_files(self) -> None:
        while True:
            for name, stages in self.files.items():
                with contextlib.suppress(OSError):  # a file is on its way, or has gone
                    self.models[name].cached = await asyncio.to_thread(
                        lambda stages=stages: [sum(map(cached_bytes, files)) for files in stages]
                    )
            await asyncio.sleep(MINCORE_SECONDS)


# ---- replica: a Serve deployment that owns one engine (replica) -------------------------------------


class Replica:
    """Owns one engine: leases its places, ends with it, and it with this process."""

    async def __init__(self, settings: Settings, model: str):
        self.settings, self.model, self.engine = settings, model, None
        self.ended = asyncio.Event()
        self.agent = ray.get_actor(agent_name(settings, ray.get_runtime_context().get_node_id()), NAMESPACE)
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")  # what Ray has given to this replica
        self.engine = await self.agent.adopt.remote(model, os.getpid(), devices)
        self.adopted = time.monotonic()
        if failed := await self.agent.started.remote(self.engine["engine"]):
            raise RuntimeError(f"the engine of {model} {failed}")
        self.watching = asyncio.create_task(self.watch())

    async def watch(self) -> None:
        await until_ended(self.engine["pid"])
        self.ended.set()

    async def lease(self) -> AsyncIterator[dict]:
        """A place at the engine, until the caller closes this: yields where it is, once. Raises when it has ended."""
        if not self.ended.is_set():
            yield self.engine | {"age": self.engine["age"] + time.monotonic() - self.adopted}
            await self.ended.wait()
        raise RuntimeError(f"the engine of {self.model} has ended")

    async def check_health(self) -> None:
        if self.ended.is_set():
            raise RuntimeError(f"the engine of {self.model} has ended")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {"wanted": float(await self.agent.is_wanted_by_others.remote(self.model))}

    async def __del__(self):
        if self.engine:
            await self.agent.stop.remote(self.engine["engine"])


class Scale:
    """Serve's autoscaling policy: as many replicas as requests need; none after `idle` seconds without one.

    Sooner, where another model waits for the room.
    """

    def __init__(self, room: int, idle: float):
        self.room, self.idle = room, idle

    def __call__(self, context) -> tuple[int, dict]:
        now, state = time.time(), dict(context.policy_state or {})
        needed = math.ceil(context.total_num_requests / self.room)
        if needed >= context.target_num_replicas:
            state["busy"] = now
        wanted = any(context.aggregated_metrics.get("wanted", {}).values())
        # Serve starts no more replicas of an application whose first one has failed, until none is asked for.
        idle = self.idle if context.current_num_replicas else min(self.idle, FAILED_SECONDS)
        if now - state.get("busy", now) < (0.0 if wanted else idle):
            needed = max(needed, context.target_num_replicas)
        return needed, state


def application_of(settings: Settings, model: str, node: str):
    """The Serve application of a model on a node."""
    scaling = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": settings.max_replicas}
    scaling |= {"upscale_delay_s": 0.0, "downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}
    scaling |= {"look_back_period_s": 2 * SCALE_SECONDS, "metrics_interval_s": SCALE_SECONDS}
    policy = {"policy_function": Scale, "policy_kwargs": {"room": settings.room, "idle": settings.idle}}
    resources = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    return (
        serve.deployment(Replica)
        .options(
            name="Replica",
            version=settings.version(),  # else each run replaces the replicas; _internal, for it is no public option
            _internal=True,
            ray_actor_options={**resources, "label_selector": {"ray.io/node-id": node}},
            max_ongoing_requests=4 * settings.room,  # those that wait for a stage keep nobody from being answered
            autoscaling_config={**scaling, "policy": policy},
            health_check_period_s=1.0,
            graceful_shutdown_timeout_s=RETIRE_SECONDS + STOP_SECONDS + 2 * KILL_SECONDS,
            max_constructor_retry_count=1,
        )
        .bind(settings, model)
    )


# ---- nodes: their agents, their applications, and places at their engines (ingress) -----------------


class Lost(Exception):
    """An engine, or its node, from which no more is to be expected."""


class Nodes:
    """The nodes of the cluster, as their agents see them; on each an agent, and an application of each model."""

    def __init__(self, settings: Settings, lose: Callable[[str], None]):
        """`lose` is told of a node from which no more is to be expected."""
        from ray._raylet import GcsClient  # as Serve's own controller asks which nodes are drained

        self.settings, self.lose = settings, lose
        here = ray.get_runtime_context()
        self.gcs = GcsClient(address=here.gcs_address)
        self.address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here.get_node_id())
        self.known: dict[str, Node] = {}  # that have answered
        self.seen: dict[str, float] = {}  # when
        self.agents: dict[str, ray.actor.ActorHandle] = {}
        self.handles: dict[tuple[str, str], serve.handle.DeploymentHandle] = {}  # of node and model
        self.draining: dict[str, int] = {}  # node -> deadline, ms since the epoch
        self.launch: dict[str, float] = {}  # seconds, measured

    async def keep(self) -> None:
        """An agent, and an application for each model, on each node that has resources for an engine."""
        alive = {node["NodeID"]: node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}
        self.draining = await asyncio.to_thread(self.gcs.get_draining_nodes)
        for node in self.agents.keys() - alive.keys():
            await self.forget(node)
        new = [alive[node] for node in alive.keys() - self.agents.keys() - self.draining.keys()]
        if new := [node for node in new if self.slots(node["Resources"])]:
            await self.adopt(new)

    def slots(self, resources: dict[str, float]) -> int:
        needs = {"CPU": self.settings.num_cpus, "GPU": self.settings.num_gpus}
        return int(min(resources.get(name, 0.0) // need for name, need in needs.items() if need))

    async def adopt(self, nodes: list[dict]) -> None:
        """Nodes, as ray.nodes() describes them."""
        pairs = [(node["NodeID"], model) for node in nodes for model in self.settings.models]
        targets = [
            serve.RunTarget(application_of(self.settings, model, node), application(model, node), None)
            for node, model in pairs
        ]
        agents = {node["NodeID"]: self.agent(node) for node in nodes}
        handles = await asyncio.to_thread(serve.run_many, targets, wait_for_applications_running=False)
        self.handles |= {pair: handle.options(stream=True) for pair, handle in zip(pairs, handles, strict=True)}
        self.agents |= agents

    def agent(self, node: dict) -> ray.actor.ActorHandle:
        name = node["NodeID"]
        options = {"name": agent_name(self.settings, name), "namespace": NAMESPACE, "get_if_exists": True}
        options |= {"lifetime": "detached", "num_cpus": 0, "max_restarts": -1, "max_concurrency": 1000}
        options["label_selector"] = {"ray.io/node-id": name}
        address = node["NodeManagerAddress"]
        address = LOOPBACK if address == self.address else address  # nobody else has to reach engines of this machine
        return ray.remote(Agent).options(**options).remote(self.settings, name, address, self.slots(node["Resources"]))

    async def forget(self, node: str) -> None:
        """A node that has gone."""
        self.agents.pop(node)
        self.known.pop(node, None)
        self.lose(node)
        for model in self.settings.models:
            del self.handles[node, model]
            await asyncio.to_thread(serve.delete, application(model, node), _blocking=False)

    async def look(self, leases: Callable[[str], dict[str, int]], used: dict[str, int]) -> None:
        """Ask every agent; see Agent.state(). `leases` are those of a node."""

        async def ask(node: str, agent: ray.actor.ActorHandle) -> None:
            with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
                state = await asyncio.wait_for(agent.state.remote(leases(node), used), ANSWER_SECONDS)
                models = {name: ModelOnNode(**where) for name, where in state.pop("models").items()}
                engines = [Engine(**engine) for engine in state.pop("engines")]
                self.known[node] = Node(**state, models=models, engines=engines)
                self.known[node].launch = self.launch.get(node, 0.0 if self.known[node].ahead else LAUNCH)
                self.seen[node] = time.monotonic()

        await asyncio.gather(*(ask(node, agent) for node, agent in list(self.agents.items())))
        for node in self.known:
            if self.is_lost(node):
                self.lose(node)

    def is_lost(self, node: str) -> bool:
        return node not in self.known or time.monotonic() - self.seen[node] > LOST_SECONDS

    def usable(self) -> list[Node]:
        return [node for node in self.known.values() if not self.is_lost(node.id) and node.id not in self.draining]

    def know(self, node: str, model: str, place: dict) -> None:
        """Of an engine that listens, before its agent is asked the next time."""
        if (now := self.known.get(node)) is None:
            return
        where = now.models[model]
        for engine in now.engines:
            if engine.id == place["engine"]:
                engine.age, engine.assumed = place["age"], engine.assumed or not engine.stage
                engine.stage, engine.num_stages = engine.stage or where.min_stage, len(where.sizes)
                return
        known = {"age": place["age"], "stage": where.min_stage, "num_stages": len(where.sizes), "key": place["key"]}
        now.engines.append(Engine(place["engine"], model, place["url"], 0, **known, assumed=True))

    def stage_at(self, lease: "Lease") -> int:
        """That an engine answers at, as far as its agent has said."""
        engines = self.known[lease.node].engines if lease.node in self.known else ()
        return next((engine.stage for engine in engines if engine.id == lease.engine), 1)

    def last_stage(self, lease: "Lease") -> int | None:
        return len(self.known[lease.node].models[lease.model].sizes) if lease.node in self.known else None

    def doubt(self, lease: "Lease") -> None:
        """An engine that does not answer does not run, unless its agent says so again."""
        if now := self.known.get(lease.node):
            now.engines = [engine for engine in now.engines if engine.id != lease.engine]


# ---- places at engines: which, and when (ingress) ---------------------------------------------------


class Places:
    """What the ingress has asked of each node, and how a request comes to a place at an engine."""

    def __init__(self, settings: Settings, nodes: Nodes):
        self.settings, self.nodes = settings, nodes
        self.demands: dict[str, dict[str, Demand]] = defaultdict(lambda: defaultdict(Demand))  # by node and model
        self.service: dict[str, float] = defaultdict(lambda: SERVICE_SECONDS)  # by model
        self.ahead: dict[tuple[str, str], asyncio.Task] = {}  # of node and model: the first engine that listens
        self.given_back: dict[tuple[str, str], asyncio.Event] = defaultdict(asyncio.Event)
        self.used: Counter[str] = Counter()  # by engine: places that are used
        self.held: Counter[str] = Counter()  # by model
        self.starts: deque[dict] = deque(maxlen=STARTS_KEPT)  # the last ones: estimated and measured

    def leases(self, node: str) -> dict[str, int]:
        return {model: demand.leases for model, demand in self.demands[node].items()}

    def choose(self, model: str, stage: int | str | None, avoid: Collection[str] = ()) -> tuple[Node, float] | None:
        """See choose(); nodes in `avoid` only where there is no other."""
        nodes = self.nodes.usable()
        nodes = [node for node in nodes if node.id not in avoid] or nodes
        return choose(nodes, model, stage, self.demands, self.settings, time.monotonic(), self.service[model])

    def seconds_to_answer(self, node: Node, model: str, stage: int) -> float:
        demands, now = self.demands[node.id], time.monotonic()
        return seconds_to_answer(node, model, stage, demands, self.settings, now, self.service[model])

    async def lease(self, model: str, stage: int | str | None, avoid: set[str]) -> "Lease":
        """A place at the engine that answers first. Raises Refused where none is to be had."""
        reason, attempts, begin = None, 0, time.monotonic()
        self.held[model] += 1
        try:
            while attempts < ATTEMPTS:
                if (chosen := self.choose(model, stage, avoid)) is None:
                    reason = reason or self.why_nowhere(model)
                    known = self.nodes.known.values()
                    may_come = len(known) < len(self.nodes.agents) or any(
                        not node.models[model].problem for node in known
                    )
                    if not may_come or time.monotonic() - begin > 2 * LOST_SECONDS:
                        break
                    await asyncio.sleep(POLL_SECONDS)  # nodes that can serve it do not answer, or are drained
                    continue
                try:
                    return await self.lease_at(*chosen, model)
                except Lost as lost:
                    avoid.add(chosen[0].id)
                    reason, attempts = str(lost), attempts + 1
                    await asyncio.sleep(POLL_SECONDS)
        finally:
            self.held[model] -= 1
        raise Refused(503, f"no engine of {model} is to be had: {reason}", RETRY_SECONDS)

    def why_nowhere(self, model: str) -> str:
        problems = {node.models[model].problem for node in self.nodes.known.values()} - {None}
        return "; ".join(sorted(problems)) or "no node has room for it"

    async def lease_at(self, node: Node, estimated: float, model: str) -> "Lease":
        """A place at an engine of this node. Raises Lost."""
        demand, begin = self.demands[node.id][model], time.monotonic()
        lease = Lease(self, node.id, model, self.nodes.handles[node.id, model].lease.remote())
        if not node.of(model) and demand.waiting_since is None:
            demand.waiting_since = begin
        try:
            place = await self.granted(lease, begin)
        except BaseException:
            lease.close()
            raise
        finally:
            demand.waiting_since = None
        lease.url, lease.engine, lease.key = place["url"], place["engine"], place["key"]
        lease.granted = time.monotonic()
        self.used[lease.engine] += 1
        self.nodes.know(node.id, model, place)
        measured = lease.granted - begin
        told = any(start["engine"] == lease.engine for start in self.starts)
        if place["age"] < measured and not told:  # the engine has been spawned for this
            launch, before = measured - place["age"], self.nodes.launch.get(node.id, measured - place["age"])
            self.nodes.launch[node.id] = (before + launch) / 2
            self.starts.append({"node": node.id, "model": model, "engine": lease.engine, "launch": launch})
            self.starts[-1] |= {"listening": place["age"], "estimated": estimated, "measured": measured + FIRST_TOKEN}
        return lease

    def place(self, node: Node, model: str) -> dict | None:
        """At the engine that is used least of those that listen, if it has room, or if no more are to be expected."""
        running = node.of(model)
        listening = [engine for engine in running if engine.stage]
        if not listening:
            return None
        engine = min(listening, key=lambda engine: self.used[engine.id])
        needed = math.ceil(self.demands[node.id][model].leases / self.settings.room)
        possible = min(self.settings.max_replicas, node.slots - len(node.engines) + len(running))
        expected = len(listening) < min(needed, possible) and not node.models[model].failures
        if expected and self.used[engine.id] >= self.settings.room:
            return None
        return {"url": engine.url, "engine": engine.id, "age": engine.age, "key": engine.key}

    async def granted(self, lease: "Lease", begin: float) -> dict:
        """Where the engine of a lease is, as soon as anybody says that it listens: the agent, or Serve's replica.

        With an eye on the node, for the lease of a dead one says nothing. Raises Lost.
        """
        node, model = lease.node, lease.model
        failures = self.nodes.known[node].models[model].failures
        try:
            while True:
                now = self.nodes.known.get(node)
                if now is None or self.nodes.is_lost(node):
                    raise Lost("its node has gone")
                if place := self.place(now, model):
                    return place
                if node in self.nodes.draining:
                    raise Lost("its node is drained")
                if now.models[model].failures > failures:
                    raise Lost(f"its engine {now.models[model].reason}")
                if time.monotonic() - begin > self.settings.start_timeout + LOST_SECONDS:
                    raise Lost("no engine has started in time (--start-timeout)")
                if not now.of(model) and len(now.engines) >= now.slots:
                    self.nodes.agents[node].want.remote(model)
                for said in await self.news(now, lease):
                    self.nodes.know(node, model, said)
        except (serve.exceptions.RayServeException, ray.exceptions.RayError, StopAsyncIteration) as error:
            where = self.nodes.known[node].models[model] if node in self.nodes.known else ModelOnNode()
            why = where.reason if where.failures else f"has been lost ({type(error).__name__})"
            raise Lost(f"its engine {why}") from error

    async def news(self, node: Node, lease: "Lease") -> list[dict]:
        """Waits until an engine listens, a place is given back, or a moment has passed; returns engines that listen."""
        key = node.id, lease.model
        told = [] if lease.told else [lease.first]
        if node.ahead:
            self.start_ahead(node, lease.model)
            told += [self.ahead[key]] if key in self.ahead else []
        given_back = asyncio.ensure_future(self.given_back[key].wait())
        await asyncio.wait({*told, given_back}, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        given_back.cancel()
        lease.told = lease.told or lease.first.done()
        return [said for one in told if one.done() and (said := one.result())]

    def start_ahead(self, node: Node, model: str) -> None:
        """An engine for those who wait, while Serve starts the replica that will own it."""
        needed = min(math.ceil(self.demands[node.id][model].leases / self.settings.room), self.settings.max_replicas)
        if len(node.of(model)) < needed:
            self.nodes.agents[node.id].ensure.remote(model, needed)
        key = node.id, model
        if key in self.ahead and self.ahead[key].done():
            del self.ahead[key]
        if key not in self.ahead and not any(engine.stage for engine in node.of(model)):
            self.ahead[key] = asyncio.ensure_future(self.listens(*key))

    def wake(self, node: str, model: str) -> None:
        """Those who wait, for a place has been given back."""
        self.given_back.pop((node, model), asyncio.Event()).set()

    async def listens(self, node: str, model: str) -> dict | None:
        try:
            return await self.nodes.agents[node].first_listening.remote(model)
        except ray.exceptions.RayError:  # the agent starts again
            await asyncio.sleep(POLL_SECONDS)


@dataclass(eq=False)
class Lease:
    """A place at an engine, counted from the moment on that it is asked for."""

    places: Places
    node: str
    model: str
    response: serve.handle.DeploymentResponseGenerator  # open as long as the place is used
    url: str = ""
    engine: str = ""
    key: str = field(default="", repr=False)  # that the engine wants
    granted: float | None = None  # when
    told: bool = False  # whether what it yields has been looked at
    given_back: bool = False

    def __post_init__(self):
        self.places.demands[self.node][self.model].leases += 1
        self.first = asyncio.ensure_future(anext(self.response))  # what it yields
        self.first.add_done_callback(lambda first: first.cancelled() or first.exception())  # it may be of no interest

    def close(self) -> None:
        if self.given_back:
            return
        self.given_back = True
        self.places.demands[self.node][self.model].leases -= 1
        self.first.cancel()
        with contextlib.suppress(serve.exceptions.RayServeException, ray.exceptions.RayError):  # it has failed
            self.response.cancel()
        if self.granted is not None:
            self.places.used[self.engine] -= 1
            self.places.wake(self.node, self.model)
            took, usual = time.monotonic() - self.granted, self.places.service[self.model]
            self.places.service[self.model] = usual + (took - usual) / 8


# ---- ingress: HTTP in front of all engines (ingress) ------------------------------------------------

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
FLEET_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Fleet</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  h1 { font-size: 1.3rem; margin: 0 } p { margin: .3rem 0 1.2rem; color: #555 } #error { color: #b00020 }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
  th { text-align: left; font-weight: 600 } th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid #ddd }
  td { vertical-align: top } .draining { color: #a05a00 } .lost { color: #b00020 }
  .bar { display: inline-block; width: 6rem; height: .8rem; background: #e8e8ee; border-radius: 3px; margin: 0 .6rem }
  .bar i { display: block; height: 100%; background: #2f7d4f; border-radius: 3px }
</style>
<h1>Fleet</h1><p id="state">asking the ingress ...</p><p id="error"></p>
<table><thead><tr><th>node</th><th>state</th><th>engines</th><th>a start would answer after</th></tr></thead>
<tbody id="nodes"></tbody></table>
<script>
  const at = id => document.getElementById(id);
  const make = (parent, tag, text = "", name = "") => {
    const element = parent.appendChild(document.createElement(tag));
    element.textContent = text; element.className = name;
    return element;
  };
  const before = {};
  function rate(engine, now) {
    const last = before[engine.engine] || { tokens: engine.tokens, now };
    before[engine.engine] = { tokens: engine.tokens, now };
    return now > last.now ? 1000 * (engine.tokens - last.tokens) / (now - last.now) : 0;
  }
  function show(fleet) {
    const now = performance.now();
    const held = Object.entries(fleet.held).map(([name, count]) => `${name}: ${count} waiting`).join(", ");
    const counts = Object.entries(fleet.counts).map(([name, count]) => `${count} ${name}`).join(", ");
    at("state").textContent = `${fleet.streams} streams; ${held}` + (counts ? `; so far ${counts}` : "");
    at("error").textContent = "";
    at("nodes").replaceChildren();
    for (const node of fleet.nodes) {
      const row = make(at("nodes"), "tr", "", node.state);
      make(row, "td", `${node.address} ${node.node.slice(0, 8)}`);
      make(row, "td", node.state + (node.standby ? ", standby" : ""));
      const engines = make(row, "td", node.engines.length ? "" : "none");
      for (const engine of node.engines) {
        const line = make(engines, "div", engine.model);
        make(make(line, "span", "", "bar"), "i").style.width = 100 * engine.stage / (engine.num_stages || 1) + "%";
        const state = engine.stage ? `stage ${engine.stage} of ${engine.num_stages}, `
          + `${rate(engine, now).toFixed(0)} tokens/s` : "starting";
        make(line, "span", state + (engine.ending ? ", ending" : ""));
      }
      const starts = make(row, "td");
      for (const [name, model] of Object.entries(node.models))
        make(starts, "div", `${name}: ` + (model.problem || (model.seconds === null ? "never" : `${model.seconds} s`)));
    }
  }
  async function look() {
    try {
      show(await (await fetch("fleet")).json());
    } catch (error) {
      at("error").textContent = "the ingress does not answer: " + error.message;
    }
    setTimeout(look, 1000);
  }
  look();
</script>
"""


def key_of_clients(settings: Settings) -> str | None:
    """Raises RuntimeError where a variable has it that is not set."""
    if settings.api_key_variable is None:
        return settings.api_key
    if not (key := os.environ.get(settings.api_key_variable)):
        raise RuntimeError(f"{settings.api_key_variable} is not set: start Ray with it on the head node")
    return key


def has_key(authorization: str, key: str) -> bool:
    """Whether a header has the key: as vLLM compares it, in a time that does not depend on how much of it is right."""
    scheme, _, given = authorization.partition(" ")
    digests = (hashlib.sha256(text.encode(errors="surrogateescape")).digest() for text in (given, key))
    return secrets.compare_digest(*digests) and scheme.lower() == "bearer"


@dataclass(eq=False)
class Answering:
    """A stream on its way, and where it comes from."""

    stream: Stream
    model: str
    stage: int | str | None
    headers: dict[str, str]  # for its engines
    lease: Lease
    source: aiohttp.ClientResponse | None = None
    client: web.StreamResponse | None = None  # once it has got something
    target: Lease | None = None  # where it is to go on
    moving: asyncio.Task | None = None
    losses: int = 0


class Ingress:
    """The endpoint: a Serve deployment that listens itself, so that no token passes through Ray."""

    async def __init__(self, settings: Settings):
        self.key = key_of_clients(settings)
        self.settings = settings = replace(settings, api_key=None)  # nobody else has to know it
        self.answering: set[Answering] = set()
        self.counts: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()  # by engine
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
        connector = aiohttp.TCPConnector(limit=0)
        self.session = aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=EVENT_BYTES)
        self.nodes = Nodes(settings, self.break_off)
        self.places = Places(settings, self.nodes)
        await self.nodes.keep()
        await self.look()
        self.tasks = [asyncio.create_task(every(1.0, self.nodes.keep))]
        self.tasks.append(asyncio.create_task(every(POLL_SECONDS, self.look)))
        await self.listen()

    async def check_health(self) -> None:
        for task in self.tasks:
            if task.done():
                task.result()  # raises what has ended it

    async def __del__(self):
        for task in getattr(self, "tasks", ()):
            task.cancel()
        if hasattr(self, "runner"):
            await self.runner.cleanup()
        await self.session.close()

    async def look(self) -> None:
        await self.nodes.look(self.places.leases, dict(+self.places.used))
        self.move_all()

    def break_off(self, node: str) -> None:
        """No more is to be expected of a node: who reads from it is told so."""
        for answering in self.answering:
            if answering.lease.node == node and answering.source:
                answering.source.close()

    def move_all(self) -> None:
        """Streams of nodes that are drained go on elsewhere, as soon as there is a place; what cannot ends there."""
        for answering in self.answering:
            moves = answering.moving and not answering.moving.done()
            if answering.lease.node in self.nodes.draining and answering.stream.can_continue and not moves:
                answering.moving = asyncio.create_task(self.move(answering))

    async def listen(self) -> None:
        """Raises what keeps it from listening; handlers end when their client hangs up."""
        app = web.Application(client_max_size=REQUEST_BYTES, middlewares=[self.guard])
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        app.router.add_get("/fleet", self.fleet)
        app.router.add_get("/fleet.html", self.page)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/{path:.*}", self.answer)
        self.runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await self.runner.setup()
        await web.TCPSite(self.runner, self.settings.host, self.settings.port, reuse_port=True).start()

    @web.middleware
    async def guard(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        """The API key, where there is one, for what vLLM guards; errors as vLLM words them."""
        try:
            if self.key and (request.method == "POST" or request.path.startswith("/v1")):
                if not has_key(request.headers.get("Authorization", ""), self.key):
                    raise Refused(401, "this needs an API key: Authorization: Bearer KEY")
            return await handler(request)
        except Refused as refused:
            self.counts[f"refused_{refused.status}"] += 1
            headers = {}
            if refused.retry_after is not None:
                headers["Retry-After"] = str(max(1, math.ceil(refused.retry_after)))
            return web.json_response(refused.body(), status=refused.status, headers=headers)
        except web.HTTPException:
            raise  # of aiohttp: a path that is none, a body too long
        except Exception as error:
            logger.exception("%s %s", request.method, request.path)
            self.counts["refused_500"] += 1
            return web.json_response(Refused(500, f"{type(error).__name__}: {error}").body(), status=500)

    async def models(self, _) -> web.Response:
        data = [{"id": name, "object": "model", "owned_by": "progressive-fleet"} for name in self.settings.models]
        return web.json_response({"object": "list", "data": data})

    async def health(self, _) -> web.Response:
        return web.Response()

    def model_of(self, body: dict) -> str:
        names = list(self.settings.models)
        model = body.get("model") or (names[0] if len(names) == 1 else None)
        if model not in names:
            raise Refused(404, f"model {model!r:.80}: this fleet serves {', '.join(names)}")
        return model

    def stage_of(self, request: web.Request, body: dict, model: str) -> int | str | None:
        """The stage that a request waits for, of its header and its body."""
        last = max((len(node.models[model].sizes) for node in self.nodes.known.values()), default=0)  # 0: not known yet
        wanted = []
        for value in (request.headers.get(MIN_STAGE_HEADER), body.pop(MIN_STAGE, None)):
            if value in (None, LAST):
                wanted += [value] if value else []
                continue
            number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,4}", value) else value
            if type(number) is not int or not 1 <= number <= (last or number):
                raise Refused(400, f"{MIN_STAGE} {value!r:.40}: {model} has stages 1 to {last or '?'}, or {LAST!r}")
            wanted.append(number)
        return LAST if LAST in wanted else max(wanted, default=None)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except ValueError as error:
            raise Refused(400, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refused(400, "the body is no JSON object")
        model = self.model_of(body)
        stage = self.stage_of(request, body, model)
        if (held := self.places.held[model]) >= self.settings.hold_limit:
            chosen = self.places.choose(model, stage)
            after = chosen[1] if chosen else RETRY_SECONDS
            raise Refused(429, f"{held} requests wait for {model} (--hold-limit)", after)
        self.counts["requests"] += 1
        streams = body.get("stream") is True and request.path in ANSWERS
        return await (self.stream if streams else self.whole)(request, body, model, stage)

    def headers(self, request: web.Request, stage: int | str | None) -> dict[str, str]:
        """Of a client's request, for an engine."""
        kept = ("X-Request-Id", "traceparent")
        headers = {name: request.headers[name] for name in kept if name in request.headers}
        if stage is not None:
            headers[MIN_STAGE_HEADER] = str(stage)
        return headers

    async def post(self, lease: Lease, path: str, body: dict, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """The beginning of an engine's answer. Raises Lost."""
        headers = {**headers, "Authorization": f"Bearer {lease.key}"}
        return await self.unless_lost(lease, self.session.post(lease.url + path, json=body, headers=headers))

    async def unless_lost(self, lease: Lease, work: Awaitable):
        """What an engine has to say, with an eye on its node: a dead one says nothing. Raises Lost."""
        asking = asyncio.ensure_future(work)
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=POLL_SECONDS)
                if not asking.done() and self.nodes.is_lost(lease.node):
                    raise Lost("its node has gone")
            return asking.result()
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(f"its engine has been lost ({type(error).__name__})") from error
        finally:
            asking.cancel()

    async def whole(self, request: web.Request, body: dict, model: str, stage: int | str | None) -> web.Response:
        """An answer in one piece: where its engine is lost another makes it, for the client has got nothing yet."""
        avoid: set[str] = set()
        for attempt in itertools.count(1):
            lease = await self.places.lease(model, stage, avoid)
            try:
                async with await self.post(lease, request.path_qs, body, self.headers(request, stage)) as response:
                    data = await self.unless_lost(lease, response.read())
                    if response.status == 503 and attempt < ATTEMPTS:
                        raise Lost("its engine ends")
                    if b'"abort"' in data and request.path in ANSWERS and (why := why_broken_off(json.loads(data))):
                        raise Lost(why)
                    return web.Response(body=data, status=response.status, headers=self.passed_on(response))
            except Lost as lost:
                avoid.add(lease.node)
                self.nodes.doubt(lease)
                self.counts["lost"] += 1
                if attempt >= ATTEMPTS:
                    raise Refused(503, f"no engine of {model} has answered to the end: {lost}", 10.0) from lost
            finally:
                lease.close()

    def passed_on(self, response: aiohttp.ClientResponse) -> dict[str, str]:
        names = ("Content-Type", STAGE_HEADER, "Retry-After", "X-Request-Id")
        return {name: response.headers[name] for name in names if name in response.headers}

    async def stream(self, request: web.Request, body: dict, model: str, stage: int | str | None) -> web.StreamResponse:
        """A streamed answer, by as many engines as it takes."""
        chat, headers, avoid = request.path == ANSWERS[1], self.headers(request, stage), set()
        lease = await self.places.lease(model, stage, avoid)
        most = max((node.models[model].max_tokens or 0 for node in self.nodes.known.values()), default=0)
        if chat and most and not body.get("max_tokens") and not body.get("max_completion_tokens"):
            body["max_tokens"] = most  # said here, so that another engine makes the rest of them, and not as many again
        answering = Answering(Stream(body, chat), model, stage, headers, lease)
        self.answering.add(answering)
        try:
            while True:
                try:
                    return await self.answered(request, answering)
                except (Lost, aiohttp.ClientError, OSError) as lost:
                    answering.source = None
                    if request.transport is None:  # it is the client who has gone
                        raise
                    await self.go_on(answering, avoid, lost)
        except Exception as error:
            if answering.client is None or request.transport is None:
                raise
            if not isinstance(error, Refused):
                logger.exception("%s %s", request.method, request.path)
                error = Refused(500, f"{type(error).__name__}: {error}")
            return await self.end(request, answering, [error.body()])
        finally:
            self.answering.discard(answering)
            if answering.moving:
                answering.moving.cancel()
            for lease in (answering.lease, answering.target):
                if lease:
                    lease.close()

    async def answered(self, request: web.Request, answering: Answering) -> web.StreamResponse:
        """By the engine whose place is leased, from where the one before was lost. Raises Lost."""
        stream, lease = answering.stream, answering.lease
        if answering.client and (stream.finished or stream.spent):
            return await self.end(request, answering, [] if stream.finished else stream.ending())
        stream.break_off()
        if stream.continues:
            await self.align(answering)
        async with await self.post(lease, request.path_qs, stream.request(), answering.headers) as source:
            if source.status != 200:
                if answering.client is None and (source.status != 503 or answering.losses >= ATTEMPTS - 1):
                    data = await self.unless_lost(lease, source.read())
                    return web.Response(body=data, status=source.status, headers=self.passed_on(source))
                raise Lost(f"its engine answers {source.status}")
            answering.source = source
            stream.is_full = source.headers.get(STAGE_HEADER) == str(self.nodes.last_stage(lease))
            return await self.pass_events(request, answering)

    async def pass_events(self, request: web.Request, answering: Answering) -> web.StreamResponse:
        """From an engine to the client. Raises Lost where it ends too early."""
        stream, source = answering.stream, answering.source
        while data := await read_event(source.content):
            if (event := events_of(data)) is None:
                if data.startswith(b"data: [DONE]"):
                    return await self.end(request, answering, [])
                continue
            self.tokens[answering.lease.engine] += 1
            if why := why_broken_off(event):
                raise Lost(why)
            await self.send(request, answering, stream.take(event))
            if stream.cut:
                return await self.end(request, answering, [])
        raise Lost("its engine has ended")

    async def send(self, request: web.Request, answering: Answering, events: list[dict]) -> None:
        """To the client, who gets no status before there is something to send: until then all can begin anew."""
        if answering.client is None and events:
            client = web.StreamResponse(headers=self.passed_on(answering.source))
            await client.prepare(request)
            answering.client = client
        for event in events:
            await answering.client.write(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")

    async def end(self, request: web.Request, answering: Answering, events: list[dict]) -> web.StreamResponse:
        await self.send(request, answering, events)
        await answering.client.write(b"data: [DONE]\n\n")
        await answering.client.write_eof()
        return answering.client

    async def go_on(self, answering: Answering, avoid: set[str], lost: Exception) -> None:
        """After the loss of an engine, or where a stream moves: a place at another. Raises Refused."""
        stream, left = answering.stream, answering.lease
        left.close()
        if answering.target:
            answering.lease, answering.target, answering.moving = answering.target, None, None
            self.counts["moved"] += 1
            return
        avoid.add(left.node)
        self.nodes.doubt(left)
        self.counts["lost"] += 1
        answering.losses += 1
        if answering.client and (stream.finished or stream.spent):
            return  # only its end is missing
        if answering.losses >= ATTEMPTS:
            raise Refused(503, f"{ATTEMPTS} engines of {answering.model} were lost with this answer: {lost}")
        if answering.client and not stream.can_continue:
            why = f"cannot be continued elsewhere ({stream.not_continued or 'its prompt is not known'})"
            raise Refused(503, f"the engine of {answering.model} was lost, and this answer {why}: {lost}")
        answering.lease = await self.places.lease(answering.model, answering.stage, avoid)

    async def align(self, answering: Answering) -> None:
        """Go back to a whole character, for an event of several tokens may end within one. Raises Lost, Refused."""
        stream, ids = answering.stream, list(answering.stream.ids)
        prompt = await self.text(answering, stream.prompt)
        while (text := await self.text(answering, [*stream.prompt, *ids])).endswith(BROKEN_CHARACTER) and ids:
            ids.pop()
        stream.align(ids, text[len(prompt) :])

    async def text(self, answering: Answering, tokens: list[int]) -> str:
        """Of tokens, by an engine's tokenizer. Raises Lost."""
        body = {"model": answering.model, "tokens": tokens}
        async with await self.post(answering.lease, "/detokenize", body, answering.headers) as response:
            if response.status != 200:
                raise Lost(f"its engine answers {response.status}")
            return (await self.unless_lost(answering.lease, response.json()))["prompt"]

    async def move(self, answering: Answering) -> None:
        """A planned move: another engine computes what there is while this one goes on; then the stream follows.

        It does so at the stage that answers now: a transition soon after would compute everything once more.
        """
        with contextlib.suppress(Refused, Lost):  # it is tried again
            stage = answering.stage
            stage = LAST if stage == LAST else max(stage or 1, self.nodes.stage_at(answering.lease))
            lease = await self.places.lease(answering.model, stage, {answering.lease.node})
            try:
                await self.compute_beforehand(answering, lease, stage)
                if answering.stream.can_continue and answering.source:
                    answering.target, lease = lease, None
                    answering.source.close()
            finally:
                if lease:
                    lease.close()

    async def compute_beforehand(self, answering: Answering, lease: Lease, stage: int | str) -> None:
        """K and V of a stream's tokens, at another engine, until few are missing. Raises Lost."""
        stream, headers = answering.stream, {**answering.headers, MIN_STAGE_HEADER: str(stage)}
        for _ in range(MOVE_ROUNDS):
            known = len(stream.ids)
            body = {"model": answering.model, "prompt": [*stream.prompt, *stream.ids], "max_tokens": 1}
            async with await self.post(lease, ANSWERS[0], body | {"temperature": 0}, headers) as response:
                await self.unless_lost(lease, response.read())
                if response.status != 200:
                    raise Lost(f"its engine answers {response.status}")
            if len(stream.ids) - known <= FEW_TOKENS:
                return

    # What operators see

    def state(self) -> dict:
        nodes = []
        for node in self.nodes.known.values():
            demands = self.places.demands[node.id]
            models = {
                name: {
                    "problem": where.problem, "bytes": where.sizes, "cached": where.cached,
                    "remote": where.remote, "read_mbps": where.speed / 1e6, "leases": demands[name].leases,
                    "seconds": finite(self.places.seconds_to_answer(node, name, where.min_stage)),
                }
                for name, where in node.models.items()
            }  # fmt: skip
            engines = [
                {"engine": engine.id, "model": engine.model, "url": engine.url,
                 "stage": 0 if engine.assumed else engine.stage, "num_stages": engine.num_stages,
                 "owned": engine.owned, "ending": engine.ending, "tokens": self.tokens[engine.id]}
                for engine in node.engines
            ]  # fmt: skip
            drained = node.id in self.nodes.draining
            state = "lost" if self.nodes.is_lost(node.id) else "draining" if drained else "up"
            nodes.append({"node": node.id, "address": node.address, "state": state, "slots": node.slots})
            nodes[-1] |= {"standby": node.standby, "models": models, "engines": engines}
        held = {name: self.places.held[name] for name in self.settings.models}
        starts = list(self.places.starts)
        found = {"nodes": nodes, "held": held, "streams": len(self.answering)}
        return found | {"counts": dict(self.counts), "starts": starts}

    async def fleet(self, _) -> web.Response:
        return web.json_response(self.state())

    async def page(self, _) -> web.Response:
        return web.Response(text=FLEET_PAGE, content_type="text/html", headers={"Content-Security-Policy": PAGE_POLICY})

    async def metrics(self, _) -> web.Response:
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(FleetMetrics(self.state()))
        return web.Response(body=generate_latest(registry), content_type="text/plain")


async def every(seconds: float, what: Callable) -> None:
    while True:
        await asyncio.sleep(seconds)
        await what()


def finite(seconds: float) -> float | None:
    return round(seconds, 2) if seconds < math.inf else None


async def read_event(content: aiohttp.StreamReader) -> bytes:
    """Up to the empty line that ends an event; empty: the stream has ended, perhaps within one."""
    data = await content.readuntil(b"\n\n")
    return data if data.endswith(b"\n\n") else b""


class FleetMetrics:
    """A collector for prometheus_client: what GET /metrics says."""

    def __init__(self, state: dict):
        self.state_now = state

    def collect(self):
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        state = self.state_now
        engines = Counter(engine["model"] for node in state["nodes"] for engine in node["engines"])
        gauges = (
            ("nodes", "Nodes, by their state", "state", Counter(node["state"] for node in state["nodes"])),
            ("engines", "Engines that run or are starting", "model", {name: engines[name] for name in state["held"]}),
            ("held_requests", "Requests that wait for an engine", "model", state["held"]),
        )
        for name, text, label, values in gauges:
            family = GaugeMetricFamily(f"fleet_{name}", text, labels=[label])
            for key, value in values.items():
                family.add_metric([key], value)
            yield family
        yield GaugeMetricFamily("fleet_streams", "Streams on their way", value=state["streams"])
        for name, text in (("requests", "Requests"), ("moved", "Streams moved as planned"), ("lost", "Engines lost")):
            yield CounterMetricFamily(f"fleet_{name}", text, value=state["counts"].get(name, 0))
        refused = CounterMetricFamily("fleet_refused", "Requests refused, by HTTP status", labels=["status"])
        for name, value in state["counts"].items():
            if name.startswith("refused_"):
                refused.add_metric([name.removeprefix("refused_")], value)
        yield refused


# ---- launch: Ray, the ingress' application, the terminal (driver) -----------------------------------

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


def build(arguments: dict):
    """The application for `serve deploy` (import_path: serve_fleet:build); `arguments` are Settings."""
    settings = Settings(**{**arguments, "options": tuple(arguments.get("options", ()))})
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no other process needs this file
    options = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    deployment = serve.deployment(Ingress).options(
        name="Ingress", num_replicas=1, max_ongoing_requests=1000,
        health_check_period_s=1.0, graceful_shutdown_timeout_s=5.0,
        ray_actor_options={**options, "runtime_env": {"env_vars": SCALE_SOONER}},
    )  # fmt: skip
    return deployment.bind(settings)


def name_models(checkpoints: list[str]) -> dict[str, str]:
    """name -> checkpoint; NAME=CKPT, or named by the folder. Raises UsageError."""
    models: dict[str, str] = {}
    for text in checkpoints:
        name, equals, checkpoint = text.partition("=")
        if not equals:
            name, checkpoint = Path(text.rstrip("/")).resolve().name, text
        if "://" in checkpoint and not is_uri(checkpoint):
            raise UsageError(f"{checkpoint}: a checkpoint is a folder, or at {' or '.join(URI_SCHEMES)}")
        if name in models:
            raise UsageError(f"two models are called {name}: name one of them with NAME=CKPT")
        models[name] = checkpoint if is_uri(checkpoint) else str(Path(checkpoint).resolve())
    return models


def stage_option(text: str) -> int | str:
    if text != LAST and (not text.isdecimal() or int(text) == 0):
        raise argparse.ArgumentTypeError(f"{text} is no stage: stages have numbers from 1 on, or are {LAST}")
    return text if text == LAST else int(text)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of the engines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="All other options go to the engines.")
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="progressive checkpoint, or NAME=CKPT")
    where = parser.add_argument_group("where")
    where.add_argument("--address", help="of a Ray cluster (auto: the one of this machine); default: a Ray of its own")
    where.add_argument("--host", default=Settings.host, help="that the endpoint listens at (default: %(default)s)")
    where.add_argument("--port", type=int, default=Settings.port, help="default: %(default)s")
    key = f"of clients; default: ${KEY_VARIABLE}, which nobody sees in a list of processes"
    where.add_argument("--api-key", default=os.environ.get(KEY_VARIABLE), help=key)
    where.add_argument("--write-config", type=Path, metavar="FILE", help="for `serve deploy`, instead of starting")
    engines = parser.add_argument_group("engines")
    engines.add_argument("--max-replicas", type=int, default=Settings.max_replicas, help="of a model on one node")
    engines.add_argument("--room", type=int, default=Settings.room, help="requests per engine before another starts")
    engines.add_argument(
        "--idle", type=float, default=Settings.idle, help="seconds that an engine without requests goes on"
    )
    engines.add_argument("--hold-limit", type=int, default=Settings.hold_limit, help="requests of a model that wait")
    engines.add_argument("--start-timeout", type=float, default=Settings.start_timeout, help="seconds")
    min_stage = f"a number, or {LAST}: nobody is answered below it; default: see progressive_serve.py"
    engines.add_argument("--min-stage", type=stage_option, metavar="K", help=min_stage)
    engines.add_argument("--no-standby", action="store_true", help="spare its memory; starts take the imports longer")
    engines.add_argument("--num-cpus", type=float, help="of an engine; default: 1, or 0 with --num-gpus")
    engines.add_argument("--num-gpus", type=float, help="of an engine; default: on a GPU its tensor parallel size")
    beside = Path(__file__).with_name(SERVER)
    engines.add_argument("--server", type=Path, default=beside, help=f"script of the engines; default: {SERVER}")
    args, options = parser.parse_known_intermixed_args()
    for option in options:
        if option.split("=")[0] in OWN_OPTIONS:
            parser.error(f"{option} is the fleet's own business; --host and --port are those of its endpoint")
    given = [*(text.partition("=")[2] or text for text in args.checkpoints), *options]
    if (shown := masked(given)) != given:
        parser.error(
            f"{' '.join(shown)}: everybody can see what a command line or a configuration says\n"
            f"give secrets in the environment in which Ray starts on each node (HF_TOKEN); of clients: {KEY_VARIABLE}"
        )
    if not args.server.is_file():
        parser.error(f"--server {args.server} is not there: copy {SERVER} beside this file")
    return args, options


def settings_of(args: argparse.Namespace, options: list[str]) -> Settings:
    num_gpus = args.num_gpus
    if num_gpus is None:
        num_gpus = tensor_parallel_size(options) if shutil.which("nvidia-smi") else 0
    return Settings(
        models=name_models(args.checkpoints), server=args.server.name, options=tuple(options), host=args.host,
        port=args.port, api_key=args.api_key, max_replicas=args.max_replicas, room=args.room, idle=args.idle,
        hold_limit=args.hold_limit, start_timeout=args.start_timeout, min_stage=args.min_stage,
        standby=not args.no_standby, num_gpus=num_gpus,
        num_cpus=args.num_cpus if args.num_cpus is not None else 0.0 if num_gpus else 1.0,
    )  # fmt: skip


def tensor_parallel_size(options: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    return parser.parse_known_args(options)[0].tensor_parallel_size


def write_config(path: Path, settings: Settings, server: Path) -> None:
    """The same fleet for `serve deploy`; this file and the server's have to be on every node, at the same path.

    Of the key it names the variable, which Ray's head node has to be started with.
    """
    import yaml

    arguments = asdict(settings) | {"server": str(server.resolve()), "options": list(settings.options)}
    if arguments.pop("api_key"):
        arguments["api_key_variable"] = KEY_VARIABLE
        print(f"{path} holds no key: start Ray on the head node with {KEY_VARIABLE} in its environment")
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parent)}}
    app = {"name": INGRESS, "route_prefix": None, "import_path": "serve_fleet:build", "args": arguments}
    config = {"proxy_location": "Disabled", "applications": [{**app, "runtime_env": environment}]}
    try:
        path.write_text(yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise UsageError(f"--write-config {path} cannot be written ({error.strerror}): name another file") from error


def check_address(address: str | None) -> None:
    """Raises UsageError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise UsageError(f"--address {address}: no Ray cluster can be reached there ({error})") from error


@contextlib.contextmanager
def cluster(args: argparse.Namespace):
    """Ray: a cluster that is there, or one of this machine, of which nothing stays. Raises UsageError."""
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as folder:
        scripts = Path(folder) / "scripts"
        scripts.mkdir()
        for script in (Path(__file__), args.server):
            shutil.copy(script, scripts)
        options = {"runtime_env": {"working_dir": str(scripts)}, "namespace": "serve", "log_to_driver": False}
        if args.address is None:
            os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(16).hex())  # else Ray writes one to the home folder
            os.environ.setdefault("RAY_worker_niceness", "0")  # else engines, too, give way to everything else
            options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            options["_temp_dir"] = folder
        else:
            options["address"] = args.address
        try:
            ray.init(logging_level="error", **options)
        except (ConnectionError, OSError, RuntimeError) as error:
            raise UsageError(f"Ray does not start, or cannot be reached: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


def start(settings: Settings) -> None:
    """The ingress, and with it the rest."""
    serve.start(proxy_location="Disabled")
    serve.run(build(asdict(settings)), name=INGRESS, route_prefix=None)


def stop(settings: Settings) -> None:
    """End what belongs to this fleet: applications, engines, agents. Others' on the same cluster stay."""
    names = [name for name in serve.status().applications if name.startswith(f"{INGRESS}-")]
    actors = ray.util.list_named_actors(all_namespaces=True)
    agents = [ray.get_actor(actor["name"], NAMESPACE) for actor in actors if actor["namespace"] == NAMESPACE]
    serve.delete(INGRESS, _blocking=True)
    for agent in agents:
        agent.leave.remote()
    for name in names:
        serve.delete(name, _blocking=True)
    for agent in agents:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(agent.end.remote(), timeout=2 * KILL_SECONDS)
        ray.kill(agent)


def show(url: str, ended: threading.Event) -> None:
    """On the terminal, whenever it changes, until `ended`: what describe() says. Raises UnreachableError."""
    import urllib.request

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows what listens here
    before, there = None, time.monotonic()
    while not ended.wait(1.0):
        if ray_is_there():
            there = time.monotonic()
        elif time.monotonic() - there > GONE_SECONDS:
            raise UnreachableError("Ray has ended, and the fleet with it")
        with contextlib.suppress(OSError):
            with direct.open(f"{url}/fleet", timeout=ANSWER_SECONDS) as answer:
                state = json.load(answer)
            if (text := describe(state)) != before:
                print(time.strftime("%H:%M:%S"), text, flush=True)
                before = text


def ray_is_there() -> bool:
    """Whether its control store (GCS) listens: Ray's own calls would wait a minute for it, and end this process."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS):
        return True
    return False


def describe(state: dict) -> str:
    """Of each node what lies where, and its engines with their stages; requests that wait."""
    parts = []
    for node in state["nodes"]:
        tiers = [tier(name, where) for name, where in node["models"].items()]
        engines = [
            "{model} stage {stage}/{num_stages}".format(**engine) if engine["stage"] else f"{engine['model']} starting"
            for engine in node["engines"]
        ]
        parts.append(f"{node['address']} ({node['state']}; {', '.join(tiers)}): {', '.join(engines) or 'nothing runs'}")
    held = sum(state["held"].values())
    return "; ".join(parts) + (f"; {held} waiting" if held else "")


def tier(name: str, where: dict) -> str:
    """Where a start would find the weights: so roughly that it does not change all the time."""
    if where["problem"]:
        return where["problem"]
    tenths = round(10 * sum(where["cached"]) / max(1, sum(where["bytes"])))
    speed = float(f"{where['read_mbps']:.1g}")
    rest = f"{'remote' if where['remote'] else 'disk'} at {speed:.0f} MB/s"
    tiers = [f"{10 * tenths} % in page cache"] * (tenths > 0) + [rest] * (tenths < 10)
    return f"{name}: {', '.join(tiers)}"


# ---- main -------------------------------------------------------------------------------------------


def main() -> int:
    args, options = parse_args()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        settings = settings_of(args, options)
        if args.write_config:
            write_config(args.write_config, settings, args.server)
            return 0
        check_address(args.address)
        with cluster(args):
            for number in (signal.SIGINT, signal.SIGTERM):  # Ray puts in its own
                signal.signal(number, lambda *_: ended.set())
            try:
                start(settings)
                url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}"
                print(f"listening at {url}/v1", flush=True)
                show(url, ended)
            finally:
                if ray_is_there():
                    stop(settings)
    except (UsageError, UnreachableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    import serve_fleet  # not __main__, which Ray's other processes have as well

    sys.exit(serve_fleet.main())
