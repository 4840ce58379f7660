"""How outputs hang together: what each was made from and what was made of it, and in what two of them differ."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from flows.inventory import Inventory, number, recipe_of
from storage import uri
from storage.config import flatten
from storage.header import short_digest
from storage.root import Facts, Output

Both: TypeAlias = tuple[Any, Any]
"""A value of one output and of the other; None where there is none."""


@dataclass(frozen=True)
class Node:
    """An output in a tree."""

    output: str
    """Its path below the root."""
    role: str
    """Its name among the inputs of the one above, which was made from it; else empty."""
    recipe: str
    number: str
    names: list[str]
    state: str
    """``gone`` if it is no longer in the root."""
    repeated: bool
    """Whether it stands further up with all behind it."""
    nodes: "list[Node]"

    def lines(self, depth: int = 0) -> Iterator[str]:
        """One line for each output, indented by its depth."""
        state = "" if self.state == "finished" else self.state
        seen = "as above" if self.repeated else ""
        facts = (self.role and f"as {self.role}", self.recipe, self.number, *self.names, state, seen)
        yield uri.printable("  ".join(filter(None, ("  " * depth + self.output, *facts))))
        for node in self.nodes:
            yield from node.lines(depth + 1)


def made_from(inventory: Inventory, output: Output) -> Node:
    """The tree of all that an output was made from."""
    return _tree(inventory, output.key, "", _sources, set())


def used_by(inventory: Inventory, output: Output) -> Node:
    """The tree of all that was made from an output."""
    return _tree(inventory, output.key, "", _users, set())


Step: TypeAlias = Callable[[Inventory, str], Mapping[str, str]]
"""From an output to the next ones, by their keys, with their roles."""


def _tree(inventory: Inventory, key: str, role: str, step: Step, seen: set[str]) -> Node:
    output, repeated = inventory.by_key.get(key), key in seen
    seen.add(key)
    further = {} if repeated else step(inventory, key)
    nodes = [_tree(inventory, other, its_role, step, seen) for other, its_role in further.items()]
    if output is None:
        return Node(key, role, "", "", [], "gone", repeated, nodes)
    facts = number(output.facts) if output.facts else ""
    return Node(key, role, recipe_of(output), facts, inventory.names(output), str(output.state), repeated, nodes)


def _sources(inventory: Inventory, key: str) -> Mapping[str, str]:
    output = inventory.by_key.get(key)
    return {source.key: name for name, source in output.facts.parents.items()} if output and output.facts else {}


def _users(inventory: Inventory, key: str) -> Mapping[str, str]:
    return {user.key: "" for user in inventory.users.get(key, ())}


@dataclass(frozen=True)
class Difference:
    """In what two outputs of a stage differ."""

    outputs: Both
    """Their paths below the root."""
    config: dict[str, Both]
    """Values by dotted key."""
    inputs: dict[str, Both]
    """Digests by name, also of outputs that they were made from."""
    code: dict[str, Both]
    """Versions of the stage and of the code."""


@dataclass(frozen=True)
class Comparison:
    """In what two outputs differ, with all that they were made from, and what came of it."""

    differences: list[Difference]
    """Of the outputs themselves first, then of what they were made from under the same names."""
    numbers: dict[str, Both]
    """Counts and metrics that differ."""
    evaluations: Both
    """The evaluations that were made from each, with their number."""

    def as_json(self) -> dict[str, Any]:
        """One object."""
        return asdict(self)


def compare(inventory: Inventory, one: Output, other: Output) -> Comparison:
    """Compare two outputs, which may be of different stages."""
    pairs: list[tuple[Output, Output]] = [(one, other)]
    for here, there in pairs:  # which grows
        pairs += [pair for pair in _parents(inventory, here, there) if pair not in pairs]
    return Comparison(
        [_difference(*pair) for pair in pairs],
        _differing(_numbers(one.facts), _numbers(other.facts)),
        (_evaluations(inventory, one), _evaluations(inventory, other)),
    )


def _parents(inventory: Inventory, one: Output, other: Output) -> Iterator[tuple[Output, Output]]:
    """The outputs that two were made from under the same name, where they are not the same."""
    theirs = other.parents
    for name, key in one.parents.items():
        here, there = inventory.by_key.get(key), inventory.by_key.get(theirs.get(name, ""))
        if here and there and here != there:
            yield here, there


def _difference(one: Output, other: Output) -> Difference:
    return Difference(
        (one.key, other.key),
        _differing(*(flatten(each.facts.config) if each.facts else {} for each in (one, other))),
        _differing(*(_inputs(each) for each in (one, other))),
        _differing(*(_code(each.facts) for each in (one, other))),
    )


def _inputs(output: Output) -> dict[str, Any]:
    if output.facts is None:
        return {}
    return {name: output.parents.get(name, short_digest(digest)) for name, digest in output.facts.inputs.items()}


def _code(facts: Facts | None) -> dict[str, Any]:
    if facts is None:
        return {}
    return {"stage": facts.stage, "version": facts.version, "rerun": facts.rerun, "code": facts.code_version}


def _numbers(facts: Facts | None) -> dict[str, Any]:
    return {**facts.counts, **facts.metrics} if facts else {}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Both]:
    keys = dict.fromkeys([*one, *other])
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _evaluations(inventory: Inventory, output: Output) -> list[str]:
    todo, seen, found = [output], {output.key}, []
    for each in todo:  # which grows
        if each.facts and each.facts.distance:
            found.append(f"{each.key}  {number(each.facts)}")
        for user in inventory.users.get(each.key, ()):
            if user.key not in seen:
                seen.add(user.key)
                todo.append(user)
    return sorted(found)
