"""Random recipes: odd values of a preset's fields in odd spellings, in the file or by --set, below an odd root.

Every spelling comes with its obvious reading: a value, or `REFUSED`. A spelling of which a person cannot be sure is
`DOUBTFUL`: it may be refused, but must not become anything else than the text that was written.
"""

import json
import random
from dataclasses import dataclass, field
from typing import Any

REFUSED = object()
NUMBERS = ("train.steps", "train.batch_size", "sample.count", "train.seed", "train.log_every", "train.micro_batch")
REALS = ("train.learning_rate", "sample.guidance_scale", "train.ema_ramp", "train.gradient_clip")
TRUTHS = ("train.flips", "train.compile", "train.checkpoint_activations")
TEXTS = ("archive.train", "archive.held_out", "encode.vae.source", "evaluate.extractor.weights", "registry.rule.metric")
LETTERS = "ab Z09-_.,;:/#%?&+=@!~^$()[]{}<>|*'\"\\`éß图🙂\t"
WORDS = (
    "no",
    "Yes",
    "off",
    "true",
    "null",
    "~",
    "1:30",
    "0100",
    "1e3",
    "2024-01-01",
    "0x1F",
    "1_000",
    ".5",
    "12",
    "<<",
)
ROOTS = (
    "a b",
    "a#b",
    "a%20b",
    "a+b",
    "a::b",
    "é图",
    "-a",
    "~a",
    "'a\"",
    "[a]*",
    "{a}",
    "${recipe_dir}",
    "$HOME",
    "a?b=c",
)


@dataclass(frozen=True)
class Written:
    """What a user wrote for one field."""

    key: str
    text: str
    """As it stands behind the colon, or behind the equals sign of --set."""
    value: object
    """What it says, or `REFUSED`."""
    doubtful: bool = False
    """Whether it may be refused as well."""


@dataclass
class Case:
    """A recipe's file and the arguments beside it."""

    root: str
    lines: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    written: dict[str, Written] = field(default_factory=dict)
    twice: bool = False
    """Whether the file names a key twice."""


def random_recipe(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    case = Case(rng.choice(ROOTS))
    groups: dict[str, list[str]] = {}
    for key in [*rng.sample(NUMBERS + REALS + TRUTHS, 2), *rng.sample(TEXTS, 2)]:
        in_file = rng.random() < 0.6
        written = _written(rng, key, in_file=in_file)
        case.written[key] = written
        if not in_file:
            case.overrides.append(f"{key}={written.text}")
            continue
        group, _, name = key.partition(".")
        groups.setdefault(group, []).append(f"{name.replace('.', ': {')}: {written.text}{'}' * name.count('.')}")
    if groups and rng.random() < 0.1:
        some = groups[rng.choice(sorted(groups))]
        some.append(some[0])
        case.twice = True
    for group, lines in groups.items():
        case.lines += [f"{group}:", *(f"  {line}" for line in lines)]
    return case


def _written(rng: random.Random, key: str, *, in_file: bool) -> Written:
    if key in TEXTS:
        text, value, doubtful = _text(rng, in_file=in_file, flow=key.count(".") > 1)
    else:
        spell = _number if key in NUMBERS else _real if key in REALS else _truth
        text, value, doubtful = *spell(rng), False
    return Written(key, text, value, doubtful)


def _number(rng: random.Random) -> tuple[str, object]:
    number = rng.choice([1, 7, 8, 64, 100, 4096, 123_456, 1_000_000])
    good = [str(number), f"+{number}", f"{number:_}", f"{number} # so many"]
    bad = [
        f"0{number}",
        f"0o{number:o}",
        hex(number),
        bin(number),
        f"'{number}'",
        f'"0{number}"',
        "1:30",
        "true",
        "yes",
    ]
    bad += [
        f"{number}.5",
        "many",
        "[1]",
        f"{number}_",
        ".nan",
        f"-{number}",
        "2024-01-01",
        f"{number},000",
        f"!!int {number}",
    ]
    return _either(rng, good, number, bad)


def _real(rng: random.Random) -> tuple[str, object]:
    number = rng.choice([0.5, 1.5, 1e-4, 3.0, 250.0])
    good = [repr(number), f"{number:e}", f"+{number}", f"{number} # a guess"]
    bad = [
        f"'{number}'",
        ".inf",
        "nan",
        "1_0.5",
        "01.5",
        "true",
        "on",
        "1:30.5",
        "0x1",
        "1,5",
        "null.",
        "1.2.3",
        "{a: 1}",
    ]
    return _either(rng, good, number, bad)


def _truth(rng: random.Random) -> tuple[str, object]:
    number = rng.choice([True, False])
    good = [str(number), str(number).lower(), str(number).upper()]
    return _either(
        rng, good, number, ["yes", "No", "on", "OFF", "y", "0", "1", "1.0", "'true'", '"no"', "null", "maybe"]
    )


def _either(rng: random.Random, good: list[str], value: object, bad: list[str]) -> tuple[str, object]:
    return (rng.choice(good), value) if rng.random() < 0.75 else (rng.choice(bad), REFUSED)


def _text(rng: random.Random, *, in_file: bool, flow: bool) -> tuple[str, object, bool]:
    odd = "".join(rng.choices(LETTERS, k=rng.randint(1, 12)))
    name = rng.choice([odd, f"/data/{odd}", f"x{odd}", rng.choice(WORDS), "/data/a #1", "/data/C#", "/data/a\n  b"])
    if not in_file and name[0] not in "'\"" and name != "null":
        return name, name, True  # as typed; a place is refused if it can be read in two ways
    style = rng.random()
    if style < 0.3:
        return "'" + name.replace("'", "''") + "'", name, True
    if style < 0.6:
        return json.dumps(name, ensure_ascii=rng.random() < 0.3), name, True
    if style < 0.8 and in_file and not flow:
        plain = "".join(rng.choices("abcXYZ/._-", k=8))
        return f"/{plain} # where they lie", f"/{plain}", False
    return name, None if name in ("null", "~") else name.strip(" \t"), True


def held(recipe: Any, key: str) -> object:
    """The value of a field by its dotted key."""
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe
