"""The whole path of `ml2o pareto-set`: experts, routers, comparators, registry, page, query, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file
from torch import nn

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.cli import main
from ml2o_dist.config_file import dump_settings, read_settings
from ml2o_dist.paretoset.experts import expert_stages, fit_stage, network_of
from ml2o_dist.paretoset.image_tasks import load_tasks
from ml2o_dist.paretoset.library_trunks import GreyImages
from ml2o_dist.paretoset.saved_set import FILE, load_set
from ml2o_dist.paretoset.settings import NetworkSettings, ParetoSetSettings
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.registry import list_versions
from tests.tracking.empty_store import new_store
from tests.wording import says

CONFIG = str(Path(__file__).parent / "small_pareto_set.yaml")
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("file", sorted((Path(CONFIG).parents[1] / "jobs" / "configs").glob("pareto*.yaml")))
def test_every_shipped_config_is_valid_and_survives_a_round_trip(file, tmp_path):
    settings = read_settings(ParetoSetSettings, file, ())
    (tmp_path / "again.yaml").write_text(dump_settings(settings))
    assert read_settings(ParetoSetSettings, tmp_path / "again.yaml", ()) == settings


def ml2o(*words: str):
    return CliRunner().invoke(main, ["pareto-set", *words])


class InThisProcess:
    """Ray Train's TorchTrainer with one rank: this process, in which nothing has to start."""

    def __init__(self, rank, train_loop_config, **settings):
        self.fit = lambda: rank(train_loop_config)

    def get_world_rank(self):
        return 0

    def get_world_size(self):
        return 1


def fit_here(stage, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.train.torch.TorchTrainer", InThisProcess)
        patch.setattr("ray.train.get_context", lambda: InThisProcess(None, None))
        patch.setattr("ray.train.report", lambda metrics: None)
        fit_stage(stage, folder)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """The files of start and experts."""
    folder = tmp_path_factory.mktemp("experts")
    stages = expert_stages(read_settings(ParetoSetSettings, Path(CONFIG), ["device=cpu"]), 2, folder)
    for stage in stages:
        fit_here(stage, folder)
    return [str(folder / f"{stage.name}.safetensors") for stage in stages]


def test_ray_train_gives_the_weights_of_this_process(cluster, experts, tmp_path):
    (stage, *_) = expert_stages(read_settings(ParetoSetSettings, Path(CONFIG), ["device=cpu"]), 2, tmp_path)
    assert fit_stage(stage, tmp_path) > 0
    ours, theirs = load_file(tmp_path / "start.safetensors"), load_file(experts[0])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def finished(cluster, experts, tmp_path_factory):
    """One run with the experts of files, in a home of its own: (home, its --json answer, what it printed beside it)."""
    home = tmp_path_factory.mktemp("home")
    new_store(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ML2O_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        files = f"experts.files={json.dumps(experts)}"
        result = ml2o("train", "--config", CONFIG, "--run-dir", "runs/a", "--json", "--set", files)
    assert result.exit_code == 0, result.output
    return home, json.loads(result.stdout), result.stderr


def by_name(answer):
    return {each["approach"]: each for each in answer["approaches"]}


def test_every_approach_has_its_front_and_ours_beats_even_weights(finished):
    _, answer, printed = finished
    found = by_name(answer)
    assert set(found) == {"pwe", "experts", "average", "soup"}
    assert len(found["pwe"]["test"]["rays"]) == len(found["soup"]["test"]["rays"]) == 5
    assert len(found["average"]["test"]["rays"]) == 1
    assert found["pwe"]["trained_parameters"] == 22  # one layer that the tasks share
    assert found["pwe"]["steps"] == 300
    assert found["pwe"]["test"]["hypervolume"] > found["average"]["test"]["hypervolume"]
    assert found["pwe"]["test"]["monotonicity"] > 0.8
    assert "run directory" in printed
    assert "tracking URI" in printed
    (query,) = [line for line in printed.splitlines() if "pareto-set query" in line]
    assert query.endswith("runs/a --preference 0.5,0.5 --out plain.safetensors")


def test_the_set_is_in_the_registry_and_answers_as_the_exported_network(finished, monkeypatch):
    home, answer, _ = finished
    uri = f"sqlite:///{home}/mlflow.db"
    (version,) = list_versions(uri, "ml2o-pareto-set")
    assert version["aliases"] == ["candidate"]
    assert version["tags"]["weights_sha256"] == answer["weights_sha256"]
    client = MlflowClient(uri)
    run = client.get_run(version["run_id"])
    assert run.info.status == "FINISHED"
    hypervolume = by_name(answer)["pwe"]["test"]["hypervolume"]
    assert run.data.metrics["pwe_test_hypervolume"] == hypervolume
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"fronts.md", "report.html"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # set_tracking_uri would leave it to all that follow
    model = mlflow.pyfunc.load_model("models:/ml2o-pareto-set@candidate")
    images = np.random.default_rng(0).normal(size=(3, 1, 12, 12)).astype(np.float32)
    found = load_set(home / "runs" / "a")
    with torch.no_grad():
        expected = torch.cat(found.fusion.export([0.2, 0.8])(torch.from_numpy(images)), dim=1)
    torch.testing.assert_close(torch.from_numpy(model.predict(images, {"preference": [0.2, 0.8]})), expected)


def test_a_query_gives_a_plain_network_of_the_original_size_with_the_losses_of_the_front(finished, monkeypatch):
    home, answer, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    for place in ("runs/a", f"runs/a/{FILE}", "models:/ml2o-pareto-set@candidate"):
        result = ml2o("query", place, "--preference", "0.25,0.75", "--out", "plain.safetensors", "--json")
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        tasks = load_tasks("multidigits")
        network = network_of(tasks, NetworkSettings(name="mlp", hidden="16"), seed=99)
        network.load_state_dict(load_file(home / "plain.safetensors"))
        losses, accuracies = tasks.measure(network, "test", torch.device("cpu"))
        assert said["test_losses"] == pytest.approx(losses.tolist(), rel=1e-5)
        assert said["test_accuracies"] == accuracies.tolist()
    front = by_name(answer)["pwe"]["test"]
    row = front["rays"].index([0.25, 0.75])
    losses, _ = tasks.measure(network, "test", torch.device("cpu"), 500)
    assert front["losses"][row] == pytest.approx(losses.tolist(), rel=1e-5)


def test_a_finished_run_is_only_told_again(finished, monkeypatch):
    home, answer, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    before = {file: file.stat().st_mtime_ns for file in (home / "runs" / "a").rglob("*.safetensors")}
    monkeypatch.setattr(
        "ml2o_dist.workflows.train_pareto_set.connected", lambda address: pytest.fail("Ray was asked for")
    )
    result = ml2o("train", "--run-dir", "runs/a", "--resume", "--json")
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)
    assert again["weights_sha256"] == answer["weights_sha256"]
    assert again["registered_version"] == answer["registered_version"] == 1
    assert by_name(again)["pwe"]["test"] == by_name(answer)["pwe"]["test"]
    kept = {file for file in before if file.name != FILE}
    assert all(file.stat().st_mtime_ns == before[file] for file in kept)  # nothing is trained twice
    result = ml2o("train", "--config", "runs/a", "--run-dir", "runs/a")
    assert result.exit_code == 2
    assert "add --resume" in result.output
    result = ml2o("train", "--run-dir", "runs/a", "--resume", "--set", "routers.steps=50")
    assert result.exit_code == 2
    assert says(result.output, "routers.steps", "50", "300")
    assert "leave it out" in result.output


def test_what_is_no_optimizer_says_so_and_its_folder_is_a_config(finished, monkeypatch):
    home, _, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    for reference in (home / "runs" / "a", "models:/ml2o-pareto-set@candidate"):
        with pytest.raises(UserError, match=r"Pareto set, not an optimizer.*pareto-set query"):
            load_artifact(reference)
    result = ml2o("train", "--config", "runs/a", "--run-dir", "runs/b", "--set", "tasks=nothing")
    assert result.exit_code == 2
    assert "'nothing'" in result.output
    assert len(load_set(str(home / "runs" / "a")).card.names) == 2


@pytest.mark.long
def test_experts_of_its_own_lead_to_the_same_set(finished, cluster, monkeypatch):
    home, answer, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    result = ml2o("train", "--config", CONFIG, "--run-dir", "runs/whole", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights_sha256"] == answer["weights_sha256"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--preference", "0.5,0.6"], "sum to 1 ... 1.1"),
        (["--preference", "1.5,-0.5"], "below 0"),
        (["--preference", "1"], "1 numbers ... 2 tasks ... top left, bottom right"),
        (["--preference", "0.5,0.5", "--no-measure"], "--out"),
        (["--preference", "a,b"], "'a,b' ... numbers"),
        (["--preference", "0.5,0.5", "--out", "x.pt"], "must end in .safetensors"),
    ],
)
def test_a_wrong_query_is_one_line(finished, monkeypatch, words, part):
    home, _, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    result = ml2o("query", "runs/a", *words)
    assert result.exit_code == 2
    assert says(result.output, part)
    assert result.output.count("\n") <= 3


