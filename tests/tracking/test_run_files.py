"""Only regular files below the run directory are opened to be sent, whatever their path is made of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking import run_files
from ml2o_dist.tracking.run_files import copied, opened


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "a.png").write_bytes(b"picture")
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


def test_files_of_the_run_and_links_within_it_are_read(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "link").symlink_to("plots/a.png")
    (tmp_path / "other").symlink_to(run_dir)
    for file in (run_dir / "plots" / "a.png", run_dir / "link", tmp_path / "other" / "plots" / ".." / "link"):
        with opened(file, run_dir) as stream:
            assert stream.read() == b"picture"
    copied(run_dir / "link", run_dir, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"picture"


def test_everything_else_is_refused_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "file").symlink_to(tmp_path / "secret")
    (run_dir / "folder").symlink_to(tmp_path)
    (run_dir / "loop").symlink_to("loop")
    os.mkfifo(run_dir / "fifo")
    refused = ["file", "folder/secret", "../secret", str(tmp_path / "secret"), "fifo", "plots", "", ".", "/dev/zero",
               "a\0b", "loop", "x" * 300]  # fmt: skip
    for name in refused:
        with pytest.raises(UserError) as refusal, opened(run_dir / name, run_dir):
            pytest.fail(f"{name!r} was opened")
        assert "\n" not in str(refusal.value)
    with pytest.raises(FileNotFoundError), opened(run_dir / "gone", run_dir):
        pytest.fail("it was opened")


@pytest.mark.parametrize("exchanged", ["plots", "plots/a.png"])
def test_a_link_that_takes_a_place_after_the_check_is_not_followed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: str
) -> None:
    (tmp_path / "a.png").write_bytes(b"secret")
    real = os.path.realpath

    def exchange(path: Path) -> str:
        found = real(path)
        if path == run_dir / "plots" / "a.png":
            (run_dir / exchanged).rename(tmp_path / "moved")
            (run_dir / exchanged).symlink_to(tmp_path if exchanged == "plots" else tmp_path / "secret")
        return found

    monkeypatch.setattr(run_files.os.path, "realpath", exchange)
    with pytest.raises(UserError, match="is not sent"), opened(run_dir / "plots" / "a.png", run_dir):
        pytest.fail("it was opened")


def test_a_file_that_is_too_large_is_not_sent(run_dir: Path) -> None:
    with (run_dir / "sparse").open("wb") as stream:
        stream.truncate(run_files.LIMIT + 1)
    with pytest.raises(UserError, match="is larger than 1024 MiB"), opened(run_dir / "sparse", run_dir):
        pytest.fail("it was opened")
