"""eval_triviaqa.py: the rules by hand-worked cases, data formats, servers that misbehave, and what is really served.

One test starts servers in `make test`: stock vLLM, and three that the worker's standby forks. Everything else asks a
fake server, in this process. The file takes about a minute.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from blake3 import blake3
from conftest import run_main, run_script
from servers import LIMIT, ROOT, SERVED, check_nothing_is_left, wait_for

import eval_triviaqa
from eval_triviaqa import make_question, normalize_answer, normalize_squad, score

EVAL = ROOT / "eval_triviaqa.py"
STAND_IN = ROOT / "tests" / "stand_in.py"
# eval_triviaqa.py with the stand-in as its server.
WITH_STAND_IN = f"""
import pathlib, sys, eval_triviaqa
eval_triviaqa.SERVER = pathlib.Path({str(STAND_IN)!r})
sys.exit(eval_triviaqa.main())
"""
DATA = ROOT.parent / "shared" / "data"
DPR_DEV, SQUAD_DEV = DATA / "triviaqa" / "dpr-dev.txt", DATA / "squad" / "dev-v1.1.json"

# ---- the rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("New_York", "new york"),  # underscores are spaces
        ("PARIS", "paris"),
        ("St. Louis", "st louis"),
        ("rock'n'roll", "rock n roll"),  # punctuation becomes a space, it is not deleted
        ("U.S.A.", "u s"),  # ... so that the last letter here is an article
        ("‘tis ´ the` end’", "tis end"),  # the quotes that string.punctuation does not have
        ("The Beatles", "beatles"),
        ("a-ha", "ha"),  # an article once the hyphen is a space
        ("another theory", "another theory"),  # articles are whole words
        ("  two \t words\n", "two words"),
        ("The", ""),
        ("🚁", "🚁"),
    ],
)
def test_normalization(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("answer", "aliases", "em", "f1", "em_lm_eval"),
    [
        ("Paris", ["Paris", "City of Light"], 1, 1.0, 1),
        ("the city of light", ["Paris", "City of Light"], 1, 1.0, 0),  # lm-eval keeps articles
        ("rocknroll", ["rock'n'roll"], 0, 0.0, 1),  # ... and deletes punctuation
        ("rock n roll", ["rock'n'roll"], 1, 1.0, 0),
        ("Louis Armstrong", ["Louis Daniel Armstrong"], 0, 0.8, 0),  # precision 1, recall 2/3
        ("red red wine", ["red wine wine"], 0, 0.6667, 0),  # two tokens in common of three each
        ("green", ["red", "blue"], 0, 0.0, 0),
        ("a blue one", ["red", "blue"], 0, 0.6667, 0),  # best over the aliases
        ("", ["red"], 0, 0.0, 0),
        (None, ["red"], 0, 0.0, 0),
        ("The", ["red"], 0, 0.0, 0),  # nothing is left of it
    ],
)
def test_scores(answer, aliases, em, f1, em_lm_eval):
    expected = {"em": em, "f1": f1, "em_lm_eval": em_lm_eval}
    assert score(answer, make_question("1", "?", aliases)) == expected


def test_rules_on_real_questions():
    """An alias of each question, disturbed in what normalisation takes away, is right; its reverse is not."""
    if not DPR_DEV.is_file():
        pytest.skip(f"{DPR_DEV} is not there")
    questions = eval_triviaqa.read_questions(str(DPR_DEV))
    assert len(questions) == 8837  # DPR has removed its repetitions
    assert [question.id for question in questions[:2]] == ["0", "1"]
    disturbed = [score(f" THE_{question.aliases[-1].upper()}!", question) for question in questions]
    # upper case loses letters for good in a few of them (ß, ŉ)
    assert sum(entry["em"] for entry in disturbed) / len(questions) > 0.999
    assert sum(entry["em_lm_eval"] for entry in disturbed) == 0  # the article stays
    reversed_ = [score(question.aliases[-1][::-1] + " x", question) for question in questions]
    assert sum(entry["em"] for entry in reversed_) == 0


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Beatles", "beatles"),
        ("rock'n'roll", "rocknroll"),  # punctuation is deleted, where TriviaQA's becomes a space
        ("U.S.A.", "usa"),
        ("a-ha", "aha"),
        ("New_York", "newyork"),  # an underscore is punctuation
        ("the  Paris\tof an artist", "paris of artist"),
    ],
)
def test_normalization_of_squad(text, normalized):
    assert normalize_squad(text) == normalized


def test_intervals():
    """By the formula of a share, and of a mean; they are the same at each call."""
    share = eval_triviaqa.estimate("em", [(number < 300, 1) for number in range(1000)])
    assert share["em"] == 30.0
    error = 100 * (0.3 * 0.7 / 1000) ** 0.5
    assert share["em_ci95"] == pytest.approx([30 - 1.96 * error, 30 + 1.96 * error], abs=0.2)
    assert share == eval_triviaqa.estimate("em", [(number < 300, 1) for number in range(1000)])
    values = [(2.0 * tokens, tokens) for tokens in (10, 20, 30)]
    assert eval_triviaqa.estimate("perplexity", values, eval_triviaqa.exponential) == {
        "perplexity": 7.3891,
        "perplexity_ci95": [7.3891, 7.3891],
    }


# ---- data and predictions ---------------------------------------------------------------------------

TRIVIAQA = {
    "Data": [
        {
            "Question": "Who painted it?",
            "QuestionId": "q1",
            "Answer": {"Value": "Monet", "Aliases": ["Claude Monet"], "NormalizedAliases": ["claude monet", "monet"]},
        },
        {
            "Question": "Where?",
            "QuestionId": "q2",
            "Answer": {"Value": "Paris", "Aliases": ["Paris"], "HumanAnswers": ["In Paris"]},
        },
        {"Question": "When?", "QuestionId": "q3", "Answer": {"Value": "1872"}},
    ]
}  # fmt: skip
LINES = "Who painted it?\t['Claude Monet', 'Monet']\nWhere?\t\"['Paris', \"\"L'Etoile\"\"]\"\n"


def evaluate(tmp_path: Path, *options, data=TRIVIAQA, run=run_main, script=eval_triviaqa):
    """Run the script in this process; returns what it did, and the result that it wrote, if any."""
    path = tmp_path / "data"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    result = tmp_path / "result.json"
    done = run(script, "--data", path, "--json", result, *options)
    return done, json.loads(result.read_text()) if result.is_file() else None


def predictions(tmp_path: Path, content) -> Path:
    path = tmp_path / "predictions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_predictions(tmp_path):
    """By the script as users run it."""
    answers = predictions(tmp_path, {"q1": "the Claude Monet", "q2": "in Paris, France", "q3": None, "unasked": "x"})
    done, result = evaluate(tmp_path, "--predictions", answers, run=run_script, script=EVAL)
    assert done.returncode == 0, done.stderr
    summary = result["summary"]
    assert (summary["n"], summary["missing"], summary["failed"]) == (3, 1, 0)
    assert (summary["em"], summary["f1"], summary["em_lm_eval"]) == (33.33, 60.0, 0.0)  # f1 of q2: 2 * 2 / (3 + 2)
    rows = {row["id"]: row for row in result["detail"]}
    assert (rows["q1"]["em"], rows["q2"]["em"], rows["q2"]["f1"], rows["q3"]["answer"]) == (1, 0, 0.8, None)
    assert (tmp_path / "result.png").is_file()
    assert {"arguments", "versions", "machine", "commit"} <= result.keys()


def test_lines_are_told_apart_by_content(tmp_path):
    done, result = evaluate(tmp_path, "--predictions", predictions(tmp_path, {"1": "l'etoile"}), data=LINES)
    assert done.returncode == 0, done.stderr
    assert [row["em"] for row in result["detail"]] == [0, 1]


def squad(*questions: dict) -> dict:
    return {
        "version": "1.1",
        "data": [{"title": "x", "paragraphs": [{"context": " It is in Paris. ", "qas": questions}]}],
    }


def test_squad(tmp_path):
    """Each question with its paragraph, and the best of its answers, by the rules of SQuAD."""
    answers = [{"answer_start": 9, "text": "Paris"}, {"answer_start": 6, "text": "in the Paris"}]
    data = squad(
        {"id": "a", "question": "Where? ", "answers": answers}, {"id": "b", "question": "Where?", "answers": answers}
    )
    done, result = evaluate(
        tmp_path, "--predictions", predictions(tmp_path, {"a": "In Paris!", "b": "Par-is"}), data=data
    )
    assert done.returncode == 0, done.stderr
    assert [(row["em"], row["f1"]) for row in result["detail"]] == [(1, 1.0), (1, 1.0)]
    assert "2 questions, each with its paragraph" in done.stdout
    (first, _) = eval_triviaqa.read_questions(str(tmp_path / "data"))
    assert eval_triviaqa.make_prompt(first) == "Context: It is in Paris.\nQuestion: Where?\nAnswer:"


def test_squad_as_it_is():
    """Of its own answers each is right; of the others, about what chance gives."""
    if not SQUAD_DEV.is_file():
        pytest.skip(f"{SQUAD_DEV} is not there")
    questions = eval_triviaqa.read_questions(str(SQUAD_DEV))
    assert len(questions) == 10570
    assert all(score(f"The {question.aliases[-1]}.", question)["em"] for question in questions)
    shifted = zip(questions, questions[1:], strict=False)
    assert sum(score(other.aliases[0], question)["em"] for question, other in shifted) < 0.05 * len(questions)
    sample = eval_triviaqa.choose(questions, limit=None, sample=1000)
    assert len({question.id for question in sample}) == 1000
    assert len({question.context for question in sample}) > 700  # of 2,067: from all over the file


def hub_row(number: str, question: str, source: str, *aliases: str) -> dict:
    """A row of the Hub's rc.nocontext: all its columns, of which the documents are empty in this configuration."""
    normalized = [alias.lower() for alias in aliases]
    pages = {"doc_source": [], "filename": [], "title": [], "wiki_context": []}
    results = {"description": [], "filename": [], "rank": [], "title": [], "url": [], "search_context": []}
    answer = {"aliases": list(aliases), "normalized_aliases": normalized, "value": aliases[0], "type": "FreeForm"}
    answer |= {"matched_wiki_entity_name": "", "normalized_matched_wiki_entity_name": ""}
    row = {"question": question, "question_id": number, "question_source": source, "entity_pages": pages}
    return row | {"search_results": results, "answer": answer | {"normalized_value": normalized[0]}}


