"""Time a model in floating point, pack it, time it again, and say what came of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.hub.references import check_model_ref

if TYPE_CHECKING:
    from fewbits.hub.loaded import LoadedModel

#: Speed-ups below this are noise: they are called no gain.
GAIN = 1.05


def speed_reference(
    model: str | Path,
    *,
    bits: str = "W4A16g128",
    device: str = "cpu",
    dtype: str | None = None,
    batch: int = 1,
    seqlen: int | None = None,
    kernel: str = "auto",
    code_module: str | None = None,
) -> dict[str, Any]:
    """Float against packed for a checkpoint of fewbits, or for any model after rounding its weights to nearest.

    Args:
        model: reference; see `fewbits.hub.models`. For one that is not a checkpoint, `bits` says what its weights (and
            activations, dynamically per token) are rounded to: speed does not depend on the method.
        dtype: of the float model; by default float32 on a CPU and bfloat16 on a GPU. A checkpoint keeps its own.
        batch: samples at once. seqlen: tokens of the prompt, for language models.
        kernel: see `fewbits.pack`.

    Returns:
        JSON-able; see `compare`. Raises `FewbitsError` for bad input, before anything is measured.
    """
    if batch < 1:
        raise FewbitsError(f"--batch {batch}: at least 1 is needed")
    parsed = check_model_ref(model, code_module)
    from fewbits.hub.loaded import dtype_of
    from fewbits.hub.models import check_device, load_model
    from fewbits.kernels.choose import check_name
    from fewbits.recipe import Bits

    check_name(kernel)
    wanted = Bits.parse(bits)
    target = check_device(device)
    loaded = load_model(
        model,
        dtype=dtype_of(dtype or ("float32" if target.type == "cpu" else "bfloat16")),
        device=device,
        code_module=code_module,
    )
    notes = []
    if parsed.kind != "fewbits":
        _round(loaded, wanted)
        notes.append(f"weights rounded to nearest at {wanted} for this comparison; speed does not depend on the method")
    report = compare(loaded, batch=batch, seqlen=seqlen, kernel=kernel)
    return {"model": str(model), **report, "notes": [*notes, *report["notes"]]}


def _round(loaded: LoadedModel, bits: Any) -> None:
    """Put round-to-nearest codes at the weights of linear layers, without the engine's copies."""
    from fewbits.api import quantize
    from fewbits.formats import affine
    from fewbits.papers.common import HEAD, token_rules, weight_rules
    from fewbits.ranges import MinMax
    from fewbits.recipe import Calibration, Recipe, Scheme, Step
    from fewbits.steps.calibrate import CalibrateActivations
    from fewbits.steps.nearest import RoundNearest

    if bits.weight is None:
        raise FewbitsError(f"bits {bits}: there is nothing to pack where weights stay floating point")
    weights = weight_rules(bits, affine(bits.weight), MinMax(), without=HEAD)
    scheme = Scheme(weights, token_rules(bits, without=HEAD))
    example = loaded.example_batch(1)
    steps: tuple[Step, ...] = (RoundNearest(),)
    data = []
    if bits.activation is not None:
        steps, data = (CalibrateActivations(), *steps), [example]
    recipe = Recipe("rtn", bits, scheme, steps, Calibration(samples=1))
    loaded.model = quantize(loaded.model, recipe, data, example=example, device=str(loaded.device)).model


