from .card import model_card as model_card
from .diagnosis import (
    describe as describe,
    print_diagnosis as print_diagnosis,
    summarize_findings as summarize_findings,
)
from .figures import format_quality as format_quality
from .front import plot_front as plot_front, print_front as print_front
from .inspection import print_inspection as print_inspection
from .plots import plot_staircases as plot_staircases
from .progress import Progress as Progress, console as console
from .table import print_result as print_result, print_sweep as print_sweep
