"""serve_fleet.py: where a request goes, how a stream goes on elsewhere, and fleets of engines without a model.

The nodes are Ray's, three or four on one machine; the engines are tests/fake_engine.py, but for the last tests.
"""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
from conftest import ROOT, free_port

pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
from fake_engine import next_token, text_of, tokens_of
from prometheus_client.parser import text_string_to_metric_families

import serve_fleet
from serve_fleet import Demand, Engine, ModelOnNode, Node, Settings, Stream, choose

FLEET, FAKE_ENGINE = ROOT / "serve_fleet.py", ROOT / "tests" / "fake_engine.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITHOUT_MODEL = ["--server", FAKE_ENGINE, "--no-standby"]
GB = 10**9


# ---- which node answers first -----------------------------------------------------------------------


def node(name: str, cached: float = 0.0, disk: float = 1.0, listening: float = 8.0, slots: int = 1, **fields) -> Node:
    """A node with a model of three stages: 2, 1 and 1 GB, some of it in the page cache, on a disk of so many GB/s."""
    sizes = [2 * GB, GB, GB]
    model = ModelOnNode(sizes, [int(size * cached) for size in sizes], speed=disk * 1e9, **fields)
    return Node(name, "127.0.0.1", slots, listening, models={"m": model})


def demands() -> dict[str, dict[str, Demand]]:
    return defaultdict(lambda: defaultdict(Demand))


def chosen(nodes: list[Node], stage: int | None = None, asked=None, service=10.0) -> str | None:
    found = choose(nodes, "m", stage, asked or demands(), Settings({"m": "m"}), 100.0, service)
    return found and found[0].id


def test_a_cold_request_goes_where_an_engine_starts_first():
    assert chosen([node("disk", disk=0.1), node("cached", cached=1.0, disk=0.1)]) == "cached"
    assert chosen([node("slow", disk=0.1), node("fast", disk=1.0)]) == "fast"
    assert chosen([node("imports"), node("standby", listening=2.5)]) == "standby"
    # Reading 2 GB at 0.1 GB/s takes longer than imports: a standby does not help there.
    assert chosen([node("standby", disk=0.1, listening=2.5), node("fast", disk=1.0, listening=8.0)]) == "fast"


def test_an_engine_that_runs_goes_before_one_that_would_have_to_start():
    runs = node("runs", disk=0.1)
    runs.engines = [Engine("r", "m", "http://r", 1, stage=1, num_stages=3, seconds={2: 10.0, 3: 50.0})]
    others = [runs, node("cached", cached=1.0, listening=2.5)]
    assert chosen(others) == "runs"
    assert chosen(others, stage=3) == "cached"  # the full model is there sooner
    runs.engines[0].stage = 3
    assert chosen(others, stage=3) == "runs"


def test_a_full_engine_is_passed_by_where_another_starts_sooner():
    runs, asked = node("runs"), demands()
    runs.engines = [Engine("r", "m", "http://r", 1, stage=3, num_stages=3)]
    asked["runs"]["m"].leases = 32
    other = node("other", cached=1.0, listening=2.5)
    assert chosen([runs, other], asked=asked, service=10.0) == "runs"  # one of 32 will have ended before
    assert chosen([runs, other], asked=asked, service=600.0) == "other"
    assert chosen([runs], asked=asked, service=600.0) == "runs"


def test_who_waits_for_an_engine_that_is_starting_shares_it():
    asked = demands()
    asked["starting"]["m"] = Demand(leases=1, waiting_since=96.0)
    assert chosen([node("starting"), node("idle")], asked=asked) == "starting"
    asked["starting"]["m"].leases = 32  # those are as many as it has room for
    assert chosen([node("starting"), node("idle")], asked=asked) == "idle"


def test_an_engine_that_has_been_asked_for_takes_its_room():
    asked = demands()
    asked["first"]["m"] = Demand(leases=32, waiting_since=99.0)
    assert chosen([node("first", cached=1.0, listening=2.5), node("slow", disk=0.1)], asked=asked) == "slow"


def test_room_that_another_model_has():
    busy, idle, asked = node("busy"), node("idle"), demands()
    for taken in (busy, idle):
        taken.engines = [Engine("o", "other", "http://o", 1, stage=3, num_stages=3)]
    asked["busy"]["other"].leases = 1
    assert chosen([busy, idle], asked=asked) == "idle"
    assert chosen([busy, idle, node("free")], asked=asked) == "free"


def test_nodes_that_cannot_serve():
    assert chosen([node("not there", problem="no checkpoint")]) is None
    assert chosen([node("a")], stage=4) is None
    assert chosen([node("first", min_stage=3, disk=0.1), node("second", disk=0.2)]) == "second"


def test_a_node_where_engines_fail_comes_last():
    assert chosen([node("fails", cached=1.0, listening=2.5, failures=1), node("slow", disk=0.2)]) == "slow"
    assert chosen([node("fails", failures=1)]) == "fails"
    for_a_while = node("fails", cached=1.0, listening=2.5, failures=1, failed_ago=61.0)
    assert chosen([for_a_while, node("slow", disk=0.2)]) == "fails"


def test_an_engine_that_ends_gets_no_new_requests():
    ends, asked = node("ends", cached=1.0), demands()
    ends.engines = [Engine("e", "m", "http://e", 1, stage=3, num_stages=3, ending=True)]
    places = serve_fleet.Places(Settings({"m": "m"}), SimpleNamespace())
    assert places.place(ends, "m") is None
    assert chosen([ends, node("free", cached=1.0)], asked=asked) == "free"
    assert chosen([ends], asked=asked) == "ends"  # where another starts once that has made room
    ends.engines.append(Engine("f", "m", "http://f", 1, stage=3, num_stages=3))
    assert places.place(ends, "m")["engine"] == "f" and chosen([ends, node("free")], asked=asked) == "ends"


