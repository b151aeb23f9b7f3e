from .fisher import fisher_importance as fisher_importance, start_from_importance as start_from_importance
from .obs import obs_ranks as obs_ranks
from .sensitivity import (
    AnswerLoss as AnswerLoss,
    Sensitivity as Sensitivity,
    measure_sensitivity as measure_sensitivity,
)
