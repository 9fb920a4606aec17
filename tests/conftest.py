"""What every test needs: one thread, no network, and shapes that are checked."""

import os

from jaxtyping import install_import_hook

# Read when torch and huggingface_hub are first imported, which is after this file.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Every call of the mathematics is checked against the shapes that it declares. The records are not: some
# tests make broken ones on purpose, to see what the engine says.
install_import_hook(["dteframe.objectives.grpo", "dteframe.estimators.attention_math"], "beartype.beartype")
