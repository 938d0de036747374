# Everything a checkout needs, without root: `make` sets up, `make test` checks, `make demo` shows.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The build backend is pinned by the same file; old and new pip read it from different variables.
PIP    := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip
READY  := $(VENV)/.dsv4c-dev
ORACLE := $(VENV)/.dsv4c-oracle
ASCEND := build/ascend-env/.dsv4c-ready
RIVALS := build/rivals-env/.dsv4c-ready
DEMO   := build/kjv.dsv4
V41    := build/v41

.PHONY: setup demo v41 test test-targets lint oracle rivals bench clean
.DEFAULT_GOAL := setup

setup: $(READY)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dsv4c needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments." >&2; \
	  echo "On Debian and Ubuntu the package python3-venv is missing; or name another Python:" >&2; \
	  echo "  make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@

$(ORACLE): $(READY)
	$(PIP) install -q -c constraints.txt -e ".[oracle]"
	@touch $@

demo: $(READY)
	@mkdir -p $(dir $(DEMO))
	$(BIN)/dsv4c compile examples/kjv/checkpoint --target cpu -o $(DEMO)
	$(BIN)/dsv4c run $(DEMO) --prompt "In the beginning" --max-new-tokens 120 --temperature 0.7 --seed 7

# A random DeepSeek-V4.1 model: text, an image, Engram tables on disk, a report.
v41: $(READY)
	rm -rf $(V41)
	$(BIN)/python examples/v41/walk.py --output $(V41)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two workers share the cores already; a pool of threads in each would only fight over them. All tests of a
# file go to one worker, so that what they share is made once; files start in the order of tests/order.py.
PYTEST := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile \
  --no-loadscope-reorder

test: lint
	$(PYTEST)

$(ASCEND): $(READY) targets/ascend/kernels/requirements.txt
	$(BIN)/python -m dsv4c.targets.ascend.kernels.toolchain install $(dir $(ASCEND))
	@touch $@

oracle: $(ORACLE) $(ASCEND)

# Every arch of every device in all numerics, of which the other two runs take a bounded set; the kernels for
# them, and V4-Flash in its real shape.
test-targets: oracle
	$(PYTEST) -m "oracle or not oracle" tests/test_targets.py \
	  tests/test_static_artifact.py tests/test_static_formats.py tests/test_static_gpu.py \
	  tests/test_static_v41.py tests/test_acl_programs.py \
	  tests/test_mlu_bang.py tests/test_estimate.py \
	  tests/test_placement.py tests/test_ascend_toolchain.py tests/test_oracle_ascend_kernels.py \
	  tests/test_oracle_flash_shape.py tests/test_gpu_plan.py tests/test_gpu_plan_v41.py \
	  tests/test_gpu_plan_stages.py \
	  tests/test_oracle_gpu_kernels.py tests/test_oracle_gpu_kernels_v41.py \
	  tests/test_oracle_gpu_model.py tests/test_oracle_gpu_build.py tests/test_gpu_roofline.py \
	  tests/test_gpu_benchmark.py tests/test_oracle_gpu_benchmark.py tests/test_archs.py \
	  tests/test_session_packed.py tests/test_kernels_packed.py tests/test_kernels_coded.py

# Programs that the benchmark compares with; llama.cpp is built here, which takes minutes and a C++ compiler.
$(RIVALS): benchmarks/rivals-requirements.txt
	$(PYTHON) -m venv $(dir $(RIVALS))
	$(dir $(RIVALS))bin/python -m pip install -q -c constraints.txt -r benchmarks/rivals-requirements.txt
	@touch $@

rivals: $(RIVALS)

bench: $(ORACLE) $(RIVALS)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
