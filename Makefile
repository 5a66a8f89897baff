PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q

# $(call apt_install,PACKAGE)
define apt_install
{ $(AS_ROOT) apt-get update -qq && $(AS_ROOT) apt-get install -y -qq --no-install-recommends $(1); } \
	|| { echo "that failed; run: apt-get install $(1)"; exit 1; }
endef
AS_ROOT = $(if $(filter 0,$(shell id -u)),,sudo)

.DEFAULT_GOAL := help
.PHONY: help install extras demo space test test-slow test-oldest lint format benchmark clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## Create the environment in .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		echo "Debian and Ubuntu have venv in a separate package; installing python3-venv"; \
		$(call apt_install,python3-venv); }
	$(PYTHON) -m venv $(VENV)

# Made once, and again only when the requirements change.
$(INSTALLED): requirements.txt requirements-dev.txt | $(BIN)/python
	$(PIP_INSTALL) -r requirements.txt -r requirements-dev.txt
	@touch $@

demo: $(INSTALLED)  ## Train the default recipe on real images and classify one
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process 2 \
		train_accelerate.py --output_dir outputs/demo --overwrite_output_dir
	$(BIN)/python -m ride_bf.classify outputs/demo/best hub_cards/examples/digit_9.png

# MODEL: a run's output folder, or a checkpoint's
space: MODEL ?= outputs/demo
space: PAGE := outputs/space/$(notdir $(abspath $(MODEL)))
space: $(VENV)/.extras  ## The demo page for a trained model: make space MODEL=outputs/demo
	@[ -d "$(MODEL)" ] || { echo "$(MODEL) is not there; train it by make demo, or name one: make space MODEL=DIR"; exit 1; }
	rm -rf "$(PAGE)"
	$(BIN)/python -m ride_bf.publish "$(MODEL)" --repo_id "local/$(notdir $(PAGE))" --dry_run --output_dir "$(PAGE)"
	MODEL="$(PAGE)" $(BIN)/python hub_cards/space/app.py

extras: $(VENV)/.extras  ## Install requirements-extras.txt and a browser, for ONNX, the demo page and their tests
	@command -v chromium >/dev/null || { echo "installing Debian's chromium"; $(call apt_install,chromium); }

# In one call, so that pip chooses versions that agree with all of the files.
$(VENV)/.extras: requirements.txt requirements-dev.txt requirements-extras.txt | $(BIN)/python
	$(PIP_INSTALL) -r requirements.txt -r requirements-dev.txt -r requirements-extras.txt
	@touch $(INSTALLED) $@

# The tests of a file share what they train, so they stay in one process. A process needs about a gigabyte.
IN_PARALLEL := -n auto --maxprocesses 4 --dist loadfile

test: $(INSTALLED)  ## Run the tests
	$(BIN)/python -m pytest $(IN_PARALLEL)

test-slow: $(INSTALLED)  ## Run the slow tests, which take minutes each
	$(BIN)/python -m pytest -m slow

test-oldest: $(OLDEST)/.installed  ## Run the tests on the lowest versions that the requirements allow
	$(OLDEST)/bin/python -m pytest $(IN_PARALLEL)

# Python 3.11 is the oldest version that `make install` accepts.
$(OLDEST)/.installed: requirements.txt requirements-dev.txt requirements-extras.txt $(INSTALLED)
	$(BIN)/uv venv --quiet --clear --python 3.11 $(OLDEST)
	$(BIN)/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct \
		-r requirements.txt -r requirements-dev.txt -r requirements-extras.txt
	$(OLDEST)/bin/python tests/lowest_versions.py requirements.txt requirements-extras.txt
	@touch $@

lint: $(INSTALLED)  ## Run the checks for a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m ride_bf.benchmark.stale

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(INSTALLED)  ## Measure the README's table of digits and its picture, an hour or less on 2 cores
	$(BIN)/python -m ride_bf.benchmark digits

clean:  ## Remove the environment and all results
	rm -rf $(VENV) $(OLDEST) outputs
