# All commands that developers and CI run. PYTHON is used only once, to create .venv.
PYTHON ?= python3
CHROMIUM ?= chromium
BIN := .venv/bin
# files in which LONG_TESTS=1 makes other variants of tests, besides those that are marked
LONG_FILES := tests/reliability tests/model/kernels/test_fused.py tests/adversarial/test_prepare.py tests/commands/chat tests/commands/plan tests/planning/test_suggestions.py tests/end_to_end/test_gemma.py tests/end_to_end/test_lora_variants.py tests/end_to_end/test_full_training.py tests/end_to_end/test_initial_adapter.py tests/model/kernels/test_fake_cuda.py

# torch's builds for CPUs come without Triton; this is the release that its builds for CUDA name
TRITON_RELEASE := 3.7.1
TRITON := $(if $(filter Linux,$(shell uname)),build/triton/installed)

.PHONY: quickstart test test-fast families real compatibility browser floors reliability fuzz check lint types generate generated build docs picture clean

quickstart: .venv/installed
	$(BIN)/python examples/quickstart/quickstart.py

test: .venv/installed-dev $(TRITON)
	$(BIN)/python -m pytest

# everything that isn't marked slow: under two minutes on two cores
test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -m "not slow"

fuzz: .venv/installed-dev
	FUZZ_EXAMPLES=20000 $(BIN)/python -m pytest tests/adversarial/test_fuzz_*.py -n 0 --timeout 7200

reliability: .venv/installed-dev $(TRITON)
	LONG_TESTS=1 $(BIN)/python -m pytest $(LONG_FILES) -n 0 --timeout 14400
	LONG_TESTS=1 $(BIN)/python -m pytest -m "long or variants" $(addprefix --ignore=,$(LONG_FILES)) -n 0 --timeout 14400

# the whole chain on a tiny model of each model type, in all combinations
families: .venv/installed-dev
	LONG_TESTS=1 $(BIN)/python -m pytest tests/end_to_end/test_whole_chain.py --dist load --timeout 3600

# published checkpoints against stock transformers; needs a network and about 60 GB for the Hub's cache
real: .venv/installed-dev
	$(BIN)/python benchmarks/published.py

# tests that load merged checkpoints with transformers 4, CTranslate2 and a stock tokenizer
compatibility: .venv/installed-dev build/transformers-4/installed
	TRANSFORMERS_4_PYTHON=$(abspath build/transformers-4/bin/python) $(BIN)/python -m pytest tests/end_to_end/test_other_tools.py tests/end_to_end/test_families.py

# the page of `merge --to onnx` in Chromium, with transformers.js from npm
browser: .venv/installed-dev
	@which chromium chromium-browser google-chrome | grep -q . || { echo "make browser needs Chromium; install it with the package manager of your system"; exit 1; }
	npm install --silent --ignore-scripts --prefix build/transformers-js @huggingface/transformers@$$($(BIN)/python -c 'from t5tune.checkpoints.model_card import TRANSFORMERS_JS; print(TRANSFORMERS_JS)')
	NODE_MODULES=$(abspath build/transformers-js/node_modules) $(BIN)/python -m pytest tests/converting/test_onnx_page.py -n 0

# the tests with the oldest releases that pyproject.toml allows; set PYTHON=python3.11 if python3 is newer
floors: build/floors/installed
	build/floors/bin/python -m pytest

check: lint types generated test

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

# writes every file that is made from the code: documents, the schema, types for editors, the list of options
generate: .venv/installed-dev
	$(BIN)/python -m tools.generate

generated: .venv/installed-dev
	$(BIN)/python -m tools.generate --check

build: .venv/installed-dev
	$(BIN)/pip install --quiet build
	$(BIN)/python -m build

docs: .venv/installed
	$(BIN)/pip install --quiet -e '.[docs,onnx]'
	$(BIN)/python -m tools.live_page build/live
	$(BIN)/python -m tools.docs_site build/docs build/live
	$(BIN)/zensical build --strict --clean

# the picture in README.md: the report of the run whose command is next to it
picture: .venv/installed
	rm -rf build/scored
	mkdir -p build
	cd build && ../$(BIN)/t5tune train --config pocket --output-dir scored --eval-fraction 0.05 --eval-steps 50 --eval-generate 32
	$(CHROMIUM) --headless --no-sandbox --hide-scrollbars --window-size=1000,850 --screenshot=docs/report.png build/scored/report.html

clean:
	rm -rf build dist .cache .mypy_cache .ruff_cache runs

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("t5tune needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	@echo "installing into .venv; this takes a few minutes"
	$(BIN)/pip install --disable-pip-version-check --quiet -e .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[dev]'
	touch .venv/installed $@

# outside of .venv, where other libraries would import it in every process
build/triton/installed: .venv/installed-dev
	mkdir -p $(@D)
	{ $(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/pip install --disable-pip-version-check --quiet \
		--upgrade --no-deps --target $(@D) triton==$(TRITON_RELEASE); } && touch $@ \
		|| echo 'without Triton, the tests of kernels for GPUs are skipped'

build/transformers-4/installed: .venv/bin/python
	$(BIN)/python -m venv build/transformers-4
	build/transformers-4/bin/pip install --disable-pip-version-check --quiet 'transformers<5' torch safetensors sentencepiece ctranslate2
	touch $@

# the constraints are the requirements with == in place of >=
build/floors/installed: pyproject.toml
	$(PYTHON) -m venv --clear build/floors
	build/floors/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*(line.replace(">=", "==", 1) for line in project["dependencies"] + project["optional-dependencies"]["serve"] + project["optional-dependencies"]["onnx"]), sep="\n")' > build/floors/constraints.txt
	build/floors/bin/pip install --disable-pip-version-check --quiet --constraint build/floors/constraints.txt -e '.[dev]'
	touch $@
