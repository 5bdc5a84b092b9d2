#!/usr/bin/env python3
"""What a GPU machine is to show, in order of importance, in one command; and how vLLM gets there without a network.

    python tests/gpu_check.py pack --have HAVE.txt --out .gpu    # here: wheels, in pieces small enough to carry
    python tests/gpu_check.py receive .gpu/PIECE                 # there, one after the other; the last one installs
    export PYTHONPATH=/tmp/gpu-site
    python tests/gpu_check.py run --out OUT --seconds 540        # there: what fits that time
    python tests/gpu_check.py run --out OUT --steps gaps,later   # there, in a later call
    python tests/gpu_check.py run --small --out /tmp/out         # here, on a CPU: the rehearsal

HAVE.txt names the packages that the machine has already. Weights are made there, random and of a known shape, never
carried; of the tree only what git tracks, and demo/checkpoint and demo/model.

Each step is some commands with a time limit. What it has found is written at once: OUT/STEP.json by the benchmark,
OUT/STEP.log, and a line of OUT/summary.jsonl. A step that fails, or is stopped at its limit with all its processes,
keeps none of the next ones from running, unless these need what it makes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT.parent / "shared" / "gpu" / "offline_wheels.py"
ALSO = ("blake3==1.0.11", "zstandard==0.25.0")  # beside vLLM's own requirements
TAR, SITE = Path("/tmp/gpu-wheels.tar"), Path("/tmp/gpu-site")
CALL_BYTES = 64 << 20  # that travel with one call: what git tracks, and a piece
STOP_SECONDS = 10.0  # that a step has to end, once its time is over
ANSWERS = "final_state_equals_stock or server_from_stage_1_to_3 or server_of_planes_from_stage_1_to_3"


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


@dataclass(frozen=True)
class Step:
    """Some commands, one after the other, and how long they may take together."""

    name: str
    seconds: float
    commands: list[str]
    needs: str | None = None  # the step that makes what this one reads


# ---- steps ------------------------------------------------------------------------------------------


def steps(out: Path, work: Path, small: bool) -> list[Step]:
    """In order of importance. `small`: models that a CPU starts in seconds, one trial of each."""
    layers, planes = work / "layers", work / "planes"
    python, trials = shlex.quote(sys.executable), 1 if small else 5
    stages = "baseline,stage1,stage2,progressive"
    three, few = f"baseline,progressive,progressive@{planes}", min(trials, 3)
    # gVisor's kernel cannot say what is cached.
    unverified = " --unverified-cold" if platform.release() == "4.4.0" else ""

    def test(names: str) -> list[str]:
        # Where weights are float32 Triton's attention would compute in TF32, and is compared token by token.
        pytest = f"TRITON_F32_DEFAULT=ieee {python} -m pytest -q -p no:cacheprovider"
        return [f"{pytest} tests/test_progressive_serve.py -k '{names}'"]

    def bench(name: str, modes: str, options: str) -> list[str]:
        command = f"{python} bench_coldstart.py --checkpoint {layers} --mode {modes} {options}{unverified}"
        return [f"{command} --json {out / name}.json"]

    def split(folder: Path, option: str) -> str:
        model = f"{work / 'tiny'} {folder}" if small else f"--synthetic llama2-7b {folder}"
        return f"{python} prune_and_split.py {model} {option} --force"

    make = [f"{python} tests/gpu_check.py tiny {work / 'tiny'}"] if small else []
    look = ["nvidia-smi" if shutil.which("nvidia-smi") else "lscpu", f"{python} -m pip list --format freeze"]
    rates, stretch, streams = ("1x4,2x4", 20, 2) if small else ("1x256,8x256,64x256", 60, 32)
    # Of a CPU vLLM would take nearly all memory.
    memory = " --kv-cache-memory-bytes 268435456" if small else ""
    later = f"--compile-cache cold --server-args='--no-enforce-eager --optimize-later{memory}'"
    gaps = f"--stretch {stretch} --watch-gaps {streams}"
    sweep = "20" if small else "1000,500,200,118"
    table = [
        Step("machine", 60, look),
        # Does it start and answer, layers and planes, and are the tokens stock's?
        Step("answers", 400, test(ANSWERS)),
        Step("layers", 180, [*make, split(layers, "--layers 1-2" if small else "--layers 20-27")]),
        Step("planes", 300, [split(planes, "--planes")]),
        # TTFT against stock with its defaults, and eager; cold, disk as it is.
        Step("defaults", 480, bench("defaults", three, f"--trials {trials}"), "planes"),
        Step(
            "eager", 300, bench("eager", three, f"--trials {trials} --server-args='--enforce-eager{memory}'"), "planes"
        ),
        # Gates and graphs: the rate of each stage; addresses and kernels across transitions.
        Step("rates", 400, bench("rates", stages, f"--trials 1 --throughput {rates}"), "layers"),
        Step("graphs", 200, test("no_transition_changes_the_graph")),
        Step("gaps", 200, bench("gaps", "progressive", f"--trials 1 {gaps}"), "layers"),
        Step("later", 300, bench("later", "baseline,eager,progressive", f"--trials {few} {later}"), "layers"),
        Step("standby", 200, bench("standby", "progressive,standby", f"--trials {few}"), "layers"),
        Step("sweep", 600, bench("sweep", three, f"--trials 1 --sweep {sweep}"), "planes"),
    ]
    # Of a rehearsal others may use the cores.
    return [replace(step, seconds=3 * step.seconds) for step in table] if small else table


def run_step(step: Step, out: Path, seconds: float) -> dict:
    """What became of it: its exit status, or `stopped` at its limit; its processes have ended."""
    begin, log = time.monotonic(), out / f"{step.name}.log"
    status: int | str = 0
    with open(log, "w") as output:
        for command in step.commands:
            print(f"$ {command}", file=output, flush=True)
            process = subprocess.Popen(
                command, shell=True, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(max(0.0, begin + seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = "stopped"
            finally:
                end_group(process)
            if status != 0:
                break
    found = {"step": step.name, "status": status, "seconds": round(time.monotonic() - begin, 1), "limit": seconds}
    return found | {"end": log.read_text(errors="replace").splitlines()[-5:]}


def end_group(process: subprocess.Popen) -> None:
    """With all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


