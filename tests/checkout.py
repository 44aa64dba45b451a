"""Where this checkout is, for tests that start processes or read its files."""
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = f"{ROOT / 'daemon'}:{ROOT / 'workers'}"  # for PYTHONPATH
