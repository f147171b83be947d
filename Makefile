# Everything a person runs. Each target sets itself up and writes to .venv and runs/; Ray itself keeps /tmp/ray and a token under ~/.ray.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Every process of a test that starts one would compile p48ray anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup chromium demo test test-fast test-ranges chaos test-clients check format clean

setup: $(VENV)/.ready

# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) pass through; constraints.txt has every pin.
$(VENV)/.ready: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The browser tests look at the report in a Chromium, and skip without one. Where apt can install it, it does; else nothing is changed.
chromium:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
		|| echo "chromium could not be installed: the browser tests will be skipped"; \
	else echo "no chromium here, and no apt or not root: the browser tests will be skipped"; fi

demo: setup
	$(BIN)/python jobs/compress.py --config configs/tiny.yaml

# Two processes share the tests by groups, the longest first (tests/conftest.py).
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

test: setup
	$(PYTEST) -rsfE

# What needs no Ray, no server and no browser, and is not slow.
test-fast: setup
	$(PYTEST) -m "not (ray or server or browser or slow)"

# The newest of every range in pyproject.toml; constraints.txt, which all else runs with, has the older ends of those that matter (docs/CONTRIBUTING.md).
UPPER := .venv-upper
test-ranges:
	$(PYTHON) -m venv --clear $(UPPER)
	$(UPPER)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(UPPER)/bin/python -m pip list --disable-pip-version-check
	$(UPPER)/bin/python -m pytest -rfE tests/model/test_family_parity.py tests/model/test_decoder.py \
		tests/integrations tests/checkpoint/test_decode.py tests/numerics/test_nvfp4.py tests/stages/test_family_jobs.py

# Every fault scenario with CHAOS_SEEDS seeds each, from CHAOS_FIRST on: 62 faults and about 17 minutes a seed on 2 cores; `make test` has the short form.
CHAOS_SEEDS ?= 3
CHAOS_FIRST ?= 0
chaos: setup
	$(BIN)/python -m pytest tests/chaos --chaos-seeds $(CHAOS_SEEDS) --chaos-first $(CHAOS_FIRST)

# A checkpoint in vLLM on a CPU (tests/clients/README.md). Its needs differ from ours, hence an environment of its own, shared by all checkouts.
test-clients: setup
	clients="$$($(PYTHON) tests/clients/environment.py)" && P48RAY_PYTHON=$(abspath $(BIN))/python \
		"$$clients/bin/python" -m pytest --override-ini "addopts=-q --strict-markers" tests/clients

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_folders.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(UPPER) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
