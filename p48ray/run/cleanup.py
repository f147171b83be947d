"""Cleanup: what a run root holds that nothing will read again, deleted as `run.keep` says.

    all          everything stays, except attempts that lost
    units        a layer's activations and gradients go once its units are done, boundaries of the
                 streams as soon as the next one is stored
    checkpoint   unit shards go too, once the checkpoint is verified

Manifests of activations, gradients and units always stay: they are the record of what was done, and
kilobytes. Those of boundaries go with their blobs. Nothing is deleted that an open unit could need;
if a unit has to be done again after all, its layer is captured again (run.needs).
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.run.needs import Needs, read_needs
from p48ray.run.plan import RunPlan
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
    """Delete what no open unit needs: boundaries once no part is under way, activations and
    gradients of finished layers."""
    needs = read_needs(plan, store)
    unneeded = [
        key for key in needs.keys if is_data(key) and layer_of_key(key) not in needs.open_layers
    ]
    if not any(needs.forward_layers(p.part) or needs.backward_layers(p.part) for p in plan.parts):
        unneeded += [
            key
            for key in needs.keys
            if key.startswith((run_root.RESIDUALS, run_root.RESIDUAL_GRADIENTS))
        ]
    if not needs.open_layers:
        unneeded += [key for key in needs.keys if key.startswith(run_root.COMPRESSED_RESIDUALS)]
    return delete_all(store, unneeded)


def is_data(key: str) -> bool:
    return key.startswith((run_root.ACTIVATIONS, run_root.GRADIENTS)) and key.endswith(".arrow")


def layer_of_key(key: str) -> int:
    return int(key.split("/")[1].removeprefix("layer-"))


def delete_lost_attempts(plan: RunPlan, store: Store) -> int:
    """Delete shards of attempts that no manifest names, of units that are done. An attempt still
    under way finds the manifest taken and gives up."""
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
    losers = [
        k for m in manifests for k in shards[m.unit] if k != run_root.unit_shard(m.unit, m.attempt)
    ]
    return delete_all(store, losers)


def by_unit(needs: Needs) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in needs.keys:
        found.setdefault(key.split("/")[1], []).append(key)
    return found


def delete_unit_shards(store: Store) -> int:
    """Delete all unit shards; their manifests stay."""
    return delete_all(
        store,
        [info.key for info in store.list(run_root.UNITS) if info.key.endswith(".safetensors")],
    )


def delete_all(store: Store, keys: Iterable[str]) -> int:
    """Delete objects, some at once. Returns how many keys were named."""
    wanted = sorted(keys)
    with ThreadPoolExecutor(DELETES_AT_ONCE) as pool:
        list(pool.map(store.delete, wanted))
    return len(wanted)
