"""progressive_serve.py's reader, cache, decoder and journal, and what they read: checkpoints, adapters, object stores.

Nothing starts an engine; about fifty tests start a reader process, which takes a second or less; about a minute.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import add_adapter, add_side_files, edit_config, load_stage, run_script, serving_plan
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from servers import SERVER, age, flip_last_byte, small_disk, wait_for

# ---- kinds of stages, stage plan -------------------------------------------------------------------


def edit_manifest(checkpoint: Path, change) -> None:
    manifest = json.loads((checkpoint / "progressive.json").read_text())
    change(manifest)
    (checkpoint / "progressive.json").write_text(json.dumps(manifest))


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    os.utime(path, (0, 0))


BAD_CHECKPOINTS = {
    "no manifest": (lambda folder: (folder / "progressive.json").unlink(), "progressive.json"),
    "quantised": (lambda folder: edit_config(folder, quantization_config={"quant_method": "awq"}), "awq"),
    "quantised, as ModelOpt says it": (
        lambda folder: (folder / "hf_quant_config.json").touch(),
        "hf_quant_config.json",
    ),
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
    "unknown kind": (lambda folder: edit_manifest(folder, lambda m: m["stages"][1].update(kind="tiles")), "tiles"),
    "two kinds": (
        lambda folder: edit_manifest(folder, lambda m: m["stages"][1].update(kind="planes", bits=1)),
        "several kinds",
    ),
    "a perplexity that is none": (
        lambda folder: edit_manifest(folder, lambda m: m["stages"][0].update(perplexity=0.5)),
        "malformed",
    ),
    "layers missing": (lambda folder: edit_manifest(folder, lambda m: m["stages"].pop()), "layers"),
    "file missing": (lambda folder: (folder / "model-stage1.safetensors").unlink(), "model-stage1.safetensors"),
    "file truncated": (lambda folder: truncate(folder / "model-stage1.safetensors"), "model-stage1.safetensors"),
    "adapter of no stage": (lambda folder: (folder / "adapters/stage9").mkdir(parents=True), "stage9"),
    "a tensor too many": (
        lambda folder: rewrite(folder, 3, lambda found: found.update({"model.more": torch.ones(1)})),
        "model.more",
    ),
    "checksum of stage 1": (lambda folder: flip_last_byte(folder / "model-stage1.safetensors"), "model-stage1"),
}


def rewrite(checkpoint: Path, stage: int, change) -> None:
    """Change the tensors of a stage's file, whose size and checksum the manifest then has."""
    from blake3 import blake3
    from safetensors.torch import save_file

    path = checkpoint / f"model-stage{stage}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    sizes = {"bytes": path.stat().st_size, "blake3": blake3(path.read_bytes()).hexdigest()}
    edit_manifest(checkpoint, lambda manifest: manifest["stages"][stage - 1]["files"][0].update(sizes))


MISMATCHES = {
    # (fixture, stage, what becomes of its tensors) -> what the error names
    "shape": ("split_tiny", 3, lambda found: cut_tensor(found, "mlp.up_proj.weight"), "F32 [4, 4]"),
    "dtype": ("split_tiny", 3, lambda found: halve(found, "mlp.up_proj.weight"), "F16"),
    "a tensor is missing": ("split_tiny", 2, lambda found: drop(found, "input_layernorm.weight"), "missing"),
    "a tensor too many": ("split_tiny", 2, lambda found: found.update({"model.more": torch.ones(1)}), "model.more"),
    "of a layer too many": (
        "split_tiny",
        2,
        lambda found: found.update({"model.layers.1.more": torch.ones(1)}),
        "layers.1.more",
    ),
    "another stage's layer": (
        "split_tiny",
        3,
        lambda found: found.update({name.replace("layers.2", "layers.0"): found[name].clone() for name in list(found)}),
        "layers [0, 2] instead of [2]",
    ),
    "a record is missing": ("planes_tiny", 2, lambda found: drop(found, "up_proj.weight.planes"), "up_proj"),
    "a record too many": ("planes_tiny", 3, lambda found: found.update({"x.planes": torch.ones(1)}), "x.planes"),
}


