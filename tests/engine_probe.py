"""What the engine does, written down as JSON for the tests. Runs in a process of its own, with the engine inside it.

    python engine_probe.py stages CKPT DTYPE OUT.json      # stock, 1 -> 2 -> 3, in flight, everything at once
    python engine_probe.py compiled CKPT OUT.json          # the same under torch.compile; compilations, kernels
    python engine_probe.py later CKPT OUT.json             # compiled after the last stage, by another process
    python engine_probe.py failing CKPT OUT.json           # transitions that fail half-way
    python engine_probe.py apart CKPT OUT.json             # the engine in a process of its own, stepping by itself
    python engine_probe.py brief [CKPT SOURCE DTYPE]... OUT.json    # 1 -> 2 -> 3, stock on SOURCE; DTYPE+compiled
    python engine_probe.py held CKPT MODEL... OUT.json     # each stage held, stock on the MODEL that it should be

An answer is {"tokens": [...], "logprobs": [[...], ...]} (the logprobs of the three most likely tokens at each place).
"""

import gc
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if "apart" in sys.argv else "0"
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

gc.freeze()  # vLLM collects garbage nine times per engine: two thirds of an engine's time, if of all that is imported


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


def ask_while_it_arrives(checkpoint: str, options: dict, prompts: list[str]) -> dict:
    """Stage 1, asked before a byte of it is there: the forward pass waits layer by layer."""
    launch = progressive_serve.start_reading(checkpoint, hold_stage=1, limit_mbps=2.0, start=time.monotonic())
    launch.reader.send_signal(signal.SIGSTOP)
    llm = LLM(**progressive_serve.engine_options(launch, options), **options)
    llm.collective_rpc("progressive_activate", args=(1,))
    events = [event["event"] for event in launch.journal.follow()]
    threading.Timer(1.0, launch.reader.send_signal, [signal.SIGCONT]).start()
    answers = ask(llm, prompts)
    close(llm)
    return {"events_before": events, "answers": answers}


def read_whole(*args, **options) -> progressive_serve.Launch:
    """start_reading() that returns when everything has arrived."""
    launch = START_READING(*args, **options)
    launch.reader.wait()
    return launch


def close(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()  # collects garbage, of everything
    gc.freeze()


def probe_stages(checkpoint: str, dtype: str, prompts: list[str]) -> dict:
    found = {}
    options = {**ENGINE, "dtype": dtype, "enforce_eager": True}
    long_prompt = "\n".join(prompts)[:900]  # more than one block of the KV cache, so that it can be cached

    llm = progressive_serve.load_llm(checkpoint, start_stage=1, **options)
    for stage in (1, 2, 3):
        if stage > 1:
            llm.stages.advance()
        found[f"stage{stage}"] = ask(llm, prompts)
        found[f"long{stage}"] = ask_twice(llm, long_prompt)
    found["progress"] = llm.stages.progress()
    close(llm)

    llm = progressive_serve.load_llm(checkpoint, start_stage=1, **options)
    found["flight"] = fly(llm, prompts[0])
    close(llm)

    found["streamed"] = ask_while_it_arrives(checkpoint, options, prompts)

    with mock.patch.object(progressive_serve, "start_reading", read_whole):
        llm = progressive_serve.load_llm(checkpoint, **options)
    found["at_once_stage"] = llm.stages.stage
    found["at_once"] = ask(llm, prompts)
    close(llm)

    llm = LLM(checkpoint, **options)
    found["stock"] = ask(llm, prompts)
    found["stock_long"] = ask_twice(llm, long_prompt)
    flight = found["flight"]
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
    """Long prompts run while the stages change; what the cache then holds of them must be of the last stage."""
    options = {**ENGINE, "dtype": "float32", "enforce_eager": True}
    prompts = [f"{number} " + "\n".join(prompts)[:900] for number in range(8)]
    llm = progressive_serve.load_llm(checkpoint, start_stage=1, **options)
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        engine.add_request(f"flight{number}", prompt, sampling(FLIGHT_TOKENS))
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
    found["stock"] = ask(LLM(checkpoint, **options), prompts)
    return found


def probe_brief(*models: str) -> list[dict]:
    """1 -> 2 -> 3, and stock on what the checkpoint was made from, of one model after the other."""
    *models, prompts = models
    found = []
    for checkpoint, source, dtype in zip(models[::3], models[1::3], models[2::3], strict=True):
        dtype, _, compiled = dtype.partition("+")
        options, answers = {**ENGINE, "dtype": dtype, "enforce_eager": not compiled}, {}
        llm = progressive_serve.load_llm(checkpoint, start_stage=1, **options)
        for stage in (1, 2, 3):
            if stage > 1:
                llm.stages.advance()
            answers[f"stage{stage}"] = ask(llm, prompts)
        close(llm)
        llm = LLM(source, **options)
        found.append(answers | {"stock": ask(llm, prompts)})
        close(llm)
    return found


def probe_held(checkpoint: str, *models: str) -> dict:
    """The first stages, each held; and stock on models that are said to be the same."""
    *models, prompts = models
    options, found = {**ENGINE, "enforce_eager": True}, {"held": [], "stock": []}
    for stage, model in enumerate(models, 1):
        llm = progressive_serve.load_llm(checkpoint, hold_stage=stage, **options)
        found["held"].append(ask(llm, prompts))
        close(llm)
        llm = LLM(model, **options)
        found["stock"].append(ask(llm, prompts))
        close(llm)
    return found


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

    gc.unfreeze()  # vLLM has frozen what its start has made, and get_objects() leaves that out
    gc.collect()  # an engine before this one, in a cycle with its graphs
    graphs = [thing for thing in gc.get_objects() if isinstance(thing, torch.cuda.CUDAGraph)]
    return {"graphs": sorted(map(id, graphs)), "addresses": llm.apply_model(of)[0]}


def probe_compiled(checkpoint: str, prompts: list[str]) -> dict:
    """Stock first, so that its compiled graph lies in the cache, where it must not be mistaken for the gated one."""
    options = {**ENGINE, "dtype": "float32"}
    llm = LLM(checkpoint, **options)
    found = {"stock": ask(llm, prompts), "kernels_stock": kernels(llm, prompts[0])}
    close(llm)

    llm = progressive_serve.load_llm(checkpoint, start_stage=1, **options)
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
    for name, extra in (("stock", {}), ("stock_eager", {"enforce_eager": True})):
        llm = LLM(checkpoint, **options, **extra)
        found[name] = ask(llm, prompts)
        close(llm)
    return found


def compilers() -> list[list[str]]:
    """What is left of compiler processes."""
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if progressive_serve.COMPILER_COMMAND in command]


def main() -> None:
    what, checkpoint, *details, prompts, out = sys.argv[1:]
    prompts = json.loads(Path(prompts).read_text())
    found = globals()[f"probe_{what}"](checkpoint, *details, prompts)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
