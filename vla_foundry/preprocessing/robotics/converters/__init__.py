"""Converters of recordings, one module each; converter.py shows how to write one.

`lerobot`, `spartan` and `hdf5` are included. RLDS (Open X-Embodiment) is not: its records need tensorflow_datasets,
and so TensorFlow beside PyTorch. Its datasets also exist in LeRobot's format; convert those.
"""
