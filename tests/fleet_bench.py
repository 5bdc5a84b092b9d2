"""What serve_fleet.py adds, and how fast it is about nodes, engines and bursts: figures for README.md.

    python tests/fleet_bench.py --json results/fleet.json                    # all parts, about an hour
    python tests/fleet_bench.py --parts choice,overhead --json /tmp/fleet.json
    python tests/fleet_bench.py --plot results/fleet.json                    # draw again

Nodes are Ray's, on one machine. Engines are tests/fake_engine.py (a start time, a rate of tokens, no model), but in
`real`, where they are progressive_serve.py, from a standby. Parts:
    choice      simulated clusters of 3 to 50 nodes: how often the node that is chosen is the best
    overhead    the same request asked of an engine and through the ingress, in turns: time to the first token, and from
                the moment that an engine sends a token until the client has it; 8 streams
    launch      from zero, again and again: from the request at the ingress to the spawn of an engine
    kill        an engine, and a node, killed under 8 streams: until each has its next token
    real        the demo model from zero, and 8 streams from a node that is drained, against the undisturbed answers
    burst       80 requests within 12 s, from zero and back, on four places: the picture
    trace       arrivals and lengths of the Azure LLM inference trace 2023 (code), of which one in ten asks for the last
                stage; and a gamma process (CV 8), of the fleet and of Ray Serve alone, with replicas that start as
                stock vLLM does, on as many slots
"""

import argparse
import asyncio
import contextlib
import csv
import datetime
import importlib.metadata
import itertools
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
from conftest import ROOT, free_port
from fleets import FAKE_ENGINE, WITHOUT_MODEL, Fleet, engine_process, new_cluster, undisturbed
from tqdm import tqdm

from serve_fleet import Demand, ModelOnNode, Node, Settings, choose, seconds_to_start
from train_adapters import provenance

TRACE = ROOT.parent / "shared" / "data" / "azure-llm-trace" / "code-2023.csv"
DEMO = ROOT / "demo" / "checkpoint"
STREAMS = 8
NODES, SLOTS, ROOM, IDLE = 2, 2, 4, 30
TOKEN_SECONDS = 0.05
MIN_STAGE_SHARE, STAGE_SECONDS = 0.1, [0.0, 1.0, 3.0]  # of the requests, which ask for the last stage


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# ---- choice: simulated clusters ---------------------------------------------------------------------


def random_node(name: str, chance: random.Random) -> tuple[Node, Node]:
    """A node as it is, and as its agent has measured it: within 10 %."""
    sizes = [int(2e9), int(1e9), int(1e9)]
    cached = chance.choice([0.0, 0.0, 0.3, 1.0])
    standby = chance.random() < 0.5

    def described(error: float) -> Node:
        def about(value: float) -> float:
            return value * (1 + chance.uniform(-error, error))

        model = ModelOnNode(sizes, [int(size * cached) for size in sizes], speed=about(speed))
        return Node(name, "", 1, about(listening), standby=standby, launch=about(launch), models={"m": model})

    speed = 10 ** chance.uniform(8, 9.5)  # 0.1 to 3 GB/s
    listening = chance.uniform(1.5, 3.0) if standby else chance.uniform(6.0, 12.0)
    launch = chance.uniform(1.0, 2.0)
    return described(0.0), described(0.1)


