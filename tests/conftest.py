import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same numbers everywhere; `make gpu` sets it
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from echo_min.policy import tiny_model, tiny_tokenizer

torch.set_num_threads(1)  # models this small only lose time to a second thread


@pytest.fixture(scope="session")
def tokenizer():
    words = "align -k acorn tk align -k acorn usage: tk align -k FILE ok acorn done ls: cannot access"
    return tiny_tokenizer([words] * 3, vocab_size=400)


@pytest.fixture()
def model(tokenizer):
    return tiny_model(tokenizer, seed=0)