def named(tensors: dict, ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


def cut_tensor(tensors: dict, ending: str) -> None:
    tensors[named(tensors, ending)] = torch.ones(4, 4)


def halve(tensors: dict, ending: str) -> None:
    tensors[named(tensors, ending)] = tensors[named(tensors, ending)].half()


def drop(tensors: dict, ending: str) -> None:
    del tensors[named(tensors, ending)]


@pytest.mark.parametrize("case", MISMATCHES)
def test_files_that_do_not_fit_the_manifest_are_refused(read, case, request, tmp_path):
    """Of any stage, before anything is served: by a look at the headers, beside the reading."""
    fixture, stage, change, says = MISMATCHES[case]
    folder = Path(shutil.copytree(request.getfixturevalue(fixture), tmp_path / "checkpoint"))
    rewrite(folder, stage, change)
    reading = read(folder, limit_mbps=0.001)
    try:
        reading.wait_for(lambda progress: progress.errors)
        assert f"model-stage{stage}" in reading.progress.error and says in reading.progress.error
        assert reading.progress.last_stage() == 0 and reading.launch.start_failure()
        assert reading.launch.reader.wait(300) == 1
    finally:
        reading.launch.close()


def with_measures(checkpoint: Path, name: str, values: tuple) -> Path:
    """The checkpoint, as if prune_and_split.py had measured these, one for each stage; None: not measured."""

    def change(manifest: dict) -> None:
        for row, value in zip(manifest["stages"], values, strict=True):
            row[name] = value

    edit_manifest(checkpoint, change)
    return checkpoint


@pytest.mark.parametrize(
    ("perplexities", "options", "min_stage"),
    [
        ((40.0, 24.1, 24.0), {}, 2),
        ((40.0, 24.1, 24.0), {"max_loss": 70.0}, 1),
        ((40.0, 24.1, 24.0), {"max_loss": 0.1}, 3),
        ((24.0, 24.0, 24.0), {"max_loss": 0.0}, 1),
        ((40.0, 24.1, 24.0), {"min_stage": 1}, 1),
        ((40.0, 24.1, 24.0), {"hold_stage": 1}, 1),
        ((40.0, 30.0, 24.0), {"hold_stage": 2}, 2),
        ((None, None, None), {}, 1),
        ((40.0, None, 24.0), {}, 1),
    ],
)
def test_first_stage_that_answers_is_one_of_little_loss(read, perplexities, options, min_stage, copied):
    with_measures(copied, "perplexity", perplexities)
    reading = read(copied, **{"min_stage": None, **options})
    try:
        assert reading.launch.serving.min_stage == min_stage
        rows = reading.progress.as_dict()["stages"]
        assert [row.get("perplexity") for row in rows] == list(perplexities)
        assert reading.progress.as_dict()["min_stage"] == min_stage
    finally:
        reading.launch.close()


@pytest.mark.parametrize(
    ("errors", "perplexities", "min_stage"),
    [
        ((0.11, 0.03, 0.0), (None, None, None), 2),
        ((0.11, 0.031, 0.0), (None, None, None), 3),
        ((0.03, 0.01, 0.0), (None, None, None), 1),
        ((None, None, None), (None, None, None), 3),  # made by an earlier version: only the exact model is known
        ((0.11, 0.1, 0.0), (24.1, 24.0, 24.0), 1),  # a perplexity says more
    ],
)
def test_stage_of_planes_that_answers_first_has_little_error(
    errors, perplexities, min_stage, read, planes_tiny, tmp_path
):
    copied = age(Path(shutil.copytree(planes_tiny, tmp_path / "copy")))
    with_measures(with_measures(copied, "weight_error", errors), "perplexity", perplexities)
    reading = read(copied, min_stage=None)
    try:
        assert reading.launch.serving.min_stage == min_stage
    finally:
        reading.launch.close()


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


@pytest.mark.parametrize("name", ["../x.safetensors", "{}/x.safetensors", "below/x.safetensors", "..", "."])
def test_manifest_names_files_of_its_own_folder_only(name, copied):
    """Also where there is such a file: a manifest from the network must not say what the server reads."""
    import progressive_serve

    for folder in (copied.parent, copied / "below"):
        folder.mkdir(exist_ok=True)
        shutil.copy(copied / "model-stage1.safetensors", folder / "x.safetensors")
    name = name.format(copied.parent)
    edit_manifest(copied, lambda manifest: manifest["stages"][0]["files"][0].update(name=name))
    with pytest.raises(progressive_serve.UsageError, match="points outside"):
        progressive_serve.read_plan(copied)


# ---- stage adapters --------------------------------------------------------------------------------


def test_adapters_can_be_left_out(adapted_checkpoint):
    import progressive_serve

    for adapters, stages in ((True, [1, 2]), (False, [])):
        launch = progressive_serve.start_reading(adapted_checkpoint, adapters=adapters, start=time.monotonic())
        launch.close()
        assert list(launch.serving.adapters) == stages


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
    "pissa": (lambda folder: edit_adapter(folder, init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "an option of tomorrow": (lambda folder: edit_adapter(folder, use_tomorrow={"a": 1}), "use_tomorrow"),
    "endless scaling": (lambda folder: edit_adapter(folder, lora_alpha=float("inf")), "lora_alpha is inf"),
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


# Options of PEFT's LoraConfig that change what an adapter computes: a new one is to be judged here.
NOT_PLAIN = {
    "fan_in_fan_out", "bias", "modules_to_save", "rank_pattern", "alpha_pattern", "megatron_config",
    "trainable_token_indices", "loftq_config", "corda_config", "lora_ga_config", "use_dora", "velora_config",
    "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "lora_bias",
    "target_parameters", "use_bdlora", "arrow_config", "kasa_config",
}  # fmt: skip


def test_every_option_of_an_adapter_is_known(copied):
    """Of the installed PEFT: those that may be anything, and those that have to be off."""
    import progressive_serve

    plan = progressive_serve.read_plan(copied)
    add_adapter(copied, 1, ["q_proj"])
    options = {field.name for field in fields(LoraConfig)}
    plain = {*progressive_serve.PLAIN_LORA_OPTIONS, "init_lora_weights"}
    assert options <= plain | NOT_PLAIN and not plain & NOT_PLAIN
    for option in sorted(options - plain):
        usual = json.loads((copied / "adapters/stage1/adapter_config.json").read_text())[option]
        edit_adapter(copied, **{option: "all"})
        with pytest.raises(progressive_serve.UsageError, match=f"uses {option},"):
            progressive_serve.read_adapter(plan, 1)
        edit_adapter(copied, **{option: usual})
    assert progressive_serve.read_adapter(plan, 1)


@pytest.mark.parametrize("begun", [True, False, "gaussian", "orthogonal", "pissa", "olora"])
def test_merged_adapter_is_what_peft_loads(begun, copied):
    """W + scaling x B A, or a refusal."""
    import progressive_serve

    model = load_stage(copied, 1)
    name, path = "model.layers.0.self_attn.q_proj.weight", copied / "adapters" / "stage1"
    weight = model.get_parameter(name).detach().clone()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=begun, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(path)
    plan = progressive_serve.read_plan(copied)
    if begun in ("pissa", "olora"):
        with pytest.raises(progressive_serve.UsageError, match=f"init_lora_weights='{begun}'"):
            progressive_serve.read_adapter(plan, 1)
        return
    adapter = progressive_serve.read_adapter(plan, 1)
    expected = PeftModel.from_pretrained(load_stage(copied, 1), path).merge_and_unload().get_parameter(name)
    assert not torch.equal(expected, weight)
    torch.testing.assert_close(adapter.merge(weight, adapter.load()[name]), expected.detach())


@pytest.mark.parametrize("case", [*BAD_ADAPTERS, "of no stage"])
def test_bad_adapter_is_left_out_on_demand(read, case, split_tiny, tmp_path, capsys):
    """Loudly; and one that is good stays."""
    folder = Path(shutil.copytree(split_tiny, tmp_path / "checkpoint"))
    add_adapter(folder, 1, ["q_proj"])
    BAD_ADAPTERS.get(case, (lambda folder: (folder / "adapters/stage9").mkdir(),))[0](folder)
    good = () if case == "of another model" else (2,)
    if good:
        add_adapter(folder, 2, ["q_proj"])
    reading = read(folder, lenient=True)
    try:
        reading.wait_for_all()
        expected = (1, *good) if case in ("of no stage", "of the last stage") else good
        assert reading.launch.serving.adapters == expected
        assert "--lenient-adapters" in capsys.readouterr().err
        progress = reading.progress.as_dict()
        (told,) = (event for event in progress["timeline"] if event["event"] == "not adapted")
        assert told["reason"] and str(folder) not in told["reason"]
        assert [row["adapter"] for row in progress["stages"]] == [stage in expected for stage in (1, 2, 3)]
    finally:
        reading.launch.close()


# ---- where a checkpoint lies: the cache of a remote one --------------------------------------------


def small_files(copy: Path) -> Path:
    """The folder of a copy from which the server takes all but the weights."""
    (folder,) = (path for path in copy.iterdir() if path.is_dir())
    return folder


def test_cache_is_filled_and_used(read, copied, tmp_path):
    add_adapter(copied, 1, ["q_proj"])
    for _ in range(2):
        reading = read(copied, cache_dir=tmp_path / "cache")
        reading.wait_for_all()
        assert reading.launch.reader.wait(300) == 0
        (cached,) = (tmp_path / "cache").iterdir()
        assert reading.plan.root == small_files(cached)
        assert {"progressive.json", "config.json", "tokenizer.json"} <= {
            path.name for path in reading.plan.root.iterdir()
        }
        assert {path.name for path in cached.iterdir() if path.is_file()} == {file.name for file in reading.plan.files}
        assert reading.launch.serving.adapters == (1,)
        for path in copied.glob("*.safetensors"):
            assert (cached / path.name).read_bytes() == path.read_bytes()
        reading.launch.close()
    for path in copied.glob("*.safetensors"):
        path.unlink()  # the third start can only read the copy
    reading = read(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "generation_config.json", "config.json", "adapters/stage1/adapter_config.json"]
)
def test_cache_follows_what_is_mended(read, name, copied, tmp_path):
    """Also where the weights stay the same; and then these are not fetched again."""
    add_adapter(copied, 1, ["q_proj"])
    earlier = read(copied, cache_dir=tmp_path / "cache")
    assert earlier.launch.reader.wait(300) == 0
    before = {path: path.read_bytes() for path in earlier.plan.root.rglob("*") if path.is_file()}
    with open(copied / name, "a") as file:
        file.write(" ")
    for path in copied.glob("*.safetensors"):
        path.unlink()
    reading = read(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()
    assert (reading.plan.root / name).read_bytes() == (copied / name).read_bytes()
    assert {path: path.read_bytes() for path in before} == before  # a server may still read there


def test_small_files_that_went_bad_in_the_cache_are_not_served(read, copied, tmp_path):
    earlier = read(copied, cache_dir=tmp_path / "cache")
    assert earlier.launch.reader.wait(300) == 0
    root = earlier.plan.root
    (root / "tokenizer.json").write_bytes(bytes((root / "tokenizer.json").stat().st_size))
    (root / "progressive.json").write_text("")
    (root / "config.json").unlink()
    (root / "chat_template.jinja").write_text("of nobody")
    reading = read(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()
    assert reading.plan.root == root
    found = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    assert found == {path.name: path.read_bytes() for path in copied.iterdir() if path.name in found}
    assert {"tokenizer.json", "progressive.json", "config.json"} <= set(found)


def test_cache_survives_being_killed(read, split_tiny, hold, tmp_path):
    """Before it has the last stage, which does not come until then."""
    held = hold(split_tiny, after=2)
    copied = held.path
    reading = read(copied, cache_dir=tmp_path / "cache")
    reading.wait_for(lambda progress: 1 in progress.resident)
    reading.launch.reader.kill()
    reading.launch.reader.wait()
    held.release()
    held.end()
    (cached,) = (tmp_path / "cache").iterdir()
    assert not (cached / "model-stage3.safetensors").exists()
    (cached / "model-stage3.safetensors.partial").write_bytes(b"half of it")
    reading = read(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()
    assert reading.launch.reader.wait(300) == 0
    for path in copied.glob("*.safetensors"):
        assert (cached / path.name).read_bytes() == path.read_bytes()
    assert not list(cached.glob("*.partial"))


def test_copy_that_went_bad_is_removed(read, copied, tmp_path):
    reading = read(copied, cache_dir=tmp_path / "cache")
    assert reading.launch.reader.wait(300) == 0
    (cached,) = (tmp_path / "cache").iterdir()
    flip_last_byte(cached / "model-stage2.safetensors")
    reading = read(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()  # from the source, and copied once more
    assert reading.launch.reader.wait(300) == 0
    (told,) = (event for event in reading.progress.timeline if event["event"] == "spoilt")
    assert "model-stage2.safetensors" in told["text"] and "removed" in told["text"]
    flip_last_byte(cached / "model-stage1.safetensors")  # nobody is answered without
    reading = read(copied, cache_dir=tmp_path / "cache")
    reading.wait_for(lambda progress: progress.error)
    assert "model-stage1.safetensors" in reading.progress.error and "start again" in reading.progress.error
    assert not (cached / "model-stage1.safetensors").exists()
    truncate(cached / "model-stage3.safetensors")  # that is seen before anything has been read from it
    reading = read(copied, cache_dir=tmp_path / "cache")
    reading.wait_for_all()
    assert reading.launch.reader.wait(300) == 0
    for path in copied.glob("*.safetensors"):
        assert (cached / path.name).read_bytes() == path.read_bytes()


def test_bad_source_gets_no_copy(copied, tmp_path, read):
    """A copy with its name is taken for good by every server that comes later."""
    bad = copied / "model-stage2.safetensors"
    right = bad.read_bytes()
    flip_last_byte(bad)
    reading = read(copied, cache_dir=tmp_path / "cache")
    reading.wait_for(lambda progress: 2 in progress.bad)
    (cached,) = (tmp_path / "cache").iterdir()
    reading.wait_for(lambda _: not list(cached.glob("model-stage2*.partial")))  # copying ends behind the reading
    assert not (cached / bad.name).exists()
    (tmp_path / "right").write_bytes(right)
    os.rename(tmp_path / "right", bad)
    reading.wait_for_all()
    assert reading.launch.reader.wait(300) == 0
    assert (cached / bad.name).read_bytes() == right


def test_cache_that_cannot_be_written_costs_only_the_copy(copied, tmp_path, monkeypatch):
    import progressive_serve

    plan = progressive_serve.read_plan(copied)
    (file,) = plan.stages[0].files
    journal = progressive_serve.Journal(tmp_path / "journal")
    with open(tmp_path / "memory", "wb"):
        buffer = progressive_serve.WeightBuffer(str(tmp_path / "memory"), plan)
    buffer.lay_out(cache=True)
    copy = progressive_serve.CacheCopy(tmp_path, file, buffer, journal)
    with open("/dev/full", "wb", buffering=0) as full:
        copy.partial = SimpleNamespace(write=full.write, close=full.close, name=copy.partial.name)
        copy.write(0, 4096)
    assert full.closed
    assert buffer.marks[buffer.CACHE][0] == 4096  # nobody waits for it
    (event,) = journal.follow()
    assert event["event"] == "not cached" and "space" in event["reason"]
    assert not list(tmp_path.glob("*.partial"))  # and it takes no room


FULL_DISKS = {  # options of tmpfs, and what finds no room
    "no folder": ("nr_inodes=1", ["config.json", "stage1", "stage2", "stage3"]),
    "nothing": ("size=8k", ["config.json", "stage1", "stage2", "stage3"]),
    "the small files": ("size=64k", ["stage1", "stage2", "stage3"]),
    "all but the last stage": ("size=2600k", ["stage3"]),
    "no more files": ("nr_inodes=13", ["stage2", "stage3"]),
}


@pytest.mark.parametrize("room_for", FULL_DISKS)
def test_full_cache_costs_only_the_copy(read, room_for, copied, tmp_path):
    options, expected = FULL_DISKS[room_for]
    with small_disk(tmp_path / "disk", options) as disk:
        reading = read(copied, cache_dir=disk / "cache")
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
        reading = read(copied, cache_dir=disk / "cache")
        assert reading.launch.reader.wait(300) == 0
        (cached,) = (disk / "cache").iterdir()
        assert reading.plan.root == small_files(cached)
        assert {path.name for path in cached.iterdir() if path.is_file()} == {file.name for file in reading.plan.files}


# ---- where a checkpoint lies: object stores --------------------------------------------------------


def test_side_files_of_a_checkpoint_go_along(copied, tmp_path):
    """All that is neither weights nor hidden, with its folders."""
    import progressive_serve

    names = add_side_files(copied)
    root = progressive_serve.locate(copied, tmp_path / "cache", tmp_path / "scratch").root
    for name in names:
        assert (root / name).read_text() == f"{name}\n"
    usual = {path.relative_to(copied) for path in copied.rglob("*") if path.is_file() and path.suffix != ".safetensors"}
    left = {Path(name) for name in (".cache/notes.txt", "original/consolidated.00.pth", "pytorch_model.bin")}
    assert {path.relative_to(root) for path in root.rglob("*") if path.is_file()} == usual - left


def test_cache_in_the_checkpoint_is_refused(copied, tmp_path):
    """It would be a part of what it is a copy of."""
    import progressive_serve

    with pytest.raises(progressive_serve.UsageError, match="lies in the checkpoint"):
        progressive_serve.locate(copied, copied / "below" / "cache", tmp_path / "scratch")


def test_side_files_of_an_object_store_lie_where_they_lay(bucket, tmp_path, monkeypatch):
    """vLLM finds again what it has compiled for a model by the path of the model: that follows what the files hold."""
    import progressive_serve

    found = [progressive_serve.locate(bucket, None, tmp_path / str(number)).root for number in range(2)]
    assert found[0] == found[1] and found[0].is_relative_to(os.environ["VLLM_CACHE_ROOT"])
    assert (found[0] / "additional_chat_templates/tool_use.jinja").is_file() and not list(tmp_path.iterdir())
    assert not list(found[0].rglob("*.bin")) and [path.parent.name for path in found[0].rglob("*.safetensors")] == [
        "stage1"
    ]
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))  # where nothing can be written it does without
    assert progressive_serve.locate(bucket, None, tmp_path / "scratch").root.is_relative_to(tmp_path / "scratch")


def test_object_store_is_read_and_cached(read, bucket, split_tiny, tmp_path):
    for options in ({}, {"cache_dir": tmp_path / "cache"}):
        reading = read(bucket, **options)
        reading.wait_for_all()
        assert reading.launch.serving.adapters == (1,)
        for file in reading.plan.files:
            assert reading.bytes_of(file.name) == (split_tiny / file.name).read_bytes()
        if options:
            assert reading.launch.reader.wait(300) == 0  # the copies are written
        reading.launch.close()
        reading.launch.reader.wait(300)
    (cached,) = (tmp_path / "cache").iterdir()
    for file in reading.plan.files:
        assert (cached / file.name).read_bytes() == (split_tiny / file.name).read_bytes()


def test_chunks_of_an_object_store_may_come_in_any_order(monkeypatch):
    """What is told to have arrived has, however late the first chunk is."""
    import progressive_serve

    data = os.urandom(10)
    chunks = {number: torch.frombuffer(bytearray(data[4 * number :][:4]), dtype=torch.uint8) for number in range(3)}

    class Streamer(contextlib.ExitStack):
        def stream_files(self, files, memory_limit):
            assert files == [(0, "s3://x", 0, [4, 4, 2])]

        def get_chunks(self):
            return [(0, number, chunks[number]) for number in (1, 2, 0)]

    runai = SimpleNamespace(FileChunks=SimpleNamespace(contiguous=lambda *of: of), FileStreamer=Streamer)
    monkeypatch.setitem(sys.modules, "runai_model_streamer", runai)
    monkeypatch.setattr(progressive_serve, "READ_CHUNK", 4)
    place, arrived = memoryview(bytearray(len(data))), []
    for end in progressive_serve.read_object("s3://x", place, lambda *_: contextlib.nullcontext()):
        assert place[:end] == data[:end]
        arrived.append(end)
    assert arrived == [0, 0, 10]


@pytest.mark.parametrize("uri", ["s3://models/nothing", "s3://nobody/tiny"])
def test_object_store_without_the_checkpoint(bucket, uri, tmp_path):
    done = run_script(SERVER, uri, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 2
    assert uri in done.stderr.strip().splitlines()[-1]
    assert list((tmp_path / "tmp").iterdir()) == []


# ---- serving plan ----------------------------------------------------------------------------------

FIRST_STAGES = {
    # (resident, start_stage, min_stage, the forward pass can wait) -> (bind, serve, streamed)
    "nothing has arrived": ((0, 3, 1, True), (1, 1, True)),
    "two stages have": ((2, 3, 1, True), (2, 2, True)),
    "but it must not begin with two": ((2, 1, 1, True), (1, 1, True)),
    "nobody is to be answered by it": ((1, 3, 2, True), (1, 2, False)),
    "the graph is fixed": ((1, 3, 1, False), (1, 1, False)),
}


@pytest.mark.parametrize("case", FIRST_STAGES)
def test_what_is_bound_and_served_first(case):
    import progressive_serve

    (resident, start_stage, min_stage, streams), decision = FIRST_STAGES[case]
    serving = progressive_serve.ServingPlan("journal", "buffer", start_stage, min_stage, hold_stage=3)
    first = progressive_serve.decide_first_stage(serving, resident, streams, ranks=1)
    assert (first.bind, first.serve, first.streamed) == decision


# ---- journal ---------------------------------------------------------------------------------------


def test_progress_follows_the_journal(split_tiny, tmp_path):
    """States in order, and a line that is still being written is left for the next look."""
    import progressive_serve

    plan = progressive_serve.read_plan(split_tiny)
    progress = progressive_serve.Progress(plan, serving=serving_plan(tmp_path / "journal"))
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
    writer.mark("binding", stage=1, serve=1, streamed=False, ranks=2)
    writer.mark("bound", stage=1, rank=0)
    assert states() == ["resident", "absent", "absent"]
    assert progress.bound_stage() == 0  # the other worker has not bound it
    writer.mark("bound", stage=1, rank=1)
    states()
    assert progress.bound_stage() == 1
    writer.mark("active", at=107.5, stage=1, pause=0.1)
    assert states() == ["active", "absent", "absent"]
    assert progress.as_dict()["stages"][0]["seconds"] == 7.5
    with open(journal.path, "ab") as file:
        file.write(b'{"event": "error", "at": 109')
    assert states() and progress.error is None
    with open(journal.path, "ab") as file:
        file.write(b'.0, "text": "disk on fire", "stage": 3}\n')
    assert states() and progress.error == "disk on fire"
    assert progress.last_stage() == 2  # stage 2 is not spoilt by it


def test_stage_is_shown_as_active_when_its_weights_are_there(split_tiny, tmp_path):
    """Its gates may be open before: requests wait then at the first layer that is missing."""
    import progressive_serve

    progress = progressive_serve.Progress(progressive_serve.read_plan(split_tiny), serving=serving_plan("journal"))
    journal = progressive_serve.Journal(tmp_path / "journal")

    def shown() -> list[str]:
        progress.fold(journal.follow())
        return [event["event"] for event in progress.as_dict()["timeline"]]

    journal.mark("start", at=100.0)
    journal.mark("binding", stage=1, serve=1, streamed=True, ranks=1)
    journal.mark("active", stage=1, pause=0.1)
    assert "active" not in shown() and progress.active_stage == 1
    assert progress.ready_stage() == 0 and progress.seconds_until(1) is None  # before there is a byte
    journal.mark("read", file="model-stage1.safetensors", bytes=10)
    shown()
    assert progress.seconds_until(1) >= 1
    journal.mark("resident", stage=1)
    journal.mark("bound", stage=1, rank=0)
    assert shown() == ["start", "binding", "resident", "bound", "active"]
    assert progress.ready_stage() == 1 and progress.seconds_until(1) == 0


def test_every_follower_sees_every_event(read, split_tiny):
    import progressive_serve

    reading = read(split_tiny)
    reading.launch.reader.wait(300)
    followers = [progressive_serve.Journal(reading.launch.journal.path) for _ in range(2)]
    assert reading.launch.start_failure() is None
    first, second = (follower.follow() for follower in followers)
    assert first == second == reading.launch.journal.read()[0] != []


@pytest.mark.parametrize(
    "event, fields", [("resdent", {"stage": 1}), ("resident", {}), ("resident", {"stage": 1, "rank": 0})]
)
def test_journal_takes_what_its_table_has(event, fields, tmp_path):
    import progressive_serve

    journal = progressive_serve.Journal(tmp_path / "journal")
    with pytest.raises(ValueError, match=event):
        journal.mark(event, **fields)
    assert journal.follow() == []


# ---- weight buffer ---------------------------------------------------------------------------------


def test_memory_goes_back_when_every_worker_is_done(read, split_tiny):
    reading = read(split_tiny)
    reading.buffer.expect(workers=2)
    reading.wait_for_all()
    total = sum(stage.bytes for stage in reading.plan.stages)
    held = reading.memory()
    assert held >= total
    for file in reading.plan.files:
        reading.buffer.release(file.name, file.bytes, reading.buffer.WORKERS)
    assert reading.memory() == held
    for file in reading.plan.files:
        reading.buffer.release(file.name, file.bytes, reading.buffer.WORKERS + 1)
    assert reading.memory() <= held - total + 3 * 4096 * len(reading.plan.files)


def test_reader_stays_in_its_window(read, split_tiny, monkeypatch):
    """On a GPU the host need not hold the whole model: the reader waits for what has been bound."""
    import progressive_serve

    first = progressive_serve.read_plan(split_tiny).stages[0]
    monkeypatch.setattr(progressive_serve, "window_of", lambda plan: first.bytes)
    reading = read(split_tiny)
    reading.wait_for(lambda progress: 1 in progress.resident)
    time.sleep(0.5)  # a reader that waits for nothing would have read the rest meanwhile
    reading.wait_for(lambda progress: True)
    assert reading.progress.resident == {1}
    for file in first.files:
        reading.buffer.release(file.name, file.bytes, reading.buffer.WORKERS)
    reading.wait_for_all()


# ---- reader: files that are slow, short, wrong, gone -----------------------------------------------


def test_reader_delivers_every_byte(read, split_tiny):
    reading = read(split_tiny)
    reading.wait_for_all()
    for file in reading.plan.files:
        assert reading.bytes_of(file.name) == (split_tiny / file.name).read_bytes()
    assert reading.launch.reader.wait(300) == 0


def test_reader_follows_a_file_that_grows(read, copied):
    """A checkpoint that is still being copied to its place."""
    path = copied / "model-stage2.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    reading = read(copied)
    reading.wait_for(lambda progress: 1 in progress.resident)
    for begin in range(1000, len(whole), len(whole) // 5):
        time.sleep(0.2)  # as a copier takes
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


def test_reader_waits_for_files_that_are_still_to_come(read, copied):
    """cp -r makes one file after the other, in any order; rsync gives them their names at the end."""
    import progressive_serve

    parts = {path: path.read_bytes() for path in copied.glob("*.safetensors")}
    for path in parts:
        path.unlink()
    reading = read(copied)
    for path in sorted(parts, reverse=True):
        beginning, rest = parts[path][:100_000], parts[path][100_000:]
        coming = path.with_name(f".{path.name}.x7Qz")
        coming.write_bytes(beginning)
        time.sleep(0.2)  # as a copier takes
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
        read(copied)


@pytest.mark.parametrize("make_room", [os.posix_fallocate, lambda file, _, size: os.truncate(file, size)])
def test_reader_waits_for_a_file_that_was_given_its_room_first(read, make_room, copied):
    """Nobody gets the zeros that stand for what has not been copied, and nobody an error."""
    path = copied / "model-stage1.safetensors"
    data = path.read_bytes()
    with open(path, "wb", buffering=0) as file:
        make_room(file.fileno(), 0, len(data))
        reading = read(copied)
        for begin in range(0, len(data), len(data) // 20 + 1):
            time.sleep(0.1)  # as a copier takes
            reading.wait_for(lambda progress: True)
            assert reading.progress.error is None and not reading.progress.read
            file.write(data[begin : begin + len(data) // 20 + 1])
    reading.wait_for_all()
    assert reading.bytes_of(path.name) == data


@pytest.mark.slow  # the reader waits ten seconds for what may still be copied
def test_reader_says_when_a_file_stays_as_it_was_made(read, copied):
    """Room that was made for a file and never filled: the error comes, if later."""
    path = copied / "model-stage2.safetensors"
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    reading = read(copied)
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


def test_reader_names_the_file_that_is_wrong(read, copied):
    flip_last_byte(copied / "model-stage2.safetensors")
    reading = read(copied)
    reading.wait_for(lambda progress: progress.error)
    assert "model-stage2.safetensors: blake3 checksum" in reading.progress.error
    assert reading.progress.resident == {1} and reading.progress.last_stage() == 1


@pytest.mark.slow  # as before
def test_reader_names_the_file_that_is_gone(read, split_tiny, hold):
    """Deleted after the start."""
    held = hold(split_tiny)
    reading = read(held.path)
    reading.wait_for(lambda progress: 1 in progress.resident)
    held.release(2)
    held.end()
    reading.wait_for(lambda progress: progress.error)
    assert "model-stage3.safetensors" in reading.progress.error
    assert reading.progress.resident == {1, 2}


def test_layers_come_in_the_order_of_the_forward_pass(read, split_tiny):
    import progressive_serve

    launch = read(split_tiny).launch
    source = progressive_serve.StageSource(launch.serving, launch.plan, rank=0, workers=1)
    source.wait_resident(3)
    positions = [progressive_serve.forward_position(name) for name, _ in source.weights(launch.plan.stages)]
    assert positions == sorted(positions) and set(range(4)) < set(positions)


def test_garbage_in_a_header_is_a_wrong_checksum(read, copied):
    """The tensors are bound before the checksum is known: what is told must be the cause, not what followed from it."""
    import progressive_serve

    path = copied / "model-stage1.safetensors"
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"garbage")
    age(copied)
    launch = read(copied).launch
    source = progressive_serve.StageSource(launch.serving, launch.plan, rank=0, workers=1)
    with pytest.raises((ValueError, RuntimeError)):
        list(source.weights(launch.plan.stages[:1]))
    with pytest.raises(RuntimeError, match="model-stage1.safetensors: blake3"):
        source.wait_resident(1)


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
        wait_for(lambda: len(pace.waiting) == len(threads))
    for thread in threads:
        thread.join(300)
    assert order == [10, 20, 30, 40]


def replace_by_another(path: Path) -> None:
    """Of the same size and age."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-64] + bytes(64))
    os.utime(other, (0, 0))
    os.rename(other, path)


def replace_by_a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)  # cannot be opened, not even by root


BAD_FILES = {"replaced": replace_by_another, "cut off": truncate, "unreadable": replace_by_a_link_to_itself}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("replaced", "split_tiny"),
        ("replaced", "planes_tiny"),
        ("unreadable", "split_tiny"),
        pytest.param("cut off", "split_tiny", marks=pytest.mark.slow),  # ten seconds of waiting for the rest
    ],
)
def test_bad_file_of_a_later_stage_is_not_handed_out_and_mended(read, case, kind, hold, request, tmp_path):
    """It comes like this, after the start; once the right one is there, that is handed out."""
    held = hold(request.getfixturevalue(kind), after=2)
    path = held.path / "model-stage3.safetensors"
    right = (held.kept / path.name).read_bytes()
    reading = read(held.path)
    try:
        BAD_FILES[case](held.kept / path.name)
        held.release()
        held.end()
        os.utime(held.path, (0, 0))
        reading.wait_for(lambda progress: progress.bad)
        assert path.name in reading.progress.error and reading.progress.last_stage() == 2
        assert 3 not in reading.progress.resident and reading.progress.state_of(reading.plan.stages[2]) != "resident"
        (tmp_path / "other").write_bytes(right)
        os.rename(tmp_path / "other", path)
        reading.wait_for_all()
        assert reading.progress.last_stage() == 3 and reading.progress.error is None
        if kind == "split_tiny":
            assert reading.bytes_of(path.name) == right
        else:  # the decoder has taken them
            reading.wait_for(lambda progress: 3 in progress.decoded)
    finally:
        reading.launch.close()


# ---- decoder ---------------------------------------------------------------------------------------


class Decoding:
    """A decoder in this process, on bytes that are here and of which the test says what has arrived."""

    def __init__(self, checkpoint: Path, start_stage: int = 3, min_stage: int = 1, **of_plan):
        import progressive_serve

        self.plan = replace(progressive_serve.read_plan(checkpoint), **of_plan)
        self.memory = [progressive_serve.memory_file(name) for name in ("journal", "buffer")]
        (_, journal), (_, buffer) = self.memory
        self.journal, self.buffer = (
            progressive_serve.Journal(journal),
            progressive_serve.WeightBuffer(buffer, self.plan),
        )
        self.buffer.lay_out(cache=False)
        for file in self.plan.files:
            self.buffer.place_of(file.name)[:] = (checkpoint / file.name).read_bytes()
        serving = progressive_serve.ServingPlan(journal, buffer, start_stage, min_stage, 3)
        self.source = progressive_serve.StageSource(serving, self.plan, rank=0, workers=1)
        stages = dict(start_stage=start_stage, min_stage=min_stage, hold_stage=3)
        job = SimpleNamespace(journal=journal, buffer=buffer, **stages)
        self.decoder = progressive_serve.Decoder(job, self.plan)
        self.thread = threading.Thread(target=self.decoder.run, daemon=True)
        self.thread.start()

    def arrive(self, *stages: int, verified: bool = True) -> None:
        for stage in stages:
            for file in self.plan.stages[stage - 1].files:
                self.journal.mark("read", file=file.name, bytes=file.bytes)
            if verified:
                self.journal.mark("resident", stage=stage)

    def wait_for(self, what) -> None:
        def holds():
            self.source.follow()
            return what(self.source.arrivals)

        wait_for(holds, told=lambda: self.source.arrivals)

    def weights(self, first: int, last: int) -> dict[str, torch.Tensor]:
        """What a worker binds, up to stage `last`."""
        weights = {name: tensor.clone() for name, tensor in self.source.weights(self.plan.stages[first - 1 : last])}
        for stage in range(first, last + 1):
            self.journal.mark("bound", stage=stage, rank=0)
        return weights

    def held_memory(self) -> int:
        """Bytes that the buffer holds now."""
        return os.stat(self.memory[1][1]).st_blocks * 512


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_decoder_makes_each_stage(planes_tiny):
    """In the order of the forward pass, at the precision of all that is there; nothing of it stays in memory."""
    source = load_file(planes_tiny.with_name("model") / "model.safetensors")
    decoding = Decoding(planes_tiny, start_stage=1)
    total = sum(stage.bytes for stage in decoding.plan.stages)
    assert decoding.held_memory() >= total
    decoding.arrive(1)
    decoding.journal.mark("model created", rank=0)
    assert decoding.source.next_stage(0) == 1
    first = decoding.weights(1, 1)
    assert list(first)[0] == "model.embed_tokens.weight" and first.keys() == source.keys()
    errors = [(first[name].float() - source[name].float()).abs().max() for name in source]
    assert max(errors) > 0 and torch.equal(first["model.norm.weight"], source["model.norm.weight"])
    decoding.arrive(2, 3)
    while (bound := decoding.source.arrivals.offered[-1]) < 3:  # 2, or 3 at once if that had arrived when it looked
        found = decoding.weights(bound + 1, decoding.source.next_stage(bound))
    assert_same(found, source)
    decoding.thread.join(300)
    assert not decoding.thread.is_alive()
    assert decoding.held_memory() < total / 4


def test_decoder_begins_again_when_more_has_arrived(planes_tiny):
    """As long as the server imports. Not above the stage that is to be served first."""
    decoding = Decoding(planes_tiny)
    decoding.arrive(1)
    decoding.wait_for(lambda arrivals: 1 in arrivals.decoded)
    assert decoding.source.arrivals.offered == []
    decoding.arrive(2, 3)
    decoding.wait_for(lambda arrivals: 3 in arrivals.decoded)
    decoding.journal.mark("model created", rank=0)
    assert decoding.source.next_stage(0) == 3
    assert_same(decoding.weights(1, 3), load_file(planes_tiny.with_name("model") / "model.safetensors"))
    too_late = Decoding(planes_tiny)
    too_late.arrive(1)
    too_late.wait_for(lambda arrivals: 1 in arrivals.decoded)
    too_late.journal.mark("imported")
    too_late.arrive(2, 3)
    time.sleep(0.5)  # a decoder that begins again would have done so meanwhile
    too_late.journal.mark("model created", rank=0)
    assert too_late.source.next_stage(0) == 1
    held_back = Decoding(planes_tiny, start_stage=2)
    held_back.arrive(1, 2, 3)
    held_back.wait_for(lambda arrivals: 2 in arrivals.decoded)
    held_back.journal.mark("model created", rank=0)
    assert held_back.source.next_stage(0) == 2


def test_decoder_begins_with_what_may_be_served(planes_tiny):
    """A stage by which nobody is answered is not made at all."""
    decoding = Decoding(planes_tiny, min_stage=2)
    decoding.arrive(1)
    time.sleep(0.5)  # a decoder that waits for nothing would have made stage 1 meanwhile
    decoding.source.follow()
    assert not decoding.source.arrivals.tensors[1] and not decoding.source.arrivals.decoded
    decoding.journal.mark("model created", rank=0)
    decoding.arrive(2)
    assert decoding.source.next_stage(0) == 2
    assert decoding.weights(1, 2).keys() == load_file(planes_tiny.with_name("model") / "model.safetensors").keys()


def test_decoder_makes_no_more_than_is_taken(planes_tiny, monkeypatch):
    """Of a later stage, while the model is in memory already."""
    import progressive_serve

    monkeypatch.setattr(progressive_serve, "DECODED_AHEAD", 1 << 16)
    decoding = Decoding(planes_tiny, start_stage=1)
    decoding.arrive(1, 2, 3)
    decoding.journal.mark("model created", rank=0)
    assert decoding.source.next_stage(0) == 1
    decoding.weights(1, 1)
    assert decoding.source.next_stage(1) == 3
    time.sleep(0.5)  # a decoder that is not held would have made the rest meanwhile
    largest = max(tensor["end"] - tensor["begin"] for tensor in decoding.source.arrivals.tensors[1])
    decoding.source.follow()
    assert 0 < decoding.source.arrivals.tensors[3][-1]["end"] <= largest + (1 << 16)
    assert_same(decoding.weights(2, 3), load_file(planes_tiny.with_name("model") / "model.safetensors"))


@pytest.mark.parametrize("stage", [2, 3])
def test_damaged_record_is_not_handed_out(stage, planes_tiny, tmp_path):
    """While its file has not been verified as a whole; what the reader finds then is said first."""
    copy = Path(shutil.copytree(planes_tiny, tmp_path / "copy"))
    flip_last_byte(copy / f"model-stage{stage}.safetensors")
    for what_is_wrong in ("the file", "the record"):
        decoding = Decoding(copy, start_stage=1)
        decoding.arrive(1)
        decoding.journal.mark("model created", rank=0)
        decoding.wait_for(lambda arrivals: arrivals.offered)
        decoding.arrive(2, 3, verified=False)
        decoding.weights(1, 1)
        assert decoding.source.next_stage(1) == 3
        decoding.wait_for(lambda arrivals: len(arrivals.tensors[3]) == len(arrivals.tensors[1]) - 1)
        if what_is_wrong == "the file":
            decoding.journal.mark("error", text="wrong checksum", stage=stage)
        else:
            decoding.arrive(2, 3)
        decoding.thread.join(300)
        decoding.wait_for(lambda arrivals: arrivals.error)
        assert 3 not in decoding.source.arrivals.decoded
        assert ("blake3" in decoding.source.arrivals.error) == (what_is_wrong == "the record")


def test_spoilt_stage_does_not_keep_others_from_being_made(planes_tiny):
    """Though all its bytes are there, so that it could be tried in place of the stage before it."""
    decoding = Decoding(planes_tiny, start_stage=1)
    decoding.arrive(1, 2)
    decoding.arrive(3, verified=False)
    decoding.journal.mark("error", text="stage 3 is bad", stage=3)
    decoding.journal.mark("model created", rank=0)
    for stage in (1, 2):
        assert decoding.source.next_stage(stage - 1) == stage
        assert len(decoding.weights(stage, stage)) > 4
    with pytest.raises(RuntimeError, match="stage 3 is bad"):
        decoding.source.next_stage(2)
    decoding.thread.join(300)
    assert not decoding.thread.is_alive()


@pytest.mark.parametrize("at_once", [False, True])
def test_stage_is_made_anew_when_its_bytes_are_mended(at_once, planes_tiny):
    """Whole, whatever was made and taken of it before: the records may have been good, and the file yet bad.

    A decoder that got no processor meanwhile heard of both at once, and waited for ever.
    """
    source = load_file(planes_tiny.with_name("model") / "model.safetensors")
    decoding = Decoding(planes_tiny, start_stage=1)
    decoding.journal.mark("model created", rank=0)
    for stage in (1, 2):
        decoding.arrive(stage)
        assert decoding.source.next_stage(stage - 1) == stage
        decoding.weights(stage, stage)
    decoding.arrive(3, verified=False)
    assert decoding.source.next_stage(2) == 3
    half = decoding.source.weights(decoding.plan.stages[2:])
    assert next(half) and next(half)
    decoding.wait_for(lambda arrivals: 3 in arrivals.decoded)
    with decoding.decoder.following if at_once else contextlib.nullcontext():  # held, it hears nothing
        decoding.journal.mark("spoilt", stage=3, text="the checksum of the file differs")
        late = {"name": "late", "dtype": "BF16", "shape": [1], "begin": 0, "end": 2}
        decoding.journal.mark("tensor", stage=3, attempt=0, **late)  # by a decoder that has not heard of it
        decoding.wait_for(lambda arrivals: arrivals.bad)
        for file in decoding.plan.files:
            decoding.buffer.refill(file.name)
            decoding.buffer.place_of(file.name)[:] = (planes_tiny / file.name).read_bytes()
        if not at_once:
            wait_for(lambda: decoding.decoder.arrivals.bad)
        decoding.journal.mark("mended", stage=3)
        decoding.arrive(3)
    assert decoding.source.next_stage(2) == 3
    assert_same(decoding.weights(3, 3), source)


def test_stage_that_holds_more_than_the_manifest_says(planes_tiny):
    """Room is what the manifest bounds: a decompression bomb ends there."""
    decoding = Decoding(planes_tiny, decoded_bytes=1 << 18)
    decoding.arrive(1, 2, 3)
    decoding.wait_for(lambda arrivals: arrivals.error)
    assert "more tensors than the manifest" in decoding.source.arrivals.error
    assert decoding.source.arrivals.spoilt in (1, 3)


@pytest.mark.parametrize("killed", ["reader", "decoder"])
def test_decoder_that_dies_is_missed(read, killed, planes_tiny):
    """When all bytes are resident, but not all stages decoded; whichever dies, the other does not stay."""
    reading = read(planes_tiny, start_stage=1)
    failures = []
    reading.launch.on_failure = failures.append
    reading.wait_for_all()
    reading.wait_for(lambda progress: 1 in progress.decoded)
    reader = psutil.Process(reading.launch.reader.pid)
    (decoder,) = reader.children()
    (reader if killed == "reader" else decoder).kill()
    reading.wait_for(lambda progress: progress.error)
    assert "reader process stopped at stage 2" in reading.progress.error
    assert reading.progress.last_stage() == 1 and failures == []  # stage 1 is there, and can be served
    assert psutil.wait_procs([reader, decoder], timeout=300)[1] == []


# ---- launch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_reader_that_is_killed_is_heard_of(read, split_tiny, number):
    """Everybody waits for the reader, so its death must not go unnoticed."""
    import progressive_serve

    launch = read(split_tiny, limit_mbps=0.001).launch
    failures = []
    launch.on_failure = failures.append
    launch.reader.send_signal(number)
    wait_for(lambda: failures)
    assert "reader process stopped at stage 1" in failures[0] and f"-{int(number)}" in failures[0]
    waiting = progressive_serve.StageSource(launch.serving, launch.plan, rank=0, workers=1)
    with pytest.raises(RuntimeError, match="reader process stopped"):
        waiting.wait_resident(1)


@pytest.mark.parametrize("error", [None, "a header that does not fit"])
def test_reader_that_dies_when_all_is_resident(error, read, split_tiny):
    """It is not missed, since every byte has been verified by then; what it said is heard, as small files are quick."""
    reading = read(split_tiny)
    reading.wait_for_all()
    launch = reading.launch
    launch.reader.wait(300)
    if error:
        launch.journal.mark("error", text=error, stage=1)
    failures = []
    launch.on_failure = failures.append
    reader, launch.reader = launch.reader, SimpleNamespace(communicate=lambda: (b"", b"Killed"), returncode=-9)
    launch.watch_reader()
    launch.reader = reader
    assert failures == ([error] if error else [])
    assert launch.progress().error == error


def test_closing_gives_the_memory_back(read, split_tiny):
    """A notebook that has loaded, or failed to, must not hold a whole model."""
    reading = read(split_tiny)
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
