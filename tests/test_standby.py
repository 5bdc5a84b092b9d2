"""progressive_serve.py --standby: servers that a standby forks, beside such as start by themselves."""

import ast
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import requests
from conftest import SERVER, flip_last_byte, free_port, run_script

OPTIONS = ["--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)]
PROMPTS = [f"Question number {number}: why?" for number in range(4)]


# ---- a standby, and its servers --------------------------------------------------------------------


def wait_for(what, seconds: float = 90):
    """Returns what it returns as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


class Process:
    """A script as a user starts it, in a process group of its own, with its output in a file."""

    def __init__(self, log: Path, *arguments, script: Path = SERVER, **options):
        self.log = log
        command = [sys.executable, str(script), *map(str, arguments)]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, process_group=0, **options)

    def says(self, text: str) -> bool:
        found = text in self.log.read_text()
        assert found or self.process.poll() is None, self.log.read_text()[-4000:]
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Standby(Process):
    def __init__(self, folder: Path):
        self.socket = folder / "standby"
        super().__init__(folder / "standby.log", "--standby", self.socket)

    def wait(self) -> "Standby":
        wait_for(lambda: self.says("waits for --from-standby"))
        return self

    def servers(self) -> list[psutil.Process]:
        supervisors = psutil.Process(self.process.pid).children()
        return [server for supervisor in supervisors for server in supervisor.children()]

    def kill(self) -> None:
        """With all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
        super().kill()


class Server(Process):
    """A server, to its caller: from a standby, or by itself."""

    def __init__(self, log: Path, checkpoint, *arguments, standby: Standby | None = None, **options):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [checkpoint, "--port", self.port, *OPTIONS, *arguments]
        if standby:
            arguments += ["--from-standby", standby.socket]
        super().__init__(log, *arguments, **options)

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return requests.get(f"{self.url}/progress", timeout=30).json()["stage"] == 3
        except requests.ConnectionError:
            return False

    def answers(self) -> list[dict]:
        """Tokens and logprobs of every prompt."""
        body = {"prompt": PROMPTS, "max_tokens": 16, "temperature": 0, "logprobs": 2, "return_token_ids": True}
        response = requests.post(f"{self.url}/v1/completions", json=body, timeout=60)
        return [(choice["token_ids"], choice["logprobs"]) for choice in response.json()["choices"]]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def one_standby(tmp_path_factory):
    standby = Standby(tmp_path_factory.mktemp("standby"))
    try:
        yield standby.wait()
    finally:
        standby.kill()


@pytest.fixture
def standby(one_standby):
    """The same for all tests; without a server at the begin and at the end of each."""
    yield one_standby
    wait_for(lambda: psutil.Process(one_standby.process.pid).children() == [])


@pytest.fixture
def start(tmp_path):
    """Starts servers, and whatever else is to be ended with the test."""
    started = []

    def start(kind, *arguments, **options):
        log = tmp_path if kind is Standby else tmp_path / f"log{len(started)}"
        started.append(kind(log, *arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def worker_of(server: psutil.Process) -> psutil.Process:
    """The process that computes."""
    return next(child for child in server.children(recursive=True) if child.name().startswith("VLLM::Worker"))


def threads_of(process: psutil.Process) -> list[list[int]]:
    """The cores that each of its threads may use."""
    return sorted(sorted(os.sched_getaffinity(thread.id)) for thread in process.threads())


def check_nothing_is_left(processes: list[psutil.Process], *servers: Server) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    for server in servers:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are not listeners
            probe.bind(("127.0.0.1", server.port))


# ---- to its caller, a server like any other --------------------------------------------------------


def test_server_is_as_one_that_started_by_itself(standby, start, split_tiny):
    """Same answers to the last bit, same threads on the same cores: a pool of as many as the caller wants."""
    cores = sorted(os.sched_getaffinity(0))
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    answers, threads = [], []
    for by in (standby, None):  # one after the other, for they would have to share the cores
        server = start(Server, split_tiny, standby=by, env=env)
        wait_for(server.is_up)
        answers.append(server.answers())
        process = by.servers()[0] if by else psutil.Process(server.process.pid)
        on_one_core = [found for found in threads_of(worker_of(process)) if len(found) == 1]
        threads.append([found for found in on_one_core if found != cores[:1]])  # there the main thread and many others
        timeline = requests.get(f"{server.url}/progress", timeout=30).json()["timeline"]
        at = {event["event"]: event["seconds"] for event in timeline}
        assert 0 < at["imported"] < at["model created"] < at["ready"]
        assert f"{split_tiny} --port {server.port}" in " ".join(process.cmdline())  # as ps shows it
        assert server.stop() == 0
    assert answers[0] == answers[1]
    assert threads[0] == threads[1] == [[core] for core in cores[1:]]


def test_two_servers_at_once(standby, start, split_tiny):
    first, second = (start(Server, split_tiny, standby=standby) for _ in range(2))
    wait_for(first.is_up)
    wait_for(second.is_up)
    assert len(standby.servers()) == 2
    assert first.answers() == second.answers()
    processes = psutil.Process(standby.process.pid).children(recursive=True)
    assert first.stop() == 0
    assert second.is_up()
    assert second.stop(signal.SIGINT) == 0
    check_nothing_is_left(processes, first, second)


def test_process_is_the_callers(standby, start, split_tiny, tmp_path):
    """Working folder, umask, environment, limits, niceness and affinity: as of a process that the caller has forked."""
    core = min(os.sched_getaffinity(0))

    def prepare() -> None:
        os.umask(0o027)
        os.nice(3)
        os.sched_setaffinity(0, [core])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 4000))

    shutil.copytree(split_tiny, tmp_path / "here")
    env = {**os.environ, "SOMETHING": "of the caller's", "TMPDIR": str(tmp_path)}
    start(Server, "here", standby=standby, cwd=tmp_path, env=env, preexec_fn=prepare)
    (server,) = wait_for(standby.servers)
    reader = wait_for(lambda: [child for child in server.children() if "_read" in child.cmdline()])[0]
    assert reader.environ().items() >= {"SOMETHING": "of the caller's", "TMPDIR": str(tmp_path)}.items()
    assert Path(server.cwd()) == tmp_path
    assert "Umask:\t0027" in Path(f"/proc/{server.pid}/status").read_text()
    assert (reader.nice(), reader.cpu_affinity()) == (3, [core])
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


def test_control_group_is_the_callers(standby, control_group, start, split_tiny):
    """Limits of it, such as bench_coldstart.py's on storage, hold for the server."""

    def enter() -> None:
        (control_group / "cgroup.procs").write_text(str(os.getpid()))

    start(Server, split_tiny, standby=standby, preexec_fn=enter)
    (server,) = wait_for(standby.servers)
    assert control_group.name in Path(f"/proc/{server.pid}/cgroup").read_text()
    assert control_group.name not in Path(f"/proc/{standby.process.pid}/cgroup").read_text()


def test_bad_checkpoint(standby, split_tiny, tmp_path):
    broken = Path(shutil.copytree(split_tiny, tmp_path / "broken"))
    (broken / "model-stage1.safetensors").unlink()  # without which nothing can be served
    for path in (broken, *broken.iterdir()):
        os.utime(path, (0, 0))  # long ago: nobody is just copying it there
    forked = run_script(SERVER, broken, "--from-standby", standby.socket)
    alone = run_script(SERVER, broken)
    assert (forked.returncode, forked.stdout, forked.stderr) == (2, "", alone.stderr)
    assert "model-stage1.safetensors is missing" in forked.stderr


def test_damaged_checkpoint(standby, split_tiny, tmp_path):
    """Found while the server starts, and not by its main thread."""
    broken = Path(shutil.copytree(split_tiny, tmp_path / "broken"))
    flip_last_byte(broken / "model-stage1.safetensors")
    done = run_script(SERVER, broken, "--port", free_port(), *OPTIONS, "--from-standby", standby.socket)
    assert done.returncode == 2
    assert "model-stage1.safetensors: blake3 checksum differs" in done.stderr


# ---- signals and ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "number"), [("reading", signal.SIGTERM), ("reading", signal.SIGKILL), ("serving", signal.SIGKILL)]
)
def test_signal_to_the_caller_ends_everything(moment, number, standby, start, split_tiny):
    caller = start(Server, split_tiny, standby=standby)
    (server,) = wait_for(standby.servers)
    wait_for(lambda: [child for child in server.children() if "_read" in child.cmdline()])
    if moment == "serving":
        wait_for(caller.is_up)
    processes = [server.parent(), server, *server.children(recursive=True)]
    assert caller.stop(number) == (143 if number == signal.SIGTERM else -number)
    check_nothing_is_left(processes, caller)


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
    program += ["assert select.select([woken], [], [], 5)[0]", "assert server.recv(1) == bytes([signal.SIGTERM])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_other_signals_are_passed_on(number, standby, start, split_tiny):
    caller = start(Server, split_tiny, standby=standby)
    (server,) = wait_for(standby.servers)
    wait_for(lambda: [child for child in server.children() if "_read" in child.cmdline()])
    assert caller.stop(number) == (130 if number == signal.SIGINT else -number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_caller_dies_of_the_servers_signal(number, standby, start, split_tiny):
    caller = start(Server, split_tiny, standby=standby)
    (server,) = wait_for(standby.servers)
    server.send_signal(number)
    assert caller.process.wait(30) == -number
    assert standby.process.poll() is None


def test_server_ends_with_its_supervisor(standby, start, split_tiny):
    """Nobody could tell the caller any more how the server ends."""
    caller = start(Server, split_tiny, standby=standby)
    (server,) = wait_for(standby.servers)
    server.parent().kill()
    assert caller.process.wait(30) == 2
    assert "has lost this server" in caller.log.read_text()
    psutil.wait_procs([server], timeout=10)
    assert not server.is_running()


def test_end_of_a_standby(start, split_tiny, tmp_path):
    """Killed while one server runs and another is being started; then its socket is stale."""
    standby = start(Standby).wait()
    running = start(Server, split_tiny, standby=standby)
    wait_for(running.is_up)
    standby.process.send_signal(signal.SIGSTOP)
    starting = start(Server, split_tiny, standby=standby)
    wait_for(lambda: psutil.Process(starting.process.pid).net_connections("unix"))
    standby.process.kill()
    assert starting.process.wait(30) == 2
    assert f"error: the standby at {standby.socket} does not answer" in starting.log.read_text()

    refused = run_script(SERVER, tmp_path / "nowhere", "--from-standby", standby.socket)
    assert refused.returncode == 2
    assert f"no standby at {standby.socket} (Connection refused); starting without one" in refused.stderr
    assert "nowhere" in refused.stderr.splitlines()[-1]  # and it has started by itself, as far as that went

    assert running.answers()
    assert running.stop() == 0

    again = start(Standby)
    wait_for(lambda: again.says(f"{standby.socket} was left behind by a standby that has ended; it is replaced"))
    again.process.terminate()
    assert again.process.wait(30) == 0
    assert not standby.socket.exists()
    refused = run_script(SERVER, tmp_path / "nowhere", "--from-standby", standby.socket)
    assert f"no standby at {standby.socket} (No such file or directory)" in refused.stderr


# ---- who may not have a server, and why ------------------------------------------------------------


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
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=30).stdout)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert answer == {"refused": "belongs to user 0, not to 65534"}
    assert standby.servers() == []


