"""prune_and_split.py: the scores against a naive computation, the output bit for bit, bad input, kills, full disks.

No engine. About 15 seconds. A scoring run, killed runs and runs that fill a disk are processes, all others are not.
"""

import csv
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from blake3 import blake3
from conftest import SPLIT, add_side_files, make_llama, run_main, run_patched, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import prune_and_split as script

TEXT = "".join(
    f"Fact {number}: the town of number {number * 37} lies on a river, and its bell is old.\n" for number in range(40)
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=8)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "progressive.json").read_text())


def read_header(path: Path) -> tuple[int, dict]:
    """Where the data starts, and the header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return 8 + size, json.loads(file.read(size))


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- angular distance -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(LlamaForCausalLM, {}), (MistralForCausalLM, dict(sliding_window=8))],  # a window shorter than the text
    ids=["llama", "mistral"],
)
def test_angular_distance_equals_naive_computation(model_class, config, tmp_path, monkeypatch):
    folder = make_llama(tmp_path / "model", model_class, num_hidden_layers=8, initializer_range=0.1, **config)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "norm" in name:  # as in a trained model, where the final norm turns the residual
            weights[name] = torch.rand(weights[name].shape, generator=torch.Generator().manual_seed(2)) + 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 256, size, generator=generator) for size in ((5, 24), (2, 11))]  # of two lengths
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = []  # of every layer, then of the final norm: [samples, hidden] at the final token
    for module in [*model.model.layers, model.model.norm]:
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0][:, -1].double()))
    with torch.no_grad():
        for tokens in batches:
            model(tokens)
    inputs = [torch.cat(pair) for pair in zip(inputs[:9], inputs[9:], strict=True)]

    monkeypatch.setattr(script, "FORWARD_BATCH_TOKENS", 48)  # three batches, the last one smaller
    final = script.collect_final_residuals(script.Checkpoint(folder, "tiny"), [tokens.numpy() for tokens in batches])
    distances = script.compute_angular_distances(final)

    assert len(inputs) == 9 and distances.shape == (9, 9)
    naive = {}
    for first in range(8):
        for last in range(first + 1, 9):
            cosine = torch.nn.functional.cosine_similarity(inputs[first], inputs[last], dim=1)
            naive[first, last - first] = (torch.acos(cosine) / math.pi).mean().item()
            assert distances[first, last] == pytest.approx(naive[first, last - first], abs=1e-5)
    after_norm = model.model.norm(inputs[8].float()).double()
    cosine = torch.nn.functional.cosine_similarity(inputs[7], after_norm, dim=1)
    assert abs((torch.acos(cosine) / math.pi).mean().item() - distances[7, 8]) > 1e-3  # the norm is not in the score
    for count in range(1, 8):
        best = min(range(8 - count), key=lambda first: naive[first, count])
        assert script.find_best_start(distances, count) == best


def test_last_layer_is_never_dropped():
    distances = torch.ones(5, 5).double().numpy()
    distances[3, 4] = distances[2, 4] = 0.0  # the blocks that hold the last layer of four
    distances[1, 2] = distances[1, 3] = 0.5
    assert [script.find_best_start(distances, count) for count in (1, 2, 3)] == [1, 1, 0]


def test_scored_run_and_plan_only(tiny, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    options = ["--calibration", "text", "--samples", "12", "--seq-len", "32"]
    planned = run_main(script, tiny, "out", *options, "--plan-only", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert list_names(tmp_path) == ["text"]
    done = run_script(SPLIT, tiny, "out", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list_names(tmp_path) == ["out", "text"]
    assert done.stdout.startswith(planned.stdout)

    folder = tmp_path / "out" / "pruning"
    rows = list(csv.DictReader((folder / "angular_distance.csv").open()))
    assert len(rows) == 8 * 9 / 2
    pairs = {(int(row["first_layer"]), int(row["num_layers"])): float(row["angular_distance"]) for row in rows}
    best = min(range(6), key=lambda first: pairs[first, 2])
    pruning = read_manifest(tmp_path / "out")["pruning"]
    assert pruning == dict(
        method="angular_distance",
        block=[best, best + 1],
        num_layers=2,
        angular_distance=pytest.approx(pairs[best, 2], abs=1e-7),
        calibration=dict(source="text", samples=12, seq_len=32),
    )
    assert (folder / "angular_distance.png").read_bytes().startswith(b"\x89PNG")
    slices = yaml.safe_load((folder / "mergekit.yaml").read_text())["slices"]
    ranges = [part["sources"][0]["layer_range"] for part in slices]
    assert ranges == [[begin, end] for begin, end in ([0, best], [best + 2, 8]) if begin < end]
    table = [line.split() for line in done.stdout.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert ["2", f"{best}-{best + 1}", f"{pairs[best, 2]:.4f}"] in table
    assert [line[0] for line in table[:7]] == [str(count) for count in range(1, 8)]


# ---- the progressive checkpoint ---------------------------------------------------------------------

CASES = {
    "float32": dict(),
    "float16": dict(dtype=torch.float16),
    "bfloat16-sharded": dict(dtype=torch.bfloat16, shard_size="500KB"),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True),
    "mistral": dict(model_class=MistralForCausalLM, dtype=torch.bfloat16),
    "old-buffers": dict(),
    "cut-files": dict(shard_size="1MB"),
}


@pytest.fixture(scope="module", params=CASES)
def split(request, tmp_path_factory) -> tuple[Path, Path]:
    """(source, progressive checkpoint): layers 3-5 of 8 pruned, three stages."""
    folder = tmp_path_factory.mktemp(request.param)
    source = make_llama(folder / "source", num_hidden_layers=8, **CASES[request.param])
    if request.param == "old-buffers":  # checkpoints of 2023 hold rotary frequencies in every layer
        tensors = load_file(source / "model.safetensors")
        for layer in range(8):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(16) + layer
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "README.md").write_text("not copied")
    (source / "checkpoint-1").mkdir()
    options = ["--max-file-gib", 500_000 / 2**30] if request.param == "cut-files" else []
    done = run_main(script, "source", "out", "--layers", "3-5", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert list_names(folder) == ["out", "source"]
    return source, folder / "out"


def test_every_tensor_is_the_source_bit_for_bit(split):
    source, out = map(read_tensors, split)
    assert source.keys() == out.keys()
    for name, tensor in source.items():
        assert out[name].dtype == tensor.dtype and out[name].shape == tensor.shape
        assert torch.equal(out[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_from_pretrained_gives_the_same_logits(split):
    tokens = torch.arange(20).reshape(2, 10)
    logits = []
    for folder in split:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(split[1])("a river")["input_ids"]


def test_files_are_aligned_and_in_forward_order(split):
    order = {1: [0, 1, 2, 6, 7], 2: [3, 4], 3: [5]}
    modules = ["input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "post_attention_layernorm"]
    modules += ["gate_proj", "up_proj", "down_proj", "rotary_emb"]
    for stage, layers in order.items():
        names = []
        for path in sorted(split[1].glob(f"model-stage{stage}*.safetensors")):
            start, header = read_header(path)
            assert start % 4096 == 0
            assert header.pop("__metadata__") == {"format": "pt"}
            assert list(header) == sorted(header, key=lambda name: header[name]["data_offsets"])
            names += header
            with safe_open(path, framework="pt") as opened:
                assert set(opened.keys()) == set(header)
        expected = ["model.embed_tokens.weight"] if stage == 1 else []
        for layer in layers:
            own = [name for name in names if name.startswith(f"model.layers.{layer}.")]
            expected += sorted(own, key=lambda name: (modules.index(name.split(".")[-2]), name.endswith(".bias")))
        expected += ["model.norm.weight"] if stage == 1 else []
        expected += ["lm_head.weight"] if "lm_head.weight" in names else []
        assert names == expected


def test_index_and_manifest_agree_with_the_files(split):
    source, out = split
    tensors, manifest = read_tensors(out), read_manifest(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    assert index["weight_map"] == {
        name: path for path in weights for name in read_header(out / path)[1] if "_" != name[0]
    }

    assert manifest["format_version"] == 1 and manifest["num_stages"] == 3 and manifest["num_layers"] == 8
    config = json.loads((source / "config.json").read_text())
    assert [manifest["architecture"]] == config["architectures"] and manifest["dtype"] == config["dtype"]
    assert [(row["stage"], row["kind"]) for row in manifest["stages"]] == [(1, "layers"), (2, "layers"), (3, "layers")]
    assert [row["layers"] for row in manifest["stages"]] == [[0, 1, 2, 6, 7], [3, 4], [5]]
    files = [file for row in manifest["stages"] for file in row["files"]]
    assert sorted(file["name"] for file in files) == weights
    for file in files:
        content = (out / file["name"]).read_bytes()
        assert (file["bytes"], file["blake3"]) == (len(content), blake3(content).hexdigest())
    for row in manifest["stages"]:
        assert row["bytes"] == sum(file["bytes"] for file in row["files"])
    assert manifest["pruning"] == dict(
        method="manual", block=[3, 5], num_layers=3, angular_distance=None, calibration=None
    )
    sizes = {path.name: dict(bytes=path.stat().st_size) for path in source.glob("*.safetensors")}
    assert manifest["source"] == dict(name="source", files=sizes)
    assert set(manifest["tool"]) == {"name", "version", "torch", "transformers", "safetensors"}
    if "cut-files" in str(out):
        parts = len(list(out.glob("model-stage1-*.safetensors")))
        assert parts > 1 and f"model-stage1-{parts:05}-of-{parts:05}.safetensors" in weights
        assert all((out / name).stat().st_size <= 500_000 + 8192 for name in weights)
    else:
        assert weights == [f"model-stage{stage}.safetensors" for stage in (1, 2, 3)]


def test_side_files_are_copied_untouched(split):
    source, out = split
    kept = [name for name in list_names(source) if (source / name).is_file() and "safetensors" not in name]
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(kept)
    for name in kept:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    ours = [path.name for path in out.glob("*.safetensors")]
    assert list_names(out) == sorted([*kept, *ours, "model.safetensors.index.json", "progressive.json", "pruning"])
    assert list_names(out / "pruning") == ["mergekit.yaml"]


def test_a_progressive_checkpoint_is_split_anew(split):
    source, out = split
    done = run_main(script, out, out, "--layers", "1", "--stages", "2", "--force")
    assert done.returncode == 0, done.stderr
    assert list_names(out.parent) == ["out", "source"]
    assert [row["layers"] for row in read_manifest(out)["stages"]] == [[0, 2, 3, 4, 5, 6, 7], [1]]
    before, after = map(read_tensors, split)
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()


# ---- random weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parameters"),  # as their model cards count them
    [
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama3.2-3b", 3_212_749_824),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_synthetic_shapes_are_the_published_ones(shape, parameters, monkeypatch):
    monkeypatch.setattr(script, "SYNTHETIC_POOL", 1001)
    model = script.SyntheticModel(shape, seed=0)
    assert sum(math.prod(tensor.shape) for tensor in model.tensors.values()) == parameters
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config)).state_dict()
    if model.config["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == {
        n: tuple(t.shape) for n, t in expected.items()
    }


@pytest.mark.parametrize(
    ("options", "block"),
    [
        (["--synthetic", "llama2-7b"], "20-27 (fixed)"),  # what the paper calls layers 21-28
        (["--synthetic", "llama2-7b", "--prune", "4"], "27-30 (fixed)"),
        (["--synthetic", "llama2-7b", "--layers", "3-4"], "3-4 (manual)"),
        (["--synthetic", "llama3-8b"], "23-30 (fixed)"),
        (["--synthetic", "tinyllama-1.1b"], "16-20 (fixed)"),
    ],
)
def test_unscored_block_of_a_shape_is_the_papers_where_it_has_one(options, block, monkeypatch, capsys):
    monkeypatch.setattr(script, "SYNTHETIC_POOL", 1001)
    monkeypatch.setattr(sys, "argv", ["prune_and_split.py", *options, "--plan-only"])
    assert script.main() == 0
    assert f"stage 1 leaves out layers {block}" in capsys.readouterr().out


def test_synthetic_weights_are_normal_and_depend_on_seed_and_name(monkeypatch):
    monkeypatch.setattr(script, "SYNTHETIC_POOL", (1 << 21) + 1)
    model, other = script.SyntheticModel("tinyllama-1.1b", seed=0), script.SyntheticModel("tinyllama-1.1b", seed=1)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    weights = script.load_tensor(model, names[0])
    assert weights.shape == (5632, 2048) and weights.dtype == torch.bfloat16
    assert weights.float().mean().abs() < 1e-4 and weights.float().std() == pytest.approx(0.02, rel=0.01)
    assert torch.equal(weights, script.load_tensor(script.SyntheticModel("tinyllama-1.1b", seed=0), names[0]))
    assert not torch.equal(weights, script.load_tensor(model, names[1]))
    assert not torch.equal(weights, script.load_tensor(other, names[0]))
    assert (script.load_tensor(model, "model.norm.weight") == 1).all()
    table = script.load_tensor(model, "model.embed_tokens.weight")  # longer than the pool, as is up_proj
    tokens = torch.tensor([[0, 31999, 17, 16400]])
    assert torch.equal(script.embed_tokens(model, tokens.numpy()), table[tokens])


def test_every_entry_of_the_synthetic_tokenizer_is_visible():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=script.build_synthetic_tokenizer(32000))
    assert len(tokenizer) == 32000
    texts = tokenizer.batch_decode([[number] for number in range(32000)], skip_special_tokens=True)
    assert [number for number, text in enumerate(texts) if not text] == [1, 2]  # bos and eos
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
    text = "What is 2 + 2? {a: 'b'}\n\tno"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.replace("\t", "?")


# ---- bad input --------------------------------------------------------------------------------------


def drop_config(model: Path) -> None:
    (model / "config.json").unlink()


def change_config(**values):
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | values))

    return change


def leave_pickles_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def drop_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def name_missing_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))


def cut(count: int):
    def change(model: Path) -> None:
        os.truncate(
            model / "model.safetensors", count if count >= 0 else os.path.getsize(model / "model.safetensors") + count
        )

    return change


def fill_with_garbage(model: Path) -> None:
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 64)


def fill_with_json_garbage(model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 16) + b'{"a": {"b": 1}} ' + bytes(64))


def store_as_float64(model: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors")


def edit_weights(change):
    """change: what becomes of the tensors by name."""

    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return edit


def halve_rows(name: str):
    return edit_weights(lambda tensors: tensors.update({name: tensors[name][::2].contiguous()}))


def beside(name: str, tensors: dict[str, torch.Tensor]):
    """Another file of weights in the folder."""
    return lambda model: save_file(tensors, model / name)


MORE = {"model.norm.weight": torch.ones(128)}
BAD_MODELS = {
    "no config": (drop_config, "config.json"),
    "garbage config": (lambda model: (model / "config.json").write_text("{"), "config.json"),
    "architecture": (change_config(architectures=["Qwen2ForCausalLM"]), "Qwen2ForCausalLM"),
    "no architecture": (change_config(architectures=None), "architecture"),
    "more layers than weights": (change_config(num_hidden_layers=9), "model.layers.8."),
    "fewer layers than weights": (change_config(num_hidden_layers=7), "layer 7"),
    "pickle": (leave_pickles_only, "pytorch_model.bin"),
    "no weights": (drop_weights, "model.safetensors"),
    "missing shard": (name_missing_shard, "model-00002-of-00002.safetensors"),
    "one byte short": (cut(-1), "model.safetensors"),
    "cut in the header": (cut(100), "model.safetensors"),
    "empty": (cut(0), "model.safetensors"),
    "garbage": (fill_with_garbage, "model.safetensors"),
    "json garbage": (fill_with_json_garbage, "model.safetensors"),
    "float64": (store_as_float64, "F64"),
    "one norm in float64": (
        edit_weights(lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].double()})),
        "model.norm.weight is stored as F64",
    ),
    "a byte order mark": (lambda model: (model / "config.json").write_text("\ufeff{}"), "BOM"),
    "no name of an architecture": (change_config(architectures=[]), "names no architectures"),
    "quantised": (change_config(quantization_config={"quant_method": "compressed-tensors"}), "compressed-tensors"),
    "quantised within": (change_config(text_config={"quantization_config": {"quant_method": "fp8"}}), "fp8"),
    "quantised, as it is said elsewhere": (
        lambda model: (model / "hf_quant_config.json").write_text("{}"),
        "hf_quant_config.json",
    ),
    "a row more than vocab_size": (change_config(vocab_size=511), "[512, 128], and config.json says [511, 128]"),
    "another hidden_size": (change_config(hidden_size=64), "config.json says"),
    "another number of heads": (change_config(num_key_value_heads=4), "[64, 128], and config.json says [128, 128]"),
    "half of a matrix": (halve_rows("model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight"),
    "a weight of another model": (
        edit_weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(32)})),
        "model.layers.0.self_attn.q_norm.weight is no weight",
    ),
    "a tensor twice": (beside("more.safetensors", MORE), "more.safetensors"),
    "weights for Mistral's own loader": (beside("consolidated.safetensors", MORE), "consolidated.safetensors"),
    "an index of nothing": (lambda model: (model / script.INDEX).write_text('{"weight_map": {}}'), "names no files"),
    "far more layers than weights": (change_config(num_hidden_layers=10**12), "model.layers.8."),
    "a tensor of a layer missing": (
        edit_weights(lambda tensors: tensors.pop("model.layers.7.mlp.up_proj.weight")),
        "model.layers.7.mlp.up_proj.weight",
    ),
    "no output": (edit_weights(lambda tensors: tensors.pop("lm_head.weight")), "lm_head.weight"),
    "biases that are not there": (change_config(attention_bias=True), "self_attn.k_proj.bias"),
    "a text_config that is none": (change_config(text_config="x", vocab_size=511), "[512, 128]"),
    "a name of ours": (lambda model: (model / "pruning").mkdir(), "would be taken for the checkpoint's own pruning"),
}
BAD_ANYWHERE = (  # of a LLaMA
    *("more layers than weights", "fewer layers than weights", "far more layers than weights", "float64", "no output"),
    *("a tensor of a layer missing", "a weight of another model", "biases that are not there"),
    *("no name of an architecture", "no architecture", "quantised", "a row more than vocab_size", "a tensor twice"),
    *("weights for Mistral's own loader", "a name of ours"),
)
BAD_OPTIONS = {
    "layers out of range": ["--layers", "5-12"],
    "layers far out of range": ["--layers", "0-99999999999"],
    "last layer": ["--layers", "5-7"],
    "not contiguous": ["--layers", "2,4"],
    "backwards": ["--layers", "5-3"],
    "no layers": ["--layers", "five"],
    "too many stages": ["--layers", "3-4", "--stages", "4"],
    "one stage": ["--layers", "3-4", "--stages", "1"],
    "prune all": ["--prune", "8"],
    "prune none": ["--prune", "0"],
    "both": ["--prune", "2", "--layers", "3-4"],
    "no calibration file": ["--calibration", "./nothing.txt"],
    "shape": ["--synthetic", "gpt-5"],
}


def check_refusal(result: subprocess.CompletedProcess, work: Path, before: list[str], value: str) -> None:
    assert result.returncode == 2, result.stderr
    assert value in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("usage: ")]
    assert 1 <= len(lines) <= 2 and lines[0].startswith(f"{SPLIT.name}: error: ")
    assert result.stdout == ""
    assert list_names(work) == before


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_is_refused(case, tiny, tmp_path):
    change, value = BAD_MODELS[case]
    shutil.copytree(tiny, tmp_path / "model")
    change(tmp_path / "model")
    result = run_main(script, "model", "out", "--layers", "3-4", cwd=tmp_path)
    check_refusal(result, tmp_path, ["model"], value)


@pytest.mark.parametrize("case", BAD_ANYWHERE)
def test_bad_model_is_refused_for_planes(case, tiny, tmp_path):
    """Before anything is coded."""
    change, value = BAD_MODELS[case]
    shutil.copytree(tiny, tmp_path / "model")
    change(tmp_path / "model")
    result = run_main(script, "model", "out", "--planes", cwd=tmp_path)
    check_refusal(result, tmp_path, ["model"], value)


def test_weights_are_those_that_vllm_loads(tiny, tmp_path):
    """Of a single file that is stale, and of shards with an index, it takes the shards."""
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    model = make_llama(tmp_path / "model", shard_size="1MB", num_hidden_layers=8, initializer_range=0.1)
    shutil.copy(tiny / "model.safetensors", model / "model.safetensors")
    shards = filter_duplicate_safetensors_files(list(map(str, model.glob("*.safetensors"))), str(model), script.INDEX)
    assert len(shards) > 1
    done = run_main(script, model, tmp_path / "out", "--layers", "3-4")
    assert done.returncode == 0 and "left behind: model.safetensors" in done.stdout
    found, expected = read_tensors(tmp_path / "out"), {}
    for shard in shards:
        expected |= load_file(shard)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    (model / "model.safetensors").unlink()
    (model / script.INDEX).unlink()  # then it takes all that there are
    assert run_main(script, model, tmp_path / "again", "--layers", "3-4").returncode == 0
    assert read_tensors(tmp_path / "again").keys() == expected.keys()


@pytest.mark.parametrize("options", [["--layers", "3-4"], ["--planes"]])
def test_all_that_is_not_weights_goes_along(options, tiny, tmp_path):
    """With its folders; what stays is named; and it comes back."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    names = add_side_files(model)
    done = run_main(script, model, tmp_path / "out", *options)
    assert "left behind: .cache, original/consolidated.00.pth, pytorch_model.bin\n" in done.stdout
    folders = [tmp_path / "out"]
    if "--planes" in options:
        assert run_main(script, "--restore", tmp_path / "out", tmp_path / "restored").returncode == 0
        folders.append(tmp_path / "restored")
        assert not (tmp_path / "restored" / "progressive.json").exists()
    for folder in folders:
        assert [name for name in names if (folder / name).read_text() == f"{name}\n"] == names
        assert not (folder / "pytorch_model.bin").exists() and not (folder / ".cache").exists()


