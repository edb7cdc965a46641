"""`ml2o sync`: what could not be sent goes into the same run once the store is there, and the version with it."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from ml2o_dist.artifact import save_artifact
from ml2o_dist.cli import main
from ml2o_dist.config import RuleSettings
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.identity import RUN_KEY_TAG, RunIdentity, load_identity, save_identity
from ml2o_dist.tracking.records import End, Record, Upload, Version, to_line
from ml2o_dist.tracking.registry import list_versions
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.spool import Spool
from ml2o_dist.tracking.store import connect, redacted
from ml2o_dist.tracking.sync import sync, sync_command
from tests.tracking.empty_store import new_store
from tests.wording import says

NOBODY = "http://127.0.0.1:9"
EXPERIMENT = "ml2o/meta-train"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("sync"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run that never saw a server."""
    folder = tmp_path / "run"
    rule = RuleSettings(hidden=4)
    save_artifact(folder, ML2ONetwork(rule).state_dict(), rule, {"seed": 3})
    sink = MlflowSink.open(NOBODY, EXPERIMENT, run_name="late", params={"seed": 3}, run_dir=folder)
    for step in range(20):
        sink.log({"meta_loss": float(step)}, step)
    sink.log_artifact(folder / "weights.json")
    sink.register_later("late", folder, "never seen")
    assert sink.close() == 20
    assert sink.spool == folder / "spool"
    return folder


def ml2o_sync(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["sync", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_everything_goes_into_one_run_and_the_version_is_registered(uri: str, run_dir: Path) -> None:
    code, answer_text, _ = ml2o_sync(run_dir, "--tracking-uri", uri, "--json")
    assert code == 0
    answer = json.loads(answer_text)
    assert (answer["values"], answer["status"], answer["refused"], answer["tracking_uri"]) == (20, "FINISHED", 0, uri)
    client = connect(uri)
    run = client.get_run(answer["run_id"])
    assert [point.step for point in client.get_metric_history(answer["run_id"], "meta_loss")] == list(range(20))
    assert (run.info.status, run.info.run_name, run.data.params) == ("FINISHED", "late", {"seed": "3"})
    identity = load_identity(run_dir)
    assert identity is not None
    assert run.data.tags[RUN_KEY_TAG] == identity.run_key
    assert run.info.start_time == identity.created_ms  # when it began, not when MLflow heard of it
    assert run.info.end_time < run.info.start_time + 60_000
    assert [file.path for file in client.list_artifacts(answer["run_id"])] == ["weights.json"]
    (version,) = list_versions(uri, "late")
    assert (version["version"], version["aliases"]) == (answer["registered_version"], ["candidate"])
    assert client.get_model_version("late", str(version["version"])).run_id == answer["run_id"]
    assert not (run_dir / "spool").exists()
    code, output, _ = ml2o_sync(run_dir)
    assert (code, output.count("\n")) == (0, 1)
    assert says(output, "nothing", str(run_dir), uri)
    code, _, error = ml2o_sync(run_dir / "spool")
    assert code == 2
    assert "no run" in error


def test_a_store_that_does_not_answer_is_one_line_and_the_spool_stays_as_it_was(run_dir: Path) -> None:
    before = {path: path.read_bytes() for path in (run_dir / "spool").rglob("*") if path.is_file()}
    code, _, error = ml2o_sync(run_dir)
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("ml2o: ")]
    assert says(line, "ml2o: ", f"{NOBODY} does not answer")
    assert {path: path.read_bytes() for path in (run_dir / "spool").rglob("*") if path.is_file()} == before


def test_cut_short_it_goes_on_and_a_run_without_an_end_was_killed(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    sink = MlflowSink.open(NOBODY, EXPERIMENT, run_dir=run_dir)
    for step in range(2500):
        sink.log({"meta_loss": float(step)}, step)
    assert sink.close() == 2500
    records = run_dir / "spool" / "records.jsonl"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:-1]))  # as SIGKILL leaves it
    real, calls = Spool.advance, []

    def advance(self: Spool, batch: object) -> None:
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt  # after the second call was sent, before it was noted
        real(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            sync(run_dir, uri)
    answer = sync(run_dir, uri)
    assert (answer["values"], answer["status"]) == (1500, "KILLED")
    points = connect(uri).get_metric_history(answer["run_id"], "meta_loss")
    assert [point.step for point in points] == list(range(2500))
    assert connect(uri).get_run(answer["run_id"]).info.status == "KILLED"


def test_a_run_that_is_still_going_on_sends_its_spool_itself(uri: str, tmp_path: Path) -> None:
    sink = MlflowSink.open(uri, EXPERIMENT, run_dir=tmp_path)
    with pytest.raises(UserError, match="in use"):
        sync(tmp_path)
    sink.close()


@pytest.mark.parametrize(
    ("secret_uri", "shown"),
    [
        ("postgresql://me:s3cret@127.0.0.1:9/ml", "postgresql://me:***@127.0.0.1:9/ml"),
        ("postgresql://127.0.0.1:9/ml?user=me&password=s3cret", "postgresql://127.0.0.1:9/ml?user=me&password=***"),
    ],
)
def test_a_password_is_on_no_disk_and_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret_uri: str, shown: str
) -> None:
    assert redacted(secret_uri) == shown
    sink = MlflowSink.open(secret_uri, EXPERIMENT, run_dir=tmp_path)
    sink.log({"a": 1.0}, 0)
    assert sink.close() == 1
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) >= 2
    assert not [path for path in kept if b"s3cret" in path.read_bytes()]
    assert sync_command(tmp_path, secret_uri) == f"MLFLOW_TRACKING_URI=... ml2o sync {tmp_path}"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"password.*MLFLOW_TRACKING_URI"):
        sync(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret_uri)
    with pytest.raises(UserError, match=r"does not answer: 127\.0\.0\.1:9") as refusal:
        sync(tmp_path)
    assert "s3cret" not in str(refusal.value)


