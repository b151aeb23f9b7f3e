from .adapter import GraphAdapter as GraphAdapter, import_factory as import_factory
from .declaration import Declaration as Declaration
from .trace import Trace as Trace
