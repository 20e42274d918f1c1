"""Building layers from nested option dictionaries, with a useful error for a misspelt key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from m2mkd_fast.errors import M2MKDError, UnknownNameError

Built = TypeVar("Built")


def build(constructor: Callable[..., Built], where: str, given: Mapping[str, Any] | None, **defaults: Any) -> Built:
    """``constructor(**defaults, **given)``, where `given` wins and defaults that it does not take are left out.

    Args:
        constructor: a class or function; its signature says which options there are.
        where: the path of `given` in the configuration, for error messages.
        given: what the configuration says.
        defaults: what holds for this part unless the configuration says otherwise.

    Raises:
        UnknownNameError: a key of `given` is no option.
        M2MKDError: an option without default is missing.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind in named
    }
    given = dict(given or {})
    for name in given:
        if name not in parameters:
            raise UnknownNameError(f"key in {where}:", name, parameters)
    options = {name: value for name, value in defaults.items() if name in parameters} | given
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise M2MKDError(f"{where} has no {name!r}, which {constructor.__name__} needs; add it")
    return constructor(**options)
