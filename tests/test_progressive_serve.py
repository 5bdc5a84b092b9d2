"""progressive_serve.py with an engine: against stock vLLM and transformers, on the trained demo model; over HTTP."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
import torch
from conftest import (
    PROBE,
    ROOT,
    SERVER,
    SPLIT,
    add_adapter,
    flip_last_byte,
    free_port,
    load_stage,
    make_llama,
    run_script,
    split_planes,
)
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, MistralForCausalLM

SERVER_OPTIONS = ["--max-model-len", "1024", "--max-num-seqs", "16"]
KV_CACHE = ["--kv-cache-memory-bytes", str(256 << 20)]


# ---- fixtures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(demo_checkpoint) -> list[str]:
    facts = json.loads((ROOT / "demo/model/facts/validation.json").read_text())["Data"]
    return [f"Question: {fact['Question']}\nAnswer:" for fact in facts[:64]]


@pytest.fixture(scope="module")
def demo_planes(demo_checkpoint, tmp_path_factory) -> Path:
    """The demo model in stages of planes."""
    folder = tmp_path_factory.mktemp("planes") / "checkpoint"
    split_planes(ROOT / "demo" / "model", folder)
    return folder


def run_probe(tmp_path: Path, *arguments, prompts: list[str], **env) -> dict:
    questions, out = tmp_path / "prompts.json", tmp_path / "found.json"
    questions.write_text(json.dumps(prompts))
    command = [sys.executable, str(PROBE), *map(str, arguments), str(questions), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def probe_of(demo_checkpoint, prompts, tmp_path_factory):
    """(dtype, checkpoint) -> what engine_probe.py found with it; each is run once."""

    @functools.cache
    def probe(dtype: str, checkpoint: Path = demo_checkpoint) -> dict:
        return run_probe(tmp_path_factory.mktemp("probe"), "stages", checkpoint, dtype, prompts=prompts)

    return probe


@pytest.fixture(params=["float32", "bfloat16"])
def probed(request, probe_of) -> dict:
    return probe_of(request.param)


@pytest.fixture
def probed_float32(probe_of) -> dict:
    return probe_of("float32")


def tokens(answers: list[dict]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


# ---- the final state is the original model ---------------------------------------------------------


def test_final_state_equals_stock(probed):
    assert len(probed["stock"]) == 64
    assert probed["stage3"] == probed["stock"]  # tokens, and logprobs to the last bit
    assert probed["at_once_stage"] == 3
    assert probed["at_once"] == probed["stock"]


def test_earlier_stages_are_other_models(probed):
    """Otherwise the equality above would prove nothing."""
    assert tokens(probed["stage1"]) != tokens(probed["stock"])
    assert tokens(probed["stage2"]) != tokens(probed["stock"])
    assert tokens(probed["stage1"]) != tokens(probed["stage2"])


def test_request_in_flight_survives_both_transitions(probed):
    flight = probed["flight"]
    first, second = flight["had"]
    assert 0 < first < second < len(flight["tokens"]) == 96
    assert flight["stage"] == 3
    assert flight["tokens"][second:] == probed["stock_continuation"]["tokens"]


def test_first_prompts_are_computed_while_the_weights_arrive(probed):
    """Every layer was waited for, none was run empty."""
    streamed = probed["streamed"]
    assert "binding" in streamed["events_before"]
    assert not {"read", "resident", "bound"} & set(streamed["events_before"])
    assert streamed["answers"] == probed["stage1"]


def test_no_stale_kv_cache(probed):
    """A long prompt, cached at one stage and asked again at the next."""
    for stage in ("long1", "long2", "long3"):
        from_nothing, from_cache = probed[stage]["cached_tokens"]
        assert from_nothing == 0  # the transition cleared what the stage before had cached
        assert from_cache > 0  # and the trap was set: within a stage the prompt does come from the cache
    assert probed["long3"]["first"] == probed["stock_long"]["first"]
    assert probed["long3"]["second"]["tokens"] == probed["stock_long"]["second"]["tokens"]


def test_progress_tells_every_stage(probed):
    progress = probed["progress"]
    assert (progress["stage"], progress["num_stages"], progress["error"]) == (3, 3, None)
    assert [row["state"] for row in progress["stages"]] == ["active"] * 3
    assert all(row["bytes"] == row["bytes_loaded"] > 0 for row in progress["stages"])
    seconds = [row["seconds"] for row in progress["stages"]]
    assert seconds == sorted(seconds) and seconds[0] < seconds[1] < seconds[2]
    active = [row["stage"] for row in progress["timeline"] if row["event"] == "active"]
    assert active == [1, 2, 3]


# ---- stages 1 and 2 are the model with PassLayers --------------------------------------------------


def stage_answers(checkpoint: Path, stage: int, prompts: list[str], adapter: Path | None = None) -> list[list[int]]:
    """12 greedy tokens of plain transformers in float32, with PassLayers for what is missing, and PEFT's adapter."""
    model = load_stage(checkpoint, stage)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [greedy(model, tokenizer(prompt, return_tensors="pt").input_ids, 12) for prompt in prompts]


