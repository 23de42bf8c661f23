"""Where torch tensors' bytes come from and stay: read from a checkpoint, or mapped to files where memory is short.

Pages of a map count as resident memory once touched, until `Maps.release` gives them back to the kernel, which keeps
what was written. To touch a page takes microseconds, as long as a small expert needs for a token; so whatever stands
together is read and written through the file (`get`, `put`), and only scattered rows through the map.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from coterie.errors import CoterieError, reading
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.copying import write_at

BLOCK = 2**20
AROUND = 2**16  # bytes that the kernel makes resident around a row, at most
LEAST_RESIDENT = 2**26
COPIES = 8  # that a layer makes of a batch, at most
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc


def trim() -> None:
    """Gives free memory back to the system, which the allocator keeps where it lies between memory in use."""
    if TRIM:
        TRIM(0)


def stored_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    from safetensors.torch import _TYPES  # the library's own table of names

    types: Any = _TYPES
    return types[checkpoint.tensors[name].dtype]


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A stored tensor as it is, in memory of torch's own: the last bits of products depend on its alignment."""
    tensor = torch.empty(checkpoint.tensors[name].shape, dtype=stored_dtype(checkpoint, name))
    read_into(tensor, checkpoint, name)
    return tensor


def read_into(tensor: torch.Tensor, checkpoint: Checkpoint, name: str, start: int = 0) -> None:
    """Fills a contiguous tensor with the stored bytes from byte `start`, without a copy on the way.

    Raises: CoterieError where they cannot be had.
    """
    stored = checkpoint.tensors[name]
    path, wanted = checkpoint.path / stored.file, tensor.numel() * tensor.itemsize
    assert tensor.is_contiguous() and start + wanted <= stored.num_bytes
    if not wanted:
        return
    bytes_left = tensor.view(-1).view(torch.uint8).numpy().data
    if type(checkpoint) is not Checkpoint:  # planned, and made of parts of several places
        bytes_left[:] = checkpoint.raw(name, start, wanted)
        return
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(stored.start + start)
        while bytes_left and (count := file.readinto(bytes_left)):
            bytes_left = bytes_left[count:]
    if bytes_left:
        raise CoterieError(f"{path}: ended while reading {name!r}; the file changed or is cut")


class Maps:
    """Tensors in memory-mapped files: zeros to be filled, in unnamed files of a folder, and stored ones."""

    def __init__(self, folder: Path | None = None, resident: int = LEAST_RESIDENT) -> None:
        """folder: where activations go; the system's temporary folder (often memory itself) unless given.

        resident: bytes of all maps that `touched` and `passed` let stay in memory, about.
        """
        self._resident, self._passed = max(resident, LEAST_RESIDENT), 0
        self._touched: dict[int, int] = {}  # bytes by the address where a map begins
        self.folder = Path(tempfile.gettempdir()) if folder is None else folder
        # Where each map begins in memory, and the file of one that may be written; it closes when its last tensor goes.
        self._open: weakref.WeakKeyDictionary[mmap.mmap, tuple[int, int | None]] = weakref.WeakKeyDictionary()

    def zeros(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Zeros whose room on the disk is taken now. Raises: CoterieError when there is too little."""
        size = max(1, math.prod(shape) * dtype.itemsize)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                _allocate(file, size)
                pages, descriptor = mmap.mmap(file.fileno(), size), os.dup(file.fileno())
                weakref.finalize(pages, os.close, descriptor)
        except OSError as error:
            raise CoterieError(
                f"{self.folder}: cannot hold {size / 1e9:.1f} GB of activations ({error.strerror or error}); "
                "free some room there, or calibrate on fewer or shorter samples"
            ) from error
        return self._tensor(pages, 0, shape, dtype, descriptor)

    def put(self, place: torch.Tensor, values: torch.Tensor) -> None:
        """place[...] = values, without touching pages where `place` is an unbroken stretch of a map of `zeros`."""
        descriptor, position = self._file(place)
        if descriptor is None:
            place.copy_(values)
            return
        data = values.detach().to(place.dtype).contiguous().view(-1).view(torch.uint8).numpy()
        write_at(descriptor, data.data, position)

    def get(self, place: torch.Tensor) -> torch.Tensor:
        """A copy in memory of torch's own, likewise."""
        descriptor, position = self._file(place)
        if descriptor is None:
            return place.clone()
        found = torch.empty(place.shape, dtype=place.dtype)
        left = memoryview(found.view(-1).view(torch.uint8).numpy().data)
        while left and (count := os.preadv(descriptor, [left], position)):
            left, position = left[count:], position + count
        assert not left
        return found

    def _file(self, place: torch.Tensor) -> tuple[int | None, int]:
        """The file that an unbroken stretch of a map stands in, and where."""
        if place.is_contiguous() and place.numel():
            for pages, (begin, descriptor) in self._open.items():
                if 0 <= place.data_ptr() - begin < len(pages):
                    return descriptor, place.data_ptr() - begin
        return None, 0

    def stored(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        """A stored tensor of which only what is touched is read; it must not be written to."""
        stored, dtype = checkpoint.tensors[name], stored_dtype(checkpoint, name)
        if type(checkpoint) is not Checkpoint or stored.start % dtype.itemsize or not stored.num_bytes:
            return read(checkpoint, name)  # a planned checkpoint's bytes do not stand at one place of a file
        path = checkpoint.path / stored.file
        with reading(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if size < stored.end:
            raise CoterieError(f"{path}: ended while reading {name!r}; the file changed or is cut")
        return self._tensor(pages, stored.start, stored.shape, dtype)

    def _tensor(
        self,
        pages: mmap.mmap,
        start: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        descriptor: int | None = None,
    ) -> torch.Tensor:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            # Touching a row then makes its own pages resident, not the two megabytes that the cache may hold as one.
            with suppress(OSError):  # a kernel without huge pages
                pages.madvise(mmap.MADV_NOHUGEPAGE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of maps that are only read
            found = torch.frombuffer(pages, dtype=dtype, offset=start, count=math.prod(shape)).view(shape)
        self._open[pages] = found.data_ptr() - start, descriptor
        return found

    def touched(self, tensor: torch.Tensor, num_rows: int) -> None:
        """Notes that so many rows of a map were read or written, anywhere in it, and gives pages back before they are
        too many."""
        storage = tensor.untyped_storage()
        touched = self._touched.get(storage.data_ptr(), 0) + num_rows * AROUND
        self._touched[storage.data_ptr()] = min(touched, storage.nbytes())
        if sum(self._touched.values()) >= self._resident:
            self.release()

    def passed(self, num_bytes: int) -> None:
        """Notes that a batch of so many bytes is through a layer, which leaves some copies of it in maps and memory;
        gives back what batches left before it is too much."""
        self._passed += num_bytes
        if self._passed * COPIES >= self._resident:
            self.release()
            trim()

    def release(self) -> None:
        """Gives the pages of all maps back: they leave resident memory, not the page cache."""
        self._touched, self._passed = {}, 0
        for pages in self._open:
            pages.madvise(mmap.MADV_DONTNEED)


def _allocate(file: IO[bytes], size: int) -> None:
    """Takes the room on the disk: writing to a map of a full one would end the process, not raise an error."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, BLOCK):
        file.write(bytes(min(BLOCK, size - start)))
    file.flush()
