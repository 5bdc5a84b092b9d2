"""Graphs of a GPU that are captured after the first token, tested on a CPU.

vLLM's manager of graphs (runner V2) is the real one; CUDA and the forward pass are not there.
No engine. About ten seconds, half of which is importing vLLM.
"""

import asyncio
import contextlib
import functools
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import engine_config
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, LoadConfig, VllmConfig

GIB = 1 << 30
MIB = 1 << 20
GPU = SimpleNamespace(is_cpu=lambda: False, device_type="cuda", device_name="cuda")
SIZES = [1, 2, 4, 8]
MAX_NUM_SEQS = 4
# Size and mode, in the order in which they are to be captured: decode graphs end at MAX_NUM_SEQS.
ORDER = [
    (8, "PIECEWISE"), (4, "PIECEWISE"), (4, "FULL"), (2, "PIECEWISE"), (2, "FULL"), (1, "PIECEWISE"), (1, "FULL"),
]  # fmt: skip


class Device:
    """torch.cuda's account of its memory, in bytes: `free` of the driver, `held` by torch without use."""

    def __init__(self, monkeypatch, free: int, held: int = 0, allocated: int = 0, peak: int = 0):
        self.free, self.held, self.allocated, self.peak = free, held, allocated, peak
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (self.free, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: self.allocated + self.held)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


class Graph:
    pass


class Runner:
    """vLLM's runner V2, as far as it is met here: a real manager, and a capture in which only CUDA is missing."""

    def __init__(self, monkeypatch, mode=CUDAGraphMode.FULL_AND_PIECEWISE, takes=10 * MIB):
        from vllm.v1.worker.gpu import cudagraph_utils

        group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
        monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
        monkeypatch.setattr(cudagraph_utils, "is_global_first_rank", lambda: False)
        monkeypatch.setattr(cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: "pool"))
        for name in ("graph_capture", "capture_pool", "current_stream"):  # vLLM 0.26 has the first one alone
            monkeypatch.setattr(cudagraph_utils, name, lambda *args, **kwargs: contextlib.nullcontext(), raising=False)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: contextlib.nullcontext())
        self.compilation_config = SimpleNamespace(
            cudagraph_mode=mode, cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1]
        )
        self.vllm_config = SimpleNamespace(
            compilation_config=self.compilation_config,
            scheduler_config=SimpleNamespace(max_num_seqs=MAX_NUM_SEQS),
            parallel_config=SimpleNamespace(data_parallel_size=1, tensor_parallel_size=1),
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
            speculative_config=None,
        )
        self.device, self.decode_query_len, self.max_num_tokens = torch.device("cpu"), 1, 64
        self.manager_class = cudagraph_utils.CudaGraphManager
        self.cudagraph_manager = self.manager_class(self.vllm_config, self.device, mode, self.decode_query_len)
        layers = [torch.nn.Linear(8, 8) for _ in range(3)]
        self.model = SimpleNamespace(model=SimpleNamespace(layers=layers), later_capture=None)
        self.takes, self.fails_at, self.run = takes, None, []

    def get_model(self):
        return self.model

    def capture_model(self) -> int:
        def create_forward_fn(desc, warmup):
            def forward(mode):
                self.run.append((desc.num_tokens, desc.cg_mode.name, mode.name))
                if (desc.num_tokens, desc.cg_mode.name) == self.fails_at and not warmup:
                    raise RuntimeError("CUDA error: out of memory")

            return forward

        self.manager_class.capture(self.cudagraph_manager, create_forward_fn)
        return self.takes

    def dispatched(self, num_tokens: int, decode: bool) -> str:
        """By which graph vLLM would run so many tokens, of as many requests where they decode, else of one."""
        reqs, each = (num_tokens, 1) if decode else (1, num_tokens)
        desc = self.cudagraph_manager.dispatch(reqs, num_tokens, each, 0)
        return desc.cg_mode.name if desc.cg_mode == CUDAGraphMode.NONE else f"{desc.cg_mode.name} {desc.num_tokens}"


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """No second for the first tokens, which nobody waits for here."""
    import progressive_serve

    monkeypatch.setattr(progressive_serve, "FIRST_TOKENS_SECONDS", 0)


@pytest.fixture
def runner(monkeypatch):
    return Runner(monkeypatch)


