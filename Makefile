# Every target sets up what it needs by itself, as root on Debian 12 or RHEL 9.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vm test-db test-browser lint unit bench docs install-units fuzz man completions clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(READY) ## install system packages and a virtual environment with acctd in it

$(READY): pyproject.toml constraints.txt tools/system-packages
	tools/system-packages
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(READY) ## run a job that uses memory, CPU, disk and network, and show its account
	$(RUN) -m lab.demo

test: lint ## lint, types, and every test lane
	tools/system-packages vm db browser
	$(RUN) -m tests

lint: $(READY) ## formatter, linter and types
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/mypy

unit: $(READY) ## the lane that needs neither root nor a kernel
	$(RUN) -m pytest tests/unit

test-vm: $(READY) ## the lane of other cgroup layouts, and of a real systemd, in QEMU
	tools/system-packages vm
	$(RUN) -m pytest tests/vm

test-db: $(READY) ## the lane of real databases
	tools/system-packages db
	$(RUN) -m pytest tests/db

test-browser: $(READY) ## the lane of reports in a real Chromium
	tools/system-packages browser
	$(RUN) -m pytest tests/browser

bench: $(READY) ## all benchmarks; their tables belong into docs/performance.md
	$(RUN) -m bench.lifecycle
	$(RUN) -m bench.poll
	$(RUN) -m bench.chains
	$(RUN) -m bench.agent
	$(RUN) -m bench.hook
	$(RUN) -m bench.storm
	$(RUN) -m bench.oom
	$(RUN) -m bench.bombs
	$(RUN) -m bench.sinks
	$(RUN) -m bench.ingest
	$(RUN) -m bench.scrape
	$(RUN) -m bench.live
	$(RUN) -m bench.bill

docs: $(READY) ## make docs/metrics.md and dashboards/ anew from what they are made of
	$(RUN) -m exporters.reference > docs/metrics.md
	$(RUN) -m tools.grafana dashboards

man: $(READY) ## make the manual pages in man/
	$(RUN) -m acctd.cli.manual man

completions: $(READY) ## make completions/ for bash, zsh and fish anew
	$(RUN) -m acctd.cli.completion completions

install-units: ## install the systemd units, with DESTDIR and PREFIX as usual
	systemd/install

fuzz: $(READY) ## the fuzzers, for long; needs atheris
	$(RUN) -m tests.fuzz.fuzz_atheris -runs=200000

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
