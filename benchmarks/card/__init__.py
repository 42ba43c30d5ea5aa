"""What `benchmarks/run_all.py` is made of: a session on a CUDA card, or its rehearsal."""