def test_questions_of_the_hub_are_asked_once(tmp_path, monkeypatch, capsys):
    """Its validation split has a row for a question's web documents and another for those of Wikipedia."""
    web = [hub_row("tc_1", "Who painted it?", "web", "Monet"), hub_row("tc_2", "Where?", "web", "Paris")]
    wikipedia = [hub_row("tc_3", "When?", "wiki", "1872")]
    wikipedia += [hub_row("tc_1", "Who painted it? ", "wiki", "Claude Monet", "Monet")]
    (tmp_path / "rc.nocontext").mkdir()
    rows = [json.dumps(row) for row in web + wikipedia]
    (tmp_path / "rc.nocontext" / "validation.jsonl").write_text("\n".join(rows))
    card = "configs:\n- config_name: rc.nocontext\n  data_files:\n  - {split: validation, path: rc.nocontext/*.jsonl}"
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    name, *where = eval_triviaqa.HUB_DATASETS["triviaqa"]
    assert (name, where) == ("mandarjoshi/trivia_qa", ["rc.nocontext", "validation"])
    monkeypatch.setitem(eval_triviaqa.HUB_DATASETS, "triviaqa", (str(tmp_path), *where))
    first, *others = eval_triviaqa.read_questions("triviaqa")
    assert (first.id, first.text) == ("tc_1", "Who painted it?")
    assert (first.aliases, first.normalized) == (["Monet", "Claude Monet"], ["claude monet", "monet"])
    assert [question.id for question in others] == ["tc_2", "tc_3"]
    assert "3 questions in 4 rows" in capsys.readouterr().out
    chosen = eval_triviaqa.choose([first, *others], limit=2, sample=None)
    assert [question.id for question in chosen] == ["tc_1", "tc_2"]


def test_repeated_questions_are_united(tmp_path):
    """TriviaQA's JSON by id, DPR's lines by text; n counts questions."""
    again = {"Question": "When?", "QuestionId": "q3", "Answer": {"Value": "in 1872", "HumanAnswers": ["the 1870s"]}}
    data = {"Data": [*TRIVIAQA["Data"], again]}
    for answer in ("1872", "in 1872", "the 1870s"):
        done, result = evaluate(tmp_path, "--predictions", predictions(tmp_path, {"q3": answer}), data=data)
        assert done.returncode == 0, done.stderr
        assert (result["summary"]["n"], result["detail"][2]["em"]) == (3, 1)
    lines = LINES + "Who painted it?\t['Oscar-Claude Monet']\nWhen?\t['1872']\n"
    answers = predictions(tmp_path, {"0": "Oscar-Claude Monet", "3": "1872"})
    done, result = evaluate(tmp_path, "--predictions", answers, data=lines)
    assert done.returncode == 0, done.stderr
    assert [(row["id"], row["em"]) for row in result["detail"]] == [("0", 1), ("1", 0), ("3", 1)]
    assert "3 questions in 4 rows" in done.stdout


