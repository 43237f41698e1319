"""Converters of recordings, one module each; base.py says how to write one.

`lerobot`, `spartan` and `hdf5` come along. RLDS (Open X-Embodiment) does not: its records are read by
tensorflow_datasets, which needs TensorFlow beside PyTorch. Its sets are there as LeRobot datasets, too; convert those.
"""
