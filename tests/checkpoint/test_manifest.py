"""What counts as a checkpoint, what is found wrong, what may be deleted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.checkpoint import manifest


def make_checkpoint(run_dir: Path, step: int, size: int = 1000) -> Path:
    folder = manifest.checkpoint_dir(run_dir, step)
    folder.mkdir(parents=True)
    for name in ("a.distcp", "run.json"):
        (folder / name).write_bytes(bytes((i * 7 + step) % 256 for i in range(size)))
    manifest.write_manifest(folder, manifest.file_facts(folder, ["a.distcp", "run.json"]))
    return folder


def test_whole_checkpoint_verifies(tmp_path: Path) -> None:
    assert manifest.verify(make_checkpoint(tmp_path, 5)) == []


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 999), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, place: int, bit: int) -> None:
    folder = make_checkpoint(tmp_path_factory.mktemp("run"), 5)
    content = bytearray((folder / "a.distcp").read_bytes())
    content[place] ^= 1 << bit
    (folder / "a.distcp").write_bytes(content)
    assert [p for p in manifest.verify(folder) if "a.distcp" in p]


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    (folder / "a.distcp").write_bytes(b"short")
    (folder / "run.json").unlink()
    problems = manifest.verify(folder)
    assert any("a.distcp has 5 bytes instead of 1000" in p for p in problems)
    assert any("run.json is missing" in p for p in problems)


def test_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    (make_checkpoint(tmp_path, 6) / manifest.MANIFEST).unlink()
    assert manifest.find_checkpoints(tmp_path) == [manifest.checkpoint_dir(tmp_path, 5)]


def test_flipped_bit_in_the_manifest_itself_is_found(tmp_path: Path) -> None:
    """A changed name or size would otherwise hide a file, or accuse a good one."""
    file = make_checkpoint(tmp_path, 5) / manifest.MANIFEST
    good = file.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        file.write_bytes(bad)
        assert manifest.verify(file.parent), (place, bytes(bad))


def test_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    (tmp_path / "outside").write_text("x")
    manifest.write_manifest(folder, manifest.file_facts(folder, ["../../outside"]))
    assert "no file beside it" in manifest.verify(folder)[0]


def test_parts_of_the_verification_make_the_whole(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    for name in ("a.distcp", "run.json"):
        (folder / name).write_bytes(b"")
    parts = [problem for part in range(3) for problem in manifest.verify(folder, part, 3)]
    assert sorted(parts) == sorted(manifest.verify(folder))


def test_prune_keeps_the_newest_and_the_permanent(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        make_checkpoint(tmp_path, step)
    manifest.prune(tmp_path, keep_last=2, keep_every=30, done=70)
    kept = [manifest.step_of(folder) for folder in manifest.find_checkpoints(tmp_path)]
    assert kept == [70, 60, 30]
    # Back behind a damaged step 70, the run saved step 65.
    make_checkpoint(tmp_path, 65)
    manifest.prune(tmp_path, keep_last=1, keep_every=None, done=65)
    kept = [manifest.step_of(folder) for folder in manifest.find_checkpoints(tmp_path)]
    assert kept == [70, 65]


def test_prune_deletes_nothing_when_the_newest_is_not_what_was_written(tmp_path: Path) -> None:
    whole, damaged = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    content = (damaged / "a.distcp").read_bytes()
    (damaged / "a.distcp").write_bytes(content[:-1] + b"?")  # the same size
    problems = manifest.prune(tmp_path, keep_last=1, keep_every=None, done=20)
    assert "a.distcp has the right size but not the content" in problems[0]
    assert manifest.find_checkpoints(tmp_path) == [damaged, whole]
    assert manifest.verify(whole) == []


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    manifest.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        manifest.write_json(file, {"a": object()})
    assert file.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_json_that_many_processes_write_at_once_can_always_be_read(tmp_path: Path) -> None:
    """As ranks do that are told to end before they know each other. Each writes another length."""
    file = tmp_path / "x.json"
    manifest.write_json(file, "x" * 300)
    script = (
        "import sys, pathlib; from megatron_ext.checkpoint.manifest import write_json\n"
        "for _ in range(150): write_json(pathlib.Path(sys.argv[1]), 'x' * int(sys.argv[2]))"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, file, str(length)])
        for length in (10, 3_000, 30_000, 100_000)
    ]
    while any(writer.poll() is None for writer in writers):
        assert set(json.loads(file.read_text())) == {"x"}
    assert [writer.returncode for writer in writers] == [0] * 4
    assert list(tmp_path.iterdir()) == [file]


def test_the_folder_of_a_run_that_was_moved_away_does_not_come_back(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        manifest.write_json(tmp_path / "gone/status.json", {})
    assert not (tmp_path / "gone").exists()
