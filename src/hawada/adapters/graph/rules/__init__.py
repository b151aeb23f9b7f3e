"""What operators do to channels, one file a kind of operators."""

from hawada.adapters.graph.rules.pointwise import POINTWISE
from hawada.adapters.graph.rules.products import PRODUCTS
from hawada.adapters.graph.rules.views import VIEWS

RULES = {**VIEWS.table, **POINTWISE.table, **PRODUCTS.table}
