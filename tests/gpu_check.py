#!/usr/bin/env python3
"""What a GPU machine is to show, in order of importance, in one command; and how vLLM gets there without a network.

    python tests/gpu_check.py run --out OUT                      # there: all of it; --steps NAMES, --seconds LIMIT
    python tests/gpu_check.py run --small --out /tmp/out         # here, on a CPU: the rehearsal
    python tests/gpu_check.py pack --have HAVE.txt --out .gpu    # here, for a machine without a network: vLLM in two
                                                                 # files, and the calls that carry them

HAVE.txt names the packages that the machine has already. Weights and the demo's model are made there, in the background
while the second file is on its way; of the tree only what git tracks travels.

Each step is some commands with a time limit. What it has found is written at once: OUT/STEP.json by the benchmark,
OUT/STEP.log, and a line of OUT/summary.jsonl. A step that fails, or is stopped at its limit with all its processes,
keeps none of the next ones from running, unless these need what it makes.
"""

import argparse
import contextlib
import importlib.util
import json
import lzma
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SITE = Path("/tmp/gpu-site")
STOP_SECONDS = 10.0  # that a step has to end, once its time is over
ANSWERS = "server_from_stage_1_to_3 or server_of_planes_from_stage_1_to_3"  # tests that compare with stock's tokens
IMPORTS = (
    "import vllm.v1.engine.core, vllm.v1.worker.gpu.model_runner;"
    "from vllm.platforms import current_platform as it; print(vllm.__version__, it.get_device_name())"
)

# A machine without a network: its Python, what is carried to it, and what it has that pip is to know of.
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
CARRIED = ("vllm==0.26.0", "blake3==1.0.11", "zstandard==0.25.0")
THERE = ("torch==2.11.0", "transformers==5.17.0")
CALL_BYTES = 64 << 20  # that travel with one call: what git tracks, and a file
KERNELS = "vllm/_C_stable_libtorch.abi3.so"  # as large as all the rest
# What a dense LLaMA on a Hopper GPU never loads: other builds of PyTorch, generators of kernels, kernels of other
# models and other GPUs, a server in Rust. FlashInfer would compile its sampler there: `run` has vLLM do without it.
NEVER_USED = {"torch", "torchaudio", "torchvision", "torchcodec", "pynvvideocodec", "triton", "flashinfer-python"}
NEVER_USED |= {"tilelang", "nvidia-cutlass-dsl", "quack-kernels", "tokenspeed-mla", "humming-kernels"}
NEVER_USED |= {"nvidia-cudnn-frontend"}
LEFT_OUT_FILES = ("bin", "vllm/vllm-rs", "vllm/_moe_C*", "vllm/_flashmla*", "vllm/_qutlass*")
LEFT_OUT_FILES += ("vllm/vllm_flash_attn/_vllm_fa2*", "vllm/third_party/deep_gemm", "vllm/third_party/fmha_sm100")
CALLS = """Two calls, back to back, each carrying its file, and a third for what is left:
  1  python3 tests/gpu_check.py receive {out}/packages.tar.xz && export PYTHONPATH={site} &&
     (setsid python3 tests/gpu_check.py run --out /tmp/made --steps demo,layers,planes > /tmp/made.log 2>&1 &)
  2  python3 tests/gpu_check.py receive {out}/kernels.tar.xz && export PYTHONPATH={site} &&
     python3 tests/gpu_check.py run --out /tmp/out --tar $OUT/out.tar.gz --seconds 550 --steps machine,answers,defaults
  3  export PYTHONPATH={site} &&
     python3 tests/gpu_check.py run --out /tmp/out --tar $OUT/out.tar.gz --seconds LEFT --steps bfloat16,graphs,later"""


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


@dataclass(frozen=True)
class Step:
    """Some commands, one after the other, and how long they may take together."""

    name: str
    seconds: float
    commands: list[str]
    needs: str | None = None  # the step that makes what this one reads
    makes: Path | None = None  # there once it has


