"""Stages of precision: the arithmetic, what prune_and_split.py makes of it, and what the server makes of that.

One process with engines inside it, for all that is marked `server` (engine_probe.py); about half a minute in all.
"""

import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPLIT, PassLayer, edit_config, make_llama, run_main, run_script
from safetensors.torch import load_file, save_file
from servers import SERVER, flip_last_byte
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Phi3ForCausalLM,
    Qwen3ForCausalLM,
)

import prune_and_split

# ---- split and join ---------------------------------------------------------------------------------

MANTISSAS = {"BF16": 7, "F16": 10, "F32": 23}
SHARED = ("list_fields", "read_record", "inflate", "join_chunk", "join_planes")


def patterns(kind: str, dtype: str) -> np.ndarray:
    """Bit patterns of a matrix of one row."""
    unsigned, generator = np.dtype(prune_and_split.FLOATS[dtype][0]), np.random.default_rng(0)
    every = np.arange(1 << 16, dtype="<u4") << (16 if unsigned.itemsize == 4 else 0)
    normal = (generator.standard_normal(300_001, dtype="<f4") * np.float32(0.02)).view("<u4")
    return {
        "every pattern": generator.permutation(every),
        "like trained weights": normal >> (16 if dtype == "BF16" else 0),
        "any": generator.integers(0, 1 << 8 * unsigned.itemsize, 300_001, dtype="<u8"),
        "all zero": np.zeros(4097, "<u4"),
        "all equal": np.full(4097, 0x3F80, "<u4"),
        "subnormal": np.arange(1, 1 << 7, dtype="<u4"),
        "one": np.ones(1, "<u4"),
        "none": np.zeros(0, "<u4"),
    }[kind].astype(unsigned)


def records_of(weights: np.ndarray, dtype: str, bits: list) -> list[memoryview]:
    from concurrent.futures import ThreadPoolExecutor

    tensor = prune_and_split.Tensor(dtype, (1, len(weights)), weights.nbytes)
    known = prune_and_split.known_bits(bits, MANTISSAS[dtype])
    with ThreadPoolExecutor(1) as pool:
        return list(map(memoryview, prune_and_split.code_matrix(weights, tensor, known, pool)[0]))


@pytest.mark.parametrize("bits", [[1, 2, "rest"], [3, "rest"], [5, 2, "rest"], [1, 1, 1, 1, 1, 1, "rest"]], ids=str)
@pytest.mark.parametrize("dtype", MANTISSAS)
@pytest.mark.parametrize(
    "kind", ["every pattern", "like trained weights", "any", "all zero", "all equal", "subnormal", "one"]
)
def test_all_planes_are_the_weights(kind, dtype, bits):
    weights = patterns(kind, dtype)
    records = records_of(weights, dtype, bits)
    assert len(records) == len(bits)
    found, joined = prune_and_split.join_planes(records)
    assert found == dtype and joined.shape == (1, len(weights))
    assert np.array_equal(joined[0], weights)


@pytest.mark.parametrize("dtype", MANTISSAS)
def test_missing_bits_stand_at_their_middle(dtype):
    """Half a step off at most; and what has another exponent than most, NaN and infinity among them, is exact."""
    weights = patterns("every pattern", dtype)
    records = records_of(weights, dtype, [1, 2, "rest"])
    exact = prune_and_split.floats_of(weights, dtype).astype(float)
    last = None
    for stage, known in ((1, 1), (2, 3)):
        approximate = prune_and_split.floats_of(prune_and_split.join_planes(records[:stage])[1][0], dtype).astype(float)
        error = np.abs(approximate - exact)
        assert (error <= np.abs(exact) * 2.0 ** -(known + 1) * (1 + 1e-6)).all()
        assert error.any() and (last is None or error.sum() < last)
        last = error.sum()


