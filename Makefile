# make demo | test | check | shards | bench-… ; every target sets up .venv first if it is not there.
PYTHON ?= python3
SHARDS ?= data/shards
SEEDS ?= 1
# One more than two cores, since some tests wait.
JOBS ?= 4
PY := .venv/bin/python
PIP = $(PY) -m pip -q --disable-pip-version-check
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR):$(CURDIR)/tests/helpers

.DELETE_ON_ERROR:
.PHONY: help setup demo test check shards lock clean

help:   ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 16

setup:   ## create .venv from requirements.lock, build what the compiler at hand can (again if it failed)
	@$(PYTHON) .ci/setup_env.py --retry

# Before every target: does what is not done yet, and where all is, nothing (a tenth of a second).
.PHONY: .venv/ready
.venv/ready:
	@$(PYTHON) .ci/setup_env.py

demo: .venv/ready   ## pretrain R-MAE and C-MAE on demo photographs, probe them, write runs/demo/report.html (DEMO="options")
	$(PY) eval/demo.py --seeds $(SEEDS) $(DEMO)

# As on a processor without AVX-512 and bf16 units.
ifeq ($(CPU),avx2)
test: export ATEN_CPU_CAPABILITY := avx2
test: export ONEDNN_MAX_CPU_ISA := AVX2
endif
test: .venv/ready   ## run the test suite, or TESTS="tests/eval …" (CPU=avx2: as on an older processor)
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

.PHONY: test-faults test-fresh test-cluster
test-faults: .venv/ready   ## 50 random kills and every known fault → docs/faults.md
	@$(PY) tests/faults --kills 50 --write docs/faults.md

test-fresh:   ## both README commands in bare Debian and Ubuntu roots → docs/fresh.md; needs root, mmdebstrap
	@tests/system/fresh.sh --write docs/fresh.md

# With numpy 2.4 the interpreter of Triton 3.6 (torch 2.11) and older fails.
.PHONY: test-torch
test-torch:   ## the unit tests under another torch, in build/torch-TORCH (TORCH=2.11.0 PYTHON=python3.12); GB to fetch
	@test -n "$(filter-out keep add,$(TORCH))" || { echo "error: say which: make test-torch TORCH=2.11.0" >&2; exit 2; }
	@test -e build/torch-$(TORCH)/ready || { $(PYTHON) -m venv build/torch-$(TORCH) && \
		grep -vE '^(torch|torchvision)==' requirements.in >build/torch-$(TORCH)/others.txt && \
		build/torch-$(TORCH)/bin/pip install -q --disable-pip-version-check torch==$(TORCH) torchvision \
			'numpy<2.4' -r build/torch-$(TORCH)/others.txt && \
		build/torch-$(TORCH)/bin/pip install -q --disable-pip-version-check --no-deps -e . && \
		touch build/torch-$(TORCH)/ready; }
	build/torch-$(TORCH)/bin/python -m pytest -n $(JOBS) --dist loadfile \
		$(or $(TESTS),tests/pipeline tests/kernels tests/shard_tools)

.PHONY: test-sanitize
test-sanitize: .venv/ready   ## the cropping JPEG decoder under AddressSanitizer on the image corpus and damaged files
	@$(PY) tests/sanitize

test-cluster: .venv/ready   ## the trainer on two namespace hosts: one killed, one cut off, preempted under Slurm; needs root
	@tests/cluster/run.sh

check: .venv/ready   ## style and types; changes nothing
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/mypy .ci/setup_*.py .ci/bundle.py

shards: .venv/ready   ## shard IMAGENET=/path (any layout) or unlabelled IMAGES=/path into SHARDS=data/shards, or demo photographs
ifdef IMAGENET
	$(PY) shard_tools/make_shards.py "$(IMAGENET)" "$(SHARDS)" --splits --resume
else ifdef IMAGES
	$(PY) shard_tools/make_shards.py "$(IMAGES)" "$(SHARDS)/train" --unlabelled --resume
else
	@echo "IMAGENET=/path/to/imagenet is not given: building demo shards (16 photographs) in $(SHARDS)"
	$(PY) shard_tools/demo_images.py data/demo/images
	$(PY) shard_tools/make_shards.py data/demo/images "$(SHARDS)" --resume --shard-size 1MiB
endif

.PHONY: mini-paper
mini-paper: .venv/ready   ## five claims of the paper on demo photographs, three seeds → runs/mini-paper/report.html
	@$(PY) eval/mini_paper.py --seeds $(if $(filter file,$(origin SEEDS)),3,$(SEEDS))

.PHONY: paper-cifar paper-cifar-page
paper-cifar: .venv/ready   ## the paper's claims on CIFAR10=PATH (folder or archive) → runs/paper-cifar/report.html; CIFAR=--dry-run first
	@$(PY) eval/cifar_paper.py $(if $(CIFAR10),--cifar10 "$(CIFAR10)") \
		--seeds $(if $(filter file,$(origin SEEDS)),3,$(SEEDS)) $(CIFAR)

paper-cifar-page: .venv/ready   ## the page of that study, rebuilt from docs/page/cifar10.tar.xz, without the runs → docs/page/cifar10.html
	@$(PY) eval/cifar_paper.py --page

.PHONY: test-page
test-page: .venv/ready   ## the report's page in a headless chromium, with axe-core from npm; skips what cannot be had
	@test -f build/axe/package/axe.min.js || { mkdir -p build/axe && cd build/axe && \
		npm pack --silent axe-core && tar xzf axe-core-*.tgz; } || true
	$(PY) -m pytest -rs tests/eval/test_report.py

report: .venv/ready   ## one page about RUNS="runs/a runs/b" → runs/report.html
	$(PY) eval/report.py $(RUNS) --output runs/report.html

