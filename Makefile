# make train · test · race · check · bench · browser · soak · portable · wheel
# PYTHON=/path/to/python uses an environment that exists instead of building .venv.
SHELL := /bin/sh
ifdef PYTHON
  PY := $(PYTHON)
  READY := has-packages
  DEV := has-test-packages
else
  PY := .venv/bin/python
  READY := .venv/.ready
  DEV := .venv/.ready-for-tests
endif
PIP := .venv/bin/python -m pip --disable-pip-version-check install -qq
# make train TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch, and what torch needs, from
# there.
TORCH_INDEX ?=
# Packages are looked up, not imported: importing torch takes seconds.
LACKING := import sys; from importlib.util import find_spec; sys.exit(', '.join(n for n in sys.argv[1:] if not find_spec(n)) or 0)

.PHONY: train test race check bench browser soak wheel portable clean has-packages has-test-packages

train: $(READY)
	"$(PY)" -m data.prepare pysource
	"$(PY)" train_gpt.py configs/quickstart.toml

# Two files of tests at a time, as continuous integration has two cores. The longest come first, by
# tests/seconds.json, which --write-seconds writes.
test: $(DEV)
	OMP_NUM_THREADS=1 "$(PY)" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

# Dualized, Muon + AdamW and AdamW side by side on the embedded corpus, 2 runs at a time on 2 cores.
# It writes runs/race/report.png and report.html. Git ignores its lines, studies/results/race.jsonl.
race: $(READY)
	"$(PY)" -m data.prepare pysource
	"$(PY)" -m studies.speedrun configs/race/dualized.toml configs/race/muon.toml configs/race/adamw.toml \
		--name race --seeds 2 --budget steps=90 --horizons 0.4 0.6 --tries 1 --target-entry adamw \
		--workers 2 --train.eval-tokens 51200

check: $(DEV)
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m pyright

# Our code beside a peer's, in one run. benchmarks/RESULTS.md says what each benchmark needs.
bench: $(READY)
	"$(PY)" -m benchmarks.polar

# report.html in chromium (Debian: apt-get install chromium; CHROMIUM=/path for another).
# Screenshots are written to runs/browser.
browser: $(DEV)
	"$(PY)" -m pip install -q playwright==1.65.2
	NEEDS_BROWSER=1 BROWSER_SHOTS=runs/browser "$(PY)" -m pytest tests/test_browser.py

# Tests that are short in `make test`, at their full length: kills at 100 random moments, all layers of
# GPT-2, compiled C++, long simulations, the whole fleet of foreign models.
soak: $(DEV)
	NANODUAL_SOAK=1 "$(PY)" -m pytest -m soak

# The numerical tests as other processors, thread counts and versions of torch round.
# PYTHONS="/path/a /path/b" names further interpreters.
portable: $(DEV)
	"$(PY)" -m tests.portable $(PYTHONS)

# optim/ as the package `nanodual`, in dist/, without network. build/ is removed first: setuptools
# would pack what an older build has left in it.
wheel: $(READY)
	rm -rf build
	"$(PY)" -m pip wheel -q . --no-deps --no-build-isolation -w dist

has-packages:
	@"$(PY)" -c "$(LACKING)" torch tyro pydantic safetensors matplotlib || { echo "PYTHON=$(PY) lacks packages: $(PY) -m pip install -r requirements.txt"; exit 1; }

has-test-packages: has-packages
	@"$(PY)" -c "$(LACKING)" pytest xdist hypothesis || { echo "PYTHON=$(PY) lacks packages: $(PY) -m pip install -r requirements-dev.txt"; exit 1; }

# Built anew when requirements.txt changes. torch first and alone, so that nothing else can choose its build.
.venv/.ready: requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is %d.%d; nanodual needs 3.11 or newer" % sys.version_info[:2])'
	@echo "Setting up .venv, once: torch and the packages of requirements.txt. They are 270 MB to download and 1.2 GB on disk where torch"
	@echo "is a build for CPUs. On Linux PyPI has torch for CUDA, some 3 GB: TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids it."
	@python3 -m venv --clear .venv
	@$(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$$(grep '^torch==' requirements.txt)"
	@$(PIP) -r requirements.txt
	@touch $@
	@echo ".venv is ready: $$(du -sh .venv | cut -f1)"

.venv/.ready-for-tests: .venv/.ready requirements-dev.txt
	@echo "Adding what tests and checks need, the packages of requirements-dev.txt: 170 MB to download."
	@$(PIP) -r requirements-dev.txt
	@touch $@
	@echo ".venv is ready for tests: $$(du -sh .venv | cut -f1)"

clean:
	rm -rf .venv
