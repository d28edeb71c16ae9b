# Every target makes its own environment first: with uv where it is there, else with python3 -m venv and pip.
# An environment of one's own: `make test PY=python` installs nothing.
SHELL := bash
METHOD ?=
SEED ?=
STEPS ?=
DATA ?=
BACKBONE ?=
TRAINER ?=
EXPERIMENT ?=
ARGS ?=
DIR ?=
CKPT ?=
INPUT ?=
OUTPUT ?=
IMAGE ?=
POINT ?=
K ?=
FROM ?=
FILE ?=
NODES ?= 1
GPUS ?= 1
SITE ?=
METHODS ?=
SEEDS ?=
RUNS ?=
EVAL ?=
PUBLISHED ?=
NAME =
DRY ?=
SWEEP ?= $(METHOD)
TRIALS ?=
OFFLINE ?=
DEVICE ?=
SCALE ?=
JOBS ?= 2
VENV ?= .venv
ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
else
READY :=
endif
PYTHON3 ?= python3
# What run.py is told of a training; NAME is read from make's command line alone, because shells have a variable of that name.
GROUPS = $(if $(DATA),data=$(DATA)) $(if $(BACKBONE),backbone=$(BACKBONE)) \
	$(if $(TRAINER),trainer=$(TRAINER)) $(if $(STEPS),trainer.max_steps=$(STEPS))
WORDS = $(if $(EXPERIMENT),experiment=$(EXPERIMENT)) $(if $(METHOD),method=$(METHOD)) $(GROUPS) $(if $(SEED),seed=$(SEED)) $(if $(NAME),run.name="$(NAME)") $(ARGS)

# A variable on make's command line that no target of this call takes ends here, before anything is made or trained: a
# misspelt SEED would train seed 0. What a target takes are the capitals before a = in its line of help. So does a word
# that is no target: `make train stego` would train the default method first.
HERE := $(dir $(firstword $(MAKEFILE_LIST)))
PYTHON = $(firstword $(wildcard $(PY)) $(PYTHON3))
near = $(shell PYTHONPATH=$(HERE) $(PYTHON) -c 'import sys; from common.errors import did_you_mean as near; print(near(sys.argv[1], sys.argv[2:]))' \
	$(1) $(2) 2>/dev/null | grep 'did you mean' | tr -d '?')
TARGETS := $(shell grep -oE '^[a-z-]+:' $(firstword $(MAKEFILE_LIST)) | tr -d :)
STRANGE := $(firstword $(filter-out $(TARGETS) $(VENV)/.ready,$(MAKECMDGOALS)))
ifneq ($(STRANGE),)
UNNAMED := make alone lists them; other words have a name before them, as in make train METHOD=stego
$(error $(STRANGE): is no target of make; $(or $(call near,$(STRANGE),$(TARGETS)),$(UNNAMED)))
endif
EVERYWHERE := PY VENV PYTHON3 SHELL
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(filter-out -%,$(name))))
ifneq ($(GIVEN),)
TAKEN := $(shell for goal in $(or $(MAKECMDGOALS),help); do sed -n "s/^$$goal:.*\#\# //p" $(firstword $(MAKEFILE_LIST)); done | grep -oE '[A-Z][A-Z0-9_]*=' | tr -d = | sort -u)
WRONG := $(firstword $(filter-out $(TAKEN) $(EVERYWHERE),$(GIVEN)))
ifneq ($(WRONG),)
NEAR := $(call near,$(shell echo '$(WRONG)' | tr a-z A-Z),$(TAKEN))
$(error $(WRONG): $(if $(MAKECMDGOALS),is no word of make $(MAKECMDGOALS); $(if $(findstring .,$(WRONG)),settings go into ARGS="$(WRONG)=…",$(or $(NEAR),it \
	takes $(or $(TAKEN),none); variables of the environment stand before make)),name a target first, as in make train METHOD=stego))
endif
endif

# A file of tests is one job: its tests share their trainings. Long files come first (tests/conftest.py). A job is one
# thread.
PARALLEL = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup train pseudo eval predict retrieve clusters explain compare export import-checkpoint data weights list show-config doctor sweep slurm test test-fast test-ddp test-slurm \
	test-slow test-realdata test-gpu reference bench bench-gpu lint published docs lock clean

help: ## this page
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | awk -F'\t' '{printf "  make %-17s %s\n", $$1, $$2}'
	@echo "  Example: make train METHOD=hidden_positives DATA=folder SEED=3 NAME=mine ARGS=\"data.root=pictures\""

