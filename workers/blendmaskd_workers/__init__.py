"""What runs in a worker process: engines, devices, images, results and the network."""
