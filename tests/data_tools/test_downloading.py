"""`download` against a real HTTP server that supports ranges, fails, and cuts connections."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.downloading import download
from data_tools.errors import Failure, UserError
from data_tools.manifest import read_manifest

ROOT = Path(__file__).parents[2]
FILES = {f"/v1/arxiv/{i}.jsonl": bytes([i]) * (100_000 + i) for i in range(6)}
FILES["/v1/book/b.jsonl"] = b"book" * 1000


class Server(BaseHTTPRequestHandler):
    faults: dict[str, list[str]] = {}  # noqa: RUF012  what the next requests of a path suffer
    seen: list[tuple[str, str | None]] = []  # noqa: RUF012
    versions: dict[str, bytes] = {}  # noqa: RUF012  content by path where it changed
    open = threading.Event()  # a "stall" ends with it

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.seen.append((self.path, asked))
        fault = self.faults.get(self.path, [])
        what = fault.pop(0) if fault else ""
        if self.path not in FILES or what == "404":
            self.send_error(404)
            return
        if what == "503":
            self.send_error(503)
            return
        data = self.versions.get(self.path, FILES[self.path])
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        unchanged = self.headers.get("If-Range") in (None, tag)
        start = int(asked[6:-1]) if asked and what != "no ranges" and unchanged else 0
        self.send_response(206 if start else 200)
        if what != "no length":
            self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", tag)
        self.end_headers()
        body = data[start:]
        if what in ("cut", "stall"):
            body = body[: len(body) // 2]
        if what == "corrupt":
            body = b"?" + body[1:]
        self.wfile.write(body)
        if what == "stall":
            self.wfile.flush()
            self.open.wait(60)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("data_tools.downloading.PAUSE_S", 0.0)
    Server.faults, Server.seen, Server.versions, Server.open = {}, [], {}, threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Server.open.set()
    server.shutdown()
    thread.join()
    server.server_close()


def write_manifest(folder: Path, url: str, checksums: bool = True) -> str:
    lines = [
        f"{url}{path} " + (f"sha256:{hashlib.sha256(data).hexdigest()}" if checksums else "")
        for path, data in FILES.items()
    ]
    (folder / "urls.txt").write_text("# RedPajama\n" + "\n".join(lines) + "\n")
    return str(folder / "urls.txt")


def content(folder: Path) -> dict[str, bytes]:
    return {
        f"/v1/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_all_files_arrive_whole_and_only_once(url: str, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, url)
    assert download(manifest, tmp_path / "data")["fetched"] == 7
    assert content(tmp_path / "data") == FILES
    Server.seen.clear()
    assert download(manifest, tmp_path / "data")["fetched"] == 0
    assert Server.seen == []


def test_faults_on_the_way_are_overcome(url: str, tmp_path: Path) -> None:
    first, second, third, fourth = list(FILES)[:4]
    Server.faults = {
        first: ["503", "503"],
        second: ["cut", "cut"],
        third: ["corrupt"],
        fourth: ["cut", "no ranges"],
    }
    download(write_manifest(tmp_path, url), tmp_path / "data")
    assert content(tmp_path / "data") == FILES
    ranges = [asked for path, asked in Server.seen if path == second]
    assert ranges[0] is None and ranges[1] == f"bytes={len(FILES[second]) // 2}-"


def test_a_missing_file_is_named_and_the_others_stay(url: str, tmp_path: Path) -> None:
    path = next(iter(FILES))
    Server.faults = {path: ["404"]}
    manifest = write_manifest(tmp_path, url)
    with pytest.raises(Failure, match=r"1 of 7 .*arxiv/0\.jsonl: HTTP 404"):
        download(manifest, tmp_path / "data")
    assert len(content(tmp_path / "data")) == 6
    assert download(manifest, tmp_path / "data")["fetched"] == 1


def test_a_wrong_checksum_never_becomes_a_file(url: str, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text(f"{url}/v1/book/b.jsonl {'0' * 64}\n")
    with pytest.raises(Failure, match="checksum"):
        download(str(tmp_path / "urls.txt"), tmp_path / "data", attempts=2)
    assert content(tmp_path / "data") == {}


def test_a_file_damaged_later_is_fetched_again(url: str, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, url)
    download(manifest, tmp_path / "data")
    (tmp_path / "data" / "book" / "b.jsonl").write_bytes(b"damaged")
    assert download(manifest, tmp_path / "data")["fetched"] == 1
    assert content(tmp_path / "data") == FILES


def test_checksums_in_a_second_file(url: str, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, url, checksums=False)
    assert download(manifest, tmp_path / "plain")["without_checksum"] == 7
    lines = [f"{hashlib.sha256(d).hexdigest()}  {p.removeprefix('/v1/')}" for p, d in FILES.items()]
    (tmp_path / "SHA256SUMS").write_text("\n".join(lines))
    found = download(manifest, tmp_path / "data", checksums=str(tmp_path / "SHA256SUMS"))
    assert found["without_checksum"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no URL"),
        ("ftp://host/x", "neither http"),
        ("http://host/x what", "not a URL"),
        ("http://host/a/x.jsonl\nhttp://host/a/x.jsonl", "twice"),
        ("\n".join(f"http://host/{i % 5099}" for i in range(5100)), "lists 0 twice"),
        ("http://host/a\nhttp://host/a/x", "a file and a folder"),
        ("http://host\nhttp://host/a/x", "no file name"),
        ("http://[bad/x", "urls.txt:1: .* is not a URL"),
        ("http://host:99999/x", "urls.txt:1: .* is not a URL"),
        ("http:///x", "urls.txt:1: .* is not a URL"),
        ("http://host/a%00b", "no file name"),
        ("file:///etc/hostname", "neither http"),
        ("http://host/a/b\nhttp://host/%2e%2e/%2e%2e/etc/passwd", "leaves|twice|mend"),
    ],
)
def test_manifests_that_make_no_sense_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "urls.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        read_manifest(str(tmp_path / "urls.txt"))


def test_letters_beyond_ascii_in_a_url_are_encoded(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FILES, "/v1/%C3%A4.jsonl", b"x")
    (tmp_path / "urls.txt").write_text(f"{url}/v1/\u00e4.jsonl\n")
    download(str(tmp_path / "urls.txt"), tmp_path / "data")
    assert (tmp_path / "data" / "\u00e4.jsonl").read_bytes() == b"x"


def cut_short(path: str, url: str, tmp_path: Path) -> str:
    """The manifest of one file, of which half has arrived in `data`."""
    manifest = tmp_path / "urls.txt"
    manifest.write_text(f"{url}{path}\n")
    Server.faults = {path: ["cut"]}
    with pytest.raises(Failure, match="2,000 of 4,000 bytes"):
        download(str(manifest), tmp_path / "data", attempts=1)
    return str(manifest)


def test_a_file_that_changed_in_between_is_fetched_from_its_beginning(
    url: str, tmp_path: Path
) -> None:
    path = "/v1/book/b.jsonl"
    manifest = cut_short(path, url, tmp_path)
    Server.versions = {path: b"other" * 1000}
    download(manifest, tmp_path / "data")
    assert content(tmp_path / "data") == {"/v1/b.jsonl": b"other" * 1000}
    assert Server.seen == [(path, None), (path, "bytes=2000-")]


def test_what_grew_beyond_the_length_that_the_server_tells_is_fetched_again(
    url: str, tmp_path: Path
) -> None:
    path = "/v1/book/b.jsonl"
    manifest = cut_short(path, url, tmp_path)
    (partial,) = (tmp_path / "data").glob(".*.part")
    with open(partial, "ab") as stream:
        stream.write(bytes(4000))  # another program's doing
    download(manifest, tmp_path / "data")
    assert content(tmp_path / "data") == {"/v1/b.jsonl": FILES[path]}


def test_without_checksum_and_length_nothing_tells_whether_it_is_whole(
    url: str, tmp_path: Path
) -> None:
    Server.faults = {path: ["no length"] * 2 for path in FILES}
    with pytest.raises(Failure, match=r"7 of 7 .* neither its length"):
        download(write_manifest(tmp_path, url, checksums=False), tmp_path / "data")
    assert content(tmp_path / "data") == {}
    download(write_manifest(tmp_path, url), tmp_path / "data")
    assert content(tmp_path / "data") == FILES


def test_a_second_download_into_one_folder_is_refused(url: str, tmp_path: Path) -> None:
    path = "/v1/book/b.jsonl"
    Server.faults = {path: ["stall"]}
    manifest = write_manifest(tmp_path, url, checksums=False)
    first = threading.Thread(target=download, args=(manifest, tmp_path / "data"))
    first.start()
    while (path, None) not in Server.seen:
        time.sleep(0.01)
    with pytest.raises(UserError, match="another data-tools is writing"):
        download(manifest, tmp_path / "data")
    Server.open.set()
    first.join()
    assert content(tmp_path / "data") == FILES


def test_what_is_whole_needs_no_lock(url: str, tmp_path: Path, monkeypatch) -> None:
    """In a folder that nobody may write there can be none."""
    manifest = write_manifest(tmp_path, url)
    download(manifest, tmp_path / "data")
    monkeypatch.delattr("data_tools.downloading.exclusive")
    assert download(manifest, tmp_path / "data")["fetched"] == 0


def test_a_signal_stops_it_at_once_and_the_same_command_goes_on(url: str, tmp_path: Path) -> None:
    path = "/v1/book/b.jsonl"
    Server.faults = {path: ["stall"]}
    manifest = write_manifest(tmp_path, url)
    command = [sys.executable, "-m", "data_tools", "download", manifest, "--connections", "1"]
    command += ["--output", str(tmp_path / "data")]
    lines = Path(manifest).read_text().splitlines()
    Path(manifest).write_text("\n".join(lines[::-1]))  # the one that stalls comes first
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        while not Server.seen:
            time.sleep(0.01)
        process.terminate()
        started = time.monotonic()
        assert process.wait(30) == 143
        assert time.monotonic() - started < 5
        assert process.stderr.read() == b""
    assert [asked for asked, _ in Server.seen] == [path]
    assert download(manifest, tmp_path / "data")["fetched"] == 7
    assert content(tmp_path / "data") == FILES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_once_and_ends_the_run(url: str, tmp_path: Path, capsys) -> None:
    manifest = write_manifest(tmp_path, url)
    for path in FILES:
        partial = (tmp_path / "data" / path.removeprefix("/v1/")).with_suffix(".jsonl.part")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.with_name(f".{partial.name}").symlink_to("/dev/full")
    command = ["download", manifest, "--output", str(tmp_path / "data"), "--connections", "1"]
    assert main(command) == 1
    assert len(Server.seen) <= 2
    message = capsys.readouterr().err
    assert "No space left on device" in message and ".part" in message


def test_what_was_there_before_is_not_said_to_be_compared(url: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.jsonl").write_text("who knows")
    (tmp_path / "urls.txt").write_text(f"{url}/v1/book/b.jsonl\n")
    command = ["download", str(tmp_path / "urls.txt"), "--output", str(tmp_path / "data")]
    assert main(command) == 0
    assert "without checksum: 1 found there and not looked into" in capsys.readouterr().out
    (tmp_path / "data" / "b.jsonl").unlink()
    assert main(command) == 0
    assert "without checksum: 1 fetched now and compared in length" in capsys.readouterr().out


def test_progress_counts_files(
    url: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.progress.INTERVAL_S", 0.0)
    assert main(["download", write_manifest(tmp_path, url), "--output", str(tmp_path / "d")]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"download: 85\.7%, 6 files, [\d.]+ MB/s, 0:00:00 left", last)


def test_an_output_that_is_a_file_is_refused(url: str, tmp_path: Path, capsys) -> None:
    manifest = write_manifest(tmp_path, url)
    assert main(["download", manifest, "--output", manifest]) == 2
    assert "cannot be written" in capsys.readouterr().err