# ---- steps ------------------------------------------------------------------------------------------


def steps(out: Path, work: Path, small: bool) -> list[Step]:
    """In order of importance. `small`: models that a CPU starts in seconds, one trial of each."""
    layers, planes, demo = work / "layers", work / "planes", ROOT / "demo" / "checkpoint"
    python, trials = shlex.quote(sys.executable), 1 if small else 5
    stages = "baseline,stage1,stage2,progressive"
    three, few = f"baseline,progressive,progressive@{planes}", min(trials, 3)
    # gVisor's kernel cannot say what is cached.
    unverified = " --unverified-cold" if platform.release() == "4.4.0" else ""

    def test(file: str, names: str) -> list[str]:
        # Where weights are float32 Triton's attention would compute in TF32, and is compared token by token.
        pytest = f"TRITON_F32_DEFAULT=ieee {python} -m pytest -q -p no:cacheprovider"
        return [f"{pytest} tests/{file} -k '{names}'"]

    def bench(name: str, modes: str, options: str) -> list[str]:
        command = f"{python} bench_coldstart.py --checkpoint {layers} --mode {modes} {options}{unverified}"
        return [f"{command} --json {out / name}.json"]

    def split(folder: Path, option: str) -> list[str]:
        model = f"{work / 'tiny'} {folder}" if small else f"--synthetic llama2-7b {folder}"
        return [f"{python} prune_and_split.py {model} {option} --force"]

    made = (demo / "progressive.json").is_file()
    train = [] if made else [f"{python} demo/train_demo_llama.py --force", f"{python} prune_and_split.py --force"]
    tiny = [f"{python} tests/gpu_check.py tiny {work / 'tiny'}"] if small else []
    look = ["nvidia-smi" if shutil.which("nvidia-smi") else "lscpu", f"{python} -m pip list --format freeze"]
    look = [f"{python} -c '{IMPORTS}'", *look]
    rates, stretch, streams = ("1x4,2x4", 20, 2) if small else ("1x128,8x128,64x128", 60, 32)
    # Of a CPU vLLM would take nearly all memory.
    memory = " --kv-cache-memory-bytes 268435456" if small else ""
    eager = f"--server-args='--enforce-eager{memory}'"
    warm = f"--compile-cache warm --server-args='--no-enforce-eager{memory}'"
    later = f"--compile-cache cold --server-args='--no-enforce-eager --optimize-later{memory}'"
    gaps = f"--stretch {stretch} --watch-gaps {streams}"
    sweep = "20" if small else "1000,500,200,118"
    of_layers, of_planes, of_demo = ({"needs": name} for name in ("layers", "planes", "demo"))
    table = [
        Step("machine", 90, look),
        Step("demo", 300, train, makes=demo / "progressive.json"),
        # Does it start and answer, layers and planes, and are the tokens stock's?
        Step("answers", 300, test("test_server.py", ANSWERS), **of_demo),
        Step(
            "layers",
            300,
            [*tiny, *split(layers, "--layers 1-2" if small else "--layers 20-27")],
            makes=layers / "progressive.json",
        ),
        Step("planes", 300, split(planes, "--planes"), needs="layers", makes=planes / "progressive.json"),
        # TTFT against stock with its defaults; cold, disk as it is; with nothing compiled, then with warm caches. Then
        # the full model's rate against stock's.
        Step("defaults", 900, bench("defaults", three, f"--trials {trials} --throughput {rates} {warm}"), **of_planes),
        Step("bfloat16", 200, test("test_engine.py", "final_state_equals_stock and bfloat16"), **of_demo),
        # Gates and graphs: addresses and kernels across transitions; what the streams notice.
        Step("graphs", 200, test("test_engine.py", "no_transition_changes_the_graph"), **of_demo),
        Step("gaps", 200, bench("gaps", "progressive", f"--trials 1 {gaps}"), **of_layers),
        Step("later", 300, bench("later", "progressive,eager,baseline", f"--trials {few} {later}"), **of_layers),
        Step("standby", 200, bench("standby", "progressive,standby", f"--trials {few}"), **of_layers),
        Step("eager", 300, bench("eager", three, f"--trials {trials} {eager}"), **of_planes),
        Step("rates", 400, bench("rates", stages, f"--trials 1 --throughput {rates}"), **of_layers),
        Step("sweep", 600, bench("sweep", three, f"--trials 1 --sweep {sweep}"), **of_planes),
    ]
    # Of a rehearsal others may use the cores.
    return [replace(step, seconds=3 * step.seconds) for step in table] if small else table


