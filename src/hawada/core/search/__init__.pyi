from .allocation import Allocation as Allocation
from .objective import (
    ImportanceObjective as ImportanceObjective,
    SearchObjective as SearchObjective,
    SensitivityObjective as SensitivityObjective,
    reachable as reachable,
)
from .search_export import (
    BudgetSearch as BudgetSearch,
    Candidate as Candidate,
    SearchResult as SearchResult,
    grid_search_latency as grid_search_latency,
    search_export as search_export,
)