MALFORMED = {
    "no JSON": ('{"Data": [\n}', "line 2"),
    "no Data": ({"Rows": []}, "Data is missing"),
    "no answer": ({"Data": [{"Question": "?", "QuestionId": "a"}]}, "Data[0].Answer"),
    "an alias that is no text": (
        {"Data": [{"Question": "?", "QuestionId": "a", "Answer": {"Aliases": [3]}}]},
        "Data[0]",
    ),
    "no id": ({"Data": [{"Question": "?", "Answer": {"Value": "x"}}]}, "Data[0].QuestionId"),
    "an id of two questions": ({"Data": [*TRIVIAQA["Data"], {**TRIVIAQA["Data"][0], "Question": "By whom?"}]}, "id q1"),
    "no question at all": ({"Data": []}, "holds no question"),
    "SQuAD without paragraphs": ({"data": [{"title": "x"}]}, "data[0].paragraphs"),
    "SQuAD without an id": (squad({"question": "?", "answers": []}), "data[0].paragraphs[0].qas[0].id"),
    "SQuAD without answers": (squad({"id": "a", "question": "?"}), "qas[0].answers"),
    "SQuAD v2.0": ({**squad(), "version": "v2.0"}, "version is 'v2.0'"),
    "SQuAD v2.0 that does not say so": (
        squad({"id": "a", "question": "?", "answers": [{"text": "x"}], "is_impossible": True}),
        "qas[0], a, has no answer",
    ),
    "a question without an answer": (squad({"id": "a", "question": "?", "answers": []}), "SQuAD v2.0"),
    "another TriviaQA": ({**TRIVIAQA, "Version": 2.0}, "Version is 2.0"),
    "lines of JSON": ('{"question": "?", "answer": ["x"]}\n{"question": "??", "answer": ["y"]}\n', "is no JSON"),
    "one line of JSON": ({"question": "?", "answer": ["x"]}, "Data is missing"),
    "a list of questions": ([{"question": "?", "answers": ["x"]}], "line 1"),
    "a line with a text in place of a list": ("Who?\t'Ann'\n", "line 1"),
    "a line without a tab": ("Who?\t['x']\nWhere?\n", "line 2"),
    "a line without a list": ("Who?\tx y\n", "line 1"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_data(case, tmp_path):
    data, named = MALFORMED[case]
    done, result = evaluate(tmp_path, "--predictions", predictions(tmp_path, {"q1": "x"}), data=data)
    assert (done.returncode, result) == (2, None)
    assert named in done.stderr


@pytest.mark.parametrize(
    "data", [TRIVIAQA, squad({"id": "q2", "question": "?", "answers": [{"text": "Paris"}]}), LINES]
)
def test_a_byte_order_mark_is_no_text(data, tmp_path):
    """Of questions in each format, and of predictions; the id of the second line is 1."""
    text, answers = data if isinstance(data, str) else json.dumps(data), {"q2": "Paris", "1": "Paris"}
    found = {}
    for mark in ("", "\ufeff"):
        file = predictions(tmp_path, mark + json.dumps(answers))
        done, found[mark] = evaluate(tmp_path, "--predictions", file, data=mark + text)
        assert done.returncode == 0, done.stderr
    assert found["\ufeff"]["detail"] == found[""]["detail"] and found[""]["summary"]["em"] > 0
    assert found[""]["detail"][0]["question"][0] in "W?"


def test_no_result_holds_a_key(tmp_path):
    """Of the environment, of the server's options, and of an address."""
    answers = predictions(tmp_path, {"q1": "Monet"})
    options = ["--predictions", answers, "--server-args=--hf-token hf-KEY --dtype float32"]
    path = tmp_path / "data"
    path.write_text(json.dumps(TRIVIAQA))
    result = tmp_path / "result.json"
    done = run_main(eval_triviaqa, "--data", path, *options, "--json", result, VLLM_API_KEY="sk-KEY", HF_TOKEN="KEY")
    assert done.returncode == 0, done.stderr
    assert "KEY" not in result.read_text() and "--dtype float32" in result.read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data", "nowhere.json", "--predictions", "x"], "nowhere.json"),
        (["--predictions", "nowhere.json"], "nowhere.json"),
        (["--predictions", "{bad}"], "the answer to q1"),
        (["--predictions", "{unrelated}"], "none of the questions"),
        (["CKPT", "--base-url", "http://x"], "CKPT"),
        (["--base-url", "localhost:8000"], "localhost:8000"),
        (["--base-url", "http://127.0.0.1:9"], "127.0.0.1:9 cannot be reached"),
        (["--base-url", "http://127.0.0.1:9/llm/v1"], "127.0.0.1:9/llm cannot be reached"),
        (["--base-url", "https://[::1]:9/v1"], "[::1]:9 cannot be reached"),
        (["--base-url", "http://x/v1?version=2"], "http://x/v1?version=2"),
        (["--base-url", "http://x/v1#here"], "http://x/v1#here"),
        (["--base-url", "http://x:99999"], "http://x:99999"),
        (["--base-url", "http://[::1"], "http://[::1"),
        (["--base-url", "http://me:word@127.0.0.1:9"], "http://***@127.0.0.1:9"),
        (["--base-url", "http://x", "--stages", "last"], "--stages last"),
        (["CKPT", "--server-args=--api-key"], "--api-key"),
        (["CKPT", "--server-args=--prompt 'x"], "--server-args"),
        (["nowhere"], "nowhere"),
        (["{checkpoint}", "--stages", "1,4"], "stage 4"),
        (["{checkpoint}", "--stages", "0"], "0"),
        (["--limit", "none"], "none"),
        (["--limit", "3", "--sample", "4"], "--sample 4"),
        (["CKPT", "--perplexity", "nowhere.txt"], "nowhere.txt"),
        (["CKPT", "--perplexity", "a.txt", "--agreement", "b.txt"], "b.txt"),
        (["CKPT", "--perplexity", "a.txt", "--chat"], "--chat"),
        (["CKPT", "--perplexity", "a.txt", "--window", "8", "--stride", "9"], "--stride 9"),
        (["--base-url", "http://x", "--agreement", "a.txt"], "--agreement"),
        (["{checkpoint}", "--agreement", str(EVAL), "--stages", "1,2"], "stage 3"),
    ],
)
def test_bad_input(options, named, tmp_path, split_tiny):
    files = {"{bad}": {"q1": 3}, "{unrelated}": {"q9": "x"}}
    for place, option in enumerate(options):
        if option in files:
            options = [*options[:place], str(predictions(tmp_path, files[option])), *options[place + 1 :]]
    options = [option.replace("{checkpoint}", str(split_tiny)) for option in options]
    text = {"--data", "--perplexity", "--agreement"} & set(options)
    data = [] if text else ["--data", str(tmp_path / "data")]
    (tmp_path / "data").write_text(json.dumps(TRIVIAQA))
    done = run_main(eval_triviaqa, *data, *options, "--json", tmp_path / "result.json")
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_bad_input_of_the_script_as_users_run_it(tmp_path):
    done, result = evaluate(tmp_path, "--predictions", "nowhere.json", run=run_script, script=EVAL)
    assert (done.returncode, result) == (2, None)
    assert "nowhere.json" in done.stderr and "Traceback" not in done.stderr


# ---- servers that misbehave -------------------------------------------------------------------------