def test_when_an_engine_reaches_a_stage():
    starting = Engine("e", "m", "http://e", 1, age=2.0, seconds={1: 1e9})  # before stage 1 has come no rate is known
    assert starting.seconds_until(1, 8.0) == 6.0
    serves = Engine("e", "m", "http://e", 1, age=2.0, stage=1, seconds={2: 3.0})
    assert [serves.seconds_until(stage, 8.0) for stage in (1, 2, 3)] == [0.0, 3.0, 6.0]


def test_an_engine_is_used_as_soon_as_it_is_said_to_listen():
    starting = node("n")
    starting.engines = [Engine("e", "m", "http://e", 1)]
    nodes = SimpleNamespace(known={"n": starting})
    serve_fleet.Nodes.know(nodes, "n", "m", {"url": "http://e", "engine": "e", "age": 1.0})
    assert [(engine.stage, engine.age) for engine in starting.engines] == [(1, 1.0)]
    assert chosen([starting, node("cached", cached=1.0, listening=0.5)]) == "n"  # though of stage 3 nothing is known
    serve_fleet.Nodes.know(nodes, "n", "m", {"url": "http://f", "engine": "f", "age": 1.0})
    assert [engine.id for engine in starting.engines] == ["e", "f"]


def test_a_stage_is_refused_only_where_the_stages_are_known():
    ingress = SimpleNamespace(nodes=SimpleNamespace(known={}))
    request = SimpleNamespace(headers={"X-Progressive-Min-Stage": "2"})
    assert serve_fleet.Ingress.stage_of(ingress, request, {"min_stage": 3}, "m") == 3
    ingress.nodes.known["n"] = node("n")
    with pytest.raises(serve_fleet.Refused, match="m has stages 1 to 3"):
        serve_fleet.Ingress.stage_of(ingress, request, {"min_stage": 4}, "m")


def test_a_request_waits_for_nodes_that_do_not_answer(monkeypatch):
    monkeypatch.setattr(serve_fleet, "POLL_SECONDS", 0.01)
    known = {"a": node("a")}
    usable = [[], [], [known["a"]]]  # one after the other
    nodes = SimpleNamespace(known=known, agents=["a"], usable=lambda: usable.pop(0))
    places = serve_fleet.Places(Settings({"m": "m"}), nodes)

    async def lease_at(chosen, estimated, model):
        return chosen.id

    monkeypatch.setattr(places, "lease_at", lease_at)
    assert asyncio.run(places.lease("m", None, set())) == "a"
    known.clear()  # its agent has not answered yet
    usable += [[], [node("b")]]
    assert asyncio.run(places.lease("m", None, set())) == "b"
    known["a"] = node("a", problem="no checkpoint")
    usable.append([])
    with pytest.raises(serve_fleet.Refused, match="no engine of m is to be had: no checkpoint"):
        asyncio.run(places.lease("m", None, set()))
    assert places.held["m"] == 0


def test_scale():
    context = type("Context", (), {"policy_state": {}, "aggregated_metrics": {}, "total_num_requests": 0.0})()
    context.current_num_replicas = 2
    scale, context.target_num_replicas = serve_fleet.Scale(room=4, idle=60.0), 0
    context.total_num_requests = 5.0
    assert scale(context)[0] == 2
    context.target_num_replicas = 2
    needed, context.policy_state = scale(context)
    context.total_num_requests = 0.0
    assert scale(context)[0] == 2  # not idle for long enough
    context.aggregated_metrics = {"wanted": {"r": 1.0}}
    assert scale(context)[0] == 0  # another model waits for the room
    context.aggregated_metrics, context.policy_state = {}, {"busy": time.time() - 61}
    assert scale(context)[0] == 0
    scale.idle = 600.0
    assert scale(context)[0] == 2
    context.current_num_replicas = 0  # none has started
    assert scale(context)[0] == 0


# ---- a stream that goes on elsewhere ----------------------------------------------------------------


