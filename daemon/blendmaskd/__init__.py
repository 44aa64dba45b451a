"""blendmaskd: broker, supervisor and client. Nothing here imports torch."""
