"""progressive_serve.py --standby: servers that a standby forks, beside such as start by themselves.

Most tests start a server from the worker's standby, which takes a second or two; about two minutes.
"""

import ast
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from conftest import run_script
from servers import SERVER, Server, Standby, check_nothing_is_left, flip_last_byte, wait_for

server_test = pytest.mark.server
slow = pytest.mark.slow
PROMPTS = [f"Question number {number}: why?" for number in range(4)]


# ---- a standby, and its servers --------------------------------------------------------------------


@pytest.fixture
def standby(standby_of_worker):
    """The worker's, without a server at the begin and at the end of each test."""
    standby = standby_of_worker()
    yield standby
    wait_for(lambda: psutil.Process(standby.process.pid).children() == [])


@pytest.fixture
def forked(standby, start):
    """Has the standby start a server, whatever TEST_STANDBY says, and returns it when it has a process."""

    def forked(checkpoint, *options, **how) -> Server:
        server = start(checkpoint, *options, standby=standby, **how)
        server.main()
        return server

    return forked


def answers_of(server: Server) -> list[tuple]:
    """Tokens and logprobs of every prompt."""
    choices = server.complete(PROMPTS, 16, logprobs=2, return_token_ids=True).json()["choices"]
    return [(choice["token_ids"], choice["logprobs"]) for choice in choices]


def threads_of(process: psutil.Process) -> list[list[int]]:
    """The cores that each of its threads may use."""
    return sorted(sorted(os.sched_getaffinity(thread.id)) for thread in process.threads())


# ---- to its caller, a server like any other --------------------------------------------------------


@server_test
def test_server_is_as_one_that_started_by_itself(forked, start, split_tiny):
    """Same answers to the last bit, same threads on the same cores: a pool of as many as the caller wants."""
    cores = sorted(os.sched_getaffinity(0))
    env = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    answers, threads = [], []
    for begin in (forked, lambda *how, **env: start(*how, alone=True, **env)):  # else they would share the cores
        server = begin(split_tiny, env=env).wait_until_ready(3)
        answers.append(answers_of(server))
        on_one_core = [found for found in threads_of(server.worker) if len(found) == 1]
        threads.append([found for found in on_one_core if found != cores[:1]])  # there the main thread and many others
        at = {event["event"]: event["seconds"] for event in server.progress()["timeline"]}
        assert 0 < at["imported"] < at["model created"] < at["ready"]
        assert f"{split_tiny} --port {server.port}" in " ".join(server.main().cmdline())  # as ps shows it
        assert server.stop() == 0
    assert answers[0] == answers[1]
    assert threads[0] == threads[1] == [[core] for core in cores[1:]]


@server_test
def test_two_servers_at_once(standby, forked, split_tiny):
    first, second = (forked(split_tiny) for _ in range(2))
    first.wait_until_ready(3)
    second.wait_until_ready(3)
    assert len(standby.servers()) == 2
    assert answers_of(first) == answers_of(second)
    processes = psutil.Process(standby.process.pid).children(recursive=True)
    assert first.stop() == 0
    assert second.is_ready(3)
    assert second.stop(signal.SIGINT) == 0
    check_nothing_is_left(processes, first.port, second.port)


@server_test
def test_process_is_the_callers(forked, hold, split_tiny, tmp_path):
    """Working folder, umask, environment, limits, niceness and affinity: as of a process that the caller has forked."""
    core = min(os.sched_getaffinity(0))

    def prepare() -> None:
        os.umask(0o027)
        os.nice(3)
        os.sched_setaffinity(0, [core])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 4000))

    held = hold(split_tiny)  # the reader lives on
    env = {"SOMETHING": "of the caller's", "TMPDIR": str(tmp_path)}
    server = forked(held.path.name, cwd=held.path.parent, env=env, prepare=prepare)
    reader, main = server.reader(), server.main()
    assert reader.environ().items() >= env.items()
    assert Path(main.cwd()) == held.path.parent
    assert "Umask:\t0027" in Path(f"/proc/{main.pid}/status").read_text()
    assert (reader.nice(), reader.cpu_affinity()) == (os.nice(0) + 3, [core])
    assert reader.rlimit(resource.RLIMIT_NOFILE)[1] == 4000


