"""What `tests.forked` imports before it forks: all that a feeder and an engine import. None of it touches a
device: whoever has talked to a driver must not fork."""

import os

# To ask whether there is a device is no talk then.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import transformers.models.qwen2.modeling_qwen2

import engine.generate
import engine.start
import engine.steps
import engine.text
import feeder.start

__all__ = ["engine", "feeder", "transformers"]