class Fake(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers "Paris", unless `reply` (question, how often it was asked) says else."""

    def __init__(self, reply, port: int = 0):
        super().__init__(("127.0.0.1", port), FakeHandler)
        self.reply, self.asked, self.lock, self.is_vllm = reply, {}, threading.Lock(), True
        self.stage, self.errs = 1, {}
        self.prefix, self.key = "", None  # a path before all others; what /v1 wants, as vLLM does
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def end(self) -> None:
        """Nobody listens from here on, as when a process has died."""
        self.shutdown()
        self.server_close()


@pytest.fixture
def fake(monkeypatch):
    """Starts Fake servers, whose clients try again at once."""
    monkeypatch.setattr(eval_triviaqa, "BACKOFF", 0.001)
    started = []

    def fake(reply=lambda question, times: (200, {}), port: int = 0) -> Fake:
        started.append(Fake(reply, port))
        return started[-1]

    yield fake
    for server in started:
        server.end()
        server.thread.join()


class FakeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def is_refused(self) -> bool:
        """Whether it has been; a path is then without the prefix."""
        prefix, key = self.server.prefix, self.server.key
        if not self.path.startswith(prefix):
            self.send(404, {}, {})
            return True
        self.path = self.path.removeprefix(prefix)
        if key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {key}":
            self.send(401, {"error": "Unauthorized"}, {})
            return True
        return False

    def do_GET(self):
        if self.is_refused():
            return
        stage = self.server.stage
        progress = {"stage": stage, "stages": [{"seconds": 1.0}] * stage, "error": None}
        self.send(200, progress if self.path == "/progress" else {"data": [{"id": "fake"}]}, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return None
        if self.path == "/tokenize":  # a token is a letter; other servers have other answers, or none
            tokens = {"tokens": [ord(letter) for letter in body["prompt"]], "max_model_len": 9}
            return self.send(200, tokens if self.server.is_vllm else [tokens], {})
        is_chat = self.path == "/v1/chat/completions"
        asked = body["messages"][0]["content"] if is_chat else body["prompt"]
        question = str(asked).removeprefix("Question: ").removesuffix("\nAnswer:")
        assert body["temperature"] == 0
        if not body.get("stream"):  # with it, this is the first token that is waited for
            assert (body["model"], body["max_tokens"]) == ("fake", 10 if isinstance(asked, str) else 1)
        with self.server.lock:
            self.server.asked[question] = self.server.asked.get(question, 0) + 1
        status, headers = self.server.reply(question, self.server.asked[question])
        choice = {"message": {"content": " In Paris\n"}} if is_chat else {"text": " Paris\n"}
        if body.get("prompt_logprobs"):  # the less likely, the further it is from the beginning of the prompt
            of_tokens = [{str(token): {"logprob": -place, "rank": 1}} for place, token in enumerate(asked)]
            for place, likelier in self.server.errs.items():  # here it thinks another one likelier
                of_tokens[place] = {
                    str(asked[place]): {"logprob": -place - 1, "rank": 2},
                    likelier: {"logprob": 0, "rank": 1},
                }
            choice["prompt_logprobs"] = [None, *of_tokens[1:]]
        self.send(status, {"choices": [choice]}, headers, b"data: " if body.get("stream") else b"")
        return None

    def send(self, status: int, content: dict, headers: dict, prefix: bytes = b"") -> None:
        body = prefix + json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_chat(fake, tmp_path):
    """Through the chat template of the server; otherwise the same."""
    server = fake()
    done, result = evaluate(tmp_path, "--base-url", server.url, "--chat")
    assert done.returncode == 0, done.stderr
    assert [row["answer"] for row in result["detail"]] == ["In Paris"] * 3
    assert result["summary"]["em"] == 33.33  # one of TriviaQA's HumanAnswers
    done, result = evaluate(tmp_path, "--base-url", server.url)
    assert [row["answer"] for row in result["detail"]] == ["Paris"] * 3  # nothing is kept of the other


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_server_below_a_path(end, fake, tmp_path):
    server = fake()
    server.prefix = "/llm/a%20b"
    done, result = evaluate(tmp_path, "--base-url", f"{server.url}/llm/a%20b{end}")
    assert done.returncode == 0, done.stderr
    assert result["summary"]["em"] == 33.33
    done, result = score_text(tmp_path, f"{server.url}/llm/a%20b{end}", "0123456789", "--window", "4")
    assert done.returncode == 0, done.stderr


def test_a_server_that_wants_a_key(fake, tmp_path):
    """vLLM's own variable has it; it is sent, and stands in no result and in no message."""
    server, url = fake(lambda question, times: (500 if question == "Where?" else 200, {})), "--base-url"
    server.key = "sk-KEY"
    done, result = evaluate(tmp_path, url, server.url)
    assert (done.returncode, result) == (2, None) and "set VLLM_API_KEY" in done.stderr
    run = functools.partial(run_main, VLLM_API_KEY="sk-KEY")
    done, result = evaluate(tmp_path, url, server.url, run=run)
    assert done.returncode == 1 and result["summary"]["failed"] == 1  # it has been asked
    assert "KEY" not in done.stdout + done.stderr + json.dumps(result)
    server.is_vllm = False  # an error whose repr would show the request's headers
    for at in (server.url, f"{server.url}/elsewhere"):
        (tmp_path / "text.txt").write_text("0123456789")
        done = run(eval_triviaqa, url, at, "--perplexity", tmp_path / "text.txt", "--json", tmp_path / "other.json")
        assert done.returncode == 2 and "KEY" not in done.stderr
    done, result = evaluate(tmp_path, url, server.url.replace("://", "://me:word@"), run=run)
    assert done.returncode == 2 and "unset one" in done.stderr and "word" not in done.stderr


@pytest.mark.parametrize("options, environ", [([], {"VLLM_API_KEY": "KEY"}), (["--server-args=--api-key KEY"], {})])
def test_own_servers_are_asked_with_their_key(options, environ, split_tiny, tmp_path, monkeypatch):
    """And by no proxy."""
    monkeypatch.setattr(eval_triviaqa, "SERVER", STAND_IN)
    environ = environ | dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    (tmp_path / "data").write_text(json.dumps(TRIVIAQA))
    options = ["--stages", "last", "--data", tmp_path / "data", *options]
    done = run_main(eval_triviaqa, split_tiny, *options, "--json", tmp_path / "result.json", **environ)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "result.json").read_text()
    assert [row["answer"] for row in json.loads(text)["detail"]] == ["of all"] * 3 and "KEY" not in text
    assert json.loads(text)["summary"]["stage"] == 3


def score_text(tmp_path: Path, url: str, text: str, *options):
    (tmp_path / "text.txt").write_text(text)
    result = tmp_path / "result.json"
    options = ["--perplexity", tmp_path / "text.txt", "--json", result, *options]
    done = run_main(eval_triviaqa, "--base-url", url, *options)
    return done, json.loads(result.read_text()) if result.is_file() else None


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_each_token_is_scored_once(mark, fake, tmp_path):
    """All but the first, with the most context that a window gives it. A byte order mark is no token."""
    server = fake()
    done, result = score_text(tmp_path, server.url, f"{mark}0123456789", "--window", "4", "--stride", "2")
    assert done.returncode == 0, done.stderr
    windows = ["0123", "2345", "4567", "6789"]
    assert server.asked.keys() == {str([ord(letter) for letter in window]) for window in windows}
    assert [(row["id"], row["nll"], row["tokens"]) for row in result["detail"]] == [
        ("0", 1 + 2 + 3, 3),
        ("2", 2 + 3, 2),
        ("4", 2 + 3, 2),
        ("6", 2 + 3, 2),
    ]
    assert result["summary"]["perplexity"] == pytest.approx(2.718281828 ** (21 / 9), abs=1e-4)
    assert "agreement" not in result["summary"] and "9 tokens of text.txt, in 4 windows" in done.stdout
    for options, ids in ((["--limit", "2"], ["0", "2"]), (["--sample", "2"], ["0", "4"])):
        _, result = score_text(tmp_path, server.url, "0123456789", "--window", "4", "--stride", "2", *options)
        assert [row["id"] for row in result["detail"]] == ids
    _, result = score_text(tmp_path, server.url, "012345", "--window", "8")
    assert [(row["nll"], row["tokens"]) for row in result["detail"]] == [(1 + 2 + 3 + 4 + 5, 5)]


