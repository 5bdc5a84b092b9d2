#!/usr/bin/env python3
"""A stand-in for progressive_serve.py, and for stock vLLM, that starts in no time: what benchmarks ask of a server.

Each look at /progress finds it one stage further; what it answers tells the stage. The whole memory of a standby is
STANDBY_BYTES. With STUBBORN=FOLDER:N in the environment the Nth server that is started never listens, and ends only
when FOLDER/release is there: FOLDER/started-N and FOLDER/told say how far it is.
"""

import argparse
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STANDBY_BYTES = 100_000_000
BEGAN = time.monotonic()


# ---- what its planes are decoded by ------------------------------------------------------------------

RECORD = ".planes"


def import_for_decoding() -> None:
    pass


def join_planes(records: list[memoryview], allocate=bytearray) -> tuple[str, memoryview]:
    """As many bytes as in its records, of which nobody looks at the values."""
    return "", memoryview(b"".join(map(bytes, records)))


# ---- what it is started as ---------------------------------------------------------------------------


def since_start() -> float:
    return time.monotonic() - BEGAN


def read(job: dict) -> None:
    """The reader process, of a disk that takes a hundredth of a second."""
    now = time.monotonic()
    rows = [{"event": "reading", "at": now}, {"event": "resident", "at": now + 0.01}]
    Path(job["journal"]).write_text("".join(json.dumps(row) + "\n" for row in rows))


def wait_as_standby() -> None:
    held = b"1" * STANDBY_BYTES
    print("waits for --from-standby", file=sys.stderr, flush=True)
    signal.sigwait([signal.SIGTERM])
    sys.exit(len(held) and 143)


def be_stubborn(folder: Path, which: int) -> None:
    """Returns unless it is this one's turn."""
    number = next(number for number in range(1, 100) if claim(folder / f"started-{number}"))
    if number == which:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        (folder / "held").touch()
        signal.sigwait([signal.SIGTERM])
        (folder / "told").touch()
        while not (folder / "release").exists():
            time.sleep(0.01)
        sys.exit(143)


def claim(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    last, hold, looks, key = 1, 1, 0, None

    def stage(self) -> int:
        return min(max(1, Handler.looks), Handler.hold)

    def is_refused(self) -> bool:
        """As vLLM does it, where there is a key."""
        refused = (
            Handler.key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {Handler.key}"
        )
        if refused:
            self.send({"error": "Unauthorized"}, status=401)
        return bool(refused)

    def do_GET(self):
        if self.is_refused():
            return
        if self.path == "/v1/models":
            self.send({"data": [{"id": "stand-in", "max_model_len": 1024}]})
            return
        Handler.looks += 1
        stages = [{"stage": stage, "seconds": None, "bytes": 1000} for stage in range(1, Handler.last + 1)]
        for row in stages[: self.stage()]:
            row["seconds"] = since_start()
        names = ("start", "imported", "reading", "resident", "model created", "bound", "ready", "active")
        timeline = [{"event": name, "stage": 1, "seconds": number / 1e6} for number, name in enumerate(names)]
        progress = {"stage": self.stage(), "hold_stage": Handler.hold, "error": None, "min_stage": 1}
        self.send(progress | {"stages": stages, "timeline": timeline})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return
        text = " of all" if self.stage() == Handler.last else f" of stage {self.stage()}"
        answer = {"choices": [{"text": text}], "usage": {"completion_tokens": body["max_tokens"]}}
        self.send(answer, b"data: " if body.get("stream") else b"")

    def send(self, content: dict, prefix: bytes = b"", status: int = 200) -> None:
        body = prefix + json.dumps(content).encode() + b"\n"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Progressive-Stage": str(self.stage())}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--model", type=Path)  # of stock vLLM, which has all at once
    parser.add_argument("--port", type=int)
    parser.add_argument("--hold-stage", type=int)
    parser.add_argument("--standby")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    args, _ = parser.parse_known_args()
    if args.standby:
        wait_as_standby()
    manifest = (args.model or args.checkpoint) / "progressive.json"
    stages = len(json.loads(manifest.read_text())["stages"]) if manifest.exists() else 1
    if (args.hold_stage or 1) > stages:
        parser.error(f"--hold-stage {args.hold_stage}: there are {stages} stages")
    if "STUBBORN" in os.environ:
        folder, _, which = os.environ["STUBBORN"].rpartition(":")
        be_stubborn(Path(folder), int(which))
    Handler.last, Handler.hold, Handler.key = stages, args.hold_stage or stages, args.api_key
    Handler.looks = stages if args.model else 0
    print(f"Starting vLLM server on {args.port}", flush=True)
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "_read":
        read(json.loads(sys.argv[2]))
    else:
        main()
