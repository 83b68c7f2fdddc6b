"""What each golden case of OWQ must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.formats import PerChannel
from fewbits.outliers.weak_columns import column_sensitivity, weakest_columns
from fewbits.papers.owq import owq_grid
from fewbits.ranges import AbsMax, JointSearch, MinMax, Range
from fewbits.rounding import HessianAccumulator, decode_columns, gptq, nearest
from golden_handlers_parts import close, objective


def _range(data: dict, num: int) -> Range:
    if data.get("mse", 1):
        return JointSearch(num=num)
    return AbsMax() if data["sym"] else MinMax()


def _zero(params: dict[str, Tensor]) -> Tensor:
    return params.get("zero_point", torch.zeros_like(params["scale"]))


def clip_search(data: dict) -> None:
    weight, fmt = data["W"], owq_grid(data["bits"], bool(data["sym"]))
    params = _range(data, data["num"]).fit(weight, fmt, PerChannel(0))
    rounded, _ = nearest(weight, fmt, PerChannel(0), params)
    ours, theirs = ((weight - q).abs().pow(2.4).mean(1) for q in (rounded, data["W_q"]))
    close(ours, theirs, rtol=1e-5, atol=1e-9)
    equal = (params["scale"] - data["scale"]).abs() <= 1e-6
    if not data["sym"]:
        equal &= _zero(params) == data["zero"]
    # elsewhere another candidate of the same error was taken
    assert float(equal.float().mean()) > 0.9
    close(rounded[equal.flatten()], data["W_q"][equal.flatten()], atol=1e-6)


def solver(data: dict) -> None:
    weight, inputs = data["W"], data["X"]
    accumulator = HessianAccumulator(weight.shape[1])
    for sequence in inputs:
        accumulator.add(sequence[None])
    hessian = accumulator.value
    close(hessian, data["H"], rtol=1e-5, atol=1e-5)
    fmt, rows = owq_grid(data["bits"], bool(data["sym"])), PerChannel(0)

    everything = _range(data, 40).fit(weight, fmt, rows)
    close(everything["scale"], data["rtn_scale"], atol=1e-6)
    if not data["sym"]:
        close(_zero(everything), data["rtn_zero"])
    rounded, _ = nearest(weight, fmt, rows, everything)
    close((weight - rounded).square().sum(0), data["frob_error"], rtol=1e-4, atol=1e-6)
    sensitivity = column_sensitivity(weight, rounded, hessian)
    close(sensitivity, data["sens"], rtol=1e-4, atol=1e-5)
    kept = weakest_columns(sensitivity, data["n_out"])
    assert torch.equal(kept.sort().values, data["out_ids"].long())

    group = None if data["groupsize"] < 0 else int(data["groupsize"])
    solution = gptq(
        weight,
        hessian,
        fmt,
        _range(data, 100 if group is None else 40),
        group_size=group,
        damping=data["percdamp"],
        act_order=bool(data["actorder"]),
        order_by=sensitivity,
        kept=kept,
    )
    near = (solution.weight - data["W_out"]).abs() <= 1e-4
    assert float(near.float().mean()) >= 0.995
    assert abs(objective(weight, solution.weight, hessian) / data["objective"] - 1) < 0.01
    scale, zero = solution.params["scale"], _zero(solution.params)
    close(scale[:, -1:], data["scale"], atol=1e-6)
    if not data["sym"]:
        close(zero[:, -1:], data["zero"])
    free = torch.ones(weight.shape[1], dtype=torch.bool)
    free[kept] = False
    decoded = decode_columns(fmt, solution.codes, solution.params, solution.group_index)
    assert torch.equal(decoded[:, free], solution.weight[:, free])
    assert not decoded[:, kept].any(), "what lies under a kept column contributes nothing"


HANDLERS = {"owq": {"clip_search": clip_search, "owq": solver, "gptq": solver}}
