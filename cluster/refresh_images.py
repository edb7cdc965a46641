"""Ask the registries what the tags of our images stand for now, and write the digests into the files of cluster/.

    python cluster/refresh_images.py            name:tag becomes name:tag@sha256:..., in all files or in none
    python cluster/refresh_images.py --check    exit 1 where a digest is missing or is not the registry's

A tag may stand for other contents tomorrow; a digest cannot. Images at registry.example.com are left alone: first put
your registry in, and push them. Registries are asked by https, those on this machine by http; a name and a password for
one are taken from docker's config.json, where `docker login` has left them there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

FOLDER = Path(__file__).resolve().parent
OURS_TO_BE = "registry.example.com"
IMAGE = re.compile(
    r"(?m)(^FROM |image: )"  # image:, head_image:, worker_image:
    r"([\w.-]+(?::\d+)?(?:/[\w.-]+)*:[\w.-]+)"  # name:tag
    r"(?:@(sha256:[0-9a-f]{64}))?(?=\s|$)"
)
KINDS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
"""What a tag may stand for: an image for several platforms, or one for one."""

LIMIT = 4 * 2**20
"""Bytes of an answer; a manifest has some thousand."""


class Name(NamedTuple):
    """An image's registry, its name there and its tag."""

    registry: str
    repository: str
    tag: str


def parsed(image: str) -> Name:
    """Return the parts of `name:tag` as docker reads them: without a registry it is Docker Hub's."""
    path, _, tag = image.rpartition(":")
    first, _, rest = path.partition("/")
    if rest and ("." in first or ":" in first or first == "localhost"):
        return Name(first, rest, tag)
    return Name("registry-1.docker.io", path if rest else f"library/{path}", tag)


def images(texts: Iterable[str]) -> dict[str, set[str]]:
    """Return the images that files name, each with the digests that stand beside it ("" where there is none)."""
    found: dict[str, set[str]] = {}
    for text in texts:
        for match in IMAGE.finditer(text):
            if not match[2].startswith(f"{OURS_TO_BE}/"):
                found.setdefault(match[2], set()).add(match[3] or "")
    return found


def pinned(text: str, digests: dict[str, str]) -> str:
    """Return a file's text with the digest of each of its images beside the tag."""
    return IMAGE.sub(lambda m: f"{m[1]}{m[2]}@{digests[m[2]]}" if m[2] in digests else m[0], text)


def digest(image: str) -> str:
    """Return the digest that the registry has for `name:tag`: the sha256 over the manifest that it gives.

    Raises:
        OSError: the registry does not answer, or refuses.
        ValueError: what it gives is no manifest, or it calls it by another digest.
    """
    name = parsed(image)
    local = name.registry.partition(":")[0] in ("localhost", "127.0.0.1")
    url = f"{'http' if local else 'https'}://{name.registry}/v2/{name.repository}/manifests/{name.tag}"
    headers = {"Accept": ", ".join(KINDS)}
    try:
        content, said = _get(url, headers)
    except HTTPError as error:
        if error.code != 401:
            raise
        challenge = error.headers.get("WWW-Authenticate", "")
        content, said = _get(url, headers | {"Authorization": _answer(challenge, name.registry)})
    if json.loads(content).get("schemaVersion") != 2:
        raise ValueError(f"{url} is no manifest of version 2")
    own = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if said not in (None, own):
        raise ValueError(f"{url} is called {said} and has the digest {own}")
    return own


def _get(url: str, headers: dict[str, str]) -> tuple[bytes, str | None]:
    with urlopen(Request(url, headers=headers), timeout=30) as answer:
        content: bytes = answer.read(LIMIT + 1)
        if len(content) > LIMIT:
            raise ValueError(f"{url} gives more than {LIMIT} bytes")
        return content, answer.headers.get("Docker-Content-Digest")


def _answer(challenge: str, registry: str) -> str:
    """Return the Authorization header that a registry's WWW-Authenticate asks for."""
    login = _login(registry)
    scheme, _, rest = challenge.partition(" ")
    if scheme.lower() == "basic" and login:
        return f"Basic {login}"
    fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    if scheme.lower() != "bearer" or "realm" not in fields:
        raise ValueError(f"{registry} wants a login that docker's config.json does not have: docker login {registry}")
    realm = urlsplit(fields.pop("realm"))
    if realm.scheme != "https" and realm.hostname not in ("localhost", "127.0.0.1"):
        raise ValueError(f"{registry} sends for a token to {realm.geturl()}, which is not https")
    headers = {"Authorization": f"Basic {login}"} if login else {}
    content, _ = _get(f"{realm.geturl()}?{urlencode(fields)}", headers)
    token = json.loads(content)
    return f"Bearer {token.get('token') or token['access_token']}"


def _login(registry: str) -> str | None:
    file = Path(os.environ.get("DOCKER_CONFIG", Path.home() / ".docker")) / "config.json"
    known = json.loads(file.read_text()).get("auths", {}) if file.exists() else {}
    names = ["https://index.docker.io/v1/"] if registry == "registry-1.docker.io" else [registry, f"https://{registry}"]
    return next((str(known[name]["auth"]) for name in names if known.get(name, {}).get("auth")), None)


def main(*options: str) -> int:
    """Refresh or check the files; return the exit status."""
    files = {file: file.read_text() for file in (FOLDER / "Dockerfile", *sorted(FOLDER.rglob("*.yaml")))}
    written = images(files.values())
    try:
        digests = {image: digest(image) for image in sorted(written)}
    except (OSError, ValueError, KeyError) as error:
        print(f"refresh_images.py: no file was changed: {error}", file=sys.stderr)
        return 2
    for image, now in digests.items():
        before = ", ".join(each or "without a digest" for each in sorted(written[image] - {now}))
        print(f"{image}@{now}" + (f"  was {before}" if before else ""))
    if "--check" in options:
        return int(any(written[image] != {now} for image, now in digests.items()))
    for file, text in files.items():
        if (new := pinned(text, digests)) != text:
            file.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
