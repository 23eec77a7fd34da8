# Everything runs in .venv, made on the first call; only python3, make and a package index are
# needed. A stamp file remembers that the environment stands.

PYTHON ?= python3
PROFILE ?= moji
SELECT ?= not ray
# RECOMPUTE=all computes everything here, and takes nothing over from the published run.
RECOMPUTE ?=
export RECOMPUTE
STAMP = .venv/.installed
RUN = .venv/bin/python

# glibc gives the memory of every large tensor back to the system and asks for it again at the next
# step, which took up to half of the time on virtual machines. Other C libraries ignore this.
export MALLOC_MMAP_THRESHOLD_ ?= 8589934592
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592
# OpenMP's idle threads spin by default, and take the cores from those that have work; where they
# never do, waking them up takes longer than many an operation of a small network.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 1000

.PHONY: reproduce test lab bench docs lint clean

reproduce: $(STAMP)  ## verify the published run, execute the notebooks; runs/$(PROFILE)
	$(RUN) -m vldnp reproduce --profile $(PROFILE)

# Two tests at a time with a thread each take less time than one with two. Files stay together: the
# tests of a file share what they made.
test: $(STAMP)  ## the test suite; SELECT="" runs the tests that start Ray too
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile \
	    --no-loadscope-reorder -m "$(SELECT)"

lab: $(STAMP)  ## open JupyterLab on the notebooks; ARGS="--no-browser" and others are passed on
	$(RUN) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks $(ARGS)

bench: $(STAMP)  ## operations of each part at the real models' sizes; ARGS=--time on a GPU
	$(RUN) tests/benchmarks/real_size.py $(ARGS)

docs: $(STAMP)  ## the pages and the notebooks as a site in build/docs; broken links fail
	$(RUN) docs/make_site.py

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	.venv/bin/lint-imports

clean:  ## remove the environment and all caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + \
	    sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $(STAMP)
