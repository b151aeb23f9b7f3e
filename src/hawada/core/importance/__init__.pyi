from .fisher import fisher_importance as fisher_importance, start_from_importance as start_from_importance
from .obs import reconstruction_ranks as reconstruction_ranks
from .sensitivity import (
    OutputDivergence as OutputDivergence,
    Sensitivity as Sensitivity,
    measure_sensitivity as measure_sensitivity,
)
