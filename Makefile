# Every target first creates or updates the virtual environment .venv.

PYTHON ?= python3
# Not ?=: many desktops set LANGUAGE=en_US:en in the environment for gettext.
LANGUAGE = zh
unexport LANGUAGE

PACKAGES := .venv/packages-installed
UNFINISHED := .venv/packages-unfinished
SHARED_OUT := -n auto --maxprocesses 4 --dist loadfile

.PHONY: help demo test bench results torture matrix lint dashboard

help:
	@echo "make demo        draw scenes, extract features, train, caption, in minutes (LANGUAGE=zh or en)"
	@echo "make test        lint and the tests (PYTEST_ARGS='-k beam' selects some)"
	@echo "make lint        ruff check, ruff format --check, mypy on the public interface"
	@echo "make bench       the speed table of the README, on this machine"
	@echo "make results     the tables of docs/results.md, in hours (FLICKR8K=folder WEIGHTS=folder; see bench/results.py)"
	@echo "make torture     all tests at full length: those of RELIABILITY.md, and the long forms of others"
	@echo "make matrix      the tests on the oldest supported packages, and on Python 3.10 and 3.13"
	@echo "make dashboard   visdom on http://127.0.0.1:8097, for train.py --dashboard"
	@echo "The first call creates .venv, about 6 GB. Another Python: make test PYTHON=python3.12"

demo: $(PACKAGES)
	.venv/bin/python demo.py --language $(LANGUAGE)

test: lint
	.venv/bin/python -m pytest $(SHARED_OUT) $(PYTEST_ARGS)

bench: $(PACKAGES)
	.venv/bin/python bench/decoders.py
	.venv/bin/python bench/decoders.py --encoder resnet101
	.venv/bin/python bench/decoders.py --decoder lstm
	.venv/bin/python bench/beam_search.py

results: $(PACKAGES)
	.venv/bin/python bench/results.py $(if $(FLICKR8K),--flickr8k '$(FLICKR8K)') $(if $(WEIGHTS),--weights '$(WEIGHTS)') \
	  $(if $(WORK),--work '$(WORK)') $(if $(THREADS),--threads $(THREADS)) $(RESULTS_ARGS)

torture: $(PACKAGES)
	@.venv/bin/uv pip install --quiet --only-binary :all: --python .venv/bin/python 'atheris>=2.3' 2>/dev/null || \
	  echo "atheris does not support this Python; the fuzz targets are skipped"
	.venv/bin/python -m pytest --torture $(SHARED_OUT) $(PYTEST_ARGS)

matrix: $(PACKAGES)
	.ci/matrix $(SHARED_OUT) $(PYTEST_ARGS)

lint: $(PACKAGES)
	.venv/bin/ruff check
	.venv/bin/ruff format --check --quiet
	.venv/bin/mypy

dashboard: $(PACKAGES)
	.venv/bin/python -m captioning.dashboard $(DASHBOARD_ARGS)

# The stamp is written last. An interrupted installation can leave packages that look complete to uv but lack files, so
# the mark of an unfinished one makes the next call reinstall everything.
$(PACKAGES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not Python 3.10 or newer; give another: make PYTHON=python3.12" >&2; exit 1; }
	@.venv/bin/python -c '' 2>/dev/null || rm -rf .venv  # its Python no longer exists
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv >/dev/null 2>&1 || \
	  { echo "error: $(PYTHON) -m venv .venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Creating .venv: about 6 GB, once."
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	@again=$$([ ! -e $(UNFINISHED) ] || echo --reinstall); touch $(UNFINISHED); \
	  .venv/bin/uv pip install $$again --compile-bytecode --python .venv/bin/python -c constraints.txt -e '.[dashboard,tensorboard,export,hub,serve,timm,parquet,ja,th,heic,test]'
	@mv $(UNFINISHED) $@
