"""Run directories on S3: pyarrow's own client against moto's server on loopback."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSelector, FileSystem, FileType

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.rundir.storage import open_storage, read_run
from ml2o_dist.runtime.errors import UserError
from tests.meta_train_command import QUICK, ml2o
from tests.metatrain.executing import Cut, cut_after, digests, in_process, later
from tests.rundir.test_storage import SETTINGS, calm  # noqa: F401
from tests.wording import says


@pytest.fixture
def s3(home, fresh_cache, monkeypatch):
    """A function from a folder in a bucket to its URI; `bucket` exists."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT"), timeout=10).close()
    try:
        yield lambda place: f"s3://{place}?endpoint_override={host}:{port}&scheme=http"
    finally:
        server.stop()


def names(uri):
    filesystem, base = FileSystem.from_uri(uri)
    found = filesystem.get_file_info(FileSelector(base, recursive=True))
    return sorted(info.path.removeprefix(f"{base}/") for info in found if info.type == FileType.File)


def trained(uri, execute):
    storage = open_storage(uri, resume=True)
    trainer = Trainer(SETTINGS, storage.folder, on_saved=storage.commit)
    if newest_checkpoint(storage.folder / "checkpoints")[0] is not None:
        trainer.resume()
    try:
        trainer.run(later(execute))
    except Cut:
        trainer.save()
    storage.settle()
    return trainer


def test_cut_and_resumed_on_another_machine_ends_at_the_same_weights(s3, tmp_path, monkeypatch, calm):  # noqa: F811
    uri = s3("bucket/runs/x")
    assert trained(uri, cut_after(3)).learner.version == 2
    assert newest_checkpoint(open_storage(uri).folder / "checkpoints")[0].meta_step == 2
    filesystem, base = FileSystem.from_uri(uri)
    file = f"{base}/checkpoints/step_000002/tensors.safetensors"
    with filesystem.open_input_file(file) as stream:
        content = bytearray(stream.read())
    content[100] ^= 1
    with filesystem.open_output_stream(file) as stream:
        stream.write(bytes(content))
    monkeypatch.setenv("ML2O_CACHE", str(tmp_path / "another machine"))
    found, (refusal,) = newest_checkpoint(open_storage(uri, resume=True).folder / "checkpoints")
    assert found.meta_step == 1
    assert says(refusal, "step_000002/tensors.safetensors", "sha256 differs")
    assert digests(trained(uri, in_process)) == calm
    kept = {name.split("/")[1] for name in names(uri) if name.startswith("checkpoints/")}
    assert kept == {"step_000003", "step_000004"}
    assert not any(name.startswith(".") for name in names(uri))


def test_a_bucket_that_is_not_there(s3):
    with pytest.raises(UserError, match=r"'s3://nowhere/x\?.*' cannot be written.*NO_SUCH_BUCKET"):
        open_storage(s3("nowhere/x"))


@pytest.mark.long
def test_the_whole_command(cluster, s3, tmp_path, monkeypatch):
    uri = s3("bucket/runs/whole")
    result = ml2o(*QUICK, "--run-dir", uri, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["run_dir"] == uri
    left = names(uri)
    assert {"config.yaml", "run.log", "metrics.parquet", "weights.safetensors", "weights.json"} <= set(left)
    with read_run(uri) as folder:
        assert load_artifact(folder).weights_sha256 == answer["weights_sha256"]
        assert not Path(folder, "spool").exists()
    monkeypatch.setenv("ML2O_CACHE", str(tmp_path / "another machine"))
    again = ml2o("--run-dir", uri, "--resume", "--json")
    assert json.loads(again.stdout)["weights_sha256"] == answer["weights_sha256"]
