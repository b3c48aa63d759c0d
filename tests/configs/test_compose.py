"""Composition: what holds, what is refused, and in which words."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.compose import compose, config_hash, diff, freeze, is_free_to_change, load, settings_hash
from configs.enums import MixtureRule, Precision
from configs.errors import UserError
from configs.rules import GROUPS, groups
from configs.schema import RunConfig


def names(group):
    return sorted(p.stem for p in (GROUPS / group).glob("*.yaml"))


@pytest.mark.parametrize("cluster", names("cluster"))
@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_on_every_cluster_freezes_and_reloads(tmp_path, experiment, cluster):
    cfg = compose([f"experiment={experiment}", f"cluster={cluster}"])
    freeze(cfg, tmp_path / "config.yaml")
    again = load(tmp_path / "config.yaml")
    assert again == cfg
    assert config_hash(again) == config_hash(cfg)
    assert diff(cfg, again) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("group", groups())
def test_every_choice_of_every_group_fits_the_schema(group):
    for name in names(group):
        overrides = [f"{group}={name}"] + ([] if group == "experiment" else ["experiment=smoke"])
        if group == "schedule":
            overrides += ["schedule.warmup_steps=1"]
        if (group, name) != ("engine", "zero1"):
            overrides += ["engine.comm_precision=fp32"]
        assert isinstance(compose(overrides), RunConfig)


@pytest.mark.parametrize(
    ("overrides", "found", "rule_or_repair"),
    [
        ([], "no experiment", "smoke"),
        (["experiment smoke"], "experiment smoke", "SETTING=VALUE"),
        (["optim.lrr=1"], "optim.lrr", "did you mean optim.lr"),
        (["experiment=nope"], "experiment=nope", "experiment= one of eu24_160m, eu24_1b"),
        (["corpus=nope"], "corpus=nope", "corpus= one of fineweb2_eu24, udhr"),
        (["+model.typo=1"], "typo", "no such field"),
        (["model.typo=1"], "model.typo", "configs/schema.py"),
        (["model.n_head=7"], "model.n_head = 7", "n_kv_head must divide n_head"),
        (["model.n_head=seven"], "model.n_head: Value 'seven'", "must fit its field"),
        (["engine.precision=bf17"], "bf17", "must fit its field"),
        (["train.tokens_per_step=4000"], "4000", "train.tokens_per_step=4096"),
        (["cluster.devices_per_node=3"], "16 sequences over 3 devices", "train.tokens_per_step=4608"),
        (["train.batch_ramp=[{until_tokens:9000,tokens_per_step:1000}]"], "tokens_per_step = 1000", "=1024"),
        (["train.batch_ramp=[{until_tokens:9000,tokens_per_step:768}]"], "is 3 sequences over 2 devices", "=1024"),
        (
            ["train.batch_ramp=[{until_tokens:9,tokens_per_step:512},{until_tokens:9,tokens_per_step:512}]"],
            "ends at [9, 9] tokens",
            "after the one before",
        ),
        (["train.batch_ramp=[{tokens_per_step:512}]"], "train.batch_ramp[0].until_tokens", "no default"),
        (["train.z_loss=-1"], "train.z_loss = -1", "negative"),
        (["schedule.decay_shape=cubic"], "cubic", "must fit its field"),
        (["engine.zero_stage=4"], "engine.zero_stage = 4", "1, 2 and 3 are supported"),
        (["name=a/b"], "name = 'a/b'", "letters, digits"),
        (["optim.lr=-1"], "optim.lr = -1", "greater than 0"),
        (["engine.comm_precision=bf16"], "comm_precision = bf16", "engine.comm_precision=fp32"),
        (["mixture.rule=weights"], "mixture.rule = weights", "needs them"),
        (["mixture.sources={udhr:-1}"], "mixture.sources.udhr = -1", "not negative"),
        (["mixture.phases=[{from_tokens:9},{from_tokens:9}]"], "begin at [9, 9] tokens", "after the one before"),
        (["mixture.phases=[{from_tokens:9000000000}]"], "from 9000000000 tokens on", "before the run ends"),
        # 100 steps of 4,096 tokens: what train.tokens has beyond them is not trained on.
        (["mixture.phases=[{from_tokens:409500}]", "train.tokens=409700"], "of 409600", "train.tokens=413696"),
        (["mixture.phases=[{from_tokens:409600}]", "train.tokens=409700"], "of 409600", "train.tokens=413696"),
        (["corpus.clean.opt_out.ids=/a/list.txt"], "not a ListConfig", "corpus.clean.opt_out.ids=[…]"),
        (["mixture.phases=[{rule:unimax}]"], "mixture.phases[0].from_tokens", "no default"),
        (["suite.max_items_per_language=1"], "max_items_per_language = 1", "standard error"),
        (["suite.tasks=[agrement]"], "agrement", "agreement, countries"),
        (["log.wandb=online"], "log.wandb = online", "wandb sync"),
        (
            ["corpus.dedup.licence_order=[MIT]"],
            "licence_order has MIT, the sources have LicenseRef-UDHR",
            "licence_field",
        ),
        (["cluster=lumi", "cluster.peak_tflops=0"], "peak_tflops", "vendor"),
        (["a b=c"], "a b=c", "correct the value"),
    ],
)
def test_a_mistake_ends_in_one_message(overrides, found, rule_or_repair):
    given_overrides = (
        overrides if not overrides or overrides[0].startswith("experiment") else ["experiment=smoke", *overrides]
    )
    with pytest.raises(UserError) as error:
        compose(given_overrides)
    text = str(error.value)
    assert found in text
    assert rule_or_repair in text
    assert "rule:" in text
    assert "repair:" in text


def test_broken_rules_are_told_together():
    with pytest.raises(UserError) as error:
        compose(
            [
                "experiment=smoke",
                "name=a/b",
                "cluster.devices_per_node=3",
                "corpus.holdout={by_field: '', by_values: []}",
            ]
        )
    assert str(error.value).count("rule:") == 3
    told = pickle.loads(pickle.dumps(error.value))
    assert (str(told), told.found) == (str(error.value), error.value.found), "a worker process tells all of it too"


def test_a_hub_dataset_needs_its_commit():
    hub = ["corpus.sources.udhr.format=hub", "corpus.sources.udhr.path=org/set"]
    with pytest.raises(UserError, match="hub_revision"):
        compose(["experiment=smoke", *hub])
    compose(["experiment=smoke", *hub, "corpus.sources.udhr.hub_revision=abc"])


def test_an_order_of_licences_may_name_those_that_documents_have():
    order = ["experiment=smoke", "corpus.dedup.licence_order=[MIT,LicenseRef-UDHR]"]
    assert compose([*order, "corpus.sources.udhr.licence_field=rights"]).corpus.dedup.licence_order[0] == "MIT"


def test_names_of_languages_and_sources_need_no_plus_sign():
    weights = ["mixture.rule=weights", "mixture.weights={fi:0.6,sv:0.4}"]
    cfg = compose(["experiment=smoke", *weights, "mixture.sources.udhr=2", "mixture.max_epochs_of={udhr:3}"])
    assert cfg.mixture.weights == {"fi": 0.6, "sv": 0.4}
    replaced = [*weights, "mixture.weights={de: 1}", "mixture.weights.fr=2"]
    assert compose(["experiment=smoke", *replaced]).mixture.weights == {"de": 1, "fr": 2}, (
        "a whole takes the whole's place"
    )
    assert compose(["experiment=smoke", "mixture.weights={de: 1}", "mixture.weights={}"]).mixture.weights == {}
    assert cfg.mixture.sources == {"udhr": 2} and cfg.mixture.max_epochs_of == {"udhr": 3}


def test_phases_of_the_mixture_are_settings_like_others(tmp_path):
    plain, phase = compose(["experiment=smoke"]), "{from_tokens: 100, rule: weights, weights: {de: 1}}"
    cfg = compose(["experiment=smoke", f"mixture.phases=[{phase}]"])
    assert cfg.mixture.phases[0].rule is MixtureRule.weights and cfg.mixture.phases[0].max_epochs == 4
    freeze(cfg, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == cfg
    changed = diff(plain, cfg)
    assert changed["mixture.phases.0.weights.de"] == (None, 1.0)
    assert not {"mixture.phases", "mixture.phases.0.sources"} & changed.keys(), "nothing, written in another way"
    assert json.loads(json.dumps(changed)) and all(map(is_free_to_change, changed))
    assert not is_free_to_change("mixture.packing")


def test_a_file_that_is_no_yaml_is_named():
    broken = GROUPS / "corpus" / "broken_by_a_test.yaml"
    broken.write_text("sources:\n\tx: 1\n")
    try:
        with pytest.raises(UserError, match="files in configs/ are YAML"):
            compose(["experiment=smoke", "corpus=broken_by_a_test"])
    finally:
        broken.unlink()


def test_a_setting_without_a_value_is_named():
    with pytest.raises(UserError, match=r"no value for corpus.sources.udhr.licence"):
        compose(["experiment=smoke", "corpus.sources.udhr.licence=???"])


def test_an_experiment_wins_over_the_root_and_the_command_line_over_both():
    assert compose(["experiment=eu24_8b"]).engine.zero_stage == 2
    assert compose(["experiment=eu24_8b", "engine=zero1"]).engine.zero_stage == 1
    assert compose(["experiment=smoke"]).engine.precision is Precision.fp32


def test_paths_mean_the_same_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    lists = ["corpus.clean.opt_out.ids=[ids.txt]", "corpus.clean.identify.model=lid176"]
    cfg = compose(["experiment=smoke", "corpus.sources.udhr.path=mine.jsonl", "cluster.scratch=here", *lists])
    assert cfg.corpus.clean.opt_out.ids == [str(tmp_path / "ids.txt")] and cfg.corpus.clean.identify.model == "lid176"
    assert cfg.corpus.sources["udhr"].path == str(tmp_path / "mine.jsonl")
    assert cfg.cluster.scratch == str(tmp_path / "here")
    assert compose(["experiment=smoke"]).corpus.sources["udhr"].path.startswith("package:")


def test_a_difference_is_told_by_its_dotted_name():
    old, new = compose(["experiment=smoke"]), compose(["experiment=smoke", "optim.lr=1", "log.wandb=offline"])
    changes = diff(old, new)
    assert changes["optim.lr"] == (4e-3, 1.0)
    assert set(changes) == {"optim.lr", "log.wandb"}
    assert not is_free_to_change("optim.lr")
    assert is_free_to_change("log.wandb")
    assert not is_free_to_change("train.tokens_per_step")
    assert not is_free_to_change("train.batch_ramp.0.until_tokens")
    assert not is_free_to_change("train.z_loss")
    assert not is_free_to_change("train.begin_from")
    assert is_free_to_change("train.tokens")
    assert is_free_to_change("corpus.sources.udhr.path")
    assert settings_hash(old) != settings_hash(new)
    assert settings_hash(old) == settings_hash(compose(["experiment=smoke", "suite=cldr"]))


def test_a_frozen_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    freeze(compose(["experiment=smoke"]), path)
    path.write_text(path.read_text() + "unknown: 1\n")
    with pytest.raises(UserError, match="unknown"):
        load(path)
    with pytest.raises(UserError, match="is not there"):
        load(tmp_path / "none.yaml")


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(1e-6, 1.0),
    n_layer=st.integers(1, 200),
    name=st.text(st.sampled_from("abcXYZ019._-"), min_size=1).filter(lambda s: not s.startswith(".")),
)
def test_any_valid_config_survives_freezing(tmp_path_factory, lr, n_layer, name):
    base = compose(["experiment=smoke"])
    cfg = dataclasses.replace(
        base,
        name=name,
        optim=dataclasses.replace(base.optim, lr=lr),
        model=dataclasses.replace(base.model, n_layer=n_layer),
    )
    path = tmp_path_factory.mktemp("frozen") / "config.yaml"
    freeze(cfg, path)
    assert load(path) == cfg


def test_composing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose(["experiment=smoke"])
    assert list(Path(tmp_path).iterdir()) == []
