from .constraints import project_gates_into_constraints as project_gates_into_constraints
from .gates import (
    HardConcreteGate as HardConcreteGate,
    SigmoidGate as SigmoidGate,
    parameter_groups as parameter_groups,
)
from .penalties import (
    L1 as L1,
    FloorCeiling as FloorCeiling,
    Penalty as Penalty,
    Polarization as Polarization,
    StructuredConsistency as StructuredConsistency,
    combined_penalty as combined_penalty,
)
from .student import GateFactory as GateFactory, GateHook as GateHook, NormHook as NormHook, Student as Student
