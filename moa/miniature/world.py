"""The miniature world: what a picture can show, who can be in it, and which identities belong to which split.

Nothing here draws. A `Scene` is a complete, JSON-able description of one picture; `render.py` turns it into
pixels and masks, `captions.py` into words. Because every attribute is known, "the identity was kept" and "the
context was kept" are facts about labels, not opinions about photographs.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

Split = Literal["pretrain", "train", "validation", "test"]

# --- Vocabularies: value -> words in captions; `{color}` is the place of the colour word -------------------

MAN_TOPS: dict[str, tuple[str, ...]] = {
    "short": ("short {color} hair",),
    "quiff": ("a {color} quiff",),
    "spiky": ("spiky {color} hair",),
    "afro": ("a {color} afro",),
    "mullet": ("a {color} mullet",),
    "undercut": ("a long {color} undercut",),
    "knit_hat": ("a {color} knit hat",),
    "brim_hat": ("a {color} hat",),
    "turban": ("a {color} turban",),
}
WOMAN_TOPS: dict[str, tuple[str, ...]] = {
    "bob": ("a {color} bob",),
    "bun": ("a {color} bun",),
    "curly": ("curly {color} hair",),
    "straight": ("long straight {color} hair",),
    "wavy": ("long wavy {color} hair",),
    "dreadlocks": ("{color} dreadlocks",),
    "flowers": ("flowers in {color} hair",),
    "hijab": ("a {color} hijab",),
    "trapper": ("a {color} fur hat",),
}
TOPS = MAN_TOPS | WOMAN_TOPS
HEADWEAR = frozenset({"knit_hat", "brim_hat", "turban", "hijab", "trapper"})
HAIR_COLORS: dict[str, tuple[str, ...]] = {
    "black": ("black",),
    "brown": ("brown",),
    "blond": ("blond", "golden"),
    "red": ("red",),
    "white": ("white",),
    "pink": ("pink",),
    "blue": ("blue",),
    "green": ("green",),
    "purple": ("purple",),
}
SKINS: dict[str, tuple[str, ...]] = {
    "pale": ("pale skin",),
    "peach": ("peach skin",),
    "tan": ("tan skin",),
    "brown": ("brown skin",),
    "dark": ("dark skin",),
}
FACIAL_HAIR: dict[str, tuple[str, ...]] = {
    "none": (),
    "moustache": ("a moustache",),
    "beard": ("a beard", "a short beard"),
    "long_beard": ("a long beard",),
}
GLASSES: dict[str, tuple[str, ...]] = {
    "none": (),
    "round": ("round glasses",),
    "square": ("square glasses",),
    "sunglasses": ("sunglasses", "dark glasses"),
}
CLOTHES: dict[str, tuple[str, ...]] = {
    "hoodie": ("a {color} hoodie",),
    "blazer": ("a {color} blazer", "a {color} jacket"),
    "overalls": ("{color} overalls",),
    "tshirt": ("a {color} shirt",),
    "vneck": ("a {color} v-neck",),
    "sweater": ("a {color} sweater",),
}
CLOTHES_COLORS: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
}
EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "smiling": ("smiling", "happy"),
    "sad": ("sad", "crying"),
    "surprised": ("surprised", "shocked"),
    "angry": ("angry",),
    "winking": ("winking", "cheeky"),
    "calm": ("calm", "asleep"),
}
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "hills": ("in front of {color} hills", "on {color} hills"),
    "space": ("in space with a {color} planet", "in space by a {color} planet"),
    "waves": ("in front of {color} waves",),
    "quilt": ("in front of a {color} quilt",),
    "stripes": ("in front of {color} stripes",),
    "plaid": ("in front of {color} plaid",),
    "wall": ("in front of a {color} wall", "by a {color} wall"),
}
BACKGROUND_COLORS: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("blue", "green", "orange", "pink")
}
PROPS: dict[str, tuple[str, ...]] = {
    "cup": ("a cup", "a mug"),
    "book": ("a book",),
    "balloon": ("a balloon",),
    "bouquet": ("a bouquet",),
}
BACKGROUND_SEEDS = 32  # pictures per (background, colour): few, so that they can be cached

IDENTITY_ATTRIBUTES = ("top", "hair_color", "skin", "facial_hair", "glasses")
APPEARANCE_ATTRIBUTES = ("clothes", "clothes_color", "expression")
BACKGROUND_ATTRIBUTES = ("background", "background_color")
CONTEXT_ATTRIBUTES = APPEARANCE_ATTRIBUTES + BACKGROUND_ATTRIBUTES

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "class": ("man", "woman"),
    "top": tuple(TOPS),
    "hair_color": tuple(HAIR_COLORS),
    "skin": tuple(SKINS),
    "facial_hair": tuple(FACIAL_HAIR),
    "glasses": tuple(GLASSES),
    "clothes": tuple(CLOTHES),
    "clothes_color": tuple(CLOTHES_COLORS),
    "expression": tuple(EXPRESSIONS),
    "background": tuple(BACKGROUNDS),
    "background_color": tuple(BACKGROUND_COLORS),
    "prop": ("none", *PROPS),
}

# Attribute pairs that only the test identities may show: a model that has learned attributes, rather than
# memorised faces, must be able to join them.
HELD_OUT_PAIRS: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = tuple(
    [(("top", top), ("glasses", glasses)) for top, glasses in (
        ("bun", "sunglasses"), ("hijab", "round"), ("wavy", "square"), ("curly", "none"),
        ("afro", "sunglasses"), ("quiff", "round"), ("turban", "square"))]
    + [(("top", top), ("facial_hair", hair)) for top, hair in (
        ("short", "long_beard"), ("mullet", "moustache"), ("knit_hat", "beard"), ("spiky", "none"))]
    + [(("hair_color", color), ("top", top)) for color, top in (
        ("pink", "short"), ("blue", "quiff"), ("red", "spiky"), ("white", "afro"), ("blond", "mullet"),
        ("black", "undercut"), ("purple", "knit_hat"), ("brown", "brim_hat"), ("green", "turban"),
        ("blue", "bob"), ("white", "bun"), ("green", "straight"), ("black", "wavy"), ("red", "dreadlocks"),
        ("purple", "hijab"), ("pink", "trapper"))]
)  # fmt: skip

# How many men and women each split holds. Women have fewer combinations (no facial hair), hence the unequal
# numbers; `sample_scene` draws the class first, so pictures are balanced all the same.
SPLIT_SIZES: dict[str, tuple[int, int]] = {
    "pretrain": (3120, 880),
    "train": (700, 300),
    "validation": (60, 60),
    "test": (75, 75),
}


def check_value(attribute: str, value: str) -> None:
    """Raise ValueError, listing the choices, unless `value` belongs to the vocabulary of `attribute`."""
    if attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {attribute!r}; choose one of {', '.join(ATTRIBUTES)}")
    if value not in ATTRIBUTES[attribute]:
        choices = ", ".join(ATTRIBUTES[attribute])
        raise ValueError(f"unknown {attribute} {value!r}; choose one of {choices}")


def _from_dict(cls: type, data: dict[str, Any], **converted: Any) -> Any:
    """Build dataclass `cls` from `data`; unknown or missing keys are errors that name the key."""
    names = {f.name for f in fields(cls)}
    if set(data) != names:
        raise ValueError(
            f"{cls.__name__}: unknown keys {sorted(set(data) - names)}, missing {sorted(names - set(data))}"
        )
    return cls(**{**data, **converted})


@dataclass(frozen=True)
class Identity:
    """What stays the same about a subject from picture to picture."""

    id: str  # stable, such as "test-0007"
    top: str  # hair style or headwear; it implies the class, see `class_word`
    hair_color: str  # of hair and beard; of the cloth where the top is headwear
    skin: str
    facial_hair: str
    glasses: str

    def __post_init__(self) -> None:
        for attribute in IDENTITY_ATTRIBUTES:
            check_value(attribute, getattr(self, attribute))
        if self.class_word == "woman" and self.facial_hair != "none":
            raise ValueError(f"top {self.top!r} belongs to a woman, so facial_hair must be 'none'")

    @property
    def class_word(self) -> str:
        """'man' or 'woman', decided by the top."""
        return "man" if self.top in MAN_TOPS else "woman"

    @property
    def attributes(self) -> dict[str, str]:
        """The identity's attributes by name, without its id."""
        return {name: getattr(self, name) for name in IDENTITY_ATTRIBUTES}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Identity:
        return _from_dict(cls, data)


