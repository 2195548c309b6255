# make demo | test | check | shards | bench-… ; every target sets up .venv first if it is not there.
PYTHON ?= python3
SHARDS ?= data/shards
SEEDS ?= 1
PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DELETE_ON_ERROR:
.PHONY: help setup demo test check shards lock clean

help:   ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 16

setup: .venv/ready   ## create .venv from requirements.lock and build the fused ops

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python >= 3.11 is needed, $(PYTHON) is older; set PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv .venv || \
		{ echo "error: $(PYTHON) has no venv module; on Debian: apt install python3-venv"; exit 2; }
	$(PY) -m pip install -q --disable-pip-version-check --no-deps -r requirements.lock
	$(PY) -m pip install -q --disable-pip-version-check --no-deps -e .
	@$(MAKE) --no-print-directory pillow-simd
	@echo "building DeepSpeed's fused ops (about two minutes, once)"
	@$(PY) -c 'from pipeline.engine import build_ops; print("built:", ", ".join(build_ops()) or "nothing (no compiler); torch is used instead")'
	@touch $@

# Same files as Pillow, faster; needs a compiler and the headers of libjpeg and zlib.
.PHONY: pillow-simd
pillow-simd:
	@mkdir -p build
	@flag=$$(grep -qw avx2 /proc/cpuinfo && echo -mavx2); \
	if CC="cc $$flag" $(PY) -m pip wheel -q --disable-pip-version-check --no-deps --no-cache-dir \
		--no-binary :all: -w build/wheels pillow-simd==12.1.1.post0 2>build/pillow-simd.log; then \
		$(PY) -m pip uninstall -q -y pillow && \
		$(PY) -m pip install -q --disable-pip-version-check --no-deps build/wheels/pillow_simd-*.whl && \
		echo "pillow-simd: built $${flag:+with AVX2}"; \
	else \
		echo "pillow-simd: not built (see build/pillow-simd.log); plain Pillow is used instead"; \
	fi

demo: .venv/ready   ## pretrain R-MAE and C-MAE on demo photographs, probe them, write runs/demo/report.html
	$(PY) eval/demo.py --seeds $(SEEDS)

test: .venv/ready   ## run the test suite
	$(PY) -m pytest

check: .venv/ready   ## style and types; changes nothing
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

shards: .venv/ready   ## shard IMAGENET=/path (train/ and val/) into SHARDS=data/shards, or demo photographs
ifdef IMAGENET
	$(PY) shard_tools/make_shards.py $(IMAGENET)/train $(SHARDS)/train --resume
	$(PY) shard_tools/make_shards.py $(IMAGENET)/val $(SHARDS)/val --resume --classes-from $(SHARDS)/train
else
	@echo "IMAGENET=/path/to/imagenet is not given: building demo shards (16 photographs) in $(SHARDS)"
	$(PY) shard_tools/demo_images.py data/demo/images
	$(PY) shard_tools/make_shards.py data/demo/images/train $(SHARDS)/train --resume --shard-size 1MiB
	$(PY) shard_tools/make_shards.py data/demo/images/val $(SHARDS)/val --resume --shard-size 1MiB --classes-from $(SHARDS)/train
endif

lock: .venv/ready   ## resolve requirements.in anew into requirements.lock
	$(PY) -m pip install -q --dry-run --ignore-installed --report build/lock.json -r requirements.in
	$(PY) -c 'import json; r = json.load(open("build/lock.json"))["install"]; \
	print("\n".join(sorted("{name}=={version}".format(**p["metadata"]) for p in r)))' > requirements.lock

clean:   ## remove build products, not data or runs
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
