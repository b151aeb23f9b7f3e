from .distillation import Distillation as Distillation
from .losses import KDConfig as KDConfig, hidden_mse as hidden_mse, kd_loss as kd_loss, mse_reg as mse_reg
from .outputs import (
    Alignment as Alignment,
    OtherTeacher as OtherTeacher,
    Outputs as Outputs,
    OutputsFunction as OutputsFunction,
    plain_outputs as plain_outputs,
)
from .teacher_cache import TeacherCache as TeacherCache
