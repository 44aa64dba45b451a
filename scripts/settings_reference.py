#!/usr/bin/env python3
"""Write docs/settings.md from the settings themselves: `python scripts/settings_reference.py`; a test compares them."""
import ast
import itertools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
from blendmaskd import settings  # noqa: E402
from blendmaskd.settings import schema  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

*Written by `scripts/settings_reference.py` from `daemon/blendmaskd/settings/schema.py`; edit it there.*

Settings are one YAML file in which every key is optional. Later sources override earlier ones, key by key: file,
environment, flags.

```yaml
devices: [npu:0, npu:1]
model:
  config: configs/BlendMask/R_50_1x.yaml
  weights: /etc/blendmaskd/R_50_1x.pth
queue: {max_jobs: 512}
```

    BLENDMASKD__QUEUE__MAX_JOBS=512 blendmaskd --settings daemon.yaml
    blendmaskd --settings daemon.yaml --devices cpu:0 cpu:1 --set queue.max_jobs=512

An unknown key or a bad value prevents the start (exit code 78); the error names key and reason:

    blendmaskd: queue.max_jobs = -1: Expected `int` >= 1

`kill -HUP` reloads the settings. A change of `endpoints`, `curve`, `insecure_tcp`, `spool` or
`limits.max_connections`, or a higher `limits.max_image_bytes`, needs a restart: a reload that contains one is refused
as a whole. New settings and weights are first tried in a separate process; if they do not work, nothing changes.
Relative paths are relative to the daemon's working directory; the path of an ipc endpoint starts at the root. HOST is
an address (IPv6 in brackets), a name, an interface of this host, or `*` for all its IPv4 addresses. A key that is given
twice is refused. In the environment, names of settings may be in capitals; below `worker_env` and other free maps, keys
stay as they are written. One with a single underscore between names, such as
`BLENDMASKD_BATCH` or `BLENDMASKD_QUEUE_MAX_JOBS`, is refused.

| key | default | meaning |
|---|---|---|
"""


def page() -> str:
    """The whole text of docs/settings.md."""
    source = Path(schema.__file__).read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    defaults = settings.to_tree(settings.Settings())
    return HEAD + "\n".join(_rows(classes, classes["Settings"], source.splitlines(), defaults, "")) + "\n"


def _rows(classes, section, lines, defaults, prefix):
    for field in section.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        name, kind = field.target.id, ast.unparse(field.annotation)
        if kind in classes:
            yield from _rows(classes, classes[kind], lines, defaults[name], f"{prefix}{name}.")
        else:
            comment = lines[field.end_lineno - 1].partition("  # ")[2] or _above(lines[: field.lineno - 1])
            yield f"| `{prefix}{name}` | `{_text(defaults[name])}` | {comment.replace('|', '/')} |"


def _above(lines):
    """The comment that these lines end with, all of it."""
    comment = list(itertools.takewhile(lambda line: line.strip().startswith("#"), reversed(lines)))
    return " ".join(line.strip(" #") for line in reversed(comment))


def _text(value):
    if isinstance(value, float) and value == int(value):
        return int(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
