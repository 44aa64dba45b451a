"""One command for any accelerator: is it right, how fast is it, and does the daemon keep it busy?

`program` runs the `sections`, each of which starts processes (`children`) that may fail without harm to the rest:
`facts` opens the device, `goldens` compares it with what was `recorded`, `visits` times it; the rest is done by the
precision program and by the benchmark. `report` is the Markdown.
"""
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]  # of the checkout
GOLDEN = ROOT / "tests" / "golden"  # what AdelaiDet said, see `recorded`
