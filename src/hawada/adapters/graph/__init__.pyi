from .adapter import GraphAdapter as GraphAdapter
