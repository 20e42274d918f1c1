"""The cache of a run's pairs: what is in it, the step that makes it, and where a pair finds it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from m2mkd_fast.distill.features import PairFeatures
from m2mkd_fast.distill.tasks import CachedPairTask
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.ops.flops import flop_counter
from m2mkd_fast.pipeline.batch_source import AugmentedBatches
from m2mkd_fast.pipeline.feature_cache import LABELS, CachedBatches, FeatureCache
from m2mkd_fast.pipeline.stopping import Stopped, stop_requested
from m2mkd_fast.pipeline.workbench import Workbench


def cached_batches(bench: Workbench, task: CachedPairTask, say: Callable[[str], None]) -> CachedBatches:
    """The batches of a pair out of the run's cache."""
    features = pair_features(bench)
    cache = FeatureCache(bench.cache_folder(cache_key(bench)), lambda *steps: _Maker(bench).batches(*steps), say)
    names = [features.name(task.index, read) for read in task.reads]
    return CachedBatches(cache, names, bench.execution.shard, bench.config.pair.train.accumulate)


def make_cache(bench: Workbench, name: str, say: Callable[[str], None], guard: Callable[[], None]) -> dict[str, Any]:
    """Write the cache, or what is missing of it, and return the step's result.

    Its ``weights_hash`` is the cache's key, so that pairs that were made from another cache are found.

    Args:
        bench: with finished teacher, meta model and hybrids.
        name: of the step.
        say: is told what did not fit into float16.
        guard: called between shards; raises where this process may no longer write.
    """
    maker, facts, training, execution = _Maker(bench), cache_facts(bench), bench.config.pair.train, bench.execution
    key = _key(facts)
    batches = bench.config.pair.cache_batches or training.steps

    def after_shard(done: int) -> None:
        guard()
        if execution.agreed(stop_requested()) and done < batches:
            raise Stopped(f"{name} was stopped at batch {done} of {batches}")

    folder = bench.cache_folder(key)
    cache = FeatureCache(folder, maker.batches, say)
    index = execution.broadcast(cache.write(batches, facts, after_shard, execution.shard))
    return {
        "metrics": {},
        "images": batches * training.batch_size,
        "seconds": index["seconds"],
        "flops": float(batches * maker.flops_per_batch),
        "weights_hash": key,
        "cache": {"batches": batches, "bytes": index["bytes"], "folder": str(folder.relative_to(bench.folder))},
    }


def pair_features(bench: Workbench) -> PairFeatures:
    """The features that the pairs of a run's arms read."""
    arm = "m2mkd" if "m2mkd" in bench.config.arms else "task"
    settings = bench.settings(arm, 0.0)
    return PairFeatures(bench.slots, bench.config.pair.prefix, settings.feature_weight > 0, settings.alpha > 0)


def cache_facts(bench: Workbench) -> dict[str, Any]:
    """Everything that the features follow from. Another value of any of it is another cache."""
    config, training = bench.config, bench.config.pair.train
    data = asdict(config.data)
    del data["num_workers"]
    return {
        "teacher": bench.result(bench.teacher_step)["weights_hash"],
        "meta": bench.result("meta")["weights_hash"],
        "images": bench.train_split.content_hash(),
        "data": data,
        "seed": _seed(bench),
        "batch_size": training.batch_size,
        "mixup": training.mixup,
        "cutmix": training.cutmix,
        "mixed_label_smoothing": training.label_smoothing if training.mixup or training.cutmix else 0.0,
        "precision": config.precision,
        "features": asdict(pair_features(bench)),
    }


def cache_key(bench: Workbench) -> str:
    """SHA-256, in hex, of :func:`cache_facts`."""
    return _key(cache_facts(bench))


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _seed(bench: Workbench) -> int:
    """Of the order, augmentation and mixing of batches, which all pairs share where they are cached."""
    return bench.seed("pair batches")


class _Maker:
    """Makes the features of batches; teacher and meta model are in memory for as long as this is."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.features = pair_features(bench)

    @functools.cached_property
    def _models(self) -> tuple[ModuleChain, ModuleChain]:
        device = self.bench.execution.accelerator.device
        teacher, meta = self.bench.trained_teacher(), self.bench.trained_meta()
        return teacher.to(device).eval(), meta.to(device).eval()

    @functools.cached_property
    def flops_per_batch(self) -> int:
        with flop_counter() as counter:
            next(iter(self.batches(0, 1)))
        return counter.get_total_flops()

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        bench, config = self.bench, self.bench.config
        device = bench.execution.accelerator.device
        source = AugmentedBatches(bench.train_split, config.pair.train, _seed(bench), config.data, device)
        for images, labels in source.batches(start, stop):
            with torch.no_grad(), bench.execution.autocast():
                made = self.features.make(images, *self._models)
            yield made | {LABELS: labels}
