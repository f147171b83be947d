"""Configuration: what is refused, and in which words."""

import re
from pathlib import Path

import pytest
import yaml

from p48ray.config import RunConfig
from p48ray.config.load import baseline_config, dotted_keys, load_config, lookup
from p48ray.config_page import all_settings, spell_type
from p48ray.errors import ConfigError
from p48ray.run.plan import SETTINGS
from tests.conftest import REPO

TINY_CONFIG = REPO / "configs" / "tiny.yaml"


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert isinstance(load_config(path), RunConfig)


@pytest.mark.parametrize("model", ["Kimi-K2.6", "Kimi-K2.7-Code"])
def test_kimis_later_releases_differ_from_the_first_in_names_and_places(model: str) -> None:
    stem = model.lower().replace("-k2.", "_k2").replace("-", "_")
    first, later = (
        load_config(REPO / "configs" / f"{name}_p48_nvfp4.yaml") for name in ("kimi_k25", stem)
    )
    assert later.source.checkpoint == f"hf://moonshotai/{model}@main"
    differing = {key for key in dotted_keys() if lookup(first, key) != lookup(later, key)}
    of_benchmarks = {f"{role}.checkpoint" for role in ("base", "baseline", "ours")}
    assert differing == {"name", "source.checkpoint", "run.root"} | {
        f"benchmarks.{key}" for key in (*of_benchmarks, "base.title")
    }
    assert model in later.name and "K2.5" not in later.model_dump_json()


def written(folder: Path, **files: str) -> Path:
    """Files by their stems; returns the first."""
    for stem, text in files.items():
        (folder / f"{stem}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_extending_file_changes_what_it_says_and_replaces_lists_whole(tmp_path: Path) -> None:
    above = """
extends: below.yaml
compression: {sweeps: 2}
calibration: {documents: [{path: one}]}
evaluation: null
"""
    path = written(tmp_path, above=above, below=TINY_CONFIG.read_text())
    found, below = load_config(path), load_config(TINY_CONFIG)
    assert below.evaluation is not None and below.compression.sweeps != 2
    assert found.compression == below.compression.model_copy(update={"sweeps": 2})
    assert [d.path for d in found.calibration.documents] == ["one"]
    assert found.calibration.num_sequences == below.calibration.num_sequences
    assert (found.evaluation, found.run) == (None, below.run)


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ("", r"above.yaml: extends: expected a file's name, found None"),
        ("[below.yaml]", r"above.yaml: extends: expected a file's name, found \['below.yaml'\]"),
        ("missing.yaml", r"above.yaml: extends: .*missing.yaml: can not be read: No such file"),
        ("broken.yaml", r"above.yaml: extends: .*broken.yaml: not valid YAML"),
        ("above.yaml", r"expected a file that extends no other, found above.yaml with extends"),
    ],
)
def test_file_that_can_not_be_extended_is_named(extends: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, above=f"extends: {extends}", broken="a: [")
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_overrides_are_typed_as_in_the_file() -> None:
    config = load_config(
        TINY_CONFIG,
        ("compression.sweeps=2", "output.max_shard_size=1.5 GiB", "evaluation=null"),
        run_root="elsewhere",
    )
    assert (
        config.compression.sweeps,
        config.output.max_shard_size,
        config.evaluation,
        config.run.root,
    ) == (
        2,
        1610612736,
        None,
        "elsewhere",
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "compression.dampp=0.1",
            ["compression.dampp", "unknown key", "did you mean compression.damp?"],
        ),
        ("compression.damp=-1", ["compression.damp", "greater than 0", "found -1"]),
        ("compression.sweeps=1.5", ["compression.sweeps", "valid integer", "found 1.5"]),
        ("run.num_workers=two", ["run.num_workers", "valid integer", "found 'two'"]),
        ("run.num_workers=true", ["run.num_workers", "valid integer", "found True"]),
        (
            "output.max_shard_size=3XB",
            ["output.max_shard_size", "expected a size such as 5GB", "found '3XB'"],
        ),
        ("compression.solver=magic", ["compression.solver", "'block_descent'", "found 'magic'"]),
        (
            "evaluation.greedy={prompts: 97, prompt_tokens: 8, tokens: 8}",
            ["evaluation: greedy.prompts: expected at most num_sequences = 96, found 97"],
        ),
        (
            "evaluation.greedy={prompts: 96, prompt_tokens: 500, tokens: 13}",
            [
                "evaluation: greedy.prompt_tokens + greedy.tokens: expected at most"
                " sequence_length = 512, found 500 + 13",
            ],
        ),
        (
            "evaluation.greedy={prompts: 4, tokens: 8}",
            ["evaluation.greedy.prompt_tokens: required"],
        ),
        (
            "evaluation.greedy={prompts: 0, prompt_tokens: 8, tokens: 8}",
            ["evaluation.greedy.prompts", "greater than 0", "found 0"],
        ),
        (
            "compression={solver: gptq}",
            ["compression", "solver 'gptq' needs sparsity 'none', found 'paired-4:8'"],
        ),
        (
            "compression={solver: round_to_nearest, output_curvature: true}",
            ["compression", "output_curvature needs solver 'block_descent'"],
        ),
        (
            "compression={solver: round_to_nearest, refine_steps: 5}",
            ["compression", "refine_steps needs solver 'block_descent'"],
        ),
        (
            "compression={refine_steps: 5, activation_quantization: false}",
            ["compression", "refine_steps needs activation_quantization: true"],
        ),
        (
            "calibration.documents=[{path: a, weigt: 2}]",
            ["calibration.documents.0.weigt", "unknown key"],
        ),
        ("calibration.documents=[]", ["calibration.documents", "at least 1 item"]),
        (
            "calibration.documents=[{path: a, weight: 0}]",
            ["calibration.documents.0.weight", "greater than 0"],
        ),
        (
            "calibration.documents=[{path: a, weight: .inf}]",
            ["calibration.documents.0.weight", "finite number"],
        ),
        *(
            (
                f"{section}.documents=[{{path: a}}, {{path: b, name: {name!r}}}]",
                [
                    f"{section}.documents.1.name: expected 1 to 40 letters and digits",
                    f"found {name!r}",
                ],
            )
            for section, name in (
                ("evaluation", ""),
                ("evaluation", " code"),
                ("evaluation", "a|b"),
                ("evaluation", "<b>"),
                ("evaluation", "x" * 41),
                ("calibration", "code-"),
            )
        ),
        ("evaluation.documents=[{path: a, name: 3}]", ["evaluation.documents.0.name", "found 3"]),
        (
            "benchmarks.tasks=[{task: a, metric: b, shots: 99999}]",
            ["benchmarks.tasks.0.shots", "less than or equal to 10000"],
        ),
        ("name=has spaces", ["name", "match pattern", "found 'has spaces'"]),
        ("extra=1", ["extra", "unknown key"]),
    ],
)
def test_bad_value_is_refused_by_file_key_expected_and_found(
    override: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY_CONFIG, (override,))
    for word in [str(TINY_CONFIG), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["c", "chat with reasoning", "C++", "zh-Hans", "日本語", "x" * 40])
