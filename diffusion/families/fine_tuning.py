"""Networks of which training changes a part: an adapter, or a pipeline's denoiser.

Adapters are trained through peft, and merged into the weights to generate.
"""

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusion.common.errors import UserError, install_hint
from diffusion.common.files import sha256_bytes
from diffusion.families.adapters import AdapterConfig, LoRAConfig
from diffusion.families.ddpm.network import seeded_dropout
from diffusion.families.narrow_weights import narrow_weights
from diffusion.families.quantization import quantize_layers


class TrainableSubset(nn.Module):
    """A network of which training changes the parameters ``trained`` alone, by their names.

    Its state, and all that ``parameters`` lists, are these; the other weights of ``network`` move between devices with
    them and are otherwise hidden. Calls go to ``network``, which holds the same parameters.
    """

    network: nn.Module
    seeds: "DropoutSeeds | None" = None
    """Where the adapter's dropout finds its seeds, the keyword ``draws`` of a call; None: it drops nothing."""

    def __init__(self, network: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        # Past nn.Module, which would register it.
        object.__setattr__(self, "network", network)
        for name, parameter in trained.items():
            module: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what ``network`` computes."""
        if self.seeds is not None:
            self.seeds.set(kwargs.get("draws"))
        return self.network(*args, **kwargs)

    @cached_property
    def base(self) -> nn.Module:
        """``network`` without its adapter, in its mode for evaluation, with the same frozen weights in memory.

        It stays on the device that ``network`` is on now.
        """
        network = share(self.network)
        for name, module in adapted_layers(network).items():
            network.set_submodule(name, module.base_layer)  # type: ignore[arg-type]
        return network.eval().requires_grad_(False)

    def narrow(self, device: torch.device) -> None:
        """Copy the frozen weights to ``device`` for steps under autocast: see ``narrow_weights``."""
        narrow_weights(self.network, device)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of ``network`` as well, except of the adapted layers themselves."""
        self.network.train(mode)
        for module in adapted_layers(self.network).values():
            # In training peft's LoKr consumes torch's random numbers in vain, and only there has its DoRA a dropout.
            module.training = not hasattr(module, "lokr_w1")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # In place: the parameters stay the objects that are registered here.
        self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in adapted_layers(self.network).values():
            if getattr(module, "lora_magnitude_vector", None):
                # peft's DoRA takes views of these, which channels last has not.
                for parameter in (*module.lora_A.parameters(), *module.lora_B.parameters()):  # type: ignore[union-attr]
                    parameter.data = parameter.data.contiguous()
        return self


class DropoutSeeds:
    """Seeds of the images, (N,) int64, that a thread computes."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._latest: Tensor | None = None

    def set(self, seeds: Tensor | None) -> None:
        """Set the seeds of the calling thread."""
        self._local.seeds = self._latest = seeds

    def get(self) -> Tensor | None:
        """Return the seeds of the calling thread, or the latest of all.

        On a GPU, where one thread computes, another thread of autograd's recomputes activations.
        """
        seeds: Tensor | None = getattr(self._local, "seeds", self._latest)
        return seeds

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class SeededDropout(nn.Module):
    """Dropout of the inputs of the adapted ``layer``, (N, …), by the seeds of their images; without any, none."""

    def __init__(self, layer: str, rate: float, seeds: DropoutSeeds) -> None:
        super().__init__()
        # Other values in each layer.
        self.offset = int(sha256_bytes(layer.encode())[:15], 16)
        self.rate, self.seeds = rate, seeds
        # Seeds are of a thread, and other ones at each call. A decorator would import the compiler into every command.
        self.forward = torch.compiler.disable(self.drop)  # type: ignore[no-untyped-call]

    def drop(self, x: Tensor) -> Tensor:
        """Drop values of ``x``, in an order that its layout in memory does not change."""
        seeds = self.seeds.get()
        return x if seeds is None else seeded_dropout(x, seeds + self.offset, self.rate)


def train_parameters(network: nn.Module, names: Iterable[str]) -> TrainableSubset:
    """Freeze a copy of ``network``, which shares its frozen weights, except the parameters ``names``."""
    clone, names = share(network), set(names)
    weights = {name: value.detach().clone() for name, value in network.named_parameters() if name in names}
    clone.load_state_dict(weights, strict=False, assign=True)
    trained = {name: clone.get_parameter(name) for name in weights}
    for parameter in trained.values():
        parameter.requires_grad_()
    return TrainableSubset(clone, trained)


def train_adapters(
    network: nn.Module, adapter: AdapterConfig, layers: Iterable[str], quantized: Iterable[str] = ()
) -> TrainableSubset:
    """Freeze a copy of ``network``, which shares its weights, and add an adapter to its ``layers``.

    The layers ``quantized`` have weights of their own, as ``adapter.base_weights`` says. What is random of the adapter
    is from torch's random numbers. Raises UserError if peft is not installed, or an option of the adapter fits none of
    the layers.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError(f"training.adapter needs peft, which is not installed: {install_hint('diffusers')}") from error
    clone = share(network)
    if adapter.base_weights is not None:
        quantize_layers(clone, quantized, adapter.base_weights)
    with warnings.catch_warnings():
        # Of blocks of rotations that it fits to the layer.
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(adapter.peft_config({*layers}), clone)
    trained = {name: parameter for name, parameter in clone.named_parameters() if parameter.requires_grad}
    subset = TrainableSubset(
        clone, {name.removesuffix(".default").replace(".default.", "."): value for name, value in trained.items()}
    )
    if isinstance(adapter, LoRAConfig) and adapter.dropout is not None:
        # peft's own takes random numbers from a state that resuming lacks.
        subset.seeds = seeds = DropoutSeeds()
        for name, module in adapted_layers(clone).items():
            module.lora_dropout["default"] = SeededDropout(name, adapter.dropout, seeds)  # type: ignore
    return subset


def adapted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Find peft's layers in ``network``, by name."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "base_layer")}


def select_layers(layers: Iterable[str], targets: Iterable[str] | None, default: Iterable[str]) -> set[str]:
    """Choose the ``layers`` whose names, or ends behind a dot, are among ``targets``, or among the ``default``."""
    names = set()
    for target in default if targets is None else targets:
        matches = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not matches and targets is not None:
            counts = Counter(end for name in layers if not (end := name.rpartition(".")[2]).isdigit())
            ends = sorted(counts, key=lambda end: (-counts[end], end))
            raise UserError(
                f"training.adapter.target_modules names {target}, and the network has no such linear or convolutional "
                f"layer: use names such as {', '.join(ends[:12])}"
            )
        names |= matches
    return names


def share(network: nn.Module) -> nn.Module:
    """Copy ``network``, with the same frozen weights in memory."""
    # Copies of what is in the memo are its values.
    memo = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in network.parameters()}
    return copy.deepcopy(network, memo)