def chunks(tokens: list[int], texts: list[str], chat: bool = False, prompt=(1, 2), finish="length") -> list[dict]:
    """What an engine sends for some tokens, whose texts may be empty where they are held back."""
    events = [{"id": "x", "created": 1, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    events = events if chat else []
    for number, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        choice = {"index": 0, "finish_reason": None, "token_ids": [token]}
        choice |= {"delta": {"content": text}} if chat else {"text": text}
        events.append({"id": "x", "created": 1, "choices": [choice]})
        if number == 0 and not chat:
            choice["prompt_token_ids"] = list(prompt)
    if chat:
        events[0]["prompt_token_ids"] = list(prompt)
    if finish:
        events[-1]["choices"][0]["finish_reason"] = finish
    return events


def text_in(events: list[dict], chat: bool = False) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join((choice["delta"].get("content") if chat else choice["text"]) or "" for choice in choices)


@pytest.mark.parametrize("chat", [False, True])
def test_goes_on_after_what_the_client_has(chat):
    body = {"messages": []} if chat else {"prompt": "x"}
    stream = Stream({**body, "stream": True, "max_tokens": 5, "min_tokens": 4}, chat)
    assert stream.request() == {**stream.body, "return_token_ids": True}
    got = [passed for event in chunks([7, 8, 9], ["a", "b", ""], chat, finish=None) for passed in stream.take(event)]
    assert text_in(got, chat) == "ab"
    assert not any("token_ids" in choice for event in got for choice in event["choices"])
    assert stream.can_continue
    stream.break_off()
    request = stream.request()
    assert (request["max_tokens"], request["min_tokens"]) == (3, 2)
    assert (request["kv_transfer_params"]["prompt_token_ids"] if chat else request["prompt"]) == [1, 2, 7, 8]
    rest = [passed for event in chunks([9, 10], ["c", "d"], chat, [1, 2, 7, 8]) for passed in stream.take(event)]
    assert text_in(rest, chat) == "cd"
    assert not any("role" in choice.get("delta", {}) for event in rest for choice in event["choices"])
    assert stream.finished and stream.ids == [7, 8, 9, 10] and stream.prompt == [1, 2]


def test_a_character_in_several_tokens_is_made_again():
    stream = Stream({"prompt": "x", "stream": True}, False)
    for event in chunks([5, 6, 7], ["a", "", ""], finish=None):
        stream.take(event)
    stream.break_off()
    assert stream.request()["prompt"] == [1, 2, 5]


def test_events_that_were_held_come_in_order():
    stream = Stream({"prompt": "x", "stream": True, "return_token_ids": True}, False)
    got = [passed for event in chunks([5, 6, 7], ["a", "", "é"]) for passed in stream.take(event)]
    assert [event["choices"][0]["token_ids"] for event in got] == [[5], [6], [7]]
    assert got[0]["choices"][0]["prompt_token_ids"] == [1, 2]


def test_usage_and_offsets_are_those_of_one_answer():
    stream = Stream({"prompt": "x", "stream": True, "logprobs": 1}, False)
    for event in chunks([5, 6], ["ab", "c"], finish=None):
        stream.take(event)
    stream.break_off()
    event = chunks([7], ["d"], prompt=[1, 2, 5, 6])[0]
    event["choices"][0]["logprobs"] = {"text_offset": [0], "tokens": ["d"]}
    assert stream.take(event)[0]["choices"][0]["logprobs"]["text_offset"] == [3]
    usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}}
    assert stream.take(usage)[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_a_chat_begins_once():
    stream = Stream({"messages": [], "stream": True}, chat=True)
    (role,) = chunks([], [], chat=True, finish=None)
    assert stream.take(role) and stream.prompt == [1, 2]
    stream.break_off()  # before its first token
    assert stream.request() == {**stream.body, "return_token_ids": True}
    got = [passed for event in chunks([7], ["a"], chat=True) for passed in stream.take(event)]
    assert [choice["delta"] for event in got for choice in event["choices"]] == [{"content": "a"}]


def decode(tokens: list[int]) -> str:
    """Of tokens that are bytes."""
    return bytes(tokens).decode(errors="replace")


def aligned(stream: Stream) -> Stream:
    """As the ingress does it, with a tokenizer of bytes."""

    async def text(_, tokens):
        return decode(tokens)

    asyncio.run(serve_fleet.Ingress.align(SimpleNamespace(text=text), SimpleNamespace(stream=stream)))
    return stream


def test_an_event_of_several_tokens_may_end_within_a_character():
    stream = Stream({"prompt": "x", "stream": True}, False)
    (event,) = chunks([ord("a")], ["a"], prompt=b"x", finish=None)
    event["choices"][0]["token_ids"] += "é".encode()[:1]  # vLLM joins events that nobody has fetched in time
    stream.take(event)
    stream.break_off()
    assert aligned(stream).request()["prompt"] == [*b"xa"]
    (event,) = chunks([*"é".encode()][1:], ["é"], finish=None)
    assert text_in(stream.take(event)) == "é"


@pytest.mark.parametrize(
    "rest, text, reason",
    [("D never", "one ", "stop"), (" of ENDs", "one EN of ENDs", "length"), ("", "one EN", "length")],
)
def test_a_string_that_ends_the_answer_may_begin_with_one_engine_and_end_with_another(rest, text, reason):
    options = {"stream_options": {"include_usage": True}, "max_tokens": 6 + len(rest)}
    stream = Stream({"prompt": "x", "stream": True, "stop": ["END", "?"], **options}, False)
    for event in chunks([*b"one EN"], ["", "", "o", "n", "e", " "], prompt=b"x", finish=None):
        stream.take(event)
    stream.break_off()
    assert aligned(stream).request()["prompt"] == [*b"xone EN"] and stream.sent == "one "
    got = []
    for event in (
        chunks([*rest.encode()], [*rest])
        if rest
        else [{"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}]
    ):
        got += stream.take(event)
        if stream.cut:
            break
    assert "one " + text_in(got) == text and stream.finished
    assert [choice["finish_reason"] for event in got for choice in event["choices"]][-1] == reason
    if stream.cut:
        assert got[-1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}


def test_a_string_that_is_looked_for_later_ends_nothing():
    stream = Stream({"prompt": "x", "stream": True, "stop": "END", "min_tokens": 9, "max_tokens": 20}, False)
    for event in chunks([*b"one EN"], ["", "", "o", "n", "e", " "], prompt=b"x", finish=None):
        stream.take(event)
    stream.break_off()
    aligned(stream)
    got = [passed for event in chunks([*b"D of"], [*"D of"], finish=None) for passed in stream.take(event)]
    assert text_in(got) == "END of" and not stream.finished


def test_tokens_that_give_another_text_are_not_continued():
    stream = Stream({"prompt": "x", "stream": True, "stop": "END"}, False)
    for event in chunks([*b"abc"], ["", "", "z"], prompt=b"x", finish=None):
        stream.take(event)
    stream.break_off()
    with pytest.raises(serve_fleet.Refused, match="do not give its text again"):
        aligned(stream)


def test_several_choices_end_one_by_one():
    stream = Stream({"prompt": ["x", "y"], "n": 2, "stream": True}, False)
    for index in range(4):
        assert not stream.finished
        stream.take({"choices": [{"index": index, "text": "a", "finish_reason": "stop"}]})
    assert stream.finished


def test_as_many_tokens_as_one_engine_would_make():
    stream = Stream({"prompt": "x", "stream": True, "max_tokens": None}, False)
    for event in chunks([5, 6], ["a", "b"], finish=None):
        stream.take(event)
    stream.break_off()
    assert stream.request()["max_tokens"] == 14  # vLLM's default is 16
    for event in chunks([7] * 14, ["c"] * 14, finish=None):
        stream.take(event)
    assert stream.spent and not stream.finished


def test_reasoning_is_not_continued():
    stream = Stream({"messages": [], "stream": True, "logprobs": True}, chat=True)
    stream.take(chunks([], [], chat=True, finish=None)[0])
    event = {"choices": [{"index": 0, "delta": {"reasoning": "hm"}, "token_ids": [5]}]}
    assert stream.take(event) == [event]  # at once
    assert not stream.can_continue and stream.not_continued == "reasoning"


@pytest.mark.parametrize("logprobs, shown", [(0, True), (1, True), (True, True), (False, False), (None, False)])
def test_logprobs_of_0_are_some(logprobs, shown):
    assert Stream({"prompt": "x", "logprobs": logprobs}, False).shows_tokens is shown
    refused = serve_fleet.why_not_continued({"prompt": "x", "stop": "a", "logprobs": logprobs})
    assert bool(refused) is shown


@pytest.mark.parametrize(
    "event, why",
    [
        ({"error": {"message": "it is dead", "code": 500}}, "its engine has failed (it is dead)"),
        ({"error": {"message": "bad", "code": 400}}, None),
        ({"choices": [{"finish_reason": "abort"}]}, "its engine ends"),
        ({"choices": [{"finish_reason": "stop"}]}, None),
        ({"choices": [], "usage": {}}, None),
    ],
)
def test_what_says_that_an_engine_ends(event, why):
    assert serve_fleet.why_broken_off(event) == why


@pytest.mark.parametrize(
    "option, value",
    [("n", 2), ("seed", 1), ("presence_penalty", 0.5), ("response_format", {"type": "json_object"}), ("tools", [{}]),
     ("echo", True), ("use_beam_search", True), ("structured_outputs", {"regex": "a"}), ("unheard_of", 1),
     ("prompt", ["a", "b"])],
)  # fmt: skip
def test_what_is_not_continued(option, value):
    stream = Stream({"prompt": "x", "stream": True, "max_tokens": 5, option: value}, False)
    stream.prompt = [1]
    assert stream.not_continued and not stream.can_continue
    assert stream.request() == stream.body  # it is not touched


def test_usual_values_keep_nobody_from_being_continued():
    assert serve_fleet.why_not_continued({"prompt": [1, 2], "n": 1, "seed": None, "presence_penalty": 0.0}) is None


# ---- the command line -------------------------------------------------------------------------------


def test_what_the_terminal_says():
    model = {"problem": None, "bytes": [200, 200], "cached": [200, 60], "remote": False, "read_mbps": 312.0}
    nodes = [
        {"address": "n1", "state": "up", "models": {"m": model}, "engines": []},
        {"address": "n2", "state": "draining", "models": {"m": model | {"cached": [0, 0], "remote": True}},
         "engines": [{"model": "m", "stage": 2, "num_stages": 3}, {"model": "m", "stage": 0, "num_stages": 0}]},
        {"address": "n3", "state": "up", "models": {"m": model | {"problem": "vLLM is missing"}}, "engines": []},
        {"address": "n4", "state": "up", "models": {"m": model | {"cached": [200, 200]}}, "engines": []},
    ]  # fmt: skip
    assert serve_fleet.describe({"nodes": nodes, "held": {"m": 3}}).split("; n") == [
        "n1 (up; m: 60 % in page cache, disk at 300 MB/s): nothing runs",
        "2 (draining; m: remote at 300 MB/s): m stage 2/3, m starting",
        "3 (up; vLLM is missing): nothing runs",
        "4 (up; m: 100 % in page cache): nothing runs; 3 waiting",
    ]


# ---- what a node knows of itself --------------------------------------------------------------------


@pytest.fixture
def agent():
    """Makes the agent of a node without Ray around it."""
    agents = []

    def make(checkpoint, server=str(FAKE_ENGINE), options=()) -> serve_fleet.Agent:
        settings = Settings({"m": str(checkpoint)}, server=server, options=options, standby=False)
        agents.append(serve_fleet.Agent(settings, "n", "127.0.0.1", 1))
        return agents[-1]

    yield make
    for one in agents:
        asyncio.run(one.end())


def test_a_checkpoint_in_an_object_store(agent, split_tiny, bucket):
    (remote,), (local,) = (agent(checkpoint).models.values() for checkpoint in (bucket, split_tiny))
    assert remote.problem is None and remote.sizes == local.sizes and sum(remote.sizes) > 0
    assert remote.remote and not local.remote and remote.cached == [0] * len(remote.sizes)
    assert "s3://models/none is no progressive checkpoint here" in agent("s3://models/none").models["m"].problem


def test_a_node_without_what_it_needs(agent, split_tiny, tmp_path, monkeypatch):
    assert agent(tmp_path).models["m"].problem == f"{tmp_path} is no progressive checkpoint here (FileNotFoundError)"
    assert agent(split_tiny, server="none.py").models["m"].problem == "none.py is not there"
    monkeypatch.setattr(serve_fleet.importlib.util, "find_spec", lambda name: None)
    assert agent(split_tiny, server=str(ROOT / "progressive_serve.py")).models["m"].problem == "vLLM is not installed"


def test_tokens_of_a_chat_that_does_not_say_how_many(agent, split_tiny, tmp_path):
    checkpoint = Path(shutil.copytree(split_tiny, tmp_path / "limited"))
    (checkpoint / "generation_config.json").write_text('{"max_new_tokens": 48}')
    assert agent(checkpoint).models["m"].max_tokens == 48
    assert agent(checkpoint, options=("--generation-config", "vllm")).models["m"].max_tokens is None
    (checkpoint / "generation_config.json").unlink()
    assert agent(checkpoint).models["m"].max_tokens is None


def test_an_engine_that_is_not_needed_ends_after_those_whom_it_answers(agent, split_tiny):
    agent = agent(split_tiny)

    async def scenario() -> None:
        await agent.ensure("m", 1)
        (engine,) = agent.running
        assert await agent.started(engine) is None
        ends = asyncio.create_task(agent.stop(engine))
        for _ in range(5):  # a request has come to it before the ingress knew
            await asyncio.sleep(0.2)
            (said,) = (await agent.state({"m": 1}, {engine: 1}))["engines"]
            assert said["ending"] and agent.usable("m") == []
        assert not ends.done() and agent.running[engine].popen.poll() is None
        await agent.state({}, {})
        await asyncio.wait_for(ends, 30)
        for task in agent.watching:
            task.cancel()

    asyncio.run(scenario())


def run_fleet(*arguments, **env):
    command = [sys.executable, str(FLEET), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env}, check=False)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["CKPT", "--port=1", "--served-model-name", "x"], "--served-model-name is the fleet's own business"),
        (["CKPT", "--server", "nowhere.py"], "--server nowhere.py is not there"),
        (["a/m", "b/m"], "two models are called m: name one of them with NAME=CKPT"),
        (["CKPT", "--address", "127.0.0.1:1"], "Ray"),
        (["ftp://host/m"], "ftp://host/m: a checkpoint is a folder, or at s3:// or gs://"),
    ],
)
def test_bad_input(arguments, said):
    done = run_fleet(*arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_without_ray(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('there is none')")
    done = run_fleet("CKPT", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "pip install 'ray[serve]==2.60.0'" in done.stderr


def test_config_for_serve_deploy(tmp_path):
    import yaml
    from ray.serve.schema import ServeDeploySchema

    path = tmp_path / "fleet.yaml"
    done = run_fleet("m=somewhere", "--write-config", path, "--idle", 5, "--max-model-len", 64)
    assert done.returncode == 0, done.stderr
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications
    assert app.import_path == "serve_fleet:build" and app.args["options"] == ["--max-model-len", "64"]
    assert app.args["idle"] == 5.0 and Path(app.args["server"]).is_file()
    assert serve_fleet.build(app.args) is not None


# ---- fleets -----------------------------------------------------------------------------------------


def undisturbed(prompt: str, count: int) -> str:
    tokens = tokens_of(prompt)
    begin = len(tokens)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return "".join(map(text_of, tokens[begin:]))


class Fleet:
    """serve_fleet.py on a Ray cluster of several nodes of this machine, and its clients."""

    def __init__(self, cluster, log: Path, *arguments):
        self.cluster, self.log, self.port = cluster, log, free_port()
        self.url, self.headers = f"http://127.0.0.1:{self.port}", {}
        command = [sys.executable, FLEET, "--address", cluster.address, "--port", self.port, "--num-cpus", 1]
        command += ["--room", 8, "--idle", 600, *arguments]
        with open(log, "w") as output:
            self.process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT)
        self.wait(lambda: requests.get(f"{self.url}/health", timeout=2).ok, "listens")

    def wait(self, holds, what: str, seconds: float = 120.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(requests.RequestException):
                if found := holds():
                    return found
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        pytest.fail(f"not within {seconds} s: {what}\n{self.log.read_text()}")

    def state(self) -> dict:
        return requests.get(f"{self.url}/fleet", timeout=60).json()

    def metrics(self) -> dict[tuple[str, str], float]:
        """(name, the value of its label) -> value."""
        text = requests.get(f"{self.url}/metrics", timeout=5).text
        families = text_string_to_metric_families(text)
        return {(one.name, "".join(one.labels.values())): one.value for family in families for one in family.samples}

    def leases(self, of: str | None = None) -> int:
        """Of a node; of all."""
        return sum(node["models"]["m"]["leases"] for node in self.state()["nodes"] if of in (None, node["node"]))

    def engines(self) -> list[dict]:
        return [{**engine, "node": node["node"]} for node in self.state()["nodes"] for engine in node["engines"]]

    def ray_node(self, node: str):
        return next(one for one in self.cluster.worker_nodes if one.node_id == node)

    def drain(self, node: str) -> None:
        command = [
            Path(sys.executable).with_name("ray"),
            "drain-node",
            "--address",
            self.cluster.address,
            "--node-id",
            node,
        ]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        subprocess.run([*command, "--deadline-remaining-seconds", "120"], check=True, stdout=subprocess.DEVNULL)

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


@pytest.fixture(scope="module")
def cluster():
    with new_cluster() as cluster:
        yield cluster


@pytest.fixture
def fleet(cluster, split_tiny, tmp_path, monkeypatch):
    """Starts fleets; ends them, and their nodes but the head."""
    fleets, nodes = [], []

    def start(*options, nodes_of=(1, 1), checkpoint=split_tiny, engines=WITHOUT_MODEL, **engine) -> Fleet:
        environ = {"FAKE_ENGINE": json.dumps(engine), "OMP_WAIT_POLICY": "PASSIVE"}

        def add_node(slots: int = 1) -> None:
            nodes.append(cluster.add_node(num_cpus=slots, env_vars=environ))

        for slots in nodes_of:
            add_node(slots)
        fleets.append(Fleet(cluster, tmp_path / "fleet.log", f"m={checkpoint}", *engines, *options))
        fleets[-1].add_node = add_node
        fleets[-1].wait(lambda: len(fleets[-1].state()["nodes"]) == len(nodes_of), "its nodes are there")
        return fleets[-1]

    yield start
    for one in fleets:
        if one.process.poll() is None:
            one.stop()
    for added in nodes:
        if added in cluster.worker_nodes:
            cluster.remove_node(added)


def test_from_zero_and_back(fleet):
    fleet = fleet("--idle", 2)
    assert fleet.engines() == []
    answer = fleet.ask(count=4)
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == undisturbed("one two", 4)
    assert answer.headers["X-Progressive-Stage"] == "1"
    text, events = fleet.stream("three four", 6, stream_options={"include_usage": True})
    assert text == undisturbed("three four", 6)
    assert events[-1]["usage"]["completion_tokens"] == 6 and len({event["id"] for event in events}) == 1
    assert len(fleet.engines()) == 1
    fleet.wait(lambda: fleet.engines() == [], "no engine runs", 20)
    assert fleet.ask().ok  # and again
    assert fleet.ask(min_stage=9).status_code == 400
    metrics = fleet.metrics()
    assert (metrics["fleet_requests_total", ""], metrics["fleet_refused_total", "400"]) == (3, 1)
    assert (metrics["fleet_nodes", "up"], metrics["fleet_engines", "m"], metrics["fleet_held_requests", "m"]) == (
        2,
        1,
        0,
    )
    starts = fleet.state()["starts"]
    assert len(starts) == len({start["engine"] for start in starts}) == 2


def test_a_burst_is_spread_and_no_request_is_lost(fleet):
    fleet = fleet(start=3.0)  # all have come before the first engine listens
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda number: fleet.stream(f"burst {number}", 30)[0], range(24)))
    assert answers == [undisturbed(f"burst {number}", 30) for number in range(24)]
    assert len({engine["node"] for engine in fleet.engines()}) == 2


def test_more_than_are_held_are_refused(fleet):
    fleet = fleet("--hold-limit", 4, nodes_of=(1,), start=3.0)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: fleet.ask(), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 4
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status_code == 429)


