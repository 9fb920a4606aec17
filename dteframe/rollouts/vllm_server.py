"""A vLLM server that people have started: spoken to over vLLM's own HTTP interface, weights through files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import numpy as np

from dteframe import Context, Policy, SamplerError
from dteframe.rollouts.vllm_policy import ParameterFiles, policy_sizes, write_configuration
from dteframe.rollouts.vllm_requests import Answer, Request

if TYPE_CHECKING:
    import torch

    from dteframe.rollouts.vllm import VLLMRolloutConfig

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_FOR_A_LOOK = 10.0
SHOWN_CHARACTERS = 300
"""Of the server's own message."""


class Server:
    """Asks the server for completions, and tells it which files hold its new weights.

    With several processes all of them ask, each for its own prompts, and the main one sends the weights.
    """

    def __init__(self, config: VLLMRolloutConfig, context: Context, policy: Policy) -> None:
        """Wait for the server, and see that it serves such a policy and takes weights.

        Raises:
            SamplerError: it does not answer in time, serves another model, or cannot take weights.
        """
        self._config = config
        self._context = context
        self._is_main = _is_main_process()
        self._files = ParameterFiles(config, context)
        folder = context.run_folder.resolve() / "vllm_model"
        if self._is_main:
            folder.mkdir(exist_ok=True)
            write_configuration(policy, folder)
        self._command = (
            f"VLLM_SERVER_DEV_MODE=1 vllm serve {folder} --load-format dummy "
            f"--dtype {config.dtype_for(policy)} "
            '--logprobs-mode processed_logprobs --weight-transfer-config \'{"backend": "dteframe"}\''
        )
        self._wait()
        served = self._call("GET", "/v1/models")["data"][0]
        self._model: str = served["id"]
        self.max_model_length: int = served["max_model_len"]
        if self._is_main:
            self._call("POST", "/init_weight_transfer_engine", {"init_info": {"sizes": policy_sizes(policy)}})

    def take_over(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights, and forget keys and values of the earlier ones."""
        if not self._is_main:
            for _ in weights:  # Putting shards together is a common work.
                pass
            return
        self._call("POST", "/start_weight_update")
        for path in self._files.written(weights):
            self._call("POST", "/update_weights", {"update_info": {"path": str(path)}})
        self._call("POST", "/finish_weight_update")
        if not self._call("POST", "/reset_prefix_cache")["success"]:
            raise SamplerError(
                f"rollout 'vllm': the server at {self._url!r} cannot empty its prefix cache: somebody else "
                "is asking it; give the run a server of its own"
            )

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Answer]]]:
        """Sample the completions of all requests; give each request's place and completions as they end."""
        with ThreadPoolExecutor(min(len(requests), self._config.max_concurrent_requests)) as threads:
            places = {threads.submit(self._complete, item): place for place, item in enumerate(requests)}
            try:
                for ended in as_completed(places):
                    yield places[ended], ended.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _complete(self, request: Request) -> list[Answer]:
        asked = {"model": self._model, "prompt": request.prompt_token_ids.tolist(), "return_token_ids": True}
        completion = self._call("POST", "/v1/completions", {**asked, **request.options()})
        choices = sorted(completion["choices"], key=lambda choice: int(choice["index"]))
        return [self._answer(choice) for choice in choices]

    def _answer(self, choice: Mapping[str, Any]) -> Answer:
        if choice["finish_reason"] not in ("stop", "length"):
            raise SamplerError(
                f"rollout 'vllm': the server at {self._url!r} ended a completion by "
                f"{choice['finish_reason']!r}; look at its log, and resume from the last checkpoint"
            )
        return Answer(
            token_ids=np.array(choice["token_ids"], dtype=np.int64),
            logprobs=np.array(choice["logprobs"]["token_logprobs"], dtype=np.float32),
            finish_reason=choice["finish_reason"],
        )

    @property
    def _url(self) -> str:
        return self._config.server_base_url.rstrip("/")

    def _wait(self) -> None:
        """Wait until the server is up: loading a model takes it minutes."""
        timeout = self._config.server_timeout
        began = time.monotonic()
        while (waited := time.monotonic() - began) < timeout:
            try:
                urlopen(f"{self._url}/health", timeout=SECONDS_FOR_A_LOOK).close()
            except (OSError, HTTPException) as error:
                reason = _reason(error)
            except ValueError as error:
                raise SamplerError(
                    f"rollout.server_base_url: {error}; give one like http://host:8000"
                ) from error
            else:
                return
            self._context.progress("waiting for the vLLM server", int(waited), int(timeout))
            time.sleep(min(SECONDS_BETWEEN_LOOKS, timeout))
        raise SamplerError(
            f"rollout 'vllm': no server answers at {self._url!r} within {timeout:g} s ({reason}); start it "
            f"with {self._command}, or raise rollout.server_timeout"
        )

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Call the server and give its answer.

        Raises:
            SamplerError: it refuses, fails, or does not answer any more.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = HttpRequest(f"{self._url}{path}", data=data, headers=headers, method=method)
        try:
            with urlopen(request, timeout=self._config.request_timeout_seconds) as response:
                content = response.read()
        except HTTPError as error:
            raise self._refused(path, error) from error
        except (OSError, HTTPException) as error:
            raise SamplerError(
                f"rollout 'vllm': the server at {self._url!r} does not answer {path} any more "
                f"({_reason(error)}); it may have died: look at its log, start it again "
                f"with {self._command}, and resume the run"
            ) from error
        return json.loads(content) if content else None

    def _refused(self, path: str, error: HTTPError) -> SamplerError:
        """Say what the server said, and how it should have been started."""
        said = _message(error.read())
        if error.code == 404:
            said = f"it has no {path}: {said}" if said else f"it has no {path}"
        return SamplerError(
            f"rollout 'vllm': the server at {self._url!r} refused {path} ({error.code}): "
            f"{said or error.reason}; start it with {self._command}"
        )


def _message(content: bytes) -> str:
    """Find the server's sentence in its answer."""
    try:
        answer = json.loads(content)
        said = answer["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = content.decode(errors="replace")
    return " ".join(str(said).split())[-SHOWN_CHARACTERS:]


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def _is_main_process() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0
