"""serve_fleet.py: where a request goes, how a stream goes on elsewhere, and fleets of engines without a model.

Three fleets start in `make test`, where this file takes about three minutes (two of CPU time, the rest is waiting for
Ray). Most tests share one, on a Ray cluster of nodes of this machine; two have a Ray of their own. Their engines are
tests/fake_engine.py. A test holds an engine where it wants to have it (no start, no further stage, no further token),
so that nothing is over before the test looks. Real engines start only in the last test, which is slow.
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
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
from conftest import run_script
from servers import ROOT, check_nothing_is_left, free_port

pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
from fleets import (
    FAKE_ENGINE,
    FLEET,
    WITHOUT_MODEL,
    Fleet,
    behaving,
    command_of,
    engine_process,
    kill_all,
    new_cluster,
    processes_with,
    roots_of,
    text_in,
    undisturbed,
    wait_until,
)

import serve_fleet
from serve_fleet import Demand, Engine, ModelOnNode, Node, Settings, Stream, choose

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY, HELD, STREAMS = "secret", 24, 4  # of the shared fleet: its API key, its --hold-limit; streams of most tests
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
    serve_fleet.Nodes.know(nodes, "n", "m", {"url": "http://e", "engine": "e", "age": 1.0, "key": "k"})
    assert [(engine.stage, engine.num_stages, engine.age) for engine in starting.engines] == [(1, 3, 1.0)]
    assert starting.engines[0].assumed  # nobody has said so
    assert chosen([starting, node("cached", cached=1.0, listening=0.5)]) == "n"  # though of stage 3 nothing is known
    serve_fleet.Nodes.know(nodes, "n", "m", {"url": "http://f", "engine": "f", "age": 1.0, "key": "k"})
    assert [engine.id for engine in starting.engines] == ["e", "f"]


def test_a_stage_is_refused_only_where_the_stages_are_known():
    ingress = SimpleNamespace(nodes=SimpleNamespace(known={}))
    request = SimpleNamespace(headers={"X-Progressive-Min-Stage": "2"})
    assert serve_fleet.Ingress.stage_of(ingress, request, {"min_stage": 3}, "m") == 3
    ingress.nodes.known["n"] = node("n")
    with pytest.raises(serve_fleet.Refused, match="m has stages 1 to 3, or 'last'"):
        serve_fleet.Ingress.stage_of(ingress, request, {"min_stage": 4}, "m")


@pytest.mark.parametrize("header, body", [("last", {}), (None, {"min_stage": "last"}), ("2", {"min_stage": "last"})])
def test_the_last_stage_is_the_full_model_however_many_there_are(header, body):
    ingress = SimpleNamespace(nodes=SimpleNamespace(known={"n": node("n")}))
    request = SimpleNamespace(headers={"X-Progressive-Min-Stage": header} if header else {})
    stage = serve_fleet.Ingress.stage_of(ingress, request, body, "m")
    assert body == {}  # engines hear of it by the header
    assert serve_fleet.Ingress.headers(ingress, request, stage) == {"X-Progressive-Min-Stage": "last"}
    runs = node("runs", disk=0.1)
    runs.engines = [Engine("r", "m", "http://r", 1, stage=2, num_stages=3, seconds={3: 50.0})]
    others = [runs, node("cached", cached=1.0, listening=2.5)]
    assert chosen(others, stage=2) == "runs" and chosen(others, stage=stage) == chosen(others, stage=3) == "cached"
    assert [serve_fleet.stage_number(asked, 3) for asked in (None, 1, "last")] == [1, 1, 3]


@pytest.mark.parametrize("value", ["Last", "latest", "", "0", 0, 2.5, True, [3]])
def test_another_word_is_no_stage(value):
    ingress = SimpleNamespace(nodes=SimpleNamespace(known={"n": node("n")}))
    with pytest.raises(serve_fleet.Refused, match="stages 1 to 3"):
        serve_fleet.Ingress.stage_of(ingress, SimpleNamespace(headers={}), {"min_stage": value}, "m")


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


@pytest.mark.parametrize(
    "first_is_full, second_is_exact, exact", [(True, True, True), (False, True, False), (True, False, False)]
)
def test_an_answer_is_exact_where_all_of_its_parts_are(first_is_full, second_is_exact, exact):
    """Of an engine that is lost before it says so, the stage at which it began tells."""
    stream = Stream({"prompt": "x", "stream": True}, False)
    stream.is_full = first_is_full
    for event in chunks([5, 6], ["a", "b"], finish=None):
        stream.take(event)
    stream.break_off()
    (event,) = chunks([7], ["c"])
    (got,) = stream.take(event | {"progressive_stage": 3, "progressive_exact": second_is_exact})
    assert (got["progressive_stage"], got["progressive_exact"]) == (3, exact)


def test_what_nobody_has_got_does_not_count():
    """The engine was lost before its first token had reached the client, and all is made again."""
    stream = Stream({"prompt": "x", "stream": True}, False)
    for event in chunks([5], [""], finish=None):
        stream.take(event)
    stream.break_off()
    (event,) = chunks([7], ["c"])
    assert stream.take(event | {"progressive_exact": True})[0]["progressive_exact"] is True


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


@pytest.mark.server
def test_a_checkpoint_in_an_object_store(agent, split_tiny, bucket):
    (remote,), (local,) = (agent(checkpoint).models.values() for checkpoint in (bucket, split_tiny))
    assert remote.problem is None and remote.sizes == local.sizes and sum(remote.sizes) > 0
    assert remote.remote and not local.remote and remote.cached == [0] * len(remote.sizes)
    assert "s3://models/none is no progressive checkpoint here" in agent("s3://models/none").models["m"].problem


def test_a_node_without_what_it_needs(agent, split_tiny, tmp_path, monkeypatch):
    assert agent(tmp_path).models["m"].problem == f"{tmp_path} is no progressive checkpoint here (FileNotFoundError)"
    other = Path(shutil.copytree(split_tiny, tmp_path / "other"))
    (other / "progressive.json").write_text('{"format_version": 3, "stages": []}')
    assert agent(other).models["m"].problem == f"{other}: format_version 3, known are (1, 2)"
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


class Looked(dict):
    """Counts how often somebody has looked."""

    times = 0

    def get(self, *args):
        self.times += 1
        return super().get(*args)


@pytest.mark.server
def test_an_engine_that_is_not_needed_ends_after_those_whom_it_answers(agent, split_tiny):
    agent = agent(split_tiny)

    async def scenario() -> None:
        await agent.ensure("m", 1)
        (engine,) = agent.running
        assert await agent.started(engine) is None
        ends = asyncio.create_task(agent.stop(engine))
        used = Looked({engine: 1})  # a request has come to it before the ingress knew
        while used.times < 3:
            await asyncio.sleep(0.02)  # the agent goes on
            (said,) = (await agent.state({"m": 1}, used))["engines"]
            assert said["ending"] and agent.usable("m") == []
        assert not ends.done() and agent.running[engine].popen.poll() is None
        await agent.state({}, {})
        await asyncio.wait_for(ends, 60)
        for task in agent.watching:
            task.cancel()

    asyncio.run(scenario())


@pytest.fixture
def run_fleet(monkeypatch, capsys):
    """Runs serve_fleet.py in this process: (exit status, what it says on stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(FLEET), *map(str, arguments)])
        try:
            status = serve_fleet.main()
        except SystemExit as ended:
            status = ended.code
        return status, capsys.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["CKPT", "--port=1", "--served-model-name", "x"], "--served-model-name is the fleet's own business"),
        (["CKPT", "--server", "nowhere.py"], "--server nowhere.py is not there"),
        (["a/m", "b/m"], "two models are called m: name one of them with NAME=CKPT"),
        (["CKPT", "--address", "127.0.0.1:1"], "Ray"),
        (["ftp://host/m"], "ftp://host/m: a checkpoint is a folder, or at s3:// or gs://"),
        (["CKPT", "--write-config", "no/such/fleet.yaml"], "--write-config no/such/fleet.yaml cannot be written"),
        (["CKPT", "--min-stage", "latest"], "latest is no stage"),
        (["CKPT", "--min-stage", "0"], "0 is no stage"),
        (["CKPT", "--hf-token", "hf-SECRET"], "--hf-token ***: everybody can see"),
        (["CKPT", "--api_key=SECRET"], "VLLM_API_KEY"),
        (["CKPT", "--write-config", "no.yaml", "--hf-token=SECRET"], "HF_TOKEN"),
        (["CKPT", "--model-loader-extra-config", '{"password": "SECRET"}'], '{"password": ***}'),
        (["m=s3://me:SECRET@bucket/m"], "s3://***@bucket/m"),
    ],
)
def test_bad_input(run_fleet, arguments, said):
    status, errors = run_fleet(*arguments)
    assert status == 2 and said in errors and "SECRET" not in errors, errors


