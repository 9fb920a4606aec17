"""Reading, listing and validating recipes must stay cheap: what may not be imported on the way."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "reasoning_gym",
    "trl",
    "accelerate",
    "math_verify",
    "pyarrow",
    "vllm",
)


@pytest.mark.parametrize(
    "statement",
    [
        "import dteframe",
        "import dteframe.cli",
        "import dteframe.recipe",
        "import dteframe.testing",
        "from dteframe.registry import load_registry; load_registry(plugin_paths=[])",
    ],
)
def test_no_heavy_package_is_imported(statement):
    program = f"{statement}; import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout.split()) == ("", [])
