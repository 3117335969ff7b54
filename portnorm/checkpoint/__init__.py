"""Checkpoints: arrays and JSON, never code. `safetensors.py` is the container, `layers.py` what portnorm puts into it."""