def test_text_that_cannot_be_scored(fake, tmp_path):
    server = fake()
    cases = [("0123456789", "9", "--window 9"), ("", "4", "holds no text")]
    for text, window, named in cases:
        done, result = score_text(tmp_path, server.url, text, "--window", window)
        assert (done.returncode, result) == (2, None)
        assert named in done.stderr
    server.is_vllm = False
    done, result = score_text(tmp_path, server.url, "0123456789", "--window", "4")
    assert (done.returncode, result) == (2, None)
    assert "/tokenize" in done.stderr


def test_windows_that_failed_are_left_out(fake, tmp_path):
    server = fake(lambda question, times: (500 if question.startswith(f"[{ord('2')}") else 200, {}))
    done, result = score_text(tmp_path, server.url, "0123456789", "--window", "4", "--stride", "2")
    assert (done.returncode, result["summary"]["failed"]) == (1, 1)
    assert result["summary"]["perplexity"] == pytest.approx(2.718281828 ** (16 / 7), abs=1e-4)


def test_stages_are_compared_token_by_token():
    """Of the scored tokens alone, and the ratio of perplexities of the same ones."""
    args = dict(file=EVAL, measures=["perplexity", "agreement"], window=4, stride=2, choose=list)
    text, window = eval_triviaqa.Text(**args), eval_triviaqa.Window("2", [5, 6, 7, 8], 2)
    full = {"logprobs": [-9.0, -1.0, -2.0], "likeliest": [6, 7, 8]}
    worse = {"logprobs": [-1.0, -2.0, -3.0], "likeliest": [6, 7, 1]}
    scores = [text.score(window, worse, full), text.score(window, full, full)]
    assert scores[0] == {"nll": 5.0, "tokens": 2, "above_full": 2.0, "agreeing": 1}
    assert scores[1] == {"nll": 3.0, "tokens": 2, "above_full": 0.0, "agreeing": 2}
    measured = text.measure([scores[0]], compared=True)
    assert (measured["perplexity"], measured["agreement"]) == (pytest.approx(12.1825), 50.0)
    assert measured["perplexity_over_full"] == pytest.approx(2.7183)
    assert text.measure([text.score(window, None, full)], compared=True) == {}


def test_errors_are_retried(fake, tmp_path):
    server = fake(lambda question, times: (500 if times < 3 and question == "Where?" else 200, {}))
    done, result = evaluate(tmp_path, "--base-url", f"{server.url}/v1/")
    assert done.returncode == 0, done.stderr
    assert server.asked == {"Who painted it?": 1, "Where?": 3, "When?": 1}
    assert (result["summary"]["em"], result["summary"]["failed"], result["summary"]["n"]) == (33.33, 0, 3)
    assert not list(tmp_path.glob("*.partial"))


def test_a_request_that_fails_for_good_is_no_wrong_answer_in_silence(fake, tmp_path):
    server = fake(lambda question, times: (500 if question == "Where?" else 200, {}))
    done, result = evaluate(tmp_path, "--base-url", server.url)
    assert done.returncode == 1
    assert "1 requests failed" in done.stderr
    assert server.asked["Where?"] == eval_triviaqa.ATTEMPTS
    assert (result["summary"]["failed"], result["summary"]["missing"]) == (1, 0)
    assert "500" in next(row for row in result["detail"] if row["id"] == "q2")["failed"]
    server.reply = lambda question, times: (200, {})
    done, result = evaluate(tmp_path, "--base-url", server.url)
    assert (done.returncode, result["summary"]["failed"], result["summary"]["em"]) == (0, 0, 33.33)
    assert server.asked["Who painted it?"] == 1  # what was answered is not asked again


def test_a_request_that_is_refused_is_the_users_to_mend(fake, tmp_path):
    server = fake(lambda question, times: (400, {}))
    done, result = evaluate(tmp_path, "--base-url", server.url)
    assert (done.returncode, result) == (2, None)
    assert "refuses" in done.stderr


def test_a_result_that_cannot_be_written_is_said_before_any_work(fake, tmp_path):
    server = fake()
    done, _ = evaluate(tmp_path, "--base-url", server.url, "--json", "/proc/nowhere/result.json")
    assert done.returncode == 2
    assert "/proc/nowhere/result.json" in done.stderr and not server.asked


@pytest.mark.parametrize(
    ("options", "header", "named"),
    [
        (["--stages", "2"], lambda question: "2" if question != "When?" else "1", "came from stage 1"),
        (["--stages", "2"], lambda question: None, "came from stage None"),
        ([], lambda question: "2" if question != "When?" else "1", "hold the server"),
    ],
)
def test_answers_of_another_stage_are_not_counted(fake, options, header, named, tmp_path):
    def reply(question, times):
        return 200, {"X-Progressive-Stage": header(question)} if header(question) else {}

    done, result = evaluate(tmp_path, "--base-url", fake(reply).url, "--concurrency", "1", *options)
    assert (done.returncode, result) == (1, None)
    assert named in done.stderr


def test_server_that_dies_half_way(fake, tmp_path):
    """What is done is kept, and the next run asks for the rest only."""
    data = {"Data": [{"Question": f"{n}?", "QuestionId": str(n), "Answer": {"Value": "Paris"}} for n in range(20)]}
    answered = threading.Semaphore(7)

    def reply(question, times):
        if not answered.acquire(blocking=False):
            server.end()
            return 500, {"Connection": "close"}
        return 200, {}

    with socket.socket() as reserved:  # bound all the while: nobody else may listen there while no server does
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        server = fake(reply, reserved.getsockname()[1])
        done, result = evaluate(tmp_path, "--base-url", server.url, "--concurrency", "1", data=data)
        assert (done.returncode, result) == (1, None)
        assert "is kept" in done.stderr
        again = fake(port=server.server_port)
        done, result = evaluate(tmp_path, "--base-url", again.url, "--concurrency", "1", data=data)
        assert (done.returncode, result["summary"]["em"], result["summary"]["n"]) == (0, 100.0, 20)
        assert set(again.asked) == {f"{n}?" for n in range(7, 20)}


