"""Runs of the earlier implementation turned into runs of ours."""
