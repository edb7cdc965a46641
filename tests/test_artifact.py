"""A learned optimizer on disk: what was written comes back, and whatever was altered is refused by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ml2o_dist.artifact import FORMAT, save_artifact, weights_sha256
from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.config import RuleSettings
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.runtime.errors import UserError
from tests.forged_artifact import edit_card, replace_tensors
from tests.wording import says

RULE = RuleSettings(hidden=4, objectives="per_objective", count=3)
PROVENANCE = {"config_hash": "c0ffee", "seed": 7, "meta_steps": 12, "family": ["a", "b"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_artifact(tmp_path, ML2ONetwork(RULE).state_dict(), RULE, PROVENANCE)
    return tmp_path


def test_round_trip_keeps_every_bit_and_the_provenance(folder: Path) -> None:
    state = ML2ONetwork(RULE).state_dict()
    for place in (folder, folder / "weights.safetensors"):
        artifact = load_artifact(place)
        assert artifact.weights.keys() == state.keys()
        assert all(torch.equal(artifact.weights[name], tensor) for name, tensor in state.items())
        assert artifact.rule == RULE
        assert artifact.card["provenance"] == PROVENANCE
        assert artifact.card["parameters"] == sum(tensor.numel() for tensor in state.values())
        assert artifact.weights_sha256 == weights_sha256(state)
        assert artifact.path == folder / "weights.safetensors"


def test_a_named_file_has_its_card_beside_it(tmp_path: Path) -> None:
    written = save_artifact(tmp_path / "new" / "best.safetensors", ML2ONetwork(RULE).state_dict(), RULE, {})
    assert sorted(os.listdir(tmp_path / "new")) == ["best.json", "best.safetensors"]
    assert load_artifact(tmp_path / "new" / "best.safetensors").card == written.card


def test_a_relative_place_is_looked_for_in_the_current_folder_then_in_the_home(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("ML2O_HOME", str(folder.parent))
    assert load_artifact(folder.name).path.parent == folder
    save_artifact(
        tmp_path / "here" / folder.name, ML2ONetwork(RuleSettings(hidden=2)).state_dict(), RuleSettings(hidden=2), {}
    )
    assert load_artifact(folder.name).path.parent == tmp_path / "here" / folder.name


def test_a_uri_is_read_and_verified_like_a_folder(folder: Path) -> None:
    uri = folder.as_uri()
    for place in (uri, f"{uri}/", f"{uri}/weights.safetensors"):
        there = load_artifact(place)
        assert there.weights_sha256 == load_artifact(folder).weights_sha256
        assert folder not in there.path.parents
    (folder / "weights.json").unlink()
    with pytest.raises(UserError, match=rf"weights\.json.*'{uri}'.*cannot be read"):
        load_artifact(uri)


def test_a_run_that_is_not_finished_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"missing.*not finished.*--resume"):
        load_artifact(tmp_path)


def test_saving_again_replaces_both_files_and_leaves_nothing_else(folder: Path) -> None:
    state = {name: tensor + 1 for name, tensor in ML2ONetwork(RULE).state_dict().items()}
    save_artifact(folder, state, RULE, {})
    assert load_artifact(folder).weights_sha256 == weights_sha256(state)
    assert sorted(os.listdir(folder)) == ["weights.json", "weights.safetensors"]


def test_a_failed_write_leaves_the_old_artifact_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_artifact(folder).weights_sha256

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    state = {name: tensor + 1 for name, tensor in ML2ONetwork(RULE).state_dict().items()}
    with pytest.raises(UserError, match="No space left on device"):
        save_artifact(folder, state, RULE, {})
    assert load_artifact(folder).weights_sha256 == before
    assert sorted(os.listdir(folder)) == ["weights.json", "weights.safetensors"]


def test_the_digest_sees_names_shapes_and_values_and_nothing_else() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    digest = weights_sha256(weights)
    assert weights_sha256(dict(reversed(weights.items()))) == digest
    assert weights_sha256({**weights, "a": weights["a"].T.contiguous().T}) == digest
    assert weights_sha256({**weights, "a": weights["a"].clone().requires_grad_()}) == digest
    flipped = weights["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [
        {**weights, "a": flipped},
        {**weights, "a": weights["a"].reshape(3, 2)},
        {"c": weights["a"], "b": weights["b"]},
        {"b": weights["a"], "a": weights["b"]},
        {"a": weights["a"]},
    ]
    assert len({digest, *map(weights_sha256, others)}) == 1 + len(others)


def test_scalars_and_empty_tensors_have_a_digest() -> None:
    assert weights_sha256({"a": torch.tensor(1.0)}) != weights_sha256({"a": torch.tensor([1.0])})
    assert weights_sha256({"a": torch.empty(0, 2)}) != weights_sha256({"a": torch.empty(2, 0)})


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}' is missing"):
        load_artifact(folder)


@pytest.mark.parametrize("position", [0, 9, -1])
def test_one_flipped_bit_in_the_weights_is_refused(folder: Path, position: int) -> None:
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.safetensors'.*altered.*sha256"):
        load_artifact(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"weights\.safetensors'.*altered"):
        load_artifact(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "1"}', b"\xff\xfe\x00"])
def test_a_card_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / "weights.json").write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.json'"):
        load_artifact(folder)


def test_an_edited_card_is_refused(folder: Path) -> None:
    edit_card(folder, lambda card: card["rule"].update(lr=0.5), consistent=False)
    with pytest.raises(UserError, match=r"weights\.json' was altered"):
        load_artifact(folder)


def test_a_card_without_a_key_is_refused_by_its_name(folder: Path) -> None:
    edit_card(folder, lambda card: card.pop("rule"))
    with pytest.raises(UserError, match=r"weights\.json' lacks rule"):
        load_artifact(folder)


def test_a_newer_format_is_refused_as_such(folder: Path) -> None:
    edit_card(folder, lambda card: card.update(format=FORMAT + 1, surprise=1))
    with pytest.raises(UserError, match=rf"format {FORMAT + 1}.* {FORMAT}"):
        load_artifact(folder)


def test_an_unknown_rule_setting_is_named(folder: Path) -> None:
    edit_card(folder, lambda card: card["rule"].update(depth=3))
    with pytest.raises(UserError, match=r"rule\.depth"):
        load_artifact(folder)


def test_other_weights_under_the_same_file_digest_are_refused(folder: Path) -> None:
    edit_card(folder, lambda card: card.update(weights_sha256="0" * 64))
    with pytest.raises(UserError, match=r"tensors.*sha256.*card.*000000000000"):
        load_artifact(folder)


def test_something_else_than_safetensors_is_refused(folder: Path) -> None:
    content = b"not tensors at all"
    (folder / "weights.safetensors").write_bytes(content)
    edit_card(folder, lambda card: card.update(file_sha256=hashlib.sha256(content).hexdigest()))
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_artifact(folder)


def test_a_renamed_tensor_is_refused_by_both_names(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    tensors["head.wait"] = tensors.pop("head.weight")
    replace_tensors(folder, tensors)
    with pytest.raises(UserError, match=r"without head\.weight.*with head\.wait"):
        load_artifact(folder)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    tensors["head.weight"] = torch.zeros(2, 5)
    replace_tensors(folder, tensors)
    with pytest.raises(UserError, match=r"head\.weight.*\[2, 5\].*\[2, 4\]"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"hidden": 8}, "hidden 4, not 8"),
        ({"features": "alignment"}, "feature channels 3, not 4"),
        ({"objectives": "tied"}, "objective modules 3, not 1"),
        ({"count": 2}, "objective modules 3, not 2"),
        ({"output": "scaled"}, "outputs 2, not 1"),
        ({"hidden": 8, "features": "log_sign"}, "hidden 4, not 8; feature channels 3, not 2"),
    ],
)
def test_the_card_of_another_architecture_is_refused_by_what_differs(
    folder: Path, change: dict[str, object], differing: str
) -> None:
    edit_card(folder, lambda card: card["rule"].update(change))
    with pytest.raises(UserError) as refusal:
        load_artifact(folder)
    assert says(str(refusal.value), "weights.safetensors'", f"({differing})")


def test_weights_of_another_rule_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rule settings"):
        save_artifact(tmp_path, ML2ONetwork(RULE).state_dict(), RuleSettings(hidden=8), {})
    assert os.listdir(tmp_path) == []


def test_a_card_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not JSON"):
        save_artifact(tmp_path, ML2ONetwork(RULE).state_dict(), RULE, {"figure": object()})
    assert os.listdir(tmp_path) == []


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    """A run whose score is NaN keeps its weights."""
    card = {"score": float("nan"), "range": (1.0, float("inf")), "nested": {"low": -float("inf")}}
    save_artifact(tmp_path, ML2ONetwork(RULE).state_dict(), RULE, card)
    expected = {"score": None, "range": [1.0, None], "nested": {"low": None}}
    assert load_artifact(tmp_path).card["provenance"] == expected


WRONG_CARDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a digest that is a number": (lambda card: card.update(file_sha256=7), "file_sha256.*int.*str"),
    "a digest that is no digest": (lambda card: card.update(weights_sha256="x"), "weights_sha256 is no sha256"),
    "a rule that is a list": (lambda card: card.update(rule=[]), "rule.*list.*dict"),
    "provenance that is null": (lambda card: card.update(provenance=None), "provenance.*NoneType"),
    "a format that is true": (lambda card: card.update(format=True), "format.*bool.*int"),
    "a width of a thousand million": (lambda card: card["rule"].update(hidden=10**9), "rule.hidden: Input should be"),
    "as many modules": (lambda card: card["rule"].update(count=10**9), "rule.num_objectives: Input should be"),
    "a huge network": (
        lambda card: card["rule"].update(hidden=1024, count=1000),
        "num_objectives \\* hidden\\^2 is above",
    ),
    "another network": (lambda card: card["rule"].update(hidden=1024, count=1), "rule settings"),
    "a rate that is no number": (lambda card: card["rule"].update(lr="fast"), "rule.lr: Input should be"),
    "41 digits": (lambda card: card.update(parameters=10**40), "40 digits"),
    "half a character": (lambda card: card.update(created="\ud800"), "half a character"),
    "a key with an escape": (lambda card: card["rule"].update({"\x1b[31m": 1}), r"rule\.\\x1b\[31m: Extra inputs"),
}


@pytest.mark.parametrize("kind", WRONG_CARDS)
def test_a_card_of_wrong_types_or_sizes_is_one_line(kind: str, folder: Path) -> None:
    change, why = WRONG_CARDS[kind]
    edit_card(folder, change)
    with pytest.raises(UserError, match=why) as caught:
        load_artifact(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[" * 100_000, "nested.*64 levels"),
        ('{"format": 1, "format": 2}', "has the key 'format' twice"),
        ('{"format": NaN}', "is not finite"),
        ('{"format": 1e400}', "is not finite"),
        ("[1]", "names no format"),
        ("9" * 5000, "an integer of 5000 digits"),
    ],
    ids=range(6),
)
def test_a_card_that_is_no_card_is_one_line(content: str, why: str, folder: Path) -> None:
    (folder / "weights.json").write_text(content)
    with pytest.raises(UserError, match=why):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t * float("nan"), "not finite"),
        (lambda t: t + float("inf"), "not finite"),
        (lambda t: t.to(torch.int64), "int64.*float32 or float64"),
        (lambda t: t.to(torch.bool), "is of bool; weights"),
        (lambda t: t.half(), "is of float16; weights"),
        (lambda t: t[:0], "has shape"),
        (lambda t: t.flatten(), "has shape"),
    ],
)
def test_weights_that_are_no_finite_floats_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], why: str, folder: Path
) -> None:
    tensors = load_file(folder / "weights.safetensors")
    replace_tensors(folder, tensors | {"shared.weight_hh_l0": change(tensors["shared.weight_hh_l0"])})
    with pytest.raises(UserError, match=why):
        load_artifact(folder)


@pytest.mark.parametrize("name", ["weights.json", "weights.safetensors"])
def test_what_is_no_regular_file_is_refused_at_once_also_at_a_uri(name: str, folder: Path) -> None:
    uri = folder.as_uri()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for place in (folder, uri):
        with pytest.raises(UserError, match="is not a regular file"):
            load_artifact(place)
    (folder / name).unlink()
    with (folder / name).open("wb") as stream:
        stream.truncate(2**40)
    for place in (folder, uri):
        with pytest.raises(UserError, match=r"is larger than \d+ MiB"):
            load_artifact(place)


def test_a_file_of_another_kind_is_one_line(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt'.*\.safetensors"):
        load_artifact(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "name", ["a" * 300, f"{'a' * 300}/x", "a\0b", "~nobody-at-all/x", "/dev/null", "/dev/zero"], ids=range(6)
)
def test_a_name_that_no_weights_have_is_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_artifact(name)
    assert len(str(caught.value).splitlines()) == 1
