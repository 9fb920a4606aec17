"""Checkpoints on a disk: what is kept, and that no damaged one is ever used."""

import errno
import json
import os
import threading
import time

import pytest

from dteframe.engine.checkpoint import finishing_checkpoints
from dteframe.engine.checkpoint_folder import (
    checkpoints_of,
    damage_of,
    keep_newest,
    newest_checkpoint,
    put_in_place,
    write_manifest,
    written_whole,
)
from dteframe.engine.run_folder import locked
from dteframe.errors import ResumeError

FILES = {
    "components.json": b'{"types": {}}',
    "components.safetensors": bytes(range(64)),
    "learner.json": b"{}",
    "learner/shard-00001-model-00001-of-00001.safetensors": bytes(range(100)),
    "policy/model.safetensors": bytes(range(200)),
    "policy/config.json": b'{"hidden_size": 32}',
    "progress.json": b'{"step": 4}',
}


def checkpoint(run_folder, step, files=FILES):
    folder = run_folder / "checkpoints" / f"step_{step:06d}"
    with written_whole(folder) as fresh:
        for name, content in files.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_bytes(content)
        write_manifest(fresh)
    return folder


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    os.truncate(path, 0)


def delete(path):
    path.unlink()


@pytest.mark.parametrize("hurt", [truncate, flip_a_bit, empty, delete])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_checkpoint_with_any_damaged_file_is_passed_over_with_a_warning(tmp_path, name, hurt):
    older, newer = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    hurt(newer / name)
    warnings = []
    assert newest_checkpoint(tmp_path, warnings.append) == older
    (warning,) = warnings
    assert warning.startswith(f"{newer}: ") and name in warning
    assert warning.endswith("; using the checkpoint before it, step_000002")
    hurt(older / name)
    with pytest.raises(ResumeError, match="no checkpoint is whole; restore one"):
        newest_checkpoint(tmp_path, warnings.append)


def test_every_flipped_bit_of_a_manifest_is_noticed_or_harmless(tmp_path):
    folder = checkpoint(tmp_path, 2, {"progress.json": b"{}", "policy/model.safetensors": b"1234"})
    whole = (folder / "manifest.json").read_bytes()
    harmless = []
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        (folder / "manifest.json").write_bytes(content)
        if damage_of(folder) is None:
            harmless.append(chr(whole[place]))
    # White space, and what says which format and version it is; a format that changed is refused.
    assert set(harmless) <= set(" \n01.")


@pytest.mark.parametrize(
    "text", ["null", "[]", "{}", '{"files": []}', '{"files": {}, "format": 1}', '"a"', "7"]
)
def test_a_manifest_that_says_nothing_is_damage(tmp_path, text):
    folder = checkpoint(tmp_path, 2)
    (folder / "manifest.json").write_text(text)
    assert damage_of(folder).startswith("its manifest.json cannot be read (")


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    folder = checkpoint(tmp_path, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99, "dteframe": "9.0"}))
    with pytest.raises(ResumeError) as caught:
        newest_checkpoint(tmp_path, pytest.fail)
    assert str(caught.value) == (
        f"{folder}: was written by DTEFrame '9.0' in format 99; this version reads format 1; resume with "
        "that version, or give another name=..."
    )


def names(run_folder):
    return [folder.name for folder in checkpoints_of(run_folder)]


def test_the_newest_and_the_best_are_kept(tmp_path):
    folders = {step: checkpoint(tmp_path, step) for step in (2, 4, 6, 8)}
    keep_newest(folders[8], 2, folders[2])
    assert names(tmp_path) == ["step_000008", "step_000006", "step_000002"]
    keep_newest(folders[8], None, None)
    assert names(tmp_path) == ["step_000008", "step_000006", "step_000002"]


def test_checkpoints_of_a_course_that_was_left_go_and_unfinished_ones_too(tmp_path):
    folders = {step: checkpoint(tmp_path, step) for step in (2, 4, 9)}
    (tmp_path / "checkpoints" / ".step_000007.writing").mkdir()
    (tmp_path / "checkpoints" / ".step_000003.removing").mkdir()
    keep_newest(folders[4], 3, None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000004",
    ]


def test_steps_beyond_a_million_sort_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoint(tmp_path, step)
    assert names(tmp_path) == ["step_1000000", "step_999999"]


def test_a_clock_that_jumps_changes_nothing(tmp_path):
    older, newer = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    for folder, seconds in ((older, time.time() + 1e8), (newer, 0)):
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (seconds, seconds))
    assert newest_checkpoint(tmp_path, pytest.fail) == newer


def test_a_folder_that_takes_the_place_of_another_leaves_nothing_of_it(tmp_path):
    old, new = tmp_path / "policy", tmp_path / "new"
    old.mkdir()
    (old / "old.txt").touch()
    new.mkdir()
    (new / "new.txt").touch()
    put_in_place(new, old)
    assert [path.name for path in old.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_lock_leaves_no_trace_of_a_start_that_was_refused(tmp_path):
    with pytest.raises(ResumeError), locked(tmp_path / "runs" / "tiny"):
        raise ResumeError("refused")
    assert not (tmp_path / "runs" / "tiny").exists()
    with locked(tmp_path / "runs" / "tiny"):
        (tmp_path / "runs" / "tiny" / "recipe.yaml").touch()
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["recipe.yaml"]


def test_a_run_goes_on_while_a_checkpoint_is_completed_and_the_end_waits_for_it():
    may_end, done = threading.Event(), []

    def work():
        may_end.wait(60)
        done.append("complete")

    with finishing_checkpoints() as finishing:
        finishing.begin(work)
        finishing.look()
        assert not done
        may_end.set()
    assert done == ["complete"]


def test_what_a_checkpoint_fails_with_is_raised_when_the_run_next_looks():
    def work():
        raise OSError(errno.ENOSPC, "No space left on device")

    with finishing_checkpoints() as finishing:
        finishing.begin(work)
        with pytest.raises(OSError, match="No space left"):
            while True:
                finishing.look()
        finishing.look()
        finishing.wait()


def test_what_the_last_checkpoint_fails_with_is_raised_at_the_end():
    def work():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), finishing_checkpoints() as finishing:
        finishing.begin(work)
