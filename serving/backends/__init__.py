"""What computes a folded network: exactly (fp32), or faster within a bound that is checked (int8, bf16)."""
