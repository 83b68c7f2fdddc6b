"""How the parameters of a format are found from a tensor's values."""

from fewbits.ranges.analytic import Analytic
from fewbits.ranges.base import Range, range_from_dict
from fewbits.ranges.candidates import Candidates, Quantiles, Shrink, WidthZeroPoint
from fewbits.ranges.fixed import Fixed
from fewbits.ranges.joint import JointSearch
from fewbits.ranges.kmeans import KMeans, inertia, kmeans
from fewbits.ranges.layer_search import LayerCall, LayerSearch, Operand, search_layer
from fewbits.ranges.minmax import AbsMax, MinMax
from fewbits.ranges.output_clip import output_clip
from fewbits.ranges.percentile import Percentile
from fewbits.ranges.quantile import quantiles
from fewbits.ranges.scores import LpError, Score
from fewbits.ranges.search import QuantileSearch, Search, ShrinkSearch, search_blocks

__all__ = [
    "AbsMax",
    "Analytic",
    "Candidates",
    "Fixed",
    "JointSearch",
    "KMeans",
    "LayerCall",
    "LayerSearch",
    "LpError",
    "MinMax",
    "Operand",
    "Percentile",
    "QuantileSearch",
    "Quantiles",
    "Range",
    "Score",
    "Search",
    "Shrink",
    "ShrinkSearch",
    "WidthZeroPoint",
    "inertia",
    "kmeans",
    "output_clip",
    "quantiles",
    "range_from_dict",
    "search_blocks",
    "search_layer",
]
