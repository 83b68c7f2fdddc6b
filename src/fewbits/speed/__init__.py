"""Float against packed on the machine at hand: latency, memory, and how far both are from what the machine can do."""
