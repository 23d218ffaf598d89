"""Errors of the data stages."""

from __future__ import annotations

REASONS = {
    "broken_image": "the photo cannot be decoded",
    "empty_caption": "the captioner said nothing",
    "no_person_word": "the caption names nobody",
    "plural": "the caption names people without saying how many",
    "no_segment": "the segmenter found nobody",
    "too_small": "nobody found is large enough",
    "too_many": "more people than a record may hold",
    "outside": "somebody has no pixel in the photo's middle square, which is all that training sees",
    "count_mismatch": "caption and segments disagree on how many there are",
    "truncated": "the caption is too long for the text encoder",
}


class DataError(ValueError):
    """Data that a stage cannot work with; the message names the file or column and the cure."""


class BrokenImage(DataError):
    """Image bytes that cannot be used; the row is put aside with the message, and the run goes on."""


class UnknownWhite(BrokenImage):
    """Grey values of more than 16 bits, or out of range: the file does not say which of them is white."""


class Rejected(Exception):
    """Why a photo becomes no record: one of `REASONS`, and the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
