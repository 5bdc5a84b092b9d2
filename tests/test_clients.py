"""Clients as people have them, against a live server: the openai package, lm-evaluation-harness, a browser.

One server, which the worker's standby forks, answers all of them; about a minute, most of it the harness's imports.
"""

import json
import shutil
import subprocess
import sys

import openai
import pytest
import requests
from conftest import add_adapter
from pydantic import BaseModel
from servers import ROOT, Held

pytestmark = pytest.mark.server

CHAT = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
KEY = "a secret"
LM_EVAL = ROOT / ".venv" / "lm-eval"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(split_tiny, start_for_module, tmp_path_factory):
    """A server with a key, for chats with tools; it stays at stage 1 until a test lets the rest arrive."""
    folder = tmp_path_factory.mktemp("clients")
    held = Held(split_tiny, folder)
    add_adapter(held.path, 1, ["q_proj"], source=split_tiny)
    (folder / "chat.jinja").write_text(CHAT)
    options = ["--api-key", KEY, "--chat-template", folder / "chat.jinja", "--served-model-name", "tiny"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    server = start_for_module(held.path, *options, counted=True).wait_until_ready()
    server.held = held
    yield server
    held.end()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300) as client:
        yield client


class Weather(BaseModel):
    sunny: bool


TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"sunny": {"type": "boolean"}}}},
}
SAID = [{"role": "user", "content": "Who are you?"}]
STRUCTURED = {"type": "json_schema", "json_schema": {"name": "weather", "schema": Weather.model_json_schema()}}


# ---- while it is at stage 1 ------------------------------------------------------------------------


def test_key_guards_what_vllm_guards(server):
    """Nobody without the key makes it compute, or waits; and what operators ask is open, as /health is."""
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 2, "min_stage": 3}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert requests.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=300).status_code == 401
    for path in ("/health", "/ready", "/progress", "/progress.html", "/metrics"):
        assert requests.get(f"{server.url}{path}", timeout=300).status_code == 200
    assert requests.get(f"{server.url}/v1/models", timeout=300).status_code == 401


def test_stage_that_is_none_is_an_error_of_the_client(client):
    with pytest.raises(openai.BadRequestError, match="min_stage 4.*1 to 3"):
        client.completions.create(model="tiny", prompt="Hello", max_tokens=2, extra_body={"min_stage": 4})
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="Hello", max_tokens=-1)  # vLLM's own


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")
def test_page_shows_the_stages_in_a_browser(server, tmp_path):
    """What a person sees: the page has asked /progress by itself, and says what that says."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", f"{server.url}/progress.html"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    progress = server.progress()
    assert "<title>Stage 1 of 3</title>" in page and '<p id="error"></p>' in page
    assert page.count('class="stage active"') == 1 and page.count('class="stage loading"') <= 1
    assert f"{progress['stages'][0]['bytes'] / 1e6:.1f} MB, active at" in page
    assert page.count("<tr") == len(progress["timeline"])


def test_requests_wait_for_the_full_model(server, client):
    """The last of this section: it lets the rest arrive."""
    first = client.completions.create(model="tiny", prompt="Hello", max_tokens=2)
    assert (first.progressive_stage, first.progressive_exact) == (1, False)
    with server.suspended():
        stream = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        server.grow(server.held)
    chunks = list(stream)
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=SAID, max_tokens=2, extra_headers={"X-Progressive-Min-Stage": "last"}
    )
    body = {"min_stage": "last"}
    whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=2, extra_body=body)
    stages = [chunk.model_extra.get("progressive_stage") for chunk in chunks]
    assert set(stages[:-1]) == {None} and stages[-1] == 3
    assert chunks[-1].progressive_exact is False  # its first tokens are stage 1's
    assert stream.response.headers["x-progressive-stage"] == "1"
    assert raw.headers["x-progressive-stage"] == "3" and raw.parse().progressive_stage == 3
    assert raw.parse().progressive_exact is True and whole.progressive_exact is True


# ---- when it is the full model ---------------------------------------------------------------------


@pytest.fixture
def full(server):
    server.held.release()
    return server.wait_until_ready(3)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_client_finds_nothing_unusual(stream, full, client):
    """Completions with logprobs and n > 1, chats, tools, structured output; whole and streamed."""
    usage = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    found = client.completions.create(
        model="tiny", prompt=["Hello", "Who?"], n=2, logprobs=2, max_tokens=4, temperature=1, seed=1, **usage,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = list(found) if stream else [found]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert {choice.index for choice in choices} == {0, 1, 2, 3}
    assert sum(len(choice.logprobs.tokens) for choice in choices if choice.logprobs) == 16
    assert chunks[-1].usage.completion_tokens == 16 and chunks[-1].progressive_stage == 3

    chat = {"model": "tiny", "messages": SAID, "max_tokens": 24, **usage}
    for options in (
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"response_format": STRUCTURED},
    ):
        found = client.chat.completions.create(**chat, **options)
        chunks = list(found) if stream else [found]
        ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert len(ends) == 1 and chunks[-1].usage.completion_tokens > 0 and chunks[-1].progressive_stage == 3
        messages = [choice.delta if stream else choice.message for chunk in chunks for choice in chunk.choices]
        if "tool_choice" in options and ends != ["length"]:  # it may never close a string
            calls = [call.function for message in messages for call in message.tool_calls or ()]
            assert [call.name for call in calls if call.name] == ["look"]
        if "response_format" in options and ends == ["stop"]:
            assert isinstance(json.loads("".join(message.content or "" for message in messages))["sunny"], bool)
    if not stream:
        assert [model.id for model in client.models.list()] == ["tiny"]


TASK = """
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
KINDS = {  # of a task: what it adds to the configuration, and what it measures
    "loglikelihood": ("metric_list: [{metric: perplexity}]", "perplexity,none"),
    "generate_until": (
        "generation_kwargs: {until: ['x'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]",
        "exact_match,none",
    ),
}


@pytest.mark.skipif(not LM_EVAL.is_dir(), reason="lm-eval is not there: make .venv/lm-eval")
@pytest.mark.parametrize("kind", ["loglikelihood", pytest.param("generate_until", marks=pytest.mark.slow)])
def test_evaluation_harness_runs(kind, full, split_tiny, tmp_path):
    """lm-evaluation-harness' local-completions, on a task made from a local file."""
    more, metric = KINDS[kind]
    rows = [{"question": f"Number {number}:", "answer": f" {number}"} for number in range(8)]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "facts.yaml").write_text(TASK.format(kind=kind, data=tmp_path / "facts.jsonl", more=more))
    where = {"model": "tiny", "base_url": f"{full.url}/v1/completions", "tokenizer": split_tiny, "num_concurrent": 2}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "facts"]
    command += ["--include_path", tmp_path, "--output_path", tmp_path / "out"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in where.items())]
    env = {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    env["PYTHONPATH"] = str(LM_EVAL)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (out,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(out.read_text())["results"]["facts"][metric] >= 0
