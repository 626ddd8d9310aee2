"""A memory's folder: read by anyone, written by one process at a time, whole at every moment."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_muter.errors import MemoryFormatError, StateError
from lightning_muter.memory import (
    base_file,
    connections,
    database,
    files,
    leftovers,
    model_file,
    older_format,
)
from lightning_muter.memory.access import FolderAccess
from lightning_muter.memory.faults import damage, other_memory, write_errors
from lightning_muter.memory.plain_checkpoint import plain
from lightning_muter.memory.records import (
    START,
    Content,
    Meta,
    Request,
    RequestRow,
    chained,
    check_same_kind,
    served,
)
from lightning_muter.memory.tensors import TensorSpec, check_tensors, unpack

__all__ = ["MemoryStore"]


class MemoryStore(FolderAccess):
    """A folder with memory.sqlite, the base that it names, and model.ckpt.

    A reader sees the state before a write or the state after it, whatever process, crash or power
    cut comes in between. An object belongs to the memory that it read or created first: writes to
    another one that took its place in the folder are refused.

    Args:
        folder: made by `create` where there is none.
        memory_id: of the memory that is expected; None takes the first that is read or created.
    """

    def exists(self) -> bool:
        """Whether the folder holds a memory, of this format or of an older one."""
        return os.path.lexists(self._database) or older_format.found(self.folder)

    # --- reading ----------------------------------------------------------------------------

    def read(
        self, base_specs: Mapping[str, TensorSpec], current_specs: Mapping[str, TensorSpec]
    ) -> Content:
        """The memory at one moment, all of it checked; nothing is unpickled, no file changed.

        Args:
            base_specs: what the tensors of the base have to be.
            current_specs: what the current tensors have to be.

        Raises:
            MemoryFormatError: missing, truncated, altered or of another format version.
        """
        older_format.refuse(self.folder, self._database)
        with damage(self.folder):
            meta, rows, base = self._snapshot()
            sizes, current = meta.read_sizes(), unpack(meta.current)
            check_tensors(base, base_specs, sizes)
            check_tensors(current, current_specs, sizes)
            content = Content(
                base=base,
                current=current,
                requests=served(rows, meta),
                facts=meta.read_facts(),
                key=meta.key,
                sizes=sizes,
                memory_id=meta.memory_id,
                generation=meta.generation,
            )
        self._memory_id = content.memory_id
        return content

    def _snapshot(self) -> tuple[Meta, list[RequestRow], dict[str, Tensor]]:
        """The rows, and the base that they name; anew where a writer replaced both meanwhile."""
        gone = None
        while True:
            with connections.reading(self._database) as connection:
                meta = database.read_meta(connection)
                rows = database.read_requests(connection)
            try:
                return meta, rows, base_file.load(self.folder, meta.base_file)
            except FileNotFoundError as error:
                if meta.base == gone:
                    raise MemoryFormatError(
                        f"{self.folder / meta.base}, which memory.sqlite names, is missing: "
                        "restore a backup"
                    ) from error
                gone = meta.base

    def newest(self) -> tuple[str, int]:
        """The memory's id and generation, without reading the rest.

        Raises:
            MemoryFormatError: the database is missing, damaged or of another format.
        """
        meta = self._meta()
        return meta.memory_id, meta.generation

    def model_generation(self) -> int | None:
        """The generation that model.ckpt is of, None where the memory never had one.

        Raises:
            MemoryFormatError: the database is missing, damaged or of another format.
        """
        return self._meta().model_generation

    # --- writing ----------------------------------------------------------------------------

    def create(
        self, content: Content, model: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        """Write a new memory.

        Args:
            content: all of it.
            model: the checkpoint of its model, for model.ckpt; what is not read back without
                unpickling is left out, with a warning that names it.
            overwrite: take the place of a memory that is there, which stays whole and readable
                until the new one is complete.

        Raises:
            StateError: the folder holds a memory, or it cannot be written.
        """
        rows = chained(content.requests, START, 0)
        kept, left = (None, ()) if model is None else plain(model)
        with write_errors(self.folder):
            files.make_folder(self.folder)
            with self._as_writer():
                if self.exists() and not overwrite:
                    raise StateError(
                        f"{self.folder} holds a memory already: give another folder, or say "
                        "overwrite=True to lose that memory and its ledger"
                    )
                with self._new_base(content) as base:
                    meta = Meta.of(content, base, rows)
                    if kept is not None:
                        model_file.prepare(self.folder, meta.memory_id, meta.generation, kept)
                        meta = replace(meta, model_generation=meta.generation)
                    if self._readable():
                        with connections.transaction(self._database) as connection:
                            database.put_all(connection, meta, rows)
                    else:
                        database.build(self.folder, meta, rows)
                self._memory_id = meta.memory_id
                leftovers.forget_older(self.folder, meta)
        if left:
            warnings.warn(
                f"{model_file.NAME} leaves out {', '.join(left)}: objects that are not read "
                "without running what a file names, which is never done with a memory's folder; "
                "load its weights into a module that is made as this one was",
                stacklevel=2,
            )

    def commit(self, expected: int, current: dict[str, Tensor], requests: Sequence[Request]) -> int:
        """Append requests and replace the current tensors, in one step; the new generation.

        Args:
            expected: the generation that the caller computed from.
            current: of the names, shapes and dtypes of those that they replace.
            requests: what was served.

        Raises:
            StateError: the folder is of another generation, or it cannot be written; nothing
                was changed.
            MemoryFormatError: the database is damaged.
        """
        older_format.refuse(self.folder, self._database)
        with write_errors(self.folder), self._as_writer():
            with connections.transaction(self._database) as connection:
                with damage(self.folder):
                    meta = database.read_meta(connection)
                    before = database.last_chain(connection, meta)
                    stored = unpack(meta.current)
                self._check_newest(meta, expected)
                check_same_kind(stored, current)
                rows = chained(requests, before, meta.requests)
                meta = meta.after(rows, current)
                database.append(connection, rows)
                database.put(connection, meta)
            return meta.generation

    def replace(self, expected: int, content: Content) -> int:
        """Put another content into the place of all that the memory was; the new generation.

        Afterwards no file of the folder holds a byte of the old base, requests or key, unless a
        reader held the database open: then the next writer removes them.

        Args:
            expected: the generation that the caller computed from.
            content: the new one, of the same memory; its generation is not looked at.

        Raises:
            StateError: the folder is of another generation, or it cannot be written; nothing
                was changed.
            MemoryFormatError: the database is damaged.
        """
        older_format.refuse(self.folder, self._database)
        rows = chained(content.requests, START, 0)
        content = replace(content, generation=expected + 1)
        with write_errors(self.folder), self._as_writer():
            old = self._meta()
            self._check_newest(old, expected)
            if old.memory_id != content.memory_id:
                raise other_memory(self.folder)
            with self._new_base(content) as base:
                meta = Meta.of(content, base, rows)
                meta = replace(meta, model_generation=old.model_generation)
                with connections.transaction(self._database) as connection:
                    database.put_all(connection, meta, rows)
            leftovers.forget_older(self.folder, meta)
            return meta.generation

    @contextmanager
    def _new_base(self, content: Content) -> Iterator[base_file.BaseFile]:
        """A base on the disk, which goes again where the block that names it fails."""
        base = base_file.write(self.folder, content.base)
        try:
            yield base
        except BaseException:
            leftovers.discard_base(self.folder, base)
            raise

    # --- the model beside it ----------------------------------------------------------------

    def write_model(self, generation: int, checkpoint: Mapping[str, Any]) -> None:
        """Write model.ckpt in one step and note its generation; a crash leaves the one before.

        Args:
            generation: the memory's, whose parameters the checkpoint has.
            checkpoint: what torch.save keeps; the stamp is added to a copy.

        Raises:
            StateError: the memory is of another generation, or it cannot be written.
            MemoryFormatError: the database is damaged.
        """
        older_format.refuse(self.folder, self._database)
        with write_errors(self.folder), self._as_writer():
            meta = self._meta()
            self._check_newest(meta, generation)
            model_file.finish(
                model_file.prepare(self.folder, meta.memory_id, generation, checkpoint)
            )
            self._note_model(generation)

    def repair_model(self, parameters: dict[str, Tensor]) -> bool:
        """Bring model.ckpt up to the memory's generation; whether it was behind.

        Args:
            parameters: the current ones by their names in the checkpoint's state_dict, in any
                dtype, of the shapes that they have there.

        Raises:
            MemoryFormatError: model.ckpt is behind, and missing, damaged or of another model.
            StateError: it cannot be written.
        """
        older_format.refuse(self.folder, self._database)
        with write_errors(self.folder), self._as_writer():
            meta = self._meta()
            if meta.model_generation in (None, meta.generation):
                return False
            checkpoint = model_file.read(self.folder)
            of = model_file.generation_of(checkpoint, meta.memory_id, meta.generation)
            if of == meta.generation:  # the crash came after the file and before the note
                self._note_model(of)
            else:
                model_file.put_parameters(checkpoint["state_dict"], parameters)
                self.write_model(meta.generation, checkpoint)
            return True

    def _note_model(self, generation: int) -> None:
        with connections.transaction(self._database) as connection:
            meta = database.read_meta(connection)
            database.put(connection, replace(meta, model_generation=generation))

    def _readable(self) -> bool:
        """Whether the database is one that a transaction can write into."""
        with suppress(MemoryFormatError):
            self._meta()
            return True
        return False
