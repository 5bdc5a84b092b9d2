"""Turn a LLaMA checkpoint into a progressive checkpoint: the same weights, ordered by when a cold start needs them.

A server that starts waits for bytes. So the checkpoint is cut into stages: stage 1 is a model that already answers, the
original without one block of layers; stages 2..K bring the missing layers back in order. Which block is missed least is
measured by the angular distance between the residual stream before and after it (Gromov et al. 2024, arXiv 2403.17887),
for every start and size in one pass over the model. No weight is changed: the output is an ordinary Hugging Face
checkpoint that `from_pretrained` and `vllm serve` load as it is, and equals the source bit for bit.

With --planes the stages are of precision: every matrix comes at few bits first, and the missing bits follow, exactly.
A weight is [exponent code, 4 bits | sign | mantissa]; codes count from a base exponent of each chunk of 2^18 weights,
and crowd, so that zstd stores a symbol [sign | code | mantissa, at most 3 bits] in about 4.5 bits. Weights of other
exponents, zeros and NaN among them, are escapes: position and exact value. Mantissa bits that no symbol has follow as
fields of 8, 4, 2 or 1 bits, planar: the lowest bits of all bytes belong to the first weights, and so on. Bits that are
not there yet stand at their middle. All of a matrix that a stage brings is one tensor of bytes, see read_record().

Commands:
  python demo/train_demo_llama.py && python prune_and_split.py                    # (re)makes demo/checkpoint
  python prune_and_split.py meta-llama/Llama-2-7b-hf llama2-7b-progressive        # score, print the plan, write
  python prune_and_split.py meta-llama/Llama-2-7b-hf --plan-only                  # score and print, write nothing
  python prune_and_split.py ./Llama-2-7b-hf out --layers 20-27                    # the paper's "layers 21-28", by hand
  python prune_and_split.py --synthetic llama2-7b out                             # random weights, to time cold starts
  python prune_and_split.py ./Llama-2-7b-hf out --planes --calibration text.txt   # stages of precision, measured
  python prune_and_split.py Qwen/Qwen3-8B out --planes                            # ... of any model, not measured
  python prune_and_split.py --restore out Qwen3-8B-again                          # ... and back, bit for bit

Layers are numbered from 0, as in the checkpoint (`model.layers.N`); the paper counts from 1.

Outputs, in OUT:
  model-stage1.safetensors ... model-stageK.safetensors   tensors in forward order, data from byte 4096 x n on
  model.safetensors.index.json                            the Hugging Face index over those files
  progressive.json                                        the manifest: stages, files with blake3, pruning, source
  pruning/mergekit.yaml                                   stage 1 as mergekit slices, for those who come from PruneMe
  pruning/angular_distance.csv, .png                      the scores, where layers were scored
  config.json, tokenizer files, ...                       copied untouched

With --planes there is no index and no pruning/; the manifest has what --restore needs. With --calibration there is
planes/perplexity.csv, .png: the perplexity of each stage, and of stages of layers, against their share of the bytes.
The manifest has the perplexity of each stage of planes, if it was measured, and the error of its weights: the server
goes by them in choosing the first stage that may answer, which is printed at the end.

OUT appears whole, by a rename at the very end. Until then everything is in its hidden sibling `.OUT.partial`; what a
killed run leaves there is removed by the next run. One layer, or matrix, is in memory at a time.
"""

import argparse
import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import yaml
import zstandard
from blake3 import blake3
from safetensors import safe_open
from tqdm import tqdm

# ---- constants --------------------------------------------------------------------------------------

VERSION = "0.1.0"
FORMAT_VERSIONS = {"layers": 1, "planes": 2}  # of progressive.json, by kind of stages
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

DEMO_MODEL, DEMO_CHECKPOINT, DEMO_PLANES = Path("demo/model"), Path("demo/checkpoint"), Path("demo/planes")
DEMO_CALIBRATION = DEMO_MODEL / "facts/calibration.txt"
HUB_CALIBRATION = "Salesforce/wikitext:wikitext-2-raw-v1:validation"

ALIGNMENT = 4096  # bytes; the block size that O_DIRECT asks for at most
MAX_LOSS = 5.0  # percent of perplexity, unless --max-loss is given: about what 4-bit weights cost, which people accept
MAX_WEIGHT_ERROR = 0.03  # of the weights' norm, where no perplexity was measured: 3 mantissa bits reach it, 2 do not
ERROR_SAMPLE = 8  # the error of planes is looked at in one chunk of so many
CHUNK_BYTES = 1 << 20  # per read: what is hashed next is still in the core's L2 cache
SEND_BYTES = 64 << 20  # per sendfile call
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
DEFAULT_PLANES = "1,2,rest"
ENOUGH_TOKENS = 10_000  # of calibration: they tell a stage's loss of perplexity to about 1 %
TOO_FEW = f": too few to go by; give {ENOUGH_TOKENS:,} or more, about 100 paragraphs"
LEFT_NAMED = 8  # of the files that are left behind
MIN_DOCUMENT_TOKENS = 8  # what is shorter is a heading or a stray line
FORWARD_BATCH_TOKENS = 2048  # the MLP's intermediate activations are then 60 MB each in LLaMA-3-8B

# The order in which a decoder layer's forward pass meets its modules.
LAYER_MODULES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # safetensors' names: torch's names
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
INDEX = "model.safetensors.index.json"
MISTRAL_WEIGHTS = "consolidated*.safetensors"  # which vLLM prefers to any other (0.32: default_loader.py:164)
OURS = ("progressive.json", "adapters", "pruning", "planes")  # what a progressive checkpoint has beside the model
QUANTIZED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # where vLLM looks beside config.json
# Tables in every layer of old checkpoints, which vLLM's AutoWeightsLoader leaves out.
ROTARY_TABLE = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)|rotary_pos_emb\.inv_freq")
LOCK = ".lock"
HELP_DETAILS = f"""\
TEXT     scores the layers. FILE: plain text, a document a line. DATASET: a Hub
         id ORG/NAME[:CONFIG[:SPLIT]] with a column `text`. A sample is a
         document, in order, cut to --seq-len; its final token counts. Default:
         {HUB_CALIBRATION};
         the demo model brings its own. With --layers or --synthetic, layers
         are scored only where --calibration is given. With --planes and
         --calibration the perplexity of each stage is measured on it;
         {ENOUGH_TOKENS:,} tokens are enough, about 100 paragraphs.
SHAPE    tinyllama-1.1b, llama3.2-3b, llama2-7b, llama2-13b or llama3-8b, to
         time cold starts; unscored, the block ends just before the last layer,
         but that of llama2-7b is the paper's (20-27 from 0).
"""

# Published shapes. Llama 3.2's 131072 positions come from rope scaling of 8192; the weights do not depend on it.
SYNTHETIC_SHAPES = {
    "tinyllama-1.1b": dict(
        num_hidden_layers=22, hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048, rope_theta=1e4, tie_word_embeddings=False,
    ),
    "llama3.2-3b": dict(
        num_hidden_layers=28, hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, rope_theta=5e5, tie_word_embeddings=True,
    ),
    "llama2-7b": dict(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=32000, max_position_embeddings=4096, rope_theta=1e4, tie_word_embeddings=False,
    ),
    "llama2-13b": dict(
        num_hidden_layers=40, hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_key_value_heads=40,
        vocab_size=32000, max_position_embeddings=4096, rope_theta=1e4, tie_word_embeddings=False,
    ),
    "llama3-8b": dict(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, rope_theta=5e5, tie_word_embeddings=False,
    ),
}  # fmt: skip
PAPER_BLOCKS = {("llama2-7b", 8): (20, 27)}  # shape, layers pruned: the first and the last, its "layers 21-28"
SYNTHETIC_STD = 0.02  # LLaMA's initializer_range
SYNTHETIC_POOL = (1 << 25) + 1  # values; odd, so that a matrix longer than the pool repeats no row
SYNTHETIC_UNKNOWN, SYNTHETIC_BOS, SYNTHETIC_EOS = "?", "<s>", "</s>"  # ids 0, 1, 2
SYNTHETIC_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


# ---- data classes -----------------------------------------------------------------------------------


class UsageError(Exception):
    """Bad input: the message names the value and the way out. Scripts exit with code 2."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's bytes are. `dtype` is safetensors' name; `offset` counts from the start of the file `path`."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path | None = None
    offset: int = 0


@dataclass(frozen=True)
class Pruning:
    """The block of layers that stage 1 leaves out, first to last included, and where it comes from."""

    method: str  # angular_distance, manual or fixed
    first: int
    last: int
    distances: np.ndarray | None = None  # [num_layers + 1, num_layers + 1], see score_blocks
    calibration: dict | None = None

    @property
    def angular_distance(self) -> float | None:
        return None if self.distances is None else float(self.distances[self.first, self.last + 1])


@dataclass(frozen=True)
class Stage:
    """What a manifest row is made from: the layers a stage adds, and the tensors of its files in forward order."""

    number: int
    layers: list[int]
    files: dict[str, list[str]]  # file name: tensor names
    nbytes: int  # tensor data, without headers


class Checkpoint:
    """A Hugging Face folder of safetensors: read with pread, because the pages of a memory map count as resident."""

    def __init__(self, folder: Path, name: str, any_architecture: bool = False):
        """Check every file before any work is done. Raises UsageError.

        any_architecture: the model need not be of the LLaMA family, as it has to be where layers will be left out.
        """
        self.folder, self.name = folder, name
        self.config = read_config(folder, any_architecture)
        check_names(folder)
        self.weight_files = list_weight_files(folder)
        self.tensors: dict[str, Tensor] = {}
        for path in self.weight_files:
            tensors = read_header(path)
            if twice := sorted(self.tensors.keys() & tensors.keys()):
                first = self.tensors[twice[0]].path
                raise UsageError(f"{twice[0]} is in {first} and in {path.name}: move away the file that is stale")
            self.tensors |= tensors
        if self.config["architectures"][0] in SUPPORTED_ARCHITECTURES:
            check_tensors(self)
        check_shapes(self)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The tensor's bytes [start, stop), in order; a chunk is valid until the next one is asked for."""
        tensor = self.tensors[name]
        stop = tensor.nbytes if stop is None else stop
        buffer = memoryview(bytearray(min(CHUNK_BYTES, stop - start)))
        with tensor.path.open("rb", buffering=0) as file:
            while start < stop:
                try:
                    got = os.preadv(file.fileno(), [buffer[: stop - start]], tensor.offset + start)
                except OSError as error:
                    raise UsageError(f"{tensor.path} cannot be read ({error.strerror}): copy it again") from error
                if got == 0:
                    raise UsageError(f"{tensor.path} became shorter while it was read: restore it and run again")
                yield buffer[:got]
                start += got

    def send(self, name: str, out) -> None:
        """Append the tensor to the open file `out`, inside the kernel: the bytes never pass through this process."""
        tensor, sent = self.tensors[name], 0
        with tensor.path.open("rb", buffering=0) as file:
            while sent < tensor.nbytes:
                count = min(SEND_BYTES, tensor.nbytes - sent)
                try:
                    got = os.sendfile(out.fileno(), file.fileno(), tensor.offset + sent, count)
                except OSError:  # of a file system that cannot: GPFS says EINVAL, Lustre ENODATA
                    for chunk in self.chunks(name, sent):
                        write_all(out, chunk)
                    return
                if got == 0:
                    raise UsageError(f"{tensor.path} became shorter while it was read: restore it and run again")
                sent += got

    def copy_side_files(self, folder: Path) -> None:
        """Copy config, tokenizer, templates, code, licence: all that is not weights, untouched."""
        copy_side_files(self.folder, folder, self.weight_files)

    def load_tokenizer(self):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # a damaged file raises whatever its reader runs into
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise UsageError(f"no tokenizer in {self.folder} ({reason}): add it, or choose --layers") from error


