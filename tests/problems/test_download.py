"""Fetching the raw files, from a server on this machine that serves small stand-ins."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import ssl
import subprocess
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

from ml2o_dist.problems import download
from ml2o_dist.problems.download import MIRRORS, data_status, fetch
from ml2o_dist.problems.image_files import RAW_FILES, RawFile
from ml2o_dist.runtime.errors import UserError

CONTENT = {"images.gz": b"pixels" * 1000, "labels.gz": b"some labels"}


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder; what `redirects` names is elsewhere, and `lengths` tells lies."""

    redirects: ClassVar[dict[str, str]] = {}
    lengths: ClassVar[dict[str, str]] = {}

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name in self.redirects:
            self.send_response(302)
            self.send_header("Location", self.redirects[name])
            self.end_headers()
        else:
            super().do_GET()

    def send_header(self, keyword: str, value: str) -> None:
        lie = self.lengths.get(self.path.strip("/")) if keyword == "Content-Length" else None
        if lie != "none":
            super().send_header(keyword, lie or value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    key, made = (tmp_path_factory.mktemp("tls") / name for name in ("key.pem", "certificate.pem"))
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(made), "-days", "1", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, timeout=30)
    made.write_text(made.read_text() + key.read_text())
    return made


@contextmanager
def serving(folder: Path, certificate: Path | None = None) -> Iterator[str]:
    """Serve a folder on this machine, with TLS where there is a certificate; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificate: Path) -> Iterator[Path]:
    """A mirror of two small files; the package's tables point to it, and its certificate is trusted."""
    served = tmp_path / "served"
    served.mkdir()
    for name, content in CONTENT.items():
        (served / name).write_bytes(gzip.compress(content))
    files = tuple(
        RawFile(f"MNIST/raw/{name}", hashlib.sha256(content).hexdigest(), (len(content) - 8,))
        for name, content in CONTENT.items()
    )
    assert [file.unpacked for file in files] == [len(content) for content in CONTENT.values()]
    monkeypatch.setattr(download, "RAW_FILES", {"MNIST": {"train": files}})
    monkeypatch.setattr(QuietHandler, "redirects", {})
    monkeypatch.setattr(QuietHandler, "lengths", {})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(served, certificate) as address:
        monkeypatch.setattr(download, "MIRRORS", {"MNIST": address})
        yield served


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
    assert gzip.decompress((folder / "labels.gz").read_bytes()) == CONTENT["labels.gz"]


@pytest.mark.parametrize(
    ("served", "message"),
    [(gzip.compress(b"other", mtime=0), "sha256.*not the published file"), (b"<html>", "cannot be unpacked")],
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
    with pytest.raises(UserError, match=r"https://127.*images\.gz.*404"):
        fetch(str(tmp_path / "data"))
    monkeypatch.setattr(download, "MIRRORS", {"MNIST": "https://127.0.0.1:1/"})  # nothing listens on port 1
    with pytest.raises(UserError, match=r"refused.*data\.root.*ML2O_DATA"):
        fetch(str(tmp_path / "data"))
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []


def refused(tmp_path: Path, message: str) -> None:
    """Assert that nothing is fetched, in one line, and that nothing is left."""
    with pytest.raises(UserError, match=message) as caught:
        fetch(str(tmp_path / "data"))
    assert "\n" not in str(caught.value)
    folder = tmp_path / "data" / "MNIST" / "raw"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_nothing_is_asked_for_without_tls(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {urlsplit(address).scheme for address in MIRRORS.values()} == {"https"}
    assert MIRRORS.keys() == RAW_FILES.keys()
    with serving(mirror) as plain:
        QuietHandler.redirects["images.gz"] = f"{plain}images2.gz"
        (mirror / "images2.gz").write_bytes((mirror / "images.gz").read_bytes())
        refused(tmp_path, r"http://127\.0\.0\.1:\d+/images2\.gz.*must be https")
        monkeypatch.setattr(download, "MIRRORS", {"MNIST": plain})
        refused(tmp_path, "it must be https")
    monkeypatch.setattr(download, "MIRRORS", {"MNIST": f"file://{mirror}/"})
    refused(tmp_path, "it must be https")


def test_a_redirect_to_https_is_followed(mirror: Path, tmp_path: Path) -> None:
    (mirror / "images.gz").rename(mirror / "elsewhere.gz")
    QuietHandler.redirects["images.gz"] = f"{download.MIRRORS['MNIST']}elsewhere.gz"
    assert {state.content for state in fetch(str(tmp_path / "data"))} == {"official"}


def test_a_server_whose_certificate_is_not_trusted_is_not_asked(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    refused(tmp_path, r"cannot download https://.*CERTIFICATE_VERIFY_FAILED")


@pytest.mark.parametrize("length", ["right", "none", "9" * 30])
def test_no_more_is_taken_than_the_file_can_have(mirror: Path, tmp_path: Path, length: str) -> None:
    (mirror / "images.gz").write_bytes(os.urandom(4 << 20))
    QuietHandler.lengths["images.gz"] = length if length != "right" else ""
    taken: list[int] = []
    with pytest.raises(UserError, match=r"\d+ bytes or more.*at most 71536"):
        fetch(str(tmp_path / "data"), lambda path, done, total: taken.append(done))
    assert sum(taken) == 0  # the first piece is too large, or the length says so before
    refused(tmp_path, "at most 71536")


def test_what_unpacks_to_gigabytes_is_not_unpacked(mirror: Path, tmp_path: Path) -> None:
    (mirror / "labels.gz").write_bytes(gzip.compress(bytes(60 << 20), 9))
    assert (mirror / "labels.gz").stat().st_size < 1 << 16
    with pytest.raises(UserError, match=r"too large.*not the published file"):
        fetch(str(tmp_path / "data"))
    folder = tmp_path / "data" / "MNIST" / "raw"
    assert [file.name for file in folder.iterdir()] == ["images.gz"]
    (folder / "labels.gz").write_bytes((mirror / "labels.gz").read_bytes())
    tracemalloc.start()
    assert [state.content for state in data_status(str(tmp_path / "data"))] == ["official", "unknown"]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_connection_that_ends_early_leaves_nothing(mirror: Path, tmp_path: Path) -> None:
    QuietHandler.lengths["images.gz"] = "5000"
    refused(tmp_path, r"cannot download https://.*images\.gz")


def test_a_folder_that_cannot_be_written_is_named(mirror: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        fetch(str(tmp_path / "file"))


def test_the_real_files_are_the_official_ones(real_data_root: str) -> None:
    states = data_status(real_data_root)
    assert len(states) == 8 == sum(len(splits) * 2 for splits in RAW_FILES.values())
    assert {state.content for state in states} == {"official"}
    assert all(state.present and state.bytes > 4000 for state in states)
