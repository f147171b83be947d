"""How long the checkpoint writes what its source writes, against models that transformers runs one
token at a time."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from p48ray.errors import NumericsError, StageFailedError
from p48ray.model.experts import ExpertWeights
from p48ray.report.report import Report
from p48ray.run import run_root
from p48ray.run.doctor import diagnose
from p48ray.run.greedy_records import Continuations, ContinuedPrompt, FollowedPrompt, GreedyPart
from p48ray.stages import greedy
from p48ray.stages.compressed_experts import finished_experts
from p48ray.stages.evaluate import evaluation_digest
from p48ray.stages.greedy import (
    GreedyAgreement,
    agreement_parts,
    combine_agreements,
    continue_prompts,
    followed_prompts,
    settle,
    wants_agreement,
)
from p48ray.stages.prepare import prepare
from p48ray.unit.context import StageContext
from tests.conftest import TINY
from tests.jobs.command import HELD_OUT, ROUNDED, arguments, invoke, snapshot
from tests.reference import whole_model
from tests.stages.small_run import SmallRun, configure, run_locally
from tests.stages.test_evaluate import compressed_model

PROMPT, LENGTH = 20, 24
SETTINGS = f"evaluation.greedy={{prompts: 3, prompt_tokens: {PROMPT}, tokens: {LENGTH}}}"


@pytest.fixture
def root(finished: SmallRun, tmp_path: Path) -> Path:
    """A copy of the finished run, which has looked at no agreement."""
    found = tmp_path / "run"
    shutil.copytree(finished.root, found, ignore=shutil.ignore_patterns("residuals", "activations"))
    return found


@pytest.fixture
def context(finished: SmallRun, root: Path) -> StageContext:
    return prepare(configure(finished.source, root, SETTINGS)).context


@pytest.fixture
def texts(context: StageContext) -> Tensor:
    """(3, 44) token ids: prompts and what the held-out texts go on with."""
    _, evaluation, _ = agreement_parts(context)
    ids = context.tokens(run_root.evaluation_tokens(evaluation), evaluation)
    return ids[:, : PROMPT + LENGTH].long()


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    return whole_model.load(TINY)


def generated(model: PreTrainedModel, prompts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """What transformers writes after prompts, with its cache, and how far each token's logit lies
    above the next one's. No token ends a text."""
    model.generation_config.eos_token_id = None
    found = model.generate(
        prompts,
        do_sample=False,
        max_new_tokens=length,
        min_new_tokens=length,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    first, second = torch.stack(found.logits, 1).topk(2, 2).values.unbind(2)
    return found.sequences[:, prompts.shape[1] :], first - second


def test_continuations_are_what_transformers_generates_from_the_source(
    context: StageContext, texts: Tensor, source: PreTrainedModel
) -> None:
    found = continue_prompts(context, texts, PROMPT, 0)
    tokens, margins = generated(source, texts[:, :PROMPT], LENGTH)
    assert [list(p.tokens) for p in found.prompts] == tokens.tolist()
    for prompt, expected in zip(found.prompts, margins.tolist(), strict=True):
        assert prompt.margins == pytest.approx(expected, abs=1e-3)
    assert 1 < found.passes <= LENGTH
    assert min(min(p.margins) for p in found.prompts) > 1e-3, "a near tie would prove nothing"
    assert tokens.tolist() != texts[:, PROMPT:].tolist(), "the texts are no greedy continuations"


def test_draft_changes_the_number_of_passes_and_no_token(
    context: StageContext, texts: Tensor
) -> None:
    found = continue_prompts(context, texts, PROMPT, 0)
    right = torch.tensor([p.tokens for p in found.prompts])
    again = continue_prompts(context, torch.cat([texts[:, :PROMPT], right], 1), PROMPT, 0)
    assert again.passes == 1
    assert [p.tokens for p in again.prompts] == [p.tokens for p in found.prompts]
    wrong = continue_prompts(
        context, torch.cat([texts[:, :PROMPT], (right + 1) % 2048], 1), PROMPT, 0
    )
    assert wrong.passes > 1
    assert [p.tokens for p in wrong.prompts] == [p.tokens for p in found.prompts]


@pytest.mark.parametrize("seed", range(20))
def test_passes_settle_what_one_token_after_the_other_gives(seed: int) -> None:
    """With a model of the test: the next token is a hash of the last three."""

    def following(before: Sequence[int]) -> int:
        return hash((seed, *before[-3:])) % 5

    prompt, written = [seed, 1, 2], [seed, 1, 2]
    for _ in range(12):
        written.append(following(written))
    drawn = torch.randint(5, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    found, passes = ContinuedPrompt(tokens=tuple(drawn), margins=()), 0
    while found.settled < 12:
        read = [*prompt, *found.tokens]
        choices = [following(read[: 3 + place]) for place in range(12)]
        before = found.settled
        found = settle(found, choices, [float(100 * passes + place) for place in range(12)])
        passes += 1
        assert found.settled > before
        assert list(found.tokens[: found.settled]) == written[3 : 3 + found.settled]
    assert list(found.tokens) == written[3:] and passes <= 12
    assert [m % 100 for m in found.margins] == list(range(12)), "of their own places"
    assert settle(found, [9] * 12, [0.0] * 12) == found, "what is settled stays"


def in_source(context: StageContext) -> Callable[[int, int], ExpertWeights]:
    """The source's own experts, as compressed ones are asked for."""

    def expert(layer: int, number: int) -> ExpertWeights:
        stored = context.decoder().reader.tensors(layer)
        return context.decoded(layer, number, stored)

    return expert


def test_source_follows_itself_to_the_end_in_one_pass(
    finished: SmallRun, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(finished.source, root, SETTINGS, "evaluation.activations=original")
    context = prepare(config).context
    (ids,) = (
        context.tokens(f"{run_root.EVALUATION}{folder.name}/tokens.arrow", folder.name)
        for folder in (root / "evaluation").iterdir()
    )
    texts = ids[:, : PROMPT + LENGTH].long()
    found = continue_prompts(context, texts, PROMPT, 0)
    calls: list[int] = []
    real = greedy.through_layers

    def counted(*args: object) -> list[Tensor]:
        calls.append(1)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(greedy, "through_layers", counted)
    followed = followed_prompts(context, in_source(context), texts[:, :PROMPT], found)
    assert [p.followed for p in followed] == [LENGTH] * 3
    assert [p.margin for p in followed] == [None] * 3
    assert calls == [1]
    for p, c in zip(followed, found.prompts, strict=True):
        assert p.mean_margin == pytest.approx(sum(c.margins) / LENGTH)


def lengths_one_by_one(
    source: PreTrainedModel, other: PreTrainedModel, prompts: Tensor, length: int
) -> list[int]:
    """Both read what the source has written so far, whole; a token more while they agree."""
    found = []
    for prompt in prompts:
        text, followed = prompt[None], 0
        while followed < length:
            with torch.no_grad():
                a, b = (
                    m(input_ids=text, use_cache=False).logits[0, -1].argmax()
                    for m in (source, other)
                )
            if a != b:
                break
            followed, text = followed + 1, torch.cat([text, a.view(1, 1)], 1)
        found.append(followed)
    return found


@pytest.mark.slow
def test_model_with_a_wrong_expert_differs_where_it_does_one_token_at_a_time(
    finished: SmallRun, root: Path, source: PreTrainedModel
) -> None:
    """An expert of the last layer writes nothing."""
    config = configure(finished.source, root, SETTINGS, "evaluation.activations=original")
    context = prepare(config).context
    folder = next((root / "evaluation").iterdir())
    ids = context.tokens(run_root.evaluation_tokens(folder.name), folder.name)
    texts, right = ids[:, : PROMPT + LENGTH].long(), in_source(context)
    other, layer = whole_model.load(TINY), context.plan.layers[-1]
    found = continue_prompts(context, texts, PROMPT, 0)
    lengths = []
    for wrong in range(4):
        weights = other.model.layers[layer].mlp.experts.down_proj.data[wrong]
        kept = weights.clone()
        weights.zero_()

        def spoiled(number: int, expert: int, wrong: int = wrong) -> ExpertWeights:
            weights = right(number, expert)
            if (number, expert) != (layer, wrong):
                return weights
            return weights._replace(down_HF=torch.zeros_like(weights.down_HF))

        followed = followed_prompts(context, spoiled, texts[:, :PROMPT], found)
        lengths.append([p.followed for p in followed])
        assert lengths[-1] == lengths_one_by_one(source, other, texts[:, :PROMPT], LENGTH)
        weights.copy_(kept)
        for p, c in zip(followed, found.prompts, strict=True):
            assert p.margin == (c.margins[p.followed] if p.followed < LENGTH else None)
    told = {length for each in lengths for length in each}
    assert len(told) > 2, f"lengths that are all alike would prove nothing: {lengths}"


@pytest.mark.slow
def test_checkpoint_differs_where_its_whole_model_with_quantized_inputs_does(
    finished: SmallRun, context: StageContext, texts: Tensor, source: PreTrainedModel
) -> None:
    """W4A4 by the test's own tables, one token at a time."""
    found = continue_prompts(context, texts, PROMPT, 0)
    followed = followed_prompts(context, finished_experts(context), texts[:, :PROMPT], found)
    expected = lengths_one_by_one(source, compressed_model(finished), texts[:, :PROMPT], LENGTH)
    assert [p.followed for p in followed] == expected
    assert len(set(expected)) > 1 and max(expected) > 2, expected


# The stage


def greedy_files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in (root / "greedy").rglob("*.json")
    }


def run_on(finished: SmallRun, root: Path, *overrides: str) -> Report:
    return run_locally(prepare(configure(finished.source, root, SETTINGS, *overrides)))


def test_job_reports_what_its_records_say_and_the_doctor_knows_them(
    finished: SmallRun, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "p48ray.progress")
    report = run_on(finished, root)
    assert report.quality == finished.report.quality, "the evaluation is not another one"
    files = greedy_files(root)
    (part,) = (data for key, data in files.items() if "/part-" in key)
    (continued,) = (data for key, data in files.items() if "/continuations/" in key)
    record = GreedyPart.from_json(part, "part")
    assert report.greedy == combine_agreements([record], PROMPT)
    assert record.passes == Continuations.from_json(continued, "continuations").passes
    lines = re.findall(r"part 0, pass (\d+) of at most 24 over the source", caplog.text)
    assert lines == [str(n + 1) for n in range(record.passes)]
    found = diagnose(prepare(configure(finished.source, root, SETTINGS)).store)
    assert (found.unsound, found.unknown) == ((), ())
    caplog.clear()
    assert run_on(finished, root).greedy == report.greedy
    assert "over the source" not in caplog.text, "nothing is done twice"
    assert greedy_files(root) == files


@pytest.mark.slow
def test_killed_between_passes_it_goes_on_from_the_last_and_ends_in_the_same_records(
    finished: SmallRun, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(root, undisturbed)
    run_on(finished, undisturbed)
    expected = greedy_files(undisturbed)
    real, calls = greedy.through_layers, []

    class Killed(BaseException):
        """Nothing catches it."""

    def dying(*args: object) -> list[Tensor]:
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(greedy, "through_layers", dying)
    with pytest.raises(Killed):
        run_on(finished, root)
    (left,) = greedy_files(root).values()
    assert Continuations.from_json(left, "continuations").passes == 5
    run_on(finished, root)
    assert greedy_files(root) == expected
    passes = next(json.loads(d)["passes"] for k, d in expected.items() if "/part-" in k)
    assert len(calls) == passes + 2, "one pass was lost, one is the checkpoint's"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "of others", "one prompt longer than it can be"])
def test_unsound_records_are_made_anew_by_the_same_run(
    finished: SmallRun, root: Path, damage: str
) -> None:
    report = run_on(finished, root)
    expected = greedy_files(root)
    for key, data in expected.items():
        said = json.loads(data)
        if damage == "of others":
            said |= {"digest": "f" * 16} if "digest" in said else {"agreement": "f" * 16}
        elif "agreement" in said:
            said["prompts"][0]["followed"] = LENGTH + 1
        damaged = data[:-9] if damage == "cut" else json.dumps(said).encode()
        if damage == "cut" or json.loads(data) != said:
            (root / key).write_bytes(damaged)
    shutil.rmtree(root / "report")
    found = diagnose(prepare(configure(finished.source, root, SETTINGS)).store)
    assert len(found.unsound) == (1 if damage.startswith("one prompt") else 2)
    assert run_on(finished, root).greedy == report.greedy
    assert greedy_files(root) == expected


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no prompts", "fewer", "shorter", "unknown token"])
def test_records_of_other_prompts_are_made_anew_by_the_same_run(
    finished: SmallRun, root: Path, damage: str
) -> None:
    """Readable ones, which the next pass or the figures would trip over."""
    report = run_on(finished, root)
    expected = greedy_files(root)
    (part,) = (key for key in expected if "/part-" in key)
    (written,) = expected.keys() - {part}
    if damage == "no prompts":
        (root / part).write_text(json.dumps(json.loads(expected[part]) | {"prompts": []}))
    else:
        (root / part).unlink()
        said = json.loads(expected[written])
        first = said["prompts"][0]
        if damage == "fewer":
            del said["prompts"][0]
        elif damage == "shorter":
            first["tokens"] = first["tokens"][:-1]
        else:
            first["tokens"][0] = 10**6
        (root / written).write_text(json.dumps(said))
    shutil.rmtree(root / "report")
    assert run_on(finished, root).greedy == report.greedy
    assert greedy_files(root) == expected


def test_logits_that_are_not_finite_are_an_error_and_leave_nothing(
    finished: SmallRun, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = greedy.through_layers

    def spoiled(*args: object) -> list[Tensor]:
        return [x * torch.inf for x in real(*args)]  # type: ignore[arg-type]

    monkeypatch.setattr(greedy, "through_layers", spoiled)
    with pytest.raises(StageFailedError, match="NumericsError: greedy: expected finite logits"):
        run_on(finished, root)
    assert not (root / "greedy").exists()


@pytest.mark.slow
def test_baseline_takes_the_same_continuations(
    finished: SmallRun, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "p48ray.progress")
    report = run_on(finished, root, "evaluation.baseline=true")
    assert report.greedy is not None and report.baseline_greedy is not None
    assert len(re.findall("over the source", caplog.text)) == report.greedy.passes
    assert report.baseline_greedy.passes == report.greedy.passes
    assert report.baseline_greedy != report.greedy
    ours, theirs = (
        {k: d for k, d in greedy_files(r).items() if "/continuations/" in k}
        for r in (root, root / "baseline")
    )
    assert ours == theirs != {}


def test_evaluation_and_units_are_the_same_with_and_without(
    finished: SmallRun, context: StageContext
) -> None:
    plain, wanted = finished.prepared.plan, context.plan
    assert plain.digest == wanted.digest
    assert plain.config.evaluation is not None and wanted.config.evaluation is not None
    assert evaluation_digest(plain, plain.config.evaluation) == evaluation_digest(
        wanted, wanted.config.evaluation
    )
    assert not wants_agreement(plain) and wants_agreement(wanted)
    pilot = prepare(configure(finished.source, "/nowhere", SETTINGS, "run.layers=[1]")).plan
    assert not wants_agreement(pilot), "it has no compressed model"


@pytest.mark.parametrize(
    "change",
    ["tokens: 23", "prompt_tokens: 19", "prompts: 2", "prompts_per_part: 2"],
)
def test_other_settings_are_another_agreement(
    finished: SmallRun, context: StageContext, root: Path, change: str
) -> None:
    key, _, value = change.partition(": ")
    config = configure(finished.source, root, SETTINGS, f"evaluation.greedy.{key}={value}")
    other = prepare(config).context
    assert agreement_parts(other)[0] != agreement_parts(context)[0]


def test_two_ray_workers_leave_the_records_of_one_process(
    ray_session: None, tmp_path: Path
) -> None:
    """Three parts of a prompt each, on the narrow model."""
    own = ", greedy: {prompts: 3, prompt_tokens: 20, tokens: 12, prompts_per_part: 1}}"
    held_out = HELD_OUT.replace("num_sequences: 2", "num_sequences: 3").replace("}", own)
    settings = ROUNDED | {"evaluation": held_out}
    outcome = invoke(*arguments(tmp_path / "ray", settings), on_ray=True)
    assert outcome.code == 0, outcome
    assert "greedy    3/3 prompt parts" in outcome.out
    assert invoke(*arguments(tmp_path / "alone", settings)).code == 0
    found, expected = (snapshot(tmp_path / name / "greedy") for name in ("ray", "alone"))
    assert found == expected and len(found) == 6


# Figures


def followed(length: int, of: int = 8) -> FollowedPrompt:
    margin = None if length == of else length / 10
    return FollowedPrompt(followed=length, margin=margin, mean_margin=float(length))


def part_of(*lengths: int) -> GreedyPart:
    prompts = tuple(map(followed, lengths))
    return GreedyPart(
        plan_digest="d", agreement="a", part=0, tokens=8, passes=len(lengths), prompts=prompts
    )


def test_figures_are_of_all_prompts_of_all_parts() -> None:
    found = combine_agreements([part_of(8, 2, 3), part_of(8, 1, 8, 8, 5, 4, 8)], 16)
    assert found == GreedyAgreement(
        num_prompts=10,
        prompt_tokens=16,
        tokens=8,
        median=8,  # five of ten reach it
        reached_by_90=2,  # one does not
        never_differed=0.5,
        margin_at_difference=0.3,
        mean_margin=5.5,
        num_parts=2,
        passes=10,
    )
    alone = combine_agreements([part_of(7)], 16)
    assert (alone.median, alone.reached_by_90, alone.never_differed) == (7, 7, 0)
    few = combine_agreements([part_of(8, 2, 3)], 16)
    assert (few.median, few.reached_by_90) == (3, 2), "one of three is not half of them"
    many = combine_agreements([part_of(*[5] * 99, *[1] * 11)], 16)
    assert many.reached_by_90 == 5, "99 of 110 are 90 %, whatever floats say"
    whole = combine_agreements([part_of(8, 8)], 16)
    assert (whole.never_differed, whole.margin_at_difference) == (1, None)


@pytest.mark.parametrize(("length", "margin"), [(9, None), (8, 0.5), (7, None)])
def test_record_whose_margin_is_not_that_of_a_difference_is_refused(
    length: int, margin: float | None
) -> None:
    wrong = FollowedPrompt(followed=length, margin=margin, mean_margin=1.0)
    with pytest.raises(ValueError, match="expected a margin where fewer than 8 tokens are"):
        GreedyPart(plan_digest="d", agreement="a", part=0, tokens=8, passes=1, prompts=(wrong,))


def test_margins_that_are_no_numbers_are_not_written() -> None:
    record = part_of(7).model_copy(
        update={"prompts": (FollowedPrompt(followed=7, margin=torch.inf, mean_margin=1.0),)}
    )
    with pytest.raises(NumericsError, match=r"GreedyPart: prompts\.0\.margin: expected a finite"):
        record.to_json()