@pytest.fixture
def control_group():
    """One that a caller can be in."""
    roots = (Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup"))
    group = next((root for root in roots if os.access(root / "cgroup.procs", os.W_OK)), None)
    if not group:
        pytest.skip("only root can make a control group")
    group /= f"standby-{os.getpid()}"
    group.mkdir()
    yield group
    wait_for(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


@server_test
def test_control_group_is_the_callers(standby, control_group, forked, split_tiny):
    """Limits of it, such as bench_coldstart.py's on storage, hold for the server."""

    def enter() -> None:
        (control_group / "cgroup.procs").write_text(str(os.getpid()))

    server = forked(split_tiny, prepare=enter)
    assert control_group.name in Path(f"/proc/{server.main().pid}/cgroup").read_text()
    assert control_group.name not in Path(f"/proc/{standby.process.pid}/cgroup").read_text()


@server_test
def test_bad_checkpoint(standby, copied):
    (copied / "model-stage1.safetensors").unlink()  # without which nothing can be served
    os.utime(copied, (0, 0))  # nobody is just copying it there
    forked = run_script(SERVER, copied, "--from-standby", standby.socket)
    alone = run_script(SERVER, copied)
    assert (forked.returncode, forked.stdout, forked.stderr) == (2, "", alone.stderr)
    assert "model-stage1.safetensors is missing" in forked.stderr


@server_test
def test_damaged_checkpoint(forked, copied):
    """Found while the server starts, and not by its main thread."""
    flip_last_byte(copied / "model-stage1.safetensors")
    server = forked(copied)
    assert server.process.wait(300) == 2
    assert server.says("model-stage1.safetensors: blake3 checksum differs")


# ---- signals and ends ------------------------------------------------------------------------------


@server_test
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("reading", signal.SIGTERM),
        ("serving", signal.SIGKILL),
        pytest.param("reading", signal.SIGKILL, marks=slow),
    ],
)
def test_signal_to_the_caller_ends_everything(moment, number, forked, hold, split_tiny):
    caller = forked(hold(split_tiny).path)
    caller.reader()
    if moment == "serving":
        caller.wait_for(caller.is_up)
    processes = caller.family()
    assert caller.stop(number) == (143 if number == signal.SIGTERM else -number)
    check_nothing_is_left(processes, caller.port)


def test_signal_just_before_the_caller_waits_ends_that():
    """What it waits at can be read, and the server gets the signal."""
    text = SERVER.read_text()
    lines, found = text.splitlines(), []
    for node in ast.parse(text).body:
        names = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
        if "FORWARDED" in names or getattr(node, "name", "") == "forward_signals":
            found += lines[node.lineno - 1 : node.end_lineno]
    program = ["import contextlib, os, select, signal, socket", *found, "ours, server = socket.socketpair()"]
    program += ["woken = forward_signals(ours)", "os.kill(os.getpid(), signal.SIGTERM)"]
    program += ["assert select.select([woken], [], [], 300)[0]", "assert server.recv(1) == bytes([signal.SIGTERM])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@server_test
@pytest.mark.parametrize(
    "number", [signal.SIGHUP, pytest.param(signal.SIGINT, marks=slow), pytest.param(signal.SIGUSR1, marks=slow)]
)
def test_other_signals_are_passed_on(number, forked, hold, split_tiny):
    """Under nohup, too, which has children ignore SIGHUP: servers.Process takes that back."""
    caller = forked(hold(split_tiny).path)
    caller.reader()
    assert caller.stop(number) == (130 if number == signal.SIGINT else -number)


@server_test
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGABRT, marks=slow)])
def test_caller_dies_of_the_servers_signal(number, standby, forked, split_tiny):
    caller = forked(split_tiny)
    caller.main().send_signal(number)
    assert caller.process.wait(300) == -number
    assert standby.process.poll() is None


