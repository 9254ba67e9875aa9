# `make demo` and `make test` are all there is to type; both set up .venv first, once.
SHELL := /bin/bash
.DEFAULT_GOAL := help

BIN := .venv/bin
PYTHON := $(BIN)/python
# Threads that spin while they wait slow a busy machine down several times.
export OMP_WAIT_POLICY ?= PASSIVE
# More for pytest, e.g. make test PYTEST_ARGS="-x -k solver"
PYTEST_ARGS ?=
# Most tests of servers wait for one core; two at a time take a third less, or better. Tests of a file share what they make.
PYTEST_WORKERS ?= 2
# What depends on the CPU: kernels, and answers of a server with the kernel that is chosen.
AVX2_TESTS := $(addprefix tests/gamma_vllm/test_,kernels.py native.py linear.py embedding.py moe.py) \
	tests/e2e/test_server.py::test_the_openai_api_answers_and_comes_back_after_its_worker_was_killed
VERSIONS ?= 0.29.0 0.30.0 0.31.0

.PHONY: $(shell sed -n 's/^\([a-z0-9-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## show these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with everything that the other targets need (nothing to do the second time)
	@bash deploy/setup.sh

demo: setup ## from a model folder to a served mixed-precision endpoint, and a completion from it (MODEL=smollm2: a real model, and its answer)
	@$(PYTHON) benchmarks/demo/run.py $(MODEL)

bench-demo: setup ## what the demo model writes at 16 bits, at the demo's budget and at 2 bits
	@$(PYTHON) benchmarks/demo/bench.py

bench-bank: setup ## from a new budget to a ready server: from the bank, against export and serve
	@$(PYTHON) benchmarks/bank/bench.py

bench-cli: setup ## CPU time of commands that are asked often, over that of the imports they need
	@$(PYTHON) benchmarks/cli/bench.py

bench-experts: setup ## a layer of experts on CPU: widths against vLLM's own in bfloat16, and what widths of their own cost
	@$(PYTHON) benchmarks/experts/bench.py

bench-sidecar: setup ## the sidecar under load: cached allocations, fresh solves, overload, memory (needs wrk)
	@$(PYTHON) benchmarks/sidecar/bench.py

bench-solver: setup ## how fast the integer program is solved, at the sizes of a 32B model and of one with experts
	@$(PYTHON) benchmarks/solver/bench.py

bench-vocabulary: setup ## what embedding and lm_head in the program are worth, at equal bytes of all tensors
	@$(PYTHON) benchmarks/vocabulary/bench.py

bench-channel-blocks: setup ## whether widths by block of output channels beat widths by module, at equal bytes
	@$(PYTHON) benchmarks/channel_blocks/bench.py

bench-quantizers: setup ## KL of rtn, mse, gptq, kfac and learned-rounding at 2, 3 and 4 bits, groups of 64 and 128
	@$(PYTHON) benchmarks/quantizers/bench.py

bench-mixes: setup ## which candidates are best beside others of any width, one block of ref-7m
	@$(PYTHON) benchmarks/quantizers/mixes.py

bench-learning: setup ## CPU time of learning on the shapes of SmolLM2-135M, before and now, side by side (an hour of CPU)
	@$(PYTHON) benchmarks/learning/bench.py

bench-real: setup ## models that people know against uniform widths, llama.cpp, AutoRound and GPTQModel (many hours; says first what it downloads)
	@$(PYTHON) benchmarks/real_models/bench.py $(ARGS)

bench-scale: setup ## peak memory and seconds a block on the shapes of Qwen3-32B and Llama-3.1-8B (an hour or two)
	@$(PYTHON) benchmarks/scale/bench.py

bench-allocation: setup ## every method of allocation on the same candidates and bytes (about two hours of CPU; goes on where it stopped)
	@$(PYTHON) benchmarks/allocation/bench.py

bench-calibration: setup ## KL after calibration on less text than 128 sequences (an hour of CPU; goes on where it stopped)
	@$(PYTHON) benchmarks/calibration/bench.py

bench-kernels: setup ## products of the CUDA kernels, layer by layer, beside bfloat16 and Marlin (needs an NVIDIA GPU)
	@$(PYTHON) benchmarks/kernels/bench.py

bench-serving: setup ## vllm serve with gamma checkpoints beside bfloat16 and stock 4-bit (about 20 minutes; goes on where it stopped)
	$(PYTHON) benchmarks/serving/bench.py

architectures: setup ## allocator/model/architectures.json and docs/models.md anew, from transformers and vLLM (some minutes)
	@$(PYTHON) -m allocator.blocks.discovery.table
	@$(PYTHON) benchmarks/models/table.py

test: lint test-tools ## all checks and all tests; what could not be tested is listed at the end
	$(PYTHON) -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-fast: setup ## the tests without those marked slow
	$(PYTHON) -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

test-tools: setup ## what tests use beside .venv: helm, chromium, ...; into ~/.cache/gamma-tools, as root from Debian too (once)
	@bash tests/tools/fetch.sh

test-gpu: setup ## the tests that need an NVIDIA GPU: kernels, captured graphs, whole engines
	$(PYTHON) -m pytest -m gpu tests $(PYTEST_ARGS)

test-avx2: setup ## what depends on the CPU, with instructions above AVX2 hidden from us: kernels, and an answer
	GAMMA_CPU_ISA=avx2 $(PYTHON) -m pytest $(AVX2_TESTS) $(PYTEST_ARGS)

test-versions: setup ## the plugin on older vLLM for CPU (VERSIONS="0.29.0 0.30.0 0.31.0"); five minutes each
	@bash deploy/other_vllm.sh $(VERSIONS)

images: ## build the images with docker, podman or buildah, and try them (IMAGES="gamma-sidecar", IMAGES_ARGS="--push ...")
	@python3 deploy/images.py $(IMAGES) $(IMAGES_ARGS)

audit: setup ## known vulnerabilities of the packages in the sidecar's image (asks PyPI for advisories)
	@$(PYTHON) deploy/audit.py

lint: setup ## style, format, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and what the demo left behind (.venv stays)
	rm -rf demo-out bench-out build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find allocator gamma_vllm benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