def run_step(step: Step, out: Path, seconds: float) -> dict:
    """What became of it: its exit status, or `stopped` at its limit; its processes have ended."""
    begin, log = time.monotonic(), out / f"{step.name}.log"
    native = {} if importlib.util.find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    status: int | str = 0
    with open(log, "w") as output:
        for command in step.commands:
            print(f"$ {command}", file=output, flush=True)
            process = subprocess.Popen(
                command,
                shell=True,
                cwd=ROOT,
                env=os.environ | native,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
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


def run(
    out: Path, work: Path, small: bool, wanted: list[str] | None, seconds: float, archive: Path | None = None
) -> int:
    """Exit status 0: every step that was asked for has run to its end, without a failure.

    What a step needs may be made by another run, in the background: it is waited for. `archive`: all of OUT, after each
    step.
    """
    known = {step.name: step for step in steps(out, work, small)}
    if unknown := set(wanted or ()) - known.keys():
        raise UsageError(f"--steps {','.join(sorted(unknown))}: the steps are {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    end, failed, all_well = time.monotonic() + seconds, set(), True
    for step in known.values():
        if wanted and step.name not in wanted:
            continue
        (work / f"{step.name}.failed").unlink(missing_ok=True)
        if step.needs in failed or (step.needs and not await_made(known[step.needs], work, end)):
            found = {"step": step.name, "status": f"needs {step.needs}"}
        elif (left := end - time.monotonic()) < min(30.0, step.seconds):
            found = {"step": step.name, "status": "no time left"}
        else:
            found = run_step(step, out, min(step.seconds, left))
        with open(out / "summary.jsonl", "a") as summary:
            print(json.dumps(found), file=summary)
        print(*(f"{key}: {value}" for key, value in found.items() if key != "end"), sep="  ", flush=True)
        if found["status"] != 0:
            (work / f"{step.name}.failed").touch()
            failed.add(step.name)
            all_well = False
            print(*found.get("end", ()), sep="\n", flush=True)
        if archive:
            partial = archive.with_name(f".{archive.name}.partial")
            with tarfile.open(partial, "w:gz") as tar:
                tar.add(out, out.name)
            partial.replace(archive)
    return 0 if all_well else 1


def await_made(step: Step, work: Path, end: float) -> bool:
    """Whether another run has made by then (time.monotonic) what the step makes."""
    while not step.makes.exists() and not (work / f"{step.name}.failed").exists() and time.monotonic() < end:
        time.sleep(0.2)
    return step.makes.exists()


def make_tiny(folder: Path) -> None:
    """The tests' random model of four layers."""
    import torch
    from conftest import make_llama

    make_llama(folder, dtype=torch.bfloat16)


# ---- the way there ----------------------------------------------------------------------------------


def pack(have: Path, out: Path) -> None:
    """OUT/packages.tar.xz and OUT/kernels.tar.xz, to be unpacked there, and the calls that carry them.

    pip chooses the versions, for the other machine's Python and with its PyTorch; what it has is then left out.
    """
    there = {canonicalize_name(name) for name in have.read_text().replace(",", " ").split()}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        report, site = Path(folder, "report.json"), Path(folder, "site")
        pip("--dry-run", "--ignore-installed", "--report", report, "--target", site, *CARRIED, *THERE)
        chosen = [row["metadata"] for row in json.loads(report.read_text())["install"]]
        pip("--no-deps", "--no-compile", "--target", site, *needed(chosen, there))
        for pattern in LEFT_OUT_FILES:
            for path in site.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        apart = site / KERNELS
        for name, paths in {
            "kernels": [apart],
            "packages": [path for path in site.rglob("*") if path != apart],
        }.items():
            with tarfile.open(out / f"{name}.tar.xz", "w:xz") as tar:
                for path in tqdm(sorted(paths), desc=name, disable=None):
                    tar.add(path, path.relative_to(site), recursive=False)
    room = CALL_BYTES - (1 << 20) - tracked_bytes()
    for name in ("packages", "kernels"):
        if (size := (out / f"{name}.tar.xz").stat().st_size) > room:
            raise UsageError(f"{out}/{name}.tar.xz has {size} bytes, and beside the tree a call carries {room}")
    print(CALLS.format(out=out, site=SITE))


def pip(*options: str | Path) -> None:
    """`pip install` for the other machine."""
    fixed = ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *fixed]
    subprocess.run([*command, *(f"--platform={name}" for name in PLATFORMS), *map(str, options)], check=True)


def needed(chosen: list[dict], there: set[str]) -> list[str]:
    """NAME==VERSION of what is carried and of all that it needs, but for what is there or never used.

    `chosen`: metadata of pip's report. Of what is there it is not asked what it needs.
    """
    versions = {canonicalize_name(row["name"]): row for row in chosen}
    machine = {**default_environment(), "python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
    wanted, done, found = [Requirement(name) for name in CARRIED], set(), {}
    while wanted:
        one = wanted.pop()
        name = canonicalize_name(one.name)
        if name in there | NEVER_USED or (name, *one.extras) in done:
            continue
        done.add((name, *one.extras))
        found[name] = f"{name}=={versions[name]['version']}"
        for requirement in map(Requirement, versions[name].get("requires_dist", ())):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({**machine, "extra": extra}) for extra in ("", *one.extras)):
                wanted.append(requirement)
    return sorted(found.values())


def tracked_bytes() -> int:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sum((ROOT / name).stat().st_size for name in names.split("\0") if name)


def receive(file: Path, site: Path = SITE) -> None:
    """Unpack one of the two, in either order. Raises UsageError for one that is damaged."""
    try:
        with lzma.open(file) as data:
            with tarfile.open(fileobj=data, mode="r|") as tar:
                tar.extractall(site, filter="data")
            while data.read(1 << 20):  # its checksum comes last
                pass
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UsageError(f"{file} is damaged ({error}): carry it again") from None
    # Templates and the like cannot be compiled, and need not.
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "-j", "0", str(site)], stdout=subprocess.DEVNULL, check=False
    )
    print(f"unpacked: PYTHONPATH={site}")


