"""The runtimes that run ONNX files: one function each from a file to a function of arrays."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.errors import FewbitsError

#: x64 CPUs without VNNI add products of uint8 and int8 in 16 bits, which saturate. What the runtimes offer against it:
#: an option of onnxruntime's sessions, and a property of OpenVINO's CPU device that lets it compute in float32.
PRECISE = "session.x64quantprecision"
IN_FLOAT = "LP_TRANSFORMS_MODE"
#: Inputs by name -> outputs in the order of the file.
Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def input_shapes(file: Path) -> dict[str, list[int | str]]:
    """The sizes of every input of a file, in its order; those that may be any are given by their name."""
    import onnx

    def size(held: onnx.TensorShapeProto.Dimension) -> int | str:
        return held.dim_value if held.HasField("dim_value") else held.dim_param

    graph = onnx.load(str(file), load_external_data=False).graph
    return {item.name: [size(held) for held in item.type.tensor_type.shape.dim] for item in graph.input}


def threads() -> int:
    """As many as torch uses."""
    import torch

    return torch.get_num_threads()


def saturates() -> bool:
    """Whether this CPU's 8-bit products saturate, so that files are compared in the runtimes' precise modes."""
    import torch

    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_vnni_supported()


def onnxruntime(file: Path) -> Run:
    """CPU provider, all optimizations; precise products. Raises `FewbitsError` where it does not load the file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    if saturates():
        options.add_session_config_entry(PRECISE, "1")
    try:
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise FewbitsError(f"{file.name}: onnxruntime does not load it: {_short(error)}") from error
    taken = {item.name for item in session.get_inputs()}

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return session.run(None, {name: value for name, value in inputs.items() if name in taken})
        except Exception as error:
            raise FewbitsError(f"{file.name}: onnxruntime does not run it: {_short(error)}") from error

    return run


def openvino(file: Path) -> Run:
    """CPU device, float32 where nothing is quantized. Raises `FewbitsError` where it does not load the file."""
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    import openvino as ov

    core = ov.Core()
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads()}
    if saturates():
        settings[IN_FLOAT] = "NO"
    try:
        model = core.compile_model(core.read_model(str(file)), "CPU", settings)
    except Exception as error:
        raise FewbitsError(f"{file.name}: OpenVINO does not load it: {_short(error)}") from error
    taken = {name for port in model.inputs for name in port.names}
    request = model.create_infer_request()

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            found = request.infer({name: value for name, value in inputs.items() if name in taken})
        except Exception as error:
            raise FewbitsError(f"{file.name}: OpenVINO does not run it: {_short(error)}") from error
        return [np.array(found[port]) for port in model.outputs]

    return run


LOADERS: dict[str, Callable[[Path], Run]] = {"onnxruntime": onnxruntime, "openvino": openvino}


def installed() -> list[str]:
    """The runtimes that are there."""
    return [name for name in LOADERS if importlib.util.find_spec(name) is not None]


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__