$(VENV)/.ready: requirements.lock pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
		echo "setting up $(VENV) with uv"; \
		{ [ -x $(VENV)/bin/python ] || uv venv -q --python $(PYTHON3) $(VENV); } && \
		uv pip install -q --python $(VENV)/bin/python -r requirements.lock && \
		uv pip install -q --python $(VENV)/bin/python --no-deps -e .; \
	else \
		echo "setting up $(VENV) with pip"; \
		{ [ -x $(VENV)/bin/python ] || $(PYTHON3) -m venv $(VENV); } && \
		$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.lock && \
		$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .; \
	fi
	@touch $@

setup: $(READY) ## the environment with everything, from requirements.lock

train: $(READY) ## METHOD=… [DATA=scenes] [BACKBONE=tiny] [TRAINER=auto] [EXPERIMENT=…] [SEED=0] [STEPS=200] [NAME=…] [ARGS="key=value …"]
	@$(PY) run.py train $(WORDS)

pseudo: $(READY) ## METHOD=… [DATA= BACKBONE= TRAINER= EXPERIMENT= SEED= STEPS= NAME= ARGS=]: the offline stage alone (pseudo-labels); train runs what is missing of it
	@$(PY) run.py pseudo $(WORDS)

eval: $(READY) ## CKPT=runs/x/checkpoints/last.ckpt [ARGS=…]: the scores of a checkpoint
	@$(PY) run.py eval ckpt="$(CKPT)" $(ARGS)

predict: $(READY) ## CKPT=… INPUT=folder OUTPUT=folder [ARGS=…]: cluster maps and overlays of any pictures
	@$(PY) run.py predict ckpt="$(CKPT)" input="$(INPUT)" output="$(OUTPUT)" $(ARGS)

retrieve: $(READY) ## CKPT=… IMAGE=… [K=8] [ARGS=…]: a picture's segments and their nearest in the data set, as png and html
	@$(PY) run.py retrieve ckpt="$(CKPT)" image="$(IMAGE)" $(if $(K),k=$(K)) $(ARGS)

clusters: $(READY) ## CKPT=… [SWEEP=6..40 | K=8] [ARGS=…]: what each cluster is, and a file to name them; another number of them
	@$(PY) run.py clusters ckpt="$(CKPT)" $(if $(filter-out file undefined,$(origin K)),k=$(K)) $(if $(filter-out file undefined,$(origin SWEEP)),sweep=$(SWEEP)) $(ARGS)

explain: $(READY) ## CKPT=… IMAGE=… POINT=x,y [ARGS=…]: why the patch at a pixel is what it is, as pngs and html
	@$(PY) run.py explain ckpt="$(CKPT)" image="$(IMAGE)" point=$(POINT) $(ARGS)

compare: $(READY) ## METHODS="a b" SEEDS="0 1 2" [DATA= BACKBONE= TRAINER= STEPS= NAME= ARGS=] or RUNS="runs/a runs/b" [EVAL="evaluation.crf=dense"] [CKPT=best] [PUBLISHED=cocostuff27]: trains what is missing, or scores anew; one table, one page
	@$(PY) run.py compare $(if $(METHODS),methods="$(METHODS)") $(if $(SEEDS),seeds="$(SEEDS)") $(if $(RUNS),runs="$(RUNS)") \
		$(if $(EVAL),eval="$(EVAL)") $(if $(CKPT),checkpoint="$(CKPT)") $(if $(PUBLISHED),published="$(PUBLISHED)") $(if $(NAME),name="$(NAME)") $(GROUPS) $(ARGS)

export: $(READY) ## CKPT=… OUTPUT=….pt2 [ARGS=…]: backbone, head and centroids as one torch.export program
	@$(PY) run.py export ckpt="$(CKPT)" output="$(OUTPUT)" $(ARGS)

import-checkpoint: $(READY) ## FROM=stego|hp FILE=… OUTPUT=….ckpt [DATA=…] [ARGS=…]: the authors' checkpoint as one of ours
	@$(PY) run.py import-checkpoint from=$(FROM) file="$(FILE)" output="$(OUTPUT)" $(if $(DATA),data=$(DATA)) $(ARGS)

sweep: $(READY) ## METHOD=hidden_positives [SWEEP=configs/sweep/<name>] [TRIALS=20] [OFFLINE=1] [DATA= BACKBONE= TRAINER= EXPERIMENT= SEED= STEPS= ARGS=]: by W&B, or here
	@$(PY) -m launch.sweep sweep=$(SWEEP) $(if $(METHOD),method=$(METHOD)) $(if $(TRIALS),trials=$(TRIALS)) \
		$(if $(filter-out 0,$(OFFLINE)),offline=true) $(if $(EXPERIMENT),experiment=$(EXPERIMENT)) $(GROUPS) $(if $(SEED),seed=$(SEED)) $(ARGS)

