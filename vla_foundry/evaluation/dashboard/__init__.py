"""A folder of results in the browser: its report, live, and a queue of evaluations that write to it."""
