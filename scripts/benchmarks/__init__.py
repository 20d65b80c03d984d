"""The cases of scripts/benchmark.py, one module each, and what they share: timing, peers, floors, reports."""
