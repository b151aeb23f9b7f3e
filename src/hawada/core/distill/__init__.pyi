from .distillation import Distillation as Distillation
from .losses import KDConfig as KDConfig, hidden_mse as hidden_mse, kd_loss as kd_loss, mse_reg as mse_reg
from .outputs import (
    IGNORED as IGNORED,
    Alignment as Alignment,
    OtherTeacher as OtherTeacher,
    Outputs as Outputs,
    Reader as Reader,
    plain_reader as plain_reader,
)
from .teacher_cache import AnswerCache as AnswerCache
