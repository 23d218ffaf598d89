"""Draw scenes: avataaars busts before CC0 backgrounds, rasterised from SVG, with exact masks.

The same scene gives the same bytes. A figure's alpha channel is its mask, so no annotator is needed.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
import resvg_py
from dicebear import Avatar, Style
from numpy.typing import NDArray
from PIL import Image

from moa.miniature.world import (
    Appearance,
    Context,
    Identity,
    Pose,
    Prop,
    Scene,
    sample_context,
)

CANVAS = 280  # side of avataaars' drawing; all lengths below are in its units
MIDDLE, NECK, SHOULDER = 140, 200, 100  # x of the axis, y of the pivot, half the width of the shoulders
MOUTH_Y, FACE_WIDTH = 158, 112

TOP_VARIANTS = {
    "short": "shortFlat", "quiff": "frizzle", "spiky": "dreads02", "afro": "fro", "mullet": "shaggyMullet",
    "undercut": "shavedSides", "knit_hat": "winterHat02", "brim_hat": "hat", "turban": "turban", "bob": "bob",
    "bun": "bun", "curly": "curly", "straight": "straight02", "wavy": "bigHair", "dreadlocks": "dreads",
    "flowers": "frida", "hijab": "hijab", "trapper": "winterHat1",
}  # fmt: skip
HAIR_HEX = {
    "black": "#1e1a1d", "brown": "#7a4522", "blond": "#f0c64a", "red": "#d8431c", "white": "#eeeeee",
    "pink": "#f77fb0", "blue": "#3b78dd", "green": "#37a85e", "purple": "#8547c2",
}  # fmt: skip
SKIN_HEX = {"pale": "#ffe6d8", "peach": "#f3b88c", "tan": "#cc8650", "brown": "#9c5d31", "dark": "#643f2e"}
FACIAL_HAIR_VARIANTS = {"moustache": "moustacheMagnum", "beard": "beardLight", "long_beard": "beardMajestic"}
GLASSES_VARIANTS = {"round": "round", "square": "prescription02", "sunglasses": "wayfarers"}
# Thin round frames vanish on dark skin at 64 pixels unless they have a colour that no skin has.
GLASSES_HEX = {"round": "#14b8cf", "square": "#17181c", "sunglasses": "#17181c"}
CLOTHES_VARIANTS = {
    "hoodie": "hoodie", "blazer": "blazerAndShirt", "overalls": "overall", "tshirt": "shirtCrewNeck",
    "vneck": "shirtVNeck", "sweater": "collarAndSweater",
}  # fmt: skip
CLOTHES_HEX = {
    "red": "#d6302f", "orange": "#f58a24", "yellow": "#f8dc3c", "green": "#2f9e50", "blue": "#2d6bdb",
    "purple": "#8844c4", "white": "#e9ebee", "black": "#2a2a2f",
}  # fmt: skip
# (eyes, eyebrows, mouth): the mouths all differ, because sunglasses hide the rest.
EXPRESSION_VARIANTS = {
    "smiling": ("happy", "default", "smile"),
    "sad": ("cry", "sadConcerned", "sad"),
    "surprised": ("surprised", "raisedExcited", "screamOpen"),
    "angry": ("squint", "angry", "grimace"),
    "winking": ("wink", "upDown", "tongue"),
    "calm": ("closed", "flatNatural", "serious"),
}
BACKGROUND_STYLES = {
    "hills": "landscape", "space": "planets", "waves": "waves", "quilt": "patchwork", "stripes": "stripes",
    "plaid": "weave",
}  # fmt: skip
# Colours from light to dark; every background kind paints itself with the same four.
SHADES = {
    "blue": ("#dcebfa", "#a5c9ec", "#5f9bd8", "#2f6bb3", "#1d4273"),
    "green": ("#e0f2de", "#aed6a6", "#6cb26b", "#37803f", "#1f5029"),
    "orange": ("#fdeed6", "#f8cd94", "#f0a04b", "#cf6f1c", "#8a4512"),
    "pink": ("#fde4ee", "#f7b6d0", "#ea7dab", "#c74680", "#812552"),
}
NIGHTS = {"blue": "#13244a", "green": "#0f3324", "orange": "#40230f", "pink": "#40153a"}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Rendered:
    """A picture and whose pixels are whose."""

    image: Pixels  # [size, size, 3], 0..255
    mask: Pixels  # [size, size], 0 = background or prop, i + 1 = figure i


@cache
def _style(name: str) -> Style:
    """A drawing style; building one takes up to half a second, so each is built once."""
    return Style(json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))


def _draw(style: str, options: Mapping[str, object]) -> str:
    """What lies between a drawing's <svg> tags, without licence metadata and without its clip to the canvas.

    The clip would cut a turned or shifted bust along the old frame.
    """
    body = re.sub(
        r"^<svg[^>]*>|</svg>$|<!--.*?-->|<metadata.*?</metadata>",
        "",
        Avatar(_style(style), dict(options)).to_string(),
    )
    return body if style != "avataaars" else re.sub(r' clip-path="url\(#clip-[0-9a-f]+\)"', "", body, count=1)


def _rasterise(body: str, size: int, side: int = CANVAS, transform: str = "") -> Pixels:
    """RGBA pixels, [size, size, 4], of an SVG fragment drawn on a canvas of `side` units."""
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">'
        f'<g fill="none" transform="{transform}">{body}</g></svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def _over(top: Pixels, bottom: Pixels) -> Pixels:
    """Lay RGBA `top` over RGB `bottom`; whole numbers only, so that every machine gets the same bytes."""
    color, alpha = top[..., :3].astype(np.uint32), top[..., 3:].astype(np.uint32)
    return ((color * alpha + bottom * (255 - alpha) + 127) // 255).astype(np.uint8)


def _figure_options(identity: Identity, appearance: Appearance) -> dict[str, object]:
    """Options that pin every part of a bust: whatever is left open would vary with the seed."""
    hair, eyes_brows_mouth = HAIR_HEX[identity.hair_color], EXPRESSION_VARIANTS[appearance.expression]
    return {
        "seed": "miniature",
        "topVariant": TOP_VARIANTS[identity.top],
        "topProbability": 100,
        "hairColor": hair,
        "hatColor": hair,
        "facialHairColor": hair,
        "skinColor": SKIN_HEX[identity.skin],
        "facialHairVariant": FACIAL_HAIR_VARIANTS.get(identity.facial_hair, "beardLight"),
        "facialHairProbability": 100 * (identity.facial_hair != "none"),
        "accessoriesVariant": GLASSES_VARIANTS.get(identity.glasses, "round"),
        "accessoriesProbability": 100 * (identity.glasses != "none"),
        "accessoriesColor": GLASSES_HEX.get(identity.glasses, "#17181c"),
        "clothesVariant": CLOTHES_VARIANTS[appearance.clothes],
        "clothesColor": CLOTHES_HEX[appearance.clothes_color],
        "clothesGraphicVariant": "bear",
        "noseVariant": "default",
        **dict(zip(("eyesVariant", "eyebrowsVariant", "mouthVariant"), eyes_brows_mouth, strict=True)),
    }


def _transform(pose: Pose) -> str:
    """SVG transform that puts a bust into the frame with its shoulders on or below the bottom edge."""
    lift = SHOULDER * abs(
        math.sin(math.radians(pose.rotate))
    )  # by which turning raises one end of the shoulders
    sunk = (
        0.9 * CANVAS * max(0.0, pose.scale - 1)
    )  # what does not fit goes out at the bottom, not at the hair
    x = MIDDLE + pose.x * CANVAS
    y = CANVAS - pose.scale * (CANVAS - NECK - lift) + sunk
    mirror = -1 if pose.flip else 1
    return (
        f"translate({x:.3f} {y:.3f}) rotate({pose.rotate}) "
        f"scale({mirror * pose.scale} {pose.scale}) translate({-MIDDLE} {-NECK})"
    )


def _figure(identity: Identity, appearance: Appearance, size: int) -> Pixels:
    """One bust in its place in the frame: RGBA, [size, size, 4]."""
    body = _draw("avataaars", _figure_options(identity, appearance))
    return _rasterise(body, size, transform=_transform(appearance.pose))


def _background_options(kind: str, color: str) -> dict[str, str]:
    """Colours of a background kind; its shapes are left to the seed."""
    pale, light, middle, deep, dark = SHADES[color]
    still = {"animationVariant": "none"}
    if kind == "hills":
        hills = dict(
            zip(
                ("hill1Color", "hill2Color", "hill3Color", "hill4Color"),
                (light, middle, deep, dark),
                strict=True,
            )
        )
        return still | hills | {"backgroundColor": pale, "orbColor": "#f8b734"}
    if kind == "space":
        return still | {"backgroundColor": NIGHTS[color], "planetColor": middle, "moonColor": "#d3d7e2"}
    if kind == "waves":
        return still | {"backgroundColor": deep, "waveColor": "#ffffff"}
    if kind == "quilt":
        return {
            "backgroundColor": "#f6f0e2",
            "fabricAColor": deep,
            "fabricBColor": middle,
            "fabricCColor": light,
        }
    if kind == "stripes":
        return still | {"backgroundColor": light, "stripeColor": deep}
    if kind == "plaid":
        return {
            "backgroundColor": pale,
            "colorAColor": middle,
            "colorBColor": deep,
            "colorCColor": light,
            "lineColor": dark,
        }
    raise ValueError(f"background {kind!r} has no drawing style")


@lru_cache(maxsize=1024)
def _background(kind: str, color: str, seed: int, size: int) -> Pixels:
    """A background without anyone in it: RGB, [size, size, 3], read-only because it is shared."""
    wall = np.array([int(SHADES[color][1][i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    image = np.broadcast_to(wall, (size, size, 3))
    if kind != "wall":
        options = _background_options(kind, color) | {"seed": f"{kind}-{seed}"}
        image = _over(_rasterise(_draw(BACKGROUND_STYLES[kind], options), size, side=100), image)
    image.flags.writeable = False
    return image


# Props are drawn about their own centre, 100 units wide, and follow the figure that holds them.
PROP_SVG = {
    "cup": '<path d="M30 -22h16a20 22 0 0 1 0 46h-20" stroke="#b3261e" stroke-width="10"/>'
    '<path d="M-38 -42h72l-6 84a10 10 0 0 1 -10 8h-40a10 10 0 0 1 -10 -8z" fill="#e2382e"/>'
    '<ellipse cx="-2" cy="-42" rx="36" ry="9" fill="#fff2e0"/>'
    '<path d="M-35 -6h66l-2 22h-62z" fill="#fff2e0"/>',
    "book": '<path d="M-62 -40h62v84h-62z" fill="#1f7a4d"/><path d="M0 -40h62v84h-62z" fill="#28945e"/>'
    '<path d="M-4 -44h8v92h-8z" fill="#125534"/><path d="M12 -22h38v12h-38z M12 2h26v8h-26z" fill="#ffe9a8"/>'
    '<path d="M-52 -26h38v50h-38z" fill="#ffe9a8"/>',
    "balloon": '<path d="M0 50q14 30 -4 80t6 90" stroke="#333" stroke-width="4"/>'
    '<ellipse rx="42" ry="52" fill="#ffcf1f"/>'
    '<path d="M-9 60h18l-9 -14z" fill="#d9a800"/><ellipse cx="-15" cy="-20" rx="9" ry="14" fill="#fff6cf"/>',
    "bouquet": '<path d="M-26 6h52l-18 88h-16z" fill="#3f9b4f"/>'
    '<path d="M-32 22h64l-20 74h-24z" fill="#f3ead7"/>'
    + "".join(
        f'<circle cx="{x}" cy="{y}" r="18" fill="{petal}"/><circle cx="{x}" cy="{y}" r="7" fill="#ffe27a"/>'
        for x, y, petal in (
            (-30, 4, "#e23c7d"), (30, 4, "#e23c7d"), (-17, -25, "#8e4fd0"), (17, -25, "#ff7a3d"),
            (0, 4, "#ffffff"),
        )
    ),
}  # fmt: skip


def _prop(prop: Prop, pose: Pose, size: int) -> Pixels:
    """A prop before its holder: RGBA, [size, size, 4]."""
    x, y = MIDDLE + prop.x * FACE_WIDTH, MOUTH_Y + prop.y * FACE_WIDTH
    body = f'<g transform="translate({x:.3f} {y:.3f}) scale({prop.scale})">{PROP_SVG[prop.kind]}</g>'
    return _rasterise(body, size, transform=_transform(pose))


def background(context: Context, size: int = 64) -> Pixels:
    """The background of a scene with nobody before it: uint8 [size, size, 3]."""
    return _background(context.background, context.background_color, context.background_seed, size)


def prop_mask(scene: Scene, size: int = 64) -> NDArray[np.bool_]:
    """Where the scene's prop is: [size, size], empty without one."""
    if scene.prop is None:
        return np.zeros((size, size), bool)
    return _prop(scene.prop, scene.context.appearances[scene.prop.figure].pose, size)[..., 3] >= 128


def render(scene: Scene, size: int = 64) -> Rendered:
    """Draw a scene on size × size pixels: later figures before earlier ones, the prop before all of them."""
    context = scene.context
    image = background(context, size)
    mask = np.zeros((size, size), np.uint8)
    for index, (identity, appearance) in enumerate(zip(scene.identities, context.appearances, strict=True)):
        layer = _figure(identity, appearance, size)
        image = _over(layer, image)
        mask[layer[..., 3] >= 128] = index + 1
    if scene.prop is not None:
        layer = _prop(scene.prop, context.appearances[scene.prop.figure].pose, size)
        image = _over(layer, image)
        mask[layer[..., 3] >= 128] = 0
    return Rendered(image, mask)


def render_subject(
    identity: Identity, appearance: Appearance, size: int = 64, seed: int = 0, prop: Prop | None = None
) -> Rendered:
    """The photo a user hands in: `identity` alone, perhaps with a prop; `seed` chooses the background."""
    drawn = sample_context(np.random.default_rng(seed))
    context = Context(drawn.background, drawn.background_color, drawn.background_seed, (appearance,))
    return render(Scene((identity,), context, prop, seed), size)
