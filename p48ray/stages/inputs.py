"""The first things in a run root: what its store can do, the plan, and the texts as token ids.

Legend: N sequences, S tokens of each.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from p48ray.config import CalibrationConfig, EvaluationConfig
from p48ray.config.documents import DocumentSource
from p48ray.errors import CorruptObjectError, ObjectMissingError, ShardCorruptError
from p48ray.run import arrow, run_root
from p48ray.run.changing_hands import check_plan, finish_take_over, take_over
from p48ray.run.checked import load_tokens_manifest
from p48ray.run.manifest import SourceTexts, StoreFacts, TokensManifest
from p48ray.run.plan import RunPlan
from p48ray.run.records import load_readable
from p48ray.run.scratch import note_scratch, with_scratch
from p48ray.stages.evaluate import evaluation_digest
from p48ray.stages.prepare import Prepared
from p48ray.store.base import Store
from p48ray.store.open import open_store, scheme_of
from p48ray.store.probe import Capabilities, probe
from p48ray.texts.documents import read_documents, too_little
from p48ray.texts.packing import packer_of
from p48ray.texts.sequences import load_sequences, load_tokenizer, shares
from p48ray.texts.tally import Tally, spell_counts
from p48ray.texts.tokenizing import Encoder, with_encoder
from p48ray.unit.context import StageContext

SAMPLE_CHARACTERS = 4 * 2**20
"""Of each source, after which a dry run reads no further document."""
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


def source_texts(
    documents: Sequence[DocumentSource], tallies: Sequence[Tally]
) -> tuple[SourceTexts, ...]:
    """The records of what was read of each source of a mix."""
    return tuple(
        SourceTexts(
            path=source.path,
            rows=tally.rows,
            documents=tally.documents,
            characters=tally.characters,
            tokens=tally.tokens,
            skipped=dict(tally.skipped),
            cut=dict(tally.cut),
        )
        for source, tally in zip(documents, tallies, strict=True)
    )


def texts_read(context: StageContext) -> dict[str, tuple[SourceTexts, ...]]:
    """What was read of the texts, by section of the configuration, as far as it is known without
    looking at them again: of the held-out ones while they are evaluated, by the same process."""
    keys = {"calibration": run_root.TOKENS}
    if digest := context.known.get("evaluation"):
        keys["evaluation"] = run_root.evaluation_tokens(digest)
    manifests = {name: run_root.manifest_of(key) for name, key in keys.items()}
    found = load_readable(TokensManifest, context.store, list(manifests.values()))
    return {name: found[key].sources for name, key in manifests.items() if key in found}


def spell_texts(found: SourceTexts) -> str:
    """A line for people, with what was skipped and cut by reason."""
    skipped = f"; skipped: {spell_counts(found.skipped)}" if found.skipped else ""
    cut = f"; cut: {spell_counts(found.cut)}" if found.cut else ""
    return (
        f"{found.path}: {found.documents:,} documents of {found.rows:,} rows, {found.tokens:,}"
        f" tokens{skipped}{cut}"
    )


def sampled_texts(prepared: Prepared, is_asking: bool = False) -> list[str]:
    """What a dry run says of the texts: a line for each source, read and tokenized as the run will,
    up to SAMPLE_CHARACTERS.

    Args:
        prepared: the run, planned.
        is_asking: buckets and the Hub are asked too; else of a source there it is said that it was
            not read.
    Raises: CalibrationError as the run would, of what was read; SourceError where the tokenizer can
        not be loaded; what a store raises that can not be reached.
    """
    config = prepared.plan.config
    c, e = config.calibration, config.evaluation
    wanted: list[tuple[str, CalibrationConfig | EvaluationConfig, int]] = [
        ("calibration", c, c.sequence_length)
    ]
    if e is not None:
        wanted.append(("evaluation", e, e.sequence_length + 1))

    def sampled(encoder: Encoder | None) -> list[str]:
        return [
            f"{name} texts: {source.path}: not read, it is not on this machine (--texts asks for a"
            " sample)"
            if encoder is None or not (is_asking or scheme_of(source.path).is_local)
            else _sampled(source, name, share, length, section.seed, encoder)
            for name, section, length in wanted
            for source, share in zip(
                section.documents,
                shares([d.weight for d in section.documents], section.num_sequences),
                strict=True,
            )
        ]

    places = [d.path for _, section, _ in wanted for d in section.documents]
    if not (is_asking or any(scheme_of(place).is_local for place in places)):
        return sampled(None)
    tokenizer = load_tokenizer(prepared.source, config.source.trust_remote_code)
    return with_encoder(tokenizer, sampled)


def _sampled(
    source: DocumentSource, name: str, share: int, length: int, seed: int, encoder: Encoder
) -> str:
    """The line of one source that is read.

    Args:
        source: of the mix.
        name: section of the configuration.
        share: sequences that are wanted of it.
        length: tokens of each.
        seed: of the section.
        encoder: of the source's tokenizer.
    """
    key, tally = f"{name}.documents", Tally()
    texts = beginning(read_documents(source, key, seed, encoder.tokenizer, tally), tally)
    with packer_of(encoder) as packer:
        rows = packer.pack(texts, length, tally=tally)
    is_all = tally.characters < SAMPLE_CHARACTERS
    if is_all and len(rows) < share:
        raise too_little(source, key, share, length, len(rows), tally)
    part = "" if is_all else f" (a sample: the first {SAMPLE_CHARACTERS:,} characters)"
    (found,) = source_texts([source], [tally])
    return f"{name} texts: {spell_texts(found)}{part}"


def beginning(texts: Iterator[str], tally: Tally) -> Iterator[str]:
    """Documents until they have SAMPLE_CHARACTERS. Args: tally: that counts them."""
    for text in texts:
        yield text
        if tally.characters >= SAMPLE_CHARACTERS:
            return


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
        tallies: list[Tally] = []
        origins: list[int] = []
        ids_NS = load_sequences(
            section.documents,
            tokenizer,
            section.num_sequences,
            length,
            section.seed,
            vocab_size,
            name,
            tallies,
            origins,
        )
        sources = source_texts(section.documents, tallies)
        for found in sources:
            log.info("%s texts: %s", name, spell_texts(found))
        data = arrow.encode({"token_ids": ids_NS}, {"kind": "tokens", "owner": owner}).to_bytes()
        packed.append(
            (
                key,
                TokensManifest(
                    owner=owner,
                    size_bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    sources=sources,
                    origins=tuple(origins),
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
