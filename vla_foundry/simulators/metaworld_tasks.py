"""Meta-World's tasks: instructions, half-open starts, and objects that can be arranged."""

from dataclasses import dataclass

INSTRUCTIONS: dict[str, str] = {
    "assembly-v3": "put the ring on the peg",
    "basketball-v3": "put the ball in the basket",
    "bin-picking-v3": "move the block from one bin to the other",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "press the button from above",
    "button-press-topdown-wall-v3": "press the button from above, past the wall",
    "button-press-v3": "press the button",
    "button-press-wall-v3": "press the button behind the wall",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "take the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-close-v3": "close the faucet",
    "faucet-open-v3": "open the faucet",
    "hammer-v3": "hammer the nail in",
    "hand-insert-v3": "put the hand into the hole",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "insert the peg into the hole",
    "peg-unplug-side-v3": "pull the plug out",
    "pick-out-of-hole-v3": "pick the puck out of the hole",
    "pick-place-v3": "pick up the puck and bring it to the goal",
    "pick-place-wall-v3": "pick up the puck and bring it over the wall to the goal",
    "plate-slide-back-side-v3": "slide the plate out of the goal sideways",
    "plate-slide-back-v3": "slide the plate out of the goal",
    "plate-slide-side-v3": "slide the plate sideways into the goal",
    "plate-slide-v3": "slide the plate into the goal",
    "push-back-v3": "push the puck back to the goal",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "reach-v3": "reach the goal",
    "reach-wall-v3": "reach the goal behind the wall",
    "shelf-place-v3": "put the block on the shelf",
    "soccer-v3": "kick the ball into the goal",
    "stick-pull-v3": "pull the thermos with the stick",
    "stick-push-v3": "push the thermos with the stick",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-close-v3": "close the window",
    "window-open-v3": "open the window",
}
# {task: paraphrases of its instruction}; none fits another task
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

# tasks whose goal is only a marker: without it there is nothing to aim at
TASKS_WITH_MARKED_GOAL = frozenset(
    {
        "pick-out-of-hole-v3",
        "pick-place-v3",
        "pick-place-wall-v3",
        "push-back-v3",
        "push-v3",
        "push-wall-v3",
        "reach-v3",
        "reach-wall-v3",
        "stick-pull-v3",
        "stick-push-v3",
    }
)


@dataclass(frozen=True, kw_only=True)
class HalfOpenStart:
    """Half-open starts, from layouts that the opening and the closing task share: both see the same image."""

    # the joint that opens
    joint: str
    # the middle of the starts, and the largest distance from it
    middle: float
    spread: float
    # range of the object's position
    low: tuple[float, float, float]
    high: tuple[float, float, float]


_DRAWER = HalfOpenStart(joint="goal_slidey", middle=-0.08, spread=0.02, low=(-0.1, 0.9, 0.0), high=(0.1, 0.9, 0.0))
_WINDOW = HalfOpenStart(joint="window_slide", middle=0.1, spread=0.02, low=(-0.1, 0.72, 0.16), high=(0.1, 0.88, 0.16))
HALF_OPEN_STARTS: dict[str, HalfOpenStart] = {
    "drawer-close-v3": _DRAWER,
    "drawer-open-v3": _DRAWER,
    "window-close-v3": _WINDOW,
    "window-open-v3": _WINDOW,
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """The main object of a task: its range of positions, what opens it, and the part that a robot acts on."""

    # its name in captions
    name: str
    # the part that a robot acts on; empty: the whole object
    part: str
    # the body that is placed, fixed to the table or with a free joint
    body: str
    # the body, site or geom that carries the part, and the part's place in its frame
    anchor: tuple[str, str]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    # the body whose joint opens it; None: it does not open
    moving_body: str | None = None
    # the joint's position when closed (or at rest), and when open
    closed: float = 0.0
    open: float = 0.0
    # other free bodies of the task, which scenes leave out
    beside: tuple[str, ...] = ()
    # range of the body's position: across, along; and its height
    across: tuple[float, float] = (-0.3, 0.3)
    along: tuple[float, float] = (0.7, 0.9)
    height: float = 0.0


_DRAWER_THING = Thing(
    name="drawer",
    part="handle",
    body="drawer",
    anchor=("body", "drawer_link"),
    offset=(0.0, -0.15, 0.0),
    moving_body="drawer_link",
    open=-0.16,
    along=(0.7, 0.95),
)
_WINDOW_THING = Thing(
    name="window",
    part="handle",
    body="window",
    anchor=("body", "windowb_a"),
    offset=(-0.014, -0.095, 0.0),
    moving_body="windowb_a",
    open=0.2,
    height=0.16,
    across=(-0.3, 0.25),
    along=(0.6, 0.92),
)
_DOOR_THING = Thing(
    name="door",
    part="handle",
    body="door",
    anchor=("geom", "handle"),
    moving_body="door_link",
    open=-1.5,
    height=0.15,
    across=(-0.15, 0.3),
    along=(0.75, 0.95),
)
_THERMOS_THING = Thing(
    name="thermos",
    part="",
    body="object",
    anchor=("body", "object"),
    offset=(0.0, 0.0, 0.1),
    beside=("stick",),
    along=(0.42, 0.9),
)
_BUTTON_THING = Thing(
    name="button",
    part="",
    body="box",
    anchor=("body", "button"),
    offset=(0.0, -0.193, 0.0),
    moving_body="button",
    open=-0.06,
    height=0.115,
    along=(0.65, 0.95),
)
_LEVER_THING = Thing(
    name="lever",
    part="grip",
    body="box",
    anchor=("site", "handleStart"),
    moving_body="handle_link",
    closed=-0.1,
    along=(0.65, 0.95),
)
_FAUCET_THING = Thing(
    name="faucet",
    part="knob",
    body="faucetBase",
    anchor=("body", "faucet_link2"),
    offset=(0.0, -0.175, 0.0),
    moving_body="faucet_link2",
    closed=-1.3,
    open=1.3,
    along=(0.6, 0.92),
)
THINGS: dict[str, Thing] = {
    "button-press-v3": _BUTTON_THING,
    "door-close-v3": _DOOR_THING,
    "door-open-v3": _DOOR_THING,
    "drawer-close-v3": _DRAWER_THING,
    "drawer-open-v3": _DRAWER_THING,
    "faucet-open-v3": _FAUCET_THING,
    "handle-press-v3": _LEVER_THING,
    "handle-pull-v3": _LEVER_THING,
    "stick-push-v3": _THERMOS_THING,
    "window-close-v3": _WINDOW_THING,
    "window-open-v3": _WINDOW_THING,
}


def instructions_of(name: str) -> tuple[str, ...]:
    """Return every wording for the task `name` (without a variant); the plain instruction comes first."""
    sentences = (INSTRUCTIONS[name], *_PARAPHRASES[name])
    return tuple(courtesy + sentence for courtesy in ("", "please ") for sentence in sentences)
