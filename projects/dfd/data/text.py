"""Text of annotation files in the encodings in which labelling tools save it."""

from __future__ import annotations

import codecs
import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from ..errors import UserError
from .reader import Tally

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What tools write under the older name: the encoding that extends it.
_EXTENDED = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}
_DECLARATION = re.compile(rb"""\s*<\?xml[^>]*?\sencoding\s*=\s*["']([^"'>]*)["']""")


def read_lines(path: str) -> list[str]:
    """The lines of a text file in UTF-8 or UTF-16, with or without a byte-order mark.

    Raises:
        UserError: the file is in neither, or cannot be opened.
    """
    return _decoded(_bytes(path), path).splitlines()


def read_json(path: str, tally: Tally) -> Any:
    """The content of a json file; anything but plain UTF-8 is counted.

    Raises:
        UserError: the file cannot be opened or decoded.
        ValueError: it is no JSON.
    """
    data = _bytes(path)
    encoding = unicode_encoding(data)
    if encoding is not None:
        tally.add(f"json files decoded from {encoding}", path)
    try:
        return json.loads(_decoded(data, path))
    except RecursionError as e:
        raise ValueError("it is nested too deep") from e


def is_plain_json(path: str) -> bool:
    """Whether pycocotools, which decodes nothing but plain UTF-8, can read a json file."""
    with open(path, "rb") as f:
        return unicode_encoding(f.read(4)) is None


def read_xml(path: str, tally: Tally) -> ElementTree.Element:
    """The root of an xml file, its tags without namespaces.

    A byte-order mark counts more than the encoding that is declared. Where the declared one does
    not exist, or cannot be that of the bytes, UTF-8 is taken if the file is valid in it, and
    counted.

    Raises:
        UserError: the file does not exist, cannot be decoded, or is not valid XML.
    """
    text = _decoded_xml(_bytes(path), path, tally)
    try:
        root = ElementTree.fromstring(text.lstrip())
    except (ElementTree.ParseError, ValueError) as e:
        raise UserError(f"{path} is not valid XML ({e}): repair it or correct the split") from e
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    known = ("object", "size", "filename")
    if root.tag != "annotation" and not any(root.find(tag) is not None for tag in known):
        # Taken for one, it would be an image without objects.
        raise UserError(
            f"{path} is no annotation: its root is <{root.tag}>, and it holds none of "
            f"{', '.join(known)}: replace it or correct the split"
        )
    return root


def unicode_encoding(data: bytes) -> str | None:
    """The encoding that the first bytes of a file tell, if it is another than plain UTF-8."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    # Without a mark: the first character of a list, of json and of xml is one of ASCII.
    zeros = [byte == 0 for byte in data[:4]]
    if zeros == [False, True, True, True]:
        return "utf-32-le"
    if zeros == [True, True, True, False]:
        return "utf-32-be"
    return {(False, True): "utf-16-le", (True, False): "utf-16-be"}.get(tuple(zeros[:2]))


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        raise UserError(f"{path} cannot be opened ({e.strerror}): correct the path") from e


def _decoded(data: bytes, path: str) -> str:
    encoding = unicode_encoding(data) or "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeError as e:
        raise UserError(f"{path} is not text in {encoding} ({e}): save it as UTF-8") from e


def _decoded_xml(data: bytes, path: str, tally: Tally) -> str:
    match = _DECLARATION.match(data)
    # A declaration that can be read as ASCII is not in UTF-16, whatever it says.
    if unicode_encoding(data) is not None or match is None:
        return _decoded(data, path)
    declared = match[1].decode("ascii", "replace").strip()
    for encoding in (declared, _EXTENDED.get(_codec(declared))):
        if encoding is None or _codec(encoding).startswith(("utf-16", "utf-32")):
            continue
        try:
            return data.decode(encoding)
        except (LookupError, ValueError):
            continue
    try:
        text = data.decode("utf-8")
    except UnicodeError as e:
        raise UserError(
            f"{path} declares the encoding {declared!r}, but is not in it: save it as UTF-8"
        ) from e
    tally.add(f"xml files of the encoding {declared!r} read as utf-8", path)
    return text


def _codec(name: str) -> str:
    try:
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        return name
