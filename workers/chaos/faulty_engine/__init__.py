"""Goes on PYTHONPATH as a folder, see `workers.chaos.poison`."""
