"""The digests of images: asked of a registry on loopback, and written into copies of the files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from cluster import refresh_images
from cluster.refresh_images import Name, digest, images, main, parsed, pinned
from tests.cluster.files import CLUSTER

MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": refresh_images.KINDS[0], "manifests": []}).encode()
OWN = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
LOGIN = base64.b64encode(b"me:secret").decode()


class Registry(ThreadingHTTPServer):
    """A registry that gives one manifest for every tag; attributes say how it behaves."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name = f"127.0.0.1:{self.server_port}"
        self.content, self.said, self.asks = MANIFEST, OWN, ""
        self.seen = []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, url = self.server, urlsplit(self.path)
        given = self.headers.get("Authorization", "")
        server.seen.append((url.path, given))
        if url.path == "/token":
            token = f"{parse_qs(url.query)['scope'][0]} for {given}"
            return self.answer(200, json.dumps({"token": token}).encode())
        if not re.fullmatch(r"/v2/[a-z0-9/-]+/manifests/[\w.-]+", url.path) or "missing" in url.path:
            return self.answer(404, b"{}")
        if server.asks == "basic" and given != f"Basic {LOGIN}":
            return self.answer(401, b"{}", {"WWW-Authenticate": 'Basic realm="registry"'})
        if server.asks == "bearer" and not given.startswith("Bearer repository:a/b:pull for "):
            where = f'Bearer realm="http://{server.name}/token",service="s",scope="repository:a/b:pull"'
            return self.answer(401, b"{}", {"WWW-Authenticate": where})
        if server.asks == "elsewhere":
            return self.answer(401, b"{}", {"WWW-Authenticate": 'Bearer realm="http://token.example/t",scope="s"'})
        assert set(refresh_images.KINDS) <= set(self.headers["Accept"].split(", "))
        return self.answer(200, server.content, {"Docker-Content-Digest": server.said} if server.said else {})

    def answer(self, status, content, headers={}):  # noqa: B006
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Registry() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def log_in(tmp_path, registry):
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {registry.name: {"auth": LOGIN}}}))


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("postgres:17", Name("registry-1.docker.io", "library/postgres", "17")),
        ("rayproject/ray:2.60.0-py311-cpu", Name("registry-1.docker.io", "rayproject/ray", "2.60.0-py311-cpu")),
        ("ghcr.io/me/ml2o-dist:0.1.0", Name("ghcr.io", "me/ml2o-dist", "0.1.0")),
        ("localhost:5000/a/b:c", Name("localhost:5000", "a/b", "c")),
        ("10.0.0.1:5000/b:c", Name("10.0.0.1:5000", "b", "c")),
    ],
)
def test_names_are_read_as_docker_reads_them(image, name):
    assert parsed(image) == name


def test_the_digest_is_that_of_the_manifest(registry):
    assert digest(f"{registry.name}/a/b:1") == OWN
    registry.said = None
    assert digest(f"{registry.name}/a/b:1") == OWN


def test_a_registry_that_contradicts_itself_or_gives_something_else_is_refused(registry):
    registry.said = f"sha256:{'0' * 64}"
    with pytest.raises(ValueError, match="is called sha256:0000"):
        digest(f"{registry.name}/a/b:1")
    registry.content, registry.said = b'{"errors": []}', None
    with pytest.raises(ValueError, match="no manifest"):
        digest(f"{registry.name}/a/b:1")
    registry.content = b" " * (refresh_images.LIMIT + 1)
    with pytest.raises(ValueError, match="more than"):
        digest(f"{registry.name}/a/b:1")


def test_a_token_is_fetched_where_one_is_asked_for(registry, tmp_path):
    registry.asks = "bearer"
    assert digest(f"{registry.name}/a/b:1") == OWN
    log_in(tmp_path, registry)
    assert digest(f"{registry.name}/a/b:1") == OWN
    assert [given for path, given in registry.seen if path == "/token"] == ["", f"Basic {LOGIN}"]


