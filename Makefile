# make demo   compare JAX and PyTorch on this machine, on built-in pictures; no account, no download
# make test   the whole test suite, and lint
# make test-images   build images and run them on the CPU; needs Docker and some 10 GB. More:
#   make test-images IMAGES=ojo.jax BUILD_ARGS="--build-arg BASE_IMAGE=..." GPU="--runtime nvidia"
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

IMAGES ?= ook.jax ook.pytorch
test-images: $(STAMP) .venv/tests-installed
	IMAGES="$(IMAGES)" BUILD_ARGS="$(BUILD_ARGS)" GPU="$(GPU)" \
	  .venv/bin/python -m pytest tests/test_images.py --timeout 3600 -rs

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade-strategy only-if-needed -e ".[$(EXTRAS)]"
	touch $@

.venv/tests-installed: $(STAMP)
	.venv/bin/python -m pip install --quiet -e ".[$(EXTRAS),test]"
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache report results.jsonl wandb

.PHONY: demo test test-images clean
