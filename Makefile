# A bare machine needs python3 (3.11 to 3.14, with venv), git, make and the package registries; the rest is built here.
#
#   make demo        a crew through Prefect, on this machine, without an account
#   make test        the quick tests: what each part does, and single runs on a Prefect server (as plain pytest does)
#   make check       lint, and the tests of what changed since main
#
# Variables: PYTHON=python3.12 to choose the interpreter, VENV=folder for the environment, ARGS="-k name" for pytest,
# WORKERS=0 to run the tests one after the other, SEED=7 for another choice of slow tests and other random histories,
# PINS= with a VENV of its own for the newest of all dependencies.

VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
HTTPX2_VENV ?= .venv-httpx2
BIN := $(VENV)/bin
UV := $(BIN)/uv
SAMPLE ?= 20
SEED ?=
MUTANTS ?= 30
WORKERS ?= 4
ARGS ?=
PINS ?= -c constraints.txt

# Most tests wait: for servers, crews, processes. So two cores are best used by four that run at once. One that fails is
# tried once more; a fourth of them fails at once.
AT_ONCE = -n $(WORKERS) --dist worksteal --reruns 1 --max-suite-reruns 3
SEEDED = $(if $(SEED),--seed $(SEED))
SAMPLED = --sample $(SAMPLE) $(SEEDED) --ignore tests/deployments/test_installed_wheel.py \
    --deselect "tests/test_benchmarks.py::test_every_part_has_a_goal[all]"

# 3.14 comes last since CrewAI does not install on it: the tests of real crews would be skipped.
PYTHONS = $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python3.14)
SUITABLE = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))

# Where it is set, as in many images, each of the hundreds of processes here would compile all of Prefect once more.
unexport PYTHONDONTWRITEBYTECODE

# What a change has to pass. `.ci/run` and .github/workflows/checks.yml read this list and run `make` for each of it.
SESSIONS = lint docs wheel-smoke coverage oldest

.PHONY: help sessions environment demo test check again programs proofs prove sample wheel-smoke mutate bench coverage oldest httpx2 lint format size docs audit dist constraints clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   make/make/p' Makefile
	@echo "Also: again (what ARGS names, twenty times under load), programs (tests that take much CPU time), proofs (of what is promised), sample (some of the slow ones), prove (all tests), wheel-smoke, mutate, bench, coverage, oldest, httpx2, lint, format, size, docs (the site), audit, dist, constraints, clean."

sessions:
	@echo $(SESSIONS)

# What sessions that run at the same time share.
environment: $(VENV)/.lint $(VENV)/.docs

# Running

demo: $(VENV)/.core
	@exec $(BIN)/prefect-crew demo $(ARGS)

test: $(VENV)/.tests
	$(BIN)/python -m pytest $(AT_ONCE) $(ARGS)

check: lint
	@tests=$$($(BIN)/python .ci/changed.py); \
	if [ -z "$$tests" ]; then echo "No test belongs to what changed."; exit; fi; \
	echo "pytest $$tests"; $(BIN)/python -m pytest $(AT_ONCE) -m "not slow" $$tests $(ARGS)

# What ARGS names, twenty times beside two processes that keep both cores busy, until it fails.
again: $(VENV)/.tests
	@yes > /dev/null & one=$$!; yes > /dev/null & two=$$!; trap "kill $$one $$two" EXIT; \
	for round in $$(seq 20); do $(BIN)/python -m pytest -q $(ARGS) || exit 1; done

# Those that take much CPU time. They start whole programs: the pages of the documentation, deployments, workers, scripts
# that are killed, CrewAI. Or they run batches, pipelines, reviews, budgets and commands on a Prefect server.
programs: $(VENV)/.tests
	$(BIN)/python -m pytest $(AT_ONCE) -m "(programs or heavy) and not slow" $(ARGS)

# That a run is started at most once, is not lost, and shows no secret: for every change of starting, waiting or records.
proofs: $(VENV)/.tests
	$(BIN)/python -m pytest $(AT_ONCE) -m "proofs and not slow" $(ARGS)

# All of them: the quick ones, the slow proofs and all pages side by side, with random data that nobody has seen unless
# SEED names them, then the other slow ones, which measure and load, one after the other.
SIDE_BY_SIDE = tests/proof tests/outcomes tests/test_docs.py
prove: test programs proofs
	$(BIN)/python -m pytest $(AT_ONCE) -m slow --seed $(or $(SEED),$(shell date +%s)) $(SIDE_BY_SIDE) $(ARGS)
	$(BIN)/python -m pytest -m slow $(addprefix --ignore ,$(SIDE_BY_SIDE)) $(ARGS)