def test_stages(fleet):
    fleet = fleet(stage_seconds=[0.0, 1.0, 4.0], nodes_of=(1,))
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(fleet.ask, min_stage=3)
        answer = fleet.ask()
        assert answer.headers["X-Progressive-Stage"] in "12" and not waits.done()  # nobody is kept by who waits
        assert waits.result().headers["X-Progressive-Stage"] == "3"
    refused = fleet.ask(min_stage=4)
    assert refused.status_code == 400 and "stages 1 to 3" in refused.json()["error"]["message"]


def stream_and(fleet, harm, number: int = 4, count: int = 150):
    """Some streams, of which each has begun when `harm` is done; their texts are the undisturbed ones'."""
    began = [threading.Event() for _ in range(number)]
    with ThreadPoolExecutor(number) as pool:
        streams = [pool.submit(fleet.stream, f"harm {one}", count, began[one]) for one in range(number)]
        assert all(event.wait(120) for event in began)
        harm()
        answers = [stream.result() for stream in streams]
    assert [text for text, _ in answers] == [undisturbed(f"harm {one}", count) for one in range(number)]
    for _, events in answers:
        assert len({event["id"] for event in events}) == 1


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def roots_of(engine: dict) -> list[psutil.Process]:
    """Who has an engine's port on the command line: with a standby, who asked it and what became of it."""
    port = engine["url"].rsplit(":", 1)[1]
    return [process for process in psutil.process_iter() if f"--port {port}" in command_of(process)]


