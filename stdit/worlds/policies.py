"""Policies, which choose the actions of a recording: random, sticky, or a function of the user's."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from stdit.conditions import ActionSpace

# Chooses an action from an observation, the environment's info and a generator.
Policy = Callable[[Any, dict[str, Any], np.random.Generator], Any]

STAYS = 0.75  # probability with which a sticky policy repeats its last action


def random_action(space: ActionSpace, rng: np.random.Generator) -> Any:
    """Draw an action: one of several, or numbers between their bounds (normal numbers without bounds)."""
    if space.count is not None:
        return int(rng.integers(space.count))
    if space.low is None or space.high is None:
        return rng.normal(size=space.width).tolist()
    return rng.uniform(space.low, space.high).tolist()


def make_policy(name: str, space: ActionSpace) -> Callable[[], Policy]:
    """A function that makes the policy of an episode: "random", "sticky", or "MODULE:FUNCTION".

    FUNCTION(observation, info, rng) returns an action; the module is found from the current folder. ValueError if there is
    none.
    """
    if name == "random":
        return lambda: lambda observation, info, rng: random_action(space, rng)
    if name == "sticky":
        return lambda: _Sticky(space)
    module, separator, function = name.partition(":")
    if not separator:
        raise ValueError(f"--policy {name!r} is unknown; use random, sticky, or MODULE:FUNCTION.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--policy {name}: {error}; give a module in the current folder, and a function in it."
        ) from error
    return lambda: found


class _Sticky:
    """Repeats its last action with probability `STAYS`, so that an episode goes further than a random walk."""

    def __init__(self, space: ActionSpace):
        self.space, self.last = space, None

    def __call__(self, observation: Any, info: dict[str, Any], rng: np.random.Generator) -> Any:
        if self.last is None or rng.random() >= STAYS:
            self.last = random_action(self.space, rng)
        return self.last
