"""YAML in which what is written is what is read.

PyYAML follows YAML 1.1, where ``0100`` is 64, ``1:30`` is 90, ``no`` is false, the last of two equal keys wins, and a
few lines of aliases can stand for millions of values. Here a plain scalar is a decimal number, ``true``, ``false``,
``null`` or text, as in the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2, section 10.3), and whatever the two
versions read differently is refused; but thousands may be set apart, as in ``400_000``.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from storage.errors import InputError
from storage.magic import HEAD, stand_in

MAX_DEPTH = 50
_STRING = "tag:yaml.org,2002:str"
_NUMBER = r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?"
_CORE = {
    "tag:yaml.org,2002:null": re.compile(r"null|Null|NULL|~|"),
    "tag:yaml.org,2002:bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9]\d*|[1-9]\d{0,2}(_\d{3})+)", re.ASCII),
    "tag:yaml.org,2002:float": re.compile(rf"(?![-+]?0\d){_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII),
}
_YAML11 = yaml.resolver.Resolver()
_HASH = re.compile(r"#|[ \t]+#(?![ \t\r\n#\0]|$)")
_YAML12_ALONE = re.compile(r"[-+]?0\d+|0o[0-7]+", re.ASCII)
_YAML11_NAMES = {
    "int": "a number in another notation",
    "float": "a number in another notation",
    "bool": "a truth value",
}


def parse(text: str, where: str) -> Any:
    """The value of a YAML document.

    Args:
        text: the document.
        where: what to call it in an error.

    Raises:
        InputError: it is not YAML, says something twice, or holds what two versions of YAML read differently; the
            line says where.

    Examples:
        >>> parse("steps: 400_000", "my.yaml")
        {'steps': 400000}
        >>> parse("flips: no", "my.yaml")
        Traceback (most recent call last):
        storage.errors.InputError: ...
    """
    if (instead := stand_in(text[:HEAD].encode())) is not None:
        raise InputError(f"{where}: {instead}")
    try:
        return _Loader(text).get_single_data()
    except _RefusedError as error:
        assert error.problem_mark is not None
        raise InputError(f"{where}: line {error.problem_mark.line + 1}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: thousands of digits
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


class _RefusedError(yaml.MarkedYAMLError):
    """YAML, but not what can be read in one way alone."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """Reads the core schema alone, each key once, and no aliases."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node of the document; an alias, or one too deep, is refused."""
        mark = self.peek_event().start_mark
        if getattr(self.peek_event(), "tag", None) not in (None, "!"):
            raise _RefusedError("tags are not supported; write the value alone", mark)
        if self.check_event(yaml.AliasEvent):
            raise _RefusedError("aliases are not supported; write the value out", mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _RefusedError(f"nested deeper than {MAX_DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode):  # JSON writes some letters as two escapes, which PyYAML leaves apart
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
            if node.style not in ("|", ">"):
                _check_extent(node)
        elif isinstance(node, yaml.CollectionNode) and node.flow_style:
            _check_extent(node)
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            _check_notation(node)
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """The tag of a node that has none."""
        if kind is yaml.ScalarNode and implicit[0]:
            return next((tag for tag, pattern in _CORE.items() if pattern.fullmatch(value)), _STRING)
        return str(super().resolve(kind, value, (False, True)))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping, in which a key that stands twice is refused."""
        lines: dict[Any, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                twice = f"{key.value} is already set in line {lines[key.value]}; keep one of the two"
                raise _RefusedError(twice, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _check_extent(node: yaml.Node) -> None:
    """Refuse a value that may end elsewhere than its writer believes: at a ``#``, or on the next line."""
    end = node.end_mark
    if isinstance(node, yaml.ScalarNode) and node.start_mark.line != end.line:
        raise _RefusedError("the text goes on in the next line; write it in one line, or below a |", node.start_mark)
    if _HASH.match(str(end.buffer), end.pointer):
        raise _RefusedError("# begins a comment here; put the value in quotes, or a space before and behind the #", end)


def _check_notation(node: yaml.ScalarNode) -> None:
    """Refuse text that YAML 1.1 reads as something else."""
    tag = _YAML11.resolve(yaml.ScalarNode, node.value, (True, False))
    if tag == _STRING and _YAML12_ALONE.fullmatch(node.value):
        tag = "tag:yaml.org,2002:int"
    if node.tag == _STRING and tag != _STRING:
        kind = _YAML11_NAMES.get(tag.rpartition(":")[2], "a date or another special value")
        advice = "write numbers in decimal, true or false for truth values, and text in quotes"
        problem = f"{node.value} can be read as {kind}; {advice}"
        raise _RefusedError(problem, node.start_mark)
