from .attach import (
    GroupFilter as GroupFilter,
    attach_adapters as attach_adapters,
    group_table as group_table,
    is_attention_layer as is_attention_layer,
    select_groups as select_groups,
)
from .base import Adapter as Adapter, Shape as Shape, save_model as save_model
from .saved import load_model as load_model, load_with_adapter as load_with_adapter
