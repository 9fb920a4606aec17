"""What every test needs: one thread, no network."""

import os

# Read when torch and huggingface_hub are first imported, which is after this file.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
