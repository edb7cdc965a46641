"""A file is whole or not there."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ml2o_dist.runtime.files import expanded, private_folder, replacing


def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path):
    file = tmp_path / "deep" / "a.bin"
    with replacing(file) as stream:
        stream.write(b"old")
    with replacing(file) as stream:
        stream.write(b"new")
        stream.flush()
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")

    def torn():
        with replacing(file) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(error):
        torn()
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640), (0o002, 0o664)])
def test_files_and_folders_honour_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "folder" / "a.bin") as stream:
            stream.write(b"new")
            assert stat.S_IMODE(os.stat(stream.name).st_mode) == mode
        with replacing(tmp_path / "folder" / "a.bin") as stream:
            stream.write(b"newer")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder" / "a.bin").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == mode | (mode & 0o444) >> 2


def test_a_private_folder_is_this_users_alone(tmp_path):
    before = os.umask(0)
    try:
        folder = private_folder(tmp_path / "a" / "private")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert private_folder(folder) == folder
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write to it"):
        private_folder(folder)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with pytest.raises(PermissionError, match="no folder"):
            private_folder(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_private(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private_folder(tmp_path / "theirs")


def device(place: Path) -> Path:
    try:
        os.mknod(place / "it", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # another /dev/null
    except PermissionError:
        pytest.skip("only root makes devices")
    return place / "it"


def linked(target: Path) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / "it").symlink_to(target)
        return place / "it"

    return make


def fifo(place: Path) -> Path:
    os.mkfifo(place / "it")
    return place / "it"


def folder(place: Path) -> Path:
    (place / "it").mkdir()
    return place / "it"


@pytest.mark.parametrize(
    "make", [device, fifo, folder, linked(Path("/dev/null")), linked(Path("/")), lambda place: Path("/dev/stdout")]
)
def test_nothing_but_a_regular_file_is_replaced(make: Callable[[Path], Path], tmp_path: Path) -> None:
    file = make(tmp_path)
    before = file.lstat()
    with pytest.raises(OSError, match="it is") as caught, replacing(file):
        pytest.fail("nothing is written")
    assert caught.value.filename == str(file)
    assert (file.lstat().st_mode, file.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert os.listdir(tmp_path) in ([], ["it"])


def test_a_link_is_replaced_and_what_it_leads_to_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    for target in ("other", "nowhere"):
        (tmp_path / "it").unlink(missing_ok=True)
        (tmp_path / "it").symlink_to(target)
        with replacing(tmp_path / "it") as stream:
            stream.write(b"new")
        assert not (tmp_path / "it").is_symlink()
        assert (tmp_path / "it").read_bytes() == b"new"
    assert (tmp_path / "other").read_bytes() == b"other"


def test_a_name_that_no_file_can_have_is_an_error_of_the_file(tmp_path: Path) -> None:
    for name in ("a\0b", "a" * 300):
        with pytest.raises(OSError, match=r"NUL|too long"), replacing(tmp_path / name):
            pytest.fail("nothing is written")


def test_the_home_of_a_user_who_is_not_there_is_a_name_like_any_other() -> None:
    assert expanded("~nobody-at-all/x") == Path("~nobody-at-all/x")
    assert expanded("~/x") == Path.home() / "x"
