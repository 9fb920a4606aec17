"""What training takes, in bytes, by arithmetic alone: nothing is loaded, and torch is not imported.

Everything is for one process. What is not counted: the device's own context (about 0.5 GiB on CUDA), what the
allocator loses to fragmentation, and the models of an estimator. docs/memory.md compares with measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dteframe.records import ModelSizes

GIB, MIB = 2**30, 2**20
FLOAT32 = 4
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
LOGITS_OF_A_CHUNK = 2**26
"""Logits that exist at a time when completions are scored, 441 tokens at a vocabulary of 152k, in two float32
buffers of 256 MiB; a single token's always do. Larger chunks are no faster (2**23 to 2**27 on a CPU)."""
COLUMNS_OF_A_ROOM = 128
"""Tokens for which the ``transformers`` rollout makes room in its cache at a time."""
MIN_SAVING = 0.05
"""Rows with a line each take the fewest operations: they are preferred to sharing that would save less."""
ADAM_MOMENTS = 2
"""AdamW keeps a mean of gradients and of squared gradients for every parameter."""
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, under transformers' names."""


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What of the recipe's ``training`` decides the memory of an update; the names are the recipe's."""

    float32_master_weights: bool = True
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    keeps_reference_model: bool = False
    """Whether a frozen copy of the first policy is kept; LoRA needs none."""
    num_processes: int = 1


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What one stage of a step takes on the device of one process."""

    name: str
    """Such as ``sampling``."""
    parts: Mapping[str, int]
    """Bytes by what they are for."""
    total_bytes: int

    @classmethod
    def of(cls, name: str, parts: Mapping[str, int]) -> StageMemory:
        """Add the parts up; those of no bytes are left out."""
        return cls(name, {part: size for part, size in parts.items() if size}, sum(parts.values()))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a recipe takes on the device of one process."""

    num_processes: int
    num_parameters: int
    num_trained: int
    """Parameters that the optimizer changes: fewer with LoRA."""
    micro_batch_rows: int
    """Rows of the longest micro-batch."""
    micro_batch_row_length: int
    """Tokens of each, prompt and completion as long as they may be."""
    stages: tuple[StageMemory, ...]
    peak_stage: str
    """The stage that takes the most."""
    peak_bytes: int
    remarks: tuple[str, ...]
    """What is assumed or left out."""


# Sizes


def block_parameters(sizes: ModelSizes) -> Mapping[str, tuple[int, int]]:
    """Give inputs and outputs of the linear layers of one block."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.query_size, sizes.key_value_size
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def decoder_parameters(sizes: ModelSizes, *, has_attention_bias: bool) -> int:
    """Count the parameters of a Qwen2 (biases on queries, keys and values) or Llama (none) of these sizes.

    What ``sizes`` itself says of the number of parameters is not read.
    """
    matrices = sum(inputs * outputs for inputs, outputs in block_parameters(sizes).values())
    biases = sizes.query_size + 2 * sizes.key_value_size if has_attention_bias else 0
    block = matrices + biases + 2 * sizes.hidden_size
    embeddings = sizes.vocabulary_size * sizes.hidden_size * (1 if sizes.ties_embeddings else 2)
    return sizes.num_layers * block + embeddings + sizes.hidden_size


def with_adapter(sizes: ModelSizes, rank: int, target_modules: tuple[str, ...]) -> ModelSizes:
    """Add LoRA of a rank to some of ``LINEAR_LAYERS``: ``rank`` x (inputs + outputs) for each.

    Source: LoRA, arXiv:2106.09685, 4.1.
    """
    layers = block_parameters(sizes)
    of_a_block = sum(rank * sum(layers[name]) for name in target_modules)
    return replace(sizes, num_adapter_parameters=sizes.num_layers * of_a_block)


# What stays


