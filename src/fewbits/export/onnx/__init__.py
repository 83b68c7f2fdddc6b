"""ONNX files with QuantizeLinear and DequantizeLinear around quantized ops, for onnxruntime and OpenVINO.

`trace` runs the model's forward once with a mark in place of every quantizer and turns it into an ONNX graph; `rewrite`
puts integers where the marks are (`weights` lays them out); `cached` is one step of a language model's generation.
`runtimes` and `check` run the file and compare, `codes` at every quantizer.
"""