@server_test
def test_server_ends_with_its_supervisor(forked, split_tiny):
    """Nobody could tell the caller any more how the server ends."""
    caller = forked(split_tiny)
    processes = caller.family()
    caller.main().parent().kill()
    assert caller.process.wait(300) == 2
    assert caller.says("has lost this server")
    check_nothing_is_left(processes, caller.port)


@server_test
def test_end_of_a_standby(start, split_tiny, tmp_path):
    """Killed while one server runs and another is being started; then its socket is stale."""
    standby = start.add(Standby(tmp_path)).wait()
    running = start(split_tiny, standby=standby).wait_until_ready(3)
    processes = running.family()
    standby.process.send_signal(signal.SIGSTOP)
    starting = start(split_tiny, standby=standby)
    starting.wait_for(lambda: psutil.Process(starting.process.pid).net_connections("unix"))
    standby.process.kill()
    assert starting.process.wait(300) == 2
    assert starting.says(f"error: the standby at {standby.socket} does not answer")

    refused = run_script(SERVER, tmp_path / "nowhere", "--from-standby", standby.socket)
    assert refused.returncode == 2
    assert f"no standby at {standby.socket} (Connection refused); starting without one" in refused.stderr
    assert "nowhere" in refused.stderr.splitlines()[-1]  # and it has started by itself, as far as that went

    assert answers_of(running)
    assert running.stop() == 0
    check_nothing_is_left(processes, running.port)

    again = start.add(Standby(tmp_path))
    again.wait_for(lambda: again.says(f"{standby.socket} was left behind by a standby that has ended; it is replaced"))
    assert again.stop() == 0
    assert not standby.socket.exists()
    refused = run_script(SERVER, tmp_path / "nowhere", "--from-standby", standby.socket)
    assert f"no standby at {standby.socket} (No such file or directory)" in refused.stderr


# ---- who may not have a server, and why ------------------------------------------------------------


@server_test
def test_socket_is_its_owners(standby, split_tiny):
    """By its mode; and where somebody has changed that, by the user at the other end."""
    assert stat.S_IMODE(standby.socket.stat().st_mode) == 0o600
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    code = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "print(s.makefile().readline())"
    )
    paths = standby.socket, *list(standby.socket.parents)[:-1]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    command = [sys.executable, "-c", code, str(standby.socket)]
    try:
        for path in paths[1:]:
            path.chmod(modes[path] | 0o111)
        assert "PermissionError" in subprocess.run(command, capture_output=True, text=True).stderr
        standby.socket.chmod(0o666)
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=300).stdout)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert answer == {"refused": "belongs to user 0, not to 65534"}
    assert standby.servers() == []


def test_standby_of_another_user_is_not_used(split_tiny, tmp_path, start):
    """It would get the environment, and the streams."""
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        code = "import os, signal, socket; os.setuid(65534); socket.socket(fileno=0).listen(); print(flush=True)"
        other = start.process("-c", f"{code}; signal.pause()", stdin=listener)
        other.wait_for(lambda: other.says("\n"))
        done = run_script(SERVER, split_tiny, "--from-standby", tmp_path / "socket")
    assert done.returncode == 2
    assert "belongs to user 65534" in done.stderr


@server_test
def test_second_standby_on_a_socket(standby, split_tiny):
    done = run_script(SERVER, "--standby", standby.socket)
    assert done.returncode == 2
    assert f"--standby {standby.socket}: a standby waits there already" in done.stderr
    refused = run_script(SERVER, split_tiny / "nowhere", "--from-standby", standby.socket)  # the first one goes on
    assert "nowhere" in refused.stderr and "no standby" not in refused.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "is there already, and no socket"),
        ("no folder/socket", "No such file or directory"),
        ("long" * 40, "too long"),
    ],
)
def test_socket_that_cannot_be(name, message, tmp_path):
    (tmp_path / "file").write_text("of somebody")
    done = run_script(SERVER, "--standby", tmp_path / name)
    assert done.returncode == 2
    assert name in done.stderr and message in done.stderr
    assert (tmp_path / "file").read_text() == "of somebody"


@pytest.mark.parametrize("arguments", [["CKPT", "--standby", "S"], ["--standby", "S", "--port", "1"], []])
def test_bad_command_lines(arguments):
    done = run_script(SERVER, *arguments)
    assert done.returncode == 2
    assert ("stands alone" if arguments else "no checkpoint") in done.stderr


