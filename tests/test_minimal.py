"""demo/minimal.py, the idea in one file: its tokens are the server's at every stage, and stock vLLM's at the end.

Two servers, and three processes with an engine inside; about half a minute.
"""

import json
import re
import subprocess
import sys

import pytest
from conftest import run_script
from servers import ENVIRON, LIMIT, ROOT, Held, token_ids

pytestmark = pytest.mark.server
MINIMAL = ROOT / "demo" / "minimal.py"
ANSWERS = """
import json, sys
from pathlib import Path
import minimal

checkpoint, compiled, prompts = Path(sys.argv[1]), sys.argv[2] == "compiled", json.loads(sys.argv[3])
options = {"dtype": "float32", "enforce_eager": not compiled, "max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20}
stages = minimal.Stages(checkpoint)
llm = minimal.load(stages, **options)
for stage in (1, 2, 3):
    stages.wait_for(stage)
    if stage > 1:
        minimal.advance(llm, stages, stage)
    sampling = minimal.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def answers_of_minimal(checkpoint, prompts: list[str], how: str) -> list[list[list[int]]]:
    """Token ids by stage and prompt, from one engine."""
    command = [sys.executable, "-c", ANSWERS, checkpoint, how, json.dumps(prompts)]
    env = {**ENVIRON, "PYTHONPATH": str(MINIMAL.parent)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=2 * LIMIT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]


@pytest.fixture(scope="module")
def answers(demo_checkpoint, prompts, tmp_path_factory, start_for_module):
    """The server's at each stage, and stock vLLM's."""
    held = Held(demo_checkpoint, tmp_path_factory.mktemp("held"))
    server, found = start_for_module(held.path, "--dtype", "float32"), []
    for stage in (1, 2, 3):
        if stage > 1:
            held.release(stage)
        answer = server.wait_until_ready(stage).complete(prompts[:8], return_token_ids=True)
        assert answer.headers["X-Progressive-Stage"] == str(stage)
        found.append(token_ids(answer))
    held.end()
    server.stop()
    stock = start_for_module.stock(ROOT / "demo" / "model", "--dtype", "float32")
    stock.wait_for(lambda: stock.says("Application startup complete"))
    name = str(ROOT / "demo" / "model")
    return found, token_ids(stock.complete(prompts[:8], return_token_ids=True, model=name))


@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_tokens_are_the_servers_at_each_stage_and_stocks_at_the_end(how, answers, demo_checkpoint, prompts):
    of_server, of_stock = answers
    found = answers_of_minimal(demo_checkpoint, prompts[:8], how)
    assert found == of_server
    assert found[2] == of_stock != found[0]


def test_it_shows_which_stage_made_which_token(demo_checkpoint):
    done = run_script(MINIMAL, demo_checkpoint, "--hold", 5, "--max-tokens", 40, "--prompt", "Question: Who?\nAnswer:")
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^\[stage (\d) of 3\] .+", done.stdout, re.MULTILINE)
    assert stages[0] == "1" and stages == sorted(set(stages))
    assert len(MINIMAL.read_text().splitlines()) <= 300


def test_what_is_no_checkpoint_of_layers_is_refused(planes_tiny, tmp_path):
    for folder, named in ((tmp_path, "prune_and_split.py"), (planes_tiny, "planes")):
        done = run_script(MINIMAL, folder)
        assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr
