"""What a source holds, found without reading a photo: ids, places, splits and shards.

Split and shard follow from SHA-256 of a photo's id alone, never from its place in a listing or from what else
is there: a photo that is added or taken away moves no other, and one changed file redoes one shard.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from moa.data.errors import DataError
from moa.data.sources.config import PhotosConfig
from moa.lockfile import read_lines

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".mpo"}
)
# Photos of phones and cameras that are not decoded. Pillow opens some raw ones as TIFF, at the small preview.
UNDECODED = frozenset(
    {".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".jxr", ".psd", ".3fr", ".arw", ".cr2"}
    | {".cr3", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2"}
    | {".srw", ".x3f"}
)
COMPANIONS = (".json", ".npy")  # beside a photo of FastComposer's archive


@dataclass(frozen=True)
class Found:
    """A photo of a source; with a reason, one that is put aside for where it lies, not for what it shows."""

    id: str
    name: str  # what the lock and messages call it: a path below the source, "0001.tar/a.jpg", a row
    file: str  # path below the source of the file that holds the bytes; of a data set ""
    offset: int  # of its first byte in that file; of a data set the row
    size: int  # bytes; of a data set 0
    modified: int = 0  # of the file, nanoseconds
    split: str = ""  # "train" or "validation" where the source says so itself
    reason: str = ""
    detail: str = ""


# --- Splits and shards ------------------------------------------------------------------------------------


def position(name: str, salt: str) -> float:
    """Where SHA-256 puts a name in 0..1; evenly, and independently for each salt."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:6], "big") / 2**48


def split_of(photo: str, held_out: float) -> str:
    """ "validation" for a share `held_out` of all ids, otherwise "train"; a larger share only adds ids."""
    return "validation" if position(photo, "split") < held_out else "train"


def shard_of(photo: str, shards: int) -> int:
    """The shard, 0..shards - 1, of an id within its split."""
    return int(position(photo, "shard") * shards)


# --- Folders ----------------------------------------------------------------------------------------------


def leads_out(path: str, root: str) -> bool:
    """Whether a path leads out of `root`, which is a real path, or nowhere."""
    target = os.path.realpath(path)
    return not os.path.exists(target) or os.path.commonpath([target, root]) != root


def printable(name: str) -> bool:
    """Whether a name can stand in a line of UTF-8; what is no UTF-8 comes as surrogates."""
    return not any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in name)


def escaped(name: str) -> str:
    """A name in ASCII, to speak of one that is not `printable`."""
    return ascii(name)[1:-1]  # without its quotes


def _shown(name: str) -> str:
    return name if printable(name) else escaped(name)


def _target(name: str, target: str) -> str:
    """What is said of a link."""
    return f"{name} → {_shown(target)}"


def _file(entry: os.DirEntry[str], name: str, root: str) -> Found:
    """One file or link of a folder."""
    if not printable(name):
        shown = escaped(name)
        return Found(shown, shown, "", 0, 0, reason="name", detail=f"the name {shown!r}")
    here = Found(name, name, name, 0, 0)
    if entry.is_symlink() and leads_out(entry.path, root):
        return replace(here, reason="link", detail=_target(name, os.readlink(entry.path)))
    status = entry.stat()
    if not entry.is_file():
        return replace(here, reason="unreadable", detail=f"{name} is no regular file")
    if not os.access(entry.path, os.R_OK):  # known here, so that the stamp changes with the rights
        return replace(here, reason="unreadable", detail=f"{name} may not be read")
    return replace(here, size=status.st_size, modified=status.st_mtime_ns)


def files(root: Path, suffixes: Iterable[str] = ()) -> Iterator[Found]:
    """Files below `root` whose names end like `suffixes` (without any: all), but hidden ones.

    Links to folders are not followed. Raises DataError where photos would be lost uncounted: for a folder
    that cannot be read and, with `suffixes`, for a link to one that is not looked at where it lies.
    """
    top, wanted = os.path.realpath(root), frozenset(suffixes)
    todo = [top]
    while todo:
        folder = todo.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(
                f"{folder} cannot be read ({error}); correct data.photos.path or its rights"
            ) from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = Path(entry.path).relative_to(top).as_posix()
            if entry.is_dir(follow_symlinks=False):
                todo.append(entry.path)
            elif wanted and entry.is_symlink() and _to_folder(entry.path, top):
                raise _not_followed(entry.path, "folder")
            elif os.path.isdir(entry.path):
                found = _file(entry, name, top)
                if found.reason == "link":
                    yield found
            elif not wanted or PurePosixPath(name).suffix.lower() in wanted:
                yield _file(entry, name, top)


def _to_folder(link: str, root: str) -> bool:
    """Whether a link leads to a folder that is not looked at where it lies; or may, if it leads nowhere."""
    if not os.path.exists(link):
        return not PurePosixPath(link).suffix
    inside = Path(os.path.relpath(os.path.realpath(link), root))  # "..", too, begins with a dot
    return os.path.isdir(link) and any(part.startswith(".") for part in inside.parts)


