"""A tokenizer of single characters: what a small model made from scratch reads and writes."""

from __future__ import annotations

import string
import unicodedata
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
CHAT_CHARACTERS = "assistant: \n"
"""What the template itself adds to messages."""

PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " \n"


def character_tokenizer(texts: Iterable[str], always_known: str = PRINTABLE) -> PreTrainedTokenizerFast:
    r"""Make a tokenizer of the characters ``always_known`` (printable ASCII, newline) and those of ``texts``.

    The same set of characters gives the same ids; other characters become ``<unk>``.

    The model inside is a byte-level BPE whose only merges join the bytes of one character. That looks like a
    detour, but plain ``AutoTokenizer`` rebuilds the tokenizer beside a Qwen2 model as such a BPE whatever
    was saved: this one comes back with the same ids, a table of characters would not. (What comes back
    drops unknown characters, where this one gives ``<unk>``.)

    >>> tokenizer = character_tokenizer(["3×4"])
    >>> tokenizer.decode(tokenizer("3×4=\n12")["input_ids"])
    '3×4=\n12'
    >>> len(tokenizer("3×4=\n12")["input_ids"])
    7
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import PreTrainedTokenizerFast

    pad, eos, unknown = SPECIAL_TOKENS
    bytewise = ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    merges: dict[tuple[str, str], None] = {}
    further = set().union(*(unicodedata.normalize("NFC", text) for text in texts)) - set(always_known)
    for character in (*sorted(always_known), *sorted(further)):
        symbols = bytewise.pre_tokenize_str(character)[0][0]  # One symbol per byte of UTF-8.
        for symbol in symbols:
            vocabulary.setdefault(symbol, len(vocabulary))
        for length in range(2, len(symbols) + 1):
            merges[symbols[: length - 1], symbols[length - 1]] = None
            vocabulary.setdefault(symbols[:length], len(vocabulary))
    core = Tokenizer(BPE(vocabulary, list(merges), unk_token=unknown))
    core.normalizer = NFC()
    core.pre_tokenizer = Sequence([Split(Regex(r"[\s\S]"), "isolated"), bytewise])
    core.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=core,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
