"""An optimizer has one look; no two look alike."""

from __future__ import annotations

from xml.etree import ElementTree

from ml2o_dist.reporting.optimizer_looks import LONGEST_NAME, optimizer_looks, short_name, swatch
from ml2o_dist.reporting.plots import MUTED, PLAIN, STRONG, STRONGS
from tests.evaluation.synthetic import EVALUATION, evaluation, row


def test_learned_ones_are_strong_the_untrained_is_plain_the_rest_is_muted() -> None:
    looks = optimizer_looks(EVALUATION)
    assert looks["learned"].colour == STRONG
    assert looks["gml2o:learned"].colour in STRONGS[1:]
    assert looks["initial"].colour == PLAIN
    assert {looks[name].colour for name in ("mean+adam", "mgda+adam", "mean+sgd")} <= set(MUTED)
    assert [name for name, look in looks.items() if look.strong] == ["learned", "gml2o:learned"]
    assert looks["learned"].layer() > looks["initial"].layer() > looks["mean+adam"].layer()


def test_no_two_of_many_look_alike() -> None:
    learned = [row(f"l{i}", "p", 1.0, role="learned") for i in range(3)]
    looks = optimizer_looks(evaluation([*learned, *(row(f"b{i}", "p", 1.0) for i in range(18))]))
    assert len({(look.colour, look.line) for look in looks.values()}) == 21, "as lines"
    assert len({(look.colour, look.mark) for look in looks.values() if not look.strong}) == 18, "as marks"


def test_a_baseline_called_initial_is_like_any_other() -> None:
    looks = optimizer_looks(evaluation([row("initial", "p", 1.0), row("learned", "p", 1.0)]))
    assert all(look.colour in MUTED for look in looks.values())


def test_a_swatch_has_the_line_and_the_mark_in_a_colour_of_the_page() -> None:
    for look in optimizer_looks(EVALUATION).values():
        svg = swatch(look)
        line, mark = ElementTree.fromstring(svg).findall("path")
        assert line.get("stroke") == mark.get("fill")
        assert "#" not in svg
        assert (line.get("stroke-dasharray") is None) == (look.line == "-")


def test_a_long_name_keeps_its_ends() -> None:
    name = "gml2o:/home/somebody/runs/a-run-of-last-week/weights.safetensors"
    assert len(short_name(name)) <= LONGEST_NAME
    assert short_name(name).startswith("gml2o:/home/")
    assert short_name(name).endswith("weights.safetensors")
    assert short_name("x" * LONGEST_NAME) == "x" * LONGEST_NAME
