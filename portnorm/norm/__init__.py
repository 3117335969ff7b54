"""One file per normalization; all of them are rows over the one core in `normalize.py`."""
