# make demo      the main job on generated data: teacher, plain student, distilled student, for both tasks
# make test      lint, types and all tests
# make sweep     distillation with every family of the hosts; writes tests/compat.json and configs/README.md
# Each sets everything up by themselves on a fresh machine (.venv; about ten minutes, once).
#
# STACK=onedl    the maintained forks of the hosts instead of the published ones
# PYTHON=...     the interpreter for the virtual environment
# JOBS=2         tests side by side
# QUICK=1        demo in under 3 minutes;   SEEDS=3   demo with mean and spread

STACK ?= upstream
PYTHON ?= python3
SEEDS ?= 1
JOBS ?= 2
ARGS ?=
VENV := $(if $(filter upstream,$(STACK)),.venv,.venv-$(STACK))
RUN := $(VENV)/bin/python

.PHONY: demo test sweep lint env clean

env:
	@$(PYTHON) tools/dev/setup_env.py --stack $(STACK)

demo: env
	@$(RUN) tools/studies/demo.py --seeds $(SEEDS) $(if $(QUICK),--quick) $(ARGS)

lint: env
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

sweep: env
	@$(RUN) tools/studies/sweep.py $(ARGS)

test: lint
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

clean:
	rm -rf work_dirs .venv .venv-onedl