def engine_process(engine: dict) -> psutil.Process:
    (found,) = roots_of(engine)
    return found


def test_streams_go_on_when_their_engine_is_killed(fleet):
    fleet = fleet()
    stream_and(fleet, lambda: engine_process(fleet.engines()[0]).kill())
    assert fleet.state()["counts"]["lost"] >= 1


@pytest.mark.parametrize("options", [{}, {"seed": 1}], ids=str)  # of the second nothing could be continued later
def test_a_stream_begins_anew_when_its_engine_is_killed_before_the_first_token(fleet, options):
    fleet = fleet(first_token_seconds=5.0)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(fleet.stream, "early", 4, **options)
        fleet.wait(lambda: any(engine["stage"] for engine in fleet.engines()), "an engine listens")
        time.sleep(1.0)
        engine_process(fleet.engines()[0]).kill()
        text, _ = stream.result()
    assert text == undisturbed("early", 4) and fleet.state()["counts"]["lost"] == 1


def test_a_stream_that_cannot_go_on_ends_with_an_error_in_it(fleet):
    fleet = fleet(detokenize=False)
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(fleet.stream, "error", 200, began)
        assert began.wait(60)
        engine_process(fleet.engines()[0]).kill()
        _, events = stream.result()  # and nothing that is no event
    assert "3 engines of m were lost with this answer" in events[-1]["error"]["message"]


