"""progressive_serve.py against stock vLLM and plain transformers, on the trained demo model, and over HTTP."""

import asyncio
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
from types import SimpleNamespace

import psutil
import pytest
import requests
import torch
import vllm
from conftest import ROOT, SERVER, SPLIT, add_adapter, load_stage, make_llama, run_script
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, MistralForCausalLM

PROBE = Path(__file__).with_name("engine_probe.py")
SERVER_OPTIONS = ["--max-model-len", "1024", "--max-num-seqs", "16"]
TIMEOUT = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"
KV_CACHE = ["--kv-cache-memory-bytes", str(256 << 20)]


# ---- fixtures ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(demo_checkpoint) -> list[str]:
    facts = json.loads((ROOT / "demo/model/facts/validation.json").read_text())["Data"]
    return [f"Question: {fact['Question']}\nAnswer:" for fact in facts[:64]]


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


# ---- the final state is the original model ----------------------------------------------------------


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


# ---- stages 1 and 2 are the model with PassLayers ---------------------------------------------------


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
    found = run_probe(tmp_path, "stages", checkpoint, "float32", prompts=prompts)
    assert found["stage3"] == found["at_once"] == found["stock"] != found["stage2"]
    for stage in (1, 2):
        assert tokens(found[f"stage{stage}"]) == stage_answers(checkpoint, stage, prompts)


# ---- stage adapters ---------------------------------------------------------------------------------


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


def test_adapters_can_be_left_out(adapted_checkpoint):
    import progressive_serve

    for adapters, stages in ((True, [1, 2]), (False, [])):
        launch = progressive_serve.start_reading(adapted_checkpoint, adapters=adapters, start=time.monotonic())
        launch.close()
        assert launch.loader_config()["adapters"] == stages


def edit_adapter(folder: Path, **values) -> None:
    path = folder / "adapters" / "stage1" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def note_base(folder: Path, files: dict[str, str]) -> None:
    (folder / "adapters" / "stage1" / "training.json").write_text(json.dumps({"base": {"files": files}}))


BAD_ADAPTERS = {
    "of another stage": (lambda folder: add_adapter(folder, 2, ["q_proj"], folder="stage1"), "layer 1"),
    "of the last stage": (lambda folder: add_adapter(folder, 3, ["q_proj"]), "stage3"),
    "of another model": (lambda folder: edit_config(folder, hidden_size=64), "shape [4, 128] instead of [4, 64]"),
    "another rank": (lambda folder: edit_adapter(folder, r=8), "shape [4, 128] instead of [8, 128]"),
    "another kind": (lambda folder: edit_adapter(folder, peft_type="LOHA"), "LOHA"),
    "dora": (lambda folder: edit_adapter(folder, use_dora=True), "use_dora"),
    "of another base": (lambda folder: note_base(folder, {"model-stage1.safetensors": "0" * 64}), "another base"),
    "without its weights": (
        lambda folder: (folder / "adapters/stage1/adapter_model.safetensors").unlink(),
        "cannot be read",
    ),
    "truncated": (lambda folder: truncate(folder / "adapters/stage1/adapter_config.json"), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapter(case, split_tiny, tmp_path):
    import progressive_serve

    spoil, named = BAD_ADAPTERS[case]
    folder = Path(shutil.copytree(split_tiny, tmp_path / "checkpoint"))
    add_adapter(folder, 1, ["q_proj"])
    assert progressive_serve.read_adapters(progressive_serve.read_plan(folder)).keys() == {1}
    spoil(folder)
    with pytest.raises(progressive_serve.UsageError, match="(?s)--no-adapters") as error:
        progressive_serve.start_reading(folder, start=time.monotonic())
    assert named in str(error.value)


# ---- transitions that fail, and an engine that steps by itself --------------------------------------


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


TRANSITIONS = {
    # what each call of progressive_activate returns -> stage and error afterwards, whether the engine goes on
    "no failure": ([[None, None]], 2, None, True),
    "a worker fails": ([[None, "no memory"], [None, None]], 1, "no memory", True),
    "and cannot go back": ([[None, "no memory"], ["nor this", None]], 1, "no memory; nor can stage 1", False),
}


@pytest.mark.parametrize("case", TRANSITIONS)
def test_transition_of_two_workers(case, split_tiny, tmp_path, monkeypatch):
    """All of them serve one stage that has a name, or the server ends."""
    import progressive_serve

    returned, stage, error, goes_on = TRANSITIONS[case]
    calls, killed = [], []

    class Engine:
        errored = False
        vllm_config = engine_config(split_tiny, tmp_path / "journal", world_size=2)

        async def pause_generation(self, **options):
            calls.append("pause")

        async def resume_generation(self):
            calls.append("resume")

        async def collective_rpc(self, name, args):
            calls.append((name, *args))
            return returned.pop(0) if name == "progressive_activate" else [None, None]

    monkeypatch.setattr(progressive_serve.os, "kill", lambda *signal: killed.append(signal))
    controller = progressive_serve.Controller(Engine())
    controller.hold_stage = 2
    controller.journal.mark("start")
    for rank, number in ((0, 1), (1, 1)):
        controller.journal.mark("bound", stage=number, rank=rank)
    controller.journal.mark("active", stage=1)
    for rank in (0, 1):
        controller.journal.mark("bound", stage=2, rank=rank)
    controller.update()
    asyncio.run(controller.run())
    assert controller.progress.stage == stage and returned == []
    assert (error or "") in (controller.progress.error or "")
    assert ("resume" in calls) == goes_on and bool(killed) != goes_on
    assert (("progressive_settle", 2) in calls) == (stage == 2)  # else the way back would be gone


def engine_config(checkpoint: Path, journal: Path, world_size: int = 1, min_stage: int = 1) -> SimpleNamespace:
    """What the controller reads of vLLM's configuration."""
    config = {"journal": str(journal), "hold_stage": 3, "min_stage": min_stage, "adapters": []}
    return SimpleNamespace(
        load_config=SimpleNamespace(model_loader_extra_config=config),
        model_config=SimpleNamespace(model=checkpoint),
        parallel_config=SimpleNamespace(world_size=world_size),
    )


# ---- the gate in a fixed graph ----------------------------------------------------------------------


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


def test_closed_gate_ignores_nan_weights():
    """The select form, alone: sublayers that return NaN, a closed gate, and the residual stream bit for bit."""
    import progressive_serve

    class Norm(torch.nn.Module):
        def forward(self, hidden_states, residual=None):
            return hidden_states if residual is None else (hidden_states + residual, hidden_states + residual)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 64)
            self.input_layernorm = self.post_attention_layernorm = Norm()
            self.mlp = self.linear

        def self_attn(self, positions, hidden_states):
            return self.linear(hidden_states)

    layer = Layer()
    layer.__class__ = type("GatedLayer", (progressive_serve.GateMixin, Layer), {})
    layer.install_gate(selects=True, device=torch.device("cpu"))
    positions = torch.arange(5)
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        stream = torch.randn(5, 64, dtype=dtype)
        with torch.no_grad():
            layer.linear.weight.fill_(float("nan"))
            layer.set_gate(False)
            hidden_states, residual = layer(positions, stream.clone(), torch.zeros_like(stream))
            assert torch.equal(hidden_states + residual, stream)
            hidden_states, residual = layer(positions, stream.clone(), None)
            assert torch.equal(hidden_states + residual, stream)
            layer.set_gate(True)
            hidden_states, residual = layer(positions, stream.clone(), torch.zeros_like(stream))
            assert (hidden_states + residual).isnan().all()  # the weights really were NaN


# ---- over HTTP --------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """progressive_serve.py as a user starts it."""

    def __init__(self, checkpoint: Path, log: Path, *options: str, kv_cache=KV_CACHE, **env: str):
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, str(SERVER), str(checkpoint), "--port", str(port), *SERVER_OPTIONS]
        command += [*kv_cache, *options]
        with open(log, "wb") as file:
            io = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.process = subprocess.Popen(command, env={**os.environ, **env}, **io)

    def hold_reader(self, after: str = "resident") -> psutil.Process:
        """Returns the reader process, suspended after this event of stage 1."""
        reader = self.reader()
        self.wait_for(lambda: f'"{after}"' in journal_of(reader).read_text())
        reader.suspend()
        return reader

    def reader(self) -> psutil.Process:
        self.wait_for(lambda: psutil.Process(self.process.pid).children())
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "_read" in child.cmdline())

    def wait_for(self, what, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.02)

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
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
    server = Server(demo_checkpoint, tmp_path / "log", *slowly(demo_checkpoint, 5), "--dtype", "float32")
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
                if len(streamed) % 20 == 0:
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
        chat = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4, "stream": True}
        with requests.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60, stream=True) as response:
            assert response.headers["X-Progressive-Stage"] == "3"
            assert response.text.strip().endswith("data: [DONE]")
        assert requests.post(f"{server.url}/v1/completions", json={"max_tokens": "x"}, timeout=60).status_code == 400
    finally:
        assert server.stop() == 0
    assert not journal.exists()  # the server cleans up behind itself


