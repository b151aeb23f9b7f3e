from .bottleneck import find_bottleneck as find_bottleneck
from .peaks import Peaks as Peaks, measure_peaks as measure_peaks
from .reach import (
    extreme_keep as extreme_keep,
    half_keep as half_keep,
    removed_fraction as removed_fraction,
    sensible_ratios as sensible_ratios,
)
from .staircase import Staircase as Staircase, measure_staircase as measure_staircase, stair_axes as stair_axes