def replica_of(engine: dict) -> psutil.Process:
    name = f"ServeReplica:fleet-m-{engine['node']}"
    (found,) = [process for process in psutil.process_iter() if name in command_of(process)]
    return found


def test_an_engine_outlives_its_replica(fleet):
    fleet = fleet()

    def kill_replica():
        fleet.wait(lambda: fleet.engines()[0]["owned"], "a replica owns the engine")
        replica_of(fleet.engines()[0]).kill()
        fleet.wait(lambda: not fleet.engines()[0]["owned"], "nobody owns it", 5)

    stream_and(fleet, kill_replica, count=600)
    assert fleet.state()["counts"].get("lost", 0) == 0
    fleet.wait(
        lambda: fleet.ask().ok and [engine["owned"] for engine in fleet.engines()] == [True], "the next one does"
    )


def test_streams_go_on_when_their_agent_is_killed(fleet):
    fleet = fleet()

    def kill_agent():
        engine = engine_process(fleet.engines()[0])
        engine.parent().kill()
        assert psutil.wait_procs([engine], timeout=5)[1] == []  # it ends with its agent

    stream_and(fleet, kill_agent)


def test_streams_go_on_when_their_node_is_lost(fleet):
    fleet = fleet()

    def lose_node():
        node = fleet.engines()[0]["node"]
        ours = fleet.ray_node(node)
        fleet.cluster.remove_node(ours, allow_graceful=False)

    stream_and(fleet, lose_node)
    fleet.wait(lambda: len(fleet.state()["nodes"]) == 1, "the node has gone")
    assert fleet.ask().ok


def test_streams_go_on_when_their_node_stands_still(fleet):
    fleet = fleet()

    stopped = []

    def stop_node():
        node = fleet.engines()[0]["node"]
        ours = fleet.ray_node(node)
        raylet = psutil.Process(ours.all_processes["raylet"][0].process.pid)
        stopped.extend([raylet, *raylet.children(recursive=True)])
        for process in stopped:
            process.send_signal(signal.SIGSTOP)

    try:
        stream_and(fleet, stop_node)
    finally:
        for process in stopped:
            process.kill()


