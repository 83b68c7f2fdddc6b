"""The sweep over units: streams, statistics, commits, memory."""

from fewbits.engine.run import QuantizeResult, quantize
from fewbits.engine.store import Budget

__all__ = ["Budget", "QuantizeResult", "quantize"]
