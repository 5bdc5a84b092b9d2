"""What tests start, ask and wait for: servers, the standby that forks them, checkpoints whose stages are held back."""

import contextlib
import ctypes
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
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "progressive_serve.py"
STOCK = ("-m", "vllm.entrypoints.openai.api_server", "--enforce-eager")
SERVED = ["--max-model-len", "1024", "--max-num-seqs", "16"]
KV_CACHE = ["--kv-cache-memory-bytes", str(256 << 20)]
# Seconds that a test waits for a state: no busy machine takes so long. Who writes a test may want fewer.
LIMIT = float(os.environ.get("TEST_LIMIT", 300))
MARK = "TEST_WORKER"  # in the environment of every process that a test starts, and of whatever that starts
# The environment that scripts are started with. It is noted before this process imports vLLM, which changes variables:
# a standby refuses a caller whose environment is another one.
os.environ[MARK] = str(os.getpid())
ENVIRON = dict(os.environ)
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
with contextlib.suppress(OSError):  # Linux divides processors among sessions; a standby's servers have their own
    Path("/proc/self/autogroup").write_text("-10")
may_start = True  # conftest.py: whether the test that runs is marked as one that starts servers


# ---- waiting -----------------------------------------------------------------------------------------


def wait_for(what: Callable, seconds: float = LIMIT, told: Callable[[], str] = str, pause: float = 0.02):
    """Returns what `what()` returns as soon as that is true; fails with what `told()` says after the limit."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {told()}"
        time.sleep(pause)  # a wait for a state asks for it again and again
    return found


def check_nothing_is_left(processes: list[psutil.Process], *ports: int) -> None:
    """Processes have ended, or end now, and nobody listens at ports."""
    _, alive = psutil.wait_procs(processes, timeout=LIMIT)
    assert alive == []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are not listeners
            probe.bind(("127.0.0.1", port))


def processes_of_tests() -> list[psutil.Process]:
    """What runs of all that this test worker has started, whoever is its parent by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.pid != os.getpid() and process.environ().get(MARK) == ENVIRON[MARK]
            if is_ours and runs(process):
                found.append(process)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- processes ---------------------------------------------------------------------------------------


def check_may_start() -> None:
    assert may_start, "mark this test with pytest.mark.server: make test-quick starts none"


def prepare_child() -> None:
    """In a child before its program. It ends with this test worker, if that is killed.

    What `nohup make test` has ignored is no longer: a child would ignore it, too, and pass it on to nobody.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Process:
    """A script as a user starts it, in a process group of its own, with its output in a file.

    It stays in the session of its test: Linux divides processors among sessions, and on two cores vLLM's processes,
    which spin, have kept those of another session waiting for seconds.
    """

    def __init__(self, log: Path, *command, env: dict[str, str] | None = None, prepare=None, **options):
        self.log = log

        def before() -> None:
            prepare_child()
            if prepare:
                prepare()

        with open(log, "wb") as file:
            options |= {"stdout": file, "stderr": file, "process_group": 0, "preexec_fn": before}
            command = [sys.executable, *map(str, command)]
            self.process = subprocess.Popen(command, env=ENVIRON | (env or {}), **options)

    def tail(self) -> str:
        return self.log.read_text()[-4000:]

    def wait_for(self, what: Callable, seconds: float = LIMIT, pause: float = 0.02):
        """As wait_for(), as long as the process runs."""

        def holds():
            found = what()
            assert found or self.process.poll() is None, f"ended with {self.process.returncode}: {self.tail()}"
            return found

        return wait_for(holds, seconds, self.tail, pause)

    def says(self, text: str) -> bool:
        return text in self.log.read_text()

    def main(self) -> psutil.Process:
        """The process that does the work: this one, or the one that a standby has forked for it."""
        return psutil.Process(self.process.pid)

    def family(self) -> list[psutil.Process]:
        """All that belongs to it and runs now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            main = self.main()
            return list(dict.fromkeys([psutil.Process(self.process.pid), main, *main.children(recursive=True)]))
        return []

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT)

    def end(self) -> None:
        """At the end of a test. Fails if something of it stays."""
        family = self.family() if self.process.poll() is None else []
        try:
            if self.process.poll() is None:
                self.stop()
            check_nothing_is_left(family)
        finally:
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


class Standby(Process):
    """progressive_serve.py --standby, at a socket in a folder."""

    def __init__(self, folder: Path, **options):
        check_may_start()
        self.socket = folder / "standby"
        super().__init__(folder / "standby.log", SERVER, "--standby", self.socket, **options)

    def wait(self) -> "Standby":
        self.wait_for(lambda: self.says("waits for --from-standby"))
        return self

    def servers(self) -> list[psutil.Process]:
        supervisors = psutil.Process(self.process.pid).children()
        return [server for supervisor in supervisors for server in supervisor.children()]

    def family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            return [main, *main.children(recursive=True)]
        return []