# ---- main -------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    add = what.add_parser("pack", help="vLLM and what it needs, in two files")
    add.add_argument("--have", type=Path, required=True, help="names of the packages that are there")
    add.add_argument("--out", type=Path, required=True, help="folder for both")
    what.add_parser("receive", help="unpack one of what `pack` made").add_argument("file", type=Path)
    what.add_parser("tiny", help="make the model of the rehearsal").add_argument("folder", type=Path)
    add = what.add_parser("run", help="the steps")
    add.add_argument("--out", type=Path, required=True, help="where results go")
    add.add_argument("--work", type=Path, default=Path("/tmp/gpu-check"), help="for weights (default: %(default)s)")
    add.add_argument("--steps", type=lambda text: text.split(","), help="of these alone; default: all")
    add.add_argument("--tar", type=Path, help="all of OUT, after each step")
    add.add_argument("--seconds", type=float, default=3600.0, help="for all of them (default: %(default)s)")
    add.add_argument("--small", action="store_true", help="the rehearsal")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        if args.what == "pack":
            pack(args.have, args.out)
        elif args.what == "receive":
            receive(args.file)
        elif args.what == "tiny":
            make_tiny(args.folder)
        else:
            return run(args.out.resolve(), args.work.resolve(), args.small, args.steps, args.seconds, args.tar)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
