"""Settings: overrides, round trips, messages."""

import dataclasses
import json
from pathlib import Path

import pytest

from iomm.config import Config, DataConfig
from iomm.presets import b, large, tiny, xl


def make() -> Config:
    return tiny("t", Path("examples"), steps=10)


@pytest.mark.parametrize(
    "config",
    [make(), b("b", ["x.tar"]), large("l", ["x.tar"]), xl("xl", ["x.tar"])],
    ids=["tiny", "b", "l", "xl"],
)
def test_a_config_survives_json(config):
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_set_changes_one_value_and_nothing_else():
    changed = make().override(
        ["optimizer.lr=2e-4", "data.heldout=[]", "optimizer.ema_decay=null", "name=7", "flow.shift=3"]
    )
    assert (changed.optimizer.lr, changed.data.heldout, changed.optimizer.ema_decay) == (2e-4, (), None)
    assert (changed.name, changed.flow.shift) == ("7", 3.0)
    assert dataclasses.replace(changed.generator) == make().generator


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimiser.lr=1", r"unknown setting optimiser\. Did you mean optimizer\?"),
        ("optimizer.lrate=1", r"unknown setting optimizer\.lrate\. Did you mean optimizer\.lr\?"),
        (
            "condition.connector.layer=1",
            r"condition\.connector\.layer\. Did you mean condition\.connector\.layers\?",
        ),
        ("condition.mask_mode=hid", r"is 'hid'; it must be one of zero, hide, drop\. Did you mean hide\?"),
        ("condition.mask_ratio=1.5", r"condition\.mask_ratio 1\.5 must lie in \[0, 1\]"),
        ("train.steps=many", r"train\.steps must be int, got 'many'"),
        ("train.steps=2.5", r"train\.steps must be int, got 2\.5"),
        ("train.steps=true", r"train\.steps must be int, got True"),
        ("train=1", r"train is a section, not a value\. Set one of its keys: steps"),
        ("train.steps", r"has no '='"),
        ("train.micro_batch_images=5", r"32 is not a multiple of\s+train\.micro_batch_images 5"),
        ("train.eval_images=1", r"train\.eval_images 1 must be at least 2"),
        ("train.save_every_steps=0", r"train\.save_every_steps 0 must be at least 1"),
        ("data.pairs=[]", None),
        ("data.mix_ratio=2", r"data\.mix_ratio 2\.0 must lie in \[0, 1\]"),
        ("generator.heads=5", r"hidden_size 192 is not divisible by generator\.heads 5"),
        ("generator.rope_axes=[8,8,8]", r"rope_axes \(8, 8, 8\) must be even and sum to the head size 32"),
        ("condition.queries=0", r"condition\.queries is 0.*Set condition\.condition_tokens=all"),
        ("mllm.path=null", r"mllm\.path must be str, got None"),
    ],
)
def test_a_bad_setting_says_what_was_given_the_rule_and_the_way_out(setting, message):
    if message is None:
        assert make().override([setting]).data.pairs == ()
        return
    with pytest.raises(ValueError, match=message):
        make().override([setting])


def test_pairs_asked_for_but_not_named_is_an_error():
    with pytest.raises(
        ValueError, match=r"data\.mix_ratio 0\.5 asks for text-image pairs, but data\.pairs is empty"
    ):
        make().override(["data.pairs=[]", "data.mix_ratio=0.5"])  # applied together, checked once


def test_a_missing_section_is_named():
    data = make().to_dict()
    del data["mllm"]["path"]
    with pytest.raises(ValueError, match=r"setting mllm\.path is missing and has no default"):
        Config.from_dict(data)


def test_a_cache_that_could_never_be_read_again_or_keeps_nothing_is_an_error():
    DataConfig(images=("x",), crop="random")
    with pytest.raises(ValueError, match="data.crop=random .* Set data.cache_dir=null"):
        DataConfig(images=("x",), cache_dir="features", crop="random")
    for cache in ((), ("vae", "vae")):
        with pytest.raises(ValueError, match="data.cache .* must name vae, vit or both once"):
            DataConfig(images=("x",), cache_dir="features", cache=cache)
