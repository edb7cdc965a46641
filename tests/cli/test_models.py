"""`ml2o models` on a real sqlite registry: shown, exported, imported, rolled back; whatever was altered is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.torch import load_file

from ml2o_dist.artifact import FORMAT
from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.cli import main
from ml2o_dist.cli.models import versions_table
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.champion import describe_version, promote_version
from ml2o_dist.tracking.registry import ModelVersion, list_versions, register_version, resolve_model
from tests.forged_artifact import edit_card, flip_bit, replace_tensors
from tests.tracking.filled_registry import Registry
from tests.wording import says


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Version 1 is `previous`, 2 `champion`, 3 `candidate`."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    for number in (1, 2, 3):
        register_version(
            registry.uri, "ml2o", registry.artifact(number), run_id=registry.run_id, description="Trained.\nWell."
        )
    promote_version(registry.uri, "ml2o", 1, expected=None, note="the first")
    promote_version(registry.uri, "ml2o", 2, expected=1, note="better on 8 of 10")
    return registry


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry) -> Path:
    """Relative paths begin here."""
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    return tmp_path


def models(*words: str) -> Result:
    return CliRunner().invoke(main, ["models", *words])


def answer(*words: str) -> Any:
    result = models(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*words: str) -> str:
    """Return the one line with which a command is refused."""
    result = models(*words)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return str(line)


@pytest.mark.parametrize("name", ["list", "show", "rollback", "export", "import"])
def test_every_command_has_a_help_text(name: str) -> None:
    result = models(name, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert len(result.output.splitlines()) > 5


def test_list_gives_every_version_with_its_aliases(registry: Registry) -> None:
    listed = answer("list", "--name", "ml2o")
    assert [(entry["version"], entry["aliases"]) for entry in listed] == [
        (1, ["previous"]),
        (2, ["champion"]),
        (3, ["candidate"]),
    ]
    assert {entry["description"] for entry in listed} == {"Trained.\nWell."}
    assert answer("list", "--name", "other") == []
    assert says(models("list", "--name", "other").stdout, "no registered models", registry.uri)


def version(name: str, number: int, *aliases: str) -> ModelVersion:
    tags = {
        "validation_score": "-0.123456",
        "meta_steps": "4000",
        "best_meta_step": "3210",
        "weights_sha256": "ab" * 32,
    }
    return ModelVersion(
        name=name,
        version=number,
        aliases=list(aliases),
        tags=tags,
        description="",
        created="2026-10-18T14:03:09+00:00",
        run_id="c0ffee",
    )


def test_a_table_of_versions_is_whole_in_80_columns() -> None:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(
        versions_table(
            [version("ml2o", 1000, "champion", "candidate"), version("digits-lenet", 7, "previous")], "models"
        )
    )
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]
    cells = [line.split() for line in lines]
    made = ["2026-10-18", "-0.1234", "3210/4000", "abababab"]
    assert ["ml2o/1000", "champion", *made] in cells
    assert ["candidate"] in cells
    assert ["digits-lenet/7", "previous", *made] in cells


@pytest.mark.parametrize("reference", ["ml2o@champion", "ml2o/2", "models:/ml2o@champion", "models:/ml2o/2"])
def test_show_tells_all_of_one_version(registry: Registry, reference: str) -> None:
    describe_version(registry.uri, "ml2o", 2, "standard", "better on 8 of 10")
    shown = answer("show", reference)
    (listed,) = (entry for entry in answer("list") if (entry["name"], entry["version"]) == ("ml2o", 2))
    assert shown.items() >= listed.items()
    artifact = load_artifact(resolve_model(registry.uri, "models:/ml2o/2"))
    assert (shown["rule"], shown["parameters"]) == (artifact.card["rule"], artifact.card["parameters"])
    assert (shown["path"], shown["rule"]["hidden"]) == (str(artifact.path), 4)
    assert shown["source"].removeprefix("file://") in shown["path"]
    assert "unreadable" not in shown
    text = models("show", reference).stdout
    for line in (
        "version        ml2o/2 (champion)",
        f"created        {listed['created']}",
        f"MLflow run     {registry.run_id}",
        f"file           {artifact.path}",
        "  promotion: better on 8 of 10",
        "  promoted_over: 1",
        "  Well.",
        "  standard: better on 8 of 10",
    ):
        assert line in text.splitlines()
    assert (
        f"architecture   {artifact.card['parameters']} weights, kind=coordinatewise, features=adam, output=residual"
        in text
    )


def test_show_of_a_model_names_its_champion_its_candidate_and_its_versions() -> None:
    for name in ("ml2o", "models:/ml2o"):
        shown = answer("show", name)
        assert (shown["champion"], shown["previous"], shown["candidate"]) == (2, 1, 3)
        assert [entry["version"] for entry in shown["versions"]] == [1, 2, 3]
    text = models("show", "ml2o").stdout
    assert "champion       ml2o/2\ncandidate      ml2o/3\nprevious       ml2o/1\n" in text
    assert "ml2o/3" in text.partition("weights")[2]


def test_quiet_says_nothing() -> None:
    for words in (["list"], ["show", "ml2o"], ["show", "ml2o/1"]):
        assert models(*words, "--quiet").output == ""


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("ml2", "model 'ml2' ... 'ml2o' ... (allowed: ml2o)"),
        ("mlo@champion", "model 'mlo' ... 'ml2o' ... (allowed: ml2o)"),
        ("ml2o@champ", "alias ... 'ml2o' ... 'champ' ... 'champion' ... (allowed: candidate, champion, previous)"),
        ("ml2o/9", "version ... 'ml2o' ... '9' ... (allowed: 1, 2, 3)"),
        ("ml2o/x", "'models:/ml2o/x' ... models:/NAME@ALIAS ... models:/NAME/VERSION"),
    ],
)
def test_what_is_not_there_is_one_line(reference: str, words: str) -> None:
    line = refusal("show", reference)
    assert line.startswith("ml2o: ")
    assert says(line, words)
    if reference != "ml2":
        assert refusal("export", reference, "--output", "out") == line


def test_rollback_swaps_champion_and_previous(registry: Registry) -> None:
    try:
        assert answer("rollback") == {"name": "ml2o", "champion": 1, "previous": 2}
        assert registry.aliases("ml2o") == {"champion": 1, "previous": 2, "candidate": 3}
    finally:
        text = models("rollback", "--name", "ml2o").stdout
    assert text == "champion       ml2o/2\nprevious       ml2o/1\n"
    assert registry.aliases("ml2o") == {"champion": 2, "previous": 1, "candidate": 3}
    assert says(refusal("rollback", "--name", "ml20"), "ml2o: ", "model 'ml20'")


def test_export_writes_the_registered_bytes_to_a_folder_or_a_file(registry: Registry, home: Path) -> None:
    registered = resolve_model(registry.uri, "models:/ml2o@champion")
    for output, weights, card in (
        ("made/out", "made/out/weights.safetensors", "made/out/weights.json"),
        ("best.safetensors", "best.safetensors", "best.json"),
    ):
        written = answer("export", "ml2o@champion", "--output", output)
        assert written == {
            "reference": "models:/ml2o@champion",
            "path": str(home / weights),
            "weights_sha256": load_artifact(registered).weights_sha256,
        }
        assert (home / weights).read_bytes() == registered.read_bytes()
        assert (home / card).read_bytes() == registered.with_suffix(".json").read_bytes()
        assert (home / weights).read_bytes() == (registry.folder / "run2" / "weights.safetensors").read_bytes()


def test_export_leaves_other_files_alone_and_completes_its_own(registry: Registry, home: Path) -> None:
    answer("export", "ml2o/2", "--output", "out")
    (home / "out" / "weights.json").unlink()
    answer("export", "ml2o/2", "--output", "out")
    answer("export", "ml2o/2", "--output", "out")
    before = [(home / "out" / name).read_bytes() for name in ("weights.safetensors", "weights.json")]
    line = refusal("export", "ml2o/1", "--output", "out")
    assert line.startswith("ml2o: ")
    assert says(line, f"'{home}/out/weights.safetensors'", "models:/ml2o/1", "--output")
    assert [(home / "out" / name).read_bytes() for name in ("weights.safetensors", "weights.json")] == before
    (home / "file").write_text("")
    assert refusal("export", "ml2o/1", "--output", "file").startswith(f"ml2o: '{home}/file/weights.safetensors' ")


def test_import_registers_a_candidate_once(registry: Registry, home: Path) -> None:
    shutil.copytree(registry.artifact(7).parent, home / "run")
    first = answer("import", "run", "--name", "imported")
    assert (first["version"], first["aliases"], first["new"]) == (1, ["candidate"], True)
    assert first["tags"]["imported_from"] == str(home / "run")
    assert first["tags"]["weights_sha256"] == load_artifact(home / "run").weights_sha256
    assert load_artifact(resolve_model(registry.uri, "models:/imported/1")).card == load_artifact(home / "run").card
    for place in (str(home / "run" / "weights.safetensors"), (home / "run").as_uri()):
        again = answer("import", place, "--name", "imported")
        assert (again["version"], again["new"]) == (1, False)
        assert again["tags"] == first["tags"]
    assert models("import", "run", "--name", "imported").stdout == "there already  imported/1 (candidate)\n"


def test_what_a_run_has_registered_is_not_imported_again(registry: Registry) -> None:
    assert answer("import", str(registry.artifact(1)))["version"] == 1
    assert registry.aliases("ml2o")["candidate"] == 3


def test_import_from_a_uri_and_of_what_is_none(registry: Registry, home: Path) -> None:
    uri = registry.artifact(8).parent.as_uri()
    assert answer("import", uri, "--name", "from-uri")["tags"]["imported_from"] == uri
    assert says(refusal("import", "ml2o"), f"'{home}/ml2o/weights.safetensors'", "missing")
    assert says(refusal("import", "models:/ml2o/1"), "ml2o: models:/ml2o/1", "registered already")


def _other_rule(**settings: object) -> Callable[[Path], None]:
    return lambda folder: edit_card(folder, lambda card: card["rule"].update(settings))


def _truncate(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _other_weights(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    replace_tensors(folder, {name: tensor + torch.ones(()) for name, tensor in tensors.items()})


ALTERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit in a tensor": (
        lambda folder: flip_bit(folder / "weights.safetensors", -1),
        "weights.safetensors' ... altered ... sha256",
    ),
    "flipped bit in the header": (
        lambda folder: flip_bit(folder / "weights.safetensors", 20),
        "weights.safetensors' ... altered ... sha256",
    ),
    "truncated": (_truncate, "weights.safetensors' ... altered ... sha256"),
    "edited card": (
        lambda folder: edit_card(folder, lambda card: card["rule"].update(lr=0.5), consistent=False),
        "weights.json' ... altered ... card_sha256",
    ),
    "later format": (
        lambda folder: edit_card(folder, lambda card: card.update(format=FORMAT + 1)),
        f"weights.json' ... format {FORMAT + 1} ... {FORMAT}: ... newer ml2o_dist",
    ),
    "other hidden size": (_other_rule(hidden=8), "rule settings (hidden 4, not 8)"),
    "other objectives": (
        _other_rule(objectives="per_objective", count=3),
        "rule settings (objective modules 1, not 3)",
    ),
    "other features": (_other_rule(features="log_sign"), "rule settings (feature channels 3, not 2)"),
    "no card": (lambda folder: (folder / "weights.json").unlink(), "card file '"),
}

FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "other weights, every digest of the file's own": (_other_weights, "has weights_sha256 "),
    "other learning rate, every digest of the file's own": (_other_rule(lr=0.5), "has card_sha256 "),
    "no weights": (lambda folder: (folder / "weights.safetensors").unlink(), "where it is kept, is not there"),
}
"""What only the registry's own word tells from a whole artifact."""


