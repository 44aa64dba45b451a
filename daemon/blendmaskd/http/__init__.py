"""HTTP: `blendmaskd-http`, a front that is a client of the broker: `program` is the process, `application` routes."""