def greedy(model, ids: torch.Tensor, length: int) -> list[int]:
    """Greedy tokens after `ids` [1, length], end-of-sequence ignored, no cache: as plain as it gets."""
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(length):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize("stage", [1, 2])
def test_stage_equals_transformers_with_pass_layers(probed_float32, stage, demo_checkpoint, prompts):
    assert tokens(probed_float32[f"stage{stage}"]) == stage_answers(demo_checkpoint, stage, prompts)


@pytest.mark.parametrize(
    "model_class, config",
    [(MistralForCausalLM, {}), (LlamaForCausalLM, {"tie_word_embeddings": True})],
    ids=["mistral", "tied embeddings"],
)
def test_other_models(model_class, config, tmp_path):
    """Another class of model and of layer than LLaMA's, with the same gate; a model without an lm_head of its own."""
    model = make_llama(tmp_path / "model", model_class, num_hidden_layers=4, **config)
    checkpoint = tmp_path / "checkpoint"
    assert run_script(SPLIT, model, checkpoint, "--layers", "1-2").returncode == 0
    prompts = [f"Number {number}? It is written here more than once, so that a block fills." for number in range(8)]
    (found,) = run_probe(tmp_path, "brief", checkpoint, model, "float32", prompts=prompts)
    assert found["stage3"] == found["stock"] != found["stage2"]
    for stage in (1, 2):
        assert tokens(found[f"stage{stage}"]) == stage_answers(checkpoint, stage, prompts)


# ---- stage adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_trace_of_adapters_in_the_final_state(dtype, probe_of, adapted_checkpoint):
    """Merged weights go back to the original bits; in flight and while the weights arrive as well."""
    found = probe_of(dtype, adapted_checkpoint)
    assert found["stage3"] == found["at_once"] == found["stock"]
    assert found["flight"]["tokens"][found["flight"]["had"][1] :] == found["stock_continuation"]["tokens"]
    assert found["long3"]["first"] == found["stock_long"]["first"]
    assert found["streamed"]["answers"] == found["stage1"]
    assert [row["adapter"] for row in found["progress"]["stages"]] == [True, True, False]


@pytest.mark.parametrize("stage", [1, 2])
def test_adapted_stage_equals_transformers_with_peft(stage, probe_of, adapted_checkpoint, probed_float32, prompts):
    found = tokens(probe_of("float32", adapted_checkpoint)[f"stage{stage}"])
    assert found == stage_answers(adapted_checkpoint, stage, prompts, adapted_checkpoint / f"adapters/stage{stage}")
    assert found != tokens(probed_float32[f"stage{stage}"])  # the adapter does something


# ---- transitions that fail, and an engine that steps by itself -------------------------------------


def test_failed_transition_goes_back(probe_of, adapted_checkpoint, prompts, tmp_path):
    """Half of the weights were of the new stage already; and the adapters' files are gone by then."""
    copy = Path(shutil.copytree(adapted_checkpoint, tmp_path / "checkpoint"))
    found = run_probe(tmp_path, "failing", copy, prompts=prompts[:16])
    assert "no room for the third" in found["failure"]
    assert found["stage_after_failure"] == 1
    assert found["answers_after_failure"] == found["stage1"]
    assert tokens(found["stage1"]) != tokens(found["stage2"]) != tokens(found["stage3"])
    assert found["stage3"] == probe_of("float32", adapted_checkpoint)["stage3"][:16]  # which is equal to stock's


def test_nothing_is_computed_within_a_transition(demo_checkpoint, prompts, tmp_path):
    """By an engine in a process of its own: K and V of requests that run meanwhile would be of the old stage."""
    found = run_probe(tmp_path, "apart", demo_checkpoint, prompts=prompts)
    assert (found["unfinished"], found["stage"]) == (8, 3)
    assert all(found["cached_tokens"])
    assert found["answers"] == found["stock"]
    assert "EngineDeadError" in found["dead"]  # and nobody waits for an engine that has died