def test_without_ray(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('there is none')")
    done = run_script(FLEET, "CKPT", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "pip install 'ray[serve]==2.60.0'" in done.stderr


def test_config_for_serve_deploy(run_fleet, tmp_path):
    import yaml
    from ray.serve.schema import ServeDeploySchema

    path = tmp_path / "fleet.yaml"
    status, errors = run_fleet("m=somewhere", "--write-config", path, "--idle", 5, "--max-model-len", 64)
    assert status == 0, errors
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications
    assert app.import_path == "serve_fleet:build" and app.args["options"] == ["--max-model-len", "64"]
    assert app.args["idle"] == 5.0 and Path(app.args["server"]).is_file()
    assert serve_fleet.build(app.args) is not None
    assert "api_key" not in app.args and app.args["api_key_variable"] is None


@pytest.mark.parametrize("options, environ", [([], {"VLLM_API_KEY": "sk-SECRET"}), (["--api-key", "sk-SECRET"], {})])
def test_a_config_names_the_variable_of_the_key(options, environ, run_fleet, tmp_path, monkeypatch):
    import yaml

    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "fleet.yaml"
    status, errors = run_fleet("m=somewhere", "--write-config", path, "--min-stage", "last", *options)
    assert status == 0, errors
    assert "SECRET" not in path.read_text()
    (app,) = yaml.safe_load(path.read_text())["applications"]
    settings = Settings(**app["args"])
    assert (settings.api_key_variable, settings.min_stage) == ("VLLM_API_KEY", "last")
    monkeypatch.setenv("VLLM_API_KEY", "another")
    assert serve_fleet.key_of_clients(settings) == "another"
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RuntimeError, match="VLLM_API_KEY is not set"):
        serve_fleet.key_of_clients(settings)


def test_a_key_is_in_no_text():
    """Of settings and engines, which errors and logs may show."""
    settings = Settings({"m": "m"}, api_key="SECRET")
    engine = Engine("e", "m", "http://e", 1, key="SECRET")
    assert "SECRET" not in f"{settings} {engine} {Node('n', 'a', 1, 1.0, engines=[engine])} {settings.version()}"


@pytest.mark.parametrize(
    "header, right",
    [
        ("Bearer k€y", True),
        ("bearer k€y", True),
        ("Bearer key", False),
        ("k€y", False),
        ("Basic k€y", False),
        ("", False),
    ],
)
def test_keys_are_compared_as_vllm_does(header, right):
    from starlette.datastructures import Headers
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    assert serve_fleet.has_key(header, "k€y") is right
    ascii_header = header.replace("€", "e-")  # a header of Starlette has no other letters
    middleware = AuthenticationMiddleware(None, ["ke-y"])
    assert middleware.verify_token(Headers({"Authorization": ascii_header})) is right


@pytest.mark.parametrize("address, listens_at", [("192.0.2.1", "127.0.0.1"), ("192.0.2.2", "192.0.2.2")])
def test_engines_of_the_own_machine_listen_for_it_alone(address, listens_at, monkeypatch):
    made = []
    monkeypatch.setattr(
        serve_fleet.ray,
        "remote",
        lambda _: SimpleNamespace(options=lambda **__: SimpleNamespace(remote=lambda *given: made.append(given))),
    )
    nodes = SimpleNamespace(settings=Settings({"m": "m"}), address="192.0.2.1", slots=lambda _: 1)
    serve_fleet.Nodes.agent(nodes, {"NodeID": "n", "NodeManagerAddress": address, "Resources": {}})
    assert made == [(nodes.settings, "n", listens_at, 1)]


AGENT = """
import asyncio, sys
from serve_fleet import Agent, Settings

async def main():
    agent = Agent(Settings({"m": sys.argv[1]}, server=sys.argv[2], standby=False), "node", "127.0.0.1", 1)
    print("engine", agent.spawn("m").popen.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.server
def test_engines_end_with_their_agent(split_tiny, start, short_tmp):
    """By themselves: not every release of Ray ends the children of an actor that is killed."""
    env = {"PYTHONPATH": str(ROOT), "TMPDIR": str(short_tmp)}
    agent = start.process("-c", AGENT, split_tiny, ROOT / "tests" / "fake_engine.py", env=env)
    agent.wait_for(lambda: agent.log.read_text().partition("engine ")[2].endswith("\n"))
    engine = psutil.Process(int(agent.log.read_text().partition("engine ")[2]))
    agent.process.kill()
    try:
        check_nothing_is_left([engine])
    finally:
        if engine.is_running():
            engine.kill()


# ---- a fleet that most tests share --------------------------------------------------------------------


@pytest.fixture(scope="module")
def marked():
    """All processes of this module have this in their environment; none is left at its end."""
    name, value = "FLEET_OF_TESTS", uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        yield
    left = []

    def is_left() -> bool:
        left[:] = processes_with(name, value)
        return not left

    try:
        wait_until(is_left, "all processes have ended")
    except AssertionError:
        commands = [command_of(process) for process in left]
        kill_all(left)
        pytest.fail(f"left: {commands}")


@pytest.fixture(scope="module")
def cluster(marked):
    with new_cluster() as cluster:
        yield cluster


def add_node(cluster) -> None:
    """With room for one engine."""
    cluster.add_node(wait=False, num_cpus=1, env_vars={"OMP_WAIT_POLICY": "PASSIVE"})


@pytest.fixture(scope="module")
def checkpoints(split_tiny, tmp_path_factory) -> dict[str, Path]:
    """Of each model one of its own, for the engines' behaviour lies in it."""
    folder = tmp_path_factory.mktemp("models")
    return {name: Path(shutil.copytree(split_tiny, folder / name)) for name in ("m", "burst", "broken")}


@pytest.fixture(scope="module")
def shared(cluster, checkpoints, tmp_path_factory):
    """A fleet of two nodes."""
    models = [f"{name}={checkpoints[name]}" for name in ("m", "burst")]
    options = ["--api-key", KEY, "--hold-limit", HELD, "--max-replicas", 1]
    fleet = Fleet(cluster, tmp_path_factory.mktemp("fleet") / "log", *models, *WITHOUT_MODEL, *options)
    try:
        fleet.headers["Authorization"] = f"Bearer {KEY}"
        for _ in range(2):  # while it starts
            add_node(cluster)
        fleet.wait_for_nodes(2)
        yield fleet
        fleet.stop()
    finally:
        fleet.process.kill()


@pytest.fixture
def fleet(shared, cluster):
    """The shared fleet, with two nodes that are up, though a test before may have lost or drained some.

    Engines of m may run there, and others may be on their way: Serve replaces those that a test has killed.
    """
    up = {node["node"] for node in shared.state()["nodes"] if node["state"] == "up"}
    for node in [node for node in cluster.worker_nodes if node.node_id not in up]:
        cluster.remove_node(node)
    for _ in range(2 - len(cluster.worker_nodes)):
        add_node(cluster)
    shared.wait_for_nodes(2)
    return shared


@pytest.mark.server
def test_what_is_refused(fleet):
    before = fleet.count("requests")
    assert requests.post(f"{fleet.url}/v1/completions", json={"prompt": "x"}, timeout=60).status_code == 401
    assert requests.get(f"{fleet.url}/v1/models", timeout=60).status_code == 401
    wrong = {"Authorization": f"Bearer {KEY}x"}
    assert requests.get(f"{fleet.url}/v1/models", headers=wrong, timeout=60).status_code == 401
    models = requests.get(f"{fleet.url}/v1/models", headers=fleet.headers, timeout=60).json()["data"]
    assert [model["id"] for model in models] == ["m", "burst"]
    answer = fleet.ask(model="none")
    assert answer.status_code == 404 and "this fleet serves m" in answer.json()["error"]["message"]
    answer = fleet.ask(min_stage=4)
    assert answer.status_code == 400 and "stages 1 to 3" in answer.json()["error"]["message"]
    for data in (b"{", b"[]", b"\xff"):
        answer = requests.post(f"{fleet.url}/v1/completions", data=data, headers=fleet.headers, timeout=60)
        assert answer.status_code == 400
    assert fleet.count("requests") == before  # no engine has been asked for
    assert fleet.ask().ok and fleet.count("requests") == before + 1


def stream_and(fleet, checkpoint: Path, harm, **options) -> list[dict]:
    """Some streams, of which none is over when `harm` is done, as each is held at its 40th token.

    Their texts are the undisturbed ones'. Returns the last event of each.
    """
    began, count = [threading.Event() for _ in range(STREAMS)], 150
    with ThreadPoolExecutor(STREAMS) as pool:
        with behaving(checkpoint, tokens=40):
            streams = [pool.submit(fleet.stream, f"harm {one}", count, began[one], **options) for one in range(STREAMS)]
            assert all(event.wait(120) for event in began)
            harm()
        answers = [stream.result() for stream in streams]
    assert [text for text, _ in answers] == [undisturbed(f"harm {one}", count) for one in range(STREAMS)]
    for _, events in answers:
        assert len({event["id"] for event in events}) == 1
    return [events[-1] for _, events in answers]


@pytest.mark.server
def test_streams_go_on_when_their_engine_is_killed(fleet, checkpoints):
    """Those that wait for the full model are of the full model."""
    before = fleet.count("lost")
    ends = stream_and(fleet, checkpoints["m"], lambda: engine_process(fleet.busiest()).kill(), min_stage="last")
    assert fleet.count("lost") > before
    assert [(end["progressive_stage"], end["progressive_exact"]) for end in ends] == [(3, True)] * STREAMS


@pytest.mark.server
def test_an_answer_of_which_an_early_stage_has_begun_is_not_exact(fleet, checkpoints):
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with behaving(checkpoints["m"], tokens=5, stage=1):
            stream = pool.submit(fleet.stream, "early stage", 20, began)
            assert began.wait(120)
            engine_process(fleet.busiest()).kill()
        text, events = stream.result()
    assert text == undisturbed("early stage", 20)
    assert events[-1]["progressive_exact"] is False


def answering(engine: dict) -> int:
    """How many requests have come to a fake engine, and are not answered."""
    return requests.get(f"{engine['url']}/progress", timeout=60).json()["answering"]


@pytest.mark.server
@pytest.mark.parametrize("options", [{}, {"seed": 1}], ids=str)  # of the second nothing could be continued later
def test_a_stream_begins_anew_when_its_engine_is_killed_before_the_first_token(fleet, checkpoints, options):
    before = fleet.count("lost")
    with ThreadPoolExecutor(1) as pool:
        with behaving(checkpoints["m"], tokens=0):
            stream = pool.submit(fleet.stream, "early", 4, **options)
            at = fleet.wait(lambda: [one for one in fleet.engines("m") if answering(one)], "an engine has the request")
            engine_process(at[0]).kill()
        text, _ = stream.result()
    assert text == undisturbed("early", 4) and fleet.count("lost") > before  # an engine that is starved counts, too


def error_of(fleet, checkpoint: Path, **options) -> str:
    """At the end of a stream whose engine is killed after some tokens."""
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with behaving(checkpoint, tokens=5, detokenize=False):
            stream = pool.submit(fleet.stream, "error", 200, began, **options)
            assert began.wait(120)
            engine_process(fleet.busiest()).kill()
            _, events = stream.result()  # and nothing that is no event
    return events[-1]["error"]["message"]


@pytest.mark.server
def test_a_stream_that_cannot_go_on_ends_with_an_error_in_it(fleet, checkpoints):
    assert "3 engines of m were lost with this answer" in error_of(fleet, checkpoints["m"])


@pytest.mark.server
def test_what_cannot_be_continued_gets_an_error(fleet, checkpoints):
    assert "cannot be continued elsewhere (seed)" in error_of(fleet, checkpoints["m"], seed=1)


def named(text: str, fleet) -> list[psutil.Process]:
    """Ray's processes of the cluster of a fleet that have this in their title."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in fleet.cluster.list_all_nodes()]
    children = itertools.chain(*(psutil.Process(pid).children(recursive=True) for pid in raylets))
    return [process for process in children if text in command_of(process)]


@pytest.mark.server
def test_an_engine_outlives_its_replica(fleet, checkpoints):
    (controller,) = named("ServeController", fleet)
    before, used = fleet.count("lost"), {}

    def engine_is(owned: bool) -> bool:
        return used["engine"] in [engine["engine"] for engine in fleet.engines() if engine["owned"] is owned]

    def kill_replica():
        used.update(fleet.busiest())
        fleet.wait(lambda: engine_is(owned=True), "a replica owns the engine")
        controller.suspend()  # else Serve may have replaced the replica before we look
        (replica,) = named(f"ServeReplica:fleet-m-{used['node']}", fleet)
        replica.kill()
        fleet.wait(lambda: engine_is(owned=False), "nobody owns it")

    try:
        stream_and(fleet, checkpoints["m"], kill_replica)
    finally:
        controller.resume()
    assert fleet.count("lost") == before
    fleet.wait(lambda: fleet.ask().ok and engine_is(owned=True), "the next one does")


@pytest.mark.server
def test_streams_go_on_when_their_agent_is_killed(fleet, checkpoints):
    def kill_agent():
        engine = engine_process(fleet.busiest())
        engine.parent().kill()
        assert psutil.wait_procs([engine], timeout=60)[1] == []  # it ends with its agent

    stream_and(fleet, checkpoints["m"], kill_agent)


@pytest.mark.server
def test_a_client_that_hangs_up_gives_its_place_back(fleet, checkpoints):
    body = {"model": "m", "prompt": "x", "max_tokens": 1000, "stream": True}
    with behaving(checkpoints["m"], tokens=5):
        options = {"json": body, "headers": fleet.headers, "stream": True, "timeout": 120}
        with requests.post(f"{fleet.url}/v1/completions", **options) as response:
            lines = response.iter_lines()  # kept: it hangs up where it is collected
            next(lines)
            assert fleet.leases() == 1
        fleet.wait(lambda: fleet.leases() == 0, "its lease is closed")


@pytest.mark.server
def test_the_ingress_comes_back(fleet):
    assert fleet.ask().ok
    before = {engine["engine"] for engine in fleet.engines("m")}
    (ingress,) = named("Ingress", fleet)
    ingress.kill()
    assert psutil.wait_procs([ingress], timeout=60)[1] == []
    fleet.wait(lambda: fleet.ask().ok, "it answers again")
    assert before <= {engine["engine"] for engine in fleet.engines("m")}


@pytest.mark.server
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")
def test_page_in_a_browser(fleet, tmp_path):
    assert fleet.ask().ok
    fleet.wait(lambda: 3 in [engine["stage"] for engine in fleet.engines("m")], "an engine has all stages")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", f"{fleet.url}/fleet.html"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert '<p id="error"></p>' in page and "0 streams; m: 0 waiting, burst: 0 waiting; so far" in page
    assert f"{fleet.count('requests')} requests" in page
    assert page.count('<tr class="up">') == 2 and "stage 3 of 3" in page


@pytest.mark.server
def test_streams_move_from_nodes_that_are_drained(fleet, checkpoints, cluster):
    """To the other one, and from there, once there is one, to a node that is added."""
    before = {name: fleet.count(name) for name in ("moved", "lost")}

    def moved() -> int:
        return fleet.count("moved") - before["moved"]

    def drain():
        first = fleet.busiest()["node"]
        leases = fleet.leases(first)
        fleet.drain(first)
        fleet.wait(lambda: moved() == leases, "all have moved")
        (second,) = {node["node"] for node in fleet.state()["nodes"]} - {first}
        assert fleet.leases(second) == STREAMS
        fleet.drain(second)
        fleet.wait(lambda: fleet.state()["held"]["m"] == STREAMS, "all wait for a place")
        add_node(cluster)
        fleet.wait(lambda: moved() == leases + STREAMS, "all have moved again")

    stream_and(fleet, checkpoints["m"], drain)
    assert fleet.count("lost") == before["lost"]


@pytest.mark.server
def test_streams_go_on_when_their_node_is_lost(fleet, checkpoints, cluster):
    def lose_node():
        cluster.remove_node(fleet.ray_node(fleet.busiest()["node"]), allow_graceful=False)

    stream_and(fleet, checkpoints["m"], lose_node)
    fleet.wait_for_nodes(1)
    assert fleet.ask().ok


@pytest.mark.server
def test_streams_go_on_when_their_node_stands_still(fleet, checkpoints):
    stopped = []

    def stop_node():
        ours = fleet.ray_node(fleet.busiest()["node"])
        raylet = psutil.Process(ours.all_processes["raylet"][0].process.pid)
        stopped.extend([raylet, *raylet.children(recursive=True)])
        for process in stopped:
            process.suspend()

    try:
        stream_and(fleet, checkpoints["m"], stop_node)
    finally:
        kill_all(stopped)


@pytest.mark.server
def test_a_burst_is_spread_and_more_than_are_held_are_refused(fleet, checkpoints):
    """No request is lost, and engines of another model, which are idle, make room."""
    assert fleet.ask().ok
    with ThreadPoolExecutor(HELD) as pool:
        with behaving(checkpoints["burst"], starts=False):  # all have come before the first engine listens
            streams = [pool.submit(fleet.stream, f"burst {one}", 30, model="burst") for one in range(HELD)]
            fleet.wait(lambda: fleet.state()["held"]["burst"] == HELD, "all are held")
            refused = fleet.ask(model="burst")
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert [stream.result()[0] for stream in streams] == [undisturbed(f"burst {one}", 30) for one in range(HELD)]
    fleet.wait(lambda: len({engine["node"] for engine in fleet.engines("burst")}) == 2, "both nodes have one")
    fleet.wait(lambda: fleet.engines("m") == [], "no engine of m runs")


# ---- fleets with a Ray of their own -----------------------------------------------------------------


@pytest.fixture
def on_one_machine(marked, short_tmp):
    """Starts a fleet: (the fleet, what has come of it and runs)."""

    def ours() -> list[psutil.Process]:
        return processes_with("TMPDIR", str(short_tmp))

    def start(*arguments) -> tuple[Fleet, object]:
        environ = {"TMPDIR": str(short_tmp), "http_proxy": "http://127.0.0.1:9"}  # where nobody listens
        fleets.append(Fleet(None, short_tmp / "log", *arguments, *WITHOUT_MODEL, **environ))
        # Until then it waits in a call of Ray's, which alone would end it, after a minute.
        fleets[0].wait(lambda: "listening at" in fleets[0].log.read_text(), "it listens")
        return fleets[0], ours

    fleets: list[Fleet] = []
    try:
        yield start
    finally:
        kill_all(ours())
        for fleet in fleets:
            fleet.process.wait()


def are_engines(processes: list[psutil.Process]) -> bool:
    return any("fake_engine" in command_of(process) for process in processes)


def check_that_engines_are_ours_alone(fleet: Fleet, processes: list[psutil.Process]) -> None:
    """Though clients of this fleet need no key: engines listen for this machine alone, and want one that is nowhere."""
    (engine,) = fleet.engines()
    assert engine["url"].startswith("http://127.0.0.1:")
    key, body = engine_process(engine).environ()["VLLM_API_KEY"], {"prompt": "x", "max_tokens": 1}
    asked = [
        requests.post(f"{engine['url']}/v1/completions", json=body, headers=headers, timeout=60).status_code
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {key}"})
    ]
    assert asked == [401, 401, 200] and len(key) >= 43  # 256 bits
    shown = [*map(command_of, processes), fleet.log.read_text(), json.dumps(fleet.state())]
    assert [text for text in shown if key in text] == []


@pytest.mark.server
def test_from_zero_and_back_until_ray_ends(on_one_machine, checkpoints):
    fleet, ours = on_one_machine(f"m={checkpoints['m']}", "--idle", 2)
    assert fleet.engines() == []
    with ThreadPoolExecutor(1) as pool:
        with behaving(checkpoints["m"], stage=1):
            waits = pool.submit(fleet.ask, min_stage="last")
            fleet.wait(lambda: any(map(answering, fleet.engines())), "an engine has the request")
            answer = fleet.ask()  # nobody is kept by who waits
            assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == undisturbed("one two", 4)
            assert answer.headers["X-Progressive-Stage"] == "1" and not waits.done()
            assert answer.json()["progressive_exact"] is False
            check_that_engines_are_ours_alone(fleet, ours())
            fleet.wait(lambda: "m stage 1/3" in fleet.log.read_text(), "the terminal says so")
            text, events = fleet.stream("three four", 6, stream_options={"include_usage": True})
            assert text == undisturbed("three four", 6)
            assert events[-1]["usage"]["completion_tokens"] == 6 and len({event["id"] for event in events}) == 1
            assert len(fleet.engines()) == 1
        assert waits.result().headers["X-Progressive-Stage"] == "3" and waits.result().json()["progressive_exact"]
    assert "/0" not in fleet.log.read_text()
    fleet.wait(lambda: fleet.engines() == [], "no engine runs")
    assert fleet.ask(min_stage=9).status_code == 400
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with behaving(checkpoints["m"], tokens=5):
            pool.submit(fleet.stream, "five", 100, began)  # and again
            assert began.wait(120)
            metrics = fleet.metrics()
            assert (metrics["fleet_requests_total", ""], metrics["fleet_refused_total", "400"]) == (4, 1)
            assert (metrics["fleet_nodes", "up"], metrics["fleet_engines", "m"]) == (1, 1)
            assert metrics["fleet_held_requests", "m"] == 0 and metrics["fleet_streams", ""] == 1
            starts = fleet.state()["starts"]
            assert len(starts) == len({start["engine"] for start in starts}) == 2

            assert are_engines(ours())
            kill_all([process for process in ours() if "gcs_server" in command_of(process)])
            assert fleet.process.wait(120) == 1
            assert "error: Ray has ended, and the fleet with it" in fleet.log.read_text()
            wait_until(lambda: not are_engines(ours()), "no engine is left")  # of Ray itself two stay for a minute


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_nothing_is_left_of_a_fleet_on_one_machine(number, on_one_machine, checkpoints, tmp_path, short_tmp):
    models = {**checkpoints, "nowhere": tmp_path / "nowhere"}
    fleet, ours = on_one_machine(*(f"{name}={models[name]}" for name in ("m", "broken", "nowhere")))
    answer = fleet.ask(model="nowhere")
    assert answer.status_code == 503 and "is no progressive checkpoint here" in answer.json()["error"]["message"]
    with behaving(checkpoints["broken"], fails=True):
        answer = fleet.ask(model="broken")
    assert answer.status_code == 503 and "this engine does not start" in answer.json()["error"]["message"]
    assert "Retry-After" in answer.headers
    assert fleet.ask().ok and are_engines(ours())
    fleet.process.send_signal(number)
    assert fleet.process.wait(120) == (0 if number == signal.SIGTERM else -number)
    wait_until(lambda: ours() == [], "nothing is left")
    if number == signal.SIGTERM:
        assert [path.name for path in short_tmp.iterdir()] == ["log"]


@pytest.mark.server
@pytest.mark.slow
def test_serve_deploy(marked, run_fleet, split_tiny, tmp_path, monkeypatch):
    """As the README has it: a file, and Ray Serve's own command line. The key is that of the head's environment."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    port, dashboard, config = free_port(), free_port(), tmp_path / "fleet.yaml"
    status, errors = run_fleet(f"m={split_tiny}", "--port", port, *WITHOUT_MODEL, "--idle", 5, "--write-config", config)
    assert status == 0, errors
    assert KEY not in config.read_text()
    serve = str(Path(sys.executable).with_name("serve"))
    address = ["--address", f"http://127.0.0.1:{dashboard}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}

    def answers() -> bool:
        body, url = {"prompt": "x", "max_tokens": 2}, f"http://127.0.0.1:{port}/v1/completions"
        assert requests.post(url, json=body, timeout=120).status_code == 401
        return requests.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120).ok

    def engines() -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if f"fake_engine.py {split_tiny}" in command_of(one)]

    with new_cluster(include_dashboard=True, dashboard_port=dashboard) as cluster, open(tmp_path / "log", "w") as log:
        add_node(cluster)
        options = {"env": environ, "stdout": log, "stderr": log, "timeout": 120, "check": True}
        subprocess.run([serve, "deploy", str(config), *address], **options)
        wait_until(answers, "it answers", log=tmp_path / "log")
        subprocess.run([serve, "shutdown", "--yes", *address], **options)
        wait_until(lambda: engines() == [], "no engine is left")


