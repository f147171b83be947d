"""Cleanup: what a run root holds that nothing will read again, deleted as `run.keep` says.

    all          everything stays, except attempts that lost
    units        a layer's activations and gradients go once its units are done, boundaries of the
                 streams as soon as the next one is stored
    checkpoint   unit shards go too, once the checkpoint is verified

Manifests of activations, gradients and units always stay: they are the record of what was done, and
kilobytes. Those of boundaries go with their blobs. Nothing is deleted that an open unit could need;
if a unit has to be done again after all, its layer is captured again (run.needs).

What a finished run leaves for ever, the mirror of its source and its units' shards, an operator
deletes with `p48ray clean` (find_removable).
"""

from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.run.needs import Needs, read_needs
from p48ray.run.plan import RunPlan
from p48ray.run.records import Record
from p48ray.store.base import Store

DELETES_AT_ONCE = 16
ABANDONED_S = 24 * 3600.0  # what a writer left unfinished for a day, it will not finish


def delete_layer_data(plan: RunPlan, store: Store, layer: int) -> int:
    """Delete a finished layer's activations and gradients."""
    parts = [p.part for p in plan.parts]
    activations = [run_root.activation_part(layer, p) for p in parts]
    gradients = [run_root.gradient_part(layer, p) for p in parts] if plan.uses_gradients else []
    return delete_all(store, activations + gradients)


def delete_spent_streams(plan: RunPlan, store: Store) -> int:
    """Delete what no open unit needs."""
    return delete_all(store, spent_streams(plan, store))


def spent_streams(plan: RunPlan, store: Store) -> list[str]:
    """What no open unit needs: boundaries once no part is under way, activations and gradients of
    finished layers."""
    needs = read_needs(plan, store)
    unneeded = [
        key for key in needs.keys if is_data(key) and layer_of_key(key) not in needs.open_layers
    ]
    if not any(needs.is_under_way(p.part) for p in plan.parts):
        unneeded += [
            key
            for key in needs.keys
            if key.startswith((run_root.RESIDUALS, run_root.RESIDUAL_GRADIENTS))
        ]
    if not needs.open_layers:
        unneeded += [key for key in needs.keys if key.startswith(run_root.COMPRESSED_RESIDUALS)]
    return unneeded


def is_data(key: str) -> bool:
    return key.startswith((run_root.ACTIVATIONS, run_root.GRADIENTS)) and key.endswith(".arrow")


def layer_of_key(key: str) -> int:
    return int(key.split("/")[1].removeprefix("layer-"))


def delete_lost_attempts(plan: RunPlan, store: Store) -> int:
    """Delete shards of attempts that no manifest names. An attempt still under way finds the
    manifest taken and gives up."""
    return delete_all(store, lost_attempts(plan, store))


def lost_attempts(plan: RunPlan, store: Store) -> list[str]:
    """Shards that no manifest names, of units that are done."""
    needs = read_needs(plan, store, [run_root.UNITS])
    found = by_unit(needs)
    shards = {
        unit.id: [k for k in found.get(unit.id, []) if k.endswith(".safetensors")]
        for unit in plan.units
    }
    contested = [
        unit
        for unit, keys in shards.items()
        if len(keys) > 1 and run_root.unit_manifest(unit) in needs.keys
    ]
    manifests = UnitManifest.load_all(store, map(run_root.unit_manifest, contested))
    return [
        k for m in manifests for k in shards[m.unit] if k != run_root.unit_shard(m.unit, m.attempt)
    ]


def by_unit(needs: Needs) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in needs.keys:
        found.setdefault(key.split("/")[1], []).append(key)
    return found


def delete_unit_shards(store: Store) -> int:
    """Delete all unit shards; their manifests stay."""
    return delete_all(store, unit_shards(store))


def unit_shards(store: Store) -> list[str]:
    return [info.key for info in store.list(run_root.UNITS) if info.key.endswith(".safetensors")]


class Removable(Record):
    """Objects of a run root that may go, by one name. `waits_for`: what has to be there first, and
    is not; None: they may go now. `price`: what it takes to have them again."""

    name: str
    keys: tuple[str, ...]
    num_bytes: int
    waits_for: str | None
    price: str


def find_removable(plan: RunPlan, store: Store) -> list[Removable]:
    """All that a run root can do without, by now or later: what `run.keep` would have deleted, and
    what a finished run leaves behind for ever. Nothing is deleted."""
    sizes = {info.key: info.size_bytes for info in store.list()}
    waits_for = None
    if plan.is_pilot:
        waits_for = "a run of all layers, which goes on with a pilot's units"
    elif run_root.REPORT not in sizes:
        waits_for = "the end of the run: its checkpoint verified, and evaluated if that is asked"
    source = [key for key in sizes if key.startswith((run_root.MIRROR, run_root.SOURCE))]
    found = (
        ("streams", spent_streams(plan, store), None, "the streams run again, for units made anew"),
        ("attempts", lost_attempts(plan, store), None, "nothing: no manifest names them"),
        ("units", unit_shards(store), waits_for, "a unit is made anew for a shard that is lost"),
        ("mirror", source, waits_for, "the next run on this run root copies it from the Hub again"),
    )
    return [
        Removable(
            name=name,
            keys=tuple(keys),
            num_bytes=sum(sizes.get(key, 0) for key in keys),
            waits_for=waits,
            price=price,
        )
        for name, keys, waits, price in found
    ]


def describe_removable(
    uri: str, found: Iterable[Removable], deleted: Container[str]
) -> Iterator[str]:
    """In lines, for a terminal.

    Args:
        uri: of the run root.
        found: as find_removable returns it.
        deleted: names of what goes now.
    """
    yield f"{uri}:"
    for f in found:
        state = "deleted" if f.name in deleted else f"waits for {f.waits_for}"
        if f.name not in deleted and f.waits_for is None:
            state = "may go"
        words = f"{len(f.keys):,} objects, {f.num_bytes:,} bytes: {state if f.keys else 'none'}"
        yield f"  {f.name:<9} {words}" + (f"; to have them again: {f.price}" if f.keys else "")


def delete_all(store: Store, keys: Iterable[str]) -> int:
    """Delete objects, some at once. Returns how many keys were named."""
    wanted = sorted(keys)
    with ThreadPoolExecutor(DELETES_AT_ONCE) as pool:
        list(pool.map(store.delete, wanted))
    return len(wanted)
