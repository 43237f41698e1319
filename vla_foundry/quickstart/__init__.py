"""Run the whole pipeline on this machine; each step is a public command, run as a subprocess."""
