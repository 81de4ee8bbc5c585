"""``python -m feeder.doctor``, which is ``python launch.py doctor``: all checks, one line each."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

from common.blocks import packed_bytes
from common.checkpoint_kind import is_checkpoint
from common.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, UsageError, WeightFeederError
from common.families import expected_tensors
from common.log import report_error
from common.parser import Parser
from common.store import Store
from feeder.checkpoints.recognize import model_config
from feeder.doctor import device, host, sharing, software
from feeder.doctor.finding import Check, Patient, findings

_EXAMPLES = """\
  python launch.py doctor
  python launch.py doctor --model STORE --json
"""

CHECKS: list[Check] = [
    software.python,
    software.packages,
    software.compiler,
    software.flash_attention,
    host.host_memory,
    host.shared_memory,
    host.memlock,
    host.container,
    device.driver,
    device.gpus,
    device.compute_mode,
    device.mps,
    device.link,
    sharing.sharing,
]


def model_bytes(model: str) -> int:
    """Bytes of a store's weights, or of those that a checkpoint will have. WeightFeederError."""
    path = Path(os.path.expanduser(model))
    if not is_checkpoint(path):
        raise UsageError(
            f"model {path} is no directory and no GGUF file: give a checkpoint or a store"
        )
    if (path / "store.json").is_file():
        return Store.open(path).packed_bytes
    linear, _ = expected_tensors(model_config(path))
    return sum(packed_bytes(math.prod(shape)) for shape in linear.values())


def make_parser() -> Parser:
    """The parser of this command."""
    parser = Parser(
        "doctor",
        examples=_EXAMPLES,
        prog="python launch.py doctor",
        description="Checks what a run needs, and says what to do about what is not there.",
    )
    parser.add_argument("--model", metavar="DIR", help="a checkpoint or a store that is to run")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; 1 if any check fails."""
    arguments = make_parser().parse_args(argv)
    try:
        size_bytes = model_bytes(arguments.model) if arguments.model else 0
        patient = Patient(device.device_for(arguments.device), size_bytes)
        failed, found = False, []
        for finding in findings(CHECKS, patient):
            failed = failed or finding.level == "fail"
            found.append(dataclasses.asdict(finding))
            if not arguments.json:
                print(finding, flush=True)  # some take a while
        if arguments.json:
            print(json.dumps({"ok": not failed, "checks": found}))
    except WeightFeederError as error:
        report_error(str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_ERROR
    return EXIT_ERROR if failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
