from .device import configured_device as configured_device, prepare as prepare
from .distillation import check_distillation as check_distillation, make_distillation as make_distillation
from .opening import open_stage as open_stage
from .own_network import fill_in_from_photos as fill_in_from_photos
from .proof import prove_declaration as prove_declaration
from .quality import Quality as Quality
from .stopwatch import ModelStopwatch as ModelStopwatch, Stopwatch as Stopwatch
from .store import Store as Store
from .subject import Subject as Subject
from .tables import (
    TABLE_FILE as TABLE_FILE,
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
