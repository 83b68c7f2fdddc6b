"""Tables of levels by weighted k-means on a line, one per block: Lloyd's method, or the exact optimum.

SqueezeLLM (Kim et al., ICML 2024), section 4.1, clusters every output row with the diagonal Fisher information as
weight. k-means++ (Arthur and Vassilvitskii, SODA 2007) finds the start. Values on a line can be sorted once; a cluster
is then an interval, and an iteration costs a binary search per center and differences of running sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Codebook, Format, Granularity, Params
from fewbits.formats.codebook import closest, look_up
from fewbits.ranges.base import Range, ranges
from fewbits.ranges.kmeans_exact import exact_centers

_AT_ONCE = 1 << 21  # values per pass: bounds the memory


@dataclass(frozen=True)
class Line:
    """Blocks of weighted values, every block sorted, with running sums: x, and [n, values + 1] sums of w and w x."""

    x: Tensor
    w: Tensor
    mass: Tensor
    moment: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Line:
        x, order = values.double().sort(dim=1)
        w = weights.double().gather(1, order)
        return cls(x, w, running(w), running(w * x))

    def means(self, edges: Tensor, otherwise: Tensor) -> Tensor:
        """Weighted means of the clusters that start at `edges` [n, k + 1]; `otherwise` [n, k] where one is empty."""
        mass = self.mass.gather(1, edges).diff(dim=1)
        moment = self.moment.gather(1, edges).diff(dim=1)
        return torch.where(mass > 0, moment / mass.clamp_min(torch.finfo(torch.float64).tiny), otherwise)


def running(x: Tensor) -> Tensor:
    """[n, values + 1]: sums of the first 0, 1, ... values of every block."""
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def kmeans(
    values: Tensor,
    weights: Tensor | None,
    levels: int,
    *,
    solver: Literal["lloyd", "exact"] = "lloyd",
    iterations: int = 50,
    starts: int = 1,
    uniform_start: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ascending centers [n, levels], float32, of every block of `values` [n, m] under `weights` [n, m] (ones).

    Minimises sum_j w_j (x_j - nearest center)^2 per block. lloyd: from `starts` k-means++ starts drawn with `generator`
    (a CPU generator; seed 0 where not given) and, with `uniform_start`, from evenly spaced levels too, at most
    `iterations` rounds each; the best of a block is kept. exact: the optimum, by dynamic programming over intervals.

    A block without any weight is clustered with equal weights. Where values of positive weight are fewer than levels,
    they are all met exactly, and the centers left over serve values without weight or repeat another. Raises
    FewbitsError for wrong shapes, values that are not finite and weights that are negative or not finite.
    """
    weights = _checked(values, weights, levels)
    if iterations < 1 or starts < 1:
        raise FewbitsError(f"k-means: iterations={iterations}, starts={starts}; both must be at least 1")
    n, m = values.shape
    rows = max(1, _AT_ONCE // (m * (levels if solver == "exact" else 2 + int(math.log(levels)))))
    draws = None
    if solver == "lloyd":
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        tries = 2 + int(math.log(levels))
        draws = torch.rand(n, starts, levels, tries, generator=source, dtype=torch.float64).to(values.device)
    found = []
    for at in range(0, n, rows):
        line = Line.of(values[at : at + rows], weights[at : at + rows])
        if draws is None:
            found.append(exact_centers(line.x, line.w, levels))
            continue
        begins = [_plus_plus(line, draw) for draw in draws[at : at + rows].unbind(1)]
        if uniform_start:
            share = torch.linspace(0, 1, levels, dtype=torch.float64, device=values.device)
            begins.append(torch.lerp(line.x[:, :1], line.x[:, -1:], share))
        tried = torch.stack([_lloyd(line, begin, iterations) for begin in begins])
        score = torch.stack([_objective(line, centers) for centers in tried])
        found.append(tried.gather(0, score.argmin(0)[None, :, None].expand(1, -1, levels))[0])
    return torch.cat(found).float()


def inertia(values: Tensor, weights: Tensor, centers: Tensor) -> Tensor:
    """[n], float64: sum of w (x - nearest center)^2 per block; `centers` [n, levels] in any order."""
    table = centers.sort(dim=1).values.double().T.unsqueeze(2)
    x = values.double()
    return (weights.double() * (x - look_up(table, closest(x, table))).square()).sum(1)


def _checked(values: Tensor, weights: Tensor | None, levels: int) -> Tensor:
    if values.ndim != 2 or not values.numel() or levels < 1:
        raise FewbitsError(f"k-means: needs blocks [n, values] and at least one level, got {tuple(values.shape)}")
    if weights is None:
        weights = torch.ones_like(values)
    if weights.shape != values.shape:
        raise FewbitsError(f"k-means: weights {tuple(weights.shape)} for values {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()) or not bool((weights >= 0).all() & torch.isfinite(weights).all()):
        raise FewbitsError("k-means: needs finite values, and finite weights that are not negative")
    # relative to the largest, so that running sums of tiny weights (squared gradients) keep their digits
    largest = weights.amax(1, keepdim=True).double()
    return torch.where(largest > 0, weights.double() / largest.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def _plus_plus(line: Line, draws: Tensor) -> Tensor:
    """Greedy k-means++ starts [n, levels], ascending. `draws` [n, levels, tries] are uniform numbers in [0, 1).

    A center is drawn by weight times squared distance to the nearest one so far; of `tries` the best is taken. Where
    all weighted values are met already, values without weight are drawn by distance alone.
    """
    x, w = line.x, line.w
    levels = draws.shape[1]
    centers = _draw(line.w, draws[:, 0, :1]).squeeze(1)
    chosen = [x.gather(1, centers[:, None]).squeeze(1)]
    distance = (x - chosen[0][:, None]).square()
    for number in range(1, levels):
        potential = w * distance
        met = potential.sum(1, keepdim=True) <= 0
        potential = torch.where(met, distance, potential)
        tried = x.gather(1, _draw(potential, draws[:, number]))
        nearer = torch.minimum(distance[:, None], (x[:, None] - tried[:, :, None]).square())
        left = (torch.where(met, 1.0, w)[:, None] * nearer).sum(2)
        best = left.argmin(1, keepdim=True)
        chosen.append(tried.gather(1, best).squeeze(1))
        distance = nearer.gather(1, best[:, :, None].expand(-1, 1, x.shape[1])).squeeze(1)
    return torch.stack(chosen, 1).sort(dim=1).values


def _draw(chances: Tensor, uniform: Tensor) -> Tensor:
    """Places [n, draws] drawn with probabilities proportional to `chances` [n, m]; place 0 where all are zero."""
    total = chances.cumsum(1)
    place = torch.searchsorted(total, uniform * total[:, -1:], right=True)
    return place.clamp_max(chances.shape[1] - 1) * (total[:, -1:] > 0)


def _lloyd(line: Line, centers: Tensor, iterations: int) -> Tensor:
    """Centers [n, levels] after at most `iterations` rounds; a center without members stays where it is."""
    edges = None
    for _ in range(iterations):
        new = _edges(line.x, centers)
        if edges is not None and torch.equal(new, edges):
            break
        edges = new
        centers = line.means(edges, centers)
    return centers


def _edges(x: Tensor, centers: Tensor) -> Tensor:
    """[n, levels + 1]: where the members of every center start; a value halfway belongs to the lower center."""
    middle = (centers[:, 1:] + centers[:, :-1]) / 2
    inner = torch.searchsorted(x, middle, right=True)
    first = inner.new_zeros(len(x), 1)
    return torch.cat([first, inner, first + x.shape[1]], 1)


def _objective(line: Line, centers: Tensor) -> Tensor:
    return inertia(line.x, line.w, centers)


@ranges.register
@dataclass(frozen=True)
class KMeans(Range):
    """Levels of a free table by k-means; see `kmeans`. `fit` weighs all values alike, `fit_weighted` as told."""

    kind: ClassVar[str] = "kmeans"
    solver: Literal["lloyd", "exact"] = "lloyd"
    iterations: int = 50
    starts: int = 1
    uniform_start: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in ("lloyd", "exact"):
            raise FewbitsError(f"k-means range: solver={self.solver!r}; choose lloyd or exact")
        if self.iterations < 1 or self.starts < 1:
            raise FewbitsError("k-means range: iterations and starts must be at least 1")

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        return {"table": self._centers(blocks, None, fmt).T.contiguous()}

    def fit_weighted(self, x: Tensor, weights: Tensor, fmt: Format, gran: Granularity) -> Params:
        """Parameters of `gran`'s param shape; `weights` (not negative) has the shape of `x`."""
        parts = zip(gran.blocks(x.detach().float()), gran.blocks(weights.detach()), strict=True)
        found = [self._centers(values, weight, fmt).T for values, weight in parts]
        return {"table": gran.assemble(found, x.shape)}

    def _centers(self, values: Tensor, weights: Tensor | None, fmt: Format) -> Tensor:
        if not isinstance(fmt, Codebook) or fmt.points is not None:
            raise FewbitsError(f"k-means fills free codebooks, not {fmt.kind} grids")
        return kmeans(
            values,
            weights,
            fmt.levels,
            solver=self.solver,
            iterations=self.iterations,
            starts=self.starts,
            uniform_start=self.uniform_start,
            generator=torch.Generator().manual_seed(self.seed),
        )