@pytest.fixture
def kept(registry: Registry, tmp_path: Path) -> Iterator[Path]:
    """The folder in which the registry keeps version 2; as it was, after the test."""
    folder = resolve_model(registry.uri, "models:/ml2o/2").parent
    shutil.copytree(folder, tmp_path / "saved")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "saved", folder)


@pytest.mark.parametrize("case", [*ALTERED, *FORGED])
def test_a_version_whose_files_were_altered_is_refused_by_what_differs(
    registry: Registry, kept: Path, home: Path, case: str
) -> None:
    alter, said = (ALTERED | FORGED)[case]
    alter(kept)
    line = refusal("export", "ml2o@champion", "--output", "out")
    assert line.startswith("ml2o: models:/ml2o@champion: ")
    assert f"'{kept}/weights." in line
    assert says(line, said)
    assert not (home / "out").exists()
    with pytest.raises(UserError) as error:
        resolve_model(registry.uri, "models:/ml2o@champion")
    assert f"ml2o: {error.value}" == line
    with pytest.raises(UserError):
        load_artifact("models:/ml2o@champion")
    shown = models("show", "ml2o/2", "--json")
    assert shown.exit_code == 0
    assert says(json.loads(shown.stdout)["unreadable"], said)
    assert json.loads(shown.stdout)["path"] is None
    assert says(" ".join(shown.stderr.split()), said)


