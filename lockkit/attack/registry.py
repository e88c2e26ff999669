"""All attacks by name, collected from the modules of `lockkit/attack/attacks/`."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from lockkit.attack import attacks
from lockkit.attack.base import Attack, GradientAttack
from lockkit.errors import UsageError


@functools.cache
def registry() -> dict[str, type[Attack]]:
    """All attacks by name, in the order of their modules and of the classes in them."""
    found: dict[str, type[Attack]] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(attacks.__path__)):
        for value in vars(importlib.import_module(f"{attacks.__name__}.{module}")).values():
            own = isinstance(value, type) and issubclass(value, Attack) and value.__module__.endswith(f".{module}")
            if own and "name" in vars(value):
                if value.name in found:
                    raise RuntimeError(f"two attacks are called {value.name}")
                found[value.name] = value
    return found


def attack_class(name: str) -> type[Attack]:
    """The attack called `name`.

    Raises:
        UsageError: there is no such attack.
    """
    if name not in registry():
        raise UsageError(f"there is no attack '{name}': change --attack, or see `lockkit attack --list`")
    return registry()[name]


def gradient_attack(name: str) -> type[GradientAttack]:
    """The gradient attack called `name`.

    Raises:
        UsageError: there is no such attack.
    """
    attack = attack_class(name)
    assert issubclass(attack, GradientAttack), f"{name} does not fine-tune a model"
    return attack
