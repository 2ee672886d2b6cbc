"""What is wrong with the bytes of a request: said before they are parsed, where parsing would cost too much, or after it failed.

Knows protobuf's wire format, as much as it takes to name a field; knows no field by name.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from jaxserve.errors import InvalidRequestError

MAX_OTHER_BYTES = 256 * 2**10
"""Of all fields together that no limit was given for, and of a message that is parsed unseen: parsed, an empty string of a
repeated field has 2 bytes on the wire and 16 in memory, and 32 messages of 8 MB of them took 4 GB and 13 s."""

MAX_FIELDS = 64
"""Looked at, of one message. Ours have at most 16, if numbers that repeat are packed."""

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


class _Field(NamedTuple):
    """One field as it stands on the wire.

    Attributes:
        payload: of a string, bytes or message; None of a number.
        num_bytes: of the payload, as its length says; there may be fewer.
    """

    number: int
    payload: memoryview | None
    num_bytes: int


def check_sizes(message: Descriptor, data: bytes, max_bytes: Mapping[str, int]) -> None:
    """Refuses a message that is larger than any that can be served, without parsing it.

    Args:
        max_bytes: of the fields that may be long, by name.

    Raises:
        InvalidRequestError: names the field that is too large.
    """
    if len(data) <= MAX_OTHER_BYTES:
        return
    sizes: dict[str, int] = {}
    num_fields = 0
    for num_fields, field in enumerate(_fields(data), start=1):
        name = _name(message, field.number)
        sizes[name] = sizes.get(name, 0) + field.num_bytes
        if num_fields == MAX_FIELDS:
            break
    for name, size in sizes.items():
        if name in max_bytes and size > max_bytes[name]:
            raise InvalidRequestError(name, f"{size} bytes", f"at most {max_bytes[name]} bytes long", "Shorten it.")
    others = {name: size for name, size in sizes.items() if name not in max_bytes}
    if sum(others.values()) > MAX_OTHER_BYTES or num_fields == MAX_FIELDS:
        largest = max(others or sizes, key=lambda name: sizes[name])
        raise InvalidRequestError(
            largest, f"{len(data)} bytes in many fields", f"at most {MAX_OTHER_BYTES} bytes, numbers packed", "Shorten it."
        )


def fault(message: Descriptor, data: bytes | memoryview, prefix: str = "") -> InvalidRequestError | None:
    """Finds the field because of which bytes could not be parsed: a text that is not UTF-8, or one that is cut off."""
    for count, field in enumerate(_fields(data)):
        declared = message.fields_by_number.get(field.number)
        if count == MAX_FIELDS:
            return None
        if declared is None or field.payload is None:
            continue
        if declared.type != FieldDescriptor.TYPE_STRING and declared.message_type is None:
            continue
        path = prefix + declared.name
        if len(field.payload) < field.num_bytes:
            return InvalidRequestError(path, f"{len(field.payload)} of {field.num_bytes} bytes", "complete")
        if declared.message_type is None:
            found = _not_utf8(path, field.payload)
        else:
            found = fault(declared.message_type, field.payload, f"{path}.")
        if found is not None:
            return found
    return None


def _not_utf8(path: str, payload: memoryview) -> InvalidRequestError | None:
    try:
        str(payload, "utf-8")
    except UnicodeDecodeError as error:
        return InvalidRequestError(path, f"the byte 0x{payload[error.start]:02x} at {error.start}", "UTF-8")
    return None


def _name(message: Descriptor, number: int) -> str:
    declared = message.fields_by_number.get(number)
    return f"field {number}" if declared is None else declared.name


def _fields(data: bytes | memoryview) -> Iterator[_Field]:
    """Yields the fields of one message, up to where the bytes make no sense any more."""
    view, at = memoryview(data), 0
    while at < len(view):
        tag, at = _varint(view, at)
        number, kind = tag >> 3, tag & 7
        if kind == _LENGTH_DELIMITED:
            size, at = _varint(view, at)
            yield _Field(number, view[at : at + size], size)
            at += size
            continue
        if kind == _VARINT:
            end = _varint(view, at)[1]
        elif kind in (_FIXED32, _FIXED64):
            end = at + (4 if kind == _FIXED32 else 8)
        else:
            return
        yield _Field(number, None, end - at)
        at = end


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """Returns a number and where the next one begins; past the end, the number as far as it goes."""
    value = shift = 0
    for byte in view[at : at + 10]:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:
            break
    return value, at