def test_short_label_is_a_domains_name(name: str) -> None:
    config = load_config(TINY_CONFIG, (f"evaluation.documents=[{{path: a, name: {name!r}}}]",))
    assert config.evaluation is not None
    assert config.evaluation.documents[0].name == name


NUMBERS = [
    key
    for key, field in all_settings()
    if re.search(r"integer|number|size", spell_type(field.annotation, field.metadata))
    and "list" not in spell_type(field.annotation, field.metadata)
]


def section_is_there(key: str) -> tuple[str, ...]:
    """What else a key's section needs."""
    greedy = (
        "evaluation.greedy={prompts: 1, prompt_tokens: 4, tokens: 4}"
        if key.startswith("evaluation.greedy.")
        else "evaluation.greedy=null"
    )
    if key.startswith("evaluation."):
        return ("evaluation={documents: a, num_sequences: 1, sequence_length: 8}", greedy)
    return ("benchmarks={}",) if key.startswith("benchmarks.") else ()


def test_numbers_of_every_section_are_tried() -> None:
    assert len(NUMBERS) > 30
    assert {"run.num_workers", "compression.damp", "run.node_cache_size", "evaluation.seed"} < set(
        NUMBERS
    )


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1" + "0" * 30, "-" + "9" * 30])
def test_number_that_no_run_could_mean_is_refused_by_its_key(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY_CONFIG, (*section_is_there(key), f"{key}={value}"))
    for line in str(caught.value).splitlines():
        assert line.startswith(f"{TINY_CONFIG}: {key}: "), line
        assert line.count(", found ") == 1


@pytest.mark.parametrize("text", ["9" * 400 + "GB", "1." + "1" * 400])
def test_size_of_more_digits_than_a_number_has_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.max_shard_size: expected a size"):
        load_config(TINY_CONFIG, (f"output.max_shard_size='{text}'",))


def test_gpus_are_a_share_of_one_or_whole() -> None:
    """Ray knows no other, and says so only when a worker starts."""
    with pytest.raises(ConfigError, match=r"run\.gpus_per_worker: expected a share .*found 1\.5"):
        load_config(TINY_CONFIG, ("run.gpus_per_worker=1.5",))
    for good in (0.25, 2.0):
        config = load_config(TINY_CONFIG, (f"run.gpus_per_worker={good}",))
        assert config.run.gpus_per_worker == good


