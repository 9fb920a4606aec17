"""The peak memory of a long answer's log-probs: what the arithmetic says, not tokens x vocabulary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dteframe.engine.logprobs import linear_logprobs
from dteframe.memory import DTYPE_BYTES, head_bytes
from dteframe.records import ModelSizes

NUM_TOKENS, VOCABULARY, HIDDEN = 4096, 151_936, 32
"""A long answer and the vocabulary of Qwen2.5; the hidden size is small, to leave the logits alone."""
MARGIN = 1.3
PLAIN = """
def linear_logprobs(hidden, weight, bias, targets, temperature):
    table = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    return table.gather(-1, targets[:, None]), None
"""
MEASURE = """
import json, sys
import torch
from dteframe.engine.logprobs import linear_logprobs

num_tokens, vocabulary, hidden_size, dtype = json.loads(sys.argv[1])
torch.set_num_threads(1)

def peak_bytes():
    # getrusage would begin with the peak of the process that started this one.
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

def score(num_tokens):
    hidden = torch.randn(num_tokens, hidden_size).to(getattr(torch, dtype)).requires_grad_()
    targets = torch.zeros(num_tokens, dtype=torch.long)
    before = peak_bytes()
    linear_logprobs(hidden, weight, None, targets, 1.0)[0].sum().backward()
    return peak_bytes() - before

weight = torch.randn(vocabulary, hidden_size).to(getattr(torch, dtype)).requires_grad_()
score(1)  # What torch loads at the first use is no part of it.
weight.grad = None
print(score(num_tokens))
"""


def measured_bytes(program: str, num_tokens: int, dtype: str) -> int:
    """Go forward and backward in a process of its own; give how far its peak rose."""
    given = json.dumps([num_tokens, VOCABULARY, HIDDEN, dtype])
    done = subprocess.run(
        [sys.executable, "-c", program, given],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def told_bytes(num_tokens: int, dtype: str, is_trained: bool) -> int:
    sizes = ModelSizes(
        num_parameters=0,
        parameter_bytes=DTYPE_BYTES[dtype],
        num_layers=1,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_heads=1,
        num_key_value_heads=1,
        head_size=HIDDEN,
        vocabulary_size=VOCABULARY,
        ties_embeddings=True,
        num_adapter_parameters=0 if is_trained else 1,
    )
    return head_bytes(sizes, num_tokens)


@pytest.mark.slow
def test_a_long_answers_log_probs_take_what_the_arithmetic_says():
    told = told_bytes(NUM_TOKENS, "float32", is_trained=True)
    assert told / MARGIN < measured_bytes(MEASURE, NUM_TOKENS, "float32") < told * MARGIN


@pytest.mark.slow
def test_a_plain_softmax_of_a_quarter_of_the_tokens_takes_more_than_all_of_them_in_chunks():
    told = told_bytes(NUM_TOKENS, "float32", is_trained=True)
    plain = MEASURE.replace("from dteframe.engine.logprobs import linear_logprobs", PLAIN)
    assert measured_bytes(plain, NUM_TOKENS // 4, "float32") > told * MARGIN


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_trained", [True, False])
def test_a_long_answers_log_probs_take_what_the_arithmetic_says_on_a_gpu(dtype, is_trained):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    hidden = torch.randn(NUM_TOKENS, HIDDEN, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=hidden.dtype, requires_grad=is_trained)
    targets = torch.zeros(NUM_TOKENS, dtype=torch.long, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprobs(hidden, weight, None, targets, 1.0)[0].sum().backward()
    told = told_bytes(NUM_TOKENS, dtype, is_trained)
    assert told / MARGIN < torch.cuda.max_memory_allocated() - before < told * MARGIN
