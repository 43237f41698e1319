"""The ways to tell Meta-World's robot what to do: sentences for each task, with and without courtesy."""

from vla_foundry.simulators.metaworld_tasks import INSTRUCTIONS

_COURTESIES = ("{}", "please {}")
# other sentences for the instruction of each task; none fits another task
_PARAPHRASES: dict[str, tuple[str, str]] = {
    "assembly-v3": ("fit the ring onto the peg", "slide the ring over the peg"),
    "basketball-v3": ("drop the ball into the basket", "dunk the ball"),
    "bin-picking-v3": ("carry the block over to the other bin", "take the block out of its bin and into the other one"),
    "box-close-v3": ("cover the box with its lid", "close the box"),
    "button-press-topdown-v3": ("push the button down", "press the button downwards"),
    "button-press-topdown-wall-v3": ("push the button down, past the wall", "reach past the wall and press downwards"),
    "button-press-v3": ("push the button", "press the button in"),
    "button-press-wall-v3": ("push the button behind the wall", "reach behind the wall and press the button"),
    "coffee-button-v3": ("push the button of the coffee machine", "start the coffee machine"),
    "coffee-pull-v3": ("take the mug from the coffee machine", "pull the mug out from under the coffee machine"),
    "coffee-push-v3": ("slide the mug under the coffee machine", "put the mug under the coffee machine"),
    "dial-turn-v3": ("rotate the dial", "twist the dial"),
    "disassemble-v3": ("pull the ring off the peg", "lift the ring from the peg"),
    "door-close-v3": ("push the door shut", "shut the door"),
    "door-lock-v3": ("turn the lock of the door shut", "bolt the door"),
    "door-open-v3": ("pull the door open", "open up the door"),
    "door-unlock-v3": ("turn the lock of the door open", "unbolt the door"),
    "drawer-close-v3": ("push the drawer shut", "shut the drawer"),
    "drawer-open-v3": ("pull the drawer open", "pull out the drawer"),
    "faucet-close-v3": ("turn the faucet off", "shut the faucet"),
    "faucet-open-v3": ("turn the faucet on", "turn the faucet open"),
    "hammer-v3": ("drive the nail in with the hammer", "hit the nail with the hammer"),
    "hand-insert-v3": ("insert the hand into the hole", "reach into the hole"),
    "handle-press-side-v3": ("push the handle down from the side", "press down the handle, from the side"),
    "handle-press-v3": ("push the handle down", "press down the handle"),
    "handle-pull-side-v3": ("lift the handle from the side", "pull up the handle, from the side"),
    "handle-pull-v3": ("lift the handle", "pull up the handle"),
    "lever-pull-v3": ("lift the lever", "raise the lever"),
    "peg-insert-side-v3": ("put the peg into the hole", "push the peg into the hole from the side"),
    "peg-unplug-side-v3": ("unplug the plug", "take the plug out"),
    "pick-out-of-hole-v3": ("take the puck out of the hole", "lift the puck out of the hole"),
    "pick-place-v3": ("lift the puck to the goal", "take the puck and carry it to the goal"),
    "pick-place-wall-v3": ("lift the puck over the wall to the goal", "carry the puck over the wall to the goal"),
    "plate-slide-back-side-v3": ("push the plate out of the goal sideways", "move the plate sideways out of the goal"),
    "plate-slide-back-v3": ("pull the plate out of the goal", "move the plate out of the goal"),
    "plate-slide-side-v3": ("push the plate sideways into the goal", "move the plate sideways into the goal"),
    "plate-slide-v3": ("push the plate into the goal", "move the plate into the goal"),
    "push-back-v3": ("pull the puck back to the goal", "move the puck back to the goal"),
    "push-v3": ("slide the puck to the goal", "move the puck to the goal"),
    "push-wall-v3": ("slide the puck around the wall to the goal", "move the puck around the wall to the goal"),
    "reach-v3": ("move the hand to the goal", "go to the goal"),
    "reach-wall-v3": ("move the hand to the goal behind the wall", "go behind the wall to the goal"),
    "shelf-place-v3": ("place the block on the shelf", "lift the block onto the shelf"),
    "soccer-v3": ("shoot the ball into the goal", "score a goal with the ball"),
    "stick-pull-v3": ("use the stick to pull the thermos", "drag the thermos with the stick"),
    "stick-push-v3": ("use the stick to push the thermos", "shove the thermos with the stick"),
    "sweep-into-v3": ("push the block into the hole", "sweep the block over into the hole"),
    "sweep-v3": ("push the block off the table", "wipe the block off the table"),
    "window-close-v3": ("slide the window shut", "shut the window"),
    "window-open-v3": ("slide the window open", "open up the window"),
}


def instructions_of(name: str) -> tuple[str, ...]:
    """Every way to give the task called `name` (without a variant); the plain instruction is the first."""
    sentences = (INSTRUCTIONS[name], *_PARAPHRASES[name])
    return tuple(courtesy.format(sentence) for courtesy in _COURTESIES for sentence in sentences)
