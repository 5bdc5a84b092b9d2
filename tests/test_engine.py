"""progressive_serve.py with an engine in Python: against stock vLLM and transformers, mostly on the trained demo model.

Two processes with engines inside: one that does the jobs of all tests (engine_probe.py), and one whose engine is apart.
About a minute and a half, a third of which compiles; with `slow` four minutes.
"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import SPLIT, Probe, add_adapter, make_llama, run_script, stage_answers
from transformers import LlamaForCausalLM, MistralForCausalLM

pytestmark = pytest.mark.server
slow = pytest.mark.slow
PROMPTS = [f"Question number {number}: why?" for number in range(8)]


def tokens(answers: list[dict]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def stages_of(probe, prompts: list[str], checkpoint: Path, case: str) -> dict:
    """What the probe has found with a checkpoint in a dtype, with so many prompts."""
    dtype, count = case.split()
    return probe("stages", checkpoint=checkpoint, dtype=dtype, prompts=prompts[: int(count)])


# ---- the final state is the original model ---------------------------------------------------------


@pytest.fixture(params=["float32 16", pytest.param("float32 64", marks=slow), pytest.param("bfloat16 64", marks=slow)])
def probed(request, probe, prompts, demo_checkpoint) -> dict:
    return stages_of(probe, prompts, demo_checkpoint, request.param)


def test_final_state_equals_stock(probed):
    assert len(probed["stock"]) >= 16
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


# ---- every stage is the model with PassLayers ------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stage_equals_transformers_with_pass_layers(stage, probe, demo_checkpoint, prompts):
    found = stages_of(probe, prompts, demo_checkpoint, "float32 16")
    assert tokens(found[f"stage{stage}"]) == stage_answers(demo_checkpoint, stage, prompts[:16])


@pytest.mark.parametrize(
    "model_class, config",
    [(MistralForCausalLM, {}), (LlamaForCausalLM, {"tie_word_embeddings": True})],
    ids=["mistral", "tied embeddings"],
)
def test_other_models(model_class, config, probe, tmp_path):
    """Another class of model and of layer than LLaMA's, with the same gate; a model without an lm_head of its own."""
    model = make_llama(tmp_path / "model", model_class, num_hidden_layers=4, **config)
    checkpoint = tmp_path / "checkpoint"
    assert run_script(SPLIT, model, checkpoint, "--layers", "1-2").returncode == 0
    prompts = [f"Number {number}? It is written here more than once, so that a block fills." for number in range(8)]
    found = probe("brief", checkpoint=checkpoint, source=model, dtype="float32", prompts=prompts)
    assert found["stage3"] == found["stock"] != found["stage2"]
    for stage in (1, 2):
        assert tokens(found[f"stage{stage}"]) == stage_answers(checkpoint, stage, prompts)


# ---- stage adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["bfloat16 16", pytest.param("float32 64", marks=slow), pytest.param("bfloat16 64", marks=slow)]
)
def test_no_trace_of_adapters_in_the_final_state(case, probe, prompts, adapted_checkpoint):
    """Merged weights go back to the original bits; in flight and while the weights arrive as well."""
    found = stages_of(probe, prompts, adapted_checkpoint, case)
    assert found["stage3"] == found["at_once"] == found["stock"]
    assert found["flight"]["tokens"][found["flight"]["had"][1] :] == found["stock_continuation"]["tokens"]
    assert found["long3"]["first"] == found["stock_long"]["first"]
    assert found["streamed"]["answers"] == found["stage1"]
    assert [row["adapter"] for row in found["progress"]["stages"]] == [True, True, False]


@pytest.fixture
def adapted_float32(probe, prompts, adapted_checkpoint, demo_checkpoint) -> dict:
    return probe("brief", checkpoint=adapted_checkpoint, source=demo_checkpoint, dtype="float32", prompts=prompts[:16])


@pytest.mark.parametrize("stage", [1, 2])
def test_adapted_stage_equals_transformers_with_peft(
    stage, probe, adapted_float32, adapted_checkpoint, demo_checkpoint, prompts
):
    found = tokens(adapted_float32[f"stage{stage}"])
    adapter = adapted_checkpoint / f"adapters/stage{stage}"
    assert found == stage_answers(adapted_checkpoint, stage, prompts[:16], adapter)
    without = stages_of(probe, prompts, demo_checkpoint, "float32 16")
    assert found != tokens(without[f"stage{stage}"])  # the adapter does something


# ---- transitions that fail, and an engine that steps by itself -------------------------------------


def test_failed_transition_goes_back(probe, adapted_float32, adapted_checkpoint, prompts, tmp_path):
    """Half of the weights were of the new stage already; and the adapters' files are gone by then."""
    copy = Path(shutil.copytree(adapted_checkpoint, tmp_path / "checkpoint"))
    found = probe("failing", checkpoint=copy, prompts=prompts[:16])
    assert "no room for the third" in found["failure"]
    assert found["stage_after_failure"] == 1
    assert found["answers_after_failure"] == found["stage1"]
    assert tokens(found["stage1"]) != tokens(found["stage2"]) != tokens(found["stage3"])
    assert found["stage3"] == adapted_float32["stage3"] == adapted_float32["stock"]


def test_nothing_is_computed_within_a_transition(demo_checkpoint, prompts, tmp_path):
    """By an engine in a process of its own: K and V of requests that run meanwhile would be of the old stage."""
    process = Probe(tmp_path)
    try:
        found = process("apart", checkpoint=demo_checkpoint, prompts=prompts)
    finally:
        process.end()
    assert (found["unfinished"], found["stage"]) == (8, 3)
    assert all(found["cached_tokens"])
    assert found["answers"] == found["stock"]
    assert "EngineDeadError" in found["dead"]  # and nobody waits for an engine that has died


# ---- the gate in a fixed graph ---------------------------------------------------------------------


def test_no_transition_changes_the_graph(probe, split_tiny, tmp_path):
    """With an adapter in stage 1, whose weights are packed anew into the memory that the graph reads."""
    checkpoint = Path(shutil.copytree(split_tiny, tmp_path / "checkpoint"))
    adapter = add_adapter(checkpoint, 1, "all-linear")
    found = probe("compiled", checkpoint=checkpoint, source=split_tiny, prompts=PROMPTS)
    assert found["gate_selects"] and all(found["gate_selects"])
    assert found["compilations1"]["stats.unique_graphs"] > 0  # it did compile, and it was counted
    assert found["compilations1"] == found["compilations2"] == found["compilations3"]
    assert found["fixed1"]["addresses"] and found["fixed1"] == found["fixed2"] == found["fixed3"]
    assert len(found["fixed1"]["graphs"]) > 0 or not torch.cuda.is_available()
    assert found["kernels_stock"] > 0  # the gate is part of kernels that are there anyway:
    assert [found[f"kernels{stage}"] for stage in (1, 2, 3)] == 3 * [found["kernels_stock"]]
    assert found["stage3"] == found["stock"]
    assert tokens(found["stage1"]) == stage_answers(checkpoint, 1, PROMPTS, adapter)
    assert tokens(found["stage2"]) == stage_answers(checkpoint, 2, PROMPTS)
    assert tokens(found["stage1"]) != tokens(found["stage2"]) != tokens(found["stock"])


# ---- compiled after the last stage -----------------------------------------------------------------


@slow  # the one before takes a third of its time; over HTTP it is proven as well
def test_compiled_later_equals_stock(probe, split_tiny):
    """By a process that has had none of the weights: nothing of them may be baked into what it has compiled."""
    found = probe("later", checkpoint=split_tiny, prompts=PROMPTS)
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