def test_standby_of_another_user_is_not_used(split_tiny, tmp_path):
    """It would get the environment, and the streams."""
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        code = "import os, socket, time; os.setuid(65534); socket.socket(fileno=0).listen(); print(flush=True)"
        command = [sys.executable, "-c", f"{code}; time.sleep(60)"]
        with subprocess.Popen(command, stdin=listener, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            done = run_script(SERVER, split_tiny, "--from-standby", tmp_path / "socket")
            other.kill()
    assert done.returncode == 2
    assert "belongs to user 65534" in done.stderr


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


def test_another_script_than_the_standbys(standby, split_tiny, tmp_path):
    copy = tmp_path / SERVER.name
    copy.write_text(SERVER.read_text() + "# changed\n")
    done = run_script(copy, split_tiny, "--from-standby", standby.socket)
    assert done.returncode == 2
    assert "has been started with another progressive_serve.py than there is now: restart it" in done.stderr


def test_another_vllm_than_the_standbys(standby, split_tiny, tmp_path):
    """As after an upgrade."""
    (tmp_path / "vllm-9.9.dist-info").mkdir()
    (tmp_path / "vllm-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    done = run_script(SERVER, split_tiny, "--from-standby", standby.socket, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "another vLLM than there is now: restart it" in done.stderr


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
