"""A vLLM engine in this process: it shares the device with the trainer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from dteframe import Context, Policy, SamplerError
from dteframe.rollouts.vllm_policy import ParameterFiles, policy_sizes, write_configuration
from dteframe.rollouts.vllm_requests import Answer, Request

if TYPE_CHECKING:
    import torch

    from dteframe.rollouts.vllm import VLLMRolloutConfig

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # In a process of its own the engine could not take tensors over.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # Standard output is data.
    "VLLM_LOGGING_LEVEL": "ERROR",  # It warns of tied layers at every update, which are dealt with here.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # On a CPU it would bind the trainer's threads too.
}
"""What vLLM reads when it is imported; set where people have not set it themselves."""
ADVICE = {
    "head.?size|head.?dim": "choose a model with other attention heads, or rollout.type 'transformers'",
    "max_model_len|max seq len": (
        "lower rollout.max_model_length, or give more memory by rollout.gpu_memory_utilization or "
        "rollout.kv_cache_memory_bytes"
    ),
    "memory": (
        "change rollout.gpu_memory_utilization or set rollout.kv_cache_memory_bytes (on a CPU vLLM reads "
        "VLLM_CPU_KVCACHE_SPACE), lower rollout.max_model_length, or set rollout.enable_sleep_mode"
    ),
}
"""The knob to turn, by what vLLM's message speaks of; the first that fits."""
OTHERWISE = "vLLM's own messages stand above; VLLM_LOGGING_LEVEL=INFO shows more of them"


class ColocatedEngine:
    """Starts vLLM without weights, which come over as all later ones do, and puts it to sleep in between."""

    def __init__(self, config: VLLMRolloutConfig, context: Context, policy: Policy) -> None:
        """Start the engine; it has no weights yet.

        Raises:
            SamplerError: it does not start; names what to change.
        """
        self._config = config
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with _in_words("the engine did not start"), TemporaryDirectory() as folder:
            write_configuration(policy, Path(folder))
            from vllm import LLM
            from vllm.platforms import current_platform

            can_sleep = current_platform.is_sleep_mode_available()
            if config.enable_sleep_mode and not can_sleep:
                context.warn(
                    "rollout 'vllm': enable_sleep_mode has no effect on this device: vLLM keeps its memory"
                )
            self._sleeps = config.enable_sleep_mode and can_sleep
            self._llm = LLM(
                model=folder,
                tokenizer=folder,
                load_format="dummy",
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                weight_transfer_config={"backend": "dteframe"},
                dtype=config.dtype_for(policy),
                tensor_parallel_size=config.tensor_parallel_size,
                gpu_memory_utilization=config.gpu_memory_utilization,
                kv_cache_memory_bytes=config.kv_cache_memory_bytes,
                max_model_len=config.max_model_length,
                enable_sleep_mode=self._sleeps,
                enable_prefix_caching=config.enable_prefix_caching,
                enforce_eager=config.enforce_eager,
                # On a CPU vLLM cannot take back what a seeded request drew while its prompt was half read.
                enable_chunked_prefill=False if current_platform.is_cpu() else None,
                distributed_executor_backend=_executor(config.tensor_parallel_size),
                skip_tokenizer_init=True,
                seed=context.seed,
            )
            if _executor(config.tensor_parallel_size) is not None:
                # At exit vLLM would leave process groups that the run has left already, with a traceback.
                self._llm.llm_engine.engine_core._finalizer.atexit = False
            self._llm.init_weight_transfer_engine({"init_info": {"sizes": policy_sizes(policy)}})
        self._asleep: set[str] = set()
        # Worker processes of their own cannot be handed tensors: they read files.
        self._files = None if config.tensor_parallel_size == 1 else ParameterFiles(config, context)

    @property
    def max_model_length(self) -> int:
        """Give the greatest length of prompt and completion together."""
        length: int = self._llm.llm_engine.model_config.max_model_len
        return length

    def take_over(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights, and forget keys and values of the earlier ones."""
        with _in_words("the new weights did not go over"):
            self._wake("weights")
            self._llm.start_weight_update()
            for part in self._parts(weights):
                self._llm.update_weights({"update_info": part})
            self._llm.finish_weight_update()
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("the prefix cache cannot be reset while completions are being sampled")

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Answer]]]:
        """Sample the completions of all requests; give each request's place and completions as they end."""
        from vllm import SamplingParams

        with _in_words("sampling broke off"):
            self._wake("weights", "kv_cache")
            names = self._llm.enqueue(
                [{"prompt_token_ids": request.prompt_token_ids.tolist()} for request in requests],
                [
                    SamplingParams(**request.options(), detokenize=False, flat_logprobs=True)
                    for request in requests
                ],
                use_tqdm=False,
            )
            # Inside, vLLM adds a dash and random letters to a request's number.
            places = {name.partition("-")[0]: place for place, name in enumerate(names)}
            while self._llm.llm_engine.has_unfinished_requests():
                for output in self._llm.llm_engine.step():
                    if output.finished:
                        yield places[output.request_id], [_answer(item) for item in output.outputs]
            if self._sleeps:
                self._llm.sleep(level=1)
                self._asleep = {"weights", "kv_cache"}

    def _wake(self, *tags: str) -> None:
        asleep = [tag for tag in tags if tag in self._asleep]
        if asleep:
            self._llm.wake_up(tags=asleep)
            self._asleep -= set(asleep)

    def _parts(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
        """Give the tensors as they are, one at a time, or files of some of them."""
        if self._files is None:
            for name, tensor in weights:
                yield {"weights": [(name, tensor)]}
        else:
            for path in self._files.written(weights):
                yield {"path": str(path)}


def _executor(tensor_parallel_size: int) -> str | None:
    """Choose who runs vLLM's workers: processes that torchrun started each run their own engine."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if tensor_parallel_size > 1:
        raise SamplerError(
            f"rollout 'vllm': tensor_parallel_size {tensor_parallel_size} cannot be shared by the "
            f"{dist.get_world_size()} processes of this run, which each have an engine of their own; set it "
            "to 1, or let a server sample (rollout.mode 'server')"
        )
    return "external_launcher"


def _answer(completion: Any) -> Answer:
    reason = completion.finish_reason
    if reason not in ("stop", "length"):
        raise SamplerError(
            f"rollout 'vllm': a completion ended by {reason!r}; resume from the last checkpoint"
        )
    return Answer(
        token_ids=np.array(completion.token_ids, dtype=np.int64),
        logprobs=np.array(completion.logprobs.logprobs, dtype=np.float32),
        finish_reason=reason,
    )


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Word whatever vLLM raises as one sentence that names the knob to turn."""
    try:
        yield
    except SamplerError:
        raise
    except Exception as error:  # vLLM raises errors of every kind
        message = " ".join(str(error).split()) or type(error).__name__
        found = (advice for words, advice in ADVICE.items() if re.search(words, message, re.IGNORECASE))
        raise SamplerError(f"rollout 'vllm': {what}: {message}; {next(found, OTHERWISE)}") from error
