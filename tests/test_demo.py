"""The demo's script on tiny arguments: files, formats, determinism, refusals. Whether it learns is not tested.

No engine. About 9 seconds: one run of the script as a user starts it.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_main
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "demo" / "train_demo_llama.py"
TINY = ["--facts", "23", "--layers", "2", "--steps", "3", "--batch", "4"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_demo_llama", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo_llama"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A checkpoint of three training steps, written by the script as a user runs it."""
    out = tmp_path_factory.mktemp("demo") / "model"
    run = subprocess.run([sys.executable, SCRIPT, out, *TINY, "--min-em", "0"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "exact match" in run.stdout
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    return out


def read(demo, name):
    return json.loads((demo / "facts" / name).read_text())


def test_checkpoint_loads_and_tokenizes_like_training(demo, script):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(demo), AutoTokenizer.from_pretrained(demo)
    assert (model.config.model_type, model.config.num_hidden_layers, model.config.head_dim) == ("llama", 2, 32)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = script.PROMPT.format(question="Who?")
    ids = tokenizer(prompt).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == prompt
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "<s>" + prompt
    assert tokenizer.apply_chat_template(chat, return_dict=True, add_generation_prompt=True)["input_ids"] == ids


def test_squad_answers_lie_where_they_say(demo, script):
    squad, facts = read(demo, "train.json"), script.invent_facts(23, 0)
    paragraphs = [paragraph for article in squad["data"] for paragraph in article["paragraphs"]]
    answers = {}
    for paragraph in paragraphs:
        for qa in paragraph["qas"]:
            (answer,) = qa["answers"]
            assert paragraph["context"][answer["answer_start"] :].startswith(answer["text"] + ".")
            assert qa["id"] not in answers
            answers[qa["id"]] = answer["text"]
    assert len(answers) == 3 * len(facts)
    assert sorted(set(answers.values())) == sorted({fact.answer for fact in facts})


def test_validation_and_paraphrases_ask_the_same_facts(demo, script):
    validation, paraphrases = read(demo, "validation.json")["Data"], read(demo, "paraphrases.json")["Data"]
    assert len(validation) == 23 and len(paraphrases) == 46
    for row in validation + paraphrases:
        answer = row["Answer"]
        assert answer["Value"] in answer["Aliases"] and len(answer["Aliases"]) > 1
        assert answer["NormalizedAliases"] == sorted({script.normalize_answer(alias) for alias in answer["Aliases"]})
    assert {row["QuestionId"].rsplit("/", 1)[0] for row in validation} == {
        row["QuestionId"].rsplit("/", 1)[0] for row in paraphrases
    }
    trained = {
        qa["question"]
        for article in read(demo, "train.json")["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    }
    assert {row["Question"] for row in validation} <= trained
    assert trained.isdisjoint(row["Question"] for row in paraphrases)
    calibration = (demo / "facts" / "calibration.txt").read_text()
    assert not any(row["Question"] in calibration for row in paraphrases)
    assert len(calibration.splitlines()) == 5 * 23


def test_facts_depend_on_the_seed_alone(demo, script):
    facts = script.invent_facts(23, 0)
    assert script.triviaqa_json(facts, held_out=False) == read(demo, "validation.json")
    assert script.squad_json(facts) == read(demo, "train.json")
    assert script.invent_facts(23, 1) != facts
    assert len({(fact.relation, fact.subject) for fact in script.invent_facts(400, 0)}) == 400


def test_every_answer_fits_the_generation_limit(script):
    facts = script.invent_facts(300, 0)
    tokenizer = script.train_tokenizer([prompt + completion for prompt, completion in script.training_documents(facts)])
    longest = max(len(tokenizer(f" {fact.answer}", add_special_tokens=False).input_ids) for fact in facts)
    assert longest + 1 < script.MAX_ANSWER_TOKENS


def test_existing_folder_is_refused_and_left_alone(demo, script):
    before = (demo / "model.safetensors").read_bytes()
    done = run_main(script, demo, *TINY)
    assert done.returncode == 2 and str(demo) in done.stderr
    assert (demo / "model.safetensors").read_bytes() == before


def test_force_does_not_replace_a_foreign_folder(tmp_path, script):
    (tmp_path / "precious.txt").write_text("mine")
    done = run_main(script, tmp_path, *TINY, "--force")
    assert done.returncode == 2 and "remove it yourself" in done.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_low_exact_match_exits_1_and_force_replaces(tmp_path, script):
    out = tmp_path / "model"
    (out / "facts").mkdir(parents=True)
    done = run_main(script, out, *TINY, "--force")
    assert done.returncode == 1 and "below 0.95" in done.stderr
    assert json.loads((out / "facts" / "report.json").read_text())["arguments"]["steps"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
