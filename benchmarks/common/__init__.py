"""What the benchmarks share: arrival times, a load client, servers, readings of memory, result files."""
