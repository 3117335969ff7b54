"""The process that `apart.py` starts: measures what it is told on standard input, and says each thing on a line of standard output.

{"at": "torch / layer_norm / normal / float32"}    before each case
{"result": {...}}                                  a `Result`
{"end": true}                                      when all is measured
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from portnorm.conform.modules import load_modules
from portnorm.conform.runner import measure


def main() -> None:
    """What libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)

        def say(**what: Any) -> None:
            channel.write(json.dumps(what) + "\n")
            channel.flush()

        asked = json.loads(sys.stdin.readline())
        load_modules(asked.pop("modules"))
        for result in measure(**asked, progress=lambda text: say(at=text)):
            say(result=result.to_dict())
        say(end=True)


if __name__ == "__main__":
    main()
