# make demo   compare JAX and PyTorch on this machine, on built-in pictures; no account, no download
# make test   the whole test suite, and lint
# Both create .venv first. On a GPU: make demo EXTRAS=...  (see the README)

PYTHON ?= python3
EXTRAS ?= jax,torch
STAMP = .venv/installed-$(subst $(comma),-,$(EXTRAS))
comma := ,

demo: $(STAMP)
	.venv/bin/python compare.py --report report

test: $(STAMP) .venv/tests-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade-strategy only-if-needed -e ".[$(EXTRAS)]"
	touch $@

.venv/tests-installed: $(STAMP)
	.venv/bin/python -m pip install --quiet -e ".[$(EXTRAS),test]"
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache report results.jsonl wandb

.PHONY: demo test clean
