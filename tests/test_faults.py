"""What must happen when something goes wrong, with a live server; afterwards its state is asked through its endpoints.

Bad stages and adapters, signals, a lack of memory and full caches have their tests beside those of what they concern.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
from conftest import SERVER, free_port
from test_progressive_serve import SERVER_OPTIONS, Server, metric, slowly
from test_serve_rooms import age, small_disk


def family(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def check_nothing_is_left(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert alive == []


def check_it_ends(server: Server, processes: list[psutil.Process]) -> None:
    """Within ten seconds of SIGTERM, with all of its processes."""
    server.process.terminate()
    assert server.process.wait(10) in (0, 128 + signal.SIGTERM)
    check_nothing_is_left(processes)


def test_storage_that_hangs_stops_nobody(split_tiny, tmp_path):
    """In the middle of the last stage: tokens flow, and SIGTERM ends everything."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in split_tiny.iterdir():
        (checkpoint / path.name).symlink_to(path)
    (checkpoint / "model-stage3.safetensors").unlink()
    os.mkfifo(checkpoint / "model-stage3.safetensors")  # whoever opens it waits for ever
    age(checkpoint)
    server = Server(checkpoint, tmp_path / "log")
    try:
        server.wait_for(lambda: server.answers(2))
        answer = server.complete("Hello", 200)
        assert answer.json()["usage"]["completion_tokens"] == 200 and answer.headers["X-Progressive-Stage"] == "2"
        ready = requests.get(f"{server.url}/ready?stage=3", timeout=10)
        assert ready.status_code == 503 and "arriving" in ready.json()["reason"]
        check_it_ends(server, family(server))
    finally:
        server.stop()


def test_reader_that_is_stopped_ends_with_the_server(split_tiny, tmp_path):
    server = Server(split_tiny, tmp_path / "log", *slowly(split_tiny, 60))
    try:
        server.wait_for(server.is_up)
        processes = family(server)
        server.reader().suspend()
        check_it_ends(server, processes)
    finally:
        server.stop()


def test_running_requests_finish_when_the_server_is_to_end(split_tiny, tmp_path):
    """With --shutdown-timeout, which is vLLM's; also while weights arrive."""
    server = Server(split_tiny, tmp_path / "log", *slowly(split_tiny, 5), "--shutdown-timeout", "50")
    try:
        reader = server.hold_reader()
        server.wait_for(server.answers)
        processes = family(server)
        stream = server.complete("Hello", 900, stream=True)
        server.process.terminate()
        reader.resume()
        lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == b"data: [DONE]" and len(lines) > 800
        assert server.process.wait(60) == 0
        check_nothing_is_left(processes)
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["VLLM::Worker", "VLLM::Engine"])
def test_process_of_vllm_that_is_killed(name, split_tiny, tmp_path):
    """Requests in flight, and those that wait for a stage, get an error at once; and the server ends."""
    server = Server(split_tiny, tmp_path / "log", *slowly(split_tiny, 30))
    try:
        reader = server.hold_reader()
        server.wait_for(server.answers)
        processes = family(server)
        worker = next(process for process in processes if process.name() == "VLLM::Worker")
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(server.post, "Hello", min_stage=3)
            server.wait_for(lambda: metric(server, "progressive_waiting_requests") == 1)
            worker.suspend()  # so that what it computes is in flight, and nothing is over before the kill
            running = pool.submit(server.post, "Hello")
            time.sleep(2)
            next(process for process in processes if process.name().startswith(name)).kill()
            for suspended in (worker, reader):
                with contextlib.suppress(psutil.NoSuchProcess):
                    suspended.resume()
            began = time.monotonic()
            for asked in (running, waiting):
                with contextlib.suppress(requests.ConnectionError):
                    assert asked.result(timeout=20).status_code >= 500
            assert time.monotonic() - began < 20
        assert server.process.wait(30) is not None
        check_nothing_is_left(processes)
    finally:
        server.stop()


def test_many_requests_while_it_is_cold(split_tiny, tmp_path):
    """500 at once, from the moment on when it listens: all of them are answered."""
    server = Server(split_tiny, tmp_path / "log", *slowly(split_tiny, 15))
    try:
        server.wait_for(server.is_up)
        with ThreadPoolExecutor(500) as pool:
            answers = list(pool.map(lambda number: server.post(f"Question {number}", 4), range(500)))
        assert [answer.status_code for answer in answers] == [200] * 500
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {4}
        assert metric(server, "progressive_waiting_requests") == 0
    finally:
        assert server.stop() == 0


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


@pytest.mark.parametrize("what", ["no more files", "a full folder for temporary files"])
def test_system_that_has_nothing_left(what, split_tiny, tmp_path):
    """It starts all the same, or ends and says why."""
    command = [sys.executable, SERVER, split_tiny, "--port", free_port(), *SERVER_OPTIONS]
    command += ["--kv-cache-memory-bytes", 64 << 20]
    with contextlib.ExitStack() as stack:
        env, before = dict(os.environ), few_files if what == "no more files" else None
        if not before:
            env["TMPDIR"] = str(stack.enter_context(small_disk(tmp_path / "disk", "size=4k,nr_inodes=1")))
        log = stack.enter_context(open(tmp_path / "log", "wb"))
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=env, preexec_fn=before)
        stack.callback(process.kill)
        deadline, port = time.monotonic() + 90, command[4]
        while process.poll() is None and not is_ready(port):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        text = (tmp_path / "log").read_text()
        if process.poll() is None:
            process.terminate()
            assert process.wait(15) == 0
        else:
            assert process.returncode > 0 and ("No space left" in text or "Too many open files" in text), text[-3000:]


def is_ready(port: int) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/ready", timeout=5).ok
    return False


def test_clock_that_is_set_back(split_tiny, tmp_path):
    """Files from the future, as it seems then, are not taken for ones that are still being copied for ever."""
    checkpoint = tmp_path / "checkpoint"
    subprocess.run(["cp", "-r", split_tiny, checkpoint], check=True)
    for path in (checkpoint, *Path(checkpoint).iterdir()):
        os.utime(path, (time.time() + 86400,) * 2)
    server = Server(checkpoint, tmp_path / "log")
    try:
        server.wait_for(lambda: server.answers(3))
        assert server.complete("Hello").headers["X-Progressive-Stage"] == "3"
    finally:
        assert server.stop() == 0
