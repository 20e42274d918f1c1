# Everything runs from a fresh clone; .venv is made on first use and kept up to date by its stamp file.
#
#   make demo       teacher -> modules -> student on two small data sets, with a report
#   make test       all tests but the slow ones;  make test-slow  those;  make gates  speed and import-time limits;  make lint
#   make bench      all benchmarks, as JSON in $(OUT); BENCHES="bench_route bench_nac" for some of them
#   make gpu-check  on a machine with a GPU, with the python3 that is there: gpu-test, then gpu-bench
#   make gpu-test   build in place and run the GPU tests; GPU_TESTS=tests/ops/test_route.py for some of them
#   make gpu-bench  the benchmarks alone, at most BENCH_SECONDS together, those of BENCHES in their order
#   make docs       the documentation site in site/, with mkdocs-material; needs no network
#   make wheel      wheel and source distribution in dist/
#   make soak       the property tests many times longer, and runs killed 30 times at random points of every phase

PYTHON ?= python3
MAX_JOBS ?= 2
TEST_PROCESSES ?= 2
JOBS ?= 2
OUT ?= benchmarks/results/local
SOAK_EXAMPLES ?= 5000
SOAK_KILLS ?= 30
# Mixtures first: a GPU run may end before the last one.
FIRST_BENCHES := bench_expert_mlp bench_vision_moe bench_route
BENCHES ?= $(FIRST_BENCHES) $(filter-out $(FIRST_BENCHES),$(basename $(notdir $(sort $(wildcard benchmarks/bench_*.py)))))
BENCH_SECONDS ?= 540
GPU_TESTS ?= $(shell grep -rl 'mark\.gpu' tests --include='test_*.py')

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo test test-slow gates bench gpu-check gpu-test gpu-bench lint docs wheel soak clean

demo: $(STAMP)
	$(BIN)/m2mkd run configs/digits_vmoe.yaml --jobs $(JOBS)
	$(BIN)/m2mkd run configs/digits_nac.yaml --jobs $(JOBS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(TEST_PROCESSES) --dist loadfile

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n $(TEST_PROCESSES) --dist loadfile --timeout 300

gates: $(STAMP)
	$(BIN)/python benchmarks/gates.py

bench: $(STAMP)
	mkdir -p $(OUT)
	for bench in $(BENCHES); do $(BIN)/python benchmarks/$$bench.py --json $(OUT)/$$bench.json || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu-check: gpu-test
	$(MAKE) gpu-bench

gpu-test:
	mkdir -p $(OUT)
	TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-9.0} M2MKD_BUILD_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m m2mkd_fast.info | tee $(OUT)/info.txt
	PYTHONPATH=. M2MKD_REQUIRE_GPU=1 $(PYTHON) -m pytest -m gpu -p no:cacheprovider $(GPU_TESTS)

gpu-bench:
	mkdir -p $(OUT)
	end=$$(($$(date +%s) + $(BENCH_SECONDS))); for bench in $(BENCHES); do \
		left=$$((end - $$(date +%s))); \
		if [ $$left -le 0 ]; then echo "$$bench: not begun within $(BENCH_SECONDS) s"; continue; fi; \
		PYTHONPATH=. timeout $$left $(PYTHON) benchmarks/$$bench.py --json $(OUT)/$$bench.json; code=$$?; \
		if [ $$code -eq 124 ]; then echo "$$bench: cut off after $(BENCH_SECONDS) s of all benchmarks"; \
		elif [ $$code -ne 0 ]; then exit 1; fi; done

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(STAMP)
	rm -rf dist
	MAX_JOBS=$(MAX_JOBS) $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .
	$(BIN)/python setup.py -q sdist

soak: $(STAMP)
	M2MKD_FAULT_KILLS=$(SOAK_KILLS) $(BIN)/python -m pytest -q -s tests/pipeline/test_faults.py --timeout 0
	M2MKD_FUZZ_EXAMPLES=$(SOAK_EXAMPLES) $(BIN)/python -m pytest -q -k fuzz --timeout 0
	@echo "each of these with up to $(SOAK_EXAMPLES) examples"

clean:
	rm -rf build dist site *.egg-info m2mkd_fast/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.packages: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r constraints.txt
	touch $@

$(STAMP): $(VENV)/.packages $(NATIVE)
	MAX_JOBS=$(MAX_JOBS) $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@
