# make demo   compare JAX and PyTorch on this machine, on built-in pictures; no account, no download
# make bench  the same for this project, plain Keras fit and models by hand; half an hour
# make bench-gpu   this project and models by hand on a GPU, in three precisions and a small batch
# make test   the whole test suite, and lint
# make test-tensorflow   the same for the optional third backend, which it installs apart
# make test-images   build images and run them on the CPU; needs Docker and some 10 GB. More:
#   make test-images IMAGES=ojo.jax BUILD_ARGS="--build-arg BASE_IMAGE=..." GPU="--runtime nvidia"
# They create .venv first. On a GPU: make demo EXTRAS=cuda12,torch TORCH=cu126  (see the README)

# With what .venv was made, which later commands keep to.
-include .venv/choices
PYTHON ?= python3
EXTRAS ?= jax,torch
# PyTorch's build: cpu; cu126, for a GPU; empty, that of the package index, for CUDA 13 (driver 580).
TORCH ?= cpu
STAMP = .venv/installed-$(subst $(comma),-,$(EXTRAS))$(TORCH:%=-%)
comma := ,
LOCKS = requirements.lock requirements-torch.lock

ifneq ($(filter bench-gpu,$(MAKECMDGOALS)),)
ifneq ($(findstring cuda,$(EXTRAS))$(filter cpu,$(TORCH)),cuda)
$(error expected builds for a GPU: EXTRAS=cuda12,torch TORCH=cu126; got EXTRAS=$(EXTRAS) TORCH=$(TORCH))
endif
endif

demo: $(STAMP)
	.venv/bin/python compare.py --report report

# What each way to train costs here: this project, Keras' own fit, the keras.io example, by hand.
bench: $(STAMP)
	.venv/bin/python compare.py --repeats 5 --report results/bench_cpu \
	  --results-path results/bench_cpu.jsonl \
	  --entries jax torch native-jax native-torch jax:--trainer=fit torch:--trainer=fit \
	  keras-io-jax keras-io-torch -- --dataset cifar100 --validation-split 0 \
	  --train-images 512 --test-images 100 --num-epochs 2

# The same on a GPU, in each precision; a small batch is bound by starts of kernels. The first runs
# compile, one at a time; those that are measured find what they need. TOGETHER=4 is faster, with
# some 17 GB of the GPU's memory. (A cell: precision, batch size, training images)
bench-gpu: $(STAMP)
	for cell in "float32 256 8400" "tf32 256 16800" "bfloat16 256 16800" "bfloat16 32 4200"; do \
	  set -- $$cell; name=results/bench_gpu_$$1_$$2; \
	  work="--dataset synthetic --test-images 100 --precision $$1 --batch-size $$2 --train-images $$3"; \
	  work="$$work --validation-split 0.02 --no-best-weights"; \
	  entries="--entries jax torch native-jax native-torch"; \
	  .venv/bin/python compare.py --repeats 1 $$entries --results-path $$name.cold.jsonl -- \
	    $$work --num-epochs 2 || exit; \
	  .venv/bin/python compare.py --repeats 5 $$entries --start-together $(TOGETHER) \
	    --results-path $$name.jsonl --report $$name -- $$work --num-epochs 6 || exit; \
	done
TOGETHER ?= 1

test: $(STAMP) .venv/tests-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The third backend, in an environment of its own, since Keras takes TensorFlow where it finds it.
.venv-tensorflow/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv-tensorflow
	$(call install,.venv-tensorflow,jax$(comma)tensorflow-cpu$(comma)runner)
	touch $@

test-tensorflow: .venv-tensorflow/installed
	.venv-tensorflow/bin/python -m pytest tests/test_tensorflow.py

IMAGES ?= ook.jax ook.pytorch
test-images: $(STAMP) .venv/tests-installed
	IMAGES="$(IMAGES)" BUILD_ARGS="$(BUILD_ARGS)" GPU="$(GPU)" \
	  .venv/bin/python -m pytest tests/test_images.py --timeout 3600 -rs

# Extras (2) into an environment (1), everything by its hash. PyTorch comes last: what its build
# needs of CUDA goes before what JAX would take.
define install
	$(1)/bin/python harness/requirements.py --lock=requirements.lock dependencies \
	  $(subst $(comma), ,$(2)) <pyproject.toml >$(1)/locked.txt
	$(1)/bin/python -m pip install --quiet --no-deps --require-hashes -r $(1)/locked.txt
	$(if $(findstring torch,$(2)),$(1)/bin/python harness/requirements.py $(LOCKS:%=--lock=%) \
	  --torch=$(TORCH) >$(1)/torch.txt
	$(1)/bin/python -m pip install --quiet --no-deps --require-hashes \
	  $(TORCH:%=--extra-index-url https://download.pytorch.org/whl/%) -r $(1)/torch.txt)
	$(1)/bin/python -m pip check --quiet
endef

$(STAMP): pyproject.toml $(LOCKS)
	$(PYTHON) -m venv --clear .venv
	printf '%s\n' 'PYTHON ?= $(PYTHON)' 'EXTRAS ?= $(EXTRAS)' 'TORCH ?= $(TORCH)' >.venv/choices
	$(call install,.venv,$(EXTRAS))
	touch $@

.venv/tests-installed: $(STAMP)
	$(call install,.venv,$(EXTRAS)$(comma)test)
	touch $@

# After a change of pyproject.toml: all versions and hashes anew, for every platform.
LOCKED = jax cuda12 torch tensorflow tensorflow-cpu tensorflow-cuda12 sweep weights export test
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock" .venv/bin/uv pip compile --quiet --universal \
  --python-version 3.11 --generate-hashes
lock: $(STAMP)
	.venv/bin/python -m pip install --quiet uv==0.13.9
	$(COMPILE) $(addprefix --extra ,$(LOCKED)) --output-file requirements.lock pyproject.toml
	.venv/bin/python harness/requirements.py torch <pyproject.toml >.venv/torch.in
	$(COMPILE) --torch-backend cpu --no-deps .venv/torch.in >.venv/cpu.lock
	$(COMPILE) --torch-backend cu126 .venv/torch.in >.venv/cu126.lock
	cat .venv/cpu.lock .venv/cu126.lock >requirements-torch.lock

# Known vulnerabilities of what is locked: an error where one is being exploited. The first needs a
# network, the second what the first left; to audit elsewhere, take the folder along.
ADVISORIES ?= $(HOME)/.cache/keras-vit/advisories
EXPLOITED = known_exploited_vulnerabilities.json
KNOWN = $(addprefix $(ADVISORIES)/,PyPI.zip $(EXPLOITED))
advisories:
	mkdir -p $(ADVISORIES)
	cd $(ADVISORIES) && curl --fail --fail-early --silent --show-error --connect-timeout 10 --max-time 120 --remote-time \
	  --output PyPI.part https://osv-vulnerabilities.storage.googleapis.com/PyPI/all.zip \
	  --output exploited.part https://www.cisa.gov/sites/default/files/feeds/$(EXPLOITED)
	cd $(ADVISORIES) && mv PyPI.part PyPI.zip && mv exploited.part $(EXPLOITED)

audit: $(STAMP)
	.venv/bin/python harness/audit.py $(LOCKS) $(KNOWN)

clean:
	rm -rf .venv .venv-tensorflow .pytest_cache .ruff_cache report results.jsonl wandb

.PHONY: demo bench bench-gpu test test-tensorflow test-images lock advisories audit clean