class Server(Process):
    """progressive_serve.py, or another server's command, on a checkpoint; and its clients.

    standby: who forks it; None: it starts by itself. counted: its steps can be allowed one by one, see compute_until.
    """

    def __init__(
        self,
        log: Path,
        checkpoint,
        *options,
        standby: Standby | None = None,
        command=(SERVER,),
        kv_cache=KV_CACHE,
        counted: bool = False,
        **how,
    ):
        check_may_start()
        self.port, self.standby, self.is_suspended = free_port(), standby, False
        self.steps = log.with_name(f"{log.name}-steps") if counted else None
        if counted:
            self.steps.mkdir()
            options += ("--scheduler-cls", "tests.stepped.scheduler")
            how["env"] = {"TEST_STEPS": str(self.steps), **how.get("env", {})}
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [checkpoint, "--port", self.port, *SERVED, *kv_cache, *options]
        if standby:
            arguments += ["--from-standby", standby.socket]
        super().__init__(log, *command, *arguments, **how)

    def main(self) -> psutil.Process:
        """The server. A standby's is known by its port: ps shows the caller's command line for it."""
        if not self.standby:
            return super().main()

        def forked():
            for server in self.standby.servers():
                if f" --port {self.port} " in " ".join(cmdline(server)):
                    return server
            return None

        return self.wait_for(forked)

    def family(self) -> list[psutil.Process]:
        """With a standby, who supervises the server is one of them."""
        family = super().family()
        if self.standby and len(family) > 1:
            with contextlib.suppress(psutil.NoSuchProcess):
                family.append(family[1].parent())
        return family

    def reader(self) -> psutil.Process:
        """The reader process, once it is what it is called: before that a child looks like its parent."""
        return self.wait_for(lambda: [child for child in self.main().children() if "_read" in cmdline(child)])[0]

    @functools.cached_property
    def worker(self) -> psutil.Process:
        """The process that computes, once it has been created."""

        def workers() -> list[psutil.Process]:
            children = self.main().children(recursive=True)
            return [child for child in children if name_of(child).startswith("VLLM::Worker")]

        return self.wait_for(workers)[0]

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Nothing is computed meanwhile: what is in flight stays in flight. It may be entered once more within."""
        if self.is_suspended:
            yield
            return
        self.worker.suspend()
        self.is_suspended = True
        try:
            yield
        finally:
            self.is_suspended = False
            with contextlib.suppress(psutil.NoSuchProcess):
                self.worker.resume()

    def compute_until(self, what: Callable) -> None:
        """One step at a time, until that is true; it is suspended before and after.

        A stream of 900 tokens takes 1.5 s, for which the test, or another process of the server, may get no processor.
        """
        allowed = self.steps / "allowed"
        with self.suspended():
            (self.steps / "counted").touch()
            self.worker.resume()
            self.wait_for(lambda: what() or allowed.touch(), pause=0.05)
            self.worker.suspend()
            allowed.unlink(missing_ok=True)
            (self.steps / "counted").unlink()

    def arrive(self, held: "Held", *stages: int) -> None:
        """The reader reads these stages, or all, while nothing is computed."""
        stages = stages or tuple(held.files)
        with self.suspended():
            journal = journal_of(self.reader())
            held.release(*stages)
            self.wait_for(lambda: stages_of(journal, "resident").issuperset(stages))

    def grow(self, held: "Held", *stages: int) -> None:
        """These stages, or all, arrive and become active, of which the last is certain. No stream is over before that
        which has begun since the server was suspended.
        """
        stages = stages or tuple(held.files)
        with self.suspended():
            journal = journal_of(self.reader())
            self.arrive(held, *stages)
            self.compute_until(lambda: max(stages) in stages_of(journal, "active"))

    def is_up(self) -> bool:
        """Whether it listens; an answer may take longer."""
        with contextlib.suppress(requests.ConnectionError):
            return bool(self.progress())
        return False

    def is_ready(self, stage: int = 1) -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{self.url}/ready?stage={stage}", timeout=LIMIT).ok
        return False

    def wait_until_ready(self, stage: int = 1) -> "Server":
        self.wait_for(lambda: self.is_ready(stage))
        give_way(self.family())
        return self

    def progress(self) -> dict:
        return requests.get(f"{self.url}/progress", timeout=LIMIT).json()

    def events(self) -> list[str]:
        return [event["event"] for event in self.progress()["timeline"]]

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = requests.get(f"{self.url}/metrics", timeout=LIMIT).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.split("[{ ]", line)[0] == name)

    def post(self, prompt, tokens: int = 12, path: str = "/v1/completions", **options) -> requests.Response:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **options}
        return requests.post(self.url + path, json=body, timeout=LIMIT, stream=body.get("stream", False))

    def complete(self, prompt, tokens: int = 12, **options) -> requests.Response:
        response = self.post(prompt, tokens, **options)
        response.raise_for_status()
        return response

    def stream(self, prompt, tokens: int = 900, **options) -> requests.Response:
        """An answer that has begun, of which most is still to come."""
        return self.complete(prompt, tokens, stream=True, return_token_ids=True, **options)

    def listeners(self) -> list[int]:
        """The processes of the server that hold its port: with a worker among them, vLLM may fail at shutdown."""
        return [
            process.pid
            for process in self.family()
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port
        ]


def give_way(server: list[psutil.Process]) -> None:
    """Whoever computes gives way to the server's other processes, and to its test.

    vLLM's processes spin: they kept a test from running for a second, in which a stream of 900 tokens ended.
    """
    for process in server:
        if name_of(process).startswith("VLLM::"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.nice(10)


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended. Nobody may have asked for its exit status yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def token_ids(response: requests.Response) -> list[list[int]]:
    """Of each choice of a completion that was asked for them."""
    return [choice["token_ids"] for choice in response.json()["choices"]]


def chunks_of(stream: requests.Response) -> Iterator[dict]:
    """The events of a streamed answer."""
    for line in stream.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def streamed_tokens(stream: requests.Response) -> list[int]:
    """All tokens of a stream, of which nobody else has read anything."""
    return [token for chunk in chunks_of(stream) for token in chunk["choices"][0]["token_ids"] or ()]


def journal_of(reader: psutil.Process) -> Path:
    return Path(json.loads(reader.cmdline()[-1])["journal"])


def stages_of(journal: Path, event: str) -> set[int]:
    """The stages of which a journal tells this."""
    lines = journal.read_text().rpartition("\n")[0].splitlines()  # the last one may still be being written
    return {row["stage"] for row in map(json.loads, lines) if row["event"] == event}


def shared_memory(process: psutil.Process) -> set[Path]:
    """What vLLM exchanges its messages by."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {Path(region.path) for region in process.memory_maps() if region.path.startswith("/dev/shm/psm_")}
    return set()


