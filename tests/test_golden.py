"""The golden run: a refactor changes nothing. A change that moves it says why in docs/changelog.md.

``python tests/test_golden.py`` writes it anew.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from tiny_run import rows, run_tiny

GOLDEN = Path(__file__).parent / "golden" / "tiny.json"
SETTINGS = ("training.max_steps=8",)
FLOAT32_ROUNDING = 1e-7
"""A loss is a sum of advantages that cancel: near 0 it has no more digits than its summands."""


def golden_run(folder):
    run_tiny(folder, *SETTINGS)
    return {name: rows(folder, name) for name in ("metrics", "selections")}


def assert_equal_up_to_rounding(actual, expected, where):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal_up_to_rounding(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for place, value in enumerate(expected):
            assert_equal_up_to_rounding(actual[place], value, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-6, abs=FLOAT32_ROUNDING), where
    else:
        assert actual == expected, where


def test_the_golden_run_has_not_moved(tmp_path):
    actual = json.loads(json.dumps(golden_run(tmp_path)))
    assert_equal_up_to_rounding(actual, json.loads(GOLDEN.read_text()), "golden")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        written = golden_run(Path(folder))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(written, indent=0) + "\n")
    sys.stderr.write(f"wrote {GOLDEN}\n")