def test_streams_move_from_a_node_that_is_drained(fleet):
    fleet = fleet("--api-key", "secret")
    fleet.headers["Authorization"] = "Bearer secret"
    stream_and(fleet, lambda: fleet.drain(fleet.engines()[0]["node"]), count=1200)
    counts = fleet.state()["counts"]
    assert counts["moved"] == 4 and counts.get("lost", 0) == 0


def test_streams_move_once_there_is_another_node(fleet):
    fleet = fleet(nodes_of=(1,))

    def replace():
        fleet.drain(fleet.engines()[0]["node"])
        time.sleep(3.0)
        fleet.add_node()

    stream_and(fleet, replace, count=3000)
    counts = fleet.state()["counts"]
    assert counts["moved"] == 4 and counts.get("lost", 0) == 0


def test_what_cannot_be_continued_gets_an_error(fleet):
    fleet = fleet()
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(fleet.stream, "seed", 200, began, seed=1)
        assert began.wait(30)
        engine_process(fleet.engines()[0]).kill()
        _, events = stream.result()
    assert "cannot be continued elsewhere (seed)" in events[-1]["error"]["message"]


def test_a_client_that_hangs_up_gives_its_place_back(fleet):
    fleet = fleet(nodes_of=(1,))
    body = {"model": "m", "prompt": "x", "max_tokens": 1000, "stream": True}
    with requests.post(f"{fleet.url}/v1/completions", json=body, stream=True, timeout=30) as response:
        lines = response.iter_lines()  # kept: it hangs up where it is collected
        next(lines)
        assert fleet.leases() == 1
    fleet.wait(lambda: fleet.leases() == 0, "its lease is closed", 5)


def test_the_ingress_comes_back(fleet):
    fleet = fleet()
    assert fleet.ask().ok
    before = fleet.engines()
    (ingress,) = [process for process in psutil.process_iter() if "Ingress" in command_of(process)]
    ingress.kill()
    time.sleep(0.5)
    fleet.wait(lambda: fleet.ask().ok, "it answers again", 60)
    assert [engine["engine"] for engine in fleet.engines()] == [engine["engine"] for engine in before]


def test_a_node_that_is_added_is_used(fleet):
    fleet = fleet(nodes_of=(1,), start=3.0)  # all have come before the first engine listens
    fleet.add_node()
    fleet.wait(lambda: len(fleet.state()["nodes"]) == 2, "the node is there")
    with ThreadPoolExecutor(16) as pool:
        assert all(answer.ok for answer in pool.map(lambda _: fleet.ask(count=50), range(16)))
    assert len({engine["node"] for engine in fleet.engines()}) == 2


def test_an_idle_engine_makes_room_for_another_model(fleet, split_tiny, tmp_path):
    fleet = fleet(f"other={split_tiny}", nodes_of=(1,))
    assert fleet.ask().ok
    assert fleet.ask(model="other").ok
    assert [engine["model"] for engine in fleet.engines()] == ["other"]


def test_an_engine_that_does_not_start_is_said(fleet, split_tiny, tmp_path):
    broken = Path(shutil.copytree(split_tiny, tmp_path / "broken"))
    (broken / "fails").touch()
    fleet = fleet(checkpoint=broken)
    answer = fleet.ask()
    assert answer.status_code == 503 and "this engine does not start" in answer.json()["error"]["message"]
    assert "Retry-After" in answer.headers


def test_a_checkpoint_that_no_node_has(fleet, tmp_path):
    fleet = fleet(checkpoint=tmp_path / "nowhere")
    answer = fleet.ask()
    assert answer.status_code == 503 and "is no progressive checkpoint here" in answer.json()["error"]["message"]


def test_an_api_key(fleet):
    fleet = fleet("--api-key", "secret", nodes_of=(1,))
    assert fleet.ask().status_code == 401 and fleet.engines() == []
    body, key = {"prompt": "x", "max_tokens": 2}, {"Authorization": "Bearer secret"}
    assert requests.post(f"{fleet.url}/v1/completions", json=body, headers=key, timeout=60).ok


def test_unknown_models_and_bodies(fleet):
    fleet = fleet(nodes_of=(1,))
    assert requests.get(f"{fleet.url}/v1/models", timeout=5).json()["data"][0]["id"] == "m"
    answer = fleet.ask(model="none")
    assert answer.status_code == 404 and "this fleet serves m" in answer.json()["error"]["message"]
    for data in (b"{", b"[]", b"\xff"):
        assert requests.post(f"{fleet.url}/v1/completions", data=data, timeout=5).status_code == 400
    assert fleet.engines() == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")
def test_page_in_a_browser(fleet, tmp_path):
    fleet = fleet(nodes_of=(1,))
    assert fleet.ask().ok
    fleet.wait(lambda: fleet.engines()[0]["stage"] == 3, "the engine has all stages")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", f"{fleet.url}/fleet.html"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert '<p id="error"></p>' in page and "0 streams; m: 0 waiting; so far 1 requests" in page
    assert page.count('<tr class="up">') == 1 and "stage 3 of 3" in page


@pytest.fixture
def on_one_machine(split_tiny, short_tmp):
    """Starts a fleet with a Ray of its own, and an engine: (process, log, what has come of them and runs)."""

    def ours() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(short_tmp) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    port, log = free_port(), short_tmp / "log"
    command = [sys.executable, FLEET, f"m={split_tiny}", "--port", port, *WITHOUT_MODEL]
    environ = {**os.environ, "TMPDIR": str(short_tmp)}
    with open(log, "w") as output:
        fleet = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env=environ)
    try:
        until_it_answers(f"http://127.0.0.1:{port}", lambda: fleet.poll() is None, log)
        assert any("fake_engine" in command_of(process) for process in ours())
        yield fleet, log, ours
    finally:
        for process in ours():
            with contextlib.suppress(psutil.Error):
                process.kill()
        fleet.wait()


