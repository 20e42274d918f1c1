"""Images from shards, read by index in random order, against webdataset's streaming loader on the same shards.

    python benchmarks/bench_shards.py --json benchmarks/results/shards.json

Both read every image of local shards once, in one process: webdataset shuffles shards and a buffer of samples, ours
draws any order. "read" leaves the images encoded, "decoded" decodes, resizes and crops them with the same function, and
"start at the middle" is what a resumed training waits for: the first image after half an epoch. Files are in the page
cache: nothing is said about disks.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from _paired import Results, paired_ratio
from PIL import Image

from m2mkd_fast.data import create_dataset
from m2mkd_fast.data.webdataset_shards import ShardMembers


def write_shards(folder: Path, shards: int, samples: int, side: int) -> None:
    """JPEG pictures of smooth noise, about a third of a byte a pixel."""
    generator = np.random.default_rng(0)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"train-{shard:03d}.tar")) as writer:
            for sample in range(samples):
                small = Image.fromarray(generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
                stream = io.BytesIO()
                small.resize((side, side), Image.Resampling.BICUBIC).save(stream, "jpeg", quality=90)
                key = f"{shard:03d}{sample:05d}"
                writer.write({"__key__": key, "jpg": stream.getvalue(), "cls": sample % 10})


def streamed(folder: Path, decode: Callable[[bytes], object]) -> int:
    """Every sample through webdataset's own pipeline; their number."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000, seed=0).to_tuple("jpg", "cls")
    return sum(decode(image) is not None for image, _ in dataset)


def by_index(pictures: ShardMembers, decode: Callable[[bytes], object]) -> int:
    """Every image in random order; their number."""
    return sum(decode(pictures.read(index)) is not None for index in torch.randperm(len(pictures)).tolist())


def sample_of(folder: Path, number: int) -> dict[str, Any]:
    """The sample of that number, to which webdataset has to read all before it."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return next(itertools.islice(webdataset.WebDataset(urls, shardshuffle=False), number, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--samples", type=int, default=100, help="in each shard")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.json)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, options.shards, options.samples, options.side)
        split = create_dataset(f"webdataset:{folder}/train-*.tar", test=f"{folder}/train-000.tar").splits["train"]
        pictures, images = split.pictures, options.shards * options.samples
        assert streamed(folder, len) == by_index(pictures, len) == images
        assert sample_of(folder, images // 2)["jpg"] == pictures.read(images // 2)

        def decode(content: bytes) -> object:
            with Image.open(io.BytesIO(content)) as image:
                return split._fit(image.convert("RGB"))

        results.add(f"{images} pictures, {options.side} pixels wide, {int(pictures.sizes.sum()) // images} bytes each")
        for what, function, pairs in (("read", len, options.pairs), ("decoded", decode, max(options.pairs // 4, 5))):
            ratio = paired_ratio(
                f"{images} images {what}, by index against webdataset",
                lambda function=function: streamed(folder, function),
                lambda function=function: by_index(pictures, function),
                pairs=pairs,
                warm_up=1,
            )
            results.add(ratio)
            speeds = [1e3 * images / milliseconds for milliseconds in (ratio.baseline_ms, ratio.candidate_ms)]
            results.add(f"{what}: {speeds[0]:.0f} -> {speeds[1]:.0f} images a second")
        results.add(
            paired_ratio(
                "start at the middle, by index against webdataset",
                lambda: sample_of(folder, images // 2),
                lambda: pictures.read(images // 2),
                pairs=options.pairs,
                warm_up=1,
            )
        )


if __name__ == "__main__":
    main()
