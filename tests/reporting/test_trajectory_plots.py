"""Pictures of trajectories: early against late, one panel for each thing that was recorded."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from ml2o_dist.metatrain.recorder import Trajectory
from ml2o_dist.metatrain.schedule import Key, WorkItem, training_items
from ml2o_dist.metatrain.trajectories import episodes_table
from ml2o_dist.reporting.plots import MUTED, STRONG
from ml2o_dist.reporting.trajectory_plots import plot_trajectories, stages, trajectories_file, trajectory_panels
from ml2o_dist.runtime.errors import UserError
from tests.metatrain.settings import small


def table(objectives: int, meta_steps: list[int], steps: int = 20, instances: int = 1, lowest: float = 0.1):
    """Episodes whose first loss falls from 1 + meta_step, whose cosines are 0.5 and whose update has length 2."""
    spec = training_items(small(), 0, "cpu")[0].spec
    pairs = objectives * (objectives - 1) // 2
    made = []
    for meta_step in meta_steps:
        k = steps if meta_step % 2 == 0 else steps // 2
        falling = np.linspace(1 + meta_step, lowest, k)[:, None, None] * np.ones((k, instances, objectives))
        trajectory = Trajectory(
            losses=falling.astype(np.float32),
            gradient_norms=np.full((k, instances, objectives), 3, np.float32),
            gradient_cosines=np.full((k, instances, pairs), 0.5, np.float32),
            update_norms=np.full((k, instances), 2, np.float32),
            descent_cosines=np.full((k, instances), 0.5, np.float32),
        )
        made.append((WorkItem(Key(meta_step, 0), spec), trajectory))
    return episodes_table(made)


def lines_of(panel):
    axes = Figure().subplots()
    panel.draw(axes)
    return axes


def test_early_and_late_are_the_outer_thirds():
    early, late = stages(table(2, list(range(9)), instances=2))
    assert early.label == "early: meta-steps 1 to 3, 6 trajectories (2 of 10, 4 of 20 steps)"
    assert late.label == "late: meta-steps 7 to 9, 6 trajectories (2 of 10, 4 of 20 steps)"
    assert [len(each) for each in early.values["losses"]] == [20, 20, 10, 10, 20, 20]
    np.testing.assert_allclose(late.values["losses"][0][0], [7, 7])
    (only,) = stages(table(2, [4]))
    assert only.label == "recorded: meta-step 5, 1 trajectory"


def test_a_thick_line_is_the_median_of_all_trajectories_of_its_length_up_to_their_end():
    early, _ = stages(table(1, list(range(12))))  # first losses 1 and 3 for 20 steps, 2 and 4 for 10
    axes = lines_of(trajectory_panels([early])[0])
    thin, thick = axes.get_lines()[:-2], axes.get_lines()[-2:]
    assert sorted(len(line.get_ydata()) for line in thin) == [10, 10, 20, 20]
    assert [len(line.get_ydata()) for line in thick] == [10, 20]
    assert [line.get_ydata()[0] for line in thick] == pytest.approx([3, 2])
    for middle in thick:
        members = [line.get_ydata() for line in thin if len(line.get_ydata()) == len(middle.get_ydata())]
        np.testing.assert_allclose(middle.get_ydata(), np.mean(members, axis=0))  # the median of two
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("objectives", [2, 5])
def test_no_median_jumps_where_short_episodes_end(objectives):
    """Every trajectory is level, the long ones far above: a median over both would leap at step 10."""
    (part,) = stages(table(objectives, [0]))
    levels = [(20, 10.0), (10, 1.0), (20, 11.0), (10, 2.0), (20, 12.0), (10, 3.0)]
    level = [np.full((steps, objectives), value) for steps, value in levels]
    axes = lines_of(trajectory_panels([replace(part, values={**part.values, "losses": level})])[0])
    thick = [line.get_ydata() for line in axes.get_lines() if line.get_linewidth() > 1]
    assert {len(middle) for middle in thick} == {10, 20}
    for middle in thick:
        np.testing.assert_allclose(middle, {10: 2, 20: 11}[len(middle)])


def test_of_many_objectives_the_mean_and_range_end_with_the_length_too():
    axes = lines_of(trajectory_panels(stages(table(5, list(range(12)))))[0])
    assert sorted(len(line.get_ydata()) for line in axes.get_lines()) == [10, 10, 20, 20]
    assert len(axes.collections) == 4


def test_thin_lines_are_spread_over_the_stage():
    early, _ = stages(table(1, list(range(0, 150, 2))))
    axes = lines_of(trajectory_panels([early])[0])
    firsts = [line.get_ydata()[0] for line in axes.get_lines()[:-1]]
    assert 8 <= len(firsts) <= 12
    assert firsts[0] == pytest.approx(1)
    assert firsts[-1] > 1 + 2 * 20  # of 25: 1, 3, ..., 49


@pytest.mark.parametrize(
    ("objectives", "panels", "pairs"),
    [(1, 4, 0), *(pytest.param(*case, marks=pytest.mark.long) for case in ((2, 5, 1), (5, 5, 1))), (3, 5, 3)],
)
def test_panels_by_the_number_of_objectives(tmp_path, objectives, panels, pairs):
    rows = table(objectives, [0, 2, 4])
    drawn = trajectory_panels(stages(rows))
    assert len(drawn) == panels
    cosines = [p for p in drawn if p.title.startswith("Cosine between")]
    assert sum(len(p.lines) for p in cosines) == pairs
    assert drawn[-1].title == "Cosine of update and negative mean gradient"
    assert {tuple(line.get_ydata()[:1]) for line in lines_of(drawn[-1]).get_lines()[:2]} == {(0.5,)}
    plot_trajectories(rows, tmp_path / "a.png")
    image = matplotlib.image.imread(tmp_path / "a.png")[:, :, :3]
    for colour in (STRONG, MUTED[0]):
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(image - wanted).max(axis=2) < 0.02).sum() > 500


def test_losses_that_are_negative_or_not_finite_are_drawn(tmp_path):
    plot_trajectories(table(2, [0, 2], lowest=-5), tmp_path / "a.png")
    plot_trajectories(table(2, [0, 2], lowest=np.nan), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert lines_of(trajectory_panels(stages(table(2, [0, 2], lowest=-5)))[0]).get_yscale() == "linear"


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the picture cannot be written to"):
        plot_trajectories(table(2, [0]), tmp_path / "file" / "a.png")
    with pytest.raises(UserError, match="the picture cannot be written to"):
        plot_trajectories(table(2, [0]), tmp_path / "a.docx")


def test_a_problem_s_file_has_a_plain_name(tmp_path):
    file = trajectories_file(tmp_path, "multidigits[batch=32,net=cnn]")
    assert file == tmp_path / "plots" / "trajectories-multidigits_batch=32_net=cnn.png"
    assert trajectories_file(tmp_path, "../../x").parent == tmp_path / "plots"
