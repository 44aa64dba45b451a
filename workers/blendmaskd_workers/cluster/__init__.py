"""The worker's pipeline on more than one host, under Ray: a Serve application (`serve`), Data actors (`dataset`).

Ray places, restarts, scales and drains; decoding, batching, the engines and results are the daemon's workers' own.
"""