DAMAGES = {
    "cut short": lambda record: record[:-1],
    "no head": lambda record: record[record.index(b"\n") + 1 :],
    "sizes that lie": lambda record: record.replace(b'"sizes":[[', b'"sizes":[[1', 1),
    "another shape": lambda record: record.replace(b'"shape":[1,300001]', b'"shape":[1,999999]'),
    "a bomb": lambda record: record.replace(b'"shape":[1,300001]', b'"shape":[9,300001999999]'),
    "a dtype that is none": lambda record: record.replace(b'"BF16"', b'"BF99"'),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_record(case):
    first, *others = records_of(patterns("like trained weights", "BF16"), "BF16", [1, 2, "rest"])
    damaged = DAMAGES[case](bytes(first))
    assert damaged != bytes(first)
    with pytest.raises((ValueError, KeyError, MemoryError)):
        prune_and_split.join_planes([memoryview(damaged), *others])


def test_escape_outside_of_its_chunk():
    weights = patterns("any", "BF16")[:100]
    (record, *_) = records_of(weights, "BF16", [1, "rest"])
    head, ((_, escapes, *_),) = prune_and_split.read_record(record)
    raw = bytes(record).replace(bytes(escapes[:4]), (100).to_bytes(4, "little"), 1)
    with pytest.raises(ValueError, match="outside of its chunk"):
        prune_and_split.join_planes([memoryview(raw)])


def test_both_scripts_join_alike():
    """The server has the same functions, byte for byte."""
    import progressive_serve

    for name in SHARED:
        assert inspect.getsource(getattr(progressive_serve, name)) == inspect.getsource(getattr(prune_and_split, name))
    for name in ("CHUNK_WEIGHTS", "FLOATS", "SYMBOL_MANTISSA", "ESCAPE", "RECORD"):
        assert getattr(progressive_serve, name) == getattr(prune_and_split, name)


# ---- prune_and_split.py -----------------------------------------------------------------------------

MODELS = {
    "bfloat16": dict(dtype=torch.bfloat16),
    "float16": dict(dtype=torch.float16),
    "float32, tied": dict(dtype=torch.float32, tie_word_embeddings=True),
    "sharded": dict(dtype=torch.bfloat16, shard_size="200KB"),
}


def split(model: Path, out: Path, *options):
    done = run_main(prune_and_split, model, out, "--planes", *options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("case", MODELS)
def test_restored_is_the_source(case, tmp_path):
    model = make_llama(tmp_path / "model", **MODELS[case])
    options = ["--max-file-gib", 1e-4] if case == "sharded" else []
    done = split(model, tmp_path / "planes", *options)
    assert "escapes" in done.stdout and "share so far" in done.stdout
    files = len(list((tmp_path / "planes").glob("model-stage1*.safetensors")))
    assert files > 1 if options else files == 1
    restore = ["--restore", tmp_path / "planes", tmp_path / "restored"]
    done = run_script(SPLIT, *restore) if case == "bfloat16" else run_main(prune_and_split, *restore)  # once as by hand
    assert done.returncode == 0, done.stderr
    weights = sorted(path.name for path in model.glob("*.safetensors"))
    assert weights and weights == sorted(path.name for path in (tmp_path / "restored").glob("*.safetensors"))
    for name in (*weights, "config.json", "tokenizer.json"):
        assert (model / name).read_bytes() == (tmp_path / "restored" / name).read_bytes(), name
    assert LlamaForCausalLM.from_pretrained(tmp_path / "restored").config.num_hidden_layers == 4


def test_restored_synthetic_model_is_what_the_manifest_says(tmp_path, monkeypatch):
    shape = dict(prune_and_split.SYNTHETIC_SHAPES["tinyllama-1.1b"], num_hidden_layers=2, hidden_size=128)
    monkeypatch.setitem(prune_and_split.SYNTHETIC_SHAPES, "tiny", shape | dict(intermediate_size=256, vocab_size=512))
    assert run_main(prune_and_split, "--synthetic", "tiny", tmp_path / "planes", "--planes", "2,rest").returncode == 0
    manifest = json.loads((tmp_path / "planes" / "progressive.json").read_text())
    assert [(row["kind"], row["bits"]) for row in manifest["stages"]] == [("planes", 2), ("planes", "rest")]
    done = run_main(prune_and_split, "--restore", tmp_path / "planes", tmp_path / "restored")
    assert done.returncode == 0  # it compares the checksum
    assert "model.norm.weight" in load_file(tmp_path / "restored" / "model.safetensors")


def test_what_cannot_be_split_is_stored_as_it_is(tmp_path):
    """Integers, vectors, and matrices that do not get smaller."""
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    noise = torch.randint(-(1 << 15), 1 << 15, (64, 64), dtype=torch.int16).view(torch.bfloat16)
    tensors |= {"noise": noise, "integers": torch.arange(64).view(8, 8), "empty": torch.empty(0, 8)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    edit_config(model, architectures=["OtherForCausalLM"])  # LLaMA has no such tensors
    done = split(model, tmp_path / "planes")
    assert (
        "8,192 bytes of matrices in BF16 do not gain" in done.stdout and "512 bytes of matrices in I64" in done.stdout
    )
    stage1 = load_file(tmp_path / "planes" / "model-stage1.safetensors")
    assert torch.equal(stage1["noise"].view(torch.int16), noise.view(torch.int16))
    assert {"integers", "empty", "model.norm.weight", "lm_head.weight.planes"} <= stage1.keys()
    done = run_main(prune_and_split, "--restore", tmp_path / "planes", tmp_path / "restored")
    assert done.returncode == 0, done.stderr
    assert (model / "model.safetensors").read_bytes() == (tmp_path / "restored" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layers", [2, 6])
def test_planes_are_measured_where_layers_cannot_be(layers, tmp_path):
    """A model of few layers has no block that three stages could bring back; an option that asks for one is refused."""
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=layers)
    (tmp_path / "text").write_text("A document of more than eight letters.\n" * 4, encoding="utf-8-sig")
    done = split(model, tmp_path / "planes", "--calibration", tmp_path / "text")
    assert "no comparison with stages of layers: " in done.stdout
    stages = json.loads((tmp_path / "planes" / "progressive.json").read_text())["stages"]
    assert all(stage["perplexity"] >= 1 for stage in stages)
    options = ["--planes", "--calibration", tmp_path / "text", "--prune", layers]
    done = run_main(prune_and_split, model, tmp_path / "other", *options)
    assert done.returncode == 2 and f"--prune {layers}" in done.stderr and not (tmp_path / "other").exists()


@pytest.mark.parametrize("options, scale, named", [(["--seq-len", 1], 1.0, "--seq-len 1"), ([], 1e6, "overflows")])
def test_perplexity_that_cannot_be_had_is_told_before_anything_is_coded(options, scale, named, tmp_path):
    model = make_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] *= scale  # exp of the mean loss is then no number
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "text").write_text("A document of more than eight letters.\n")
    options = ["--planes", "--calibration", tmp_path / "text", *options]
    done = run_main(prune_and_split, model, tmp_path / "out", *options)
    assert done.returncode == 2 and named in done.stderr and "coding" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_plan_only_writes_nothing(tmp_path):
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16)
    done = split(model, tmp_path / "planes", "--plan-only")
    assert "error of the weights" in done.stdout
    assert "A server answers from stage 2 on: its weights are off by 2." in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_plan_of_layers_says_what_planes_would_give(tmp_path):
    """An estimate from the first chunk of each matrix, and a command that works."""
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=8)
    layers = run_main(prune_and_split, model, "out", "--layers", "2-3", "--plan-only", cwd=tmp_path)
    said = re.search(r"answer from (\d+)% of the bytes on, in place of (\d+)%: python (\S+) (.*)$", layers.stdout)
    coded = run_main(prune_and_split, *said[4].replace(" --calibration", " --plan-only").split(), cwd=tmp_path)
    assert said[3] == "prune_and_split.py" and coded.returncode == 0, coded.stderr
    share = re.search(r"^ +2 .* (\S+)% +2\.\S+%$", coded.stdout, re.MULTILINE)[1]
    assert abs(float(share) - float(said[1])) < 2 and f"{said[2]}." in layers.stdout