MOMENTS = {
    "importing": lambda server, reader: True,
    "creating the model": lambda server, reader: len(psutil.Process(server.process.pid).children(recursive=True)) > 2,
    "about to listen": lambda server, reader: "Starting vLLM server" in server.log.read_text(),
    "serving": lambda server, reader: server.is_up(),
}


@pytest.mark.parametrize(
    "moment, number",
    [*((moment, signal.SIGTERM) for moment in MOMENTS), ("importing", signal.SIGKILL), ("serving", signal.SIGKILL)],
)
def test_any_signal_at_any_moment_ends_everything(moment, number, split_tiny, tmp_path):
    """Stage 1 arrives slowly, so that the reader lives all the while."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    server = Server(split_tiny, tmp_path / "log", *slowly(split_tiny, 60), TMPDIR=str(temporary))
    try:
        reader = server.reader()
        server.wait_for(lambda: MOMENTS[moment](server, reader))
        processes = [reader, *psutil.Process(server.process.pid).children(recursive=True)]
        server.process.send_signal(number)
        assert server.process.wait(10) in (0, -number, 128 + number)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert alive == []
        assert [path.name for path in temporary.glob("progressive-serve-*")] == []
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are not listeners
            probe.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))
    finally:
        server.stop()


def test_bad_later_stage_leaves_the_server_where_it_is(demo_checkpoint, prompts, tmp_path):
    """A checksum that does not match: reported in /progress with the file's name; stage 2 goes on answering."""
    broken = tmp_path / "broken"
    shutil.copytree(demo_checkpoint, broken)
    flip_last_byte(broken / "model-stage3.safetensors")
    server = Server(broken, tmp_path / "log", *slowly(broken))
    try:
        reader = server.hold_reader()
        server.wait_for(server.answers)
        reader.resume()
        server.wait_for(lambda: server.progress()["error"])
        progress = server.progress()
        assert "model-stage3.safetensors" in progress["error"]
        assert str(tmp_path) not in json.dumps(progress)  # anybody may ask
        assert progress["stages"][2]["state"] != "active"
        server.wait_for(lambda: server.progress()["stage"] == 2)
        assert server.complete(prompts[0]).headers["X-Progressive-Stage"] == "2"
        assert "model-stage3.safetensors" in server.log.read_text()
    finally:
        server.stop()


def flip_last_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, (0, 0))  # long ago: nobody is just copying it there


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
            assert waiting.result().status_code >= 500
        assert server.process.wait(60) == 2
    finally:
        server.stop()
    assert "error: " + str(broken / "model-stage1.safetensors: blake3 checksum differs") in server.log.read_text()


def test_min_stage(split_tiny, tmp_path):
    """With --min-stage 2 nobody is answered by stage 1, however long that takes."""
    server = Server(split_tiny, tmp_path / "log", *slowly(split_tiny), "--min-stage", "2", "--hold-stage", "2")
    try:
        reader = server.hold_reader()
        server.wait_for(server.is_up)
        server.wait_for(lambda: "bound" in [event["event"] for event in server.progress()["timeline"]])
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


KV_CACHE_SIZES = {
    # GiB free beside the weights, options -> GiB
    "no more than 4 GiB": ((100, {}), 4),
    "half of what is free": ((6, {}), 3),
    "shared by two workers": ((6, {"tensor_parallel_size": 2}), 1.5),
    "one long sequence": ((100, {}), 16),
    "one long sequence does not fit": ((20, {}), 10),
    "nothing is left": ((-1, {}), 0),
    "said in bytes": ((6, {"kv_cache_memory_bytes": 1 << 30}), None),
    "said as a share": ((6, {"gpu_memory_utilization": 0.5}), None),
}


