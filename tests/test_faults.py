"""What must happen when something goes wrong, with a live server; afterwards its state is asked through its endpoints.

Bad stages and adapters, signals, a lack of memory and full caches have their tests beside those of what they concern.
Every test starts a server, which the worker's standby forks; about a minute.
"""

import contextlib
import os
import resource
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from servers import Server, age, check_nothing_is_left, chunks_of, name_of, small_disk

pytestmark = pytest.mark.server


def check_it_ends(server: Server) -> None:
    """With all of its processes, of SIGTERM."""
    processes = server.family()
    assert server.stop() in (0, 128 + signal.SIGTERM)
    check_nothing_is_left(processes, server.port)


def test_storage_that_hangs_stops_nobody(split_tiny, tmp_path, start):
    """In the middle of the last stage: tokens flow, and SIGTERM ends everything."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in split_tiny.iterdir():
        (checkpoint / path.name).symlink_to(path)
    (checkpoint / "model-stage3.safetensors").unlink()
    os.mkfifo(checkpoint / "model-stage3.safetensors")  # whoever opens it waits for ever
    age(checkpoint)
    server = start(checkpoint).wait_until_ready(2)
    answer = server.complete("Hello", 200)
    assert answer.json()["usage"]["completion_tokens"] == 200 and answer.headers["X-Progressive-Stage"] == "2"
    ready = requests.get(f"{server.url}/ready?stage=3", timeout=300)
    assert ready.status_code == 503 and "arriving" in ready.json()["reason"]
    check_it_ends(server)


def test_reader_that_is_stopped_ends_with_the_server(split_tiny, hold, start):
    server = start(hold(split_tiny).path)
    server.wait_for(server.is_up)
    server.reader().suspend()
    check_it_ends(server)


def test_running_requests_finish_when_the_server_is_to_end(split_tiny, hold, start):
    """With --shutdown-timeout, which is vLLM's: it grows until they have.

    A transition in vLLM's own drain cut the stream off.
    """
    held = hold(split_tiny)
    server = start(held.path, "--shutdown-timeout", "300", counted=True).wait_until_ready()
    processes = server.family()
    with server.suspended():  # else it may be over before the signal
        stream = server.stream("Hello")
        server.process.terminate()
        server.wait_for(lambda: server.says("mode=drain"))
        server.grow(held)
    chunks = list(chunks_of(stream))
    assert sum(len(choice["token_ids"] or ()) for chunk in chunks for choice in chunk["choices"]) == 900
    assert chunks[-1]["progressive_stage"] == 3
    assert server.process.wait(300) == 0
    assert not server.says("the transition to stage")  # failed; vLLM has a traceback of its own at times
    check_nothing_is_left(processes)


@pytest.mark.parametrize("name", ["VLLM::Worker", pytest.param("VLLM::Engine", marks=pytest.mark.slow)])
def test_process_of_vllm_that_is_killed(name, split_tiny, hold, start):
    """Requests in flight, and those that wait for a stage, get an error; and the server ends."""
    server = start(hold(split_tiny).path, "--enable-server-load-tracking").wait_until_ready()
    processes = server.family()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(server.post, "Hello", min_stage=3)
        server.wait_for(lambda: server.metric("progressive_waiting_requests") == 1)
        with server.suspended():  # so that what it computes is in flight, and nothing is over before the kill
            running = pool.submit(server.post, "Hello")
            server.wait_for(lambda: requests.get(f"{server.url}/load", timeout=300).json()["server_load"] == 1)
            next(process for process in processes if name_of(process).startswith(name)).kill()
        for asked in (running, waiting):
            with contextlib.suppress(requests.ConnectionError):
                assert asked.result().status_code >= 500
    assert server.process.wait(300) is not None
    check_nothing_is_left(processes, server.port)


def test_many_requests_while_it_is_cold(split_tiny, hold, start):
    """500 at once, before there is a stage: all of them are answered."""
    held = hold(split_tiny, after=0)
    server = start(held.path)
    server.wait_for(server.is_up)
    with ThreadPoolExecutor(500) as pool:
        asked = [pool.submit(server.post, f"Question {number}", 4) for number in range(500)]
        server.wait_for(lambda: server.metric("progressive_waiting_requests") == 500)
        held.release()
        answers = [answer.result() for answer in asked]
    assert [answer.status_code for answer in answers] == [200] * 500
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {4}
    assert server.metric("progressive_waiting_requests") == 0


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


@pytest.mark.parametrize(
    "what", ["a full folder for temporary files", pytest.param("no more files", marks=pytest.mark.slow)]
)
def test_system_that_has_nothing_left(what, split_tiny, tmp_path, start):
    """It starts all the same, or ends and says why."""
    with contextlib.ExitStack() as stack:
        how = {"prepare": few_files}
        if what != "no more files":
            how = {"env": {"TMPDIR": str(stack.enter_context(small_disk(tmp_path / "disk", "size=4k,nr_inodes=1")))}}
        server = start(split_tiny, alone=True, **how)
        while server.process.poll() is None and not server.is_ready():
            time.sleep(0.1)  # either will come
        if server.process.poll() is None:
            assert server.stop() == 0
        else:
            text = server.log.read_text()
            assert server.process.returncode > 0, text
            assert "No space left" in text or "Too many open files" in text, text[-3000:]


def test_clock_that_is_set_back(split_tiny, tmp_path, start):
    """Files from the future, as it seems then, are not taken for ones that are still being copied for ever."""
    checkpoint = tmp_path / "checkpoint"
    subprocess.run(["cp", "-r", split_tiny, checkpoint], check=True)
    for path in (checkpoint, *Path(checkpoint).iterdir()):
        os.utime(path, (time.time() + 86400,) * 2)
    server = start(checkpoint).wait_until_ready(3)
    assert server.complete("Hello").headers["X-Progressive-Stage"] == "3"
