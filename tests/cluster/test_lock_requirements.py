"""What becomes of pip's installation report."""

from __future__ import annotations

import pytest

from cluster.lock_requirements import lines


def package(name, version, digest, **where):
    about = {"url": "https://x/y", "archive_info": {"hashes": {"sha256": digest} if digest else {}}, **where}
    return {"metadata": {"name": name, "version": version}, "download_info": about}


def test_each_package_is_a_line_with_its_version_and_hash_in_order():
    report = {
        "install": [
            package("torch", "2.13.0+cpu", "b" * 64),  # a label exists on one index only
            package("Flask", "3.1.3", "a" * 64),
            package("ml2o-dist", "0.1.0", "", dir_info={}),
        ]
    }
    assert lines(report, "# head") == [
        "# head",
        f"Flask==3.1.3 --hash=sha256:{'a' * 64}",
        f"torch==2.13.0 --hash=sha256:{'b' * 64}",
    ]


def test_a_package_without_a_hash_is_refused():
    with pytest.raises(ValueError, match=r"no sha256 of flask 3\.1\.3"):
        lines({"install": [package("flask", "3.1.3", "")]}, "#")