def test_missing_required_key_is_named(tmp_path: Path) -> None:
    tree = yaml.safe_load(TINY_CONFIG.read_text())
    del tree["calibration"]["num_sequences"]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"calibration\.num_sequences: required key is missing"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1, 2]", "expected a mapping"), ("a: [", "not valid YAML"), ("\xff", "found str")],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: can not be read"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["compression", "=1", "compression.solver.deep=1"])
def test_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(TINY_CONFIG, (override,))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("compression.scale_span=16",),
            r"tiny\.yaml: output\.storage: 'sparse' needs compression\.scale_span 32, found 16$",
        ),
        (
            (
                "compression.solver=round_to_nearest",
                "compression.sparsity=none",
                "compression.output_curvature=false",
                "compression.refine_steps=0",
            ),
            (
                r"tiny\.yaml: output\.storage: 'sparse' needs compression\.sparsity 'paired-4:8',"
                r" found 'none'$"
            ),
        ),
    ],
)
def test_sparse_storage_of_what_it_can_not_hold_is_refused(
    overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(TINY_CONFIG, ("output.storage=sparse", *overrides))
    assert load_config(TINY_CONFIG, ("output.storage=sparse",)).output.storage == "sparse"
    assert load_config(TINY_CONFIG, overrides).output.storage == "dense"


def test_every_key_says_whether_it_may_change_on_resume() -> None:
    assert set(SETTINGS) == set(dotted_keys())


def test_lookup_finds_every_key() -> None:
    config = load_config(TINY_CONFIG)
    for key in dotted_keys():
        lookup(config, key)


def test_baseline_is_the_published_one_shot_reference() -> None:
    config = load_config(TINY_CONFIG, ("evaluation.baseline=true",))
    base = baseline_config(config)
    c = base.compression
    assert (c.solver, c.sparsity, c.router_weight_exponent, c.damp) == (
        "sparsegpt_gptq",
        "paired-4:8",
        0.0,
        0.1,
    )
    assert (c.output_curvature, c.refine_steps, c.code_sweeps) == (False, 0, 0)
    assert base.run.root == f"{config.run.root}/baseline"
    assert (base.calibration, base.evaluation and base.evaluation.baseline) == (
        config.calibration,
        False,
    )
    assert RunConfig.model_validate(base.model_dump()) == base, (
        "a copy must satisfy the rules of a file"
    )


DOCUMENTS = "calibration:\n  {documents: a.jsonl, num_sequences: 1, sequence_length: 8}\n"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{}", (True, 12, 300)),
        ("{sweeps: 6}", (True, 6, 300)),
        ("{solver: sparsegpt_gptq}", (False, 12, 0)),
        ("{solver: gptq, sparsity: none}", (False, 12, 0)),
        ("{activation_quantization: false}", (True, 12, 0)),
    ],
)
def test_defaults_are_the_best_pipeline_as_far_as_the_solver_knows_it(
    section: str, expected: tuple[bool, int, int], tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"name: a\nsource: {{checkpoint: s}}\n{DOCUMENTS}compression: {section}\nrun: {{root: r}}\n"
    )
    c = load_config(path).compression
    assert (c.output_curvature, c.sweeps, c.refine_steps) == expected


@pytest.mark.parametrize("key", ["output_curvature: true", "refine_steps: 5"])
def test_what_a_one_shot_solver_does_not_know_is_refused_when_asked_for(
    key: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"name: a\nsource: {{checkpoint: s}}\n{DOCUMENTS}compression: {{solver: sparsegpt_gptq,"
        f" {key}}}\nrun: {{root: r}}\n"
    )
    with pytest.raises(
        ConfigError,
        match=f"{key.partition(':')[0]} needs solver 'block_descent', found 'sparsegpt_gptq'",
    ):
        load_config(path)


def test_published_reference_sees_the_source_whatever_the_run_propagates() -> None:
    config = load_config(TINY_CONFIG, ("calibration.propagate=compressed",))
    assert config.calibration.propagate == "compressed"
    assert baseline_config(config).calibration.propagate == "dense"


SECRET = "Aq/9-a-password"