@pytest.mark.parametrize("options", [["--layers", "3-4"], ["--planes"]])
def test_links_are_followed_but_not_in_a_circle(options, tiny, tmp_path):
    """The Hub's cache is made of links; a link that leads nowhere, or around, stays and is named."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "own.txt").write_text("own")
    (model / "linked").symlink_to(tmp_path / "blobs")
    (model / "one.txt").symlink_to(tmp_path / "blobs" / "own.txt")
    (tmp_path / "blobs" / "around").symlink_to(model)
    (model / "broken.json").symlink_to(tmp_path / "nothing")
    done = run_main(script, model, tmp_path / "out", *options)
    assert done.returncode == 0 and "left behind: broken.json, linked/around\n" in done.stdout
    assert (tmp_path / "out" / "linked" / "own.txt").read_text() == "own"
    assert (tmp_path / "out" / "one.txt").read_text() == "own"
    assert list_names(tmp_path / "out" / "linked") == ["own.txt"]


def test_checkpoint_below_its_model_is_no_part_of_it(tiny, tmp_path):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    for _ in range(2):
        assert run_main(script, model, model / "progressive", "--layers", "3-4", "--force").returncode == 0
    assert not (model / "progressive" / "progressive").exists()


def test_what_a_tokenizer_appends_is_not_scored(tiny):
    """It would be the final token of every document, whose residual stream scores the layers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    plain = script.tokenize(tokenizer, " Who? ")
    processor = TemplateProcessing(single="<300> $A <301>", special_tokens=[("<300>", 300), ("<301>", 301)])
    tokenizer.backend_tokenizer.post_processor = processor
    assert script.tokenize(tokenizer, " Who? ") == [300, *plain]


