"""What the benchmarks run: random models, prompts, lengths and rewards, the same for every side."""

from __future__ import annotations

import json
import math
import os
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

PAD, EOS = 0, 1
NEVER = -5.0
"""Weight of the end token's constant feature with which it is never sampled."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the table; questions and completions as in the name, every question in every step."""

    description: str
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 384
    num_questions: int = 8
    num_generations: int = 8
    prompt_tokens: int = 4
    max_completion_tokens: int = 32
    mean_completion_tokens: float | None = None
    """None: every completion has the greatest length."""
    equal_reward_questions: int = 0
    """Questions whose completions all get the same reward."""


WORKLOADS = {
    "A": Workload("dense: 0.8M, 8 x 8 x 32 tokens, all groups informative"),
    "B": Workload("as A, half the groups of equal rewards", equal_reward_questions=4),
    "C": Workload(
        "long prompts: 0.8M, 8 x 8 x 64 tokens after 256", prompt_tokens=256, max_completion_tokens=64
    ),
    "D": Workload(
        "ragged: 0.8M, 8 x 8, mean 32, at most 160 tokens",
        max_completion_tokens=160,
        mean_completion_tokens=32,
    ),
    "E": Workload(
        "larger: 25M, 8 x 8 x 32 tokens", hidden_size=512, num_layers=8, num_heads=8, intermediate_size=1536
    ),
}


def use_one_thread() -> None:
    """Keep everything on one thread; call it before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def prompts_of(workload: Workload) -> list[str]:
    """Make a prompt for each question, of as many characters as it has tokens, all different."""
    generator = random.Random(0)
    texts: set[str] = set()
    while len(texts) < workload.num_questions:
        texts.add("".join(generator.choice("0123456789+=") for _ in range(workload.prompt_tokens)))
    return sorted(texts)


def reward_of(prompt: str, completion: str, has_equal_rewards: bool) -> float:
    """Score a completion by a hash, so that no two of a group are equal, or all alike."""
    return 0.5 if has_equal_rewards else zlib.crc32(f"{prompt}{completion}".encode()) / 2**32


def write(workload: Workload, folder: Path) -> None:
    """Write model and tokenizer to ``folder/model`` and the questions to ``folder/questions.jsonl``."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from dteframe.models.characters import character_tokenizer

    tokenizer = character_tokenizer(())
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=workload.hidden_size,
        intermediate_size=workload.intermediate_size,
        num_hidden_layers=workload.num_layers,
        num_attention_heads=workload.num_heads,
        num_key_value_heads=workload.num_heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    module = Qwen2ForCausalLM(config).eval()
    _set_lengths(module, workload.mean_completion_tokens)
    module.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"question": prompt, "answer": "equal" if index < workload.equal_reward_questions else "unequal"}
        for index, prompt in enumerate(prompts_of(workload))
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _set_lengths(module, mean_tokens: float | None) -> None:  # type: ignore[no-untyped-def]  # torch comes late
    """Give all tokens a constant feature, and the end token the weight for it that makes it so likely.

    It is part of the model, so that no side needs an option, or a pass over its logits, to keep lengths.
    """
    import torch

    weight = module.model.embed_tokens.weight
    with torch.no_grad():
        weight[:, 0] = 0.5
        weight[EOS] = 0
        weight[EOS, 0] = NEVER
        if mean_tokens is None:
            return
        texts = torch.randint(3, weight.shape[0], (16, 32), generator=torch.Generator().manual_seed(0))
        constant = float(module.model(input_ids=texts).last_hidden_state[..., 0].mean())
        others = module(input_ids=texts).logits[..., 3:].logsumexp(-1).mean()
        weight[EOS, 0] = (float(others) - math.log(mean_tokens - 1)) / constant