@pytest.mark.parametrize("case", KV_CACHE_SIZES)
def test_size_of_the_kv_cache_on_a_cpu(case, copied, monkeypatch):
    from vllm.utils import cpu_resource_utils

    import progressive_serve

    (free, options), expected = KV_CACHE_SIZES[case]
    plan = progressive_serve.read_plan(copied)
    memory = SimpleNamespace(available_memory=int(free * 2**30) + sum(stage.bytes for stage in plan.stages))
    monkeypatch.setattr(cpu_resource_utils, "get_memory_node_info", lambda node: memory)
    if "one long sequence" in case:  # K and V of 4 layers, 2 heads of 32 numbers, 4 bytes each
        edit_config(copied, max_position_embeddings=(16 << 30) // (2 * 4 * 4 * 2 * 32))
    found = progressive_serve.cpu_kv_cache_bytes(plan, options)
    assert found == (None if expected is None else int(expected * 2**30))


# ---- bad input --------------------------------------------------------------------------------------


def edit_manifest(checkpoint: Path, change) -> None:
    manifest = json.loads((checkpoint / "progressive.json").read_text())
    change(manifest)
    (checkpoint / "progressive.json").write_text(json.dumps(manifest))


def edit_config(checkpoint: Path, **values) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **values}))


def age(folder: Path) -> Path:
    """Nobody is just copying it there."""
    for path in (folder, *folder.iterdir()):
        os.utime(path, (0, 0))
    return folder


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    os.utime(path, (0, 0))


BAD_CHECKPOINTS = {
    "no manifest": (lambda folder: (folder / "progressive.json").unlink(), "progressive.json"),
    "manifest is not JSON": (lambda folder: (folder / "progressive.json").write_text("{"), "malformed"),
    "another version": (lambda folder: edit_manifest(folder, lambda m: m.update(format_version=9)), "9"),
    "path outside": (
        lambda folder: edit_manifest(folder, lambda m: m["stages"][0]["files"][0].update(name="../x.safetensors")),
        "../x.safetensors",
    ),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "another architecture": (
        lambda folder: edit_config(folder, architectures=["GPT2LMHeadModel"]),
        "GPT2LMHeadModel",
    ),
    "another number of layers": (lambda folder: edit_config(folder, num_hidden_layers=7), "7"),
    "unknown kind": (lambda folder: edit_manifest(folder, lambda m: m["stages"][1].update(kind="planes")), "planes"),
    "layers missing": (lambda folder: edit_manifest(folder, lambda m: m["stages"].pop()), "layers"),
    "file missing": (lambda folder: (folder / "model-stage2.safetensors").unlink(), "model-stage2.safetensors"),
    "file truncated": (lambda folder: truncate(folder / "model-stage3.safetensors"), "model-stage3.safetensors"),
    "adapter of no stage": (lambda folder: (folder / "adapters/stage9").mkdir(parents=True), "stage9"),
    "checksum of stage 1": (lambda folder: flip_last_byte(folder / "model-stage1.safetensors"), "model-stage1"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint(case, split_tiny, tmp_path):
    spoil, named = BAD_CHECKPOINTS[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(split_tiny, folder)
    spoil(folder)
    age(folder)
    done = run_script(SERVER, folder, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()
    assert 1 <= len(error) <= 2 and error[0].startswith("progressive_serve.py: error: ")
    assert named in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["/no/such/folder"], "/no/such/folder"),
        (["{checkpoint}", "--hold-stage", "9"], "9"),
        (["{checkpoint}", "--hold-stage", "0"], "0"),
        (["{checkpoint}", "--min-stage", "4"], "--min-stage 4"),
        (["{checkpoint}", "--min-stage", "3", "--hold-stage", "2"], "--min-stage 3"),
        (["{checkpoint}", "--cache-dir", "/proc/nowhere"], "/proc/nowhere"),
        (["--port", "1", "{checkpoint}"], "the checkpoint comes first"),
        (["{checkpoint}", "--no-such-option"], "--no-such-option"),
        (["{checkpoint}", "--enable-lora"], "--enable-lora"),
        (["{checkpoint}", "--load-format", "dummy"], "--load-format"),
        (["{checkpoint}", "--additional-config", '{{"a": 1}}'], "--additional-config"),
        (["{checkpoint}", "--port", "{taken}", "--log-level", "ERROR"], "{taken}"),
    ],
)
def test_bad_arguments(arguments, named, split_tiny):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        values = {"checkpoint": split_tiny, "taken": taken.getsockname()[1]}
        done = run_script(SERVER, *(argument.format(**values) for argument in arguments))
    assert done.returncode == 2
    assert named.format(**values) in done.stderr.strip().splitlines()[-1]
    log_lines = re.findall(r"^.*\bINFO \d.*$", done.stdout + done.stderr, re.M)
    assert not log_lines  # the log level reaches this process too


@pytest.mark.parametrize(
    "option, value",
    [
        ("cpu_offload_gb", 4.0),
        ("offload_group_size", 2),
        ("enable_sleep_mode", True),
        ("quantization", "fp8"),
        ("distributed_executor_backend", "ray"),
    ],
)
def test_options_that_move_the_weights_are_refused(option, value):
    import progressive_serve

    progressive_serve.refuse_unsupported(vars(vllm.EngineArgs()))
    with pytest.raises(progressive_serve.UsageError, match=f"--{option.replace('_', '-')} cannot be combined"):
        progressive_serve.refuse_unsupported({**vars(vllm.EngineArgs()), option: value})


def test_weights_that_the_model_misses_are_named(tmp_path):
    """Not with what happened to be in memory."""
    model = make_llama(tmp_path / "model", tie_word_embeddings=True)
    assert run_script(SPLIT, model, tmp_path / "checkpoint", "--layers", "1-2").returncode == 0
    options = [*SERVER_OPTIONS, "--port", str(free_port()), "--hf-overrides", '{"tie_word_embeddings": false}']
    done = run_script(SERVER, tmp_path / "checkpoint", *options)
    assert done.returncode == 2
    assert "no weights for lm_head.weight" in done.stderr.strip().splitlines()[-1]


EAGER = {
    "nobody says": ([], None, True),
    "with hyphens": (["--no-enforce-eager"], None, False),
    "with underscores": (["--no_enforce_eager"], None, False),
    "in a file": ([], "enforce-eager: false", False),
}


@pytest.mark.parametrize("case", EAGER)
def test_eager_on_a_cpu_unless_said(case, split_tiny, tmp_path, monkeypatch):
    import progressive_serve

    argv, config, expected = EAGER[case]
    if config:
        (tmp_path / "config.yaml").write_text(config)
        argv = ["--config", str(tmp_path / "config.yaml")]
    monkeypatch.setattr(progressive_serve, "ARGS", SimpleNamespace(checkpoint="name"), raising=False)
    monkeypatch.setattr(progressive_serve, "fork_workers", lambda: None)
    monkeypatch.delenv(TIMEOUT, raising=False)
    launch = progressive_serve.start_reading(split_tiny, start=time.monotonic())
    try:
        args = progressive_serve.server_args(launch, argv)
    finally:
        launch.close()
    assert args.enforce_eager is expected
    assert args.gpu_memory_utilization == vllm.EngineArgs.gpu_memory_utilization
    assert int(os.environ[TIMEOUT]) >= 3600  # a step that waits for a stalled disk is no dead worker


def test_unsupported_vllm_is_named(monkeypatch):
    import progressive_serve

    monkeypatch.setattr(progressive_serve, "current_platform", SimpleNamespace(device_type="cuda"))
    for version in ("0.26.0", "0.31.1rc2", "0.32.0"):
        monkeypatch.setattr(progressive_serve.vllm, "__version__", version)
        progressive_serve.check_vllm()
    for version in ("0.9.1", "0.25.1", "0.33.0", "1.0.0"):
        monkeypatch.setattr(progressive_serve.vllm, "__version__", version)
        with pytest.raises(progressive_serve.UsageError, match=re.escape(version) + r".* 0\.26 to 0\.32"):
            progressive_serve.check_vllm()
    monkeypatch.setattr(progressive_serve, "current_platform", SimpleNamespace(device_type="tpu"))
    with pytest.raises(progressive_serve.UsageError, match="tpu"):
        progressive_serve.check_vllm()


# ---- pure parts -------------------------------------------------------------------------------------


def test_help_is_readable_on_80_columns():
    done = run_script(SERVER, "--help", COLUMNS="80")
    assert done.returncode == 0
    assert "--hold-stage" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("begun", [False, True])
def test_requests_are_told_when_the_engine_has_ended(begun, monkeypatch):
    """vLLM may let them wait, and its server with them, until the client gives up."""
    import progressive_serve

    monkeypatch.setattr(progressive_serve, "ENGINE_POLL_SECONDS", 0.01)
    monkeypatch.setattr(progressive_serve, "LAST_WORDS_SECONDS", 0.01)
    sent, cancelled, engine = [], [], SimpleNamespace(errored=False)
    start = {"type": "http.response.start", "status": 200}

    async def never_ending(scope, receive, send):
        if begun:
            await send(start)
        engine.errored = True
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    async def send(message):
        sent.append(message)

    async def ask():
        middleware = progressive_serve.ProgressMiddleware(never_ending)
        decided = asyncio.Event()
        decided.set()
        state = {"decided": decided, "switching": asyncio.Lock(), "progress": SimpleNamespace(stage=1, error=None)}
        middleware.controller = SimpleNamespace(engine=engine, **state)
        middleware.transitions = asyncio.create_task(asyncio.Event().wait())
        middleware.engine_ended = asyncio.create_task(middleware.end_with_engine())
        await middleware({"type": "http", "path": "/v1/completions", "method": "POST"}, None, send)
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(ask(), 10))
    assert cancelled == [True]
    assert [message.get("status") for message in sent if message["type"] == start["type"]] == [200 if begun else 503]
    bodies = b"".join(message.get("body", b"") for message in sent)
    assert (b"" if begun else b"shutting down") in bodies and bool(bodies) != begun


