# make train   trains the quick-start H-Net on this machine into runs/quickstart
# make test    checks style and runs the tests, except those marked slow, which make test-slow runs
# make lint    checks style
# make pretrained   makes runs/smollm2, a language model of 135 million parameters, once into the user's cache folder
# make rivals   times that model against other packages, in environments of their own that it makes
# make test-pretrained   tests on that model
# make test-tpu-aot, test-cuda-aot   compile kernels, and the train step, for TPUs and for a Hopper GPU without one
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

train: $(STAMP)
	$(RUN) -m experiments.train --config=quickstart --workdir=runs/quickstart

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(STAMP)
	$(RUN) -m pytest -m slow

pretrained: $(STAMP)
	$(RUN) -m experiments.pretrained --link=runs/smollm2

rivals: $(STAMP)
	$(RUN) -m experiments.benchmarks.language_model --workdir=runs/smollm2 --install

test-pretrained: $(STAMP)
	$(RUN) -m pytest -m slow tests/pretrained

# Uses an environment of its own, because jax with libtpu installed looks for a TPU at every start.
test-tpu-aot:
	$(PYTHON) -m venv .venv-plan
	.venv-plan/bin/python -m pip install --quiet --editable '.[test,plan]'
	.venv-plan/bin/python -m pytest -m slow tests/test_kernels.py tests/experiments/training/test_tpu_compile.py

# Needs Python 3.12 or newer (jax 0.11) and CUDA 13's ptxas; pip install nvidia-cuda-nvcc in .venv-cuda has one.
test-cuda-aot:
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --editable '.[test]'
	version=$$(.venv-cuda/bin/python -c 'import jax; print(jax.__version__)') && \
	  .venv-cuda/bin/python -m pip install --quiet --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest -m slow tests/test_kernels.py -k h200

lint: $(STAMP)
	$(VENV)/bin/ruff check .

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version), and 3.11 or newer is needed. Try: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[test]'
	@touch $(STAMP)

# runs/smollm2 is a link; what it points to stays.
clean:
	rm -rf $(VENV) runs

.PHONY: train test test-slow pretrained rivals test-pretrained test-tpu-aot test-cuda-aot lint clean
