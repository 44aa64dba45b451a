"""Where settings come from: a YAML file, the environment, flags. What cannot be one is told by its name."""
from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from blendmaskd.choices import remedy
from blendmaskd.settings.checks import check
from blendmaskd.settings.schema import Section, Settings, SettingsError
from blendmaskd.wanted import HIDDEN

ENVIRONMENT_PREFIX = "BLENDMASKD__"


def load(
    path: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    devices: Sequence[str] | None = None,
) -> Settings:
    """Settings from a YAML file, an environment and ``key.sub=value`` overrides, checked.

    Raises `SettingsError` for an unreadable file, an unknown key or a bad value.
    """
    tree = _read(path) if path else {}
    named: dict[tuple[Any, ...], str] = {}
    for name, text in sorted((environment or {}).items()):
        _refuse_single_underscore(name)
        if name.startswith(ENVIRONMENT_PREFIX):
            keys = _keys(name.removeprefix(ENVIRONMENT_PREFIX), "__")
            if (other := named.setdefault(tuple(keys), name)) != name:
                raise SettingsError(f"{other} and {name} are one setting: leave one out")
            _put(tree, keys, _yaml(text, name), name)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set {override}: expected KEY=VALUE")
        _put(tree, _keys(key, "."), _yaml(text, key), key)
    if devices:
        tree["devices"] = list(devices)
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Settings:
    """Settings from nested plain values; raises `SettingsError`."""
    runtime = tree.get("runtime")
    if isinstance(runtime, dict) and runtime.get("preload") is False:  # YAML reads a bare `off` as false
        tree = {**tree, "runtime": {**runtime, "preload": "off"}}
    try:
        settings = msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error), tree)) from None
    check(settings)
    return settings


def to_tree(settings: Settings) -> dict[str, Any]:
    """The inverse of `from_tree`: plain values, every key present."""
    tree: dict[str, Any] = msgspec.to_builtins(settings)
    return tree


def _refuse_single_underscore(name: str) -> None:
    """A setting that would be ignored. Others' variables may begin alike: Kubernetes names some after a Service."""
    if not name.startswith("BLENDMASKD_"):
        return
    given = name.removeprefix("BLENDMASKD_")
    known = given.partition("__")[0].lower() in Settings.__struct_fields__
    if wanted := given if known else _by_single_underscores().get(given.replace("__", "_").lower()):
        raise SettingsError(f"{name}: expected two underscores between names: {ENVIRONMENT_PREFIX}{wanted}")


@functools.cache
def _by_single_underscores() -> dict[str, str]:
    """``queue_max_jobs``: ``QUEUE__MAX_JOBS``, and so on."""
    names = _all_keys(msgspec.to_builtins(Settings(), str_keys=True))
    return {"_".join(keys): "__".join(keys).upper() for keys in names}


def _all_keys(tree: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *below) for below in _all_keys(value))


def _read(path: str | Path) -> dict[str, Any]:
    import yaml  # of the extra serve, as in `_yaml`: clients have this module too

    try:
        text = _text(path)
        tree = yaml.safe_load(text)
        _refuse_doubles(yaml.compose(text, yaml.SafeLoader), str(path))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not UTF-8 text: is it the settings file?") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{path}: {_complaint(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def _text(path: str | Path) -> str:
    """Of a pipe too, by which a shell hands over what a command prints; but nobody waits for one to be written to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, encoding="utf-8") as file:
        os.set_blocking(descriptor, True)
        text = file.read()
        if not text and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise SettingsError(f"{path}: a pipe with nothing in it: it is read once, a reload needs a file")
    return text


def _yaml(text: str, name: str) -> Any:
    import yaml

    shown = HIDDEN if "worker_env" in name.lower() else text
    if " #" in text and not text.startswith(('"', "'", "[", "{")):
        raise SettingsError(f"{name}={shown}: YAML takes what follows ' #' for a comment: put the value into quotes")
    try:
        value = yaml.safe_load(text)
        _refuse_doubles(yaml.compose(text, yaml.SafeLoader), name)
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{name}={shown}: not a YAML value: {_complaint(error)}") from None
    return value


def _complaint(error: Any) -> str:
    """YAML's, in one line."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else " ".join(str(error).split())


def _refuse_doubles(node: Any, source: str, section: str = "", done: tuple[Any, ...] = ()) -> None:
    """Of a key that is given twice, YAML would silently take the last. `done`: the sections around this one."""
    seen: dict[str, int] = {}
    for key, value in node.value if node is not None and node.id == "mapping" and node not in done else ():
        name, line = f"{section}{key.value}", key.start_mark.line + 1
        if name in seen:
            raise SettingsError(f"{source}: {name} is given twice, in lines {seen[name]} and {line}")
        seen[name] = line
        _refuse_doubles(value, source, f"{name}.", (*done, node))


def _keys(name: str, separator: str) -> list[Any]:
    """The way to a value in the tree. Names of settings may be in capitals; below a free map, such as `worker_env`, a
    key stays as it is, and a number is one.
    """
    keys: list[Any] = []
    section, rest = Settings, name
    while rest:
        if not (isinstance(section, type) and issubclass(section, Section)):
            return [*keys, int(rest) if rest.isdecimal() else rest]
        key, _, rest = rest.partition(separator)
        keys.append(key.lower() if separator == "__" else key)
        section = next((each.type for each in msgspec.structs.fields(section) if each.name == keys[-1]), Settings)
    return keys or [name]


def _put(tree: dict[str, Any], keys: list[Any], value: Any, name: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"{name}: {key} is not a section")
    tree[keys[-1]] = value


def _explain(error: str, tree: Any) -> str:
    """msgspec's ``reason - at `$.queue.max_jobs` `` as ``queue.max_jobs = -1: reason``. Of a bad key (``at `key` in
    `$.timed` ``) all of its section are named, without values; those of `worker_env` are secrets.
    """
    [(reason, of_key, key)] = re.findall(r"^(.*?)(?: - at (`key` in )?`\$\.?(.*)`)?$", error, re.DOTALL)
    value = tree
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, list) and part.isdigit():
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part, value)
    unknown = re.search(r"unknown field `(.*)`", reason)
    if unknown:
        return f"{key + '.' if key else ''}{unknown[1] or repr('')}: unknown key{remedy(error, Settings)}"
    if of_key:
        return f"{key or 'settings'}: one of its keys {[*value]}: {reason}"
    if key.startswith("worker_env"):
        value = dict.fromkeys(value, HIDDEN) if isinstance(value, dict) else HIDDEN
    return f"{key} = {value!r}: {reason}{remedy(error, Settings)}"
