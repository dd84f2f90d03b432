# make demo      the main job on generated data: teacher, plain student, distilled student, for both tasks
# make test      lint, types, the site, all tests; then some of them again without the processor's own kernels
# make docs      the site, docs/_build/html/index.html; a warning or a link that leads nowhere is an error
# make sweep     distillation with every family of the hosts; writes tests/compat.json and configs/README.md
# make gpu       what depends on the device: promises, mixed precision, streams, memory, DDP, cost; needs a torch with
#                CUDA and an mmcv that is compiled for it (CONTRIBUTING.md, "On a GPU"), and makes its CPU part without
# Each sets everything up by themselves on a fresh machine (.venv; about ten minutes, once).
#
# STACK=onedl    the maintained forks of the hosts instead of the published ones; make test runs what depends on them
#                most, FULL=1 everything
# STACK=rotate   MMRotate on top of the published hosts; see STACK=yolo
# STACK=yolo     MMYOLO on top of the published hosts; make test runs the tests that need it, and nothing else
# PYTHON=...     the interpreter for the virtual environment
# JOBS=2         tests side by side
# COVERAGE=1     tests also measure which lines of kd_mm they run, and print it: a fifth slower
# QUICK=1        demo in under 3 minutes;   SEEDS=3   demo with mean and spread

STACK ?= upstream
PYTHON ?= python3
SEEDS ?= 1
JOBS ?= 2
COVERAGE ?= 0
ARGS ?=
FULL ?=
VENV := $(if $(filter upstream,$(STACK)),.venv,.venv-$(STACK))
RUN := $(VENV)/bin/python
MEASURE := $(filter-out 0,$(COVERAGE))
# Stacks with a part of the tests: its mark has the same name.
MARKED := $(if $(FULL),,$(filter yolo rotate onedl,$(STACK)))
PLAIN := tests/test_examples.py tests/ops/test_functional.py tests/regions tests/adapters tests/test_golden.py

.PHONY: demo test docs sweep gpu lint env clean

env:
	@$(PYTHON) tools/dev/setup_env.py --stack $(STACK)

demo: env
	@$(RUN) tools/studies/demo.py --seeds $(SEEDS) $(if $(QUICK),--quick) $(ARGS)

lint: env
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

docs: env
	@$(RUN) -m sphinx -W --keep-going -q -j $(JOBS) -b html -c docs . docs/_build/html
	@echo "[docs] docs/_build/html/index.html"

sweep: env
	@$(RUN) tools/studies/sweep.py $(ARGS)

gpu: env
	@$(RUN) tools/dev/gpu_check.py $(ARGS)

test: $(if $(MARKED),env,lint docs)
ifneq ($(MARKED),)
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal -m $(MARKED) $(ARGS)
else
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal $(if $(MEASURE),--cov=kd_mm --cov-report=) $(ARGS)
	@# Once more what prints or compares numbers, with the plain kernels of torch, as on a processor without AVX.
	@ATEN_CPU_CAPABILITY=default KD_MM_TEST_THREADS=2 $(RUN) -m pytest --durations=0 --durations-min=5 $(PLAIN)
	@$(if $(MEASURE),$(RUN) tools/dev/coverage_summary.py,:)
endif

clean:
	rm -rf work_dirs .venv .venv-* docs/_build docs/generated
