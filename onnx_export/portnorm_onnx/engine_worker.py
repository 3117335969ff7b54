"""Runs models in a runtime that has an environment of its own: `python engine_worker.py NAME`, told what to do on its standard input.

That environment has NumPy, onnx and the runtime, and not portnorm; so the files that are needed are found beside this one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).parent
    spec = importlib.util.spec_from_file_location("portnorm_onnx", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    sys.modules["portnorm_onnx"] = importlib.util.module_from_spec(spec)

from portnorm_onnx.engines import LOADS
from portnorm_onnx.frames import answer


def main() -> None:
    """What a runtime prints goes to standard error."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        answer(sys.stdin.buffer, answers, LOADS[sys.argv[1]])


if __name__ == "__main__":
    main()