def merge_adapters(network: nn.Module, adapter: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the adapted weights of ``network`` by name from the adapter's ``tensors``, LAYER.PART each.

    Raises ValueError for tensors that do not fit.
    """
    layers, weights = dict(network.named_modules()), {}
    parts_by_layer = split_parts(adapter, tensors)
    for name, parts in sorted(parts_by_layer.items()):
        layer = layers.get(name)
        if layer is None or not is_adaptable(layer, adapter):
            raise ValueError(f"no layer {name}")
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # In float64: the merged weights depend little on the machine that merged them.
        merged = adapter.merge(name, weight.detach().double(), {part: value.double() for part, value in parts.items()})
        weights[f"{name}.weight"] = merged.to(weight)
    return weights


def split_parts(adapter: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort an adapter's ``tensors``, LAYER.PART each, by layer and part; ValueError for others, or missing ones."""
    known, layers = frozenset().union(*adapter.parts), dict[str, dict[str, Tensor]]()
    for name, value in tensors.items():
        part = next((part for part in known if name.endswith(f".{part}")), None)
        if part is None:
            raise ValueError(f"{name} is not of an adapter of the kind {adapter.kind}")
        layers.setdefault(name.removesuffix(f".{part}"), {})[part] = value
    for name, parts in layers.items():
        if frozenset(parts) not in adapter.parts:
            raise ValueError(f"tensors of {name}")
    return layers


def is_adaptable(module: nn.Module | None, adapter: AdapterConfig) -> bool:
    """Whether ``adapter`` can adapt a layer."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and (adapter.adapts_kernels or module.kernel_size == (1, 1))
    return isinstance(module, nn.Linear)
