"""A run directory from elsewhere names a server: nothing is sent there until the user has named it."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from ml2o_dist.cli import main
from ml2o_dist.config_file import dump_settings, load_settings
from ml2o_dist.paretoset.settings import ParetoSetSettings
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import state_folder
from ml2o_dist.sweeping.space import load_sweep
from ml2o_dist.tracking.identity import RunIdentity, save_identity
from ml2o_dist.tracking.named_servers import FILE, check_resumed, is_known, remember
from ml2o_dist.tracking.sink import MlflowSink
from tests.wording import says

FOREIGN = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """This machine has run nothing yet."""
    monkeypatch.setenv("ML2O_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_server_is_known_by_the_environment_or_by_a_run_here(
    state: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_known(FOREIGN)
    assert is_known(f"sqlite:///{home}/mlflow.db")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", FOREIGN)
        assert is_known(FOREIGN)
    assert not is_known(FOREIGN)
    remember(FOREIGN)
    remember(FOREIGN)
    remember("postgresql://me:s3cret@host/db")
    assert is_known(FOREIGN)
    assert is_known("postgresql://me:other@host/db")
    assert not is_known("http://127.0.0.1:90")
    assert (state / FILE).read_text() == f"{FOREIGN}\npostgresql://me:***@host/db\n"
    assert stat.S_IMODE((state / FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_no_line_is_forged_and_no_link_is_followed(state: Path, tmp_path: Path) -> None:
    remember("http://a\nhttp://b")
    assert not is_known("http://b")
    state.mkdir(mode=0o700, exist_ok=True)
    (state / FILE).symlink_to(tmp_path / "elsewhere")
    remember(FOREIGN)
    assert not (tmp_path / "elsewhere").exists()
    assert not is_known(FOREIGN)


def test_where_no_note_can_be_taken_the_run_goes_on(state: Path) -> None:
    state.write_text("a file")
    remember(FOREIGN)
    assert not is_known(FOREIGN)


def test_the_list_is_in_the_users_private_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ML2O_STATE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".config" / "ml2o_dist"


def sync(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["sync", *map(str, words)])
    return result.exit_code, result.stderr.replace("\n", " ")


def test_sync_asks_before_it_sends_to_a_server_that_only_the_folder_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_identity(tmp_path / "run", RunIdentity(FOREIGN, "ml2o/meta-train"))
    (tmp_path / "run" / "spool").mkdir()
    code, line = sync(tmp_path / "run")
    assert code == 2
    assert says(line, "neither you", "has named")
    assert f"--tracking-uri {FOREIGN}" in line
    code, line = sync(tmp_path / "run", "--tracking-uri", FOREIGN)
    assert (code, "does not answer" in line) == (2, True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", FOREIGN)
    assert "does not answer" in sync(tmp_path / "run")[1]


def test_what_ran_here_is_sent_where_it_was_tracked_and_not_from_another_machine(tmp_path: Path, state: Path) -> None:
    sink = MlflowSink.open(FOREIGN, "ml2o/meta-train", run_dir=tmp_path / "run")
    sink.log({"a": 1.0}, 0)
    sink.close(limit_s=2.0)
    assert "does not answer" in sync(tmp_path / "run")[1]
    shutil.rmtree(state)
    assert "has named" in sync(tmp_path / "run")[1]


def test_a_run_is_not_resumed_towards_a_server_that_only_its_folder_names(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_settings(load_settings(None, [f"tracking.uri={FOREIGN}"])))
    result = CliRunner().invoke(main, ["meta-train", "--run-dir", str(run_dir), "--resume"])
    assert result.exit_code == 2
    assert says(result.stderr, "config.yaml", FOREIGN, "neither you")
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml"]


def test_a_sweep_is_not_resumed_towards_such_a_server(tmp_path: Path) -> None:
    small = Path(__file__).parents[1] / "small_sweep.yaml"
    (tmp_path / "sweep").mkdir()
    settings = load_sweep(small, [f"tracking.uri={FOREIGN}"])
    (tmp_path / "sweep" / "sweep.yaml").write_text(dump_settings(settings))
    result = CliRunner().invoke(main, ["sweep", "--run-dir", str(tmp_path / "sweep"), "--resume"])
    assert result.exit_code == 2
    assert says(result.stderr, "sweep.yaml", FOREIGN, "neither you")


def test_a_pareto_set_is_not_resumed_towards_such_a_server(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    settings = ParetoSetSettings.model_validate({"tracking": {"uri": FOREIGN}})
    (tmp_path / "set" / "pareto_set.yaml").write_text(dump_settings(settings))
    result = CliRunner().invoke(main, ["pareto-set", "train", "--run-dir", str(tmp_path / "set"), "--resume"])
    assert result.exit_code == 2
    assert says(result.stderr, "pareto_set.yaml", FOREIGN, "neither you")


def test_the_users_word_at_resume_counts(tmp_path: Path) -> None:
    check_resumed("", (), tmp_path)
    check_resumed(FOREIGN, (f"tracking.uri={FOREIGN}",), tmp_path)
    with pytest.raises(UserError, match=r"--tracking-uri http://127\.0\.0\.1:9"):
        check_resumed(FOREIGN, ("tracking.model=tracking.uri",), tmp_path)
    remember(FOREIGN)
    check_resumed(FOREIGN, (), tmp_path)
