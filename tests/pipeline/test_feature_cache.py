"""Features of the pairs: the same losses, files that are checked and made again, pairs that need no teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from finished_runs import finished_bench
from tiny_run import tiny

from m2mkd_fast.distill.features import PairFeatures
from m2mkd_fast.distill.tasks import CachedPairTask, DistillationSettings, PairTask
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules import meta_model, split, student_modules
from m2mkd_fast.pipeline import feature_cache, stopping
from m2mkd_fast.pipeline.caching import cache_key, cached_batches, make_cache
from m2mkd_fast.pipeline.config import make_config
from m2mkd_fast.pipeline.feature_cache import CachedBatches, FeatureCache
from m2mkd_fast.pipeline.plan import plan
from m2mkd_fast.pipeline.run import run
from m2mkd_fast.pipeline.stopping import Stopped
from m2mkd_fast.pipeline.workbench import Workbench

SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2}
FULL = DistillationSettings(feature_weight=1.0, label_smoothing=0.1)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    teacher = split(create_model("vit_micro", **SMALL), 3).eval()
    student = create_model("vmoe_micro.m2mkd", **SMALL | {"embed_dim": 8})
    return teacher, meta_model(teacher).eval(), student_modules(student, 3, teacher.widths)


def gradients(task, *batch) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(1)
    task.zero_grad()
    loss = task.train()(*batch)
    loss.total.backward()
    return loss.terms, [p.grad.clone() for p in task.trainable.parameters() if p.grad is not None]


@pytest.mark.parametrize("prefix", ["teacher", "meta"])
@pytest.mark.parametrize("settings", [FULL, DistillationSettings(), DistillationSettings(alpha=0.0)])
def test_a_cached_pair_has_the_loss_of_the_pair(parts, prefix, settings):
    teacher, meta, students = parts
    torch.manual_seed(1)
    images, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 3, 3, 9])
    features = PairFeatures(3, prefix, settings.feature_weight > 0, settings.alpha > 0)
    made = features.make(images, teacher, meta)
    for slot, student in enumerate(students):
        pair = PairTask(student, slot, teacher, meta, teacher if prefix == "teacher" else meta, settings)
        cached = CachedPairTask(student, slot, meta, settings)
        read = tuple(made[features.name(slot, name)] for name in cached.reads)
        terms, exact = gradients(pair, images, labels)
        same, again = gradients(cached, read, labels)
        assert terms == same and all(map(torch.equal, exact, again))
        rounded, close = gradients(cached, tuple(feature.half() for feature in read), labels)
        for name, value in terms.items():
            torch.testing.assert_close(rounded[name], value, rtol=5e-3, atol=5e-3)
        assert sum(map(torch.norm, map(torch.sub, close, exact))) < 0.05 * sum(map(torch.norm, exact))


def test_nothing_is_made_that_no_pair_reads(parts):
    teacher, meta, _ = parts
    images = torch.randn(2, 1, 16, 16)
    names = {
        ("teacher", True, True): {"images", "cut1", "cut2", "logits0", "logits1", "logits2"},
        ("meta", True, False): {"images", "cut1", "cut2", "target1", "target2"},
        ("meta", False, False): {"images", "cut1", "cut2"},
    }
    for (prefix, targets, logits), wanted in names.items():
        assert PairFeatures(3, prefix, targets, logits).make(images, teacher, meta).keys() == wanted


class Source:
    """Batches of two images; remembers which were made."""

    def __init__(self, **changes) -> None:
        self.made, self.changes = [], changes

    def __call__(self, start, stop):
        for t in range(start, stop):
            self.made.append(t)
            generator = torch.Generator().manual_seed(t)
            cut = torch.randn(2, 3, 4, generator=generator)
            if t in self.changes.get("at", ()):
                cut[1, 2, 3] = self.changes["value"]
            yield {"cut1": cut, "logits0": torch.randn(2, 5, generator=generator), "labels": torch.tensor([t, 7])}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 2 * 2 * 24)  # two batches


def written(folder: Path, source: Source, batches: int = 5, say=lambda message: None) -> FeatureCache:
    FeatureCache(folder, source, say).write(batches, {"seed": 3})
    return FeatureCache(folder, source, say)


def test_what_was_written_is_read(tmp_path, small_shards):
    source = Source()
    cache = written(tmp_path, source)
    assert source.made == [0, 0, 1, 2, 3, 4]
    assert cache.index["facts"] == {"seed": 3} and cache.index["batches_per_shard"] == 2
    for t in (4, 0, 3, 8):
        expected = next(Source()(t % 5, t % 5 + 1))
        assert torch.equal(cache.read("cut1", t), expected["cut1"].half())
        assert torch.equal(cache.read("labels", t), expected["labels"])
    assert cache.index["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_processes_share_out_shards_and_the_rows_of_a_batch(tmp_path, small_shards):
    sources = [Source(), Source()]
    for rank in (1, 0):
        index = FeatureCache(tmp_path, sources[rank]).write(5, {}, processes=(rank, 2))
        assert (index is None) == (rank == 1)
    assert [sorted(set(source.made[1:])) for source in sources] == [[0, 1, 4], [2, 3]]
    cache = FeatureCache(tmp_path, None)
    whole = next(CachedBatches(cache, ["cut1"]).batches(3, 4))
    halves = [next(CachedBatches(cache, ["cut1"], (rank, 2)).batches(3, 4)) for rank in (0, 1)]
    assert torch.equal(torch.cat([half[0][0] for half in halves]), whole[0][0])
    assert torch.equal(torch.cat([half[1] for half in halves]), whole[1])


def test_values_beyond_float16_are_kept_as_float32_and_said(tmp_path, small_shards):
    said = []
    cache = written(tmp_path, Source(at=(3,), value=1e5), say=said.append)
    assert said == ["feature cut1 of batch 3 reaches 1e+05, too much for float16: stored as float32"]
    assert cache.read("cut1", 3)[1, 2, 3] == 1e5
    assert [cache.read("cut1", t).dtype for t in (0, 3)] == [torch.float16, torch.float32]


def test_values_that_are_not_finite_are_refused(tmp_path, small_shards):
    with pytest.raises(M2MKDError, match="feature cut1 of batch 2 is not finite"):
        written(tmp_path, Source(at=(2,), value=math.nan))
    with pytest.raises(M2MKDError, match="holds no finished cache"):
        FeatureCache(tmp_path, Source()).read("cut1", 0)


def test_writing_goes_on_where_it_was_stopped(tmp_path, small_shards):
    def stop(done):
        if done == 4:
            raise KeyboardInterrupt

    source = Source()
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, source).write(5, {}, stop)
    assert not (tmp_path / "index.json").exists()
    source.made.clear()
    FeatureCache(tmp_path, source).write(5, {})
    assert source.made == [0, 4]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_file_is_made_again_and_said(tmp_path, small_shards, damage):
    source, said = Source(), []
    cache = written(tmp_path, source, say=said.append)
    expected = cache.read("cut1", 2).clone()
    damage(tmp_path / "cut1-00001.safetensors")
    source.made.clear()
    again = FeatureCache(tmp_path, source, said.append)
    assert torch.equal(again.read("cut1", 2), expected)
    assert source.made == [2, 3] and len(said) == 1
    assert "cut1-00001.safetensors is" in said[0] and "made again" in said[0]


def test_a_damaged_index_is_named(tmp_path, small_shards):
    cache = written(tmp_path, Source())
    (tmp_path / "index.json").write_text('{"format": "other"}')
    cache._index = None
    with pytest.raises(M2MKDError, match="has the format 'other'"):
        cache.read("cut1", 0)


@pytest.fixture(scope="module")
def cached_run(tmp_path_factory) -> Path:
    """Everything up to the cache; then the pairs, in which the teacher may not be read."""
    folder = tmp_path_factory.mktemp("cached")
    config = make_config([tiny(output=str(folder), arms=["m2mkd", "task"], pair__cache=True, pair__cache_batches=3)])
    run(config, only=lambda step: step.name == "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Workbench, "trained_teacher")
        run(config, only=lambda step: step.phase == "m2mKD" and step.slot == 1)
    return folder


def bench_of(folder: Path) -> Workbench:
    config = tiny(output=str(folder), arms=["m2mkd", "task"], pair__cache=True, pair__cache_batches=3)
    return Workbench(make_config([config]), folder)


def test_pairs_need_no_teacher(cached_run):
    bench = bench_of(cached_run)
    result = bench.result("cache")
    assert result["flops"] > 0 and result["images"] == 48 and result["weights_hash"] == cache_key(bench)
    assert (cached_run / result["cache"]["folder"] / "index.json").is_file()
    for arm, terms in {"m2mkd": {"task", "distillation", "feature", "balance"}, "task": {"task", "balance"}}.items():
        pair = bench.result(f"{arm}/pair1")
        assert pair["terms"].keys() <= terms and "task" in pair["terms"]
        assert pair["made_from"]["cache"] == result["weights_hash"]


def test_both_arms_read_the_batches_that_the_seed_gives(cached_run):
    """A step beyond the last batch of the cache begins again with the first."""
    bench, training = bench_of(cached_run), make_config([tiny()]).pair.train
    meta, student = bench.trained_meta(), bench.student_modules()[1]
    sources = [
        cached_batches(bench, CachedPairTask(student, 1, meta, bench.settings(arm, 0.1)), print)
        for arm in ("m2mkd", "task")
    ]
    batches = [list(source.batches(0, training.steps)) for source in sources]
    assert all(torch.equal(one[1], other[1]) for one, other in zip(*batches, strict=True))
    assert torch.equal(batches[0][0][0][0], batches[1][0][0][0])
    assert torch.equal(batches[0][3][0][0], batches[0][0][0][0])
    assert not torch.equal(batches[0][1][0][0], batches[0][0][0][0])


def test_a_pair_that_finds_a_damaged_file_makes_it_again(cached_run):
    bench, said = bench_of(cached_run), []
    task = CachedPairTask(bench.student_modules()[1], 1, bench.trained_meta(), bench.settings("m2mkd", 0.1))
    kept = [feature.clone() for feature in next(cached_batches(bench, task, said.append).batches(1, 2))[0]]
    flip(next(cached_run.glob("cache/*/cut2-00000.safetensors")))
    again = next(cached_batches(bench, task, said.append).batches(1, 2))[0]
    assert len(said) == 1 and "cut2-00000.safetensors is damaged" in said[0]
    assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize(
    "changes",
    [
        {"data__augmentation": "none"},
        {"pair__prefix": "meta"},
        {"pair__train__mixup": 0.2},
        {"pair__train__batch_size": 8},
        {"data__repeats": 2},
        {"seed": 1},
    ],
)
def test_what_features_follow_from_is_in_the_key(tmp_path_factory, cached_run, changes):
    config = tiny(output=str(cached_run), arms=["m2mkd", "task"], pair__cache=True, **changes)
    assert cache_key(Workbench(make_config([config]), cached_run)) != cache_key(bench_of(cached_run))


def test_mixed_labels_are_kept_exactly(tmp_path):
    bench = finished_bench(tiny(pair__cache=True, pair__train__mixup=0.5, arms=["m2mkd"]), tmp_path)
    make_cache(bench, "cache", print, lambda: None)
    task = CachedPairTask(bench.student_modules()[0], 0, bench.trained_meta(), bench.settings("m2mkd", 0.1))
    _, labels = next(cached_batches(bench, task, print).batches(0, 1))
    assert labels.dtype == torch.float32 and labels.shape == (16, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(16))


def test_a_request_to_stop_ends_it_between_shards(tmp_path, monkeypatch):
    bench = finished_bench(tiny(pair__cache=True, arms=["m2mkd"]), tmp_path)
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(stopping, "_requested", True)
    with pytest.raises(Stopped, match="stopped at batch 1 of 4"):
        make_cache(bench, "cache", print, lambda: None)
    monkeypatch.setattr(stopping, "_requested", False)
    made = []
    monkeypatch.setattr(FeatureCache, "_write_shard", spied(FeatureCache._write_shard, made))
    assert make_cache(bench, "cache", print, lambda: None)["cache"]["batches"] == 4
    assert made == [1, 2, 3]


def spied(method, seen):
    def call(self, shard):
        seen.append(shard)
        return method(self, shard)

    return call


def test_the_plan_makes_the_cache_before_the_pairs():
    steps = {step.name: step for step in plan(make_config([tiny(pair__cache=True)]), 3)}
    assert steps["cache"].needs == ("teacher", "meta", "hybrids")
    assert all("cache" in steps[f"{arm}/pair2"].needs for arm in ("m2mkd", "task"))
    assert "cache" not in {step.name for step in plan(make_config([tiny()]), 3)}
    assert "cache" not in {step.name for step in plan(make_config([tiny(pair__cache=True, arms=["scratch"])]), 3)}


def test_numbers_of_batches_are_checked():
    with pytest.raises(M2MKDError, match=r"pair.cache_batches must not be negative, got -1"):
        make_config([tiny(pair__cache=True, pair__cache_batches=-1)])
    with pytest.raises(M2MKDError, match=r"pair.cache_batches=5 is read with pair.cache=true only"):
        make_config([tiny(pair__cache_batches=5)])


def test_the_report_charges_the_cache_to_the_arms_that_read_it(cached_run):
    from m2mkd_fast.report.costs import cost_of_run
    from m2mkd_fast.report.run_folder import read_run

    cost, result = cost_of_run(read_run(cached_run)), json.loads((cached_run / "steps/cache/result.json").read_text())
    for arm in ("m2mkd", "task"):
        assert cost["arms"][arm]["phases"]["cache"] == {name: result[name] for name in ("flops", "seconds")}
        assert cost["arms"][arm]["preparation_in_parallel"]["flops"] > result["flops"]
