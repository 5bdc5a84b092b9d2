"""Fleets for test_serve_fleet.py and fleet_bench.py: Ray's nodes on one machine, serve_fleet.py, and its clients.

Nothing runs when this is imported.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests
from fake_engine import BEHAVIOUR, next_token, text_of, tokens_of
from prometheus_client.parser import text_string_to_metric_families
from servers import ROOT, cmdline, free_port, runs, wait_for

FLEET, FAKE_ENGINE = ROOT / "serve_fleet.py", ROOT / "tests" / "fake_engine.py"
WITHOUT_MODEL = ["--server", FAKE_ENGINE, "--no-standby"]


def undisturbed(prompt: str, count: int) -> str:
    """What fake engines answer, however many of them make it."""
    tokens = tokens_of(prompt)
    begin = len(tokens)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return "".join(map(text_of, tokens[begin:]))


def text_in(events: list[dict], chat: bool = False) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join((choice["delta"].get("content") if chat else choice["text"]) or "" for choice in choices)


# ---- processes --------------------------------------------------------------------------------------


def command_of(process: psutil.Process) -> str:
    return " ".join(cmdline(process))


def roots_of(engine: dict) -> list[psutil.Process]:
    """Who has an engine's port on the command line: with a standby, who asked it and what became of it."""
    port = engine["url"].rsplit(":", 1)[1]
    return [process for process in psutil.process_iter() if f"--port {port}" in command_of(process)]


def engine_process(engine: dict) -> psutil.Process:
    (found,) = roots_of(engine)
    return found


def processes_with(name: str, value: str) -> list[psutil.Process]:
    """Those that run with this in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value and runs(process):
                found.append(process)
    return found


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until(holds: Callable, what: str, log: Path | None = None):
    """What `holds` returns, once that is true; until then a server need not answer."""

    def answers_and_holds():
        with contextlib.suppress(requests.RequestException):
            return holds()

    return wait_for(answers_and_holds, told=lambda: f"{what}\n{log.read_text() if log else ''}")


# ---- fleets -----------------------------------------------------------------------------------------


class Fleet:
    """serve_fleet.py, on a Ray cluster of several nodes of this machine or (None) on a Ray of its own; its clients."""

    def __init__(self, cluster, log: Path, *arguments, **env: str):
        self.cluster, self.log, self.port = cluster, log, free_port()
        self.url, self.headers = f"http://127.0.0.1:{self.port}", {}
        command = [sys.executable, FLEET, "--port", self.port, "--num-cpus", 1, "--room", 8, "--idle", 600]
        command += [*(["--address", cluster.address] if cluster else []), *arguments]
        with open(log, "w") as output:
            options = {"stdout": output, "stderr": subprocess.STDOUT, "env": {**os.environ, **env}}
            self.process = subprocess.Popen(list(map(str, command)), **options)

    def wait(self, holds: Callable, what: str):
        def holds_and_runs():
            assert self.process.poll() is None, self.log.read_text()
            return holds()

        return wait_until(holds_and_runs, what, self.log)

    def wait_for_nodes(self, count: int) -> None:
        def are_up() -> bool:
            states = [node["state"] for node in self.state()["nodes"]]
            return states == ["up"] * count

        self.wait(are_up, f"{count} nodes are up")

    def state(self) -> dict:
        return requests.get(f"{self.url}/fleet", timeout=60).json()

    def count(self, name: str) -> int:
        """How often this has happened, since the ingress has started."""
        return self.state()["counts"].get(name, 0)

    def metrics(self) -> dict[tuple[str, str], float]:
        """(name, the value of its label) -> value."""
        text = requests.get(f"{self.url}/metrics", timeout=60).text
        families = text_string_to_metric_families(text)
        return {(one.name, "".join(one.labels.values())): one.value for family in families for one in family.samples}

    def leases(self, of: str | None = None) -> int:
        """Of a node; of all."""
        return sum(node["models"]["m"]["leases"] for node in self.state()["nodes"] if of in (None, node["node"]))

    def engines(self, model: str | None = None) -> list[dict]:
        """Those that run or start, of a model or of all; each with the id of its node."""
        found = [{**engine, "node": node["node"]} for node in self.state()["nodes"] for engine in node["engines"]]
        return [engine for engine in found if model in (None, engine["model"])]

    def busiest(self) -> dict:
        """The engine of m that most requests are at: they may be spread over several."""
        leases = {node["node"]: node["models"]["m"]["leases"] for node in self.state()["nodes"]}
        return max(self.wait(lambda: self.engines("m"), "an engine runs"), key=lambda engine: leases[engine["node"]])

    def ray_node(self, node: str):
        return next(one for one in self.cluster.worker_nodes if one.node_id == node)

    def drain(self, node: str) -> None:
        command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", self.cluster.address]
        command += ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        subprocess.run([*command, "--deadline-remaining-seconds", "600"], check=True, stdout=subprocess.DEVNULL)

    def ask(self, prompt: str = "one two", count: int = 4, **options) -> requests.Response:
        body = {"model": "m", "prompt": prompt, "max_tokens": count, **options}
        return requests.post(f"{self.url}/v1/completions", json=body, headers=self.headers, timeout=180)

    def stream(
        self, prompt: str, count: int, began: threading.Event | None = None, chat: bool = False, **options
    ) -> tuple[str, list]:
        """(text, events) of a streamed answer."""
        body = {"model": "m", "max_tokens": count, "stream": True, **options}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        events, path = [], "/v1/chat/completions" if chat else "/v1/completions"
        with requests.post(self.url + path, json=body, headers=self.headers, stream=True, timeout=180) as response:
            assert response.status_code == 200, response.text
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    events.append(json.loads(line[6:]))
                    if began and len(events) == 3:
                        began.set()
        return text_in([event for event in events if "choices" in event], chat), events

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(120) == 0, self.log.read_text()


@contextlib.contextmanager
def behaving(checkpoint: Path, **behaviour) -> Iterator[None]:
    """Fake engines of this checkpoint behave like this, until the end of the block: see DEFAULTS in fake_engine.py."""
    file, new = checkpoint / BEHAVIOUR, checkpoint / f"{BEHAVIOUR}.new"
    new.write_text(json.dumps(behaviour))
    new.replace(file)  # at once: engines read it all the time
    try:
        yield
    finally:
        file.unlink()


@contextlib.contextmanager
def new_cluster(**head):
    """Ray, with a head that has no room for engines. As on one machine its workers give way to nobody."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        arguments = {"num_cpus": 0, "include_dashboard": False, **head}
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        try:
            yield cluster
        finally:
            cluster.shutdown()
