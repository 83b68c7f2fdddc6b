"""How exactly Hessians are added up, and what that does to GPTQ: against float64, on one machine.

    python benchmarks/hessians.py --device cuda

Inputs are random, correlated, with channels of very different size. For each way of multiplying: relative error of the
Hessian, and the solver's loss (in float64, by the exact Hessian) over that of a solve wholly in float64. What
`rounding.hessian` does on a GPU is bfloat16 for 16-bit inputs and bf16x3 for others. `--columns 256 --tokens 4096
--device cpu` is a try without a GPU, where TF32 and bfloat16 products are emulated by rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.formats import gptq_grid
from fewbits.ranges import MinMax
from fewbits.rounding.gptq import gptq
from fewbits.rounding.precision import full_float32, tensor_core_float32

BATCH, BITS, GROUP = 8192, 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=65536)
    options = parser.parse_args()
    device, columns = torch.device(options.device), options.columns
    torch.manual_seed(0)
    channels = torch.exp(torch.randn(columns, device=device) * 1.2)
    mix = torch.randn(columns // 8, columns, device=device) / 10
    weight = torch.randn(options.outputs, columns, device=device) * 0.02

    def batches(dtype: torch.dtype) -> list[Tensor]:
        made = []
        for seed in range(max(options.tokens // BATCH, 1)):
            draw = torch.Generator(device).manual_seed(seed)
            rows = min(BATCH, options.tokens)
            alone = torch.randn(rows, columns, device=device, generator=draw)
            shared = torch.randn(rows, columns // 8, device=device, generator=draw) @ mix
            made.append(((alone + shared) * channels).to(dtype))
        return made

    def solved(hessian: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
        found = gptq(weight, hessian, gptq_grid(BITS), MinMax(), group_size=GROUP, dtype=dtype)
        change = found.weight.double() - weight
        return float(((change @ exact) * change).sum())

    print(f"{options.tokens} tokens, {columns} columns, {options.outputs} outputs, W{BITS}g{GROUP}, {device}")
    for dtype in (torch.bfloat16, torch.float32):
        data = batches(dtype)
        exact = total(data, lambda x: x.double().T @ x.double())
        best = solved(exact, exact, torch.float64)
        for name, gram in WAYS.items():
            if name == "bf16" and dtype == torch.float32:
                continue  # it would round the inputs themselves
            found = total(data, gram)
            error = float((found.double() - exact).norm() / exact.norm())
            loss = solved(found.float(), exact, torch.float32) / best
            print(f"{str(dtype).removeprefix('torch.'):9} {name:7} error of H {error:.1e}, loss {loss:.4f}")


def total(data: list[Tensor], gram: Callable[[Tensor], Tensor]) -> Tensor:
    first, *rest = data
    found = gram(first)
    for batch in rest:
        found += gram(batch)
    return found


def product(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right of 16-bit numbers, added in float32."""
    if left.is_cuda:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.float().T @ right.float()


def float32(x: Tensor) -> Tensor:
    with full_float32(x.device):
        return x.float().T @ x.float()


def tf32(x: Tensor) -> Tensor:
    x = x.float()
    if x.is_cuda:
        with tensor_core_float32(x.device):
            return x.T @ x
    low = (x.view(torch.int32) + 0x1000) & ~0x1FFF  # ten bits behind the point, half away from zero
    return low.view(torch.float32).T @ low.view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    return product(x.bfloat16(), x.bfloat16())


def bf16x3(x: Tensor) -> Tensor:
    high = x.bfloat16()
    low = (x - high).bfloat16()
    return product(torch.cat([high, high, low]), torch.cat([high, low, high]))


WAYS: dict[str, Callable[[Tensor], Tensor]] = {"float32": float32, "tf32": tf32, "bf16": bf16, "bf16x3": bf16x3}

if __name__ == "__main__":
    main()