# ---- the gate in a fixed graph ---------------------------------------------------------------------


def test_no_transition_changes_the_graph(split_tiny, tmp_path):
    """With an adapter in stage 1, whose weights are packed anew into the memory that the graph reads."""
    checkpoint = Path(shutil.copytree(split_tiny, tmp_path / "checkpoint"))
    adapter = add_adapter(checkpoint, 1, "all-linear")
    prompts = [f"Question number {number}: why?" for number in range(8)]
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE": "1"}
    found = run_probe(tmp_path, "compiled", checkpoint, prompts=prompts, **env)
    assert found["gate_selects"] and all(found["gate_selects"])
    assert found["compilations1"]["stats.unique_graphs"] > 0  # it did compile, and it was counted
    assert found["compilations1"] == found["compilations2"] == found["compilations3"]
    assert found["fixed1"]["addresses"] and found["fixed1"] == found["fixed2"] == found["fixed3"]
    assert len(found["fixed1"]["graphs"]) > 0 or not torch.cuda.is_available()
    assert found["kernels_stock"] > 0  # the gate is part of kernels that are there anyway:
    assert [found[f"kernels{stage}"] for stage in (1, 2, 3)] == 3 * [found["kernels_stock"]]
    assert found["stage3"] == found["stock"]
    assert tokens(found["stage1"]) == stage_answers(checkpoint, 1, prompts, adapter)
    assert tokens(found["stage2"]) == stage_answers(checkpoint, 2, prompts)
    assert tokens(found["stage1"]) != tokens(found["stage2"]) != tokens(found["stock"])


# ---- compiled after the last stage -----------------------------------------------------------------


def test_compiled_later_equals_stock(split_tiny, tmp_path):
    """By a process that has had none of the weights: nothing of them may be baked into what it has compiled."""
    prompts = [f"Question number {number}: why?" for number in range(8)]
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "VLLM_DISABLE_COMPILE_CACHE": "0"}
    found = run_probe(tmp_path, "later", split_tiny, prompts=prompts, **env)
    assert found["stage3"] == found["stock_eager"] != found["stage1"]  # with eager's own operators
    assert found["compiled"] == found["from_cache"] == found["stock"] != found["stock_eager"]
    assert "within 0.5 s" in found["late"]
    assert "no-such-compiler" in found["no_gcc"]
    assert found["after_failures"] == found["stage3"]  # it stays eager
    assert found["left"] == []
    traced = [
        {name: counts.get(name) for name in ("stats.unique_graphs", "frames.total")} for counts in found["compilations"]
    ]
    assert traced[0] == traced[1]  # in the engine: it has loaded what the other process has traced
    assert set(found["model"]) == {"LlamaDecoderLayer"}  # no gate is left


# ---- over HTTP -------------------------------------------------------------------------------------


