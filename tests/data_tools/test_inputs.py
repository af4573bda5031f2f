"""Which files a command reads: nothing that is meant is passed over, nothing else is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zstandard

from data_tools.corpus import find_sources
from data_tools.errors import UserError
from data_tools.options import Options
from data_tools.shares import RANGES, SPOOLED, WHOLE, share_out
from data_tools.tokenization import tokenize
from tests.data_tools.conftest import write_compressed, write_jsonl


def names(folder: Path) -> list[str]:
    return [os.path.relpath(source.path, folder) for source in find_sources([str(folder)])]


def test_links_to_files_and_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    write_jsonl(tmp_path / "elsewhere/deep/a.jsonl", ["a"])
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    (folder / "circle").symlink_to(folder)
    assert names(folder) == ["b.jsonl", "linked/deep/a.jsonl"]


def test_names_do_not_depend_on_the_order_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    write_jsonl(tmp_path / "real/a.jsonl", ["a"])
    for link in ("alink", "zlink"):
        (tmp_path / link).symlink_to(tmp_path / "real")
    walk = os.walk

    def other_way_round(*arguments, **settings):
        for place, folders, files in walk(*arguments, **settings):
            folders.reverse()
            yield place, folders, files[::-1]

    assert names(tmp_path) == ["real/a.jsonl"]
    monkeypatch.setattr(os, "walk", other_way_round)
    assert names(tmp_path) == ["real/a.jsonl"]


def test_what_lies_beside_documents_is_left_out(tmp_path: Path) -> None:
    for name in ("documents/a.json.gz", "quality_signals/a.signals.json.gz",
                 "duplicates/a.json.gz", "minhash/a.json.gz", "out.work/parts/b.jsonl",
                 ".hidden.jsonl", ".cache/a.jsonl", "lost+found/a.jsonl",
                 "out.receipt.json", "out.rejected.jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_compressed(tmp_path / name, b'{"raw_content": "a"}\n')
    assert names(tmp_path) == ["documents/a.json.gz"]
    # Named themselves they are taken at their word.
    assert names(tmp_path / "duplicates") == ["a.json.gz"]


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To root no folder is closed, so the system call is made to fail.
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "broken").mkdir()
    scan = os.scandir

    def failing(path):
        if Path(path).name == "broken":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(UserError, match=r"broken cannot be read \(Permission denied\)"):
        names(tmp_path)


def test_an_archive_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "b.jsonl.lz4").write_bytes(b"\x04\x22\x4d\x18")
    with pytest.raises(UserError, match=r"b\.jsonl\.lz4 is compressed in a way"):
        names(tmp_path)


def test_a_pipe_is_refused_with_what_to_write(model: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"pipe is no regular file: .* write - in its place"):
        tokenize([str(pipe)], model, tmp_path / "out")
    assert not (tmp_path / "out.bin").exists()


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "x") + b"\xff.jsonl"
    Path(os.fsdecode(path)).write_bytes(b'{"text": "a"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize(("tasks", "mode"), [(1, WHOLE), (64, SPOOLED)])
def test_only_the_archives_of_the_task_decide_whether_they_go_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: int, mode: str
) -> None:
    monkeypatch.setattr("data_tools.shares._SMALL_BYTES", -1)
    for number in range(64):
        write_jsonl(tmp_path / f"{number:02d}.jsonl.gz", ["a"])
    write_jsonl(tmp_path / "z.jsonl", ["b"] * 100)
    shares = share_out(find_sources([str(tmp_path)]), Options(task=(0, tasks)))
    assert {share.mode for share in shares} <= {mode, RANGES}
    assert any(share.mode == mode for share in shares)


@pytest.mark.parametrize(("log", "mode"), [(23, WHOLE), (24, SPOOLED)])
def test_archives_with_wide_windows_are_decompressed_one_at_a_time(
    tmp_path: Path, log: int, mode: str
) -> None:
    window = zstandard.ZstdCompressionParameters(window_log=log)
    stream = zstandard.ZstdCompressor(compression_params=window).compressobj()
    content = stream.compress(b'{"text": "a"}\n') + stream.flush()
    (tmp_path / "x.jsonl.zst").write_bytes(content)
    (share,) = share_out(find_sources([str(tmp_path)]), Options())
    assert share.mode == mode
