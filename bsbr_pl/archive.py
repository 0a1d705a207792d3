"""Reads a file of torch.save: one archive from the first byte to the last, of plain values and dense real tensors.

One reader checks the file and builds what it holds, so nothing can change in between. The layout of the archive must be
exactly that of torch: members one after another, stored, their directory, and the end of the file. The CRC-32 of each
member is that of the bytes that were read into the tensor. The pickle is read with the few instructions and names that
torch.save needs: no code in it is ever executed, and no value takes more memory than the file pays for.
"""

import io
import itertools
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
OTHERS = {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}  # not read
END = 56 + 20 + 22  # bytes after the directory: the record and its locator in zip64, and the record of zip
PADDING = re.compile(rb"(\x01\x00.{2,26})?FB..Z*", re.DOTALL)  # of a member's header: sizes in zip64, and an alignment
SIZES = re.compile(rb"(\x01\x00.{2,26})?", re.DOTALL)  # of an entry of the directory
LARGE = 2**32 - 1  # sizes from here on take 8 bytes
DEEPEST = 64  # values within values
#: What pickle's protocol 2 writes for plain values, tensors and an OrderedDict with attributes.
INSTRUCTIONS = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINPUT", "LONG_BINPUT", "BINGET"),
    *("LONG_BINGET", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}
PLAIN = (type(None), bool, int, float, str)


class Member(NamedTuple):
    """Where the content of a part of the archive lies in the file."""

    name: str
    start: int
    size: int
    crc: int


class Saved(NamedTuple):
    """A tensor as a pickle describes it, before anything is made of it."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    requires_grad: Any
    hooks: Any


class Storage(NamedTuple):
    """The numbers that one or more tensors show: a member's name, their type and how many there are."""

    name: str
    dtype: torch.dtype
    length: int


def read_archive(stream: IO[bytes], with_tensors: bool = True) -> Any:
    """The value in a file of torch.save.

    Args:
        stream: the file, opened for reading.
        with_tensors: otherwise every tensor is None, and the numbers in it are not read.

    Raises:
        ValueError: what is not as torch.save writes it.
        pickle.UnpicklingError: the pickle holds more than tensors and plain values.
    """
    members = find_members(stream)
    script = members.pop("data.pkl", None)
    if script is None:
        raise ValueError("there is no data.pkl in it")
    content = bytearray(script.size)
    _read_into(stream, script, memoryview(content))
    check_script(content)
    values = _Values(stream, members, len(content), with_tensors)
    found = values.plain(_Unpickler(content).load())
    unread = members.keys() - values.storages.keys()
    if unread - OTHERS:
        raise ValueError(f"no tensor shows {min(unread - OTHERS)}")
    for name in unread & OTHERS:
        _read_into(stream, members[name], memoryview(bytearray(members[name].size)))
    return found


def find_members(stream: IO[bytes]) -> dict[str, Member]:
    """The parts of an archive, after a check that nothing but them is in the file."""
    with zipfile.ZipFile(stream) as archive:
        entries, directory, comment = archive.infolist(), archive.start_dir, archive.comment
    members: dict[str, Member] = {}
    position = 0
    for entry in entries:
        member, position = _member(stream, entry, position)
        if member.name in members:
            raise ValueError(f"{member.name} is in it twice")
        members[member.name] = member
    length = sum(46 + len(entry.filename.encode()) + len(entry.extra) for entry in entries)
    if position != directory or comment or directory + length + END != stream.seek(0, 2):
        raise ValueError("the archive is not the whole file")
    roots = {entry.filename.partition("/")[0] for entry in entries}
    if len(roots) != 1:
        raise ValueError("its parts lie in several folders")
    return members


def _member(stream: IO[bytes], entry: zipfile.ZipInfo, position: int) -> tuple[Member, int]:
    """The member that must begin at `position`, and where the next one begins."""
    stream.seek(position)
    header = stream.read(30)
    if len(header) < 30 or entry.header_offset != position:
        raise ValueError(f"{entry.filename} does not follow the part before it")
    signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = struct.unpack("<4s5H3I2H", header)
    name, extra = stream.read(name_length), stream.read(extra_length)
    start = stream.tell()
    wide = "Q" if entry.file_size >= LARGE else "I"
    tail = struct.pack(f"<4sI2{wide}", b"PK\7\x08", entry.CRC, entry.file_size, entry.file_size)
    stream.seek(start + entry.file_size)
    plain = (
        (signature, flags, name, entry.flag_bits) == (b"PK\3\4", 0x808, entry.filename.encode(), 0x808)
        and method == entry.compress_type == zipfile.ZIP_STORED
        and crc == 0
        and packed in (0, LARGE)
        and size in (0, LARGE)
        and entry.compress_size == entry.file_size
        and not (entry.external_attr or entry.comment)
        and PADDING.fullmatch(extra)
        and SIZES.fullmatch(entry.extra)
        and stream.read(len(tail)) == tail
    )
    if not plain:
        raise ValueError(f"{entry.filename} was changed after it was written")
    short = entry.filename.partition("/")[2]
    if short not in OTHERS | {"data.pkl"} and not re.fullmatch(r"data/\d{1,9}", short):
        raise ValueError(f"{entry.filename} is no part of a checkpoint")
    return Member(short, start, entry.file_size, entry.CRC), start + entry.file_size + len(tail)