def engines_of(checkpoint: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if f"fake_engine.py {checkpoint}" in command_of(process)]


def until_it_answers(url: str, runs, log: Path, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(requests.RequestException):
            if requests.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=60).ok:
                return
        assert runs(), log.read_text()
        time.sleep(0.2)
    pytest.fail(f"no answer within {seconds:g} s: {log.read_text()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_fleet_on_one_machine(number, on_one_machine, short_tmp):
    fleet, _, ours = on_one_machine
    fleet.send_signal(number)
    assert fleet.wait(60) == (0 if number == signal.SIGTERM else -number)
    end = time.monotonic() + 60
    while (left := ours()) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []
    if number == signal.SIGTERM:
        assert [path.name for path in short_tmp.iterdir()] == ["log"]


def test_a_fleet_ends_with_ray(on_one_machine):
    fleet, log, ours = on_one_machine
    end = time.monotonic() + 60
    while "listening at" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.02)  # until then it waits in a call of Ray's, which alone would end it, after a minute
    for process in ours():
        if "gcs_server" in command_of(process):
            process.kill()
    assert fleet.wait(60) == 1
    assert "error: Ray has ended, and the fleet with it" in log.read_text()
    end = time.monotonic() + 60
    while (left := [one for one in ours() if "fake_engine" in command_of(one)]) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []  # of Ray itself two processes stay for a minute


def test_serve_deploy(split_tiny, tmp_path):
    """As the README has it: a file, and Ray Serve's own command line."""
    port, dashboard, config = free_port(), free_port(), tmp_path / "fleet.yaml"
    done = run_fleet(f"m={split_tiny}", "--port", port, *WITHOUT_MODEL, "--idle", 5, "--write-config", config)
    assert done.returncode == 0, done.stderr
    serve = str(Path(sys.executable).with_name("serve"))
    address = ["--address", f"http://127.0.0.1:{dashboard}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with new_cluster(include_dashboard=True, dashboard_port=dashboard) as cluster, open(tmp_path / "log", "w") as log:
        cluster.add_node(num_cpus=1, env_vars={"FAKE_ENGINE": "{}"})
        options = {"env": environ, "stdout": log, "stderr": log, "timeout": 60, "check": True}
        subprocess.run([serve, "deploy", str(config), *address], **options)
        until_it_answers(f"http://127.0.0.1:{port}", lambda: True, tmp_path / "log")
        subprocess.run([serve, "shutdown", "--yes", *address], **options)
        end = time.monotonic() + 60
        while (left := engines_of(split_tiny)) and time.monotonic() < end:
            time.sleep(0.2)
        assert left == []


# ---- real engines -----------------------------------------------------------------------------------


def test_real_engines_from_zero_and_drained(fleet, demo_checkpoint):
    """The whole path: standbys, the demo model on both nodes, and streams that move to the other in mid-text."""
    served = ["--enforce-eager", "--dtype", "float32", "--max-model-len", 2048]
    fleet = fleet(*served, checkpoint=demo_checkpoint, engines=())
    fleet.wait(lambda: all(node["standby"] for node in fleet.state()["nodes"]), "each node has a standby")
    usage = {"stream_options": {"include_usage": True}}
    number, moved = 1800, 0  # tokens; streams
    kinds = [{"chat": True}, {"stop": ["not in this text"]}, {"logprobs": 1}, usage]
    greedy = {"temperature": 0, "min_tokens": number}

    def ask_all(meanwhile=lambda: None):
        began = [threading.Event() for _ in kinds]
        with ThreadPoolExecutor(len(kinds)) as pool:
            streams = [
                pool.submit(fleet.stream, f"Who was {one}", number, began[one], **greedy, **kind)
                for one, kind in enumerate(kinds)
            ]
            assert all(event.wait(180) for event in began)
            meanwhile()
            return [stream.result() for stream in streams]

    def drain():
        """The node whose engine has most in flight. That is suspended, so that others have to make the rest."""
        nonlocal moved
        processes = {
            engine["node"]: [one for root in roots_of(engine) for one in (root, *root.children(recursive=True))]
            for engine in fleet.engines()
        }
        suspended = set(itertools.chain(*processes.values()))
        try:
            for process in suspended:
                process.suspend()
            time.sleep(1.0)  # in which arrives what they have sent
            node = max(processes, key=fleet.leases)
            if moved := fleet.leases(node):
                fleet.drain(node)
                for process in suspended.difference(processes[node]):
                    process.resume()
                fleet.wait(lambda: fleet.leases(node) == 0, "all streams have moved")
        finally:
            for process in suspended:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    with ThreadPoolExecutor(12) as pool:  # more than one engine has room for
        assert all(answer.ok for answer in pool.map(lambda _: fleet.ask(), range(12)))
    fleet.wait(lambda: [engine["stage"] for engine in fleet.engines()] == [3, 3], "both engines are whole")
    before = ask_all()
    for _ in range(5):  # where we wait for a processor, all may have been answered before anything is suspended
        after = ask_all(drain)
        assert [text for text, _ in after] == [text for text, _ in before]
        if moved:
            break
    counts = fleet.state()["counts"]
    assert 1 <= moved <= counts.get("moved", 0) + counts.get("lost", 0)  # lost: who waits for long looks like it
    tokens = [[token for event in events for token in tokens_in(event)] for _, events in (before[2], after[2])]
    assert tokens[0] == tokens[1] and len(tokens[0]) == number
    assert after[3][1][-1]["usage"] == before[3][1][-1]["usage"]


def tokens_in(event: dict) -> list[str]:
    return [token for choice in event["choices"] for token in (choice.get("logprobs") or {}).get("tokens", [])]