@pytest.fixture
def worker(runner, monkeypatch):
    """A worker whose model is compiled, and whose graphs are to be captured."""
    import progressive_serve

    Device(monkeypatch, free=4 * GIB)
    monkeypatch.setattr(progressive_serve.gc, "freeze", lambda: None)
    monkeypatch.setattr(progressive_serve.gc, "collect", lambda: None)  # half a second: of all that is imported
    runner.model.later_capture = progressive_serve.LaterCapture()
    binding = SimpleNamespace(remove_gates=lambda: None)
    vars(runner.model).update(binding=binding, later_compilation=SimpleNamespace(begin=lambda runner: None))
    worker = progressive_serve.WorkerExtension()
    worker.model_runner = runner
    assert worker.progressive_compile() is None
    return worker


# ---- capture (worker) --------------------------------------------------------------------------------


def test_one_graph_at_a_time_the_largest_first(worker, runner):
    """A batch runs without a graph until there is one of its own, and then by that which a stock server would take."""
    stock = runner.manager_class(runner.vllm_config, runner.device, CUDAGraphMode.FULL_AND_PIECEWISE, 1)
    stock._graphs_captured = True
    every_key = set(stock._candidates)
    assert worker.progressive_graphs() == len(ORDER)
    assert {runner.dispatched(size, decode) for size in SIZES for decode in (True, False)} == {"NONE"}
    for number, (size, mode) in enumerate(ORDER, 1):
        runner.run.clear()
        assert worker.progressive_capture() == {"size": size, "mode": mode}
        assert {(tokens, of) for tokens, of, _ in runner.run} == {(size, mode)}
        captured = {f"{mode} {size}" for size, mode in ORDER[:number]} | {"NONE"}
        for tokens in range(1, SIZES[-1] + 1):
            for decode in (True, False):
                assert runner.dispatched(tokens, decode) in captured
        assert runner.dispatched(16, False) == "NONE"
    assert set(runner.cudagraph_manager._candidates) == every_key
    for tokens in range(1, SIZES[-1] + 1):
        for reqs, each in ((tokens, 1), (1, tokens)):
            assert runner.cudagraph_manager.dispatch(reqs, tokens, each, 0) == stock.dispatch(reqs, tokens, each, 0)


def test_what_is_captured_is_used_before_the_rest_is(worker, runner):
    for _ in range(3):
        worker.progressive_capture()
    assert runner.dispatched(4, decode=True) == "FULL 4"
    assert runner.dispatched(3, decode=False) == "PIECEWISE 4"
    assert runner.dispatched(2, decode=True) == runner.dispatched(2, decode=False) == "NONE"


MEMORY = {
    # free, held, activations, bytes taken before -> whether it is captured
    "enough": (GIB, 0, 512 * MIB, [100 * MIB], True),
    "not beside a step": (GIB, 0, 800 * MIB, [100 * MIB], False),
    "held by torch for steps": (GIB, 400 * MIB, 800 * MIB, [100 * MIB], True),
    "held by torch, more than steps need": (300 * MIB, GIB, 800 * MIB, [100 * MIB], False),
    "the largest of the last ones": (GIB, 0, 0, [900 * MIB, *7 * [MIB]], False),
    "not one long ago": (GIB, 0, 0, [900 * MIB, *8 * [MIB]], True),
    "the first, as much as a step": (GIB, 0, 400 * MIB, [], False),
    "the first": (GIB, 0, 300 * MIB, [], True),
    "a margin stays": (255 * MIB, 0, 0, [0], False),
}


@pytest.mark.parametrize("case", MEMORY)
def test_no_capture_where_memory_may_run_out(case, worker, runner, monkeypatch):
    import progressive_serve

    free, held, activations, taken, captured = MEMORY[case]
    worker.progressive_capture()
    Device(monkeypatch, free, held)
    later = runner.model.later_capture
    later.activations, later.taken = activations, list(taken)
    runner.run.clear()
    graph = worker.progressive_capture()
    assert bool(runner.run) is captured
    if captured:
        assert graph == {"size": 4, "mode": "PIECEWISE"}
        assert later.taken[-1] == runner.takes
    else:
        assert graph["graphs"] == 1 and "--gpu-memory-utilization" in graph["reason"]
        needed = max(taken[-8:], default=activations) + progressive_serve.CAPTURE_MARGIN
        assert f"{needed / GIB:.2f} GiB" in graph["reason"]
        assert runner.dispatched(8, decode=False) == "PIECEWISE 8"  # what there is stays in use