.PHONY: tensorboard
tensorboard: .venv/ready   ## the curves of every run below RUNS=runs at http://localhost:6006 (PORT=6006)
	.venv/bin/tensorboard --logdir $(or $(RUNS),runs) --port $(or $(PORT),6006)

.PHONY: bench-step bench-roads bench-memory roofline
bench-step: .venv/ready   ## time, memory and FLOPs of the training step against MAE's; our loop (MAE=checkout of facebookresearch/mae)
	@test -f data/shards/train/manifest.json || $(MAKE) --no-print-directory shards
	$(PY) tests/bench/bench_step.py $(if $(MAE),--mae "$(MAE)")

bench-roads: .venv/ready   ## time and FLOPs of the cheaper roads' steps beside MAE's
	$(PY) tests/bench/bench_step.py --parts roads --rounds 3

bench-memory: .venv/ready   ## bytes per rank by ZeRO stage on 1, 2 and 4 ranks against the planner's formula
	$(PY) tests/bench/bench_memory.py

.PHONY: bench-micro-batch
bench-micro-batch: .venv/ready   ## images/s by micro-batch on this CPU: what "auto" rests on
	@$(PY) tests/bench/bench_micro_batch.py

.PHONY: bench-precision
bench-precision: .venv/ready   ## loss curves of tiny ViTs in each way of bf16 against fp32: what the shipped ds_configs rest on (PRECISION="options")
	@test -f data/shards/train/manifest.json || $(MAKE) --no-print-directory shards
	@$(PY) tests/bench/bench_precision.py $(PRECISION)

.PHONY: bench-launches
bench-launches: .venv/ready   ## launches of a step by phase and recipe, and its host time beside plain torch's (MAE=checkout COMPILED=1)
	@$(PY) tests/bench/bench_launches.py $(if $(MAE),--mae "$(MAE)") $(if $(COMPILED),--compiled)

roofline: .venv/ready   ## predicted time of a step on A100, H100 and B200, by phase (a prediction, not a measurement)
	$(PY) tests/bench/roofline.py

.PHONY: bench-scale
bench-scale: .venv/ready   ## the loader's bookkeeping at 1.28 M to 2 B samples: memory, first batch, order (METHODS="fork spawn")
	@$(PY) tests/bench/bench_scale.py $(if $(METHODS),--methods $(METHODS))

.PHONY: bench bench-data bench-peers bench-shards bench-infonce bench-gpu kernels-report test-gpu report
bench: bench-shards bench-data bench-infonce bench-step bench-memory   ## the benchmarks of loading, sharding, InfoNCE, the step and memory, one after another

bench-data: .venv/ready bench-peers   ## loading per core against 13 other libraries, on IMAGES=FOLDER of JPEGs or generated ones
	@$(PY) tests/bench/bench_data.py $(if $(IMAGES),--images "$(IMAGES)")

# Each peer's current release in an environment of its own; the benches skip what cannot be had.
bench-peers: .venv/ready
	@$(PY) tests/bench/peer_envs.py

bench-shards: .venv/ready bench-peers   ## sharding per process against other libraries' writers, on IMAGES=FOLDER or generated ones
	@$(PY) tests/bench/bench_shards.py $(if $(IMAGES),--images "$(IMAGES)")

.PHONY: bench-store
bench-store: .venv/ready   ## how long training waits for shards in a store of 1.2 times the bandwidth that it needs (STORE="options")
	@$(PY) tests/bench/bench_store.py $(STORE)

bench-infonce: .venv/ready   ## token_infonce against the materialised computation: memory and time
	@$(PY) tests/bench/bench_infonce.py

kernels-report: .venv/ready   ## kernels compiled for sm_80/90/100 without a GPU, and the bytes they move
	@$(PY) tests/bench/kernels_report.py

test-gpu: .venv/ready   ## the kernel tests on a CUDA device, interpreter off
	@$(PY) tests/kernels/run_on_gpu.py

bench-gpu: .venv/ready   ## each kernel beside its reference, eager and compiled, and a copy, on a CUDA device
	@$(PY) tests/bench/bench_gpu.py

.PHONY: gpu-check gpu-page
gpu-check: .venv/ready   ## all that a GPU must prove, in 8 minutes → build/gpu-check (MAE=checkout BUDGET=seconds; REHEARSE=1: on the CPU)
	@$(PY) tests/system/gpu_check.py $(if $(MAE),--mae "$(MAE)") $(if $(BUDGET),--budget "$(BUDGET)") $(if $(REHEARSE),--rehearse --output build/gpu-rehearsal)

gpu-page: .venv/ready   ## the figures of the last gpu-check → docs/gpu.md (RESULT=docs/page/gpu-h100.json: those kept there)
	@$(PY) tests/system/gpu_check.py --write docs/gpu.md $(if $(RESULT),--output "$(RESULT)")

.PHONY: bundle
PYTHON_VERSION ?= 3.12
TORCH ?= keep
bundle: .venv/ready   ## wheels, checkout and install.sh for a node without a network (PYTHON_VERSION=3.12 TORCH=keep|add)
	@$(PY) .ci/bundle.py --python $(PYTHON_VERSION) --torch $(TORCH)

lock: .venv/ready   ## resolve requirements.in into requirements.lock again
	$(PIP) install --dry-run --ignore-installed --report build/lock.json -r requirements.in
	$(PY) -c 'import json; r = json.load(open("build/lock.json"))["install"]; \
	print("\n".join(sorted("{name}=={version}".format(**p["metadata"]) for p in r)))' > requirements.lock

clean:   ## remove build products, not data or runs
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
