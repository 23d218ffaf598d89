"""Why a photo is put aside before it comes into a raw shard."""

QUARANTINED = {
    "no_image": "the bytes are no picture of a known format, whatever the name says",
    "format": "a picture by its name, in a format that is not decoded",
    "broken": "the picture is cut short or damaged: it cannot be decoded to its last row",
    "grey": "grey values that do not say what is white: signed, of 32 bits, or floats not from 0 to 1",
    "animated": "more than one picture in the file",
    "small_photo": "a side below `min_side`",
    "large_photo": "more pixels than `max_pixels`, or bytes than `max_bytes`; a decompression bomb",
    "link": "a link that leads out of the folder, or nowhere; in a tar, any; in a data set, a path that does",
    "unreadable": "no regular file, or the machine refuses to read it",
    "name": "a name with control characters, or that is no UTF-8",
    "same_id": "another photo has the same id",
    "both_splits": "for training, but a held-out photo has the same bytes",
    "missing": "listed by the archive, but its image, annotation or mask is not there",
    "unlisted": "the archive names it neither for training nor for testing",
    "annotation": "the archive's annotation or mask does not fit the photo",
}
