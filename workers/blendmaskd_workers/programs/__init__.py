"""Programs beside the worker: inference on one image, benchmarks of masks and network, random weights."""
