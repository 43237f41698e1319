"""PushT (gym-pusht): a disk pushes a T-shaped block onto a goal pose; and a scripted expert.

The block has no friction and stops when nothing touches it, so the outcome of a push is known in advance: the expert
computes the outcomes of many pushes, picks the pair that brings the block closest to its goal, makes the first, and
plans again. It leaves the block alone on the way to the next push.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from vla_foundry.simulators.gymnasium import PresetSimulator, register_expert
from vla_foundry.simulators.simulator import register_simulator

# the block in its own frame: two rectangles (left, low, right, high), the corners around them, the centre of gravity
_RECTANGLES = np.array([(-60, 0, 60, 30), (-15, 30, 15, 120)], float)
_CORNERS = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float)
_GRAVITY = np.array([0.0, 45.0])
# its inertia per mass, pixels squared
_INERTIA = 3000.0
_RADIUS = 15.0
# distance between the places where an edge can be pushed, and of the outer ones from its ends
_SPACING, _MARGIN = 8.0, 3.0
# lengths of pushes
_LENGTHS = np.array([*range(1, 12), *range(12, 24, 2), *range(24, 96, 8)])
# the agent keeps this far from the block on its way, and within these walls
_CLEARANCE = 9.0
_LOW, _HIGH = 10.0, 502.0
# cells of the grid on which its way is planned
_CELL = 12.0
# how far an action may lead the agent on its way
_REACH = 90.0
# a second push must bring the block closer by this much, pixels
_WORTH = 1.0


@register_simulator("pusht")
class PushTSimulator(PresetSimulator):
    """PushT. `push-t` senses the agent's position, `push-t@keypoints` the block's corners too."""

    presets = {
        "push-t": ("gym_pusht:gym_pusht/PushT-v0", "simulators/pusht.yaml"),
        "push-t@keypoints": ("gym_pusht:gym_pusht/PushT-v0", "simulators/pusht_keypoints.yaml"),
    }

    def _draw(self) -> Any:
        # its render() would draw the last action into the picture, that of the last episode too
        return self._environment.unwrapped._render(visualize=False)


@register_expert("pusht")
def create_expert(environment: Any) -> Callable[[], np.ndarray]:
    """Return the expert of an episode."""
    actions = _act(environment)
    return lambda: next(actions)


def _act(environment: Any) -> Iterator[np.ndarray]:
    """Yield the next target of the agent for ever."""
    pushes = _predict_pushes()
    while True:
        pose = np.array([*environment.block.position, environment.block.angle])
        place, inward, length = _choose_push(pushes, pose, environment.goal_pose)
        yield from _approach(environment, pose, place, inward)
        yield from _move(environment, place + inward * (length - _RADIUS), tolerance=0.3)


def _move(environment: Any, target: np.ndarray, *, tolerance: float) -> Iterator[np.ndarray]:
    """Yield a target until the agent is there."""
    for _ in range(25):
        yield target
        if np.linalg.norm(np.array(environment.agent.position) - target) < tolerance:
            return


def _approach(environment: Any, pose: np.ndarray, place: np.ndarray, inward: np.ndarray) -> Iterator[np.ndarray]:
    """Move the agent away from the block, around it, and before the place to push."""
    agent = np.array(environment.agent.position)
    start = _leave(agent, pose, _away(agent, pose))
    goal = _leave(place - inward * (_RADIUS + _CLEARANCE), pose, -inward)
    if np.linalg.norm(start - agent) > 1:
        yield from _move(environment, start, tolerance=5.0)
    way = _find_way(start, goal, pose)
    for _ in range(60):
        agent = np.array(environment.agent.position)
        if np.linalg.norm(agent - goal) < 5:
            return
        near = [point for point in way if np.linalg.norm(point - agent) < _REACH and _is_clear(agent, point, pose)]
        if not near:
            return
        yield near[-1]


def _leave(point: np.ndarray, pose: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return the first point in a direction that is far enough from the block."""
    for distance in range(0, 120, 4):
        moved = point + distance * direction
        if _distance(moved[None], pose)[0] >= _RADIUS + _CLEARANCE:
            return moved
    return point


