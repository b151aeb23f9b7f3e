from .distillation import check_distillation as check_distillation, make_distillation as make_distillation
from .quality import Quality as Quality
from .tables import (
    FILE as FILE,
    given_table as given_table,
    load_proxy as load_proxy,
    predicted as predicted,
    write_table as write_table,
)
from .verification import (
    Verification as Verification,
    as_dict as as_dict,
    compare_in_fresh_process as compare_in_fresh_process,
    verify_here as verify_here,
    verify_in_fresh_process as verify_in_fresh_process,
)
from .workspace import Workspace as Workspace