def _not_followed(link: str, what: str) -> DataError:
    return DataError(
        f"{_shown(link)} is a link to {_shown(os.readlink(link))}, and what lies there could not be counted: "
        f"give that {what} as data.photos.path, move or copy it to where the link is, or take the link away"
    )


def _decodable(found: Found, ending: str) -> Found:
    """The photo, with a reason if its name's ending says that it cannot be decoded."""
    if found.reason or ending.lower() not in UNDECODED:
        return found
    return replace(found, reason="format", detail=f"{found.name}: {ending} is not decoded; save it as PNG")


def _folder(config: PhotosConfig) -> Iterator[Found]:
    for found in files(Path(config.path), SUFFIXES | UNDECODED):
        path = PurePosixPath(found.id)
        named = replace(found, id=path.stem if config.ids == "name" else path.with_suffix("").as_posix())
        yield _decodable(named, path.suffix)


# --- Tars -------------------------------------------------------------------------------------------------


def _tars(config: PhotosConfig) -> Iterator[Found]:
    """The images of all tars, by WebDataset's rule: the key ends at the first dot of the name."""
    tars = sorted(files(Path(config.path), {".tar"}), key=lambda tar: tar.name)
    if not tars:
        raise DataError(f"data.photos.path: no .tar below {config.path}; unpack .tar.gz, or correct it")
    for tar in tars:
        if tar.reason:
            raise _unopened(config, tar)
        yield from _members(config, tar)


def _unopened(config: PhotosConfig, tar: Found) -> DataError:
    """What is said of a tar that is put aside: nobody knows how many photos go with it."""
    if tar.reason == "link":
        return _not_followed(os.path.join(config.path, tar.name), "tar's folder")
    return DataError(
        f"data.photos.path: a tar below {config.path} cannot be opened ({tar.detail}); mend its name or "
        "rights, or take it away: what is in it cannot be counted"
    )


def _members(config: PhotosConfig, tar: Found) -> Iterable[Found]:
    """The images of a tar, of several members with one name the last. Raises DataError for a damaged one."""
    path = Path(config.path, tar.file)
    last: dict[str, Found] = {}
    try:
        with tarfile.open(path, "r:") as members:
            for member in members:
                folder, _, base = member.name.rpartition("/")
                key, dot, ending = base.partition(".")
                if base.startswith(".") or member.isdir():
                    continue
                if (dot + ending).lower() not in SUFFIXES | UNDECODED:
                    continue
                name = f"{tar.file}/{member.name}"
                whole = "/".join(filter(None, [tar.file.removesuffix(".tar"), folder, key]))
                found = Found(
                    whole if config.ids == "path" else key, name, tar.file, member.offset_data, member.size
                )
                last[member.name] = _decodable(_checked_member(found, member), dot + ending)
            _check_end(path, members.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} is cut short, compressed or no tar ({error}); fetch it again, or unpack it: "
            "what is missing from it cannot be counted"
        ) from error
    return last.values()


