"""compressed-tensors: folders that vLLM runs and transformers loads.

Weights: integers of 8 bits as int8 where the input is quantized too (`int-quantized`; so are 4-bit ones), packed into
int32 words where only weights are (`pack-quantized`, 2 to 8 bits, with or without zero points, per row or group), 8-bit
floats as such. Inputs: int8 or float8, per tensor with stored parameters or per token on every call.

Two runtimes read this, and they differ in one number. vLLM's int8 kernels take absmax / 127 as a token's step, which is
what the simulation does; transformers computes with 2 absmax / 255. In transformers, inputs that are not of three axes
(batch, token, feature) get one step for the tensor; in vLLM every row has its own. Both use code -128 where a value
lies below the range. `check` runs transformers. It first gives the simulation transformers' rules, demands the same
answers, and then reports the difference from the simulation as it is.

transformers allocates the zero points of packed weights in a wrong shape (compressed-tensors 0.20, weights on the meta
device), so asymmetric packed folders are loaded there with `CompressedTensorsConfig(dequantize=True)`; it decodes all
layers by one scheme then, for which reason such layers stand alone. vLLM reads them as they are.

Source of the layout: compressed-tensors 0.20 (classes, packing) and vLLM's
`model_executor/layers/quantization/compressed_tensors`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.export.base import Obstacle, Subject, Target
from fewbits.export.comparison import answers, compared, insist
from fewbits.export.layers import Layer
from fewbits.export.linears import group_of, linears, stored, unfit
from fewbits.export.transformers_folder import chosen_dtype, read_folder, write_folder
from fewbits.formats import Float8, PerTensor, Uniform
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.recipe import QSpec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

#: Of the largest answer. By transformers' own rule the arithmetic is the same, operation for operation.
TOLERANCE = 1e-4
_LOAD_DENSE = "from_pretrained(FOLDER, quantization_config=CompressedTensorsConfig(dequantize=True))"


class Export(Target):
    """`dtype`: of scales and of everything that stays in floating point; by default the model's."""

    name = "compressed-tensors"
    about = "compressed-tensors folders for vLLM and transformers"
    profile_name = "compressed-tensors"
    packages = ("transformers", "compressed_tensors")
    kinds = ("transformers",)

    def obstacles(self, subject: Subject) -> list[Obstacle]:
        found = super().obstacles(subject)
        if found:
            return found
        found = unfit(subject, self.name)
        for layer in subject.layers:
            if layer.input is not None:
                site, quantizer = layer.input
                if quantizer.spec.format.kind != layer.quantizer.spec.format.kind:
                    found.append(Obstacle(site.name, f"{self.name} has no kernel for this input with that weight"))
        if found or not _asymmetric(subject):
            return found
        first = scheme_of(subject.layers[0])
        return [
            Obstacle(layer.site.name, "weights with zero points are packed by one scheme for all layers, or by none")
            for layer in subject.layers
            if scheme_of(layer) != first
        ]

    def write(self, subject: Subject, folder: Path, *, dtype: str | None = None) -> dict[str, Any]:  # type: ignore[override]
        import compressed_tensors

        kept = chosen_dtype(subject, dtype)
        groups: dict[str, tuple[QuantizationScheme, list[str]]] = {}
        replaced: dict[str, Tensor] = {}
        worst = 0.0
        for layer in subject.layers:
            scheme = scheme_of(layer)
            groups.setdefault(scheme.model_dump_json(), (scheme, []))[1].append(layer.module)
            made, change = _tensors(layer, scheme, kept)
            replaced |= {f"{layer.module}.{name}": value for name, value in made.items()}
            worst = max(worst, change)
        config = _config(subject, list(groups.values()), compressed_tensors.__version__)
        write_folder(subject, folder, replaced, config, kept)
        return {
            "format": config["format"],
            "dtype": str(kept).removeprefix("torch."),
            "layers": len(subject.layers),
            "config_groups": len(groups),
            "scale_change": worst,
            "transformers": _LOAD_DENSE if _asymmetric(subject) else "from_pretrained(FOLDER)",
        }

    def check(self, subject: Subject, folder: Path) -> list[dict[str, Any]]:
        import compressed_tensors
        import transformers

        runtime = f"transformers {transformers.__version__} with compressed-tensors {compressed_tensors.__version__}"
        dense = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
        batches = subject.inputs()
        model = read_folder(subject, folder, **(dense if _asymmetric(subject) else {}))
        with redirect_stderr(io.StringIO()):  # the first answer decompresses the weights and shows its progress
            found = answers(model, batches)
        change = _weight_change(subject, model)
        with transformers_rules(subject):
            same_rule = compared(runtime, answers(subject.loaded.model, batches), found)
        # weights rounded to half precision move the answers, and codes of quantized inputs after them
        insist(same_rule, TOLERANCE if change == 0 else 0.1)
        entry = compared(runtime, answers(subject.loaded.model, batches), found)
        return [{**entry, "difference_by_its_rule": same_rule["difference"], "weight_change": change}]


def _asymmetric(subject: Subject) -> bool:
    """Whether weights are packed with zero points."""
    return any(layer.input is None and not _symmetric(layer.quantizer.spec) for layer in subject.layers)


def _symmetric(spec: QSpec) -> bool:
    return not isinstance(spec.format, Uniform) or spec.format.zero_point in ("none", "middle")


