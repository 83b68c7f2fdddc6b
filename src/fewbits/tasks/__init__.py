"""What "accuracy" means, per domain: a registry of tasks and `evaluate`."""

from fewbits.tasks.measure import evaluate
from fewbits.tasks.registry import Metrics, Task, register_task, task_for, task_named, task_names

__all__ = ["Metrics", "Task", "evaluate", "register_task", "task_for", "task_named", "task_names"]