@pytest.mark.parametrize(
    "key",
    [
        "source.endpoint_url",
        "run.endpoint_url",
        "calibration.documents.0.endpoint_url",
        "evaluation.documents.0.endpoint_url",
        "source.checkpoint",
        "calibration.documents.0.path",
        "evaluation.documents.0.path",
        "run.root",
        "benchmarks.base.checkpoint",
        "benchmarks.ours.checkpoint",
        "benchmarks.tokenizer",
    ],
)
def test_place_with_a_password_is_refused_by_key_and_not_repeated(key: str) -> None:
    scheme, where = ("https", "/") if key.endswith("endpoint_url") else ("s3", "/prefix")
    password = SECRET if key.endswith("endpoint_url") else SECRET.replace("/", "")
    value: object = f"{scheme}://someone:{password}@host{where}"
    section, _, rest = key.partition(".documents.0.")
    setting = f"{key}={value}"
    if rest:
        held = {"path": "texts.jsonl"} | {rest: value}
        setting = f"{section}.documents={yaml.safe_dump([held], default_flow_style=True)}"
    with pytest.raises(ConfigError) as caught:
        load_config(TINY_CONFIG, (setting,))
    assert f"{key}: expected " in str(caught.value)
    assert "without a user's name and password" in str(caught.value)
    assert "someone" not in str(caught.value) and password not in str(caught.value)


def test_password_in_a_value_of_a_wrong_type_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY_CONFIG, (f"run.endpoint_url=['http://someone:{SECRET}@host']",))
    assert SECRET not in str(caught.value) and "run.endpoint_url" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source.checkpoint", "hf://owner/name@v1"),
        ("source.checkpoint", "hf://owner/name@v1"),
        ("source.checkpoint", "/home/some@one/model:1@2"),
        ("run.root", "s3://bucket/some@one:1@2"),
        ("run.endpoint_url", "http://[::1]:9000"),
    ],
)
def test_an_at_that_is_no_password_is_taken(key: str, value: str) -> None:
    assert lookup(load_config(TINY_CONFIG, (f"{key}={value}",)), key) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/dir #1", "/data/dir #1"),
        ("#1", "#1"),
        ("/a: b", "/a: b"),
        ("*a", "*a"),
        ("&a b", "&a b"),
        ("[a]/b", "[a]/b"),
        ("123", "123"),
        ("1e5", "1e5"),
        ("yes", "yes"),
        ("2026-11-30", "2026-11-30"),
        ("it's", "it's"),
        ("'a' b", "'a' b"),
        ("'a #1'", "a #1"),
        ('"null"', "null"),
        ("  /a  ", "/a"),
    ],
)
def test_text_of_an_override_is_taken_whole(text: str, expected: str) -> None:
    overrides = (f"source.checkpoint={text}", f"output.license={text}")
    config = load_config(TINY_CONFIG, overrides)
    assert (config.source.checkpoint, config.output.license) == (expected, expected)
    if not text.startswith("["):
        config = load_config(TINY_CONFIG, (f"calibration.documents={text}",))
        assert [d.path for d in config.calibration.documents] == [expected]


def test_null_numbers_lists_and_sections_of_an_override_stay_yaml() -> None:
    overrides = (
        "name=123",
        "output.license=null",
        "calibration.documents=[{path: a, weight: 2}, {path: 'b #1'}]",
        "compression.damp=0.5",
        "run.layers=[1, 2]",
        "output.max_shard_size=5GB",
        "evaluation=null",
        "benchmarks={}",
    )
    config = load_config(TINY_CONFIG, overrides)
    assert (config.name, config.output.license, config.run.layers) == ("123", None, (1, 2))
    assert [(d.path, d.weight) for d in config.calibration.documents] == [("a", 2), ("b #1", 1)]
    assert (config.compression.damp, config.output.max_shard_size) == (0.5, 5 * 10**9)
    with pytest.raises(ConfigError, match=r"run\.root: Input should be a valid string, found None"):
        load_config(TINY_CONFIG, ("run.root=null",))


PLACES = ["source.checkpoint", "run.root", "calibration.documents", "benchmarks.tokenizer"]


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize("place", ["s3://bucket/a//b", "S3://bucket/../a", "HF://owner/name//b"])
def test_place_whose_path_is_no_key_is_refused_by_key(key: str, place: str) -> None:
    words = rf"{re.escape(key)}.*: expected a path without empty parts, .*found '[./]*[ab]"
    with pytest.raises(ConfigError, match=words):
        load_config(TINY_CONFIG, ("benchmarks={}", f"{key}={place}"))


def test_scheme_in_capitals_is_the_same_place() -> None:
    config = load_config(
        TINY_CONFIG, ("source.checkpoint=HF://Owner/Name@V1", "run.root=S3://Bucket/A")
    )
    assert config.source.checkpoint == "hf://Owner/Name@V1"
    assert config.run.root == "s3://Bucket/A"


def test_byte_order_mark_of_a_file_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TINY_CONFIG.read_bytes())
    assert load_config(path) == load_config(TINY_CONFIG)