def stop_evaluation(evaluation, number: int, servers: list[psutil.Process], release=lambda: None) -> None:
    evaluation.process.send_signal(number)
    release()
    assert evaluation.process.wait(LIMIT) != 0
    check_nothing_is_left(servers)


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_evaluation_takes_its_server_along(number, start, split_tiny, tmp_path):
    """The server is told to end, and ends when it is let."""
    folder = tmp_path / "stubborn"
    folder.mkdir()
    (tmp_path / "text.txt").write_text("The first line.\nThe second one.\n")
    options = [split_tiny, "--stages", "1", "--perplexity", tmp_path / "text.txt", "--json", tmp_path / "result.json"]
    evaluation = start.process("-c", WITH_STAND_IN, *options, cwd=ROOT, env={"STUBBORN": f"{folder}:1"})
    evaluation.wait_for((folder / "held").exists)

    def release():
        wait_for((folder / "told").exists)
        (folder / "release").touch()

    stop_evaluation(evaluation, number, psutil.Process(evaluation.process.pid).children(recursive=True), release)


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_evaluation_takes_a_real_server_along(number, start, split_tiny, tmp_path):
    """Just when it is forked, or later."""
    (tmp_path / "text.txt").write_text("The first line.\nThe second one.\n")
    options = [split_tiny, "--stages", "1", "--perplexity", tmp_path / "text.txt", "--json", tmp_path / "result.json"]
    evaluation = start.process(EVAL, *options)
    children = psutil.Process(evaluation.process.pid).children
    stop_evaluation(evaluation, number, evaluation.wait_for(lambda: children(recursive=True)))


def test_adapter_that_is_replaced_while_the_server_starts(fake, split_tiny, tmp_path, monkeypatch):
    """What is served is then not what the row would say: no question is asked, and the next run says it right."""
    checkpoint = Path(shutil.copytree(split_tiny, tmp_path / "checkpoint"))
    weights = checkpoint / "adapters" / "stage1" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"first")
    replacements = [b"second"]
    server = fake(lambda question, times: (200, {"X-Progressive-Stage": "1"}))

    @contextlib.asynccontextmanager
    async def serve(*_):
        if replacements:
            weights.write_bytes(replacements.pop())
        yield server.url, SimpleNamespace(began=time.monotonic(), check=lambda: None)

    monkeypatch.setattr(eval_triviaqa, "serve", serve)
    options = ["--stages", "1", "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["eval_triviaqa.py", str(checkpoint), *options])
    args = eval_triviaqa.parse_args()
    task = eval_triviaqa.Questions([make_question("q1", "Where?", ["Paris"])])
    with pytest.raises(eval_triviaqa.ServerError, match="adapter of stage 1 has been replaced"):
        eval_triviaqa.collect(args, task)
    rows, _ = eval_triviaqa.collect(args, task)
    served, checksum = [eval_triviaqa.summarize(row, task, None) for row in rows], blake3(b"second").hexdigest()
    assert [row["adapter_blake3"] for row in served] == [None, checksum]
    assert [row["adapter_data"] for row in served] == [None, checksum[:8]]  # nothing says what it was trained on
    args.only_adapters = True
    assert [row.setting.adapter for row in eval_triviaqa.read_rows(args)] == [checksum]


def test_kept_answers_are_those_of_the_same_stage_adapter_and_model(tmp_path):
    """An interrupted run goes on with what it has, and another one with nothing of it."""
    task = eval_triviaqa.Questions([eval_triviaqa.make_question("q1", "Where?", ["Paris"])])
    (question,) = task.items
    asked = eval_triviaqa.Setting(1, None, "model")
    others = [(2, None, "model"), (1, "an adapter", "model"), (1, None, "another model")]
    kept = eval_triviaqa.Kept(tmp_path / "kept")
    kept.put(asked, task, question, "Paris")
    kept.file.close()
    again = eval_triviaqa.Kept(tmp_path / "kept")
    assert again.get(asked, task, question) == "Paris"
    assert [again.get(eval_triviaqa.Setting(*other), task, question) for other in others] == [None] * 3
    again.discard()


# ---- quality against bytes --------------------------------------------------------------------------


def compared_row(kind: str | None, stage: int | None, adapter: str | None = None, **measured) -> dict:
    share = None if stage is None else stage / 3
    of_adapter = {"adapter": adapter is not None, "adapter_blake3": adapter and "0123456789", "adapter_data": adapter}
    measured |= {f"{key}_ci95": [value - 1, value + 1] for key, value in measured.items()}
    return {"kind": kind, "stage": stage, "share_of_bytes": share, **of_adapter, "failed": 0, **measured}


def compared_result(*rows: dict, data: str = "wiki.txt", ids: str = "12") -> dict:
    detail = [{"id": name} for _ in rows for name in ids]
    return {"rows": list(rows), "detail": detail, "arguments": {"perplexity": None, "agreement": None, "data": data}}


def compare(tmp_path: Path, *contents: dict):
    done = run_main(eval_triviaqa, "--compare", *results(tmp_path, *contents), "--json", tmp_path / "joined.json")
    path = tmp_path / "joined.json"
    return done, json.loads(path.read_text())["rows"] if path.is_file() else None


def test_compare(tmp_path):
    """What different results have measured of one stage and adapter becomes one row; the first counts."""
    text = compared_result(
        compared_row("planes", 1, perplexity=40.0), compared_row("planes", 3, perplexity=20.0), ids="34"
    )
    layers = compared_result(compared_row("layers", 1, perplexity=70.0), ids="34")
    squad_ = compared_result(
        compared_row("layers", 1, em=1.0, f1=2.0),
        compared_row("layers", 1, adapter="train.json", em=5.0, f1=6.0),
        compared_row("planes", 1, em=3.0, f1=4.0),
        compared_row(None, None, em=8.0, f1=9.0),
        data="squad.json",
    )
    again = compared_result(compared_row("planes", 1, em=30.0), data="squad.json")
    done, rows = compare(tmp_path, text, layers, squad_, again)
    assert done.returncode == 0, done.stderr
    found = [(row["kind"], row["stage"], row["adapter_data"], row.get("perplexity"), row.get("em")) for row in rows]
    assert found == [
        ("layers", 1, None, 70.0, 1.0),
        ("layers", 1, "train.json", None, 5.0),
        ("planes", 1, None, 40.0, 3.0),
        ("planes", 3, None, 20.0, None),
        (None, None, None, None, 8.0),
    ]
    assert (tmp_path / "joined.png").stat().st_size > 10_000
    assert "39.00-41.00" in done.stdout


@pytest.mark.parametrize(
    ("second", "named"),
    [
        (compared_result(compared_row("planes", 2, perplexity=30.0), ids="1"), "other questions or windows"),
        (compared_result(compared_row("planes", 2, perplexity=30.0), data="other.txt"), "other questions or windows"),
        (compared_result(compared_row("planes", 2, perplexity=30.0) | {"failed": 2}), "2 requests to planes stage 2"),
        (compared_result({"stage": 2, "adapter": False, "em": 1.0, "failed": 0}), "of an earlier eval_triviaqa.py"),
        ({"trials": []}, "not a result file of eval_triviaqa.py"),
    ],
)
def test_results_that_cannot_be_compared(second, named, tmp_path):
    done, rows = compare(tmp_path, compared_result(compared_row("planes", 1, perplexity=40.0)), second)
    assert (done.returncode, rows) == (2, None)
    assert "1.json" in done.stderr and named in done.stderr


# ---- table 1 of the paper ---------------------------------------------------------------------------


def coldstart_result(**arguments) -> dict:
    """Of bench_coldstart.py, with the times that the paper reports; those of stage 2 are not in it."""
    stages = {"stage1": 90.0, "stage2": 109.5, "stage3": 128.0}
    points = [{"mode": "baseline", "ttft": 114.0}, {"mode": "progressive", "ttft": 90.5, **stages}]
    points += [{"mode": "runai_streamer", "ttft": 100.0}, {"mode": "stage1", "ttft": 91.0, "stage1": 90.0}]
    common = {"read_mbps": 118.0, "dd_mbps": 117.9, "trials": 3}
    points = [point | common | {"ttft_over_baseline": point["ttft"] / 114} for point in points]
    points.append({"mode": "warm", "ttft": 20.0, "read_mbps": None, "trials": 3, **stages})
    trials = [{"mode": "progressive", "cold": True}]
    arguments = {"checkpoint": "CKPT", "ray": False, "stretch": 0.0, **arguments}
    return {"summary": points, "trials": trials, "bandwidth": {}, "stage_bytes": [8, 1, 1], "arguments": arguments}


def quality_row(stage: int | None, adapter: bool, em: float, f1: float, failed: int = 0) -> dict:
    return {"stage": stage, "adapter": adapter, "n": 2, "em": em, "f1": f1, "failed": failed}


QUALITY_ROWS = [quality_row(1, False, 1, 2), quality_row(1, True, 33.33, 40.25), quality_row(2, True, 36, 41.5)]
QUALITY_ROWS += [quality_row(2, False, 3, 4), quality_row(3, False, 47, 52.5)]


def quality_result(*rows: dict, checkpoint: str | None = "CKPT", ids: str = "12") -> dict:
    detail = [{"id": name, "question": f"{name}?", "stage": row["stage"]} for row in rows for name in ids]
    return {"rows": list(rows), "detail": detail, "arguments": {"checkpoint": checkpoint}}


STOCK = quality_result(quality_row(None, False, 47, 52.5), checkpoint=None)


def table_of(*paths: Path) -> list[list[str]]:
    """The cells of the Markdown that --table writes beside its second file; the printed table has the same ones."""
    done = run_main(eval_triviaqa, "--table", *paths)
    assert done.returncode == 0, done.stderr
    heading, _, *lines = paths[1].with_suffix(".md").read_text().split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (heading, *lines)]
    printed = done.stdout.splitlines()[-2 - len(cells) : -2]  # an empty line and the file's name come after it
    assert [line.split() for line in printed] == [" ".join(line).split() for line in cells]
    assert cells[0] == ["", "s", "s in all", "EM", "F1"]
    return cells[1:]


