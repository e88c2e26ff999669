"""All attacks by name: those of the modules below `lockkit/attack/attacks/`, and those of other packages.

Another package offers an attack by an entry point of the group `lockkit.attacks`, whose object is the attack's class:

    [project.entry-points."lockkit.attacks"]
    my-attack = "my_package:MyAttack"
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points

from lockkit.attack import attacks
from lockkit.attack.base import Attack, GradientAttack
from lockkit.errors import UsageError, first_line

GROUP = "lockkit.attacks"


@functools.cache
def registry() -> dict[str, type[Attack]]:
    """All attacks by name: lockkit's in the order of their modules and of the classes in them, then those of others.

    Raises:
        UsageError: an attack of another package cannot be loaded, or is no attack, or two have the same name.
    """
    found: dict[str, type[Attack]] = {}
    for attack in (*_own(), *_of_others()):
        if attack.name in found:
            raise UsageError(f"two attacks are called {attack.name}: uninstall the package of one of them")
        found[attack.name] = attack
    return found


def _own() -> Iterator[type[Attack]]:
    for module in sorted(info.name for info in pkgutil.walk_packages(attacks.__path__, f"{attacks.__name__}.")):
        for value in vars(importlib.import_module(module)).values():
            own = isinstance(value, type) and issubclass(value, Attack) and value.__module__ == module
            if own and "name" in vars(value):
                yield value


def _of_others() -> Iterator[type[Attack]]:
    for entry in entry_points(group=GROUP):
        try:
            value = entry.load()
        except Exception as error:  # another package's code may raise any error
            raise UsageError(
                f"the attack '{entry.name}' of another package cannot be loaded ({first_line(error)}): uninstall it"
            ) from error
        if not (isinstance(value, type) and issubclass(value, Attack) and hasattr(value, "name")):
            raise UsageError(f"the entry point '{entry.name}' of the group {GROUP} is no attack: uninstall its package")
        yield value


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
