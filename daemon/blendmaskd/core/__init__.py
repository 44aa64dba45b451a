"""The pure cores: facts and the time in, actions out. They own no socket, clock, process, thread or logger."""