def test_progress_follows_the_journal(split_tiny, tmp_path):
    """States in order, and a line that is still being written is left for the next look."""
    import progressive_serve

    plan = progressive_serve.read_plan(split_tiny)
    progress = progressive_serve.Progress(plan, ranks=2)
    journal = progressive_serve.Journal(tmp_path / "journal")
    writer = progressive_serve.Journal(tmp_path / "journal")

    def states() -> list[str]:
        progress.fold(journal.follow())
        return [row["state"] for row in progress.as_dict()["stages"]]

    writer.mark("start", at=100.0)
    assert states() == ["absent", "absent", "absent"]
    writer.mark("read", file="model-stage1.safetensors", bytes=10)
    assert states() == ["loading", "absent", "absent"]
    writer.mark("resident", stage=1)
    writer.mark("bound", stage=1, rank=0)
    assert states() == ["resident", "absent", "absent"]
    assert progress.bound_stage() == 0  # the other worker has not bound it
    writer.mark("bound", stage=1, rank=1)
    states()
    assert progress.bound_stage() == 1
    writer.mark("active", at=107.5, stage=1)
    assert states() == ["active", "absent", "absent"]
    assert progress.as_dict()["stages"][0]["seconds"] == 7.5
    with open(journal.path, "ab") as file:
        file.write(b'{"event": "error", "at": 109')
    assert states() and progress.error is None
    with open(journal.path, "ab") as file:
        file.write(b'.0, "text": "disk on fire", "stage": 3}\n')
    assert states() and progress.error == "disk on fire"
    assert progress.reachable_stage() == 2  # stage 2 is not spoilt by it


STAGES_AT_THE_START = {
    # (read of stage 1, binding, streamed, bound, min_stage) -> the stage to be served after ten seconds
    "not bound, and half of it is missing": ((0.5, 1, True, 0, 1), 0),
    "not bound, but nearly there": ((0.9, 1, True, 0, 1), 1),
    "nearly there, but the graph cannot wait": ((0.9, 1, False, 0, 1), 0),
    "bound": ((1.0, 1, False, 1, 1), 1),
    "everything had arrived before binding began": ((1.0, 3, True, 0, 1), 3),
    "stage 2 is asked for, and stage 1 bound": ((1.0, 1, True, 1, 2), 0),
    "stage 2 is asked for, and bound": ((1.0, 1, True, 2, 2), 2),
}


