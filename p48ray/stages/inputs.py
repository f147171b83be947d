"""The first things in a run root: what its store can do, the plan, and the texts as token ids.

Legend: N sequences, S tokens of each.
"""

import hashlib
import logging
from dataclasses import asdict

from p48ray.config import CalibrationConfig, EvaluationConfig
from p48ray.errors import CorruptObjectError, ObjectMissingError, ShardCorruptError
from p48ray.run import arrow, run_root
from p48ray.run.changing_hands import check_plan, finish_take_over, take_over
from p48ray.run.checked import load_tokens_manifest
from p48ray.run.manifest import StoreFacts, TokensManifest
from p48ray.run.plan import RunPlan
from p48ray.run.scratch import note_scratch, with_scratch
from p48ray.stages.evaluate import evaluation_digest
from p48ray.stages.prepare import Prepared
from p48ray.store.base import Store
from p48ray.store.open import open_store, scheme_of
from p48ray.store.probe import Capabilities, probe
from p48ray.texts.sequences import load_sequences, load_tokenizer

log = logging.getLogger("p48ray.progress")


def open_run_root(plan: RunPlan, store_uri: str) -> Store:
    """The run root as its probe found it: where ranges can not be copied on the store's side, they
    are streamed. Blobs lie in run.scratch, if there is one."""
    return with_scratch(plan, open_probed(plan, store_uri))


def open_probed(plan: RunPlan, store_uri: str) -> Store:
    store = open_store(store_uri, plan.config.run.endpoint_url)
    if scheme_of(store_uri).must_be_probed and store.head(run_root.STORE) is not None:
        found = Capabilities(
            **StoreFacts.load(store, run_root.STORE).model_dump(exclude={"schema_version"})
        )
        return open_store(store_uri, plan.config.run.endpoint_url, server_copy=found.server_copy)
    return store


def probe_once(store: Store) -> None:
    """Try a bucket out before a run trusts it, once a run root; again where what was found out can
    not be read.

    Raises: ConfigError when it lacks what a run can not do without.
    """
    if not scheme_of(store.uri).must_be_probed:
        return
    try:
        StoreFacts.load(store, run_root.STORE)
    except (ObjectMissingError, ShardCorruptError):
        store.put(run_root.STORE, StoreFacts(**asdict(probe(store))).to_json())


def check_run_root(prepared: Prepared) -> RunPlan | None:
    """The plan that the run root holds, once its store can hold a run: this one, or one with the
    same units (see changing_hands.check_plan).

    Raises: ConfigError for a store that cannot, PlanMismatchError for a run root of another plan.
    """
    probe_once(prepared.store)
    return check_plan(prepared.plan, prepared.store)


def are_packed(store: Store, key: str, owner: str) -> bool:
    """Whether a run's packed texts are there, and are not those of a plan that was there before."""
    try:
        load_tokens_manifest(store, key, owner)
    except CorruptObjectError:
        return False
    return store.head(key) is not None


def write_inputs(prepared: Prepared) -> None:
    """plan.json first, then the packed texts; the texts are read before either is written, so that
    a bad one leaves nothing behind."""
    plan, store = prepared.plan, prepared.store
    held = check_run_root(prepared)
    packed: list[tuple[str, TokensManifest, bytes]] = []
    c, e = plan.config.calibration, plan.config.evaluation
    wanted: list[tuple[str, CalibrationConfig | EvaluationConfig, int, str, str]] = [
        (run_root.TOKENS, c, c.sequence_length, "calibration", plan.units_digest)
    ]
    if e is not None:
        digest = evaluation_digest(plan, e)
        wanted.append(
            (run_root.evaluation_tokens(digest), e, e.sequence_length + 1, "evaluation", digest)
        )
    missing = [w for w in wanted if not are_packed(store, w[0], w[-1])]
    tokenizer = (
        load_tokenizer(prepared.source, plan.config.source.trust_remote_code) if missing else None
    )
    vocab_size = prepared.layout.text_config["vocab_size"]
    for key, section, length, name, owner in missing:
        ids_NS = load_sequences(
            section.documents,
            tokenizer,
            section.num_sequences,
            length,
            section.seed,
            vocab_size,
            name,
        )
        data = arrow.encode({"token_ids": ids_NS}, {"kind": "tokens", "owner": owner}).to_bytes()
        packed.append(
            (
                key,
                TokensManifest(
                    owner=owner, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
                ),
                data,
            )
        )
    if held is None and not store.put_if_absent(run_root.PLAN, plan.to_json()):
        held = check_plan(plan, store)  # another driver was faster
    if held is not None and held.digest != plan.digest:
        is_same = held.units_digest == plan.units_digest
        what = "goes on with the units" if is_same else "its source is mended; takes the place"
        log.info("%s: %s of the plan that was there", store.uri, what)
        take_over(plan, store)
    finish_take_over(plan, {shard.name for shard in prepared.shards}, store)
    for key, manifest, data in packed:
        store.put(key, data)
        store.put(run_root.manifest_of(key), manifest.to_json())
    note_scratch(plan, store)
