"""``python -m tests.process.one_by_one MODULE ARGVS``: several command lines in one process.

Runs ``MODULE.__main__.main`` for each list in ARGVS, which is JSON, and prints as JSON what each
returned and wrote. Spares the seconds that importing torch and transformers takes each time.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from typing import Any


def run(main: Any, argv: list[str]) -> dict[str, Any]:
    """Call ``main`` with both output streams caught at their descriptors."""
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = main(argv)
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": out.read().decode(), "err": err.read().decode()}


if __name__ == "__main__":
    module = importlib.import_module(f"{sys.argv[1]}.__main__")
    print(json.dumps([run(module.main, argv) for argv in json.loads(sys.argv[2])]))
