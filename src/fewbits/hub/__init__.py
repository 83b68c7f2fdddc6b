"""Model and data references in, quantized checkpoints in and out.

`models.load_model` and `data.load_data` turn a reference into something to quantize or measure. Every model comes
through its own library's loader; nothing here knows an architecture by name.
"""
