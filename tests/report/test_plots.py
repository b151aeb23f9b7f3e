from pathlib import Path

import pytest
from matplotlib.image import imread

from hawada.experiment.results import Stairs
from hawada.report import plot_staircases

STAIR = Stairs(
    site="layer1.0",
    kind="layer1",
    group="layer1.0.conv1",
    unit="channel",
    widths=(8, 9, 16),
    ms=(1.0, 2.0, 2.1),
    half_widths=(0.0, 0.0, 0.0),
    ends=(8,),
)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_picture_holds_every_site(count: int, tmp_path: Path) -> None:
    plot_staircases(tmp_path / "staircase.png", [STAIR] * count, title="a title")
    picture = imread(tmp_path / "staircase.png")
    assert picture.shape[1] == 1200 and (picture[..., :3].min() < 0.5)
    rows = max(1, -(-count // 2))
    assert picture.shape[0] == pytest.approx(120 * (3.2 * rows + 0.4), abs=1)