def run(out: Path, work: Path, small: bool, wanted: list[str] | None, seconds: float) -> int:
    """Exit status 0: every step that was asked for has run to its end, without a failure."""
    known = steps(out, work, small)
    if unknown := set(wanted or ()) - {step.name for step in known}:
        raise UsageError(f"--steps {','.join(sorted(unknown))}: the steps are {', '.join(step.name for step in known)}")
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    end, failed, all_well = time.monotonic() + seconds, set(), True
    for step in known:
        if wanted and step.name not in wanted:
            continue
        left = end - time.monotonic()
        if step.needs in failed:
            found = {"step": step.name, "status": f"needs {step.needs}"}
        elif left < min(30.0, step.seconds):
            found = {"step": step.name, "status": "no time left"}
        else:
            found = run_step(step, out, min(step.seconds, left))
        with open(out / "summary.jsonl", "a") as summary:
            print(json.dumps(found), file=summary)
        print(*(f"{key}: {value}" for key, value in found.items() if key != "end"), sep="  ", flush=True)
        if found["status"] != 0:
            failed.add(step.name)
            all_well = False
            print(*found.get("end", ()), sep="\n", flush=True)
    return 0 if all_well else 1


def make_tiny(folder: Path) -> None:
    """The tests' random model of four layers."""
    import torch
    from conftest import make_llama

    make_llama(folder, dtype=torch.bfloat16)


# ---- the way there ----------------------------------------------------------------------------------


