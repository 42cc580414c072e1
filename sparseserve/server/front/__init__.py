"""What stands before vLLM's routes: keys, limits, options of requests, draining, counters."""
