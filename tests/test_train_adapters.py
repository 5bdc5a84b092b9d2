"""train_adapters.py: what it reads, what it trains on, what it writes, and that an interrupted run loses nothing.

No engine. About 20 seconds.
"""

import codecs
import json
import shutil
import signal
import sys
from argparse import Namespace
from collections import ChainMap
from pathlib import Path

import pytest
import torch
from conftest import ROOT, PassLayer, edit_config, load_stage, run_main, run_patched, run_script
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import train_adapters
from prune_and_split import SYNTHETIC_SHAPES
from train_adapters import IGNORED, UsageError

TRAIN = ROOT / "train_adapters.py"
SQUAD_DEV = ROOT.parent / "shared" / "data" / "squad" / "dev-v1.1.json"
QUICK = ("--max-steps", "4", "--batch-size", "4", "--seq-len", "128", "--rank", "2", "--lr", "1e-2")


EOS = "<511>"


def squad(count: int) -> dict:
    qas = [
        {"id": str(n), "question": f"What is {n} times {n}?", "answers": [{"text": str(n * n), "answer_start": 0}]}
        for n in range(count)
    ]
    return {"version": "1.1", "data": [{"title": "x", "paragraphs": [{"context": "Arithmetic.", "qas": qas}]}]}


@pytest.fixture
def checkpoint(split_tiny, tmp_path) -> Path:
    folder = Path(shutil.copytree(split_tiny, tmp_path / "checkpoint"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": EOS}))
    return folder


@pytest.fixture
def dataset(tmp_path) -> Path:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(squad(40)))
    return path


# ---- what is trained, and on what -------------------------------------------------------------------


def test_adapters_of_all_stages(checkpoint, dataset):
    done = run_main(train_adapters, checkpoint, "--dataset", dataset, *QUICK)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("Question: What is 3 times 3?\nAnswer:", return_tensors="pt").input_ids
    for stage, layers in ((1, {0, 3}), (2, {0, 1, 3})):
        folder = checkpoint / "adapters" / f"stage{stage}"
        weights = load_file(folder / "adapter_model.safetensors")
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in weights} == layers  # numbered as in CKPT
        assert {name.split(".")[-3] for name in weights} == {"q_proj", "v_proj"}
        assert any(weights[name].abs().max() > 0 for name in weights if "lora_B" in name)  # it was trained
        model = load_stage(checkpoint, stage)
        with torch.no_grad():
            before = model(ids).logits
            after = PeftModel.from_pretrained(model, folder)(ids).logits  # plain PEFT loads it
        assert not torch.equal(before, after)
        training = json.loads((folder / "training.json").read_text())
        assert training["base"]["layers"] == sorted(layers)
        assert [point["step"] for point in training["loss"]] == [1, 2, 3, 4]
        assert training["examples"] == 40 and training["arguments"]["rank"] == 2
        assert (folder / "loss.png").stat().st_size > 1000
    assert {path.name for path in (checkpoint / "adapters").iterdir()} == {"stage1", "stage2"}


def test_later_stages_are_not_read(checkpoint, dataset):
    """Stage 1 can be trained where nothing else has been copied to."""
    for path in (checkpoint / "model-stage2.safetensors", checkpoint / "model-stage3.safetensors"):
        path.unlink()
    done = run_main(train_adapters, checkpoint, "--dataset", dataset, "--stages", "1", *QUICK)
    assert done.returncode == 0, done.stderr
    done = run_main(train_adapters, checkpoint, "--dataset", dataset, "--stages", "2", *QUICK)
    assert done.returncode == 2
    assert "model-stage2.safetensors" in done.stderr


def test_stage_is_the_model_with_pass_layers(split_tiny):
    stage = train_adapters.read_stages(split_tiny)[0]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = train_adapters.load_stage(split_tiny, stage, bf16=False)(ids).logits
        assert torch.equal(ours, load_stage(split_tiny, 1)(ids).logits)