# SAMPLE of the slow tests, always the same with one SEED.
sample: $(VENV)/.tests
	$(BIN)/python -m pytest $(AT_ONCE) -m slow $(SAMPLED) $(ARGS)

# The wheel alone in a fresh environment: the demo, and by night (NIGHTLY) a project that init wrote. WHEEL_PYTHON=3.12
# chooses its Python, WHEEL=dist/… a wheel that is built.
wheel-smoke: $(VENV)/.tests
	$(BIN)/python -m pytest $(if $(NIGHTLY),,-k "not project") tests/deployments/test_installed_wheel.py $(ARGS)

# Single mistakes in the modules that decide and post, MUTANTS of them (30) chosen by SEED, all in one MODULE if that is
# said (such as runs/start.py): who sees each.
mutate: $(VENV)/.tests
	$(BIN)/python tests/proof/mutate.py --mutants $(MUTANTS) $(if $(SEED),--seed $(SEED)) $(if $(MODULE),--module $(MODULE))

# All that has a goal of speed, against that goal: about an hour on a quiet machine, or ARGS=--small, or ARGS="run burst".
bench: $(VENV)/.tests
	@$(BIN)/python benchmarks/bench.py $(ARGS)

# The quick tests, programs, proofs and a sample of the slow ones in one go, and whether they reach enough lines.
# `coverage run`, not a plugin: pytest imports parts of the package, through its own plugin, before any other begins.
coverage: $(VENV)/.tests
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(AT_ONCE) $(SAMPLED) $(ARGS); code=$$?; \
	    $(BIN)/coverage combine --quiet && $(BIN)/coverage report && exit $$code

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry prefect_crew

format: $(VENV)/.lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Lines and code lines of each room of the package, beside the figures of its layout.
size: | $(UV)
	@$(BIN)/python .ci/size.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What a release needs: what is known against its dependencies, and its files, tried for a package index.

AUDIT = $(BIN)/pip-audit --disable-pip --no-deps --requirement build/runtime.txt

audit: build/runtime.txt
	$(AUDIT)

dist: build/runtime.txt
	rm -rf build/dist
	$(UV) build --quiet --out-dir build/dist
	$(BIN)/twine check --strict build/dist/*
	$(AUDIT) --format cyclonedx-json --output build/sbom.json

build/runtime.txt: pyproject.toml constraints.txt | $(VENV)/.release
	@mkdir -p build
	$(UV) pip compile --quiet --no-annotate --no-header -c constraints.txt pyproject.toml --output-file $@

# Building: each stamp file says that the environment holds one set of packages, as of these two files.

$(UV):
	@for python in $(PYTHONS); do \
	    if $$python -c '$(SUITABLE)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "None of $(PYTHONS) is a Python 3.11 to 3.14 with venv. Install one (Debian: python3-venv), or say PYTHON=…" >&2; \
	    exit 1; \
	fi; \
	echo "Building $(VENV) with $$($$found --version) …"; \
	$$found -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) uv

$(VENV)/.core: pyproject.toml constraints.txt | $(UV)
	@echo "Installing the package and Prefect (about 200 MB) …"
	@$(UV) pip install --quiet --python $(BIN)/python $(PINS) -e .
	@touch $@

$(VENV)/.tests: pyproject.toml constraints.txt | $(UV)
	@echo "Installing what the tests need, CrewAI among it (1.4 GB in all, some minutes on a slow line) …"
	@$(UV) pip install --quiet --python $(BIN)/python $(PINS) -e '.[all]' --group test --group peers
	@touch $(VENV)/.core $@

$(VENV)/.lint: pyproject.toml constraints.txt | $(VENV)/.tests
	@echo "Installing ruff, pyright and pre-commit …"
	@$(UV) pip install --quiet --python $(BIN)/python $(PINS) -e '.[all]' --group dev
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.core
	@echo "Installing mkdocs-material, mkdocstrings and what they need …"
	@$(UV) pip install --quiet --python $(BIN)/python $(PINS) -e . --group docs
	@touch $@

$(VENV)/.release: pyproject.toml constraints.txt | $(UV)
	@echo "Installing twine and pip-audit …"
	@$(UV) pip install --quiet --python $(BIN)/python $(PINS) --group release
	@touch $@

# The oldest Python and Prefect, with the oldest of everything else that pyproject.toml admits.

FIND_OLDEST = for python in $(OLDEST_PYTHON) python3.11 \
    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.11*/bin/python; do \
    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && \
    echo $$python && break; done

