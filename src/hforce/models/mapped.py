"""Weight files whose tensors are found and described, but not read: safetensors, PyTorch's .pt, folders of shards."""

from __future__ import annotations

import json
import mmap
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.torch_version import TorchVersion

from hforce.documents import parse_document, read_document
from hforce.errors import CheckpointError, HforceError, InputError, UnavailableError
from hforce.models.weights import PICKLED, SHOWN, ZIPPED, first_bytes, open_safetensors, way_out

SAFE_TORCH = "2.10"  # the first whose weights_only loading is safe
LONGEST_NAME = 80  # characters of a name that messages show
LONGEST_INDEX = 16 * 2**20  # bytes
NO_QUANTS = "get the weights as bfloat16, float16 or float32"
LOOKED_FOR = ("*.safetensors.index.json", "*.safetensors", "*.pt")  # in a folder, the first that is there
UNREADABLE = (  # what torch.load raises for damaged files, besides UnpicklingError
    EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, OSError, AssertionError,
    ArithmeticError, ImportError, MemoryError, BadZipFile,
)  # fmt: skip
DTYPES = {  # as safetensors calls them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor that need not be in memory: `read` maps it from its file, or makes it of such tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """How much room it takes as stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class LazyState(Mapping[str, Tensor]):
    """A state dict that reads a tensor when it is asked for it; what it says about tensors costs no memory."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    @property
    def bytes(self) -> int:
        """How much room all tensors take as stored."""
        return sum(entry.bytes for entry in self.entries.values())


@dataclass(frozen=True)
class Contents:
    """What a file, or the files of a folder, hold: dicts of tensors by their name ("" for tensors on the top level).

    `folder` is where they lie, for the settings that may lie beside them.
    """

    path: Path
    folder: Path
    members: Mapping[str, Mapping[Any, Any]]

    def choose(self, wanted: tuple[str, ...]) -> tuple[str, LazyState]:
        """The first wanted member that is there, or else the tensors on the top level.

        Raises CheckpointError when there are neither, or something other than tensors among them.
        """
        found = next((name for name in (*wanted, "") if self.members.get(name)), None)
        if found is None:
            there = shown([str(name) for name in self.members if name]) or "no tensors"
            message = f"{self.path} has none of {', '.join(wanted)}: it holds {there}"
            raise CheckpointError(message, "is it the weight file that is meant?")
        return found, LazyState({str(k): self._entry(found, k, v) for k, v in self.members[found].items()})

    def _entry(self, member: str, name: Any, value: Any) -> Entry:
        if isinstance(value, Entry):
            return value
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or not isinstance(name, str):
            what = f"{clip(str(name))} in {member or 'its top level'} is a {type(value).__name__}"
            raise CheckpointError(f"{self.path} holds more than plain tensors: {what}", "convert the file")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise CheckpointError(f"{self.path}: tensor {clip(name)} is larger than what the file holds of it")
        return Entry(tuple(value.shape), value.dtype, value.detach)


def open_weights(path: Path) -> Contents:
    """The weights at `path`, a file or a folder, known by their content and never by their names.

    In a folder, or in `transformer/` within it, are taken: the shards of an index, or else the only safetensors file,
    or else the only .pt. Raises InputError when nothing is there, CheckpointError for what is damaged, unsafe, or no
    weights, UnavailableError for a .pt where PyTorch is too old to open it safely.
    """
    if not path.is_dir():
        return Contents(path, path.parent, _members(path))
    if (path / "transformer_2").is_dir():
        raise CheckpointError(f"{path} has two transformers: it is Wan2.2, not Wan2.1", "get a model of Wan2.1")
    for folder in (path / "transformer", path):
        for pattern in LOOKED_FOR:
            if found := sorted(file for file in folder.glob(pattern) if not file.name.startswith(".")):
                return Contents(path, folder, _only(found, path))
    looked = ", ".join(LOOKED_FOR)
    raise InputError(f"no transformer in the folder {path}", f"looked for {looked}, there and in transformer/")


def shown(names: list[str]) -> str:
    """The first few of these names, and that there are more."""
    return ", ".join(map(clip, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")


def clip(name: str) -> str:
    """A name out of a file, short enough for a message."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def _members(path: Path) -> Mapping[str, Mapping[Any, Any]]:
    start = first_bytes(path)
    if start[8:9] == b"{":  # after its length comes the header, which is JSON
        return {"": _safetensors(path)}
    if start.startswith(ZIPPED):
        return _unpickled(path)
    if start.startswith(PICKLED):
        message = f"{path} is a pickle as PyTorch wrote them before 1.6, which cannot be mapped into memory"
        raise CheckpointError(message, "save it again with a newer PyTorch, or convert it to safetensors")
    size = path.stat().st_size
    raise CheckpointError(f"{path} holds no weights ({size} bytes, neither safetensors nor .pt)", way_out(start))


def _safetensors(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds. Its tensors are mapped one by one: a whole file may be larger than the memory."""
    file, entries = open_safetensors(path, "numpy"), {}
    with path.open("rb") as opened:  # the header, which was just checked, says where in the file a tensor is
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name in file.keys():  # noqa: SIM118
        shape, kind = tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise CheckpointError(f"{path}: tensor {clip(name)} is quantised ({kind})", NO_QUANTS)
        start = 8 + length + header[name]["data_offsets"][0]
        entries[name] = Entry(shape, DTYPES[kind], partial(_map, path, start, shape, DTYPES[kind]))
    return entries


def _map(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor at byte `start` of a file, mapped: what is written to it stays in memory."""
    size, page = torch.Size(shape).numel() * dtype.itemsize, start % mmap.ALLOCATIONGRANULARITY
    if not size:
        return torch.empty(shape, dtype=dtype)
    try:
        with path.open("rb") as file:
            room = mmap.mmap(file.fileno(), page + size, access=mmap.ACCESS_COPY, offset=start - page)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} was changed or removed while it was read", "run the command again") from error
    raw = torch.frombuffer(room, dtype=torch.uint8, count=size, offset=page)
    return (raw.clone() if page % dtype.itemsize else raw).view(dtype).view(shape)


def _unpickled(path: Path) -> dict[str, Mapping[Any, Any]]:
    """The dicts in a .pt. Nothing but tensors and plain containers is ever made of it."""
    if path.suffix == ".safetensors":  # torch.load believes the name
        raise CheckpointError(f"{path} is no safetensors file: it is a .pt", "rename it so that it ends in .pt")
    if TorchVersion(torch.__version__) < SAFE_TORCH:
        message = f"{path} is a .pt, which PyTorch {torch.__version__} cannot open safely"
        raise UnavailableError(message, "install PyTorch 2.10 or newer, or convert the file to safetensors")
    try:
        _check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # about rare pickle protocols, in PyTorch's words
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, *UNREADABLE) as error:
        raise _refusal(path, str(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors", "convert the file")
    members: dict[str, Mapping[Any, Any]] = {str(k): v for k, v in content.items() if isinstance(v, Mapping)}
    if not members or any(isinstance(value, Tensor) for value in content.values()):
        members[""] = {k: v for k, v in content.items() if not isinstance(v, Mapping)}
    return members


def _check_archive(path: Path) -> None:
    """Raises CheckpointError for a zip file of which torch.load would make something else than its tensors."""
    with ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != ZIP_STORED for part in parts):
        raise CheckpointError(f"{path} is compressed: it cannot be mapped into memory", "save it uncompressed")
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        raise CheckpointError(f"{path} is a TorchScript program, not weights", "get the weights it was made of")


def _refusal(path: Path, reason: str) -> HforceError:
    """Why a .pt could not be opened, found without running anything in it: it holds objects, or it is damaged."""
    if "Cannot allocate memory" in reason:
        return UnavailableError(f"{path} is larger than this machine's memory", "convert it to safetensors")
    try:
        unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (pickle.UnpicklingError, *UNREADABLE):
        unsafe = []
    if unsafe:
        message = f"{path} holds more than tensors: {shown(unsafe)}; it was refused, and nothing in it was run"
        return CheckpointError(message, "get the weights as safetensors, or without what is not a tensor")
    message = f"{path} is not a whole .pt file ({path.stat().st_size} bytes)"
    return CheckpointError(message, "it was probably cut short: copy or download it again")


class Index(BaseModel):
    """Which shard holds which tensor (model.safetensors.index.json)."""

    weight_map: dict[str, str]


def _only(found: list[Path], path: Path) -> Mapping[str, Mapping[Any, Any]]:
    if len(found) > 1:
        names = shown([file.name for file in found])
        raise InputError(f"several weight files in the folder {path}: {names}", "name the one that is meant")
    return {"": _shards(found[0])} if found[0].suffix == ".json" else _members(found[0])


def _shards(index: Path) -> dict[str, Entry]:
    """The tensors of all shards of an index, each of which must be where the index says."""
    places = parse_document(Index, read_document(index, LONGEST_INDEX), index).weight_map
    files = sorted(set(places.values()))
    if foreign := [name for name in files if Path(name).name != name or "\\" in name]:
        raise CheckpointError(f"{index} names files outside of its folder: {shown(foreign)}")
    if gone := [name for name in files if not index.with_name(name).is_file()]:
        message = f"{len(gone)} of the {len(files)} shards of {index} are missing: {shown(gone)}"
        raise InputError(message, "copy or download them, too")
    parts = {name: _safetensors(index.with_name(name)) for name in files}
    odd = [name for name, file in places.items() if name not in parts[file]]
    odd += [name for file, part in parts.items() for name in part if places.get(name) != file]
    if odd:
        raise CheckpointError(f"{index} and its shards do not agree on {len(odd)} tensors: {shown(odd)}")
    return {name: entry for part in parts.values() for name, entry in part.items()}
