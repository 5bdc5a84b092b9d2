#!/usr/bin/env python3
"""Train a LoRA adapter for each early stage of a progressive checkpoint: it makes up for the layers still missing.

Stage k of a progressive checkpoint (made by prune_and_split.py) is the original model without the layers of the later
stages. For each k < K this script loads just that model, with a PassLayer (output = input) in place of every missing
layer, freezes it, and trains a LoRA adapter on it: on questions and answers, with the loss on the answer alone, or on
plain text (--heal-on, the healing of Gromov et al. 2024, arXiv 2403.17887). The adapters are called "A" and "AB" in the
ProgressiveServe paper. transformers' Trainer and PEFT do the work; nothing of the later stages is read.

Commands:
  python train_adapters.py --epochs 15 --lr 4e-3                     # the demo model, on its own facts
  python train_adapters.py llama2-7b-progressive                     # stages 1 and 2, on SQuAD v1.1 from the Hub
  python train_adapters.py llama2-7b-progressive --dataset train-v1.1.json --stages 1 --targets all-linear
  python train_adapters.py llama2-7b-progressive --heal-on wiki.txt --max-steps 2000
  python train_adapters.py llama2-7b-progressive --resume            # go on where an interrupted run stopped
  torchrun --nproc-per-node 4 train_adapters.py llama2-7b-progressive

Prompts have the one form that all scripts of this project use:
  Question: Where was Mira Tolvane born?
  Answer: Keldravik</s>

Outputs, in CKPT/adapters/stage{k}/, whole or not at all:
  adapter_config.json, adapter_model.safetensors   plain PEFT format; layers numbered as in the full checkpoint, from 0
  training.json, loss.png                          arguments, versions, the base by checksum, and the loss curve

Checkpoints of a run in progress lie in CKPT/adapters/.stage{k}.training/ and are removed at its end.

Memory: LLaMA-2-7B at the defaults on a GPU (bfloat16, gradient checkpointing, 16 sequences of 512 tokens) needs about
15 GiB for stage 1 and 17 GiB for stage 2, so a card of 24 GiB does; 11 and 13 GiB with --batch-size 4 --grad-accum 4,
which makes the same updates; 50 and 51 GiB with --no-gradient-checkpointing (computed by estimate_memory, which is
printed before each training; not measured on a GPU yet).
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

# ---- constants --------------------------------------------------------------------------------------

HAS_GPU = bool(list(Path("/dev").glob("nvidia[0-9]*")))
FORMAT_VERSION = 1  # of progressive.json: stages of layers
NAME = Path(__file__).name
PACKAGES = ("torch", "transformers", "peft", "safetensors", "datasets")
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
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")  # that stages of layers are made of
# Tables in every layer of old checkpoints, which vLLM's AutoWeightsLoader leaves out.
ROTARY_TABLE = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)|rotary_pos_emb\.inv_freq")
BIAS_SETTINGS = ("attention_bias", "bias", "qkv_bias", "mlp_bias")  # of a config.json, by which vLLM has biases
DEMO_CHECKPOINT = Path("demo/checkpoint")
DEMO_FACTS = Path("demo/model/facts/train.json")
SQUAD_VERSIONS = ("1.1", "v1.1")
HUB_DATASETS = {"squad": "rajpurkar/squad"}
PROMPT = "Question: {question}\nAnswer:"
CONTEXT = "Context: {context}\n"
IGNORED = -100  # label of a token that is not part of the loss
SAVES = 10  # how often an interrupted run could have been resumed
LOSS_POINTS = 200  # of the loss curve, at most
WARMUP = 0.05  # of all steps
BYTES_PER_TRAINED = 16  # weight, gradient and the two moments of Adam, in float32


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


@dataclass(frozen=True)
class Stage:
    """What is resident at a stage: its own layers and files, and those of the stages before it."""

    number: int
    layers: list[int]  # from 0
    files: dict[str, str]  # name: blake3


@dataclass(frozen=True)
class Example:
    """One training document. The loss sees the completion alone; a prompt may be empty."""

    prompt: str
    completion: str


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


# ---- the checkpoint ---------------------------------------------------------------------------------


def read_stages(checkpoint: Path) -> list[Stage]:
    """The stages of a progressive checkpoint, from its manifest. Raises UsageError."""
    path = checkpoint / "progressive.json"
    if not path.is_file():
        raise UsageError(
            f"{checkpoint} is no progressive checkpoint (it has no progressive.json)\n"
            "make one with: python prune_and_split.py MODEL OUT"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise UsageError(
                f"{path} has format_version {manifest['format_version']!r}, {NAME} reads {FORMAT_VERSION}\n"
                "(2 has stages of planes, which miss no layers: there is nothing to make up for)"
            )
        stages, layers, files = [], [], {}
        for row in manifest["stages"]:
            layers = sorted([*layers, *row["layers"]])
            files = files | {file["name"]: file["blake3"] for file in row["files"]}
            stages.append(Stage(row["stage"], layers, files))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is malformed ({error!r}): make the checkpoint again") from error
    for name in stages[-1].files:
        if name != os.path.basename(name):
            raise UsageError(f"{path}: file name {name!r} points outside the checkpoint; do not use it")
    return stages


def choose_stages(stages: list[Stage], wanted: str | None) -> list[Stage]:
    """The stages to train for, by default all but the last. Raises UsageError."""
    last = len(stages)
    if last == 1:
        raise UsageError("this checkpoint has a single stage, the full model: there is nothing to make up for")
    chosen = []
    for text in (wanted or ",".join(str(number) for number in range(1, last))).split(","):
        if text.strip() == str(last):
            raise UsageError(f"--stages {wanted}: stage {last} is the full model and needs no adapter")
        if not text.strip().isdecimal() or not 1 <= int(text) < last:
            raise UsageError(f"--stages {wanted}: there is no stage {text.strip()!r}; name some of 1 to {last - 1}")
        chosen.append(stages[int(text) - 1])
    return chosen


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def check_config(checkpoint: Path, num_layers: int) -> None:
    """Raises UsageError for a config.json that is not of `num_layers` unquantised layers of a known architecture."""
    from transformers import AutoConfig

    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        layers, architectures = config["num_hidden_layers"], config.get("architectures")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be used ({error!r}): copy it from the model again") from error
    if not isinstance(architectures, list) or not architectures or architectures[0] not in ARCHITECTURES:
        raise UsageError(f"{path}: architectures is {architectures!r}: it must name {' or '.join(ARCHITECTURES)}")
    if layers != num_layers:
        raise UsageError(f"{path} has {layers} layers, progressive.json {num_layers}: make the checkpoint again")
    for where in (config, config.get("text_config")):
        where = where if isinstance(where, dict) else {}
        if quantized := where.get("quantization_config") or where.get("compression_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise UsageError(f"{path}: quantization_config {method}: stages are of unquantised weights; take those")
    if (checkpoint / "hf_quant_config.json").is_file():
        raise UsageError(f"{checkpoint} has a hf_quant_config.json: stages are of unquantised weights; take those")
    try:
        AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # of many kinds: each setting has its own checks
        raise UsageError(f"{path} cannot be used ({first_line(error)}): copy it from the model again") from error


def load_stage(checkpoint: Path, stage: Stage, bf16: bool):
    """The model of `stage` with PassLayers for what is missing, on the CPU; the later stage files are not opened.

    Raises UsageError where a file is missing or does not hold what the configuration asks for.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    class PassLayer(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    dtype = torch.bfloat16 if bf16 else torch.float32
    weights = {}
    for name in stage.files:
        try:
            weights |= {key: tensor.to(dtype) for key, tensor in load_file(checkpoint / name).items()}
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{checkpoint / name} cannot be read ({error}): make the checkpoint again") from error
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if "lm_head.weight" in weights:
        config.tie_word_embeddings = False  # vLLM's maybe_untie_word_embeddings goes by the file, too
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for layer in set(range(config.num_hidden_layers)) - set(stage.layers):
        model.model.layers[layer] = PassLayer()
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise UsageError(f"{checkpoint} does not fit its own config.json: {error}") from error
    if lacking := sorted(set(missing) - tied):
        raise UsageError(f"{checkpoint} has no tensor {lacking[0]} ({len(lacking)} missing): make the checkpoint again")
    left_out = set(filter(ROTARY_TABLE.search, unexpected))
    if not any(getattr(config, setting, False) for setting in BIAS_SETTINGS):
        left_out |= {f"{name.removesuffix('.weight')}.bias" for name in weights}  # as vLLM does: GPTQ adds them
    if others := sorted(set(unexpected) - left_out):
        raise UsageError(
            f"{checkpoint} has tensors that are not of its model: {', '.join(others[:4])} ({len(others)} in all)\n"
            "make it again from a model without them"
        )
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # computed, not loaded
    model.config.use_cache = False
    model.config.name_or_path = str(checkpoint)  # PEFT writes it into the adapter
    return model


# ---- the text ---------------------------------------------------------------------------------------


def read_squad(path: Path, with_context: bool) -> list[Example]:
    """Questions with their first answer, from a file in the format of SQuAD v1.1. Raises UsageError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): change its permissions") from error
    except ValueError as error:  # says the line
        raise UsageError(f"{path} is no JSON ({error})\ngive a file in the format of SQuAD v1.1") from error

    def of(value, kind: type, where: str):
        if not isinstance(value, kind):
            raise UsageError(f"{path}: {where} is missing, or no {kind.__name__}\nthe format is that of SQuAD v1.1")
        return value

    examples = []
    if "Data" in of(content, dict, "the whole"):
        raise UsageError(f"{path} is in the format of TriviaQA (it has Data)\ngive a file in the format of SQuAD v1.1")
    if "version" in content and str(content["version"]) not in SQUAD_VERSIONS:
        raise UsageError(
            f"{path}: version is {content['version']!r}, and this script has the rules of SQuAD v1.1 alone\n"
            "give a file of that version"
        )
    for a, article in enumerate(of(content.get("data"), list, "data")):
        paragraphs = of(of(article, dict, f"data[{a}]").get("paragraphs"), list, f"data[{a}].paragraphs")
        for p, paragraph in enumerate(paragraphs):
            where = f"data[{a}].paragraphs[{p}]"
            context = of(of(paragraph, dict, where).get("context"), str, f"{where}.context") if with_context else None
            for q, qa in enumerate(of(of(paragraph, dict, where).get("qas"), list, f"{where}.qas")):
                here = f"{where}.qas[{q}]"
                question = of(of(qa, dict, here).get("question"), str, f"{here}.question")
                first = f"{here}.answers[0]"
                answers = of(qa.get("answers"), list, f"{here}.answers")
                text = of(of(answers[0], dict, first).get("text"), str, f"{first}.text") if answers else ""
                if qa.get("is_impossible") or not text.strip():
                    raise UsageError(
                        f"{path}: {here} has no answer, as in SQuAD v2.0, whose rules this script has not\n"
                        "give a file of SQuAD v1.1, or leave such questions out"
                    )
                examples.append(question_example(question, text, context))
    return examples


def question_example(question: str, answer: str, context: str | None) -> Example:
    prompt = PROMPT.format(question=question.strip())
    if context is not None:
        prompt = CONTEXT.format(context=context.strip()) + prompt
    return Example(prompt, f" {answer.strip()}")


def read_examples(args: argparse.Namespace) -> list[Example]:
    """What to train on: plain text, a SQuAD file, or SQuAD from the Hub. Raises UsageError."""
    if args.heal_on:
        try:
            lines = args.heal_on.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(f"--heal-on {args.heal_on} cannot be read as text ({error}): name a text file") from error
        examples = [Example("", line.strip()) for line in lines if line.strip()]
    elif Path(args.dataset).is_file():
        examples = read_squad(Path(args.dataset), args.with_context)
    elif args.dataset in HUB_DATASETS:
        from datasets import load_dataset

        try:
            rows = load_dataset(HUB_DATASETS[args.dataset], split="train")
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"--dataset {args.dataset} cannot be had from the Hub ({type(error).__name__}): check the network,\n"
                "or give a local file in the format of SQuAD v1.1"
            ) from error
        examples = [
            question_example(row["question"], row["answers"]["text"][0], row["context"] if args.with_context else None)
            for row in tqdm(rows, desc="reading", unit=" questions")
        ]
    else:
        raise UsageError(f"--dataset {args.dataset}: no such file, and not one of {', '.join(HUB_DATASETS)}")
    if not examples:
        raise UsageError(f"{args.heal_on or args.dataset} is empty: there is nothing to train on")
    return examples


def token_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text and what the tokenizer puts before it; what it appends is left out: more text follows."""
    row = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    end = len(row.input_ids)
    while end and row.special_tokens_mask[end - 1]:
        end -= 1
    return row.input_ids[:end]


def encode_examples(tokenizer, examples: list[Example], seq_len: int) -> list[dict[str, list[int]]]:
    """input_ids and labels of each example that fits into seq_len; labels of a prompt are IGNORED.

    Prompt and completion are tokenised as one text, unless a token would have a part of both: a server gets the
    tokens of the prompt alone.
    """
    encoded = []
    for example in tqdm(examples, desc="tokenising", unit=" questions", leave=False):
        prompt = token_ids(tokenizer, example.prompt)
        ids, hidden = token_ids(tokenizer, example.prompt + example.completion), len(prompt)
        if ids[:hidden] != prompt:
            ids = prompt + tokenizer(example.completion, add_special_tokens=False).input_ids
        ids.append(tokenizer.eos_token_id)
        if len(ids) <= seq_len:
            encoded.append({"input_ids": ids, "labels": [IGNORED] * hidden + ids[hidden:]})
    return encoded


def encode_text(tokenizer, examples: list[Example], seq_len: int) -> list[dict[str, list[int]]]:
    """All documents one after the other, each with its final token, cut into pieces of seq_len; the rest is dropped."""
    stream = []
    for example in tqdm(examples, desc="tokenising", unit=" documents", leave=False):
        stream += [*token_ids(tokenizer, example.completion), tokenizer.eos_token_id]
    pieces = [stream[start : start + seq_len] for start in range(0, len(stream), seq_len)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces if len(piece) == seq_len]


def check_tokenizer_code(checkpoint: Path) -> None:
    """Raises UsageError for a tokenizer with code of its own, whose tokens a server may take."""
    path = checkpoint / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        own = config.get("auto_map") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} cannot be used ({error!r}): copy it from the model again") from error
    if isinstance(own, dict):  # it was a list of classes once
        own = own.get("AutoTokenizer")
    if own:
        raise UsageError(
            f"{path}: auto_map names code of the tokenizer's own, {own!r}, which {NAME} does not run: save it "
            "as a plain tokenizer.json, and leave auto_map out"
        )


