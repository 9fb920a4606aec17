"""Rollouts sampled by vLLM: by an engine in this process, or by a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, final
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from dteframe import (
    BatchArithmetic,
    Completion,
    Component,
    ModelSizes,
    Policy,
    Prompt,
    Rollout,
    RolloutConfig,
    Sampling,
    SamplingMemory,
    hookimpl,
)
from dteframe.memory import key_value_bytes
from dteframe.rollouts.transformers import end_token_ids
from dteframe.rollouts.vllm_requests import Answer, Request

if TYPE_CHECKING:
    from pathlib import Path

    from dteframe.rollouts.vllm_colocated import ColocatedEngine
    from dteframe.rollouts.vllm_server import Server

TEMPERATURES = (0.01, 2.0)
"""The lowest and highest: vLLM silently raises lower ones, and refuses higher ones."""
ENGINE_OPTIONS = (
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_length",
    "enable_sleep_mode",
    "enable_prefix_caching",
    "enforce_eager",
    "dtype",
)
"""Options of the engine in this process; a server gets its own on its command line."""
SERVER_OPTIONS = (
    "server_base_url",
    "server_timeout",
    "request_timeout_seconds",
    "max_concurrent_requests",
)


class VLLMRolloutConfig(RolloutConfig):
    """Options of the rollouts by vLLM; TRL's names without their ``vllm_`` where TRL has them."""

    type: Literal["vllm"] = "vllm"
    mode: Literal["colocate", "server"] = "colocate"
    """An engine in each process of the run, on the trainer's device; or a server that people have started."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Devices over which the engine's weights are split; with several processes 1, or a server's."""
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """Share of the device's memory for the engine's weights, keys and values; on a CPU of the machine's."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """Memory for keys and values, in place of ``gpu_memory_utilization``."""
    max_model_length: int | None = Field(default=None, ge=2)
    """Tokens of prompt and completion at most; null: as many as the model reads. Less needs less memory."""
    enable_sleep_mode: bool = False
    """Give the engine's memory back while the policy learns: its weights move to the host's memory, keys and
    values are dropped. Without effect on a CPU."""
    enable_prefix_caching: bool = True
    """Keep keys and values of prompts, which the completions of a prompt share; emptied at each update."""
    enforce_eager: bool = False
    """Do without CUDA graphs and compilation: starts sooner, samples slower."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the engine computes; ``auto``: the policy's."""
    server_base_url: str = "http://127.0.0.1:8000"
    """Where the server listens."""
    server_timeout: float = Field(default=240.0, gt=0)
    """Seconds to wait for the server when the run starts."""
    request_timeout_seconds: float = Field(default=3600.0, gt=0)
    """Seconds to wait for the completions of one prompt, or for an update of the weights."""
    max_concurrent_requests: int = Field(default=256, ge=1)
    """Prompts that the server is asked at once."""
    weights_folder: str | None = None
    """Where new weights are laid down for a server or for worker processes, which must see the same folder;
    null: ``/dev/shm``. Holds about 1 GiB, or the largest weight."""

    @field_validator("server_base_url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # such as a port that is no number
            is_whole = False
        if not is_whole or not url.isprintable() or " " in url:
            raise ValueError(f"{url!r} is no URL of a server; give one like http://host:8000")
        return url

    @classmethod
    def example(cls, folder: Path) -> VLLMRolloutConfig:
        """Give an engine that is small enough for a CPU."""
        return cls(kv_cache_memory_bytes=2**26, max_model_length=256, enforce_eager=True)

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Refuse options that nobody would read, lengths that do not fit, and temperatures vLLM changes."""
        unread = ENGINE_OPTIONS if self.mode == "server" else SERVER_OPTIONS
        for name in unread:
            if getattr(self, name) == type(self).model_fields[name].default:
                continue
            where = "give it to the server on its command line" if self.mode == "server" else "leave it out"
            yield name, f"{getattr(self, name)!r} has no effect with mode {self.mode!r}; {where}"
        if self.weights_folder is not None and self.mode == "colocate" and self.tensor_parallel_size == 1:
            yield (
                "weights_folder",
                f"{self.weights_folder!r} has no effect: one process needs no files; leave it out",
            )
        length = arithmetic.max_prompt_length + arithmetic.max_completion_length
        if self.max_model_length is not None and self.max_model_length < length:
            yield (
                "max_model_length",
                f"{self.max_model_length} is less than training.max_prompt_length "
                f"{arithmetic.max_prompt_length} and rollout.max_completion_length "
                f"{arithmetic.max_completion_length} together; raise it to {length}",
            )
        if not _can_sample_at(self.temperature):
            yield "temperature", f"{self.temperature!r} is not within what vLLM samples at, {TEMPERATURES}"

    def missing_packages(self) -> Iterator[str]:
        """Ask for vllm where no server samples."""
        if self.mode == "colocate" and find_spec("vllm") is None:
            yield (
                "rollout 'vllm': vllm is not installed; pip install 'dteframe[gpu]' (for a CPU see "
                "docs/guides/sample_with_vllm.md), or let a server sample (rollout.mode 'server')"
            )

    def memory(
        self, sizes: ModelSizes, arithmetic: BatchArithmetic, num_processes: int, device_bytes: int | None
    ) -> SamplingMemory | None:
        """Count the engine's share of the device: all of it is taken when the engine starts."""
        if self.mode == "server":
            return SamplingMemory({}, remark="the server samples on devices of its own")
        weights = sizes.num_parameters * sizes.parameter_bytes // self.tensor_parallel_size
        if self.kv_cache_memory_bytes is not None:
            cache = self.kv_cache_memory_bytes
        elif device_bytes is not None:
            cache = max(0, int(self.gpu_memory_utilization * device_bytes) - weights)
        else:
            return None
        length = arithmetic.max_prompt_length + arithmetic.max_completion_length
        num_fitting = cache * self.tensor_parallel_size // key_value_bytes(sizes, length)
        return SamplingMemory(
            {"vLLM's weights": weights, "vLLM's keys and values": cache},
            while_updating=0 if self.enable_sleep_mode else weights + cache,
            remark=f"vLLM has room for {num_fitting} completions of full length at a time",
        )

    def dtype_for(self, policy: Policy) -> str:
        """Name the type in which the engine computes; vLLM's own ``auto`` makes float16 of float32."""
        return str(policy.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype


@final
class VLLMRollout(Rollout):
    """Sample with vLLM: faster than the trainer's module, with a second copy of the weights.

    All weights go over after each update, by one route for engine and server; the prefix cache is emptied.
    Log-probs are ``processed_logprobs``: at the temperature, renormalised over the tokens that truncation
    leaves. vLLM truncates by min_p first, then by top_k and top_p. A completion stops at the same tokens as
    with ``transformers``.
    """

    config: VLLMRolloutConfig

    def start(self, policy: Policy) -> None:
        """Start the engine, or find the server, and send the policy's weights.

        Raises:
            SamplerError: the engine does not start, the server is not there or serves
            another model.
        """
        self._end_token_ids = tuple(end_token_ids(policy.module, policy.tokenizer))
        self._tokenizer = policy.tokenizer
        self._sampler = self._started_sampler(policy)
        self.sync(policy)

    def sync(self, policy: Policy) -> None:
        """Send all weights."""
        self._sampler.take_over(policy.weights())

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[Completion]]]:
        """Sample completions.

        Raises:
            SamplerError: vLLM fails or has died.
            ValueError: a prompt is too long, or the temperature not one of vLLM's.
        """
        if not prompts:
            return
        self._check(prompts, sampling)
        requests = [
            Request(prompt.token_ids, num_generations, sampling, seed, self._end_token_ids)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        for place, answers in self._sampler.generate(requests):
            yield place, [self._completion(answer) for answer in answers]

    def _completion(self, answer: Answer) -> Completion:
        return Completion(
            token_ids=answer.token_ids,
            behaviour_logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
            text=str(self._tokenizer.decode(answer.token_ids.tolist(), skip_special_tokens=True)),
        )

    def _started_sampler(self, policy: Policy) -> ColocatedEngine | Server:
        if self.config.mode == "server":
            from dteframe.rollouts.vllm_server import Server

            return Server(self.config, self.context, policy)
        from dteframe.rollouts.vllm_colocated import ColocatedEngine

        return ColocatedEngine(self.config, self.context, policy)

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Refuse what vLLM would cut or change silently."""
        if not _can_sample_at(sampling.temperature):
            raise ValueError(
                f"rollout 'vllm': the temperature {sampling.temperature!r} is not within what vLLM samples "
                f"at, {TEMPERATURES}"
            )
        longest = self._sampler.max_model_length
        for prompt in prompts:
            num_tokens = len(prompt.token_ids)
            if num_tokens + sampling.max_completion_length > longest:
                raise ValueError(
                    f"rollout 'vllm': the prompt of question {prompt.question_id!r} has {num_tokens} tokens "
                    f"and completions have up to {sampling.max_completion_length}, but the engine takes "
                    f"{longest}; lower training.max_prompt_length or rollout.max_completion_length, or raise "
                    "rollout.max_model_length"
                )


def _can_sample_at(temperature: float) -> bool:
    lowest, highest = TEMPERATURES
    return lowest <= temperature <= highest


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this file."""
    return [VLLMRollout]
