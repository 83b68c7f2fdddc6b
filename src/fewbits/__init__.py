"""fewbits: post-training quantization of PyTorch models."""
