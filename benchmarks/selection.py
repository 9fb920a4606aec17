"""CPU-seconds and memory of a plan's prediction and choice over a large pool, over the bare matrix product.

A pool of random embeddings is put into a cache and goes through what a run does: the estimator starts on it,
and at every plan other references are measured, ``calls.predict`` predicts all questions and ``choose``
chooses some. Beside every plan the product of all embeddings and the references is timed, in pieces that stay
in the cache, nothing else done.

    python benchmarks/selection.py                       # a million questions, about 3 minutes, 5 GB of disk
    python benchmarks/selection.py --questions 100000
    python benchmarks/selection.py --adapter-width 896   # through an adapter, whose outputs are mapped too
    python benchmarks/selection.py --json                # last line: {"difficulty_target": ratio, ...}
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workloads import use_one_thread

if TYPE_CHECKING:
    import numpy as np

    from dteframe import Estimator, Question, Selector

WIDTH, NUM_REFERENCES, NUM_CHOSEN = 384, 256, 64
SELECTORS = ("difficulty_target", "informative_probability")
TIME_BAR, MEMORY_BAR = 1.5, 1.5


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one pool."""

    products: list[float]
    """CPU-seconds of the bare product, plan by plan."""
    predict: list[float]
    select: dict[str, list[float]]
    """By selector."""
    start_seconds: float
    memory: dict[str, float]
    """Peaks over the bytes of the embeddings, and bytes."""


def write_pool(folder: Path, num_questions: int) -> tuple[Question, ...]:
    """Write random embeddings to the cache of a model that is never loaded, and make the questions."""
    import numpy as np
    from safetensors.numpy import save_file

    from dteframe import Context, Question
    from dteframe.estimators.embedding_options import SentenceEmbeddings
    from dteframe.estimators.embeddings import ROWS_PER_FILE, embedder_of, embedding_folder, write_cached

    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"weight": np.zeros(1, np.float32)}, model / "model.safetensors")
    context = Context(folder, folder, "cpu", 0, lambda what, done, total: None, sys.stderr.write)
    embedder = embedder_of(SentenceEmbeddings(path=str(model)), _refuse, context)
    rng = np.random.default_rng(0)
    for first in range(0, num_questions, ROWS_PER_FILE):
        texts = [f"question {place}" for place in range(first, min(first + ROWS_PER_FILE, num_questions))]
        names = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
        rows = rng.standard_normal((len(texts), WIDTH), dtype=np.float32) + 0.5
        write_cached(embedding_folder(embedder, context), names, rows)
    texts = (f"question {place}" for place in range(num_questions))
    return tuple(Question(f"math-{place}", text, text, "0") for place, text in enumerate(texts))


def write_adapter(folder: Path, hidden_width: int) -> str:
    """Write an untrained adapter for the pool's embeddings."""
    import torch

    from dteframe import Context
    from dteframe.estimators.adapter import AdapterShape, build_adapter, save_adapter
    from dteframe.estimators.embedding_options import SentenceEmbeddings
    from dteframe.estimators.embeddings import embedder_of

    context = Context(folder, folder, "cpu", 0, lambda what, done, total: None, sys.stderr.write)
    embedder = embedder_of(SentenceEmbeddings(path=str(folder / "model")), _refuse, context)
    torch.manual_seed(0)
    adapter = build_adapter(AdapterShape(embedder.id, WIDTH, hidden_width))
    save_adapter(adapter, folder / "adapter.safetensors")
    return str(folder / "adapter.safetensors")


def measure(folder: Path, num_questions: int, adapter_width: int | None, num_plans: int) -> Measured:
    """Plan a few times, and time the bare product beside every plan."""
    import numpy as np

    from dteframe.engine import calls
    from dteframe.engine.choose import Uses, choose
    from dteframe.engine.pool import Pool

    bytes_of_embeddings = 4 * WIDTH * num_questions
    questions = write_pool(folder, num_questions)
    adapter = None if adapter_width is None else write_adapter(folder, adapter_width)
    before = memory_now()
    since = time.process_time()
    estimator, selectors = started(folder, questions, adapter)
    start_seconds = time.process_time() - since
    pool = Pool({question.id: question for question in questions}, {}, {})
    chosen = {name: Uses() for name in SELECTORS}
    predict: list[float] = []
    select: dict[str, list[float]] = {name: [] for name in SELECTORS}
    products: list[float] = []
    bare: Callable[[], None] | None = None
    for plan in range(num_plans + 1):
        measure_references(estimator, np.random.default_rng(plan), plan, pool)
        since = time.process_time()
        estimate = pool.in_order(calls.predict(estimator, plan, pool.train))
        predicted = time.process_time() - since
        for name, selector in selectors.items():
            since = time.process_time()
            choose(selector, estimate, NUM_CHOSEN, plan + 1, chosen[name], 8, np.random.default_rng(plan))
            select[name].append(time.process_time() - since)
        if bare is None:
            memory = memory_now()  # before the benchmark's own matrix is there
            bare = bare_product(folder, num_questions, adapter_width or WIDTH)
        since = time.process_time()
        bare()
        products.append(time.process_time() - since)
        predict.append(predicted)
    ratios = {
        "peak of the process": memory["VmHWM"] / bytes_of_embeddings,
        "peak beyond the questions": (memory["VmHWM"] - before["VmRSS"]) / bytes_of_embeddings,
        "of it private at the end": (memory["RssAnon"] - before["RssAnon"]) / bytes_of_embeddings,
    }
    warm = slice(1, None)
    return Measured(
        products[warm],
        predict[warm],
        {name: seconds[warm] for name, seconds in select.items()},
        start_seconds,
        ratios,
    )


