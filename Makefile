# make demo   set up everything, make the demo model, compare stock vLLM with ProgressiveServe on it, and its stages
# make test   set up everything and run the tests
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

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: demo/checkpoint/adapters/stage2/training.json
	$(SAY) "Cold start, stock vLLM against ProgressiveServe (each is started once; a minute or two)"
	@.venv/bin/python bench_coldstart.py --trials 1 --json demo/results/demo.json
	$(SAY) "The same server on storage so slow that every stage is seen (a minute)"
	@.venv/bin/python bench_coldstart.py --mode progressive --trials 1 --stretch 60 --json demo/results/demo-stages.json
	$(SAY) "What each stage knows, with and without its adapter (a minute)"
	@.venv/bin/python eval_triviaqa.py --json demo/results/quality-demo.json

test: demo/checkpoint/progressive.json
	$(SAY) "Tests"
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m pytest

demo/checkpoint/adapters/stage2/training.json: demo/checkpoint/progressive.json train_adapters.py
	$(SAY) "Training an adapter for stage 1 and for stage 2 (2 to 3 minutes on 2 cores)"
	@.venv/bin/python train_adapters.py $(DEMO_TRAINING) --force

demo/checkpoint/progressive.json: demo/model/config.json prune_and_split.py
	$(SAY) "Scoring the layers, pruning a quarter of them and splitting the checkpoint (seconds)"
	@.venv/bin/python prune_and_split.py

demo/model/config.json: .venv/installed demo/train_demo_llama.py
	$(SAY) "Training the demo model, a small LLaMA that knows a few hundred invented facts (2 to 3 minutes on 2 cores)"
	@.venv/bin/python demo/train_demo_llama.py --force

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
	rm -rf .venv demo/model demo/checkpoint demo/results