@server_test
def test_another_script_than_the_standbys(standby, split_tiny, tmp_path):
    copy = tmp_path / SERVER.name
    copy.write_text(SERVER.read_text() + "# changed\n")
    done = run_script(copy, split_tiny, "--from-standby", standby.socket)
    assert done.returncode == 2
    assert "has been started with another progressive_serve.py than there is now: restart it" in done.stderr


@server_test
def test_another_vllm_than_the_standbys(standby, split_tiny, tmp_path):
    """As after an upgrade."""
    (tmp_path / "vllm-9.9.dist-info").mkdir()
    (tmp_path / "vllm-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    done = run_script(SERVER, split_tiny, "--from-standby", standby.socket, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "another vLLM than there is now: restart it" in done.stderr


@server_test
def test_environment_that_cannot_be_honoured(standby, split_tiny):
    late = {"VLLM_LOGGING_LEVEL": "DEBUG", "OMP_NUM_THREADS": "3", "TORCHINDUCTOR_COMPILE_THREADS": "9"}
    done = run_script(SERVER, split_tiny, "--from-standby", standby.socket, **late)
    assert done.returncode == 2
    for name in late:
        assert f"{name} (for " in done.stderr
    assert "DEBUG" not in done.stderr  # a value may be a secret
    assert "start a standby with it" in done.stderr and "leave --from-standby out" in done.stderr


@pytest.mark.parametrize(
    ("name", "is_late"),
    [
        ("LD_PRELOAD", True),
        ("PYTHONHASHSEED", True),
        ("HF_HUB_OFFLINE", True),
        ("HF_TOKEN", False),
        ("TRITON_CACHE_DIR", False),  # read at each use
        ("TRITON_F32_DEFAULT", True),
        ("VLLM_ROCM_USE_AITER", True),
        ("VLLM_CPU_KVCACHE_SPACE", False),
        ("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", False),
        ("TMPDIR", False),
        ("AWS_ENDPOINT_URL", False),
        ("https_proxy", False),
        ("CUDA_VISIBLE_DEVICES", False),
    ],
)
def test_variables(name, is_late):
    import progressive_serve

    for ours, theirs in (({}, {name: "1"}), ({name: "1"}, {}), ({name: "1"}, {name: "2"})):
        try:
            progressive_serve.check_environment(ours, theirs, {})
        except progressive_serve.UsageError as error:
            assert is_late and name in str(error)
        else:
            assert not is_late
    progressive_serve.check_environment({name: "1"}, {name: "1"}, {})


def test_limit_that_cannot_be_taken_over(monkeypatch):
    """That of a caller which has more rights than the standby."""
    import progressive_serve

    def refuse(*_) -> None:
        raise PermissionError(1, "Operation not permitted")

    caller = progressive_serve.Caller.of_this_process([])
    monkeypatch.setattr(resource, "setrlimit", refuse)
    descriptors = [*map(os.dup, (0, 1, 2)), os.open(".", os.O_PATH)]
    with pytest.raises(progressive_serve.UsageError, match="RLIMIT_.*Operation not permitted"):
        progressive_serve.take_over(caller, descriptors)


# ---- what a standby is -----------------------------------------------------------------------------


@server_test
def test_standby_is_one_thread_and_says_what_it_takes(standby):
    process = psutil.Process(standby.process.pid)
    assert process.num_threads() == 1
    assert float(re.search(r"it takes ([\d.]+) GiB", standby.log.read_text())[1]) > 0.1


def test_standby_with_threads_is_refused():
    """A fork copies one of them, and what the others have locked stays locked."""
    import progressive_serve

    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="started threads"):
            progressive_serve.check_forkable()
    finally:
        done.set()
        thread.join()


def test_late_imports_are_there():
    """Else a table that has gone stale would cost every server its imports again."""
    import importlib

    import progressive_serve

    for name in (*progressive_serve.LATE_IMPORTS, *progressive_serve.LATE_IMPORTS_CPU):
        assert importlib.util.find_spec(name), name
