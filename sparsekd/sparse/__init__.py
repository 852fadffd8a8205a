"""Packed sparse weights and the operators, modules and conversions that run on them (dense activations)."""