class Server:
    """progressive_serve.py as a user starts it, in a process group of its own.

    Not in a session of its own: Linux divides processors among sessions (sched_autogroup), and on two cores those of
    vLLM's processes that spin have kept everybody else waiting for seconds.
    """

    def __init__(self, checkpoint: Path, log: Path, *options: str, kv_cache=KV_CACHE, **env: str):
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, str(SERVER), str(checkpoint), "--port", str(port), *SERVER_OPTIONS]
        command += [*kv_cache, *options]
        with open(log, "wb") as file:
            io = {"stdout": file, "stderr": subprocess.STDOUT, "process_group": 0}
            self.process = subprocess.Popen(command, env={**os.environ, **env}, **io)

    def hold_reader(self, after: str = "resident") -> psutil.Process:
        """Returns the reader process, suspended after this event of stage 1."""
        reader = self.reader()
        self.wait_for(lambda: f'"{after}"' in journal_of(reader).read_text())
        reader.suspend()
        time.sleep(2)  # what it was to read meanwhile it reads at once when it is resumed
        return reader

    def reader(self) -> psutil.Process:
        self.wait_for(self.readers)
        return self.readers()[0]

    def readers(self) -> list[psutil.Process]:
        """The reader process, once it is what it is called: before that a child looks like its parent."""
        return [child for child in psutil.Process(self.process.pid).children() if "_read" in child.cmdline()]

    def wait_for(self, what, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.02)

    def answers(self, stage: int = 1) -> bool:
        try:
            return requests.get(f"{self.url}/ready?stage={stage}", timeout=5).ok
        except requests.ConnectionError:
            return False

    def is_up(self) -> bool:
        """Whether it listens; an answer may take longer."""
        with contextlib.suppress(requests.ConnectionError):
            return bool(self.progress())
        return False

    def progress(self) -> dict:
        return requests.get(f"{self.url}/progress", timeout=30).json()

    def complete(self, prompt, tokens: int = 12, **options) -> requests.Response:
        response = self.post(prompt, tokens, **options)
        response.raise_for_status()
        return response

    def post(self, prompt, tokens: int = 12, **options) -> requests.Response:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **options}
        return requests.post(f"{self.url}/v1/completions", json=body, timeout=60, stream=body.get("stream", False))

    def listeners(self) -> list[int]:
        """The processes of the server that hold its port: with a worker among them, vLLM may fail at shutdown."""
        server = psutil.Process(self.process.pid)
        port = int(self.url.rpartition(":")[2])
        return [
            process.pid
            for process in (server, *server.children(recursive=True))
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def journal_of(reader: psutil.Process) -> Path:
    return Path(json.loads(reader.cmdline()[-1])["journal"])


def slowly(checkpoint: Path, seconds: float = 10) -> list[str]:
    """Options to read the whole checkpoint in 10 s, so that a test can hold the reader between two stages."""
    total = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return ["--limit-read-mbps", f"{total / 1e6 / seconds:.3f}"]


def test_server_from_stage_1_to_3(demo_checkpoint, prompts, probed_float32, tmp_path):
    """Reads so slowly that the test can hold it: stage 1, both transitions under a streaming request, stage 3."""
    read_seconds = 2 if torch.cuda.is_available() else 5  # so that stage 3 comes before the stream ends
    server = Server(demo_checkpoint, tmp_path / "log", *slowly(demo_checkpoint, read_seconds), "--dtype", "float32")
    try:
        reader = server.hold_reader()
        journal = journal_of(reader)
        server.wait_for(server.answers)

        progress = server.progress()
        assert (progress["stage"], progress["error"]) == (1, None)
        assert [row["state"] for row in progress["stages"]][0] == "active"
        assert "active" not in [row["state"] for row in progress["stages"]][1:]
        at_stage_1 = server.complete(prompts[:8], return_token_ids=True)
        assert at_stage_1.headers["X-Progressive-Stage"] == "1"
        assert server.listeners() == [server.process.pid]
        found = [choice["token_ids"] for choice in at_stage_1.json()["choices"]]
        assert found == tokens(probed_float32["stage1"][:8])

        streamed, stages_seen = [], []
        stream = server.complete(prompts[0], tokens=900, stream=True, return_token_ids=True)
        for line in stream.iter_lines():
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                streamed += choice["token_ids"] or []
                if len(streamed) >= 20 * (len(stages_seen) + 1):  # a chunk may bring more than one
                    stages_seen.append(server.progress()["stage"])
                    if len(stages_seen) == 1:
                        reader.resume()  # from here on the transitions come
        assert len(streamed) == 900  # nothing lost, nothing twice
        assert stages_seen[0] == 1 and stages_seen[-1] == 3, stages_seen

        at_stage_3 = server.complete(prompts[:8], return_token_ids=True)
        assert at_stage_3.headers["X-Progressive-Stage"] == "3"
        assert [choice["token_ids"] for choice in at_stage_3.json()["choices"]] == tokens(probed_float32["stock"][:8])
        progress = server.progress()
        assert [row["state"] for row in progress["stages"]] == ["active"] * 3
        constraint = {"structured_outputs": {"choice": ["sunny", "rainy"]}, "ignore_eos": False}
        chosen = server.complete(prompts[:2], tokens=16, **constraint)
        assert {choice["text"] for choice in chosen.json()["choices"]} <= {"sunny", "rainy"}
        chat = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4, "stream": True}
        with requests.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60, stream=True) as response:
            assert response.headers["X-Progressive-Stage"] == "3"
            assert response.text.strip().endswith("data: [DONE]")
        assert requests.post(f"{server.url}/v1/completions", json={"max_tokens": "x"}, timeout=60).status_code == 400
    finally:
        assert server.stop() == 0
    assert not journal.exists()  # the server cleans up behind itself


