"""What every benchmark ends with: its goals, whether they hold, and the exit code that says so."""

from collections.abc import Mapping, Sequence

Goal = dict[str, object]
"""``name``, ``value``, ``unit``, ``goal`` in words, and ``holds``."""


def goal(name: str, value: object, unit: str, wanted: str, *, holds: bool) -> Goal:
    """Return one goal as the JSON document holds it."""
    return {"name": name, "value": value, "unit": unit, "goal": wanted, "holds": bool(holds)}


def goal_line(one: Goal) -> str:
    """Say one goal in a line."""
    return f"{'ok  ' if one['holds'] else 'FAIL'} {one['name']}: {one['value']} {one['unit']} (goal {one['goal']})"


def print_goals(goals: Sequence[Goal], environment: Mapping[str, object]) -> None:
    """Print the goals, a line each, and what they were measured in."""
    for one in goals:
        print(goal_line(one))
    print(" · ".join(f"{key} {value}" for key, value in environment.items()))


def exit_code(goals: Sequence[Goal]) -> int:
    """Return 1 when a goal does not hold, else 0."""
    return 0 if all(one["holds"] for one in goals) else 1