@pytest.mark.parametrize("case", STAGES_AT_THE_START)
def test_stage_at_the_start(case, split_tiny, tmp_path):
    """The policy, without an engine."""
    import progressive_serve

    (read, first, streamed, bound, min_stage), expected = STAGES_AT_THE_START[case]
    journal = progressive_serve.Journal(tmp_path / "journal")
    vllm_config = engine_config(split_tiny, journal.path, min_stage=min_stage)
    controller = progressive_serve.Controller(SimpleNamespace(vllm_config=vllm_config))
    journal.mark("start", at=time.monotonic() - 10)
    for stage in controller.progress.plan.stages[:first]:
        for file in stage.files:
            journal.mark("read", file=file.name, bytes=int(file.bytes * read))
    journal.mark("binding", stage=first, streamed=streamed)
    for stage in range(1, bound + 1):
        journal.mark("bound", stage=stage, rank=0)
    controller.update()
    assert controller.next_stage() == expected


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_forked_worker_computes_as_a_spawned_one_would():
    """As many threads as vLLM says, each on a core of its own: half of a core is lost otherwise."""
    forked_worker = """
import os
os.environ["OMP_NUM_THREADS"] = "1"
import progressive_serve, torch
cores = sorted(os.sched_getaffinity(0))[:2]
if os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
progressive_serve.multiprocessing.current_process().name = "Worker"
os.environ |= {"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": " ".join(map(str, cores))}
progressive_serve.adopt_omp_settings()
bound = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
print(torch.get_num_threads(), os.sched_getaffinity(0) == {cores[0]}, {cores[1]} in bound, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", forked_worker], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.split()[-3:] == ["2", "True", "True"], done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_reader_that_is_killed_is_heard_of(split_tiny, number):
    """Everybody waits for the reader, so its death must not go unnoticed."""
    import progressive_serve

    launch = progressive_serve.start_reading(split_tiny, None, limit_mbps=0.001, start=time.monotonic())
    failures = []
    launch.on_failure = failures.append
    launch.reader.send_signal(number)
    deadline = time.monotonic() + 30
    while not failures and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "reader process stopped at stage 1" in failures[0] and f"-{int(number)}" in failures[0]
    waiting = progressive_serve.StageSource(launch.loader_config(), launch.plan, rank=0, workers=1)
    with pytest.raises(RuntimeError, match="reader process stopped"):
        waiting.wait_resident(launch.plan.stages[:1])


def test_reader_that_dies_when_all_is_resident_is_not_missed(split_tiny):
    """Every byte has been verified by then."""
    reading = Reading(split_tiny)
    reading.wait_for_all()
    launch = reading.launch
    launch.reader.wait(30)
    failures = []
    launch.on_failure = failures.append
    launch.reader = SimpleNamespace(communicate=lambda: (b"", b"Killed"), returncode=-9, terminate=lambda: None)
    launch.watch_reader()
    assert failures == [] and "error" not in [event["event"] for event in launch.events()]


def test_every_follower_sees_every_event(split_tiny):
    reading = Reading(split_tiny)
    reading.launch.reader.wait(30)
    followers = [progressive_journal(reading.launch.journal.path) for _ in range(2)]
    assert reading.launch.start_failure() is None
    first, second = (follower.follow() for follower in followers)
    assert first == second == reading.launch.events() != []


def progressive_journal(path: Path):
    import progressive_serve

    return progressive_serve.Journal(path)


def test_closing_gives_the_memory_back(split_tiny):
    """A notebook that has loaded, or failed to, must not hold a whole model."""
    reading = Reading(split_tiny)
    reading.wait_for_all()
    del reading.buffer

    def held() -> list[str]:
        descriptors = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        mappings = Path("/proc/self/maps").read_text().splitlines()
        return [entry for entry in (*descriptors, *mappings) if "progressive-weights" in entry]

    before = len(held())
    assert before
    reading.launch.close()
    assert len(held()) < before


def bare_weights(**attributes):
    """A StagedWeights without a model."""
    import progressive_serve

    weights = object.__new__(progressive_serve.StagedWeights)
    vars(weights).update(attributes)
    return weights


def test_worker_that_cannot_begin_wakes_who_waits(tmp_path):
    """Trouble before the first byte, and a journal that cannot be written: still nobody waits for ever."""

    def no_cores():
        raise OSError("no cores left")

    norm, layer = torch.nn.Identity(), torch.nn.Identity()
    weights = bare_weights(
        model=SimpleNamespace(model=SimpleNamespace(norm=norm)),
        complete={module: threading.Event() for module in (norm, layer)},
        journal=SimpleNamespace(mark=lambda *_, **__: no_cores()),
        beside_the_engine=no_cores,
        failure=None,
    )
    with contextlib.suppress(OSError):
        weights.bind_stages()
    assert "no cores left" in weights.failure
    assert all(event.is_set() for event in weights.complete.values())


def test_one_worker_decides_where_to_begin(split_tiny):
    """All of them merge the same adapter, whatever has arrived between two looks."""
    import progressive_serve

    reading = Reading(split_tiny, limit_mbps=0.001)
    config, plan = reading.launch.loader_config(), reading.plan
    sources = [progressive_serve.StageSource(config, plan, rank, workers=2) for rank in (0, 1)]
    first, second = (
        bare_weights(rank=rank, source=source, journal=source.journal, start_stage=3, graph_is_fixed=False)
        for rank, source in enumerate(sources)
    )
    assert first.decide_first_stage() == 1
    for stage in (1, 2, 3):
        reading.launch.journal.mark("resident", stage=stage)  # between the two looks
    assert sources[1].resident_stage() == 3
    assert second.decide_first_stage() == 1


@pytest.mark.parametrize("fails", [False, True])
def test_no_copy_during_a_capture(fails, monkeypatch):
    """However the graph is captured: torch.cuda.graph and vLLM's breakable graphs both call these methods."""
    import progressive_serve

    copying, held = threading.Lock(), []

    class Graph:
        def capture_begin(self, pool=None):
            held.append(copying.locked())
            if fails:
                raise RuntimeError("out of memory")

        def capture_end(self):
            held.append(copying.locked())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    progressive_serve.copy_between_captures(copying)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            Graph().capture_begin(pool=1)
    else:
        graph = Graph()
        graph.capture_begin(pool=1)
        graph.capture_end()
    assert held == [True] * (1 if fails else 2) and not copying.locked()


# ---- the reader: files that are slow, short, wrong, gone --------------------------------------------


