"""The whole road on this machine: each stage is a public command, run as a subprocess."""