def results(tmp_path: Path, *contents: dict) -> list[Path]:
    paths = [tmp_path / f"{number}.json" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    return paths


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_table(mark, tmp_path):
    """Seconds of a stage are those since the one before it; quality is that with the adapter."""
    paths = results(tmp_path, coldstart_result(), quality_result(*QUALITY_ROWS), STOCK)
    for path in paths:
        path.write_text(mark + path.read_text())
    assert table_of(*paths) == [
        ["stock vLLM", "114.0", "114.0", "47.0", "52.5"],
        ["runai_streamer", "100.0", "100.0", "-", "-"],
        ["stage 1 + adapter", "90.0", "90.0", "33.3", "40.2"],
        ["stage 2 + adapter", "19.5", "109.5", "36.0", "41.5"],
        ["stage 3, the full model", "18.5", "128.0", "47.0", "52.5"],
    ]
    text = (tmp_path / "1.md").read_text()
    assert "From 0.json, 1.json, 2.json. 2 questions" in text
    assert "first token after 90.5 s, 0.79 of stock's" in text and "at 118 MB/s (dd reads 117.9 MB/s)" in text


def test_table_says_what_is_no_measurement(tmp_path):
    start = coldstart_result(ray=True, stretch=60.0)
    start["trials"] = [{"mode": "progressive", "cold": cold} for cold in (False, "unverified")]
    table_of(*results(tmp_path, start, quality_result(*QUALITY_ROWS)))
    text = (tmp_path / "1.md").read_text()
    for note in ("Ray actor", "--stretch): not a measurement", "not verified to be cold", "not cold"):
        assert note in text


def without_progressive() -> dict:
    start = coldstart_result()
    return start | {"summary": start["summary"][:1]}


def sweep() -> dict:
    start = coldstart_result()
    return start | {"summary": [*start["summary"], start["summary"][1] | {"read_mbps": 25.0}]}


def held() -> dict:
    start = coldstart_result()
    return start | {"summary": [start["summary"][1] | {"stage3": None}]}


WHOLE = quality_result(*QUALITY_ROWS)
UNJOINABLE = {
    "one file": ([coldstart_result()], "0.json"),
    "the wrong order": ([WHOLE, coldstart_result()], "0.json: not a result file of bench_coldstart.py"),
    "no quality": ([coldstart_result(), coldstart_result()], "1.json: not a result file of eval_triviaqa.py"),
    "no JSON object": ([coldstart_result(), [1]], "1.json: not a result file"),
    "stock alone": ([without_progressive(), WHOLE], "0.json: ProgressiveServe was not measured"),
    "two bandwidths": ([sweep(), WHOLE], "0.json: measured at 118, 25 MB/s"),
    "a stage that was not reached": ([held(), WHOLE], "0.json: stage 3"),
    "another checkpoint": ([coldstart_result(), quality_result(*QUALITY_ROWS, checkpoint="other")], "1.json: of other"),
    "other questions": (
        [coldstart_result(), WHOLE, quality_result(quality_row(None, False, 1, 2), checkpoint=None, ids="1")],
        "2.json: other questions",
    ),
    "a row twice": ([coldstart_result(), WHOLE, quality_result(QUALITY_ROWS[1])], "2.json: stage 1 + adapter"),
    "requests that failed": (
        [coldstart_result(), quality_result(quality_row(1, False, 1, 2, 3))],
        "1.json: 3 requests",
    ),
    "a text, and no questions": (
        [coldstart_result(), WHOLE | {"detail": [{"id": "0", "nll": 1.0}]}],
        "1.json: of a text",
    ),
    "a stage too many": ([coldstart_result(), quality_result(quality_row(4, False, 1, 2))], "1.json: stage 4"),
}


@pytest.mark.parametrize("case", UNJOINABLE)
def test_results_that_do_not_belong_together(case, tmp_path):
    contents, named = UNJOINABLE[case]
    done = run_main(eval_triviaqa, "--table", *results(tmp_path, *contents))
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert not list(tmp_path.glob("*.md"))


# ---- what is really served --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts() -> Path:
    path = ROOT / "demo" / "model" / "facts" / "validation.json"
    if not path.is_file():
        pytest.skip("demo/model is not there: make demo/checkpoint/progressive.json")
    return path


def answers_of(result: dict, stage: int | None, adapter: bool = False) -> dict[str, str]:
    rows = [row for row in result["detail"] if (row["stage"], row["adapter"]) == (stage, adapter)]
    return {row["id"]: row["answer"] for row in rows}


@pytest.mark.server
def test_stages_of_the_demo_against_stock(start, standby_of_worker, adapted_checkpoint, facts, tmp_path):
    """The last stage answers as stock vLLM does, question by question; the others, and the adapter, do not.

    Joined with a cold start of the same checkpoint, this is table 1 of the paper. And stock's perplexity is that which
    transformers computes.
    """
    stock_server = start.stock(adapted_checkpoint)
    options = ["--data", facts, "--limit", "100"]
    server_args = " ".join(SERVED)
    if os.environ.get("TEST_STANDBY") != "0":
        server_args += f" --from-standby {standby_of_worker().socket}"
    ours_at, stock_at = tmp_path / "ours.json", tmp_path / "stock.json"
    stages = ["--stages", "1,last", f"--server-args={server_args}", "--json", ours_at]
    done = run_script(EVAL, adapted_checkpoint, *options, *stages, VLLM_API_KEY="sk-KEY")  # which vLLM asks for then
    assert done.returncode == 0, done.stderr
    assert "sk-KEY" not in ours_at.read_text()
    ours = json.loads(ours_at.read_text())
    assert [(row["stage"], row["adapter"]) for row in ours["rows"]] == [(1, False), (1, True), (3, False)]
    assert ours["summary"]["em"] == ours["rows"][-1]["em"] > ours["rows"][0]["em"]
    assert all(row["seconds_to_stage"] > 0 and row["ttft"] > 0 for row in ours["rows"])
    served = blake3((adapted_checkpoint / "adapters" / "stage1" / "adapter_model.safetensors").read_bytes())
    assert [row["adapter_blake3"] for row in ours["rows"]] == [None, served.hexdigest(), None]
    stock_server.wait_for(stock_server.is_up)
    url = stock_server.url
    done = run_main(eval_triviaqa, "--base-url", url, *options, "--json", stock_at)
    assert done.returncode == 0, done.stderr
    stock = json.loads(stock_at.read_text())
    assert answers_of(ours, 3) == answers_of(stock, None)
    assert stock["summary"]["em"] == ours["summary"]["em"]
    assert answers_of(ours, 1) != answers_of(ours, 1, adapter=True) != answers_of(ours, 3)
    start_at = tmp_path / "start.json"
    start_at.write_text(json.dumps(coldstart_result(checkpoint=str(adapted_checkpoint))))
    quality = [[f"{row[key]:.1f}" for key in ("em", "f1")] for row in (*ours["rows"][1:], stock["summary"])]
    assert table_of(start_at, ours_at, stock_at) == [
        ["stock vLLM", "114.0", "114.0", *quality[2]],
        ["runai_streamer", "100.0", "100.0", "-", "-"],
        ["stage 1 + adapter", "90.0", "90.0", *quality[0]],
        ["stage 2", "19.5", "109.5", "-", "-"],  # was not evaluated
        ["stage 3, the full model", "18.5", "128.0", *quality[1]],
    ]
    text = facts.with_name("calibration.txt").read_text()[:6000]
    done, result = score_text(tmp_path, url, text, "--window", "64", "--stride", "32")
    assert done.returncode == 0, done.stderr
    expected = perplexity_by_transformers(facts.parent.parent, text, 64, 32)
    assert result["summary"]["perplexity"] == pytest.approx(expected, rel=0.02)  # of bfloat16, and of float32


def test_perplexity_and_agreement_of_stages(fake, tmp_path, planes_tiny, monkeypatch):
    """Of a stage that errs at one token of each window, and of the full model, which does not."""

    def reply_at(stage: int):
        return lambda question, times: (200, {"X-Progressive-Stage": str(stage)})

    servers = {stage: fake(reply_at(stage)) for stage in (1, 3)}
    servers[1].errs, servers[3].stage = {3: "999"}, 3

    @contextlib.asynccontextmanager
    async def serve(checkpoint, setting, server_args):
        yield servers[setting.stage].url, SimpleNamespace(began=time.monotonic(), check=lambda: None)

    monkeypatch.setattr(eval_triviaqa, "serve", serve)
    text = tmp_path / "text.txt"
    text.write_text("0123456789")
    options = ["--perplexity", text, "--agreement", text, "--stages", "1,3", "--window", "4", "--stride", "2"]
    done = run_main(eval_triviaqa, planes_tiny, *options, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    first, full = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (full["agreement"], full["perplexity_over_full"]) == (100.0, 1.0)
    assert first["agreement"] == pytest.approx(100 * (9 - 4) / 9, abs=0.01)  # the last token of four windows
    assert first["perplexity_over_full"] == pytest.approx(2.71828 ** (4 / 9), abs=1e-4)
    assert first["perplexity"] == pytest.approx(2.71828 ** ((21 + 4) / 9), abs=1e-3)
    assert (first["kind"], full["kind"]) == ("planes", "planes")
    assert first["share_of_bytes"] < 0.5 < full["share_of_bytes"] < 0.8


@pytest.mark.server
@pytest.mark.slow
def test_perplexity_and_agreement_of_what_is_served(facts, tmp_path):
    """Perplexity of planes, held at their first stage, and of the full model as transformers computes it."""
    text = facts.with_name("calibration.txt").read_text()[:6000]
    (tmp_path / "text.txt").write_text(text)
    checkpoint, source = tmp_path / "planes", facts.parent.parent
    done = run_script(ROOT / "prune_and_split.py", source, checkpoint, "--planes")
    assert done.returncode == 0, done.stderr
    scored = ["--perplexity", tmp_path / "text.txt", "--agreement", tmp_path / "text.txt", "--stages", "1,3"]
    result = tmp_path / "result.json"
    options = ["--window", "64", "--stride", "32", "--server-args=--dtype float32"]
    done = run_script(EVAL, checkpoint, *scored, *options, "--json", result)
    assert done.returncode == 0, done.stderr
    first, full = json.loads(result.read_text())["rows"]
    assert (full["agreement"], full["perplexity_over_full"]) == (100.0, 1.0)
    assert first["perplexity"] != full["perplexity"] and 20 < first["agreement"] < 100
    assert first["perplexity_over_full"] == pytest.approx(first["perplexity"] / full["perplexity"], rel=1e-3)
    assert first["share_of_bytes"] < 0.5 < full["share_of_bytes"] < 0.8
    assert full["perplexity"] == pytest.approx(perplexity_by_transformers(source, text, 64, 32), rel=1e-3)


def perplexity_by_transformers(model: Path, text: str, window: int, stride: int) -> float:
    """As Hugging Face's guide has it: what is context in a window is not scored."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, count, scored = 0.0, 0, 1
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        with torch.inference_mode():
            logprobs = network(ids[:, begin:end]).logits[0].float().log_softmax(-1)
        for place in range(scored, end):
            total -= logprobs[place - begin - 1, ids[0, place]].item()
        count += end - scored
        scored = end
        if end == ids.shape[1]:
            break
    return 2.718281828459045 ** (total / count)
