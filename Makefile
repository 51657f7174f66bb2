# `make demo` and `make test` start from a bare clone; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS ?= ignore
PORT ?= 5000
SOURCES ?= pretrain pretrain_class pretrain_text pretrain_latent
EXTRAS ?= demo,text,pipeline,kubernetes,sweep,dev
WORKERS ?= 2
IMAGE ?= domainstudio
DOCKER ?= docker
SEED ?= 0
MINUTES ?= 10
# Workers side by side, each with its own servers. A file's tests stay together: they share trained models.
pytest = python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# A Python that can run this, whatever `python3` is here.
find_python = for p in $(PYTHON) python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && exit; done; \
	echo "error: Python 3.11 or 3.12 is needed; name it: make demo PYTHON=/path/to/python3.12" >&2; exit 1

.PHONY: help
help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' Makefile

pip = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The file keeps what was installed: a checkout makes files new that say nothing new. A .venv that is a link belongs
# to another checkout, of which it stays the editable installation.
.venv/installed: pyproject.toml constraints.txt
	@if cat $^ | cmp --silent - $@; then touch $@; exit; fi; \
	if ! [ -x $(BIN)/python ]; then \
		echo "installing into .venv (some minutes, once)"; python=$$($(find_python)); $$python -m venv .venv; \
	else echo ".venv$$([ -L .venv ] && echo " ($$(readlink .venv))") is older than constraints.txt: updating it"; fi; \
	if [ -L .venv ]; then $(pip) --requirement constraints.txt; \
	else $(pip) --constraint constraints.txt --editable '.[$(EXTRAS)]'; fi; \
	cat $^ > $@

.PHONY: install
install: .venv/installed  ## Create .venv from the pinned constraints

.PHONY: demo
demo: .venv/installed  ## Ten faces with sunglasses adapt a model of drawn faces; ends with report.html
	@started=$$SECONDS; dvc repro; \
	echo "done in $$((SECONDS - started)) s: open report.html, or 'make ui' for the runs and models"

.PHONY: test
test: .venv/installed  ## Run all tests that need neither a GPU, nor the internet, nor a whole team's servers
	$(pytest) -m "not gpu and not network and not team"

.PHONY: test-fast
test-fast: .venv/installed  ## Run the quick ones of them, without servers (below two minutes)
	$(pytest) -m "not slow and not gpu and not network and not team" tests/unit tests/reference

.PHONY: test-faults
test-faults: .venv/installed  ## Damage, full disks and kills, thousands of them: SEED=0 MINUTES=10
	python -m tests.faults --seed $(SEED) --minutes $(MINUTES)

.PHONY: test-team
test-team: .venv/installed  ## Run the tests on a team's servers and on a Ray cluster (a quarter of an hour)
	python -m pytest -m team

.PHONY: check
check: .venv/installed  ## Lint, formatting and types
	ruff check .
	ruff format --check .
	mypy

.PHONY: ui
ui: .venv/installed  ## Open the MLflow UI on the local runs and models
	@echo "MLflow at http://127.0.0.1:$(PORT) (Ctrl-C ends it)"
	@mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(PORT)

.PHONY: services
services: .venv/installed  ## Start a team's servers here: S3, PostgreSQL, MLflow, Prefect; OPTIONS="--ports 9000"
	@python -m services start $(OPTIONS)

.PHONY: services-stop
services-stop: .venv/installed  ## Stop them; their data stays in .services
	@python -m services stop

.PHONY: services-status
services-status: .venv/installed  ## Show which of them answer, where, and their logs
	@python -m services status

.PHONY: image
image:  ## Build the image of this commit, as IMAGE:<commit>; IMAGE=registry.example/domainstudio DOCKER=podman
	@test -z "$$(git status --porcelain)" || { echo "error: commit first: the image is named after the commit" >&2; exit 1; }
	@commit=$$(git rev-parse HEAD); \
	$(DOCKER) build --file deploy/Dockerfile --build-arg COMMIT=$$commit --tag $(IMAGE):$$commit .

.PHONY: flow
flow: .venv/installed  ## The same pipeline as a Prefect flow
	python -m flows.adapt

.PHONY: pull
pull: .venv/installed  ## Get what others made from DVC's remote, and say in one line what was never pushed
	@python -m flows.pull

.PHONY: pretrain
pretrain: .venv/installed  ## Retrain the demo's source models (hours on a CPU): SOURCES="pretrain pretrain_text"
	python -m stages.pretrain $(SOURCES)