def test_dockers_login_is_used_where_a_name_is_asked_for(registry, tmp_path):
    registry.asks = "basic"
    with pytest.raises(ValueError, match=r"docker login 127\.0\.0\.1"):
        digest(f"{registry.name}/a/b:1")
    log_in(tmp_path, registry)
    assert digest(f"{registry.name}/a/b:1") == OWN


def test_no_password_goes_over_plain_http(registry, tmp_path):
    log_in(tmp_path, registry)
    registry.asks = "elsewhere"
    with pytest.raises(ValueError, match=r"token\.example.*https"):
        digest(f"{registry.name}/a/b:1")


def test_the_files_name_all_their_images_with_a_tag_and_digests_for_all_of_them_or_for_none():
    """For none where nobody has run the script, which alone may write one: no digest is made up."""
    files = [CLUSTER / "Dockerfile", *CLUSTER.rglob("*.yaml")]
    found = images(file.read_text() for file in files)
    assert set(found) == {"rayproject/ray:2.60.0-py311-cpu", "rayproject/ray:2.60.0-py311-gpu", "postgres:17"}
    assert all(len(digests) == 1 for digests in found.values())  # the same in every file
    assert len({digests == {""} for digests in found.values()}) == 1
    named = set()
    for file in files:
        for line in file.read_text().splitlines():
            if re.match(r"\s*-?\s*(\w*image: \S|FROM )", line) and "base-$" not in line:
                named.add(re.split(r"image: |FROM ", line)[1].split()[0].partition("@")[0])
    assert named == {*found, *(name for name in named if name.startswith("registry.example.com/ml2o-dist:"))}
    assert len(named) == len(found) + 2  # for CPUs and for GPUs


@pytest.fixture
def copies(tmp_path, monkeypatch, registry):
    """The files, with every image at the registry."""
    folder = tmp_path / "cluster"
    shutil.copytree(CLUSTER, folder)
    for file in (folder / "Dockerfile", *folder.rglob("*.yaml")):
        text = file.read_text().replace("rayproject/ray:", f"{registry.name}/rayproject/ray:")
        text = text.replace("image: postgres:17", f"image: {registry.name}/postgres:17")
        file.write_text(text.replace("registry.example.com", f"{registry.name}/me"))
    monkeypatch.setattr(refresh_images, "FOLDER", folder)
    return folder


def test_all_files_get_the_digests_and_may_get_them_again(copies, registry, capsys):
    assert main("--check") == 1
    before = {file: file.read_text() for file in copies.rglob("*") if file.suffix == ".yaml"}
    assert main() == 0
    assert "was without a digest" in capsys.readouterr().out
    for file, text in before.items():
        written = file.read_text()
        assert written.replace(f"@{OWN}", "") == text
        assert written.count(f"@{OWN}") == len(re.findall(r"(?m)image: \S", text))
    assert (copies / "Dockerfile").read_text().count(f"@{OWN} AS base-") == 2
    assert main("--check") == 0
    registry.content = MANIFEST + b" "
    registry.said = None
    assert main("--check") == 1
    assert main() == 0
    now = f"sha256:{hashlib.sha256(registry.content).hexdigest()}"
    assert f"was {OWN}" in capsys.readouterr().out
    assert OWN not in (copies / "mlflow-compose.yaml").read_text()
    assert now in (copies / "mlflow-compose.yaml").read_text()


def test_where_one_image_is_not_found_no_file_is_changed(copies, capsys):
    file = copies / "kubernetes" / "mlflow.yaml"
    file.write_text(file.read_text().replace("/postgres:17", "/missing:17"))
    before = {each: each.read_text() for each in copies.rglob("*.yaml")}
    assert main() == 2
    assert "no file was changed: " in capsys.readouterr().err
    assert {each: each.read_text() for each in before} == before


def test_a_text_without_images_stays_as_it_is():
    text = "pull: always\n# image: see README\nimage_name: x:y\n"
    assert pinned(text, {"x:y": OWN}) == text
