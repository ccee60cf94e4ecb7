"""What rotary embeddings are: multiplication of complex numbers, in float64, sharing no code with the package."""

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, interleaved: bool, conjugate: bool = False) -> Tensor:
    """Float64, of x [...,H,D] whose tokens have the positions `rows` [...]."""
    pairs = cos.shape[1]
    x = x.double()
    if interleaved:
        numbers = torch.complex(x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2])
    else:
        numbers = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs])
    turn = torch.complex(cos.double(), sin.double())[rows][..., None, :]
    turned = numbers * (turn.conj() if conjugate else turn)
    whole = torch.view_as_real(turned).flatten(-2) if interleaved else torch.cat((turned.real, turned.imag), -1)
    return torch.cat((whole, x[..., 2 * pairs :]), -1)
