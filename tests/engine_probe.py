"""What engines do, found out for the tests: a process that does one job after another, each with engines inside it.

    python engine_probe.py OUT < JOBS    # JOBS: a line of JSON each; answers: OUT/1.json, OUT/2.json ...

Importing takes seconds and an engine less than one, so that all tests of a file share one such process. A job is
{"do": NAME, ...}, with the arguments of probe_NAME(). What an engine has said to a prompt is {"tokens": [...],
"logprobs": [[...], ...]} (the logprobs of the three most likely tokens at each place).
"""

import contextlib
import functools
import gc
import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from torch._dynamo.utils import counters
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.engine.exceptions import EngineDeadError

import progressive_serve

ENGINE = {"max_model_len": 1024, "max_num_seqs": 64, "kv_cache_memory_bytes": 256 << 20, "seed": 0}
ANSWER_TOKENS = 12
FLIGHT_TOKENS = 96
START_READING = progressive_serve.start_reading

# vLLM collects garbage nine times per engine: two thirds of an engine's time, if of all that is imported, which it
# unfreezes as often. What an engine has made is never frozen here, so that it goes when the engine does.
gc.freeze()
gc.freeze = gc.unfreeze = lambda: None


def sampling(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=3, ignore_eos=True)


def answer_of(output) -> dict:
    completion = output.outputs[0]
    logprobs = [[entry.logprob for entry in place.values()] for place in completion.logprobs]
    return {"tokens": list(completion.token_ids), "logprobs": logprobs}


def ask(llm: LLM, prompts: list, tokens: int = ANSWER_TOKENS) -> list[dict]:
    return [answer_of(output) for output in llm.generate(prompts, sampling(tokens), use_tqdm=False)]


def ask_twice(llm: LLM, prompt: str) -> dict:
    """One prompt, twice in a row: the answers, and how many prompt tokens came from the prefix cache."""
    first, second = (llm.generate([prompt], sampling(ANSWER_TOKENS), use_tqdm=False)[0] for _ in range(2))
    cached = [first.num_cached_tokens, second.num_cached_tokens]
    return {"first": answer_of(first), "second": answer_of(second), "cached_tokens": cached}


def fly(llm: LLM, prompt: str) -> dict:
    """One request in flight while the engine goes 1 -> 2 -> 3. Tells how many tokens it had at each transition."""
    engine = llm.llm_engine
    engine.add_request("flight", prompt, sampling(FLIGHT_TOKENS))
    had, output = [], None
    while engine.has_unfinished_requests():
        for step_output in engine.step():
            output = step_output
        tokens = len(output.outputs[0].token_ids) if output else 0
        if len(had) < 2 and tokens >= FLIGHT_TOKENS * (len(had) + 1) // 4:
            had.append(tokens)
            llm.stages.advance()
    return {"prompt_tokens": output.prompt_token_ids, "had": had, "stage": llm.stages.stage, **answer_of(output)}


def start_suspended(checkpoint: str) -> tuple[progressive_serve.Launch, list[dict]]:
    """A reader that is suspended before it has read a byte, and what has happened so far.

    One that was faster, on a machine that kept this process waiting, is closed, and another one is started.
    """
    while True:
        launch = progressive_serve.start_reading(checkpoint, start_stage=1, limit_mbps=4.0, start=time.monotonic())
        reader = psutil.Process(launch.reader.pid)
        reader.suspend()
        while reader.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)  # it will be
        events = launch.journal.follow()
        if "read" not in [event["event"] for event in events]:
            return launch, events
        reader.resume()
        launch.close()


