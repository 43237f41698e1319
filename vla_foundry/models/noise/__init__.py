"""Noise processes of denoising heads, and the draws that they are trained and sampled with."""