def started(
    folder: Path, questions: tuple[Question, ...], adapter: str | None
) -> tuple[Estimator, dict[str, Selector]]:
    """Assemble and start an estimator and the selectors as a run does."""
    from dteframe import BatchArithmetic, Context
    from dteframe.registry import load_registry

    context = Context(folder, folder, "cpu", 0, lambda what, done, total: None, sys.stderr.write)
    registry = load_registry([])
    found = registry.get("estimator", "attention")
    embeddings = {"type": "sentence", "path": str(folder / "model")}
    config = found.config(embeddings=embeddings, reference_size=NUM_REFERENCES, adapter=adapter)
    estimator = found.component(config, context)
    estimator.start(questions, _refuse)
    selectors = {}
    for name in SELECTORS:
        found = registry.get("selector", name)
        selectors[name] = found.component(found.config(), context)
        selectors[name].start(BatchArithmetic(100, NUM_CHOSEN, 8, 1, 0, NUM_REFERENCES, 64, 64))
    return estimator, selectors


def measure_references(estimator: Estimator, rng: np.random.Generator, version: int, pool: object) -> None:
    """Tell the estimator random successes of the references that it asks for."""
    from dteframe import Observation
    from dteframe.engine import calls

    ids = calls.references(estimator, rng, pool.train)  # type: ignore[attr-defined]  # imported late
    trials = rng.integers(8, 9, len(ids))
    estimator.observe(Observation(ids, rng.integers(0, 9, len(ids)), trials, version, "reference"))


def bare_product(folder: Path, num_questions: int, width: int) -> Callable[[], None]:
    """Prepare the product of a mapped matrix of the same size and as many references."""
    import numpy as np

    from dteframe.estimators.attention_math import SCORES_AT_ONCE
    from dteframe.estimators.scratch import scratch_matrix

    matrix = scratch_matrix(folder, num_questions, width)
    rng = np.random.default_rng(1)
    rows = SCORES_AT_ONCE // NUM_REFERENCES
    for first in range(0, num_questions, rows):
        part = matrix[first : first + rows]
        rng.standard_normal(part.shape, dtype=np.float32, out=part)
    keys = np.array(matrix[:NUM_REFERENCES])
    scores = np.empty((rows, NUM_REFERENCES), np.float32)

    def product() -> None:
        for first in range(0, num_questions, rows):
            part = matrix[first : first + rows]
            np.matmul(part, keys.T, out=scores[: len(part)])

    return product


def memory_now() -> dict[str, int]:
    """Read this process's memory in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon", "RssFile")))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def _refuse(texts: object) -> np.ndarray:
    raise ValueError("the model was asked for embeddings that should be in the cache")


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--adapter-width", type=int, help="default: no adapter")
    parser.add_argument("--plans", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="ratios as one object on the last line")
    options = parser.parse_args()
    use_one_thread()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options.questions, options.adapter_width, options.plans)
    products = statistics.median(found.products)
    sys.stdout.write(f"{options.questions:,} questions x {WIDTH}, {NUM_REFERENCES} references\n")
    sys.stdout.write(f"start {found.start_seconds:.1f} s; bare product {products:.2f} s a plan\n")
    head = f"{'':26}{'predict s':>10}{'select s':>10}{'over product':>14}{'quartiles':>12}{'bar':>6}\n"
    sys.stdout.write(head)
    ratios: dict[str, float] = {}
    for name, seconds in found.select.items():
        of_pairs = [
            (one + other) / bare
            for one, other, bare in zip(found.predict, seconds, found.products, strict=True)
        ]
        low, ratios[name], high = statistics.quantiles(of_pairs, n=4, method="inclusive")
        sys.stdout.write(
            f"{name:26}{statistics.median(found.predict):10.2f}{statistics.median(seconds):10.2f}"
            f"{ratios[name]:14.2f}{f'{low:.2f}-{high:.2f}':>12}{TIME_BAR:6.1f}\n"
        )
    for name, ratio in found.memory.items():
        sys.stdout.write(f"{name:26}{ratio:10.2f} x the embeddings (bar {MEMORY_BAR})\n")
    if options.json:
        memory = {"peak_memory": found.memory["peak of the process"]}
        sys.stdout.write(json.dumps(ratios | memory) + "\n")


if __name__ == "__main__":
    main()
