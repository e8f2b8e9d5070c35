# `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help install demo images test test-slow test-long gpu chaos drill-upgrade drill-ceph check docs screenshots reference audit lock format clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(READY)  ## Create .venv and install Darkroom into it

# TORCH_INDEX: where PyTorch comes from. Without a GPU, https://download.pytorch.org/whl/cpu spares 3 GB of CUDA.
$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Darkroom needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'uv>=0.9'
	rm -rf darkroom_diffusion.egg-info  # of an older checkout, whose entry points would count
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes --requirement requirements.lock
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) torch torchvision)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'  # PyTorch, where it is missing
	touch $@

# make demo                         5,000 digits
# make demo DATA=path/to/folder     your own images, as a data set named after the folder
#
# All that a demo makes lies in demo/, a DVC repository of its own: the checkout stays clean.
KILLS ?= 20

DATA ?= images/digits
DIGITS := $(filter images/digits,$(DATA))
SOURCE := $(if $(DIGITS),$(DATA),$(abspath $(DATA)))
NAME := $(notdir $(patsubst %/,%,$(DATA)))
# Three minutes, and no guidance, which needs classes: demo/params.yaml may be that of the digits.
SETTINGS := $(if $(DIGITS),,--set ingest.size=32 --set training.images=null --set training.minutes=3 \
  --set sampling.guidance=null --set sampling.guidance_interval=null)

demo: $(READY) demo/.dvc/config $(if $(DIGITS),images)  ## Run the whole pipeline on 5,000 digits, on this machine, in demo/
	cd demo && $(CURDIR)/$(BIN)/darkroom up
	cd demo && $(CURDIR)/$(BIN)/darkroom retrain "$(SOURCE)" --dataset "$(NAME)" $(SETTINGS)
	@cd demo && $(CURDIR)/$(BIN)/darkroom status

demo/.dvc/config: $(READY) params.yaml infra/demo_params.yaml dvc.yaml params.schema.json
	mkdir -p demo && cp dvc.yaml params.schema.json demo/ && cp $(if $(DIGITS),infra/demo_params.yaml,params.yaml) demo/params.yaml
	test -d demo/.dvc || (cd demo && $(CURDIR)/$(BIN)/dvc init --quiet --no-scm)
	touch $@

images: $(READY) demo/.dvc/config  ## Write the demo's images to demo/images/digits
	$(BIN)/python infra/demo_images.py demo/images/digits

# WORKERS: processes that run the tests; more than two cores, as some of the time is spent waiting for servers.

test: $(READY)  ## Run the tests (minutes)
	$(BIN)/pytest --numprocesses $(or $(WORKERS),3) --dist loadfile -m "not slow"

# Folders whose files take long come first, so that no process has one left when the others have ended.
test-slow: $(READY)  ## Run tests of servers, kills and browser (half an hour); `make test-long` runs the longest
	$(BIN)/pytest --numprocesses $(or $(WORKERS),3) --dist loadfile -m "slow and not long" --no-loadscope-reorder --ignore tests/chaos \
		tests/flows tests/docs tests/infra tests/test_*.py tests/diffusion

# make test-long SEED=7   the random cases of that seed, which each run prints
test-long: SEED := $(or $(SEED),$(shell date +%s))
test-long: $(READY)  ## Run the slow tests that take longest, the longest drills, and properties on random cases
	@echo "random cases: SEED=$(SEED)"
	$(BIN)/pytest --numprocesses $(or $(WORKERS),3) --dist loadfile -m "long or hypothesis" --ignore tests/chaos \
		--hypothesis-profile random --hypothesis-seed $(SEED)

# make gpu DEVICE=cpu               a rehearsal at reduced size
# make gpu PARTS="resume sampling"  some of it
gpu: $(READY)  ## Measure what only a GPU shows, in ten minutes: speed, equal bits, memory; writes benchmarks/gpu.md
	$(BIN)/python benchmarks/gpu.py --device $(or $(DEVICE),cuda) $(if $(PARTS),--parts $(PARTS))

chaos: $(READY)  ## Run all failure drills, with KILLS=20 kills each (two hours)
	KILLS=$(KILLS) $(BIN)/pytest --numprocesses $(or $(WORKERS),2) --dist loadfile -m drill --durations 0 --durations-min 60 --tb short -v

drill-upgrade: $(READY)  ## Test upgrades of databases of an older MLflow and Prefect (minutes)
	test -x .drill/bin/prefect || { $(PYTHON) -m venv .drill && .drill/bin/pip install --quiet 'mlflow[auth]==3.4.0' 'prefect==3.6.0' \
		'sqlalchemy<2.1' 'fastapi<0.120'; }  # newer ones than these versions can use
	OLD_BIN=$(CURDIR)/.drill/bin $(BIN)/pytest -s tests/drills/upgrade.py

drill-ceph: $(READY)  ## Run S3 tests and the pipeline on a one-node Ceph (minutes)
	trap 'tests/drills/ceph.sh stop .drill/ceph' EXIT; trap 'exit 1' INT TERM; rm -rf .drill/ceph; mkdir -p .drill; tests/drills/ceph.sh start .drill/ceph > .drill/ceph.env \
		&& eval "$$(sed 's/export /export TEST_/' .drill/ceph.env)" \
		&& $(BIN)/pytest tests/drills/ceph.py tests/flows/storage/test_s3.py tests/flows/datasets/test_s3_source.py \
			tests/flows/sampling/test_generate_batch.py tests/flows/retention/test_gc_beside_sample.py tests/flows/datasets/test_catalog.py tests/flows/registry/test_ledger.py \
			--deselect tests/flows/storage/test_s3.py::test_a_multipart_object_is_compared_by_its_bytes

check: $(READY) docs  ## Check lint, format, types, layers, sizes, secrets and documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports
	$(BIN)/python infra/ci/sizes.py
	PATH="$(CURDIR)/$(BIN):$$PATH" infra/ci/secrets.sh

docs: $(READY)  ## Build the documentation site in docs/_build; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

screenshots: $(READY)  ## Take the landing page's pictures of the studio, and of the gate in the demo's newest report
	$(BIN)/python docs/screenshots.py studio
	test ! -e demo/reports/digits/champion_comparison.html || $(BIN)/python docs/screenshots.py gate demo/reports/digits/champion_comparison.html

reference: $(READY)  ## Write the pages of docs/reference that follow from the code, and params.schema.json
	$(BIN)/python docs/generate.py

audit: $(READY)  ## Query PyPI for known vulnerabilities in the container images
	$(BIN)/pip-audit --no-deps --disable-pip --requirement requirements.lock --requirement infra/docker/torch-cuda.lock

lock: $(READY)  ## Update the lock files, of the checkout and of the container images, within pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python infra/docker/lock.py

format: $(READY)  ## Format the code and fix lint where possible
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Stop the local servers and delete everything but your images
	-$(BIN)/darkroom down
	-test ! -d demo || (cd demo && $(CURDIR)/$(BIN)/darkroom down)
	rm -rf demo/.darkroom demo/.dvc demo/dvc.* demo/data demo/runs demo/reports demo/samples .darkroom .drill docs/_build data runs reports samples $(VENV)
