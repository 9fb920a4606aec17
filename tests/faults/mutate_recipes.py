"""Mutate recipes and see what becomes of each: a plan, or a refusal that says where and what.

``python tests/faults/mutate_recipes.py --count 10000`` prints the counts, and every surprise with its seed.
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_run import TINY
from verdicts import Verdict, judge_many, verdict

from dteframe.errors import RecipeError
from dteframe.memory_plan import device_bytes, memory_plan
from dteframe.plan_text import memory_text, plan_text, workload
from dteframe.recipe import load_recipe
from dteframe.recipe.document import MAX_VALUES
from dteframe.recipe.loader import LoadedRecipe
from dteframe.registry import Registry

RECIPES = Path(__file__).parents[2] / "recipes"
LOCATED = re.compile(r"^(?:.+:\d+:\d+|--set .*|command line|.+\.yaml): ", re.DOTALL)
"""How a line of a refusal begins."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**9, 2**63, -(2**64), 10**300, 10**4000),
    *(0.0, -0.0, 0.5, 1e-300, -1e300, 1e308, float("inf"), float("-inf"), float("nan"), 5e-324),
    *("", " ", "none", "null", "yes", "1e-3", "1_000", "grpo", "uniform", "attention", "cuda", "auto"),
    *("../../etc/passwd", "/tmp/x", "~", "~nobody/x", "a\0b", "a" * 300, "a" * 100_000, "NUL", "...", "-rf"),
    *("\u202e", "é\u0301", "\ud800", "😀" * 50, "\x85", "\ufeff", "\n", "a: b", "{", "*x", "&y", "%TAG"),
    *(
        "(",
        "(?P<x>a)(?P<x>b)",
        "[",
        "(a+)+$",
        "\\",
        "(" * 200 + ")" * 200,
        "{question}",
        "{question.__class__}",
    ),
    *("http://", "http://[::1", "ftp://x", "http://x:99999", "foo", "localhost:8000", "http://\0"),
    *(
        [],
        {},
        [[]],
        [None],
        [{}],
        {"type": None},
        {"type": []},
        {"type": {"type": "x"}},
        {"": ""},
        [1, "a", {}],
    ),
    *(
        {"type": "grpo"},
        {"type": "fifo"},
        {"type": "none"},
        [{"type": "console"}] * 3,
        {"a": {"b": {"c": [1]}}},
    ),
)
LINES = (
    *(
        b"training: *training",
        b"anchor: &a [*a, *a]",
        b"<<: *x",
        b"name: &x tiny",
        b"? [a, b]\n: c",
        b"- x",
        b"---",
    ),
    *(
        b"...",
        b"%YAML 1.1",
        b"!!python/object/apply:os.system [ls]",
        b"x: !!binary aGk=",
        b"\tname: tab",
        b"seed: 08",
    ),
    *(
        b"a: &a {b: &b {c: *a}}",
        b"seed: 0x1F",
        b"seed: 1:30",
        b"name: 2026-01-01",
        b"#" * 5000,
        b"[" * 500,
        b"{" * 60,
    ),
    *(
        b'name: "\\ud800"',
        b'name: "\\U99999999"',
        b'name: "\\x00"',
        b"name: 'unclosed",
        b"key without colon",
        b"= : =",
    ),
    b"\n".join(
        b"l%d: &l%d [%s]" % (i, i, b", ".join([b"*l%d" % (i - 1)] * 9) if i else b"x") for i in range(9)
    ),
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The recipes that are mutated."""

    valid: tuple[bytes, ...]
    broken: tuple[bytes, ...]

    @classmethod
    def read(cls, most_bytes: int = 10**6) -> Corpus:
        """Take our recipes and the tests', and those that are broken already; leave long ones out."""
        folders = (RECIPES, Path(__file__).parents[1] / "broken_recipes")
        ours, broken = ([path.read_bytes() for path in sorted(folder.glob("*.yaml"))] for folder in folders)
        valid = [TINY.encode(), *ours]
        return cls(*(tuple(text for text in texts if len(text) <= most_bytes) for texts in (valid, broken)))


def mutated(rng: random.Random, corpus: Corpus) -> bytes:
    """Change a recipe in a place or a few: its values, or its bytes."""
    text = rng.choice(corpus.valid if rng.random() < 0.8 else corpus.broken)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        text = rng.choice((_in_values, _in_values, _in_text))(rng, text, corpus)
    return text


def mutated_overrides(rng: random.Random) -> list[str]:
    """Make up to two words ``key=value``, mostly of keys that there are."""
    keys = [
        "name",
        "seed",
        "training.max_steps",
        "training",
        "model.type",
        "reward.0.type",
        "reward.3",
        "tracker",
    ]
    keys += [
        "model.warm_up.steps",
        "training..x",
        "",
        "a=b",
        "estimator.type",
        "\ud800",
        "rollout.temperature.x",
    ]
    return [
        f"{rng.choice(keys)}={_scalar(rng.choice(VALUES))}" for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 2)))
    ]