def test_calibration_without_a_name_is_the_hub_s(tmp_path, monkeypatch):
    """Where there is no Hub it says what to do."""

    def unreachable(*where, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16)
    done = run_main(prune_and_split, model, tmp_path / "out", "--planes", "--calibration")
    assert done.returncode == 2 and "Salesforce/wikitext" in done.stderr and "--calibration FILE" in done.stderr
    assert not (tmp_path / "out").exists()


def at_stage(checkpoint: Path, stage: int, source: Path, folder: Path) -> Path:
    """An ordinary checkpoint with the weights that a stage stands for."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    stages = [load_file(checkpoint / f"model-stage{number}.safetensors") for number in range(1, stage + 1)]
    weights = {}
    for name, tensor in stages[0].items():
        if name.endswith(".planes"):
            dtype, joined = prune_and_split.join_planes([memoryview(more[name].numpy()) for more in stages])
            joined = torch.from_numpy(joined.view(f"i{joined.itemsize}"))
            tensor = joined.view(getattr(torch, prune_and_split.DTYPES[dtype]))
        weights[name.removesuffix(".planes")] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_perplexity_of_each_stage(tmp_path):
    """Of planes, and of layers for comparison, as transformers has it."""
    model = make_llama(tmp_path / "model", dtype=torch.float32)
    texts = ["The quick brown fox jumps over the lazy dog", "A line of another length, which is longer than that"] * 3
    (tmp_path / "text.txt").write_text("\n".join(texts) + "\n")
    done = split(model, tmp_path / "planes", "--calibration", tmp_path / "text.txt", "--layers", "1-2")
    noted = json.loads((tmp_path / "planes" / "progressive.json").read_text())["stages"]
    assert [row["weight_error"] > 0.03 for row in noted] == [True, False, False] and noted[-1]["weight_error"] == 0
    assert "too few to go by" in done.stdout and "A server answers from stage" in done.stdout
    assert (tmp_path / "planes" / "planes" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    header, *lines = (tmp_path / "planes" / "planes" / "perplexity.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    found = {(row["kind"], int(row["stage"])): float(row["perplexity"]) for row in rows}
    assert list(found) == [("planes", 1), ("planes", 2), ("planes", 3), ("layers", 1), ("layers", 2)]
    tokenizer = AutoTokenizer.from_pretrained(model)

    def expected(folder: Path, *without: int) -> float:
        plain, losses = LlamaForCausalLM.from_pretrained(folder).eval(), []
        for layer in without:
            plain.model.layers[layer] = PassLayer()
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.inference_mode():
                logits = plain(ids, use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        return pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)

    manifest = json.loads((tmp_path / "planes" / "progressive.json").read_text())
    noted = [row["perplexity"] for row in manifest["stages"]]
    assert noted == pytest.approx([found["planes", stage] for stage in (1, 2, 3)], rel=1e-6)
    assert (manifest["calibration"]["source"], manifest["calibration"]["samples"]) == ("text.txt", 6)
    assert found["planes", 3] == expected(model) != found["planes", 1]
    assert found["planes", 1] == expected(at_stage(tmp_path / "planes", 1, model, tmp_path / "stage1"))
    assert found["layers", 1] == expected(model, 1, 2)
    assert found["layers", 2] == expected(model, 2)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["MODEL", "OUT", "--planes", "1,2"], "--planes 1,2"),
        (["MODEL", "OUT", "--planes", "rest"], "--planes rest"),
        (["MODEL", "OUT", "--planes", "0,rest"], "--planes 0,rest"),
        (["MODEL", "OUT", "--planes", "--layers", "1-2"], "--layers"),
        (["MODEL", "OUT", "--planes", "--stages", "3"], "--stages"),
        (["MODEL", "OUT", "--planes", "--restore"], "--restore"),
        (["--restore", "MODEL"], "--restore"),
        (["--restore", "LAYERS", "OUT"], "layers"),
    ],
)
def test_bad_arguments(arguments, named, planes_tiny, split_tiny, tmp_path):
    places = {"MODEL": planes_tiny.with_name("model"), "OUT": tmp_path / "out", "LAYERS": split_tiny}
    done = run_main(prune_and_split, *(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2 and named in done.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_damaged_stage_is_not_restored(stage, planes_tiny, tmp_path):
    copy = Path(shutil.copytree(planes_tiny, tmp_path / "copy"))
    flip_last_byte(copy / f"model-stage{stage}.safetensors")
    done = run_main(prune_and_split, "--restore", copy, tmp_path / "out")
    assert done.returncode == 2 and "damaged" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- progressive_serve.py ---------------------------------------------------------------------------


PROMPTS = ["Hello", "The quick brown fox jumps", "x" * 300, *(f"{number} times" * number for number in range(3, 64))]


FINAL_STATES = {
    # class, its configuration, dtype that it is stored in and served with, options of prune_and_split.py
    "llama": (LlamaForCausalLM, {}, "bfloat16"),
    "llama, several files per stage": (LlamaForCausalLM, {}, "bfloat16", "--max-file-gib", 1e-4),
    "llama, float16": (LlamaForCausalLM, {}, "float16"),
    "llama, float32": (LlamaForCausalLM, {}, "float32"),
    "llama, tied": (LlamaForCausalLM, {"tie_word_embeddings": True}, "bfloat16"),
    "mistral": (MistralForCausalLM, {}, "bfloat16"),
    "qwen3": (Qwen3ForCausalLM, {"head_dim": 32}, "bfloat16"),
    "phi3": (Phi3ForCausalLM, {"pad_token_id": 0}, "bfloat16"),
    "olmo2": (Olmo2ForCausalLM, {}, "bfloat16"),
    "gemma3, tied": (Gemma3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}, "bfloat16"),
}


@pytest.mark.server
@pytest.mark.parametrize(
    "case, count",
    [("llama", 16), ("gemma3, tied", 16), *(pytest.param(case, 64, marks=pytest.mark.slow) for case in FINAL_STATES)],
)
def test_last_stage_is_the_source(case, count, probe, tmp_path):
    """Planes that have sharpened a model in place, requests between: to the last bit what stock vLLM serves."""
    model_class, config, dtype, *options = FINAL_STATES[case]
    model = make_llama(tmp_path / "model", model_class, dtype=getattr(torch, dtype), **config)
    split(model, tmp_path / "planes", *options)
    found = probe("brief", checkpoint=tmp_path / "planes", source=model, dtype=dtype, prompts=PROMPTS[:count])
    assert len(found["stock"]) == count
    assert found["stage3"] == found["stock"]


@pytest.mark.server
@pytest.mark.parametrize("order", [-1, pytest.param(1, marks=pytest.mark.slow)])
def test_head_beside_tied_embeddings(order, probe, tmp_path):
    """vLLM unties them where it finds a head in the file, which a checkpoint of planes calls otherwise."""
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    rows = range(len(tensors["model.embed_tokens.weight"]))[::order]  # another head, or the same once more
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][list(rows)]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    split(model, tmp_path / "planes")
    found = probe("brief", checkpoint=tmp_path / "planes", source=model, dtype="bfloat16", prompts=PROMPTS[:4])
    assert found["stage3"] == found["stock"]


@pytest.mark.server
@pytest.mark.slow
def test_last_stage_is_the_source_in_a_compiled_graph(planes_tiny, probe):
    source = planes_tiny.with_name("model")
    job = {"checkpoint": planes_tiny, "source": source, "dtype": "float32", "compiled": True}
    found = probe("brief", **job, prompts=PROMPTS)
    assert found["stage3"] == found["stock"] != found["stage1"]


@pytest.mark.server
def test_held_stages_are_the_model_at_that_precision(planes_tiny, probe, tmp_path):
    source = planes_tiny.with_name("model")
    models = [*(at_stage(planes_tiny, stage, source, tmp_path / f"stage{stage}") for stage in (1, 2)), source]
    held = []
    for stage, model in enumerate(models, 1):
        found = probe("held", checkpoint=planes_tiny, stage=stage, model=model, prompts=PROMPTS[:16])
        assert found["held"] == found["stock"]
        held.append(found["held"])
    assert held[0] != held[1] != held[2]


def test_adapters_do_not_go_with_planes(planes_tiny, tmp_path):
    copy = Path(shutil.copytree(planes_tiny, tmp_path / "copy"))
    (copy / "adapters" / "stage1").mkdir(parents=True)
    done = run_script(SERVER, copy)
    assert done.returncode == 2 and "adapters" in done.stderr and "planes" in done.stderr


@pytest.mark.parametrize("kind", ["planes", "layers"])
def test_untested_architecture(kind, planes_tiny, split_tiny, tmp_path):
    """Refused by name; only planes can be tried, since nothing is patched for them."""
    import progressive_serve

    copy = Path(shutil.copytree(planes_tiny if kind == "planes" else split_tiny, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text()) | {"architectures": ["NewForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config))
    done = run_script(SERVER, copy)
    assert done.returncode == 2 and "NewForCausalLM" in done.stderr
    assert ("--untested-architecture" in done.stderr) == (kind == "planes")
    plan = progressive_serve.read_plan(copy)
    if kind == "planes":
        progressive_serve.check_architecture(plan, untested=True)
    else:
        with pytest.raises(progressive_serve.UsageError, match="NewForCausalLM"):
            progressive_serve.check_architecture(plan, untested=True)