def _away(point: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Return the direction in which the distance to the block grows fastest."""
    nearby = point + np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])
    right, left, up, down = _distance(nearby, pose)
    gradient = np.array([right - left, up - down])
    return gradient / max(np.linalg.norm(gradient), 1e-6)


def _is_clear(start: np.ndarray, end: np.ndarray, pose: np.ndarray) -> bool:
    """Return whether the agent can go straight from start to end."""
    shares = np.linspace(0, 1, 12)[:, None]
    return bool(_distance(start + shares * (end - start), pose).min() > _RADIUS + _CLEARANCE / 2)


def _distance(points: Float[np.ndarray, "N 2"], pose: np.ndarray) -> Float[np.ndarray, " N"]:
    """Return the distance of points from the block."""
    local = (points - pose[:2]) @ _rotation(pose[2])
    low, high = _RECTANGLES[:, None, :2], _RECTANGLES[:, None, 2:]
    outside = np.maximum(np.maximum(low - local, local - high), 0)
    return np.linalg.norm(outside, axis=-1).min(axis=0)


def _find_way(start: np.ndarray, goal: np.ndarray, pose: np.ndarray) -> list[np.ndarray]:
    """Return points of a short way around the block."""
    number = int((_HIGH - _LOW) / _CELL) + 1
    line = _LOW + _CELL * np.arange(number)
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)
    is_free = (_distance(grid.reshape(-1, 2), pose) > _RADIUS + _CLEARANCE - 1).reshape(number, number)
    first, last = (
        tuple(np.clip(np.rint((point - _LOW) / _CELL), 0, number - 1).astype(int)) for point in (start, goal)
    )
    costs, before, queue = {first: 0.0}, {}, [(0.0, first)]
    while queue:
        cost, cell = heapq.heappop(queue)
        if cell == last:
            break
        for across, along in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            found = (cell[0] + across, cell[1] + along)
            if not (0 <= found[0] < number and 0 <= found[1] < number and (is_free[found] or found == last)):
                continue
            total = cost + float(np.hypot(across, along))
            if total < costs.get(found, np.inf):
                costs[found], before[found] = total, cell
                heapq.heappush(queue, (total, found))
    way, cell = [goal], last
    while cell in before:
        cell = before[cell]
        way.insert(0, grid[cell])
    return way


def _rotation(angle: float) -> np.ndarray:
    return np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])


@dataclass(frozen=True, eq=False)
class _Pushes:
    """Ways to push the block: N places, each with L lengths. All in the block's frame before the push."""

    # points on its edges, and directions to push in (N, 2)
    places: np.ndarray
    inward: np.ndarray
    # how far the centre of gravity moves (N, L, 2), and how far the block turns (N, L); NaN: the agent leaves the edge
    shifts: np.ndarray
    turns: np.ndarray


@lru_cache(maxsize=1)
def _predict_pushes() -> _Pushes:
    """Compute what each push does, in steps of a pixel.

    A push by d along the normal n of an edge, with lever arm r, gives the impulse J = d / (1 + (r x n)^2 / inertia).
    The block moves by J n and turns by J (r x n) / inertia.
    """
    ends = np.roll(_CORNERS, -1, axis=0)
    edges: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start, end in zip(_CORNERS, ends, strict=True):
        along = (end - start) / np.linalg.norm(end - start)
        inward = np.array([-along[1], along[0]])
        for distance in np.arange(_MARGIN, np.linalg.norm(end - start) - _MARGIN + 1e-6, _SPACING):
            place = start + distance * along
            if _distance((place - inward * (_RADIUS + 0.5))[None], np.zeros(3))[0] > _RADIUS:
                edges.append((place, inward, np.array([start, end])))
    places, inward = (np.stack([edge[part] for edge in edges]) for part in (0, 1))
    segments = np.stack([edge[2] for edge in edges])
    shift, turn = np.zeros_like(places), np.zeros(len(places))
    is_valid = np.ones(len(places), bool)
    shifts, turns = [], []
    for length in range(1, int(_LENGTHS.max()) + 1):
        agent = places + inward * (length - _RADIUS)
        rotation = np.stack([_rotation(angle) for angle in turn])
        # edges and normals as they are now
        corners = np.einsum("nij,nkj->nki", rotation, segments - _GRAVITY) + (_GRAVITY + shift)[:, None]
        normal = np.einsum("nij,nj->ni", rotation, inward)
        depth = _RADIUS - np.einsum("ni,ni->n", corners[:, 0] - agent, normal)
        contact = agent + _RADIUS * normal
        arm = contact - (_GRAVITY + shift)
        lever = arm[:, 0] * normal[:, 1] - arm[:, 1] * normal[:, 0]
        impulse = np.maximum(depth, 0) / (1 + lever**2 / _INERTIA)
        shift = shift + impulse[:, None] * normal
        turn = turn + impulse * lever / _INERTIA
        along = corners[:, 1] - corners[:, 0]
        share = np.einsum("ni,ni->n", contact - corners[:, 0], along) / np.einsum("ni,ni->n", along, along)
        is_valid = is_valid & (share > 0) & (share < 1)
        if length in _LENGTHS:
            shifts.append(np.where(is_valid[:, None], shift, np.nan))
            turns.append(np.where(is_valid, turn, np.nan))
    return _Pushes(places, inward, np.stack(shifts, axis=1), np.stack(turns, axis=1))


def _choose_push(pushes: _Pushes, pose: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a push: its place and direction in the world, and its length."""
    to_world, to_goal = _rotation(pose[2]), _rotation(-goal[2])
    centre = pose[:2] + to_world @ _GRAVITY
    offset = to_goal @ (centre - goal[:2]) - _GRAVITY
    angle = (pose[2] - goal[2] + np.pi) % (2 * np.pi) - np.pi
    # after the first push, flattened to (N L, 2) and (N L,)
    offsets = (offset + pushes.shifts @ _rotation(angle).T).reshape(-1, 2)
    angles = (angle + pushes.turns).reshape(-1)
    places = pose[:2] + pushes.places @ to_world.T
    inward = pushes.inward @ to_world.T
    ends = places[:, None] + inward[:, None] * (_LENGTHS[:, None] - _RADIUS)
    starts = places - inward * (_RADIUS + _CLEARANCE)
    is_inside = np.all((starts > _LOW) & (starts < _HIGH), axis=-1, keepdims=True)
    is_inside = is_inside & np.all((ends > _LOW) & (ends < _HIGH), axis=-1)
    first = np.where(is_inside.reshape(-1), _error(offsets, angles), np.inf)
    first = np.where(np.isnan(first), np.inf, first)
    best = int(first.argmin())
    candidates = np.flatnonzero(np.isfinite(first))
    shifts, turns = pushes.shifts.reshape(-1, 2), pushes.turns.reshape(-1)
    known = ~np.isnan(turns)
    # as float32, which is faster
    shifts, turns = shifts[known].astype(np.float32), turns[known].astype(np.float32)
    offsets, angles = offsets.astype(np.float32), angles.astype(np.float32)
    cosines, sines = np.cos(angles[candidates])[:, None], np.sin(angles[candidates])[:, None]
    across = offsets[candidates, :1] + cosines * shifts[:, 0] - sines * shifts[:, 1]
    along = offsets[candidates, 1:] + sines * shifts[:, 0] + cosines * shifts[:, 1]
    second = _error(np.stack([across, along], axis=-1), angles[candidates][:, None] + turns).min(axis=1)
    if second.min() < first[best] - _WORTH:
        best = int(candidates[second.argmin()])
    number, length = divmod(best, len(_LENGTHS))
    return places[number], inward[number], float(_LENGTHS[length])


def _error(offsets: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Return how far the block is from its goal in pixels, as its corners are on average."""
    turned = np.abs(angles)
    turned = np.minimum(turned, 2 * np.pi - turned)
    return np.sqrt(offsets[..., 0] ** 2 + offsets[..., 1] ** 2 + _INERTIA * turned**2)
