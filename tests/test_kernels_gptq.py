"""The column solver's fused block against the solver's own loop, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fewbits.formats import affine, gptq_grid, symmetric
from fewbits.ranges import MinMax

pytest.importorskip("triton")
solver = importlib.import_module("fewbits.rounding.gptq")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("shape", "fmt", "options"),
    [
        ((5, 24), gptq_grid(4), {}),
        ((33, 40), symmetric(3), {"block_size": 16}),
        ((7, 37), affine(2), {"group_size": 8, "block_size": 16}),
        ((7, 37), gptq_grid(4), {"group_size": 8, "block_size": 16, "act_order": True}),
        ((6, 32), gptq_grid(4), {"group_size": 8, "static_groups": True, "act_order": True, "block_size": 8}),
        ((6, 32), gptq_grid(3), {"group_size": 16, "stale_groups": False, "block_size": 16}),
        ((6, 32), gptq_grid(3), {"group_size": 4, "stale_groups": False, "block_size": 16}),
        ((3, 5, 12), gptq_grid(4), {"block_size": 8}),
    ],
)
def test_fused_blocks_give_the_codes_of_the_loop(
    shape: tuple[int, ...], fmt: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=generator).to(DEVICE)
    x = torch.randn(*shape[:-2], 200, shape[-1], generator=generator).to(DEVICE)
    h = 2 * x.transpose(-1, -2) @ x / 200
    kept = torch.tensor([3]) if options.get("act_order") else None
    monkeypatch.setattr(solver, "fuses", lambda fmt, w: False)
    plain = solver.gptq(w, h, fmt, MinMax(), kept=kept, **options)
    calls = []
    launch = importlib.import_module("fewbits.kernels.triton_gptq").solve_block

    def counted(*args: Any) -> Any:
        calls.append(args[0].shape)
        return launch(*args)

    monkeypatch.setattr("fewbits.kernels.triton_gptq.solve_block", counted)
    monkeypatch.setattr(solver, "fuses", lambda fmt, w: True)
    fused = solver.gptq(w, h, fmt, MinMax(), kept=kept, **options)
    blocks = -(-(shape[-1] - (kept is not None)) // options.get("block_size", 128))
    fitted_inside = not options.get("stale_groups", True) and options["group_size"] < options["block_size"]
    assert len(calls) == (0 if fitted_inside else blocks)
    assert torch.equal(fused.codes, plain.codes) and fused.codes.dtype == plain.codes.dtype
    torch.testing.assert_close(fused.weight, plain.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-3, atol=1e-5)
    assert fused.group_index is None or torch.equal(fused.group_index, plain.group_index)


def test_only_plain_uniform_float32_weights_on_a_gpu_are_fused() -> None:
    from fewbits.formats import Ternary, Uniform

    here = torch.zeros(2, 2)
    assert not solver.fuses(affine(4), here)  # on the CPU the loop over columns is as fast
    if DEVICE == "cuda":
        there = here.cuda()
        assert solver.fuses(affine(4), there)
        assert not solver.fuses(affine(4), there.double()) and not solver.fuses(Ternary(), there)
        assert not solver.fuses(Uniform(rounding="half_away"), there)