def forge(folder: Path, *records: Record) -> None:
    """Add lines to the spool in `folder`, as somebody may whose folder it is."""
    with (folder / "records.jsonl").open("ab") as stream:
        for record in records:
            stream.write(to_line(record))


def uploaded(uri: str, run_id: str) -> list[str]:
    return sorted(file.path for file in connect(uri).list_artifacts(run_id))


def test_only_files_of_the_run_directory_are_sent_whatever_its_spool_names(uri: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    run_dir = tmp_path / "run"
    save_identity(run_dir, RunIdentity(uri, EXPERIMENT))
    folder = run_dir / "spool"
    (folder / "files" / "0").mkdir(parents=True)
    (run_dir / "good.txt").write_text("good")
    (folder / "files" / "0" / "kept.txt").write_text("kept")
    (run_dir / "link").symlink_to(tmp_path / "secret")
    (run_dir / "out").symlink_to(tmp_path)
    os.mkfifo(run_dir / "fifo")
    paths = ["/etc/hostname", str(tmp_path / "secret"), "../../secret", "../link", "../out/secret", "../fifo", "..",
             "../plots", "/dev/zero", "../../../../../../../../etc/passwd", "a\0b", "", "x" * 300]  # fmt: skip
    forge(folder, *(Upload(Path(path), "") for path in paths))
    forge(folder, Upload(Path("../good.txt"), "../../out"), Upload(Path("../good.txt"), "/etc"))
    forge(folder, Version(Path("../.."), "stolen", ""), Version(Path("../out"), "stolen", ""))
    forge(folder, Upload(Path("../good.txt"), ""), Upload(Path("files/0/kept.txt"), ""), End("FINISHED", 1))
    answer = sync(run_dir, uri)
    assert uploaded(uri, answer["run_id"]) == ["good.txt", "kept.txt"]
    assert answer["refused"] == len(paths) + 2  # folders outside are no record
    assert not list_versions(uri, "stolen")
    store = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert not [path for path in store.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_weights_of_another_run_are_not_registered(uri: str, run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "hostile"
    save_identity(other, RunIdentity(uri, EXPERIMENT))
    (other / "spool").mkdir()
    (other / "mine").symlink_to(run_dir)
    forge(other / "spool", Version(Path("../../run"), "stolen", ""), Version(Path("../mine"), "stolen", ""))
    assert sync(other, uri)["refused"] == 2
    assert not list_versions(uri, "stolen")


def test_a_link_in_a_run_directory_is_not_sent_by_a_run_that_goes_on_in_it(uri: str, tmp_path: Path) -> None:
    """A resumed run uploads the pictures that it finds."""
    (tmp_path / "secret").write_text("secret")
    run_dir = tmp_path / "run"
    (run_dir / "plots").mkdir(parents=True)
    (run_dir / "plots" / "a.png").symlink_to(tmp_path / "secret")
    (run_dir / "plots" / "b.png").write_text("picture")
    sink = MlflowSink.open(uri, EXPERIMENT, run_dir=run_dir)
    for name in ("a.png", "b.png"):
        sink.log_artifact(run_dir / "plots" / name, "plots")
    sink.close()
    assert sink.refused == 1
    client = connect(uri)
    assert [file.path for file in client.list_artifacts(str(sink.run_id), "plots")] == ["plots/b.png"]


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "null", '{"uri": 3, "experiment": "x"}', '{"uri": "x"}', "[" * 100_000, '"\\ud800"',
     '{"uri": "http://x", "experiment": "x", "run_key": "\' OR 1=1"}',
     '{"uri": "http://x", "experiment": "x", "run_id": "../../x"}',
     '{"uri": "http://x", "experiment": "x", "created_ms": 1e300}'],
    ids=count(),
)  # fmt: skip
def test_an_identity_that_is_none_is_one_line(run_dir: Path, content: str) -> None:
    (run_dir / "mlflow.json").write_text(content)
    code, _, error = ml2o_sync(run_dir)
    assert code == 2
    assert "Traceback" not in error
    assert [line for line in error.splitlines() if line.startswith("ml2o: ")][-1].count("mlflow.json is missing") == 1


def test_an_identity_that_is_no_file_is_not_waited_for(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "mlflow.json").rename(tmp_path / "mlflow.json")
    (run_dir / "mlflow.json").symlink_to(tmp_path / "mlflow.json")
    assert ml2o_sync(run_dir)[0] == 2
    (run_dir / "mlflow.json").unlink()
    os.mkfifo(run_dir / "mlflow.json")
    assert ml2o_sync(run_dir)[0] == 2


def test_an_error_of_code_is_not_the_servers_silence_and_keeps_the_spool(
    uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: MlflowClient, *words: object, **options: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'info'")

    monkeypatch.setattr(MlflowClient, "log_batch", broken)
    code, _, error = ml2o_sync(run_dir, "--tracking-uri", uri)
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("ml2o: ")]
    assert "AttributeError in test_sync.py, line " in line
    assert "fault of ml2o_dist" in line
    assert "does not answer" not in error
    assert (run_dir / "spool" / "records.jsonl").exists()
    monkeypatch.undo()
    assert ml2o_sync(run_dir, "--tracking-uri", uri)[0] == 0
