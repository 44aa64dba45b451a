"""Who may speak to the daemon: from frame to verdict."""