slurm: $(READY) ## METHOD=… NODES=2 GPUS=8 [SITE=launch/site.yaml] [DRY=1] [DATA= BACKBONE= TRAINER= EXPERIMENT= SEED= STEPS= NAME= ARGS=]: train on a SLURM cluster; GPUS=0: on CPUs
	@$(PY) -m launch.submit nodes=$(NODES) gpus=$(GPUS) $(if $(SITE),site=$(SITE)) $(if $(filter-out 0,$(DRY)),dry=true) $(WORDS)

data: $(READY) ## DATA=cocostuff27 [ARGS="root=folder rebuild=true"]: what to fetch, from where, under which terms; checks what is there
	@$(PY) run.py data $(if $(DATA),name=$(DATA)) $(ARGS)

weights: $(READY) ## [BACKBONE=dino_vits8] [ARGS="fetch=true backbone.weights=file"]: what to fetch, from where, under which terms; checks the file
	@$(PY) run.py weights $(if $(BACKBONE),backbone=$(BACKBONE)) $(ARGS)

list: $(READY) ## [METHOD= DATA= BACKBONE= TRAINER= EXPERIMENT=]: what there is; what one of it is, takes, and was published with
	@$(PY) run.py list $(if $(EXPERIMENT),experiment=$(EXPERIMENT)) $(if $(METHOD),method=$(METHOD)) $(if $(DATA),data=$(DATA)) \
		$(if $(BACKBONE),backbone=$(BACKBONE)) $(if $(TRAINER),trainer=$(TRAINER))

show-config: $(READY) ## METHOD=… [DATA= BACKBONE= TRAINER= EXPERIMENT= SEED= STEPS= NAME= ARGS=]: the merged configuration
	@$(PY) run.py show-config $(WORDS)

doctor: $(READY) ## versions, CUDA, faiss, disk, W&B: ok, or what to do
	@$(PY) run.py doctor

test: $(READY) ## all tests but slow, gpu, realdata and slurm ones (each has a target of its own); JOBS=2 at a time
	$(PARALLEL) -m "not slow and not gpu and not realdata and not slurm"

test-fast: $(READY) ## unit tests only: no training runs, no second process; JOBS=2 at a time
	$(PARALLEL) -m "not slow and not gpu and not realdata and not slurm and not ddp and not train"

test-ddp: $(READY) ## tests with two real processes
	$(PY) -m pytest -q -m "ddp and not gpu and not slurm"

test-slurm: $(READY) ## a two-node SLURM on this machine (installs it as root on Debian, else skips), a job, a preemption
	$(PY) -m pytest -q -m slurm

test-slow: $(READY) ## the long ones
	$(PY) -m pytest -q -m "slow and not gpu and not realdata"

test-realdata: $(READY) ## tests on real pictures; LABELFREE_REALDATA=folder that holds camvid/ (../shared/data)
	$(PY) -m pytest -q -m realdata

test-gpu: $(READY) ## tests that need a GPU
	$(PY) -m pytest -q -m gpu

reference: $(READY) ## DIR=folder [ARGS=…]: replay the authors' numbers
	@$(PY) -m tests.reference $(DIR) $(ARGS)

bench: $(READY) ## [ARGS=…]: time and memory beside the plain formulation; pictures per second by batch and processes; every step beside its floor
	@$(PY) -m benchmarks.hidden_positives $(ARGS)
	@$(PY) -m benchmarks.modularity
	@$(PY) -m benchmarks.search
	@$(PY) -m benchmarks.stego
	@$(PY) -m benchmarks.segments
	@$(PY) -m benchmarks.objects
	@$(PY) -m benchmarks.smoothness
	@$(PY) -m benchmarks.scratch.information
	@$(PY) -m benchmarks.principal_masks
	@$(PY) -m benchmarks.spectral
	@$(PY) -m benchmarks.concepts
	@$(PY) -m benchmarks.evaluation
	@$(PY) -m benchmarks.scaling
	@$(PY) -m benchmarks.steps

bench-gpu: $(READY) ## [DEVICE=cuda] [SCALE=full] [ARGS=…]: in eight minutes on a GPU: its tests, every method's step; DEVICE=cpu SCALE=tiny tries it all
	@$(PY) -m benchmarks.gpu --device $(or $(DEVICE),cuda) --scale $(or $(SCALE),full) $(ARGS)

lint: $(READY) ## ruff; links of the pages; import-linter: which room may import which (pyproject.toml)
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m docs.links
	@$(PY) -c "from importlinter.cli import lint_imports_command as lint; lint()" --no-logo --no-cache

published: $(READY) ## docs/published.md from configs/published.csv, what papers report
	@$(PY) -m reporting.published

docs: $(READY) ## README and docs/ as a site, in build/docs; a dead link ends it
	@$(PY) -m docs.links && NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

lock: ## requirements.lock from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --no-emit-index-url --no-header --no-annotate -q -o requirements.lock

clean: ## caches (never runs/)
	rm -rf .pytest_cache .ruff_cache build *.egg-info; find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