def test_server_of_planes_from_stage_1_to_3(demo_planes, prompts, probed_float32, tmp_path):
    """A stream runs on while its weights get sharper, and across both transitions."""
    server = Server(demo_planes, tmp_path / "log", *slowly(demo_planes, 5), "--dtype", "float32")
    try:
        held = [server.hold_reader()]
        server.wait_for(server.answers)
        assert server.complete(prompts[0]).headers["X-Progressive-Stage"] == "1"
        tokens_of, stream = [], server.complete(prompts[0], tokens=900, stream=True, return_token_ids=True)
        for line in stream.iter_lines():
            if line.startswith(b"data: {"):
                tokens_of += json.loads(line[6:])["choices"][0]["token_ids"] or []
                if held and len(tokens_of) >= 20:  # a chunk may bring more than one
                    held.pop().resume()
        assert len(tokens_of) == 900
        server.wait_for(lambda: server.progress()["stage"] == 3)
        at_stage_3 = server.complete(prompts[:8], return_token_ids=True)
        assert at_stage_3.headers["X-Progressive-Stage"] == "3"
        assert [choice["token_ids"] for choice in at_stage_3.json()["choices"]] == tokens(probed_float32["stock"][:8])
        assert [row["bits"] for row in server.progress()["stages"]] == [1, 2, "rest"]
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("kind", ["adapted_checkpoint", "demo_planes"])
def test_two_workers_answer_as_one(kind, prompts, probed_float32, request, tmp_path):
    """Tensor parallelism: the first stage, with its adapter, and the last."""
    checkpoint, found = request.getfixturevalue(kind), []
    for workers, cores in ((1, "0-1"), (2, "0|1")):
        options = [*slowly(checkpoint, 5), "--dtype", "float32", "--tensor-parallel-size", str(workers)]
        env = {"VLLM_CPU_OMP_THREADS_BIND": cores} if len(os.sched_getaffinity(0)) > 1 else {}
        server = Server(checkpoint, tmp_path / f"log{workers}", *options, **env)
        try:
            reader = server.hold_reader()
            server.wait_for(server.answers)
            first = server.complete(prompts[:8], return_token_ids=True)
            stream = server.complete(prompts[0], 120, stream=True)
            reader.resume()
            assert b"[DONE]" in stream.content
            server.wait_for(functools.partial(server.answers, 3))
            last = server.complete(prompts[:8], return_token_ids=True)
            assert [answer.headers["X-Progressive-Stage"] for answer in (first, last)] == ["1", "3"]
            found.append([[choice["token_ids"] for choice in answer.json()["choices"]] for answer in (first, last)])
        finally:
            assert server.stop() == 0
    one, two = found
    assert one == two
    assert two[1] == tokens(probed_float32["stock"][:8]) != two[0]


def test_bad_plane_changes_nothing(planes_tiny, tmp_path):
    """What is not verified must not get into the weights that are served."""
    copy = Path(shutil.copytree(planes_tiny, tmp_path / "copy"))
    path = copy / "model-stage2.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 1000] ^= 1  # in its first record
    path.write_bytes(data)
    os.utime(path, (0, 0))
    server = Server(copy, tmp_path / "log", *slowly(copy, 5))
    try:
        reader = server.hold_reader()
        server.wait_for(server.answers)
        before = server.complete("Hello", logprobs=1)
        reader.resume()
        server.wait_for(lambda: server.progress()["error"])
        assert "model-stage2.safetensors" in server.progress()["error"]
        after = server.complete("Hello", logprobs=1)
        assert before.headers["X-Progressive-Stage"] == after.headers["X-Progressive-Stage"] == "1"
        assert before.json()["choices"] == after.json()["choices"]
    finally:
        assert server.stop() == 0


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


