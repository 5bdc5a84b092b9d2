"""Many cold starts, transitions and kills in a row: what must never happen is counted. `make soak`.

    python tests/soak.py --json results/soak.json
    python tests/soak.py --starts 2 --transitions 30 --kills 3 --json /tmp/soak.json    # the short form: make test-all

Starts: servers of layers and planes, by themselves and from a standby, with the checkpoint out of the page cache. The
reader is held after stage 1 until all streams run, and reads slowly, so that each of them lives through all
transitions. Transitions: back and forth, by the Python API, with requests in flight. Kills: at a random moment, with a
random signal; nothing may be left, and the next start has to work. The model is the small one that `make test` trains;
answers are compared with stock vLLM's, in float32.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests
from conftest import SPLIT, run_script
from servers import ROOT, Server, Standby, free_port, journal_of, shared_memory, wait_for
from tqdm import tqdm

from train_adapters import provenance

READ_SECONDS = 3.0  # that the whole checkpoint takes
SERVED = ["--dtype", "float32", "--max-num-seqs", "48", "--kv-cache-memory-bytes", str(512 << 20), "--min-stage", "1"]
STREAM_TOKENS, CHECKED_TOKENS, ANSWER_TOKENS = 400, 8, 12
KILL_SECONDS = 12.0  # a server is up after about eight
WARM_TRANSITIONS = 20  # after which memory is looked at


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--starts", type=int, default=20, help="cold starts (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=32, help="running in each (default: %(default)s)")
    parser.add_argument("--transitions", type=int, default=200, help="by the Python API (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=100, help="starts that are killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "soak.json", help="where the result goes")
    return parser.parse_args()


def prompt(number: int) -> str:
    return f"Question number {number}: who wrote the book, and when was it?"


def complete(url: str, prompts: list, tokens: int, **options) -> list[list[int]]:
    body = {"prompt": prompts, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = requests.post(f"{url}/v1/completions", json=body | options, timeout=120)
    response.raise_for_status()
    return [choice["token_ids"] for choice in response.json()["choices"]]


def stock_answers(model: Path, streams: int, folder: Path) -> list[list[int]]:
    """What stock vLLM answers."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += [*SERVED[:-2], "--enforce-eager", "--max-model-len", "512"]
    with open(folder / "stock.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        return complete(f"http://127.0.0.1:{port}", [prompt(number) for number in range(streams)], ANSWER_TOKENS)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def drop_from_page_cache(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# ---- cold starts -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Stream:
    """One answer, token by token."""

    url: str
    prompt: str
    full: threading.Event  # the server is the full model
    tokens: list[int] = dataclasses.field(default_factory=list)
    prompt_ids: list[int] = dataclasses.field(default_factory=list)
    began: int = 0
    ended: int = 0
    usage: int = 0
    at_full: int | None = None  # tokens that it had when the server was the full model
    failure: str = ""

    def run(self) -> "Stream":
        body = {"prompt": self.prompt, "max_tokens": STREAM_TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
        try:
            with requests.post(f"{self.url}/v1/completions", json=body, stream=True, timeout=120) as response:
                response.raise_for_status()
                self.began = int(response.headers["X-Progressive-Stage"])
                for line in response.iter_lines():
                    if line.startswith(b"data: {"):
                        self.take(json.loads(line[6:]))
        except (requests.RequestException, KeyError, ValueError) as error:
            self.failure = repr(error)
        return self

    def take(self, chunk: dict) -> None:
        for choice in chunk["choices"]:
            self.tokens += choice["token_ids"] or []
            self.prompt_ids = choice.get("prompt_token_ids") or self.prompt_ids
        if self.at_full is None and self.full.is_set():
            self.at_full = len(self.tokens)
        self.ended = chunk.get("progressive_stage", self.ended)
        self.usage = (chunk.get("usage") or {}).get("completion_tokens", self.usage)

    def last_tokens(self) -> list[int]:
        return self.tokens[-CHECKED_TOKENS:]

    def has_a_checked_end(self) -> bool:
        """Whether its last tokens were computed by the full model."""
        return self.at_full is not None and self.at_full <= STREAM_TOKENS - CHECKED_TOKENS


def cold_start(checkpoint: Path, standby: Standby | None, streams: int, expected: list, log: Path) -> dict:
    """One start, with its streams, and what went wrong in it: how many of each."""
    drop_from_page_cache(checkpoint)
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    slowly = ["--limit-read-mbps", f"{size / 1e6 / READ_SECONDS:.3f}"]
    server, full = Server(log, checkpoint, *SERVED, *slowly, standby=standby), threading.Event()
    try:
        reader = hold_reader(server, standby)
        server.wait_until_ready(1)
        running = [Stream(server.url, prompt(number), full) for number in range(streams)]
        with ThreadPoolExecutor(streams) as pool:
            answers = pool.map(Stream.run, running)
            wait_for(lambda: all(stream.began or stream.failure for stream in running))
            reader.resume()
            server.wait_until_ready(3)
            full.set()
            list(answers)
        checked = [stream for stream in running if stream.has_a_checked_end()]
        asked = [stream.prompt_ids + stream.tokens[:-CHECKED_TOKENS] for stream in checked]
        ends = complete(server.url, asked, CHECKED_TOKENS) if asked else []
        final = complete(server.url, [prompt(number) for number in range(streams)], ANSWER_TOKENS, min_stage=3)
        timeline = requests.get(f"{server.url}/progress", timeout=30).json()["timeline"]
        return {
            "kind": checkpoint.name,
            "from_standby": bool(standby),
            "transitions": sum(event["event"] == "active" for event in timeline) - 1,
            "streams": streams,
            "not_crossed": sum((stream.began, stream.ended) != (1, 3) for stream in running),
            "checked": len(checked),
            "failed": sum(bool(stream.failure) for stream in running),
            "truncated": sum(min(len(stream.tokens), stream.usage) < STREAM_TOKENS for stream in running),
            "duplicated": sum(max(len(stream.tokens), stream.usage) > STREAM_TOKENS for stream in running),
            "relabelled": sum(end != stream.last_tokens() for end, stream in zip(ends, checked, strict=True)),
            "unlike_stock": sum(answer != other for answer, other in zip(final, expected, strict=True)),
            "exit_status": server.stop(),
        }
    finally:
        server.end()


def hold_reader(server: Server, standby: Standby | None) -> psutil.Process:
    """The server's reader process, suspended when stage 1 has arrived."""

    def readers() -> list[psutil.Process]:
        parents = standby.servers() if standby else [psutil.Process(server.process.pid)]
        return [child for parent in parents for child in parent.children() if "_read" in child.cmdline()]

    reader = wait_for(readers)[0]
    journal = journal_of(reader)
    wait_for(lambda: '"resident"' in journal.read_text())
    reader.suspend()
    return reader


# ---- transitions -----------------------------------------------------------------------------------


def transitions(checkpoint: Path, count: int, pipe) -> None:
    """In a process of its own: resident bytes after each of many transitions, with requests in flight."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    from vllm import SamplingParams

    import progressive_serve

    options = {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
    llm = progressive_serve.load_llm(checkpoint, start_stage=1, **options)
    engine, resident, number = llm.llm_engine, [], 0
    llm.stages.advance(3)
    stages = itertools.cycle((1, 2, 3))
    for stage in itertools.islice(stages, count):
        while engine.get_num_unfinished_requests() < 4:
            number += 1
            engine.add_request(str(number), prompt(number), SamplingParams(max_tokens=40, ignore_eos=True))
        for _ in range(10):
            engine.step()
        progressive_serve.pause_engine(llm)
        failures = llm.collective_rpc("progressive_activate", args=(stage,))
        progressive_serve.resume_engine(llm)
        assert not any(failures), failures
        engine.step()
        resident.append(psutil.Process().memory_info().rss)
        pipe.send(stage)
    pipe.send(resident)


def force_transitions(checkpoint: Path, count: int) -> dict:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=transitions, args=(checkpoint, count, there))
    process.start()
    there.close()
    try:
        for _ in tqdm(range(count), desc="transitions"):
            here.recv()
        resident = here.recv()
    finally:
        process.kill()
        process.join()
    later = resident[min(WARM_TRANSITIONS, count - 1) :]
    return {"count": count, "resident_bytes": resident, "growth": max(later) / later[0] - 1}


# ---- kills -----------------------------------------------------------------------------------------


def kill_at_a_random_moment(checkpoint: Path, standby: Standby | None, chance: random.Random, log: Path) -> dict:
    """A start that is killed, and what it has left behind."""
    number = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
    seconds, folder = chance.uniform(0, KILL_SECONDS), Path(tempfile.mkdtemp(prefix="soak-"))
    row = {"kind": checkpoint.name, "from_standby": bool(standby), "signal": number.name, "seconds": round(seconds, 3)}
    server = Server(log, checkpoint, *SERVED, standby=standby, env={"TMPDIR": str(folder)})
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end and server.process.poll() is None:
            time.sleep(0.01)
        row["ended_before"] = server.process.poll() is not None
        row["answered"] = (
            not row["ended_before"] and server.is_ready(3) and len(complete(server.url, ["Hello"], 4)[0]) == 4
        )
        row["log"] = server.tail() if row["ended_before"] else ""
        running = [one for one in (server, standby) if one and one.process.poll() is None]
        parents = [psutil.Process(one.process.pid) for one in running]
        processes = [child for parent in parents for child in parent.children(recursive=True)]
        shared = {path for process in processes for path in shared_memory(process)}
        server.process.send_signal(number)
        row["exit_status"] = server.process.wait(30)
        _, alive = psutil.wait_procs(processes, timeout=15)
        row["processes_left"] = [process.name() for process in alive]
        row["folders_left"] = [path.name for path in folder.glob("progressive-serve-*")]
        row["shared_memory_left"] = [path.name for path in shared if path.exists()]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            row["port_left"] = probe.connect_ex(("127.0.0.1", server.port)) == 0
        left = [*alive, *row["folders_left"], *row["shared_memory_left"]]
        row["clean"] = not (row["ended_before"] or left or row["port_left"])
        return row
    finally:
        server.end()
        shutil.rmtree(folder, ignore_errors=True)


# ---- all of it -------------------------------------------------------------------------------------


def end_once(number: int, _) -> None:
    """A killed soak ends its servers as well, and another signal does not keep it from that."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    args = parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_once)
    model, layers, found = ROOT / "demo" / "model", ROOT / "demo" / "checkpoint", {"soak": provenance(args)}
    if not (layers / "progressive.json").is_file():
        print("error: demo/checkpoint is not there: make demo/checkpoint/progressive.json", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="soak-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        done = run_script(SPLIT, model, folder / "planes", "--planes")
        assert done.returncode == 0, done.stderr
        shutil.copytree(layers, folder / "layers", ignore=shutil.ignore_patterns("adapters"))
        kinds, chance = [folder / "layers", folder / "planes"], random.Random(args.seed)
        expected = stock_answers(model, args.streams, folder)
        standby = Standby(folder)
        stack.callback(standby.end)
        standby.wait()
        turns = itertools.cycle(itertools.product((standby, None), kinds))  # both kinds, half of them from the standby
        found["starts"] = [
            cold_start(kind, by, args.streams, expected, folder / "server.log")
            for (by, kind), _ in zip(turns, tqdm(range(args.starts), desc="cold starts"), strict=False)
        ]
        found["transitions"] = force_transitions(folder / "layers", args.transitions) if args.transitions else None
        found["kills"] = [
            kill_at_a_random_moment(kind, by, chance, folder / "server.log")
            for (by, kind), _ in zip(turns, tqdm(range(args.kills), desc="kills"), strict=False)
        ]
        found["last"] = cold_start(folder / "layers", None, args.streams, expected, folder / "server.log")
    wrong = ("not_crossed", "failed", "truncated", "duplicated", "relabelled", "unlike_stock", "exit_status")
    counts = {name: sum(abs(row[name]) for row in [*found["starts"], found["last"]]) for name in wrong}
    counts |= {"unclean": sum(not row["clean"] for row in found["kills"])}
    found = found.pop("soak") | found | {"counts": counts}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(counts | {"growth": found["transitions"] and found["transitions"]["growth"]}))
    return int(any(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
