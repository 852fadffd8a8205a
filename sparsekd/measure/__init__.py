"""Proof: what is fast, how sure that is, and what the machine at hand can do. Imports nothing else of ours."""