def start_before_a_byte_is_there(checkpoint: str, options: dict) -> tuple[LLM, list[str]]:
    """An engine at stage 1, and what has happened so far. Reading begins when the first forward pass has begun."""
    launch, events = start_suspended(checkpoint)
    llm = LLM(**progressive_serve.engine_options(launch, options), **options)
    llm.collective_rpc("progressive_activate", args=(1,))
    llm.apply_model(
        lambda model: model.register_forward_pre_hook(lambda *_: launch.reader.send_signal(signal.SIGCONT)) and None
    )
    llm.launch = launch
    return llm, [event["event"] for event in events + launch.journal.follow()]


def read_whole(*args, **options) -> progressive_serve.Launch:
    """start_reading() that returns when everything has arrived."""
    launch = START_READING(*args, **options)
    launch.reader.wait()
    return launch


def close(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()  # collects garbage


@functools.cache
def stock(model: str, prompts: tuple[str, ...], dtype: str = "auto", compiled: bool = False) -> dict:
    """What stock vLLM says of a model, which is started once for all jobs that ask the same."""
    llm = LLM(model, **ENGINE, dtype=dtype, enforce_eager=not compiled)
    found = {"answers": ask(llm, prompts), "long": ask_twice(llm, long_prompt(prompts))}
    if compiled:
        found["kernels"] = kernels(llm, prompts[0])
    close(llm)
    return found


def long_prompt(prompts: list[str]) -> str:
    """More than one block of the KV cache, so that it can be cached."""
    return "\n".join(prompts)[:900]


def probe_stages(checkpoint: str, dtype: str, prompts: list[str]) -> dict:
    """While it arrives, and in flight; 1 -> 2 -> 3; everything at once; stock."""
    options, found = {**ENGINE, "dtype": dtype, "enforce_eager": True}, {}
    llm, events = start_before_a_byte_is_there(checkpoint, options)
    found["streamed"] = {"events_before": events, "answers": ask(llm, prompts)}
    llm.stages = progressive_serve.StageControl(llm, llm.launch)
    flight = found["flight"] = fly(llm, prompts[0])
    llm.launch.close()
    close(llm)

    llm = progressive_serve.load_llm(checkpoint, start_stage=1, **options)
    for stage in (1, 2, 3):
        if stage > 1:
            llm.stages.advance()
        found[f"stage{stage}"] = ask(llm, prompts)
        found[f"long{stage}"] = ask_twice(llm, long_prompt(prompts))
    found["progress"] = llm.stages.progress()
    close(llm)

    with mock.patch.object(progressive_serve, "start_reading", read_whole):
        llm = progressive_serve.load_llm(checkpoint, **options)
    found["at_once_stage"] = llm.stages.stage
    found["at_once"] = ask(llm, prompts)
    close(llm)

    of_stock = stock(checkpoint, tuple(prompts), dtype)
    found |= {"stock": of_stock["answers"], "stock_long": of_stock["long"]}
    llm = LLM(checkpoint, **options)
    prefix = flight["prompt_tokens"] + flight["tokens"][: flight["had"][-1]]
    found["stock_continuation"] = ask(llm, [{"prompt_token_ids": prefix}], FLIGHT_TOKENS - flight["had"][-1])[0]
    close(llm)
    return found


def probe_failing(checkpoint: str, prompts: list[str]) -> dict:
    """Stage 1 -> 2 with adapters: fails at the third module, comes back, succeeds; then fails both ways."""
    options = {**ENGINE, "dtype": "float32", "enforce_eager": True}
    llm = progressive_serve.load_llm(checkpoint, start_stage=1, **options)
    found = {"stage1": ask(llm, prompts)}
    llm.stages.wait_for(3)
    shutil.rmtree(Path(checkpoint) / "adapters")  # whatever is needed of them has been read
    replace = progressive_serve.PackedLinear.replace

    def replace_twice(linear, packed, calls=itertools.count()):  # noqa: B008
        if next(calls) == 2:
            raise MemoryError("no room for the third")
        replace(linear, packed)

    with mock.patch.object(progressive_serve.PackedLinear, "replace", replace_twice):
        try:
            llm.stages.advance()
        except RuntimeError as error:
            found["failure"] = repr(error)
    found["stage_after_failure"], found["answers_after_failure"] = llm.stages.stage, ask(llm, prompts)
    for stage in (2, 3):
        llm.stages.advance()
        found[f"stage{stage}"] = ask(llm, prompts)
    close(llm)
    return found


def probe_apart(checkpoint: str, prompts: list[str]) -> dict:
    """For a probe of its own: vLLM settles for good, with the first engine in a process, whether engines are apart.

    Long prompts run while the stages change; what the cache then holds of them must be of the last stage.
    """
    options = {**ENGINE, "dtype": "float32", "enforce_eager": True}
    options["distributed_executor_backend"] = "uni"  # vLLM's default here: one more process, which imports everything
    prompts = [f"{number} {long_prompt(prompts)}" for number in range(8)]
    with mock.patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}):
        llm = progressive_serve.load_llm(checkpoint, start_stage=1, **options)
    llm.stages.wait_for(3)  # while that is read the requests might end
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        engine.add_request(f"flight{number}", prompt, sampling(2 * FLIGHT_TOKENS))
    while not engine.step():
        pass
    llm.stages.advance()
    llm.stages.advance()
    found = {"unfinished": engine.get_num_unfinished_requests(), "stage": llm.stages.stage}
    while engine.has_unfinished_requests():
        engine.step()
    outputs = llm.generate(prompts, sampling(ANSWER_TOKENS), use_tqdm=False)
    found |= {"answers": [answer_of(output) for output in outputs]}
    found["cached_tokens"] = [output.num_cached_tokens for output in outputs]
    (engine_process,) = (child for child in psutil.Process().children() if "EngineCore" in child.name())
    engine_process.kill()
    try:
        llm.stages.followed.bound.clear()
        llm.stages.wait_for(3)
    except EngineDeadError as error:
        found["dead"] = repr(error)
    return found | {"stock": stock(checkpoint, tuple(prompts), "float32")["answers"]}