# ---- all that one test starts ------------------------------------------------------------------------


class Started:
    """Starts processes, and ends them with the test; a server is forked by the worker's standby unless it starts alone.

    With TEST_STANDBY=0 in the environment every server starts by itself.
    """

    def __init__(self, folder: Path, standby: Callable[[], Standby]):
        self.folder, self.standby, self.processes = folder, standby, []

    def __call__(self, checkpoint, *options, alone: bool = False, **how) -> Server:
        alone = alone or os.environ.get("TEST_STANDBY") == "0"
        how = {"standby": None if alone else self.standby()} | how
        return self.add(Server(self.new_log(), checkpoint, *options, **how))

    def stock(self, checkpoint, *options) -> Server:
        return self(checkpoint, *options, alone=True, command=(*STOCK, "--model"))

    def process(self, *command, **how) -> Process:
        return self.add(Process(self.new_log(), *command, **how))

    def new_log(self) -> Path:
        return self.folder / f"log{len(self.processes)}"

    def add(self, process: Process) -> Process:
        self.processes.append(process)
        return process

    def end(self) -> None:
        with contextlib.ExitStack() as stack:  # each, whatever happens to the others; the last one first
            for process in self.processes:
                stack.callback(process.end)


# ---- checkpoints -------------------------------------------------------------------------------------


def age(folder: Path) -> Path:
    """Nobody is just copying it there."""
    for path in (folder, *folder.iterdir()):
        os.utime(path, (0, 0), follow_symlinks=False)
    return folder


def flip_last_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, (0, 0))  # long ago: nobody is just copying it there


class Held:
    """A copy of a checkpoint whose stages after the first are still to come: a server waits for them at stage `after`.

    That holds a server at a stage for as long as a test likes, on any machine. The copy looks like one that somebody is
    making: a file beside the missing ones changes again and again, without which they would soon be called missing.
    """

    def __init__(self, checkpoint: Path, folder: Path, after: int = 1):
        self.path = age(Path(shutil.copytree(checkpoint, folder / "held")))
        self.kept, self.ended = folder / "to come", threading.Event()
        self.kept.mkdir()
        stages = json.loads((checkpoint / "progressive.json").read_text())["stages"]
        self.later = {row["stage"]: [file["name"] for file in row["files"]] for row in stages if row["stage"] > after}
        self.withhold()
        self.copier = threading.Thread(target=self.go_on, daemon=True)
        self.copier.start()

    def go_on(self) -> None:
        while not self.ended.wait(1.0):  # the pace of a copier
            (self.path / ".more.safetensors.partial").touch()

    def withhold(self) -> None:
        """At first, and once more for the next server on the same folder."""
        self.files = dict(self.later)
        for name in (name for names in self.files.values() for name in names):
            os.rename(self.path / name, self.kept / name)

    def release(self, *stages: int) -> None:
        """The files of these stages arrive, or all that are missing."""
        for stage in stages or tuple(self.files):
            for name in self.files.pop(stage):
                os.rename(self.kept / name, self.path / name)

    def end(self) -> None:
        self.ended.set()
        self.copier.join()


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    """A file system of its own in a new folder, with so little room that it becomes full."""
    import pytest

    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a full disk cannot be made here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
