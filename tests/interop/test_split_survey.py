"""The survey of timm: small models in which mistakes show, findings that are right, the committed table."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from m2mkd_fast import M2MKDError, UnknownNameError
from m2mkd_fast.cli import main
from m2mkd_fast.interop import small_models, split_survey
from m2mkd_fast.interop.small_models import small_model, smallest
from m2mkd_fast.interop.split_survey import EXACT, Finding, check, families, share, survey, write_markdown

TABLE = Path(__file__).parents[2] / "docs" / "split_table.md"
COMMAND = "m2mkd split --check --write docs/split_table.md"


def test_every_family_has_its_architectures():
    found = families()
    assert list(found) == timm.list_modules()
    assert sum(map(len, found.values())) == len(timm.list_models())


def test_a_pattern_names_families_or_architectures():
    assert set(families("swin_transformer*")) == {"swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"}
    assert families("test_vit*") == {
        "vision_transformer": ["test_vit", "test_vit2", "test_vit3", "test_vit4"],
        "vision_transformer_relpos": ["test_vit_relpos"],
    }
    with pytest.raises(UnknownNameError, match="'swim_transformer'; did you mean 'swin_transformer'"):
        families("swim_transformer")


def test_smallest_goes_by_words_then_numbers():
    assert smallest(["vit_base", "vit_tiny_patch16", "vit_tiny_patch32", "vit_large"]) == "vit_tiny_patch16"
    assert smallest(["resnet50", "resnet18", "resnet101"]) == "resnet18"
    assert smallest(timm.list_models(module="resnet")) == "test_resnet"


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext", "gmlp_ti16_224"])
def test_small_models_hide_no_mistake(architecture):
    small = small_model(architecture)
    assert small.image_shape == (3, 64, 64)
    assert small.model.num_classes == 10
    constant = [name for name, p in small.model.named_parameters() if p.numel() > 1 and p.min() == p.max()]
    statistics = [b for name, b in small.model.named_buffers() if "running_" in name]
    assert constant == []
    assert all(statistic.std() > 0 for statistic in statistics)
    again = small_model(architecture).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in small.model.state_dict().items())
    images = torch.randn(2, *small.image_shape)
    dropped = [small.model.train()(images) for _ in range(2)]
    assert not torch.equal(*dropped)


@pytest.mark.parametrize(("limit", "shortened"), [(3_000_000, "depth=4"), (1_500_000, "depth=2"), (1, "depth=2")])
def test_large_models_are_shortened(monkeypatch, limit, shortened):
    monkeypatch.setattr(small_models, "PARAMETERS_AT_MOST", limit)
    small = small_model("vit_tiny_patch16_224")
    assert small.shortened == shortened
    assert f"depth={len(small.model.blocks)}" == shortened


def test_a_model_for_no_size_is_refused(monkeypatch):
    class Constant(nn.Module):
        def forward(self, x):
            return x.new_ones(len(x), 10)

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Constant())
    with pytest.raises(M2MKDError, match="no image size was found that test_vit takes .*do not depend on the image"):
        small_model("test_vit")


@pytest.mark.parametrize(
    ("family", "architecture", "layout"),
    [
        ("vision_transformer", "test_vit", "tokens"),
        ("vision_transformer_relpos", "test_vit_relpos", "tokens"),
        ("resnet", "test_resnet", "channels_first"),
        ("convnext", "test_convnext", "channels_first"),
        ("efficientnet", "test_efficientnet", "channels_first"),
        ("mambaout", "test_mambaout", "channels_last"),
    ],
)
def test_small_families_are_cut_exactly(family, architecture, layout):
    finding = check(family, architecture)
    assert (finding.evaluation, finding.training) == (EXACT, EXACT)
    assert finding.exact and layout in finding.layouts
    assert finding.pixels == 64 and finding.cuts == finding.units - 1 > 0


def test_a_wrong_chain_is_found(monkeypatch):
    def other_weights(model, image_shape):
        return cuttable_of(small_model("test_vit", seed=1).model.eval(), image_shape)

    cuttable_of = split_survey.cuttable_of
    monkeypatch.setattr(split_survey, "cuttable_of", other_weights)
    finding = check("vision_transformer", "test_vit")
    assert not finding.exact
    assert "does not compute what the model does" in finding.evaluation


def test_what_goes_wrong_is_a_finding(monkeypatch):
    def fails(model, image_shape):
        raise KeyError("blocks")

    monkeypatch.setattr(split_survey, "cuttable_of", fails)
    finding = check("vision_transformer", "test_vit")
    assert finding.evaluation.startswith("KeyError in test_split_survey.py:") and not finding.exact
    assert finding.pixels == 64 and finding.units is None


def test_a_survey_goes_on_where_it_stopped(tmp_path, monkeypatch):
    def record(family, name):
        checked.append(name)
        return Finding(family, name, 64, "", 4, 3, ("tokens", "channels_last"), EXACT, "no")

    checked = []
    monkeypatch.setattr(split_survey, "check", record)
    output = tmp_path / "findings.jsonl"
    first = list(survey("test_v*", every_architecture=True, output=output))
    assert checked == timm.list_models("test_v*")
    assert [count for _, count in first] == [1] * len(checked)
    output.write_text("".join(output.read_text().splitlines(keepends=True)[1:]))
    checked.clear()
    assert list(survey("test_v*", every_architecture=True, output=output)) == first
    assert checked == [first[0][0].architecture]


def test_findings_of_another_timm_are_not_taken(tmp_path, monkeypatch):
    output = tmp_path / "findings.jsonl"
    monkeypatch.setattr(split_survey, "check", lambda family, name: Finding(family, name, timm="0.1"))
    list(survey("test_vit", output=output))
    list(survey("test_vit", output=output))
    assert len(output.read_text().splitlines()) == 2


def test_an_output_of_another_kind_is_refused(tmp_path):
    output = tmp_path / "findings.jsonl"
    output.write_text('{"loss": 1.0}\n')
    with pytest.raises(M2MKDError, match=r"findings.jsonl:1 is no finding"):
        next(survey("test_vit", output=output))


def test_an_output_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(split_survey, "check", lambda family, name: Finding(family, name))
    with pytest.raises(M2MKDError, match="cannot write .*no_folder"):
        next(survey("test_vit", output=tmp_path / "no_folder" / "findings.jsonl"))


def test_the_share_counts_architectures_and_says_how(tmp_path):
    findings = [(Finding("a", "a1", evaluation=EXACT), 3), (Finding("b", "b1", evaluation="no | way"), 1)]
    assert share(findings, False).startswith("3 of 4 architectures")
    assert "(75.0 %) are cut, in families whose smallest was checked" in share(findings, False)
    assert share(findings, True).endswith("each checked itself.")
    write_markdown(tmp_path / "table.md", findings, False, COMMAND)
    text = (tmp_path / "table.md").read_text()
    assert r"no \| way" in text and COMMAND in text and share(findings, False) in text


def test_command(tmp_path, capsys):
    page = tmp_path / "table.md"
    assert main(["split", "--check", "test_vit", "--write", str(page)]) == 0
    assert "vision_transformer: test_vit: bit-exact" in capsys.readouterr().out
    assert "| vision_transformer | 1 | test_vit | 64 |" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split"], "needs a configuration, or --check"),
        (
            ["split", "configs/digits_vmoe.yaml", "--check"],
            "leave out configs/digits_vmoe.yaml",
        ),
        (["split", "configs/digits_vmoe.yaml", "--all"], "--all belongs to the survey"),
        (["split", "--check", "no_such_family_at_all"], "unknown family or architecture of timm"),
    ],
)
def test_bad_commands(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_share_in_the_readme_is_the_table_s():
    line = r"^(\d+) of (\d+) architectures of timm ([\d.]+) \(([\d.]+) %\)"
    counts = re.search(line, TABLE.read_text(), re.MULTILINE)
    readme = (TABLE.parent.parent / "README.md").read_text()
    assert f"{int(counts[1]):,} of {int(counts[2]):,} architectures ({counts[4]} %)" in readme
    assert f"timm {counts[3]}," in readme


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_table_in_the_docs_is_true(tmp_path):
    committed = TABLE.read_text()
    if f"timm {timm.__version__} " not in committed:
        pytest.skip(f"docs/split_table.md is of another version of timm than {timm.__version__}")
    page = tmp_path / "table.md"
    write_markdown(page, list(survey()), False, COMMAND)
    changes = difflib.unified_diff(committed.splitlines(), page.read_text().splitlines(), "committed", "found", n=0)
    text = "\n".join(changes)
    assert not text, f"the table changed; `{COMMAND}` writes it again:\n{text}"