def pack(have: Path, out: Path, piece_mib: int) -> None:
    """Pieces, and beside them the order in which they are carried, with their checksums."""
    if not WHEELS.is_file():
        raise UsageError(f"{WHEELS} is not there: it collects the wheels")
    for old in out.glob("piece*"):
        old.unlink()
    command = [sys.executable, WHEELS, "--have", have, "--out", out, "--piece-mib", piece_mib, "--also", *ALSO]
    subprocess.run(list(map(str, command)), check=True)
    pieces = sorted(path for path in out.iterdir() if path.is_file() and path.name != "order.json")
    tracked, largest = tracked_bytes(), max(piece.stat().st_size for piece in pieces)
    if tracked + largest > CALL_BYTES - (1 << 20):  # order.json, and names
        most = (CALL_BYTES - tracked >> 20) - 1
        raise UsageError(f"--piece-mib {piece_mib}: a call carries 64 MiB, the tree among it: at most {most}")
    order = [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in pieces]
    (out / "order.json").write_text(json.dumps(order, indent=1) + "\n")
    print("one call for each, back to back, carrying its piece and order.json:")
    for row in order:
        print(f"  python3 tests/gpu_check.py receive {out / row['name']}    # {row['bytes'] / 2**20:.1f} MiB")


def tracked_bytes() -> int:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sum((ROOT / name).stat().st_size for name in names.split("\0") if name)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def receive(piece: Path, tar: Path = TAR, site: Path = SITE) -> None:
    """Append a piece; after the last one unpack and install. Raises UsageError for one that is not the next."""
    order = json.loads((piece.parent / "order.json").read_text())
    names = [row["name"] for row in order]
    if piece.name not in names:
        raise UsageError(f"{piece.name} is no piece: they are {', '.join(names)}")
    number, there = names.index(piece.name), tar.stat().st_size if tar.exists() else 0
    if there != (before := sum(row["bytes"] for row in order[:number])):
        raise UsageError(f"{tar} has {there} bytes, and {piece.name} comes after {before}: begin again with {names[0]}")
    if sha256(piece) != order[number]["sha256"]:
        raise UsageError(f"{piece} is damaged: carry it again")
    with open(tar, "ab") as whole, open(piece, "rb") as part:
        shutil.copyfileobj(part, whole)
    print(f"{number + 1} of {len(order)} pieces")
    if number + 1 < len(order):
        return
    wheels = tar.with_suffix("")
    with tarfile.open(tar) as packed:
        packed.extractall(wheels, filter="data")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--target", str(site), *map(str, sorted(wheels.rglob("*.whl")))], check=True)
    print(f"installed: PYTHONPATH={site}")


# ---- main -------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    add = what.add_parser("pack", help="collect the wheels, in pieces")
    add.add_argument("--have", type=Path, required=True, help="names of the packages that are there")
    add.add_argument("--out", type=Path, required=True)
    add.add_argument("--piece-mib", type=int, default=56)
    what.add_parser("receive", help="append one piece, install after the last").add_argument("piece", type=Path)
    what.add_parser("tiny", help="make the model of the rehearsal").add_argument("folder", type=Path)
    add = what.add_parser("run", help="the steps")
    add.add_argument("--out", type=Path, required=True, help="where results go")
    add.add_argument("--work", type=Path, default=Path("/tmp/gpu-check"), help="for weights (default: %(default)s)")
    add.add_argument("--steps", type=lambda text: text.split(","), help="of these alone; default: all")
    add.add_argument("--seconds", type=float, default=3600.0, help="for all of them (default: %(default)s)")
    add.add_argument("--small", action="store_true", help="the rehearsal")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        if args.what == "pack":
            pack(args.have, args.out, args.piece_mib)
        elif args.what == "receive":
            receive(args.piece)
        elif args.what == "tiny":
            make_tiny(args.folder)
        else:
            return run(args.out.resolve(), args.work.resolve(), args.small, args.steps, args.seconds)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
