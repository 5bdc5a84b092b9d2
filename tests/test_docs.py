"""Every command on every page works: it is parsed by the program that it names, and the README's are run.

One server, and about a minute: the README's block that serves a model, word for word, on a small one.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_script
from servers import ENVIRON, LIMIT, ROOT, free_port

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )?(?:\.venv/bin/)?(?:python|make|curl|pip) [^`]+)`")
MADE_BY_DEMO = {"demo/smollm2", "demo/smollm2-planes", "demo/smollm2-layers"}
# What is no program of this project, and is only known to exist.
OTHERS = {"kill", "git", "ray", "ssh", "fallocate", "mkfs.ext4", "mkdir", "mount", "cd", ".", "cp"}
ENDPOINTS = {"/v1/completions", "/v1/chat/completions", "/progress", "/ready", "/metrics", "/health"}


def code_blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def commands_of(text: str) -> list[list[str]]:
    """The words of each command in a block of a shell: lines joined, no comments and variables, && and ; apart."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"(?<=\S)(;|&&)(?=\s)", r" \1", line), comments=True)
        command = []
        for word in [*words, ";"]:
            if word in (";", "&&", "&"):
                found.append(command)
                command = []
            elif command or not re.match(r"[A-Z_]+=", word):
                command.append(word)
    return [command for command in found if command]


def all_commands(page: Path) -> list[list[str]]:
    inline = [" ".join(text.split()) for text in INLINE.findall(BLOCK.sub("", page.read_text()))]
    return [command for text in [*code_blocks(page, "bash"), *inline] for command in commands_of(text)]


CASES = [
    pytest.param(page, command, id=f"{page.stem}: {' '.join(command)[:90]}")
    for page in PAGES
    for command in all_commands(page)
]


def parse_by_script(script: Path, arguments: list[str], monkeypatch) -> None:
    """Have the script's own parser read the arguments; it exits for those that it does not know."""
    import importlib.util

    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    spec = importlib.util.spec_from_file_location(f"documented_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.parse_args()


def parse_server(arguments: list[str], monkeypatch) -> None:
    """The server's own options, and vLLM's."""
    import progressive_serve

    monkeypatch.setattr(progressive_serve, "check_address", lambda *where: None)  # somebody may listen at 8000
    _, rest = progressive_serve.parse_args(arguments)
    parser, _ = progressive_serve.server_parser()
    parser.parse_args(rest)


def check_curl(words: list[str]) -> None:
    address = next(word for word in words if word.startswith(("localhost:", "http://localhost:")))
    assert address.partition(":8000")[2].partition("?")[0] in ENDPOINTS
    if "-d" in words:
        assert "model" in json.loads(words[words.index("-d") + 1])


def check_install(words: list[str]) -> None:
    """Packages are those that the requirements name."""
    known = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-cpu.txt").read_text()
    for word in words[2:]:
        assert (ROOT / word).is_file() or word == "-r" or word in known or word.startswith("serverless-llm"), word


def check_paths(page: Path, words: list[str]) -> None:
    """What a command names below demo/ is in the repository, or `make demo` makes it; results/ says what it needs."""
    if page.parent.name == "results":
        return
    for word in words:
        if word.startswith("demo/") and not (ROOT / word).exists():
            assert word in MADE_BY_DEMO, f"{word} is not made by make demo"


@pytest.mark.parametrize(("page", "command"), CASES)
@pytest.mark.server  # the server's options are read with vLLM imported
def test_command_is_one_that_its_program_knows(page, command, monkeypatch):
    check_paths(page, command)
    program, *rest = command
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "curl":
        check_curl(rest)
    elif program == "pip":
        check_install(command)
    elif program == "python" and rest[0] == "progressive_serve.py":
        if rest[1:] != ["--help"]:
            parse_server(rest[1:], monkeypatch)
    elif program == "python" and rest[0].endswith(".py"):
        script = ROOT / rest[0]
        assert script.is_file(), f"there is no {rest[0]}"
        if "def parse_args(" in script.read_text():
            parse_by_script(script, rest[1:], monkeypatch)
        else:
            done = run_script(script, *rest[1:], "--help")
            assert done.returncode == 0, done.stderr
    else:
        assert program in OTHERS or rest[:1] in (["-m"], ["-c"]), f"unknown program: {' '.join(command)}"


def test_demo_makes_what_pages_name():
    run = subprocess.run(["make", "--dry-run", "demo-smollm2"], cwd=ROOT, capture_output=True, text=True)
    assert all(re.search(rf"{folder}(?![\w-])", run.stdout) for folder in MADE_BY_DEMO)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2000
    assert text.index("```bash") < sum(map(len, text.splitlines(keepends=True)[:60]))


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.server
def test_readme_serves_a_model(tmp_path, start):
    """The block of "Serve your own model" and the client below it, in a copy, where demo/smollm2 is the demo model."""
    for name in ("prune_and_split.py", "progressive_serve.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "demo").mkdir()
    shutil.copytree(ROOT / "demo" / "model", tmp_path / "demo" / "smollm2")
    shutil.copy(ROOT / "demo" / "prose.txt", tmp_path / "demo")
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Serve your own model") : text.index("## How it works")]
    commands = [command for block in BLOCK.findall(section) if block[0] == "bash" for command in commands_of(block[1])]
    port = str(free_port())

    split, serve, ask, _, _, restore = [command for command in commands if command[0] in ("python", "curl")]
    run = {"cwd": tmp_path, "env": ENVIRON, "capture_output": True, "text": True, "timeout": 2 * LIMIT}
    done = subprocess.run([sys.executable, *split[1:]], **run)
    assert done.returncode == 0 and "A server answers from stage" in done.stdout, done.stderr
    server = start.process(*serve[1:-1], port, cwd=tmp_path)
    server.wait_for(lambda: server.says("the exact model, answers at"))
    done = subprocess.run([word.replace("8000", port) for word in ask], **run)
    assert json.loads(done.stdout)["progressive_exact"] is True, done.stderr
    client = next(block for kind, block in BLOCK.findall(section) if kind == "python")
    done = subprocess.run([sys.executable, "-c", client.replace("8000", port)], **run)
    assert done.stdout.strip().endswith("3 True"), done.stderr
    done = subprocess.run([sys.executable, *restore[1:]], **run)
    assert done.returncode == 0, done.stderr
    original, again = (tmp_path / folder / "model.safetensors" for folder in ("demo/smollm2", "smollm2-again"))
    assert original.read_bytes() == again.read_bytes()