def test_a_byte_order_mark_is_no_text(tiny, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "marked").write_text(TEXT, encoding="utf-8-sig")
    source = script.Checkpoint(tiny, "tiny")
    plain, marked = (script.sample_tokens(source, str(tmp_path / name), 9, 64) for name in ("text", "marked"))
    assert [batch.tolist() for batch in plain] == [batch.tolist() for batch in marked]


def test_tokenizer_with_code_of_its_own_is_refused_where_it_is_needed(tiny, tmp_path):
    """Nobody is asked whether it may be run, and nothing waits for an answer."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "text").write_text(TEXT)
    result = run_main(script, "model", "out", "--calibration", "text", cwd=tmp_path)
    check_refusal(result, tmp_path, ["model", "text"], "tokenizer")


@pytest.mark.parametrize("options", [[], ["--planes"]])
def test_damaged_tokenizer_is_refused_where_it_is_needed(options, tiny, tmp_path):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / "tokenizer.json").write_text('{"version": 1}')
    (tmp_path / "text").write_text(TEXT)
    result = run_main(script, "model", "out", "--calibration", "text", *options, cwd=tmp_path)
    check_refusal(result, tmp_path, ["model", "text"], "no tokenizer in model (KeyError")


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENODATA])
def test_file_system_without_sendfile(error, tiny, tmp_path, monkeypatch):
    """GPFS refuses it so, and Lustre."""

    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "sendfile", refuse)
    done = run_main(script, tiny, tmp_path / "out", "--layers", "3-4")
    assert done.returncode == 0, done.stderr
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tiny)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_disk_that_cannot_be_read_is_named(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    result = run_main(script, tiny, "out", "--planes", cwd=tmp_path)
    assert result.returncode == 2 and "model.safetensors cannot be read (Input/output error)" in result.stderr
    assert list_names(tmp_path) == []


@pytest.mark.parametrize("options", [["--layers", "3-4"], ["--planes"]])
@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_disk_that_cannot_be_written_is_named(error, options, tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(error, os.strerror(error))  # as write() raises it, without the name of a file

    monkeypatch.setattr(script, "write_all", fail)
    result = run_main(script, tiny, "out", *options, cwd=tmp_path)
    assert result.returncode == 2 and f"{tmp_path / 'out'} cannot be used ({os.strerror(error)})" in result.stderr
    assert list_names(tmp_path) == []


@pytest.mark.parametrize("name", ["my model: v2 #1", "- x", "&y", "'\"", "\N{GRINNING FACE} \u2028"])
def test_mergekit_file_is_yaml_whatever_the_model_is_called(name, tiny, tmp_path):
    model = Path(shutil.copytree(tiny, tmp_path / name))
    assert run_main(script, model, tmp_path / "out", "--layers", "3-4").returncode == 0
    slices = yaml.safe_load((tmp_path / "out" / "pruning" / "mergekit.yaml").read_text())["slices"]
    assert {source["model"] for row in slices for source in row["sources"]} == {model.name}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_refused(case, tiny, tmp_path):
    result = run_main(script, tiny, "out", *BAD_OPTIONS[case], cwd=tmp_path)
    check_refusal(result, tmp_path, [], BAD_OPTIONS[case][-1])


def test_bad_calibration_is_refused(tiny, tmp_path):
    (tmp_path / "blank").write_text("\n\n\n")
    (tmp_path / "binary").write_bytes(bytes([0xFF, 0xFE, 0xFD]))
    before = list_names(tmp_path)
    for name in ("blank", "binary"):
        check_refusal(run_main(script, tiny, "out", "--calibration", name, cwd=tmp_path), tmp_path, before, name)


@pytest.mark.parametrize("model", ["./nowhere", "nowhere", "/nowhere/at/all", "tests/nowhere"])
def test_missing_model_is_refused(model, tmp_path):
    (tmp_path / "tests").mkdir()  # so tests/nowhere is a mistyped path, no Hub id
    check_refusal(run_main(script, model, "out", cwd=tmp_path), tmp_path, ["tests"], model)


def test_missing_demo_model_is_refused(tmp_path):
    (tmp_path / "demo").mkdir()
    check_refusal(run_main(script, cwd=tmp_path), tmp_path, ["demo"], "demo/train_demo_llama.py")


def test_model_without_tokenizer_cannot_be_scored(tiny, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, tmp_path)
    result = run_main(script, tmp_path, "out", "--calibration", "config.json", cwd=tmp_path)
    check_refusal(result, tmp_path, ["config.json", "model.safetensors"], "tokenizer")


@pytest.mark.parametrize("out", ["/sys/out", "missing/out", "file/out"])
def test_output_that_cannot_be_made_is_refused(out, tiny, tmp_path):
    (tmp_path / "file").touch()
    result = run_main(script, tiny, out, "--layers", "3-4", cwd=tmp_path)
    check_refusal(result, tmp_path, ["file"], str(Path(out).parent))


def test_existing_output_is_replaced_by_force_only(tiny, tmp_path):
    command = [tiny, "out", "--layers", "3-4"]
    assert run_main(script, *command, cwd=tmp_path).returncode == 0
    (tmp_path / "out" / "adapters").mkdir()
    check_refusal(run_main(script, *command, cwd=tmp_path), tmp_path, ["out"], "--force")
    assert (tmp_path / "out" / "adapters").is_dir()
    assert run_main(script, tiny, "out", "--layers", "1-2", "--force", cwd=tmp_path).returncode == 0
    assert list_names(tmp_path) == ["out"]
    assert not (tmp_path / "out" / "adapters").exists()
    assert read_manifest(tmp_path / "out")["pruning"]["block"] == [1, 2]


def test_force_spares_what_is_no_progressive_checkpoint(tiny, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    result = run_main(script, tiny, "thesis", "--layers", "3-4", "--force", cwd=tmp_path)
    check_refusal(result, tmp_path, ["thesis"], "thesis")
    assert list_names(tmp_path / "thesis") == ["chapter"]


# ---- kills and full disks ---------------------------------------------------------------------------


KILLED_WHILE_WRITING = """
def send(self, name, out, real=script.Checkpoint.send):
    if name.startswith("model.layers.6."):
        signal.raise_signal(signal.SIGKILL)
    real(self, name, out)

