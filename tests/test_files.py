"""A file is whole or not there."""

from __future__ import annotations

import os
import stat

import pytest

from ml2o_dist.files import replacing


def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path):
    file = tmp_path / "deep" / "a.bin"
    with replacing(file) as stream:
        stream.write(b"old")
    with replacing(file) as stream:
        stream.write(b"new")
        stream.flush()
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
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
