"""Seeing a model: the recorded forward, its sites, units and relations."""

from fewbits.graph.record import record
from fewbits.graph.types import Call, Graph, Ref, Site, Unit, Value

__all__ = ["Call", "Graph", "Ref", "Site", "Unit", "Value", "record"]
