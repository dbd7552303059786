"""The ruler: operations, peak, parameters, bytes, latency and quality, measured the same way everywhere."""