def measure_choice(clusters: int = 2000) -> dict:
    chance, best, lost, errors = random.Random(0), 0, [], []
    for number in range(clusters):
        pairs = [random_node(f"{number}-{node}", chance) for node in range(chance.randint(3, 50))]
        true = {actual.id: seconds_to_start(actual, "m", 1) for actual, _ in pairs}
        cost = {actual.id: true[actual.id] + 0.05 * seconds_to_start(actual, "m", 3) for actual, _ in pairs}
        demands = defaultdict(lambda: defaultdict(Demand))
        chosen, estimate = choose([seen for _, seen in pairs], "m", None, demands, Settings({"m": "m"}), 0.0)
        best += cost[chosen.id] <= 1.05 * min(cost.values())  # nodes that are as fast are as good
        lost.append(true[chosen.id] / min(true.values()) - 1)
        errors.append(abs(estimate / true[chosen.id] - 1))
    many = [random_node(str(node), chance)[1] for node in range(1000)]
    begin = time.perf_counter()
    for _ in range(100):
        choose(many, "m", None, defaultdict(lambda: defaultdict(Demand)), Settings({"m": "m"}), 0.0)
    return {
        "decision_seconds_1000_nodes": (time.perf_counter() - begin) / 100,
        "state_bytes_per_node_and_model": len(pickle.dumps(asdict(many[0].models["m"]))),
        "clusters": clusters,
        "best": best / clusters,
        "slower_than_best_mean": statistics.mean(lost),
        "estimate_error_p95": percentile(errors, 0.95),
    }


# ---- clients ----------------------------------------------------------------------------------------


@dataclass
class Answer:
    """A streamed answer as its client has seen it; times of time.time(), which engines on this machine share."""

    status: int
    asked: float
    stage: int = 0  # that has answered
    at: list[float] = field(default_factory=list)  # of each token
    delays: list[float] = field(default_factory=list)  # since its engine has sent it
    text: str = ""
    tokens: int = 0  # by the usage in its last event
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.at[0] - self.asked

    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.at)]


async def ask(session: aiohttp.ClientSession, url: str, prompt: str, count: int, **options) -> Answer:
    body = {"model": "m", "prompt": prompt, "max_tokens": count, "stream": True, "temperature": 0, **options}
    body["stream_options"] = {"include_usage": True}
    asked = time.time()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        answer = Answer(response.status, asked, int(response.headers.get("X-Progressive-Stage", 0)))
        if response.status != 200:
            return answer
        while data := await response.content.readuntil(b"\n\n"):
            if data.startswith(b"data: {"):
                event = json.loads(data[6:])
                if "error" in event:
                    answer.error = event["error"]["message"]
                elif event.get("usage"):
                    answer.tokens = event["usage"]["completion_tokens"]
                elif event["choices"]:
                    answer.at.append(time.time())
                    answer.text += event["choices"][0]["text"]
                    if "sent" in event:
                        answer.delays.append(answer.at[-1] - event["sent"])
    return answer


async def ask_all(url: str, number: int, count: int, salt: str = "", then=None, **options) -> list[Answer]:
    """Streams at the same time; `then` is awaited once half a second of them has passed."""
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 20) as session:
        streams = [asyncio.create_task(ask(session, url, f"{salt} {one}", count, **options)) for one in range(number)]
        if then:
            await asyncio.sleep(0.5)
            await asyncio.to_thread(then)
        return await asyncio.gather(*streams)


# ---- overhead, launch, kill: engines without a model ------------------------------------------------


def measure_overhead(fleet: Fleet, rounds: int = 20) -> dict:
    """Differences of medians; the engine sends a token every 20 ms to each of 8 streams."""
    fleet.ask()
    (engine,) = fleet.engines()
    found = {"direct": [], "fleet": []}
    for number in tqdm(range(rounds), desc="overhead"):
        for name, url in (("direct", engine["url"]), ("fleet", fleet.url)):
            found[name] += asyncio.run(ask_all(url, STREAMS, 64, f"overhead {number}"))
    first = {name: statistics.median(answer.ttft for answer in answers) for name, answers in found.items()}
    between = {
        name: statistics.median((answer.at[-1] - answer.at[0]) / (len(answer.at) - 1) for answer in answers)
        for name, answers in found.items()
    }
    delay = {name: statistics.median(d for answer in answers for d in answer.delays) for name, answers in found.items()}
    return {
        "ttft": first,
        "token_delay": delay,
        "added_ttft": first["fleet"] - first["direct"],
        "added_delay": delay["fleet"] - delay["direct"],
        "time_per_token": between,
        "added_per_token": between["fleet"] - between["direct"],
    }


