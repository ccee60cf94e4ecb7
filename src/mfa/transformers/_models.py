"""What transformers' model classes do with an attention implementation of ours.

A model's flag `_supports_sdpa` says which masks it reads. With it, transformers tests the model with bool masks;
without it, with eager's only: the model may add the mask to its scores, where a bool mask is 1 for what a query sees.
"""

import sys
from functools import partial, wraps
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from .. import _log


def _classes(config: type) -> list[Any]:
    """Every model class, of those imported, that takes such a configuration."""
    found: list[Any] = [PreTrainedModel]
    for model in found:
        found.extend(model.__subclasses__())
    return [model for model in found if model.config_class is config]


def _asks(model: Any) -> bool:
    """Whether a class's file asks the attention interface, as transformers reads it. Without a file, who knows."""
    can_set: bool = model._can_set_attn_implementation()
    return can_set or not hasattr(sys.modules.get(model.__module__), "__file__")


_eager_only: dict[type, bool] = {}
_by_itself: dict[type, str | None] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_eager_only(config: type) -> bool:
    """Whether models of this configuration are to be given what eager attention gets.

    Every model can read that; so it's also what those get of which nobody knows the class.
    """
    if config not in _eager_only:
        models = _classes(config)
        _eager_only[config] = not (models and all(model._supports_sdpa for model in models))
    return _eager_only[config]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def attends_by_itself(config: type) -> str | None:
    """The name of the model of this configuration, if none of them asks the attention interface."""
    if config not in _by_itself:
        models = [model for model in _classes(config) if not model.__name__.endswith("PreTrainedModel")]
        names = [model.__name__ for model in models if not _asks(model)]
        _by_itself[config] = names[0] if names and len(names) == len(models) else None
    return _by_itself[config]


_names: set[str] = set()
_met: set[str] = set()  # files; the first of a file's classes has the others as parts


def watch(name: str) -> None:
    """Has it said where `attn_implementation=name` is asked of a model of which it doesn't reach all attention.

    Between the name and the layers there is nothing public: this wraps what transformers checks each name with.
    """
    if not _names:
        check = PreTrainedModel.get_correct_attn_implementation

        @wraps(check)
        def checked(model: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
            if requested_attention in _names:
                _meet(type(model), str(requested_attention))
            return check(model, requested_attention, *args, **kwargs)

        PreTrainedModel.get_correct_attn_implementation = checked
    _names.add(name)


def _meet(model: Any, name: str) -> None:
    # Some files choose a layer's class from a table by this name, and would raise a bare KeyError.
    variables = getattr(sys.modules.get(model.__module__), "__dict__", {}).items()
    tables = {variable: table for variable, table in variables if isinstance(table, dict) and "eager" in table}
    if model.__module__ not in _met and (tables or not _asks(model)):
        _met.add(model.__module__)
        _log.once(
            f"{model.__name__} has attention that doesn't ask transformers' attention interface: "
            f"attn_implementation={name!r} doesn't reach it"
        )
    for variable, table in tables.items():
        table.setdefault(name, partial(refuse, name, f"{model.__name__}, whose {variable} lacks it"))


def refuse(name: str, model: str, *_: Any, **__: Any) -> NoReturn:
    """Raises the sentence."""
    raise NotImplementedError(f"attn_implementation={name!r} is not supported by {model}: use 'eager'")