@pytest.mark.parametrize(
    "options",
    [(), ("--async-scheduling", "--max-num-batched-tokens", "64", "--enable-prefix-caching")],
    ids=["default", "chunked"],
)
def test_every_kind_of_request_crosses_both_transitions(options, demo_checkpoint, prompts, tmp_path):
    """Nothing is lost, nothing comes twice, and a constraint holds from one stage to the next."""
    server = Server(demo_checkpoint, tmp_path / "log", *slowly(demo_checkpoint, 5), *options, "--max-num-seqs", "24")
    long_prompt = " ".join(prompts[:6])  # several steps with chunked prefill
    started = threading.Barrier(len(REQUESTS))

    def ask(kind: str) -> dict:
        extra, _ = REQUESTS[kind]
        if options:  # vllm-cpu ends when it divides the prompt of a request with a seed
            extra = {name: value for name, value in extra.items() if name != "seed"}
        length = {"several": 300, "beam search": 60, "comes late": 100, "hangs up": 900}.get(kind, 600)
        body = {"prompt": f"{kind}: {long_prompt}", "max_tokens": length, "return_token_ids": True}
        body |= {"ignore_eos": kind != "structured", **extra}
        started.wait(60)
        if kind == "comes late":
            server.wait_for(lambda: server.progress()["stage"] >= 2)  # stage 2 may be passed over
        streams = body.get("stream", False)
        response = requests.post(f"{server.url}/v1/completions", json=body, timeout=180, stream=streams)
        assert response.status_code == 200, response.text
        chunks = [] if streams else [response.json()]
        for line in response.iter_lines() if streams else ():
            if line.startswith(b"data: {"):
                chunks.append(json.loads(line[6:]))
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

    try:
        reader = server.hold_reader()
        server.wait_for(server.answers)
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            asked = {kind: pool.submit(ask, kind) for kind in REQUESTS}
            server.wait_for(lambda: metric(server, "vllm:num_requests_running") >= len(REQUESTS) - 3)
            reader.resume()
            found = {kind: answer.result() for kind, answer in asked.items()}
        for kind, (_, expected) in REQUESTS.items():
            assert expected is None or found[kind]["tokens"] == expected, kind
        assert re.fullmatch("((ab|cd)+)", found["structured"]["text"]) and len(found["structured"]["text"]) == 120
        crossed = [answer for kind, answer in found.items() if kind not in ("hangs up", "comes late")]
        assert [answer["began"] for answer in crossed] == ["1"] * len(crossed)
        assert {answer["ended"] for answer in crossed} <= {1, 2, 3} and max(answer["ended"] for answer in crossed) == 3
        assert found["comes late"]["began"] in ("2", "3")
        server.wait_for(lambda: server.answers(3))
        assert metric(server, "progressive_recomputed_requests_total") >= len(crossed)
        server.wait_for(lambda: metric(server, "vllm:num_requests_running") == 0)  # nor does it go on for who hung up
        assert "Traceback" not in server.log.read_text()
    finally:
        assert server.stop() == 0


def metric(server: Server, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = requests.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.split("[{ ]", line)[0] == name)


def test_server_compiles_behind_the_tokens(split_tiny, tmp_path):
    """From an empty cache; then, from that, while eight streams run across both transitions and what follows them."""
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "VLLM_DISABLE_COMPILE_CACHE": "0"}
    server = Server(split_tiny, tmp_path / "log", "--optimize-later", **env)
    try:
        server.wait_for(server.answers)
        server.wait_for(lambda: server.progress()["optimized"] == "compiling")
        assert server.progress()["stage"] == 3
        server.wait_for(lambda: server.progress()["optimized"] == "compiled", seconds=600)  # where others compute, too
        expected = server.complete("Hello", logprobs=1).json()["choices"]
    finally:
        assert server.stop() == 0

    server = Server(split_tiny, tmp_path / "log", *slowly(split_tiny, 5), "--optimize-later", **env)
    try:
        reader = server.hold_reader()
        server.wait_for(server.answers)
        streams = [server.complete(f"{number}", 900, stream=True, return_token_ids=True) for number in range(8)]
        assert {stream.headers["X-Progressive-Stage"] for stream in streams} == {"1"}
        reader.resume()
        for stream in streams:
            chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith(b"data: {")]
            assert sum(len(chunk["choices"][0]["token_ids"] or []) for chunk in chunks) == 900
        server.wait_for(lambda: server.progress()["optimized"] == "compiled")
        events = [event["event"] for event in server.progress()["timeline"]]
        assert events.count("active") in (2, 3) and "compiling" not in events  # stage 2 may be passed over
        assert server.complete("Hello", logprobs=1).json()["choices"] == expected
    finally:
        assert server.stop() == 0


def test_server_that_cannot_compile_stays_eager(split_tiny, tmp_path):
    """And is healthy, and says so; killed while another process compiles, it leaves nothing behind."""
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "VLLM_DISABLE_COMPILE_CACHE": "0"}
    server = Server(split_tiny, tmp_path / "log", "--optimize-later", "--compile-timeout", "1", **env)
    try:
        server.wait_for(server.answers)
        server.wait_for(lambda: server.progress()["not_optimized"])
        assert "--compile-timeout" in server.progress()["not_optimized"]
        assert server.progress()["optimized"] == "eager"
        assert server.complete("Hello").headers["X-Progressive-Stage"] == "3"
    finally:
        assert server.stop() == 0
    server = Server(split_tiny, tmp_path / "log", "--optimize-later", **env)
    try:
        server.wait_for(server.answers)
        server.wait_for(lambda: server.progress()["optimized"] == "compiling")
        processes = psutil.Process(server.process.pid).children(recursive=True)
        assert any("_compile" in process.cmdline() for process in processes)
        server.process.kill()
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert alive == []
    finally:
        server.stop()