# ---- real engines -----------------------------------------------------------------------------------


@pytest.fixture
def real_fleet(marked, demo_checkpoint, tmp_path) -> Iterator[Fleet]:
    """The demo model on two nodes."""
    options = ["--enforce-eager", "--dtype", "float32", "--max-model-len", 2048]
    with new_cluster() as cluster:
        fleet = Fleet(cluster, tmp_path / "log", f"m={demo_checkpoint}", *options)
        try:
            for _ in range(2):  # while it starts
                add_node(cluster)
            fleet.wait_for_nodes(2)
            yield fleet
            fleet.stop()
        finally:
            fleet.process.kill()


@pytest.mark.server
@pytest.mark.slow
def test_real_engines_from_zero_and_drained(real_fleet):
    """The whole path: standbys, the demo model on both nodes, and streams that move to the other in mid-text."""
    fleet = real_fleet
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
            settle(fleet)
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
        assert [answer.text for answer in pool.map(lambda _: fleet.ask(), range(12)) if not answer.ok] == []
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


def settle(fleet) -> None:
    """Waits until the ingress has all that its engines, which are suspended, have sent."""
    seen = []

    def nothing_comes() -> bool:
        seen.append({engine["engine"]: engine["tokens"] for engine in fleet.engines()})
        return len(seen) > 10 and all(tokens == seen[-1] for tokens in seen[-10:])

    fleet.wait(nothing_comes, "no more tokens come")
