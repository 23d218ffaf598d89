"""Validation images while training: the loss says little, a picture says whether it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from moa.methods import Method, Request, Subject
from moa.training.dataset import keyed_seed

LINE, SIDE = 14, 128  # pixels: height of a line of titles, least side of a cell


@dataclass
class ValidationGrid:
    """Fixed subjects, prompts and seeds; rows are subjects, columns photo, then prior and method a prompt."""

    subjects: Sequence[Subject]
    prompts: Sequence[str]  # with `{word}` in the place of the subject's word
    seed: int
    prior_images: Sequence[Image.Image] = ()

    def prepare(self, prior: Method) -> None:
        """Sample from the prior; before training, because FastComposer trains the prior's own U-Net."""
        self.prior_images = prior.generate(self.requests())

    def requests(self) -> list[Request]:
        """A request for each subject and prompt; noise follows the prompt, so that a column is comparable."""
        requests = []
        for subject in self.subjects:
            for template in self.prompts:
                before = template.index("{word}")
                requests.append(
                    Request(
                        prompt=template.replace("{word}", subject.word),
                        spans=((before, before + len(subject.word)),),
                        subjects=(subject,),
                        seed=keyed_seed(self.seed, template, "validation"),
                    )
                )
        return requests

    def draw(self, method: Method) -> Image.Image:
        """Sample from the method as it is and lay everything out."""
        columns = len(self.prompts)
        made = method.generate(self.requests())
        rows = []
        for r, subject in enumerate(self.subjects):
            part = slice(r * columns, (r + 1) * columns)
            pairs = zip(self.prior_images[part], made[part], strict=True)
            rows.append([subject.image, *(image for pair in pairs for image in pair)])
        prompts = [template.replace("{word}", "…") for template in self.prompts]
        return grid(rows, ["subject", *(["prior", method.name] * columns)], prompts)


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], prompts: Sequence[str]) -> Image.Image:
    """Images of any sizes in equal cells, under the columns' titles; each prompt stands above two columns."""
    side = max(SIDE, *(image.height for row in rows for image in row[1:]))
    canvas = Image.new("RGB", (side * len(titles), side * len(rows) + 2 * LINE), "white")
    pen = ImageDraw.Draw(canvas)
    for number, prompt in enumerate(prompts):
        pen.text(((1 + 2 * number) * side + 2, 1), prompt, fill="black", font_size=10)
    for column, title in enumerate(titles):
        pen.text((column * side + 2, LINE + 1), title, fill="black", font_size=10)
        for row, images in enumerate(rows):
            cell = images[column].convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(cell, (column * side, row * side + 2 * LINE))
    return canvas