class SyntheticModel:
    """Random bfloat16 weights of a published shape, made while they are read: the same interface as Checkpoint."""

    def __init__(self, shape: str, seed: int):
        """`seed` decides every weight. Normals are drawn once, into a pool; a tensor is the pool read in a circle from
        a place of its own, so that 13.5 GB come at the speed of a copy rather than of a random generator."""
        self.name, self.seed, self.weight_files = shape, seed, []
        self.config = SYNTHETIC_SHAPES[shape] | dict(
            architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rms_norm_eps=1e-5,
            attention_bias=False, mlp_bias=False, bos_token_id=1, eos_token_id=2, initializer_range=SYNTHETIC_STD,
            use_cache=True, torch_dtype="bfloat16",
        )  # fmt: skip
        self.tensors = {name: Tensor("BF16", size, 2 * math.prod(size)) for name, size in self._shapes()}
        generator = np.random.default_rng(zlib.crc32(f"{seed}".encode()))
        normals = generator.standard_normal(SYNTHETIC_POOL, dtype=np.float32) * np.float32(SYNTHETIC_STD)
        self._pool = memoryview((normals.view(np.uint32) >> 16).astype(np.uint16)).cast("B")  # bfloat16 by truncation
        self._ones = memoryview(np.full(self.config["hidden_size"], 0x3F80, np.uint16)).cast("B")  # bfloat16 1.0

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, mlp, vocab = (self.config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
        kv = hidden // self.config["num_attention_heads"] * self.config["num_key_value_heads"]
        out_in = [(hidden,), (hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (hidden,)]
        out_in += [(mlp, hidden), (mlp, hidden), (hidden, mlp)]
        yield "model.embed_tokens.weight", (vocab, hidden)
        for layer in range(self.config["num_hidden_layers"]):
            for module, shape in zip(LAYER_MODULES, out_in, strict=True):
                yield f"model.layers.{layer}.{module}.weight", shape
        yield "model.norm.weight", (hidden,)
        if not self.config["tie_word_embeddings"]:
            yield "lm_head.weight", (vocab, hidden)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The tensor's bytes [start, stop), in order."""
        stop = self.tensors[name].nbytes if stop is None else stop
        if len(self.tensors[name].shape) == 1:
            yield self._ones[start:stop]
            return
        origin = zlib.crc32(f"{self.seed} {name}".encode()) % SYNTHETIC_POOL * 2
        while start < stop:
            place = (origin + start) % len(self._pool)
            chunk = self._pool[place : place + min(CHUNK_BYTES, stop - start)]
            yield chunk
            start += len(chunk)

    def send(self, name: str, out) -> None:
        """Append the tensor to the open file `out`."""
        for chunk in self.chunks(name):
            write_all(out, chunk)

    def copy_side_files(self, folder: Path) -> None:
        """Write config.json, generation_config.json and a tokenizer of which every entry is visible text."""
        generation = {key: self.config[key] for key in ("bos_token_id", "eos_token_id")}
        tokenizer = dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=SYNTHETIC_BOS, eos_token=SYNTHETIC_EOS,
            model_max_length=self.config["max_position_embeddings"], clean_up_tokenization_spaces=False,
            chat_template=SYNTHETIC_CHAT_TEMPLATE,
        )  # fmt: skip
        write_json(folder / "config.json", self.config)
        write_json(folder / "generation_config.json", generation)
        write_json(folder / "tokenizer_config.json", tokenizer)
        build_synthetic_tokenizer(self.config["vocab_size"]).save(str(folder / "tokenizer.json"))

    def load_tokenizer(self):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=build_synthetic_tokenizer(self.config["vocab_size"]))


class AtStage:
    """A source at the precision of a stage of planes: the same interface, as far as reading goes."""

    def __init__(self, source: Checkpoint | SyntheticModel, bits: list[int | str], stage: int, coded: set[str]):
        """coded: names of the matrices that the stages bring in parts."""
        self.source, self.bits, self.stage, self.coded = source, bits, stage, coded
        self.name, self.config, self.tensors = source.name, source.config, source.tensors

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The tensor's bytes [start, stop), in order."""
        tensor = self.tensors[name]
        stop = tensor.nbytes if stop is None else stop
        if name not in self.coded:
            yield from self.source.chunks(name, start, stop)
            return
        pattern, mantissa = FLOATS[tensor.dtype]
        known, size = known_bits(self.bits, mantissa), CHUNK_WEIGHTS * np.dtype(pattern).itemsize
        for begin in range(start // size * size, stop, size):
            end = min(begin + size, tensor.nbytes)
            weights = load_bytes(self.source, name, begin, end).view(pattern)
            base, parts = split_chunk(weights, mantissa, known)
            joined = np.empty_like(weights)
            join_chunk(joined, base, list(itertools.chain(*parts[: self.stage])), mantissa, known[: self.stage])
            yield memoryview(joined).cast("B")[max(0, start - begin) : stop - begin]


Source = Checkpoint | SyntheticModel | AtStage


# ---- reading and checking the source ----------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))  # with a byte order mark transformers refuses it, too
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error}): download the checkpoint again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object: download the checkpoint again")
    return content


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_all(file, data: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def read_config(folder: Path, any_architecture: bool) -> dict:
    """config.json of a checkpoint, of the LLaMA family unless any_architecture. Raises UsageError for another."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: MODEL must be a Hugging Face checkpoint folder")
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise UsageError(f"{folder / 'config.json'} names no architectures: add [{SUPPORTED_ARCHITECTURES[0]!r}], say")
    if architectures[0] not in SUPPORTED_ARCHITECTURES and not any_architecture:
        raise UsageError(
            f"architecture {architectures[0]} in {folder / 'config.json'} is not supported:\n"
            f"choose a checkpoint of {' or '.join(SUPPORTED_ARCHITECTURES)}, or --planes, which take any"
        )
    for where in (config, config.get("text_config")):
        where = where if isinstance(where, dict) else {}
        if quantized := where.get("quantization_config") or where.get("compression_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise UsageError(
                f"{folder / 'config.json'}: quantization_config {method}: stages are of unquantised weights; take those"
            )
    for name in QUANTIZED:
        if (folder / name).is_file():
            raise UsageError(f"{folder} has a {name}: stages are of unquantised weights; take those")
    if not isinstance(config.get("num_hidden_layers"), int):
        raise UsageError(f"{folder / 'config.json'} names no num_hidden_layers: download the checkpoint again")
    return config


def check_names(folder: Path) -> None:
    """Raises UsageError where something of the model has a name that the checkpoint gives to something else."""
    if (folder / "progressive.json").is_file():  # it is a checkpoint of ours, whose additions stay behind
        return
    for name in OURS:
        if (folder / name).exists():
            raise UsageError(f"{folder / name} would be taken for the checkpoint's own {name}: rename it")


def list_weight_files(folder: Path) -> list[Path]:
    """The safetensors files that vLLM would load, checked to be there. Raises UsageError."""
    files, index = sorted(folder.glob("*.safetensors")), folder / INDEX
    if of_mistral := sorted(folder.glob(MISTRAL_WEIGHTS)):
        others = [path.name for path in files if path not in of_mistral] or ["weights in transformers' format"]
        raise UsageError(
            f"{folder} has {of_mistral[0].name}, which vLLM would load rather than {others[0]}:\n"
            "move one of them away; stages are made of the latter"
        )
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UsageError(f"{index} names no files: download it again, or remove it")
        for name in map(str, weight_map.values()):
            if name != os.path.basename(name) or not (folder / name).is_file():
                raise UsageError(f"{index} names {name}, which is not in {folder}: download the missing shard")
        return [folder / name for name in sorted(set(weight_map.values()))]
    if files:
        return files
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise UsageError(
            f"{folder} has pickled weights only ({pickles[0]}): convert it to safetensors first,\n"
            "with transformers: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(NEW)"
        )
    raise UsageError(f"{folder} has neither model.safetensors nor {index.name}: download the weights")


def is_side_file(name: str) -> bool:
    """Whether a file of a model's folder, named from there, is neither weights nor hidden: it goes along with them."""
    return not name.endswith(WEIGHT_SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))