def from_zero(fleet: Fleet, rounds: int, rest: float) -> list[float]:
    """Seconds to the first token of a request that comes `rest` seconds after the last engine has ended, each time."""
    waited = []
    for number in tqdm(range(rounds), desc="from zero"):
        fleet.wait(lambda: fleet.engines() == [], "no engine runs")
        time.sleep(rest)
        (answer,) = asyncio.run(ask_all(fleet.url, 1, 8, f"Question {number}: who wrote the book?"))
        waited.append(answer.ttft)
    return waited


def measure_launch(fleet: Fleet, rounds: int = 20) -> dict:
    waited = from_zero(fleet, rounds, 1.0)
    starts = fleet.state()["starts"]
    errors = [abs(start["estimated"] / start["measured"] - 1) for start in starts]
    launches = [start["launch"] for start in starts]
    return {
        "launch": launches,
        "launch_p95": percentile(launches, 0.95),
        "ttft": waited,
        "estimate_errors": errors,
        "estimate_error_median": statistics.median(errors),
    }


def measure_kill(fleet: Fleet, harm) -> dict:
    """Until each of 8 streams has its next token, after `harm`."""
    fleet.ask()
    noticed = []

    def then():
        begin = time.time()
        harm(fleet)
        while fleet.state()["counts"].get("lost", 0) < STREAMS:
            time.sleep(0.01)
        noticed.append(time.time() - begin)

    answers = asyncio.run(ask_all(fleet.url, STREAMS, 300, "kill", then))
    whole = sum(answer.text == undisturbed(f"kill {number}", 300) for number, answer in enumerate(answers))
    return {
        "streams": STREAMS,
        "whole": whole,
        "noticed": noticed[0],
        "longest_gap": max(max(answer.gaps()) for answer in answers),
    }


def kill_engine(fleet: Fleet) -> None:
    engine_process(fleet.engines()[0]).kill()


def kill_node(fleet: Fleet) -> None:
    fleet.cluster.remove_node(fleet.ray_node(fleet.engines()[0]["node"]), allow_graceful=False)


# ---- real engines -----------------------------------------------------------------------------------


def measure_real(fleet: Fleet, rounds: int = 5) -> dict:
    """From zero, and a node that is drained under 8 greedy streams; float32."""
    time.sleep(20)  # until the standbys have imported
    first = from_zero(fleet, rounds, 3.0)
    options = {"min_tokens": 900}
    before = asyncio.run(ask_all(fleet.url, STREAMS, 900, "Who was", **options))

    def drain():
        fleet.drain(max(fleet.state()["nodes"], key=lambda node: node["models"]["m"]["leases"])["node"])

    moved = asyncio.run(ask_all(fleet.url, STREAMS, 900, "Who was", drain, **options))
    return {
        "ttft_from_zero": first,
        "ttft_from_zero_max": max(first),
        "starts": fleet.state()["starts"],
        "streams": STREAMS,
        "moved": fleet.state()["counts"].get("moved", 0),
        "lost": fleet.state()["counts"].get("lost", 0),
        "same_text": sum(one.text == other.text for one, other in zip(before, moved, strict=True)),
        "tokens": [sum(answer.tokens for answer in answers) for answers in (before, moved)],
        "longest_gap": max(max(answer.gaps()) for answer in moved),
        "longest_gap_undisturbed": max(max(answer.gaps()) for answer in before),
    }


# ---- trace: bursts, against Ray Serve alone ---------------------------------------------------------


