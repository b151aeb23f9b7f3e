from .budget import SEARCH_MARGIN_OF_TOLERANCE as SEARCH_MARGIN_OF_TOLERANCE, Budget as Budget
from .clock import Clock as Clock, DeviceClock as DeviceClock, source_of as source_of
from .device import (
    check_device as check_device,
    check_runtime as check_runtime,
    environment as environment,
    fingerprint as fingerprint,
    prepare_cpu as prepare_cpu,
    resolve_device as resolve_device,
)
from .diagnosis import (
    Peaks as Peaks,
    Staircase as Staircase,
    extreme_keep as extreme_keep,
    find_bottleneck as find_bottleneck,
    half_keep as half_keep,
    measure_peaks as measure_peaks,
    measure_staircase as measure_staircase,
    removed_fraction as removed_fraction,
    sensible_ratios as sensible_ratios,
    stair_axes as stair_axes,
)
from .monitor import DeviceMonitor as DeviceMonitor, Monitor as Monitor
from .operators import list_operators as list_operators
from .profiler import (
    TINY_MS as TINY_MS,
    MeasurementError as MeasurementError,
    Rounds as Rounds,
    Sampled as Sampled,
    Samples as Samples,
    bootstrap_median as bootstrap_median,
    compare as compare,
    comparison_of as comparison_of,
    measure_latency_ms as measure_latency_ms,
    measure_rounds as measure_rounds,
    measure_together as measure_together,
    summarize as summarize,
    widened as widened,
)
from .proxy import (
    LatencyProxy as LatencyProxy,
    Proxy as Proxy,
    calibrate as calibrate,
    fidelity as fidelity,
    random_keep as random_keep,
)
from .simulated import SimulatedClock as SimulatedClock
from .site_table import LatencyTable as LatencyTable, build_table as build_table, capture_arguments as capture_arguments
from .table_file import FORMAT as FORMAT, check_table_file as check_table_file, read_table_file as read_table_file