def _check_end(path: Path, offset: int) -> None:
    """Raise TarError unless a tar holds zeros alone, and a block of them, from where `tarfile` stopped.

    At a damaged header `tarfile` stops without a word, and so it does where a second tar was appended.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(tarfile.BLOCKSIZE)
        short = len(data) < tarfile.BLOCKSIZE
        while data and not any(data):
            data = file.read(1 << 20)
    if short or data:
        raise tarfile.ReadError(f"no member and no end at byte {offset}")


def _checked_member(found: Found, member: tarfile.TarInfo) -> Found:
    if not printable(found.name):
        shown = escaped(found.name)
        return replace(found, id=shown, name=shown, reason="name", detail=f"the name {shown!r}")
    if member.issym() or member.islnk():
        return replace(found, reason="link", detail=_target(found.name, member.linkname))
    if not member.isreg() or member.issparse():
        return replace(found, reason="unreadable", detail=f"{found.name} is no regular file")
    return found


# --- FastComposer's archive -------------------------------------------------------------------------------


def read_ids(path: Path) -> list[str]:
    """The ids of a list, one a line; none if the file is not there. Raises DataError."""
    return [line.strip() for line in read_lines(path) if line.strip()]


def archive_file(photo: str, suffix: str) -> str:
    """Where FastComposer's archive keeps a photo's image, annotation or mask, below its root."""
    return f"{photo[:5]}/{photo}{suffix}"


def archive_splits(root: Path) -> dict[str, str]:
    """The split of every id in the archive's lists; its `test` is our `validation`, held out.

    Raises DataError if an id is in both.
    """
    train, test = (read_ids(root / f"image_ids_{name}.txt") for name in ("train", "test"))
    both = sorted(set(train) & set(test))
    if both:
        raise DataError(
            f"{root}: {both[0]} is in image_ids_train.txt and in image_ids_test.txt; take it out of one"
        )
    return dict.fromkeys(train, "train") | dict.fromkeys(test, "validation")


def _archive(config: PhotosConfig) -> Iterator[Found]:
    root = Path(config.path)
    splits = archive_splits(root)
    listed = dict.fromkeys([*read_ids(root / "image_ids.txt"), *splits])
    if not listed:
        raise DataError(
            f"data.photos.path: {root} has no image_ids.txt; name the root of FastComposer's archive"
        )
    top = os.path.realpath(root)
    for photo in listed:
        found = _archived(photo, top)
        if not found.reason and splits and photo not in splits:
            detail = "neither in image_ids_train.txt nor in image_ids_test.txt"
            found = replace(found, reason="unlisted", detail=detail)
        yield replace(found, split=splits.get(photo, ""))


def _archived(photo: str, root: str) -> Found:
    """One photo of the archive; size and time are those of image, annotation and mask together."""
    if not printable(photo) or "/" in photo:
        return Found(escaped(photo), escaped(photo), "", 0, 0, reason="name", detail=f"the id {photo!r}")
    name = archive_file(photo, ".jpg")
    here = Found(photo, name, name, 0, 0)
    sizes, times = [], []
    for suffix in (".jpg", *COMPANIONS):
        path = os.path.join(root, archive_file(photo, suffix))
        if not os.path.isfile(path):
            return replace(here, reason="missing", detail=f"{archive_file(photo, suffix)} is not there")
        if leads_out(path, root):
            return replace(here, reason="link", detail=f"{archive_file(photo, suffix)} leads out")
        if not os.access(path, os.R_OK):
            return replace(here, reason="unreadable", detail=f"{archive_file(photo, suffix)} may not be read")
        status = os.stat(path)
        sizes.append(status.st_size)
        times.append(status.st_mtime_ns)
    return replace(here, size=sizes[0], modified=hash((*sizes, *times)))  # same in every process


# --- All --------------------------------------------------------------------------------------------------


def photos(config: PhotosConfig) -> list[Found]:
    """The photos of a folder, of tars or of an archive, sorted by id; each id once.

    Of several with the same id the first by name that has no reason yet stays, the others are put aside.
    Raises DataError naming the key and the cure if there is no such source, or nothing in it.
    """
    if not Path(config.path).is_dir():
        raise DataError(
            f"data.photos.path: there is no folder {config.path}; put the photos there or correct it"
        )
    lists = {"folder": _folder, "tar": _tars, "fastcomposer": _archive}
    found = unique(lists[config.source](config))
    if not found:
        raise DataError(f"data.photos.path: no photo below {config.path} ({', '.join(sorted(SUFFIXES))})")
    return found


def unique(found: Iterable[Found]) -> list[Found]:
    """Sorted by id, with a reason for all but one of those that share one: the first by name without any."""
    ordered = sorted(found, key=lambda photo: (photo.id, photo.name, photo.offset))
    first: dict[str, Found] = {}
    kept = []
    for photo in ordered:
        other = photo if photo.reason else first.setdefault(photo.id, photo)
        detail = f"{photo.name} has the id of {other.name}"
        kept.append(photo if other is photo else replace(photo, reason="same_id", detail=detail))
    return kept


@lru_cache(maxsize=4)
def _stamps(config: PhotosConfig, shards: tuple[tuple[str, int], ...]) -> dict[tuple[str, int], str]:
    """A hash of names, sizes and times of the files behind each shard; tars and data sets lie behind all."""
    counts = dict(shards)
    keys = [(split, shard) for split, count in shards for shard in range(count)]
    digests = {key: hashlib.sha256() for key in keys}
    whole = config.source in ("tar", "dataset")
    found = sorted(files(Path(config.path)), key=lambda f: f.name) if whole else photos(config)
    for photo in found:
        line = f"{photo.name}\0{photo.size}\0{photo.modified}\0{photo.reason}\n".encode()
        split = photo.split or split_of(photo.id, config.held_out)
        for key in keys if whole else [(split, shard_of(photo.id, counts[split]))]:
            digests[key].update(line)
    return {key: digest.hexdigest()[:16] for key, digest in digests.items()}


def stamp(config: PhotosConfig, shards: dict[str, int], split: str = "", shard: int = -1) -> str:
    """What changes when a file behind a shard does, without reading it; without a shard, of all of them.

    "absent" if the source is not there (yet), and for what lies on the hub, where the index says it all.
    """
    if not Path(config.path).is_dir():
        return "absent"
    stamps = _stamps(config, tuple(sorted(shards.items())))
    return (
        stamps[split, shard] if split else hashlib.sha256("".join(stamps.values()).encode()).hexdigest()[:16]
    )
