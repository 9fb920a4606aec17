"""A rollout engine that is easy to read: one completion at a time, the whole text through the model again."""

from collections.abc import Iterator, Sequence
from typing import Literal, final

import numpy as np
from jaxtyping import Float

from dteframe import Completion, Policy, Prompt, Rollout, RolloutConfig, Sampling, hookimpl


class MyPluginConfig(RolloutConfig):
    """Options of ``my_plugin``: those of every rollout engine."""

    type: Literal["my_plugin"] = "my_plugin"


@final
class MyPlugin(Rollout):
    """One completion at a time, without a cache of keys and values: slow, and easy to change."""

    config: MyPluginConfig
    shares_module = True

    def start(self, policy: Policy) -> None:
        """Keep the policy: its module is shared with the trainer, so new weights need no copy."""
        self._policy = policy

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[Completion]]]:
        """Sample each completion on its own; a prompt's are scored while the next prompt's are sampled."""
        for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            rng = np.random.default_rng(seed)
            yield place, [self._complete(prompt, sampling, rng) for _ in range(num_generations)]
            self.context.progress("generating", place + 1, len(prompts))

    def _complete(self, prompt: Prompt, sampling: Sampling, rng: np.random.Generator) -> Completion:
        """Sample token after token until the end token or the limit."""
        import torch

        tokenizer, module = self._policy.tokenizer, self._policy.module
        token_ids: list[int] = []
        logprobs: list[float] = []
        while len(token_ids) < sampling.max_completion_length:
            row = torch.tensor([[*prompt.token_ids.tolist(), *token_ids]], device=self._policy.device)
            with torch.no_grad():
                logits = module(input_ids=row).logits[0, -1].double().cpu().numpy()
            probabilities = sampled_distribution(logits, sampling)
            token = int(rng.choice(len(probabilities), p=probabilities))
            token_ids.append(token)
            logprobs.append(float(np.log(probabilities[token])))
            if token == tokenizer.eos_token_id:
                break
        has_stopped = token_ids[-1] == tokenizer.eos_token_id
        return Completion(
            np.array(token_ids, dtype=np.int64),
            np.array(logprobs, dtype=np.float32),
            "stop" if has_stopped else "length",
            str(tokenizer.decode(token_ids, skip_special_tokens=True)),
        )


def sampled_distribution(
    logits: Float[np.ndarray, "vocabulary"], sampling: Sampling
) -> Float[np.ndarray, "vocabulary"]:
    """Turn logits into the probabilities that are sampled from: tempered, cut to the likeliest, sum 1."""
    scaled = logits / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    kept = np.ones(len(order), dtype=bool)
    if sampling.top_k:
        kept[order[sampling.top_k :]] = False
    if sampling.top_p < 1:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        kept[order[before >= sampling.top_p]] = False
    kept[probabilities < sampling.min_p * probabilities.max()] = False
    cut = np.where(kept, probabilities, 0.0)
    distribution: Float[np.ndarray, "vocabulary"] = cut / cut.sum()
    return distribution


@hookimpl
def dteframe_components() -> list[type[Rollout]]:
    """Add ``rollout.type=my_plugin``."""
    return [MyPlugin]