@dataclass(frozen=True)
class Pose:
    """Where a bust stands in the square frame; its shoulders always reach the bottom edge."""

    flip: bool = False
    rotate: float = 0.0  # degrees, about the neck
    scale: float = 1.0  # 1 = the bust is as wide as 5/7 of the frame
    x: float = 0.0  # offset of the neck from the middle, as a fraction of the frame's width

    def __post_init__(self) -> None:
        if not (abs(self.rotate) <= 15 and 0.3 <= self.scale <= 1.5 and abs(self.x) <= 0.5):
            raise ValueError(f"{self} is outside |rotate| <= 15, 0.3 <= scale <= 1.5, |x| <= 0.5")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Pose:
        return _from_dict(cls, data)


@dataclass(frozen=True)
class Appearance:
    """One figure's share of the context: what the prompt, not the subject image, decides."""

    clothes: str
    clothes_color: str
    expression: str
    pose: Pose = field(default_factory=Pose)

    def __post_init__(self) -> None:
        for attribute in APPEARANCE_ATTRIBUTES:
            check_value(attribute, getattr(self, attribute))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Appearance:
        return _from_dict(cls, data, pose=Pose.from_dict(data.get("pose", {})))


@dataclass(frozen=True)
class Context:
    """Everything in a picture but who is in it."""

    background: str
    background_color: str
    background_seed: int  # 0 <= seed < BACKGROUND_SEEDS; a wall looks the same for all of them
    appearances: tuple[Appearance, ...]  # one a figure, left to right

    def __post_init__(self) -> None:
        for attribute in BACKGROUND_ATTRIBUTES:
            check_value(attribute, getattr(self, attribute))
        if not 0 <= self.background_seed < BACKGROUND_SEEDS:
            raise ValueError(f"background_seed {self.background_seed} is outside 0..{BACKGROUND_SEEDS - 1}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"appearances": [a.to_dict() for a in self.appearances]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Context:
        appearances = tuple(Appearance.from_dict(a) for a in data.get("appearances", ()))
        return _from_dict(cls, data, appearances=appearances)


@dataclass(frozen=True)
class Prop:
    """A thing held in front of a figure; it hides part of the figure and is no part of the figure's mask."""

    kind: str
    figure: int = 0  # who holds it
    x: float = 0.0  # offsets of its centre from the mouth, in face widths
    y: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in PROPS:
            raise ValueError(f"unknown prop {self.kind!r}; choose one of {', '.join(PROPS)}")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Prop:
        return _from_dict(cls, data)


@dataclass(frozen=True)
class Scene:
    """One picture: one or two identities in a context, perhaps with a prop."""

    identities: tuple[Identity, ...]
    context: Context
    prop: Prop | None = None
    seed: int = 0  # names the draw, so that captions or noise can be seeded from it; changes no pixel

    def __post_init__(self) -> None:
        count = len(self.identities)
        if count not in (1, 2):
            raise ValueError(f"a scene has 1 or 2 identities, not {count}")
        if len(self.context.appearances) != count:
            raise ValueError(
                f"{count} identities need as many appearances, not {len(self.context.appearances)}"
            )
        if self.prop is not None and not 0 <= self.prop.figure < count:
            raise ValueError(f"prop.figure {self.prop.figure} is outside 0..{count - 1}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description from which `from_dict` rebuilds an equal scene."""
        return {
            "identities": [i.to_dict() for i in self.identities],
            "context": self.context.to_dict(),
            "prop": None if self.prop is None else asdict(self.prop),
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        return _from_dict(
            cls,
            data,
            identities=tuple(Identity.from_dict(i) for i in data.get("identities", ())),
            context=Context.from_dict(data.get("context", {})),
            prop=None if data.get("prop") is None else Prop.from_dict(data["prop"]),
        )


def labels(scene: Scene, figure: int = 0) -> dict[str, int]:
    """Class index, within `ATTRIBUTES`, of every attribute of one figure and of the scene's background.

    Raises IndexError for a figure that the scene does not have.
    """
    identity, appearance = scene.identities[figure], scene.context.appearances[figure]
    values = identity.attributes | {name: getattr(appearance, name) for name in APPEARANCE_ATTRIBUTES}
    values |= {name: getattr(scene.context, name) for name in BACKGROUND_ATTRIBUTES}
    values["class"] = identity.class_word
    values["prop"] = scene.prop.kind if scene.prop and scene.prop.figure == figure else "none"
    return {name: vocabulary.index(values[name]) for name, vocabulary in ATTRIBUTES.items()}


# --- Identity sets ----------------------------------------------------------------------------------------


def is_held_out(attributes: dict[str, str]) -> bool:
    """Whether identity attributes contain a pair that only the test split may show."""
    return any(attributes[a] == x and attributes[b] == y for (a, x), (b, y) in HELD_OUT_PAIRS)


def _combinations(class_word: str) -> list[dict[str, str]]:
    """All identities of a class in a fixed shuffled order.

    Ordered by SHA-256 rather than by a random generator, whose stream may change between library versions.
    """
    tops, beards = (MAN_TOPS, FACIAL_HAIR) if class_word == "man" else (WOMAN_TOPS, ("none",))
    combinations = [
        dict(zip(IDENTITY_ATTRIBUTES, values, strict=True))
        for values in itertools.product(tops, HAIR_COLORS, SKINS, beards, GLASSES)
    ]
    return sorted(combinations, key=lambda c: hashlib.sha256("/".join(c.values()).encode()).hexdigest())


@lru_cache(maxsize=1)
def _splits() -> dict[str, tuple[Identity, ...]]:
    """Deal the shuffled combinations to the splits; half of each class in test has a held-out pair."""
    chosen: dict[str, list[dict[str, str]]] = {split: [] for split in SPLIT_SIZES}
    for index, class_word in enumerate(("man", "woman")):
        combinations = _combinations(class_word)
        seen = iter([c for c in combinations if not is_held_out(c)])
        unseen = iter([c for c in combinations if is_held_out(c)])
        for split, sizes in SPLIT_SIZES.items():
            novel = sizes[index] // 2 if split == "test" else 0
            chosen[split] += itertools.islice(unseen, novel)
            chosen[split] += itertools.islice(seen, sizes[index] - novel)
    return {
        split: tuple(Identity(id=f"{split}-{n:04d}", **c) for n, c in enumerate(combinations))
        for split, combinations in chosen.items()
    }


def identities(split: Split) -> list[Identity]:
    """The identities of a split, always the same and disjoint from the other splits'; men come first."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(get_args(Split))}")
    return list(_splits()[split])


# --- Sampling ---------------------------------------------------------------------------------------------


def _choice(rng: np.random.Generator, vocabulary: Sequence[Any]) -> Any:
    return vocabulary[int(rng.integers(len(vocabulary)))]


def mutate(identity: Identity, rng: np.random.Generator) -> Identity:
    """The same identity but for one attribute."""
    while True:
        name = _choice(rng, IDENTITY_ATTRIBUTES)
        value = _choice(rng, ATTRIBUTES[name])
        if value == getattr(identity, name):
            continue
        try:
            return replace(identity, **{name: value})
        except ValueError:  # a beard on a woman
            continue


def sample_pose(rng: np.random.Generator, figures: int = 1, figure: int = 0) -> Pose:
    """A pose for one figure: near the middle when alone, in its half of the frame when there are two."""
    if figures == 1:
        x, scale, rotate = rng.uniform(-0.07, 0.07), rng.uniform(0.92, 1.06), rng.uniform(-6, 6)
    else:
        x = (-0.25, 0.25)[figure] + rng.uniform(-0.015, 0.015)
        scale, rotate = rng.uniform(0.62, 0.72), rng.uniform(-4, 4)
    return Pose(bool(rng.integers(2)), round(rotate, 1), round(scale, 3), round(x, 3))


def sample_appearance(rng: np.random.Generator, figures: int = 1, figure: int = 0) -> Appearance:
    """Clothes, colour, expression, each uniform, and a pose."""
    values = {name: _choice(rng, ATTRIBUTES[name]) for name in APPEARANCE_ATTRIBUTES}
    return Appearance(**values, pose=sample_pose(rng, figures, figure))


def sample_context(rng: np.random.Generator, figures: int = 1) -> Context:
    """A background, uniform over kinds and colours, and an appearance for each figure."""
    return Context(
        background=_choice(rng, ATTRIBUTES["background"]),
        background_color=_choice(rng, ATTRIBUTES["background_color"]),
        background_seed=int(rng.integers(BACKGROUND_SEEDS)),
        appearances=tuple(sample_appearance(rng, figures, i) for i in range(figures)),
    )


def sample_prop(rng: np.random.Generator, figures: int = 1) -> Prop:
    """A prop over the lower face or the chest of one figure."""
    return Prop(
        kind=_choice(rng, tuple(PROPS)),
        figure=int(rng.integers(figures)),
        x=round(rng.uniform(-0.35, 0.35), 3),
        y=round(rng.uniform(-0.1, 0.45), 3),
        scale=round(rng.uniform(0.85, 1.15), 3),
    )


def sample_identities(
    rng: np.random.Generator, pool: Sequence[Identity], figures: int = 1
) -> tuple[Identity, ...]:
    """Draw distinct identities: first the class, evenly among those in the pool, then one of that class."""
    if len(pool) < figures:
        raise ValueError(f"{figures} figures need at least as many identities, but the pool has {len(pool)}")
    drawn: list[Identity] = []
    while len(drawn) < figures:
        by_class = [[i for i in pool if i.class_word == word and i not in drawn] for word in ("man", "woman")]
        drawn.append(_choice(rng, _choice(rng, [group for group in by_class if group])))
    return tuple(drawn)


def sample_scene(
    rng: np.random.Generator, identities: Sequence[Identity], figures: int = 1, prop: bool = False
) -> Scene:
    """Draw a scene with 1 or 2 figures from `identities`; with `prop`, one figure holds something.

    Two figures stand left and right, left first. Raises ValueError for another number of figures.
    """
    if figures not in (1, 2):
        raise ValueError(f"a scene has 1 or 2 figures, not {figures}")
    return Scene(
        identities=sample_identities(rng, identities, figures),
        context=sample_context(rng, figures),
        prop=sample_prop(rng, figures) if prop else None,
        seed=int(rng.integers(2**31)),
    )
