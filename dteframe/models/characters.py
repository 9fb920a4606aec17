"""A tokenizer of single characters: what a small model made from scratch reads and writes."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
"""Their ids are 0, 1 and 2."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""One line a message, so that chat datasets work with a model that has seen no chat."""

PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " \n"


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    r"""Make a tokenizer of printable ASCII, newline, and every further character of ``texts``.

    Other characters become ``<unk>``. The same set of characters gives the same ids. What is saved loads
    with plain ``AutoTokenizer``.

    >>> tokenizer = character_tokenizer(["3×4"])
    >>> tokenizer.decode(tokenizer("3×4=\n12")["input_ids"])
    '3×4=\n12'
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    pad, eos, unknown = SPECIAL_TOKENS
    characters = sorted(set(PRINTABLE).union(*texts))
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    core = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    core.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=core,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