def test_no_graph_is_used_after_a_capture_that_has_failed(worker, runner):
    runner.fails_at = (2, "FULL")
    for _ in range(4):
        assert "reason" not in worker.progressive_capture()
    assert runner.dispatched(4, decode=True) == "FULL 4"
    assert worker.progressive_capture() == {"reason": "RuntimeError('CUDA error: out of memory')", "graphs": 0}
    assert {runner.dispatched(size, decode) for size in SIZES for decode in (True, False)} == {"NONE"}
    assert not runner.cudagraph_manager.graphs


def test_model_that_does_not_compile_captures_nothing(runner, monkeypatch):
    import progressive_serve

    def begin(runner):
        raise RuntimeError("no artifact")

    runner.model.later_capture = progressive_serve.LaterCapture()
    binding = SimpleNamespace(remove_gates=lambda: None)
    vars(runner.model).update(binding=binding, later_compilation=SimpleNamespace(begin=begin))
    worker = progressive_serve.WorkerExtension()
    worker.model_runner = runner
    assert worker.progressive_compile() == "RuntimeError('no artifact')"
    assert {runner.dispatched(size, decode) for size in SIZES for decode in (True, False)} == {"NONE"}


# ---- the start (worker) ------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_room", [True, False])
@pytest.mark.parametrize("later", [True, False])
def test_start_captures_nothing_and_keeps_room(later, keeps_room, runner, monkeypatch):
    """Of another engine in this process everything stays as it is."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    import progressive_serve

    def profile_run(runner, randomize_inputs=False):
        device.peak = 5 * GIB

    device = Device(monkeypatch, free=GIB, allocated=3 * GIB)
    monkeypatch.setattr(GPUModelRunner, "profile_run", profile_run)
    monkeypatch.setattr(GPUModelRunner, "profile_cudagraph_memory", lambda runner: 7)
    monkeypatch.setattr(GPUModelRunner, "capture_model", lambda runner: 8)
    monkeypatch.setattr(progressive_serve, "keeps_room_for_graphs", lambda: keeps_room)
    progressive_serve.postpone_capture()
    capture = runner.model.later_capture = progressive_serve.LaterCapture() if later else None
    estimate = len(ORDER) * len(runner.model.model.layers) * progressive_serve.GRAPH_LAYER_BYTES
    manager, runner.cudagraph_manager = runner.cudagraph_manager, None  # there is none before the KV cache
    GPUModelRunner.profile_run(runner, randomize_inputs=True)
    room = GPUModelRunner.profile_cudagraph_memory(runner)
    assert room == ((estimate if keeps_room else 0) if later else 7)
    runner.cudagraph_manager = manager
    assert GPUModelRunner.capture_model(runner) == (estimate if later else 8)
    if later:
        assert capture.activations == 2 * GIB
        capture.begin(runner)
        assert GPUModelRunner.capture_model(runner) == 8  # now it is time


def test_room_is_kept_where_stock_keeps_some(monkeypatch):
    from vllm.v1.worker.gpu import cudagraph_utils

    import progressive_serve

    assert progressive_serve.keeps_room_for_graphs()  # vLLM 0.32
    monkeypatch.delattr(cudagraph_utils, "profile_cudagraph_memory")
    assert not progressive_serve.keeps_room_for_graphs()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_compiled_model_is_tried_as_vllm_profiles_it(on_gpu, monkeypatch):
    """On a GPU at its largest step, for which the kernels are tuned."""
    import progressive_serve

    runs = []
    runner = SimpleNamespace(max_num_tokens=64, _dummy_run=lambda *args, **kwargs: runs.append((args, kwargs)))
    if on_gpu:
        monkeypatch.setattr(progressive_serve, "current_platform", GPU)
    progressive_serve.try_compiled(runner)
    assert runs == [((64,), {"skip_attn": True, "is_profile": True}) if on_gpu else ((1,), {"is_profile": True})]


# ---- the compiler process ----------------------------------------------------------------------------


@pytest.mark.parametrize("context", [True, False])
def test_weights_of_the_compiler_lie_in_one_place(context):
    import progressive_serve

    shapes = [(16, 4), (8, 4), (16, 16), (3, 5)]
    place = {} if context else {"device": "cpu"}
    with progressive_serve.SharedPlace("cpu"), torch.device("cpu") if context else contextlib.nullcontext():
        weights = [torch.empty(*shape, dtype=torch.bfloat16, **place) for shape in shapes]
        elsewhere = [torch.empty(4, device="meta")]
    with progressive_serve.SharedPlace("cpu"), torch.device("meta"):
        elsewhere.append(torch.empty(4))
    for weight, shape in zip(weights, shapes, strict=True):
        assert weight.shape == shape and weight.is_contiguous() and weight.dtype == torch.bfloat16
        assert weight._base is None
    assert [tensor.device.type for tensor in elsewhere] == ["meta", "meta"]
    assert len({weight.data_ptr() for weight in weights}) == 2  # the third needed a larger place
    assert len({weight.untyped_storage()._cdata for weight in weights}) == 4
    sizes = [weight.nbytes for weight in weights]
    assert progressive_serve.SharedPlace.bytes_for(sizes) == 2 * (16 * 4 + 16 * 16)


def test_shared_weights_make_the_graph_of_separate_ones():
    """torch sees separate inputs, also where the graph writes one."""
    import progressive_serve

    def made() -> list:
        return [torch.empty(8, 8) for _ in range(3)]

    def compute(hidden_states, first, second, scratch):
        scratch.copy_(hidden_states @ first)
        return scratch @ second

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    for mode in (progressive_serve.SharedPlace("cpu"), contextlib.nullcontext()):
        with mode, torch.device("cpu"):
            weights = made()
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(compute, backend=backend, fullgraph=True)
            compiled(torch.ones(2, 8), weights[0], weights[1], torch.empty(2, 8))
    assert len(graphs) == 2 and graphs[0] == graphs[1]


def test_compiler_is_not_started_where_the_gpu_has_no_room(runner, monkeypatch):
    import progressive_serve

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(1000, 8)
            self.model = torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 100, bias=False)})

    model = runner.model = Model()
    model.later_capture = progressive_serve.LaterCapture()
    model.later_capture.activations = GIB
    cache = torch.zeros(1000)
    runner.kv_caches = [cache[:500], cache[500:]]  # views of one allocation
    monkeypatch.setattr(progressive_serve, "linears", lambda model: [model.linear])
    weights, kv_cache, rest = 4 * (1000 * 8 + 100 * 8), 4 * 1000, 12345
    kernels = progressive_serve.COMPILER_TENSORS * runner.max_num_tokens * 100 * 4
    needed = progressive_serve.COMPILER_CONTEXT + rest + 4 * 1000 * 8 + kernels
    device = Device(monkeypatch, free=needed + GIB, allocated=weights + kv_cache + rest)
    assert progressive_serve.compiler_device_bytes(runner) == needed
    assert progressive_serve.why_no_room_to_compile(runner) is None
    device.free -= 1
    assert f"compiling needs {needed / GIB:.1f} GiB of the GPU" in progressive_serve.why_no_room_to_compile(runner)
    model.later_capture = None  # on a CPU
    assert progressive_serve.why_no_room_to_compile(runner) is None


# ---- controller --------------------------------------------------------------------------------------


class Engine:
    """Of a server whose model is compiled, or would be; `graphs` is what each capture returns."""

    errored = False

    def __init__(self, checkpoint, journal, graphs, missing=None):
        self.vllm_config = engine_config(checkpoint, journal)
        self.output_processor = SimpleNamespace(request_states={})
        self.graphs, self.missing, self.calls = graphs, missing, []

    async def pause_generation(self, mode, clear_cache):
        assert mode == "keep"
        self.calls.append("pause, recompute" if clear_cache else "pause")

    async def resume_generation(self):
        self.calls.append("resume")

    async def collective_rpc(self, name, args=()):
        self.calls.append(name.removeprefix("progressive_"))
        return [await self.answer(name)]

    async def answer(self, name):
        if name == "progressive_compiled":
            return self.missing
        if name == "progressive_graphs":
            return None if self.graphs is None else len(self.graphs)
        if name != "progressive_capture":
            return None
        graph = self.graphs[self.calls.count("capture") - 1]
        if isinstance(graph, Exception):
            raise graph
        return graph


GRAPHS = [{"size": 8, "mode": "PIECEWISE"}, {"size": 4, "mode": "FULL"}, {"size": 2, "mode": "FULL"}]
CAPTURES = {
    # what the captures return -> captured in the end, why no more
    "all": (GRAPHS, [8, 4, 2], None),
    "no memory": ([*GRAPHS[:2], {"reason": "no memory", "graphs": 2}], [8, 4], "no memory"),
    "a failed capture": ([*GRAPHS[:2], {"reason": "CUDA error", "graphs": 0}], [], "CUDA error"),
    "a failed call": ([GRAPHS[0], RuntimeError("no answer"), GRAPHS[2]], [8], "RuntimeError('no answer')"),
    "a CPU": (None, None, None),
}


@pytest.mark.parametrize("case", CAPTURES)
def test_graphs_are_captured_in_a_pause_each(case, split_tiny, tmp_path):
    import progressive_serve

    graphs, captured, reason = CAPTURES[case]
    engine = Engine(split_tiny, tmp_path / "journal", graphs)
    controller = progressive_serve.Controller(engine)
    controller.journal.mark("start")
    asyncio.run(controller.optimize())
    tried = 2 if case == "a failed call" else len(graphs or [])
    one = ["pause", "capture", "resume"]
    assert engine.calls == ["compiled", "pause, recompute", "compile", "resume", "graphs", *tried * one]
    progress = controller.progress.as_dict()
    assert progress["optimized"] == "compiled" and progress["not_optimized"] == reason
    assert progress["num_graphs"] == (None if graphs is None else 3)
    assert captured == (progress["captured"] and [graph["size"] for graph in progress["captured"]])
    if captured:
        assert progress["captured"][0].keys() == {"size", "mode", "seconds"}
    events = [event["event"] for event in controller.progress.timeline]
    ends = ["captured" if graph in GRAPHS else "not captured" for graph in (graphs or [])[:tried]]
    assert events == ["start", "compiled", *ends]


def test_progress_before_and_while_compiling(split_tiny, tmp_path):
    import progressive_serve

    controller = progressive_serve.Controller(Engine(split_tiny, tmp_path / "journal", []))
    for event, optimized in (("start", "eager"), ("compiling", "compiling")):
        controller.journal.mark(event)
        controller.update()
        progress = controller.progress.as_dict()
        assert (progress["optimized"], progress["captured"], progress["num_graphs"]) == (optimized, None, None)


def test_no_room_on_the_gpu_starts_no_compiler(split_tiny, tmp_path, monkeypatch):
    import progressive_serve

    monkeypatch.setattr(progressive_serve, "Compiler", None)
    missing = {"config": b"", "threads": 1, "no_room": "compiling needs 5.0 GiB of the GPU"}
    engine = Engine(split_tiny, tmp_path / "journal", GRAPHS, missing)
    controller = progressive_serve.Controller(engine)
    controller.journal.mark("start")
    asyncio.run(controller.optimize())
    progress = controller.progress.as_dict()
    assert progress["optimized"] == "eager" and "5.0 GiB" in progress["not_optimized"]
    assert engine.calls == ["compiled"]


def test_capture_waits_for_an_idle_moment_and_not_for_ever(split_tiny, tmp_path, monkeypatch):
    import progressive_serve

    engine = Engine(split_tiny, tmp_path / "journal", 2 * GRAPHS)
    controller = progressive_serve.Controller(engine)

    async def capture(idle_seconds: float, answering: int, then_idle: bool = False) -> None:
        monkeypatch.setattr(progressive_serve, "IDLE_SECONDS", idle_seconds)
        controller.answering = answering
        captures = asyncio.create_task(controller.capture(1))
        if then_idle:
            for _ in range(20):
                await asyncio.sleep(0)
            assert engine.calls == []
            controller.answering = 0
        await asyncio.wait_for(captures, 60)
        assert engine.calls == ["pause", "capture", "resume"]
        engine.calls.clear()
        engine.graphs.pop(0)

    asyncio.run(capture(3600, answering=0))
    asyncio.run(capture(3600, answering=1, then_idle=True))
    asyncio.run(capture(0.2, answering=1))


# ---- Python ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["all", "no memory"])
def test_llm_captures_as_the_server_does(case, split_tiny, tmp_path, monkeypatch):
    import progressive_serve

    graphs, captured, reason = CAPTURES[case]
    engine = Engine(split_tiny, tmp_path / "journal", graphs)

    def call(name):
        return asyncio.run(engine.collective_rpc(name))

    def pause(llm, clear_cache=True):
        asyncio.run(engine.pause_generation("keep", clear_cache))

    monkeypatch.setattr(progressive_serve, "pause_engine", pause)
    monkeypatch.setattr(progressive_serve, "resume_engine", lambda llm: asyncio.run(engine.resume_generation()))
    stages = object.__new__(progressive_serve.StageControl)
    stages.llm, stages.journal = SimpleNamespace(collective_rpc=call), progressive_serve.Journal(tmp_path / "journal")
    plan = progressive_serve.read_plan(split_tiny)
    stages.followed = progressive_serve.Progress(plan, serving=progressive_serve.ServingPlan.of(engine.vllm_config))
    with pytest.raises(RuntimeError, match=reason) if reason else contextlib.nullcontext():
        stages.optimize()
    one = ["pause", "capture", "resume"]
    assert engine.calls == ["compiled", "pause, recompute", "compile", "resume", "graphs", *3 * one]
    progress = stages.progress()
    assert [graph["size"] for graph in progress["captured"]] == captured and progress["not_optimized"] == reason


# ---- options -----------------------------------------------------------------------------------------

OPTIONS = {
    # what is asked for, vLLM's options -> whether it compiles later, or what is named
    "nobody says": (None, {}, False),
    "asked for": (True, {}, True),
    "refused by the user": (False, {}, False),
    "eager": (None, {"enforce_eager": True}, False),
    "eager, and asked for": (True, {"enforce_eager": True}, "--enforce-eager"),
    "several workers, nobody says": (None, {"tensor_parallel_size": 2}, False),
    "several workers": (True, {"tensor_parallel_size": 2}, "--tensor-parallel-size 2: leave it out"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_on_a_gpu_only_where_it_is_asked_for(case, monkeypatch):
    import progressive_serve

    wanted, options, expected = OPTIONS[case]
    monkeypatch.setattr(progressive_serve, "current_platform", GPU)
    choose = functools.partial(progressive_serve.choose_compile_later, wanted, options)
    if isinstance(expected, str):
        with pytest.raises(progressive_serve.UsageError, match=expected):
            choose()
    else:
        assert choose() is expected


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("is_v2", [True, False])
def test_model_runner_v1_is_refused(is_v2, later, split_tiny, tmp_path, monkeypatch):
    import progressive_serve

    seen = []
    platform = SimpleNamespace(**vars(GPU), check_and_update_config=seen.append)
    monkeypatch.setattr(progressive_serve, "current_platform", platform)
    progressive_serve.refuse_runner_v1()
    config = engine_config(split_tiny, tmp_path / "journal")
    config.load_config.model_loader_extra_config["compile_later"] = later
    config.compilation_config.mode, config.use_v2_model_runner = CompilationMode.VLLM_COMPILE, is_v2
    refused = pytest.raises(progressive_serve.UsageError, match="runner V2.*VLLM_USE_V2_MODEL_RUNNER")
    with refused if later and not is_v2 else contextlib.nullcontext():
        platform.check_and_update_config(config)
    assert seen == [config]  # vLLM's own check comes first


def test_refusal_comes_through_vllms_configuration(split_tiny, tmp_path, monkeypatch):
    """As it is, and not as an error of validation. vLLM takes V1 on a CPU."""
    import progressive_serve

    platform = progressive_serve.current_platform
    monkeypatch.setattr(platform, "check_and_update_config", platform.check_and_update_config)
    progressive_serve.refuse_runner_v1()
    serving = engine_config(split_tiny, tmp_path / "journal").load_config.model_loader_extra_config
    load_config = LoadConfig(load_format="progressive", model_loader_extra_config={**serving, "compile_later": True})
    with pytest.raises(progressive_serve.UsageError, match="vLLM takes V1 here"):
        VllmConfig(load_config=load_config, compilation_config=CompilationConfig(mode=CompilationMode.VLLM_COMPILE))


@pytest.mark.parametrize("later", [True, False])
def test_gpu_engine_looks_at_its_runner(later, split_tiny, monkeypatch):
    import progressive_serve

    looked = []
    monkeypatch.setattr(progressive_serve, "current_platform", GPU)
    monkeypatch.setattr(progressive_serve, "refuse_runner_v1", lambda: looked.append(True))
    launch = progressive_serve.start_reading(split_tiny, start=time.monotonic())
    try:
        launch.serving = progressive_serve.replace(launch.serving, compile_later=later)
        progressive_serve.engine_options(launch, {})
    finally:
        launch.close()
    assert bool(looked) is later
