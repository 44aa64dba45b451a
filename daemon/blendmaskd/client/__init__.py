"""The clients: blocking and asynchronous, over one exchange."""
