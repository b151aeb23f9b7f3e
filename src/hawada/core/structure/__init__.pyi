from .attributes import attribute_of as attribute_of, set_attribute as set_attribute
from .checks import check_groups as check_groups
from .edits import (
    Edits as Edits,
    plan_edits as plan_edits,
    set_structure as set_structure,
    sliced_tensors as sliced_tensors,
)
from .groups import (
    Cut as Cut,
    GatePoint as GatePoint,
    Group as Group,
    Norm as Norm,
    Removal as Removal,
    Site as Site,
    Size as Size,
)
from .hooks import ModelHook as ModelHook
from .inputs import Inputs as Inputs, TensorRow as TensorRow
from .kept import (
    Keep as Keep,
    Widths as Widths,
    completed as completed,
    full_widths as full_widths,
    keep_all as keep_all,
    keep_first as keep_first,
    widths_of as widths_of,
    without_orphans as without_orphans,
)
from .kept_whole import KeptWhole as KeptWhole, summarize_kept as summarize_kept
from .materialize import SliceSite as SliceSite, materialize as materialize
from .policy import ExportPolicy as ExportPolicy, Rounding as Rounding
from .selection import (
    best_first as best_first,
    keep_element_indices_from_gate as keep_element_indices_from_gate,
    keep_from_gates as keep_from_gates,
    keep_group_indices_from_gate as keep_group_indices_from_gate,
    smallest_keep as smallest_keep,
)
from .slicing import (
    all_tensors as all_tensors,
    fill as fill,
    slice_conv2d as slice_conv2d,
    slice_embedding as slice_embedding,
    slice_linear as slice_linear,
)
