"""Print held-out sums with their workings, a paragraph each: ``python -m demo.held_out > sums.txt``.

A text on which `bench.quality` can measure the demo model. Knows nothing of the model.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys

from demo import sums
from demo.tokenizer import END


def main() -> None:
    """Parse the command line, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sums", type=int, default=150)
    parser.add_argument("--trained", action="store_true", help="such as were trained on, instead")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader may leave
    seen: set[sums.Sum] = set()  # short sums would come again and again
    while len(seen) < args.sums:
        item = sums.draw(rng, held_out=not args.trained)
        if item in seen:
            continue
        seen.add(item)
        sys.stdout.write(f"{item.prompt}\n{item.working}{END}\n\n")


if __name__ == "__main__":
    main()
