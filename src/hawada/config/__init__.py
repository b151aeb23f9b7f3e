"""The configuration: where it lies, what each key may be, and how objects are made from it. Imports no torch."""

from hawada.config.build import build, check_targets, conf_dir, leave_out_shipped, register_resolvers
from hawada.config.schema import KEYS, Key
from hawada.config.spellings import OLD_SPELLINGS, check_spellings, expand, spell_out
from hawada.config.validate import check_given, problems, validate

__all__ = [
    "KEYS",
    "OLD_SPELLINGS",
    "Key",
    "build",
    "check_given",
    "check_spellings",
    "check_targets",
    "conf_dir",
    "expand",
    "leave_out_shipped",
    "problems",
    "register_resolvers",
    "spell_out",
    "validate",
]