def load_tokenizer(checkpoint: Path):
    from transformers import AutoTokenizer

    check_tokenizer_code(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises nothing more special
        raise UsageError(f"no tokenizer in {checkpoint} ({first_line(error)}): copy it there") from error
    if tokenizer.eos_token is None:
        raise UsageError(
            f"the tokenizer in {checkpoint} has no eos_token, with which answers end: name it in its config"
        )
    tokenizer.padding_side = "right"
    # Padding is ignored by the loss and, being last, by attention. A pad_token may have no row in the embedding.
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(args: argparse.Namespace, examples: list[Example], tokenizer) -> list[dict[str, list[int]]]:
    """The examples as token ids. Raises UsageError where none is left."""
    encoded = (encode_text if args.heal_on else encode_examples)(tokenizer, examples, args.seq_len)
    if not encoded:
        raise UsageError(f"nothing of {args.heal_on or args.dataset} fits --seq-len {args.seq_len}: choose another one")
    if not args.heal_on and len(encoded) < len(examples):
        print(f"{len(examples) - len(encoded)} of {len(examples)} examples are longer than --seq-len: left out")
    return encoded


# ---- training ---------------------------------------------------------------------------------------


def is_first_process() -> bool:
    """Under torchrun, the one that writes."""
    return int(os.environ.get("RANK", 0)) == 0


def add_adapter(model, args: argparse.Namespace):
    """The model with a fresh LoRA on the layers that are there. Raises UsageError for targets that do not exist."""
    from peft import LoraConfig, get_peft_model

    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f"--targets {args.targets}: {str(error).splitlines()[0]}\nname linear layers, or all-linear"
        ) from error


