"""The scripts for clusters: shells read them, and under stand-ins for SLURM's commands they do a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
CLUSTER = PROJECT / "recipes" / "cluster"
RECIPE = """\
name: small
training: {max_steps: 2, questions_per_step: 4, num_generations: 4, evaluation_size: 4, device: cpu}
model: {type: from_scratch, hidden_size: 32, num_heads: 2}
dataset: {type: list_operations, size: 200, chain_lengths: [1]}
reward: {type: exact_match, answer_pattern: ":([0-9]+)"}
rollout: {type: transformers, max_completion_length: 8}
"""
SRUN = """\
#!/bin/sh
# As srun does, start the command once on each of the job's machines, which are all this one.
[ "$1" = --kill-on-bad-exit=1 ] && shift
machine=1
while [ "$machine" -lt "$SLURM_JOB_NUM_NODES" ]; do
    SLURM_PROCID=$machine "$@" &
    machine=$((machine + 1))
done
SLURM_PROCID=0 "$@" || exit
wait
"""
SCONTROL = "#!/bin/sh\n# As scontrol does, name the machines of the job.\necho localhost\necho localhost\n"


@pytest.fixture
def slurm(tmp_path):
    """Make a folder with stand-ins for SLURM's commands and a recipe; give its environment."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "small.yaml").write_text(RECIPE)
    scripts = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{scripts}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "machine[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "PROCESSES_PER_MACHINE": "1",
        "DTEFRAME_CACHE": str(tmp_path / "cache"),
    }


def submitted(script, environment, *words):
    return subprocess.run(
        ["bash", str(CLUSTER / script), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_a_shell_can_read_a_script_and_it_says_how_it_is_used(script, slurm):
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = submitted(script.name, slurm)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: sbatch ")


@pytest.mark.slow
def test_the_processes_of_two_machines_meet_and_do_one_run(slurm, tmp_path):
    done = submitted("slurm.sh", slurm, "small.yaml", "name=two")
    assert (done.returncode, done.stdout) == (0, "runs/two\n"), done.stderr
    lines = (tmp_path / "runs" / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


@pytest.mark.slow
def test_a_task_of_a_printed_job_array_does_the_run_of_its_number(slurm, tmp_path):
    (tmp_path / "sweep.yaml").write_text("recipe: small.yaml\nseeds: [0, 1]\n")
    script = subprocess.run(
        [sys.executable, "-m", "dteframe", "sweep", "sweep.yaml", "--executor", "slurm", "--jobs", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "#SBATCH --array=1-2%3\n" in script
    (tmp_path / "array.sh").write_text(script)
    one = {**slurm, "SLURM_JOB_NUM_NODES": "1"}
    done = submitted(tmp_path / "array.sh", {**one, "SLURM_ARRAY_TASK_ID": "2"})
    assert done.returncode == 0, done.stderr
    command, folder = done.stdout.splitlines()
    assert command == "dteframe run small.yaml name=sweep-s1 seed=1 --runs runs/sweep --resume"
    assert folder == "runs/sweep/sweep-s1"
