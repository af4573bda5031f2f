"""`download` against a real HTTP server that supports ranges, fails, and cuts connections."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_tools.downloading import download, read_manifest
from data_tools.errors import Failure, UserError

FILES = {f"/v1/arxiv/{i}.jsonl": bytes([i]) * (100_000 + i) for i in range(6)}
FILES["/v1/book/b.jsonl"] = b"book" * 1000


class Server(BaseHTTPRequestHandler):
    faults: dict[str, list[str]] = {}  # noqa: RUF012  what the next requests of a path suffer
    seen: list[tuple[str, str | None]] = []  # noqa: RUF012

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
        data = FILES[self.path]
        start = int(asked[6:-1]) if asked and what != "no ranges" else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if what == "cut":
            body = body[: len(body) // 2]
        if what == "corrupt":
            body = b"?" + body[1:]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("data_tools.downloading.time.sleep", lambda seconds: None)
    Server.faults, Server.seen = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
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
        ("http://host/a/b\nhttp://host/%2e%2e/%2e%2e/etc/passwd", "leaves|twice|mend"),
    ],
)
def test_manifests_that_make_no_sense_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "urls.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        read_manifest(str(tmp_path / "urls.txt"))
