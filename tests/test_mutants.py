"""What only a planted fault has shown to be unproven: see mutations.md.

One test starts a server, which the worker's standby forks, another one an engine without a model; about fifteen
seconds.
"""

import os
from types import SimpleNamespace

import psutil
import pytest
from servers import ROOT, check_nothing_is_left

import bench_coldstart
import eval_triviaqa

# ---- progressive_serve.py ----------------------------------------------------------------------------


@pytest.mark.server
def test_nothing_is_answered_from_the_cache_of_an_earlier_stage(split_tiny, hold, start):
    """The prefix cache of a server, which makes its transitions by itself, and not as load_llm() does."""
    prompt = "abcdefgh" * 64  # a token a letter: several blocks of the KV cache

    def cached_tokens() -> float:
        before = server.metric("vllm:prefix_cache_hits_total")
        assert server.complete(prompt).json()["usage"]["prompt_tokens"] == len(prompt)
        return server.metric("vllm:prefix_cache_hits_total") - before

    held = hold(split_tiny)
    server = start(held.path).wait_until_ready()
    assert cached_tokens() == 0 < cached_tokens()  # it caches indeed
    held.release(2)
    server.wait_until_ready(2)
    assert cached_tokens() == 0 < cached_tokens()
    held.release(3)
    server.wait_until_ready(3)
    assert cached_tokens() == 0 < cached_tokens()


# ---- bench_coldstart.py ------------------------------------------------------------------------------


def test_trial_that_would_be_warm_does_not_begin(tmp_path, monkeypatch):
    """Not only before the first trial, where the storage is measured: the one before it may have left a server."""
    monkeypatch.setattr(bench_coldstart, "library_files", list)
    monkeypatch.setattr(bench_coldstart, "DROP_PAUSE", 0.0)
    monkeypatch.setattr(bench_coldstart, "cached_bytes", lambda path: 4096)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights").write_bytes(b"x")

    def begins(**options) -> bool:
        args = SimpleNamespace(ray=False, unverified_cold=False, **options)
        with bench_coldstart.trial_server(
            ["true"], tmp_path / "checkpoint", args, options["cold"], tmp_path / "log", dict(os.environ)
        ):
            return True

    assert begins(cold=False)
    with pytest.raises(bench_coldstart.UsageError, match="stays in the page cache"):
        begins(cold=True)


# ---- eval_triviaqa.py --------------------------------------------------------------------------------


def test_kept_answers_are_those_of_the_same_stage_adapter_and_model(tmp_path):
    """An interrupted run goes on with what it has, and another one with nothing of it."""
    task = eval_triviaqa.Questions([eval_triviaqa.make_question("q1", "Where?", ["Paris"])])
    (question,) = task.items
    asked = eval_triviaqa.Setting(1, None, "model")
    others = [(2, None, "model"), (1, "an adapter", "model"), (1, None, "another model")]
    kept = eval_triviaqa.Kept(tmp_path / "kept")
    kept.put(asked, task, question, "Paris")
    kept.file.close()
    again = eval_triviaqa.Kept(tmp_path / "kept")
    assert again.get(asked, task, question) == "Paris"
    assert [again.get(eval_triviaqa.Setting(*other), task, question) for other in others] == [None] * 3
    again.discard()


# ---- serve_fleet.py ----------------------------------------------------------------------------------

AGENT = """
import asyncio, sys
from serve_fleet import Agent, Settings

async def main():
    agent = Agent(Settings({"m": sys.argv[1]}, server=sys.argv[2], standby=False), "node", "127.0.0.1", 1)
    print("engine", agent.spawn("m").popen.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.server
def test_engines_end_with_their_agent(split_tiny, start, short_tmp):
    """By themselves: not every release of Ray ends the children of an actor that is killed."""
    env = {"PYTHONPATH": str(ROOT), "TMPDIR": str(short_tmp)}
    agent = start.process("-c", AGENT, split_tiny, ROOT / "tests" / "fake_engine.py", env=env)
    agent.wait_for(lambda: agent.log.read_text().partition("engine ")[2].endswith("\n"))
    engine = psutil.Process(int(agent.log.read_text().partition("engine ")[2]))
    agent.process.kill()
    try:
        check_nothing_is_left([engine])
    finally:
        if engine.is_running():
            engine.kill()