def probe_brief(checkpoint: str, source: str, dtype: str, prompts: list[str], compiled: bool = False) -> dict:
    """1 -> 2 -> 3, and stock on what the checkpoint was made from."""
    found = {}
    llm = progressive_serve.load_llm(checkpoint, start_stage=1, **ENGINE, dtype=dtype, enforce_eager=not compiled)
    for stage in (1, 2, 3):
        if stage > 1:
            llm.stages.advance()
        found[f"stage{stage}"] = ask(llm, prompts)
    close(llm)
    return found | {"stock": stock(source, tuple(prompts), dtype, compiled)["answers"]}


def probe_held(checkpoint: str, stage: int, model: str, prompts: list[str]) -> dict:
    """A stage that is held; and stock on a model that is said to be the same."""
    llm = progressive_serve.load_llm(checkpoint, hold_stage=stage, **ENGINE, enforce_eager=True)
    found = {"held": ask(llm, prompts)}
    close(llm)
    return found | {"stock": stock(model, tuple(prompts))["answers"]}


def compilations() -> dict[str, int]:
    """Everything that torch counts when it traces or compiles."""
    return {
        f"{group}.{name}": count for group in ("stats", "frames", "inductor") for name, count in counters[group].items()
    }


def kernels(llm: LLM, prompt: str) -> int:
    """Kernels that one answer takes: on a GPU all, in CUDA graphs as well; on a CPU those that inductor has made."""
    with torch.profiler.profile() as trace:
        ask(llm, [prompt])
    on_gpu = torch.cuda.is_available()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA if on_gpu else "cpp_fused" in event.name
        for event in trace.events()
    )


def graphs_and_addresses(llm: LLM) -> dict[str, list[int]]:
    """What must stay where it is in a fixed graph: CUDA graphs, gates, on a GPU the weights too."""

    def of(model) -> list[int]:
        fixed = [gated.gate for gated in model.binding.gates.values()]
        return [tensor.data_ptr() for tensor in (*fixed, *(model.parameters() if torch.cuda.is_available() else ()))]

    gc.collect()  # an engine before this one, in a cycle with its graphs
    graphs = [thing for thing in gc.get_objects() if isinstance(thing, torch.cuda.CUDAGraph)]
    return {"graphs": sorted(map(id, graphs)), "addresses": llm.apply_model(of)[0]}


def probe_compiled(checkpoint: str, source: str, prompts: list[str]) -> dict:
    """Stock first, so that its compiled graph lies in the cache, where it must not be mistaken for the gated one."""
    of_stock = stock(source, tuple(prompts), "float32", compiled=True)
    found = {"stock": of_stock["answers"], "kernels_stock": of_stock["kernels"]}
    counters.clear()
    llm = progressive_serve.load_llm(checkpoint, start_stage=1, **ENGINE, dtype="float32")
    found["gate_selects"] = [
        layer.gate_selects for layer in llm.apply_model(lambda model: list(model.binding.gates.values()))[0]
    ]
    for stage in (1, 2, 3):
        if stage > 1:
            llm.stages.advance()
        found[f"stage{stage}"] = ask(llm, prompts)
        found[f"compilations{stage}"] = compilations()
        found[f"fixed{stage}"] = graphs_and_addresses(llm)
        found[f"kernels{stage}"] = kernels(llm, prompts[0])
    close(llm)
    return found


def failure_of(call, *args) -> str:
    try:
        call(*args)
    except RuntimeError as error:
        return str(error)
    return ""


def probe_later(checkpoint: str, prompts: list[str]) -> dict:
    """Eagerly 1 -> 2 -> 3, then compiled: not in time, without gcc, by a process that then has to, from the cache."""
    options, found = {**ENGINE, "dtype": "float32"}, {}
    llm = progressive_serve.load_llm(checkpoint, start_stage=1, compile_later=True, **options)
    for stage in (1, 2, 3):
        if stage > 1:
            llm.stages.advance()
        found[f"stage{stage}"] = ask(llm, prompts)
    found["late"] = failure_of(llm.stages.optimize, 0.5)
    with mock.patch.dict(os.environ, {"CXX": "no-such-compiler"}):
        found["no_gcc"] = failure_of(llm.stages.optimize)
    found["after_failures"], found["left"], found["compilations"] = ask(llm, prompts), compilers(), [compilations()]
    llm.stages.optimize()
    found["compiled"] = ask(llm, prompts)
    found["compilations"].append(compilations())
    found["model"] = llm.apply_model(lambda model: [type(layer).__name__ for layer in model.model.layers])[0]
    close(llm)

    with mock.patch.object(progressive_serve, "Compiler", None):
        llm = progressive_serve.load_llm(checkpoint, compile_later=True, **options)
        llm.stages.advance(3)
        llm.stages.optimize()
    found["from_cache"] = ask(llm, prompts)
    close(llm)
    for name, compiled in (("stock", True), ("stock_eager", False)):
        found[name] = stock(checkpoint, tuple(prompts), "float32", compiled)["answers"]
    return found


def compilers() -> list[list[str]]:
    """What is left of this process' compilers; another test may have its own."""
    commands = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            commands.append(process.cmdline())
    return [command for command in commands if progressive_serve.COMPILER_COMMAND in command]


def main() -> None:
    for number, line in enumerate(sys.stdin, 1):
        job, began = json.loads(line), time.monotonic()
        do = globals()[f"probe_{job.pop('do')}"]
        try:
            answer = {"found": do(**job)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answer["seconds"] = round(time.monotonic() - began, 1)
        (Path(sys.argv[1]) / "answer").write_text(json.dumps(answer))
        (Path(sys.argv[1]) / "answer").rename(Path(sys.argv[1]) / f"{number}.json")


if __name__ == "__main__":
    main()
