"""The namespace `mfa` of torch's ops, once libmfa has registered them, and where Python adds to it."""

import torch

from .. import _library

_library.load()
ops = torch.ops.mfa
LIBRARY = torch.library.Library("mfa", "FRAGMENT")  # other packages define ops in this namespace too
