"""`vla-foundry hub push|pull`: share runs and datasets on the Hugging Face hub."""

from vla_foundry.config.command_line import parse_command, unknown_command_message
from vla_foundry.params.commands.sharing import HubPullParams, HubPushParams
from vla_foundry.progress import say

_USAGE = """usage: vla-foundry hub push RUN --repo ORG/NAME
       vla-foundry hub pull hf://ORG/NAME

Share runs, shards and LeRobot datasets on the Hugging Face hub; `vla-foundry hub push --help` says more.
"""


def main(argv: list[str]) -> None:
    """Run `vla-foundry hub`, and print where what was sent or fetched is.

    Raises:
        ValueError: an error that the user can fix; one line.
    """
    if not argv or argv[0] in ("--help", "-h"):
        say(_USAGE.rstrip())
        return
    what, words = argv[0], argv[1:]
    if what == "push":
        from vla_foundry.hub.push import push

        say(push(parse_command(HubPushParams, words, prog="vla-foundry hub push", positional=("source",))))
    elif what == "pull":
        from vla_foundry.hub.pull import pull

        say(str(pull(parse_command(HubPullParams, words, prog="vla-foundry hub pull", positional=("source",)))))
    else:
        raise ValueError(unknown_command_message(what, ["push", "pull"]))
