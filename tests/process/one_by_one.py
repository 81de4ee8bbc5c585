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
    files = [tempfile.TemporaryFile("w+b") for _ in range(2)]
    kept = [os.dup(1), os.dup(2)]
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
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
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode())
    return {"code": code, "out": texts[0], "err": texts[1]}


if __name__ == "__main__":
    module = importlib.import_module(f"{sys.argv[1]}.__main__")
    print(json.dumps([run(module.main, argv) for argv in json.loads(sys.argv[2])]))