def outcome_of(path: Path, overrides: Sequence[str], registry: Registry) -> Verdict:
    """Do what ``dteframe plan`` does with a file, and judge what comes of it."""
    began = time.process_time()
    try:
        message = ""
        loaded = load_recipe(path, overrides, registry)
        kind = "plan"
        _plan(loaded)
        _reads_back(loaded, path, registry)
    except RecipeError as error:
        kind, message = "refused", str(error)
        unlocated = [str(problem) for problem in error.problems if not LOCATED.match(str(problem))]
        if unlocated or not message:
            kind, message = "surprise", f"without a place: {unlocated}"
    except Exception:  # noqa: BLE001  # that is what is looked for
        kind, message = "surprise", traceback.format_exc()
    return verdict(kind, time.process_time() - began, message)


def outcomes(
    seeds: range, folder: Path, registry: Registry, corpus: Corpus
) -> Iterator[tuple[int, str, Verdict]]:
    """Judge the recipes of some seeds; the file of a surprise stays in ``folder``."""
    for seed in seeds:
        rng = random.Random(seed)
        path = folder / f"recipe_{seed}.yaml"
        path.write_bytes(mutated(rng, corpus))
        found = outcome_of(path, mutated_overrides(rng), registry)
        if found.kind != "surprise":
            path.unlink()
        yield seed, str(path), found


def _plan(loaded: LoadedRecipe) -> None:
    """Explain the recipe."""
    recipe = loaded.recipe
    # The header of a GGUF file takes seconds to read, however sound recipe and file are.
    is_gguf = getattr(recipe.model, "gguf_file", None) is not None
    work, sizes = workload(recipe), None if is_gguf else recipe.model.sizes()
    available = device_bytes(recipe, 1, 80.0)
    memory = memory_plan(recipe, sizes, 1, available) if sizes else None
    text = f"{plan_text(work)}\n{memory_text(memory, available)}"
    json.dumps([text, *loaded.notes])


def _reads_back(loaded: LoadedRecipe, path: Path, registry: Registry) -> None:
    """Write the recipe as a run folder has it, and read it again."""
    again = path.with_suffix(".again.yaml")
    again.write_text(loaded.recipe.to_yaml(), encoding="utf-8")
    try:
        assert load_recipe(again, (), registry).recipe == loaded.recipe, "it does not read back"
    finally:
        again.unlink()