MOMENTS = {
    "importing": lambda server, reader: True,
    "creating the model": lambda server, reader: len(psutil.Process(server.process.pid).children(recursive=True)) > 2,
    "about to listen": lambda server, reader: "Starting vLLM server" in server.log.read_text(),
    "serving": lambda server, reader: server.is_up(),
}


@pytest.mark.parametrize(
    "moment, number, kind",
    [
        *((moment, signal.SIGTERM, "split_tiny") for moment in MOMENTS),
        ("importing", signal.SIGKILL, "split_tiny"),
        ("serving", signal.SIGKILL, "split_tiny"),
        ("importing", signal.SIGTERM, "planes_tiny"),
        ("serving", signal.SIGKILL, "planes_tiny"),
    ],
)
def test_any_signal_at_any_moment_ends_everything(moment, number, kind, request, tmp_path, short_tmp):
    """Stage 1 arrives slowly, so that the reader lives all the while."""
    checkpoint = request.getfixturevalue(kind)
    server = Server(checkpoint, tmp_path / "log", *slowly(checkpoint, 60), TMPDIR=str(short_tmp))
    try:
        reader = server.reader()
        server.wait_for(lambda: MOMENTS[moment](server, reader))
        check_nothing_survives(server, number, short_tmp)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("moment", "number"), [("resident", signal.SIGINT), ("bound", signal.SIGTERM), ("bound", signal.SIGKILL)]
)
def test_any_signal_while_it_grows_ends_everything(moment, number, split_tiny, tmp_path, short_tmp):
    """Streams run, and stage 2 is arriving or about to become active."""
    server = Server(split_tiny, tmp_path / "log", *slowly(split_tiny, 5), TMPDIR=str(short_tmp))
    try:
        reader = server.hold_reader()
        server.wait_for(server.answers)
        streams = [server.complete(prompt, 900, stream=True) for prompt in "ABCDEFGH"]
        assert {stream.headers["X-Progressive-Stage"] for stream in streams} == {"1"}
        reader.resume()
        if moment == "bound":
            journal = journal_of(reader)
            server.wait_for(lambda: journal.read_text().count('"bound"') == 2)
        check_nothing_survives(server, number, short_tmp)
    finally:
        server.stop()


def check_nothing_survives(server: Server, number: int, temporary: Path) -> None:
    """It ends of a signal within ten seconds; neither processes nor folders, shared memory nor its port are left."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    shared = {path for process in processes for path in shared_memory(process)}
    server.process.send_signal(number)
    assert server.process.wait(10) in (0, -number, 128 + number)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    assert [path.name for path in temporary.glob("progressive-serve-*")] == []
    assert [path for path in shared if path.exists()] == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are not listeners
        probe.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))


def shared_memory(process: psutil.Process) -> set[Path]:
    """What vLLM exchanges its messages by."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {Path(region.path) for region in process.memory_maps() if region.path.startswith("/dev/shm/psm_")}
    return set()


@pytest.mark.parametrize(
    ("kind", "checkpoint"),
    [
        ("missing", "demo_checkpoint"),
        ("corrupt", "demo_checkpoint"),
        ("corrupt", "adapted_checkpoint"),
        ("corrupt", "demo_planes"),
    ],
)
def test_bad_later_stage_is_told_and_heals(kind, checkpoint, prompts, probed_float32, request, tmp_path):
    """It stays at the stage before and serves; when the file is put right it goes on, and ends as the full model."""
    source, broken = request.getfixturevalue(checkpoint), tmp_path / "broken"
    shutil.copytree(source, broken)
    bad = broken / "model-stage3.safetensors"
    bad.unlink() if kind == "missing" else flip_last_byte(bad)
    for path in (*broken.iterdir(), broken):
        os.utime(path, (0, 0), follow_symlinks=False)  # nobody is just copying it there
    server = Server(broken, tmp_path / "log", "--dtype", "float32")
    try:
        server.wait_for(lambda: server.answers(2))
        server.wait_for(lambda: server.progress()["error"])
        progress = server.progress()
        assert bad.name in progress["error"]
        assert str(tmp_path) not in json.dumps(progress)  # anybody may ask
        assert [row["state"] == "active" for row in progress["stages"]] == [True, True, False]
        assert metric(server, "progressive_spoilt_stage") == 3 and metric(server, "progressive_errors_total") >= 1
        assert bad.name in server.log.read_text()
        ready = requests.get(f"{server.url}/ready?stage=3", timeout=30)
        assert ready.status_code == 503 and bad.name in ready.json()["reason"]
        refused = server.post(prompts[0], min_stage=3)
        assert refused.status_code == 503 and bad.name in refused.json()["error"]["message"]
        assert server.complete(prompts[0]).headers["X-Progressive-Stage"] == "2"

        shutil.copy(source / bad.name, tmp_path / "good")
        os.rename(tmp_path / "good", bad)
        server.wait_for(lambda: server.answers(3))
        progress = server.progress()
        assert progress["error"] is None and metric(server, "progressive_spoilt_stage") == 0
        assert [row["state"] for row in progress["stages"]] == ["active"] * 3
        answers = server.complete(prompts[:8], return_token_ids=True).json()["choices"]
        assert [choice["token_ids"] for choice in answers] == tokens(probed_float32["stock"][:8])
    finally:
        assert server.stop() == 0


