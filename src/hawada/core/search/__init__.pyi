from .allocation import Worths as Worths, saliency_from_gates as saliency_from_gates
from .search_export import (
    BudgetSearch as BudgetSearch,
    Candidate as Candidate,
    SearchResult as SearchResult,
    grid_search_latency as grid_search_latency,
    search_export as search_export,
)
