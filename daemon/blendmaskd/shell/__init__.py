"""The shell: owns sockets, processes, the clock and the disk, and carries out what the cores decide."""
