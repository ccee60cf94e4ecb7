"""The namespace `mfa` of torch's ops, once libmfa has registered them, and where Python adds to it."""

import torch

from .. import _library, _torch
from .._arguments import DENSE_GRADIENTS, VARLEN_GRADIENTS, Append, Backward, Decode, Dense, Paged, Varlen

_library.load()
ops = torch.ops.mfa
LIBRARY = torch.library.Library("mfa", "FRAGMENT")  # other packages define ops in this namespace too

_RESULTS, _CORRECTION = ("out", "lse"), ("correction",)
TRAINING = ("trains_terms",)  # what an op with a correction takes more than the one without
SIGNATURES = {
    "attention_forward": (Dense._fields, _RESULTS),
    "attention_forward_with_correction": (Dense._fields + TRAINING, _RESULTS + _CORRECTION),
    "attention_backward": (Dense._fields + Backward._fields, DENSE_GRADIENTS),
    "attention_varlen_forward": (Varlen._fields, _RESULTS),
    "attention_varlen_forward_with_correction": (Varlen._fields + TRAINING, _RESULTS + _CORRECTION),
    "attention_varlen_backward": (Varlen._fields + Backward._fields, VARLEN_GRADIENTS),
    "attention_append": (Append._fields, ("rotated_query", "lengths")),
    "attention_decode": (Decode._fields, _RESULTS),
    "attention_varlen_paged": (Paged._fields, _RESULTS),
}


def check_signatures() -> None:
    """Raises ImportError if an op of libmfa takes or returns something else than Python thinks."""
    for name, (arguments, results) in SIGNATURES.items():
        expected = arguments, tuple(f"grad_{result}" if result in arguments else result for result in results)
        if (found := _torch.signature(getattr(ops, name).default)) != expected:
            raise ImportError(f"mfa::{name} has arguments and results {found}; they must be {expected}: rebuild libmfa")


check_signatures()
