"""jobs/compress.py whose workers write blobs slowly, so that a fault finds many of them on their
way; what happens to them is written down.

python -m tests.chaos.slow_compress SECONDS FILE --config FILE ...
    one JSON line in FILE for
    a blob that could not be written
        {"failed": message, "behind": blobs that were on their way then}
    a boundary that is deleted
        {"deleted": key, "is_replaced": whether a resume still finds something to start from}
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from jobs import compress
from p48ray.errors import P48Error
from p48ray.runner import ray_runner
from p48ray.stages import blobs
from p48ray.stages.blobs import BlobWriter
from p48ray.store.local import LocalStore

# some eight boundaries: a stream waits for its writers now and then, as a real one does
BEHIND_BYTES = 2**18
COMPRESSED_LAYERS = range(1, 5)


def slowed(
    pause_s: float, log: str, behind_bytes: int = BEHIND_BYTES
) -> type[ray_runner.WorkerProcess]:
    """A worker in whose process every blob stays half written for a while."""

    class SlowBuffers:
        """The same buffers; the first comes, then nothing for a while, then the rest."""

        def __init__(self, buffers: Any) -> None:
            self.buffers, self.size_bytes = buffers, buffers.size_bytes

        def __iter__(self) -> Iterator[memoryview]:
            for nth, buffer in enumerate(self.buffers):
                if nth == 1:
                    time.sleep(pause_s)
                yield buffer

    def note(**facts: Any) -> None:
        with open(log, "a") as lines:
            lines.write(json.dumps(facts) + "\n")

    class SlowWorker(ray_runner.WorkerProcess):
        def __init__(self, plan_json: bytes, store_uri: str) -> None:
            super().__init__(plan_json, store_uri)
            write_once, delete, write = LocalStore.write_once, LocalStore.delete, BlobWriter.write

            def write_once_slowly(store: LocalStore, key: str, buffers: Any) -> Any:
                return write_once(store, key, SlowBuffers(buffers))

            def delete_and_note(store: LocalStore, key: str) -> None:
                if (
                    key.startswith(("residuals/", "residual-gradients/"))
                    and key.endswith(".json")
                    and store.head(key) is not None
                ):
                    note(deleted=key, is_replaced=is_replaced(Path(store.root), key))
                delete(store, key)

            def write_and_note(writer: BlobWriter, *args: Any) -> Any:
                try:
                    return write(writer, *args)
                except P48Error as error:
                    note(
                        failed=str(error),
                        behind=sum(not future.done() for _, future in writer.submitted),
                    )
                    raise

            blobs.BEHIND_BYTES = behind_bytes
            LocalStore.write_once = write_once_slowly  # type: ignore[method-assign]
            LocalStore.delete = delete_and_note  # type: ignore[method-assign]
            BlobWriter.write = write_and_note  # type: ignore[method-assign]

    # by which the faults know a worker
    SlowWorker.__name__ = SlowWorker.__qualname__ = ray_runner.WorkerProcess.__name__
    return SlowWorker


def is_replaced(root: Path, key: str) -> bool:
    """Whether a resume would do without this boundary: a higher one is stored, or the gradient came
    down to here, or all gradients are there."""
    kind, folder, name = key.removesuffix(".json").split("/")
    number = int(folder.removeprefix("layer-"))

    def layers(of: str, is_data_kept: bool = True) -> set[int]:
        """Where this part has a whole blob of the kind: a manifest, which comes last, and its data
        where no unit's end lets them go."""
        found = root.glob(f"{of}/layer-*/{name}.json")
        return {
            int(path.parent.name.removeprefix("layer-"))
            for path in found
            if not is_data_kept or path.with_suffix(".arrow").exists()
        }

    # data go with their layer's last unit (run.keep)
    if set(COMPRESSED_LAYERS) <= layers("gradients", is_data_kept=False):
        return True
    down = layers("residual-gradients")
    if kind == "residual-gradients":
        return any(n < number for n in down)
    return any(n > number for n in layers(kind)) or any(n <= number for n in down)


if __name__ == "__main__":
    seconds, file = float(sys.argv.pop(1)), sys.argv.pop(1)
    ray_runner.WorkerProcess = slowed(seconds, file)  # type: ignore[misc]
    typer.run(compress.main)