def compare(loaded: LoadedModel, *, batch: int = 1, seqlen: int | None = None, kernel: str = "auto") -> dict[str, Any]:
    """Measure a model with quantizers attached in floating point, pack it in place, and measure it packed.

    Returns:
        JSON-able: device, dtype, batch, machine (`machine.Machine`), phases (each: name, float_ms, packed_ms, speedup,
        gain, bytes and fractions of the machine's limits, float and packed), weights (bytes, and whether they exceed
        the cache), memory, layers (`fewbits.packed.PackedLayer`), skipped, kernels, verdict, notes.
    """
    from fewbits.attach import attachment_of
    from fewbits.packed import pack
    from fewbits.speed.machine import measure
    from fewbits.speed.phases import phases

    model = loaded.model.eval()
    device, dtype = loaded.device, loaded.dtype
    attachment = attachment_of(model)
    if attachment is None:
        raise FewbitsError(f"{loaded.ref}: no quantizers are attached, so there is nothing to pack")
    asked = phases(loaded, batch, seqlen)
    machine = measure(device, dtype)
    attachment.remove()  # the float model, without so much as a hook
    before = {phase.name: phase.time(model, device) for phase in asked}
    flops = {phase.name: _flops(model, phase) for phase in asked}
    weights_float, memory_float = weight_bytes(model), _peak(model, asked, device)
    attachment.install(attachment.model)
    rows = min(phase.rows for phase in asked)
    packed = pack(model, kernel=kernel, rows=rows)
    for phase in asked:
        getattr(phase.run, "forget", lambda: None)()
    after = {phase.name: phase.time(model, device) for phase in asked}
    weights_packed, memory_packed = weight_bytes(model), _peak(model, asked, device)
    found = []
    for phase in asked:
        times = before[phase.name], after[phase.name]
        found.append(
            {
                "phase": phase.name,
                "rows": phase.rows,
                "float_ms": times[0],
                "packed_ms": times[1],
                "speedup": times[0] / times[1],
                "gain": times[0] / times[1] >= GAIN,
                "flops": flops[phase.name],
                **_fractions("float", times[0], weights_float, flops[phase.name], machine),
                **_fractions("packed", times[1], weights_packed, flops[phase.name], machine),
            }
        )
    layers = packed.layers.values()
    simulated = attachment_of(model) is not None or any("in simulation" in layer.note for layer in layers)
    notes = [packed.sharing()] if packed.shared else []
    if simulated:
        notes.append("some activation quantizers go on in simulation, which costs time a deployed model does not spend")
    cache = machine.cache
    return {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "machine": machine.to_dict(),
        "phases": found,
        "weights": {
            "float_bytes": weights_float,
            "packed_bytes": weights_packed,
            "float_exceed_cache": None if cache is None else weights_float > cache,
            "packed_exceed_cache": None if cache is None else weights_packed > cache,
        },
        "memory": {
            "float_bytes": packed.bytes_before,
            "packed_bytes": packed.bytes_after,
            "float_peak": memory_float,
            "packed_peak": memory_packed,
        },
        "kernels": dict(Counter(layer.kernel for layer in layers)),
        "layers": packed.to_dict()["layers"],
        "skipped": packed.skipped,
        "verdict": [_verdict(phase) for phase in found],
        "notes": notes,
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes that one forward reads of a model: all it holds but lookup tables, of which a few rows are read."""
    tables = {
        module.weight.untyped_storage().data_ptr()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not _also_multiplied(model, module)
    }
    seen = {}
    for held in (*model.parameters(), *model.buffers()):
        place = held.untyped_storage().data_ptr()
        if held.numel() and place not in tables:
            seen[place] = held.untyped_storage().nbytes()
    return sum(seen.values())


def _also_multiplied(model: nn.Module, table: nn.Embedding) -> bool:
    return any(
        isinstance(module, nn.Linear) and module.weight is table.weight
        for module in model.modules()
        if module is not table
    )


def _flops(model: nn.Module, phase: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        phase.run(model)
    return int(counter.get_total_flops())


def _peak(model: nn.Module, asked: list[Any], device: torch.device) -> int | None:
    """Bytes of the GPU at the most during a run; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        for phase in asked:
            phase.run(model)
    return int(torch.cuda.max_memory_allocated(device))


def _fractions(which: str, milliseconds: float, weights: int, flops: int, machine: Any) -> dict[str, float]:
    seconds = milliseconds / 1e3
    return {
        f"{which}_bytes_per_second": weights / seconds,
        f"{which}_of_bandwidth": weights / seconds / machine.copy,
        f"{which}_of_gemm": flops / seconds / machine.flops,
    }


def _verdict(phase: dict[str, Any]) -> str:
    factor = phase["speedup"]
    if phase["gain"]:
        return f"{phase['phase']}: packed is {factor:.2f} times as fast"
    if factor > 1 / GAIN:
        return f"{phase['phase']}: no gain in speed ({factor:.2f} times)"
    return f"{phase['phase']}: no gain in speed, packed is slower ({factor:.2f} times); it saves memory only"
