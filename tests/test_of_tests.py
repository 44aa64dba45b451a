"""How these tests run: their children's signals, however the tests were started; the end of a run by a signal."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
