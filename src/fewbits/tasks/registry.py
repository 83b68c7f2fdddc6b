"""The tasks there are, by name. A new one is a class with `@register_task` in a file that `_FILES` lists."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.hub.requires import nearest

Metrics = dict[str, float]

_TASKS: dict[str, type[Task]] = {}
_FILES = ("image_classification", "language_modeling", "noise_prediction", "sequence_classification")


class Task(ABC):
    """Counts over one pass of the data. One object measures one model once.

    Class attributes: `name`; `domains`: the domains of models that it measures; `metric`: the one of its metrics
    that stands for all; `higher_is_better`.
    """

    name: ClassVar[str]
    domains: ClassVar[tuple[str, ...]]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]

    @abstractmethod
    def update(self, output: Any, targets: Tensor) -> None:
        """Take in one batch: what the model returned, and the targets, on the same device."""

    @abstractmethod
    def result(self) -> Metrics:
        """The metrics over everything taken in."""

    def counts(self) -> dict[str, int]:
        """How many things were measured, besides the samples (tokens, ...)."""
        return {}


def register_task(task: type[Task]) -> type[Task]:
    """Class decorator: make a task known by its name. Two of one name are refused."""
    if _TASKS.get(task.name, task).__qualname__ != task.__qualname__:
        raise FewbitsError(f"there is a task {task.name!r} already")
    _TASKS[task.name] = task
    return task


def _known() -> dict[str, type[Task]]:
    for file in _FILES:
        importlib.import_module(f"fewbits.tasks.{file}")
    return _TASKS


def task_names() -> list[str]:
    """Names of all tasks."""
    return sorted(_known())


def task_named(name: str) -> type[Task]:
    """The task of that name (`-` and `_` are the same); FewbitsError with the nearest names otherwise."""
    known = _known()
    wanted = name.replace("-", "_")
    if wanted not in known:
        raise FewbitsError(f"there is no task {name!r}{nearest(wanted, known)} (there are: {', '.join(sorted(known))})")
    return known[wanted]


def task_for(loaded: Any, data: Any = None) -> type[Task]:
    """The task for a model's domain: `loaded` is anything with a `domain`; where it has none, the data's is taken.

    Raises:
        FewbitsError: no task measures that domain.
    """
    domain = getattr(loaded, "domain", None) or getattr(data, "domain", None)
    for task in _known().values():
        if domain in task.domains:
            return task
    raise FewbitsError(f"no task measures models of domain {domain!r}; tasks: {', '.join(task_names())}")
