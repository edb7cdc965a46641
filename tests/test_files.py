"""A file is whole or not there."""

from __future__ import annotations

import os
import stat

import pytest

from ml2o_dist.files import private_folder, replacing


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


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "link", "folder"):
        with pytest.raises(OSError, match="it is"), replacing(tmp_path / name) as stream:
            stream.write(b"x")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "link"]


def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with replacing(tmp_path / "link") as stream:
        stream.write(b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "link").is_symlink()


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
        with pytest.raises(PermissionError, match="no folder, but a file or a link"):
            private_folder(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_private(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private_folder(tmp_path / "theirs")
