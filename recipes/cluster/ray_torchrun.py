"""Start one torchrun per machine of a Ray cluster: Ray finds the machines, torchrun does the rest.

    ray job submit --working-dir . -- python recipes/cluster/ray_torchrun.py --machines 2 --gpus 8 \
        recipes/math_qwen.yaml --runs /shared/runs

What it does not know is for `dteframe run`. The machines must share the folder of runs and DTEFRAME_CACHE
(docs/guides/run_on_several_gpus.md). It needs ray alone; torchrun must be on the machines' PATH.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(max_retries=0)
def address() -> str:
    """Give the address of the machine that this task was put on."""
    return str(ray.util.get_node_ip_address())


@ray.remote(max_retries=0)
def torchrun(words: list[str]) -> int:
    """Run torchrun to its end on the machine that this task was put on."""
    return subprocess.run(["torchrun", *words], check=False).returncode


def main() -> int:
    """Reserve the machines, and run on all of them at once; 0 if all ended well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machines", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--gpus", type=int, default=8, help="of each; 0: two processes on CPUs (default 8)")
    parser.add_argument("--strategy", default="STRICT_SPREAD", help="Ray's; PACK lets machines be one")
    parser.add_argument("--port", type=int, default=29400, help="at which they meet (default 29400)")
    known, words = parser.parse_known_args()
    ray.init()
    bundle = {"GPU": known.gpus, "CPU": known.gpus} if known.gpus else {"CPU": 1}
    group = placement_group([bundle] * known.machines, strategy=known.strategy)
    ray.get(group.ready())
    places = [
        {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, index),
            "num_gpus": known.gpus,
            "num_cpus": bundle["CPU"],
        }
        for index in range(known.machines)
    ]
    first = ray.get(address.options(**places[0]).remote())
    shared = ["--nnodes", str(known.machines), "--nproc-per-node", str(known.gpus or 2)]
    shared += ["--rdzv-backend", "c10d", "--rdzv-id", "dteframe", "--rdzv-endpoint", f"{first}:{known.port}"]
    codes = ray.get(
        [
            # Without being told, torchrun compares names and addresses, which not every cluster gives it.
            torchrun.options(**place).remote(
                [*shared, "--rdzv-conf", f"is_host={place is places[0]}", "-m", "dteframe", "run", *words]
            )
            for place in places
        ]
    )
    return max(abs(code) for code in codes)


if __name__ == "__main__":
    sys.exit(main())