oldest:
	@python=$$($(FIND_OLDEST)); \
	if [ -z "$$python" ]; then \
	    echo "!! SKIPPED: make oldest found no Python 3.11 with venv, on PATH or under pyenv. Say OLDEST_PYTHON=… !!" >&2; \
	else \
	    $(MAKE) --no-print-directory oldest-tests OLDEST_PYTHON=$$python; \
	fi

# By night (NIGHTLY) all tests of what talks to Prefect: of the modules that import it, and of flows as a user writes
# them. The command line has its two commands that need most of Prefect here. By day those of _internal, the only ones
# that ever failed here alone.
TOUCHES_PREFECT = $(foreach name,_internal $(addprefix artifacts/,events run telemetry) flows \
    store \
    $(addprefix runs/,keys owners prune run start stop reviews/answer reviews/form) pipelines/run batches/run \
    receiver/events automations blocks budgets crew deployments flows prefect_away settings tasks testing worker \
    worker_conformance,$(wildcard tests/$(name) tests/$(dir $(name))test_$(notdir $(name)).py))

.PHONY: oldest-tests
oldest-tests: $(OLDEST_VENV)/.tests
	$(OLDEST_VENV)/bin/python -m pytest $(AT_ONCE) \
	    -m "not slow and not proofs and not crewai and not browser and not postgres" \
	    $(if $(NIGHTLY),$(TOUCHES_PREFECT) tests/cli/test_run.py tests/cli/test_deploy.py,tests/_internal) $(ARGS)

$(OLDEST_VENV)/.tests: pyproject.toml constraints.txt constraints-oldest.txt
	@echo "Building $(OLDEST_VENV) with $$($(OLDEST_PYTHON) --version) and $$(grep '^prefect==' constraints-oldest.txt) …"
	@$(OLDEST_PYTHON) -m venv --clear $(OLDEST_VENV)
	@$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(OLDEST_VENV)/bin/uv pip install --quiet --python $(OLDEST_VENV)/bin/python -c constraints-oldest.txt \
	    -e '.[data,sql]' --group test
	@touch $@

# The same with httpx2 in the place of httpx in every process of an environment of its own, without those that start whole
# programs: Prefect is about to move its client there. respx, which tests/client uses, does not know httpx2.

httpx2: $(HTTPX2_VENV)/.tests
	$(HTTPX2_VENV)/bin/python -m pytest $(AT_ONCE) -m "not slow and not programs and not proofs" $(TOUCHES_PREFECT) $(ARGS)

$(HTTPX2_VENV)/.tests: pyproject.toml constraints.txt | $(UV)
	@echo "Building $(HTTPX2_VENV), in which httpx is httpx2 …"
	@$(UV) venv --quiet --clear --python $(BIN)/python $(HTTPX2_VENV)
	@$(UV) pip install --quiet --python $(HTTPX2_VENV)/bin/python -c constraints.txt -e '.[data,sql]' --group test httpx2
	@echo 'import httpx2; httpx2.alias_httpx()' > \
	    "$$($(HTTPX2_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/httpx2_alias.pth"
	@touch $@

# The pins. The first file serves every supported Python; the second Python 3.11 only: the floors of pyproject.toml, the
# rest as of the days after Prefect 3.8.6, but for anyio and cyclopts, whose floors are younger, and today's test tools.

COMPILE = $(UV) pip compile --quiet --upgrade --no-annotate --custom-compile-command "make constraints"
FLOORS := $(VENV)/floors.txt

constraints: | $(UV)
	$(COMPILE) --universal --python-version 3.11 --extra all --group dev --group docs --group release pyproject.toml --output-file constraints.txt
	$(COMPILE) --python-version 3.11 --extra data --extra sql pyproject.toml --output-file $(FLOORS) \
	    --resolution lowest-direct --exclude-newer 2026-09-17 --exclude-newer-package anyio=2026-11-20 \
	    --exclude-newer-package cyclopts=2026-11-20
	$(COMPILE) --python-version 3.11 --extra data --extra sql --group test pyproject.toml --output-file constraints-oldest.txt \
	    --constraints $(FLOORS)

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(HTTPX2_VENV) build