def azure_arrivals(seconds: float, rate: float) -> list[tuple[float, int]]:
    """(when, tokens to make) of the trace's first minutes, thinned to about so many requests per second."""
    rows = []
    with open(TRACE) as file:
        for row in csv.DictReader(file):
            at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            rows.append((at, int(row["GeneratedTokens"])))
    begin = rows[0][0]
    rows = [(at - begin, tokens) for at, tokens in rows if at - begin < seconds]
    keep, chance = min(1.0, rate * seconds / len(rows)), random.Random(0)
    return [row for row in rows if chance.random() < keep]


def gamma_arrivals(seconds: float, rate: float, cv: float = 8.0) -> list[tuple[float, int]]:
    """Intervals of a gamma distribution with that coefficient of variation: bursts, and long silences."""
    chance, shape, at, rows = random.Random(1), 1 / cv**2, 0.0, []
    while (at := at + chance.gammavariate(shape, 1 / (rate * shape))) < seconds:
        rows.append((at, chance.randint(5, 60)))
    return rows


async def replay(url: str, arrivals: list[tuple[float, int]], stages: bool) -> list[tuple[Answer, int]]:
    """Each answer, with the stage that it was to have; `stages`: whether some ask for the last one."""
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:
        begin, asked = time.monotonic(), []
        chance = random.Random(2)
        for number, (at, tokens) in enumerate(tqdm(arrivals, desc="trace")):
            await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
            stage = {"min_stage": len(STAGE_SECONDS)} if stages and chance.random() < MIN_STAGE_SHARE else {}
            asked.append(asyncio.create_task(ask(session, url, f"trace {number}", tokens, **stage)))
            asked[-1].set_name(str(stage.get("min_stage", 1)))
        answers = await asyncio.gather(*asked)
        return [(answer, int(task.get_name())) for answer, task in zip(answers, asked, strict=True)]


def describe_replay(answered: list[tuple[Answer, int]]) -> dict:
    answers = [answer for answer, _ in answered]
    done = [answer for answer in answers if answer.status == 200 and not answer.error]
    first = [answer.ttft for answer in done]
    statuses = Counter(answer.status for answer in answers)
    return {
        "requests": len(answers),
        "statuses": {str(status): count for status, count in statuses.items()},
        "errors": sum(answer.error is not None for answer in answers),
        "asked_for_a_stage": sum(stage > 1 for _, stage in answered),
        "below_their_stage": sum(
            stage > 1 and answer.status == 200 and answer.stage < stage for answer, stage in answered
        ),
        "ttft_p50": percentile(first, 0.5),
        "ttft_p99": percentile(first, 0.99),
    }


class Stock:
    """What people build on Ray Serve: a replica that starts stock vLLM, and passes on its tokens."""

    def __init__(self, engine: dict, script: str, checkpoint: str):
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, script, checkpoint, "--host", "127.0.0.1", "--port", str(port)]
        self.process = subprocess.Popen(command, env={**os.environ, "FAKE_ENGINE": json.dumps(engine)})
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return
            time.sleep(0.05)

    async def __call__(self, request):
        from starlette.responses import StreamingResponse

        body = await request.json()

        async def tokens():
            async with aiohttp.ClientSession() as session:
                async with session.post(f"{self.url}/v1/completions", json=body) as response:
                    async for data in response.content.iter_any():
                        yield data

        return StreamingResponse(tokens(), media_type="text/event-stream")

    def __del__(self):
        self.process.kill()


# ---- burst: the picture -----------------------------------------------------------------------------


def measure_burst(fleet: Fleet, number: int = 80, seconds: float = 12.0) -> dict:
    """From zero and back: of each engine its stage and its tokens so far, four times a second."""
    chance, rows, begin, ended = random.Random(3), [], time.time(), threading.Event()

    def look():
        while not ended.wait(0.25):
            for node in fleet.state()["nodes"]:
                row = {"seconds": time.time() - begin, "node": node["node"][:8]}
                for engine in node["engines"]:
                    rows.append(row | {key: engine[key] for key in ("engine", "stage", "tokens")})

    looking = threading.Thread(target=look)
    looking.start()
    arrivals = sorted((chance.uniform(0, seconds), chance.randint(40, 120)) for _ in range(number))
    described = describe_replay(asyncio.run(replay(fleet.url, arrivals, True)))
    fleet.wait(lambda: fleet.engines() == [], "back to zero")
    ended.set()
    looking.join()
    return described | {"seconds": seconds, "rows": rows}


