"""A run at a URI: what is committed when, what a reader takes after any fault, and what is said where it cannot be."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from pyarrow.fs import FileInfo, FileType

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.cli import main
from ml2o_dist.config_file import dump_settings, load_settings
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.rundir.storage import RemoteRunStorage, RunStorage, StorageError, open_storage, read_run, working_copy
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.store import connect
from tests.crossed import crossed
from tests.faulty_store import FaultyStore
from tests.meta_train_command import QUICK, ml2o
from tests.metatrain.executing import Cut, cut_after, digests, in_process, later
from tests.metatrain.faulty_disk import Killed
from tests.metatrain.settings import small
from tests.tracking.empty_store import new_store
from tests.wording import says

pytestmark = pytest.mark.usefixtures("unrendered")

SETTINGS = small(meta_steps=4, checkpoint_every=1, keep_checkpoints=2, slots=2, horizon=2, validation={"every": 2})
BASE = "bucket/runs/x"


class Waiting(RemoteRunStorage):
    """Commits before it goes on, so that the calls come in one order."""

    def commit(self):
        super().commit()
        self._waiting.result()


def at(store, folder):
    return Waiting("store://x", store.filesystem(), BASE, folder)


def begin(store, folder, settings=SETTINGS):
    """What `meta_train` does at a URI: refresh, go on where there is something to go on from; (storage, trainer)."""
    storage = at(store, folder)
    storage.refresh(resume=True)
    trainer = Trainer(settings, storage.folder, on_saved=storage.commit)
    if newest_checkpoint(storage.folder / "checkpoints")[0] is not None:
        trainer.resume()
    (storage.folder / "config.yaml").write_text(dump_settings(settings))
    storage.commit()
    return storage, trainer


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    trainer = Trainer(SETTINGS, tmp_path_factory.mktemp("calm"))
    trainer.run(later(in_process))
    return digests(trainer)


def steps(files):
    """The steps whose manifest is in the store."""
    return sorted(name.split("/")[-2] for name in files if name.endswith("manifest.json"))


def test_everything_is_committed_and_only_the_newest_checkpoints_are_kept(tmp_path, calm):
    store = FaultyStore()
    storage, trainer = begin(store, tmp_path / "a")
    (storage.folder / "spool").mkdir()
    (storage.folder / "spool" / "points").write_text("not sent yet")
    (storage.folder / ".half").write_text("")
    trainer.run(later(in_process))
    storage.settle()
    assert steps(store.files) == ["step_000003", "step_000004"]
    local = {p.relative_to(storage.folder).as_posix(): p for p in storage.folder.rglob("*") if p.is_file()}
    del local["spool/points"], local[".half"]
    assert store.files == {f"{BASE}/{name}": path.read_bytes() for name, path in local.items()}
    assert digests(trainer) == calm


def test_a_checkpoint_is_committed_by_its_manifest_and_removed_with_it_first(tmp_path):
    store = FaultyStore()
    storage, trainer = begin(store, tmp_path / "a")
    trainer.run(later(in_process))
    storage.settle()
    for step in ("step_000002", "step_000004"):
        calls = [call for call in store.calls if f"checkpoints/{step}" in call]
        written = [call.split("/")[-1] for call in calls if call.startswith("open")]
        assert sorted(written[:2]) == ["state.json", "tensors.safetensors"]
        assert written[2:] == ["manifest.json"]
    removed = [
        call.split("/")[-1] for call in store.calls if call.startswith("delete") and "checkpoints/step_000002" in call
    ]
    assert removed[0] == "manifest.json"
    assert sorted(removed[1:]) == ["state.json", "tensors.safetensors"]
    four, two = (next(i for i, c in enumerate(store.calls) if c.endswith(name)) for name in
                 (f"write {BASE}/checkpoints/step_000004/manifest.json",
                  f"delete {BASE}/checkpoints/step_000002/manifest.json"))  # fmt: skip
    assert four < two


def test_what_did_not_change_is_not_written_again(tmp_path):
    store = FaultyStore()
    storage, trainer = begin(store, tmp_path / "a")
    trainer.run(later(in_process))
    before = len(store.calls)
    storage.settle()
    assert len(store.calls) == before
    begin(store, tmp_path / "b")[0].settle()
    assert [call for call in store.calls[before:] if "config.yaml" not in call] == []


def run_until_killed(store, folder):
    """Return the last meta-step whose commit had returned when the store killed the run."""
    acknowledged = [0]
    with pytest.raises(Killed):  # noqa: PT012
        storage, trainer = begin(store, folder)
        trainer.run(later(in_process), lambda step, row: acknowledged.append(step - 1))
        storage.settle()
    return acknowledged[-1]


@pytest.mark.long
def test_killed_between_any_two_remote_operations_another_machine_goes_on_to_the_same_weights(tmp_path, calm):
    """In a store whose files are torn while they are written. The counting pass finds the operations."""
    counting = FaultyStore()
    storage, trainer = begin(counting, tmp_path / "counting")
    trainer.run(later(in_process))
    storage.settle()
    resumed = 0
    for k in range(len(counting.calls)):
        store = FaultyStore(at=k)
        acknowledged = run_until_killed(store, tmp_path / f"{k}a")
        left = FaultyStore(store.files)
        storage, trainer = begin(left, tmp_path / f"{k}b")
        assert trainer.learner.version >= acknowledged, (k, counting.calls[k])
        resumed += trainer.learner.version > 0
        trainer.run(later(in_process))
        storage.settle()
        assert digests(trainer) == calm, (k, counting.calls[k])
        assert steps(left.files)[-2:] == ["step_000003", "step_000004"]
        last = at(left, tmp_path / f"{k}c")
        last.refresh(resume=True)
        found, refused = newest_checkpoint(last.folder / "checkpoints")
        assert (found.meta_step, refused) == (4, [])
    assert resumed > len(counting.calls) // 2


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.long)])
def test_a_store_that_fails_once_at_any_call_costs_nothing(tmp_path, calm, every):
    counting = FaultyStore()
    storage, trainer = begin(counting, tmp_path / "counting")
    trainer.run(later(in_process))
    storage.settle()
    for k in range(0, len(counting.calls), every):
        store = FaultyStore(at=k, killed=False)
        storage, trainer = begin(store, tmp_path / str(k))
        trainer.run(later(in_process))
        try:
            storage.settle()
        except StorageError:
            assert k >= len(counting.calls) - 40, "only the last commit must not be missed"
            continue
        assert digests(trainer) == calm
        assert steps(store.files) == ["step_000003", "step_000004"]


def test_an_outage_is_said_once_and_the_next_checkpoint_brings_what_was_missed(tmp_path, caplog):
    store = FaultyStore()
    storage, trainer = begin(store, tmp_path / "a")

    def on_row(step, row):
        store.away = step in (2, 3)

    with caplog.at_level("INFO", "ml2o_dist"):
        trainer.run(later(in_process), on_row)
    messages = [r.getMessage() for r in caplog.records if r.name == "ml2o_dist.rundir.storage"]
    assert len(messages) == 2
    assert says(messages[0], "store://x cannot be written", f"{tmp_path}/a")
    assert "the store is away" in messages[0]
    assert says(messages[1], "store://x", "again")
    storage.settle()
    assert steps(store.files) == ["step_000003", "step_000004"]


def test_what_an_outage_at_the_end_kept_from_the_store_is_brought_there_by_resuming(tmp_path, calm):
    store = FaultyStore()
    storage, trainer = begin(store, tmp_path / "a")
    trainer.run(later(in_process), lambda step, row: setattr(store, "away", step >= 3))
    with pytest.raises(StorageError, match="the store is away"):
        storage.settle()
    assert steps(store.files) == ["step_000001", "step_000002"]
    store.away = False
    storage, trainer = begin(store, tmp_path / "a")
    assert trainer.learner.version == 4, "the working copy is further, its steps are not done again"
    storage.settle()
    assert steps(store.files) == ["step_000003", "step_000004"]
    assert digests(trainer) == calm


def test_a_working_copy_of_another_run_gives_way_and_its_spool_stays(tmp_path):
    store = FaultyStore()
    storage, trainer = begin(store, tmp_path / "a")
    trainer.run(later(in_process))
    storage.settle()
    (tmp_path / "a" / "spool").mkdir()
    (tmp_path / "a" / "spool" / "points").write_text("not sent yet")
    store.files.clear()
    other = small(meta_steps=2, checkpoint_every=1, slots=2, horizon=2, seed=5)
    storage, trainer = begin(store, tmp_path / "b", other)
    with pytest.raises(Cut):
        trainer.run(later(cut_after(2)))
    storage.settle()
    again = at(store, tmp_path / "a")
    again.refresh(resume=True)
    found, _ = newest_checkpoint(again.folder / "checkpoints")
    assert (found.meta_step, found.state["config"]["seed"]) == (1, 5)
    assert load_settings(again.folder / "config.yaml") == other
    assert (tmp_path / "a" / "spool" / "points").read_text() == "not sent yet"


def test_damage_at_the_store_is_refused_by_name_and_a_torn_config_does_not_matter(tmp_path, calm):
    store = FaultyStore()
    storage, trainer = begin(store, tmp_path / "a")
    trainer.run(later(in_process))
    storage.settle()
    name = f"{BASE}/checkpoints/step_000004/tensors.safetensors"
    store.files[name] = store.files[name][:-1]
    store.files[f"{BASE}/config.yaml"] = store.files[f"{BASE}/config.yaml"][:200]
    storage = at(store, tmp_path / "b")
    storage.refresh(resume=True)
    settings = load_settings(storage.folder / "config.yaml")
    assert settings == SETTINGS
    trainer = Trainer(settings, storage.folder, on_saved=storage.commit)
    (refusal,) = trainer.resume()
    assert says(storage.named(refusal), "store://x/checkpoints/step_000004/tensors.safetensors", "sha256")
    assert trainer.learner.version == 3
    trainer.run(later(in_process))
    storage.settle()
    assert digests(trainer) == calm
    assert store.files[name] == (storage.folder / "checkpoints/step_000004/tensors.safetensors").read_bytes()


def test_checkpoints_that_rotate_away_while_they_are_read_cost_the_store_none(tmp_path, monkeypatch):
    store = FaultyStore()
    storage, trainer = begin(store, tmp_path / "a")
    trainer.run(later(in_process))
    folder = storage.folder / "checkpoints"
    (folder / "step_000003").rename(folder / "step_000009")
    real = Path.read_bytes

    def read(path):
        if path.name == "state.json":
            raise FileNotFoundError(path)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        storage.commit()
    assert steps(store.files) == ["step_000003", "step_000004"], "none is removed, no manifest of 9 is written"
    storage.settle()
    assert steps(store.files) == ["step_000004", "step_000009"]


def test_a_commit_does_not_hold_up_training(tmp_path):
    """The store does not answer until training has gone on by two checkpoints."""
    store, blocked = FaultyStore(), threading.Event()
    real = store.call

    def call(name):
        assert blocked.wait(60)
        real(name)

    store.call = call
    storage = RemoteRunStorage("store://x", store.filesystem(), BASE, tmp_path / "a")
    storage.folder.mkdir()
    trainer = Trainer(SETTINGS, storage.folder, on_saved=storage.commit)
    trainer.run(later(in_process))
    assert not store.files
    blocked.set()
    storage.settle()
    assert steps(store.files) == ["step_000003", "step_000004"]


def test_a_local_run_is_a_folder_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    storage = open_storage("runs/a")
    assert type(storage) is RunStorage
    assert (storage.name, storage.folder, storage.title) == (str(tmp_path / "runs/a"), tmp_path / "runs/a", "a")
    threads = threading.active_count()
    storage.commit()
    storage.settle()
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def home(tmp_path, fresh_cache, monkeypatch):
    monkeypatch.setenv("ML2O_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "home").mkdir()
    new_store(tmp_path / "home")
    return tmp_path


def refusal(*words):
    result = ml2o(*words)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("ml2o: run directory ")
    return line


@pytest.mark.long
def test_meta_train_at_a_uri_is_resumed_on_another_machine(cluster, home, monkeypatch):
    uri, remote = f"file://{home}/remote/x", home / "remote" / "x"
    result = ml2o(*QUICK, "--run-dir", uri, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["run_dir"] == uri
    assert result.stderr.splitlines()[0] == f"run directory  {uri}"
    assert f"weights        {uri}/weights.safetensors" in result.stderr
    assert load_artifact(remote).weights_sha256 == answer["weights_sha256"]
    assert list((home / "cache" / "runs").iterdir()) == []
    assert pq.read_table(remote / "metrics.parquet").num_rows == 7
    names = {path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()}
    assert {"config.yaml", "run.log", "weights.json", "plots/meta_loss.png"} <= names
    assert steps(names) == ["step_000002", "step_000004", "step_000006"]
    assert not any(name.startswith((".", "spool")) for name in names)

    assert says(refusal_of_a_second_start(uri), "this configuration", "--resume")
    monkeypatch.setenv("ML2O_CACHE", str(home / "another machine"))
    assert says(refusal_of_a_second_start(uri), "this configuration", "--resume")

    monkeypatch.setenv("ML2O_CACHE", str(home / "a third machine"))
    (remote / "checkpoints" / "step_000006" / "state.json").write_text("{")
    (remote / "weights.safetensors").unlink()
    again = ml2o("--run-dir", uri, "--resume", "--json")
    assert again.exit_code == 0, again.output
    refused = f"checkpoint refused: {uri}/checkpoints/step_000006/state.json"
    assert refused in again.stderr
    assert refused in (remote / "run.log").read_text()
    assert json.loads(again.stdout)["weights_sha256"] == answer["weights_sha256"]
    with read_run(uri) as folder:
        assert load_artifact(folder).weights_sha256 == answer["weights_sha256"]


def test_what_a_run_at_a_uri_has_to_send_is_found_by_its_uri(home):
    uri, mlflow = "s3://bucket/runs/x", new_store(home)
    sink = MlflowSink.open("http://127.0.0.1:9", "ml2o/meta-train", run_dir=working_copy(uri))
    sink.log({"meta_loss": 1.0}, 3)
    sink.close()
    assert CliRunner().invoke(main, ["sync", "s3://bucket/runs/y"]).exit_code == 2
    for values, status in ((1, "FINISHED"), (0, None)):
        result = CliRunner().invoke(main, ["sync", f"{uri}/", "--tracking-uri", mlflow, "--json"])
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        assert (answer["values"], answer["status"]) == (values, status)
    (point,) = connect(mlflow).get_metric_history(answer["run_id"], "meta_loss")
    assert (point.step, point.value) == (3, 1.0)


def refusal_of_a_second_start(uri):
    result = ml2o(*QUICK, "--run-dir", uri)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith(f"ml2o: {uri} ")
    return result.stderr


@pytest.mark.long
def test_a_store_that_is_away_at_the_end_is_exit_code_4_and_resuming_brings_the_run_there(cluster, home, monkeypatch):
    uri, real = f"file://{home}/remote/x", RemoteRunStorage._write

    def write(storage, name, content):
        if name.startswith("weights"):
            raise OSError("the store is away")
        real(storage, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteRunStorage, "_write", write)
        result = ml2o(*QUICK, "--run-dir", uri)
    assert result.exit_code == 4, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ml2o: ")]
    (copy,) = (home / "cache" / "runs").iterdir()
    assert says(line, "done", uri, str(copy), "the store is away")
    assert f"ml2o meta-train --run-dir {uri} --resume" in line
    assert ml2o("--run-dir", uri, "--resume").exit_code == 0
    assert load_artifact(home / "remote" / "x").weights_sha256 == load_artifact(uri).weights_sha256
    assert not copy.exists()


@crossed(
    "place, words",
    [
        ("nope://bucket/x", ["'nope://bucket/x'", "Unrecognized filesystem type", "s3://"]),
        ("s3://key:secret@bucket/x", ["s3://key:***@", "the password"]),
        ("s3://", ["'s3://' names no folder", "s3://bucket/runs/first"]),
        ("file:///proc/version/x", ["'file:///proc/version/x'", "cannot be written"]),
        ("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http", ["cannot be written", "connect"]),
        ("gs://anonymous@bucket/x?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1",
         ["cannot be written", "connect"]),
    ],
    [QUICK, ["--resume"]],
)  # fmt: skip
def test_a_place_that_cannot_be_used_is_one_line_before_ray_is_started(home, monkeypatch, place, words):
    uri, parts = place
    monkeypatch.setattr("ml2o_dist.workflows.meta_train.connected", lambda address: pytest.fail("Ray was asked for"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    line = refusal(*words, "--run-dir", uri)
    for part in parts:
        assert part in line
    assert "secret" not in line
    assert len(line) < 500


def test_nothing_to_resume_at_a_uri(home):
    result = ml2o("--run-dir", f"file://{home}/remote/none", "--resume")
    assert result.exit_code == 2
    assert says(result.stderr, "nothing to resume", f"file://{home}/remote/none", "no config.yaml")


def test_a_remote_file_whose_name_leads_out_is_not_written(tmp_path):
    """Names in an object store may have any parts."""

    class Store:
        def get_file_info(self, selector):
            return [FileInfo(f"{BASE}/../../evil", FileType.File, size=1)]

    storage = RemoteRunStorage("store://x", Store(), BASE, tmp_path / "copy")
    with pytest.raises(UserError, match="which lies outside of it"):
        storage.download(tmp_path / "copy")
    assert not list(tmp_path.rglob("evil"))


def test_a_remote_file_that_is_too_large_is_not_fetched(tmp_path):
    class Store:
        def get_file_info(self, selector):
            return [FileInfo(f"{BASE}/run.log", FileType.File, size=2**40)]

    storage = RemoteRunStorage("store://x", Store(), BASE, tmp_path / "copy")
    with pytest.raises(UserError, match=r"'run\.log'.*'store://x'.*larger than"):
        storage.download(tmp_path / "copy")


def test_a_run_that_never_came_to_its_uri_begins_there_again(home, monkeypatch):
    """Killed between config.yaml, here or there, and the first checkpoint."""
    monkeypatch.setattr("ml2o_dist.workflows.meta_train.connected", _asked_for_ray)
    uri, config = f"file://{home}/remote/x", dump_settings(load_settings(QUICK[1]))
    for place in (working_copy(uri), home / "remote" / "x"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.yaml").write_text(config)
        result = ml2o("--run-dir", uri, "--resume", "--address", "local")
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "ml2o: Ray was asked for")
        assert "resuming from  the beginning" in result.output
        (place / "config.yaml").unlink()
    (working_copy(uri) / "config.yaml").unlink()
    assert "nothing to resume" in ml2o("--run-dir", uri, "--resume").stderr


def _asked_for_ray(address):
    raise UserError("Ray was asked for")