@pytest.mark.parametrize("case", ALTERED)
def test_an_altered_artifact_is_not_imported(registry: Registry, home: Path, case: str) -> None:
    shutil.copytree(registry.artifact(9).parent, home / "run")
    alter, said = ALTERED[case]
    alter(home / "run")
    line = refusal("import", "run", "--name", "refused")
    assert f"'{home}/run/weights." in line
    assert says(line, said)
    assert list_versions(registry.uri, "refused") == []


@pytest.mark.parametrize("tag", ["weights_sha256", "card_sha256"])
def test_a_version_whose_tag_was_altered_is_refused_by_the_tag(registry: Registry, tag: str) -> None:
    before = registry.tags("ml2o", 2)[tag]
    registry.client.set_model_version_tag("ml2o", "2", tag, "0" * 64)
    try:
        line = refusal("export", "ml2o/2", "--output", "out")
    finally:
        registry.client.set_model_version_tag("ml2o", "2", tag, before)
    assert says(line, f"{tag} {before[:12]}", "000000000000")


HOSTILE = "[/] [bold]x \x1b[31mred\x1b]8;;http://evil\x07link\u202eabc\u2066 \x9b2J\r\nml2o: all is well"


def test_a_version_with_markup_and_escapes_is_listed_and_shown_like_any_other(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(registry.folder / "mlflow.db", tmp_path / "mlflow.db")
    hostile = Registry(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", hostile.uri)
    hostile.make_versions("[bold", 1)
    hostile.make_versions("good", 1)
    for key in ("validation_score", "best_meta_step", "meta_steps", "weights_sha256", "note"):
        hostile.client.set_model_version_tag("[bold", "1", key, HOSTILE)
    hostile.client.update_model_version("[bold", "1", description=HOSTILE)
    listed, shown = models("list"), models("show", "[bold/1")
    assert (listed.exit_code, shown.exit_code) == (0, 0)
    assert {"[bold/1", "good/1"} <= set(listed.stdout.split())
    note = "  note: [/] [bold]x \\x1b[31mred\\x1b]8;;http://evil\\x07link\\u202eabc\\u2066 \\x9b2J\\x0d\\x0aml2o"
    assert note in shown.stdout
    for text in (listed.stdout, shown.stdout, shown.stderr, models("show", "[bold").stdout):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert not re.search("^ml2o: all is well", text, re.MULTILINE)
    assert answer("show", "[bold/1")["tags"]["note"] == HOSTILE


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_registered(registry: Registry, home: Path, value: float) -> None:
    shutil.copytree(registry.artifact(9).parent, home / "run")
    tensors = load_file(home / "run" / "weights.safetensors")
    tensors["head.bias"][0] = value
    replace_tensors(home / "run", tensors)
    line = refusal("import", "run", "--name", "refused")
    assert says(line, "weights.safetensors'", "head.bias", "not finite")
    with pytest.raises(UserError, match="not finite"):
        register_version(registry.uri, "refused", home / "run")
    assert list_versions(registry.uri, "refused") == []


@pytest.mark.parametrize("name", ["a/b", "x.lock", "a.b", " "])
def test_a_name_that_mlflow_or_a_lock_cannot_take_is_refused(registry: Registry, name: str) -> None:
    assert refusal("import", str(registry.artifact(1)), "--name", name).startswith(f"ml2o: model {name!r}")


@pytest.mark.parametrize("tag", ["weights_sha256", "card_sha256"])
def test_a_version_without_a_digest_is_not_loaded(registry: Registry, tag: str) -> None:
    before = registry.tags("ml2o", 2)[tag]
    registry.client.delete_model_version_tag("ml2o", "2", tag)
    try:
        line = refusal("export", "ml2o/2", "--output", "out")
    finally:
        registry.client.set_model_version_tag("ml2o", "2", tag, before)
    assert says(line, "version", f"no tag {tag}")


def test_nothing_of_a_version_is_run_or_unpickled_when_it_is_loaded(registry: Registry, kept: Path, home: Path) -> None:
    """MLflow's own `mlflow.pyfunc.load_model` would run it."""
    ran = home / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    source = kept.parent  # `kept` is its folder `artifacts`
    for file in source.rglob("*.py"):
        file.write_text(code)
    (source / "python_model.pkl").write_bytes(b"cbuiltins\nexec\n(V" + code.encode() + b"tR.")
    model = "flavors: {python_function: {loader_module: code, python_model: python_model.pkl}}\n"
    (source / "MLmodel").write_text(model)
    (source / "code.py").write_text(code)
    assert answer("show", "ml2o/2")["path"] is not None
    assert answer("export", "ml2o/2", "--output", "out")["reference"] == "models:/ml2o/2"
    assert resolve_model(registry.uri, "models:/ml2o/2").exists()
    assert not ran.exists()


def test_numbers_from_elsewhere_that_are_none_are_one_line(registry: Registry) -> None:
    assert "models:/NAME@ALIAS" in refusal("show", "ml2o/" + "9" * 5000)
    registry.make_versions("odd", 1)
    registry.client.set_registered_model_alias("odd", "champion", "1")
    for said in ("x", "9" * 5000, "-1", "\x1b[2J"):
        registry.client.set_model_version_tag("odd", "1", "promoted_over", said)
        assert says(refusal("rollback", "--name", "odd"), "version 1", "champion", "none")


def test_an_output_that_is_no_file_is_not_read(registry: Registry, home: Path) -> None:
    os.mkfifo(home / "pipe.safetensors")
    assert "is there already" in refusal("export", "ml2o/2", "--output", "pipe.safetensors")
