# %% [markdown]
# # Compare policies honestly
#
# About a minute on two CPU cores. "7 of 10 against 5 of 10" says nothing; looking after each rollout and stopping when it looks good
# finds differences that are not there. A sequential test may be looked at after every rollout, and says when it has decided.

# %%
import os
import tempfile
from pathlib import Path

os.chdir(tempfile.mkdtemp())

# %% [markdown]
# ## How many rollouts does a difference need?
# Ten points between two good policies take hundreds of rollouts; a policy that works against one that does not takes ten. The
# test on a task is STEP (Snyder et al. 2025).

# %%
from fractions import Fraction

import numpy as np

from vla_foundry.evaluation.comparison.sequential import find_table, run_test

table, rng = find_table(50, Fraction(1, 40)), np.random.default_rng(0)


def compare(first: float, second: float) -> str:
    """Simulate 200 comparisons of two policies with these true rates, 50 rollouts of each planned."""
    decisions = [
        run_test(table, rng.random((2, 50)) < [[first], [second]], seed=0, purpose=str(number)) for number in range(200)
    ]
    found = sum(decision.better is not None for decision in decisions)
    rollouts = sum(decision.stop for decision in decisions) / len(decisions)
    return f"{first:.0%} and {second:.0%}: told apart in {found / 2:.0f}% of comparisons, after {rollouts:.0f} rollouts of each"


[compare(*rates) for rates in ((0.7, 0.7), (0.7, 0.8), (0.5, 0.8), (0.1, 0.9))]

# %% [markdown]
# ## Declare, then roll out
# `family.yaml` says before the first rollout which policies are compared on which tasks, how large the error may be, and how many
# rollouts there are at most. Its hash is kept with each result: rollouts under another declaration are not mixed in.

# %%
Path("rollouts").mkdir()
Path("rollouts/family.yaml").write_text("""models: [expert, random, "null"]
tasks: [drawer-open-v3@half]
alpha: 0.05
max_sample_size: 12
""")

# %% [markdown]
# Three policies that need no training: a scripted expert, random actions, and none. `--until_decided` stops as soon as the test has
# told a policy apart from the one it names.

# %% magic_args="-e" language="bash"
# flags="--tasks drawer-open-v3@half --episodes 0:12 --max_steps 150 --num_pictured 0 --output rollouts"
# vla-foundry evaluate --policy expert $flags
# vla-foundry evaluate --policy random $flags --until_decided rollouts/expert
# vla-foundry evaluate --policy null $flags --until_decided rollouts/expert

# %% [markdown]
# ## Read the report
# Policies that share a letter are not told apart. One page, `rollouts/report/report.html`, has rates with their intervals, the
# difference of every pair, and every seed; tables lie beside it as CSV and Markdown.

# %% magic_args="-e" language="bash"
# vla-foundry report rollouts
# ls rollouts/report

# %%
from IPython.display import Markdown

Markdown(next(Path("rollouts/report").glob("*.md")).read_text())

# %% [markdown]
# ## Pitfalls
# - More rollouts than were declared, because the result is close, are an error.
# - A rollout that ended because a process died is invalid: neither success nor failure, and run again.
# - Seeds of training differ more than policies do: train three before you call a recipe better (docs/action_heads.md has such a
#   table).
# - docs/comparing_policies.md works through the 78,000 rollouts that the paper's authors published.
