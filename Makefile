# make demo    build .venv and train on four ranks, on real digits
# make test    build .venv and run all tests (those that need MNIST skip unless NOPROP_DATA names a folder that holds it)
# make notebooks    build .venv and run notebooks/ from top to bottom, to store their outputs anew
# make lint    ruff, mypy, import-linter
# make docs    the pages of docs/, with every setting and command, into build/docs
# make image-test   build the Dockerfile with buildah over a debootstrapped Debian and train in it (root, minutes, 20 GB);
#                   ARGS: for buildah build, e.g. ARGS=--build-arg=TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
RANKS ?= 4
ARGS ?=
BIN := .venv/bin

.PHONY: demo test notebooks lint docs image-test clean

demo: .venv/installed
	$(BIN)/torchrun --nproc_per_node=$(RANKS) -m noprop_dist.train $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

notebooks: .venv/installed
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

image-test: .venv/installed
	NOPROP_IMAGE='$(ARGS)' $(BIN)/python -m pytest tests/launch/test_image.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