def draw_burst(burst: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 4.5), height_ratios=(3, 1))
    series = defaultdict(list)
    for row in burst["rows"]:
        series[row["engine"]].append(row)
    for number, rows in enumerate(series.values()):
        at = [row["seconds"] for row in rows]
        smooth = []  # over two seconds
        for row in rows:
            first = next(one for one in rows if one["seconds"] >= row["seconds"] - 2)
            smooth.append((row["tokens"] - first["tokens"]) / max(0.25, row["seconds"] - first["seconds"]))
        color = ("#2f7d4f", "#4c6a9c", "#b06a2c", "#7a4f8c")[number % 4]
        above.plot(at, smooth, color=color, label=f"engine {number + 1}")
        below.step(at, [row["stage"] for row in rows], where="post", color=color)
    above.set_ylabel("tokens/s")
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    below.set_ylabel("stage")
    below.set_yticks([0, 1, 2, 3])
    below.set_xlabel(
        f"seconds; {burst['requests']} requests come in the first {burst['seconds']:g}, no engine runs before"
    )
    below.set_xlim(left=0)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


# ---- Ray Serve alone ----


@contextlib.contextmanager
def serve_alone(cluster, start: float) -> Iterator[str]:
    """Ray Serve's own way: one deployment over all nodes, scaled by its requests; yields its address."""
    import ray
    from ray import serve

    port = free_port()
    ray.init(address=cluster.address, namespace="serve", logging_level="error", log_to_driver=False)
    try:
        serve.start(http_options={"port": port, "host": "127.0.0.1"})
        scaling = {"min_replicas": 0, "max_replicas": NODES * SLOTS, "target_ongoing_requests": ROOM}
        scaling |= {"upscale_delay_s": 0.0, "downscale_delay_s": float(IDLE), "metrics_interval_s": 0.5}
        scaling |= {"look_back_period_s": 1.0}
        engine = {"start": start, "stage_seconds": [0.0], "token_seconds": TOKEN_SECONDS}
        options = {"num_cpus": 1, "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT / "tests")}}}
        stock = serve.deployment(Stock).options(
            autoscaling_config=scaling, max_ongoing_requests=ROOM, ray_actor_options=options
        )
        serve.run(stock.bind(engine, str(FAKE_ENGINE), str(DEMO)), name="stock")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


# ---- main -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nodes(number: int = 2, slots: int = 1, **engine):
    """A Ray cluster of so many nodes with so many CPUs, and the settings of its engines.

    Real ones have a core each, of two that clients need too: of threads that wait none may keep it busy.
    """
    environ = {"FAKE_ENGINE": json.dumps(engine), "OMP_WAIT_POLICY": "PASSIVE"}
    with new_cluster() as cluster:
        for core in range(number):
            cluster.add_node(num_cpus=slots, env_vars=environ | {"VLLM_CPU_OMP_THREADS_BIND": str(core)})
        yield cluster


@contextlib.contextmanager
def fleet_of(cluster, *arguments) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(cluster, Path(folder) / "log", f"m={DEMO}", *arguments)
        try:
            fleet.wait_for_nodes(len(cluster.worker_nodes))
            yield fleet
        finally:
            fleet.stop()


def run_overhead() -> dict:
    with nodes(1) as cluster, fleet_of(cluster, *WITHOUT_MODEL) as fleet:
        return measure_overhead(fleet)


def run_launch() -> dict:
    with nodes(2, start=1.5) as cluster, fleet_of(cluster, *WITHOUT_MODEL, "--idle", 1) as fleet:
        return measure_launch(fleet)


def run_kill() -> dict:
    found = {}
    for name, harm in (("engine", kill_engine), ("node", kill_node)):
        with nodes(2) as cluster, fleet_of(cluster, *WITHOUT_MODEL) as fleet:
            found[name] = measure_kill(fleet, harm)
    return found


def run_real() -> dict:
    served = ("--enforce-eager", "--dtype", "float32", "--idle", 4)
    with nodes(2) as cluster, fleet_of(cluster, *served) as fleet:
        return measure_real(fleet)


def measured_start(file: str, mode: str) -> float:
    """Seconds from spawn to first token, median, as a result of bench_coldstart.py has it."""
    summary = json.loads((ROOT / "results" / file).read_text())["summary"]
    return next(row["ttft"] for row in summary if row["mode"] == mode)


def starts() -> dict[str, float]:
    """How long the engines of each system start: SmolLM2-135M on 2 cores, ours from a standby; stock vLLM where its
    compile cache is warm and can be loaded; and without compilation, for which ours without a standby stands in."""
    return {
        "fleet": measured_start("start-smollm2.json", "standby"),
        "serve, stock": measured_start("later-smollm2-warm.json", "baseline-mended"),
        "serve, eager": measured_start("start-smollm2.json", "progressive"),
    }


def run_burst() -> dict:
    engine = {"start": starts()["fleet"], "stage_seconds": [0.0, 3.0, 6.0], "token_seconds": TOKEN_SECONDS}
    with nodes(NODES, SLOTS, **engine) as cluster:
        with fleet_of(cluster, *WITHOUT_MODEL, "--room", ROOM, "--idle", 8) as fleet:
            return measure_burst(fleet)


def run_trace(minutes: float) -> dict:
    seconds = 60 * minutes
    found = {}
    traces = {"azure": azure_arrivals(seconds, 10.0), "gamma": gamma_arrivals(0.2 * seconds, 2.0)}
    for (name, arrivals), (system, start) in itertools.product(traces.items(), starts().items()):
        found.setdefault(name, {})
        if name != "azure" or system == "fleet":
            engine = {"start": start, "stage_seconds": STAGE_SECONDS, "token_seconds": TOKEN_SECONDS}
            with nodes(NODES, SLOTS, **engine) as cluster:
                if system != "fleet":
                    with serve_alone(cluster, start) as url:
                        found[name][system] = describe_replay(asyncio.run(replay(url, arrivals, False)))
                    continue
                with fleet_of(cluster, *WITHOUT_MODEL, "--room", ROOM, "--idle", IDLE) as fleet:
                    found[name][system] = describe_replay(asyncio.run(replay(fleet.url, arrivals, name == "azure")))
                    fleet.wait(lambda fleet=fleet: fleet.engines() == [], "back to zero")
                    found[name][system]["back_to_zero"] = True
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--parts", default="choice,overhead,launch,kill,real,burst,trace", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of the trace, and a fifth of it of the gamma process"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "fleet.json", help="where the result goes")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw this result again, and nothing else")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.plot:
        draw_burst(json.loads(args.plot.read_text())["burst"], args.plot.with_name(f"{args.plot.stem}-burst.png"))
        return 0
    run = {
        "choice": measure_choice, "overhead": run_overhead, "launch": run_launch, "kill": run_kill, "real": run_real,
        "burst": run_burst, "trace": lambda: run_trace(args.minutes),
    }  # fmt: skip
    result = provenance(args)
    result["versions"]["ray"] = importlib.metadata.version("ray")
    result["starts"] = starts()
    for part in args.parts.split(","):
        result[part] = run[part]()
        print(part, json.dumps({key: value for key, value in result[part].items() if key != "rows"}, indent=1))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    if "burst" in result:
        draw_burst(result["burst"], args.json.with_name(f"{args.json.stem}-burst.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
