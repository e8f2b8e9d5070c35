"""How near float32 convolutions are to the fastest matrix product of one thread, and other ways to compute them.

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/convolutions.py

The shapes are those of the default networks for 28 and 64 pixels. The shortest of many short runs counts, which other
work on the machine hardly changes. The variables make a processor with AVX-512 compute as one without.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

SHAPES = {
    "48 to 48 channels, 14x14": (16, 48, 48, 14),
    "96 to 48 channels, 14x14": (16, 96, 48, 14),
    "48 to 48 channels, 7x7": (16, 48, 48, 7),
    "48 to 48 channels, 32x32": (4, 48, 48, 32),
}
"""Images, channels before and after, height and width of 3x3 convolutions."""
LAYOUTS = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}


def measure(function: Callable[[], object], runs: int) -> float:
    """Milliseconds of the shortest run."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def passes(
    images: int, inputs: int, outputs: int, side: int, layout: torch.memory_format
) -> list[Callable[[], object]]:
    """The forward pass of a convolution, and the gradients of its inputs and of its weights."""
    x, weight, gradient = (
        torch.randn(*shape).contiguous(memory_format=layout)
        for shape in ((images, inputs, side, side), (outputs, inputs, 3, 3), (images, outputs, side, side))
    )
    bias, ones = torch.randn(outputs), [1, 1]

    def backward(mask: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, [outputs], ones, ones, ones, False, [0, 0], 1, mask
        )

    return [
        lambda: torch.conv2d(x, weight, bias, padding=1),
        lambda: backward([True, False, False]),
        lambda: backward([False, True, True]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    a, b = torch.randn(2, 384, 384)
    print(f"{torch.backends.cpu.get_cpu_capability()}; ms, and GFLOP/s without Winograd's savings")
    print(f"matrix product of 384x384: {2 * 384**3 / measure(lambda: a @ b, runs) / 1e6:.0f} GFLOP/s")
    for name, (images, inputs, outputs, side) in SHAPES.items():
        print(f"\n{name}, {images} images")
        work = 2 * images * inputs * outputs * side**2 * 9 / 1e6
        for layout, memory_format in LAYOUTS.items():
            parts = passes(images, inputs, outputs, side, memory_format)
            for part, function in zip(("forward", "gradient of inputs", "gradient of weights"), parts, strict=True):
                milliseconds = measure(function, runs)
                print(f"  {layout + ', ' + part:40} {milliseconds:7.3f} {work / milliseconds:6.0f}")
        columns, gradient = torch.randn(images * side**2, inputs * 9), torch.randn(images * side**2, outputs)
        milliseconds = measure(partial(torch.matmul, gradient.mT, columns), runs)
        print(f"  {'product of im2col for the weights, alone':40} {milliseconds:7.3f} {work / milliseconds:6.0f}")
        # F(2x2, 3x3): 16 products, between transforms of 4x4 inputs and to 2x2 outputs, of which one product is timed.
        tiles = images * ((side + 1) // 2) ** 2
        x, weights = torch.randn(16, tiles, inputs), torch.randn(16, inputs, outputs)
        squares, matrix = torch.randn(tiles * inputs, 16), torch.randn(16, 16)
        products = measure(partial(torch.matmul, x, weights), runs)
        transform = measure(partial(torch.matmul, squares, matrix), runs)
        print(f"  {'Winograd, products + a transform':40} {products:7.3f} + {transform:.3f}")


if __name__ == "__main__":
    main()