def _read_into(stream: IO[bytes], member: Member, buffer: memoryview) -> None:
    """Fill a buffer of the member's size, and check what is in it now."""
    stream.seek(member.start)
    if stream.readinto(buffer) != member.size or zlib.crc32(buffer) != member.crc:  # type: ignore[attr-defined]
        raise ValueError(f"{member.name} was changed after it was written")


def check_script(content: bytes | bytearray) -> None:
    """Check the instructions of a pickle without executing them.

    Raises:
        pickle.UnpicklingError: naming the first instruction that torch.save does not write.
        ValueError: the pickle is cut short, or numbers its values in another order.
    """
    numbers = itertools.count()
    end = 0
    for instruction, argument, position in pickletools.genops(bytes(content)):
        if instruction.name not in INSTRUCTIONS:
            raise pickle.UnpicklingError(instruction.name)
        if instruction.name.endswith("BINPUT") and argument != next(numbers):  # memory for a large one would be taken
            raise ValueError("its values are not numbered in order")
        end = position or 0
    if content[:2] != b"\x80\x02" or end != len(content) - 1:
        raise ValueError("its pickle is not one of protocol 2 alone")


class _Rebuild:
    """Stands for torch's function of the same purpose. An instance: a pickle cannot set attributes of it."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Saved:
        return Saved(*arguments)


class _Unpickler(pickle.Unpickler):
    """Builds plain values, and descriptions of tensors."""

    def __init__(self, content: bytearray) -> None:
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
        }
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, saved_id: Any) -> Storage:
        kind, dtype, key, _, count = saved_id
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
            raise ValueError(f"{str(saved_id)[:80]} is no storage")
        return Storage(f"data/{key}", dtype, count)


class _Values:
    """Builds the final values from those of a pickle, each within what the file has bytes for."""

    def __init__(self, stream: IO[bytes], members: dict[str, Member], most: int, with_tensors: bool) -> None:
        self.stream, self.members, self.most, self.with_tensors = stream, members, most, with_tensors
        self.storages: dict[str, tuple[Storage, Tensor | None]] = {}  # by the member's name
        self.count = 0

    def plain(self, value: Any, depth: int = 0) -> Any:
        """A copy of a value; what it contains twice is there twice."""
        self.count += 1
        if depth > DEEPEST or self.count > self.most:  # each value takes at least one byte, unless it is repeated
            raise ValueError(f"nested more than {DEEPEST} levels deep, or more values than bytes")
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind in (list, tuple):
            return kind(self.plain(item, depth + 1) for item in value)
        if kind in (dict, OrderedDict):
            found = kind((self.plain(key, depth + 1), self.plain(item, depth + 1)) for key, item in value.items())
            if kind is OrderedDict and "_metadata" in vars(value):  # of a state_dict
                vars(found)["_metadata"] = self.plain(vars(value)["_metadata"], depth + 1)
            return found
        if kind is Saved:
            return self.tensor(value)
        raise pickle.UnpicklingError(f"a value of type {kind.__name__}")

    def tensor(self, saved: Saved) -> Tensor | None:
        """A tensor that lies in its storage with no two of its elements in one place."""
        storage, offset, size, stride, *_ = saved
        shape = (offset, *size, *stride)
        if type(storage) is not Storage or any(type(n) is not int or n < 0 for n in shape) or len(size) != len(stride):
            raise ValueError(f"offset={offset}, size={size} and stride={stride} are no place of a tensor")
        taken = 1  # numbers of the storage from a tensor's first element to its last, dimension by dimension
        for step, length in sorted(zip(stride, size, strict=True)):
            if length > 1 and step < taken:
                raise ValueError(f"the elements of a tensor of size {size} and stride {stride} overlap")
            taken += (length - 1) * step
        if offset + taken > storage.length and 0 not in size:
            raise ValueError(f"a tensor of size {size} exceeds its storage of {storage.length}")
        numbers = self.numbers(storage)
        if numbers is None:
            return None
        return torch.empty(0, dtype=storage.dtype).set_(numbers.untyped_storage(), offset, size, stride)

    def numbers(self, storage: Storage) -> Tensor | None:
        """The content of a storage, read once; None if tensors are not asked for."""
        if storage.name not in self.storages:
            member = self.members.get(storage.name)
            if member is None or member.size != storage.length * storage.dtype.itemsize:
                raise ValueError(f"{storage.name} does not have {storage.length} numbers of {storage.dtype}")
            content = None
            if self.with_tensors:
                content = torch.empty(member.size, dtype=torch.uint8)
                _read_into(self.stream, member, content.numpy().data)
            self.storages[storage.name] = storage, content
        first, content = self.storages[storage.name]
        if first != storage:
            raise ValueError(f"{storage.name} is {first.length} numbers of {first.dtype} and another storage as well")
        return content
