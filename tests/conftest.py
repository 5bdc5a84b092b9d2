"""Fixtures that more than one test file needs, and the rules that hold for every test."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import servers  # before whatever imports vLLM: see ENVIRON there
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from servers import LIMIT, ROOT, Held, Process, Standby, Started, age, free_port, processes_of_tests, wait_for
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

SPLIT = ROOT / "prune_and_split.py"
BENCH = ROOT / "bench_coldstart.py"
PROBE = ROOT / "tests" / "engine_probe.py"
sys.path.insert(0, str(ROOT))


# ---- rules -----------------------------------------------------------------------------------------


# Files run one by one on two workers: what takes long begins first, so that neither waits for the other at the end.
LONGEST_FIRST = (
    *("engine", "server", "serve_fleet", "planes", "standby"),
    *("reader", "serve_rooms", "bench_coldstart", "faults", "minimal", "docs"),
)


def pytest_collection_modifyitems(items: list) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))  # stable: else as they were collected


def pytest_runtest_setup(item) -> None:
    servers.may_start = item.get_closest_marker("server") is not None


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left(standby_of_worker):
    """Of what the tests of a file have started nothing stays, whoever is its parent by then."""
    yield

    def left() -> list[psutil.Process]:
        kept = standby_of_worker.processes
        return [process for process in processes_of_tests() if process.pid not in [one.process.pid for one in kept]]

    wait_for(lambda: not left(), told=lambda: f"{left()} stay")


@pytest.fixture(scope="session")
def standby_of_worker(tmp_path_factory):
    """Starts the standby that forks the servers of this worker's tests, when the first of them asks for it."""

    class OfWorker(Started):
        def __call__(self) -> Standby:
            if not self.processes:
                self.add(Standby(self.folder))
            return self.processes[0].wait()

    of_worker = OfWorker(tmp_path_factory.mktemp("standby"), None)
    yield of_worker
    of_worker.end()


@pytest.fixture
def start(tmp_path, standby_of_worker):
    """Starts servers and other scripts, which end with the test: see servers.Started."""
    started = Started(tmp_path, standby_of_worker)
    yield started
    started.end()


@pytest.fixture(scope="module")
def start_for_module(tmp_path_factory, standby_of_worker):
    """The same for all tests of a file."""
    started = Started(tmp_path_factory.mktemp("servers"), standby_of_worker)
    yield started
    started.end()


@pytest.fixture
def hold(tmp_path):
    """Makes copies of checkpoints whose later stages are still to come: see servers.Held."""
    held = []

    def hold(checkpoint: Path, after: int = 1) -> Held:
        folder = tmp_path / f"held{len(held)}"
        folder.mkdir()
        held.append(Held(checkpoint, folder, after))
        return held[-1]

    yield hold
    for one in held:
        one.end()


# ---- scripts ---------------------------------------------------------------------------------------


def run_script(script: Path, *arguments, cwd: Path = ROOT, timeout: float = 300, **env: str):
    """Run one of the scripts as a user would. Returns the finished process, with its output as text."""
    if "TMPDIR" in env:
        Path(env["TMPDIR"]).mkdir(exist_ok=True)
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=timeout, env={**servers.ENVIRON, **env}, check=False
    )


