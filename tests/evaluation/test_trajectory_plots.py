"""Pictures of trajectories: early against late, one panel for each thing that was recorded."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from ml2o_dist.errors import UserError
from ml2o_dist.evaluation.trajectory_plots import plot_trajectories, stages, trajectories_file, trajectory_panels
from ml2o_dist.metatrain.recorder import Trajectory
from ml2o_dist.metatrain.schedule import Key, WorkItem, training_items
from ml2o_dist.metatrain.trajectories import episodes_table
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
    assert early.label == "early: meta-steps 1 to 3, 6 trajectories"
    assert late.label == "late: meta-steps 7 to 9, 6 trajectories"
    assert [len(each) for each in early.values["losses"]] == [20, 20, 10, 10, 20, 20]
    np.testing.assert_allclose(late.values["losses"][0][0], [7, 7])
    (only,) = stages(table(2, [4]))
    assert only.label == "recorded: meta-step 5, 1 trajectory"


def test_the_thick_line_is_the_median_of_those_that_reach_the_step():
    early, _ = stages(table(1, list(range(9))))
    axes = lines_of(trajectory_panels([early])[0])
    middle = axes.get_lines()[-1].get_ydata()
    assert len(middle) == 20  # two of three go on to step 20
    assert middle[0] == pytest.approx(2)  # of 1, 2, 3
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize(("objectives", "panels", "pairs"), [(1, 4, 0), (2, 5, 1), (3, 5, 3), (5, 5, 1)])
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
    for colour in ("#c8102e", "#5b8db8"):
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
