"""Quantized checkpoints in the formats of other runtimes, one file per target.

    fewbits.export_reference("opt-w4", to="compressed-tensors", out="opt-w4-ct")

A target says what it cannot hold before anything is written (`obstacles`), writes, and reloads what it wrote in the
runtime that will run it (`check`).
"""
