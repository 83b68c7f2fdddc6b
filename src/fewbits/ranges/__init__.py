"""How the parameters of a format are found from a tensor's values."""

from fewbits.ranges.base import Range, range_from_dict
from fewbits.ranges.candidates import Candidates, Quantiles, Shrink
from fewbits.ranges.minmax import AbsMax, MinMax
from fewbits.ranges.percentile import Percentile
from fewbits.ranges.quantile import quantiles
from fewbits.ranges.scores import LpError, Score
from fewbits.ranges.search import QuantileSearch, Search, ShrinkSearch, search_blocks

__all__ = [
    "AbsMax",
    "Candidates",
    "LpError",
    "MinMax",
    "Percentile",
    "QuantileSearch",
    "Quantiles",
    "Range",
    "Score",
    "Search",
    "Shrink",
    "ShrinkSearch",
    "quantiles",
    "range_from_dict",
    "search_blocks",
]
