from .adapter import GraphAdapter as GraphAdapter
from .declaration import Declaration as Declaration
from .trace import Trace as Trace
