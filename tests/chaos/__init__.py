"""Chaos: a daemon under load whose parts are made to fail, and an account of what its clients were told.

For tests of the daemon only; no part of what serves imports anything from here.
"""