def run_main(module, *arguments, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Like run_script, but in this process, which has the imports already: seconds less a run.

    What a subprocess would have kept to itself is put back: arguments, folder, environment, signal handlers. What is
    neither an exit nor a return reaches the test, so no traceback passes for a refusal. Only what Python prints is
    caught, and nothing of what other processes print.
    """
    before, folder, argv = dict(os.environ), Path.cwd(), sys.argv
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    sys.argv = [module.__file__, *map(str, arguments)]
    os.environ.update(env)
    os.chdir(cwd)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = module.main()
            except SystemExit as end:
                code = end.code
                if isinstance(code, str):  # as Python does at the end of a script
                    print(code, file=sys.stderr)
                    code = 1
    finally:
        command, sys.argv = sys.argv, argv
        os.chdir(folder)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None: no handler of Python's
                signal.signal(number, handler)
    return subprocess.CompletedProcess(command, code or 0, out.getvalue(), err.getvalue())


def run_patched(module, patch: str, *arguments, cwd: Path = ROOT, **env: str):
    """Like run_script, with `patch` executed before main, where `script` is the module: to kill it at a known point."""
    code = f"import signal, sys, {module.__name__} as script\n{patch}\nsys.exit(script.main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**servers.ENVIRON, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def make_llama(folder: Path, model_class=LlamaForCausalLM, dtype=torch.float32, shard_size="5GB", **config) -> Path:
    """A tiny random checkpoint with a byte-level tokenizer, of a shape that vLLM's CPU kernels accept."""
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    config = {**shape, **heads, "initializer_range": 0.2, "eos_token_id": None, "bos_token_id": None, **config}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    vocab = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"<{number}>": number for number in range(len(vocab), config["vocab_size"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def split_tiny(tmp_path_factory) -> Path:
    """A tiny random progressive checkpoint: 4 layers, of which stages 2 and 3 add 1 and 2."""
    folder = tmp_path_factory.mktemp("tiny")
    done = run_script(SPLIT, make_llama(folder / "model"), folder / "checkpoint", "--layers", "1-2")
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint"


@pytest.fixture
def copied(split_tiny, tmp_path) -> Path:
    """A copy of the tiny checkpoint, made long ago, to be spoilt."""
    return age(Path(shutil.copytree(split_tiny, tmp_path / "copied")))


def split_planes(model: Path, out: Path, *options) -> subprocess.CompletedProcess:
    done = run_script(SPLIT, model, out, "--planes", *options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def planes_tiny(tmp_path_factory) -> Path:
    """A tiny random checkpoint of planes; what it was made from lies beside it."""
    folder = tmp_path_factory.mktemp("planes")
    split_planes(make_llama(folder / "model", dtype=torch.bfloat16), folder / "checkpoint")
    return folder / "checkpoint"


class PassLayer(torch.nn.Module):
    """What a missing layer is."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def add_side_files(folder: Path) -> list[str]:
    """What a model may bring along beside its weights, in folders, too; among what does not belong to it. Names."""
    names = ["additional_chat_templates/tool_use.jinja", "tokenization_x.py", "spiece.vocab", "LICENSE"]
    for name in (*names, ".cache/notes.txt", "original/consolidated.00.pth", "pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return names


def edit_config(checkpoint: Path, **values) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **values}))


def load_stage(checkpoint: Path, stage: int, dtype=torch.float32):
    """The model of a stage in plain transformers: PassLayers in place of what the later stages add."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    manifest = json.loads((checkpoint / "progressive.json").read_text())
    for row in manifest["stages"][stage:]:
        for layer in row["layers"]:
            model.model.layers[layer] = PassLayer()
    return model


def add_adapter(
    checkpoint: Path, stage: int, targets: list[str] | str, rank: int = 4, folder: str = "", source: Path | None = None
) -> Path:
    """A random LoRA for a stage, made and saved by PEFT, that changes what the stage answers.

    source: the same checkpoint with all of its files, where this one is held.
    """
    torch.manual_seed(stage)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    path = checkpoint / "adapters" / (folder or f"stage{stage}")
    get_peft_model(load_stage(source or checkpoint, stage), config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory) -> Path:
    """The trained demo model as a progressive checkpoint, which `make test` makes; without `make demo`'s adapters."""
    folder = ROOT / "demo" / "checkpoint"
    if not (folder / "progressive.json").is_file():
        pytest.skip("demo/checkpoint is not there: make demo/checkpoint/progressive.json")
    copy = tmp_path_factory.mktemp("demo") / "checkpoint"
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("adapters")))


@pytest.fixture(scope="session")
def adapted_checkpoint(demo_checkpoint, tmp_path_factory) -> Path:
    """The demo checkpoint with a random adapter for stage 1, and another one, on every linear layer, for stage 2."""
    copy = Path(shutil.copytree(demo_checkpoint, tmp_path_factory.mktemp("adapted") / "checkpoint"))
    add_adapter(copy, 1, ["q_proj", "v_proj"])
    add_adapter(copy, 2, "all-linear")
    return copy


@pytest.fixture
def short_tmp():
    """A temporary folder whose path is short enough for the sockets of Ray and vLLM."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


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
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache")),
    }
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
                patch.setitem(servers.ENVIRON, name, value)
            wait_for(lambda: store.poll() is not None or socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            client = boto3.client("s3")
            client.create_bucket(Bucket="models")
            checkpoint = Path(shutil.copytree(split_tiny, tmp_path_factory.mktemp("bucket") / "checkpoint"))
            add_adapter(checkpoint, 1, ["q_proj"])
            add_side_files(checkpoint)
            for path in (path for path in checkpoint.rglob("*") if path.is_file()):
                client.upload_file(str(path), "models", f"tiny/{path.relative_to(checkpoint)}")
            yield "s3://models/tiny"
    finally:
        store.kill()
        store.wait()


# ---- a reader process, and what it reads -----------------------------------------------------------


class Reading:
    """A reader process on a checkpoint, and its journal."""

    def __init__(self, checkpoint: Path, **options):
        import progressive_serve

        self.launch = progressive_serve.start_reading(checkpoint, start=time.monotonic(), **options)
        self.plan = self.launch.plan
        self.buffer = progressive_serve.WeightBuffer(self.launch.serving.buffer, self.plan)
        self.progress = progressive_serve.Progress(self.plan, serving=self.launch.serving)

    def wait_for(self, what) -> None:
        def holds():
            self.progress.fold(self.launch.journal.follow())
            return what(self.progress)

        wait_for(holds, told=lambda: self.progress)

    def wait_for_all(self) -> None:
        self.wait_for(lambda progress: progress.errors or len(progress.resident) == self.plan.num_stages)
        assert self.progress.error is None

    def bytes_of(self, name: str) -> bytes:
        return bytes(self.buffer.place_of(name))

    def memory(self) -> int:
        """Bytes that the buffer holds now."""
        return os.stat(self.launch.serving.buffer).st_blocks * 512


@pytest.fixture
def read():
    """Begins to read a checkpoint; the reader processes end with the test."""
    readings = []

    def read(checkpoint: Path, **options) -> Reading:
        readings.append(Reading(checkpoint, **options))
        return readings[-1]

    yield read
    for reading in readings:
        reading.launch.close()
        reading.launch.reader.wait(300)


# ---- what the controller is given --------------------------------------------------------------------


def serving_plan(journal: Path | str, hold_stage: int = 3, min_stage: int = 1, **others):
    import progressive_serve

    return progressive_serve.ServingPlan(str(journal), "", hold_stage, min_stage, hold_stage, **others)


def engine_config(checkpoint: Path, journal: Path, **stages) -> SimpleNamespace:
    """What the controller reads of vLLM's configuration."""
    return SimpleNamespace(
        load_config=SimpleNamespace(
            load_format="progressive", model_loader_extra_config=asdict(serving_plan(journal, **stages))
        ),
        model_config=SimpleNamespace(model=checkpoint),
        compilation_config=SimpleNamespace(mode=None, cudagraph_mode=None),
    )


# ---- engines ---------------------------------------------------------------------------------------


class Probe(Process):
    """engine_probe.py, which is asked for one job after another."""

    def __init__(self, folder: Path):
        servers.check_may_start()
        self.folder, self.found = folder, {}
        # Compiled graphs of stock vLLM are shared by the jobs of a process, and by no others.
        cache = {"VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_DISABLE_COMPILE_CACHE": "0"}
        counted = {"TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE": "1"}  # kernels have names that the profiler sees
        super().__init__(folder / "log", PROBE, folder, env=cache | counted, stdin=subprocess.PIPE, text=True)

    def __call__(self, do: str, **job):
        """What the job has found; the same job is done once."""
        line = json.dumps({"do": do, **job}, default=str) + "\n"
        if line not in self.found:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            self.found[line] = answer = self.folder / f"{len(self.found) + 1}.json"
            self.wait_for(answer.exists, 3 * LIMIT)  # compiling is the longest, where everybody else computes, too
            print(f"{do}: {json.loads(answer.read_text())['seconds']} s")
        answer = json.loads(self.found[line].read_text())
        assert "error" not in answer, answer["error"] + self.tail()
        return answer["found"]

    def stop(self) -> int:
        self.process.stdin.close()
        return self.process.wait(LIMIT)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """A process that does jobs with engines for all tests of a file: probe("brief", checkpoint=..., ...)."""
    process = Probe(tmp_path_factory.mktemp("probe"))
    yield process
    process.end()


# ---- the demo model --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prompts(demo_checkpoint) -> list[str]:
    facts = json.loads((ROOT / "demo/model/facts/validation.json").read_text())["Data"]
    return [f"Question: {fact['Question']}\nAnswer:" for fact in facts[:64]]


@pytest.fixture(scope="session")
def demo_planes(demo_checkpoint, tmp_path_factory) -> Path:
    """The demo model in stages of planes."""
    folder = tmp_path_factory.mktemp("planes") / "checkpoint"
    split_planes(ROOT / "demo" / "model", folder)
    return folder


def greedy(model, ids: torch.Tensor, length: int) -> list[int]:
    """Greedy tokens after `ids` [1, length] in plain transformers; end-of-sequence is a token like any other."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        whole = torch.ones_like(ids)  # generate() would take the padding token for none
        out = model.generate(ids, attention_mask=whole, max_new_tokens=length, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def stage_answers(checkpoint: Path, stage: int, prompts: list[str], adapter: Path | None = None) -> list[list[int]]:
    """12 greedy tokens of plain transformers in float32, with PassLayers for what is missing, and PEFT's adapter."""
    model = load_stage(checkpoint, stage)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [greedy(model, tokenizer(prompt, return_tensors="pt").input_ids, 12) for prompt in prompts]


@pytest.fixture(scope="session")
def demo_answers(demo_checkpoint, prompts) -> dict[int, list[list[int]]]:
    """Stage -> what the demo model answers to 8 prompts there, in float32, by transformers."""
    return {stage: stage_answers(demo_checkpoint, stage, prompts[:8]) for stage in (1, 3)}
