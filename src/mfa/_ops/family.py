"""A family of ops with gradients: what differs between dense and packed attention."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from .._arguments import Backward, Dense, Varlen

Arguments = TypeVar("Arguments", Dense, Varlen)
Outputs = tuple[Tensor, Tensor]
Corrected = tuple[Tensor, Tensor, Tensor]


class Family(ABC, Generic[Arguments]):
    """What differs between families; differentiable.py makes rules of it."""

    name: str
    arguments: type[Arguments]
    gradients: tuple[str, ...]  # the arguments that have one, in the order of backward's results

    @abstractmethod
    def check(self, arguments: Arguments, *, metal: bool) -> None:
        """Refuses what shapes, dtypes and numbers tell. `metal`: the Metal kernels are going to run."""

    def check_contents(self, arguments: Arguments) -> None:
        """Refuses what the contents of tensors tell, where the host sees them."""

    @abstractmethod
    def shapes(self, arguments: Arguments) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of out and lse."""

    @abstractmethod
    def empty_outputs(self, arguments: Arguments) -> Outputs:
        """Out and lse, uninitialised, laid out as every backend lays them out."""

    @abstractmethod
    def forward(self, arguments: Arguments) -> Outputs:
        """Of CPU tensors."""

    @abstractmethod
    def forward_with_correction(self, arguments: Arguments) -> Corrected:
        """Of CPU tensors."""

    @abstractmethod
    def backward(self, arguments: Arguments, given: Backward) -> Mapping[str, Tensor]:
        """Of CPU tensors: the wanted gradients, laid out as every backend lays them out."""

    @abstractmethod
    def backward_vjp(
        self, arguments: Arguments, grad_out: Tensor, grad_lse: Tensor | None, cotangents: Mapping[str, Tensor | None]
    ) -> Mapping[str, Tensor]:
        """The gradients of grad_out, grad_lse and the arguments, from those of the gradients; on any device."""

    @abstractmethod
    def folds(self, dims: Mapping[str, int | None], given: Mapping[str, Any]) -> bool:
        """Whether one call can do all that is mapped over `dims`."""

    @abstractmethod
    def fold(self, size: int, dims: Mapping[str, int | None], given: Mapping[str, Any]) -> list[Any]:
        """The arguments of that call; `place` then says where its results have the mapped dimension."""

    @abstractmethod
    def place(self, result: str) -> int:
        """Of out, lse, correction, or the gradient of an argument."""

    @abstractmethod
    def pairs(self, arguments: Arguments) -> int:
        """How many (head, query, key) there are, batch entries included."""