def edit_weights(checkpoint: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into the file of stage 1, or take them out."""
    path = checkpoint / "model-stage1.safetensors"
    weights = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path, {"format": "pt"})


LEFT_OUT = (
    *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.cos_cached"),
    *("model.layers.3.self_attn.rotary_emb.sin_cached", "model.rotary_emb.inv_freq"),
    "model.layers.3.self_attn.q_proj.bias",
)


def test_tensors_that_are_no_parameters_are_left_out(checkpoint, dataset):
    """Every LLaMA-2 of its day has inv_freq in each layer; transformers and vLLM leave it out."""
    edit_weights(checkpoint, **{name: torch.rand(128) for name in LEFT_OUT})
    done = run_main(train_adapters, checkpoint, "--dataset", dataset, "--stages", "1", *QUICK, "--max-steps", "1")
    assert done.returncode == 0, done.stderr
    stage = train_adapters.read_stages(checkpoint)[0]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = train_adapters.load_stage(checkpoint, stage, bf16=False)(ids).logits
        assert torch.equal(ours, load_stage(checkpoint, 1)(ids).logits)


@pytest.mark.slow
def test_vllm_leaves_out_the_same_tensors():
    from vllm.model_executor.models.utils import AutoWeightsLoader

    mapper = AutoWeightsLoader.REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER
    assert all(mapper.apply_list([name]) == [] for name in LEFT_OUT[:-1])
    assert all(train_adapters.ROTARY_TABLE.search(f"model.{part}") for part in mapper.orig_to_new_substr)
    module = torch.nn.Module()
    module.q_proj = torch.nn.Linear(1, 1, bias=False)
    assert AutoWeightsLoader(module).load_weights(iter([("q_proj.bias", torch.zeros(1))])) == set()
    for name in ("q_norm.weight", "q_norm.bias", "q_proj.weight_scale"):
        with pytest.raises(ValueError, match=name.split(".")[0]):
            AutoWeightsLoader(module).load_weights(iter([(name, torch.zeros(1))]))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("model.layers.0.self_attn.q_norm.weight", {}),
        ("model.layers.0.self_attn.q_proj.weight_scale", {}),
        ("lm_head.weight_scale", {}),
        ("model.layers.0.self_attn.q_norm.bias", {}),
        ("model.layers.0.self_attn.o_proj.bias", {"bias": True}),  # vLLM's model has it then, transformers' has not
    ],
)
def test_other_tensors_are_refused_by_name(name, settings, checkpoint, dataset):
    edit_weights(checkpoint, **{name: torch.rand(128)})
    edit_config(checkpoint, **settings)
    done = run_main(train_adapters, checkpoint, "--dataset", dataset, *QUICK)
    assert done.returncode == 2, done.stderr
    assert f"not of its model: {name} (1 in all)" in done.stderr


def test_missing_tensors_are_refused_by_name(checkpoint, dataset):
    edit_weights(checkpoint, **{"lm_head.weight": None})
    done = run_main(train_adapters, checkpoint, "--dataset", dataset, *QUICK)
    assert done.returncode == 2 and "no tensor lm_head.weight (1 missing)" in done.stderr


@pytest.mark.parametrize("head", ["another", "equal", "none"])
def test_a_head_in_the_file_is_used_though_the_config_ties_it(head, checkpoint):
    """vLLM unties them then."""
    embedding = load_file(checkpoint / "model-stage1.safetensors")["model.embed_tokens.weight"]
    heads = {"another": embedding.flip(0).contiguous(), "equal": embedding.clone(), "none": None}
    edit_weights(checkpoint, **{"lm_head.weight": heads[head]})
    edit_config(checkpoint, tie_word_embeddings=True)
    is_tied = head == "none"
    whole = train_adapters.read_stages(checkpoint)[-1]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = train_adapters.load_stage(checkpoint, whole, bf16=False)(ids).logits
        if is_tied:  # the index names a tensor that is there no more
            (checkpoint / "model.safetensors.index.json").unlink()
            files = [load_file(checkpoint / name) for name in whole.files]
            save_file(dict(ChainMap(*files)), checkpoint / "model.safetensors", {"format": "pt"})
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint, tie_word_embeddings=is_tied)(ids).logits
    assert torch.equal(ours, theirs)


def test_loss_is_on_the_answer_alone(checkpoint):
    tokenizer = train_adapters.load_tokenizer(checkpoint)
    example = train_adapters.question_example(" Who? ", "Mira ", None)
    assert example == train_adapters.Example("Question: Who?\nAnswer:", " Mira")
    (encoded,) = train_adapters.encode_examples(tokenizer, [example], 64)
    seen = [token for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(seen) == f" Mira{EOS}"
    assert encoded["labels"].count(IGNORED) == len(example.prompt)  # a byte is a token here
    assert train_adapters.encode_examples(tokenizer, [example], 10) == []
    with_context = train_adapters.question_example("Who?", "Mira", "Mira was born.")
    assert with_context.prompt == "Context: Mira was born.\nQuestion: Who?\nAnswer:"


def test_loss_leaves_padding_out(checkpoint, tmp_path, monkeypatch):
    """As the Trainer gets a batch. Padding is the token that ends an answer: counted, it would teach to say nothing."""

    class Trainer(Exception):
        def __init__(self, **options):
            self.collate = options["data_collator"]

        def remove_callback(self, _):
            raise self

    monkeypatch.setattr("transformers.Trainer", Trainer)
    monkeypatch.setattr(sys, "argv", ["train_adapters.py", str(checkpoint), "--dataset", "x", *QUICK])
    tokenizer = train_adapters.load_tokenizer(checkpoint)
    examples = [train_adapters.question_example(*qa, None) for qa in (("Who?", "Mira"), ("And who else?", "Jonathan"))]
    encoded = train_adapters.encode_examples(tokenizer, examples, 64)
    (stage, _) = train_adapters.choose_stages(train_adapters.read_stages(checkpoint), None)
    with pytest.raises(Trainer) as trainer:
        train_adapters.train_stage(train_adapters.parse_args(), stage, encoded, tokenizer, tmp_path)
    batch = trainer.value.collate(encoded)
    assert batch["input_ids"].shape[0] == 2 and batch["attention_mask"].sum() < batch["attention_mask"].numel()
    counted = [tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]
    assert counted == [f" Mira{EOS}", f" Jonathan{EOS}"]


def change_tokenizer(checkpoint: Path, change) -> None:
    """change(Tokenizer of the tokenizers package) edits what lies in tokenizer.json."""
    path = str(checkpoint / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    change(tokenizer)
    tokenizer.save(path)


def process(template: str):
    special = [(f"<{number}>", number) for number in (508, 509, 510, 511)]
    return lambda tokenizer: setattr(
        tokenizer, "post_processor", TemplateProcessing(single=template, special_tokens=special)
    )


def merge_colon_and_space(tokenizer: Tokenizer) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    vocab = {(":\u0120" if token == "<300>" else token): number for token, number in model["vocab"].items()}
    tokenizer.model = BPE(vocab=vocab, merges=[(":", "\u0120")])
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)  # words do not keep it from merging


def pad_to_40(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(direction="left", length=40, pad_id=299, pad_token="<299>")
    tokenizer.enable_truncation(8)


SPECIAL_TOKENS = {
    "none": (lambda tokenizer: None, []),
    "begins and ends": (process("<509> $A <511>"), [509]),
    "ends": (process("$A <511>"), []),
    "ends in two": (process("<509> $A <511> <510>"), [509]),
    "begins with two": (process("<509> <508> $A"), [509, 508]),
    "a token of question and answer": (merge_colon_and_space, []),
    "padding and truncation of its own": (pad_to_40, []),
}


@pytest.mark.parametrize("case", SPECIAL_TOKENS)
def test_tokenizers_of_every_habit_end_answers_once(case, checkpoint):
    """The prompt is a server's, up to what its tokenizer appends; of text nothing is lost, nothing added."""
    change, before = SPECIAL_TOKENS[case]
    change_tokenizer(checkpoint, change)
    tokenizer = train_adapters.load_tokenizer(checkpoint)

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    example = train_adapters.question_example("Who?", "Ann", None)
    (encoded,) = train_adapters.encode_examples(tokenizer, [example], 64)
    prompt = before + plain(example.prompt)
    answer = [*plain(" Ann"), 511]
    assert encoded == {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
    texts = ["abcdefghijkl", "mno"]
    (piece, *_) = train_adapters.encode_text(tokenizer, [train_adapters.Example("", text) for text in texts], 16)
    stream = [token for text in texts for token in (*before, *plain(text), 511)]
    assert piece["input_ids"] == stream[:16]


@pytest.mark.parametrize("pad_token", [None, EOS, "[PAD]"])
def test_padding_needs_no_row_of_the_embedding(pad_token, checkpoint, dataset):
    """[PAD] is added behind the vocabulary, as fine-tunes leave it."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(checkpoint)
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == 512 + (pad_token == "[PAD]")
    options = ["--dataset", dataset, "--stages", "1", *QUICK, "--max-steps", "1"]
    done = run_main(train_adapters, checkpoint, *options)
    assert done.returncode == 0, done.stderr


def test_tokens_that_the_model_has_not(checkpoint, dataset):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, eos_token="<new>")
    tokenizer.save_pretrained(checkpoint)
    done = run_main(train_adapters, checkpoint, "--dataset", dataset, *QUICK)
    assert done.returncode == 2, done.stderr
    assert "token 512, '<new>', has no row in the embedding of 512" in done.stderr


def test_healing_text_is_packed(checkpoint):
    tokenizer = train_adapters.load_tokenizer(checkpoint)
    documents = [train_adapters.Example("", "abcdef"), train_adapters.Example("", "ghi")]
    pieces = train_adapters.encode_text(tokenizer, documents, 5)
    assert [tokenizer.decode(piece["input_ids"]) for piece in pieces] == ["abcde", f"f{EOS}ghi"]
    assert all(piece["labels"] == piece["input_ids"] for piece in pieces)


def test_real_squad():
    if not SQUAD_DEV.is_file():
        pytest.skip(f"{SQUAD_DEV} is not there")
    examples = train_adapters.read_squad(SQUAD_DEV, with_context=True)
    assert len(examples) == 10570
    assert examples[0].completion == " Denver Broncos"
    assert examples[0].prompt.startswith("Context: Super Bowl 50 was an American football game")


def test_byte_order_marks_are_no_text(checkpoint, dataset, tmp_path):
    """Notepad and PowerShell leave them; examples and stages are the same as without."""
    text = tmp_path / "text"
    text.write_text("one\ntwo\n")
    given = [Namespace(heal_on=text), Namespace(heal_on=None, dataset=str(dataset), with_context=True)]
    files = [text, dataset, checkpoint / "progressive.json"]
    before = [*map(train_adapters.read_examples, given), train_adapters.read_stages(checkpoint)]
    for path in files:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert [*map(train_adapters.read_examples, given), train_adapters.read_stages(checkpoint)] == before


def test_healing_and_every_linear_layer(checkpoint, tmp_path):
    text = tmp_path / "text"
    text.write_text("".join(f"Line {n} of the text that heals the model.\n" for n in range(60)))
    options = ["--stages", "2", "--targets", "all-linear", "--gradient-checkpointing", *QUICK]
    done = run_main(train_adapters, checkpoint, "--heal-on", text, *options)
    assert done.returncode == 0, done.stderr
    weights = load_file(checkpoint / "adapters" / "stage2" / "adapter_model.safetensors")
    assert len(weights) == 3 * 7 * 2  # layers, linear layers, A and B


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_defaults_train_llama2_7b_on_a_card_of_24_gib(targets, monkeypatch):
    monkeypatch.setattr(train_adapters, "HAS_GPU", True)
    monkeypatch.setattr(sys, "argv", ["train_adapters.py", "llama2-7b-progressive", "--targets", targets])
    args = train_adapters.parse_args()
    assert args.batch_size * args.grad_accum == 16 and args.seq_len == 512
    with torch.device("meta"):  # stage 2, the larger one: 24-27 are missing
        config = AutoConfig.for_model("llama", **SYNTHETIC_SHAPES["llama2-7b"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for layer in range(24, 28):
            model.model.layers[layer] = PassLayer()
        model = train_adapters.add_adapter(model, args)
    weights = 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad) / 2**30
    assert weights < train_adapters.estimate_memory(model, args) < 0.8 * 24  # the rest: CUDA itself, fragmentation


# ---- interrupted runs -------------------------------------------------------------------------------


KILLED_IN_STEP_8 = """
import transformers

class Kill(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            signal.raise_signal(signal.SIGKILL)

script.loss_on_progress_bar = Kill
"""


@pytest.fixture
def one_thread():
    """Sums that do not depend on the number of threads, which another file's tests may have changed in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_interrupted_and_resumed_is_uninterrupted(checkpoint, dataset, one_thread, tmp_path, monkeypatch):
    options = ["--dataset", dataset, "--stages", "1", *QUICK, "--max-steps", "12"]
    whole = Path(shutil.copytree(checkpoint, tmp_path / "whole"))
    assert run_main(train_adapters, whole, *options).returncode == 0
    # Killed once a checkpoint was seen, a run had now and then ended before.
    killed = run_patched(train_adapters, KILLED_IN_STEP_8, checkpoint, *options, OMP_NUM_THREADS="1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    working = checkpoint / "adapters" / ".stage1.training"
    assert json.loads((working / "checkpoint-7" / "trainer_state.json").read_text())["global_step"] == 7
    assert not (checkpoint / "adapters" / "stage1").exists()
    done = run_main(train_adapters, checkpoint, *options, "--lr", "5", "--resume")
    assert done.returncode == 2 and "--lr 0.01" in done.stderr
    steps = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step + 1)

    monkeypatch.setattr(train_adapters, "loss_on_progress_bar", Count)
    done = run_main(train_adapters, checkpoint, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert steps == [8, 9, 10, 11, 12]  # from the start, it would end with the same weights
    names = [folder / "adapters" / "stage1" / "adapter_model.safetensors" for folder in (whole, checkpoint)]
    assert names[0].read_bytes() == names[1].read_bytes()
    curves = [json.loads(name.with_name("training.json").read_text())["loss"] for name in names]
    assert curves[0] == curves[1] and len(curves[0]) == 12
    assert not working.exists()


# ---- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["nowhere"], "nowhere"),
        (["{checkpoint}", "--dataset", "nowhere.json"], "nowhere.json"),
        (["{checkpoint}", "--stages", "3"], "stage 3 is the full model"),
        (["{checkpoint}", "--stages", "1,x"], "'x'"),
        (["{checkpoint}", "--dataset", "{dataset}", "--heal-on", "x"], "--heal-on x"),
        (["{checkpoint}", "--heal-on", "nowhere.txt"], "nowhere.txt"),
        (["{checkpoint}", "--dataset", "{dataset}", "--seq-len", "5"], "--seq-len 5"),
        (["{checkpoint}", "--dataset", "{dataset}", "--targets", "x_proj"], "x_proj"),
        (["{checkpoint}", "--rank", "0"], "0 is no positive"),
    ],
)
def test_bad_input(options, named, checkpoint, dataset):
    done = run_main(train_adapters, *(option.format(checkpoint=checkpoint, dataset=dataset) for option in options))
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert not list((checkpoint / "adapters").glob("stage*"))


CONFIGS = {
    "quantised": (
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config awq: stages are of unquantised",
    ),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "quantization_config compressed"),
    "no architectures": ({"architectures": None}, "architectures is None: it must name LlamaForCausalLM"),
    "no architecture": ({"architectures": []}, "architectures is []: it must name LlamaForCausalLM"),
    "another architecture": ({"architectures": ["Qwen2ForCausalLM"]}, "architectures is ['Qwen2ForCausalLM']"),
    "quantised in a word": ({"quantization_config": "fp8"}, "quantization_config fp8: stages are of unquantised"),
    "a setting of another type": ({"hidden_size": "x"}, "hidden_size"),
    "more layers": ({"num_hidden_layers": 5}, "has 5 layers, progressive.json 4"),
    "unknown model": ({"model_type": "x"}, "model type `x`"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit(case, checkpoint, dataset):
    values, named = CONFIGS[case]
    edit_config(checkpoint, **values)
    done = run_main(train_adapters, checkpoint, "--dataset", dataset, *QUICK)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train_adapters.py: error: ")]
    assert named in line and str(checkpoint / "config.json") in line


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_configs_that_cannot_be_read(content, checkpoint):
    (checkpoint / "config.json").unlink()
    if content:
        (checkpoint / "config.json").write_text(content)
    done = run_main(train_adapters, checkpoint)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{checkpoint / 'config.json'} cannot be used" in done.stderr


@pytest.mark.parametrize("own", [{"AutoTokenizer": [None, "tokenization_x.X"]}, ["tokenization_x.X", None]])
def test_tokenizer_with_code_of_its_own(own, checkpoint):
    """Its tokens may be others than those of the tokenizer.json beside it. No text has been looked for by then."""
    (checkpoint / "tokenization_x.py").write_text("raise RuntimeError")
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "X", "auto_map": own}))
    done = run_main(train_adapters, checkpoint, "--dataset", "nowhere.json")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr and "tokenization_x.X" in done.stderr and "leave auto_map out" in done.stderr


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_tokenizers_that_cannot_be_read(content, checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    if content:
        (checkpoint / "tokenizer.json").write_text(content)
    done = run_main(train_adapters, checkpoint, "--dataset", "nowhere.json")
    assert done.returncode == 2 and f"no tokenizer in {checkpoint}" in done.stderr


def test_tokenizer_without_an_end(split_tiny):
    with pytest.raises(UsageError, match="eos_token"):
        train_adapters.load_tokenizer(split_tiny)


def test_existing_adapters_are_kept(checkpoint, dataset):
    (checkpoint / "adapters" / "stage2").mkdir(parents=True)
    done = run_script(TRAIN, checkpoint, "--dataset", dataset, *QUICK)  # as a user runs it
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "stage2 exists already" in done.stderr and "--force" in done.stderr
    assert not (checkpoint / "adapters" / "stage1").exists()


MALFORMED = {
    "no JSON": ('{"data": [\n}', "line 2"),
    "no data": ({}, "data is missing"),
    "no paragraphs": ({"data": [{}]}, "data[0].paragraphs"),
    "no question": ({"data": [{"paragraphs": [{"qas": [{"answers": []}]}]}]}, "data[0].paragraphs[0].qas[0].question"),
    "an answer without text": (
        {"data": [{"paragraphs": [{"qas": [{"question": "?", "answers": [{}]}]}]}]},
        "qas[0].answers[0].text",
    ),
    "nothing": ({"data": []}, "is empty"),
    "SQuAD v2.0": (
        {"version": "v2.0", "data": [{"paragraphs": [{"qas": [{"question": "?", "answers": [{"text": "a"}]}]}]}]},
        "version is 'v2.0', and this script has the rules of SQuAD v1.1 alone\ngive a file of that version",
    ),
    "another version": ({"version": 1.0, "data": []}, "version is 1.0,"),
    "impossible": (
        {"data": [{"paragraphs": [{"qas": [{"question": "?", "answers": [{"text": "a"}], "is_impossible": True}]}]}]},
        "data[0].paragraphs[0].qas[0] has no answer, as in SQuAD v2.0",
    ),
    "no answer": (
        {"version": "1.1", "data": [{"paragraphs": [{"qas": [{"question": "?", "answers": []}]}]}]},
        "leave such questions out",
    ),
    "an empty answer": (
        {"version": "1.1", "data": [{"paragraphs": [{"qas": [{"question": "?", "answers": [{"text": " "}]}]}]}]},
        "qas[0] has no answer",
    ),
    "TriviaQA": ({"Version": 1.0, "Data": []}, "the format of TriviaQA"),
    "rows of a dataset": ({"data": [{"question": "?", "answers": {"text": ["a"]}}]}, "data[0].paragraphs"),
    "a list of rows": ([{"question": "?"}], "the format is that of SQuAD v1.1"),
    "JSON Lines": ('{"question": "?"}\n{"question": "?"}\n', "give a file in the format of SQuAD v1.1"),
    "CSV": ("question,answer\n?,a\n", "give a file in the format of SQuAD v1.1"),
    "tab-separated lines": ("?\t['a']\n", "give a file in the format of SQuAD v1.1"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_squad(case, tmp_path):
    content, named = MALFORMED[case]
    path = tmp_path / "squad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError) as error:
        train_adapters.read_examples(Namespace(heal_on=None, dataset=str(path), with_context=False))
    assert named in str(error.value) and "squad.json" in str(error.value)
