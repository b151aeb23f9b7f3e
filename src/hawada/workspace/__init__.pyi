from .distillation import check_distillation as check_distillation, make_distillation as make_distillation
from .judge import (
    Judgement as Judgement,
    as_dict as as_dict,
    judge_afresh as judge_afresh,
    judge_here as judge_here,
    measure_afresh as measure_afresh,
)
from .quality import Quality as Quality
from .tables import (
    FILE as FILE,
    given_table as given_table,
    load_proxy as load_proxy,
    predicted as predicted,
    write_table as write_table,
)
from .workspace import Workspace as Workspace
