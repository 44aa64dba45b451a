"""Goes on PYTHONPATH as a folder, see `chaos.poison`."""