def resident_bytes(sizes: ModelSizes, training: MemorySettings) -> Mapping[str, int]:
    """Give what is on the device all the time: parameters, float32 masters, AdamW's moments, reference model.

    Several processes shard all of it with FSDP2. There the float32 masters are the shards themselves, and
    bfloat16 copies exist only while a block computes (``gathered_bytes``).
    """
    processes, trained = training.num_processes, sizes.num_trained
    of_trained = trained_parameter_bytes(sizes, training)
    is_sharded = processes > 1 or training.cpu_offload
    masters = 0
    if sizes.num_adapter_parameters:
        parameters = sizes.num_parameters * sizes.parameter_bytes + trained * of_trained
    elif is_sharded:
        parameters = trained * of_trained
    else:
        parameters = trained * sizes.parameter_bytes
        masters = trained * of_trained if of_trained != sizes.parameter_bytes else 0
    reference = 0
    if training.keeps_reference_model and not sizes.num_adapter_parameters:
        reference = sizes.num_parameters * sizes.parameter_bytes
    if training.cpu_offload:
        return {"parameters": 0, "float32 masters": 0, "optimizer": 0, "reference model": 0}
    return {
        "parameters": -(-parameters // processes),
        "float32 masters": -(-masters // processes),
        "optimizer": -(-ADAM_MOMENTS * trained * of_trained // processes),
        "reference model": -(-reference // processes),
    }


def trained_parameter_bytes(sizes: ModelSizes, training: MemorySettings) -> int:
    """Give the bytes of a parameter as the optimizer sees it."""
    if sizes.num_adapter_parameters or training.float32_master_weights:
        return FLOAT32
    return sizes.parameter_bytes


def gradient_bytes(sizes: ModelSizes, training: MemorySettings) -> int:
    """Give the bytes of all gradients, sharded; those of a block in bfloat16 are moved to float32 at once."""
    if training.cpu_offload:
        return 0
    return -(-sizes.num_trained * trained_parameter_bytes(sizes, training) // training.num_processes)


def unmoved_gradient_bytes(sizes: ModelSizes, training: MemorySettings) -> int:
    """Give the bytes of bfloat16 gradients that wait, after a backward pass, to be added to the masters.

    Only one process without LoRA has them; FSDP2 reduces the gradients of a block as they come.
    """
    is_alone = training.num_processes == 1 and not training.cpu_offload and not sizes.num_adapter_parameters
    has_masters = trained_parameter_bytes(sizes, training) != sizes.parameter_bytes
    return sizes.num_parameters * sizes.parameter_bytes if is_alone and has_masters else 0


def gathered_bytes(sizes: ModelSizes, training: MemorySettings) -> int:
    """Give what FSDP2 gathers to compute: embeddings and head, a block, and the block that is fetched ahead.

    The gathered gradient of a block is counted too.
    """
    if training.num_processes == 1 and not training.cpu_offload:
        return 0
    embeddings = sizes.vocabulary_size * sizes.hidden_size * (1 if sizes.ties_embeddings else 2)
    block = -(-(sizes.num_parameters - embeddings) // sizes.num_layers)
    return (2 * embeddings + 3 * block) * sizes.parameter_bytes


# The update


def activation_bytes(sizes: ModelSizes, num_tokens: int, *, gradient_checkpointing: bool) -> int:
    """Give what the blocks keep of a micro-batch for the backward pass.

    Args:
        sizes: the model's.
        num_tokens: tokens of the micro-batch, padding included.
        gradient_checkpointing: then a block keeps its input alone, and one block at a time the rest.

    Source: what torch saves of transformers' Qwen2 and Llama with SDPA, counted by
        ``torch.autograd.graph.saved_tensors_hooks`` in the tests; the approach is that of arXiv:2205.05198,
        4.1, whose numbers are for GPT. SDPA and flash attention keep nothing of length x length; ``eager``
        attention does, which is not counted.
    """
    block = num_tokens * block_bytes_per_token(sizes)
    rotary = 2 * num_tokens * sizes.head_size * sizes.parameter_bytes
    last_norm = num_tokens * (sizes.hidden_size * (FLOAT32 + 2 * sizes.parameter_bytes) + FLOAT32)
    if sizes.num_adapter_parameters:
        # What the last norm keeps beside its output, the first does not: no gradient goes below LoRA.
        last_norm = num_tokens * sizes.hidden_size * sizes.parameter_bytes
    if gradient_checkpointing:
        inputs = sizes.num_layers * num_tokens * sizes.hidden_size * sizes.parameter_bytes
        return inputs + block + rotary + last_norm
    return sizes.num_layers * block + rotary + last_norm


def block_bytes_per_token(sizes: ModelSizes) -> int:
    """Give the bytes that a block keeps of a token.

    A norm keeps its input in float32 and, where its weight is trained, the normalised input. A linear layer
    keeps its input, and LoRA a float32 copy of its own where the model is bfloat16. SDPA keeps queries, keys,
    values, its output and a float32 sum per head; the feed-forward network keeps both its branches, the
    activated one before and after, and their product.
    """
    width, hidden, inner = sizes.parameter_bytes, sizes.hidden_size, sizes.intermediate_size
    attention = 2 * (sizes.query_size + sizes.key_value_size) * width + FLOAT32 * sizes.num_heads
    rests_of_norms = 2 * FLOAT32
    if not sizes.num_adapter_parameters:
        norms = 2 * hidden * (FLOAT32 + 2 * width)
        return norms + rests_of_norms + attention + 4 * inner * width
    norms = 2 * hidden * FLOAT32
    inputs = (2 * hidden + inner) * FLOAT32  # They are float32 already: no copies.
    if width != FLOAT32:
        inputs = (5 * hidden + sizes.query_size + inner) * FLOAT32
    of_an_average_block = sizes.num_adapter_parameters // sizes.num_layers
    rank_outputs = len(LINEAR_LAYERS) * FLOAT32 * _rank(sizes, of_an_average_block)
    return norms + rests_of_norms + attention + 3 * inner * width + inputs + rank_outputs


def shared_prompt_tokens(
    sizes: ModelSizes, prompt_length: int, completion_length: int, *, gradient_checkpointing: bool
) -> tuple[float, float]:
    """Give the tokens of rows of their own that take as much memory as a shared prompt, and as a completion.

    Attention's result is kept twice: as it is laid out for attention, and for the layer after it. Keys and
    values of the prompt are repeated for every completion; and where the prompt is the shorter, so are its
    queries and results. Every token of a completion has states before the head, and their gradient.

    Args:
        sizes: the model's.
        prompt_length: tokens.
        completion_length: tokens.
        gradient_checkpointing: then one block at a time keeps what attention takes.
    """
    width = sizes.parameter_bytes
    blocks = 1 if gradient_checkpointing else sizes.num_layers
    of_its_own = activation_bytes(sizes, 1, gradient_checkpointing=gradient_checkpointing)
    in_attention = 1 + sizes.query_size * width * blocks / of_its_own
    asked_for = 2 * sizes.hidden_size * width / of_its_own
    repeated = 2 * sizes.key_value_size * width
    if prompt_length <= completion_length:
        repeated += 2 * sizes.query_size * width + FLOAT32 * sizes.num_heads
    completion = completion_length * (in_attention + asked_for)
    return prompt_length * in_attention, completion + prompt_length * repeated * blocks / of_its_own


def _rank(sizes: ModelSizes, block_adapter_parameters: int) -> int:
    """Guess LoRA's rank as if every linear layer had an adapter: what it keeps is small anyway."""
    return -(-block_adapter_parameters // sum(sum(pair) for pair in block_parameters(sizes).values()))


def head_bytes(sizes: ModelSizes, num_completion_tokens: int) -> int:
    """Give what log-probs of completion tokens take: two float32 buffers of a chunk's logits, and gradients.

    The states before the head are copied and have a gradient; the head's own gradient is summed in float32.
    In bfloat16, a chunk's logits and its part of the head's gradient exist in bfloat16 too.
    """
    width = 0 if sizes.parameter_bytes == FLOAT32 else sizes.parameter_bytes
    chunk = min(num_completion_tokens * sizes.vocabulary_size, LOGITS_OF_A_CHUNK)
    states = 2 * num_completion_tokens * sizes.hidden_size * sizes.parameter_bytes
    head = 0 if sizes.num_adapter_parameters else sizes.vocabulary_size * sizes.hidden_size
    return chunk * (2 * FLOAT32 + width) + states + head * (FLOAT32 + width)


def backward_bytes(sizes: ModelSizes, num_tokens: int) -> int:
    """Give what the backward pass of a block needs beside what was kept: gradients of its widest states."""
    return num_tokens * sizes.parameter_bytes * (2 * sizes.intermediate_size + 2 * sizes.hidden_size)


def optimizer_step_bytes(sizes: ModelSizes, training: MemorySettings, *, is_fused: bool, device: str) -> int:
    """Give what AdamW's step needs for a moment: on a GPU a copy of all it trains, unless it is fused.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html, on ``foreach``: "uses
        roughly sizeof(params) more peak memory than the for-loop version"; the for-loop is the CPU's.
    """
    if is_fused or training.cpu_offload:
        return 0
    of_trained = trained_parameter_bytes(sizes, training)
    if device == "cpu":
        largest = max(sizes.vocabulary_size * sizes.hidden_size, sizes.hidden_size * sizes.intermediate_size)
        return 2 * of_trained * min(largest, sizes.num_trained)
    return -(-sizes.num_trained * of_trained // training.num_processes)


# Sampling


def key_value_bytes(sizes: ModelSizes, num_tokens: int) -> int:
    """Give the bytes of the keys and values of so many tokens in all blocks."""
    return num_tokens * 2 * sizes.num_layers * sizes.key_value_size * sizes.parameter_bytes


def sampling_bytes(
    sizes: ModelSizes, num_prompts: int, num_rows: int, num_completions: int, lengths: tuple[int, int]
) -> Mapping[str, int]:
    """Give what the decode loop of the ``transformers`` rollout takes at its last token.

    The weights of the blocks, laid out for few tokens at a time. Keys and values of all rows, with room for
    tokens to come, and of the prompts once; they are made anew block by block. Logits in the model's type,
    float32 scores and their exponentials, and float64 sums. A uniform number, a token and a log-prob for
    every token of all completions.

    Args:
        sizes: the model's.
        num_prompts: prompts that are sampled at a time.
        num_rows: completions of them.
        num_completions: completions that are asked for in all.
        lengths: tokens of a prompt and of a completion.
    """
    prompt_length, completion_length = lengths
    room = min(COLUMNS_OF_A_ROOM, completion_length)
    columns = prompt_length + -(-completion_length // room) * room
    cache = key_value_bytes(sizes, num_rows * columns + num_prompts * prompt_length)
    made_anew = key_value_bytes(sizes, num_rows * (columns - room)) // sizes.num_layers
    embeddings = sizes.vocabulary_size * sizes.hidden_size * (1 if sizes.ties_embeddings else 2)
    return {
        "weights for sampling": (sizes.num_parameters - embeddings) * sizes.parameter_bytes,
        "keys and values": cache + made_anew,
        "logits": num_rows * sizes.vocabulary_size * (sizes.parameter_bytes + 2 * FLOAT32 + 2 * 8),
        "completions": num_completions * completion_length * (8 + 8 + FLOAT32),
    }


def sampling_weights_bytes(sizes: ModelSizes, training: MemorySettings) -> int:
    """Give the whole copy of the parameters that several processes sample with; one process has its own."""
    if training.num_processes == 1 and not training.cpu_offload:
        return 0
    return sizes.num_parameters * sizes.parameter_bytes


def in_words(size: int) -> str:
    """Word bytes for people.

    >>> in_words(3 * 2**29), in_words(2**20 + 2**19)
    ('1.50 GiB', '1.5 MiB')
    """
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"
