"""Fetching the raw files, from a server on this machine that serves small stand-ins."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ml2o_dist.errors import UserError
from ml2o_dist.problems import download
from ml2o_dist.problems.download import data_status, fetch
from ml2o_dist.problems.image_files import RAW_FILES, RawFile

CONTENT = {"images.gz": b"pixels" * 1000, "labels.gz": b"labels"}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror of two small files; the package's tables point to it."""
    served = tmp_path / "served"
    served.mkdir()
    for name, content in CONTENT.items():
        (served / name).write_bytes(gzip.compress(content))
    files = tuple(RawFile(f"MNIST/raw/{name}", hashlib.md5(c).hexdigest(), (1,)) for name, c in CONTENT.items())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(download, "RAW_FILES", {"MNIST": {"train": files}})
    monkeypatch.setattr(download, "MIRRORS", {"MNIST": f"http://127.0.0.1:{server.server_port}/"})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_are_fetched_verified_and_reported(mirror: Path, tmp_path: Path) -> None:
    root, seen = tmp_path / "data", []
    assert {status.content for status in data_status(str(root))} == {"missing"}
    states = fetch(str(root), lambda path, done, total: seen.append((path, done, total)))
    assert [(state.path, state.present, state.content) for state in states] == [
        (f"MNIST/raw/{name}", True, "official") for name in CONTENT
    ]
    for name, content in CONTENT.items():
        path = root / "MNIST" / "raw" / name
        assert gzip.decompress(path.read_bytes()) == content
        assert (f"MNIST/raw/{name}", path.stat().st_size, path.stat().st_size) in seen
    assert len(list((root / "MNIST" / "raw").iterdir())) == 2


def test_official_files_are_left_alone_and_others_replaced(mirror: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "images.gz").write_bytes(gzip.compress(CONTENT["images.gz"], compresslevel=1))
    (folder / "labels.gz").write_bytes(b"damaged")
    kept = (folder / "images.gz").read_bytes()
    assert [state.content for state in data_status(str(tmp_path / "data"))] == ["official", "damaged"]
    fetched: list[str] = []
    fetch(str(tmp_path / "data"), lambda path, done, total: fetched.append(path))
    assert set(fetched) == {"MNIST/raw/labels.gz"}
    assert (folder / "images.gz").read_bytes() == kept
    assert gzip.decompress((folder / "labels.gz").read_bytes()) == b"labels"


@pytest.mark.parametrize(
    ("served", "message"),
    [(gzip.compress(b"other", mtime=0), "has MD5 .* not the published file"), (b"<html>", "cannot be unpacked")],
)
def test_wrong_content_is_refused_and_leaves_nothing(mirror: Path, tmp_path: Path, served: bytes, message: str) -> None:
    (mirror / "images.gz").write_bytes(served)
    with pytest.raises(UserError, match=message):
        fetch(str(tmp_path / "data"))
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []


def test_a_missing_file_or_network_is_one_clear_line(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mirror / "images.gz").unlink()
    with pytest.raises(UserError, match=r"cannot download http://127.*images\.gz: HTTP Error 404"):
        fetch(str(tmp_path / "data"))
    monkeypatch.setattr(download, "MIRRORS", {"MNIST": "http://127.0.0.1:1/"})  # nothing listens on port 1
    with pytest.raises(UserError, match=r"cannot download .*refused.*data\.root or ML2O_DATA"):
        fetch(str(tmp_path / "data"))
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(mirror: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        fetch(str(tmp_path / "file"))


def test_the_real_files_are_the_official_ones(real_data_root: str) -> None:
    states = data_status(real_data_root)
    assert len(states) == 8 == sum(len(splits) * 2 for splits in RAW_FILES.values())
    assert {state.content for state in states} == {"official"}
    assert all(state.present and state.bytes > 4000 for state in states)