def test_a_tampered_set_and_a_missing_one_are_refused(finished, home):
    home_of_set, _, _ = finished
    content = bytearray((home_of_set / "runs" / "a" / FILE).read_bytes())
    content[-3] ^= 1
    (home / "altered.safetensors").write_bytes(content)
    (home / "torn.safetensors").write_bytes(content[:1000])
    save_file({"x": torch.zeros(2)}, home / "other.safetensors")
    parts = {"altered": "was altered", "torn": "cannot be read", "other": "no Pareto set", "none": "is missing"}
    for name, part in parts.items():
        result = ml2o("query", f"{name}.safetensors", "--preference", "0.5,0.5")
        assert result.exit_code == 2
        assert part in result.output


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("task=multidigits", "did you mean 'tasks'"),
        ("tasks=multidigit", "did you mean 'multidigits'"),
        ("comparators=[sup]", "did you mean 'soup'"),
        ("network.name=cnm", "did you mean 'cnn'"),
        ("modules=block.*", "fits no module"),
        ("routers.optimizer=mean+adam", "needs a learning rate"),
        ("routers.optimizer=mean+adm@0.1", "did you mean 'adam'"),
        ("experts.files=[a.pt,b.pt,c.pt]", "a.pt' is missing"),
        ("experts.files=[text.pt,text.pt,text.pt]", "text.pt' cannot be read"),
        ("comparators=soup", "must be a list, as [a, b], not 'soup'"),
        ("experts.files=[a.pt,b.pt]", "at least two experts"),
        ("experts.ranks=3", "must be a multiple of ranks 3"),
        ("device=cuda", "device=cuda needs resources.num_gpus > 0"),
        ("divisions=100000", "must be less than or equal to 50"),
    ],
)
def test_nothing_starts_where_something_is_wrong(home, override, part, monkeypatch):
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    (home / "text.pt").write_text("hello")
    result = ml2o("train", "--config", CONFIG, "--run-dir", "runs/x", "--set", override)
    assert result.exit_code == 2, result.output
    assert part in result.output
    assert not (home / "runs" / "x" / "pareto_set.yaml").exists()


@pytest.mark.parametrize(
    ("comparator", "part"),
    [("cosmos", "wants 3 channels"), ("pamal", "running moments"), ("phn-ls", "trunk.trunk.1.running_mean")],
)
def test_a_comparator_that_cannot_take_the_network_is_refused_before_anything_is_trained(
    home, comparator, part, monkeypatch
):
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(
        "ml2o_dist.paretoset.networks.library_trunk", lambda *words, **settings: (GreyImages(trunk, 8), 4)
    )
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    result = ml2o("train", "--config", CONFIG, "--run-dir", "runs/x", "--set", "network.name=timm/x",
                  "--set", f"comparators=[{comparator}]")  # fmt: skip
    assert result.exit_code == 2, result.output
    assert part in result.output


def test_an_optimizer_that_compares_points_wants_weights_that_stay(home):
    result = ml2o("train", "--config", CONFIG, "--run-dir", "runs/x", "--set", "routers.loss=epo",
                  "--set", "routers.optimizer=gml2o:initial")  # fmt: skip
    assert result.exit_code == 2
    assert "use routers.loss=ls" in result.output


def test_a_folder_of_something_else_is_refused_and_refuses(finished, home, monkeypatch):
    (home / "runs" / "x").mkdir(parents=True)
    for name, what in (
        ("sweep.yaml", "a sweep"),
        ("evaluation.json", "an evaluation"),
        ("config.yaml", "a meta-training"),
    ):
        (home / "runs" / "x" / name).touch()
        result = ml2o("train", "--config", CONFIG, "--run-dir", "runs/x")
        assert result.exit_code == 2
        assert f"holds {what}" in result.output
        (home / "runs" / "x" / name).unlink()
    monkeypatch.setenv("ML2O_HOME", str(finished[0]))
    for words in (["meta-train"], ["sweep", "--config", str(Path(CONFIG).with_name("small_sweep.yaml"))],
                  ["evaluate", "--optimizer", "initial", "--problem", "fonseca"]):  # fmt: skip
        result = CliRunner().invoke(main, [*words, "--run-dir", "runs/a"])
        assert result.exit_code == 2
        assert "holds a Pareto set" in result.output
