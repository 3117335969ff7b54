"""ONNX export: the definitions of portnorm run on symbolic arrays, and every graph is checked before it is handed over."""
