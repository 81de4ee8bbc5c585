"""The model families: what a config.json says about a model, and which models there can be.

`table` has an entry for each family, `tensors` what a model of it consists of, `checks` what a config
must obey. They know nothing of files, of torch or of how a model is computed; all they take is the
parsed config, as a plain dict, as transformers 4 writes it (`torch_dtype`, `rope_theta`,
`rope_scaling`) or as transformers 5 does (`dtype`, `rope_parameters`).
"""

from common.families.checks import model_dtype, validate_config
from common.families.table import (
    FAMILIES,
    Family,
    Kept,
    Linear,
    attention_widths,
    described,
    family_of,
    head_dim,
)
from common.families.tensors import expected_tensors, is_tied, windows

__all__ = [
    "FAMILIES",
    "Family",
    "Kept",
    "Linear",
    "attention_widths",
    "described",
    "expected_tensors",
    "family_of",
    "head_dim",
    "is_tied",
    "model_dtype",
    "validate_config",
    "windows",
]
