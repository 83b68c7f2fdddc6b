"""Packed weights and the code that multiplies with them."""
