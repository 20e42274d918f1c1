"""Put this package's layers into a timm model that has equivalents, compare, time, and take them out again."""

import time

import timm
import torch

import m2mkd_fast as m2mkd

model = timm.create_model("beit_base_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=4).eval()
images = torch.randn(8, 3, 64, 64)


@torch.no_grad()
def milliseconds(passes: int = 10) -> float:
    model(images)
    start = time.perf_counter()
    for _ in range(passes):
        model(images)
    return 1e3 * (time.perf_counter() - start) / passes


with torch.no_grad():
    before, stock = model(images), milliseconds()
    handle = m2mkd.apply(model, m2mkd.accelerate())
    print(handle.report)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    print(f"{stock:.1f} ms before, {milliseconds():.1f} ms with this package's layers")
    handle.revert()
    assert torch.equal(model(images), before)
