"""Chaos: a daemon under load whose parts are made to fail, and an account of what its clients were told.

=============  ========================================================================================
poison         images that break the timed engine, by their width, and devices that do not start
ledger         pure: every job of every client, and what became of it
growth         pure: is what a process holds growing?
clients        closed-loop clients, good and bad ones, of one thread
injector       which fault comes when, from a seed
program        `scripts/chaos.py`
scenes         `scripts/fault_scenes.py`: six scenes that other servers were measured in
=============  ========================================================================================

For tests of the daemon only; no part of what serves imports anything from here.
"""
