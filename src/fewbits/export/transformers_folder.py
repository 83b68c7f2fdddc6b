"""A folder as `from_pretrained` of transformers reads it, with some weights in a form of their own.

The library itself writes it: configuration, generation settings, safetensors (in parts where they are large, tied
weights once, under the names of the model's published form), tokenizer.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.export.base import Subject
from fewbits.export.comparison import answers, compared, insist
from fewbits.export.layers import unquantized_state
from fewbits.export.linears import HALF_TOLERANCE
from fewbits.hub.adapters.transformers import quiet
from fewbits.hub.loaded import dtype_name, dtype_of, loading
from fewbits.hub.output import write_json
from fewbits.hub.requires import require


def write_folder(
    subject: Subject, folder: Path, replaced: dict[str, Tensor], config: dict[str, Any] | None, dtype: torch.dtype
) -> None:
    """Fill `folder`.

    replaced: what stands in place of the quantized weights, by the names of the files. config: `quantization_config`.
    dtype: of everything in floating point but `replaced`.
    """
    transformers = require("transformers", "this export")
    model: Any = subject.loaded.model
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in unquantized_state(subject.attachment, subject.layers).items()
    }
    before = model.config.dtype
    try:
        with quiet(transformers):
            model.save_pretrained(folder, state_dict={**state, **replaced})
            if subject.loaded.tokenizer is not None:
                subject.loaded.tokenizer.save_pretrained(folder)
    except (ValueError, RuntimeError) as error:
        raise FewbitsError(f"transformers cannot write this model: {str(error)[:300]}") from error
    finally:
        model.config.dtype = before
    file = folder / "config.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    described["dtype"] = dtype_name(dtype)
    if config is not None:
        described["quantization_config"] = config
    write_json(file, described)


def read_folder(subject: Subject, folder: Path, **more: Any) -> nn.Module:
    """The model of a folder through `from_pretrained`, in the type that the simulation computes in.

    more: further arguments of `from_pretrained`.

    Raises `FewbitsError` where the library cannot load it or finds tensors missing.
    """
    transformers = require("transformers", "this export")
    model_class: Any = type(subject.loaded.model)
    with (
        loading(f"the export in {folder.name}"),
        quiet(transformers),
        redirect_stderr(io.StringIO()),  # some loaders show progress whatever they are told
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)  # that the configuration comes from the folder
        model, info = model_class.from_pretrained(
            folder,
            dtype=subject.loaded.dtype,
            attn_implementation=subject.loaded.model.config._attn_implementation,  # type: ignore[union-attr]
            use_safetensors=True,
            output_loading_info=True,
            **more,
        )
    _whole(info)
    return model.eval()


def dense_folder(
    subject: Subject, folder: Path, decode: Callable[[dict[str, Any], str, dict[str, Tensor]], Tensor | None]
) -> nn.Module:
    """The model of a folder, in floating point, for formats whose own loaders need a GPU.

    decode: (`quantization_config`, module, the tensors of that module by their last name) -> the module's weight
    [out, in], or None where its tensors are what they say.
    """
    transformers = require("transformers", "this export")
    config = transformers.AutoConfig.from_pretrained(folder)
    described = dict(config.quantization_config)
    del config.quantization_config
    modules: dict[str, dict[str, Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            module, _, last = name.rpartition(".")
            modules.setdefault(module, {})[last] = value
    state: dict[str, Tensor] = {}
    for module, held in modules.items():
        weight = decode(described, module, dict(held))
        if weight is not None:
            held = {"weight": weight} | ({"bias": held["bias"]} if "bias" in held else {})
        state |= {f"{module}.{last}" if module else last: value for last, value in held.items()}
    config._attn_implementation = subject.loaded.model.config._attn_implementation  # type: ignore[union-attr]
    model_class: Any = type(subject.loaded.model)
    with loading(f"the export in {folder.name}"), quiet(transformers):
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=subject.loaded.dtype, output_loading_info=True
        )
    _whole(info)
    return model.eval()


def check_dense(
    subject: Subject,
    folder: Path,
    decode: Callable[[dict[str, Any], str, dict[str, Tensor]], Tensor | None],
    package: str,
    part: str,
) -> list[dict[str, Any]]:
    """`Target.check` of a folder that `dense_folder` reads; `part` of `package` is what decodes its weights."""
    runtime = f"{package} {version(package)} ({part}), transformers {version('transformers')}"
    model = dense_folder(subject, folder, decode)
    batches = subject.inputs()
    entry = compared(runtime, answers(subject.loaded.model, batches), answers(model, batches))
    insist(entry, HALF_TOLERANCE)
    return [entry]


def _whole(info: dict[str, Any]) -> None:
    lacking = sorted(map(str, (*(info.get("missing_keys") or ()), *(info.get("unexpected_keys") or ()))))
    if lacking:
        raise FewbitsError(f"transformers does not find its way in the export: {', '.join(lacking[:3])}")


def chosen_dtype(subject: Subject, option: str | None) -> torch.dtype:
    """The type that the `dtype` option names; by default the model's own."""
    return subject.loaded.dtype if option is None else dtype_of(str(option))