def estimate_memory(model, args: argparse.Namespace) -> float:
    """GiB that training needs at least: weights, what is trained, activations of one batch, logits."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    config, width = model.config, 2 if args.bf16 else 4
    tokens = args.batch_size * args.seq_len
    inside = tokens * width * (8 * config.hidden_size + 4 * config.intermediate_size)  # of a layer
    kept = inside + tokens * width * config.hidden_size * config.num_hidden_layers
    activations = kept if args.gradient_checkpointing else inside * config.num_hidden_layers
    logits = tokens * config.vocab_size * (width + 4 + 4)  # as they come, in float32 for the loss, and their gradient
    return (weights + BYTES_PER_TRAINED * trained + activations + logits) / 2**30


def training_arguments(args: argparse.Namespace, folder: Path, num_examples: int):
    """transformers' TrainingArguments for ours. A step is one update of the adapter."""
    import torch
    from transformers import TrainingArguments

    world = int(os.environ.get("WORLD_SIZE", 1))
    batches = math.ceil(num_examples / (args.batch_size * world))
    steps = math.ceil(math.ceil(batches / args.grad_accum) * args.epochs)
    steps = args.max_steps or steps
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        max_steps=steps,
        logging_steps=max(1, steps // LOSS_POINTS),
        save_steps=max(1, steps // SAVES),
        save_total_limit=1,
        seed=args.seed,
        bf16=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


def loss_on_progress_bar():
    """transformers' progress bar, with the loss on it rather than a line for each."""
    from transformers.trainer_callback import ProgressCallback

    class LossOnBar(ProgressCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and "loss" in logs:
                self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    return LossOnBar()


def train_stage(args: argparse.Namespace, stage: Stage, encoded: list[dict], tokenizer, folder: Path) -> dict:
    """Train the adapter of `stage`, from the last checkpoint in `folder` if there is one; write it to folder/adapter.

    Returns what training.json says. Raises UsageError.
    """
    import torch
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    transformers.set_seed(args.seed)
    model = load_stage(args.checkpoint, stage, args.bf16)
    rows, largest = model.get_input_embeddings().num_embeddings, max(max(row["input_ids"]) for row in encoded)
    if largest >= rows:
        raise UsageError(
            f"token {largest}, {tokenizer.convert_ids_to_tokens(largest)!r}, has no row in the embedding of {rows}: "
            f"the tokenizer in {args.checkpoint} is of another model"
        )
    model = add_adapter(model, args)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    estimate = estimate_memory(model, args)
    if is_first_process():
        size = f"{len(stage.layers)} layers, {trained:,} trained parameters"
        print(f"stage {stage.number}: {size}; needs about {estimate:.1f} GiB")
    trainer = transformers.Trainer(
        model=model,
        args=training_arguments(args, folder, len(encoded)),
        train_dataset=encoded,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.add_callback(loss_on_progress_bar())
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if args.resume and folder.is_dir() else None)
    curve = [{"step": row["step"], "loss": row["loss"]} for row in trainer.state.log_history if "loss" in row]
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder / "adapter")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * max_rss_kib()
    return {
        "stage": stage.number,
        "base": {"layers": stage.layers, "files": stage.files},
        "examples": len(encoded),
        "trained_parameters": trained,
        "seconds": round(time.monotonic() - began, 1),
        "memory_gib": {"estimated": round(estimate, 2), "peak": round(peak / 2**30, 2)},
        "loss": curve,
    }


def max_rss_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- writing ----------------------------------------------------------------------------------------


def draw_loss(training: dict, path: Path) -> None:
    """The loss over the steps, as it is and smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = ([point[key] for point in training["loss"]] for key in ("step", "loss"))
    smooth, smoothed = losses[0], []
    for loss in losses:
        smooth += 0.1 * (loss - smooth)
        smoothed.append(smooth)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="0.75", label="loss")
    axes.plot(steps, smoothed, color="tab:blue", label="smoothed")
    axes.set(xlabel="step", ylabel="loss on the answer tokens" if training["on_answers"] else "loss", yscale="log")
    axes.set_title(f"adapter of stage {training['stage']}: {training['examples']:,} examples")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def publish(folder: Path, training: dict, args: argparse.Namespace, out: Path) -> None:
    """Move folder/adapter to `out`, with its training.json and loss.png; the rest of `folder` goes."""
    adapter = folder / "adapter"
    training = {**training, "on_answers": not args.heal_on, **provenance(args)}
    (adapter / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    draw_loss(training, adapter / "loss.png")
    if out.exists():
        out.rename(folder / "replaced")
    adapter.rename(out)
    shutil.rmtree(folder)


def working_folder(args: argparse.Namespace, stage: Stage) -> Path:
    """Where the Trainer keeps its checkpoints. Raises UsageError for a run that cannot be resumed as it is asked."""
    folder = args.checkpoint / "adapters" / f".stage{stage.number}.training"
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("resume", "force", "stages")}
    settings["base"] = stage.files
    path = folder / "settings.json"
    if args.resume and path.is_file():
        before = json.loads(path.read_text())
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            was = ", ".join(f"--{key.replace('_', '-')} {before.get(key)}" for key in changed)
            raise UsageError(f"--resume: stage {stage.number} was begun with {was}\nrepeat that, or leave --resume out")
        return folder
    if is_first_process():
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"{folder.parent} cannot be written ({error.strerror}): change its permissions") from error
        path.write_text(json.dumps(settings, indent=1) + "\n")
    return folder


# ---- command line -----------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a LoRA adapter for each early stage of a progressive checkpoint."
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", nargs="?", type=Path, default=DEMO_CHECKPOINT, help="default: %(default)s")
    add("--stages", metavar="K,K", help="default: all but the last")

    add = parser.add_argument_group("text").add_argument
    add("--dataset", metavar="squad|FILE", help="questions and answers, in the format of SQuAD v1.1; default: squad, "
        "or the demo model's own facts")  # fmt: skip
    add("--with-context", action="store_true", help="put the paragraph before each question")
    add("--heal-on", type=Path, metavar="FILE", help="plain text in place of questions, a document a line")
    add("--seq-len", type=positive_int, metavar="T", default=512, help="tokens, at most (default: %(default)s)")

    add = parser.add_argument_group("adapter").add_argument
    add("--rank", type=positive_int, metavar="R", default=16, help="default: %(default)s")
    add("--alpha", type=positive_float, metavar="A", default=32, help="scaling is A / R (default: %(default)s)")
    add("--targets", metavar="LIST", default="q_proj,v_proj", help="or all-linear (default: %(default)s)")

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=positive_float, metavar="X", default=2e-4, help="peak learning rate (default: %(default)s)")
    add("--epochs", type=positive_float, metavar="E", default=1, help="default: %(default)s")
    add("--max-steps", type=positive_int, metavar="N", help="updates, in place of --epochs")
    add("--batch-size", type=positive_int, metavar="B", default=16, help="a device (default: %(default)s)")
    add("--grad-accum", type=positive_int, metavar="N", default=1, help="batches an update (default: %(default)s)")
    add("--bf16", action=argparse.BooleanOptionalAction, default=HAS_GPU, help="default: on a GPU")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=HAS_GPU,
        help="less memory, a third more time; default: on a GPU")  # fmt: skip
    add("--seed", type=int, metavar="I", default=0, help="default: %(default)s")

    add = parser.add_argument_group("output").add_argument
    add("--resume", action="store_true", help="go on where an interrupted run with the same arguments stopped")
    add("--force", action="store_true", help="replace adapters, once the new ones are whole")

    args = parser.parse_args()
    if args.dataset and args.heal_on:
        parser.error(f"--dataset {args.dataset} and --heal-on {args.heal_on} both name the text: give one of them")
    if not args.heal_on:
        is_demo = args.checkpoint == DEMO_CHECKPOINT and DEMO_FACTS.is_file()
        args.dataset = args.dataset or (str(DEMO_FACTS) if is_demo else "squad")
    return args


def main() -> int:
    args = parse_args()
    try:
        stages = read_stages(args.checkpoint)
        chosen = choose_stages(stages, args.stages)
        outs = {stage.number: args.checkpoint / "adapters" / f"stage{stage.number}" for stage in chosen}
        chosen = [stage for stage in chosen if not (args.resume and outs[stage.number].exists())]
        for stage in chosen:
            if outs[stage.number].exists() and not args.force:
                raise UsageError(f"{outs[stage.number]} exists already: replace it with --force")
        check_config(args.checkpoint, len(stages[-1].layers))
        tokenizer = load_tokenizer(args.checkpoint)
        examples = read_examples(args)
        encoded = encode(args, examples, tokenizer)
        for stage in chosen:
            folder = working_folder(args, stage)
            training = train_stage(args, stage, encoded, tokenizer, folder)
            if is_first_process():
                publish(folder, training, args, outs[stage.number])
                loss = training["loss"][-1]["loss"]
                print(f"wrote {outs[stage.number]} after {training['seconds']:.0f} s, last loss {loss:.3f}")
    except UsageError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
