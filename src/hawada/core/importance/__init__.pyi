from .fisher import (
    FisherImportance as FisherImportance,
    fisher_importance as fisher_importance,
    start_from_importance as start_from_importance,
)
from .gates import (
    CalibrationData as CalibrationData,
    Gates as Gates,
    Importance as Importance,
    importance_from_gates as importance_from_gates,
    rank_units as rank_units,
)
from .magnitude import Magnitude as Magnitude
from .obs import ObsImportance as ObsImportance, obs_ranks as obs_ranks
from .sensitivity import (
    OutputDivergence as OutputDivergence,
    Sensitivity as Sensitivity,
    measure_sensitivity as measure_sensitivity,
)
