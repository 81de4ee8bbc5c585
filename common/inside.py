"""Whether a file of a directory really lies in it: a link must not bring in what is elsewhere.

Whoever unpacks an archive that another packed gets its links too. A store is given away in its turn, so
nothing is copied into one, or read as a part of one, that was not in the directory that the user named.
"""

from __future__ import annotations

import os
from pathlib import Path


def leads_outside(directory: Path, file: Path) -> str | None:
    """Where `file`, of this directory, really lies, if that is outside; None if it is inside.

    A download cache of Hugging Face keeps a model's files in `blobs`, beside `snapshots`, where each
    revision is a directory of links to them: that counts as inside.
    """
    root, real = os.path.realpath(directory), os.path.realpath(file)
    allowed = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    return None if any(real.startswith(place + os.sep) for place in allowed) else real