def test_bad_stage_1_ends_the_server(split_tiny, tmp_path):
    """Found when the server is up and a request waits for the last bytes of stage 1: nothing can be served."""
    broken = tmp_path / "broken"
    shutil.copytree(split_tiny, broken)
    flip_last_byte(broken / "model-stage1.safetensors")
    server = Server(broken, tmp_path / "log", *slowly(broken))
    try:
        reader = server.hold_reader(after="reading")
        server.wait_for(server.is_up)
        assert server.progress()["stage"] == 0
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, "Hello")
            reader.resume()
            with contextlib.suppress(requests.ConnectionError):
                assert waiting.result().status_code >= 500
        assert server.process.wait(60) == 2
    finally:
        server.stop()
    assert "error: " + str(broken / "model-stage1.safetensors: blake3 checksum differs") in server.log.read_text()


def test_weights_that_the_model_misses_are_named(tmp_path):
    """Not with what happened to be in memory."""
    model = make_llama(tmp_path / "model", tie_word_embeddings=True)
    assert run_script(SPLIT, model, tmp_path / "checkpoint", "--layers", "1-2").returncode == 0
    options = [*SERVER_OPTIONS, "--port", str(free_port()), "--hf-overrides", '{"tie_word_embeddings": false}']
    done = run_script(SERVER, tmp_path / "checkpoint", *options)
    assert done.returncode == 2
    assert "no weights for lm_head.weight" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("checkpoint", "options", "before"),
    [("split_tiny", ["--min-stage", "2"], "bound"), ("planes_tiny", [], "model created")],
)
def test_nobody_is_answered_by_an_earlier_stage(checkpoint, options, before, request, tmp_path):
    """However long that takes: with --min-stage, or where too much is lost at stage 1, by what the manifest says."""
    copy = Path(shutil.copytree(request.getfixturevalue(checkpoint), tmp_path / "copy"))
    manifest = json.loads((copy / "progressive.json").read_text())
    for row, perplexity in zip(manifest["stages"], (40.0, 24.1, 24.0), strict=True):
        row["perplexity"] = perplexity
    (copy / "progressive.json").write_text(json.dumps(manifest))
    server = Server(copy, tmp_path / "log", *slowly(copy), *options, "--hold-stage", "2")
    try:
        reader = server.hold_reader()
        server.wait_for(server.is_up)
        server.wait_for(lambda: before in [event["event"] for event in server.progress()["timeline"]])
        assert server.progress()["stage"] == 0
        reader.resume()
        assert server.complete("Hello").headers["X-Progressive-Stage"] == "2"
    finally:
        server.stop()


@contextlib.contextmanager
def held_memory(size: int):
    """Another process that holds and uses so many bytes."""
    code = f"import mmap, time; memory = mmap.mmap(-1, {size}); memory.write(bytes({size})); print(); time.sleep(900)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            yield
        finally:
            process.kill()


def test_server_starts_while_others_hold_memory(split_tiny, tmp_path):
    """vLLM by itself wants 92 % of the machine's memory, or does not start."""
    with held_memory(2 << 30):
        server = Server(split_tiny, tmp_path / "log", kv_cache=())
        try:
            server.wait_for(server.answers)
            assert server.complete("Hello").headers["X-Progressive-Stage"] == "3"
        finally:
            assert server.stop() == 0


def test_server_on_an_object_store(bucket, split_tiny, tmp_path):
    server = Server(bucket, tmp_path / "log")
    try:
        server.wait_for(server.answers)
        server.wait_for(lambda: server.progress()["stage"] == 3)
        assert [model["id"] for model in requests.get(f"{server.url}/v1/models", timeout=30).json()["data"]] == [bucket]
        assert server.complete("Hello").json()["choices"][0]["text"]
    finally:
        assert server.stop() == 0