def scheme_of(layer: Layer) -> QuantizationScheme:
    """How a layer is described, without its targets."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme

    inputs = None
    if layer.input is not None:
        inputs = _arguments(layer.input[1].spec, layer.input[1].spec.granularity.kind)
    kind = layer.quantizer.spec.granularity.kind
    if kind == "group" and group_of(layer) == -1:
        kind = "channel"
    if kind == "tensor" and (inputs is None or layer.quantizer.spec.format.bits != 8):
        kind = "channel"  # kernels for these want a scale a row
    weights = _arguments(layer.quantizer.spec, kind)
    scheme = QuantizationScheme(targets=[], weights=weights, input_activations=inputs)
    scheme.format = infer_module_format(nn.Linear, scheme)
    return scheme


def _arguments(spec: QSpec, strategy: str) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=spec.format.bits,
        type="float" if isinstance(spec.format, Float8) else "int",
        symmetric=_symmetric(spec),
        strategy=strategy,
        group_size=getattr(spec.granularity, "size", None) if strategy == "group" else None,
        dynamic=spec.dynamic,
    )


def _tensors(layer: Layer, scheme: QuantizationScheme, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """What stands in the files for a layer's weight and input, and the largest relative change of its scales."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weights = scheme.weights
    assert weights is not None
    made: dict[str, Tensor] = {}
    fmt = layer.quantizer.spec.format
    if isinstance(fmt, Float8):
        scale = fmt.scale_of(layer.quantizer.params).reshape(-1, 1).cpu()
        made["weight"] = layer.codes.to(torch.uint8).view(fmt.dtype)
    else:
        codes, zero = layer.signed()
        scale, zero = layer.scales()[0].cpu(), zero.cpu().to(torch.int8)
        if scheme.format == "pack-quantized":
            made["weight_packed"] = pack_to_int32(codes, weights.num_bits)
            made["weight_shape"] = torch.tensor(codes.shape)
            if not weights.symmetric:
                made["weight_zero_point"] = pack_to_int32(zero, weights.num_bits, packed_dim=0)
        else:
            made["weight"] = codes
    if weights.strategy == "tensor":
        scale = scale.flatten()[:1]
    elif len(scale) == 1:
        scale = scale.expand(len(layer.codes), 1)
    made["weight_scale"], change = stored(layer, scale, dtype)
    if layer.input is not None and not layer.input[1].spec.dynamic:
        made |= _input_tensors(*layer.input, dtype)
    return {name: value.contiguous() for name, value in made.items()}, change


def _input_tensors(site: Site, quantizer: Quantizer, dtype: torch.dtype) -> dict[str, Tensor]:
    fmt, params = quantizer.spec.format, quantizer.params
    scale = fmt.scale_of(params).reshape(1).cpu()
    kept = scale.to(dtype)
    if not bool(torch.isfinite(kept).all()) or not bool(kept > 0):
        raise FewbitsError(f"{site.name}: its scale {float(scale):.3g} does not fit {dtype}; export with dtype=float32")
    made = {"input_scale": kept}
    if isinstance(fmt, Uniform) and not _symmetric(quantizer.spec):
        shift = 0 if fmt.signed else 2 ** (fmt.bits - 1)
        made["input_zero_point"] = (params["zero_point"].reshape(1).cpu() - shift).to(torch.int8)
    return made


def _config(subject: Subject, groups: list[tuple[QuantizationScheme, list[str]]], version: str) -> dict[str, Any]:
    """`quantization_config` as vLLM and transformers read it."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    quantized = {name for _, names in groups for name in names}
    for scheme, names in groups:
        # one group covers every linear module that is not ignored; several are told apart by name
        scheme.targets = ["Linear"] if len(groups) == 1 else names
    formats = {str(getattr(scheme.format, "value", scheme.format)) for scheme, _ in groups}
    config = QuantizationConfig(
        config_groups={f"group_{index}": scheme for index, (scheme, _) in enumerate(groups)},
        quant_method="compressed-tensors",
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=None,
        global_compression_ratio=None,
        ignore=[name for name in linears(subject.loaded.model) if name not in quantized],
    )
    return {"version": version, "sparsity_config": {}, "transform_config": {}, **config.model_dump(mode="json")}


def _weight_change(subject: Subject, model: nn.Module) -> float:
    """The largest difference between weights that were read back and those that the simulation runs, over the scale."""
    worst = 0.0
    for layer in subject.layers:
        expected = layer.values().cpu()
        read: Any = model.get_submodule(layer.module).weight
        found = read.detach().float().cpu()
        worst = max(worst, float((found - expected.to(read.dtype)).abs().max() / expected.abs().max().clamp_min(1e-30)))
    return worst


@contextmanager
def transformers_rules(subject: Subject) -> Iterator[None]:
    """The simulation with transformers' rules for quantized inputs while the context lasts."""
    attachment = subject.attachment
    before = [(site, quantizer) for site, quantizer in attachment.items() if site.role == "input"]
    try:
        for site, quantizer in before:
            attachment.set_quantizer(site.name, _by_rule(site, quantizer))
        yield
    finally:
        for site, quantizer in before:
            attachment.set_quantizer(site.name, quantizer)


def _by_rule(site: Site, quantizer: Quantizer) -> Quantizer:
    spec, params = quantizer.spec, dict(quantizer.params) if quantizer.ready else {}
    fmt, fine = spec.format, spec.granularity
    if spec.dynamic and len(site.shape) != 3:
        fine = PerTensor()
    if isinstance(fmt, Uniform):
        if not fmt.signed and "zero_point" in params:
            params["zero_point"] = params["zero_point"] - 2 ** (fmt.bits - 1)
        if _symmetric(spec):
            params.pop("zero_point", None)
            fmt = dataclasses.replace(fmt, zero_point="none", step="span", symmetric=True)
        fmt = dataclasses.replace(fmt, signed=True, narrow=False, order="shift_then_round")
    made = Quantizer(dataclasses.replace(spec, format=fmt, granularity=fine), quantizer.name)
    if params:
        made.set_params(params)
    return made
