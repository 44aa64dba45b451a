"""Settings: one frozen tree of values from defaults, a YAML file, the environment and flags, in that order.

Later sources win key by key. Everything is checked when it is loaded: an unknown key, a value of the wrong type or
out of range raises `SettingsError`, which names key, value and reason; nothing is guessed. The tree is passed down;
no module reads the environment or the file again.

Environment: ``BLENDMASKD__QUEUE__MAX_JOBS=64`` sets ``queue.max_jobs``; the value is read as YAML. Flags:
``--set queue.max_jobs=64``, and ``--devices cpu:0 cpu:1`` for the commonest.
"""
from blendmaskd.settings.schema import Http, Limits, Log, Model, Queue, Restarts, Settings, SettingsError, Timed
from blendmaskd.settings.sources import from_tree, load, to_tree

__all__ = [
    "Http", "Limits", "Log", "Model", "Queue", "Restarts", "Settings", "SettingsError", "Timed", "from_tree", "load",
    "to_tree",
]  # fmt: skip