def walk(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """What lies below a folder and is no folder. Links are followed, unless they lead back to where they lie."""
    above |= {inode_of(folder)}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and inode_of(path) not in above:
            yield from walk(path, above)
        else:
            yield path


def inode_of(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


def copy_side_files(source: Path, folder: Path, weights: Collection[Path]) -> None:
    """Copy what goes along with the weights of a model, with its folders, and say which other files are left behind.

    What this project has added to a checkpoint stays with that; other checkpoints below the source are none of it.
    """
    ours = OURS if (source / "progressive.json").is_file() else ()
    paths, left = list(walk(source)), []
    others = {path.parent for path in paths if path.name == "progressive.json"} - {source}
    for path in paths:
        name = path.relative_to(source)
        if name.parts[0] in ours or others.intersection(path.parents):
            continue
        if is_side_file(name.as_posix()) and path.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        elif path not in weights and path.name != INDEX:
            left.append(next((part for part in name.parts if part.startswith(".")), name.as_posix()))
    if left:
        names = list(dict.fromkeys(left))
        more = f" and {len(names) - LEFT_NAMED} more" if len(names) > LEFT_NAMED else ""
        print(f"left behind: {', '.join(names[:LEFT_NAMED])}{more}")


def read_header(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name. Raises UsageError unless the file is as long as its header says."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            raw = file.read(min(header_bytes, MAX_HEADER_BYTES))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if len(raw) < header_bytes:
        raise UsageError(f"{path} is truncated or no safetensors file ({size} bytes): download it again")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        data = 8 + header_bytes
        tensors = {
            name: Tensor(row["dtype"], tuple(row["shape"]), end - begin, path, data + begin)
            for name, row in header.items()
            for begin, end in [row["data_offsets"]]
        }
        expected = data + max(row["data_offsets"][1] for row in header.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} has a damaged safetensors header: download it again") from error
    if size != expected:
        raise UsageError(f"{path} has {size} bytes where its header says {expected}: download it again")
    return tensors


def check_tensors(source: Checkpoint) -> None:
    """Raises UsageError unless the weights are those that config.json promises, in a dtype that stays as it is."""
    num_layers = source.config["num_hidden_layers"]
    layers = {layer_of(name) for name in source.tensors} - {None}
    if layers and max(layers) >= num_layers:
        raise UsageError(
            f"{source.folder} has weights of layer {max(layers)}, but config.json num_hidden_layers={num_layers}:\n"
            "config and weights must be of one model"
        )
    count = min(num_layers, len(layers) + 1)  # the first that is missing tells enough, however many there should be
    expected = {f"model.layers.{layer}.{module}.weight" for layer in range(count) for module in LAYER_MODULES}
    for part, setting in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")):
        modules = [module for module in LAYER_MODULES if module.startswith(part) and source.config.get(setting)]
        expected |= {f"model.layers.{layer}.{module}.bias" for layer in range(count) for module in modules}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    expected |= set() if source.config.get("tie_word_embeddings", False) else {"lm_head.weight"}
    missing = sorted(expected - source.tensors.keys())
    if missing:
        raise UsageError(
            f"{source.folder} has no tensor {missing[0]} ({len(missing)} missing), though its config.json\n"
            f"asks for it with num_hidden_layers={num_layers}: config and weights must be of one model"
        )
    for name in sorted(source.tensors.keys() - expected - {"lm_head.weight"}):  # biases are known to vLLM, or ignored
        if not name.endswith(".bias") and not ROTARY_TABLE.search(name):
            raise UsageError(f"{name} is no weight of a {source.config['architectures'][0]}: convert the model first")
    for name in sorted(expected):
        check_dtype(name, source.tensors[name], DTYPES)


def check_dtype(name: str, tensor: Tensor, known: Collection[str]) -> None:
    """Raises UsageError for numbers that are no weights as they are, such as those of a quantised model."""
    if tensor.dtype not in known:
        raise UsageError(f"{name} is stored as {tensor.dtype}: choose a checkpoint in {', '.join(DTYPES.values())}")


def check_shapes(source: Checkpoint) -> None:
    """Raises UsageError for weights in integers, and for a shape that is not what config.json says, where it is known.

    vLLM asserts the shapes while it loads, without a word. The rows of the embedding hold for any architecture.
    """
    config = source.config.get("text_config")
    config = config if isinstance(config, dict) and config else source.config
    hidden, mlp, heads = (config.get(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    kv_heads, head = config.get("num_key_value_heads") or heads, config.get("head_dim")
    head = head or (hidden and heads and hidden // heads)
    queries, keys = heads and head and heads * head, kv_heads and head and kv_heads * head
    expected = {
        "embed_tokens.weight": (config.get("vocab_size"), hidden),
        "lm_head.weight": (config.get("vocab_size"), hidden),
    }
    if source.config["architectures"][0] in SUPPORTED_ARCHITECTURES:
        shapes = [(hidden,), (queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (hidden,)]
        shapes += [(mlp, hidden), (mlp, hidden), (hidden, mlp)]
        expected |= {f"{module}.weight": shape for module, shape in zip(LAYER_MODULES, shapes, strict=True)}
        expected["norm.weight"] = (hidden,)
    for name, tensor in source.tensors.items():
        if name.endswith("weight"):
            check_dtype(name, tensor, (*DTYPES, "F64"))
        ending = next((ending for ending in expected if f".{name}".endswith(f".{ending}")), None)
        shape = expected.get(ending, tensor.shape)
        fits = len(shape) == len(tensor.shape) and all(
            size in (None, found) for size, found in zip(shape, tensor.shape, strict=False)
        )
        if not fits:
            raise UsageError(
                f"{name} has shape {list(tensor.shape)}, and config.json says {list(shape)} (vocab_size, hidden_size\n"
                "and their like): config and weights must be of one model"
            )


def weight_dtype(source: Source) -> str:
    """safetensors' name of the dtype that holds most bytes."""
    sizes = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def layer_of(name: str) -> int | None:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def is_hub_id(text: str) -> bool:
    """ORG/NAME; where ORG is a folder here, the user means a path and has mistyped it."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", text)) and not Path(text).parent.exists()


def open_source(args: argparse.Namespace) -> Source:
    """The model to split: a folder, a Hub id or a synthetic shape. Raises UsageError."""
    if args.synthetic:
        return SyntheticModel(args.synthetic, args.seed)
    folder = Path(args.model)
    if folder.is_dir():
        return Checkpoint(folder, folder.resolve().name, bool(args.planes))
    if folder == DEMO_MODEL:
        raise UsageError(f"no demo model in {folder}: run demo/train_demo_llama.py first, or name a MODEL")
    if not is_hub_id(args.model):
        raise UsageError(f"no such folder: {args.model} (MODEL is a checkpoint folder or a Hub id ORG/NAME)")
    return Checkpoint(download(args.model), args.model, bool(args.planes))


def download(hub_id: str) -> Path:
    """Folder of a Hub model in the local cache. Raises UsageError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix not in (".safetensors", ".index.json")]
        return Path(snapshot_download(hub_id, ignore_patterns=[*others, MISTRAL_WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"{hub_id} is no folder here, and the Hugging Face Hub does not give it ({type(error).__name__}):\n"
            "check the name, the network and `hf auth login`, or give a folder"
        ) from error


def build_synthetic_tokenizer(vocab_size: int):
    """A `tokenizers.Tokenizer`: one entry per printable ASCII byte, other bytes as "?", then numbered words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    visible = [chr(code) for code in range(33, 127) if chr(code) != SYNTHETIC_UNKNOWN]
    # Ġ and Ċ are the byte-level names of space and newline.
    entries = [SYNTHETIC_UNKNOWN, SYNTHETIC_BOS, SYNTHETIC_EOS, "Ġ", "Ċ", *visible]
    entries += [f"Ġw{number}" for number in range(len(entries), vocab_size)]
    vocab = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=SYNTHETIC_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (SYNTHETIC_BOS, SYNTHETIC_EOS)])
    return tokenizer


# ---- scoring the layers -----------------------------------------------------------------------------


def read_documents(calibration: str) -> Iterator[str]:
    """Lines of a text file, or the column `text` of a Hub dataset ORG/NAME[:CONFIG[:SPLIT]]. Raises UsageError."""
    path = Path(calibration)
    if path.is_file():
        try:
            with path.open(encoding="utf-8-sig") as lines:
                yield from lines
        except ValueError as error:
            raise UsageError(f"--calibration {path} is no UTF-8 text ({error}): give a plain text file") from error
        return
    from datasets import load_dataset

    name, config, split = [*calibration.split(":"), None, None][:3]
    try:
        for row in load_dataset(name, config, split=split or "train", streaming=True):
            yield row["text"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"calibration data {calibration} cannot be had ({type(error).__name__}): check the name and the network,\n"
            "or give a text file with --calibration FILE; --layers A-B and --planes work without a text"
        ) from error


def tokenize(tokenizer, text: str) -> list[int]:
    """The tokens of a document, without what a tokenizer appends to it: that would be scored as its end."""
    encoded = tokenizer(text.strip(), verbose=False, return_special_tokens_mask=True)
    tokens, is_added = encoded["input_ids"], encoded["special_tokens_mask"]
    while tokens and is_added[len(tokens) - 1]:
        tokens = tokens[:-1]
    return tokens


def sample_tokens(source: Source, calibration: str, samples: int, seq_len: int) -> list[np.ndarray]:
    """The first `samples` documents, tokenised and cut to seq_len, as arrays [documents, length], one for each length.

    Grouped by length because a batch then needs no padding. Raises UsageError.
    """
    if not Path(calibration).is_file() and not is_hub_id(calibration.split(":")[0]):
        raise UsageError(f"no such file: {calibration} (--calibration is a text file or ORG/NAME[:CONFIG[:SPLIT]])")
    tokenizer, groups = source.load_tokenizer(), {}
    documents = (tokenize(tokenizer, text) for text in read_documents(calibration))
    for tokens in itertools.islice((tokens for tokens in documents if len(tokens) >= MIN_DOCUMENT_TOKENS), samples):
        groups.setdefault(min(len(tokens), seq_len), []).append(tokens[:seq_len])
    if not groups:
        raise UsageError(
            f"calibration data {calibration} has no document (line) of {MIN_DOCUMENT_TOKENS} tokens or more:\n"
            "give another text with --calibration"
        )
    vocab_size = source.tensors["model.embed_tokens.weight"].shape[0]
    batches = [np.array(group) for group in groups.values()]
    highest = max(batch.max() for batch in batches)
    if highest >= vocab_size:
        raise UsageError(
            f"the tokenizer of {source.name} gives token {highest}, but its embedding has {vocab_size} rows:\n"
            "tokenizer and weights must be of one model"
        )
    return batches


def load_bytes(source: Source, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """The tensor's bytes [start, stop) as a uint8 array."""
    out = np.empty((source.tensors[name].nbytes if stop is None else stop) - start, np.uint8)
    filled = 0
    for chunk in source.chunks(name, start, stop):
        out[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return out


def load_tensor(source: Source, name: str):
    """The tensor as stored, on the CPU."""
    import torch

    tensor = source.tensors[name]
    return torch.from_numpy(load_bytes(source, name)).view(getattr(torch, DTYPES[tensor.dtype])).view(tensor.shape)


def embed_tokens(source: Source, tokens: np.ndarray):
    """Input of layer 0, [samples, seq_len, hidden_size]: only those rows of the table are read that occur."""
    import torch

    name = "model.embed_tokens.weight"
    table = source.tensors[name]
    row_bytes = table.nbytes // table.shape[0]
    ids, places = np.unique(tokens, return_inverse=True)
    rows = np.stack([load_bytes(source, name, token * row_bytes, (token + 1) * row_bytes) for token in ids.tolist()])
    embeddings = torch.from_numpy(rows).view(getattr(torch, DTYPES[table.dtype]))
    return embeddings[torch.from_numpy(places.reshape(tokens.shape))]


def build_one_layer_model(source: Source, device: str):
    """transformers' own model with one decoder layer, to be filled in turn, and no final norm.

    Its masks and rotary embedding are those of the architecture; embedding and weights stay on the meta device.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**(source.config | dict(num_hidden_layers=1)))
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=getattr(torch, DTYPES[weight_dtype(source)]))
    model.norm = torch.nn.Identity()  # what comes out must be the residual stream, not its norm
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    model.layers.to_empty(device=device)
    return model.eval()


def collect_final_residuals(source: Source, batches: list[np.ndarray]):
    """The residual stream at the final token, before each layer and after the last: [samples, layers + 1, hidden_size].

    float32; `batches` are token ids [documents, length]. One layer is resident at a time; every sample goes through it
    before the next one is read.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_one_layer_model(source, device)
    layer, dtype = model.layers[0], getattr(torch, DTYPES[weight_dtype(source)])
    num_layers = source.config["num_hidden_layers"]
    with torch.inference_mode():
        residuals = [embed_tokens(source, tokens).to(device, dtype) for tokens in batches]
        parts = [part for stream in residuals for part in stream.split(max(1, FORWARD_BATCH_TOKENS // stream.shape[1]))]
        final = []  # [samples, hidden_size] before each layer, then after the last
        for number in tqdm(range(num_layers), desc="scoring", unit="layer"):
            final.append(torch.cat([stream[:, -1] for stream in residuals]).float().cpu())
            for name, parameter in layer.named_parameters():
                parameter.copy_(load_tensor(source, f"model.layers.{number}.{name}"))
            for part in parts:
                part.copy_(model(inputs_embeds=part, use_cache=False).last_hidden_state)
        final.append(torch.cat([stream[:, -1] for stream in residuals]).float().cpu())
    return torch.stack(final, dim=1)


def compute_perplexity(source: Source, batches: list[np.ndarray], without: Collection[int] = ()) -> float:
    """exp of the mean cross-entropy of each token given those before it in its document, in the dtype of the weights.

    without: layers that are left out. One layer is resident at a time, then the output. Infinity where that overflows.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, dtype = build_one_layer_model(source, device), getattr(torch, DTYPES[weight_dtype(source)])
    norm = build_final_norm(source).to(device, dtype)
    output = "lm_head.weight" if "lm_head.weight" in source.tensors else "model.embed_tokens.weight"
    loss, count = 0.0, 0
    with torch.inference_mode():
        residuals = [embed_tokens(source, tokens).to(device, dtype) for tokens in batches]
        parts = [part for stream in residuals for part in stream.split(max(1, FORWARD_BATCH_TOKENS // stream.shape[1]))]
        kept = [number for number in range(source.config["num_hidden_layers"]) if number not in without]
        for number in tqdm(kept, desc="perplexity of one model", unit="layer", leave=False):
            for name, parameter in model.layers[0].named_parameters():
                parameter.copy_(load_tensor(source, f"model.layers.{number}.{name}"))
            for part in parts:
                part.copy_(model(inputs_embeds=part, use_cache=False).last_hidden_state)
        norm.weight.copy_(load_tensor(source, "model.norm.weight"))
        output = load_tensor(source, output).to(device)
        for stream, tokens in zip(residuals, batches, strict=True):
            for states, ids in zip(stream, torch.from_numpy(tokens).to(device), strict=True):
                logits = (norm(states[:-1]) @ output.T).float()
                loss += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
                count += len(ids) - 1
    return math.exp(loss / count) if loss / count < 700 else math.inf  # NaN is not less either


def build_final_norm(source: Source):
    """The norm after the last layer, to be filled."""
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**(source.config | dict(num_hidden_layers=1))))
    return model.norm.to_empty(device="cpu")


def compute_angular_distances(final) -> np.ndarray:
    """d(l, n) of arXiv 2403.17887, eq. 7, at [l, l + n]: arccos(cos(x_l, x_l+n)) / pi, the mean over the samples.

    `final` is [samples, layers + 1, hidden]. float64, for arccos near 1 doubles the digits lost.
    """
    total = np.zeros((final.shape[1], final.shape[1]))
    for sample in final.double().numpy():
        unit = sample / np.linalg.norm(sample, axis=1, keepdims=True)
        total += np.arccos(np.clip(unit @ unit.T, -1, 1)) / np.pi
    return total / len(final)


def score_blocks(source: Source, calibration: str, samples: int, seq_len: int) -> tuple[np.ndarray, dict]:
    """Angular distances of every start and size, as compute_angular_distances gives them, and the manifest's row."""
    batches = sample_tokens(source, calibration, samples, seq_len)
    distances = compute_angular_distances(collect_final_residuals(source, batches))
    if not np.isfinite(distances).all():
        raise UsageError(f"{source.name} overflows {DTYPES[weight_dtype(source)]} here: choose the block with --layers")
    return distances, describe_sample(calibration, batches)


def describe_sample(calibration: str, batches: list[np.ndarray]) -> dict:
    """The manifest's row of what sample_tokens() has given."""
    name = Path(calibration).name if Path(calibration).is_file() else calibration
    return dict(source=name, samples=sum(map(len, batches)), seq_len=max(batch.shape[1] for batch in batches))


def find_best_start(distances: np.ndarray, count: int) -> int:
    """First layer of the best block of `count` layers, of those that end before the last layer."""
    num_layers = len(distances) - 1
    return int(np.argmin([distances[first, first + count] for first in range(num_layers - count)]))


def format_layers(layers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    breaks = [0, *(at for at in range(1, len(layers)) if layers[at] != layers[at - 1] + 1), len(layers)]
    runs = [(layers[begin], layers[end - 1]) for begin, end in zip(breaks, breaks[1:], strict=False)]
    return ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in runs)


def print_scores(distances: np.ndarray) -> None:
    print("\n  n  best block  angular distance")
    for count in range(1, len(distances) - 1):
        first = find_best_start(distances, count)
        block = format_layers(list(range(first, first + count)))
        print(f"{count:>3}  {block:>10}  {distances[first, first + count]:.4f}")


# ---- choosing the block -----------------------------------------------------------------------------


def parse_layers(text: str, num_layers: int) -> tuple[int, int]:
    """(first, last) of "20-27", "20" or "20,21,22". Raises UsageError unless it is one block before the last layer."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise UsageError(f"--layers {text}: write a block of layers as FIRST-LAST, for example 4-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= num_layers:
            raise UsageError(f"--layers {text}: the model has layers 0 to {num_layers - 1} (numbered from 0)")
        layers += range(first, last + 1)
    if not layers or layers != list(range(layers[0], layers[0] + len(layers))):
        raise UsageError(f"--layers {text} is not contiguous: name one block in ascending order, for example 4-7")
    if layers[-1] == num_layers - 1:
        raise UsageError(f"--layers {text} drops the last layer, which must stay: end at {num_layers - 2} or before")
    return layers[0], layers[-1]


def parse_prune(prune: int | None, num_layers: int) -> int:
    """Number of layers to leave out of stage 1. Raises UsageError."""
    count = num_layers // 4 if prune is None else prune
    if not 1 <= count < num_layers:
        raise UsageError(
            f"--prune {count}: of {num_layers} layers, 1 to {num_layers - 1} can be pruned (the last one is kept)"
        )
    return count


def place_block(source: Source, args: argparse.Namespace) -> tuple[str, int, int]:
    """(how it is chosen, first, last) of the block of layers that stage 1 leaves out, before any is scored."""
    num_layers = source.config["num_hidden_layers"]
    if args.layers is not None:
        first, last = parse_layers(args.layers, num_layers)
        method, count = "manual", last - first + 1
    else:  # a block of random weights is as good as any other
        count = parse_prune(args.prune, num_layers)
        first, last = PAPER_BLOCKS.get((args.synthetic, count), (num_layers - 1 - count, num_layers - 2))
        method = "fixed" if args.synthetic and args.calibration is None else "angular_distance"
    if args.stages < 2 or args.stages - 1 > count:
        raise UsageError(
            f"--stages {args.stages}: {count} pruned layers allow 2 to {count + 1} stages, one layer or more each"
        )
    return method, first, last


def choose_block(source: Source, args: argparse.Namespace) -> Pruning:
    """The block of layers that stage 1 leaves out: chosen by hand, by angular distance, or fixed. Raises UsageError."""
    method, first, last = place_block(source, args)
    count = last - first + 1
    if method != "angular_distance" and args.calibration is None:
        return Pruning(method, first, last)
    text = args.calibration or (str(DEMO_CALIBRATION) if args.model == str(DEMO_MODEL) else HUB_CALIBRATION)
    distances, calibration = score_blocks(source, text, args.samples, args.seq_len)
    print_scores(distances)
    if method == "angular_distance":
        first = find_best_start(distances, count)
    return Pruning(method, first, first + count - 1, distances, calibration)


# ---- planning the stages ----------------------------------------------------------------------------


def forward_position(name: str) -> tuple:
    """Sort key: where the forward pass meets a tensor; biases follow their weight, unknown names come last."""
    layer = layer_of(name)
    if layer is not None:
        module, _, parameter = name.split(".", 3)[3].rpartition(".")
        rank = LAYER_MODULES.index(module) if module in LAYER_MODULES else len(LAYER_MODULES)
        return 1, layer, rank, parameter != "weight", name
    ranks = {"model.embed_tokens.weight": 0, "model.norm.weight": 2, "lm_head.weight": 3}
    return ranks.get(name, 4), 0, 0, False, name


def split_evenly(items: list[int], parts: int) -> list[list[int]]:
    """Contiguous parts of nearly equal length, the earlier ones longer."""
    size, extra = divmod(len(items), parts)
    starts = [part * size + min(part, extra) for part in range(parts + 1)]
    return [items[begin:end] for begin, end in zip(starts, starts[1:], strict=False)]


def split_files(source: Source, number: int, names: list[str], max_bytes: float) -> dict[str, list[str]]:
    """A stage's tensors by file name: one file, or several where it exceeds `max_bytes` of data."""
    groups, filled = [[]], 0
    for name in names:
        size = source.tensors[name].nbytes
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return dict(zip(file_names(number, len(groups)), groups, strict=True))


def file_names(number: int, count: int) -> list[str]:
    """Of the files of a stage."""
    if count == 1:
        return [f"model-stage{number}.safetensors"]
    return [f"model-stage{number}-{part:05}-of-{count:05}.safetensors" for part in range(1, count + 1)]


def plan_stages(source: Source, pruning: Pruning, num_stages: int, max_bytes: float) -> list[Stage]:
    """Stage 1: everything but the block. Stages 2..K: the block in order, in parts as equal as possible."""
    pruned = list(range(pruning.first, pruning.last + 1))
    kept = [layer for layer in range(source.config["num_hidden_layers"]) if layer not in pruned]
    stages = []
    for number, layers in enumerate([kept, *split_evenly(pruned, num_stages - 1)], 1):
        wanted = {*layers, None} if number == 1 else set(layers)
        names = sorted((name for name in source.tensors if layer_of(name) in wanted), key=forward_position)
        nbytes = sum(source.tensors[name].nbytes for name in names)
        stages.append(Stage(number, layers, split_files(source, number, names, max_bytes), nbytes))
    return stages


def print_plan(source: Source, pruning: Pruning, stages: list[Stage]) -> None:
    total = sum(stage.nbytes for stage in stages)
    rows = [("stage", "adds layers (from 0)", "bytes", "share")]
    rows += [(str(s.number), format_layers(s.layers), f"{s.nbytes:,}", f"{s.nbytes / total:.1%}") for s in stages]
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    print(f"\n{source.name}: stage 1 leaves out layers {pruning.first}-{pruning.last} ({pruning.method})")
    for stage, layers, nbytes, share in rows:
        print(f"  {stage:<{wide[0]}}  {layers:<{wide[1]}}  {nbytes:>{wide[2]}}  {share:>{wide[3]}}")


# ---- planes: a matrix as stages of precision --------------------------------------------------------

CHUNK_WEIGHTS = 1 << 18  # that are coded together: what belongs to them stays in a core's cache
FLOATS = {"BF16": ("<u2", 7), "F16": ("<u2", 10), "F32": ("<u4", 23)}  # bit patterns, mantissa bits
SYMBOL_MANTISSA = 3  # mantissa bits in a symbol, at most: sign (1 bit), exponent code (4), mantissa (3)
ESCAPE = 15  # the exponent code of a weight that is stored as it is
RECORD = ".planes"  # ends the name of a tensor of bytes that is a record, see read_record


def list_fields(known: list[int]) -> list[list[tuple[int, int]]]:
    """By stage, the fields that hold the mantissa bits which no symbol has: (bits of the field, bits above it)."""
    fields, above = [], min(known[0], SYMBOL_MANTISSA)
    for last in known:
        fields.append([])
        while above < last:
            bits = next(bits for bits in (8, 4, 2, 1) if bits <= last - above)  # a byte holds whole fields
            fields[-1].append((bits, above))
            above += bits
    return fields


def read_record(record) -> tuple[dict, list[list[memoryview]]]:
    """Head and chunks (each a list of parts) of a record, whose first line is JSON. Raises ValueError."""
    end = bytes(record[: 1 << 24]).index(b"\n") + 1
    head, parts = json.loads(bytes(record[:end])), []
    sizes = head["sizes"]
    if min(itertools.chain(*sizes), default=0) < 0 or end + sum(map(sum, sizes)) != len(record):
        raise ValueError("the parts do not add up to the record")
    for row in sizes:
        parts.append([])
        for size in row:
            parts[-1].append(record[end : end + size])
            end += size
    return head, parts


def inflate(part, size: int) -> "np.ndarray":
    """`size` bytes, stored as they are or by zstd, whichever was smaller."""
    if len(part) != size:
        if zstandard.frame_content_size(part) != size:
            raise ValueError(f"a part does not hold {size} bytes")
        part = zstandard.ZstdDecompressor().decompress(part)
    return np.frombuffer(part, np.uint8)


def join_chunk(out: "np.ndarray", base: int, parts: list, mantissa: int, known: list[int]) -> None:
    """Fill `out` [weights] with bit patterns. known: how many mantissa bits are after each stage.

    The missing bits stand at their middle, which is as good as rounding to nearest.
    """
    count, signed = len(out), out.view(out.dtype.str.replace("u", "i"))
    shift, middle = mantissa - SYMBOL_MANTISSA, (1 << mantissa - known[-1]) >> 1
    symbols = inflate(parts[0], count).view(np.int8)
    np.multiply(symbols, signed.dtype.type(1 << shift), out=signed, dtype=signed.dtype)
    out &= out.dtype.type(1 << out.itemsize * 8 - 1 | 127 << shift)
    out += out.dtype.type((base << mantissa) + middle)
    for (bits, above), part in zip(itertools.chain(*list_fields(known)), parts[2:], strict=True):
        packed = inflate(part, -(-count * bits // 8))
        low = mantissa - above - bits  # place of the field's lowest bit
        if low + bits > 8:
            packed = packed.astype(out.dtype)
        for row in range(8 // bits):
            place = out[row * len(packed) : (row + 1) * len(packed)]
            moved = packed << low - bits * row if low > bits * row else packed >> bits * row - low
            moved &= (1 << bits) - 1 << low
            place |= moved[: len(place)]
    places = np.frombuffer(parts[1], "<u4", len(parts[1]) // (4 + out.itemsize))
    if len(places) and places.max() >= count:
        raise ValueError("an escape lies outside of its chunk")
    out[places] = np.frombuffer(parts[1], out.dtype, offset=4 * len(places))


def join_planes(records: list, room: Callable = bytearray, run: Callable = map) -> "tuple[str, np.ndarray]":
    """(dtype, bit patterns) of a matrix, from its records of stages 1, 2, ... Raises ValueError for damaged ones.

    room(bytes) gives the memory for the result, run(function, items) runs the function on all of them.
    """
    heads, chunks = zip(*map(read_record, records), strict=True)
    (dtype, mantissa), known = FLOATS[heads[0]["dtype"]], [head["known"] for head in heads]
    count = math.prod(heads[0]["shape"])
    if len({(head["dtype"], *head["shape"]) for head in heads}) > 1 or len(chunks[0]) != -(-count // CHUNK_WEIGHTS):
        raise ValueError("the records are not of one matrix, or of another shape")
    out = np.frombuffer(room(count * np.dtype(dtype).itemsize), dtype)
    jobs = [
        (out[begin : begin + CHUNK_WEIGHTS], base, list(itertools.chain(*parts)), mantissa, known)
        for begin, base, *parts in zip(range(0, count, CHUNK_WEIGHTS), heads[0]["bases"], *chunks, strict=True)
    ]
    for _ in run(lambda job: join_chunk(*job), jobs):
        pass
    return heads[0]["dtype"], out.reshape(heads[0]["shape"])


def deflate(part: np.ndarray) -> bytes:
    raw = part.tobytes()
    packed = zstandard.ZstdCompressor(level=1).compress(raw)
    return packed if len(packed) < len(raw) else raw


def pack_field(field: np.ndarray, bits: int) -> np.ndarray:
    """Planar: the lowest bits of all bytes belong to the first weights, and so on."""
    rows = np.zeros((8 // bits, -(-len(field) * bits // 8)), np.uint8)
    rows.reshape(-1)[: len(field)] = field
    return np.bitwise_or.reduce(rows << np.arange(0, 8, bits, dtype=np.uint8)[:, None], axis=0)


def split_chunk(weights: np.ndarray, mantissa: int, known: list[int]) -> tuple[int, list[list[bytes]]]:
    """Base exponent of a chunk, and its parts by stage.

    weights: bit patterns, [weights]. known: how many mantissa bits are after each stage.
    """
    width = weights.itemsize * 8
    exponents = weights << 1 >> mantissa + 1
    counts = np.bincount(exponents, minlength=1 << width - 1 - mantissa)[1:-1]  # neither 0 nor NaN and infinity
    base = 1 + int(np.argmax(np.convolve(counts, np.ones(ESCAPE, int), "valid")))
    codes = exponents - weights.dtype.type(base)  # wraps for what is smaller
    escaped = np.flatnonzero(codes >= ESCAPE)
    unknown = max(0, SYMBOL_MANTISSA - known[0])
    top = weights >> mantissa - SYMBOL_MANTISSA & (7 >> unknown << unknown)
    symbols = (weights >> width - 1 << 7 | codes << SYMBOL_MANTISSA | top).astype(np.uint8)
    symbols[escaped] = ESCAPE << SYMBOL_MANTISSA
    escapes = escaped.astype("<u4").tobytes() + weights[escaped].tobytes()
    parts = []
    for fields in list_fields(known):
        parts.append([])
        for bits, above in fields:
            field = (weights >> mantissa - above - bits & (1 << bits) - 1).astype(np.uint8)
            field[escaped] = 0
            parts[-1].append(deflate(pack_field(field, bits)))
    return base, [[deflate(symbols), escapes, *parts[0]], *parts[1:]]


# ---- writing ----------------------------------------------------------------------------------------


def build_header(source: Source, names: list[str]) -> bytes:
    """A safetensors header, padded with spaces so that the data after it starts at a multiple of ALIGNMENT."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        tensor = source.tensors[name]
        header[name] = dict(dtype=tensor.dtype, shape=tensor.shape, data_offsets=[end, end + tensor.nbytes])
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    return (padded - 8).to_bytes(8, "little") + text.ljust(padded - 8)


def hash_tensor(digest: blake3, source: Source, name: str) -> None:
    for chunk in source.chunks(name):
        digest.update(chunk)


def write_weights(source: Source, path: Path, names: list[str], progress: tqdm) -> dict:
    """Write one safetensors file and return its manifest row.

    A second thread hashes the source's bytes while this one writes them: so the checksum also vouches for the copy.
    """
    header = build_header(source, names)
    digest = blake3(header)
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        write_all(file, header)
        for name in names:
            hashed = hasher.submit(hash_tensor, digest, source, name)
            source.send(name, file)
            hashed.result()
            progress.update(source.tensors[name].nbytes)
    with safe_open(path, framework="numpy") as written:
        assert set(written.keys()) == set(names), f"{path} does not open with the tensors that were written"
    return dict(name=path.name, bytes=path.stat().st_size, blake3=digest.hexdigest())


def write_stages(source: Source, stages: list[Stage], folder: Path) -> list[dict]:
    """Write every stage and the Hugging Face index; return the manifest rows."""
    rows, weight_map = [], {}
    total = sum(stage.nbytes for stage in stages)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing") as progress:
        for stage in stages:
            files = [write_weights(source, folder / name, names, progress) for name, names in stage.files.items()]
            weight_map |= {name: file for file, names in stage.files.items() for name in names}
            nbytes = sum(file["bytes"] for file in files)
            rows.append(dict(stage=stage.number, kind="layers", layers=stage.layers, bytes=nbytes, files=files))
    index = dict(metadata=dict(total_size=total), weight_map=dict(sorted(weight_map.items())))
    write_json(folder / INDEX, index)
    return rows


@dataclass
class PlaneFile:
    """A file of a stage of planes, while it is being written: its header, which says where all lies, comes last."""

    file: BinaryIO
    header: dict = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})
    records: dict = field(default_factory=dict)  # name -> blake3: what is read can be used before the file is whole
    nbytes: int = 0

    def append(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        self.header[name] = dict(dtype=dtype, shape=shape, data_offsets=[self.nbytes, self.nbytes + len(data)])
        if name.endswith(RECORD):
            self.records[name] = blake3(data).hexdigest()
        self.nbytes += len(data)
        write_all(self.file, data)

    def finish(self, room: int, path: Path) -> dict:
        """Write the header and give the file its name; returns its manifest row."""
        text = json.dumps(self.header, separators=(",", ":")).encode()
        self.file.seek(0)
        write_all(self.file, (room - 8).to_bytes(8, "little") + text.ljust(room - 8))
        self.file.close()
        Path(self.file.name).rename(path)
        with safe_open(path, framework="numpy") as written:
            assert set(written.keys()) == set(self.header) - {"__metadata__"}, f"{path} does not open as written"
        checksum = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        return dict(name=path.name, bytes=path.stat().st_size, blake3=checksum, records=self.records)


@dataclass
class PlaneStage:
    """What a stage of planes has come to."""

    number: int
    bits: int | str  # mantissa bits that it adds, or "rest"
    nbytes: int = 0
    squares: float = 0.0  # of the errors that are left, over the chunks that were looked at
    files: list[PlaneFile] = field(default_factory=list)


@dataclass
class Planes:
    """What coding has come to, in all stages."""

    stages: list[PlaneStage]
    folder: Path | None  # where they are written, if they are
    room: int  # bytes for the header of each file
    max_bytes: float  # of a file
    weights: int = 0  # in matrices that are coded
    escapes: int = 0
    plain_bytes: int = 0  # of tensors that are stored as they are
    plain_matrices: Counter = field(default_factory=Counter)  # dtype -> bytes, of matrices among them
    coded: set[str] = field(default_factory=set)  # names of the matrices
    squares: float = 0.0  # of the weights, over the chunks that were looked at

    def append(self, stage: PlaneStage, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        """Add a tensor to a stage, in a file of its own where the last one is full."""
        stage.nbytes += len(data)
        if not self.folder:
            return
        if not stage.files or (stage.files[-1].nbytes and stage.files[-1].nbytes + len(data) > self.max_bytes):
            file = (self.folder / f"stage{stage.number}-{len(stage.files)}").open("xb", buffering=0)
            file.seek(self.room)
            stage.files.append(PlaneFile(file))
        stage.files[-1].append(name, dtype, shape, data)

    def error_of(self, stage: PlaneStage) -> float:
        """Norm of the weights' error at this stage, relative to theirs."""
        return math.sqrt(stage.squares / self.squares) if self.squares else 0.0

    def finish(self) -> list[dict]:
        """Finish the files; returns the manifest rows of the stages."""
        rows = []
        for stage in self.stages:
            names = file_names(stage.number, len(stage.files))
            files = [file.finish(self.room, self.folder / name) for file, name in zip(stage.files, names, strict=True)]
            nbytes = sum(file["bytes"] for file in files)
            error = self.error_of(stage)
            rows.append(
                dict(stage=stage.number, kind="planes", bits=stage.bits, bytes=nbytes, weight_error=error, files=files)
            )
        return rows


def parse_planes(text: str) -> list[int | str]:
    """Mantissa bits that each stage adds, of "1,2,rest". Raises UsageError."""
    *bits, last = text.split(",")
    if last != "rest" or not all(part.isdecimal() and int(part) for part in bits) or not bits:
        raise UsageError(f"--planes {text}: give the bits that stages add, and rest at the end, such as 1,2,rest")
    return [*map(int, bits), last]


def known_bits(bits: list[int | str], mantissa: int) -> list[int]:
    """How many mantissa bits are known after each stage."""
    return [min(mantissa, known) for known in itertools.accumulate(bits[:-1])] + [mantissa]


def floats_of(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that bit patterns stand for, in float32; 0 for NaN and infinity."""
    if dtype == "BF16":
        patterns = patterns.astype("<u4") << 16
    return np.nan_to_num(patterns.view("<f2" if dtype == "F16" else "<f4").astype("<f4"), posinf=0, neginf=0)


def code_chunk(weights: np.ndarray, dtype: str, known: list[int], is_looked_at: bool):
    """split_chunk(), and the sums of squares of the weights and of each stage's errors."""
    mantissa = FLOATS[dtype][1]
    base, parts = split_chunk(weights, mantissa, known)
    squares = []
    if is_looked_at:
        exact, approximate = floats_of(weights, dtype), np.empty_like(weights)
        squares.append(float(np.vdot(exact, exact)))
        for stage in range(1, len(known) + 1):
            join_chunk(approximate, base, [*itertools.chain(*parts[:stage])], mantissa, known[:stage])
            error = floats_of(approximate, dtype) - exact
            squares.append(float(np.vdot(error, error)))
    return base, parts, squares


def code_matrix(weights: np.ndarray, tensor: Tensor, known: list[int], pool: ThreadPoolExecutor):
    """The records of a matrix, by stage; escapes; sums of squares. weights: bit patterns, [weights]."""
    begins = range(0, len(weights), CHUNK_WEIGHTS)
    bases, parts, squares = zip(
        *pool.map(
            lambda begin: code_chunk(
                weights[begin : begin + CHUNK_WEIGHTS], tensor.dtype, known, begin // CHUNK_WEIGHTS % ERROR_SAMPLE == 0
            ),
            begins,
        ),
        strict=True,
    )
    records = []
    for stage, bits in enumerate(known):
        sizes = [[len(part) for part in chunk[stage]] for chunk in parts]
        head = dict(dtype=tensor.dtype, shape=tensor.shape, known=bits, sizes=sizes)
        head |= {} if stage else {"bases": bases}
        data = itertools.chain.from_iterable(chunk[stage] for chunk in parts)
        records.append(json.dumps(head, separators=(",", ":")).encode() + b"\n" + b"".join(data))
    escapes = sum(len(chunk[0][1]) for chunk in parts) // (4 + weights.itemsize)
    return records, escapes, np.sum([row for row in squares if row], axis=0)


def code_planes(source: Source, bits: list[int | str], folder: Path | None, max_bytes: float) -> Planes:
    """Code every matrix, one at a time; the files of the stages are written where a folder is given, but no headers.

    Errors are looked at in one chunk of ERROR_SAMPLE.
    """
    stages = [PlaneStage(number, added) for number, added in enumerate(bits, 1)]
    planes = Planes(stages, folder, header_room(source), max_bytes)
    names = sorted(source.tensors, key=forward_position)
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="coding") as progress, ThreadPoolExecutor() as pool:
        for name in names:
            tensor = source.tensors[name]
            data = load_bytes(source, name)
            records = []
            if len(tensor.shape) > 1 and tensor.dtype in FLOATS and len(data):
                weights = data.view(FLOATS[tensor.dtype][0])
                known = known_bits(bits, FLOATS[tensor.dtype][1])
                records, escapes, squares = code_matrix(weights, tensor, known, pool)
            if records and sum(map(len, records)) < tensor.nbytes:
                for stage, record, error in zip(planes.stages, records, squares[1:], strict=True):
                    planes.append(stage, name + RECORD, "U8", (len(record),), record)
                    stage.squares += error
                planes.coded.add(name)
                planes.weights += len(weights)
                planes.escapes += escapes
                planes.squares += squares[0]
            else:
                planes.append(stages[0], name, tensor.dtype, tensor.shape, data)
                planes.plain_bytes += tensor.nbytes
                planes.plain_matrices[tensor.dtype] += tensor.nbytes if len(tensor.shape) > 1 else 0
            progress.update(tensor.nbytes)
    return planes


def header_room(source: Source) -> int:
    """Bytes, a multiple of ALIGNMENT, that the header of any stage fits in, whatever its sizes will be."""
    digits = [10**15, 10**15]
    rows = {
        name + RECORD: dict(dtype="F8_E4M3", shape=t.shape, data_offsets=digits) for name, t in source.tensors.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **rows})
    return -(-(8 + len(text.encode())) // ALIGNMENT) * ALIGNMENT


def print_planes(source: Source, planes: Planes) -> None:
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    shares = list(itertools.accumulate(stage.nbytes / total for stage in planes.stages))
    rows = [("stage", "adds bits", "bytes", "bits/weight", "share so far", "error of the weights")]
    for stage, share in zip(planes.stages, shares, strict=True):
        bits = 8 * (stage.nbytes - (planes.plain_bytes if stage.number == 1 else 0)) / max(1, planes.weights)
        error = f"{planes.error_of(stage):.2%}"
        rows.append((str(stage.number), str(stage.bits), f"{stage.nbytes:,}", f"{bits:.2f}", f"{share:.1%}", error))
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{source.name}: {planes.escapes / max(1, planes.weights):.3%} of the weights are escapes")
    for row in rows:
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, wide, strict=True)))
    for dtype, nbytes in planes.plain_matrices.items():
        if nbytes:
            print(f"  {nbytes:,} bytes of matrices in {dtype} do not gain: they come as they are, with stage 1")


def first_to_answer(
    perplexities: list[float | None], errors: list[float | None] | None, max_loss: float = MAX_LOSS
) -> int:
    """The first stage that may answer, if the user names none: the first one that loses little.

    perplexities: one for each stage; max_loss: percent above the last stage's. errors: of each stage's weights relative
    to the exact ones; they decide if perplexities are missing. None: stages of layers, which answer from the first on.
    """
    last = len(perplexities)
    if all(perplexities):
        loses_little = [value <= perplexities[-1] * (1 + max_loss / 100) for value in perplexities]
    elif errors is None:
        loses_little = [True]
    else:
        loses_little = [value is not None and value <= MAX_WEIGHT_ERROR for value in errors]
    return next((number for number, little in enumerate(loses_little, 1) if little), last)


def print_first_to_answer(planes: Planes, perplexities: list[float | None]) -> None:
    """Which stage answers first by default, and why."""
    errors = [planes.error_of(stage) for stage in planes.stages]
    first = first_to_answer(perplexities, errors)
    if all(perplexities):
        loss = f"perplexity is {perplexities[first - 1] / perplexities[-1] - 1:.1%} above the exact model's"
        allowed = f"--max-loss allows {MAX_LOSS:g} %"
    else:
        loss = f"weights are off by {errors[first - 1]:.1%}"
        allowed = f"{MAX_WEIGHT_ERROR:.0%} is allowed where --calibration has measured no perplexity"
    reason = f"its {loss}" if first < len(errors) else "it is the exact model, and the others lose too much"
    print(f"\nA server answers from stage {first} on: {reason} ({allowed}).")


def estimate_planes(source: Source, bits: list[int | str]) -> Planes:
    """What coding the source would come to, from the first chunk of each matrix."""
    planes = Planes([PlaneStage(number, added) for number, added in enumerate(bits, 1)], None, 0, math.inf)
    for name, tensor in source.tensors.items():
        if len(tensor.shape) < 2 or tensor.dtype not in FLOATS or not tensor.nbytes:
            planes.stages[0].nbytes += tensor.nbytes
            continue
        pattern, mantissa = FLOATS[tensor.dtype]
        size = min(tensor.nbytes, CHUNK_WEIGHTS * np.dtype(pattern).itemsize)
        weights = load_bytes(source, name, 0, size).view(pattern)
        _, parts, squares = code_chunk(weights, tensor.dtype, known_bits(bits, mantissa), True)
        planes.squares += squares[0] * tensor.nbytes / size
        for stage, fields, error in zip(planes.stages, parts, squares[1:], strict=True):
            stage.nbytes += sum(map(len, fields)) * tensor.nbytes // size
            stage.squares += error * tensor.nbytes / size
    return planes


def print_planes_instead(source: Source, stages: list[Stage], model: str) -> None:
    """A line under a plan of stages of layers: what stages of precision would give, and the command for them."""
    planes = estimate_planes(source, parse_planes(DEFAULT_PLANES))
    total = sum(stage.nbytes for stage in stages)
    shares = [nbytes / total for nbytes in itertools.accumulate(stage.nbytes for stage in planes.stages)]
    first = first_to_answer([None] * len(shares), [planes.error_of(stage) for stage in planes.stages])
    if shares[-1] < 1:
        print(
            f"\nStages of precision would answer from {shares[first - 1]:.0%} of the bytes on, in place of "
            f"{stages[0].nbytes / total:.0%}: python {Path(__file__).name} {model} OUT --planes --calibration"
        )


def compares_with_layers(source: Source, args: argparse.Namespace) -> bool:
    """Whether stages of layers can be measured beside planes. Raises UsageError for options that they cannot have."""
    try:
        place_block(source, args)
    except UsageError as error:
        if args.prune is not None or args.layers is not None:
            raise
        print(f"no comparison with stages of layers: {error}")
        return False
    return True


def measure_planes(
    source: Source, planes: Planes, batches: list[np.ndarray], full: float, with_layers: bool, args: argparse.Namespace
) -> tuple[list[dict], dict]:
    """Rows (kind, stage, share of the bytes, perplexity): of these stages, and of layers as they would be left out.

    And the manifest's row of the text. full: perplexity of the source, which is that of the last stage.
    """
    total, bits = sum(tensor.nbytes for tensor in source.tensors.values()), [stage.bits for stage in planes.stages]
    layers, block = [], set()
    if with_layers:
        pruning = choose_block(source, args)
        layers = plan_stages(source, pruning, args.stages, math.inf)
        block = {*range(pruning.first, pruning.last + 1)}
    rows, shares = [], itertools.accumulate(stage.nbytes / total for stage in planes.stages)
    with tqdm(total=len(planes.stages) + max(0, len(layers) - 1), desc="perplexity", unit="stage") as progress:
        for stage, share in zip(planes.stages, shares, strict=True):
            at_stage = AtStage(source, bits, stage.number, planes.coded)
            perplexity = full if stage is planes.stages[-1] else compute_perplexity(at_stage, batches)
            if perplexity == math.inf:  # the server goes by a number
                raise UsageError(f"--planes {args.planes}: stage {stage.number} overflows, give it more bits")
            rows.append(dict(kind="planes", stage=stage.number, share=share, perplexity=perplexity))
            progress.update()
        for number in range(1, len(layers)):
            there = {layer for stage in layers[:number] for layer in stage.layers}
            share = sum(stage.nbytes for stage in layers[:number]) / total
            perplexity = compute_perplexity(source, batches, block - there)
            rows.append(dict(kind="layers", stage=number, share=share, perplexity=perplexity))
            progress.update()
    tokens = sum(batch.size for batch in batches)
    print(f"\nperplexity on {tokens:,} tokens of {args.calibration}" + TOO_FEW * (tokens < ENOUGH_TOKENS))
    for row in rows:
        at = f"{row['kind']}, stage {row['stage']}"
        print(f"  {at:<16}  {row['share']:>6.1%} of the bytes  perplexity {row['perplexity']:.2f}")
    return rows, describe_sample(args.calibration, batches)


def write_measures(rows: list[dict], folder: Path) -> None:
    """planes/: share of the bytes and perplexity as CSV, and as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir()
    lines = ["kind,stage,share_of_bytes,perplexity"]
    lines += [f"{row['kind']},{row['stage']},{row['share']:.6f},{row['perplexity']:.6f}" for row in rows]
    (folder / "perplexity.csv").write_text("\n".join(lines) + "\n")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, marker in (("planes", "o"), ("layers", "s")):
        points = [row for row in rows if row["kind"] == kind]
        shares, perplexities = [100 * row["share"] for row in points], [row["perplexity"] for row in points]
        axes.plot(shares, perplexities, marker + "-", label=f"stages of {kind}")
        for row, share in zip(points, shares, strict=True):
            axes.annotate(str(row["stage"]), (share, row["perplexity"]), (6, 4), textcoords="offset points")
    full = next(row["perplexity"] for row in reversed(rows) if row["kind"] == "planes")
    axes.axhline(full, color="0.6", linestyle=":", label="full model")
    axes.set(xlim=(0, 102), yscale="log", xlabel="share of the source's bytes, %", ylabel="perplexity")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(folder / "perplexity.png", dpi=120)


def describe_files(source: Source) -> dict[str, dict]:
    """What restoring the source's files of weights takes: their headers, and their checksums."""
    if isinstance(source, SyntheticModel):
        names = sorted(source.tensors, key=forward_position)
        header = build_header(source, names)
        digest = blake3(header)
        for name in names:
            hash_tensor(digest, source, name)
        size = len(header) + sum(tensor.nbytes for tensor in source.tensors.values())
        return {"model.safetensors": dict(bytes=size, blake3=digest.hexdigest(), header=header[8:].decode())}
    files = {}
    for path in source.weight_files:
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little")).decode()
        checksum = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        files[path.name] = dict(bytes=path.stat().st_size, blake3=checksum, header=header)
    return files


def restore(checkpoint: Path, folder: Path) -> None:
    """Write the source of a checkpoint of planes again, every file of weights bit for bit. Raises UsageError."""
    manifest = read_json(checkpoint / "progressive.json")
    try:
        kinds = {stage["kind"] for stage in manifest["stages"]}
        paths = [[checkpoint / file["name"] for file in stage["files"]] for stage in manifest["stages"]]
        files = dict(manifest["source"]["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{checkpoint / 'progressive.json'} is malformed ({error!r}): copy the checkpoint again"
        ) from error
    if kinds != {"planes"}:
        raise UsageError(f"{checkpoint} has stages of {', '.join(kinds)}: transformers and vLLM load it as it is")
    stages = [{name: row for path in stage for name, row in read_header(path).items()} for stage in paths]
    with tqdm(
        total=sum(row["bytes"] for row in files.values()), unit="B", unit_scale=True, desc="restoring"
    ) as progress:
        for file_name, row in files.items():
            restore_file(folder / file_name, row, stages, progress)
    copy_side_files(checkpoint, folder, list(itertools.chain(*paths)))
    if len(files) > 1:
        weight_map = {
            name: file for file, row in files.items() for name in json.loads(row["header"]) if name[:2] != "__"
        }
        total = sum(row["bytes"] - 8 - len(row["header"].encode()) for row in files.values())
        index = dict(metadata=dict(total_size=total), weight_map=dict(sorted(weight_map.items())))
        write_json(folder / INDEX, index)


def restore_file(path: Path, row: dict, stages: list[dict[str, Tensor]], progress: tqdm) -> None:
    """Write one file of weights again. Raises UsageError for stages that do not give it back."""
    header = row["header"].encode()
    start = len(header).to_bytes(8, "little") + header
    digest = blake3(start)
    tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    with path.open("xb", buffering=0) as file:
        write_all(file, start)
        for name in sorted(tensors, key=lambda name: tensors[name]["data_offsets"]):
            records = [read_tensor(stage[name + RECORD]) for stage in stages if name + RECORD in stage]
            try:
                data = join_planes(records)[1].tobytes() if records else read_tensor(stages[0][name])
            except (ValueError, KeyError, TypeError, zstandard.ZstdError) as error:
                raise UsageError(f"the planes of {name} are damaged ({error}): copy the checkpoint again") from error
            write_all(file, data)
            digest.update(data)
            progress.update(len(data))
    if digest.hexdigest() != row["blake3"]:
        raise UsageError(
            f"{path.name} is not what it was made from: a stage file is damaged; copy the checkpoint again"
        )


def read_tensor(tensor: Tensor) -> memoryview:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return memoryview(file.read(tensor.nbytes))


def draw_heat_map(pruning: Pruning, path: Path) -> None:
    """Angular distance over first layer l and block size n, as figure 4 of arXiv 2403.17887."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_layers = len(pruning.distances) - 1
    scores = np.full((num_layers + 1, num_layers), np.nan)  # [n, l]
    for first in range(num_layers):
        for count in range(1, num_layers - first + 1):
            scores[count, first] = pruning.distances[first, first + count]
    best = [find_best_start(pruning.distances, count) for count in range(1, num_layers)]
    figure, axes = pyplot.subplots(figsize=(7, 6), layout="constrained")
    image = axes.imshow(scores, origin="lower", cmap="viridis_r", aspect="auto")
    axes.plot(best, range(1, num_layers), "w.", label="best block of n layers")
    axes.plot(pruning.first, pruning.last - pruning.first + 1, "ro", mfc="none", ms=11, label="left out of stage 1")
    axes.set(ylim=(0.5, num_layers + 0.5), xlabel="first layer l (from 0)", ylabel="block size n")
    axes.legend(facecolor="0.7")
    figure.colorbar(image, label="angular distance d(l, n)")
    figure.savefig(path, dpi=120)


def write_pruning(source: Source, pruning: Pruning, folder: Path) -> None:
    """pruning/: the scores as CSV and heat map where layers were scored, and stage 1 as mergekit slices."""
    folder.mkdir()
    if pruning.distances is not None:
        num_layers = len(pruning.distances) - 1
        lines = ["first_layer,num_layers,angular_distance"]  # blocks that hold the last layer are listed, never chosen
        for first in range(num_layers):
            for count in range(1, num_layers - first + 1):
                lines.append(f"{first},{count},{pruning.distances[first, first + count]:.8f}")
        (folder / "angular_distance.csv").write_text("\n".join(lines) + "\n")
        draw_heat_map(pruning, folder / "angular_distance.png")
    kept = [(0, pruning.first), (pruning.last + 1, source.config["num_hidden_layers"])]
    slices = [  # the block may start at layer 0
        dict(sources=[dict(model=source.name, layer_range=list(layers))]) for layers in kept if layers[0] < layers[1]
    ]
    merge = dict(slices=slices, merge_method="passthrough", dtype=DTYPES[weight_dtype(source)])
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(merge, sort_keys=False))


def manifest_of(pruning: Pruning) -> dict:
    return dict(
        method=pruning.method,
        block=[pruning.first, pruning.last],
        num_layers=pruning.last - pruning.first + 1,
        angular_distance=pruning.angular_distance,
        calibration=pruning.calibration,
    )


def write_manifest(source: Source, rows: list[dict], files: dict[str, dict], folder: Path, **details: dict) -> None:
    """progressive.json. files: the source's files of weights; details: what belongs to a kind of stages."""
    manifest = dict(
        format_version=FORMAT_VERSIONS[rows[0]["kind"]],
        architecture=source.config["architectures"][0],
        num_layers=source.config["num_hidden_layers"],
        dtype=DTYPES.get(weight_dtype(source), weight_dtype(source)),
        num_stages=len(rows),
        stages=rows,
        **details,
        source=dict(name=source.name, files=files),
        tool=dict(
            name=Path(__file__).name,
            version=VERSION,
            **{package: version(package) for package in ("torch", "transformers", "safetensors")},
        ),
    )
    write_json(folder / "progressive.json", manifest)


def check_output(out: Path, force: bool) -> None:
    """Raises UsageError where OUT cannot be made, before any work is done."""
    if not out.parent.is_dir():
        raise UsageError(f"no folder {out.parent} to write {out.name} in: create it first (mkdir -p)")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already: choose another OUT, or replace it with --force")
    if out.exists() and not (out / "progressive.json").is_file():
        raise UsageError(f"{out} is no progressive checkpoint, so --force does not replace it: remove it yourself")


def lock_partial(partial: Path):
    """Make the temporary folder, or take over and empty that of a killed run; return its open lock file."""
    try:
        partial.mkdir(exist_ok=True)
        lock = (partial / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another run is writing {partial}: wait for it, or choose another OUT") from error
    except OSError as error:
        raise UsageError(f"cannot write in {partial.parent} ({error.strerror}): choose another OUT") from error
    for stale in partial.iterdir():
        if stale.is_dir():
            shutil.rmtree(stale)
        elif stale.name != LOCK:
            stale.unlink()
    return lock


@contextmanager
def whole_or_nothing(out: Path, force: bool) -> Iterator[Path]:
    """A hidden sibling of `out` to write in; it becomes `out` when the block succeeds and vanishes when it fails.

    Raises UsageError where `out` cannot be made or the disk is full.
    """
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists() and not out.exists():
        replaced.rename(out)  # a run was killed between the two renames below
    shutil.rmtree(replaced, ignore_errors=True)  # a run was killed after them
    check_output(out, force)
    partial = out.with_name(f".{out.name}.partial")
    with lock_partial(partial):
        try:
            yield partial
            (partial / LOCK).unlink()
            if force and out.exists():
                out.rename(replaced)
            partial.rename(out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UsageError(f"no space left for {out}: free some, or choose an OUT on another disk") from error
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def check_space(needed: int, folder: Path, out: Path) -> None:
    """Raises UsageError where the disk cannot hold so many bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"{out} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free:\n"
            "free some space, or choose an OUT on another disk"
        )


# ---- command line -----------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [MODEL] [OUT]",
        description="Turn a LLaMA checkpoint into a progressive checkpoint: same weights, in stages.",
        epilog=HELP_DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help=f"folder or Hub id (default: remake {DEMO_CHECKPOINT})")
    add("out", metavar="OUT", nargs="?", help="new folder (default: MODEL-progressive)")

    add = parser.add_argument_group("the block of layers that stage 1 leaves out").add_argument
    add("--prune", type=positive_int, metavar="N", help="its size (default: a quarter of the layers)")
    add("--layers", metavar="A-B", help="by hand, from 0 (the paper counts from 1)")
    add("--stages", type=int, metavar="K", help="stages 2..K bring it back (default: 3)")

    add = parser.add_argument_group("stages of precision, in place of layers").add_argument
    add(
        "--planes", metavar="BITS", nargs="?", const=DEFAULT_PLANES,
        help="mantissa bits that each stage adds; of any model (default: %(const)s)",
    )  # fmt: skip
    add("--restore", action="store_true", help="MODEL is a checkpoint of planes: write in OUT what it was made from")

    add = parser.add_argument_group("scoring").add_argument
    add("--calibration", metavar="TEXT", nargs="?", const=HUB_CALIBRATION, help="FILE or DATASET, see below")
    add("--samples", type=positive_int, metavar="S", default=128, help="documents, at most (default: %(default)s)")
    add("--seq-len", type=positive_int, metavar="T", default=256, help="tokens of each, at most (default: %(default)s)")
    add("--plan-only", action="store_true", help="score and print, write nothing")

    add = parser.add_argument_group("random weights").add_argument
    add("--synthetic", metavar="SHAPE", choices=SYNTHETIC_SHAPES, help="in place of MODEL, see below")
    add("--seed", type=int, metavar="I", default=0, help="of the weights (default: %(default)s)")

    add = parser.add_argument_group("output").add_argument
    add("--max-file-gib", type=float, metavar="G", default=16, help="cut larger files (default: %(default)s)")
    add("--force", action="store_true", help="replace OUT, once the new one is whole")

    args = parser.parse_args()
    if args.prune and args.layers:
        parser.error(f"--prune {args.prune} and --layers {args.layers} both name the block: give one of them")
    layers_only = () if args.calibration else ("prune", "layers", "stages")
    if args.planes and (given := [name for name in layers_only if getattr(args, name) is not None]):
        parser.error(f"--planes {args.planes} leaves out no layers: --{given[0]} is for a comparison by --calibration")
    args.stages = 3 if args.stages is None else args.stages
    if args.restore and (args.planes or args.synthetic or not args.out):
        parser.error("--restore takes a checkpoint of planes and the folder to write: --restore CKPT OUT")
    if args.synthetic and args.out:
        parser.error(f"--synthetic takes the place of MODEL: give OUT only, not {args.model} {args.out}")
    if args.synthetic:
        args.model, args.out = None, args.model or f"{args.synthetic}-progressive"
    elif args.model is None:
        args.model, args.force = str(DEMO_MODEL), True
        args.out = str(DEMO_PLANES if args.planes else DEMO_CHECKPOINT)
    args.out = args.out or f"{Path(args.model).resolve().name}-progressive"
    return args


def split_layers(source: Source, out: Path, args: argparse.Namespace) -> None:
    """Stages of layers."""
    with nullcontext() if args.plan_only else whole_or_nothing(out, args.force) as folder:
        pruning = choose_block(source, args)
        stages = plan_stages(source, pruning, args.stages, args.max_file_gib * 2**30)
        print_plan(source, pruning, stages)
        model = f"--synthetic {args.synthetic}" if args.synthetic else args.model
        print_planes_instead(source, stages, model)
        if args.plan_only:
            return
        check_space(sum(stage.nbytes for stage in stages), folder, out)
        source.copy_side_files(folder)
        rows = write_stages(source, stages, folder)
        write_pruning(source, pruning, folder / "pruning")
        files = {path.name: dict(bytes=path.stat().st_size) for path in source.weight_files}
        write_manifest(source, rows, files, folder, pruning=manifest_of(pruning))


def split_planes(source: Source, out: Path, args: argparse.Namespace) -> None:
    """Stages of precision."""
    bits = parse_planes(args.planes)
    if args.calibration and source.config["architectures"][0] not in SUPPORTED_ARCHITECTURES:
        known = " and ".join(SUPPORTED_ARCHITECTURES)
        raise UsageError(
            f"--calibration {args.calibration}: the perplexity of stages is for {known} only; leave it out"
        )
    batches, full, with_layers = [], math.inf, False
    if args.calibration:
        if args.seq_len < 2:
            raise UsageError(f"--seq-len {args.seq_len}: perplexity takes two tokens or more")
        batches = sample_tokens(source, args.calibration, args.samples, args.seq_len)
        with_layers = compares_with_layers(source, args)
        full = compute_perplexity(source, batches)
        if full == math.inf:
            raise UsageError(f"{source.name} overflows {DTYPES[weight_dtype(source)]} here: leave --calibration out")
    with nullcontext() if args.plan_only else whole_or_nothing(out, args.force) as folder:
        if not args.plan_only:
            check_space(sum(tensor.nbytes for tensor in source.tensors.values()), folder, out)
            source.copy_side_files(folder)
        planes = code_planes(source, bits, folder, args.max_file_gib * 2**30)
        print_planes(source, planes)
        details, rows = {}, []
        if args.calibration:
            rows, details["calibration"] = measure_planes(source, planes, batches, full, with_layers, args)
        perplexities = [row["perplexity"] for row in rows if row["kind"] == "planes"] or [None] * len(bits)
        print_first_to_answer(planes, perplexities)
        if args.plan_only:
            return
        if rows:
            write_measures(rows, folder / "planes")
        stages = planes.finish()
        for stage, perplexity in zip(stages, perplexities, strict=True):
            stage |= {} if perplexity is None else {"perplexity": perplexity}
        write_manifest(source, stages, describe_files(source), folder, **details)


def main() -> int:
    args = parse_args()
    out = Path(os.path.realpath(args.out))
    try:
        if args.restore:
            with whole_or_nothing(out, args.force) as folder:
                restore(Path(args.model), folder)
        elif args.planes:
            split_planes(open_source(args), out, args)
        else:
            split_layers(open_source(args), out, args)
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # writing names no file
        reason = f"{error.filename or out} cannot be used ({error.strerror or error}): check its disk and permissions"
        print(f"{Path(__file__).name}: error: {reason}", file=sys.stderr)
        return 2
    if not args.plan_only:
        print(f"\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