def _in_values(rng: random.Random, text: bytes, corpus: Corpus) -> bytes:
    """Change a value, a key or a place of the tree."""
    tree = _tree(text)
    if not isinstance(tree, dict):
        return _in_text(rng, text, corpus)
    places = list(_places(tree))
    holder, key = rng.choice(places) if places else (tree, "name")
    changes: list[Callable[[], None]] = [
        lambda: holder.__setitem__(key, copy.deepcopy(rng.choice(VALUES))),
        lambda: holder.__setitem__(key, copy.deepcopy(rng.choice(VALUES))),
        *[lambda: holder.__setitem__(key, _nearby(rng, holder[key]))] * 6,
        lambda: holder.__setitem__(key, [holder[key]]),
        lambda: holder.__setitem__(key, {"type": holder[key]}),
        lambda: holder.__setitem__(key, copy.deepcopy(_other(rng, places))),
        lambda: holder.__delitem__(key),
    ]
    if isinstance(holder, dict):
        changes.append(lambda: holder.__setitem__(_misspelt(rng, str(key)), holder.pop(key)))
        changes.append(lambda: holder.__setitem__(_misspelt(rng, str(key)), rng.choice(VALUES)))
    rng.choice(changes)()
    try:
        written = yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=rng.random() < 0.5)
        return written.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, yaml.YAMLError):
        return text


def _in_text(rng: random.Random, text: bytes, corpus: Corpus) -> bytes:
    """Change bytes or lines, whatever they mean."""
    lines, place = text.split(b"\n"), rng.randrange(len(text) + 1)
    line = rng.randrange(len(lines))
    match rng.randrange(11):
        case 0:
            return text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]
        case 1:
            return text[:place] + rng.choice(LINES) + text[place:]
        case 2:
            return b"\n".join([*lines[:line], rng.choice(LINES), *lines[line:]])
        case 3:
            return b"\n".join([*lines[:line], *lines[line + 1 :]])
        case 4:
            return b"\n".join([*lines[:line], lines[line], *lines[line:]])
        case 5:
            return b"\n".join([*lines[:line], b" " * rng.randint(1, 5) + lines[line], *lines[line + 1 :]])
        case 6:
            return text[:place]
        case 7:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\r\n")) + text
        case 8:
            return text.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n")))
        case 9:
            return text + b"\n" + rng.choice(corpus.broken)
        case _:
            return text.decode("utf-8", "replace").encode(
                rng.choice(("utf-16", "latin-1", "utf-8")), "replace"
            )


def _tree(text: bytes) -> Any:
    try:
        tree = yaml.load(text, yaml.CSafeLoader)
        # An alias of itself would never end, and a bomb's values would take gigabytes.
        num_values = sum(1 for _ in islice(_places(tree), MAX_VALUES + 1))
        if num_values > MAX_VALUES:
            return None
        json.dumps(tree, default=str)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError):
        return None
    return tree


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Give every holder with every key of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _other(rng: random.Random, places: Sequence[tuple[Any, Any]]) -> Any:
    holder, key = rng.choice(places)
    return holder[key]


def _nearby(rng: random.Random, value: Any) -> Any:
    """Change a value a little."""
    if isinstance(value, bool) or value is None:
        return rng.choice((not value, str(value), 0))
    if isinstance(value, int | float):
        return rng.choice((-value, value * 1000, value + 1, float(value), str(value), value / 7, 0))
    if isinstance(value, str):
        return rng.choice((_misspelt(rng, value), value.upper(), f" {value}", value * 2, [value]))
    return copy.deepcopy(value)


def _misspelt(rng: random.Random, word: str) -> str:
    place = rng.randrange(len(word) + 1)
    return (
        word[:place]
        + rng.choice(("", "x", "_", "-", ".", " ", "é", "\u200b"))
        + word[place + rng.randrange(2) :]
    )


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def main() -> None:
    """Judge as many recipes as asked for, and print what came of them."""
    sys.set_int_max_str_digits(0)  # of the mutator's own values
    from dteframe.registry import load_registry

    registry, corpus = load_registry([]), Corpus.read()
    folder = Path(tempfile.mkdtemp(prefix="mutated_recipes_"))
    judge_many(
        __doc__.splitlines()[0], "recipes", 10_000, lambda seeds: outcomes(seeds, folder, registry, corpus)
    )


if __name__ == "__main__":
    main()
