"""Steps that choose up or down for every weight so that a layer's or a unit's output stays what it was."""

from fewbits.steps.reconstruct.dropping import ReconstructDropping
from fewbits.steps.reconstruct.layers import ReconstructLayers
from fewbits.steps.reconstruct.scales import LearnSteps
from fewbits.steps.reconstruct.unit import ReconstructUnit
from fewbits.steps.reconstruct.weights import Annealing

__all__ = ["Annealing", "LearnSteps", "ReconstructDropping", "ReconstructLayers", "ReconstructUnit"]
