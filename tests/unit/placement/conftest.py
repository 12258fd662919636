from __future__ import annotations

import pytest

from elastic_kfac.placement.costs import LayerShape


@pytest.fixture(scope="session")
def resnet50() -> tuple[LayerShape, ...]:
    """The 53 convolutions and the classifier of ResNet-50."""
    layers = [LayerShape("conv1", 3 * 49, 64, 3 * 49 * 64)]

    def add(name: str, inputs: int, kernel: int, outputs: int) -> None:
        a = inputs * kernel * kernel
        layers.append(LayerShape(name, a, outputs, a * outputs))

    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            prefix = f"layer{stage + 1}.{block}"
            add(f"{prefix}.conv1", inputs, 1, width)
            add(f"{prefix}.conv2", width, 3, width)
            add(f"{prefix}.conv3", width, 1, 4 * width)
            if block == 0:
                add(f"{prefix}.downsample", inputs, 1, 4 * width)
            inputs = 4 * width
    layers.append(LayerShape("fc", 2049, 1000, 2049 * 1000))
    return tuple(layers)