script.Checkpoint.send = send
"""


@pytest.mark.parametrize("old", [False, True], ids=["new", "force"])
def test_killed_run_leaves_nothing_or_the_old_one(old, tiny, tmp_path):
    command = [tiny, "out", "--layers", "3-4", "--force"]
    if old:
        assert run_main(script, *command, cwd=tmp_path).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out/*") if path.is_file()}
    # Killed after some time, a run had now and then ended before.
    killed = run_patched(script, KILLED_WHILE_WRITING, *command, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / ".out.partial" / "model-stage1.safetensors").stat().st_size > 100_000
    assert (tmp_path / "out").exists() == old
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out/*") if path.is_file()} == before

    assert run_main(script, *command, cwd=tmp_path).returncode == 0
    assert list_names(tmp_path) == ["out"]
    assert read_tensors(tmp_path / "out").keys() == read_tensors(tiny).keys()
    assert read_manifest(tmp_path / "out")["source"]["name"] == "tiny"


def test_old_checkpoint_returns_after_a_kill_between_the_renames(tiny, tmp_path):
    command = [tiny, "out", "--layers", "3-4"]
    assert run_main(script, *command, cwd=tmp_path).returncode == 0
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    (tmp_path / ".out.partial").mkdir()
    result = run_main(script, *command, cwd=tmp_path)
    assert result.returncode == 2 and "--force" in result.stderr
    assert read_manifest(tmp_path / "out")["pruning"]["block"] == [3, 4]
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "remains").touch()
    assert run_main(script, *command, "--force", cwd=tmp_path).returncode == 0
    assert list_names(tmp_path) == ["out"]


def test_second_writer_is_refused_and_spares_the_first(tiny, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model-stage1.safetensors").touch()
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_main(script, tiny, "out", "--layers", "3-4", cwd=tmp_path)
        check_refusal(result, tmp_path, [".out.partial"], "another run")
        assert (partial / "model-stage1.safetensors").exists()


@pytest.mark.parametrize("limit", ["size=1m", "size=64m,nr_inodes=6"], ids=["known beforehand", "while writing"])
def test_full_disk_leaves_nothing(limit, tiny, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    try:
        result = run_script(SPLIT, tiny, "out", "--layers", "3-4", cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert str(tmp_path / "out") in result.stderr and "another disk" in result.stderr
        assert list_names(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---- help -------------------------------------------------------------------------------------------


def test_help_fits_80_columns_and_names_the_numbering():
    result = run_main(script, "--help", COLUMNS="80")
    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "the paper counts from 1" in result.stdout
    for shape in script.SYNTHETIC_SHAPES:
        assert shape in result.stdout