class Reading:
    """A reader process on a checkpoint, and its journal."""

    def __init__(self, checkpoint: Path, **options):
        import progressive_serve

        self.launch = progressive_serve.start_reading(checkpoint, start=time.monotonic(), **options)
        self.plan = self.launch.plan
        self.buffer = progressive_serve.WeightBuffer(self.launch.buffer, self.plan)
        self.progress = progressive_serve.Progress(self.plan)

    def wait_for(self, what, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what(self.progress):
            assert time.monotonic() < deadline, self.progress
            self.progress.fold(self.launch.journal.follow())
            time.sleep(0.01)

    def wait_for_all(self) -> None:
        self.wait_for(lambda progress: progress.error or len(progress.resident) == self.plan.num_stages)
        assert self.progress.error is None

    def bytes_of(self, name: str) -> bytes:
        (file,) = (file for file in self.plan.files if file.name == name)
        return bytes(self.buffer.place_of(file))

    def memory(self) -> int:
        """Bytes that the buffer holds now."""
        return os.stat(self.launch.buffer).st_blocks * 512


@pytest.fixture
def copied(split_tiny, tmp_path) -> Path:
    """A copy of the tiny checkpoint, made long ago, to be spoilt."""
    return age(Path(shutil.copytree(split_tiny, tmp_path / "copied")))


def test_reader_delivers_every_byte(split_tiny):
    reading = Reading(split_tiny)
    reading.wait_for_all()
    for file in reading.plan.files:
        assert reading.bytes_of(file.name) == (split_tiny / file.name).read_bytes()
    assert reading.launch.reader.wait(30) == 0


def test_reader_follows_a_file_that_grows(copied):
    """A checkpoint that is still being copied to its place."""
    path = copied / "model-stage2.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    reading = Reading(copied)
    reading.wait_for(lambda progress: 1 in progress.resident)
    for begin in range(1000, len(whole), len(whole) // 5):
        time.sleep(0.2)
        with open(path, "ab") as file:
            file.write(whole[begin : begin + len(whole) // 5])
    reading.wait_for_all()
    assert reading.bytes_of(path.name) == whole


def test_reader_gives_up_on_a_file_that_does_not_grow(copied, monkeypatch):
    import progressive_serve

    path = copied / "model-stage2.safetensors"
    size = path.stat().st_size
    truncate(path)
    monkeypatch.setattr(progressive_serve, "GROWTH_SECONDS", 0.2)
    pages = progressive_serve.read_local(str(path), memoryview(bytearray(size)), lambda *_: contextlib.nullcontext())
    with pytest.raises(
        progressive_serve.UsageError, match=f"model-stage2.safetensors ends after {size // 2} of {size}"
    ):
        list(pages)


def test_reader_waits_for_files_that_are_still_to_come(copied):
    """cp -r makes one file after the other, in any order; rsync gives them their names at the end."""
    import progressive_serve

    parts = {path: path.read_bytes() for path in copied.glob("*.safetensors")}
    for path in parts:
        path.unlink()
    reading = Reading(copied)
    for path in sorted(parts, reverse=True):
        beginning, rest = parts[path][:100_000], parts[path][100_000:]
        coming = path.with_name(f".{path.name}.x7Qz")
        coming.write_bytes(beginning)
        time.sleep(0.2)
        with open(coming, "ab") as file:
            file.write(rest)
        assert not reading.progress.resident
        coming.rename(path)
    reading.wait_for_all()
    for path, data in parts.items():
        assert reading.bytes_of(path.name) == data
        path.unlink()
    age(copied)
    with pytest.raises(progressive_serve.UsageError, match="model-stage1.safetensors is missing"):
        Reading(copied)


@pytest.mark.parametrize("make_room", [os.posix_fallocate, lambda file, _, size: os.truncate(file, size)])
def test_reader_waits_for_a_file_that_was_given_its_room_first(make_room, copied):
    """Nobody gets the zeros that stand for what has not been copied, and nobody an error."""
    path = copied / "model-stage1.safetensors"
    data = path.read_bytes()
    with open(path, "wb", buffering=0) as file:
        make_room(file.fileno(), 0, len(data))
        reading = Reading(copied)
        for begin in range(0, len(data), len(data) // 20 + 1):
            time.sleep(0.1)
            reading.wait_for(lambda progress: True)
            assert reading.progress.error is None and not reading.progress.read
            file.write(data[begin : begin + len(data) // 20 + 1])
    reading.wait_for_all()
    assert reading.bytes_of(path.name) == data


def test_reader_says_when_a_file_stays_as_it_was_made(copied):
    """Room that was made for a file and never filled: the error comes, if later."""
    path = copied / "model-stage2.safetensors"
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    reading = Reading(copied)
    reading.wait_for(lambda progress: progress.error)
    assert "model-stage2.safetensors: blake3 checksum" in reading.progress.error
    assert reading.progress.resident == {1} and path.name not in reading.progress.read


def test_reader_names_the_file_that_was_replaced(copied, monkeypatch):
    """What it has open will never grow."""
    import progressive_serve

    path = copied / "model-stage2.safetensors"
    whole = path.read_bytes()
    truncate(path)
    place = memoryview(bytearray(len(whole)))
    replaced = threading.Timer(0.2, lambda: (copied / "new").write_bytes(whole) and (copied / "new").rename(path))
    replaced.start()
    with pytest.raises(progressive_serve.UsageError, match="model-stage2.safetensors was replaced"):
        list(progressive_serve.read_local(str(path), place, lambda *_: contextlib.nullcontext()))


def test_reader_names_the_file_that_is_wrong(copied):
    flip_last_byte(copied / "model-stage2.safetensors")
    reading = Reading(copied)
    reading.wait_for(lambda progress: progress.error)
    assert "model-stage2.safetensors: blake3 checksum" in reading.progress.error
    assert reading.progress.resident == {1} and reading.progress.reachable_stage() == 1


def test_reader_names_the_file_that_is_gone(copied):
    """Deleted after the start."""
    reading = Reading(copied, limit_mbps=sum(path.stat().st_size for path in copied.glob("*.safetensors")) / 5e6)
    (copied / "model-stage3.safetensors").unlink()
    reading.wait_for(lambda progress: progress.error)
    assert "model-stage3.safetensors" in reading.progress.error
    assert reading.progress.resident == {1, 2}


def test_garbage_in_a_header_is_a_wrong_checksum(copied):
    """The tensors are bound before the checksum is known: what is told must be the cause, not what followed from it."""
    import progressive_serve

    path = copied / "model-stage1.safetensors"
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"garbage")
    age(copied)
    launch = progressive_serve.start_reading(copied, start=time.monotonic())
    source = progressive_serve.StageSource(launch.loader_config(), launch.plan, rank=0, workers=1)
    with pytest.raises((ValueError, RuntimeError)):
        list(source.tensors(launch.plan.stages[:1]))
    with pytest.raises(RuntimeError, match="model-stage1.safetensors: blake3"):
        source.wait_resident(launch.plan.stages[:1])


def test_memory_goes_back_when_every_worker_is_done(split_tiny):
    reading = Reading(split_tiny)
    reading.buffer.expect(workers=2)
    reading.wait_for_all()
    total = sum(stage.bytes for stage in reading.plan.stages)
    held = reading.memory()
    assert held >= total
    for file in reading.plan.files:
        reading.buffer.release(file, file.bytes, reading.buffer.WORKERS)
    assert reading.memory() == held
    for file in reading.plan.files:
        reading.buffer.release(file, file.bytes, reading.buffer.WORKERS + 1)
    assert reading.memory() <= held - total + 3 * 4096 * len(reading.plan.files)


def test_reader_stays_in_its_window(split_tiny, monkeypatch):
    """On a GPU the host need not hold the whole model: the reader waits for what has been bound."""
    import progressive_serve

    first = progressive_serve.read_plan(split_tiny).stages[0]
    monkeypatch.setattr(progressive_serve, "window_of", lambda plan: first.bytes)
    reading = Reading(split_tiny)
    reading.wait_for(lambda progress: 1 in progress.resident)
    time.sleep(0.5)
    reading.wait_for(lambda progress: True)
    assert reading.progress.resident == {1}
    for file in first.files:
        reading.buffer.release(file, file.bytes, reading.buffer.WORKERS)
    reading.wait_for_all()


def test_reader_keeps_its_pace(monkeypatch):
    """No burst after a pause: what was not read while the reader was held is not made up for."""
    import progressive_serve

    now = [1000.0]
    monkeypatch.setattr(progressive_serve.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progressive_serve.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    pace = progressive_serve.Pace(SimpleNamespace(released=lambda: 0), window=1000, limit=10)

    def seconds_of(begin: int, end: int) -> float:
        before = now[0]
        with pace.turn(0, begin, end):
            return now[0] - before

    assert seconds_of(0, 100) == pytest.approx(10, abs=0.1)
    now[0] += 500  # it was held for long
    assert seconds_of(100, 150) == pytest.approx(5, abs=0.1)


def test_chunks_take_their_turns_in_order():
    """Otherwise the first bytes of a file might be the last to arrive, and nobody could begin with them."""
    import progressive_serve

    pace = progressive_serve.Pace(SimpleNamespace(released=lambda: 0), window=1 << 40, limit=0)
    order = []

    def read(begin: int) -> None:
        with pace.turn(0, begin, begin + 10):
            order.append(begin)

    threads = [threading.Thread(target=read, args=(begin,)) for begin in (40, 20, 30, 10)]
    with pace.turn(0, 0, 10):  # on its way, so the others have to wait: nothing is known of the bandwidth
        for thread in threads:
            thread.start()
        while len(pace.waiting) < len(threads):
            time.sleep(0.01)
    for thread in threads:
        thread.join(30)
    assert order == [10, 20, 30, 40]


# ---- the cache of a remote checkpoint ---------------------------------------------------------------


def small_files(copy: Path) -> Path:
    """The folder of a copy from which the server takes all but the weights."""
    (folder,) = (path for path in copy.iterdir() if path.is_dir())
    return folder


def test_cache_is_filled_and_used(copied, tmp_path):
    add_adapter(copied, 1, ["q_proj"])
    for _ in range(2):
        reading = Reading(copied, cache_dir=tmp_path / "cache")
        reading.wait_for_all()
        assert reading.launch.reader.wait(30) == 0
        (cached,) = (tmp_path / "cache").iterdir()
        assert reading.plan.root == small_files(cached)
        assert {"progressive.json", "config.json", "tokenizer.json"} <= {
            path.name for path in reading.plan.root.iterdir()
        }
        assert {path.name for path in cached.iterdir() if path.is_file()} == {file.name for file in reading.plan.files}
        assert reading.launch.adapters == [1]
        for path in copied.glob("*.safetensors"):
            assert (cached / path.name).read_bytes() == path.read_bytes()
        reading.launch.close()
    for path in copied.glob("*.safetensors"):
        path.unlink()  # the third start can only read the copy
    reading = Reading(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "generation_config.json", "config.json", "adapters/stage1/adapter_config.json"]
)
def test_cache_follows_what_is_mended(name, copied, tmp_path):
    """Also where the weights stay the same; and then these are not fetched again."""
    add_adapter(copied, 1, ["q_proj"])
    earlier = Reading(copied, cache_dir=tmp_path / "cache")
    assert earlier.launch.reader.wait(30) == 0
    before = {path: path.read_bytes() for path in earlier.plan.root.rglob("*") if path.is_file()}
    with open(copied / name, "a") as file:
        file.write(" ")
    for path in copied.glob("*.safetensors"):
        path.unlink()
    reading = Reading(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()
    assert (reading.plan.root / name).read_bytes() == (copied / name).read_bytes()
    assert {path: path.read_bytes() for path in before} == before  # a server may still read there


def test_small_files_that_went_bad_in_the_cache_are_not_served(copied, tmp_path):
    earlier = Reading(copied, cache_dir=tmp_path / "cache")
    assert earlier.launch.reader.wait(30) == 0
    root = earlier.plan.root
    (root / "tokenizer.json").write_bytes(bytes((root / "tokenizer.json").stat().st_size))
    (root / "progressive.json").write_text("")
    (root / "config.json").unlink()
    (root / "chat_template.jinja").write_text("of nobody")
    reading = Reading(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()
    assert reading.plan.root == root
    found = {path.name: path.read_bytes() for path in root.iterdir()}
    assert found == {path.name: path.read_bytes() for path in copied.iterdir() if path.name in found}
    assert {"tokenizer.json", "progressive.json", "config.json"} <= set(found)


def test_cache_survives_being_killed(copied, tmp_path):
    limit = sum(path.stat().st_size for path in copied.glob("*.safetensors")) / 1e6 / 10
    reading = Reading(copied, cache_dir=tmp_path / "cache", limit_mbps=limit)
    reading.wait_for(lambda progress: 1 in progress.resident)
    reading.launch.reader.kill()
    reading.launch.reader.wait()
    (cached,) = (tmp_path / "cache").iterdir()
    assert not (cached / "model-stage3.safetensors").exists()
    (cached / "model-stage3.safetensors.partial").write_bytes(b"half of it")
    reading = Reading(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()
    assert reading.launch.reader.wait(30) == 0
    for path in copied.glob("*.safetensors"):
        assert (cached / path.name).read_bytes() == path.read_bytes()
    assert not list(cached.glob("*.partial"))


def test_copy_that_went_bad_is_removed(copied, tmp_path):
    reading = Reading(copied, cache_dir=tmp_path / "cache")
    assert reading.launch.reader.wait(30) == 0
    (cached,) = (tmp_path / "cache").iterdir()
    flip_last_byte(cached / "model-stage2.safetensors")
    reading = Reading(copied, cache_dir=tmp_path / "cache")
    reading.wait_for(lambda progress: progress.error)
    assert "model-stage2.safetensors" in reading.progress.error and "removed" in reading.progress.error
    assert not (cached / "model-stage2.safetensors").exists()
    truncate(cached / "model-stage3.safetensors")  # that is seen before anything has been read from it
    reading = Reading(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()
    assert reading.launch.reader.wait(30) == 0
    for path in copied.glob("*.safetensors"):
        assert (cached / path.name).read_bytes() == path.read_bytes()


def test_cache_that_cannot_be_written_costs_only_the_copy(copied, tmp_path, monkeypatch):
    import progressive_serve

    plan = progressive_serve.read_plan(copied)
    (file,) = plan.stages[0].files
    journal = progressive_serve.Journal(tmp_path / "journal")
    with open(tmp_path / "memory", "wb"):
        buffer = progressive_serve.WeightBuffer(str(tmp_path / "memory"), plan)
    buffer.open_for(cache=True)
    copy = progressive_serve.CacheCopy(tmp_path, file, buffer, journal)
    with open("/dev/full", "wb", buffering=0) as full:
        copy.partial = SimpleNamespace(write=full.write, close=full.close, name=copy.partial.name)
        copy.write(0, 4096)
    assert full.closed
    assert buffer.marks[buffer.CACHE][0] == 4096  # nobody waits for it
    (event,) = journal.follow()
    assert event["event"] == "not cached" and "space" in event["reason"]
    assert not list(tmp_path.glob("*.partial"))  # and it takes no room


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    """A file system of its own in a new folder, with so little room that it becomes full."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a full disk cannot be made here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


FULL_DISKS = {  # options of tmpfs, and what finds no room
    "no folder": ("nr_inodes=1", ["config.json", "stage1", "stage2", "stage3"]),
    "nothing": ("size=8k", ["config.json", "stage1", "stage2", "stage3"]),
    "the small files": ("size=64k", ["stage1", "stage2", "stage3"]),
    "all but the last stage": ("size=2600k", ["stage3"]),
    "no more files": ("nr_inodes=11", ["stage2", "stage3"]),
}


@pytest.mark.parametrize("room_for", FULL_DISKS)
def test_full_cache_costs_only_the_copy(room_for, copied, tmp_path):
    options, expected = FULL_DISKS[room_for]
    with small_disk(tmp_path / "disk", options) as disk:
        reading = Reading(copied, cache_dir=disk / "cache")
        reading.wait_for_all()

        def told_of(progress) -> list[dict]:
            return [entry for entry in progress.timeline if entry["event"] == "not cached"]

        reading.wait_for(lambda progress: len(told_of(progress)) == len(expected))
        for file in reading.plan.files:
            assert reading.bytes_of(file.name) == (copied / file.name).read_bytes()
        told = told_of(reading.progress)
        assert [re.sub(r"model-|\.safetensors", "", entry["file"]) for entry in told] == expected
        assert all("No space left" in entry["reason"] for entry in told if entry["file"] != "config.json")
        assert (reading.plan.root / "config.json").read_bytes() == (copied / "config.json").read_bytes()
        assert not list(disk.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=1g,nr_inodes=100", disk], check=True)
        reading = Reading(copied, cache_dir=disk / "cache")
        assert reading.launch.reader.wait(30) == 0
        (cached,) = (disk / "cache").iterdir()
        assert reading.plan.root == small_files(cached)
        assert {path.name for path in cached.iterdir() if path.is_file()} == {file.name for file in reading.plan.files}


# ---- object stores ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(split_tiny, tmp_path_factory):
    """URI of the tiny checkpoint in a stand-in for S3 on this machine; credentials are in the environment."""
    pytest.importorskip("runai_model_streamer_s3", reason="runai-model-streamer[s3] is not installed")
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import boto3

    port = free_port()
    values = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",  # the stand-in has no host name per bucket
    }
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
            while store.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.1)
            client = boto3.client("s3")
            client.create_bucket(Bucket="models")
            checkpoint = Path(shutil.copytree(split_tiny, tmp_path_factory.mktemp("bucket") / "checkpoint"))
            add_adapter(checkpoint, 1, ["q_proj"])
            for path in (path for path in checkpoint.rglob("*") if path.is_file()):
                client.upload_file(str(path), "models", f"tiny/{path.relative_to(checkpoint)}")
            yield "s3://models/tiny"
    finally:
        store.kill()
        store.wait()


def test_object_store_is_read_and_cached(bucket, split_tiny, tmp_path):
    for options in ({}, {"cache_dir": tmp_path / "cache"}):
        reading = Reading(bucket, **options)
        reading.wait_for_all()
        assert reading.launch.adapters == [1]
        for file in reading.plan.files:
            assert reading.bytes_of(file.name) == (split_tiny / file.name).read_bytes()
        reading.launch.close()
        reading.launch.reader.wait(30)
    (cached,) = (tmp_path / "cache").iterdir()
    for file in reading.plan.files:
        assert (cached / file.name).read_bytes() == (split_tiny / file.name).read_bytes()


def test_server_on_an_object_store(bucket, split_tiny, tmp_path):
    server = Server(bucket, tmp_path / "log")
    try:
        server.wait_for(server.answers)
        server.wait_for(lambda: server.progress()["stage"] == 3)
        assert [model["id"] for model in requests.get(f"{server.url}/v1/models", timeout=30).json()["data"]] == [bucket]
        assert server.complete("Hello").json()["choices"][0]["text"]
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("uri", ["s3://models/nothing", "s3://nobody/tiny"])
def test_object_store_without_the_checkpoint(bucket, uri, tmp_path):
    done = run_script(SERVER, uri, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 2
    assert uri in done.stderr.strip().splitlines()[-1]
    assert list((tmp_path / "tmp").iterdir()) == []
